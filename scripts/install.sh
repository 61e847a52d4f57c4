#!/usr/bin/env bash
# Make a virtual environment and install the project with its development tools: with uv where it can be had, else with pip.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
start=$(date +%s)
echo "== installing into $venv (once)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if "$venv/bin/python" -m pip install -q --disable-pip-version-check uv 2>/dev/null &&
   "$venv/bin/python" -m uv pip install -q --compile-bytecode --python "$venv/bin/python" -e '.[dev]'; then :
else
  echo "uv did not work here: installing with pip, which is slower"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check -e '.[dev]'
fi
echo "== installed in $(( $(date +%s) - start )) s"

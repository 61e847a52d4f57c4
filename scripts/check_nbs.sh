#!/usr/bin/env bash
# The package must be exactly what the notebooks export, and the notebooks must be clean. Changes nothing where that is so.
set -euo pipefail
before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
cp -r nbs ssl_patch README.md "$before"
bash scripts/export.sh
ok=1
for d in nbs ssl_patch README.md; do
  diff -rq -x __pycache__ -x .ipynb_checkpoints "$before/$d" "$d" || ok=0
done
if [ $ok = 0 ]; then
  echo "The files above were not what the notebooks give. They are now: look at them and commit (make prepare does the same)." >&2
  exit 1
fi
echo "notebooks are clean, the package and README.md are what they export"

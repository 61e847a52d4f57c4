#!/usr/bin/env bash
# Clean the notebooks, export the package from them and write README.md. What no notebook exports any more goes.
# What the notebooks say of each parameter, beside it, is written into the docstrings of what was exported.
set -euo pipefail
nbdev_clean
find ssl_patch -name '*.py' ! -name '__init__.py' -delete
nbdev_export
rm -f ssl_patch/_modidx.py  # nbdev's index for its own site; Sphinx writes the one that others can use
find ssl_patch -mindepth 1 -depth -type d ! -name __pycache__ | while read -r folder; do
  rest=$(find "$folder" -type f ! -name '__init__.py' ! -path '*/__pycache__/*')
  [ -n "$rest" ] || rm -r "$folder"
done
python scripts/docstrings.py ssl_patch
python scripts/readme.py

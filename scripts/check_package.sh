#!/usr/bin/env bash
# The package as others get it: sdist and wheel, checked, then installed without notebook tools in a bare environment of each Python
# that is named, where the example of README.md runs. The first one gets the lowest versions that settings.ini allows, the others the newest.
#     bash scripts/check_package.sh 3.10 3.13        # what `uv python list` knows, or paths of interpreters
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 3.10 3.13
uv=${UV:-uv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/src"
git ls-files -z | xargs -0 cp --parents -t "$work/src"  # a copy: building leaves folders behind
"$uv" build -q -o "$work/dist" "$work/src"
"$uv" tool run -q twine check --strict "$work"/dist/*.whl "$work"/dist/*.tar.gz
python3 - "$work" <<'EOF'
import re
import sys
from configparser import ConfigParser
from pathlib import Path

work = Path(sys.argv[1])
config = ConfigParser(delimiters=['='])
config.read('settings.ini')
lowest = re.findall(r'([\w-]+)>=([\w.]+)', config['DEFAULT']['requirements'])
(work / 'lowest.txt').write_text(''.join(f'{name}=={version}\n' for name, version in lowest))
code = '\n'.join(re.findall(r'```python\n(.*?)```', Path('README.md').read_text(), re.S))
(work / 'example.py').write_text(f"""if __name__ == '__main__':
    import sys
    import torch
    import ssl_patch
    assert ssl_patch.__file__.startswith(sys.prefix), ssl_patch.__file__
    print('python', sys.version.split()[0], 'torch', torch.__version__, flush=True)
    exec({code!r})
    print('the example of README.md ran: its last loss is', round(loss.item(), 3))
""")
EOF
bounds=(-r "$work/lowest.txt")
for python in "$@"; do
  "$uv" venv -q -p "$python" "$work/venv-${python//\//_}"
  bare="$work/venv-${python//\//_}/bin/python"
  "$uv" pip install -q --python "$bare" "$(ls "$work"/dist/*.whl)[demo]" "${bounds[@]}"
  bounds=()
  (cd "$work" && MPLBACKEND=agg PYTHONPATH='' "$bare" example.py)
  (cd "$work" && PYTHONPATH='' "$bare" -m ssl_patch --version)
done
# what a user types has the types that the package says
cp tests/fixtures/typed_use.py "$work"
(cd "$work" && "$uv" tool run -q pyright --pythonpath "$bare" typed_use.py)

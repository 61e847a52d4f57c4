"What pip installs: a package that imports without notebook tools, and quickly."
import os, shutil, subprocess, sys, zipfile
from pathlib import Path


ROOT = Path(__file__).parent.parent
MODULES = ['data', 'views', 'patches', 'losses', 'encoders', 'peers', 'towers', 'terms', 'methods', 'probes', 'protocols', 'figures', 'training', 'finetune', 'speed', 'results', 'cli', 'all']

def python(code, *args, **env):
    return subprocess.run([sys.executable, *args, '-c', code], capture_output=True, text=True, env={**os.environ, **env})

def test_runs_without_notebook_tools():
    "With nbdev, fastcore, IPython and the extras made unimportable, every module imports and a loss computes."
    r = python(f'''
import sys
for name in ("nbdev", "fastcore", "execnb", "IPython", "skimage", "sklearn", "pytest", "nbconvert"): sys.modules[name] = None
import importlib
for m in {MODULES}: importlib.import_module("ssl_patch." + m)
import torch; from ssl_patch.losses import info_nce
print(info_nce(torch.eye(4), torch.eye(4)).item() >= 0)''')
    assert r.stdout.strip() == 'True', r.stderr

def test_a_loss_needs_torch_alone():
    r = python('import sys, ssl_patch.losses; print(sorted(set(sys.modules) & {"timm", "matplotlib", "tyro", "PIL", "fastprogress", "safetensors"}))')
    assert r.stdout.strip() == '[]', r.stderr

def test_nothing_heavy_at_import():
    "What takes a second to import is loaded when it is used, not before, whichever module comes first."
    r = python(f'''
import importlib, sys, torch
ours, before = {MODULES}, set(sys.modules)
heavy = {{"torchvision", "torch._dynamo", "torch._inductor", "timm", "matplotlib", "PIL", "skimage", "sklearn", "scipy", "pandas", "kornia", "lightly"}}
for m in ours:
    importlib.import_module("ssl_patch." + m)
    found = sorted((set(sys.modules) - before) & heavy)
    if found: print(m, found)''')
    assert r.returncode == 0 and not r.stdout, r.stdout + r.stderr

def test_wheel(tmp_path):
    "The wheel holds the modules and py.typed, no notebooks or tests, and its metadata keeps the extras apart."
    src = tmp_path/'src'; src.mkdir() # a copy: building leaves folders behind
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'): shutil.copy(ROOT/f, src)
    shutil.copytree(ROOT/'ssl_patch', src/'ssl_patch', ignore=shutil.ignore_patterns('__pycache__'))
    r = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', str(tmp_path), str(src)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    assert {f'ssl_patch/{m}.py' for m in MODULES} | {'ssl_patch/py.typed', 'ssl_patch/__init__.py'} <= set(names)
    assert not [n for n in names if n.endswith('.ipynb') or n.startswith('tests')]
    meta = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).read(next(n for n in names if n.endswith('METADATA'))).decode()
    core = [l for l in meta.splitlines() if l.startswith('Requires-Dist') and 'extra' not in l]
    assert len(core) == 9 and not any('nbdev' in l or 'jupyter' in l for l in core)

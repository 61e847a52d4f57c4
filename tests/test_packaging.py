"What pip installs: a package that imports without notebook tools, and quickly."

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ssl_patch.models.shipped import trained_encoders

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'ssl_patch'
MODULES = [
    '.'.join(p.relative_to(PACKAGE).with_suffix('').parts)
    for p in sorted(PACKAGE.rglob('*.py'))
    if not p.stem.startswith('_')
]
SHADOWED = (
    'alpha beta gamma weak strong fit table heat profile machine linear copies bound growth names '
    'budget sweep data run encoder method image views loss labels record records unit gather world'
)


def test_modules_are_those_of_the_house():
    assert len(MODULES) > 50
    assert {'losses', 'samplers', 'all', 'cli', 'methods.sce', 'training.pretrain'} <= set(MODULES)


def python(code, *args, **env):
    return subprocess.run(
        [sys.executable, *args, '-c', code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_runs_without_notebook_tools():
    "With nbdev, fastcore, IPython and the extras made unimportable, every module imports."
    r = python(f"""
import importlib, sys
for name in ("nbdev", "fastcore", "execnb", "IPython", "skimage", "sklearn", "pytest", "nbconvert"):
    sys.modules[name] = None
for m in {MODULES}: importlib.import_module("ssl_patch." + m)
import torch; from ssl_patch.losses import info_nce
print(info_nce(torch.eye(4), torch.eye(4)).item() >= 0)""")
    assert r.stdout.strip() == 'True', r.stderr


def test_a_loss_needs_torch_alone():
    others = {'timm', 'matplotlib', 'tyro', 'PIL', 'fastprogress', 'safetensors'}
    r = python(f'import sys, ssl_patch.losses; print(sorted(set(sys.modules) & {others}))')
    assert r.stdout.strip() == '[]', r.stderr


def test_nothing_heavy_at_import():
    """What takes a second to import is loaded when it is used, whichever module comes first; only
    the detectors, which are torchvision's, load it."""
    light = [m for m in MODULES if m != 'transfer.detectors']
    r = python(f"""
import importlib, sys, torch
ours, before = {light}, set(sys.modules)
heavy = {{"torchvision", "torch._dynamo", "torch._inductor", "timm", "matplotlib", "PIL", "skimage",
         "sklearn", "scipy", "pandas", "kornia", "lightly"}}
for m in ours:
    importlib.import_module("ssl_patch." + m)
    found = sorted((set(sys.modules) - before) & heavy)
    if found: print(m, found)""")
    assert r.returncode == 0 and not r.stdout, r.stdout + r.stderr


def test_wheel(tmp_path):
    "Modules, py.typed, trained encoders; no notebooks or tests; extras are apart in the metadata."
    src = tmp_path / 'src'
    src.mkdir()  # a copy: building leaves folders behind
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(ROOT / f, src)
    shutil.copytree(
        ROOT / 'ssl_patch', src / 'ssl_patch', ignore=shutil.ignore_patterns('__pycache__')
    )
    words = f'-m pip wheel -q --no-deps --no-build-isolation -w {tmp_path} {src}'.split()
    r = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    wheel = zipfile.ZipFile(next(tmp_path.glob('*.whl')))
    names = wheel.namelist()
    ours = {f'ssl_patch/{m.replace(".", "/")}.py' for m in [*MODULES, '__main__', '__init__']}
    assert ours | {'ssl_patch/py.typed'} <= set(names)
    assert {f'ssl_patch/{m.split(".")[0]}/__init__.py' for m in MODULES if '.' in m} <= set(names)
    trained = {f'ssl_patch/models/trained/{n}.safetensors' for n in trained_encoders()}
    assert len(trained) > 2 and trained <= set(names)
    assert not [n for n in names if n.endswith('.ipynb') or n.startswith('tests')]
    read = lambda end: wheel.read(next(n for n in names if n.endswith(end))).decode()
    assert 'ssl_patch = ssl_patch.__main__:main' in read('entry_points.txt')
    meta = read('METADATA')
    core = [l for l in meta.splitlines() if l.startswith('Requires-Dist') and 'extra' not in l]
    assert len(core) == 9 and not any('nbdev' in l or 'jupyter' in l for l in core)


def test_a_star_brings_what_is_typed_and_shadows_nothing():
    r = python("""
names = {}
exec('from ssl_patch.all import *', names)
print(*(n for n in names if n != '__builtins__'))""")
    names = set(r.stdout.split())
    assert 50 <= len(names) <= 100, r.stderr
    assert not names & set(SHADOWED.split())
    typed = 'images vit APS Pretrainer knn Method aug_moco_v2 aug_weak ema SCELoss'
    assert {*typed.split(), 'AsymmetricPatchSampler', 'torch', 'nn', 'F', 'partial'} <= names


def test_pages_gather_functions_of_tensors():
    "What losses and samplers bring is what the rooms define, and nothing but functions."
    import inspect
    import ssl_patch.losses
    import ssl_patch.samplers

    for page in (ssl_patch.losses, ssl_patch.samplers):
        for name in page.__all__:
            function = getattr(page, name)
            assert inspect.isfunction(function) and function.__doc__, name
            assert function.__module__.startswith('ssl_patch.methods.'), name


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='not a checkout')
def test_the_checkout_stays_small():
    "Executed notebooks and all else that is tracked, below 16 MiB: a clone takes seconds."
    words = ['git', 'ls-files', '-z']
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / os.fsdecode(name) for name in listed.split(b'\0') if name]
    assert len(files) > 100
    assert sum(f.stat().st_size for f in files if f.is_file()) < 16 * 2**20

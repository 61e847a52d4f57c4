"The commands around the package: they do what their help says, and say what is wrong."

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from ssl_patch.models.files import load_encoder
from ssl_patch.models.shipped import trained_encoders

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'scripts' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(path, *sources):
    cell = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
    cells = [cell | dict(id=f'c{i}', source=s) for i, s in enumerate(sources)]
    kernel = dict(display_name='python3', language='python', name='python3')
    whole = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(whole))
    return path


def test_a_failing_cell_is_named_and_its_notebook_left_as_it_was(tmp_path):
    path = notebook(tmp_path / 'wrong.ipynb', 'x = 1', '#| eval: false\n1 / 0', 'x + unheard_of')
    before = path.read_text()
    words = [sys.executable, ROOT / 'scripts' / 'run_notebooks.py', path, '--workers', '1']
    r = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 1 and 'wrong.ipynb, cell 2:' in r.stderr and 'unheard_of' in r.stderr
    assert re.match(r' *\d+\.\d s  wrong.ipynb', r.stdout) and path.read_text() == before


def test_what_ran_is_kept_and_what_is_marked_is_left_out(tmp_path):
    run_notebooks = script('run_notebooks')
    sources = 'import os; print(os.environ["OMP_WAIT_POLICY"])', '#| slow\n1 / 0', '#| hide\n6 * 7'
    path = notebook(tmp_path / 'right.ipynb', *sources)
    keep = dict(os.environ)
    try:
        seconds, wrong = run_notebooks.run(path, 60)
    finally:
        os.environ.clear()
        os.environ.update(keep)
    assert wrong is None and seconds > 0
    outputs = [c['outputs'] for c in json.loads(path.read_text())['cells']]
    assert ''.join(outputs[0][0]['text']) == 'passive\n' and outputs[1] == []
    assert ''.join(outputs[2][0]['data']['text/plain']) == '42'


def test_notebooks_are_found_in_folders(tmp_path):
    (tmp_path / '.ipynb_checkpoints').mkdir()
    for name in ('b', 'a', '.ipynb_checkpoints/a'):
        notebook(tmp_path / f'{name}.ipynb', '1')
    found = script('run_notebooks').notebooks([tmp_path])
    assert [p.name for p in found] == ['a.ipynb', 'b.ipynb']


def test_readme_links_and_code():
    readme = script('readme')
    text = readme.from_the_root('[a](views/01_crops.ipynb) [b](../C.md) [c](https://x.org/y.ipynb)')
    assert text == '[a](nbs/views/01_crops.ipynb) [b](C.md) [c](https://x.org/y.ipynb)'
    table = dict(data={'text/markdown': ['[a](all.ipynb)']}, output_type='execute_result')
    cell = dict(cell_type='code', source=['#| echo: false\n', 'x'], outputs=[table])
    assert readme.cell_text(3, cell) == '[a](nbs/all.ipynb)'
    cell['source'] = ['x']
    assert readme.cell_text(3, cell) == '```python\nx\n```\n\n[a](nbs/all.ipynb)'


def test_make_has_what_it_names():
    text = (ROOT / 'Makefile').read_text()
    named = re.search(r'^\.PHONY: (.*)$', text, re.M)[1].split()
    assert {'demo', 'test', 'bench', 'lab', 'prepare', 'notebooks'} <= set(named)
    for target in named:
        assert re.search(rf'^{target}:.*## \S', text, re.M), f'{target} has no rule, or no help'
    for path in re.findall(r'scripts/\w+\.\w+', text):
        assert (ROOT / path).is_file()


def test_trained_encoders_are_those_of_the_script_and_say_what_they_are():
    files = trained_encoders()
    assert set(files) == set(script('train_encoders').ENCODERS)
    assert sum(path.stat().st_size for path in files.values()) < 1_300_000
    for name, path in files.items():
        card = load_encoder(path).card
        assert card['command'].endswith(f'train_encoders.py {name}')
        assert card['data'] and card['licence'] and card['what']
        assert {'raw pixels', 'random encoder'} <= set(card['knn_baselines'])
    gain = {n: load_encoder(p).card for n, p in files.items()}
    gain = {n: c['knn'] - c['knn_baselines']['random encoder'] for n, c in gain.items()}
    assert gain['aps_photos'] > 0.1 > 0 > gain['collapsed_photos']


def test_runs_become_files_to_give_away(tmp_path):
    "Half the bytes, the card of the run with what was measured, nearly the same features."
    import torch

    from ssl_patch.data.photographs import photo_crops
    from ssl_patch.evaluation.knn import knn
    from ssl_patch.methods.moco import MoCoV2
    from ssl_patch.models.encoders import resnet
    from ssl_patch.training.pretrain import Pretrainer

    data, run = photo_crops(32).sample(128, 64), tmp_path / 'runs' / 'mine'
    network = resnet('resnet18', 32, width=8)
    Pretrainer(MoCoV2(network), data, out=run, epochs=1, batch_size=64, progress='quiet').fit()
    words = [sys.executable, str(ROOT / 'scripts' / 'release_encoders.py'), str(run.parent)]
    words += ['--out', str(tmp_path / 'out'), '--licence', 'of the test']
    r = subprocess.run(words, capture_output=True, text=True)
    assert r.returncode == 2 and 'no finished and measured run' in r.stderr
    encoder = load_encoder(run / 'encoder.safetensors')
    record = knn(encoder, data)
    record.save(run)
    subprocess.run(words, check=True)
    file = tmp_path / 'out' / 'mine.safetensors'
    assert file.stat().st_size < 0.6 * (run / 'encoder.safetensors').stat().st_size
    given = load_encoder(file)
    assert given.card['records'][0]['value'] == round(record.value, 4)
    assert given.card['method'] == 'MoCo v2' and given.card['licence'] == 'of the test'
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(given(x).image, encoder(x).image, atol=0.05, rtol=0.05)
    sums = (tmp_path / 'out' / 'SHA256SUMS').read_text().split()
    assert sums[1] == 'mine.safetensors' and len(sums[0]) == 64


def test_a_chart_is_packed_and_a_photograph_is_not():
    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image

    packed = script('run_notebooks').packed

    def opened(png):
        return np.asarray(Image.open(io.BytesIO(png)).convert('RGB')).astype(int)

    def png(fig):
        kept = io.BytesIO()
        fig.savefig(kept, format='png')
        plt.close(fig)
        return kept.getvalue()

    fig, ax = plt.subplots()
    ax.plot([0, 1, 0], label='a line')
    ax.legend()
    chart = png(fig)
    assert len(packed(chart)) < len(chart) / 2
    assert abs(opened(packed(chart)) - opened(chart)).mean() < 0.5
    fig, ax = plt.subplots()
    ax.imshow(np.random.default_rng(0).integers(0, 256, (40, 40, 3)))
    noise = png(fig)
    assert packed(noise) == noise

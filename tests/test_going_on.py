"Runs that are lengthened, moved, begun again and stopped; ~ at every door; another image side."

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from steps import StopAt

from ssl_patch.cli import main
from ssl_patch.data.sources import images
from ssl_patch.evaluation.records import Record, load_records
from ssl_patch.methods.aps import APS
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.files import load_encoder, open_encoder, save_encoder
from ssl_patch.reports.runs import load_run, load_runs
from ssl_patch.training import pretrain, progress
from ssl_patch.training.checkpoint import begin_run
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.training.progress import plot_curves
from ssl_patch.transfer import finetune as tuning
from ssl_patch.transfer.few_labels import finetune
from ssl_patch.transfer.finetune import FineTuner
from ssl_patch.transfer.recipes import FinetuneConfig


# ---- longer


@pytest.mark.parametrize('method', ['aps', 'moco_v2'])
def test_a_finished_run_is_lengthened(pretrainer, tmp_path, method):
    "Heads, queue, optimiser and history are kept; the schedule is the longer one from there on."
    two = pretrainer(method, epochs=2, out=tmp_path / 'r').fit()
    before = {k: v.clone() for k, v in two.method.state_dict().items() if torch.is_tensor(v)}
    moments = two.optimizer.state_dict()['state']
    four = pretrainer(method, weights=1, epochs=4, out=tmp_path / 'r', resume=True)
    for k, v in four.method.state_dict().items():
        assert not torch.is_tensor(v) or torch.equal(v, before[k]), k
    for i, kept in four.optimizer.state_dict()['state'].items():
        assert all(torch.equal(torch.as_tensor(v), moments[i][k]) for k, v in kept.items())
    four.fit()
    assert [h['epoch'] for h in four.history] == [1, 2, 3, 4]
    assert four.history[:2] == two.history
    for h in four.history[2:]:  # the rate of the last batch of the epoch, in a run of four
        assert h['lr'] == four.schedule.at(h['batches'] - 1)
    config = json.loads((tmp_path / 'r' / 'config.json').read_text())
    assert config['train_config']['epochs'] == 4 and config['started']
    (noted,) = config['continued']
    assert noted['batches'] == 8 and noted['changed']['train_config.epochs'] == [2, 4]
    card = load_encoder(tmp_path / 'r' / 'encoder.safetensors').card
    assert card['continued'] == [noted] and card['epochs_done'] == 4
    again = pretrainer(method, epochs=4, out=tmp_path / 'r', resume=True)  # loads, noted once
    assert again.continued == [noted]
    with pytest.raises(ValueError, match='epochs 4, this run 3'):
        pretrainer(method, epochs=3, out=tmp_path / 'r', resume=True)
    assert len(load_run(tmp_path / 'r').history) == 4


def test_a_lengthened_run_says_what_becomes_of_the_schedule(pretrainer, tmp_path, capsys):
    pretrainer(epochs=1, out=tmp_path / 'r').fit()
    pretrainer(epochs=2, out=tmp_path / 'r', resume='auto', progress='lines')
    said = capsys.readouterr().out
    assert 'train_config.epochs 1 -> 2' in said and 'learning rate' in said


def test_a_fine_tuning_is_lengthened(noise, tmp_path):
    net, config = vit(size=16, patch=4, width=32, depth=1, heads=2), FinetuneConfig(2, 64)
    tuner = lambda c: FineTuner(net, noise, c, out=tmp_path / 'r', resume='auto', progress='quiet')
    tuner(config).fit()
    longer = tuner(replace(config, epochs=3)).fit()
    assert [h['epoch'] for h in longer.history] == [1, 2, 3]
    assert longer.continued[0]['changed'] == {'finetune_config.epochs': [2, 3]}
    with pytest.raises(ValueError, match='epochs 3, this run 2'):
        tuner(config)


# ---- elsewhere


def test_auto_begins_or_goes_on(pretrainer, tmp_path):
    assert pretrainer(out=tmp_path / 'r', resume='auto').fit(1).batches == 4
    assert pretrainer(out=tmp_path / 'r', resume='auto').batches == 4
    with pytest.raises(ValueError, match="resume must be one of.*got 'yes'"):
        pretrainer(out=tmp_path / 's', resume='yes')
    with pytest.raises(ValueError, match='out must be the folder'):
        pretrainer(resume=True)


def test_before_the_first_checkpoint(pretrainer, tmp_path, capsys):
    "A kill in the first epoch leaves config.json alone: a resume begins, and says so."
    run = pretrainer(out=tmp_path / 'r')
    begin_run(run, 1)
    assert [f.name for f in (tmp_path / 'r').iterdir()] == ['config.json']
    run = pretrainer(out=tmp_path / 'r', resume=True, progress='lines')
    assert run.batches == 0 and 'no checkpoint in' in capsys.readouterr().out


def test_the_saved_precision_holds(pretrainer, tmp_path, monkeypatch):
    pretrainer(out=tmp_path / 'r', bf16=True).fit(1)
    monkeypatch.setattr(pretrain, 'native_bf16', lambda device: False)
    with pytest.warns(UserWarning, match='goes on in bfloat16, as it began'):
        run = pretrainer(out=tmp_path / 'r', resume=True)
    assert run.bf16 and not run.continued
    run = pretrainer(out=tmp_path / 'r', resume=True, bf16=False)
    assert not run.bf16 and run.continued[0]['changed'] == {'bf16': [True, False]}


def test_images_elsewhere(pretrainer, tmp_path, noise):
    pretrainer(out=tmp_path / 'r').fit(1)
    was = noise.name
    try:
        noise.name = 'elsewhere'
        assert pretrainer(out=tmp_path / 'r', resume=True).batches == 4
    finally:
        noise.name = was


def test_a_refusal_names_what_differs(pretrainer, tmp_path):
    pretrainer(out=tmp_path / 'r').fit(1)
    for change, said in (
        (dict(seed=1), 'seed: the checkpoint has 0, this run 1'),
        (
            dict(weight_decay=0.3),
            'train_config: the checkpoint has weight_decay 0.05, this run 0.3',
        ),
    ):
        with pytest.raises(ValueError) as e:
            pretrainer(out=tmp_path / 'r', resume=True, **change)
        assert str(e.value) == f'the checkpoint belongs to another run. {said}'
    with pytest.raises(
        ValueError, match=r"method: the checkpoint has 'APS', this run 'MoCo v3' \("
    ):
        pretrainer('moco_v3', out=tmp_path / 'r', resume=True)


def run(*words):
    try:
        main([str(w) for word in words for w in str(word).split()])
    except SystemExit as e:
        return e.code or 0
    return 0


@pytest.fixture
def pictures(tmp_path):
    r = np.random.default_rng(0)
    for c in 'ab':
        for i in range(16):
            p = tmp_path / 'here' / 'pics' / 'train' / c / f'{i}.png'
            p.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(r.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(p)
    return tmp_path


SMALL = '--encoder vit_tiny --width 32 --depth 1 --heads 2 --patch 8 --batch-size 8'
QUIET = '--progress quiet --options hidden=32 out=16'


def test_a_run_of_the_shell_moves_and_grows(pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures / 'here')
    auto = (f'pretrain --data pics --epochs 1 {SMALL} {QUIET} --resume auto --out', pictures / 'r')
    assert run(*auto) == 0 and run(*auto) == 0
    monkeypatch.chdir(pictures)  # another working folder
    go_on = ('pretrain --progress quiet --resume --out', pictures / 'r')
    assert run(*go_on, '--epochs 2') == 0
    (pictures / 'here').rename(pictures / 'there')
    capsys.readouterr()
    assert run(*go_on, '--epochs 3') == 2
    assert 'which is not there now: --data says' in capsys.readouterr().err
    assert run(*go_on, '--epochs 3 --data there/pics --bf16 False') == 0
    assert [h['epoch'] for h in load_run(pictures / 'r').history] == [1, 2, 3]
    assert run(*go_on) == 0  # the file knows the new place and length
    Image.new('RGB', (32, 32)).save(pictures / 'there' / 'pics' / 'train' / 'a' / '0.png')
    assert run(*go_on) == 2 and 'data: the checkpoint has images' in capsys.readouterr().err


# ---- the stop button, and cells that are run again


def test_the_stop_button_in_a_notebook(pretrainer, noise, tmp_path, monkeypatch, capsys):
    "fit() says one line and returns; a measurement of a run that was stopped is never handed out."
    monkeypatch.setattr(progress, 'progress_mode', lambda: 'notebook')
    stopped = pretrainer(out=tmp_path / 'r')
    stopped.progress = StopAt(stopped, 2)
    assert stopped.fit() is stopped and stopped.batches == 2
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and 'stopped after batch 2 of 16; checkpoint in' in out
    net = vit(size=16, patch=4, width=32, depth=1, heads=2)

    def begin_and_stop(run, last):
        begin_run(run, last)
        run.progress = StopAt(run, 2)

    monkeypatch.setattr(tuning, 'begin_run', begin_and_stop)
    with pytest.raises(KeyboardInterrupt, match='stopped after batch 2') as e:
        finetune(net, noise, FinetuneConfig(2, 64), progress='quiet')
    assert len(e.value._render_traceback_()) == 1


def test_a_stop_in_a_real_kernel(tmp_path):
    "Executed by Jupyter: the cell ends without an error, and with a line."
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    cell = f"""
import os, signal, torch
from ssl_patch.all import *
x = images(torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8))
m = APS(vit(size=16, patch=4, width=32, depth=1, heads=2), hidden=32, out=16)
run = Pretrainer(m, x, epochs=9, batch_size=16, out={str(tmp_path / 'r')!r}, progress='quiet')
run.progress.batch = lambda done: os.kill(os.getpid(), signal.SIGINT) if done == 6 else None
run.fit();"""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbclient.NotebookClient(nb, timeout=120, kernel_name='python3').execute()
    said = [o for o in nb.cells[0].outputs if o.get('name') != 'stderr']
    assert [o.output_type for o in said] == ['stream']
    assert said[0].text.startswith('stopped after batch 6 of 36; checkpoint in')
    assert said[0].text.endswith('fit() goes on\n')


def test_a_cell_that_is_run_again(pretrainer, tmp_path):
    pretrainer(out=tmp_path / 'r').fit(1)
    before = {f.name: f.read_bytes() for f in (tmp_path / 'r').iterdir()}
    with pytest.raises(FileExistsError, match="already holds a run.*resume='auto'.*another folder"):
        pretrainer(out=tmp_path / 'r')
    assert {f.name: f.read_bytes() for f in (tmp_path / 'r').iterdir()} == before


def test_no_empty_panels(pretrainer):
    titles = lambda fig: [a.get_title() for a in fig.axes]
    unlabelled = pretrainer().fit(1)
    assert not any('kNN' in t for t in titles(unlabelled.curves()))
    assert all(a.lines for a in unlabelled.curves().axes)
    assert 'kNN top-1, subset' in titles(plot_curves([dict(unlabelled.history[0], knn=0.5)]))


# ---- weights are looked at before they are saved


@pytest.mark.parametrize('at', [7, 5])
def test_weights_that_broke_are_not_saved(pretrainer, tmp_path, at):
    "In the last step of an epoch, and just before a stop: a finite loss, a gradient that is not."
    broken = pretrainer(out=tmp_path / 'r')
    broken.fit(1)
    before = (tmp_path / 'r' / 'checkpoint.pt').read_bytes()
    step = broken.train_batch

    def train_batch(views):
        step(views)
        if broken.batches == at + 1:
            with torch.no_grad():
                next(p for p in broken.method.parameters() if p.requires_grad).fill_(torch.nan)

    broken.train_batch = train_batch
    if at == 5:
        halt = lambda done: os.kill(os.getpid(), signal.SIGINT) if done == 6 else None
        broken.progress.batch = halt
    with pytest.raises(FloatingPointError, match=f'after batch {at} .*untouched'):
        broken.fit()
    assert (tmp_path / 'r' / 'checkpoint.pt').read_bytes() == before


# ---- ~ is the home folder


def test_home_at_every_door(pretrainer, noise, tmp_path, monkeypatch):
    home, here = tmp_path / 'home', tmp_path / 'here'
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.chdir(here)
    encoder = pretrainer(out='~/runs/x').fit(1).encoder
    assert pretrainer(out='~/runs/x', resume=True).batches == 4
    finetune(encoder, noise, FinetuneConfig(1, 64), checkpoints='~/c', out='~/runs/x', resume=True,
             baselines=False, progress='quiet')  # fmt: skip
    save_encoder(encoder, '~/e.safetensors')
    for opened in (open_encoder('~/runs/x'), open_encoder('~/e.safetensors')):
        assert opened.size == 16
    assert load_encoder('~/e.safetensors').size == 16
    assert open_encoder('~/runs/x/checkpoint.pt', tower='online').size == 16
    Record('kNN', 0.5, 'e', 'd', 0.1).save('~/runs/x')
    assert len(load_records('~/runs/x')) == len(load_run('~/runs/x').records) == 2
    assert len(load_runs('~/runs')) == 1
    for words in ('info ~/runs/x', 'compare ~/runs --out ~/compared'):
        assert run(words) == 0
    assert (home / 'compared' / 'comparison.md').is_file() and (home / 'c' / 'encoder').is_dir()
    assert not any(here.iterdir())


# ---- another image side


@pytest.mark.parametrize('kind', ['vit', 'resnet'])
def test_fine_tuned_at_another_size(noise, kind):
    net = vit(size=16, patch=4, width=32, depth=1, heads=2)
    net = net if kind == 'vit' else resnet('resnet18', 16, width=8)
    config = FinetuneConfig(1, 64)
    record = finetune(net, noise, config, size=32, progress='quiet')
    assert record.settings['size'] == 32 and net.size == 16
    direct = finetune(net.at_size(32), noise, config, progress='quiet')
    assert record.value == direct.value and record.baselines == direct.baselines
    with pytest.raises(ValueError, match='size must be'):
        finetune(net, noise, config, size=0)


def test_version_and_module():
    say = lambda *w: subprocess.run([sys.executable, '-m', 'ssl_patch', *w], capture_output=True)
    found = say('--version')
    assert found.returncode == 0 and found.stdout.decode().strip()[-1].isdigit()


def test_checkpoints_that_stay(tmp_path):
    "Each is what a run of so many epochs ends with, opens as an encoder, and can be gone on from."
    x = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)

    def run(folder, epochs, **more):
        torch.manual_seed(0)
        net = vit('tiny', size=16, patch=4, width=16, depth=1, heads=1)
        how = dict(batch_size=16, lr=1e-3, progress='quiet')
        return Pretrainer(APS(net), images(x), epochs, out=folder, **how, **more).fit()

    whole = run(tmp_path / 'a', 5, keep_every=2, save_every=3)
    kept = sorted(p.name for p in (tmp_path / 'a').glob('checkpoint.epoch*'))
    assert kept == ['checkpoint.epoch0002.pt', 'checkpoint.epoch0004.pt']
    half = open_encoder(tmp_path / 'a' / kept[0])
    assert half(x[:2] / 255).image.shape == (2, half.dim)
    (tmp_path / 'b').mkdir()
    for name in ('config.json', 'metrics.csv'):
        shutil.copy(tmp_path / 'a' / name, tmp_path / 'b' / name)
    shutil.copy(tmp_path / 'a' / kept[0], tmp_path / 'b' / 'checkpoint.pt')
    again = run(tmp_path / 'b', 5, resume=True)
    for a, b in zip(whole.encoder.parameters(), again.encoder.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match='keep_every'):
        run(tmp_path / 'c', 1, keep_every=-1)

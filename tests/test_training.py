"Resuming to the bit, stopping by signals, disks that refuse, losses that explode."

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import fastprogress.fastprogress
import IPython.display
import pytest
import torch
from PIL import Image

from steps import StopAt, same, state

from ssl_patch.data.sources import images
from ssl_patch.ground import files
from ssl_patch.methods.aps import APS
from ssl_patch.models.heads import mlp
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.methods.compose import build_method
from ssl_patch.models.momentum import Queue
from ssl_patch.training import checkpoint
from ssl_patch.training.checkpoint import versions
from ssl_patch.training.optim import LARS, GradClip
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.training.progress import (
    Meter,
    collapse_stats,
    detect_collapse,
    online_knn,
    plot_curves,
)


def files_in(folder):
    "Names of the files of a run; its lock is none."
    return {f.name for f in folder.iterdir() if f.name != '.lock'}


@pytest.mark.parametrize(
    'method, bf16',
    [
        ('aps', False),
        ('aps', True),
        ('moco_v3', False),
        ('moco_v3', True),
        ('moco_v2', False),
        ('moco_v2', True),
        ('sce', False),
    ],
)
def test_2n_epochs_equal_n_and_resume_n(pretrainer, tmp_path, method, bf16):
    make = lambda **kw: pretrainer(method, drop_path=0.2, bf16=bf16, **kw)
    whole = make().fit()
    make(out=tmp_path / 'r').fit(2)
    assert same(state(whole), state(make(weights=1, out=tmp_path / 'r', resume=True).fit()))
    assert not same(state(whole), state(make(weights=1).fit()))


@pytest.mark.parametrize('at', [1, 6, 8])
def test_interrupted_in_an_epoch_and_resumed(pretrainer, tmp_path, at):
    whole = pretrainer().fit()
    run = pretrainer(out=tmp_path / 'r')
    run.progress = StopAt(run, at)
    with pytest.raises(KeyboardInterrupt, match=f'after batch {at} of 16'):
        run.fit()
    assert same(state(whole), state(pretrainer(weights=1, out=tmp_path / 'r', resume=True).fit()))


@pytest.mark.parametrize('name', ['moco_v2', 'sce', 'co2', 'ressl'])
def test_resumed_with_a_half_filled_queue(noise, tmp_path, name):
    """A queue of 200 after one batch of 64, and after a write that wrapped; another start of
    weights and queue is overwritten."""

    def make(weights=0, **kw):
        torch.manual_seed(weights)
        m = build_method(
            name,
            resnet('resnet18', 16, width=8),
            projector=mlp(64, 16, last_norm=False, bias=True),
            queue=Queue(200, seed=weights),
        )
        return Pretrainer(m, noise, epochs=2, batch_size=64, progress='quiet', knn_every=0, **kw)

    whole = make().fit()
    for at in (1, 5):
        run = make(out=tmp_path / f'{at}')
        run.progress = StopAt(run, at)
        with pytest.raises(KeyboardInterrupt):
            run.fit()
        assert run.method.queue.next == at * 64 % 200
        assert same(state(whole), state(make(weights=1, out=tmp_path / f'{at}', resume=True).fit()))


def test_a_run_that_never_began_can_be_begun_again(pretrainer, tmp_path):
    "A crash before the first checkpoint leaves a config.json alone: the folder is free."
    run = pretrainer(out=tmp_path / 'r')
    run.method.loss = lambda q, k, queue: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert files_in(tmp_path / 'r') == {'config.json'}
    pretrainer(out=tmp_path / 'r', lr=0.0123).fit(1)
    assert json.loads((tmp_path / 'r' / 'config.json').read_text())['lr'] == 0.0123


def test_the_default_batch_suits_split_batch_norm(noise):
    "100 images: a sixteenth would be 4, and eight groups want 16."
    torch.manual_seed(0)
    m = build_method(
        'moco_v2',
        resnet('resnet18', 16, width=8),
        projector=mlp(64, 16, last_norm=False, bias=True),
    )
    assert (
        Pretrainer(m, noise.sample(100), epochs=1, progress='quiet').train_config.batch_size == 16
    )
    with pytest.raises(ValueError, match='data must be what images'):
        Pretrainer(m, 'photos')


def test_a_collapse_is_named(noise, capsys):
    "A constant embedding: the log says so once, with what to try."
    torch.manual_seed(0)
    m = build_method(
        'moco_v2',
        resnet('resnet18', 16, width=8),
        projector=mlp(64, 16, last_norm=False, bias=True),
    )
    for tower in (m.tower, m.key_encoder.net):
        torch.nn.init.zeros_(tower.projector[0].weight)
    Pretrainer(m, noise, epochs=3, batch_size=64, lr=1e-6, progress='lines', knn_every=0).fit()
    out = capsys.readouterr().out
    assert (
        out.count('a collapse') == 1
        and 'epoch 1: the keys of different images have become alike' in out
        and 'Try a lower learning rate' in out
    )


def test_signs_are_in_the_history(pretrainer):
    h = pretrainer('sce').fit(1).history[-1]
    assert 0 < h['entropy'] < 5 and 1 <= h['rank'] <= 64 and 0 < h['feature_std'] < 1.1
    assert pretrainer('moco_v2').fit(1).history[-1]['entropy'] == 0


def test_the_queue_fits_the_data_and_the_batch(pretrainer):
    assert pretrainer('sce').method.queue.size == 64  # 256 images: a sixth is 42, a batch is 64
    assert 'queue of 64' in pretrainer('sce').run_config()['slots']['queue']
    with pytest.raises(ValueError, match='multiple of 8'):
        pretrainer('moco_v2', batch_size=12)


def test_interrupt_then_fit_goes_on_in_memory(pretrainer):
    whole, run = pretrainer().fit(), pretrainer()
    progress = run.progress
    run.progress = StopAt(run, 5)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    run.progress = progress
    assert same(state(whole), state(run.fit()))


def test_the_global_generator_is_left_alone(pretrainer):
    run = pretrainer()
    torch.manual_seed(7)
    a = torch.rand(1)
    torch.manual_seed(7)
    run.fit()
    assert torch.equal(a, torch.rand(1))


def test_knn_along_the_way_changes_nothing(pretrainer):
    a, b = pretrainer().fit(), pretrainer(knn_every=1).fit()
    assert same(a.method.state_dict(), b.method.state_dict()) and all(
        h['knn'] is not None for h in b.history
    )


SCRIPT = textwrap.dedent("""
    import sys, torch
    from ssl_patch.data.sources import images
    from ssl_patch.models.encoders import vit
    from ssl_patch.methods.aps import APS
    from ssl_patch.training.pretrain import Pretrainer
    torch.manual_seed(0); torch.set_num_threads(1)
    x = torch.randint(0, 256, (512, 3, 16, 16), dtype=torch.uint8)
    m = APS(vit(size=16, patch=4, width=32, depth=2, heads=2), hidden=32, out=16)
    how = dict(epochs=100000, batch_size=64, progress='lines', resume='resume' in sys.argv)
    run = Pretrainer(m, images(x), out=sys.argv[1], **how)
    print('ready', run.batches, flush=True)
    run.fit(1 if 'resume' in sys.argv else None)
""")


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_killed_from_outside(tmp_path, number, code):
    "SIGTERM saves before it dies; after SIGKILL the last checkpoint is whole. Both resume."
    out = tmp_path / 'r'
    go = lambda *a: subprocess.Popen(
        [sys.executable, '-c', SCRIPT, str(out), *a],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    p = go()
    for _ in range(600):
        if (out / 'metrics.csv').exists():
            break
        time.sleep(0.1)
    p.send_signal(number)
    text = p.communicate(timeout=60)[0]
    assert p.returncode == code, text
    if number == signal.SIGTERM:
        assert 'stopped after batch' in text and 'resume=True goes on' in text
    done = torch.load(out / 'checkpoint.pt', weights_only=True)['batches']
    p = go('resume')
    text = p.communicate(timeout=120)[0]
    assert p.returncode == 0 and f'ready {done}' in text, text


def test_disk_that_refuses(pretrainer, tmp_path, monkeypatch):
    "A write that fails leaves the previous checkpoint whole and says so."
    run = pretrainer(out=tmp_path / 'r')
    run.fit(1)
    before = (tmp_path / 'r' / 'checkpoint.pt').read_bytes()

    def full(*a):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device.*previous version is untouched'):
        run.fit()
    monkeypatch.undo()
    assert (tmp_path / 'r' / 'checkpoint.pt').read_bytes() == before and not list(
        (tmp_path / 'r').glob('*.tmp')
    )
    assert same(
        state(pretrainer().fit()), state(run.fit())
    )  # nothing computed was lost: the run goes on


def test_folder_that_cannot_be_written(pretrainer, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='cannot write in the run folder'):
        pretrainer(out=tmp_path / 'file' / 'r')


def test_folder_that_exists(pretrainer, tmp_path):
    pretrainer(out=tmp_path / 'r').fit(1)
    with pytest.raises(FileExistsError, match='already holds a run'):
        pretrainer(out=tmp_path / 'r')
    with pytest.raises(FileNotFoundError, match='no checkpoint.pt'):
        pretrainer(out=tmp_path / 'other', resume=True)


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(method='moco_v3'), 'method'),
        (dict(seed=1), 'seed'),
        (dict(lr=1.0), 'lr'),
        (dict(batch_size=32), 'train_config'),
    ],
)
def test_checkpoint_of_another_run(pretrainer, tmp_path, change, word):
    pretrainer(out=tmp_path / 'r').fit(1)
    with pytest.raises(ValueError, match=f'belongs to another run.*{word}: the checkpoint has'):
        pretrainer(out=tmp_path / 'r', resume=True, **change)


def test_checkpoint_that_is_garbage(pretrainer, tmp_path):
    pretrainer(out=tmp_path / 'r').fit(1)
    (tmp_path / 'r' / 'checkpoint.pt').write_bytes(b'not a checkpoint')
    with pytest.raises(ValueError, match='not a readable checkpoint'):
        pretrainer(out=tmp_path / 'r', resume=True)


def test_loss_that_is_not_finite(pretrainer, tmp_path):
    run = pretrainer(out=tmp_path / 'r')
    run.fit(1)
    before = (tmp_path / 'r' / 'checkpoint.pt').read_bytes()
    with torch.no_grad():
        run.encoder.net.cls_token.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match=r'batch 4 \(epoch 2\).*untouched'):
        run.fit()
    assert (tmp_path / 'r' / 'checkpoint.pt').read_bytes() == before


def test_run_folder(pretrainer, tmp_path):
    run = pretrainer(out=tmp_path / 'r', knn_every=2).fit()
    assert files_in(tmp_path / 'r') == {
        'config.json',
        'metrics.csv',
        'checkpoint.pt',
        'checkpoint.previous.pt',
        'encoder.safetensors',
        'curves.png',
    }
    rows = list(csv.DictReader(open(tmp_path / 'r' / 'metrics.csv')))
    assert [int(r['epoch']) for r in rows] == [1, 2, 3, 4] and [bool(r['knn']) for r in rows] == [
        False,
        True,
        False,
        True,
    ]
    config = json.loads((tmp_path / 'r' / 'config.json').read_text())
    assert (
        config['train_config']['batch_size'] == 64
        and config['encoder'] == run.encoder.spec
        and config['versions']['torch'] == torch.__version__
    )


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(epochs=0), 'epochs'),
        (dict(batch_size=1), 'batch_size'),
        (dict(batch_size=1000), '1000'),
        (dict(lr=0.0), 'lr'),
        (dict(epochs=1.5), 'epochs'),
        (dict(grad_clip=0), 'grad_clip must be a number above 0, or None, got 0'),
        (dict(grad_clip='3'), "grad_clip must be .* got '3'"),
        (dict(grad_clip=float('nan')), 'grad_clip'),
        (dict(grad_clip_growth=1.0), 'grad_clip_growth must be a number above 1, or None, got 1.0'),
        (dict(grad_clip_growth=-2), 'grad_clip_growth'),
        (dict(optimizer='adam'), 'adam'),
        (dict(schedule='day'), 'day'),
        (dict(momentum=3), "training has no option 'momentum'"),
        (dict(progress='loud'), 'loud'),
    ],
)
def test_bad_input(pretrainer, change, word):
    with pytest.raises(ValueError, match=word):
        pretrainer(**change)


def test_images_without_a_label_do_not_vote_along_the_way(pretrainer, noise):
    """kNN along the way asks the labelled images only; without any label, or without a test part,
    it is left out."""
    from ssl_patch.data.sources import images

    x, y = noise.train.images, noise.train.labels.clone()
    y[::2] = -1
    run = pretrainer()
    enc = run.encoder
    part = images((x, y), test=(noise.test.images, noise.test.labels))
    alone = images((x[1::2], y[1::2]), test=(noise.test.images, noise.test.labels))
    assert online_knn(enc, part, k=5) == online_knn(enc, alone, k=5)
    for data in (
        images(x),
        images((x, noise.train.labels)),
        images((x, noise.train.labels), test=noise.test.images),
    ):
        assert (
            Pretrainer(
                run.method, data, epochs=1, batch_size=64, knn_every=1, progress='quiet'
            ).knn_every
            == 0
        )


@pytest.mark.parametrize('method, at', [('aps', 6), ('moco_v3', 4), ('sce', 5)])
def test_resumed_with_the_history_clip(pretrainer, tmp_path, method, at):
    "At the end of an epoch and within one: gradient norms of the past are part of the state."
    clip = dict(grad_clip=3.0, grad_clip_growth=1.05)
    whole = pretrainer(method, **clip).fit()
    run = pretrainer(method, out=tmp_path / 'r', **clip)
    run.progress = StopAt(run, at)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    resumed = pretrainer(method, weights=1, out=tmp_path / 'r', resume=True, **clip)
    assert resumed.grad_clip.history.count_nonzero() > 0
    assert same(state(whole), state(resumed.fit()))
    assert not same(
        whole.method.state_dict(), pretrainer(method).fit().method.state_dict()
    )  # and the clip did something


def test_a_lost_history_would_show(pretrainer, tmp_path):
    "What the test above rests on: without its history the run is another one."
    make = lambda **kw: pretrainer(grad_clip_growth=1.05, **kw)
    whole = make().fit()
    make(out=tmp_path / 'r').fit(2)
    lost = make(out=tmp_path / 'r', resume=True)
    lost.grad_clip.history.zero_()
    assert not same(whole.method.state_dict(), lost.fit().method.state_dict())


def test_gradients_stay_below_the_bounds(pretrainer, monkeypatch):
    """Seen by the optimiser in every step of a run: no parameter above the cap, none growing faster
    than allowed."""
    run, norms = pretrainer(grad_clip=0.05, grad_clip_growth=1.2), []
    step = run.optimizer.step

    def watched():
        norms.append(torch.stack([p.grad.norm() for p in run.grad_clip.parameters]))
        step()

    monkeypatch.setattr(run.optimizer, 'step', watched)
    n = torch.stack((run.fit(2), norms)[1])
    assert len(n) == 32 and n.max() <= 0.05 * 1.0001  # 8 batches of 4 draws
    before = n[:-1]
    assert (n[1:][before > 1e-6] <= 1.2 * before[before > 1e-6] * 1.0001).all()
    assert (n[1:] > 1.19 * before).any()  # it was needed


def test_history_of_parameters_without_a_gradient():
    ps = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    clip = GradClip(ps, growth=1.5)

    def step(*norms):
        for p, n in zip(ps, norms):
            p.grad = None if n is None else torch.tensor([0.6, 0.8]) * n
        clip()
        return [None if p.grad is None else round(p.grad.norm().item(), 5) for p in ps]

    assert step(1.0, 2.0, None) == [1, 2, None] and clip.history.tolist() == pytest.approx(
        [1, 2, 0]
    )
    assert step(None, 8.0, 5.0) == [None, 3, 5] and clip.history.tolist() == pytest.approx(
        [1, 3, 5]
    )
    before = clip.history.clone()
    assert step(None, None, None) == [None] * 3 and torch.equal(clip.history, before)
    assert step(9.0, 0.0, 1.0) == [1.5, 0, 1] and step(0.0, 7.0, 1.0) == [
        0,
        7,
        1,
    ]  # from nothing a gradient may be anything
    step(float('nan'), 1.0, 1.0)
    assert step(2.0, 1.0, 1.0)[0] == 2  # what is not a number leaves no history


def test_without_bounds_gradients_are_left_alone(pretrainer):
    assert pretrainer().grad_clip is None and 'grad_clip' not in pretrainer().state_dict()
    loose = pretrainer(grad_clip=1e9).fit()
    assert same(loose.method.state_dict(), pretrainer().fit().method.state_dict())


def test_a_checkpoint_from_before_an_option_and_a_column(pretrainer, tmp_path):
    "Younger options were at their defaults: it goes on as the same run, and writes all columns."
    whole = pretrainer().fit()
    pretrainer(out=tmp_path / 'r').fit(2)
    old = torch.load(tmp_path / 'r' / 'checkpoint.pt', weights_only=True)
    config = json.loads(old['identity']['train_config'])
    for k in ('grad_clip', 'grad_clip_growth'):
        del config[k]
    old['identity']['train_config'] = json.dumps(config)
    old['history'] = [
        {k: v for k, v in h.items() if not k.startswith('patch_sim')} for h in old['history']
    ]
    torch.save(old, tmp_path / 'r' / 'checkpoint.pt')
    resumed = pretrainer(weights=1, out=tmp_path / 'r', resume=True).fit()
    assert (
        same(whole.method.state_dict(), resumed.method.state_dict())
        and (tmp_path / 'r' / 'curves.png').exists()
    )
    rows = list(csv.DictReader(open(tmp_path / 'r' / 'metrics.csv')))
    assert len(rows) == 4 and set(rows[0]) == set(whole.history[0])
    assert rows[0]['patch_sim_within'] == ''
    with pytest.raises(ValueError, match='belongs to another run.*train_config'):
        pretrainer(out=tmp_path / 'r', resume=True, grad_clip=3.0)


def test_a_checkpoint_from_before_the_renaming_is_refused(pretrainer, tmp_path):
    "Its identity speaks of `training` and `views`: one sentence, and what still works."
    pretrainer(out=tmp_path / 'r').fit(1)
    old = torch.load(tmp_path / 'r' / 'checkpoint.pt', weights_only=True)
    identity = old['identity']
    identity['training'] = identity.pop('train_config')
    identity['views'] = identity.pop('augmentations')
    torch.save(old, tmp_path / 'r' / 'checkpoint.pt')
    with pytest.raises(ValueError, match='earlier version.*cannot be resumed.*open_encoder') as e:
        pretrainer(out=tmp_path / 'r', resume=True)
    assert 'belongs to another run' not in str(e.value) and len(str(e.value)) < 200


def test_the_commit_is_known_in_a_checkout():
    "The package lies in a checkout here, or was installed from a wheel."
    root = Path(checkpoint.__file__).parents[2]
    ask = ['git', '-C', str(root), 'rev-parse', '--short', 'HEAD']
    commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    assert versions()['commit'] == (commit if commit and (root / '.git').exists() else None)


def test_the_commit_of_another_checkout(tmp_path, monkeypatch):
    "Found from where the package is, not from where one works; None without a checkout."
    package = tmp_path / 'house' / 'ssl_patch'
    package.mkdir(parents=True)
    monkeypatch.setattr(checkpoint.ssl_patch, '__file__', str(package / '__init__.py'))
    assert versions()['commit'] is None
    git = ['git', '-C', str(package.parent), '-c', 'user.name=a', '-c', 'user.email=a@b.c']
    subprocess.run([*git, 'init', '-q'], check=True)
    subprocess.run([*git, 'commit', '-q', '--allow-empty', '-m', 'first'], check=True)
    head = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout
    assert versions()['commit'] and head.startswith(versions()['commit'])


def with_extras(run, patches=None, **terms):
    "A method whose forward also logs `terms`, attached to the graph, and notes patches."
    forward = run.method.forward

    def more(*args):
        loss, log = forward(*args)
        if run.method.log_features and patches is not None:
            run.method.feature_log['patches'] = patches
        return loss, log | {k: loss * v for k, v in terms.items()}

    run.method.forward = more
    return run


def test_parts_of_the_loss_are_averaged_and_written(pretrainer, tmp_path):
    run = with_extras(pretrainer(out=tmp_path / 'r'), image_loss=0.25, patch_loss=0.75)
    run.fit(1)
    h = run.history[0]
    assert h['image_loss'] == pytest.approx(h['loss'] / 4) and h['patch_loss'] == pytest.approx(
        0.75 * h['loss']
    )
    run.fit(1)
    rows = list(csv.DictReader(open(tmp_path / 'r' / 'metrics.csv')))
    assert [float(r['patch_loss']) for r in rows] == [h['patch_loss'] for h in run.history]
    assert 'patch_loss' not in pretrainer().fit(1).history[0]


def test_parts_that_come_later_get_a_column(pretrainer, tmp_path):
    run = pretrainer(out=tmp_path / 'r')
    run.fit(1)
    with_extras(run, patch_loss=0.5).fit(1)
    rows = list(csv.DictReader(open(tmp_path / 'r' / 'metrics.csv')))
    assert (
        rows[0]['patch_loss'] == '' and float(rows[1]['patch_loss']) == run.history[1]['patch_loss']
    )


def test_parts_do_not_keep_their_graph():
    m, w = Meter(), torch.ones(1, requires_grad=True)
    m.add(0, (w * 2).sum(), patch_loss=(w * 3).sum())
    assert not any(v.requires_grad for v in m.sums.values())


def test_patches_of_an_image_that_are_equal(pretrainer, capsys):
    "Named once, in the log; the columns hold both similarities."
    g = torch.Generator().manual_seed(0)
    equal = torch.randn(64, 1, 32, generator=g).expand(64, 9, 32)
    run = with_extras(pretrainer(progress='lines'), patches=equal).fit()
    assert (
        run.history[-1]['patch_sim_within'] == pytest.approx(1, abs=1e-4)
        and abs(run.history[-1]['patch_sim_between']) < 0.1
    )
    assert (
        capsys.readouterr().out.count('the patches of an image are nearly equal (within 1.000') == 1
    )
    assert len(run.curves().axes) == 4  # no panel of kNN without labels
    run = with_extras(
        pretrainer(progress='lines'), patches=torch.randn(64, 9, 32, generator=g)
    ).fit()
    assert (
        abs(run.history[-1]['patch_sim_within']) < 0.1
        and 'nearly equal' not in capsys.readouterr().out
    )


@pytest.mark.parametrize('patches', [None, torch.ones(8, 1, 4)])
def test_no_two_patches_no_columns(patches):
    "Methods of one's own note none; an image may have one patch only."
    s = collapse_stats(
        dict(features=torch.randn(8, 4)) | ({} if patches is None else dict(patches=patches))
    )
    assert s['patch_sim_within'] is None and s['patch_sim_between'] is None


@pytest.mark.parametrize(
    'within, between, named',
    [(0.999, 0.2, True), (0.98, 0.2, False), (0.999, 0.95, False), (None, None, False)],
)
def test_when_patches_count_as_equal(within, between, named):
    "Not where images are alike too: that is the business of the other signs."
    row = dict(feature_std=0.9, key_std=0.9, rank=20.0, neg_sim=0.0)
    assert detect_collapse(row) is None
    assert (
        'tell images apart, not places'
        in (detect_collapse(row | dict(patch_sim_within=within, patch_sim_between=between)) or '')
    ) == named


def test_a_collapse_after_another_kind_is_named_too(pretrainer, capsys):
    "Equal patches in epoch 1 must not hide that the keys collapse in epoch 3."
    run = with_extras(
        pretrainer(progress='lines'), patches=torch.randn(64, 1, 32).expand(64, 9, 32)
    )
    run.fit(2)

    class Alike(Meter):
        def means(self):
            return super().means() | dict(key_std=0.01)

    run.meter = Alike()
    run.fit(1)
    out = capsys.readouterr().out
    assert (
        'epoch 1: the patches' in out
        and 'epoch 3: the keys of different images' in out
        and 'epoch 2: ' not in out
    )


def test_curves_of_old_histories(pretrainer):
    "Rows without the patches' columns, alone or followed by rows that have them."
    h = pretrainer().fit(2).history
    bare = [{k: v for k, v in r.items() if not k.startswith('patch_sim')} for r in h]
    assert len(plot_curves(bare).axes) == 3  # what was not noted has no panel
    mixed = plot_curves(
        bare
        + [
            dict(h[-1], epoch=3, patch_sim_within=0.5, patch_sim_between=0.1),
            dict(h[-1], epoch=4, patch_sim_within=0.4, patch_sim_between=0.1),
        ]
    )
    assert len(mixed.axes) == 4 and mixed.axes[3].lines[0].get_xdata().tolist() == [3, 4]


def test_a_run_is_not_resumed_on_other_images(noise, pretrainer, tmp_path):
    "The same number of images, and another one among them."
    run = pretrainer(out=tmp_path / 'r')
    run.fit(1)
    kept = noise.train.images.clone()
    try:
        noise.train.images[0] = 0
        with pytest.raises(ValueError, match='belongs to another run. data'):
            pretrainer(out=tmp_path / 'r', resume=True)
    finally:
        noise.train.images.copy_(kept)
    pretrainer(out=tmp_path / 'r', resume=True).fit()


def test_lars_passes_over_groups_without_gradients():
    a, b = (torch.nn.Parameter(torch.ones(2, 2)) for _ in 'ab')
    a.grad = torch.ones(2, 2)
    LARS([dict(params=[a]), dict(params=[b])], lr=1.0).step()
    assert (a != 1).all() and (b == 1).all()


@pytest.mark.parametrize('ends', ['at the end', 'by an error'])
def test_a_bar_goes_from_the_notebook_when_a_run_ends(pretrainer, monkeypatch, ends):
    shown = {}  # by display handle

    class Handle:
        def update(self, html):
            shown[self] = html.data

    def display(html, **how):
        handle = Handle()
        handle.update(html)
        return handle

    for name, there in (('display', display), ('HTML', IPython.display.HTML)):
        monkeypatch.setattr(fastprogress.fastprogress, name, there, raising=False)
    monkeypatch.setattr(IPython.display, 'display', lambda fig, **how: None)
    run = pretrainer(epochs=1, progress='notebook')
    if ends == 'at the end':
        run.fit()
    else:
        monkeypatch.setattr(run, 'end_epoch', lambda epoch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.fit()
    assert len(shown) == 2 and not any('value=' in html for html in shown.values())


@pytest.mark.parametrize('workers', [0, 1])
def test_a_finished_run_can_be_forgotten(tmp_path, workers):
    "Nothing holds a run that nobody needs any more: not its weights, nor the files of its workers."
    place = tmp_path / 'data'
    place.mkdir()
    x = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    for i, one in enumerate(x):
        Image.fromarray(one.permute(1, 2, 0).numpy()).save(place / f'{i}.png')
    left = []
    for n in range(3):
        data = images(str(place), size=16, stream=True)
        net = vit('tiny', size=16, patch=4, width=16, depth=1, heads=1)
        how = dict(epochs=1, batch_size=32, lr=1e-3, workers=workers, progress='quiet')
        run = Pretrainer(APS(net), data, out=tmp_path / 'runs' / str(n), **how).fit()
        kept = weakref.ref(run)
        del run, data, net
        assert kept() is None
        left.append(len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0)
    assert left[2] <= left[0] + 2

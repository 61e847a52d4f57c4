"Several processes with a share of the batch each, against one with all of it: run for real."

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from several import METHODS, TUNERS, apart, tuned, two_steps

from ssl_patch.cli import main
from ssl_patch.data.sources import images
from ssl_patch.evaluation.embed import load_features
from ssl_patch.evaluation.records import load_records
from ssl_patch.views.augmentations import aug_moco_v2, aug_weak
from ssl_patch.views.loader import ViewLoader

HERE = Path(__file__).resolve().parent
ENV = os.environ | dict(PYTHONPATH=str(HERE.parent), OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')


def torchrun(number, *words, **kw):
    "The start of `torchrun` with so many processes."
    start = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(number)]
    how = dict(env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*start, '--standalone', *map(str, words)], **how | kw)


@pytest.fixture(scope='module')
def one():
    "What one process makes, by method."
    made = {}

    def make(name):
        if name not in made:
            made[name] = two_steps(name)
        return made[name]

    return make


@pytest.mark.parametrize(
    'number, names', [(2, list(METHODS)), (4, ['moco_v2', 'aps', 'repco_moco_v3', 'aps_in_parts'])]
)
def test_several_processes_are_one(number, names, one, tmp_path):
    "Losses, gradients, queues, weights and running statistics, and the same on every rank."
    process = torchrun(number, HERE / 'several.py', tmp_path / 'r', *names)
    text = process.communicate(timeout=900)[0]
    assert process.returncode == 0, text
    ranks = [torch.load(tmp_path / f'r.{r}', weights_only=True) for r in range(number)]
    for name in names:
        whole, (zero, *others) = one(name), [r[name] for r in ranks]
        assert len(whole['loss']) == len(zero['loss'])
        assert (whole['loss'] - zero['loss']).abs().max() < 1e-8, name
        assert apart(whole['grad'], zero['grad']) < 1e-8, name
        assert apart(whole['state'], zero['state']) < 1e-8, name
        assert whole['next'] == zero['next'], name
        for k in ('loss', 'pos_sim', 'neg_sim', 'key_std', 'entropy', 'feature_std', 'rank'):
            x, y = zero['row'][k], whole['row'][k]  # None: not measured
            assert x == (y and pytest.approx(y, rel=1e-5, abs=1e-6)), (name, k)
        for other in others:
            assert apart(zero['state'], other['state']) == 0, name
            assert apart(zero['grad'], other['grad']) == 0, name


def test_tuners_are_one(tmp_path):
    """Fine-tuning and segmentation: losses, gradients, weights and predictions. Losses are sums in
    float32; images are erased and mixed as in one process."""
    process = torchrun(2, HERE / 'several.py', tmp_path / 'r', *TUNERS)
    text = process.communicate(timeout=900)[0]
    assert process.returncode == 0, text
    ranks = [torch.load(tmp_path / f'r.{r}', weights_only=True) for r in range(2)]
    for name in TUNERS:
        whole, (zero, other) = tuned(name), [r[name] for r in ranks]
        assert len(whole['loss']) == len(zero['loss']) > 1
        assert (whole['loss'] - zero['loss']).abs().max() < 1e-6, name
        assert apart(whole['grad'], zero['grad']) < 1e-8, name
        assert apart(whole['state'], zero['state']) < 1e-8, name
        assert (whole['found'] - zero['found']).abs().max() < 1e-5, name
        assert zero['row'] == pytest.approx(whole['row'], rel=1e-5), name
        assert apart(zero['state'], other['state']) == apart(zero['grad'], other['grad']) == 0


TUNING = """
    from ssl_patch.data.collages import collages
    from ssl_patch.transfer.finetune import FineTuner
    from ssl_patch.transfer.recipes import FinetuneConfig
    from ssl_patch.transfer.segmentation import Segmentation
    from ssl_patch.transfer.task import TaskTuner
    from ssl_patch.transfer.task_config import TaskConfig

    labels = torch.arange(32) % 3
    labelled = images((pixels, labels), test=(255 - pixels[:7], labels[:7]))
    torch.manual_seed(0)
    encoder = vit('tiny', 16, 4, width=16, depth=1, heads=1)

    def tuner(kind, out=None, batch_size=8, **kw):
        how = dict(out=out, bf16=False, progress='lines') | kw
        if kind == 'finetune':
            config = FinetuneConfig(4, batch_size, lr=1e-3, mixup=0.8, cutmix=1.0)
            return FineTuner(encoder, labelled, config, **how)
        task = Segmentation(7, 'light', (16, 16), channels=8, scale=(1.0, 1.0), flip=0.0)
        data = collages('mask', train=32, test=5, size=16)
        return TaskTuner(encoder, task, data, TaskConfig(4, batch_size=batch_size), **how)
"""


@pytest.mark.parametrize(
    'kind, odd, words',
    [
        ('finetune', 6, 'a multiple of 4, for pairs of images on 2 processes, got 6'),
        ('segmentation', 9, 'a multiple of 2, the processes, got 9'),
    ],
)
def test_a_tuner_resumes_with_another_number_of_processes(kind, odd, words, tmp_path, capsys):
    "A signal to one stops all after the same batch; one process goes on to the end of one alone."
    process = script(
        tmp_path,
        2,
        f"""{TUNING}
    try:
        tuner({kind!r}, batch_size={odd})
    except ValueError as e:
        print(f'rank {{ranks()[0]}}: {{e}}', flush=True)
    run = tuner({kind!r}, {str(tmp_path / 'r')!r})
    batch = run.train_batch
    def train_batch(*parts):
        batch(*parts)
        if run.batches == 6 and ranks()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    run.train_batch = train_batch
    run.fit()
    """,
    )
    text = process.communicate(timeout=300)[0]
    assert process.returncode and text.count('epoch 1/4') == 1, text
    assert 'stopped after batch 6 of 16; checkpoint in' in text, text
    assert all(f'rank {r}: batch_size must be {words}' in text for r in range(2)), text
    exec(SETUP + textwrap.dedent(TUNING), space := {})
    run = space['tuner'](kind, tmp_path / 'r', resume=True)
    assert run.batches == 6 and 'with processes 2 -> 1' in capsys.readouterr().out
    run.fit()
    whole = space['tuner'](kind, progress='quiet').fit()
    for a, b in zip(run.history, whole.history, strict=True):
        assert a['epoch'] == b['epoch'] and a['loss'] == pytest.approx(b['loss'], rel=1e-4)
    config = json.loads((tmp_path / 'r' / 'config.json').read_text())
    assert config['continued'][0]['changed'] == {'processes': [2, 1]}


def test_one_process_of_a_tuner_is_killed(tmp_path):
    process = script(
        tmp_path,
        2,
        f"""{TUNING}
    run = tuner('finetune', {str(tmp_path / 'r')!r})
    batch = run.train_batch
    def train_batch(*parts):
        if run.batches == 5 and ranks()[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        batch(*parts)
    run.train_batch = train_batch
    run.fit()
    """,
    )
    text = process.communicate(timeout=300)[0]
    assert process.returncode and 'another of the 2 processes is gone' in text, text
    assert (tmp_path / 'r' / 'checkpoint.pt').is_file()


def test_processes_speak_once_a_step(tmp_path):
    "Of a batch in parts the gradients are exchanged with the last one."
    process = script(
        tmp_path,
        2,
        """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    for parts in 1, 2:
        run, calls = make(epochs=1, accumulate=parts, progress='quiet'), []

        def counted(state, bucket):
            calls.append(len(bucket.gradients()))
            return allreduce_hook(state, bucket)

        run.step.register_comm_hook(None, counted)
        run.fit()
        print(f'rank {ranks()[0]}: {parts} parts, {len(calls)} exchanges', flush=True)
    """,
    )
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    said = re.findall(r'rank .: (\d) parts, (\d+) exchanges', text)
    assert len(said) == 4 and len({n for _, n in said}) == 1, text


SETUP = """
import os, signal, sys, time
import torch
from ssl_patch.data.sources import images
from ssl_patch.ground.ranks import begin_ranks, ranks
from ssl_patch.methods.sce import SCE
from ssl_patch.models.encoders import vit
from ssl_patch.training.pretrain import Pretrainer

torch.set_num_threads(1)
pixels = torch.randint(256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()

def make(out=None, **kw):
    torch.manual_seed(0)
    encoder = vit('tiny', 16, 4, width=16, depth=1, heads=1)
    how = dict(epochs=4, batch_size=8, out=out, progress='lines', bf16=False, knn_every=0)
    return Pretrainer(SCE(encoder, queue=32), images(pixels), **how | kw)
"""


def script(folder, number, text, **kw):
    "`text` after the setup, in so many processes."
    file = folder / 'script.py'
    file.write_text(SETUP + textwrap.dedent(text))
    return torchrun(number, file, **kw)


def test_a_script_resumes_with_another_number_of_processes(tmp_path, capsys):
    """No key has a twin, as where all would load the same images; a signal to one stops all after
    the same batch; one process goes on, and ends where one process alone ends."""
    process = script(
        tmp_path,
        2,
        f"""
    run = make({str(tmp_path / 'r')!r})
    batch = run.train_batch
    def train_batch(views):
        batch(views)
        if run.batches == 6:
            keys = run.method.queue.keys
            twins = (keys @ keys.T).fill_diagonal_(0) > 0.99999
            print(f'rank {{ranks()[0]}}: {{int(twins.any(1).sum())}} twins', flush=True)
            if ranks()[0] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    run.train_batch = train_batch
    run.fit()
    """,
    )
    text = process.communicate(timeout=300)[0]
    assert process.returncode and 'rank 0: 0 twins' in text and 'rank 1: 0 twins' in text, text
    assert text.count('epoch 1/4') == 1 and 'stopped after batch 6 of 16; checkpoint in' in text
    exec(SETUP, space := {})
    run = space['make'](tmp_path / 'r', resume=True)
    assert run.batches == 6 and 'with processes 2 -> 1' in capsys.readouterr().out
    run.fit()
    whole = space['make'](progress='quiet').fit()
    a, b = run.method.state_dict(), whole.method.state_dict()
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a if torch.is_tensor(a[k]))


def test_one_process_fails(tmp_path):
    "The others end with its words, within seconds; what was saved stays."
    process = script(
        tmp_path,
        2,
        f"""
    run = make({str(tmp_path / 'r')!r})
    batch = run.train_batch
    def train_batch(views):
        if run.batches == 5 and ranks()[0] == 1:
            print('began to end at', time.time(), flush=True)
            raise ValueError('no such image')
        batch(views)
    run.train_batch = train_batch
    try:
        run.fit()
    finally:
        print('rank', ranks()[0], 'ended at', time.time(), flush=True)
    """,
    )
    text = process.communicate(timeout=300)[0]
    assert process.returncode, text
    assert 'process 1 of 2 has ended: ValueError: no such image. The last checkpoint in' in text
    began, ended = (float(re.search(f'{w} at (\\S+)', text)[1]) for w in ('end', 'rank 0 ended'))
    assert ended - began < 30, text
    assert (tmp_path / 'r' / 'checkpoint.pt').is_file()


def test_one_process_is_killed(tmp_path):
    process = script(
        tmp_path,
        2,
        f"""
    run = make({str(tmp_path / 'r')!r})
    batch = run.train_batch
    def train_batch(views):
        if run.batches == 5 and ranks()[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        batch(views)
    run.train_batch = train_batch
    run.fit()
    """,
    )
    text = process.communicate(timeout=300)[0]
    assert process.returncode and 'another of the 2 processes is gone' in text, text
    assert (tmp_path / 'r' / 'checkpoint.pt').is_file()


def test_the_shell(tmp_path):
    "The command of one process with `torchrun` before it: the same losses, written and said once."
    words = ['--data', 'photos', '--subset', 64, '--size', 16, '--width', 16, '--depth', 1]
    words += ['--heads', 1, '--method', 'moco_v3', '--options', 'hidden=16', 'out=8']
    words += ['--epochs', 2, '--batch-size', 16, '--knn-every', 0, '--bf16', 'False', '--out']
    words = ['pretrain', *map(str, words)]
    process = torchrun(2, '-m', 'ssl_patch', *words, tmp_path / 'two')
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and text.count('epoch 2/2') == text.count('ImageData') == 1, text
    main([*words, str(tmp_path / 'one')])
    rows = [list(csv.DictReader(open(tmp_path / n / 'metrics.csv'))) for n in ('one', 'two')]
    for a, b in zip(*rows, strict=True):
        assert float(a['loss']) == pytest.approx(float(b['loss']), abs=1e-4)
    assert json.loads((tmp_path / 'two' / 'config.json').read_text())['processes'] == 2


def test_features_of_several_processes(tmp_path):
    """In the order of the images, the same on all, and those of one process up to the sums of other
    batches; files that are broken are known to all; rank zero writes cache and record."""
    for i in range(7):
        pixels = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / f'{i}.png')
    text = """
    from pathlib import Path
    from ssl_patch.evaluation.embed import embed_folder
    from ssl_patch.evaluation.features import extract
    from ssl_patch.evaluation.knn import knn
    from ssl_patch.evaluation.records import load_records
    begin_ranks()
    torch.manual_seed(0)
    encoder, folder = vit('tiny', 16, 4, width=16, depth=1, heads=1), Path(FOLDER)
    labels = torch.arange(31) % 3
    data = images((pixels[:31], labels), test=(255 - pixels[:7], labels[:7]))
    out = folder / f'of {ranks()[1]}'
    (folder / '3.png').write_bytes((folder / '3.png').read_bytes()[:300])
    z, y = extract(encoder, data.train)
    one = knn(encoder, data, k=5, cache=out / 'cache', out=out)
    again = knn(encoder, data, k=5, cache=out / 'cache')
    assert one.value == again.value and one.baselines == again.baselines
    assert len(load_records(out)) == 1
    there = embed_folder(encoder, folder)
    made = dict(z=z, y=y, features=there.features, value=torch.tensor(one.value))
    torch.save(made | dict(names=there.names, broken=there.broken), out / f'{ranks()[0]}.pt')
    """.replace('FOLDER', repr(str(tmp_path)))
    for number in (1, 2):
        (tmp_path / f'of {number}').mkdir()
        process = script(tmp_path, number, text)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    load = lambda n, r: torch.load(tmp_path / f'of {n}' / f'{r}.pt', weights_only=True)
    whole, zero, other = load(1, 0), load(2, 0), load(2, 1)
    assert len(whole['z']) == 31 and whole['broken'] == ['3.png'] and len(whole['features']) == 6
    for k, v in whole.items():
        if torch.is_tensor(v):
            assert torch.equal(zero[k], other[k])
            assert torch.allclose(zero[k].double(), v.double(), atol=1e-6), k
        else:
            assert zero[k] == other[k] == v, k
    files = [len(list((tmp_path / f'of {n}' / 'cache').iterdir())) for n in (1, 2)]
    assert files[0] == files[1] > 1


def test_the_shell_measures_with_several_processes(tmp_path):
    "probe and embed: the numbers of one process, said and written once; else a sentence."
    folder = tmp_path / 'images'
    folder.mkdir()
    for i in range(5):
        Image.new('RGB', (20, 20), (40 * i, 90, 255 - 40 * i)).save(folder / f'{i}.png')
    probe = ['probe', '--encoder', 'vit_tiny', '--size', 16, '--data', 'photos', '--subset', 64]
    probe += ['--protocols', 'knn', 'linear', 'finetune', '--no-baselines', '--settings']
    probe += [
        'finetune.epochs=1',
        'finetune.batch_size=16',
        'finetune.bf16=False',
        'finetune.warmup_epochs=0',
    ]
    embed = ['embed', folder, '--encoder', 'aps_photos', '--out']
    said = {}
    for number in (1, 2):
        out = tmp_path / str(number)
        for words in ([*probe, '--out', out], [*embed, out / 'features.npz']):
            process = torchrun(number, '-m', 'ssl_patch', *words)
            said[number] = process.communicate(timeout=400)[0]
            assert process.returncode == 0, said
    values = [{r.protocol: r.value for r in load_records(tmp_path / n)} for n in '12']
    assert len(values[0]) == 3 and values[1] == pytest.approx(values[0], abs=0.03)
    assert len((tmp_path / '2' / 'records.jsonl').read_text().splitlines()) == 3
    one, two = (load_features(tmp_path / n / 'features.npz') for n in '12')
    assert one.names == two.names and torch.allclose(one.features, two.features, atol=1e-5)
    assert said[2].count('5 images') == 1, said[2]
    for words, what in (
        (
            [*probe[:9], '--protocols', 'linear_probe'],
            'the number of processes must be 1 for linear',
        ),
        (['info', 'x'], 'must be 1 here: pretrain, probe and embed take several'),
    ):
        process = torchrun(2, '-m', 'ssl_patch', *words)
        text = process.communicate(timeout=300)[0]
        assert process.returncode and what in text, text


def test_what_one_process_does_refuses_several(tmp_path):
    "And rank zero alone finds a folder taken; both end."
    (tmp_path / 'r').mkdir()
    (tmp_path / 'r' / 'checkpoint.pt').write_bytes(b'')
    process = script(
        tmp_path,
        2,
        f"""
    from ssl_patch.training.setup import require_one_process
    begin_ranks()
    for build in (
        require_one_process,
        lambda: make(batch_size=9),
        lambda: make(batch_size=2),
        lambda: make({str(tmp_path / 'r')!r}),
    ):
        try:
            build()
        except Exception as e:
            print(f'rank {{ranks()[0]}}: {{e}}', flush=True)
    """,
    )
    text = process.communicate(timeout=300)[0]
    for rank in range(2):
        for words in (
            'the number of processes (torchrun, WORLD_SIZE) must be 1 here: pretrain, ',
            'batch_size must be a multiple of 2, the processes, at least 4, got 9',
            'batch_size must be a multiple of 2, the processes, at least 4, got 2',
        ):
            assert f'rank {rank}: {words}' in text, text
    assert f'rank 0: {tmp_path / "r"} already holds a run' in text, text
    assert 'rank 1: process 0 has ended: FileExistsError' in text, text


def test_spawned_workers_make_the_same_views(tmp_path):
    "As on macOS and Windows: a worker imports all anew, and is told what to do by pickles."
    g = torch.Generator().manual_seed(0)
    for i in range(6):
        pixels = torch.randint(256, (40, 48, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f'{i}.png')
    store = images(tmp_path, stream=True, test_fraction=0.2).train
    augmentations, before = (aug_moco_v2(16), aug_weak(16)), mp.get_start_method(allow_none=True)
    mp.set_start_method('spawn', force=True)
    try:
        found = {}
        for workers in (0, 1):
            loader = ViewLoader(store, augmentations, batch_size=2, seed=3, workers=workers)
            found[workers] = [list(loader.epoch(e)) for e in range(2)]  # the second: kept workers
            loader.close()
    finally:
        mp.set_start_method(before, force=True)
    for one, other in zip(found[0], found[1], strict=True):
        for (a, i), (b, j) in zip(one, other, strict=True):
            assert torch.equal(i, j)
            assert all(torch.equal(x.x, y.x) and torch.equal(x.box, y.box) for x, y in zip(a, b))

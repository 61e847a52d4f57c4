"Kills, flipped bits, dying workers, a full memory, two in one folder: nothing saved is lost."

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_patch.models.files import load_encoder, save_encoder
from ssl_patch.training.progress import Timer
from ssl_patch.training.run_folder import read_checkpoint

HOME = Path(__file__).resolve().parents[1]
SETUP = """
import os, random, signal, sys, time, warnings
import torch
from ssl_patch.data.sources import images
from ssl_patch.methods.aps import APS
from ssl_patch.models.encoders import vit
from ssl_patch.training.pretrain import Pretrainer

torch.set_num_threads(1)
pixels = torch.randint(256, (16, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()

def make(out, epochs=4, data=None, **kw):
    torch.manual_seed(0)
    method = APS(vit('tiny', 16, 4, width=16, depth=1, heads=1), hidden=16, out=8)
    data = images(pixels) if data is None else data
    how = dict(epochs=epochs, batch_size=8, out=out, progress='quiet', bf16=False, knn_every=0)
    return Pretrainer(method, data, **how | kw)
"""


def script(text, **kw):
    "A Python process that runs `text` after the setup."
    env = os.environ | dict(PYTHONPATH=str(HOME), OMP_NUM_THREADS='1')
    how = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    code = SETUP + textwrap.dedent(text)
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], **how | kw)


space = {}
exec(SETUP, space)
make = space['make']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are made by fork')
def test_fifty_kills_at_random_moments(tmp_path):
    "After each, every checkpoint is whole, and none is older than before; the run is the same run."
    process = script(f"""
    from ssl_patch.training.run_folder import RunFolder, read_checkpoint
    from pathlib import Path
    make(None).fit()  # so that no child has to import what a run needs
    out, draw, last = Path({str(tmp_path)!r}, 'r'), random.Random(0), 0
    date = lambda: (out / 'checkpoint.pt').stat().st_mtime_ns if last else None
    for kill in range(50):
        before = date()
        child = os.fork()
        if not child:
            make(out, epochs=100_000, resume='auto').fit()
            os._exit(0)
        while not (out / 'checkpoint.pt').is_file():
            time.sleep(0.01)
        while kill % 3 and date() == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder = RunFolder(out)
        now = read_checkpoint(folder.newest)['batches']
        assert now >= last, (now, last)
        for file in (folder.previous, out / 'checkpoint.older.pt'):
            assert not file.is_file() or read_checkpoint(file)['batches'] <= now
        last = now
    print('after 50 kills at batch', last)
    state = make(None, epochs=100_000).fit(last // 2).state_dict()['method']
    kept = RunFolder(out).load()['method']
    assert last > 50 and all(torch.equal(state[k], kept[k]) for k in state)
    print('the same weights')
    """)
    text = process.communicate(timeout=500)[0]
    assert process.returncode == 0 and 'the same weights' in text, text


def test_flipped_bits_of_a_checkpoint(tmp_path):
    "Wherever a bit flips, the file is refused, or what is read is what was written."
    run = make(tmp_path / 'r').fit(1)
    file = tmp_path / 'r' / 'checkpoint.pt'
    whole, right = file.read_bytes(), run.method.state_dict()
    draw, refused = random.Random(0), 0
    for _ in range(60):
        at = draw.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        try:
            state = read_checkpoint(file)
        except ValueError as e:
            refused += 'is not a readable checkpoint' in str(e)
            continue
        assert all(torch.equal(state['method'][k], right[k]) for k in right)
    assert refused > 30


def test_flipped_bits_of_an_encoder(tmp_path):
    encoder = make(None).encoder
    file = save_encoder(encoder, tmp_path / 'e.safetensors', dict(data='noise'))
    whole, draw = file.read_bytes(), random.Random(0)
    for _ in range(60):
        at = draw.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(ValueError):
            load_encoder(file)
    file.write_bytes(whole)
    assert load_encoder(file).card == dict(data='noise')


def test_a_damaged_checkpoint_is_not_used_and_not_lost(tmp_path):
    make(tmp_path / 'r').fit(3)
    file = tmp_path / 'r' / 'checkpoint.pt'
    damaged = file.read_bytes()[:-100]
    file.write_bytes(damaged)
    with pytest.warns(UserWarning, match='is not whole.*The one before it is used'):
        run = make(tmp_path / 'r', resume=True)
    assert run.batches == 4
    run.fit()
    whole = make(None).fit()
    a, b = run.method.state_dict(), whole.method.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / 'r' / 'checkpoint.damaged.pt').read_bytes() == damaged


def test_two_at_work_in_one_folder(tmp_path):
    "The second is refused while the first is at work, and after it, if it has not seen its work."
    out = tmp_path / 'r'
    late = make(out)
    first = script(f"""
    make({str(out)!r}, epochs=100_000).fit()
    """)
    while not (out / 'checkpoint.pt').is_file():
        time.sleep(0.05)
    for run in (late, make(out, epochs=100_000, resume=True)):
        with pytest.raises(BlockingIOError, match='a run is at work in'):
            run.fit()
    first.kill()
    first.wait()
    with pytest.raises(RuntimeError, match='another run has written'):
        late.fit()


def photographs(folder, n=64):
    folder.mkdir()
    for i in range(n):
        Image.new('RGB', (32, 32), (i, 255 - i, i // 2)).save(folder / f'{i}.png')
    return folder


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='who sends a signal is not known')
def test_sigterm_to_the_whole_group(tmp_path):
    "As a cluster sends it: the workers stay until the checkpoint is written."
    place = photographs(tmp_path / 'p')
    process = script(
        f"""
        data = images({str(place)!r}, stream=True)
        make({str(tmp_path / 'r')!r}, epochs=100_000, data=data, workers=2).fit()
        """,
        start_new_session=True,
    )
    while not (tmp_path / 'r' / 'checkpoint.pt').is_file() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and 'checkpoint in' in text, text


def test_a_worker_that_dies(tmp_path):
    "The run ends with what to do; its checkpoint stays, and goes on."
    place = photographs(tmp_path / 'p')
    process = script(f"""
    import subprocess
    data = images({str(place)!r}, stream=True)
    run = make({str(tmp_path / 'r')!r}, epochs=2, data=data, workers=1)
    run.fit(1)
    batch = run.train_batch
    def train_batch(views):
        batch(views)
        if run.batches == 10:
            pids = subprocess.run(['pgrep', '-P', str(os.getpid())], capture_output=True, text=True)
            for pid in pids.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(1)
    run.train_batch = train_batch
    try:
        run.fit()
    except RuntimeError as e:
        print(e)
    run = make({str(tmp_path / 'r')!r}, epochs=2, data=data, workers=1, resume=True)
    print('goes on from', run.batches, 'to', run.fit().batches)
    """)
    text = process.communicate(timeout=120)[0]
    assert 'a process that decodes images has died in batch 1' in text, text
    assert 'Try fewer workers' in text and 'goes on from 8 to 16' in text, text


def test_memory_that_is_used_up(tmp_path):
    run = make(tmp_path / 'r')
    run.fit(1)
    loss = run.method.loss

    def greedy(q, k, queue):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.')

    run.method.loss = greedy
    with pytest.raises(RuntimeError, match='memory is used up in batch 2.*untouched.*batch_size'):
        run.fit()
    run.method.loss = loss
    assert run.fit().batches == 8


def test_a_clock_that_is_set_back(monkeypatch):
    timer = Timer()
    timer.start()
    monkeypatch.setattr(time, 'time', lambda: 0.0)
    timer.tick()
    assert 0 <= timer.seconds < 60


def test_a_table_that_a_kill_has_cut_off(tmp_path):
    "The epochs are in the checkpoint too, and back in metrics.csv when the run goes on."
    make(tmp_path / 'r').fit(2)
    table = tmp_path / 'r' / 'metrics.csv'
    before = table.read_text()
    table.write_text(before.splitlines()[0])
    make(tmp_path / 'r', resume=True).fit(1)
    assert table.read_text().startswith(before) and len(table.read_text().splitlines()) == 4


def test_another_number_of_threads_is_said(tmp_path, capsys):
    "Sums are then taken in another order, so weights differ in their last bits."
    make(tmp_path / 'r').fit(1)
    try:
        torch.set_num_threads(2)
        make(tmp_path / 'r', resume=True, progress='lines').fit(1)
    finally:
        torch.set_num_threads(1)
    assert 'with threads 1 -> 2' in capsys.readouterr().out
    config = json.loads((tmp_path / 'r' / 'config.json').read_text())
    assert config['continued'][0]['changed'] == {'threads': [1, 2]}


def test_several_processes_without_torchrun():
    process = script(
        """
    try:
        make(None)
    except ValueError as e:
        print(e)
    """,
        env=os.environ | dict(PYTHONPATH=str(HOME), WORLD_SIZE='2', RANK='0'),
    )
    text = process.communicate(timeout=60)[0]
    assert 'set by torchrun with RANK, MASTER_ADDR and MASTER_PORT (no MASTER_ADDR' in text, text

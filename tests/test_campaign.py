"""Campaigns: killed, stopped, failed, by a named commit, two at once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_patch.cli import parsed
from ssl_patch.reports.campaign import job_state, read_plan, run_plan
from ssl_patch.reports.runs import load_runs

fcntl = pytest.importorskip('fcntl')

HOME = Path(__file__).resolve().parents[1]
TEXT = """
[plan]
folder = {here}/runs
records = {here}/records.jsonl
pretrain = --encoder resnet18 --width 8 --subset 128 --batch-size 32 --knn-every 0 --epochs {epochs}
probe = --protocols knn --no-baselines

[MoCo v2]
pretrain = --method moco_v2
"""


def plan_in(here, epochs=1, more=''):
    file = here / 'plan.ini'
    file.write_text(TEXT.format(here=here, epochs=epochs) + more)
    return file


def begin(file, **env):
    "The command in a process of its own."
    return subprocess.Popen(
        [sys.executable, '-m', 'ssl_patch', 'campaign', str(file)],
        env=os.environ | dict(PYTHONPATH=str(HOME)) | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what, seconds=120):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, 'it never came'
        time.sleep(0.05)


def is_locked(file):
    with open(file, 'a') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_killed_then_called_again(tmp_path):
    "A kill of everything loses at most an epoch; the next call goes on and measures."
    file = plan_in(tmp_path, epochs=6)
    run = tmp_path / 'runs' / 'MoCo_v2_seed0'
    process = begin(file)
    wait_for((run / 'checkpoint.pt').is_file)
    found = subprocess.run(['pgrep', '-f', str(run)], capture_output=True, text=True).stdout.split()
    process.kill()
    process.wait()
    with pytest.raises(BlockingIOError, match='is at work in'):
        run_plan(read_plan(file))  # the run outlives its campaign, and holds the lock
    for pid in found:
        os.kill(int(pid), signal.SIGKILL)
    plan = read_plan(file)
    wait_for(lambda: not is_locked(tmp_path / 'runs' / '.campaign' / '.lock'))
    assert job_state(plan, plan.jobs[0])['done'] == 0
    run_plan(plan)
    (one,) = load_runs(plan.records)
    assert [h['epoch'] for h in one.history] == [1, 2, 3, 4, 5, 6] and len(one.records) == 1


@pytest.mark.parametrize(
    'words, fault',
    [
        ('pretrain = --method mocov2', "did you mean 'moco_v2'"),
        ('pretrain = --method moco_v2 --options tua=.1', "no option 'tua'"),
        ('pretrain = --method moco_v2 --epoch 3', "did you mean '--epochs'"),
        ('pretrain = --method moco_v2 --data nowhere', "no folder or file 'nowhere'"),
        ('pretrain = --method moco_v2 --train-config weight_dcay=1', "no option 'weight_dcay'"),
        ('pretrain = --method moco_v2\nprobe = --protocols kmm', "got 'kmm'"),
        ('pretrain = --method moco_v2\nprobe = --settings knn.l=3', "knn has no option 'l'"),
    ],
)
def test_a_plan_is_tried_before_its_first_run(tmp_path, capsys, monkeypatch, words, fault):
    "A later run that cannot be made is told at once, and nothing begins; by a commit it is said."
    monkeypatch.setattr('ssl_patch.commands.campaign.run_plan', lambda *a: pytest.fail('it began'))
    file = plan_in(tmp_path, more=f'[wrong]\n{words}\n')
    with pytest.raises(ValueError, match='nothing was begun: 1 of 2 runs'):
        parsed(['campaign', str(file)]).go()
    said = capsys.readouterr().out
    assert said.startswith('wrong_seed0: ') and fault in said
    assert not (tmp_path / 'runs').exists()
    monkeypatch.setattr('ssl_patch.commands.campaign.run_plan', lambda *a: 'a table')
    file.write_text(file.read_text().replace('[plan]', '[plan]\ncommit = HEAD'))
    parsed(['campaign', str(file)]).go()
    assert 'commit HEAD may know better' in capsys.readouterr().out


def test_stopped_by_a_signal(tmp_path):
    "SIGTERM: the run writes a checkpoint, the campaign ends with 143."
    file = plan_in(tmp_path, epochs=200)
    process = begin(file)
    run = tmp_path / 'runs' / 'MoCo_v2_seed0'
    wait_for((run / 'checkpoint.pt').is_file)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 143 and 'was stopped; the next call goes on' in text
    log = (tmp_path / 'runs' / '.campaign' / 'MoCo_v2_seed0.log').read_text()
    assert 'stopped after batch' in log and '; --resume goes on' in log
    plan = read_plan(file)
    state = job_state(plan, plan.jobs[0])
    assert state['done'] == 0 and state['seconds'] > 0 and not state['error']


def test_a_slice_of_time_and_a_run_that_fails(tmp_path):
    "What fails is told with its last line, the others go on, the next call tries again."
    more = '[nonsense]\npretrain = --method moco_v9\npriority = -1\n'
    file, said = plan_in(tmp_path, more=more), []
    table = run_plan(read_plan(file), say=said.append)
    assert "'moco_v9'" in table and 'failed: exit 2' in table and '1 of 2 runs are done' in table
    assert '1 failed: nonsense_seed0; the next call tries again' in said
    assert [r.name for r in load_runs(tmp_path / 'records.jsonl')] == ['MoCo v2']
    file = plan_in(tmp_path / 'runs', epochs=500)
    table = run_plan(read_plan(file), minutes=0.05, say=said.append)
    assert said[-1] == 'MoCo_v2_seed0 was stopped; the next call goes on with it'


def test_a_run_of_which_records_are_kept_is_done(tmp_path):
    "A campaign goes on where another machine left off; other words are told apart."
    file = plan_in(tmp_path)
    run_plan(read_plan(file))
    shutil.rmtree(tmp_path / 'runs')
    kept = (tmp_path / 'records.jsonl').read_text()
    plan, said = read_plan(file), []
    table = run_plan(plan, say=said.append)
    assert said == ['1 of 1 runs are done'] and not (plan.folder / 'MoCo_v2_seed0').exists()
    assert '1 of 1 runs are done; left: 0.0 min' in table and 'kNN 0.' in table
    assert (tmp_path / 'records.jsonl').read_text() == kept
    with pytest.raises(ValueError, match='or remove its line from .*--epochs 1'):
        run_plan(read_plan(plan_in(tmp_path, epochs=2)))
    file = plan_in(tmp_path, more='[CO2]\npretrain = --method co2\n')
    run_plan(read_plan(file), say=said.append)
    assert [r.name for r in load_runs(plan.records)] == ['CO2', 'MoCo v2']
    assert kept in (tmp_path / 'records.jsonl').read_text()


@pytest.mark.skipif(not (HOME / '.git').exists(), reason='not a checkout')
def test_a_named_commit_makes_the_runs(tmp_path):
    file = plan_in(tmp_path)
    commit = ['git', '-C', str(HOME), 'rev-parse', '--short', 'HEAD']
    commit = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    file.write_text(file.read_text().replace('[plan]', '[plan]\ncommit = HEAD'))
    try:
        run_plan(read_plan(file))
        (one,) = load_runs(tmp_path / 'records.jsonl')
        assert one.config['versions']['commit'] == commit
        place = tmp_path / 'runs' / '.campaign' / f'code-{commit}'
        assert (place / 'ssl_patch').is_dir()
    finally:
        git = ['git', '-C', str(HOME), 'worktree']
        code = next((tmp_path / 'runs' / '.campaign').glob('code-*'), '')
        subprocess.run([*git, 'remove', '--force', str(code)], check=False)
    file.write_text(file.read_text().replace('HEAD', 'never-was'))
    (tmp_path / 'runs' / '.campaign' / 'MoCo_v2_seed0.json').unlink()
    with pytest.raises(ValueError, match='never-was'):
        run_plan(read_plan(file))


@pytest.mark.parametrize(
    'file', sorted((HOME / 'nbs/results/plans').glob('*.ini')), ids=lambda f: f.stem
)
def test_the_plans_of_the_results_are_commands_that_build(file):
    plan = read_plan(file)
    for job in plan.jobs:
        train, *probes = (parsed(list(words)) for words in job.commands)
        assert probes
        if train.seed == 0:
            assert train.build_method().name

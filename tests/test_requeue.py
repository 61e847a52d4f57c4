"The SLURM script of the chapter on processes, signalled and queued again; stand-ins for SLURM."

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_patch.training.run_folder import read_checkpoint
from steps import same

HOME = Path(__file__).resolve().parents[1]
RUN = '--data photos --subset 128 --size 32 --patch 8 --width 16 --depth 1 --heads 1'
RUN += ' --method moco_v3 --options hidden=16 out=8 --batch-size 16 --epochs 20 --knn-every 0'
RUN += ' --bf16 False --progress lines'
STEP = """#!/bin/bash
echo $$ > "$STATE/step"
exec setsid "$@"
"""
# to every process of the step at once, as to a container: torchrun, its processes, theirs
CANCEL = """#!/bin/bash
[ "$1" = --signal=TERM ] && [ "$2" = "$SLURM_JOB_ID.0" ] || exit 3
all() { echo "$1"; for child in $(pgrep -P "$1"); do all "$child"; done; }
kill -TERM $(all "$(cat "$STATE/step")")
"""
CONTROL = """#!/bin/bash
case "$1" in
  show) echo localhost ;;
  requeue) [ "$2" = "$SLURM_JOB_ID" ] && touch "$STATE/requeued" ;;
  *) exit 3 ;;
esac
"""


def job(folder, out):
    "The script of the chapter, for two processes and a small run."
    page = json.loads((HOME / 'nbs/training/08_several_processes.ipynb').read_text())
    text = ''.join(s for c in page['cells'] for s in c['source'] if c['cell_type'] == 'markdown')
    (script,) = re.findall(r'```sh\n(#!/bin/bash\n.*?)```', text, re.S)
    with socket.socket() as s:
        s.bind(('', 0))
        port = s.getsockname()[1]
    command = re.compile(r'-m ssl_patch pretrain .*?--resume auto', re.S)
    for old in ('--nproc-per-node 8', ':29500'):
        assert script.count(old) == 1
    assert len(command.findall(script)) == 1 and '--requeue' in script
    script = script.replace('--nproc-per-node 8', '--nproc-per-node 2')
    script = script.replace(':29500', f':{port}')
    mine = f'-m ssl_patch pretrain {RUN} --out {out} --resume auto'
    file = folder / 'job.sh'
    file.write_text(command.sub(mine, script))
    for name, does in (('srun', STEP), ('scancel', CANCEL), ('scontrol', CONTROL)):
        (folder / name).write_text(does)
        (folder / name).chmod(0o755)
    return file


def started(file, folder):
    "The batch script, as SLURM starts it."
    path = f'{folder}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    slurm = dict(SLURM_JOB_ID='7', SLURM_NNODES='1', SLURM_JOB_NODELIST='localhost')
    own = dict(PYTHONPATH=str(HOME), OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    env = os.environ | slurm | own | dict(PATH=path, STATE=str(folder))
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(['bash', str(file)], env=env, start_new_session=True, **how)


@pytest.mark.skipif(not os.path.exists('/proc'), reason='the stand-ins are for Linux')
def test_a_job_that_is_signalled_and_queued_again_is_one_run(tmp_path):
    where, again = tmp_path / 'r' / 'checkpoint.pt', tmp_path / 'requeued'
    whole = job(tmp_path, tmp_path / 'whole')
    text = started(whole, tmp_path).communicate(timeout=300)[0]
    assert (tmp_path / 'whole' / 'encoder.safetensors').is_file() and not again.exists(), text
    script, batches = job(tmp_path, tmp_path / 'r'), []
    date = lambda: where.stat().st_mtime_ns if where.exists() else None
    for turn in range(3):
        before, process = date(), started(script, tmp_path)
        if turn < 2:
            while date() == before and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)  # to the script alone, as `B:` says
        text = process.communicate(timeout=300)[0]
        assert again.exists() == (turn < 2), text
        if turn < 2:
            again.unlink()
            assert 'stopped after batch' in text and '--resume goes on' in text, text
            batches.append(read_checkpoint(where)['batches'])
        else:
            assert process.returncode == 0, text
    assert 0 < batches[0] < batches[1] < 160
    state, other = (read_checkpoint(tmp_path / n / 'checkpoint.pt') for n in ('whole', 'r'))
    assert state['batches'] == other['batches'] == 160
    for k in ('method', 'optimizer'):
        assert same(state[k], other[k]), k
    losses = [[row['loss'] for row in s['history']] for s in (state, other)]
    assert losses[0] == losses[1]


@pytest.mark.skipif(not os.path.exists('/proc'), reason='the stand-ins are for Linux')
def test_a_job_that_fails_is_not_queued_again(tmp_path):
    "A folder that holds something else: the job ends with an error, and SLURM is not asked."
    (tmp_path / 'r').mkdir()
    (tmp_path / 'r' / 'encoder.safetensors').write_bytes(b'')
    process = started(job(tmp_path, tmp_path / 'r'), tmp_path)
    text = process.communicate(timeout=120)[0]
    assert process.returncode and 'already holds a run' in text, text
    assert not (tmp_path / 'requeued').exists()

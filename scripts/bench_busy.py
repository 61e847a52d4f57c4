"""A training batch beside busy loops: quiet, and with processes that burn a core each, by how
waiting threads wait. For scripts/bench.py.

The variables act only before torch is loaded, so every case runs in a process of its own:

    OMP_WAIT_POLICY=passive python scripts/bench_busy.py --batches 5
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

CASES = {
    'default': {},
    'OMP_WAIT_POLICY=passive': dict(OMP_WAIT_POLICY='passive'),
    'one thread': dict(OMP_NUM_THREADS='1'),
}
SET_BY_CASES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'OMP_NUM_THREADS')
BURN = 'while True: pass'


def demo_batches(n, small):
    "Seconds of `n` loaded batches of the demo, views and all four steps of each, after a warm-up."
    import torch

    from ssl_patch.data.sources import images
    from ssl_patch.methods.aps import APS
    from ssl_patch.models.encoders import vit
    from ssl_patch.training.checkpoint import begin_run
    from ssl_patch.training.pretrain import Pretrainer

    torch.manual_seed(0)
    if small:  # few operations: where threads spin, each may take a slice of the scheduler's time
        method = APS(vit('tiny', size=32, patch=4, width=24, depth=1, heads=2), num_draws=1)
    else:
        method = APS(vit('tiny', size=32, patch=4, width=96, depth=4, heads=3))
    run = Pretrainer(
        method,
        images('photos'),
        epochs=16,
        batch_size=16 if small else 128,
        lr=2e-3,
        device='cpu',
        knn_every=0,
        progress='quiet',
    )
    begin_run(run, run.epochs)
    upcoming, taken = run.loader.epoch(0), []
    for _ in range(n + (not small)):
        begun = time.perf_counter()
        run.train_batch(next(upcoming)[0])
        taken.append(time.perf_counter() - begun)
    return dict(seconds=taken[-n:], threads=torch.get_num_threads())


def measured(variables, loops, batches, small):
    "What a process of its own says, beside so many busy loops."
    env = {k: v for k, v in os.environ.items() if k not in SET_BY_CASES} | variables
    words = [sys.executable, __file__, '--batches', str(batches), *['--small'] * small]
    burning = [subprocess.Popen([sys.executable, '-c', BURN]) for _ in range(loops)]
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True)
    finally:
        for process in burning:
            process.kill()
            process.wait()
    if done.returncode:
        raise RuntimeError(f'{" ".join(words)} failed: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def busy(a, report):
    "A batch of the demo, quiet and beside busy loops, by how threads wait."
    from ssl_patch.evaluation.records import Table, grid_lines
    from ssl_patch.reports.timing import as_ms

    batches, small, loops = a.batches or (1 if a.small else 5), a.small, a.loops
    report.note(
        'views and four optimiser steps of a batch; every case in a process of its own',
        f'{os.cpu_count()} cores; a busy loop is a process that never rests',
    )
    rows = []
    for _ in range(report.rounds):
        for case, variables in CASES.items():
            for n in loops:
                found = measured(variables, n, batches, small)
                rows.append(dict(case=case, variables=variables, loops=n, **found))
    ms = lambda case, n: median(
        s for r in rows if (r['case'], r['loops']) == (case, n) for s in r['seconds']
    )
    first, lines = ms('default', loops[0]), []
    for case in CASES:
        beside = [f'{as_ms(ms(case, n))} ({ms(case, n) / first:.2f})' for n in loops]
        threads = next(str(r['threads']) for r in rows if r['case'] == case)
        lines.append([case, threads, *beside])
    words = ['quiet' if n == 0 else f'beside {n} busy loop{"s" * (n > 1)}' for n in loops]
    head = ['ms a batch (times the first)', 'threads', *words]
    table = Table('\n'.join(grid_lines(head, lines)))
    title = 'a training batch of the demo' + ', cut down' * small
    report.add(title, table, rows=rows, batches=batches, cores=os.cpu_count())


if __name__ == '__main__':
    p = argparse.ArgumentParser(description='one case, in this process')
    p.add_argument('--batches', type=int, default=5)
    p.add_argument('--small', action='store_true')
    words = p.parse_args()
    print(json.dumps(demo_batches(words.batches, words.small)))

"""Exact kNN of 10,000 queries in a bank of 50,000 features: time and memory, beside what else one
would take. All in turn, on this machine.

    python scripts/bench_knn.py
    python scripts/bench_knn.py --dim 2048 --k 200 --rounds 1

`whole matrix` is one product of all queries with the bank and one topk; `scikit-learn` is
NearestNeighbors(algorithm='brute', metric='cosine'). Memory is the peak that a process of its own
reaches above what it held with the features alone.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from ssl_patch.evaluation.knn import topk_similar
from ssl_patch.evaluation.records import hardware

SETTINGS = ('bank', 'queries', 'dim', 'k', 'threads')


def features(a):
    g = torch.Generator().manual_seed(0)
    return torch.randn(a.bank, a.dim, generator=g), torch.randn(a.queries, a.dim, generator=g)


def chunked(bank, queries, k):
    return topk_similar(queries, bank, k)[1]


def whole(bank, queries, k):
    return (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1).indices


def scikit(bank, queries, k):
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=k, algorithm='brute', metric='cosine').fit(bank.numpy())
    return torch.from_numpy(search.kneighbors(queries.numpy(), return_distance=False))


WAYS = {'topk_similar': chunked, 'whole matrix': whole, 'scikit-learn': scikit}


def one(a):
    "One way, in this process: seconds, memory, and how often its neighbours are the exact ones."
    bank, queries = features(a)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    truth, few = None, queries[:50].double()
    if a.check:
        truth = whole(bank.double(), few, a.k)
    if a.only == 'scikit-learn':
        import sklearn.neighbors  # noqa: F401  (what takes a second to import is not the search)
    before, began = peak(), time.perf_counter()
    found = WAYS[a.only](bank, queries, a.k)
    seconds, same = time.perf_counter() - began, None
    if truth is not None:
        both = zip(found[:50].tolist(), truth.tolist())
        same = sum(len(set(x) & set(y)) for x, y in both) / truth.numel()
    print(json.dumps(dict(seconds=seconds, mib=peak() - before, same=same)))


def measured(a, way, check=False):
    "What a process of its own says."
    words = [f'--{k}={getattr(a, k)}' for k in SETTINGS]
    words += ['--only', way, *['--check'] * check]
    env = os.environ | dict(OMP_NUM_THREADS=str(a.threads))
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, env=env
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def row(a, way, rounds, first):
    "The figures of one way, printed."
    seconds = [r['seconds'] for r in rounds]
    ratio = median(s / r['seconds'] for s, r in zip(seconds, first))
    mib, same = max(r['mib'] for r in rounds), measured(a, way, True)['same']
    took = f'{median(seconds):6.1f} s ({min(seconds):.1f} to {max(seconds):.1f})'
    exact = f'{100 * same:.2f} % of the neighbours as in double precision'
    beside = f'{ratio:4.1f} x topk_similar   peak +{mib:,.0f} MiB'
    print(f'  {way:13} {took}   {beside}   {exact}', flush=True)
    return dict(seconds=seconds, ratio=ratio, mib=mib, same=same)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('--bank', type=int, default=50_000)
    p.add_argument('--queries', type=int, default=10_000)
    p.add_argument('--dim', type=int, default=512)
    p.add_argument('--k', type=int, default=20)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--json', type=Path, help='also write the figures into this file')
    p.add_argument('--only', choices=WAYS, help=argparse.SUPPRESS)
    p.add_argument('--check', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.only:
        return one(a)
    found = {w: [] for w in WAYS}
    for _ in range(a.rounds):
        for w in WAYS:
            found[w].append(measured(a, w))
    what = f'{a.queries:,} queries, bank of {a.bank:,}, {a.dim} numbers, k={a.k}'
    print(f'{what}, {a.threads} threads, {a.rounds} rounds in turn')
    rows = {w: row(a, w, found[w], found['topk_similar']) for w in WAYS}
    settings = {k: getattr(a, k) for k in (*SETTINGS, 'rounds')}
    if a.json:
        told = dict(settings=settings, hardware=hardware('cpu'), ways=rows)
        a.json.write_text(json.dumps(told, indent=1))


if __name__ == '__main__':
    main()

"""Exact kNN of 10,000 queries in a bank of 50,000 features: time and memory, beside what else one would take. All in turn, on this machine.

    python scripts/bench_knn.py
    python scripts/bench_knn.py --dim 2048 --k 200 --rounds 1

`whole matrix` is one product of all queries with the bank and one topk; `scikit-learn` is NearestNeighbors(algorithm='brute', metric='cosine').
Memory is the peak that a process of its own reaches above what it held with the features alone.
"""
import argparse, json, os, resource, statistics, subprocess, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from ssl_patch.probes import hardware, topk_similar

def features(a):
    g = torch.Generator().manual_seed(0)
    return torch.randn(a.bank, a.dim, generator=g), torch.randn(a.queries, a.dim, generator=g)

def whole(bank, queries, k):
    return (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(k, dim=1).indices

def scikit(bank, queries, k):
    return torch.from_numpy(NearestNeighbors(n_neighbors=k, algorithm='brute', metric='cosine').fit(bank.numpy()).kneighbors(queries.numpy(), return_distance=False))

ways = {'topk_similar': lambda bank, queries, k: topk_similar(queries, bank, k)[1], 'whole matrix': whole, 'scikit-learn': scikit}

def one(a):
    "One way, in this process: seconds, memory, and how often its neighbours are those of the exact order in double precision."
    bank, queries = features(a)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    few = queries[:50].double()
    truth = (F.normalize(few, dim=1) @ F.normalize(bank.double(), dim=1).T).topk(a.k, dim=1).indices if a.check else None
    if a.only == 'scikit-learn':
        global NearestNeighbors # what takes a second to import is not part of the search
        from sklearn.neighbors import NearestNeighbors
    before, began = peak(), time.perf_counter()
    found = ways[a.only](bank, queries, a.k)
    seconds = time.perf_counter() - began
    same = None if truth is None else sum(len(set(x) & set(y)) for x, y in zip(found[:50].tolist(), truth.tolist()))/truth.numel()
    print(json.dumps(dict(seconds=seconds, mib=peak() - before, same=same)))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--bank', type=int, default=50_000)
    p.add_argument('--queries', type=int, default=10_000)
    p.add_argument('--dim', type=int, default=512)
    p.add_argument('--k', type=int, default=20)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--json', type=Path, help='also write the figures into this file')
    p.add_argument('--only', choices=ways, help=argparse.SUPPRESS)
    p.add_argument('--check', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.only: return one(a)
    def run(way, check=False):
        words = [f'--{k}={getattr(a, k)}' for k in ('bank', 'queries', 'dim', 'k', 'threads')]
        done = subprocess.run([sys.executable, __file__, *words, '--only', way, *['--check']*check], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS=str(a.threads)))
        if done.returncode: sys.exit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])
    found = {w: [] for w in ways}
    for _ in range(a.rounds):
        for w in ways: found[w].append(run(w))
    print(f'{a.queries:,} queries, bank of {a.bank:,}, {a.dim} numbers, k={a.k}, {a.threads} threads, {a.rounds} rounds in turn')
    rows = {}
    for w, rs in found.items():
        s, ratio = [r['seconds'] for r in rs], [r['seconds']/o['seconds'] for r, o in zip(rs, found['topk_similar'])]
        rows[w] = dict(seconds=s, ratio=statistics.median(ratio), mib=max(r['mib'] for r in rs), same=run(w, True)['same'])
        print(f"  {w:13} {statistics.median(s):6.1f} s ({min(s):.1f} to {max(s):.1f})   {rows[w]['ratio']:4.1f} x topk_similar   peak +{rows[w]['mib']:,.0f} MiB   "
              f"{100*rows[w]['same']:.2f} % of the neighbours as in double precision", flush=True)
    settings = {k: getattr(a, k) for k in ('bank', 'queries', 'dim', 'k', 'threads', 'rounds')}
    if a.json: a.json.write_text(json.dumps(dict(settings=settings, hardware=hardware('cpu'), ways=rows), indent=1))

if __name__ == '__main__': main()

"""Pretrain the methods of the soft family at one small budget, several seeds each, then probe them: what results/soft.ipynb reads.

    python scripts/soft_evidence.py cifar10 runs/soft_cifar10
    python scripts/soft_evidence.py tiny_imagenet_40.npz runs/soft_tiny --only 'MoCo v2' ReSSL CO2 'SCE lam 0.5' --subset 8000 --epochs 4 --lr .03
    python scripts/keep_records.py nbs/results/records/soft_cifar10 runs/soft_cifar10/*

Runs that are finished are left alone, runs that were interrupted go on. Runs train two at a time.
"""
import argparse, os, subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = {'MoCo v2': ['moco_v2'], 'ReSSL': ['ressl'], 'CO2': ['co2'],
           **{f'SCE lam {lam:g}': ['sce', f'lam={lam:g}'] for lam in (0, .25, .5, .75, 1)}}

def words():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', help='as ssl_patch pretrain --data takes it')
    p.add_argument('out', type=Path, help='folder for the run folders')
    p.add_argument('--only', nargs='+', choices=METHODS, default=list(METHODS), help='some of the methods')
    p.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    p.add_argument('--subset', type=int, default=10_000, help='training images')
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--lr', type=float, default=.06, help='one for all, so that only the methods differ')
    p.add_argument('--width', type=int, default=16, help="channels of ResNet-18's first stage (published: 64)")
    p.add_argument('--jobs', type=int, default=min(2, os.cpu_count()), help='runs at a time')
    return p.parse_args()

def pretrain(a, run, method, seed):
    if (run/'encoder.safetensors').exists(): return
    begin = ['--resume'] if (run/'checkpoint.pt').exists() else [
        '--data', a.data, '--subset', a.subset, '--method', method[0], *(['--options', *method[1:]] if method[1:] else []), '--encoder', 'resnet18',
        '--width', a.width, '--epochs', a.epochs, '--batch-size', a.batch_size, '--lr', a.lr, '--seed', seed, '--knn-every', max(1, a.epochs//5),
        '--training', 'schedule=step', f'warmup={.1*a.epochs:g}']
    run.mkdir(parents=True, exist_ok=True)
    with open(run/'log.txt', 'a') as log:
        done = subprocess.run([str(x) for x in ['ssl_patch', 'pretrain', '--out', run, *begin, '--progress', 'lines']], stdout=log, stderr=subprocess.STDOUT,
                              env=os.environ | dict(OMP_NUM_THREADS=str(max(1, os.cpu_count()//a.jobs))))
    print(run, 'trained' if done.returncode == 0 else f'FAILED, see {run}/log.txt', flush=True)

def main():
    a = words()
    runs = [(a.out/f"{name.replace(' ', '_')}_seed{seed}", METHODS[name], seed) for seed in a.seeds for name in a.only]
    with ThreadPoolExecutor(a.jobs) as pool: list(pool.map(lambda r: pretrain(a, *r), runs))
    from ssl_patch.cli import load_data
    from ssl_patch.encoders import load_encoder
    from ssl_patch.probes import knn, linear, load_records
    data = load_data(a.data, 32, a.subset)
    for run, _, seed in runs:
        done = {r.protocol for r in load_records(run)} if (run/'records.jsonl').exists() else set()
        if not (run/'encoder.safetensors').exists() or done >= {'kNN', 'linear'}: continue
        encoder = load_encoder(run/'encoder.safetensors')
        for probe in (knn, linear): probe(encoder, data, name=run.name.rsplit('_seed', 1)[0].replace('_', ' '), seed=seed).save(run)
        print(run, 'probed', flush=True)

if __name__ == '__main__': main()

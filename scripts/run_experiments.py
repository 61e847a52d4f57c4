"""Pretrain a family of methods at one small budget, several seeds each, then probe them: what the
notebooks in results/ read.

    python scripts/run_experiments.py soft cifar10 runs/soft_cifar10
    python scripts/run_experiments.py soft tiny_imagenet_40.npz runs/soft_tiny \\
        --only 'MoCo v2' ReSSL CO2 'SCE lam 0.5' --subset 8000 --epochs 4 --lr .03
    python scripts/run_experiments.py aps cifar10 runs/aps_cifar10 --camvid CamVid
    python scripts/run_experiments.py dense_vit cifar10 runs/dense_vit --camvid CamVid
    python scripts/run_experiments.py dense_resnet cifar10 runs/dense_resnet --camvid CamVid

Runs that are finished are left alone, runs that were interrupted go on. Runs train two at a time.
What the notebooks read is kept by `keep_runs(folder, file)` of `ssl_patch.reports.runs`.
"""

import argparse
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

SMALL_VIT = '--encoder vit_tiny --size 32 --patch 4 --width 96 --depth 4 --heads 3'.split()
SMALL_HEADS = ['hidden=512', 'out=128']
RESNET = '--encoder resnet18 --width 16'.split()

# name of a row -> (method, its options)
SOFT = {'MoCo v2': ('moco_v2',), 'ReSSL': ('ressl',), 'CO2': ('co2',)}
SOFT |= {f'SCE lam {lam:g}': ('sce', f'lam={lam:g}') for lam in (0, 0.25, 0.5, 0.75, 1)}
APS = {f'APS gamma {power}': ('aps', f'gamma={power}') for power in (0, 1, 3, 10)} | {
    'APS gamma 3, flips ignored': ('aps', 'flip_aware=False'),
    'all patches': ('aps', 'keep_ratio=1.', 'num_draws=1'),
    'MoCo v3': ('moco_v3', *SMALL_HEADS),
}
DENSE_VIT = {  # that preset has the augmentations of MoCo v3
    'MoCo v3': ('moco_v3', *SMALL_HEADS),
    'RepCo on MoCo v3': ('repco', 'host=moco_v3', 'pool=2', *SMALL_HEADS),
    'local to global': ('local_to_global', 'preset=imagenet', 'pool=2', *SMALL_HEADS),
}
DENSE_RESNET = {'MoCo v2': ('moco_v2',), 'DenseCL': ('densecl',), 'RepCo': ('repco',)}

# family -> its rows, the network, and what all its runs share
FAMILIES = dict(
    soft=(SOFT, RESNET, dict(subset=10_000, epochs=10, lr=0.06)),
    aps=(APS, SMALL_VIT, dict(subset=10_000, epochs=8, lr=1e-3)),
    dense_vit=(
        DENSE_VIT,
        [*SMALL_VIT, '--variant', 'moco_v3'],
        dict(subset=10_000, epochs=8, lr=1e-3),
    ),
    dense_resnet=(
        DENSE_RESNET,
        [*RESNET, '--feature-layer', 'layer3'],
        dict(subset=10_000, epochs=8, lr=0.06),
    ),
)


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('family', choices=FAMILIES)
    p.add_argument('data', help='as ssl_patch pretrain --data takes it')
    p.add_argument('out', type=Path, help='folder for the run folders')
    p.add_argument('--only', nargs='+', help='some of the methods')
    p.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    p.add_argument('--subset', type=int, help='training images')
    p.add_argument('--epochs', type=int)
    p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--lr', type=float, help='one for all, so that only the methods differ')
    p.add_argument('--jobs', type=int, default=min(2, os.cpu_count()), help='runs at a time')
    frames = 'folder with CamVid as SegNet has it (train.txt, test.txt): adds a linear segmentation'
    p.add_argument('--camvid', type=Path, help=frames)
    a = p.parse_args()
    a.methods, a.shape, usual = FAMILIES[a.family]
    a.only = a.only or list(a.methods)
    if odd := set(a.only) - set(a.methods):
        p.error(f'--only {sorted(odd)}: there are {list(a.methods)}')
    for k, v in usual.items():
        setattr(a, k, getattr(a, k) or v)
    return a


def command(a, run, method, seed):
    "The command that begins a run, or goes on with it."
    words = ['ssl_patch', 'pretrain', '--out', run, '--progress', 'lines']
    if (run / 'checkpoint.pt').exists():
        return [*words, '--resume']
    options = ['--options', *method[1:]] if method[1:] else []
    words += ['--data', a.data, '--subset', a.subset, '--method', method[0], *options, *a.shape]
    words += ['--epochs', a.epochs, '--batch-size', a.batch_size, '--lr', a.lr, '--seed', seed]
    words += ['--knn-every', max(1, a.epochs // 4), '--overlap', 'drop']
    return [*words, '--train-config', 'schedule=step', f'warmup_epochs={0.1 * a.epochs:g}']


def pretrain(a, run, method, seed):
    if (run / 'encoder.safetensors').exists():
        return
    words = [str(w) for w in command(a, run, method, seed)]
    threads = str(max(1, os.cpu_count() // a.jobs))
    env = os.environ | dict(OMP_NUM_THREADS=threads)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / 'log.txt', 'a') as log:
        done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=env)
    print(run, 'trained' if done.returncode == 0 else f'FAILED, see {run}/log.txt', flush=True)


def camvid(folder, part):
    "Images uint8 (N,3,H,W) and masks (N,H,W) of a part; 11 classes, and 11 where none is labelled."
    import numpy as np
    import torch
    from PIL import Image

    def read(path):
        file = folder / Path(*Path(path.lstrip('/')).parts[-2:])
        return torch.from_numpy(np.array(Image.open(file)))

    rows = [line.split() for line in (folder / f'{part}.txt').read_text().splitlines()]
    pictures = torch.stack([read(x)[..., :3].permute(2, 0, 1) for x, _ in rows])
    return pictures, torch.stack([read(y) for _, y in rows])


def probe(a, run, seed):
    "The records that a finished run lacks."
    import torch

    from ssl_patch.commands.words import load_data
    from ssl_patch.evaluation.knn import knn
    from ssl_patch.evaluation.linear import linear_probe_cached
    from ssl_patch.evaluation.patches import linear_segmentation
    from ssl_patch.evaluation.records import load_records
    from ssl_patch.models.files import load_encoder
    from ssl_patch.reports.runs import name_and_seed

    if not (run / 'encoder.safetensors').exists():
        return
    torch.set_num_threads(max(1, os.cpu_count() // a.jobs))
    done = {r.protocol for r in load_records(run)} if (run / 'records.jsonl').exists() else set()
    encoder, name = load_encoder(run / 'encoder.safetensors'), name_and_seed(run)[0]
    data = load_data(a.data, encoder.size, a.subset)
    for protocol, measure in (('kNN', knn), ('linear', linear_probe_cached)):
        if protocol not in done:
            measure(encoder, data, name=name, seed=seed, overlap='drop', out=run)
    if a.camvid and 'linear segmentation' not in done:
        train, test = (camvid(a.camvid, part) for part in ('train', 'test'))
        record = linear_segmentation(
            encoder,
            train,
            test,
            11,
            ignore=11,
            size=4 * encoder.size,
            epochs=20,
            name=name,
            data='CamVid, 98 frames',
            seed=seed,
            note='linear on frozen patches, frames resized to a square',
        )
        record.save(run)
    print(run, 'probed', flush=True)


def main():
    a = arguments()
    folder = lambda name, seed: a.out / f'{name.replace(" ", "_").replace(",", "")}_seed{seed}'
    runs = [(folder(n, s), a.methods[n], s) for s in a.seeds for n in a.only]
    with ThreadPoolExecutor(a.jobs) as pool:
        list(pool.map(lambda r: pretrain(a, *r), runs))
    with ProcessPoolExecutor(a.jobs, get_context('spawn')) as pool:
        for job in [pool.submit(probe, a, run, seed) for run, _, seed in runs]:
            job.result()


if __name__ == '__main__':
    main()

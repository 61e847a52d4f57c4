"Views alone, and the sampler of APS, beside what one would otherwise take. For scripts/bench.py."

import tempfile
from pathlib import Path

import bench_baselines as baselines
import numpy as np
import torch
from bench_report import jpegs, smooth
from torchvision.datasets import ImageFolder

from ssl_patch.data.sources import images
from ssl_patch.methods.aps import sample_asymmetric
from ssl_patch.methods.geometry import covered_fraction, keep_mask
from ssl_patch.views.augmentations import (
    aug_byol_a,
    aug_byol_b,
    aug_moco_v2,
    aug_weak,
    make_view,
)
from ssl_patch.views.loader import ViewLoader

AUGMENTATIONS = {
    'weak': (aug_weak,),
    'moco_v2': (aug_moco_v2,),
    'byol_a': (aug_byol_a,),
    'byol_b': (aug_byol_b,),
    'byol_a+byol_b': (aug_byol_a, aug_byol_b),
}
NOTES = (
    'torchvision uint8 rounds to 8 bits after every step; '
    'torchvision float does the same arithmetic as ours',
    'kornia crops without antialiasing, shares one order of the colour changes in a batch, '
    'and is handed floats whose conversion is not counted',
    'lightly (moco_v2 only) works on PIL images, 8-bit, and blurs with three box filters; '
    'its normalisation is switched off',
    'DataLoader: one pass over the images with collation, workers alive and warm; '
    'make_view: tensors as they lie; ViewLoader: shuffled batches',
)


def ours(x, augmentations, batch):
    loader = ViewLoader(x, augmentations, batch)
    return {
        'make_view': lambda: [make_view(b, a) for b in x.split(batch) for a in augmentations],
        'ViewLoader': lambda: [None for _ in loader.epoch(0)],
    }


def theirs(x, name, augmentations, batch, workers, report):
    "Name -> work of everybody else."
    works, loaders, floats = {}, {}, x / 255
    for how, first in (('uint8', False), ('float', True)):
        ts = [baselines.torchvision_view(a, first) for a in augmentations]
        works[f'torchvision {how}'] = lambda ts=ts: [
            torch.stack([t(im) for im in b]) for b in x.split(batch) for t in ts
        ]
    data = baselines.Views(x, [baselines.torchvision_view(a, False) for a in augmentations])
    for w in workers:
        key = f'torchvision uint8, DataLoader, {w} workers'
        loaders[key] = baselines.data_loader(data, batch, w)
    if not report.lacks('kornia'):
        for mode in ('slice', 'resample'):
            ks = [baselines.kornia_view(a, mode) for a in augmentations]
            works[f'kornia, {mode}'] = lambda ks=ks: [k(b) for b in floats.split(batch) for k in ks]
    if name == 'moco_v2' and not report.lacks('lightly'):
        pictures = baselines.Pictures(x, baselines.lightly_views(augmentations[0], one=True))
        for w in workers:
            key = f'lightly, DataLoader, {w} workers'
            loaders[key] = baselines.data_loader(pictures, batch, w)
    return works | {k: lambda loader=v: [None for _ in loader] for k, v in loaders.items()}


def views(a, report):
    "Views alone: uint8 images in memory in, float views out."
    report.note(*NOTES)
    for source, size, batch in a.case:
        n = batch * (a.batches or (1 if a.small else 2))
        x = smooth(n, source)
        for name in a.augmentations:
            augmentations = [make(size) for make in AUGMENTATIONS[name]]
            works = ours(x, augmentations, batch)
            works |= theirs(x, name, augmentations, batch, a.workers, report)
            of = lambda word, names=tuple(works): [k for k in names if k.startswith(word)]
            torchvision = of('torchvision')
            bare = [k for k in torchvision if 'Loader' not in k]
            loading = [k for k in torchvision if 'Loader' in k]
            report.time(
                f'{name}, {source} px to {size} px, batch {batch}',
                works,
                [
                    (torchvision, ['make_view', 'ViewLoader'], 4 if size <= 32 else 2),
                    (bare, ['make_view'], None),
                    (loading, ['ViewLoader'], None),
                    (of('kornia'), ['make_view'], 2),
                    (of('lightly'), ['ViewLoader'], None),
                ],
                n * len(augmentations),
                'views',
                source=source,
                size=size,
                batch=batch,
                augmentations=name,
            )
            del works  # and with it the worker processes


def files(a, report):
    "Two views of each of many JPEG files that are larger than the views; one process decodes."
    report.note(
        'views of MoCo v2; ssl_patch decodes a JPEG 2, 4 or 8 times smaller where no view needs '
        'more pixels; in full: reduced=False',
        'torchvision: PIL opens, the transforms of torchvision on PIL images; lightly likewise',
    )
    cases = ((128, 32, 8),) if a.small else ((512, 96, 64), (1024, 224, 32), (2048, 224, 16))
    for side, size, n in cases:
        aug = aug_moco_v2(size)
        with tempfile.TemporaryDirectory() as folder:
            jpegs(Path(folder), n, side)
            store = images(Path(folder), stream=True).train
            loaders = {
                'ssl_patch': ViewLoader(store, [aug, aug], n),
                'ssl_patch, in full': ViewLoader(store, [aug, aug], n, reduced=False),
            }
            theirs = {'torchvision': baselines.twice_from_pil(aug)}
            if not report.lacks('lightly'):
                theirs['lightly'] = baselines.lightly_views(aug)
            works = {k: lambda v=v: [None for _ in v.epoch(0)] for k, v in loaders.items()}
            for name, view in theirs.items():
                pictures = baselines.Unlabelled(ImageFolder(folder, view))
                loader = baselines.data_loader(pictures, n, 0)
                works[name] = lambda loader=loader: [None for _ in loader]
            title = f'two views of {size} px of JPEG files of {side} px'
            report.time(title, works, [([k], ['ssl_patch'], None) for k in list(works)[1:]], n)
            pair = [next(v.epoch(0))[0] for v in loaders.values()]
            away = max((x.x - y.x).abs().mean().item() for x, y in zip(*pair))
            report.add(f'{title}: mean difference of reduced and full', f'{255 * away:.2f} of 255')


def sampler(a, report):
    """Asymmetric patch sampling of a batch, beside a plain loop over images and boxes;
    one core each, since the loop cannot use more."""
    threads, report.found['threads'] = torch.get_num_threads(), 1
    torch.set_num_threads(1)
    rng, k = np.random.default_rng(0), max(1, a.grid**2 // 4)
    batch, draws = a.batch or (16 if a.small else 256), a.num_draws
    (box1, flip1), (box2, flip2) = (baselines.plain_crops(batch, rng) for _ in range(2))
    on = lambda v, **kw: torch.tensor(np.array(v), device=a.device, **kw)
    boxes = [on(b, dtype=torch.float32) for b in (box1, box2)]
    flips = dict(flip1=on(flip1), flip2=on(flip2))
    pairs = [((box1[i], box2[i]), (flip1[i], flip2[i])) for i in range(batch)]
    batched = lambda: sample_asymmetric(*boxes, a.grid, num_draws=draws, **flips)
    loop = lambda: [baselines.plain_pair(*pair, a.grid, k, draws, 3.0, rng) for pair in pairs]

    keep1, keep2, free = (on(v) for v in zip(*loop()))
    cover = lambda keep: covered_fraction(keep_mask(keep, a.grid), *boxes, **flips).flatten(2)
    what = 'fraction of each patch that is new, loop and closed form'
    report.check(what, (1 - cover(keep1).double() - free).abs().max(), 1e-4)
    new = lambda keep1, keep2: (1 - cover(keep1)).gather(2, keep2).mean().item()
    one, other = new(keep1, keep2), new(*batched())
    report.check(
        'mean of that fraction among the patches kept of view 2 '
        f'(loop {one:.3f}, batched {other:.3f})',
        abs(one - other),
        0.02 if batch * draws >= 500 else 0.1,
    )
    names = 'loop over images and boxes', 'sample_asymmetric'
    what = f'{draws} draws of {k} patches, gamma 3, one core each'
    t = report.time(
        f'{batch} pairs of views, grid {a.grid} x {a.grid}, {what}',
        {names[1]: batched, names[0]: loop},
        [([names[0]], [names[1]], 30)],
        batch,
        'pairs',
        grid=a.grid,
        num_draws=draws,
        batch=batch,
    )
    torch.set_num_threads(threads)
    if a.least:
        got = t.ratio(*names)[0]
        words = f'speed, {got:.1f} times the loop, beside the {a.least:g} asked for'
        report.check(f'{words}: what is missing', max(0.0, a.least - got), 0)

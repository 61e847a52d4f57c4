"""Pictures of what the patch family learnt, and how often patches are matched to the right place:
from run folders of run_experiments.py.

    python scripts/patch_pictures.py runs/dense_resnet runs/dense_vit runs/aps_cifar10 \\
        --data cifar10 --out nbs/results/records/patch_pictures --only 'MoCo v2' DenseCL RepCo \\
        'MoCo v3' 'APS gamma 3' 'local to global' 'RepCo on MoCo v3'

Writes matches.json and JPEG files. The photographs are those that come with the package; --data is
where the match numbers are measured.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch

from ssl_patch.commands.pretrain import saved
from ssl_patch.commands.words import load_data
from ssl_patch.data.images import resize_center_crop
from ssl_patch.data.photographs import photo
from ssl_patch.evaluation.figures import draw_maps, show_patch_pca, similarity_map
from ssl_patch.methods.branches import make_queries
from ssl_patch.methods.densecl import match_patches
from ssl_patch.methods.geometry import true_match
from ssl_patch.methods.matches import match_accuracy, show_matches
from ssl_patch.methods.mining import neighbour_masks, repco_pairs, show_pairs
from ssl_patch.models.interface import pool_patches
from ssl_patch.models.files import load_encoder
from ssl_patch.reports.runs import name_and_seed
from ssl_patch.views.augmentations import aug_moco_cifar, make_view
from ssl_patch.views.loader import generator_for

PHOTOS = ('astronaut', 'chelsea', 'coffee', 'rocket')


def photographs(size):
    return torch.stack([resize_center_crop(photo(n), size) for n in PHOTOS])


def runs_of(folders, only):
    "Name of a method -> run folders, by seed; in the order of `only`, if given."
    found = {}
    for folder in folders:
        for run in sorted(Path(folder).glob('*_seed*')):
            if (run / 'encoder.safetensors').exists():
                found.setdefault(name_and_seed(run)[0], []).append(run)
    return {n: found[n] for n in only if n in found} if only else found


@torch.no_grad()
def features(encoder, x):
    return encoder.accept(x.shape[-1]).eval()(x)


def pooled(encoder, x):
    "Features with patches averaged to an 8 x 8 grid."
    f = features(encoder, x)
    return pool_patches(f, f.grid[0] // 8)


def at_border(patches, grid):
    "Share of RepCo's negatives that touch the outermost patches, and that of all adjacent pairs."
    rows, cols = grid
    edge = torch.ones(rows, cols, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    edge = edge.flatten()
    pairs, adjacent = repco_pairs(patches, grid), neighbour_masks(grid)[0]
    touch = edge[None, :, None] | edge[pairs.neg]
    of_all = (edge[:, None] | edge)[adjacent]
    return touch[pairs.neg_ok].float().mean().item(), of_all.float().mean().item()


def matches(encoder, store, n=512):
    """Fraction of patches matched to the right place, and to within one patch, over `n` images and
    two views of each; and what chance would give."""
    g = generator_for(0, 'matches')
    x = torch.stack([store[i] for i in range(min(n, len(store)))])
    a, b = (make_view(x, aug_moco_cifar(encoder.size), g) for _ in range(2))
    f, k = features(encoder, a.x), features(encoder, b.x)
    truth = true_match(a, b, f.grid)
    drawn = torch.randint(f.patches.shape[1], truth[0].shape, generator=g)
    chance = match_accuracy(drawn, truth, f.grid)
    found = match_accuracy(match_patches(f.patches, k.patches), truth, f.grid)
    border, all_pairs = at_border(f.patches, f.grid)
    plain = lambda border, accuracy: (
        dict(border=border) | {n: v.item() for n, v in accuracy.items()}
    )
    return plain(border, found), plain(all_pairs, chance)


def match_numbers(found, data):
    "A dict for each encoder, and for the same network with random weights."
    numbers = []
    for name, runs in found.items():
        for run in runs:
            encoder, seed = load_encoder(run / 'encoder.safetensors'), name_and_seed(run)[1]
            spec, store = encoder.spec, load_data(data, encoder.size).test
            shared = dict(
                kind=' '.join(filter(None, (spec['kind'], spec.get('variant')))),
                seed=seed,
                data=data.rsplit('/', 1)[-1],
                images=512,
            )
            for who, e in ((name, encoder), ('random', encoder.reinitialized(seed))):
                value, chance = matches(e, store)
                numbers.append(dict(encoder=who, **shared, chance=chance, **value))
        print(name, numbers[-2], flush=True)
    return numbers


def draw_pairs(encoders, size=64):
    "RepCo's pairs on photographs."
    x = photographs(size)
    shape = len(encoders), len(x)
    fig, axes = plt.subplots(*shape, figsize=(2.3 * shape[1], 2.45 * shape[0]), squeeze=False)
    for line, (name, encoder) in zip(axes, encoders.items()):
        f = pooled(encoder, x)
        pairs = repco_pairs(f.patches, f.grid)
        for i, ax in enumerate(line):
            show_pairs(x[i], f.grid, pairs, i=i, ax=ax, title=name if i == 0 else '')
    fig.tight_layout(pad=0.6)
    return fig


def draw_matches(encoders, size=64):
    """Matches between two views of photographs, green where boxes and flips say that they are
    right to within one patch."""
    x, g = photographs(2 * size), generator_for(3, 'views')
    a, b = (make_view(x, aug_moco_cifar(size), g) for _ in range(2))
    fig, axes = plt.subplots(len(encoders), 3, figsize=(11, 2.0 * len(encoders)), squeeze=False)
    for line, (name, encoder) in zip(axes, encoders.items()):
        f, k = pooled(encoder, a.x), pooled(encoder, b.x)
        truth, match = true_match(a, b, f.grid), match_patches(f.patches, k.patches)
        for i, ax in enumerate(line):
            mine = tuple(t[i : i + 1] for t in truth)
            near = match_accuracy(match[i : i + 1], mine, f.grid)['near'].item()
            title = f'{name}: {near:.0%} near'
            show_matches(a, b, match, truth, f.grid, i=i, within=1, ax=ax, title=title)
    fig.tight_layout(pad=0.6)
    return fig


@torch.no_grad()
def draw_heat(run, others, size=128):
    """How near each patch is to the vector of its image: after the heads of local to global, and
    of encoders without them."""
    x, method = photographs(size), saved(run).build()[1]
    state = torch.load(run / 'checkpoint.pt', weights_only=True, map_location='cpu')
    method.load_state_dict(state['method'])
    method.eval()
    method.encoder.accept(size)
    e = make_queries(method.tower(x), method.predictor, method.patch_predictor)
    maps = {}
    for name, encoder in others.items():
        f = features(encoder, x)
        maps[name] = similarity_map(f.image, f.patches, f.grid)
    maps['local to global,\nafter its heads'] = similarity_map(e.image, e.patches, e.features.grid)
    return draw_maps(x, maps)


def save(fig, path):
    "As JPEG: nearly all of it is photographs."
    fig.savefig(path, dpi=80, pil_kwargs=dict(quality=80, optimize=True, progressive=True))
    plt.close(fig)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('runs', nargs='+', help='folders of run_experiments.py')
    p.add_argument('--data', default='photos')
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--only', nargs='+', help='some of the methods')
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    found = runs_of(a.runs, a.only)
    numbers = match_numbers(found, a.data)
    (a.out / 'matches.json').write_text(json.dumps(numbers, indent=0) + '\n')
    first = {n: load_encoder(r[0] / 'encoder.safetensors') for n, r in found.items()}
    for kind in ('resnet', 'vit'):
        some = {n: e for n, e in first.items() if e.spec['kind'] == kind}
        if not some:
            continue
        some = {'untrained': next(iter(some.values())).reinitialized(0)} | some
        save(show_patch_pca(some, photographs(128), size=128), a.out / f'tokens_{kind}.jpg')
        save(draw_matches(some), a.out / f'matches_{kind}.jpg')
        host = lambda n: 'MoCo' in n or 'RepCo' in n
        pairs = {n: e for n, e in some.items() if n == 'untrained' or host(n)}
        save(draw_pairs(pairs), a.out / f'pairs_{kind}.jpg')
    if 'local to global' in found:
        vits = {n: e for n, e in first.items() if e.spec['kind'] == 'vit'}
        others = {'untrained': first['local to global'].reinitialized(0)} | vits
        save(draw_heat(found['local to global'][0], others), a.out / 'heat.jpg')


if __name__ == '__main__':
    main()

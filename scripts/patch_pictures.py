"""Pictures of what the patch family learnt, and how often patches are matched to the right place: from run folders of evidence.py.

    python scripts/patch_pictures.py runs/dense_resnet runs/dense_vit runs/aps_cifar10 --data cifar10 --out nbs/results/records/patch_pictures \\
        --only 'MoCo v2' DenseCL RepCo 'MoCo v3' 'APS power 3' 'local to global' 'RepCo on MoCo v3'

Writes matches.json and PNG files. The photographs are those that come with the package; --data is where the match numbers are measured.
"""
import argparse, json
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
import PIL.Image
import torch
from ssl_patch.cli import load_data, saved
from ssl_patch.data import fit, photo
from ssl_patch.encoders import load_encoder, pool_cells
from ssl_patch.methods import asked_rows
from ssl_patch.patches import dense_match, match_accuracy, neighbour_masks, repco_pairs, show_matches, show_pairs, true_match
from ssl_patch.probes import heat, show_heat, show_tokens
from ssl_patch.results import name_and_seed
from ssl_patch.views import generator_for, make_view, moco_demo

PHOTOS = ('astronaut', 'chelsea', 'coffee', 'rocket')

def photographs(size): return torch.stack([fit(photo(n), size) for n in PHOTOS])

def runs_of(folders, only):
    "Name of a method -> run folders, by seed; in the order of `only`, if given."
    found = {}
    for folder in folders:
        for run in sorted(Path(folder).glob('*_seed*')):
            if (run/'encoder.safetensors').exists(): found.setdefault(name_and_seed(run)[0], []).append(run)
    return {n: found[n] for n in only if n in found} if only else found

@torch.no_grad()
def features(encoder, x): return encoder.accept(x.shape[-1]).eval()(x)

def at_border(features, grid):
    "Share of RepCo's negatives that touch the outermost cells, and that share of all adjacent pairs."
    rows, cols = grid
    edge = torch.ones(rows, cols, dtype=torch.bool); edge[1:-1, 1:-1] = False; edge = edge.flatten()
    pairs, adjacent = repco_pairs(features, grid), neighbour_masks(grid)[0]
    touch = edge[None, :, None] | edge[pairs.neg]
    return touch[pairs.neg_ok].float().mean().item(), (edge[:, None] | edge)[adjacent].float().mean().item()

def matches(encoder, store, n=512):
    "Fraction of cells matched to the right place, and to within one cell, over `n` images and two views of each; and what chance would give."
    g = generator_for(0, 'matches')
    x = torch.stack([store[i] for i in range(min(n, len(store)))])
    a, b = (make_view(x, moco_demo(encoder.size), g) for _ in range(2))
    f, k = features(encoder, a.x), features(encoder, b.x)
    truth = true_match(a, b, f.grid)
    chance = match_accuracy(torch.randint(f.patches.shape[1], truth[0].shape, generator=g), truth, f.grid)
    found = match_accuracy(dense_match(f.patches, k.patches), truth, f.grid)
    border, all_pairs = at_border(f.patches, f.grid)
    return dict(border=border) | {n: v.item() for n, v in found.items()}, dict(border=all_pairs) | {n: v.item() for n, v in chance.items()}

def draw_pairs(rows, size=64):
    "RepCo's pairs on photographs; cells pooled to an 8 x 8 grid."
    x = photographs(size)
    fig, axes = plt.subplots(len(rows), len(x), figsize=(2.3*len(x), 2.45*len(rows)), squeeze=False)
    for line, (name, encoder) in zip(axes, rows.items()):
        f = features(encoder, x); f = pool_cells(f, f.grid[0]//8)
        pairs = repco_pairs(f.patches, f.grid)
        for i, ax in enumerate(line): show_pairs(x[i], f.grid, pairs, i=i, ax=ax, title=name if i == 0 else '')
    fig.tight_layout(pad=.6)
    return fig

def draw_matches(rows, size=64):
    "Matches between two views of photographs, green where boxes and flips say that they are right to within one cell."
    x, g = photographs(2*size), generator_for(3, 'views')
    a, b = (make_view(x, moco_demo(size), g) for _ in range(2))
    fig, axes = plt.subplots(len(rows), 3, figsize=(11, 2.0*len(rows)), squeeze=False)
    for line, (name, encoder) in zip(axes, rows.items()):
        f, k = (pool_cells(v, v.grid[0]//8) for v in (features(encoder, a.x), features(encoder, b.x)))
        truth, match = true_match(a, b, f.grid), dense_match(f.patches, k.patches)
        for i, ax in enumerate(line):
            near = match_accuracy(match[i:i+1], tuple(t[i:i+1] for t in truth), f.grid)['near'].item()
            show_matches(a, b, match, truth, f.grid, i=i, within=1, ax=ax, title=f'{name}: {near:.0%} near')
    fig.tight_layout(pad=.6)
    return fig

@torch.no_grad()
def draw_heat(run, others, size=128):
    "How near each patch is to the vector of its image: after the heads of local to global, and of encoders without them."
    x, method = photographs(size), saved(run).build()[1]
    method.load_state_dict(torch.load(run/'checkpoint.pt', weights_only=True, map_location='cpu')['method']); method.eval()
    method.encoder.accept(size)
    e = asked_rows(method.trunk(x), method.predictor, method.patch_predictor)
    maps = {}
    for name, encoder in others.items(): f = features(encoder, x); maps[name] = heat(f.image, f.patches, f.grid)
    maps['local to global,\nafter its heads'] = heat(e.image, e.patches, e.features.grid)
    return show_heat(x, maps)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', help='folders of evidence.py')
    p.add_argument('--data', default='photos')
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--only', nargs='+', help='some of the methods')
    a = p.parse_args(); a.out.mkdir(parents=True, exist_ok=True)
    found, numbers = runs_of(a.runs, a.only), []
    for name, runs in found.items():
        for run in runs:
            encoder, seed = load_encoder(run/'encoder.safetensors'), name_and_seed(run)[1]
            store = load_data(a.data, encoder.size).test
            for who, e in ((name, encoder), ('random', encoder.fresh(seed))):
                value, chance = matches(e, store)
                numbers.append(dict(encoder=who, kind=' '.join(filter(None, (encoder.spec['kind'], encoder.spec.get('style')))), seed=seed, data=a.data.rsplit('/', 1)[-1], images=512, chance=chance, **value))
        print(name, numbers[-2], flush=True)
    (a.out/'matches.json').write_text(json.dumps(numbers, indent=0)+'\n')
    first = {n: load_encoder(r[0]/'encoder.safetensors') for n, r in found.items()}
    conv = {n: e for n, e in first.items() if e.spec['kind'] == 'resnet'}; tokens = {n: e for n, e in first.items() if e.spec['kind'] == 'vit'}
    def save(name, fig):
        "With a palette of 64 colours, so that the file stays small."
        fig.savefig(a.out/f'{name}.png', dpi=72); plt.close(fig)
        PIL.Image.open(a.out/f'{name}.png').convert('RGB').quantize(64, kmeans=2, dither=PIL.Image.Dither.NONE).save(a.out/f'{name}.png', optimize=True)
    for kind, some in (('resnet', conv), ('vit', tokens)):
        if not some: continue
        some = {'untrained': next(iter(some.values())).fresh(0)} | some
        save(f'tokens_{kind}', show_tokens(some, photographs(128), size=128))
        save(f'matches_{kind}', draw_matches({n: e for n, e in some.items()}))
        pairs = {n: e for n, e in some.items() if n == 'untrained' or 'RepCo' in n or 'MoCo' in n and 'RepCo' not in n}
        save(f'pairs_{kind}', draw_pairs(pairs))
    if 'local to global' in found: save('heat', draw_heat(found['local to global'][0], {'untrained': first['local to global'].fresh(0), **{n: e for n, e in tokens.items()}}))

if __name__ == '__main__': main()

#!/usr/bin/env python
"""How much faster are batched views than torchvision, image by image? CPU, the same recipe, tensors in, float views out.

    python scripts/bench_views.py [--repeats 7] [--threads N]

Every repeat times torchvision and ours one right after the other, and the ratio is taken within the repeat. torchvision runs twice: on
uint8 images, its fast path, converted at the end, and on floats, the arithmetic that ours does. The ratio is against the faster one."""
import argparse, statistics, time
import torch
import torchvision.transforms.v2 as T
from ssl_patch.views import ViewLoader, alpha, beta, make_view, strong, weak


def torchvision_view(r, first):
    "The same recipe as a torchvision transform of one image; `first`: convert to float before everything else"
    to_float = T.ToDtype(torch.float32, scale=True)
    threshold = r.solarize_threshold if first else r.solarize_threshold*255
    steps = [T.RandomResizedCrop(r.size, r.scale, r.ratio, antialias=True)]
    if r.jitter_p: steps.append(T.RandomApply([T.ColorJitter(*r.jitter)], r.jitter_p))
    if r.gray_p: steps.append(T.RandomGrayscale(r.gray_p))
    if r.blur_p: steps.append(T.RandomApply([T.GaussianBlur(r.kernel, r.blur_sigma)], r.blur_p))
    if r.solarize_p: steps.append(T.RandomSolarize(threshold, r.solarize_p))
    steps.append(T.RandomHorizontalFlip(r.flip))
    return T.Compose([to_float, *steps] if first else [*steps, to_float])


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def line(name, n, rivals, ours, repeats):
    for f in (*rivals, ours): f()                                                           # warm up
    rows = [[seconds(f) for f in (*rivals, ours)] for _ in range(repeats)]
    ratio = sorted(min(r[:-1])/r[-1] for r in rows)
    speed = [n/statistics.median(c) for c in zip(*rows)]
    print(f'{name:44s} {speed[0]:9.0f} {speed[1]:9.0f} {speed[2]:9.0f}   {statistics.median(ratio):5.1f}x  ({ratio[0]:.1f} to {ratio[-1]:.1f})', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--threads', type=int, default=None, help='threads of torch; default: as torch chooses')
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {a.repeats} repeats, images per second and view\n')
    print(f'{"":44s} {"tv uint8":>9s} {"tv float":>9s} {"ours":>9s}   ratio to the faster (smallest to largest)')
    for source, size, batch in ((32, 32, 256), (256, 224, 32), (400, 224, 32)):
        x = torch.randint(0, 256, (batch, 3, source//8, source//8), dtype=torch.uint8)
        x = torch.nn.functional.interpolate(x, scale_factor=8, mode='bilinear')             # smooth, as photographs are
        where = f'{source} px to {size} px, batch {batch}'
        for r in (weak, strong, alpha, beta):
            fs = [torchvision_view(r(size), first) for first in (False, True)]
            rivals = [lambda f=f: torch.stack([f(im) for im in x]) for f in fs]
            line(f'make_view   {r.__name__:7s} {where}', batch, rivals, lambda: make_view(x, r(size)), a.repeats)
        pair = [alpha(size), beta(size)]
        fs = [[torchvision_view(r, first) for r in pair] for first in (False, True)]
        rivals = [lambda f=f: [torch.stack([g(im) for im in x]) for g in f] for f in fs]
        loader = ViewLoader(x, pair, batch)
        line(f'ViewLoader  a + b   {where}', 2*batch, rivals, lambda: list(loader.epoch(0)), a.repeats)


if __name__ == '__main__': main()

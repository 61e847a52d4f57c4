"How much faster the batched sampler is than a plain loop over images and boxes, on this machine: python scripts/bench_sampler.py"
import argparse
import statistics
import time

import numpy as np
import torch

from ssl_patch.patches import asymmetric_patches


def plain_pair(box1, box2, flip1, flip2, n, k, draws, power, rng):
    "One pair of views, from the definition: a loop over draws and over the kept boxes of view 1; numpy over the cells of view 2."
    def cells(box, flip):
        y, x, h, w = box
        c = n - 1 - np.arange(n) if flip else np.arange(n)
        top, left = np.meshgrid(y + np.arange(n) * h / n, x + c * w / n, indexing='ij')
        return top.ravel(), left.ravel(), h / n, w / n
    top1, left1, h1, w1 = cells(box1, flip1)
    top2, left2, h2, w2 = cells(box2, flip2)
    order, keep1, keep2 = rng.permutation(n * n), [], []
    for t in range(draws):
        kept, new = order[t*k:(t+1)*k], np.ones(n * n)
        for i in kept:
            high = np.minimum(top2 + h2, top1[i] + h1) - np.maximum(top2, top1[i])
            wide = np.minimum(left2 + w2, left1[i] + w1) - np.maximum(left2, left1[i])
            new -= np.maximum(high, 0) * np.maximum(wide, 0) / (h2 * w2)
        new[new < 1e-6] = 0
        weight = new**power
        keep1.append(kept)
        keep2.append(rng.choice(n * n, k, replace=False, p=weight / weight.sum()))
    return keep1, keep2


def crops(batch, rng, size=32, scale=(.15, 1)):
    "Boxes in whole pixels, as a random resized crop draws them, and flips."
    side = size * np.sqrt(rng.uniform(*scale, batch))
    stretch = np.exp(rng.uniform(np.log(3/4), np.log(4/3), batch) / 2)
    hw = np.clip(np.round([side / stretch, side * stretch]), 1, size)
    return np.stack([*np.floor(rng.uniform(size=(2, batch)) * (size - hw + 1)), *hw], 1), rng.uniform(size=batch) < .5


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--batch', type=int, default=256, help='pairs of views')
    p.add_argument('--grid', type=int, default=16, help='patches per side')
    p.add_argument('--draws', type=int, default=4)
    p.add_argument('--repeats', type=int, default=5, help='runs of each, taken in turn')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='where the batched sampler runs')
    p.add_argument('--least', type=float, default=20, help='exit with status 1 if the median ratio is below this')
    a = p.parse_args()
    torch.set_num_threads(1)  # one core each: the loop cannot use more
    rng, k = np.random.default_rng(0), a.grid**2 // 4
    (box1, flip1), (box2, flip2) = (crops(a.batch, rng) for _ in range(2))
    on = lambda x, **kw: torch.tensor(x, device=a.device, **kw)
    tensors = [on(box1, dtype=torch.float32), on(box2, dtype=torch.float32)], dict(flip1=on(flip1), flip2=on(flip2))

    def batched():
        keep1, keep2 = asymmetric_patches(*tensors[0], a.grid, draws=a.draws, **tensors[1])
        return keep2.sum().item()  # wait for the device

    def plain():
        for i in range(a.batch): plain_pair(box1[i], box2[i], flip1[i], flip2[i], a.grid, k, a.draws, 3., rng)

    def timed(f, times=1):
        start = time.perf_counter()
        for _ in range(times): f()
        return (time.perf_counter() - start) / times * 1e3

    timed(batched, 3)
    runs = [(timed(plain), timed(batched, 20)) for _ in range(a.repeats)]
    ratios = [slow / fast for slow, fast in runs]
    def show(name, xs, unit):
        print(f'{name:34s} {statistics.median(xs):9.1f} {unit}  ({min(xs):.1f} to {max(xs):.1f} in {len(xs)} runs)')

    print(f'{a.batch} pairs of views, grid {a.grid}x{a.grid}, {a.draws} draws of {k} patches, power 3, one core each')
    show('loop over images and boxes (CPU)', [r[0] for r in runs], 'ms')
    show(f'asymmetric_patches ({a.device})', [r[1] for r in runs], 'ms')
    show('ratio', ratios, 'x ')
    if statistics.median(ratios) < a.least: raise SystemExit(f'slower than {a.least:g} times the loop')


if __name__ == '__main__': main()

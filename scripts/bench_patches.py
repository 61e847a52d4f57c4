"""What dropping patches saves: patches, activation memory and time of one optimiser step of APS,
beside the same step on all patches.

    python scripts/bench_patches.py --out runs/bench_patches.json

Every configuration is timed in turn, round after round, in one process; a ratio is the median over
rounds of (all patches / kept patches) of the same round, with the lowest and the highest. Memory is
the sum of what autograd keeps for the backward pass, so it does not depend on the device.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from ssl_patch.evaluation.records import hardware
from ssl_patch.methods.aps import APS
from ssl_patch.methods.compose import step_cost
from ssl_patch.methods.moco import MoCoV3
from ssl_patch.models.encoders import vit
from ssl_patch.reports.timing import in_turn
from ssl_patch.training.checkpoint import versions
from ssl_patch.views.augmentations import make_view

SETTINGS = {
    'ViT-Tiny/2, 32 px': dict(name='tiny', size=32, patch=2),
    'ViT-Small/16, 224 px': dict(name='small', size=224, patch=16),
}


def rows(encoder):
    "Name of a row -> method; each has an encoder of its own."
    found = {'all patches': APS(encoder(), patch_sampler=None)}
    for s in (0.5, 0.25, 0.15):
        found[f'APS, s = {s:g}'] = APS(encoder(), keep_ratio=s, num_draws=int(1 / s))
    found['APS, s = 0.25, EMA keys'] = APS(encoder(), momentum=0.99)
    return found | {'MoCo v3': MoCoV3(encoder())}


def one_step(method, optimizer, views, keeps):
    with torch.autocast(views[0].x.device.type, torch.bfloat16):
        loss, _ = method(views, keeps)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    method.after_step()


def measured(shape, a):
    "Name of a row -> what a step costs, for one network."
    torch.manual_seed(0)
    methods = {n: m.to(a.device).train() for n, m in rows(lambda: vit(**shape)).items()}
    x = torch.randint(0, 256, (a.batch_size, 3, 256, 256), dtype=torch.uint8)
    work = {}
    for n, m in methods.items():
        m.encoder.explicit_attention(a.device == 'cpu')
        views = [make_view(x, augmentation).to(a.device) for augmentation in m.augmentations]
        optimizer = torch.optim.AdamW(m.parameters(), 1e-4)
        work[n] = (m, optimizer, views, m.draw_patches(views)[0])
    steps = {n: partial(one_step, *w) for n, w in work.items()}
    t, found = in_turn(steps, a.rounds, a.device), {}
    for n, (m, _, views, _) in work.items():
        times = dict(zip(('faster', 'faster_low', 'faster_high'), t.ratio('all patches', n)))
        found[n] = dict(**step_cost(m, views), seconds=t.median(n), **times)
    return found


def show(title, table, batch_size):
    full = table['all patches']['bytes']
    print(f'\n{title}, batch {batch_size}')
    for n, c in table.items():
        patches = f'{c["query_patches"]:4} + {c["key_patches"]:3} patches an image'
        memory = f'{c["bytes"] / 2**20:7.0f} MiB ({full / c["bytes"]:.1f}x less)'
        span = f'{c["faster_low"]:.1f} to {c["faster_high"]:.1f}'
        took = f'{c["seconds"] * 1e3:6.0f} ms a step ({c["faster"]:.1f}x faster, {span})'
        print(f'  {n:26} {patches}, {memory}, {took}', flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('--batch-size', type=int, default=16)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    found = dict(
        hardware=hardware(a.device),
        threads=torch.get_num_threads(),
        versions=versions(),
        batch_size=a.batch_size,
        rounds=a.rounds,
        settings={},
    )
    for title, shape in SETTINGS.items():
        found['settings'][title] = table = measured(shape, a)
        show(title, table, a.batch_size)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()

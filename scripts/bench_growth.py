"How cost grows, what memory each method needs, and what importing costs. For scripts/bench.py."

import subprocess
import sys
from functools import partial

import torch
import torch.nn.functional as F
from bench_report import seeded, smooth

from ssl_patch.methods.aps import APS
from ssl_patch.methods.branches import all_view_pairs
from ssl_patch.methods.compose import build_method, step_cost
from ssl_patch.methods.contrast import info_nce
from ssl_patch.methods.moco import MoCoV2, MoCoV3
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.momentum import ema
from ssl_patch.reports.profile import measure_growth
from ssl_patch.reports.timing import Timings
from ssl_patch.views.augmentations import aug_byol_a, aug_moco_v2, make_view

# ---- how cost grows


def views_of(method, batch, side=None):
    "Views of a method's augmentations, of smooth pictures."
    return [
        make_view(smooth(batch, side or a.size), a, torch.Generator().manual_seed(i))
        for i, a in enumerate(method.augmentations)
    ]


def stepping(method, views):
    "A function that does a forward and a backward pass and tells the bytes kept for the latter."
    method.train()
    size = step_cost(method, views)['bytes']
    generator = torch.Generator(views[0].x.device).manual_seed(0)
    keeps = method.draw_patches(views, generator)[0]

    def work():
        method.zero_grad()
        method(views, keeps)[0].backward()
        return size

    return work


def queue_loss(K):
    "InfoNCE with a queue of K keys; its backward pass tells the bytes that were kept."
    q, k, old = (F.normalize(torch.randn(n, 128), dim=1) for n in (128, 128, K))
    q.requires_grad_()
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = info_nce(q, k, old, tau=0.1)
    for t in (q, k, old):
        kept.pop(t.untyped_storage().data_ptr(), None)
    del loss

    def work():
        info_nce(q, k, old, tau=0.1).backward()
        return sum(kept.values())

    return work


def growth(a, report):
    "How time and kept memory grow with image size, tokens, batch, queue and views."
    net = dict(width=48, depth=2, heads=3) if a.small else dict(depth=4)
    batch = 4 if a.small else 16
    aps = lambda **kw: APS(vit('tiny', 32, 2, **net), num_draws=1, **kw)

    def making(side):
        x, augmentation = smooth(batch, side), aug_moco_v2(side)
        return lambda: make_view(x, augmentation) and None

    def sized(side):
        encoder = resnet('resnet18', side, 'small', width=16)
        m = MoCoV2(encoder, 'cifar', queue=256, key_encoder=ema(0.99))
        return stepping(m, views_of(m, 16))

    def tokens(k):
        m = aps(keep_ratio=k / 256)
        return stepping(m, views_of(m, batch))

    def batches(n):
        m = aps()
        return stepping(m, views_of(m, n))

    def many_views(n):
        augmentations, pairs = (aug_byol_a(32),) * n, all_view_pairs(2, n)
        encoder = vit('tiny', 32, 4, 'moco_v3', **net)
        m = MoCoV3(encoder, hidden=256, augmentations=augmentations, view_pairs=pairs)
        return stepping(m, views_of(m, batch))

    kinds = {
        'views: image side, pixels': (making, (32, 64, 128, 256)),
        'ResNet-18 of 16 channels, step: image side, pixels': (sized, (16, 32, 64, 128)),
        'ViT, step: tokens kept': (tokens, (16, 32, 64, 128, 256)),
        'APS, step: batch': (batches, (8, 16, 32, 64)),
        'InfoNCE of 128 queries: keys in the queue': (queue_loss, (1024, 4096, 16384, 65536)),
        'MoCo v3, step: views': (many_views, (2, 3, 4, 6)),
    }
    for title, (make, values) in kinds.items():
        make, values = partial(_seeded_value, make), values[:2] if a.small else values
        g = measure_growth(make, values, rounds=1 if a.small else 3)
        report.add(title, g, growth=g.as_dict())


def _seeded_value(make, value):
    return seeded(lambda: make(value))


# ---- memory of each method


def memory(a, report):
    """What each method keeps for the backward pass, and what it holds between steps; counted, so
    that it does not depend on the device."""
    batch = a.batch or (16 if a.small else 64)
    how = 'every method with its preset for CIFAR, queues as for 50,000 images'
    report.note(f'32 px, batch {batch}, float32; {how}')
    small = dict(width=48, depth=2, heads=3) if a.small else {}
    tiny = lambda *variant: vit('tiny', 32, 2, *variant, **small)
    conv = lambda: resnet('resnet18', 32, width=a.width or (16 if a.small else 64))
    makers = {
        'APS, all tokens': lambda: APS(tiny(), patch_sampler=None),
        'APS': lambda: APS(tiny()),
        'MoCo v3': lambda: MoCoV3(tiny('moco_v3')),
        'local to global': lambda: build_method('local_to_global', tiny()),
    }
    for n in ('moco_v1', 'moco_v2', 'ressl', 'co2', 'sce', 'densecl', 'repco'):
        makers[n] = lambda n=n: build_method(n, conv())
    rows = {}
    for name, make in makers.items():
        m = seeded(make).train()
        m.set_data_size(50_000, batch)
        rows[name] = row = _held(m, views_of(m, batch))
        parts = '  '.join(f'{k} {v / 2**20:,.1f}' for k, v in row.items() if k != 'network')
        print(f'   {name:16} {row["network"]:10} {parts} MiB', flush=True)
        del m
    report.add(f'memory, batch {batch}', rows=rows, batch=batch)


def _held(m, views):
    size = lambda tensors: sum(4 * t.numel() for t in tensors)
    learned = size(p for p in m.parameters() if p.requires_grad)
    return dict(
        network='ViT-Tiny/2' if hasattr(m.encoder, 'explicit_attention') else 'ResNet-18',
        kept=step_cost(m, views)['bytes'],
        weights=learned,
        gradients=learned,
        optimiser=learned * (2 if m.train_config.optimizer == 'adamw' else 1),
        ema=size(m.key_encoder.net.parameters()) if m.key_encoder else 0,
        queue=size(q.keys for q in m.queues()),
    )


# ---- import


def imports(a, report):
    "Importing, each time in a fresh process: seconds beyond those of torch itself."
    inside = {}

    def fresh(module):
        clock = 'import time, torch; t = time.perf_counter()'
        code = f'{clock}; import {module}; print(time.perf_counter() - t)'

        def work():
            words = [sys.executable, '-c', code]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            inside.setdefault(module, []).append(float(done.stdout.split()[-1]))

        return work

    modules = ['ssl_patch.all', 'ssl_patch.losses', 'torchvision', 'timm']
    others = ('kornia.augmentation', 'lightly.loss')
    modules += [m for m in others if not report.lacks(m.split('.')[0])]
    if a.small:
        modules = modules[:1]
    works = {'torch alone': fresh('torch')} | {m: fresh(m) for m in modules}
    report.time('import in a fresh process, with torch', works)
    beyond = {m: s[1:] for m, s in inside.items()}  # the first was the warm-up
    middle, lines = Timings(beyond), []
    for m, s in beyond.items():
        if m != 'torch':
            aim = ', target below 0.5' if m == 'ssl_patch.all' else ''
            span = f'({min(s):.3f} to {max(s):.3f})'
            lines.append(f'   {m:16} {middle.median(m):.3f} s {span}{aim}')
    medians = {m: middle.median(m) for m in beyond}
    shown = '\n'.join(lines)
    report.add('import beyond torch', shown, seconds=beyond, median=medians, target=0.5)

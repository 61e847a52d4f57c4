"A training step and a whole epoch, beside plain code and lightly. For scripts/bench.py."

import tempfile
from pathlib import Path

import bench_baselines as baselines
import torch
from bench_report import jpegs, one_epoch, seeded, smooth, trainer

from ssl_patch.data.sources import images
from ssl_patch.methods.aps import APS
from ssl_patch.methods.contrast import InfoNCELoss
from ssl_patch.methods.method import Method
from ssl_patch.methods.configs import TrainConfig
from ssl_patch.methods.moco import MoCoV2, MoCoV3
from ssl_patch.methods.sce import SCE
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.heads import mlp
from ssl_patch.models.momentum import ema
from ssl_patch.views.augmentations import aug_moco_v2

# ---- a step


def _aps_step(a, report):
    batch = a.batch or (8 if a.small else 64)
    shape = dict(name='tiny', size=32, patch=2)
    width, depth = (a.width or 48, a.depth or 2) if a.small else (a.width, a.depth)
    shape |= {k: v for k, v in dict(width=width, depth=depth).items() if v}
    x = smooth(batch, 32)

    def ours(bf16):
        method = seeded(lambda: APS(vit(**shape), num_draws=1))
        return trainer(method, images(x), batch_size=batch, bf16=bf16, lr=1e-4)

    exact, chosen = ours(False), ours(None)
    views = next(iter(exact.loader.epoch(0)))[0]
    keeps = exact.method.draw_patches(views, torch.Generator().manual_seed(0))[0]
    net = exact.encoder.net
    heads = net.blocks[0].attn.num_heads

    def plain():
        model = baselines.PlainAPS(32, 2, net.embed_dim, len(net.blocks), heads)
        model.start_as(exact.method).train()
        return model, torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05)

    (m1, o1), (m2, o2) = plain(), plain()
    args = (views[0].x, views[1].x, *keeps)
    with torch.no_grad():
        gap = (exact.method(views, keeps)[0] - m1(*args)).abs().item()
    report.check('loss of our APS and of the plain one, same weights, float32', gap, 1e-4)
    kind = 'bf16, explicit attention' if chosen.bf16 else 'float32'
    best, plain_amp = f'ssl_patch as chosen here ({kind})', 'plain, autocast to bf16'
    works = {
        best: lambda: chosen.train_batch(views),
        'ssl_patch float32': lambda: exact.train_batch(views),
        'plain float32': lambda: baselines.train_step(m1, o1, *args),
        plain_amp: lambda: baselines.train_step(m2, o2, *args, amp=True),
    }
    ratios = [
        (['plain float32'], [best], 1.8),
        (['plain float32'], ['ssl_patch float32'], None),
        ([plain_amp], [best], None),
    ]
    shape = f'ViT {net.embed_dim} wide, {len(net.blocks)} blocks, patch 2, 32 px'
    title = f'APS step, {shape}, batch {batch}, {keeps[0].shape[1]} of 256 tokens'
    t = report.time(title, works, ratios, batch)
    for run, name in ((chosen, best), (exact, 'ssl_patch float32')):
        took = t.median(name)
        report.bounds(f'{title}, {name}', run.method, views, keeps, took, run.bf16)


def moco(width=64, size=32, queue=4096, stem='small'):
    """MoCo v2 as lightly's documentation has it, in our slots: plain batch-norm, a head of two
    layers, tau 0.1, EMA 0.99."""
    return Method(
        resnet('resnet18', size, stem, width),
        (aug_moco_v2(size),) * 2,
        key_encoder=ema(0.99),
        queue=queue,
        loss=InfoNCELoss(tau=0.1),
        projector=mlp(8 * width, 8 * width, 128, norm=False, last_norm=False, bias=True),
        view_pairs=((0, 1),),
        train_config=TrainConfig(optimizer='sgd', base_lr=0.06, weight_decay=5e-4),
        name='MoCo v2, plain batch-norm',
    )


def _moco_step(a, report):
    batch, width = a.batch or (16 if a.small else 128), a.width or (16 if a.small else 64)
    queue, data = 256 if a.small else 4096, images(smooth(batch, 32))

    def ours(bf16, make=lambda: moco(width, queue=queue)):
        return trainer(seeded(make), data, batch_size=batch, bf16=bf16, lr=1e-3)

    exact, chosen = ours(False), ours(None)
    small_net = lambda: resnet('resnet18', 32, width=width)
    published = ours(None, lambda: MoCoV2(small_net(), 'cifar', queue=queue))
    views = next(iter(exact.loader.epoch(0)))[0]
    args = [v.x for v in views]
    best = f'ssl_patch as chosen here ({"bf16" if chosen.bf16 else "float32"}, channels last)'
    works = {
        best: lambda: chosen.train_batch(views),
        'ssl_patch float32': lambda: exact.train_batch(views),
        'ssl_patch, published split batch-norm': lambda: published.train_batch(views),
    }
    if not report.lacks('lightly'):
        (m1, o1), (m2, o2) = (baselines.lightly_moco(exact.method) for _ in range(2))
        with torch.no_grad():
            gap = (exact.method(views)[0] - m1(*args)).abs().item()
        what = "loss of our MoCo and of lightly's, same weights and queue, float32"
        report.check(what, gap, 1e-4)
        works['lightly float32'] = lambda: baselines.train_step(m1, o1, *args)
        works['lightly, autocast to bf16'] = lambda: baselines.train_step(m2, o2, *args, amp=True)
    ratios = [
        (['lightly float32'], [best], None),
        (['lightly float32'], ['ssl_patch float32'], None),
        (['lightly, autocast to bf16'], [best], None),
    ]
    shape = f'ResNet-18 with {width} channels, small stem'
    title = f'MoCo v2 step, {shape}, batch {batch}, queue of {queue}'
    t = report.time(title, works, ratios, batch)
    for run, name in ((chosen, best), (exact, 'ssl_patch float32')):
        report.bounds(f'{title}, {name}', run.method, views, None, t.median(name), run.bf16)


def step(a, report):
    "One training step, views made already: forward, backward, optimiser, moving average, queue."
    report.note(
        'the others are given the kept patches; ours draws them, and its bookkeeping counts',
        "lightly's MoCo has plain batch-norm and no shuffled keys; so has ours here, "
        'and the published form stands beside it',
    )
    report.measure_machine()
    if a.only in (None, 'aps'):
        _aps_step(a, report)
    if a.only in (None, 'moco'):
        _moco_step(a, report)


# ---- a whole epoch


def epoch(a, report):
    "Whole epochs: by phase, and beside lightly with its transforms and DataLoader on these images."
    report.measure_machine()
    batches, warmup = (2, 1) if a.small else (a.batches or 5, 2)
    width, batch = a.width or (16 if a.small else 32), a.batch or (16 if a.small else 64)
    data = images('photos') if a.photos else images(smooth(batch * (batches + warmup), 32))
    small = dict(width=48, depth=2, heads=3) if a.small else {}
    heads = dict(hidden=64, out=32) if a.small else {}
    conv, wide = lambda: resnet('resnet18', 32, width=width), f'ResNet-18 of {width} channels'
    made = {
        'APS, ViT-Tiny/2': lambda: APS(vit('tiny', 32, 2, **small)),
        'MoCo v3, ViT-Tiny/4': lambda: MoCoV3(vit('tiny', 32, 4, 'moco_v3', **small), **heads),
        f'MoCo v2, {wide}': lambda: MoCoV2(conv()),
        f'SCE, {wide}': lambda: SCE(conv()),
    }
    for name, make in made.items():
        run = trainer(seeded(make), data, batch_size=batch, lr=1e-4)
        report.phases(f'{name}, 32 px, batch {batch}', run, batches, warmup)
    with tempfile.TemporaryDirectory() as folder:
        n, side, size = (64, 96, 48) if a.small else (a.files, 256, 96)
        jpegs(Path(folder), n, side)
        in_memory = images(smooth(batch * 4, 32))
        _beside_lightly(a, report, 'memory', in_memory, None, 32, 'small', width, batch)
        stream, where = images(Path(folder), stream=True), f'{n} JPEG files of {side} px'
        net, large = (16, batch) if a.small else (64, 64)
        _beside_lightly(a, report, where, stream, folder, size, 'imagenet', net, large)


def _lightly_epochs(a, exact, data, folder, size, batch):
    "Name -> an epoch of lightly, in float32 and by autocast, with its own loader."
    from torchvision.datasets import ImageFolder

    view = baselines.lightly_views(aug_moco_v2(size))
    if folder:
        pictures = baselines.Unlabelled(ImageFolder(folder, view))
    else:
        pictures = baselines.Pictures(data.train.images, view)
    works = {}
    for w in (2,) if folder else a.workers:
        for kind in ('float32', 'autocast to bf16'):

            def work(
                loader=baselines.data_loader(pictures, batch, w),
                pair=baselines.lightly_moco(exact.method),
                amp=kind != 'float32',
            ):
                for x1, x2 in loader:
                    baselines.train_step(*pair, x1, x2, amp=amp)

            works[f'lightly {kind}, {w} workers'] = work
    return works


def _beside_lightly(a, report, source, data, folder, size, stem, width, batch):
    n, queue = len(data.train) // batch * batch, 256 if a.small else 4096

    def ours(bf16):
        method = seeded(lambda: moco(width, size, queue, stem))
        return trainer(method, data, batch_size=batch, bf16=bf16, lr=1e-3, workers=2)

    chosen, exact = ours(None), ours(False)
    best = f'ssl_patch as chosen here ({"bf16" if chosen.bf16 else "float32"})'
    works = {best: one_epoch(chosen), 'ssl_patch float32': one_epoch(exact)}
    if not report.lacks('lightly'):
        works |= _lightly_epochs(a, exact, data, folder, size, batch)
    plain, amp = ([k for k in works if f'lightly {w}' in k] for w in ('float32', 'autocast'))
    ratios = [(plain, [best], None), (amp, [best], None), (plain, ['ssl_patch float32'], None)]
    shape = f'ResNet-18 of {width} channels, {size} px'
    title = f'epoch of MoCo v2, {shape}, batch {batch}, {source}'
    report.time(title, works, ratios, n)
    if folder:
        batches = n // batch if a.small else 3 * (n // batch)
        title = f'MoCo v2, ResNet-18, {size} px, {source}, 2 workers'
        report.phases(title, chosen, batches, 1)

"""The part of scripts/bench.py for GPUs: data held on the device, whole epochs, memory.
On a CPU (`--device cpu --small`) it only shows that it runs."""

import time
from pathlib import Path

import torch
from bench_report import one_epoch, seeded, trainer

from ssl_patch.data.sources import images
from ssl_patch.methods.aps import APS
from ssl_patch.methods.sce import SCE
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.views.augmentations import aug_byol_a, aug_byol_b
from ssl_patch.views.loader import ViewLoader


def noise(n, side, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), generator=g, dtype=torch.uint8)


def cifar(a, report):
    "CIFAR-10 from a file, or random images of its shape (which cost the same, and teach nothing)."
    if a.data:
        return images(Path(a.data))
    report.note('random images of the shape of CIFAR-10: as much work, nothing to learn')
    few = (512, 64) if a.small else (50_000, 10_000)
    (x, y), (u, v) = ((noise(n, 32, i), torch.arange(n) % 10) for i, n in enumerate(few))
    return images((x, y), test=(u, v))


class Peak:
    "Peak memory of the device while it is watched, bytes; 0 where it cannot be asked."

    def __init__(self, device):
        self.device, self.known = device, 'cuda' in device

    def __enter__(self):
        if self.known:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_):
        self.bytes = 0
        if self.known:
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before


def compiled(run):
    "torch.compile of both encoders, in place: names of weights stay as they are."
    for e in (run.method.encoder, run.method.momentum_encoder):
        if e is not None:
            e.compile()
    return run


def sce_resnet(width):
    "SCE with ResNet-18, in its CIFAR preset."
    return seeded(lambda: SCE(resnet('resnet18', 32, width=width), 'cifar'))


def _sce(a, report, data):
    "Epochs of SCE, compiled and not; whether compiling paid."
    width, batch = (16, 64) if a.small else (a.width or 64, a.batch or 512)
    n = len(data.train) // batch * batch
    made = lambda: trainer(sce_resnet(width), data, device=a.device, batch_size=batch)
    runs = {'SCE': made()}
    if not a.no_compile:
        runs['SCE, compiled'] = compiled(made())
    works = {}
    for name, run in runs.items():
        try:
            one_epoch(run)()
            works[name] = one_epoch(run)
        except Exception as e:
            why = next(iter(str(e).splitlines()), '')
            report.note(f'{name} failed: {type(e).__name__}: {why}')
    what = f'ResNet-18 of {width} channels, batch {batch}, {n:,} images of 32 px'
    title = f'epoch of SCE, {what} held on {a.device}, views included'
    t = report.time(title, works, [(['SCE'], ['SCE, compiled'], None)], n, target=20_000)
    best = min(works, key=t.median)
    print(f'   {best}: {n / t.median(best):,.0f} images/s end to end, target 20,000')
    report.phases('SCE, ResNet-18', runs[best], 4 if a.small else 20, 2, False)
    return best != 'SCE'


def _peak_memory(a, made):
    "Name -> bytes of a step with a quarter of the tokens and with all; None where it does not fit."
    found = {}
    for name, kw in {'a quarter of the tokens': {}, 'all tokens': dict(patch_sampler=None)}.items():
        try:
            with Peak(a.device) as peak:
                run = made(**kw)
                run.train_batch(next(iter(run.loader.epoch(0)))[0])
            found[name] = peak.bytes
        except torch.cuda.OutOfMemoryError:
            found[name] = None
        run = None
    return found


def _aps(a, report, data):
    "Epochs of APS against their bound, and its memory beside that of all tokens."
    batch = a.batch or (16 if a.small else 512)
    for kind in ('tiny', 'small'):
        shape = dict(name=kind, patch=2)
        if a.small:
            shape |= dict(width=48, depth=2, heads=3)

        def made(**kw):
            method = seeded(lambda: APS(vit(size=32, **shape), **kw))
            return trainer(method, data, device=a.device, batch_size=batch)

        title, run = f'APS, ViT-{kind.title()}/2, batch {batch}', made()
        if not a.small:
            n = len(run.loader) * batch
            report.time(f'epoch of {title}, four draws', {'APS': one_epoch(run)}, (), n)
        report.phases(title, run, 2 if a.small else 20, 2, False)
        del run
        memory = _peak_memory(a, made)
        mib = lambda v: f'{v / 2**20:,.0f} MiB' if v else 'not measured here'
        lines = [f'   {k}: {"does not fit" if v is None else mib(v)}' for k, v in memory.items()]
        report.add(f'peak memory of a step, {title}', '\n'.join(lines), bytes=memory)


def _large_views(a, report):
    "What part of a step at 224 pixels the views take."
    source, size, batch = (48, 32, 8) if a.small else (256, 224, 256)
    data = images(noise(batch * 4, source))
    augmentations = aug_byol_a(size), aug_byol_b(size)
    loader = ViewLoader(data.train, augmentations, batch, device=a.device)
    report.time(
        f'views byol_a + byol_b, {source} px to {size} px, batch {batch}, on {a.device}',
        {'ViewLoader': lambda: [None for _ in loader.epoch(0)]},
        (),
        2 * batch * 4,
        'views',
    )
    torch.manual_seed(0)
    if a.small:
        net = vit('small', size, patch=8, width=48, depth=2, heads=3)
        conv, heads = resnet('resnet18', size, width=16), dict(queue=1024, hidden=64, out=32)
        methods = {'APS': APS(net), 'SCE': SCE(conv, 'imagenet', **heads)}
    else:
        methods = {
            'APS, ViT-Small/16': APS(vit('small', size, patch=16)),
            'SCE, ResNet-50': SCE(resnet('resnet50', size), 'imagenet'),
        }
    for name, method in methods.items():
        run = trainer(method, data, device=a.device, batch_size=batch)
        title = f'{name}, {size} px, batch {batch}'
        p = report.phases(title, run, 2 if a.small else 10, 2, False)
        share = p.share('load', 'views')
        title = f'share of loading and views in all: {name}, {size} px'
        shown = f'   {100 * share:.1f} %, target below 15 %'
        report.add(title, shown, share=share, target=0.15)


def _schedule(a, report, data, compile_it):
    "The whole schedule of SCE, kNN included: wall time and accuracy at the last epoch."
    from ssl_patch.evaluation.knn import knn

    width, batch = (16, 64) if a.small else (a.width or 64, a.batch or 512)
    epochs, begun = 2 if a.small else a.epochs, time.time()
    run = Pretrainer(
        sce_resnet(width),
        data,
        epochs=epochs,
        batch_size=batch,
        device=a.device,
        progress='lines',
        overlap='drop',
        out=a.out.parent / time.strftime('sce_%Y%m%d_%H%M%S'),
    )
    if compile_it:
        compiled(run)
    run.fit()
    trained = time.time() - begun
    record = knn(run.encoder, run.data, device=a.device, baselines=False)
    total = time.time() - begun
    took = f'{total:.0f} s with kNN ({trained:.0f} s without), target 600 s'
    report.add(
        f'SCE, {epochs} epochs, batch {batch}',
        f'   {took}; kNN top-1 {100 * record.value:.2f} %',
        seconds=total,
        training_seconds=trained,
        epochs=epochs,
        batch=batch,
        compiled=compile_it,
        knn=record.value,
        target=600,
        history=run.history,
    )


def gpu(a, report):
    "What a GPU is asked to show; see the targets in the output."
    if 'cuda' in a.device and not torch.cuda.is_available():
        raise SystemExit(f'--device {a.device}: there is no GPU here')
    report.measure_machine()
    data = cifar(a, report)
    if a.small:
        a.no_compile = True  # compiling takes minutes on a CPU
    compile_it = _sce(a, report, data)
    _aps(a, report, data)
    _large_views(a, report)
    if a.schedule:
        _schedule(a, report, data, compile_it)

"""The part of scripts/bench.py for GPUs: data held on the device, whole epochs, memory. On a CPU (`--device cpu --small`) it only shows that it runs."""
import time
from pathlib import Path
import torch
from bench import one_epoch, phases, trainer
from ssl_patch.data import images
from ssl_patch.encoders import resnet, vit
from ssl_patch.methods import APS, SCE
from ssl_patch.training import Pretrainer
from ssl_patch.views import ViewLoader, alpha, beta


def pictures(n, side, seed=0): return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def cifar(a, report):
    "CIFAR-10 from a file, or random images of its shape (which cost the same, and teach nothing)"
    if a.data: return images(Path(a.data))
    report.note('random images of the shape of CIFAR-10: as much work, nothing to learn')
    few = (512, 64) if a.small else (50_000, 10_000)
    (x, y), (u, v) = ((pictures(n, 32, i), torch.arange(n) % 10) for i, n in enumerate(few))
    return images((x, y), test=(u, v))


class Peak:
    "Peak memory of the device while it is watched, bytes; 0 where it cannot be asked"
    def __init__(self, device): self.device = device
    def __enter__(self):
        if 'cuda' in self.device: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(self.device); self.before = torch.cuda.memory_allocated(self.device)
        return self
    def __exit__(self, *_): self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before if 'cuda' in self.device else 0


def compiled(run):
    "torch.compile of both encoders, in place: names of weights stay as they are"
    for e in (run.method.encoder, run.method.target_encoder):
        if e is not None: e.compile()
    return run


def sce_resnet(width):
    "SCE with ResNet-18 as its CIFAR recipe has it"
    torch.manual_seed(0)
    return SCE(resnet('resnet18', 32, width=width), 'cifar')


def _sce(a, report, data):
    width, batch = (16, 64) if a.small else (a.width or 64, a.batch or 512)
    n = len(data.train)//batch*batch
    runs = {'SCE': trainer(sce_resnet(width), data, device=a.device, batch_size=batch)}
    if not a.no_compile: runs['SCE, compiled'] = compiled(trainer(sce_resnet(width), data, device=a.device, batch_size=batch))
    works = {}
    for name, run in runs.items():
        try: one_epoch(run)(); works[name] = one_epoch(run)
        except Exception as e: report.note(f'{name} failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}')
    title = f'epoch of SCE, ResNet-18 of {width} channels, batch {batch}, {n:,} images of 32 px held on {a.device}, views included'
    t = report.time(title, works, [(['SCE'], ['SCE, compiled'], None)], n, target=20_000)
    best = min(works, key=t.median)
    print(f'   {best}: {n/t.median(best):,.0f} images/s end to end, target 20,000')
    phases(report, 'SCE, ResNet-18', runs[best], 4 if a.small else 20, 2, False)
    return best != 'SCE'


def _aps(a, report, data):
    "Epochs of APS against their bound, and its memory beside that of all tokens"
    kinds, batch = {'ViT-Tiny/2': dict(name='tiny', patch=2), 'ViT-Small/2': dict(name='small', patch=2)}, a.batch or (16 if a.small else 512)
    for title, shape in kinds.items():
        if a.small: shape = shape | dict(width=48, depth=2, heads=3)
        def made(**kw):
            torch.manual_seed(0)
            return trainer(APS(vit(size=32, **shape), **kw), data, device=a.device, batch_size=batch)
        run = made()
        if a.small: phases(report, f'APS, {title}, batch {batch}', run, 2, 2, False)
        else:
            n = len(run.loader)*batch
            report.time(f'epoch of APS, {title}, batch {batch}, four draws', {'APS': one_epoch(run)}, (), n)
            phases(report, f'APS, {title}, batch {batch}', run, 20, 2, False)
        del run
        memory = {}
        for name, kw in {'a quarter of the tokens': {}, 'all tokens': dict(patches=None)}.items():
            try:
                with Peak(a.device) as peak:
                    run = made(**kw)
                    run.train_batch(next(iter(run.loader.epoch(0)))[0])
                memory[name] = peak.bytes
            except torch.cuda.OutOfMemoryError: memory[name] = None
            run = None
        words = '\n'.join(f'   {k}: {"does not fit" if v is None else "not measured here" if not v else f"{v/2**20:,.0f} MiB"}' for k, v in memory.items())
        report.add(f'peak memory of a step, APS, {title}, batch {batch}', words, bytes=memory)


def _large_views(a, report):
    "What part of a step at 224 pixels the views take"
    source, size, batch = (48, 32, 8) if a.small else (256, 224, 256)
    data = images(pictures(batch*4, source))
    loader = ViewLoader(data.train, (alpha(size), beta(size)), batch, device=a.device)
    report.time(f'views alpha + beta, {source} px to {size} px, batch {batch}, on {a.device}', {'ViewLoader': lambda: [None for _ in loader.epoch(0)]}, (), 2*batch*4, 'views')
    shape = dict(width=48, depth=2, heads=3, patch=8) if a.small else dict(patch=16)
    torch.manual_seed(0)
    if a.small: methods = {'APS': APS(vit('small', size, **shape)), 'SCE': SCE(resnet('resnet18', size, width=16), 'imagenet', candidates=1024, hidden=64, out=32)}
    else: methods = {'APS, ViT-Small/16': APS(vit('small', size, **shape)), 'SCE, ResNet-50': SCE(resnet('resnet50', size), 'imagenet')}
    for name, method in methods.items():
        run = trainer(method, data, device=a.device, batch_size=batch)
        p = phases(report, f'{name}, {size} px, batch {batch}', run, 2 if a.small else 10, 2, False)
        share = p.share('load', 'views')
        report.add(f'share of loading and views in all: {name}, {size} px', f'   {100*share:.1f} %, target below 15 %', share=share, target=.15)


def _recipe(a, report, data, compile_it):
    "The whole recipe of SCE, kNN included: wall time and accuracy at the last epoch"
    from ssl_patch.probes import knn
    width, batch = (16, 64) if a.small else (a.width or 64, a.batch or 512)
    epochs = 2 if a.small else a.epochs
    begun = time.time()
    run = Pretrainer(sce_resnet(width), data, epochs=epochs, batch_size=batch, device=a.device, progress='lines', overlap='drop', out=a.out/time.strftime('sce_%Y%m%d_%H%M%S'))
    if compile_it: compiled(run)
    run.fit()
    trained = time.time() - begun
    record = knn(run.encoder, run.data, device=a.device, baselines=False)
    total = time.time() - begun
    report.add(f'SCE, {epochs} epochs, batch {batch}', f'   {total:.0f} s with kNN ({trained:.0f} s without), target 600 s; kNN top-1 {100*record.value:.2f} %',
               seconds=total, training_seconds=trained, epochs=epochs, batch=batch, compiled=compile_it, knn=record.value, target=600, history=run.history)


def gpu(a, report):
    "What a GPU is asked to show; see the targets in the output"
    if 'cuda' in a.device and not torch.cuda.is_available(): raise SystemExit(f'--device {a.device}: there is no GPU here')
    report.measure_machine()
    data = cifar(a, report)
    if a.small: a.no_compile = True # compiling takes minutes on a CPU
    compile_it = _sce(a, report, data)
    _aps(a, report, data)
    _large_views(a, report)
    if a.recipe: _recipe(a, report, data, compile_it)

"""How fast is ssl_patch on this machine, beside what one would otherwise take, and beside the machine's own limit?

    pip install -e '.[bench]'                 # kornia and lightly; without them their columns are left out
    python scripts/bench.py all               # everything that runs on a CPU; `make bench` does both
    python scripts/bench.py views --case 64:48:100 500:160:16 --recipes strong alpha+beta
    python scripts/bench.py sampler --grid 14 --draws 2 --batch 100
    python scripts/bench.py gpu --device cuda --data cifar10.npz --recipe
    python scripts/bench.py step --small      # any of them in seconds, to see that it runs

Contenders are timed in turn in one process: every round calls each once, in an order that rotates, after a warm-up. A ratio is taken within a
round; its median over the rounds is the result, the lowest and the highest are its spread. Each subcommand writes one JSON file into `--out`:
command, hardware, threads, versions, date, all seconds of all rounds, ratios, and what was left out. What rivals do differently is told in
scripts/rivals.py and in every record."""
import argparse, copy, importlib.metadata, json, subprocess, sys, tempfile, time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
import torch
import torch.nn.functional as F
import rivals
from rivals import have
from ssl_patch import speed
from ssl_patch.data import images
from ssl_patch.encoders import mlp, resnet, vit
from ssl_patch.losses import info_nce
from ssl_patch.methods import APS, SCE, Method, MoCoV2, MoCoV3, Training, all_pairs, build_method, step_cost
from ssl_patch.probes import hardware
from ssl_patch.towers import ema
from ssl_patch.training import Pretrainer, versions
from ssl_patch.views import ViewLoader, alpha, beta, make_view, resized_crop, strong, weak


# ---- what all subcommands share

class Report:
    "What one subcommand found: printed as it comes, written at the end"
    def __init__(self, name, a):
        words = [w for i, w in enumerate(sys.argv[1:]) if '--out' not in (w.split('=')[0], *sys.argv[i:i+1])]
        self.name, self.a, self.rounds, self.begun = name, a, a.rounds or (1 if a.small else a.usual), time.time()
        optional = {p: importlib.metadata.version(p) for p in ('kornia', 'lightly') if have(p)}
        self.found = dict(benchmark=name, command=' '.join(['python scripts/bench.py', *(Path(w).name for w in words)]), date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
                          hardware=hardware(a.device), threads=torch.get_num_threads(), versions=versions() | optional, small=a.small, rounds=self.rounds,
                          settings={k: v for k, v in vars(a).items() if isinstance(v, (int, float, str, list)) and k not in ('out', 'data')}, notes=[], left_out=[], checks=[], results=[])
        print(f'\n== {name}: {self.found["hardware"]}, torch {torch.__version__}, {self.rounds} rounds in turn', flush=True)

    def measure_machine(self):
        "What bounds are made of"
        self.rates = self.found['machine'] = speed.machine(self.a.device, .05 if self.a.small else .5)

    def lacks(self, package):
        "Whether an optional package is missing; if so that is said once"
        if have(package): return False
        if package not in self.found['left_out']: self.found['left_out'].append(package); print(f"   {package} is not installed: left out (pip install -e '.[bench]')")
        return True

    def note(self, *lines):
        self.found['notes'] += lines
        for line in lines: print(f'   ({line})')

    def check(self, what, difference, tolerance):
        "Something that must agree: a failed check ends the benchmark with status 1, after the record is written"
        ok = bool(difference <= tolerance)
        self.found['checks'].append(dict(what=what, difference=float(difference), tolerance=tolerance, ok=ok))
        print(f'   {"same" if ok else "NOT THE SAME"}: {what}, difference {difference:.1e}, tolerance {tolerance:g}', flush=True)

    def time(self, title, works, ratios=(), n=None, unit='images', **more):
        "Time `works` in turn; `ratios`: (slow names, fast names, target or None), the fastest of each is compared"
        t = speed.in_turn(works, self.rounds, self.a.device)
        rows = []
        for slow, fast, target in ratios:
            slow, fast = (min((k for k in names if k in works), key=t.median, default=None) for names in (slow, fast))
            if slow and fast: rows.append(dict(slow=slow, fast=fast, target=target, **dict(zip(('median', 'low', 'high'), t.ratio(slow, fast)))))
        self.found['results'].append(dict(title=title, n=n, unit=unit, **t.as_dict(), ratios=rows, **more))
        print(f'\n{title}\n{t.table(n, unit)}', flush=True)
        for r in rows: print(f'   {r["fast"]} is {r["median"]:.2f} times as fast as {r["slow"]} ({r["low"]:.2f} to {r["high"]:.2f})' + (f', target {r["target"]:g}' if r['target'] else ''), flush=True)
        return t

    def add(self, title, shown='', **more):
        self.found['results'].append(dict(title=title, **more))
        print(f'\n{title}\n{shown}', flush=True)

    def write(self):
        self.found['wall_seconds'] = time.time() - self.begun
        self.a.out.mkdir(parents=True, exist_ok=True)
        file = self.a.out/f'{self.name}.json'
        file.write_text(json.dumps(brief(self.found)) + '\n')
        print(f'\n   {self.found["wall_seconds"]:.0f} s; written: {file}', flush=True)
        return all(c['ok'] for c in self.found['checks'])


def brief(x):
    "The same with numbers of five digits"
    if isinstance(x, dict): return {k: brief(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [brief(v) for v in x]
    return float(f'{x:.5g}') if isinstance(x, float) else x


def smooth(n, side, seed=0):
    "Random pictures without noise from pixel to pixel, as photographs are: uint8 (n,3,side,side)"
    x = torch.rand(n, 3, max(2, side//8), max(2, side//8), generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(x, (side, side), mode='bilinear')*255).byte()


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def trainer(method, data, **kw):
    "A `Pretrainer` whose batches are trained one by one"
    run = Pretrainer(method, data, **dict(epochs=10_000, knn_every=0, progress='quiet', overlap='keep') | kw)
    run.begin(run.epochs)
    return run


def one_epoch(run, clock=[0]):
    "A function that trains one epoch more at each call, without what ends an epoch"
    def work():
        clock[0] += 1
        for views, _ in run.loader.epoch(clock[0]): run.train_batch(views)
    return work


# ---- views

RECIPES = dict(weak=(weak,), strong=(strong,), alpha=(alpha,), beta=(beta,)) | {'alpha+beta': (alpha, beta)}

def views(a, report):
    "Views alone: uint8 images in memory in, float views out"
    report.note('torchvision uint8 rounds to 8 bits after every step; torchvision float does the same arithmetic as ours',
                'kornia crops without antialiasing, shares one order of the colour changes in a batch, and is handed floats whose conversion is not counted',
                'lightly (strong only) works on PIL images, 8-bit, and blurs with three box filters; its normalisation is switched off',
                'DataLoader: one pass over the images with collation, workers alive and warm; make_view: tensors as they lie; ViewLoader: shuffled batches')
    for case in a.case:
        source, size, batch = case
        passes = a.batches or (1 if a.small else 2)
        n = batch*passes
        x = smooth(n, source)
        floats = x/255
        for name in a.recipes:
            rs = [r(size) for r in RECIPES[name]]
            loader, loaders = ViewLoader(x, rs, batch), {}
            works = {'make_view': lambda: [make_view(b, r) for b in x.split(batch) for r in rs],
                     'ViewLoader': lambda: [None for _ in loader.epoch(0)]}
            for how, first in (('uint8', False), ('float', True)):
                ts = [rivals.torchvision_view(r, first) for r in rs]
                works[f'torchvision {how}'] = lambda ts=ts: [torch.stack([t(im) for im in b]) for b in x.split(batch) for t in ts]
            data = rivals.Views(x, [rivals.torchvision_view(r, False) for r in rs])
            for w in a.workers: loaders[f'torchvision uint8, DataLoader, {w} workers'] = rivals.data_loader(data, batch, w)
            if not report.lacks('kornia'):
                for mode in ('slice', 'resample'):
                    ks = [rivals.kornia_view(r, mode) for r in rs]
                    works[f'kornia, {mode}'] = lambda ks=ks: [k(b) for b in floats.split(batch) for k in ks]
            if name == 'strong' and not report.lacks('lightly'):
                for w in a.workers: loaders[f'lightly, DataLoader, {w} workers'] = rivals.data_loader(rivals.Pictures(x, rivals.lightly_views(rs[0], one=True)), batch, w)
            works |= {k: lambda l=l: [None for _ in l] for k, l in loaders.items()}
            tv = [k for k in works if k.startswith('torchvision')]
            bare, loading = [k for k in tv if 'Loader' not in k], [k for k in tv if 'Loader' in k]
            of = lambda p, names=tuple(works): [k for k in names if k.startswith(p)]
            report.time(f'{name}, {source} px to {size} px, batch {batch}', works, [
                (tv, ['make_view', 'ViewLoader'], 4 if size <= 32 else 2), (bare, ['make_view'], None), (loading, ['ViewLoader'], None),
                (of('kornia'), ['make_view'], 2), (of('lightly'), ['ViewLoader'], None)], n*len(rs), 'views', source=source, size=size, batch=batch, recipe=name)
            del works, loaders # and with them their worker processes


# ---- the sampler

def sampler(a, report):
    "Asymmetric patch sampling of a batch, beside a plain loop over images and boxes; one core each, since the loop cannot use more"
    import numpy as np
    from ssl_patch.patches import asymmetric_patches, covered_fraction, keep_mask
    threads, report.found['threads'] = torch.get_num_threads(), 1
    torch.set_num_threads(1)
    rng, k, batch = np.random.default_rng(0), max(1, a.grid**2//4), a.batch or (16 if a.small else 256)
    (box1, flip1), (box2, flip2) = (rivals.crops(batch, rng) for _ in range(2))
    on = lambda v, **kw: torch.tensor(np.array(v), device=a.device, **kw)
    boxes, flips = [on(box1, dtype=torch.float32), on(box2, dtype=torch.float32)], dict(flip1=on(flip1), flip2=on(flip2))
    ours = lambda: asymmetric_patches(*boxes, a.grid, draws=a.draws, **flips)
    plain = lambda: [rivals.plain_pair(box1[i], box2[i], flip1[i], flip2[i], a.grid, k, a.draws, 3., rng) for i in range(batch)]
    keep1, keep2, free = (on(v) for v in zip(*plain()))
    cover = lambda keep: covered_fraction(keep_mask(keep, a.grid), *boxes, **flips).flatten(2)
    report.check('fraction of each patch that is new, loop and closed form', (1 - cover(keep1).double() - free).abs().max(), 1e-4)
    new = lambda keep1, keep2: (1 - cover(keep1)).gather(2, keep2).mean().item()
    one, other = new(keep1, keep2), new(*ours())
    report.check(f'mean of that fraction among the patches kept of view 2 (loop {one:.3f}, batched {other:.3f})', abs(one - other), .02 if batch*a.draws >= 500 else .1)
    t = report.time(f'{batch} pairs of views, grid {a.grid} x {a.grid}, {a.draws} draws of {k} patches, power 3, one core each',
                    {'asymmetric_patches': ours, 'loop over images and boxes': plain},
                    [(['loop over images and boxes'], ['asymmetric_patches'], 30)], batch, 'pairs', grid=a.grid, draws=a.draws, batch=batch)
    torch.set_num_threads(threads)
    if a.least:
        got = t.ratio('loop over images and boxes', 'asymmetric_patches')[0]
        report.check(f'speed, {got:.1f} times the loop, beside the {a.least:g} asked for: what is missing', max(0., a.least - got), 0)


# ---- a training step

def bounds(report, title, method, views, keeps, seconds, bf16):
    "The measured step beside the arithmetic that it cannot avoid"
    work = speed.step_work(method, views, keeps)
    least = speed.bound(work, report.rates, bf16)
    total = least['arithmetic'] + least['optimiser'] + least['ema']
    shown = ', '.join(f'{k} {v*1e3:.1f} ms' for k, v in least.items() if k != 'arithmetic')
    report.add(f'{title}: bound', f'   at least {total*1e3:.1f} ms ({shown}); taken {seconds*1e3:.1f} ms, {seconds/total:.2f} times',
               work=work, bound=least, bf16=bf16, seconds=seconds, over_bound=seconds/total)


def _aps_step(a, report):
    batch = a.batch or (8 if a.small else 64)
    shape = dict(name='tiny', size=32, patch=2) | ({'width': a.width} if a.width else {}) | ({'depth': a.depth} if a.depth else {})
    if a.small: shape |= dict(width=a.width or 48, depth=a.depth or 2)
    x = smooth(batch, 32)
    def ours(bf16): return trainer(seeded(lambda: APS(vit(**shape), draws=1)), images(x), batch_size=batch, bf16=bf16, lr=1e-4)
    exact, chosen = ours(False), ours(None)
    views = next(iter(exact.loader.epoch(0)))[0]
    keeps, net = exact.method.samples(views, torch.Generator().manual_seed(0))[0], exact.encoder.net
    def plain():
        model = rivals.PlainAPS(32, 2, net.embed_dim, len(net.blocks), net.blocks[0].attn.num_heads).start_as(exact.method).train()
        return model, torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=.05)
    (m1, o1), (m2, o2) = plain(), plain()
    args = (views[0].x, views[1].x, *keeps)
    with torch.no_grad(): report.check('loss of our APS and of the plain one, same weights, float32', (exact.method(views, keeps)[0] - m1(*args)).abs().item(), 1e-4)
    best = f'ssl_patch as chosen here ({"bf16, explicit attention" if chosen.bf16 else "float32"})'
    works = {best: lambda: chosen.train_batch(views), 'ssl_patch float32': lambda: exact.train_batch(views),
             'plain float32': lambda: rivals.train_step(m1, o1, *args), 'plain, autocast to bf16': lambda: rivals.train_step(m2, o2, *args, amp=True)}
    title = f'APS step, ViT {net.embed_dim} wide, {len(net.blocks)} blocks, patch 2, 32 px, batch {batch}, {keeps[0].shape[1]} of 256 tokens'
    t = report.time(title, works, [(['plain float32'], [best], 1.8), (['plain float32'], ['ssl_patch float32'], None), (['plain, autocast to bf16'], [best], None)], batch)
    for run, name in ((chosen, best), (exact, 'ssl_patch float32')): bounds(report, f'{title}, {name}', run.method, views, keeps, t.median(name), run.bf16)


def moco(width=64, size=32, queue=4096, stem='small'):
    "MoCo v2 as lightly's documentation has it, in our slots: plain batch-norm, a head of two layers, tau 0.1, EMA 0.99"
    head = mlp(8*width, 8*width, 128, norm=False, last_norm=False, bias=True)
    recipe = Training(optimizer='sgd', base_lr=.06, weight_decay=5e-4)
    return Method(resnet('resnet18', size, stem, width), (strong(size),)*2, target=ema(.99), candidates=queue, objective=partial(info_nce, tau=.1), heads=(head, None),
                  pairs=((0, 1),), training=recipe, name='MoCo v2, plain batch-norm')


def lightly_moco(method):
    "lightly's MoCo on the same network, weights and queue; the optimiser of its example"
    width, queue = method.encoder.dim//8, method.queue.size
    net = rivals.plain_resnet18(width, method.encoder.spec['stem'])
    model = rivals.LightlyMoCo(net, 8*width, queue=queue).start_as(method).train()
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=.9, weight_decay=5e-4)


def _moco_step(a, report):
    batch, width, queue = a.batch or (16 if a.small else 128), a.width or (16 if a.small else 64), 256 if a.small else 4096
    data = images(smooth(batch, 32))
    def ours(bf16, method=None): return trainer(method or seeded(lambda: moco(width, queue=queue)), data, batch_size=batch, bf16=bf16, lr=1e-3)
    exact, chosen = ours(False), ours(None)
    published = ours(None, seeded(lambda: MoCoV2(resnet('resnet18', 32, width=width), 'cifar', candidates=queue)))
    views = next(iter(exact.loader.epoch(0)))[0]
    args = [v.x for v in views]
    best = f'ssl_patch as chosen here ({"bf16" if chosen.bf16 else "float32"}, channels last)'
    works = {best: lambda: chosen.train_batch(views), 'ssl_patch float32': lambda: exact.train_batch(views), 'ssl_patch, published split batch-norm': lambda: published.train_batch(views)}
    if not report.lacks('lightly'):
        (m1, o1), (m2, o2) = lightly_moco(exact.method), lightly_moco(exact.method)
        with torch.no_grad(): report.check("loss of our MoCo and of lightly's, same weights and queue, float32", (exact.method(views)[0] - m1(*args)).abs().item(), 1e-4)
        works |= {'lightly float32': lambda: rivals.train_step(m1, o1, *args), 'lightly, autocast to bf16': lambda: rivals.train_step(m2, o2, *args, amp=True)}
    title = f'MoCo v2 step, ResNet-18 with {width} channels, small stem, batch {batch}, queue of {queue}'
    t = report.time(title, works, [(['lightly float32'], [best], None), (['lightly float32'], ['ssl_patch float32'], None), (['lightly, autocast to bf16'], [best], None)], batch)
    for run, name in ((chosen, best), (exact, 'ssl_patch float32')): bounds(report, f'{title}, {name}', run.method, views, None, t.median(name), run.bf16)


def step(a, report):
    "One training step, views made already: forward, backward, optimiser, moving average, queue"
    report.note('the rivals are given the kept patches; ours draws them, and its bookkeeping counts',
                "lightly's MoCo has plain batch-norm and no shuffled keys; so has ours here, and the published form stands beside it")
    report.measure_machine()
    if a.only in (None, 'aps'): _aps_step(a, report)
    if a.only in (None, 'moco'): _moco_step(a, report)


# ---- a whole epoch

def jpegs(folder, n, side, seed=0):
    "A folder of `n` JPEG files in two classes, about `side` pixels"
    from PIL import Image
    for i, x in enumerate(smooth(n, side, seed)):
        (folder/f'class{i % 2}').mkdir(exist_ok=True)
        noisy = (x.float() + 8*torch.randn(x.shape)).clamp(0, 255).byte() # as many bytes as photographs have
        Image.fromarray(noisy.permute(1, 2, 0).numpy()).save(folder/f'class{i % 2}'/f'{i:05}.jpg', quality=90)


def phases(report, title, run, batches, warmup, epoch=True, **more):
    p = speed.profile(run, batches, warmup, epoch, report.rates)
    report.add(f'{title}: phases', p, profile=p.as_dict(), **more)
    return p


def epoch(a, report):
    "Whole epochs: by phase, and beside lightly with its own transforms and DataLoader on the same images"
    report.measure_machine()
    batches, warmup = (2, 1) if a.small else (a.batches or 5, 2)
    width, batch = a.width or (16 if a.small else 32), a.batch or (16 if a.small else 64)
    n = batch*(batches + warmup)
    data = images('photos') if a.photos else images(smooth(n, 32))
    small = dict(width=48, depth=2, heads=3) if a.small else {}
    made = {'APS, ViT-Tiny/2': lambda: APS(vit('tiny', 32, 2, **small)), 'MoCo v3, ViT-Tiny/4': lambda: MoCoV3(vit('tiny', 32, 4, 'moco_v3', **small), **(dict(hidden=64, out=32) if a.small else {})),
            'MoCo v2, ResNet-18': lambda: MoCoV2(resnet('resnet18', 32, width=width)), 'SCE, ResNet-18': lambda: SCE(resnet('resnet18', 32, width=width))}
    for name, make in made.items():
        phases(report, f'{name}{f" of {width} channels" if "ResNet" in name else ""}, 32 px, batch {batch}', trainer(seeded(make), data, batch_size=batch, lr=1e-4), batches, warmup)
    with tempfile.TemporaryDirectory() as folder:
        n, side, size = (64, 96, 48) if a.small else (a.files, 256, 96)
        jpegs(Path(folder), n, side)
        stream = images(Path(folder), stream=True)
        wide = 16 if a.small else 64
        for source, x, size, stem, net in (('memory', smooth(batch*4, 32), 32, 'small', width), (f'{n} JPEG files of {side} px', stream, size, 'imagenet', wide)):
            _beside_lightly(a, report, source, x, size, stem, net, batch if size == 32 or a.small else 64, folder)


def _beside_lightly(a, report, source, x, size, stem, width, batch, folder):
    data = x if hasattr(x, 'train') else images(x)
    n = len(data.train)//batch*batch
    make = lambda bf16: trainer(seeded(lambda: moco(width, size, 256 if a.small else 4096, stem)), data, batch_size=batch, bf16=bf16, lr=1e-3, workers=2)
    chosen, exact = make(None), make(False)
    best = f'ssl_patch as chosen here ({"bf16" if chosen.bf16 else "float32"})'
    works = {best: one_epoch(chosen), 'ssl_patch float32': one_epoch(exact)}
    if not report.lacks('lightly'):
        view = rivals.lightly_views(strong(size))
        from torchvision.datasets import ImageFolder
        pictures = rivals.Unlabelled(ImageFolder(folder, view)) if hasattr(x, 'train') else rivals.Pictures(x, view)
        for w in ((2,) if hasattr(x, 'train') else a.workers):
            for kind in ('float32', 'autocast to bf16'):
                def work(loader=rivals.data_loader(pictures, batch, w), pair=lightly_moco(exact.method), amp=kind != 'float32'):
                    for x1, x2 in loader: rivals.train_step(*pair, x1, x2, amp=amp)
                works[f'lightly {kind}, {w} workers'] = work
    plain, amp = ([k for k in works if k.startswith(f'lightly {kind}')] for kind in ('float32', 'autocast'))
    report.time(f'epoch of MoCo v2, ResNet-18 of {width} channels, {size} px, batch {batch}, {source}', works,
                [(plain, [best], None), (amp, [best], None), (plain, ['ssl_patch float32'], None)], n)
    if hasattr(x, 'train'): phases(report, f'MoCo v2, ResNet-18, {size} px, {source}, 2 workers', chosen, 3*(n//batch) if not a.small else n//batch, 1)


# ---- import

def imports(a, report):
    "Importing, each time in a fresh process: seconds beyond those of torch itself"
    inside = {}
    def fresh(module):
        code = f'import time, torch; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)'
        def work():
            done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
            inside.setdefault(module, []).append(float(done.stdout.split()[-1]))
        return work
    modules = ['ssl_patch.all', 'ssl_patch.losses', 'torchvision', 'timm'] + [m for m in ('kornia.augmentation', 'lightly.loss') if not report.lacks(m.split('.')[0])]
    if a.small: modules = modules[:1]
    t = report.time('import in a fresh process, with torch', {'torch alone': fresh('torch')} | {m: fresh(m) for m in modules})
    beyond = {m: s[1:] for m, s in inside.items()} # the first was the warm-up
    middle = speed.Timings(beyond)
    report.add('import beyond torch', '\n'.join(f'   {m:16} {middle.median(m):.3f} s ({min(s):.3f} to {max(s):.3f})' + (', target below 0.5' if m == 'ssl_patch.all' else '')
               for m, s in beyond.items() if m != 'torch'), seconds=beyond, median={m: middle.median(m) for m in beyond}, target=.5)
    return t


# ---- how cost grows

def stepping(method, views):
    "A function that does a forward and a backward pass and tells the bytes kept for the latter"
    method.train()
    size = step_cost(method, views)['bytes']
    keeps = method.samples(views, torch.Generator(views[0].x.device).manual_seed(0))[0]
    def work():
        method.zero_grad()
        method(views, keeps)[0].backward()
        return size
    return work


def growth(a, report):
    "How time and kept memory grow with image size, tokens, batch, queue and views"
    few = lambda *v: list(v[:2]) if a.small else list(v)
    net = dict(width=48, depth=2, heads=3) if a.small else dict(depth=4)
    batch = 4 if a.small else 16
    def made(method, n=batch, side=None): return [make_view(smooth(n, side or r.size), r, torch.Generator().manual_seed(i)) for i, r in enumerate(method.views)]
    def making(side):
        x, r = smooth(batch, side), strong(side)
        return lambda: make_view(x, r) and None
    def sized(side):
        m = MoCoV2(resnet('resnet18', side, 'small', width=16), 'cifar', candidates=256, target=ema(.99))
        return stepping(m, made(m, 16))
    def tokens(k):
        m = APS(vit('tiny', 32, 2, **net), ratio=k/256, draws=1)
        return stepping(m, made(m))
    def batches(n):
        m = APS(vit('tiny', 32, 2, **net), draws=1)
        return stepping(m, made(m, n))
    def queue(K):
        q, k, old = (F.normalize(torch.randn(n, 128), dim=1) for n in (128, 128, K))
        q.requires_grad_()
        kept = {}
        def note(t): kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): loss = info_nce(q, k, old, tau=.1)
        for t in (q, k, old): kept.pop(t.untyped_storage().data_ptr(), None)
        del loss
        def work():
            info_nce(q, k, old, tau=.1).backward()
            return sum(kept.values())
        return work
    def views_(n):
        m = MoCoV3(vit('tiny', 32, 4, 'moco_v3', **net), hidden=256, views=(alpha(32),)*n, pairs=all_pairs(2, n))
        return stepping(m, made(m))
    kinds = {'views: image side, pixels': (making, few(32, 64, 128, 256)), 'ResNet-18 of 16 channels, step: image side, pixels': (sized, few(16, 32, 64, 128)),
             'ViT, step: tokens kept': (tokens, few(16, 32, 64, 128, 256)), 'APS, step: batch': (batches, few(8, 16, 32, 64)),
             'InfoNCE of 128 queries: keys in the queue': (queue, few(1024, 4096, 16384, 65536)), 'MoCo v3, step: views': (views_, few(2, 3, 4, 6))}
    for title, (make, values) in kinds.items():
        g = speed.growth(partial(seeded_value, make), values, rounds=1 if a.small else 3)
        report.add(title, g, growth=g.as_dict())


def seeded_value(make, value): return seeded(lambda: make(value))


# ---- memory of each method

def memory(a, report):
    "What each method keeps for the backward pass, and what it holds between steps; counted, so that it does not depend on the device"
    batch = a.batch or (16 if a.small else 64)
    report.note(f'32 px, batch {batch}, float32; every method with its setting for CIFAR, queues as for 50,000 images')
    small = dict(width=48, depth=2, heads=3) if a.small else {}
    conv = lambda: resnet('resnet18', 32, width=a.width or (16 if a.small else 64))
    makers = {'APS, all tokens': lambda: APS(vit('tiny', 32, 2, **small), patches=None), 'APS': lambda: APS(vit('tiny', 32, 2, **small)),
              'MoCo v3': lambda: MoCoV3(vit('tiny', 32, 2, 'moco_v3', **small)), 'local to global': lambda: build_method('local_to_global', vit('tiny', 32, 2, **small))}
    makers |= {n: lambda n=n: build_method(n, conv()) for n in ('moco_v1', 'moco_v2', 'ressl', 'co2', 'sce', 'densecl', 'repco')}
    rows = {}
    for name, make in makers.items():
        m = seeded(make).train()
        m.fit_to(50_000, batch)
        views = [make_view(smooth(batch, 32), r, torch.Generator().manual_seed(i)) for i, r in enumerate(m.views)]
        n, size = sum(p.numel() for p in m.parameters() if p.requires_grad), lambda it: sum(4*t.numel() for t in it)
        rows[name] = dict(network='ViT-Tiny/2' if hasattr(m.encoder, 'explicit_attention') else 'ResNet-18', kept=step_cost(m, views)['bytes'], weights=4*n, gradients=4*n,
                          optimiser=4*n*(2 if m.training_recipe.optimizer == 'adamw' else 1), ema=size(m.target.net.parameters()) if m.target else 0, queue=size(q.keys for q in m.queues()))
        print(f'   {name:16} {rows[name]["network"]:10} ' + '  '.join(f'{k} {v/2**20:,.1f}' for k, v in rows[name].items() if k != 'network') + ' MiB', flush=True)
        del m, views
    report.add(f'memory, batch {batch}', rows=rows, batch=batch)


# ---- fast paths on and off

def apart(x, y):
    "The length of the difference between two tensors, or lists of them, over the length of the second; the largest such share"
    xs, ys = ([v] if torch.is_tensor(v) else list(v) for v in (x, y))
    return max(((p - q).norm()/q.norm().clamp(min=1e-12)).item() for p, q in zip(xs, ys))


def paths(a, report):
    "Every fast path against the plain way: the results must be the same within a tolerance, and the ratio says what it is worth"
    for path in (_crop_paths, _colour_paths, _attention_paths, _layout_paths, _update_paths, _token_paths): path(a, report)


def _pair(report, title, fast, slow, tolerance, n=None, **kinds):
    "One path: `fast` and `slow` are functions; their results are compared where a tolerance is given"
    if tolerance: report.check(title, apart(fast(), slow()), tolerance)
    report.time(title, {'fast': fast, 'plain': slow}, [(['plain'], ['fast'], None)], n, **kinds)


def _crop_paths(a, report):
    import torchvision.transforms.v2.functional as TF
    from ssl_patch.views import draw_boxes
    for source, size, batch in ((32, 32, 8), (64, 32, 4)) if a.small else ((32, 32, 256), (256, 224, 32)):
        x, g = smooth(batch, source), torch.Generator().manual_seed(0)
        box, flip = draw_boxes(weak(size), (source, source), g, batch)
        def per_image():
            out = [TF.resized_crop(i.float()/255, *map(int, b), (size, size), antialias=True) for i, b in zip(x, box.tolist())]
            return torch.stack([v.flip(-1) if f else v for v, f in zip(out, flip)])
        crop = lambda route: lambda: resized_crop(x, box, size, flip, route)
        where = f'{source} px to {size} px, batch {batch}'
        _pair(report, f'crop: the route chosen here, and torchvision image by image, {where}', crop('auto'), per_image, 1e-4, batch)
        _pair(report, f'crop: the route chosen here, and matrix products, {where}', crop('auto'), crop('matrix'), 1e-4, batch)


def _colour_paths(a, report):
    import torchvision.transforms.v2.functional as TF
    from ssl_patch.views import color_jitter, draw_changes, gaussian_blur
    size, batch = (32, 8) if a.small else (96, 64)
    x, r, g = smooth(batch, size)/255, strong(size), torch.Generator().manual_seed(0)
    c = draw_changes(r, batch, g)
    steps = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    def jitter():
        out = []
        for i, f, order in zip(x, c.factors.tolist(), c.order.tolist()):
            for k in order: i = steps[k](i, f[k])
            out.append(i)
        return torch.stack(out)
    _pair(report, f'colour jitter: batched, and torchvision image by image, {size} px, batch {batch}', lambda: color_jitter(x, c.factors, c.order), jitter, 1e-3, batch)
    blur = lambda: torch.stack([TF.gaussian_blur(i, [r.kernel]*2, [s]*2) for i, s in zip(x, c.sigma.tolist())])
    _pair(report, f'blur: batched, and torchvision image by image, {size} px, batch {batch}', lambda: gaussian_blur(x, r.kernel, c.sigma), blur, 1e-4, batch)


def gradients(method, views, keeps, bf16=False):
    "Loss and gradients of one step, as a list"
    method.zero_grad()
    with torch.autocast(views[0].x.device.type, torch.bfloat16, enabled=bf16): loss = method(views, keeps)[0]
    loss.backward()
    return [loss.detach(), torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])]


def _aps_small(a, batch):
    m = seeded(lambda: APS(vit('tiny', 32, 2, **(dict(width=48, depth=2, heads=3) if a.small else dict(depth=4))), draws=1)).train()
    views = [make_view(smooth(batch, 32), r, torch.Generator().manual_seed(i)) for i, r in enumerate(m.views)]
    return m, views, m.samples(views, torch.Generator().manual_seed(0))[0]


def _attention_paths(a, report):
    batch = 8 if a.small else 32
    m, views, keeps = _aps_small(a, batch)
    def run(explicit, bf16):
        def work():
            m.encoder.explicit_attention(explicit)
            return gradients(m, views, keeps, bf16)
        return work
    for bf16 in (False, True):
        _pair(report, f'attention: explicit, and the fused kernel, {"bf16" if bf16 else "float32"}, batch {batch}', run(True, bf16), run(False, bf16), None if bf16 else 1e-3, batch)
    (exact, g), (loss, g1), (_, g2) = run(False, False)(), run(True, True)(), run(False, True)()
    report.check('loss in bf16 and in float32, APS', apart(loss, exact), .05)
    report.check("bf16's distance from the float32 gradient, explicit attention over the fused kernel", ((g1-g).norm()/(g2-g).norm()).item(), 1.5)
    _pair(report, f'arithmetic: bf16 with explicit attention, and float32 with the fused kernel, APS, batch {batch}', run(True, True), run(False, False), None, batch)


def _layout_paths(a, report):
    batch = 8 if a.small else 32
    make = lambda: moco(16 if a.small else 64, queue=256).train()
    rows, last = seeded(make), seeded(make)
    for m in (rows, last): m.target.start = m.target.end = 1. # the same keys at every call
    last.encoder.to(memory_format=torch.channels_last); last.target.net.to(memory_format=torch.channels_last)
    views = [make_view(smooth(batch, 32), r, torch.Generator().manual_seed(i)) for i, r in enumerate(rows.views)]
    run = lambda m, bf16=False: lambda: gradients(m, views, None, bf16)
    def exact(m): # in float32 rounding grows through 18 layers of batch-norm
        net = copy.deepcopy(m.encoder).double()
        f = net(views[0].x.double()).image
        f.square().sum().backward()
        return [f.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])]
    report.check('channels last, and rows, float64: features and gradients of the encoder', apart(exact(last), exact(rows)), 1e-9)
    _pair(report, f'memory: channels last, and rows, float32, MoCo v2, batch {batch}', run(last), run(rows), None, batch)
    _pair(report, f'memory: channels last, and rows, bf16, MoCo v2, batch {batch}', run(last, True), run(rows, True), None, batch)
    report.check('loss in bf16 and in float32, MoCo v2', apart(run(last, True)()[0], run(rows)()[0]), .05)
    _pair(report, f'arithmetic: bf16, and float32, channels last, MoCo v2, batch {batch}', run(last, True), run(last), None, batch)


def _update_paths(a, report):
    from ssl_patch.towers import EMA
    net = seeded(lambda: vit('tiny', 32, 2, **(dict(width=48, depth=2, heads=3) if a.small else {})))
    net.net.requires_grad_(True)
    slow, fast = (seeded(lambda: vit('tiny', 32, 2, **(dict(width=48, depth=2, heads=3) if a.small else {}))) for _ in 'ab')
    for p, q in zip(slow.parameters(), fast.parameters()): p.grad = torch.randn_like(p)*1e-2; q.grad = p.grad.clone()
    o_slow, o_fast = torch.optim.AdamW(slow.parameters(), 1e-3, foreach=False), torch.optim.AdamW(fast.parameters(), 1e-3, fused=True)
    def stepped(net, o):
        def work():
            o.step()
            return torch.cat([p.detach().flatten() for p in net.parameters()]) if checking else None
        return work
    checking = True
    report.check('weights after two steps of AdamW, fused and one by one', max(apart(stepped(fast, o_fast)(), stepped(slow, o_slow)()) for _ in '12'), 1e-5)
    checking = False
    _pair(report, 'AdamW: fused, and weight by weight', stepped(fast, o_fast), stepped(slow, o_slow), None)
    e1, e2 = EMA(slow, .9), EMA(slow, .9)
    def one_by_one():
        with torch.no_grad():
            for p, q in zip(e2.net.parameters(), net.parameters()): p.mul_(.9).add_(q, alpha=.1)
    e1.end = .9
    e1.update(net); one_by_one()
    report.check('EMA: one call, and weight by weight', apart(list(p.detach() for p in e1.net.parameters()), list(p.detach() for p in e2.net.parameters())), 1e-5)
    _pair(report, 'EMA: one call, and weight by weight', lambda: e1.update(net), one_by_one, None)


def _token_paths(a, report):
    batch = 8 if a.small else 32
    m, views, keeps = _aps_small(a, batch)
    net = m.encoder.net
    plain = rivals.PlainAPS(32, 2, net.embed_dim, len(net.blocks), net.blocks[0].attn.num_heads).start_as(m).train()
    def theirs():
        plain.zero_grad()
        loss = plain(*[v.x for v in views], *keeps)
        loss.backward()
        return [loss.detach()]
    m.encoder.explicit_attention(False)
    _pair(report, f'tokens: chosen as early as we can, and gathered from all embedded ones, batch {batch}', lambda: gradients(m, views, keeps)[:1], theirs, 1e-4, batch)
    full = lambda: gradients(m, views, None)
    _pair(report, f'tokens: a quarter, and all of them (not the same result), batch {batch}', lambda: gradients(m, views, keeps), full, None, batch)
    from torch.nn.functional import cross_entropy
    for K in (512,) if a.small else (4096, 65536):
        q, k, queue = seeded(lambda: [F.normalize(torch.randn(n, 128), dim=1) for n in (256, 256, K)])
        q.requires_grad_()
        def ask(loss):
            def work():
                q.grad = None
                loss().backward()
                return q.grad
            return work
        def joined(): return cross_entropy(torch.cat([(q*k).sum(1, keepdim=True), q @ queue.clone().T], 1)/.1, torch.zeros(len(q), dtype=torch.long))
        _pair(report, f'loss with a queue of {K}: ours, and with joined logits and a copied queue', ask(lambda: info_nce(q, k, queue, tau=.1)), ask(joined), 1e-4)


# ---- the command

def gpu(a, report):
    from bench_gpu import gpu
    gpu(a, report)


COMMANDS = {'views': (views, 5), 'sampler': (sampler, 7), 'step': (step, 5), 'epoch': (epoch, 3), 'import': (imports, 3), 'growth': (growth, 3), 'memory': (memory, 1), 'paths': (paths, 5), 'gpu': (gpu, 3)}

def case(text):
    "SOURCE:SIZE:BATCH"
    try: source, size, batch = map(int, text.split(':'))
    except ValueError: raise argparse.ArgumentTypeError(f'{text!r}: give SOURCE:SIZE:BATCH, three whole numbers, e.g. 256:224:32') from None
    if min(source, size, batch) < 1: raise argparse.ArgumentTypeError(f'{text!r}: all three must be at least 1')
    return [source, size, batch]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=[*COMMANDS, 'all'], help='all: everything but gpu; with --small, gpu too')
    p.add_argument('--out', type=Path, default=Path('runs/speed'), help='folder for the records, one file a subcommand')
    p.add_argument('--small', action='store_true', help='small shapes and one round: whether it runs, not how fast')
    p.add_argument('--threads', type=int, help='of torch; default: as torch chooses')
    p.add_argument('--rounds', type=int, help='timed calls of each contender')
    p.add_argument('--device', default='cpu', help='of sampler and gpu')
    p.add_argument('--batch', type=int, help='images in a batch, of sampler, step, epoch and gpu')
    p.add_argument('--width', type=int, help='of the network, of step and epoch: channels of a ResNet, vectors of a ViT')
    p.add_argument('--batches', type=int, help='batches in a pass, of views and epoch')
    p.add_argument('--workers', type=int, nargs='+', help='of the DataLoaders, of views and epoch: the best is taken and named')
    g = p.add_argument_group('views')
    g.add_argument('--case', type=case, nargs='+', metavar='SOURCE:SIZE:BATCH', help='pixels of the images, of the views, images in a batch')
    g.add_argument('--recipes', nargs='+', choices=RECIPES, default=list(RECIPES))
    g = p.add_argument_group('sampler')
    g.add_argument('--grid', type=int, default=16, help='patches per side')
    g.add_argument('--draws', type=int, default=4)
    g.add_argument('--least', type=float, help='exit with status 1 if the median ratio is below this')
    g = p.add_argument_group('step')
    g.add_argument('--only', choices=['aps', 'moco'])
    g.add_argument('--depth', type=int, help='blocks of the ViT')
    g = p.add_argument_group('epoch')
    g.add_argument('--photos', action='store_true', help="the library's photographs instead of random pictures")
    g.add_argument('--files', type=int, default=256, help='JPEG files')
    g = p.add_argument_group('gpu')
    g.add_argument('--data', type=Path, help='.npz with the images of CIFAR-10; default: random ones of that shape')
    g.add_argument('--recipe', action='store_true', help='also train SCE for 200 epochs with kNN, and record the wall time')
    g.add_argument('--epochs', type=int, default=200, help='of --recipe')
    g.add_argument('--no-compile', action='store_true', help='leave torch.compile out')
    a = p.parse_args()
    a.case = a.case or ([[40, 32, 8]] if a.small else [[32, 32, 256], [96, 64, 128], [256, 224, 32], [400, 224, 32]])
    a.workers = a.workers or ([0] if a.small else [0, 1, 2])
    for name in ('threads', 'rounds', 'batch', 'width', 'batches', 'grid', 'draws', 'depth', 'files', 'epochs'):
        if (v := getattr(a, name)) is not None and v < 1: p.error(f'--{name} must be at least 1, got {v}')
    if a.what not in ('gpu', 'sampler') and a.device != 'cpu': p.error(f'--device is for gpu and sampler, not for {a.what}')
    return a


def main():
    a = arguments()
    if a.what == 'all' and not a.small: # a process each, so that none finds the caches of another
        words = [w for w in sys.argv[1:] if w != 'all']
        return int(any([subprocess.run([sys.executable, __file__, name, *words]).returncode for name in COMMANDS if name != 'gpu']))
    if a.threads: torch.set_num_threads(a.threads)
    ok = True
    for name in COMMANDS if a.what == 'all' else [a.what]:
        work, a.usual = COMMANDS[name]
        report = Report(name, a)
        work(a, report)
        ok = report.write() and ok
    return 0 if ok else 1


if __name__ == '__main__': sys.exit(main())

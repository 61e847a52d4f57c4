"What all benchmarks share: a report that is printed as it comes and kept, and how runs are made."

import importlib.metadata
import importlib.util
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F

from ssl_patch.evaluation.records import hardware
from ssl_patch.reports.profile import profile_run
from ssl_patch.reports.timing import in_turn, machine_rates, step_work, time_bound
from ssl_patch.training.checkpoint import begin_run, versions
from ssl_patch.training.pretrain import Pretrainer


def have(package):
    return importlib.util.find_spec(package) is not None


def short(x):
    "The same with numbers of five digits."
    if isinstance(x, dict):
        return {k: short(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [short(v) for v in x]
    return float(f'{x:.5g}') if isinstance(x, float) else x


def command_line():
    "The command that is running, without its --out, and of paths the last part."
    words = sys.argv[1:]
    told = lambda i: '--out' not in (words[i].split('=')[0], *words[max(0, i - 1) : i])
    kept = [Path(w).name for i, w in enumerate(words) if told(i)]
    return ' '.join(['python scripts/bench.py', *kept])


class Report:
    "What one benchmark found: printed as it comes, written at the end as a line of a file."

    def __init__(self, name, a):
        self.name, self.a, self.begun = name, a, time.time()
        self.rounds = a.rounds or (1 if a.small else a.usual)
        packages = [p for p in ('kornia', 'lightly') if have(p)]
        plain = (int, float, str, list)
        settings = {k: v for k, v in vars(a).items() if isinstance(v, plain) and k != 'data'}
        self.found = dict(
            benchmark=name,
            command=command_line(),
            date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
            hardware=hardware(a.device),
            threads=torch.get_num_threads(),
            versions=versions() | {p: importlib.metadata.version(p) for p in packages},
            small=a.small,
            rounds=self.rounds,
            settings=settings,
            notes=[],
            left_out=[],
            checks=[],
            results=[],
        )
        where = f'{self.found["hardware"]}, torch {torch.__version__}'
        print(f'\n== {name}: {where}, {self.rounds} rounds in turn', flush=True)

    def measure_machine(self):
        "What bounds are made of."
        seconds = 0.05 if self.a.small else 0.5
        self.rates = self.found['machine'] = machine_rates(self.a.device, seconds)

    def lacks(self, package):
        "Whether an optional package is missing; if so that is said once."
        if have(package):
            return False
        if package not in self.found['left_out']:
            self.found['left_out'].append(package)
            print(f"   {package} is not installed: left out (pip install -e '.[bench]')")
        return True

    def note(self, *lines):
        self.found['notes'] += lines
        for line in lines:
            print(f'   ({line})')

    def check(self, what, difference, tolerance):
        "What must agree: a failed check ends the benchmark with status 1, after all is written."
        ok = bool(difference <= tolerance)
        told = dict(what=what, difference=float(difference), tolerance=tolerance, ok=ok)
        self.found['checks'].append(told)
        words = f'{what}, difference {difference:.1e}, tolerance {tolerance:g}'
        print(f'   {"same" if ok else "NOT THE SAME"}: {words}', flush=True)

    def time(self, title, works, ratios=(), n=None, unit='images', **more):
        "Time `works` in turn. Of ratios (slow names, fast names, target) the fastest are compared."
        t = in_turn(works, self.rounds, self.a.device)
        rows = []
        for slow, fast, target in ratios:
            best = lambda names: min((k for k in names if k in works), key=t.median, default=None)
            slow, fast = best(slow), best(fast)
            if slow and fast:
                found = dict(zip(('median', 'low', 'high'), t.ratio(slow, fast)))
                rows.append(dict(slow=slow, fast=fast, target=target, **found))
        result = dict(title=title, n=n, unit=unit, **t.as_dict(), ratios=rows, **more)
        self.found['results'].append(result)
        print(f'\n{title}\n{t.table(n, unit)}', flush=True)
        for r in rows:
            aim = f', target {r["target"]:g}' if r['target'] else ''
            span = f'({r["low"]:.2f} to {r["high"]:.2f})'
            times = f'{r["median"]:.2f} times as fast as {r["slow"]}'
            print(f'   {r["fast"]} is {times} {span}{aim}', flush=True)
        return t

    def add(self, title, shown='', **more):
        self.found['results'].append(dict(title=title, **more))
        print(f'\n{title}\n{shown}', flush=True)

    def bounds(self, title, method, views, keeps, seconds, bf16):
        "A measured step beside the arithmetic that it cannot avoid."
        work = step_work(method, views, keeps)
        least = time_bound(work, self.rates, bf16)
        total = least['arithmetic'] + least['optimiser'] + least['ema']
        parts = [f'{k} {v * 1e3:.1f} ms' for k, v in least.items() if k != 'arithmetic']
        taken = f'taken {seconds * 1e3:.1f} ms, {seconds / total:.2f} times'
        self.add(
            f'{title}: bound',
            f'   at least {total * 1e3:.1f} ms ({", ".join(parts)}); {taken}',
            work=work,
            bound=least,
            bf16=bf16,
            seconds=seconds,
            over_bound=seconds / total,
        )

    def phases(self, title, run, batches, warmup, epoch=True, **more):
        "Where the time of a run goes."
        p = profile_run(run, batches, warmup, epoch, self.rates)
        self.add(f'{title}: phases', p, profile=p.as_dict(), **more)
        return p

    def write(self):
        "Into the file, in place of an earlier record of this benchmark; whether all checks hold."
        self.found['wall_seconds'] = time.time() - self.begun
        file = self.a.out
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.is_file() else []
        others = [line for line in lines if json.loads(line)['benchmark'] != self.name]
        aside = file.with_suffix('.tmp')
        aside.write_text('\n'.join([*others, json.dumps(short(self.found))]) + '\n')
        aside.replace(file)
        print(f'\n   {self.found["wall_seconds"]:.0f} s; written: {file}', flush=True)
        return all(c['ok'] for c in self.found['checks'])


def smooth(n, side, seed=0):
    "Random pictures without noise from pixel to pixel, as photographs are: uint8 (n,3,side,side)."
    g, few = torch.Generator().manual_seed(seed), max(2, side // 8)
    x = torch.rand(n, 3, few, few, generator=g)
    return (F.interpolate(x, (side, side), mode='bilinear') * 255).byte()


def jpegs(folder, n, side, seed=0):
    "`n` JPEG files in two classes, about `side` pixels, of as many bytes as photographs."
    from PIL import Image

    for i, x in enumerate(smooth(n, side, seed)):
        (folder / f'class{i % 2}').mkdir(exist_ok=True)
        noisy = (x.float() + 8 * torch.randn(x.shape)).clamp(0, 255).byte()
        picture = Image.fromarray(noisy.permute(1, 2, 0).numpy())
        picture.save(folder / f'class{i % 2}' / f'{i:05}.jpg', quality=90)


def seeded(make, seed=0):
    "What `make` gives from that seed."
    torch.manual_seed(seed)
    return make()


def trainer(method, data, **kw):
    "A `Pretrainer` whose batches are trained one by one."
    usual = dict(epochs=10_000, knn_every=0, progress='quiet', overlap='keep')
    run = Pretrainer(method, data, **usual | kw)
    begin_run(run, run.epochs)
    return run


def one_epoch(run, clock=[0]):
    "A function that trains one epoch more at each call, without what ends an epoch."

    def work():
        clock[0] += 1
        for views, _ in run.loader.epoch(clock[0]):
            run.train_batch(views)

    return work

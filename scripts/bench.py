"""How fast is ssl_patch on this machine, beside what one would otherwise take, and beside the
machine's own limit?

    pip install -e '.[bench]'             # kornia and lightly; without them they are left out
    python scripts/bench.py all           # everything that runs on a CPU; `make bench` does both
    python scripts/bench.py views --case 64:48:100 500:160:16 --augmentations moco_v2 byol_a+byol_b
    python scripts/bench.py sampler --grid 14 --num-draws 2 --batch 100
    python scripts/bench.py busy --loops 0 1 2
    python scripts/bench.py gpu --device cuda --data cifar10.npz --schedule
    python scripts/bench.py step --small  # any of them in seconds, to see that it runs

Contenders are timed in turn in one process: every round calls each once, in an order that rotates,
after a warm-up. A ratio is taken within a round; its median over the rounds is the result, the
lowest and the highest are its spread. Each benchmark writes one line into the file `--out`:
command, hardware, threads, versions, date, all seconds of all rounds, ratios, and what was left
out. What the others do differently is told in scripts/bench_baselines.py and in every record."""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from bench_busy import busy
from bench_gpu import gpu
from bench_growth import growth, imports, memory
from bench_paths import paths
from bench_report import Report
from bench_steps import epoch, step
from bench_views import AUGMENTATIONS, files, sampler, views

COMMANDS = {  # name -> function of (arguments, report), and its usual number of rounds
    'views': (views, 5),
    'files': (files, 5),
    'sampler': (sampler, 7),
    'step': (step, 5),
    'epoch': (epoch, 3),
    'import': (imports, 3),
    'growth': (growth, 3),
    'memory': (memory, 1),
    'paths': (paths, 5),
    'busy': (busy, 1),
    'gpu': (gpu, 3),
}
CASES = [[32, 32, 256], [96, 64, 128], [256, 224, 32], [400, 224, 32]]


def case(text):
    "SOURCE:SIZE:BATCH"
    try:
        source, size, batch = map(int, text.split(':'))
    except ValueError:
        what = 'give SOURCE:SIZE:BATCH, three whole numbers, e.g. 256:224:32'
        raise argparse.ArgumentTypeError(f'{text!r}: {what}') from None
    if min(source, size, batch) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: all three must be at least 1')
    return [source, size, batch]


def parser():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    everything = 'all: everything but gpu; with --small, gpu too'
    p.add_argument('what', choices=[*COMMANDS, 'all'], help=everything)
    out = 'file for the records, a line a benchmark'
    p.add_argument('--out', type=Path, default=Path('runs/speed.jsonl'), help=out)
    small = 'small shapes and one round: whether it runs, not how fast'
    p.add_argument('--small', action='store_true', help=small)
    p.add_argument('--threads', type=int, help='of torch; default: as torch chooses')
    p.add_argument('--rounds', type=int, help='timed calls of each contender')
    p.add_argument('--device', default='cpu', help='of sampler and gpu')
    p.add_argument('--batch', type=int, help='images, of sampler, step, epoch, memory and gpu')
    width = 'of the network, of step and epoch: channels of a ResNet, vectors of a ViT'
    p.add_argument('--width', type=int, help=width)
    p.add_argument('--batches', type=int, help='in a pass, of views and epoch; timed, of busy')
    workers = 'of the DataLoaders, of views and epoch: the best is taken and named'
    p.add_argument('--workers', type=int, nargs='+', help=workers)
    g = p.add_argument_group('views')
    pixels = 'pixels of the images, of the views, images in a batch'
    g.add_argument('--case', type=case, nargs='+', metavar='SOURCE:SIZE:BATCH', help=pixels)
    some = list(AUGMENTATIONS)
    g.add_argument('--augmentations', nargs='+', choices=some, default=some)
    g = p.add_argument_group('sampler')
    g.add_argument('--grid', type=int, default=16, help='patches per side')
    g.add_argument('--num-draws', type=int, default=4)
    g.add_argument('--least', type=float, help='status 1 if the median ratio is below this')
    g = p.add_argument_group('step')
    g.add_argument('--only', choices=['aps', 'moco'])
    g.add_argument('--depth', type=int, help='blocks of the ViT')
    g = p.add_argument_group('epoch')
    photos = "the library's photographs instead of random pictures"
    g.add_argument('--photos', action='store_true', help=photos)
    g.add_argument('--files', type=int, default=256, help='JPEG files')
    g = p.add_argument_group('busy')
    loops = 'numbers of processes that burn a core each; default: 0 1'
    g.add_argument('--loops', type=int, nargs='+', help=loops)
    g = p.add_argument_group('gpu')
    data = '.npz with the images of CIFAR-10; default: random ones of that shape'
    g.add_argument('--data', type=Path, help=data)
    whole = 'also train SCE for 200 epochs with kNN, and record the wall time'
    g.add_argument('--schedule', action='store_true', help=whole)
    g.add_argument('--epochs', type=int, default=200, help='of --schedule')
    g.add_argument('--no-compile', action='store_true', help='leave torch.compile out')
    return p


def arguments():
    p = parser()
    a = p.parse_args()
    a.case = a.case or ([[40, 32, 8]] if a.small else CASES)
    a.workers = a.workers or ([0] if a.small else [0, 1, 2])
    a.loops = a.loops or ([1] if a.small else [0, 1])
    counts = 'threads rounds batch width batches grid num_draws depth files epochs'.split()
    for name in counts:
        value = getattr(a, name)
        if value is not None and value < 1:
            p.error(f'--{name.replace("_", "-")} must be at least 1, got {value}')
    if min(a.loops) < 0:
        p.error(f'--loops must be at least 0, got {min(a.loops)}')
    if a.what not in ('gpu', 'sampler') and a.device != 'cpu':
        p.error(f'--device is for gpu and sampler, not for {a.what}')
    return a


def main():
    a = arguments()
    if a.what == 'all' and not a.small:  # a process each, so that none finds the caches of another
        words = [w for w in sys.argv[1:] if w != 'all']
        run = lambda name: subprocess.run([sys.executable, __file__, name, *words]).returncode
        return int(any([run(name) for name in COMMANDS if name != 'gpu']))
    if a.threads:
        torch.set_num_threads(a.threads)
    ok = True
    for name in COMMANDS if a.what == 'all' else [a.what]:
        work, a.usual = COMMANDS[name]
        report = Report(name, a)
        work(a, report)
        ok = report.write() and ok
    return 0 if ok else 1


if __name__ == '__main__':
    sys.exit(main())

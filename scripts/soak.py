"""Does a long run stay as it began? Memory, open files and speed of training, epoch by epoch.

    python scripts/soak.py --minutes 60 --out nbs/results/records/soak.jsonl

A small run that does everything that long ones do: JPEG files are decoded by a worker, views made,
a ViT trained by APS, kNN measured and a checkpoint written after every epoch. Every ten epochs the
run ends, and a new `Pretrainer` in the same process goes on from its folder, as a notebook does.
Beside each epoch: memory of the process and of its workers (MiB), open files, threads, images a
second, and images a second of processor time, which other work on the machine hardly changes. One
line of JSON for a soak; about 100 epochs of it are kept, evenly spread."""

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torchvision.io import encode_jpeg

from ssl_patch.data.photographs import photo_crops
from ssl_patch.data.sources import images
from ssl_patch.evaluation.records import hardware
from ssl_patch.methods.aps import APS
from ssl_patch.models.encoders import vit
from ssl_patch.training.checkpoint import versions
from ssl_patch.training.pretrain import Pretrainer

LEG = 10  # epochs of one `Pretrainer`


def write_jpegs(folder, n):
    "The photographs' crops as files, n to train on and a quarter as many to measure on."
    data = photo_crops(48)
    for store, part, count in ((data.train, 'train', n), (data.test, 'test', n // 4)):
        for i in torch.linspace(0, len(store) - 1, count).long().tolist():
            place = Path(folder) / part / store.class_name(i)
            place.mkdir(parents=True, exist_ok=True)
            (place / f'{i}.jpg').write_bytes(encode_jpeg(store[i]).numpy().tobytes())


def processor_seconds(process):
    "Of the process, and of its workers, those that ended among them."
    t = process.cpu_times()
    alive = [c.cpu_times() for c in process.children(recursive=True)]
    mine = t.user + t.system + t.children_user + t.children_system
    return mine + sum(c.user + c.system for c in alive)


class Watched(Pretrainer):
    "A run that looks at its process after every epoch."

    rows, began, batches_before = [], time.monotonic(), 0

    def end_epoch(self, epoch):
        super().end_epoch(epoch)
        me = psutil.Process()
        family = [me, *me.children(recursive=True)]
        row = dict(
            minutes=(time.monotonic() - self.began) / 60,
            memory=sum(p.memory_info().rss for p in family) / 2**20,
            files=sum(p.num_fds() for p in family),
            threads=me.num_threads(),
            processor=processor_seconds(me),
            images=self.batches * self.train_config.batch_size,
            loss=self.history[-1]['loss'],
        )
        self.rows.append(row)


def flatness(rows, name):
    "Means of the second and of the last quarter; the first is left to the machine to warm up."
    quarter = max(len(rows) // 4, 1)
    mean = lambda part: sum(r[name] for r in part) / len(part)
    return mean(rows[quarter : 2 * quarter] or rows), mean(rows[-quarter:])


def with_speed(rows):
    "Each row with images a second, of the clock and of the processor."
    found = []
    for a, b in zip(rows, rows[1:]):
        n, wall = b['images'] - a['images'], 60 * (b['minutes'] - a['minutes'])
        spent = max(b['processor'] - a['processor'], 1e-9)
        found.append(b | dict(per_second=n / wall, per_processor_second=n / spent))
    return found


def soak(minutes, n, out):
    "Train for so long; the rows."
    Watched.rows, Watched.began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(f'{folder}/data', n)
        legs = 0
        while time.monotonic() - Watched.began < 60 * minutes:
            legs += 1
            torch.manual_seed(0)
            data = images(f'{folder}/data', size=48, stream=True)
            net = vit('tiny', size=32, patch=8, width=48, depth=2, heads=2)
            how = dict(batch_size=64, lr=1e-3, workers=1, knn_every=1, progress='quiet')
            method = APS(net, keep_ratio=0.5, num_draws=2)
            out_of = f'{folder}/run'
            Watched(method, data, epochs=LEG * legs, out=out_of, resume='auto', **how).fit()
    return with_speed(Watched.rows)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--images', type=int, default=1024, help='to train on, JPEG files')
    parser.add_argument('--out', required=True, help='file of records, one a line')
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    rows = soak(given.minutes, given.images, given.out)
    flat = {}
    for name in ('memory', 'files', 'threads', 'per_second', 'per_processor_second'):
        early, late = flatness(rows, name)
        flat[name] = dict(second_quarter=early, last_quarter=late)
        print(f'{name}: {early:.1f} in the second quarter, {late:.1f} in the last')
    step = max(len(rows) // 100, 1)
    record = dict(
        minutes=given.minutes,
        epochs=len(rows) + 1,
        images=given.images,
        hardware=hardware('cpu'),
        versions=versions(),
        flat=flat,
        rows=[{k: round(v, 3) for k, v in r.items()} for r in rows[::step]],
    )
    path = Path(given.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(record) + '\n')


if __name__ == '__main__':
    main()

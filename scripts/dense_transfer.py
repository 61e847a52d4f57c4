"""What encoders of runs are worth for masks, depth and detection: small recipes, a record a line.

    python scripts/dense_transfer.py runs/dense64 --camvid ~/data/CamVid --rgbd ~/data/redkitchen \\
        --out nbs/results/records/dense_transfer.jsonl
    python scripts/dense_transfer.py runs/dense64 --persons ~/data/PennFudanPed \\
        --out nbs/results/records/detection.jsonl

For each run folder below the first argument: CamVid (mIoU), indoor RGB-D (delta1) and persons of
Penn-Fudan (AP), by a head on the frozen encoder and by fine-tuning all weights, a minute or two
each; and the same from random weights of each architecture and seed, as rows of their own. What is
in the file already is passed over, so it can be stopped at any time and called again."""

import argparse
import json
from pathlib import Path

import torch

from ssl_patch.commands.probe import run_folders, tower_encoder
from ssl_patch.data.depths import open_depths
from ssl_patch.data.detection_sets import detection_data
from ssl_patch.data.masks import open_masks
from ssl_patch.evaluation.features import architecture
from ssl_patch.reports.runs import name_and_seed
from ssl_patch.transfer.depth import monocular_depth
from ssl_patch.transfer.detection import detection
from ssl_patch.transfer.segmentation import segmentation

SIZE = (96, 128)  # pixels, of images, masks and depth
HEADS = dict(channels=32, hidden=64, rpn_batch=32, box_batch=32)  # of the detector
RUNS = dict(  # a task and a recipe -> what is changed in it
    segmentation_linear=dict(recipe='linear', epochs=60, batch_size=8),
    segmentation_tuned=dict(recipe='small', epochs=60, batch_size=8, lr=1e-3),
    depth_linear=dict(recipe='linear', epochs=40, batch_size=8, high=5.0),
    depth_tuned=dict(recipe='small', epochs=40, batch_size=8, lr=1e-3, high=5.0),
    detection_frozen=dict(steps=400, freeze='encoder', **HEADS),
    detection_tuned=dict(steps=400, lr=4e-4, head_lr=5.0, **HEADS),
)


def starts(folder) -> list:
    "(name, seed, function of a seed that gives the encoder) of every run, and of random weights."
    found, random = [], {}
    for run in run_folders(folder):
        if not (run / 'encoder.safetensors').is_file():
            continue  # not finished yet
        name, seed = name_and_seed(run)
        found.append((name, seed, lambda _, run=run: tower_encoder(run)))
        kind = architecture(tower_encoder(run)).split()[0]
        key = f'random {kind}', seed
        random.setdefault(key, lambda s, run=run: tower_encoder(run).reinitialized(s))
    return [*((*k, make) for k, make in random.items()), *found]


def done(path) -> set:
    "What the file has: (encoder, seed, task and recipe)."
    if not path.is_file():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {(r['encoder'], r['seed'], r['settings']['run']) for r in rows}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', help='a folder of run folders')
    parser.add_argument('--camvid', help='CamVid, as SegNet has it; left out: no segmentation')
    parser.add_argument('--rgbd', help='a scene of 7-Scenes with train.txt and test.txt')
    parser.add_argument('--persons', help='PennFudanPed')
    parser.add_argument('--out', required=True, help='file of records, one a line')
    parser.add_argument('--only', default='', help='encoders whose name has this word')
    parser.add_argument('--seeds', type=int, nargs='*', help='these alone; by default all')
    more = 'seeds of head, order and random weights; by default that of the run'
    parser.add_argument('--head-seeds', type=int, nargs='*', help=more)
    given = parser.parse_args(words)
    torch.set_num_threads(1)

    data = {}
    if given.camvid:
        data['segmentation'] = segmentation, open_masks(given.camvid, size=SIZE)
    if given.rgbd:
        ends = '.color.jpg', '.depth.png'
        data['depth'] = monocular_depth, open_depths(given.rgbd, ends=ends, size=SIZE)
    if given.persons:
        data['detection'] = detection, detection_data(given.persons, test=28, side=128)
    path, wanted = Path(given.out), [r for r in RUNS if r.split('_')[0] in data]
    path.parent.mkdir(parents=True, exist_ok=True)
    there = done(path)
    for name, seed, make in starts(given.runs):
        asked = given.only in name and (given.seeds is None or seed in given.seeds)
        heads = (given.head_seeds or [seed]) if asked else []
        for s, run in [(s, run) for s in heads for run in wanted if (name, s, run) not in there]:
            measure, source = data[run.split('_')[0]]
            encoder = make(s)
            how = dict(name=name, seed=s, baselines=False, progress='quiet')
            if (
                run.endswith('linear')
                and hasattr(encoder, 'net')
                and hasattr(encoder.net, 'layer4')
            ):
                how['dilate'] = 2  # of a ResNet: cells as fine as those of the ViTs
            record = measure(encoder, source, **RUNS[run], **how)
            record.settings['run'] = run
            with open(path, 'a', encoding='utf-8') as f:
                f.write(json.dumps(record.to_dict(), ensure_ascii=False) + '\n')
            value = f'{record.metric} {record.value:.3f} (chance {record.chance:.3f})'
            print(f'{name}, seed {s}, {run}: {value}, {record.seconds:.0f} s', flush=True)


if __name__ == '__main__':
    main()

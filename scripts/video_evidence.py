"""SCE on clips beside SCE on single frames and random weights, three seeds: what the chapter on SCE
for video reads.

    python scripts/video_evidence.py runs/video                          # moving collages (drawn)
    python scripts/video_evidence.py runs/video --actions weizmann4      # and clips of actions
    python scripts/video_evidence.py runs/video --only 'SCE, one frame' --seeds 1

One run after the other. Runs that are finished are left alone, those that were interrupted go on
(`resume='auto'`). `--keep FILE` gathers the records of all runs in one small file."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ssl_patch.data.collages import motions
from ssl_patch.data.video_sources import moving_collages, videos
from ssl_patch.evaluation.linear import linear_probe_cached
from ssl_patch.evaluation.records import load_records
from ssl_patch.methods.sce_video import SCEVideo
from ssl_patch.models.video_encoders import slow_resnet, tubelet_vit
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.transfer.video_retrieval import video_retrieval


def collages(a, difference, seconds):
    """960 and 240 drawn videos of 12 frames, kept in a file: the class is the motion."""
    file = a.out / 'collages.pt'
    if not file.is_file():
        a.out.mkdir(parents=True, exist_ok=True)
        split = lambda n, s: moving_collages(n, 12, 24, s, every=2)
        torch.save((split(960, 'train'), split(240, 'test')), file)
    train, test = torch.load(file)
    how = dict(rate=8, seconds=seconds, difference=difference, classes=list(motions))
    data = videos(train, test=test, **how)
    data.name = 'moving collages (synthetic)'
    return data


def by_differences(seed, size=24, patch=8, queue=256, flip=0.0):
    "A small ViT whose patches last as long as a clip. Crops alone: a mirror would swap motions."

    def net():
        torch.manual_seed(seed)
        shape = dict(frames=8, tubelet=8, width=96, depth=3, heads=3)
        return tubelet_vit(size=size, patch=patch, **shape)

    how = dict(hidden=256, out=64, queue=queue)
    none = dict(jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0, difference_p=0.0, flip=flip)
    crop = replace(SCEVideo(net(), **how).augmentations[0], scale=(0.4, 1.0), name='crop', **none)
    return SCEVideo(net(), **how, augmentations=(crop, crop))


def action_differences(seed):
    "The same on clips of actions, where a mirror image shows the same action."
    return by_differences(seed, 64, 16, 96, flip=0.5)


def action_method(seed):
    "A slow-only ResNet-18 of a quarter of the width, with colours of half the strength."
    torch.manual_seed(seed)
    net = slow_resnet('resnet18', 64, 8, stem='imagenet', width=16)
    return SCEVideo(net, 'r3d18_k200', strength=0.5, hidden=128, out=64, queue=96)


TRAIN = dict(
    optimizer='adamw', weight_decay=0.01, warmup_epochs=1, knn_every=0, workers=0, bf16=False
)
COLLAGES = dict(epochs=16, batch_size=32, lr=1e-3)
ACTIONS = dict(epochs=30, batch_size=16, lr=1e-3)

# name of a row -> (which data, method, how it is trained)
ROWS = {
    'SCE, clips': (lambda a: collages(a, True, 1.0), by_differences, COLLAGES),
    'SCE, one frame': (lambda a: collages(a, False, 0.01), by_differences, COLLAGES),
    'SCE, actions by differences': (
        lambda a: videos(a.actions, seconds=1.28, difference=True),
        action_differences,
        ACTIONS | dict(epochs=60),
    ),
    'SCE, clips of actions': (lambda a: videos(a.actions, seconds=1.28), action_method, ACTIONS),
}


def one(row, seed, a):
    "Pretrain and measure, unless that was done."
    load, build, train = ROWS[row]
    out = a.out / f'{row.replace(" ", "_").replace(",", "")}_seed{seed}'
    if (out / 'records.jsonl').is_file() and len(load_records(out)) == 2:
        return
    data = load(a)
    run = Pretrainer(build(seed), data, out=out, resume='auto', seed=seed, **train | TRAIN)
    run.fit()
    own = dict(name=row, seed=seed, out=out)
    views = dict(num_clips=1 if row == 'SCE, one frame' else 3)
    for record in (
        linear_probe_cached(run.encoder, data, **own),
        video_retrieval(run.encoder, data, **views, **own),
    ):
        print(record, flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('out', type=Path, help='folder for the run folders')
    p.add_argument('--actions', type=Path, help='a folder of videos of actions, split by person')
    p.add_argument('--only', nargs='+', choices=ROWS, help='some of the rows')
    p.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    p.add_argument('--keep', type=Path, help='a .jsonl for the records of all runs in OUT')
    a = p.parse_args()
    torch.set_num_threads(1)
    for seed in a.seeds:
        for row in a.only or ROWS:
            if a.actions or 'actions' not in row:
                one(row, seed, a)
    if a.keep:
        folders = sorted(f.parent for f in a.out.glob('*/records.jsonl'))
        lines = [line for f in folders for line in (f / 'records.jsonl').read_text().splitlines()]
        a.keep.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()

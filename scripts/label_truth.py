"""How right soft labels are along training: what share of them falls on images of the same class.

    python scripts/label_truth.py runs/image --out nbs/results/records/label_truth.jsonl

For each run below the first argument and each checkpoint that it kept (`pretrain --keep-every`),
and for the weights that it began with: keys of training images, made as in training but with the
statistics that batch-norm has gathered, ask 8,192 keys of others. Written down are the share of the
ten nearest that are of the same class, which InfoNCE pushes away as if they were wrong; and of the
method's own soft labels, without their positive, the share on the same class and how many
candidates share them (the exponential of the entropy). Classes are looked at here alone."""

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from ssl_patch.commands.pretrain import saved
from ssl_patch.commands.probe import run_folders
from ssl_patch.ground.files import atomic_write
from ssl_patch.methods.contrast import label_entropy
from ssl_patch.reports.runs import name_and_seed
from ssl_patch.training.run_folder import read_checkpoint
from ssl_patch.views.augmentations import make_view

ASKING, ASKED = 1024, 8192  # keys


@torch.no_grad()
def keys_of(method, x, batch=512):
    "Unit rows, of the key branch: of the momentum encoder where there is one."
    augmentation = method.augmentations[method.view_pairs[0][1]]
    tower = method.key_encoder.net if method.key_encoder else method.tower
    generator = torch.Generator().manual_seed(0)
    views = (make_view(part, augmentation, generator=generator) for part in x.split(batch))
    return torch.cat([F.normalize(tower(v.x).image.float(), dim=1) for v in views])


def truth(method, x, y) -> dict:
    "What the keys of the first images say of the others."
    method.eval()
    k = keys_of(method, x)
    k, queue, same = k[:ASKING], k[ASKING:], y[:ASKING, None] == y[ASKING:]
    nearest = (k @ queue.T).topk(10, dim=1).indices
    found = dict(nearest=same.gather(1, nearest).float().mean().item())
    labels = getattr(method.loss, 'soft_labels', lambda *_: None)(k, queue)
    if labels is None or labels[:, 1:].sum() < 1e-6:  # nothing beside the positive
        return found
    relations = labels[:, 1:] / labels[:, 1:].sum(1, keepdim=True)
    sharing = label_entropy(relations).exp().item()
    return found | dict(right=(relations * same).sum(1).mean().item(), sharing=sharing)


def of_run(folder):
    "Rows of a run: its first weights, then those of each checkpoint."
    name, seed = name_and_seed(folder)
    run = saved(folder, resumable=True).pretrainer(progress='quiet')
    images = run.data.train
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    some = some[: ASKING + ASKED]
    look = lambda: truth(run.method, images.images[some], images.labels[some])
    said = dict(method=name, seed=seed, run=Path(folder).name)
    yield said | dict(epoch=0) | look()
    for file in sorted(Path(folder).glob('checkpoint.epoch*.pt')):
        run.method.load_state_dict(read_checkpoint(file)['method'])
        yield said | dict(epoch=int(file.stem[-4:])) | look()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument('runs', help='folder with run folders')
    p.add_argument('--out', required=True, help='file of JSON lines; what it has is passed over')
    a = p.parse_args()
    out = Path(a.out)
    lines = out.read_text(encoding='utf-8').splitlines() if out.is_file() else []
    have = {json.loads(line)['run'] for line in lines}
    for folder in run_folders(a.runs):
        if Path(folder).name in have or not (Path(folder) / 'encoder.safetensors').is_file():
            continue
        rows = [*of_run(folder)]
        lines += [json.dumps(r) for r in rows]
        atomic_write(out, ('\n'.join(lines) + '\n').encode())
        print(f'{Path(folder).name}: {len(rows)} rows', flush=True)


if __name__ == '__main__':
    main()

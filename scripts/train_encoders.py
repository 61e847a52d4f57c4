"""Train the small encoders that the chapters look at, and that come with the package.

    python scripts/train_encoders.py                       # all of them; `make encoders` does this
    python scripts/train_encoders.py aps_photos            # one
    python scripts/train_encoders.py --only-write          # from run folders that are there

On the photographs of scikit-image, a few minutes each on one core, one after another. A run that
was interrupted goes on. Each is written to ssl_patch/models/trained/NAME.safetensors, in half
precision, with a card that says data, licence, command and what kNN measured.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch

from ssl_patch.commands.demo import Demo
from ssl_patch.commands.words import load_data
from ssl_patch.evaluation.knn import knn
from ssl_patch.methods.method import Method
from ssl_patch.models.files import load_encoder, save_encoder
from ssl_patch.models.momentum import ema
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.views.augmentations import aug_moco_v2, aug_weak

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / 'ssl_patch' / 'models' / 'trained'
LICENCE = 'weights: Apache-2.0, as this package; photographs: those in the wheel of scikit-image'
DATA = 'crops of 14 photographs of scikit-image, as images("photos", size=64) cuts them'


def the_demo(out, progress):
    "What `make demo` trains, for longer: APS, a quarter of the patches of each view."
    return Demo(out=str(out), epochs=20, progress=progress).pretrain()


def all_patches(out, progress):
    "The same, but both views keep all of their patches: one step a batch."
    options = ('keep_ratio=1.', 'num_draws=1')
    return replace(the_demo(out, progress), options=options)


def only_pull(q, k, queue):
    "A loss without negatives: any constant answer is perfect."
    return 2 - 2 * (q * k).sum(1).mean()


def train_collapsed(out, progress):
    "The same network under a loss that only pulls, with nothing against a collapse."
    demo = the_demo(out, progress)
    torch.manual_seed(0)
    encoder = demo.build_encoder('aps')
    same = torch.nn.Linear(encoder.dim, encoder.dim, bias=False).requires_grad_(False)
    torch.nn.init.eye_(same.weight)  # features themselves are compared, and so they collapse
    method = Method(
        encoder,
        (aug_moco_v2(encoder.size), aug_weak(encoder.size)),
        key_encoder=ema(0.5),
        loss=only_pull,
        projector=same,
        view_pairs=((0, 1),),
        name='only pull',
    )
    data = load_data('photos', encoder.size)
    how = dict(epochs=6, batch_size=64, lr=3e-2, warmup_epochs=0.0)
    Pretrainer(method, data, out=out, resume='auto', progress=progress, **how).fit()


# name -> (what it is, how it is trained)
ENCODERS = dict(
    aps_photos=('APS as in `make demo`', lambda *a: replace(the_demo(*a), resume='auto').go()),
    all_patches_photos=(
        'APS that keeps all patches of both views',
        lambda *a: replace(all_patches(*a), resume='auto').go(),
    ),
    collapsed_photos=('collapsed on purpose: a loss that only pulls', train_collapsed),
)


def write(name, run):
    "The encoder of a run folder in half precision, with its card and what kNN says of it."
    encoder = load_encoder(run / 'encoder.safetensors')
    about = dict(what=ENCODERS[name][0], data=DATA, licence=LICENCE)
    about |= dict(command=f'python scripts/train_encoders.py {name}')
    about |= {k: encoder.card[k] for k in ('method', 'slots', 'train_config', 'lr', 'seed')}
    half = copy.deepcopy(encoder).half()
    TRAINED.mkdir(exist_ok=True)
    path = save_encoder(half, TRAINED / f'{name}.safetensors', about)
    record = knn(load_encoder(path), load_data('photos', encoder.size))
    beside = {k: round(v, 3) for k, v in record.baselines.items()}
    about |= dict(tower='online', knn=round(record.value, 3), knn_baselines=beside)
    save_encoder(half, path, about).chmod(0o644)
    print(f'{path.name}: {path.stat().st_size:,} bytes\n{record}', flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('names', nargs='*', help=f'of {", ".join(ENCODERS)}; all if none is given')
    p.add_argument('--runs', type=Path, default=Path('runs/encoders'), help='run folders')
    p.add_argument('--only-write', action='store_true', help='train nothing')
    p.add_argument('--progress', default='lines')
    a = p.parse_args()
    if unknown := set(a.names) - set(ENCODERS):
        p.error(f'unknown: {", ".join(sorted(unknown))}; there are {", ".join(ENCODERS)}')
    for name in a.names or ENCODERS:
        run = a.runs / name
        print(f'{name}: {ENCODERS[name][0]}', flush=True)
        if not a.only_write:
            ENCODERS[name][1](run, a.progress)
        write(name, run)


if __name__ == '__main__':
    main()

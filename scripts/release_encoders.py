"""Turn finished, measured runs into encoders to give away: one file each, in half precision.

    ssl_patch campaign nbs/results/plans/image.ini          # trains and measures
    python scripts/release_encoders.py runs/image --out dist/encoders --licence '...'

A file holds the encoder, and a card with method, settings, data, command, and what every protocol
measured, beside raw pixels and the random encoder; `open_encoder(FILE)` reads both. Half precision
changes features in the fourth digit; how far kNN of it is from the record can be measured with
`--data`, and is then part of the card. Beside the files, SHA256SUMS."""

import argparse
import copy
import hashlib
from pathlib import Path

from ssl_patch.commands.words import load_data
from ssl_patch.evaluation.knn import knn
from ssl_patch.models.files import load_encoder, save_encoder
from ssl_patch.reports.runs import load_runs


def told(record):
    "What a record says, in a card."
    beside = {k: round(v, 4) for k, v in record.baselines.items()}
    about = dict(protocol=record.protocol, data=record.data, metric=record.metric)
    return about | dict(value=round(record.value, 4), baselines=beside, command=record.command)


def release(run, out, licence, data=None):
    "The encoder of one run in half precision, with its card."
    encoder = load_encoder(Path(run.folder) / 'encoder.safetensors')
    card = encoder.card | dict(records=[told(r) for r in run.records], licence=licence)
    half = copy.deepcopy(encoder).half()
    path = save_encoder(half, out / f'{Path(run.folder).name}.safetensors', card)
    if data is not None:
        card |= dict(half_precision=dict(data=data.name, knn=knn(load_encoder(path), data).value))
        save_encoder(half, path, card)
    path.chmod(0o644)
    return path


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('runs', nargs='+', help='run folders, or folders of them')
    p.add_argument('--out', type=Path, default=Path('dist/encoders'), help='folder of the files')
    p.add_argument('--licence', required=True, help='of weights and data, as the card says it')
    p.add_argument('--data', help='measure kNN of the half-precision file on it, too')
    a = p.parse_args()
    try:
        runs = [r for r in load_runs(a.runs) if r.config]  # a measured encoder has no run
    except ValueError as e:
        p.error(str(e))
    if not runs:
        p.error(f'no finished and measured run in {", ".join(a.runs)}')
    if lacks := [r.folder for r in runs if not (Path(r.folder) / 'encoder.safetensors').is_file()]:
        p.error(f'no encoder.safetensors in {", ".join(lacks)}')
    a.out.mkdir(parents=True, exist_ok=True)
    sums = []
    for run in runs:
        size = run.config['encoder'].get('size', 32)
        data = load_data(a.data, size) if a.data else None
        path = release(run, a.out, a.licence, data)
        sums.append(f'{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n')
        print(f'{path}: {path.stat().st_size:,} bytes', flush=True)
    (a.out / 'SHA256SUMS').write_text(''.join(sums))


if __name__ == '__main__':
    main()

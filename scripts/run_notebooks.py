"""Run notebooks anew, each in a kernel of its own, and keep what they show.

    python scripts/run_notebooks.py                        # all of them; `make notebooks` does this
    python scripts/run_notebooks.py nbs/methods            # those of a folder
    python scripts/run_notebooks.py nbs/methods/07_sce.ipynb nbs/cli.ipynb

Two at a time, with one thread each. A cell that fails stops everything: its notebook and number
are named, and the notebook stays as it was. Charts are kept with a palette, in a third of the
bytes. Then all are cleaned, and README.md is written."""

import argparse
import base64
import io
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parent.parent
NBS = ROOT / 'nbs'
LEFT_OUT = (
    'notest',
    'slow',
    'cuda',
    'eval: false',
)  # cells with such a directive keep their output
ENVIRONMENT = dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive', MPLBACKEND='')


def notebooks(paths) -> list:
    "Notebook files of `paths`: files, and folders with all below."
    found = []
    for path in map(Path, paths):
        if not path.exists():
            sys.exit(f'{path} is not there')
        found += sorted(path.rglob('*.ipynb')) if path.is_dir() else [path]
    return [p.resolve() for p in found if '.ipynb_checkpoints' not in p.parts]


def left_out(source: str) -> bool:
    "Whether a cell is marked as one that is not run by default."
    marks = [line[2:].strip() for line in source.splitlines() if line.startswith('#|')]
    return any(mark in LEFT_OUT for mark in marks)


def packed(png: bytes) -> bytes:
    "A chart with a palette of 256 colours, which shows the same; anything else as it is."
    from PIL import Image, ImageChops, ImageStat

    picture = Image.open(io.BytesIO(png)).convert('RGBA')
    if picture.getextrema()[3][0] < 255:  # parts are transparent
        return png
    picture = picture.convert('RGB')
    small, kept = picture.quantize(256), io.BytesIO()
    off = ImageStat.Stat(ImageChops.difference(picture, small.convert('RGB'))).mean
    small.save(kept, format='png', optimize=True)
    return png if max(off) > 0.5 else min(png, kept.getvalue(), key=len)  # of 255: a photograph


def pack(nb):
    "Pack all pictures that a notebook shows, and keep a table once: not as plain text, too."
    outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    for data in [o.data for o in outputs if 'data' in o]:
        if 'image/png' in data:
            small = packed(base64.b64decode(data['image/png']))
            data['image/png'] = base64.b64encode(small).decode()
        if 'text/markdown' in data:
            data.pop('text/plain', None)


def run(path: Path, timeout: int) -> tuple:  # (seconds, what went wrong or None)
    "Execute one notebook in place; it is written only where every cell ran."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError, CellExecutionError

    start = time.time()
    nb = nbformat.read(path, as_version=4)
    os.environ.update(ENVIRONMENT)
    client = NotebookClient(
        nb,
        timeout=timeout,
        resources=dict(metadata=dict(path=path.parent)),
        extra_arguments=['--log-level=ERROR'],
    )
    try:
        with client.setup_kernel():
            for i, cell in enumerate(nb.cells):
                if cell.cell_type == 'code' and not left_out(cell.source):
                    client.execute_cell(cell, i)
    except CellExecutionError as e:
        return time.time() - start, f'cell {i}:\n\n{e.traceback}'
    except (CellTimeoutError, DeadKernelError) as e:
        return time.time() - start, f'cell {i}: {e}'
    pack(nb)
    nbformat.write(nb, path)
    return time.time() - start, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('paths', nargs='*', default=[NBS], help='notebooks, or folders of them')
    parser.add_argument('--workers', type=int, default=2, help='notebooks at a time')
    parser.add_argument('--timeout', type=int, default=300, help='seconds that a cell may take')
    args = parser.parse_args()
    paths, start = notebooks(args.paths), time.time()
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = {pool.submit(run, p, args.timeout): Path(os.path.relpath(p)) for p in paths}
        for job in as_completed(jobs):
            seconds, wrong = job.result()
            print(f'{seconds:6.1f} s  {jobs[job]}', flush=True)
            if wrong:
                pool.shutdown(cancel_futures=True)
                sys.exit(f'\n{jobs[job]}, {wrong}')
    print(f'{time.time() - start:6.1f} s  all {len(paths)}')
    for p in paths:
        subprocess.run(['nbdev_clean', '--fname', str(p)], check=True, cwd=ROOT)
    subprocess.run([sys.executable, 'scripts/readme.py'], check=True, cwd=ROOT)


if __name__ == '__main__':
    main()

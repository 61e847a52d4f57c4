"keep_records.py TARGET RUN...: copy what a results notebook reads (configuration, metrics, records: a few kB) out of run folders."
import re, shutil, sys
from pathlib import Path

target, runs = Path(sys.argv[1]), [Path(r) for r in sys.argv[2:]]
for run in runs:
    needed = ('config.json', 'metrics.csv', 'records.jsonl') if (run/'config.json').is_file() else ('records.jsonl',) # somebody else's encoder has no run
    missing = [f for f in needed if not (run/f).is_file()]
    if missing: sys.exit(f'{run} lacks {", ".join(missing)}: is it a finished run that was probed?')
for run in runs:
    (target/run.name).mkdir(parents=True, exist_ok=True)
    for f in ('metrics.csv', 'records.jsonl'):
        if (run/f).is_file(): shutil.copy(run/f, target/run.name/f)
    if not (run/'config.json').is_file(): continue
    # of absolute paths the last part stays: where somebody keeps programs and data is nobody's business
    (target/run.name/'config.json').write_text(re.sub(r'(?<![\w./])(?:/[\w.+-]+)+/([\w.+-]+)', r'\1', (run/'config.json').read_text()))
    print(target/run.name)

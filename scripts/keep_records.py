"keep_records.py TARGET RUN...: copy what a results notebook reads (configuration, metrics, records: a few kB) out of run folders."
import json, re, shutil, sys
from pathlib import Path

def short(text):
    "Of absolute paths the last part stays: where somebody keeps programs and data is nobody's business."
    return re.sub(r'(?<![\w./])(?:/[\w.+-]+)+/([\w.+-]+)', r'\1', text)

target, runs = Path(sys.argv[1]), [Path(r) for r in sys.argv[2:]]
for run in runs:
    needed = ('config.json', 'metrics.csv', 'records.jsonl') if (run/'config.json').is_file() else ('records.jsonl',) # somebody else's encoder has no run
    missing = [f for f in needed if not (run/f).is_file()]
    if missing: sys.exit(f'{run} lacks {", ".join(missing)}: is it a finished run that was probed?')
for run in runs:
    kept = target/run.name; kept.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in (run/'records.jsonl').read_text().splitlines() if line.strip()]
    text = [json.dumps(r | ({'command': short(r['command'])} if r.get('command') else {}), ensure_ascii=False) for r in records]
    (kept/'records.jsonl').write_text('\n'.join(text) + '\n')
    if (run/'config.json').is_file():
        shutil.copy(run/'metrics.csv', kept/'metrics.csv')
        (kept/'config.json').write_text(short((run/'config.json').read_text()))
    print(kept)

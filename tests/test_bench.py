"The benchmark runs, its records are whole, contenders do the same work. Never how long it takes."

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = 'views files sampler step epoch import growth memory paths busy gpu'.split()


def read(file):
    "name -> record"
    found = {r['benchmark']: r for r in map(json.loads, file.read_text().splitlines())}
    assert len(found) == len(file.read_text().splitlines())  # a line each
    return found


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    "What `all --small` writes: name -> record."
    file = tmp_path_factory.mktemp('speed') / 'speed.jsonl'
    words = [sys.executable, str(ROOT / 'scripts' / 'bench.py'), 'all', '--small', '--threads', '1']
    env = os.environ | dict(OMP_NUM_THREADS='1')
    r = subprocess.run([*words, '--out', str(file)], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    assert list(read(file)) == NAMES
    return read(file)


@pytest.mark.parametrize('name', NAMES)
def test_record(records, name):
    "What was run, where and when, and every second of every round."
    r = records[name]
    assert r['benchmark'] == name
    # no folder of this machine
    assert r['command'] == 'python scripts/bench.py all --small --threads 1'
    assert r['hardware'] and r['threads'] == 1 and r['rounds'] == 1 and r['date'].startswith('20')
    assert {'torch', 'torchvision', 'ssl_patch'} <= set(r['versions'])
    assert r['results']
    for result in r['results']:
        assert result['title']
        if 'ratios' not in result:
            continue
        assert result['seconds'] and all(
            len(s) == 1 and s[0] > 0 for s in result['seconds'].values()
        )
        for ratio in result['ratios']:
            slow, fast = (result['seconds'][ratio[k]][0] for k in ('slow', 'fast'))
            assert (
                ratio['low']
                == ratio['median']
                == ratio['high']
                == pytest.approx(slow / fast, rel=1e-3)
            )


def checks(record, words):
    return [c for c in record['checks'] if words in c['what']]


def test_same_work(records):
    "Ours and the plain ways give the same losses, crops, colours, coverage."
    assert all(
        c['ok'] and c['difference'] <= c['tolerance'] for r in records.values() for c in r['checks']
    )
    assert checks(records['step'], 'loss of our APS and of the plain one')[0]['tolerance'] <= 1e-4
    assert len(checks(records['sampler'], 'fraction')) == 2
    for words in (
        'crop',
        'colour jitter',
        'blur',
        'attention',
        'bf16',
        'channels last',
        'AdamW',
        'EMA',
        'tokens',
        'queue',
    ):
        assert checks(records['paths'], words), words


def test_optional_packages(records):
    "One that is missing is named, and not in the record; one that is there is measured."
    views = records['views']
    for package in ('kornia', 'lightly'):
        there = find_spec(package) is not None
        names = [k for r in views['results'] for k in r['seconds']]
        assert (package in views['versions']) == there
        assert (package in views['left_out']) == (not there)
        assert any(k.startswith(package) for k in names) == there


@pytest.mark.skipif(find_spec('lightly') is None, reason='needs lightly')
def test_same_loss_as_lightly(records):
    assert checks(records['step'], "lightly's")[0]['tolerance'] <= 1e-4


def bench(monkeypatch, words):
    "The command, in this process."
    monkeypatch.syspath_prepend(ROOT / 'scripts')
    import bench as module

    monkeypatch.setattr(sys, 'argv', ['bench.py', *words])
    return module.main


def test_without_optional_packages(monkeypatch, tmp_path, capsys):
    "As on a machine with neither kornia nor lightly."
    file = tmp_path / 'speed.jsonl'
    words = 'views --small --augmentations moco_v2 --case 24:16:4 48:32:2'.split()
    main = bench(monkeypatch, [*words, f'--out={file}'])
    monkeypatch.setattr(sys.modules['bench_report'], 'have', lambda name: False)
    assert main() == 0
    r = read(file)['views']
    second = r['results'][1]
    assert r['left_out'] == ['kornia', 'lightly'] and len(r['results']) == 2
    assert (second['source'], second['size'], second['batch']) == (48, 32, 2)
    names = [k for x in r['results'] for k in x['seconds']]
    assert not [k for k in names if 'kornia' in k or 'lightly' in k] and 'tmp' not in r['command']
    assert capsys.readouterr().out.count('is not installed') == 2


def test_a_record_takes_the_place_of_an_earlier_one(monkeypatch, tmp_path):
    "Others stay; and the file is there as a whole at any time."
    file = tmp_path / 'speed.jsonl'
    file.write_text('{"benchmark": "sampler", "old": 1}\n{"benchmark": "views", "old": 2}\n')
    words = 'sampler --small --grid 8 --batch 4'.split()
    assert bench(monkeypatch, [*words, '--out', str(file)])() == 0
    found = read(file)
    assert list(found) == ['views', 'sampler'] and found['views']['old'] == 2
    assert 'old' not in found['sampler'] and not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize(
    'words, told',
    [
        (['views', '--case', '32:32'], 'SOURCE:SIZE:BATCH'),
        (['views', '--case', '32:0:8'], 'at least 1'),
        (['step', '--batch', '0'], '--batch must be at least 1'),
        (['views', '--device', 'cuda'], 'not for views'),
        (['busy', '--loops', '-1'], '--loops must be at least 0'),
        (['nothing'], 'invalid choice'),
    ],
)
def test_wrong_words(monkeypatch, capsys, words, told):
    with pytest.raises(SystemExit):
        bench(monkeypatch, words)()
    assert told in capsys.readouterr().err


def test_least(monkeypatch, tmp_path, capsys):
    "`--least` fails where it is not reached, and the record is written all the same."
    words = 'sampler --small --grid 8 --num-draws 2 --batch 4 --least 1e9'
    file = tmp_path / 'speed.jsonl'
    main = bench(monkeypatch, [*words.split(), '--out', str(file)])
    assert main() == 1 and 'asked for' in capsys.readouterr().out
    r = read(file)['sampler']
    assert (r['settings']['grid'], r['settings']['num_draws']) == (8, 2)
    assert r['command'] == f'python scripts/bench.py {words}'


def test_busy(records):
    "Every case beside a busy loop, each in a process that knew its variables in time."
    (r,) = records['busy']['results']
    rows = {row['case']: row for row in r['rows']}
    assert list(rows) == ['default', 'OMP_WAIT_POLICY=passive', 'one thread']
    assert all(row['loops'] == 1 and len(row['seconds']) == r['batches'] for row in r['rows'])
    assert all(s > 0 for row in r['rows'] for s in row['seconds'])
    assert rows['one thread']['threads'] == 1 and rows['default']['variables'] == {}
    # the variables of whoever runs the benchmark do not reach the cases
    assert rows['default']['threads'] == rows['OMP_WAIT_POLICY=passive']['threads']
    assert rows['default']['threads'] > 1 or len(os.sched_getaffinity(0)) == 1


def test_a_busy_loop_ends_with_its_case(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'scripts')
    import bench_busy

    begun = []
    popen = subprocess.Popen

    def note(words, **kw):
        begun.append(popen(words, **kw))
        return begun[-1]

    def fail(*a, **kw):
        raise RuntimeError('no measurement')

    monkeypatch.setattr(bench_busy.subprocess, 'Popen', note)
    monkeypatch.setattr(bench_busy.subprocess, 'run', fail)
    with pytest.raises(RuntimeError, match='no measurement'):
        bench_busy.measured({}, 2, 1, True)
    assert len(begun) == 2 and all(process.poll() is not None for process in begun)


def test_memory(records):
    "Fewer tokens keep less; a method without a moving average or a queue holds none."
    rows = records['memory']['results'][0]['rows']
    assert (
        0 < rows['APS']['kept'] < rows['APS, all tokens']['kept']
        and rows['APS']['ema'] == rows['APS']['queue'] == 0
    )
    assert (
        rows['MoCo v3']['ema'] > 0 == rows['MoCo v3']['queue']
        and rows['sce']['queue'] == 4 * 4096 * 128
    )

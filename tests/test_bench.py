"The benchmark runs, its records are whole, and contenders do the same work. Never how long anything takes."
import json, os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
NAMES = ['views', 'sampler', 'step', 'epoch', 'import', 'growth', 'memory', 'paths', 'gpu']

@pytest.fixture(scope='module')
def records(tmp_path_factory):
    "What `all --small` writes: name -> record."
    out = tmp_path_factory.mktemp('speed')
    r = subprocess.run([sys.executable, str(ROOT/'scripts'/'bench.py'), *'all --small --threads 1 --out'.split(), str(out)], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    assert sorted(f.stem for f in out.glob('*.json')) == sorted(NAMES)
    return {f.stem: json.loads(f.read_text()) for f in out.glob('*.json')}

@pytest.mark.parametrize('name', NAMES)
def test_record(records, name):
    "What was run, where and when, and every second of every round."
    r = records[name]
    assert r['benchmark'] == name and r['command'] == 'python scripts/bench.py all --small --threads 1' # no folder of this machine
    assert r['hardware'] and r['threads'] == 1 and r['rounds'] == 1 and r['date'].startswith('20') and {'torch', 'torchvision', 'ssl_patch'} <= set(r['versions'])
    assert r['results']
    for result in r['results']:
        assert result['title']
        if 'ratios' not in result: continue
        assert result['seconds'] and all(len(s) == 1 and s[0] > 0 for s in result['seconds'].values())
        for ratio in result['ratios']:
            slow, fast = (result['seconds'][ratio[k]][0] for k in ('slow', 'fast'))
            assert ratio['low'] == ratio['median'] == ratio['high'] == pytest.approx(slow/fast, rel=1e-3)

def checks(record, words): return [c for c in record['checks'] if words in c['what']]

def test_same_work(records):
    "Ours and the plain rivals give the same losses, crops, colours, coverage."
    assert all(c['ok'] and c['difference'] <= c['tolerance'] for r in records.values() for c in r['checks'])
    assert checks(records['step'], 'loss of our APS and of the plain one')[0]['tolerance'] <= 1e-4
    assert len(checks(records['sampler'], 'fraction')) == 2
    for words in ('crop', 'colour jitter', 'blur', 'attention', 'bf16', 'channels last', 'AdamW', 'EMA', 'tokens', 'queue'): assert checks(records['paths'], words), words

def test_optional_rivals(records):
    "A package that is missing is named, and nothing of it is in the record; one that is there is measured."
    for package in ('kornia', 'lightly'):
        there = find_spec(package) is not None
        assert (package in records['views']['versions']) == there and (package in records['views']['left_out']) == (not there)
        assert any(k.startswith(package) for r in records['views']['results'] for k in r['seconds']) == there

@pytest.mark.skipif(find_spec('lightly') is None, reason='needs lightly')
def test_same_loss_as_lightly(records):
    assert checks(records['step'], "lightly's")[0]['tolerance'] <= 1e-4

def test_without_rivals(monkeypatch, tmp_path, capsys):
    "As on a machine with neither kornia nor lightly."
    monkeypatch.syspath_prepend(ROOT/'scripts')
    import bench as module
    monkeypatch.setattr(module, 'have', lambda name: False)
    monkeypatch.setattr(sys, 'argv', ['bench.py', 'views', '--small', '--recipes', 'strong', '--case', '24:16:4', '48:32:2', f'--out={tmp_path}'])
    assert module.main() == 0
    r = json.loads((tmp_path/'views.json').read_text())
    assert r['left_out'] == ['kornia', 'lightly'] and len(r['results']) == 2 and (r['results'][1]['source'], r['results'][1]['size'], r['results'][1]['batch']) == (48, 32, 2)
    assert not [k for x in r['results'] for k in x['seconds'] if 'kornia' in k or 'lightly' in k] and 'tmp' not in r['command']
    assert capsys.readouterr().out.count('is not installed') == 2

@pytest.mark.parametrize('words, told', [(['views', '--case', '32:32'], 'SOURCE:SIZE:BATCH'), (['views', '--case', '32:0:8'], 'at least 1'), (['step', '--batch', '0'], '--batch must be at least 1'),
                                         (['views', '--device', 'cuda'], 'not for views'), (['nothing'], 'invalid choice')])
def test_wrong_words(monkeypatch, capsys, words, told):
    monkeypatch.syspath_prepend(ROOT/'scripts')
    import bench as module
    monkeypatch.setattr(sys, 'argv', ['bench.py', *words])
    with pytest.raises(SystemExit): module.main()
    assert told in capsys.readouterr().err

def test_least(monkeypatch, tmp_path, capsys):
    "`--least` fails where it is not reached, and the record is written all the same."
    monkeypatch.syspath_prepend(ROOT/'scripts')
    import bench as module
    monkeypatch.setattr(sys, 'argv', ['bench.py', *'sampler --small --grid 8 --draws 2 --batch 4 --least 1e9 --out'.split(), str(tmp_path)])
    assert module.main() == 1 and 'asked for' in capsys.readouterr().out
    r = json.loads((tmp_path/'sampler.json').read_text())
    assert (r['settings']['grid'], r['settings']['draws'], r['command']) == (8, 2, 'python scripts/bench.py sampler --small --grid 8 --draws 2 --batch 4 --least 1e9')

def test_memory(records):
    "Fewer tokens keep less; a method without a moving average or a queue holds none."
    rows = records['memory']['results'][0]['rows']
    assert 0 < rows['APS']['kept'] < rows['APS, all tokens']['kept'] and rows['APS']['ema'] == rows['APS']['queue'] == 0
    assert rows['MoCo v3']['ema'] > 0 == rows['MoCo v3']['queue'] and rows['sce']['queue'] == 4*4096*128

"Names of others stay data: in every table, report and log they are one line and no markup."

import json
import re

import pytest
import torch
from ssl_patch.commands.compare import Compare, Info
from ssl_patch.commands.probe import Probe
from ssl_patch.data.images import ImageData, TensorImages
from ssl_patch.evaluation.records import Record, grid_lines, load_records, table
from ssl_patch.ground.text import in_picture, markdown, plain
from ssl_patch.models.encoders import vit
from ssl_patch.models.files import save_encoder
from ssl_patch.reports.compare import compare
from ssl_patch.reports.experiments import experiment_log
from ssl_patch.reports.fairness import md_table, method_table
from ssl_patch.reports.runs import load_runs
from ssl_patch.training.progress import Progress

ODD = 'a|b\\|c\n| x |\r\x1b[31m<script>alert(1)</script>\u202e![i](http://h/p.png)$x^$&lt;'
BREAKS = re.compile(r'[\r\x0b\x0c\x1b\x85\u2028\u2029\u202e\x00]')


def cells(line):
    "Cells of a Markdown row: bars with an even number of backslashes before them are borders."
    return len(re.findall(r'(?<!\\)(?:\\\\)*\|', line)) - 1


def check_markdown(text, columns=None):
    assert not BREAKS.search(text)
    text = re.sub('`[^`]*`', 'code', text)  # what stands there is shown, never read
    assert not re.search(r'</?script|(?<!\\)\]\(http', text)
    rows = [line for line in text.splitlines() if line.startswith('|')]
    blocks = {cells(r) for r in rows}
    assert columns is None or blocks == {columns}


def check_plain(text, lines):
    assert not BREAKS.search(text) and len(text.rstrip('\n').split('\n')) == lines


@pytest.mark.parametrize(
    'name',
    ['APS', 'naïve – 90 %', 'R@1', 'p < 0.05', 'k=[1, 5]', 'aug_moco_v2', '日本語', 'A & B', ''],
)
def test_usual_names_stay_as_they_are(name):
    assert plain(name) == markdown(name) == in_picture(name) == name


@pytest.mark.parametrize('code', [*range(32), 127, 0x85, 0x2028, 0x2029, 0x202E, 0xDCE9, 0xFEFF])
def test_no_control_code_is_left(code):
    for write in (plain, markdown, in_picture):
        out = write(f'a{chr(code)}b')
        assert out.isprintable() and out[0] == 'a' and out[-1] == 'b' and len(out) > 3
        out.encode()  # can be written anywhere


@pytest.mark.parametrize('before', ['', '\\', '\\\\', '\\\\\\'])
def test_a_bar_stays_in_its_cell_whatever_stands_before_it(before):
    out = markdown(f'a{before}|b')
    assert len(out) - len(out.replace('\\', '')) == 2 * len(before) + 1
    assert cells(f'| {out} |') == 1


def test_tables_and_lines_below():
    check_markdown('\n'.join(grid_lines([ODD, 'x'], [[ODD, '1'], ['b', ODD]])), 2)
    check_markdown(md_table([ODD, 'x'], [[ODD, 1]]), 2)
    assert len(md_table([ODD], [[ODD]]).split('\n')) == 3
    assert md_table(['x'], [['[a](b.ipynb)']], links=True).endswith('| [a](b.ipynb) |')


def odd_record(**more):
    return Record(
        **dict(protocol=ODD, value=0.5, encoder=ODD, data=ODD, chance=0.25, note=ODD) | more,
        architecture=ODD,
        settings={ODD: ODD},
        baselines={ODD: 0.3},
        chosen={ODD: ODD},
        command=f'ssl_patch probe `{ODD}`',
    )


def test_records():
    r = odd_record()
    check_markdown(r._repr_markdown_())
    check_plain(repr(r), 3)
    both = [r, odd_record(value=0.25, encoder=ODD + '2', note='')]
    check_markdown(table(both))
    check_markdown(table(both), 2)


def test_records_are_kept_as_they_are(tmp_path):
    r = odd_record()
    r.save(tmp_path)
    bytes_of_a_name = odd_record(encoder='caf\udce9')  # not UTF-8: as the system gives it
    bytes_of_a_name.save(tmp_path)
    assert load_records(tmp_path) == [r, bytes_of_a_name]
    assert len((tmp_path / 'records.jsonl').read_text('utf-8').split('\n')) == 3


def test_a_record_after_half_a_line_has_a_line_of_its_own(tmp_path):
    first, second = Record('kNN', 0.5, 'e', 'd', 0.1), Record('linear', 0.5, 'e', 'd', 0.1)
    file = first.save(tmp_path)
    whole = file.read_text()
    file.write_text(whole + whole[:60])  # a kill, a full disk
    second.save(tmp_path)
    lines = file.read_text().splitlines()
    assert [json.loads(lines[i])['protocol'] for i in (0, 2)] == ['kNN', 'linear']
    file.write_text('\n'.join([lines[0], lines[2]]))  # the half line removed, as one is told to
    assert load_records(tmp_path) == [first, second]


@pytest.fixture
def runs(tmp_path):
    "Two run folders with odd names in all that they say."
    for n, seed in enumerate((0, 1)):
        folder = tmp_path / f'o|d<b>d$_{{$_seed{seed}'
        odd_record(value=0.5 + n / 10, seed=seed).save(folder)
        odd_record(value=0.4 + n / 10, seed=seed, data='d2|').save(folder)
    odd_record(value=0.2, seed=0).save(tmp_path / 'plain_seed0')
    return tmp_path


def test_reports(runs, tmp_path):
    found = compare(runs, draws=20)
    check_markdown(repr(found))
    check_markdown(found.table)
    check_markdown(found.differences)
    check_markdown(experiment_log({ODD: load_runs(runs)}))
    check_markdown(method_table(load_runs(runs)))
    written = found.save(tmp_path / 'out')  # dollar signs in the picture, too
    check_markdown((written / 'comparison.md').read_text('utf-8'))


@pytest.mark.parametrize('mode', ['lines', 'terminal'])
def test_progress_lines(mode, capsys):
    p = Progress(mode)
    p.start(0, 2)
    p.say(ODD)
    p.epoch(1, ODD, ODD, last=True)
    out = capsys.readouterr().out
    assert '<script>' in out and not re.search('[\x1b\u202e]', out)
    assert mode == 'terminal' or len(out.splitlines()) == 2


def test_what_the_shell_prints(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=g)
    split = lambda a, b: TensorImages(x[a:b], torch.arange(a, b) % 2, [ODD, 'b'])
    data = ImageData(split(0, 16), split(16, 24), ODD)
    net = vit('tiny', size=16, patch=8, width=16, depth=1, heads=2)
    save_encoder(net, tmp_path / 'net.safetensors')
    probe = Probe(
        encoder=str(tmp_path / 'net.safetensors'),
        data='given',
        protocols=('knn',),
        settings=('knn.k=3',),
        device='cpu',
        name=ODD,
        out=str(tmp_path / 'run_seed0'),
    )
    probe.load = lambda run, size, loaded: (data, None)
    probe.go()
    line, told = capsys.readouterr().out.split('\n', 1)
    check_plain(line, 1)
    check_markdown(told, 2)
    Compare((str(tmp_path / 'run_seed0'),)).go()
    check_markdown(capsys.readouterr().out)


def test_what_is_told_of_a_run(tmp_path, capsys):
    config = dict(
        method=ODD,
        data=dict(name=ODD, train=3),
        seed=0,
        started=ODD,
        encoder=dict(kind=ODD),
        slots=dict(loss=ODD),
        train_config=dict(optimizer=ODD, weight_decay=0.1, batch_size=1, epochs=1, warmup_epochs=0),
        lr=0.1,
        hardware=ODD,
        versions=dict(torch=ODD),
    )
    (tmp_path / 'config.json').write_text(json.dumps(config))
    odd_record().save(tmp_path)
    lines = list(Info(str(tmp_path)).lines())
    assert all('\n' not in line for line in lines[:-1]) and not BREAKS.search(''.join(lines))
    check_markdown(lines[-1], 2)

"Records, their file and their table."

import json
import pytest
from ssl_patch.evaluation.records import Record, load_records, table


def record(**kw):
    return Record(
        **{
            **dict(
                protocol='kNN',
                value=0.5,
                encoder='online',
                data='d',
                chance=0.1,
                architecture='vit',
                settings=dict(k=20, T=0.07),
                baselines={'raw pixels': 0.2, 'random encoder': 0.3},
            ),
            **kw,
        }
    )


def test_record_round_trip(tmp_path):
    r = record(value=1 / 3, note='größer', seed=4)
    assert Record.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    r.save(tmp_path / 'new' / 'run')
    record().save(tmp_path / 'new' / 'run')
    assert load_records(tmp_path / 'new' / 'run') == [r, record()]
    assert (
        len((tmp_path / 'new' / 'run' / 'records.jsonl').read_text(encoding='utf-8').splitlines())
        == 2
    )


def test_record_text_holds_all_that_must_stand_beside_a_number():
    for text in (
        repr(record(note='odd labels', seed=3)),
        record(note='odd labels', seed=3)._repr_markdown_(),
    ):
        assert all(
            w in text
            for w in (
                'kNN',
                '0.500',
                'chance 0.100',
                'raw pixels 0.200',
                'random encoder 0.300',
                'k=20',
                'T=0.07',
                'seed 3',
                'odd labels',
            )
        )


@pytest.mark.parametrize(
    'call,word',
    [
        (lambda p: record(value=50.0), 'value'),
        (lambda p: record(value=float('nan')), 'value'),
        (lambda p: record(baselines={'raw pixels': -1}), 'raw pixels'),
        (lambda p: Record.from_dict({**record().to_dict(), 'best': 1}), 'best'),
        (lambda p: Record.from_dict({'value': 0.5}), 'protocol'),
        (lambda p: load_records(p), 'records.jsonl'),
        (lambda p: table([]), 'records must be at least one'),
    ],
)
def test_bad_records(call, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        call(tmp_path)


def cells(t):
    return {
        c[0]: c[1:]
        for line in t.splitlines()
        if line.startswith('| ')
        for c in [[c.strip() for c in line.strip('|').split('|')]]
    }


def test_table_means_and_spread():
    t = table(
        [
            record(value=v, seed=s, baselines={'raw pixels': 0.2, 'random encoder': 0.3 + s / 10})
            for s, v in enumerate((0.4, 0.5, 0.6))
        ]
        + [record(protocol='linear', settings=dict(lr=1.0), value=0.7)]
    )
    assert cells(t) == {
        'top-1': ['kNN', 'linear'],
        'raw pixels': ['0.200', '0.200'],
        'random encoder': ['0.400 ± 0.100', '0.300'],
        'online': ['0.500 ± 0.100', '0.700'],
        'chance': ['0.100', '0.100'],
    }
    assert (
        list(cells(t)) == ['top-1', 'raw pixels', 'random encoder', 'online', 'chance']
        and 'seeds 0, 1, 2' in t
    )
    assert (
        len({len(line) for line in t.splitlines() if line.startswith('|')}) == 1
        and repr(t) == str(t) == t._repr_markdown_()
    )


def test_table_tells_settings_data_encoders_and_architectures_apart():
    t = cells(
        table(
            [
                record(),
                record(settings=dict(k=200, T=0.07), value=0.6),
                record(encoder='target', value=0.55),
            ]
        )
    )
    assert (
        t['top-1'] == ['kNN k=20', 'kNN k=200']
        and t['online'] == ['0.500', '0.600']
        and t['target'] == ['0.550', '–']
    )
    assert cells(table([record(), record(data='e')]))['top-1'] == ['d kNN', 'e kNN']
    assert {'online (vit)', 'online (resnet)', 'random encoder (resnet)'} < set(
        cells(table([record(), record(architecture='resnet')]))
    )
    assert cells(table([record(), record(layer='patch_mean')]))['top-1'] == [
        'kNN image features',
        'kNN patch_mean features',
    ]


def test_a_repeated_record_replaces_the_earlier_one():
    assert cells(table([record(value=0.1), record(value=0.9)]))['online'] == ['0.900']


def test_table_shows_every_baseline_and_metric():
    t = cells(
        table(
            [
                record(),
                record(
                    protocol='linear segmentation',
                    metric='mIoU',
                    layer='patches',
                    baselines={'raw pixels': 0.1, 'place alone': 0.2},
                ),
            ]
        )
    )
    assert t['encoder'] == ['kNN top-1', 'linear segmentation mIoU'] and t['place alone'] == [
        '–',
        '0.200',
    ]
    assert list(t) == ['encoder', 'raw pixels', 'place alone', 'random encoder', 'online', 'chance']


def test_a_record_of_an_older_version_is_read_in_todays_names(tmp_path):
    old = record(encoder='target', tower='target', architecture='vit tiny style=aps').to_dict()
    named = record(encoder='mine', tower='target', architecture='resnet cells=layer3').to_dict()
    old['settings'], named['settings'] = dict(recipe='moco', lr=1.0), {}
    lines = [json.dumps(d) for d in (old, named)]
    (tmp_path / 'records.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    a, b = load_records(tmp_path)
    assert (a.encoder, a.tower, b.encoder, b.tower) == ('momentum', 'momentum', 'mine', 'momentum')
    assert (a.architecture, a.settings) == ('vit tiny variant=aps', dict(config='moco', lr=1.0))
    assert b.architecture == 'resnet feature_layer=layer3'
    a.save(tmp_path)  # measured again today: the same record
    assert len(load_records(tmp_path)) == 2

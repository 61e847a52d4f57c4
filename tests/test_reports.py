"Records of runs, read and compared, on made-up runs; partial ones, and ones that lack a field."

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import mean
import matplotlib
import pytest
import torch
from ssl_patch.data.sources import images
from ssl_patch.evaluation.knn import knn
from ssl_patch.evaluation.records import Record, pack_each
from ssl_patch.methods.aps import APS
from ssl_patch.models.encoders import vit
from ssl_patch.models.files import load_encoder, open_encoder
from ssl_patch.reports.bootstrap import paired_bootstrap
from ssl_patch.reports.compare import compare, scores, seed_noise
from ssl_patch.reports.curves import metric_curve, plot_metric_curves, plot_sweep
from ssl_patch.reports.experiments import experiment_log
from ssl_patch.reports.fairness import (
    check_equal_budget,
    md_table,
    method_table,
    run_facts,
    updates,
)
from ssl_patch.reports.runs import (
    Run,
    keep_runs,
    load_run,
    load_runs,
    method_names,
    missing_runs,
    todays_config,
)
from ssl_patch.training.pretrain import Pretrainer

matplotlib.use('Agg')

CONFIG = dict(
    slots=dict(
        augmentations='weak / moco_v2',
        patch_sampler='all',
        key_encoder='EMA 0.99',
        loss='InfoNCELoss(tau=0.1)',
    ),
    encoder=dict(kind='vit', name='tiny', size=32, patch=4, drop_path=0.0),
    data=dict(name='cifar10', train=1280),
    augmentations=[dict(size=32)] * 2,
    lr=0.06,
    bf16=True,
    train_config=dict(
        epochs=2,
        batch_size=128,
        optimizer='sgd',
        weight_decay=5e-4,
        warmup_epochs=0.8,
        schedule='step',
    ),
    hardware='an abacus',
    versions=dict(torch='2.6', commit='abc1234'),
)
METRICS = 'epoch,batches,loss,seconds,knn\n1,10,4.5,60,\n2,20,3.5,120,0.3\n'


def write(root, name, seed, value, config=CONFIG, metrics=METRICS, protocols=('kNN',), **record):
    folder = root / f'{name}_seed{seed}'
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'metrics.csv').write_text(metrics)
    for p in protocols:
        Record(
            p,
            value,
            name,
            'cifar10',
            0.1,
            seed=seed,
            **dict(n_test=100, baselines={'raw pixels': 0.2, 'random encoder': 0.25}) | record,
        ).save(folder)
    return folder


@pytest.fixture
def runs(tmp_path):
    for name, seed, value in (
        ('MoCo_v2', 0, 0.40),
        ('MoCo_v2', 1, 0.44),
        ('MoCo_v2', 2, 0.42),
        ('CO2', 0, 0.42),
        ('CO2', 1, 0.43),
    ):
        write(tmp_path, name, seed, value)
    return load_runs(tmp_path, ['MoCo v2', 'CO2'])


# ---------------------------------------------------------------- reading
def test_a_folder_as_a_run(tmp_path):
    run = load_run(write(tmp_path, 'APS_power_3_flips_ignored', 12, 0.5))
    assert (run.name, run.seed, run.config) == ('APS gamma 3 flips ignored', 12, CONFIG)
    assert run.history == [
        dict(epoch=1, batches=10, loss=4.5, seconds=60),
        dict(epoch=2, batches=20, loss=3.5, seconds=120, knn=0.3),
    ]
    assert repr(run) == 'APS gamma 3 flips ignored, seed 12: 2 epochs, kNN 0.500'


def test_an_argument_that_was_renamed_is_called_by_its_name_of_today(tmp_path):
    "On reading: the file keeps what was measured under which name."
    folder = write(tmp_path, 'APS_power_10', 0, 0.5, protocols=())
    Record('kNN', 0.5, 'APS power 10', 'cifar10', 0.1).save(folder)
    run = load_run(folder)
    assert (run.name, run.records[0].encoder) == ('APS gamma 10', 'APS gamma 10')
    assert 'APS power 10' in (folder / 'records.jsonl').read_text()
    assert load_run(write(tmp_path, 'all_tokens', 0, 0.5)).name == 'all patches'
    assert load_run(write(tmp_path, 'power_APS_powers', 0, 0.5)).name == 'power APS powers'
    assert '| APS gamma 10 ' in str(experiment_log(tmp_path))
    said = str(experiment_log(tmp_path))
    assert 'as typed at the commit of each run: options may have other names now' in said


@pytest.mark.parametrize('name', ['run', 'run_seed', 'run_seedx', '_seed0'])
def test_a_folder_with_another_name(tmp_path, name):
    write(tmp_path, 'a', 0, 0.5, config={**CONFIG, 'seed': 7}).rename(tmp_path / name)
    run = load_run(tmp_path / name)
    assert (run.name, run.seed, run.folder) == (name, 7, str(tmp_path / name))
    (tmp_path / name / 'config.json').unlink()
    assert load_run(tmp_path / name).seed == 0
    assert compare([tmp_path / name]).values(name, 'kNN') == {0: 0.5}


@pytest.mark.parametrize(
    'gone',
    [
        ['config.json'],
        ['metrics.csv'],
        ['records.jsonl'],
        ['config.json', 'metrics.csv'],
        ['metrics.csv', 'records.jsonl'],
    ],
)
def test_a_folder_that_lacks_files(tmp_path, gone):
    folder = write(tmp_path, 'a', 3, 0.5)
    for f in gone:
        (folder / f).unlink()
    run = load_run(folder)
    assert (
        (run.name, run.seed) == ('a', 3)
        and (run.config == {}) == ('config.json' in gone)
        and (run.history == []) == ('metrics.csv' in gone)
    )
    assert (
        len(load_runs(tmp_path)) == ('records.jsonl' not in gone)
        and len(load_runs(tmp_path, probed=False)) == 1
    )
    run_facts(run)
    metric_curve([run], 'a', 'loss')
    plot_metric_curves([run], [('loss', 'loss')], {})
    method_table([run])
    missing_runs([run], {'a': [3]}, ['kNN'])
    assert 'a' in experiment_log([folder]) and 'not recorded' in experiment_log([folder])
    if 'metrics.csv' in gone:
        with pytest.raises(ValueError, match='no epoch'):
            check_equal_budget([run])


def test_a_folder_that_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / 'nowhere'):
        with pytest.raises(ValueError, match='folder must be a run folder'):
            load_run(folder)


def test_a_list_of_folders(tmp_path):
    one, two = write(tmp_path / 'x', 'a', 0, 0.5), write(tmp_path / 'y', 'b', 0, 0.6)
    assert (
        method_names(load_runs([one, tmp_path / 'y']))
        == ['a', 'b']
        == method_names(load_runs([tmp_path / 'x', two, str(one)]))
    )  # each once
    assert method_names(load_runs(one)) == ['a']
    with pytest.raises(ValueError, match='nowhere'):
        load_runs([one, tmp_path / 'nowhere'])


def test_order_is_given_and_the_rest_follows_by_name(tmp_path):
    for name in ('b', 'a', 'd', 'c'):
        for seed in (10, 2):
            write(tmp_path, name, seed, 0.5)
    runs = load_runs(tmp_path, ['d', 'never run', 'c'])
    assert method_names(runs) == ['d', 'c', 'a', 'b'] and [r.seed for r in runs[:2]] == [2, 10]


def test_a_run_without_probes_is_left_out(tmp_path):
    write(tmp_path, 'a', 0, 0.5, protocols=())
    assert load_runs(tmp_path) == [] == load_runs(tmp_path / 'nowhere')


def test_missing(runs):
    assert missing_runs(runs, {'MoCo v2': [0, 1, 2], 'CO2': [0]}, ['kNN']) == []
    assert missing_runs(runs, {'CO2': [0, 1, 2], 'SCE': [0, 1]}, ['kNN', 'linear']) == [
        'CO2: seed 0, 1 without linear',
        'CO2: seed 2 without any run',
        'SCE: seed 0, 1 without any run',
    ]


# ---------------------------------------------------------------- one file for a family
def plain(runs):
    "Without the place that they were read from."
    return [replace(r, folder=r.folder.rsplit('/', 1)[-1]) for r in runs]


def test_a_file_of_runs_is_read_as_the_folders_are(runs, tmp_path):
    file = keep_runs(tmp_path, tmp_path / 'kept' / 'soft.jsonl')
    again = load_runs(file, ['MoCo v2', 'CO2'])
    assert plain(again) == plain(runs) and len(file.read_text().splitlines()) == 5
    c, d = compare(runs), compare(file, 'MoCo v2')
    assert d.values('CO2', 'kNN') == c.values('CO2', 'kNN')
    assert compare(again).table == c.table and compare(again).differences == c.differences
    assert check_equal_budget(again) == check_equal_budget(runs)
    assert experiment_log([file]) == experiment_log([r.folder for r in runs])
    assert len(load_runs([file, file, *[r.folder for r in runs]])) == 10  # two places, each once
    assert {Path(r.folder).parent.name for r in again} == {'soft'}  # tells two families apart


def test_a_file_of_runs_keeps_every_digit(tmp_path):
    third = 1 / 3
    metrics = f'epoch,batches,loss,seconds,knn\n1,10,{third},60.000000000000014,\n'
    write(tmp_path, 'a', 0, third, metrics=metrics, each=each(0.33), chosen={'wd': 1e-7})
    run = load_run(tmp_path / 'a_seed0')
    (kept_run,) = load_runs(keep_runs(tmp_path, tmp_path / 'x.jsonl'))
    assert plain([kept_run]) == plain([run])
    assert kept_run.history[0] == dict(epoch=1, batches=10, loss=third, seconds=60.000000000000014)
    assert kept_run.records[0].value == third and kept_run.records[0].chosen == {'wd': 1e-7}


def test_runs_are_added_to_a_file_and_take_their_old_place(tmp_path):
    file = tmp_path / 'kept.jsonl'
    keep_runs(write(tmp_path, 'a', 0, 0.5), file)
    keep_runs(write(tmp_path, 'b', 0, 0.6), file)
    keep_runs([write(tmp_path / 'again', 'a', 0, 0.7)], file)
    assert compare(file).values('a', 'kNN') == {0: 0.7} and len(load_runs(file)) == 2
    assert not file.with_suffix('.tmp').exists()


def test_what_is_kept_says_nothing_of_a_machine(tmp_path):
    config = {**CONFIG, 'command': 'ssl_patch pretrain --data /home/me/sets/c.npz', 'cli': {}}
    probe = 'ssl_patch probe /home/me/runs/a_seed0 --data sets/c.npz'
    write(tmp_path, 'a', 0, 0.5, config=config, command=probe, each=each(0.5))
    file = keep_runs(tmp_path, tmp_path / 'kept.jsonl')
    (run,) = load_runs(file)
    assert '/home' not in file.read_text()
    assert run.config['command'] == 'ssl_patch pretrain --data c.npz'
    assert run.records[0].command == 'ssl_patch probe a_seed0 --data sets/c.npz'
    assert run.records[0].each == each(0.5)


def test_unfinished_runs_are_not_kept(tmp_path):
    write(tmp_path, 'a', 0, 0.5)
    write(tmp_path, 'b', 0, 0.5, protocols=())
    file = tmp_path / 'kept.jsonl'
    with pytest.raises(ValueError, match='finished and probed.*b_seed0'):
        keep_runs(tmp_path, file)
    with pytest.raises(ValueError, match='folders with runs'):
        keep_runs(tmp_path / 'nowhere', file)
    assert not file.exists()
    Record('kNN', 0.5, 'dino', 'cifar10', 0.1).save(tmp_path / 'theirs')  # no run of ours
    assert [r.name for r in load_runs(keep_runs(tmp_path / 'theirs', file))] == ['theirs']


def test_a_file_that_holds_no_runs(tmp_path):
    file = tmp_path / 'x.jsonl'
    for text in ('no json\n', '{"run": "a_seed0"}\n', '[1]\n'):
        file.write_text(text)
        with pytest.raises(ValueError, match='x.jsonl, line 1 is not a run'):
            load_runs(file)
        with pytest.raises(ValueError, match='x.jsonl, line 1 is not a run'):
            compare(file)


# ---------------------------------------------------------------- runs from before names changed
OLD = Path(__file__).parent / 'fixtures' / 'old_run' / 'APS_seed0'  # as commit 8ad280a wrote it


def test_an_old_run_folder_is_old():
    "The fixture is left as it was written: its names are not those of today."
    config = json.loads((OLD / 'config.json').read_text())
    assert {'training', 'views'} <= config.keys() and 'target' in config['slots']
    assert 'spread' in (OLD / 'metrics.csv').read_text()
    assert '"tower": "target"' in (OLD / 'records.jsonl').read_text()


def test_an_old_run_is_listed_in_todays_names():
    run = load_run(OLD)
    assert (run.name, run.seed) == ('APS', 0) and len(run.history) == 2
    assert list(run.config['slots']) == [
        'augmentations',
        'patch_sampler',
        'key_encoder',
        'queue',
        'loss',
    ]
    slots = run.config['slots']
    assert slots['augmentations'] == 'aps_cifar / aps_cifar'
    assert slots['patch_sampler'] == (
        'AsymmetricPatchSampler(keep_ratio=0.25, num_draws=4, gamma=3.0, flip_aware=True, '
        'disjoint=True)'
    )
    assert slots['loss'] == 'InfoNCELoss(tau=0.1)'
    assert run.config['encoder']['variant'] == 'aps' and 'style' not in run.config['encoder']
    assert run.config['train_config']['warmup_epochs'] == 0.3
    assert {'grad_clip', 'grad_clip_growth'} <= run.config['train_config'].keys()
    assert [a['name'] for a in run.config['augmentations']] == ['aps_cifar'] * 2
    assert {'pos_sim', 'neg_sim', 'key_std', 'patch_sim_within', 'patch_sim_between'} <= set(
        run.history[0]
    )
    assert run.history[1]['key_std'] == float(_old_column('spread')[1])
    assert [r.tower for r in run.records] == ['online', 'momentum']
    assert all('variant=aps' in r.architecture for r in run.records)
    assert updates(run) == 2 * 4 * 4  # epochs, batches, draws
    assert run_facts(run)['network'].startswith('vit tiny, patch 8, variant aps')
    assert '| APS | aps_cifar' in method_table([run]) and 'momentum tower' in compare(OLD).table


def _old_column(name):
    return [row[name] for row in csv.DictReader((OLD / 'metrics.csv').open(newline=''))]


def test_todays_names_stay():
    config = json.loads((OLD / 'config.json').read_text())
    new = todays_config(config)
    assert todays_config(new) == new == load_run(OLD).config
    assert todays_config(CONFIG) == CONFIG and todays_config({}) == {}
    assert config == json.loads((OLD / 'config.json').read_text())  # what was given is left alone


def test_an_old_run_beside_a_new_one(tmp_path):
    "The same run by today's code: in one table, in one column, and equal in all facts."
    data, folder = images('photos').sample(64, 1008), tmp_path / 'APS_seed1'
    encoder = vit('tiny', size=32, patch=8, width=8, depth=1, heads=2)
    run = Pretrainer(
        APS(encoder, momentum=0.99, hidden=8, out=8),
        data,
        epochs=2,
        batch_size=16,
        seed=1,
        knn_every=1,
        bf16=True,  # as the old one, whatever this machine does natively
        out=folder,
        progress='quiet',
    )
    run.fit()
    knn(run.encoder, run.data, name='APS', seed=1, out=folder)
    old, new = load_run(OLD), load_run(folder)
    assert list(old.config['slots']) == list(new.config['slots'])
    assert old.config['slots'] == new.config['slots']
    younger = {'accumulate', 'reduced_decoding'}
    assert old.config['train_config'].keys() | younger == new.config['train_config'].keys()
    assert old.config['encoder'] == new.config['encoder']
    assert old.config['augmentations'] == new.config['augmentations']
    assert list(old.history[0]) == list(new.history[0])
    ours, theirs = run_facts(new), run_facts(old)
    assert not [k for k in ours if ours[k] != theirs[k]]
    both = compare([OLD, folder])
    assert both.columns == ['kNN'] and both.values('APS, online tower', 'kNN').keys() == {0, 1}
    assert list(both.baselines) == ['raw pixels', 'random encoder']  # one network, one row
    assert check_equal_budget([old, new], ['bfloat16'])


def test_an_old_encoder_opens():
    "Weights of then give the numbers of then, of both towers."
    x = torch.randint(
        0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    found = {}
    for tower in ('online', 'momentum'):
        encoder = open_encoder(OLD, tower=tower)
        assert encoder.spec['variant'] == 'aps' and encoder.tower == tower
        with torch.no_grad():
            found[tower] = encoder(x.float() / 255).image
    first = torch.tensor(
        [1.69856608, -1.08528686, 0.29185349, -1.07930130, -0.89800370, 1.18132446]
    )
    torch.testing.assert_close(found['online'].flatten()[:6], first, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found['online'], found['momentum'])
    torch.testing.assert_close(load_encoder(OLD / 'encoder.safetensors')(x).image, found['online'])


# ---------------------------------------------------------------- what they share
def test_every_draw_is_an_update(runs):
    assert updates(runs[0]) == 20
    sampled = {
        **CONFIG,
        'slots': dict(
            patch_sampler='AsymmetricPatchSampler(keep_ratio=0.25, num_draws=4, gamma=3.0)'
        ),
    }
    assert updates(replace(runs[0], config=sampled)) == 80


def test_facts(runs):
    f = run_facts(runs[0])
    assert f['network'] == 'vit tiny, patch 4' and f['bfloat16'] == 'yes' and f['updates'] == 20
    assert f['optimiser'] == 'sgd, learning rate 0.06, weight decay 0.0005' and f[
        'schedule'
    ].startswith('0.8 epoch')


def test_a_run_from_before_the_fields(tmp_path):
    "Nothing but metrics and probes, and a metrics file without most columns."
    run = load_run(
        write(tmp_path, 'old', 0, 0.5, config={}, metrics='epoch,batches,seconds\n1,10,60\n')
    )
    assert (
        run_facts(run)['optimiser'].startswith('not recorded')
        and run_facts(run)['bfloat16'] == 'not recorded'
    )
    for shown in (
        check_equal_budget([run]),
        method_table([run]),
        compare([run]).table,
        experiment_log([run]),
    ):
        assert shown
    assert metric_curve([run], 'old', 'loss') == ([], [])
    plot_metric_curves([run], [('loss', 'loss')], {})
    compare([run]).plot()
    new = load_run(write(tmp_path, 'new', 0, 0.6))
    with pytest.raises(ValueError, match='differs: .*old.*new|differs: .*new.*old'):
        check_equal_budget([run, new])


def test_budget(runs):
    text = check_equal_budget(runs)
    assert (
        '|  | 5 runs |' in text
        and '| seeds | 0, 1, 2 |' in text
        and '| training, one run | 2.0 minutes (2.0 to 2.0) |' in text
    )
    assert '| versions | torch 2.6 |' in text and '| commits of the project | abc1234 |' in text
    with pytest.raises(ValueError, match='runs must be at least one run'):
        check_equal_budget([])


def test_budget_names_those_that_differ(runs):
    odd = [replace(r, config={**CONFIG, 'lr': 0.03}) if r.name == 'CO2' else r for r in runs]
    with pytest.raises(ValueError, match=r'optimiser differs: .*0\.06.*MoCo v2.*0\.03.*CO2'):
        check_equal_budget(odd)
    with pytest.raises(ValueError, match='optimiser'):
        check_equal_budget(odd, ['updates'])
    said = 'sgd, learning rate {}, weight decay 0.0005 ({})'.format
    both = f'{said(0.06, "MoCo v2")}; {said(0.03, "CO2")}'
    assert both in check_equal_budget(odd, ['optimiser'])


def test_budget_wants_whole_runs(runs):
    with pytest.raises(ValueError, match='MoCo v2, seed 0: stopped after epoch 1'):
        check_equal_budget([replace(runs[0], history=runs[0].history[:1]), *runs[1:]])


def test_methods_show_slots_that_are_filled(runs):
    dense = replace(
        runs[-1],
        name='DenseCL',
        config={**CONFIG, 'slots': CONFIG['slots'] | dict(patch_loss='DenseCLLoss(tau=0.1)')},
    )
    assert 'patch_loss' not in method_table(runs)
    lines = method_table([*runs, dense]).splitlines()
    assert (
        lines[0].endswith('| patch_loss |')
        and lines[2].endswith('| – |')
        and lines[-1].endswith('| DenseCLLoss(tau=0.1) |')
        and len(lines) == 5
    )
    assert method_table(runs, ['loss']).splitlines()[0] == '| method | loss |'


def test_md_table():
    t = md_table(['a', 'b'], [[1, 0.5], ['x', None]])
    assert t._repr_markdown_() == '| a | b |\n| --- | --- |\n| 1 | 0.5 |\n| x | None |'


# ---------------------------------------------------------------- what they reached
def test_scores(runs):
    assert scores(runs, 'kNN') == {
        'raw pixels': {0: 0.2, 1: 0.2, 2: 0.2},
        'random encoder': {0: 0.25, 1: 0.25, 2: 0.25},
        'MoCo v2': {0: 0.40, 1: 0.44, 2: 0.42},
        'CO2': {0: 0.42, 1: 0.43},
    }
    assert scores(runs, 'linear') == {}


def test_random_encoders_of_two_networks_are_kept_apart(tmp_path):
    for name, variant, v in (('MoCo_v3', 'moco_v3', 0.3), ('APS', 'aps', 0.2)):
        write(
            tmp_path,
            name,
            0,
            0.5,
            architecture=f'vit tiny variant={variant}',
            baselines={'raw pixels': 0.1, 'random encoder': v},
        )
    assert scores(load_runs(tmp_path, ['MoCo v3']), 'kNN') == {
        'raw pixels': {0: 0.1},
        'random encoder, variant=moco_v3': {0: 0.3},
        'random encoder, variant=aps': {0: 0.2},
        'MoCo v3': {0: 0.5},
        'APS': {0: 0.5},
    }


def each(value, n=100, seed=0):
    return pack_each(
        torch.randperm(n, generator=torch.Generator().manual_seed(seed)) < round(n * value)
    )


def test_a_protocol_in_several_ways(tmp_path):
    folder = write(tmp_path, 'a', 0, 0.5)
    Record('kNN', 0.4, 'a', 'cifar10', 0.1, settings=dict(k=200), n_test=100).save(folder)
    c = compare([folder])
    assert c.columns == ['kNN', 'kNN k=200'] and c.values('a', 'kNN k=200') == {0: 0.4}
    with pytest.raises(ValueError, match='several ways'):
        scores(c.runs, 'kNN')


def test_table(runs, tmp_path):
    write(
        tmp_path / 'more',
        'Dense',
        0,
        0.3,
        protocols=('linear segmentation',),
        metric='mIoU',
        baselines={'place alone': 0.15},
    )
    lines = [
        [c.strip() for c in line.split('|')[1:-1]]
        for line in compare([*runs, *load_runs(tmp_path / 'more')])
        .table.split('\n\n')[0]
        .splitlines()
    ]
    assert lines[0] == ['%', 'kNN top-1', 'linear segmentation mIoU', 'seeds']
    assert lines[2:] == [
        ['chance', '10.0', '10.0', ''],
        ['raw pixels', '20.0', '–', '3'],
        ['place alone', '–', '15.0', '1'],
        ['random encoder', '25.0', '–', '3'],
        ['MoCo v2', '42.0 ± 2.0', '–', '3'],
        ['CO2', '42.5 ± 0.7', '–', '2'],
        ['Dense', '–', '30.0', '1'],
    ]


def test_a_cell_with_fewer_seeds_says_so(runs):
    Record('linear', 0.5, 'MoCo v2', 'cifar10', 0.1, seed=1, n_test=100).save(runs[1].folder)
    c = compare([load_run(r.folder) for r in runs])
    assert '| 50.0 (1 seed) |     3 |' in c.table and c.rows[0] == 'MoCo v2'


@pytest.mark.parametrize(
    'other',
    [
        dict(n_test=50),
        dict(n_train=7),
        dict(settings=dict(k=1)),
        dict(data='cifar100'),
        dict(layer='patch_mean'),
        dict(metric='mAP'),
    ],
)
def test_what_may_not_be_compared(tmp_path, other):
    folder = write(tmp_path, 'b', 0, 0.6, protocols=())
    replace(Record('kNN', 0.6, 'b', 'cifar10', 0.1, n_test=100), **other).save(folder)
    c = compare([write(tmp_path, 'a', 0, 0.5), folder])
    assert len(c.columns) == 2 == len(set(c.columns)) and c.gaps('b', 'a', c.columns[0]) == {}
    assert 'b and a have no column in common: they are not compared' in c.differences
    assert c.differences.splitlines()[2].count('–') == 2


def test_rows_never_mix(tmp_path):
    one = write(tmp_path / 'x', 'a', 0, 0.5, tower='online', settings=dict(k=1))
    Record('kNN', 0.6, 'a', 'cifar10', 0.1, tower='momentum', settings=dict(k=1), n_test=100).save(
        one
    )
    assert compare([one]).rows == ['a, online tower', 'a, momentum tower']
    assert compare([one, write(tmp_path / 'x', 'old', 0, 0.5)]).rows[-1] == 'old, unnamed tower'
    assert compare(
        [
            write(tmp_path / 'l', 'a', 0, 0.5),
            write(tmp_path / 'l', 'a', 1, 0.5, config={**CONFIG, 'lr': 0.03}),
        ]
    ).rows == [f'a, sgd, learning rate {lr}, weight decay 0.0005' for lr in ('0.06', '0.03')]
    assert compare(
        [write(tmp_path / 'here', 'a', 0, 0.5), write(tmp_path / 'there', 'a', 0, 0.6)]
    ).rows == ['a, here', 'a, there']
    assert compare(
        [
            write(tmp_path / 'n', 'a', 0, 0.5),
            write(tmp_path / 'n', 'a', 1, 0.6, config={}, metrics='epoch\n1\n'),
        ]
    ).rows == ['a']  # not known is no difference
    theirs = tmp_path / 'theirs'
    for name, v in (('dino', 0.5), ('moco', 0.6)):
        Record('kNN', v, name, 'cifar10', 0.1).save(theirs)
    assert compare(theirs).rows == ['theirs, dino', 'theirs, moco']
    theirs = tmp_path / 'two'
    for name, p in (('dino', 'kNN'), ('moco', 'linear')):
        Record(p, 0.5, name, 'cifar10', 0.1).save(theirs)
    assert compare(theirs).rows == ['two, dino', 'two, moco']  # though no column has both
    with pytest.raises(ValueError, match='given twice'):
        compare([load_run(one), load_run(one)])


def test_seeds_of_the_probe_are_averaged(tmp_path):
    folder = write(tmp_path, 'a', 4, 0.5)
    Record('kNN', 0.7, 'a', 'cifar10', 0.1, seed=9, n_test=100).save(folder)
    assert compare([folder]).values('a', 'kNN') == {4: pytest.approx(0.6)}
    theirs = tmp_path / 'theirs'
    for s in (0, 1):
        Record('kNN', 0.5 + 0.1 * s, 'x', 'cifar10', 0.1, seed=s).save(
            theirs
        )  # nothing is known of the run: the records' seeds
    assert compare(theirs).values('theirs', 'kNN') == {0: 0.5, 1: 0.6}


def test_protocols_are_chosen_and_ordered(tmp_path):
    folder = write(tmp_path, 'a', 0, 0.5, protocols=('kNN', 'linear', 'svm'))
    assert compare([folder], protocols=['svm', 'kNN']).columns == ['svm', 'kNN']
    assert (
        compare([folder], protocols='kNN').columns
        == ['kNN']
        == compare(folder, protocols=('kNN',)).columns
    )
    for wrong in ('knn', ['kNN', 'knn'], [], 3):
        with pytest.raises(ValueError, match='protocols must be among kNN, linear, svm, got'):
            compare([folder], protocols=wrong)
    with pytest.raises(ValueError, match='runs must be at least one run'):
        compare([])
    with pytest.raises(ValueError, match="baseline must be one of a, got 'b'"):
        compare([folder], 'b')


def test_differences(runs):
    c = compare(runs)
    assert c.gaps('CO2', 'MoCo v2', 'kNN') == pytest.approx(
        {0: 2, 1: -1}
    )  # seed 2 has one of them alone
    assert (
        '| CO2 over MoCo v2 | +0.5 (-1.6 to +2.6; above in 1 of 2) |' in c.differences
        and 'bootstrap over seeds alone, which is rough' in c.differences
    )
    one = compare([r for r in runs if r.seed == 0])
    assert (
        '| +2.0 (one seed) |' in one.differences
        and 'no interval where there is one seed' in one.differences
    )
    assert '| no seed in common |' in compare([runs[0], runs[-1]]).differences
    assert (
        'MoCo v2 over CO2' in compare(runs, 'CO2').differences
        and 'no pair' in compare(runs[:3]).differences
    )
    with pytest.raises(ValueError, match='SCE'):
        c.between([('SCE', 'CO2')])


def test_intervals_take_images_where_they_are_kept(tmp_path):
    for name, v in (('a', 0.4), ('b', 0.5), ('c', 0.6)):
        write(tmp_path, name, 0, v, **({} if name == 'c' else dict(each=each(v, seed=len(name)))))
    c = compare(tmp_path)
    d, e = (compare(tmp_path).between([('b', n)]) for n in 'ac')
    assert '; one seed)' in d and '- bootstrap over test images' in d and '(one seed)' in e
    assert '- bootstrap over test images\n- no interval where' in c.differences
    write(tmp_path / 'odd', 'a', 0, 0.4, each=each(0.5))
    write(tmp_path / 'odd', 'b', 0, 0.5, each=each(0.5))  # a value that is no mean of these
    assert 'no interval' in compare(tmp_path / 'odd').differences


def test_what_was_drawn_is_told_by_column_and_row(tmp_path):
    for s in (0, 1):
        for name, v in (('a', 0.4), ('b', 0.5), ('c', 0.6)):
            write(
                tmp_path,
                name,
                s,
                v,
                **({} if name == 'c' else dict(each=each(v, seed=10 * s + len(name)))),
            )
    text = compare(tmp_path).differences
    assert (
        '- kNN (b): bootstrap over seeds and test images' in text
        and '- kNN (c): bootstrap over seeds alone' in text
    )


def test_intervals_come_again(tmp_path):
    for name, v in (('a', 0.4), ('b', 0.5)):
        for s in range(3):
            write(tmp_path, name, s, v, each=each(v, seed=10 * s + len(name)))
    assert (
        compare(tmp_path).differences
        == compare(tmp_path).differences
        != compare(tmp_path, seed=1).differences
    )
    assert '- bootstrap over seeds and test images' in compare(tmp_path).differences


def test_save_and_csv(runs, tmp_path):
    c = compare(runs)
    c.save(tmp_path / 'out' / 'deep')
    assert sorted(f.name for f in (tmp_path / 'out' / 'deep').iterdir()) == [
        'comparison.csv',
        'comparison.md',
        'comparison.png',
    ]
    rows = list(csv.DictReader((tmp_path / 'out' / 'deep' / 'comparison.csv').open(newline='')))
    assert (
        len(rows) == 5
        and rows[0]['method'] == 'MoCo v2'
        and rows[0]['seed'] == '0'
        and float(rows[0]['value']) == 0.4
        and rows[0]['raw pixels'] == '0.2'
    )
    assert json.loads(rows[0]['settings']) == {} and rows[0]['seconds'] == rows[0]['hardware'] == ''
    text = (tmp_path / 'out' / 'deep' / 'comparison.md').read_text()
    assert c.table in text and c.differences in text and c._repr_markdown_() == repr(c)


# ---------------------------------------------------------------- images, seeds, notes
def half(root, name, seed, right, test, **kw):
    "A run that was measured on 50 images with a hash."
    return write(
        root,
        name,
        seed,
        right.float().mean().item(),
        each=pack_each(right),
        n_test=50,
        images={'train': 't', 'test': test} if test else {},
        **kw,
    )


def test_other_test_images_are_never_paired(tmp_path):
    "Two disjoint halves of one test set, as many images of each class: only the hash tells."
    y = torch.arange(100) % 10
    first, second = y[:50], y[50:]
    assert first.bincount().equal(second.bincount())
    for s in range(2):
        half(tmp_path, 'a', s, torch.arange(50) % 3 > 0, 'aaaaaa1')
        half(tmp_path, 'b', s, torch.arange(50) % 2 > 0, 'bbbbbb1')
    c = compare(tmp_path)
    assert (
        c.columns == ['kNN test_images=aaaaaa', 'kNN test_images=bbbbbb']
        and c.gaps('b', 'a', c.columns[0]) == {}
    )
    assert 'b and a have no column in common' in c.differences and 'bootstrap' not in c.differences
    with pytest.raises(ValueError, match='several ways'):
        scores(c.runs, 'kNN')
    same = {h: tmp_path / f'with{h}' for h in ('', 'aaaaaa1')}
    for h, root in same.items():  # the same images, or not known: paired
        half(root, 'a', 0, torch.arange(50) % 3 > 0, 'aaaaaa1')
        half(root, 'b', 0, torch.arange(50) % 2 > 0, h)
        assert (
            compare(root).columns == ['kNN']
            and '- bootstrap over test images' in compare(root).differences
        )
    half(tmp_path, 'c', 0, torch.arange(50) % 2 > 0, '')  # which of the two, nobody knows
    assert compare(tmp_path).columns[-1] == 'kNN test_images=not_recorded'


def test_other_training_images_are_told(tmp_path):
    for s in (0, 1):
        write(tmp_path, 'a', s, 0.5, images=dict(train=str(s), test='x'))
    assert (
        compare(tmp_path).columns == ['kNN']
        and '- kNN: 2 different sets of training images' in compare(tmp_path).table
    )


@pytest.mark.parametrize(
    'n,said',
    [
        (1, 'one seed: such an interval says nothing about other seeds'),
        (2, '61 % of experiments with 2 seeds'),
        (3, '81 % of experiments with 3 seeds'),
        (4, '84 % of experiments with 4 seeds'),
        (5, None),
    ],
)
def test_few_seeds_are_told_beneath_every_table_of_differences(tmp_path, n, said):
    for s in range(n):
        for name, v in (('a', 0.4), ('b', 0.5)):
            write(tmp_path, name, s, v + 0.01 * s, each=each(v + 0.01 * s, seed=10 * s + len(name)))
    c = compare(tmp_path)
    for text in (c.differences, c.between([('a', 'b')])):
        assert (said in text) if said else 'few seeds' not in text
    assert ('too short' in c.plot().get_suptitle()) == (n < 5)


@pytest.mark.parametrize(
    'wrong,why',
    [
        (dict(runs=None), 'runs must be .* got None'),
        (dict(runs=[None]), 'runs must be .* got None'),
        (dict(runs=3), 'runs must be .* got 3'),
        (dict(draws='a'), "draws must be .* got 'a'"),
        (dict(draws=0), 'draws must be .* got 0'),
        (dict(draws=True), 'draws must be .* got True'),
        (dict(seed='x'), "seed must be .* got 'x'"),
    ],
)
def test_compare_names_what_is_wrong(runs, wrong, why):
    with pytest.raises(ValueError, match=why):
        compare(**{'runs': runs} | wrong)


def test_compare_names_a_folder_without_records(tmp_path):
    (tmp_path / 'empty').mkdir()
    write(tmp_path, 'a', 0, 0.5, protocols=())
    good = write(tmp_path / 'more', 'b', 0, 0.5)
    for given in (
        tmp_path / 'empty',
        tmp_path / 'a_seed0',
        tmp_path / 'nowhere',
        [good, tmp_path / 'empty'],
        [good, str(tmp_path / 'a_seed0')],
    ):
        bad = given[-1] if isinstance(given, list) else given
        with pytest.raises(ValueError, match=f'{bad}'):
            compare(given)
    with pytest.raises(ValueError, match='runs with records, got .a'):
        compare([load_run(tmp_path / 'a_seed0')])
    for given in (None, 3, [None]):
        with pytest.raises(ValueError, match='folders must be a folder'):
            load_runs(given)
        with pytest.raises(ValueError, match='folders must be a folder'):
            experiment_log(given)
    with pytest.raises(ValueError, match='empty'):
        experiment_log(tmp_path / 'empty')
    with pytest.raises(ValueError, match='folders must be at least one'):
        experiment_log({})


@pytest.mark.parametrize('seed', [0, 3])
def test_the_seed_of_a_folder_that_says_it(tmp_path, seed):
    for p in ('kNN', 'linear'):
        Record(p, 0.5, 'a', 'cifar10', 0.1, seed=7).save(tmp_path / f'a_seed{seed}')
    c = compare(tmp_path)
    assert c.values('a', 'kNN') == {seed: 0.5} and c.notes_of_rows == [
        f'a: the run of seed {seed} was measured with seed 7'
    ]
    assert f'- a: the run of seed {seed} was measured with seed 7' in c.table
    Record('kNN', 0.6, 'a', 'cifar10', 0.1, seed=seed).save(tmp_path / f'b_seed{seed}')
    assert len(compare(tmp_path).notes_of_rows) == 1


def test_notes_stand_with_their_rows(tmp_path):
    for name, s, more in (
        ('a', 0, ''),
        ('a', 1, ''),
        ('b', 0, ''),
        ('b', 1, '; 5 test images are in train too: kept'),
        ('c', 0, '; from JPEGs'),
    ):
        write(tmp_path, name, s, 0.5, note='ten classes' + more, protocols=('kNN', 'linear'))
    c = compare(tmp_path)
    assert c.notes_of_rows == [
        'b (seed 1) in kNN and linear: 5 test images are in train too: kept',
        'c in kNN and linear: from JPEGs',
    ]
    assert (
        c.table.count('ten classes') == 1
        and '- b (seed 1) in kNN and linear: 5 test images' in c.table
        and c.table in repr(c)
    )
    text = experiment_log(tmp_path)
    leak = 'b (seed 1) in kNN and linear: 5 test images are in train too: kept.'
    assert f'\ncifar10: ten classes.\n{leak}\n' in text
    only = compare(tmp_path / 'b_seed1')
    assert (
        '5 test images are in train too: kept' in only.table and only.notes_of_rows == []
    )  # all records say it: with the data


# ---------------------------------------------------------------- the bootstrap
def right(p, seeds, images, key):
    return {
        s: torch.rand(images, generator=torch.Generator().manual_seed(1000 * key + s)) < p
        for s in range(seeds)
    }


@pytest.mark.parametrize('seeds,images', [(1, 80), (3, 80), (4, 1)])
def test_bootstrap_against_a_double_loop(seeds, images):
    a, b = right(0.7, seeds, images, 1), right(0.5, seeds, images, 2)
    found, g = [], random.Random(0)
    for _ in range(2000):
        s, i = g.choices(range(seeds), k=seeds), torch.tensor(g.choices(range(images), k=images))
        ahead = [(a[k].double()[i] - b[k].double()[i]).mean().item() for k in range(seeds)]
        centre = mean(ahead)
        found.append(
            centre
            + (
                math.sqrt(seeds / (seeds - 1)) * (mean(ahead[k] for k in s) - centre)
                if seeds > 1
                else 0
            )
        )
    m, low, high = paired_bootstrap(a, b, draws=20_000)
    assert m == pytest.approx(mean((a[s].double() - b[s].double()).mean().item() for s in a))
    assert (low, high) == pytest.approx(
        torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist(), abs=0.03
    )


@pytest.mark.parametrize('seeds', [2, 3, 5])
def test_the_seed_part_is_as_wide_as_the_variance_between_seeds_says(seeds):
    "Seeds alike in all images: the spread is an unbiased standard error, not sqrt((S-1)/S) of it."
    d = torch.linspace(-1, 1, seeds).double()
    u = torch.cartesian_prod(*[d] * seeds).reshape(-1, seeds).mean(1) * math.sqrt(
        seeds / (seeds - 1)
    )  # all draws there are
    assert u.var(correction=0).item() == pytest.approx((d.var() / seeds).item())
    _, low, high = paired_bootstrap(
        {s: v.item() for s, v in enumerate(d)}, dict.fromkeys(range(seeds), 0.0), draws=40_000
    )
    assert (low, high) == pytest.approx(
        u.repeat(1000).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist(), abs=0.02
    )


def test_bootstrap_of_a_normal_mean():
    "One seed, many images: the interval is the textbook's."
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    m, low, high = paired_bootstrap({0: x}, {0: torch.zeros(4000)}, draws=8000)
    half = 1.96 * x.std().item() / 4000**0.5
    assert (low - m, high - m) == pytest.approx((-half, half), rel=0.06)


def test_bootstrap_ignores_seeds_that_one_lacks_and_says_when_there_is_nothing():
    a, b = {0: 0.5, 1: 0.7, 2: 0.9}, {1: 0.4, 0: 0.4}
    assert paired_bootstrap(a, b)[0] == pytest.approx(0.2)
    assert [math.isnan(x) for x in paired_bootstrap({0: 0.5}, {0: 0.4})] == [False, True, True]
    assert paired_bootstrap({0: 0.5, 1: right(0.5, 1, 9, 0)[0]}, {0: 0.4, 1: 0.4})[
        0
    ] == pytest.approx((0.1 + right(0.5, 1, 9, 0)[0].double().mean().item() - 0.4) / 2)
    with pytest.raises(ValueError, match='none in common'):
        paired_bootstrap({0: 0.5}, {1: 0.5})
    with pytest.raises(ValueError, match='same images'):
        paired_bootstrap(right(0.5, 1, 9, 0), right(0.5, 1, 8, 0))
    with pytest.raises(ValueError, match='draws must be .* got 0'):
        paired_bootstrap(a, b, draws=0)


def test_bootstrap_is_the_same_again_and_bounded_in_memory():
    a, b = right(0.7, 3, 50_000, 1), right(0.7, 3, 50_000, 2)
    assert (
        paired_bootstrap(a, b, draws=200)
        == paired_bootstrap(a, b, draws=200)
        != paired_bootstrap(a, b, draws=200, seed=1)
    )


def test_noise(runs, tmp_path):
    # mean accuracy .422; sqrt(.422 x .578 / 100) = .0494
    coin = 'kNN: equal signs in 3 seeds have probability 0.25 by chance'
    error = 'standard error of one accuracy on 100 test images: 4.9 points'
    assert seed_noise(runs, 'kNN') == f'{coin}; {error}'
    write(tmp_path / 'more', 'a', 0, 0.3, metric='mIoU')
    assert 'standard error' not in seed_noise(load_runs(tmp_path / 'more'), 'kNN')
    with pytest.raises(ValueError, match='linear'):
        seed_noise(runs, 'linear')


# ---------------------------------------------------------------- pictures
def test_curves_take_epochs_that_all_have(runs):
    other = replace(runs[0], history=[dict(epoch=2.0, loss=1.5)])
    assert metric_curve([*runs[1:3], other], 'MoCo v2', 'loss') == (
        [2],
        [pytest.approx((3.5 + 3.5 + 1.5) / 3)],
    )
    assert metric_curve(runs, 'CO2', 'knn', lambda v: 100 * v) == ([2], [30.0])
    assert metric_curve(runs, 'SCE', 'loss') == ([], [])


def test_plot(runs, tmp_path):
    write(
        tmp_path / 'more',
        'Dense',
        0,
        0.3,
        protocols=('linear segmentation',),
        metric='mIoU',
        baselines={'place alone': 0.15},
    )
    fig = compare([*runs, *load_runs(tmp_path / 'more')]).plot({'CO2': 'tab:green'})
    top, seg, gap, none = fig.axes
    assert [t.get_text() for t in top.get_yticklabels()] == [
        'raw pixels',
        'place alone',
        'random encoder',
        'MoCo v2',
        'CO2',
        'Dense',
    ]  # one row for both panels
    assert [ax.get_xlabel() for ax in fig.axes] == [
        'top-1 accuracy, %',
        'mIoU, %',
        'points above MoCo v2',
        'points above MoCo v2',
    ]
    assert (
        top.get_title().endswith('chance 10 %')
        and none.lines[0].get_color() == 'black'
        and len(none.lines) == 1
    )
    last = top.get_lines()[-2]
    assert (
        last.get_color() == 'tab:green'
        and list(last.get_xdata()) == [42, 43]
        and list(last.get_ydata()) == [4, 4]
    )
    interval, points, bar = gap.get_lines()[:3]
    assert (
        list(points.get_xdata()) == pytest.approx([2, -1])
        and list(bar.get_xdata()) == pytest.approx([0.5, 0.5])
        and list(interval.get_xdata())
        == pytest.approx([0.5 - 1.5 * 2**0.5, 0.5 + 1.5 * 2**0.5], abs=1e-4)
    )


def test_plot_of_many_columns_and_of_one_method(tmp_path):
    folder = write(tmp_path, 'a', 0, 0.5, protocols=[f'p{i}' for i in range(5)])
    fig = compare([folder]).plot()
    assert len(fig.axes) == 6 and [
        ax.get_title().split('\n')[0] for ax in fig.axes if ax.axison
    ] == [f'p{i}' for i in range(5)]


def test_sweep(runs):
    (ax,) = plot_sweep(runs, {'MoCo v2': 3, 'CO2': 1}, 'a number', ['kNN'])
    lines = {l.get_label(): (list(l.get_xdata()), list(l.get_ydata())) for l in ax.get_lines()}
    assert (
        lines['seed 0'] == ([1, 3], [42, 40])
        and lines['seed 2'] == ([3], [42])
        and lines['mean'] == ([1, 3], [pytest.approx(42.5), pytest.approx(42)])
    )


def test_curves(runs):
    axs = plot_metric_curves(
        runs,
        [
            ('loss', 'loss'),
            ('knn', 'kNN, %', lambda v: 100 * v),
            ('patch_sim_within', 'within'),
            ('seconds', 'time'),
        ],
        {'MoCo v2': 'black'},
        columns=2,
    )
    assert len(axs) == 4 and [len(ax.get_lines()) for ax in axs] == [2, 2, 0, 2]
    assert axs[2].texts[0].get_text() == 'not recorded'
    assert list(axs[1].get_lines()[0].get_ydata()) == [30] and [
        l.get_color() for l in axs[0].get_lines()
    ] == ['black', 'grey']
    assert [t.get_text() for t in axs[0].figure.legends[0].get_texts()] == ['MoCo v2', 'CO2']


def test_a_run_is_plain_data():
    assert Run('a', 0, {}, [], []) == Run('a', 0, {}, [], [])


# ---------------------------------------------------------------- the log
COMMAND = (
    'ssl_patch pretrain --out runs/soft/{} --data /data/sets/cifar10.npz --method co2 '
    '--seed {} --progress lines'
)


def kept(root, name, seed, value, config=CONFIG, **kw):
    return write(
        root,
        name,
        seed,
        value,
        {
            **config,
            'seed': seed,
            'started': f'2026-11-2{seed}T09:00:00',
            'command': COMMAND.format(f'{name}_seed{seed}', seed),
        },
        **kw,
    )


def test_log(tmp_path):
    for name, v in (('CO2', 0.5), ('MoCo_v2', 0.4)):
        for s in (0, 1):
            kept(tmp_path, name, s, v + 0.02 * s)
    text = experiment_log(tmp_path)
    rows = [
        [c.strip() for c in line.split('|')[1:-1]] for line in text.split('\n\n')[0].splitlines()
    ]
    assert rows[0] == ['%', 'no.', 'kNN', 'training time'] and [r[0] for r in rows[2:]] == [
        'chance',
        'raw pixels',
        'random encoder',
        'CO2',
        'MoCo v2',
    ]
    assert rows[-2] == ['CO2', '1', '51.0 ± 1.4', '2.0 min'] and rows[-1][1] == '2'
    network = 'network vit tiny, patch 4; epochs 2; batch 128; seeds 0, 1; '
    cost = 'probe time not recorded; hardware an abacus; started 2026-11-20 / 2026-11-21; '
    assert f'{network}{cost}commit abc1234; versions torch 2.6.' in text
    assert '\nkNN: top-1 on cifar10.\n' in text
    assert (
        '1. CO2: `ssl_patch pretrain --out CO2_seedN --data cifar10.npz --method co2 --seed N`\n'
        in text
    )  # once for both seeds
    assert 'details' not in experiment_log(tmp_path, commands=False) and '/data/' not in text


def test_log_in_groups(tmp_path):
    for d in 'xy':
        kept(tmp_path / d, 'a', 0, 0.5)
    kept(
        tmp_path / 'y',
        'b',
        1,
        0.6,
        config={
            **CONFIG,
            'hardware': 'a slide rule',
            'method': 'SCE',
            'data': dict(name='stl10', train=9),
        },
        hardware='',
        seconds=12.0,
    )
    text = experiment_log(
        {'one': tmp_path / 'x', 'two': [tmp_path / 'y' / 'a_seed0', tmp_path / 'y' / 'b_seed1']}
    )
    assert '**one**' in text and '**two**' in text and '| b (SCE) ' in text.replace('  ', ' ')
    assert (
        '3. b: `' in text and '; hardware a slide rule; started 2026-11-21' in text
    )  # numbers go on; what differs is told
    assert ' stl10, 9 training images |' in text and ' 12 s |' in text and ' not recorded |' in text
    with pytest.raises(ValueError, match="with runs for 'one'"):
        experiment_log({'one': tmp_path / 'nowhere'})


def test_log_of_runs_that_were_never_probed(tmp_path):
    kept(tmp_path, 'a', 0, 0.5, protocols=())
    kept(tmp_path, 'b', 0, 0.5)
    assert '| a              |   2 |    – |' in experiment_log(tmp_path)
    assert '| a |   1 |' in experiment_log([tmp_path / 'a_seed0'])


def test_log_says_once_what_networks_share(tmp_path):
    for i, variant in enumerate(('aps', 'moco_v3')):
        kept(
            tmp_path,
            f'm{i}',
            0,
            0.5,
            config={**CONFIG, 'encoder': dict(kind='vit', name='tiny', patch=4, variant=variant)},
        )
    assert 'network vit tiny, patch 4, and as said in each row.' in experiment_log(
        tmp_path
    ) and '| variant moco_v3 |' in experiment_log(tmp_path)


def test_log_orders_numbers(tmp_path):
    for p in ('10', '3', '0.5', '0.25'):
        kept(tmp_path, f'p_{p}', 0, 0.5)
    assert [
        line.split('|')[1].strip()
        for line in experiment_log(tmp_path).split('\n\n')[0].splitlines()[5:]
    ] == ['p 0.25', 'p 0.5', 'p 3', 'p 10']


def test_log_tells_how_it_was_measured(tmp_path):
    for s in (0, 1):
        both = 'ssl_patch probe runs/x/a_seed0 runs/x/a_seed1 --data /data/c.npz'
        kept(
            tmp_path,
            'a',
            s,
            0.5,
            command=both,
            versions=dict(ssl_patch='0.2', torch='2.7', commit='fff0000'),
        )
        kept(tmp_path, 'b', s, 0.5, command=f'ssl_patch probe runs/x/b_seed{s} --seed {s}')
    text = experiment_log(tmp_path)
    assert (
        '--seed N`; measured by `ssl_patch probe a_seedN --data c.npz`' in text
        and '; measured by `ssl_patch probe b_seedN --seed N`' in text
    )
    versions = 'versions of the measurement ssl_patch 0.2, torch 2.7'
    assert f'; commit of the measurement fff0000; {versions}\n' in text
    assert 'commit abc1234; versions torch 2.6' in text and 'short where features were kept' in text

"Records of runs, read and compared: by hand on made-up runs, partial ones and ones from before a field existed included."
import csv
import json
import math
import random
from dataclasses import replace
from statistics import mean
import matplotlib
import pytest
import torch
from ssl_patch.probes import Record, pack_each
from ssl_patch.results import (Run, along, budget, compare, curves, facts, ledger, load_run, load_runs, md_table, missing, names, noise, paired_bootstrap,
                               recipes, scores, sweep, updates)
matplotlib.use('Agg')

CONFIG = dict(slots=dict(views='weak / strong', patches='all', target='EMA 0.99', objective='info_nce(tau=0.1)'),
              encoder=dict(kind='vit', name='tiny', size=32, patch=4, drop_path=0.), data=dict(name='cifar10', train=1280), views=[dict(size=32)]*2, lr=.06, bf16=True,
              training=dict(epochs=2, batch_size=128, optimizer='sgd', weight_decay=5e-4, warmup=.8, schedule='step'),
              hardware='an abacus', versions=dict(torch='2.6', commit='abc1234'))
METRICS = 'epoch,batches,loss,seconds,knn\n1,10,4.5,60,\n2,20,3.5,120,0.3\n'

def write(root, name, seed, value, config=CONFIG, metrics=METRICS, protocols=('kNN',), **record):
    folder = root/f'{name}_seed{seed}'; folder.mkdir(parents=True)
    (folder/'config.json').write_text(json.dumps(config)); (folder/'metrics.csv').write_text(metrics)
    for p in protocols: Record(p, value, name, 'cifar10', .1, seed=seed, **dict(n_test=100, baselines={'raw pixels': .2, 'random encoder': .25}) | record).save(folder)
    return folder

@pytest.fixture
def runs(tmp_path):
    for name, seed, value in (('MoCo_v2', 0, .40), ('MoCo_v2', 1, .44), ('MoCo_v2', 2, .42), ('CO2', 0, .42), ('CO2', 1, .43)): write(tmp_path, name, seed, value)
    return load_runs(tmp_path, ['MoCo v2', 'CO2'])

# ---------------------------------------------------------------- reading
def test_a_folder_as_a_run(tmp_path):
    run = load_run(write(tmp_path, 'APS_power_3_flips_ignored', 12, .5))
    assert (run.name, run.seed, run.config) == ('APS power 3 flips ignored', 12, CONFIG)
    assert run.history == [dict(epoch=1, batches=10, loss=4.5, seconds=60), dict(epoch=2, batches=20, loss=3.5, seconds=120, knn=.3)]
    assert repr(run) == 'APS power 3 flips ignored, seed 12: 2 epochs, kNN 0.500'

@pytest.mark.parametrize('name', ['run', 'run_seed', 'run_seedx', '_seed0'])
def test_a_folder_with_another_name(tmp_path, name):
    write(tmp_path, 'a', 0, .5, config={**CONFIG, 'seed': 7}).rename(tmp_path/name)
    run = load_run(tmp_path/name)
    assert (run.name, run.seed, run.folder) == (name, 7, str(tmp_path/name))
    (tmp_path/name/'config.json').unlink()
    assert load_run(tmp_path/name).seed == 0
    assert compare([tmp_path/name]).values(name, 'kNN') == {0: .5}

@pytest.mark.parametrize('gone', [['config.json'], ['metrics.csv'], ['records.jsonl'], ['config.json', 'metrics.csv'], ['metrics.csv', 'records.jsonl']])
def test_a_folder_that_lacks_files(tmp_path, gone):
    folder = write(tmp_path, 'a', 3, .5)
    for f in gone: (folder/f).unlink()
    run = load_run(folder)
    assert (run.name, run.seed) == ('a', 3) and (run.config == {}) == ('config.json' in gone) and (run.history == []) == ('metrics.csv' in gone)
    assert len(load_runs(tmp_path)) == ('records.jsonl' not in gone) and len(load_runs(tmp_path, probed=False)) == 1
    facts(run); along([run], 'a', 'loss'); curves([run], [('loss', 'loss')], {}); recipes([run]); missing([run], {'a': [3]}, ['kNN'])
    assert 'a' in ledger([folder]) and 'not recorded' in ledger([folder])
    if 'metrics.csv' in gone:
        with pytest.raises(ValueError, match='no epoch'): budget([run])

def test_a_folder_that_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path/'nowhere'):
        with pytest.raises(ValueError, match='neither'): load_run(folder)

def test_a_list_of_folders(tmp_path):
    one, two = write(tmp_path/'x', 'a', 0, .5), write(tmp_path/'y', 'b', 0, .6)
    assert names(load_runs([one, tmp_path/'y'])) == ['a', 'b'] == names(load_runs([tmp_path/'x', two, str(one)])) # each once
    assert names(load_runs(one)) == ['a']
    with pytest.raises(ValueError, match='nowhere'): load_runs([one, tmp_path/'nowhere'])

def test_order_is_given_and_the_rest_follows_by_name(tmp_path):
    for name in ('b', 'a', 'd', 'c'):
        for seed in (10, 2): write(tmp_path, name, seed, .5)
    runs = load_runs(tmp_path, ['d', 'never run', 'c'])
    assert names(runs) == ['d', 'c', 'a', 'b'] and [r.seed for r in runs[:2]] == [2, 10]

def test_a_run_without_probes_is_left_out(tmp_path):
    write(tmp_path, 'a', 0, .5, protocols=())
    assert load_runs(tmp_path) == [] == load_runs(tmp_path/'nowhere')

def test_missing(runs):
    assert missing(runs, {'MoCo v2': [0, 1, 2], 'CO2': [0]}, ['kNN']) == []
    assert missing(runs, {'CO2': [0, 1, 2], 'SCE': [0, 1]}, ['kNN', 'linear']) == ['CO2: seed 0, 1 without linear', 'CO2: seed 2 without any run', 'SCE: seed 0, 1 without any run']

# ---------------------------------------------------------------- what they share
def test_every_draw_is_an_update(runs):
    assert updates(runs[0]) == 20
    sampled = {**CONFIG, 'slots': dict(patches='asymmetric(ratio=0.25, draws=4, power=3.0, flip_aware=True, disjoint=True)')}
    assert updates(replace(runs[0], config=sampled)) == 80

def test_facts(runs):
    f = facts(runs[0])
    assert f['network'] == 'vit tiny, patch 4' and f['bfloat16'] == 'yes' and f['updates'] == 20
    assert f['optimiser'] == 'sgd, learning rate 0.06, weight decay 0.0005' and f['schedule'].startswith('0.8 epoch')

def test_a_run_from_before_the_fields(tmp_path):
    "Nothing but metrics and probes, and a metrics file without most columns."
    run = load_run(write(tmp_path, 'old', 0, .5, config={}, metrics='epoch,batches,seconds\n1,10,60\n'))
    assert facts(run)['optimiser'].startswith('not recorded') and facts(run)['bfloat16'] == 'not recorded'
    for shown in (budget([run]), recipes([run]), compare([run]).table, ledger([run])): assert shown
    assert along([run], 'old', 'loss') == ([], [])
    curves([run], [('loss', 'loss')], {}); compare([run]).plot()
    new = load_run(write(tmp_path, 'new', 0, .6))
    with pytest.raises(ValueError, match='differs: .*old.*new|differs: .*new.*old'): budget([run, new])

def test_budget(runs):
    text = budget(runs)
    assert '|  | 5 runs |' in text and '| seeds | 0, 1, 2 |' in text and '| training, one run | 2.0 minutes (2.0 to 2.0) |' in text
    assert '| versions | torch 2.6 |' in text and '| commits of the project | abc1234 |' in text
    with pytest.raises(ValueError, match='none given'): budget([])

def test_budget_names_those_that_differ(runs):
    odd = [replace(r, config={**CONFIG, 'lr': .03}) if r.name == 'CO2' else r for r in runs]
    with pytest.raises(ValueError, match=r'optimiser differs: .*0\.06.*MoCo v2.*0\.03.*CO2'): budget(odd)
    with pytest.raises(ValueError, match='optimiser'): budget(odd, ['updates'])
    assert 'sgd, learning rate 0.06, weight decay 0.0005 (MoCo v2); sgd, learning rate 0.03, weight decay 0.0005 (CO2)' in budget(odd, ['optimiser'])

def test_budget_wants_whole_runs(runs):
    with pytest.raises(ValueError, match='MoCo v2, seed 0: stopped after epoch 1'): budget([replace(runs[0], history=runs[0].history[:1]), *runs[1:]])

def test_recipes_show_slots_that_are_filled(runs):
    dense = replace(runs[-1], name='DenseCL', config={**CONFIG, 'slots': CONFIG['slots'] | dict(dense='match_term(tau=0.1)')})
    assert 'dense' not in recipes(runs)
    lines = recipes([*runs, dense]).splitlines()
    assert lines[0].endswith('| dense |') and lines[2].endswith('| – |') and lines[-1].endswith('| match_term(tau=0.1) |') and len(lines) == 5
    assert recipes(runs, ['objective']).splitlines()[0] == '| method | objective |'

def test_md_table():
    t = md_table(['a', 'b'], [[1, .5], ['x', None]])
    assert t._repr_markdown_() == '| a | b |\n| --- | --- |\n| 1 | 0.5 |\n| x | None |'

# ---------------------------------------------------------------- what they reached
def test_scores(runs):
    assert scores(runs, 'kNN') == {'raw pixels': {0: .2, 1: .2, 2: .2}, 'random encoder': {0: .25, 1: .25, 2: .25},
                                   'MoCo v2': {0: .40, 1: .44, 2: .42}, 'CO2': {0: .42, 1: .43}}
    assert scores(runs, 'linear') == {}

def test_random_encoders_of_two_networks_are_kept_apart(tmp_path):
    for name, style, v in (('MoCo_v3', 'moco_v3', .3), ('APS', 'aps', .2)):
        write(tmp_path, name, 0, .5, architecture=f'vit tiny style={style}', baselines={'raw pixels': .1, 'random encoder': v})
    assert scores(load_runs(tmp_path, ['MoCo v3']), 'kNN') == {'raw pixels': {0: .1}, 'random encoder, style=moco_v3': {0: .3}, 'random encoder, style=aps': {0: .2},
                                                              'MoCo v3': {0: .5}, 'APS': {0: .5}}

def each(value, n=100, seed=0): return pack_each(torch.randperm(n, generator=torch.Generator().manual_seed(seed)) < round(n*value))

def test_a_protocol_in_several_ways(tmp_path):
    folder = write(tmp_path, 'a', 0, .5); Record('kNN', .4, 'a', 'cifar10', .1, settings=dict(k=200), n_test=100).save(folder)
    c = compare([folder])
    assert c.columns == ['kNN', 'kNN k=200'] and c.values('a', 'kNN k=200') == {0: .4}
    with pytest.raises(ValueError, match='several ways'): scores(c.runs, 'kNN')

def test_table(runs, tmp_path):
    write(tmp_path/'more', 'Dense', 0, .3, protocols=('linear segmentation',), metric='mIoU', baselines={'place alone': .15})
    lines = [[c.strip() for c in line.split('|')[1:-1]] for line in compare([*runs, *load_runs(tmp_path/'more')]).table.split('\n\n')[0].splitlines()]
    assert lines[0] == ['%', 'kNN top-1', 'linear segmentation mIoU', 'seeds']
    assert lines[2:] == [['chance', '10.0', '10.0', ''], ['raw pixels', '20.0', '–', '3'], ['place alone', '–', '15.0', '1'], ['random encoder', '25.0', '–', '3'],
                         ['MoCo v2', '42.0 ± 2.0', '–', '3'], ['CO2', '42.5 ± 0.7', '–', '2'], ['Dense', '–', '30.0', '1']]

def test_a_cell_with_fewer_seeds_says_so(runs):
    Record('linear', .5, 'MoCo v2', 'cifar10', .1, seed=1, n_test=100).save(runs[1].folder)
    c = compare([load_run(r.folder) for r in runs])
    assert '| 50.0 (1 seed) |     3 |' in c.table and c.rows[0] == 'MoCo v2'

@pytest.mark.parametrize('other', [dict(n_test=50), dict(n_train=7), dict(settings=dict(k=1)), dict(data='cifar100'), dict(layer='patch_mean'), dict(metric='mAP')])
def test_what_may_not_be_compared(tmp_path, other):
    folder = write(tmp_path, 'b', 0, .6, protocols=())
    replace(Record('kNN', .6, 'b', 'cifar10', .1, n_test=100), **other).save(folder)
    c = compare([write(tmp_path, 'a', 0, .5), folder])
    assert len(c.columns) == 2 == len(set(c.columns)) and c.gaps('b', 'a', c.columns[0]) == {}
    assert 'b and a have no column in common: they are not compared' in c.differences
    assert c.differences.splitlines()[2].count('–') == 2

def test_rows_never_mix(tmp_path):
    one = write(tmp_path/'x', 'a', 0, .5, tower='online', settings=dict(k=1))
    Record('kNN', .6, 'a', 'cifar10', .1, tower='target', settings=dict(k=1), n_test=100).save(one)
    assert compare([one]).rows == ['a, online tower', 'a, target tower']
    assert compare([one, write(tmp_path/'x', 'old', 0, .5)]).rows[-1] == 'old, unnamed tower'
    assert compare([write(tmp_path/'l', 'a', 0, .5), write(tmp_path/'l', 'a', 1, .5, config={**CONFIG, 'lr': .03})]).rows == [
        f'a, sgd, learning rate {lr}, weight decay 0.0005' for lr in ('0.06', '0.03')]
    assert compare([write(tmp_path/'here', 'a', 0, .5), write(tmp_path/'there', 'a', 0, .6)]).rows == ['a, here', 'a, there']
    assert compare([write(tmp_path/'n', 'a', 0, .5), write(tmp_path/'n', 'a', 1, .6, config={}, metrics='epoch\n1\n')]).rows == ['a'] # not known is no difference
    theirs = tmp_path/'theirs'
    for name, v in (('dino', .5), ('moco', .6)): Record('kNN', v, name, 'cifar10', .1).save(theirs)
    assert compare(theirs).rows == ['theirs, dino', 'theirs, moco']
    theirs = tmp_path/'two'
    for name, p in (('dino', 'kNN'), ('moco', 'linear')): Record(p, .5, name, 'cifar10', .1).save(theirs)
    assert compare(theirs).rows == ['two, dino', 'two, moco'] # though no column has both
    with pytest.raises(ValueError, match='given twice'): compare([load_run(one), load_run(one)])

def test_seeds_of_the_probe_are_averaged(tmp_path):
    folder = write(tmp_path, 'a', 4, .5); Record('kNN', .7, 'a', 'cifar10', .1, seed=9, n_test=100).save(folder)
    assert compare([folder]).values('a', 'kNN') == {4: pytest.approx(.6)}
    theirs = tmp_path/'theirs'
    for s in (0, 1): Record('kNN', .5 + .1*s, 'x', 'cifar10', .1, seed=s).save(theirs) # nothing is known of the run: the records' seeds
    assert compare(theirs).values('theirs', 'kNN') == {0: .5, 1: .6}

def test_protocols_are_chosen_and_ordered(tmp_path):
    folder = write(tmp_path, 'a', 0, .5, protocols=('kNN', 'linear', 'svm'))
    assert compare([folder], protocols=['svm', 'kNN']).columns == ['svm', 'kNN']
    assert compare([folder], protocols='kNN').columns == ['kNN'] == compare(folder, protocols=('kNN',)).columns
    for wrong in ('knn', ['kNN', 'knn'], [], 3):
        with pytest.raises(ValueError, match='protocols=.*there is kNN, linear, svm'): compare([folder], protocols=wrong)
    with pytest.raises(ValueError, match='none given'): compare([])
    with pytest.raises(ValueError, match="baseline='b'.*there is a"): compare([folder], 'b')

def test_differences(runs):
    c = compare(runs)
    assert c.gaps('CO2', 'MoCo v2', 'kNN') == pytest.approx({0: 2, 1: -1}) # seed 2 has one of them alone
    assert '| CO2 over MoCo v2 | +0.5 (-1.6 to +2.6; above in 1 of 2) |' in c.differences and 'bootstrap over seeds alone, which is rough' in c.differences
    one = compare([r for r in runs if r.seed == 0])
    assert '| +2.0 (one seed) |' in one.differences and 'no interval where there is one seed' in one.differences
    assert '| no seed in common |' in compare([runs[0], runs[-1]]).differences
    assert 'MoCo v2 over CO2' in compare(runs, 'CO2').differences and 'no pair' in compare(runs[:3]).differences
    with pytest.raises(ValueError, match='SCE'): c.between([('SCE', 'CO2')])

def test_intervals_take_images_where_they_are_kept(tmp_path):
    for name, v in (('a', .4), ('b', .5), ('c', .6)): write(tmp_path, name, 0, v, **({} if name == 'c' else dict(each=each(v, seed=len(name)))))
    c = compare(tmp_path)
    d, e = (compare(tmp_path).between([('b', n)]) for n in 'ac')
    assert '; one seed)' in d and '- bootstrap over test images' in d and '(one seed)' in e
    assert '- bootstrap over test images\n- no interval where' in c.differences
    write(tmp_path/'odd', 'a', 0, .4, each=each(.5)); write(tmp_path/'odd', 'b', 0, .5, each=each(.5)) # a value that is no mean of these
    assert 'no interval' in compare(tmp_path/'odd').differences

def test_what_was_drawn_is_told_by_column_and_row(tmp_path):
    for s in (0, 1):
        for name, v in (('a', .4), ('b', .5), ('c', .6)): write(tmp_path, name, s, v, **({} if name == 'c' else dict(each=each(v, seed=10*s + len(name)))))
    text = compare(tmp_path).differences
    assert '- kNN (b): bootstrap over seeds and test images' in text and '- kNN (c): bootstrap over seeds alone' in text

def test_intervals_come_again(tmp_path):
    for name, v in (('a', .4), ('b', .5)):
        for s in range(3): write(tmp_path, name, s, v, each=each(v, seed=10*s + len(name)))
    assert compare(tmp_path).differences == compare(tmp_path).differences != compare(tmp_path, seed=1).differences
    assert '- bootstrap over seeds and test images' in compare(tmp_path).differences

def test_save_and_csv(runs, tmp_path):
    c = compare(runs); c.save(tmp_path/'out'/'deep')
    assert sorted(f.name for f in (tmp_path/'out'/'deep').iterdir()) == ['comparison.csv', 'comparison.md', 'comparison.png']
    rows = list(csv.DictReader((tmp_path/'out'/'deep'/'comparison.csv').open(newline='')))
    assert len(rows) == 5 and rows[0]['method'] == 'MoCo v2' and rows[0]['seed'] == '0' and float(rows[0]['value']) == .4 and rows[0]['raw pixels'] == '0.2'
    assert json.loads(rows[0]['settings']) == {} and rows[0]['seconds'] == rows[0]['hardware'] == ''
    text = (tmp_path/'out'/'deep'/'comparison.md').read_text()
    assert c.table in text and c.differences in text and c._repr_markdown_() == repr(c)

# ---------------------------------------------------------------- which images, which seeds, which notes
def half(root, name, seed, right, test, **kw):
    "A run that was measured on 50 images with a hash."
    return write(root, name, seed, right.float().mean().item(), each=pack_each(right), n_test=50, images={'train': 't', 'test': test} if test else {}, **kw)

def test_other_test_images_are_never_paired(tmp_path):
    "Two disjoint halves of one test set, as many images of each class: only the hash tells."
    y = torch.arange(100) % 10; first, second = y[:50], y[50:]
    assert first.bincount().equal(second.bincount())
    for s in range(2):
        half(tmp_path, 'a', s, torch.arange(50) % 3 > 0, 'aaaaaa1'); half(tmp_path, 'b', s, torch.arange(50) % 2 > 0, 'bbbbbb1')
    c = compare(tmp_path)
    assert c.columns == ['kNN test_images=aaaaaa', 'kNN test_images=bbbbbb'] and c.gaps('b', 'a', c.columns[0]) == {}
    assert 'b and a have no column in common' in c.differences and 'bootstrap' not in c.differences
    with pytest.raises(ValueError, match='several ways'): scores(c.runs, 'kNN')
    same = {h: tmp_path/f'with{h}' for h in ('', 'aaaaaa1')}
    for h, root in same.items(): # the same images, or not known: paired
        half(root, 'a', 0, torch.arange(50) % 3 > 0, 'aaaaaa1'); half(root, 'b', 0, torch.arange(50) % 2 > 0, h)
        assert compare(root).columns == ['kNN'] and '- bootstrap over test images' in compare(root).differences
    half(tmp_path, 'c', 0, torch.arange(50) % 2 > 0, '') # which of the two, nobody knows
    assert compare(tmp_path).columns[-1] == 'kNN test_images=not_recorded'

def test_other_training_images_are_told(tmp_path):
    for s in (0, 1): write(tmp_path, 'a', s, .5, images=dict(train=str(s), test='x'))
    assert compare(tmp_path).columns == ['kNN'] and '- kNN: 2 different sets of training images' in compare(tmp_path).table

@pytest.mark.parametrize('n,said', [(1, 'one seed: such an interval says nothing about other seeds'), (2, '61 % of experiments with 2 seeds'),
                                    (3, '81 % of experiments with 3 seeds'), (4, '84 % of experiments with 4 seeds'), (5, None)])
def test_few_seeds_are_told_beneath_every_table_of_differences(tmp_path, n, said):
    for s in range(n):
        for name, v in (('a', .4), ('b', .5)): write(tmp_path, name, s, v + .01*s, each=each(v + .01*s, seed=10*s + len(name)))
    c = compare(tmp_path)
    for text in (c.differences, c.between([('a', 'b')])): assert (said in text) if said else 'few seeds' not in text
    assert ('too short' in c.plot().get_suptitle()) == (n < 5)

@pytest.mark.parametrize('wrong,why', [(dict(runs=None), 'runs=None'), (dict(runs=[None]), 'runs=None'), (dict(runs=3), 'runs=3'), (dict(draws='a'), "draws='a'"),
                                       (dict(draws=0), 'draws=0'), (dict(draws=True), 'draws=True'), (dict(seed='x'), "seed='x'")])
def test_compare_names_what_is_wrong(runs, wrong, why):
    with pytest.raises(ValueError, match=why): compare(**{'runs': runs} | wrong)

def test_compare_names_a_folder_without_records(tmp_path):
    (tmp_path/'empty').mkdir(); write(tmp_path, 'a', 0, .5, protocols=())
    good = write(tmp_path/'more', 'b', 0, .5)
    for given in (tmp_path/'empty', tmp_path/'a_seed0', tmp_path/'nowhere', [good, tmp_path/'empty'], [good, str(tmp_path/'a_seed0')]):
        bad = given[-1] if isinstance(given, list) else given
        with pytest.raises(ValueError, match=f'{bad}'): compare(given)
    with pytest.raises(ValueError, match='a: no records'): compare([load_run(tmp_path/'a_seed0')])
    for given in (None, 3, [None]):
        with pytest.raises(ValueError, match='folders='): load_runs(given)
        with pytest.raises(ValueError, match='folders='): ledger(given)
    with pytest.raises(ValueError, match='empty'): ledger(tmp_path/'empty')
    with pytest.raises(ValueError, match='none given'): ledger({})

@pytest.mark.parametrize('seed', [0, 3])
def test_the_seed_of_a_folder_that_says_it(tmp_path, seed):
    for p in ('kNN', 'linear'): Record(p, .5, 'a', 'cifar10', .1, seed=7).save(tmp_path/f'a_seed{seed}')
    c = compare(tmp_path)
    assert c.values('a', 'kNN') == {seed: .5} and c.notes_of_rows == [f'a: the run of seed {seed} was measured with seed 7']
    assert f'- a: the run of seed {seed} was measured with seed 7' in c.table
    Record('kNN', .6, 'a', 'cifar10', .1, seed=seed).save(tmp_path/f'b_seed{seed}')
    assert len(compare(tmp_path).notes_of_rows) == 1

def test_notes_stand_with_their_rows(tmp_path):
    for name, s, more in (('a', 0, ''), ('a', 1, ''), ('b', 0, ''), ('b', 1, '; 5 test images are in train too: kept'), ('c', 0, '; from JPEGs')):
        write(tmp_path, name, s, .5, note='ten classes' + more, protocols=('kNN', 'linear'))
    c = compare(tmp_path)
    assert c.notes_of_rows == ['b (seed 1) in kNN and linear: 5 test images are in train too: kept', 'c in kNN and linear: from JPEGs']
    assert c.table.count('ten classes') == 1 and '- b (seed 1) in kNN and linear: 5 test images' in c.table and c.table in repr(c)
    text = ledger(tmp_path)
    assert '\ncifar10: ten classes.\nb (seed 1) in kNN and linear: 5 test images are in train too: kept.\n' in text
    only = compare(tmp_path/'b_seed1')
    assert '5 test images are in train too: kept' in only.table and only.notes_of_rows == [] # all records say it: with the data

# ---------------------------------------------------------------- the bootstrap
def right(p, seeds, images, key): return {s: torch.rand(images, generator=torch.Generator().manual_seed(1000*key + s)) < p for s in range(seeds)}

@pytest.mark.parametrize('seeds,images', [(1, 80), (3, 80), (4, 1)])
def test_bootstrap_against_a_double_loop(seeds, images):
    a, b = right(.7, seeds, images, 1), right(.5, seeds, images, 2)
    found, g = [], random.Random(0)
    for _ in range(2000):
        s, i = g.choices(range(seeds), k=seeds), torch.tensor(g.choices(range(images), k=images))
        ahead = [(a[k].double()[i] - b[k].double()[i]).mean().item() for k in range(seeds)]
        centre = mean(ahead)
        found.append(centre + (math.sqrt(seeds/(seeds - 1))*(mean(ahead[k] for k in s) - centre) if seeds > 1 else 0))
    m, low, high = paired_bootstrap(a, b, draws=20_000)
    assert m == pytest.approx(mean((a[s].double() - b[s].double()).mean().item() for s in a))
    assert (low, high) == pytest.approx(torch.tensor(found).quantile(torch.tensor([.025, .975])).tolist(), abs=.03)

@pytest.mark.parametrize('seeds', [2, 3, 5])
def test_the_seed_part_is_as_wide_as_the_variance_between_seeds_says(seeds):
    "Many seeds alike in all images: the bootstrap's spread is that of an unbiased standard error, not sqrt((S-1)/S) of it."
    d = torch.linspace(-1, 1, seeds).double()
    u = torch.cartesian_prod(*[d]*seeds).reshape(-1, seeds).mean(1)*math.sqrt(seeds/(seeds - 1)) # all draws there are
    assert u.var(correction=0).item() == pytest.approx((d.var()/seeds).item())
    _, low, high = paired_bootstrap({s: v.item() for s, v in enumerate(d)}, dict.fromkeys(range(seeds), 0.), draws=40_000)
    assert (low, high) == pytest.approx(u.repeat(1000).quantile(torch.tensor([.025, .975], dtype=torch.double)).tolist(), abs=.02)

def test_bootstrap_of_a_normal_mean():
    "One seed, many images: the interval is the textbook's."
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    m, low, high = paired_bootstrap({0: x}, {0: torch.zeros(4000)}, draws=8000)
    half = 1.96*x.std().item()/4000**.5
    assert (low - m, high - m) == pytest.approx((-half, half), rel=.06)

def test_bootstrap_ignores_seeds_that_one_lacks_and_says_when_there_is_nothing():
    a, b = {0: .5, 1: .7, 2: .9}, {1: .4, 0: .4}
    assert paired_bootstrap(a, b)[0] == pytest.approx(.2)
    assert [math.isnan(x) for x in paired_bootstrap({0: .5}, {0: .4})] == [False, True, True]
    assert paired_bootstrap({0: .5, 1: right(.5, 1, 9, 0)[0]}, {0: .4, 1: .4})[0] == pytest.approx((.1 + right(.5, 1, 9, 0)[0].double().mean().item() - .4)/2)
    with pytest.raises(ValueError, match='none in common'): paired_bootstrap({0: .5}, {1: .5})
    with pytest.raises(ValueError, match='same images'): paired_bootstrap(right(.5, 1, 9, 0), right(.5, 1, 8, 0))
    with pytest.raises(ValueError, match='draws=0'): paired_bootstrap(a, b, draws=0)

def test_bootstrap_is_the_same_again_and_bounded_in_memory():
    a, b = right(.7, 3, 50_000, 1), right(.7, 3, 50_000, 2)
    assert paired_bootstrap(a, b, draws=200) == paired_bootstrap(a, b, draws=200) != paired_bootstrap(a, b, draws=200, seed=1)

def test_noise(runs, tmp_path):
    # mean accuracy .422; sqrt(.422 x .578 / 100) = .0494
    assert noise(runs, 'kNN') == 'kNN: equal signs in 3 seeds have probability 0.25 by chance; standard error of one accuracy on 100 test images: 4.9 points'
    write(tmp_path/'more', 'a', 0, .3, metric='mIoU')
    assert 'standard error' not in noise(load_runs(tmp_path/'more'), 'kNN')
    with pytest.raises(ValueError, match='linear'): noise(runs, 'linear')

# ---------------------------------------------------------------- pictures
def test_along_takes_epochs_that_all_have(runs):
    other = replace(runs[0], history=[dict(epoch=2., loss=1.5)])
    assert along([*runs[1:3], other], 'MoCo v2', 'loss') == ([2], [pytest.approx((3.5 + 3.5 + 1.5)/3)])
    assert along(runs, 'CO2', 'knn', lambda v: 100*v) == ([2], [30.])
    assert along(runs, 'SCE', 'loss') == ([], [])

def test_plot(runs, tmp_path):
    write(tmp_path/'more', 'Dense', 0, .3, protocols=('linear segmentation',), metric='mIoU', baselines={'place alone': .15})
    fig = compare([*runs, *load_runs(tmp_path/'more')]).plot({'CO2': 'tab:green'})
    top, seg, gap, none = fig.axes
    assert [t.get_text() for t in top.get_yticklabels()] == ['raw pixels', 'place alone', 'random encoder', 'MoCo v2', 'CO2', 'Dense'] # one row for both panels
    assert [ax.get_xlabel() for ax in fig.axes] == ['top-1 accuracy, %', 'mIoU, %', 'points above MoCo v2', 'points above MoCo v2']
    assert top.get_title().endswith('chance 10 %') and none.lines[0].get_color() == 'black' and len(none.lines) == 1
    last = top.get_lines()[-2]
    assert last.get_color() == 'tab:green' and list(last.get_xdata()) == [42, 43] and list(last.get_ydata()) == [4, 4]
    interval, points, bar = gap.get_lines()[:3]
    assert list(points.get_xdata()) == pytest.approx([2, -1]) and list(bar.get_xdata()) == pytest.approx([.5, .5]) and list(interval.get_xdata()) == pytest.approx([.5 - 1.5*2**.5, .5 + 1.5*2**.5], abs=1e-4)

def test_plot_of_many_columns_and_of_one_method(tmp_path):
    folder = write(tmp_path, 'a', 0, .5, protocols=[f'p{i}' for i in range(5)])
    fig = compare([folder]).plot()
    assert len(fig.axes) == 6 and [ax.get_title().split('\n')[0] for ax in fig.axes if ax.axison] == [f'p{i}' for i in range(5)]

def test_sweep(runs):
    ax, = sweep(runs, {'MoCo v2': 3, 'CO2': 1}, 'a number', ['kNN'])
    lines = {l.get_label(): (list(l.get_xdata()), list(l.get_ydata())) for l in ax.get_lines()}
    assert lines['seed 0'] == ([1, 3], [42, 40]) and lines['seed 2'] == ([3], [42]) and lines['mean'] == ([1, 3], [pytest.approx(42.5), pytest.approx(42)])

def test_curves(runs):
    axs = curves(runs, [('loss', 'loss'), ('knn', 'kNN, %', lambda v: 100*v), ('within', 'within'), ('seconds', 'time')], {'MoCo v2': 'black'}, columns=2)
    assert len(axs) == 4 and [len(ax.get_lines()) for ax in axs] == [2, 2, 0, 2]
    assert axs[2].texts[0].get_text() == 'not recorded'
    assert list(axs[1].get_lines()[0].get_ydata()) == [30] and [l.get_color() for l in axs[0].get_lines()] == ['black', 'grey']
    assert [t.get_text() for t in axs[0].figure.legends[0].get_texts()] == ['MoCo v2', 'CO2']

def test_a_run_is_plain_data():
    assert Run('a', 0, {}, [], []) == Run('a', 0, {}, [], [])

# ---------------------------------------------------------------- the ledger
COMMAND = 'ssl_patch pretrain --out runs/soft/{} --data /data/sets/cifar10.npz --method co2 --seed {} --progress lines'

def kept(root, name, seed, value, config=CONFIG, **kw):
    return write(root, name, seed, value, {**config, 'seed': seed, 'started': f'2026-11-2{seed}T09:00:00', 'command': COMMAND.format(f'{name}_seed{seed}', seed)}, **kw)

def test_ledger(tmp_path):
    for name, v in (('CO2', .5), ('MoCo_v2', .4)):
        for s in (0, 1): kept(tmp_path, name, s, v + .02*s)
    text = ledger(tmp_path)
    rows = [[c.strip() for c in line.split('|')[1:-1]] for line in text.split('\n\n')[0].splitlines()]
    assert rows[0] == ['%', 'no.', 'kNN', 'training time'] and [r[0] for r in rows[2:]] == ['chance', 'raw pixels', 'random encoder', 'CO2', 'MoCo v2']
    assert rows[-2] == ['CO2', '1', '51.0 ± 1.4', '2.0 min'] and rows[-1][1] == '2'
    assert 'network vit tiny, patch 4; epochs 2; batch 128; seeds 0, 1; probe time not recorded; hardware an abacus; started 2026-11-20 / 2026-11-21; commit abc1234; versions torch 2.6.' in text
    assert '\nkNN: top-1 on cifar10.\n' in text
    assert '1. CO2: `ssl_patch pretrain --out CO2_seedN --data cifar10.npz --method co2 --seed N`\n' in text # once for both seeds
    assert 'details' not in ledger(tmp_path, commands=False) and '/data/' not in text

def test_ledger_in_groups(tmp_path):
    for d in 'xy': kept(tmp_path/d, 'a', 0, .5)
    kept(tmp_path/'y', 'b', 1, .6, config={**CONFIG, 'hardware': 'a slide rule', 'method': 'SCE', 'data': dict(name='stl10', train=9)}, hardware='', seconds=12.)
    text = ledger({'one': tmp_path/'x', 'two': [tmp_path/'y'/'a_seed0', tmp_path/'y'/'b_seed1']})
    assert '**one**' in text and '**two**' in text and '| b (SCE) ' in text.replace('  ', ' ')
    assert '3. b: `' in text and '; hardware a slide rule; started 2026-11-21' in text # numbers go on; what differs is told
    assert ' stl10, 9 training images |' in text and ' 12 s |' in text and ' not recorded |' in text
    with pytest.raises(ValueError, match="no runs for 'one'"): ledger({'one': tmp_path/'nowhere'})

def test_ledger_of_runs_that_were_never_probed(tmp_path):
    kept(tmp_path, 'a', 0, .5, protocols=()); kept(tmp_path, 'b', 0, .5)
    assert '| a              |   2 |    – |' in ledger(tmp_path)
    assert '| a |   1 |' in ledger([tmp_path/'a_seed0'])

def test_ledger_says_once_what_networks_share(tmp_path):
    for i, style in enumerate(('aps', 'moco_v3')): kept(tmp_path, f'm{i}', 0, .5, config={**CONFIG, 'encoder': dict(kind='vit', name='tiny', patch=4, style=style)})
    assert 'network vit tiny, patch 4, and as said in each row.' in ledger(tmp_path) and '| style moco_v3 |' in ledger(tmp_path)

def test_ledger_orders_numbers(tmp_path):
    for p in ('10', '3', '0.5', '0.25'): kept(tmp_path, f'p_{p}', 0, .5)
    assert [line.split('|')[1].strip() for line in ledger(tmp_path).split('\n\n')[0].splitlines()[5:]] == ['p 0.25', 'p 0.5', 'p 3', 'p 10']

def test_ledger_tells_how_it_was_measured(tmp_path):
    for s in (0, 1):
        both = 'ssl_patch probe runs/x/a_seed0 runs/x/a_seed1 --data /data/c.npz'
        kept(tmp_path, 'a', s, .5, command=both, versions=dict(ssl_patch='0.2', torch='2.7', commit='fff0000'))
        kept(tmp_path, 'b', s, .5, command=f'ssl_patch probe runs/x/b_seed{s} --seed {s}')
    text = ledger(tmp_path)
    assert '--seed N`; measured by `ssl_patch probe a_seedN --data c.npz`' in text and '; measured by `ssl_patch probe b_seedN --seed N`' in text
    assert '; commit of the measurement fff0000; versions of the measurement ssl_patch 0.2, torch 2.7\n' in text
    assert 'commit abc1234; versions torch 2.6' in text and 'short where features were kept' in text

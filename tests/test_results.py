"Records of runs, read and compared: by hand on made-up runs, partial ones and ones from before a field existed included."
import json
from dataclasses import replace
import matplotlib
import pytest
from ssl_patch.probes import Record
from ssl_patch.results import (Run, along, budget, curves, dots, facts, gap_sentence, gap_table, gaps, load_run, load_runs, md_table, missing,
                               names, noise, recipes, score_table, scores, sweep, updates)
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
def test_a_folder_without_a_seed(tmp_path, name):
    with pytest.raises(ValueError, match='NAME_seedN'): load_run(tmp_path/name)

@pytest.mark.parametrize('gone', ['config.json', 'metrics.csv', 'records.jsonl'])
def test_a_folder_that_lacks_a_file(tmp_path, gone):
    folder = write(tmp_path, 'a', 0, .5); (folder/gone).unlink()
    with pytest.raises(ValueError, match=gone): load_run(folder)

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
    for shown in (budget([run]), recipes([run]), score_table([run])): assert shown
    assert along([run], 'old', 'loss') == ([], [])
    curves([run], [('loss', 'loss')], {}); dots([run], {})
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

def test_a_protocol_twice(tmp_path):
    write(tmp_path, 'a', 0, .5, protocols=('kNN', 'kNN'))
    with pytest.raises(ValueError, match='several'): scores(load_runs(tmp_path), 'kNN')

def test_score_table(runs, tmp_path):
    write(tmp_path/'more', 'Dense', 0, .3, protocols=('linear segmentation',), metric='mIoU', baselines={'place alone': .15})
    lines = score_table([*runs, *load_runs(tmp_path/'more')], ['kNN', 'linear segmentation']).splitlines()
    assert lines[0] == '|  | kNN, top-1, % | linear segmentation, mIoU, % | seeds |'
    assert lines[2] == '| chance | 10.0 | 10.0 |  |'
    assert lines[3:] == ['| raw pixels | 20.0 | – | 3 |', '| random encoder | 25.0 | – | 3 |', '| place alone | – | 15.0 | 1 |', '| MoCo v2 | 42.0 ± 2.0 | – | 3 |',
                         '| CO2 | 42.5 ± 0.7 | – | 2 |', '| Dense | – | 30.0 | 1 |']

def test_gaps_are_paired(runs):
    assert gaps(runs, 'CO2', 'MoCo v2', 'kNN') == pytest.approx({0: 2, 1: -1}) # seed 2 has one of them alone
    assert gap_sentence(runs, 'CO2', 'MoCo v2', 'kNN') == 'kNN: CO2 is above MoCo v2 in 1 of 2 seeds; +0.5 points on average (-1.0 to +2.0)'
    assert gap_sentence(runs, 'CO2', 'SCE', 'kNN') == 'kNN: CO2 and SCE have no seed in common'
    lines = gap_table([r for r in runs if (r.name, r.seed) != ('CO2', 1)], [('CO2', 'MoCo v2')], ['kNN', 'linear']).splitlines()
    assert lines[2] == '| CO2 over MoCo v2 | +2.0 (one seed) | no seed in common |'

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

def test_dots(runs, tmp_path):
    write(tmp_path/'more', 'CO2', 0, .3, protocols=('linear segmentation',), metric='mIoU', baselines={'place alone': .15})
    axs = dots([*runs, *load_runs(tmp_path/'more')], {'CO2': 'tab:green'}, ['kNN', 'linear segmentation'])
    assert [t.get_text() for t in axs[0].get_yticklabels()] == ['raw pixels', 'random encoder', 'place alone', 'MoCo v2', 'CO2'] # one row for both panels
    assert [ax.get_xlabel() for ax in axs] == ['top-1 accuracy, %', 'mIoU, %']
    last = axs[0].get_lines()[-2]
    assert last.get_color() == 'tab:green' and list(last.get_xdata()) == [42, 43] and list(last.get_ydata()) == [4, 4]

def test_dots_say_chance(runs, tmp_path):
    title = lambda axs: axs[0].figure._suptitle.get_text()
    assert title(dots(runs, {})).endswith('chance is 10 %')
    folder = write(tmp_path/'more', 'a', 0, .5); Record('linear segmentation', .3, 'a', 'CamVid', .025).save(folder)
    assert title(dots(load_runs(tmp_path/'more'), {}, ['kNN', 'linear segmentation'])).endswith('chance: kNN 10 %, linear segmentation 2.5 %')

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

"A batch in parts: what is the same as the whole batch, what is not, and that a run stays a run."

import json
import math

import pytest
from several import apart, two_steps
from steps import StopAt, same, state

from ssl_patch.cli import main


@pytest.mark.parametrize('name', ['moco_v2', 'moco_v2_symmetric', 'co2', 'sce', 'ressl', 'densecl'])
def test_parts_are_the_whole_batch(name):
    "Means over queries, against the fixed keys of a queue, without batch-norm."
    whole, parts = (two_steps(f'{name}_without_norm', accumulate=k) for k in (1, 4))
    assert whole['row']['loss'] == pytest.approx(parts['row']['loss'], rel=1e-6)
    mean = parts['loss'].view(len(whole['loss']), 4).mean(1)
    assert (mean - whole['loss']).abs().max() < 1e-8
    assert whole['grad'].keys() == parts['grad'].keys()
    for k, g in whole['grad'].items():
        assert (g - parts['grad'][k]).abs().max() < 1e-8, k
    assert apart(whole['state'], parts['state']) < 1e-8  # queues in the same order
    assert whole['next'] == parts['next']


@pytest.mark.parametrize('method', ['aps', 'moco_v3', 'moco_v2'])
def test_steps_and_schedule_are_those_of_whole_batches(method, pretrainer):
    "An optimiser step a draw, a move of the key encoder a step; batch-norm sees each part."
    rates, steps, moves = {}, {}, {}
    for parts in (1, 4):
        run = pretrainer(method, epochs=2, accumulate=parts)
        counted = dict(step=0, move=0, rates=[])
        step, key_encoder = run.optimizer.step, run.method.key_encoder

        def one(*args, step=step, run=run, counted=counted):
            counted['step'] += 1
            counted['rates'].append(run.optimizer.param_groups[0]['lr'])
            step(*args)

        def move(*args, update=getattr(key_encoder, 'update', None), counted=counted):
            counted['move'] += 1
            update(*args)

        run.optimizer.step = one
        if key_encoder:
            key_encoder.update = move
        run.fit()
        rates[parts], steps[parts], moves[parts] = (
            counted['rates'],
            counted['step'],
            counted['move'],
        )
        seen = [int(v) for k, v in run.method.state_dict().items() if k.endswith('_tracked')]
        passes = max(seen) / counted['step']
        assert passes == parts * (1 if method == 'moco_v2' else 2)  # both views are queries
        assert len(run.history) == 2 and run.batches == 8
        if method == 'aps':  # what the curves are drawn against
            line = [a for a in run.curves().axes[0].lines if a.get_linestyle() == ':'][0]
            assert line.get_ydata()[0] == pytest.approx(2 * math.log(64 // parts))
    assert rates[1] == rates[4] and steps[1] == steps[4]
    assert moves[1] == moves[4] == (0 if method == 'aps' else steps[1])


@pytest.mark.parametrize('method', ['aps', 'moco_v2'])
def test_a_stopped_run_goes_on_to_the_bit(method, pretrainer, tmp_path):
    make = lambda **kw: pretrainer(method, drop_path=0.2, accumulate=2, **kw)
    whole = make().fit()
    run = make(out=tmp_path / 'r')
    run.progress = StopAt(run, 6)
    with pytest.raises(KeyboardInterrupt, match='stopped after batch 6 of 16'):
        run.fit()
    assert same(state(whole), state(make(weights=1, out=tmp_path / 'r', resume=True).fit()))
    with pytest.raises(ValueError, match='accumulate 2, this run 4'):
        pretrainer(method, drop_path=0.2, accumulate=4, out=tmp_path / 'r', resume=True)


@pytest.mark.parametrize(
    'method, options, words',
    [
        ('aps', dict(accumulate=0), 'accumulate must be a whole number at least 1, got 0'),
        ('aps', dict(accumulate=1.5), 'accumulate must be a whole number at least 1, got 1.5'),
        ('aps', dict(accumulate=3), 'batch_size must be a multiple of accumulate=3, at least 6'),
        ('aps', dict(accumulate=64), 'batch_size must be a multiple of accumulate=64'),
        ('moco_v2', dict(accumulate=8), 'batch_size must be a multiple of 64, at least 128, for'),
    ],
)
def test_parts_that_do_not_fit(method, options, words, pretrainer):
    with pytest.raises(ValueError) as e:
        pretrainer(method, **options)
    assert words in str(e.value)


def test_the_shell(tmp_path):
    words = '--data photos --subset 64 --size 16 --width 16 --depth 1 --heads 1 --epochs 1'
    words += ' --method moco_v3 --options hidden=16 out=8 --batch-size 16 --knn-every 0'
    words = f'pretrain {words} --train-config accumulate=2 --progress quiet'.split()
    main([*words, '--out', str(tmp_path / 'r')])
    config = json.loads((tmp_path / 'r' / 'config.json').read_text())
    assert config['train_config']['accumulate'] == 2


def test_a_run_of_before_has_whole_batches(pretrainer, tmp_path):
    "Checkpoints that were written when there was no such number."
    pretrainer(epochs=2, out=tmp_path / 'r').fit(1)
    file = tmp_path / 'r' / 'checkpoint.pt'
    run = pretrainer(epochs=2, out=tmp_path / 'r', resume=True)
    saved = run.folder.load()
    config = json.loads(saved['identity']['train_config'])
    del config['accumulate']
    saved['identity']['train_config'] = json.dumps(config)
    run.load_state_dict(saved)
    assert run.batches == 4 and file.is_file()


def test_parts_need_no_more_gradient_than_one(pretrainer):
    "Memory is what a part needs: nothing of the parts before is held when the next begins."
    run, held = pretrainer('moco_v3', epochs=1, accumulate=4), []
    step = run.step

    def watched(*args):
        loss, log = step(*args)
        held.append(loss)
        return loss, log

    run.step = watched
    run.fit(1)
    assert len(held) == 16
    with pytest.raises(RuntimeError, match='second time'):  # its graph is gone
        held[0].backward()

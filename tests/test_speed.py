"Timing, counted work, profiles: checked against given ticks and counts, never against time."

import json
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ssl_patch.data.sources import images
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.methods.aps import APS
from ssl_patch.methods.moco import MoCoV2, MoCoV3
from ssl_patch.reports.profile import (
    Clock,
    Growth,
    Profile,
    measure_growth,
    phases,
    profile_run,
    show_growth,
    show_phases,
)
from ssl_patch.reports.timing import Timings, time_bound, flops, in_turn, machine_rates, step_work
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.views.augmentations import make_view

RATES = dict(
    matmul_fp32=1e9, conv_fp32=5e8, matmul_bf16=2e9, conv_bf16=4e9, copy=1e8, copy_cached=2e8
)
small_vit = partial(vit, size=16, patch=4, width=32, depth=1, heads=2)
makes = dict(
    aps=lambda: APS(small_vit(), hidden=32, out=16),
    moco_v3=lambda: MoCoV3(small_vit(variant='moco_v3'), hidden=32, out=16),
    moco_v2=lambda: MoCoV2(resnet('resnet18', 16, width=4), queue=32),
)


@pytest.fixture(scope='module')
def data():
    x = torch.randint(
        0, 256, (80, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return images(x)


def pretrainer(data, method='aps', **kw):
    torch.manual_seed(0)
    return Pretrainer(
        makes[method](),
        data,
        **dict(epochs=3, batch_size=16, device='cpu', progress='quiet', bf16=False) | kw,
    )


def flat(x):
    "All that a nested state holds, tensors cloned."
    if isinstance(x, dict):
        return [t for v in x.values() for t in flat(v)]
    return [x.clone() if torch.is_tensor(x) else x]


def same(a, b):
    return all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize('n, rounds', [(1, 3), (2, 4), (3, 7)])
def test_in_turn_calls_each_once_a_round_and_each_is_first_equally_often(n, rounds):
    calls = []
    t = in_turn({k: partial(calls.append, k) for k in range(n)}, rounds)
    by_round = [calls[i : i + n] for i in range(0, len(calls), n)]
    assert len(by_round) == rounds + 1 and all(sorted(r) == list(range(n)) for r in by_round)
    firsts = [sum(r[0] == k for r in by_round[1:]) for k in range(n)]
    assert max(firsts) - min(firsts) <= 1
    assert all(len(s) == rounds and min(s) >= 0 for s in t.seconds.values())


def test_ratio_is_within_rounds():
    "A machine that gets ten times slower in the middle does not change a ratio of two."
    drift = [1, 1, 10, 10, 100]
    t = Timings(dict(fast=[1.0 * d for d in drift], slow=[2.0 * d for d in drift]))
    assert t.ratio('slow', 'fast') == (2, 2, 2) and t.ratio('fast', 'slow') == (0.5, 0.5, 0.5)
    lines = t.table(n=100, unit='queries').splitlines()
    assert 'queries/s' in lines[0] and '2.00 (2.00 to 2.00)' in lines[-1]
    assert '10,000' in t.table()  # milliseconds, where no number of units is given
    assert json.loads(json.dumps(t.as_dict()))['median'] == dict(fast=10, slow=20)


def test_machine_has_a_rate_for_everything_and_says_what_it_is():
    m = machine_rates(seconds=0.01)
    assert (
        all(m[k] > 0 for k in RATES)
        and m['copy_cached'] >= m['copy']
        and m['threads'] == torch.get_num_threads()
    )
    assert m['hardware'] and 'torch' in m['versions'] and json.dumps(m)


@pytest.mark.parametrize('groups', [1, 2])
def test_flops_of_a_convolution(groups):
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    y, forward = flops(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)(x))
    _, backward = flops(lambda: y.sum().backward())
    assert forward == dict(matmul=0, conv=2 * 3 * 16 * 9 * 4 * 6 // groups) and backward == dict(
        matmul=0, conv=2 * forward['conv']
    )


def test_flops_of_a_transposed_convolution():
    y, forward = flops(lambda: nn.ConvTranspose2d(4, 6, 2, stride=2)(torch.randn(3, 4, 8, 8)))
    assert (
        forward['conv'] == flops(lambda: y.sum().backward())[1]['conv'] == 2 * 3 * 64 * 4 * 6 * 4
    )  # every input number meets 4 x 6 weights; no gradient of the input


def test_flops_of_nothing():
    assert flops(lambda: torch.ones(3) + 1)[1] == dict(matmul=0, conv=0)


@pytest.mark.parametrize('kernel', [True, False])
def test_attention_is_counted_whatever_the_kernel(kernel):
    method = APS(small_vit(), hidden=32, out=16, patch_sampler=None)
    method.encoder.explicit_attention(not kernel)
    views = [
        make_view(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), a) for a in method.augmentations
    ]
    w = step_work(method, views)
    tokens, d, B = 17, 32, 4
    block = 2 * tokens * d * (3 * d + d + 4 * d + 4 * d) + 2 * 2 * tokens * tokens * d
    towers = (
        2 * B * (block + 2 * 16 * 48 * d)
    )  # two views, each embedded in 16 patches of 48 numbers
    heads = (
        2
        * B
        * 2
        * sum(
            m.in_features * m.out_features
            for h in (method.tower.projector, method.predictor)
            for m in h.modules()
            if isinstance(m, nn.Linear)
        )
    )
    similarities = 2 * 2 * B * B * 16  # of 16 numbers, both ways
    assert sum(w['forward'].values()) == towers + heads + similarities


@pytest.mark.parametrize('name', makes)
def test_step_work_leaves_the_method_and_the_random_numbers_alone(name):
    torch.manual_seed(0)
    method = makes[name]().train()
    before = flat(method.state_dict())
    views = [
        make_view(torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8), a)
        for a in method.augmentations
    ]
    state = torch.get_rng_state()
    w = step_work(method, views)
    assert torch.equal(state, torch.get_rng_state()) and same(before, flat(method.state_dict()))
    assert all(p.grad is None for p in method.parameters())
    assert (
        w['parameters'] == sum(p.numel() for p in method.parameters() if p.requires_grad)
        and w['images'] == 16
    )
    assert (w['ema_bytes'] > 0) == (method.key_encoder is not None) == (w['ema_update'] is not None)
    assert ('conv' in w['forward']) and (w['forward']['conv'] > w['forward']['matmul']) == (
        name == 'moco_v2'
    )


def test_optimisers_move_what_they_must(data):
    method = makes['moco_v2']()
    views = [make_view(data.train.images[:16], a) for a in method.augmentations]
    work = {o: step_work(method, views, optimizer=o) for o in ('adamw', 'sgd', 'lars')}
    n = work['sgd']['parameters']
    assert [w['optimiser_bytes'] // n for w in work.values()] == [28, 20, 20] and work['sgd'][
        'ema_bytes'
    ] == 12 * n
    assert [w['state_bytes'] // n for w in work.values()] == [
        20,
        16,
        16,
    ]  # weights, gradients, averages, and the key encoder
    with pytest.raises(ValueError, match="optimizer must be one of .* got 'adam'"):
        step_work(method, views, optimizer='adam')


def test_bound_takes_the_rate_of_the_precision_and_of_the_memory():
    w = dict(
        forward=dict(matmul=1e9, conv=1e9),
        backward=dict(matmul=2e9, conv=0),
        optimiser_bytes=2e8,
        ema_bytes=1e8,
        state_bytes=1e6,
    )
    assert time_bound(w, RATES) == dict(
        forward=2, backward=2, arithmetic=4, optimiser=1, ema=0.5
    )  # a convolution at the rate of products, which is higher
    assert time_bound(w, RATES, True) == dict(
        forward=0.75, backward=1, arithmetic=1.75, optimiser=1, ema=0.5
    )
    assert time_bound(w | dict(state_bytes=1e9), RATES)['optimiser'] == 2


def test_clock_sums_a_phase_and_stops_between_batches():
    now = iter(range(0, 100, 1))
    clock = Clock(now=lambda: next(now))
    clock.batch()
    clock('views')
    clock('views')
    clock(None)
    clock(None)  # 0 pause, 1 load, 2, 3 views, 4 end, 5 still paused
    clock.batch()
    clock(None)
    assert [{k: v for k, v in r.items() if v} for r in clock.rows] == [
        dict(load=1, views=2),
        dict(load=1),
    ]


@pytest.mark.parametrize('name', makes)
def test_profile_knows_all_phases_and_leaves_nothing_out(data, name):
    run = pretrainer(data, name)
    p = profile_run(run, 3, 1, rates=RATES)
    assert (
        list(p.seconds) == list(phases)
        and all(len(s) == 3 and min(s) >= 0 for s in p.seconds.values())
        and run.batches == 4
    )
    assert sum(map(sum, p.seconds.values())) / 3 == pytest.approx(p.total) and p.steps == (
        4 if name == 'aps' else 1
    )
    assert sum(p.share(k) for k in p.rows()) == pytest.approx(
        1
    ) and p.images_per_s == pytest.approx(16 / p.total)
    assert p.bound['backward'] == pytest.approx(p.steps * time_bound(p.work, RATES)['backward'])
    extra = p.bound['forward'] - p.steps * time_bound(p.work, RATES)['forward']
    assert extra == pytest.approx(
        0 if name == 'aps' else time_bound(p.work, RATES)['ema'], abs=1e-12
    )  # both move the target before they compute keys
    assert (
        all(k in str(p) for k in phases)
        and json.loads(json.dumps(p.as_dict()))['name'] == run.method.name
    )


@pytest.mark.parametrize('name', makes)
def test_a_profiled_run_is_the_same_run(data, name, tmp_path):
    "Under the clock across an epoch's end, then by fit: all is as in a run without it."
    run, whole = (
        pretrainer(data, name, out=tmp_path / 'a'),
        pretrainer(data, name, out=tmp_path / 'b'),
    )
    state = torch.get_rng_state()
    profile_run(run, 5, 2, epoch=True, rates=RATES)
    assert (
        torch.equal(state, torch.get_rng_state())
        and len(run.history) == 1
        and 'phase' not in vars(run.loader)
    )
    run.fit()
    whole.fit()
    assert same(flat(run.method.state_dict()), flat(whole.method.state_dict())) and [
        h['loss'] for h in run.history
    ] == [h['loss'] for h in whole.history]
    assert {f.name for f in (tmp_path / 'a').iterdir()} == {
        f.name for f in (tmp_path / 'b').iterdir()
    }


def test_a_run_can_be_profiled_to_its_end(data):
    run = pretrainer(data)
    profile_run(run, 14, 1, rates=RATES)
    assert len(run.history) == 3 and run.batches == run.total
    with pytest.raises(ValueError, match='fit into the 0 left'):
        profile_run(run, 1, 0, rates=RATES)


def test_what_is_done_once_in_a_while(tmp_path):
    run = pretrainer(
        images('photos').sample(64, 32),
        batch_size=16,
        out=tmp_path / 'r',
        knn_every=2,
        save_every=3,
    )
    p = profile_run(run, 2, 1, epoch=True, rates=RATES)
    assert {k: n for k, (_, n) in p.epoch.items()} == dict(signs=4, checkpoint=12, knn=8)
    assert (
        p.images_per_s < 16 / p.total and run.history == []
    )  # the checkpoint was written in the middle of an epoch, which is no epoch's end
    resumed = pretrainer(
        images('photos').sample(64, 32),
        batch_size=16,
        out=tmp_path / 'r',
        knn_every=2,
        save_every=3,
        resume=True,
    )
    assert resumed.batches == 3 and same(
        flat(resumed.method.state_dict()), flat(run.method.state_dict())
    )


def test_files_that_stream_are_loaded_under_the_clock(tmp_path):
    from PIL import Image

    g = torch.Generator().manual_seed(0)
    for i in range(12):
        Image.fromarray(
            torch.randint(0, 256, (18, 20, 3), generator=g, dtype=torch.uint8).numpy()
        ).save(tmp_path / f'{i}.png')
    run = pretrainer(images(tmp_path, stream=True), batch_size=4, workers=0)
    p = profile_run(run, 4, 1, rates=RATES)
    assert p.median('load') > 0 and p.median('views') > 0


def test_too_few_batches_and_a_broken_step(data):
    run = pretrainer(data)
    with pytest.raises(ValueError, match='16 of them, with 3 of warm-up, fit into the 15 left'):
        profile_run(run, 13, rates=RATES)
    with pytest.raises(ValueError, match='batches must be .* got 0'):
        profile_run(run, 0, rates=RATES)
    assert run.batches == 0

    def broken(*a):
        raise RuntimeError('broken')

    run.method.forward = broken
    with pytest.raises(RuntimeError, match='broken'):
        profile_run(run, 1, 0, rates=RATES)
    assert 'phase' not in vars(run.loader)


def test_growth_slopes():
    g = Growth([1, 10, 100], [2.0, 20.0, 2000.0], [5, 50, 500])
    assert (g.slope, g.slope_over_all, g.bytes_slope) == (
        pytest.approx(2),
        pytest.approx(1.5),
        pytest.approx(1),
    )
    assert Growth([1, 2], [1.0, 1.0]).slope == 0 and Growth([1, 2], [1.0, 1.0]).bytes_slope is None
    assert 'n^2.00 at the end, n^1.50 over all; memory as n^1.00' in repr(g)


def test_growth_runs_all_sizes_in_turn():
    made, called = [], []

    def make(n):
        made.append(n)
        return lambda: called.append(n) or (None if n == 3 else 10 * n)

    g = measure_growth(make, (3, 1, 2), rounds=2)
    assert (
        made == [1, 2, 3] and called == [1, 2, 3] * 3 + [2, 3, 1] and g.bytes is None
    )  # one size did not say
    assert all(a <= b for a, b in zip(g.seconds, g.slowest)) and json.dumps(g.as_dict())
    with pytest.raises(ValueError, match='above 0'):
        measure_growth(make, [0, 1])


def test_figures(data):
    p = Profile(
        'a',
        8,
        1,
        True,
        dict(views=[1.0], forward=[2.0]),
        3.0,
        dict(forward=0.5),
        dict(knn=(4.0, 2)),
    )
    assert len(show_phases(dict(a=p, b=p)).axes) == 1
    fig = show_growth(dict(a=Growth([1, 2], [1.0, 2.0]), b=Growth([1, 2], [1.0, 4.0], [1, 2])))
    assert [t.get_text() for ax in fig.axes for t in ax.get_legend().get_texts()] == [
        'time: slope 1.0',
        'time: slope 2.0',
        'memory: slope 1.0',
    ]


def test_plain_functions_count_like_the_formulas():
    q, k = torch.randn(8, 16), torch.randn(32, 16)
    assert flops(lambda: F.softmax(q @ k.T, 1) @ k)[1] == dict(matmul=2 * 2 * 8 * 32 * 16, conv=0)

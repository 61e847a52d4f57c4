"Queue and EMA against simulation by hand."

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from ssl_patch.models.encoders import Features, resnet
from ssl_patch.models.heads import Projections, Tower, mlp
from ssl_patch.models.momentum import (
    EMA,
    Queue,
    SplitBatchNorm,
    cosine_momentum,
    ema,
    split_batch_norm,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(1, 12), max_size=8))
def test_queue_is_a_ring(size, batches):
    batches = [min(b, size) for b in batches]
    q, ring, at, n = Queue(size, dim=1), None, 0, 0.0
    ring = q.keys.flatten().tolist()
    for b in batches:
        keys = torch.arange(n, n + b)[:, None]
        n += b
        for k in keys.flatten().tolist():
            ring[at] = k
            at = (at + 1) % size
        q.put(keys)
        assert q.keys.flatten().tolist() == ring
        again = Queue(size, dim=1, seed=1)
        again.load_state_dict(q.state_dict())
        assert again.next == at and torch.equal(again.keys, q.keys)


def test_queue_starts_with_unit_rows():
    assert torch.allclose(Queue(50, dim=7).keys.norm(dim=1), torch.ones(50))


def test_ema_by_hand():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    slow = ema(0.9, 1.0)(net)
    expected = {k: v.clone() for k, v in net.named_parameters()}
    for t in range(5):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        slow.update(net, t / 4)
        m = cosine_momentum(t / 4, 0.9, 1.0)
        for k, v in net.named_parameters():
            expected[k] = m * expected[k] + (1 - m) * v
    for k, v in slow.net.named_parameters():
        assert torch.allclose(v, expected[k], atol=1e-6)


@pytest.mark.parametrize(
    'num_images, num_keys, max_size, size',
    [
        (4_200, 256, 65536, 512),
        (50_000, 512, 4096, 4096),
        (100_000, 256, 65536, 16384),
        (2_000_000, 256, 65536, 65536),
        (60, 32, 4096, 32),
        (1, 2, 4096, 2),
    ],
)
def test_queue_fits_the_data(num_images, num_keys, max_size, size):
    q = Queue(max_size=max_size).build(3)
    q.set_data_size(num_images, num_keys)
    assert (
        q.size == size
        and q.keys.shape == (size, 3)
        and torch.allclose(q.keys.norm(dim=1), torch.ones(size))
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_split_batch_norm_is_batch_norm_of_each_group(groups, per_group, channels, last, seed):
    "Output, gradients and statistics against a plain batch-norm for each group s, s+S, s+2S, ..."
    torch.manual_seed(seed)
    n = groups * (per_group + 1)
    x, c = (
        torch.randn(n, channels, 2, 3, dtype=torch.double, requires_grad=True),
        torch.randn(n, channels, 2, 3, dtype=torch.double),
    )
    split, plain = (
        SplitBatchNorm(channels, groups).double(),
        [nn.BatchNorm2d(channels).double() for _ in range(groups)],
    )
    with torch.no_grad():
        split.weight.normal_()
        split.bias.normal_()
    for p in plain:
        p.load_state_dict(split.state_dict())
    y = split(x.contiguous(memory_format=torch.channels_last) if last else x)
    grads = torch.autograd.grad((y * c).sum(), [x, split.weight, split.bias])
    parts = [p(x[s::groups]) for s, p in enumerate(plain)]
    loss = sum((part * c[s::groups]).sum() for s, part in enumerate(parts))
    ref = torch.autograd.grad(loss, [x, *(p.weight for p in plain), *(p.bias for p in plain)])
    for s, part in enumerate(parts):
        assert torch.allclose(y[s::groups], part)
    assert (
        torch.allclose(grads[0], ref[0])
        and torch.allclose(grads[1], sum(ref[1 : 1 + groups]))
        and torch.allclose(grads[2], sum(ref[1 + groups :]))
    )
    assert torch.allclose(split.running_mean, torch.stack([p.running_mean for p in plain]).mean(0))
    assert torch.allclose(split.running_var, torch.stack([p.running_var for p in plain]).mean(0))


def test_momentum_split_and_shuffle_leave_the_online_network_alone():
    torch.manual_seed(0)
    online = Tower(resnet('resnet18', size=16, width=8), mlp(64, 8))
    slow = ema(0.9, bn_splits=4)(online)
    kinds = lambda m: {type(b) for b in m.modules() if isinstance(b, nn.BatchNorm2d)}
    assert kinds(slow) == {SplitBatchNorm} and kinds(online) == {nn.BatchNorm2d}
    assert [type(b) for b in slow.net.projector] == [
        type(b) for b in online.projector
    ]  # heads keep plain batch-norm
    both = ema(0.9, bn_splits=4)(
        Tower(split_batch_norm(resnet('resnet18', size=16, width=8), 8), nn.Identity())
    )
    assert {b.bn_splits for b in both.modules() if isinstance(b, SplitBatchNorm)} == {4}


def test_shuffled_keys_come_back_in_order():
    "Where a key depends on its image alone, shuffling changes nothing; its order follows the seed."
    torch.manual_seed(0)

    class Mean(nn.Module):
        def forward(self, x, keep=None):
            patches = x.flatten(2).transpose(1, 2)
            return Projections(
                x.mean((2, 3)) * 2, patches * 3, Features(x.mean((2, 3)), patches, x.shape[2:])
            )

    x = torch.rand(7, 3, 2, 2)
    e = ema(0.9, shuffle=True)(Mean())(x)
    patches = x.flatten(2).transpose(1, 2)
    assert torch.equal(e.image, x.mean((2, 3)) * 2) and torch.equal(
        e.features.image, x.mean((2, 3))
    )
    assert torch.equal(e.patches, patches * 3) and torch.equal(e.features.patches, patches)
    slow, x = (
        ema(0.9, bn_splits=2)(Tower(resnet('resnet18', size=16, width=8), nn.Identity())),
        torch.rand(8, 3, 16, 16),
    )
    again = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        again.append(slow(x).image)
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


@pytest.mark.parametrize(
    'call',
    [
        lambda: ema(-0.1),
        lambda: ema(0.9, 0.5),
        lambda: ema(0.9, ema_update='now'),
        lambda: Queue(0),
        lambda: Queue(2.5),
        lambda: Queue(max_size=0),
        lambda: Queue(3, 2).put(torch.ones(4, 2)),
        lambda: Queue(3, 2).set_data_size(100, 4),
        lambda: split_batch_norm(nn.Identity(), 0),
        lambda: SplitBatchNorm(2, 3)(torch.ones(4, 2, 1, 1)),
        lambda: EMA(nn.Identity(), 2.0),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError):
        call()


def test_a_tower_draws_patches_before_their_head_in_training():
    "Rows of a linear head over drawn patches are rows over all of them; in eval none is drawn."
    torch.manual_seed(0)
    tower = Tower(
        resnet('resnet18', size=32, width=8), mlp(64, 16), nn.Linear(64, 8), num_patches=5
    )
    e = tower(torch.rand(3, 3, 32, 32))
    whole = tower.patch_projector(e.features.patches)
    assert e.patches.shape == (3, 5, 8) and whole.shape == (3, 16, 8)
    assert (
        torch.isclose(e.patches[:, :, None], whole[:, None], atol=1e-6).all(3).sum(2) == 1
    ).all()
    assert tower.eval()(torch.rand(3, 3, 32, 32)).patches.shape == (3, 16, 8)

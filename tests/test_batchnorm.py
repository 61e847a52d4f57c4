"Batch-norm statistics that do not fit the images: noticed, said, and measured anew."

import copy
import warnings

import pytest
import torch
from torch import nn
from ssl_patch.evaluation.features import extract, remeasure_stats
from ssl_patch.evaluation.knn import knn
from ssl_patch.models.batchnorm import doubt_stats, norms_of, stats_gap
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.external import wrap
from ssl_patch.models.momentum import SplitBatchNorm, split_batch_norm
from toys import make_data


def told(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        call()
    return [str(w.message) for w in found if 'batch-norm layers' in str(w.message)]


def passed(e, x, momentum, batches=2):
    "An encoder whose statistics saw some batches."
    for m in norms_of(e, trained=False).values():
        m.momentum = momentum
    e.train()
    with torch.no_grad():
        for _ in range(batches):
            e(x)
    return e.eval()


def make(seed=0):
    torch.manual_seed(seed)
    return resnet('resnet18', 8, width=8)


@pytest.fixture(scope='module')
def data():
    return make_data(120, 60)


def test_slow_statistics_are_said_once_and_fresh_or_fitting_ones_never(data):
    x = data.train.images
    slow = passed(make(), x, 0.01)
    first = told(lambda: extract(slow, data.test))
    assert len(first) == 1 and '(net.bn1, net.layer1.0.bn1, ...)' in first[0]
    assert 'of 20 batch-norm layers' in first[0] and 'remeasure_stats(encoder, data)' in first[0]
    assert not told(lambda: extract(slow, data.test))
    quiet = (make(), passed(make(), x, 0.5, 12), vit(size=8, patch=4, width=16, depth=1, heads=1))
    for e in quiet:
        assert not told(lambda: extract(e, data.test))
    assert told(lambda: knn(passed(make(), x, 0.01), data, k=5))


def test_looking_changes_nothing(data):
    slow = passed(make(), data.train.images, 0.01)
    state = {n: v.clone() for n, v in slow.state_dict().items()}
    slow.train()
    slow.net.layer1.eval()
    with torch.no_grad():
        z = copy.deepcopy(slow).eval()(data.test.images).image
    assert torch.allclose(extract(slow, data.test)[0], z, atol=1e-5)
    assert all(torch.equal(v, state[n]) for n, v in slow.state_dict().items())
    assert slow.training and not slow.net.layer1.training and slow.net.layer2.training
    assert not any(m._forward_hooks for m in slow.modules())


def test_the_distance_is_that_of_two_normal_distributions():
    "Against torch.distributions, and 0 for statistics of the images themselves."
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3, eps=0.0))
    x = torch.rand(8, 3, 4, 4, generator=g)
    net[0].running_mean.copy_(torch.rand(3, generator=g))
    net[0].running_var.copy_(torch.rand(3, generator=g) + 0.5)
    net[0].num_batches_tracked += 1
    v, m = torch.var_mean(x, (0, 2, 3), correction=0)
    normal, kept = torch.distributions.Normal, net[0].running_var.sqrt()
    far = torch.distributions.kl_divergence(normal(m, v.sqrt()), normal(net[0].running_mean, kept))
    assert abs(stats_gap(net.eval(), x)['0'] - far.mean().item()) < 1e-5
    net[0].running_mean.copy_(m)
    net[0].running_var.copy_(v)
    assert abs(stats_gap(net, x)['0']) < 1e-6


def test_measured_anew_is_the_average_over_batches_in_random_order(data):
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    e = passed(wrap(first, 8), data.train.images, 0.01)
    new = remeasure_stats(e, data, batch_size=50)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))[:100]
    z = [e.net[0](e.normalise(data.train.images[i])) for i in order.split(50)]
    mean = torch.stack([v.mean((0, 2, 3)) for v in z]).mean(0)
    var = torch.stack([v.var((0, 2, 3)) for v in z]).mean(0)
    assert torch.allclose(new.net[1].running_mean, mean, atol=1e-6)
    assert torch.allclose(new.net[1].running_var, var, atol=1e-6)
    assert new.net[1].momentum == 0.01 and not new.training and e.card == {}
    assert new.card['batch_norm'] == 'measured anew on 100 images of colours'
    assert torch.equal(new.net[0].weight, e.net[0].weight)
    same = remeasure_stats(e, data.train, batch_size=50)
    assert torch.equal(same.net[1].running_var, new.net[1].running_var)


def test_it_mends_what_slow_statistics_break(data):
    "Features in eval mode are then close to those of whole batches in train mode."
    e = passed(make(), data.train.images, 0.001)
    new = remeasure_stats(e, data)
    batch = copy.deepcopy(e).train()
    with torch.no_grad():
        want = batch(data.test.images).image
        far = [(m(data.test.images).image - want).norm() / want.norm() for m in (e, new)]
    assert far[0] > 2 * far[1]
    assert max(stats_gap(new, data.test.images).values()) < 0.1
    assert not told(lambda: extract(new, data.test))


def test_split_batch_norm_keeps_its_groups_and_takes_any_batch(data):
    e = split_batch_norm(make(), 8)
    passed(e, data.train.images, 0.01)
    new = remeasure_stats(e, data, batch_size=30)
    splits = [m.bn_splits for m in new.modules() if isinstance(m, SplitBatchNorm)]
    assert set(splits) == {8} and len(splits) == 20


def test_another_size_and_a_network_in_half(data):
    e = passed(make(), data.train.images, 0.01)
    new = remeasure_stats(e, data, size=16)
    assert new.sizes == {8} and max(stats_gap(new.accept(16), _large(data)).values()) < 0.3
    half = remeasure_stats(copy.deepcopy(e).bfloat16(), data)
    assert half.mean.dtype == torch.bfloat16 and extract(half, data.test)[0].isfinite().all()


def _large(data):
    return torch.nn.functional.interpolate(data.test.images / 255, (16, 16), mode='bilinear')


@pytest.mark.parametrize(
    'call, word',
    [
        (lambda d: remeasure_stats(vit(size=8, patch=4, width=16, depth=1, heads=1), d), 'got ViT'),
        (lambda d: remeasure_stats(make(), d, batch_size=1), 'batch_size'),
        (lambda d: remeasure_stats(make(), d.train.subset([0])), 'data must be at least 2 images'),
        (lambda d: remeasure_stats(nn.BatchNorm2d(3), d), 'size must be a whole number'),
    ],
)
def test_what_cannot_be_measured(call, word, data):
    with pytest.raises(ValueError, match=word):
        call(data)


def test_one_layer_is_one_example():
    net = nn.Sequential(nn.BatchNorm2d(3))
    x = torch.rand(8, 3, 4, 4) + 9
    passed(net, x, 0.01)
    (words,) = told(lambda: doubt_stats(net, x))
    assert words.startswith('1 of 1 batch-norm layers (0) have')


def test_what_is_not_finite_for_lack_of_statistics_says_so(data):
    e = passed(make(), data.train.images, 0.01)
    for m in norms_of(e).values():
        m.running_var.mul_(1e-36)
    with pytest.raises(ValueError, match='not finite; remeasure_stats'):
        told(lambda: extract(e, data.test))
    assert extract(remeasure_stats(e, data), data.test)[0].isfinite().all()

"Features and baselines are kept by content: what must change the key, and what must not."

import math
from dataclasses import replace
import pytest
import torch
from torch import nn
from ssl_patch.evaluation.cache import hash_tensors
from ssl_patch.evaluation.protocol import evaluate
from ssl_patch.evaluation.linear import linear_probe_cached
from ssl_patch.evaluation.knn import knn
from toys import Net, make_data


def test_baselines_are_remembered_until_something_changes():
    data, made = make_data(noise=90), []

    class Counting(Net):
        def reinitialized(self, seed):
            made.append(Net(seed, self.size))
            return made[-1]

    net = Counting(4)
    a, b = knn(net, data, k=5), knn(net, data, k=5)
    assert [m.calls for m in made] == [2, 0] and a.baselines == b.baselines
    knn(net, data, k=6)
    knn(net, data, k=5, seed=1)
    assert [m.calls for m in made] == [2, 0, 0, 2]  # another k: another value of the same features
    data.train.labels = data.train.labels.flip(0)
    knn(net, data, k=5)
    assert made[-1].calls == 2
    assert knn(net, data, k=5, baselines=False).baselines == {} and len(made) == 5


def test_features_are_extracted_once_for_all_protocols():
    "Weights, pixels, layer or input size that change make new features; few are kept."
    data, net = make_data(noise=90), Net()
    calls = lambda f: (net.log.clear(), f(), net.calls)[2]
    once = lambda **kw: knn(net, data, k=5, baselines=False, **kw)
    assert (
        calls(once) == 2
        and calls(lambda: linear_probe_cached(net, data, epochs=2, baselines=False)) == 0
        and calls(once) == 0
    )
    with torch.no_grad():
        net.net[0].weight.mul_(2)
    assert calls(once) == 2
    data.train.labels = data.train.labels.flip(0)
    assert calls(once) == 0  # the images are as they were
    data.test.images[0] = 0
    assert calls(once) == 1 and calls(lambda: once(size=10)) == 2
    for seed in range(5):
        knn(Net(seed), data, k=5, baselines=False)
    assert len(data._features) == 6
    fresh = make_data(noise=90)
    fresh.train.labels = fresh.train.labels.flip(0)
    fresh.test.images[0] = 0
    assert once().value == knn(net, fresh, k=5, baselines=False).value


def test_an_evaluation_looks_at_the_encoder_once(monkeypatch):
    "Weights are hashed, noise is shown and splits are compared once, for both splits together."
    from ssl_patch.evaluation import cache, protocol, records

    data, net, count = make_data(noise=90), Net(), {'hash_tensors': 0, 'check_leakage': 0}

    def counted(name, f):
        def g(*a, **kw):
            count[name] += name == 'check_leakage' or any(isinstance(x, nn.Module) for x in a)
            return f(*a, **kw)

        return g

    for room in (cache, protocol, records):  # wherever they are looked up
        for name in count:
            if hasattr(room, name):
                monkeypatch.setattr(room, name, counted(name, getattr(room, name)))
    knn(net, data, k=5, baselines=False)
    assert count == {'hash_tensors': 1, 'check_leakage': 1} and sorted(net.log) == [4, 30, 60]


def test_features_on_disk(tmp_path):
    data, net = make_data(noise=90), Net()
    once = lambda d, **kw: knn(net, d, k=5, baselines=False, cache=tmp_path, **kw)
    a = once(data)
    made = {f.name for f in tmp_path.iterdir()}
    assert net.calls == 2 and len(made) == 2
    b = once(make_data(noise=90))  # another session: other objects, the same content
    assert net.calls == 2 and replace(b, seconds=a.seconds) == a
    with torch.no_grad():
        net.net[0].weight.mul_(2)
    once(data)
    once(data, layer='image', size=10)
    assert net.calls == 6 and len(list(tmp_path.iterdir())) == 6
    for f in tmp_path.iterdir():
        f.write_bytes(b'')  # as after a full disk
    data._features.clear()
    assert replace(once(data), seconds=0.0) == replace(once(data), seconds=0.0) and net.calls == 8


@pytest.mark.parametrize(
    'change',
    [
        lambda n: n.register_forward_hook(
            lambda m, i, out: out * torch.tensor([1.0, 1, 0, 0, 0, 0])
        ),
        lambda n: n.scales.append(2.0),
        lambda n: n.register_buffer('extra', torch.full((6,), 3.0), persistent=False),
        lambda n: setattr(n, 'after', lambda z: z.sort(1).values),
    ],
)
def test_what_no_weight_shows_changes_the_key(change):
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.scales, self.after, self.extra = [], (lambda z: z), None
            del self.extra

        def forward(self, x):
            z = self.after(super().forward(x)) * math.prod(self.scales)
            return z + getattr(self, 'extra', 0.0)

    data, net = make_data(noise=120), Odd()
    knn(net, data, k=5, baselines=False)
    change(net)
    assert (
        knn(net, data, k=5, baselines=False).each
        == knn(net, make_data(noise=120), k=5, baselines=False).each
    )
    assert len(data._features) == 4


def test_a_score_that_changes_features_spoils_nothing():
    data, net = make_data(noise=120), Net()
    first = knn(net, data, k=5, baselines=False).value
    evaluate(
        lambda x, y, u, v, classes: float(x.zero_().sum() + u.zero_().sum()),
        net,
        data,
        'rude',
        {},
        baselines=False,
    )
    assert knn(net, data, k=5, baselines=False).value == first


def test_images_that_are_replaced_are_extracted_anew(tmp_path):
    data, net = make_data(noise=120), Net()
    a = knn(net, data, k=5, baselines=False, cache=tmp_path)
    for _ in range(2):
        data.train.images = 255 - data.train.images  # twice: the same pixels in another tensor
    assert knn(net, data, k=5, baselines=False, cache=tmp_path).each == a.each and net.calls == 2
    data.train.images = data.train.images.flip(0)
    assert (
        knn(net, data, k=5, baselines=False, cache=tmp_path).images != a.images and net.calls == 3
    )


def test_features_of_a_network_in_channels_last_are_remembered():
    "A 1x1 convolution in channels_last has strides that cannot be read as bytes as they are."
    net = nn.Conv2d(4, 6, 1).to(memory_format=torch.channels_last)
    key = hash_tensors(net)
    assert key == hash_tensors(net)
    with torch.no_grad():
        net.weight[0, 0] += 1
    assert key != hash_tensors(net)

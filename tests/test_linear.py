"The cached linear probe against scikit-learn and plain SGD."

import math
import pytest
import torch
import torch.nn.functional as F
from ssl_patch.evaluation.metrics import (
    accuracy,
)
from ssl_patch.evaluation.linear import fit_linear, linear_probe_cached, standardise
from toys import Net, rand, make_data


def clouds(n, d=20, classes=5, seed=0, spread=0.07):
    y = torch.arange(n) % classes
    return rand(classes, d, seed=9)[y] * spread + rand(n, d, seed=seed) @ torch.diag(
        torch.logspace(-1, 0.7, d)
    ), y


@pytest.mark.parametrize('wd', [0.003, 0.03])
def test_linear_with_weight_decay_finds_sklearns_minimum(wd):
    from sklearn.linear_model import LogisticRegression

    (x, y), (u, v) = clouds(1024), clouds(1000, seed=1)
    x, u = standardise(x, u)
    sk = LogisticRegression(C=1 / (len(x) * wd), tol=1e-8, max_iter=2000).fit(x, y)
    head = fit_linear(x, y, 5, weight_decay=wd)
    assert abs(accuracy(head(u).argmax(1), v) - sk.score(u, v)) < 0.01
    W = torch.from_numpy(sk.coef_).float()
    assert (head.weight - head.weight.mean(0) - W + W.mean(0)).norm() < 0.03 * W.norm()


def test_linear_is_plain_sgd_with_momentum_and_a_cosine():
    x, y = clouds(50)
    g = torch.Generator().manual_seed(3)
    W, b = torch.randn(5, 20, generator=g) * 0.01, torch.zeros(5)
    vW, vb, step = torch.zeros(5, 20), torch.zeros(5), 0
    for _ in range(4):
        order = torch.randperm(50, generator=g)
        for i in (order[:20], order[20:40], order[40:]):
            wrong = ((x[i] @ W.T + b).softmax(1) - F.one_hot(y[i], 5)) / len(i)
            vW, vb = (
                0.9 * vW + wrong.T @ x[i] + 0.1 * W,
                0.9 * vb + wrong.sum(0),
            )  # no decay on the bias
            lr = 0.3 * (1 + math.cos(math.pi * step / 12)) / 2
            W, b, step = W - lr * vW, b - lr * vb, step + 1
    head = fit_linear(x, y, 5, epochs=4, lr=0.3, batch_size=20, weight_decay=0.1, seed=3)
    assert (
        torch.allclose(head.weight, W, atol=1e-5)
        and torch.allclose(head.bias, b, atol=1e-5)
        and b.abs().max() > 0.01
    )


def test_unpenalised_linear_is_as_good_as_sklearn():
    from sklearn.linear_model import LogisticRegression

    (x, y), (u, v) = clouds(2000), clouds(2000, seed=1)
    x, u = standardise(x, u)
    sk = LogisticRegression(C=1e6, tol=1e-6, max_iter=3000).fit(x, y)
    head = fit_linear(x, y, 5)
    assert 0.4 < sk.score(u, v) < 0.98
    assert abs(accuracy(head(u).argmax(1), v) - sk.score(u, v)) < 0.015
    assert abs(accuracy(head(x).argmax(1), y) - sk.score(x, y)) < 0.015


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_the_learning_rate_does_not_depend_on_the_scale_of_features(scale):
    (x, y), (u, v) = clouds(500), clouds(500, seed=1)

    def acc(s):
        a, b = standardise(x * s + s, u * s + s)
        return accuracy(fit_linear(a, y, 5)(b).argmax(1), v)

    assert abs(acc(scale) - acc(1.0)) <= 0.004


def test_steepest_possible_features_do_not_diverge():
    y = torch.arange(1000) % 2
    (x,) = standardise((rand(1000) + y - 0.5)[:, None] * rand(1, 50, seed=1))
    head = fit_linear(x, y, 2)  # rank one: all of the variance in one direction
    assert F.cross_entropy(head(x), y) < 0.65 and accuracy(head(x).argmax(1), y) > 0.65


def test_linear_is_a_function_of_its_seed_and_leaves_the_global_state_alone():
    x, y = clouds(300)
    (x,) = standardise(x)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    a, b, c = (fit_linear(x, y, 5, epochs=3, seed=s).weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_standardise():
    x, u = (
        torch.cat(
            [rand(100, 4) * torch.tensor([1.0, 5, 1e-4, 1e4]) + 3, torch.full((100, 1), 0.1)], 1
        ),
        rand(7, 5),
    )
    a, b = standardise(x, u)
    assert (
        torch.allclose(a.mean(0), torch.zeros(5), atol=1e-3)
        and (a[:, 4] == 0).all()
        and (b[:, 4] == 0).all()
    )
    assert torch.allclose(a[:, :4].square().mean(0) * 5, torch.ones(4), atol=1e-3)
    assert torch.allclose(
        b[:, 0] * 5**0.5, (u[:, 0] - x[:, 0].mean()) / x[:, 0].std(correction=0), atol=1e-4
    )


@pytest.mark.parametrize(
    'change',
    [
        dict(epochs=0),
        dict(lr=0.0),
        dict(lr=float('inf')),
        dict(batch_size=0),
        dict(weight_decay=-1.0),
        dict(epochs=1.5),
    ],
)
def test_bad_linear_arguments(change):
    net = Net()
    with pytest.raises(ValueError, match=next(iter(change))):
        linear_probe_cached(net, make_data(), **change)
    assert net.calls == 0

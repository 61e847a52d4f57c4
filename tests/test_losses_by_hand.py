"""Losses on toys of a few vectors, to six digits, and in their slots: numbers that were worked out
apart from the library."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssl_patch.methods.branches import l2_normalize
from ssl_patch.methods.co2 import CO2Loss, co2, co2_consistency
from ssl_patch.methods.contrast import info_nce, label_entropy
from ssl_patch.methods.densecl import DenseCLLoss, queue_like
from ssl_patch.methods.mining import neighbour_masks, repco_pairs
from ssl_patch.methods.patch_loss import ViewOutputs
from ssl_patch.methods.repco import RepCo, RepCoLoss, repco
from ssl_patch.methods.label_pictures import show_soft_labels
from ssl_patch.methods.ressl import ReSSLLoss, ressl
from ssl_patch.methods.sce import SCE, SCELoss, sce, sce_soft_labels
from ssl_patch.models.encoders import vit
from ssl_patch.models.heads import Projections
from ssl_patch.models.interface import Features
from ssl_patch.models.momentum import Queue
from ssl_patch.views.crops import View

q = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
k = torch.tensor([[0.8, 0.6], [0.6, 0.8]], dtype=torch.float64)
queue = torch.tensor([[0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
same = torch.ones(8, 4) / 2


def near(got, *expected, eps=1.5e-6):
    want = torch.cat([torch.as_tensor(e, dtype=torch.float64).flatten() for e in expected])
    got = torch.as_tensor(got, dtype=torch.float64).flatten()
    torch.testing.assert_close(got, want, rtol=0, atol=eps)


def rows(f, **kw):
    "Row by row."
    return torch.stack([f(q[i : i + 1], k[i : i + 1], queue, **kw) for i in range(2)])


def gradient(f, **kw):
    a = q.clone().requires_grad_()
    return torch.autograd.grad(f(a, k, queue, **kw), a)[0]


def softmax(x, tau):
    return (x @ queue.T / tau).softmax(1)


# ---- ReSSL


def test_ressl():
    near(rows(ressl, tau_s=0.5, tau_t=0.25), 0.526085, 0.868888)
    near(rows(ressl), 0.003216, 2.113582)
    near(ressl(q, k, queue, tau_s=0.5, tau_t=0.25), 0.697486)
    near(gradient(ressl, tau_s=0.5, tau_t=0.5), [0.040567, -0.027996], [-0.179043, -0.008490])


@pytest.mark.parametrize('tau_s, tau_t', [(0.5, 0.5), (0.1, 0.04)])
def test_gradient_of_ressl_is_query_less_key(tau_s, tau_t):
    P, Q = softmax(k, tau_t), softmax(q, tau_s)
    near(gradient(ressl, tau_s=tau_s, tau_t=tau_t), (Q - P) @ queue / (2 * tau_s), eps=1e-9)


# ---- CO2


@pytest.mark.parametrize(
    'tau_con, PQ, QP',
    [
        (0.5, (0.025656, 0.102280), (0.024166, 0.109176)),
        (0.04, (0.000617, 4.933071), (0.000121, 4.933071)),
        (0.05, (0.002841, 3.856110), (0.000711, 3.856110)),
    ],
)
def test_both_halves_of_the_consistency_term(tau_con, PQ, QP):
    P, Q = softmax(k, tau_con), softmax(q, tau_con)
    near((P * (P / Q).log()).sum(1), *PQ)
    near((Q * (Q / P).log()).sum(1), *QP)
    halves = (torch.tensor(PQ) + torch.tensor(QP)) / 2
    near(rows(co2_consistency, tau_con=tau_con), *halves)


@pytest.mark.parametrize(
    'tau, tau_con, alpha, con_rows, con, total',
    [
        (0.5, 0.5, 1.0, (0.024911, 0.105728), 0.065319, 1.039443),
        (0.07, 0.04, 10.0, (0.000369, 4.933071), 2.466720, 26.178069),
        (0.2, 0.05, 0.3, (0.001776, 3.856110), 1.928943, 1.519668),
    ],
)
def test_co2(tau, tau_con, alpha, con_rows, con, total):
    near(rows(co2_consistency, tau_con=tau_con), *con_rows)
    near(co2_consistency(q, k, queue, tau_con=tau_con), con)
    near(co2(q, k, queue, tau=tau, tau_con=tau_con, alpha=alpha), total, eps=6e-6)
    near(rows(co2, tau=tau, tau_con=tau_con, alpha=0), *rows(info_nce, tau=tau))


def test_labels_and_gradient_of_co2():
    P, Q = softmax(k, 0.5), softmax(q, 0.5)
    near(P, [0.659478, 0.321002, 0.019520], [0.584425, 0.391752, 0.023822])
    near(Q, [0.745181, 0.224444, 0.030375], [0.371234, 0.553816, 0.074951])
    labels = CO2Loss(tau_con=0.5).soft_labels(k, queue)
    near(labels[:, 1:], P)
    assert (labels[:, 0] == 0).all()
    near(gradient(co2_consistency, tau_con=0.5), [0.035846, -0.027650], [-0.191083, -0.022208])
    near(rows(info_nce, tau=0.5), 0.641612, 1.306634)


# ---- SCE


@pytest.mark.parametrize(
    'kw, expected',
    [
        (dict(lam=0), ([0, 0.807882, 0.191410, 0.000708], [0, 0.689184, 0.309671, 0.001145])),
        (
            dict(lam=0.5),
            ([0.5, 0.403941, 0.095705, 0.000354], [0.5, 0.344592, 0.154835, 0.000573]),
        ),
        (
            dict(lam=0, positive_mode='zero_logit'),
            (
                [0.017068, 0.794094, 0.188143, 0.000696],
                [0.012466, 0.680593, 0.305810, 0.001131],
            ),
        ),
    ],
)
def test_labels_of_sce(kw, expected):
    near(sce_soft_labels(k, queue, tau_m=0.25, **kw), *expected)


@pytest.mark.parametrize(
    'tau, tau_m, mode, expected, mean',
    [
        (0.5, 0.25, 'masked', (0.957590, 1.245616), 1.101603),
        (0.5, 0.25, 'zero_logit', (0.952197, 1.246377), 1.099287),
        (0.1, 0.07, 'masked', (1.144645, 2.185267), 1.664956),
        (0.1, 0.07, 'zero_logit', (1.144644, 2.185267), 1.664955),
        (0.1, 0.05, 'masked', (1.129462, 2.221594), 1.675528),
        (0.1, 0.05, 'zero_logit', (1.129462, 2.221594), 1.675528),
    ],
)
def test_sce(tau, tau_m, mode, expected, mean):
    how = dict(tau=tau, tau_m=tau_m, positive_mode=mode)
    near(rows(sce, **how), *expected)
    near(sce(q, k, queue, **how), mean)


@pytest.mark.parametrize(
    'tau, tau_m, expected, mean',
    [
        (0.5, 0.25, (1.208003, 1.508955), 1.358479),
        (0.1, 0.07, (1.248545, 2.566615), 1.907580),
        (0.1, 0.05, (1.240928, 2.547568), 1.894248),
    ],
)
def test_sce_with_keys_of_the_batch(tau, tau_m, expected, mean):
    how = dict(tau=tau, tau_m=tau_m, in_batch=True)
    near([sce(q[i : i + 1], k, queue, offset=i, **how) for i in range(2)], *expected)
    near(sce(q, k, queue, **how), mean)


def test_pieces_of_sce():
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1)
    p = F.softmax(scores / 0.5, 1)
    near(p, [0.526443, 0.352885, 0.106287, 0.014384], [0.270730, 0.270730, 0.403881, 0.054659])
    near(-torch.log1p(-p[:, 0]), 0.747483, 0.315711)  # the ceiling
    near(rows(sce, lam=0, tau=0.5, tau_m=0.25), 1.273569, 1.184598)
    near(rows(sce, lam=1, tau=0.5, tau_m=0.25), 0.641612, 1.306634)
    near(sce(q, k, tau=0.5, tau_m=0.25), 0.713015)


# ---- in the slot


def test_slots_are_their_functions():
    x = q, k, queue
    assert ReSSLLoss(tau_t=0.1)(*x) == ressl(*x, tau_t=0.1)
    assert CO2Loss(tau_con=0.5)(*x) == co2(*x, tau_con=0.5)
    assert SCELoss(lam=0.25)(*x) == sce(*x, lam=0.25)
    near(ReSSLLoss().chance(8), ressl(same, same), eps=1e-5)
    near(ReSSLLoss().chance(8, queue=8), ressl(same, same, same), eps=1e-5)
    near(CO2Loss().chance(8), co2(same, same), eps=1e-5)
    near(CO2Loss().chance(8, queue=8), co2(same, same, same), eps=1e-5)
    near(SCELoss().chance(8, queue=8), sce(same, same, same), eps=1e-5)
    whole = sce(same, same, same, in_batch=True)
    near(SCELoss(in_batch=True).chance(8, queue=8), whole, eps=1e-5)


def test_soft_labels_of_the_slots():
    relations = ReSSLLoss(tau_t=0.1).soft_labels(k, queue)
    assert torch.equal(relations, sce_soft_labels(k, queue, lam=0.0, tau_m=0.1))
    assert (relations[:, 0] == 0).all()
    g = torch.Generator().manual_seed(0)
    keys, older = (F.normalize(torch.randn(n, 48, generator=g), dim=1) for n in (64, 146))
    half_known = 0.5 * math.log(2) + 0.5 * math.log(2 * 146)  # a half, the rest shared by all
    near(label_entropy(SCELoss(tau_m=1e6).soft_labels(keys, older)), half_known, eps=1e-4)


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda: ReSSLLoss(tau_s=-1.0), 'tau_s must be a number above 0, got -1.0'),
        (lambda: CO2Loss(tau_con=0.0), 'tau_con must be a number above 0, got 0.0'),
        (lambda: SCELoss(positive_mode='none'), "'masked' or 'zero_logit', got 'none'"),
        (
            lambda: SCELoss(in_batch=True, positive_mode='zero_logit'),
            "positive_mode must be 'masked' with keys of the batch",
        ),
        (
            lambda: show_soft_labels(torch.rand(3, 8, 8), torch.rand(6, 3, 8, 8), dict(a=same[0])),
            'labels must be rows of 6',
        ),
    ],
)
def test_slots_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- patches


def outputs(features=None, grad=False, B=4, M=16, d=8, D=12):
    "Random unit rows of one view on a grid of 4 x 4 patches, as both branches give them."

    def one(grad=False):
        f = torch.randn(B, M, D) if features is None else features
        image = l2_normalize(torch.randn(B, d)).requires_grad_(grad)
        patches = l2_normalize(torch.randn(B, M, d)).requires_grad_(grad)
        return Projections(image, patches, Features(f.mean(1), f, (4, 4)))

    boxes = torch.tensor([[0.0, 0, 8, 8]] * B)
    view = View(torch.zeros(B, 3, 8, 8), boxes, torch.zeros(B, dtype=torch.bool))
    return ViewOutputs(view, one(grad), one())


def test_densecl_in_its_slot():
    "The features of view b are those of view a in reverse order, so the match must undo it."
    torch.manual_seed(0)
    f = torch.randn(4, 16, 12)
    a, b = outputs(features=f, grad=True), outputs(features=f.flip(1))
    z = l2_normalize(torch.randn(32, 8))
    loss = DenseCLLoss()(a, b, z)
    s = (a.query.patches * b.key.patches.flip(1)).sum(2) / 0.2
    n = torch.einsum('bmd,kd->bmk', a.query.patches, z) / 0.2
    want = -(s - torch.cat([s[..., None], n], 2).logsumexp(2)).mean()
    near(loss.item(), want.item(), eps=1e-5)
    loss.backward()
    assert a.query.patches.grad.abs().sum() > 0
    assert not any(x.grad is not None for x in (a.query.image, a.key.patches, b.key.patches))
    assert DenseCLLoss().chance(4, 16, 32) == math.log(33)
    assert DenseCLLoss().chance(4, 16, 0) == math.log(4)


def test_a_queue_of_image_means_is_as_long_as_that_of_images():
    assert queue_like(None, 100).label == 'queue fitted to the data, at most 100'
    assert (queue_like(64, 100).size, queue_like(Queue(64), 100).size) == (64, 64)


def test_repco_in_its_slot():
    torch.manual_seed(0)
    equal = outputs(features=torch.ones(4, 16, 12))
    assert not RepCoLoss().pairs(equal.key.features.patches, (4, 4)).neg_ok.any()
    a, b, z = outputs(grad=True), outputs(), l2_normalize(torch.randn(32, 8))
    loss = RepCoLoss()(a, b, z)
    pairs = repco_pairs(a.key.features.patches, (4, 4))
    near(loss.item(), repco(a.query.patches, a.key.patches, pairs, z).item())
    loss.backward()
    assert a.query.patches.grad.abs().sum() > 0
    assert not any(x.grad is not None for x in (a.key.patches, b.key.patches, a.query.image))
    assert sorted(RepCoLoss.required_outputs) == [('a', 'key'), ('a', 'query')]


@pytest.mark.parametrize(
    'make, grid, has_queue, words',
    [
        (dict(), (1, 1), False, 'min_distance must be less on a grid of 1 x 1 patches'),
        (dict(min_distance=4), (4, 4), False, 'min_distance must be less .*got 4'),
        (dict(use_positives=False), (1, 1), False, 'beta must be 0 on a grid of 1 x 1 patches'),
        (
            dict(negatives_per_image=2),
            (4, 4),
            True,
            'negatives_per_image must be None with a queue',
        ),
    ],
)
def test_what_a_grid_makes_impossible(make, grid, has_queue, words):
    with pytest.raises(ValueError, match=words):
        RepCoLoss(**make).check(grid, has_queue)


def test_sizes_of_repco():
    small = vit('tiny', size=32, patch=4, width=48, depth=2, heads=3)
    with pytest.raises(ValueError, match='on a grid of 1 x 1'):
        RepCo(small, pool=8)
    assert RepCo(small).views_to_see == dict(query=[0], key=[0, 1])
    around = neighbour_masks(7)[0].sum(1).view(7, 7)
    assert [int(around[0, 0]), int(around[0, 3]), int(around[3, 3])] == [3, 5, 8]


def test_a_queue_drowns_two_neighbours():
    "Two local negatives at 0.6 beside a positive at 0.7, each random key adds exp(1/(2 d tau^2))."
    g = torch.Generator().manual_seed(0)
    x, keys = (F.normalize(torch.randn(n, 128, generator=g).double(), dim=1) for n in (1, 65536))
    scores = torch.cat([torch.tensor([0.7, 0.6, 0.6]).double(), (x @ keys.T)[0]]) / 0.2
    two, one = 2 * math.exp(3), math.exp(3.5)
    expected = two / (two + one + 65536 * math.exp(1 / (2 * 128 * 0.2**2)))
    near(scores.softmax(0)[1:3].sum(), expected, eps=1e-5)


# ---- forms of methods


def test_either_form_of_sce_goes_with_any_preset():
    encoder = vit('tiny', size=32, patch=4, width=48, depth=2, heads=3)
    heads = dict(hidden=64, out=32, queue=64)
    both_ways = SCE(encoder, symmetric=True, **heads)
    assert [a.name for a in both_ways.augmentations] == ['byol_a', 'byol_b']
    assert (both_ways.loss_scale, set(both_ways.view_pairs)) == (1 / 2, {(0, 1), (1, 0)})
    one_way = SCE(encoder, preset='imagenet', symmetric=False, **heads)
    assert [a.name for a in one_way.augmentations] == ['moco_v2', 'weak']
    assert (one_way.loss_scale, one_way.view_pairs) == (1.0, ((0, 1),))

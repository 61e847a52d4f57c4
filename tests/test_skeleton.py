"""The step of a method against plain code, the slots against each other, and what a user fills
them with: a loss, a patch loss, heads, a whole method of one's own."""

import copy
import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from steps import draw, said, tiny_resnet, tiny_vit
from ssl_patch.methods.aps import APS, AsymmetricPatchSampler
from ssl_patch.methods.branches import all_view_pairs, l2_normalize, pair_stats
from ssl_patch.methods.co2 import CO2Loss
from ssl_patch.methods.compose import build_method, load_papers, method_options, step_cost
from ssl_patch.methods.configs import MethodConfig, methods, register_method
from ssl_patch.methods.contrast import ImageLoss, InfoNCELoss, info_nce
from ssl_patch.methods.densecl import DenseCL, DenseCLLoss
from ssl_patch.methods.local_to_global import LocalToGlobal
from ssl_patch.methods.method import Method
from ssl_patch.methods.presets import method_from_config
from ssl_patch.methods.moco import MoCoV2, MoCoV3
from ssl_patch.methods.patch_loss import PatchLoss, PatchLosses
from ssl_patch.methods.repco import RepCo
from ssl_patch.methods.ressl import ReSSL, ReSSLLoss
from ssl_patch.methods.sce import SCE, SCELoss
from ssl_patch.models.encoders import vit
from ssl_patch.models.heads import mlp, mlp_heads
from ssl_patch.models.momentum import Queue, ema
from ssl_patch.views.augmentations import aug_moco_v2, aug_weak

strong_weak = (aug_moco_v2(16), aug_weak(16))
weak_weak = (aug_weak(16), aug_weak(16))
one_way = ((0, 1),)


@pytest.fixture
def encoder():
    return tiny_vit()


# ---- the two plain steps


def cross_entropy(q, k, tau):
    "Which of the keys belongs to query i? The i-th."
    scores = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T
    return F.cross_entropy(scores / tau, torch.arange(len(q)))


def plain_aps(net, views, keeps, tau=0.1):
    "Both views on the patches that they keep; keys are the projections of the other, detached."
    z1, z2 = (net.projector(net.encoder(v.x, keep).image) for v, keep in zip(views, keeps))
    q1, q2 = net.predictor(z1), net.predictor(z2)
    return cross_entropy(q1, z2.detach(), tau) + cross_entropy(q2, z1.detach(), tau)


def plain_moco_v3(net, slow, views, progress, start=0.99, tau=0.2):
    "The slow copy moves, its projections are the keys; momentum goes to 1 on a half cosine."
    m = 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
    with torch.no_grad():
        for part in ('encoder', 'projector'):
            new_parameters = getattr(net, part).parameters()
            for old, new in zip(getattr(slow, part).parameters(), new_parameters):
                old.copy_(m * old + (1 - m) * new)
        k1, k2 = (slow.projector(slow.encoder(v.x).image) for v in views)
    q1, q2 = (net.predictor(net.projector(net.encoder(v.x).image)) for v in views)
    return 2 * tau * (cross_entropy(q1, k2, tau) + cross_entropy(q2, k1, tau))


def parts(m):
    return dict(encoder=m.encoder, projector=m.tower.projector, predictor=m.predictor)


def copied(m):
    return SimpleNamespace(**copy.deepcopy(parts(m)))


def aps_by_slots(encoder):
    projector, predictor = mlp_heads(32, 32, 16)
    return Method(
        encoder,
        weak_weak,
        patch_sampler=AsymmetricPatchSampler(),
        loss=InfoNCELoss(tau=0.1),
        projector=projector,
        predictor=predictor,
    )


def moco_v3_by_slots(encoder):
    return Method(
        encoder,
        strong_weak,
        key_encoder=ema(0.99, 1.0),
        loss=InfoNCELoss(tau=0.2),
        projector=mlp(32, 32, 32, 16),
        predictor=mlp(16, 32, 16),
        loss_scale=0.4,
    )


def assert_same_steps(m, plain_loss, steps):
    """Loss and gradient of every step of a training agree. Each starts from the same weights, as
    rounding grows from step to step."""
    optimizer, values = torch.optim.SGD(m.parameters(), 0.01), []
    for views, keeps, progress in steps:
        net = copied(m)
        loss, _ = m(views, keeps, progress)
        expected = plain_loss(net, views, keeps, progress)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        expected.backward()
        for name, part in parts(m).items():
            ours, plain = gradient(part), gradient(getattr(net, name))
            assert plain.norm() > 1e-3
            assert (ours - plain).norm() < 1e-4 * plain.norm(), name
        optimizer.step()
        m.after_step(progress)
        values.append(loss.item())
    assert max(values) - min(values) > 1e-2  # it has moved


def gradient(part):
    return torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])


@pytest.mark.parametrize('make', [partial(APS, hidden=32, out=16), aps_by_slots])
def test_aps_is_the_plain_step(encoder, make):
    m = make(encoder)
    views, draws = draw(m)
    assert len(draws) == 4
    plain = lambda net, views, keeps, progress: plain_aps(net, views, keeps)
    assert_same_steps(m, plain, [(views, keeps, 0.0) for keeps in draws])


@pytest.mark.parametrize('make', [partial(MoCoV3, hidden=32, out=16), moco_v3_by_slots])
def test_moco_v3_is_the_plain_step(make):
    m = make(tiny_vit(variant='moco_v3'))
    slow = copied(m)
    plain = lambda net, views, keeps, progress: plain_moco_v3(net, slow, views, progress)
    steps = [(draw(m, seed=i)[0], None, progress) for i, progress in enumerate((0.0, 0.4, 0.8))]
    assert_same_steps(m, plain, steps)
    for part in ('encoder', 'projector'):
        keys = getattr(m.key_encoder.net, part).parameters()
        for ours, own in zip(keys, getattr(slow, part).parameters()):
            assert torch.allclose(ours, own, atol=1e-6)
    assert not torch.equal(slow.projector[0].weight, m.tower.projector[0].weight)


# ---- the step


def test_views_have_statistics_of_their_own(encoder):
    "Each view goes through the heads alone: the other view does not move its batch-norm output."
    m = APS(encoder, hidden=32, out=16)
    (v1, v2), draws = draw(m)
    q, _ = m.queries_and_keys([v1, v2], draws[0], 0.0)
    again, _ = m.queries_and_keys([v1, v1], draws[0], 0.0)
    assert torch.equal(q[0].image, again[0].image)
    assert not torch.equal(q[1].image, again[1].image)


@pytest.mark.parametrize('when, moved', [('before', 0.5), ('after', 0.0)])
def test_ema_before_or_after(encoder, when, moved):
    m = Method(encoder, weak_weak, key_encoder=ema(0.5, ema_update=when))
    weight = m.key_encoder.net.projector[0].weight
    start = weight.clone()
    with torch.no_grad():
        m.tower.projector[0].weight.add_(1.0)
    m(draw(m)[0])
    assert torch.allclose(weight, start + moved)
    m.after_step()
    assert torch.allclose(weight, start + 0.5)


def test_evaluating_moves_nothing(encoder):
    m = MoCoV3(encoder, hidden=32, out=16).eval()
    with torch.no_grad():
        m.tower.projector[0].weight.add_(1.0)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    m(draw(m)[0])
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_queue_never_holds_the_positive(encoder):
    seen = []

    def note(q, k, queue):
        seen.append((k, queue.clone()))
        return (q * 0).sum()

    m = Method(encoder, strong_weak, queue=Queue(12), view_pairs=one_way, loss=note)
    seen.clear()  # of the trial when it was built
    for s in range(4):
        m(draw(m, seed=s)[0])
        m.after_step()
    assert len(seen) == 4
    for k, queue in seen:
        assert (k @ queue.T).max() < 0.9999
    # a ring of 12, written 8 at a time
    assert torch.equal(seen[3][1][:4], seen[1][0][4:])
    assert torch.equal(seen[3][1][4:], seen[2][0])


def test_pair_stats():
    z = l2_normalize(torch.randn(64, 8))
    s = z @ z.T
    stats = pair_stats(z, z)
    different = (s.sum() - 64) / (64 * 63)
    assert stats['pos_sim'].item() == pytest.approx(1)
    assert stats['neg_sim'].item() == pytest.approx(different.item(), abs=1e-5)


def test_all_view_pairs():
    assert all_view_pairs(1, 3) == ((1, 0), (2, 0))
    assert len(all_view_pairs(2, 6)) == 10


def test_chance(encoder):
    assert APS(encoder).chance(512) == pytest.approx(2 * math.log(512))
    moco = MoCoV3(encoder, tau=0.5, hidden=8, out=8)
    assert moco.chance(512) == pytest.approx(2 * math.log(512))
    same = F.normalize(torch.ones(512, 4), dim=1)
    for loss, n in (
        (InfoNCELoss(), 100),
        (SCELoss(), 100),
        (CO2Loss(), 100),
        (SCELoss(in_batch=True), 99 + 512),
        (ReSSLLoss(), 99),
    ):
        m = Method(encoder, weak_weak, queue=Queue(99), view_pairs=one_way, loss=loss)
        assert m.chance(512) == pytest.approx(math.log(n))
        assert m.chance(512) == pytest.approx(loss(same, same, same[:99]).item(), abs=1e-4)
    plain = Method(encoder, weak_weak, loss=lambda q, k, queue: q.sum())
    assert plain.chance(512) is None


def test_queue_in_words():
    words = lambda m: m.slots()['queue']
    assert words(SCE(tiny_resnet(), queue=40)) == 'queue of 40'
    assert words(ReSSL(tiny_resnet(), queue=40)) == 'queue of 40'
    both = SCE(tiny_resnet(), loss=SCELoss(in_batch=True), queue=40)
    assert words(both) == 'keys of the batch + queue of 40'
    assert words(SCE(tiny_resnet())) == 'queue fitted to the data, at most 4096'
    assert words(APS(tiny_vit())) == 'keys of the batch'


def test_step_cost_counts_and_leaves_the_method_alone():
    m = MoCoV3(tiny_vit(), hidden=32, out=16)
    with torch.no_grad():
        m.tower.projector[0].weight.add_(1.0)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    cost = step_cost(m, draw(m)[0])
    assert (cost['images'], cost['query_patches'], cost['key_patches']) == (8, 32, 32)
    assert cost['steps'] == 1 and cost['bytes'] > 8 * 2 * 17 * 32 * 4
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


# ---- heads


def test_heads_of_ones_own(encoder):
    "They are what the step uses; a projector alone means no predictor."
    projector, predictor = nn.Linear(32, 8), nn.Linear(8, 8)
    m = Method(encoder, weak_weak, projector=projector, predictor=predictor, queue=9)
    assert m.tower.projector is projector and m.predictor is predictor
    assert m.queue.keys.shape == (9, 8)
    views, _ = draw(m)
    q, k = m.queries_and_keys(views, [None, None], 0.0)
    z = projector(encoder(views[0].x).image)
    assert torch.allclose(q[0].image, l2_normalize(predictor(z)), atol=1e-6)
    assert torch.allclose(k[0].image, l2_normalize(z), atol=1e-6)
    alone = Method(encoder, weak_weak, projector=projector)
    assert isinstance(alone.predictor, nn.Identity)
    q, k = alone.queries_and_keys(views, [None, None], 0.0)
    assert torch.equal(q[0].image, k[0].image)
    default = Method(encoder, weak_weak)
    assert [m.out_features for m in default.predictor if isinstance(m, nn.Linear)][-1] == 128
    own = Method(encoder, weak_weak, predictor=nn.Linear(128, 128))
    assert isinstance(own.predictor, nn.Linear) and isinstance(own.tower.projector, nn.Sequential)


@pytest.mark.parametrize('make', [MoCoV3, APS, partial(SCE, symmetric=True), MoCoV2])
def test_heads_of_ones_own_in_a_preset(make):
    "A projector replaces both heads of the preset, a predictor its own alone; both train."
    m = make(tiny_vit(), projector=nn.Linear(32, 8), queue=40)
    assert isinstance(m.predictor, nn.Identity)
    assert m.queue.keys.shape == (40, 8)
    both = make(tiny_vit(), projector=nn.Linear(32, 8), predictor=nn.Linear(8, 8))
    assert isinstance(both.predictor, nn.Linear)
    for method in (m, both):
        views, draws = draw(method, 16)
        loss, _ = method(views, draws[0])
        loss.backward()
        method.after_step()
        assert torch.isfinite(loss) and method.tower.projector.weight.grad.abs().sum() > 0
    assert both.predictor.weight.grad.abs().sum() > 0


def test_a_predictor_alone_keeps_the_projector_of_the_preset():
    predictor = nn.Linear(16, 16)
    m = MoCoV3(tiny_vit(), hidden=32, out=16, predictor=predictor)
    assert m.predictor is predictor and len(m.tower.projector) > 1
    none = MoCoV3(tiny_vit(), hidden=32, out=16, predictor=None)
    assert isinstance(none.predictor, nn.Identity) and len(none.tower.projector) > 1


# ---- a loss of one's own


def mean_similarity(q, k, queue):
    "A plain function of which nothing more is known."
    return 1 - (q * k).sum(1).mean()


def one_way_moco(loss, **slots):
    return Method(tiny_resnet(), strong_weak, view_pairs=one_way, queue=40, loss=loss, **slots)


def test_a_loss_of_ones_own(encoder):
    "What a newcomer writes: softened one-hot labels, on sparse patches, against a slow copy."

    def smooth_nce(q, k, queue, tau=0.2, eps=0.1):
        return F.cross_entropy(q @ k.T / tau, torch.arange(len(q)), label_smoothing=eps)

    m = Method(
        encoder,
        strong_weak,
        patch_sampler=AsymmetricPatchSampler(gamma=3),
        key_encoder=ema(0.99),
        loss=partial(smooth_nce, eps=0.2),
    )
    views, draws = draw(m)
    optimizer, losses = torch.optim.SGD(m.parameters(), 0.5), []
    for _ in range(10):
        loss, log = m(views, draws[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m.after_step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert m.slots()['loss'] == 'smooth_nce(eps=0.2)'


@pytest.mark.parametrize('key_encoder', [None, ema(0.99)], ids=['same_network', 'ema'])
def test_keys_have_no_gradient_whatever_the_loss(encoder, key_encoder):
    "A loss of one's own need not detach them, nor the queue; nor a patch loss its key patches."
    seen = []

    def mine(q, k, queue):
        seen.append((q.requires_grad, k.requires_grad, queue.requires_grad))
        return mean_similarity(q, k, queue)

    patches = Seen(('a', 'query'), ('b', 'key'))
    slots = dict(queue=40, loss=mine, patch_loss=PatchLosses(patches))
    m = Method(encoder, strong_weak, key_encoder=key_encoder, **slots)
    seen.clear()  # of the trial when it was built
    m(draw(m)[0])
    assert seen == [(True, False, False)] * 2
    for a, b, _ in patches.given:
        assert a.query.patches.requires_grad
        assert not (b.key.patches.requires_grad or b.key.mean.requires_grad)


def test_a_plain_function_is_the_loss_it_calls():
    "`partial(info_nce, tau=.1)` is `InfoNCELoss(tau=.1)`, without what the latter knows of itself."
    plain = one_way_moco(partial(info_nce, tau=0.1)).eval()
    known = one_way_moco(InfoNCELoss(tau=0.1)).eval()
    known.load_state_dict(plain.state_dict())
    views, _ = draw(plain)
    assert torch.equal(plain(views)[0], known(views)[0])
    assert plain.chance(8) is None and known.chance(8) == pytest.approx(math.log(41))
    plain.log_features = known.log_features = True
    plain(views), known(views)
    assert 'entropy' not in plain.feature_log and known.feature_log['entropy'] == 0
    assert plain.slots()['loss'] == 'info_nce(tau=0.1)'
    assert known.slots()['loss'] == 'InfoNCELoss(tau=0.1)'


def test_a_loss_is_computed_in_float32_under_autocast():
    "A newcomer writes `q @ queue.T`: no half precision, no wrong dtype."
    seen = []

    def mine(q, k, queue):
        s = q @ queue.T
        seen.append(s.dtype)
        return torch.cat([(q * k).sum(1, keepdim=True), s], 1).logsumexp(1).mean()

    def soft_labels(k, queue):
        nearest = (k @ queue.T).topk(3).indices
        return torch.zeros(len(k), 1 + len(queue)).scatter(1, 1 + nearest, 1 / 3)

    mine.soft_labels = soft_labels
    m = one_way_moco(mine, key_encoder=ema(0.9))
    seen.clear()  # of the trial when it was built
    m.log_features = True
    with torch.autocast('cpu', torch.bfloat16):
        loss, _ = m(draw(m)[0])
    loss.backward()
    assert seen == [torch.float32] and loss.dtype == torch.float32
    assert m.feature_log['entropy'].item() == pytest.approx(math.log(3), abs=1e-5)


def test_soft_labels_are_asked_for():
    "A loss of one's own has an entropy as soon as it says what its soft labels are."

    def mine(q, k, queue):
        return mean_similarity(q, k, queue)

    m = one_way_moco(mine)
    m.log_features = True
    m(draw(m)[0])
    assert 'features' in m.feature_log and 'entropy' not in m.feature_log
    mine.soft_labels = lambda k, queue: torch.full((len(k), 4), 1 / 4)
    m(draw(m)[0])
    assert m.feature_log['entropy'].item() == pytest.approx(math.log(4), abs=1e-6)


@dataclass(frozen=True)
class Raises(ImageLoss):
    n: int = 4

    def __call__(self, q, k, queue=None, offset=0):
        return mean_similarity(q, k, queue)

    def soft_labels(self, k, queue=None):
        raise KeyError('no labels today')


@dataclass(frozen=True)
class WrongShape(Raises):
    def soft_labels(self, k, queue=None):
        return torch.ones(3) / 3


def raising(q, k, queue):
    return mean_similarity(q, k, queue)


def no_queue_wanted(q, k, queue):
    return mean_similarity(q, k, queue)


raising.soft_labels = Raises().soft_labels
no_queue_wanted.soft_labels = lambda k: torch.ones(len(k), 1)  # called with the queue too


@pytest.mark.parametrize(
    'loss, name, why',
    [
        (raising, 'raising', 'KeyError'),
        (no_queue_wanted, 'no_queue_wanted', 'TypeError'),
        (Raises(n=5), 'Raises(n=5)', 'KeyError'),
        (WrongShape(), 'WrongShape(n=4)', 'IndexError'),
    ],
)
def test_soft_labels_that_fail_cost_a_number_not_the_run(loss, name, why):
    m = one_way_moco(loss)
    m.log_features = True
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    losses = []
    for step in range(3):
        with pytest.warns(UserWarning, match='soft_labels of .* entropy is left out') as warned:
            value, log = m(draw(m)[0])
        assert name in str(warned[0].message) and why in str(warned[0].message)
        assert 'entropy' not in m.feature_log and 'features' in m.feature_log
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        m.after_step()
        losses.append(value.item())
    assert losses[-1] < losses[0] and m.queue.next == 24
    assert m.chance(8) is None


# ---- a patch loss of one's own


class Apart(PatchLoss):
    "Patches of one image should differ: the mean cosine within an image."

    required_outputs = {('a', 'query')}

    def __call__(self, a, b, queue=None):
        p = a.query.patches
        return (p @ p.mT).mean()

    def __repr__(self):
        return 'Apart()'


class Seen(PatchLoss):
    "Notes what it is given; agrees on the mean patch of two outputs."

    def __init__(self, *outputs, uses_queue=False):
        self.required_outputs, self.uses_queue, self.given = {*outputs}, uses_queue, []

    def __call__(self, a, b, queue=None):
        self.given.append((a, b, queue))
        views = dict(a=a, b=b)
        means = [
            getattr(views[view], side).patches.mean(1)
            for view, side in sorted(self.required_outputs)
        ]
        return -(means[0] * means[-1]).sum(1).mean()


def test_a_patch_loss_of_ones_own():
    m = MoCoV2(tiny_vit(), queue=40, patch_loss=PatchLosses(Apart(), 0.1, image_weight=1.0))
    views, _ = draw(m)
    loss, log = m(views)
    loss.backward()
    assert m.slots()['patch_loss'].startswith('Apart()')
    assert m.tower.patch_projector[0].weight.grad.abs().sum() > 0
    assert loss.item() == pytest.approx(
        (log['image_loss'] + 0.1 * log['patch_loss']).item(), abs=1e-6
    )
    assert m.chance(8) is None
    alone = MoCoV2(tiny_vit(), queue=40, patch_loss=Apart())  # without the slot written out
    assert (alone.patch_loss.weight, alone.patch_loss.image_weight) == (0.5, 0.5)


@pytest.mark.parametrize(
    'outputs, queries, keys',
    [
        ((('a', 'query'), ('b', 'key')), [0], [1]),
        ((('a', 'query'), ('a', 'key')), [0], [0, 1]),
        ((('a', 'query'), ('b', 'query')), [0, 1], [1]),
        ((('b', 'query'), ('a', 'key')), [0, 1], [0, 1]),
        ((('a', 'query'),), [0], [1]),
    ],
)
def test_required_outputs_are_looked_at_and_nothing_else(outputs, queries, keys):
    "One view asks the other: what a patch loss wants more of is made, the rest is None."
    mine = Seen(*outputs)
    m = MoCoV2(tiny_vit(), queue=40, patch_loss=PatchLosses(mine, queue=None))
    assert m.views_to_see == dict(query=queries, key=keys)
    calls = []
    m.tower.register_forward_hook(lambda *_: calls.append('query'))
    m.key_encoder.net.register_forward_hook(lambda *_: calls.append('key'))
    views, _ = draw(m)
    loss, _ = m(views)
    loss.backward()
    assert calls == ['query'] * len(queries) + ['key'] * len(keys)
    ((a, b, queue),) = mine.given
    assert queue is None and a.view is views[0] and b.view is views[1]
    for v, side in enumerate((a, b)):
        assert (side.query is not None) == (v in queries)
        assert (side.key is not None) == (v in keys)
        for out, learns in ((side.query, True), (side.key, False)):
            if out is not None:
                rows = out.patches.norm(dim=2)
                assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
                assert out.patches.requires_grad == learns
    assert m.tower.patch_projector[0].weight.grad.abs().sum() > 0


def test_a_queue_is_given_to_those_who_use_one():
    "Of two patch losses in the slot only that which says `uses_queue` gets the queue."
    outputs = ('a', 'query'), ('b', 'key')
    without, with_queue = Seen(*outputs), Seen(*outputs, uses_queue=True)
    slot = PatchLosses((without, with_queue), queue=24)
    m = MoCoV2(tiny_vit(), queue=40, patch_loss=slot)
    views, _ = draw(m)
    m(views)
    before = m.patch_queue.keys.clone()
    m.after_step()
    m(views)
    assert [queue for _, _, queue in without.given] == [None, None]
    assert torch.equal(with_queue.given[0][2][8:], before[8:])
    assert m.patch_queue.next == 8 and not torch.equal(m.patch_queue.keys[:8], before[:8])


@pytest.mark.parametrize(
    'call, words',
    [
        (
            lambda: PatchLosses(Seen(('a', 'student'))),
            ['required_outputs of Seen', "'a' or 'b' with 'query' or 'key'", 'student'],
        ),
        (lambda: PatchLosses(Seen), ['losses', 'a subclass of PatchLoss', 'got Seen']),
        (lambda: PatchLosses(()), ['losses', 'at least one', 'got ()']),
        (
            lambda: MoCoV2(tiny_vit(), patch_loss=Seen),
            ['patch_loss', 'PatchLosses(...)', 'or None', 'got Seen'],
        ),
        (
            lambda: MoCoV2(tiny_vit(), patch_loss=PatchLosses(Apart(), queue=8)),
            ['queue of the patch loss', 'None with Apart', 'queue of 8'],
        ),
    ],
)
def test_a_patch_loss_that_does_not_fit_is_told(call, words):
    assert said(call, words)


def test_a_patch_loss_without_a_call_is_told():
    with pytest.warns(UserWarning, match='patch loss PatchLoss could not be tried'):
        m = MoCoV2(tiny_vit(), queue=40, patch_loss=PatchLoss())
    with pytest.raises(NotImplementedError, match='PatchLoss must define __call__'):
        m(draw(m)[0])


# ---- a method by name


small = dict(
    small=MethodConfig(augmentations=(aug_weak, aug_weak), heads=mlp_heads, loss=InfoNCELoss())
)


def Mine(encoder, preset='small', sharpness=0.1, **slots):
    """Contrast of a user's own.
    More words."""
    return method_from_config(
        encoder, small[preset], 'mine', **dict(loss=InfoNCELoss(sharpness)) | slots
    )


@pytest.fixture
def registered():
    yield register_method('mine', Mine, small)
    methods.pop('mine')


def test_a_registered_method_is_built_by_name(encoder, registered):
    assert registered.title == "Contrast of a user's own."
    assert load_papers()['mine'] is registered and registered.configs == small
    assert method_options(registered)[:2] == ['preset', 'sharpness']
    assert 'key_encoder' in method_options(registered)
    m = build_method('mine', encoder, sharpness=0.3, queue=40)
    assert m.loss == InfoNCELoss(0.3) and m.name == 'mine' and m.queue.size == 40
    views, _ = draw(m)
    m(views)[0].backward()
    titled = register_method('mine', Mine, title='Mine (2025)')
    assert methods['mine'] is titled and titled.title == 'Mine (2025)' and titled.configs == {}


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda e: build_method('byol', e), ['method must be one of', "'aps'", "got 'byol'"]),
        (lambda e: build_method('moco_v4', e), ["got 'moco_v4'", "did you mean 'moco_v"]),
        (lambda e: build_method('mime', e), ["got 'mime'", "did you mean 'mine'?"]),
        (lambda e: build_method('aps', e, rate=1), ["aps has no option 'rate'", 'keep_ratio']),
        (
            lambda e: build_method('aps', e, keep_ration=0.5),
            ["aps has no option 'keep_ration'; did you mean 'keep_ratio'?", 'num_draws'],
        ),
        (
            lambda e: build_method('sce', e, lamda=1),
            ["sce has no option 'lamda'; did you mean 'lam'?"],
        ),
        (
            lambda e: build_method('sce', e, tau_t=0.1),
            ["sce has no option 'tau_t'", 'here are preset, lam, tau, tau_m'],
        ),
        (
            lambda e: build_method('mine', e, sharpnes=1),
            ["mine has no option 'sharpnes'; did you mean 'sharpness'?", 'There are preset'],
        ),
        (
            lambda e: build_method('mine', e, key_encoders=None),
            ["did you mean 'key_encoder'?", 'patch_loss'],
        ),
        (lambda e: build_method('mine', e, slots={}), ["mine has no option 'slots'"]),
        (lambda e: register_method('My Method', Mine), ['name', "'my_method'", "got 'My Method'"]),
        (lambda e: register_method('my-method', Mine), ['name', "'my_method'", "got 'my-method'"]),
        (lambda e: register_method(3, Mine), ['name', "'my_method'", 'got 3']),
        (
            lambda e: register_method('mine', 'MoCoV2'),
            ['build', '(encoder, **options) -> Method', "got 'MoCoV2'"],
        ),
    ],
)
def test_a_wrong_name_or_option_is_told(encoder, registered, call, words):
    assert said(lambda: call(encoder), words)


# ---- what does not fit


def two(e, **slots):
    return Method(e, weak_weak, **slots)


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda e: Method(e, (aug_weak(32), aug_weak(32))), ['view of weak', 'of 16', 'got 32']),
        (
            lambda e: Method(e, (aug_weak(16), aug_weak(20)), view_pairs=((1, 0),)),
            ['view of weak', 'of 16 pixels or less', 'got 20'],
        ),
        (
            lambda e: Method(e, (aug_weak(16), aug_weak(10)), view_pairs=((1, 0),)),
            ['size', 'a multiple of the patch side 4', 'got 10'],
        ),
        (
            lambda e: Method(e, (aug_weak(16), aug_weak(8))),
            ['view of weak', 'of 16 pixels', 'got 8'],
        ),
        (
            lambda e: Method(e, (aug_weak, aug_weak)),
            ['augmentations', 'aug_moco_v2(32)', 'aug_weak'],
        ),
        (lambda e: two(e, view_pairs=()), ['view_pairs', 'the views 0 to 1', 'got ()']),
        (
            lambda e: two(e, view_pairs=((0, 2),)),
            ['view_pairs', 'the views 0 to 1', 'got ((0, 2),)'],
        ),
        (
            lambda e: Method(e, (aug_weak(16),) * 3, patch_sampler=AsymmetricPatchSampler()),
            ['augmentations', 'two with a patch sampler', 'got 3'],
        ),
        (lambda e: two(e, key_encoder=0.99), ['key_encoder must be ema', 'or None', 'got 0.99']),
        (lambda e: two(e, key_encoder=ema), ['key_encoder must be ema', 'or None', 'got ema']),
        (lambda e: two(e, queue='long'), ['queue must be', 'Queue(K)', 'or None', "got 'long'"]),
        (lambda e: two(e, queue=True), ['queue must be', 'Queue(K)', 'or None', 'got True']),
        (lambda e: two(e, queue=0), ['size', 'at least 1', 'got 0']),
        (lambda e: two(e, loss=None), ['loss must be a function of (q, k, queue)', 'got None']),
        (
            lambda e: two(e, loss=SCELoss(positive_mode='zero_logit')),
            ['positive_mode', "'masked' with keys of the batch", "got 'zero_logit'"],
        ),
        (lambda e: two(e, patch_loss=0.5), ['patch_loss must be', 'DenseCLLoss()', 'got 0.5']),
        (lambda e: two(torch.nn.Identity()), ['encoder must be', 'vit(...)', 'got Identity']),
        (
            lambda e: two(tiny_resnet(), patch_sampler=AsymmetricPatchSampler()),
            ['patch_sampler', 'None for this encoder', 'a ViT can', 'got AsymmetricPatchSampler'],
        ),
        (
            lambda e: MoCoV2(e, queue=Queue(4))(draw(MoCoV2(e))[0]),
            ['queue size must be at least 8', 'enter in one step', 'got 4'],
        ),
        (
            lambda e: MoCoV2(e, queue=Queue(4)).set_data_size(1000, 8),
            ['queue size must be at least 8', 'got 4'],
        ),
        (
            lambda e: MoCoV2(tiny_resnet()).set_data_size(1000, 12),
            ['batch_size', 'a multiple of 8', 'got 12'],
        ),
        (
            lambda e: MoCoV2(tiny_resnet()).set_data_size(1000, 8),
            ['batch_size', 'at least 16', 'got 8'],
        ),
    ],
)
def test_slots_that_do_not_fit_are_told_before_any_work(encoder, call, words):
    assert said(lambda: call(encoder), words)


def test_a_batch_that_fits_trains(encoder):
    "The other side of those refusals: what they ask for is taken."
    m = MoCoV2(tiny_resnet(), queue=Queue(16))
    m.set_data_size(1000, 16)
    m(draw(m, 16)[0])[0].backward()
    two(encoder, loss=SCELoss(positive_mode='zero_logit'), queue=8, view_pairs=one_way)
    assert two(vit(size=16, patch=8, width=32, depth=1, heads=2)).patch_sampler is None
    assert two(encoder, patch_loss=DenseCLLoss()).patch_loss.weight == 0.5


def NoSlots(encoder, tau=0.1):
    "A method that takes no slot of `Method`."
    return two(encoder, loss=InfoNCELoss(tau))


def OtherWord(encoder, **kw):
    "A method that passes its options on under another word than `slots`."
    return two(encoder, **kw)


MISFITS = [
    (lambda e: two(e, loss=InfoNCELoss), ['loss', 'a function of', 'got InfoNCELoss']),
    (lambda e: two(e, view_pairs=(0, 1)), ['view_pairs', 'pairs of the views', 'got (0, 1)']),
    (lambda e: Method(e, aug_weak(16)), ['augmentations', 'aug_moco_v2(32)', 'got Augm']),
    (lambda e: two(e, patch_sampler=0.25), ['patch_sampler', 'got 0.25']),
    (lambda e: two(e, projector=nn.Identity()), ['projector', 'linear', 'got Identity()']),
    (lambda e: register_method(None, Mine), ['name', "'my_method'", 'got None']),
    (lambda e: two(e, patch_loss=DenseCLLoss), ['patch_loss must be a patch loss']),
    (lambda e: APS(e, keep_ratio=0.001), ['keep_ratio must be at least 0.0625', 'got 0.001']),
    (lambda e: MoCoV3(e, tau=0.0), ['tau must be a number above 0']),
    (lambda e: MoCoV2(e, preset='mnist'), ['preset', "got 'mnist'"]),
    (lambda e: RepCo(e, pool=4), ['min_distance', 'a grid of 1 x 1']),
    (lambda e: RepCo(e, min_distance=4), ['min_distance must be less']),
    (lambda e: DenseCL(e, pool=3), ['pool must be a divisor of the grid']),
    (lambda e: LocalToGlobal(e, num_patches=100), ['at most 16, or None', 'got 100']),
    (lambda e: MoCoV2(e, predicter=None), ["no option 'predicter'", "did you mean 'predictor'?"]),
    (lambda e: build_method('no_slots', e, queue=4), ["no_slots has no option 'queue'", 'tau']),
    (lambda e: build_method('other_word', e, kw=4), ["other_word has no option 'kw'"]),
]


@pytest.mark.parametrize('call, words', MISFITS)
def test_what_does_not_fit_is_told(encoder, call, words):
    names = dict(no_slots=NoSlots, other_word=OtherWord)
    try:
        for name, build in names.items():
            register_method(name, build)
        assert said(lambda: call(encoder), words)
    finally:
        for name in names:
            methods.pop(name)

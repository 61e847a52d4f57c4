"""What fills a slot is tried when a method is built: wrong results of samplers, losses and patch
losses of one's own are told, and the trial leaves no trace. Gradient through both branches. Words
that no option has. Short reprs."""

import copy
import warnings
from dataclasses import dataclass
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from steps import draw, said, tiny_resnet, tiny_vit
from ssl_patch.methods.compose import load_papers, method_options
from ssl_patch.methods.contrast import InfoNCELoss
from ssl_patch.methods.densecl import DenseCLLoss
from ssl_patch.methods.method import Method
from ssl_patch.methods.patch_loss import PatchLoss, PatchLosses
from ssl_patch.methods.trials import describe
from ssl_patch.models.heads import mlp
from ssl_patch.models.momentum import ema
from ssl_patch.views.augmentations import aug_weak

weak = (aug_weak(16), aug_weak(16))


def build(**slots):
    return Method(tiny_vit(), weak, **slots)


def numbers(view1, k=4, first=0):  # (B,k)
    return torch.arange(first, first + k).expand(len(view1), k)


def twice(x):
    return x, x


SAMPLERS = {
    'a mask': (
        lambda v1, v2, grid, g: twice(numbers(v1, 16)[:, None] < 4),
        ['keeps of view 1', '(2,T,k) torch.int64', 'no mask', 'got (2, 1, 16) torch.bool'],
    ),
    'a mask of floats': (
        lambda v1, v2, grid, g: twice(torch.ones(len(v1), 1, 16)),
        ['torch.int64', 'got (2, 1, 16) torch.float32'],
    ),
    'no draws': (lambda v1, v2, grid, g: twice(numbers(v1)), ['(2,T,k)', 'got (2, 4)']),
    'of one image': (
        lambda v1, v2, grid, g: twice(torch.arange(4)[None, None]),
        ['(2,T,k)', 'got (1, 1, 4)'],
    ),
    'only view 2 is wrong': (
        lambda v1, v2, grid, g: (numbers(v1)[:, None], numbers(v1)),
        ['keeps of view 2', 'got (2, 4)'],
    ),
    'numbers from 1': (
        lambda v1, v2, grid, g: twice(numbers(v1, 16, 1)[:, None]),
        ['numbers from 0 to 15', 'got (1, 16)'],
    ),
    'below 0': (lambda v1, v2, grid, g: twice(numbers(v1, 4, -1)[:, None]), ['got (-1, 2)']),
    'nothing': (lambda v1, v2, grid, g: None, ['patch_sampler returns', 'two tensors', 'None']),
    'one tensor': (
        lambda v1, v2, grid, g: numbers(v1)[:, None],
        ['two tensors', 'got (2, 1, 4)'],
    ),
    'lists': (lambda v1, v2, grid, g: twice([[[0]], [[1]]]), ['torch.int64', 'got [[[0]], [[1]]]']),
    'no patches': (lambda v1, v2, grid, g: twice(numbers(v1, 0)[:, None]), ['at least one patch']),
    'more draws of view 2': (
        lambda v1, v2, grid, g: (numbers(v1)[:, None], numbers(v1)[:, None].repeat(1, 2, 1)),
        ['as many draws', 'got [1, 2]'],
    ),
    'three arguments': (
        lambda v1, v2, grid: twice(numbers(v1)[:, None]),
        ['patch_sampler must be a function of (view1, view2, grid, generator)', '(v1, v2, grid)'],
    ),
}


@pytest.mark.parametrize('name', SAMPLERS)
def test_a_sampler_that_returns_no_patches_is_told(name):
    sampler, words = SAMPLERS[name]
    assert said(lambda: build(patch_sampler=sampler), words)


def test_samplers_that_fit():
    "Another number of patches for each view, any number of draws, a list in place of a tuple."
    sampler = lambda v1, v2, grid, g: [numbers(v1)[:, None], numbers(v1, 16)[:, None]]
    m = build(patch_sampler=sampler)
    views, (keeps,) = draw(m)
    assert [k.shape for k in keeps] == [(8, 4), (8, 16)]
    m(views, keeps)[0].backward()


def mean_similarity(q, k, queue):
    return -(q * k).sum(1).mean()


class WithWeights(nn.Module):
    "Has parameters, and a gradient through them alone."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, q, k, queue):
        return mean_similarity(q.detach(), k, queue) * self.scale


class TwoForward(nn.Module):
    def forward(self, q, k):
        return -(q * k).sum()


LOSSES = {
    'a vector': (lambda q, k, queue: -(q * k).sum(1), ['loss <lambda>', 'scalar', 'got (8,)']),
    'a matrix': (lambda q, k, queue: q @ k.T, ['scalar', 'got (8, 8)']),
    'a float': (lambda q, k, queue: mean_similarity(q, k, queue).item(), ['scalar', 'got ']),
    'a pair': (lambda q, k, queue: twice(mean_similarity(q, k, queue)), ['scalar', 'got (tensor']),
    'nothing': (lambda q, k, queue: None, ['scalar', 'got None']),
    'a count': (lambda q, k, queue: (q > k).sum(), ['scalar', 'torch.int64']),
    'detached': (lambda q, k, queue: mean_similarity(q.detach(), k, queue), ['queries q']),
    'of weights alone': (WithWeights(), ['queries q']),
    'two arguments': (
        lambda q, k: -(q * k).sum(),
        ['loss must be a function of (q, k, queue), got <lambda>(q, k)'],
    ),
    'a module of two': (TwoForward(), ['(q, k, queue)', 'TwoForward()(q, k)']),
    'four arguments': (lambda q, k, queue, tau: q.sum(), ['(q, k, queue)', '(q, k, queue, tau)']),
    'bound too far': (partial(mean_similarity, queue=None), ['(q, k, queue)', 'queue=None']),
}


@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_that_returns_no_number_is_told(name):
    loss, words = LOSSES[name]
    assert said(lambda: build(loss=loss), words)


@dataclass(frozen=True)
class Returns(PatchLoss):
    "A patch loss that ends with a function of (B,M) cosines."

    end: object

    def __call__(self, a, b, queue=None):
        return self.end((a.query.patches * b.key.patches).sum(2))


class Two(PatchLoss):
    def __call__(self, a, b):
        return (a.query.patches * b.key.patches).mean()


@pytest.mark.parametrize(
    'loss, words',
    [
        (Returns(lambda s: s.mean(1)), ['patch loss', 'scalar', 'got (4,)']),
        (Returns(lambda s: s.mean().item()), ['patch loss', 'scalar']),
        (Two(), ['a patch loss must be a function of (a, b, queue), got Two(a, b)']),
        (PatchLosses((DenseCLLoss(), Returns(lambda s: s))), ['patch loss', 'got (4, 16)']),
    ],
)
def test_a_patch_loss_that_returns_no_number_is_told(loss, words):
    assert said(lambda: build(patch_loss=loss), words)


def test_a_patch_loss_without_a_gradient_is_said():
    with pytest.warns(UserWarning, match='patch loss Returns.* learns nothing'):
        build(patch_loss=Returns(lambda s: s.mean().detach()))


def test_a_patch_loss_is_tried_on_the_patches_that_are_kept():
    "And on the queue of its own length; nothing is said of one that fits."
    shapes = []

    class Looks(PatchLoss):
        uses_queue = True

        def __call__(self, a, b, queue=None):
            shapes.append((a.query.patches.shape[1], b.key.patches.shape[1], len(queue)))
            assert a.key is None and b.query is None
            assert torch.allclose(b.key.mean.norm(dim=1), torch.ones(len(b.key.mean)))
            return -(a.query.patches.mean(1) * b.key.mean).sum(1).mean()

    sampler = lambda v1, v2, grid, g: (numbers(v1, 3)[:, None], numbers(v1, 5)[:, None])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        slot = PatchLosses(Looks(), queue=24)
        build(patch_sampler=sampler, patch_loss=slot, view_pairs=((0, 1),), key_encoder=ema(0.9))
    assert shapes == [(3, 5, 24)]


def test_a_loss_that_cannot_be_tried_is_not_refused():
    "One that was written for a batch of 12 fails on eight rows, and trains on twelve."

    def for_twelve(q, k, queue):
        return (q @ k.T - torch.eye(12)).square().mean()

    with pytest.warns(UserWarning, match='for_twelve could not be tried .* RuntimeError'):
        m = build(loss=for_twelve)
    m(draw(m, 12)[0])[0].backward()


class Leaves(nn.Module):
    "A loss that draws, counts, and moves statistics."

    def __init__(self):
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(16, affine=False), 0

    def forward(self, q, k, queue):
        self.calls += 1
        return -(self.norm(q) * k * torch.rand(len(q), 1)).sum(1).mean()


def test_a_trial_leaves_no_trace():
    "Weights, random state and the loss are as with another loss."
    loss, patches = Leaves(), Returns(lambda s: (s * torch.rand(s.shape)).mean())
    before = copy.deepcopy(loss.state_dict())
    slots = dict(projector=mlp(32, 32, 16), queue=8)

    def weights(**more):
        torch.manual_seed(3)
        m = build(**copy.deepcopy(slots) | more)
        state = m.tower.state_dict()
        return state, torch.get_rng_state()

    plain, noisy = weights(loss=mean_similarity), weights(loss=loss)
    assert all(torch.equal(plain[0][k], noisy[0][k]) for k in plain[0])
    assert torch.equal(plain[1], noisy[1])
    assert loss.calls == 0
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
    plain, noisy = weights(patch_loss=DenseCLLoss()), weights(patch_loss=patches)
    assert torch.equal(plain[1], noisy[1])


def test_a_method_can_be_built_without_gradients_around():
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert build(loss=mean_similarity).loss is mean_similarity


def test_an_object_without_words_is_called_by_its_class():
    class Mine:
        pass

    assert describe(Mine()) == 'Mine' and describe(InfoNCELoss()) == 'InfoNCELoss(tau=0.2)'
    assert describe(lambda q: q) == '<lambda>'


# ---- gradient through both branches


def nt_xent(q, k, queue, tau=0.5):
    z = torch.cat([q, k])
    itself = torch.eye(len(z), dtype=torch.bool)
    scores = (z @ z.T / tau).masked_fill(itself, -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(q)))


def both_branches(**slots):
    heads = dict(projector=mlp(32, 32, 16), view_pairs=((0, 1),))
    return build(**dict(loss=nt_xent, stop_gradient=False, **heads) | slots)


def gradient(value, m):
    return torch.autograd.grad(value, m.encoder.net.blocks[0].attn.qkv.weight)[0]


def test_gradient_reaches_both_branches():
    "It is that of plain code; with `stop_gradient` it is that of plain code that detaches."
    m = both_branches()
    views, _ = draw(m)
    plain = lambda: (F.normalize(m.tower(v.x).image, dim=1) for v in views)
    q, k = plain()
    both = gradient(nt_xent(q, k, None), m)
    q, k = plain()
    one = gradient(nt_xent(q, k.detach(), None), m)
    assert torch.allclose(gradient(m(views)[0], m), both, atol=1e-6)
    assert not torch.allclose(both, one, atol=1e-4)
    m.stop_gradient = True
    assert torch.allclose(gradient(m(views)[0], m), one, atol=1e-6)


def test_keys_that_wait_for_the_queue_hold_no_graph():
    loss = lambda q, k, queue: nt_xent(q, k, None) + (k @ queue.T).mean()
    m = both_branches(loss=loss, queue=16, patch_loss=PatchLosses(DenseCLLoss(), queue=16))
    views, _ = draw(m)
    m(views)[0].backward()
    assert not any(keys.requires_grad for keys in m.pending_keys)
    m.after_step()
    assert not m.queue.keys.requires_grad and m.queue.next == 8
    assert m.slots()['key_encoder'] == 'same network, with gradient'
    assert build().slots()['key_encoder'] == 'same network, detached'


@pytest.mark.parametrize(
    'slots, words',
    [
        (dict(key_encoder=ema(0.9)), ['stop_gradient', 'True with a key encoder', 'got False']),
        (dict(loss=InfoNCELoss()), ['stop_gradient', 'InfoNCELoss(tau=0.2)', 'keys k']),
        (dict(loss=lambda q, k, queue: nt_xent(q, k.detach(), None)), ['stop_gradient', 'keys k']),
        (dict(stop_gradient='no'), ['stop_gradient must be True or False', "got 'no'"]),
    ],
)
def test_where_gradient_cannot_go_it_is_told(slots, words):
    assert said(lambda: both_branches(**slots), words)


# ---- words that no option has


@pytest.mark.parametrize('name', load_papers())
def test_a_near_word_is_suggested_by_every_paper(name):
    "Of each option that a paper's function has, with a letter dropped; and of a slot."
    entry = load_papers()[name]
    for option in [*method_options(entry)[:3], 'view_pairs']:
        wrong = option[:-2] + option[-1] if len(option) > 3 else option + 'x'
        words = [f'has no option {wrong!r}', f'did you mean {option!r}?']
        assert said(lambda: entry.build(tiny_vit(), **{wrong: None}), words)


def test_a_word_like_nothing_lists_what_there_is():
    entry = load_papers()['sce']
    assert said(lambda: entry.build(tiny_vit(), zzz=1), ["no option 'zzz'", 'lam, ', 'patch_loss'])


# ---- in a cell


def test_reprs_are_short():
    encoder = tiny_vit()
    assert repr(encoder).startswith("ViT(name='tiny', size=16, patch=4")
    assert '\n' not in repr(encoder)
    assert 'vectors of 32, patches 4 x 4 of 32' in repr(encoder)
    assert repr(tiny_resnet()).startswith("ResNet(name='resnet18', size=16")
    m = Method(encoder, weak, loss=mean_similarity, name='mine')
    lines = repr(m).splitlines()
    assert lines[0] == 'mine' and [line.split()[0] for line in lines[1:]] == ['encoder', *m.slots()]
    assert max(map(len, lines)) <= 140 and lines[-1].endswith('mean_similarity')

"""Losses over patches against plain references in float64: gradients, masks, limits, bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from ssl_patch.methods import scores
from ssl_patch.methods.densecl import densecl
from ssl_patch.models.interface import random_patches
from ssl_patch.methods.contrast import info_nce
from ssl_patch.methods.local_to_global import local_to_global
from ssl_patch.methods.repco import repco, repco_negative, repco_positive
from ssl_patch.evaluation.metrics import patch_similarity


def unit(g, *shape):
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def surprise(q, positive, negatives, tau):
    "-log of the softmax share of the positive, in plain floats."
    scores = [float(q @ z) / tau for z in [positive, *negatives]]
    top = max(scores)
    return math.log(sum(math.exp(s - top) for s in scores)) + top - scores[0]


def mean(x):
    return sum(x) / len(x) if x else 0.0


def elsewhere(u, b):
    return [x for c in range(len(u)) if c != b for x in u[c]]


def cells(x):
    return [(b, i) for b in range(x.shape[0]) for i in range(x.shape[1])]


def slow_dense(r, u, match, queue, tau):
    def others(b):
        return (
            [F.normalize(u[c].mean(0), dim=0) for c in range(len(u)) if c != b]
            if queue is None
            else list(queue)
        )

    return mean([surprise(r[b, i], u[b, match[b, i]], others(b), tau) for b, i in cells(r)])


def slow_positive(r, u, pairs, queue, tau):
    def others(b):
        return elsewhere(u, b) if queue is None else list(queue)

    return mean(
        [
            surprise(r[b, i], u[b, pairs.pos[b, i]], others(b), tau)
            for b, i in cells(r)
            if pairs.pos_ok[b, i]
        ]
    )


def slow_negative(r, u, pairs, tau):
    local = {
        (b, i): [u[b, j] for j, ok in zip(pairs.neg[b, i], pairs.neg_ok[b, i]) if ok]
        for b, i in cells(r)
    }
    return mean(
        [
            surprise(r[b, i], u[b, i], negatives, tau)
            for (b, i), negatives in local.items()
            if negatives
        ]
    )


def slow_global(a, m, tau):
    return mean([surprise(a[b], m[b, i], elsewhere(m, b), tau) for b, i in cells(m)])


def draw_pairs(g, B, M, k=2, share=0.5):
    def index(*s):
        return torch.randint(M, s, generator=g)

    def flag(*s):
        return torch.rand(s, generator=g) < share

    return SimpleNamespace(
        pos=index(B, M), pos_ok=flag(B, M), neg=index(B, M, k), neg_ok=flag(B, M, k)
    )


def few(f):
    return settings(max_examples=40, deadline=None)(f)


images, patches, widths, seeds = (
    st.integers(2, 5),
    st.integers(1, 7),
    st.integers(1, 17),
    st.integers(0, 10**6),
)
temperatures, chunks = st.sampled_from([0.02, 0.07, 0.2, 1.0]), st.sampled_from([None, 1, 2, 99])


@few
@given(images, patches, patches, widths, st.integers(0, 20), temperatures, chunks, seeds)
def test_densecl(B, M, M_k, d, K, tau, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    r, u, queue, match = (
        unit(g, B, M, d),
        unit(g, B, M_k, d),
        unit(g, K, d) if K else None,
        torch.randint(M_k, (B, M), generator=g),
    )
    assert densecl(r, u, match, queue, tau, chunk).item() == pytest.approx(
        slow_dense(r, u, match, queue, tau), abs=1e-9
    )


@few
@given(
    images,
    patches,
    widths,
    st.integers(0, 20),
    st.integers(0, 4),
    temperatures,
    chunks,
    st.sampled_from([0.0, 0.3, 0.8, 2.0]),
    seeds,
)
def test_repco(B, M, d, K, k, tau, chunk, share, seed):
    g = torch.Generator().manual_seed(seed)
    r, u, queue, pairs = (
        unit(g, B, M, d),
        unit(g, B, M, d),
        unit(g, K, d) if K else None,
        draw_pairs(g, B, M, k, share),
    )
    plus, minus = slow_positive(r, u, pairs, queue, tau), slow_negative(r, u, pairs, tau)
    for beta, use_positives, want in (
        (1.0, True, plus + minus),
        (0.25, True, plus + 0.25 * minus),
        (0.0, True, plus),
        (2.0, False, 2 * minus),
    ):
        assert repco(
            r, u, pairs, queue, tau, beta, use_positives, chunk=chunk
        ).item() == pytest.approx(want, abs=1e-9)


@few
@given(images, patches, widths, temperatures, chunks, seeds)
def test_local_to_global(B, M, d, tau, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    a, m = unit(g, B, d), unit(g, B, M, d)
    for learns in ('anchor', 'local'):
        loss = local_to_global(a, m, tau, learns, chunk=chunk).item()
        assert loss == pytest.approx(slow_global(a, m, tau), abs=1e-9)


@few
@given(images, st.integers(2, 6), widths, seeds)
def test_patch_similarity(B, M, d, seed):
    x = torch.randn(B, M, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = F.cosine_similarity(x.view(B * M, 1, d), x.view(1, B * M, d), dim=2)
    image = torch.arange(B).repeat_interleave(M)
    same = image[:, None] == image
    within, between = patch_similarity(x)
    assert within.item() == pytest.approx(
        c[same & ~torch.eye(B * M, dtype=torch.bool)].mean().item(), abs=1e-9
    )
    assert between.item() == pytest.approx(c[~same].mean().item(), abs=1e-9)


B, M, d = 3, 4, 5


def everything():
    """name, function of (query, *keys), tensors: every loss, with a queue and without. The first
    tensor is the side that learns."""
    g = torch.Generator().manual_seed(0)
    r, u, queue, a = unit(g, B, M, d), unit(g, B, M, d), unit(g, 7, d), unit(g, B, d)
    match, p = torch.randint(M, (B, M), generator=g), draw_pairs(g, B, M)
    yield 'dense, queue', lambda r, u, z, **kw: densecl(r, u, match, z, **kw), (r, u, queue)
    yield 'dense, batch', lambda r, u, **kw: densecl(r, u, match, **kw), (r, u)
    yield 'repco, queue', lambda r, u, z, **kw: repco(r, u, p, z, **kw), (r, u, queue)
    yield 'repco, batch', lambda r, u, **kw: repco(r, u, p, **kw), (r, u)
    yield 'positive', lambda r, u, **kw: repco(r, u, p, beta=0, **kw), (r, u)
    yield 'negative', lambda r, u, **kw: repco(r, u, p, use_positives=False, **kw), (r, u)
    yield 'anchor', local_to_global, (a, u)
    yield 'local', lambda m, a, **kw: local_to_global(a, m, learns='local', **kw), (u, a)


CASES = {name: (f, args) for name, f, args in everything()}


@pytest.mark.parametrize('name', CASES)
def test_gradient_reaches_the_queries_alone(name):
    f, args = CASES[name]
    query, *keys = (x.clone().requires_grad_() for x in args)
    f(query, *keys).backward()
    assert query.grad.abs().sum() > 0 and all(x.grad is None for x in keys)
    assert torch.autograd.gradcheck(lambda x: f(x, *keys), query)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('chunk', [1, 2, 3])
def test_chunked_is_unchunked(name, chunk):
    f, (query, *keys) = CASES[name]
    query = query.clone().requires_grad_()
    whole, parts = f(query, *keys), f(query, *keys, chunk=chunk)
    assert torch.allclose(whole, parts, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, query)[0] for x in (whole, parts)), atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', CASES)
def test_half_precision_is_computed_in_full(name, dtype):
    f, args = CASES[name]
    half, low = [x.to(dtype) for x in args], dict(tau=0.05)
    half[0].requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = f(*half, **low)
    loss.backward()
    assert (
        loss.dtype == torch.float32
        and half[0].grad.dtype == dtype
        and half[0].grad.isfinite().all()
    )
    assert loss.item() == pytest.approx(f(*(x.double() for x in half), **low).item(), abs=1e-4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        full = f(*(x.float() for x in args), **low)  # float32 inputs stay float32
    assert full.item() == pytest.approx(f(*args, **low).item(), abs=1e-4)


def test_half_precision_in_chunks():
    f, args = CASES['anchor']
    a, m = (x.bfloat16() for x in args)
    a.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = [f(a, m, chunk=c) for c in (None, 2)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    assert torch.allclose(*(torch.autograd.grad(x, a)[0] for x in losses), atol=1e-2)


def test_identical_rows():
    x = torch.ones(8, 6, 4, dtype=torch.float64) / 2
    match, p = torch.zeros(8, 6, dtype=torch.long), draw_pairs(torch.Generator(), 8, 6, share=2)
    for loss, n in (
        (densecl(x, x, match), 8),
        (densecl(x, x, match, x[:, 0]), 9),
        (repco_positive(x, x, p), 43),
        (repco_negative(x, x, p), 3),
        (repco_positive(x, x, p, negatives_per_image=2), 15),
        (local_to_global(x[:, 0], x), 43),
    ):
        assert loss.item() == pytest.approx(math.log(n), abs=1e-9)
    assert [s.item() for s in patch_similarity(x)] == pytest.approx([1, 1])


def test_orthogonal_images():
    """Every image has a direction of its own, and all its patches share it: each positive scores 1,
    each negative 0."""
    x = torch.eye(8, dtype=torch.float64)[:, None].repeat(1, 3, 1)
    match, p = torch.zeros(8, 3, dtype=torch.long), draw_pairs(torch.Generator(), 8, 3, share=2)
    for loss, n in (
        (densecl(x, x, match, tau=0.1), 7),
        (repco_positive(x, x, p, tau=0.1), 21),
        (local_to_global(x[:, 0], x, 0.1), 21),
    ):
        assert loss.item() == pytest.approx(math.log1p(n * math.exp(-10)), rel=1e-9)
    assert [s.item() for s in patch_similarity(x)] == pytest.approx([1, 0])


def test_very_low_temperature_is_finite():
    "Scores of 1e4: nothing overflows in float32, and the loss is the gap to the best negative."
    for f, args in CASES.values():
        x = [a.float() for a in args]
        x[0].requires_grad_()
        loss = f(*x, tau=1e-4)
        loss.backward()
        assert loss.isfinite() and x[0].grad.isfinite().all()


def test_limits():
    g = torch.Generator().manual_seed(1)
    q, k, queue = unit(g, 6, 8), unit(g, 6, 8), unit(g, 9, 8)
    one = torch.zeros(6, 1, dtype=torch.long)
    for z in (None, queue):
        assert torch.allclose(densecl(q[:, None], k[:, None], one, z, 0.1), info_nce(q, k, z, 0.1))
    assert torch.allclose(local_to_global(q, k[:, None], 0.1), info_nce(q, k, tau=0.1))
    r, u, p = unit(g, 3, 5, 8), unit(g, 3, 5, 8), draw_pairs(g, 3, 5, share=2)
    assert torch.allclose(repco_positive(r, u, p, queue), densecl(r, u, p.pos, queue))


@pytest.mark.parametrize('queue', [False, True])
def test_empty_sets(queue):
    g = torch.Generator().manual_seed(2)
    r, u, z, p = (
        unit(g, 3, 4, 5).requires_grad_(),
        unit(g, 3, 4, 5),
        unit(g, 6, 5) if queue else None,
        draw_pairs(g, 3, 4, share=-1),
    )
    p.pos[:], p.neg[:] = 10**9, -(10**9)  # never looked at
    for kw in ({}, dict(beta=0), dict(use_positives=False)):
        loss = repco(r, u, p, z, **kw)
        assert loss.item() == 0 and torch.autograd.grad(loss, r)[0].abs().max() == 0
    p.neg = p.neg[..., :0]
    p.neg_ok = p.neg_ok[..., :0]
    assert repco(r, u, p, z).item() == 0


def test_an_index_whose_flag_is_false_is_never_looked_at():
    g = torch.Generator().manual_seed(8)
    r, u, z, p = unit(g, 2, 5, 4), unit(g, 2, 5, 4), unit(g, 7, 4), draw_pairs(g, 2, 5)
    plain = repco(r, u, p, z).item()
    assert not p.pos_ok.all() and not p.neg_ok.all()
    p.pos[~p.pos_ok], p.neg[~p.neg_ok] = 10**9, -(10**9)
    assert repco(r, u, p, z).item() == plain


def test_random_vectors_and_a_large_queue():
    g = torch.Generator().manual_seed(9)
    r, u, z = unit(g, 4, 32, 128), unit(g, 4, 32, 128), unit(g, 16384, 128)
    loss = repco_positive(r, u, draw_pairs(g, 4, 32, share=2), z).item()
    assert loss == pytest.approx(math.log(16385) + 1 / (2 * 128 * 0.2**2), abs=0.1)


def test_patches_without_pairs_get_no_gradient():
    g = torch.Generator().manual_seed(3)
    r, u, p = unit(g, 3, 6, 5).requires_grad_(), unit(g, 3, 6, 5), draw_pairs(g, 3, 6)
    p.neg = (
        torch.arange(6)[:, None] + torch.randint(1, 6, (3, 6, 2), generator=g)
    ) % 6  # never the patch itself
    used = p.pos_ok | p.neg_ok.any(2)
    (grad,) = torch.autograd.grad(repco(r, u, p), r)
    assert not used.all() and (grad[~used] == 0).all() and (grad[used].abs().sum(1) > 0).all()


def test_draws_of_patches():
    """A draw is the loss of some set of patches, the same for the same generator state, and right
    on average."""
    g = torch.Generator().manual_seed(4)
    a, m = unit(g, 3, 8), unit(g, 3, 2, 8)
    sets = [
        local_to_global(a, torch.stack([m[b, [c]] for b, c in enumerate(cs)])).item()
        for cs in ((i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1))
    ]
    drawn = torch.tensor(
        [local_to_global(a, m, num_patches=1, generator=g).item() for _ in range(400)]
    )
    assert all(min(abs(x - y) for y in sets) < 1e-6 for x in drawn.tolist())
    assert drawn.mean().item() == pytest.approx(mean(sets), abs=0.1)
    r, u, p = unit(g, 3, 6, 8), unit(g, 3, 6, 8), draw_pairs(g, 3, 6)
    for name, f in (
        ('num_patches', lambda **kw: local_to_global(a, u, **kw)),
        ('negatives_per_image', lambda **kw: repco(r, u, p, **kw)),
    ):
        draw = lambda: f(**{name: 2}, generator=torch.Generator().manual_seed(5)).item()
        assert draw() == draw() != f().item()
        assert f(**{name: u.shape[1]}).item() == pytest.approx(f().item(), abs=1e-9)


x = torch.ones(2, 4, 3)
match, pairs = torch.zeros(2, 4, dtype=torch.long), draw_pairs(torch.Generator(), 2, 4)


@pytest.mark.parametrize(
    'args, word',
    [
        (dict(tau=0.0), 'tau must be a number above 0, got 0.0'),
        (dict(tau=float('nan')), 'tau must be .*, got nan'),
        (dict(tau=float('inf')), 'tau must be .*, got inf'),
        (dict(u=x[..., :2]), 'u must be of the width of r, 3'),
        (dict(r=x[0]), r'r must be \(B,M,d\)'),
        (dict(u=x[0]), r'u must be \(B,M,d\)'),
        (dict(r=x[:, :0]), 'r must be .*nothing empty'),
        (dict(u=x[:1]), 'u must be of the same 2 images as r'),
        (dict(queue=torch.ones(5, 2)), r'queue must be \(K,3\)'),
        (dict(queue=torch.ones(0, 3)), 'queue must be of at least one key'),
        (dict(match=match[:, :3]), r'match must be \(2,4\) torch.int64, got \(2, 3\)'),
        (dict(match=match.float()), 'match must be .*got .*float32'),
        (dict(match=None), 'match must be .*, got None'),
        (dict(r=x[:1], u=x[:1], match=match[:1]), 'batch of one'),
        (dict(chunk=0), 'chunk must be .*, got 0'),
    ],
)
def test_bad_input_of_densecl(args, word):
    with pytest.raises(ValueError, match=word):
        densecl(**(dict(r=x, u=x, match=match) | args))


def but(**kw):
    return SimpleNamespace(**(vars(pairs) | kw))


@pytest.mark.parametrize(
    'args, word',
    [
        (dict(tau=-1.0), 'tau must be a number above 0, got -1.0'),
        (dict(beta=-1.0), 'beta must be a number at least 0, got -1.0'),
        (dict(beta=0.0, use_positives=False), 'beta must be above 0 with use_positives=False'),
        (dict(u=x[:, :3]), 'u must be on the grid of r, 4 patches'),
        (dict(u=x[0, 0]), r'u must be \(B,M,d\)'),
        (dict(u=x[..., :2]), 'u must be of the width of r, 3'),
        (dict(negatives_per_image=5), 'negatives_per_image must be .*at most 4.*, got 5'),
        (dict(negatives_per_image=0), 'negatives_per_image must be .*at least 1.*, got 0'),
        (dict(negatives_per_image=2, queue=x[0]), 'negatives_per_image must be None with a queue'),
        (dict(chunk=-1), 'chunk must be .*, got -1'),
        (dict(pairs=draw_pairs(torch.Generator(), 2, 9)), r'pairs\.pos must be \(2,4\)'),
        (dict(pairs=but(pos_ok=match)), r'pairs\.pos_ok must be \(2,4\) torch.bool'),
        (dict(pairs=None), r'pairs\.pos must be .*, got None'),
        (dict(pairs=but(neg=match)), r'pairs\.neg must be \(2,4,k\)'),
        (dict(pairs=but(neg_ok=pairs.neg_ok[..., :1])), r'pairs\.neg_ok must be \(2,4,2\)'),
        (dict(queue=torch.ones(5)), r'queue must be \(K,3\)'),
        (dict(pairs=but(pos=match[..., None])), r'pairs\.pos must be \(2,4\)'),
        (dict(beta=0.0, u=x[:, :3]), 'u must be on the grid of r'),
    ],
)
def test_bad_input_of_repco(args, word):
    with pytest.raises(ValueError, match=word):
        repco(**(dict(r=x, u=x, pairs=pairs) | args))


def test_a_batch_of_one():
    one = SimpleNamespace(**{n: v[:1] for n, v in vars(pairs).items()})
    with pytest.raises(ValueError, match='batch of one'):
        repco(x[:1], x[:1], one)
    assert (
        repco(x[:1], x[:1], one, use_positives=False).isfinite()
        and repco(x[:1], x[:1], one, x[0]).isfinite()
    )


@pytest.mark.parametrize(
    'args, word',
    [
        (dict(tau=0), 'tau must be a number above 0, got 0'),
        (dict(anchor=x), r'anchor must be \(B,d\)'),
        (dict(local=x[0]), r'local must be \(2,M,3\)'),
        (dict(anchor=x[:, 0, :2]), r'local must be \(2,M,2\), .*as wide, got \(2, 4, 3\)'),
        (dict(local=x[:1]), r'local must be \(2,M,3\), M patches of the same images.*\(1, 4, 3\)'),
        (dict(anchor=x[:1, 0], local=x[:1]), 'batch of one'),
        (dict(learns='all'), "learns must be one of 'anchor' or 'local', got 'all'"),
        (dict(num_patches=5), 'num_patches must be .*at most 4.*, got 5'),
        (dict(num_patches=0), 'num_patches must be .*at least 1.*, got 0'),
    ],
)
def test_bad_input_of_local_to_global(args, word):
    with pytest.raises(ValueError, match=word):
        local_to_global(**(dict(anchor=x[:, 0], local=x) | args))


def test_bad_input_of_the_rest():
    with pytest.raises(ValueError, match='chunk'):
        local_to_global(x[:, 0], x, chunk=0)
    for bad in (x[0], x[:1], x[:, :1]):
        with pytest.raises(ValueError, match='x must be'):
            patch_similarity(bad)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    "The most numbers that any tensor has that is made inside."

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_chunks_bound_the_table_of_logits():
    """As the docstrings say: no table has more than chunk x B x M (or chunk x M x K) numbers,
    forward and backward; without chunks one has B / chunk times that."""
    g = torch.Generator().manual_seed(0)
    B, M, d, K, chunk = 16, 32, 4, 600, 2
    a, l, q = unit(g, B, d).requires_grad_(), unit(g, B, M, d).requires_grad_(), unit(g, K, d)
    match, pairs = torch.randint(M, (B, M), generator=g), draw_pairs(g, B, M)
    for f, whole, part in (
        (lambda c: local_to_global(a, l, chunk=c), B * B * M, chunk * B * M),
        (lambda c: densecl(l, l.detach(), match, q, chunk=c), B * M * K, chunk * M * K),
        (lambda c: repco(l, l.detach(), pairs, q, chunk=c), B * M * K, chunk * M * K),
    ):
        for c, bound in ((None, whole), (chunk, max(part, B * M * 8 * d))):
            with Largest() as seen:
                f(c).backward()
            assert seen.most <= bound and (c is not None or seen.most == whole)


@pytest.mark.parametrize('rows', [4, 8, 12])
def test_parts_of_their_own_accord(rows, monkeypatch):
    "Without `chunk` large tables are made in parts too, whichever side learns."
    g = torch.Generator().manual_seed(0)
    a, l, u, q = unit(g, 5, 6), unit(g, 5, 4, 6), unit(g, 5, 4, 6), unit(g, 9, 6)
    match, pairs = torch.randint(4, (5, 4), generator=g), draw_pairs(g, 5, 4)
    fs = [
        lambda a, l: densecl(l, u, match),
        lambda a, l: densecl(l, u, match, q),
        lambda a, l: repco(l, u, pairs),
        lambda a, l: repco(l, u, pairs, q),
        lambda a, l: local_to_global(a, l, learns='anchor'),
        lambda a, l: local_to_global(a, l, learns='local'),
    ]

    def results():
        return [
            (value.detach(), *torch.autograd.grad(3 * value, x, allow_unused=True))
            for x in [(a.clone().requires_grad_(), l.clone().requires_grad_())]
            for value in (f(*x) for f in fs)
        ]

    whole = results()
    parts = []
    monkeypatch.setattr(scores, 'rows_at_once', lambda *_: parts.append(rows) or rows)
    for one, two in zip(whole, results(), strict=True):
        for x, y in zip(one, two, strict=True):
            assert (x is None and y is None) or torch.allclose(x, y, atol=1e-12)
    assert parts  # the patched size was asked for


def test_draws_of_patches_are_uniform_and_without_replacement():
    x = torch.arange(6.0)[None, :, None].expand(4000, 6, 1)
    got = random_patches(x, 2, torch.Generator().manual_seed(0))[..., 0]
    assert (
        (got[:, 0] != got[:, 1]).all()
        and random_patches(x, 6) is x
        and random_patches(x, None) is x
    )
    assert torch.allclose(
        got.flatten().long().bincount() / 4000, torch.full((6,), 1 / 3), atol=0.04
    )

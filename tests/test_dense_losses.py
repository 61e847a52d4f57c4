"Losses over patches against plain references in float64, their gradients, masks, limits and bad input."
import math
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from ssl_patch.losses import dense_nce, info_nce, local_to_global, repco, repco_negative, repco_positive, token_similarity, token_to_image

def unit(g, *shape): return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)

def surprise(q, positive, negatives, tau):
    "-log of the softmax share of the positive, in plain floats."
    scores = [float(q @ z)/tau for z in [positive, *negatives]]
    top = max(scores)
    return math.log(sum(math.exp(s-top) for s in scores)) + top - scores[0]

def mean(x): return sum(x)/len(x) if x else 0.
def elsewhere(u, b): return [x for c in range(len(u)) if c != b for x in u[c]]
def cells(x): return [(b, i) for b in range(x.shape[0]) for i in range(x.shape[1])]

def slow_dense(r, u, match, queue, tau):
    def others(b): return [F.normalize(u[c].mean(0), dim=0) for c in range(len(u)) if c != b] if queue is None else list(queue)
    return mean([surprise(r[b, i], u[b, match[b, i]], others(b), tau) for b, i in cells(r)])

def slow_positive(r, u, pairs, queue, tau):
    def others(b): return elsewhere(u, b) if queue is None else list(queue)
    return mean([surprise(r[b, i], u[b, pairs.pos[b, i]], others(b), tau) for b, i in cells(r) if pairs.pos_ok[b, i]])

def slow_negative(r, u, pairs, tau):
    local = {(b, i): [u[b, j] for j, ok in zip(pairs.neg[b, i], pairs.neg_ok[b, i]) if ok] for b, i in cells(r)}
    return mean([surprise(r[b, i], u[b, i], negatives, tau) for (b, i), negatives in local.items() if negatives])

def slow_global(a, m, tau): return mean([surprise(a[b], m[b, i], elsewhere(m, b), tau) for b, i in cells(m)])
def slow_reverse(m, a, tau): return mean([surprise(m[b, i], a[b], [a[c] for c in range(len(a)) if c != b], tau) for b, i in cells(m)])

def draw_pairs(g, B, M, k=2, share=.5):
    def index(*s): return torch.randint(M, s, generator=g)
    def flag(*s): return torch.rand(s, generator=g) < share
    return SimpleNamespace(pos=index(B, M), pos_ok=flag(B, M), neg=index(B, M, k), neg_ok=flag(B, M, k))

def few(f): return settings(max_examples=40, deadline=None)(f)
images, patches, widths, seeds = st.integers(2, 5), st.integers(1, 7), st.integers(1, 17), st.integers(0, 10**6)
temperatures, chunks = st.sampled_from([.02, .07, .2, 1.]), st.sampled_from([None, 1, 2, 99])

@few
@given(images, patches, patches, widths, st.integers(0, 20), temperatures, chunks, seeds)
def test_dense_nce(B, M, M_k, d, K, tau, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    r, u, queue, match = unit(g, B, M, d), unit(g, B, M_k, d), unit(g, K, d) if K else None, torch.randint(M_k, (B, M), generator=g)
    assert dense_nce(r, u, match, queue, tau, chunk).item() == pytest.approx(slow_dense(r, u, match, queue, tau), abs=1e-9)

@few
@given(images, patches, widths, st.integers(0, 20), st.integers(0, 4), temperatures, chunks, st.sampled_from([0., .3, .8, 2.]), seeds)
def test_repco(B, M, d, K, k, tau, chunk, share, seed):
    g = torch.Generator().manual_seed(seed)
    r, u, queue, pairs = unit(g, B, M, d), unit(g, B, M, d), unit(g, K, d) if K else None, draw_pairs(g, B, M, k, share)
    plus, minus = slow_positive(r, u, pairs, queue, tau), slow_negative(r, u, pairs, tau)
    for beta, positive, want in ((1., True, plus + minus), (.25, True, plus + .25*minus), (0., True, plus), (2., False, 2*minus)):
        assert repco(r, u, pairs, queue, tau, beta, positive, chunk=chunk).item() == pytest.approx(want, abs=1e-9)

@few
@given(images, patches, widths, temperatures, chunks, seeds)
def test_local_to_global_and_back(B, M, d, tau, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    a, m = unit(g, B, d), unit(g, B, M, d)
    for online in ('anchor', 'local'):
        assert local_to_global(a, m, tau, online, chunk=chunk).item() == pytest.approx(slow_global(a, m, tau), abs=1e-9)
        assert token_to_image(m, a, tau, online).item() == pytest.approx(slow_reverse(m, a, tau), abs=1e-9)

@few
@given(images, st.integers(2, 6), widths, seeds)
def test_token_similarity(B, M, d, seed):
    x = torch.randn(B, M, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    c = F.cosine_similarity(x.view(B*M, 1, d), x.view(1, B*M, d), dim=2)
    image = torch.arange(B).repeat_interleave(M)
    same = image[:, None] == image
    within, between = token_similarity(x)
    assert within.item() == pytest.approx(c[same & ~torch.eye(B*M, dtype=torch.bool)].mean().item(), abs=1e-9)
    assert between.item() == pytest.approx(c[~same].mean().item(), abs=1e-9)

B, M, d = 3, 4, 5

def everything():
    "name, function of (online, *targets), tensors: every loss, with a queue and without."
    g = torch.Generator().manual_seed(0)
    r, u, queue, a = unit(g, B, M, d), unit(g, B, M, d), unit(g, 7, d), unit(g, B, d)
    match, p = torch.randint(M, (B, M), generator=g), draw_pairs(g, B, M)
    yield 'dense, queue', lambda r, u, z, **kw: dense_nce(r, u, match, z, **kw), (r, u, queue)
    yield 'dense, batch', lambda r, u, **kw: dense_nce(r, u, match, **kw), (r, u)
    yield 'repco, queue', lambda r, u, z, **kw: repco(r, u, p, z, **kw), (r, u, queue)
    yield 'repco, batch', lambda r, u, **kw: repco(r, u, p, **kw), (r, u)
    yield 'positive', lambda r, u, **kw: repco(r, u, p, beta=0, **kw), (r, u)
    yield 'negative', lambda r, u, **kw: repco(r, u, p, positive=False, **kw), (r, u)
    yield 'anchor', local_to_global, (a, u)
    yield 'local', lambda m, a, **kw: local_to_global(a, m, online='local', **kw), (u, a)
    yield 'token', token_to_image, (u, a)
    yield 'image', lambda a, m, **kw: token_to_image(m, a, online='anchor', **kw), (a, u)
CASES = {name: (f, args) for name, f, args in everything()}

@pytest.mark.parametrize('name', CASES)
def test_gradient_reaches_the_online_side_alone(name):
    f, args = CASES[name]
    online, *targets = (x.clone().requires_grad_() for x in args)
    f(online, *targets).backward()
    assert online.grad.abs().sum() > 0 and all(x.grad is None for x in targets)
    assert torch.autograd.gradcheck(lambda x: f(x, *targets), online)

@pytest.mark.parametrize('name', [n for n in CASES if n not in ('token', 'image')])
@pytest.mark.parametrize('chunk', [1, 2, 3])
def test_chunked_is_unchunked(name, chunk):
    f, (online, *targets) = CASES[name]
    online = online.clone().requires_grad_()
    whole, parts = f(online, *targets), f(online, *targets, chunk=chunk)
    assert torch.allclose(whole, parts, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, online)[0] for x in (whole, parts)), atol=1e-12)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', CASES)
def test_half_precision_is_computed_in_full(name, dtype):
    f, args = CASES[name]
    half, low = [x.to(dtype) for x in args], dict(tau=.05)
    half[0].requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16): loss = f(*half, **low)
    loss.backward()
    assert loss.dtype == torch.float32 and half[0].grad.dtype == dtype and half[0].grad.isfinite().all()
    assert loss.item() == pytest.approx(f(*(x.double() for x in half), **low).item(), abs=1e-4)
    with torch.autocast('cpu', dtype=torch.bfloat16): full = f(*(x.float() for x in args), **low) # float32 inputs stay float32
    assert full.item() == pytest.approx(f(*args, **low).item(), abs=1e-4)

def test_half_precision_in_chunks():
    f, args = CASES['anchor']
    a, m = (x.bfloat16() for x in args)
    a.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16): losses = [f(a, m, chunk=c) for c in (None, 2)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    assert torch.allclose(*(torch.autograd.grad(x, a)[0] for x in losses), atol=1e-2)

def test_identical_rows():
    x = torch.ones(8, 6, 4, dtype=torch.float64)/2
    match, p = torch.zeros(8, 6, dtype=torch.long), draw_pairs(torch.Generator(), 8, 6, share=2)
    for loss, n in ((dense_nce(x, x, match), 8), (dense_nce(x, x, match, x[:, 0]), 9), (repco_positive(x, x, p), 43),
                    (repco_negative(x, x, p), 3),
                    (repco_positive(x, x, p, tokens=2), 15), (local_to_global(x[:, 0], x), 43), (token_to_image(x, x[:, 0]), 8)):
        assert loss.item() == pytest.approx(math.log(n), abs=1e-9)
    assert [s.item() for s in token_similarity(x)] == pytest.approx([1, 1])

def test_orthogonal_images():
    "Every image has a direction of its own, and all its patches share it: each positive scores 1, each negative 0."
    x = torch.eye(8, dtype=torch.float64)[:, None].repeat(1, 3, 1)
    match, p = torch.zeros(8, 3, dtype=torch.long), draw_pairs(torch.Generator(), 8, 3, share=2)
    for loss, n in ((dense_nce(x, x, match, tau=.1), 7), (repco_positive(x, x, p, tau=.1), 21), (local_to_global(x[:, 0], x, .1), 21),
                    (token_to_image(x, x[:, 0], .1), 7)):
        assert loss.item() == pytest.approx(math.log1p(n*math.exp(-10)), rel=1e-9)
    assert [s.item() for s in token_similarity(x)] == pytest.approx([1, 0])

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
    for z in (None, queue): assert torch.allclose(dense_nce(q[:, None], k[:, None], one, z, .1), info_nce(q, k, z, .1))
    assert torch.allclose(local_to_global(q, k[:, None], .1), info_nce(q, k, tau=.1))
    assert torch.allclose(token_to_image(q[:, None], k, .1), info_nce(q, k, tau=.1))
    r, u, p = unit(g, 3, 5, 8), unit(g, 3, 5, 8), draw_pairs(g, 3, 5, share=2)
    assert torch.allclose(repco_positive(r, u, p, queue), dense_nce(r, u, p.pos, queue))

@pytest.mark.parametrize('queue', [False, True])
def test_empty_sets(queue):
    g = torch.Generator().manual_seed(2)
    r, u, z, p = unit(g, 3, 4, 5).requires_grad_(), unit(g, 3, 4, 5), unit(g, 6, 5) if queue else None, draw_pairs(g, 3, 4, share=-1)
    p.pos[:], p.neg[:] = 10**9, -10**9 # never looked at
    for kw in ({}, dict(beta=0), dict(positive=False)):
        loss = repco(r, u, p, z, **kw)
        assert loss.item() == 0 and torch.autograd.grad(loss, r)[0].abs().max() == 0
    p.neg = p.neg[..., :0]; p.neg_ok = p.neg_ok[..., :0]
    assert repco(r, u, p, z).item() == 0

def test_patches_without_pairs_get_no_gradient():
    g = torch.Generator().manual_seed(3)
    r, u, p = unit(g, 3, 6, 5).requires_grad_(), unit(g, 3, 6, 5), draw_pairs(g, 3, 6)
    p.neg = (torch.arange(6)[:, None] + torch.randint(1, 6, (3, 6, 2), generator=g)) % 6 # never the patch itself
    used = p.pos_ok | p.neg_ok.any(2)
    grad, = torch.autograd.grad(repco(r, u, p), r)
    assert not used.all() and (grad[~used] == 0).all() and (grad[used].abs().sum(1) > 0).all()

def test_tokens():
    "A draw is the loss of some set of patches, the same for the same generator state, and right on average."
    g = torch.Generator().manual_seed(4)
    a, m = unit(g, 3, 8), unit(g, 3, 2, 8)
    sets = [local_to_global(a, torch.stack([m[b, [c]] for b, c in enumerate(cs)])).item()
            for cs in ((i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1))]
    drawn = torch.tensor([local_to_global(a, m, tokens=1, generator=g).item() for _ in range(400)])
    assert all(min(abs(x-y) for y in sets) < 1e-6 for x in drawn.tolist())
    assert drawn.mean().item() == pytest.approx(mean(sets), abs=.1)
    r, u, p = unit(g, 3, 6, 8), unit(g, 3, 6, 8), draw_pairs(g, 3, 6)
    for f in (lambda **kw: local_to_global(a, u, **kw), lambda **kw: token_to_image(u, a, **kw), lambda **kw: repco(r, u, p, **kw)):
        x, y = (f(tokens=2, generator=torch.Generator().manual_seed(5)).item() for _ in range(2))
        assert x == y != f().item()
        assert f(tokens=u.shape[1]).item() == pytest.approx(f().item(), abs=1e-9)

x = torch.ones(2, 4, 3)
match, pairs = torch.zeros(2, 4, dtype=torch.long), draw_pairs(torch.Generator(), 2, 4)

@pytest.mark.parametrize('args, word', [
    (dict(tau=0.), 'tau'), (dict(tau=float('nan')), 'tau'), (dict(tau=float('inf')), 'tau'), (dict(u=x[..., :2]), 'width'),
    (dict(r=x[0]), 'r must be'),
    (dict(u=x[0]), 'u must be'), (dict(r=x[:, :0]), 'r must be'), (dict(u=x[:1]), 'same images'), (dict(queue=torch.ones(5, 2)), 'queue'),
    (dict(queue=torch.ones(0, 3)), 'queue'), (dict(match=match[:, :3]), 'match'), (dict(match=match.float()), 'match'),
    (dict(match=None), 'match'),
    (dict(r=x[:1], u=x[:1], match=match[:1]), 'batch of one'), (dict(chunk=0), 'chunk')])
def test_bad_input_of_dense_nce(args, word):
    with pytest.raises(ValueError, match=word): dense_nce(**(dict(r=x, u=x, match=match) | args))

def but(**kw): return SimpleNamespace(**(vars(pairs) | kw))

@pytest.mark.parametrize('args, word', [
    (dict(tau=-1.), 'tau'), (dict(beta=-1.), 'beta'), (dict(beta=0., positive=False), 'no term'), (dict(u=x[:, :3]), 'one grid'),
    (dict(u=x[0, 0]), 'u must be'),
    (dict(u=x[..., :2]), 'width'), (dict(tokens=5), 'tokens'), (dict(tokens=0), 'tokens'), (dict(tokens=2, queue=x[0]), 'tokens'),
    (dict(chunk=-1), 'chunk'),
    (dict(pairs=draw_pairs(torch.Generator(), 2, 9)), r'pairs\.pos'), (dict(pairs=but(pos_ok=match)), r'pairs\.pos_ok'),
    (dict(pairs=None), r'pairs\.pos'),
    (dict(pairs=but(neg=match)), r'pairs\.neg'), (dict(pairs=but(neg_ok=pairs.neg_ok[..., :1])), 'one shape'),
    (dict(queue=torch.ones(5)), 'queue')])
def test_bad_input_of_repco(args, word):
    with pytest.raises(ValueError, match=word): repco(**(dict(r=x, u=x, pairs=pairs) | args))

def test_a_batch_of_one():
    one = SimpleNamespace(**{n: v[:1] for n, v in vars(pairs).items()})
    with pytest.raises(ValueError, match='batch of one'): repco(x[:1], x[:1], one)
    assert repco(x[:1], x[:1], one, positive=False).isfinite() and repco(x[:1], x[:1], one, x[0]).isfinite()

@pytest.mark.parametrize('args, word', [
    (dict(tau=0), 'tau'), (dict(anchor=x), 'anchor must be'), (dict(local=x[0]), 'local must be'), (dict(anchor=x[:, 0, :2]), 'width'),
    (dict(local=x[:1]), 'same images'),
    (dict(anchor=x[:1, 0], local=x[:1]), 'batch of one'), (dict(online='both'), 'online'), (dict(tokens=5), 'tokens'),
    (dict(tokens=0), 'tokens')])
def test_bad_input_of_local_to_global(args, word):
    for f in (local_to_global, token_to_image):
        with pytest.raises(ValueError, match=word): f(**(dict(anchor=x[:, 0], local=x) | args))

def test_bad_input_of_the_rest():
    with pytest.raises(ValueError, match='chunk'): local_to_global(x[:, 0], x, chunk=0)
    for bad in (x[0], x[:1], x[:, :1]):
        with pytest.raises(ValueError, match='x must be'): token_similarity(bad)

"Losses over patches against plain references in float64, their gradients, masks, limits and bad input."
import math
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from ssl_patch import losses
from ssl_patch.losses import dense_nce, draw_rows, info_nce, local_to_global, repco, repco_negative, repco_positive, token_similarity, token_to_image

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

def several(g, B, M, P, k, M_k, share=.5):
    "Any pairs that name M_k patches, P positives and k negatives a patch."
    def index(n): return torch.randint(M_k, (B, M, n), generator=g)
    def flag(n): return torch.rand(B, M, n, generator=g) < share
    return SimpleNamespace(pos=index(P), pos_ok=flag(P), neg=index(k), neg_ok=flag(k))

def slow_readings(r, u, pairs, queue, tau, beta, joint, same=None, same_ok=None):
    "RepCo in plain floats: several positives in one numerator, another crop, one softmax or two terms. Needs scores of moderate size."
    plus, minus, k = [], [], pairs.neg.shape[2]
    for b, i in cells(r):
        def e(v): return math.exp(float(r[b, i] @ v)/tau)
        others = elsewhere(u, b) if queue is None else list(queue)
        right = sum(e(u[b, j]) for j, ok in zip(pairs.pos[b, i].view(-1), pairs.pos_ok[b, i].view(-1)) if ok)
        local = sum(e(u[b, j]) for j, ok in zip(pairs.neg[b, i], pairs.neg_ok[b, i]) if ok and (same_ok is None or same_ok[b, i]))
        wrong = sum(map(e, others)) + (beta*len(others)/k*local if joint and k else 0)
        if right: plus.append(math.log(1 + wrong/right))
        if local and not joint: minus.append(math.log(1 + local/e(u[b, i if same is None else same[b, i]])))
    return mean(plus) if joint else mean(plus) + beta*mean(minus)

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

@settings(max_examples=25, deadline=None)
@given(st.integers(2, 3), st.sampled_from([1, 4, 8, 49]), st.integers(1, 6), st.integers(0, 4), st.integers(0, 3),
       st.sampled_from([0, 5, 33]), st.sampled_from([.07, .2, 1.]), chunks, st.sampled_from([0., .5, 2.]), seeds)
def test_readings_of_repco(B, M, M_k, P, k, K, tau, chunk, share, seed):
    g = torch.Generator().manual_seed(seed)
    r, u, queue, p = unit(g, B, M, 7), unit(g, B, M_k, 7), unit(g, K, 7) if K else None, several(g, B, M, P, k, M_k, share)
    if P == 0: p.pos, p.pos_ok = torch.randint(M_k, (B, M), generator=g), torch.rand(B, M, generator=g) < share  # the plain shape
    same, some = torch.randint(M_k, (B, M), generator=g), torch.rand(B, M, generator=g) < .5
    assert repco_positive(r, u, p, queue, tau, chunk=chunk).item() == pytest.approx(slow_readings(r, u, p, queue, tau, 0, True), abs=1e-9)
    for beta in (0., .3, 1.):
        for joint in (False, True):
            for ok in (None, some):
                want = slow_readings(r, u, p, queue, tau, beta, joint, same, ok)
                got = repco(r, u, p, queue, tau, beta, chunk=chunk, joint=joint, same=same, same_ok=ok)
                assert got.item() == pytest.approx(want, abs=1e-9)

@few
@given(images, patches, widths, temperatures, chunks, seeds)
def test_local_to_global_and_back(B, M, d, tau, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    a, m = unit(g, B, d), unit(g, B, M, d)
    for online in ('anchor', 'local', 'both'):
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
    s, where, ok = several(g, B, M, 3, 2, 6), torch.randint(6, (B, M), generator=g), torch.rand(B, M, generator=g) < .6
    other = unit(g, B, 6, d)
    yield 'several', lambda r, u, z, **kw: repco_positive(r, u, s, z, **kw), (r, other, queue)
    yield 'joint, queue', lambda r, u, z, **kw: repco(r, u, s, z, joint=True, same=where, **kw), (r, other, queue)
    yield 'joint, batch', lambda r, u, **kw: repco(r, u, p, joint=True, beta=.3, **kw), (r, u)
    yield 'other crop', lambda r, u, **kw: repco(r, u, s, same=where, same_ok=ok, **kw), (r, other)
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

@pytest.mark.parametrize('chunk', [None, 2])
def test_both_sides_learn(chunk):
    "The gradient of each side is the one that it gets alone, in `local_to_global` and its reverse."
    g = torch.Generator().manual_seed(6)
    a, m = unit(g, B, d).requires_grad_(), unit(g, B, M, d).requires_grad_()
    for f in (lambda a, m, side: local_to_global(a, m, online=side, chunk=chunk), lambda a, m, side: token_to_image(m, a, online=side)):
        both = torch.autograd.grad(f(a, m, 'both'), (a, m))
        for x, side, got in zip((a, m), ('anchor', 'local'), both):
            assert torch.allclose(got, torch.autograd.grad(f(a, m, side), x)[0], atol=1e-12)
        assert torch.autograd.gradcheck(lambda a, m: f(a, m, 'both'), (a, m))
        drawn = local_to_global(a, m, online='both', tokens=2, generator=g)
        assert all(x.abs().sum() > 0 for x in torch.autograd.grad(drawn, (a, m)))

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
                    (repco_negative(x, x, p), 3), (repco(x, x, p, joint=True), 1 + 42 + 42),
                    (repco(x, x, p, x[0], joint=True, beta=.5), 1 + 6 + 3), (repco(x, x, p, joint=True, tokens=2), 1 + 14 + 14),
                    (repco_positive(x, x, several(torch.Generator(), 8, 6, 3, 2, 6, share=2)), 1 + 42/3),
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
    nowhere = dict(same=p.neg[..., 0], same_ok=torch.zeros(3, 4, dtype=torch.bool))
    for kw in ({}, dict(beta=0), dict(positive=False), dict(joint=True), nowhere, nowhere | dict(joint=True)):
        loss = repco(r, u, p, z, **kw)
        assert loss.item() == 0 and torch.autograd.grad(loss, r)[0].abs().max() == 0
    p.neg = p.neg[..., :0]; p.neg_ok = p.neg_ok[..., :0]
    assert repco(r, u, p, z).item() == 0
    p.pos, p.pos_ok = p.pos[..., None][..., :0], p.pos_ok[..., None][..., :0]
    for joint in (False, True):
        loss = repco(r, u, p, z, joint=joint)
        assert loss.item() == 0 and torch.autograd.grad(loss, r)[0].abs().max() == 0

def test_one_softmax():
    "Without local negatives, or with beta=0, it is L+; the other readings are L+ and L- when nothing is asked of them."
    g = torch.Generator().manual_seed(7)
    r, u, z = unit(g, 3, 6, 5).requires_grad_(), unit(g, 3, 6, 5), unit(g, 9, 5)
    p, none = draw_pairs(g, 3, 6), draw_pairs(g, 3, 6)
    none.neg_ok[:], none.neg[:] = False, 10**9
    for queue in (None, z):
        for pairs, kw in ((none, dict(joint=True)), (p, dict(joint=True, beta=0.)), (p, dict(joint=True, beta=0., tokens=2)), (none, {})):
            if queue is not None and 'tokens' in kw: continue
            draw = dict(tokens=kw['tokens']) if 'tokens' in kw else {}
            got = repco(r, u, pairs, queue, **kw, generator=torch.Generator().manual_seed(1))
            want = repco_positive(r, u, pairs, queue, **draw, generator=torch.Generator().manual_seed(1))
            assert torch.allclose(got, want, atol=1e-12)
            assert torch.allclose(*(torch.autograd.grad(x, r)[0] for x in (got, want)), atol=1e-12)
        assert torch.equal(repco(r, u, p, queue), repco(r, u, p, queue, same=torch.arange(6).expand(3, 6)))
        one = SimpleNamespace(**vars(p) | dict(pos=p.pos[..., None], pos_ok=p.pos_ok[..., None]))
        assert torch.equal(repco(r, u, p, queue), repco(r, u, one, queue))

def test_missing_positives_and_unseen_places_do_not_matter():
    g = torch.Generator().manual_seed(8)
    r, u, z, p = unit(g, 2, 5, 4), unit(g, 2, 3, 4), unit(g, 7, 4), several(g, 2, 5, 3, 2, 3)
    same, ok = torch.randint(3, (2, 5), generator=g), torch.rand(2, 5, generator=g) < .5
    losses = []
    for wild in (False, True):
        if wild: p.pos[~p.pos_ok], p.neg[~p.neg_ok], same[~ok] = 10**9, -10**9, 10**9
        losses += [[repco(r, u, p, z, joint=j, same=same, same_ok=ok).item() for j in (False, True)]]
    assert losses[0] == losses[1]
    off = SimpleNamespace(**vars(p) | dict(neg_ok=p.neg_ok & ok[..., None]))
    assert repco_negative(r, u, p, same=same, same_ok=ok).item() == repco_negative(r, u, off, same=same.where(ok, 0)).item()

def test_chance_of_readings():
    "Random vectors in 128 dimensions: DenseCL's queue, the dense negatives of a batch, and two equal terms in one softmax."
    g = torch.Generator().manual_seed(9)
    r, u, z, p = unit(g, 4, 32, 128), unit(g, 4, 32, 128), unit(g, 16384, 128), draw_pairs(g, 4, 32, share=2)
    more = several(g, 4, 32, 4, 2, 32, share=2)
    assert repco_positive(r, u, p, z).item() == pytest.approx(math.log(16385) + 1/(2*128*.2**2), abs=.1)
    assert repco_positive(r, u, more, z).item() == pytest.approx(math.log(1 + 16384/4), abs=.1)
    assert repco(r, u, more, z, joint=True).item() == pytest.approx(math.log(1 + 2*16384/4), abs=.15)

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
    (dict(queue=torch.ones(5)), 'queue'), (dict(joint=True, positive=False), 'joint=True with positive=False'),
    (dict(joint=True, pairs=but(neg=match)), r'pairs\.neg'), (dict(joint=True, beta=-1.), 'beta'),
    (dict(pairs=but(pos=match[..., None])), r'pairs\.pos_ok'),
    (dict(pairs=but(pos=match[:, :3, None], pos_ok=pairs.pos_ok[:, :3, None])), r'pairs\.pos'),
    (dict(pairs=but(pos=match[..., None], pos_ok=pairs.pos_ok[..., None].repeat(1, 1, 2))), 'one shape'),
    (dict(same=match[:, :3]), 'same must be'), (dict(same=match.float()), 'same must be'), (dict(same_ok=pairs.pos_ok), 'give same too'),
    (dict(same=match, same_ok=match), 'same_ok must be'), (dict(same=match, u=x[..., :2]), 'width'),
    (dict(joint=True, u=x[:, :3]), 'one grid'), (dict(beta=0., u=x[:, :3]), 'one grid')])
def test_bad_input_of_repco(args, word):
    with pytest.raises(ValueError, match=word): repco(**(dict(r=x, u=x, pairs=pairs) | args))

def test_a_batch_of_one():
    one = SimpleNamespace(**{n: v[:1] for n, v in vars(pairs).items()})
    with pytest.raises(ValueError, match='batch of one'): repco(x[:1], x[:1], one)
    assert repco(x[:1], x[:1], one, positive=False).isfinite() and repco(x[:1], x[:1], one, x[0]).isfinite()

@pytest.mark.parametrize('args, word', [
    (dict(tau=0), 'tau'), (dict(anchor=x), 'anchor must be'), (dict(local=x[0]), 'local must be'), (dict(anchor=x[:, 0, :2]), 'width'),
    (dict(local=x[:1]), 'same images'),
    (dict(anchor=x[:1, 0], local=x[:1]), 'batch of one'), (dict(online='all'), 'online'), (dict(tokens=5), 'tokens'),
    (dict(tokens=0), 'tokens')])
def test_bad_input_of_local_to_global(args, word):
    for f in (local_to_global, token_to_image):
        with pytest.raises(ValueError, match=word): f(**(dict(anchor=x[:, 0], local=x) | args))

def test_bad_input_of_the_rest():
    with pytest.raises(ValueError, match='chunk'): local_to_global(x[:, 0], x, chunk=0)
    for bad in (x[0], x[:1], x[:, :1]):
        with pytest.raises(ValueError, match='x must be'): token_similarity(bad)

class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    "The most numbers that any tensor has that is made inside."
    most = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor): self.most = max(self.most, x.numel())
        return out

def test_chunks_bound_the_table_of_logits():
    "As the docstrings say: no table has more than chunk x B x M (or chunk x M x K) numbers, forward and backward; without chunks one has B times that."
    g = torch.Generator().manual_seed(0)
    B, M, d, K, chunk = 16, 32, 4, 600, 2
    a, l, q = unit(g, B, d).requires_grad_(), unit(g, B, M, d).requires_grad_(), unit(g, K, d)
    match, pairs = torch.randint(M, (B, M), generator=g), draw_pairs(g, B, M)
    for f, whole, part in ((lambda c: local_to_global(a, l, chunk=c), B*B*M, chunk*B*M), (lambda c: dense_nce(l, l.detach(), match, q, chunk=c), B*M*K, chunk*M*K),
                           (lambda c: repco(l, l.detach(), pairs, q, chunk=c), B*M*K, chunk*M*K)):
        for c, bound in ((None, whole), (chunk, max(part, B*M*8*d))):
            with Largest() as seen: f(c).backward()
            assert seen.most <= bound and (c is not None or seen.most == whole)

@pytest.mark.parametrize('rows', [4, 8, 12])
def test_parts_of_their_own_accord(rows, monkeypatch):
    "Without `chunk` large tables are made in parts too, whichever side learns."
    g = torch.Generator().manual_seed(0)
    a, l, u, q = unit(g, 5, 6), unit(g, 5, 4, 6), unit(g, 5, 4, 6), unit(g, 9, 6)
    match, pairs = torch.randint(4, (5, 4), generator=g), draw_pairs(g, 5, 4)
    fs = [lambda a, l: dense_nce(l, u, match), lambda a, l: dense_nce(l, u, match, q), lambda a, l: repco(l, u, pairs), lambda a, l: repco(l, u, pairs, q, joint=True)]
    fs += [lambda a, l, s=s, f=f: f(a, l, online=s) for s in ('anchor', 'local', 'both') for f in (local_to_global, lambda a, l, online: token_to_image(l, a, online=online))]
    def results(): return [(value.detach(), *torch.autograd.grad(3*value, x, allow_unused=True)) for x in [(a.clone().requires_grad_(), l.clone().requires_grad_())] for value in (f(*x) for f in fs)]
    whole = results()
    monkeypatch.setattr(losses, '_rows_at_once', lambda *_: rows)
    for one, two in zip(whole, results()):
        for x, y in zip(one, two): assert (x is None and y is None) or torch.allclose(x, y, atol=1e-12)

def test_draws_of_patches_are_uniform_and_without_replacement():
    x = torch.arange(6.)[None, :, None].expand(4000, 6, 1)
    got = draw_rows(x, 2, torch.Generator().manual_seed(0))[..., 0]
    assert (got[:, 0] != got[:, 1]).all() and draw_rows(x, 6) is x and draw_rows(x, None) is x
    assert torch.allclose(got.flatten().long().bincount()/4000, torch.full((6,), 1/3), atol=.04)

"Losses against independent implementations; their gradients, limits, bad input, parts."

import math
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from ssl_patch.methods import contrast
from ssl_patch.methods.co2 import co2, co2_consistency
from ssl_patch.methods.contrast import info_nce
from ssl_patch.methods.label_pictures import show_soft_labels
from ssl_patch.methods.ressl import ressl
from ssl_patch.methods.sce import sce, sce_soft_labels


def unit(g, *shape):
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def reference(q, k, queue, tau):
    "Probability of the positive, one query at a time, in plain floats."
    out = []
    for i in range(len(q)):
        others = [k[j] for j in range(len(k)) if j != i] if queue is None else list(queue)
        pos = float(q[i] @ k[i]) / tau
        rest = [float(q[i] @ z) / tau for z in others]
        top = max([pos] + rest)
        out.append(math.log(sum(math.exp(s - top) for s in [pos] + rest)) + top - pos)
    return sum(out) / len(out)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 9),
    st.integers(1, 33),
    st.integers(0, 40),
    st.sampled_from([0.05, 0.1, 0.2, 1.0]),
    st.integers(0, 10**6),
)
def test_reference(B, d, K, tau, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, queue = unit(g, B, d), unit(g, B, d), unit(g, K, d) if K else None
    assert info_nce(q, k, queue, tau).item() == pytest.approx(reference(q, k, queue, tau), abs=1e-9)


@pytest.mark.parametrize('queue', [False, True])
def test_gradient_is_closed_form(queue):
    "d loss / d q_i = (sum_j p_ij z_j - k_i) / (B tau)."
    g = torch.Generator().manual_seed(0)
    q, k = unit(g, 6, 5).requires_grad_(), unit(g, 6, 5).requires_grad_()
    z = unit(g, 11, 5).requires_grad_() if queue else None
    info_nce(q, k, z, 0.3).backward()
    for i in range(6):
        candidates = torch.cat([k[i : i + 1], z]) if queue else k
        p = torch.softmax(candidates.detach() @ q[i].detach() / 0.3, 0)
        assert torch.allclose(q.grad[i], (p @ candidates.detach() - k[i].detach()) / (6 * 0.3))
    assert k.grad is None and (z is None or z.grad is None)


def test_identical_and_orthogonal_rows():
    same = F.normalize(torch.ones(8, 4, dtype=torch.float64), dim=1)
    assert info_nce(same, same, tau=0.1).item() == pytest.approx(math.log(8))
    eye = torch.eye(8, dtype=torch.float64)
    assert info_nce(eye, eye, tau=0.1).item() == pytest.approx(math.log(1 + 7 * math.exp(-10)))


def test_half_precision_is_computed_in_full():
    g = torch.Generator().manual_seed(0)
    q, k = unit(g, 32, 16), unit(g, 32, 16)
    half = info_nce(q.bfloat16(), k.bfloat16(), tau=0.05)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(
        info_nce(q.bfloat16().double(), k.bfloat16().double(), tau=0.05).item(), abs=1e-4
    )


@pytest.mark.parametrize(
    'args, word',
    [
        (dict(tau=0.0), 'tau'),
        (dict(tau=float('nan')), 'tau'),
        (dict(k=torch.ones(4, 3)), r'k must be \(B,2\), .*got \(4, 3\)'),
        (dict(queue=torch.ones(5, 3)), r'queue must be \(K,2\), .*got \(5, 3\)'),
        (dict(q=torch.ones(1, 2), k=torch.ones(1, 2)), 'batch of one'),
        (dict(q=torch.ones(2)), r'\(B,d\)'),
        (dict(offset=1), 'offset'),
        (dict(q=torch.ones(2, 2), queue=torch.ones(3, 2)), 'k must be of the same 2 images as q'),
    ],
)
def test_bad_input(args, word):
    with pytest.raises(ValueError, match=word):
        info_nce(**(dict(q=torch.ones(4, 2), k=torch.ones(4, 2)) | args))


# Soft labels: an independent implementation in plain floats, one query at a time.


def log_softmax(scores):
    top = max(scores)
    total = math.log(sum(math.exp(s - top) for s in scores)) + top
    return [s - total for s in scores]


def log_relation(x, others, tau):
    return log_softmax([float(x @ z) / tau for z in others])


def others_of(i, k, queue):
    return [z for j, z in enumerate(k) if j != i] if queue is None else list(queue)


def slow_consistency(q, k, queue=None, tau=0.05):
    total = 0.0
    for i in range(len(q)):
        a, b = (log_relation(x[i], others_of(i, k, queue), tau) for x in (k, q))
        for P, Q in zip(a, b):
            total += 0.5 * math.exp(P) * (P - Q) + 0.5 * math.exp(Q) * (Q - P)
    return total / len(q)


def slow_co2(q, k, queue=None, tau=0.2, tau_con=0.05, alpha=0.3):
    return reference(q, k, queue, tau) + alpha * slow_consistency(q, k, queue, tau_con)


def slow_ressl(q, k, queue=None, tau_s=0.1, tau_t=0.04):
    total = 0.0
    for i in range(len(q)):
        P, Q = (
            log_relation(k[i], others_of(i, k, queue), tau_t),
            log_relation(q[i], others_of(i, k, queue), tau_s),
        )
        total -= sum(math.exp(a) * b for a, b in zip(P, Q))
    return total / len(q)


def slow_labels(k, queue=None, lam=0.5, tau_m=0.07, in_batch=False, positive_mode='masked'):
    rows = []
    for i in range(len(k)):
        keyed = queue is None or in_batch
        others = (
            [*others_of(i, k, None), *([] if queue is None else queue)] if keyed else list(queue)
        )
        if positive_mode == 'masked':
            s = [0.0] + [math.exp(x) for x in log_relation(k[i], others, tau_m)]
        else:
            s = [
                math.exp(x) for x in log_softmax([0.0] + [float(k[i] @ z) / tau_m for z in others])
            ]
        row = [(1 - lam) * x for x in s]
        own = row.pop(0) + lam
        row.insert(i if keyed else 0, own)
        rows.append(row)
    return rows


def slow_sce(
    q, k, queue=None, lam=0.5, tau=0.1, tau_m=0.07, in_batch=False, positive_mode='masked'
):
    total = 0.0
    for i, w in enumerate(slow_labels(k, queue, lam, tau_m, in_batch, positive_mode)):
        candidates = list(k) if queue is None else [*k, *queue] if in_batch else [k[i], *queue]
        total -= sum(a * b for a, b in zip(w, log_relation(q[i], candidates, tau)))
    return total / len(q)


SOFT = [(co2_consistency, slow_consistency), (co2, slow_co2), (ressl, slow_ressl), (sce, slow_sce)]
sizes = (st.integers(2, 9), st.integers(1, 33), st.integers(0, 40), st.integers(0, 10**6))
temperature = st.sampled_from([0.03, 0.05, 0.1, 0.2, 1.0])


def draw(B, d, K, seed):
    g = torch.Generator().manual_seed(seed)
    return unit(g, B, d), unit(g, B, d), unit(g, K, d) if K else None


@settings(max_examples=40, deadline=None)
@given(*sizes, temperature, temperature, st.sampled_from([0.0, 0.3, 10.0]))
def test_co2_and_relation(B, d, K, seed, tau, tau_con, alpha):
    x = draw(B, d, K, seed)
    assert co2_consistency(*x, tau_con=tau_con).item() == pytest.approx(
        slow_consistency(*x, tau_con), rel=1e-9, abs=1e-9
    )
    assert co2(*x, tau=tau, tau_con=tau_con, alpha=alpha).item() == pytest.approx(
        slow_co2(*x, tau, tau_con, alpha), rel=1e-9, abs=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(*sizes, temperature, temperature)
def test_ressl(B, d, K, seed, tau_s, tau_t):
    x = draw(B, d, K, seed)
    assert ressl(*x, tau_s=tau_s, tau_t=tau_t).item() == pytest.approx(
        slow_ressl(*x, tau_s, tau_t), rel=1e-9, abs=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(
    *sizes,
    temperature,
    temperature,
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from(['masked', 'zero_logit', 'in_batch']),
)
def test_sce(B, d, K, seed, tau, tau_m, lam, form):
    q, k, queue = draw(B, d, K, seed)
    form = 'masked' if queue is None else form
    how = dict(lam=lam, tau_m=tau_m) | (
        dict(in_batch=True) if form == 'in_batch' else dict(positive_mode=form)
    )
    assert sce(q, k, queue, tau=tau, **how).item() == pytest.approx(
        slow_sce(q, k, queue, tau=tau, **how), rel=1e-9, abs=1e-9
    )
    w = sce_soft_labels(k, queue, **how)
    assert torch.allclose(
        w, torch.tensor(slow_labels(k, queue, **how), dtype=torch.float64), atol=1e-12
    )
    assert torch.allclose(w.sum(1), torch.ones(B, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(*sizes, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_sce_falls_apart(B, d, K, seed, lam):
    "SCE = lam InfoNCE + (1-lam) (ReSSL + Ceil)."
    q, k, queue = draw(B, d, K, seed)
    ceil = 0.0
    for i in range(B):
        logp = log_relation(q[i], [k[i], *others_of(i, k, queue)], 0.1)
        ceil -= math.log(sum(math.exp(x) for x in logp[1:])) / B
    expected = lam * info_nce(q, k, queue, tau=0.1) + (1 - lam) * (
        ressl(q, k, queue, tau_s=0.1, tau_t=0.07) + ceil
    )
    assert sce(q, k, queue, lam=lam).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize('queue', [False, True])
def test_limits(queue):
    q, k, z = draw(7, 6, 12 * queue, 3)
    assert torch.allclose(sce(q, k, z, lam=1.0), info_nce(q, k, z, tau=0.1), rtol=1e-12)
    assert torch.allclose(co2(q, k, z, alpha=0.0), info_nce(q, k, z, tau=0.2), rtol=1e-12)
    assert co2_consistency(k, k, z).item() == pytest.approx(0, abs=1e-12)
    assert co2_consistency(q, k, z) > 0.01


@pytest.mark.parametrize('f, slow', SOFT)
def test_identical_and_orthogonal(f, slow):
    same, eye = (
        F.normalize(torch.ones(8, 4, dtype=torch.float64), dim=1),
        torch.eye(8, dtype=torch.float64),
    )
    chance = {co2_consistency: (0.0, 0.0), ressl: (math.log(7), math.log(5))}.get(
        f, (math.log(8), math.log(6))
    )
    assert f(same, same).item() == pytest.approx(chance[0], abs=1e-12)
    assert f(same, same, same[:5]).item() == pytest.approx(chance[1], abs=1e-12)
    for queue in (None, eye, eye[:3]):
        assert f(eye, eye.roll(1, 0), queue).item() == pytest.approx(
            slow(eye, eye.roll(1, 0), queue), rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize(
    'f, kw',
    [
        (co2_consistency, dict(tau_con=0.2)),
        (co2, dict(tau_con=0.2)),
        (ressl, dict(tau_s=0.3, tau_t=0.2)),
        (sce, {}),
        (sce, dict(lam=0.0, in_batch=True)),
        (sce, dict(positive_mode='zero_logit')),
    ],
)
@pytest.mark.parametrize('queue', [False, True])
def test_gradient_reaches_the_queries_alone(f, kw, queue):
    if not queue and 'positive_mode' in kw:
        return
    q, k, z = (None if x is None else x.requires_grad_() for x in draw(5, 4, 6 * queue, 0))
    f(q, k, z, **kw).backward()
    assert q.grad.abs().sum() > 1e-3 and k.grad is None and (z is None or z.grad is None)
    assert torch.autograd.gradcheck(lambda a: f(a, k, z, **kw), q)


@pytest.mark.parametrize('queue', [False, True])
def test_consistency_term_has_a_gradient(queue):
    """Closed form: (1/tau) sum_j g_j n_j with g = (Q-P)/2 + Q (log Q/P - KL(Q|P))/2, averaged over
    the batch."""
    q, k, z = draw(6, 5, 11 * queue, 0)

    def gradient(f, **kw):
        a = q.clone().requires_grad_()
        return torch.autograd.grad(f(a, k, z, **kw), a)[0]

    expected = torch.zeros_like(q)
    for i in range(6):
        n = torch.stack(others_of(i, k, z))
        P, Q = torch.softmax(n @ k[i] / 0.3, 0), torch.softmax(n @ q[i] / 0.3, 0)
        r = (Q / P).log()
        expected[i] = ((Q - P) / 2 + Q * (r - (Q * r).sum()) / 2) @ n / (0.3 * 6)
    assert expected.norm() > 0.01
    assert torch.allclose(gradient(co2_consistency, tau_con=0.3), expected)
    assert torch.allclose(
        gradient(co2, tau_con=0.3, alpha=2.0) - gradient(info_nce, tau=0.2), 2 * expected
    )


@pytest.mark.parametrize('queue', [False, True])
def test_sce_gradient_is_closed_form(queue):
    "d loss / d q_i = sum_j (p_ij - w_ij) z_j / (B tau)."
    q, k, z = draw(6, 5, 11 * queue, 0)
    q.requires_grad_()
    sce(q, k, z, tau=0.2).backward()
    w = sce_soft_labels(k, z)
    for i in range(6):
        candidates = torch.cat([k[i : i + 1], z]) if queue else k
        p = torch.softmax(candidates @ q[i].detach() / 0.2, 0)
        assert torch.allclose(q.grad[i], (p - w[i]) @ candidates / (6 * 0.2))


@pytest.mark.parametrize('f, slow', SOFT)
@pytest.mark.parametrize('K', [0, 20])
def test_soft_labels_in_half_precision(f, slow, K):
    x = [None if x is None else x.bfloat16() for x in draw(16, 32, K, 0)]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        q = x[0].clone().requires_grad_()
        half = f(q, *x[1:])
        as_float = f(*(None if a is None else a.float() for a in x))
    half.backward()
    assert (
        half.dtype == as_float.dtype == torch.float32
        and q.grad.dtype == torch.bfloat16
        and q.grad.isfinite().all()
    )
    expected = slow(*(None if a is None else a.double() for a in x))
    assert half.item() == pytest.approx(expected, abs=1e-4) and as_float.item() == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize('f, slow', SOFT)
@pytest.mark.parametrize('K', [0, 7])
def test_similarities_are_computed_once(f, slow, K, monkeypatch):
    calls, plain = [], contrast.similarity
    monkeypatch.setattr(contrast, 'similarity', lambda a, b: calls.append(1) or plain(a, b))
    f(*draw(6, 5, K, 0))
    assert len(calls) == 2


def test_gathered_keys():
    q, k, z = draw(8, 5, 9, 0)
    for f, kw in (
        (co2_consistency, {}),
        (co2, {}),
        (ressl, {}),
        (sce, {}),
        (sce, dict(queue=z, in_batch=True)),
    ):
        parts = [f(q[o : o + 2], k, offset=o, **kw) for o in (0, 2, 4, 6)]
        assert torch.allclose(sum(parts) / 4, f(q, k, **kw))


def test_one_image_and_a_queue():
    q, k, z = draw(1, 5, 9, 0)
    for f, slow in SOFT:
        assert f(q, k, z).item() == pytest.approx(slow(q, k, z), rel=1e-9)
    assert sce(q, k, z, in_batch=True).item() == pytest.approx(sce(q, k, z).item(), rel=1e-9)


def test_soft_labels_have_no_gradient():
    _, k, z = draw(4, 5, 6, 0)
    assert not sce_soft_labels(k.requires_grad_(), z.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    'f, names',
    [
        (co2_consistency, ['tau_con']),
        (co2, ['tau', 'tau_con']),
        (ressl, ['tau_s', 'tau_t']),
        (sce, ['tau', 'tau_m']),
    ],
)
def test_soft_losses_refuse_bad_input(f, names):
    ones = torch.ones
    for name in names:
        for bad in (0.0, -1.0, float('nan'), float('inf')):
            with pytest.raises(ValueError, match=f'^{name} must be a number above 0, got {bad}'):
                f(ones(4, 2), ones(4, 2), **{name: bad})
    for x, word in (
        ((ones(4, 2), ones(4, 3)), r'k must be \(B,2\), .*got \(4, 3\)'),
        ((ones(4, 2), ones(4, 2), ones(5, 3)), r'queue must be \(K,2\), .*got \(5, 3\)'),
        ((ones(4, 2), ones(4, 2), ones(0, 2)), 'queue must be of at least one key, or None'),
        ((ones(1, 2), ones(1, 2)), 'batch of one'),
        ((ones(2), ones(2)), r'\(B,d\)'),
        ((ones(2, 2), ones(4, 2), ones(5, 2)), 'k must be of the same 2 images as q'),
    ):
        with pytest.raises(ValueError, match=word):
            f(*x)
    with pytest.raises(ValueError, match='offset'):
        f(ones(4, 2), ones(4, 2), offset=1)
    with pytest.raises(ValueError, match='k must be of at least the 4 images of q'):
        f(ones(4, 2), ones(3, 2))


NO_QUEUE_ALONE = "positive_mode must be 'masked' with keys of the batch, .*got 'zero_logit'"


@pytest.mark.parametrize(
    'args, word',
    [
        (dict(lam=-0.1), 'lam'),
        (dict(lam=1.01), 'lam'),
        (dict(lam=float('nan')), 'lam'),
        (dict(positive_mode='none'), "'masked' or 'zero_logit', got 'none'"),
        (dict(positive_mode='zero_logit', queue=None), NO_QUEUE_ALONE),
        (dict(positive_mode='zero_logit', in_batch=True), NO_QUEUE_ALONE),
    ],
)
def test_sce_refuses(args, word):
    args = dict(queue=torch.ones(5, 2)) | args
    with pytest.raises(ValueError, match=word):
        sce(torch.ones(4, 2), torch.ones(4, 2), **args)
    with pytest.raises(ValueError, match=word):
        sce_soft_labels(torch.ones(4, 2), **args)


def test_sce_in_batch_refuses():
    ones = torch.ones
    with pytest.raises(ValueError, match='k must be of at least the 4 images of q'):
        sce(ones(4, 2), ones(3, 2), ones(5, 2), in_batch=True)
    with pytest.raises(ValueError, match='offset'):
        sce(ones(4, 2), ones(6, 2), ones(5, 2), in_batch=True, offset=3)


@pytest.mark.parametrize('alpha', [-0.1, float('nan'), float('inf')])
def test_co2_refuses_alpha(alpha):
    with pytest.raises(ValueError, match=f'alpha must be a number at least 0, got {alpha}'):
        co2(torch.ones(4, 2), torch.ones(4, 2), alpha=alpha)


def test_show_soft_labels():
    x = torch.rand(6, 3, 8, 8)
    w = torch.tensor([0.05, 0.1, 0.6, 0.2, 0.05, 0.0])
    fig = show_soft_labels(x[0], x, dict(a=w, b=w), n=3)
    assert len(fig.axes) == 3 * 4
    assert [round(p.get_height(), 2) for ax in fig.axes[5:8] for p in ax.patches] == [
        0.05,
        0.6,
        0.2,
    ]  # the positive, then by mass
    assert 'not drawn: 0.15' in fig.axes[4].texts[0].get_text()


# Tables in parts: nothing may depend on how many rows are made at a time.

IMAGE = [info_nce, co2_consistency, co2, ressl, sce]


def with_gradient(f, q, *args, **kw):
    q = q.detach().clone().requires_grad_()
    value = f(q, *args, **kw)
    return value.detach(), torch.autograd.grad(3 * value, q)[0] / 3


@pytest.mark.parametrize('rows', [1, 3, 7, 8])
@pytest.mark.parametrize('form', ['queue', 'keys', 'gathered', 'in_batch'])
@pytest.mark.parametrize('f', IMAGE)
def test_parts_are_the_whole(f, form, rows, monkeypatch):
    if form == 'in_batch' and f is not sce:
        pytest.skip('keys and queue together are SCE only')
    g = torch.Generator().manual_seed(0)
    q, k, queue = (
        unit(g, 7, 5),
        unit(g, 7 if form == 'queue' else 12 if form == 'gathered' else 7, 5),
        unit(g, 9, 5) if form in ('queue', 'in_batch') else None,
    )
    kw = dict(offset=3) if form == 'gathered' else dict(in_batch=True) if form == 'in_batch' else {}
    whole = with_gradient(f, q, k, queue, **kw)
    monkeypatch.setattr(contrast, 'rows_at_once', lambda *_: rows)
    for a, b in zip(whole, with_gradient(f, q, k, queue, **kw)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            f(q.requires_grad_(), k, queue, **kw), whole[0], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize('f', IMAGE)
def test_parts_are_the_whole_in_float32(f, monkeypatch):
    "Value and gradient to 1e-5 of their size."
    g = torch.Generator().manual_seed(0)
    args = [unit(g, n, 64).float() for n in (96, 96, 1000)]
    want = with_gradient(f, *(x.double() for x in args))
    for rows in (32, 1000):
        monkeypatch.setattr(contrast, 'rows_at_once', lambda *_: rows)
        for a, b in zip(with_gradient(f, *args), want):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize('f', IMAGE)
def test_parts_keep_the_gradient_of_the_queries_alone(f, monkeypatch):
    monkeypatch.setattr(contrast, 'rows_at_once', lambda *_: 4)
    g, seen = torch.Generator().manual_seed(0), []
    q, k, queue = (
        unit(g, 16, 8).requires_grad_(),
        unit(g, 16, 8).requires_grad_(),
        unit(g, 500, 8).requires_grad_(),
    )
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (seen.append(x.shape), x)[1], lambda x: x
    ):
        value = f(q, k, queue)
    assert [s for s in seen if len(s)] == [(16, 8)]
    value.backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and queue.grad is None


def test_a_gradient_of_a_gradient_is_refused_in_parts(monkeypatch):
    monkeypatch.setattr(contrast, 'rows_at_once', lambda *_: 2)
    q = unit(torch.Generator().manual_seed(0), 4, 8).requires_grad_()
    (g,) = torch.autograd.grad(info_nce(q, q.detach().flip(1)), q, create_graph=True)
    with pytest.raises(RuntimeError, match='does not require grad'):
        g.sum().backward()


@pytest.mark.parametrize('loss', [info_nce, ressl, sce, co2])
@pytest.mark.parametrize('queue', [True, False])
def test_parts_are_in_full_precision_under_autocast(monkeypatch, loss, queue):
    """The gradient of a table in parts is made in the forward pass, where autocast is on: it must
    not be bfloat16 for that."""
    q, k, z = (
        torch.nn.functional.normalize(
            torch.randn(n, 16, generator=torch.Generator().manual_seed(n)), dim=1
        )
        for n in (24, 24, 40)
    )

    def grad(rows):
        monkeypatch.setattr(contrast, 'rows_at_once', lambda *_: rows)
        x = q.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            value = loss(x, k, z if queue else None)
        value.backward()
        return x.grad

    torch.testing.assert_close(grad(5), grad(99), rtol=1e-5, atol=1e-7)

"InfoNCE against an independent implementation on random inputs, and its gradients."
import math
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from ssl_patch.losses import info_nce

def unit(g, *shape): return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)

def reference(q, k, queue, tau):
    "Probability of the positive, one query at a time, in plain floats."
    out = []
    for i in range(len(q)):
        others = [k[j] for j in range(len(k)) if j != i] if queue is None else list(queue)
        pos = float(q[i] @ k[i])/tau
        rest = [float(q[i] @ z)/tau for z in others]
        top = max([pos] + rest)
        out.append(math.log(sum(math.exp(s-top) for s in [pos] + rest)) + top - pos)
    return sum(out)/len(out)

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 33), st.integers(0, 40), st.sampled_from([.05, .1, .2, 1.]), st.integers(0, 10**6))
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
    info_nce(q, k, z, .3).backward()
    for i in range(6):
        candidates = torch.cat([k[i:i+1], z]) if queue else k
        p = torch.softmax(candidates.detach() @ q[i].detach()/.3, 0)
        assert torch.allclose(q.grad[i], (p @ candidates.detach() - k[i].detach())/(6*.3))
    assert k.grad is None and (z is None or z.grad is None)

def test_identical_and_orthogonal_rows():
    same = F.normalize(torch.ones(8, 4, dtype=torch.float64), dim=1)
    assert info_nce(same, same, tau=.1).item() == pytest.approx(math.log(8))
    eye = torch.eye(8, dtype=torch.float64)
    assert info_nce(eye, eye, tau=.1).item() == pytest.approx(math.log(1 + 7*math.exp(-10)))

def test_half_precision_is_computed_in_full():
    g = torch.Generator().manual_seed(0)
    q, k = unit(g, 32, 16), unit(g, 32, 16)
    half = info_nce(q.bfloat16(), k.bfloat16(), tau=.05)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(info_nce(q.bfloat16().double(), k.bfloat16().double(), tau=.05).item(), abs=1e-4)

@pytest.mark.parametrize('args, word', [
    (dict(tau=0.), 'tau'), (dict(tau=float('nan')), 'tau'), (dict(k=torch.ones(4, 3)), 'width'), (dict(queue=torch.ones(5, 3)), 'queue'),
    (dict(q=torch.ones(1, 2), k=torch.ones(1, 2)), 'batch of one'), (dict(q=torch.ones(2)), r'\(B,d\)'), (dict(offset=1), 'offset'),
    (dict(q=torch.ones(2, 2), queue=torch.ones(3, 2)), 'one row per image')])
def test_bad_input(args, word):
    with pytest.raises(ValueError, match=word): info_nce(**(dict(q=torch.ones(4, 2), k=torch.ones(4, 2)) | args))

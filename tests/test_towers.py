"Queue and EMA against simulation by hand."
import pytest, torch
from torch import nn
from hypothesis import given, settings, strategies as st
from ssl_patch.towers import EMA, Queue, cosine_momentum, ema

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(1, 20), max_size=8))
def test_queue_is_a_ring(size, batches):
    q, ring, at, n = Queue(size, dim=1), None, 0, 0.
    ring = q.keys.flatten().tolist()
    for b in batches:
        keys = torch.arange(n, n+b)[:, None]; n += b
        for k in keys.flatten().tolist()[-size:]: ring[at] = k; at = (at+1) % size
        q.put(keys)
        assert q.keys.flatten().tolist() == ring
        again = Queue(size, dim=1, seed=1); again.load_state_dict(q.state_dict())
        assert again.next == at and torch.equal(again.keys, q.keys)

def test_queue_starts_with_unit_rows():
    assert torch.allclose(Queue(50, dim=7).keys.norm(dim=1), torch.ones(50))

def test_ema_by_hand():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    slow = ema(.9, 1.)(net)
    expected = {k: v.clone() for k, v in net.named_parameters()}
    for t in range(5):
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn_like(p))
        slow.update(net, t/4)
        m = cosine_momentum(t/4, .9, 1.)
        for k, v in net.named_parameters(): expected[k] = m*expected[k] + (1-m)*v
    for k, v in slow.net.named_parameters(): assert torch.allclose(v, expected[k], atol=1e-6)

@pytest.mark.parametrize('call', [lambda: ema(-.1), lambda: ema(.9, .5), lambda: ema(.9, when='now'), lambda: Queue(0), lambda: EMA(nn.Identity(), 2.)])
def test_bad_input(call):
    with pytest.raises(ValueError): call()

"The step of a method against the formulas, the slots against each other."
from functools import partial
import pytest, torch
import torch.nn.functional as F
from ssl_patch.encoders import resnet, vit
from ssl_patch.losses import co2, ressl, sce
from ssl_patch.methods import APS, Method, MoCoV3, build_method, diagnose, unit
from ssl_patch.patches import asymmetric
from ssl_patch.towers import Queue, ema
from ssl_patch.views import make_view, strong, weak

@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return vit(size=16, patch=4, width=32, depth=2, heads=2)

def batch(method, n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 20, 20), generator=g, dtype=torch.uint8)
    views = [make_view(x, r, g) for r in method.views]
    return views, method.samples(views, g)

def nce(p, z, tau): # rows of p against rows of z
    s = F.normalize(p, dim=1) @ F.normalize(z, dim=1).T / tau
    return (s.logsumexp(1) - s.diagonal()).mean()

def test_aps_is_its_formula(encoder):
    m = APS(encoder, hidden=32, out=16)
    views, samples = batch(m)
    assert len(samples) == 4
    for keeps in samples:
        (_, z1), (_, z2) = (m.trunk(v.x, k) for v, k in zip(views, keeps))
        assert torch.allclose(m(views, keeps)[0], nce(m.predictor(z1), z2, .1) + nce(m.predictor(z2), z1, .1), atol=1e-5)

def test_aps_targets_get_no_gradient(encoder):
    "Without the predictor's path there is no gradient: the projections of the other view are constants."
    m = APS(encoder, hidden=32, out=16)
    views, samples = batch(m)
    for p in m.predictor.parameters(): torch.nn.init.zeros_(p) # constant queries, before their batch-norm
    loss, _ = m(views, samples[0]); loss.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in m.trunk.parameters())

def test_views_have_statistics_of_their_own(encoder):
    "Each view goes through the heads alone: the other view of the batch does not move its batch-norm output."
    m = APS(encoder, hidden=32, out=16)
    (v1, v2), samples = batch(m)
    q, _ = m.embed([v1, v2], samples[0], 0.)
    q_, _ = m.embed([v1, v1], samples[0], 0.)
    assert torch.equal(q[0], q_[0]) and not torch.equal(q[1], q_[1])

@pytest.mark.parametrize('net', ['vit', 'resnet'])
def test_moco_v3_is_its_formula(encoder, net):
    e = vit(size=16, patch=4, width=32, depth=1, heads=2, style='moco_v3') if net == 'vit' else resnet('resnet18', 16)
    m = MoCoV3(e, hidden=32, out=16); tau = .2 if net == 'vit' else 1.
    views, samples = batch(m)
    assert samples == [[None, None]]
    loss = m(views)[0]; loss.backward()
    (_, z1), (_, z2) = (m.trunk(v.x) for v in views); (_, k1), (_, k2) = (m.target(v.x) for v in views)
    expected = 2*tau*(nce(m.predictor(z1), k2, tau) + nce(m.predictor(z2), k1, tau))
    assert torch.allclose(loss, expected, atol=1e-4)
    trained = {n for n, p in m.named_parameters() if p.grad is not None}
    assert not any(n.startswith('target') for n in trained)
    assert ('trunk.encoder.net.patch_embed.proj.weight' not in trained) and any(n.startswith('predictor') for n in trained)

def test_ema_before_or_after(encoder):
    for when in ('before', 'after'):
        m = Method(encoder, (weak(16), weak(16)), target=ema(.5, when=when))
        start = m.target.net.projector[0].weight.clone()
        with torch.no_grad(): m.trunk.projector[0].weight.add_(1.)
        views, _ = batch(m)
        m(views); during = m.target.net.projector[0].weight.clone()
        m.after_step(); after = m.target.net.projector[0].weight
        assert torch.allclose(during, start + (.5 if when == 'before' else 0.)) and torch.allclose(after, start + .5)

def test_evaluating_moves_nothing(encoder):
    m = MoCoV3(encoder, hidden=32, out=16).eval()
    with torch.no_grad(): m.trunk.projector[0].weight.add_(1.)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    m(batch(m)[0])
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())

def test_queue_never_holds_the_positive(encoder):
    m = Method(encoder, (strong(16), weak(16)), candidates=Queue(12), pairs=((0, 1),))
    seen = []
    m.objective = lambda q, k, queue: seen.append((k, queue.clone())) or (q*0).sum()
    for s in range(4):
        m(batch(m, seed=s)[0]); m.after_step()
    for k, queue in seen: assert (k @ queue.T).max() < .9999
    assert torch.equal(seen[3][1][:4], seen[1][0][4:]) and torch.equal(seen[3][1][4:], seen[2][0]) # a ring of 12, written 8 at a time

def test_a_target_of_ones_own(encoder):
    "What a newcomer writes: a softened one-hot target, on sparse patches, against an EMA tower."
    def smooth_nce(q, k, queue, tau=.2, eps=.1):
        return F.cross_entropy(q @ k.T/tau, torch.arange(len(q)), label_smoothing=eps)
    m = Method(encoder, (strong(16), weak(16)), patches=asymmetric(power=3), target=ema(.99), objective=partial(smooth_nce, eps=.2))
    views, samples = batch(m)
    opt, first = torch.optim.SGD(m.parameters(), .5), None
    for _ in range(10):
        loss, log = m(views, samples[0]); opt.zero_grad(); loss.backward(); opt.step(); m.after_step()
        first = first or loss.item()
    assert loss.item() < first and m.slots()['objective'] == 'smooth_nce(eps=0.2)'

def test_diagnose():
    z = unit(torch.randn(64, 8)); s = z @ z.T
    d = diagnose(z, z)
    assert d['pos'].item() == pytest.approx(1) and d['neg'].item() == pytest.approx(((s.sum()-64)/(64*63)).item(), abs=1e-5)

def test_chance(encoder):
    import math
    assert APS(encoder).chance(512) == pytest.approx(2*math.log(512))
    assert MoCoV3(encoder, tau=.5, hidden=8, out=8).chance(512) == pytest.approx(2*math.log(512))
    assert Method(encoder, (weak(16),)*2, candidates=Queue(99), pairs=((0, 1),)).chance(512) == pytest.approx(math.log(100))
    for objective, n in ((sce, 100), (co2, 100), (partial(sce, in_batch=True), 99+512), (ressl, 99)):
        m = Method(encoder, (weak(16),)*2, candidates=Queue(99), pairs=((0, 1),), objective=objective)
        same = F.normalize(torch.ones(512, 4), dim=1)
        assert m.chance(512) == pytest.approx(math.log(n)) == pytest.approx(objective(same, same, same[:99]).item(), abs=1e-4)
    assert Method(encoder, (weak(16),)*2, objective=lambda q, k, z: q.sum()).chance(512) is None

@pytest.mark.parametrize('call, word', [
    (lambda e: APS(e, ratio=0.), 'ratio'), (lambda e: APS(e, ratio=1.5, draws=1), 'ratio'), (lambda e: APS(e, ratio=.5), 'draws'), (lambda e: APS(e, power=-1), 'power'),
    (lambda e: APS(resnet('resnet18', 16)), 'a ViT can'), (lambda e: Method(e, (weak(32), weak(32))), '32 pixels'),
    (lambda e: Method(e, (weak(16), weak(16)), pairs=()), 'pairs'), (lambda e: Method(e, (weak(16),)*3, patches=asymmetric()), 'two views'),
    (lambda e: build_method('byol', e), 'byol'), (lambda e: build_method('aps', e, rate=1), 'rate'), (lambda e: MoCoV3(e, momentum=2.), 'momentum')])
def test_bad_input(encoder, call, word):
    with pytest.raises(ValueError, match=word): call(encoder)

"The step of a method against the formulas, the slots against each other."
from functools import partial
import pytest, torch
import torch.nn.functional as F
from ssl_patch.encoders import resnet, vit
from ssl_patch.losses import co2, info_nce, ressl, sce
from ssl_patch.methods import (APS, CO2, SCE, Method, MoCoV1, MoCoV2, MoCoV3, ReSSL, all_pairs, build_method, diagnose, moco_v1_settings,
                               moco_v2_settings, ressl_settings, sce_settings, unit)
from ssl_patch.patches import asymmetric
from ssl_patch.towers import Queue, SplitBatchNorm, ema
from ssl_patch.views import make_view, multi_crop, strong, weak

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
        z1, z2 = (m.trunk(v.x, k).image for v, k in zip(views, keeps))
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
    assert torch.equal(q[0].image, q_[0].image) and not torch.equal(q[1].image, q_[1].image)

@pytest.mark.parametrize('net', ['vit', 'resnet'])
def test_moco_v3_is_its_formula(encoder, net):
    e = vit(size=16, patch=4, width=32, depth=1, heads=2, style='moco_v3') if net == 'vit' else resnet('resnet18', 16)
    m = MoCoV3(e, hidden=32, out=16); tau = .2 if net == 'vit' else 1.
    views, samples = batch(m)
    assert samples == [[None, None]]
    loss = m(views)[0]; loss.backward()
    z1, z2 = (m.trunk(v.x).image for v in views); k1, k2 = (m.target(v.x).image for v in views)
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

SOFT = dict(moco_v1=MoCoV1, moco_v2=MoCoV2, ressl=ReSSL, co2=CO2, sce=SCE)
small = lambda size=16: resnet('resnet18', size, width=8)

def seeded(method, views, seed=1):
    "Loss, queries and keys with one shuffle of the keys."
    queue = method.queue.keys.clone()
    torch.manual_seed(seed); loss = method(views)[0]
    torch.manual_seed(seed); asked, answers = method.embed(views, [None]*len(views), 0.)
    return loss, {v: e.image for v, e in asked.items()}, {v: e.image for v, e in answers.items()}, queue

def plain_rows(q, k, queue): # scores of one row after the other, positive first
    return [torch.cat([(q[i] @ k[i])[None], queue @ q[i]]) for i in range(len(q))], [queue @ k[i] for i in range(len(q))]

def plain_loss(name, q, k, queue, tau=.1, tau_con=.05, alpha=.3, tau_m=.05, lam=.5):
    "One loss after the other, a row at a time, from the papers' formulas."
    total = 0.
    for s, r in zip(*plain_rows(q, k, queue)):
        nce = s.div(tau).logsumexp(0) - s[0]/tau
        if name.startswith('moco'): total += nce
        if name == 'co2':
            P, Q = (r/tau_con).softmax(0), (s[1:]/tau_con).softmax(0)
            total += nce + alpha*((P*(P/Q).log()).sum() + (Q*(Q/P).log()).sum())/2
        if name == 'ressl': total -= ((r/.04).softmax(0) * (s[1:]/.1).log_softmax(0)).sum()
        if name == 'sce': total += lam*nce - (1-lam)*((r/tau_m).softmax(0) * (s/tau).log_softmax(0)[1:]).sum()
    return total/len(q)

@pytest.mark.parametrize('name', SOFT)
def test_soft_methods_are_their_formulas(name):
    torch.manual_seed(0)
    m = SOFT[name](small(), candidates=Queue(40)).eval() # eval: batch-norm and EMA stand still
    loss, q, k, queue = seeded(m, batch(m)[0])
    tau = .07 if name == 'moco_v1' else .1
    assert loss.item() == pytest.approx(plain_loss(name, q[0], k[1], queue, tau=tau).item(), abs=1e-4)

@pytest.mark.parametrize('name', SOFT)
@pytest.mark.parametrize('net', ['resnet', 'vit'])
def test_soft_methods_train(name, net):
    "Gradient reaches the online tower and nothing else; the queue takes each step's keys; the target follows; the loss falls."
    torch.manual_seed(0)
    e = small() if net == 'resnet' else vit(size=16, patch=4, width=32, depth=2, heads=2)
    m = SOFT[name](e, candidates=Queue(40))
    views, opt = batch(m, 16)[0], torch.optim.SGD(m.parameters(), .1)
    target, losses = [p.clone() for p in m.target.parameters()], []
    for step in range(8):
        queue = m.queue.keys.clone()
        loss, log = m(views); opt.zero_grad(); loss.backward(); opt.step()
        assert torch.equal(m.queue.keys, queue)
        m.after_step(); losses.append(loss.item())
        assert torch.equal(m.queue.keys[torch.arange(16*step, 16*step+16) % 40], m.fresh[0]) and m.queue.next == 16*(step+1) % 40
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in m.trunk.named_parameters() if p.requires_grad and 'pos_embed' not in n)
    assert all(p.grad is None for p in m.target.parameters())
    assert any((a-b).abs().max() > 0 for a, b in zip(target, m.target.parameters()))
    assert not m.queue.keys.requires_grad and torch.isfinite(torch.tensor(losses)).all()

def test_who_splits_its_batch_norm_and_who_moves_when():
    groups = lambda net: {m.groups if isinstance(m, SplitBatchNorm) else 1 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    for name, (online, target, when) in dict(moco_v1=(8, 8, 'before'), moco_v2=(8, 8, 'before'), ressl=(8, 8, 'before'), co2=(8, 8, 'before'), sce=(1, 8, 'after')).items():
        m = SOFT[name](small())
        assert (groups(m.trunk), groups(m.target), m.target.when, m.target.shuffle) == ({online}, {target}, when, True)
    m = SCE(small(), 'imagenet')
    assert (groups(m.trunk), groups(m.target), m.target.shuffle, m.target.end) == ({1}, {1}, False, 1.)

@pytest.mark.parametrize('settings, make', [(moco_v1_settings, MoCoV1), (moco_v2_settings, MoCoV2), (ressl_settings, ReSSL), (sce_settings, SCE),
                                            (moco_v1_settings, lambda e, d: CO2(e, 'moco_v1', d)), (moco_v2_settings, lambda e, d: CO2(e, 'moco_v2', d))])
def test_every_setting_builds_and_steps(settings, make):
    assert sorted(settings) == ['cifar', 'imagenet', 'stl10', 'tiny_imagenet']
    for data, s in settings.items():
        m = make(small(), data)
        assert m.queue.most == s.queue and m.training_recipe == s.training and s.source
        m.fit_to(1000, 16)
        loss, _ = m(batch(m)[0]); loss.backward(); m.after_step()
        assert torch.isfinite(loss) and m.queue.size == 128

def test_published_numbers():
    "The rows of the papers' tables that a slip would change unnoticed."
    t = sce_settings['cifar'].training
    assert (t.optimizer, t.base_lr, t.weight_decay, t.batch_size, t.epochs, t.warmup, t.decay_all) == ('sgd', .06, 5e-4, 256, 200, 5, True)
    m = SCE(resnet('resnet18', 32))
    assert [(l.in_features, l.out_features, l.bias is not None) for l in m.trunk.projector if isinstance(l, torch.nn.Linear)] == [(512, 512, False), (512, 128, True)]
    assert (m.target.start, m.target.end, m.queue.most, [v.name for v in m.views]) == (.99, .99, 4096, ['strong', 'weak'])
    assert m.objective.keywords == dict(lam=.5, tau=.1, tau_m=.05)
    t = MoCoV2(resnet('resnet18', 32)).training_recipe
    assert t.base_lr*t.batch_size/256 == pytest.approx(.06) and t.batch_size == 512 and t.schedule == 'epoch' and t.warmup == 0
    m = SCE(resnet('resnet50', 224))
    assert [l.out_features for l in m.trunk.projector if isinstance(l, torch.nn.Linear)] == [4096, 4096, 256] and m.training_recipe.base_lr == .3
    assert m.objective.keywords['tau_m'] == .07 and [v.name for v in m.views] == ['alpha', 'beta'] and m.weight == .5 and m.target.end == 1.
    assert not m.trunk.projector[-1].affine and isinstance(m.predictor[-1], torch.nn.Linear)
    m = ReSSL(resnet('resnet50', 224))
    assert [l.out_features for l in m.trunk.projector if isinstance(l, torch.nn.Linear)] == [4096, 512] and m.queue.most == 131072 and not m.training_recipe.decay_all
    assert CO2(small(), 'moco_v1', 'imagenet').objective.keywords == dict(tau=.07, tau_con=.04, alpha=10.)
    assert CO2(small(), setting='imagenet').objective.keywords == dict(tau=.2, tau_con=.05, alpha=.3)

def test_symmetric_moco_sums_two_losses():
    torch.manual_seed(0)
    m = MoCoV2(small(), symmetric=True, candidates=Queue(40)).eval()
    loss, q, k, queue = seeded(m, batch(m)[0])
    assert loss.item() == pytest.approx((info_nce(q[0], k[1], queue, .1) + info_nce(q[1], k[0], queue, .1)).item(), abs=1e-4)
    m.train(); m(batch(m)[0]); m.after_step()
    assert m.queue.next == 16 # both views' keys enter

@pytest.mark.parametrize('net', ['resnet', 'vit'])
def test_multi_crop_has_ten_terms(net):
    torch.manual_seed(0)
    e = small(32) if net == 'resnet' else vit(size=32, patch=4, width=32, depth=1, heads=2)
    m = SCE(e, crops=True, hidden=32, out=16, candidates=Queue(40)).eval()
    sizes = [v.size for v in m.views]
    assert sizes == [r.size for r in multi_crop(32, 1 if net == 'resnet' else 4)] and len(set(sizes)) > 2 and len(m.pairs) == 10
    loss, q, k, queue = seeded(m, batch(m)[0])
    assert sorted(q) == list(range(6)) and sorted(k) == [0, 1]
    terms = [plain_loss('sce', q[v], k[g], queue) for g in (0, 1) for v in range(6) if v != g]
    assert loss.item() == pytest.approx((sum(terms)/10).item(), abs=1e-4)
    m.train(); m(batch(m)[0])[0].backward(); m.after_step()
    assert m.queue.next == 16 # the keys of the two large views

def test_a_shorter_list_of_pairs():
    assert all_pairs(1, 3) == ((1, 0), (2, 0)) and len(all_pairs(2, 6)) == 10

@pytest.mark.parametrize('make', [lambda e: APS(e, objective=partial(sce, lam=.5, tau_m=.05)), lambda e: APS(e, objective=co2, candidates=Queue(40)),
                                  lambda e: ReSSL(e, patches=asymmetric(power=3)), lambda e: SCE(e, patches=asymmetric(power=3)),
                                  lambda e: MoCoV3(e, objective=partial(sce, tau=.2), hidden=32, out=16)])
def test_soft_targets_compose_with_sparse_patches(encoder, make):
    m = make(encoder)
    views, samples = batch(m)
    opt = torch.optim.SGD(m.parameters(), .05)
    for keeps in samples:
        loss, log = m(views, keeps); opt.zero_grad(); loss.backward(); opt.step(); m.after_step()
        assert torch.isfinite(loss) and m.encoder.net.blocks[0].attn.qkv.weight.grad.abs().sum() > 0

def test_looking_notes_features_and_entropy():
    for name, make in SOFT.items():
        m = make(small(), candidates=Queue(40)); m.looking = True; m(batch(m)[0])
        H = m.seen['entropy'].item()
        assert m.seen['features'].shape == (8, 64) and not m.seen['features'].requires_grad
        assert H == 0 if name.startswith('moco') else 0 < H < torch.tensor(41.).log()

def test_an_objective_is_computed_in_float32_under_autocast():
    "A newcomer writes `q @ queue.T`: no half precision, no wrong dtype."
    seen = []
    def mine(q, k, queue): s = q @ queue.T; seen.append(s.dtype); return torch.cat([(q*k).sum(1, keepdim=True), s], 1).logsumexp(1).mean()
    mine.target = lambda k, queue: torch.zeros(len(k), 1+len(queue)).scatter(1, 1+(k @ queue.T).topk(3).indices, 1/3)
    m = Method(small(), (strong(16), weak(16)), pairs=((0, 1),), target=ema(.9), candidates=40, objective=mine); m.looking = True
    with torch.autocast('cpu', torch.bfloat16): loss, _ = m(batch(m)[0])
    loss.backward()
    assert seen == [torch.float32] and loss.dtype == torch.float32 and m.seen['entropy'].item() == pytest.approx(torch.tensor(3.).log().item(), abs=1e-5)

def test_a_target_that_fails_costs_a_number_not_the_run():
    def mine(q, k, queue, n=3): return (q*k).sum(1).mean()
    mine.target = lambda k, queue: torch.ones(3)/3
    m = Method(small(), (strong(16), weak(16)), pairs=((0, 1),), candidates=40, objective=partial(mine, n=4)); m.looking = True
    with pytest.warns(UserWarning, match='entropy is not logged'): m(batch(m)[0])[0].backward()
    assert 'entropy' not in m.seen and 'features' in m.seen

def test_candidates_in_words():
    words = lambda m: m.slots()['candidates']
    assert words(SCE(small(), candidates=40)) == 'positive + queue of 40' and words(ReSSL(small(), candidates=40)) == 'queue of 40'
    assert words(SCE(small(), objective=partial(sce, in_batch=True), candidates=40)) == 'keys of the batch + queue of 40'
    assert words(SCE(small())) == 'positive + queue fitted to the data, at most 4096' and words(APS(vit(size=16, patch=4, width=32, depth=1, heads=2))) == 'keys of the batch'

def test_a_target_attribute_is_asked():
    "An objective of one's own has an entropy as soon as it says what its target is."
    def mine(q, k, queue, n=3): return (q*k).sum(1).mean()
    m = Method(small(), (strong(16), weak(16)), pairs=((0, 1),), candidates=Queue(40), objective=partial(mine, n=4)); m.looking = True
    m(batch(m)[0]); assert 'entropy' not in m.seen
    mine.target = lambda k, queue, n=3: torch.full((len(k), n), 1/n)
    m(batch(m)[0]); assert m.seen['entropy'].item() == pytest.approx(torch.tensor(4.).log().item(), abs=1e-6)

@pytest.mark.parametrize('call, word', [
    (lambda e: APS(e, ratio=0.), 'ratio'), (lambda e: APS(e, ratio=1.5, draws=1), 'ratio'), (lambda e: APS(e, ratio=.5), 'draws'), (lambda e: APS(e, power=-1), 'power'),
    (lambda e: APS(resnet('resnet18', 16)), 'a ViT can'), (lambda e: Method(e, (weak(32), weak(32))), '32 pixels'),
    (lambda e: Method(e, (weak(16), weak(16)), pairs=()), 'pairs'), (lambda e: Method(e, (weak(16),)*3, patches=asymmetric()), 'two views'),
    (lambda e: build_method('byol', e), 'byol'), (lambda e: build_method('aps', e, rate=1), 'rate'), (lambda e: MoCoV3(e, momentum=2.), 'momentum'),
    (lambda e: SCE(e, 'mnist'), 'mnist'), (lambda e: CO2(e, 'simclr'), 'simclr'), (lambda e: build_method('sce', e, lamda=1), 'lamda'),
    (lambda e: MoCoV2(e, candidates=Queue(4))(batch(MoCoV2(e))[0]), 'queue of 4 cannot hold the 8 keys'), (lambda e: MoCoV2(e, candidates=Queue(4)).fit_to(1000, 8), 'queue of 4'),
    (lambda e: MoCoV2(small()).fit_to(1000, 12), 'multiple of 8'), (lambda e: Method(e, (weak(16), weak(20)), pairs=((1, 0),)), '20 pixels'),
    (lambda e: Method(e, (weak(16), weak(10)), pairs=((1, 0),)), 'patches of 4'), (lambda e: Method(e, (weak(16), weak(8))), '8 pixels'),
    (lambda e: SCE(e, lam=1.5), 'lam'), (lambda e: SCE(e, tau=0.), 'tau'), (lambda e: ReSSL(e, tau_t=-1.), 'tau_t'), (lambda e: CO2(e, alpha=-1.), 'alpha'),
    (lambda e: Method(e, (weak, weak)), 'such as strong'), (lambda e: Method(e, (weak(16),)*2, target=.99), 'target must be ema'), (lambda e: Method(e, (weak(16),)*2, target=ema), 'target must be ema'),
    (lambda e: Method(e, (weak(16),)*2, candidates='long'), 'candidates must be'), (lambda e: Method(torch.nn.Identity(), (weak(16),)*2), 'encoder must be'),
    (lambda e: Method(e, (weak(16),)*2, objective=None), 'objective must be'), (lambda e: MoCoV3(e, tau=0), 'tau'), (lambda e: MoCoV2(small()).fit_to(1000, 8), 'at least 16'),
    (lambda e: build_method('sce', e, tau_t=.1), 'there are setting, lam, tau, tau_m')])
def test_bad_input(encoder, call, word):
    with pytest.raises(ValueError, match=word): call(encoder)

"The patch family: methods against slow loops over the formulas, which tensors learn, what composes, what is refused."
import math
from functools import partial
import pytest, torch
from ssl_patch.data import images
from ssl_patch.encoders import Features, pool_cells, resnet, vit
from ssl_patch.losses import info_nce
from ssl_patch.methods import (APS, CO2, SCE, DenseCL, LocalToGlobal, MoCoV1, MoCoV2, MoCoV3, ReSSL, RepCo, aps_settings, build_method,
                               densecl_settings, local_to_global_settings, unit)
from ssl_patch.patches import asymmetric, repco_pairs
from ssl_patch.terms import Dense, Term, global_term, match_term, repco_term
from ssl_patch.towers import Queue
from ssl_patch.training import Pretrainer
from ssl_patch.views import make_view

def net(kind, size=16):
    torch.manual_seed(0)
    return vit(size=size, patch=4, width=32, depth=2, heads=2) if kind == 'vit' else resnet('resnet18', size, width=8, cells='layer3')

def batch(method, n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 20, 20), generator=g, dtype=torch.uint8)
    views = [make_view(x, r, g) for r in method.views]
    return views, method.samples(views, g)

def towers(m, views, seed=1):
    "Loss and log, and what both towers say of every view, in one random order of the keys."
    m.eval() # batch-norm and EMA stand still, keys are not shuffled
    return m(views, progress=.5), [m.trunk(v.x) for v in views], [(m.target or m.trunk)(v.x) for v in views]

def slow_nce(positive, negatives, tau): # one row
    s = torch.stack([positive, *negatives])/tau
    return s.logsumexp(0) - s[0]

@pytest.mark.parametrize('kind', ['vit', 'resnet'])
def test_densecl_is_its_formula(kind):
    m = DenseCL(net(kind, 32), candidates=Queue(12), lam=.3); m.patch_queue.fit_to(100, 8)
    views = batch(m)[0]
    (loss, log), e, t = towers(m, views)
    q, k, r, u, K2 = unit(e[0].image), unit(t[1].image), unit(e[0].patches), unit(t[1].patches), m.patch_queue.keys
    L_g = torch.stack([slow_nce(q[b] @ k[b], m.queue.keys @ q[b], .1) for b in range(8)]).mean()
    dense = []
    for b in range(8):
        Fq, Fk = unit(e[0].features.patches[b]), unit(t[1].features.patches[b])
        for i in range(r.shape[1]):
            c = max(range(len(Fk)), key=lambda j: round((Fq[i] @ Fk[j]).item(), 6))
            dense.append(slow_nce(r[b, i] @ u[b, c], K2 @ r[b, i], .1))
    L_d = torch.stack(dense).mean()
    assert loss.item() == pytest.approx((.7*L_g + .3*L_d).item(), abs=1e-4)
    assert log['image'].item() == pytest.approx(L_g.item(), abs=1e-4) and log['patch'].item() == pytest.approx(L_d.item(), abs=1e-4)
    assert torch.allclose(m.fresh[-1], unit(t[1].patches.mean(1)), atol=1e-5) # the mean of projections that are not normalised

@pytest.mark.parametrize('kind', ['vit', 'resnet'])
def test_local_to_global_is_its_formula(kind):
    m = LocalToGlobal(net(kind), hidden=32, out=16, reverse=.5, image=.25)
    views = batch(m)[0]
    (loss, log), e, t = towers(m, views)
    from ssl_patch.towers import each_patch
    g, l = [unit(m.predictor(x.image)) for x in e], [unit(each_patch(m.patch_predictor, x.patches)) for x in e]
    g_, l_ = [unit(x.image) for x in t], [unit(x.patches) for x in t]
    def G(a, local): return torch.stack([slow_nce(a[b] @ local[b, i], torch.cat([local[c] @ a[b] for c in range(8) if c != b]), .2)
                                         for b in range(8) for i in range(local.shape[1])]).mean()
    def R(local, a): return torch.stack([slow_nce(local[b, i] @ a[b], [local[b, i] @ a[c] for c in range(8) if c != b], .2)
                                         for b in range(8) for i in range(local.shape[1])]).mean()
    both = ((0, 1), (1, 0))
    patch = sum(.5*G(g_[w], l[v]) + .5*G(g[w], l_[v]) + .5*R(l[v], g_[w]) for v, w in both)/2
    moco_v3 = 2*.2*sum(info_nce(g[v], g_[w], tau=.2) for v, w in both)
    assert loss.item() == pytest.approx((patch + .25*moco_v3).item(), abs=1e-3) and log['patch'].item() == pytest.approx(patch.item(), abs=1e-3)

@pytest.mark.parametrize('kind', ['vit', 'resnet'])
@pytest.mark.parametrize('source', ['target', 'online'])
def test_repco_is_its_formula(kind, source):
    m = RepCo(net(kind, 32), candidates=Queue(12), lam=.25, beta=2., source=source); m.patch_queue.fit_to(100, 8)
    views = batch(m)[0]
    (loss, log), e, t = towers(m, views)
    partner = t[0] if source == 'target' else e[0]
    r, u, K2 = unit(e[0].patches), unit(partner.patches), m.patch_queue.keys
    p = repco_pairs(partner.features.patches, partner.features.grid)
    plus, minus = [], []
    for b in range(8):
        for i in range(r.shape[1]):
            if p.pos_ok[b, i]: plus.append(slow_nce(r[b, i] @ u[b, p.pos[b, i]], K2 @ r[b, i], .2))
            gaps = [(r[b, i] @ u[b, j] - r[b, i] @ u[b, i])/.2 for j, ok in zip(p.neg[b, i], p.neg_ok[b, i]) if ok]
            if gaps: minus.append(torch.log(1 + torch.stack(gaps).exp().sum()))
    expected = torch.stack(plus).mean() + 2*torch.stack(minus).mean()
    assert log['patch'].item() == pytest.approx(expected.item(), abs=1e-4)
    assert loss.item() == pytest.approx((.75*log['image'] + .25*expected).item(), abs=1e-4)

def test_repco_from_the_other_crop_respects_boxes_and_flips():
    "The same crop twice, mirrored once: partners looked up in the other crop are those of the mirror image."
    m = RepCo(net('vit', 32), candidates=Queue(12), source='other').eval()
    views = batch(m)[0]
    a = views[0]
    mirrored = type(a)(a.x.flip(3), a.box, ~a.flip)
    t = m.target(mirrored.x)
    e = m.trunk(a.x)
    rows, cols = t.features.grid
    back = torch.arange(rows*cols).view(rows, cols).flip(1).flatten() # where a cell of view a is in its mirror image
    p = repco_pairs(t.features.patches, t.features.grid)
    r, u = unit(e.patches), unit(t.patches)
    plus = [slow_nce(r[b, i] @ u[b, p.pos[b, back[i]]], m.patch_queue.keys @ r[b, i], .2) for b in range(8) for i in range(rows*cols) if p.pos_ok[b, back[i]]]
    assert m.dense.terms[0].beta == 1. and m.need['target'] == {1}
    (_, log), no_minus = m([a, mirrored], progress=.5), RepCo(net('vit', 32), candidates=Queue(12), source='other', beta=0.).eval()
    no_minus.load_state_dict(m.state_dict())
    assert no_minus([a, mirrored], progress=.5)[1]['patch'].item() == pytest.approx(torch.stack(plus).mean().item(), abs=1e-4)
    assert log['patch'] > no_minus([a, mirrored], progress=.5)[1]['patch']

TERMS = dict(match=match_term(), repco=repco_term(), l2g=global_term(tokens=4), all=(match_term(), repco_term(), global_term()))
HOSTS = dict(moco_v1=MoCoV1, moco_v2=MoCoV2, moco_v3=partial(MoCoV3, hidden=32, out=16), ressl=ReSSL, co2=CO2, sce=SCE,
             sce_symmetric=partial(SCE, symmetric=True, hidden=32, out=16), aps_all=partial(APS, patches=None, hidden=32, out=16))

@pytest.mark.parametrize('kind', ['vit', 'resnet'])
@pytest.mark.parametrize('term', TERMS)
@pytest.mark.parametrize('host', HOSTS)
def test_every_term_on_every_host(host, term, kind):
    "A few steps: every part of the online tower that the terms use learns, the target gets no gradient, both queues fill, the sum is the loss."
    m = HOSTS[host](net(kind), dense=Dense(TERMS[term], candidates=None if term == 'l2g' else 40))
    if m.queue: m.queue.fit_to(400, 16)
    opt, parts = torch.optim.SGD(m.parameters(), .02), {}
    for step in range(2):
        loss, log = m(batch(m, 16, step)[0], progress=.5); opt.zero_grad(); loss.backward()
        for n, p in m.named_parameters(): parts[n] = parts.get(n, 0.) + (0. if p.grad is None else p.grad.abs().sum().item())
        assert torch.isfinite(loss) and loss.item() == pytest.approx((m.weight*len(m.pairs)*(.5*log['image'] + .5*log['patch'])).item(), rel=1e-4)
        opt.step(); m.after_step()
    frozen = {n for n, p in m.named_parameters() if not p.requires_grad}
    assert all((g > 0) == (n not in frozen) for n, g in parts.items() if not n.endswith('pos_embed')), [n for n, g in parts.items() if (g > 0) != (n not in frozen)]
    assert all(n.startswith('target') for n in frozen)
    if m.patch_queue: assert m.patch_queue.next == 2*len(m.fresh[-1]) % 40 and torch.equal(m.patch_queue.keys[:len(m.fresh[-1])].norm(dim=1).round(decimals=4), torch.ones(len(m.fresh[-1])))

@pytest.mark.parametrize('terms', [match_term(), global_term(), global_term(online='both'), (match_term(), global_term(reverse=1.))])
@pytest.mark.parametrize('host', [*HOSTS, 'aps', 'aps_ema'])
def test_terms_on_sparse_tokens(host, terms):
    "APS tokens: terms that need no grid work on the patches that were kept."
    make = dict(aps=APS, aps_ema=partial(APS, momentum=.99)).get(host) or partial(HOSTS[host], patches=asymmetric())
    m = make(net('vit', 32), dense=Dense(terms, .5))
    if m.queue: m.queue.fit_to(400, 16)
    views, samples = batch(m)
    assert len(samples) == 4
    loss, log = m(views, samples[0], .5); loss.backward()
    assert torch.isfinite(loss) and m.trunk.patch_projector[0].weight.grad.abs().sum() > 0
    assert m.trunk(views[0].x, samples[0][0]).patches.shape[1] == 16
    with pytest.raises(ValueError, match='repco_term needs the whole grid'): make(net('vit', 32), dense=repco_term())

def test_multi_crop_takes_a_patch_term():
    m = SCE(net('resnet', 32), crops=True, hidden=32, out=16, candidates=Queue(40), dense=match_term())
    loss, log = m(batch(m)[0]); loss.backward()
    assert torch.isfinite(loss) and m.trunk.patch_projector[0].weight.grad.abs().sum() > 0 and len(m.pairs) == 10

@pytest.mark.parametrize('online, learns', [('each', (True, True)), ('local', (False, True)), ('anchor', (True, False)), ('both', (True, True))])
def test_which_side_of_local_to_global_learns(online, learns):
    m = LocalToGlobal(net('vit'), online=online, hidden=32, out=16)
    loss, _ = m(batch(m)[0]); loss.backward()
    heads = m.predictor[0].weight.grad, m.patch_predictor[0].weight.grad
    assert tuple(g is not None and g.abs().sum().item() > 0 for g in heads) == learns
    assert (m.target is None) == (online == 'both')

def test_warm_up_is_the_host_alone():
    m = RepCo(net('resnet'), candidates=Queue(40), warmup=.1); m.patch_queue.fit_to(100, 8)
    host = MoCoV2(net('resnet'), candidates=Queue(40)); host.trunk.projector.load_state_dict(m.trunk.projector.state_dict()); host.target.net.load_state_dict(
        {k: v for k, v in m.target.net.state_dict().items() if not k.startswith('patch_projector')})
    views = batch(m)[0]
    m.eval(), host.eval()
    m(views, progress=.05)[0].backward()
    assert all(p.grad is None for p in m.trunk.patch_projector.parameters())
    assert m(views, progress=.05)[0].item() == pytest.approx(host(views)[0].item(), abs=1e-5)
    assert abs(m(views, progress=.2)[0].item() - host(views)[0].item()) > 1e-3

@pytest.mark.parametrize('make', [partial(RepCo, host='moco_v2'), partial(RepCo, host='densecl'), partial(RepCo, host='moco_v3', hidden=32, out=16),
                                  partial(RepCo, gap=.1), partial(RepCo, joint=True), partial(RepCo, positives=3), partial(RepCo, source='other', joint=True, positives=2),
                                  partial(RepCo, host='moco_v3', hidden=32, out=16, source='other'), partial(DenseCL, symmetric=True), partial(DenseCL, pool=2)])
@pytest.mark.parametrize('kind', ['vit', 'resnet'])
def test_every_reading_trains(make, kind):
    e = net(kind, 32)
    m = make(e)
    m.fit_to(400, 16)
    opt, losses = torch.optim.SGD(m.parameters(), .05), []
    views = batch(m, 16)[0]
    for _ in range(3): loss, _ = m(views, progress=.5); opt.zero_grad(); loss.backward(); opt.step(); m.after_step(.5); losses.append(loss.item())
    assert all(math.isfinite(l) for l in losses) and m.trunk.patch_projector[0].weight.grad.abs().sum() > 0

def test_chance():
    same = dict(moco=MoCoV2(net('vit'), candidates=40, dense=Dense(match_term(), .25, candidates=20)), l2g=LocalToGlobal(net('vit'), hidden=32, out=16, tokens=4),
                all_tokens=LocalToGlobal(net('vit'), hidden=32, out=16, image=1., reverse=1.))
    assert same['moco'].chance(8) == pytest.approx(.75*math.log(41) + .25*math.log(21))
    assert same['l2g'].chance(8) == pytest.approx(math.log(1+7*4))
    assert same['all_tokens'].chance(8) == pytest.approx(math.log(1+7*16) + math.log(8) + 2*.2*2*math.log(8))
    assert RepCo(net('vit')).chance(8) is None
    aps = APS(net('vit', 32), dense=Dense(global_term(), 1., beside=1.)) # 16 of 64 patches are kept
    assert aps.chance(8) == pytest.approx(2*(math.log(8) + math.log(1+7*16)))

def test_pooled_cells():
    f = Features(torch.zeros(2, 3), torch.arange(2*6*8*3.).view(2, 48, 3), (6, 8))
    p = pool_cells(f, 2)
    slow = torch.stack([torch.stack([f.patches[b].view(6, 8, 3)[2*i:2*i+2, 2*j:2*j+2].mean((0, 1)) for i in range(3) for j in range(4)]) for b in range(2)])
    assert torch.equal(p.patches, slow) and p.grid == (3, 4) and p.image is f.image
    for bad in (0, -1, 1.5, True, 4):
        with pytest.raises(ValueError, match='pool'): pool_cells(f, bad)

def test_layer3_cells_are_those_of_the_network():
    e = net('resnet', 32).eval(); x = torch.rand(2, 3, 32, 32)
    maps = []
    e.net.layer3.register_forward_hook(lambda m, i, o: maps.append(o))
    f = e(x)
    assert torch.equal(f.patches, maps[0].flatten(2).mT) and f.grid == e.grid == (8, 8) and f.patches.shape[2] == e.patch_dim == e.dim//2
    assert e.fresh().spec == e.spec and e.fresh().grid == e.grid

def test_a_term_of_ones_own():
    class far_apart(Term):
        "Patches of one image should differ: the mean cosine within an image."
        needs = {('query', 'online')}
        def __call__(self, query, key, queue=None): p = query.online.patches; return (p @ p.mT).mean()
        def __repr__(self): return 'far_apart()'
    m = MoCoV2(net('vit'), candidates=40, dense=Dense(far_apart(), .1, beside=1.))
    loss, log = m(batch(m)[0]); loss.backward()
    assert m.slots()['dense'].startswith('far_apart()') and m.trunk.patch_projector[0].weight.grad.abs().sum() > 0 and m.chance(8) is None

@pytest.mark.parametrize('call, word', [
    (lambda e: RepCo(e, host='simclr'), "host must be"), (lambda e: RepCo(e, source='both'), 'source must be'), (lambda e: RepCo(e, pool=4), 'a grid of 1 x 1'),
    (lambda e: RepCo(e, far=4), 'at a distance of 4'), (lambda e: RepCo(e, positives=20), '20 others at a distance of 2'), (lambda e: RepCo(e, beta=-1.), 'beta'),
    (lambda e: RepCo(e, tokens=4), 'with a queue leave it None'), (lambda e: RepCo(e, 'moco_v3', tokens=17), 'from 1 to the 16'),
    (lambda e: DenseCL(e, lam=0.), 'lam, the share'), (lambda e: RepCo(e, lam=1.5), 'lam, the share'), (lambda e: DenseCL(e, warmup=1.), 'warmup'),
    (lambda e: DenseCL(e, pool=3), 'pool=3 does not divide'), (lambda e: DenseCL(e, pool=0), 'pool must be'), (lambda e: DenseCL(e, setting='mnist'), "got 'mnist'"),
    (lambda e: DenseCL(e, tau=0.), 'tau'), (lambda e: LocalToGlobal(e, online='global'), 'online must be'), (lambda e: LocalToGlobal(e, tokens=0), 'tokens'),
    (lambda e: LocalToGlobal(e, reverse=-1.), 'reverse'), (lambda e: LocalToGlobal(e, tau=-1.), 'tau'), (lambda e: Dense(global_term), 'terms must be'),
    (lambda e: RepCo(e, share=0.), 'share'), (lambda e: RepCo(e, quantile=2.), 'quantile'), (lambda e: RepCo(e, negatives=9), 'negatives'), (lambda e: RepCo(e, gap=-1.), 'gap'),
    (lambda e: APS(e, dense=repco_term()), 'needs the whole grid'), (lambda e: APS(e, dense=Dense(match_term(), pool=2)), 'needs the whole grid'),
    (lambda e: MoCoV2(e, dense=Dense(global_term(), candidates=8)), 'takes its negatives from the batch'), (lambda e: MoCoV2(e, dense=.5), 'dense must be Dense'),
    (lambda e: Dense(match_term(), 2.), 'weight must be at most 1'), (lambda e: LocalToGlobal(e, pool=0), 'pool must be'), (lambda e: LocalToGlobal(e, tokens=1.5), 'tokens'),
    (lambda e: LocalToGlobal(e, image=-1.), 'image, the weight'), (lambda e: RepCo(e, tau='a'), 'tau must be'), (lambda e: RepCo(e, 'moco_v3', setting='cifar'), 'setting is for MoCo v2'),
    (lambda e: RepCo(e, hidden=8), 'hidden and out are for MoCo v3'), (lambda e: APS(e, momentum='x'), 'momentum'),
    (lambda e: APS(e, momentum=1.5), 'momentum'), (lambda e: APS(e, setting='coco'), "got 'coco'")])
def test_bad_input_is_told_before_any_work(call, word):
    with pytest.raises(ValueError, match=word): call(net('vit'))

def test_one_number_sizes_both_queues():
    for make in (DenseCL, RepCo):
        m = make(net('vit'), candidates=64)
        assert (m.queue.size, m.patch_queue.size) == (64, 64)
        m = make(net('vit')); m.fit_to(600, 16)
        assert (m.queue.size, m.patch_queue.size) == (64, 64)
    assert RepCo(vit(size=34, patch=2, width=16, depth=1, heads=2)).dense.pool == 1 # a grid of 17 x 17

def test_step_cost_counts_and_leaves_the_method_alone():
    from ssl_patch.methods import step_cost
    m = MoCoV3(net('vit'), hidden=32, out=16)
    with torch.no_grad(): m.trunk.projector[0].weight.add_(1.)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    c = step_cost(m, batch(m)[0])
    assert (c['images'], c['online_tokens'], c['target_tokens'], c['steps']) == (8, 32, 32, 1) and c['bytes'] > 8*2*17*32*4
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())

def test_a_batch_of_one_is_told():
    m = LocalToGlobal(net('vit'), hidden=32, out=16).eval()
    with pytest.raises(ValueError, match='batch of one'): m(batch(m, 1)[0])

@pytest.mark.parametrize('settings, make', [(aps_settings, APS), (densecl_settings, DenseCL), (local_to_global_settings, LocalToGlobal)])
def test_every_setting_builds_and_steps(settings, make):
    for data, s in settings.items():
        m = make(net('vit'), data, **(dict(hidden=32, out=16) if make is not DenseCL else {}))
        m.fit_to(400, 8)
        views, samples = batch(m)
        loss, _ = m(views, samples[0]); loss.backward(); m.after_step()
        assert torch.isfinite(loss) and m.training_recipe.epochs == s.training.epochs and s.source

def test_published_numbers():
    m = APS(vit('small', 224, 16))
    assert m.samples([make_view(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r) for r in m.views])[0][0].shape == (2, 49) and m.target is None
    t = m.training_recipe
    assert (t.epochs, t.batch_size, t.base_lr, t.weight_decay, t.warmup, t.clip) == (200, 512, 1e-3, .05, 30, 3.) and m.objective.keywords == dict(tau=.1)
    assert [l.out_features for l in m.trunk.projector if isinstance(l, torch.nn.Linear)] == [4096, 4096, 128]
    assert APS(vit('tiny', 32, 2)).training_recipe.base_lr == 1e-3 and APS(vit('small', 32, 2)).training_recipe.base_lr == 5e-4
    m = DenseCL(resnet('resnet50', 224))
    assert (m.queue.most, m.patch_queue.most, m.dense.weight, m.objective.keywords, m.dense.terms[0].tau, m.target.start, m.target.end) == (65536, 65536, .5, dict(tau=.2), .2, .999, .999)
    assert [l.out_features for l in m.trunk.patch_projector if isinstance(l, torch.nn.Linear)] == [2048, 128]
    t = DenseCL(resnet('resnet50', 224), 'coco').training_recipe
    assert (t.base_lr, t.epochs, m.training_recipe.base_lr, t.batch_size, t.weight_decay, t.warmup) == (.3, 800, .03, 256, 1e-4, 0)
    assert RepCo(vit('tiny', 32, 2)).dense.pool == 2 and RepCo(vit('tiny', 32, 4)).dense.pool == 1

@pytest.mark.parametrize('name', ['densecl', 'repco', 'local_to_global'])
def test_a_resumed_run_is_the_same_run(tmp_path, name):
    data = images(torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    def run(out, resume=False):
        options = dict(hidden=32, out=16) if name == 'local_to_global' else dict(candidates=Queue(32))
        torch.manual_seed(0)
        m = build_method(name, vit(size=16, patch=4, width=16, depth=1, heads=2), **options)
        return Pretrainer(m, data, epochs=2, batch_size=8, out=out, resume=resume, progress='quiet', knn_every=0)
    whole = run(tmp_path/'a').fit()
    part = run(tmp_path/'b'); part.fit(1)
    again = run(tmp_path/'b', True).fit()
    a, b = whole.method.state_dict(), again.method.state_dict()
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
    assert {'image', 'patch'} <= set(again.history[-1]) and again.history[-1]['within'] is not None

@pytest.mark.parametrize('grid', [(1, 8), (7, 7), (14, 14), (16, 16)])
def test_the_terms_take_any_grid(grid):
    from ssl_patch.terms import Seen
    from ssl_patch.towers import Embedding
    from ssl_patch.views import View
    torch.manual_seed(0)
    M = grid[0]*grid[1]
    def seen():
        e = lambda: Embedding(unit(torch.randn(4, 8)), unit(torch.randn(4, M, 8)), Features(torch.randn(4, 8), torch.randn(4, M, 8), grid))
        return Seen(View(torch.zeros(4, 3, 8, 8), torch.tensor([[0., 0, 8, 8]]*4), torch.zeros(4, dtype=torch.bool)), e(), e())
    for term in (match_term(), repco_term(), repco_term(source='other'), global_term()):
        term.check(grid)
        assert torch.isfinite(term(seen(), seen()))

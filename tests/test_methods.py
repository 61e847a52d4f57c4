"Papers that compare images: their steps against the formulas, their presets, what they refuse."

import math
from functools import partial
import pytest
import torch
from torch import nn
from steps import draw, nce, said, tiny_resnet, tiny_vit
from ssl_patch.methods.aps import APS, AsymmetricPatchSampler
from ssl_patch.methods.co2 import CO2, CO2Loss
from ssl_patch.methods.contrast import InfoNCELoss, info_nce
from ssl_patch.methods.moco import MoCoV1, MoCoV2, MoCoV3, moco_v1_configs, moco_v2_configs
from ssl_patch.methods.moco import moco_v3_configs
from ssl_patch.methods.ressl import ReSSL, ressl_configs
from ssl_patch.methods.sce import SCE, SCELoss, sce, sce_configs
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.momentum import SplitBatchNorm
from ssl_patch.views.augmentations import multi_crop

SOFT = dict(moco_v1=MoCoV1, moco_v2=MoCoV2, ressl=ReSSL, co2=CO2, sce=SCE)


@pytest.fixture
def encoder():
    return tiny_vit()


# ---- APS and MoCo v3: keys of the batch


def test_aps_is_its_formula(encoder):
    m = APS(encoder, hidden=32, out=16)
    views, draws = draw(m)
    assert len(draws) == 4
    for keeps in draws:
        z1, z2 = (m.tower(v.x, k).image for v, k in zip(views, keeps))
        expected = nce(m.predictor(z1), z2, 0.1) + nce(m.predictor(z2), z1, 0.1)
        assert torch.allclose(m(views, keeps)[0], expected, atol=1e-5)


def test_keys_of_aps_get_no_gradient(encoder):
    "Without the predictor's path there is none: the other view's projections are constants."
    m = APS(encoder, hidden=32, out=16)
    views, draws = draw(m)
    for p in m.predictor.parameters():
        nn.init.zeros_(p)  # constant queries, before their batch-norm
    loss, _ = m(views, draws[0])
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in m.tower.parameters())


@pytest.mark.parametrize('net', ['vit', 'resnet'])
def test_moco_v3_is_its_formula(net):
    vit = net == 'vit'
    encoder = tiny_vit(depth=1, variant='moco_v3') if vit else resnet('resnet18', 16)
    m, tau = MoCoV3(encoder, hidden=32, out=16), 0.2 if vit else 1.0
    views, draws = draw(m)
    assert draws == [[None, None]]
    loss, _ = m(views)
    loss.backward()
    z1, z2 = (m.tower(v.x).image for v in views)
    k1, k2 = (m.key_encoder(v.x).image for v in views)
    expected = 2 * tau * (nce(m.predictor(z1), k2, tau) + nce(m.predictor(z2), k1, tau))
    assert torch.allclose(loss, expected, atol=1e-4)
    trained = {n for n, p in m.named_parameters() if p.grad is not None}
    assert not any(n.startswith('key_encoder') for n in trained)
    assert 'tower.encoder.net.patch_embed.proj.weight' not in trained
    assert any(n.startswith('tower') for n in trained)
    assert any(n.startswith('predictor') for n in trained)


# ---- MoCo, ReSSL, CO2, SCE: one view asks the other, beside a queue


def seeded(method, views, seed=1):
    "Loss, queries and keys with one shuffle of the keys, and the queue that they met."
    queue = method.queue.keys.clone()
    torch.manual_seed(seed)
    loss, _ = method(views)
    torch.manual_seed(seed)
    queries, keys = method.queries_and_keys(views, [None] * len(views), 0.0)
    q, k = ({v: p.image for v, p in side.items()} for side in (queries, keys))
    return loss, q, k, queue


def plain_loss(name, q, k, queue, tau=0.1, tau_con=0.05, alpha=0.3, tau_m=0.05, lam=0.5):
    "A row at a time, from the papers' formulas."
    total = 0.0
    for i in range(len(q)):
        s = torch.cat([(q[i] @ k[i])[None], queue @ q[i]])  # of the query, positive first
        r = queue @ k[i]  # of the key
        contrast = s.div(tau).logsumexp(0) - s[0] / tau
        if name.startswith('moco'):
            total += contrast
        if name == 'co2':
            P, Q = (r / tau_con).softmax(0), (s[1:] / tau_con).softmax(0)
            both = (P * (P / Q).log()).sum() + (Q * (Q / P).log()).sum()
            total += contrast + alpha * both / 2
        if name == 'ressl':
            total -= ((r / 0.04).softmax(0) * (s[1:] / 0.1).log_softmax(0)).sum()
        if name == 'sce':
            relations = ((r / tau_m).softmax(0) * (s / tau).log_softmax(0)[1:]).sum()
            total += lam * contrast - (1 - lam) * relations
    return total / len(q)


@pytest.mark.parametrize('name', SOFT)
def test_soft_methods_are_their_formulas(name):
    m = SOFT[name](tiny_resnet(), queue=40).eval()  # eval: batch-norm and key encoder stand still
    loss, q, k, queue = seeded(m, draw(m)[0])
    tau = 0.07 if name == 'moco_v1' else 0.1
    expected = plain_loss(name, q[0], k[1], queue, tau=tau)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize('name', SOFT)
@pytest.mark.parametrize('net', [tiny_resnet, tiny_vit])
def test_soft_methods_train(name, net):
    """Gradient reaches the tower and nothing else; the queue takes each step's keys, after the
    step; the key encoder follows."""
    m = SOFT[name](net(), queue=40)
    views, _ = draw(m, 16)
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    slow, losses = [p.clone() for p in m.key_encoder.parameters()], []
    for step in range(8):
        queue = m.queue.keys.clone()
        loss, log = m(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(m.queue.keys, queue)
        m.after_step()
        losses.append(loss.item())
        written = torch.arange(16 * step, 16 * step + 16) % 40
        assert torch.equal(m.queue.keys[written], m.pending_keys[0])
        assert m.queue.next == 16 * (step + 1) % 40
    for name, p in m.tower.named_parameters():
        if p.requires_grad and 'pos_embed' not in name:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in m.key_encoder.parameters())
    assert any((a - b).abs().max() > 0 for a, b in zip(slow, m.key_encoder.parameters()))
    assert not m.queue.keys.requires_grad
    assert torch.isfinite(torch.tensor(losses)).all()


def test_who_splits_its_batch_norm_and_who_moves_when():
    def groups(net):
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        return {m.bn_splits if isinstance(m, SplitBatchNorm) else 1 for m in norms}

    before = (8, 8, 'before')
    expected = dict(moco_v1=before, moco_v2=before, ressl=before, co2=before, sce=(1, 8, 'after'))
    for name, (query, key, when) in expected.items():
        m = SOFT[name](tiny_resnet())
        assert (groups(m.tower), groups(m.key_encoder)) == ({query}, {key})
        assert (m.key_encoder.ema_update, m.key_encoder.shuffle) == (when, True)
        assert m.bn_splits == 8
    m = SCE(tiny_resnet(), 'imagenet')
    assert (groups(m.tower), groups(m.key_encoder), m.bn_splits) == ({1}, {1}, 1)
    assert (m.key_encoder.shuffle, m.key_encoder.end) == (False, 1.0)


def test_symmetric_moco_sums_two_losses():
    m = MoCoV2(tiny_resnet(), symmetric=True, queue=40).eval()
    loss, q, k, queue = seeded(m, draw(m)[0])
    expected = info_nce(q[0], k[1], queue, 0.1) + info_nce(q[1], k[0], queue, 0.1)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    m.train()
    m(draw(m)[0])
    m.after_step()
    assert m.queue.next == 16  # both views' keys enter


@pytest.mark.parametrize('net', [tiny_resnet, partial(tiny_vit, depth=1)])
def test_multi_crop_has_ten_terms(net):
    encoder = net(32)
    m = SCE(encoder, multi_crop=True, hidden=32, out=16, queue=40).eval()
    sizes = [a.size for a in m.augmentations]
    assert sizes == [a.size for a in multi_crop(32, encoder.side)]
    assert len(set(sizes)) > 2 and len(m.view_pairs) == 10
    loss, q, k, queue = seeded(m, draw(m)[0])
    assert sorted(q) == list(range(6)) and sorted(k) == [0, 1]
    terms = [plain_loss('sce', q[v], k[g], queue) for g in (0, 1) for v in range(6) if v != g]
    assert loss.item() == pytest.approx((sum(terms) / 10).item(), abs=1e-4)
    m.train()
    m(draw(m)[0])[0].backward()
    m.after_step()
    assert m.queue.next == 16  # the keys of the two large views


def test_multi_crop_of_ressl_has_five_terms():
    "Five strong views ask one weak view."
    m = ReSSL(tiny_resnet(32), multi_crop=True, queue=40).eval()
    loss, q, k, queue = seeded(m, draw(m)[0])
    assert sorted(q) == [1, 2, 3, 4, 5] and sorted(k) == [0]
    terms = [plain_loss('ressl', q[v], k[0], queue) for v in q]
    assert loss.item() == pytest.approx((sum(terms) / 5).item(), abs=1e-4)


def test_log_features_notes_features_and_entropy():
    for name, make in SOFT.items():
        m = make(tiny_resnet(), queue=40)
        m.log_features = True
        m(draw(m)[0])
        features, entropy = m.feature_log['features'], m.feature_log['entropy'].item()
        assert features.shape == (8, 64) and not features.requires_grad
        assert m.feature_log['patches'].shape[0] == 8
        assert entropy == 0 if name.startswith('moco') else 0 < entropy < torch.tensor(41.0).log()


@pytest.mark.parametrize(
    'make',
    [
        lambda e: APS(e, loss=SCELoss(lam=0.5, tau_m=0.05)),
        lambda e: APS(e, loss=CO2Loss(), queue=40),
        lambda e: ReSSL(e, patch_sampler=AsymmetricPatchSampler(gamma=3)),
        lambda e: SCE(e, patch_sampler=AsymmetricPatchSampler(gamma=3)),
        lambda e: MoCoV3(e, loss=partial(sce, tau=0.2), hidden=32, out=16),
    ],
)
def test_soft_labels_compose_with_sparse_patches(encoder, make):
    m = make(encoder)
    views, draws = draw(m)
    optimizer = torch.optim.SGD(m.parameters(), 0.05)
    for keeps in draws:
        loss, log = m(views, keeps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m.after_step()
        assert torch.isfinite(loss)
        assert m.encoder.net.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


# ---- presets


@pytest.mark.parametrize(
    'configs, make',
    [
        (moco_v1_configs, MoCoV1),
        (moco_v2_configs, MoCoV2),
        (ressl_configs, ReSSL),
        (sce_configs, SCE),
        (moco_v1_configs, partial(CO2, host='moco_v1')),
        (moco_v2_configs, partial(CO2, host='moco_v2')),
    ],
)
def test_every_preset_builds_and_steps(configs, make):
    assert sorted(configs) == ['cifar', 'imagenet', 'stl10', 'tiny_imagenet']
    for preset, config in configs.items():
        m = make(tiny_resnet(), preset=preset)
        assert m.queue.max_size == config.queue and m.train_config == config.train_config
        assert config.source
        m.set_data_size(1000, 16)
        loss, _ = m(draw(m)[0])
        loss.backward()
        m.after_step()
        assert torch.isfinite(loss) and m.queue.size == 128


def widths(head):
    return [layer.out_features for layer in head if isinstance(layer, nn.Linear)]


def test_published_numbers():
    "The rows of the papers' tables that a slip would change unnoticed."
    t = sce_configs['cifar'].train_config
    assert (t.optimizer, t.base_lr, t.weight_decay) == ('sgd', 0.06, 5e-4)
    assert (t.batch_size, t.epochs, t.warmup_epochs, t.decay_all) == (256, 200, 5, True)
    m = SCE(resnet('resnet18', 32))
    linear = [layer for layer in m.tower.projector if isinstance(layer, nn.Linear)]
    assert [(x.in_features, x.out_features, x.bias is not None) for x in linear] == [
        (512, 512, False),
        (512, 128, True),
    ]
    assert (m.key_encoder.start, m.key_encoder.end, m.queue.max_size) == (0.99, 0.99, 4096)
    assert [a.name for a in m.augmentations] == ['moco_v2', 'weak']
    assert m.loss == SCELoss(lam=0.5, tau=0.1, tau_m=0.05)
    t = MoCoV2(resnet('resnet18', 32)).train_config
    assert t.base_lr * t.batch_size / 256 == pytest.approx(0.06)
    assert (t.batch_size, t.schedule, t.warmup_epochs) == (512, 'epoch', 0)
    m = SCE(resnet('resnet50', 224))
    assert widths(m.tower.projector) == [4096, 4096, 256]
    assert m.train_config.base_lr == 0.3 and m.loss.tau_m == 0.07
    assert [a.name for a in m.augmentations] == ['byol_a', 'byol_b']
    assert (m.loss_scale, m.key_encoder.end) == (0.5, 1.0)
    assert not m.tower.projector[-1].affine and isinstance(m.predictor[-1], nn.Linear)
    m = ReSSL(resnet('resnet50', 224))
    assert widths(m.tower.projector) == [4096, 512]
    assert m.queue.max_size == 131072 and not m.train_config.decay_all
    m = CO2(tiny_resnet(), 'moco_v1', 'imagenet')
    assert m.loss == CO2Loss(tau=0.07, tau_con=0.04, alpha=10.0)
    m = CO2(tiny_resnet(), preset='imagenet')
    assert m.loss == CO2Loss(tau=0.2, tau_con=0.05, alpha=0.3)


def test_published_numbers_of_aps(encoder):
    small = vit('small', size=32, patch=8, depth=1)
    assert APS(encoder).train_config.base_lr == 1e-3
    assert APS(small).train_config.base_lr == 5e-4  # half the rate from ViT-Small on
    slow = APS(encoder, momentum=0.996).slots()['key_encoder']
    assert slow == 'EMA 0.996 to 1.0, moved before the step'
    m = APS(encoder)
    views, _ = draw(m)
    for v in range(2):
        kept = torch.cat([keep[v] for keep in m.draw_patches(views, torch.Generator())], 1)
        assert kept.shape[1] == math.prod(encoder.grid)  # four quarters
        if v == 0:  # disjoint: all patches, each once
            assert (kept.sort().values == torch.arange(kept.shape[1])).all()


def test_published_numbers_of_moco_v3():
    for kind, optimizer, rate, decay, warmup, tau in (
        ('vit', 'adamw', 1.5e-4, 0.1, 40, 0.2),
        ('resnet', 'lars', 0.3, 1e-6, 10, 1.0),
    ):
        m = MoCoV3(tiny_vit() if kind == 'vit' else tiny_resnet())
        t = m.train_config
        assert t == moco_v3_configs[kind].train_config and moco_v3_configs[kind].source
        assert (t.optimizer, t.base_lr, t.weight_decay) == (optimizer, rate, decay)
        assert (t.epochs, t.batch_size, t.warmup_epochs) == (300, 4096, warmup)
        assert m.loss == InfoNCELoss(tau) and m.loss_scale == 2 * tau
        assert (m.key_encoder.start, m.key_encoder.end, m.queue) == (0.99, 1.0, None)
        assert widths(m.tower.projector) == [4096] * (2 if kind == 'vit' else 1) + [256]
        assert widths(m.predictor) == [4096, 256]


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda e: APS(e, keep_ratio=0.0), ['keep_ratio', 'above 0', 'got 0.0']),
        (lambda e: APS(e, keep_ratio=1.5, num_draws=1), ['keep_ratio', 'at most 1', 'got 1.5']),
        (lambda e: APS(e, keep_ratio=0.5), ['num_draws', 'at most 2', 'got 4']),
        (lambda e: APS(e, gamma=-1), ['gamma', 'at least 0', 'got -1']),
        (lambda e: APS(e, preset='mnist'), ['preset', "'cifar'", "got 'mnist'"]),
        (lambda e: APS(e, tau=0.0), ['tau', 'above 0', 'got 0.0']),
        (lambda e: APS(tiny_resnet()), ['patch_sampler', 'a ViT can', 'got Asymmetric']),
        (lambda e: MoCoV3(e, momentum=2.0), ['momentum', 'at most 1', 'got 2.0']),
        (lambda e: MoCoV3(e, tau=0), ['tau', 'above 0', 'got 0']),
        (lambda e: SCE(e, 'mnist'), ['preset', "'cifar'", "got 'mnist'"]),
        (lambda e: SCE(e, lam=1.5), ['lam', 'at most 1', 'got 1.5']),
        (lambda e: SCE(e, tau=0.0), ['tau', 'above 0', 'got 0.0']),
        (lambda e: ReSSL(e, tau_t=-1.0), ['tau_t', 'above 0', 'got -1.0']),
        (lambda e: CO2(e, 'simclr'), ['host', "'moco_v1' or 'moco_v2'", "got 'simclr'"]),
        (lambda e: CO2(e, alpha=-1.0), ['alpha', 'at least 0', 'got -1.0']),
        (lambda e: CO2(e, preset='mnist'), ['preset', "'cifar'", "got 'mnist'"]),
        (lambda e: ReSSL(e, preset='mnist'), ['preset', "'cifar'", "got 'mnist'"]),
        (lambda e: MoCoV2(e, preset='mnist'), ['preset', "'cifar'", "got 'mnist'"]),
        (lambda e: MoCoV1(e, tau=0.0), ['tau', 'above 0', 'got 0.0']),
        (
            lambda e: MoCoV2(tiny_resnet()).set_data_size(1000, 12),
            ['batch_size must be a multiple of 8', 'got 12'],
        ),
    ],
)
def test_wrong_numbers_are_told_before_any_work(encoder, call, words):
    assert said(lambda: call(encoder), words)

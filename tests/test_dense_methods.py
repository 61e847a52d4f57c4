"""Papers that compare patches: their steps against slow loops over the formulas, which tensors
learn, what composes, what is refused."""

import math
from functools import partial
import pytest
import torch
from torch import nn
from steps import draw, said, tiny_resnet, tiny_vit
from ssl_patch.data.sources import images
from ssl_patch.methods.aps import APS, AsymmetricPatchSampler, aps_configs
from ssl_patch.methods.branches import l2_normalize
from ssl_patch.methods.co2 import CO2
from ssl_patch.methods.compose import build_method
from ssl_patch.methods.contrast import InfoNCELoss, info_nce
from ssl_patch.methods.densecl import DenseCL, DenseCLLoss, densecl_configs
from ssl_patch.methods.local_to_global import LocalToGlobal, LocalToGlobalLoss
from ssl_patch.methods.local_to_global import local_to_global_configs
from ssl_patch.methods.moco import MoCoV1, MoCoV2, MoCoV3
from ssl_patch.methods.patch_loss import PatchLosses, ViewOutputs
from ssl_patch.methods.mining import repco_pairs
from ssl_patch.methods.repco import RepCo, RepCoLoss
from ssl_patch.methods.ressl import ReSSL
from ssl_patch.methods.sce import SCE
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.interface import Features, pool_patches
from ssl_patch.models.heads import Projections, per_patch
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.views.augmentations import make_view
from ssl_patch.views.crops import View

SMALL = dict(hidden=32, out=16)
both_kinds = pytest.mark.parametrize('kind', ['vit', 'resnet'])


def net(kind, size=16):
    return tiny_vit(size) if kind == 'vit' else tiny_resnet(size, feature_layer='layer3')


# ---- against the formulas


def looked_at(m, views):
    "Loss and log, and what both towers make of every view."
    m.eval()  # batch-norm and key encoder stand still, keys are not shuffled
    slow = m.key_encoder or m.tower
    return m(views, progress=0.5), [m.tower(v.x) for v in views], [slow(v.x) for v in views]


def slow_nce(positive, negatives, tau):  # one row
    s = torch.stack([positive, *negatives]) / tau
    return s.logsumexp(0) - s[0]


def nearest(features_q, features_k, i):
    "The patch of the other view that is most similar to patch i, on a tie the first."
    similar = [round((features_q[i] @ f).item(), 6) for f in features_k]
    return max(range(len(similar)), key=similar.__getitem__)


@both_kinds
def test_densecl_is_its_formula(kind):
    m = DenseCL(net(kind, 32), queue=12, lam=0.3)
    views, _ = draw(m)
    (loss, log), fast, slow = looked_at(m, views)
    q, k = l2_normalize(fast[0].image), l2_normalize(slow[1].image)
    r, u = l2_normalize(fast[0].patches), l2_normalize(slow[1].patches)
    older, means = m.queue.keys, m.patch_queue.keys
    image = torch.stack([slow_nce(q[b] @ k[b], older @ q[b], 0.1) for b in range(8)]).mean()
    dense = []
    for b in range(8):
        features = (l2_normalize(p.features.patches[b]) for p in (fast[0], slow[1]))
        features_q, features_k = features
        for i in range(r.shape[1]):
            c = nearest(features_q, features_k, i)
            dense.append(slow_nce(r[b, i] @ u[b, c], means @ r[b, i], 0.1))
    patch = torch.stack(dense).mean()
    assert loss.item() == pytest.approx((0.7 * image + 0.3 * patch).item(), abs=1e-4)
    assert log['image_loss'].item() == pytest.approx(image.item(), abs=1e-4)
    assert log['patch_loss'].item() == pytest.approx(patch.item(), abs=1e-4)
    # the mean of projections that are not normalised
    mean = l2_normalize(slow[1].patches.mean(1))
    assert torch.allclose(m.pending_keys[-1], mean, atol=1e-5)


def slow_local_to_global(a, local):
    "Each image vector against its own patches, with those of other images as negatives."
    rows = []
    for b in range(len(a)):
        negatives = torch.cat([local[c] @ a[b] for c in range(len(a)) if c != b])
        rows += [slow_nce(a[b] @ patch, negatives, 0.2) for patch in local[b]]
    return torch.stack(rows).mean()


@both_kinds
def test_local_to_global_is_its_formula(kind):
    m = LocalToGlobal(net(kind), image_weight=0.25, **SMALL)
    views, _ = draw(m)
    (loss, log), fast, slow = looked_at(m, views)
    image = [l2_normalize(m.predictor(p.image)) for p in fast]
    local = [l2_normalize(per_patch(m.patch_predictor, p.patches)) for p in fast]
    image_k, local_k = ([l2_normalize(x) for x in side] for side in zip(*map(parts, slow)))
    patch, moco_v3 = 0.0, 0.0
    for v, w in ((0, 1), (1, 0)):
        patch += slow_local_to_global(image_k[w], local[v]) / 2
        patch += slow_local_to_global(image[w], local_k[v]) / 2
        moco_v3 += 2 * 0.2 * info_nce(image[v], image_k[w], tau=0.2)
    patch = patch / 2
    assert loss.item() == pytest.approx((patch + 0.25 * moco_v3).item(), abs=1e-3)
    assert log['patch_loss'].item() == pytest.approx(patch.item(), abs=1e-3)


def parts(p):
    return p.image, p.patches


@both_kinds
def test_repco_is_its_formula(kind):
    m = RepCo(net(kind, 32), queue=12, lam=0.25, beta=2.0)
    views, _ = draw(m)
    (loss, log), fast, slow = looked_at(m, views)
    r, u = l2_normalize(fast[0].patches), l2_normalize(slow[0].patches)
    means = m.patch_queue.keys
    p = repco_pairs(slow[0].features.patches, slow[0].features.grid)
    plus, minus = [], []
    for b in range(8):
        for i in range(r.shape[1]):
            if p.pos_ok[b, i]:
                plus.append(slow_nce(r[b, i] @ u[b, p.pos[b, i]], means @ r[b, i], 0.2))
            found = [j for j, ok in zip(p.neg[b, i], p.neg_ok[b, i]) if ok]
            gaps = [(r[b, i] @ u[b, j] - r[b, i] @ u[b, i]) / 0.2 for j in found]
            if gaps:
                minus.append(torch.log(1 + torch.stack(gaps).exp().sum()))
    expected = torch.stack(plus).mean() + 2 * torch.stack(minus).mean()
    assert log['patch_loss'].item() == pytest.approx(expected.item(), abs=1e-4)
    total = 0.75 * log['image_loss'] + 0.25 * expected
    assert loss.item() == pytest.approx(total.item(), abs=1e-4)


# ---- what composes

LOSSES = dict(
    densecl=DenseCLLoss(),
    repco=RepCoLoss(),
    local_to_global=LocalToGlobalLoss(num_patches=4),
    all=(DenseCLLoss(), RepCoLoss(), LocalToGlobalLoss()),
)
HOSTS = dict(
    moco_v1=MoCoV1,
    moco_v2=MoCoV2,
    moco_v3=partial(MoCoV3, **SMALL),
    ressl=ReSSL,
    co2=CO2,
    sce=SCE,
    sce_symmetric=partial(SCE, symmetric=True, **SMALL),
    aps_all=partial(APS, patch_sampler=None, **SMALL),
)


@both_kinds
@pytest.mark.parametrize('losses', LOSSES)
@pytest.mark.parametrize('host', HOSTS)
def test_every_patch_loss_on_every_host(host, losses, kind):
    """A few steps: every part of the tower that the losses use learns, the key encoder gets no
    gradient, both queues fill, the sum is the loss."""
    queue = None if losses == 'local_to_global' else 40
    m = HOSTS[host](net(kind), patch_loss=PatchLosses(LOSSES[losses], queue=queue))
    if m.queue:
        m.queue.set_data_size(400, 16)
    optimizer, gradients = torch.optim.SGD(m.parameters(), 0.02), {}
    for step in range(2):
        loss, log = m(draw(m, 16, step)[0], progress=0.5)
        optimizer.zero_grad()
        loss.backward()
        for name, p in m.named_parameters():
            size = 0.0 if p.grad is None else p.grad.abs().sum().item()
            gradients[name] = gradients.get(name, 0.0) + size
        both = 0.5 * log['image_loss'] + 0.5 * log['patch_loss']
        expected = m.loss_scale * len(m.view_pairs) * both
        assert torch.isfinite(loss) and loss.item() == pytest.approx(expected.item(), rel=1e-4)
        optimizer.step()
        m.after_step()
    frozen = {name for name, p in m.named_parameters() if not p.requires_grad}
    assert all(name.startswith('key_encoder') for name in frozen)
    for name, size in gradients.items():
        assert name.endswith('pos_embed') or (size > 0) == (name not in frozen), name
    if m.patch_queue:
        n = len(m.pending_keys[-1])
        lengths = m.patch_queue.keys[:n].norm(dim=1)
        assert m.patch_queue.next == 2 * n % 40
        assert torch.allclose(lengths, torch.ones(n), atol=1e-4)


@pytest.mark.parametrize(
    'losses',
    [
        DenseCLLoss(),
        LocalToGlobalLoss(),
        LocalToGlobalLoss(num_patches=5),
        (DenseCLLoss(), LocalToGlobalLoss()),
    ],
)
@pytest.mark.parametrize('host', [*HOSTS, 'aps', 'aps_ema'])
def test_patch_losses_on_sparse_patches(host, losses):
    "Losses that need no grid work on the patches that were kept."
    sparse = dict(aps=APS, aps_ema=partial(APS, momentum=0.99))
    make = sparse.get(host) or partial(HOSTS[host], patch_sampler=AsymmetricPatchSampler())
    m = make(net('vit', 32), patch_loss=PatchLosses(losses, 0.5))
    if m.queue:
        m.queue.set_data_size(400, 16)
    views, draws = draw(m)
    assert len(draws) == 4
    loss, log = m(views, draws[0], 0.5)
    loss.backward()
    assert torch.isfinite(loss) and m.tower.patch_projector[0].weight.grad.abs().sum() > 0
    few = getattr(losses, 'num_patches', None)
    assert m.tower(views[0].x, draws[0][0]).patches.shape[1] == (few or 16)
    words = ['patch_sampler must be None with RepCoLoss', 'needs all patches', 'got Asymmetric']
    assert said(lambda: make(net('vit', 32), patch_loss=RepCoLoss()), words)


def test_multi_crop_takes_a_patch_loss():
    m = SCE(net('resnet', 32), multi_crop=True, queue=40, patch_loss=DenseCLLoss(), **SMALL)
    loss, log = m(draw(m)[0])
    loss.backward()
    assert torch.isfinite(loss) and len(m.view_pairs) == 10
    assert m.tower.patch_projector[0].weight.grad.abs().sum() > 0


def test_both_sides_of_local_to_global_learn():
    "Image vectors and patches are queries in turn, so all four heads learn."
    m = LocalToGlobal(net('vit'), **SMALL)
    assert m.views_to_see == dict(query=[0, 1], key=[0, 1])
    loss, _ = m(draw(m)[0])
    loss.backward()
    for head in (m.predictor, m.patch_predictor, m.tower.projector, m.tower.patch_projector):
        assert head[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in m.key_encoder.parameters())


def test_before_its_start_a_patch_loss_is_the_host_alone():
    m = RepCo(net('resnet'), queue=40, start_fraction=0.1)
    host = MoCoV2(net('resnet'), queue=40)
    host.tower.projector.load_state_dict(m.tower.projector.state_dict())
    slow = m.key_encoder.net.state_dict()
    slow = {k: v for k, v in slow.items() if not k.startswith('patch_projector')}
    host.key_encoder.net.load_state_dict(slow)
    views, _ = draw(m)
    m.eval()
    host.eval()
    m(views, progress=0.05)[0].backward()
    assert all(p.grad is None for p in m.tower.patch_projector.parameters())
    alone = host(views)[0].item()
    assert m(views, progress=0.05)[0].item() == pytest.approx(alone, abs=1e-5)
    assert abs(m(views, progress=0.2)[0].item() - alone) > 1e-3


@pytest.mark.parametrize(
    'make',
    [
        partial(RepCo, host='moco_v2'),
        partial(RepCo, host='densecl'),
        partial(RepCo, host='moco_v3', **SMALL),
        partial(RepCo, host='moco_v3', negatives_per_image=3, **SMALL),
        partial(RepCo, beta=0.0),
        partial(RepCo, min_distance=3, positive_fraction=1.0, num_negatives=8, quantile=0.9),
        partial(DenseCL, symmetric=True),
        partial(DenseCL, pool=2),
        partial(LocalToGlobal, num_patches=3, **SMALL),
        partial(LocalToGlobal, pool=2, image_weight=0.5, **SMALL),
    ],
)
@both_kinds
def test_every_option_trains(make, kind):
    m = make(net(kind, 32))
    m.set_data_size(400, 16)
    optimizer, losses = torch.optim.SGD(m.parameters(), 0.05), []
    views, _ = draw(m, 16)
    for _ in range(3):
        loss, _ = m(views, progress=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m.after_step(0.5)
        losses.append(loss.item())
    assert all(math.isfinite(x) for x in losses)
    assert m.tower.patch_projector[0].weight.grad.abs().sum() > 0


def test_chance():
    slot = PatchLosses(DenseCLLoss(), 0.25, queue=20)
    moco = MoCoV2(net('vit'), queue=40, patch_loss=slot)
    assert moco.chance(8) == pytest.approx(0.75 * math.log(41) + 0.25 * math.log(21))
    few = LocalToGlobal(net('vit'), num_patches=4, **SMALL)
    assert few.chance(8) == pytest.approx(math.log(1 + 7 * 4))
    with_images = LocalToGlobal(net('vit'), image_weight=1.0, **SMALL)
    moco_v3 = 2 * 0.2 * 2 * math.log(8)
    assert with_images.chance(8) == pytest.approx(math.log(1 + 7 * 16) + moco_v3)
    assert RepCo(net('vit')).chance(8) is None
    slot = PatchLosses(LocalToGlobalLoss(), 1.0, image_weight=1.0)
    aps = APS(net('vit', 32), patch_loss=slot)  # 16 of 64 patches are kept
    assert aps.chance(8) == pytest.approx(2 * (math.log(8) + math.log(1 + 7 * 16)))


# ---- patches of an encoder


def test_pooled_patches():
    f = Features(torch.zeros(2, 3), torch.arange(2 * 6 * 8 * 3.0).view(2, 48, 3), (6, 8))
    pooled = pool_patches(f, 2)
    slow = torch.zeros(2, 12, 3)
    for b in range(2):
        grid = f.patches[b].view(6, 8, 3)
        for n in range(12):
            i, j = 2 * (n // 4), 2 * (n % 4)
            slow[b, n] = grid[i : i + 2, j : j + 2].mean((0, 1))
    assert torch.equal(pooled.patches, slow)
    assert pooled.grid == (3, 4) and pooled.image is f.image
    for bad in (0, -1, 1.5, True, 4):
        assert said(lambda: pool_patches(f, bad), ['pool', f'got {bad}'])


def test_layer3_patches_are_those_of_the_network():
    encoder = net('resnet', 32).eval()
    x, maps = torch.rand(2, 3, 32, 32), []
    encoder.net.layer3.register_forward_hook(lambda m, i, o: maps.append(o))
    f = encoder(x)
    assert torch.equal(f.patches, maps[0].flatten(2).mT)
    assert f.grid == encoder.grid == (8, 8)
    assert f.patches.shape[2] == encoder.patch_dim == encoder.dim // 2
    again = encoder.reinitialized()
    assert again.spec == encoder.spec and again.grid == encoder.grid


# ---- what does not fit


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda e: RepCo(e, host='simclr'), ['host must be one of', "'densecl'", "got 'simclr'"]),
        (lambda e: RepCo(e, pool=4), ['a grid of 1 x 1', 'take smaller patches']),
        (lambda e: RepCo(e, pool=3), ['pool', 'a divisor of the grid of 4 x 4', 'got 3']),
        (lambda e: RepCo(e, min_distance=4), ['min_distance must be less', '4 x 4', 'got 4']),
        (lambda e: RepCo(e, min_distance=1), ['min_distance', 'at least 2', 'got 1']),
        (lambda e: RepCo(e, beta=-1.0), ['beta', 'at least 0', 'got -1.0']),
        (
            lambda e: RepCoLoss(beta=0.0, use_positives=False),
            ['beta', 'above 0 with use_positives=False', 'got 0.0'],
        ),
        (
            lambda e: RepCo(e, negatives_per_image=4),
            ['negatives_per_image must be None with a queue', 'got 4'],
        ),
        (
            lambda e: RepCo(e, 'moco_v3', negatives_per_image=17),
            ['negatives_per_image', 'at least 1 and at most 16', 'got 17'],
        ),
        (lambda e: DenseCL(e, lam=0.0), ['lam', 'above 0', 'got 0.0']),
        (lambda e: RepCo(e, lam=1.5), ['lam', 'at most 1', 'got 1.5']),
        (lambda e: DenseCL(e, start_fraction=1.0), ['start_fraction', 'below 1', 'got 1.0']),
        (lambda e: DenseCL(e, pool=3), ['pool', 'a divisor of the grid of 4 x 4', 'got 3']),
        (lambda e: DenseCL(e, pool=0), ['pool must be', 'at least 1', 'got 0']),
        (lambda e: DenseCL(e, preset='mnist'), ['preset', "'coco'", "got 'mnist'"]),
        (lambda e: DenseCL(e, tau=0.0), ['tau', 'above 0', 'got 0.0']),
        (lambda e: LocalToGlobal(e, num_patches=0), ['num_patches', 'at least 1', 'got 0']),
        (lambda e: LocalToGlobal(e, num_patches=17), ['num_patches', 'at most 16', 'got 17']),
        (lambda e: LocalToGlobal(e, num_patches=1.5), ['num_patches', 'a whole', 'got 1.5']),
        (lambda e: LocalToGlobal(e, num_patches='every'), ['num_patches', "got 'every'"]),
        (lambda e: LocalToGlobal(e, tau=-1.0), ['tau', 'above 0', 'got -1.0']),
        (lambda e: LocalToGlobal(e, pool=0), ['pool must be', 'at least 1', 'got 0']),
        (lambda e: LocalToGlobal(e, pool=3), ['pool must be a divisor of the grid', 'got 3']),
        (lambda e: LocalToGlobal(e, image_weight=-1.0), ['image_weight', 'at least 0', 'got -1']),
        (
            lambda e: PatchLosses(LocalToGlobalLoss),
            ['losses must be', 'DenseCLLoss()', 'got LocalToGlobalLoss'],
        ),
        (lambda e: RepCo(e, positive_fraction=0.0), ['positive_fraction', 'above 0', 'got 0.0']),
        (lambda e: RepCo(e, quantile=2.0), ['quantile', 'below 1', 'got 2.0']),
        (lambda e: RepCo(e, num_negatives=9), ['num_negatives', 'at most 8', 'got 9']),
        (lambda e: RepCo(e, tau='a'), ['tau must be', 'a number', "got 'a'"]),
        (
            lambda e: APS(e, patch_loss=RepCoLoss()),
            ['patch_sampler', 'None with RepCoLoss', 'needs all patches'],
        ),
        (
            lambda e: APS(e, patch_loss=PatchLosses(DenseCLLoss(), pool=2)),
            ['patch_sampler', 'None with DenseCLLoss and pool=2', 'needs all patches'],
        ),
        (
            lambda e: MoCoV2(e, patch_loss=PatchLosses(LocalToGlobalLoss(), queue=8)),
            ['None with LocalToGlobalLoss', 'negatives come from the batch', 'got', 'queue of 8'],
        ),
        (lambda e: MoCoV2(e, patch_loss=0.5), ['patch_loss must be', 'PatchLosses', 'got 0.5']),
        (
            lambda e: LocalToGlobal(e, projector=nn.Linear(32, 8)),
            ['projections of patches', 'as wide as those of images, 8', 'got 128'],
        ),
        (lambda e: PatchLosses(DenseCLLoss(), 2.0), ['weight must be', 'at most 1', 'got 2.0']),
        (
            lambda e: RepCo(e, 'moco_v3', preset='cifar'),
            ['preset must be None on MoCo v3', "got 'cifar'"],
        ),
        (lambda e: RepCo(e, hidden=8), ['hidden and out', 'MoCo v3', 'a projector', 'got (8, ']),
        (lambda e: APS(e, momentum='x'), ['momentum', 'a number', "got 'x'"]),
        (lambda e: APS(e, momentum=1.5), ['momentum', 'at most 1', 'got 1.5']),
        (lambda e: APS(e, preset='coco'), ['preset', "'patchmix'", "got 'coco'"]),
    ],
)
def test_bad_input_is_told_before_any_work(call, words):
    assert said(lambda: call(net('vit')), words)


def test_a_batch_of_one_is_told():
    m = LocalToGlobal(net('vit'), **SMALL).eval()
    assert said(lambda: m(draw(m, 1)[0]), ['two images or more', 'batch of one', 'got (1, 16)'])


# ---- presets


def test_one_number_sizes_both_queues():
    for make in (DenseCL, RepCo):
        m = make(net('vit'), queue=64)
        assert (m.queue.size, m.patch_queue.size) == (64, 64)
        m = make(net('vit'))
        m.set_data_size(600, 16)
        assert (m.queue.size, m.patch_queue.size) == (64, 64)
    odd = vit(size=34, patch=2, width=16, depth=1, heads=2)  # a grid of 17 x 17
    assert RepCo(odd).patch_loss.pool == 1


@pytest.mark.parametrize(
    'configs, make',
    [
        (aps_configs, partial(APS, **SMALL)),
        (densecl_configs, DenseCL),
        (local_to_global_configs, partial(LocalToGlobal, **SMALL)),
    ],
)
def test_every_preset_builds_and_steps(configs, make):
    for preset, config in configs.items():
        m = make(net('vit'), preset)
        m.set_data_size(400, 8)
        views, draws = draw(m)
        loss, _ = m(views, draws[0])
        loss.backward()
        m.after_step()
        assert torch.isfinite(loss) and config.source
        assert m.train_config.epochs == config.train_config.epochs


def widths(head):
    return [layer.out_features for layer in head if isinstance(layer, nn.Linear)]


def test_published_numbers():
    m = APS(vit('small', 224, 16))
    x = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    draws = m.draw_patches([make_view(x, a) for a in m.augmentations])
    assert draws[0][0].shape == (2, 49) and m.key_encoder is None
    t = m.train_config
    assert (t.epochs, t.batch_size, t.base_lr, t.weight_decay) == (200, 512, 1e-3, 0.05)
    assert (t.warmup_epochs, t.grad_clip, m.loss) == (30, 3.0, InfoNCELoss(tau=0.1))
    assert widths(m.tower.projector) == [4096, 4096, 128]
    assert APS(vit('tiny', 32, 2)).train_config.base_lr == 1e-3
    assert APS(vit('small', 32, 2)).train_config.base_lr == 5e-4
    m = DenseCL(resnet('resnet50', 224))
    assert (m.queue.max_size, m.patch_queue.max_size) == (65536, 65536)
    assert (m.key_encoder.start, m.key_encoder.end) == (0.999, 0.999)
    assert (m.patch_loss.weight, m.loss) == (0.5, InfoNCELoss(tau=0.2))
    assert m.patch_loss.losses == (DenseCLLoss(tau=0.2),)
    assert widths(m.tower.patch_projector) == [2048, 128]
    t = DenseCL(resnet('resnet50', 224), 'coco').train_config
    assert (t.base_lr, t.epochs, m.train_config.base_lr) == (0.3, 800, 0.03)
    assert (t.batch_size, t.weight_decay, t.warmup_epochs) == (256, 1e-4, 0)
    assert RepCo(vit('tiny', 32, 2)).patch_loss.pool == 2
    assert RepCo(vit('tiny', 32, 4)).patch_loss.pool == 1


# ---- a whole run, and any grid


@pytest.mark.parametrize('name', ['densecl', 'repco', 'local_to_global'])
def test_a_resumed_run_is_the_same_run(tmp_path, name):
    g = torch.Generator().manual_seed(0)
    data = images(torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=g))
    options = SMALL if name == 'local_to_global' else dict(queue=32)
    how = dict(epochs=2, batch_size=8, progress='quiet', knn_every=0)

    def run(out, resume=False):
        torch.manual_seed(0)
        m = build_method(name, vit(size=16, patch=4, width=16, depth=1, heads=2), **options)
        return Pretrainer(m, data, out=out, resume=resume, **how)

    whole = run(tmp_path / 'a').fit()
    run(tmp_path / 'b').fit(1)
    again = run(tmp_path / 'b', True).fit()
    a, b = whole.method.state_dict(), again.method.state_dict()
    for k in a:
        assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k
    assert {'image_loss', 'patch_loss'} <= set(again.history[-1])
    assert again.history[-1]['patch_sim_within'] is not None


@pytest.mark.parametrize('grid', [(1, 8), (7, 7), (14, 14), (16, 16)])
def test_patch_losses_take_any_grid(grid):
    torch.manual_seed(0)
    M = grid[0] * grid[1]

    def projections():
        image, patches = torch.randn(4, 8), torch.randn(4, M, 8)
        features = Features(torch.randn(4, 8), torch.randn(4, M, 8), grid)
        return Projections(l2_normalize(image), l2_normalize(patches), features)

    def outputs():
        box = torch.tensor([[0.0, 0, 8, 8]] * 4)
        view = View(torch.zeros(4, 3, 8, 8), box, torch.zeros(4, dtype=torch.bool))
        return ViewOutputs(view, projections(), projections())

    for loss in (DenseCLLoss(), RepCoLoss(), RepCoLoss(beta=0.0), LocalToGlobalLoss()):
        for has_queue in (False, True):
            loss.check(grid, has_queue)
        assert torch.isfinite(loss(outputs(), outputs()))

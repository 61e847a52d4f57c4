"""What the released code of the papers does, by formulas of its own: first weights, crops, rates,
blur, average precision, and vision transformers that come from there and go back."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_patch.evaluation.linear_probe import linear_probe_configs, linear_rate
from ssl_patch.evaluation.metrics import average_precision
from ssl_patch.methods.aps import APS
from ssl_patch.methods.densecl import DenseCL, densecl_configs
from ssl_patch.methods.moco import MoCoV2, MoCoV3, moco_v2_configs, moco_v3_configs
from ssl_patch.methods.ressl import ReSSL, ressl_configs
from ssl_patch.methods.sce import SCE, sce_configs
from ssl_patch.models.encoders import resnet, sincos_positions, vit
from ssl_patch.models.external import fill_encoder
from ssl_patch.models.files import load_encoder, open_encoder, save_encoder
from ssl_patch.models.heads import mlp
from ssl_patch.models.momentum import cosine_momentum
from ssl_patch.models.weights import to_timm_state
from ssl_patch.training.optim import Schedule, lr_factor, make_optimizer
from ssl_patch.views.augmentations import make_view
from ssl_patch.views.color import gaussian_blur

with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='IProgress')
    import timm

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small_resnet(size=32, **kw):
    return resnet('resnet18', size, width=8, **kw)


# ---- first weights


@pytest.mark.parametrize('grid,dim', [(2, 4), (3, 8), (14, 384)])
def test_positions_are_those_of_moco_v3s_code(grid, dim):
    rows = []
    for first in range(grid):  # the code calls this axis the width; patches are numbered along it
        for second in range(grid):
            angles = [
                [i / 10000 ** (m / (dim // 4)) for m in range(dim // 4)] for i in (first, second)
            ]
            rows.append([f(a) for part in angles for f in (math.sin, math.cos) for a in part])
    assert torch.allclose(sincos_positions(grid, dim), torch.tensor(rows), atol=1e-5)
    net = vit(size=grid * 4, patch=4, width=dim, heads=1, depth=1, variant='moco_v3').net
    assert torch.equal(net.pos_embed[0], sincos_positions(grid, dim))


def test_a_file_keeps_the_positions_it_was_trained_with(tmp_path):
    e = vit(size=16, patch=4, width=8, heads=1, depth=1, variant='moco_v3').eval()
    with torch.no_grad():  # halves the other way round, as files before have them
        e.net.pos_embed.copy_(e.net.pos_embed.roll(4, 2))
    x = torch.rand(2, 3, 16, 16)
    again = load_encoder(save_encoder(e, tmp_path / 'encoder.safetensors'))
    assert torch.equal(again.net.pos_embed, e.net.pos_embed)
    assert torch.equal(again(x).image, e(x).image)


@pytest.mark.parametrize('stem', ['small', 'half'])
def test_a_new_stem_is_drawn_as_pytorch_draws_a_convolution(stem):
    torch.manual_seed(0)
    w = resnet('resnet18', 32, stem=stem).net.conv1.weight
    plain = nn.Conv2d(3, 64, 3, bias=False).weight
    bound = 1 / math.sqrt(27)
    assert w.abs().max() <= bound and plain.abs().max() <= bound
    assert w.std().item() == pytest.approx(0.111, abs=0.004)
    assert plain.std().item() == pytest.approx(w.std().item(), abs=0.006)


def test_torchvisions_own_stem_stays():
    w = resnet('resnet18', 96).net.conv1.weight
    assert w.std().item() == pytest.approx(math.sqrt(2 / (49 * 64)), rel=0.05)


@pytest.mark.parametrize('name,norm', [('resnet18', 'bn2'), ('resnet50', 'bn3')])
@pytest.mark.parametrize('width', [64, 8])
def test_residuals_that_begin_at_zero(name, norm, width, tmp_path):
    zero = resnet(name, 32, width=width, zero_init_residual=True)
    blocks = [
        b for layer in ('layer1', 'layer2', 'layer3', 'layer4') for b in getattr(zero.net, layer)
    ]
    scales = [getattr(b, norm).weight for b in blocks]
    assert all((s == 0).all() for s in scales) and (zero.net.bn1.weight == 1).all()
    plain = resnet(name, 32, width=width)
    assert all((getattr(b, norm).weight == 1).all() for b in plain.net.layer3)
    assert 'zero_init_residual' not in plain.spec
    again = load_encoder(save_encoder(zero, tmp_path / 'encoder.safetensors'))
    assert again.spec == zero.spec and (getattr(again.net.layer1[0], norm).weight == 0).all()
    assert (getattr(zero.reinitialized(1).net.layer1[0], norm).weight == 0).all()


@pytest.mark.parametrize('value', [2, 'yes', None])
def test_zero_init_residual_is_a_yes_or_no(value):
    with pytest.raises(ValueError, match='zero_init_residual must be one of True or False'):
        resnet(zero_init_residual=value)


@pytest.mark.parametrize('preset', ['imagenet', 'coco'])
def test_densecls_projectors_begin_as_its_code_has_them(preset):
    torch.manual_seed(0)
    m = DenseCL(resnet('resnet50', 64, stem='imagenet'), preset, queue=8)
    first, last = m.tower.projector[0], m.tower.projector[2]
    for layer in (first, last):
        assert layer.weight.std().item() == pytest.approx(0.0312, abs=3e-4)
        assert not layer.bias.any()
    assert m.tower.patch_projector[0].weight.std().item() == pytest.approx(0.0128, abs=2e-4)
    assert moco_v2_configs['imagenet'].heads is not densecl_configs['imagenet'].heads
    torch.manual_seed(0)
    mocos = MoCoV2(small_resnet(), 'imagenet', queue=8).tower.projector[0]
    assert mocos.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.1)


# ---- views


def test_moco_v3s_crops():
    e = vit(size=32, patch=8, width=16, heads=2, depth=1, variant='moco_v3')
    m, r = MoCoV3(e, hidden=8, out=8), MoCoV3(small_resnet(), hidden=8, out=8)
    assert [(a.name, a.scale) for a in m.augmentations] == [
        ('byol_a', (0.08, 1.0)),
        ('byol_b', (0.08, 1.0)),
    ]
    assert [a.scale for a in r.augmentations] == [(0.2, 1.0)] * 2
    assert 'zero_init_residual' in moco_v3_configs['resnet'].source
    x = torch.rand(256, 3, 32, 32)
    view = make_view(x, m.augmentations[0], torch.Generator().manual_seed(0))
    area = view.box[:, 2] * view.box[:, 3] / 1024
    assert 0.07 < area.min() < 0.15 and area.max() > 0.8


@pytest.mark.parametrize('build', [SCE, ReSSL])
@pytest.mark.parametrize('size,preset', [(32, 'cifar'), (64, 'stl10'), (64, 'tiny_imagenet')])
def test_blur_of_small_images_is_not_cut(build, size, preset):
    strong = build(small_resnet(size), preset, queue=8).augmentations[0]
    assert (strong.blur_p, strong.blur_sigma, strong.scale) == (0.5, (0.1, 2.0), (0.2, 1.0))
    x = torch.rand(4, 3, size, size)
    for sigma in (0.1, 1.0, 2.0):
        whole = gaussian_blur(x, 61, sigma)
        assert (gaussian_blur(x, strong.kernel, sigma) - whole).abs().max() < 1e-3
    assert (gaussian_blur(x, 3, 2.0) - whole).abs().max() > 0.02


@pytest.mark.parametrize('build', [SCE, ReSSL])
def test_blur_of_photographs_is_the_published_kernel(build):
    configs = dict(SCE=sce_configs, ReSSL=ressl_configs)[build.__name__]
    assert configs['imagenet'].augmentations[0](224).kernel == 23


# ---- rates


def test_linear_probe_of_a_vit():
    probe = linear_probe_configs['moco_v3_vit']
    assert [linear_rate(probe, e * 5, 5) for e in (0, 45)] == pytest.approx([12, 6])
    assert linear_rate(linear_probe_configs['moco_v3'], 0, 5) == pytest.approx(0.4)


def test_where_schedules_differ_it_is_said():
    config = moco_v2_configs['cifar']
    lr = Schedule(config.train_config, 0.06, 10)
    theirs = lambda e: 0.06 * 0.5 * (1 + math.cos(math.pi * (e + 1) / 200))  # epochs from 1
    assert lr.at(0) == 0.06 and lr.at(10) == pytest.approx(theirs(0))
    assert lr.at(1999) > theirs(199) == 0
    assert 'counts epochs from 1' in config.source

    warm = sce_configs['cifar'].train_config.warmup_epochs
    steps = [lr_factor(s / 10, 200, warm) for s in (49, 50)]  # of 10 in an epoch, W = 50
    assert steps == pytest.approx([49 / 50, 1.0])  # theirs: s / (W - 1), 1 in step 49
    T = 1000
    ours = cosine_momentum((T - 1) / T)
    assert 0 < 1 - ours < 0.01 * math.pi**2 / (4 * T**2) * 1.001  # theirs: s / (T - 1), so 1
    assert 'warm-up ends one step' in sce_configs['cifar'].source
    assert 'warm-up ends one step' in sce_configs['imagenet'].source
    assert 'momentum likewise' in sce_configs['imagenet'].source


def test_ressl_decays_no_scale_of_a_norm():
    m = ReSSL(small_resnet(), 'imagenet', queue=8)
    spared = make_optimizer(m, m.train_config, 0.1).param_groups[1]
    assert spared['weight_decay'] == 0
    ids = {id(p) for p in spared['params']}
    scales = [
        p for n, p in m.named_parameters() if 'tower' in n and n.endswith('downsample.1.weight')
    ]
    assert len(scales) == 3 and all(id(p) in ids for p in scales)  # four in a ResNet-50
    assert "lack the word 'bn'" in ressl_configs['imagenet'].source


# ---- average precision


def theirs_11_points(scores, targets):
    "The published code of linear transfer: scikit-learn's curve, which ends at recall 0 with 1."
    from sklearn.metrics import precision_recall_curve

    p, r, _ = precision_recall_curve(targets.numpy(), scores.numpy())
    return np.mean([p[r >= t / 10 - 1e-9].max() for t in range(11)])


def vocs_11_points(scores, targets):
    "VOC2007's definition, image by image."
    order = scores.argsort(descending=True)
    found = targets[order].cumsum(0).double()
    P, R = found / torch.arange(1, len(found) + 1), found / found[-1]
    return np.mean([P[R >= t / 10 - 1e-9].max().item() for t in range(11)])


def test_eleven_points_are_vocs():
    g = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(200):
        scores, targets = torch.rand(12, generator=g), torch.randint(2, (12,), generator=g)
        targets[0] = 1
        ours = average_precision(scores, targets, '11-point')
        assert ours == pytest.approx(vocs_11_points(scores, targets))
        gaps.append(theirs_11_points(scores, targets) - ours)
    assert min(gaps) > -1e-9 and 1e-3 < max(gaps) < 1 / 11  # equal where the first place is right
    assert sum(abs(g) < 1e-9 for g in gaps) > 20


# ---- vision transformers from there, and back


def their_vit(size=32, heads=4, **kw):
    "timm's ViT with a position of the class token, all of it random."
    torch.manual_seed(0)
    args = dict(img_size=size, patch_size=8, embed_dim=48, depth=2, num_heads=heads) | kw
    net = timm.models.VisionTransformer(**args, num_classes=0).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def our_vit(size=32, variant='moco_v3', **kw):
    return vit(size=size, patch=8, width=48, depth=2, heads=4, variant=variant, **kw).eval()


def checkpoint_of(paper, net):
    w = net.state_dict()
    head = torch.zeros(8, 48)
    named = lambda prefix, **more: {prefix + n: v for n, v in (w | more).items()}
    if paper == 'moco_v3':
        slow = {n: v + 1 for n, v in named('module.momentum_encoder.').items()}
        fast = named('module.base_encoder.', **{'head.0.weight': head})
        return dict(epoch=300, state_dict=fast | slow)
    if paper == 'dino':
        slow = {n: v + 1 for n, v in named('backbone.').items()}
        return dict(student=named('module.backbone.') | {'module.head.w': head}, teacher=slow)
    if paper == 'dino backbone':
        return w
    return dict(model=named('', **{'head.weight': head, 'head.bias': torch.zeros(8)}))  # DeiT


PAPERS = ['moco_v3', 'dino', 'dino backbone', 'deit']


@pytest.mark.parametrize('paper', PAPERS)
def test_their_checkpoints_open_in_our_vit(paper, tmp_path):
    net, x = their_vit(), torch.rand(3, 3, 32, 32)
    torch.save(checkpoint_of(paper, net), tmp_path / 'c.pth')
    e = open_encoder(tmp_path / 'c.pth', arch=our_vit())
    assert 'resampled' not in e.card and e.tower in ('online', '')
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    with torch.no_grad():
        f, whole = e(x), net.forward_features((x - mean) / std)
        assert torch.allclose(f.image, whole[:, 0], atol=1e-5)
        assert torch.allclose(f.patches, whole[:, 1:], atol=1e-5)
    own = open_encoder(tmp_path / 'c.pth', arch=our_vit(), stats=([0.5] * 3, [0.5] * 3))
    assert own.mean.tolist() == [0.5] * 3


def test_statistics_that_an_encoder_has_stay():
    e = our_vit().set_stats([0.1, 0.2, 0.3], [0.4] * 3)
    fill_encoder(e, their_vit().state_dict())
    assert torch.allclose(e.mean, torch.tensor([0.1, 0.2, 0.3]))


def test_the_momentum_tower_of_their_checkpoint():
    a, b = our_vit(), our_vit()
    state = checkpoint_of('dino', their_vit())
    assert fill_encoder(a, state).tower == 'online'
    assert fill_encoder(b, state, 'momentum').tower == 'momentum'
    assert torch.allclose(b.net.norm.weight, a.net.norm.weight + 1)
    assert torch.allclose(b.net.cls_token, a.net.cls_token + 2)  # token and position, one more each


def test_another_size_has_positions_resampled(tmp_path):
    net = their_vit(32)
    torch.save(net.state_dict(), tmp_path / 'c.pth')
    e = open_encoder(tmp_path / 'c.pth', arch=our_vit(48))
    assert e.card['resampled'] == ['pos_embed']
    where = net.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    where = F.interpolate(where, (6, 6), mode='bicubic', antialias=True)
    assert torch.allclose(e.net.pos_embed, where.flatten(2).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize('kw', [dict(qkv_bias=False), dict(reg_tokens=2), dict(depth=3)])
def test_another_architecture_is_refused(kw):
    e = our_vit()
    before = {n: v.clone() for n, v in e.state_dict().items()}
    with pytest.raises(ValueError, match='missing|left over|another shape'):
        fill_encoder(e, their_vit(**kw).state_dict())
    assert all(torch.equal(v, before[n]) for n, v in e.state_dict().items())


def test_a_distilled_deit_is_refused():
    state = their_vit().state_dict() | dict(dist_token=torch.zeros(1, 1, 48))
    state['pos_embed'] = torch.zeros(1, 18, 48)
    with pytest.raises(ValueError, match='dist_token|another shape'):
        fill_encoder(our_vit(), state)


def test_aps_starts_from_published_weights():
    e = our_vit()
    fill_encoder(e, checkpoint_of('deit', their_vit()))
    m = APS(e, hidden=16, out=8).train()
    g = torch.Generator().manual_seed(0)
    views = [make_view(torch.rand(8, 3, 32, 32), a, g) for a in m.augmentations]
    loss, _ = m(views, m.draw_patches(views, g)[0])
    loss.backward()
    assert loss.isfinite() and e.net.cls_token.grad.abs().sum() > 0
    assert e.net.pos_embed.grad is None  # frozen, as the variant has it


@pytest.mark.parametrize('variant', ['moco_v3', 'aps'])
def test_ours_go_back_into_timm(variant):
    torch.manual_seed(0)
    e, x = our_vit(variant=variant).set_stats(*IMAGENET), torch.rand(2, 3, 32, 32)
    eps = 1e-5 if variant == 'aps' else 1e-6
    net = their_vit(
        qkv_bias=variant != 'aps', norm_layer=lambda d, **kw: nn.LayerNorm(d, eps=eps, **kw)
    )
    net.load_state_dict(to_timm_state(e))
    with torch.no_grad():
        f, theirs = e(x), net.forward_features(e.normalise(x))
    assert torch.allclose(f.image, theirs[:, 0], atol=2e-6)
    assert torch.allclose(f.patches, theirs[:, 1:], atol=2e-6)


def test_by_name_into_timm_and_round_again():
    e, x = vit('tiny', 32, 8, variant='moco_v3').eval(), torch.rand(2, 3, 32, 32)
    args = dict(img_size=32, patch_size=8, num_classes=0)
    net = timm.create_model('vit_tiny_patch16_224', **args).eval()
    net.load_state_dict(to_timm_state(e))
    with torch.no_grad():
        assert torch.allclose(e(x).image, net(x), atol=1e-5)
    again = vit('tiny', 32, 8, variant='moco_v3').eval()
    fill_encoder(again, net.state_dict())
    same = zip(again.net.state_dict().values(), e.net.state_dict().values())
    assert all(torch.equal(a, b) for a, b in same)
    before = e.net.pos_embed.clone()
    to_timm_state(e)['cls_token'].zero_()  # a copy
    assert e.net.cls_token.any() and torch.equal(e.net.pos_embed, before)


@pytest.mark.parametrize('wrong', [nn.Linear(2, 2), small_resnet(), mlp(4, 4)])
def test_only_vits_of_ours_go_into_timm(wrong):
    with pytest.raises(ValueError, match='encoder must be a vision transformer of this library'):
        to_timm_state(wrong)

"Encoders of other libraries: their own numbers, and checkpoints that must not load wrongly."

import copy
import warnings
from argparse import Namespace
from urllib.error import URLError

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from ssl_patch.data.sources import images
from ssl_patch.evaluation.features import architecture
from ssl_patch.evaluation.knn import knn
from ssl_patch.models import files, interface
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.external import ExternalEncoder, fill_encoder
from ssl_patch.models.files import load_encoder, open_encoder, save_encoder
from ssl_patch.models.libraries import from_timm, from_torchvision, library_name
from ssl_patch.models.weights import find_weights, read_weights, tower_of


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def lively(e):
    "Scales that random initialisation leaves at 0 and 1: averages must not be trivially right."
    g = torch.Generator().manual_seed(1)
    for m in e.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.weight.copy_(torch.rand(m.weight.shape, generator=g) + 0.5)
            m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.1)
    return e


# --- the same numbers as the libraries

TIMM = [
    'test_vit',
    'test_resnet',
    'test_convnext',
    'test_efficientnet',
    'resnet18',
    'vit_tiny_patch16_224',
    'deit_tiny_distilled_patch16_224',
    'vit_small_patch32_224',
    'swin_tiny_patch4_window7_224',
    'convnext_atto',
    'mobilenetv3_small_050',
    'regnetx_002',
    'mixer_s32_224',
    'pit_ti_224',
    'mambaout_femto',
    'eva02_tiny_patch14_224',
    'densenet121',
]
MEAN_POOLED = {
    'test_resnet',
    'resnet18',
    'swin_tiny_patch4_window7_224',
    'regnetx_002',
    'mixer_s32_224',
    'test_efficientnet',
    'densenet121',
}


@pytest.mark.parametrize('name', TIMM)
def test_timm_computes_the_same(name):
    if name not in timm.list_models():
        pytest.skip('not in this timm')
    size = 64 if 'patch14' not in name else 56
    x = torch.nn.functional.interpolate(X, (size, size))
    e = lively(open_encoder(f'timm/{name}', size=size, pretrained=False))
    cfg = e.net.pretrained_cfg
    z = (x - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(3, 1, 1)
    out = e(x)
    assert torch.allclose(
        out.image, e.net.forward_head(e.net.forward_features(z), pre_logits=True), atol=1e-5
    )
    assert torch.allclose(
        out.image, e.net(z), atol=1e-5
    )  # without classifier, the library's own forward
    assert out.image.shape == (2, e.dim) and e.size == size and not e.training
    if e.grid is None:
        return
    assert out.patches.shape == (2, e.grid[0] * e.grid[1], e.patch_dim) and out.grid == e.grid
    if name in MEAN_POOLED:
        assert torch.allclose(out.patches.mean(1), out.image, atol=1e-4 * out.image.abs().max())


TORCHVISION = [
    'resnet18',
    'resnext50_32x4d',
    'alexnet',
    'densenet121',
    'mobilenet_v2',
    'mobilenet_v3_small',
    'efficientnet_b0',
    'convnext_tiny',
    'regnet_y_400mf',
    'swin_t',
    'shufflenet_v2_x0_5',
    'mnasnet0_5',
]


@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision_computes_the_same(name):
    if name not in models.list_models():
        pytest.skip('not in this torchvision')
    torch.manual_seed(0)
    e = lively(from_torchvision(name, 64))
    torch.manual_seed(0)
    whole = lively(models.get_model(name).eval())  # with its classifier
    preset = models.get_model_weights(name).DEFAULT.transforms()
    z = (X - torch.tensor(preset.mean).view(3, 1, 1)) / torch.tensor(preset.std).view(3, 1, 1)
    last = [m for m in whole.modules() if isinstance(m, nn.Linear)][-1]
    out = e(X)
    assert torch.allclose(last(out.image), whole(z), atol=1e-4)
    assert out.patches.shape == (2, e.grid[0] * e.grid[1], e.patch_dim) and out.grid == e.grid
    assert e.resize == 64 * preset.resize_size[0] // preset.crop_size[0]
    if name in ('alexnet', 'mobilenet_v3_small', 'convnext_tiny'):
        return  # these have layers between average and classifier
    assert torch.allclose(out.patches.mean(1), out.image, atol=1e-4 * out.image.abs().max())


def test_torchvision_vit_tokens():
    e = from_torchvision('vit_b_32', 64)
    tokens = e.net.encoder(
        torch.cat([e.net.class_token.expand(2, -1, -1), e.net._process_input(e.normalise(X))], 1)
    )
    out = e(X)
    assert (
        torch.allclose(out.image, tokens[:, 0], atol=1e-5)
        and torch.allclose(out.patches, tokens[:, 1:], atol=1e-5)
        and out.grid == (2, 2)
    )
    assert not e.net.encoder._forward_hooks


@pytest.mark.parametrize(
    'name',
    ['timm/test_vit', 'timm/test_convnext', 'timm/mambaout_femto', 'torchvision/regnet_y_400mf'],
)
def test_cells_are_row_major(name):
    "A change of the top right corner changes the last cell of the first row most."
    e = open_encoder(name, size=64 if 'vit' in name else 128, pretrained=False)
    x = torch.rand(1, 3, e.size, e.size, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[..., : e.size // e.grid[0], -e.size // e.grid[1] :] = 0.0
    a, b = e(x).patches[0], e(y).patches[0]
    assert ((a - b).norm(dim=1)).argmax() == e.grid[1] - 1


# --- our interface


@pytest.mark.parametrize('name', ['timm/test_vit', 'torchvision/shufflenet_v2_x0_5'])
def test_interface(name, tmp_path):
    e = open_encoder(name, size=64, pretrained=False, seed=3)
    x = (X * 255).round().byte()
    assert torch.allclose(e(x).image, e(x.float() / 255).image, atol=1e-5)
    assert torch.equal(open_encoder(name, size=64, pretrained=False, seed=3)(x).image, e(x).image)
    a, b, c = e.reinitialized(0), e.reinitialized(0), e.reinitialized(1)
    assert torch.equal(a(x).image, b(x).image) and not torch.allclose(a(x).image, c(x).image)
    assert (
        torch.equal(a.mean, e.mean)
        and torch.equal(a.std, e.std)
        and not a.training
        and a.spec == e.spec
    )
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    e.reinitialized(0)
    open_encoder(name, size=64, pretrained=False)
    assert torch.equal(first, torch.rand(1))
    again = load_encoder(save_encoder(e, tmp_path / 'encoder.safetensors', dict(tower='')))
    assert (
        torch.equal(again(x).image, e(x).image)
        and again.spec == e.spec
        and again.resize == e.resize
    )
    assert torch.equal(open_encoder(tmp_path)(x).image, e(x).image)
    assert architecture(e) == f'{e.spec["kind"]} {e.spec["name"]} size=64'
    assert torch.equal(copy.deepcopy(e)(x).image, e(x).image)
    with pytest.raises(ValueError, match='subset'):
        e(x, keep=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r'\(B,3,64,64\), got \(2, 3, 32, 32\)'):
        e(x[..., :32, :32])


def test_other_sizes():
    e = from_torchvision('shufflenet_v2_x0_5', 64)
    assert e.accept(96)(torch.rand(1, 3, 96, 96)).grid == (3, 3)
    v = from_timm('vit_tiny_patch16_224', 64).train()
    with pytest.raises(
        ValueError, match='timm/vit_tiny_patch16_224 cannot run on images of 96 pixels'
    ):
        v.accept(96)
    assert v.training and v.sizes == {64}


def test_gradients_reach_the_network():
    with torch.enable_grad():
        e = from_torchvision('shufflenet_v2_x0_5', 64).train()
        out = e(X)
        (out.image.sum() + out.patches.sum()).backward()
    assert all(p.grad is not None for p in e.parameters())


def test_no_patches_is_said():
    e = open_encoder('timm/pit_ti_224', pretrained=False)
    out = e(torch.rand(1, 3, 224, 224))
    assert out.image.shape == (1, e.dim) and e.grid is None
    for ask in (lambda: out.patches, lambda: out.grid):
        with pytest.raises(ValueError, match='timm/pit_ti_224 has no patches'):
            ask()


def test_knn_runs():
    g = torch.Generator().manual_seed(0)

    def split(n):
        y = torch.arange(n) % 2
        x = torch.randint(0, 100, (n, 3, 32, 32), generator=g, dtype=torch.uint8)
        x[y == 1, :, :16] += 120
        return x, y

    data = images(split(48), test=split(24))
    for name in ('timm/test_vit', 'torchvision/shufflenet_v2_x0_5'):
        e = open_encoder(name, size=32, pretrained=False, seed=1)
        record = knn(e, data, k=5)
        assert (
            record.value > 0.7
            and 'random encoder' not in record.baselines  # it is random itself: no twin
            and record.architecture == f'{e.spec["kind"]} {e.spec["name"]} size=32'
        )
    assert 'random encoder' in knn(e.reinitialized(3), data, k=5).baselines
    assert knn(e, data, k=5, layer='patch_mean', baselines=False).value > 0.7


# --- names and published weights


def test_names():
    assert library_name('timm/resnet50.a1_in1k') == ('timm', 'resnet50.a1_in1k') and library_name(
        'alexnet'
    ) == ('torchvision', 'alexnet')
    for name, word in (
        ('resnet50', "'torchvision/resnet50' or 'timm/resnet50'"),
        ('timm/resnet50.a99', 'a1_in1k'),
        ('timm/resnet_50', 'resnet50'),
        ('torchvision/resnet50.V9', 'IMAGENET1K_V2'),
        ('vit_b_61', 'torchvision/vit_b_16'),
        ('x/resnet50', "'timm' or 'torchvision'"),
        ('torchvision/fcn_resnet50', 'no image network'),
        ('torchvision/googlenet', 'no image network'),
    ):
        with pytest.raises(ValueError, match=word):
            library_name(name)


def test_published_weights_of_torchvision(monkeypatch, tmp_path):
    "The path of `pretrained=True`, with a download that is played by a random network."
    from torchvision.models import _api

    theirs = models.get_model('shufflenet_v2_x0_5').eval()
    monkeypatch.setattr(_api, 'load_state_dict_from_url', lambda *a, **k: theirs.state_dict())
    e = open_encoder('torchvision/shufflenet_v2_x0_5', size=64)
    assert e.spec['name'] == 'shufflenet_v2_x0_5.IMAGENET1K_V1' and e.card['weights'] == 'published'
    assert torch.allclose(theirs.fc(e(X).image), theirs(e.normalise(X)), atol=1e-5)
    assert not torch.allclose(e.reinitialized(0)(X).image, e(X).image)

    def fails(*a, **k):
        raise URLError('no route to host')

    monkeypatch.setattr(_api, 'load_state_dict_from_url', fails)
    with pytest.raises(FileNotFoundError, match='no route to host.*pretrained=False'):
        open_encoder('torchvision/shufflenet_v2_x0_5')


def test_published_weights_of_timm(monkeypatch, tmp_path):
    theirs = timm.create_model('test_vit').eval()
    torch.save(theirs.state_dict(), tmp_path / 'w.pth')
    e = open_encoder(
        'timm/test_vit', arch_args=dict(pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.pth')))
    )
    x = torch.rand(1, 3, 160, 160)
    assert torch.allclose(theirs.head(e(x).image), theirs(e.normalise(x)), atol=1e-5) and e.spec[
        'name'
    ].startswith('test_vit.')

    def fails(*a, **k):
        raise ConnectionError('offline')

    monkeypatch.setattr(timm, 'create_model', fails)
    with pytest.raises(FileNotFoundError, match='offline'):
        open_encoder('timm/test_vit')


# --- checkpoints


@pytest.fixture(scope='module')
def nets():
    with torch.no_grad():
        e = from_torchvision('shufflenet_v2_x0_5', 64)
        return e, e.reinitialized(1), e.reinitialized(2)


@pytest.fixture(scope='module')
def vits():
    with torch.no_grad():
        e = from_timm('test_vit', 64)
        return e, e.reinitialized(1), e.reinitialized(2)


put = lambda prefix, e: {prefix + n: v for n, v in e.net.state_dict().items()}
ARCH = 'torchvision/shufflenet_v2_x0_5'


@pytest.mark.parametrize(
    'online, target',
    [
        ('module.encoder_q.', 'module.encoder_k.'),
        ('module.base_encoder.', 'module.momentum_encoder.'),
        ('backbone.', 'momentum_backbone.'),
        ('online_network.net.', 'target_network.net.'),
        ('student.backbone.', 'teacher.backbone.'),
        ('model.', 'model_ema.'),
        ('method.trunk.encoder.net.', 'method.target.net.encoder.net.'),
        ('method.tower.encoder.net.', 'method.key_encoder.net.encoder.net.'),
    ],
)
@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
def test_towers(nets, tmp_path, online, target, suffix):
    _, a, b = nets
    path, state = (
        tmp_path / f'file{suffix}',
        put(target, b)
        | put(online, a)
        | {online + 'fc.0.weight': torch.rand(3), 'queue': torch.rand(4)},
    )
    if suffix == '.pt':
        torch.save(
            dict(
                state_dict=state,
                epoch=3,
                args=Namespace(lr=0.1),
                optimizer={'state': {0: {'exp_avg': torch.rand(2)}}},
            ),
            path,
        )
    else:
        from safetensors.torch import save_file

        save_file({k: v.clone().contiguous() for k, v in state.items()}, path)
    for tower, e, prefix in (('online', a, online), ('momentum', b, target), (target, b, target)):
        got = open_encoder(path, 64, ARCH, tower=tower)
        assert (
            torch.equal(got(X).image, e(X).image)
            and got.card['prefix'].endswith(prefix)
            and got.card['file'] == path.name
        )
        assert (
            got.tower == ('online' if tower == 'online' else 'momentum')
            and not got.training
            and got.resize == 73
        )


def test_nested_and_bare(nets, tmp_path):
    "DINO's dictionaries, a plain state dict, a path as text, channel statistics of one's own."
    _, a, b = nets
    torch.save(
        dict(
            student=put('module.backbone.', a) | {'module.head.mlp.0.weight': torch.rand(2)},
            teacher=put('backbone.', b),
        ),
        tmp_path / 'dino.pth',
    )
    assert torch.equal(
        open_encoder(str(tmp_path / 'dino.pth'), 64, ARCH, tower='momentum')(X).image, b(X).image
    )
    assert (
        open_encoder(tmp_path / 'dino.pth', 64, ARCH).card['prefix'] == 'student.module.backbone.'
    )
    torch.save(put('', a), tmp_path / 'bare.pth.tar')
    e = open_encoder(tmp_path / 'bare.pth.tar', 64, ARCH, stats=([0.5] * 3, [0.25] * 3), resize=80)
    assert (
        e.tower == ''
        and e.card['prefix'] == ''
        and e.resize == 80
        and e.reinitialized(0).resize == 80
        and torch.equal(e.mean, torch.full((3,), 0.5))
    )
    with pytest.raises(ValueError, match="got 'momentum'"):
        open_encoder(tmp_path / 'bare.pth.tar', 64, ARCH, tower='momentum')
    torch.save(put('teacher.', b), tmp_path / 'teacher.pth')
    with pytest.raises(ValueError, match=r"'teacher.' \(momentum\)"):
        open_encoder(tmp_path / 'teacher.pth', 64, ARCH)


def test_moco_v3_vit(vits, tmp_path):
    "timm's names, positions of another size, a number of heads that only the caller knows."
    _, a, b = vits
    torch.save(
        dict(
            arch='vit_small',
            state_dict=put('module.base_encoder.', a)
            | put('module.momentum_encoder.', b)
            | {
                'module.base_encoder.head.0.weight': torch.rand(4),
                'module.predictor.0.weight': torch.rand(2),
            },
        ),
        tmp_path / 'v3.pth.tar',
    )
    e = open_encoder(tmp_path / 'v3.pth.tar', 64, 'timm/test_vit', tower='momentum')
    assert (
        torch.allclose(e.set_stats(b.mean, b.std)(X).image, b(X).image)
        and 'resampled' not in e.card
    )
    assert torch.allclose(
        open_encoder(tmp_path / 'v3.pth.tar', 64, 'timm/test_vit').mean,
        torch.tensor([0.485, 0.456, 0.406]),
    )
    big = open_encoder(tmp_path / 'v3.pth.tar', 96, 'timm/test_vit')
    assert (
        big.grid == (6, 6)
        and big.card['resampled'] == ['pos_embed']
        and torch.equal(big.net.cls_token, a.net.cls_token)
    )
    one = open_encoder(tmp_path / 'v3.pth.tar', 64, 'timm/test_vit', dict(num_heads=1))
    assert (
        one.net.blocks[0].attn.num_heads == 1
        and 'num_heads=1' in architecture(one)
        and one.reinitialized(0).net.blocks[0].attn.num_heads == 1
    )


def test_heads_of_moco_v3_are_doubted(tmp_path):
    e = from_timm('vit_small_patch32_224', 64)
    torch.save(put('module.base_encoder.', e), tmp_path / 'v3.pth')
    with pytest.warns(UserWarning, match='12 heads'):
        open_encoder(tmp_path / 'v3.pth', 64, 'timm/vit_small_patch32_224')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        open_encoder(tmp_path / 'v3.pth', 64, 'timm/vit_small_patch32_224', dict(num_heads=12))


def test_refused_weights(nets, vits, tmp_path):
    e, a, b = nets
    full = a.net.state_dict()
    drop = lambda word: {n: v for n, v in full.items() if word not in n}
    cases = [
        (drop('stage4.3'), '15 missing: stage4.3'),
        (
            full | {'conv1.0.weight': torch.rand(24, 3, 5, 5)},
            r'conv1.0.weight \(24, 3, 5, 5\), needed \(24, 3, 3, 3\)',
        ),
        (
            full | {'stage4.9.branch1.0.weight': torch.rand(2)},
            'left over, so it is another architecture',
        ),
        ({'a.b': torch.rand(2)}, 'none of the 336 names'),
        ({}, 'no tensors'),
        (put('left.', a) | put('right.', b), 'does not decide'),
    ]
    for state, word in cases:
        with pytest.raises(ValueError, match=word):
            find_weights(state, e.net)
    assert find_weights(drop('num_batches_tracked'), e.net).prefix == ''  # counts are optional
    assert find_weights(put('left.', a) | put('right.', b), e.net, 'right').prefix == 'right.'
    assert find_weights(full | put('model.', a), e.net).prefix in ('', 'model.')  # the same twice
    with pytest.raises(ValueError, match='state must be a dictionary of tensors'):
        find_weights([1], e.net)
    v = vits[0]
    tokens = v.net.state_dict() | {'register_tokens': torch.rand(1, 4, 64)}
    with pytest.raises(ValueError, match='register_tokens'):
        find_weights(tokens, v.net)
    assert find_weights(v.net.state_dict() | {'mask_token': torch.rand(1, 64)}, v.net)


def test_a_deeper_network_does_not_fill_a_shallower_one():
    deep = models.resnet34().state_dict()
    with pytest.raises(ValueError, match='left over'):
        find_weights(deep, from_torchvision('resnet18', 64).net)


def test_partly_loaded_networks_stay_as_they_were(nets):
    e, before = nets[0].reinitialized(5), nets[0].reinitialized(5)
    with pytest.raises(ValueError):
        fill_encoder(e, {n: v for n, v in nets[1].net.state_dict().items() if 'stage4' not in n})
    assert all(torch.equal(v, e.state_dict()[n]) for n, v in before.state_dict().items())


def test_classifiers_may_be_in_the_file():
    "In a module that stays (VGG, ConvNeXt) a classifier is no sign of another architecture."
    for library, name, whole in (
        ('torchvision', 'mobilenet_v3_small', models.mobilenet_v3_small()),
        ('timm', 'test_convnext', timm.create_model('test_convnext')),
    ):
        e = (from_torchvision if library == 'torchvision' else from_timm)(name, 64)
        assert fill_encoder(e, whole.state_dict()).prefix == ''


def test_official_names_are_translated(tmp_path):
    "timm reads DINOv2's own names of registers, and may not resize more than positions."
    name = 'vit_small_patch14_reg4_dinov2'
    if name not in timm.list_models():
        pytest.skip('not in this timm')
    e = from_timm(name, 56, depth=1)
    state = {
        n.replace('reg_token', 'register_tokens'): v for n, v in e.net.state_dict().items()
    } | {'mask_token': torch.rand(1, 384)}
    state['pos_embed'] = torch.cat(
        [torch.zeros(1, 1, 384), state['pos_embed']], 1
    )  # theirs has a position for the class token
    found = fill_encoder(e.reinitialized(1), state)
    assert torch.equal(found.weights['reg_token'], e.net.reg_token)


def test_our_own(tmp_path):
    x = torch.rand(2, 3, 16, 16)
    for e in (vit(size=16, patch=4, width=32, depth=1, heads=2), resnet('resnet18', 16, width=8)):
        e.set_stats([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]).eval()
        save_encoder(e, tmp_path / 'encoder.safetensors', dict(tower='online', data='photos'))
        for what in (
            tmp_path,
            tmp_path / 'encoder.safetensors',
            str(tmp_path / 'encoder.safetensors'),
        ):
            got = open_encoder(what)
            assert (
                torch.equal(got(x).image, e(x).image)
                and got.tower == 'online'
                and got.card['data'] == 'photos'
            )
        twin = e.reinitialized(1).set_stats(
            [0.0] * 3, [1.0] * 3
        )  # the statistics come with the file
        assert open_encoder(tmp_path / 'encoder.safetensors', arch=twin) is twin and torch.equal(
            twin(x).image, e(x).image
        )
        torch.save(
            {'module.backbone.' + n: v for n, v in e.net.state_dict().items()},
            tmp_path / 'foreign.pt',
        )
        assert torch.equal(
            open_encoder(tmp_path / 'foreign.pt', arch=e.spec).set_stats(e.mean, e.std)(x).image,
            e(x).image,
        )
    assert open_encoder(tmp_path, size=32).grid == (4, 4)  # another size: made for it
    for kw, word in (
        (dict(size=32.0), 'size must be a whole number'),
        (dict(tower='momentum'), 'holds the online tower'),
        (dict(resize=20), 'own architecture'),
    ):
        with pytest.raises(ValueError, match=word):
            open_encoder(tmp_path, **kw)


def test_a_run_has_both_towers(pretrainer, tmp_path):
    with torch.enable_grad():
        run = pretrainer('moco_v3', epochs=1, out=tmp_path).fit()
    x = torch.rand(2, 3, 16, 16)
    for tower, e in (('online', run.encoder), ('momentum', run.momentum_encoder)):
        got = open_encoder(tmp_path, tower=tower)
        assert torch.allclose(got(x).image, e.eval()(x).image, atol=1e-5) and got.tower == tower
    online = open_encoder(tmp_path)(x).image
    assert torch.equal(
        open_encoder(tmp_path / 'checkpoint.pt')(x).image, online
    ) and not torch.allclose(online, got(x).image, atol=1e-5)


def test_modules():
    class Plain(nn.Module):
        size = 8

        def forward(self, x):
            return x.mean((2, 3))

    m = Plain()
    assert open_encoder(m) is m and m.training
    e = resnet('resnet18', 16, width=8)
    assert open_encoder(e) is e and open_encoder(e, size=16) is e

    class Map(Plain):
        def forward(self, x):
            return x

    class Fails(Plain):
        def forward(self, x):
            raise RuntimeError('no')

    for bad, kw, word in (
        (nn.Identity(), {}, '.size'),
        (e, dict(size=32), '16 pixels'),
        (Map(), {}, r'got \(1, 3, 8, 8\)'),
        (Fails(), {}, 'cannot run'),
        (e, dict(stats=([0] * 3, [1] * 3)), 'given back'),
    ):
        with pytest.raises(ValueError, match=word):
            open_encoder(bad, **kw)


class Odd:
    pass


def test_files_that_are_refused(nets, tmp_path):
    torch.save(dict(model=put('', nets[1]), extra=Odd()), tmp_path / 'odd.pt')
    with pytest.raises(
        ValueError, match=r'odd.pt is refused: .*Odd, which could run code.*weights_only=False'
    ):
        open_encoder(tmp_path / 'odd.pt', arch=ARCH)
    torch.save(torch.rand(3), tmp_path / 'tensor.pt')
    torch.save(put('', nets[1]), tmp_path / 'fine.pt')
    (tmp_path / 'text.pth').write_text('hello')
    (tmp_path / 'text.safetensors').write_text('hello')
    (tmp_path / 'empty.ckpt').write_bytes(b'')
    (tmp_path / 'cut.pt').write_bytes((tmp_path / 'fine.pt').read_bytes()[:2000])
    for name in ('tensor.pt', 'text.pth', 'text.safetensors', 'empty.ckpt', 'cut.pt'):
        with pytest.raises(ValueError, match=name):
            open_encoder(tmp_path / name, arch=ARCH)
    for what in (tmp_path / 'none.pt', 'none.pth.tar', 'runs/none', tmp_path / 'nowhere'):
        with pytest.raises(FileNotFoundError, match='no file or folder'):
            open_encoder(what, arch=ARCH)
    with pytest.raises(FileNotFoundError, match="it has .*'fine.pt'"):
        open_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match='no checkpoint at'):
        read_weights(tmp_path / 'none.pt')


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(size=0), 'size must be .* got 0'),
        (dict(size=64.0), 'size must be .* got 64.0'),
        (dict(arch_args=[1]), 'arch_args'),
        (dict(stats=(0, 1)), 'stats'),
        (dict(stats=3), 'stats'),
        (dict(stats=([0] * 3, [1] * 3, [2] * 3)), 'stats'),
        (dict(resize=-1), 'resize must be .* got -1'),
        (dict(arch='timm/test_vit'), 'for files'),
        (dict(tower='momentum'), 'for files'),
        (dict(arch_args=dict(num_classes=3)), 'num_classes'),
        (dict(arch_args=dict(hands=3)), 'hands'),
        (dict(size=65), 'a multiple of the patch side 16'),
    ],
)
def test_bad_arguments(kw, word):
    with pytest.raises(ValueError, match=word):
        open_encoder('timm/test_vit', **{'pretrained': False, **kw})


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(), 'say of which network'),
        (dict(arch='resnet50'), 'both libraries'),
        (dict(arch='timm/nothing_at_all'), 'no image network'),
        (dict(arch=nn.Identity()), 'an encoder of ours'),
        (dict(arch=ARCH, tower='encoder_m'), "tower must be .* got 'encoder_m'"),
        (dict(arch=ARCH, tower=3), 'tower must be .* got 3'),
    ],
)
def test_bad_arguments_for_files(nets, tmp_path, kw, word):
    torch.save(put('module.encoder_q.', nets[1]), tmp_path / 'f.pt')
    with pytest.raises(ValueError, match=word):
        open_encoder(tmp_path / 'f.pt', **kw)


def test_what_is_no_encoder():
    for what in (3, None, ['resnet50']):
        with pytest.raises(ValueError, match='what must be a name, a path or'):
            open_encoder(what)


def test_words_of_towers():
    told = {
        'module.encoder_q.': 'online',
        'state_dict_ema.': 'momentum',
        'teacher.backbone.': 'momentum',
        'student.': 'online',
        'net.': '',
        'quick.': '',
        'backbone_momentum.': 'momentum',
        'online_encoder.target.': '',
        'method.tower.encoder.net.': 'online',
        'method.key_encoder.net.encoder.net.': 'momentum',
        'momentum_tower.': 'momentum',
    }
    assert {p: tower_of(p) for p in told} == told


def test_kinds_are_registered():
    assert (
        interface.encoder_kinds['timm'] is from_timm
        and interface.encoder_kinds['torchvision'] is from_torchvision
    )
    assert isinstance(
        interface.build_encoder(dict(kind='timm', name='test_vit', size=64)), ExternalEncoder
    ) and 'timm' not in vars(files)

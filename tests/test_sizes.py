"Another image size at every door, half precision, and sides that are no side."

import copy

import pytest
import torch
from torch import nn
from timm.layers import resample_abs_pos_embed
from ssl_patch.data.sources import images
from ssl_patch.evaluation.features import accepted_size, as_floats, extract
from ssl_patch.evaluation.knn import knn
from ssl_patch.evaluation.linear import linear_probe_cached
from ssl_patch.evaluation.linear_probe import linear_probe
from ssl_patch.evaluation.patches import whole_features
from ssl_patch.evaluation.spread import alignment_uniformity
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.external import wrap
from ssl_patch.models.files import open_encoder, save_encoder
from ssl_patch.models.libraries import from_timm, from_torchvision
from toys import learned

X = torch.randint(
    0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)


def small_vit(**kw):
    return vit(size=16, patch=4, width=32, depth=1, heads=2, **kw)


KINDS = dict(
    vit=small_vit,
    moco_v3=lambda: small_vit(variant='moco_v3'),
    resnet=lambda: resnet('resnet18', 16, width=8),
    layer3=lambda: resnet('resnet18', 16, width=8, feature_layer='layer3'),
    timm=lambda: from_timm('vit_tiny_patch16_224', 16, depth=1),
    torchvision=lambda: from_torchvision('shufflenet_v2_x0_5', 16),
    own=lambda: wrap(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)), 16),
)


def make(kind):
    torch.manual_seed(11)
    return learned(KINDS[kind]()).set_stats([0.4, 0.5, 0.6], [0.2, 0.3, 0.2]).eval()


@pytest.fixture(scope='module')
def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 120, (60, 3, 32, 32), generator=g, dtype=torch.uint8)
    y = torch.arange(60) % 2
    x[y == 1, :, :16] += 120
    return images((x[:40], y[:40]), test=(x[40:], y[40:]))


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_an_encoder_for_another_size(kind, tmp_path):
    e, x = make(kind), X
    e.trained_on, e.tower = torch.ones(2, 2, dtype=torch.int64), 'online'
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    big = e.at_size(32)
    assert torch.equal(drawn, torch.rand(1))  # nothing random in it
    assert (big.size, big.sizes, big.spec) == (32, {32}, {**e.spec, 'size': 32})
    assert (e.size, e.sizes, e.spec['size']) == (16, {16}, 16)
    out = big(x)
    assert out.grid == big.grid and not big.training and torch.equal(big.mean, e.mean)
    assert torch.equal(big.trained_on, e.trained_on) and big.tower == 'online'
    with accepted_size(e, 32) as sized:
        assert torch.equal(sized(x).image, out.image) and torch.equal(sized(x).patches, out.patches)
    assert e.sizes == {16}
    with pytest.raises(ValueError, match=r'\(B,3,16,16\), got \(4, 3, 32, 32\)'):
        e(x)
    path = save_encoder(e, tmp_path / 'encoder.safetensors', dict(tower='online', data='photos'))
    arch = dict(arch=KINDS['own']()) if kind == 'own' else {}
    opened = open_encoder(tmp_path, size=32, **arch)
    assert torch.equal(opened(x).image, out.image) and opened.card['data'] == 'photos'
    assert torch.equal(opened(x).patches, out.patches) and opened.spec == big.spec
    again = open_encoder(
        save_encoder(opened, tmp_path / 'big.safetensors', opened.card), **arch
    )  # it is an encoder of that size now
    assert torch.equal(again(x).image, out.image) and again.size == 32
    if kind != 'own':
        assert big.reinitialized(1)(x).grid == big.grid
        torch.save({f'q.{n}': v for n, v in e.net.state_dict().items()}, tmp_path / 'w.pt')
        foreign = open_encoder(tmp_path / 'w.pt', size=32, arch=e.spec).set_stats(e.mean, e.std)
        assert torch.equal(foreign(x).image, out.image)
    assert open_encoder(path, size=16, **arch).size == 16


def test_positions_are_resampled_bicubically():
    for kind in ('vit', 'moco_v3'):
        e = make(kind)
        big = e.at_size(32)
        where = resample_abs_pos_embed(e.net.pos_embed, [8, 8], [4, 4], num_prefix_tokens=0)
        assert torch.equal(big.net.pos_embed, where)
        assert big.net.pos_embed.requires_grad == e.net.pos_embed.requires_grad == (kind == 'vit')
        assert big.net.patch_embed.grid_size == (8, 8)
        keep = torch.tensor([[3, 60]] * 4)
        assert big(X, keep).patches.shape == (4, 2, 32)
        rest = {n: v for n, v in e.state_dict().items() if 'pos' not in n}
        assert all(torch.equal(v, big.state_dict()[n]) for n, v in rest.items())


@pytest.mark.parametrize('kind', ['vit', 'resnet', 'timm', 'own'])
def test_every_door_takes_another_size(kind, data):
    "Asked for at the door, or made for it: one value."
    e = make(kind)
    big = e.at_size(32)
    probe = dict(epochs=1, batch_size=20, baselines=False)
    doors = (
        lambda e, **k: knn(e, data, k=5, baselines=False, **k).value,
        lambda e, **k: linear_probe_cached(e, data, epochs=1, baselines=False, **k).value,
        lambda e, **k: linear_probe(e, data, **probe, **k).value,
        lambda e, **k: whole_features(e, data.test.images, **k).patches,
        lambda e, **k: torch.tensor(alignment_uniformity(e, data, n=16, **k)),
    )
    for door in doors:
        a, b = torch.as_tensor(door(e, size=32)), torch.as_tensor(door(big))
        assert torch.allclose(a, b, atol=1e-5)
    assert 'random encoder' in knn(e, data, k=5, size=32).baselines


@pytest.mark.parametrize(
    'call, word',
    [
        (lambda: small_vit().at_size(30), 'size must be a multiple of the patch side 4, got 30'),
        (lambda: small_vit().accept(30), 'size must be a multiple of the patch side 4, got 30'),
        (lambda: small_vit().accept(0), 'size must be a whole number at least 1'),
        (lambda: small_vit().accept((16, 30)), r'side 4 in height and width, got \(16, 30\)'),
        (lambda: resnet('resnet18', 16, width=8).at_size(32.0), 'size must be a whole number'),
        (lambda: from_timm('test_vit', 64).accept((64, 0)), 'size must be a whole number'),
        (
            lambda: from_timm('vit_tiny_patch16_224', 16, depth=1).at_size(40),
            'a multiple of the patch side 16, got 40',
        ),
        (lambda: vit(size=(32, 60), patch=8), r'side 8 in height and width, got \(32, 60\)'),
        (lambda: vit(size=[32, 64, 3], patch=8), r'\(height, width\) of such.*\[32, 64, 3\]'),
        (lambda: vit(size='32'), "a whole number.*got '32'"),
        (lambda: vit(size=True), 'got True'),
        (lambda: vit(size=16, patch=(4, 4)), r'patch must be a whole number.*got \(4, 4\)'),
        (lambda: vit(size=16, width=(32,)), r'width must be a whole number.*got \(32,\)'),
        (lambda: vit(size=16, depth=0), 'depth must be a whole number at least 1, or None, got 0'),
        (lambda: vit(size=16, heads=2.0), 'heads must be a whole number'),
        (lambda: vit(size=16, drop_path=1.5), 'drop_path must be a number'),
        (lambda: resnet('resnet18', (32, 64.0)), r'a whole number.*got \(32, 64.0\)'),
        (lambda: resnet('resnet18', (32,)), 'a whole number'),
        (lambda: resnet('fcn_resnet50'), 'name must be one of'),
        (lambda: resnet('quantized_resnet50'), 'name must be one of'),
        (lambda: from_timm('test_vit', (64, 60)), r'side 16 in height and width, got \(64, 60\)'),
        (lambda: from_torchvision('resnet18', 64, (73, 80)), 'resize must be a whole number'),
        (lambda: open_encoder('timm/test_vit', (64, -1), pretrained=False), 'a whole number'),
        (lambda: small_vit()(torch.zeros(1, 3, 16, 32)), r'\(B,3,16,16\), got \(1, 3, 16, 32\)'),
        (lambda: small_vit()(torch.zeros(3, 16, 16)), r'one image is a batch of one: x\[None\]'),
        (lambda: small_vit()(torch.zeros(2, 16, 16, 3)), r'x.permute\(0, 3, 1, 2\)'),
        (lambda: small_vit()(torch.zeros(2, 3, 8, 8)), r'encoder.accept\(8\) takes these too'),
        (lambda: small_vit()(torch.zeros(2, 3, 16, 16, dtype=torch.int64)), 'uint8, or float in'),
    ],
)
def test_what_is_no_size(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_precision(kind, dtype, data):
    "Close to float32, and float32 comes out; its random twin has the same precision."
    e = make(kind)
    low = copy.deepcopy(e).to(dtype)
    x = X[..., :16, :16].contiguous()
    with torch.no_grad():
        assert low(x).image.dtype == dtype
        a, b = e(x).image, low(x.float() / 255).image.float()
    assert (a - b).norm() < 0.05 * a.norm() and low.mean.dtype == dtype
    z, w = extract(e, data.test)[0], extract(low, data.test)[0]
    assert w.dtype == torch.float32 and (z - w).norm() < 0.05 * z.norm()
    assert low.reinitialized(0).mean.dtype == dtype
    with torch.no_grad():
        assert low.at_size(32)(X).image.dtype == dtype
    record = knn(low, data, k=5)
    assert abs(record.value - knn(e, data, k=5, baselines=False).value) <= 0.1
    assert set(record.baselines) == {'raw pixels', 'random encoder'}


def test_precision_of_a_module_from_elsewhere(data):
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten())
    z = extract(net, data.test, size=16)[0]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = copy.deepcopy(net).to(dtype)
        assert (extract(low, data.test, size=16)[0] - z).norm() < 0.02 * z.norm()
        assert as_floats(low, X).dtype == dtype and knn(low, data, k=5, size=16).value > 0.5


def test_a_half_encoder_is_saved_and_opened(tmp_path):
    e = make('vit')
    path = save_encoder(copy.deepcopy(e).half(), tmp_path / 'e.safetensors')
    got, x = open_encoder(path), X[..., :16, :16].contiguous()
    assert got.mean.dtype == torch.float32
    with torch.no_grad():
        assert (got(x).image - e(x).image).norm() < 0.01 * e(x).image.norm()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_leaves_a_half_encoder_as_it_is(dtype, data):
    low = make('vit').to(dtype)
    assert torch.equal(extract(low, data.test, amp=True)[0], extract(low, data.test)[0])
    assert knn(low, data, k=5, amp=True, baselines=False).value > 0.5
    probe = linear_probe(low, data, epochs=1, batch_size=20, amp=True, baselines=False)
    assert probe.settings['amp']

"Images of any height and width: encoders, their files, what measures them, maps of several stages."

import pytest
import torch
from torch import nn
from timm.layers import resample_abs_pos_embed
from ssl_patch.cli import main
from ssl_patch.data.images import resize_center_crop
from ssl_patch.data.sources import images
from ssl_patch.evaluation.features import RawPixels, extract
from ssl_patch.evaluation.knn import knn
from ssl_patch.evaluation.linear_probe import linear_probe
from ssl_patch.evaluation.patches import linear_segmentation, whole_features
from ssl_patch.methods.moco import MoCoV2
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.external import wrap
from ssl_patch.models.files import open_encoder, save_encoder
from ssl_patch.models.libraries import from_timm, from_torchvision
from ssl_patch.transfer.finetune import FineTuner
from ssl_patch.transfer.recipes import FinetuneConfig
from toys import learned


def pixels(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def small_vit(size=32, **kw):
    return vit(size=size, patch=8, width=32, depth=2, heads=2, **kw)


KINDS = dict(
    vit=small_vit,
    moco_v3=lambda size: small_vit(size, variant='moco_v3'),
    resnet=lambda size: resnet('resnet18', size, stem='small', width=8),
    layer3=lambda size: resnet('resnet18', size, stem='small', width=8, feature_layer='layer3'),
    timm_vit=lambda size: from_timm('vit_tiny_patch16_224', size, depth=1),
    timm=lambda size: from_timm('test_resnet', size),
    tv_vit=lambda size: from_torchvision('vit_b_16', size),
    torchvision=lambda size: from_torchvision('shufflenet_v2_x0_5', size),
    own=lambda size: wrap(nn.Conv2d(3, 8, 4, 4), size),
)


def make(kind, size=32):
    torch.manual_seed(3)
    return learned(KINDS[kind](size)).set_stats([0.4, 0.5, 0.6], [0.2, 0.3, 0.2]).eval()


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_there_and_back(kind, tmp_path):
    "A rectangle, its file, and the square again: the features follow the images."
    e, x, square = make(kind), pixels(2, 3, 32, 64), pixels(2, 3, 32, 32)
    wide = e.at_size((32, 64))
    f = wide(x)
    assert f.grid == wide.grid and f.grid[1] == 2 * f.grid[0] == 2 * e.grid[0]
    assert f.patches.shape[1] == f.grid[0] * f.grid[1]
    assert (wide.size, wide.sizes, wide.spec['size']) == ((32, 64), {(32, 64)}, (32, 64))
    for bad in (x.mT, square):
        with pytest.raises(ValueError, match=r'must be images \(B,3,32,64\), got'):
            wide(bad)
    path = save_encoder(wide, tmp_path / 'encoder.safetensors')
    given = dict(arch=KINDS['own'](32)) if kind == 'own' else {}
    opened = open_encoder(path, **given)
    assert torch.equal(opened(x).patches, f.patches)
    tall = open_encoder(path, size=(64, 32), **given)
    assert tall(x.mT).grid == f.grid[::-1] and tall.size == (64, 32)
    if kind not in ('vit', 'moco_v3', 'timm_vit', 'tv_vit'):  # nothing was resampled
        assert torch.equal(opened.at_size(32)(square).image, e(square).image)
    if kind != 'own':
        assert wide.reinitialized(1)(x).grid == f.grid
    for like in (32, (32, 32), [32, 32]):
        same = e.at_size(like)
        assert same.size == 32 and torch.equal(same(square).image, e(square).image)


@pytest.mark.parametrize('kind', ['vit', 'moco_v3'])
@torch.no_grad()
def test_positions(kind):
    e = make(kind)
    wide = e.at_size((32, 64))
    where = resample_abs_pos_embed(e.net.pos_embed, [4, 8], [4, 4], num_prefix_tokens=0)
    assert torch.equal(wide.net.pos_embed, where)
    x = pixels(2, 3, 32, 64)
    assert torch.equal(e.accept((32, 64))(x).patches, wide(x).patches)
    # as many patches, another grid: other positions
    tall = wide.at_size((64, 32))
    assert tall.net.pos_embed.shape == where.shape
    again = resample_abs_pos_embed(where, [8, 4], [4, 8], num_prefix_tokens=0)
    assert torch.equal(tall.net.pos_embed, again)
    keep = torch.tensor([[31, 0, 9]] * 2)
    assert wide(x, keep).patches.shape == (2, 3, 32)


@torch.no_grad()
def test_a_vit_agrees_with_timm_on_rectangles():
    e = make('vit', (32, 64))
    x = pixels(2, 3, 32, 64)
    theirs = e.net.forward_features(e.normalise(x))
    f = e(x)
    assert torch.allclose(theirs, torch.cat([f.image[:, None], f.patches], 1), atol=1e-5)
    net = from_timm('vit_tiny_patch16_224', (32, 64), depth=1)
    assert net.net.patch_embed.grid_size == net.grid == (2, 4)


@torch.no_grad()
def test_torchvisions_vit_is_read_as_it_computes():
    e = from_torchvision('vit_b_16', 32)
    x = pixels(1, 3, 32, 32)
    assert torch.equal(e(x).image, e.net(e.normalise(x)))


@torch.no_grad()
def test_convolutions_at_stride_alignment():
    "Far from the new border a wider image has the same cells."
    e = resnet('resnet18', 64, stem='imagenet', width=8, feature_layer='layer3').eval()
    wide = e.at_size((64, 256))
    x = pixels(1, 3, 64, 256)
    left, whole = e(x[..., :64]), wide(x)
    a = left.patches.view(4, 4, -1)
    b = whole.patches.view(4, 16, -1)[:, :4]
    assert not torch.allclose(a[:, 3], b[:, 3])  # the border is zero there, and pixels here
    m, n = e.stage_maps(x[..., :64])[0], wide.stage_maps(x)[0][..., :16]
    assert torch.allclose(m[..., :10], n[..., :10], atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_stage_maps(kind):
    e, x = make(kind, (32, 64)), pixels(2, 3, 32, 64)
    maps, f = e.stage_maps(x), e(x)
    assert len(maps) == len(e.stage_dims) == len(e.stage_strides)
    for m, dim, stride in zip(maps, e.stage_dims, e.stage_strides):
        assert m.shape == (2, dim, 32 // stride, 64 // stride)
    sides = [m.shape[2] for m in maps]
    assert sides == sorted(sides, reverse=True)
    at = maps[2] if kind == 'layer3' else maps[-1]
    assert torch.equal(at.flatten(2).mT, f.patches) and at.shape[2:] == f.grid
    if kind in ('vit', 'moco_v3', 'timm_vit', 'tv_vit', 'own'):
        assert len(maps) == 1
    if kind == 'resnet':
        assert (e.stage_strides, e.stage_dims) == ((1, 2, 4, 8), (8, 16, 32, 64))
        assert torch.equal(maps[3].mean((2, 3)), f.image)


def test_stage_maps_carry_gradients():
    for e in (make('resnet'), make('torchvision')):
        sum(m.square().mean() for m in e.stage_maps(pixels(2, 3, 32, 32))).backward()
        first = next(p for p in e.parameters())
        assert first.grad.abs().sum() > 0


def test_pretraining_asks_for_a_square():
    with pytest.raises(ValueError, match=r'square images.*at_size\(64\), got .*32x64'):
        MoCoV2(small_vit((32, 64)))


@pytest.mark.parametrize('size', [(24, 48), (48, 24), (30, 30), (20, 60)])
@pytest.mark.parametrize('resize', [None, 40])
def test_resize_and_cut(size, resize):
    x = pixels(3, 50, 70)
    y = resize_center_crop(x, size, resize)
    assert y.shape == (3, *size)
    if size[0] == size[1]:
        assert torch.equal(y, resize_center_crop(x, size[0], resize))
    assert torch.equal(resize_center_crop(x, (50, 70)), x)
    # a ramp keeps its middle in the middle
    ramp = torch.linspace(0, 250, 71).round().to(torch.uint8).expand(3, 50, 71)
    assert abs(resize_center_crop(ramp, (24, 49), resize)[0, 12, 24].item() - 125) <= 4


@pytest.fixture(scope='module')
def data():
    x, y = pixels(60, 3, 40, 80) // 2, torch.arange(60) % 2
    x[y == 1, :, :, :40] += 100
    return images((x[:40], y[:40]), test=(x[40:], y[40:]))


@pytest.mark.parametrize('kind', ['vit', 'resnet', 'timm_vit', 'own'])
def test_every_door_takes_rectangles(kind, data):
    e = make(kind)
    wide, size = e.at_size((32, 64)), (32, 64)
    assert torch.equal(extract(e, data.test, size=size)[0], extract(wide, data.test)[0])
    record = knn(wide, data, k=5)
    assert set(record.baselines) == {'raw pixels', 'random encoder'} and record.value > 0.6
    assert record.settings['size'] == (32, 64)
    assert knn(e, data, k=5, size=size, baselines=False).value == record.value
    probe = linear_probe(wide, data, epochs=1, batch_size=20)
    assert 0 <= probe.value <= 1
    f = whole_features(wide, data.test.images)
    assert f.grid == wide.grid and f.patches.shape[1] == wide.grid[0] * wide.grid[1]


def test_raw_pixels_of_a_rectangle():
    raw = RawPixels((32, 64))
    assert raw(torch.rand(2, 3, 32, 64)).shape == (2, 3 * 32 * 32) and raw.dim == 3 * 32 * 32


def test_segmentation_of_rectangles(data):
    x = data.train.images[:12]
    masks = (x.float().mean(1) > 80).long()
    record = linear_segmentation(make('vit'), (x, masks), (x, masks), 2, size=(32, 64), epochs=3)
    assert record.settings['size'] == (32, 64) and record.value > record.chance


def test_fine_tuning_of_rectangles(data):
    config = FinetuneConfig(epochs=1, batch_size=20)
    tuner = FineTuner(make('vit'), data, config, size=(32, 64), progress='quiet').fit()
    assert tuner.encoder.size == (32, 64) and 0 <= tuner.history[-1]['top1'] <= 1


def test_the_shell_probes_an_encoder_of_rectangles(data, tmp_path, capsys):
    from PIL import Image

    for part, store in (('train', data.train), ('test', data.test)):
        for i, x in enumerate(store.images):
            folder = tmp_path / 'data' / part / f'class{int(store.labels[i])}'
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f'{i}.png')
    wide = make('vit').at_size((32, 64))
    path = str(save_encoder(wide, tmp_path / 'encoder.safetensors'))
    words = ['probe', '--encoder', path, '--data', str(tmp_path / 'data'), '--protocols', 'knn']
    main([*words, '--settings', 'knn.k=5', '--device', 'cpu'])
    value = 100 * knn(wide, data, k=5, baselines=False).value
    assert f'{value:.1f} %' in capsys.readouterr().out


def test_segmentation_keeps_to_the_resize_of_a_network(data):
    x = data.train.images[:12]
    masks = (x.float().mean(1) > 80).long()
    e = make('timm_vit', 32)  # it has a resize of its own
    assert e.resize == 35
    how = dict(epochs=3, baselines=False)
    own = linear_segmentation(e, (x, masks), (x, masks), 2, **how)
    assert own.settings['resize'] == 35 and 'middle 91% of each side' in own.note
    whole = linear_segmentation(e, (x, masks), (x, masks), 2, resize=32, **how)
    assert whole.settings['resize'] == 32 and whole.note == ''
    # the middle of images and masks, by hand
    rows, cols = round(40 * 32 / 35), round(80 * 32 / 35)
    top, left = (40 - rows) // 2, (80 - cols) // 2
    part = slice(top, top + rows), slice(left, left + cols)
    pair = x[(..., *part)], masks[(..., *part)]
    assert own.value == linear_segmentation(e, pair, pair, 2, resize=32, **how).value
    ours = linear_segmentation(make('vit'), (x, masks), (x, masks), 2, **how)
    assert 'resize' not in ours.settings and ours.note == ''
    with pytest.raises(ValueError, match='resize must be a whole number at least 32'):
        linear_segmentation(e, (x, masks), (x, masks), 2, resize=30, **how)


def test_as_many_patches_of_another_grid_are_no_match(tmp_path):
    wide = make('vit', (32, 64))
    path = save_encoder(wide, tmp_path / 'encoder.safetensors')
    for size in ((64, 32), 32):
        with pytest.raises(ValueError, match='arch must be for 32x64 pixels, as the file'):
            open_encoder(path, arch=small_vit(size))
    assert torch.equal(
        open_encoder(path, arch=small_vit((32, 64))).net.pos_embed, wide.net.pos_embed
    )

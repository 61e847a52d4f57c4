"Images of other than three bands, from files to pictures, and encoders made for them."

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as TF
from ssl_patch.cli import main
from ssl_patch.data.images import show_images
from ssl_patch.data.sources import images
from ssl_patch.evaluation.features import RawPixels, extract
from ssl_patch.evaluation.figures import show_neighbours, show_patch_pca
from ssl_patch.evaluation.knn import knn
from ssl_patch.evaluation.linear_probe import linear_probe
from ssl_patch.evaluation.patches import linear_segmentation
from ssl_patch.evaluation.spread import alignment_uniformity
from ssl_patch.methods.aps import APS
from ssl_patch.methods.moco import MoCoV2
from ssl_patch.models.channels import inflated
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.external import wrap
from ssl_patch.models.files import load_encoder, open_encoder, save_encoder
from ssl_patch.models.libraries import from_timm, from_torchvision
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.transfer.finetune import FineTuner
from ssl_patch.transfer.recipes import FinetuneConfig
from ssl_patch.views.augmentations import aug_byol_b, aug_moco_v2, make_view, photometric
from ssl_patch.views.color import brightness, color_jitter, contrast, grayscale, hue, saturation
from ssl_patch.views.loader import ViewLoader


def pixels(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def own(size=32, channels=3):
    return wrap(nn.Conv2d(channels, 8, 4, 4), size, channels=channels)


KINDS = dict(
    vit=lambda **k: vit(size=32, patch=8, width=32, depth=1, heads=2, **k),
    moco_v3=lambda **k: vit(size=32, patch=8, width=32, depth=1, heads=2, variant='moco_v3', **k),
    resnet=lambda **k: resnet('resnet18', 32, width=8, **k),
    imagenet=lambda **k: resnet('resnet18', 32, stem='imagenet', width=8, **k),
    timm=lambda **k: from_timm('test_resnet', 32, **k),
    timm_vit=lambda **k: from_timm('test_vit', 32, **k),
    torchvision=lambda **k: from_torchvision('shufflenet_v2_x0_5', 32, **k),
    own=own,
)


def make(kind, **k):
    torch.manual_seed(3)
    return KINDS[kind](**k).eval()


@pytest.mark.parametrize('channels', [1, 2, 4])
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_encoders_and_their_files(kind, channels, tmp_path):
    e, x = make(kind, channels=channels), pixels(2, channels, 32, 32)
    assert e.channels == len(e.mean) == e.spec['channels'] == channels
    e.set_stats([0.4] * channels, [0.2] * channels)
    f = e(x)
    assert f.grid == e.grid and f.image.isfinite().all()
    path = save_encoder(e, tmp_path / 'encoder.safetensors')
    given = dict(arch=own(channels=channels)) if kind == 'own' else {}
    opened = open_encoder(path, **given)
    assert torch.equal(opened(x).image, f.image) and opened.spec == e.spec
    assert e.at_size(64)(pixels(2, channels, 64, 64)).image.isfinite().all()
    if kind != 'own':
        twin = e.reinitialized(1)
        assert twin.channels == channels and twin(x).image.shape == f.image.shape
    assert e.stage_maps(x)[-1].shape[0] == 2
    for bad in (pixels(2, 5, 32, 32), pixels(2, 32, 32, channels)):
        with pytest.raises(ValueError, match=rf'must be images \(B,{channels},32,32\), got'):
            e(bad)


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_inflating(kind, tmp_path):
    "Equal bands say the same whatever their number; three bands stay as they are, to the bit."
    e, grey = make(kind).set_stats([0.4] * 3, [0.2] * 3), pixels(2, 1, 32, 32)
    f = e(grey.expand(-1, 3, -1, -1))
    for channels in (1, 2, 4, 7):
        new = e.with_channels(channels)
        g = new(grey.expand(-1, channels, -1, -1))
        assert torch.allclose(g.image, f.image, atol=1e-4)
        assert new.spec == {**e.spec, 'channels': channels} and e.channels == 3
    same, x = e.with_channels(3), pixels(2, 3, 32, 32)
    assert torch.equal(same(x).image, e(x).image) and same.spec == e.spec
    path = save_encoder(e, tmp_path / 'encoder.safetensors')
    if kind != 'own':
        four = open_encoder(path, channels=4)
        assert torch.equal(
            four(pixels(2, 4, 32, 32)).image, e.with_channels(4)(pixels(2, 4, 32, 32)).image
        )


def test_the_rule_of_inflating():
    w = torch.rand(5, 3, 2, 2)
    assert torch.equal(inflated(w, 3), w)
    assert torch.allclose(inflated(w, 1)[:, 0], w.sum(1))
    assert torch.allclose(inflated(w, 6), w.mean(1, keepdim=True).expand(-1, 6, -1, -1) * 3 / 6)


def test_random_networks_do_not_begin_with_copies():
    for kind in ('vit', 'resnet', 'timm', 'torchvision'):
        e = make(kind, channels=4)
        w = next(m for m in e.modules() if isinstance(m, nn.Conv2d)).weight
        assert w.shape[1] == 4 and not torch.allclose(w[:, 0], w[:, 1])
        three = next(m for m in make(kind).modules() if isinstance(m, nn.Conv2d)).weight
        assert 0.6 < w.std() / three.std() < 1.2


@pytest.mark.parametrize(
    'mean, std',
    [
        ([0.4] * 3, [0.2, 0.0, 0.2]),
        ([0.4] * 3, [0.2, -0.1, 0.2]),
        ([0.4] * 3, [0.2, float('nan'), 0.2]),
        ([0.4, float('inf'), 0.4], [0.2] * 3),
        ([0.4] * 4, [0.2] * 4),
        (['a', 'b', 'c'], [0.2] * 3),
        (None, [0.2] * 3),
    ],
)
def test_statistics_that_are_none(mean, std, tmp_path):
    e = make('resnet')
    before = e.mean.clone(), e.std.clone()
    with pytest.raises(ValueError, match='3 finite numbers each, std above 0'):
        e.set_stats(mean, std)
    assert torch.equal(e.mean, before[0]) and torch.equal(e.std, before[1])
    with pytest.raises(ValueError, match='finite numbers each, std above 0'):
        open_encoder(save_encoder(e, tmp_path / 'e.safetensors'), stats=(mean, std))
    e.std[1] = 0
    with pytest.raises(ValueError, match='e.safetensors: its statistics: .* std above 0'):
        load_encoder(save_encoder(e, tmp_path / 'e.safetensors'))


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_light_is_changed_and_colour_stays(channels):
    x = torch.rand(6, channels, 8, 8)
    assert torch.allclose(brightness(x, 0.5), x * 0.5)
    if channels == 1:
        assert torch.allclose(contrast(x, 0.5), TF.adjust_contrast(x, 0.5), atol=1e-6)
    if channels != 3:
        mean = x.mean((1, 2, 3), keepdim=True)
        assert torch.allclose(contrast(x, 1.4), (mean + 1.4 * (x - mean)).clamp(0, 1), atol=1e-6)
        for op in (lambda x: saturation(x, 0.5), lambda x: hue(x, 0.1), grayscale):
            with pytest.raises(ValueError, match=r'\(B,3,H,W\)'):
                op(x)
    factors = torch.tensor([[0.7, 1.3, 0.2, 0.3]] * 6)
    order = torch.stack([torch.randperm(4) for _ in range(6)])
    if channels != 3:
        for i in range(6):
            y = x[i : i + 1]
            for op in order[i].tolist():
                y = brightness(y, 0.7) if op == 0 else contrast(y, 1.3) if op == 1 else y
            assert torch.allclose(color_jitter(x, factors, order)[i : i + 1], y, atol=1e-6)


@pytest.mark.parametrize('channels', [1, 2, 4])
def test_views_of_bands(channels):
    x, g = pixels(8, channels, 40, 40), torch.Generator().manual_seed(0)
    view = make_view(x, aug_byol_b(32), g, channels)
    assert view.x.shape == (8, channels, 32, 32)
    assert photometric(view.x, aug_moco_v2(32), g).shape == view.x.shape
    with pytest.raises(ValueError, match=rf'colour images \(B,3,H,W\).*channels={channels}'):
        make_view(x, aug_byol_b(32), g)
    with pytest.raises(ValueError, match='channels come before'):
        make_view(pixels(8, 40, 40, channels), aug_byol_b(32), g, channels)
    # the same boxes and numbers as of three bands: one seed, one geometry
    like = make_view(pixels(8, 3, 40, 40), aug_byol_b(32), torch.Generator().manual_seed(0))
    assert torch.equal(like.box, view.box) and torch.equal(like.flip, view.flip)


def test_the_loader_says_what_it_leaves_out():
    x = pixels(16, 4, 32, 32)
    with pytest.warns(UserWarning, match='images of 4 bands have no saturation, hue, grey') as told:
        loader = ViewLoader(x, [aug_moco_v2(32)] * 2, 8)
    assert len(told) == 1 and loader.channels == 4
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ViewLoader(x, aug_moco_v2(32, jitter=(0.4, 0.4, 0.0, 0.0), gray_p=0.0), 8)
        ViewLoader(pixels(16, 3, 32, 32), aug_moco_v2(32), 8)
        views, _ = next(iter(loader.epoch(0)))
    assert views[0].x.shape == (8, 4, 32, 32)


def bands(n, channels=4, size=32, seed=0):
    "Images whose last band alone tells the class."
    x, y = pixels(n, channels, size, size, seed=seed) // 2, torch.arange(n) % 2
    x[y == 1, -1] += 120
    return x, y


@pytest.fixture(scope='module')
def data():
    return images(bands(96), test=bands(40, seed=1), channels=4)


@pytest.mark.filterwarnings('ignore:images of 4 bands have no')
def test_a_run_on_bands_and_its_measures(data, tmp_path):
    torch.manual_seed(0)
    how = dict(epochs=1, batch_size=32, progress='quiet', device='cpu', workers=0)
    with pytest.raises(ValueError, match=r'3 bands, as the encoder takes.*with_channels\(4\)'):
        Pretrainer(MoCoV2(make('resnet')), data, **how)
    run = Pretrainer(MoCoV2(make('resnet', channels=4)), data, out=tmp_path, **how).fit()
    assert torch.allclose(run.encoder.mean, data.mean) and run.encoder.std.shape == (4,)
    e = open_encoder(tmp_path)
    record = knn(e, data, k=5)
    assert set(record.baselines) == {'raw pixels', 'random encoder'}
    assert record.baselines['raw pixels'] == 1  # it sees the fourth band
    assert linear_probe(e, data, epochs=1, batch_size=32, baselines=False).value >= 0
    assert all(np.isfinite(v) for v in alignment_uniformity(e, data, n=16))
    with pytest.raises(ValueError, match=r'3 bands, as the encoder takes'):
        extract(make('resnet'), data.test)
    aps = Pretrainer(APS(make('vit', channels=4)), data, **how).fit()
    assert np.isfinite(aps.history[-1]['loss'])


def test_fine_tuning_on_bands(data):
    tuner = FineTuner(
        make('vit', channels=4), data, FinetuneConfig(epochs=2, batch_size=16), progress='quiet'
    )
    assert tuner.fit().encoder.channels == 4
    config = FinetuneConfig(epochs=1, batch_size=16, rand_augment='rand-m9-mstd0.5-inc1')
    with pytest.raises(ValueError, match='rand_augment must be None for images of 4 bands'):
        FineTuner(make('vit', channels=4), data, config, progress='quiet')


def test_segmentation_of_bands(data):
    x = data.train.images[:12]
    masks = (x[:, 3] > 120).long()
    record = linear_segmentation(make('vit', channels=4), (x, masks), (x, masks), 2, epochs=3)
    assert 'raw pixels' in record.baselines and 0 <= record.value <= 1


def test_pictures_and_raw_pixels():
    for channels in (1, 2, 4):
        assert show_images(pixels(4, channels, 16, 16)).axes
    # matplotlib would take a fourth band for opacity
    x = pixels(2, 4, 32, 32)
    e = make('vit', channels=4)
    drawn = show_patch_pca(e, x).axes[0].get_images()[0].get_array()
    assert np.allclose(drawn, x[0, :3].permute(1, 2, 0).numpy() / 255)
    for channels in (1, 2, 4):
        pair = [(bands(20, channels, seed=s)) for s in (0, 1)]
        data = images(pair[0], test=pair[1], channels=channels)
        assert data.train.channels == channels
        assert show_neighbours(make('vit', channels=channels), data, k=2).axes
    raw = RawPixels(16, torch.rand(4), torch.ones(4))
    assert raw(torch.rand(2, 4, 16, 16)).shape == (2, 4 * 256) and raw.channels == 4


def test_the_shell_from_tiffs_of_four_bands(tmp_path, capsys):
    tifffile = pytest.importorskip('tifffile')
    for part, n in (('train', 48), ('test', 16)):
        for i, (x, y) in enumerate(zip(*bands(n))):
            folder = tmp_path / 'data' / part / f'class{y}'
            folder.mkdir(parents=True, exist_ok=True)
            x[0, 0, 0], x[0, 0, 1] = i, 99 * (part == 'test')
            how = dict(photometric='rgb', planarconfig='contig', extrasamples=['unspecified'])
            tifffile.imwrite(folder / f'{i}.tif', x.permute(1, 2, 0).numpy(), **how)
    data, out = str(tmp_path / 'data'), str(tmp_path / 'run')
    small = '--encoder resnet18 --width 8 --size 32 --epochs 1 --batch-size 16 --device cpu'
    pretrain = ['pretrain', '--method', 'moco_v2', '--data', data, '--out', out, *small.split()]
    assert refused(pretrain, capsys) and '4 bands' in capsys.readouterr().err + refused.told
    with pytest.warns(UserWarning, match='images of 4 bands have no'):
        main([*pretrain, '--channels', '4'])
    assert open_encoder(out).channels == 4
    main(['probe', out, '--protocols', 'knn', '--settings', 'knn.k=5', '--device', 'cpu'])
    told = capsys.readouterr().out
    assert 'knn' in told.lower() and 'raw pixels' in told
    probe = [
        'probe',
        '--data',
        data,
        '--protocols',
        'knn',
        '--settings',
        'knn.k=5',
        '--device',
        'cpu',
    ]
    main([*probe, '--encoder', 'timm/test_resnet', '--random', '--size', '32', '--channels', '4'])
    assert 'raw pixels' in capsys.readouterr().out
    assert refused([*probe, out, '--channels', '4'], capsys) and '--channels is for' in refused.told


def refused(words, capsys):
    "Whether the shell refuses these words; what it says is kept."
    with pytest.raises(SystemExit) as e:
        main(words)
    refused.told = capsys.readouterr().err
    return e.value.code == 2


def test_names_in_reprs_are_plain():
    x = pixels(4, 3, 8, 8)
    data = images((x, [0, 1, 0, 1], ['\x1b[31mred', 'line\nbreak']))
    data.name, data.train.name, data.note = 'da\x1bta', 'st\rore', 'no\x07te'
    text = repr(data)
    assert all(c.isprintable() or c == '\n' for c in text)
    lines = text.splitlines()
    assert r'\x1b[31mred, line\nbreak' in text and r'da\x1bta' in lines[0]
    assert r'st\rore' in text and r'no\x07te' in lines[-1]


def test_stores_of_rectangles(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.fromarray(pixels(40, 70, 3, seed=i).numpy()).save(tmp_path / f'{i}.png')
    held = images(tmp_path, size=(24, 48))
    streamed = images(tmp_path, size=(24, 48), stream=True)
    assert held.train.images.shape == (3, 3, 24, 48) and '24x48 pixels' in repr(held)
    assert torch.equal(streamed.train[1], held.train[1]) and '24x48 pixels' in repr(streamed)
    with pytest.raises(ValueError, match=r'size must be a whole number .*photos are squares'):
        images('photos', size=(24, 48))
    with pytest.raises(ValueError, match=r'\(height, width\) of such'):
        images(tmp_path, size=(24, 0))

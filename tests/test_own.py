"Networks of one's own: any module that maps images to vectors or to a map is an encoder."

import pytest
import torch
from torch import nn
from ssl_patch.data.sources import images
from ssl_patch.evaluation.features import extract
from ssl_patch.evaluation.knn import knn
from ssl_patch.methods.compose import build_method
from ssl_patch.methods.moco import MoCoV2
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.external import wrap
from ssl_patch.models.files import open_encoder, save_encoder
from ssl_patch.models.interface import Features, ImageOnly
from ssl_patch.training.pretrain import Pretrainer


class Net(nn.Module):
    "Two convolutions, and a parameter that no layer of PyTorch's owns."

    def __init__(self, gives='vector'):
        super().__init__()
        first, second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1)
        self.body = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), second)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.gives = gives

    def forward(self, x):
        m = self.body(x) * self.scale[:, None, None]
        cells, grid = m.flatten(2).transpose(1, 2), tuple(m.shape[2:])
        return dict(
            vector=lambda: m.mean((2, 3)),
            map=lambda: m,
            features=lambda: Features(m.amax((2, 3)), cells, grid),
            image_only=lambda: ImageOnly(m.mean((2, 3)), 'no map'),
            no_patches=lambda: Features(m.mean((2, 3)), None, None),
            tokens=lambda: cells,
            two=lambda: (m, m),
            squeezed=lambda: m.mean((2, 3)).squeeze(),
            wrong_grid=lambda: Features(m.mean((2, 3)), cells, (3, 3)),
            one_number=lambda: m.mean(),
        )[self.gives]()


X = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    'gives, patches',
    [('vector', 0), ('map', 16), ('features', 16), ('image_only', 0), ('no_patches', 0)],
)
def test_what_a_network_gives(gives, patches):
    net = Net(gives).eval()
    e = wrap(net, 16)
    out = e(X)
    assert e.dim == 6 and e.net is net and not e.training and out.image.shape == (3, 6)
    assert out.has_patches == bool(patches) and (e.grid, e.patch_dim) == (
        ((4, 4), 6) if patches else (None, None)
    )
    given = net(X)
    image = given.mean((2, 3)) if gives == 'map' else getattr(given, 'image', given)
    assert torch.equal(out.image, image)
    assert torch.allclose(e((X * 255).round().byte()).image, e((X * 255).round() / 255).image)
    if patches:
        assert torch.equal(out.patches[:, 5], net.body(X)[:, :, 1, 1] * net.scale)
        assert e.at_size(32).grid == (8, 8) and out.rows(torch.tensor([2, 0])).patches.shape[0] == 2
    else:
        with pytest.raises(ValueError, match='Net has no patches'):
            out.patches


@pytest.mark.parametrize(
    'call, word',
    [
        (lambda: wrap(Net('tokens'), 16), r'what it gives must be vectors .*got \(2, 16, 6\)'),
        (lambda: wrap(Net('two'), 16), 'or Features.image, patches, grid., got tuple'),
        (lambda: wrap(Net('one_number'), 16), r'got \(\)'),
        (lambda: wrap(Net('wrong_grid'), 16), 'those of its grid, 3 x 3, got 16'),
        (lambda: wrap(Net, 16), 'net must be a network, built.*got Net'),
        (lambda: wrap(vit(size=16, patch=8, width=16, depth=1, heads=1), 16), 'not an encoder yet'),
        (lambda: wrap(Net()), 'size must be a whole number'),
        (lambda: wrap(Net(), (16, -1)), r'a whole number .*, got \(16, -1\)'),
        (lambda: wrap(Net(), 16, stats=(0, 1)), 'stats must be'),
        (lambda: wrap(nn.Linear(7, 3), 16), 'Linear cannot run on images of 16 pixels'),
        (lambda: wrap(nn.Conv2d(1, 4, 3), 16), 'Conv2d cannot run on images of 16 pixels'),
        (lambda: wrap(Net('squeezed'), 16)(X[:1]), r'got \(6,\)'),
        (lambda: MoCoV2(Net()), r'wrap\(net, size=...\).*got Net, which has no .size, .dim'),
        (lambda: build_method('moco_v3', Net()), r'wrap\(net, size=...\)'),
        (lambda: open_encoder(Net()), r'as `.size` \(or size=: wrap'),
        (lambda: extract(Net('map'), noise_data().train, size=16), r'wrap\(net, size=...\) makes'),
    ],
)
def test_what_is_missing_is_said(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_a_random_twin():
    "Every weight is another one, also those that no layer draws; the network stays."
    e = wrap(Net('map'), 16, stats=([0.4] * 3, [0.2] * 3))
    e.trained_on, e.tower = torch.zeros(2, 2, dtype=torch.int64), 'online'
    before = {n: v.clone() for n, v in e.state_dict().items()}
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    a, b, c = e.reinitialized(0), e.reinitialized(0), e.reinitialized(1)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(a(X).image, b(X).image) and not torch.equal(a(X).image, c(X).image)
    assert not torch.equal(a.net.scale, e.net.scale)
    assert torch.equal(a.net.scale.sort().values, e.net.scale.sort().values)
    assert torch.equal(a.mean, e.mean) and a.trained_on is None and a.tower == ''
    assert all(torch.equal(v, before[n]) for n, v in e.state_dict().items())


def noise_data(n=48):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 100, (n, 3, 16, 16), generator=g, dtype=torch.uint8)
    y = torch.arange(n) % 2
    x[y == 1, :, :8] += 120
    return images((x[: n // 2], y[: n // 2]), test=(x[n // 2 :], y[n // 2 :]))


@pytest.mark.parametrize('name', ['moco_v1', 'moco_v2', 'moco_v3', 'ressl', 'co2', 'sce'])
def test_without_patches_it_trains_with_every_loss_that_needs_none(name, tmp_path):
    "Trained, saved, opened again with the same class, both towers, probed, at another size too."
    torch.manual_seed(0)
    small = dict(hidden=16, out=8) if name == 'moco_v3' else {}
    method = build_method(name, wrap(Net(), 16), **small)
    data = noise_data()
    how = dict(epochs=1, batch_size=16, progress='quiet', knn_every=0)
    run = Pretrainer(method, data, out=tmp_path / 'run', **how).fit()
    got = open_encoder(tmp_path / 'run', arch=Net())
    assert torch.equal(got(X).image, run.encoder.eval()(X).image) and got.tower == 'online'
    assert got.card['data'] and torch.equal(got.trained_on, data.train.fingerprints())
    assert torch.equal(got.mean, run.encoder.mean)
    momentum = open_encoder(tmp_path / 'run', arch=Net(), tower='momentum')
    assert torch.equal(momentum(X).image, run.momentum_encoder.eval()(X).image)
    record = knn(got, data, k=3)
    assert record.architecture == 'own Net size=16' and set(record.baselines) == {
        'raw pixels',
        'random encoder',
    }
    assert knn(open_encoder(tmp_path / 'run', 32, arch=Net()), data, k=3).settings['size'] == 32
    with pytest.raises(ValueError, match='a network of your own, has its weights alone'):
        open_encoder(tmp_path / 'run')
    with pytest.raises(ValueError, match='encoder.safetensors: .*missing'):
        open_encoder(tmp_path / 'run', arch=nn.Sequential(*Net().body, nn.Conv2d(6, 6, 1)))


@pytest.mark.parametrize('name', ['densecl', 'repco', 'local_to_global', 'aps'])
def test_what_needs_patches_says_so(name):
    with pytest.raises(ValueError, match='one with patches|cannot run on some of its patches'):
        build_method(name, wrap(Net(), 16))
    if name != 'aps':
        method = build_method(name, wrap(Net('map'), 16))
        assert method.encoder.patch_dim == 6


def test_a_module_with_the_whole_interface_is_taken_as_it_is(tmp_path):
    class Fitted(Net):
        size, dim, patch_dim, grid, drops_patches = 16, 6, 6, (4, 4), False

        def forward(self, x, keep=None):
            return super().forward(x)

    net = Fitted('features')
    how = dict(epochs=1, batch_size=16, progress='quiet')
    Pretrainer(MoCoV2(net), noise_data(), out=tmp_path / 'run', **how).fit()
    got = open_encoder(tmp_path / 'run', arch=Fitted('features'))
    assert torch.equal(got(X).image, net.eval()(X).image) and got.trained_on is not None
    assert torch.equal(
        open_encoder(tmp_path / 'run/checkpoint.pt', arch=net)(X).image, got(X).image
    )


def test_a_module_opens_with_a_size():
    e = open_encoder(Net('map'), size=16, stats=([0.5] * 3, [0.5] * 3))
    assert e.grid == (4, 4) and torch.equal(e.std, torch.full((3,), 0.5))


def test_a_foreign_checkpoint_fills_a_network_of_ones_own(tmp_path):
    trained = Net()
    torch.save(
        dict(state_dict={f'q.{n}': v for n, v in trained.state_dict().items()}), tmp_path / 'a.pt'
    )
    e = open_encoder(tmp_path / 'a.pt', size=16, arch=Net())
    assert torch.equal(e(X).image, trained.eval()(X))
    with pytest.raises(ValueError, match='or your network with size='):
        open_encoder(tmp_path / 'a.pt', arch=Net())


def test_files_of_other_kinds_open_as_before(tmp_path):
    "A spec of ours beside a network that is given: the network is filled, the card is kept."
    e = resnet('resnet18', 16, width=8).eval()
    save_encoder(e, tmp_path / 'e.safetensors', dict(tower='momentum', data='photos'))
    twin = e.reinitialized(1)
    got = open_encoder(tmp_path / 'e.safetensors', arch=twin, tower='momentum')
    assert got is twin and got.card['data'] == 'photos' and got.tower == 'momentum'
    with pytest.raises(ValueError, match='holds the momentum tower'):
        open_encoder(tmp_path / 'e.safetensors', arch=twin)

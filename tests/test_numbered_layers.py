"Checkpoints of nn.Sequential(*list(net.children())[:-1]): numbers in place of names."

import pytest
import timm
import torch
from torch import nn
from torchvision import models
from ssl_patch.models.encoders import resnet
from ssl_patch.models.files import open_encoder
from ssl_patch.models.weights import find_weights

X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def cut(net, end=-1):
    return nn.Sequential(*list(net.children())[:end]).eval()


def resnet18(seed=0):
    torch.manual_seed(seed)
    return models.resnet18().eval()


def opened(path, state, arch='torchvision/resnet18', **kw):
    torch.save(state, path)
    return open_encoder(path, 64, arch, **kw)


@pytest.mark.parametrize(
    'name, end',
    [
        ('torchvision/resnet18', -1),
        ('torchvision/resnet18', -2),
        ('torchvision/resnet18', None),
        ('torchvision/densenet121', -1),
        ('torchvision/mobilenet_v2', -1),
        ('torchvision/shufflenet_v2_x0_5', -1),
        ('timm/test_resnet', -1),
        ('timm/resnet18', -2),
    ],
)
@torch.no_grad()
def test_every_network_that_is_a_row_of_layers(name, end, tmp_path):
    library, _, short = name.partition('/')
    torch.manual_seed(0)
    net = (timm.create_model if library == 'timm' else models.get_model)(short).eval()
    state = {f'backbone.{n}': v for n, v in cut(net, end).state_dict().items()}
    e = opened(tmp_path / 'a.ckpt', dict(state_dict=state | dict(queue=torch.rand(3))), name)
    out = e(X)
    whole = e.net.state_dict()
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in whole.items())
    assert out.image.shape == (2, e.dim) and e.card['prefix'] == 'state_dict.backbone.'


@torch.no_grad()
def test_the_same_features(tmp_path):
    net = resnet18()
    e = opened(tmp_path / 'a.pt', cut(net).state_dict())
    assert torch.allclose(e(X).image, cut(net)(e.normalise(X)).flatten(1), atol=1e-5)


@torch.no_grad()
def test_towers_and_heads_beside_them(tmp_path):
    a, b = resnet18(0), resnet18(1)
    state = {f'online.{n}': v for n, v in cut(a).state_dict().items()}
    state |= {f'target.{n}': v for n, v in cut(b).state_dict().items()}
    state |= {f'projection_head.layers.{i}.weight': torch.rand(8, 8) for i in (0, 3)}
    for tower, net in (('online', a), ('momentum', b), ('target', b)):
        e = opened(tmp_path / 'a.pt', state, tower=tower)
        assert torch.equal(e.net.conv1.weight, net.conv1.weight)
        assert e.tower == ('online' if tower == 'online' else 'momentum')


@torch.no_grad()
def test_ours_without_the_pooling_of_its_stem(tmp_path):
    "A stem without max-pooling shifts the numbers; a file sorts them as text."
    e = resnet('resnet18', 64, stem='small', width=8).eval()
    layers = [m for m in e.net.children() if not isinstance(m, nn.Identity)]
    state = nn.Sequential(*layers).state_dict()
    state = {n: state[n] for n in sorted(state)}
    twin = e.reinitialized(1)
    torch.save(state, tmp_path / 'a.pt')
    assert torch.equal(open_encoder(tmp_path / 'a.pt', arch=twin)(X).image, e(X).image)


def test_what_does_not_fit_says_what(tmp_path):
    net = resnet18()
    deep = cut(models.resnet34()).state_dict()
    with pytest.raises(ValueError, match=r'left over.*layer1\.2\.conv1'):
        opened(tmp_path / 'a.pt', deep)
    with pytest.raises(ValueError, match=r'missing: layer1\.2\.conv1'):
        opened(tmp_path / 'a.pt', cut(net).state_dict(), 'torchvision/resnet34')
    small = resnet('resnet18', 64, stem='small', width=64).net
    with pytest.raises(ValueError, match=r'conv1.weight \(64, 3, 3, 3\), needed \(64, 3, 7, 7\)'):
        opened(tmp_path / 'a.pt', cut(small).state_dict())
    lacking = {n: v for n, v in cut(net).state_dict().items() if not n.startswith('7.')}
    with pytest.raises(ValueError):
        opened(tmp_path / 'a.pt', lacking)
    more = cut(net).state_dict() | {'11.conv.weight': torch.rand(3, 3, 1, 1)}
    with pytest.raises(ValueError):
        opened(tmp_path / 'a.pt', more)


def test_names_go_first():
    "A file with the network's own names is read by them, whatever numbers it has besides."
    net, other = resnet18(0), resnet18(1)
    net.fc = nn.Identity()
    state = net.state_dict() | {f'copy.{n}': v for n, v in cut(other).state_dict().items()}
    found = find_weights(state, net)
    assert found.prefix == '' and torch.equal(found.weights['conv1.weight'], net.conv1.weight)

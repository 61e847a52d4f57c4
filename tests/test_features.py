"Features of a frozen encoder: what they are, and what they must leave untouched."

import pytest
import torch
from torch import nn
from ssl_patch.models.encoders import vit
from ssl_patch.evaluation.features import extract, frozen, RawPixels
from ssl_patch.evaluation.linear import linear_probe_cached
from ssl_patch.evaluation.knn import knn
from toys import Net, make_images, make_data


def test_encoder_is_left_as_it_was():
    net = Net().train()
    net.net[1].eval()
    net.net[0].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    knn(net, make_data(), k=5)
    linear_probe_cached(net, make_data(), epochs=2)
    assert [m.training for m in net.net] == [True, False, True, True, True, True] and net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert (
        not net.net[0].weight.requires_grad
        and net.net[0].bias.requires_grad
        and all(p.grad is None for p in net.parameters())
    )


def test_modes_come_back_after_an_error():
    net = Net().train()
    with pytest.raises(RuntimeError, match='stop'):
        with frozen(net):
            raise RuntimeError('stop')
    assert all(m.training for m in net.modules()) and torch.is_grad_enabled()


@pytest.mark.parametrize('batch_size', [1, 7, 1000])
def test_features_do_not_depend_on_batches(batch_size):
    net, store = Net().train(), make_images(20)
    z, y = extract(net, store, batch_size)
    assert torch.equal(y, store.labels) and z.dtype == torch.float32
    net.eval()
    one_by_one = torch.cat([net(store[i][None].float() / 255) for i in range(20)])
    assert torch.allclose(z, one_by_one.detach(), atol=1e-6) and not z.requires_grad


def test_images_are_fitted_to_the_encoder_and_layers_picked():
    store, enc = (
        make_images(6, size=20, labels=False),
        vit('tiny', 16, 8, width=16, depth=1, heads=2),
    )
    z, y = extract(enc, store)
    p, _ = extract(enc, store, layer='patch_mean')
    out = enc.eval()(torch.cat([x for x, _ in store.batches(16, 6)]))
    assert y is None and torch.allclose(z, out.image, atol=1e-5)
    assert torch.allclose(p, out.patches.mean(1), atol=1e-5) and not torch.allclose(z, p, atol=1e-2)
    half = extract(enc, store, amp=True)[0]
    assert half.dtype == torch.float32 and 0 < (half - z).abs().max() < 0.2


def test_raw_pixels():
    x = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    plain = (
        ((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        .view(2, 3, 32, 2, 32, 2)
        .mean((3, 5))
        .flatten(1)
    )
    assert torch.allclose(RawPixels(64, mean, std)(x), plain, atol=1e-5)
    assert torch.equal(RawPixels(8)(x[..., :8, :8]), x[..., :8, :8].flatten(1))


class Broken(Net):
    def forward(self, x):
        return super().forward(x) / torch.tensor([1.0] * 5 + [0.0]) * 0


@pytest.mark.parametrize(
    'call,word',
    [
        (lambda: extract(Broken(), make_images(4)), 'not finite'),
        (lambda: extract(Net(), make_images(4), layer='cls'), 'layer'),
        (lambda: extract(Net(), make_images(4), layer='patch_mean'), 'plain tensor'),
        (lambda: extract(Net(), make_images(4), batch_size=0), 'batch_size'),
        (lambda: extract(nn.Flatten(), make_images(4)), 'size'),
        (lambda: extract(lambda x: x, make_images(4)), 'nn.Module'),
        (lambda: extract(nn.Conv2d(3, 4, 3), make_images(4), size=8), r'\(B,D\)'),
    ],
)
def test_bad_extraction(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.parametrize('size, most', [(8, 300), (32, 128), (64, 32), (224, 8)])
def test_pieces_change_nothing(size, most):
    net, x = Net(size=size), make_images(300 if size < 64 else 40, size=size)
    z = extract(net, x, batch_size=300)[0]
    assert max(net.log) == min(most, len(x))
    with torch.no_grad():
        whole = net.eval()(x.images.float() / 255)
    assert torch.allclose(z, whole, atol=1e-6)

"Encoders against timm and torchvision, and files that are not encoders."

import json
from pathlib import Path

import pytest
import torch

from ssl_patch.methods.moco import moco_v3_heads
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.interface import build_encoder
from ssl_patch.models.files import load_encoder, open_encoder, save_encoder
from ssl_patch.models.heads import mlp, mlp_heads


def test_vit_is_timms():
    torch.manual_seed(0)
    for variant in ('aps', 'moco_v3'):
        e = vit(size=16, patch=4, variant=variant, width=32, depth=2, heads=2).eval()
        x = torch.rand(3, 3, 16, 16)
        out = e(x)
        assert torch.allclose(
            e.net.forward_features(x), torch.cat([out.image[:, None], out.patches], 1), atol=1e-6
        )


def test_kept_tokens_equal_a_model_that_never_saw_the_others():
    "Attention runs among the kept tokens only: pixels of dropped patches change nothing."
    e = vit(size=16, patch=4, width=32, depth=2, heads=2)
    x = torch.rand(2, 3, 16, 16)
    y = x.clone()
    keep = torch.tensor([[0, 5], [3, 15]])
    y[0, :, :4, 4:8] = 0.0
    y[1, :, 8:12, :] = 1.0  # patches 1 and 8..11
    assert torch.equal(e(x, keep).image, e(y, keep).image)
    assert not torch.equal(e(x).image, e(y).image)


def test_gradient_reaches_kept_pixels_only():
    e = vit(size=16, patch=4, width=32, depth=2, heads=2)
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    e(x, torch.tensor([[6]])).image[:, 0].sum().backward()  # row 1, column 2
    touched = x.grad.abs().sum((0, 1)) > 0
    assert touched[4:8, 8:12].all() and touched.sum() == 16


def test_uint8_and_float_agree():
    e = vit(size=16, patch=8, width=32, depth=1, heads=2).set_stats([0.4] * 3, [0.2] * 3)
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.allclose(e(x).image, e(x.float() / 255).image, atol=1e-6)


@pytest.mark.parametrize(
    'make',
    [
        lambda: vit(size=16, patch=4, width=32, depth=1, heads=2, variant='moco_v3'),
        lambda: resnet('resnet18', 16),
    ],
)
def test_file_round_trip(make, tmp_path):
    e = make().set_stats([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]).eval()
    again = load_encoder(save_encoder(e, tmp_path / 'e.safetensors', dict(a=1)))
    x = torch.rand(2, 3, 16, 16)
    assert (
        torch.equal(again(x).image, e(x).image) and again.card == dict(a=1) and again.spec == e.spec
    )


def test_reinitialized_leaves_the_global_generator_alone():
    e = vit(size=16, patch=4, width=32, depth=1, heads=2)
    torch.manual_seed(3)
    a = torch.rand(1)
    torch.manual_seed(3)
    e.reinitialized(0)
    assert torch.equal(a, torch.rand(1))


def test_head_shapes():
    count = lambda m: sum(p.numel() for p in m.parameters())
    p, q = mlp_heads(192)
    assert (
        count(p) == 192 * 512 + 512 * 512 + 512 * 128 + 4 * 512
        and count(q) == 128 * 512 + 512 * 512 + 512 * 128 + 4 * 512
    )
    p, q = moco_v3_heads(2048, resnet=True)
    assert [m.out_features for m in [*p, *q] if isinstance(m, torch.nn.Linear)] == [
        4096,
        256,
        4096,
        256,
    ]


@pytest.mark.parametrize(
    'call, word',
    [
        (lambda: vit(size=33, patch=4), 'multiple of the patch'),
        (lambda: vit('giant'), 'giant'),
        (lambda: vit(variant='dino'), 'dino'),
        (lambda: vit(width=100, heads=3), 'heads=3'),
        (lambda: resnet('resnet19'), 'resnet19'),
        (lambda: resnet(stem='none'), 'none'),
        (lambda: mlp(8), 'dims must be at least an input and an output width'),
        (lambda: build_encoder(dict(kind='cnn')), 'cnn'),
        (
            lambda: vit(size=16, patch=4, width=32, depth=1, heads=2)(torch.rand(1, 1, 16, 16)),
            r'\(B,3,16,16\)',
        ),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_files_that_are_not_encoders(tmp_path):
    with pytest.raises(FileNotFoundError, match='no encoder file'):
        load_encoder(tmp_path / 'none')
    (tmp_path / 'text').write_text('hello')
    with pytest.raises(ValueError, match='not a safetensors file'):
        load_encoder(tmp_path / 'text')
    from safetensors.torch import save_file

    save_file(dict(a=torch.zeros(1)), tmp_path / 'plain.safetensors')
    with pytest.raises(ValueError, match='no `spec`'):
        load_encoder(tmp_path / 'plain.safetensors')


OLD = Path(__file__).parent / 'fixtures' / 'encoder_before_renames.safetensors'


def test_files_from_before_the_renames_still_open(tmp_path):
    "A file with `style` in its spec and the tower 'target': same features, today's words."
    e = load_encoder(OLD)
    x = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    assert torch.allclose(e(x).image[0], torch.tensor(e.card['features']), atol=1e-5)
    assert e.spec['variant'] == 'moco_v3' and 'style' not in e.spec
    assert e.tower == e.card['tower'] == 'momentum' and e.card['data'] == 'photos'
    assert torch.equal(e.trained_on, torch.arange(4).view(2, 2))
    assert torch.equal(open_encoder(OLD, tower='momentum')(x).image, e(x).image)
    again = load_encoder(save_encoder(e, tmp_path / 'new.safetensors', e.card))
    assert again.spec == e.spec and torch.equal(again(x).image, e(x).image)
    twin = e.reinitialized(1)
    assert twin.spec == e.spec and not torch.equal(twin.net.cls_token, e.net.cls_token)


@pytest.mark.parametrize(
    'make, old',
    [
        (lambda: vit(size=16, patch=4, width=32, depth=1, heads=2), dict(variant='style')),
        (
            lambda: resnet('resnet18', 16, width=8, feature_layer='layer3'),
            dict(feature_layer='cells'),
        ),
    ],
)
def test_words_of_old_specs(make, old, tmp_path):
    "Safetensors headers, and the spec in a checkpoint of a run, in the words of before."
    from safetensors.torch import save_file

    e, x = make().eval(), torch.rand(2, 3, 16, 16)
    spec = {old.get(k, k): v for k, v in e.spec.items()}
    header = dict(spec=json.dumps(spec), card=json.dumps(dict(tower='online')))
    save_file(
        {k: v.contiguous() for k, v in e.state_dict().items()}, tmp_path / 'e.safetensors', header
    )
    checkpoint = {f'trunk.encoder.{k}': v for k, v in e.state_dict().items()}
    checkpoint |= {f'target.net.encoder.{k}': v + 1 for k, v in e.state_dict().items()}
    torch.save(
        dict(method=checkpoint, identity=dict(encoder=json.dumps(spec))), tmp_path / 'checkpoint.pt'
    )
    for path in ('e.safetensors', 'checkpoint.pt'):
        got = open_encoder(tmp_path / path)
        assert got.spec == e.spec and got.tower == 'online'
        assert torch.equal(got(x).image, e(x).image) and torch.equal(got(x).patches, e(x).patches)
    other = open_encoder(tmp_path / 'checkpoint.pt', tower='momentum')
    assert other.tower == 'momentum' and torch.equal(other.mean, e.mean + 1)


def test_kinds_are_known_when_a_file_is_opened():
    "In a fresh process, without an import of the rooms that define them."
    import subprocess
    import sys

    code = (
        'from ssl_patch.models.files import load_encoder\n'
        'from ssl_patch.models.interface import encoder_kinds\n'
        "assert {'vit', 'resnet', 'timm', 'torchvision', 'own'} == set(encoder_kinds)"
    )
    subprocess.run([sys.executable, '-c', code], check=True)

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
from ssl_patch.models.video_encoders import tubelet_vit


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


WRONG_ROWS = dict(
    all_draws=torch.zeros(2, 4, 16, dtype=torch.long),  # as a sampler gives them
    of_one_image=torch.zeros(1, 16, dtype=torch.long),
    a_mask=torch.ones(2, 16, dtype=torch.bool),
)


@pytest.mark.parametrize('wrong', WRONG_ROWS)
def test_patches_that_are_no_row_for_each_image_are_refused(wrong):
    small = dict(width=32, depth=1, heads=2)
    e = vit(size=16, patch=4, **small), torch.rand(2, 3, 16, 16)
    clips = tubelet_vit(size=16, patch=4, frames=4, **small), torch.rand(2, 3, 4, 16, 16)
    for encoder, x in (e, clips):
        with pytest.raises(ValueError, match=r'keep must be whole numbers \(2,k\).*keep\[:, 0\]'):
            encoder(x, WRONG_ROWS[wrong])


def test_gradient_reaches_kept_pixels_only():
    e = vit(size=16, patch=4, width=32, depth=2, heads=2)
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    e(x, torch.tensor([[6]])).image[:, 0].sum().backward()  # row 1, column 2
    touched = x.grad.abs().sum((0, 1)) > 0
    assert touched[4:8, 8:12].all() and touched.sum() == 16


def test_all_patches_in_any_order_and_written_out_attention():
    e = vit('tiny', size=32, patch=4, width=96, depth=2)
    x = torch.rand(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(64)[:16] for _ in range(2)])
    f = e(x)
    assert (f.image.shape, f.patches.shape, f.grid) == ((2, 96), (2, 64, 96), (8, 8))
    assert e(x, keep).patches.shape == (2, 16, 96)
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    assert torch.allclose(e(x, order).image, f.image, atol=1e-5)
    assert torch.allclose(e.explicit_attention()(x).image, f.image, atol=1e-5)
    assert e.accept(24)(x[..., :24, :24]).grid == (6, 6)  # positions are resampled


def test_published_parameter_counts_of_aps():
    "Images of 32 pixels, patches of 2."
    counts = [sum(p.numel() for p in vit(n).parameters()) for n in ('tiny', 'small', 'base')]
    assert counts == [5_383_680, 21_384_192, 85_235_712]


def test_moco_v3_begins_frozen_and_within_its_bounds():
    e = vit(size=32, patch=8, width=64, depth=1, heads=2, variant='moco_v3')
    still = sorted(n for n, p in e.net.named_parameters() if not p.requires_grad)
    assert still == ['patch_embed.proj.bias', 'patch_embed.proj.weight', 'pos_embed']
    largest = e.net.blocks[0].attn.qkv.weight.abs().max().item()
    assert largest == pytest.approx((6 / (64 + 64)) ** 0.5, abs=1e-3)
    aps = vit(size=32, patch=8, width=64, depth=1, heads=2)
    assert aps.net.blocks[0].attn.qkv.bias is None


def test_how_residual_networks_begin():
    zero = resnet('resnet18', size=32, width=16, zero_init_residual=True)
    slim = resnet('resnet18', size=32, stem='half', width=16).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(slim(x).image, slim.net(slim.normalise(x)), atol=1e-5)
    assert slim.net.layer1[0].bn2.weight.detach().mean() == 1.0  # blocks start as torchvision's do
    for net, scale in ((zero, 0.0), (slim, 1.0)):
        assert {m.bn2.weight.detach().mean().item() for m in net.net.layer3} == {scale}
        # uniform within 1 / sqrt(27), as 27 numbers go into each output
        spread = net.net.conv1.weight.std().item()
        assert spread == pytest.approx(27**-0.5 / 3**0.5, abs=0.01)
    assert zero.spec['zero_init_residual'] is True and 'zero_init_residual' not in slim.spec


def test_grids_of_residual_networks():
    r = resnet('resnet18', size=32)
    assert (r.grid, r.at_size((32, 96)).grid) == ((4, 4), (4, 12))
    big = resnet('resnet18', size=96)
    assert big.spec['stem'] == 'imagenet'
    assert (big.eval()(torch.rand(1, 3, 96, 96)).grid, big.grid) == ((3, 3), (3, 3))
    fine = resnet('resnet18', size=32, feature_layer='layer3')
    assert (fine.grid, fine.patch_dim, fine.dim) == ((8, 8), 256, 512)


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
        (lambda: vit('huge'), "one of 'tiny', 'small' or 'base', got 'huge'"),
        (lambda: vit(size=32, patch=5), 'multiple of the patch side 5, got 32'),
        (lambda: vit(size=(32, 66), patch=4), r'side 4 in height and width, got \(32, 66\)'),
        (lambda: vit(size=32, patch=4).accept(30), 'a multiple of the patch side 4, got 30'),
        (lambda: resnet('wide_resnet50_2', width=32), 'width must be 64 for'),
        (lambda: resnet(zero_init_residual=2), 'zero_init_residual must be one of'),
        (lambda: resnet(feature_layer='layer2'), "of 'layer4' or 'layer3', got 'layer2'"),
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
        "stills = {'vit', 'resnet', 'timm', 'torchvision', 'own'}\n"
        "clips = {'slow_resnet', 'tubelet_vit', 'torchvision_video'}\n"
        'assert stills | clips == set(encoder_kinds)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)

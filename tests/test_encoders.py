"Encoders against timm and torchvision, and files that are not encoders."
import pytest, torch
from ssl_patch.encoders import aps_heads, build_encoder, load_encoder, mlp, moco_v3_heads, resnet, save_encoder, vit

def test_vit_is_timms():
    for style in ('aps', 'moco_v3'):
        e = vit(size=16, patch=4, style=style, width=32, depth=2, heads=2).eval()
        x = torch.rand(3, 3, 16, 16)
        out = e(x)
        assert torch.allclose(e.net.forward_features(x), torch.cat([out.image[:, None], out.patches], 1), atol=1e-6)

def test_kept_tokens_equal_a_model_that_never_saw_the_others():
    "Attention runs among the kept tokens only: pixels of dropped patches change nothing."
    e = vit(size=16, patch=4, width=32, depth=2, heads=2)
    x = torch.rand(2, 3, 16, 16); y = x.clone()
    keep = torch.tensor([[0, 5], [3, 15]])
    y[0, :, :4, 4:8] = 0.; y[1, :, 8:12, :] = 1. # patches 1 and 8..11
    assert torch.equal(e(x, keep).image, e(y, keep).image)
    assert not torch.equal(e(x).image, e(y).image)

def test_gradient_reaches_kept_pixels_only():
    e = vit(size=16, patch=4, width=32, depth=2, heads=2)
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    e(x, torch.tensor([[6]])).image[:, 0].sum().backward() # row 1, column 2
    touched = x.grad.abs().sum((0, 1)) > 0
    assert touched[4:8, 8:12].all() and touched.sum() == 16

def test_uint8_and_float_agree():
    e = vit(size=16, patch=8, width=32, depth=1, heads=2).set_stats([.4]*3, [.2]*3)
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.allclose(e(x).image, e(x.float()/255).image, atol=1e-6)

@pytest.mark.parametrize('make', [lambda: vit(size=16, patch=4, width=32, depth=1, heads=2, style='moco_v3'), lambda: resnet('resnet18', 16)])
def test_file_round_trip(make, tmp_path):
    e = make().set_stats([.1, .2, .3], [.4, .5, .6]).eval()
    again = load_encoder(save_encoder(e, tmp_path/'e.safetensors', dict(a=1)))
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(again(x).image, e(x).image) and again.card == dict(a=1) and again.spec == e.spec

def test_fresh_leaves_the_global_generator_alone():
    e = vit(size=16, patch=4, width=32, depth=1, heads=2)
    torch.manual_seed(3); a = torch.rand(1)
    torch.manual_seed(3); e.fresh(0)
    assert torch.equal(a, torch.rand(1))

def test_head_shapes():
    count = lambda m: sum(p.numel() for p in m.parameters())
    p, q = aps_heads(192)
    assert count(p) == 192*512 + 512*512 + 512*128 + 4*512 and count(q) == 128*512 + 512*512 + 512*128 + 4*512
    p, q = moco_v3_heads(2048, resnet=True)
    assert [m.out_features for m in [*p, *q] if isinstance(m, torch.nn.Linear)] == [4096, 256, 4096, 256]

@pytest.mark.parametrize('call, word', [
    (lambda: vit(size=33, patch=4), 'multiple of the patch'), (lambda: vit('giant'), 'giant'), (lambda: vit(style='dino'), 'dino'),
    (lambda: vit(width=100, heads=3), 'heads=3'), (lambda: resnet('resnet19'), 'resnet19'), (lambda: resnet(stem='none'), 'none'),
    (lambda: mlp(8), 'input and an output'), (lambda: build_encoder(dict(kind='cnn')), 'cnn'),
    (lambda: vit(size=16, patch=4, width=32, depth=1, heads=2)(torch.rand(1, 1, 16, 16)), r'\(B,3,16,16\)')])
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word): call()

def test_files_that_are_not_encoders(tmp_path):
    with pytest.raises(FileNotFoundError, match='no encoder file'): load_encoder(tmp_path/'none')
    (tmp_path/'text').write_text('hello')
    with pytest.raises(ValueError, match='not a safetensors file'): load_encoder(tmp_path/'text')
    from safetensors.torch import save_file
    save_file(dict(a=torch.zeros(1)), tmp_path/'plain.safetensors')
    with pytest.raises(ValueError, match='no `spec`'): load_encoder(tmp_path/'plain.safetensors')

"""Files of encoders from strangers: nothing is fetched, opened or made large because a file says
so, and whatever is odd about them ends in a `ValueError` that names the file."""

import http.server
import json
import threading

import pytest
import torch
from safetensors.torch import save_file
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.files import load_encoder, open_encoder, save_encoder
from ssl_patch.models.interface import build_encoder, check_spec, encoder_kinds, spec_fields
from ssl_patch.models.libraries import from_timm

VIT = dict(kind='vit', name='tiny', size=16, patch=4, variant='aps')
VIT |= dict(width=32, depth=1, heads=2, drop_path=0.0)
RESNET = dict(kind='resnet', name='resnet18', size=16, stem='small', width=8)
TIMM = dict(kind='timm', name='test_vit', size=64)
TORCHVISION = dict(kind='torchvision', name='resnet18', size=64)
DEEP = '[' * 50_000 + ']' * 50_000


def write(path, spec=VIT, card='{}', tensors=None):
    "A file with this header, and the tensors of the network that VIT describes."
    if tensors is None:
        torch.manual_seed(0)
        tensors = build_encoder(VIT).state_dict()
    text = spec if isinstance(spec, str) else json.dumps(spec)
    save_file(tensors, path, dict(spec=text, card=card))
    return path


def as_checkpoint(path, spec):
    text = spec if isinstance(spec, str) else json.dumps(spec)
    state = {f'method.tower.encoder.{n}': v for n, v in build_encoder(VIT).state_dict().items()}
    torch.save(dict(identity=dict(encoder=text), method=state), path)
    return path


def test_the_files_of_these_tests_open(tmp_path):
    x = torch.rand(2, 3, 16, 16)
    e = load_encoder(write(tmp_path / 'e.safetensors'))
    assert open_encoder(as_checkpoint(tmp_path / 'c.pt', VIT))(x).image.shape == e(x).image.shape


ODD_SPECS = [
    ('', 'cannot be read'),
    ('{', 'cannot be read'),
    (DEEP, 'cannot be read'),
    ('{"kind": "vit", "size": ' + '9' * 5000 + '}', 'cannot be read'),
    ('null', 'its spec must be a dict, got None'),
    ('[]', r'must be a dict, got \[\]'),
    ('"vit"', "must be a dict, got 'vit'"),
    ('3', 'must be a dict, got 3'),
    ({}, 'kind must be one of'),
    (dict(kind=['vit']), 'kind must be one of'),
    (dict(kind={}), 'kind must be one of'),
    (dict(kind='__import__'), 'kind must be one of'),
    (VIT | dict(size='16'), "size must be a whole number.* got '16'"),
    (VIT | dict(size=16.0), 'size must be a whole number.* got 16.0'),
    (VIT | dict(size=True), 'size must be a whole number.* got True'),
    (VIT | dict(size=-16), 'size must be a whole number'),
    (VIT | dict(size=[16, -16]), 'size must be a whole number'),
    (VIT | dict(size=[16, [16]]), 'size must be a whole number'),
    (VIT | dict(size=[16, 16, 16]), 'size must be a whole number'),
    (VIT | dict(size=[16, 2**20]), 'at most 2048'),
    (VIT | dict(size=[2048, 2048], patch=1, width=8192), 'more than the .* numbers that fit'),
    (VIT | dict(size=10**9), 'at most 2048'),
    (VIT | dict(width=131072), 'width must be a whole number at least 1 and at most 8192'),
    (VIT | dict(depth=10**6), 'depth must be'),
    (VIT | dict(heads=0), 'heads must be'),
    (VIT | dict(heads=3), 'width must be a multiple of heads=3'),
    (VIT | dict(drop_path=float('nan')), 'drop_path must be a number'),
    (VIT | dict(drop_path=2), 'drop_path must be a number'),
    (VIT | dict(patch=5), 'size must be a multiple of the patch side 5'),
    (VIT | dict(variant='dino'), 'variant must be one of'),
    (VIT | dict(width=8160, heads=1, depth=200), 'more than the .* numbers that fit'),
    (VIT | dict(size=2048, patch=1, width=8192), 'more than the .* numbers that fit'),
    (VIT | dict(weights='https://example.org/w.pth'), "'vit' has no option 'weights'"),
    (VIT | dict(depth=2), 'not those of its spec'),
    (RESNET | dict(name='fasterrcnn_resnet50_fpn'), 'name must be one of'),
    (RESNET | dict(name='quantized_resnet18'), 'name must be one of'),
    (RESNET | dict(stem='none'), 'stem must be one of'),
    (RESNET | dict(weights='DEFAULT'), "no option 'weights'"),
    (RESNET | dict(width=2048), 'more than the .* numbers that fit'),
    (TIMM | dict(pretrained=True), "'timm' has no option 'pretrained'"),
    (TIMM | dict(checkpoint_path='/etc/passwd'), "no option 'checkpoint_path'"),
    (TIMM | dict(pretrained_cfg_overlay=dict(file='/etc/passwd')), 'no option'),
    (TIMM | dict(pretrained_cfg=dict(url='http://127.0.0.1/')), 'no option'),
    (TIMM | dict(cache_dir='/tmp'), "no option 'cache_dir'"),
    (TIMM | dict(features_only=True), "no option 'features_only'"),
    (TIMM | dict(num_classes=10**9), "no option 'num_classes'"),
    (TIMM | dict(embed_dim=131072), 'embed_dim must be'),
    (TIMM | dict(embed_dim=8192, num_heads=1, depth=200), 'more than the .* numbers that fit'),
    (TIMM | dict(global_pool='x'), 'global_pool must be one of'),
    (TIMM | dict(name='vit_giant_patch14_dinov2'), 'more than the .* numbers that fit'),
    (TIMM | dict(name='hf-hub:someone/net'), 'no image network'),
    (TIMM | dict(name='local-dir:/tmp'), 'no image network'),
    (TIMM | dict(name=None), 'name must be the name of a network of timm'),
    (TIMM | dict(name='beit_base_patch16_224', size=2048), 'numbers that fit|cannot'),
    (dict(kind='timm', size=64), 'spec must be one that says name'),
    (TORCHVISION | dict(weights='DEFAULT'), "no option 'weights'"),
    (TORCHVISION | dict(weights_backbone='DEFAULT'), "no option 'weights_backbone'"),
    (TORCHVISION | dict(pretrained=True), "no option 'pretrained'"),
    (TORCHVISION | dict(name='maskrcnn_resnet50_fpn'), 'no image network'),
    (TORCHVISION | dict(width_per_group=10**6), 'width_per_group must be'),
    (TORCHVISION | dict(name=7), 'name must be the name'),
    (dict(kind='own', name='Net', size=16), 'a network of your own'),
    (dict(kind='own', name=['Net'], size=16), 'name must be a name'),
]


@pytest.mark.parametrize('spec, word', ODD_SPECS, ids=range(len(ODD_SPECS)))
@pytest.mark.parametrize('name', ['theirs.safetensors', 'theirs.pt'])
def test_odd_specs(spec, word, name, tmp_path):
    if name.endswith('.pt'):
        if spec == 'null':
            pytest.skip('a checkpoint of no encoder')
        path, opens = as_checkpoint(tmp_path / name, spec), [open_encoder]
        word = word.replace('not those of its spec', 'missing')
    else:
        path, opens = write(tmp_path / name, spec), [load_encoder, open_encoder]
    for opening in opens:
        with pytest.raises(ValueError, match=word) as e:
            opening(path)
        assert 'theirs' in str(e.value) and len(str(e.value)) < 2000


@pytest.mark.parametrize(
    'card, word',
    [
        ('', 'its card cannot be read'),
        ('[1]', r'its card must be a dict, got \[1\]'),
        ('null', 'its card must be a dict'),
        (DEEP, 'its card cannot be read'),
        ('{"tower": 3}', 'the tower on its card must be a word, got 3'),
        ('{"tower": null}', 'the tower on its card must be a word, got None'),
        ('{"tower": {"a": 1}}', 'the tower on its card must be a word'),
    ],
)
def test_odd_cards(card, word, tmp_path):
    path = write(tmp_path / 'theirs.safetensors', card=card)
    for call in (load_encoder, open_encoder, lambda p: open_encoder(p, arch=build_encoder(VIT))):
        with pytest.raises(ValueError, match=word) as e:
            call(path)
        assert 'theirs.safetensors' in str(e.value)


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(trained_on=torch.zeros(3)), r'fingerprints \(n,2\) int64, got \(3,\)'),
        (dict(trained_on=torch.zeros(3, 2)), r'got \(3, 2\) torch.float32'),
        ({'net.norm.weight': torch.zeros(32, dtype=torch.int64)}, 'types of its network'),
        ({'net.norm.weight': torch.zeros(33)}, 'not those of its spec'),
        ({'net.more.weight': torch.zeros(33)}, 'not those of its spec'),
        (dict(mean=torch.zeros(1)), 'not those of its spec'),
    ],
)
def test_odd_tensors(change, word, tmp_path):
    tensors = build_encoder(VIT).state_dict() | change
    path = write(tmp_path / 'theirs.safetensors', tensors=tensors)
    with pytest.raises(ValueError, match=word) as e:
        open_encoder(path)
    assert 'theirs.safetensors' in str(e.value)


@pytest.mark.parametrize(
    'identity', [3, [], 'x', dict(encoder=3), dict(encoder=[1]), dict(encoder=dict(kind='vit'))]
)
def test_odd_identities(identity, tmp_path):
    torch.save(dict(identity=identity, method={}), tmp_path / 'theirs.pt')
    with pytest.raises(ValueError, match='theirs.pt'):
        open_encoder(tmp_path / 'theirs.pt')


def test_a_nest_of_dictionaries_is_refused(tmp_path):
    nest = dict(w=torch.zeros(1))
    for _ in range(400):
        nest = dict(a=nest)
    torch.save(nest, tmp_path / 'theirs.pt')
    with pytest.raises(ValueError, match='theirs.pt'):
        open_encoder(tmp_path / 'theirs.pt', arch=VIT)


def test_no_address_is_asked_for(tmp_path, monkeypatch):
    "A file and a checkpoint that name an address and a file: neither is touched."
    asked = []

    class Note(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *a):
            pass

    server = http.server.HTTPServer(('127.0.0.1', 0), Note)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    there = dict(url=f'http://127.0.0.1:{server.server_port}/w.pth', hf_hub_id=None)
    spec = dict(kind='timm', name='test_resnet', size=32, pretrained=True)
    spec |= dict(pretrained_cfg_overlay=there)
    for path in (
        write(tmp_path / 'e.safetensors', spec, tensors=dict(x=torch.zeros(1))),
        as_checkpoint(tmp_path / 'c.pt', spec),
    ):
        with pytest.raises(ValueError, match=path.name):
            open_encoder(path)
    server.shutdown()
    assert not asked and not (tmp_path / 'home').exists()


def test_what_is_not_in_a_spec_opens_with_its_architecture(tmp_path):
    "Saved at the end of a long training, whatever was built by hand; opened with what is given."
    torch.manual_seed(0)
    e = from_timm('test_vit', 64, act_layer=torch.nn.GELU, checkpoint_path='')
    assert 'checkpoint_path' not in e.spec
    path, x = (
        save_encoder(e, tmp_path / 'mine.safetensors', dict(data='photos')),
        torch.rand(1, 3, 64, 64),
    )
    with pytest.raises(ValueError, match="mine.*no option 'act_layer'.*arch=NETWORK"):
        open_encoder(path)
    arch = from_timm('test_vit', 64, act_layer=torch.nn.GELU)
    got = open_encoder(path, arch=arch)
    assert torch.equal(got(x).image, e(x).image) and got.card['data'] == 'photos'
    huge = vit(size=2304, patch=256, width=16, depth=1, heads=1)
    save_encoder(huge, tmp_path / 'huge.safetensors')
    with pytest.raises(ValueError, match='at most 2048'):
        open_encoder(tmp_path / 'huge.safetensors')
    assert open_encoder(tmp_path / 'huge.safetensors', arch=huge) is huge


def test_every_kind_says_what_its_specs_may_say():
    assert set(spec_fields) == set(encoder_kinds)
    for spec in (VIT, RESNET, TIMM, TORCHVISION):
        assert check_spec(spec) is spec
    for e in (vit(size=16, patch=4, width=32, depth=1, heads=2), resnet('resnet18', 16, width=8)):
        assert check_spec(e.spec) and check_spec(json.loads(json.dumps(e.spec)))


def test_a_kind_without_checks_takes_plain_values_of_its_own_arguments(monkeypatch):
    class Toy(torch.nn.Module):
        def __init__(self, size, label=None):
            super().__init__()

    monkeypatch.setitem(encoder_kinds, 'toy', Toy)
    assert isinstance(build_encoder(dict(kind='toy', size=3, label='a')), Toy)
    for odd in (dict(size=[3]), dict(size=3, path='/x'), dict(size=1e9), {}, dict(size='a' * 300)):
        with pytest.raises(ValueError):
            build_encoder(dict(kind='toy', **odd))


def test_building_within_bounds_changes_nothing():
    "The same weights, with a bound and without."
    for spec in (VIT, RESNET, TIMM):
        torch.manual_seed(0)
        a = build_encoder(spec)
        torch.manual_seed(0)
        b = build_encoder(spec, most=10**8)
        assert all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())
        with pytest.raises(ValueError, match='more than the 1,000 numbers that fit'):
            build_encoder(spec, most=1000)

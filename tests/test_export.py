"Exported encoders are opened where ssl_patch cannot be imported, by timm, torchvision and PyTorch."

import subprocess
import sys

import numpy as np
import pytest
import torch

from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.export import save_onnx, save_program
from ssl_patch.models.hub import save_hub_folder

STRANGER = """
import sys
sys.modules['ssl_patch'] = None  # as where it is not installed
import json, numpy as np, timm, torch
from pathlib import Path
from safetensors.torch import load_file
from torchvision.models import get_model

here = Path(sys.argv[1])
x, found = torch.from_numpy(np.load(here / 'x.npy')), {}


def normalised(folder):
    own = json.loads((here / folder / 'config.json').read_text())['ssl_patch']
    mean, std = (torch.tensor(own[k])[:, None, None] for k in ('mean', 'std'))
    return (x - mean) / std


with torch.no_grad():
    for folder in ('vit', 'resnet_timm'):
        net = timm.create_model(f'local-dir:{here / folder}', pretrained=True).eval()
        found[folder] = net(normalised(folder))
    net = get_model('resnet18')
    net.fc = torch.nn.Identity()
    net.load_state_dict(load_file(here / 'resnet' / 'model.safetensors'), strict=True)
    found['resnet'] = net.eval()(normalised('resnet'))
    scope = {}
    page = (here / 'vit' / 'README.md').read_text()
    code = page.split('```python')[1].split('```')[0]
    exec(code.replace("'model.safetensors'", repr(str(here / 'vit' / 'model.safetensors'))), scope)
    found['readme'] = scope['net'](normalised('vit'))
    found['program'] = torch.export.load(here / 'vit.pt2').module()(x)[0]
assert sys.modules['ssl_patch'] is None
np.savez(here / 'found.npz', **{k: v.numpy() for k, v in found.items()})
"""


def encoders():
    "A ViT with norms of both kinds' other epsilon, and a ResNet, with statistics of their own."
    torch.manual_seed(0)
    stats = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    a = vit('tiny', size=32, patch=8, width=32, depth=2, heads=2).set_stats(*stats).eval()
    for p in a.parameters():  # as small as tokens begin: there epsilon tells
        p.data.mul_(0.3)
    return a, resnet('resnet18', 32, stem='imagenet').set_stats(*stats).eval()


def test_strangers_get_the_same_features(tmp_path):
    a, b = encoders()
    x = torch.rand(3, 3, 32, 32)
    np.save(tmp_path / 'x.npy', x.numpy())
    save_hub_folder(a, tmp_path / 'vit')
    save_hub_folder(b, tmp_path / 'resnet', 'torchvision')
    save_hub_folder(b, tmp_path / 'resnet_timm', 'timm')
    save_program(a, tmp_path / 'vit.pt2')
    words = [sys.executable, '-c', STRANGER, str(tmp_path)]
    r = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    with torch.no_grad():
        ours = dict(vit=a(x).image, resnet=b(x).image)
    found = np.load(tmp_path / 'found.npz')
    assert set(found) == {'vit', 'resnet', 'resnet_timm', 'readme', 'program'}
    for name, value in found.items():
        want = ours['resnet' if name.startswith('resnet') else 'vit'].numpy()
        assert np.abs(value - want).max() < 1e-5, name


def test_onnx_agrees_at_any_batch_and_size(tmp_path):
    for tool in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(tool, reason="needs pip install 'ssl_patch[export]'")
    import onnxruntime

    a, _ = encoders()
    session = onnxruntime.InferenceSession(save_onnx(a, tmp_path / 'a.onnx'))
    for shape in ((1, 3, 32, 32), (5, 3, 48, 24)):
        x = torch.rand(shape)
        image, patches = session.run(None, {'images': x.numpy()})
        size = 32 if shape[2] == 32 else shape[2:]
        with torch.no_grad():
            want = a.at_size(size)(x)
        assert np.abs(image - want.image.numpy()).max() < 1e-4
        assert np.abs(patches - want.patches.numpy()).max() < 1e-4

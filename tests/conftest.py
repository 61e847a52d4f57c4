"Small data and methods that several test files share."

import pytest
import torch
from ssl_patch.data.sources import images
from ssl_patch.models.heads import mlp
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.methods.compose import build_method
from ssl_patch.training.pretrain import Pretrainer


@pytest.fixture(scope='session')
def noise():
    "256 labelled training and 64 test images of noise, 16 pixels: to test machinery."
    g = torch.Generator().manual_seed(0)
    x = lambda n: torch.randint(0, 256, (n, 3, 16, 16), generator=g, dtype=torch.uint8)
    y = lambda n: torch.arange(n) % 4
    return images((x(256), y(256)), test=(x(64), y(64)))


@pytest.fixture
def pretrainer(noise):
    "A function that makes a very small `Pretrainer`, seeded weights included."

    def make(method='aps', weights=0, drop_path=0.0, **kwargs):
        torch.manual_seed(weights)
        if method in ('aps', 'moco_v3'):
            m = build_method(
                method,
                vit(size=16, patch=4, width=32, depth=2, heads=2, drop_path=drop_path),
                hidden=32,
                out=16,
            )
        else:
            m = build_method(
                method,
                resnet('resnet18', 16, width=8),
                projector=mlp(64, 16, last_norm=False, bias=True),
            )
        return Pretrainer(
            m, noise, **(dict(epochs=4, batch_size=64, progress='quiet', knn_every=0) | kwargs)
        )

    return make

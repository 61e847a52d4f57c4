"What README says composes, composes: sparse patches and patch losses on every method."

from functools import partial
import pytest
import torch
from ssl_patch.methods.aps import APS, AsymmetricPatchSampler
from ssl_patch.methods.co2 import CO2
from ssl_patch.methods.densecl import DenseCLLoss
from ssl_patch.methods.local_to_global import LocalToGlobalLoss
from ssl_patch.methods.moco import MoCoV1, MoCoV2, MoCoV3
from ssl_patch.methods.repco import RepCoLoss
from ssl_patch.methods.ressl import ReSSL
from ssl_patch.methods.sce import SCE
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.views.augmentations import make_view

small = dict(hidden=32, out=16)
METHODS = dict(
    moco_v1=MoCoV1,
    moco_v2=MoCoV2,
    moco_v3=partial(MoCoV3, **small),
    ressl=ReSSL,
    co2=CO2,
    sce=SCE,
    sce_both_ways=partial(SCE, symmetric=True, **small),
    aps_without_sampler=partial(APS, patch_sampler=None, **small),
)
SPARSE = AsymmetricPatchSampler()
SLOTS = dict(
    sparse=dict(patch_sampler=SPARSE),
    densecl=dict(patch_loss=DenseCLLoss()),
    repco=dict(patch_loss=RepCoLoss()),
    local_to_global=dict(patch_loss=LocalToGlobalLoss()),
    sparse_densecl=dict(patch_sampler=SPARSE, patch_loss=DenseCLLoss()),
    sparse_local_to_global=dict(patch_sampler=SPARSE, patch_loss=LocalToGlobalLoss()),
)


def tiny():
    torch.manual_seed(0)
    return vit(size=16, patch=4, width=32, depth=1, heads=2)


@pytest.mark.parametrize('slots', SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize('make', METHODS.values(), ids=METHODS)
def test_composes(make, slots):
    "Built, and trained one step: the loss is finite and its gradient reaches every weight."
    method = make(tiny(), **slots)
    method.set_data_size(256, 16)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(16, 3, 20, 20, generator=g)
    views = [make_view(x, a, g) for a in method.augmentations]
    loss, _ = method(views, method.draw_patches(views, g)[0], 0.5)
    loss.backward()
    assert torch.isfinite(loss)
    for name, weight in method.tower.named_parameters():
        assert not weight.requires_grad or weight.grad is not None or 'pos_embed' in name, name


@pytest.mark.parametrize('make', METHODS.values(), ids=METHODS)
def test_what_does_not_go_together_is_refused(make):
    with pytest.raises(ValueError, match='patch'):
        make(tiny(), patch_sampler=SPARSE, patch_loss=RepCoLoss())
    with pytest.raises(ValueError, match='drop|ViT|patch'):
        make(resnet('resnet18', size=16, width=8), patch_sampler=SPARSE)

"""An option whose slots are given is an error that names both, in every method; else it counts."""

import torch
import pytest
from ssl_patch.methods.aps import APS
from ssl_patch.methods.compose import load_papers
from ssl_patch.methods.contrast import InfoNCELoss
from ssl_patch.methods.densecl import DenseCL, DenseCLLoss
from ssl_patch.methods.local_to_global import LocalToGlobalLoss
from ssl_patch.methods.method import Method
from ssl_patch.methods.patch_loss import PatchLosses
from ssl_patch.models.encoders import vit
from ssl_patch.views.augmentations import aug_weak, make_view

WHOLE = {'preset', 'host'}  # they choose for all slots


def tiny():
    return vit(size=32, patch=8, width=32, depth=1, heads=2)


def own(entry):
    "Options that are the method's own."
    code = entry.build.__wrapped__.__code__
    return [n for n in code.co_varnames[: code.co_argcount] if n not in WHOLE | {'encoder'}]


@pytest.mark.parametrize('name', load_papers())
def test_every_option_says_which_slots_it_fills(name):
    entry = load_papers()[name]
    assert set(own(entry)) == set(entry.build.fills)


@pytest.mark.parametrize('name', load_papers())
def test_an_option_that_would_be_dropped_is_refused(name):
    build = load_papers()[name].build
    for option, slots in build.fills.items():
        with pytest.raises(ValueError) as e:
            build(tiny(), **{option: 0.3}, **dict.fromkeys(slots))
        words = str(e.value)
        assert words.startswith(f'{option} must be left out of {build.__name__} where'), words
        assert all(slot in words for slot in slots) and words.endswith('got 0.3')


def test_what_was_found_by_hand():
    for slots in (
        dict(patch_sampler=lambda v1, v2, grid, generator: None, gamma=7),
        dict(loss=InfoNCELoss(tau=0.5), tau=0.01),
        dict(patch_sampler=None, num_draws=2),
    ):
        with pytest.raises(ValueError, match='is given, which takes its place'):
            APS(tiny(), **slots)
    assert APS(tiny(), loss=InfoNCELoss(tau=0.5), tau=None).loss.tau == 0.5
    assert APS(tiny(), loss=InfoNCELoss(tau=0.5), gamma=7).patch_sampler.gamma == 7


def test_an_option_of_two_slots_still_counts_where_one_is_given():
    m = DenseCL(tiny(), tau=0.3, loss=InfoNCELoss(0.5))
    assert (m.loss.tau, m.patch_loss.losses[0].tau) == (0.5, 0.3)
    with pytest.raises(ValueError, match='where loss and patch_loss are given'):
        DenseCL(tiny(), tau=0.3, loss=InfoNCELoss(0.5), patch_loss=DenseCLLoss(0.2))


def uneven(view1, view2, grid, generator=None):
    "Six patches of view 1, nine of view 2."
    whole = torch.arange(grid[0] * grid[1], device=view1.x.device).expand(len(view1.x), 1, -1)
    return whole[..., :6], whole[..., -9:]


@pytest.mark.parametrize('patches', [None, DenseCLLoss(), LocalToGlobalLoss()])
def test_views_may_keep_different_numbers_of_patches(patches):
    slot = None if patches is None else PatchLosses(patches)
    torch.manual_seed(0)
    m = Method(tiny(), (aug_weak(32),) * 2, patch_sampler=uneven, patch_loss=slot)
    x = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8)
    views = [make_view(x, a, torch.Generator().manual_seed(0)) for a in m.augmentations]
    (keeps,) = m.draw_patches(views)
    assert [k.shape for k in keeps] == [(8, 6), (8, 9)]
    loss, _ = m(views, keeps)
    loss.backward()
    grad = m.encoder.net.blocks[0].attn.qkv.weight.grad
    assert loss.isfinite() and grad.abs().sum() > 0

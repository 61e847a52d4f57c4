"Argument checks and the parts of pictures: one wording, and nothing slips through."

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ssl_patch.ground import checks, plots


@pytest.mark.parametrize('given', [True, np.True_, 1.0, '1', None, torch.tensor(1), [1], math.nan])
def test_only_whole_numbers_are_whole_numbers(given):
    with pytest.raises(ValueError, match=r'^n must be a whole number at least 1, got '):
        checks.require_int(given, 'n', least=1)


def test_numbers_of_numpy_and_large_ones_are_numbers():
    checks.require_int(np.int64(3), 'n', least=3, most=3)
    checks.require_int(10**400, 'n', least=0)
    checks.require_number(np.float32(0.5), 'p', above=0, below=1)
    checks.require_number(2, 'p', least=2, most=2)


@pytest.mark.parametrize('given', [False, math.inf, -math.inf, math.nan, 0, 1, '0.5', None, [0.5]])
def test_bounds_are_where_they_are_said_to_be(given):
    with pytest.raises(ValueError, match=r'^p must be a number above 0 and below 1, got '):
        checks.require_number(given, 'p', above=0, below=1)


def test_none_is_allowed_only_where_it_is_said():
    checks.require_int(None, 'n', optional=True)
    with pytest.raises(ValueError, match='n must be a whole number, or None, got 0.5'):
        checks.require_int(0.5, 'n', optional=True)


def test_a_choice_is_of_the_same_kind():
    checks.require_choice(None, 'x', [None, 'a'])
    checks.require_choice('a', 'x', (c for c in 'ab'))
    for given in (1, 'True', torch.tensor(True), np.ones(3)):
        with pytest.raises(ValueError, match='x must be one of True or False, got '):
            checks.require_choice(given, 'x', [True, False])
    with pytest.raises(ValueError, match="x must be 'only', got 'onyl'; did you mean 'only'"):
        checks.require_choice('onyl', 'x', ['only'])


def test_unknown_names_are_told_with_what_there_is():
    checks.require_known([], 'SCE', ['lam'])
    with pytest.raises(ValueError, match="SCE has no option 'zzz'; there are lam, tau"):
        checks.require_known(['lam', 'zzz'], 'SCE', ['lam', 'tau'])


def test_a_shape_is_told_as_it_was_asked_for():
    x = torch.zeros(2, 3)
    checks.require_shape(x, 'x', (None, 3), torch.float32)
    for shape, dtype, said in (
        ((None, 4), None, r'\(any,4\)'),
        (('B', 3, 'H'), None, r'\(B,3,H\)'),
        (('B', 3), torch.uint8, r'\(B,3\) torch.uint8'),
    ):
        with pytest.raises(ValueError, match=rf'^x must be {said}, got \(2, 3\) torch.float32$'):
            checks.require_shape(x, 'x', shape, dtype)
    with pytest.raises(ValueError, match=r'x must be \(B,3\), got \(2, 3\) float64'):
        checks.require_shape(np.zeros((2, 3)), 'x', ('B', 3))


def test_what_was_given_is_shown_in_short():
    class Loss:
        pass

    assert checks.shown(Loss) == 'Loss' and checks.shown(math.sqrt) == 'sqrt'
    assert checks.shown(list(range(1000))).endswith('...')
    assert len(checks.shown('x' * 1000)) == 200


def test_pictures_lie_on_their_pixels():
    "Boxes are in pixels, with the corner of pixel (0,0) at (0,0)."
    fig, ax = plt.subplots()
    plots.canvas(ax, plots.as_picture(torch.zeros(3, 4, 6, dtype=torch.uint8)), 'title')
    plots.rectangles(ax, torch.tensor([[1.0, 2, 3, 4]]), facecolor='none')
    assert ax.images[0].get_extent() == [0, 6, 4, 0] and ax.get_title() == 'title'
    box = ax.collections[0].get_paths()[0].get_extents()
    assert box.bounds == (2, 1, 4, 3)  # left, top, width, height
    plots.lines(ax, torch.tensor([[0.0, 1]]), torch.tensor([[5.0, 3]]), plots.POSITIVE)
    assert ax.collections[1].get_segments()[0].tolist() == [[0, 1], [5, 3]]
    plt.close(fig)


def test_floats_are_clamped_and_bytes_scaled():
    x = torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1).requires_grad_()
    assert plots.as_picture(x).flatten().tolist() == [0, 0.5, 1]
    grey = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(plots.as_picture(grey), torch.tensor([[[0, 0.2, 1]]]))


def test_a_frame_has_its_colour_and_an_arrow_its_direction():
    fig, (a, b) = plt.subplots(1, 2)
    plots.framed(a, torch.zeros(3, 8, 8), color=plots.VIEW2)
    plots.framed(b, torch.zeros(3, 8, 8))
    assert a.spines['left'].get_visible() and not b.spines['left'].get_visible()
    for flip, left_to_right in ((False, True), (True, False)):
        plots.box_with_arrow(b, torch.tensor([0.0, 0, 4, 4]), flip, plots.VIEW1)
        arrow = b.texts[-1]
        assert (arrow.xy[0] > arrow.xyann[0]) == left_to_right
    plt.close(fig)


def test_nothing_is_drawn_when_the_rooms_are_imported():
    "matplotlib is slow to import, and only figures need it."
    import subprocess
    import sys

    code = 'import sys, ssl_patch.ground.checks, ssl_patch.ground.plots, ssl_patch.data.sources'
    code += '; assert "matplotlib" not in sys.modules and "torchvision" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)

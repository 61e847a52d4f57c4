"The patch samplers against slow references, over grids, flips, types and wrong arguments."

import math
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ssl_patch.methods.geometry import (
    as_grid,
    patch_boxes,
    covered_fraction,
    keep_mask,
)
from ssl_patch.methods.patch_pictures import (
    shared_areas,
    show_areas,
    show_covered,
    show_kept,
    show_patches,
)
from ssl_patch.methods.aps import (
    AsymmetricPatchSampler,
    sample_asymmetric,
    num_kept,
    sample_selective,
    sample_sparse,
)
from ssl_patch.views.crops import View, random_boxes

GRIDS = [(1, 1), (1, 8), (8, 1), (3, 5), (7, 7), (14, 14), (16, 16)]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def random_pair(batch, seed, dtype=torch.float32, whole=False):
    "Boxes that overlap often, and flips."
    g = gen(seed)
    boxes = [torch.rand(batch, 4, generator=g, dtype=torch.float64) * 20 + 8 for _ in range(2)]
    boxes = [(b.floor() if whole else b).to(dtype) for b in boxes]
    return *boxes, *(torch.rand(2, batch, generator=g) < 0.5)


def reference(keep, box1, box2, flip1, flip2, grid2):
    """Covered fraction from the definition: four loops in plain Python, mirrored patches found by
    counting from the other side."""

    def edges(box, grid, flip, r, c):
        (y, x, h, w), (rows, cols) = box.tolist(), grid
        if flip:
            c = cols - 1 - c
        return y + h * r / rows, x + w * c / cols, y + h * (r + 1) / rows, x + w * (c + 1) / cols

    out = torch.zeros(len(keep), *grid2, dtype=torch.float64)
    for b in range(len(keep)):
        for r in range(grid2[0]):
            for c in range(grid2[1]):
                t, l, d, e = edges(box2[b], grid2, flip2[b], r, c)
                for r1, c1 in keep[b].nonzero().tolist():
                    t1, l1, d1, e1 = edges(box1[b], keep.shape[1:], flip1[b], r1, c1)
                    out[b, r, c] += (
                        max(0, min(d, d1) - max(t, t1))
                        * max(0, min(e, e1) - max(l, l1))
                        / ((d - t) * (e - l))
                    )
    return out


@pytest.mark.parametrize('grid', GRIDS[:-1])
@pytest.mark.parametrize('flips', [False, True])
def test_covered_fraction_is_the_definition(grid, flips):
    box1, box2, flip1, flip2 = random_pair(3, sum(grid))
    keep = torch.rand(3, *grid, generator=gen(1)) < 0.5
    keep[0] = True
    none = torch.zeros(3, dtype=torch.bool)
    slow = reference(keep, box1, box2, *((flip1, flip2) if flips else (none, none)), grid)
    fast = covered_fraction(keep, box1, box2, *((flip1, flip2) if flips else ()))
    assert slow.max() > 0.1 and fast.dtype == torch.float32
    torch.testing.assert_close(fast.double(), slow, atol=2e-6, rtol=0)


sides = st.floats(1, 300, width=32)
corner = st.floats(-50, 300, width=32)
boxes = st.tuples(corner, corner, sides, sides)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxes, boxes, st.booleans(), st.booleans(), grids, grids, st.integers(0, 2**31))
def test_covered_fraction_on_any_boxes(b1, b2, f1, f2, grid1, grid2, seed):
    box1, box2, flip1, flip2 = (
        torch.tensor([b1]),
        torch.tensor([b2]),
        torch.tensor([f1]),
        torch.tensor([f2]),
    )
    keep = torch.rand(1, *grid1, generator=gen(seed)) < 0.6
    fast = covered_fraction(keep, box1, box2, flip1, flip2, grid2)
    assert ((fast >= 0) & (fast <= 1)).all()
    torch.testing.assert_close(
        fast.double(), reference(keep, box1, box2, flip1, flip2, grid2), atol=2e-6, rtol=0
    )


def test_covered_by_hand():
    "Two views of 4x4 pixels, the second one pixel further right; view 1 keeps its top left patch."
    one, two = torch.tensor([[0, 0, 4, 4]]), torch.tensor([[0, 1, 4, 4]])
    keep, yes = torch.tensor([[[True, False], [False, False]]]), torch.tensor([True])
    assert covered_fraction(keep, one, two).tolist() == [[[0.5, 0], [0, 0]]]
    assert covered_fraction(keep, one, two, flip2=yes).tolist() == [[[0, 0.5], [0, 0]]]
    # mirrored, view 1 keeps pixels 2 and 3
    assert covered_fraction(keep, one, two, flip1=yes).tolist() == [[[0.5, 0.5], [0, 0]]]
    assert covered_fraction(keep, one, two, grid2=1).tolist() == [[[1 / 8]]]


def test_half_a_turn_of_both_views_turns_the_answer():
    box1, box2, flip1, flip2 = random_pair(8, 5)
    keep = torch.rand(8, 5, 7, generator=gen(6)) < 0.4
    turn1, turn2 = torch.randint(4, (2, 8), generator=gen(7))
    plain = covered_fraction(keep, box1, box2, flip1, flip2, turn1=turn1, turn2=turn2)
    half = dict(turn1=(turn1 + 2) % 4, turn2=(turn2 + 2) % 4)
    upside_down = covered_fraction(keep.flip(1, 2), box1, box2, flip1, flip2, **half)
    torch.testing.assert_close(upside_down, plain.flip(1, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize('grid', GRIDS)
def test_patches_tile_the_box(grid):
    box, flip = torch.tensor([[3.0, 5, 16, 24], [0, 0, 7, 9]]), torch.tensor([True, False])
    areas = patch_boxes(box, grid, flip)
    assert areas.shape == (2, *grid, 4)
    torch.testing.assert_close(areas[..., 2:].prod(-1).sum((1, 2)), box[:, 2:].prod(-1))
    ends = areas[..., :2] + areas[..., 2:]
    torch.testing.assert_close(areas[..., :2].amin((1, 2)), box[:, :2])
    torch.testing.assert_close(ends.amax((1, 2)), box[:, :2] + box[:, 2:])
    torch.testing.assert_close(areas[0].flip(1), patch_boxes(box, grid)[0])  # mirrored columns
    torch.testing.assert_close(areas[1], patch_boxes(box, grid)[1])
    assert grid[1] == 1 or (areas[0, :, 0, 1] > areas[0, :, 1, 1]).all()


@pytest.mark.parametrize('grid', GRIDS)
def test_every_kept_patch_counts_itself(grid):
    """The same view twice: a patch is covered exactly if it is kept; mirrored, exactly if its
    mirror image is kept."""
    box, _, _, _ = random_pair(4, 3)
    keep = torch.rand(4, *grid, generator=gen(2)) < 0.5
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    same, mirror = covered_fraction(keep, box, box), covered_fraction(keep, box, box, no, yes)
    torch.testing.assert_close(same, keep.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(mirror, keep.flip(2).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize('grid', GRIDS)
def test_flip_symmetry(grid):
    box1, box2, flip1, flip2 = random_pair(6, 4)
    keep = torch.rand(6, *grid, generator=gen(3)) < 0.5
    once = covered_fraction(keep, box1, box2, flip1, flip2)
    torch.testing.assert_close(
        covered_fraction(keep.flip(2), box1, box2, ~flip1, ~flip2), once.flip(2)
    )
    torch.testing.assert_close(
        covered_fraction(keep.flip(2), box1, box2, ~flip1, flip2), once
    )  # the same content kept
    torch.testing.assert_close(covered_fraction(keep, box1, box2, flip1, ~flip2), once.flip(2))
    if grid[1] > 1:
        assert not torch.allclose(covered_fraction(keep, box1, box2, ~flip1, flip2), once)


def test_no_flips_is_the_geometry_of_views_never_mirrored():
    box1, box2, flip1, flip2 = random_pair(6, 5)
    keep, none = torch.rand(6, 7, 7, generator=gen(4)) < 0.5, torch.zeros(6, dtype=torch.bool)
    assert torch.equal(
        covered_fraction(keep, box1, box2), covered_fraction(keep, box1, box2, none, none)
    )
    assert not torch.allclose(
        covered_fraction(keep, box1, box2), covered_fraction(keep, box1, box2, flip1, flip2)
    )


def test_draws_weights_and_types():
    box1, box2, flip1, flip2 = random_pair(3, 6, torch.float64)
    keep = torch.rand(3, 2, 4, 5, generator=gen(5)) < 0.5
    out = covered_fraction(keep, box1, box2, flip1, flip2)
    assert out.dtype == torch.float64 and out.shape == keep.shape
    for t in range(2):
        torch.testing.assert_close(
            out[:, t], covered_fraction(keep[:, t], box1, box2, flip1, flip2)
        )
    torch.testing.assert_close(covered_fraction(keep * 0.5, box1, box2, flip1, flip2), out / 2)
    assert covered_fraction(keep, box1.long(), box2.long()).dtype == torch.float32
    assert covered_fraction(keep, box1.half(), box2.half()).dtype == torch.float32


def test_mixed_precision_does_not_round_areas():
    box1, box2, flip1, flip2 = random_pair(8, 7)
    keep = torch.rand(8, 16, 16, generator=gen(6)) < 0.25
    plain = covered_fraction(keep, box1, box2, flip1, flip2)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = covered_fraction(keep, box1, box2, flip1, flip2)
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize('size', [32, 500, 4000])
def test_fully_covered_counts_as_nothing_new(size):
    """A view inside a fully kept one leaves R below the threshold of 1e-6, for boxes of whole
    pixels in single precision."""
    g = gen(8)
    box1 = torch.tensor([[0.0, 0, size, size * 0.75 // 1]]).expand(50, 4)
    low = torch.rand(50, 2, generator=g) * box1[:, 2:] / 2
    box2 = (
        torch.cat([low, torch.rand(50, 2, generator=g) * box1[:, 2:] / 2 + 1], 1)
        .floor()
        .clamp_min(1)
    )
    for n in (7, 14, 16):
        assert (1 - covered_fraction(torch.ones(50, n, n), box1, box2) < 1e-6).all()


# -- the samplers


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize(
    'keep_ratio,num_draws', [(0.25, 4), (0.25, 1), (0.5, 2), (1.0, 1), (1 / 3, 3)]
)
def test_shapes_and_disjoint_draws(grid, keep_ratio, num_draws):
    total = math.prod(grid)
    if int(keep_ratio * total + 1e-9) == 0:
        with pytest.raises(ValueError, match='keep_ratio must be at least'):
            sample_sparse(5, grid, keep_ratio, num_draws)
        return
    k = num_kept(grid, keep_ratio)
    box1, box2, flip1, flip2 = random_pair(5, 9)
    keep1, keep2 = sample_asymmetric(
        box1, box2, grid, keep_ratio, num_draws, flip1=flip1, flip2=flip2, generator=gen()
    )
    for keep in (keep1, keep2):
        assert (
            keep.shape == (5, num_draws, k)
            and keep.dtype == torch.int64
            and keep.min() >= 0
            and keep.max() < total
        )
        assert (keep_mask(keep, grid).sum((2, 3)) == k).all()  # no patch twice in a draw
    assert (keep_mask(keep1, grid).sum(1) <= 1).all()  # nor in two draws of view 1
    if num_draws * k == total:
        assert keep_mask(keep1, grid).any(1).all()
    if total > 4:
        assert not torch.equal(keep1[0], keep1[1]) or k == total


def test_kept_count_is_the_floor_of_the_product():
    for total in range(1, 200):
        for part in range(1, total + 1):
            assert num_kept((1, total), part / total) == part
    assert num_kept(16, 0.25) == 64 and num_kept((3, 5), 0.25) == 3
    assert num_kept(10, 0.29) == 29  # 0.29 * 100 is 28.999...
    with pytest.raises(ValueError, match='keep_ratio must be at least 0.1111 on grid=3'):
        num_kept(3, 0.1)
    with pytest.raises(ValueError, match='got 1.5'):
        num_kept(3, 1.5)


def test_view1_is_uniform():
    keep = sample_sparse(20_000, (2, 4), 0.25, 4, generator=gen())
    for t in range(4):
        count = torch.bincount(keep[:, t].flatten(), minlength=8).double()
        assert (
            (count - 5000) ** 2 / 5000
        ).sum() < 24.3  # 7 degrees of freedom: beyond it once in 1000


def test_generator_makes_draws_repeat():
    box1, box2, flip1, flip2 = random_pair(4, 10)
    draw = lambda seed: sample_asymmetric(
        box1, box2, 7, flip1=flip1, flip2=flip2, generator=gen(seed)
    )
    a, b, c = draw(1), draw(1), draw(2)
    assert (
        all(map(torch.equal, a, b)) and not torch.equal(a[0], c[0]) and not torch.equal(a[1], c[1])
    )
    torch.manual_seed(3)
    d = sample_asymmetric(box1, box2, 7)
    torch.manual_seed(3)
    e = sample_asymmetric(box1, box2, 7)
    assert all(map(torch.equal, d, e))
    before = torch.get_rng_state()
    draw(1)
    assert torch.equal(before, torch.get_rng_state())  # a generator leaves the global one alone


def test_shuffles_beyond_one_partition():
    keep = sample_sparse(50, 8, 0.75, 3, disjoint=False, generator=gen())
    assert keep.shape == (50, 3, 48) and (keep_mask(keep, 8).sum((2, 3)) == 48).all()
    assert not torch.equal(keep[:, 0], keep[:, 1])
    with pytest.raises(ValueError, match='num_draws must be at most 2'):
        sample_sparse(3, 14, keep_ratio=0.5)
    with pytest.raises(ValueError, match='got 0'):
        sample_sparse(3, 14, num_draws=0)
    keep1, keep2 = sample_asymmetric(
        *random_pair(9, 2)[:2], 8, 0.75, 3, disjoint=False, generator=gen()
    )
    assert keep1.shape == keep2.shape == (9, 3, 48)


def plackett_luce(p):
    "Probability of every ordered pair drawn one after the other without replacement."
    return torch.stack(
        [
            torch.stack([p[i] * p[j] / (1 - p[i]) if i != j else p[i] * 0 for j in range(len(p))])
            for i in range(len(p))
        ]
    )


@pytest.mark.parametrize('gamma', [0, 0.5, 1, 3])
def test_plackett_luce_law(gamma):
    n, cover = 60_000, torch.tensor([[0.0, 0.1, 0.4], [0.5, 0.7, 0.9]])
    p = (1 - cover.double().flatten()) ** gamma
    law = plackett_luce(p / p.sum())
    pairs = sample_selective(cover.expand(n, 2, 3), 2, gamma, gen())
    often = torch.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36).view(6, 6) / n
    multi = torch.multinomial(p.expand(n, 6), 2, generator=gen(1))
    theirs = torch.bincount(multi[:, 0] * 6 + multi[:, 1], minlength=36).view(6, 6) / n
    allowed = 4.5 * (law * (1 - law) / n).sqrt() + 2 / n
    assert ((often - law).abs() <= allowed).all() and ((theirs - law).abs() <= allowed).all()


def test_gamma_zero_is_uniform_even_where_all_is_covered():
    cover, n = torch.tensor([[1.0, 1.0, 0.5, 0.0]]), 40_000
    count = torch.bincount(
        sample_selective(cover.expand(n, 1, 4), 1, 0, gen()).flatten(), minlength=4
    ).double()
    assert ((count - n / 4) ** 2 / (n / 4)).sum() < 16.3  # 3 degrees of freedom


def test_large_gamma_takes_the_least_covered():
    cover = torch.rand(20, 6, 6, generator=gen(), dtype=torch.float64)
    for k in (1, 9, 36):
        least = cover.flatten(1).topk(k, largest=False).indices
        assert torch.equal(
            sample_selective(cover, k, 1e9, gen(1)).sort().values, least.sort().values
        )


def test_fully_covered_patches_come_last_and_at_random():
    n, cover = 30_000, torch.tensor([[1.0, 1.0, 1 - 1e-7], [1.0, 0.9999, 0.2]])
    for gamma in (0.1, 3, 50):
        drawn = sample_selective(cover.expand(n, 2, 3), 3, gamma, gen())
        assert (drawn[:, :2].sort().values == torch.tensor([4, 5])).all()
        count = torch.bincount(drawn[:, 2], minlength=6)[:4].double()
        assert ((count - n / 4) ** 2 / (n / 4)).sum() < 16.3


def test_nothing_new_at_all_is_no_error():
    box = torch.tensor([[2.0, 3, 20, 30]]).expand(500, 4)
    keep1, keep2 = sample_asymmetric(box, box, 4, keep_ratio=1, num_draws=1, generator=gen())
    assert (keep2.sort().values == torch.arange(16)).all()
    keep1, keep2 = sample_asymmetric(
        box, box, 4, keep_ratio=0.75, num_draws=1, generator=gen()
    )  # 4 patches are new, 12 are wanted
    new = ~keep_mask(keep1, 4)
    assert (keep_mask(keep2, 4) & new).sum() == 4 * 500
    assert (keep_mask(keep2[..., :4], 4) == new).all()  # and they come first


def test_same_view_twice_is_complementary():
    "Half of a view, and the half that is new: exactly the other half, mirrored where the view is."
    box, _, flip1, flip2 = random_pair(30, 11)
    keep1, keep2 = sample_asymmetric(
        box, box, (4, 6), 0.5, 2, flip1=flip1, flip2=flip2, generator=gen()
    )
    other = ~keep_mask(keep1, (4, 6))
    other = torch.where((flip1 ^ flip2)[:, None, None, None], other.flip(3), other)
    assert torch.equal(keep_mask(keep2, (4, 6)), other)


def test_flips_respected_keep_overlap_lower():
    box1, box2, flip1, flip2 = random_pair(300, 12)

    def overlap(**flips):
        keep1, keep2 = sample_asymmetric(box1, box2, 8, generator=gen(), **flips)
        return (
            covered_fraction(keep_mask(keep1, 8), box1, box2, flip1, flip2)
            .flatten(2)
            .gather(2, keep2)
            .mean()
        )

    assert overlap(flip1=flip1, flip2=flip2) < 0.75 * overlap()


# -- beside an independent implementation, which follows the released code box by box: mean covered
# fraction of what view 2 keeps, at gamma 0, 1, 3, ...; with flips respected, and ignored

SIZES = dict(cifar=((32, 32), (0.15, 1), 16), photograph=((375, 500), (0.2, 1), 14))
INDEPENDENT = [
    ('cifar', True, (0.167, 0.085, 0.041, 0.023, 0.009)),
    ('cifar', False, (0.167, 0.141, 0.121, 0.117, 0.106)),
    ('photograph', True, (0.164, 0.087, 0.042)),
    ('photograph', False, (0.166, 0.143, 0.124)),
]


def random_crops(name, n=2000):
    torch.manual_seed(0)
    size, scale, grid = SIZES[name]
    box1, box2 = (random_boxes(size, scale, n=n) for _ in range(2))
    return box1, box2, *(torch.rand(2, n) < 0.5), grid


def measured(crops, gamma, aware):
    """(3,pairs): mean covered fraction of view 2's kept patches; part of them touched at all; part
    of view 2's patches that the 4 draws use."""
    box1, box2, flip1, flip2, grid = crops
    flips = dict(flip1=flip1, flip2=flip2) if aware else {}
    keep1, keep2 = sample_asymmetric(box1, box2, grid, gamma=gamma, **flips)
    cover = covered_fraction(keep_mask(keep1, grid), box1, box2, flip1, flip2)
    cover = cover.flatten(2).gather(2, keep2)
    used = keep_mask(keep2, grid).any(1).float().mean((1, 2))
    return torch.stack([cover.mean((1, 2)), (cover > 1e-6).float().mean((1, 2)), used])


def same_within_errors(values, reference, digit):
    "Two means of as many pairs: three standard errors of a difference, half a printed digit."
    allowed = 3 * (2 / len(values)) ** 0.5 * values.std().item() + digit / 2
    return abs(values.mean().item() - reference) <= allowed


@pytest.mark.parametrize('name, aware, reference', INDEPENDENT)
def test_the_covered_fraction_of_an_independent_implementation(name, aware, reference):
    crops = random_crops(name)
    for gamma, value in zip((0, 1, 3, 5, 10), reference):
        assert same_within_errors(measured(crops, gamma, aware)[0], value, 0.001)


def test_patches_touched_and_used_by_an_independent_implementation():
    crops = random_crops('cifar')
    for gamma, aware, value in ((0, True, 0.42), (3, True, 0.23), (3, False, 0.34)):
        new = measured(crops, gamma, aware)
        assert same_within_errors(new[1], value, 0.01)
        if (gamma, aware) == (3, True):
            assert same_within_errors(new[2], 0.69, 0.01)
        if gamma == 0:  # uniform draws miss a patch with probability 3/4 each
            assert abs(new[2].mean().item() - (1 - 0.75**4)) < 0.002


# -- the slot


def views(batch=3, seed=0, size=28):
    box1, box2, flip1, flip2 = random_pair(batch, seed)
    return [
        View(torch.rand(batch, 3, size, size, generator=gen(seed)), box, flip)
        for box, flip in ((box1, flip1), (box2, flip2))
    ]


def test_slot():
    v1, v2 = views()
    slot = AsymmetricPatchSampler(keep_ratio=0.5, num_draws=2, gamma=1)
    want = sample_asymmetric(v1.box, v2.box, 7, 0.5, 2, 1, v1.flip, v2.flip, gen())
    assert all(map(torch.equal, slot(v1, v2, (7, 7), gen()), want))
    released = AsymmetricPatchSampler(keep_ratio=0.5, num_draws=2, gamma=1, flip_aware=False)
    want = sample_asymmetric(v1.box, v2.box, 7, 0.5, 2, 1, generator=gen())
    assert all(map(torch.equal, released(v1, v2, (7, 7), gen()), want))
    assert pickle.loads(pickle.dumps(slot)) == slot != released
    settings = 'keep_ratio=0.5, num_draws=2, gamma=1, flip_aware=True, disjoint=True'
    assert repr(slot) == f'AsymmetricPatchSampler({settings})'


# -- wrong arguments

B = torch.tensor([[0.0, 0, 10, 10]])
FLIPS = 'torch.bool, True where the view is mirrored, or None'
WRONG = [
    (dict(keep_ratio=0), 'keep_ratio must be a number above 0 and at most 1, got 0'),
    (dict(keep_ratio=-0.1), 'keep_ratio must be .* above 0 and at most 1, got -0.1'),
    (dict(keep_ratio=1.01, num_draws=1), 'keep_ratio must be .*, got 1.01'),
    (dict(keep_ratio='a'), "keep_ratio must be a number .*, got 'a'"),
    (dict(keep_ratio=float('nan')), 'keep_ratio must be .*, got nan'),
    (dict(keep_ratio=0.01), 'keep_ratio must be at least 0.0204 on grid=7.*49 patches, got 0.01'),
    (
        dict(keep_ratio=0.3),
        'num_draws must be at most 3 with keep_ratio=0.3.*disjoint=False.*, got 4',
    ),
    (dict(num_draws=0), 'num_draws must be a whole number at least 1, got 0'),
    (dict(grid=1), 'keep_ratio must be at least 1.0000 on grid=1'),
    (dict(num_draws=2.0), 'num_draws must be a whole number .*, got 2.0'),
    (dict(gamma=-1), 'gamma must be a number at least 0, got -1'),
    (dict(gamma=float('nan')), 'gamma must be .*, got nan'),
    (dict(gamma=float('inf')), 'gamma must be .*, got inf'),
    (dict(grid=0), 'grid must be patches per side .*above 0.*, got 0'),
    (dict(grid=(7,)), r'grid must be .*\(rows, cols\), got \(7,\)'),
    (dict(grid=7.0), 'grid must be .*, got 7.0'),
    (dict(grid=True), 'grid must be .*, got True'),
    (dict(box1=B[0]), r'box1 must be \(B,4\) of top, left, height, width .*, got \(4,\)'),
    (dict(box2=B[:, :3]), r'box2 must be \(1,4\) .*, got \(1, 3\)'),
    (dict(box2=B.expand(2, 4)), r'box2 must be \(1,4\) .*, got \(2, 4\)'),
    (dict(box1=[[0, 0, 1, 1]]), r'box1 must be .*, got \[\[0, 0, 1, 1\]\]'),
    (dict(box1=B * 0), 'box1 must be finite, with height and width above 0, got'),
    (dict(box2=B * float('nan')), 'box2 must be finite, .*, got .*nan'),
    (dict(flip1=True), rf'flip1 must be \(1\) {FLIPS}, got True'),
    (dict(flip1=torch.ones(2) > 0), rf'flip1 must be \(1\) {FLIPS}, got \(2,\) torch.bool'),
    (dict(flip2=torch.ones(1)), rf'flip2 must be \(1\) {FLIPS}, got \(1,\) torch.float32'),
]


@pytest.mark.parametrize('kw,match', WRONG)
def test_wrong_arguments(kw, match):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        sample_asymmetric(**dict(dict(box1=B, box2=B, grid=7), **kw))
    assert torch.equal(state, torch.get_rng_state())  # raised before anything was drawn
    slot = {k: v for k, v in kw.items() if k in ('keep_ratio', 'num_draws', 'gamma')}
    if slot and 'on grid=' not in match:
        with pytest.raises(ValueError, match=match):
            AsymmetricPatchSampler(**slot)


def test_wrong_arguments_of_the_parts():
    with pytest.raises(ValueError, match=r'keep must be .*, got \(7, 7\)'):
        covered_fraction(torch.ones(7, 7), B, B)
    with pytest.raises(ValueError, match=r'keep must be .*, got \(2, 7, 7\)'):
        covered_fraction(torch.ones(2, 7, 7), B, B)
    with pytest.raises(ValueError, match=r'grid must be .*, got \(0, 1\)'):
        covered_fraction(torch.ones(1, 7, 7), B, B, grid2=(0, 1))
    for k in (0, 50, 2.0):
        what = f'k must be a whole number at least 1 and at most 49, .*, got {k}'
        with pytest.raises(ValueError, match=what):
            sample_selective(torch.zeros(7, 7), k)
    assert as_grid(torch.zeros(2, 3).shape) == (2, 3)


# -- devices and figures


def test_no_wait_for_a_gpu():
    "On fake GPU tensors, whatever needs a value on the host (item, nonzero, bool) raises."
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        box, flip = (
            torch.empty(8, 4, device='cuda'),
            torch.empty(8, dtype=torch.bool, device='cuda'),
        )
        keep1, keep2 = sample_asymmetric(box, box, 16, flip1=flip, flip2=flip)
        assert keep1.device.type == keep2.device.type == 'cuda' and keep2.shape == (8, 4, 64)
        with pytest.raises(DataDependentOutputException):
            bool((box > 0).all())  # the check can fail


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    box1, box2, flip1, flip2 = random_pair(64, 13)
    cuda = [x.cuda() for x in (box1, box2, flip1, flip2)]
    keep = torch.rand(64, 4, 16, 16, generator=gen()) < 0.25
    torch.testing.assert_close(
        covered_fraction(keep.cuda(), *cuda).cpu(), covered_fraction(keep, box1, box2, flip1, flip2)
    )
    g = torch.Generator('cuda').manual_seed(0)
    torch.cuda.set_sync_debug_mode('error')
    try:
        keep1, keep2 = sample_asymmetric(*cuda[:2], 16, flip1=cuda[2], flip2=cuda[3], generator=g)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert (keep_mask(keep1, 16).sum(1) == 1).all() and (
        keep_mask(keep2, 16).sum((2, 3)) == 64
    ).all()


def test_figures():
    import matplotlib.pyplot as plt

    pair, source = views(2), (torch.rand(3, 60, 80) * 255).byte()
    keeps = sample_asymmetric(
        pair[0].box,
        pair[1].box,
        (4, 7),
        0.25,
        3,
        flip1=pair[0].flip,
        flip2=pair[1].flip,
        generator=gen(),
    )
    before = source.clone()
    fig = show_patches(source, pair, keeps, (4, 7), i=1, draw=2)
    titles = [ax.get_title() for ax in fig.axes]
    cover = covered_fraction(
        keep_mask(keeps[0], (4, 7)), pair[0].box, pair[1].box, pair[0].flip, pair[1].flip
    )
    share = cover.flatten(2).gather(2, keeps[1])[1, 2].mean()
    assert len(titles) == 3 and f'{share:.0%}' in titles[1] and '7 kept' in titles[0]
    assert [('mirrored' in t) for t in titles[::2]] == [bool(v.flip[1]) for v in pair]
    assert show_kept(pair[0], keeps[0], (4, 7)).get_title().startswith('7 of 28')
    assert (
        show_areas(source.float() / 255, pair, keeps, (4, 7), title='{share:.1f}!')
        .get_title()
        .endswith('!')
    )
    assert show_covered(pair[1], cover[:, 0]).get_title()
    assert torch.equal(source, before)
    plt.close('all')


def test_shared_areas():
    a, b = (
        torch.tensor([[0.0, 0, 4, 4]]),
        torch.tensor([[2.0, 3, 9, 9], [4, 0, 1, 1]]),
    )  # the second only touches
    assert shared_areas(a, b).tolist() == [[2, 3, 2, 1]]
    assert shared_areas(a, b[:0]).shape == (0, 4)

"""Pairs of patches, within one image and between two views, against slow references, on planted
and on broken input."""

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ssl_patch.methods.mining import (
    PatchPairs,
    neighbour_masks,
    repco_pairs,
    show_pairs,
)
from ssl_patch.methods.geometry import patch_boxes, true_match
from ssl_patch.methods.densecl import match_patches
from ssl_patch.methods.matches import match_accuracy, show_matches
from ssl_patch.views.crops import View

GRIDS = [(1, 1), (1, 8), (7, 7), (14, 14), (16, 16)]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def cosines(x):
    "Cosines of the rows of x (M,D), in plain Python."
    rows = [[v / math.sqrt(sum(u * u for u in r)) for v in r] for r in x.double().tolist()]
    return [[round(sum(a * b for a, b in zip(p, q)), 6) + 0.0 for q in rows] for p in rows]


def reference(x, rows, cols, min_distance, positive_fraction, num_negatives, quantile):
    """{patch: positive} and {patch: negatives} of one image (M,D), those that count: double loops,
    and thresholds in exact arithmetic."""
    A, patches = cosines(x), range(rows * cols)

    def distance(i, j):
        return max(abs(i // cols - j // cols), abs(i % cols - j % cols))

    best = {}
    for i in patches:
        for j in patches:
            if distance(i, j) >= min_distance and (i not in best or A[i][j] > A[i][best[i]]):
                best[i] = j
    count = math.ceil(positive_fraction * len(best))
    anchors = sorted(best, key=lambda i: (-A[i][best[i]], i))[:count]
    values = sorted(Fraction(A[i][j]) for i in patches for j in patches if distance(i, j) == 1)
    neg = {}
    for i in patches:
        least = sorted((A[i][j], j) for j in patches if distance(i, j) == 1)[:num_negatives]
        if not least:
            continue
        place = quantile * (len(values) - 1)
        low, high = values[math.floor(place)], values[math.ceil(place)]
        limit = low + (high - low) * (place - math.floor(place))
        found = [j for a, j in least if a < limit]
        if found:
            neg[i] = found
    return {i: best[i] for i in anchors}, neg


def counted(p, b=0):
    pos, pos_ok, neg, neg_ok = (v[b].tolist() for v in (p.pos, p.pos_ok, p.neg, p.neg_ok))
    negs = {i: [j for j, ok in zip(neg[i], neg_ok[i]) if ok] for i in range(len(pos))}
    return {i: j for i, (j, ok) in enumerate(zip(pos, pos_ok)) if ok}, {
        i: js for i, js in negs.items() if js
    }


sides = st.tuples(st.integers(1, 6), st.integers(1, 6))
twentieths = lambda lo, hi: st.integers(lo, hi).map(lambda n: Fraction(n, 20))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sides,
    st.integers(2, 4),
    twentieths(1, 20),
    st.integers(1, 8),
    twentieths(1, 19),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_mining_is_the_double_loop(
    grid, min_distance, positive_fraction, num_negatives, quantile, tied, seed
):
    m = math.prod(grid)
    if tied:
        which = torch.randint(3, (2, m), generator=gen(seed))
        x = torch.eye(3, dtype=torch.float64)[which]  # every cosine is 0 or 1
    else:
        x = torch.randn(2, m, 4, generator=gen(seed), dtype=torch.float64)
    numbers = min_distance, float(positive_fraction), num_negatives, float(quantile)
    fast = repco_pairs(x, grid, *numbers)
    for b in range(2):
        want = reference(x[b], *grid, min_distance, positive_fraction, num_negatives, quantile)
        assert counted(fast, b) == want


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('min_distance', [2, 4])
@pytest.mark.parametrize('kw', [{}, dict(num_negatives=8, positive_fraction=1)])
def test_every_grid(grid, min_distance, kw):
    m, k = math.prod(grid), kw.get('num_negatives', 2)
    p = repco_pairs(torch.randn(3, m, 8, generator=gen()), grid, min_distance, **kw)
    assert (
        isinstance(p, PatchPairs)
        and p.pos.shape == p.pos_ok.shape == (3, m)
        and p.neg.shape == p.neg_ok.shape == (3, m, k)
    )
    assert (
        p.pos.dtype == p.neg.dtype == torch.long and p.pos_ok.dtype == p.neg_ok.dtype == torch.bool
    )
    for v in (p.pos, p.neg):
        assert v.min() >= 0 and v.max() < m
    adjacent, far = neighbour_masks(grid, min_distance)
    i = torch.arange(m).expand(3, m)
    assert far[i, p.pos][p.pos_ok].all()
    j = i[..., None].expand_as(p.neg)
    assert adjacent[j, p.neg][p.neg_ok].all()
    assert not (p.neg == p.pos[..., None])[p.neg_ok & p.pos_ok[..., None]].any()  # no pair is both
    assert (p.pos == i)[:, ~far.any(1)].all() and not p.pos_ok[:, ~far.any(1)].any()
    counting = kw.get('positive_fraction', 0.5) * far.any(1).sum().item()
    assert (p.pos_ok.sum(1) == math.ceil(counting)).all()
    if grid == (1, 1):
        assert not p.pos_ok.any() and not p.neg_ok.any()
    elif k == 8:
        assert (p.neg_ok.sum(-1) <= adjacent.sum(1)).all() and p.neg_ok.any()
    for row, ok in zip(p.neg.flatten(0, 1), p.neg_ok.flatten(0, 1)):
        assert len(set(row[ok].tolist())) == ok.sum()


@pytest.mark.parametrize('grid', [(1, 1), (1, 5), (2, 3), (7, 7), (16, 16), (4, 9)])
def test_masks_are_distances(grid):
    places = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    d = torch.tensor([[max(abs(r - s), abs(c - t)) for s, t in places] for r, c in places])
    for min_distance in (2, 3):
        adjacent, far = neighbour_masks(grid, min_distance)
        assert torch.equal(adjacent, d == 1) and torch.equal(far, d >= min_distance)


def test_mean_number_of_neighbours():
    for n, mean in ((7, 6.37), (16, 7.27)):
        assert round(neighbour_masks(n)[0].sum(1).double().mean().item(), 2) == mean


def planted(noise, seed, batch=300):
    objects = torch.zeros(8, 8, dtype=torch.long)
    objects[1:3, 1:3], objects[5:7, 4:6] = 1, 2
    kind, g = objects.flatten(), gen(seed)
    x = torch.randn(batch, 2, 16, generator=g)[:, (kind > 0).long()]
    return x + noise * torch.randn(x.shape, generator=g), kind


@pytest.mark.parametrize('noise', [0.001, 0.05, 0.2])
def test_planted_objects_are_found(noise):
    x, kind = planted(noise, 3)
    p, thing = repco_pairs(x, 8), kind > 0
    assert (kind[p.pos[:, thing]] == 3 - kind[thing]).all()
    border = thing[:, None] != thing
    share = border[torch.arange(64)[:, None].expand_as(p.neg), p.neg][p.neg_ok].float().mean()
    assert 0.75 < share <= 1 and p.neg_ok[:, thing].any(-1).all()


def same(a, b):
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ('pos', 'pos_ok', 'neg', 'neg_ok')
    )


def test_images_are_mined_alone_and_lengths_do_not_matter():
    x = torch.randn(4, 49, 16, generator=gen(), dtype=torch.float64)
    whole = repco_pairs(x, 7)
    for b in range(4):
        one = repco_pairs(x[b : b + 1], 7)
        assert counted(one) == counted(whole, b)
    assert same(whole, repco_pairs(x * torch.rand(4, 49, 1, generator=gen(1)).add(0.1), (7, 7)))


def test_a_mirrored_map_has_mirrored_pairs():
    x = torch.randn(3, 42, 16, generator=gen(), dtype=torch.float64)
    mirror = torch.arange(42).view(6, 7).flip(1).flatten()
    a, b = repco_pairs(x, (6, 7)), repco_pairs(x[:, mirror], (6, 7))
    for i in range(3):
        # ranks tie where two patches choose each other, so which of them counts may change
        pa, pb = a.pos[i].tolist(), mirror[b.pos[i, mirror]].tolist()
        assert pa == pb
        assert counted(a, i)[1] == {
            int(mirror[c]): mirror[torch.tensor(js)].tolist() for c, js in counted(b, i)[1].items()
        }


def test_no_gradient_no_change_and_full_precision():
    x = torch.randn(2, 49, 64, generator=gen(), requires_grad=True)
    before, p = x.detach().clone(), repco_pairs(x, 7)
    assert not any(torch.is_tensor(v) and v.requires_grad for v in vars(p).values())
    assert torch.equal(x, before)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert same(repco_pairs(x, 7), p) and torch.equal(
            match_patches(x, x.flip(0)), match_patches(x.detach(), x.detach().flip(0))
        )
    half = x.detach().bfloat16()
    assert same(repco_pairs(half, 7), repco_pairs(half.float(), 7))
    with torch.inference_mode():
        repco_pairs(torch.randn(1, 30, 4), (5, 6))
    repco_pairs(
        torch.randn(1, 30, 4, requires_grad=True), (5, 6)
    )  # the table of neighbours was made in inference mode


@pytest.mark.parametrize('value', [0.0, 1.0, -3.7])
def test_flat_images_have_no_negatives(value):
    x = torch.full((2, 196, 192), value) * torch.linspace(0.1, 3, 192)
    p = repco_pairs(x, 14)
    assert not p.neg_ok.any() and p.pos_ok[:, :98].all() and not p.pos_ok[:, 98:].any()
    assert same(p, repco_pairs(x, 14))


x49 = torch.randn(2, 49, 8)


BAD_MINING = [
    (dict(grid=8), 'features must be of the 64 patches of grid=8, got 49'),
    (dict(grid=(7, 0)), 'grid must be .*, got (7, 0)'),
    (dict(features=x49[0]), 'features must be (B,M,D), one row for every patch, got (49, 8)'),
    (dict(features=x49.long()), 'features must be floating point, .*int64'),
    (dict(features=[1]), 'features must be (B,M,D), .*, got [1]'),
    (dict(features=x49[:0]), 'features must be .*nothing empty, got (0, 49, 8)'),
    (dict(positive_fraction=0), 'positive_fraction must be .* above 0 and at most 1, got 0'),
    (dict(positive_fraction=1.01), 'positive_fraction must be .*, got 1.01'),
    (dict(positive_fraction=True), 'positive_fraction must be .*, got True'),
    (dict(positive_fraction=math.nan), 'positive_fraction must be .*, got nan'),
    (dict(quantile=0), 'quantile must be a number above 0 and below 1, got 0'),
    (dict(quantile=1), 'quantile must be a number above 0 and below 1, got 1'),
    (dict(num_negatives=0), 'num_negatives must be .* at least 1 and at most 8.*, got 0'),
    (dict(num_negatives=1.5), 'num_negatives must be a whole number .*, got 1.5'),
    (dict(num_negatives=9), 'num_negatives must be .*8 neighbours at most, got 9'),
    (dict(min_distance=1), 'min_distance must be .* at least 2.*, got 1'),
    (dict(min_distance=2.0), 'min_distance must be a whole number .*, got 2.0'),
]


@pytest.mark.parametrize('kw, text', BAD_MINING)
def test_wrong_mining(kw, text):
    match = '.*'.join(map(re.escape, text.split('.*')))
    with pytest.raises(ValueError, match=match):
        repco_pairs(**(dict(features=x49, grid=7) | kw))


def test_wrong_matching():
    for bad in (x49[:1], x49[..., :4], x49[0], None):
        with pytest.raises(ValueError, match='features_k must be'):
            match_patches(x49, bad)
    with pytest.raises(ValueError, match='features_q must be floating point'):
        match_patches(x49.long(), x49)
    with pytest.raises(ValueError, match='min_distance must be .*, got 1'):
        neighbour_masks(7, 1)
    a, b = view([[0, 0, 4, 4]], [False]), view([[0, 0, 4, 4]] * 2, [False] * 2)
    with pytest.raises(ValueError, match=r'view_k.box must be \(1,4\)'):
        true_match(a, b, 4)
    with pytest.raises(ValueError, match='grid must be .*, got 0'):
        true_match(a, a, 0)
    with pytest.raises(
        ValueError, match=r'match must be of the shape of the truth, .*, got \(1, 3\)'
    ):
        match_accuracy(torch.zeros(1, 3, dtype=torch.long), true_match(a, a, 2), 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_dense_match_is_the_double_loop(m, n, tied, seed):
    q, k = (torch.randn(2, c, 3, generator=gen(seed + c), dtype=torch.float64) for c in (m, n))
    if tied:
        q, k = (torch.eye(3, dtype=torch.float64)[v.argmax(-1)] for v in (q, k))
    for b in range(2):
        A = cosines(torch.cat([q[b], k[b]]))
        want = [max(range(n), key=lambda j: (A[i][m + j], -j)) for i in range(m)]
        assert match_patches(q, k)[b].tolist() == want


def view(boxes, flips):
    return View(
        torch.zeros(len(boxes), 3, 8, 8),
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(flips),
    )


side, corner = st.floats(1, 300, width=32), st.floats(-50, 300, width=32)
boxes = st.tuples(corner, corner, side, side)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxes, boxes, st.booleans(), st.booleans(), sides)
def test_true_match_holds_the_centre(b1, b2, f1, f2, grid):
    q, k = view([b1], [f1]), view([b2], [f2])
    index, ok = true_match(q, k, grid)
    assert (
        index.shape == ok.shape == (1, math.prod(grid))
        and index.min() >= 0
        and index.max() < math.prod(grid)
    )
    areas_q, areas_k = (
        patch_boxes(v.box.double(), grid, v.flip)[0].flatten(0, 1).tolist() for v in (q, k)
    )
    for i, (y, x, h, w) in enumerate(areas_q):
        y, x = y + h / 2, x + w / 2

        def inside(box, e):
            return box[0] - e <= y <= box[0] + box[2] + e and box[1] - e <= x <= box[1] + box[3] + e

        if ok[0, i]:
            assert inside(areas_k[index[0, i]], 1e-3)
        else:
            assert not any(inside(c, -1e-3) for c in areas_k)


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('flips', [(False, False), (False, True), (True, False), (True, True)])
def test_true_match_of_a_view_with_itself(grid, flips):
    box, patches = [[3.7, 11.3, 101.9, 77.7]], torch.arange(math.prod(grid))
    index, ok = true_match(view(box, [flips[0]]), view(box, [flips[1]]), grid)
    mirrored = patches.view(grid).flip(1).flatten()
    assert ok.all() and torch.equal(index[0], patches if flips[0] == flips[1] else mirrored)


def test_mirroring_both_views_mirrors_the_match():
    g, mirror = gen(), torch.arange(42).view(6, 7).flip(1).flatten()
    b = torch.rand(2, 50, 4, generator=g) * 20 + 10
    q, k = (View(torch.zeros(50, 3, 4, 4), v, torch.rand(50, generator=g) < 0.5) for v in b)
    (index, ok), (index2, ok2) = (
        true_match(q, k, (6, 7)),
        true_match(View(q.x, q.box, ~q.flip), View(k.x, k.box, ~k.flip), (6, 7)),
    )
    assert (
        torch.equal(ok[:, mirror], ok2)
        and torch.equal(mirror[index[:, mirror]][ok2], index2[ok2])
        and 0.1 < ok.float().mean() < 0.9
    )


def test_match_accuracy_is_the_loop():
    g = gen()
    match, index = torch.randint(12, (2, 5, 12), generator=g)
    ok = torch.rand(5, 12, generator=g) < 0.7
    exact = near = n = 0
    for m, t, o in zip(match.flatten().tolist(), index.flatten().tolist(), ok.flatten().tolist()):
        if not o:
            continue
        off = max(abs(m // 4 - t // 4), abs(m % 4 - t % 4))
        exact, near, n = exact + (off == 0), near + (off <= 1), n + 1
    got = match_accuracy(match, (index, ok), (3, 4))
    assert {k: v.item() for k, v in got.items()} == pytest.approx(
        dict(exact=exact / n, near=near / n)
    )
    assert match_accuracy(index, (index, ok), (3, 4))['exact'] == 1
    assert match_accuracy(index, (index, ok & False), (3, 4))['near'].isnan()


def test_figures():
    import matplotlib.pyplot as plt

    g, grid = gen(), (4, 7)
    image, p = (
        (torch.rand(3, 40, 70, generator=g) * 255).byte(),
        repco_pairs(torch.randn(2, 28, 5, generator=g), grid),
    )
    ax = show_pairs(image, grid, p, i=1, patches=4)
    negatives, _, positives = ax.collections
    assert (
        ax.get_title() == f'{int(p.pos_ok[1].sum())} positives, {int(p.neg_ok[1].sum())} negatives'
    )
    assert len(positives.get_paths()) == 4 and len(negatives.get_paths()) == p.neg_ok[1].sum()
    show_pairs(image, 1, repco_pairs(torch.ones(1, 1, 5), 1), title='nothing to draw')
    chosen = int(p.pos_ok[0].nonzero()[0])
    line = (
        show_pairs(image, grid, p, patches=[chosen], title='one')
        .collections[-1]
        .get_paths()[0]
        .vertices.tolist()
    )
    centre = lambda j: pytest.approx([70 * (j % 7 + 0.5) / 7, 40 * (j // 7 + 0.5) / 4])
    assert line[0] == centre(chosen) and line[1] == centre(int(p.pos[0, chosen]))

    b = torch.tensor([[0.0, 0, 40, 70], [0, 0, 40, 70]])
    q, k = (
        View(torch.rand(2, 3, n, n, generator=g), b, torch.tensor([False, f]))
        for n, f in ((32, False), (16, True))
    )  # other sizes
    truth = true_match(q, k, grid)
    ax = show_matches(q, k, truth[0], truth, grid, i=1, patches=5)
    assert ax.get_title() == '28 of 28 patches right' and [
        len(c.get_paths()) for c in ax.collections
    ] == [0, 0, 10, 5]
    ax = show_matches(q, k, truth[0].flip(0), truth, grid, i=1, patches=list(range(7)), within=2)
    # the mirrored cell is at most 2 columns off in the three middle columns of seven
    assert ax.get_title() == '12 of 28 patches within 2' and [
        len(c.get_paths()) for c in ax.collections
    ] == [8, 4, 6, 3]
    nowhere = truth[0], truth[1] & False
    assert show_matches(q, k, truth[0], nowhere, grid).get_title() == '0 of 0 patches right'
    plt.close('all')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_without_waiting():
    x = torch.randn(8, 49, 64, generator=gen(), dtype=torch.float64)
    g, b = gen(1), torch.rand(2, 8, 4, generator=gen(2)) * 20 + 10
    q, k = (View(torch.zeros(8, 3, 4, 4), v, torch.rand(8, generator=g) < 0.5) for v in b)
    want, truth = repco_pairs(x, 7), true_match(q, k, 7)
    xc, qc, kc = x.cuda(), q.to('cuda'), k.to('cuda')
    repco_pairs(xc, 7)  # makes the table of neighbours once
    torch.cuda.set_sync_debug_mode('error')
    try:
        got, t, m = repco_pairs(xc, 7), true_match(qc, kc, 7), match_patches(xc, xc.flip(1))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert got.pos.is_cuda and same(PatchPairs(*(v.cpu() for v in vars(got).values())), want)
    assert all(torch.equal(a.cpu(), c) for a, c in zip(t, truth))
    assert torch.equal(m.cpu(), match_patches(x, x.flip(1)))


def test_another_grid_is_told():
    f = torch.randn(1, 16, 4)
    pairs, match = repco_pairs(f, 4), match_patches(f, f)
    view = View(
        torch.rand(1, 3, 8, 8), torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(1, dtype=torch.bool)
    )
    truth = true_match(view, view, 4)
    for grid in (3, 5, (2, 4)):
        with pytest.raises(ValueError, match='pairs must be of the .* patches of grid=.*, got 16'):
            show_pairs(view.x[0], grid, pairs)
        with pytest.raises(ValueError, match='match must be of the .* patches of grid=.*, got 16'):
            show_matches(view, view, match, truth, grid)
    with pytest.raises(
        ValueError, match='grid must be of at least 1. patches, which match and truth name'
    ):
        match_accuracy(match, truth, (2, 4))

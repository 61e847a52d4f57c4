"""Views mirrored and turned: all eight symmetries of a square, from the draw over crops, loader and
geometry to pictures, against images whose pixels say where they are."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch

from ssl_patch.data.images import Images, TensorImages
from ssl_patch.data.sources import images
from ssl_patch.methods.aps import AsymmetricPatchSampler, sample_asymmetric
from ssl_patch.methods.geometry import (
    covered_fraction,
    keep_mask,
    patch_boxes,
    patch_centres,
    true_match,
)
from ssl_patch.methods.patch_pictures import show_areas, show_patches
from ssl_patch.training.checkpoint import as_identity, require_same_run
from ssl_patch.views import augmentations as A
from ssl_patch.views.crops import View, random_boxes, resized_crop
from ssl_patch.views.loader import ViewLoader

GRIDS = [(6, 6), (4, 8), (8, 3), (1, 8)]
EVERY = dict(flip=0.5, flip_ud=0.5, turns=1.0)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(H, W):
    "An image whose first channel is the row of a pixel's middle, the second its column; both / 200"
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing='ij')
    return torch.stack([y, x, torch.zeros(H, W)]) / 200


def patch_means(view, grid):
    "Mean row and column that the pixels of every patch say, (B,rows,cols,2) as y, x"
    B, _, h, w = view.x.shape
    rows, cols = grid
    parts = view.x[:, :2].view(B, 2, rows, h // rows, cols, w // cols)
    return 200 * parts.mean((3, 5)).permute(0, 2, 3, 1)


def symmetry_numbers(view):
    return 4 * view.flip.long() + view.turn


def turned_views(n=64, seed=0, **changes):
    x = coordinates(120, 150).expand(n, -1, -1, -1)
    return A.make_view(x, A.aug_weak(48, **EVERY | changes), gen(seed))


# ---- what is drawn


def test_every_symmetry_is_as_likely_and_none_comes_unasked():
    counts = symmetry_numbers(turned_views(1600, scale=(0.5, 1.0))).bincount(minlength=8)
    assert (counts / 200 - 1).abs().max() < 0.3
    upside_down = turned_views(400, turns=0.0, flip=0.0)
    assert set(symmetry_numbers(upside_down).tolist()) == {0, 6}  # mirrored and half a turn
    assert 0.4 < upside_down.flip.float().mean() < 0.6
    assert set(symmetry_numbers(turned_views(100, flip=0.0, flip_ud=0.0)).tolist()) == {0, 1, 2, 3}
    some = turned_views(2000, flip=0.0, flip_ud=0.0, turns=0.4)
    assert abs((some.turn > 0).float().mean() - 0.3) < 0.04  # a quarter of the turned by 0
    x = torch.rand(4, 3, 20, 20)
    assert A.make_view(x, A.aug_moco_v2(16), gen()).turn is None


@pytest.mark.parametrize('make', [A.aug_weak, A.aug_moco_v2, A.aug_byol_b, A.aug_none])
def test_an_augmentation_without_turns_draws_the_numbers_it_always_drew(make):
    a, g, x = make(16), gen(3), torch.rand(5, 3, 20, 30, generator=gen())
    v, after = A.make_view(x, a, g), g.get_state()
    g = gen(3)
    if a.scale is not None:
        assert torch.equal(v.box, random_boxes((20, 30), a.scale, a.ratio, g, 5))
    assert torch.equal(v.flip, torch.rand(5, generator=g) < a.flip)
    torch.rand(5, 13, generator=g)  # the colours
    assert torch.equal(g.get_state(), after)


def test_boxes_and_mirrors_are_those_of_the_same_augmentation_without_turns():
    plain, turned = turned_views(flip_ud=0.0, turns=0.0), turned_views(flip_ud=0.0)
    assert torch.equal(plain.box, turned.box) and torch.equal(plain.flip, turned.flip)


@pytest.mark.parametrize('name', ['flip_ud', 'turns'])
@pytest.mark.parametrize('wrong', [True, 1.5, -0.1, 'yes', None])
def test_a_chance_is_a_chance(name, wrong):
    with pytest.raises(ValueError, match=f'{name} must be a number at least 0 and at most 1'):
        A.aug_weak(32, **{name: wrong})


# ---- crops


@pytest.mark.parametrize('route', ['matrix', 'taps'])
@pytest.mark.parametrize('H,W,size', [(32, 32, 32), (90, 70, 24), (20, 30, 64)])
def test_a_turned_crop_is_the_crop_turned(route, H, W, size):
    x = torch.randint(0, 256, (8, 3, H, W), generator=gen(), dtype=torch.uint8)
    box, flip, turn = (
        random_boxes((H, W), generator=gen(1), n=8),
        torch.arange(8) > 3,
        torch.arange(8),
    )
    plain = resized_crop(x, box, size, flip, route)
    want = torch.stack([p.rot90(k, (1, 2)) for p, k in zip(plain, (turn % 4).tolist())])
    got = resized_crop(x, box, size, flip, route, turn % 4)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert got.is_contiguous()
    alone = resized_crop(x, box, size, turn=turn % 4)  # never mirrored
    torch.testing.assert_close(alone[:4], want[:4], atol=1e-5, rtol=0)


@pytest.mark.parametrize('wrong', [torch.zeros(2), torch.zeros(3, dtype=torch.long), 1])
def test_turns_of_another_kind_are_refused(wrong):
    x, box = torch.zeros(2, 3, 8, 8), torch.tensor([[0.0, 0, 4, 4]] * 2)
    with pytest.raises(ValueError, match=r'turn must be \(2\) torch.int64, quarter turns'):
        resized_crop(x, box, 4, turn=wrong)
    with pytest.raises(ValueError, match=r'turn must be \(2\) torch.int64, quarter turns'):
        patch_boxes(box, 4, turn=wrong)
    keep = torch.zeros(2, 2, 2)
    with pytest.raises(ValueError, match=r'turn2 must be \(2\) torch.int64, quarter turns'):
        covered_fraction(keep, box, box, turn2=wrong)
    with pytest.raises(ValueError, match=r'turn1 must be \(2\) torch.int64, quarter turns'):
        sample_asymmetric(box, box, 4, turn1=wrong)


def test_a_view_hands_on_its_turn():
    v = turned_views(4)
    moved, back = v.to('cpu'), pickle.loads(pickle.dumps(v))
    assert torch.equal(moved.turn, v.turn) and torch.equal(back.turn, v.turn)
    assert View(v.x, v.box, v.flip).to('cpu').turn is None
    words = {v.symmetry(i) for i in range(4)}
    assert words <= {
        'mirrored',
        *(f'{m}turned {d}°' for m in ('', 'mirrored, ') for d in (90, 180, 270)),
        '',
    }
    old = pickle.loads(pickle.dumps(A.aug_moco_v2(32)))
    del old.__dict__['turns'], old.__dict__['flip_ud']  # as pickled before they were
    assert (old.turns, old.flip_ud, old.turned) == (0.0, 0.0, False)


# ---- where patches lie: pixels that know it


@pytest.mark.parametrize('grid', GRIDS)
def test_patches_lie_where_their_pixels_say(grid):
    v = turned_views()
    assert set(symmetry_numbers(v).tolist()) == set(range(8))
    x, y = patch_centres(v.box, grid, v.flip, v.turn).unflatten(1, grid).unbind(-1)
    off = (torch.stack([y, x], -1) - patch_means(v, grid)).abs()
    assert off.max() < 0.75  # pixels of the source; at the rim the filter sees one side only
    t, l, h, w = patch_boxes(v.box, grid, v.flip, v.turn).unbind(-1)
    torch.testing.assert_close((h * w).sum((1, 2)), v.box[:, 2] * v.box[:, 3])
    torch.testing.assert_close(torch.stack([t.amin((1, 2)), l.amin((1, 2))], 1), v.box[:, :2])


class Stream(Images):
    "Coordinate images of different sizes, which stream"

    def __init__(self, n):
        super().__init__(name='stream')
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return coordinates(90 + i % 5, 100 + i % 7)


@pytest.mark.parametrize('workers', [0, 1])
def test_streamed_views_lie_where_their_pixels_say(workers):
    turned, plain = A.aug_weak(48, **EVERY), A.aug_weak(48)
    loader = ViewLoader(Stream(24), [turned, plain], 12, seed=1, workers=workers)
    seen = set()
    for (v, without), _ in loader.epoch(0):
        seen |= set(symmetry_numbers(v).tolist())
        assert without.turn is None
        for w in (v, without):
            x, y = patch_centres(w.box, (6, 6), w.flip, w.turn).unflatten(1, (6, 6)).unbind(-1)
            assert (torch.stack([y, x], -1) - patch_means(w, (6, 6))).abs().max() < 0.75
    assert len(seen) > 5
    loader.close()


def test_a_stopped_epoch_goes_on_with_the_same_turns():
    data = TensorImages(torch.randint(0, 256, (12, 3, 20, 20), generator=gen(), dtype=torch.uint8))
    for store in (data, Stream(12)):
        make = lambda: ViewLoader(store, [A.aug_moco_v2(16, **EVERY)], 4, seed=3)
        full, rest = list(make().epoch(1)), list(make().epoch(1, start=1))
        for ((a,), _), ((b,), _) in zip(full[1:], rest):
            assert torch.equal(a.turn, b.turn) and torch.equal(a.x, b.x)


# ---- what two views share


def upright(keep, flip, turn, back=False):
    "Kept patches of a view as the crop has them, (rows,cols) of one image; or the reverse"
    if back:
        return (keep.flip(1) if flip else keep).rot90(turn, (0, 1))
    keep = keep.rot90(-turn, (0, 1))
    return keep.flip(1) if flip else keep


@pytest.mark.parametrize('grid', GRIDS)
def test_covered_fraction_is_that_of_the_upright_crops(grid):
    g = gen(5)
    box1, box2 = (torch.rand(32, 4, generator=g) * 20 + 8 for _ in range(2))
    flip1, flip2 = torch.rand(2, 32, generator=g) < 0.5
    turn1, turn2 = torch.randint(4, (2, 32), generator=g)
    keep = torch.rand(32, *grid, generator=g) < 0.4
    for grid2 in (grid, (2, 5)):
        got = covered_fraction(keep, box1, box2, flip1, flip2, grid2, turn1, turn2)
        for b in range(32):
            f1, f2, t1, t2 = bool(flip1[b]), bool(flip2[b]), int(turn1[b]), int(turn2[b])
            crop_grid = grid2[::-1] if t2 % 2 else grid2
            one = upright(keep[b], f1, t1)[None]
            plain = covered_fraction(one, box1[b : b + 1], box2[b : b + 1], grid2=crop_grid)[0]
            want = upright(plain, f2, t2, back=True)
            torch.testing.assert_close(got[b], want, atol=1e-6, rtol=0)
        draws = torch.stack([keep, ~keep], 1)
        both = covered_fraction(draws, box1, box2, flip1, flip2, grid2, turn1, turn2)
        torch.testing.assert_close(both[:, 0], got)
    one_turned = covered_fraction(keep, box1, box2, flip1, flip2, turn1=turn1)
    none = torch.zeros(32, dtype=torch.long)
    full = covered_fraction(keep, box1, box2, flip1, flip2, turn1=turn1, turn2=none)
    assert torch.equal(one_turned, full)


@pytest.mark.parametrize('grid', GRIDS)
def test_a_true_match_shows_the_place(grid):
    q, k = turned_views(seed=1, scale=(0.4, 1.0)), turned_views(seed=2, scale=(0.4, 1.0))
    index, ok = true_match(q, k, grid)
    assert 0.3 < ok.float().mean() < 1
    asked, found = (patch_means(v, grid).flatten(1, 2) for v in (q, k))
    found = found.gather(1, index[..., None].expand(-1, -1, 2))
    *_, h, w = patch_boxes(k.box, grid, k.flip, k.turn).flatten(1, 2).unbind(-1)
    reach = torch.stack([h, w], -1).gather(1, index[..., None].expand(-1, -1, 2)) / 2
    off = (asked - found).abs() - reach
    assert off[ok].max() < 1.5  # its centre lies within the matched patch
    # where there is none, the centre lies outside of the other view
    x, y = patch_centres(q.box, grid, q.flip, q.turn).unbind(-1)
    t, l, h, w = k.box[..., None].unbind(1)
    inside = (y >= t) & (y < t + h) & (x >= l) & (x < l + w)
    assert torch.equal(inside, ok)


def test_a_turned_view_against_itself_is_the_turned_grid():
    numbers = torch.arange(24).view(4, 6)
    box = torch.tensor([[3.0, 5, 40, 60]])
    make = lambda flip, turn: View(
        torch.zeros(1, 3, 8, 8), box, torch.tensor([flip]), torch.tensor([turn])
    )
    for flip in (False, True):
        for turn in (0, 2):
            index, ok = true_match(make(flip, turn), make(False, 0), (4, 6))
            want = (numbers.flip(1) if flip else numbers).rot90(turn, (0, 1)).flatten()
            assert ok.all() and torch.equal(index[0], want)


# ---- APS


def seen_twice(keeps, q, k, grid):
    how = dict(flip1=q.flip, flip2=k.flip, turn1=q.turn, turn2=k.turn)
    cover = covered_fraction(keep_mask(keeps[0], grid), q.box, k.box, **how)
    return cover.flatten(2).gather(2, keeps[1]).mean()


def test_the_sampler_avoids_what_a_turned_view_has_shown():
    q, k = turned_views(300, seed=1, scale=(0.4, 1.0)), turned_views(300, seed=2, scale=(0.4, 1.0))
    aware = seen_twice(AsymmetricPatchSampler()(q, k, (8, 8), gen()), q, k, (8, 8))
    blind = AsymmetricPatchSampler(flip_aware=False)(q, k, (8, 8), gen())
    assert aware < 0.75 * seen_twice(blind, q, k, (8, 8))
    plain = [View(v.x, v.box, v.flip) for v in (q, k)]
    upright = [replace(v, turn=torch.zeros_like(v.flip, dtype=torch.long)) for v in plain]
    same = (AsymmetricPatchSampler()(*pair, (8, 8), gen()) for pair in (plain, upright))
    assert all(map(torch.equal, *same))


# ---- pictures


def test_pictures_say_how_a_view_was_turned():
    import matplotlib.pyplot as plt

    box = torch.tensor([[4.0, 6, 20, 30]])
    x = torch.rand(3, 40, 50)
    towards = {(0, 0): (1, 0), (1, 0): (-1, 0), (0, 1): (0, 1), (1, 1): (0, 1), (0, 2): (-1, 0)}
    towards |= {(1, 2): (1, 0), (0, 3): (0, -1), (1, 3): (0, -1)}  # y points down
    for (flip, turn), (dx, dy) in towards.items():
        flips, turns = torch.tensor([bool(flip)]), torch.tensor([turn])
        v = View(resized_crop(x[None], box, 16, flips, turn=turns), box, flips, turns)
        source, shown = A.show_views(x, v).axes
        said = shown.get_title()
        assert ('mirrored' in said) == bool(flip) and (f'turned {90 * turn}°' in said) == (turn > 0)
        (tip, start) = source.texts[-1].xy, source.texts[-1].xyann
        assert [int((a > b + 1) - (a < b - 1)) for a, b in zip(tip, start)] == [dx, dy]
        # the arrow's tip is at the right of the view
        at = patch_boxes(box, (1, 10), flips, turns)[0, 0, -1]
        assert at[1] - 0.5 <= tip[0] <= at[1] + at[3] and at[0] - 0.5 <= tip[1] <= at[0] + at[2]
        keep = torch.arange(3).view(1, 1, 3)
        titles = [a.get_title() for a in show_patches(x, [v, v], [keep, keep], 4).axes]
        assert '100% of blue seen twice' in titles[1]
        assert (f'turned {90 * turn}°' in titles[0]) == (turn > 0)
        drawn = show_areas(x, [v, v], [keep, keep], 4).collections[0].get_paths()
        corners = torch.cat([torch.tensor(p.vertices) for p in drawn])
        areas = patch_boxes(box, 4, flips, turns)[0].flatten(0, 1)[:3]
        assert corners[:, 1].min() == areas[:, 0].min() and corners[:, 0].min() == areas[:, 1].min()
        plt.close('all')


# ---- runs


def test_a_run_trains_with_turns_and_goes_on(pretrainer, tmp_path):
    from ssl_patch.methods.compose import build_method
    from ssl_patch.models.encoders import vit
    from ssl_patch.training.pretrain import Pretrainer

    def run(epochs, **how):
        torch.manual_seed(0)
        net = vit(size=16, patch=4, width=32, depth=1, heads=2)
        views = (A.aug_aps_cifar(16, **EVERY),) * 2
        method = build_method('aps', net, augmentations=views, hidden=32, out=16)
        x = torch.randint(0, 256, (64, 3, 16, 16), generator=gen(), dtype=torch.uint8)
        how = dict(batch_size=32, device='cpu', progress='quiet', bf16=False) | how
        return Pretrainer(method, images(x), epochs, **how).fit()

    run(1, out=tmp_path / 'a')
    long, on = run(2), run(2, out=tmp_path / 'a', resume=True)
    assert on.history[-1]['loss'] == pytest.approx(long.history[-1]['loss'], abs=1e-6)
    assert run(2).run_config()['augmentations'][0]['turns'] == 1.0


def test_a_checkpoint_of_before_is_one_without_turns(pretrainer, tmp_path):
    run = pretrainer(out=tmp_path / 'r', epochs=1)
    run.fit()
    state = run.state_dict()
    before = [dict(a) for a in run.run_config()['augmentations']]
    for a in before:
        del a['flip_ud'], a['turns']
    state['identity'] = state['identity'] | as_identity(
        dict(augmentations=before), ('augmentations',)
    )
    again = pretrainer(epochs=1)
    again.load_state_dict(state)
    assert again.batches == run.batches
    before[0]['turns'] = 0.5
    state['identity'] |= as_identity(dict(augmentations=before), ('augmentations',))
    with pytest.raises(
        ValueError, match=r'augmentations: the checkpoint has 0.turns 0.5, this run 0'
    ):
        pretrainer(epochs=1).load_state_dict(state)
    mine = as_identity(dict(a=[dict(x=1, y=2)]), ('a',))
    assert require_same_run(mine, as_identity(dict(a=[dict(x=1)]), ('a',)), dict(a=dict(y=2))) == {}


# ---- images from above


@pytest.mark.skipif('EUROSAT_NPZ' not in os.environ, reason='EUROSAT_NPZ names a packed EuroSAT')
def test_satellite_images_match_where_geometry_says():
    data = images(os.environ['EUROSAT_NPZ'])
    x = torch.stack([data.train[i] for i in range(64)])
    q, k = (A.make_view(x, A.aug_weak(64, **EVERY, scale=(0.5, 1.0)), gen(s)) for s in (1, 2))
    index, ok = true_match(q, k, 8)
    means = [v.x.view(64, 3, 8, 8, 8, 8).mean((3, 5)).flatten(2).mT for v in (q, k)]
    pick = lambda i: means[1].gather(1, i[..., None].expand(-1, -1, 3))
    off = lambda i: (means[0] - pick(i)).abs().mean(-1)[ok].mean()
    blind = true_match(replace(q, turn=None), replace(k, turn=None), 8)[0]
    assert off(index) < 0.6 * off(blind)


def test_the_shell_turns_the_views(tmp_path, capsys):
    from ssl_patch.cli import main

    tiny = '--encoder vit_tiny --patch 8 --width 32 --depth 1 --heads 2 --options hidden=32 out=16'
    more = f'--epochs 1 --batch-size 256 --device cpu --workers 0 --progress quiet {tiny}'.split()
    more += ['--augmentation', 'flip_ud=.5', 'turns=1']
    main(['pretrain', '--out', str(tmp_path / 'r'), *more])
    config = json.loads((tmp_path / 'r' / 'config.json').read_text())
    assert [(a['flip_ud'], a['turns']) for a in config['augmentations']] == [(0.5, 1)] * 2
    assert 'flip_ud=0.5 turns=1' in config['slots']['augmentations']
    for words, told in (
        (
            'turns=true',
            "turns must be a number at least 0 and at most 1, as it is a chance, got 'true'",
        ),
        ('jitter=3', 'jitter must be strengths'),
        ('blur_kernel=wide', 'blur_kernel must be a whole number'),
        ('turn=1', "--augmentation has no option 'turn'; did you mean 'turns'?"),
        ('turns', 'an option must be written name=value'),
    ):
        with pytest.raises(SystemExit) as e:
            main(['pretrain', '--out', str(tmp_path / 'x'), '--augmentation', words])
        said = capsys.readouterr().err
        assert e.value.code == 2 and told in said and said.count('\n') == 1
    with pytest.raises(SystemExit):  # goes on as it began
        main(['pretrain', '--out', str(tmp_path / 'r'), '--resume', '--augmentation', 'turns=.5'])
    assert 'augmentation' in capsys.readouterr().err

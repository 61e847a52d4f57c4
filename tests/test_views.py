"Views against torchvision image by image, reproducibility, resume, bad input"

import copy
import gc
import multiprocessing
import pickle

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import RandomResizedCrop

from ssl_patch.data.images import Images, TensorImages
from ssl_patch.views import augmentations as A
from ssl_patch.views import color, fast_cpu
from ssl_patch.views.augmentations import Augmentation, make_view, show_augmentation
from ssl_patch.views.crops import View, random_boxes, resized_crop
from ssl_patch.views.loader import ViewLoader, seed_for


FNS = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, eps):
    torch.testing.assert_close(a, b, atol=eps, rtol=0)


def crop_one_by_one(x, box, size, flip):
    y = torch.stack(
        [
            TF.resized_crop(im, *b, [size, size], antialias=True)
            for im, b in zip(x, box.long().tolist())
        ]
    )
    return torch.where(flip[:, None, None, None], y.flip(-1), y)


# ---- boxes


@pytest.mark.parametrize(
    'H,W,scale,ratio',
    [
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (100, 150, (0.2, 1.0), (3 / 4, 4 / 3)),
        (60, 200, (0.5, 1.0), (0.9, 1.1)),
        (7, 5, (0.08, 1.0), (0.5, 2.0)),
    ],
)
def test_boxes_have_torchvisions_distribution(H, W, scale, ratio):
    n = 3000
    torch.manual_seed(1)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(torch.empty(3, H, W), scale, ratio) for _ in range(n)]
    ).double()
    ours = random_boxes((H, W), scale, ratio, gen(1), n).double()
    for f in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        both = torch.cat([f(ours), f(theirs)]).unique()
        cdf = [torch.searchsorted(f(b).sort()[0], both, right=True) / n for b in (ours, theirs)]
        limit = 1.95 * (2 / n) ** 0.5  # two-sample Kolmogorov-Smirnov, p about 0.001
        assert (cdf[0] - cdf[1]).abs().max() < limit


def test_boxes_are_whole_inside_and_per_image():
    sizes = torch.tensor([[10, 400], [400, 10], [33, 47], [1, 1]]).repeat(50, 1)
    box = random_boxes(sizes, generator=gen())
    assert torch.equal(box, box.round()) and (box[:, 2:] >= 1).all() and (box[:, :2] >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= sizes).all()
    assert len(box[2::4].unique(dim=0)) > 40


@pytest.mark.parametrize('H,W', [(10, 400), (400, 10)])
def test_impossible_ratio_gives_the_central_box(H, W):
    theirs = RandomResizedCrop.get_params(torch.empty(3, H, W), (0.9, 1.0), (3 / 4, 4 / 3))
    assert random_boxes((H, W), (0.9, 1.0), generator=gen()).long()[0].tolist() == list(theirs)


# ---- crop


@pytest.mark.parametrize('route', ['matrix', 'taps', 'auto'])
@pytest.mark.parametrize('seed', range(6))
def test_crop_equals_torchvision(route, seed):
    g = gen(seed)
    H, W, size = (int(torch.randint(2, 90, (1,), generator=g)) for _ in range(3))
    x, box = (
        torch.rand(9, 3, H, W, generator=g),
        random_boxes((H, W), (0.01, 1.0), (0.3, 3.0), g, 9),
    )
    flip = torch.rand(9, generator=g) < 0.5
    close(resized_crop(x, box, size, flip, route), crop_one_by_one(x, box, size, flip), 1e-5)


@pytest.mark.parametrize('route', ['matrix', 'taps'])
@pytest.mark.parametrize('H,W,size', [(300, 410, 224), (150, 200, 224), (500, 640, 48)])
def test_crop_of_large_images(route, H, W, size):
    x, box, flip = (
        torch.rand(3, 3, H, W),
        random_boxes((H, W), (0.05, 1.0), generator=gen(), n=3),
        torch.tensor([True, False, True]),
    )
    close(resized_crop(x, box, size, flip, route), crop_one_by_one(x, box, size, flip), 1e-4)


def test_crop_of_uint8_is_the_crop_of_its_floats():
    x = torch.randint(0, 256, (5, 3, 40, 50), dtype=torch.uint8)
    box, flip = random_boxes((40, 50), generator=gen(), n=5), torch.zeros(5, dtype=torch.bool)
    for route in ('matrix', 'taps'):
        close(resized_crop(x, box, 24, flip, route), crop_one_by_one(x / 255, box, 24, flip), 1e-5)


def test_routes_agree_on_boxes_with_fractions():
    g = gen()
    x, box = (
        torch.rand(20, 2, 31, 37, generator=g),
        torch.rand(20, 4, generator=g) * torch.tensor([10.0, 12, 20, 24])
        + torch.tensor([0.0, 0, 0.2, 0.2]),
    )
    flip = torch.rand(20, generator=g) < 0.5
    for size in (5, 32):
        close(
            resized_crop(x, box, size, flip, 'matrix'),
            resized_crop(x, box, size, flip, 'taps'),
            1e-5,
        )
    shifted = resized_crop(x, box.round() + torch.tensor([0.5, 0, 0, 0]), 16) - resized_crop(
        x, box.round(), 16
    )
    assert shifted.abs().max() > 0.01  # fractions are not rounded away


# ---- colours


def one_by_one(f, x, *numbers):
    return torch.stack([f(im, *v) for im, *v in zip(x, *[n.tolist() for n in numbers])])


def tricky(seed=0):
    "Random pixels, and greys, pure colours, black, white and near-ties among them"
    x = torch.rand(12, 3, 13, 17, generator=gen(seed))
    x[0], x[1], x[2], x[3] = 0.5, x[1].round(), 0.0, 1.0
    x[4, 0], x[5, 1] = x[4, 1], x[5, 2] + 1e-7
    return x.clamp(0, 1)


@pytest.mark.parametrize(
    'name,low,high',
    [('brightness', 0, 3), ('contrast', 0, 3), ('saturation', 0, 3), ('hue', -0.5, 0.5)],
)
@pytest.mark.parametrize('seed', range(3))
def test_colour_changes_equal_torchvision(name, low, high, seed):
    x, v = tricky(seed), low + torch.rand(12, generator=gen(seed)) * (high - low)
    before = x.clone()
    ours = getattr(color, name)(x, v)
    assert torch.equal(x, before), 'the argument was changed'
    close(ours, one_by_one(getattr(TF, 'adjust_' + name), x, v), 1e-4)
    assert (ours - x).abs().max() > 0.05
    close(
        getattr(color, name)(x, v[0].item())[5],
        getattr(TF, 'adjust_' + name)(x[5], v[0].item()),
        1e-4,
    )  # one number for all


@pytest.mark.parametrize('size', [12, 300])  # pieces of many images, and one at a time
def test_jitter_in_any_order_equals_torchvision(size):
    n, g = 60 if size == 12 else 5, gen()
    x, f, order = (
        torch.rand(n, 3, size, size, generator=g),
        torch.rand(n, 4, generator=g) * 0.8 + torch.tensor([0.6, 0.6, 0.6, -0.4]),
        torch.rand(n, 4, generator=g).argsort(1),
    )
    ours = color.color_jitter(x, f, order)
    for im, o, v, y in zip(x, order.tolist(), f.tolist(), ours):
        for op in o:
            im = FNS[op](im, v[op])
        close(y, im, 1e-3)


def test_both_plans_of_jitter_give_the_same(monkeypatch):
    "Images collected by when their hue is turned (small, GPU), and by their whole order (large)."
    g = gen()
    x, f, order = (
        torch.rand(30, 3, 8, 8, generator=g),
        torch.rand(30, 4, generator=g) * 0.8 + torch.tensor([0.6, 0.6, 0.6, -0.4]),
        torch.rand(30, 4, generator=g).argsort(1),
    )
    rows = torch.arange(30)[::2]
    assert (
        len([r for r, _ in fast_cpu._by_hue(f, order, rows) if len(r)])
        <= 4
        < len(list(fast_cpu._by_order(f, order, rows)))
    )
    for rows in (rows, torch.arange(30)):
        by_hue = fast_cpu.color_jitter_(x.clone(), f, order, rows)
        with monkeypatch.context() as m:
            m.setattr(fast_cpu, '_by_hue', fast_cpu._by_order)
            close(fast_cpu.color_jitter_(x.clone(), f, order, rows), by_hue, 2e-6)
    assert torch.equal(
        fast_cpu.color_jitter_(x.clone(), f, order, torch.arange(30)[::2])[1::2], x[1::2]
    )


@pytest.mark.parametrize(
    'size,kernel', [((32, 32), 3), ((40, 29), 23), ((12, 12), 23), ((224, 224), 23)]
)
def test_blur_equals_torchvision(size, kernel):
    x, s = torch.rand(4, 3, *size), torch.tensor([0.1, 0.7, 1.3, 2.0])
    theirs = one_by_one(lambda im, v: TF.gaussian_blur(im, [kernel] * 2, [v] * 2), x, s)
    close(color.gaussian_blur(x, kernel, s), theirs, 1e-5)
    j = torch.arange(kernel) - kernel // 2
    k = torch.softmax(-0.5 * (j / s[:, None]) ** 2, 1)
    close(color._blur_by_convolution(x, k), theirs, 1e-5)  # the route of a GPU


def test_grey_and_solarize_equal_torchvision():
    x, t = tricky(), torch.rand(12, generator=gen())
    close(color.grayscale(x), one_by_one(lambda im: TF.rgb_to_grayscale(im, 3), x), 1e-6)
    close(color.solarize(x, t), one_by_one(TF.solarize, x, t), 1e-6)
    close(color.solarize(x), one_by_one(lambda im: TF.solarize(im, 0.5), x), 1e-6)


# ---- augmentations and views


def test_make_view_equals_torchvision_step_by_step():
    r = A.aug_byol_b(48, blur_p=0.5, solarize_p=0.5, gray_p=0.3)
    x = torch.randint(0, 256, (40, 3, 64, 80), dtype=torch.uint8)
    v, g = make_view(x, r, gen(5)), gen(5)
    box, flip, _ = A.draw_boxes(r, (64, 80), g, 40)
    c = A.draw_params(r, 40, g)
    assert all(0 < m.sum() < 40 for m in (flip, c.jitter, c.gray, c.blur, c.solarize))
    for i in range(40):  # crop, jitter, grey, blur, solarize, then flip
        y = TF.resized_crop(x[i] / 255, *box[i].long().tolist(), [48, 48], antialias=True)
        if c.jitter[i]:
            for op in c.order[i].tolist():
                y = FNS[op](y, c.factors[i, op].item())
        if c.gray[i]:
            y = TF.rgb_to_grayscale(y, 3)
        if c.blur[i]:
            y = TF.gaussian_blur(y, [r.kernel] * 2, [c.sigma[i].item()] * 2)
        if c.solarize[i]:  # a pixel at the threshold may fall on either side
            edge = (y - 0.5).abs() < 1e-4
            y = torch.where(edge, v.x[i].flip(-1) if flip[i] else v.x[i], TF.solarize(y, 0.5))
        close(v.x[i], y.flip(-1) if flip[i] else y, 1e-3)
    assert torch.equal(v.box, box) and torch.equal(v.flip, flip)


def test_chances_and_ranges_of_what_is_drawn():
    r = A.aug_byol_b(32, blur_p=0.3)
    c = A.draw_params(r, 20000, gen())
    for m, p in ((c.jitter, 0.8), (c.gray, 0.2), (c.blur, 0.3), (c.solarize, 0.2)):
        assert abs(m.float().mean() - p) < 0.015
    low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    close(c.factors.amin(0), low, 0.002)
    close(c.factors.amax(0), high, 0.002)
    close(c.factors.mean(0), (low + high) / 2, 0.01)
    counts = (c.order @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)[1]
    assert len(counts) == 24 and (counts.float() / 20000 * 24 - 1).abs().max() < 0.2
    assert 0.1 <= c.sigma.min() < 0.11 and 1.99 < c.sigma.max() <= 2
    assert (
        A.draw_params(Augmentation(32, jitter=(2.0, 0, 0, 0)), 999, gen()).factors[:, 0].min() >= 0
    )


def test_same_generator_same_view_and_every_image_its_own():
    x = torch.randint(0, 256, (1, 3, 50, 50), dtype=torch.uint8).expand(16, -1, -1, -1)
    a, b, c = (make_view(x, A.aug_moco_v2(32), gen(s)) for s in (1, 1, 2))
    assert torch.equal(a.x, b.x) and torch.equal(a.box, b.box) and torch.equal(a.flip, b.flip)
    assert not torch.equal(a.x, c.x)
    assert (
        len(a.x.flatten(1).unique(dim=0)) == 16
        and len(a.box.unique(dim=0)) == 16
        and 0 < a.flip.sum() < 16
    )
    assert (
        a.x.dtype == torch.float32
        and a.x.min() >= 0
        and a.x.max() <= 1
        and x.is_contiguous() is False
    )


def test_views_leave_their_source_alone():
    x = torch.rand(6, 3, 32, 32)
    before = x.clone()
    make_view(x, A.aug_byol_b(32, solarize_p=1.0, gray_p=0.5), gen())
    A.photometric(x, A.aug_byol_b(32, solarize_p=1.0), gen())
    assert torch.equal(x, before)


def test_no_augment_is_the_resized_whole():
    x = torch.randint(0, 256, (2, 3, 30, 50), dtype=torch.uint8)
    v = make_view(x, A.aug_none(16))
    assert v.box.tolist() == [[0, 0, 30, 50]] * 2 and not v.flip.any()
    close(v.x, torch.stack([TF.resize(im / 255, [16, 16], antialias=True) for im in x]), 1e-5)


def test_augmentations_are_as_published():
    assert (
        A.aug_moco_v2().jitter,
        A.aug_moco_v2().blur_p,
        A.aug_moco_v1().jitter_p,
        A.aug_aps_cifar().scale,
        A.aug_moco_cifar().scale,
    ) == ((0.4, 0.4, 0.4, 0.1), 0.5, 1.0, (0.15, 1.0), (0.08, 1.0))
    assert [(r.blur_p, r.solarize_p, r.jitter) for r in (A.aug_byol_a(), A.aug_byol_b())] == [
        (1.0, 0.0, (0.4, 0.4, 0.2, 0.1)),
        (0.1, 0.2, (0.4, 0.4, 0.2, 0.1)),
    ]
    assert [(r.size, r.scale) for r in A.multi_crop()] == [
        (224, (0.2, 1.0)),
        (224, (0.2, 1.0)),
        (192, (0.172, 0.86)),
        (160, (0.143, 0.715)),
        (128, (0.114, 0.571)),
        (96, (0.086, 0.429)),
    ]
    assert (
        all(r.size % 4 == 0 for r in A.multi_crop(32, multiple=4))
        and A.aug_moco_v2(32, blur_p=0.0).blur_p == 0
    )
    with pytest.raises(Exception):
        A.aug_weak().size = 3


# ---- loader


class Stream(Images):
    "Images of different sizes, without `.images`: a store that streams"

    def __init__(self, n):
        super().__init__(name='stream')
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.randint(
            0, 256, (3, 20 + i % 5, 24 + i % 3), generator=gen(i), dtype=torch.uint8
        )


def stores():
    return [
        TensorImages(torch.randint(0, 256, (23, 3, 20, 20), generator=gen(), dtype=torch.uint8)),
        Stream(23),
    ]


def same(a, b):
    assert len(a) == len(b)
    for (va, ia), (vb, ib) in zip(a, b):
        assert torch.equal(ia, ib) and len(va) == len(vb)
        for u, w in zip(va, vb):
            assert (
                torch.equal(u.x, w.x) and torch.equal(u.box, w.box) and torch.equal(u.flip, w.flip)
            )


@pytest.mark.parametrize('store', stores(), ids=['memory', 'stream'])
def test_resume_gives_the_tail_of_the_epoch(store):
    make = lambda seed=3: ViewLoader(store, [A.aug_moco_v2(16), A.aug_byol_b(12)], 5, seed=seed)
    full = list(make().epoch(2))
    assert len(full) == len(make()) == 4
    for start in (0, 1, 3, 4):
        same(list(make().epoch(2, start)), full[start:])
    idx = torch.cat([i for _, i in full])
    assert len(idx.unique()) == 20 and all(
        v.x.shape[-1] == r.size for v, r in zip(full[0][0], (A.aug_moco_v2(16), A.aug_byol_b(12)))
    )
    for other in (make().epoch(1), make(4).epoch(2)):
        views, i = next(iter(other))
        assert not torch.equal(i, full[0][1]) and not torch.equal(views[0].x, full[0][0][0].x)
    assert not torch.equal(full[0][0][0].box, full[0][0][1].box), 'the two views share their boxes'


@pytest.mark.parametrize('store', stores(), ids=['memory', 'stream'])
def test_an_image_is_cut_anew_in_every_epoch(store):
    def boxes(e):
        return {
            i: b
            for (v,), idx in ViewLoader(store, A.aug_weak(16), 5).epoch(e)
            for i, b in zip(idx.tolist(), v.box)
        }

    first, second = boxes(0), boxes(1)
    both = first.keys() & second.keys()
    assert len(both) > 15 and sum(torch.equal(first[i], second[i]) for i in both) < 5


def test_workers_do_not_change_the_views():
    make = lambda workers: ViewLoader(Stream(12), [A.aug_moco_v2(16)] * 2, 4, workers=workers)
    same(list(make(0).epoch(1)), list(make(2).epoch(1)))


@pytest.mark.parametrize('store', stores(), ids=['memory', 'stream'])
def test_the_loader_hands_out_the_images_it_names(store):
    for (v,), idx in ViewLoader(store, A.aug_none(16), 4).epoch(0):
        for k, i in enumerate(idx.tolist()):
            close(v.x[k], TF.resize(store[i] / 255, [16, 16], antialias=True), 1e-5)


def test_seeds_depend_on_every_key():
    keys = [(0,), (1,), (0, 1), (1, 0), (0, 0), ('order', 0), (0, 'order')]
    seeds = {seed_for(*k) for k in keys}
    assert (
        len(seeds) == len(keys)
        and all(0 <= s < 2**63 for s in seeds)
        and seed_for(1, 2) == seed_for(1, 2)
    )
    assert seed_for(0, 1) == 8566881351708354045  # the same on every machine, for ever


def test_view_moves_and_counts():
    v = make_view(torch.rand(3, 3, 8, 8), A.aug_weak(8))
    assert len(v) == 3 and isinstance(v.to('cpu'), View) and '3 of 3x8x8' in repr(v)


# ---- pictures


def test_figures_have_a_panel_for_everything():
    x = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    views = [make_view(x, A.aug_weak(16), gen(i)) for i in range(2)]
    fig = A.show_views(x, views, n=2)
    assert len(fig.axes) == 6 and len(fig.axes[0].patches) == 2
    patch = fig.axes[3].patches[1]
    assert [
        patch.get_y() + 0.5,
        patch.get_x() + 0.5,
        patch.get_height(),
        patch.get_width(),
    ] == pytest.approx(views[1].box[1].tolist())
    assert ('mirrored' in fig.axes[1].get_title()) == bool(views[0].flip[0])
    assert len(A.show_augmentation(x[0], dict(a=A.aug_weak(8), b=A.aug_moco_v2(8)), n=3).axes) == 6


# ---- bad input: one clear error that names the argument

X = torch.zeros(2, 3, 8, 8)
B = torch.tensor([[0.0, 0, 4, 4]] * 2)


@pytest.mark.parametrize(
    'f,words',
    [
        (lambda: resized_crop(X[0], B, 4), 'x must be'),
        (lambda: resized_crop(X.long(), B, 4), 'int64'),
        (lambda: resized_crop(X, B[:1], 4), r'box must be \(2,4\)'),
        (lambda: resized_crop(X, B + 5, 4), 'inside the 8x8 image'),
        (lambda: resized_crop(X, B - 1, 4), 'inside the 8x8 image'),
        (lambda: resized_crop(X, B * torch.tensor([1, 1, 0, 1]), 4), 'area'),
        (lambda: resized_crop(X, B * float('nan'), 4), 'nan'),
        (lambda: resized_crop(X, B, 0), 'size'),
        (lambda: resized_crop(X, B, 4, torch.tensor([True])), 'flip'),
        (lambda: resized_crop(X, B, 4, route='fast'), 'route'),
        (lambda: random_boxes((8, 8), scale=(0.5, 0.2)), 'scale'),
        (lambda: random_boxes((8, 8), scale=(0, 1)), 'scale'),
        (lambda: random_boxes((8, 8), ratio=(-1, 1)), 'ratio'),
        (lambda: random_boxes(torch.zeros(3)), 'sizes'),
        (lambda: color.brightness(X.byte(), 1.0), 'uint8'),
        (lambda: color.hue(X, torch.zeros(3)), '2 images'),
        (lambda: color.gaussian_blur(X, 4, 1.0), 'kernel'),
        (lambda: color.gaussian_blur(X, 17, 1.0), 'kernel'),
        (lambda: color.color_jitter(X, torch.ones(2, 4), torch.zeros(2, 4).long()), 'order'),
        (lambda: Augmentation(0), 'size'),
        (lambda: Augmentation(32, scale=(0.2, 1.5)), 'scale'),
        (lambda: Augmentation(32, jitter_p=1.5), 'jitter_p'),
        (lambda: Augmentation(32, jitter=(0.4, 0.4, 0.4, 0.6)), 'jitter'),
        (lambda: Augmentation(32, blur_p=0.5, blur_kernel=4), 'blur_kernel'),
        (lambda: Augmentation(32, blur_sigma=(0, 2)), 'blur_sigma'),
        (lambda: make_view(X[:, :1], Augmentation(4)), 'colour images'),
        (lambda: make_view(X[0], Augmentation(4)), 'colour images'),
        (lambda: show_augmentation(X, Augmentation(4)), r'one image \(C,H,W\)'),
        (
            lambda: ViewLoader(TensorImages(X.byte()), Augmentation(4), 3),
            'batch_size must be .* at least 1 and at most 2, the images of the data, got 3',
        ),
        (lambda: ViewLoader(TensorImages(X.byte()), Augmentation(4), 0), 'batch_size'),
        (lambda: ViewLoader(TensorImages(X.byte()), [], 1), 'augmentations'),
        (lambda: ViewLoader(TensorImages(X.byte()), A.aug_weak, 1), 'augmentations'),
        (lambda: ViewLoader(TensorImages(X.byte()), Augmentation(4), 1).epoch(0, start=3), 'start'),
    ],
)
def test_bad_input(f, words):
    with pytest.raises(ValueError, match=words):
        f()


@pytest.mark.parametrize('workers', [0, 1])
def test_workers_stay_and_change_nothing(workers):
    "Epochs in a row, begun or left in the middle, and two at once, are those of a new loader."
    make = lambda: ViewLoader(Stream(12), [A.aug_moco_v2(16), A.aug_weak(12)], 4, workers=workers)

    def same(a, b):
        a, b = list(a), list(b)
        assert len(a) == len(b) > 0
        for (u, i), (v, j) in zip(a, b):
            assert torch.equal(i, j) and all(
                torch.equal(s.x, t.x) and torch.equal(s.box, t.box) for s, t in zip(u, v)
            )

    loader = make()
    same(loader.epoch(0), make().epoch(0))
    same(loader.epoch(1, start=1), make().epoch(1, start=1))
    left = loader.epoch(2)
    next(left)
    same(loader.epoch(3), make().epoch(3))
    left.close()
    both = list(zip(loader.epoch(4), loader.epoch(5)))
    same([a for a, _ in both], make().epoch(4))
    same([b for _, b in both], make().epoch(5))


def test_workers_live_on_and_are_let_go():
    "The same processes in the next epoch; others after `close` and for other seeds; copies work."
    loader = ViewLoader(Stream(12), [A.aug_moco_v2(16)], 4, workers=1)

    def pids():
        seen = set()
        for _ in loader.epoch(0):
            seen |= {p.pid for p in multiprocessing.active_children()}
        return seen

    first = pids()
    assert len(first) == 1 and pids() == first
    same = pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)
    for other in same:
        assert torch.equal(
            next(other.epoch(1))[0][0].x,
            next(ViewLoader(Stream(12), [A.aug_moco_v2(16)], 4).epoch(1))[0][0].x,
        )
    del same, other
    gc.collect()
    loader.seed = 1
    changed, new = (
        next(loader.epoch(0))[0][0],
        next(ViewLoader(Stream(12), [A.aug_moco_v2(16)], 4, seed=1).epoch(0))[0][0],
    )
    assert torch.equal(changed.x, new.x) and torch.equal(changed.box, new.box)
    second = pids()
    assert not first & second
    loader.close()
    gc.collect()
    assert not any(p.pid in first | second for p in multiprocessing.active_children())


def test_a_stream_of_other_images_is_refused():
    with pytest.raises(ValueError, match='number .* of the data must be'):
        next(ViewLoader([torch.zeros(1, 8, 8, dtype=torch.uint8)] * 4, [A.aug_weak(4)], 2).epoch(0))


@pytest.mark.parametrize('inner', [False, True])
@pytest.mark.parametrize('size', [8, 40, 96])
def test_one_large_image_is_cut_as_a_batch_is(inner, size):
    x = torch.randint(
        0, 256, (3, 90, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    if inner:
        x = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for i in range(6):
        box, flip, _ = A.draw_boxes(
            A.aug_weak(size), x.shape[-2:], torch.Generator().manual_seed(i), 1
        )
        for y in (x, x / 255):
            assert torch.equal(
                fast_cpu.crop_one(y, box, size, flip, torch.empty(3, size, size))[None],
                fast_cpu.crop_by_taps(y[None], box, size, flip),
            )


# ---- pixels that are none

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
PIXELS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NORMALISED = (PIXELS - MEAN[:, None, None]) / STD[:, None, None]


@pytest.mark.parametrize(
    'x, call',
    [
        (NORMALISED, r'undoes the normalising.*got torch.float32 from -'),
        (2 * PIXELS - 1, 'undoes the normalising'),
        (PIXELS * 255, r'x / 255'),
        (PIXELS * float('nan'), 'uint8, or float in'),
        (NORMALISED.half(), 'undoes the normalising'),
    ],
    ids=range(5),
)
def test_floats_that_are_no_pixels_are_refused(x, call):
    "By everything that changes colours, with the call that mends it."
    one = torch.ones(2)
    for f in (
        lambda: make_view(x, A.aug_weak(4), gen()),
        lambda: A.photometric(x, A.aug_moco_v2(8), gen()),
        lambda: color.brightness(x, one),
        lambda: color.contrast(x, one),
        lambda: color.saturation(x, one),
        lambda: color.hue(x, one),
        lambda: color.color_jitter(x, torch.ones(2, 4), torch.arange(4).expand(2, 4)),
        lambda: show_augmentation(x[0], A.aug_weak(4)),
        lambda: next(iter(ViewLoader(x, A.aug_weak(4), 2).epoch(0))),
    ):
        with pytest.raises(ValueError, match=call):
            f()


def test_what_a_filter_adds_is_no_reason_to_refuse():
    "A bicubic resize leaves [0,1] by a little."
    x = torch.nn.functional.interpolate((PIXELS > 0.5).float(), 16, mode='bicubic')
    assert x.min() < -0.03 and x.max() > 1.03
    make_view(x, A.aug_moco_v2(8), gen())


@pytest.mark.parametrize(
    'x, call',
    [
        (PIXELS.permute(0, 2, 3, 1), r'x.permute\(0, 3, 1, 2\)'),
        (PIXELS[:, :1], r'x.expand\(-1, 3, -1, -1\)'),
        (PIXELS[:, 0], r'x\[:, None\].expand'),
        (PIXELS[0], r'x\[None\]'),
        (torch.rand(2, 4, 8, 8), r'x\[:, :3\]'),
        (list(PIXELS), r'torch.stack\(x\)'),
        (PIXELS.numpy(), r'torch.from_numpy\(x\),'),
        (PIXELS.permute(0, 2, 3, 1).numpy(), r'torch.from_numpy\(x\).permute\(0, 3, 1, 2\)'),
        ((PIXELS * 255).long(), r'x.to\(torch.uint8\)'),
        ('x.png', 'a batch of colour images'),
    ],
    ids=range(10),
)
def test_batches_in_other_shapes_say_the_call_that_mends_them(x, call):
    with pytest.raises(ValueError, match=call):
        make_view(x, A.aug_weak(4), gen())


def test_large_files_are_decoded_no_larger_than_their_views_need(tmp_path):
    "The same boxes, nearly the same views; what is not larger than needed is the same to the bit."
    from PIL import Image

    from ssl_patch.data.photographs import photo
    from ssl_patch.data.sources import images

    names = 'astronaut', 'chelsea', 'coffee', 'rocket'
    for name in names:
        x = Image.fromarray(photo(name).permute(1, 2, 0).numpy())
        exif = x.getexif()
        exif[0x0112] = 6 if name == 'coffee' else 1  # on its side
        x.save(tmp_path / f'{name}.jpg', quality=95, exif=exif)
    store = images(tmp_path, stream=True).train
    read, kept = [], type(store).shrunk

    def counted(self, i, most):
        found = kept(self, i, most)
        read.append(found[1])
        return found

    type(store).shrunk = counted
    try:
        for size, smaller in ((16, True), (300, False)):
            aug = [A.aug_weak(size, scale=(0.2, 1.0)), A.aug_moco_v2(size)]
            read.clear()
            (small, rows), (full, same) = (
                next(ViewLoader(store, aug, 4, seed=1, reduced=r).epoch(0)) for r in (True, False)
            )
            assert len(read) == 4 and all((n > 1) == smaller for n in read), read
            assert torch.equal(rows, same)
            for a, b in zip(small, full):
                assert torch.equal(a.box, b.box) and torch.equal(a.flip, b.flip)
                if smaller:
                    assert 0 < (a.x - b.x).abs().mean() < 0.02
                else:
                    assert torch.equal(a.x, b.x)
    finally:
        type(store).shrunk = kept


def test_a_view_never_needs_more_pixels_than_a_smaller_image_has():
    from ssl_patch.views.loader import _CroppedBatches

    aug = [A.aug_weak(32), A.aug_weak(96)]
    maker = _CroppedBatches([], aug, 0, 3)
    box = lambda h, w: (torch.tensor([[0.0, 0, h, w]]), None, None)
    for boxes, n in (
        ((box(64, 64), box(191, 400)), 1),  # the second view has 96 pixels
        ((box(64, 64), box(192, 400)), 2),
        ((box(63, 640), box(800, 800)), 1),
        ((box(256, 256), box(768, 768)), 8),
        ((box(9999, 9999), box(9999, 9999)), 8),
    ):
        assert maker.smaller(boxes) == n


def test_a_broken_large_file_has_a_stand_in(tmp_path):
    from PIL import Image

    from ssl_patch.data.photographs import photo
    from ssl_patch.data.sources import images

    for k in range(3):
        x = Image.fromarray(photo('astronaut').permute(1, 2, 0).numpy())
        x.save(tmp_path / f'{k}.jpg', quality=90)
    whole = (tmp_path / '1.jpg').read_bytes()
    store = images(tmp_path, stream=True).train
    (tmp_path / '1.jpg').write_bytes(whole[: len(whole) // 3])
    with pytest.warns(UserWarning, match='1.jpg cannot be decoded'):
        views, _ = next(ViewLoader(store, [A.aug_weak(16)], 3).epoch(0))
    assert store.broken == [1] and torch.isfinite(views[0].x).all()

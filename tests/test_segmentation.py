"Linear segmentation and pictures of patches against plain loops."

import re
import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from ssl_patch.data.images import ImageData
from ssl_patch.data.sources import images
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.evaluation.patches import (
    patch_labels,
    patch_features,
    position_prior,
    RawPatches,
    predict_masks,
    linear_segmentation,
    draw_masks,
)
from ssl_patch.evaluation.features import extract, RawPixels
from ssl_patch.evaluation.linear import fit_linear, standardise
from ssl_patch.ground.plots import RIGHT, WRONG
from ssl_patch.evaluation.figures import (
    similarity_map,
    show_neighbours,
    draw_maps,
    show_patch_pca,
    pca_colors,
)
from toys import Net, rand, make_images, make_data

matplotlib.use('Agg')


def frames(fig):
    return [
        [(ax.get_title(), ax.spines['top'].get_edgecolor()) for ax in fig.axes[i : i + 4]]
        for i in range(0, len(fig.axes), 4)
    ]


def test_neighbours_are_framed_by_their_label():
    from matplotlib.colors import to_rgba

    data = make_data(noise=5)
    rows = frames(show_neighbours(Net(1), data, queries=[0, 4], k=3))
    assert [r[0][0] for r in rows] == ['c0', 'c1'] and all(
        c == to_rgba(RIGHT) for r in rows for _, c in r[1:]
    )
    data.train.labels = (data.train.labels + 1) % 3
    assert all(
        c == to_rgba(WRONG)
        for r in frames(show_neighbours(Net(), data, queries=2, k=3))
        for _, c in r[1:]
    )


@pytest.mark.parametrize('centered', [True, False])
def test_neighbours_without_labels_or_test_split_never_show_the_query_itself(centered):
    data = ImageData(make_images(12, labels=False, noise=60), None, 'plain')
    pixels = RawPixels(8, data.mean, data.std)
    rows = frames(show_neighbours(pixels, data, queries=[2, 7], k=3, centered=centered))
    z = extract(pixels, data.train)[0]
    z = F.normalize(z - z.mean(0) if centered else z, dim=1)
    for q, row in zip((2, 7), rows):
        best = torch.cat([(z @ z[q])[:q], (z @ z[q])[q + 1 :]]).sort(descending=True).values[:3]
        assert [t for t, _ in row[1:]] == [f'{s:.2f}' for s in best] and row[0][0] == 'query'


def test_neighbours_tell_images_apart_whose_features_point_the_same_way():
    class Shifted(Net):
        def forward(self, x):
            return super().forward(x) + 1000.0

    def numbers(**how):
        rows = frames(show_neighbours(Shifted(1), make_data(noise=120), queries=4, k=3, **how))
        return {title for r in rows for title, _ in r[1:]}

    assert numbers(centered=False) == {'1.00'}
    assert len(numbers() - {'1.00'}) > 2


def test_neighbours_from_files_have_their_names(tmp_path):
    for i in range(6):
        x = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(x).save(tmp_path / f'a_very_long_name_$_of_file_$_{i}.png')
    fig = show_neighbours(Net(1), images(tmp_path), queries=2, k=3)
    fig.canvas.draw()  # dollar signs are no formula
    names = [ax.get_xlabel() for ax in fig.axes]
    assert len(names) == 8 and all(re.fullmatch(r'….*_of_file_.*_\d\.png', n) for n in names)
    assert not any(ax.get_xlabel() for ax in show_neighbours(Net(1), make_data(), k=3).axes)


@pytest.mark.parametrize(
    'args',
    [
        dict(k=13),
        dict(k=0),
        dict(queries=0),
        dict(queries=[99]),
        dict(queries=[]),
        dict(queries=[-1]),
    ],
)
def test_bad_neighbours(args):
    with pytest.raises(ValueError):
        show_neighbours(Net(), make_data(12, 5), **args)


def planted(n, seed=0, H=32, W=48):
    "Rectangles of three colours on noise; 255 where nobody knows."
    g = torch.Generator().manual_seed(seed)
    colour = torch.tensor([[40.0, 40, 40], [200, 60, 60], [60, 60, 200]])
    m = torch.zeros(n, H, W, dtype=torch.uint8)
    for i in range(n):
        for c in (1, 2):
            t, l = (
                int(torch.randint(0, H // 8 - 1, (1,), generator=g)) * 8,
                int(torch.randint(0, W // 12 - 1, (1,), generator=g)) * 12,
            )
            m[i, t : t + 16, l : l + 24] = c
    x = colour[m.long()].permute(0, 3, 1, 2) + 15 * torch.randn(n, 3, H, W, generator=g)
    m[:, :, -4:] = 255
    return x.clamp(0, 255).byte(), m


def small_vit(seed=0, size=32):
    return vit(size=size, patch=8, width=24, depth=1, heads=2).reinitialized(seed)


@pytest.mark.parametrize('grid', [(4, 6), (3, 5), (1, 1), (7, 2), (12, 9)])
def test_cell_labels_by_loops(grid):
    m = torch.randint(0, 6, (5, 11, 8), generator=torch.Generator().manual_seed(0))
    m[0], m[1, :6] = 5, 5  # 5 is ignored; an image has nothing else
    rows, cols = grid
    expected = torch.full((5, rows * cols), -1)
    for n in range(5):
        votes = [[0] * 5 for _ in range(rows * cols)]
        for i in range(11):
            for j in range(8):
                if m[n, i, j] != 5:
                    votes[int((i + 0.5) * rows / 11) * cols + int((j + 0.5) * cols / 8)][
                        m[n, i, j]
                    ] += 1
        for k, v in enumerate(votes):
            if max(v):
                expected[n, k] = v.index(max(v))
    for kind in (torch.int64, torch.uint8, torch.int16):
        assert torch.equal(patch_labels(m.to(kind), grid, 5, ignore=5), expected)
    assert (expected == -1).any() and (expected[0] == -1).all()


def test_chunks_of_masks_and_scores_do_not_change_the_answer():
    from ssl_patch.evaluation.patches import enlarged_classes
    from ssl_patch.evaluation.metrics import label_chunks

    m = torch.randint(0, 4, (9, 5, 6), generator=torch.Generator().manual_seed(0))
    for n in (1, 30, 70, 10**6):
        assert torch.equal(
            torch.cat(list(label_chunks(m, 3, 3, pixels=n))), m.masked_fill(m == 3, -1)
        )
    s = rand(7, 4, 3, 5)
    assert torch.equal(
        enlarged_classes(s, (11, 13), numbers=1),
        F.interpolate(s, (11, 13), mode='bilinear').argmax(1).byte(),
    )
    assert torch.equal(enlarged_classes(s, (11, 13), numbers=1500), enlarged_classes(s, (11, 13)))


@pytest.mark.parametrize(
    'net',
    [
        small_vit(1),
        resnet('resnet18', size=32, stem='small', width=8).reinitialized(1),
        RawPatches(64, (8, 8)),
    ],
)
def test_planted_shapes_are_found(net):
    train, test = planted(24), planted(8, seed=1)
    r = linear_segmentation(net, train, test, 3, ignore=255, size=64)
    assert (
        r.value > (0.7 if 'ResNet' in type(net).__name__ else 0.88)
        and r.value > r.baselines['place alone'] + 0.2 > r.chance
    )
    assert set(r.baselines) == {'raw pixels', 'place alone'} | (
        {'random encoder'} if hasattr(net, 'reinitialized') else set()
    )
    assert (r.protocol, r.metric, r.layer, r.n_train, r.n_test, r.n_classes) == (
        'linear segmentation',
        'mIoU',
        'patches',
        24,
        8,
        3,
    )


def test_segmentation_by_hand():
    "Chance, place alone, own value and pixel accuracy, each by another route."
    from sklearn.metrics import jaccard_score

    net, train, test = small_vit(1), planted(12), planted(5, seed=1)
    known = test[1] != 255

    def score(p):
        return jaccard_score(test[1][known], p[known], average='macro')

    r = linear_segmentation(net, train, test, 3, ignore=255, epochs=5)
    x, grid = patch_features(net, train[0])
    y = patch_labels(train[1], grid, 3, 255).flatten()
    a, b = standardise(x.flatten(0, 1)[y >= 0], patch_features(net, test[0])[0].flatten(0, 1))
    scores = fit_linear(a, y[y >= 0], 3, epochs=5)(b).view(5, 4, 4, 3).permute(0, 3, 1, 2)
    pred = torch.cat(
        [
            F.interpolate(s[None], (32, 48), mode='bilinear', align_corners=False).argmax(1)
            for s in scores
        ]
    )
    assert torch.equal(
        predict_masks(net, train, test[0], 3, 255, epochs=5), pred.byte()
    ) and r.value == pytest.approx(score(pred))
    assert r.chance == pytest.approx(score(torch.zeros_like(pred)))
    place = torch.stack([(train[1] == c).sum(0) for c in range(3)]).argmax(0)
    assert r.baselines['place alone'] == pytest.approx(score(place.expand(5, -1, -1)))
    assert (
        r.baselines['random encoder']
        == linear_segmentation(
            net.reinitialized(0), train, test, 3, 255, epochs=5, baselines=False
        ).value
    )
    acc = linear_segmentation(net, train, test, 3, 255, epochs=5, metric='pixel accuracy')
    assert (
        acc.value == pytest.approx((pred == test[1])[known].float().mean().item())
        and acc.metric == 'pixel accuracy'
    )
    assert acc.chance == pytest.approx((test[1][known] == 0).float().mean().item())


def test_segmentation_leaves_the_encoder_as_it_was_and_repeats():
    net, train, test = small_vit().train(), planted(8), planted(4, seed=1)
    net.net.blocks[0].eval()
    modes, state, sizes = (
        [m.training for m in net.modules()],
        {k: v.clone() for k, v in net.state_dict().items()},
        set(net.sizes),
    )
    a = linear_segmentation(net, train, test, 3, 255, size=48, epochs=3)
    assert (
        a == linear_segmentation(net, train, test, 3, 255, size=48, epochs=3)
        and a.settings['size'] == 48
    )
    assert net.sizes == sizes == {32} and [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and all(
        p.grad is None for p in net.parameters()
    )
    with pytest.raises(ValueError, match='size=44'):
        linear_segmentation(net, train, test, 3, 255, size=44)
    assert (
        net.sizes == sizes
        and a.value != linear_segmentation(net, train, test, 3, 255, size=32, epochs=3).value
    )


def test_patch_features_are_those_of_the_resized_image():
    import torchvision.transforms.v2.functional as tv

    net, x = small_vit().eval(), planted(5)[0]
    z, grid = patch_features(net, x, size=40, batch_size=2)
    with torch.no_grad():
        out = net.accept(40)(tv.resize(x.float() / 255, [40, 40], antialias=True))
    assert grid == (5, 5) and torch.allclose(z, out.patches, atol=1e-5)


def test_place_alone_of_another_size_and_where_nothing_was_seen():
    m = torch.tensor([[[1, 9], [2, 2]]])
    assert position_prior(m, (3, 4, 4), 3, 9)[2].tolist() == [[1, 1, 2, 2]] * 2 + [[2] * 4] * 2
    assert position_prior(m, (1, 2, 2), 3, 9)[0].tolist() == [[1, 2], [2, 2]]


class Sized(nn.Flatten):
    size = 32


@pytest.mark.parametrize(
    'change,word',
    [
        (dict(train=planted(4)[0]), 'train must be a pair'),
        (dict(train=(planted(4)[0].float(), planted(4)[1])), 'train images'),
        (dict(test=(planted(4)[0], planted(3)[1])), 'test masks'),
        (dict(test=(planted(4)[0], planted(4)[1].mT)), 'test masks'),
        (dict(test=(planted(4)[0], planted(4)[1].float())), 'whole numbers'),
        (dict(train=(planted(4)[0], planted(4)[1] > 0)), 'whole numbers'),
        (dict(ignore=None), 'label 255'),
        (dict(classes=2), 'label 2'),
        (dict(classes=0), 'classes must be .* got 0'),
        (dict(metric='IoU'), "metric must be .* got 'IoU'"),
        (dict(test=(planted(4)[0], torch.full((4, 32, 48), 255))), 'no pixel has a class'),
        (dict(epochs=0), 'epochs must be .* got 0'),
        (dict(lr=-1.0), 'lr must be .* got -1'),
        (dict(train=(planted(4)[0], torch.ones(4, 32, 48).long())), 'only one class'),
        (dict(weight_decay=-1.0), 'weight_decay'),
        (dict(size=44), 'size=44'),
        (dict(encoder=Sized()), 'Features'),
        (dict(encoder=RawPixels(32)), 'Features'),
        (dict(encoder=nn.Flatten()), 'size'),
    ],
)
def test_bad_segmentation(change, word):
    good = dict(encoder=small_vit(), train=planted(4), test=planted(4, 1), classes=3, ignore=255)
    with pytest.raises(ValueError, match=word):
        linear_segmentation(**{**good, **change})


def test_token_colours_are_principal_components():
    from sklearn.decomposition import PCA

    z = rand(3, 40, 8) @ torch.diag(torch.logspace(1, -1, 8))
    c, plain = (pca_colors(z, w).flatten(0, 1) for w in (True, False))
    p = torch.from_numpy(PCA(3).fit_transform(z.flatten(0, 1).double()))
    p = p * p.gather(0, p.abs().argmax(0, keepdim=True)).sign()
    assert torch.allclose(c, (0.5 + p / p.std(0, correction=0) / 5).clamp(0, 1).float(), atol=1e-5)
    assert torch.allclose(
        plain, (0.5 + p / p[:, 0].std(correction=0) / 5).clamp(0, 1).float(), atol=1e-5
    )
    assert torch.equal(pca_colors(z), pca_colors(z)) and torch.equal(
        pca_colors(torch.ones(1, 4, 3)), torch.full((1, 4, 3), 0.5)
    )
    with pytest.raises(ValueError, match='D >= 3'):
        pca_colors(rand(1, 5, 2))


def test_heat_and_figures():
    z = rand(2, 6, 5)
    h = similarity_map(z[:, 4], z, (2, 3))
    assert h.flatten(1).argmax(1).tolist() == [4, 4] and torch.allclose(
        h[1, 0, 2], F.cosine_similarity(z[1, 4], z[1, 2], dim=0)
    )
    x, m = planted(2)
    fig = draw_maps(x, {'a': h, 'b': -h}, 'heat')
    assert [ax.get_title() for ax in fig.axes[:3]] == ['image', 'a', 'b'] and len(fig.axes) == 6
    assert (
        np.allclose(fig.axes[4].images[1].get_array(), h[1])
        and len(draw_maps(x / 255, h).axes) == 4
    )
    net = small_vit()
    fig = show_patch_pca({'ViT': net, 'raw': RawPatches(32, (2, 2))}, x, size=32)
    shown = [fig.axes[i].images[0] for i in (4, 5)]
    assert [s.get_array().shape for s in shown] == [(4, 4, 3), (2, 2, 3)] and shown[
        0
    ].get_interpolation() == 'nearest'
    assert np.allclose(shown[0].get_array(), pca_colors(patch_features(net, x)[0])[1].view(4, 4, 3))
    fig = draw_masks(x, {'truth': m}, 3, ignore=255)
    assert (fig.axes[1].images[0].get_array()[:, -4:] == 1).all()


@pytest.mark.parametrize(
    'call,word',
    [
        (lambda x, h: similarity_map(h, h, (2, 3)), r'\(B,d\)'),
        (lambda x, h: similarity_map(rand(2, 5), rand(2, 6, 5), (2, 2)), 'grid'),
        (lambda x, h: draw_maps(x, h[:1]), 'one for each picture'),
        (lambda x, h: draw_maps(x, {}), 'maps must be'),
        (lambda x, h: show_patch_pca('vit', x), 'nn.Module'),
        (lambda x, h: show_patch_pca({'a': RawPixels(32)}, x), 'Features'),
        (lambda x, h: show_patch_pca({'a': small_vit()}, x[0]), 'uint8'),
        (lambda x, h: draw_masks(x, h[:, 0], 3), 'masks'),
    ],
)
def test_bad_figures(call, word):
    with pytest.raises(ValueError, match=word):
        call(planted(2)[0], rand(2, 2, 3))

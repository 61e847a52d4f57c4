"Figures of a representation: their numbers against scikit-learn, odd data, nothing left behind."

import io
import math
import sys
import types
import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ssl_patch.data.images import ImageData, TensorImages
from ssl_patch.data.sources import images
from ssl_patch.evaluation.spread import (
    alignment_uniformity,
    show_alignment_uniformity,
    show_spectrum,
    spectrum,
)
from ssl_patch.evaluation.embeddings import reduce_dim, far_apart, pca, show_embedding
from ssl_patch.evaluation.mistakes import (
    knn_confusion,
    knn_curve,
    mistakes,
    show_confusion,
    show_knn_curve,
)
from ssl_patch.evaluation.sheet import show_representation
from ssl_patch.evaluation.metrics import accuracy, effective_rank
from ssl_patch.evaluation.features import extract, RawPixels
from ssl_patch.evaluation.knn import knn, knn_predict
from ssl_patch.views.loader import generator_for
from ssl_patch.views.augmentations import make_view, aug_none, aug_weak
from toys import Net

matplotlib.use('Agg')
import matplotlib.pyplot as plt


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(n, classes=3, seed=0, size=8, labels=True, names=True):
    "Colour says the class; noise makes it less than trivial."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    colour = torch.rand(classes, 3, generator=torch.Generator().manual_seed(9)) * 200
    x = colour[y][:, :, None, None] + 25 * torch.randn(n, 3, size, size, generator=g)
    return TensorImages(
        x.clamp(0, 255).byte(),
        y if labels else None,
        [f'c{i}' for i in range(classes)] if labels and names else None,
    )


def make_data(n=60, m=40, **kw):
    return ImageData(
        store(n, seed=1, **kw), store(m, seed=2, **kw), 'colours', 'the label is a colour'
    )


class Same(nn.Module):
    size = 8

    def forward(self, x):
        return torch.ones(len(x), 5) / 3


ALL = [
    show_embedding,
    show_confusion,
    show_knn_curve,
    show_alignment_uniformity,
    show_spectrum,
    show_representation,
]
texts = lambda fig: ' '.join([t.get_text() for t in fig.findobj(matplotlib.text.Text)])


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize('n,d', [(80, 6), (20, 50)])
def test_pca_equals_scikit_learn(n, d):
    sk = pytest.importorskip('sklearn.decomposition')
    z = rand(n, d) * torch.arange(1, d + 1).sqrt() + 3
    fit = sk.PCA(4, svd_solver='full').fit(z.double().numpy())
    points, share = pca(z, 4)
    assert torch.allclose(
        points.abs(), torch.from_numpy(np.abs(fit.transform(z.double().numpy()))).float(), atol=1e-4
    )
    assert torch.allclose(share, torch.from_numpy(fit.explained_variance_ratio_).float(), atol=1e-5)
    assert (points.gather(0, points.abs().argmax(0, keepdim=True)) > 0).all()


def test_pca_refuses_what_it_cannot():
    for z, dims in ((rand(5, 3), 4), (rand(2, 9), 3), (rand(5), 1), (rand(5, 3), 0)):
        with pytest.raises(ValueError):
            pca(z, dims)


def test_spectrum_is_the_variance_of_principal_components():
    sk = pytest.importorskip('sklearn.decomposition')
    for n, d in ((90, 7), (10, 30)):
        z = rand(n, d) * 5 + 1
        fit = sk.PCA(svd_solver='full').fit(F.normalize(z.double(), dim=1).numpy())
        assert torch.allclose(
            spectrum(z), torch.from_numpy(fit.explained_variance_ratio_).float(), atol=1e-5
        )
        assert torch.allclose(
            spectrum(z * torch.rand(n, 1).add(0.1)), spectrum(z), atol=1e-5
        )  # lengths do not matter
    assert spectrum(torch.ones(9, 300) / 7).sum() == 0
    for z in (rand(1, 5), rand(5)):
        with pytest.raises(ValueError, match='at least 2 images'):
            spectrum(z)


def test_confusion_equals_scikit_learn():
    sk = pytest.importorskip('sklearn.metrics')
    x, y, u, v = rand(90, 5), torch.arange(90) % 4, rand(70, 5, seed=1), torch.arange(70) % 6
    M = knn_confusion(x, y, u, v, k=9)
    assert M.tolist() == sk.confusion_matrix(v, knn_predict(u, x, y, 9), labels=range(6)).tolist()
    assert M[:, 4:].sum() == 0 and M[4:].sum() > 0
    worst = mistakes(M, 50)
    assert sum(n for _, _, n in worst) == M.sum() - M.trace() and all(
        M[i, j] == n and i != j for i, j, n in worst
    )
    assert [n for *_, n in worst] == sorted((n for *_, n in worst), reverse=True)
    with pytest.raises(ValueError, match='classes must .* got 5'):
        knn_confusion(x, y, u, v, classes=5)
    with pytest.raises(ValueError, match='k must .* got 91'):
        knn_confusion(x, y, u, v, k=91)


def test_curve_equals_a_search_for_every_k(monkeypatch):
    import ssl_patch.evaluation.mistakes as room

    x, y, u, v = rand(120, 5), torch.arange(120) % 4, rand(70, 5, seed=1), torch.arange(70) % 4
    asked, plain = [], room.topk_similar
    monkeypatch.setattr(
        room, 'topk_similar', lambda *a, **kw: asked.append(a[2]) or plain(*a, **kw)
    )
    ks = [20, 1, 120, 5]  # any order
    for T in (0.07, 1.0):
        expected = [accuracy(knn_predict(u, x, y, k, T), v) for k in ks]
        assert knn_curve(x, y, u, v, ks, T).tolist() == pytest.approx(expected)
    assert asked == [120, 120]
    assert knn_curve(x, y, u, v, ks, (0.07, 1.0)).shape == (2, 4) and knn_curve(
        x, y, u, v, (3,), (1,)
    ).shape == (1, 1)


@pytest.mark.parametrize(
    'kw,what',
    [
        (dict(ks=[]), r'ks must .* got \[\]'),
        (dict(ks=5), 'ks must .* got 5'),
        (dict(ks=[0]), 'k must .* got 0'),
        (dict(ks=[61]), 'k must .* got 61'),
        (dict(ks=[1.5]), 'k must .* got 1.5'),
        (dict(ks=[1], T=0), 'T must .* got 0'),
        (dict(ks=[1], T=[]), r'T must .* got \[\]'),
        (dict(ks=[1], T=[1, -1]), 'T must .* got -1'),
    ],
)
def test_curve_refuses(kw, what):
    net, data = Net(), make_data()
    with pytest.raises(ValueError, match=what):
        show_knn_curve(net, data, **kw)
    with pytest.raises(ValueError, match=what):
        knn_curve(rand(60, 3), torch.arange(60) % 3, rand(5, 3), torch.zeros(5).long(), **kw)
    assert net.seen == 0


def test_usual_ks_are_those_that_fit():
    line = show_knn_curve(Net(), make_data(n=60), baselines=False, T=0.07).axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 2, 5, 10, 20, 50]


def test_alignment_and_uniformity_by_hand():
    data, net = make_data(), RawPixels(8)
    a, b = (
        F.normalize(
            net(make_view(data.test.images, aug_weak(8), generator_for('view', i, 3)).x), dim=1
        )
        for i in (0, 1)
    )

    def crowd(z):
        return math.log(
            np.mean(
                [
                    math.exp(-2 * float((z[i] - z[j]).square().sum()))
                    for i in range(len(z))
                    for j in range(i)
                ]
            )
        )

    expected = float((a - b).square().sum(1).mean()), (crowd(a) + crowd(b)) / 2
    assert alignment_uniformity(net, data, aug_weak(99), seed=3) == pytest.approx(
        expected, abs=1e-4
    )  # the augmentation takes the size of the encoder
    assert alignment_uniformity(net, data, aug_weak(), seed=4) != alignment_uniformity(
        net, data, aug_weak(), seed=3
    )


def test_alignment_of_images_that_stream(tmp_path):
    from PIL import Image

    for i in range(6):
        Image.fromarray(
            (np.random.default_rng(i).random((10 + i, 12, 3)) * 255).astype('uint8')
        ).save(tmp_path / f'{i}.png')
    data = images(tmp_path, stream=True)
    assert not hasattr(data.train, 'images')
    a, u = alignment_uniformity(RawPixels(8), data, aug_none(8), split='train')
    assert a == 0 and u < 0
    assert alignment_uniformity(RawPixels(8), data, split='train') == alignment_uniformity(
        RawPixels(8), data, split='train'
    )
    show_embedding(RawPixels(8), data, split='train', thumbnails=True)


@pytest.mark.parametrize(
    'kw,what',
    [
        (dict(n=0), 'n must .* got 0'),
        (dict(n=1), 'n must be at least 2 images, got 1'),
        (dict(augmentation=32), 'augmentation must .* got 32'),
        (dict(split='val'), "split must .* got 'val'"),
        (dict(size=-1), 'size must .* got -1'),
    ],
)
def test_alignment_refuses(kw, what):
    net = Net()
    with pytest.raises(ValueError, match=what):
        alignment_uniformity(net, make_data(), **kw)
    with pytest.raises(ValueError, match=what):
        show_alignment_uniformity(net, make_data(), **kw)
    assert net.seen == 0


def test_squares_around_chosen_points_do_not_overlap():
    p = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    at = far_apart(p, 0.15)
    d = (p[:, None] - p[at]).abs().amax(2)
    assert (d[at].fill_diagonal_(1) >= 0.15).all() and (
        d.amin(1) < 0.15
    ).all()  # none too close, none left out for nothing
    assert (
        at[0] == 0 and len(far_apart(torch.zeros(5, 2), 0.1)) == 1 and len(far_apart(p, 0.0)) == 300
    )


# ---------------------------------------------------------------- figures
@pytest.mark.parametrize('show', ALL)
def test_figures_are_returned_closed_and_leave_the_encoder_alone(show):
    plt.close('all')
    net, data = Net(), make_data()
    net.net.train()
    net.net[1].eval()
    before = (
        [m.training for m in net.modules()],
        {k: v.clone() for k, v in net.state_dict().items()},
    )
    fig = show(net, data)
    assert isinstance(fig, matplotlib.figure.Figure) and plt.get_fignums() == []
    fig.canvas.draw()
    assert [m.training for m in net.modules()] == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in net.state_dict().items())


def picture(fig):
    out = io.BytesIO()
    fig.savefig(out, format='png', metadata={'Software': None})
    return out.getvalue()


@pytest.mark.parametrize('show', ALL)
def test_same_seed_same_picture(show):
    kw = {} if show is show_confusion else dict(seed=3)
    if 'n' in show.__code__.co_varnames[: show.__code__.co_argcount]:
        kw['n'] = 30
    first, again = (picture(show(Net(), make_data(), **kw)) for _ in range(2))
    assert first == again
    if 'n' in kw:
        assert first != picture(show(Net(), make_data(), **{**kw, 'seed': 4}))


def test_features_are_computed_once_for_all():
    net, data = Net(), make_data()
    show_representation(net, data)
    seen = net.seen
    for show in (show_embedding, show_confusion, show_knn_curve, show_spectrum):
        show(net, data)
    knn(net, data, baselines=False)
    assert net.seen == seen == 60 + 40 + 2 * 40  # train, test, two views of test


@pytest.mark.parametrize('show', ALL[:-1])
def test_several_encoders_of_different_sizes(show):
    fig = show({'small': Net(), 'large': Net(1, size=12), 'pixels': RawPixels(8)}, make_data())
    assert {'small', 'large', 'pixels'} <= set(
        texts(fig).replace('\n', ' ').replace(':', ' ').split()
    )


@pytest.mark.parametrize('show', ALL)
def test_bad_arguments_are_refused_before_work(show):
    data, net = make_data(), Net()
    cases = [({}, {}), (3, {}), ([net], {}), (net, dict(layer='last')), (net, dict(size=-1))]
    if show is not show_representation:
        cases += [({'a': net, 'b': None}, {})]
    if show in (show_embedding, show_alignment_uniformity, show_spectrum):
        cases += [(net, dict(n=0)), (net, dict(n=1.5)), (net, dict(split='val'))]
    if show in (show_confusion, show_representation):
        cases += [(net, dict(k=0)), (net, dict(k=61)), (net, dict(T=0)), (net, dict(overlap='yes'))]
    for encoders, kw in cases:
        with pytest.raises(ValueError):
            show(encoders, data, **kw)
    assert net.seen == 0


def test_labels_absent():
    bare = make_data(labels=False)
    fig = show_embedding(Net(), bare, thumbnails=True)
    assert 'no labels' in texts(fig)
    show_spectrum(Net(), bare)
    show_alignment_uniformity(Net(), bare)
    for show in (show_confusion, show_knn_curve):
        net = Net()
        with pytest.raises(ValueError, match='no labels'):
            show(net, bare)
        assert net.seen == 0
    assert 'left out' in texts(show_representation(Net(), bare))


def test_some_labels_absent():
    data = make_data()
    data.test.labels[::4] = -1
    assert 'no label' in texts(show_embedding(Net(), data))
    assert '30 test images' in texts(show_confusion(Net(), data)).replace('\n', ' ')
    show_representation(Net(), data)


def test_no_test_split():
    data = ImageData(store(60))
    assert '60 train images' in texts(show_embedding(Net(), data)) and '60 train images' in texts(
        show_spectrum(Net(), data)
    )
    with pytest.raises(ValueError, match='no test split'):
        show_embedding(Net(), data, split='test')
    with pytest.raises(ValueError, match='no test split'):
        show_confusion(Net(), data)
    assert 'no test split' in texts(show_representation(Net(), data)).replace('\n', ' ')


def test_one_class():
    data = make_data(classes=1)
    show_embedding(Net(), data)
    show_spectrum(Net(), data)
    with pytest.raises(ValueError, match='only one class'):
        show_confusion(Net(), data)
    assert 'only one class' in texts(show_representation(Net(), data)).replace('\n', ' ')


def test_more_classes_in_test_than_in_train():
    data = ImageData(
        store(60, classes=3, seed=1, names=False), store(40, classes=5, seed=2, names=False)
    )
    said = texts(show_confusion(Net(), data)).replace('\n', ' ')
    assert '2 classes are not in train' in said and 'class 4*' in said
    show_knn_curve(Net(), data)
    show_representation(Net(), data)


def test_fewer_classes_in_test_than_in_train():
    data = ImageData(store(60, classes=5, seed=1), store(40, classes=3, seed=2))
    said = texts(show_confusion(Net(), data))
    assert 'no test images' in said and 'c4' in said


def test_many_classes_have_no_numbers_and_share_colours():
    data = ImageData(store(200, classes=50, seed=1), store(200, classes=50, seed=2))
    assert len(show_confusion(RawPixels(8), data, k=3).axes[0].texts) == 0
    assert '40 others' in texts(show_embedding(RawPixels(8), data))
    data = ImageData(store(120, classes=20, seed=1), store(80, classes=20, seed=2))
    fig = show_confusion(RawPixels(8), data, k=3)
    assert len(fig.axes[0].texts) == 0 and 'c19' in texts(fig)


def test_n_larger_than_the_split_takes_all():
    data = make_data()
    assert '40 test images' in texts(
        show_embedding(Net(), data, n=10**6)
    ) and '40 test images' in texts(show_spectrum(Net(), data, n=10**6))
    assert alignment_uniformity(Net(), data, n=40) == alignment_uniformity(Net(), data, n=999)


def test_a_small_sample_of_a_large_split_is_all_that_is_computed():
    net, data = Net(), make_data(m=300)
    show_embedding(net, data, n=20)
    assert net.seen == 20


def test_complete_collapse_can_be_drawn():
    data = make_data()
    for show in ALL:
        show(Same(), data).canvas.draw()
    assert '0% of the variance' in texts(show_embedding(Same(), data))
    show_embedding(Same(), data, thumbnails=True).canvas.draw()


def test_copies_in_test_are_refused_as_in_knn():
    data = make_data()
    data = ImageData(
        data.train,
        TensorImages(
            torch.cat([data.test.images, data.train.images[:2]]),
            torch.cat([data.test.labels, data.train.labels[:2]]),
        ),
    )
    for show in (show_confusion, show_knn_curve, show_representation):
        with pytest.raises(ValueError, match='overlap'):
            show(Net(), data)
    for show in (show_confusion, show_knn_curve):
        assert 'in train too' in texts(show(Net(), data, overlap='drop')).replace('\n', ' ')


def test_references_are_drawn_once():
    net = Net()
    said = lambda *a, **kw: texts(show_knn_curve(*a, make_data(), **kw))
    assert 'random weights' in said(net) and 'raw pixels' in said(net)
    assert 'random weights' not in said(net, baselines=False)
    assert 'random weights' not in said(net.reinitialized(0))  # it is its own twin
    assert 'random weights' not in said(RawPixels(8))


def test_legend_has_the_effective_rank_of_probes():
    net, data = Net(), make_data()
    assert f'{effective_rank(extract(net, data.test)[0]):.1f} of 6' in texts(
        show_spectrum(net, data)
    )


# ---------------------------------------------------------------- t-SNE and UMAP
def test_tsne():
    pytest.importorskip('sklearn')
    z = torch.cat([rand(15, 5) + 4, rand(15, 5) - 4])
    points, share = reduce_dim(z, 'tsne', seed=1)
    assert share is None and torch.equal(
        points, reduce_dim(z * 4, 'tsne', seed=1)[0]
    )  # only directions count
    near = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(1)
    assert ((near < 15) == (torch.arange(30) < 15)).all()
    assert 't-SNE' in texts(show_embedding(Net(), make_data(m=12), how='tsne'))


@pytest.mark.parametrize(
    'how,module,pip',
    [('tsne', 'sklearn.manifold', r'ssl_patch\[eval\]'), ('umap', 'umap', 'umap-learn')],
)
def test_a_missing_package_is_named_before_work(how, module, pip, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    net = Net()
    with pytest.raises(ImportError, match=pip):
        show_embedding(net, make_data(), how=how)
    assert net.seen == 0


def test_umap_is_asked_with_seed_and_few_neighbours(monkeypatch):
    asked = {}

    class UMAP:
        def __init__(self, **kw):
            asked.update(kw)

        def fit_transform(self, z):
            return z[:, :2]

    monkeypatch.setitem(sys.modules, 'umap', types.SimpleNamespace(UMAP=UMAP))
    z = rand(8, 5)
    assert (
        torch.equal(reduce_dim(z, 'umap', seed=7)[0], F.normalize(z, dim=1)[:, :2])
        and asked['random_state'] == 7
        and asked['n_neighbors'] == 7
    )


@pytest.mark.parametrize('kw', [dict(how='lda'), dict(how='tsne', n=4), dict(n=1)])
def test_embedding_refuses(kw):
    net = Net()
    with pytest.raises(ValueError):
        show_embedding(net, make_data(), **kw)
    assert net.seen == 0

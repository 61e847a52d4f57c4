"Published protocols against scikit-learn, plain loops and numbers worked out by hand."

import math
import os
import sys
import warnings
from itertools import permutations
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ssl_patch.data.files import ByteFiles, FileImages
from ssl_patch.data.images import ImageData, TensorImages
from ssl_patch.data.sources import images
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.evaluation.features import extract
from ssl_patch.evaluation.knn import knn
from ssl_patch.evaluation.records import load_records
from ssl_patch.evaluation.linear_probe import (
    LinearProbeConfig,
    linear_probe,
    linear_rate,
    linear_probe_configs,
    pad_crop,
    train_head,
)
from ssl_patch.evaluation.metrics import (
    average_precision,
    mean_average_precision,
    per_class,
    precision_recall,
)
from ssl_patch.evaluation.svm import choose_C, draw_shots, fit_svm, svm
from ssl_patch.evaluation.knn import knn_settings
from ssl_patch.evaluation.logistic import (
    logistic,
    logistic_path,
    transfer_sets,
    validation_split,
    weight_decays,
)
from ssl_patch.evaluation.retrieval import ranking_precision, recall_at, retrieval, retrieval_chance
from ssl_patch.data.voc import voc07, voc_classes
from toys import Net


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed))


def make_images(n, classes=3, seed=0, size=8, noise=60, y=None, hard=False):
    "Colour says the class; noise makes it less than trivial, and `hard` much less."
    y = torch.arange(n) % classes if y is None else torch.as_tensor(y)
    colour = torch.tensor([[200.0, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 40]])
    if hard:
        colour = 128 + 0.08 * (colour - 128)
    x = colour[y.clamp_min(0)][:, :, None, None] + noise * torch.randn(
        n, 3, size, size, generator=gen(seed)
    )
    return TensorImages(x.clamp(0, 255).byte(), y, [f'c{i}' for i in range(classes)])


def make_data(n=60, m=30, **kw):
    return ImageData(
        make_images(n, seed=1, **kw),
        make_images(m, seed=2, **kw),
        'colours',
        'the label is a colour',
    )


quick = dict(epochs=3, batch_size=16, lr=1.0)


# ---------------------------------------------------------------- kNN settings
def test_knn_settings():
    assert knn_settings == {
        'instdisc': dict(k=200, T=0.07),
        'dino': dict(k=20, T=0.07),
        'moco_demo': dict(k=200, T=0.1),
    }
    assert knn(Net(), make_data(), **knn_settings['dino'], baselines=False).settings['k'] == 20


# ---------------------------------------------------------------- linear recipes
def test_recipes_have_the_published_numbers():
    want = {
        'moco': (100, 256, 30.0, None, 'steps', False, 'normal', (0.08, 1.0), 0),
        'moco_v3': (90, 1024, 0.1, 256, 'cosine per epoch', False, 'normal', (0.08, 1.0), 0),
        'moco_v3_vit': (90, 1024, 3.0, 256, 'cosine per epoch', False, 'normal', (0.08, 1.0), 0),
        'sce': (90, 1024, 0.1, 256, 'cosine', False, 'torch', (0.08, 1.0), 0),
        'ressl': (100, 256, 0.3, None, 'cosine', False, 'normal', (0.08, 1.0), 0),
        'small': (100, 256, 30.0, None, 'steps', False, 'torch', None, 4),
        'ressl_small': (100, 256, 10.0, None, 'steps', True, 'normal', (0.08, 1.0), 0),
    }
    assert {
        n: (
            r.epochs,
            r.batch_size,
            r.lr,
            r.lr_batch,
            r.schedule,
            r.nesterov,
            r.start,
            r.scale,
            r.pad,
        )
        for n, r in linear_probe_configs.items()
    } == want
    assert all(
        (r.momentum, r.weight_decay, r.flip) == (0.9, 0, 0.5) for r in linear_probe_configs.values()
    )


@pytest.mark.parametrize(
    'name,epoch,lr',
    [
        ('moco', 0, 30),
        ('moco', 59, 30),
        ('moco', 60, 3),
        ('moco', 79, 3),
        ('moco', 80, 0.3),
        ('moco', 99, 0.3),
        ('ressl_small', 60, 1),
        ('moco_v3', 0, 0.4),
        ('moco_v3', 30, 0.3),
        ('moco_v3', 45, 0.2),
        ('moco_v3_vit', 0, 12),
        ('sce', 0, 0.4),
        ('sce', 45, 0.2),
        ('ressl', 50, 0.15),
    ],
)
def test_learning_rates(name, epoch, lr):
    assert linear_rate(linear_probe_configs[name], epoch * 7, 7) == pytest.approx(lr)


def test_learning_rate_inside_an_epoch():
    r = linear_probe_configs
    assert linear_rate(r['moco_v3'], 6, 7) == 0.4 and linear_rate(r['sce'], 6, 7) == pytest.approx(
        0.2 * (1 + math.cos(math.pi * 6 / 630))
    )
    for epochs in (1, 5, 10, 35, 90, 100):
        drops = [linear_rate(LinearProbeConfig(epochs=epochs), e, 1) for e in range(epochs)]
        assert [round(math.log10(30 / d)) for d in drops] == [
            (e >= math.ceil(0.6 * epochs - 1e-9)) + (e >= math.ceil(0.8 * epochs - 1e-9))
            for e in range(epochs)
        ]


@pytest.mark.parametrize(
    'bad',
    [
        dict(epochs=0),
        dict(batch_size=0),
        dict(lr=0.0),
        dict(lr=math.nan),
        dict(schedule='linear'),
        dict(start='zero'),
        dict(drops=(60,)),
        dict(momentum=1.0),
        dict(nesterov=True, momentum=0.0),
        dict(weight_decay=-1.0),
        dict(pad=-1),
        dict(pad=0.5),
        dict(scale=(1.0, 0.1)),
        dict(flip=2.0),
        dict(lr_batch=0),
        dict(drops=0.6),
        dict(drops=('a',)),
        dict(drops=None),
        dict(momentum=None),
        dict(weight_decay='1'),
        dict(scale=0.5),
        dict(scale=(0.1,)),
        dict(flip=None),
        dict(nesterov=1),
        dict(lr='x'),
    ],
)
def test_recipe_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LinearProbeConfig(**bad)


def test_pad_crop_against_a_loop():
    x = torch.rand(40, 3, 5, 6, generator=gen())
    out, (top, left) = pad_crop(x, 2, gen(1)), torch.randint(5, (2, 40, 1), generator=gen(1))
    for i in range(40):
        frame = torch.zeros(3, 9, 10)
        frame[:, 2:7, 2:8] = x[i]
        t, l = int(top[i]), int(left[i])
        assert torch.equal(out[i], frame[:, t : t + 5, l : l + 6])
    assert top.unique().tolist() == left.unique().tolist() == [0, 1, 2, 3, 4] and torch.equal(
        pad_crop(x, 0), x
    )


@pytest.mark.parametrize(
    'recipe',
    [
        LinearProbeConfig(epochs=4, batch_size=8, lr=0.5),
        LinearProbeConfig(4, 64, 0.5, 32, 'cosine', nesterov=True, weight_decay=0.1),
        LinearProbeConfig(4, 8, 0.5, schedule='cosine per epoch', start='torch'),
    ],
)
def test_train_head_against_sgd_by_hand(recipe):
    x, y = rand(20, 3), torch.arange(20) % 4
    order = [
        torch.randperm(20, generator=gen(e)).split(recipe.batch_size) for e in range(recipe.epochs)
    ]
    head = train_head(lambda e: ((x[b], b) for b in order[e]), y, 3, 4, recipe, seed=5)
    first = train_head(lambda e: (), y, 3, 4, recipe, seed=5)  # no batch at all: the start
    if recipe.start == 'normal':
        assert first.bias.eq(0).all() and 0.003 < first.weight.std() < 0.03
    else:
        assert (
            first.weight.abs().max() <= 3**-0.5
            and first.weight.abs().max() > 0.3
            and first.bias.abs().max() > 0.05
        )
    W, speed = (
        torch.cat([first.weight, first.bias[:, None]], 1).double(),
        torch.zeros(4, 4, dtype=torch.double),
    )
    one, step = torch.cat([x, torch.ones(20, 1)], 1).double(), 0
    for e in range(4):
        for b in order[e]:
            grad = ((one[b] @ W.T).softmax(1) - F.one_hot(y[b], 4)).T @ one[b] / len(
                b
            ) + recipe.weight_decay * W
            speed = 0.9 * speed + grad
            W = W - linear_rate(recipe, step, len(order[0])) * (
                grad + 0.9 * speed if recipe.nesterov else speed
            )
            step += 1
    assert torch.allclose(torch.cat([head.weight, head.bias[:, None]], 1).double(), W, atol=1e-4)


# ---------------------------------------------------------------- linear_probe
def test_encoder_is_frozen_in_eval_mode_and_left_as_it_was():
    net = Net().train()
    net.net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    seen = []
    net.register_forward_hook(
        lambda m, i, o: seen.append((m.training, m.net[3].training, torch.is_grad_enabled()))
    )
    for views in (None, 2):
        linear_probe(net, make_data(), views=views, baselines=False, **quick)
    assert set(seen) == {(False, False, False)}
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert net.training and net.net[3].training and not net.net[1].training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_fresh_views_pass_every_image_in_every_epoch_and_cached_ones_do_not():
    data, net = make_data(), Net()

    def costs(n, **kw):
        before = net.seen
        linear_probe(net, data, baselines=False, **quick, **kw)
        return net.seen - before == n

    assert costs(30 + 3 * 60)  # test once, without augmentation
    assert (
        costs(3 * 60) and costs(2 * 60, views=2) and costs(3 * 60, views=50)
    )  # the first two are remembered


def test_cached_equals_fresh_without_augmentation():
    data, off = make_data(), dict(scale=None, flip=0.0)
    a, b, c = (linear_probe(Net(0), data, views=v, **off, **quick) for v in (None, 1, 3))
    assert (
        a.value == b.value == c.value
        and a.baselines == b.baselines == c.baselines
        and a.each == b.each
    )
    assert len(set(a.per_image().tolist())) == 2


def test_augmentation_changes_features_and_measured_twice_is_the_same():
    data, how = make_data(90, 90, hard=True), {**quick, 'epochs': 20, 'lr': 3.0, 'pad': 1}
    a, again, other = (
        linear_probe(Net(), data, 'small', baselines=False, seed=s, **how) for s in (0, 0, 1)
    )
    assert (a.value, a.each) == (again.value, again.each) and a.each != other.each
    assert linear_probe(Net(), data, 'moco', baselines=False, **{**how, 'pad': 0}).each != a.each


def test_record_of_linear_probe(tmp_path):
    data = make_data()
    r = linear_probe(
        Net(), data, 'moco_v3', epochs=2, lr=0.2, views=1, name='mine', seed=3, out=tmp_path
    )
    assert (r.protocol, r.metric, r.encoder, r.seed, r.n_train, r.n_test) == (
        'linear, augmented',
        'top-1',
        'mine',
        3,
        60,
        30,
    )
    assert {
        k: r.settings[k]
        for k in ('config', 'views', 'epochs', 'lr', 'batch_size', 'schedule', 'size')
    } == dict(
        config='moco_v3',
        views=1,
        epochs=2,
        lr=0.2,
        batch_size=60,
        schedule='cosine per epoch',
        size=8,
    )  # all of train: fewer than 1024
    assert (
        set(r.baselines) == {'raw pixels', 'random encoder'}
        and r.per_image().mean().item() == pytest.approx(r.value)
        and r.seconds > 0
    )
    assert load_records(tmp_path) == [r]
    assert (
        linear_probe(Net(), data, LinearProbeConfig(epochs=2), views=1, baselines=False).settings[
            'config'
        ]
        == 'custom'
    )
    random = linear_probe(
        Net().reinitialized(3), data, 'moco_v3', epochs=2, lr=0.2, views=1, seed=3, baselines=False
    )
    assert r.baselines['random encoder'] == random.value


def test_baselines_are_remembered(monkeypatch):
    data, made = make_data(), []
    monkeypatch.setattr(
        Net, 'reinitialized', lambda self, seed: (made.append(Net(seed)), made[-1])[1]
    )
    a = linear_probe(Net(4), data, **quick)
    spent = made[0].seen
    b = linear_probe(Net(5), data, **quick)
    assert a.baselines == b.baselines and spent > 0 and made[1].log == []
    assert linear_probe(Net(5), data, **{**quick, 'lr': 1e-6}).baselines != b.baselines


def test_raw_pixels_do_not_depend_on_their_scale():
    data = make_data()
    louder = ImageData(
        data.train, data.test, stats=(data.mean, data.std / 50)
    )  # raw pixels fifty times as long
    values = [
        linear_probe(Net(), d, views=1, **quick).baselines['raw pixels'] for d in (data, louder)
    ]
    assert values[0] == pytest.approx(values[1], abs=0.04)


def test_copies_of_test_images_are_left_out_of_the_views():
    data = make_data()
    train = TensorImages(
        torch.cat([data.train.images, data.test.images[:5]]),
        torch.cat([data.train.labels, (data.test.labels[:5] + 1) % 3]),
        data.classes,
    )
    mixed = ImageData(train, data.test, 'mixed')
    with pytest.raises(ValueError, match='5 of 30'):
        linear_probe(Net(), mixed, **quick)
    a, b = (linear_probe(Net(), d, overlap='drop', baselines=False, **quick) for d in (data, mixed))
    assert a.each == b.each and b.n_train == 60 and 'left out' in b.note


def test_streamed_images(tmp_path):
    from PIL import Image

    data, files = make_data(24, 12), {}
    for split in ('train', 'test'):
        store, names = getattr(data, split), []
        for i, x in enumerate(store.images):
            names.append(f'{split}{i}.png')
            x = F.pad(x, (0, i % 3, 0, 0))
            x[0, 0, 0] = i  # of several widths, all different
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / names[-1])
        files[split] = FileImages(ByteFiles(tmp_path, names), store.labels, store.classes)
    streamed = ImageData(files['train'], files['test'], 'files')
    for name in ('moco', 'small'):
        a, b = (
            linear_probe(
                resnet('resnet18', 8, width=4),
                streamed,
                name,
                baselines=False,
                workers=w,
                **{**quick, 'epochs': 2},
            )
            for w in (0, 1)
        )
        assert a.n_train == 24 and 0 <= a.value <= 1
    net = resnet('resnet18', 8, width=4).reinitialized(0)
    assert (
        len(
            {
                linear_probe(net, streamed, baselines=False, workers=w, **quick).each
                for w in (0, 0, 1)
            }
        )
        == 1
    )


def test_linear_probe_errors():
    data, net = make_data(), Net()
    for match, kw in (
        ("config must .* got 'mocov3'", dict(config='mocov3')),
        ('views', dict(views=0)),
        ('epochs', dict(epochs=0)),
        ('schedule', dict(schedule='no')),
        ('layer', dict(layer='last')),
        ('overlap', dict(overlap='yes')),
    ):
        with pytest.raises(ValueError, match=match):
            linear_probe(net, data, **kw)
    with pytest.raises(ValueError, match="'epoch'"):
        linear_probe(net, data, epoch=3)
    assert net.log == []


# ---------------------------------------------------------------- average precision
def loop_ap(s, t, kind):
    "Straight from the definition: one point for every threshold."
    s, t = s[t >= 0].tolist(), t[t >= 0].tolist()
    points = []
    for cut in sorted(set(s), reverse=True):
        taken = [b for a, b in zip(s, t) if a >= cut]
        points.append((sum(taken) / sum(t), sum(taken) / len(taken)))
    best = lambda r: max((p for q, p in points if q >= r - 1e-9), default=0.0)
    if kind == '11-point':
        return sum(best(i / 10) for i in range(11)) / 11
    return sum(
        (r - before) * (p if kind == 'area' else best(r))
        for (r, p), before in zip(points, [0.0] + [r for r, _ in points])
    )


@pytest.mark.parametrize('seed', range(12))
def test_average_precision_against_loops_and_sklearn(seed):
    from sklearn.metrics import average_precision_score

    s, t = rand(40, seed=seed), (rand(40, seed=seed + 99) > 0.6).long()
    if seed % 2:
        s = (s * 2).round()  # ties
    if seed % 3 == 0:
        t[::7] = -1
    for kind in ('area', 'interpolated', '11-point'):
        assert average_precision(s, t, kind) == pytest.approx(loop_ap(s, t, kind))
    assert average_precision(s, t) == pytest.approx(average_precision_score(t[t >= 0], s[t >= 0]))
    order = torch.randperm(40, generator=gen(seed))
    assert average_precision(s[order], t[order], 'interpolated') == pytest.approx(
        average_precision(s, t, 'interpolated')
    )


def test_average_precision_by_hand():
    s, t = (
        torch.tensor([5.0, 4, 3, 2, 1]),
        torch.tensor([0, 1, 1, 0, 1]),
    )  # precision at the finds 1/2, 2/3, 3/5
    assert average_precision(s, t) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(s, t, 'interpolated') == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(s, t, '11-point') == pytest.approx(
        (7 * 2 / 3 + 4 * 3 / 5) / 11
    )  # recalls 0 to 0.6, then 0.7 to 1
    assert average_precision(s, torch.ones(5)) == 1.0 and average_precision(
        -s, torch.tensor([1, 0, 0, 0, 0])
    ) == pytest.approx(0.2)
    ten = torch.cat(
        [torch.ones(3), torch.zeros(90), torch.ones(7)]
    )  # recall exactly 0.3 counts for the point 0.3
    assert average_precision(-torch.arange(100.0), ten, '11-point') == pytest.approx(
        (4 * 1 + 7 * 0.1) / 11
    )
    assert math.isnan(average_precision(s, torch.zeros(5))) and math.isnan(
        average_precision(s, torch.full((5,), -1))
    )


def test_mean_average_precision():
    s, t = rand(30, 4), (rand(30, 4, seed=1) > 0.5).long()
    assert mean_average_precision(s, t) == pytest.approx(
        np.mean([average_precision(s[:, c], t[:, c]) for c in range(4)])
    )
    t[:, 2] = 0
    assert mean_average_precision(s, t) == pytest.approx(
        np.mean([average_precision(s[:, c], t[:, c]) for c in (0, 1, 3)])
    )
    for match, f in (
        ('no image', lambda: mean_average_precision(s, 0 * t)),
        ('kind', lambda: mean_average_precision(s, t, 'mean')),
        ('scores', lambda: mean_average_precision(s, t[:5])),
        ('scores', lambda: average_precision(s, t)),
        ('scores', lambda: average_precision(s[:, 0], t[:5, 0])),
    ):
        with pytest.raises(ValueError, match=match):
            f()
    P, R = precision_recall(torch.tensor([1.0, 1, 0]), torch.tensor([1, 0, 1]))
    assert P.tolist() == [0.5, 2 / 3] and R.tolist() == [0.5, 1.0]


# ---------------------------------------------------------------- logistic
def test_weight_decays():
    w = weight_decays()
    assert (
        len(w) == 45
        and w[0] == pytest.approx(1e-6)
        and w[-1] == pytest.approx(1e5)
        and w[4] / w[0] == pytest.approx(10.0)
    )


def test_per_class_against_sklearn():
    from sklearn.metrics import recall_score

    y, p = torch.randint(4, (50,), generator=gen()), torch.randint(5, (50,), generator=gen(1))
    assert (
        per_class(p, y, 5)[:4].tolist()
        == pytest.approx(recall_score(y, p, average=None, labels=range(4)).tolist())
        and per_class(p, y, 5)[4].isnan()
    )


@pytest.mark.parametrize('seed', range(3))
def test_validation_split(seed):
    y = torch.tensor([0] * 40 + [1] * 10 + [2] * 3 + [3] * 2 + [4])[
        torch.randperm(56, generator=gen(seed))
    ]
    tr, va = validation_split(y, 0.2, seed)
    assert torch.equal(torch.cat([tr, va]).sort().values, torch.arange(56)) and y[va].bincount(
        minlength=5
    ).tolist() == [8, 2, 1, 0, 0]
    assert torch.equal(va, validation_split(y, 0.2, seed)[1]) and not torch.equal(
        va, validation_split(y, 0.2, seed + 1)[1]
    )
    t = (rand(50, 6, seed=seed) > 1.5).long()
    t[0, 5] = 1
    tr, va = validation_split(t, 0.2, seed)
    assert (
        len(tr) + len(va) == 50 and len(va) == 10 and ((t[tr] == 1).any(0) == (t == 1).any(0)).all()
    )
    with pytest.raises(ValueError, match='fraction must .* got 0.0'):
        validation_split(y, 0.0)


def test_logistic_path_is_exact():
    from sklearn.linear_model import LogisticRegression

    y = torch.arange(90) % 3
    x = rand(90, 4) + 2 * F.one_hot(y, 4)
    for wd, m in logistic_path(x, y, [1e-2, 1.0, 100.0], 2000):
        cold = LogisticRegression(C=1 / wd, max_iter=5000, tol=1e-8).fit(
            x.double().numpy(), y.numpy()
        )
        assert (
            np.abs(
                m.predict_proba(x.double().numpy()) - cold.predict_proba(x.double().numpy())
            ).max()
            < 0.01
        )


def plain_logistic(x, y, u, wd):
    from sklearn.linear_model import LogisticRegression

    return torch.from_numpy(
        LogisticRegression(C=1 / wd, max_iter=5000, tol=1e-7)
        .fit(x.double().numpy(), y.numpy())
        .predict(u.double().numpy())
    )


@pytest.mark.parametrize('pixels', [False, True])
def test_logistic_against_sklearn(pixels):
    data = make_data(80, 60, hard=True)
    net = nn.Flatten() if pixels else Net()  # 192 numbers for 80 images, or 6
    net.size = 8
    x, u = (extract(net, s)[0] for s in (data.train, data.test))
    for wd in (
        (10.0, 1000.0) if pixels else (0.1, 10.0)
    ):  # weakly penalised pixels end anywhere within the tolerance
        r = logistic(net, data, wds=[wd], max_iter=2000, baselines=False)
        want = plain_logistic(x, data.train.labels, u, wd) == data.test.labels
        assert (
            (r.per_image().bool() == want).float().mean() >= 0.98
            and r.chosen['converged']
            and 'validation' not in r.chosen
        )
        assert r.value == pytest.approx(want.float().mean().item(), abs=0.04)


def test_logistic_chooses_on_held_out_train_images():
    data, net, wds = make_data(80, 60, hard=True), Net(), [1e-3, 1e-2, 0.1, 1.0, 10.0, 1e4]
    x, y = extract(net, data.train)
    tr, va = validation_split(y, 0.2, 7)
    scores = {
        wd: (plain_logistic(x[tr], y[tr], x[va], wd) == y[va]).float().mean().item() for wd in wds
    }
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        r = logistic(net, data, wds=wds, seed=7, max_iter=2000)
        official = logistic(net, data, wds=wds, validation=va, max_iter=2000, baselines=False)
    assert r.chosen['validation'] == pytest.approx(max(scores.values()), abs=1 / len(va) + 1e-6)
    assert (
        r.chosen['wd'] == official.chosen['wd']
        and official.value == r.value
        and official.settings['validation'].startswith(f'{len(va)} images, ')
    )
    assert set(r.baselines) == {'raw pixels', 'random encoder'} and r.settings['wds'] == sorted(wds)
    double = TensorImages(
        torch.cat([data.test.images[:4], data.train.images]),
        torch.cat([data.test.labels[:4], y]),
        data.classes,
    )
    with warnings.catch_warnings():  # numbers of an official split hold when copies are left out
        warnings.simplefilter('ignore')
        again = logistic(
            net,
            ImageData(double, data.test),
            wds=wds,
            validation=va + 4,
            max_iter=2000,
            baselines=False,
            overlap='drop',
        )
    assert (again.value, again.chosen, again.settings) == (
        official.value,
        official.chosen,
        {**official.settings, 'overlap': 'drop'},
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert logistic(net, data, wds=wds, seed=7, max_iter=2000).value == r.value


def test_an_end_of_the_grid_is_a_warning():
    data = make_data(noise=10)
    with pytest.warns(UserWarning, match='end of the grid'):
        r = logistic(Net(), data, wds=[1e-2, 1.0], baselines=False)
    assert r.chosen['wd'] == 1.0 and r.value == 1.0  # both perfect: the strongest is kept


def test_mean_per_class_and_classes_that_train_lacks():
    train, test = (
        make_images(60, 2, seed=1, noise=10),
        make_images(40, y=[0] * 20 + [1] * 10 + [2] * 10, seed=2, noise=10),
    )
    data = ImageData(train, test, 'lacking')
    a, b = (
        logistic(Net(), data, metric=m, wds=[0.1], baselines=False)
        for m in ('top-1', 'mean per class')
    )
    assert (
        a.value == pytest.approx(30 / 40)
        and b.value == pytest.approx(2 / 3)
        and b.each == ''
        and b.chance == pytest.approx(1 / 3)
        and a.chance == 0.5
    )
    assert linear_probe(Net(), data, lr=1.0, epochs=30, views=1, baselines=False).value <= 0.75
    assert (
        transfer_sets['flowers'] == 'mean per class'
        and transfer_sets['voc2007'] == '11-point mAP'
        and len(transfer_sets) == 11
    )
    assert sorted(k for k, v in transfer_sets.items() if v == 'mean per class') == [
        'aircraft',
        'caltech101',
        'flowers',
        'pets',
    ]


def several_labels(data, seed=0):
    "Targets of unlabelled images: the class, at times a second one, at times -1."
    out = []
    for s in (data.train, data.test):
        t = F.one_hot(s.labels, 3)
        extra = torch.rand(t.shape, generator=gen(seed))
        t = torch.where((t == 0) & (extra > 0.9), -1, t)
        out.append(t)
    return ImageData(
        TensorImages(data.train.images), TensorImages(data.test.images), 'several'
    ), tuple(out)


def test_logistic_with_targets():
    data, targets = several_labels(make_data(80, 60, hard=True))
    net = Net()
    r = logistic(net, data, targets=targets, wds=[1.0], max_iter=2000)
    x, u = (extract(net, s)[0].double().numpy() for s in (data.train, data.test))
    from sklearn.linear_model import LogisticRegression

    aps = []
    for c in range(3):
        use = (targets[0][:, c] >= 0).numpy()
        m = LogisticRegression(C=1.0, max_iter=5000).fit(x[use], targets[0][use, c])
        aps.append(loop_ap(torch.from_numpy(m.decision_function(u)), targets[1][:, c], '11-point'))
    assert (
        r.metric == '11-point mAP'
        and r.value == pytest.approx(np.mean(aps), abs=0.01)
        and r.n_classes == 3
    )
    assert (
        logistic(net, data, targets=targets, metric='area mAP', wds=[1.0], baselines=False).metric
        == 'area mAP'
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert (
            'validation'
            in logistic(net, data, targets=targets, wds=[0.1, 1.0, 10.0], baselines=False).chosen
        )


def test_logistic_errors():
    data, net = make_data(), Net()
    for match, kw in (
        ('metric', dict(metric='11-point mAP')),
        ('wds', dict(wds=[])),
        ('wds', dict(wds=[-1.0])),
        ('validation', dict(validation=0.0)),
        ('validation', dict(validation=torch.tensor([60]))),
        ('not of all', dict(validation=torch.arange(60))),
        ('max_iter', dict(max_iter=0)),
        ('targets', dict(targets=(torch.ones(3, 2), torch.ones(30, 2)))),
        ('targets', dict(targets=torch.ones(60, 2))),
    ):
        with pytest.raises(ValueError, match=match):
            logistic(net, data, **kw)
    with pytest.raises(ValueError, match='metric'):
        logistic(net, data, targets=(torch.ones(60, 2), torch.ones(30, 2)), metric='top-1')
    few = ImageData(make_images(3), data.test)
    with pytest.raises(ValueError, match='too few images'):
        logistic(net, few)


# ---------------------------------------------------------------- SVM
def plain_svm(x, y, u, v, C=0.5):
    from sklearn.svm import LinearSVC

    x, u = (
        t.numpy() / np.linalg.norm(t.numpy(), axis=1, keepdims=True)
        for t in (x.double(), u.double())
    )
    aps = []
    for c in range(3):
        m = LinearSVC(
            C=C,
            class_weight={1: 2, -1: 1},
            loss='squared_hinge',
            dual=True,
            tol=1e-6,
            max_iter=50000,
        ).fit(x, np.where(y == c, 1, -1))
        aps.append(
            loop_ap(torch.from_numpy(m.decision_function(u)), (v == c).long(), 'interpolated')
        )
    return np.mean(aps)


def test_svm_against_sklearn():
    data, net = make_data(80, 60, hard=True), Net()
    r = svm(net, data)
    (x, y), (u, v) = extract(net, data.train), extract(net, data.test)
    assert r.value == pytest.approx(plain_svm(x, y, u, v), abs=0.01)
    assert (
        r.chance == pytest.approx(1 / 3)
        and r.metric == 'interpolated mAP'
        and r.chosen == {}
        and set(r.baselines) == {'raw pixels', 'random encoder'}
    )
    assert svm(net, data).value == r.value
    targets = tuple(F.one_hot(s.labels, 3) for s in (data.train, data.test))
    assert (
        svm(net, data, targets, baselines=False).value == r.value
    )  # labels are targets, one class against the rest


def test_svm_chooses_C():
    data, net = make_data(60, 30, hard=True), Net()
    x, y = extract(net, data.train)
    x = F.normalize(x.double(), dim=1)
    r = svm(net, data, C=(0.01, 1.0, 5.0), baselines=False)
    assert r.chosen['C'] == [
        choose_C(x, (y == c).long(), (5.0, 0.01, 1.0), 0) for c in range(3)
    ] and set(r.chosen['C']) <= {0.01, 1.0, 5.0}
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    t, found = (y == 0).long(), {}
    for C in (0.01, 1.0, 5.0):
        aps = []
        for i, j in StratifiedKFold(3, shuffle=True, random_state=0).split(x, t):
            m = fit_svm(x[i], t[i], C)
            aps.append(average_precision_score(t[j], m.decision_function(x[j].numpy())))
        found[C] = np.mean(aps)
    assert found[r.chosen['C'][0]] == pytest.approx(max(found.values()))


def test_draw_shots():
    t = (rand(200, 5) > 0.8).long()
    t[::9, 2] = -1
    for k in (1, 3):
        own, shared = draw_shots(t, k, 1, 'own'), draw_shots(t, k, 1)
        for c, (a, b) in enumerate(zip(own, shared)):
            assert (
                (t[a, c] == 1).sum() == k
                and (t[a, c] == 0).sum() == 4 * k
                and len(a.unique()) == len(a)
            )
            assert (t[b, c] >= 0).all() and (t[b, c] == 1).sum() >= k and len(b) <= 5 * k
        assert any(len(b) == 5 * k for b in shared) and not all(
            torch.equal(a, b) for a, b in zip(own, draw_shots(t, k, 2, 'own'))
        )
        assert all(torch.equal(a, b) for a, b in zip(shared, draw_shots(t, k, 1)))
    with pytest.raises(ValueError, match='class'):
        draw_shots(t, 199)
    with pytest.raises(ValueError, match='negatives'):
        draw_shots(t, 1, negatives='all')


def test_low_shot():
    data, net = make_data(90, 60, hard=True), Net()
    r = svm(net, data, shots=2, draws=4)
    assert (
        len(r.chosen['draws']) == 4
        and np.mean(r.chosen['draws']) == pytest.approx(r.value)
        and len(set(r.chosen['draws'])) > 1
    )
    assert (
        svm(net, data, shots=2, draws=4, baselines=False).value
        == r.value
        != svm(net, data, shots=2, draws=4, seed=1, baselines=False).value
    )
    assert (
        svm(net, data, shots=2, draws=4, negatives='own', baselines=False).settings['negatives']
        == 'own'
    )
    x, y = extract(net, data.train)
    u, v = extract(net, data.test)
    i = draw_shots(F.one_hot(y), 2, 0)[0]  # of single labels all classes share one set
    assert svm(net, data, shots=2, draws=1, baselines=False).value == pytest.approx(
        plain_svm(x[i], y[i], u, v), abs=0.02
    )
    assert svm(net, data, shots=30, draws=1, baselines=False).value == pytest.approx(
        svm(net, data, baselines=False).value, abs=1e-3
    )


def test_svm_ignores_what_does_not_count():
    data, targets = several_labels(make_data(80, 60, hard=True))
    net, r = Net(), None
    r = svm(net, data, targets, baselines=False)
    x, u = (F.normalize(extract(net, s)[0].double(), dim=1) for s in (data.train, data.test))
    aps = [
        loop_ap(
            torch.from_numpy(fit_svm(x[use], y[use]).decision_function(u.numpy())),
            v,
            'interpolated',
        )
        for y, v in zip(targets[0].T, targets[1].T)
        for use in [y >= 0]
    ]
    assert r.value == pytest.approx(np.mean(aps))
    lack = targets[0].clone()
    lack[:, 0] = 0  # class 0 cannot be learned: chance for it
    aps[0] = ((targets[1][:, 0] == 1).sum() / (targets[1][:, 0] >= 0).sum()).item()
    assert svm(net, data, (lack, targets[1]), baselines=False).value == pytest.approx(np.mean(aps))


def test_unlabelled_images_do_not_count():
    data, net = make_data(), Net()
    more = ImageData(
        TensorImages(
            torch.cat([data.train.images, make_images(9, seed=5).images]),
            torch.cat([data.train.labels, torch.full((9,), -1)]),
            data.classes,
        ),
        data.test,
    )
    assert svm(net, more, baselines=False).value == svm(net, data, baselines=False).value
    for f in (logistic, retrieval):
        assert (
            f(
                net, more, **({'wds': [1.0]} if f is logistic else {'k': (1,)}), baselines=False
            ).value
            == f(
                net, data, **({'wds': [1.0]} if f is logistic else {'k': (1,)}), baselines=False
            ).value
        )


def test_svm_errors():
    data, net = make_data(), Net()
    for match, kw in (
        ('C must .* got 0', dict(C=0)),
        (r'C must .* got \(\)', dict(C=())),
        ('kind', dict(kind='mean')),
        ('draws', dict(shots=1, draws=0)),
        ('shots', dict(shots=0)),
        ("shots=21: class 'c0' has only 20", dict(shots=21)),
        ('cannot be chosen', dict(shots=2, C=(1.0, 2.0))),
        ('negatives', dict(shots=1, negatives='no')),
        ('targets', dict(targets=torch.ones(60, 2))),
    ):
        with pytest.raises(ValueError, match=match):
            svm(net, data, **kw)
    few = ImageData(make_images(62, y=[0] * 30 + [1] * 30 + [2] * 2, seed=1), data.test)
    with pytest.raises(ValueError, match='has only 2 positive'):
        svm(net, few, C=(1.0, 2.0))
    assert net.log == []


@pytest.mark.parametrize('f', [svm, logistic])
def test_without_scikit_learn(f, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    with pytest.raises(ImportError, match=r'ssl_patch\[eval\]'):
        f(Net(), make_data())


# ---------------------------------------------------------------- VOC
def write_voc(folder, splits, tables=False, year='2007'):
    "splits: name -> list of [(class, difficult), ...] per image."
    from PIL import Image

    root, n = Path(folder) / 'VOCdevkit' / f'VOC{year}', 0
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / part).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        names = []
        for objects in rows:
            names.append(f'{n:06d}')
            n += 1
            shade = torch.randint(
                256, (10 + n % 3, 12, 3), generator=gen(n), dtype=torch.uint8
            ).numpy()
            Image.fromarray(shade).save(root / 'JPEGImages' / f'{names[-1]}.jpg')
            text = ''.join(
                f'<object><name>{c}</name><pose>Left</pose><difficult>{int(d)}</difficult></object>'
                for c, d in objects
            )
            (root / 'Annotations' / f'{names[-1]}.xml').write_text(
                f'<annotation>{text}</annotation>'
            )
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(names) + '\n')
        for c in voc_classes if tables else ():
            said = {n: [d for k, d in objects if k == c] for n, objects in zip(names, rows)}
            (root / 'ImageSets' / 'Main' / f'{c}_{split}.txt').write_text(
                '\n'.join(f'{n} {-1 if not d else 0 if all(d) else 1:2d}' for n, d in said.items())
                + '\n'
            )
    return root


ROWS = dict(
    trainval=[
        [('cat', 0)],
        [('cat', 1)],
        [('cat', 1), ('cat', 0), ('dog', 0)],
        [('dog', 1)],
        [('zebra', 0)],
        [('dog', 0), ('cat', 0)],
    ]
    * 4,
    test=[[('cat', 0)], [('dog', 0)], [('cat', 1), ('dog', 1)]] * 3,
)


@pytest.mark.parametrize('tables', [False, True])
def test_voc_targets(tmp_path, tables):
    root = write_voc(tmp_path, ROWS, tables)
    if tables:
        (root / 'Annotations' / '000000.xml').unlink()  # not needed then
    data, (y, v) = voc07(tmp_path)
    cat, dog = voc_classes.index('cat'), voc_classes.index('dog')
    assert y[:6, [cat, dog]].tolist() == [[1, 0], [-1, 0], [1, 1], [0, -1], [0, 0], [1, 1]] and v[
        :3, [cat, dog]
    ].tolist() == [[1, 0], [0, 1], [-1, -1]]
    assert (
        y.shape == (24, 20)
        and v.shape == (9, 20)
        and y.abs().sum(0).nonzero().flatten().tolist() == [cat, dog]
    )
    assert (
        data.classes == voc_classes
        and len(data.train) == 24
        and data.train[2].shape == (3, 10, 12)
        and data.train.labels is None
    )
    for place in (tmp_path, tmp_path / 'VOCdevkit', root):
        assert torch.equal(voc07(str(place))[1][0], y)
    assert voc07(tmp_path, difficult=0)[1][0].min() == 0 and 'do not count' in data.note
    assert data.train.names[:2] == ['000000.jpg', '000001.jpg']


def test_voc_through_svm_and_logistic(tmp_path):
    write_voc(tmp_path, ROWS)
    data, targets = voc07(tmp_path)
    r = svm(Net(), data, targets)
    assert (
        r.n_classes == 20
        and r.n_train == 24
        and r.data == 'VOC2007'
        and r.metric == 'interpolated mAP'
        and 0 < r.value <= 1
    )
    assert r.note.startswith('20 classes') and set(r.baselines) == {'raw pixels', 'random encoder'}
    assert (
        logistic(Net(), data, targets=targets, wds=[1.0], baselines=False).metric == '11-point mAP'
    )
    with pytest.raises(ValueError, match="shots=1: class 'aeroplane' has only 0"):
        svm(Net(), data, targets, shots=1)


def test_voc_errors(tmp_path):
    root = write_voc(tmp_path, ROWS)
    with pytest.raises(FileNotFoundError, match='no ImageSets'):
        voc07(tmp_path, year='2012')
    with pytest.raises(FileNotFoundError, match="split 'val'"):
        voc07(tmp_path, test='val')
    with pytest.raises(ValueError, match='difficult must .* got 1'):
        voc07(tmp_path, difficult=1)
    (root / 'ImageSets' / 'Main' / 'empty.txt').write_text('\n')
    with pytest.raises(ValueError, match='empty'):
        voc07(tmp_path, test='empty')
    (root / 'Annotations' / '000003.xml').unlink()
    with pytest.raises(FileNotFoundError, match='000003.xml'):
        voc07(tmp_path)
    (root / 'JPEGImages' / '000004.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='000004.jpg'):
        voc07(tmp_path)


def test_voc_tables_that_lack_an_image(tmp_path):
    root = write_voc(tmp_path, ROWS, tables=True)
    f = root / 'ImageSets' / 'Main' / 'cow_test.txt'
    f.write_text('\n'.join(f.read_text().splitlines()[1:]))
    with pytest.raises(ValueError, match="'000024'"):
        voc07(tmp_path)


# ---------------------------------------------------------------- retrieval
def loop_retrieval(q, g, y, labels, k, own):
    "R@k and AP of every query, one at a time."
    hit, ap = [], []
    for i in range(len(q)):
        order = sorted(
            (j for j in range(len(g)) if not (own and j == i)),
            key=lambda j: -float(F.cosine_similarity(q[i].double(), g[j].double(), 0)),
        )
        same = [bool(labels[j] == y[i]) for j in order]
        hit.append([any(same[:n]) for n in k])
        ap.append(
            np.mean([sum(same[: n + 1]) / (n + 1) for n in range(len(same)) if same[n]])
            if any(same)
            else 0.0
        )
    return torch.tensor(hit), torch.tensor(ap)


@pytest.mark.parametrize('own', [False, True])
def test_retrieval_against_a_loop(own):
    q, g = rand(25, 4) * 3, rand(25 if own else 40, 4, seed=1)
    g = q if own else g
    y, labels = (
        torch.arange(25) % 6,
        torch.arange(len(g)) % (6 if own else 5),
    )  # class 5 is not in the other gallery
    hit, ap = loop_retrieval(q, g, y, labels, (1, 3, 10), own)
    assert torch.equal(recall_at(q, g, y, labels, (1, 3, 10), own), hit)
    for numbers in (1, 100, 2**24):
        assert torch.allclose(
            ranking_precision(q, g, y, labels, own, numbers=numbers).double(), ap, atol=1e-6
        )
    assert own or ap[y == 5].eq(0).all()


def test_copies_do_not_hide_the_query():
    x, y = (
        torch.ones(5, 3),
        torch.tensor([0, 0, 1, 1, 2]),
    )  # all alike: the query itself may not be among the nearest
    found = recall_at(x, x, y, y, (1, 4), own=True)
    assert found[:, 1].tolist() == [True] * 4 + [False] and not found[4].any()


@pytest.mark.parametrize('own', [False, True])
def test_retrieval_chance(own):
    y = torch.tensor([0, 0, 1, 1, 1, 2, 3])
    labels = y if own else torch.tensor([0, 0, 0, 1, 1, 4])
    n = len(labels) - own
    hits, aps = {k: [] for k in (1, 2, 4)}, []
    for i in range(len(y)):
        rest = torch.cat([labels[:i], labels[i + 1 :]]) if own else labels
        same = torch.stack([rest[list(p)] for p in permutations(range(n))]) == y[i]
        for k in hits:
            hits[k].append(same[:, :k].any(1).float().mean().item())
        aps.append(
            ((same.cumsum(1) / torch.arange(1, n + 1) * same).sum(1) / same.sum(1).clamp_min(1))
            .mean()
            .item()
        )
    for k in hits:
        assert retrieval_chance(y, labels, k, own) == pytest.approx(np.mean(hits[k]), abs=1e-6)
    assert retrieval_chance(y, labels, None, own) == pytest.approx(np.mean(aps), abs=1e-6)


def test_retrieval_record():
    data, net = make_data(60, 30, hard=True), Net()
    r, m = retrieval(net, data, k=(5, 1)), retrieval(net, data, k=(1, 5), metric='mAP')
    assert (
        r.settings['k'] == [1, 5]
        and set(r.chosen) == {'R@5'}
        and m.chosen == {'R@1': r.value, **r.chosen}
        and r.value <= r.chosen['R@5']
    )
    assert r.per_image().shape == m.per_image().shape == (
        30,
    ) and m.per_image().mean() == pytest.approx(m.value, abs=1e-3)
    assert (
        r.value == pytest.approx(knn(net, data, k=1, baselines=False).value)
        and r.chance == pytest.approx(1 / 3)
        and set(m.baselines) == {'raw pixels', 'random encoder'}
    )
    own = retrieval(net, data, k=(1,), gallery='test')
    assert own.settings['gallery'] == 'test' and own.chance == pytest.approx(9 / 29)
    assert retrieval(net, data, k=3, metric='R@3', baselines=False).settings['k'] == [3]
    for match, kw in (
        ('k must .* got 61', dict(k=(1, 61))),
        ('only 29', dict(k=(1, 30), gallery='test')),
        ('gallery', dict(gallery='val')),
        ('metric', dict(metric='R@2')),
        ('k must .* got 0', dict(k=(0, 1))),
        (r'k must .* got \(\)', dict(k=())),
    ):
        with pytest.raises(ValueError, match=match):
            retrieval(net, data, **kw)


# ---------------------------------------------------------------- all of them
@pytest.mark.parametrize(
    'protocol', [lambda *a, **kw: linear_probe(*a, **quick, **kw), logistic, svm, retrieval]
)
def test_errors_of_data(protocol):
    data, net = make_data(), Net()
    for match, bad in (
        ('no labels', ImageData(TensorImages(data.train.images), data.test)),
        ('no labels', ImageData(data.train, TensorImages(data.test.images))),
        ('one class', ImageData(make_images(20, 1), data.test)),
        ('no test split', ImageData(data.train, None)),
    ):
        with pytest.raises(ValueError, match=match):
            protocol(net, bad)
    with pytest.raises(ValueError, match='layer'):
        protocol(net, data, layer='head')
    assert net.log == []


@pytest.mark.parametrize('kind', [vit, resnet])
def test_towers_of_ours_with_both_layers(kind):
    data, net = (
        make_data(45, 30, size=16),
        (
            vit('tiny', size=16, patch=4, width=32, depth=2, heads=2)
            if kind is vit
            else resnet('resnet18', 16, width=4)
        ).reinitialized(7),  # not the seed of the random twin
    )
    for layer in ('image', 'patch_mean'):
        for f, kw in (
            (linear_probe, dict(views=1, **quick)),
            (logistic, dict(wds=[1.0])),
            (svm, {}),
            (retrieval, dict(k=(1, 5))),
        ):
            r = f(net, data, layer=layer, **kw)
            assert r.layer == layer and 0 <= r.value <= 1 and len(r.baselines) == 2


# ---------------------------------------------------------------- real images
CIFAR = Path(os.environ.get('SSL_PATCH_DATA', '/nowhere')) / 'cifar10.npz'


@pytest.mark.skipif(not CIFAR.is_file(), reason='needs SSL_PATCH_DATA/cifar10.npz')
def test_cifar10_against_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    data = images(str(CIFAR)).sample(2000, 500)
    net = (
        vit('tiny', size=32, patch=4, width=64, depth=2, heads=2)
        .reinitialized(0)
        .set_stats(data.mean, data.std)
    )
    (x, y), (u, v) = (
        (z.double().numpy(), y.numpy())
        for z, y in (extract(net, s) for s in (data.train, data.test))
    )
    for how in knn_settings.values():
        sk = KNeighborsClassifier(
            how['k'],
            weights=lambda d: np.exp((1 - d) / how['T']),
            metric='cosine',
            algorithm='brute',
        ).fit(x, y)
        assert knn(net, data, baselines=False, overlap='keep', **how).value == pytest.approx(
            (sk.predict(u) == v).mean(), abs=0.004
        )
    for wd in (1e-2, 1.0, 100.0):
        sk = LogisticRegression(C=1 / wd, max_iter=3000).fit(x - x.mean(0), y)
        ours = logistic(net, data, wds=[wd], max_iter=3000, baselines=False, overlap='keep')
        assert (
            ours.value == pytest.approx((sk.predict(u - x.mean(0)) == v).mean(), abs=0.006)
            and 0.2 < ours.value < 0.6
        )


# ---------------------------------------------------------------- settings, wrong arguments
def test_settings_tell_grids_apart():
    from ssl_patch.evaluation.logistic import _in_words

    assert (
        _in_words(weight_decays()) == '45 from 1e-06 to 100000'
        and _in_words(weight_decays(8, -4, 3)) == '8 from 0.0001 to 1000'
    )
    assert _in_words(weight_decays(9, -4, 3)[::-1]) == '9 from 0.0001 to 1000' and _in_words(
        [0.1]
    ) == [0.1]
    other = weight_decays(8, -4, 3)
    other[3] *= 1.1
    assert _in_words(other) == sorted(other) and _in_words(
        weight_decays(8, -4.1234567, 3)
    ) == weight_decays(8, -4.1234567, 3)


def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kw)


def test_other_validation_rows_are_another_measurement(tmp_path):
    data, net, wds = make_data(80, 60, hard=True, noise=90), Net(), [1e-3, 1e3, 3e4]
    rows = [torch.arange(0, 40), torch.arange(40, 80), torch.arange(0, 80, 5)]
    each = [quiet(logistic, net, data, wds=wds, validation=v, out=tmp_path) for v in rows]
    alone = [
        quiet(logistic, net, make_data(80, 60, hard=True, noise=90), wds=wds, validation=v)
        for v in rows
    ]  # nothing is remembered there
    assert [r.baselines for r in each] == [r.baselines for r in alone] and [
        r.value for r in each
    ] == [r.value for r in alone]
    assert len({r.settings['validation'] for r in each}) == 3 and len(load_records(tmp_path)) == 3
    assert (
        quiet(
            logistic, net, data, wds=wds, validation=rows[0].flip(0).int(), baselines=False
        ).settings
        == each[0].settings
    )
    grids = [
        quiet(logistic, net, data, wds=w, max_iter=20)
        for w in ([1e-3, 1e-2, 0.1, 1.0, 10.0, 1e5], [1e-3, 3e3, 1e4, 3e4, 6e4, 1e5])
    ]
    fresh = [
        quiet(
            logistic,
            net,
            make_data(80, 60, hard=True, noise=90),
            wds=g.settings['wds'],
            max_iter=20,
        )
        for g in grids
    ]
    assert grids[0].settings != grids[1].settings and [g.baselines for g in grids] == [
        f.baselines for f in fresh
    ]
    assert grids[0].baselines != grids[1].baselines  # so the memory had to tell them apart


def test_the_strongest_of_equals_is_kept_where_a_class_cannot_be_learned():
    data, (y, v) = several_labels(make_data(80, 60, noise=10))
    y[:, 0] = 0  # fits nothing, and comes first
    assert quiet(
        logistic,
        Net(),
        data,
        targets=(y, v),
        wds=[0.1, 1.0, 1.0, 10.0],
        metric='area mAP',
        baselines=False,
    ).chosen['wd'] in (0.1, 1.0, 10.0)
    y[:, 1:] = 0
    v2 = v.clone()
    r = quiet(
        logistic,
        Net(),
        data,
        targets=(torch.where(torch.arange(80)[:, None] == 0, 1, y), v2),
        wds=[0.1, 1.0, 10.0],
        validation=torch.tensor([0, 1]),
        baselines=False,
    )
    assert r.chosen['wd'] == 10.0


def leaky(keep, y=None):
    "Train has `keep` images of class 0 that test has not, and eight that it has."
    clean = make_data(90, 30)
    zero = clean.train.images[clean.train.labels == 0]
    x = torch.cat([zero[: keep + 8], clean.train.images[clean.train.labels > 0]])
    y = torch.cat([torch.zeros(keep + 8).long(), clean.train.labels[clean.train.labels > 0]])
    test = TensorImages(
        torch.cat([clean.test.images, zero[keep : keep + 8]]),
        torch.cat([clean.test.labels, torch.zeros(8).long()]),
        clean.classes,
    )
    return ImageData(TensorImages(x, y, clean.classes), test, 'leaky')


def test_what_drop_leaves_is_checked_before_work():
    net = Net()
    for says, kw in (
        (
            "shots=5: class 'c0' has only 4 positive train images "
            "after overlap='drop' has left out 8",
            dict(shots=5),
        ),
        ("class 'c0' has only 2 positive", dict(C=(0.1, 1.0))),
    ):
        data = leaky(4 if 'shots' in kw else 2)
        with pytest.raises(ValueError, match=says):
            svm(net, data, overlap='drop', **kw)
        targets = tuple(F.one_hot(s.labels, 3) for s in (data.train, data.test))
        with pytest.raises(ValueError, match='has only'):
            svm(net, data, targets, overlap='drop', **kw)
        with pytest.raises(ValueError, match='8 of 38 test images'):
            svm(net, data, **kw)
    for f, says, kw in (
        (retrieval, 'k=63.*62', dict(k=63, metric='R@63')),
        (retrieval, 'k=63.*62', dict(k=(1, 63), metric='mAP')),
        (logistic, "overlap='drop' leaves 0 of these", dict(validation=torch.arange(2, 10))),
    ):
        with pytest.raises(ValueError, match=says):
            f(net, leaky(2), overlap='drop', **kw)
    assert net.log == []
    assert svm(net, leaky(4), shots=4, draws=2, overlap='drop', baselines=False).n_train == 64
    assert svm(net, leaky(3), C=(0.1, 1.0), overlap='drop', baselines=False).settings['C'] == [
        0.1,
        1.0,
    ]
    assert (
        retrieval(net, leaky(2), k=62, metric='R@62', overlap='drop', baselines=False).value == 1.0
    )


def test_too_few_negatives_for_the_folds():
    y = torch.ones(60, 2).long()
    y[:2, 0] = 0
    y[:30, 1] = 0
    with pytest.raises(ValueError, match='class 0 has only 2 negative'):
        svm(
            Net(),
            ImageData(
                TensorImages(make_images(60).images), TensorImages(make_images(30, seed=2).images)
            ),
            (y, y[:30]),
            C=(0.1, 1.0),
        )


def test_too_few_images_to_hold_any_out():
    net, data = Net(), ImageData(make_images(3, seed=1), make_images(30, seed=2))
    with pytest.raises(ValueError, match='too few images to hold any out'):
        logistic(net, data)
    assert net.log == []


@pytest.mark.parametrize(
    'f, says, kw',
    [
        (linear_probe, 'drops must .* got 0.6', dict(drops=0.6)),
        (linear_probe, 'momentum must .* got None', dict(momentum=None)),
        (linear_probe, 'config must .* got 5', dict(config=5)),
        (linear_probe, r"config must .* got \['moco'\]", dict(config=['moco'])),
        (linear_probe, 'scale must .* got 5', dict(scale=5)),
        (linear_probe, 'views must .* got 1.5', dict(views=1.5)),
        (linear_probe, "resize must .* got '256'", dict(resize='256')),
        (retrieval, 'k must .* got 1.5', dict(k=1.5)),
        (retrieval, "k must .* got '5'", dict(k='5')),
        (retrieval, 'k must .* got 1.5', dict(k=(1, 1.5))),
        (retrieval, 'k must .* got ', dict(k=())),
        (retrieval, 'gallery must .* got None', dict(gallery=None)),
        (logistic, 'wds must .* got 1.0', dict(wds=1.0)),
        (logistic, r'wds must .* got \[None\]', dict(wds=[None])),
        (logistic, "wds must .* got 'abc'", dict(wds='abc')),
        (logistic, r'wds must .* got \[\]', dict(wds=[])),
        (logistic, 'validation must .* got None', dict(validation=None)),
        (logistic, 'validation must .*torch.bool', dict(validation=torch.zeros(60).bool())),
        (logistic, 'validation must .*torch.float32', dict(validation=torch.tensor([0.5]))),
        (logistic, 'max_iter must .* got 1.5', dict(max_iter=1.5)),
        (svm, "C must .* got '1'", dict(C='1')),
        (svm, 'C must .* got True', dict(C=True)),
        (svm, 'shots must .* got 1.5', dict(shots=1.5)),
        (svm, 'kind must .* got 5', dict(kind=5)),
        (svm, 'negatives must .* got None', dict(negatives=None)),
    ],
)
def test_wrong_types_name_the_argument(f, says, kw):
    net = Net()
    with pytest.raises(ValueError, match=says):
        f(net, make_data(), **kw)
    assert net.log == []


@pytest.mark.parametrize('f', [svm, logistic])
def test_wrong_data_and_targets(f):
    data, (y, v) = several_labels(make_data())
    for says, args in (
        (r'targets must .* got \(array', (data, (y.numpy(), v.numpy()))),
        (r'targets must be a pair of tensors, .* got \(60, 3\) int64', (data, y.numpy())),
        ('targets', (data, (y, v, v))),
        ('targets', (data, (y, v[:5]))),
        ('targets', (data, 'photos')),
        ("data must .*got 'photos'", ('photos', (y, v))),
    ):
        with pytest.raises(ValueError, match=says):
            f(Net(), args[0], targets=args[1])
    for g in (linear_probe, logistic, svm, retrieval):
        with pytest.raises(ValueError, match="data must .* got 'photos'"):
            g(Net(), 'photos')
        with pytest.raises(ValueError, match="encoder must .* got 'photos'"):
            g('photos', make_data())


@pytest.mark.parametrize('name', ['moco', 'small'])
def test_streamed_and_in_memory_give_the_same_views(tmp_path, name):
    from PIL import Image
    from ssl_patch.evaluation.linear_probe import _Epochs

    store = make_images(20, size=12)
    for i, x in enumerate(store.images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / f'{i:02d}.png')
    files = FileImages(
        ByteFiles(tmp_path, [f'{i:02d}.png' for i in range(20)]), store.labels, store.classes
    )
    batches = torch.randperm(20, generator=gen()).split(8)
    made = []
    for store_, workers in ((store, 0), (files, 0), (files, 2)):
        config, cpu = linear_probe_configs[name], torch.device('cpu')
        epochs = _Epochs(Net(), store_, config, 0, 'image', 8, cpu, workers=workers)
        made.append(torch.cat(list(epochs.views(batches, 1))))
    assert (
        torch.equal(made[1], made[2])
        and torch.allclose(made[0], made[1], atol=1e-6)
        and made[0].shape == (20, 3, 8, 8)
    )
    data = ImageData(files, make_images(30, seed=3, size=12), 'files')
    a, b = (
        linear_probe(Net(), ImageData(s, data.test), name, baselines=False, **quick)
        for s in (store, files)
    )
    assert a.each == b.each


def test_a_folder_that_cannot_be_is_told_before_work(tmp_path):
    (tmp_path / 'file').write_text('x')
    net = Net()
    for f, kw in ((linear_probe, quick), (logistic, {}), (svm, {}), (retrieval, dict(k=1))):
        with pytest.raises((ValueError, OSError), match='file'):
            f(net, make_data(), out=tmp_path / 'file', **kw)
    assert net.log == []


@pytest.mark.parametrize('f', [svm, logistic])
def test_leaks_are_looked_for_once(f, monkeypatch):
    import ssl_patch.evaluation.protocol as room

    asked, look = [], room.check_leakage
    monkeypatch.setattr(room, 'check_leakage', lambda *a: (asked.append(1), look(*a))[1])
    f(Net(), make_data(), baselines=False, **({'wds': [0.1, 1.0]} if f is logistic else {}))
    assert len(asked) == 1


def test_small_regressions_take_one_thread_and_give_the_others_back():
    from threadpoolctl import threadpool_info
    import sklearn.linear_model  # noqa: F401 - its libraries are loaded

    now = lambda: [i['num_threads'] for i in threadpool_info()]
    before = now()
    for _ in logistic_path(rand(30, 4), torch.arange(30) % 3, [1.0, 0.1]):
        assert now() == before
    assert now() == before

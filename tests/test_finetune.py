"Recipes as published, subsets of labels, groups of weights, runs that resume, and records."

import json
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from steps import StopAt

from ssl_patch.data.fingerprints import copies, is_in
from ssl_patch.data.images import ImageData, TensorImages
from ssl_patch.data.sources import images
from ssl_patch.evaluation.knn import knn
from ssl_patch.evaluation.records import load_records, table
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.transfer.augment import (
    LabelledLoader,
    finetune_augmentation,
    mixed,
    seeded,
    show_augmented,
)
from ssl_patch.transfer.classifier import (
    Classifier,
    finetune_optimizer,
    finetune_schedule,
    layers_of,
)
from ssl_patch.transfer.few_labels import finetune, semi_supervised
from ssl_patch.transfer.finetune import FineTuner, plot_finetune, settle_batch
from ssl_patch.transfer.labels import label_fraction, label_list
from ssl_patch.transfer.recipes import (
    FinetuneConfig,
    aps_finetune_config,
    config_of,
    semi_supervised_config,
)


def colours(n, seed=0, classes=3, size=16, noise=25.0, skip=()):
    "Colour says the class."
    g = torch.Generator().manual_seed(seed)
    y = torch.tensor([c for c in range(classes) if c not in skip]).repeat(n)[:n]
    c = torch.tensor(
        [
            [200.0, 60, 60],
            [60, 200, 60],
            [60, 60, 200],
            [200, 200, 60],
            [60, 200, 200],
            [200, 60, 200],
            [130, 130, 130],
        ]
    )[y]
    x = c[:, :, None, None] + noise * torch.randn(n, 3, size, size, generator=g)
    return TensorImages(x.clamp(0, 255).byte(), y, [f'c{i}' for i in range(classes)], 'colours')


def make_data(n=48, m=30, **kw):
    return ImageData(colours(n, 1, **kw), colours(m, 2, **kw), 'colours', 'the label is a colour')


def net(seed=0, depth=2, **kw):
    return (
        vit('tiny', size=16, patch=8, width=16, depth=depth, heads=2, **kw)
        .reinitialized(seed)
        .set_stats([0.5] * 3, [0.25] * 3)
    )


quick = FinetuneConfig(epochs=3, batch_size=16, lr=3e-3, crop='pad', erasing=0.25)
wild = aps_finetune_config(
    batch_size=16, epochs=3, warmup_epochs=1, lr=3e-3, drop_path=0.2, ema=0.8, grad_clip=1.0
)  # everything that is random


def state(run):
    s = run.state_dict()
    s.pop('seconds')
    s['history'] = [{k: v for k, v in h.items() if k != 'seconds'} for h in s['history']]
    return s


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def tuner(config=quick, encoder=None, data=None, **kw):
    return FineTuner(
        encoder or net(),
        data or make_data(),
        config,
        **(dict(progress='quiet', device='cpu', bf16=False) | kw),
    )


# ---------------------------------------------------------------- recipes
@pytest.mark.parametrize('name, lr', [('tiny', 5e-4), ('small', 2.5e-4), ('base', 1.25e-4)])
def test_aps_as_released(name, lr):
    r = aps_finetune_config(name)
    assert abs(r.lr - lr) < 1e-12 and abs(aps_finetune_config(name, 512).lr - 4 * lr) < 1e-12
    got = {
        k: getattr(r, k)
        for k in (
            'epochs',
            'batch_size',
            'optimizer',
            'weight_decay',
            'betas',
            'schedule',
            'warmup_epochs',
            'warmup_lr',
            'min_lr',
            'smoothing',
            'mixup',
            'cutmix',
            'switch',
            'crop',
            'rand_augment',
            'erasing',
            'stats',
            'ema',
            'drop_path',
            'grad_clip',
            'layer_decay',
            'decay_all',
        )
    }
    assert got == dict(
        epochs=100,
        batch_size=128,
        optimizer='adamw',
        weight_decay=0.05,
        betas=(0.9, 0.999),
        schedule='cosine',
        warmup_epochs=5,
        warmup_lr=1e-6,
        min_lr=1e-5,
        smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        switch=0.5,
        crop='pad',
        rand_augment='rand-m9-mstd0.5-inc1',
        erasing=0.25,
        stats='imagenet',
        ema=0.0,
        drop_path=None,
        grad_clip=None,
        layer_decay=1.0,
        decay_all=False,
    )


def test_semi_supervised_as_published():
    r = semi_supervised_config(0.01)
    assert (
        r.epochs,
        r.drops,
        r.drop_to,
        r.optimizer,
        r.momentum,
        r.nesterov,
        r.batch_size,
        r.lr,
        r.head_lr,
        r.weight_decay,
        r.crop,
        r.warmup_epochs,
    ) == (20, (12, 16), 0.2, 'sgd', 0.9, False, 256, 0.01, 100.0, 5e-4, 'rrc', 0)
    assert semi_supervised_config(0.1).weight_decay == 1e-4
    for fraction, epochs in ((0.01, 60), (0.1, 30)):
        r = semi_supervised_config(fraction, 'simclr')
        assert (
            r.epochs,
            r.batch_size,
            r.nesterov,
            r.weight_decay,
            r.warmup_epochs,
            r.schedule,
        ) == (
            epochs,
            1024,
            True,
            0.0,
            0,
            'cosine',
        )
        assert (
            abs(r.lr - 0.05 * 1024 / 256) < 1e-12
            and abs(semi_supervised_config(fraction, 'simclr', 512).lr - 0.1) < 1e-12
        )


@pytest.mark.parametrize(
    'wrong',
    [
        dict(epochs=0),
        dict(epochs=2.5),
        dict(batch_size=1),
        dict(optimizer='lars'),
        dict(lr=0),
        dict(lr=float('nan')),
        dict(weight_decay=-1),
        dict(betas=(0.9,)),
        dict(betas=0.9),
        dict(betas='ab'),
        dict(drops=5),
        dict(drops=('a',)),
        dict(momentum=1.0),
        dict(momentum=None),
        dict(layer_decay=0.0),
        dict(schedule='linear'),
        dict(warmup_epochs=100),
        dict(drops=(8, 4)),
        dict(grad_clip=0.0),
        dict(smoothing=1.0),
        dict(mixup=-0.1),
        dict(switch=2),
        dict(crop='random'),
        dict(rand_augment='auto'),
        dict(rand_augment='rand-q5'),
        dict(erasing=1.5),
        dict(ema=1.0),
        dict(drop_path=1.0),
        dict(stats='cifar'),
        dict(schedule='steps'),
        dict(min_lr=1.0),
        dict(nesterov='yes'),
    ],
)
def test_wrong_recipes(wrong):
    with pytest.raises(
        ValueError, match=next(iter(wrong)) if wrong != dict(schedule='steps') else 'drops'
    ):
        FinetuneConfig(**wrong)


def test_unknown_names():
    with pytest.raises(ValueError, match="name must be .* got 'huge'"):
        aps_finetune_config('huge')
    with pytest.raises(ValueError, match="name must be .* got 'byol'"):
        semi_supervised_config(0.1, 'byol')
    with pytest.raises(ValueError, match='fraction must be .* got 0'):
        semi_supervised_config(0)


def course(config, groups=((1.0,),)):
    opt = torch.optim.SGD(
        [dict(params=[torch.nn.Parameter(torch.zeros(1))], lr_scale=s) for (s,) in groups],
        lr=config.lr,
    )
    sched, out = finetune_schedule(opt, config), []
    for e in range(config.epochs):
        sched.step(e)
        out.append([g['lr'] for g in opt.param_groups])
    return np.array(out)


def test_schedules_by_hand():
    r = aps_finetune_config('tiny')
    want = [
        1e-6 + e * (5e-4 - 1e-6) / 5
        if e < 5
        else 1e-5 + (5e-4 - 1e-5) * (1 + np.cos(np.pi * e / 100)) / 2
        for e in range(100)
    ]
    assert np.allclose(course(r)[:, 0], want, rtol=1e-9)
    both = course(semi_supervised_config(0.01), ((1.0,), (100.0,)))
    assert np.allclose(both[:, 0], [0.01] * 12 + [0.002] * 4 + [0.0004] * 4) and np.allclose(
        both[:, 1], 100 * both[:, 0]
    )


# ---------------------------------------------------------------- subsets
def test_fraction_is_stratified_nested_and_seeded():
    y = torch.arange(5).repeat_interleave(torch.tensor([300, 100, 50, 3, 1]))
    s = TensorImages(
        torch.randint(0, 256, (len(y), 3, 4, 4), dtype=torch.uint8),
        y[torch.randperm(len(y))],
        [*'abcde', 'never'],
        'uneven',
    )
    one, ten = label_fraction(s, 0.01), label_fraction(s, 0.1)
    assert one.labels.bincount().tolist() == [3, 1, 1, 1, 1] and ten.labels.bincount().tolist() == [
        30,
        10,
        5,
        1,
        1,
    ]
    assert one.classes == s.classes and len(copies(ten, one)) == len(one)
    assert torch.equal(label_fraction(s, 0.1).images, ten.images) and not torch.equal(
        label_fraction(s, 0.1, seed=1).images, ten.images
    )
    assert torch.equal(label_fraction(s, 1.0).images, s.images)
    some = TensorImages(
        s.images, torch.where(torch.arange(len(y)) % 2 == 0, s.labels, -1), s.classes
    )
    assert (label_fraction(some, 1).labels >= 0).all()


@pytest.mark.parametrize('fraction', [0, -0.1, 1.01, float('nan'), True, '1%', None])
def test_bad_fractions(fraction):
    with pytest.raises(ValueError, match='fraction must be'):
        label_fraction(colours(9), fraction)


def test_fraction_needs_labels():
    x = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    for labels in (None, [-1] * 4):
        with pytest.raises(ValueError, match='no labels'):
            label_fraction(TensorImages(x, labels), 0.5)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Three classes of five, three and two images, some names in two folders."
    top = tmp_path_factory.mktemp('pets')
    for split, k in (('train', 0), ('test', 100)):
        for c, (word, n) in enumerate((('n01', 5), ('n02', 3), ('n03', 2))):
            (top / split / word).mkdir(parents=True)
            for i in range(n):
                Image.new('RGB', (16, 16), (60 * c + k, 10 * i, 7 + k)).save(
                    top / split / word / f'{word}_{i}.png'
                )
    for word in ('n01', 'n02'):
        Image.new('RGB', (16, 16), (9, len(word), ord(word[-1]))).save(
            top / 'train' / word / 'same.png'
        )
    return top


@pytest.mark.parametrize('stream', [True, False])
def test_lists_of_names(folder, tmp_path, stream):
    data = images(folder, stream=stream)
    (tmp_path / '1percent.txt').write_text('n03_1.png\n\nn01_4.png \nn01/same.png\nn01_4.png\n')
    few = label_list(data.train, tmp_path / '1percent.txt')
    assert (
        few.names == ['n01/n01_4.png', 'n01/same.png', 'n03/n03_1.png']
        and few.labels.tolist() == [0, 0, 2]
        and few.classes == ['n01', 'n02', 'n03']
    )
    with pytest.raises(ValueError, match='2 of 3 are not in'):
        label_list(data.train, ['n01_0.png', 'n01_9.png', 'x.png'])
    assert len(label_list(data.train, ['n01_0.png', 'n01_9.png', 'x.png'], missing='skip')) == 1
    with pytest.raises(ValueError, match='1 of 1'):
        label_list(data.train, ['x.png'], missing='skip')
    with pytest.raises(ValueError, match="'same.png' stands for 2 images"):
        label_list(data.train, ['same.png'])
    with pytest.raises(ValueError, match='no such text file'):
        label_list(data.train, str(tmp_path / 'none.txt'))
    with pytest.raises(ValueError, match="missing must be .* got 'drop'"):
        label_list(data.train, [], missing='drop')
    with pytest.raises(ValueError, match='not from files'):
        label_list(colours(9), ['a.png'])


# ---------------------------------------------------------------- what is done to images
def test_targets_sum_to_one_and_say_what_was_mixed():
    x, y = (
        torch.cat([torch.zeros(4, 3, 16, 16), torch.full((4, 3, 16, 16), 255)]).byte(),
        torch.arange(8),
    )
    for kw in (
        dict(mixup=0.8),
        dict(cutmix=1.0),
        dict(mixup=0.8, cutmix=1.0),
        dict(mixup=0.8, smoothing=0.1),
    ):
        for s in range(6):
            with seeded(s):
                z, t = mixed(x, y, 9, FinetuneConfig(**kw), torch.zeros(3), torch.ones(3))
            assert torch.allclose(t.sum(1), torch.ones(8), atol=1e-6) and (t >= 0).all()
            lam = (t[0, 0] - t[0, 8]) / (
                1 - kw.get('smoothing', 0.0)
            )  # the last class is in no image: it has the floor
            assert abs(z[0].mean() - (1 - lam)) < 1e-5 and abs(z[7].mean() - lam) < 1e-5


def test_erasing_is_noise_of_normalised_pixels():
    x, mean, std = (
        torch.full((64, 3, 32, 32), 51, dtype=torch.uint8),
        torch.tensor([0.1, 0.2, 0.3]),
        torch.tensor([0.05, 0.1, 0.2]),
    )
    with seeded(0):
        z, _ = mixed(x, torch.zeros(64).long(), 2, FinetuneConfig(erasing=1.0), mean, std)
    changed = (z - 0.2).abs().amax(1) > 1e-4
    assert changed.any((1, 2)).all() and 0.02 < changed.float().mean() < 1 / 3
    n = (z - mean[:, None, None]) / std[:, None, None]
    noise = n.permute(0, 2, 3, 1)[changed]
    assert noise.mean(0).abs().max() < 0.05 and (noise.std(0) - 1).abs().max() < 0.05


def test_seeded_leaves_random_numbers_as_they_were():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    want = draw()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with seeded(1, 'a'):
        inside = draw()
    with seeded(1, 'a'):
        assert draw() == inside
    with seeded(1, 'b'):
        assert draw() != inside
    assert draw() == want


def test_loader_depends_on_seed_epoch_and_number_alone():
    s = colours(32)
    change = finetune_augmentation(aps_finetune_config(), 16, torch.tensor([0.5] * 3))

    def batches(seed=0, e=0, start=0, workers=0):
        return [x for (x, _), _ in LabelledLoader(s, 10, change, seed, workers).epoch(e, start)]

    a = batches()
    assert len(a) == 3 and a[0].dtype == torch.uint8 and a[0].shape == (10, 3, 16, 16)
    assert same(a, batches(workers=2)) and same(a[1:], batches(start=1))
    assert not torch.equal(a[0], batches(seed=1)[0]) and not torch.equal(a[0], batches(e=1)[0])
    (x, y), i = next(LabelledLoader(s, 10, change).epoch(0))
    assert torch.equal(y, s.labels[i])


@pytest.mark.parametrize('crop', ['pad', 'rrc', 'none'])
def test_augmentation_takes_any_size(crop):
    change = finetune_augmentation(
        FinetuneConfig(crop=crop, rand_augment='rand-m9-mstd0.5-inc1'), 16, torch.tensor([0.5] * 3)
    )
    for shape in ((3, 16, 16), (3, 20, 31)):
        x = change(torch.randint(0, 256, shape, dtype=torch.uint8))
        assert x.shape == (3, 16, 16) and x.dtype == torch.uint8


def test_rand_augment_at_full_strength():
    "timm asks Pillow for 0 bits here, which Pillow 13 refuses."
    change = finetune_augmentation(
        FinetuneConfig(rand_augment='rand-m10-n15-p1-inc1'), 16, torch.tensor([0.5] * 3)
    )
    for i in range(20):
        with seeded(i):
            change(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8))


def test_pictures():
    fig = show_augmented(colours(20), aps_finetune_config(), 16, n=4)
    assert len(fig.axes) == 5 * 4
    with pytest.raises(ValueError, match='n must be .* got 3'):
        show_augmented(colours(20), aps_finetune_config(), 16, n=3)
    row = dict(epoch=1, loss=1.0, lr=0.1, top1=None)
    assert len(plot_finetune(dict(a=[row])).axes) == 2  # no panel without a curve
    assert len(plot_finetune(dict(a=[row | dict(top1=0.5)])).axes) == 3


# ---------------------------------------------------------------- model and groups
def by_name(model, config):
    opt = finetune_optimizer(model, config)
    groups = {id(p): g for g in opt.param_groups for p in g['params']}
    assert (
        len(groups)
        == sum(len(g['params']) for g in opt.param_groups)
        == len(list(model.parameters()))
    )  # each weight once
    return {n: groups[id(p)] for n, p in model.named_parameters()}, opt


def test_decay_spares_vectors_tokens_and_positions():
    groups, opt = by_name(Classifier(net(), 3), quick)
    spared = {n for n, g in groups.items() if g['weight_decay'] == 0}
    assert spared == {
        n
        for n, p in Classifier(net(), 3).named_parameters()
        if p.ndim < 2 or n.endswith(('cls_token', 'pos_embed'))
    }
    assert len(opt.param_groups) == 2 and {g['weight_decay'] for g in opt.param_groups} == {
        0.0,
        0.05,
    }
    groups, opt = by_name(Classifier(net(), 3), replace(quick, decay_all=True))
    assert len(opt.param_groups) == 1 and opt.param_groups[0]['weight_decay'] == 0.05


def test_layer_decay_of_a_vit():
    groups, _ = by_name(Classifier(net(depth=3), 3), replace(quick, layer_decay=0.5, head_lr=10.0))
    scale = {n: g['lr_scale'] for n, g in groups.items()}
    for n, s in scale.items():
        below = (
            0
            if n.startswith('head')
            else 1
            if '.norm.' in n and 'blocks' not in n
            else 3 - int(n.split('.')[3])
            if 'blocks' in n
            else 4
        )
        assert abs(s - 0.5**below * (10.0 if n.startswith('head') else 1.0)) < 1e-12, n


def test_layer_decay_of_a_resnet():
    groups, _ = by_name(
        Classifier(resnet(size=32, width=8), 3), replace(quick, layer_decay=0.5, optimizer='sgd')
    )
    scale = {n: g['lr_scale'] for n, g in groups.items()}
    assert [
        scale[f'encoder.net.{n}']
        for n in (
            'conv1.weight',
            'bn1.bias',
            'layer1.0.conv1.weight',
            'layer1.1.bn2.bias',
            'layer4.1.conv2.weight',
        )
    ] == [0.5**9, 0.5**9, 0.5**8, 0.5**7, 0.5]
    assert scale['head.weight'] == 1.0


def test_other_encoders_are_one_layer():
    class Plain(torch.nn.Module):
        size, dim = 16, 3

        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.lin(x.mean((2, 3)))

    groups, _ = by_name(Classifier(Plain(), 3), replace(quick, layer_decay=0.5))
    assert (
        groups['encoder.lin.weight']['lr_scale'] == 0.5 and groups['head.weight']['lr_scale'] == 1.0
    )
    assert finetune(Plain(), make_data(), quick, progress='quiet').baselines == {}
    with pytest.raises(ValueError, match='no `set_stats`'):
        Classifier(Plain(), 3, stats='imagenet')
    with pytest.raises(ValueError, match='no `.dim`'):
        Classifier(torch.nn.Linear(2, 2), 3)


def test_optimisers_get_their_numbers():
    opt = finetune_optimizer(Classifier(net(), 3), replace(quick, betas=(0.8, 0.95)))
    assert isinstance(opt, torch.optim.AdamW) and opt.param_groups[0]['betas'] == (0.8, 0.95)
    for nesterov in (False, True):
        g = finetune_optimizer(
            Classifier(net(), 3), replace(quick, optimizer='sgd', momentum=0.7, nesterov=nesterov)
        ).param_groups[0]
        assert (g['momentum'], g['nesterov']) == (0.7, nesterov)


def test_classifier():
    encoder = net(variant='moco_v3')
    assert not encoder.net.pos_embed.requires_grad
    a, b = Classifier(encoder, 50), Classifier(encoder, 50, seed=1)
    assert all(p.requires_grad for p in a.parameters()) and not encoder.net.pos_embed.requires_grad
    assert not torch.equal(a.head.weight, b.head.weight) and torch.equal(
        a.head.weight, Classifier(encoder, 50).head.weight
    )
    assert (a.head.weight.std() - 0.02).abs() < 0.004 and a.head.bias.abs().max() == 0
    x = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert torch.allclose(a.eval()(x), encoder.eval()(x).image @ a.head.weight.T, atol=1e-6)
    assert torch.allclose(
        Classifier(encoder, 3, stats='imagenet').encoder.mean, torch.tensor([0.485, 0.456, 0.406])
    )
    deep = Classifier(encoder, 3, drop_path=0.3).encoder
    assert deep.spec['drop_path'] == 0.3 and same(
        dict(deep.state_dict()), dict(encoder.state_dict())
    )
    with pytest.raises(ValueError, match='drop_path must be None for resnet.* got 0.3'):
        Classifier(resnet(size=32, width=8), 3, drop_path=0.3)


# ---------------------------------------------------------------- runs
def test_the_given_encoder_is_untouched():
    encoder = net(variant='moco_v3')
    encoder.net.blocks[0].eval()
    before, modes = (
        {k: v.clone() for k, v in encoder.state_dict().items()},
        [m.training for m in encoder.modules()],
    )
    run = tuner(wild, encoder).fit()
    assert (
        same(before, dict(encoder.state_dict()))
        and modes == [m.training for m in encoder.modules()]
        and all(p.grad is None for p in encoder.parameters())
    )
    assert not torch.equal(run.encoder.net.pos_embed, encoder.net.pos_embed)


def test_same_seed_same_run_whatever_the_workers():
    a = tuner(wild).fit()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert same(state(a), state(tuner(wild, workers=2).fit()))
    assert not same(state(a), state(tuner(wild, seed=1).fit()))


@pytest.mark.parametrize('bf16', [False, True])
def test_resumed_is_uninterrupted(tmp_path, bf16):
    whole = tuner(wild, bf16=bf16).fit()
    tuner(wild, bf16=bf16, out=tmp_path / 'r').fit(2)
    resumed = tuner(wild, bf16=bf16, out=tmp_path / 'r', resume=True).fit()
    assert same(state(whole), state(resumed)) and torch.equal(whole.predict(), resumed.predict())
    rows = (tmp_path / 'r' / 'metrics.csv').read_text().splitlines()
    assert (
        rows[0].split(',') == ['epoch', 'batches', 'loss', 'lr', 'seconds', 'top1']
        and len(rows) == 4
    )
    assert [r.split(',')[-1] != '' for r in rows[1:]] == [False, False, True]
    assert (
        json.loads((tmp_path / 'r' / 'config.json').read_text())['finetune_config']['grad_clip']
        == 1.0
    )


def test_interrupted_in_an_epoch_and_resumed(tmp_path):
    whole = tuner(wild).fit()
    run = tuner(wild, out=tmp_path / 'r')
    run.progress = StopAt(run, 4)
    with pytest.raises(KeyboardInterrupt, match='after batch 4 of 9'):
        run.fit()
    assert same(state(whole), state(tuner(wild, out=tmp_path / 'r', resume=True).fit()))


def test_a_checkpoint_belongs_to_one_run(tmp_path):
    tuner(out=tmp_path / 'r').fit(1)
    with pytest.raises(FileExistsError):
        tuner(out=tmp_path / 'r')
    for other in (
        dict(encoder=net(1)),
        dict(config=replace(quick, lr=1e-3)),
        dict(seed=1),
        dict(data=make_data(51)),
        dict(data=make_data(noise=20.0)),
    ):
        with pytest.raises(ValueError, match='belongs to another run'):
            tuner(out=tmp_path / 'r', resume=True, **other)


def test_a_checkpoint_from_before_the_renaming_is_refused(tmp_path):
    tuner(out=tmp_path / 'r').fit(1)
    old = torch.load(tmp_path / 'r' / 'checkpoint.pt', weights_only=True)
    old['identity']['recipe'] = old['identity'].pop('finetune_config')
    torch.save(old, tmp_path / 'r' / 'checkpoint.pt')
    with pytest.raises(ValueError, match='earlier version.*cannot be resumed.*open_encoder'):
        tuner(out=tmp_path / 'r', resume=True)


def test_settings_of_an_old_record():
    "A record of before, with the names that fields had then, gives the same config."
    r = finetune(
        net(), make_data(), wild, baselines=False, progress='quiet', device='cpu', bf16=False
    )
    assert config_of(r) == wild
    for new, old in (('warmup_epochs', 'warmup'), ('grad_clip', 'clip')):
        r.settings[old] = r.settings.pop(new)
    assert config_of(r) == wild


def test_a_loss_that_is_no_number_stops(tmp_path):
    run = tuner(replace(quick, lr=1e30), out=tmp_path / 'r')
    with pytest.raises(FloatingPointError, match='is not finite.*learning rate'):
        run.fit()
    assert not (tmp_path / 'r' / 'checkpoint.pt').exists()


def test_batch_is_at_most_the_set():
    assert tuner(replace(quick, batch_size=100)).config.batch_size == 48
    assert settle_batch(replace(quick, mixup=0.8, batch_size=100), 7).batch_size == 6
    run = tuner(replace(wild, batch_size=100), data=make_data(7)).fit()
    assert run.batches == 3 and run.config.batch_size == 6


def test_learns_colours():
    run = tuner(FinetuneConfig(epochs=8, batch_size=16, lr=3e-3, crop='pad')).fit()
    assert run.history[-1]['top1'] > 0.9
    small = resnet(size=16, stem='half', width=8)
    assert (
        tuner(semi_supervised_config(0.1, batch_size=16, lr=0.02, head_lr=10.0), encoder=small)
        .fit()
        .history[-1]['top1']
        > 0.8
    )


def test_clip_bounds_the_step():
    "SGD without momentum: a step is as long as the clipped gradient times the rate."
    r = FinetuneConfig(
        epochs=1,
        batch_size=48,
        optimizer='sgd',
        momentum=0.0,
        lr=1.0,
        weight_decay=0.0,
        grad_clip=1e-3,
    )
    run = tuner(r)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.fit()
    moved = torch.stack([(p - b).norm() for p, b in zip(run.model.parameters(), before)]).norm()
    assert abs(moved - 1e-3) < 1e-5


# ---------------------------------------------------------------- records
def test_the_last_epoch_is_reported_not_the_best(tmp_path):
    "The rate explodes after three epochs: the best epoch is over."
    r = FinetuneConfig(epochs=4, batch_size=16, lr=3e-3, schedule='steps', drops=(3,), drop_to=1e3)
    run = tuner(r, watch=True).fit()
    top1 = [h['top1'] for h in run.history]
    assert max(top1) > top1[-1] + 0.2
    kw = dict(baselines=False, progress='quiet', device='cpu', bf16=False)
    assert (
        finetune(net(), make_data(), r, **kw).value
        == finetune(net(), make_data(), r, watch=True, **kw).value
        == top1[-1]
    )
    assert [h['top1'] for h in tuner(r).fit().history] == [None] * 3 + top1[-1:]


def test_record(tmp_path):
    data, kw = make_data(classes=6, n=60, m=60), dict(progress='quiet', device='cpu', bf16=False)
    r = finetune(net(1), data, quick, name='mine', out=tmp_path, **kw)
    assert (r.protocol, r.metric, r.layer, r.encoder, r.n_train, r.n_test, r.n_classes, r.seed) == (
        'fine-tuning',
        'top-1',
        'image',
        'mine',
        60,
        60,
        6,
        0,
    )
    assert (
        abs(r.chance - 1 / 6) < 1e-6
        and list(r.baselines) == ['from scratch']
        and r.seconds > 0
        and r.hardware
    )
    assert r.per_image().mean().item() == pytest.approx(r.value) and len(r.per_image()) == 60
    assert load_records(tmp_path) == [r] and config_of(load_records(tmp_path)[0]) == quick
    assert set(r.chosen) == {'top-5', 'top-5 from scratch'} and r.chosen['top-5'] >= r.value
    assert r.settings['reported'] == 'last weights' and r.settings['size'] == 16
    # the same start as the baseline: it is the baseline, and has none of its own
    again = finetune(net(1).reinitialized(0), data, quick, seed=0, **kw)
    assert again.value == r.baselines['from scratch'] and not again.baselines
    assert 'fine-tuning' in table([r])


def test_scratch_is_random_weights_and_remembered(monkeypatch):
    data, kw = make_data(), dict(progress='quiet', device='cpu', bf16=False)
    a = finetune(net(3), data, quick, seed=2, **kw)
    assert (
        a.baselines['from scratch']
        == finetune(net(3).reinitialized(2), data, quick, seed=2, baselines=False, **kw).value
    )
    fits = []
    monkeypatch.setattr(
        FineTuner,
        'run_epochs',
        lambda self, f=FineTuner.run_epochs: (fits.append(self.name), f(self))[1],
    )
    assert finetune(net(4), data, quick, seed=2, **kw).baselines == a.baselines and fits == [
        'encoder'
    ]
    finetune(net(4), data, replace(quick, lr=1e-3), seed=2, **kw)
    assert fits == ['encoder', 'encoder', 'from scratch']


def test_average_of_the_weights_is_reported_where_it_is_asked_for():
    r = replace(quick, ema=0.9)
    run = tuner(r).fit()
    rec = finetune(
        net(), make_data(), r, baselines=False, progress='quiet', device='cpu', bf16=False
    )
    right = lambda m: (run.predict(m).argmax(1) == run.test.labels).float().mean().item()
    assert rec.value == pytest.approx(right(run.ema.module)) and rec.chosen[
        'top-1 without EMA'
    ] == pytest.approx(right(run.model))
    assert rec.settings['reported'] == 'average of the weights' and rec.settings['ema'] == 0.9
    assert not torch.equal(run.ema.module.head.weight, run.model.head.weight)


def test_semi_supervised(folder):
    kw = dict(progress='quiet', device='cpu', bf16=False)
    data = make_data(n=300)
    r = semi_supervised(net(), data, 0.1, config=quick, **kw)
    assert (r.protocol, r.n_train, r.n_test, r.n_classes) == ('semi-supervised 10 %', 30, 30, 3)
    assert '30 of 300 labels: 10 images in each of 3 classes' in r.note and r.note.startswith(
        'the label is a colour'
    )
    assert (r.settings['fraction'], r.settings['subset_seed']) == (0.1, 0) and config_of(r) == quick
    part = ImageData(label_fraction(data.train, 0.1), data.test, data.name)
    assert r.value == finetune(net(), part, quick, baselines=False, **kw).value
    assert (
        semi_supervised(net(), data, 0.1, config=quick, baselines=False, seed=1, **kw).settings
        == r.settings
    )  # another seed, the same images
    one = semi_supervised(net(), data, baselines=False, **kw)
    assert one.protocol == 'semi-supervised 1 %' and config_of(one) == replace(
        semi_supervised_config(0.01), batch_size=3
    )


def test_semi_supervised_from_a_list(folder):
    "A class that the list leaves out stays a class; its test images count, as errors."
    data = images(folder, labelled=True)
    r = semi_supervised(
        net(),
        data,
        files=['n01_0.png', 'n01_1.png', 'n02_1.png'],
        config=quick,
        baselines=False,
        progress='quiet',
    )
    assert (r.protocol, r.n_classes, r.n_train, r.n_test) == ('semi-supervised, listed', 3, 3, 10)
    assert (
        '3 of 12 labels: 1 to 2 images in each of 2 classes' in r.note
        and '2 test images are of classes without a training image' in r.note
    )
    with pytest.raises(ValueError, match='one class'):
        semi_supervised(
            net(), data, files=['n01_0.png', 'n01_1.png'], config=quick, progress='quiet'
        )


def test_classes_of_test_alone_are_counted():
    data = ImageData(colours(48, 1, classes=4, skip=(3,)), colours(32, 2, classes=4), 'colours')
    r = finetune(
        net(),
        data,
        FinetuneConfig(epochs=6, batch_size=16, lr=3e-3),
        baselines=False,
        progress='quiet',
    )
    assert r.n_classes == 4 and '8 test images are of classes without a training image' in r.note
    assert r.per_image()[data.test.labels == 3].mean() < 0.2


def test_copies_of_test_images(tmp_path):
    data = make_data()
    leaky = ImageData(
        TensorImages(
            torch.cat([data.train.images, data.test.images[:6]]),
            torch.cat([data.train.labels, data.test.labels[:6]]),
        ),
        data.test,
        'leaky',
    )
    kw = dict(baselines=False, progress='quiet')
    with pytest.raises(ValueError, match='6 of 30 test images are in the train split'):
        finetune(net(), leaky, quick, **kw)
    dropped, kept = (finetune(net(), leaky, quick, overlap=o, **kw) for o in ('drop', 'keep'))
    assert (
        (dropped.n_train, kept.n_train) == (48, 54)
        and 'left out there' in dropped.note
        and 'kept' in kept.note
    )
    with pytest.raises(ValueError, match='overlap must be'):
        finetune(net(), leaky, quick, overlap='no', **kw)


def test_checkpoints_of_a_record(tmp_path):
    kw = dict(progress='quiet', device='cpu', bf16=False, checkpoints=tmp_path)
    r = finetune(net(1), make_data(), quick, **kw)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['encoder', 'from scratch']
    with pytest.raises(FileExistsError):
        finetune(net(1), make_data(), quick, **kw)
    again = finetune(net(1), make_data(), quick, resume=True, **kw)
    assert (again.value, again.baselines, again.each) == (r.value, r.baselines, r.each)


@pytest.mark.parametrize(
    'data, says',
    [
        (lambda: ImageData(colours(9), None, 'x'), 'no test split'),
        (
            lambda: ImageData(TensorImages(colours(9).images), colours(9, 1), 'x'),
            'train split has no labels',
        ),
        (
            lambda: ImageData(colours(9), TensorImages(colours(9, 1).images), 'x'),
            'test split has no labels',
        ),
        (lambda: ImageData(colours(9, classes=1), colours(9, 1), 'x'), 'only one class'),
        (lambda: colours(9), 'data must be what images'),
    ],
)
def test_data_that_do_not_fit(data, says, monkeypatch):
    monkeypatch.setattr(FineTuner, 'run_epochs', lambda *a: pytest.fail('work began'))
    for protocol in (finetune, semi_supervised):
        with pytest.raises(ValueError, match=says):
            protocol(net(), data(), config=quick, progress='quiet')


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match='resize must be .* got 8'):
        tuner(resize=8)
    with pytest.raises(ValueError, match='progress'):
        tuner(progress='loud')
    with pytest.raises(ValueError, match='cpu always can'):
        tuner(device='cuda:99')


def test_resize_before_the_cut():
    data = ImageData(colours(48, size=24), colours(30, 1, size=24), 'large')
    r = finetune(net(), data, quick, baselines=False, resize=18, progress='quiet')
    assert r.settings['resize'] == 18
    assert not torch.equal(
        tuner(data=data, resize=18).fit().predict(), tuner(data=data).fit().predict()
    )


def test_matchers_name_every_weight_of_the_encoder():
    import re

    for e in (net(), resnet(size=32, width=8)):
        patterns = [
            p
            for v in layers_of(e).values()
            for p in ([v] if isinstance(v, str) else [q for q, _ in v])
        ]
        assert all(
            any(re.match(p, n) for p in patterns)
            for n, _ in Classifier(e, 3).named_parameters()
            if n.startswith('encoder')
        )
    assert {f.name for f in fields(FinetuneConfig)} >= {'layer_decay', 'head_lr'}


def test_fields_of_the_recipe_are_arguments_too(tmp_path):
    """finetune(..., lr=1e-3) changes the recipe; a batch given so scales the published rate;
    unknown names are told."""
    r = finetune(
        net(),
        make_data(),
        quick,
        epochs=1,
        lr=1e-3,
        baselines=False,
        progress='quiet',
        device='cpu',
        bf16=False,
    )
    assert (r.settings['epochs'], r.settings['lr'], r.settings['batch_size']) == (1, 1e-3, 16)
    r = finetune(
        net(),
        make_data(),
        'small',
        epochs=1,
        warmup_epochs=0,
        batch_size=16,
        baselines=False,
        progress='quiet',
        device='cpu',
        bf16=False,
    )
    assert (
        r.settings['lr'] == aps_finetune_config('small', batch_size=16).lr
        and r.settings['epochs'] == 1
    )
    s = semi_supervised(
        net(),
        make_data(),
        0.5,
        epochs=1,
        batch_size=8,
        baselines=False,
        progress='quiet',
        device='cpu',
        bf16=False,
    )
    assert s.settings['epochs'] == 1
    with pytest.raises(ValueError, match="has no option 'lrr'"):
        finetune(net(), make_data(), quick, lrr=1)
    with pytest.raises(ValueError, match='large'):
        finetune(net(), make_data(), 'large')


# ---------------------------------------------------------------- guards
class Plain(torch.nn.Module):
    "A module from elsewhere: no `trained_on`, no `spec`, no `reinitialized`."

    size, dim = 16, 3

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.lin(x.mean((2, 3)))


def leaky(n=6):
    data = make_data()
    both = TensorImages(
        torch.cat([data.train.images, data.test.images[:n]]),
        torch.cat([data.train.labels, data.test.labels[:n]]),
        data.classes,
    )
    return ImageData(both, data.test, 'leaky')


def test_a_tuner_refuses_test_images_itself(tmp_path):
    with pytest.raises(ValueError, match='6 of 30 test images are in the train split'):
        tuner(data=leaky(), out=tmp_path / 'r')
    assert not (tmp_path / 'r').exists()
    with pytest.raises(ValueError, match='overlap must be'):
        tuner(overlap='no')
    a, b = tuner(data=leaky(), overlap='drop'), tuner(data=leaky(), overlap='keep')
    assert (len(a.train), len(b.train)) == (48, 54) and 'left out' in a.leak and 'kept' in b.leak
    assert same(
        state(a.fit())['model'], state(tuner().fit())['model']
    )  # the same images, the same run
    with pytest.raises(ValueError, match='no labels|one class'):
        tuner(data=ImageData(make_data().test, make_data().test, 'x'), overlap='drop')
    kw = dict(progress='quiet', device='cpu', bf16=False, baselines=False)
    assert [
        finetune(net(), leaky(), quick, overlap=o, **kw).settings['overlap']
        for o in ('drop', 'keep')
    ] == ['drop', 'keep']
    assert 'overlap' not in finetune(net(), make_data(), quick, overlap='drop', **kw).settings


def test_what_was_learned_from_is_known_afterwards(tmp_path):
    data, other, encoder = make_data(), colours(20, 9), net()
    encoder.trained_on = other.fingerprints()
    run = tuner(replace(quick, epochs=1, drop_path=0.1), encoder, data, out=tmp_path / 'r').fit()
    learned = run.encoder.trained_on
    assert (
        learned.shape == (68, 2)
        and is_in(data.train.fingerprints(), learned).all()
        and is_in(other.fingerprints(), learned).all()
    )
    assert not is_in(data.test.fingerprints(), learned).any() and torch.equal(
        encoder.trained_on, other.fingerprints()
    )
    assert torch.equal(torch.load(tmp_path / 'r' / 'checkpoint.pt')['trained_on'], learned)
    swapped = ImageData(data.test, data.train, 'swapped')
    with pytest.raises(ValueError, match='trained on 48 of 48 test images'):
        knn(run.encoder, swapped, k=3)
    with pytest.raises(ValueError, match='trained on 48 of 48 test images'):
        tuner(quick, run.encoder, swapped)
    r = finetune(
        run.encoder, swapped, quick, overlap='keep', baselines=False, progress='quiet', device='cpu'
    )
    assert 'trained on 48 of the test images' in r.note and 48 in r.settings.values()
    assert (
        encoder.trained_on.shape == (20, 2)
        and is_in(
            data.train.fingerprints(), tuner(replace(quick, ema=0.9)).reported.encoder.trained_on
        ).all()
    )


def test_a_module_from_elsewhere(tmp_path):
    run = tuner(encoder=Plain(), out=tmp_path / 'r').fit()
    assert is_in(run.train.fingerprints(), run.encoder.trained_on).all() and not hasattr(
        Plain(), 'trained_on'
    )
    r = finetune(Plain(), make_data(), quick, checkpoints=tmp_path / 'c', progress='quiet')
    assert r.baselines == {} and (tmp_path / 'c' / 'encoder' / 'checkpoint.pt').is_file()


def test_default_device_is_where_the_encoder_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert FineTuner(net(), make_data(), quick, progress='quiet', bf16=False).device == 'cpu'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_default_device_is_the_gpu_of_the_encoder():
    assert (
        FineTuner(net().cuda(), make_data(), quick, progress='quiet')
        .fit(1)
        .device.startswith('cuda')
    )


@pytest.mark.parametrize('protocol', [finetune, semi_supervised])
@pytest.mark.parametrize(
    'says, kw',
    [
        ('config must be .* got 5', dict(config=5)),
        ("config must be .* got 'large'", dict(config='large')),
        ('config must be .* got', dict(config=['tiny'])),
        ('betas must be .* got 0.9', dict(betas=0.9)),
        ('drops must be .* got 5', dict(drops=5)),
        ('momentum must be .* got None', dict(momentum=None)),
        ('resize must be .* got 1.5', dict(resize=1.5)),
        ("has no option 'style'", dict(style='simclr')),
        ('encoder', dict(encoder=None)),
    ],
)
def test_wrong_types_name_the_argument_before_work(protocol, says, kw, monkeypatch):
    monkeypatch.setattr(FineTuner, 'run_epochs', lambda *a: pytest.fail('work began'))
    kw = dict(kw)
    encoder = kw.pop('encoder', net())
    with pytest.raises(ValueError, match=says):
        protocol(encoder, make_data(), progress='quiet', **kw)


def test_a_tuner_names_what_is_wrong():
    for says, args in (
        ('encoder', (None, make_data(), quick)),
        ('config must be .* got 5', (net(), make_data(), 5)),
        ('data', (net(), 'photos', quick)),
    ):
        with pytest.raises(ValueError, match=says):
            FineTuner(*args)


def test_recipes_by_name():
    kw = dict(progress='quiet', device='cpu', bf16=False, baselines=False, epochs=1, batch_size=8)
    r = semi_supervised(net(), make_data(n=300), 0.1, config='simclr', **kw)
    assert config_of(r) == replace(semi_supervised_config(0.1, 'simclr', 8), epochs=1)
    assert (
        config_of(
            semi_supervised(net(), make_data(n=300), 0.1, config='instdisc', drops=(1,), **kw)
        ).lr
        == semi_supervised_config(0.1, batch_size=8).lr
    )


def test_one_percent_is_the_recipe_of_one_percent():
    """7 images in each of 7 classes: one of each is 14 %, and the recipe is that of the 1 % which
    was asked for."""
    r = semi_supervised(
        net(),
        make_data(n=49, m=28, classes=7),
        0.01,
        baselines=False,
        progress='quiet',
        device='cpu',
        bf16=False,
    )
    assert r.n_train == 7 and config_of(r) == replace(
        semi_supervised_config(0.01), batch_size=7
    ) != replace(semi_supervised_config(0.1), batch_size=7)


def test_folders_are_made_before_work(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('x')
    tuner(out=tmp_path / 'c' / 'from scratch').fit(1)
    kw = dict(progress='quiet', device='cpu', bf16=False)
    monkeypatch.setattr(FineTuner, 'run_epochs', lambda *a: pytest.fail('work began'))
    with pytest.raises((ValueError, OSError), match='file'):
        finetune(net(1), make_data(), quick, out=tmp_path / 'file', **kw)
    with pytest.raises(FileExistsError, match='from scratch'):
        finetune(net(1), make_data(), quick, checkpoints=tmp_path / 'c', **kw)


def test_a_record_says_what_it_was_made_of():
    data, kw = make_data(), dict(progress='quiet', device='cpu', bf16=False, baselines=False)
    r, k = finetune(net(), data, quick, **kw), knn(net(), data, k=3, baselines=False)
    assert (r.images, r.versions, r.architecture) == (k.images, k.versions, k.architecture) and set(
        r.images
    ) == {'train', 'test'}
    assert finetune(net(), make_data(noise=20.0), quick, **kw).images != r.images

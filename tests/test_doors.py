"The same encoder on the same data, through every door: equal settings give an equal value."

import json

import numpy as np
import pytest
import torch
from PIL import Image
from ssl_patch.commands.probe import Probe, protocols
from ssl_patch.data.sources import images
from ssl_patch.evaluation.embeddings import show_embedding
from ssl_patch.evaluation.features import eval_resize, extract
from ssl_patch.evaluation.knn import knn
from ssl_patch.evaluation.linear import linear_probe_cached
from ssl_patch.evaluation.linear_probe import linear_probe
from ssl_patch.evaluation.logistic import logistic
from ssl_patch.evaluation.mistakes import knn_curves
from ssl_patch.evaluation.protocol import random_twin
from ssl_patch.evaluation.records import Record, table
from ssl_patch.evaluation.retrieval import retrieval
from ssl_patch.evaluation.svm import svm
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.files import open_encoder
from ssl_patch.reports.compare import compare
from ssl_patch.transfer.few_labels import finetune, semi_supervised
from toys import Net, learned, make_data

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "A folder of photographs that are not square: what is cut changes what is seen."
    root, r = tmp_path_factory.mktemp('pics'), np.random.default_rng(0)
    for part, n in (('train', 12), ('test', 8)):
        for c in range(3):
            for i in range(n):
                a = r.normal(128, 40, (36, 52, 3))
                a[:, :8] += 25 * c
                a[10:24, 15:30] -= 20 * c
                p = root / part / str(c) / f'{i}.png'
                p.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(p)
    return root


SETTINGS = dict(
    knn=dict(k=5),
    linear=dict(epochs=3),
    linear_probe=dict(epochs=1, views=1),
    logistic=dict(wds=[1.0], max_iter=5),
    svm=dict(),
    retrieval=dict(k=5, metric='R@5'),
    finetune=dict(epochs=1, warmup_epochs=0, batch_size=18, progress='quiet'),
    semi_supervised=dict(fraction=0.5, epochs=1, batch_size=9, progress='quiet'),
)
PYTHON = dict(
    knn=knn,
    linear=linear_probe_cached,
    linear_probe=linear_probe,
    logistic=logistic,
    svm=svm,
    retrieval=retrieval,
    finetune=finetune,
    semi_supervised=semi_supervised,
)


def opened():
    return open_encoder('torchvision/resnet18', size=32, pretrained=False)


def test_every_protocol_is_a_door():
    of_clips = {'video_linear', 'video_finetune', 'video_retrieval'}  # see test_video.py
    assert set(protocols) - of_clips == set(SETTINGS) == set(PYTHON)


@pytest.mark.parametrize('protocol', SETTINGS)
def test_python_and_shell_measure_alike(protocol, pictures):
    settings = SETTINGS[protocol]
    words = tuple(f'{protocol}.{k}={v}' for k, v in settings.items())
    how = dict(encoder='torchvision/resnet18', random=True, size=32, device='cpu')
    shell = Probe(
        **how, data=str(pictures), protocols=(protocol,), settings=words, baselines=False
    ).measure()[0]
    encoder = opened()
    python = PYTHON[protocol](encoder, images(pictures), baselines=False, **settings)
    as_json = lambda r: json.loads(json.dumps(r.settings))
    assert encoder.resize == 36 and python.settings['resize'] == 36
    assert as_json(shell) == as_json(python)
    assert (shell.value, shell.each) == (python.value, python.each)
    assert shell.images == python.images and shell.metric == python.metric


def test_another_side_before_the_cut_is_another_setting(pictures):
    encoder, data = opened(), images(pictures)
    (usual, _), (wide, _) = extract(encoder, data.test), extract(encoder, data.test, resize=32)
    assert torch.equal(usual, extract(encoder, data.test, resize=36)[0])
    assert not torch.equal(usual, wide)
    asked = knn(encoder, data, k=5, resize=32, baselines=False)
    assert asked.settings['resize'] == 32
    double = knn(encoder, data, k=5, size=64, baselines=False)
    assert double.settings['resize'] == 72 == eval_resize(encoder, 64)


def test_a_network_of_ours_has_no_side_of_its_own():
    r = knn(Net(1), make_data(noise=100), k=5, baselines=False)
    assert 'resize' not in r.settings


def test_figures_see_what_protocols_see(pictures):
    encoder, data = opened(), images(pictures)
    r = knn(encoder, data, k=5, T=0.07)
    curves = knn_curves({'net': encoder}, data, [5], 0.07)[0]
    assert float(curves['net'][0][0, 0]) == pytest.approx(r.value)
    assert float(curves['raw pixels'][0][0, 0]) == pytest.approx(r.baselines['raw pixels'])
    show_embedding(encoder, data, n=20)


def test_a_random_network_has_no_twin(pictures):
    encoder, data = opened(), images(pictures)
    assert set(knn(encoder, data, k=5, seed=3).baselines) == {'raw pixels'}  # its card says seed 0
    trained = opened()
    with torch.no_grad():
        next(trained.parameters()).mul_(2)
    assert set(knn(trained, data, k=5).baselines) == {'raw pixels', 'random encoder'}
    ours = vit('tiny', size=32, patch=8, width=16, depth=1, heads=2).reinitialized(4)
    assert random_twin(ours, 4) is None and random_twin(ours, 0) is not None
    assert 'random encoder' not in knn(ours, data, k=5, seed=4).baselines
    for fresh in (vit('tiny', 32, 8, width=16, depth=1, heads=2), resnet('resnet18', 32, width=8)):
        assert set(knn(fresh, data, k=5).baselines) == {'raw pixels'}
        assert set(knn(fresh.at_size(64), data, k=5).baselines) == {'raw pixels'}
        assert set(knn(learned(fresh), data, k=5).baselines) == {'raw pixels', 'random encoder'}


def test_the_shell_prints_the_unit_of_compare(pictures, tmp_path, capsys):
    run = tmp_path / 'net_seed0'
    Probe(
        encoder='torchvision/resnet18',
        random=True,
        size=32,
        data=str(pictures),
        protocols=('knn',),
        settings=('knn.k=5',),
        baselines=False,
        device='cpu',
        out=str(run),
        name='net',
    ).go()
    said = capsys.readouterr().out
    theirs = compare(run, draws=10).table
    cells = lambda text: [
        [c.strip() for c in line.split('|')[1:3]]
        for line in text.splitlines()
        if line.startswith(('| net', '| chance', '| top-1'))
    ]
    assert sorted(cells(said)) == sorted(cells(theirs)) and ['top-1, %', 'kNN'] in cells(said)
    number = next(c for n, c in cells(said) if n == 'net')
    assert f'kNN top-1 {number} %' in said


def majority():
    "60 and 48 images of 5 very unequal classes, and an encoder to which all look alike."
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (108, 3, 16, 16), dtype=torch.uint8, generator=g)
    y = [n for n, k in enumerate((40, 8, 6, 3, 3)) for _ in range(k)]
    v = [n for n, k in enumerate((30, 10, 5, 2, 1)) for _ in range(k)]

    class Blind(torch.nn.Module):
        size = 16

        def forward(self, x):
            return torch.ones(len(x), 4)

    return Blind(), images((x[:60], torch.tensor(y)), (x[60:], torch.tensor(v)))


ASKED = dict(
    knn=dict(k=60, T=100.0),
    linear=dict(epochs=5),
    linear_probe=dict(epochs=2, views=1),
    logistic=dict(wds=[1.0], max_iter=5),
)


@pytest.mark.parametrize('protocol', ASKED)
def test_mean_per_class_is_what_it_says(protocol):
    blind, data = majority()
    ask = lambda **how: PYTHON[protocol](blind, data, baselines=False, **ASKED[protocol], **how)
    r = ask(metric='mean per class')
    assert (r.metric, r.value, r.chance) == ('mean per class', pytest.approx(0.2), 0.2)
    top = ask()
    assert (top.metric, top.value) == ('top-1', pytest.approx(0.625))
    assert top.chance == pytest.approx(0.625)


@pytest.mark.parametrize('protocol', SETTINGS)
@pytest.mark.parametrize(
    'odd',
    [
        dict(metric='banana'),
        dict(chance=lambda *_: 0.0),
        dict(check=lambda *_: dict(trained='never')),
        dict(least=0),
        dict(protocol='kNN'),
        dict(with_network=True),
        dict(train_features=False),
        dict(settings={}),
        dict(score=None),
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_nothing_reaches_a_record_that_is_not_computed(protocol, odd):
    with pytest.raises(ValueError, match=next(iter(odd))):
        PYTHON[protocol](Net(1), make_data(), **odd)


@pytest.mark.parametrize('protocol', ['knn', 'linear', 'linear_probe'])
def test_targets_are_for_protocols_that_take_them(protocol):
    data = make_data()
    targets = tuple(torch.zeros(len(s), 2).long() for s in (data.train, data.test))
    with pytest.raises(ValueError, match='targets'):
        PYTHON[protocol](Net(1), data, targets=targets)


def test_a_table_in_per_cent_holds_the_same_numbers():
    r = Record('kNN', 0.4567, 'e', 'd', 0.25, baselines={'raw pixels': 0.5})
    rows = lambda t: [line.split('|')[2].strip() for line in t.splitlines() if line[:2] == '| ']
    assert rows(table([r])) == ['kNN', '0.500', '0.457', '0.250']
    assert rows(table([r], percent=True)) == ['kNN', '50.0', '45.7', '25.0']

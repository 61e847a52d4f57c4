"What every evaluation checks, refuses and writes into its record."

from dataclasses import replace
import pytest
import torch
from torch import nn
from ssl_patch.data.images import ImageData, TensorImages
from ssl_patch.models.encoders import vit
from ssl_patch.evaluation.records import load_records, table
from ssl_patch.evaluation.metrics import (
    accuracy,
)
from ssl_patch.evaluation.protocol import evaluate
from ssl_patch.evaluation.features import extract, RawPixels
from ssl_patch.evaluation.linear import fit_linear, linear_probe_cached, standardise
from ssl_patch.evaluation.knn import knn, knn_predict
from toys import Net, make_images, make_data, brute, learned


def test_knn_record_holds_the_same_protocol_on_its_baselines():
    data, net = make_data(noise=250), Net(4)
    r = knn(net, data, k=7, T=0.2, name='online', seed=3)

    def direct(enc):
        (x, y), (u, v) = extract(enc, data.train), extract(enc, data.test)
        return float((brute(u, x, y, 7, 0.2, 3) == v).float().mean())

    all_four = (
        direct(net),
        direct(Net(3)),
        direct(Net(0)),
        direct(RawPixels(8, data.mean, data.std)),
    )
    assert len(set(all_four)) == 4  # so that a mix-up would show
    assert r.value == pytest.approx(direct(net)) and r.baselines['random encoder'] == pytest.approx(
        direct(Net(3))
    )
    assert r.baselines['raw pixels'] == pytest.approx(direct(RawPixels(8, data.mean, data.std)))
    assert (r.protocol, r.encoder, r.layer, r.seed, r.data, r.note) == (
        'kNN',
        'online',
        'image',
        3,
        'colours',
        'the label is a colour',
    )
    assert (r.n_train, r.n_test, r.n_classes, r.settings['k'], r.settings['T']) == (
        60,
        30,
        3,
        7,
        0.2,
    ) and r.chance == pytest.approx(1 / 3)


def test_measured_twice_gives_the_same_record():
    same = lambda a, b: replace(a, seconds=0.0) == replace(b, seconds=0.0)
    assert same(knn(Net(), make_data(), k=5), knn(Net(), make_data(), k=5))
    assert same(
        linear_probe_cached(Net(), make_data(), epochs=3),
        linear_probe_cached(Net(), make_data(), epochs=3),
    )


def test_linear_record_is_the_last_epoch_of_the_plain_fit():
    data, net = make_data(noise=120), Net(4)
    (x, y), (u, v) = extract(net, data.train), extract(net, data.test)
    x, u = standardise(x, u)
    assert linear_probe_cached(net, data, epochs=4, seed=2, baselines=False).value == accuracy(
        fit_linear(x, y, 3, epochs=4, seed=2)(u).argmax(1), v
    )


def test_other_channel_statistics_are_another_baseline():
    data, enc = (
        make_data(noise=120, size=16),
        learned(vit('tiny', 16, 8, width=16, depth=1, heads=2)),
    )
    a = knn(enc, data, k=5).baselines
    enc.set_stats(torch.full((3,), 3.0), torch.tensor([0.01, 1.0, 9.0]))
    assert (
        knn(enc, data, k=5).baselines['random encoder']
        == knn(enc.reinitialized(0), data, k=5, baselines=False).value
        != a['random encoder']
    )


def test_patch_layer_is_probed_and_raw_pixels_stay_pixels():
    data, enc = (
        make_data(noise=200, size=16),
        vit('tiny', 16, 8, width=16, depth=1, heads=2).reinitialized(1),
    )
    r = knn(enc, data, k=5, layer='patch_mean')
    (x, y), (u, v) = (
        extract(enc, data.train, layer='patch_mean'),
        extract(enc, data.test, layer='patch_mean'),
    )
    assert r.value == accuracy(knn_predict(u, x, y, 5), v) != knn(enc, data, k=5).value
    assert (
        r.layer == 'patch_mean'
        and r.baselines['raw pixels'] == knn(enc, data, k=5).baselines['raw pixels']
    )


def test_a_module_that_cannot_be_made_anew_has_raw_pixels_only():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert list(knn(net, make_data(), k=5, size=8).baselines) == ['raw pixels']


def test_chance_is_the_majority_of_the_test_set_and_unlabelled_images_are_left_out():
    data = make_data()
    data.test.labels[:] = torch.tensor([0] * 18 + [1] * 6 + [-1] * 6)
    data.train.labels[:10] = -1
    r = knn(Net(), data, k=5)
    assert r.chance == pytest.approx(0.75) and (r.n_train, r.n_test) == (50, 24)


def test_a_class_only_in_test_counts_as_wrong():
    data = make_data(noise=5)
    data.test.labels[:] = torch.where(data.test.labels == 2, 3, data.test.labels)
    assert (
        knn(Net(), data, k=5, baselines=False).value
        == pytest.approx(2 / 3)
        == linear_probe_cached(Net(), data, baselines=False).value
    )


def no_test(d):
    d.test = None


def no_labels(d):
    d.train.labels = None


def no_test_labels(d):
    d.test.labels[:] = -1


def one_class(d):
    d.train.labels[:] = 1


@pytest.mark.parametrize(
    'spoil,args,word',
    [
        (no_test, {}, 'no test split'),
        (no_labels, {}, 'no labels'),
        (no_test_labels, {}, 'no labels'),
        (one_class, {}, 'one class'),
        (None, dict(k=61), 'k must be at most the 60 .* got 61'),
        (None, dict(T=0.0), 'T must be .* got 0.0'),
        (None, dict(layer='last'), 'layer'),
        (None, dict(k=0), 'k must be .* got 0'),
    ],
)
def test_errors_come_before_work(spoil, args, word):
    net, data = Net(), make_data()
    if spoil:
        spoil(data)
    with pytest.raises(ValueError, match=word):
        knn(net, data, **args)
    if spoil:
        with pytest.raises(ValueError, match=word):
            linear_probe_cached(net, data)
    assert net.calls == 0


def test_own_protocol():
    seen = {}

    def score(x, y, u, v, classes):
        seen.update(x=x.shape, u=u.shape, c=classes)
        return 0.5

    r = evaluate(score, Net(), make_data(), 'half', dict(a=1))
    assert (
        seen['c'] == 3
        and r.value == 0.5
        and r.settings['a'] == 1
        and set(r.baselines) == {'raw pixels', 'random encoder'}
    )


def leaky(n=3, noise=90):
    "Data whose last test images are training images."
    data = make_data(noise=noise)
    return ImageData(
        data.train,
        TensorImages(
            torch.cat([data.test.images, data.train.images[:n]]),
            torch.cat([data.test.labels, data.train.labels[:n]]),
        ),
        'planted',
    )


@pytest.mark.parametrize('protocol', [knn, linear_probe_cached])
def test_a_planted_leak_is_refused_before_any_work(protocol):
    data, net = leaky(), Net()
    few = dict(k=5) if protocol is knn else dict(epochs=2)
    with pytest.raises(ValueError, match='3 of 33 test images are in the train split too'):
        protocol(net, data, **few)
    assert net.calls == 0
    with pytest.raises(ValueError, match="overlap must be .* got 'forgive'"):
        protocol(net, data, overlap='forgive', **few)
    kept, dropped = (
        protocol(net, data, overlap=o, baselines=False, **few) for o in ('keep', 'drop')
    )
    assert (kept.n_train, dropped.n_train, kept.n_test, dropped.n_test) == (60, 57, 33, 33)
    assert 'kept' in kept.note and 'left out' in dropped.note


def test_a_leaked_neighbour_is_found_by_knn_where_it_is_kept():
    data, net = leaky(30, noise=200), Net()
    each = knn(net, data, k=1, overlap='keep', baselines=False).per_image()
    assert each[-30:].mean() == 1 and each[:-30].mean() < 1


def test_what_was_pretrained_on_is_not_measured():
    data, net = make_data(), Net()
    net.trained_on = torch.cat([data.train.fingerprints(), data.test.fingerprints()[4:6]])
    for overlap in ('refuse', 'drop'):
        with pytest.raises(ValueError, match='trained on 2 of 30 test images .the first: 4'):
            knn(net, data, k=5, overlap=overlap)
    assert knn(net, data, k=5, overlap='keep', baselines=False).note.endswith(
        'trained on 2 of the test images'
    )


def test_the_record_keeps_what_every_image_got(tmp_path):
    data, net = make_data(noise=90), Net()
    r = knn(net, data, k=5, out=tmp_path)
    (x, y), (u, v) = extract(net, data.train), extract(net, data.test)
    assert (
        torch.equal(r.per_image().bool(), knn_predict(u, x, y, 5, 0.07) == v)
        and abs(r.per_image().mean() - r.value) < 1e-6
    )
    assert load_records(tmp_path) == [r] and r.seconds > 0 and r.hardware
    knn(net, data, k=5, out=tmp_path)
    knn(net, data, k=6, out=tmp_path)
    assert [x.settings['k'] for x in load_records(tmp_path)] == [5, 6]


def test_the_tower_is_named():
    net = vit(size=16, patch=4, width=32, depth=1, heads=2)
    data = make_data(size=16)
    assert knn(net, data, k=5, baselines=False).encoder == 'encoder'
    net.tower = 'momentum'
    r = knn(net, data, k=5, baselines=False)
    assert (r.encoder, r.tower) == ('momentum', 'momentum')
    assert 'mine, momentum tower' in str(table([replace(r, encoder='mine')]))
    text = str(
        table([replace(r, encoder='mine'), replace(r, encoder='mine', tower='online', value=0.5)])
    )
    assert 'mine, momentum tower' in text and 'mine, online tower' in text


def test_targets_in_place_of_labels():
    data, g = make_data(labels=False), torch.Generator().manual_seed(0)
    tables = [torch.randint(-1, 2, (len(s), 4), generator=g) for s in (data.train, data.test)]

    def score(x, y, u, v, classes):
        assert torch.equal(y, tables[0]) and torch.equal(v, tables[1]) and classes == 4
        return 0.5

    r = evaluate(score, Net(), data, 'mine', {}, targets=tables, metric='mAP', baselines=False)
    assert (
        r.n_classes == 4
        and abs(r.chance - ((tables[1] == 1).sum(0) / (tables[1] >= 0).sum(0)).mean()) < 1e-6
    )
    none = [
        torch.cat([t, torch.zeros(len(t), 2, dtype=t.dtype)], 1) for t in tables
    ]  # two classes that nothing shows do not count
    assert (
        evaluate(
            lambda *a: 0.5, Net(), data, 'mine', {}, targets=none, metric='mAP', baselines=False
        ).chance
        == r.chance
    )
    for bad, words in (
        (tables[0], 'pair of tensors'),
        (tables[::-1], 'a row for each of its 60 images'),
        ([t * 2 for t in tables], r'must be 1 \(there\)'),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(score, Net(), data, 'mine', {}, targets=bad)


def test_more_classes_in_test_than_in_train_count_as_errors():
    train, test = make_images(60, classes=2, seed=1), make_images(30, classes=3, seed=2)
    for r in (
        knn(Net(), ImageData(train, test, 'more'), k=5, baselines=False),
        linear_probe_cached(Net(), ImageData(train, test, 'more'), epochs=5, baselines=False),
    ):
        assert r.n_classes == 3 and r.per_image()[2::3].sum() == 0


def test_records_of_other_images_are_not_measured_again(tmp_path):
    data, net = make_data(n=60, m=60, noise=120), Net()
    for part in (range(0, 30), range(30, 60)):
        knn(
            net,
            ImageData(data.train, data.test.subset(list(part)), 'colours'),
            k=5,
            baselines=False,
            out=tmp_path,
        )
    assert len(load_records(tmp_path)) == 2
    with open(tmp_path / 'records.jsonl', 'a') as f:
        f.write('{"protocol": "kNN", "val')
    with pytest.raises(ValueError, match='records.jsonl, line 3 is not a record'):
        load_records(tmp_path)


def test_a_leak_that_was_kept_is_seen_in_every_table():
    data, net = leaky(), Net()
    records = [
        knn(net, data, k=5, overlap=o, baselines=False, name=o) for o in ('keep', 'drop')
    ] + [knn(net, make_data(noise=90), k=5, baselines=False, name='clean')]
    text = str(table(records))
    assert '3 test images are in train too: kept' in text and 'left out there' in text
    assert 'overlap=keep' in text.splitlines()[0] and 'overlap=drop' in text.splitlines()[0]


def test_what_overlap_leaves_is_checked_before_any_work():
    data, net = leaky(30), Net()
    with pytest.raises(ValueError, match="k=40: overlap='drop' leaves 30 labelled images"):
        knn(net, data, k=40, overlap='drop')
    one = ImageData(
        make_images(20, seed=1),
        TensorImages(
            make_images(20, seed=1).images[[i for i in range(20) if i % 3]], torch.zeros(13).long()
        ),
        'one',
    )
    with pytest.raises(ValueError, match='fewer than two classes'):
        linear_probe_cached(net, one, overlap='drop')
    assert net.calls == 0


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path / 'file').write_text('')
    for out in (tmp_path / 'file', tmp_path / 'file' / 'x'):
        with pytest.raises(ValueError, match='cannot be a folder'):
            knn(Net(), make_data(), k=5, out=out)


@pytest.mark.parametrize(
    'words, wrong',
    [
        (dict(K=3), "no option 'K'"),
        (dict(resize='a'), "resize must be .* got 'a'"),
        (dict(resize=4), 'resize must be .* got 4'),
        (dict(batch_size=0), 'batch_size must be .* got 0'),
        (dict(size=0), 'size must be .* got 0'),
    ],
)
def test_wrong_arguments_of_all_protocols(words, wrong):
    for f in (knn, linear_probe_cached):
        net = Net()
        with pytest.raises(ValueError, match=wrong):
            f(net, make_data(), **words)
        assert net.log == []


def test_classes_that_train_lacks_are_noted():
    r = knn(
        Net(),
        ImageData(make_images(60, classes=2, seed=1), make_images(30, classes=3, seed=2), 'more'),
        k=5,
        baselines=False,
    )
    assert '10 test images are of classes without a training image' in r.note


def test_another_size_than_the_encoders_own():
    net, data = learned(vit(size=16, patch=4, width=32, depth=1, heads=2)), make_data(size=32)
    r = knn(net, data, k=5, size=32)
    assert r.settings['size'] == 32 and 'random encoder' in r.baselines and net.sizes == {16}
    with pytest.raises(ValueError, match='size=30'):
        knn(net, data, k=5, size=30)


def test_an_encoder_file_remembers_what_it_was_trained_on(tmp_path):
    from ssl_patch.models.files import load_encoder, save_encoder

    net, data = vit(size=8, patch=4, width=16, depth=1, heads=2), make_data()
    assert load_encoder(save_encoder(net, tmp_path / 'a.safetensors')).trained_on is None
    net.trained_on = data.test.fingerprints()
    with pytest.raises(ValueError, match='trained on 30 of 30'):
        knn(load_encoder(save_encoder(net, tmp_path / 'a.safetensors')), data, k=5)

"Dense tasks: metrics against torchmetrics, interrupted runs, eight images by heart, files."

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from ssl_patch.commands.probe import Probe
from ssl_patch.data.collages import collages, draw_clip, draw_collage
from ssl_patch.data.dense import DenseData, DenseImages
from ssl_patch.data.depths import folder_depths
from ssl_patch.data.masks import folder_masks, open_masks
from ssl_patch.data.pairs import read_list
from ssl_patch.data.sources import images
from ssl_patch.evaluation.records import load_records
from ssl_patch.training.checkpoint import Stopped
from ssl_patch.transfer.decoders import DenseModel, build_decoder
from ssl_patch.transfer.depth import Depth, depth_errors, monocular_depth
from ssl_patch.transfer.segmentation import Segmentation, confusion_of, segmentation_scores
from ssl_patch.transfer.segmentation import segmentation, segmentation_recipes
from ssl_patch.transfer.task import TaskTuner
from ssl_patch.transfer.task_config import TaskConfig, task_lr
from steps import StopAt, said, tiny_resnet, tiny_vit

QUIET = dict(progress='quiet', bf16=False)


@pytest.fixture(scope='module')
def drawn():
    "Collages of 16 pixels, whose masks and depth are learned from."
    return {kind: collages(kind, train=24, test=8, size=16) for kind in ('mask', 'depth')}


TASKS = dict(
    mask=Segmentation(7, 'light', (16, 16), channels=8, scale=(0.8, 1.4)),
    depth=Depth('light', (16, 16), channels=8, scale=(0.8, 1.4)),
)


# ---- numbers


def test_scores_of_masks_are_those_of_torchmetrics():
    metrics = pytest.importorskip('torchmetrics.classification')
    g = torch.Generator().manual_seed(0)
    truth, pred = (torch.randint(0, 5, (6, 9, 11), generator=g) for _ in '12')
    truth[torch.rand(truth.shape, generator=g) < 0.2] = 255
    scores = segmentation_scores(confusion_of(list(truth), list(pred), 5))
    how = dict(task='multiclass', num_classes=5, ignore_index=255)
    jaccard = lambda average: metrics.JaccardIndex(**how, average=average)(pred, truth)
    assert math.isclose(scores['mIoU'], jaccard('macro').item(), rel_tol=1e-5)
    assert torch.allclose(torch.tensor(scores['IoU of classes']), jaccard('none'), atol=1e-4)
    micro = metrics.Accuracy(**how, average='micro')(pred, truth)
    assert math.isclose(scores['pixel accuracy'], micro.item(), rel_tol=1e-5)


def test_errors_of_depth_are_those_of_torchmetrics():
    metrics = pytest.importorskip('torchmetrics.regression')
    g = torch.Generator().manual_seed(0)
    p, d = (torch.rand(500, generator=g) * 9 + 0.5 for _ in '12')
    e = depth_errors(p, d)
    assert math.isclose(e['AbsRel'], metrics.MeanAbsolutePercentageError()(p, d), rel_tol=1e-5)
    assert math.isclose(e['RMSE'], metrics.MeanSquaredError(squared=False)(p, d), rel_tol=1e-5)
    log10 = metrics.MeanAbsoluteError()(p.log10(), d.log10())
    assert math.isclose(e['log10'], log10, rel_tol=1e-5)
    ratio = torch.maximum(p / d, d / p)
    for k in (1, 2, 3):
        share = (ratio < 1.25**k).float().mean().item()
        assert math.isclose(e[f'delta{k}'], share, rel_tol=1e-5)


def test_a_class_that_is_nowhere_does_not_count():
    scores = segmentation_scores(confusion_of([torch.zeros(2, 2)], [torch.zeros(2, 2)], 3))
    assert scores['mIoU'] == 1.0 and scores['IoU of classes'] == [1.0, None, None]


# ---- runs


@pytest.mark.parametrize('kind', ['mask', 'depth'])
def test_an_interrupted_run_loses_nothing(kind, drawn, tmp_path):
    config = TaskConfig(epochs=3, batch_size=8, lr=1e-3, warmup_steps=2, grad_clip=1.0)
    tuner = lambda **kw: TaskTuner(tiny_resnet(), TASKS[kind], drawn[kind], config, **QUIET, **kw)
    whole = tuner(watch=True).fit()
    run = tuner(watch=True, out=tmp_path / 'run')
    run.progress = StopAt(run, 4)  # in the middle of the second epoch
    with pytest.raises(Stopped):
        run.fit()
    assert run.batches == 4
    resumed = tuner(watch=True, out=tmp_path / 'run', resume=True)
    assert resumed.batches == 4
    resumed.fit()
    kept = lambda r: [{k: v for k, v in row.items() if k != 'seconds'} for row in r.history]
    assert kept(whole) == kept(resumed) and whole.scores == resumed.scores
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(a, b)
    assert resumed.fit().batches == 9  # nothing is left


def test_workers_change_nothing(drawn):
    config = TaskConfig(epochs=1, batch_size=8)
    runs = [
        TaskTuner(tiny_resnet(), TASKS['mask'], drawn['mask'], config, workers=n, **QUIET).fit()
        for n in (0, 1)
    ]
    assert runs[0].history[0]['loss'] == runs[1].history[0]['loss']


def test_more_epochs_lengthen_and_other_settings_are_refused(drawn, tmp_path):
    config = TaskConfig(epochs=1, batch_size=8)
    data, out = drawn['mask'], tmp_path / 'run'
    tuner = lambda task, c, **kw: TaskTuner(tiny_resnet(), task, data, c, out=out, **QUIET, **kw)
    tuner(TASKS['mask'], config).fit()
    longer = dataclasses.replace(config, epochs=2)
    assert len(tuner(TASKS['mask'], longer, resume=True).fit().history) == 2
    other = dataclasses.replace(TASKS['mask'], flip=0.0)
    assert said(lambda: tuner(other, longer, resume=True), ['another run', 'flip'])
    quicker = dataclasses.replace(longer, lr=1.0)
    assert said(lambda: tuner(TASKS['mask'], quicker, resume=True), ['another run', 'lr'])


@pytest.mark.parametrize('encoder', [tiny_resnet, tiny_vit])
def test_a_frozen_encoder_stays_and_its_head_learns(encoder, drawn):
    net = encoder()
    config = TaskConfig(epochs=2, batch_size=8, freeze='encoder', lr=1e-2)
    run = TaskTuner(net, TASKS['mask'], drawn['mask'], config, **QUIET)
    head = {k: v.clone() for k, v in run.model.decoder.state_dict().items()}
    run.fit()
    learned = run.encoder.state_dict()
    assert all(torch.equal(v, learned[k]) for k, v in net.state_dict().items())
    assert any(not torch.equal(v, head[k]) for k, v in run.model.decoder.state_dict().items())
    assert run.encoder.trained_on is None


def test_what_was_learned_from_is_written_down(drawn):
    config = TaskConfig(epochs=1, batch_size=8)
    run = TaskTuner(tiny_resnet(), TASKS['mask'], drawn['mask'], config, **QUIET).fit()
    assert len(run.encoder.trained_on) == 24
    swapped = DenseData(drawn['mask'].test, drawn['mask'].train, 'swapped')
    refused = lambda: TaskTuner(run.encoder, TASKS['mask'], swapped, config, **QUIET)
    assert said(refused, ['trained on 24 of 24 test images'])


def test_test_images_in_train_are_refused_or_dropped(drawn):
    data = drawn['mask']
    x = torch.cat([data.train.images.images, data.test.images.images[:2]])
    both = DenseImages(x, torch.cat([data.train.targets, data.test.targets[:2]]), data.classes)
    leaky = DenseData(both, data.test, 'leaky')
    config = TaskConfig(epochs=1, batch_size=8)
    tuner = lambda **kw: TaskTuner(tiny_resnet(), TASKS['mask'], leaky, config, **QUIET, **kw)
    assert said(tuner, ['2 of 8 test images'])
    assert len(tuner(overlap='drop').data.train) == 24


@pytest.mark.parametrize('kind, metric, least', [('mask', 'mIoU', 0.9), ('depth', 'delta1', 0.85)])
def test_eight_images_by_heart(kind, metric, least):
    few = collages(kind, train=8, test=1, size=48).train
    torch.manual_seed(0)
    from ssl_patch.models.encoders import resnet

    net = resnet('resnet18', size=48, stem='half', width=16)
    task = dict(
        mask=Segmentation(7, 'light', (48, 48), flip=0.0),
        depth=Depth('light', (48, 48), flip=0.0, lam=0.5),
    )[kind]
    config = TaskConfig(epochs=120, batch_size=8, lr=4e-3, warmup_steps=10)
    by_heart = DenseData(few, few, 'eight')
    run = TaskTuner(net, task, by_heart, config, overlap='keep', **QUIET).fit()
    assert run.scores[metric] > least


# ---- models


@pytest.mark.parametrize('kind', ['linear', 'fcn', 'fcn_mmseg', 'light'])
@pytest.mark.parametrize('encoder', [tiny_resnet, tiny_vit])
def test_any_size_in_the_same_size_out(encoder, kind):
    net = encoder()
    model = DenseModel(net, build_decoder(kind, net, 3, 8)).eval()
    for size in ((16, 16), (24, 40), (19, 33)):
        x = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        with torch.no_grad():
            y = model(x)
            assert y.shape == (2, 3, *size) and y.isfinite().all()
            assert torch.allclose(y[:1], model(x[:1]), atol=1e-5)


def test_recipes_hold_what_their_sources_say():
    told = {
        k: (Segmentation(21, **a), TaskConfig(**b)) for k, (a, b, _) in segmentation_recipes.items()
    }
    task, config = told['moco_voc']
    assert (task.dilate, task.crop, task.scale) == (1, (513, 513), (0.5, 2.0))
    lrs = [task_lr(config, s, 100) for s in (0, 69, 70, 90)]
    assert np.allclose(lrs, [3e-3, 3e-3, 3e-4, 3e-5])
    task, config = told['mmseg_voc']
    assert (task.aux_weight, task.dilate, config.steps) == (0.4, 2, 20_000)
    assert math.isclose(task_lr(config, 10_000, 20_000), 1e-4 + 0.0099 * 0.5**0.9)


# ---- files


def write_pairs(root, part, n=3, size=(12, 16), high=4, depth=False):
    rng = np.random.default_rng([len(part), *size])
    for kind in ('images', 'depth' if depth else 'masks'):
        (root / part / kind).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        x = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(x).save(root / part / f'images/{i}.png')
        if depth:
            y = rng.integers(500, 4000, size).astype(np.uint16)
            y[0], y[1] = 0, 65535
            Image.fromarray(y).save(root / part / f'depth/{i}.png')
        else:
            y = rng.integers(0, high, size).astype(np.uint8)
            Image.fromarray(y).save(root / part / f'masks/{i}.png')


def test_images_of_many_sizes_are_trained_on_and_measured_whole(tmp_path):
    for part in ('train', 'test'):
        write_pairs(tmp_path, part)
    write_pairs(tmp_path, 'test', n=1, size=(20, 13))
    data = folder_masks(tmp_path, 4)
    task = Segmentation(4, 'light', (16, 16), channels=8, scale=(0.5, 2.0))
    run = TaskTuner(tiny_resnet(), task, data, TaskConfig(epochs=1, batch_size=3), **QUIET).fit()
    assert [tuple(p.shape) for p in run.predict()] == [(20, 13), (12, 16), (12, 16)]
    slid = dataclasses.replace(task, test_mode='slide', crop=(16, 16), resize=24)
    shapes = [tuple(p.shape) for p in slid.predict(run.model.eval(), data.test, [0, 1], 'cpu')]
    assert shapes == [(20, 13), (12, 16)]
    run.show(3)


def test_what_is_wrong_with_a_mask_is_said_with_its_name(tmp_path):
    for part in ('train', 'test'):
        write_pairs(tmp_path, part)
    assert said(lambda: folder_masks(tmp_path, 3), ['masks/0.png', 'pixels of the number 3'])
    Image.new('L', (5, 5)).save(tmp_path / 'train/masks/1.png')
    assert said(lambda: folder_masks(tmp_path, 4), ['train/masks/1.png', '12 x 16'])
    (tmp_path / 'train/masks/1.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 3 images .* the first: 1'):
        folder_masks(tmp_path, 4)
    (tmp_path / 'train.txt').write_text('train/images/0.png train/masks/0.png\nonly one\nx y z\n')
    assert said(lambda: read_list(tmp_path / 'train.txt', tmp_path), ['line 3', 'x y z'])


def test_masks_that_say_nothing_are_refused_before_work(tmp_path):
    for part in ('train', 'test'):
        write_pairs(tmp_path, part, high=2)
    for path in tmp_path.glob('*/masks/*.png'):
        Image.fromarray(np.array(Image.open(path)) * 255).save(path)
    task = Segmentation(2, 'light', (16, 16), channels=8)
    words = ['train masks', 'only class 0 occurs', 'mapped={0: 0, 255: 1}']
    assert said(lambda: task.check(folder_masks(tmp_path, 2)), words)
    assert said(lambda: task.check(folder_masks(tmp_path, 2, size=(12, 16))), words)
    mapped = folder_masks(tmp_path, 2, mapped={0: 0, 255: 1})
    assert task.check(mapped) == '' and '255 is class 1' in mapped.note
    assert mapped.train.content() != folder_masks(tmp_path, 2).train.content()
    void = folder_masks(tmp_path, 2, mapped={7: 0})
    assert said(lambda: task.check(DenseData(mapped.train, void.test)), ['test masks: no pixel'])
    wider = Segmentation(5, 'light', (16, 16), channels=8)
    five = folder_masks(tmp_path, 5, mapped={0: 0, 255: 1})
    with pytest.warns(UserWarning, match='3 of 5 classes are in no mask that was looked at: 2, 3'):
        assert '3 of 5 classes' in wider.check(five)
    assert said(lambda: folder_masks(tmp_path, 'aa'), ['classes must be names', 'a twice'])


def test_files_of_pairs_that_are_missing_or_cut_are_named(tmp_path):
    for part in ('train', 'test'):
        write_pairs(tmp_path, part)
    Image.new('L', (16, 12)).save(tmp_path / 'train/masks/extra.png')
    with pytest.warns(UserWarning, match='1 of 4 files of .*no image in train/images .* extra'):
        folder_masks(tmp_path, 4)
    cut = tmp_path / 'test/images/1.png'
    cut.write_bytes(cut.read_bytes()[:300])
    assert said(lambda: folder_masks(tmp_path, 4), ['test/images/1.png cannot be read'])
    for path in tmp_path.glob('*/masks/*.png'):
        path.rename(path.with_suffix('.jpg'))
    with pytest.raises(FileNotFoundError, match='there are .jpg, and .png is needed'):
        folder_masks(tmp_path, 4)


def test_an_image_that_breaks_later_stops_the_run_with_its_name(tmp_path):
    for part in ('train', 'test'):
        write_pairs(tmp_path, part)
    data = folder_masks(tmp_path, 4)
    (tmp_path / 'train/images/2.png').write_bytes(b'gone')
    task = Segmentation(4, 'light', (16, 16), channels=8)
    run = lambda: TaskTuner(
        tiny_resnet(), task, data, TaskConfig(epochs=1, batch_size=3), **QUIET
    ).fit()
    assert said(run, ['train/images/2.png', 'cannot be read'])


def test_no_image_stands_in_for_another_that_has_its_own_target(tmp_path):
    for i in range(3):
        Image.new('RGB', (16, 16), (80 * i, 0, 0)).save(tmp_path / f'{i}.png')
    store = images(tmp_path, stream=True).train
    (tmp_path / '1.png').write_bytes(b'gone')
    split = DenseImages(store, torch.arange(3))
    assert [int(split[i][1]) for i in (0, 2)] == [0, 2]
    with pytest.warns(UserWarning, match='cannot be decoded'):
        with pytest.raises(ValueError, match='1.png cannot be decoded.*its target would be wrong'):
            split[1]


def test_holes_in_depth_are_counted_and_not_learned_from(tmp_path):
    for part in ('train', 'test'):
        write_pairs(tmp_path, part, depth=True)
    data = folder_depths(tmp_path)
    assert data.train.targets[0][:2].isnan().all()
    task = Depth('light', (12, 16), channels=8, flip=0.0)
    assert '16.7 % of' in task.check(data) and 'are holes' in task.check(data)
    x, d = task.batch(data.train, [0, 1], torch.Generator().manual_seed(0), True)
    model = task.build(tiny_resnet())
    loss, _ = task.loss(model, x, d)
    d[d.isnan()] = 99.0  # beyond `high`: does not count either
    assert torch.equal(loss, task.loss(model, x, d)[0])
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    far = DenseImages(data.train.images, [torch.full((12, 16), 2500.0)] * 3)
    assert said(lambda: task.check(DenseData(far)), ['got 2500 to 2500 m', '`unit`'])
    none = DenseImages(data.train.images, [torch.full((12, 16), math.nan)] * 3)
    assert said(lambda: task.check(DenseData(none)), ['measured from 0.001 to 10.0 m'])


def test_a_batch_without_a_pixel_that_counts_is_no_nan():
    task = Segmentation(3, 'light', (16, 16), channels=8)
    model = task.build(tiny_resnet())
    x = torch.rand(2, 3, 16, 16)
    loss, _ = task.loss(model, x, torch.full((2, 16, 16), 255))
    assert loss.item() == 0
    d = Depth('light', (16, 16), channels=8)
    loss, _ = d.loss(d.build(tiny_resnet()), x, torch.full((2, 16, 16), math.nan))
    assert loss.isfinite()


# ---- one call, and the shell


def test_a_record_has_its_baselines(drawn, tmp_path):
    how = dict(epochs=1, channels=8, batch_size=8, out=tmp_path, **QUIET)
    trained = tiny_resnet().reinitialized(5)
    r = segmentation(trained, drawn['mask'], supervised=tiny_resnet(), **how)
    assert set(r.baselines) == {'place alone', 'from scratch', 'supervised'}
    assert r.settings['recipe'] == 'small' and len(r.per_image()) == 8
    d = monocular_depth(trained, drawn['depth'], 'linear', **how)
    assert set(d.baselines) == {'place alone', 'random encoder'} and 'AbsRel' in d.chosen
    assert d.settings['align'] == 'metric'
    assert [x.metric for x in load_records(tmp_path)] == ['mIoU', 'delta1']


def test_the_shell_measures_dense_tasks(tmp_path, capsys):
    from ssl_patch.models.files import save_encoder

    path = save_encoder(tiny_resnet(), tmp_path / 'encoder.safetensors')
    path = path or tmp_path / 'encoder.safetensors'
    common = [
        f'{p}.{s}'
        for p in ('segmentation', 'depth')
        for s in ('train=8', 'test=4', 'size=16', 'epochs=1', 'progress=quiet', 'channels=8')
    ]
    Probe(
        encoder=str(path),
        data='collages',
        protocols=('segmentation', 'depth'),
        settings=tuple(common),
        out=str(tmp_path / 'out'),
        name='tiny',
    ).go()
    said_there = capsys.readouterr().out
    assert 'mIoU' in said_there and 'delta1' in said_there and 'synthetic' in said_there
    assert len(load_records(tmp_path / 'out')) == 2
    wrong = Probe(encoder=str(path), data='collages', protocols=('depth',), settings=('depth.x=1',))
    assert said(wrong.measure, ["depth has no option 'x'"])
    sized = Probe(encoder=str(path), data='collages', protocols=('depth',), size=16)
    assert said(sized.measure, ['--size is not for depth'])
    assert said(Probe(runs=('x',), protocols=('depth',)).measure, ['depth needs --data'])


def test_the_script_measures_what_is_missing(tmp_path, monkeypatch, capsys):
    from ssl_patch.models.files import save_encoder
    from test_scripts import script

    for part in ('train', 'test'):
        write_pairs(tmp_path / 'CamVid', part, high=11)
        write_pairs(tmp_path / 'room', part, depth=True)
        for kind, folder in (('masks', 'CamVid'), ('depth', 'room')):
            lines = [f'{part}/images/{i}.png {part}/{kind}/{i}.png' for i in range(3)]
            (tmp_path / folder / f'{part}.txt').write_text('\n'.join(lines))
    run = tmp_path / 'runs' / 'Tiny_net_seed3'
    run.mkdir(parents=True)
    save_encoder(tiny_resnet(), run / 'encoder.safetensors')
    tool = script('dense_transfer')
    brief = {k: v | dict(epochs=1, batch_size=3, channels=8) for k, v in tool.RUNS.items()}
    monkeypatch.setattr(tool, 'RUNS', brief)
    monkeypatch.setattr(tool, 'SIZE', (16, 16))
    out = tmp_path / 'found.jsonl'
    words = [str(tmp_path / 'runs'), '--camvid', str(tmp_path / 'CamVid'), '--out', str(out)]
    tool.main(words)
    found = load_records(out)
    assert {(r.encoder, r.seed) for r in found} == {('random resnet', 3), ('Tiny net', 3)}
    assert len(found) == 4 and {r.metric for r in found} == {'mIoU'}
    tool.main([*words, '--rgbd', str(tmp_path / 'room')])
    assert len(load_records(out)) == 8 and len(out.read_text().splitlines()) == 8
    assert capsys.readouterr().out.count('segmentation_linear') == 2  # nothing twice
    tool.main([*words, '--only', 'Tiny', '--head-seeds', '3', '5'])
    new = load_records(out)[8:]
    assert {(r.encoder, r.seed) for r in new} == {('Tiny net', 5)} and len(new) == 2


# ---- collages


def test_collages_depend_on_their_number_alone():
    first = [draw_collage(i, (24, 32), seed=3) for i in range(4)]
    again = [draw_collage(i, (24, 32), seed=3) for i in (3, 0)]
    assert torch.equal(first[3].image, again[0].image) and torch.equal(
        first[0].depth, again[1].depth
    )
    clip = draw_clip(2, 4, (24, 32), seed=3)
    assert clip.frames.shape == (4, 3, 24, 32)
    assert torch.equal(draw_clip(2, 2, (24, 32), seed=3).frames, clip.frames[:2])
    assert said(lambda: open_masks('collages', train=0), ['train must be'])

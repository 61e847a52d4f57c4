"Sets to detect in, detectors and their training: bad input, overfitting, going on."

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_patch.cli import main
from ssl_patch.data.box_files import penn_fudan_boxes, voc_boxes
from ssl_patch.data.boxes import BoxImages, Objects
from ssl_patch.data.collages import draw_collage, shapes
from ssl_patch.data.dense import DenseData, DenseImages
from ssl_patch.data.detection_sets import coco_boxes, collage_boxes, detection_data
from ssl_patch.evaluation.records import load_records
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.files import save_encoder
from ssl_patch.transfer.detection import detection, detection_recipes
from ssl_patch.transfer.detection_task import Detection, show_detections
from ssl_patch.transfer.detectors import Backbone, Detector, DetectorConfig
from ssl_patch.transfer.task import TaskTuner
from ssl_patch.transfer.task_config import TaskConfig


# ---- folders, and what can be wrong with them


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image)).save(path)


def write_voc(root, n=3):
    for i in range(n):
        c = draw_collage(i, 48)
        save(root / f'JPEGImages/{i}.jpg', c.image.permute(1, 2, 0))
        save(root / f'SegmentationObject/{i}.png', c.instances)
        text = '<annotation>\n<size><width>48</width><height>48</height></size>\n'
        for box, y in zip(c.boxes.int().tolist(), c.labels.tolist()):
            text += f'<object><name>{shapes[y - 1]}</name><difficult>0</difficult><bndbox>\n'
            text += f'<xmin>{box[0] + 1}</xmin><ymin>{box[1] + 1}</ymin>'
            text += f'<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>\n'
        (root / 'Annotations').mkdir(exist_ok=True)
        (root / f'Annotations/{i}.xml').write_text(text + '</annotation>')
    for part in ('Main', 'Segmentation'):
        for split in ('train', 'val'):
            path = root / 'ImageSets' / part / f'{split}.txt'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('\n'.join(map(str, range(n))))
    return root


def write_coco(root, n=3):
    tables = dict(images=[], annotations=[])
    tables['categories'] = [dict(id=5 * k + 2, name=s) for k, s in enumerate(shapes)]
    for i in range(n):
        c = draw_collage(i, 48)
        save(root / f'train/{i}.png', c.image.permute(1, 2, 0))
        tables['images'].append(dict(id=i, file_name=f'{i}.png', height=48, width=48))
        for (left, top, right, bottom), y in zip(c.boxes.tolist(), c.labels.tolist()):
            row = dict(
                image_id=i, category_id=5 * y - 3, bbox=[left, top, right - left, bottom - top]
            )
            row['segmentation'] = [[left, top, right, top, right, bottom, left, bottom]]
            tables['annotations'].append(row)
    (root / 'annotations').mkdir()
    shutil.copytree(root / 'train', root / 'val')
    for split in ('train', 'val'):
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(tables))
    return tables


def write_penn_fudan(root, n=5):
    for i in range(n):
        c = draw_collage(i, 48)
        save(root / f'PNGImages/p{i}.png', c.image.permute(1, 2, 0))
        save(root / f'PedMasks/p{i}_mask.png', c.instances)
    return root


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_all_layouts_hold_the_same(tmp_path):
    voc = voc_boxes(write_voc(tmp_path / 'VOC2007'), 'train', shapes, masks=True)
    write_coco(tmp_path / 'coco')
    coco = detection_data(tmp_path / 'coco').train.images
    penn = penn_fudan_boxes(write_penn_fudan(tmp_path / 'penn'), 'train', 2)
    for i in range(3):
        want = draw_collage(i, 48)
        for store in (voc, coco, penn):
            x, o = store.scene(i)
            assert torch.equal(o.boxes.round(), want.boxes) and x.shape == (3, 48, 48)
        assert torch.equal(voc.objects[i].labels, want.labels - 1)
        assert torch.equal(coco.objects[i].labels, want.labels - 1)
        for store in (voc, penn):
            assert torch.equal(store.objects[i].masks.read(), want.masks)


VOC_FAULTS = {
    'xml': ('</object>', '<object>', r'Annotations/1\.xml, line \d+: not readable as XML'),
    'class': (
        '<name>',
        '<name>un',
        r'Annotations/1\.xml, object 1: class .un\w+. is not one of disc',
    ),
    'number': ('<xmin>', '<xmin>a', r'1\.xml, object 1: xmin must be a number'),
    'no box': ('bndbox>', 'box>', r'1\.xml'),
    'nan': (
        '<xmin>',
        '<xmin>nan</xmin><xmin>',
        r'Annotations/1\.xml, object 1: its box has numbers',
    ),
    'size': ('<width>48', '<width>50', r'1\.xml says 48x50 pixels .*, the image 1\.jpg has 48x48'),
}


@pytest.mark.parametrize('fault', VOC_FAULTS)
def test_wrong_annotations_of_voc_are_named(tmp_path, fault):
    root = write_voc(tmp_path)
    old, new, said = VOC_FAULTS[fault]
    edit(root / 'Annotations/1.xml', old, new)
    with pytest.raises(ValueError, match=said):
        voc_boxes(root, 'train', shapes)


def test_missing_files_of_voc_are_named(tmp_path):
    root = write_voc(tmp_path)
    with pytest.raises(FileNotFoundError, match='there is no .*test.txt'):
        voc_boxes(root, 'test', shapes)
    (root / 'JPEGImages/2.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 3 images are not in .*, the first: 2.jpg'):
        voc_boxes(root, 'train', shapes)
    (root / 'Annotations/0.xml').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 3 annotations are missing, .*0.xml'):
        voc_boxes(root, 'train', shapes)


def test_masks_that_do_not_fit_are_named(tmp_path):
    root = write_voc(tmp_path / 'voc')
    save(root / 'SegmentationObject/1.png', np.zeros((48, 40), np.uint8))
    with pytest.raises(ValueError, match='1.png: the mask has 48x40 pixels, its image 48x48'):
        voc_boxes(root, 'train', shapes, masks=True)
    save(root / 'SegmentationObject/1.png', np.full((48, 48), 9, np.uint8))
    with pytest.raises(ValueError, match='1.png must be numbers up to [0-9], its objects, got 9'):
        voc_boxes(root, 'train', shapes, masks=True)
    penn = write_penn_fudan(tmp_path / 'penn')
    (penn / 'PedMasks/p1_mask.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='p1_mask.png cannot be read as a mask'):
        penn_fudan_boxes(penn)
    (penn / 'PedMasks/p1_mask.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 4 masks are missing, the first: .*p1_mask'):
        penn_fudan_boxes(penn)


COCO_FAULTS = {
    'category': (('annotations', 1, 'category_id', 3), r'annotations\[1\], category_id must be'),
    'image': (
        ('annotations', 0, 'image_id', 77),
        r'annotations\[0\], image_id must be that of an image',
    ),
    'box': (('annotations', 0, 'bbox', [1, 2]), r'annotations\[0\], bbox must be four numbers'),
    'row': (('images', 2, 'height', None), r'images\[2\], height must be a whole number'),
    'size': (('images', 2, 'height', 47), r'image 2 says 47x48 .* the image 2.png has 48x48'),
    'twice': (('images', 2, 'id', 1), 'images must be ids that are all different'),
    'polygon': (
        ('annotations', 0, 'segmentation', [[1, 2]]),
        r'annotations\[0\], segmentation must',
    ),
    'lengths': (
        ('annotations', 0, 'segmentation', dict(counts=[9], size=[9, 9])),
        r'annotations\[0\], segmentation size must be \[48, 48\]',
    ),
}


@pytest.mark.parametrize('fault', COCO_FAULTS)
def test_wrong_entries_of_coco_are_named(tmp_path, fault):
    tables = write_coco(tmp_path)
    (table, row, key, value), said = COCO_FAULTS[fault]
    tables[table][row][key] = value
    path = tmp_path / 'annotations/instances_train.json'
    path.write_text(json.dumps(tables))
    with pytest.raises(ValueError, match=said):
        coco_boxes(tmp_path / 'train', path)


def test_boxes_of_coco_that_are_corners_are_refused(tmp_path):
    tables = write_coco(tmp_path, n=8)
    path = tmp_path / 'annotations/instances_train.json'
    for row in tables['annotations']:
        left, top, width, height = row['bbox']
        row['bbox'] = [left, top, left + width, top + height]
    path.write_text(json.dumps(tables))
    with pytest.raises(ValueError, match=r'boxes leave their image: are they \[left, top, right'):
        coco_boxes(tmp_path / 'train', path)
    for row in tables['annotations']:
        row['bbox'] = [0, 0, 4, 4]
    path.write_text(json.dumps(tables))
    with pytest.raises(ValueError, match='boxes disagree with their polygons'):
        coco_boxes(tmp_path / 'train', path)
    path.write_text(json.dumps(tables | dict(annotations=[])))
    with pytest.raises(ValueError, match='annotations must be a list of at least one object'):
        coco_boxes(tmp_path / 'train', path)


def test_boxes_without_area_outside_and_negative_are_told_apart(tmp_path):
    tables = write_coco(tmp_path)
    odd = [[5000, 0, 9, 9], [9, 9, -5, 5], [3, 3, 0, 9]]
    first = dict(tables['annotations'][0])
    del first['segmentation']
    tables['annotations'] += [first | dict(bbox=b) for b in odd]
    path = tmp_path / 'annotations/instances_train.json'
    path.write_text(json.dumps(tables))
    with pytest.warns(
        UserWarning, match='1 boxes wholly outside .*1 boxes of neg.*1 boxes without'
    ):
        coco_boxes(tmp_path / 'train', path)
    tables['annotations'] = [first | dict(bbox=odd[0])] * 5
    path.write_text(json.dumps(tables))
    with pytest.warns(UserWarning, match='5 of 5 boxes are not inside of their image'):
        coco_boxes(tmp_path / 'train', path)


def test_files_of_coco_that_cannot_be_read_are_named(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / 'annotations/instances_train.json'
    (tmp_path / 'train/1.png').unlink()
    with pytest.raises(
        FileNotFoundError, match='1 of 3 images are not in .*train, the first: 1.png'
    ):
        coco_boxes(tmp_path / 'train', path)
    path.write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(ValueError, match='instances_train.json, line 2: not readable as JSON'):
        coco_boxes(tmp_path / 'train', path)
    path.write_text('[1]')
    with pytest.raises(ValueError, match='must be one with lists of images, annotations'):
        coco_boxes(tmp_path / 'train', path)
    with pytest.raises(FileNotFoundError, match='there is no annotation file'):
        coco_boxes(tmp_path / 'train', tmp_path / 'nothing.json')


def test_what_is_mended_is_counted_in_one_warning(tmp_path):
    root = write_voc(tmp_path)
    first = root / 'Annotations/0.xml'
    edit(first, '</xmax>', '9</xmax>')
    flat = '<xmin>9</xmin><ymin>9</ymin><xmax>8</xmax><ymax>9</ymax>'
    more = f'<object><name>disc</name><bndbox>{flat}</bndbox></object>'
    edit(first, '</annotation>', more + '</annotation>')
    (root / 'Annotations/1.xml').write_text('<annotation/>')
    (root / 'JPEGImages/2.jpg').write_bytes(b'broken')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        store = voc_boxes(root, 'train', shapes)
    n = len(draw_collage(0, 48).boxes)
    text = str(said[0].message)
    assert len(said) == 1
    assert '1 boxes beyond their image were cut (Annotations/0.xml object 1)' in text
    assert f'1 boxes without area were left out (Annotations/0.xml object {n + 1})' in text
    assert '1 images that cannot be read were left out (2.jpg)' in text
    assert [len(o) for o in store.objects] == [n, 0] and store.skipped[0][0] == '2.jpg'
    assert float(store.objects[0].boxes.max()) <= 48


def test_a_broken_image_is_replaced_together_with_its_objects(tmp_path):
    root = write_voc(tmp_path)
    whole = (root / 'JPEGImages/1.jpg').read_bytes()
    store = voc_boxes(root, 'train', shapes)
    (root / 'JPEGImages/1.jpg').write_bytes(whole[:200])
    with pytest.warns(UserWarning, match='1.jpg cannot be decoded .*the next image stands in'):
        image, objects = store.dense()[1]
    assert torch.equal(image, store.scene(2)[0]) and objects is store.objects[2]
    assert store.skipped == [('1.jpg', 'cannot be decoded')]
    assert store.broken == [1] and store.is_broken(1) and not store.is_broken(2)
    with pytest.raises(ValueError, match='1.jpg cannot be decoded, and no other image can stand'):
        DenseImages(store, list(range(len(store))))[1]  # these targets do not follow
    part = store.dense().subset([0, 1, 2])  # images and objects of a part agree too
    assert part[1][1].boxes.tolist() == store.objects[2].boxes.tolist()


def test_an_image_that_its_exif_turns_is_refused(tmp_path):
    root = write_voc(tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.fromarray(np.zeros((48, 30, 3), np.uint8))
    picture.save(root / 'JPEGImages/0.jpg', exif=exif)
    edit(root / 'Annotations/0.xml', '<width>48', '<width>30')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        store = voc_boxes(root, 'train', shapes)
    with pytest.raises(ValueError, match='0.jpg is 48x30 pixels in the file, 30x48 as it is shown'):
        store[0]


def test_one_door_says_what_it_takes(tmp_path):
    with pytest.raises(ValueError, match='folder must be one with ImageSets'):
        detection_data(tmp_path)
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        detection_data(tmp_path / 'nothing')
    write_voc(tmp_path / 'VOCdevkit/VOC2007')
    data = detection_data(tmp_path, classes=shapes, side=24, n_train=2)
    assert (len(data.train), len(data.test), data.name) == (2, 3, tmp_path.name)
    assert max(data.train[0][0].shape) == 24
    write_penn_fudan(tmp_path / 'penn')
    data = detection_data(tmp_path / 'penn', test=2)
    assert (len(data.train), len(data.test), data.classes) == (3, 2, ['person'])


def test_fingerprints_stay_when_images_are_shrunk(tmp_path):
    store = voc_boxes(write_voc(tmp_path), 'train', shapes)
    small = store.shrunk(24)
    assert torch.equal(store.fingerprints(), small.fingerprints())
    assert store.content() != small.content() and len({store.content(), store.content()}) == 1
    other = store.subset([0, 1, 2])
    other.objects[0] = Objects([[0, 0, 5, 5]], [0])
    assert other.content() != store.content()


# ---- detectors


TINY = dict(channels=16, hidden=32, mask_channels=8, anchors=(4.0,), rpn_batch=32, box_batch=32)
TINY |= dict(proposals=(100, 50, 100, 50))


@pytest.mark.parametrize('neck', ['fpn', 'simple', 'c4'])
@pytest.mark.parametrize('masks', [False, True])
def test_every_neck_learns_and_predicts_on_images_of_any_shape(neck, masks):
    net = resnet('resnet18', 32, 'half', width=8)
    if neck == 'simple':
        net = vit(size=32, patch=8, width=24, depth=1, heads=2)
    torch.manual_seed(0)
    detector = Detector(net, 6, DetectorConfig(neck=neck, masks=masks, neck_norm=True, **TINY))
    scenes = [draw_collage(i, size) for i, size in enumerate(((40, 64), (56, 32)))]
    x = [s.image.float() / 255 for s in scenes]
    targets = [dict(boxes=s.boxes, labels=s.labels, masks=s.masks.to(torch.uint8)) for s in scenes]
    losses = detector(x, targets)
    assert ('loss_mask' in losses) == masks
    sum(losses.values()).backward()
    lost = [n for n, p in detector.named_parameters() if p.grad is None]
    known = (
        'cls_token',
        'norm',
        'inner_blocks',
        'pos_embed',
        'encoder.net.layer4',
        'encoder.net.bn',
    )
    assert all(any(k in n for k in known) for n in lost), lost
    with torch.no_grad():
        for found, scene in zip(detector.eval()(x), scenes):
            h, w = scene.image.shape[1:]
            assert (found['boxes'][:, 2] <= w).all() and (found['boxes'][:, 3] <= h).all()
            if masks:
                assert found['masks'].shape[1:] == (1, h, w)


def test_weights_of_the_encoder_stand_once_in_the_state_of_c4():
    net = resnet('resnet18', 32, 'half', width=8)
    detector = Detector(net, 2, DetectorConfig(neck='c4', masks=True, **TINY))
    names = [n for n in detector.state_dict() if 'layer4.0.conv1.weight' in n]
    assert names == ['rcnn.backbone.encoder.net.layer4.0.conv1.weight']
    inner = {id(p) for p in net.parameters()}
    assert inner <= {id(p) for p in detector.parameters()}


@pytest.mark.parametrize('patch', [8, 14])
def test_boxes_are_read_where_they_are_for_any_patch(patch):
    "A map that holds its own place: what is read of a box is its middle, for any patch."
    net = vit(size=4 * patch, patch=patch, width=24, depth=1, heads=2)
    backbone = Detector(net, 2, DetectorConfig(finest=patch, **TINY)).rcnn
    pool, strides = backbone.roi_heads.box_roi_pool, backbone.backbone.strides
    assert strides == [patch, 2 * patch]
    side = 8 * patch
    ramp = lambda s: ((torch.arange(side // s) + 0.5) * s).expand(1, 1, side // s, -1)
    maps = {str(k): ramp(int(s)).contiguous() for k, s in enumerate(strides)}
    for box in ([patch, patch, 3 * patch, 2 * patch], [0, 0, side, side]):
        read = pool(maps, [torch.tensor([box], dtype=torch.float32)], [(side, side)])
        middle = read[0, 0, :, 3].mean().item()
        assert abs(middle - (box[0] + box[2]) / 2) <= strides[-1] / 2 + 1e-3


def test_what_does_not_fit_is_refused():
    net = resnet('resnet18', 32, 'half', width=8)
    with pytest.raises(ValueError, match='encoder must be one with stage_maps'):
        Backbone(torch.nn.Linear(1, 1), DetectorConfig())
    one_map = vit(size=32, patch=8, width=24, depth=1, heads=2)
    for neck in ('fpn', 'c4'):
        with pytest.raises(ValueError, match='neck must be'):
            Backbone(one_map, DetectorConfig(neck=neck))
    for wrong in (dict(anchors=()), dict(proposals=(1, 2)), dict(least_score=2), dict(channels=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DetectorConfig(**wrong)
    for wrong in (dict(metric='map'), dict(flip=2), dict(short=(3,)), dict(classes=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Detection(**{'classes': 6} | wrong)
    data = detection_data('collages', n_train=4, n_test=2, side=32)
    with pytest.raises(ValueError, match="Detection has no option 'lrr'"):
        detection(net, data, lrr=1)
    empty = BoxImages(
        [torch.zeros(3, 32, 32, dtype=torch.uint8)] * 2, [Objects([], [])] * 2, shapes
    )
    nothing = DenseData(data.train, empty.dense(), 'empty')
    with pytest.raises(ValueError, match='the test split must be one with objects that count'):
        detection(net, nothing, overlap='keep')
    bare = [Objects(o.boxes, o.labels) for o in data.train.images.objects]
    no_masks = BoxImages(data.train.images.pictures, bare, shapes).dense()
    with pytest.raises(ValueError, match='the train split must be one with masks'):
        detection(net, DenseData(no_masks, data.test, 'bare'), masks=True)


# ---- training


def eight(masks=False):
    store = collage_boxes(8, 64).dense()
    return DenseData(store, store, 'eight images')


def brief(changes=(), **run):
    of_task, of_run, _ = detection_recipes['small']
    own = dict(TINY, channels=32, hidden=64, jitter=(1.0, 1.0), flip=0.0) | dict(changes)
    quick = dict(batch_size=8, lr=3e-3, weight_decay=0.0, warmup_steps=10, steps=None)
    return Detection(classes=6, **of_task | own), TaskConfig(**of_run | quick | run)


def test_a_detector_overfits_eight_images():
    task, config = brief(steps=140)
    encoder = resnet('resnet18', 64, 'half', width=8).reinitialized(1)
    how = dict(overlap='keep', progress='quiet')
    run = TaskTuner(encoder, task, eight(), config, **how).fit()
    assert run.scores['AP'] > 0.9, run.scores
    assert run.task.per_image(run.predict(), run.data.test).min() > 0.9


def test_an_interrupted_run_loses_nothing(tmp_path):
    task, config = brief(dict(masks=True), epochs=3, batch_size=4)
    encoder = resnet('resnet18', 64, 'half', width=8).reinitialized(1)
    make = lambda **kw: TaskTuner(
        encoder, task, eight(), config, overlap='keep', progress='quiet', **kw
    )
    whole = make().fit()
    make(out=tmp_path / 'run').fit(1)
    rest = make(out=tmp_path / 'run', resume=True).fit()
    assert [r['loss'] for r in whole.history] == [r['loss'] for r in rest.history]
    assert whole.scores == rest.scores and 'mask AP' in whole.scores
    for (name, a), b in zip(whole.model.state_dict().items(), rest.model.state_dict().values()):
        assert torch.equal(a, b), name
    other = replace(task, metric='voc07')
    with pytest.raises(ValueError, match='belongs to another run. task: the checkpoint has metric'):
        TaskTuner(
            encoder, other, eight(), config, overlap='keep', out=tmp_path / 'run', resume=True
        )


def test_a_record_of_detection(tmp_path):
    encoder = resnet('resnet18', 32, 'half', width=8)
    data = detection_data('collages', n_train=6, n_test=3, side=32)
    small = {k: v for k, v in TINY.items()}
    r = detection(encoder, data, steps=2, batch_size=2, progress='quiet', out=tmp_path, **small)
    assert (r.protocol, r.metric, r.n_classes) == ('fine-tuning, detection', 'AP', 6)
    assert {'from scratch', 'the average box'} & set(r.baselines) and len(r.per_image()) == 3
    assert load_records(tmp_path)[0].value == r.value
    frozen = detection(
        encoder,
        data,
        steps=2,
        batch_size=2,
        progress='quiet',
        freeze='encoder',
        baselines=False,
        **small,
    )
    assert frozen.protocol == 'detection'


def test_crowds_are_not_learned_and_difficult_objects_are():
    o = Objects([[1, 1, 9, 9], [2, 2, 20, 20], [3, 3, 30, 30]], [0, 1, 2], [0, 1, 0], [0, 0, 1])
    store = BoxImages([torch.zeros(3, 32, 32, dtype=torch.uint8)], [o], shapes).dense()
    _, targets = Detection(classes=6).batch(store, [0], None, train=False)
    assert targets[0]['labels'].tolist() == [1, 3]


def test_a_picture_shows_what_was_found():
    data = detection_data('collages', n_train=1, n_test=3, side=32)
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), scores=torch.zeros(0))
    fig = show_detections(data.test, [none] * 3, cols=2)
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert len(titles) == 6 and titles.count('AP50 0.00, 0 below 0.5') == 3


def test_detection_in_a_shell(tmp_path, capsys):
    write_penn_fudan(tmp_path / 'penn')
    save_encoder(resnet('resnet18', 32, 'half', width=8), tmp_path / 'encoder.safetensors')
    words = ['--encoder', tmp_path / 'encoder.safetensors', '--data', tmp_path / 'penn']
    words += ['--protocols', 'detection', '--out', tmp_path / 'out', '--settings']
    words += [
        f'detection.{w}' for w in ('test=2', 'side=32', 'steps=2', 'batch_size=2', 'hidden=16')
    ]
    words += ['detection.channels=16', 'detection.masks=True', 'detection.mask_channels=8']
    main(['probe', *map(str, words)])
    assert 'fine-tuning, instance masks' in capsys.readouterr().out
    (r,) = load_records(tmp_path / 'out')
    assert (r.n_train, r.n_test, r.settings['masks']) == (3, 2, True) and 'mask AP' in r.chosen
    with pytest.raises(SystemExit, match='2'):
        main(['probe', *map(str, words), 'detection.stepz=2'])
    assert "did you mean 'steps'" in capsys.readouterr().err

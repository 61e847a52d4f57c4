"""Every reader of files, on files that were changed at random: bits flipped, cut, spliced, or with
other values in their JSON. What comes back is an answer or an error that the library words: never a
raw one of some inner line, and nothing that a file says is run."""

import copy
import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from ssl_patch.data.box_files import penn_fudan_boxes, voc_boxes
from ssl_patch.data.depths import open_depths
from ssl_patch.data.detection_sets import coco_boxes
from ssl_patch.data.folders import read_pack
from ssl_patch.data.masks import folder_masks
from ssl_patch.data.sources import images
from ssl_patch.data.video_sources import read_hmdb51, read_kinetics, read_ucf101
from ssl_patch.evaluation.records import Record, load_records
from ssl_patch.models.encoders import vit
from ssl_patch.models.files import load_encoder, open_encoder, save_encoder
from ssl_patch.reports.campaign import read_plan
from ssl_patch.reports.runs import load_run, read_runs
from ssl_patch.training.run_folder import read_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore')
FEW = dict(deadline=None, derandomize=True, database=None)
QUIET = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], **FEW
)
WORDED = ValueError, FileNotFoundError  # what readers promise; both name the file

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(['__import__("os")', '../../x', '1e999', 'nan']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@st.composite
def damaged(draw, data):
    "Bytes with one to three changes: flipped, cut, spliced, doubled or filled."
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(['flip', 'cut', 'fill', 'insert', 'double']))
        some = draw(st.binary(min_size=1, max_size=6))
        if kind == 'flip' and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 'cut':
            del data[at:]
        elif kind == 'fill':
            data[at : at + len(some)] = some
        elif kind == 'insert':
            data[at:at] = some
        else:
            data[at:at] = data[at : at + 40]
    return bytes(data)


def _paths(tree, so_far=()):
    yield so_far
    if isinstance(tree, dict):
        for k, v in tree.items():
            yield from _paths(v, (*so_far, k))
    elif isinstance(tree, list):
        for k, v in enumerate(tree):
            yield from _paths(v, (*so_far, k))


@st.composite
def other_values(draw, tree):
    "The same JSON with one value replaced, or one entry left out."
    tree = copy.deepcopy(tree)
    path = draw(st.sampled_from(list(_paths(tree))))
    if not path:
        return json.dumps(draw(json_values))
    inner = tree
    for k in path[:-1]:
        inner = inner[k]
    if draw(st.booleans()):
        inner[path[-1]] = draw(json_values)
    else:
        del inner[path[-1]]
    return json.dumps(tree)


def survives(read):
    "Whether reading ends in an answer or in an error with words; anything else is raised."
    try:
        read()
    except WORDED as e:
        assert str(e).strip(), 'an error without words'


RECORD = dict(
    protocol='knn',
    value=0.5,
    encoder='MoCo v2',
    data='cifar10',
    chance=0.1,
    architecture='resnet',
    settings=dict(k=20),
    n_train=10,
    n_test=10,
    n_classes=2,
    baselines={'raw pixels': 0.3},
    seed=0,
)
CONFIG = dict(
    method='MoCo v2',
    slots=dict(loss='InfoNCELoss(tau=0.1)', queue=None),
    encoder=dict(kind='resnet', name='resnet18', size=32),
    train_config=dict(epochs=2, batch_size=8),
    lr=0.1,
    seed=0,
    data=dict(name='cifar10', train=10),
    augmentations=[dict(size=32, flip=0.5)],
    versions=dict(torch='2'),
)
METRICS = 'epoch,loss,knn\n1,2.5,\n2,2.25,0.5\n'
PLAN = (
    '[plan]\nfolder = runs\nrecords = r.jsonl\nprobe = --protocols knn\nseeds = 0 1\n\n'
    '[MoCo v2]\npretrain = --method moco_v2\npriority = 1\n'
)


@QUIET
@given(text=damaged(PLAN.encode()))
def test_plans(text, tmp_path):
    file = tmp_path / 'plan.ini'
    file.write_bytes(text)
    survives(lambda: read_plan(file))


@QUIET
@given(line=other_values(RECORD) | damaged(json.dumps(RECORD).encode()))
def test_records(line, tmp_path):
    Record.from_dict(RECORD)
    file = tmp_path / 'records.jsonl'
    file.write_bytes(line if isinstance(line, bytes) else line.encode())
    survives(lambda: load_records(file))


@QUIET
@given(
    config=other_values(CONFIG) | damaged(json.dumps(CONFIG).encode()),
    metrics=damaged(METRICS.encode()),
)
def test_run_folders(config, metrics, tmp_path):
    (tmp_path / 'config.json').write_bytes(config if isinstance(config, bytes) else config.encode())
    (tmp_path / 'metrics.csv').write_bytes(metrics)
    survives(lambda: load_run(tmp_path))


RUN = dict(run='a_seed0', config=CONFIG, metrics=dict(epoch=[1.0], loss=[2.0]), records=[RECORD])


@QUIET
@given(line=other_values(RUN) | damaged(json.dumps(RUN).encode()))
def test_files_of_runs(line, tmp_path):
    file = tmp_path / 'runs.jsonl'
    file.write_bytes(line if isinstance(line, bytes) else line.encode())
    survives(lambda: read_runs(file))


@pytest.fixture(scope='module')
def encoder_file(tmp_path_factory):
    net = vit('tiny', size=16, patch=4, width=16, depth=1, heads=1)
    return save_encoder(net, tmp_path_factory.mktemp('e') / 'e.safetensors').read_bytes()


@QUIET
@given(data=st.data())
def test_encoders(data, encoder_file, tmp_path):
    file = tmp_path / 'e.safetensors'
    length = 8 + struct.unpack('<Q', encoder_file[:8])[0]
    head = data.draw(damaged(encoder_file[:length]))
    file.write_bytes(head + encoder_file[length:])
    survives(lambda: load_encoder(file))
    file.write_bytes(encoder_file[:length] + data.draw(damaged(encoder_file[length:])))
    survives(lambda: open_encoder(file))


@pytest.fixture(scope='module')
def checkpoint():
    kept = io.BytesIO()
    torch.save(dict(identity=dict(encoder='{}'), method={'w': torch.zeros(3)}), kept)
    return kept.getvalue()


@QUIET
@given(data=st.data())
def test_checkpoints(data, checkpoint, tmp_path):
    file = tmp_path / 'checkpoint.pt'
    file.write_bytes(data.draw(damaged(checkpoint)))
    survives(lambda: read_checkpoint(file))
    survives(lambda: open_encoder(file))


def picture(side=12, mode='RGB', kind='PNG'):
    kept, shape = io.BytesIO(), (side, side, 3) if mode == 'RGB' else (side, side)
    kinds = np.uint16 if mode == 'I;16' else np.uint8
    x = (np.arange(np.prod(shape)) % 3).reshape(shape).astype(kinds)
    Image.fromarray(x).save(kept, kind)
    return kept.getvalue()


@pytest.fixture(scope='module')
def pack():
    one, kept = picture(kind='JPEG'), io.BytesIO()
    np.savez(
        kept,
        jpeg=np.frombuffer(one * 4, np.uint8),
        offsets=np.arange(5) * len(one),
        label=np.array([0, 1, 0, 1], np.int16),
        split=np.array([0, 0, 1, 1], np.uint8),
        classes=np.array(['cat', 'dog']),
    )
    return kept.getvalue()


@QUIET
@given(data=st.data())
def test_packs(data, pack, tmp_path):
    file = tmp_path / 'pack.npz'
    file.write_bytes(data.draw(damaged(pack)))
    survives(lambda: read_pack(file))
    survives(lambda: images(str(file), size=16))


ARRAYS = st.sampled_from(
    [
        np.zeros(0, np.int64),
        np.array(3),
        np.array([0.5, 1.5]),
        np.array([[1, 2]]),
        np.array(['a', 'b']),
        np.array([2**63 - 1, -5]),
        np.array([True, False]),
        np.zeros((2, 2, 2)),
        np.array([1 + 2j, 0]),
        np.array(['2020-01-01', 'NaT'], 'datetime64[s]'),
    ]
)


@QUIET
@given(key=st.sampled_from(['jpeg', 'offsets', 'label', 'split', 'classes']), array=ARRAYS)
def test_packs_of_other_arrays(key, array, pack, tmp_path):
    with np.load(io.BytesIO(pack)) as z:
        arrays = dict(z) | {key: array}
    file = tmp_path / 'pack.npz'
    np.savez(file, **arrays)
    survives(lambda: images(str(file), size=16))


@QUIET
@given(data=damaged(picture(mode='L')))
def test_masks(data, tmp_path):
    for part in ('images', 'masks'):
        (tmp_path / 'train' / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / 'train' / part / 'a.png').write_bytes(data if part == 'masks' else picture())
    survives(lambda: folder_masks(tmp_path, classes=['x', 'y', 'z']))


ARRAY = io.BytesIO()
np.save(ARRAY, np.ones((4, 4), np.float32))


@QUIET
@given(data=damaged(picture(mode='I;16')) | damaged(ARRAY.getvalue()))
def test_depths(data, tmp_path):
    file = 'a.npy' if b'NUMPY' in data else 'a.png'
    for part in ('images', 'depth'):
        (tmp_path / 'train' / part).mkdir(parents=True, exist_ok=True)
    (tmp_path / 'train/images/a.png').write_bytes(picture())
    for old in (tmp_path / 'train/depth').iterdir():
        old.unlink()
    (tmp_path / 'train/depth' / file).write_bytes(data)
    survives(lambda: open_depths(tmp_path))


@QUIET
@given(data=st.lists(damaged(picture(kind='JPEG')), min_size=3, max_size=3))
def test_folders_of_images(data, tmp_path):
    for k, (one, part) in enumerate(zip(data, ('a', 'a', 'b'))):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / f'{k}.jpg').write_bytes(one)
    survives(lambda: images(str(tmp_path), size=8))


XML = (
    '<annotation><size><width>12</width><height>12</height><depth>3</depth></size>'
    '<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>2</ymin>'
    '<xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>'
)


@QUIET
@given(xml=damaged(XML.encode()), listing=damaged(b'000001\n'))
def test_voc(xml, listing, tmp_path):
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / 'JPEGImages/000001.jpg').write_bytes(picture(kind='JPEG'))
    (tmp_path / 'Annotations/000001.xml').write_bytes(xml)
    for text in (b'000001\n', listing):
        (tmp_path / 'ImageSets/Main/train.txt').write_bytes(text)
        survives(lambda: voc_boxes(tmp_path, 'train'))


COCO = dict(
    images=[dict(id=1, file_name='1.jpg', height=12, width=12)],
    annotations=[
        dict(
            image_id=1,
            category_id=3,
            bbox=[1, 1, 5, 5],
            iscrowd=0,
            segmentation=[[1, 1, 5, 1, 5, 5]],
        ),
        dict(
            image_id=1,
            category_id=3,
            bbox=[1, 1, 5, 5],
            segmentation=dict(counts=[10, 134], size=[12, 12]),
        ),
    ],
    categories=[dict(id=3, name='cat'), dict(id=4, name='dog')],
)


@settings(QUIET, max_examples=150)
@given(text=other_values(COCO) | damaged(json.dumps(COCO).encode()))
def test_coco(text, tmp_path):
    (tmp_path / '1.jpg').write_bytes(picture(kind='JPEG'))
    file = tmp_path / 'instances.json'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())

    def read():
        store = coco_boxes(tmp_path, file)
        for i in range(len(store)):
            store.objects[i].masks and store.objects[i].masks.read()

    survives(read)


@QUIET
@given(data=damaged(picture(mode='L')))
def test_penn_fudan(data, tmp_path):
    for name in ('PNGImages', 'PedMasks'):
        (tmp_path / name).mkdir(exist_ok=True)
    for k in range(2):
        (tmp_path / f'PNGImages/{k}.png').write_bytes(picture())
        (tmp_path / f'PedMasks/{k}_mask.png').write_bytes(data)
    survives(lambda: penn_fudan_boxes(tmp_path, test=1))


@QUIET
@given(data=st.data())
def test_lists_of_videos(data, tmp_path):
    ucf = dict(
        classInd=b'1 Jump\n2 Run\n',
        trainlist01=b'Jump/v_1.avi 1\nRun/v_2.avi 2\n',
        testlist01=b'Jump/v_3.avi\n',
    )
    for name, text in ucf.items():
        (tmp_path / f'{name}.txt').write_bytes(data.draw(damaged(text)))
    survives(lambda: read_ucf101(tmp_path, 1))
    (tmp_path / 'jump_test_split1.txt').write_bytes(data.draw(damaged(b'a.avi 1\nb.avi 2\n')))
    survives(lambda: read_hmdb51(tmp_path, 1))
    text = b'label,youtube_id,time_start,time_end,split\njump,abc,1,11,train\n'
    for part in ('train', 'val'):
        (tmp_path / f'{part}.csv').write_bytes(data.draw(damaged(text)))
    survives(lambda: read_kinetics(tmp_path))


def test_an_archive_does_not_write_outside(tmp_path):
    "A packed file whose entries are named as paths is read, and makes no file."
    file = tmp_path / 'in' / 'pack.npz'
    file.parent.mkdir()
    with zipfile.ZipFile(file, 'w') as z:
        z.writestr('../../evil.npy', b'x')
        z.writestr('/tmp/evil_of_a_pack.npy', b'x')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError, match='packed'):
        read_pack(file)
    assert sorted(tmp_path.rglob('*')) == before

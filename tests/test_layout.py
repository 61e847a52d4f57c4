"What folders mean: parts, classes, and what is told of the rest."

import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_patch.data.folders import pack
from ssl_patch.data.layout import ENDINGS, find_copies, find_masks, find_parts, split_kind, walk
from ssl_patch.data.sources import images

REAL = Path(os.environ.get('SSL_PATCH_DATA') or '/nowhere')


def write(path, seed=0, side=24, mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(x).convert(mode).save(path)


def tree(root, **parts):
    "Images below root: tree(root, **{'train/cat': 3})."
    for i, (folder, n) in enumerate(parts.items()):
        for k in range(n):
            write(root / folder / f'{k}.png', 100 * i + k)
    return root


def told(f, *args, **how):
    "What a call gives, and the sentences that it warns of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return f(*args, **how), [str(w.message) for w in caught]


# ---- names


@pytest.mark.parametrize(
    'name, kind',
    [
        ('train', 'train'),
        ('Training', 'train'),
        ('TRAIN_SET', 'train'),
        ('Train_data', 'train'),
        ('trainImages', 'train'),
        ('Training Data', 'train'),
        ('test_set', 'test'),
        ('Testing', 'test'),
        ('tests', 'test'),
        ('TestImages', 'test'),
        ('val', 'val'),
        ('Validation', 'val'),
        ('valid', 'val'),
        ('dev_set', 'val'),
        ('unlabeled', 'other'),
        ('extra', 'other'),
    ],
)
def test_names_of_parts(name, kind):
    assert split_kind(name) == (kind, '')


@pytest.mark.parametrize('name', ['bus', 'trainer', 'train_station', 'contest', 'valley', 'device'])
def test_names_that_are_no_parts(name):
    assert split_kind(name) == ('', name) or split_kind(name)[1] != ''


# ---- parts


NESTED = {'seg_train/seg_train/a': 1, 'seg_test/seg_test/a': 1}
AROUND = {'archive/data/train/a': 1, 'archive/data/test/a': 1}
TWICE = {'chest/train/a': 1, 'chest/test/a': 1, 'chest/chest/train/a': 1}
LAYOUTS = [
    (dict(train=1, bus=1, car=1), '.', None),
    (dict(train=1), 'train', None),
    ({'train/a': 1, 'test/a': 1}, 'train', 'test'),
    ({'train/a': 1, 'val/a': 1, 'test/a': 1}, 'train', 'test'),
    ({'Train/a': 1, 'Valid/a': 1}, 'Train', 'Valid'),
    ({'training_set/a': 1, 'test_set/a': 1}, 'training_set', 'test_set'),
    (NESTED, 'seg_train/seg_train', 'seg_test/seg_test'),
    ({'asl_train/a': 1, 'asl_test/a': 1, 'bus': 1}, 'asl_train', 'asl_test'),
    (AROUND, 'archive/data/train', 'archive/data/test'),
    (TWICE, 'chest/train', 'chest/test'),
    (dict(train=1, unlabeled=1, extra=1), 'train', None),
    (dict(train=1, train_masks=1), 'train', None),
    ({'train2017': 1, 'val2017': 1, 'VOCdevkit/JPEGImages': 1}, 'train2017', 'val2017'),
    (dict(cat=1, dog=1), '.', None),
    ({'pets/cat': 1, 'pets/dog': 1}, '.', None),
    (dict(train_station=1, bus_station=1), '.', None),
]


@pytest.mark.parametrize('files, train, test', LAYOUTS, ids=lambda v: ' '.join(v) if v else None)
def test_parts(tmp_path, files, train, test):
    parts = find_parts(tree(tmp_path, **files))
    assert parts.train == tmp_path / train
    assert parts.test == (test and tmp_path / test)
    assert parts.sure


def test_a_class_called_train(tmp_path):
    d, said = told(images, tree(tmp_path / 'vehicles', bus=5, car=5, train=5))
    assert (len(d.train), d.classes, d.test, said) == (15, ['bus', 'car', 'train'], None, [])


@pytest.mark.parametrize('train, test', [('Training', 'Testing'), ('training_set', 'test_set')])
def test_parts_under_other_names(tmp_path, train, test):
    classes = ('glioma', 'notumor', 'pituitary')
    files = {f'{p}/{c}': n for p, n in ((train, 8), (test, 4)) for c in classes}
    d, said = told(images, tree(tmp_path / 'scans', **files))
    assert (len(d.train), len(d.test), d.classes, said) == (24, 12, list(classes), [])


def test_several_data_sets_are_an_error(tmp_path):
    tree(tmp_path, train2014=1, val2014=1, train2017=1, val2017=1)
    with pytest.raises(ValueError, match="several train parts: 'train2014', 'train2017'"):
        images(tmp_path)
    tree(tmp_path / 'b', train_set=1, Training_data=1, test=1)
    with pytest.raises(ValueError, match="'Training_data' and 'train_set'"):
        images(tmp_path / 'b')


def test_parts_without_a_train_part_are_no_classes(tmp_path):
    d, said = told(images, tree(tmp_path, test=2, val=2))
    assert len(d.train) == 4 and d.classes is None
    assert len(said) == 1 and 'test, val' in said[0]


def test_imagenet_is_read_by_its_names(tmp_path):
    tree(tmp_path / 'imagenet', **{'train/a': 1, 'train/b': 1, 'val/a': 1, 'test': 3})
    d, said = told(images, 'imagenet', root=tmp_path)
    assert (len(d.train), len(d.test), said) == (2, 1, [])


# ---- what is not read is told


def test_all_that_is_not_read_is_counted_and_named(tmp_path):
    root = tmp_path / 'pets'
    files = {'train/a': 2, 'train/b': 2, 'test/a': 2, 'val/a': 3, 'unlabeled': 4, 'extra': 1}
    tree(root, **files)
    for name in ('train/a/x.heix', 'train/b/notes.txt', 'train/b/0002', 'labels.csv'):
        (root / name).write_text('x')
    (root / 'train/b/lost').symlink_to('nowhere')
    (root / 'train/b/again').symlink_to(root / 'train/a')
    (root / 'train/b/Thumbs.db').write_text('x')
    (root / 'train/c').mkdir()
    d, said = told(images, root)
    assert (len(d.train), len(d.test), d.classes) == (4, 2, ['a', 'b'])
    assert len(said) == 1
    for words in (
        '.heix: 1 (a/x.heix)',
        '.txt: 1 (b/notes.txt)',
        'files without ending: 1 (b/0002)',
        'dead links: 1 (b/lost)',
        'second links to a folder: 1 (b/again)',
        'empty folders: 1 (c)',
        'files in val: 3',
        'files in unlabeled: 4',
        'files in extra: 1',
        'files beside the parts: 1 (labels.csv)',
    ):
        assert words in said[0], words
    assert 'Thumbs' not in said[0]
    assert told(pack, root, tmp_path / 'p.npz')[1] == said  # the same folder, the same words


def test_a_folder_that_cannot_be_opened_is_told(tmp_path, monkeypatch):
    tree(tmp_path, a=1, b=1)
    plain = os.scandir
    closed = lambda p: (
        plain(p)
        if not str(p).endswith('/b')
        else (_ for _ in ()).throw(PermissionError(13, 'Permission denied', str(p)))
    )
    monkeypatch.setattr(os, 'scandir', closed)
    paths, left = walk(tmp_path)
    assert paths == ['a/0.png'] and left == {'folders that cannot be opened': ['b']}


@pytest.mark.parametrize('end', ['jfif', 'jpe', 'avif', 'jp2', 'tga', 'JPG', 'dib'])
def test_endings(tmp_path, end):
    assert f'.{end.lower()}' in ENDINGS
    kinds = dict(jfif='JPEG', jpe='JPEG', JPG='JPEG', dib='BMP', jp2='JPEG2000')
    try:
        for i in range(2):
            x = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(x).save(tmp_path / f'{i}.{end}', kinds.get(end, end.upper()))
    except (KeyError, OSError):
        pytest.skip(f'this PIL does not write {end}')
    d, said = told(images, tmp_path)
    assert len(d.train) == 2 and not said


def test_a_dead_link_to_an_image_is_skipped_and_named(tmp_path):
    tree(tmp_path, a=2, b=2)
    (tmp_path / 'a/9.png').symlink_to('nowhere.png')
    d, said = told(images, tmp_path)
    assert len(d.train) == 4 and d.train.skipped[0][0] == 'a/9.png'
    assert len(said) == 1 and '1 of 5 images cannot be read' in said[0]


def test_images_beside_class_folders_are_told(tmp_path):
    tree(tmp_path, a=2, b=2)
    write(tmp_path / 'cover.png')
    d, said = told(images, tmp_path)
    assert len(d.train) == 5 and d.classes is None
    assert len(said) == 1 and '1 of 5 images lie beside' in said[0] and 'cover.png' in said[0]
    assert not told(images, tmp_path, labelled=False)[1]


def test_splits_of_a_pack_that_are_not_read_are_told(tmp_path):
    z = dict(np.load(pack(tree(tmp_path / 'x', a=3, b=3), tmp_path / 'p.npz')))
    np.savez(tmp_path / 'q.npz', **{**z, 'split': np.array([0, 0, 1, 2, 2, 3], np.uint8)})
    d, said = told(images, tmp_path / 'q.npz')
    assert (len(d.train), len(d.test)) == (2, 1)
    assert len(said) == 1 and '3 images of split 2, 3 are not used' in said[0]


# ---- what is suspicious is told


def smooth(seed, side=48):
    "A picture with many colours."
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(7 * (a * x + b * y)) for a, b in g.random((3, 2))]
    return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


def save(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


def test_masks_in_a_folder_of_their_own_are_told(tmp_path):
    for i in range(6):
        save(tmp_path / f'photos/{i}.png', smooth(i))
        save(tmp_path / f'Y/{i}.png', (smooth(i)[..., 0] > 99).astype(np.uint8))
    d, said = told(images, tmp_path)
    assert len(d.train) == 12 and len(said) == 1  # they are read, and told
    assert '6 of 12 images look like masks' in said[0] and '6 in Y' in said[0]


def test_masks_beside_their_images_are_told(tmp_path):
    for i in range(4):
        for c in ('benign', 'malignant'):
            save(tmp_path / f'{c}/{c} ({i}).png', smooth(i))
            save(
                tmp_path / f'{c}/{c} ({i})_mask.png',
                255 * (smooth(i)[..., 0] > 99).astype(np.uint8),
            )
    assert find_masks(tmp_path, walk(tmp_path)[0]) == dict(benign=4, malignant=4)


def test_people_with_masks_are_no_masks(tmp_path):
    for i in range(6):
        save(tmp_path / f'with_mask/{i}.png', smooth(i))
        save(tmp_path / f'without_mask/{i}.png', smooth(i + 10))
    d, said = told(images, tmp_path)
    assert d.classes == ['with_mask', 'without_mask'] and not said


def test_digits_with_equal_names_are_no_masks(tmp_path):
    for c in range(3):
        for i in range(5):
            save(tmp_path / f'{c}/{i}.png', smooth(10 * c + i)[..., 0])
    assert not told(images, tmp_path)[1]


def test_copies_are_told(tmp_path):
    for i in range(5):
        save(tmp_path / f'all/IMG_{i}.png', smooth(i))
        save(tmp_path / f'some/IMG_{i}.png', smooth(i if i < 3 else i + 50))
    d, said = told(images, tmp_path)
    assert len(d.train) == 10 and len(said) == 1 and '3 of 10 images are copies' in said[0]
    assert find_copies(tmp_path, walk(tmp_path)[0])[0] == ('some/IMG_0.png', 'all/IMG_0.png')


def test_test_folders_further_down_are_told(tmp_path):
    tree(
        tmp_path,
        **{
            'bottle/train/good': 2,
            'bottle/test/bad': 3,
            'cable/train/good': 2,
            'cable/test/bad': 1,
        },
    )
    d, said = told(images, tmp_path)
    assert d.classes == ['bottle', 'cable'] and len(d.train) == 8
    assert len(said) == 1 and '4 of 8 training images' in said[0] and 'bottle/test' in said[0]


@pytest.mark.skipif(not (REAL / 'coco100_voc.tar').is_file(), reason='no coco100_voc.tar')
def test_the_root_of_a_real_data_set(tmp_path):
    "Photographs, the same again, and their masks: 331 files that are images."
    with tarfile.open(REAL / 'coco100_voc.tar') as tar:
        tar.extractall(tmp_path, filter='data')
    assert len(walk(tmp_path)[0]) == 331
    d, said = told(images, tmp_path)
    assert (len(d.train), len(d.test)) == (50, 50)
    assert len(said) == 1 and 'files in coco100/VOCdevkit: 314' in said[0]
    d, said = told(images, tmp_path / 'coco100/VOCdevkit/VOC2012')
    assert any('154 of 231 images look like masks' in s for s in said)


def test_names_break_no_sentence(tmp_path):
    tree(tmp_path, a=2, b=2)
    for name in ('a/one\ntwo.png', 'b/\x1b[31mred.png', 'b/three\nfour.txt'):
        (tmp_path / name).write_text('no picture')
    said = told(images, tmp_path)[1]
    assert len(said) == 2 and all(s.isprintable() for s in said)
    assert 'one\\ntwo.png' in said[1] and 'three\\nfour.txt' in said[0]

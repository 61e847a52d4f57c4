"Image stores: bad input, packing, streaming, workers, known sets."

import io
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ssl_patch.data import decoding as decoding_room
from ssl_patch.data import images as images_room
from ssl_patch.data import photographs as photographs_room
from ssl_patch.data.decoding import decode
from ssl_patch.data.files import ByteFiles, BytePack, FileImages, map_array
from ssl_patch.data.fingerprints import can_fingerprint, copies
from ssl_patch.data.folders import pack
from ssl_patch.data.images import (
    ImageData,
    TensorImages,
    pixel_stats,
    resize_center_crop,
    show_images,
)
from ssl_patch.data.photographs import photo, photo_crops, photo_names, photo_regions
from ssl_patch.data.sources import images


def picture(seed, h=24, w=24):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def write(path, x, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **kw)


@pytest.fixture
def folder(tmp_path):
    "4 train and 2 test PNGs, two classes."
    root = tmp_path / 'pets'
    for i, name in enumerate(
        ['train/a/0', 'train/a/1', 'train/b/2', 'train/b/3', 'test/a/4', 'test/b/5']
    ):
        write(root / f'{name}.png', picture(i))
    return root


def quiet(f):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f()


# --- the photographs
def test_photos_are_there_without_a_download(monkeypatch):
    import socket

    monkeypatch.setattr(socket, 'socket', lambda *a, **k: pytest.fail('went to the network'))
    for name in photo_names():
        x = photo(name)
        assert (
            x.dtype == torch.uint8
            and x.shape[0] == 3
            and min(x.shape[1:]) >= 300
            and x.float().std() > 2
        ), name


def test_photo_equals_scikit_image():
    import skimage.data

    assert np.array_equal(photo('coffee').permute(1, 2, 0).numpy(), skimage.data.coffee())
    assert np.array_equal(photo('camera')[1].numpy(), skimage.data.camera())


def test_missing_scikit_image_says_what_to_install(monkeypatch):
    monkeypatch.setattr(photographs_room.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ssl_patch\[demo\]'"):
        images('photos')


@pytest.mark.parametrize('size', [16, 32, 64])
def test_photo_regions_do_not_touch(size):
    "Crops of a picture whose pixels are numbered: the train part has no number of the test part."
    for name in photo_names():
        h, w = photographs_room._resized_photo(name, size).shape[1:]
        numbers = torch.arange(h * w).view(1, h, w).expand(3, -1, -1)
        a, b = (
            photographs_room._random_crops(
                numbers, box, 300, size, torch.Generator().manual_seed(0)
            )[0]
            for box in photo_regions(h, w)
        )
        assert (a % w).max() + 8 < (b % w).min(), name
        assert 0 <= a.min() and b.max() < h * w


def test_photos_are_deterministic_balanced_and_worth_learning():
    d, again, other = photo_crops(), photo_crops(), photo_crops(seed=1)
    assert torch.equal(d.train.images, again.train.images)
    assert not torch.equal(d.train.images, other.train.images)
    assert d.train.labels.bincount().tolist() == [300] * 14
    assert d.test.labels.bincount().tolist() == [72] * 14
    mean = d.train.images.float().mean((0, 2, 3), keepdim=True)
    a, b = (
        torch.nn.functional.normalize((s.images - mean).flatten(1), dim=1)
        for s in (d.train, d.test)
    )
    near = d.train.labels[(b @ a.T).topk(20, 1).indices]
    raw = (near.mode(1).values == d.test.labels).float().mean()
    assert 0.25 < raw < 0.42
    assert 'photograph' in d.note


@pytest.mark.parametrize('size', [0, -1, 'x', 300, 2.5])
def test_photos_bad_size(size):
    with pytest.raises(ValueError, match='size'):
        images('photos', size=size)


# --- decoding
@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'P', 'LA', '1', 'CMYK', 'I;16'])
def test_every_mode_becomes_three_channels(mode):
    b = io.BytesIO()
    if mode == 'I;16':
        Image.fromarray((picture(0)[..., 0].astype(np.uint16) << 8) + 7).save(b, 'PNG')
    else:
        Image.fromarray(picture(0)).convert(mode).save(b, 'TIFF' if mode == 'CMYK' else 'PNG')
    x = decode(b.getvalue())
    assert x.dtype == torch.uint8 and x.shape == (3, 24, 24)
    if mode == 'I;16':
        assert np.array_equal(x[2].numpy(), picture(0)[..., 0])
    if mode == 'RGB':
        assert np.array_equal(x.permute(1, 2, 0).numpy(), picture(0))


def jpeg(mode='RGB', orientation=None, **how):
    "A smooth JPEG of 96 x 64 pixels."
    if orientation is not None:
        how['exif'] = exif(orientation)
    b = io.BytesIO()
    Image.fromarray(
        resize_center_crop(photo('chelsea'), 96)[:, :64].permute(1, 2, 0).numpy()
    ).convert(mode).save(b, 'JPEG', **how)
    return b.getvalue()


def exif(orientation):
    e = Image.Exif()
    e[274] = orientation
    return e


@pytest.mark.parametrize(
    'how',
    [
        dict(),
        dict(subsampling=0),
        dict(subsampling=1),
        dict(progressive=True),
        dict(quality=10),
        dict(restart_marker_blocks=2),
        dict(mode='L'),
        dict(mode='CMYK'),
        dict(keep_rgb=True),
        *(dict(orientation=o) for o in range(10)),
    ],
    ids=str,
)
def test_both_decoders_give_the_same_pixels(how):
    "torchvision's and PIL's, of every kind of JPEG, and cut small."
    data = jpeg(**how)
    assert torch.equal(decode(data), decoding_room._decode_pil(data))
    assert torch.equal(
        decode(data, 40), resize_center_crop(decoding_room._decode_pil(data).contiguous(), 40)
    )


def test_orientation_is_applied(monkeypatch):
    "Noted as EXIF (both decoders), and as XMP, which PIL alone reads."
    smooth, upright = decode(jpeg(quality=95)).permute(1, 2, 0).numpy(), jpeg(quality=95)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = torch.from_numpy(np.rot90(smooth, -1).copy()).permute(
        2, 0, 1
    )  # by 90 degrees clockwise
    for data in (jpeg(quality=95, orientation=6), jpeg(quality=95, xmp=xmp)):
        x = decode(data)
        assert x.shape == (3, 96, 64) and (x.float() - turned).abs().mean() < 8
    # without torchvision's decoder
    monkeypatch.setattr(decoding_room, 'torchvision_op', lambda name: None)
    assert torch.equal(decode(upright).permute(1, 2, 0), torch.from_numpy(smooth))
    assert decode(jpeg(orientation=6)).shape == (3, 96, 64)


def test_broken_jpegs_are_broken_for_both():
    "Cut at any place, or with damaged pixels: both decoders raise, or both give the same."
    data, g = jpeg(), np.random.default_rng(0)
    cut = [data[:n] for n in range(2, len(data) - 2, 61)]
    for bad in cut:
        with pytest.raises(OSError):
            decode(bad)
    for _ in range(30):
        bad = bytearray(data)
        bad[g.integers(700, len(data) - 2)] = g.integers(256)
        try:
            want = decoding_room._decode_pil(bytes(bad))
        except OSError:
            want = None
        if want is not None:
            assert torch.equal(decode(bytes(bad)), want)
        else:
            with pytest.raises(OSError):
                decode(bytes(bad))


def test_decoding_warns_of_nothing(tmp_path):
    "torchvision's own functions warn at every call."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        decode(jpeg())


# --- bad input
BAD = [
    (lambda t: images(t / 'nowhere'), FileNotFoundError, 'nowhere'),
    (lambda t: images(str(t / 'nowhere.npz')), FileNotFoundError, 'nowhere'),
    (lambda t: images(t), FileNotFoundError, 'no images'),
    (lambda t: images('cifar11'), FileNotFoundError, "'cifar11'.*photos.*did you mean 'cifar10'"),
    (
        lambda t: images('qqqq'),
        FileNotFoundError,
        "no folder or file 'qqqq'; images are in a folder, a packed .npz, .tar files, or one of",
    ),
    (
        lambda t: images(np.zeros((4, 8, 8, 3), np.float32)),
        ValueError,
        'images must be uint8.*float32',
    ),
    (lambda t: images(torch.rand(4, 3, 8, 8)), ValueError, 'images must be uint8'),
    (lambda t: images(np.zeros((4, 8, 8, 5), np.uint8)), ValueError, 'images must be uint8'),
    (lambda t: images(np.zeros((8, 8, 3), np.uint8)), ValueError, 'one picture'),
    (lambda t: images(np.zeros((0, 8, 8, 3), np.uint8)), ValueError, 'images must be uint8'),
    (lambda t: images(np.zeros(7, np.uint8)), ValueError, 'images must be uint8'),
    (lambda t: images(np.array(['a', 'b'])), ValueError, 'images must be uint8'),
    (lambda t: images(7), ValueError, 'images must be uint8'),
    (lambda t: images((np.zeros((4, 8, 8, 3), np.uint8), [0, 1])), ValueError, 'for 4 images'),
    (lambda t: images((np.zeros((2, 8, 8, 3), np.uint8), [0.5, 1.0])), ValueError, 'whole numbers'),
    (
        lambda t: images((np.zeros((2, 8, 8, 3), np.uint8), [0, 3], ['a', 'b'])),
        ValueError,
        '-1 .none. to 1',
    ),
    (
        lambda t: images(np.zeros((4, 8, 8), np.uint8), test_fraction=1.5),
        ValueError,
        'test_fraction must be .* below 1, got 1.5',
    ),
    (
        lambda t: images(np.zeros((4, 8, 8), np.uint8), test_fraction=0.01),
        ValueError,
        'test_fraction must .* got 0.01: 4 for train and 0 for test',
    ),
    (lambda t: images('photos', test_fraction=0.5), ValueError, 'test part already'),
    (
        lambda t: images(np.zeros((4, 8, 8), np.uint8), size=0),
        ValueError,
        'size must be .* at least 1.* got 0',
    ),
    (lambda t: images('imagenet', root=t), FileNotFoundError, 'train/CLASS'),
    (
        lambda t: images('cifar10', root=t, download=False),
        FileNotFoundError,
        'cifar10.npz.*cifar-10-batches-py.*SSL_PATCH_DATA',
    ),
    (lambda t: TensorImages(torch.rand(2, 3, 4, 4)), ValueError, 'torch.uint8'),
    (
        lambda t: photo_crops().train.sample(4201),
        ValueError,
        'n must be .* at least 1 and at most 4200.*photos train, got 4201',
    ),
    (
        lambda t: TensorImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).labelled(),
        ValueError,
        'label',
    ),
    (lambda t: pack(t / 'nowhere', t / 'x.npz'), FileNotFoundError, 'nowhere'),
    (lambda t: pack(t, t / 'x.npz'), FileNotFoundError, 'no images'),
]


@pytest.mark.parametrize('case', range(len(BAD)))
def test_bad_input(case, tmp_path):
    f, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        f(tmp_path)


def test_a_file_that_is_no_pack(tmp_path, folder):
    text = tmp_path / 'text.npz'
    text.write_text('hello')
    with pytest.raises(ValueError, match='not an npz'):
        images(text)
    np.savez(tmp_path / 'other.npz', x=np.zeros(3))
    with pytest.raises(ValueError, match='has jpeg, offsets'):
        images(tmp_path / 'other.npz')
    (tmp_path / 'a.zip').write_text('x')
    with pytest.raises(ValueError, match='a folder of images, a packed .npz, or shards in .tar'):
        images(tmp_path / 'a.zip')
    (tmp_path / 'a.tar').write_text('x')
    with pytest.raises(ValueError, match='not a tar file that is whole'):
        images(tmp_path / 'a.tar')
    good = dict(np.load(pack(folder, tmp_path / 'good.npz')))
    for change, words in (
        (dict(offsets=good['offsets'] + 1), 'offsets do not fit'),
        (dict(label=good['label'][:2]), '2 entries in label'),
        (dict(label=good['label'] + 7), 'for 2 classes'),
        (dict(offsets=np.zeros(1, np.int64)), 'no images'),
        (dict(split=good['split'] * 0 + 1), 'no train images'),
    ):
        np.savez(tmp_path / 'bad.npz', **{**good, **change})
        with pytest.raises(ValueError, match=words):
            images(tmp_path / 'bad.npz')
    cut = (tmp_path / 'good.npz').read_bytes()
    (tmp_path / 'cut.npz').write_bytes(cut[: len(cut) // 2])
    with pytest.raises(ValueError, match='not a packed|not an npz'):
        images(tmp_path / 'cut.npz')


@pytest.mark.parametrize('stream', [None, True])
def test_corrupt_files_are_skipped_named_and_said_once(folder, stream):
    (folder / 'train/a/text.png').write_text('no picture')
    (folder / 'train/b/empty.jpg').write_bytes(b'')
    with pytest.warns(UserWarning) as caught:
        d = images(folder, stream=stream)
    assert len(caught) == 1
    assert '2 of 6' in str(caught[0].message)
    assert 'text.png' in str(caught[0].message)
    assert sorted(n for n, _ in d.train.skipped) == ['a/text.png', 'b/empty.jpg']
    assert len(d.train) == 4
    assert d.train.labels.tolist() == [0, 0, 1, 1] and not d.test.skipped and '2 skipped' in repr(d)
    for i in range(4):
        assert torch.equal(d.train[i], torch.from_numpy(picture(i)).permute(2, 0, 1))


@pytest.mark.parametrize('stream', [None, True, False])
def test_nothing_readable_is_an_error(tmp_path, stream):
    for i in range(70):
        (tmp_path / f'{i}.png').write_text('no picture')
    with pytest.raises(ValueError, match='none of the 70 images'):
        images(tmp_path, stream=stream)


def test_unreadable_at_the_head_of_the_list(tmp_path):
    "More broken files than the sample of headers sees."
    for i in range(130):
        (tmp_path / f'a{i:03d}.png').write_text('no picture')
    write(tmp_path / 'z.png', picture(0))
    d = quiet(lambda: images(tmp_path))
    assert len(d.train) == 1
    assert len(d.train.skipped) == 130
    assert np.array_equal(d.train[0].permute(1, 2, 0), picture(0))


# --- folders
def test_folder_classes_and_splits(folder, tmp_path):
    d = images(folder)
    assert (d.classes, d.train.labels.tolist(), d.test.labels.tolist()) == (
        ['a', 'b'],
        [0, 0, 1, 1],
        [0, 1],
    )
    assert d.name == 'pets'
    assert images(folder, labelled=False).train.labels is None
    write(
        folder / 'train/beside.png', picture(9)
    )  # a picture beside the class folders: they are mere folders
    assert images(folder / 'train').train.labels is None
    assert len(images(folder / 'train').train) == 5
    with pytest.raises(ValueError, match='labelled must be None or False.*got True'):
        images(folder / 'train', labelled=True)


def test_test_classes_follow_train(folder):
    import shutil

    shutil.rmtree(folder / 'test/a')
    write(folder / 'test/zebra/0.png', picture(1))
    with pytest.raises(ValueError, match='zebra'):
        images(folder)
    (folder / 'test/zebra').rename(folder / 'test/b2')
    write(folder / 'train/b2/0.png', picture(2))
    d = images(folder)
    assert d.classes == ['a', 'b', 'b2'] and d.test.labels.tolist() == [1, 2]


def test_nested_hidden_and_val(tmp_path):
    write(tmp_path / 'train/2021/may/0.png', picture(0))
    write(tmp_path / 'train/1.png', picture(1))
    write(tmp_path / 'val/2.png', picture(2))
    write(tmp_path / 'train/.trash/3.png', picture(3))
    (tmp_path / 'train/notes.txt').write_text('x')
    write(tmp_path / 'train/._1.png', picture(4))
    os.symlink(tmp_path / 'train', tmp_path / 'train/2021/loop')
    d = images(tmp_path)
    assert (len(d.train), len(d.test), d.train.labels, d.train.skipped) == (2, 1, None, [])


def test_memory_or_stream(tmp_path):
    for i in range(3):
        write(tmp_path / f'{i}.png', picture(i, 20 + i, 30))
    assert isinstance(images(tmp_path).train, FileImages)  # sizes differ
    assert [tuple(x.shape[1:]) for x in images(tmp_path).train] == [(20, 30), (21, 30), (22, 30)]
    with pytest.raises(ValueError, match='different sizes'):
        images(tmp_path, stream=False)
    small = images(tmp_path, size=16).train
    assert isinstance(small, TensorImages) and small.images.shape == (3, 3, 16, 16)
    limit = 3 * 3 * 16 * 16
    assert isinstance(images(tmp_path, size=16, memory_limit=limit).train, TensorImages)
    streamed = images(tmp_path, size=16, memory_limit=limit - 1).train
    assert isinstance(streamed, FileImages)
    assert torch.equal(torch.stack(list(streamed)), small.images)


def test_a_different_size_late_in_the_list(tmp_path):
    for i in range(200):
        write(tmp_path / f'{i:03d}.png', picture(i, 8, 8))
    write(tmp_path / '101.png', picture(0, 9, 8))
    assert isinstance(images(tmp_path).train, FileImages)


# --- streaming
def test_stream_equals_memory_with_and_without_workers(folder):
    a, b = images(folder), images(folder, stream=True)
    for workers in (0, 2):
        for part in ('train', 'test'):
            got = list(getattr(b, part).batches(16, 3, workers=workers))
            want = list(getattr(a, part).batches(16, 3))
            assert len(got) == len(want)
            assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(got, want))
    for u, v in zip(pixel_stats(a.train), pixel_stats(b.train)):
        torch.testing.assert_close(u, v)
    sub = b.train.subset([3, 1])
    assert torch.equal(sub[0], a.train[3]) and sub.labels.tolist() == [1, 0]
    with pytest.raises(IndexError):
        b.train[4]
    assert torch.equal(b.train[-1], a.train[3])


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_workers_pass_on_what_is_broken(tmp_path, context):
    "A file cut short: a picture of its own class stands in, and the main process hears of it."
    for i in range(4):
        write(tmp_path / f'pets/{"ab"[i % 2]}/{i}.png', picture(i, 64, 64))
    cut = tmp_path / 'pets/a/2.png'
    cut.write_bytes(cut.read_bytes()[:6000])
    store = images(tmp_path / 'pets', stream=True).train
    assert store.labels.tolist() == [0, 0, 1, 1] and not store.skipped
    loader = torch.utils.data.DataLoader(
        store, batch_size=4, num_workers=1, multiprocessing_context=context
    )
    (x,) = loader
    assert np.array_equal(
        x[1].permute(1, 2, 0), picture(0, 64, 64)
    )  # the other one of class a, not the next picture
    assert [n for n, _ in store.skipped] == ['a/2.png']


def test_broken_while_streaming_is_said_once(tmp_path):
    for i in range(3):
        write(tmp_path / f'{i}.png', picture(i, 64, 64))
    store = images(tmp_path, stream=True).train
    (tmp_path / '1.png').unlink()  # gone since
    with pytest.warns(UserWarning, match='1.png') as caught:
        first = store[1]
        store[1]
    assert len(caught) == 1 and torch.equal(first, store[2]) and len(store) == 3
    for p in tmp_path.glob('*.png'):
        p.unlink()
    with pytest.raises(RuntimeError, match='cannot be decoded'):
        quiet(lambda: store[0])


# --- packed files
def test_pack_round_trip(folder, tmp_path):
    (folder / 'train/a/text.png').write_text('no picture')
    with pytest.warns(UserWarning, match='1 of 7'):
        out = pack(folder, tmp_path / 'pets')
    assert out == tmp_path / 'pets.npz' and not list(tmp_path.glob('*.part'))
    z = np.load(out, allow_pickle=False)
    assert {k: str(z[k].dtype) for k in ('jpeg', 'offsets', 'label', 'split')} == dict(
        jpeg='uint8', offsets='int64', label='int16', split='uint8'
    )
    want = [
        folder / p
        for p in (
            'train/a/0.png',
            'train/a/1.png',
            'train/b/2.png',
            'train/b/3.png',
            'test/a/4.png',
            'test/b/5.png',
        )
    ]
    assert [z['jpeg'][a:b].tobytes() for a, b in zip(z['offsets'][:-1], z['offsets'][1:])] == [
        p.read_bytes() for p in want
    ]
    assert (z['label'].tolist(), z['split'].tolist(), z['classes'].tolist()) == (
        [0, 0, 1, 1, 0, 1],
        [0] * 4 + [1] * 2,
        ['a', 'b'],
    )
    a, b = quiet(lambda: images(folder)), images(out)
    assert torch.equal(a.train.images, b.train.images)
    assert torch.equal(a.test.labels, b.test.labels)
    assert a.classes == b.classes
    with pytest.raises(FileExistsError):
        pack(folder, out)
    quiet(lambda: pack(folder, out, overwrite=True))
    with pytest.raises(ValueError, match='test part already'):
        pack(folder, tmp_path / 'new.npz', test_fraction=0.5)


def test_pack_fraction_and_unlabelled(folder, tmp_path):
    d = images(pack(folder / 'train', tmp_path / 'half.npz', test_fraction=0.5, seed=1))
    assert d.train.labels.tolist() == [0, 1] == d.test.labels.tolist()
    z = np.load(tmp_path / 'half.npz')
    assert (z['split'].tolist(), z['label'].tolist()) == (
        [0, 0, 1, 1],
        [0, 1, 0, 1],
    )  # by split, then class
    everything = {x.numpy().tobytes() for x in [*d.train, *d.test]}
    assert everything == {
        np.ascontiguousarray(picture(i).transpose(2, 0, 1)).tobytes() for i in range(4)
    }
    d = images(pack(folder / 'train/a', tmp_path / 'plain.npz'))
    assert d.train.labels is None
    assert d.classes is None
    assert len(d.train) == 2
    assert d.note == 'no labels'
    z = dict(np.load(tmp_path / 'half.npz'))
    np.savez_compressed(tmp_path / 'small.npz', **z)
    assert len(images(tmp_path / 'small.npz').train) == 2  # a compressed one is read, too


def test_pack_is_mapped_and_light_to_send(folder, tmp_path):
    store = BytePack(pack(folder, tmp_path / 'p.npz'))
    assert isinstance(map_array(tmp_path / 'p.npz', 'jpeg'), np.memmap)
    first = store.read(0)
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 2000 < len(map_array(tmp_path / 'p.npz', 'jpeg'))
    assert again.read(0) == first
    a, b = images(tmp_path / 'p.npz', stream=True), images(tmp_path / 'p.npz')
    x, y = next(a.train.batches(24, 4, workers=1))
    assert torch.equal(x, b.train.images) and torch.equal(y, b.train.labels)


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ByteFiles,
        'read',
        lambda self, i, first=-1, _n=[0], _r=ByteFiles.read: (
            (_n.append(1) or len(_n) > 9)
            and (_ for _ in ()).throw(OSError('no space left'))
            or _r(self, i, first)
        ),
    )
    with pytest.raises(OSError, match='no space'):
        pack(folder, tmp_path / 'p.npz')
    assert not (tmp_path / 'p.npz').exists() and not list(tmp_path.glob('*.part'))


# --- arrays, splits, samples
@pytest.mark.parametrize('shape', ['nhwc', 'nchw', 'grey', 'one'])
def test_arrays(shape):
    x = np.stack([picture(i, 10, 12) for i in range(4)])
    given = dict(
        nhwc=x, nchw=torch.from_numpy(x).permute(0, 3, 1, 2), grey=x[..., 0], one=x[..., :1]
    )[shape]
    got = images(given).train.images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(got, x if shape in ('nhwc', 'nchw') else x[..., :1].repeat(3, -1))
    assert images(given, size=8).train.images.shape == (4, 3, 8, 8)
    assert images(given).train.labels is None


def test_pairs_test_and_names():
    x = np.stack([picture(i) for i in range(4)])
    d = images((x, [0, 1, 2, -1]), test=(x[:2], [1, 0]))
    assert d.classes == ['0', '1', '2']
    assert d.test.labels.tolist() == [1, 0]
    assert d.test.classes == d.classes
    assert '1 train images have none' in d.note
    assert len(d.train.labelled()) == 3
    assert images((x, [0, 1, 1, 0], ['cat', 'dog'])).classes == ['cat', 'dog']
    with pytest.raises(ValueError, match='classes that train has not: 5'):
        images((x, [0, 1, 2, 0]), test=(x, [5, 0, 0, 0]))
    assert images(d) is d and images(d.train).train is d.train


def test_fraction_is_stratified_and_disjoint():
    x = np.arange(100, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 4, 4, 3), np.uint8)
    d = images((x, [0] * 60 + [1] * 40), test_fraction=0.2, seed=3)
    assert d.test.labels.bincount().tolist() == [12, 8] and len(d.train) == 80
    assert not set(d.train.images[:, 0, 0, 0].tolist()) & set(d.test.images[:, 0, 0, 0].tolist())
    assert torch.equal(
        images((x, [0] * 60 + [1] * 40), test_fraction=0.2, seed=3).test.images, d.test.images
    )
    assert not torch.equal(
        images((x, [0] * 60 + [1] * 40), test_fraction=0.2, seed=4).test.images, d.test.images
    )


def test_sample_is_balanced_and_seeded():
    s = TensorImages(torch.zeros(100, 3, 2, 2, dtype=torch.uint8), [0] * 90 + [1] * 10)
    assert s.sample(20, 0).labels.bincount().tolist() == [10, 10]
    assert s.sample(40, 0).labels.bincount().tolist() == [30, 10]
    assert len(s.sample(100)) == 100
    d = photo_crops().sample(140, 28, seed=5)
    assert d.train.labels.bincount().tolist() == [10] * 14 and len(d.test) == 28 and d.note


def test_stats_are_exact_and_move_along():
    d = photo_crops()
    x = d.train.images.double() / 255
    torch.testing.assert_close(d.mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        d.std.double(), x.transpose(0, 1).flatten(1).std(1, unbiased=False), rtol=1e-6, atol=1e-7
    )
    assert d.mean is d.mean and d.to('cpu').mean is d.mean
    constant = TensorImages(torch.full((5, 3, 7, 7), 255, dtype=torch.uint8))
    mean, std = pixel_stats(constant)
    assert mean.tolist() == [1, 1, 1]
    assert std.tolist() == [0, 0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    d, g = photo_crops(), photo_crops().to('cuda')
    assert g.train.images.is_cuda and g.train.labels.is_cuda
    for u, v in zip(pixel_stats(d.train), pixel_stats(g.train)):
        torch.testing.assert_close(u, v)
    assert torch.equal(g.train.subset([5, 3]).images.cpu(), d.train.images[[5, 3]])
    assert torch.equal(g.train.sample(32).images.cpu(), d.train.sample(32).images)
    (x, y), (u, v) = next(g.test.batches(32, 8)), next(d.test.batches(32, 8))
    assert x.is_cuda and torch.equal(x.cpu(), u) and torch.equal(y.cpu(), v)


def test_batches_resize_and_keep_order():
    d = photo_crops()
    got = list(d.test.batches(24, 300))
    assert [len(x) for x, _ in got] == [300, 300, 300, 108]
    assert torch.equal(torch.cat([y for _, y in got]), d.test.labels)
    assert torch.equal(got[0][0][7], resize_center_crop(d.test[7], 24))
    assert resize_center_crop(torch.zeros(3, 50, 80, dtype=torch.uint8), 20).shape == (3, 20, 20)


# --- known sets
class FakeCIFAR:
    classes, made = ['x', 'y'], []

    def __init__(self, root, train, download=False):
        self.made.append((root, train, download))
        if not (download or os.path.exists(os.path.join(root, 'there'))):
            raise RuntimeError('Dataset not found or corrupted.')
        if os.path.exists(os.path.join(root, 'offline')):
            raise OSError('no network')
        self.data, self.targets = np.stack([picture(i) for i in range(2)]), [1, 0]


def test_known_set_finds_pack_then_copy_then_download(tmp_path, folder, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', FakeCIFAR)
    monkeypatch.setenv('SSL_PATCH_DATA', str(tmp_path / 'store'))
    FakeCIFAR.made.clear()
    d = images('cifar10')
    # not there: downloaded
    assert [m[2] for m in FakeCIFAR.made] == [False, True, True]
    assert (tmp_path / 'store').is_dir()
    assert d.classes == ['x', 'y']
    assert d.train.labels.tolist() == [1, 0]
    assert np.array_equal(d.test[1].permute(1, 2, 0), picture(1))
    (tmp_path / 'store/there').touch()
    FakeCIFAR.made.clear()
    images('cifar10')
    assert [m[2] for m in FakeCIFAR.made] == [False, False]  # a copy: no download
    FakeCIFAR.made.clear()
    pack(folder, tmp_path / 'store/cifar10.npz')
    d = images('cifar10')
    # a pack: torchvision is not asked
    assert not FakeCIFAR.made
    assert d.classes == ['a', 'b']
    assert 'JPEG' in d.note
    pack(folder, tmp_path / 'store/pets.npz')
    assert len(images('pets').train) == 4  # any pack by its name
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'offline').touch()
    with pytest.raises(
        FileNotFoundError, match='the download failed: no network.*SSL_PATCH_DATA'
    ) as e:
        images('cifar10', root=other)
    assert str(other) in str(e.value) and isinstance(e.value.__cause__, OSError)


def test_imagenet_layout(tmp_path):
    for i, n in enumerate(['train/n01/0', 'train/n01/1', 'train/n02/2', 'val/n02/3']):
        write(tmp_path / f'imagenet/{n}.JPEG', picture(i, 20 + i, 24))
    d = images('imagenet', root=tmp_path)
    assert (d.classes, d.train.labels.tolist(), d.test.labels.tolist()) == (
        ['n01', 'n02'],
        [0, 0, 1],
        [1],
    )
    assert isinstance(d.train, FileImages)
    write(
        tmp_path / 'imagenet/test/9.JPEG', picture(9)
    )  # its test images have no labels: val is taken
    assert images('imagenet', root=tmp_path).test.labels.tolist() == [1]


def test_real_cifar10():
    "Only where a data folder is named that has it."
    root = os.environ.get('SSL_PATCH_DATA')
    if not root or not (Path(root) / 'cifar10.npz').is_file():
        pytest.skip('no cifar10.npz in SSL_PATCH_DATA')
    d = images('cifar10')
    assert (len(d.train), len(d.test), d.train.images.shape[1:]) == (
        50_000,
        10_000,
        (3, 32, 32),
    )
    assert not d.train.skipped
    assert d.train.labels.bincount().tolist() == [5000] * 10
    assert d.test.labels.bincount().tolist() == [1000] * 10
    torch.testing.assert_close(
        d.mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.003, rtol=0
    )  # published values
    torch.testing.assert_close(d.std, torch.tensor([0.2470, 0.2435, 0.2616]), atol=0.005, rtol=0)
    s = images('cifar10', stream=True)
    for i in (0, 77, 49_999):
        assert torch.equal(s.train[i], d.train[i])


# --- figures and imports
def test_show_images_and_repr():
    d = photo_crops()
    fig = show_images(d.train, rows=2, cols=4)
    assert len(fig.axes) == 8 and all(ax.get_title() for ax in fig.axes)
    assert len(show_images(torch.rand(3, 3, 8, 8)).axes) == 3
    assert show_images(d.test.images[:2], titles=['a', 'b']).axes[1].get_title() == 'b'
    text = repr(d)
    for word in ('photos', '4,200', '1,008', '32x32', '14 classes', 'mean', 'photograph'):
        assert word in text
    assert isinstance(d, ImageData)


# ---------------------------------------------------------------- names, fingerprints, copies
def test_fingerprints_and_names_follow_the_files(tmp_path):
    "The same in memory, streamed or packed; subsets keep theirs; names are those of the files."
    g = torch.Generator().manual_seed(0)
    for c in ('a', 'b'):
        (tmp_path / 'pics' / c).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(
                torch.randint(0, 256, (12, 12, 3), generator=g, dtype=torch.uint8).numpy()
            ).save(tmp_path / 'pics' / c / f'{i}.png')
    memory, stream = images(tmp_path / 'pics').train, images(tmp_path / 'pics', stream=True).train
    packed = images(pack(tmp_path / 'pics', tmp_path / 'p.npz')).train
    prints = memory.fingerprints()
    assert len(prints[:, 0].unique()) == len(prints[:, 1].unique()) == 8
    assert prints.dtype == torch.int64
    assert (prints != 0).all()
    assert torch.equal(prints, packed.fingerprints())
    assert torch.equal(prints[:, 0], stream.fingerprints()[:, 0])
    assert (stream.fingerprints()[:, 1] == 0).all()
    small = images(tmp_path / 'pics', size=6).train.fingerprints()
    # the same files, other pixels
    assert torch.equal(small[:, 0], prints[:, 0])
    assert (small[:, 1] != prints[:, 1]).all()
    assert torch.equal(memory.subset([5, 1]).fingerprints(), prints[[5, 1]])
    assert torch.equal(stream.subset([5, 1]).fingerprints(), prints[[5, 1]] * torch.tensor([1, 0]))
    assert (
        memory.names
        == stream.names
        == ['a/0.png', 'a/1.png', 'a/2.png', 'a/3.png', 'b/0.png', 'b/1.png', 'b/2.png', 'b/3.png']
    )
    assert memory.subset([5]).names == ['b/1.png'] and memory.to('cpu').names == memory.names
    assert TensorImages(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).names is None
    assert (
        len(copies(memory, TensorImages(memory.images[2:4]))) == 2
    )  # a copy of the pixels, without a file


def test_fingerprints_of_large_files_see_their_end(tmp_path):
    x = np.full((2, 224, 224, 3), 255, np.uint8)
    x[1, 0, 0] = 0  # of a BMP the first row comes last
    for i in range(2):
        Image.fromarray(x[i]).save(tmp_path / f'{i}.bmp')
    packed = images(pack(tmp_path, tmp_path / 'p.npz', labelled=False)).train
    a, b = images(tmp_path, stream=True).train.fingerprints()[:, 0], packed.fingerprints()[:, 0]
    assert len(a.unique()) == 2 and torch.equal(a, b)


def test_content_changes_with_what_is_given_out(tmp_path, monkeypatch):
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f'{i}.png')
    whole, small, stream = (
        images(tmp_path).train,
        images(tmp_path, size=8).train,
        images(tmp_path, stream=True).train,
    )
    words = [
        s.content()
        for s in (
            whole,
            small,
            stream,
            images(tmp_path, size=8, stream=True).train,
            whole.subset([1, 0, 2]),
        )
    ]
    assert len(set(words)) == 5
    assert whole.content() == images(tmp_path).train.content() == whole.subset([0, 1, 2]).content()
    whole.images = 255 - whole.images
    a = whole.content()
    whole.images.zero_()
    assert len({words[0], a, whole.content()}) == 3
    assert stream.content() == words[2] and can_fingerprint(stream)
    monkeypatch.setattr(images_room, 'can_fingerprint', lambda s: False)
    coarse = stream.content()  # of names and lengths alone
    assert coarse != words[2] and coarse != stream.subset([1, 0, 2]).content()
    assert coarse == stream.subset([0, 1, 2]).content()


def test_copies_between_stores_that_stream(tmp_path):
    g = torch.Generator().manual_seed(0)
    for part, n in (('train', 5), ('test', 3)):
        for c in ('a', 'b'):
            (tmp_path / part / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(
                    torch.randint(0, 256, (12, 12, 3), generator=g, dtype=torch.uint8).numpy()
                ).save(tmp_path / part / c / f'{i}.png')
    shutil.copy(tmp_path / 'train' / 'a' / '2.png', tmp_path / 'test' / 'b' / 'renamed.png')
    for stream in (True, None):
        data = images(tmp_path, stream=stream)
        assert [data.test.names[i] for i in copies(data.train, data.test)] == ['b/renamed.png']
        clean = data.without_copies()
        assert len(clean.train) == 9
        assert 'a/2.png' not in clean.train.names
        assert clean.train.labels.tolist() == [0] * 4 + [1] * 5


def test_resize_further_than_the_cut():
    x = torch.randint(
        0, 256, (2, 3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    store = TensorImages(x)
    got = next(store.batches(28, 2, resize=32))[0]
    assert torch.equal(got, F.center_crop(F.resize(x, [32], antialias=True), [28, 28]))
    assert not torch.equal(got, next(store.batches(28, 2))[0])
    with pytest.raises(ValueError, match='resize must be .* at least 28.* got 20'):
        next(store.batches(28, 2, resize=20))

"From containers to pixels: depth, alpha, bands, pages, notes, sizes; and files from strangers."

import io
import os
import resource
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_patch.data.decoding import BandsError, decode, find_range, to_8_bits
from ssl_patch.data.files import ByteFiles, map_array
from ssl_patch.data.folders import pack, read_pack
from ssl_patch.data.headers import Header, quick_header, read_header
from ssl_patch.data.sources import images

REAL = Path(os.environ.get('SSL_PATCH_DATA') or '/nowhere')
RAMP = np.linspace(0, 1, 256)[None].repeat(64, 0)


def picture(seed, side=24, channels=3):
    g = np.random.default_rng(seed)
    return g.integers(0, 256, (side, side, channels), dtype=np.uint8).squeeze()


def file_of(im, kind='PNG', **how):
    out = io.BytesIO()
    (Image.fromarray(im) if isinstance(im, np.ndarray) else im).save(out, kind, **how)
    return out.getvalue()


def png16(x):
    "A PNG with 16 bits of each colour, which PIL does not write."
    kind = {3: 2, 4: 6, 2: 4}[x.shape[2]]

    def chunk(name, data):
        crc = struct.pack('>I', zlib.crc32(name + data))
        return struct.pack('>I', len(data)) + name + data + crc

    head = struct.pack('>IIBBBBB', x.shape[1], x.shape[0], 16, kind, 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in x)
    body = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + body


def tiff(x, **how):
    tifffile = pytest.importorskip('tifffile')
    out = io.BytesIO()
    tifffile.imwrite(out, x, **how)
    return out.getvalue()


def folder(tmp_path, files, end='png'):
    for i, data in enumerate(files):
        (tmp_path / f'{i}.{end}').write_bytes(data)
    return tmp_path


def told(f, *args, **how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return f(*args, **how), [str(w.message) for w in caught]


# ---- more than 8 bits

DEEP = {
    '12 bits in 16': ((RAMP * 4095).astype(np.uint16), 'png', (0, 4095)),
    '8 bits in 16': ((RAMP * 255).round().astype(np.uint16), 'png', (0, 255)),
    '16 bits': ((RAMP * 65535).astype(np.uint16), 'png', (0, 65535)),
    'float to 1': (RAMP.astype(np.float32), 'tif', (0, 1)),
    'float to 4000': ((RAMP * 4000).astype(np.float32), 'tif', (0, 4000)),
    'float to 255': ((RAMP * 255).round().astype(np.float32), 'tif', (0, 255)),
    'tomography': ((RAMP * 2000 - 1000).astype(np.int32), 'tif', (-1000, 1000)),
    'thermal': ((RAMP * 2000 + 29000).astype(np.uint16), 'tif', (29000, 31000)),
}


@pytest.mark.parametrize('stream', [None, True])
@pytest.mark.parametrize('case', DEEP)
def test_a_ramp_stays_a_ramp(tmp_path, case, stream):
    a, end, right = DEEP[case]
    kind = 'PNG' if end == 'png' else 'TIFF'
    d, said = told(images, folder(tmp_path, [file_of(a, kind)] * 3, end), stream=stream)
    x = d.train[0][0].numpy().astype(int)
    assert len(np.unique(x)) > 250 and (np.diff(x, axis=1) >= 0).all()
    assert len(said) == 1 and '3 of 3 images have more than 8 bits (mode ' in said[0]
    low, high = d.train.value_range
    assert (low, high) == pytest.approx(right, abs=1 + 0.03 * right[1])
    assert f'from {low:g} to {high:g}' in said[0]


@pytest.mark.parametrize('bits', range(8, 17))
def test_whole_numbers_get_the_fewest_bits_that_hold_them(bits):
    a = np.arange(0, 2**bits, max(1, 2 ** (bits - 10)), dtype=np.uint16)
    assert find_range([a]) == (0, 2**bits - 1)
    assert np.array_equal(to_8_bits(a, find_range([a])), (a >> (bits - 8)).astype(np.uint8))


def test_one_range_for_a_folder_and_for_train_and_test(tmp_path):
    for part, n in (('train', 4), ('test', 2)):
        for i in range(n):
            path = tmp_path / part / f'{i}.png'
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(file_of((picture(i)[..., 0].astype(np.uint16) * (4 + 4 * i))))
    for stream in (None, True):
        d = told(images, tmp_path, stream=stream)[0]
        assert d.train.value_range == d.test.value_range == (0, 4095)
        for i in range(2):  # of equal images in train and test the same pixels
            assert torch.equal(d.train[i], d.test[i])
            assert np.array_equal(d.train[i][0], picture(i)[..., 0].astype(int) * (4 + 4 * i) >> 4)
    again = told(images, tmp_path / 'train', test=tmp_path / 'test')[0]
    assert torch.equal(again.test[1], d.test[1])


def test_the_range_may_be_given(tmp_path):
    a = (RAMP * 1000).astype(np.uint16)
    d, said = told(images, folder(tmp_path, [file_of(a)] * 2), value_range=(0, 500))
    x = d.train[0][0].numpy()
    assert not said and x[0, 127] in (253, 254) and (x[:, 128:] == 255).all()
    for bad in (5, (1, 1), (3, 2), 'ab'):
        with pytest.raises(ValueError, match='value_range must be'):
            images(tmp_path, value_range=bad)


def test_what_was_not_measured_does_not_widen_the_range():
    depth = np.arange(400, 4000, dtype=np.uint16)
    for a in (np.r_[depth, 65535], np.r_[0, depth, 65535]):
        assert find_range([a.astype(np.uint16)]) == (0, 4095)
    tissue = np.r_[-32768, np.arange(-1000, 3000)].astype(np.int32)
    assert find_range([tissue]) == (-1000, 2999)
    nothing = np.r_[np.linspace(0, 1, 99), np.nan, np.inf].astype(np.float32)
    assert find_range([nothing]) == (0, 1)
    assert find_range([np.array([0, 65535], np.uint16)]) == (0, 65535)  # a mask
    assert find_range([np.full(9, np.nan, np.float32)]) == (0, 1)
    assert find_range([np.full((3, 3), 7.5, np.float32)]) == (7.5, 8.5)


@pytest.mark.parametrize('bands', [2, 3, 4])
def test_colours_of_12_bits(tmp_path, bands):
    x = picture(0, channels=4)[..., :bands]
    if bands != 3:
        x[..., -1] = 255
    deep = x.astype(np.uint16) * 16 + 7
    deep[..., -1] = 65535 if bands != 3 else deep[..., -1]
    assert quick_header(png16(deep)).depth == read_header(png16(deep)).depth
    d, said = told(images, folder(tmp_path, [png16(deep)] * 2))
    want = x[..., :1].repeat(3, -1) if bands == 2 else x[..., :3]
    assert np.array_equal(d.train[0].permute(1, 2, 0), want)
    assert len(said) == 1 and ';16B' in said[0] and '4095' in said[0]


def test_colours_of_12_bits_in_a_tiff(tmp_path):
    x = picture(0).astype(np.uint16) * 16 + 7
    d, said = told(images, folder(tmp_path, [tiff(x)] * 2, 'tif'))
    assert np.array_equal(d.train[0].permute(1, 2, 0), picture(0)) and len(said) == 1


def test_some_images_with_more_bits_than_others(tmp_path):
    deep = file_of(picture(1)[..., 0].astype(np.uint16) * 16)
    d, said = told(images, folder(tmp_path, [file_of(picture(0)), deep, file_of(picture(2))]))
    assert np.array_equal(d.train[0].permute(1, 2, 0), picture(0))
    assert np.array_equal(d.train[1][0], picture(1)[..., 0])
    assert '1 of 3 images' in said[0]


@pytest.mark.skipif(not (REAL / 'rgbd_indoor.tar').is_file(), reason='no rgbd_indoor.tar')
def test_real_depth_maps_keep_their_levels(tmp_path):
    with tarfile.open(REAL / 'rgbd_indoor.tar') as tar:
        tar.extractall(tmp_path, filter='data')
    d, said = told(images, f'{tmp_path}/rgbd_indoor/redkitchen/*00.depth.png')
    assert len(d.train) == 10 and len(said) == 1
    assert d.train.value_range == (0, 4095) and len(d.train.images.unique()) > 150


# ---- alpha, notes, pages, bands


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'TIFF'])
def test_what_is_transparent_is_white(kind):
    def cut_out(seed):
        a = picture(seed, 48, 4)
        a[..., 3] = 0
        a[16:32, 16:32] = (200, 30, 30, 255)
        how = dict(lossless=True, exact=True) if kind == 'WEBP' else {}
        return decode(file_of(a, kind, **how))

    x = cut_out(0)
    assert torch.equal(x, cut_out(1))
    assert x[:, 20, 20].tolist() == [200, 30, 30] and (x[:, :16] == 255).all()


def test_partly_transparent_pixels_are_mixed():
    a = np.full((4, 4, 4), 100, np.uint8)
    a[..., 3] = 51
    assert (decode(file_of(a)) - (100 * 0.2 + 255 * 0.8)).abs().max() <= 1
    deep = np.full((4, 4, 4), 100 * 257, np.uint16)
    deep[..., 3] = 51 * 257
    assert (decode(png16(deep)) - (100 * 0.2 + 255 * 0.8)).abs().max() <= 1


def test_a_transparent_colour_of_a_palette():
    im = Image.fromarray(picture(0)).quantize(8)
    for kind in ('PNG', 'GIF'):
        x = decode(file_of(im, kind, transparency=3))
        assert (x[:, np.asarray(im) == 3] == 255).all()


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize(
    'rubbish', [b'Exif\0\0rubbish!', b'', b'Exif\0\0II*\0\xff\xff\xff\xff', b'x']
)
def test_notes_that_cannot_be_read_cost_no_picture(kind, rubbish):
    how = dict(lossless=True) if kind == 'WEBP' else {}
    x = decode(file_of(picture(0), kind, exif=rubbish, **how))
    assert torch.equal(x, decode(file_of(picture(0), kind, **how)))


@pytest.mark.parametrize('stream', [None, True])
@pytest.mark.parametrize('kind', ['TIFF', 'GIF', 'PNG', 'WEBP'])
def test_pages_that_are_not_read_are_told(tmp_path, kind, stream):
    pages = [Image.fromarray(picture(i)) for i in range(5)]
    several = file_of(pages[0], kind, save_all=True, append_images=pages[1:])
    one = file_of(pages[0], kind)
    d, said = told(images, folder(tmp_path, [one, several, one], kind.lower()), stream=stream)
    assert len(d.train) == 3
    assert len(said) == 1 and '1 of 3 files hold several pages' in said[0] and ': 5)' in said[0]


def bands_file(n, dtype=np.uint8):
    x = np.random.default_rng(n).integers(0, 256, (24, 24, n)).astype(dtype)
    return x, tiff(x, photometric='minisblack', planarconfig='contig')


@pytest.mark.parametrize('stream', [None, True])
@pytest.mark.parametrize('n', [4, 5, 13])
def test_bands_beyond_three_are_refused_with_their_number_or_kept(tmp_path, n, stream):
    x, data = bands_file(n)
    folder(tmp_path, [data] * 3, 'tif')
    with pytest.raises(ValueError, match=rf'channels must be 3 .* or {n} .*3 of 3 .* {n} bands'):
        images(tmp_path, stream=stream)
    for k in (3, n):
        d = images(tmp_path, stream=stream, channels=k)
        assert d.train.channels == k == len(d.mean) == len(d.std)
        assert np.array_equal(d.train[1].permute(1, 2, 0), x[..., :k])
        assert next(d.train.batches(12, 2))[0].shape == (2, k, 12, 12)
    with pytest.raises(ValueError, match='channels must be'):
        images(tmp_path, stream=stream, channels=n + 1)


def test_a_fourth_band_that_pil_drops(tmp_path):
    four = Image.fromarray(picture(0, channels=4), 'RGBX')
    with pytest.raises(BandsError, match='4 bands'):
        decode(file_of(four, 'TIFF'))
    assert np.array_equal(
        decode(file_of(four, 'TIFF'), channels=3)[2], picture(0, channels=4)[..., 2]
    )
    d = images(folder(tmp_path, [file_of(four, 'TIFF')] * 2, 'tif'), channels=4)
    assert np.array_equal(d.train[0].permute(1, 2, 0), picture(0, channels=4))


def test_bands_of_16_bits_get_one_range(tmp_path):
    x = (np.random.default_rng(0).random((24, 24, 6)) * 9999).astype(np.uint16)
    data = tiff(np.moveaxis(x, -1, 0), photometric='minisblack', planarconfig='separate')
    d, said = told(images, folder(tmp_path, [data] * 2, 'tif'), channels=6)
    assert d.train.value_range == (0, 16383) and len(said) == 1
    assert np.array_equal(d.train[0].permute(1, 2, 0), x >> 6)


def test_without_tifffile_the_error_says_so(monkeypatch):
    data = bands_file(5)[1]
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(ValueError, match='pip install tifffile'):
        decode(data, channels=5)
    colours = file_of(picture(0), 'TIFF')
    assert np.array_equal(decode(colours).permute(1, 2, 0), picture(0))


def test_grey_is_kept_grey(tmp_path):
    gray = picture(0)[..., 0]
    d = images(folder(tmp_path, [file_of(gray)] * 2), channels=1)
    assert d.train.images.shape == (2, 1, 24, 24) and np.array_equal(d.train[0][0], gray)
    assert '1 channels' in repr(d.train) and len(d.mean) == 1
    colours = decode(file_of(picture(1)), channels=1)
    assert np.array_equal(colours[0], np.asarray(Image.fromarray(picture(1)).convert('L')))
    jpeg = file_of(picture(1), 'JPEG')
    want = np.asarray(Image.open(io.BytesIO(jpeg)).convert('L'))
    assert np.array_equal(decode(jpeg, channels=1)[0], want)


def test_content_knows_channels_and_range(tmp_path):
    folder(tmp_path, [file_of((RAMP * 4000).astype(np.uint16))] * 2)
    ask = lambda **how: images(tmp_path, stream=True, **how).train.content()
    words = [
        ask(value_range=(0, 4095)),
        ask(value_range=(0, 5000)),
        ask(value_range=(0, 4095), channels=1),
    ]
    assert len(set(words)) == 3


# ---- headers


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP', 'GIF'])
def test_headers_by_hand_say_what_pil_says(kind):
    for im in (picture(0), picture(0)[..., 0], picture(0)[:10]):
        data = file_of(im, kind)
        assert quick_header(data) == read_header(data)


def test_padding_and_notes_before_the_size_of_a_jpeg():
    data = file_of(picture(0), 'JPEG')
    notes = b'\xff\xe1' + struct.pack('>H', 60000) + bytes(59998)
    padded = data[:2] + notes + b'\xff\xff' + data[2:]
    assert quick_header(padded) == Header(24, 24)
    assert torch.equal(decode(padded), decode(data))


# ---- files from strangers


def claim(data, width, height):
    "A JPEG that says that it is this large."
    data = bytearray(data)
    at = data.index(b'\xff\xc0')
    data[at + 5 : at + 9] = struct.pack('>HH', height, width)
    return bytes(data)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    bomb = claim(file_of(picture(0), 'JPEG'), 60000, 60000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for f in (quick_header, decode, lambda d: decode(d, 32), lambda d: decode(d, channels=1)):
        with pytest.raises(Image.DecompressionBombError):
            f(bomb)
    folder(tmp_path, [file_of(picture(i), 'JPEG') for i in range(3)] + [bomb], 'jpg')
    for stream in (None, True):
        d, said = told(images, tmp_path, size=16, stream=stream)
        assert len(d.train) == 3 and '1 of 4 images cannot be read' in said[0]
        assert '60000 x 60000' in d.train.skipped[0][1] or 'pixels' in d.train.skipped[0][1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_pil_s_own_bound_is_the_bound(monkeypatch):
    data = file_of(picture(0), 'JPEG')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 24 * 24 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        decode(data)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    decode(data)


@pytest.mark.parametrize('what', ['fifo', 'device', 'folder'])
def test_only_regular_files_are_opened(tmp_path, what):
    folder(tmp_path, [file_of(picture(i)) for i in range(3)])
    path = tmp_path / 'x.png'
    if what == 'fifo':
        os.mkfifo(path)
    elif what == 'device':
        path.symlink_to('/dev/zero')
    else:
        path.mkdir()
    code = (
        'import sys, warnings; warnings.simplefilter("ignore");'
        'from ssl_patch.data.sources import images;'
        f'[print(len(images({str(tmp_path)!r}, stream=s).train)) for s in (False, True, None)]'
    )
    done = subprocess.run([sys.executable, '-c', code], timeout=120, capture_output=True, text=True)
    assert done.stdout.split() == ['3', '3', '3'], done.stderr
    if what != 'folder':
        for ask in (lambda f: f.read(0), lambda f: f.ends(0)):
            with pytest.raises(OSError, match='not a regular file'):
                ask(ByteFiles(tmp_path, ['x.png']))


def test_a_file_that_is_endless_is_not_read(tmp_path):
    with open(tmp_path / '9.png', 'wb') as f:
        f.truncate(2**31)  # takes no disk
    folder(tmp_path, [file_of(picture(i)) for i in range(3)])
    d, said = told(images, tmp_path)
    assert len(d.train) == 3 and d.train.skipped[0][0] == '9.png'


def test_no_other_program_is_started(tmp_path):
    "PIL would call Ghostscript for this."
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n%%EndComments\nshowpage\n%%EOF\n'
    with pytest.raises(Exception, match='cannot identify'):
        decode(eps)


def test_only_the_arrays_that_are_needed_are_read(tmp_path):
    z = dict(
        np.load(pack(folder(tmp_path, [file_of(picture(i)) for i in range(3)]), tmp_path / 'p'))
    )
    for name, extra in (
        ('other', dict(junk=np.zeros(2**29, np.uint8))),  # an array that nobody asked for
        ('label', dict(label=np.zeros(2**29, np.uint8))),  # too long
        ('classes', dict(classes=np.zeros(1, f'U{2**27}'))),
    ):
        np.savez_compressed(tmp_path / f'{name}.npz', **{**z, **extra})
    np.savez_compressed(tmp_path / 'jpeg.npz', **{**z, 'jpeg': np.zeros(2**29, np.uint8)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(images(tmp_path / 'other.npz').train) == 3
    for name, words in (
        ('label', '536870912 entries in label for 3 images'),
        ('classes', 'classes is too large'),
        ('jpeg', 'offsets do not fit|suspiciously small'),
    ):
        with pytest.raises(ValueError, match=words):
            images(tmp_path / f'{name}.npz')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_an_array_that_is_not_as_its_header_says(tmp_path):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, dict(descr='|u1', fortran_order=False, shape=(2**40,))
    )
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as z:
        z.writestr('jpeg.npy', out.getvalue() + b'abc')
        z.writestr('offsets.npy', out.getvalue() + b'abc')
    with pytest.raises(ValueError, match='does not hold'):
        map_array(tmp_path / 'a.npz', 'jpeg')
    with pytest.raises(ValueError, match='not a packed .npz'):
        read_pack(tmp_path / 'a.npz')
    np.savez(tmp_path / 'o.npz', jpeg=np.array([{}], object), offsets=np.array([0, 1]))
    with pytest.raises(ValueError, match='not a packed .npz'):
        read_pack(tmp_path / 'o.npz')


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(offsets=np.array([0, 2**63, 100, 200], np.uint64)), 'offsets do not fit'),
        (dict(offsets=np.array([0.0, 1, 2, 3])), 'offsets do not fit'),
        (dict(label=np.array([0.5, 1, 2])), 'label.*whole numbers'),
        (dict(split=np.array([0.5, 0, 0])), 'split must be whole numbers'),
    ],
)
def test_packs_of_wrong_types(tmp_path, change, words):
    z = dict(
        np.load(pack(folder(tmp_path, [file_of(picture(i)) for i in range(3)]), tmp_path / 'p'))
    )
    np.savez(tmp_path / 'q.npz', **{**z, **change})
    with pytest.raises(ValueError, match=words):
        images(tmp_path / 'q.npz')


def test_labels_in_words_in_a_pack(tmp_path):
    z = dict(
        np.load(pack(folder(tmp_path, [file_of(picture(i)) for i in range(3)]), tmp_path / 'p'))
    )
    np.savez(tmp_path / 'q.npz', **{**z, 'label': np.array(['cup', 'cat', 'cup'])})
    d = images(tmp_path / 'q.npz')
    assert d.classes == ['cat', 'cup'] and d.train.labels.tolist() == [1, 0, 1]


# ---- large photographs


def test_large_photographs_that_stream_are_told_and_packed_small(tmp_path):
    big = np.kron(picture(0, 16), np.ones((100, 75, 1), np.uint8))  # 1600 x 1200
    for i, part in enumerate(('train/a', 'train/b', 'test/a')):
        (tmp_path / 'p' / part).mkdir(parents=True)
        (tmp_path / 'p' / part / f'{i}.jpg').write_bytes(file_of(big[: 1600 - i], 'JPEG'))
    d, said = told(images, tmp_path / 'p')
    assert any('1200 x 1600' in s and 'short_side=' in s and 'size=' in s for s in said)
    d, said = told(images, pack(tmp_path / 'p', tmp_path / 'small.npz', short_side=120))
    assert not said and min(d.train[0].shape[1:]) == 120 and d.train[0].shape[1:] == (160, 120)
    assert d.classes == ['a', 'b'] and d.train.labels.tolist() == [0, 1]
    same = images(pack(tmp_path / 'p/train', tmp_path / 'same.npz', short_side=5000), stream=True)
    assert torch.equal(same.train[0], decode(file_of(big, 'JPEG')))

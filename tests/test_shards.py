"""Images in tar files, as webdataset packs them: the stores of folders, and hostile files."""

import io
import tarfile
import tempfile

import pytest
import torch
from hypothesis import given, settings, strategies as st
from ssl_patch.data.images import resize_center_crop
from ssl_patch.data.photographs import photo
from ssl_patch.data.shards import list_shard
from ssl_patch.data.sources import images
from torchvision.io import encode_jpeg


def entry(name, data=b'', kind=tarfile.REGTYPE, link=''):
    about = tarfile.TarInfo(name)
    about.size, about.type, about.linkname = len(data), kind, link
    return about, io.BytesIO(data)


def write(path, *entries, kind='w'):
    with tarfile.open(path, kind) as tar:
        for about, data in entries:
            tar.addfile(about, data)
    return path


@pytest.fixture(scope='module')
def pictures():
    x = resize_center_crop(photo('astronaut'), 64)
    return [encode_jpeg(x.roll(k, 2)).numpy().tobytes() for k in range(8)]


@pytest.mark.parametrize('stream', [True, False])
def test_shards_give_what_a_folder_gives(tmp_path, pictures, stream):
    for part, ns in (('train', range(6)), ('val', range(6, 8))):
        for n in ns:
            place = tmp_path / 'folder' / part / ('cat', 'dog')[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f'{n}.jpg').write_bytes(pictures[n])
    (tmp_path / 'tars').mkdir()
    for k in range(2):
        rows = [
            entry(f'{("cat", "dog")[n % 2]}/{n}.jpg', pictures[n]) for n in range(3 * k, 3 * k + 3)
        ]
        write(tmp_path / 'tars' / f'train-{k:03d}.tar', *rows)
    rows = [
        entry(f'{n}.{e}', d)
        for n in (6, 7)
        for e, d in (('jpg', pictures[n]), ('cls', ('cat', 'dog')[n % 2].encode()))
    ]
    write(tmp_path / 'tars' / 'val-000.tar', *rows)
    ours = images(str(tmp_path / 'tars'), size=32, stream=stream)
    theirs = images(str(tmp_path / 'folder'), size=32, stream=stream)
    assert ours.train.classes == theirs.train.classes == ['cat', 'dog']
    assert (len(ours.train), len(ours.test)) == (6, 2)
    for a, b, order in (  # a folder is sorted by class first
        (ours.train, theirs.train, [0, 3, 1, 4, 2, 5]),
        (ours.test, theirs.test, [0, 1]),
    ):
        assert all(torch.equal(a[i][0], b[j][0]) for i, j in enumerate(order))
        assert a.labels.tolist() == b.labels[order].tolist()
    alone = images(str(tmp_path / 'tars/train-*.tar'), size=32, labelled=False)
    assert len(alone.train) == 6 and alone.test is None and alone.train.labels is None


def test_what_is_no_plain_image_is_passed_over(tmp_path, pictures):
    file = write(
        tmp_path / 'a.tar',
        entry('link.jpg', kind=tarfile.SYMTYPE, link='/etc/passwd'),
        entry('hard.jpg', kind=tarfile.LNKTYPE, link='a.jpg'),
        entry('pipe.jpg', kind=tarfile.FIFOTYPE),
        entry('../../out.jpg', pictures[0]),
        entry('/tmp/abs.jpg', pictures[1]),
        entry('notes.txt', b'x'),
        entry('broken.jpg', b'no image'),
        entry('long' * 60 + '.jpg', pictures[2]),
    )
    names = list_shard(file)[0]
    assert names == ['../../out.jpg', '/tmp/abs.jpg', 'broken.jpg', 'long' * 60 + '.jpg']
    before = sorted(tmp_path.parent.rglob('*'))
    with pytest.warns(UserWarning, match='broken.jpg'):
        data = images(str(file), size=16)
    assert len(data.train) == 3
    assert sorted(tmp_path.parent.rglob('*')) == before


@pytest.mark.parametrize('kind', ['w:gz', 'w:xz'])
def test_a_compressed_file_is_refused(tmp_path, pictures, kind):
    file = write(tmp_path / 'a.tar', entry('a.jpg', pictures[0]), kind=kind)
    with pytest.raises(ValueError, match='whole and not compressed'):
        images(str(file))


def test_a_shard_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match='tar files with images'):
        images(str(write(tmp_path / 'a.tar', entry('a.txt', b'x'))))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damaged_files(data):
    kept = io.BytesIO()
    with tarfile.open(fileobj=kept, mode='w') as tar:
        for name in ('a.jpg', 'a.cls', 'b.jpg'):
            tar.addfile(*entry(name, b'12345'))
    raw = bytearray(kept.getvalue()[:4096])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)))]
    with tempfile.NamedTemporaryFile(suffix='.tar') as file:
        file.write(raw)
        file.flush()
        try:
            _, starts, sizes, _ = list_shard(file.name)
            assert all(0 <= s and s + n <= len(raw) and n >= 0 for s, n in zip(starts, sizes))
        except ValueError as e:
            assert file.name in str(e)


def test_data_of_a_pattern_are_called_by_their_folder(tmp_path, pictures, monkeypatch):
    write(tmp_path / 'cats-000.tar', *(entry(f'{n}.jpg', d) for n, d in enumerate(pictures)))
    folder = tmp_path.name
    monkeypatch.chdir(tmp_path.parent)
    assert images(f'{folder}/*.tar', size=16).name == images(folder, size=16).name == folder
    assert images(f'{folder}/cats-000.tar', size=16).name == 'cats-000'
    with pytest.raises(FileNotFoundError, match='braces'):
        images(f'{folder}/cats-{{000..001}}.tar')

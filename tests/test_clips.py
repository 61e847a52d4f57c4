"Videos: files that are odd or broken, stores, loading with workers, resuming."

import os
import struct
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_patch.data.clips import Clips, VideoFiles
from ssl_patch.data.images import show_images
from ssl_patch.data.sources import images
from ssl_patch.data.video_files import VideoError, VideoFile, pick_frames, read_clip, write_video
from ssl_patch.data.video_sources import videos
from ssl_patch.evaluation.features import RawPixels
from ssl_patch.evaluation.figures import show_neighbours
from ssl_patch.views.augmentations import aug_weak
from ssl_patch.views.clips import ClipLoader, aug_clip_a, aug_clip_b

pytest.importorskip('av')


def ramp(n, height=48, width=64):
    "Frames whose grey says which they are: 4 n, brighter to the right."
    level = 4 * torch.arange(n).view(n, 1, 1, 1)
    wedge = torch.linspace(0, 15, width).round().long()
    return (level + wedge).expand(n, 3, height, width).to(torch.uint8)


def numbers(clip):
    "Which frames of `ramp` a clip shows."
    return ((clip[0, :, :, :4].float().mean((1, 2)) / 4).round()).long().tolist()


@pytest.mark.parametrize('rate', [24000 / 1001, 25, 30000 / 1001, 12, 60, 7])
@pytest.mark.parametrize('ending', ['mp4', 'avi', 'mkv'])
def test_any_rate_and_container(tmp_path, rate, ending):
    path = write_video(tmp_path / f'v.{ending}', ramp(40), rate, g=12)
    with VideoFile(path) as v:
        assert abs(v.rate - rate) < 0.01 and abs(v.seconds - 40 / rate) < 1.5 / rate
        for first in (0, 11, 12, 25):
            got = numbers(v.clip(first / rate, 10 / rate, 10))
            assert all(abs(a - b) <= 1 for a, b in zip(got, range(first, first + 10))), got


def test_rate_that_varies(tmp_path):
    "Frames count by their times: 10 a second, then 40 a second, with a gap of a second."
    times = [t / 10 for t in range(10)] + [2 + t / 40 for t in range(40)]
    path = write_video(tmp_path / 'v.mkv', ramp(50), 25, times, g=10)
    with VideoFile(path) as v:
        assert numbers(v.clip(0.0, 1.0, 10)) == list(range(10))
        assert numbers(v.clip(2.0, 1.0, 40)) == list(range(10, 50))
        assert numbers(v.clip(1.2, 0.5, 2)) == [9, 9]  # what stood still
        assert numbers(v.clip(0.5, 1.75, 15)) == list(range(5, 20))


@pytest.mark.parametrize('codec', ['mpeg4', 'libx264'])
@pytest.mark.parametrize('g, bf', [(1, 0), (12, 0), (12, 2), (250, 2)])
def test_any_first_frame_is_what_decoding_from_the_start_gives(tmp_path, codec, g, bf):
    options = dict(g=g, bf=bf) if bf else dict(g=g)
    try:
        path = write_video(tmp_path / 'v.mp4', ramp(60), 30, codec=codec, **options)
    except Exception as e:
        pytest.skip(f'this PyAV has no {codec}: {e}')
    with VideoFile(path) as v:
        whole = v.clip(0, 2.0, 60)
        for first in (0, 1, 7, 12, 13, 40, 59):
            n = min(6, 60 - first)
            assert torch.equal(v.clip(first / 30, n / 30, n), whole[:, first : first + n]), first


def test_one_frame_short_and_grey(tmp_path):
    one = write_video(tmp_path / 'one.mp4', ramp(1), 30)
    short = write_video(tmp_path / 'short.mp4', ramp(5), 30)
    grey = write_video(tmp_path / 'grey.avi', ramp(30)[:, :1], 30, codec='ffv1')
    assert numbers(read_clip(one, 0, 8, 2.56)) == [0] * 8
    assert read_clip(one, 0, 8, 2.56, difference=True).unique().tolist() == [128]
    assert numbers(read_clip(short, 0, 8, 2.56)) == pick_frames(5, 8)
    x = read_clip(grey, 0, 8, 1.0)
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])
    assert numbers(x) == pick_frames(30, 8)


def turned(path, degrees):
    "Say in the header of an mp4 that its frames are shown turned clockwise, as telephones do."
    one, data = 0x00010000, bytearray(Path(path).read_bytes())
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    at = data.index(b'tkhd') + 4 + 40
    data[at : at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 0x40000000)
    Path(path).write_bytes(data)
    return path


@pytest.mark.parametrize('degrees', [90, 180, 270])
def test_turned_as_it_is_shown(tmp_path, degrees):
    path = write_video(tmp_path / 'v.mp4', ramp(10), 30)
    plain = read_clip(path, 0, 4, 1.0)
    shown = read_clip(turned(path, degrees), 0, 4, 1.0)
    assert torch.equal(shown, plain.rot90(-degrees // 90, (2, 3)))
    assert read_clip(path, 0, 4, 1.0, size=24).shape[-2:] == (
        shown.shape[-2] // 2,
        shown.shape[-1] // 2,
    )


@pytest.fixture
def folder(tmp_path):
    "A good file, and a bad one of every kind."
    kinds = ('good', 'noise', 'empty', 'half', 'head', 'holes', 'sound')
    for kind in kinds:
        (tmp_path / 'a').mkdir(exist_ok=True)
        write_video(tmp_path / f'a/{kind}.avi', ramp(60), 30, g=6)
    path = lambda kind: tmp_path / f'a/{kind}.avi'
    data = path('good').read_bytes()
    path('noise').write_bytes(os.urandom(5000))
    path('empty').write_bytes(b'')
    path('half').write_bytes(data[: len(data) * 3 // 5])
    path('head').write_bytes(data[:600])
    holes = bytearray(data)
    for at in range(len(data) // 3, len(data) // 2, 50):
        holes[at : at + 8] = bytes(8)
    path('holes').write_bytes(holes)
    path('sound').write_bytes(b'RIFF\x24\x00\x00\x00WAVEfmt ' + bytes(100))
    return tmp_path


def test_bad_files_are_named_counted_and_stood_in_for(folder):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        store = videos(folder, seconds=1.0).train
        for i in range(len(store)):
            for place in (0.0, 0.5, 1.0):
                assert store.clip(i, place).frames.shape == (3, 8, 48, 64)
            assert len(store.clips(i, 3)) == 3
    bad = [Path(n).stem for n, _ in store.skipped]
    assert bad == ['empty', 'head', 'noise', 'sound']
    assert 'half' in [Path(n).stem for n, _ in store.damaged]
    words = ' '.join(str(w.message) for w in told)
    assert all(f'{kind}.avi' in words for kind in [*bad, 'half'])
    assert f'{len(bad)} skipped' in repr(store)


def test_nothing_that_can_be_read(folder):
    store = Clips(VideoFiles(folder, ['a/noise.avi', 'a/empty.avi']))
    with (
        pytest.warns(UserWarning, match='noise.avi'),
        pytest.raises(RuntimeError, match='stand in'),
    ):
        store[0]
    with pytest.raises(VideoError):
        VideoFile(folder / 'a/noise.avi')


def test_a_test_video_in_train_is_found(tmp_path):
    for part, name in (('train', 'x'), ('train', 'y'), ('test', 'z')):
        (tmp_path / part / 'c').mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / part / f'c/{name}.mp4', ramp(20 if name != 'x' else 30), 30)
    data = videos(tmp_path)
    assert (data.train.fingerprints()[:, 0] == data.test.fingerprints()[:, 0]).tolist() == [
        False,
        True,
    ]
    assert len(data.without_copies().train) == 1


def test_what_is_no_file_is_told_and_left_out(folder):
    "A link to nowhere does not stop a run whose videos are hashed first."
    os.symlink('/nowhere.mp4', folder / 'a' / 'lost.mp4')
    with pytest.warns(UserWarning, match='no file: 1 .a/lost.mp4'):
        store = videos(folder).train
    assert 'a/lost.mp4' not in store.names and len(store.fingerprints()) == len(store) == 7


def test_wrong_words_for_videos(folder):
    with pytest.raises(FileNotFoundError, match='lists of UCF101.*no classInd.txt'):
        videos(folder, layout='ucf101')
    with pytest.raises(FileNotFoundError, match='lists of Kinetics.*no train.csv'):
        videos(folder, layout='kinetics')
    with pytest.raises(FileNotFoundError, match='no folder .*nowhere.*a list of paths, a tensor'):
        videos('nowhere')
    with pytest.raises(ValueError, match='is no folder, but a file; videos are a folder'):
        videos(folder / 'a/good.avi')
    with pytest.raises(ValueError, match='^frames must be a whole number at least 1, got 0'):
        videos(folder, frames=0)
    x = torch.zeros(4, 6, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match='labels must be 4, one for each video'):
        videos((x, [0, 1]))
    with pytest.raises(FileNotFoundError, match='.avi: 7 .*videos.folder. reads videos'):
        images(folder)


def test_a_picture_of_a_clip_is_its_middle_frame():
    x = torch.zeros(6, 5, 3, 8, 8, dtype=torch.uint8)
    x[:, 2] = 255
    data = videos((x, [0, 0, 0, 1, 1, 1]), frames=5, seconds=None, test_fraction=0.34)
    assert (data.train.name, data.test.name) == ('videos', 'videos test')
    for fig in (show_images(data.train), show_neighbours(RawPixels(8), data, queries=1, k=2)):
        shown = [im.get_array() for ax in fig.axes for im in ax.get_images()]
        assert len(shown) >= 3 and all(a.min() == a.max() > 0 for a in shown)


@pytest.mark.parametrize('size', [None, 24])
def test_loading_does_not_depend_on_workers_or_on_where_one_begins(folder, size):
    store = Clips(VideoFiles(folder, ['a/good.avi'] * 9), seconds=1.0, size=size)
    both = [aug_clip_a(16, difference_p=0.5), aug_clip_b(16), aug_weak(16)]
    make = lambda **kw: ClipLoader(store, both, 2, seed=1, **kw)
    loaders = make(), make(workers=2)
    for epoch in (0, 1):
        one, two = (list(loader.epoch(epoch)) for loader in loaders)
        late = list(loaders[0].epoch(epoch, start=2))
        for pairs in (zip(one, two, strict=True), zip(one[2:], late, strict=True)):
            for (views, i), (others, j) in pairs:
                assert torch.equal(i, j)
                for v, w in zip(views, others):
                    assert torch.equal(v.x, w.x) and torch.equal(v.box, w.box)
                    assert torch.equal(v.flip, w.flip) and torch.equal(v.span, w.span)
    loaders[1].close()


def test_statistics_are_of_the_pixels():
    x = torch.randint(0, 256, (4, 8, 3, 8, 8), dtype=torch.uint8)
    data = videos(x, seconds=None)
    pixels = x.float().div(255).transpose(1, 2).transpose(0, 1).flatten(1)
    torch.testing.assert_close(data.mean, pixels.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.std, pixels.std(1, correction=0), atol=1e-5, rtol=0)


def test_hardly_slower_than_the_bare_decoder(tmp_path):
    "PyAV making the same eight frames, in turn, by the time of the processor: at least 0.8 of it."
    import av

    noise = torch.rand(75, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    frames = torch.nn.functional.interpolate(noise, (240, 320), mode='bilinear')
    path = write_video(tmp_path / 'v.mp4', (255 * frames).to(torch.uint8), 30, g=12)

    def plain():
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            stream.thread_count = 1
            file.seek(int(1.0 / stream.time_base), stream=stream)
            found = []
            for frame in file.decode(stream):
                if frame.time >= 2.28:
                    break
                if frame.time >= 1.0:
                    found.append(frame)
            picked = [found[i] for i in pick_frames(len(found), 8)]
            return np.stack([f.to_ndarray(format='rgb24') for f in picked])

    ours = lambda: read_clip(path, 1.0, 8, 1.28)
    assert abs(ours().permute(1, 2, 3, 0).int() - torch.from_numpy(plain()).int()).max() <= 2
    times = {plain: [], ours: []}
    for _ in range(15):
        for f, took in times.items():
            began = time.process_time()
            f()
            took.append(time.process_time() - began)
    theirs, mine = (sorted(t)[7] for t in times.values())
    assert theirs / mine > 0.8, (theirs, mine)


SAMPLES = Path(os.environ.get('SSL_PATCH_VIDEOS', 'none'))


@pytest.mark.skipif(not SAMPLES.is_dir(), reason='SSL_PATCH_VIDEOS names no folder')
def test_files_of_the_wild():
    "All videos below a folder of one's own: each clip is there, and the same when asked again."
    store = videos(SAMPLES, layout='folders').train
    for i in range(min(len(store), 20)):
        a, b = store.clips(i, 3), store.clips(i, 3)
        assert all(torch.equal(x.frames, y.frames) for x, y in zip(a, b))
    assert not store.skipped

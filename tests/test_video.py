"Methods, tasks and commands on clips: resuming with workers, other methods, the shell."

import json
import re
import shlex
import shutil

import pytest
import torch
from torch import nn

from ssl_patch.cli import main
from ssl_patch.data.images import ImageData
from ssl_patch.data.sources import images
from ssl_patch.data.video_files import write_video
from ssl_patch.data.video_sources import moving_collages, videos
from ssl_patch.evaluation.knn import knn
from ssl_patch.evaluation.linear import linear_probe_cached
from ssl_patch.evaluation.linear_probe import linear_probe
from ssl_patch.evaluation.records import load_records
from ssl_patch.evaluation.retrieval import retrieval
from ssl_patch.evaluation.spread import alignment_uniformity
from ssl_patch.evaluation.svm import svm
from ssl_patch.methods.compose import build_method, load_papers
from ssl_patch.methods.sce_video import SCEVideo
from ssl_patch.methods.space_time import SpaceTimeSampler
from ssl_patch.models.encoders import resnet
from ssl_patch.models.files import load_encoder, save_encoder
from ssl_patch.models.heads import mlp
from ssl_patch.models.momentum import SplitBatchNorm, split_batch_norm
from ssl_patch.models.video_encoders import slow_resnet, tubelet_vit
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.transfer.few_labels import finetune, semi_supervised
from ssl_patch.transfer.video import video_finetune, video_linear
from ssl_patch.transfer.video_retrieval import video_retrieval
from ssl_patch.views.clips import ClipLoader, aug_clip_a
from steps import StopAt

pytest.importorskip('av')


def tiny_net(frames=4):
    torch.manual_seed(0)
    return slow_resnet('resnet18', 16, frames, stem='half', width=4)


def tiny_tubes():
    torch.manual_seed(0)
    return tubelet_vit(size=16, patch=8, frames=4, tubelet=2, width=12, depth=1, heads=2)


@pytest.fixture(scope='module')
def data():
    train, test = moving_collages(32, 6, 16), moving_collages(16, 6, 16, 'test')
    return videos(train, test=test, rate=8, seconds=0.5, frames=4)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two classes of four videos to learn from and two to measure on, as files."
    top = tmp_path_factory.mktemp('videos')
    for split, n in (('train', 8), ('test', 4)):
        x, _ = moving_collages(n, 12, 32, split)
        for i, frames in enumerate(x):
            path = top / split / 'ab'[i % 2] / f'{i}.mp4'
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, frames, 25)
    return top


def sce(**kw):
    return SCEVideo(tiny_net(), hidden=16, out=8, queue=16, **kw)


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items() if torch.is_tensor(v))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_stopped_run_goes_on_bit_for_bit(folder, tmp_path, workers):
    "From files, in the middle of an epoch, with and without workers."
    files = videos(folder, frames=4, seconds=0.3)
    how = dict(epochs=3, batch_size=2, lr=0.01, optimizer='sgd', knn_every=0, progress='quiet')
    whole = Pretrainer(sce(difference_p=0.5), files, **how).fit()
    parts = Pretrainer(sce(difference_p=0.5), files, out=tmp_path / 'run', workers=workers, **how)
    parts.progress = StopAt(parts, 6)
    with pytest.raises(KeyboardInterrupt):
        parts.run_epochs()
    again = Pretrainer(sce(difference_p=0.5), files, out=tmp_path / 'run', resume=True, **how)
    assert again.batches == 6
    again.fit()
    assert same(whole.method.state_dict(), again.method.state_dict())
    assert whole.history[-1]['loss'] == again.history[-1]['loss']
    kept = load_encoder(tmp_path / 'run' / 'encoder.safetensors')
    assert same(kept.state_dict(), again.encoder.state_dict())


@pytest.mark.parametrize('name', load_papers())
def test_every_method_takes_clips(data, name):
    "As it is, by its name: image losses on a slow-only network, samplers on a ViT of tubelets."
    if name == 'aps':
        net, options = tiny_tubes(), dict(patch_sampler=SpaceTimeSampler(), hidden=8, out=8)
    elif name in ('densecl', 'repco', 'local_to_global'):  # patch losses: cells, over time
        net = slow_resnet('resnet18', 32, 4, stem='small', width=4)
        options = dict(hidden=8, out=8) if name == 'local_to_global' else {}
    elif name == 'moco_v3':
        net, options = tiny_net(), dict(hidden=8, out=8)
    else:
        net, options = tiny_net(), dict(projector=mlp(32, 8, last_norm=False, bias=True))
    torch.manual_seed(0)
    method = build_method(name, net, **options)
    loader = ClipLoader(data.train, method.augmentations, 16)
    views, _ = next(iter(loader.epoch(0)))
    for keeps in method.draw_patches(views):
        loss, _ = method(views, keeps)
        loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters())


@pytest.mark.parametrize('make', [tiny_net, tiny_tubes])
def test_files_of_encoders(tmp_path, make):
    net = make().eval()
    save_encoder(net, tmp_path / 'e.safetensors', {})
    again = load_encoder(tmp_path / 'e.safetensors')
    x = torch.rand(2, 3, 4, 16, 16)
    assert type(again) is type(net) and torch.equal(net(x).image, again(x).image)
    assert not torch.equal(net(x).image, net.reinitialized(3)(x).image)


def test_split_batch_norm_of_clips():
    "Each group, every second clip, is what a batch of it alone gives."
    net = split_batch_norm(tiny_net(), 2).train()
    assert any(isinstance(m, SplitBatchNorm) for m in net.modules())
    x = torch.rand(8, 3, 4, 16, 16)
    alone = tiny_net().train()
    both = net(x).image
    torch.testing.assert_close(both[::2], alone(x[::2]).image, atol=1e-4, rtol=1e-4)


def test_a_task_goes_on_bit_for_bit(data, tmp_path):
    how = dict(num_clips=1, epochs=3, batch_size=8, flip=0.0, progress='quiet', baselines=False)
    whole = video_linear(tiny_net(), data, **how)
    first = video_linear(tiny_net(), data, **how | dict(epochs=2), checkpoints=tmp_path)
    assert first.settings['epochs'] == 2
    again = video_linear(tiny_net(), data, **how, checkpoints=tmp_path / 'b', resume='auto')
    assert again.value == whole.value and again.each == whole.each


def test_a_test_video_that_was_learned_from_is_refused(data):
    both = videos((data.train.encoded.videos, data.train.labels), rate=8, frames=4, seconds=0.5)
    both.test = both.train
    with pytest.raises(ValueError, match='in the train split too'):
        video_retrieval(tiny_net(), both)
    r = video_retrieval(tiny_net(), both, overlap='keep', num_clips=1, baselines=False)
    assert r.value == 1.0 and 'kept' in r.note


def test_wrong_clips_are_refused(data):
    with pytest.raises(ValueError, match=r'x must be clips \(B,3,4,16,16\)'):
        tiny_tubes()(torch.rand(2, 3, 8, 16, 16))
    with pytest.raises(ValueError, match='some of its patches'):
        SCEVideo(tiny_net(), patch_sampler=SpaceTimeSampler())
    with pytest.raises(ValueError, match='grid must be'):
        from ssl_patch.models.encoders import vit

        small = vit(size=16, patch=8, width=12, depth=1, heads=2)
        SCEVideo(small, patch_sampler=SpaceTimeSampler())
    with pytest.raises(ValueError, match='source must be a folder'):
        videos(3)


def stills():
    x = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    return images((x[:8], torch.arange(8) % 2), test=(x[8:], torch.arange(4) % 2))


def of_somebody(conv, pool):
    "A network that does not say what it takes."
    net = nn.Sequential(conv(3, 4, 3), pool(1), nn.Flatten())
    net.size, net.dim = 16, 4
    return net


def small_images():
    return resnet('resnet18', 16, width=4)


def flat():
    return of_somebody(nn.Conv2d, nn.AdaptiveAvgPool2d)


def deep():
    return of_somebody(nn.Conv3d, nn.AdaptiveAvgPool3d)


def pretrain(net, data):
    return Pretrainer(SCEVideo(net, hidden=8, out=8, queue=8), data, epochs=1)


FROZEN = (knn, linear_probe_cached, linear_probe, svm, retrieval, video_linear, video_retrieval)
LEARNING = (finetune, semi_supervised, video_finetune)


@pytest.mark.parametrize('measure', [*FROZEN, *LEARNING, alignment_uniformity, pretrain])
@pytest.mark.parametrize(
    'make, kind',
    [
        (tiny_net, 'stills'),
        (tiny_tubes, 'stills'),
        (tiny_net, 'longer'),
        (tiny_tubes, 'longer'),
        (small_images, 'clips'),
        (flat, 'clips'),
        (deep, 'stills'),
    ],
)
def test_stills_clips_and_lengths_that_do_not_fit(data, make, kind, measure, monkeypatch):
    "A sentence before anything is learned: what was given, what is accepted."
    if measure is pretrain and make in (flat, deep):
        pytest.skip('a method asks for an encoder of the library')
    parts = [s.with_clips(frames=6) for s in (data.train, data.test)]
    given = dict(stills=stills(), clips=data, longer=ImageData(*parts, 'longer'))[kind]
    monkeypatch.setattr(torch.optim.Optimizer, 'step', lambda *a: pytest.fail('it learned'))
    net = make()
    with pytest.raises(ValueError, match='(data|encoder) must (be|take) (clips|images|videos)'):
        measure(net, given)


def test_an_encoder_for_clips_of_another_length(data):
    longer = tiny_net().with_frames(6)
    assert (longer.frames, longer.spec['frames'], tiny_net().frames) == (6, 6, 4)
    six = ImageData(*(s.with_clips(frames=6) for s in (data.train, data.test)), 'six')
    assert knn(longer, six, baselines=False).n_test == 16
    with pytest.raises(ValueError, match='frames must be 4'):
        tiny_tubes().with_frames(6)
    assert knn(deep(), data, baselines=False).n_test == 16  # somebody's network of clips


@pytest.mark.parametrize('part', ['train', 'test'])
def test_a_record_names_videos_that_cannot_be_read(folder, tmp_path, part):
    "All protocols, also where features come from memory or from a file."
    broken = tmp_path / 'videos'
    shutil.copytree(folder, broken)
    (broken / part / 'a' / '2.mp4').write_bytes(b'no video')
    data = videos(broken, frames=4, seconds=0.3)
    of, quick = len(getattr(data, part)), dict(num_clips=1, baselines=False)
    said = rf'1 of {of} {part} videos cannot be read \({part}/a/2.mp4\)'
    with pytest.warns(UserWarning, match='2.mp4'):
        first = video_retrieval(tiny_net(), data, **quick)
    assert re.search(said, first.note), first.note
    assert getattr(data, part).names.index(f'{part}/a/2.mp4') in getattr(data, part).broken
    learned = video_linear(tiny_net(), data, epochs=1, progress='quiet', **quick)
    assert re.search(said, learned.note)
    how = dict(baselines=False, cache=tmp_path / 'features')
    for again in (data, data, videos(broken, frames=4, seconds=0.3)):  # the last: from a file
        assert re.search(said, knn(tiny_net(), again, **how).note)


def test_a_video_that_is_read_in_part_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'videos')
    write_video(tmp_path / 'videos/test/a/0.avi', moving_collages(1, 60, 32)[0][0], 25, g=6)
    torn = tmp_path / 'videos/test/a/0.avi'
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size * 3 // 5])
    data = videos(tmp_path / 'videos', frames=4, seconds=0.3)
    with pytest.warns(UserWarning, match='is damaged'):
        r = video_retrieval(tiny_net(), data, num_clips=3, baselines=False)
    assert '1 of 5 test videos are damaged (test/a/0.avi)' in r.note


def test_time_is_seen_and_a_single_frame_has_none():
    "A clip and its reverse differ for a network with kernels in time, if anything moves."
    net, x = tiny_net().eval(), torch.rand(2, 3, 4, 16, 16)
    assert not torch.allclose(net(x).image, net(x.flip(2)).image)
    still = x[:, :, :1].expand(-1, -1, 4, -1, -1)
    assert torch.equal(net(still).image, net(still.flip(2)).image)
    assert torch.equal(net(still).image, net(x[:, :, 0]).image)  # an image is a clip at rest


def test_turned_clips(data):
    a = aug_clip_a(16, flip_ud=0.5, turns=1.0)
    (view,), _ = next(iter(ClipLoader(data.train, a, 8).epoch(0)))
    assert view.turn is not None and view.x.shape == (8, 3, 4, 16, 16)


def shell(words):
    try:
        main(shlex.split(words))
    except SystemExit as e:
        return e.code or 0
    return 0


def test_pretrain_and_probe_from_a_shell(folder, tmp_path, capsys):
    out = tmp_path / 'run'
    net = '--encoder slow_resnet18 --stem half --width 4 --size 16 --frames 4 --seconds 0.3'
    train = '--epochs 2 --batch-size 4 --workers 0 --knn-every 0 --progress quiet'
    words = f'pretrain --method sce_video {net} {train} --data {folder} --out {out}'
    assert shell(f'{words} --options hidden=8 out=8') == 0
    assert json.loads((out / 'config.json').read_text())['encoder']['kind'] == 'slow_resnet'
    few = '--settings video_retrieval.num_clips=2 video_linear.epochs=1 video_linear.num_clips=1'
    assert shell(f'probe {out} --protocols video_retrieval video_linear linear {few}') == 0
    found = {r.protocol: r for r in load_records(out)}
    assert set(found) == {'video retrieval', 'video, linear', 'linear'}
    assert found['video retrieval'].settings['clip_seconds'] == 0.3
    assert {'frame differences', 'one frame'} <= set(found['video retrieval'].baselines)
    assert shell(f'{words} --resume') == 0
    assert shell(f'show {out} --images 2') == 0
    drawn = {f.stem for f in out.glob('*.png')}
    assert drawn >= {'views_0', 'views_1', 'neighbours', 'retrieved', 'representation'}
    assert shell(f'probe {out} --protocols video_retrieval --settings video_retrieval.foo=1') == 2
    assert 'foo' in capsys.readouterr().err

"Wrong command lines: each ends in exit code 2 and one line that says what was wrong."

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from ssl_patch.cli import main
from ssl_patch.commands.words import encoder_from_words
from ssl_patch.reports.compare import compare
from ssl_patch.reports.runs import keep_runs, load_runs
from ssl_patch.training.pretrain import Pretrainer

NET = '--encoder vit_tiny --size 16 --patch 4 --width 32 --depth 1 --heads 2 --batch-size 8'
TRAIN = f'pretrain --data pics --out new --progress quiet {NET}'
FEW = 'probe run --protocols semi_supervised --settings semi_supervised'
PLAIN = 'pretrain --data pics --out new --progress quiet --batch-size 8'


def change(folder, **what):
    "The configuration of a run, with other entries."
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | what))


def config(folder, **what):
    "How a run was trained, with other entries."
    return json.loads((folder / 'config.json').read_text())['train_config'] | what


def state(folder):
    "What the checkpoint of a run holds."
    return torch.load(folder / 'checkpoint.pt', weights_only=True)


BROKEN = dict(
    torn=lambda f: (f / 'config.json').write_text('{"method": '),
    listed=lambda f: (f / 'config.json').write_text('[1, 2]'),
    empty=lambda f: (f / 'config.json').write_text('{}'),
    binary=lambda f: (f / 'config.json').write_bytes(b'\xff\xfe\x00'),
    slots=lambda f: change(f, slots=3),
    bare=lambda f: change(f, train_config={}),
    other=lambda f: change(f, cli=dict(out='x', colour=3)),
    wrong=lambda f: change(f, cli=dict(out='x', size='big')),
    command=lambda f: change(f, cli=[1]),
    metrics=lambda f: (f / 'metrics.csv').write_text('epoch,loss\n1,abc\n'),
    columns=lambda f: (f / 'metrics.csv').write_text('epoch,loss\n1,2,3\n'),
    records=lambda f: (f / 'records.jsonl').write_text('[1]'),
    encoder=lambda f: (f / 'encoder.safetensors').write_text('hello'),
    headless=lambda f: (f / 'metrics.csv').write_text('step,loss\n1,2.0\n'),
    rateless=lambda f: change(f, train_config=config(f, weight_decay='x')),
    stateless=lambda f: torch.save(state(f) | dict(optimizer=3, history=[{}]), f / 'checkpoint.pt'),
)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with labelled pictures, a run, runs that were broken, and files of other kinds."
    root = tmp_path_factory.mktemp('refusals')
    r = np.random.default_rng(0)
    for part, n in (('train', 10), ('test', 4)):
        for c in ('cats', 'dogs'):
            (root / 'pics' / part / c).mkdir(parents=True)
            for i in range(n):
                pixels = r.integers(0, 256, (18, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / 'pics' / part / c / f'{i}.png')
    arrays = dict(train_images=r.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    np.savez(root / 'words.npz', **arrays, train_labels=np.array(['cat', 'dog'] * 4))
    np.savez(root / 'fractions.npz', **arrays, train_labels=np.linspace(0, 1, 8))
    packed = dict(np.load(root / 'words.npz'))
    packed |= dict(jpeg=np.zeros(8, np.uint8), offsets=np.arange(9))
    np.savez(root / 'packed_words.npz', **packed, label=np.array(['cat', 'dog'] * 4))
    np.savez(root / 'packed_fractions.npz', **packed, label=np.linspace(0, 1, 8))
    for name in ('a_file', 'text.pt', 'text.safetensors', 'text.npz'):
        (root / name).write_text('hello')
    with pytest.MonkeyPatch.context() as at:
        at.chdir(root)
        main(f'pretrain --data pics --out run --epochs 1 --progress quiet {NET}'.split())
    for name, spoil in BROKEN.items():
        shutil.copytree(root / 'run', root / name)
        spoil(root / name)
    return root


LINES = [
    ('', "command must be one of 'pretrain'"),
    ('pretrian --data pics', "did you mean 'pretrain'"),
    ('prob run', "did you mean 'probe'"),
    ('pretrain --out new --epoch 3', "did you mean '--epochs'"),
    ('pretrain --out new --epochs three', '--epochs'),
    ('pretrain', '--out'),
    ('info run more', 'more'),
    (f'{TRAIN} --options tau=abc', 'tau must be'),
    (f'{TRAIN} --options hidden=x', 'hidden'),
    (f'{TRAIN} --options flip_aware=maybe', 'flip_aware must be True or False'),
    (f'{TRAIN} --options encoder=3', '--encoder'),
    (f'{TRAIN} --options name=x', "'name=x'"),
    (f'{TRAIN} --train-config epochs=3', '--epochs'),
    (f'{TRAIN} --train-config out=x', '--out'),
    (f'{TRAIN} --train-config weight_decay=x', 'weight_decay must be a number'),
    (f'{TRAIN} --train-config warmup_epochs=x', 'warmup_epochs must be a number'),
    (f'{TRAIN} --train-config drops=3', 'drops must be parts of the run'),
    (f'{TRAIN} --subset 0', '--subset must be a whole number at least 1'),
    (f'{TRAIN} --subset 2.5', '--subset'),
    (f'{TRAIN} --workers -1', 'workers must be a whole number at least 0'),
    (f'{TRAIN} --knn-every -1', 'knn_every must be'),
    (f'{TRAIN} --device meta', 'device must be one that works here'),
    (f'{TRAIN} --feature-layer layer9', "'layer4' or 'layer3'"),
    (f'{TRAIN} --depth 0', 'depth must be a whole number at least 1'),
    (f'{TRAIN} --data a_file', 'a_file'),
    (f'{TRAIN} --data words.npz', 'words.npz'),
    (f'{TRAIN} --data fractions.npz', 'fractions.npz'),
    (f'{TRAIN} --data packed_words.npz', 'packed_words.npz'),
    (f'{TRAIN} --data packed_fractions.npz', 'packed_fractions.npz'),
    (f'{TRAIN} --data text.npz', 'text.npz'),
    (f'{TRAIN} --out a_file', 'a_file'),
    (f'{PLAIN} --encoder vit_tinny', "did you mean 'tiny'"),
    (f'{PLAIN} --encoder mobilenet', 'timm/NAME or torchvision/NAME'),
    (f'{PLAIN} --encoder timm/resnet19', "timm has no image network 'resnet19'"),
    (f'{PLAIN} --encoder torchvision/maskrcnn_resnet50_fpn', 'no image network'),
    (f'{PLAIN} --encoder torchvision/resnet18 --depth 2', 'depth must be left out'),
    (f'{PLAIN} --encoder timm/resnet18', 'patch_sampler must be None for this encoder'),
    (f'{TRAIN} --data nowhere', "no folder or file 'nowhere'; images are in a folder, a packed"),
    (
        f'{PLAIN} --method sce --encoder slow_resnet18 --data nowhere',
        'videos are a folder, a list of paths',
    ),
    ('probe --encoder resnet18 --data nowhere', "no folder or file 'nowhere'"),
    ('probe --encoder vit_tiny --arch timm/resnet18 --data pics', '--arch must be left out'),
    ('probe --encoder vit_tiny --size 16 --data pics/train', 'test_fraction=.2 makes one of train'),
    (
        'probe run --data collages --protocols detection --size 16',
        'detection.side=... sets its own',
    ),
    ('probe run --data collages --protocols detection --resize 9', 'detection.short=... sets its'),
    ('probe run --data collages --protocols segmentation --size 16', 'segmentation.size=... sets'),
    ('probe run --data pics --protocols segmentation', '(classes=5), for pics'),
    ('probe run --subset 0', 'subset must be a whole number at least 1'),
    ('probe run --size 0', 'size must be a whole number at least 1'),
    ('probe run --resize 0', 'resize must be a whole number at least 1'),
    ('probe run --out a_file', 'a_file'),
    ('probe run --settings knn.k=abc', 'k must be a whole number'),
    ('probe run --settings linear.lr=x --protocols linear', 'lr must be a number'),
    *[
        (
            f'probe run --settings knn.{name}=3',
            f'--{name} says it for all protocols; settings of knn',
        )
        for name in ('name', 'seed', 'baselines', 'overlap', 'out', 'cache', 'size', 'device')
    ],
    ('probe run --settings knn.amp=3', 'amp must be True for bfloat16 autocast, or False, got 3'),
    ('probe run --settings knn.batch_size=x', 'batch_size must be a whole number'),
    ('probe run --protocols finetune --settings finetune.bf16=x', 'bf16 must be one of'),
    ('probe run --protocols finetune --settings finetune.watch=x', 'watch must be one of'),
    ('probe run --protocols finetune --settings finetune.workers=x', 'workers must be'),
    ('probe run --protocols finetune --settings finetune.checkpoints=3', 'checkpoints must be'),
    (f'{FEW}.epochs=x', 'epochs must be a whole number'),
    (f'{FEW}.missing=x', "missing must be one of 'refuse' or 'skip'"),
    (f'{FEW}.subset_seed=x', 'subset_seed must be a whole number'),
    (
        f'{TRAIN} --modules my.py',
        'the name of a module, without .py, as Python imports it: my, got',
    ),
    (f'{TRAIN} --modules lab/my.py', 'without .py, as Python imports it: lab.my, got'),
    (f'{TRAIN} --augmentation turns=2', 'turns must be a number at least 0 and at most 1'),
    (f'{TRAIN} --pretrained', 'pretrained must be left out, as only timm/NAME'),
    (f'{PLAIN} --encoder timm/test_vit --pretrained --method moco_v2', 'neither on this machine'),
    (
        'pretrain --out bare --resume --epochs 2',
        'bare/config.json: its train_config must be a dict',
    ),
    (
        'pretrain --out headless --resume --epochs 2',
        'metrics.csv must be a table with a column epoch',
    ),
    (
        'pretrain --out rateless --resume --epochs 2',
        "weight_decay as the checkpoint has it, got {'w",
    ),
    ('pretrain --out stateless --resume --epochs 2', 'that of a run, with its optimizer, history'),
    ('probe a_file', 'a_file'),
    ('probe --encoder text.pt --data pics', 'text.pt'),
    ('probe --encoder text.safetensors --data pics', 'text.safetensors'),
    ('probe encoder', 'encoder.safetensors'),
    ('probe empty --tower momentum', 'config.json'),
    ('show run --images 0', 'images must be a whole number at least 1'),
    ('show other', "'colour'"),
    ('show command', 'its cli must be a dict'),
    ('info a_file', 'a_file'),
    ('info torn', 'torn'),
    ('info listed', 'listed/config.json must be a dict'),
    ('info empty', 'config.json'),
    ('info binary', 'binary'),
    ('info slots', 'slots must be a dict'),
    ('info bare', 'optimizer'),
    ('info metrics', 'metrics.csv'),
    ('info columns', 'metrics.csv'),
    ('info records', 'records.jsonl, line 1'),
    ('pretrain --out wrong --resume', "got 'big'"),
    ('pretrain --out torn --resume', 'torn'),
    ('compare torn', '1 of 1 run folders cannot be read'),
    ('compare a_file', 'a_file'),
    ('demo --out a_file', 'a_file'),
    ('demo --out listed --overwrite', 'listed/config.json'),
]


def contents(folder):
    "Size and time of every file."
    files = (f for f in sorted(folder.rglob('*')) if f.is_file() and '__pycache__' not in f.parts)
    return {f: (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


@pytest.mark.parametrize('line, word', LINES, ids=[line[-60:] or 'nothing' for line, _ in LINES])
def test_a_wrong_command_line(place, capsys, monkeypatch, line, word):
    monkeypatch.chdir(place)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr(Pretrainer, 'fit', lambda self: pytest.fail('it trained'))
    before = contents(place)
    with pytest.raises(SystemExit) as end:
        main(line.split())
    said = capsys.readouterr().err
    assert contents(place) == before, 'a file was lost or changed'
    assert end.value.code == 2 and said.count('\n') == 1 and said.startswith('ssl_patch: ')
    assert word in said and 'SSL_PATCH_TRACEBACK' not in said, said
    assert len(said) < 900


def test_a_network_by_the_name_that_pretrain_gives_it(place, tmp_path, capsys, monkeypatch):
    "With random weights, which is said; of a folder without a test part, a share is measured on."
    from ssl_patch.evaluation.records import load_records

    monkeypatch.chdir(place)
    words = f'--size 16 --protocols knn --out {tmp_path} --test-fraction .3'
    with pytest.warns(UserWarning, match='so k=14, not 20'):
        main(f'probe --encoder resnet18 --data pics/train {words}'.split())
    assert 'resnet18 for 16 pixels has random weights (seed 0)' in capsys.readouterr().out
    (record,) = load_records(tmp_path)
    assert (record.n_train, record.n_test) == (14, 6) and 'random encoder' not in record.baselines


def test_what_nobody_foresaw_is_one_line_too(place, capsys, monkeypatch):
    def fail(self):
        raise KeyError('first\nsecond\x1b[31m')

    monkeypatch.chdir(place)
    monkeypatch.setattr('ssl_patch.commands.compare.Info.go', fail)
    with pytest.raises(SystemExit) as end:
        main(['info', 'run'])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count('\n') == 1 and 'KeyError' in said
    assert '\x1b' not in said
    monkeypatch.setenv('SSL_PATCH_TRACEBACK', '1')
    with pytest.raises(KeyError):
        main(['info', 'run'])


def measured(run, value):
    "A line as `probe` writes it."
    from ssl_patch.evaluation.records import Record

    r = Record('kNN', value, 'mine', 'pics', 0.5)
    (run / 'records.jsonl').write_text(json.dumps(r.to_dict()) + '\n')


def test_a_broken_run_is_named_and_the_others_are_compared(place, tmp_path, capsys, monkeypatch):
    for seed in (0, 1):
        shutil.copytree(place / 'run', tmp_path / f'mine_seed{seed}')
        measured(tmp_path / f'mine_seed{seed}', 0.5 + seed / 10)
    whole = str(compare(tmp_path))
    for name in ('listed', 'metrics', 'records'):
        shutil.copytree(place / name, tmp_path / f'{name}_seed0')
    with pytest.warns(UserWarning, match='3 of 5 run folders cannot be read.*listed_seed0'):
        assert len(load_runs(tmp_path)) == 2
    monkeypatch.chdir(tmp_path)
    for words in (['.'], ['mine_seed0', 'mine_seed1', 'listed_seed0']):
        with pytest.warns(UserWarning, match='listed_seed0'):
            main(['compare', *words])
        assert whole in capsys.readouterr().out
    with pytest.raises(ValueError, match='1 of 1 run folders cannot be read'):
        load_runs(tmp_path / 'listed_seed0')
    with pytest.raises(ValueError, match='listed_seed0'):
        keep_runs(tmp_path, tmp_path / 'kept.jsonl')  # what is kept is whole


@pytest.mark.parametrize('name', ['timm/resnet18', 'torchvision/resnet18'])
def test_networks_of_libraries_are_pretrained_from_the_shell(place, monkeypatch, name):
    "They begin with random weights, of the seed."
    from ssl_patch.commands.pretrain import Pretrain

    monkeypatch.chdir(place)
    command = Pretrain(out='new', data='pics', method='moco_v2', encoder=name, size=32)
    first, again = (command.build_method().encoder.state_dict() for _ in range(2))
    command.seed = 1
    other = command.build_method().encoder.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    assert encoder_from_words(name, 32).spec['kind'] == name.split('/')[0]


def test_published_weights_are_begun_with_and_fetched_only_once(place, tmp_path, monkeypatch):
    "A run that goes on has weights of its own: nothing is looked for elsewhere."
    from torchvision.models import resnet18
    from ssl_patch.commands.pretrain import Pretrain

    monkeypatch.chdir(place)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('urllib.request.urlopen', lambda *a, **k: pytest.fail('it was fetched'))
    kept = tmp_path / 'hub' / 'checkpoints' / 'resnet18-f37072fd.pth'
    kept.parent.mkdir(parents=True)
    published = resnet18()
    torch.save(published.state_dict(), kept)
    out = tmp_path / 'run'
    words = dict(data='pics', method='moco_v2', encoder='torchvision/resnet18', size=32)
    words |= dict(batch_size=16, progress='quiet', workers=0, out=str(out), pretrained=True)
    begun = Pretrain(**words, epochs=1)
    assert torch.equal(begun.build_method().encoder.net.conv1.weight, published.conv1.weight)
    begun.go()
    kept.unlink()  # on another machine
    run = Pretrain(out=str(out), resume=True, epochs=2, progress='quiet').go()
    assert len(run.history) == 2
    assert run.encoder.spec['name'] == 'resnet18.IMAGENET1K_V1'

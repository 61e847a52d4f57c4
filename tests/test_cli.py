"The command line as a user meets it: good runs, and one clear line for all that can go wrong."

import json
import os
import subprocess
import sys
import pytest
import torch
from pathlib import Path
from PIL import Image
from ssl_patch.cli import main
from ssl_patch.ground.threads import WAIT_VARIABLES

ROOT = Path(__file__).parent.parent

NET = '--encoder vit_tiny --size 16 --patch 4 --width 32 --depth 1 --heads 2'
UNTIMED = f'{NET} --epochs 2 --batch-size 8 --options hidden=32 out=16'.split()
TINY = (
    '--encoder vit_tiny --patch 8 --width 32 --depth 1 --heads 2 --epochs 1 '
    '--options hidden=32 out=16 --progress quiet'
)
SMALL = [*UNTIMED, '--progress', 'lines']


@pytest.fixture
def folder(tmp_path):
    "Forty small PNGs, in two class folders."
    g = torch.Generator().manual_seed(0)
    for c in ('cats', 'dogs'):
        (tmp_path / 'pics' / c).mkdir(parents=True)
        for i in range(20):
            x = torch.randint(0, 256, (24, 30, 3), generator=g, dtype=torch.uint8).numpy()
            Image.fromarray(x).save(tmp_path / 'pics' / c / f'{i}.png')
    return tmp_path


def run(*words):
    "Exit status of a command; 0 where it returns. Words are cut at blanks; a path is one word."
    cut = [[str(w)] if isinstance(w, Path) else str(w).split() for w in words]
    try:
        main([w for several in cut for w in several])
        return 0
    except SystemExit as e:
        return e.code or 0


def pretrain(folder, *more, data='pics', out='run'):
    return run('pretrain', '--data', folder / data, '--out', folder / out, *SMALL, *more)


def test_pretrain_info_show_resume(folder, capsys):
    assert pretrain(folder) == 0
    assert run('info', folder / 'run') == 0
    assert 'epoch 2 of 2' in capsys.readouterr().out
    assert run('show', folder / 'run', '--images', 1) == 0
    assert (folder / 'run' / 'neighbours.png').exists()
    assert run('pretrain', '--out', folder / 'run', '--resume') == 0  # nothing left to do


def test_resume_goes_on_with_the_settings_it_began_with(folder, capsys):
    from ssl_patch.training.pretrain import Pretrainer

    keep = Pretrainer.fit
    try:
        Pretrainer.fit = lambda self: keep(self, 1)
        assert pretrain(folder) == 0
    finally:
        Pretrainer.fit = keep
    assert run('pretrain', '--out', folder / 'run', '--resume', '--progress', 'lines') == 0
    rows = (folder / 'run' / 'metrics.csv').read_text().splitlines()
    assert [r.split(',')[0] for r in rows] == ['epoch', '1', '2']
    assert pretrain(folder, out='whole') == 0
    strip = lambda t: [
        [c for h, c in zip(t[0].split(','), r.split(',')) if h not in ('seconds', 'images_per_s')]
        for r in t
    ]
    assert strip(rows) == strip((folder / 'whole' / 'metrics.csv').read_text().splitlines())


def test_probe_records_are_kept(tmp_path, capsys):
    assert run('pretrain', '--out', tmp_path / 'r', TINY) == 0
    assert run('probe', tmp_path / 'r') == 0
    text = capsys.readouterr().out
    assert 'raw pixels' in text and 'random encoder' in text and 'which of 14 photographs' in text
    records = [json.loads(l) for l in open(tmp_path / 'r' / 'records.jsonl')]
    assert len(records) == 2 and all(0 < r['value'] < 1 for r in records)
    assert run('show', tmp_path / 'r', '--images', 1) == 0
    assert {'views_0.png', 'patches_0.png', 'neighbours.png'} <= set(os.listdir(tmp_path / 'r'))


def test_show_draws_what_the_patch_losses_compare(folder):
    "RepCo on DenseCL has both: matches across views, pairs within one."
    words = (
        '--method repco --options host=densecl queue=32 --encoder resnet18 --feature-layer layer3 '
        '--width 8 --size 32 --epochs 1 --batch-size 16 --progress quiet'
    )
    assert run('pretrain', '--data', folder / 'pics', '--out', folder / 'd', words) == 0
    assert run('show', folder / 'd', '--images', 1) == 0
    drawn = {'views_0.png', 'patches.png', 'matches_0.png', 'pairs_0.png', 'neighbours.png'}
    assert drawn <= set(os.listdir(folder / 'd'))


def test_one_corrupt_image_is_named_and_the_run_goes_on(folder, capsys):
    path = folder / 'pics' / 'cats' / '3.png'
    path.write_bytes(path.read_bytes()[:200])
    (folder / 'pics' / 'dogs' / 'note.png').write_text('not a picture')
    with pytest.warns(UserWarning) as seen:
        assert pretrain(folder) == 0
    text = ' '.join(str(w.message) for w in seen)
    assert '3.png' in text and 'note.png' in text


def wrong(folder, capsys, status, word, *words):
    assert run(*words) == status
    err = capsys.readouterr().err
    assert word in err and 'Traceback' not in err, err
    assert not (folder / 'run' / 'checkpoint.pt').exists()


@pytest.mark.parametrize(
    'more, word',
    [
        (('--data', 'nowhere/at/all'), 'nowhere'),
        (('--data', 'cifar11'), 'cifar10'),
        (('--options', 'keep_ratio=0'), 'keep_ratio'),
        (('--options', 'keep_ratio=1.5'), 'keep_ratio'),
        (('--options', 'power=3'), 'power'),
        (('--options', 'gamma'), 'name=value'),
        (('--method', 'simclr'), "'moco_v1', 'moco_v2'"),
        (('--patch', '5'), 'multiple of the patch'),
        (('--batch-size', '4000'), '4000'),
        (('--batch-size', '1'), 'batch_size'),
        (('--encoder', 'vit_huge'), 'huge'),
        (('--encoder', 'resnet18'), 'heads'),
        (('--lr', '-1'), 'lr'),
        (('--train-config', 'optimizer=adam'), 'adam'),
        (('--train-config', 'momentun=3'), 'momentun'),
        (('--width', '33'), 'width'),
        (('--device', 'cuda:99'), 'cuda'),
    ],
)
def test_wrong_arguments(folder, capsys, more, word):
    paths = ('--data', folder / 'pics', '--out', folder / 'run')
    wrong(folder, capsys, 2, word, 'pretrain', *paths, *SMALL, *more)


def test_empty_folder_and_folder_without_pictures(folder, capsys):
    (folder / 'empty').mkdir()
    (folder / 'texts').mkdir()
    (folder / 'texts' / 'a.png').write_text('no')
    (folder / 'texts' / 'b.txt').write_text('no')
    for data in ('empty', 'texts'):
        assert pretrain(folder, data=data) == 2
        assert data in capsys.readouterr().err and not (folder / 'run').exists()


def test_run_folder_that_exists(folder, capsys):
    assert pretrain(folder) == 0
    assert pretrain(folder) == 2
    assert 'already holds a run' in capsys.readouterr().err


def test_checkpoint_of_another_method(folder, capsys):
    assert pretrain(folder) == 0
    assert pretrain(folder, '--method', 'moco_v3', out='other') == 0
    (folder / 'run' / 'checkpoint.pt').write_bytes(
        (folder / 'other' / 'checkpoint.pt').read_bytes()
    )
    assert run('pretrain', '--out', folder / 'run', '--resume') == 2
    assert 'as the checkpoint has it' in capsys.readouterr().err


def test_folder_that_cannot_be_written(folder, capsys):
    (folder / 'file').write_text('')
    assert pretrain(folder, out='file/run') == 2
    assert 'cannot write' in capsys.readouterr().err


@pytest.mark.parametrize(
    'words, word',
    [
        (('info', 'nowhere'), 'not a run folder'),
        (('probe', 'nowhere'), 'no encoder file'),
        (('show', 'nowhere'), 'not a run folder'),
        (('probe',), 'give run folders'),
        (('probe', '--encoder', 'x'), '--data'),
    ],
)
def test_folders_that_are_not_runs(tmp_path, capsys, monkeypatch, words, word):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2 and word in capsys.readouterr().err


def test_speed_times_a_few_batches_and_leaves_no_run(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    words = '--batches 4 --warmup 1 --out speed.json'
    assert run('speed', '--data', 'pics', *UNTIMED, words) == 0
    text = capsys.readouterr().out
    said = ('views', 'backward', 'bookkeeping', 'at least', 'signs', 'images/s')
    assert all(k in text for k in said)
    found = json.loads((folder / 'speed.json').read_text())
    assert len(found['seconds']['forward']) == 4 and found['cli']['batches'] == 4
    assert found['images'] == 8 and found['images_per_s'] > 0
    assert sorted(os.listdir(folder)) == ['pics', 'speed.json']


@pytest.mark.parametrize(
    'more, word',
    [
        (('--batches', 0), 'batches must be a whole number at least 1, got 0'),
        (('--batches', 100), 'the 10 left, got 100'),
        (('--out', 'nowhere/speed.json'), 'no folder nowhere'),
        (('--method', 'simclr'), "'moco_v3'"),
        (('--device', 'cuda:99'), 'cuda'),
    ],
)
def test_speed_says_what_is_wrong(folder, capsys, monkeypatch, more, word):
    monkeypatch.chdir(folder)
    assert run('speed', '--data', 'pics', *UNTIMED, *more) == 2
    err = capsys.readouterr().err
    assert word in err and 'Traceback' not in err


def test_unknown_option_is_refused(capsys):
    assert run('pretrain', '--out', 'x', '--epoch', '3') != 0


def test_help(capsys):
    assert run('--help') == 0
    text = capsys.readouterr().out
    assert all(c in text for c in ('pretrain', 'probe', 'compare', 'show', 'info', 'demo'))
    assert run('pretrain', '--help') == 0 and 'side of the views, pixels' in capsys.readouterr().out


def test_resume_refuses_another_method(folder, capsys):
    assert pretrain(folder) == 0
    for more in ('--method moco_v3', '--options hidden=33', '--epochs 1', '--width 64'):
        assert run('pretrain', '--out', folder / 'run', '--resume', more) == 2
        assert '--resume goes on as the run began' in capsys.readouterr().err
    assert run('pretrain', '--out', folder / 'run', '--resume') == 0


def test_options_of_a_method_are_named(folder, capsys):
    paths = ('--data', folder / 'pics', '--out', folder / 'run')
    words = '--size 16 --method sce --encoder resnet18 --width 8 --options tau_t=.1'
    assert run('pretrain', *paths, words) == 2
    assert 'preset, lam, tau, tau_m' in capsys.readouterr().err


def test_probe_of_both_towers_by_several_protocols_and_compare(tmp_path, capsys):
    for seed in (0, 1):
        out = tmp_path / f'mine_seed{seed}'
        words = f'--method moco_v3 --seed {seed} --subset 200'
        assert run('pretrain', '--out', out, words, TINY) == 0
    runs = [tmp_path / f'mine_seed{s}' for s in (0, 1)]
    words = '--protocols knn retrieval --settings knn.k=5 retrieval.metric=mAP'
    few = [words, '--cache', tmp_path / 'features']
    assert run('probe', *runs, *few) == 0
    assert run('probe', *runs, '--tower momentum --no-baselines', *few) == 0
    records = [json.loads(l) for f in runs for l in open(f / 'records.jsonl')]
    assert [(r['protocol'], r['tower'], r['seed']) for r in records] == [
        (p, t, s) for s in (0, 1) for t in ('online', 'momentum') for p in ('kNN', 'retrieval')
    ]
    assert {r['encoder'] for r in records} == {'mine'}
    assert {r['settings'].get('k') for r in records if r['protocol'] == 'kNN'} == {5}
    capsys.readouterr()
    assert run('compare', tmp_path, '--out', tmp_path / 'c') == 0
    text = capsys.readouterr().out
    assert 'online' in text and 'momentum' in text and '±' in text
    files = {'comparison.md', 'comparison.csv', 'comparison.png'}
    assert {f.name for f in (tmp_path / 'c').iterdir()} == files
    assert run('compare', tmp_path / 'nowhere') == 2


def test_somebody_elses_encoder(tmp_path, capsys):
    import torchvision

    words = '--data photos --subset 60 --size 32 --protocols knn --settings knn.k=3 --no-baselines'
    theirs = tmp_path / 'moco.pth.tar'
    r18, r34 = '--arch torchvision/resnet18', '--arch torchvision/resnet34'
    out = ('--out', tmp_path / 'r')
    assert run('probe --encoder torchvision/resnet18 --random', words, *out) == 0
    weights = torchvision.models.resnet18().state_dict()
    body = {k: v for k, v in weights.items() if not k.startswith('fc')}
    torch.save(dict(state_dict={f'module.encoder_q.{k}': v for k, v in body.items()}), theirs)
    assert run('probe', '--encoder', theirs, r18, words, *out) == 0
    assert run('probe', '--encoder', theirs, r34, words, *out) == 2
    assert len((tmp_path / 'r' / 'records.jsonl').read_text().splitlines()) == 2
    assert run('compare', tmp_path / 'r') == 0


@pytest.mark.parametrize(
    'words, word',
    [
        (('--protocols', 'kNN'), "one of 'knn', 'linear'"),
        (('--settings', 'svm.C=1'), 'PROTOCOL.NAME=VALUE'),
        (('--settings', 'knn.K=1'), "'K'"),
        (('--tower', 'mean'), 'online'),
        (('--tower', 'momentum'), 'no momentum encoder'),
        (('--overlap', 'maybe'), 'refuse'),
    ],
)
def test_wrong_words_for_probe(tmp_path, capsys, words, word):
    assert run('pretrain', '--out', tmp_path / 'r', '--subset', 200, TINY) == 0
    capsys.readouterr()
    assert run('probe', tmp_path / 'r', *words) == 2 and word in capsys.readouterr().err
    assert not (tmp_path / 'r' / 'records.jsonl').exists()


def test_a_leak_is_refused_in_pretraining_and_in_probing(tmp_path, capsys):
    import shutil

    g = torch.Generator().manual_seed(0)
    for part, n in (('train', 12), ('test', 6)):
        for c in ('cats', 'dogs'):
            (tmp_path / 'pics' / part / c).mkdir(parents=True)
            for i in range(n):
                x = torch.randint(0, 256, (20, 20, 3), generator=g, dtype=torch.uint8).numpy()
                Image.fromarray(x).save(tmp_path / 'pics' / part / c / f'{i}.png')
    assert pretrain(tmp_path, out='clean') == 0
    planted = tmp_path / 'pics' / 'test' / 'cats' / 'planted.png'
    shutil.copy(tmp_path / 'pics' / 'train' / 'cats' / '0.png', planted)
    assert pretrain(tmp_path) == 2
    assert '1 of 13 test images are in the train split too' in capsys.readouterr().err
    assert pretrain(tmp_path, '--overlap', 'drop', out='dropped') == 0
    few = '--settings knn.k=3'
    assert run('probe', tmp_path / 'clean', few, '--overlap', 'drop') == 2
    assert 'trained on 1 of 13 test images' in capsys.readouterr().err  # the planted one
    assert run('probe', tmp_path / 'dropped', few) == 2
    assert run('probe', tmp_path / 'dropped', few, '--overlap', 'drop') == 0


# ---- the process: threads that wait quietly


def environment(**more):
    "This process's environment, without what says how threads wait."
    return {k: v for k, v in os.environ.items() if k not in WAIT_VARIABLES} | more


def in_a_process(code, **more):
    "What a program prints."
    words = [sys.executable, '-c', code]
    r = subprocess.run(words, capture_output=True, text=True, env=environment(**more))
    assert r.returncode == 0, r.stderr
    return r.stdout.split()


SAY = "import os, sys; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"


def test_the_command_lets_threads_sleep_before_torch_is_loaded():
    "The entry is looked up as pip installs it; what it starts is replaced by a line that looks."
    from configparser import ConfigParser

    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini')
    module, function = config['DEFAULT']['console_scripts'].split('=')[1].split(':')
    code = f"""
import importlib, os, sys
start = getattr(importlib.import_module({module!r}), {function!r})
print('torch' in sys.modules)
sys.argv = ['ssl_patch', '--help']
try:
    start()
except SystemExit:
    pass
print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"""
    said = in_a_process(code)
    assert said[0] == 'False' and said[-2:] == ['True', 'passive']
    assert in_a_process(code, OMP_WAIT_POLICY='active')[-1] == 'active'  # a user's own value stays
    assert in_a_process(code, GOMP_SPINCOUNT='9')[-1] == 'None'


def test_python_m_is_the_command(tmp_path):
    "`python -m ssl_patch`: a module that it imports sees the variable."
    (tmp_path / 'look.py').write_text(SAY)
    words = '-m ssl_patch pretrain --out r --modules look --method simclr'.split()
    r = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment(), cwd=tmp_path
    )
    assert r.returncode == 2 and r.stdout.split() == ['passive', 'True']
    assert 'method must be one of' in r.stderr


def test_importing_the_library_leaves_the_environment_alone():
    rooms = 'cli, ssl_patch.all, ssl_patch.commands.pretrain, ssl_patch.ground.threads'
    code = 'import os; before = dict(os.environ)\n'
    code += f'import ssl_patch.{rooms}\nprint(dict(os.environ) == before)'
    assert in_a_process(code) == ['True']


# ---- modules


def test_modules_are_named_where_they_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'half.py').write_text('import nowhere_to_be_found')
    for words, word in (('--modules my_method', "'my_method'"), ('--modules half', 'nowhere_to')):
        assert run('pretrain --out r', words) == 2
        err = capsys.readouterr().err
        assert word in err and 'Traceback' not in err


def test_help_lists_the_methods_that_are_registered(capsys):
    from ssl_patch.methods.compose import load_papers

    assert run('pretrain --help') == 0
    text = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
    papers = [n for n, m in load_papers().items() if m.build.__module__.startswith('ssl_patch')]
    assert len(papers) == 11 and f'one of {", ".join(papers)}, or' in text


def test_modules_of_a_run_are_not_imported_because_a_file_says_so(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / 'quiet_module.py').write_text('import os; os.environ["IMPORTED"] = "yes"')
    monkeypatch.setenv('IMPORTED', 'no')
    assert pretrain(folder, '--modules', 'quiet_module') == 0 and os.environ['IMPORTED'] == 'yes'
    monkeypatch.setenv('IMPORTED', 'no')
    monkeypatch.delitem(sys.modules, 'quiet_module')
    assert run('pretrain', '--out', folder / 'run', '--resume') == 2
    assert 'was begun with --modules quiet_module' in capsys.readouterr().err
    assert run('probe', folder / 'run', '--settings knn.k=3', '--protocols knn') == 2  # no test
    assert run('info', folder / 'run') == 0 and run('show', folder / 'run', '--images', 1) == 0
    assert os.environ['IMPORTED'] == 'no'
    again = ('--resume', '--modules', 'quiet_module')
    assert run('pretrain', '--out', folder / 'run', *again) == 0 and os.environ['IMPORTED'] == 'yes'


# ---- runs of before


def test_a_run_of_an_earlier_version_is_told_and_measured_and_not_resumed(tmp_path, capsys):
    import shutil

    old = tmp_path / 'APS_seed0'
    shutil.copytree(ROOT / 'tests' / 'fixtures' / 'old_run' / 'APS_seed0', old)
    assert run('info', old) == 0
    text = capsys.readouterr().out
    assert 'AsymmetricPatchSampler(' in text and 'epoch 2 of 2' in text and 'warm-up' in text
    for tower in ('online', 'momentum'):
        words = f'--protocols knn --settings knn.k=5 --no-baselines --tower {tower}'
        assert run('probe', old, words) == 0
    lines = (old / 'records.jsonl').read_text().splitlines()
    assert [json.loads(l)['tower'] for l in lines[-2:]] == ['online', 'momentum']
    assert run('compare', old) == 0
    for words in (('pretrain', '--resume', '--out', old), ('show', old)):
        assert run(*words) == 2
        assert 'begun by an earlier version of ssl_patch' in capsys.readouterr().err


def test_completion_is_written(capsys):
    "By the parser itself: commands, and options of each."
    with pytest.raises(SystemExit) as e:
        main(['--tyro-print-completion', 'bash'])
    out = capsys.readouterr().out
    assert not e.value.code and all(w in out for w in ('pretrain', 'embed', '--batch-size'))


def losses_of(tb):
    "(step, loss) in the event files of a folder, as TensorBoard reads them."
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = [EventAccumulator(str(f)).Reload() for f in sorted(tb.glob('events*'))]
    scalars = [a.Scalars('loss') for a in found if 'loss' in a.Tags()['scalars']]
    return [(e.step, e.value) for events in scalars for e in events]


def test_a_run_is_tracked_and_goes_on_where_it_was_tracked(folder, capsys, monkeypatch):
    pytest.importorskip('tensorboard')
    (folder / 'elsewhere').mkdir()
    monkeypatch.chdir(folder)
    assert pretrain(folder, '--track tensorboard:tb/one', f'tensorboard:{folder}/tb/two') == 0
    monkeypatch.chdir(folder / 'elsewhere')  # relative folders stay where they were
    assert run('pretrain', '--out', folder / 'run', '--resume --epochs 3 --progress quiet') == 0
    found = losses_of(folder / 'tb' / 'one')
    assert [step for step, _ in found] == [1, 2, 3]
    assert losses_of(folder / 'tb' / 'two') == found
    assert not list((folder / 'elsewhere').iterdir())


@pytest.mark.parametrize('word', ['tensorboard', 'wandb:', 'tensorbord:runs/tb'])
def test_a_wrong_tracker_is_told_with_those_that_there_are(folder, capsys, word):
    assert pretrain(folder, '--track', word) == 2
    said = capsys.readouterr().err
    assert 'tensorboard:FOLDER, wandb:PROJECT, trackio:PROJECT' in said and repr(word) in said
    assert not (folder / 'run').exists()


def test_a_tracker_that_is_not_installed_is_told_before_the_first_batch(
    folder, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as where it is not installed
    assert pretrain(folder, '--track wandb:mine') == 2
    said = capsys.readouterr()
    assert 'pip install wandb' in said.err and 'epoch 1' not in said.out

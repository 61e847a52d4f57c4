"Resuming to the bit, stopping by signals, disks that refuse, losses that explode."
import csv, json, os, signal, subprocess, sys, textwrap, time
import pytest, torch
from ssl_patch import training
from ssl_patch.encoders import mlp, resnet
from ssl_patch.methods import build_method
from ssl_patch.towers import Queue
from ssl_patch.training import Pretrainer

def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def state(run):
    s = run.state_dict(); s.pop('seconds')
    s['history'] = [{k: v for k, v in h.items() if k not in ('seconds', 'images_per_s')} for h in s['history']]
    return s

class StopAt:
    "A progress display that presses ctrl-C after a given batch."
    def __init__(self, run, at): self.run, self.at = run.progress, at
    def __getattr__(self, name): return getattr(self.run, name)
    def batch(self, done):
        if done == self.at: os.kill(os.getpid(), signal.SIGINT)

@pytest.mark.parametrize('method, bf16', [('aps', False), ('aps', True), ('moco_v3', False), ('moco_v3', True), ('moco_v2', False), ('moco_v2', True), ('sce', False)])
def test_2n_epochs_equal_n_and_resume_n(pretrainer, tmp_path, method, bf16):
    make = lambda **kw: pretrainer(method, drop_path=.2, bf16=bf16, **kw)
    whole = make().fit()
    make(out=tmp_path/'r').fit(2)
    assert same(state(whole), state(make(weights=1, out=tmp_path/'r', resume=True).fit()))
    assert not same(state(whole), state(make(weights=1).fit()))

@pytest.mark.parametrize('at', [1, 6, 8])
def test_interrupted_in_an_epoch_and_resumed(pretrainer, tmp_path, at):
    whole = pretrainer().fit()
    run = pretrainer(out=tmp_path/'r'); run.progress = StopAt(run, at)
    with pytest.raises(KeyboardInterrupt, match=f'after batch {at} of 16'): run.fit()
    assert same(state(whole), state(pretrainer(weights=1, out=tmp_path/'r', resume=True).fit()))

@pytest.mark.parametrize('name', ['moco_v2', 'sce', 'co2', 'ressl'])
def test_resumed_with_a_half_filled_queue(noise, tmp_path, name):
    "A queue of 200 after one batch of 64, and after a write that wrapped; another start of weights and queue is overwritten."
    def make(weights=0, **kw):
        torch.manual_seed(weights)
        m = build_method(name, resnet('resnet18', 16, width=8), heads=(mlp(64, 16, last_norm=False, bias=True), None), candidates=Queue(200, seed=weights))
        return Pretrainer(m, noise, epochs=2, batch_size=64, progress='quiet', knn_every=0, **kw)
    whole = make().fit()
    for at in (1, 5):
        run = make(out=tmp_path/f'{at}'); run.progress = StopAt(run, at)
        with pytest.raises(KeyboardInterrupt): run.fit()
        assert run.method.queue.next == at*64 % 200
        assert same(state(whole), state(make(weights=1, out=tmp_path/f'{at}', resume=True).fit()))

def test_a_run_that_never_began_can_be_begun_again(pretrainer, tmp_path):
    "A crash before the first checkpoint leaves a config.json alone: the folder is free."
    run = pretrainer(out=tmp_path/'r'); run.method.objective = lambda q, k, queue: 1/0
    with pytest.raises(ZeroDivisionError): run.fit()
    assert [f.name for f in (tmp_path/'r').iterdir()] == ['config.json']
    pretrainer(out=tmp_path/'r', lr=.0123).fit(1)
    assert json.loads((tmp_path/'r'/'config.json').read_text())['lr'] == .0123

def test_the_default_batch_suits_split_batch_norm(noise):
    "100 images: a sixteenth would be 4, and eight groups want 16."
    torch.manual_seed(0)
    m = build_method('moco_v2', resnet('resnet18', 16, width=8), heads=(mlp(64, 16, last_norm=False, bias=True), None))
    assert Pretrainer(m, noise.sample(100), epochs=1, progress='quiet').recipe.batch_size == 16
    with pytest.raises(ValueError, match="data must be what images"): Pretrainer(m, 'photos')

def test_a_collapse_is_named(noise, capsys):
    "A constant embedding: the log says so once, with what to try."
    torch.manual_seed(0)
    m = build_method('moco_v2', resnet('resnet18', 16, width=8), heads=(mlp(64, 16, last_norm=False, bias=True), None))
    for tower in (m.trunk, m.target.net): torch.nn.init.zeros_(tower.projector[0].weight)
    Pretrainer(m, noise, epochs=3, batch_size=64, lr=1e-6, progress='lines', knn_every=0).fit()
    out = capsys.readouterr().out
    assert out.count('a collapse') == 1 and 'epoch 1: the keys of different images have become alike' in out and 'Try a lower learning rate' in out

def test_signs_are_in_the_history(pretrainer):
    h = pretrainer('sce').fit(1).history[-1]
    assert 0 < h['entropy'] < 5 and 1 <= h['rank'] <= 64 and 0 < h['feature_std'] < 1.1
    assert pretrainer('moco_v2').fit(1).history[-1]['entropy'] == 0

def test_the_queue_fits_the_data_and_the_batch(pretrainer):
    assert pretrainer('sce').method.queue.size == 64 # 256 images: a sixth is 42, a batch is 64
    assert 'queue of 64' in pretrainer('sce').config()['slots']['candidates']
    with pytest.raises(ValueError, match='multiple of 8'): pretrainer('moco_v2', batch_size=12)

def test_interrupt_then_fit_goes_on_in_memory(pretrainer):
    whole, run = pretrainer().fit(), pretrainer()
    progress = run.progress; run.progress = StopAt(run, 5)
    with pytest.raises(KeyboardInterrupt): run.fit()
    run.progress = progress
    assert same(state(whole), state(run.fit()))

def test_the_global_generator_is_left_alone(pretrainer):
    run = pretrainer()
    torch.manual_seed(7); a = torch.rand(1)
    torch.manual_seed(7); run.fit()
    assert torch.equal(a, torch.rand(1))

def test_knn_along_the_way_changes_nothing(pretrainer):
    a, b = pretrainer().fit(), pretrainer(knn_every=1).fit()
    assert same(a.method.state_dict(), b.method.state_dict()) and all(h['knn'] is not None for h in b.history)

SCRIPT = textwrap.dedent('''
    import sys, torch
    from ssl_patch.data import images
    from ssl_patch.encoders import vit
    from ssl_patch.methods import APS
    from ssl_patch.training import Pretrainer
    torch.manual_seed(0); torch.set_num_threads(1)
    x = torch.randint(0, 256, (512, 3, 16, 16), dtype=torch.uint8)
    m = APS(vit(size=16, patch=4, width=32, depth=2, heads=2), hidden=32, out=16)
    run = Pretrainer(m, images(x), epochs=100000, batch_size=64, out=sys.argv[1], resume='resume' in sys.argv, progress='lines')
    print('ready', run.batches, flush=True)
    run.fit(1 if 'resume' in sys.argv else None)
''')

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_killed_from_outside(tmp_path, number, code):
    "SIGTERM saves before it dies; after SIGKILL the last checkpoint is whole. Both resume."
    out = tmp_path/'r'
    go = lambda *a: subprocess.Popen([sys.executable, '-c', SCRIPT, str(out), *a], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    p = go()
    for _ in range(600):
        if (out/'metrics.csv').exists(): break
        time.sleep(.1)
    p.send_signal(number)
    text = p.communicate(timeout=60)[0]
    assert p.returncode == code, text
    if number == signal.SIGTERM: assert 'stopped after batch' in text
    done = torch.load(out/'checkpoint.pt', weights_only=True)['batches']
    p = go('resume'); text = p.communicate(timeout=120)[0]
    assert p.returncode == 0 and f'ready {done}' in text, text

def test_disk_that_refuses(pretrainer, tmp_path, monkeypatch):
    "A write that fails leaves the previous checkpoint whole and says so."
    run = pretrainer(out=tmp_path/'r'); run.fit(1)
    before = (tmp_path/'r'/'checkpoint.pt').read_bytes()
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(training.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device.*previous version is untouched'): run.fit()
    monkeypatch.undo()
    assert (tmp_path/'r'/'checkpoint.pt').read_bytes() == before and not list((tmp_path/'r').glob('*.tmp'))
    assert same(state(pretrainer().fit()), state(run.fit())) # nothing computed was lost: the run goes on

def test_folder_that_cannot_be_written(pretrainer, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='cannot write in the run folder'): pretrainer(out=tmp_path/'file'/'r')

def test_folder_that_exists(pretrainer, tmp_path):
    pretrainer(out=tmp_path/'r').fit(1)
    with pytest.raises(FileExistsError, match='already holds a run'): pretrainer(out=tmp_path/'r')
    with pytest.raises(FileNotFoundError, match='no checkpoint.pt'): pretrainer(out=tmp_path/'other', resume=True)

@pytest.mark.parametrize('change, word', [(dict(method='moco_v3'), 'method'), (dict(seed=1), 'seed'), (dict(lr=1.), 'lr'), (dict(batch_size=32), 'training')])
def test_checkpoint_of_another_run(pretrainer, tmp_path, change, word):
    pretrainer(out=tmp_path/'r').fit(1)
    with pytest.raises(ValueError, match=f'belongs to another run.*{word}: the checkpoint has'): pretrainer(out=tmp_path/'r', resume=True, **change)

def test_checkpoint_that_is_garbage(pretrainer, tmp_path):
    pretrainer(out=tmp_path/'r').fit(1)
    (tmp_path/'r'/'checkpoint.pt').write_bytes(b'not a checkpoint')
    with pytest.raises(ValueError, match='not a readable checkpoint'): pretrainer(out=tmp_path/'r', resume=True)

def test_loss_that_is_not_finite(pretrainer, tmp_path):
    run = pretrainer(out=tmp_path/'r'); run.fit(1)
    before = (tmp_path/'r'/'checkpoint.pt').read_bytes()
    with torch.no_grad(): run.encoder.net.cls_token.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match=r'batch 4 \(epoch 2\).*untouched'): run.fit()
    assert (tmp_path/'r'/'checkpoint.pt').read_bytes() == before

def test_run_folder(pretrainer, tmp_path):
    run = pretrainer(out=tmp_path/'r', knn_every=2).fit()
    assert {f.name for f in (tmp_path/'r').iterdir()} == {'config.json', 'metrics.csv', 'checkpoint.pt', 'encoder.safetensors', 'curves.png'}
    rows = list(csv.DictReader(open(tmp_path/'r'/'metrics.csv')))
    assert [int(r['epoch']) for r in rows] == [1, 2, 3, 4] and [bool(r['knn']) for r in rows] == [False, True, False, True]
    config = json.loads((tmp_path/'r'/'config.json').read_text())
    assert config['training']['batch_size'] == 64 and config['encoder'] == run.encoder.spec and config['versions']['torch'] == torch.__version__

@pytest.mark.parametrize('change, word', [
    (dict(epochs=0), 'epochs'), (dict(batch_size=1), 'batch_size'), (dict(batch_size=1000), '1000'), (dict(lr=0.), 'lr'), (dict(epochs=1.5), 'epochs'),
    (dict(optimizer='adam'), 'adam'), (dict(schedule='day'), 'day'), (dict(momentum=3), "unknown training option 'momentum'"), (dict(progress='loud'), 'loud')])
def test_bad_input(pretrainer, change, word):
    with pytest.raises(ValueError, match=word): pretrainer(**change)

def test_images_without_a_label_do_not_vote_along_the_way(pretrainer, noise):
    "kNN along the way asks the labelled images only; without any label, or without a test part, it is left out."
    from ssl_patch.data import images
    x, y = noise.train.images, noise.train.labels.clone(); y[::2] = -1
    run = pretrainer(); enc = run.encoder
    part = images((x, y), test=(noise.test.images, noise.test.labels))
    alone = images((x[1::2], y[1::2]), test=(noise.test.images, noise.test.labels))
    assert training.subset_knn(enc, part, k=5) == training.subset_knn(enc, alone, k=5)
    for data in (images(x), images((x, noise.train.labels)), images((x, noise.train.labels), test=noise.test.images)):
        assert Pretrainer(run.method, data, epochs=1, batch_size=64, knn_every=1, progress='quiet').knn_every == 0

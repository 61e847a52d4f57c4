"""A paper that the package has never heard of: its own loss, patch sampler and settings, in a file
of a user. Trained from the command line, stopped, resumed, measured, and found in a record."""

import json
import sys
import pytest
import torch
from ssl_patch.cli import main
from ssl_patch.methods.compose import load_papers
from ssl_patch.training.pretrain import Pretrainer

PAPER = """
"Decoupled contrast on halves: no positive among the negatives; view 1 is left, view 2 is right."
from dataclasses import dataclass, replace
from functools import partial
import math
import torch
from ssl_patch.methods.configs import MethodConfig, TrainConfig, config_for, register_method
from ssl_patch.methods.contrast import ImageLoss
from ssl_patch.methods.presets import method_from_config
from ssl_patch.models.heads import mlp_heads
from ssl_patch.views.augmentations import aug_weak


def decoupled(q, k, tau=0.1):
    s = q @ k.detach().T / tau
    own = torch.eye(len(q), dtype=torch.bool, device=q.device)
    return (s.masked_fill(own, -torch.inf).logsumexp(1) - s.diagonal()).mean()


@dataclass(frozen=True)
class DecoupledLoss(ImageLoss):
    tau: float = 0.1

    def __call__(self, q, k, queue=None, offset=0):
        return decoupled(q, k, self.tau)

    def chance(self, batch, queue=None):
        return math.log(batch - 1)


@dataclass(frozen=True)
class Halves:
    keep_ratio: float = 0.5

    def __call__(self, view1, view2, grid, generator=None):
        rows, cols = grid
        number = torch.arange(rows * cols).view(rows, cols)
        halves = number[:, : cols // 2].flatten(), number[:, cols // 2 :].flatten()
        return tuple(half.expand(len(view1.box), 1, -1).to(view1.box.device) for half in halves)


small = MethodConfig(
    augmentations=(aug_weak, aug_weak),
    heads=partial(mlp_heads, hidden=32, out=16),
    loss=DecoupledLoss(),
    symmetric=True,
    train_config=TrainConfig(optimizer='sgd', base_lr=0.05, warmup_epochs=0, batch_size=20),
    source='nowhere: made up for a test',
)


def Decoupled(encoder, preset=None, tau=0.1, **slots):
    "Decoupled contrast (a user, today)."
    config = config_for(dict(small=small), preset or 'small', encoder.size)
    config = replace(config, loss=DecoupledLoss(tau))
    return method_from_config(encoder, config, 'Decoupled', **dict(patch_sampler=Halves()) | slots)


register_method('decoupled', Decoupled, dict(small=small))
"""
WORDS = (
    '--modules my_paper --method decoupled --options preset=small tau=.3 --encoder vit_tiny '
    '--patch 8 --width 32 --depth 1 --heads 2 --epochs 2 --subset 200 --progress quiet'
)


@pytest.fixture
def paper(tmp_path, monkeypatch):
    "The file in a working folder; afterwards nobody knows the method."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    (tmp_path / 'my_paper.py').write_text(PAPER)
    yield tmp_path
    forget()


def forget():
    "As in a new process: the method is not registered."
    sys.modules.pop('my_paper', None)
    load_papers().pop('decoupled', None)


def run(words):
    try:
        main(words.split())
        return 0
    except SystemExit as e:
        return e.code or 0


def half_way(words, monkeypatch):
    "Run a command that stops after one epoch."
    with monkeypatch.context() as m:
        whole = Pretrainer.fit
        m.setattr(Pretrainer, 'fit', lambda self: whole(self, 1))
        assert run(words) == 0


def weights(folder):
    from ssl_patch.models.files import load_encoder

    return load_encoder(folder / 'encoder.safetensors').state_dict()


def test_trained_resumed_and_found_in_a_record(paper, capsys, monkeypatch):
    half_way(f'pretrain --out runs/half {WORDS}', monkeypatch)
    forget()
    assert run('pretrain --out runs/half --resume') == 2
    assert 'was begun with --modules my_paper' in capsys.readouterr().err
    assert 'decoupled' not in load_papers()  # no file has made us import
    assert run('pretrain --out runs/half --resume --modules my_paper --progress quiet') == 0
    assert run(f'pretrain --out runs/whole {WORDS}') == 0
    half, whole = weights(paper / 'runs/half'), weights(paper / 'runs/whole')
    assert all(torch.equal(half[k], whole[k]) for k in whole)

    config = json.loads((paper / 'runs/whole/config.json').read_text())
    assert config['method'] == 'Decoupled'
    assert 'DecoupledLoss(tau=0.3)' in config['slots']['loss']
    assert config['slots']['patch_sampler'] == 'Halves(keep_ratio=0.5)'
    assert config['train_config']['optimizer'] == 'sgd'
    assert config['lr'] == pytest.approx(0.05 * config['train_config']['batch_size'] / 256)

    forget()
    assert run('probe runs/whole --protocols knn --no-baselines') == 0  # an encoder needs no paper
    record = json.loads((paper / 'runs/whole/records.jsonl').read_text().splitlines()[0])
    assert record['encoder'] == 'Decoupled, online encoder' and 0 < record['value'] < 1
    capsys.readouterr()
    assert run('info runs/whole') == 0
    assert 'Decoupled on photos' in capsys.readouterr().out
    assert run('show runs/whole --images 1') == 2
    assert 'decoupled' in capsys.readouterr().err
    assert run('show runs/whole --images 1 --modules my_paper') == 0
    assert (paper / 'runs/whole/patches_0.png').exists()


def test_its_options_are_checked_like_any_other(paper, capsys):
    for options, word in (('power=3', 'preset, tau'), ('preset=large', 'small')):
        words = WORDS.replace('preset=small tau=.3', options)
        assert run(f'pretrain --out runs/wrong {words}') == 2
        err = capsys.readouterr().err
        assert word in err and 'Traceback' not in err


def test_it_is_a_method_like_any_other_in_python(paper):
    "Built by name, composed with a slot of another paper."
    from ssl_patch.commands.words import import_modules
    from ssl_patch.methods.compose import build_method
    from ssl_patch.methods.sce import SCELoss
    from ssl_patch.models.encoders import vit
    from ssl_patch.views.augmentations import make_view

    import_modules(['my_paper'])
    encoder = vit('tiny', size=16, patch=4, width=32, depth=1, heads=2)
    method = build_method('decoupled', encoder, loss=SCELoss())
    g = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 24, 24, generator=g)
    views = [make_view(x, a, g) for a in method.augmentations]
    (keeps,) = method.draw_patches(views, g)
    assert keeps[0].shape == (8, 8)
    loss, _ = method(views, keeps)
    loss.backward()
    assert torch.isfinite(loss) and method.chance(8) == pytest.approx(2 * torch.tensor(8.0).log())

"Tiny encoders, views of noise, plain losses, states, and a stop: for tests that make steps."

import os
import signal

import torch
import torch.nn.functional as F
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.views.augmentations import make_view


def tiny_vit(size=16, depth=2, **kw):
    torch.manual_seed(0)
    return vit(size=size, patch=4, width=32, depth=depth, heads=2, **kw)


def tiny_resnet(size=16, **kw):
    torch.manual_seed(0)
    return resnet('resnet18', size, width=8, **kw)


def draw(method, n=8, seed=0):
    "Views of `n` images of noise, and the patches that each step on them keeps."
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 20, 20), generator=g, dtype=torch.uint8)
    views = [make_view(x, a, g) for a in method.augmentations]
    return views, method.draw_patches(views, g)


def nce(p, z, tau):
    "InfoNCE of rows of p against rows of z, of any length: row i of z is the positive of row i."
    s = F.normalize(p, dim=1) @ F.normalize(z, dim=1).T / tau
    return (s.logsumexp(1) - s.diagonal()).mean()


def said(call, words):
    "Whether a call is refused with a `ValueError` that has all the words."
    try:
        call()
    except ValueError as e:
        missing = [w for w in words if w not in str(e)]
        assert not missing, f'{missing} not in: {e}'
        return True
    return False


def same(a, b):
    "Equal nested states, tensors to the bit."
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state(run):
    "All that a run is, without what depends on the clock."
    s = run.state_dict()
    s.pop('seconds')
    s['history'] = [
        {k: v for k, v in h.items() if k not in ('seconds', 'images_per_s')} for h in s['history']
    ]
    return s


class StopAt:
    "A progress display that presses ctrl-C after a given batch."

    def __init__(self, run, at):
        self.run, self.at = run.progress, at

    def __getattr__(self, name):
        return getattr(self.run, name)

    def batch(self, done):
        if done == self.at:
            os.kill(os.getpid(), signal.SIGINT)

"A toy network, toy images and a plain kNN that tests of the evaluation share."

import math

import torch
from torch import nn

from ssl_patch.data.images import ImageData, TensorImages


class Net(nn.Module):
    """A convolution with batch-norm and dropout: wrong in train mode. Notes how many images each
    call had."""

    def __init__(self, seed=1, size=8):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Conv2d(3, 6, 3),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
        self.size, self.dim, self.log = size, 6, []

    @property
    def calls(self):
        return sum(n != 4 for n in self.log)  # four pictures of noise are a key, no features

    @property
    def seen(self):
        return sum(n for n in self.log if n != 4)

    def reinitialized(self, seed):
        return Net(seed, self.size)

    def forward(self, x):
        self.log.append(len(x))
        return self.net(x)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_images(n, classes=3, seed=0, size=8, noise=25, labels=True):
    "Colour says the class; noise makes it less than trivial."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    colour = torch.tensor([[200.0, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 40]])[:classes]
    x = colour[y][:, :, None, None] + noise * torch.randn(n, 3, size, size, generator=g)
    return TensorImages(
        x.clamp(0, 255).byte(),
        y if labels else None,
        [f'c{i}' for i in range(classes)] if labels else None,
    )


def make_data(n=60, m=30, **kw):
    return ImageData(
        make_images(n, seed=1, **kw),
        make_images(m, seed=2, **kw),
        'colours',
        'the label is a colour',
    )


def brute(queries, bank, labels, k, T, classes):
    out = []
    for q in queries.double():
        sims = []
        for b in bank.double():
            sims.append(float(q @ b / q.norm() / b.norm()))
        best = sorted(range(len(sims)), key=lambda i: -sims[i])[:k]
        votes = [sum(math.exp(sims[i] / T) for i in best if labels[i] == c) for c in range(classes)]
        out.append(votes.index(max(votes)))
    return torch.tensor(out)


@torch.no_grad()
def learned(encoder):
    "The same encoder, its weights no longer those that it was made with, as after training."
    for p in encoder.parameters():
        p.mul_(1.001)
    return encoder

"A toy network that tests of probes, protocols and figures share."
import torch
from torch import nn

class Net(nn.Module):
    "A convolution with batch-norm and dropout: wrong in train mode. Notes how many images each call had."
    def __init__(self, seed=1, size=8):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.size, self.dim, self.log = size, 6, []
    @property
    def calls(self): return sum(n != 4 for n in self.log) # four pictures of noise are a key, no features
    @property
    def seen(self): return sum(n for n in self.log if n != 4)
    def fresh(self, seed): return Net(seed, self.size)
    def forward(self, x): self.log.append(len(x)); return self.net(x)

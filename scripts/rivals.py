"""What one would take instead of ssl_patch: torchvision image by image, kornia, lightly, and plain re-writings of APS. For scripts/bench.py.

kornia and lightly are optional (`pip install -e '.[bench]'`); `have('kornia')` says whether one is there. Nothing here uses the code that it is
measured against, apart from recipes (numbers) and the weights that both start from.

What the rivals do differently, to be remembered beside every ratio:
- torchvision on uint8: 8-bit rounding after every step (ours rounds never). On floats: the same arithmetic as ours.
- kornia: its crop samples bilinearly without antialiasing, so large images are cut down to a few pixels each (less work, aliased pictures); a
  batch shares one order of the four colour changes; it is handed floats, whose conversion is not counted.
- lightly: PIL images as torchvision's CIFAR10 or a folder gives them, 8-bit; its blur is three box filters, as wide as drawn, on every size."""
import copy, importlib.util
from functools import partial
import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from torch import nn


def have(name): return importlib.util.find_spec(name) is not None


# ---- views

def torchvision_view(r, first):
    "A recipe as a torchvision transform of one image; `first`: convert to float before everything else"
    to_float = T.ToDtype(torch.float32, scale=True)
    threshold = r.solarize_threshold if first else r.solarize_threshold*255
    steps = [T.RandomResizedCrop(r.size, r.scale, r.ratio, antialias=True)]
    if r.jitter_p: steps.append(T.RandomApply([T.ColorJitter(*r.jitter)], r.jitter_p))
    if r.gray_p: steps.append(T.RandomGrayscale(r.gray_p))
    if r.blur_p: steps.append(T.RandomApply([T.GaussianBlur(r.kernel, r.blur_sigma)], r.blur_p))
    if r.solarize_p: steps.append(T.RandomSolarize(threshold, r.solarize_p))
    steps.append(T.RandomHorizontalFlip(r.flip))
    return T.Compose([to_float, *steps] if first else [*steps, to_float])


class Views(torch.utils.data.Dataset):
    "A map-style data set as one writes it for a DataLoader: image `i`, once through every transform"
    def __init__(self, x, transforms): self.x, self.transforms = x, transforms
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return [t(self.x[i]) for t in self.transforms]


def data_loader(data, batch, workers):
    "Shuffled, last batch dropped; workers stay alive from pass to pass"
    return torch.utils.data.DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)


def kornia_view(r, mode):
    "A recipe in kornia; `mode`: its two ways to crop, 'slice' (image by image) and 'resample' (a warp of the whole batch)"
    import kornia.augmentation as K
    steps = [K.RandomResizedCrop((r.size, r.size), r.scale, r.ratio, resample='bilinear', align_corners=False, cropping_mode=mode)]
    if r.jitter_p: steps.append(K.ColorJitter(*r.jitter, p=r.jitter_p))
    if r.gray_p: steps.append(K.RandomGrayscale(p=r.gray_p))
    if r.blur_p: steps.append(K.RandomGaussianBlur((r.kernel,)*2, r.blur_sigma, separable=True, p=r.blur_p))
    if r.solarize_p: steps.append(K.RandomSolarize(thresholds=(r.solarize_threshold,)*2, additions=(0., 0.), p=r.solarize_p))
    steps.append(K.RandomHorizontalFlip(p=r.flip))
    return K.AugmentationSequential(*steps, data_keys=['input'], same_on_batch=False)


class Pictures(torch.utils.data.Dataset):
    "PIL images made of arrays, as torchvision.datasets.CIFAR10 gives them"
    def __init__(self, x, transform): self.x, self.transform = x.permute(0, 2, 3, 1).numpy(), transform
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        from PIL import Image
        return self.transform(Image.fromarray(self.x[i]))


def lightly_views(r, one=False):
    "lightly's MoCo v2 views (two, or `one` of them) with the numbers of `r`, without its normalisation, which ours leaves to the encoder"
    from lightly.transforms.moco_transform import MoCoV2Transform
    b, c, s, h = r.jitter
    both = MoCoV2Transform(r.size, cj_prob=r.jitter_p, cj_bright=b, cj_contrast=c, cj_sat=s, cj_hue=h, min_scale=r.scale[0],
                           random_gray_scale=r.gray_p, gaussian_blur=r.blur_p, sigmas=r.blur_sigma, hf_prob=r.flip, normalize=None)
    return both.transforms[0] if one else both


class Unlabelled(torch.utils.data.Dataset):
    "The images of a data set without their labels"
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, i): return self.data[i][0]


# ---- the sampler of APS

def plain_pair(box1, box2, flip1, flip2, n, k, draws, power, rng):
    "One pair of views, from the definition: a loop over draws and over the kept boxes of view 1; numpy over the cells of view 2."
    def cells(box, flip):
        y, x, h, w = box
        c = n - 1 - np.arange(n) if flip else np.arange(n)
        top, left = np.meshgrid(y + np.arange(n) * h / n, x + c * w / n, indexing='ij')
        return top.ravel(), left.ravel(), h / n, w / n
    top1, left1, h1, w1 = cells(box1, flip1)
    top2, left2, h2, w2 = cells(box2, flip2)
    order, keep1, keep2, free = rng.permutation(n * n), [], [], []
    for t in range(draws):
        kept, new = order[t*k:(t+1)*k], np.ones(n * n)
        for i in kept:
            high = np.minimum(top2 + h2, top1[i] + h1) - np.maximum(top2, top1[i])
            wide = np.minimum(left2 + w2, left1[i] + w1) - np.maximum(left2, left1[i])
            new -= np.maximum(high, 0) * np.maximum(wide, 0) / (h2 * w2)
        new[new < 1e-6] = 0
        weight = new**power
        keep1.append(kept)
        keep2.append(rng.choice(n * n, k, replace=False, p=weight / weight.sum()))
        free.append(new)
    return keep1, keep2, free


def crops(batch, rng, size=32, scale=(.15, 1)):
    "Boxes in whole pixels, as a random resized crop draws them, and flips."
    side = size * np.sqrt(rng.uniform(*scale, batch))
    stretch = np.exp(rng.uniform(np.log(3/4), np.log(4/3), batch) / 2)
    hw = np.clip(np.round([side / stretch, side * stretch]), 1, size)
    return np.stack([*np.floor(rng.uniform(size=(2, batch)) * (size - hw + 1)), *hw], 1), rng.uniform(size=batch) < .5


# ---- training steps

def perceptron(*dims):
    "Linear, batch-norm, ReLU, ...; batch-norm without affine at the end"
    layers = []
    for i, (a, b) in enumerate(zip(dims, dims[1:])):
        last = i == len(dims)-2
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last)] + [nn.ReLU()]*(not last)
    return nn.Sequential(*layers)


class PlainAPS(nn.Module):
    "APS as one would write it on timm: float32, timm's own attention, every token embedded and the kept ones gathered"
    def __init__(self, size, patch, width, depth, heads, hidden=512, out=128, tau=.1):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer
        self.net = VisionTransformer(size, patch, embed_dim=width, depth=depth, num_heads=heads, qkv_bias=False, num_classes=0, no_embed_class=True,
                                     norm_layer=partial(nn.LayerNorm, eps=1e-5))
        self.projector, self.predictor, self.tau = perceptron(width, hidden, hidden, out), perceptron(out, hidden, hidden, out), tau
        self.register_buffer('mean', torch.zeros(3, 1, 1)); self.register_buffer('std', torch.ones(3, 1, 1))

    def start_as(self, method):
        "The weights of one of our methods"
        for mine, theirs in ((self.net, method.encoder.net), (self.projector, method.trunk.projector), (self.predictor, method.predictor)):
            mine.load_state_dict(theirs.state_dict())
        self.mean.copy_(method.encoder.mean.view(3, 1, 1)); self.std.copy_(method.encoder.std.view(3, 1, 1))
        return self

    def embed(self, x, keep):
        net = self.net
        t = net.patch_embed((x-self.mean)/self.std) + net.pos_embed
        t = t.gather(1, keep[..., None].expand(-1, -1, t.shape[-1]))
        t = torch.cat([net.cls_token.expand(len(t), -1, -1), t], 1)
        return self.projector(net.norm(net.blocks(t))[:, 0])

    def ask(self, q, k):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        return F.cross_entropy(q @ k.T/self.tau, torch.arange(len(q), device=q.device))

    def forward(self, x1, x2, keep1, keep2):
        z1, z2 = self.embed(x1, keep1), self.embed(x2, keep2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return self.ask(p1, z2.detach()) + self.ask(p2, z1.detach())


def plain_resnet18(width=64, stem='imagenet'):
    "torchvision's ResNet-18 without its classifier; stem 'small': 3x3 of stride 1; narrower where asked"
    from torchvision.models.resnet import BasicBlock, ResNet
    class Narrow(ResNet):
        def _make_layer(self, block, planes, *args, **kw):
            if planes == 64: self.inplanes, self.conv1, self.bn1 = width, nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
            return super()._make_layer(block, planes*width//64, *args, **kw)
    net = Narrow(BasicBlock, (2, 2, 2, 2))
    if stem == 'small': net.conv1, net.maxpool = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.Identity()
    net.fc = nn.Identity()
    return net


class LightlyMoCo(nn.Module):
    "MoCo v2 of lightly's modules, put together as its documentation does: head of two layers, memory bank, momentum encoder without batch shuffling"
    def __init__(self, backbone, dim, out=128, queue=4096, tau=.1, momentum=.99):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad
        self.backbone, self.projection_head = backbone, MoCoProjectionHead(dim, dim, out)
        self.backbone_momentum, self.projection_head_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum); deactivate_requires_grad(self.projection_head_momentum)
        self.criterion, self.momentum = NTXentLoss(temperature=tau, memory_bank_size=(queue, out)), momentum
        self.register_buffer('mean', torch.zeros(3, 1, 1)); self.register_buffer('std', torch.ones(3, 1, 1))

    def start_as(self, method):
        "The weights and the queue of one of our methods"
        for mine, theirs in ((self.backbone, method.trunk.encoder.net), (self.backbone_momentum, method.target.net.encoder.net)): mine.load_state_dict(theirs.state_dict())
        for mine, theirs in ((self.projection_head, method.trunk.projector), (self.projection_head_momentum, method.target.net.projector)):
            mine.layers.load_state_dict(theirs.state_dict())
        self.criterion.memory_bank.bank.copy_(method.queue.keys)
        self.mean.copy_(method.encoder.mean.view(3, 1, 1)); self.std.copy_(method.encoder.std.view(3, 1, 1))
        return self

    def forward(self, x1, x2):
        from lightly.models.utils import update_momentum
        update_momentum(self.backbone, self.backbone_momentum, m=self.momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=self.momentum)
        query = self.projection_head(self.backbone((x1-self.mean)/self.std).flatten(start_dim=1))
        with torch.no_grad(): key = self.projection_head_momentum(self.backbone_momentum((x2-self.mean)/self.std).flatten(start_dim=1))
        return self.criterion(query, key)


def train_step(model, optimizer, *args, amp=False):
    "Forward, backward, optimiser, as one writes it"
    with torch.autocast(args[0].device.type, torch.bfloat16, enabled=amp): loss = model(*args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()

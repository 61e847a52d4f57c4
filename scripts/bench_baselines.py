"""What one would take instead of ssl_patch: torchvision image by image, kornia, lightly, and plain
re-writings of APS. For the benchmarks.

kornia and lightly are optional (`pip install -e '.[bench]'`). Nothing here uses the code that it is
measured against, apart from the numbers of augmentations and the weights that both start from.

What they do differently, to be remembered beside every ratio:
- torchvision on uint8: 8-bit rounding after every step (ours rounds never). On floats: the same
  arithmetic as ours.
- kornia: its crop samples bilinearly without antialiasing, so large images are cut down to a few
  pixels each (less work, aliased pictures); a batch shares one order of the four colour changes; it
  is handed floats, whose conversion is not counted.
- lightly: PIL images as torchvision's CIFAR10 or a folder gives them, 8-bit; its blur is three box
  filters, as wide as drawn, on every size."""

import copy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from torch import nn

# ---- views


def torchvision_view(a, first):
    "An augmentation as a torchvision transform of an image; `first`: to float before all else."
    to_float = T.ToDtype(torch.float32, scale=True)
    threshold = a.solarize_threshold if first else a.solarize_threshold * 255
    steps = [T.RandomResizedCrop(a.size, a.scale, a.ratio, antialias=True)]
    if a.jitter_p:
        steps.append(T.RandomApply([T.ColorJitter(*a.jitter)], a.jitter_p))
    if a.gray_p:
        steps.append(T.RandomGrayscale(a.gray_p))
    if a.blur_p:
        steps.append(T.RandomApply([T.GaussianBlur(a.kernel, a.blur_sigma)], a.blur_p))
    if a.solarize_p:
        steps.append(T.RandomSolarize(threshold, a.solarize_p))
    steps.append(T.RandomHorizontalFlip(a.flip))
    return T.Compose([to_float, *steps] if first else [*steps, to_float])


def twice_from_pil(a):
    "Two such views of a PIL image."
    *steps, to_float = torchvision_view(a, False).transforms
    view = T.Compose([*steps, T.ToImage(), to_float])
    return lambda im: [view(im), view(im)]


class Views(torch.utils.data.Dataset):
    "A data set as one writes it for a DataLoader: image `i`, once through every transform."

    def __init__(self, x, transforms):
        self.x, self.transforms = x, transforms

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return [t(self.x[i]) for t in self.transforms]


def data_loader(data, batch, workers):
    "Shuffled, last batch dropped; workers stay alive from pass to pass."
    return torch.utils.data.DataLoader(
        data,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def kornia_view(a, mode):
    "An augmentation in kornia; `mode`: 'slice' (image by image) or 'resample' (the whole batch)."
    import kornia.augmentation as K

    square = (a.size, a.size)
    how = dict(resample='bilinear', align_corners=False, cropping_mode=mode)
    steps = [K.RandomResizedCrop(square, a.scale, a.ratio, **how)]
    if a.jitter_p:
        steps.append(K.ColorJitter(*a.jitter, p=a.jitter_p))
    if a.gray_p:
        steps.append(K.RandomGrayscale(p=a.gray_p))
    if a.blur_p:
        kernel = (a.kernel, a.kernel)
        steps.append(K.RandomGaussianBlur(kernel, a.blur_sigma, separable=True, p=a.blur_p))
    if a.solarize_p:
        threshold = (a.solarize_threshold, a.solarize_threshold)
        steps.append(K.RandomSolarize(threshold, additions=(0.0, 0.0), p=a.solarize_p))
    steps.append(K.RandomHorizontalFlip(p=a.flip))
    return K.AugmentationSequential(*steps, data_keys=['input'], same_on_batch=False)


class Pictures(torch.utils.data.Dataset):
    "PIL images made of arrays, as torchvision.datasets.CIFAR10 gives them."

    def __init__(self, x, transform):
        self.x, self.transform = x.permute(0, 2, 3, 1).numpy(), transform

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.x[i]))


def lightly_views(a, one=False):
    """lightly's MoCo v2 views (two, or `one` of them) with the numbers of `a`, without its
    normalisation, which ours leaves to the encoder."""
    from lightly.transforms.moco_transform import MoCoV2Transform

    brightness, contrast, saturation, hue = a.jitter
    both = MoCoV2Transform(
        a.size,
        cj_prob=a.jitter_p,
        cj_bright=brightness,
        cj_contrast=contrast,
        cj_sat=saturation,
        cj_hue=hue,
        min_scale=a.scale[0],
        random_gray_scale=a.gray_p,
        gaussian_blur=a.blur_p,
        sigmas=a.blur_sigma,
        hf_prob=a.flip,
        normalize=None,
    )
    return both.transforms[0] if one else both


class Unlabelled(torch.utils.data.Dataset):
    "The images of a data set without their labels."

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i][0]


# ---- the sampler of APS


def plain_patches(box, flip, n):
    "Top and left of the patches of a view in the source, and their height and width."
    y, x, h, w = box
    c = n - 1 - np.arange(n) if flip else np.arange(n)
    top, left = np.meshgrid(y + np.arange(n) * h / n, x + c * w / n, indexing='ij')
    return top.ravel(), left.ravel(), h / n, w / n


def plain_pair(boxes, flips, n, k, draws, gamma, rng):
    """One pair of views, from the definition: a loop over draws and over the kept patches of
    view 1; numpy over the patches of view 2."""
    (top1, left1, h1, w1), (top2, left2, h2, w2) = (
        plain_patches(b, f, n) for b, f in zip(boxes, flips)
    )
    order, keep1, keep2, free = rng.permutation(n * n), [], [], []
    for t in range(draws):
        kept, new = order[t * k : (t + 1) * k], np.ones(n * n)
        for i in kept:
            high = np.minimum(top2 + h2, top1[i] + h1) - np.maximum(top2, top1[i])
            wide = np.minimum(left2 + w2, left1[i] + w1) - np.maximum(left2, left1[i])
            new -= np.maximum(high, 0) * np.maximum(wide, 0) / (h2 * w2)
        new[new < 1e-6] = 0
        weight = new**gamma
        keep1.append(kept)
        keep2.append(rng.choice(n * n, k, replace=False, p=weight / weight.sum()))
        free.append(new)
    return keep1, keep2, free


def plain_crops(batch, rng, size=32, scale=(0.15, 1)):
    "Boxes in whole pixels, as a random resized crop draws them, and flips."
    side = size * np.sqrt(rng.uniform(*scale, batch))
    stretch = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), batch) / 2)
    hw = np.clip(np.round([side / stretch, side * stretch]), 1, size)
    corner = np.floor(rng.uniform(size=(2, batch)) * (size - hw + 1))
    return np.stack([*corner, *hw], 1), rng.uniform(size=batch) < 0.5


# ---- training steps


def perceptron(*dims):
    "Linear, batch-norm, ReLU, ...; batch-norm without affine at the end."
    layers = []
    for i, (a, b) in enumerate(zip(dims, dims[1:])):
        last = i == len(dims) - 2
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last)]
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class PlainAPS(nn.Module):
    """APS as one would write it on timm: float32, timm's own attention, every token embedded and
    the kept ones gathered."""

    def __init__(self, size, patch, width, depth, heads, hidden=512, out=128, tau=0.1):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.net = VisionTransformer(
            size,
            patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            qkv_bias=False,
            num_classes=0,
            no_embed_class=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )
        self.projector = perceptron(width, hidden, hidden, out)
        self.predictor = perceptron(out, hidden, hidden, out)
        self.tau = tau
        self.register_buffer('mean', torch.zeros(3, 1, 1))
        self.register_buffer('std', torch.ones(3, 1, 1))

    def start_as(self, method):
        "The weights of one of our methods."
        self.net.load_state_dict(method.encoder.net.state_dict())
        self.projector.load_state_dict(method.tower.projector.state_dict())
        self.predictor.load_state_dict(method.predictor.state_dict())
        self.mean.copy_(method.encoder.mean.view(3, 1, 1))
        self.std.copy_(method.encoder.std.view(3, 1, 1))
        return self

    def embed(self, x, keep):
        net = self.net
        t = net.patch_embed((x - self.mean) / self.std) + net.pos_embed
        t = t.gather(1, keep[..., None].expand(-1, -1, t.shape[-1]))
        t = torch.cat([net.cls_token.expand(len(t), -1, -1), t], 1)
        return self.projector(net.norm(net.blocks(t))[:, 0])

    def compare(self, q, k):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        return F.cross_entropy(q @ k.T / self.tau, torch.arange(len(q), device=q.device))

    def forward(self, x1, x2, keep1, keep2):
        z1, z2 = self.embed(x1, keep1), self.embed(x2, keep2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return self.compare(p1, z2.detach()) + self.compare(p2, z1.detach())


def plain_resnet18(width=64, stem='imagenet'):
    "torchvision's ResNet-18 without classifier; stem 'small': 3x3 of stride 1; narrower if asked."
    from torchvision.models.resnet import BasicBlock, ResNet

    class Narrow(ResNet):
        def _make_layer(self, block, planes, *args, **kw):
            if planes == 64:
                self.inplanes = width
                self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
                self.bn1 = nn.BatchNorm2d(width)
            return super()._make_layer(block, planes * width // 64, *args, **kw)

    net = Narrow(BasicBlock, (2, 2, 2, 2))
    if stem == 'small':
        net.conv1, net.maxpool = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.Identity()
    net.fc = nn.Identity()
    return net


class LightlyMoCo(nn.Module):
    """MoCo v2 of lightly's modules, put together as its documentation does: head of two layers,
    memory bank, momentum encoder without batch shuffling."""

    def __init__(self, backbone, dim, out=128, queue=4096, tau=0.1, momentum=0.99):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.backbone, self.projection_head = backbone, MoCoProjectionHead(dim, dim, out)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(temperature=tau, memory_bank_size=(queue, out))
        self.momentum = momentum
        self.register_buffer('mean', torch.zeros(3, 1, 1))
        self.register_buffer('std', torch.ones(3, 1, 1))

    def start_as(self, method):
        "The weights and the queue of one of our methods."
        online, slow = method.tower, method.key_encoder.net
        self.backbone.load_state_dict(online.encoder.net.state_dict())
        self.backbone_momentum.load_state_dict(slow.encoder.net.state_dict())
        self.projection_head.layers.load_state_dict(online.projector.state_dict())
        self.projection_head_momentum.layers.load_state_dict(slow.projector.state_dict())
        self.criterion.memory_bank.bank.copy_(method.queue.keys)
        self.mean.copy_(method.encoder.mean.view(3, 1, 1))
        self.std.copy_(method.encoder.std.view(3, 1, 1))
        return self

    def forward(self, x1, x2):
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, m=self.momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=self.momentum)
        features = self.backbone((x1 - self.mean) / self.std)
        query = self.projection_head(features.flatten(start_dim=1))
        with torch.no_grad():
            features = self.backbone_momentum((x2 - self.mean) / self.std)
            key = self.projection_head_momentum(features.flatten(start_dim=1))
        return self.criterion(query, key)


def lightly_moco(method):
    "lightly's MoCo on the same network, weights and queue; the optimiser of its example."
    width, queue = method.encoder.dim // 8, method.queue.size
    net = plain_resnet18(width, method.encoder.spec['stem'])
    model = LightlyMoCo(net, 8 * width, queue=queue).start_as(method).train()
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def train_step(model, optimizer, *args, amp=False):
    "Forward, backward, optimiser, as one writes it."
    with torch.autocast(args[0].device.type, torch.bfloat16, enabled=amp):
        loss = model(*args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()

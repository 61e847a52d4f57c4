"Every fast path beside the plain way: how much it is worth, and that it gives the same result."

import copy

import bench_baselines as baselines
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from bench_report import seeded, smooth
from bench_steps import moco

from ssl_patch.methods.aps import APS
from ssl_patch.methods.contrast import info_nce
from ssl_patch.models.encoders import vit
from ssl_patch.models.momentum import EMA
from ssl_patch.views.augmentations import (
    aug_moco_v2,
    aug_weak,
    draw_boxes,
    draw_params,
    make_view,
)
from ssl_patch.views.color import color_jitter, gaussian_blur
from ssl_patch.views.crops import resized_crop


def paths(a, report):
    "Results must be the same within a tolerance, and the ratio says what a path is worth."
    for path in (_crops, _colors, _attention, _layout, _updates, _tokens, _queues):
        path(a, report)


def apart(x, y):
    """The length of the difference between two tensors, or lists of them, over the length of the
    second; the largest such share."""
    xs, ys = ([v] if torch.is_tensor(v) else list(v) for v in (x, y))
    return max(((p - q).norm() / q.norm().clamp(min=1e-12)).item() for p, q in zip(xs, ys))


def _pair(report, title, fast, slow, tolerance, n=None):
    "One path: functions whose results are compared where a tolerance is given."
    if tolerance:
        report.check(title, apart(fast(), slow()), tolerance)
    report.time(title, {'fast': fast, 'plain': slow}, [(['plain'], ['fast'], None)], n)


def _crops(a, report):
    sizes = ((32, 32, 8), (64, 32, 4)) if a.small else ((32, 32, 256), (256, 224, 32))
    for source, size, batch in sizes:
        x, g = smooth(batch, source), torch.Generator().manual_seed(0)
        box, flip, _ = draw_boxes(aug_weak(size), (source, source), g, batch)

        def crop_one(image, corners, mirrored):
            image = image.float() / 255
            out = TF.resized_crop(image, *map(int, corners), (size, size), antialias=True)
            return out.flip(-1) if mirrored else out

        def per_image():
            return torch.stack([crop_one(*one) for one in zip(x, box.tolist(), flip)])

        crop = lambda route: lambda: resized_crop(x, box, size, flip, route)
        where = f'{source} px to {size} px, batch {batch}'
        title = f'crop: the route chosen here, and torchvision image by image, {where}'
        _pair(report, title, crop('auto'), per_image, 1e-4, batch)
        title = f'crop: the route chosen here, and matrix products, {where}'
        _pair(report, title, crop('auto'), crop('matrix'), 1e-4, batch)


def _colors(a, report):
    size, batch = (32, 8) if a.small else (96, 64)
    x, augmentation = smooth(batch, size) / 255, aug_moco_v2(size)
    c = draw_params(augmentation, batch, torch.Generator().manual_seed(0))
    steps = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue

    def jitter():
        out = []
        for image, factors, order in zip(x, c.factors.tolist(), c.order.tolist()):
            for k in order:
                image = steps[k](image, factors[k])
            out.append(image)
        return torch.stack(out)

    where, kernel = f'{size} px, batch {batch}', augmentation.kernel
    title = f'colour jitter: batched, and torchvision image by image, {where}'
    _pair(report, title, lambda: color_jitter(x, c.factors, c.order), jitter, 1e-3, batch)
    one = lambda i, s: TF.gaussian_blur(i, [kernel] * 2, [s] * 2)
    blur = lambda: torch.stack([one(i, s) for i, s in zip(x, c.sigma.tolist())])
    title = f'blur: batched, and torchvision image by image, {where}'
    _pair(report, title, lambda: gaussian_blur(x, kernel, c.sigma), blur, 1e-4, batch)


def gradients(method, views, keeps, bf16=False):
    "Loss and gradients of one step, as a list."
    method.zero_grad()
    with torch.autocast(views[0].x.device.type, torch.bfloat16, enabled=bf16):
        loss = method(views, keeps)[0]
    loss.backward()
    found = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    return [loss.detach(), torch.cat(found)]


def _views(method, batch):
    return [
        make_view(smooth(batch, 32), a, torch.Generator().manual_seed(i))
        for i, a in enumerate(method.augmentations)
    ]


def _small_aps(a, batch):
    net = dict(width=48, depth=2, heads=3) if a.small else dict(depth=4)
    m = seeded(lambda: APS(vit('tiny', 32, 2, **net), num_draws=1)).train()
    views = _views(m, batch)
    return m, views, m.draw_patches(views, torch.Generator().manual_seed(0))[0]


def _attention(a, report):
    batch = 8 if a.small else 32
    m, views, keeps = _small_aps(a, batch)

    def run(explicit, bf16):
        def work():
            m.encoder.explicit_attention(explicit)
            return gradients(m, views, keeps, bf16)

        return work

    for bf16, kind, tolerance in ((False, 'float32', 1e-3), (True, 'bf16', None)):
        title = f'attention: explicit, and the fused kernel, {kind}, batch {batch}'
        _pair(report, title, run(True, bf16), run(False, bf16), tolerance, batch)
    (exact, g), (loss, g1), (_, g2) = run(False, False)(), run(True, True)(), run(False, True)()
    report.check('loss in bf16 and in float32, APS', apart(loss, exact), 0.05)
    what = "bf16's distance from the float32 gradient, explicit attention over the fused kernel"
    report.check(what, ((g1 - g).norm() / (g2 - g).norm()).item(), 1.5)
    kinds = 'bf16 with explicit attention, and float32 with the fused kernel'
    title = f'arithmetic: {kinds}, APS, batch {batch}'
    _pair(report, title, run(True, True), run(False, False), None, batch)


def _layout(a, report):
    batch = 8 if a.small else 32
    make = lambda: moco(16 if a.small else 64, queue=256).train()
    rows, last = seeded(make), seeded(make)
    for m in (rows, last):
        m.key_encoder.start = m.key_encoder.end = 1.0  # the same keys at every call
    last.encoder.to(memory_format=torch.channels_last)
    last.key_encoder.net.to(memory_format=torch.channels_last)
    views = _views(rows, batch)
    run = lambda m, bf16=False: lambda: gradients(m, views, None, bf16)

    def exact(m):  # in float32 rounding grows through 18 layers of batch-norm
        net = copy.deepcopy(m.encoder).double()
        f = net(views[0].x.double()).image
        f.square().sum().backward()
        return [f.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])]

    what = 'channels last, and rows, float64: features and gradients of the encoder'
    report.check(what, apart(exact(last), exact(rows)), 1e-9)
    where = f'MoCo v2, batch {batch}'
    title = f'memory: channels last, and rows, float32, {where}'
    _pair(report, title, run(last), run(rows), None, batch)
    title = f'memory: channels last, and rows, bf16, {where}'
    _pair(report, title, run(last, True), run(rows, True), None, batch)
    gap = apart(run(last, True)()[0], run(rows)()[0])
    report.check('loss in bf16 and in float32, MoCo v2', gap, 0.05)
    title = f'arithmetic: bf16, and float32, channels last, {where}'
    _pair(report, title, run(last, True), run(last), None, batch)


def _updates(a, report):
    shape = dict(width=48, depth=2, heads=3) if a.small else {}
    slow, fast = (seeded(lambda: vit('tiny', 32, 2, **shape)) for _ in 'ab')
    for p, q in zip(slow.parameters(), fast.parameters()):
        p.grad = torch.randn_like(p) * 1e-2
        q.grad = p.grad.clone()
    one_by_one = torch.optim.AdamW(slow.parameters(), 1e-3, foreach=False)
    fused = torch.optim.AdamW(fast.parameters(), 1e-3, fused=True)
    weights = lambda net: torch.cat([p.detach().flatten() for p in net.parameters()])
    gaps = []
    for _ in range(2):
        fused.step()
        one_by_one.step()
        gaps.append(apart(weights(fast), weights(slow)))
    report.check('weights after two steps of AdamW, fused and one by one', max(gaps), 1e-5)
    title = 'AdamW: fused, and weight by weight'
    _pair(report, title, lambda: fused.step(), lambda: one_by_one.step(), None)

    net = seeded(lambda: vit('tiny', 32, 2, **shape))
    net.net.requires_grad_(True)
    ours, plain = EMA(slow, 0.9), EMA(slow, 0.9)
    ours.end = 0.9

    @torch.no_grad()
    def weight_by_weight():
        for p, q in zip(plain.net.parameters(), net.parameters()):
            p.mul_(0.9).add_(q, alpha=0.1)

    ours.update(net)
    weight_by_weight()
    title = 'EMA: one call, and weight by weight'
    both = ([p.detach() for p in e.net.parameters()] for e in (ours, plain))
    report.check(title, apart(*both), 1e-5)
    _pair(report, title, lambda: ours.update(net), weight_by_weight, None)


def _tokens(a, report):
    batch = 8 if a.small else 32
    m, views, keeps = _small_aps(a, batch)
    net = m.encoder.net
    heads = net.blocks[0].attn.num_heads
    plain = baselines.PlainAPS(32, 2, net.embed_dim, len(net.blocks), heads).start_as(m).train()

    def gathered():
        plain.zero_grad()
        loss = plain(*[v.x for v in views], *keeps)
        loss.backward()
        return [loss.detach()]

    m.encoder.explicit_attention(False)
    early = lambda: gradients(m, views, keeps)[:1]
    title = f'tokens: chosen as early as we can, and gathered from all embedded ones, batch {batch}'
    _pair(report, title, early, gathered, 1e-4, batch)
    few, full = lambda: gradients(m, views, keeps), lambda: gradients(m, views, None)
    title = f'tokens: a quarter, and all of them (not the same result), batch {batch}'
    _pair(report, title, few, full, None, batch)


def _queues(a, report):
    for K in (512,) if a.small else (4096, 65536):
        rows = lambda n: F.normalize(torch.randn(n, 128), dim=1)
        q, k, queue = seeded(lambda: [rows(n) for n in (256, 256, K)])
        q.requires_grad_()

        def gradient_of(loss):
            def work():
                q.grad = None
                loss().backward()
                return q.grad

            return work

        def joined():
            positive = (q * k).sum(1, keepdim=True)
            logits = torch.cat([positive, q @ queue.clone().T], 1) / 0.1
            return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

        ours = gradient_of(lambda: info_nce(q, k, queue, tau=0.1))
        title = f'loss with a queue of {K}: ours, and with joined logits and a copied queue'
        _pair(report, title, ours, gradient_of(joined), 1e-4)

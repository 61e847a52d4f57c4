"Two processes with half a batch each against one process with all of it."

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssl_patch.data.sources import images
from ssl_patch.methods.contrast import InfoNCELoss
from ssl_patch.methods.densecl import DenseCLLoss
from ssl_patch.methods.method import Method
from ssl_patch.methods.patch_loss import PatchLosses
from ssl_patch.methods.sce import SCELoss
from ssl_patch.models.encoders import vit
from ssl_patch.models.heads import mlp
from ssl_patch.models.momentum import Queue, ema
from ssl_patch.views.augmentations import aug_moco_v2, aug_weak
from ssl_patch.views.crops import View
from ssl_patch.views.loader import ViewLoader


def methods():
    """Keys of the batch, a queue, both, and a queue of image means of patches; heads without
    batch-norm, so that images are independent."""
    match = PatchLosses(DenseCLLoss(), queue=Queue(20))
    for loss, queue, patch_loss in (
        (InfoNCELoss(tau=0.2), None, None),
        (SCELoss(), Queue(20), None),
        (SCELoss(in_batch=True), Queue(20), None),
        (SCELoss(), Queue(20), match),
    ):
        torch.manual_seed(0)
        yield Method(
            vit(size=16, patch=4, width=32, depth=1, heads=2),
            (aug_moco_v2(16), aug_weak(16)),
            view_pairs=((0, 1),),
            key_encoder=ema(0.9),
            queue=queue,
            projector=mlp(32, 8, last_norm=False, bias=True),
            loss=loss,
            patch_loss=patch_loss,
        )


def step(part):
    "Loss, gradient and queue after two steps, of rows `part` of a fixed batch."
    g = torch.Generator().manual_seed(1)
    batches = [[torch.rand(8, 3, 16, 16, generator=g) for _ in range(2)] for _ in range(2)]
    out = []
    for m in methods():
        for xs in batches:
            loss, _ = m(
                [View(x[part], torch.zeros(len(x[part]), 4), torch.zeros(len(x[part]))) for x in xs]
            )
            tower = m.tower
            head = tower.projector if m.patch_loss is None else tower.patch_projector
            grad = torch.autograd.grad(loss, head[0].weight)[0]
            m.after_step()
        out.append(
            (loss.detach(), grad, torch.cat([q.keys for q in m.queues()] or [torch.zeros(1)]))
        )
    return out


def worker(rank, port, results):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.set_num_threads(1)
    results.put((rank, [[t.tolist() for t in r] for r in step(slice(4 * rank, 4 * rank + 4))]))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    context = mp.get_context('spawn')
    results = context.Queue()
    workers = [context.Process(target=worker, args=(r, port, results)) for r in range(2)]
    for w in workers:
        w.start()
    got = dict(results.get(timeout=300) for _ in workers)
    for w in workers:
        w.join(60)
        assert w.exitcode == 0
    for whole, a, b in zip(step(slice(None)), got[0], got[1]):
        (loss, grad, queue), (a, b) = whole, ([torch.tensor(t) for t in r] for r in (a, b))
        assert torch.allclose((a[0] + b[0]) / 2, loss, atol=1e-5) and torch.allclose(
            (a[1] + b[1]) / 2, grad, atol=1e-5
        )
        assert torch.equal(a[2], b[2]) and torch.allclose(a[2], queue, atol=1e-5)


def test_spawned_workers_make_the_same_views(tmp_path):
    "As on macOS and Windows: a worker imports all anew, and is told what to do by pickles."
    from PIL import Image

    g = torch.Generator().manual_seed(0)
    for i in range(6):
        pixels = torch.randint(256, (40, 48, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f'{i}.png')
    store = images(tmp_path, stream=True, test_fraction=0.2).train
    augmentations, before = (aug_moco_v2(16), aug_weak(16)), mp.get_start_method(allow_none=True)
    mp.set_start_method('spawn', force=True)
    try:
        found = {}
        for workers in (0, 1):
            loader = ViewLoader(store, augmentations, batch_size=2, seed=3, workers=workers)
            found[workers] = [list(loader.epoch(e)) for e in range(2)]  # the second: kept workers
            loader.close()
    finally:
        mp.set_start_method(before, force=True)
    for one, other in zip(found[0], found[1], strict=True):
        for (a, i), (b, j) in zip(one, other, strict=True):
            assert torch.equal(i, j)
            assert all(torch.equal(x.x, y.x) and torch.equal(x.box, y.box) for x, y in zip(a, b))

"Two steps of every method in float64, as one process or one of several, for test_processes."

import sys
from dataclasses import replace

import torch

from ssl_patch.data.collages import collages
from ssl_patch.data.sources import images
from ssl_patch.ground.ranks import begin_ranks, gather, parallel, ranks
from ssl_patch.methods.aps import APS
from ssl_patch.methods.co2 import CO2
from ssl_patch.methods.contrast import ImageLoss
from ssl_patch.methods.densecl import DenseCL, DenseCLLoss
from ssl_patch.methods.local_to_global import LocalToGlobal
from ssl_patch.methods.method import Method
from ssl_patch.methods.moco import MoCoV1, MoCoV2, MoCoV3
from ssl_patch.methods.patch_loss import PatchLosses
from ssl_patch.methods.repco import RepCo
from ssl_patch.methods.ressl import ReSSL
from ssl_patch.methods.sce import SCE, SCELoss
from ssl_patch.models.encoders import resnet, vit
from ssl_patch.models.heads import mlp
from ssl_patch.training.pretrain import Pretrainer
from ssl_patch.transfer.finetune import FineTuner
from ssl_patch.transfer.recipes import FinetuneConfig
from ssl_patch.transfer.segmentation import Segmentation
from ssl_patch.transfer.task import TaskTuner
from ssl_patch.transfer.task_config import TaskConfig
from ssl_patch.views.augmentations import aug_weak

pixels = torch.randint(256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
heads = dict(hidden=16, out=8)


class Symmetric(ImageLoss):
    "A loss whose keys learn too: the mean score of the positives less that of all pairs."

    def __call__(self, q, k, queue=None, offset=0):
        return (q @ k.T).exp().mean() - (q * k[offset : offset + len(q)]).sum(1).mean()


def conv():
    return resnet('resnet18', 16, width=4, stem='small')


def tokens():
    return vit('tiny', 16, 4, width=16, depth=1, heads=2)


def learning_keys():
    how = dict(loss=Symmetric(), stop_gradient=False)
    return Method(tokens(), (aug_weak(16), aug_weak(16)), **how)


METHODS = dict(
    moco_v1=lambda: MoCoV1(conv(), queue=40),
    moco_v2=lambda: MoCoV2(conv(), queue=40),
    moco_v2_symmetric=lambda: MoCoV2(conv(), queue=40, symmetric=True),
    moco_v3=lambda: MoCoV3(tokens(), **heads),
    ressl=lambda: ReSSL(conv(), queue=40),
    ressl_batch=lambda: ReSSL(tokens(), queue=None),
    co2=lambda: CO2(conv(), queue=40),
    sce=lambda: SCE(conv(), queue=40),
    sce_both=lambda: SCE(tokens(), queue=40, loss=SCELoss(in_batch=True)),
    # not a ViT, whose positions timm fits to small views in float32
    sce_multi_crop=lambda: SCE(conv(), queue=40, multi_crop=True, **heads),
    densecl=lambda: DenseCL(conv(), queue=40),
    densecl_batch=lambda: DenseCL(tokens(), queue=40, patch_loss=PatchLosses(DenseCLLoss())),
    repco=lambda: RepCo(tokens(), queue=40),
    repco_moco_v3=lambda: RepCo(tokens(), host='moco_v3', negatives_per_image=5, **heads),
    repco_densecl=lambda: RepCo(tokens(), host='densecl', queue=40),
    aps=lambda: APS(tokens(), **heads),
    aps_ema=lambda: APS(tokens(), momentum=0.9, **heads),
    local_to_global=lambda: LocalToGlobal(tokens(), image_weight=0.5, num_patches=5, **heads),
    learning_keys=learning_keys,
    # a batch in two parts
    sce_in_parts=lambda: SCE(tokens(), queue=40),
    aps_in_parts=lambda: APS(tokens(), **heads),
    densecl_batch_in_parts=lambda: DenseCL(
        tokens(), queue=40, patch_loss=PatchLosses(DenseCLLoss())
    ),
    learning_keys_in_parts=learning_keys,
)


def without_norm(method, **options):
    "A method of a queue, with a head and an encoder without batch-norm."
    head = mlp(16, 16, 8, norm=False, last_norm=False, bias=True)
    return method(tokens(), queue=40, projector=head, **options)


METHODS_WITHOUT_NORM = dict(
    moco_v2_without_norm=lambda: without_norm(MoCoV2),
    moco_v2_symmetric_without_norm=lambda: without_norm(MoCoV2, symmetric=True),
    co2_without_norm=lambda: without_norm(CO2),
    sce_without_norm=lambda: without_norm(SCE),
    ressl_without_norm=lambda: without_norm(ReSSL),
    densecl_without_norm=lambda: without_norm(DenseCL),
)


def two_steps(name, **options):
    "Losses, gradients of the last step, the whole state, and what is noted of the epoch."
    torch.manual_seed(0)
    method = (METHODS | METHODS_WITHOUT_NORM)[name]().double()
    # blurred pieces are cut by the batch, which float32 shows in its last digit
    method.augmentations = tuple(replace(a, blur_p=0.0) for a in method.augmentations)
    how = dict(epochs=1, batch_size=16, progress='quiet', bf16=False, device='cpu')
    how['accumulate'] = 2 if name.endswith('_in_parts') else 1
    run = Pretrainer(method, images(pixels), **how | options)
    batches, add, losses = run.loader.epoch, run.meter.add, []

    def epoch(number, start=0):
        for views, rows in batches(number, start):
            for v in views:
                v.x = v.x.double()
            yield views, rows

    def note(batch, loss, **log):
        losses.append(gather(loss.detach()[None]).mean())
        add(batch, loss, **log)

    run.loader.epoch, run.meter.add = epoch, note
    run.fit()
    parameters, state = run.method.named_parameters(), run.method.state_dict()
    return dict(
        loss=torch.stack(losses),
        grad={k: p.grad for k, p in parameters if p.grad is not None},
        state={k: v for k, v in state.items() if torch.is_tensor(v)},
        next=[q.next for q in run.method.queues()],
        row=run.history[0],
    )


def apart(a, b):
    "The largest difference of two dicts of tensors, of what they are where that is above 1."
    assert a.keys() == b.keys()
    far = lambda x, y: (x - y).abs().max() / x.abs().max().clamp(min=1)
    return max(far(a[k].double(), b[k].double()).item() for k in a)


def labelled(n):
    "Images of noise with labels, and a test split."
    return images((pixels[:n], torch.arange(n) % 3), test=(255 - pixels[:7], torch.arange(7) % 3))


def finetuned(encoder, **changes):
    config = FinetuneConfig(1, 8, lr=1e-2, warmup_epochs=0, **changes)
    return FineTuner(encoder, labelled(32), config, **quiet)


def segmented(encoder, **changes):
    "Crops of whole images, as what is drawn for an image is another draw in several processes."
    task = Segmentation(7, 'light', (16, 16), channels=8, scale=(1.0, 1.0), flip=0.0)
    config = TaskConfig(epochs=1, batch_size=8, lr=1e-2, **changes)
    data = collages('mask', train=16, test=5, size=16)
    data.train.targets[:3, :8] = 255  # pixels that count are not the same in all processes
    return TaskTuner(encoder, task, data, config, **quiet)


quiet = dict(progress='quiet', bf16=False)
TUNERS = dict(
    finetune=lambda: finetuned(conv(), erasing=0.5, mixup=0.8, cutmix=1.0),
    finetune_unmixed=lambda: finetuned(tokens(), ema=0.9, grad_clip=0.1),
    segmentation=lambda: segmented(conv()),
    segmentation_frozen=lambda: segmented(conv(), freeze='encoder', grad_clip=0.1),
)


def tuned(name):
    "The losses, the last gradients, the state and the predictions of a fine-tuning in float64."
    torch.manual_seed(0)
    run, losses = TUNERS[name](), []
    run.model.double()
    if run_ema := getattr(run, 'ema', None):
        run_ema.module.double()
    run.step = parallel(run.step.module if ranks()[1] > 1 else run.step)
    add = run.meter.add

    def note(batch, loss, **log):
        losses.append(gather(loss.detach()[None]).mean())
        add(batch, loss, **log)

    run.meter.add = note
    run.fit()
    parameters, state = run.model.named_parameters(), run.model.state_dict()
    found = run.predict()
    return dict(
        loss=torch.stack(losses),
        grad={k: p.grad for k, p in parameters if p.grad is not None},
        state={k: v for k, v in state.items() if torch.is_tensor(v)},
        found=found if torch.is_tensor(found) else torch.stack(found).double(),
        row={k: v for k, v in run.history[0].items() if k != 'seconds'},
    )


if __name__ == '__main__':
    torch.set_num_threads(1)
    begin_ranks()
    out, *names = sys.argv[1:]
    made = {n: tuned(n) if n in TUNERS else two_steps(n) for n in names or METHODS}
    torch.save(made, f'{out}.{ranks()[0]}')

"Average precision against torchmetrics and plain loops, on random predictions."

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from ssl_patch.data.boxes import MaskTensor, Objects
from ssl_patch.evaluation.average_precision import (
    area_under,
    coco_scores,
    image_ap50,
    match_boxes,
    precision_recall,
    voc_ap,
    voc_scores,
)


def random_boxes(n, g, side=64):
    corner = torch.rand(n, 2, generator=g) * 0.6 * side
    sizes = (0.1 + 0.4 * torch.rand(n, 2, generator=g)) * side
    return torch.cat([corner, corner + sizes], 1).round()


def boxes_as_masks(boxes, side=64):
    masks = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = True
        mask[top, left] = False  # a mask that is not quite its box
    return masks


def random_scenes(images=12, classes=3, seed=0, crowds=False, masks=False):
    "Truths, and predictions that are partly near them."
    g = torch.Generator().manual_seed(seed)
    truths, found = [], []
    for _ in range(images):
        n, m = (int(torch.randint(0, 6, (1,), generator=g)) for _ in range(2))
        boxes, y = random_boxes(n, g), torch.randint(classes, (n,), generator=g)
        crowd = torch.rand(n, generator=g) < (0.3 if crowds else 0)
        near = boxes + torch.randint(-4, 5, boxes.shape, generator=g)
        near[:, :2] = near[:, :2].clamp_min(0)
        near[:, 2:] = torch.maximum(near[:, 2:].clamp_max(64), near[:, :2] + 1)
        p = torch.cat([near, random_boxes(m, g)])
        labels = torch.cat([y, torch.randint(classes, (m,), generator=g)])
        one = dict(boxes=p, labels=labels, scores=torch.rand(n + m, generator=g))
        truth = Objects(boxes, y, crowd)
        if masks:
            truth.masks = MaskTensor(boxes_as_masks(boxes))
            one['masks'] = MaskTensor(boxes_as_masks(p))
        truths.append(truth)
        found.append(one)
    return found, truths


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('crowds', [False, True])
@pytest.mark.parametrize('masks', [False, True])
def test_coco_scores_are_those_of_torchmetrics(seed, crowds, masks):
    pytest.importorskip('pycocotools')
    detection = pytest.importorskip('torchmetrics.detection')
    found, truths = random_scenes(seed=seed, crowds=crowds, masks=masks)
    if masks:  # torchmetrics drops images without a true mask, and what is found there
        some = [i for i, t in enumerate(truths) if len(t)]
        found, truths = [found[i] for i in some], [truths[i] for i in some]
    kind = 'segm' if masks else 'bbox'
    # their own thresholds are in single precision, which decides ties otherwise
    exact = dict(iou_thresholds=np.linspace(0.5, 0.95, 10).tolist())
    exact |= dict(rec_thresholds=np.linspace(0, 1, 101).tolist())
    theirs = detection.MeanAveragePrecision(iou_type=kind, class_metrics=True, **exact)
    read = lambda p: p | (dict(masks=p['masks'].read()) if masks else {})
    truth = [dict(boxes=t.boxes, labels=t.labels, iscrowd=t.crowd.int()) for t in truths]
    if masks:
        truth = [a | dict(masks=t.masks.read()) for a, t in zip(truth, truths)]
    theirs.update([read(p) for p in found], truth)
    want, got = theirs.compute(), coco_scores(found, truths, masks)
    names = dict(AP='map', AP50='map_50', AP75='map_75')
    names |= {f'AP {k}': f'map_{k}' for k in ('small', 'medium', 'large')}
    for mine, other in names.items():
        assert got[mine] == pytest.approx(want[other].item(), abs=1e-6), mine
    assert 0.02 < got['AP'] < 0.98
    each = dict(zip(want['classes'].tolist(), want['map_per_class'].tolist()))
    assert got['classes'] == pytest.approx({k: v for k, v in each.items() if v >= 0}, abs=1e-6)


@pytest.mark.parametrize('masks', [False, True])
def test_what_is_found_where_nothing_is_counts_against(masks):
    pytest.importorskip('pycocotools')
    found, truths = random_scenes(masks=masks)
    none = Objects([], [], masks=MaskTensor(torch.zeros(0, 64, 64, dtype=torch.bool)))
    more = dict(found[0], scores=torch.ones(len(found[0]['scores'])))
    worse = coco_scores([*found, more], [*truths, none], masks)['AP']
    assert worse < coco_scores(found, truths, masks)['AP']


def slow_ap(found, truths, c, iou):
    "VOC's average precision of a class by loops, the curve read where recall rises."
    overlap = lambda a, b: (
        max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    )
    area = lambda a: (a[2] - a[0]) * (a[3] - a[1])
    boxes = []
    for i, p in enumerate(found):
        for b, s, y in zip(p['boxes'].tolist(), p['scores'].tolist(), p['labels'].tolist()):
            if y == c:
                boxes.append((s, i, b))
    taken, rows, objects = set(), [], 0
    for t in truths:
        objects += int(((t.labels == c) & ~t.ignored).sum())
    for _, i, b in sorted(boxes, key=lambda x: -x[0]):
        best, which = 0, None
        for k, (o, y) in enumerate(zip(truths[i].boxes.tolist(), truths[i].labels.tolist())):
            both = overlap(b, o)
            if y == c and both / (area(b) + area(o) - both) > best:
                best, which = both / (area(b) + area(o) - both), k
        if best >= iou and truths[i].ignored[which]:
            continue
        rows.append(best >= iou and (i, which) not in taken)
        if best >= iou:
            taken.add((i, which))
    total = 0.0
    for n, hit in enumerate(rows):
        if hit:
            later = [sum(rows[: m + 1]) / (m + 1) for m in range(n, len(rows))]
            total += max(later) / objects
    return total


@pytest.mark.parametrize('seed', range(3))
def test_voc_ap_is_that_of_loops(seed):
    found, truths = random_scenes(seed=seed, crowds=True)
    for iou in (0.5, 0.75):
        got = voc_ap(found, truths, iou)
        assert got == pytest.approx({c: slow_ap(found, truths, c, iou) for c in got})
        assert set(got) == {0, 1, 2}


def test_eleven_points_are_those_of_the_development_kit():
    found, truths = random_scenes(seed=5)
    everything = [match_boxes(p, t) for p, t in zip(found, truths)]
    hits = torch.cat([h for h, _ in everything])
    scores = torch.cat([p['scores'] for p in found])
    p, r = precision_recall(scores, hits, sum(map(len, truths)))
    want = 0.0
    for t in range(11):
        reached = r >= t / 10 - 1e-12
        want += (p[reached].max().item() if reached.any() else 0) / 11
    assert area_under(p, r, 11) == pytest.approx(want)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_truths_as_predictions_are_perfect_and_one_more_mistake_never_helps(seed):
    _, truths = random_scenes(seed=seed, images=4)
    if not any(map(len, truths)):
        return
    said = [dict(boxes=t.boxes, labels=t.labels, scores=torch.ones(len(t))) for t in truths]
    assert all(v == pytest.approx(1) for v in voc_ap(said, truths, 0.95).values())
    assert [image_ap50(p, t) for p, t in zip(said, truths)] == pytest.approx([1.0] * 4)
    far = torch.tensor([[500.0, 500, 510, 510]])
    c = next(int(t.labels[0]) for t in truths if len(t))
    said[0] = dict(
        boxes=torch.cat([far, said[0]['boxes']]),
        labels=torch.cat([torch.tensor([c]), said[0]['labels']]),
        scores=torch.cat([torch.tensor([2.0]), said[0]['scores']]),
    )
    assert voc_ap(said, truths)[c] < 1


def test_nothing_found_and_nothing_to_find():
    pytest.importorskip('pycocotools')
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), scores=torch.zeros(0))
    one, empty = Objects([[0, 0, 9, 9]], [2]), Objects([], [])
    assert coco_scores([none, none], [one, empty])['AP'] == 0
    assert voc_ap([none], [one]) == {2: 0.0} and image_ap50(none, empty) == 1
    for f in (coco_scores, voc_scores):
        with pytest.raises(ValueError, match='at least one object that counts'):
            f([none], [Objects([[0, 0, 9, 9]], [0], crowd=[True])])

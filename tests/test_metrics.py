"Metrics against plain formulas and scikit-learn."

import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ssl_patch.evaluation.metrics import (
    alignment,
    confusion,
    effective_rank,
    feature_std,
    iou,
    uniformity,
)
from toys import rand


def test_diagnostics_against_plain_formulas():
    z = rand(30, 5) @ torch.diag(torch.tensor([5.0, 1, 1, 0.1, 0]))
    s = torch.linalg.svdvals(z.double())
    p = s / s.sum()
    assert effective_rank(z).item() == pytest.approx(
        math.exp(-sum(float(a) * math.log(float(a)) for a in p if a > 1e-12)), rel=1e-4
    )
    assert (
        effective_rank(z[:3]).item() == pytest.approx(effective_rank(z[:3].T).item(), rel=1e-6)
        and effective_rank(z[:3]) <= 3
    )
    u = F.normalize(z, dim=1)
    pairs = [
        math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(30) for j in range(i)
    ]
    assert uniformity(z).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-4)
    assert alignment(z, z.flip(0)).item() == pytest.approx(
        float(((u - u.flip(0)) ** 2).sum(1).mean()), rel=1e-5
    )


def test_feature_std_tells_spread_from_collapse():
    z = rand(20000, 64)
    assert feature_std(z * 7).item() == pytest.approx(1 / 8, rel=0.01)
    assert feature_std(torch.ones(10, 4) + 1e-4 * rand(10, 4)) < 1e-3


def test_iou_is_sklearns_jaccard():
    from sklearn.metrics import confusion_matrix, jaccard_score

    g = torch.Generator().manual_seed(1)
    t, p = (
        torch.randint(0, 6, (40, 33, 17), generator=g),
        torch.randint(0, 4, (40, 33, 17), generator=g),
    )
    p = torch.where(torch.rand(t.shape, generator=g) < 0.5, t.clamp_max(3), p)
    t[t == 5] = 99  # ignored; class 5 is nowhere, 4 in truth only
    M, ok = confusion(t, p, 6, ignore=99), (t != 99).flatten()
    a, b = t.flatten()[ok], p.flatten()[ok]
    assert (M.numpy() == confusion_matrix(a, b, labels=range(6))).all()
    assert (
        np.allclose(iou(M)[:5], jaccard_score(a, b, labels=range(5), average=None))
        and iou(M)[5].isnan()
        and iou(M)[4] == 0
    )
    assert iou(M).nanmean().item() == pytest.approx(jaccard_score(a, b, average='macro'))

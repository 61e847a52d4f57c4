"Nearest neighbours against a double loop and scikit-learn."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ssl_patch.evaluation.knn import knn_predict, topk_similar, vote
from toys import rand, brute


@pytest.mark.parametrize('k,T', [(1, 0.07), (7, 0.07), (20, 0.1), (90, 1.0), (20, 10.0)])
def test_knn_equals_a_double_loop(k, T):
    q, b, y = rand(40, 6), rand(90, 6, seed=1) * 3, torch.arange(90) % 4
    expected = brute(q, b, y, k, T, 4)
    assert len(expected.unique()) > 1
    assert torch.equal(knn_predict(q, b, y, k, T), expected)


@pytest.mark.parametrize('k,T', [(5, 0.07), (50, 0.2)])
def test_knn_equals_sklearn(k, T):
    from sklearn.neighbors import KNeighborsClassifier

    q, b, y = (
        rand(200, 16),
        rand(500, 16, seed=1),
        torch.randint(7, (500,), generator=torch.Generator().manual_seed(2)),
    )

    def weights(distance):
        return np.exp((1 - distance) / T)

    sk = KNeighborsClassifier(k, weights=weights, metric='cosine', algorithm='brute').fit(
        b.double(), y
    )
    assert (
        knn_predict(q, b, y, k, T) == torch.from_numpy(sk.predict(q.double()))
    ).float().mean() >= 0.995


@pytest.mark.parametrize('chunk,bank_chunk', [(1, 1), (3, 2), (7, 64), (1000, 10), (40, 90)])
def test_chunks_do_not_change_the_answer(chunk, bank_chunk):
    q, b, y = rand(40, 6), rand(90, 6, seed=1), torch.arange(90) % 4
    s, i = (F.normalize(q, dim=1) @ F.normalize(b, dim=1).T).sort(1, descending=True)
    sims, inds = topk_similar(q, b, 20, chunk, bank_chunk)
    assert torch.equal(inds, i[:, :20]) and torch.allclose(sims, s[:, :20], atol=1e-6)
    assert torch.equal(
        knn_predict(q, b, y, 20, chunk=chunk, bank_chunk=bank_chunk), knn_predict(q, b, y, 20)
    )


@pytest.mark.parametrize('T,scores', [(0.07, (383518.39, 97189.25)), (0.1, (8103.08, 3384.39))])
def test_worked_numbers(T, scores):
    cos = torch.tensor([0.9, 0.8, 0.6])
    bank = torch.stack([cos, (1 - cos**2).sqrt()], 1) * torch.tensor([[3.0], [0.1], [7.0]])
    s, i = topk_similar(torch.tensor([[1.0, 0]]), bank, 3)
    assert i.tolist() == [[0, 1, 2]] and torch.allclose(s[0], cos)
    share = vote(s, torch.tensor([0, 1, 1])[i], 2, T)[0]
    assert torch.allclose(share, torch.tensor(scores) / sum(scores), atol=1e-5)
    assert knn_predict(torch.tensor([[1.0, 0]]), bank, torch.tensor([0, 1, 1]), 3, T).item() == 0
    assert knn_predict(torch.tensor([[1.0, 0]]), bank, torch.tensor([0, 1, 1]), 3, 10.0).item() == 1


def test_tiny_temperature_does_not_overflow():
    q, b, y = rand(50, 5), rand(80, 5, seed=1), torch.arange(80) % 5
    assert torch.equal(
        knn_predict(q, b, y, 20, T=1e-6), knn_predict(q, b, y, 1)
    )  # only the nearest counts
    assert vote(torch.tensor([[1.0, 0.5]]), torch.tensor([[0, 1]]), 2, 1e-6).isfinite().all()


@pytest.mark.parametrize(
    'change,word',
    [
        (dict(k=11), 'bank'),
        (dict(k=0), 'k must be .* got 0'),
        (dict(k=2.5), 'k must be .* got 2.5'),
        (dict(T=0), 'T must be .* got 0'),
        (dict(T=-1.0), 'T must be .* got -1'),
        (dict(T=float('nan')), 'T must be .* got nan'),
        (dict(bank_labels=torch.zeros(9).long()), 'bank_labels'),
        (dict(n_classes=2), 'n_classes'),
        (dict(chunk=0), 'chunk'),
        (dict(bank_labels=torch.arange(10) - 1), 'bank_labels'),
        (dict(queries=torch.ones(4, 7)), 'queries'),
    ],
)
def test_bad_knn_arguments(change, word):
    good = dict(queries=rand(4, 5), bank=rand(10, 5), bank_labels=torch.arange(10) % 3, k=3)
    knn_predict(**good)
    with pytest.raises(ValueError, match=word):
        knn_predict(**{**good, **change})


@pytest.mark.parametrize('chunk', [7, 30, 1000])
def test_ties_go_to_the_first(chunk):
    "Few distinct rows: whatever the chunks, the neighbours are those of a stable sort."
    g = torch.Generator().manual_seed(0)
    rows = torch.eye(5)[:, :4]
    bank, queries = (
        rows[torch.randint(4, (200,), generator=g)],
        rows[torch.randint(4, (20,), generator=g)],
    )
    expected = (queries @ bank.T).sort(dim=1, descending=True, stable=True).indices[:, :70]
    assert torch.equal(topk_similar(queries, bank, 70, bank_chunk=chunk)[1], expected)

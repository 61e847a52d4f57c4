"Probes against plain references and scikit-learn, and what they must leave untouched."
import json
import math
from dataclasses import replace
import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from ssl_patch.data import ImageData, TensorImages
from ssl_patch.encoders import resnet, vit
from ssl_patch.probes import (_fingerprint, Record, accuracy, alignment, cell_labels, confusion, effective_rank, evaluate, extract, feature_std, fit_linear,
                              frozen, heat, iou, knn, knn_predict, linear, load_records, neighbours, patch_features, place_alone, raw_patches,
                              raw_pixels, segment, segmentation, show_heat, show_masks, show_tokens, standardise, table, token_colours,
                              topk_similar, uniformity, vote)
from toys import Net
matplotlib.use('Agg')

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def make_images(n, classes=3, seed=0, size=8, noise=25, labels=True):
    "Colour says the class; noise makes it less than trivial."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    colour = torch.tensor([[200., 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 40]])[:classes]
    x = colour[y][:, :, None, None] + noise * torch.randn(n, 3, size, size, generator=g)
    return TensorImages(x.clamp(0, 255).byte(), y if labels else None, [f'c{i}' for i in range(classes)] if labels else None)

def make_data(n=60, m=30, **kw):
    return ImageData(make_images(n, seed=1, **kw), make_images(m, seed=2, **kw), 'colours', 'the label is a colour')

# ---------------------------------------------------------------- kNN
def brute(queries, bank, labels, k, T, classes):
    out = []
    for q in queries.double():
        sims = []
        for b in bank.double(): sims.append(float(q @ b / q.norm() / b.norm()))
        best = sorted(range(len(sims)), key=lambda i: -sims[i])[:k]
        votes = [sum(math.exp(sims[i] / T) for i in best if labels[i] == c) for c in range(classes)]
        out.append(votes.index(max(votes)))
    return torch.tensor(out)

@pytest.mark.parametrize('k,T', [(1, .07), (7, .07), (20, .1), (90, 1.), (20, 10.)])
def test_knn_equals_a_double_loop(k, T):
    q, b, y = rand(40, 6), rand(90, 6, seed=1) * 3, torch.arange(90) % 4
    expected = brute(q, b, y, k, T, 4)
    assert len(expected.unique()) > 1
    assert torch.equal(knn_predict(q, b, y, k, T), expected)

@pytest.mark.parametrize('k,T', [(5, .07), (50, .2)])
def test_knn_equals_sklearn(k, T):
    from sklearn.neighbors import KNeighborsClassifier
    q, b, y = rand(200, 16), rand(500, 16, seed=1), torch.randint(7, (500,), generator=torch.Generator().manual_seed(2))
    def weights(distance): return np.exp((1 - distance) / T)
    sk = KNeighborsClassifier(k, weights=weights, metric='cosine', algorithm='brute').fit(b.double(), y)
    assert (knn_predict(q, b, y, k, T) == torch.from_numpy(sk.predict(q.double()))).float().mean() >= .995

@pytest.mark.parametrize('chunk,bank_chunk', [(1, 1), (3, 2), (7, 64), (1000, 10), (40, 90)])
def test_chunks_do_not_change_the_answer(chunk, bank_chunk):
    q, b, y = rand(40, 6), rand(90, 6, seed=1), torch.arange(90) % 4
    s, i = (F.normalize(q, dim=1) @ F.normalize(b, dim=1).T).sort(1, descending=True)
    sims, inds = topk_similar(q, b, 20, chunk, bank_chunk)
    assert torch.equal(inds, i[:, :20]) and torch.allclose(sims, s[:, :20], atol=1e-6)
    assert torch.equal(knn_predict(q, b, y, 20, chunk=chunk, bank_chunk=bank_chunk), knn_predict(q, b, y, 20))

@pytest.mark.parametrize('T,scores', [(.07, (383518.39, 97189.25)), (.1, (8103.08, 3384.39))])
def test_worked_numbers(T, scores):
    cos = torch.tensor([.9, .8, .6])
    bank = torch.stack([cos, (1 - cos**2).sqrt()], 1) * torch.tensor([[3.], [.1], [7.]])
    s, i = topk_similar(torch.tensor([[1., 0]]), bank, 3)
    assert i.tolist() == [[0, 1, 2]] and torch.allclose(s[0], cos)
    share = vote(s, torch.tensor([0, 1, 1])[i], 2, T)[0]
    assert torch.allclose(share, torch.tensor(scores) / sum(scores), atol=1e-5)
    assert knn_predict(torch.tensor([[1., 0]]), bank, torch.tensor([0, 1, 1]), 3, T).item() == 0
    assert knn_predict(torch.tensor([[1., 0]]), bank, torch.tensor([0, 1, 1]), 3, 10.).item() == 1

def test_tiny_temperature_does_not_overflow():
    q, b, y = rand(50, 5), rand(80, 5, seed=1), torch.arange(80) % 5
    assert torch.equal(knn_predict(q, b, y, 20, T=1e-6), knn_predict(q, b, y, 1))     # only the nearest counts
    assert vote(torch.tensor([[1., .5]]), torch.tensor([[0, 1]]), 2, 1e-6).isfinite().all()

@pytest.mark.parametrize('change,word', [(dict(k=11), 'bank'), (dict(k=0), 'k=0'), (dict(k=2.5), 'k=2.5'), (dict(T=0), 'T=0'), (dict(T=-1.), 'T=-1'),
    (dict(T=float('nan')), 'T=nan'), (dict(bank_labels=torch.zeros(9).long()), 'bank_labels'), (dict(n_classes=2), 'n_classes'), (dict(chunk=0), 'chunk'),
    (dict(bank_labels=torch.arange(10) - 1), 'bank_labels'), (dict(queries=torch.ones(4, 7)), 'queries')])
def test_bad_knn_arguments(change, word):
    good = dict(queries=rand(4, 5), bank=rand(10, 5), bank_labels=torch.arange(10) % 3, k=3)
    knn_predict(**good)
    with pytest.raises(ValueError, match=word): knn_predict(**{**good, **change})

# ---------------------------------------------------------------- linear
def clouds(n, d=20, classes=5, seed=0, spread=.07):
    y = torch.arange(n) % classes
    return rand(classes, d, seed=9)[y] * spread + rand(n, d, seed=seed) @ torch.diag(torch.logspace(-1, .7, d)), y

@pytest.mark.parametrize('wd', [.003, .03])
def test_linear_with_weight_decay_finds_sklearns_minimum(wd):
    from sklearn.linear_model import LogisticRegression
    (x, y), (u, v) = clouds(1024), clouds(1000, seed=1)
    x, u = standardise(x, u)
    sk = LogisticRegression(C=1 / (len(x) * wd), tol=1e-8, max_iter=2000).fit(x, y)
    head = fit_linear(x, y, 5, weight_decay=wd)
    assert abs(accuracy(head(u).argmax(1), v) - sk.score(u, v)) < .01
    W = torch.from_numpy(sk.coef_).float()
    assert (head.weight - head.weight.mean(0) - W + W.mean(0)).norm() < .03 * W.norm()

def test_linear_is_plain_sgd_with_momentum_and_a_cosine():
    x, y = clouds(50)
    g = torch.Generator().manual_seed(3)
    W, b = torch.randn(5, 20, generator=g) * .01, torch.zeros(5)
    vW, vb, step = torch.zeros(5, 20), torch.zeros(5), 0
    for _ in range(4):
        order = torch.randperm(50, generator=g)
        for i in (order[:20], order[20:40], order[40:]):
            wrong = ((x[i] @ W.T + b).softmax(1) - F.one_hot(y[i], 5)) / len(i)
            vW, vb = .9 * vW + wrong.T @ x[i] + .1 * W, .9 * vb + wrong.sum(0)       # no decay on the bias
            lr = .3 * (1 + math.cos(math.pi * step / 12)) / 2
            W, b, step = W - lr * vW, b - lr * vb, step + 1
    head = fit_linear(x, y, 5, epochs=4, lr=.3, batch_size=20, weight_decay=.1, seed=3)
    assert torch.allclose(head.weight, W, atol=1e-5) and torch.allclose(head.bias, b, atol=1e-5) and b.abs().max() > .01

def test_unpenalised_linear_is_as_good_as_sklearn():
    from sklearn.linear_model import LogisticRegression
    (x, y), (u, v) = clouds(2000), clouds(2000, seed=1)
    x, u = standardise(x, u)
    sk = LogisticRegression(C=1e6, tol=1e-6, max_iter=3000).fit(x, y)
    head = fit_linear(x, y, 5)
    assert .4 < sk.score(u, v) < .98
    assert abs(accuracy(head(u).argmax(1), v) - sk.score(u, v)) < .015
    assert abs(accuracy(head(x).argmax(1), y) - sk.score(x, y)) < .015

@pytest.mark.parametrize('scale', [1e-3, 1., 1e3])
def test_the_learning_rate_does_not_depend_on_the_scale_of_features(scale):
    (x, y), (u, v) = clouds(500), clouds(500, seed=1)
    def acc(s): a, b = standardise(x * s + s, u * s + s); return accuracy(fit_linear(a, y, 5)(b).argmax(1), v)
    assert abs(acc(scale) - acc(1.)) <= .004

def test_steepest_possible_features_do_not_diverge():
    y = torch.arange(1000) % 2
    x, = standardise((rand(1000) + y - .5)[:, None] * rand(1, 50, seed=1))
    head = fit_linear(x, y, 2)                                     # rank one: all of the variance in one direction
    assert F.cross_entropy(head(x), y) < .65 and accuracy(head(x).argmax(1), y) > .65

def test_linear_is_a_function_of_its_seed_and_leaves_the_global_state_alone():
    x, y = clouds(300)
    x, = standardise(x)
    torch.manual_seed(5); expected = torch.rand(3); torch.manual_seed(5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    a, b, c = (fit_linear(x, y, 5, epochs=3, seed=s).weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == 2
    torch.set_num_threads(before)

def test_standardise():
    x, u = torch.cat([rand(100, 4) * torch.tensor([1., 5, 1e-4, 1e4]) + 3, torch.full((100, 1), .1)], 1), rand(7, 5)
    a, b = standardise(x, u)
    assert torch.allclose(a.mean(0), torch.zeros(5), atol=1e-3) and (a[:, 4] == 0).all() and (b[:, 4] == 0).all()
    assert torch.allclose(a[:, :4].square().mean(0) * 5, torch.ones(4), atol=1e-3)
    assert torch.allclose(b[:, 0] * 5**.5, (u[:, 0] - x[:, 0].mean()) / x[:, 0].std(correction=0), atol=1e-4)

@pytest.mark.parametrize('change', [dict(epochs=0), dict(lr=0.), dict(lr=float('inf')), dict(batch_size=0), dict(weight_decay=-1.), dict(epochs=1.5)])
def test_bad_linear_arguments(change):
    net = Net()
    with pytest.raises(ValueError, match=next(iter(change))): linear(net, make_data(), **change)
    assert net.calls == 0

# ---------------------------------------------------------------- extraction
def test_encoder_is_left_as_it_was():
    net = Net().train()
    net.net[1].eval(); net.net[0].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    knn(net, make_data(), k=5); linear(net, make_data(), epochs=2)
    assert [m.training for m in net.net] == [True, False, True, True, True, True] and net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not net.net[0].weight.requires_grad and net.net[0].bias.requires_grad and all(p.grad is None for p in net.parameters())

def test_modes_come_back_after_an_error():
    net = Net().train()
    with pytest.raises(RuntimeError, match='stop'):
        with frozen(net): raise RuntimeError('stop')
    assert all(m.training for m in net.modules()) and torch.is_grad_enabled()

@pytest.mark.parametrize('batch_size', [1, 7, 1000])
def test_features_do_not_depend_on_batches(batch_size):
    net, store = Net().train(), make_images(20)
    z, y = extract(net, store, batch_size)
    assert torch.equal(y, store.labels) and z.dtype == torch.float32
    net.eval()
    one_by_one = torch.cat([net(store[i][None].float() / 255) for i in range(20)])
    assert torch.allclose(z, one_by_one.detach(), atol=1e-6) and not z.requires_grad

def test_images_are_fitted_to_the_encoder_and_layers_picked():
    store, enc = make_images(6, size=20, labels=False), vit('tiny', 16, 8, width=16, depth=1, heads=2)
    z, y = extract(enc, store)
    p, _ = extract(enc, store, layer='patch_mean')
    out = enc.eval()(torch.cat([x for x, _ in store.batches(16, 6)]))
    assert y is None and torch.allclose(z, out.image, atol=1e-5)
    assert torch.allclose(p, out.patches.mean(1), atol=1e-5) and not torch.allclose(z, p, atol=1e-2)
    half = extract(enc, store, amp=True)[0]
    assert half.dtype == torch.float32 and 0 < (half - z).abs().max() < .2

def test_raw_pixels():
    x = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([.5, .4, .3]), torch.tensor([.2, .3, .4])
    plain = ((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).view(2, 3, 32, 2, 32, 2).mean((3, 5)).flatten(1)
    assert torch.allclose(raw_pixels(64, mean, std)(x), plain, atol=1e-5)
    assert torch.equal(raw_pixels(8)(x[..., :8, :8]), x[..., :8, :8].flatten(1))

class Broken(Net):
    def forward(self, x): return super().forward(x) / torch.tensor([1.]*5 + [0.]) * 0

@pytest.mark.parametrize('call,word', [
    (lambda: extract(Broken(), make_images(4)), 'not finite'), (lambda: extract(Net(), make_images(4), layer='cls'), 'layer'),
    (lambda: extract(Net(), make_images(4), layer='patch_mean'), 'plain tensor'), (lambda: extract(Net(), make_images(4), batch_size=0), 'batch_size'),
    (lambda: extract(nn.Flatten(), make_images(4)), 'size'), (lambda: extract(lambda x: x, make_images(4)), 'nn.Module'),
    (lambda: extract(nn.Conv2d(3, 4, 3), make_images(4), size=8), r'\(B,D\)')])
def test_bad_extraction(call, word):
    with pytest.raises(ValueError, match=word): call()

# ---------------------------------------------------------------- records
def test_knn_record_holds_the_same_protocol_on_its_baselines():
    data, net = make_data(noise=250), Net(4)
    r = knn(net, data, k=7, T=.2, name='online', seed=3)
    def direct(enc):
        (x, y), (u, v) = extract(enc, data.train), extract(enc, data.test)
        return float((brute(u, x, y, 7, .2, 3) == v).float().mean())
    all_four = direct(net), direct(Net(3)), direct(Net(0)), direct(raw_pixels(8, data.mean, data.std))
    assert len(set(all_four)) == 4                                 # so that a mix-up would show
    assert r.value == pytest.approx(direct(net)) and r.baselines['random encoder'] == pytest.approx(direct(Net(3)))
    assert r.baselines['raw pixels'] == pytest.approx(direct(raw_pixels(8, data.mean, data.std)))
    assert (r.protocol, r.encoder, r.layer, r.seed, r.data, r.note) == ('kNN', 'online', 'image', 3, 'colours', 'the label is a colour')
    assert (r.n_train, r.n_test, r.n_classes, r.settings['k'], r.settings['T']) == (60, 30, 3, 7, .2) and r.chance == pytest.approx(1/3)

def test_measured_twice_gives_the_same_record():
    same = lambda a, b: replace(a, seconds=0.) == replace(b, seconds=0.)
    assert same(knn(Net(), make_data(), k=5), knn(Net(), make_data(), k=5))
    assert same(linear(Net(), make_data(), epochs=3), linear(Net(), make_data(), epochs=3))

def test_linear_record_is_the_last_epoch_of_the_plain_fit():
    data, net = make_data(noise=120), Net(4)
    (x, y), (u, v) = extract(net, data.train), extract(net, data.test)
    x, u = standardise(x, u)
    assert linear(net, data, epochs=4, seed=2, baselines=False).value == accuracy(fit_linear(x, y, 3, epochs=4, seed=2)(u).argmax(1), v)

def test_baselines_are_remembered_until_something_changes():
    data, made = make_data(noise=90), []
    class Counting(Net):
        def fresh(self, seed): made.append(Net(seed, self.size)); return made[-1]
    net = Counting()
    a, b = knn(net, data, k=5), knn(net, data, k=5)
    assert [m.calls for m in made] == [2, 0] and a.baselines == b.baselines
    knn(net, data, k=6); knn(net, data, k=5, seed=1)
    assert [m.calls for m in made] == [2, 0, 0, 2] # another k: another value of the same features
    data.train.labels = data.train.labels.flip(0)
    knn(net, data, k=5)
    assert made[-1].calls == 2
    assert knn(net, data, k=5, baselines=False).baselines == {} and len(made) == 5

def test_features_are_extracted_once_for_all_protocols():
    "kNN and linear share features; weights, pixels, layer or input size that change make new ones; few are kept."
    data, net = make_data(noise=90), Net()
    calls = lambda f: (net.log.clear(), f(), net.calls)[2]
    once = lambda **kw: knn(net, data, k=5, baselines=False, **kw)
    assert calls(once) == 2 and calls(lambda: linear(net, data, epochs=2, baselines=False)) == 0 and calls(once) == 0
    with torch.no_grad(): net.net[0].weight.mul_(2)
    assert calls(once) == 2
    data.train.labels = data.train.labels.flip(0)
    assert calls(once) == 0 # the images are as they were
    data.test.images[0] = 0
    assert calls(once) == 1 and calls(lambda: once(size=10)) == 2
    for seed in range(5): knn(Net(seed), data, k=5, baselines=False)
    assert len(data._features) == 6
    fresh = make_data(noise=90); fresh.train.labels = fresh.train.labels.flip(0); fresh.test.images[0] = 0
    assert once().value == knn(net, fresh, k=5, baselines=False).value

def test_an_evaluation_looks_at_the_encoder_once(monkeypatch):
    "Once the weights are hashed, the four key pictures shown, and train and test compared, for both splits together."
    import ssl_patch.probes as probes
    data, net, count = make_data(noise=90), Net(), {'_fingerprint': 0, '_no_leak': 0}
    def counted(name, f):
        def g(*a, **kw): count[name] += name == '_no_leak' or any(isinstance(x, nn.Module) for x in a); return f(*a, **kw)
        return g
    for name in count: monkeypatch.setattr(probes, name, counted(name, getattr(probes, name)))
    knn(net, data, k=5, baselines=False)
    assert count == {'_fingerprint': 1, '_no_leak': 1} and sorted(net.log) == [4, 30, 60]

@pytest.mark.parametrize('size, most', [(8, 300), (32, 128), (64, 32), (224, 8)])
def test_pieces_change_nothing(size, most):
    net, x = Net(size=size), make_images(300 if size < 64 else 40, size=size)
    z = extract(net, x, batch_size=300)[0]
    assert max(net.log) == min(most, len(x))
    with torch.no_grad(): whole = net.eval()(x.images.float() / 255)
    assert torch.allclose(z, whole, atol=1e-6)

def test_other_channel_statistics_are_another_baseline():
    data, enc = make_data(noise=120, size=16), vit('tiny', 16, 8, width=16, depth=1, heads=2)
    a = knn(enc, data, k=5).baselines
    enc.set_stats(torch.full((3,), 3.), torch.tensor([.01, 1., 9.]))
    assert knn(enc, data, k=5).baselines['random encoder'] == knn(enc.fresh(0), data, k=5, baselines=False).value != a['random encoder']

def test_patch_layer_is_probed_and_raw_pixels_stay_pixels():
    data, enc = make_data(noise=200, size=16), vit('tiny', 16, 8, width=16, depth=1, heads=2).fresh(1)
    r = knn(enc, data, k=5, layer='patch_mean')
    (x, y), (u, v) = extract(enc, data.train, layer='patch_mean'), extract(enc, data.test, layer='patch_mean')
    assert r.value == accuracy(knn_predict(u, x, y, 5), v) != knn(enc, data, k=5).value
    assert r.layer == 'patch_mean' and r.baselines['raw pixels'] == knn(enc, data, k=5).baselines['raw pixels']

def test_a_module_that_cannot_be_made_anew_has_raw_pixels_only():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert list(knn(net, make_data(), k=5, size=8).baselines) == ['raw pixels']

def test_chance_is_the_majority_of_the_test_set_and_unlabelled_images_are_left_out():
    data = make_data()
    data.test.labels[:] = torch.tensor([0]*18 + [1]*6 + [-1]*6)
    data.train.labels[:10] = -1
    r = knn(Net(), data, k=5)
    assert r.chance == pytest.approx(.75) and (r.n_train, r.n_test) == (50, 24)

def test_a_class_only_in_test_counts_as_wrong():
    data = make_data(noise=5)
    data.test.labels[:] = torch.where(data.test.labels == 2, 3, data.test.labels)
    assert knn(Net(), data, k=5, baselines=False).value == pytest.approx(2/3) == linear(Net(), data, baselines=False).value

def no_test(d): d.test = None
def no_labels(d): d.train.labels = None
def no_test_labels(d): d.test.labels[:] = -1
def one_class(d): d.train.labels[:] = 1
@pytest.mark.parametrize('spoil,args,word', [(no_test, {}, 'no test split'), (no_labels, {}, 'no labels'), (no_test_labels, {}, 'no labels'),
    (one_class, {}, 'one class'), (None, dict(k=61), 'k=61'), (None, dict(T=0.), 'T=0'), (None, dict(layer='last'), 'layer'), (None, dict(k=0), 'k=0')])
def test_errors_come_before_work(spoil, args, word):
    net, data = Net(), make_data()
    if spoil: spoil(data)
    with pytest.raises(ValueError, match=word): knn(net, data, **args)
    if spoil:
        with pytest.raises(ValueError, match=word): linear(net, data)
    assert net.calls == 0

def test_own_protocol():
    seen = {}
    def score(x, y, u, v, classes): seen.update(x=x.shape, u=u.shape, c=classes); return .5
    r = evaluate(score, Net(), make_data(), 'half', dict(a=1))
    assert seen['c'] == 3 and r.value == .5 and r.settings['a'] == 1 and set(r.baselines) == {'raw pixels', 'random encoder'}

def record(**kw):
    return Record(**{**dict(protocol='kNN', value=.5, encoder='online', data='d', chance=.1, architecture='vit', settings=dict(k=20, T=.07),
                            baselines={'raw pixels': .2, 'random encoder': .3}), **kw})

def test_record_round_trip(tmp_path):
    r = record(value=1/3, note='größer', seed=4)
    assert Record.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    r.save(tmp_path / 'new' / 'run'); record().save(tmp_path / 'new' / 'run')
    assert load_records(tmp_path / 'new' / 'run') == [r, record()]
    assert len((tmp_path / 'new' / 'run' / 'records.jsonl').read_text(encoding='utf-8').splitlines()) == 2

def test_record_text_holds_all_that_must_stand_beside_a_number():
    for text in (repr(record(note='odd labels', seed=3)), record(note='odd labels', seed=3)._repr_markdown_()):
        assert all(w in text for w in ('kNN', '0.500', 'chance 0.100', 'raw pixels 0.200', 'random encoder 0.300', 'k=20', 'T=0.07', 'seed 3', 'odd labels'))

@pytest.mark.parametrize('call,word', [(lambda p: record(value=50.), 'value'), (lambda p: record(value=float('nan')), 'value'),
    (lambda p: record(baselines={'raw pixels': -1}), 'raw pixels'), (lambda p: Record.from_dict({**record().to_dict(), 'best': 1}), 'best'),
    (lambda p: Record.from_dict({'value': .5}), 'protocol'), (lambda p: load_records(p), 'records.jsonl'), (lambda p: table([]), 'none given')])
def test_bad_records(call, word, tmp_path):
    with pytest.raises(ValueError, match=word): call(tmp_path)

def cells(t): return {c[0]: c[1:] for line in t.splitlines() if line.startswith('| ') for c in [[c.strip() for c in line.strip('|').split('|')]]}

def test_table_means_and_spread():
    t = table([record(value=v, seed=s, baselines={'raw pixels': .2, 'random encoder': .3 + s/10}) for s, v in enumerate((.4, .5, .6))]
              + [record(protocol='linear', settings=dict(lr=1.), value=.7)])
    assert cells(t) == {'top-1': ['kNN', 'linear'], 'raw pixels': ['0.200', '0.200'], 'random encoder': ['0.400 ± 0.100', '0.300'],
                        'online': ['0.500 ± 0.100', '0.700'], 'chance': ['0.100', '0.100']}
    assert list(cells(t)) == ['top-1', 'raw pixels', 'random encoder', 'online', 'chance'] and 'seeds 0, 1, 2' in t
    assert len({len(line) for line in t.splitlines() if line.startswith('|')}) == 1 and repr(t) == str(t) == t._repr_markdown_()

def test_table_tells_settings_data_encoders_and_architectures_apart():
    t = cells(table([record(), record(settings=dict(k=200, T=.07), value=.6), record(encoder='target', value=.55)]))
    assert t['top-1'] == ['kNN k=20', 'kNN k=200'] and t['online'] == ['0.500', '0.600'] and t['target'] == ['0.550', '–']
    assert cells(table([record(), record(data='e')]))['top-1'] == ['d kNN', 'e kNN']
    assert {'online (vit)', 'online (resnet)', 'random encoder (resnet)'} < set(cells(table([record(), record(architecture='resnet')])))
    assert cells(table([record(), record(layer='patch_mean')]))['top-1'] == ['kNN image features', 'kNN patch_mean features']

def test_a_repeated_record_replaces_the_earlier_one():
    assert cells(table([record(value=.1), record(value=.9)]))['online'] == ['0.900']

# ---------------------------------------------------------------- pictures and diagnostics
def frames(fig):
    return [[(ax.get_title(), ax.spines['top'].get_edgecolor()) for ax in fig.axes[i:i + 4]] for i in range(0, len(fig.axes), 4)]

def test_neighbours_are_framed_by_their_label():
    from matplotlib.colors import to_rgba
    data = make_data(noise=5)
    rows = frames(neighbours(Net(1), data, queries=[0, 4], k=3))
    assert [r[0][0] for r in rows] == ['c0', 'c1'] and all(c == to_rgba('tab:blue') for r in rows for _, c in r[1:])
    data.train.labels = (data.train.labels + 1) % 3
    assert all(c == to_rgba('tab:orange') for r in frames(neighbours(Net(), data, queries=2, k=3)) for _, c in r[1:])

def test_neighbours_without_labels_or_test_split_never_show_the_query_itself():
    data = ImageData(make_images(12, labels=False, noise=60), None, 'plain')
    rows = frames(neighbours(raw_pixels(8, data.mean, data.std), data, queries=[2, 7], k=3))
    z = F.normalize(extract(raw_pixels(8, data.mean, data.std), data.train)[0], dim=1)
    for q, row in zip((2, 7), rows):
        best = torch.cat([(z @ z[q])[:q], (z @ z[q])[q + 1:]]).sort(descending=True).values[:3]
        assert [t for t, _ in row[1:]] == [f'{s:.2f}' for s in best] and row[0][0] == 'query'

@pytest.mark.parametrize('args', [dict(k=13), dict(k=0), dict(queries=0), dict(queries=[99]), dict(queries=[]), dict(queries=[-1])])
def test_bad_neighbours(args):
    with pytest.raises(ValueError): neighbours(Net(), make_data(12, 5), **args)

def test_diagnostics_against_plain_formulas():
    z = rand(30, 5) @ torch.diag(torch.tensor([5., 1, 1, .1, 0]))
    s = torch.linalg.svdvals(z.double()); p = s / s.sum()
    assert effective_rank(z).item() == pytest.approx(math.exp(-sum(float(a) * math.log(float(a)) for a in p if a > 1e-12)), rel=1e-4)
    assert effective_rank(z[:3]).item() == pytest.approx(effective_rank(z[:3].T).item(), rel=1e-6) and effective_rank(z[:3]) <= 3
    u = F.normalize(z, dim=1)
    pairs = [math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(30) for j in range(i)]
    assert uniformity(z).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-4)
    assert alignment(z, z.flip(0)).item() == pytest.approx(float(((u - u.flip(0))**2).sum(1).mean()), rel=1e-5)

def test_feature_std_tells_spread_from_collapse():
    z = rand(20000, 64)
    assert feature_std(z * 7).item() == pytest.approx(1/8, rel=.01)
    assert feature_std(torch.ones(10, 4) + 1e-4 * rand(10, 4)) < 1e-3

# ---------------------------------------------------------------- linear segmentation
def planted(n, seed=0, H=32, W=48):
    "Rectangles of three colours on noise; 255 where nobody knows."
    g = torch.Generator().manual_seed(seed)
    colour = torch.tensor([[40., 40, 40], [200, 60, 60], [60, 60, 200]])
    m = torch.zeros(n, H, W, dtype=torch.uint8)
    for i in range(n):
        for c in (1, 2):
            t, l = int(torch.randint(0, H//8 - 1, (1,), generator=g))*8, int(torch.randint(0, W//12 - 1, (1,), generator=g))*12
            m[i, t:t + 16, l:l + 24] = c
    x = colour[m.long()].permute(0, 3, 1, 2) + 15*torch.randn(n, 3, H, W, generator=g)
    m[:, :, -4:] = 255
    return x.clamp(0, 255).byte(), m

def small_vit(seed=0, size=32): return vit(size=size, patch=8, width=24, depth=1, heads=2).fresh(seed)

@pytest.mark.parametrize('grid', [(4, 6), (3, 5), (1, 1), (7, 2), (12, 9)])
def test_cell_labels_by_loops(grid):
    m = torch.randint(0, 6, (5, 11, 8), generator=torch.Generator().manual_seed(0))
    m[0], m[1, :6] = 5, 5                                          # 5 is ignored; an image has nothing else
    rows, cols = grid
    expected = torch.full((5, rows*cols), -1)
    for n in range(5):
        votes = [[0]*5 for _ in range(rows*cols)]
        for i in range(11):
            for j in range(8):
                if m[n, i, j] != 5: votes[int((i + .5)*rows/11)*cols + int((j + .5)*cols/8)][m[n, i, j]] += 1
        for k, v in enumerate(votes):
            if max(v): expected[n, k] = v.index(max(v))
    for kind in (torch.int64, torch.uint8, torch.int16): assert torch.equal(cell_labels(m.to(kind), grid, 5, ignore=5), expected)
    assert (expected == -1).any() and (expected[0] == -1).all()

def test_iou_is_sklearns_jaccard():
    from sklearn.metrics import confusion_matrix, jaccard_score
    g = torch.Generator().manual_seed(1)
    t, p = torch.randint(0, 6, (40, 33, 17), generator=g), torch.randint(0, 4, (40, 33, 17), generator=g)
    p = torch.where(torch.rand(t.shape, generator=g) < .5, t.clamp_max(3), p)
    t[t == 5] = 99                                                 # ignored; class 5 is nowhere, 4 in truth only
    M, ok = confusion(t, p, 6, ignore=99), (t != 99).flatten()
    a, b = t.flatten()[ok], p.flatten()[ok]
    assert (M.numpy() == confusion_matrix(a, b, labels=range(6))).all()
    assert np.allclose(iou(M)[:5], jaccard_score(a, b, labels=range(5), average=None)) and iou(M)[5].isnan() and iou(M)[4] == 0
    assert iou(M).nanmean().item() == pytest.approx(jaccard_score(a, b, average='macro'))

def test_chunks_of_masks_and_scores_do_not_change_the_answer():
    from ssl_patch.probes import _enlarged, _label_chunks
    m = torch.randint(0, 4, (9, 5, 6), generator=torch.Generator().manual_seed(0))
    for n in (1, 30, 70, 10**6): assert torch.equal(torch.cat(list(_label_chunks(m, 3, 3, pixels=n))), m.masked_fill(m == 3, -1))
    s = rand(7, 4, 3, 5)
    assert torch.equal(_enlarged(s, (11, 13), numbers=1), F.interpolate(s, (11, 13), mode='bilinear').argmax(1).byte())
    assert torch.equal(_enlarged(s, (11, 13), numbers=1500), _enlarged(s, (11, 13)))

@pytest.mark.parametrize('net', [small_vit(), resnet('resnet18', size=32, stem='small', width=8).fresh(0), raw_patches(64, (8, 8))])
def test_planted_shapes_are_found(net):
    train, test = planted(24), planted(8, seed=1)
    r = segmentation(net, train, test, 3, ignore=255, size=64)
    assert r.value > (.7 if 'ResNet' in type(net).__name__ else .88) and r.value > r.baselines['place alone'] + .2 > r.chance
    assert set(r.baselines) == {'raw pixels', 'place alone'} | ({'random encoder'} if hasattr(net, 'fresh') else set())
    assert (r.protocol, r.metric, r.layer, r.n_train, r.n_test, r.n_classes) == ('linear segmentation', 'mIoU', 'patches', 24, 8, 3)

def test_segmentation_by_hand():
    "Chance, place alone, own value and pixel accuracy, each by another route."
    from sklearn.metrics import jaccard_score
    net, train, test = small_vit(), planted(12), planted(5, seed=1)
    known = test[1] != 255
    def score(p): return jaccard_score(test[1][known], p[known], average='macro')
    r = segmentation(net, train, test, 3, ignore=255, epochs=5)
    x, grid = patch_features(net, train[0])
    y = cell_labels(train[1], grid, 3, 255).flatten()
    a, b = standardise(x.flatten(0, 1)[y >= 0], patch_features(net, test[0])[0].flatten(0, 1))
    scores = fit_linear(a, y[y >= 0], 3, epochs=5)(b).view(5, 4, 4, 3).permute(0, 3, 1, 2)
    pred = torch.cat([F.interpolate(s[None], (32, 48), mode='bilinear', align_corners=False).argmax(1) for s in scores])
    assert torch.equal(segment(net, train, test[0], 3, 255, epochs=5), pred.byte()) and r.value == pytest.approx(score(pred))
    assert r.chance == pytest.approx(score(torch.zeros_like(pred)))
    place = torch.stack([(train[1] == c).sum(0) for c in range(3)]).argmax(0)
    assert r.baselines['place alone'] == pytest.approx(score(place.expand(5, -1, -1)))
    assert r.baselines['random encoder'] == segmentation(net.fresh(0), train, test, 3, 255, epochs=5, baselines=False).value
    acc = segmentation(net, train, test, 3, 255, epochs=5, metric='pixel accuracy')
    assert acc.value == pytest.approx((pred == test[1])[known].float().mean().item()) and acc.metric == 'pixel accuracy'
    assert acc.chance == pytest.approx((test[1][known] == 0).float().mean().item())

def test_segmentation_leaves_the_encoder_as_it_was_and_repeats():
    net, train, test = small_vit().train(), planted(8), planted(4, seed=1)
    net.net.blocks[0].eval()
    modes, state, sizes = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}, set(net.sizes)
    a = segmentation(net, train, test, 3, 255, size=48, epochs=3)
    assert a == segmentation(net, train, test, 3, 255, size=48, epochs=3) and a.settings['size'] == 48
    assert net.sizes == sizes == {32} and [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match='size=44'): segmentation(net, train, test, 3, 255, size=44)
    assert net.sizes == sizes and a.value != segmentation(net, train, test, 3, 255, size=32, epochs=3).value

def test_patch_features_are_those_of_the_resized_image():
    import torchvision.transforms.v2.functional as tv
    net, x = small_vit().eval(), planted(5)[0]
    z, grid = patch_features(net, x, size=40, batch_size=2)
    with torch.no_grad(): out = net.accept(40)(tv.resize(x.float() / 255, [40, 40], antialias=True))
    assert grid == (5, 5) and torch.allclose(z, out.patches, atol=1e-5)

def test_place_alone_of_another_size_and_where_nothing_was_seen():
    m = torch.tensor([[[1, 9], [2, 2]]])
    assert place_alone(m, (3, 4, 4), 3, 9)[2].tolist() == [[1, 1, 2, 2]]*2 + [[2]*4]*2
    assert place_alone(m, (1, 2, 2), 3, 9)[0].tolist() == [[1, 2], [2, 2]]

class Sized(nn.Flatten): size = 32

@pytest.mark.parametrize('change,word', [
    (dict(train=planted(4)[0]), 'train: expected a pair'), (dict(train=(planted(4)[0].float(), planted(4)[1])), 'train images'),
    (dict(test=(planted(4)[0], planted(3)[1])), 'test masks'), (dict(test=(planted(4)[0], planted(4)[1].mT)), 'test masks'),
    (dict(test=(planted(4)[0], planted(4)[1].float())), 'whole numbers'), (dict(train=(planted(4)[0], planted(4)[1] > 0)), 'whole numbers'),
    (dict(ignore=None), 'label 255'), (dict(classes=2), 'label 2'), (dict(classes=0), 'classes=0'), (dict(metric='IoU'), "metric='IoU'"),
    (dict(test=(planted(4)[0], torch.full((4, 32, 48), 255))), 'no pixel has a class'), (dict(epochs=0), 'epochs=0'), (dict(lr=-1.), 'lr=-1'),
    (dict(train=(planted(4)[0], torch.ones(4, 32, 48).long())), 'only one class'), (dict(weight_decay=-1.), 'weight_decay'),
    (dict(size=44), 'size=44'), (dict(encoder=Sized()), 'Features'), (dict(encoder=raw_pixels(32)), 'Features'), (dict(encoder=nn.Flatten()), 'size')])
def test_bad_segmentation(change, word):
    good = dict(encoder=small_vit(), train=planted(4), test=planted(4, 1), classes=3, ignore=255)
    with pytest.raises(ValueError, match=word): segmentation(**{**good, **change})

def test_table_shows_every_baseline_and_metric():
    t = cells(table([record(), record(protocol='linear segmentation', metric='mIoU', layer='patches', baselines={'raw pixels': .1, 'place alone': .2})]))
    assert t['encoder'] == ['kNN top-1', 'linear segmentation mIoU'] and t['place alone'] == ['–', '0.200']
    assert list(t) == ['encoder', 'raw pixels', 'place alone', 'random encoder', 'online', 'chance']

# ---------------------------------------------------------------- tokens and heat maps
def test_token_colours_are_principal_components():
    from sklearn.decomposition import PCA
    z = rand(3, 40, 8) @ torch.diag(torch.logspace(1, -1, 8))
    c, plain = (token_colours(z, w).flatten(0, 1) for w in (True, False))
    p = torch.from_numpy(PCA(3).fit_transform(z.flatten(0, 1).double()))
    p = p * p.gather(0, p.abs().argmax(0, keepdim=True)).sign()
    assert torch.allclose(c, (.5 + p / p.std(0, correction=0) / 5).clamp(0, 1).float(), atol=1e-5)
    assert torch.allclose(plain, (.5 + p / p[:, 0].std(correction=0) / 5).clamp(0, 1).float(), atol=1e-5)
    assert torch.equal(token_colours(z), token_colours(z)) and torch.equal(token_colours(torch.ones(1, 4, 3)), torch.full((1, 4, 3), .5))
    with pytest.raises(ValueError, match='D >= 3'): token_colours(rand(1, 5, 2))

def test_heat_and_figures():
    z = rand(2, 6, 5)
    h = heat(z[:, 4], z, (2, 3))
    assert h.flatten(1).argmax(1).tolist() == [4, 4] and torch.allclose(h[1, 0, 2], F.cosine_similarity(z[1, 4], z[1, 2], dim=0))
    x, m = planted(2)
    fig = show_heat(x, {'a': h, 'b': -h}, 'heat')
    assert [ax.get_title() for ax in fig.axes[:3]] == ['image', 'a', 'b'] and len(fig.axes) == 6
    assert np.allclose(fig.axes[4].images[1].get_array(), h[1]) and len(show_heat(x / 255, h).axes) == 4
    net = small_vit()
    fig = show_tokens({'ViT': net, 'raw': raw_patches(32, (2, 2))}, x, size=32)
    shown = [fig.axes[i].images[0] for i in (4, 5)]
    assert [s.get_array().shape for s in shown] == [(4, 4, 3), (2, 2, 3)] and shown[0].get_interpolation() == 'nearest'
    assert np.allclose(shown[0].get_array(), token_colours(patch_features(net, x)[0])[1].view(4, 4, 3))
    fig = show_masks(x, {'truth': m}, 3, ignore=255)
    assert (fig.axes[1].images[0].get_array()[:, -4:] == 1).all()

@pytest.mark.parametrize('call,word', [
    (lambda x, h: heat(h, h, (2, 3)), r'\(B,d\)'), (lambda x, h: heat(rand(2, 5), rand(2, 6, 5), (2, 2)), 'grid'),
    (lambda x, h: show_heat(x, h[:1]), 'one for each picture'), (lambda x, h: show_heat(x, {}), 'none given'),
    (lambda x, h: show_tokens(small_vit(), x), 'dict'), (lambda x, h: show_tokens({'a': raw_pixels(32)}, x), 'Features'),
    (lambda x, h: show_tokens({'a': small_vit()}, x[0]), 'uint8'), (lambda x, h: show_masks(x, h[:, 0], 3), 'masks')])
def test_bad_figures(call, word):
    with pytest.raises(ValueError, match=word): call(planted(2)[0], rand(2, 2, 3))

# ---------------------------------------------------------------- leaks, records, caches
def leaky(n=3, noise=90):
    "Data whose last test images are training images."
    data = make_data(noise=noise)
    return ImageData(data.train, TensorImages(torch.cat([data.test.images, data.train.images[:n]]), torch.cat([data.test.labels, data.train.labels[:n]])), 'planted')

@pytest.mark.parametrize('protocol', [knn, linear])
def test_a_planted_leak_is_refused_before_any_work(protocol):
    data, net = leaky(), Net()
    few = dict(k=5) if protocol is knn else dict(epochs=2)
    with pytest.raises(ValueError, match="3 of 33 test images are in the train split too"): protocol(net, data, **few)
    assert net.calls == 0
    with pytest.raises(ValueError, match="overlap='forgive'"): protocol(net, data, overlap='forgive', **few)
    kept, dropped = (protocol(net, data, overlap=o, baselines=False, **few) for o in ('keep', 'drop'))
    assert (kept.n_train, dropped.n_train, kept.n_test, dropped.n_test) == (60, 57, 33, 33)
    assert 'kept' in kept.note and 'left out' in dropped.note

def test_a_leaked_neighbour_is_found_by_knn_where_it_is_kept():
    data, net = leaky(30, noise=200), Net()
    each = knn(net, data, k=1, overlap='keep', baselines=False).per_image()
    assert each[-30:].mean() == 1 and each[:-30].mean() < 1

def test_what_was_pretrained_on_is_not_measured():
    data, net = make_data(), Net()
    net.trained_on = torch.cat([data.train.fingerprints(), data.test.fingerprints()[4:6]])
    for overlap in ('refuse', 'drop'):
        with pytest.raises(ValueError, match='trained on 2 of 30 test images .the first: 4'): knn(net, data, k=5, overlap=overlap)
    assert knn(net, data, k=5, overlap='keep', baselines=False).note.endswith('trained on 2 of the test images')

def test_the_record_keeps_what_every_image_got(tmp_path):
    data, net = make_data(noise=90), Net()
    r = knn(net, data, k=5, out=tmp_path)
    (x, y), (u, v) = extract(net, data.train), extract(net, data.test)
    assert torch.equal(r.per_image().bool(), knn_predict(u, x, y, 5, .07) == v) and abs(r.per_image().mean() - r.value) < 1e-6
    assert load_records(tmp_path) == [r] and r.seconds > 0 and r.hardware
    knn(net, data, k=5, out=tmp_path); knn(net, data, k=6, out=tmp_path)
    assert [x.settings['k'] for x in load_records(tmp_path)] == [5, 6]

def test_features_on_disk(tmp_path):
    data, net = make_data(noise=90), Net()
    once = lambda d, **kw: knn(net, d, k=5, baselines=False, cache=tmp_path, **kw)
    a = once(data); made = {f.name for f in tmp_path.iterdir()}
    assert net.calls == 2 and len(made) == 2
    b = once(make_data(noise=90)) # another session: other objects, the same content
    assert net.calls == 2 and replace(b, seconds=a.seconds) == a
    with torch.no_grad(): net.net[0].weight.mul_(2)
    once(data); once(data, layer='image', size=10)
    assert net.calls == 6 and len(list(tmp_path.iterdir())) == 6
    for f in tmp_path.iterdir(): f.write_bytes(b'') # as after a full disk
    data._features.clear()
    assert replace(once(data), seconds=0.) == replace(once(data), seconds=0.) and net.calls == 8

def test_the_tower_is_named():
    net = vit(size=16, patch=4, width=32, depth=1, heads=2)
    data = make_data(size=16)
    assert knn(net, data, k=5, baselines=False).encoder == 'encoder'
    net.tower = 'target'
    r = knn(net, data, k=5, baselines=False)
    assert (r.encoder, r.tower) == ('target', 'target')
    assert 'mine, target tower' in str(table([replace(r, encoder='mine')]))
    text = str(table([replace(r, encoder='mine'), replace(r, encoder='mine', tower='online', value=.5)]))
    assert 'mine, target tower' in text and 'mine, online tower' in text

def test_targets_in_place_of_labels():
    data, g = make_data(labels=False), torch.Generator().manual_seed(0)
    tables = [torch.randint(-1, 2, (len(s), 4), generator=g) for s in (data.train, data.test)]
    def score(x, y, u, v, classes): assert torch.equal(y, tables[0]) and torch.equal(v, tables[1]) and classes == 4; return .5
    r = evaluate(score, Net(), data, 'mine', {}, targets=tables, metric='mAP', baselines=False)
    assert r.n_classes == 4 and abs(r.chance - ((tables[1] == 1).sum(0) / (tables[1] >= 0).sum(0)).mean()) < 1e-6
    none = [torch.cat([t, torch.zeros(len(t), 2, dtype=t.dtype)], 1) for t in tables] # two classes that nothing shows do not count
    assert evaluate(lambda *a: .5, Net(), data, 'mine', {}, targets=none, metric='mAP', baselines=False).chance == r.chance
    for bad, words in ((tables[0], 'pair of tensors'), (tables[::-1], 'a row for each of its 60 images'), ([t*2 for t in tables], 'accepted: 1')):
        with pytest.raises(ValueError, match=words): evaluate(score, Net(), data, 'mine', {}, targets=bad)

def test_more_classes_in_test_than_in_train_count_as_errors():
    train, test = make_images(60, classes=2, seed=1), make_images(30, classes=3, seed=2)
    for r in (knn(Net(), ImageData(train, test, 'more'), k=5, baselines=False), linear(Net(), ImageData(train, test, 'more'), epochs=5, baselines=False)):
        assert r.n_classes == 3 and r.per_image()[2::3].sum() == 0

@pytest.mark.parametrize('change', [lambda n: n.register_forward_hook(lambda m, i, out: out*torch.tensor([1., 1, 0, 0, 0, 0])), lambda n: n.scales.append(2.),
                                    lambda n: n.register_buffer('extra', torch.full((6,), 3.), persistent=False), lambda n: setattr(n, 'after', lambda z: z.sort(1).values)])
def test_what_no_weight_shows_changes_the_key(change):
    class Odd(Net):
        def __init__(self): super().__init__(); self.scales, self.after, self.extra = [], (lambda z: z), None; del self.extra
        def forward(self, x):
            z = self.after(super().forward(x))*math.prod(self.scales)
            return z + getattr(self, 'extra', 0.)
    data, net = make_data(noise=120), Odd()
    knn(net, data, k=5, baselines=False)
    change(net)
    assert knn(net, data, k=5, baselines=False).each == knn(net, make_data(noise=120), k=5, baselines=False).each
    assert len(data._features) == 4

def test_a_score_that_changes_features_spoils_nothing():
    data, net = make_data(noise=120), Net()
    first = knn(net, data, k=5, baselines=False).value
    evaluate(lambda x, y, u, v, classes: float(x.zero_().sum() + u.zero_().sum()), net, data, 'rude', {}, baselines=False)
    assert knn(net, data, k=5, baselines=False).value == first

def test_images_that_are_replaced_are_extracted_anew(tmp_path):
    data, net = make_data(noise=120), Net()
    a = knn(net, data, k=5, baselines=False, cache=tmp_path)
    for _ in range(2): data.train.images = 255 - data.train.images # twice: the same pixels in another tensor
    assert knn(net, data, k=5, baselines=False, cache=tmp_path).each == a.each and net.calls == 2
    data.train.images = data.train.images.flip(0)
    assert knn(net, data, k=5, baselines=False, cache=tmp_path).images != a.images and net.calls == 3

def test_records_of_other_images_are_not_measured_again(tmp_path):
    data, net = make_data(n=60, m=60, noise=120), Net()
    for part in (range(0, 30), range(30, 60)): knn(net, ImageData(data.train, data.test.subset(list(part)), 'colours'), k=5, baselines=False, out=tmp_path)
    assert len(load_records(tmp_path)) == 2
    with open(tmp_path/'records.jsonl', 'a') as f: f.write('{"protocol": "kNN", "val')
    with pytest.raises(ValueError, match='records.jsonl, line 3 is not a record'): load_records(tmp_path)

def test_a_leak_that_was_kept_is_seen_in_every_table():
    data, net = leaky(), Net()
    records = [knn(net, data, k=5, overlap=o, baselines=False, name=o) for o in ('keep', 'drop')] + [knn(net, make_data(noise=90), k=5, baselines=False, name='clean')]
    text = str(table(records))
    assert '3 test images are in train too: kept' in text and 'left out there' in text
    assert 'overlap=keep' in text.splitlines()[0] and 'overlap=drop' in text.splitlines()[0]

def test_what_overlap_leaves_is_checked_before_any_work():
    data, net = leaky(30), Net()
    with pytest.raises(ValueError, match="k=40: overlap='drop' leaves 30 labelled images"): knn(net, data, k=40, overlap='drop')
    one = ImageData(make_images(20, seed=1), TensorImages(make_images(20, seed=1).images[[i for i in range(20) if i % 3]], torch.zeros(13).long()), 'one')
    with pytest.raises(ValueError, match='fewer than two classes'): linear(net, one, overlap='drop')
    assert net.calls == 0

def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path/'file').write_text('')
    for out in (tmp_path/'file', tmp_path/'file'/'x'):
        with pytest.raises(ValueError, match='cannot be a folder'): knn(Net(), make_data(), k=5, out=out)

@pytest.mark.parametrize('words, wrong', [(dict(K=3), "no argument 'K'"), (dict(resize='a'), "resize='a'"), (dict(resize=4), 'resize=4'), (dict(batch_size=0), 'batch_size=0'), (dict(size=0), 'size=0')])
def test_wrong_arguments_of_all_protocols(words, wrong):
    for f in (knn, linear):
        net = Net()
        with pytest.raises(ValueError, match=wrong): f(net, make_data(), **words)
        assert net.log == []

def test_classes_that_train_lacks_are_noted():
    r = knn(Net(), ImageData(make_images(60, classes=2, seed=1), make_images(30, classes=3, seed=2), 'more'), k=5, baselines=False)
    assert '10 test images are of classes without a training image' in r.note

@pytest.mark.parametrize('chunk', [7, 30, 1000])
def test_ties_go_to_the_first(chunk):
    "Features with few distinct rows: whatever the chunks, the neighbours are those of a stable sort."
    g = torch.Generator().manual_seed(0)
    rows = torch.eye(5)[:, :4]
    bank, queries = rows[torch.randint(4, (200,), generator=g)], rows[torch.randint(4, (20,), generator=g)]
    expected = (queries @ bank.T).sort(dim=1, descending=True, stable=True).indices[:, :70]
    assert torch.equal(topk_similar(queries, bank, 70, bank_chunk=chunk)[1], expected)

def test_another_size_than_the_encoders_own():
    net, data = vit(size=16, patch=4, width=32, depth=1, heads=2), make_data(size=32)
    r = knn(net, data, k=5, size=32)
    assert r.settings['size'] == 32 and 'random encoder' in r.baselines and net.sizes == {16}
    with pytest.raises(ValueError, match='size=30'): knn(net, data, k=5, size=30)

def test_an_encoder_file_remembers_what_it_was_trained_on(tmp_path):
    from ssl_patch.encoders import load_encoder, save_encoder
    net, data = vit(size=8, patch=4, width=16, depth=1, heads=2), make_data()
    assert load_encoder(save_encoder(net, tmp_path/'a.safetensors')).trained_on is None
    net.trained_on = data.test.fingerprints()
    with pytest.raises(ValueError, match='trained on 30 of 30'): knn(load_encoder(save_encoder(net, tmp_path/'a.safetensors')), data, k=5)


def test_features_of_a_network_in_channels_last_are_remembered():
    "A 1x1 convolution in channels_last has strides that cannot be read as bytes as they are."
    net = nn.Conv2d(4, 6, 1).to(memory_format=torch.channels_last)
    key = _fingerprint(net)
    assert key == _fingerprint(net)
    with torch.no_grad(): net.weight[0, 0] += 1
    assert key != _fingerprint(net)

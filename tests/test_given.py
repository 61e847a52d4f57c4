"What people have in hand: arrays, lists, patterns, data sets of other libraries."

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import Compose, Normalize, RandomCrop, ToTensor

from ssl_patch.data.files import FileImages
from ssl_patch.data.images import ImageData, TensorImages, pixel_stats, unit_std
from ssl_patch.data.sources import images
from ssl_patch.evaluation.features import RawPixels


def picture(seed, h=24, w=24):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


X = np.stack([picture(i) for i in range(6)])
Y = ['cup', 'cat', 'cup', 'dog', 'cat', 'cat']
PIL = [Image.fromarray(x) for x in X]


@pytest.fixture
def paths(tmp_path):
    for i, x in enumerate(X):
        path = tmp_path / 'pets' / 'abc'[i // 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(path)
    return sorted((tmp_path / 'pets').glob('*/*.png'))


def told(f, *args, **how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return f(*args, **how), [str(w.message) for w in caught]


def same(store, x=X):
    got = torch.stack(list(store)).permute(0, 2, 3, 1).numpy()
    return np.array_equal(got, x)


# ---- arrays


@pytest.mark.parametrize('kind', ['nhwc', 'nchw', 'tensor'])
def test_arrays_with_many_channels(kind):
    x = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 5), dtype=np.uint8)
    given = x if kind == 'nhwc' else np.moveaxis(x, -1, 1)
    given = torch.from_numpy(given) if kind == 'tensor' else given
    with pytest.raises(ValueError, match=r'images must be uint8.*images\(x, channels=5\)'):
        images(given)
    d = images(given, channels=5)
    assert same(d.train, x) and d.train.channels == 5 and len(d.mean) == 5


@pytest.mark.parametrize(
    'x, call',
    [
        (X / 255, r'\(255\*x\).round\(\) as uint8, or images\(x, value_range=\(0, 1\)\)'),
        (X.astype(np.float32), r'x.round\(\) as uint8'),
        (X.astype(np.int64), r'x.round\(\) as uint8'),
        ((X / 255 - 0.5) / 0.2, r'from -2.5 to 2.5.*value_range=\(low, high\)'),
        (X.astype(np.uint16) * 16, r'from 0 to 4080.*value_range=\(low, high\)'),
        (torch.from_numpy(X / 255), r'value_range=\(0, 1\)'),
        (X[0], r'one picture.*x\[None\]'),
        (list(range(9)), 'images must be uint8'),
        ([[1, 2], [3, 4]], 'images must be uint8'),
        (dict(train=X, test=X), r"images\(source\['train'\], test=source\['test'\]\)"),
        (torch.utils.data.DataLoader(X), r'images\(loader.dataset\)'),
    ],
    ids=range(11),
)
def test_what_is_not_taken_says_the_call_that_is(x, call):
    with pytest.raises(ValueError, match=call):
        images(x)


def test_arrays_of_other_types_with_their_range():
    assert same(images(X / 255, value_range=(0, 1)).train)
    assert same(images(torch.from_numpy(X).permute(0, 3, 1, 2) / 255, value_range=(0, 1)).train)
    assert same(images(X.astype(np.uint16) * 16, value_range=(0, 4095)).train)
    assert same(images(X, value_range=(0, 1)).train)  # uint8 is uint8


# ---- labels


def test_labels_in_words():
    d = images((X, Y), test=(X[:2], ['dog', 'cat']))
    assert d.classes == ['cat', 'cup', 'dog'] and d.train.labels.tolist() == [1, 0, 1, 2, 0, 0]
    assert d.test.labels.tolist() == [2, 0]
    assert images((X, np.array(Y))).train.labels.tolist() == [1, 0, 1, 2, 0, 0]
    d = images((X, ['cup', None, 'cat', float('nan'), 'cat', 'cat']))
    assert d.train.labels.tolist() == [1, -1, 0, -1, 0, 0] and '2 train images have none' in d.note
    d = images((X, Y, ['dog', 'cup', 'cat']))
    assert d.train.labels.tolist() == [1, 2, 1, 0, 2, 2]
    with pytest.raises(ValueError, match='cup are none of the classes cat, dog'):
        images((X, Y, ['cat', 'dog']))
    with pytest.raises(ValueError, match='labels must be whole numbers, or words'):
        images((X, ['cat', 3, 'cup', 'cup', 'cat', 'cat']))


def test_labels_in_a_column_and_one_of_many():
    assert images((X, np.arange(6)[:, None] % 2)).train.labels.tolist() == [0, 1] * 3
    assert images((X[..., 0], np.arange(6)[:, None] % 2)).train.labels.tolist() == [0, 1] * 3
    with pytest.raises(ValueError, match=r'y.argmax\(1\)'):
        images((X, np.eye(6, dtype=int)))


# ---- lists and patterns


def test_a_list_of_paths(paths, tmp_path):
    d = images(paths)
    assert same(d.train) and d.train.labels is None and d.train.names[:2] == ['a/0.png', 'a/1.png']
    assert same(images([str(p) for p in paths]).train)
    assert same(images(tuple(paths[:2])).train, X[:2])  # two paths are no pair
    assert same(images([paths[3]]).train, X[3:4])
    d = images((paths, Y), test_fraction=0.5)
    assert d.classes == ['cat', 'cup', 'dog'] and len(d.train) == 3
    assert isinstance(images(paths, stream=True).train, FileImages)
    assert images(paths, size=8).train.images.shape == (6, 3, 8, 8)
    with pytest.raises(FileNotFoundError, match='1 of 7 files are not there.*gone.png'):
        images([*paths, tmp_path / 'gone.png'])
    with pytest.raises(ValueError, match='a list of files, or one folder'):
        images([tmp_path, *paths])


def test_patterns(paths, tmp_path):
    assert same(images(f'{tmp_path}/pets/*/*.png').train)
    assert same(images(tmp_path / 'pets' / '**' / '*.png').train)
    assert same(images(f'{tmp_path}/pets/b/[0-9].png').train, X[2:4])
    with pytest.raises(FileNotFoundError, match='no file is like'):
        images(f'{tmp_path}/pets/*.jpg')
    odd = tmp_path / 'odd [1]'
    (tmp_path / 'pets').rename(odd)
    assert len(images(str(odd)).train) == 6  # a folder of that very name


def test_home_is_home_in_patterns_and_lists(paths, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert same(images('~/pets/*/*.png').train)
    assert same(images([f'~/pets/a/{i}.png' for i in range(2)]).train, X[:2])


def test_one_picture_and_archives_are_told(paths, tmp_path):
    (tmp_path / 'a.zip').write_bytes(b'x')
    for path in (paths[0], tmp_path / 'a.zip'):
        with pytest.raises(ValueError, match=r'a folder of images, a packed.*\[path, ...\]'):
            images(path)


def test_lists_of_pictures():
    assert same(images(PIL).train) and same(images((PIL, Y)).train)
    assert images((PIL, Y)).classes == ['cat', 'cup', 'dog']
    assert same(images(list(X)).train) and same(images(list(X[:2])).train, X[:2])
    assert same(images([torch.from_numpy(x).permute(2, 0, 1) for x in X]).train)
    assert same(images([torch.from_numpy(x).permute(2, 0, 1) / 255 for x in X]).train)
    mixed = [PIL[0], X[1], PIL[2].convert('RGBA')]
    assert same(images(mixed).train, X[:3])
    gray = images([p.convert('L') for p in PIL], channels=1).train
    assert gray.images.shape == (6, 1, 24, 24)
    small = [Image.fromarray(picture(i, 20 + i, 30)) for i in range(3)]
    with pytest.raises(ValueError, match='size must be given, as images have sizes 30 x 20 and 30'):
        images(small)
    assert images(small, size=16).train.images.shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match='more than memory_limit'):
        images(PIL, memory_limit=1000)
    with pytest.raises(ValueError, match='image 1 must be a PIL image, or an array'):
        images([PIL[0], 'x', PIL[1], PIL[2]])


def test_pictures_with_more_than_8_bits():
    deep = [Image.fromarray(x[..., 0].astype(np.uint16) * 16) for x in X]
    d, said = told(images, deep)
    assert same(d.train, X[..., :1].repeat(3, -1)) and len(said) == 1 and '4095' in said[0]


# ---- data sets


class Pairs(torch.utils.data.Dataset):
    classes = ['cat', 'cup', 'dog']

    def __init__(self, transform=None):
        self.transform = transform or (lambda x: x)

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.transform(PIL[i]), self.classes.index(Y[i])


class Rows:
    "As Hugging Face has them."

    class Label:
        names = ['cat', 'cup', 'dog']

    features = dict(image=None, label=Label())

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return dict(image=PIL[i], label=self.features['label'].names.index(Y[i]))


class Words(Rows):
    features = None

    def __getitem__(self, i):
        return dict(img=PIL[i], label=Y[i])


@pytest.mark.parametrize(
    'data', [Pairs(), Pairs(ToTensor()), Rows(), Words()], ids=lambda d: type(d).__name__
)
def test_data_sets_of_images_and_labels(data):
    d, said = told(images, data, test=torch.utils.data.Subset(data, [0, 3]))
    assert isinstance(d, ImageData) and same(d.train) and same(d.test, X[[0, 3]]) and not said
    assert d.classes == ['cat', 'cup', 'dog'] and d.train.labels.tolist() == [1, 0, 1, 2, 0, 0]
    assert d.test.labels.tolist() == [1, 2]


def test_torchvision_s_own():
    d = images(FakeData(size=5, image_size=(3, 16, 16), num_classes=3))
    assert d.train.images.shape == (5, 3, 16, 16) and len(d.train.labels) == 5
    d = images(torch.utils.data.TensorDataset(torch.from_numpy(X).permute(0, 3, 1, 2)))
    assert same(d.train) and d.train.labels is None


def test_a_data_set_that_lists_files_is_read_as_files(paths, tmp_path):
    d = images(ImageFolder(tmp_path / 'pets'), stream=True)
    assert isinstance(d.train, FileImages) and same(d.train)
    assert d.classes == ['a', 'b', 'c'] and d.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    d = images(ImageFolder(tmp_path / 'pets', ToTensor()))
    assert isinstance(d.train, TensorImages) and same(d.train) and d.classes == ['a', 'b', 'c']


def test_data_sets_that_are_not_taken():
    normal = Compose([ToTensor(), Normalize((0.5,) * 3, (0.2,) * 3)])
    with pytest.raises(
        ValueError, match='image 0 must be uint8, or floats in .*leave out Normalize'
    ):
        images(Pairs(normal))
    d, said = told(images, Pairs(RandomCrop(12)))
    assert len(said) == 1 and 'leave out its random transforms' in said[0]

    class Masks(Pairs):
        def __getitem__(self, i):
            return PIL[i], PIL[i].convert('L')

    d, said = told(images, Masks())
    assert d.train.labels is None and len(said) == 1 and 'no class' in said[0]

    class Table(Rows):
        def __getitem__(self, key):
            raise KeyError(key)

    with pytest.raises(ValueError, match=r'Table does not.*images\(\(paths, labels\)\)'):
        images(Table())
    with pytest.raises(ValueError, match='items with a key such as'):
        images(type('Odd', (Rows,), dict(__getitem__=lambda self, i: dict(text='x')))())


# ---- known sets in torchvision's copy


class FakeCIFAR:
    classes = ['x', 'y']

    def __init__(self, root, train, download=False):
        self.data, self.targets = X, [0, 1] * 3


def test_torchvision_s_copy_is_resized_and_says_that_it_does_not_stream(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', FakeCIFAR)
    d = images('cifar10', root=tmp_path, size=12)
    assert d.train.images.shape == d.test.images.shape == (6, 3, 12, 12)
    d, said = told(images, 'cifar10', root=tmp_path, stream=True)
    assert (
        same(d.train) and all('stream=True changes nothing' in s for s in said) and len(said) == 2
    )
    assert images('cifar10', root=tmp_path, channels=1).train.channels == 1
    with pytest.raises(ValueError, match='channels must be 3, as cifar10 train has so many, got 4'):
        images('cifar10', root=tmp_path, channels=4)


# ---- a channel that is the same everywhere


@pytest.mark.parametrize('value', [0, 77, 255])
def test_a_constant_channel_divides_by_one(value):
    x = X.copy()
    x[..., 2] = value
    d = images(x)
    mean, std = pixel_stats(d.train)
    assert d.std[2] == 1 and torch.equal(d.std[:2], std[:2]) and torch.equal(d.mean, mean)
    assert torch.equal(unit_std(mean, std), d.std)
    whole = torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    for stats in ((d.mean, d.std), (mean, std)):
        z = RawPixels(24, *stats)(whole).view(6, 3, -1)
        assert z.isfinite().all() and z[:, 2].abs().max() < 1e-6 and z[:, :2].std() > 0.5


def test_a_run_on_two_dyes_learns_and_is_measured():
    from ssl_patch.evaluation.knn import knn
    from ssl_patch.methods.compose import build_method
    from ssl_patch.models.encoders import vit
    from ssl_patch.training.pretrain import Pretrainer

    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (96, 3, 16, 16), generator=g, dtype=torch.uint8)
    x[:, 2] = 0
    y = torch.arange(96) % 4
    d = images((x[:64], y[:64]), test=(x[64:], y[64:]))
    net = vit(size=16, patch=4, width=32, depth=1, heads=2)
    run = Pretrainer(
        build_method('aps', net, hidden=32, out=16),
        d,
        epochs=1,
        batch_size=16,
        progress='quiet',
        knn_every=0,
    ).fit()
    assert np.isfinite(run.history[-1]['loss'])
    theirs = net.set_stats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert 0 <= knn(theirs, d).value <= 1


def test_train_and_test_have_the_same_channels():
    with pytest.raises(ValueError, match='same channels, got 3 and 1'):
        images(X, test=images(X, channels=1).train)

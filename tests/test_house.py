"""The house's rules: imports go down the floors, no room is private to another, rooms are short,
lines fit, classes are whole, a paper is one room. Each rule is shown to fail on a planted fault."""

import ast
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    'ground',
    'data',
    'views',
    'models',
    'evaluation',
    'methods',
    'training',
    'transfer',
    'reports',
    'commands',
)  # what is in none of them is a page, above all
SKELETON = (
    'method',
    'presets',
    'branches',
    'configs',
    'patch_loss',
    'trials',
    'scores',
    'contrast',
    'geometry',
    'patch_pictures',
)  # of methods: what papers stand on
MOST_LINES, MOST_COLUMNS = 400, 100


@cache
def rooms() -> dict:
    "Name of a module ('methods.sce') -> its text, of everything that is exported."
    paths = sorted((ROOT / 'ssl_patch').rglob('*.py'))
    names = {p: '.'.join(p.relative_to(ROOT / 'ssl_patch').with_suffix('').parts) for p in paths}
    own = {p: n for p, n in names.items() if p.stem != '__init__'}
    return {n: p.read_text() for p, n in own.items()}


def target(room, node, names):
    "What an `import from` takes its names from: a room of ours with the names, or nothing."
    if node.level:
        above = room.split('.')[: -node.level]
        module = '.'.join(above + ([node.module] if node.module else []))
    elif (node.module or '').split('.')[0] == 'ssl_patch':
        module = node.module.removeprefix('ssl_patch').lstrip('.')
    else:
        return
    for alias in node.names:
        inner = f'{module}.{alias.name}'.lstrip('.')
        if inner in names:  # from ssl_patch.data import images: a room
            yield inner, alias.asname or alias.name, True
        elif module:
            yield module, alias.name, False


@cache
def script(name):
    "A script of scripts/, as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT / 'scripts' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imports(room, text, names):
    "(room, name, whether the name is the room itself) of all that a room imports from others."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            yield from target(room, node, names)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith('ssl_patch.'):
                    yield alias.name.removeprefix('ssl_patch.'), alias.name, True


def floor(room):
    first = room.split('.')[0]
    return FLOORS.index(first) if first in FLOORS else len(FLOORS)


# ---- the rules: each takes {room: text} and gives sentences, none where all is well


def upward_imports(rooms):
    return [
        f'{room} imports from {other}, which is above it'
        for room, text in rooms.items()
        for other, _, _ in imports(room, text, rooms)
        if floor(other) > floor(room)
    ]


def circles(rooms):
    below = {r: {o for o, _, _ in imports(r, t, rooms) if o in rooms} for r, t in rooms.items()}
    found, done = [], set()

    def walk(room, path):
        if room in path:
            found.append(' -> '.join([*path[path.index(room) :], room]))
        elif room not in done:
            for other in sorted(below[room]):
                walk(other, [*path, room])
            done.add(room)

    for room in rooms:
        walk(room, [])
    return found


def skeleton_names_a_paper(rooms):
    papers = [r for r, t in rooms.items() if r.startswith('methods.') and is_paper(t)]
    return [
        f'{room} imports from {other}, a paper'
        for room in (f'methods.{s}' for s in SKELETON)
        for other, _, _ in imports(room, rooms.get(room, ''), rooms)
        if other in papers
    ]


def is_paper(text):
    calls = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call))
    return any(getattr(c.func, 'id', '') == 'register_method' for c in calls)


def private(name):
    return name.startswith('_') and not name.startswith('__')


def private_names(rooms):
    found = []
    for room, text in rooms.items():
        whole = set()
        for other, name, is_room in imports(room, text, rooms):
            if is_room:
                whole.add(name)
            elif private(name):
                found.append(f'{room} imports {name} of {other}')
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and private(node.attr):
                if isinstance(node.value, ast.Name) and node.value.id in whole:
                    found.append(f'{room} takes {node.value.id}.{node.attr}')
    return found


def long_rooms(rooms):
    "As the notebooks export them, before scripts/docstrings.py tells docstrings of parameters."
    lines = {room: len(script('docstrings').without(t).splitlines()) for room, t in rooms.items()}
    return [f'{room} has {n} lines' for room, n in lines.items() if n > MOST_LINES]


def written(text):
    "A module without what nbdev writes: its first line, which the notebook's top gives, `__all__`."
    text = re.sub(r'\A""".*"""\n\n# AUTOGENERATED', '# AUTOGENERATED', text)
    return re.sub(r'^__all__ = \[[^\]]*\]', '', text, flags=re.M)


def long_lines(texts):
    return [
        f'{name}, line {i}: {len(line)} columns'
        for name, text in texts.items()
        for i, line in enumerate(written(text).splitlines(), 1)
        if len(line) > MOST_COLUMNS
    ]


def classes(rooms):
    "(room, class) of all classes."
    for room, text in rooms.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                yield room, node


def slices(rooms):
    "Classes that are there for one other class to inherit, and for nobody to use."
    bases = [(b, node.name) for _, node in classes(rooms) for b in map(base_name, node.bases)]
    used = {
        getattr(node.func, 'id', getattr(node.func, 'attr', ''))
        for text in rooms.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    }
    return [
        f'{room}.{node.name} is only inherited, by {heirs[0]}'
        for room, node in classes(rooms)
        if len(heirs := [heir for b, heir in bases if b == node.name]) == 1
        and (private(node.name) or node.name not in used)
    ]


def base_name(node):
    return getattr(node, 'id', getattr(node, 'attr', ''))


def hung_on(rooms):
    "Attributes that are set, at the top of a module, on a class or function that is already there."
    return [
        f'{room} sets {ast.unparse(t)} from outside'
        for room, text in rooms.items()
        for node in ast.parse(text).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for t in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(t, ast.Attribute)
    ]


# ---- they hold


RULES = (
    upward_imports,
    circles,
    skeleton_names_a_paper,
    private_names,
    long_rooms,
    slices,
    hung_on,
)


@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_rule_holds(rule):
    assert len(rooms()) > 50
    assert not (faults := rule(rooms())), '\n'.join(faults)


PLANTED = {
    upward_imports: {
        'data.images': 'def f():\n    from ..methods.sce import sce',
        'methods.sce': '',
    },
    circles: {
        'methods.a': 'from .b import x',
        'methods.b': 'from ssl_patch.methods import c',
        'methods.c': 'from . import a',
    },
    skeleton_names_a_paper: {
        'methods.method': 'from .sce import SCELoss',
        'methods.sce': "register_method('sce', SCE, {})",
    },
    private_names: {'views.loader': 'from .crops import _piece', 'views.crops': ''},
    long_rooms: {'data.images': '\n' * 401},
    slices: {'methods.method': 'class _Queues: pass\nclass Method(_Queues): pass'},
    hung_on: {'data.images': 'class Images: pass\nImages.copies = lambda self: 0'},
}


@pytest.mark.parametrize('rule', RULES, ids=lambda r: r.__name__)
def test_rule_can_fail(rule):
    assert len(rule(PLANTED[rule])) == 1


def test_private_attribute_of_a_room_is_seen():
    rooms = {'views.loader': 'from . import crops\ncrops._piece(1)', 'views.crops': ''}
    assert private_names(rooms) == ['views.loader takes crops._piece']


# ---- what is written


def notebooks() -> list:
    return [p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if 'checkpoints' not in str(p)]


def cells(path, kind) -> list:
    found = json.loads(path.read_text())['cells']
    return [''.join(c['source']) for c in found if c['cell_type'] == kind]


def test_lines_fit():
    scripts = [p for d in ('scripts', 'tests') for p in sorted((ROOT / d).glob('*.py'))]
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in [*scripts, ROOT / 'setup.py']}
    texts |= {f'ssl_patch/{room}': text for room, text in rooms().items()}
    for path in notebooks():
        name = str(path.relative_to(ROOT))
        texts |= {f'{name} code {i}': c for i, c in enumerate(cells(path, 'code'))}
    assert len(texts) > 1000
    assert not (faults := long_lines(texts)), '\n'.join(faults)
    assert len(long_lines({'a': f'__all__ = [{"x, " * 50}]\n{"y" * 100}\n{"y" * 101}'})) == 1


def test_a_room_is_exported_from_the_notebook_of_its_name():
    made = {}
    for path in notebooks():
        for code in cells(path, 'code'):
            if name := re.match(r'#\| *default_exp +(\S+)', code):
                assert name[1] not in made, f'{path} and {made[name[1]]} export the same room'
                made[name[1]] = path.relative_to(ROOT / 'nbs')
    assert set(made) == set(rooms())
    for room, path in made.items():
        stem = re.sub(r'^\d+_', '', path.stem)
        if room != '__main__':
            assert '.'.join([*path.parts[:-1], stem]) == room, f'{path} exports {room}'


def test_a_notebook_says_at_its_top_what_it_is():
    for path in notebooks():
        top = cells(path, 'markdown')[0]
        assert top.startswith('# ') and re.search(r'^> \S', top, re.M), path


def test_no_dead_links():
    pages = {p: '\n'.join(cells(p, 'markdown')) for p in notebooks()}
    pages |= {p: p.read_text() for p in ROOT.glob('*.md')}
    faults = []
    for page, text in pages.items():
        for link in re.findall(r'\]\(([^)\s#]+)[^)]*\)', text):
            if '://' not in link and not (page.parent / link).exists():
                faults.append(f'{page.relative_to(ROOT)} links to {link}')
    assert not faults, '\n'.join(faults)


# ---- a paper is one room

PAPERS = dict(
    aps=('sample_asymmetric', 'AsymmetricPatchSampler', 'APS'),
    moco_v1=('MoCoV1',),  # what it computes, InfoNCE, is everybody's
    moco_v2=('MoCoV2',),
    moco_v3=('MoCoV3',),
    ressl=('ressl', 'ReSSLLoss', 'ReSSL'),
    co2=('co2', 'CO2Loss', 'CO2'),
    sce=('sce', 'SCELoss', 'SCE'),
    sce_video=('SCEVideo', 'ClipSettings'),
    densecl=('densecl', 'DenseCLLoss', 'DenseCL'),
    repco=('repco', 'RepCoLoss', 'RepCo'),
    local_to_global=('local_to_global', 'LocalToGlobalLoss', 'LocalToGlobal'),
)


def registered():
    from ssl_patch.methods.compose import load_papers

    return {n: m for n, m in load_papers().items() if m.build.__module__.startswith('ssl_patch.')}


def test_formula_loss_method_and_presets_of_a_paper_are_in_one_room():
    import sys

    assert set(registered()) == set(PAPERS)
    for name, method in registered().items():
        room = sys.modules[method.build.__module__]
        assert is_paper(rooms()[room.__name__.removeprefix('ssl_patch.')])
        assert any(v == method.configs for v in vars(room).values()), f'presets of {name}'
        for part in PAPERS[name]:
            assert getattr(room, part).__module__ == room.__name__, f'{part} of {name}'

"""`?`, `help()` and editors show what the notebooks say of each parameter: scripts/docstrings.py
writes it into the docstrings of the package that was exported."""

import ast
import importlib.util
import pydoc
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('docstrings', ROOT / 'scripts' / 'docstrings.py')
docstrings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docstrings)

SOURCE = r'''
from dataclasses import dataclass


def one(
    x,  # (B,d) rows
    # a long comment
    # above
    tau: float = 0.1,
    *rest: int,  # more
    key=None,  # a \ and """ in it
    plain=3,
    **slots,  # any slot
) -> tuple:  # (scalar, dict)
    "One line."
    return x


def two(x, y):  # of what comes back
    "Two."


@dataclass
class Three:
    """More
    lines."""

    tau: float = 0.2  # temperature
    _own: int = 0  # hidden

    def call(
        self,
        q,  # (B,d) queries
    ):
        # begins with a comment
        return q


class Four:
    "Has an init."

    def __init__(
        self,
        size: int,  # pixels
    ):
        self.size = size


def _private(
    x,  # nobody asks
):
    "Private."
'''
ONE = """One line.

Args:
    x: (B,d) rows
    tau: a long comment above
    *rest: more
    key: a \\ and ''' in it
    **slots: any slot

Returns:
    (scalar, dict)"""


def docs(text):
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {n.name: ast.get_docstring(n) for n in nodes}


def code(text):
    "What a module does, docstrings aside."
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and docstrings.docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


def test_what_is_said_of_a_parameter_stands_in_the_docstring():
    told = docs(docstrings.written(SOURCE))
    assert told['one'] == ONE
    assert told['two'] == 'Two.' and told['_private'] == 'Private.'
    assert told['Three'] == 'More\nlines.\n\nArgs:\n    tau: temperature'
    assert told['call'] == 'Args:\n    q: (B,d) queries'
    assert told['Four'] == 'Has an init.\n\nArgs:\n    size: pixels'
    assert told['__init__'] is None


def test_written_twice_it_is_the_same_and_so_is_the_code():
    once = docstrings.written(SOURCE)
    assert docstrings.written(once) == once and code(once) == code(SOURCE)
    assert docs(docstrings.without(once)) == docs(SOURCE)


def exported():
    paths = sorted((ROOT / 'ssl_patch').rglob('*.py'))
    return [p for p in paths if docstrings.is_room(p)]


def test_the_package_is_written():
    wrong = [str(p) for p in exported() if docstrings.written(p.read_text()) != p.read_text()]
    assert len(exported()) > 50
    assert not wrong, f'scripts/export.sh (make prepare) has not run since they were made: {wrong}'


@pytest.mark.parametrize(
    'path, word',
    [
        ('ssl_patch.methods.sce.SCE', 'lam: share of the positive'),
        ('ssl_patch.methods.method.Method', 'view_pairs: of query view, key view'),
        ('ssl_patch.methods.contrast.InfoNCELoss', 'tau: temperature'),
        ('ssl_patch.models.momentum.Queue.put', 'keys: (n,d) unit rows'),
        ('ssl_patch.data.sources.images', 'size: '),
    ],
)
def test_help_shows_it(path, word):
    assert word in pydoc.plain(pydoc.render_doc(path))

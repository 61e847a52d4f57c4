"""Write what notebooks say of each parameter, a comment beside it, into the docstrings of the
exported package, where `?`, `help()` and editors look. Part of scripts/export.sh; run twice it
changes nothing. The command line's rooms stay as they are: their help comes from the comments."""

import ast
import io
import sys
import textwrap
import tokenize
from pathlib import Path

WIDTH = 100
HEADS = ('Args:', 'Returns:')


def comments(text):
    "Line number -> (comment, whether it stands alone on its line)."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [t for t in tokens if t.type == tokenize.COMMENT]
    return {t.start[0]: (t.string.lstrip('# '), t.line.lstrip().startswith('#')) for t in found}


def beside(node, said):
    "The comment at the end of a parameter's last line, or the lines of comment above it."
    comment, alone = said.get(node.end_lineno, ('', True))
    if comment and not alone:
        return comment
    above, line = [], node.lineno - 1
    while line in said and said[line][1]:
        above.insert(0, said[line][0])
        line -= 1
    return ' '.join(above)


def parameters(function, said, lines):
    "(name, words) of what a function takes, and words for what it returns."
    a = function.args
    defaults = [None] * (len(a.posonlyargs + a.args) - len(a.defaults)) + a.defaults
    defaults += [None] * bool(a.vararg) + a.kw_defaults + [None] * bool(a.kwarg)
    starred = [a.vararg] if a.vararg else []
    last = [a.kwarg] if a.kwarg else []
    rows = []
    for arg, default in zip([*a.posonlyargs, *a.args, *starred, *a.kwonlyargs, *last], defaults):
        whole = ast.copy_location(ast.Name(arg.arg), arg)
        whole.end_lineno = (default or arg).end_lineno
        if words := beside(whole, said):
            stars = '*' * (arg is a.vararg) + '**' * (arg is a.kwarg)
            rows.append((stars + arg.arg, words))
    several = {arg.lineno for arg in [*a.posonlyargs, *a.args, *starred, *a.kwonlyargs, *last]}
    on_own_lines = len(several) == len(defaults) and function.lineno not in several
    if not on_own_lines:  # def f(x, y):  # a comment there is of what comes back
        rows = []
    returned = ''
    if function.returns and lines[function.returns.end_lineno - 1].split('#')[0].endswith(':  '):
        returned = said.get(function.returns.end_lineno, ('', True))[0]
    return rows, returned


def fields(node, said):
    "(name, words) of the fields of a dataclass."
    own = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    rows = [(n.target.id, beside(n, said)) for n in own if not n.target.id.startswith('_')]
    return [row for row in rows if row[1]]


def is_dataclass(node):
    return any('dataclass' in ast.unparse(d) for d in node.decorator_list)


def documented(tree, said, lines):
    "(node, rows, returned) of each public class, function and method."
    for node in ast.walk(tree):
        body = node.body if isinstance(node, (ast.Module, ast.ClassDef)) else []
        for n in body:
            if isinstance(n, ast.ClassDef) and not n.name.startswith('_'):
                init = [f for f in n.body if getattr(f, 'name', '') == '__init__']
                rows = fields(n, said) if is_dataclass(n) else []
                rows = parameters(init[0], said, lines)[0] if init else rows
                yield n, rows, ''
            if isinstance(n, ast.FunctionDef) and not n.name.startswith('_'):
                yield n, *parameters(n, said, lines)


def part(rows, returned, indent):
    "The lines that are appended to a docstring."
    pad, deep = ' ' * indent, ' ' * (indent + 4)

    def entry(text):
        text = text.replace('\\', '\\\\').replace('"""', "'''")
        return textwrap.wrap(text, WIDTH, initial_indent=deep, subsequent_indent=deep + '    ')

    lines = [f'{pad}Args:'] * bool(rows)
    for name, words in rows:
        lines += entry(f'{name}: {words}')
    lines += [''] * bool(rows and returned) + [f'{pad}Returns:'] * bool(returned)
    return lines + (entry(returned) if returned else [])


def docstring(node):
    "The statement that is the docstring, or None."
    first = node.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first if text and isinstance(first.value.value, str) else None


def without(text):
    "The text of a module without what `written` adds."
    lines, tree = text.split('\n'), ast.parse(text)
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    for node in sorted(nodes, key=lambda n: -n.lineno):
        doc = docstring(node)
        own = lines[doc.lineno - 1 : doc.end_lineno] if doc else []
        starts = [i for i, line in enumerate(own) if line.strip().strip('"') in HEADS]
        if not starts or own[-1].strip() != '"""':
            continue
        kept = own[: starts[0]]
        while kept and kept[-1].strip() in ('', '"""'):
            kept.pop()
        if kept:
            kept[-1] += '"""'
        lines[doc.lineno - 1 : doc.end_lineno] = kept
    return '\n'.join(lines)


def written(text):
    "The text of a module, what is said of parameters in its docstrings."
    text = without(text)
    lines, said = text.split('\n'), comments(text)
    todo = [t for t in documented(ast.parse(text), said, lines) if t[1] or t[2]]
    for node, rows, returned in sorted(todo, key=lambda t: -t[0].lineno):
        doc, indent = docstring(node), node.col_offset + 4
        added = [*part(rows, returned, indent), ' ' * indent + '"""']
        if doc is None:
            first = node.body[0]
            above = min(n.lineno for n in [first, *getattr(first, 'decorator_list', [])])
            while above - 1 in said and said[above - 1][1]:
                above -= 1  # a comment that belongs to the statement
            if above > node.lineno:
                lines[above - 1 : above - 1] = [f'{" " * indent}"""', *added]
            continue
        old = ''.join(f'{line}\n' for line in lines[doc.lineno - 1 : doc.end_lineno]).strip()
        bare = old[3:-3] if old.startswith('"""') else old[1:-1]
        if old[0] != '"' or 'r' in old[: old.index('"')]:
            continue
        pad = ' ' * indent
        first = f'{pad}"""{bare.rstrip()}'.split('\n')
        if len(first[0]) > WIDTH:  # the longer quotes did not fit
            first[:1] = textwrap.wrap(first[0], WIDTH, initial_indent='', subsequent_indent=pad)
        lines[doc.lineno - 1 : doc.end_lineno] = [*first, '', *added]
    return '\n'.join(lines)


def is_room(path):
    "Whether a file was exported from a notebook, and is no part of the command line."
    return path.stem != '__init__' and 'commands' not in path.parts


def main(folder):
    for path in filter(is_room, sorted(Path(folder).rglob('*.py'))):
        before = path.read_text()
        after = written(before)
        if after != before:
            path.write_text(after)


if __name__ == '__main__':
    main(sys.argv[1] if sys.argv[1:] else 'ssl_patch')

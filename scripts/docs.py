"""The site: every notebook a page, and below each what it exports, as tables. `make docs` calls it.

    python scripts/docs.py                   # writes _docs, from what the notebooks hold already
    python scripts/docs.py methods/10_sce    # a page or more, and the landing page
    python scripts/docs.py --serve           # shows _docs on http://localhost:8000

Notebooks become Markdown in `_proc`, and Sphinx makes the pages: myst-parser, the theme furo, and
MathJax from a package, so that nothing is fetched from elsewhere by who reads."""

import argparse
import ast
import base64
import importlib.util
import json
import re
import shutil
import sys
from configparser import ConfigParser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import comments, documented
from readme import merged

ROOT = Path(__file__).parent.parent
NBS, PROC, DOCS = ROOT / 'nbs', ROOT / '_proc', ROOT / '_docs'
config = ConfigParser(delimiters=['='])
config.read(ROOT / 'settings.ini', encoding='utf-8')
CFG = config['DEFAULT']
SOURCE = f'{CFG["git_url"]}/blob/{CFG["branch"]}'
APART = dict(tutorials='Tutorials', results='Experiments')  # folders that are no reference
LINK = re.compile(r'\]\(((?!https?:|mailto:|#)[^)\s#]+)(#[^)\s]*)?\)')
FENCED = re.compile(r'^(`{3,}).*?^\1`*$', re.M | re.S)


def notebooks():
    return sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def page(path):
    "Name of a notebook's page, without an ending."
    return path.relative_to(NBS).with_suffix('').as_posix()


def source_of(cell):
    return ''.join(cell['source'])


# ---- a notebook as Markdown


def fence(text, words):
    "Text that stays as it is, in a fence that no line of it can close."
    longest = max(map(len, re.findall('^`{3,}', text, re.M)), default=2)
    ticks = '`' * (longest + 1)
    return f'{ticks}{words}\n{text}\n{ticks}'


def relinked(text, name):
    "Links to notebooks as links to pages; pictures beside them are copied, other files linked."

    def new(match):
        path, anchor = match[1], match[2] or ''
        to = (NBS / name).parent / path
        inside = to.resolve().is_relative_to(NBS)
        if not inside and to.suffix != '.md':
            return f']({SOURCE}/{to.resolve().relative_to(ROOT).as_posix()}{anchor})'
        if inside and to.is_file() and to.suffix != '.ipynb':
            copied = PROC / to.resolve().relative_to(NBS)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(to, copied)
        path = path.removeprefix('../') if not inside else path
        return f']({path.replace(".ipynb", ".md")}{anchor})'

    parts, at = [], 0
    for code in FENCED.finditer(text):
        parts += [LINK.sub(new, text[at : code.start()]), code[0]]
        at = code.end()
    return ''.join([*parts, LINK.sub(new, text[at:])])


def alt_text(above):
    "Words for a picture: the last sentence above it."
    plain = re.sub(r'\[([^\]]*)\]\([^)]*\)|[`*>#|]|\$+', r'\1', FENCED.sub('', above)).split()
    sentences = re.split(r'(?<=[.:!?])\s', ' '.join(plain))
    return re.sub(r'[\[\]\\]', '', sentences[-1])[:200]


def output_text(output, name, number, words):
    data = output.get('data', {})
    for kind in ('png', 'jpeg'):
        if f'image/{kind}' in data:
            path = PROC / f'{name}_{number}.{kind}'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(''.join(data[f'image/{kind}'])))
            return f'![{words}]({path.name})'
    if 'text/html' in data:
        return fence(''.join(data['text/html']), '{raw} html')
    if 'text/markdown' in data:
        return relinked(''.join(data['text/markdown']), name)
    text = ''.join(data.get('text/plain', output.get('text', []))).rstrip()
    return fence(f':class: output\n\n{text}', '{code-block} text') if text else ''


def only_imports(code):
    "Whether a cell brings names in, more than a few lines of them, and hardly does a thing."
    try:
        kinds = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(code).body]
    except SyntaxError:  # a cell for IPython or a shell
        return False
    return sum(kinds) > 5 and kinds.count(False) < 2


def folded(code):
    "Code behind a line to click."
    start = '<details class="imports"><summary>imports</summary>'
    shown = fence(code, 'python')
    return '\n\n'.join([fence(start, '{raw} html'), shown, fence('</details>', '{raw} html')])


def page_text(path):
    "A notebook's Markdown: prose, code, what it showed, and what it exports."
    name, parts, above, module = page(path), [], '', None
    for number, cell in enumerate(json.loads(path.read_text())['cells']):
        text = source_of(cell)
        if cell['cell_type'] == 'markdown':
            above = text
            parts.append(relinked(text, name))
            continue
        options = dict(re.findall(r'^#\| *([\w-]+):? *(.*)$', text, re.M))
        module = options.get('default_exp', module)
        code = re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip()
        if 'hide' in options or not code:
            continue
        if options.get('echo') != 'false':
            parts.append(folded(code) if only_imports(code) else fence(code, 'python'))
        for i, output in enumerate(merged(cell.get('outputs', []))):
            words = options.get('fig-alt') or alt_text(above)
            parts.append(output_text(output, name, f'{number}_{i}', words))
    if module:
        parts.append(reference(module, name))
    return '\n\n'.join(filter(None, parts)) + '\n'


# ---- what a notebook exports


def entry(node, rows, returned, module, path, inside=''):
    "One class, function or method: signature, words, a table of parameters, a link to its source."
    is_class = isinstance(node, ast.ClassDef)
    kind = 'class' if is_class else 'method' if inside else 'function'
    decorators = [ast.unparse(d) for d in getattr(node, 'decorator_list', [])]
    if 'property' in decorators:
        kind = 'property'
    types, sign = signature(node, decorators)
    words = re.split(r'\n*(?:Args|Returns):\n', ast.get_docstring(node) or '')[0]
    where = f'{SOURCE}/{path.relative_to(ROOT).as_posix()}#L{node.lineno}-L{node.end_lineno}'
    lines = [f'{words.strip()} [source]({where})'.strip()]
    if rows:
        lines += ['', '| | type | default | what it is |', '|---|---|---|---|']
        for name, said in rows:
            kind_of, default = types.get(name.strip('*'), ('', ''))
            cells = [f'`{name}`', code(kind_of), code(default), said.replace('|', r'\|')]
            lines.append('| ' + ' | '.join(cells) + ' |')
    if returned:
        lines += ['', f'Returns: {returned}']
    options = f':module: {module}\n' + ':classmethod:\n' * ('classmethod' in decorators)
    options += ':staticmethod:\n' * ('staticmethod' in decorators)
    options += ':no-contents-entry:\n' * bool(inside)
    ticks = '`' * (4 if is_class else 3)
    title = f'{inside}{node.name}{"" if kind == "property" else sign}'
    return ticks, f'{ticks}{{py:{kind}}} {title}\n{options}\n' + '\n'.join(lines)


def code(text):
    return f'`{text}`'.replace('|', r'\|') if text else ''


def signature(node, decorators):
    "({name: (type, default)}, signature as text) of a function, or of what makes a class."
    if isinstance(node, ast.ClassDef):
        init = [f for f in node.body if getattr(f, 'name', '') == '__init__']
        if init:
            return signature(init[0], [])
        own = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        if not any('dataclass' in d for d in decorators):
            return {}, ''
        found = {n.target.id: (ast.unparse(n.annotation), unparsed(n.value)) for n in own}
        shown = [f'{n}: {t}' + f' = {d}' * bool(d) for n, (t, d) in found.items() if n[0] != '_']
        return found, f'({", ".join(shown)})'
    a = node.args
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    pairs = [*zip(plain, defaults), *zip(a.kwonlyargs, a.kw_defaults)]
    pairs += [(x, None) for x in (a.vararg, a.kwarg) if x]
    types = {x.arg: (unparsed(x.annotation), unparsed(d)) for x, d in pairs}
    if plain and plain[0].arg in ('self', 'cls'):
        a.args = a.args[1:]
    returns = f' -> {ast.unparse(node.returns)}' if node.returns and node.name != '__init__' else ''
    return types, f'({ast.unparse(a)}){returns}'


def unparsed(node):
    return ast.unparse(node) if node else ''


def reference(module, name):
    "The section at the end of a page: every public class and function of its module."
    path = ROOT / 'ssl_patch' / f'{module.replace(".", "/")}.py'
    text = path.read_text()
    tree, full = ast.parse(text), f'{CFG["lib_path"]}.{module}'
    found = {id(n): (n, r, w) for n, r, w in documented(tree, comments(text), text.split('\n'))}
    parts = []
    for node in tree.body:
        if id(node) not in found:
            continue
        ticks, text = entry(*found[id(node)], full, path)
        for inner in getattr(node, 'body', []) if isinstance(node, ast.ClassDef) else []:
            if id(inner) in found:
                less, method = entry(*found[id(inner)], full, path, f'{node.name}.')
                text += f'\n\n{method}\n{less}'
        parts.append(f'{text}\n{ticks}')
    if not parts:
        return ''
    links = f'[notebook]({SOURCE}/nbs/{name}.ipynb) · [source]({SOURCE}/{path.relative_to(ROOT)})'
    head = f'## What this page exports\n\n`from {full} import ...` · {links}'
    return '\n\n'.join([head, *parts])


# ---- the order of pages


def table_rows(name):
    "Rows of the tables that a notebook shows, as lists of cells."
    cells = json.loads((NBS / f'{name}.ipynb').read_text())['cells']
    outputs = [o.get('data', {}) for c in cells for o in c.get('outputs', [])]
    lines = [x for o in outputs for x in ''.join(o.get('text/markdown', [])).splitlines()]
    return [[cell.strip() for cell in line.strip('| ').split(' | ')] for line in lines]


def linked(text):
    "Names of the pages that a text links to."
    return [m[1].removesuffix('.ipynb') for m in LINK.finditer(text) if m[1].endswith('.ipynb')]


def head_of(name):
    "(title up to a colon, the line below it) of a notebook."
    first = source_of(json.loads((NBS / f'{name}.ipynb').read_text())['cells'][0])
    title = re.sub(r'[`$<>]', '', first.splitlines()[0].lstrip('# ').split(':')[0])
    return title, re.search(r'^> (.*)$', first, re.M)[1]


def toctree(names, caption=''):
    "A list of pages for the side of all pages; it is not shown where it stands."
    entries = [f'{head_of(n)[0]} </{n}>' if (NBS / f'{n}.ipynb').exists() else n for n in names]
    head = ':hidden:\n' + f':caption: {caption}\n' * bool(caption)
    return fence(head + '\n' + '\n'.join(entries), '{toctree}')


def capital(text):
    return text[:1].upper() + text[1:]


def rooms_of(folder):
    return [page(p) for p in notebooks() if p.parent == NBS / folder]


def sides():
    """(lists of pages for the landing page, list for the reference, {page of a folder: its text}).
    The path is the one that the landing page shows, folders are those of the reference."""
    steps = [(re.match(r'[0-9]\. (.*)', first), rest) for first, *rest in table_rows('index')]
    path = [(head[1], linked(rest[0])) for head, rest in steps if head]
    seen = {name for _, names in path for name in names}
    bold = [(re.match(r'\*\*(\w+)\*\*', first), rest) for first, *rest in table_rows('reference')]
    floors = {head[1]: rest[0].strip('*') for head, rest in bold if head}
    pages = [n for n in rooms_of('.') if n not in seen and n not in ('index', 'reference')]
    front = [toctree(names, capital(what)) for what, names in path]
    for folder, caption in APART.items():
        rooms = [n for n in rooms_of(folder) if n not in seen]  # those that no path has
        front += [toctree(rooms, caption)] if rooms else []
    front.append(toctree(['reference', *pages, 'All names <genindex>'], 'Reference'))
    front.append(toctree(['CONTRIBUTING', 'CHANGELOG'], 'The project'))
    texts = {}
    for folder in [f for f in floors if f not in ('pages', *APART)]:
        rooms = rooms_of(folder)
        heads = [(n, *head_of(n)) for n in rooms]
        table = ['| | |', '|---|---|', *(f'| [{t}](/{n}.md) | {line} |' for n, t, line in heads)]
        rest = toctree([n for n in rooms if n not in seen])
        parts = f'# {folder}/', f'> {floors[folder]}', '\n'.join(table), rest
        texts[f'{folder}/index'] = '\n\n'.join(parts) + '\n'
    return '\n\n'.join(front), toctree(list(texts)), texts


# ---- the site

GONE = """---
orphan: true
---
# This page is not here

It may have moved. [The landing page](index.md) shows the way, and the search beside it finds words.
"""


def write_pages():
    "Markdown of all pages in `_proc`."
    front, floors, texts = sides()
    shutil.rmtree(PROC, ignore_errors=True)
    for path in notebooks():
        texts[page(path)] = page_text(path)
    texts['index'] += f'\n{front}\n'
    texts['reference'] += f'\n{floors}\n'
    for name in ('CONTRIBUTING', 'CHANGELOG'):
        texts[name] = relinked((ROOT / f'{name}.md').read_text().replace('](nbs/', ']('), name)
    texts['404'] = GONE
    for name, text in texts.items():
        path = PROC / f'{name}.md'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    static = PROC / '_static'
    static.mkdir()
    shutil.copy(ROOT / 'scripts' / 'site.css', static)
    package = Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent
    shutil.copy(package / 'static' / 'mathjax' / 'tex-svg.js', static)


def settings():
    return dict(
        project=CFG['title'],
        author=CFG['author'],
        release=CFG['version'],
        project_copyright=CFG['copyright'],
        extensions=['myst_parser', 'sphinx.ext.mathjax'],
        myst_enable_extensions=['dollarmath', 'amsmath'],
        myst_heading_anchors=4,
        myst_dmath_double_inline=True,
        exclude_patterns=['_static'],
        mathjax_path='tex-svg.js',
        smartquotes=False,  # a string in quotes stays as it is typed
        html_theme='furo',
        html_title=CFG['title'],
        html_static_path=[str(PROC / '_static')],
        html_css_files=['site.css'],
        html_copy_source=False,
        html_show_sphinx=False,
        html_baseurl=f'{CFG["doc_host"]}{CFG["doc_baseurl"]}/',
        python_maximum_signature_line_length=88,
        python_use_unqualified_type_names=True,
        add_module_names=False,
        toc_object_entries_show_parents='hide',
        suppress_warnings=['ref.python'],  # types in signatures that two modules have
    )


def some(names):
    "Settings for these pages alone, where links to others lead nowhere."
    pages = [f'{name}.md' for name in ('index', '404', *names)]
    missed = ['ref.python', 'toc', 'myst.xref_missing']
    return dict(include_patterns=pages, suppress_warnings=missed)


def link_names(app, doctree):
    "A name of the library in the text becomes a link to it, where only one thing has that name."
    from docutils import nodes
    from sphinx.addnodes import pending_xref

    for node in list(doctree.findall(nodes.literal)):
        name = node.astext().removesuffix('()')
        plain = isinstance(node.parent, (nodes.title, nodes.reference, pending_xref))
        if name in app.own_names and not plain:
            to = dict(reftype='obj', reftarget=app.own_names[name], refexplicit=True)
            ref = pending_xref('', node.deepcopy(), refdomain='py', refdoc=app.env.docname, **to)
            node.replace_self(ref)


def own_names():
    "{name: full name} of what pages export, names that two modules have left out."
    entry = re.compile(r'^`+\{py:(?:class|function)\} (\w+).*\n:module: (\S+)', re.M)
    found = {}
    for path in PROC.rglob('*.md'):
        for name, module in entry.findall(path.read_text()):
            found.setdefault(name, []).append(f'{module}.{name}')
    return {name: full[0] for name, full in found.items() if len(full) == 1}


def build(only=()):
    "Pages of `_proc` as HTML in `_docs`, all or the landing page and some; the number of warnings."
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    with docutils_namespace():
        app = Sphinx(
            srcdir=PROC,
            confdir=None,
            outdir=DOCS,
            doctreedir=PROC / '.doctrees',
            buildername='html',
            confoverrides=settings() | (some(only) if only else {}),
            status=None,
            parallel=2,
            freshenv=True,
        )
        app.own_names = own_names()
        app.connect('doctree-read', link_names)
        app.build()
    found = DOCS / '404.html'  # is shown for addresses of any depth
    base = f'<base href="{CFG["doc_baseurl"]}/">'
    found.write_text(found.read_text().replace('<head>', f'<head>{base}', 1))
    return app._warncount


class Server(SimpleHTTPRequestHandler):
    "`_docs` where it will stand: below `doc_baseurl`, with its own page for what is not there."

    def do_GET(self):
        base = CFG['doc_baseurl']
        if not self.path.startswith(f'{base}/'):
            self.send_response(302)
            self.send_header('Location', f'{base}/')
            return self.end_headers()
        self.path = self.path.removeprefix(base)
        super().do_GET()

    def send_error(self, code, *rest):
        body = (DOCS / '404.html').read_bytes()
        self.send_response(code)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.end_headers()
        self.wfile.write(body)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('pages', nargs='*', help='pages such as methods/10_sce; none: all')
    parser.add_argument('--serve', type=int, nargs='?', const=8000, help='show _docs on a port')
    args = parser.parse_args()
    if args.serve is not None:
        print(f'http://localhost:{args.serve}{CFG["doc_baseurl"]}/ (Ctrl+C ends)', flush=True)
        handler = partial(Server, directory=DOCS)
        return ThreadingHTTPServer(('localhost', args.serve), handler).serve_forever()
    shutil.rmtree(DOCS, ignore_errors=True)
    write_pages()
    if wrong := build(args.pages):
        sys.exit(f'{wrong} warnings: see above')
    print(f'{len(list(DOCS.rglob("*.html")))} pages: open _docs/index.html, or make docs-serve')


if __name__ == '__main__':
    main()

"The site: all notebooks as Markdown, some pages built and looked at, and faults that are found."

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings('ignore:.*MystReferenceResolver')  # myst-parser's
PAGES = 'methods/10_sce', 'ground/03_text', 'reference'


def script(name):
    sys.path.insert(0, str(ROOT / 'scripts'))
    spec = importlib.util.spec_from_file_location(name, ROOT / 'scripts' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_site = script('check_site')


@pytest.fixture(scope='module')
def docs(tmp_path_factory):
    "scripts/docs.py, which writes elsewhere; the Markdown of all pages is there."
    module = script('docs')
    folder = tmp_path_factory.mktemp('site')
    module.PROC, module.DOCS = folder / 'proc', folder / 'docs'
    module.write_pages()
    return module


def test_every_notebook_is_a_page_and_every_page_is_in_a_list(docs):
    names = {p.relative_to(docs.PROC).with_suffix('').as_posix() for p in docs.PROC.rglob('*.md')}
    assert {docs.page(p) for p in docs.notebooks()} < names
    lists = [
        m[1]
        for p in docs.PROC.rglob('*.md')
        for m in re.finditer(r'^```\{toctree\}\n(.*?)^```', p.read_text(), re.M | re.S)
    ]
    listed = re.findall(r'^(?:.* <)?/?(\w[\w/]*)>?$', '\n'.join(lists), re.M)
    assert sorted(listed) == sorted({*names, 'genindex'} - {'index', '404'})


def test_no_link_of_a_page_is_dead(docs):
    faults = []
    for page in docs.PROC.rglob('*.md'):
        text = docs.FENCED.sub('', page.read_text())
        for path, _ in docs.LINK.findall(text):
            to = docs.PROC / path[1:] if path[0] == '/' else page.parent / path
            faults += [] if to.exists() else [f'{page.name}: {path}']
        for path in re.findall(rf'\]\({docs.SOURCE}/([^)#]+)', text):
            faults += [] if (ROOT / path).exists() else [f'{page.name}: {path}']
    assert not faults, '\n'.join(faults)


def test_pages_are_built_and_nothing_is_wrong_with_them(docs):
    assert docs.build(PAGES) == 0
    found, pages = check_site.check(docs.DOCS, docs.SOURCE)
    away = re.compile('links to .* which is not there$')  # pages that were left out
    assert not (faults := [f for f in found if not away.search(f)]), '\n'.join(faults)
    sce = pages['methods/10_sce.html']
    assert sce.formulas > 20 and len(sce.images) > 2 and sce.title.startswith('SCE: ')
    assert {'ssl_patch.methods.sce.sce', 'ssl_patch.methods.sce.SCELoss.chance'} <= sce.ids
    assert '../_static/tex-svg.js' in [part.partition('?')[0] for part in sce.parts]
    lines = (ROOT / 'ssl_patch' / 'methods' / 'sce.py').read_text().splitlines()
    (first,) = {m[1] for m in map(re.compile(r'sce\.py#L(\d+)-').search, sce.links) if m} & {
        str(i) for i, line in enumerate(lines, 1) if line.startswith('def sce(')
    }
    assert int(first) > 1
    assert (docs.DOCS / 'searchindex.js').exists()
    assert '<base href="/ssl_patch/">' in (docs.DOCS / '404.html').read_text()


def test_a_cell_becomes_what_it_showed(docs, tmp_path):
    def code(source, *outputs):
        return dict(cell_type='code', source=source, outputs=outputs)

    said = dict(output_type='stream', name='stdout', text=['```\n', '<b> $x$\n'])
    html = dict(output_type='display_data', data={'text/html': '<i>1</i>'})
    picture = dict(output_type='display_data', data={'image/png': 'aGk='})
    prose = dict(cell_type='markdown', source='# A\n\nSee [b](b.ipynb#c). A **cat** of `size` 3:')
    cells = [prose, code('#| hide\nx'), code('#| echo: false\ny', said), code('z', html, picture)]
    docs.NBS, kept = tmp_path, docs.NBS
    (tmp_path / 'a.ipynb').write_text(json.dumps(dict(cells=cells)))
    text = docs.page_text(tmp_path / 'a.ipynb')
    docs.NBS = kept
    assert '[b](b.md#c)' in text and 'x' not in text.split()
    assert '````{code-block} text\n:class: output\n\n```\n<b> $x$\n````' in text
    assert '```python\nz\n```' in text and '```{raw} html\n<i>1</i>\n```' in text
    assert text.endswith('![A cat of size 3:](a_3_1.png)\n') and '\ny' not in text
    assert (docs.PROC / 'a_3_1.png').read_bytes() == b'hi'


FAULTS = {
    '<a href="b.html">': 'links to b.html, which is not there',
    '<a href="#no">': 'links to #no: the page is there, the anchor is not',
    '<a href="https://git/x/nbs/no.ipynb">': 'links to nbs/no.ipynb of the repository, which is',
    '<a href="https://git/x/setup.py#L1-L9999">': 'the file is shorter',
    '<img src="no.png" alt="a cat">': 'needs no.png, which is not there',
    '<img src="a.html">': 'shows a.html without words',
    '<script src="https://cdn.org/x.js"></script>': 'fetches https://cdn.org/x.js from elsewhere',
    '<p>::: {.callout}</p>': 'has raw text',
    '<p>of $x_1$ here</p>': 'has raw text',
    '<p>see [that](there.md)</p>': 'has raw text',
    '<pre>#| export\nx</pre>': 'shows a directive of a cell',
    '<pre>Traceback (most recent call last):\n</pre>': 'shows an error of a cell',
}


@pytest.mark.parametrize('planted', FAULTS)
def test_a_planted_fault_is_found(planted, tmp_path):
    page = '<html><head><title>A</title></head><body><article>{}</article></body></html>'
    fine = '<a href="a.html#x" id="x">a</a> <code>#| $a$</code> <span class="math">\\(a\\)</span>'
    (tmp_path / 'a.html').write_text(page.format(fine))
    assert check_site.check(tmp_path, 'https://git/x')[0] == []
    (tmp_path / 'a.html').write_text(page.format(fine + planted))
    (found,) = check_site.check(tmp_path, 'https://git/x')[0]
    assert FAULTS[planted] in found
    (tmp_path / 'b.html').write_text(page.format(''))
    assert any('the same title' in f for f in check_site.check(tmp_path, 'https://git/x')[0])

"""Look at every page of the site, and say what is wrong. `make docs` calls it.

    python scripts/check_site.py              # links, pictures, titles, raw marks, errors
    python scripts/check_site.py --browser    # and every formula, in Chromium without a screen

A page has a title of its own; its links and their anchors lead somewhere, those into the
repository to lines that are there; its pictures exist and have words; nothing comes from elsewhere;
no directive, Markdown or formula is left raw; and no cell shows an error."""

import argparse
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
RAW = re.compile(
    r'#\| ?\w|:{3,}|`{3}|\]\(\S+\)|\{py:|\{code-block|\$[^\s$][^$]*\$|\\begin\{'
)  # of nbdev, Quarto, Markdown, MyST and TeX
ERROR = 'Traceback (most recent call last)'
FORMULA = re.compile(r'<mjx-container\b')
WRONG = re.compile(r'data-mjx-error="([^"]*)"|<mjx-merror|<merror')


class Page(HTMLParser):
    "What a page links to, names, shows and says."

    def __init__(self, text):
        super().__init__()
        self.links, self.parts, self.images, self.ids = [], [], [], set()
        self.title, self.said, self.shown, self.formulas = '', [], [], 0
        self.inside = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        classes = (a.get('class') or '').split()
        self.ids |= {a.get('id'), a.get('name')} - {None}
        if tag == 'a' and a.get('href'):
            self.links.append(a['href'])
        if (
            tag in ('img', 'script')
            and a.get('src')
            or tag == 'link'
            and a.get('rel') != 'canonical'
        ):
            self.parts.append(a.get('src') or a.get('href') or '')
        if tag == 'img':
            self.images.append(a)
        kind = 'math' if 'math' in classes and tag in ('span', 'div') else tag
        self.formulas += kind == 'math'
        if tag not in ('img', 'link', 'meta', 'br', 'hr', 'input', 'base', 'col'):
            self.inside.append((tag, kind))

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, text):
        kinds = {kind for _, kind in self.inside}
        if 'title' in kinds and 'svg' not in kinds:
            self.title += text
        elif 'pre' in kinds:
            self.shown.append(text)
        elif 'article' in kinds and not kinds & {'math', 'code', 'script', 'style'}:
            self.said.append(text)


def link_faults(name, page, pages, folder, source):
    for link in page.links:
        to = urlsplit(link)
        if link.startswith(f'{source}/'):
            yield from source_faults(link.removeprefix(f'{source}/'))
        if urlsplit(link).scheme or link == '#':
            continue
        path = (folder / name).parent / unquote(to.path) if to.path else folder / name
        there = path.resolve().relative_to(folder.resolve()).as_posix()
        if not path.is_file():
            yield f'links to {link}, which is not there'
        elif to.fragment and there in pages and unquote(to.fragment) not in pages[there].ids:
            yield f'links to {link}: the page is there, the anchor is not'


def source_faults(link):
    path, _, lines = link.partition('#')
    if not (ROOT / path).exists():
        yield f'links to {path} of the repository, which is not there'
    elif lines and int(lines.split('-L')[-1]) > len((ROOT / path).read_text().splitlines()):
        yield f'links to {link}: the file is shorter'


def page_faults(name, page, pages, folder, source):
    if not page.title.strip():
        yield 'has no title'
    base = folder if name == '404.html' else (folder / name).parent
    for part in page.parts:
        if urlsplit(part).scheme or part.startswith('//'):
            yield f'fetches {part} from elsewhere'
        elif part != '#' and not (base / unquote(urlsplit(part).path)).is_file():
            yield f'needs {part}, which is not there'
    if name != '404.html':
        yield from link_faults(name, page, pages, folder, source)
    yield from (f'shows {i["src"]} without words' for i in page.images if not i.get('alt'))
    yield from (f'has raw text: {m[0]!r}' for m in RAW.finditer(''.join(page.said)))
    if ERROR in ''.join(page.shown):
        yield 'shows an error of a cell'
    if any(re.match(r'^#\| ?(export|hide|echo)', t) for t in page.shown):
        yield 'shows a directive of a cell'


def check(folder, source):  # where pages lie, and where their repository is
    "(sentences that say what is wrong, {name: page}) of all pages of a folder."
    files = [p for p in sorted(folder.rglob('*.html')) if '_static' not in p.parts]
    pages = {p.relative_to(folder).as_posix(): Page(p.read_text()) for p in files}
    found = [
        f'{name} {fault}'
        for name, page in pages.items()
        for fault in page_faults(name, page, pages, folder, source)
    ]
    titles = {}
    for name, page in pages.items():
        titles.setdefault(page.title, []).append(name)
    found += [f'{", ".join(n)} have the same title {t!r}' for t, n in titles.items() if len(n) > 1]
    return found, pages


def formula_faults(folder, pages, browser):
    "What a browser makes of each formula: none is left as it is typed, none is refused."
    for name, page in pages.items():
        if page.formulas:
            words = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom']
            words += ['--virtual-time-budget=20000', (folder / name).resolve().as_uri()]
            shown = subprocess.run(words, capture_output=True, text=True, timeout=300).stdout
            drawn = len(FORMULA.findall(shown))
            if drawn != page.formulas:
                yield f'{name} draws {drawn} of its {page.formulas} formulas'
            yield from (f'{name} has a formula that fails: {m[1]}' for m in WRONG.finditer(shown))


def main():
    from docs import DOCS, SOURCE

    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--browser', action='store_true', help='draw every formula in Chromium')
    args = parser.parse_args()
    found, pages = check(DOCS, SOURCE)
    if args.browser:
        names = 'chromium', 'chromium-browser', 'google-chrome'
        browser = next(filter(None, map(shutil.which, names)), None)
        found += formula_faults(DOCS, pages, browser) if browser else ['no Chromium is installed']
    links = sum(len(p.links) for p in pages.values())
    pictures = sum(len(p.images) for p in pages.values())
    formulas = sum(p.formulas for p in pages.values())
    print(f'{len(pages)} pages, {links} links, {pictures} pictures, {formulas} formulas')
    if found:
        sys.exit('\n'.join(found))


if __name__ == '__main__':
    main()

"""Write README.md from nbs/index.ipynb: markdown cells as they are, shown code as code, pictures of
outputs as files beside the notebook."""

import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NBS = ROOT / 'nbs'
LINE = '<!-- Written by scripts/readme.py from nbs/index.ipynb: edit there. -->'


def merged(outputs):
    "Printed lines that a kernel sent in several pieces, in one."
    out = []
    for o in outputs:
        if out and o.get('output_type') == out[-1].get('output_type') == 'stream':
            out[-1] = {**o, 'text': [*out[-1]['text'], *o['text']]}
        else:
            out.append(o)
    return out


def from_the_root(text):
    "Links to notebooks as they are from the folder above."
    down = re.sub(r'\]\((?!http|#|\.\./)([\w/]+\.ipynb)', r'](nbs/\1', text)
    return down.replace('](../', '](')


def picture(number, kind, content, words):
    "A picture as a file, written only where it has changed."
    path = NBS / 'images' / f'index_{number}.{kind}'
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)
    return f'![{words}](nbs/images/{path.name})'


def output_text(number, output, words=''):
    data = output.get('data', {})
    for kind in ('png', 'jpeg'):
        if f'image/{kind}' in data:
            return picture(number, kind, base64.b64decode(''.join(data[f'image/{kind}'])), words)
    if 'text/markdown' in data:
        return from_the_root(''.join(data['text/markdown']))
    if 'text/plain' in data:
        return '```\n' + ''.join(data['text/plain']) + '\n```'
    if output.get('output_type') == 'stream':
        return '```\n' + ''.join(output['text']).rstrip() + '\n```'


def cell_text(number, cell):
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        return from_the_root(source)
    if source.startswith('#| hide'):
        return ''
    words = re.search(r'^#\| fig-alt: (.*)$', source, re.M)  # of a picture, for who cannot see it
    words = words[1] if words else ''
    parts = [output_text(number, o, words) for o in merged(cell.get('outputs', []))]
    if source and '#| echo: false' not in source:
        code = re.sub(r'^#\|.*\n', '', source, flags=re.M).strip()
        parts.insert(0, f'```python\n{code}\n```')
    return '\n\n'.join(filter(None, parts))


def main():
    cells = json.loads((NBS / 'index.ipynb').read_text())['cells']
    texts = (cell_text(i, c) for i, c in enumerate(cells))
    head, _, rest = '\n\n'.join(filter(None, texts)).partition('\n')
    text = f'{head}\n\n{LINE}\n{rest}\n'
    (ROOT / 'README.md').write_text(text)
    for path in (NBS / 'images').glob('index_*.*'):
        if path.name not in text:  # of a cell that is gone
            path.unlink()


if __name__ == '__main__':
    main()

"Write README.md from nbs/index.ipynb: markdown cells as they are, shown code as code, pictures of outputs as files beside the notebook."
import base64, json, re
from pathlib import Path

root = Path(__file__).parent.parent

def merged(outputs):
    "Printed lines that a kernel sent in several pieces, in one."
    out = []
    for o in outputs:
        if out and o.get('output_type') == out[-1].get('output_type') == 'stream': out[-1] = {**o, 'text': [*out[-1]['text'], *o['text']]}
        else: out.append(o)
    return out

def cell_text(i, c):
    src = ''.join(c['source'])
    if c['cell_type'] == 'markdown': return re.sub(r'\]\((?!http|#|\.\./)([\w/]+\.ipynb)', r'](nbs/\1', src).replace('](../', '](')
    if src.startswith('#| hide'): return ''
    parts = ['```python\n' + re.sub(r'^#\|.*\n', '', src, flags=re.M).strip() + '\n```'] if src and '#| echo: false' not in src else []
    for o in merged(c.get('outputs', [])):
        data = o.get('data', {})
        if 'image/png' in data:
            path = root/'nbs'/'images'/f'index_{i}.png'; path.parent.mkdir(exist_ok=True)
            png = base64.b64decode(''.join(data['image/png']))
            if not path.exists() or path.read_bytes() != png: path.write_bytes(png)
            parts.append(f'![](nbs/images/{path.name})')
        elif 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
        elif 'text/plain' in data: parts.append('```\n' + ''.join(data['text/plain']) + '\n```')
        elif o.get('output_type') == 'stream': parts.append('```\n' + ''.join(o['text']).rstrip() + '\n```')
    return '\n\n'.join(parts)

cells = json.loads((root/'nbs'/'index.ipynb').read_text())['cells']
text = '\n\n'.join(t for i, c in enumerate(cells) if (t := cell_text(i, c)))
head, _, rest = text.partition('\n')
(root/'README.md').write_text(f'{head}\n\n<!-- Written by scripts/readme.py from nbs/index.ipynb: edit there. -->\n{rest}\n')

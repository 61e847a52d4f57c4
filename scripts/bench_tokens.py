"""What dropping patches saves: tokens, activation memory and time of one optimiser step of APS, beside the same step on all patches.

    python scripts/bench_tokens.py --out runs/bench_tokens.json

Every configuration is timed in turn, round after round, in one process; a ratio is the median over rounds of (all patches / kept patches) of the
same round, with the lowest and the highest. Memory is the sum of what autograd keeps for the backward pass, so it does not depend on the device.
"""
import argparse, json
from functools import partial
from pathlib import Path
import torch
from ssl_patch.encoders import vit
from ssl_patch.methods import APS, MoCoV3, step_cost
from ssl_patch.speed import in_turn
from ssl_patch.training import hardware, versions
from ssl_patch.views import make_view

SETTINGS = {'ViT-Tiny/2, 32 px': dict(name='tiny', size=32, patch=2), 'ViT-Small/16, 224 px': dict(name='small', size=224, patch=16)}

def rows(encoder):
    "Name of a row -> method; each has an encoder of its own."
    return {'all patches': APS(encoder(), patches=None), **{f'APS, s = {s:g}': APS(encoder(), ratio=s, draws=int(1/s)) for s in (.5, .25, .15)},
            'APS, s = 0.25, EMA target': APS(encoder(), momentum=.99), 'MoCo v3': MoCoV3(encoder())}

def one_step(method, opt, views, keeps):
    with torch.autocast(views[0].x.device.type, torch.bfloat16): loss, _ = method(views, keeps)
    opt.zero_grad(); loss.backward(); opt.step(); method.after_step()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batch-size', type=int, default=16)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    found = dict(hardware=hardware(a.device), threads=torch.get_num_threads(), versions=versions(), batch_size=a.batch_size, rounds=a.rounds, settings={})
    for title, shape in SETTINGS.items():
        torch.manual_seed(0)
        methods = {n: m.to(a.device).train() for n, m in rows(lambda: vit(**shape)).items()}
        for m in methods.values(): m.encoder.explicit_attention(a.device == 'cpu')
        x = torch.randint(0, 256, (a.batch_size, 3, 256, 256), dtype=torch.uint8)
        work = {}
        for n, m in methods.items():
            views = [make_view(x, r).to(a.device) for r in m.views]
            work[n] = (m, torch.optim.AdamW(m.parameters(), 1e-4), views, m.samples(views)[0])
        t = in_turn({n: partial(one_step, *w) for n, w in work.items()}, a.rounds, a.device)
        table = found['settings'][title] = {}
        for n, (m, _, views, _) in work.items():
            faster, low, high = t.ratio('all patches', n)
            table[n] = dict(**step_cost(m, views), seconds=t.median(n), faster=faster, faster_low=low, faster_high=high)
        full = table['all patches']['bytes']
        print(f'\n{title}, batch {a.batch_size}')
        for n, c in table.items():
            print(f"  {n:26} {c['online_tokens']:4} + {c['target_tokens']:3} tokens an image, {c['bytes']/2**20:7.0f} MiB ({full/c['bytes']:.1f}x less), "
                  f"{c['seconds']*1e3:6.0f} ms a step ({c['faster']:.1f}x faster, {c['faster_low']:.1f} to {c['faster_high']:.1f})", flush=True)
    if a.out: a.out.parent.mkdir(parents=True, exist_ok=True); a.out.write_text(json.dumps(found, indent=1)+'\n')

if __name__ == '__main__': main()

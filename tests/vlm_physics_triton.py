"""Runs the warp's Triton kernels in Triton's interpreter: TRITON_INTERPRET=1 python this.py.

A process of its own, because the interpreter must be chosen before Triton is imported. Prints JSON.
"""

from __future__ import annotations

import json

import torch
from readrun import chapter
from scipy import stats

q = chapter("vlm_physics")


def main() -> None:
    (b, c, h, w), gen = (2, 17, 6, 11), torch.Generator().manual_seed(0)
    noise, weight = torch.randn(b, c, h, w, generator=gen), torch.rand(b, 1, h, w, generator=gen) + 0.5
    flow = torch.randn(b, 2, h, w, generator=gen) * 1.5
    ys, xs = torch.meshgrid(torch.arange(h) - h / 2, torch.arange(w) - w / 2, indexing="ij")
    flow[1] = torch.stack([xs, ys]) / 2  # a zoom: many sources are split
    found, mass = q.warp_noise_step(noise, weight, flow, gen, "lists")
    plain, plain_mass = q.warp_noise_step(noise, weight, flow, gen, "index")
    other, _ = q.warp_noise_step(noise, weight, flow, gen, "lists")
    source, target = q.flow_lists(flow)
    uses, arrivals = torch.bincount(source, minlength=b * (h * w + 1)), torch.bincount(target)
    blank = source % (h * w + 1) == h * w
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (found.flatten(2), plain.flatten(2), other.flatten(2))]
    fixed = torch.ones(b * h * w, dtype=torch.bool).index_fill_(0, target[(uses[source] > 1) | blank], False)
    alone = arrivals[target] == 1
    out = dict(
        mass=(mass - plain_mass).abs().max().item(), fixed=(rows[0] - rows[1])[fixed].abs().max().item(),
        fixed_count=int(fixed.sum()), repeats=(rows[0] == rows[2])[~fixed].float().mean().item(),
    )  # fmt: skip
    padded = torch.cat([noise.flatten(2), torch.zeros(b, c, 1)], 2).transpose(1, 2).flatten(0, 1)
    errors, pairs = [], []
    for s in (uses > 1).nonzero()[:, 0].tolist():
        mine = (source == s) & ~blank
        if mine.any() and alone[mine].all():
            copies = rows[0][target[mine]]
            errors.append((copies.sum(0) / uses[s] ** 0.5 - padded[s]).abs().max().item())
            pairs.append(copies[:2])
    first, second = torch.stack(pairs).transpose(0, 1).flatten(1)
    fresh = rows[0][target[blank & alone]]
    out |= dict(
        split=max(errors), sources=len(errors),
        copies=float(torch.corrcoef(torch.stack([first, second]))[0, 1]),
        fresh=stats.kstest(fresh.flatten().numpy(), "norm").pvalue.item(), fresh_count=fresh.numel(),
        across=float(torch.corrcoef(fresh.T).tril(-1).abs().max() * len(fresh) ** 0.5),
    )  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    main()

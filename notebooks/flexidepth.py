# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # FlexiDepth: how deep must a token think?
#
# Xuan Luo, Weizhi Wang and Xifeng Yan, *Adaptive Layer-Skipping in Pre-trained LLMs* (2025),
# [arXiv 2503.23798](https://arxiv.org/abs/2503.23798). Official code:
# [luoxuan-cs/Flexidepth](https://github.com/luoxuan-cs/Flexidepth).
#
# :::{admonition} The idea in three sentences
# :class: tip
# A language model spends the same number of layers on copying a digit as on computing one. FlexiDepth
# freezes a trained Llama and gives each layer of its upper half two small new parts: a *router* that decides
# for every token whether the layer runs, and an *adapter*, a sixteenth as wide as the layer's feed-forward
# network (FFN), that stands in where it does not. A token that skips a layer still leaves its key and value
# there, so that later tokens can attend to it.
#
# **You need to know** what a {term}`KV cache` is, and how to read an {term}`interval` over {term}`seed`s.
# Symbols are in [Notation](../notation.md).
#
# **You will run** the layer on the real `LlamaForCausalLM`, exactly; a training that teaches routers when to
# skip, against three ways of skipping without thinking; and what the paper leaves open: the paper saves
# operations but no time, and this chapter turns the same masks into time with GPU kernels that look at the
# mask before they read a weight.
#
# **It costs** seconds in `smoke`, under two minutes on one core in `cpu`; the `gpu` run is described below.
# :::

# %% tags=["parameters", "hide-input"]
profile = ""  # smoke | cpu | gpu; "" means $READRUN_PROFILE, else cpu
seed = 0  # first seed
seeds = 0  # how many seeds; 0: the profile's own number
device = "auto"  # auto | cpu | cuda
checkpoint = ""  # hub id or folder of a Llama or FlexiDepth checkpoint of your own
only = ""  # patterns of units to compute; "": all; "none": draw from saved units
out = ""  # folder for this run's files; "": build/flexidepth/<profile>/live

# %% tags=["hide-input"]
import copy
import functools
import gc
import hashlib
import json
import math
import os
import string
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import readrun
import torch
import torch.nn.functional as F
from IPython.display import display
from readrun import attempts, corpus, decode, graphed, lm, picker, plots, replay, sanitizer, tables
from readrun import bench as clock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, StaticLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

run = readrun.start(
    "flexidepth", profile=profile, seed=seed, seeds=seeds, device=device, checkpoint=checkpoint, only=only,
    out=out,
)  # fmt: skip
plots.style()
disable_progress_bar()
set_verbosity_error()  # router tensors are loaded after transformers has seen the rest


# %% [markdown]
# ## The idea in a picture
#
# What does a token cost in one layer of Llama-3-8B? Almost everything is the FFN. A skipped token pays only
# for its key and value and for the adapter.

# %% tags=["figure", "hide-input"]
WIDTH, INNER, HEAD, KV_HEADS, ADAPTER = 4096, 14336, 128, 8, 14336 // 16  # Llama-3-8B
KV = 2e-6 * WIDTH * KV_HEADS * HEAD  # millions of multiply-adds per token
PARTS = {"query, output": (2e-6 * WIDTH**2, 0.0), "key, value": (KV, KV),
         "FFN": (3e-6 * WIDTH * INNER, 0.0), "adapter": (0.0, 3e-6 * WIDTH * ADAPTER)}  # fmt: skip
figure, ax = plt.subplots(figsize=(7.0, 2.2))
left = np.zeros(2)
for (name, values), style in zip(PARTS.items(), plots.arms(list(PARTS)).values(), strict=True):
    ax.barh([0, 1], values, left=left, color=style["color"], label=name)
    left += values
ax.set_yticks([0, 1], ["layer runs", "layer skipped"])
ax.invert_yaxis()
ax.legend(ncols=4, fontsize=9, loc="lower right")
plots.label(ax, "multiply-adds per token and layer (millions)", "decision")
plots.show(
    figure,
    alt=f"Two bars: a layer that runs costs {left[0]:.0f} million multiply-adds per token, of which "
    f"the FFN is {PARTS['FFN'][0]:.0f}. A skipped layer: {left[1]:.0f} million, keys, values and adapter.",
    caption=f"Llama-3-8B: a layer that runs costs {left[0] / left[1]:.0f} times as much as a skipped one. "
    "Its key and value are written all the same. (The router's one to two million are not drawn.)",
)

# %% [markdown]
# ## Set-up
#
# One code path, three sizes; the active profile is in bold. All claims and the rules that decide them were
# written into `data/papers/flexidepth.yml` before the first experiment.

# %% tags=["hide-input"]
S = run.settings(
    smoke=dict(
        seeds=1, arms=["flexidepth", "static_adapter"], ablations=[], alphas=[0.016], from_checkpoint=True,
        size=dict(width=96, depth=8, heads=4, num_key_value_heads=2, intermediate_size=256),
        shape=dict(numbers=3, terms=[2, 2], digits=2, letters=5, prose=[10, 20]),
        mix=dict(repeat=1, copy=1, phrase=1, max=1, add=1, mul=1, prose=1),
        pretrain=dict(steps=4, batch=16, lr=3e-3, pool=200, length=32),
        routers=dict(steps=4, batch=16, lr=3e-3, pool=200, length=32, reduction=16),
        evaluate=dict(items=8, new_tokens=24, removed=1), taus=[0.5],
        speed=dict(width=64, depth=4, heads=4, kv_heads=2, ffn=192, vocab=128, repeats=3, warmup=1,
                   contexts=[16], batches=[1, 2], long=[2, 24], prefill=[2, 16], tiny=True),
    ),
    cpu=dict(
        seeds=1, arms=["flexidepth", "static_adapter"], ablations=[], alphas=[0.016], from_checkpoint=True,
        size=dict(width=96, depth=8, heads=4, num_key_value_heads=2, intermediate_size=256),
        shape=dict(numbers=3, terms=[2, 2], digits=2, letters=5, prose=[10, 20]),
        mix=dict(repeat=3, copy=3, phrase=1, max=2, add=8, mul=5, prose=3),
        pretrain=dict(steps=0, batch=48, lr=3e-3, pool=100, length=32),
        routers=dict(steps=180, batch=32, lr=3e-3, pool=6000, length=32, reduction=16),
        evaluate=dict(items=64, new_tokens=24, removed=3), taus=[0.3, 0.5, 0.7],
        speed=dict(width=64, depth=4, heads=4, kv_heads=2, ffn=192, vocab=128, repeats=5, warmup=2,
                   contexts=[16], batches=[1, 2], long=[2, 24], prefill=[2, 16], tiny=True),
    ),
    gpu=dict(
        seeds=3, arms=["flexidepth", "static_adapter", "random_adapter"],
        ablations=["linear_router", "no_kv", "no_adapter"], alphas=[1e-3, 4e-3, 16e-3], from_checkpoint=False,
        size=dict(width=256, depth=16, heads=8, num_key_value_heads=4, intermediate_size=704),
        shape=dict(numbers=5, terms=[2, 4], digits=3, letters=8, prose=[16, 32]),
        mix=dict(repeat=2, copy=2, phrase=1, max=2, add=9, mul=6, prose=2),
        pretrain=dict(steps=2500, batch=640, lr=1e-3, pool=300_000, length=49, short=20),
        routers=dict(steps=500, batch=640, lr=1e-3, pool=60_000, length=49, reduction=16),
        evaluate=dict(items=512, new_tokens=34, removed=8), taus=[0.3, 0.5, 0.7],
        speed=dict(width=4096, depth=32, heads=32, kv_heads=8, ffn=14336, vocab=128256, repeats=100,
                   warmup=20, contexts=[512, 4096], batches=[1, 2, 4, 8, 16, 64], long=[64, 4096],
                   prefill=[4, 2048], tiny=False),
    ),
)  # fmt: skip
S

# %% [markdown]
# ## The algorithm
#
# ### Step 1: a router with one number per token
#
# Let $x_t\in\mathbb R^d$ be the state of token $t$ before a layer and $n_t$ the same after the layer's own,
# frozen input normalisation. The router squeezes $n_t$ into $r=d/16$ numbers, normalises them (RMSNorm),
# bends them and reads off one score:
#
# $$
# u_t=\tanh\bigl(\operatorname{RMSNorm}_r(W_{\text{enc}}\,n_t)\bigr),\qquad
# g_t=\sigma\bigl(w_{\text{head}}^\top W_{\text{dec}}\,u_t\bigr)\in(0,1) .
# $$
#
# It has no biases. Between $W_{\text{dec}}$ ($d\times r$) and $w_{\text{head}}$ there is no non-linearity, so
# that at inference both are one vector $w=W_{\text{dec}}^\top w_{\text{head}}$ of $r$ numbers: half of the
# router disappears.


# %%
class Router(nn.Module):
    """Gate logits of one layer from its normalised input, (B, T, d) -> (B, T, 1)."""

    def __init__(self, dim: int, reduction: int = 16, eps: float = 1e-5) -> None:
        super().__init__()
        width = dim // reduction
        self.router_enc = nn.Linear(dim, width, bias=False)
        self.router_norm = LlamaRMSNorm(width, eps)
        self.router_dec = nn.Linear(width, dim, bias=False)
        self.router_head = nn.Linear(dim, 1, bias=False)

    def forward(self, n: Tensor) -> Tensor:
        u = torch.tanh(self.router_norm(self.router_enc(n)))
        return self.router_head(self.router_dec(u))

    def collapse(self) -> Tensor:
        """w (r,) with head(dec(u)) = w . u."""
        return (self.router_head.weight @ self.router_dec.weight)[0]


# %%
# NBVAL_CHECK_OUTPUT
toy = Router(4, 2, eps=0.0).double()
for weight, values in (
    (toy.router_enc, [[3, 0, 0, 0], [0, 4, 0, 0]]),
    (toy.router_dec, [[1, 0], [0, 1], [1, 1], [0, 0]]),
    (toy.router_head, [[1, 2, 1, 5]]),
):
    weight.weight.data = torch.tensor(values, dtype=torch.float64)
token = torch.ones(1, 1, 4, dtype=torch.float64)
print("w =", [round(v, 4) for v in toy.collapse().tolist()])
print(f"logit {toy(token).item():.4f}, gate {torch.sigmoid(toy(token)).item():.4f}")

# %% [markdown]
# :::{dropdown} Where these numbers come from
# $w_1=1\cdot1+1\cdot1=2$ (rows 1 and 3 of $W_{\text{dec}}$ have a 1 in column 1), $w_2=2\cdot1+1\cdot1=3$.
# $W_{\text{enc}}n=(3,4)$ has mean square $12.5$, so that RMSNorm gives $(3,4)/3.5355=(0.8485,1.1314)$; the
# hyperbolic tangents are $0.6903$ and $0.8115$. The logit is $2\cdot0.6903+3\cdot0.8115=3.815$, the gate
# $1/(1+e^{-3.815})=0.978$.
# :::
#
# ### Step 2: a small stand-in for the FFN
#
# A skipped token must still land where later layers expect it. The adapter is a SwiGLU like the FFN, a
# sixteenth as wide. In the released weights the two input matrices are called `gate_proj` and `down_proj`,
# the output `up_proj`; the chapter keeps these names so that those weights load.


# %%
class Adapter(nn.Module):
    """up(silu(gate(y)) * down(y)), (..., d) -> (..., d), inner width f / reduction."""

    def __init__(self, dim: int, ffn: int, reduction: int = 16) -> None:
        super().__init__()
        width = ffn // reduction
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(width, dim, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.up_proj(F.silu(self.gate_proj(y)) * self.down_proj(y))


# %% [markdown]
# ### Step 3: the layer
#
# The decision is hard, $m_t=\mathbf 1[g_t>\tau]$ with $\tau=\tfrac12$: no sampling, no straight-through
# trick. *Every* token writes its key and value. Only tokens with $m_t=1$ ask: their attention output is
# added, as it is. Then the FFN or the adapter, and only there the gate enters as a factor:
#
# $$
# h_t=x_t+m_t\operatorname{Attn}_t,\qquad y_t=\operatorname{Norm}(h_t),\qquad
# x_t'=h_t+m_t\,g_t\operatorname{FFN}(y_t)+(1-m_t)(1-g_t)\operatorname{Adapter}(y_t) .
# $$
#
# The factors $g_t$ and $1-g_t$ stay at inference. They are the only path by which the language-model loss
# reaches the router: without them $\partial L/\partial g_t$ is zero.
#
# `FlexiDecoderLayer` is the reference: it computes everything and masks. It knows how to be forced
# (`force_mask`, for baselines and timing), and carries the ablations of the experiment.


# %%
def route(layer, n: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, mask) of a layer for its normalised inputs (B, T, d), both (B, T, 1). Raises ValueError."""
    if layer.shuffle:
        n = n.flatten(0, 1)[torch.randperm(n.shape[0] * n.shape[1], device=n.device)].view_as(n)
    gate = torch.sigmoid(layer.router(n).float()).to(n.dtype)
    mask = gate > layer.tau
    if layer.force_mask is not None:
        forced = layer.force_mask
        forced = forced(n.shape[:2], n.device) if callable(forced) else forced
        if forced.shape != n.shape[:2]:
            raise ValueError(f"force_mask has shape {tuple(forced.shape)}, not {tuple(n.shape[:2])}")
        mask = forced[..., None].bool()
        gate = mask.to(n.dtype) if layer.force_gate else gate
    layer.last_gate, layer.last_mask = gate[..., 0], mask[..., 0]
    return gate, mask


# %%
class FlexiDecoderLayer(LlamaDecoderLayer):
    """A Llama layer that each token runs or skips (section 3 of the paper), in masked form.

    tau: threshold. last_gate: gates (B, T) of the last call, with gradient. force_mask: (B, T) bool, or a
    function of (shape, device), instead of the decisions; force_gate: with it, the gate is 1 where the mask
    is and 0 elsewhere. Ablations: hide_skipped (keys and values of skipped tokens are invisible here),
    shuffle (router inputs permuted between tokens).
    """

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        reduction = config.router_reduction_factor
        self.router: nn.Module = Router(config.hidden_size, reduction, config.rms_norm_eps)
        self.router_proj: nn.Module | None = Adapter(
            config.hidden_size, config.intermediate_size, config.proj_reduction_factor
        )
        self.tau, self.hide_skipped, self.shuffle, self.force_gate = 0.5, False, False, False
        self.last_gate: Tensor | None = None
        self.last_mask: Tensor | None = None
        self.force_mask: Any = None

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None,
                use_cache=False, position_embeddings=None, **kwargs):  # fmt: skip
        x = hidden_states
        n = self.input_layernorm(x)
        gate, mask = route(self, n)
        if self.hide_skipped:
            attention_mask = visible_only(attention_mask, mask[..., 0], past_key_values)
        attention, _ = self.self_attn(
            hidden_states=n, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings,
            **kwargs,
        )  # fmt: skip
        h = torch.where(mask, x + attention, x)
        y = self.post_attention_layernorm(h)
        skipped = (1 - gate) * self.router_proj(y) if self.router_proj is not None else torch.zeros_like(h)
        return h + torch.where(mask, gate * self.mlp(y), skipped)


# %% tags=["hide-input"]
def visible_only(attention_mask: Tensor | None, mask: Tensor, cache: Any) -> Tensor:
    """Attention mask (B, 1, T, T) in which only tokens that run this layer can be seen, besides oneself."""
    if cache is not None:
        raise ValueError("hide_skipped needs use_cache=False: it masks keys of the whole sequence")
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()[None, None]
    if attention_mask is not None:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    return (seen & mask[:, None, None, :]) | itself


class LinearRouter(nn.Linear):
    """Ablation: one linear map instead of the bottleneck."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1, bias=False)


# %% [markdown]
# ### Step 4: convert a model
#
# Only the upper half is routed: the first layers build what all tokens need. `convert` works on any
# `LlamaForCausalLM` and freezes everything but routers and adapters.


# %%
def convert(model, layers: Sequence[int] | None = None, reduction: int = 16):
    """Give `model` (a LlamaForCausalLM, changed in place) routers and adapters; freeze the rest.

    layers: indices of the layers to route, default the upper half. Raises ValueError for an index out of
    range or given twice, a reduction that does not divide the widths, and a model that is converted already.
    """
    config, stack = model.config, model.model.layers
    layers = list(range(len(stack) // 2, len(stack))) if layers is None else list(layers)
    if any(isinstance(layer, FlexiDecoderLayer) for layer in stack):
        raise ValueError("model: it is converted already")
    if len(set(layers)) != len(layers) or not all(0 <= i < len(stack) for i in layers):
        raise ValueError(f"layers={layers}: different indices from 0 to {len(stack) - 1} are accepted")
    if reduction < 1 or config.hidden_size % reduction or config.intermediate_size % reduction:
        widths = f"hidden_size={config.hidden_size} and intermediate_size={config.intermediate_size}"
        raise ValueError(f"reduction={reduction} must divide {widths}")
    config.routing_layers, config.router_reduction_factor = layers, reduction
    config.proj_reduction_factor = reduction
    model.requires_grad_(False)
    weight = next(model.parameters())
    for i in layers:
        with torch.device("meta"):  # the frozen weights are shared, not copied
            new = FlexiDecoderLayer(config, i)
        new.load_state_dict(stack[i].state_dict(), strict=False, assign=True)
        new.requires_grad_(False)
        new.router = Router(config.hidden_size, reduction, config.rms_norm_eps)
        new.router_proj = Adapter(config.hidden_size, config.intermediate_size, reduction)
        for part in (new.router, new.router_proj):
            part.to(weight.device, weight.dtype)
        stack[i] = new
    return model.eval()  # no dropout in frozen parts; routers and adapters have none


def routed(model) -> list[FlexiDecoderLayer]:
    """The routed layers of a model, from the lowest."""
    return [layer for layer in model.model.layers if isinstance(layer, FlexiDecoderLayer)]


# %% [markdown]
# With all layers forced to run and $g=1$ the converted model *is* the old one, to the last bit; with all
# forced to skip it is not:

# %%
# NBVAL_CHECK_OUTPUT
toy_config = LlamaConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
toy_llama, toy_ids = lm.causal_lm(toy_config, 0).eval(), torch.arange(8)[None]
toy_flexi = convert(copy.deepcopy(toy_llama))
for answer in (True, False):
    for layer in routed(toy_flexi):
        layer.force_mask, layer.force_gate = torch.full((1, 8), answer), True
    with torch.no_grad():
        same = torch.equal(toy_flexi(toy_ids).logits, toy_llama(toy_ids).logits)
    print(f"all {'run ' if answer else 'skip'}: same logits {same}")
print("routed layers", toy_flexi.config.routing_layers)

# %% [markdown]
# ### Step 5: a price for depth
#
# The loss is $L=L_{\text{lm}}+\alpha L_{\text{skip}}$ with
#
# $$
# L_{\text{skip}}=\operatorname{mean}_t\Bigl(\sum_{l\ \text{routed}} g_{l,t}\Bigr)^{2}
# $$
#
# over real tokens (no padding), on the soft gates, not on the decisions. Squaring after the sum over layers
# makes the next layer dearer for a token that already uses many.


# %%
def skip_loss(gates: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of the squared sum of gates (routed layers, B, T); mask (B, T): tokens that count.

    Raises ValueError for unequal shapes. With accumulation over k batches divide it by k, like the loss.
    """
    if gates.ndim != 3 or gates.shape[1:] != mask.shape:
        raise ValueError(f"gates {tuple(gates.shape)} and mask {tuple(mask.shape)}: (L, B, T) and (B, T)")
    squares = gates.float().sum(0).square()
    return (squares * mask).sum() / mask.sum()


def layers_used(gates: Tensor, tau: float = 0.5) -> Tensor:
    """How many routed layers each token runs, (B, T) int, from gates (routed layers, B, T)."""
    return (gates > tau).sum(0)


# %%
# NBVAL_CHECK_OUTPUT
toy_gates = torch.tensor([[[0.9, 0.2, 0.6]], [[0.7, 0.1, 0.6]]], dtype=torch.float64)
toy_real = torch.tensor([[True, True, False]])
print(f"skip loss {skip_loss(toy_gates, toy_real).item():.4f}")
print("layers used", layers_used(toy_gates).tolist())

# %% [markdown]
# :::{dropdown} Where these numbers come from
# The first token has $(0.9+0.7)^2=2.56$, the second $(0.2+0.1)^2=0.09$; the third is padding. The mean is
# $2.65/2=1.325$. Gates above one half: two, none, two.
# :::
#
# ### Step 6: skipping without thinking
#
# The baseline is ShortGPT: measure how much each layer turns its input, $1-\cos(\text{input},\text{output})$
# averaged over tokens (*block influence*), and remove the $k$ layers that matter least.


# %%
class Batch(NamedTuple):
    """Items as rows: ids (N, T), real (N, T) bool where no padding, target (N, T) bool where an answer is."""

    ids: Tensor
    real: Tensor
    target: Tensor


@torch.no_grad()
def block_influence(model, batch: Batch) -> Tensor:
    """1 - cosine between input and output of every layer, mean over real tokens, (layers,)."""
    states = model(batch.ids, output_hidden_states=True, use_cache=False).hidden_states
    last: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda m, i, o: last.append(o))
    model(batch.ids, use_cache=False)
    hook.remove()
    states = [*states[:-1], last[0]]  # transformers gives the last state after the final norm
    pairs = zip(states[:-1], states[1:], strict=True)
    return torch.stack([1 - F.cosine_similarity(a, b, dim=-1)[batch.real].mean() for a, b in pairs])


def least_influential(model, k: int, batch: Batch) -> list[int]:
    """The k layers of the upper half with the least block influence, ascending. Raises ValueError for k."""
    depth = len(model.model.layers)
    if not 0 <= k <= depth - depth // 2:
        raise ValueError(f"k={k}: 0 to {depth - depth // 2} layers of the upper half can be skipped")
    influence = block_influence(model, batch)[depth // 2 :]
    return sorted((influence.argsort()[:k] + depth // 2).tolist())


def static_skip(model, k: int, batch: Batch):
    """A copy of `model` without the k least influential layers of its upper half (ShortGPT)."""
    gone, short = least_influential(model, k, batch), copy.deepcopy(model)
    kept = [layer for i, layer in enumerate(short.model.layers) if i not in gone]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i  # its place in the cache
    short.model.layers, short.config.num_hidden_layers = nn.ModuleList(kept), len(kept)
    return short


# %% [markdown]
# ### Step 7: from saved operations to saved time
#
# The masked layer saves nothing: it computes both branches. Where does time go, and what can a mask save?
#
# | regime | what the GPU waits for | what skipping can save |
# |---|---|---|
# | R1: decode, one sequence | reading weights (15 GB for 8B) | most weights of skipped layers |
# | R2: decode, many long sequences | reading keys and values | those of skipped sequences |
# | R3: prefill | arithmetic | rows of the matrix products |
#
# For R1 the decision is made on the device, in the middle of the step. If the host had to read it, every
# layer would cost a round trip. So the whole step is one CUDA graph (a recorded sequence of launches,
# replayed as a whole), and each kernel is *predicated*: its first instruction reads the mask, and if no row
# needs it, it returns before it has read a weight. One kernel does all matrix-vector products. It works on
# two matrices at once (`half` 0 for rows that run: the FFN; `half` 1 for rows that skip: the adapter),
# stored side by side, and can fuse what stands around a product: RMSNorm before it, SwiGLU, the factor $g$
# or $1-g$, the residual after it.
#
# Each kernel has a reference in plain torch, which is what runs on a CPU. There is no split of the inner
# dimension between programs: with 4 to 16 output rows per program every shape of the layer fills 132
# multiprocessors, and results do not depend on the order of atomic additions.

# %%
try:  # only the kernels need it
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


@functools.cache
def compiled(kernel: Callable) -> Any:
    """The kernel, compiled at its first use (TRITON_INTERPRET=1: interpreted, on CPU tensors)."""
    if triton is None:
        raise ImportError("the GPU kernels need triton: pip install triton")
    made = triton.jit(kernel)
    if hasattr(made, "rewrite"):  # the interpreter compiles it anew and quotes annotations twice
        made.rewrite().__annotations__ = kernel.__annotations__
    return made


def use_kernels(x: Tensor) -> bool:
    """Whether the kernels run (on a GPU, or interpreted in tests), not their references."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


# %%
def gemv_kernel(
    x, w, out, mask, gate, norm, B, n0, k0, n1, k1, tiles0, x_stride, w_stride, out_stride, eps,
    ROWS: "tl.constexpr", NORM: "tl.constexpr", GLU: "tl.constexpr",
    SCALED: "tl.constexpr", ADD: "tl.constexpr", BLOCK_N: "tl.constexpr", BLOCK_K: "tl.constexpr",
):  # fmt: skip
    """out[b, n] (+)= scale * f(W x_b): programs below tiles0 serve rows with mask 1, the others mask 0."""
    pid, b, k = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    second = pid >= tiles0  # this program belongs to the rows that skip
    wanted = (b < B) & ((tl.load(mask + b, mask=b < B, other=0) != 0) != second)
    if tl.sum(wanted.to(tl.int32), 0) == 0:
        return
    n = (pid - tl.where(second, tiles0, 0)) * BLOCK_N + tl.arange(0, BLOCK_N)
    width, depth = tl.where(second, n1, n0), tl.where(second, k1, k0)
    column = 0 if GLU else tl.where(second, k0, 0)
    at = w + ((tl.where(second, 2 * n0, 0) if GLU else 0) + n)[:, None] * w_stride + column + k[None, :]
    from_x, inside = x + b[:, None] * x_stride + column + k[None, :], (n < width)[:, None]
    a = tl.zeros((BLOCK_N, BLOCK_K if ROWS == 1 else ROWS), tl.float32)
    u, squares = tl.zeros_like(a), tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, depth, BLOCK_K):
        some = (start + k < depth)[None, :]
        xs = tl.load(from_x + start, mask=wanted[:, None] & some, other=0.0)
        ws = tl.load(at + start, mask=inside & some, other=0.0, eviction_policy="evict_first")
        if NORM:
            xf = xs.to(tl.float32)
            squares += xf * xf
            xs = (xf * tl.load(norm + start + k[None, :], mask=some, other=0.0).to(tl.float32)).to(xs.dtype)
        if GLU:
            vs = tl.load(at + width * w_stride + start, mask=inside & some, other=0.0)
            vf = vs.to(tl.float32)
            u += vf * xs.to(tl.float32) if ROWS == 1 else tl.dot(vs, tl.trans(xs), input_precision="ieee")
        wf = ws.to(tl.float32)
        a += wf * xs.to(tl.float32) if ROWS == 1 else tl.dot(ws, tl.trans(xs), input_precision="ieee")
    rms = tl.rsqrt(tl.sum(squares, 1) / depth + eps)[None, :] if NORM else 1.0
    y = (tl.sum(a, 1)[:, None] if ROWS == 1 else a) * rms
    if GLU:
        y = y * tl.sigmoid(y) * (tl.sum(u, 1)[:, None] if ROWS == 1 else u) * rms
    if SCALED:
        g = tl.load(gate + b, mask=b < B, other=0.0)
        y = y * tl.where(second, 1.0 - g, g)[None, :]
    to = out + b[None, :] * out_stride + ((tl.where(second, n0, 0) if GLU else 0) + n)[:, None]
    good = wanted[None, :] & (n < width)[:, None]
    y += tl.load(to, mask=good & ADD, other=0.0).to(tl.float32)
    tl.store(to, y.to(out.dtype.element_ty), mask=good)


# %% [markdown]
# `gemv_pred` and `ffn_or_adapter` are what the runtime calls; the block sizes come from a table that the
# tuning unit fills on the GPU.


# %%
VARIANTS = {  # (output rows per program, columns per step, warps, stages)
    "one": [(4, 512, 4, 4), (4, 1024, 4, 3), (8, 512, 4, 3), (8, 256, 4, 4), (8, 512, 8, 4), (16, 256, 8, 3)],
    "few": [(16, 256, 4, 4), (16, 512, 4, 3), (32, 128, 4, 4), (32, 256, 8, 3)],
}
BLOCKS = {"one": VARIANTS["one"][0], "few": VARIANTS["few"][0]}


def _launch_gemv(x, w, out, mask, widths: tuple[int, int, int, int], *, gate=None,
                 norm=None, eps=0.0, glu=False, add=False,
                 blocks=None) -> Tensor:  # fmt: skip
    """Launch gemv_kernel on x (B, K), in place on out (B, N); widths: outputs, inputs of both halves."""
    rows, (n0, k0, n1, k1) = len(x), widths
    block_n, block_k, warps, stages = blocks or BLOCKS["one" if rows == 1 else "few"]
    tiles0, tiles1 = -(-n0 // block_n), -(-n1 // block_n)
    compiled(gemv_kernel)[(tiles0 + tiles1,)](
        x, w, out, mask, mask if gate is None else gate, w if norm is None else norm, rows, n0, k0, n1, k1,
        tiles0, x.stride(0), w.stride(0), out.stride(0), eps, ROWS=1 if rows == 1 else 16,
        NORM=norm is not None, GLU=glu, SCALED=gate is not None, ADD=add, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


# %%
@functools.cache
def fused(function: Callable) -> Callable:
    """An elementwise function compiled into one kernel: its eager chain would write memory at every link."""
    return torch.compile(function, dynamic=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's RMSNorm over the last axis."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def glu(both: Tensor) -> Tensor:
    """silu(gate) * up of both halves of the last axis."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def swiglu(y: Tensor, both: Tensor) -> Tensor:
    """silu(gate y) * (up y) with both matrices stacked, (2 f, d)."""
    made = F.linear(y, both)
    return (fused(glu) if made.is_cuda else glu)(made)


# %%
def gemv_pred(x: Tensor, w: Tensor, active: Tensor, out: Tensor, *, add: bool = False, norm=None,
              eps: float = 0.0, blocks=None) -> Tensor:  # fmt: skip
    """out[b] = W x_b (add: += it) where active (B,), in place; other rows are neither computed nor written.

    x (B <= 8, K), w (N, K); norm (K,): x is RMS-normalised first. Raises ValueError for more rows.
    """
    if len(x) > 8:
        raise ValueError(f"x has {len(x)} rows: gemv_pred is made for 8 or fewer")
    if use_kernels(x):
        widths = (*w.shape, 0, 0)
        return _launch_gemv(x, w, out, active, widths, norm=norm, eps=eps, add=add, blocks=blocks)
    y = F.linear(x if norm is None else rms_norm(x, norm, eps), w)
    out.copy_(torch.where(active.bool()[:, None], out + y if add else y, out))
    return out


def ffn_or_adapter(h: Tensor, inner: Tensor, w_in: Tensor, w_out: Tensor, norm: Tensor, mask: Tensor,
                   gate: Tensor, f: int, eps: float, blocks=None) -> Tensor:  # fmt: skip
    """h (B, d) += g FFN(norm(h)) where mask, else (1 - g) adapter(norm(h)), in place; two launches.

    w_in (2 f + 2 a, d): gate and up of the FFN, then both of the adapter; w_out (d, f + a): their outputs
    side by side; inner (B, f + a): scratch; mask (B,) int8, gate (B,) float32; f: width of the FFN. Without
    an adapter (a = 0) all rows must run.
    """
    d, a = len(w_out), w_out.shape[1] - f
    if use_kernels(h):
        blocks = blocks or (None, None)
        _launch_gemv(h, w_in, inner, mask, (f, d, a, d), norm=norm, eps=eps, glu=True, blocks=blocks[0])
        widths = (d, f, d if a else 0, a)
        return _launch_gemv(inner, w_out, h, mask, widths, gate=gate, add=True, blocks=blocks[1])
    y, run, g = rms_norm(h, norm, eps), mask.bool()[:, None], gate[:, None].to(h.dtype)
    part = g * F.linear(swiglu(y, w_in[: 2 * f]), w_out[:, :f])
    if a:
        part = torch.where(run, part, (1 - g) * F.linear(swiglu(y, w_in[2 * f :]), w_out[:, f:]))
    return h.add_(part)


# %% [markdown]
# The encoder of the router rides along with keys and values: one product of $2\,d_{kv}+r$ rows. What is left
# of the router is a handful of operations per row, on the device.


# %%
def router_kernel(z, weight, w, forced, gate, mask, width, z_stride, eps, tau,
                  FORCED: "tl.constexpr", BLOCK: "tl.constexpr"):  # fmt: skip
    """One program per row: RMSNorm, tanh, dot product, sigmoid, decision."""
    b, k = tl.program_id(0), tl.arange(0, BLOCK)
    inside = k < width
    row = tl.load(z + b * z_stride + k, mask=inside, other=0.0).to(tl.float32)
    row = row * tl.rsqrt(tl.sum(row * row, 0) / width + eps)
    row = row * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    bent = 2.0 * tl.sigmoid(2.0 * row) - 1.0  # tanh
    g = tl.sigmoid(tl.sum(bent * tl.load(w + k, mask=inside, other=0.0).to(tl.float32), 0))
    tl.store(gate + b, g)
    run = (g > tau).to(tl.int8)
    if FORCED:
        run = tl.load(forced + b)
    tl.store(mask + b, run)


def router_finish(z: Tensor, weight: Tensor, w: Tensor, eps: float, tau: float = 0.5,
                  forced: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gate (B,) float32, mask (B,) int8) from encoder outputs z (B, r), norm weight (r,), collapsed w (r,).

    forced (B,) int8 replaces the decision, not the gate. Gates are computed in float32 on both paths.
    """
    if not use_kernels(z):
        u = torch.tanh(rms_norm(z.float(), weight.float(), eps))
        gate = torch.sigmoid(u @ w.float())
        return gate, ((gate > tau) if forced is None else forced.bool()).to(torch.int8)
    forced = None if forced is None else forced.to(torch.int8)
    gate = torch.empty(len(z), dtype=torch.float32, device=z.device)
    mask = torch.empty(len(z), dtype=torch.int8, device=z.device)
    block = max(16, 1 << (z.shape[1] - 1).bit_length())
    compiled(router_kernel)[(len(z),)](
        z, weight, w, mask if forced is None else forced, gate, mask, z.shape[1], z.stride(0), eps, tau,
        FORCED=forced is not None, BLOCK=block,
    )  # fmt: skip
    return gate, mask


# %% [markdown]
# Attention of one new token reads all keys and values of its sequence. The cache is cut into chunks so that
# a single sequence, too, fills the GPU; each program serves one key head with its four query heads, and a
# second kernel merges the chunks by their log-sum-exp. Both return at once for a sequence that skips.


# %%
def attention_kernel(
    q, cache_k, cache_v, cos, sin, lengths, active, part, part_max, part_sum, scale, slots, q_stride, splits,
    HEADS: "tl.constexpr", GROUP: "tl.constexpr", DIM: "tl.constexpr", HALF: "tl.constexpr",
    BLOCK_G: "tl.constexpr", BLOCK_D: "tl.constexpr", BLOCK_S: "tl.constexpr", CHUNK: "tl.constexpr",
):  # fmt: skip
    """One chunk of one key head: rotate the queries, softmax(q k) v with its maximum and sum."""
    b, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b) + 1
    first = split * CHUNK
    if (tl.load(active + b) == 0) | (first >= length):
        return
    g, d, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    good = (g < GROUP)[:, None] & (d < DIM)[None, :]
    row = q + b * q_stride + (head * GROUP + g)[:, None] * DIM
    turned = tl.where(d < HALF, d + HALF, d - HALF)
    angle, inside = (length - 1) * DIM + d, d < DIM
    c = tl.load(cos + angle, mask=inside, other=0.0)[None, :]
    sn = tl.load(sin + angle, mask=inside, other=0.0) * tl.where(d < HALF, -1.0, 1.0)
    here = tl.load(row + d[None, :], mask=good, other=0.0)
    there = tl.load(row + turned[None, :], mask=good, other=0.0)
    query = (here.to(tl.float32) * c + there.to(tl.float32) * sn[None, :]).to(here.dtype)
    best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total, acc = tl.zeros((BLOCK_G,), tl.float32), tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    base = ((b * HEADS + head) * slots).to(tl.int64) * DIM
    for start in range(first, tl.minimum(first + CHUNK, length), BLOCK_S):
        at, some = base + (start + s)[:, None] * DIM + d[None, :], (start + s < length)
        keep = some[:, None] & inside[None, :]
        keys = tl.load(cache_k + at, mask=keep, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(some[None, :], scores, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        p, shrink = tl.exp(scores - new[:, None]), tl.exp(best - new)
        values = tl.load(cache_v + at, mask=keep, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        total, best = total * shrink + tl.sum(p, 1), new
    to = ((b * HEADS + head) * splits + split) * GROUP + g
    tl.store(part + to[:, None] * DIM + d[None, :], acc, mask=good)
    tl.store(part_max + to, best, mask=g < GROUP)
    tl.store(part_sum + to, total, mask=g < GROUP)


# %%
def merge_kernel(part, part_max, part_sum, lengths, active, out, splits, HEADS: "tl.constexpr",
                 GROUP: "tl.constexpr", DIM: "tl.constexpr", BLOCK_D: "tl.constexpr",
                 CHUNK: "tl.constexpr"):  # fmt: skip
    """Merge the chunks of one query head."""
    b, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_D)
    if tl.load(active + b) == 0:
        return
    best, total = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(0, (tl.load(lengths + b) + CHUNK) // CHUNK):
        at = ((b * HEADS + head // GROUP) * splits + split) * GROUP + head % GROUP
        new = tl.maximum(best, tl.load(part_max + at))
        old, own = tl.exp(best - new), tl.exp(tl.load(part_max + at) - new)
        acc = acc * old + own * tl.load(part + at * DIM + d, mask=d < DIM, other=0.0)
        total = total * old + own * tl.load(part_sum + at)
        best = new
    to = out + (b * HEADS * GROUP + head) * DIM + d
    tl.store(to, (acc / total).to(out.dtype.element_ty), mask=d < DIM)


def rotate_write_kernel(k, v, cache_k, cache_v, cos, sin, lengths, slots, stride, HEADS: "tl.constexpr",
                        DIM: "tl.constexpr", HALF: "tl.constexpr", BLOCK_D: "tl.constexpr"):  # fmt: skip
    """Write the rotated key and the value of one head at its sequence's next slot: for every token."""
    b, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_D)
    at, inside = tl.load(lengths + b), d < DIM
    row = k + b * stride + head * DIM
    here = tl.load(row + d, mask=inside, other=0.0)
    there = tl.load(row + tl.where(d < HALF, d + HALF, d - HALF), mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + at * DIM + d, mask=inside, other=0.0)
    sn = tl.load(sin + at * DIM + d, mask=inside, other=0.0) * tl.where(d < HALF, -1.0, 1.0)
    turned = here.to(tl.float32) * c + there * sn
    to = ((b * HEADS + head) * slots + at).to(tl.int64) * DIM + d
    tl.store(cache_k + to, turned.to(here.dtype), mask=inside)
    tl.store(cache_v + to, tl.load(v + b * stride + head * DIM + d, mask=inside, other=0.0), mask=inside)


# %%
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., hd) by tables that broadcast to it (transformers' half-split order)."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


# %%
def write_kv(k: Tensor, v: Tensor, cache: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate k (B, Hkv, hd) and write k and v at slot lengths[b] of cache (2, B, Hkv, S, hd)."""
    heads, dim = k.shape[1:]
    if use_kernels(k):
        compiled(rotate_write_kernel)[(len(k), heads)](
            k, v, cache[0], cache[1], cos, sin, lengths, cache.shape[3], k.stride(0), HEADS=heads, DIM=dim,
            HALF=dim // 2, BLOCK_D=1 << (dim - 1).bit_length(),
        )  # fmt: skip
        return
    rows, at = torch.arange(len(k)), lengths.long()
    cache[0][rows, :, at] = rotate(k, cos[at][:, None], sin[at][:, None])
    cache[1][rows, :, at] = v


# %%
def decode_attn_pred(q: Tensor, cache: Tensor, lengths: Tensor, active: Tensor, cos: Tensor, sin: Tensor,
                     out: Tensor, scratch: Tensor | None = None, block: int = 64, chunk: int = 256,
                     warps: int = 4) -> Tensor:  # fmt: skip
    """Attention of one query per sequence over its slots 0 … lengths[b]; rows that are not active stay.

    q (B, Hq, hd) before rotation, cache (2, B, Hkv, S, hd), lengths and active (B,), out (B, Hq hd).
    """
    (size, heads_q, dim), heads, slots = q.shape, cache.shape[2], cache.shape[3]
    group, splits = heads_q // heads, -(-slots // chunk)
    if use_kernels(q):
        need = size * heads_q * splits
        scratch = torch.empty(need * (dim + 2), device=q.device) if scratch is None else scratch
        part, top, total = scratch[: need * dim], scratch[need * dim :][:need], scratch[need * (dim + 1) :]
        wide = max(16, 1 << (dim - 1).bit_length())
        kept = dict(HEADS=heads, GROUP=group, DIM=dim, BLOCK_D=wide, CHUNK=chunk)
        compiled(attention_kernel)[(size, heads, splits)](
            q, cache[0], cache[1], cos, sin, lengths, active, part, top, total, dim**-0.5, slots, q.stride(0),
            splits, HALF=dim // 2, BLOCK_G=max(16, group), BLOCK_S=block, num_warps=warps, **kept,
        )  # fmt: skip
        compiled(merge_kernel)[(size, heads_q)](part, top, total, lengths, active, out, splits, **kept)
        return out
    at = lengths.long()
    turned = rotate(q, cos[at][:, None], sin[at][:, None])[:, :, None]
    seen = (torch.arange(slots, device=q.device) <= at[:, None])[:, None, None]
    found = F.scaled_dot_product_attention(turned, cache[0], cache[1], attn_mask=seen, enable_gqa=True)
    return out.copy_(torch.where(active.bool()[:, None], found.flatten(1), out))


# %% [markdown]
# Prefill (R3) has thousands of tokens at once: here the rows that run are gathered, multiplied by cuBLAS as a
# smaller matrix, and put back. One look from the host per layer finds out how many there are.


# %%
def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(indices that run, indices that skip) of a mask (T,), in order, with one host synchronisation."""
    if mask.ndim != 1:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: flatten it first")
    order = torch.argsort(~mask, stable=True)
    count = int(mask.sum())
    return order[:count], order[count:]


# %%
# NBVAL_CHECK_OUTPUT
toy_mask = torch.tensor([True, False, False, True, True])
print("run, skip:", [part.tolist() for part in compact(toy_mask)])
toy_h = torch.tensor([[1.0], [1.0]])
ffn_or_adapter(
    toy_h, torch.empty(2, 3), torch.ones(6, 1), torch.tensor([[1.0, 1.0, 2.0]]), torch.ones(1),
    torch.tensor([1, 0], dtype=torch.int8), torch.tensor([0.75, 0.25]), f=2, eps=0.0,
)  # fmt: skip
print("after the layer:", [f"{value:.4f}" for value in toy_h[:, 0].tolist()])

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Tokens 0, 3 and 4 run, 1 and 2 skip. Both rows are 1 and stay 1 when normalised. The FFN has two inner
# units, each $\operatorname{silu}(1)\cdot1=0.7311$, and adds them: $1+0.75\cdot1.4621=2.0966$. The adapter
# has one, with output weight 2: $1+(1-0.25)\cdot2\cdot0.7311=2.0966$, by coincidence of the numbers: $0.75$
# times two units of $0.7311$ either way.
# :::


# %% [markdown]
# ### Step 8: a runtime with one cache and four modes
#
# `FlexiRuntime` holds the weights of a converted (or plain) Llama in the layout the kernels want, as views,
# so that nothing is stored twice: per layer `[q; k; v; encoder]`, `[gate; up; adapter in]` and `[down |
# adapter out]`. The cache is preallocated for every layer and every token. Since skipped tokens write too,
# a prefix computed in one mode can be continued in any other.
#
# - `dense`: the plain Llama, without router and adapter: no handicap for the baseline;
# - `masked`: both branches for all tokens, then a choice (what the paper's code does);
# - `compact`: gathered rows, for prefill;
# - `predicated`: the kernels of step 7, for decoding. Beyond 8 sequences the matrix products are bound by
#   weights that some row needs anyway, so they run in cuBLAS for all rows and only attention is predicated.


# %%
class Weights(NamedTuple):
    """One layer: rows q, k, v and encoder; output; FFN and adapter in and out; norms; widths of the parts."""

    qkve: Tensor
    o: Tensor
    w_in: Tensor
    w_out: Tensor
    norm1: Tensor
    norm2: Tensor
    router: tuple[Tensor, Tensor] | None  # norm weight, collapsed w
    q: int
    kv: int
    f: int


def pack(layer, config) -> Weights:
    """Fuse a layer's matrices; its parameters become views of the fused ones."""
    attention, mlp, flexi = layer.self_attn, layer.mlp, isinstance(layer, FlexiDecoderLayer)
    first = [attention.q_proj, attention.k_proj, attention.v_proj]
    second, third = [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
    router = None
    if flexi:
        if not isinstance(layer.router, Router) or layer.router_proj is None:
            raise ValueError("FlexiRuntime needs layers with the paper's router and an adapter")
        first.append(layer.router.router_enc)
        second += [layer.router_proj.gate_proj, layer.router_proj.down_proj]
        third.append(layer.router_proj.up_proj)
        router = (layer.router.router_norm.weight.data, layer.router.collapse().detach().float())
    fused = []
    for parts, axis in ((first, 0), (second, 0), (third, 1)):
        whole = torch.cat([part.weight.data for part in parts], axis)
        views = whole.split([part.weight.shape[axis] for part in parts], axis)
        for part, view in zip(parts, views, strict=True):
            part.weight.data = view
        fused.append(whole)
    norms = layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data
    sizes = first[0].out_features, first[1].out_features, mlp.gate_proj.out_features
    return Weights(fused[0], attention.o_proj.weight.data, *fused[1:], *norms, router, *sizes)


# %%
class StaticState:
    """Weights in the kernels' layout and a preallocated cache; FlexiRuntime adds the passes.

    Raises ValueError for an unknown mode, more sequences or tokens than it holds.
    """

    MODES = ("dense", "masked", "compact", "predicated")

    @torch.no_grad()
    def __init__(self, model, max_batch: int, max_len: int, mode: str = "predicated") -> None:
        self.model, self.config, self.mode = model, model.config, mode
        c, weight = model.config, next(model.parameters())
        self.device, self.dtype, self.eps = weight.device, weight.dtype, c.rms_norm_eps
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.dim = getattr(c, "head_dim", None) or c.hidden_size // self.heads
        self.layers = [pack(layer, c) for layer in model.model.layers]
        shape = len(self.layers), 2, max_batch, self.kv_heads, max_len, self.dim
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        slots = torch.arange(max_len, device=self.device)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, device=self.device), slots)
        self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()
        self.lengths = torch.zeros(max_batch, dtype=torch.int32, device=self.device)
        self.every = torch.ones(max_batch, dtype=torch.int8, device=self.device)
        self.full = torch.ones(max_batch, device=self.device)  # gates of a layer without a router
        self.length, self.batch, self.chunk = 0, 0, 256
        self.kernel_rows = 8  # up to so many sequences the products run in our kernels, else in cuBLAS
        self.blocks: dict[str, Any] = {}
        self.attention: dict[str, int] = {}
        self.last_masks: list[Tensor] = []

    def _check(self, ids: Tensor, used: int) -> None:
        batch, slots = self.cache.shape[2], self.cache.shape[4]
        if self.mode not in self.MODES:
            raise ValueError(f"mode={self.mode!r}: it is one of {', '.join(self.MODES)}")
        if ids.ndim != 2 or len(ids) > batch or used + ids.shape[1] > slots:
            room = f"{batch} sequences of {slots} tokens"
            raise ValueError(f"ids {tuple(ids.shape)} after {used} tokens: the static cache holds {room}")

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(rms_norm(x, self.model.model.norm.weight, self.eps), self.model.lm_head.weight)


# %%
class FlexiRuntime(StaticState):
    """Inference of a Llama with or without routed layers for up to max_batch sequences of equal length.

    mode: dense, masked, compact or predicated, may change at any time. cache: (L, 2, B, Hkv, S, hd).
    last_masks: decisions of the last call, (routed layers, B, T); `force` replaces the routers' decisions.
    """

    @torch.no_grad()
    def prefill(self, ids: Tensor, force: Tensor | None = None, last: bool = True) -> Tensor:
        """Read prompts (B, T) into the empty cache; logits (B, V) of the last token, or (B, T, V) of all."""
        self.length = 0
        return self.extend(ids, force, last)

    @torch.no_grad()
    def extend(self, ids: Tensor, force: Tensor | None = None, last: bool = True) -> Tensor:
        """Append tokens (B, T) to what the cache holds; logits as of `prefill`."""
        self._check(ids, self.length)
        self.batch = len(ids)
        self.lengths.fill_(self.length)
        self.last_masks = []
        x, forced = self.model.model.embed_tokens(ids), iter(() if force is None else force)
        for i, w in enumerate(self.layers):
            x = rows_layer(self, i, w, x, next(forced, None) if w.router else None)
        self.length += ids.shape[1]
        self.lengths.fill_(self.length)
        return self._logits(x[:, -1] if last else x)

    @torch.no_grad()
    def decode(self, ids: Tensor, force: Tensor | None = None) -> Tensor:
        """One more token per sequence, ids (B,) -> logits (B, V); nothing here waits for the device."""
        self._check(ids[:, None], self.length)
        logits = self.step(ids, force)
        self.length += 1
        self.lengths += 1
        return logits

    def step(self, ids: Tensor, force: Tensor | None = None) -> Tensor:
        """`decode` without counting: what a CUDA graph captures. force: (routed layers, B) int8."""
        h = self.model.model.embed_tokens(ids)
        self.last_masks, forced = [], iter(() if force is None else force)
        kernels = self.mode in ("dense", "predicated") and len(ids) <= self.kernel_rows
        kind = one_layer if kernels else many_layer
        for i, w in enumerate(self.layers):
            h = kind(self, i, w, h, next(forced, None) if w.router else None)
        return self._logits(h)


# %% [markdown]
# A layer in three forms: for up to 8 rows through the kernels (`one_layer`), for more rows with predicated
# attention (`many_layer`), and for many tokens per sequence (`rows_layer`).


# %%
def one_layer(rt: FlexiRuntime, i: int, w: Weights, h: Tensor, forced: Tensor | None) -> Tensor:
    """One token for each of at most 8 sequences, h (B, d); every product looks at the mask first."""
    size, every, free = len(h), rt.every[: len(h)], w.router is not None and rt.mode == "predicated"
    made = torch.empty(size, len(w.qkve), dtype=h.dtype, device=h.device)
    heads, dim, kv = rt.kv_heads, rt.dim, w.kv
    norm, blocks, w_in, w_out = dict(norm=w.norm1, eps=rt.eps), rt.blocks, w.w_in, w.w_out
    if free:
        gemv_pred(h, w.qkve[w.q :], every, made[:, w.q :], blocks=blocks.get("kv"), **norm)
        assert w.router is not None
        gate, mask = router_finish(made[:, w.q + 2 * kv :], *w.router, rt.eps, 0.5, forced)
        gemv_pred(h, w.qkve[: w.q], mask, made[:, : w.q], blocks=blocks.get("q"), **norm)
        rt.last_masks.append(mask)
    else:
        rows = w.qkve[: w.q + 2 * kv]
        gemv_pred(h, rows, every, made[:, : len(rows)], blocks=blocks.get("qkv"), **norm)
        gate, mask, w_in, w_out = rt.full[:size], every, w_in[: 2 * w.f], w_out[:, : w.f]
    k, v = (made[:, at : at + kv].unflatten(1, (heads, dim)) for at in (w.q, w.q + kv))
    cache = rt.cache[i][:, :size]
    write_kv(k, v, cache, rt.lengths[:size], rt.cos, rt.sin)
    found = torch.empty(size, w.q, dtype=h.dtype, device=h.device)
    q = made[:, : w.q].unflatten(1, (rt.heads, dim))
    decode_attn_pred(q, cache, rt.lengths[:size], mask, rt.cos, rt.sin, found, chunk=rt.chunk,
                     **rt.attention)  # fmt: skip
    gemv_pred(found, w.o, mask, h, add=True, blocks=blocks.get("o"))
    inner = torch.empty(size, w_out.shape[1], dtype=h.dtype, device=h.device)
    both = (blocks.get("in"), blocks.get("out"))
    return ffn_or_adapter(h, inner, w_in, w_out, w.norm2, mask, gate, w.f, rt.eps, both)


# %%
def many_layer(rt: FlexiRuntime, i: int, w: Weights, h: Tensor, forced: Tensor | None) -> Tensor:
    """One token per sequence, any number: products for all rows, attention for those that run."""
    size, kv, n = len(h), w.kv, rms_norm(h, w.norm1, rt.eps)
    free = w.router is not None and rt.mode != "dense"
    made = F.linear(n, w.qkve if free else w.qkve[: w.q + 2 * kv])
    gate, mask = rt.full[:size], rt.every[:size]
    if free:
        assert w.router is not None
        gate, mask = router_finish(made[:, w.q + 2 * kv :], *w.router, rt.eps, 0.5, forced)
        rt.last_masks.append(mask)
    shape = rt.heads, rt.dim
    q, k, v = made[:, : w.q], made[:, w.q : w.q + kv], made[:, w.q + kv : w.q + 2 * kv]
    cache = rt.cache[i][:, :size]
    k, v = (t.unflatten(1, (rt.kv_heads, rt.dim)) for t in (k, v))
    write_kv(k, v, cache, rt.lengths[:size], rt.cos, rt.sin)
    found = torch.empty(size, w.q, dtype=h.dtype, device=h.device)
    active = mask if rt.mode == "predicated" else rt.every[:size]
    decode_attn_pred(q.unflatten(1, shape), cache, rt.lengths[:size], active, rt.cos, rt.sin, found,
                     chunk=rt.chunk, **rt.attention)  # fmt: skip
    run, attended = mask.bool()[:, None], h + F.linear(found, w.o)
    h = torch.where(run, attended, h) if free else attended
    y = rms_norm(h, w.norm2, rt.eps)
    ffn = F.linear(swiglu(y, w.w_in[: 2 * w.f]), w.w_out[:, : w.f])
    if not free:
        return h + ffn
    g, small = gate[:, None].to(h.dtype), F.linear(swiglu(y, w.w_in[2 * w.f :]), w.w_out[:, w.f :])
    return h + torch.where(run, g * ffn, (1 - g) * small)


# %%
def attend(rt: FlexiRuntime, i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (B, T) new tokens over the cache, which gets their keys, values; (B, T, Hq hd)."""
    size, count, start = *q.shape[:2], rt.length
    cos, sin = (t[start : start + count][None, :, None] for t in (rt.cos, rt.sin))
    cache = rt.cache[i][:, :size, :, : start + count]
    shape = (size, count, rt.kv_heads, rt.dim)
    turn = fused(rotate) if q.is_cuda else rotate
    cache[0, :, :, start:] = turn(k.reshape(shape), cos, sin).transpose(1, 2)
    cache[1, :, :, start:] = v.reshape(shape).transpose(1, 2)
    queries = turn(q.unflatten(2, (rt.heads, rt.dim)), cos, sin).transpose(1, 2)
    how: dict[str, Any] = dict(is_causal=True)
    if start:
        ahead = torch.arange(start + count, device=q.device) - start
        how = dict(attn_mask=ahead <= torch.arange(count, device=q.device)[:, None])
    found = F.scaled_dot_product_attention(queries, cache[0], cache[1], enable_gqa=True, **how)
    return found.transpose(1, 2).flatten(2)


# %%
def rows_layer(rt: FlexiRuntime, i: int, w: Weights, x: Tensor, forced: Tensor | None) -> Tensor:
    """Many tokens per sequence, x (B, T, d); compact, predicated gather the rows of each branch."""
    n, kv, f, free = rms_norm(x, w.norm1, rt.eps), w.kv, w.f, w.router is not None and rt.mode != "dense"
    if not free:
        q, k, v = F.linear(n, w.qkve[: w.q + 2 * kv]).split([w.q, kv, kv], -1)
        h = x + F.linear(attend(rt, i, q, k, v), w.o)
        return h + F.linear(swiglu(rms_norm(h, w.norm2, rt.eps), w.w_in[: 2 * f]), w.w_out[:, :f])
    k, v, z = F.linear(n, w.qkve[w.q :]).split([kv, kv, len(w.qkve) - w.q - 2 * kv], -1)
    assert w.router is not None
    given = None if forced is None else forced.flatten()
    gate, mask = router_finish(z.flatten(0, 1), *w.router, rt.eps, 0.5, given)
    rt.last_masks.append(mask.view(x.shape[:2]))
    g = gate[:, None].to(x.dtype)
    if rt.mode == "masked":
        g, run = g.view(*x.shape[:2], 1), mask.bool().view(*x.shape[:2], 1)
        h = torch.where(run, x + F.linear(attend(rt, i, F.linear(n, w.qkve[: w.q]), k, v), w.o), x)
        y = rms_norm(h, w.norm2, rt.eps)
        small = F.linear(swiglu(y, w.w_in[2 * f :]), w.w_out[:, f:])
        return h + torch.where(run, g * F.linear(swiglu(y, w.w_in[: 2 * f]), w.w_out[:, :f]), (1 - g) * small)
    run, skip = compact(mask.bool())
    h, flat = x.flatten(0, 1).clone(), n.flatten(0, 1)
    q = torch.zeros(len(h), w.q, dtype=x.dtype, device=x.device)
    q.index_copy_(0, run, F.linear(flat[run], w.qkve[: w.q]))
    found = attend(rt, i, q.view(*x.shape[:2], -1), k, v).flatten(0, 1)
    h.index_add_(0, run, F.linear(found[run], w.o))
    h_run, h_skip = h[run], h[skip]
    ffn = F.linear(swiglu(rms_norm(h_run, w.norm2, rt.eps), w.w_in[: 2 * f]), w.w_out[:, :f])
    small = F.linear(swiglu(rms_norm(h_skip, w.norm2, rt.eps), w.w_in[2 * f :]), w.w_out[:, f:])
    h.index_copy_(0, run, h_run + g[run] * ffn)
    h.index_copy_(0, skip, h_skip + (1 - g[skip]) * small)
    return h.view_as(x)


# %% [markdown]
# ### Step 9: what time should be saved
#
# A model of the time before any measurement. A decode step takes as long as reading what it needs, a prefill
# as long as its arithmetic. With $p$ the probability that a token skips a routed layer and $B$ sequences, the
# weights of the running branch are read with probability $1-p^B$: at $B=8$ and $p=\tfrac12$ always. That is
# why R1 dies with the batch and R2, whose traffic is per sequence, does not.


# %%
def linear_sizes(cfg) -> dict[str, int]:
    """Weights per part of a layer and of the head: q + o, k + v, ffn, adapter, router (collapsed), head."""
    d, f, heads = cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads
    dim = getattr(cfg, "head_dim", None) or d // heads
    reduction = getattr(cfg, "proj_reduction_factor", 16)
    return {
        "qo": 2 * d * heads * dim,
        "kv": 2 * d * cfg.num_key_value_heads * dim,
        "ffn": 3 * d * f,
        "adapter": 3 * d * (f // reduction),
        "router": d * (d // reduction),
        "head": d * cfg.vocab_size,
    }


# %%
def cost_model(cfg, mode: str, batch: int, ctx: int, skip: float, bw: float, flops: float) -> float:
    """Predicted milliseconds: of a decode step at context ctx; for "compact" of a prefill, batch x ctx.

    skip: mean number of layers skipped per token; bw: bytes per second; flops: per second; bfloat16. Mode
    "dense_prefill" is the baseline of "compact". Raises ValueError for an unknown mode.
    """
    layers, w = cfg.num_hidden_layers, linear_sizes(cfg)
    known = ("dense", "masked", "predicated", "compact", "dense_prefill")
    if mode not in known:
        raise ValueError(f"mode={mode!r}: it is one of {', '.join(known)}")
    count = len(getattr(cfg, "routing_layers", None) or range(layers // 2, layers))
    p, full = (0.0 if "dense" in mode else skip / count), w["qo"] + w["kv"] + w["ffn"]
    pairs = cfg.num_attention_heads * (
        getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    )
    if mode in ("compact", "dense_prefill"):
        tokens = batch * ctx
        per = (layers - count) * full + count * (w["kv"] + (1 - p) * (w["qo"] + w["ffn"]) + p * w["adapter"])
        attention = layers * 2 * tokens * ctx * pairs  # causal: half of 4 T^2 d
        extra = 0 if "dense" in mode else count * w["router"]
        return 1e3 * (2 * tokens * (per + extra) + attention + 2 * batch * w["head"]) / flops
    read_run, read_skip = 1 - p**batch, (0.0 if "dense" in mode else 1 - (1 - p) ** batch)
    if mode == "masked" or (mode == "predicated" and batch > 8):
        read_run, read_skip = 1.0, 1.0
    own = w["kv"] + read_run * (w["qo"] + w["ffn"]) + read_skip * w["adapter"]
    own += 0 if "dense" in mode else w["router"]
    weights = (layers - count) * full + count * own + w["head"]
    seen = (layers - count) + count * (1 - p if mode == "predicated" else 1)
    cache = seen * batch * ctx * 2 * cfg.num_key_value_heads * (pairs // cfg.num_attention_heads)
    moved = 1e3 * 2 * (weights + cache) / bw
    return max(moved, 1e3 * 2 * batch * weights / flops)


# %%
# NBVAL_CHECK_OUTPUT
LLAMA_8B: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=5e5,
    tie_word_embeddings=False,
)  # fmt: skip
eight = LlamaConfig(**LLAMA_8B)
print({name: f"{size / 1e6:.1f} M" for name, size in linear_sizes(eight).items()})
for name, batch, ctx in (("R1", 1, 512), ("R2", 64, 4096)):
    dense, ours = (cost_model(eight, m, batch, ctx, 8, 3.35e12, 9.89e14) for m in ("dense", "predicated"))
    print(f"{name}: {dense:.2f} ms -> {ours:.2f} ms, {dense / ours:.2f}x")
dense, ours = (cost_model(eight, m, 4, 2048, 8, 3.35e12, 9.89e14) for m in ("dense_prefill", "compact"))
print(f"R3: {dense:.0f} ms -> {ours:.0f} ms, {dense / ours:.2f}x")

# %% [markdown]
# :::{dropdown} Where these numbers come from
# Query and output are $2\cdot4096^2=33.6$ M weights, the FFN $3\cdot4096\cdot14336=176.2$ M, key and value
# $2\cdot4096\cdot1024=8.4$ M, the head $4096\cdot128256=525.3$ M. All together
# $32\cdot218.1+525.3=7505$ M weights, 15.0 GB in bfloat16; at the H100's 3.35 TB/s that is 4.48 ms, and the
# cache of 512 tokens adds 0.02. Eight layers less: each saves $33.6+176.2-11.0=198.7$ M, minus 16 routers of
# 1.05 M.
# :::


# %% [markdown]
# ## Corrections
#
# - Summaries say that "each Transformer layer" gets a router. Only the upper half does: layer use of
#   Llama-3-8B lies between 16 and 32.
# - The gate multiplies the FFN's output ($g$) and the adapter's ($1-g$); attention is masked and not scaled.
#   Without these factors the language-model loss gives the router no gradient.
# - The router normalises its bottleneck (`router_norm` in the released weights), and reads the layer's own
#   input norm, not a new one.
# - The adapter does not "align" skipped tokens afterwards: it replaces the FFN for them.
# - The penalty is on the soft gates, squared per token after the sum over layers, not on the decisions.
# - Earlier methods are not all uniform; new are the frozen base and keys and values for every token.
# - The base of the paper's main table is Llama-3-8B-*Instruct*.
#
# ## Experiment
#
# ### Tasks whose difficulty is known
#
# The paper's claim is about difficulty: copied and repeated tokens should need fewer layers than computed
# ones. To test that, every character of an answer must have a known kind. The stand-in for Tulu-v2 and for
# the paper's list tasks is a mix of seven character-level tasks, generated here: `repeat` a list of
# numbers, `copy` a random string, fill a name into a fixed `phrase`, the `max` of a list, `add` numbers,
# `mul`tiply by one digit, and continue `prose` (the Python guides of the book's frozen corpus; its language
# reference is held out). Characters are *copied*, *fixed*, *computed* or *free* (prose). Items are split by
# a hash of their prompt, so that no test item is ever trained on.


# %%
ALPHABET = string.ascii_letters + string.digits + " .,;:!?'\"()-_=+*/<>[]{}#@%&\n"
TASKS = ("repeat", "copy", "phrase", "max", "add", "mul", "prose")
KINDS = {"c": "copied", "f": "fixed", "m": "computed", "p": "free"}
BEFORE, AFTER = "Dear ", ", thank you."
HELD_OUT = "python3.11-doc/reference/"


# %%
class Item(NamedTuple):
    """A prompt, its answer, and one letter per character of the answer that says of what kind it is."""

    task: str
    prompt: str
    answer: str
    kinds: str


@functools.cache
def prose_of(split: str) -> str:
    """Text of the guides: the language reference is the test topic, never seen in training."""
    if split == "test":
        pages = [d for d in corpus.documents(kinds="guide") if d.id.startswith(HELD_OUT)]
    else:
        pages = [d for d in corpus.documents(split, kinds="guide") if not d.id.startswith(HELD_OUT)]
    known = set(ALPHABET)
    return "\n".join("".join(c if c in known else " " for c in page.text) for page in pages)


# %%
def make_item(task: str, rng: np.random.Generator, shape: dict, split: str) -> Item:
    """One random item. `shape`: numbers of a list, terms of a sum (least, most), digits of a factor, …"""
    if task == "prose":
        text, (head, tail) = prose_of(split), shape["prose"]
        at = int(rng.integers(len(text) - head - tail))
        return Item(task, text[at : at + head], text[at + head : at + head + tail], "p" * tail)
    if task == "mul":
        low = 10 ** (shape["digits"] - 1)
        a, b = int(rng.integers(low, 10 * low)), int(rng.integers(2, 10))
        return Item(task, f"x {a}*{b}=", str(a * b), "m" * len(str(a * b)))
    if task in ("copy", "phrase"):
        word = "".join(string.ascii_lowercase[i] for i in rng.integers(26, size=shape["letters"]))
        if task == "copy":
            return Item(task, f"c {word}=", word, "c" * len(word))
        kinds = "f" * len(BEFORE) + "c" * len(word) + "f" * len(AFTER)
        return Item(task, f"p {word}=", BEFORE + word + AFTER, kinds)
    count = rng.integers(shape["terms"][0], shape["terms"][1] + 1) if task == "add" else shape["numbers"]
    numbers = rng.integers(10, 100, count).tolist()
    listed = " ".join(map(str, numbers))
    if task == "add":
        total = str(sum(numbers))
        return Item(task, f"a {'+'.join(map(str, numbers))}=", total, "m" * len(total))
    if task == "max":
        return Item(task, f"m {listed}=", str(max(numbers)), "mm")
    return Item(task, f"r {listed}=", listed, "c" * len(listed))


# %%
def split_of(item: Item) -> str:
    """train (80 %), validation or test (10 % each), by a hash of the prompt; prose is split by document."""
    share = hashlib.blake2b(f"{item.task}:{item.prompt}".encode(), digest_size=4).digest()
    part = int.from_bytes(share, "big") / 2**32
    return "train" if part < 0.8 else "validation" if part < 0.9 else "test"


def make_items(task: str, split: str, count: int, seed: int, shape: dict) -> list[Item]:
    """`count` items of one task and split; outside of training all are different.

    Raises ValueError for an unknown task or split, or where the task has fewer different items.
    """
    if task not in TASKS or split not in corpus.SPLITS:
        raise ValueError(
            f"task={task!r}, split={split!r}: accepted: {', '.join(TASKS)}; {', '.join(corpus.SPLITS)}"
        )
    rng, found, seen = np.random.default_rng([seed, TASKS.index(task), len(split)]), [], set()
    for _ in range(200 * count):
        item = make_item(task, rng, shape, split)
        if (task == "prose" or split_of(item) == split) and (split == "train" or item.prompt not in seen):
            seen.add(item.prompt)
            found.append(item)
            if len(found) == count:
                return found
    raise ValueError(f"count={count}: task {task!r} has only {len(found)} different {split} items")


# %%
def make_tokenizer():
    """One token per character, padded on the left for generation."""
    return lm.char_tokenizer(ALPHABET, padding_side="left")


def token_rows(texts: Sequence[str], tokenizer) -> list[np.ndarray]:
    """Ids of each text: one look-up per character, since the tokenizer itself takes a minute for a pool.

    Texts that hold a special token (of a model's answer) go through the tokenizer.
    """
    vocabulary, special = tokenizer.get_vocab(), tokenizer.all_special_tokens
    table = np.full(129, tokenizer.unk_token_id)
    table[[ord(c) for c in vocabulary if len(c) == 1]] = [i for c, i in vocabulary.items() if len(c) == 1]
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    rows = np.split(table[np.minimum(codes, 128)], np.cumsum([len(t) for t in texts])[:-1])
    for at in [i for i, t in enumerate(texts) if "<" in t and any(one in t for one in special)]:
        rows[at] = np.array(tokenizer(texts[at], add_special_tokens=False).input_ids)
    return rows


def encode(items: Sequence[Item], tokenizer, length: int = 0, device: str = "cpu") -> Batch:
    """Rows prompt + answer + end, padded on the right. Raises ValueError where `length` is too short."""
    prompts, answers = (token_rows([i[at] for i in items], tokenizer) for at in (1, 2))
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    sizes = starts + torch.tensor([len(a) + 1 for a in answers])[:, None]
    longest = int(sizes.max())
    if length and longest > length:
        raise ValueError(f"length={length}: the longest item has {longest} tokens")
    width = length or longest
    ids = np.full((len(items), width), tokenizer.pad_token_id)
    for row, prompt, answer in zip(ids, prompts, answers, strict=True):
        row[: len(prompt) + len(answer) + 1] = np.concatenate([prompt, answer, [tokenizer.eos_token_id]])
    at = torch.arange(width)
    masks = at < sizes, (at >= starts) & (at < sizes)
    return Batch(*(t.to(device) for t in (torch.from_numpy(ids), *masks)))


# %%
def training_pool(count: int, seed: int, shape: dict, mix: dict, length: int, device: str) -> Batch:
    """`count` training rows of all tasks in the shares of `mix`."""
    total = sum(mix.values())
    items = [
        i for t, w in mix.items() for i in make_items(t, "train", max(1, count * w // total), seed, shape)
    ]
    return encode(items, make_tokenizer(), length, device)


# %%
def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the answers (prompts and padding count nothing), logits (N, T, V)."""
    wanted = batch.ids[:, 1:].masked_fill(~batch.target[:, 1:], -100)  # -100: does not count
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten())


def draw(pool: Batch, size: int, generator: torch.Generator) -> Batch:
    """A random batch of the pool."""
    rows = torch.randint(len(pool.ids), (size,), generator=generator).to(pool.ids.device)
    return Batch(*(t[rows] for t in pool))


def by_length(pool: Batch, short: int, batch: int) -> list[tuple[Batch, int]]:
    """[(rows, how many of them a batch takes)]: those of at most `short` tokens, cut, and the longer ones."""
    few = pool.real.sum(1) <= short
    size = round(batch * float(few.float().mean()))
    return [(Batch(*(t[few, :short] for t in pool)), size), (Batch(*(t[~few] for t in pool)), batch - size)]


def base_model(size: dict, seed: int) -> LlamaForCausalLM:
    """A Llama of one of this chapter's sizes with random weights."""
    return lm.causal_lm(lm.causal_config("llama", make_tokenizer(), context=128, **size), seed)


# %%
def logits_of(model, ids: Tensor) -> Tensor:
    """Logits (N, T, V) of rows padded on the right, with nothing that a capture forbids."""
    return model.get_output_embeddings()(graphed.causal_states(model, ids))


def trainer(model, loss_of: Callable, steps: int, warmup: int, lr: float, weight_decay: float = 0.0):
    """A step of AdamW with warm-up and cosine, captured on a GPU."""
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = graphed.adamw(learns, lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    rate = lambda i: min(1, (i + 1) / max(1, warmup)) * (0.5 + 0.5 * math.cos(math.pi * i / steps))  # noqa: E731
    return graphed.GraphedStep(model, loss_of, [optimizer], rate)


def mixed_loss(model, *tensors: Tensor) -> Tensor:
    """`answer_loss` over several batches of different width, given one after the other."""
    parts = [Batch(*tensors[at : at + 3]) for at in range(0, len(tensors), 3)]
    counts = torch.stack([part.target[:, 1:].sum() for part in parts])
    losses = torch.stack([answer_loss(logits_of(model, part.ids), part) for part in parts])
    return (losses * counts).sum() / counts.sum()


def fit_base(model, steps: int, batch: int, lr: float, pool: Batch, seed: int, short: int = 0) -> list[float]:
    """Train all weights; returns the losses. short: rows up to this length go apart, for less padding."""
    generator, parts = torch.Generator().manual_seed(seed), [(pool, batch)]
    parts = by_length(pool, short, batch) if short else parts
    batches = ([t for part, size in parts for t in draw(part, size, generator)] for _ in range(steps))
    return trainer(model, mixed_loss, steps, steps // 20, lr, 0.01).fit(batches, "base")


# %%
def train_base(size: dict, shape: dict, mix: dict, pretrain: dict, seed: int = 0) -> dict[str, Any]:
    """The base model from scratch: its weights in two halves (float16) and its losses."""
    model = base_model(size, seed).to(run.device)
    pool = training_pool(pretrain["pool"], seed, shape, mix, pretrain["length"], run.device)
    options = {k: v for k, v in pretrain.items() if k not in ("pool", "length")}
    losses = fit_base(model, pool=pool, seed=seed, **options)
    state = {k: v.half() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    names = list(state)
    half = len(names) // 2
    return {"lower": {k: state[k] for k in names[:half]}, "upper": {k: state[k] for k in names[half:]},
            "losses": np.array(losses, np.float32)}  # fmt: skip


# %%
SMALL: dict[str, Any] = dict(  # the committed base model of `smoke` and `cpu`, and its items
    size=dict(width=96, depth=8, heads=4, num_key_value_heads=2, intermediate_size=256),
    shape=dict(numbers=3, terms=[2, 2], digits=2, letters=5, prose=[10, 20]),
    mix=dict(repeat=3, copy=3, phrase=1, max=2, add=8, mul=5, prose=3),
    pretrain=dict(steps=2200, batch=48, lr=3e-3, pool=60000, length=32),
)


def make_checkpoint(folder: str, seed: int = 0) -> None:
    """Train the small base model on the CPU (about six core-minutes) and save it in float16."""
    model, plan = base_model(SMALL["size"], seed), SMALL["pretrain"]
    pool = training_pool(plan["pool"], seed, SMALL["shape"], SMALL["mix"], plan["length"], "cpu")
    losses = fit_base(model, plan["steps"], plan["batch"], plan["lr"], pool, seed)
    print(f"{len(losses)} steps, loss {np.mean(losses[-50:]):.4f}")
    model.half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


# %% [markdown]
# ### The arms
#
# All arms start from one frozen base model and train the same adapters on the same batches for the same
# number of steps. They differ in who decides:
#
# - `flexidepth`: the router;
# - `static_adapter`, the sceptic's baseline: a fixed set of layers is skipped by every token, so that all
#   of the training goes into replacing them;
# - `random_adapter`: every token skips every routed layer with the rate that `flexidepth` reached;
# - `static`: ShortGPT, no training at all.
#
# The fixed sets have $k=\lfloor\text{mean skip of flexidepth}\rfloor$ layers: rounding favours the baselines.
# Ablations: a linear router; keys and values of skipped tokens hidden; no adapter.


# %%
def load_base(base: Any, size: dict):
    """The base model: the committed one ("small"), or that of a `train_base` unit."""
    if base == "small":
        folder = readrun.asset("flexidepth/base")
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(run.device).eval()
    model = base_model(size, 0)
    model.load_state_dict(
        {k: v.float() for part in ("lower", "upper") for k, v in base[part].items()}, strict=False
    )
    model.tie_weights()
    return model.to(run.device).eval()


def constant_mask(value: bool) -> Callable:
    """A force_mask by which all tokens run, or all skip."""
    return lambda shape, device: torch.full(shape, value, device=device)


def random_mask(rate: float) -> Callable:
    """A force_mask by which each token skips with probability `rate`, drawn anew at every call."""
    return lambda shape, device: torch.rand(shape, device=device) >= rate


# %%
def prepare(model, arm: str, reduction: int, skip: float, batch: Batch):
    """Convert `model` for an arm; `skip`: layers skipped per token that the forced arms must copy.

    Raises ValueError for an unknown arm.
    """
    gone = least_influential(model, math.floor(skip), batch) if arm == "static_adapter" else []
    convert(model, reduction=reduction)
    layers = routed(model)
    for i, layer in zip(model.config.routing_layers, layers, strict=True):
        if arm == "static_adapter":
            layer.force_mask, layer.force_gate = constant_mask(i not in gone), True
        elif arm == "random_adapter":
            layer.force_mask, layer.force_gate = random_mask(skip / len(layers)), True
        elif arm == "linear_router":
            layer.router = LinearRouter(model.config.hidden_size).to(run.device)
        elif arm == "no_kv":
            layer.hide_skipped = True
        elif arm == "no_adapter":
            layer.router_proj = None
        elif arm != "flexidepth":
            raise ValueError(f"arm={arm!r} is none of this chapter's")
    return model


# %%
def flexi_loss(model, batch: Batch, alpha: float) -> Tensor:
    """L_lm + alpha L_skip of a batch (alpha 0: forced arms)."""
    loss = answer_loss(logits_of(model, batch.ids), batch)
    if not alpha:
        return loss
    gates = torch.stack([layer.last_gate for layer in routed(model)])
    return loss + alpha * skip_loss(gates, batch.real)


def fit_routers(model, alpha: float, routers: dict, pool: Batch, seed: int) -> list[float]:
    """Train routers and adapters of a converted model; returns the losses."""
    steps, generator = routers["steps"], torch.Generator().manual_seed(seed)
    step = trainer(model, lambda m, *b: flexi_loss(m, Batch(*b), alpha), steps, steps // 30, routers["lr"])
    return step.fit((draw(pool, routers["batch"], generator) for _ in range(steps)), "routers")


# %% [markdown]
# ### Scoring
#
# An answer counts if the greedily generated text, with its end, is exactly right; prose counts by
# $\exp(-\text{NLL})$. Layer use is read in one pass over prompt and answer: the layers that a character used
# are those of the pass that produced it, one position earlier.


# %%
@torch.no_grad()
def generate_answers(model, items: Sequence[Item], new_tokens: int, cached: bool = True) -> list[str]:
    """Greedy answers with an "<eos>" where the model ended them. cached=False: without a KV cache."""
    tokenizer = make_tokenizer()
    prompts = tokenizer([i.prompt for i in items], add_special_tokens=False).input_ids
    ends = dict(eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    if cached:
        rows = decode.sample(model, prompts, new_tokens, temperature=0.0, **ends).completions
        return tokenizer.batch_decode(rows)
    ids, seen = (t.to(run.device) for t in decode.left_pad(prompts, ends["pad_id"]))
    found = model.generate(
        ids,
        attention_mask=seen,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=False,
        pad_token_id=ends["pad_id"],
        eos_token_id=ends["eos_id"],
    )
    return [text.replace(lm.PAD, "") for text in tokenizer.batch_decode(found[:, ids.shape[1] :])]


# %%
class Trace(NamedTuple):
    """What a pass over rows showed at each position but the last: see `trace`."""

    gates: Tensor  # (routed layers, N, T - 1), of the pass that predicts the next token
    masks: Tensor  # the decisions
    nll: Tensor  # (N, T - 1) of the next token
    entropy: Tensor  # (N, T - 1) of its distribution
    target: Tensor  # (N, T - 1) bool, whether the next token belongs to the answer (its end included)


@torch.no_grad()
def trace(model, batch: Batch, rows: int = 512) -> Trace:
    """Gates, losses and entropies in one teacher-forced pass (chunks of `rows`); fits plain models, too."""
    found: list[list[Tensor]] = [[], [], [], []]
    for at in range(0, len(batch.ids), rows):
        ids = batch.ids[at : at + rows]
        logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        layers = routed(model)
        empty = ids.new_zeros(0, *ids[:, 1:].shape)
        for kept, name in ((found[0], "last_gate"), (found[1], "last_mask")):
            kept.append(torch.stack([getattr(v, name)[:, :-1] for v in layers]) if layers else empty)
        found[2].append(-logp.gather(-1, ids[:, 1:, None])[..., 0])
        found[3].append(-(logp.exp() * logp).sum(-1))
    gates, masks = torch.cat(found[0], 1), torch.cat(found[1], 1)
    return Trace(gates, masks.bool(), torch.cat(found[2]), torch.cat(found[3]), batch.target[:, 1:])


def mean_skip(seen: Trace) -> float:
    """Routed layers skipped per answer token."""
    return float((~seen.masks).sum(0)[seen.target].float().mean()) if len(seen.masks) else 0.0


# %%
def held_out(split: str, count: int, shape: dict) -> list[Item]:
    """`count` items of each task, task by task."""
    return [i for task in TASKS for i in make_items(task, split, count, 7, shape)]


def kinds_of(items: Sequence[Item], width: int) -> np.ndarray:
    """Kind of the token predicted at each of `width` positions ("" outside of answers), (N, width)."""
    out = np.full((len(items), width), "", dtype="<U1")
    for row, item in enumerate(items):
        start = len(item.prompt) - 1
        out[row, start : start + len(item.kinds)] = list(item.kinds)
    return out


def layers_per_item(used: np.ndarray, items: Sequence[Item]) -> np.ndarray:
    """Mean layers used over the characters of each answer (of a phrase: its fixed ones), (N,)."""
    kinds = kinds_of(items, used.shape[1])
    keep = (kinds != "") & ~((kinds == "c") & (np.array([i.task for i in items]) == "phrase")[:, None])
    return (used * keep).sum(1) / keep.sum(1)


def score_model(model, items: Sequence[Item], new_tokens: int, cached: bool = True) -> dict[str, Any]:
    """score per item (prose: NLL per character), skip per generated token, layers and use per task."""
    tokenizer, n = make_tokenizer(), len(items) // len(TASKS)
    asked = [i for i in items if i.task != "prose"]
    texts = generate_answers(model, asked, new_tokens, cached)
    exact = [t == i.answer + lm.EOS for t, i in zip(texts, asked, strict=True)]
    made = [i._replace(answer=t.replace(lm.EOS, "")) for i, t in zip(asked, texts, strict=True)]
    skip = mean_skip(trace(model, encode(made, tokenizer, device=run.device)))
    seen = trace(model, encode(items, tokenizer, device=run.device))
    prose = np.array([i.task == "prose" for i in items])
    nll = (seen.nll * seen.target).sum(1)[torch.from_numpy(prose)] / seen.target.sum(1)[
        torch.from_numpy(prose)
    ]
    below = len(model.model.layers) - len(routed(model))
    used = below + seen.masks.sum(0).cpu().numpy()
    ran = (seen.masks & seen.target).sum(2).reshape(-1, len(TASKS), n).sum(2)
    per_task = ran / seen.target.reshape(len(TASKS), -1).sum(1)
    return {"exact": np.array(exact, np.float32).reshape(len(TASKS) - 1, n), "nll": nll.cpu().numpy(),
            "skip": skip, "layers": layers_per_item(used, items).reshape(len(TASKS), n).astype(np.float32),
            "use": per_task.T.cpu().numpy()}  # fmt: skip


# %%
def task_scores(exact: np.ndarray, nll: np.ndarray) -> np.ndarray:
    """Score of each task in the order of TASKS: exact match, and exp(-NLL) of prose."""
    return np.append(exact.mean(1), math.exp(-float(nll.mean())))


def retained(scores: np.ndarray, base: np.ndarray, least: float = 0.1) -> float:
    """Mean of score / base score over the tasks on which the base model reaches `least`.

    Raises ValueError where it reaches that on no task.
    """
    good = base >= least
    if not good.any():
        raise ValueError(f"the base model scores below {least} on every task")
    return float((scores[good] / base[good]).mean())


# %%
def partial_correlation(used: np.ndarray, entropy: np.ndarray, items: Sequence[Item]) -> float:
    """Correlation of layer use with "computed" over copied and computed characters, all else fixed.

    used, entropy: (N, T - 1). Held fixed: entropy, and the place in the answer (one indicator each).
    """
    kinds, rows = kinds_of(items, used.shape[1]), []
    for r, item in enumerate(items):
        start = len(item.prompt) - 1
        rows += [
            (used[r, start + t], entropy[r, start + t], t, kind == "m")
            for t, kind in enumerate(kinds[r, start : start + len(item.kinds)])
            if kind in "cm"
        ]
    y, h, at, x = np.array(rows, float).T
    held = np.column_stack([h, *(at == place for place in np.unique(at))]).astype(float)
    y, x = (v - held @ np.linalg.lstsq(held, v, rcond=None)[0] for v in (y, x))
    norm = float(np.sqrt((y @ y) * (x @ x)))
    return float(y @ x) / norm if norm > 1e-9 else 0.0


# %%
def tune_tau(model, batch: Batch, target: float, steps: int = 14) -> tuple[float, float]:
    """(tau, skip): the threshold at which answers of `batch` skip `target` layers, by bisection."""
    low, high, best = 0.0, 1.0, (0.5, math.inf)
    for _ in range(steps):
        tau = (low + high) / 2
        for layer in routed(model):
            layer.tau = tau
        skip = mean_skip(trace(model, batch))
        best = (tau, skip) if abs(skip - target) < abs(best[1] - target) else best
        low, high = (tau, high) if skip < target else (low, tau)
    for layer in routed(model):
        layer.tau = best[0]
    return best


# %%
def base_scores(base: Any, size: dict, shape: dict, evaluate: dict) -> dict[str, Any]:
    """The base model's own scores, and ShortGPT's with k = 1, 2, … layers removed (scores per task)."""
    model, items = load_base(base, size), held_out("test", evaluate["items"], shape)
    own = score_model(model, items, evaluate["new_tokens"])
    hint = encode(held_out("validation", 8, shape), make_tokenizer(), device=run.device)
    depth = len(model.model.layers)
    static = []
    for k in range(1, min(evaluate["removed"], depth - depth // 2) + 1):
        found = score_model(static_skip(model, k, hint), items, evaluate["new_tokens"])
        static.append(task_scores(found["exact"], found["nll"]))
    influence = block_influence(model, hint).cpu().numpy()
    return {"exact": own["exact"], "nll": own["nll"], "static": np.array(static), "influence": influence}


# %%
def histogram(seen: Trace, bins: int = 20) -> np.ndarray:
    """Share of answer tokens per gate bin and routed layer, (routed layers, bins)."""
    edges = np.linspace(0, 1, bins + 1)
    values = [gates[seen.target].float().cpu().numpy() for gates in seen.gates]
    return np.array([np.histogram(v, edges)[0] / max(1, len(v)) for v in values])


# %%
def train_arm(arm: str, seed: int, alpha: float, base: Any, size: dict, shape: dict, mix: dict,
              routers: dict, evaluate: dict, taus: list, like: Any = None) -> dict[str, Any]:  # fmt: skip
    """One arm, one seed: training and all of its measurements. `like`: the flexidepth unit it must copy."""
    tokenizer, model = make_tokenizer(), load_base(base, size)
    items = held_out("test", evaluate["items"], shape)
    test = encode(items, tokenizer, device=run.device)
    check = encode(
        held_out("validation", max(8, evaluate["items"] // 4), shape), tokenizer, device=run.device
    )
    entropy = trace(model, test).entropy.cpu().numpy()
    skip = 0.0 if like is None else like["skip"]
    hint = encode(held_out("validation", 8, shape), tokenizer, device=run.device)
    prepare(model, arm, routers["reduction"], skip, hint)
    before = histogram(trace(model, check))
    pool = training_pool(routers["pool"], seed, shape, mix, routers["length"], run.device)
    forced = arm in ("static_adapter", "random_adapter")
    losses = fit_routers(model, 0.0 if forced else alpha, routers, pool, seed)
    ablation = arm in ("linear_router", "no_kv", "no_adapter")
    tuned = tune_tau(model, check, like["validation_skip"])[0] if ablation else 0.5
    out = {
        "losses": np.array(losses, np.float32),
        "tau": tuned,
        "validation_skip": mean_skip(trace(model, check)),
    }
    out |= score_model(model, items, evaluate["new_tokens"], cached=arm != "no_kv")
    if arm == "flexidepth":
        seen, below = trace(model, test), len(model.model.layers) - len(routed(model))
        out |= {"before": before, "after": histogram(trace(model, check))}
        out["partial"] = partial_correlation(below + seen.masks.sum(0).cpu().numpy(), entropy, items)
        out |= shuffled_control(model, test, items) | tau_curve(model, items, evaluate, taus)
    return out


# %%
def shuffled_control(model, test: Batch, items: Sequence[Item]) -> dict[str, Any]:
    """Layers per item when the routers read other tokens' inputs."""
    for layer in routed(model):
        layer.shuffle = True
    below = len(model.model.layers) - len(routed(model))
    used = below + trace(model, test, rows=len(test.ids)).masks.sum(0).cpu().numpy()
    for layer in routed(model):
        layer.shuffle = False
    return {"shuffled": layers_per_item(used, items).reshape(len(TASKS), -1).astype(np.float32)}


def tau_curve(model, items: Sequence[Item], evaluate: dict, taus: list) -> dict[str, Any]:
    """At each tau: skip and scores per task; for one item per task the text and its layers."""
    rows, texts, layers = [], [], []
    n, first = len(items) // len(TASKS), [items[i] for i in range(0, len(items), len(items) // len(TASKS))]
    for tau in taus:
        for layer in routed(model):
            layer.tau = tau
        found = score_model(model, items, evaluate["new_tokens"])
        rows.append([found["skip"], *task_scores(found["exact"], found["nll"])])
        said = generate_answers(model, first, evaluate["new_tokens"])
        made = [i._replace(answer=t.replace(lm.EOS, "")) for i, t in zip(first, said, strict=True)]
        seen = trace(model, encode(made, make_tokenizer(), device=run.device))
        used = len(model.model.layers) - len(routed(model)) + seen.masks.sum(0).cpu().numpy()
        cut = [used[r, len(i.prompt) - 1 : len(i.prompt) - 1 + len(i.answer)] for r, i in enumerate(made)]
        layers.append([row.tolist() for row in cut])
        texts.append(
            [[i.prompt, i.answer, bool(i.answer == f.answer)] for i, f in zip(made, first, strict=True)]
        )
    for layer in routed(model):
        layer.tau = 0.5
    return {"curve": np.array(rows), "texts": texts, "text_layers": layers, "items": n}


# %% [markdown]
# ### Training
#
# In order of importance: the base model; the price $\alpha$, chosen among three on a seed that is used for
# nothing else (the smallest whose routers skip 30 % of the depth on validation items: a little more than the
# claim's quarter, which every seed has to reach); then for every seed the router and the trained baselines;
# then the ablations.

# %%
TUNING_SEED = 1000
base: Any = "small"
if not S.from_checkpoint:
    base = run.unit(train_base, size=S.size, shape=S.shape, mix=S.mix, pretrain=S.pretrain)
size = SMALL["size"] if base == "small" else S.size
common = dict(
    base=base, size=size, shape=S.shape, mix=S.mix, routers=S.routers, evaluate=S.evaluate, taus=S.taus
)
scored = run.unit(base_scores, base=base, size=size, shape=S.shape, evaluate=S.evaluate)


def choose_alpha(skips: dict[float, float], least: float) -> float:
    """The smallest alpha whose validation skip reaches `least` layers, else the largest."""
    return min((a for a, skip in skips.items() if skip >= least), default=max(skips))


sweep = {}
if len(S.alphas) > 1:
    plan = common | {"taus": []}
    sweep = {a: run.unit(train_arm, arm="flexidepth", seed=TUNING_SEED, alpha=a, **plan) for a in S.alphas}
ready = len(S.alphas) == 1 or all(unit.done for unit in sweep.values())
alpha = S.alphas[0]
if sweep and ready:
    alpha = choose_alpha({a: u["validation_skip"] for a, u in sweep.items()}, 0.3 * size["depth"])
trained: dict[tuple[str, int], readrun.Unit] = {}
for arm in [*S.arms, *S.ablations] if ready else []:
    for s in run.seeds[: 1 if arm in S.ablations else None]:
        like = trained.get(("flexidepth", s))
        if arm != "flexidepth" and like is None:
            continue
        options = common | {"taus": S.taus if s == run.seeds[0] else []}  # curves: one seed
        unit = run.unit(train_arm, arm=arm, seed=s, alpha=alpha, like=like, **options)
        if unit.done:
            trained[arm, s] = unit
print(f"alpha {alpha:g}; {len(trained)} training runs are there")


# %% [markdown]
# ### Operations, counted
#
# Before time is measured: does the compact path really do less? `FlopCounterMode` counts every matrix product
# of a prefill with forced masks; the formula of step 9 predicts it.


# %%
def count_flops(batch: int, length: int, skip: float, seed: int) -> dict[str, Any]:
    """Operations of matrix products in compact prefill, counted and by the formula, on a small model."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = convert(lm.causal_lm(config, seed))
    rt = FlexiRuntime(model, batch, length, "compact")
    rng = torch.Generator().manual_seed(seed)
    force = (torch.rand(2, batch, length, generator=rng) >= skip).to(torch.int8)
    counter = FlopCounterMode(display=False)
    with counter:
        rt.prefill(torch.randint(96, (batch, length), generator=rng), force)
    names = ("mm", "addmm", "bmm")
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in names
    )
    w, tokens, run_tokens = linear_sizes(config), batch * length, int(force.sum())
    full, small = w["qo"] + w["ffn"], w["adapter"]
    layers = 2 * tokens * (w["qo"] + w["kv"] + w["ffn"]) + 2 * tokens * (w["kv"] + w["router"])
    formula = 2 * (layers + run_tokens * full + (2 * tokens - run_tokens) * small + batch * w["head"])
    return {"counted": float(counted), "formula": float(formula)}


flops = run.unit(count_flops, batch=2, length=24, skip=0.5, seed=0)
if flops.done:
    print(f"{flops['counted'] / 1e6:.2f} M counted, {flops['formula'] / 1e6:.2f} M by the formula")

# %% [markdown]
# ### Time at Llama-3-8B's dimensions
#
# Random weights, because time depends on shapes only. Masks are drawn on the device at every step, each
# routed layer skipped with probability one half, so that no lucky pattern is cached; on average 8 of 32
# layers are skipped. Dense and skipping steps take turns. The baseline is the best of our own dense mode
# and of transformers' model, eager and compiled, captured like ours. On a CPU the same functions run on a
# tiny model: that tests the code, and its times mean nothing.


# %%
def speed_model(speed: dict):
    """A converted Llama of the wanted dimensions with random weights, bfloat16 on a GPU, float32 else."""
    config = LlamaConfig(**LLAMA_8B | dict(
        vocab_size=speed["vocab"], hidden_size=speed["width"], intermediate_size=speed["ffn"],
        num_hidden_layers=speed["depth"], num_attention_heads=speed["heads"],
        num_key_value_heads=speed["kv_heads"], bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    kind = torch.bfloat16 if run.device == "cuda" else torch.float32
    gc.collect()  # compiled peers of an earlier measurement are cycles, and hold its 16 GB
    return convert(clock.random_model(LlamaForCausalLM, config, kind, run.device)).requires_grad_(False)


def plain_of(model):
    """The same Llama without routers, sharing its weights."""
    with torch.device("meta"):
        plain = LlamaForCausalLM(model.config)
    state = {k: v for k, v in model.state_dict().items() if ".router" not in k}
    plain.load_state_dict(state, assign=True, strict=False)
    plain.model.rotary_emb = model.model.rotary_emb
    return plain.eval().requires_grad_(False)


# %%
def captured(call: Callable, warmup: int = 3) -> Callable:
    """A CUDA graph of `call` on a GPU (its replay), else `call` itself."""
    if run.device != "cuda":
        return call
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def take_turns(calls: dict[str, Callable], repeats: int, warmup: int) -> dict[str, np.ndarray]:
    """Milliseconds of each call, all of them once per round, after `warmup` rounds."""
    out: dict[str, list[float]] = {name: [] for name in calls}
    events: list[tuple] = []
    for i in range(warmup + repeats):
        for name, call in calls.items():
            if run.device == "cuda":
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[0].record()
                call()
                marks[1].record()
                events += [(name, *marks)] if i >= warmup else []
            else:
                start = time.perf_counter()
                call()
                out[name] += [1e3 * (time.perf_counter() - start)] if i >= warmup else []
    if run.device == "cuda":
        torch.cuda.synchronize()
    for name, start, end in events:
        out[name].append(start.elapsed_time(end))
    return {name: np.array(values) for name, values in out.items()}


# %%
class SlotLayer(StaticLayer):
    """Keys and values of one layer for transformers' model, written at one fixed slot."""

    def __init__(self, cache: Tensor, slot: Tensor) -> None:
        super().__init__(max_cache_len=cache.shape[3])
        self.keys, self.values, self.slot, self.is_initialized = cache[0], cache[1], slot, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object):
        """Write the new token's key and value; return the whole cache."""
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_seq_length(self, *_: object) -> int:
        """0: positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: Any, *_: object) -> tuple[int, int]:
        """(length, offset) of keys; unused, since a mask is always given."""
        return self.keys.shape[2], 0


def peer_step(model, cache: Tensor, ids: Tensor, ctx: int) -> Callable:
    """One decode step of a transformers model at context `ctx`, its cache in our tensor."""
    slot = torch.tensor([ctx - 1], device=ids.device)
    layers = [SlotLayer(cache[i][:, : len(ids), :, :ctx], slot) for i in range(len(cache))]
    mask = torch.zeros(len(ids), 1, 1, ctx, dtype=cache.dtype, device=ids.device)
    positions = slot[None].expand(len(ids), 1)
    return lambda: model(ids[:, None], past_key_values=Cache(layers=layers), attention_mask=mask,
                         position_ids=positions).logits  # fmt: skip


def try_all(makers: dict[str, Callable], graph: bool = True) -> tuple[dict[str, Callable], dict[str, str]]:
    """(calls, captured if `graph`; {name: error}): a peer that fails on this version must not end all."""
    calls, errors = {}, {}
    for name, make in makers.items():
        try:
            calls[name] = captured(make()) if graph else make()
            calls[name]()
        except Exception as error:  # whatever a version of torch or transformers raises
            calls.pop(name, None)
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    return calls, errors


# %%
def compiled_peer(model) -> Any:
    """The plain model with norms and FFNs compiled (one graph for all layers); it shares all weights."""
    fast = plain_of(model)
    mlp, norm = torch.compile(lambda m, y: type(m).forward(m, y)), torch.compile(rms_norm)
    for layer in fast.model.layers:
        layer.mlp.forward = functools.partial(mlp, layer.mlp)
        for part in (layer.input_layernorm, layer.post_attention_layernorm):
            part.forward = functools.partial(lambda p, x: norm(x, p.weight, p.variance_epsilon), part)
    return fast


# %%
def drawn_masks(layers: int, batch: int, correlated: float) -> Tensor:
    """Fresh decisions (layers, batch) int8: run with probability 1/2; with probability `correlated` that of
    the first sequence."""
    own = torch.rand(layers, batch, device=run.device) >= 0.5
    follow = torch.rand(layers, batch, device=run.device) < correlated
    return torch.where(follow, own[:, :1], own).to(torch.int8)


def peer_makers(model, rt: FlexiRuntime, ids: Tensor, ctx: int) -> dict[str, Callable]:
    """transformers' model, eager and compiled, and the masked model with random masks."""
    plain = plain_of(model)
    for layer in routed(model):
        layer.force_mask = random_mask(0.5)
    makers = {"hf": lambda: peer_step(plain, rt.cache, ids, ctx),
              "hf_masked": lambda: peer_step(model, rt.cache, ids, ctx)}  # fmt: skip
    if run.device == "cuda":  # compiling takes a minute on a CPU and shows nothing there
        makers["hf_compiled"] = lambda: peer_step(compiled_peer(model), rt.cache, ids, ctx)
    return makers


# %%
def bench(batch: int, ctx: int, speed: dict, tuned: Any = None,
          modes: Sequence[str] = ("dense", "predicated"),
          peers: bool = False, correlated: float = 0.0, model: Any = None) -> dict[str, Any]:  # fmt: skip
    """Milliseconds per decode step of several modes at one batch and context, and what was really skipped.

    modes: of the runtime; "dense_cublas" is dense with all products in cuBLAS. tuned: a `tune_kernels` unit
    (block sizes). peers: also transformers' model, eager and compiled, and the masked model. Raises
    ValueError on a CPU unless speed["tiny"].
    """
    if run.device != "cuda" and not speed["tiny"]:
        raise ValueError(
            "device: bench measures a GPU; on a CPU only a tiny model (speed['tiny']) is accepted"
        )
    model = speed_model(speed) if model is None else model
    rt = FlexiRuntime(model, batch, ctx)
    rt.cache.normal_()
    rt.lengths.fill_(ctx - 1)
    use_tuned(rt, tuned, batch)
    ids, count = torch.randint(speed["vocab"], (batch,), device=run.device), len(routed(model))
    made, ran = {}, torch.zeros(2, device=run.device)

    def step_of(mode: str) -> Callable:
        def step() -> None:
            rt.mode, rt.kernel_rows = mode.removesuffix("_cublas"), 0 if mode.endswith("_cublas") else 8
            force = None if rt.mode == "dense" else drawn_masks(count, batch, correlated)
            made[mode] = rt.step(ids, force)
            if force is not None:
                ran.add_(torch.stack([force.float().sum(), torch.full((), force.numel(), device=run.device)]))

        return step

    makers: dict[str, Callable] = {mode: functools.partial(step_of, mode) for mode in modes}
    makers |= peer_makers(model, rt, ids, ctx) if peers else {}
    with torch.no_grad():
        calls, errors = try_all(makers)
        times = take_turns(calls, speed["repeats"], speed["warmup"])
    share = (ran[0] / ran[1].clamp_min(1)).item()
    return {f"ms__{k}": v for k, v in times.items()} | {"errors": errors, "skipped": count * (1 - share)}


# %%
def bench_prefill(batch: int, length: int, speed: dict) -> dict[str, Any]:
    """Milliseconds of prefilling batch x length tokens: dense, compact, masked, transformers."""
    if run.device != "cuda" and not speed["tiny"]:
        raise ValueError(
            "device: bench measures a GPU; on a CPU only a tiny model (speed['tiny']) is accepted"
        )
    model = speed_model(speed)
    rt, count = FlexiRuntime(model, batch, length), len(routed(model))
    ids = torch.randint(speed["vocab"], (batch, length), device=run.device)
    shape, skipped = (count, batch, length), []

    def call(mode: str) -> None:
        rt.mode = mode
        force = None if mode == "dense" else (torch.rand(shape, device=run.device) >= 0.5).to(torch.int8)
        rt.prefill(ids, force)
        if force is not None:
            skipped.append(count * (1 - force.float().mean()))

    def peer(compile_it: bool) -> Callable:
        plain = plain_of(model)
        for layer in plain.model.layers if compile_it else ():
            layer.compile()  # no cache, so that one graph serves all layers
        return lambda: plain(ids, use_cache=False, logits_to_keep=1)

    makers = {
        mode: lambda mode=mode: functools.partial(call, mode) for mode in ("dense", "compact", "masked")
    }
    makers |= {"hf": lambda: peer(False)} | (
        {"hf_compiled": lambda: peer(True)} if run.device == "cuda" else {}
    )
    with torch.no_grad():
        calls, errors = try_all(makers, graph=False)
        times = take_turns(calls, max(3, speed["repeats"] // 4), max(1, speed["warmup"] // 5))
    moves = gather_share(rt, ids, count) if run.device == "cuda" else 0.0
    found = {"skipped": float(torch.stack(skipped).mean()), "gather_ms": moves, "errors": errors}
    return {f"ms__{k}": v for k, v in times.items()} | found


# %%
def gather_share(rt: FlexiRuntime, ids: Tensor, count: int) -> float:
    """Milliseconds that one routed layer spends on looking, gathering and putting back rows."""
    x = torch.randn(ids.numel(), rt.config.hidden_size, dtype=rt.dtype, device=ids.device)
    mask = torch.rand(len(x), device=ids.device) >= 0.5

    def move() -> None:
        run_rows, skip_rows = compact(mask)
        y = x.clone()
        for _ in range(2):
            y.index_copy_(0, run_rows, y[run_rows])
        y.index_copy_(0, skip_rows, y[skip_rows])

    return clock.time(move, warmup=3, repeat=10).median_ms


# %%
@torch.no_grad()
def same_outputs(speed: dict, tuned: Any, length: int = 64) -> dict[str, Any]:
    """Norm of logit differences over norm, against the masked mode under the same masks: compact prefill, and
    predicated decoding of one and of 16 sequences from the same prefix, with the block sizes in use."""
    model, out = speed_model(speed), {}
    rt = FlexiRuntime(model, 16, length + 2)
    count, size = len(routed(model)), min(16, speed["batches"][-1])

    def difference(a: Tensor, b: Tensor) -> float:
        return ((a.float() - b.float()).norm() / b.float().norm()).item()

    for batch in (1, size):
        use_tuned(rt, tuned, batch)
        ids = torch.randint(speed["vocab"], (batch, length + 1), device=run.device)
        force = (torch.rand(count, batch, length + 1, device=run.device) >= 0.5).to(torch.int8)
        logits: dict[str, list] = {}
        for prefix, then in (("masked", "masked"), ("compact", "predicated"), ("masked", "dense")):
            rt.mode = prefix
            first = rt.prefill(ids[:, :length], force[:, :, :length])
            rt.mode = then
            logits[then] = [first, rt.decode(ids[:, length], force[:, :, length].contiguous())]
        for name, i in (("compact", 0), ("predicated", 1)):
            out[f"{name}_{batch}"] = difference(logits["predicated"][i], logits["masked"][i])
        out[f"dense_{batch}"] = difference(
            logits["dense"][1], logits["masked"][1]
        )  # must be far: masks matter
    return out


# %%
def use_tuned(rt: FlexiRuntime, tuned: Any, batch: int) -> None:
    """Give a runtime the choices of a `tune_kernels` unit (None: none) for a number of sequences."""
    rt.blocks, rt.attention, rt.chunk = {}, {}, 256
    if tuned is not None:
        rows = "one" if batch == 1 else "few"
        rt.blocks = {k.split("/")[1]: tuple(v) for k, v in tuned["blocks"].items() if k.startswith(rows)}
    if tuned is not None and batch > 8:  # chosen where many sequences fill the GPU; few need short chunks
        rt.attention = dict(tuned["attention"])
        rt.chunk = rt.attention.pop("chunk")


def product(name: str, x: Tensor, out: Tensor, others: tuple, blocks: Any, w: Tensor) -> None:
    """One matrix-vector product of a layer as `one_layer` launches it; others: mask, gate, norm."""
    mask, gate, norm = others
    if name == "in":  # norm and SwiGLU ride along
        width = len(w) // 2
        _launch_gemv(x, w, out, mask, (width, w.shape[1], 0, 0), norm=norm, eps=1e-5, glu=True, blocks=blocks)
    elif name == "out":  # so do gate and residual
        _launch_gemv(x, w, out, mask, (*w.shape, 0, 0), gate=gate, add=True, blocks=blocks)
    elif name == "o":
        gemv_pred(x, w, mask, out, add=True, blocks=blocks)
    else:
        gemv_pred(x, w, mask, out, norm=norm, eps=1e-5, blocks=blocks)


# %%
@torch.no_grad()
def tune_kernels(speed: dict) -> dict[str, Any]:
    """Best block sizes per product and attention; their GB/s, timed again; their error; a copy's GB/s."""
    d, f, kv = speed["width"], speed["ffn"], speed["kv_heads"] * (speed["width"] // speed["heads"])
    cuda = run.device == "cuda"
    kind = torch.bfloat16 if cuda else torch.float32
    shapes = {"kv": (2 * kv + d // 16, d), "q": (d, d), "qkv": (d + 2 * kv, d), "o": (d, d)}
    shapes |= {"in": (2 * f, d), "out": (d, f)} if cuda else {}
    found: dict[str, Any] = {"blocks": {}, "gb_s": {}, "errors": {}}
    repeat = max(3, speed["repeats"] // 10)  # replays of twenty calls: one takes the GPU less than the host
    for name, (n, k) in shapes.items():
        weights = [(w,) for (w,) in clock.rotate(torch.randn(n, k, device=run.device).to(kind))]
        for rows, count in (("one", 1), ("few", 4)):
            x, norm = (torch.randn(*s, device=run.device).to(kind) for s in ((count, k), (k,)))
            out = torch.zeros(count, n // 2 if name == "in" else n, device=run.device, dtype=kind)
            mask = torch.ones(count, dtype=torch.int8, device=run.device)
            others = mask, torch.ones(count, device=run.device), norm

            def ms_of(blocks: Any) -> float:
                call = functools.partial(product, name, x, out, others, blocks)  # noqa: B023
                return replay.time(call, inputs=weights, warmup=3, repeat=repeat, device=run.device).median_ms  # noqa: B023

            best = fastest(
                ms_of, VARIANTS[rows] if cuda else VARIANTS[rows][:1], found["errors"], f"{rows}/{name}/"
            )
            found["blocks"][f"{rows}/{name}"] = list(best)
            found["gb_s"][f"{rows}/{name}"] = 1e-6 * n * k * kind.itemsize / ms_of(best)
    found |= tune_attention(speed, kind, found["errors"])
    shape = dict(d=d, f=f, heads=speed["heads"], kv_heads=speed["kv_heads"], ctx=speed["long"][1])
    checks = []
    for rows, count in (("one", 1), ("few", 4)):  # what will be timed is what is compared with float64
        blocks = {k.split("/")[1]: tuple(v) for k, v in found["blocks"].items() if k.startswith(rows)}
        how = dict(rows=count, device=run.device, blocks=blocks, attention=found["attention"])
        checks.append(kernel_errors(**shape, **how))
    found["error"] = max(v for check in checks for v in check.values())
    return found | (clock.ceilings(run.device, kind) if cuda else {"copy_gb_s": 1.0, "matmul_tflop_s": 1.0})


# %%
def fastest(ms_of: Callable, variants: Sequence[tuple], errors: dict, name: str) -> tuple:
    """The variant with the least `ms_of`; what does not compile here goes to `errors`. RuntimeError: none."""
    took = {}
    for variant in variants:
        try:
            took[variant] = ms_of(variant)
        except Exception as error:  # whatever a version of triton raises
            errors[f"{name}{variant}"] = f"{type(error).__name__}: {error}"[:200]
    if not took:
        raise RuntimeError(f"no variant of {name} ran: {errors}")
    return min(took, key=took.__getitem__)


# %%
@torch.no_grad()
def tune_attention(speed: dict, kind: torch.dtype, errors: dict) -> dict[str, Any]:
    """Best options of the attention kernel at the long batch; milliseconds with all and half of it active,
    timed after the choice."""
    batch, ctx = speed["long"]
    heads, dim = speed["kv_heads"], speed["width"] // speed["heads"]
    cache = torch.randn(2, batch, heads, ctx, dim, device=run.device, dtype=kind)
    q = torch.randn(batch, speed["heads"], dim, device=run.device, dtype=kind)
    table = torch.rand(ctx, dim, device=run.device)
    lengths = torch.full((batch,), ctx - 1, dtype=torch.int32, device=run.device)
    every = torch.ones(batch, dtype=torch.int8, device=run.device)
    half = (torch.arange(batch, device=run.device) % 2).to(torch.int8)
    out = torch.zeros(batch, speed["heads"] * dim, device=run.device, dtype=kind)
    repeat = max(3, speed["repeats"] // 20)

    def ms_of(variant: tuple, active: Tensor = every) -> float:
        block, chunk, warps = variant
        call = functools.partial(
            decode_attn_pred, q, cache, lengths, active, table, table, out, None, block, chunk, warps
        )
        return replay.time(call, warmup=3, repeat=repeat, device=run.device).median_ms

    variants = [(64, 512, 4), (64, 1024, 4), (128, 512, 8), (32, 512, 4), (128, 1024, 4), (64, 256, 4)]
    best = fastest(ms_of, variants if run.device == "cuda" else variants[:1], errors, "attention/")
    block, chunk, warps = best
    return {"attention": dict(block=block, chunk=chunk, warps=warps), "attention_ms": ms_of(best),
            "attention_half_ms": ms_of(best, half), "attention_gb": 1e-9 * cache.nbytes}  # fmt: skip


# %%
def bench_sweep(speed: dict, tuned: Any) -> dict[str, Any]:
    """Median milliseconds of dense, predicated, masked steps for every batch and context."""
    rows, short = (
        [],
        speed | {"repeats": max(3, speed["repeats"] // 4), "warmup": max(1, speed["warmup"] // 4)},
    )
    model, kept = speed_model(speed), {}
    for ctx in speed["contexts"]:
        for batch in speed["batches"]:
            found = bench(batch, ctx, short, tuned, ("dense", "predicated", "masked"), model=model)
            ms = [float(np.median(found[f"ms__{m}"])) if f"ms__{m}" in found else -1.0
                  for m in ("dense", "predicated", "masked")]  # fmt: skip
            rows.append([batch, ctx, *ms])
            if batch == 8 and ctx == speed["contexts"][0]:
                kept = {
                    f"eight__{m}": found[f"ms__{m}"] for m in ("dense", "predicated") if f"ms__{m}" in found
                }
    found = bench(
        min(4, speed["batches"][-1]), speed["contexts"][0], short, tuned, correlated=0.8, model=model
    )
    kept |= {f"correlated__{m}": found[f"ms__{m}"] for m in ("dense", "predicated") if f"ms__{m}" in found}
    return {"rows": np.array(rows)} | kept


# %% [markdown]
# Before they are timed, the kernels are compared with float64 references on fresh random inputs, for every
# shape in use; and at small odd shapes under NVIDIA's `compute-sanitizer`, where the machine has it, which
# finds reads and writes outside of a tensor. (On a CPU the references are compared with themselves.)


# %%
def error_of(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()


@torch.no_grad()
def kernel_errors(d: int, f: int, heads: int, kv_heads: int, ctx: int, rows: int, device: str,
                  blocks: Any = None, attention: Any = None) -> dict[str, float]:  # fmt: skip
    """Errors of every kernel at one model shape against float64, every other row active.

    blocks, attention: block sizes per product and options of attention, as `tune_kernels` finds them.
    """
    blocks = blocks or {}
    kind, dim, a = torch.bfloat16 if device == "cuda" else torch.float32, d // heads, f // 16
    new = lambda *shape: (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(kind)  # noqa: E731
    x, norm = new(rows, d) * d**0.5, torch.rand(d, device=device).to(kind)
    active, out = (torch.arange(rows, device=device) % 2 == 0).to(torch.int8), {}
    run_rows, y = active.bool(), rms_norm(x.double(), norm.double(), 1e-5)
    kv = 2 * kv_heads * dim
    for name, n in (("q", d), ("kv", kv + d // 16), ("qkv", d + kv), ("o", d)):
        w, made = new(n, d), torch.zeros(rows, n, device=device, dtype=kind)
        how = {} if name == "o" else dict(norm=norm, eps=1e-5)
        gemv_pred(x, w, active, made, add=name == "o", blocks=blocks.get(name), **how)
        out[name] = error_of(made, ((x.double() if name == "o" else y) @ w.double().T) * run_rows[:, None])
    w_in, w_out, gate = new(2 * f + 2 * a, d), new(d, f + a), torch.rand(rows, device=device)
    inner = torch.empty(rows, f + a, device=device, dtype=kind)
    inside = y @ w_in.double().T  # eager on purpose: nothing to compile under the sanitizer
    ffn = glu(inside[:, : 2 * f]) @ w_out[:, :f].double().T
    small = glu(inside[:, 2 * f :]) @ w_out[:, f:].double().T
    part = torch.where(run_rows[:, None], gate[:, None] * ffn, (1 - gate[:, None]) * small)
    both = (blocks.get("in"), blocks.get("out"))
    got = ffn_or_adapter(x.clone(), inner, w_in, w_out, norm, active, gate, f, 1e-5, both)
    out["ffn_or_adapter"] = error_of(got, x.double() + part)
    cache, query = new(2, rows, kv_heads, ctx, dim) * dim**0.5, new(rows, heads, dim) * dim**0.5
    lengths = torch.randint(ctx, (rows,), device=device, dtype=torch.int32)
    one, zero = torch.ones(ctx, dim, device=device), torch.zeros(ctx, dim, device=device)
    empty = torch.zeros(rows, d, device=device, dtype=kind)
    got = decode_attn_pred(query, cache, lengths, active, one, zero, empty, **(attention or {}))
    seen = (torch.arange(ctx, device=device) <= lengths[:, None])[:, None, None]
    k, v = (t.repeat_interleave(heads // kv_heads, 1).double() for t in cache)
    expected = F.scaled_dot_product_attention(query[:, :, None].double(), k, v, attn_mask=seen).flatten(1)
    out["attention"] = error_of(got, expected * run_rows[:, None])
    z, weight, w = new(rows, d // 16), torch.rand(d // 16, device=device), torch.randn(d // 16, device=device)
    u = torch.tanh(rms_norm(z.double(), weight.double(), 1e-5))
    return out | {"router": error_of(router_finish(z, weight, w, 1e-5)[0], torch.sigmoid(u @ w.double()))}


# %%
def check_kernels(speed: dict) -> dict[str, Any]:
    """Errors at the measured shapes for 1, 4 and 8 rows; what compute-sanitizer says of small ones."""
    shape = dict(d=speed["width"], f=speed["ffn"], heads=speed["heads"], kv_heads=speed["kv_heads"])
    errors = {
        f"{k}, {rows} rows": v
        for rows in (1, 4, 8)
        for k, v in kernel_errors(**shape, ctx=speed["contexts"][0], rows=rows, device=run.device).items()
    }
    code = (
        "import readrun; q = readrun.chapter('flexidepth'); "
        "print([q.kernel_errors(96, 144, 6, 2, 45, rows, 'cuda') for rows in (1, 3)])"
    )
    found = sanitizer.sanitize(code, run.device)
    return {"errors": errors, "worst": max(errors.values()), "kernels": run.device == "cuda"} | {
        f"sanitizer_{k}": v for k, v in found.items()
    }


tries = attempts.Attempts(run)  # a measurement that fails on some machine does not end the others
checked = tries.unit(check_kernels, speed=S.speed)
if checked.done:
    told = checked["sanitizer_why"] or f"{checked['sanitizer_errors']} errors"
    print(f"largest relative error {checked['worst']:.1e}; compute-sanitizer: {told}")

# %%
tuned = tries.unit(tune_kernels, speed=S.speed)
timed = {
    "same": tries.unit(same_outputs, speed=S.speed, tuned=tuned),
    "r1": tries.unit(bench, batch=1, ctx=S.speed["contexts"][0], speed=S.speed, tuned=tuned,
                   modes=["dense", "dense_cublas", "predicated", "masked"], peers=True),
    "r2": tries.unit(bench, batch=S.speed["long"][0], ctx=S.speed["long"][1], speed=S.speed, tuned=tuned,
                   modes=["dense", "predicated", "masked"], peers=True),
    "r3": tries.unit(bench_prefill, batch=S.speed["prefill"][0], length=S.speed["prefill"][1], speed=S.speed),
    "sweep": tries.unit(bench_sweep, speed=S.speed, tuned=tuned),
}  # fmt: skip
for name, unit in timed.items():
    if unit.done and unit.get("errors"):
        print(name, "did not run:", unit["errors"])
tries.check()

# %% [markdown]
# ### Results of this run
#
# All measurements in one place, with the verdicts that follow from them. One metric is derived: how far the
# skip of an ablation is from the full arm's, after its threshold was tuned.


# %%
def skip_mismatch(metrics: dict, arrays: dict) -> dict[str, list[float]]:
    """|validation skip of an arm - that of the full arm| / that of the full arm."""
    found = metrics.get("validation_skip", {})
    target = found.get("full", [0.0])[0]
    return {arm: [abs(v[0] - target) / target] for arm, v in found.items() if arm != "full" and target}


# %% tags=["hide-input"]
def gather_quality(metrics: dict, arrays: dict) -> None:
    """Add scores, skips and layer use of all trained arms."""
    if not scored.done:
        return
    base_now = task_scores(scored["exact"], scored["nll"])
    metrics["base_score"] = {t: scored["exact"][i].tolist() for i, t in enumerate(TASKS[:-1])}
    arrays |= {"base": base_now, "influence": scored["influence"]}
    curve = [[k + 1, retained(s, base_now)] for k, s in enumerate(scored["static"])]
    arrays["curve/static"] = np.array(curve)
    depth = size["depth"]
    for (arm, s), unit in trained.items():
        scores = task_scores(unit["exact"], unit["nll"])
        arrays[f"scores/{arm}/{s}"], arrays[f"use/{arm}/{s}"] = scores, unit["use"]
        if arm not in S.ablations:
            metrics.setdefault("retained", {}).setdefault(arm, {})[s] = retained(scores, base_now)
            metrics.setdefault("skipped_layers", {}).setdefault(arm, {})[s] = unit["skip"]
        if arm != "flexidepth":
            continue
        metrics.setdefault("skip_share", {}).setdefault(arm, {})[s] = unit["skip"] / depth
        metrics.setdefault("partial_correlation", {}).setdefault(arm, {})[s] = unit["partial"]
        k = math.floor(unit["skip"])
        static = curve[k - 1][1] if 1 <= k <= len(curve) else 1.0 if k == 0 else None
        if static is not None:
            metrics["retained"].setdefault("static", {})[s] = static
    points = [
        [u["skip"], retained(task_scores(u["exact"], u["nll"]), base_now)] for u in sweep.values() if u.done
    ]
    if points:
        arrays["curve/alpha"] = np.array(points)
    first = trained.get(("flexidepth", run.seeds[0]))
    if first is not None and len(first["curve"]):
        arrays["curve/tau"] = np.array([[r[0], retained(r[1:], base_now)] for r in first["curve"]])


# %% tags=["hide-input"]
def gather_difficulty(metrics: dict, arrays: dict) -> None:
    """Add layers per item by kind, controls, and the ablations at matched skip."""

    def put(name: str, layers: np.ndarray) -> None:
        by = dict(zip(TASKS, layers, strict=True))
        kinds = {
            "repeat": by["repeat"],
            "add": by["add"],
            "mul": by["mul"],
            "fixed": by["phrase"],
            "copied": (by["repeat"] + by["copy"]) / 2,
            "computed": (by["add"] + by["mul"]) / 2,
        }
        metrics[name] = {kind: values.tolist() for kind, values in kinds.items()}

    for i, s in enumerate(run.seeds[:3]):
        unit = trained.get(("flexidepth", s))
        if unit is not None:
            put(f"layers_{i + 1}", unit["layers"])
    first = trained.get(("flexidepth", run.seeds[0]))
    if first is None or not scored.done:
        return
    put("layers_shuffled", first["shuffled"])
    arrays |= {"gates/before": first["before"], "gates/after": first["after"]}
    arrays["play"] = np.array(
        json.dumps({"taus": S.taus, "texts": first["texts"], "layers": first["text_layers"]})
    )
    weights = scored["exact"].mean(1, keepdims=True)
    arms = {"full": first} | {
        arm: trained[arm, run.seeds[0]] for arm in S.ablations if (arm, run.seeds[0]) in trained
    }
    for arm, unit in arms.items():
        metrics.setdefault("validation_skip", {})[arm] = [unit["validation_skip"]]
        kept = (unit["exact"] / np.maximum(weights, 1e-9))[weights[:, 0] >= 0.1]
        if kept.size:
            metrics.setdefault("matched", {})[arm] = kept.ravel().tolist()


# %% tags=["hide-input"]
def gather_speed(metrics: dict, arrays: dict) -> None:
    """Add times, rates, differences and the predictions beside them."""
    if checked.done and tuned.done:
        arm = "kernels" if checked["kernels"] else "references"  # on a CPU there is no kernel to judge
        metrics["kernel_error"] = {arm: [max(checked["worst"], tuned["error"])]}
    if checked.done and checked["sanitizer_errors"] is not None:
        metrics["sanitizer_errors"] = {"kernels": [checked["sanitizer_errors"]]}
    if flops.done:
        metrics["flop_ratio"] = {"compact": [flops["counted"] / flops["formula"]]}
    if timed["same"].done:
        metrics["mode_difference"] = {
            "largest": [max(v for k, v in timed["same"].items() if "dense" not in k)]
        }
    sizes = {"r1": (1, S.speed["contexts"][0]), "r2": S.speed["long"], "r3": S.speed["prefill"]}
    for name, (batch, ctx) in sizes.items():
        if not timed[name].done:
            continue
        times = {k.removeprefix("ms__"): v for k, v in timed[name].items() if k.startswith("ms__")}
        arrays |= {f"ms/{name}/{k}": v for k, v in times.items()} | {
            f"skipped/{name}": np.array(timed[name]["skipped"])
        }
        tokens = 1e3 * batch * (ctx if name == "r3" else 1)
        rivals = [k for k in ("dense", "dense_cublas", "hf", "hf_compiled") if k in times]
        if not rivals:
            continue
        best = min(rivals, key=lambda k: np.median(times[k]))
        arms = {k: v for k, v in times.items() if k in ("predicated", "compact")} | {
            "dense_best": times[best]
        }
        metrics[f"{name}_tokens_per_second"] = {k: (tokens / v).tolist() for k, v in arms.items()}
        if name == "r1" and {"hf", "hf_masked"} <= times.keys():
            metrics["naive_speedup"] = {"masked": (times["hf"] / times["hf_masked"]).tolist()}
        arrays[f"best/{name}"] = np.array(best)
        if "gather_ms" in timed[name]:
            arrays["gather_ms"] = np.array(timed[name]["gather_ms"])
    if timed["sweep"].done:
        arrays["sweep"] = timed["sweep"]["rows"]
        for key, name in (("eight", "batch8"), ("correlated", "correlated")):
            found = {
                k.removeprefix(f"{key}__"): v for k, v in timed["sweep"].items() if k.startswith(f"{key}__")
            }
            if found:
                metrics[f"{name}_tokens_per_second"] = {k: (1e3 * (8 if key == "eight" else 4) / v).tolist()
                                                        for k, v in found.items()}  # fmt: skip


# %% tags=["hide-input"]
def gather_limits(metrics: dict, arrays: dict) -> None:
    """Add shares of the measured bandwidth and the error of the cost model."""
    if not tuned.done or S.speed["tiny"]:
        return
    copy_rate = tuned["copy_gb_s"]
    arrays["ceilings"] = np.array([1e9 * copy_rate, 1e12 * tuned["matmul_tflop_s"]])  # bytes/s, operations/s
    large = {
        k: v / copy_rate for k, v in tuned["gb_s"].items() if k in ("one/q", "one/o", "one/in", "one/out")
    }
    metrics["gemv_share"] = {"least": [min(large.values())]} | {k: [v] for k, v in large.items()}
    rate = 1e3 * tuned["attention_gb"] / tuned["attention_ms"]
    metrics["attention_share"] = {"dense": [rate / copy_rate]}
    metrics["attention_half"] = {"half": [tuned["attention_half_ms"] / tuned["attention_ms"]]}
    config, errors = LlamaConfig(**LLAMA_8B), []
    plans = {"r1": ("dense", "predicated"), "r2": ("dense", "predicated"), "r3": ("dense", "compact")}
    sizes = {"r1": (1, S.speed["contexts"][0]), "r2": S.speed["long"], "r3": S.speed["prefill"]}
    for name, modes in plans.items():
        for mode in modes:
            if f"ms/{name}/{mode}" in arrays:
                skip = float(arrays[f"skipped/{name}"])
                kind = "dense_prefill" if (name, mode) == ("r3", "dense") else mode
                ms = cost_model(config, kind, *sizes[name], skip, 1e9 * copy_rate,
                                1e12 * tuned["matmul_tflop_s"])  # fmt: skip
                arrays[f"predicted/{name}/{mode}"] = np.array(ms)
                errors.append(abs(float(np.median(arrays[f"ms/{name}/{mode}"])) / ms - 1))
    if len(errors) == 6:
        metrics["cost_model_error"] = {"worst": [max(errors)]}


# %%
metrics: dict[str, dict] = {}
arrays: dict[str, np.ndarray] = {}
for gather in (gather_quality, gather_difficulty, gather_speed, gather_limits):
    gather(metrics, arrays)
here = run.results(metrics=metrics, arrays=arrays)
book = run.recorded()
shown = book or here  # what the GPU figures show


# %% [markdown]
# The paper's signature picture: answers, coloured by the layers that each character used. Figures are
# functions of results, so that the recorded run can be drawn anywhere.


# %% tags=["figure", "hide-input"]
def draw_text(results, tau: float = 0.5, only_task: str = ""):
    """One answer per task, one cell per character, coloured by layers used."""
    figure, ax = plt.subplots(figsize=(9.2, 3.3 if not only_task else 1.7))
    if "play" not in results.arrays:
        ax.text(0.1, 0.5, "not measured in this run")
        plots.label(ax, "character", "task")
        return figure
    found = json.loads(str(results.arrays["play"]))
    at = found["taus"].index(tau)
    depth = results.arrays["influence"].size
    tasks = [t for t in TASKS if only_task in ("", t)]
    for y, task in enumerate(tasks):
        i = TASKS.index(task)
        prompt, answer, right = found["texts"][at][i]
        for x, (sign, layers) in enumerate(zip(answer, found["layers"][at][i], strict=False)):
            shade = (layers - depth / 2) / (depth / 2)
            ax.add_patch(plt.Rectangle((x, y), 1, 0.9, color=plt.cm.viridis(shade)))
            colour = "black" if shade > 0.6 else "white"
            ax.text(
                x + 0.5, y + 0.45, sign.replace("\n", "↵"), ha="center", va="center", color=colour, fontsize=9
            )
        note = "" if task == "prose" else " ✓" if right else " ✗"
        ax.text(
            -0.3, y + 0.45, f"{prompt[-22:]!r}{note}", ha="right", va="center", fontsize=8, family="monospace"
        )
    ax.set(xlim=(-12, 35), ylim=(len(tasks), -0.1), yticks=[], xticks=range(0, 36, 5))
    ax.grid(False)
    bar = figure.colorbar(plt.cm.ScalarMappable(plt.Normalize(depth / 2, depth), "viridis"), ax=ax)
    bar.set_label("layers used")
    plots.label(ax, "character of the answer", "task", f"{results.profile}, threshold {tau}")
    return figure


TEXT_ALT = (
    "One generated answer per task; each character is a cell whose colour says how many layers it used."
)
plots.show(
    draw_text(here), alt=f"This run. {TEXT_ALT}", caption="Dark: half of the layers. Bright: all of them."
)


# %% tags=["figure", "hide-input"]
def draw_use(results):
    """Share of answer tokens that run each routed layer, by task; gates before and after training."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.3))
    names = sorted(k for k in results.arrays if k.startswith("use/flexidepth/"))
    style = plots.arms(list(TASKS))
    if names:
        use = np.mean([results.arrays[k] for k in names], 0)
        depth = results.arrays["influence"].size
        for task, row in zip(TASKS, use, strict=True):
            axes[0].plot(range(depth - len(row), depth), 100 * row, label=task, **style[task])
    plots.legend(axes[0], ncols=2)
    for when, own in zip(("before", "after"), plots.arms(["before", "after"]).values(), strict=True):
        if f"gates/{when}" in results.arrays:
            shares = results.arrays[f"gates/{when}"]
            middle = (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
            for i, row in enumerate(shares):
                axes[1].plot(middle, row, label=f"{when} training" if not i else None, **own, alpha=0.6)
    axes[1].axvline(0.5, color="#555555", linewidth=0.8)
    plots.legend(axes[1])
    plots.label(axes[0], "layer", "tokens that run it (%)", "use of each routed layer")
    plots.label(axes[1], "gate (1)", "share of tokens (1)", "gates, one line per layer")
    return figure


USE_ALT = (
    "Left: share of answer tokens that run each routed layer, one line per task. Right: distribution of "
    "the gates of each routed layer before and after training, with the threshold at one half."
)
plots.show(
    draw_use(here), alt=f"This run. {USE_ALT}", caption="Is the use of layers a bowl? Is the gate decided?"
)


# %% tags=["figure", "hide-input"]
def draw_curve(results):
    """Retained score against skipped layers: curves over alpha and tau, baselines as points."""
    figure, ax = plt.subplots(figsize=(6.6, 3.5))
    style = plots.arms(["flexidepth", "static_adapter", "random_adapter", "static"])
    if "curve/static" in results.arrays:
        ax.plot(
            *results.arrays["curve/static"].T, marker="o", markersize=4, label="static", **style["static"]
        )
    for over, sign in (("α, tuning seed", "curve/alpha"), ("τ, first seed", "curve/tau")):
        if sign in results.arrays:
            points = results.arrays[sign][results.arrays[sign][:, 0].argsort()].T
            how = dict(
                marker=".", alpha=0.7, label=f"flexidepth over {over}", color=style["flexidepth"]["color"]
            )
            ax.plot(*points, linestyle="-" if "τ" in over else "--", **how)
    for arm in ("flexidepth", "static_adapter", "random_adapter"):
        if arm in results.metrics.get("retained", {}):
            x, y = (np.array(results.metrics[m][arm]) for m in ("skipped_layers", "retained"))
            kept = dict(color=style[arm]["color"], label=f"{arm}, per seed")
            ax.plot(x, y, "s", markersize=7, **kept)
    ax.axhline(1, color="#555555", linewidth=0.8)
    plots.legend(ax)
    plots.label(ax, "layers skipped per token", "retained score (1)", f"profile {results.profile}")
    return figure


CURVE_ALT = (
    "Retained score against mean skipped layers for routed skipping, static removal, and trained baselines."
)
plots.show(
    draw_curve(here), alt=f"This run. {CURVE_ALT}", caption="1 is the base model. Squares: the compared runs."
)


# %% tags=["hide-input"]
def quality_rows(results) -> list[dict]:
    """One row per arm: scores per task, skipped layers, retained score; means over seeds."""
    rows, base_now = [], results.arrays.get("base")
    if base_now is None:
        return [{"arm": "not measured in this run"}]
    rows.append({"arm": "base model", "seeds": 1} | dict(zip(TASKS, map(float, base_now), strict=True)))
    arms = dict.fromkeys(k.split("/")[1] for k in results.arrays if k.startswith("scores/"))
    for arm in arms:
        own = [v for k, v in results.arrays.items() if k.startswith(f"scores/{arm}/")]
        row = {"arm": arm, "seeds": len(own)} | dict(zip(TASKS, map(float, np.mean(own, 0)), strict=True))
        for metric in ("retained", "skipped_layers"):
            if arm in results.metrics.get(metric, {}):
                row[metric.replace("_", " ")] = float(np.mean(results.metrics[metric][arm]))
        rows.append(row)
    if "static" in results.metrics.get("retained", {}):
        rows.append({"arm": "static", "retained": float(np.mean(results.metrics["retained"]["static"]))})
    return rows


tables.grid(
    quality_rows(here), caption="Exact match per task (prose: exp of minus NLL), retained score, skip."
)


# %% tags=["hide-input"]
def difficulty_rows(results) -> list[dict]:
    """Mean layers used by kind of character, per seed, and in the shuffled control."""
    names = [k for k in ("layers_1", "layers_2", "layers_3", "layers_shuffled") if k in results.metrics]
    rows = [{"run": n.replace("layers_", "seed ").replace("seed shuffled", "router inputs shuffled")}
            | {k: float(np.mean(v)) for k, v in results.metrics[n].items()} for n in names]  # fmt: skip
    return rows or [{"run": "not measured"}]


tables.grid(difficulty_rows(here), caption="Mean layers used by the characters of an answer.")

# %% [markdown]
# ## GPU experiment

# %% tags=["hide-input"]
tables.provenance(book) if book else print(
    "The GPU run is not recorded yet; below is what this machine measured."
)

# %% tags=["figure", "hide-input"]
if book:
    for draw, words in ((draw_curve, CURVE_ALT), (draw_text, TEXT_ALT), (draw_use, USE_ALT)):
        plots.show(draw(book), alt=f"Recorded run. {words}", caption=f"Profile {book.profile}.")

# %% tags=["hide-input"]
if book:
    told = f"Profile {book.profile}: exact match per task (prose: exp of minus NLL), retained score, skip."
    display(tables.grid(quality_rows(book), told))
    display(tables.grid(difficulty_rows(book), f"Profile {book.profile}: mean layers used."))


# %% [markdown]
# ### Speed against the limits
#
# The lines are the cost model of step 9 with the copy bandwidth and matrix rate that this GPU reached.


# %% tags=["figure", "hide-input"]
def draw_speed(results):
    """Speed-up over our dense mode against batch, measured and predicted; prefill as bars."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4), width_ratios=[2, 1])
    rows, eight = results.arrays.get("sweep", np.zeros((0, 5))), LlamaConfig(**LLAMA_8B)
    for ctx, style in zip(np.unique(rows[:, 1]), plots.arms(["short", "long"]).values(), strict=False):
        some = rows[(rows[:, 1] == ctx) & (rows[:, 2:] > 0).all(1)]
        for column, mode, fill in ((3, "predicated", "full"), (4, "masked", "none")):
            speedup = some[:, 2] / some[:, column]
            how = dict(color=style["color"], label=f"{mode}, context {ctx:.0f}")
            axes[0].plot(some[:, 0], speedup, "o", fillstyle=fill, **how)
            if "ceilings" in results.arrays:
                limits = results.arrays["ceilings"]
                ms = {
                    m: [cost_model(eight, m, int(b), int(ctx), 8, *limits) for b in some[:, 0]]
                    for m in ("dense", mode)
                }
                line = np.array(ms["dense"]) / np.array(ms[mode])
                axes[0].plot(some[:, 0], line, color=style["color"], linewidth=1.6 if fill == "full" else 0.8)
    axes[0].axhline(1, color="#555555", linewidth=0.8)
    axes[0].set_xscale("log", base=2)
    plots.legend(axes[0])
    plots.label(axes[0], "sequences", "speed-up over dense (1)", "decode")
    times = {k.split("/")[2]: np.median(v) for k, v in results.arrays.items() if k.startswith("ms/r3/")}
    axes[1].barh(list(times), list(times.values()), color=plots.PALETTE[0])
    axes[1].invert_yaxis()
    plots.label(axes[1], "time (ms)", "mode", "prefill")
    return figure


plots.show(
    draw_speed(shown),
    alt="Left: speed-up over dense decoding against the number of sequences, for a short and a long context: "
    "filled dots predicated kernels, hollow dots masked execution, lines predictions. Right: milliseconds of "
    "prefill by mode.",
    caption=f"Profile {shown.profile}. Dots: measured; lines: predicted (only where Llama-3-8B was run).",
)


# %% tags=["hide-input"]
def speed_rows(results) -> list[dict]:
    """Milliseconds of every way of running R1 to R3, beside the prediction and the best dense baseline."""
    rows = []
    for name in ("r1", "r2", "r3"):
        if f"best/{name}" not in results.arrays:
            continue
        best = str(results.arrays[f"best/{name}"])
        peer = float(np.median(results.arrays[f"ms/{name}/{best}"]))
        for key in (k for k in results.arrays if k.startswith(f"ms/{name}/")):
            ms, limit = (
                float(np.median(results.arrays[key])),
                results.arrays.get(key.replace("ms", "predicted", 1)),
            )
            text = f"{name.upper()} {key.split('/')[2]}" + (
                " (best dense)" if key.endswith(f"/{best}") else ""
            )
            limit = None if limit is None else 1e3 / float(limit)
            rows.append(clock.row(text, ms, "steps/s", achieved=1e3 / ms, limit=limit, peer=1e3 / peer))
        rows.append(
            {"name": f"{name.upper()} layers skipped", "achieved": float(results.arrays[f"skipped/{name}"])}
        )
    if rows and "gather_ms" in results.arrays:
        rows.append({"name": "R3, moving rows in one layer", "ms": float(results.arrays["gather_ms"])})
    return rows


tables.bench(speed_rows(shown) or [{"name": "not measured"}])

# %% [markdown]
# The recorded verdicts beside those of this run:

# %% tags=["hide-input"]
tables.compare_runs(book, here)

# %% [markdown]
# ## Verdicts
#
# Computed from the record by rules that were committed before it. Intervals over seeds are paired t
# intervals, over items a paired bootstrap; "exact" numbers have none. Each of the GPU's three regimes has a
# verdict of its own, and the condition that the outputs stay the same (`c5d`) guards all of them.

# %% tags=["hide-input"]
tables.verdicts(shown)

# %% [markdown]
# ## Play
#
# Choose a task and a threshold. A lower threshold lets more tokens run; the colours show which characters
# stop thinking first.


# %% tags=["widget", "hide-input"]
def draw_choice(task: str, tau: float):
    """One answer at one threshold, coloured, with its mean number of layers."""
    figure = draw_text(shown, tau, task)
    if "play" in shown.arrays:
        found = json.loads(str(shown.arrays["play"]))
        at = found["taus"].index(tau)
        layers = found["layers"][at][TASKS.index(task)]
        right = found["texts"][at][TASKS.index(task)][2]
        mean = float(np.mean(layers)) if layers else 0.0
        figure.axes[0].set_title(
            f"τ = {tau}: {mean:.2f} layers per character, exact match: {'yes' if right else 'no'}"
        )
    return figure


GRID = {"task": list(TASKS), "tau": S.taus}
picker.live(draw_choice, GRID)
picker.picker(
    run, "layers", draw_choice, GRID, alt=lambda task, tau: f"Answer to a {task} item at threshold {tau}.",
    caption="The same prompt at three thresholds.",
)  # fmt: skip

# %% [markdown]
# ## Your own model
#
# From your own code: `convert` any `LlamaForCausalLM`, train what is left trainable, and run it fast:
#
# ```python
# import readrun
# from transformers import AutoModelForCausalLM
# q = readrun.chapter("flexidepth")
# model = q.convert(AutoModelForCausalLM.from_pretrained("meta-llama/Meta-Llama-3-8B-Instruct"))
# ...                                       # train: loss + 1e-3 * q.skip_loss(gates, mask)
# runtime = q.FlexiRuntime(model.cuda().bfloat16(), max_batch=1, max_len=4096)
# logits = runtime.prefill(ids)             # compact
# logits = runtime.decode(next_ids)         # predicated
# ```
#
# `checkpoint` takes the same two kinds: a plain Llama gets fresh routers, a FlexiDepth checkpoint (for
# example `xuan-luo/FlexiDepth-Llama-3-8B-Instruct`) is recognised by its tensors, which also say which
# layers are routed. Without `checkpoint` the chapter's small base model is converted, saved in the released
# layout and read back.


# %%
def checkpoint_tensors(path: str) -> dict[str, Tensor]:
    """Router and adapter tensors of a folder or hub id (safetensors); {} for a plain model."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    files = {"model.safetensors"}
    if index:
        files = set(json.loads(Path(index).read_text())["weight_map"].values())
    found = {}
    for name in sorted(files):
        with safe_open(cached_file(path, name), "pt") as file:
            found |= {k: file.get_tensor(k) for k in file.keys() if ".router" in k}  # noqa: SIM118
    return found


def load_checkpoint(path: str):
    """A converted model from a plain or a FlexiDepth checkpoint. Raises ValueError naming `checkpoint`."""
    try:
        config = LlamaConfig.from_pretrained(path)
        tensors = checkpoint_tensors(path)
        kind = torch.bfloat16 if run.device == "cuda" else torch.float32
        model = LlamaForCausalLM.from_pretrained(path, config=config, dtype=kind, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        wanted = "accepted: hub id or folder of a Llama or FlexiDepth checkpoint in safetensors"
        raise ValueError(f"checkpoint: {path}: {str(error)[:300]}; {wanted}") from error
    named = sorted({int(k.split(".")[2]) for k in tensors})
    promised = list(getattr(config, "routing_layers", None) or [])
    layers = named or promised or None
    reduction = getattr(config, "router_reduction_factor", None) or 16
    try:
        convert(model, layers, reduction)
    except ValueError as error:
        raise ValueError(f"checkpoint: {path}: {error}") from error
    if named or promised:
        wanted_keys = {k for k in model.state_dict() if ".router" in k}
        if missing := sorted(wanted_keys - tensors.keys()):
            raise ValueError(f"checkpoint: {path}: a FlexiDepth checkpoint without {', '.join(missing[:4])}")
        model.load_state_dict(tensors, strict=False)
    return model.to(run.device)


# %%
@torch.no_grad()
def own_model(path: str, tokens: int = 24, seed: int = 0) -> dict[str, Any]:
    """Layers used and agreement of the runtime's modes on a text (random ids without a tokenizer)."""
    model = load_checkpoint(path)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    if (Path(path) / "tokenizer.json").is_file() or not Path(path).exists():
        text = "A model reads this line, and some of its words are easier than others."
        ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, :tokens]
    rt = FlexiRuntime(model, 1, ids.shape[1] + 1, "compact")
    logits = rt.prefill(ids.to(run.device), last=False)
    used = torch.stack(rt.last_masks).sum(0).float()
    rt.mode = "masked"
    other = rt.prefill(ids.to(run.device), last=False)
    gap = (logits - other).norm() / other.norm()
    nll = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(run.device))
    below = len(model.model.layers) - len(routed(model))
    return {"layers": below + used.mean().item(), "depth": len(model.model.layers), "gap": gap.item(),
            "nll": nll.item(), "per_token": (below + used[0]).tolist()}  # fmt: skip


# %%
if run.checkpoint:
    own = run.unit(own_model, path=run.checkpoint)
else:
    folder = run.folder / "own_model"
    own_base = convert(load_base("small", SMALL["size"]), [4, 6])
    own_base.save_pretrained(folder, max_shard_size="300KB")
    make_tokenizer().save_pretrained(folder)
    own = own_model(str(folder))
print(
    f"{own['layers']:.2f} of {own['depth']} layers per token, mean negative log-likelihood {own['nll']:.4f}"
)
print(f"compact against masked: relative difference {own['gap']:.1e}")

# %% [markdown]
# The committed base model was made with `make_checkpoint` above, in about six minutes of one CPU core.
#
# ## Limits
#
# - The quality of the real Llama-3-8B is not shown: there are no such weights here. The model is small, its
#   tasks are synthetic, and all seeds share one base model.
# - The `cpu` profile proves nothing about the static baseline. With half of its router steps the two were
#   level; the steps were doubled after that had been seen. Its base model also fails its gate, so that its
#   verdicts are void. Only the recorded `gpu` run decides.
# - There are only $900\cdot8$ products of three digits and one digit, 80 % of them for training: fewer than
#   one would like.
# - Times use forced masks, independent between tokens; real routes are correlated, which the last measurement
#   only samples. They are for one model on one GPU, bfloat16, sequences of equal length.
# - Beyond one sequence the weights of a layer are read whenever any sequence runs it. For 2 to 16 short
#   sequences there is nothing to gain, whatever the kernel.
# - The kernels do not split the inner dimension, and every launch of an inactive kernel still costs its
#   launch.
#
# **Exercise 1.** A layer is skipped with probability $p=\tfrac12$. Which share of the FFN's weight traffic do
# predicated kernels save when they decode four sequences at once?
#
# :::{dropdown} Solution
# The weights can stay unread only if all four sequences skip: $p^4=\tfrac1{16}$. The adapter's weights are
# read with probability $1-(1-p)^4=\tfrac{15}{16}$ on top.
# :::
#
# **Exercise 2.** Why is attention masked, but not scaled by $g$? What would change if it were?
#
# :::{dropdown} Solution
# One path is enough to teach the router. With $g<1$ on both, a frozen layer would do everything at reduced
# strength, and nothing trainable in the layer could make up for it; on the FFN alone, $g\to1$ is easily
# learnt.
# :::
#
# **Exercise 3.** The penalty is the square of a sum. Two tokens use 8 and 2 routed layers. Which pays more
# for one more layer, and by how much?
#
# :::{dropdown} Solution
# $9^2-8^2=17$ against $3^2-2^2=5$: the marginal price grows with use, so that the router saves first where
# much is used.
# :::
#
# **References.** X. Luo, W. Wang, X. Yan, *Adaptive Layer-skipping in Pre-trained LLMs*, 2025, arXiv
# 2503.23798.
#
# ```bibtex
# @article{luo2025adaptive,
#   title   = {Adaptive Layer-skipping in Pre-trained LLMs},
#   author  = {Luo, Xuan and Wang, Weizhi and Yan, Xifeng},
#   journal = {arXiv preprint arXiv:2503.23798},
#   year    = {2025}
# }
# ```

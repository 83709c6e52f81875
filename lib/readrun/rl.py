"""Policy-gradient core shared by the chapters that train with group-relative advantages.

Epsilon, scaling, aggregation and the KL term are arguments: each chapter states which values are its paper's.
Shapes: B = questions x group_size responses (groups contiguous), T = completion tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, group_size: int, scale: Literal["std", "none", "loo"] = "std", eps: float = 1e-8
) -> Tensor:
    """Advantage of each response relative to its group.

    "std": (R - mean) / (std + eps), sample std (ddof = 1), GRPO; "none": R - mean, Dr. GRPO;
    "loo": R - mean of the others = G / (G - 1) * (R - mean), RLOO. A group of equal rewards gives exactly 0.

    Args: rewards (B,), groups contiguous. Returns: (B,) in the dtype of `rewards`.
    Raises ValueError: B not a multiple of group_size, group_size < 2, non-finite reward, unknown scale.
    Source: arXiv 2503.20783, eq. 2 and sec. 3.2 (official eps 1e-8; TRL uses 1e-4).
    """
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2 (a group of one has no baseline), got {group_size}")
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not split into groups of {group_size}")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, got {rewards[~torch.isfinite(rewards)].tolist()}")
    groups = rewards.view(-1, group_size)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    # By hand: the mean of equal floats can be off by a rounding, and dividing by eps would blow that up.
    centred = (groups - groups.mean(1, keepdim=True)).masked_fill(equal, 0.0)
    if scale == "std":
        centred = centred / (groups.std(1, keepdim=True) + eps)
    elif scale == "loo":
        centred = centred * (group_size / (group_size - 1))
    elif scale != "none":
        raise ValueError(f'scale must be "std", "none" or "loo", got {scale!r}')
    return centred.reshape(-1)


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), (B, T): r - log r - 1 >= 0 with r = ref / policy."""
    difference = ref_logp - logp
    return torch.expm1(difference) - difference


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    aggregate: Literal["response", "constant", "batch"],
    constant: int | None = None,
    clip: float = 0.2,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """The negative of the clipped surrogate objective: a scalar to minimise.

    Per token: -min(r A, clip(r, 1 - clip, 1 + clip) A) + beta * k3_kl, with r = exp(logp - old_logp); level
    "sequence" uses one ratio per response, exp(sum of its log-ratios), at each of its tokens.
    aggregate: "response" = mean over tokens of a response, then over responses (GRPO); "constant" = sum over
    tokens / constant, then mean over responses (Dr. GRPO; the constant is the generation budget);
    "batch" = sum over all tokens / number of tokens in the batch (bnpo, DAPO style).

    Args: logp, old_logp, ref_logp (B, T); advantages (B,); mask (B, T), true where a token counts.
    Raises ValueError: shapes differ, `constant` missing or smaller than the longest response, an empty mask
    row, log-probabilities above 0. Source: arXiv 2503.20783, eq. 3 and sec. 3.2.
    """
    mask = mask.bool()
    shapes = [tuple(x.shape) for x in (logp, old_logp, mask, advantages)]
    if logp.ndim != 2 or shapes != [shapes[0]] * 3 + [shapes[0][:1]]:
        raise ValueError(f"logp, old_logp, mask must be (B, T) and advantages (B,), got {shapes}")
    lengths = mask.sum(1)
    positive = ((torch.maximum(logp.detach(), old_logp) > 1e-4) & mask).any()
    shortest, longest, positive = torch.stack([lengths.min(), lengths.max(), positive]).tolist()  # one sync
    if positive:
        raise ValueError("log-probabilities must not be positive: were logits or probabilities passed?")
    if shortest == 0:
        raise ValueError(f"response {int(lengths.argmin())} has no tokens: its mask row is empty")
    if aggregate == "constant" and (constant is None or constant < longest):
        raise ValueError(f"constant must be at least the longest response ({longest}), got {constant}")
    logp = logp.masked_fill(~mask, 0.0)  # padding may hold anything, also nan
    log_ratio = logp - old_logp.masked_fill(~mask, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)
    ratio, a = log_ratio.exp(), advantages[:, None]
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    if beta and ref_logp is not None:
        loss = loss + beta * k3_kl(logp, ref_logp.masked_fill(~mask, 0.0))
    loss = loss.masked_fill(~mask, 0.0)
    if aggregate == "response":
        return (loss.sum(1) / lengths).mean()
    if aggregate == "constant":
        return (loss.sum(1) / constant).mean()
    if aggregate == "batch":
        return loss.sum() / lengths.sum()
    raise ValueError(f'aggregate must be "response", "constant" or "batch", got {aggregate!r}')

"""Retrievers of the usual kind, for comparison: BM25 and a sentence encoder; rows of ids in batches.

from readrun.retrieval import BM25, bi_encode_all
BM25(texts).scores("newton root")              # (N,)
bi_encode_all(model, tokenizer, texts)         # (N, d) unit vectors
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from readrun import train


def pad_rows(rows: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """(ids, attention_mask), both (B, longest) long, of rows padded behind."""
    parts = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    mask = pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return pad_sequence(parts, batch_first=True, padding_value=pad), mask


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows of length 1, in float32."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


@torch.no_grad()
def in_batches(embed: Callable[[list], Tensor], items: Sequence, device: Any, batch: int) -> Tensor:
    """`embed(part)` (n, d) of all items, in their order; similar lengths together: less padding."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    parts = [[items[i] for i in order[start : start + batch]] for start in range(0, len(order), batch)]
    with train.autocast(device):
        found = torch.cat([embed(part) for part in parts])
    return found[torch.tensor(order, device=found.device).argsort()]


class BM25:
    """`bm25s` over texts; names are split at dots and underscores, which helps it."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self.bm25s, self.engine, self.count = bm25s, bm25s.BM25(), len(texts)
        words = bm25s.tokenize([re.sub(r"[._]", " ", text) for text in texts], show_progress=False)
        self.engine.index(words, show_progress=False)

    def scores(self, text: str) -> np.ndarray:
        """Scores (N,) of all texts; a query without a known word scores 0 everywhere."""
        query = re.sub(r"[._]", " ", text)
        words = self.bm25s.tokenize([query], show_progress=False, return_ids=False)[0]
        known = [word for word in words if word in self.engine.vocab_dict]
        return self.engine.get_scores(known) if known else np.zeros(self.count, np.float32)


def bi_encode(model: Any, tok: Any, texts: Sequence[str], limit: int = 128, end: bool = False) -> Tensor:
    """Mean-pooled unit vectors of a BERT-like encoder, (N, d) float32. Of a text longer than `limit` tokens
    its beginning is read or, for a query, its `end`: what stands next to the answer."""
    part = slice(2 - limit, None) if end else slice(limit - 2)
    pieces = [tok(text, add_special_tokens=False).input_ids[part] for text in texts]
    rows = [[tok.cls_token_id, *piece, tok.sep_token_id] for piece in pieces]
    ids, mask = pad_rows(rows, tok.pad_token_id, next(model.parameters()).device)
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return unit_rows((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def bi_encode_all(model: Any, tok: Any, texts: Sequence[str], batch: int = 64, end: bool = False) -> Tensor:
    """`bi_encode` of many texts, without gradients."""
    device = next(model.parameters()).device
    return in_batches(lambda part: bi_encode(model, tok, part, end=end), texts, device, batch)

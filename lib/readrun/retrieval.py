"""Retrievers of the usual kind, for comparison: BM25 and a sentence encoder; rows of ids in batches.

from readrun.retrieval import BM25, bi_encode_all
BM25(texts).scores("newton root")              # (N,)
bi_encode_all(model, tokenizer, texts)         # (N, d) unit vectors
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from readrun import train


def sent(values: Any, device: Any = "cpu") -> Tensor:
    """An array or (nested) list of numbers as a tensor on a device, without waiting for a GPU's queue."""
    tensor = torch.as_tensor(values)
    on_gpu = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)


def pad_rows(rows: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """(ids, attention_mask), both (B, longest) long, of rows padded behind; made on the host and sent whole:
    a copy per row would wait for a GPU's queue at each."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(real.shape, pad, dtype=np.int64)
    ids[real] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    return sent(ids, device), sent(real.astype(np.int64), device)


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


def bi_rows(tok: Any, texts: Sequence[str], limit: int = 128, end: bool = False) -> list[list[int]]:
    """Token ids of texts for `bi_embed`. Of a text longer than `limit` tokens its beginning is kept or, for a
    query, its `end`: what stands next to the answer."""
    part = slice(2 - limit, None) if end else slice(limit - 2)
    pieces = tok(list(texts), add_special_tokens=False).input_ids if len(texts) else []
    return [[tok.cls_token_id, *piece[part], tok.sep_token_id] for piece in pieces]


def bi_embed(model: Any, tok: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mean-pooled unit vectors of a BERT-like encoder, (N, d) float32, of `bi_rows`."""
    ids, mask = pad_rows(rows, tok.pad_token_id, next(model.parameters()).device)
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return unit_rows((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def bi_encode_all(model: Any, tok: Any, texts: Sequence[str], batch: int = 128, end: bool = False) -> Tensor:
    """`bi_embed` of many texts, without gradients."""
    device = next(model.parameters()).device
    rows = bi_rows(tok, texts, end=end)
    return in_batches(lambda part: bi_embed(model, tok, part), rows, device, batch)

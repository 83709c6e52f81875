"""Sampling from a causal language model with a captured decode step.

`transformers`' `generate` launches dozens of small kernels per layer and token: a small model then waits for
the host most of the time. Here one decode step (model, sampling, book-keeping) reads and writes preallocated
tensors only; on a GPU it is captured in a CUDA graph and replayed, on a CPU it runs as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

CHECK_EVERY = 16  # tokens between two looks at "have all rows ended?": each look drains the queue of a GPU


@dataclass(frozen=True)
class Rollout:
    """Sampled rows: prompts padded on the left, completions on the right."""

    ids: Tensor  # (batch, prompt_len + T) long, T the longest completion
    mask: Tensor  # (batch, T) bool, true up to and including the first end-of-sequence token
    finished: Tensor  # (batch,) bool, whether the row ended in the budget
    prompt_len: int

    @property
    def completions(self) -> list[list[int]]:
        """Token ids of each completion, with its end-of-sequence token and without padding."""
        rows, lengths = self.ids[:, self.prompt_len :].tolist(), self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, attention_mask), both (batch, length) long; length 0: the longest. Raises ValueError."""
    sizes = [len(prompt) for prompt in prompts]
    if not sizes or min(sizes) == 0:
        raise ValueError("decoding needs at least one prompt, and no prompt may be empty")
    length = length or max(sizes)
    if max(sizes) > length:
        raise ValueError(f"a prompt of {max(sizes)} tokens is longer than prompt_len={length}")
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(ids), (torch.arange(length) >= length - torch.tensor(sizes)[:, None]).long()


class _Layer(StaticLayer):
    """Keys and values of a layer, (batch, heads, length, head_dim), written at `slot`; None: prompts."""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, state: SimpleNamespace) -> None:
        super().__init__(max_cache_len=state.length)
        self.state = state

    def update(self, key_states: Tensor, value_states: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        state, slot = self.state, self.state.slot
        if slot is not None:
            return self.keys.index_copy_(2, slot, key_states), self.values.index_copy_(2, slot, value_states)
        new = [x.repeat_interleave(state.copies, 0) for x in (key_states, value_states)]
        keys, values = (F.pad(x, (0, 0, 0, state.length - x.shape[2])) for x in new)
        if self.is_initialized:
            keys, values = self.keys.copy_(keys), self.values.copy_(values)  # a graph knows these addresses
        self.keys, self.values, self.is_initialized = keys, values, True
        return key_states, value_states  # prompts see themselves only

    def get_seq_length(self, *_: object) -> int:
        return 0  # the model is always given positions

    def get_mask_sizes(self, query_length: int, *_: object) -> tuple[int, int]:
        return query_length, 0  # asked for prompts without padding; else the model is given a mask


class Decoder:
    """Preallocated state, and on a GPU captured graphs, for sequences of one shape.

    model: a causal language model of `transformers` with full attention; its weights may change between calls
    batch: sequences at once; prompt_len, max_new_tokens: at most so many; smaller calls are padded
    eos_id: one end-of-sequence token or several; pad_id: written after it
    num_return_sequences: sequences per prompt, neighbours in the batch; a prompt is run once for all
    dtype: compute in it, with weights converted once per call (autocast does so for every token)
    Raises ValueError for sizes that do not fit each other or the model.
    """

    @torch.no_grad()
    def __init__(
        self, model: torch.nn.Module, batch: int, prompt_len: int, max_new_tokens: int, *,
        eos_id: int | Sequence[int], pad_id: int, num_return_sequences: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        config, total = model.config.get_text_config(), prompt_len + max_new_tokens
        limit = getattr(config, "max_position_embeddings", None) or total
        window = getattr(config, "sliding_window", None) or total
        kinds = set(getattr(config, "layer_types", None) or ())
        if min(batch, prompt_len, max_new_tokens, num_return_sequences) < 1 or batch % num_return_sequences:
            raise ValueError(f"no positive sizes, or {batch=} is no multiple of {num_return_sequences=}")
        if total > limit:
            raise ValueError(f"prompt_len + max_new_tokens = {total} exceeds the model's {limit} positions")
        if not kinds <= {"full_attention", "sliding_attention"} or total > window:
            raise ValueError(f"a Decoder needs full attention, not {sorted(kinds)} with a window of {window}")
        self.model, self.batch, self.prompt_len, self.pad_id = model, batch, prompt_len, pad_id
        self.max_new_tokens, self.num_return_sequences = max_new_tokens, num_return_sequences
        self.made_for = (model, eos_id, pad_id, num_return_sequences)
        weight, self.vocab_size = next(model.parameters()), config.vocab_size
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.graphs = self.device.type == "cuda"
        like = {"dtype": torch.long, "device": self.device}
        length = -(-total // 8) * 8  # attention kernels want masks of a multiple of 8
        self._state = SimpleNamespace(length=length, copies=num_return_sequences, slot=None)
        self._cache = Cache(layers=[_Layer(self._state) for _ in range(config.num_hidden_layers)])
        self._prompt = torch.zeros(batch // num_return_sequences, prompt_len, **like)
        self._seen = torch.zeros_like(self._prompt, dtype=torch.bool)
        self._ids, self._slot = torch.zeros(batch, length, **like), torch.zeros(1, **like)
        self._mask = torch.zeros(batch, 1, 1, length, dtype=self.dtype, device=self.device)  # added to scores
        self._done = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self._position, self._eos = torch.zeros(batch, 1, **like), torch.tensor(eos_id, **like).view(-1)
        self._converted = {k: p.to(self.dtype) for k, p in model.named_parameters() if p.dtype != self.dtype}
        self._generator = torch.Generator(self.device)
        self._pointers: list[int] = []
        self._captured: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None  # no result outlives a replay

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 0, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
        position_ids: Tensor | None = None, **inputs: Tensor,
    ) -> Rollout:  # fmt: skip
        """Continue at most batch / num_return_sequences prompts; temperature 0 is greedy, top_k 0 keeps all.

        generator: on any device, one number is drawn from it per call; None: torch's global one
        position_ids: (..., prompts, prompt_len) for models that count in their own way (M-RoPE)
        inputs: more arguments of the model for the prompts (pixel values); only with all prompts of the batch
        Raises ValueError for a call that does not fit.
        """
        count, budget, room = len(prompts), max_new_tokens or self.max_new_tokens, len(self._prompt)
        if not 1 <= count <= room or not 1 <= budget <= self.max_new_tokens:
            raise ValueError(f"{count} prompts, {budget} tokens: made for {room}, {self.max_new_tokens}")
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
        ids, seen = left_pad([*prompts, *[prompts[0]] * (room - count)], self.pad_id, self.prompt_len)
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ValueError(f"a prompt has a token outside the vocabulary of {self.vocab_size}")
        rows, full = count * self.num_return_sequences, bool(seen.all())
        self._prompt.copy_(ids)
        self._seen.copy_(seen)
        self._done.copy_(torch.arange(self.batch) >= rows)
        source = generator.device if generator else "cpu"
        self._generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=source)))
        sampler = (float(temperature), top_k, float(top_p))
        with self._ready():
            if position_ids is None and not inputs:
                self._run(self._prefill, sampler, full)
            else:  # other tensors at every call: nothing to capture
                self._prefill(sampler, full, position_ids, **inputs)
            for step in range(1, budget):
                if step % (CHECK_EVERY if self.graphs else 1) == 0 and bool(self._done.all()):
                    break
                self._run(self._step, sampler)
        ends = torch.isin(self._ids[:rows, self.prompt_len : self.prompt_len + budget], self._eos)
        kept = ends.cumsum(1) - ends.long() == 0  # no end before this token
        longest = int(kept.sum(1).max())
        ids = self._ids[:rows, : self.prompt_len + longest].clone()
        return Rollout(ids, kept[:, :longest].clone(), ends.any(1), self.prompt_len)

    def _prefill(
        self, sampler: tuple, full: bool, position_ids: Tensor | None = None, **inputs: Tensor
    ) -> None:
        """Start ids, masks and positions, run the prompts (full: none is padded), sample the first token."""
        width, hidden = self.prompt_len, torch.finfo(self.dtype).min
        spread = functools.partial(torch.repeat_interleave, repeats=self.num_return_sequences, dim=-2)
        positions = (self._seen.cumsum(1) - 1).clamp_min(0) if position_ids is None else position_ids
        last = spread(positions[..., -1:])
        if last.shape != self._position.shape:
            self._position, self._captured = last.clone(), {}
        self._position.copy_(last)
        self._ids.fill_(self.pad_id)
        self._ids[:, :width] = spread(self._prompt)
        self._slot.fill_(width - 1)
        self._mask.fill_(hidden)
        self._mask[..., :width].masked_fill_(spread(self._seen)[:, None, None], 0)
        itself = torch.eye(width, dtype=torch.bool, device=self.device)
        causal = torch.ones_like(itself).tril()
        # padding sees itself: a row of nothing is nan in some attention kernels, and 0 times nan is nan
        allowed = self._seen[:, None, None] & causal | itself
        mask = None if full else torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, hidden)
        self._state.slot = None
        self._advance(sampler, input_ids=self._prompt, attention_mask=mask, position_ids=positions, **inputs)

    def _step(self, sampler: tuple) -> None:
        """Feed the newest token and sample the next one: what a graph replays."""
        self._state.slot = self._slot
        self._mask.index_fill_(-1, self._slot, 0)
        token = self._ids.index_select(1, self._slot)
        self._advance(sampler, input_ids=token, attention_mask=self._mask, position_ids=self._position)

    def _advance(self, sampler: tuple, **inputs: Tensor | None) -> None:
        """Run the model, sample by Gumbel's trick, argmax(logits - log Exp(1)), and write the token."""
        temperature, top_k, top_p = sampler
        arguments = dict(inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits = torch.func.functional_call(self.model, self._converted, (), arguments).logits[:, -1].float()
        if len(logits) < self.batch:  # one row per prompt
            logits = logits.repeat_interleave(self.num_return_sequences, 0)
        if temperature > 0:
            logits = logits / temperature if temperature != 1 else logits
            logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
            logits = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
            logits = logits - torch.empty_like(logits).exponential_(generator=self._generator).log_()
        token = logits.argmax(-1).masked_fill_(self._done, self.pad_id)[:, None]
        self._done.logical_or_((token == self._eos).any(-1))
        self._slot.add_(1)
        self._position.add_(1)
        self._ids.index_copy_(1, self._slot, token)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function`; on a GPU replay its graph, or call it and capture it for the next time.

        Capturing runs nothing and all state is in tensors: the call that warms up is an ordinary step.
        """
        key = (function.__name__, *arguments)
        if not self.graphs:
            return function(*arguments)
        if key in self._captured:
            return self._captured[key].replay()
        here, stream = (of(self.device) for of in (torch.cuda.current_stream, torch.cuda.Stream))
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            function(*arguments)
        here.wait_stream(stream)
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            function(*arguments)
        self._captured[key] = graph

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """Today's weights, evaluation mode, no autocast; on a GPU one kernel per RMSNorm instead of eight."""
        live, modules = dict(self.model.named_parameters()), list(self.model.modules())
        for name, converted in self._converted.items():
            converted.copy_(live[name])
        pointers = [p.data_ptr() for p in live.values()]
        if pointers != self._pointers:  # a weight was replaced, not changed in place: the graphs read the old
            self._captured, self._pointers = {}, pointers
        training = [module for module in modules if module.training]
        norms = [m for m in modules if self.graphs and _is_rms_norm(m)]
        self.model.eval()
        for norm in norms:
            norm.forward = lambda x, m=norm: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            for module in training:
                module.training = True
            for norm in norms:
                del norm.forward


def _is_rms_norm(module: torch.nn.Module) -> bool:
    """Whether this is Llama's norm (Gemma's scales by 1 + weight and lacks the field), not yet replaced."""
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and "forward" not in vars(module)


def sample(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
    eos_id: int | Sequence[int], pad_id: int, num_return_sequences: int = 1,
    decoder: Decoder | None = None, **sampling: Any,
) -> Rollout:  # fmt: skip
    """Sample `num_return_sequences` continuations of each prompt; `sampling`: options of `Decoder.generate`.

    A `decoder` lends its captured graphs; more prompts than it holds are taken in rounds. Raises ValueError
    if it was made for another model, end, padding or num_return_sequences.
    """
    made = dict(eos_id=eos_id, pad_id=pad_id, num_return_sequences=num_return_sequences)
    if decoder is None:
        width = max(map(len, prompts), default=0)
        decoder = Decoder(model, len(prompts) * num_return_sequences, width, max_new_tokens, **made)
    if (model, *made.values()) != decoder.made_for:
        raise ValueError(f"the decoder was made for another model or for other than {made}")
    size = len(decoder._prompt)
    rounds = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    parts = [decoder.generate(part, max_new_tokens=max_new_tokens, **sampling) for part in rounds]
    longest = max(part.mask.shape[1] for part in parts)
    ids = [F.pad(part.ids, (0, longest - part.mask.shape[1]), value=pad_id) for part in parts]
    mask = [F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]
    finished = torch.cat([part.finished for part in parts])
    return Rollout(torch.cat(ids), torch.cat(mask), finished, decoder.prompt_len)

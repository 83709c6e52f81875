"""Sampling from a causal language model with a captured decode step.

`transformers`' `generate` launches dozens of small kernels per layer and token and asks after every token
whether all rows have ended: a small model then waits for the host most of the time. Here one decode step
(model, sampling, book-keeping) reads and writes preallocated tensors only. On a GPU it is captured in CUDA
graphs and replayed, and the host looks at the rows every 16 tokens; on a CPU the same step runs as it is.

    rollout = sample(model, prompts, 64, eos_id=2, pad_id=0)            # once
    decoder = Decoder(model, 256, 32, 192, eos_id=2, pad_id=0)          # often: captured by the first call,
    rollout = decoder.generate(prompts, generator=generator)            # weights may change in between
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

CHECK_EVERY = 16  # tokens between two looks at "have all rows ended?": each look drains the queue of a GPU


@dataclass(frozen=True)
class Rollout:
    """Sampled rows: prompts padded on the left, completions on the right.

    ids: (batch, prompt_len + T) long, T the longest completion; mask: (batch, T) bool, true up to and
    including the first end-of-sequence token; finished: (batch,) bool, whether the row ended in the budget
    """

    ids: Tensor
    mask: Tensor
    finished: Tensor
    prompt_len: int

    @property
    def completions(self) -> list[list[int]]:
        """Token ids of each completion, with its end-of-sequence token and without padding."""
        rows, lengths = self.ids[:, self.prompt_len :].tolist(), self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, attention_mask), both (batch, length) long on the CPU; length 0: of the longest prompt.

    Raises ValueError for no prompts, an empty prompt, or one longer than `length`.
    """
    sizes = [len(prompt) for prompt in prompts]
    if not sizes or min(sizes) == 0:
        raise ValueError("decoding needs at least one prompt, and no prompt may be empty")
    length = length or max(sizes)
    if max(sizes) > length:
        raise ValueError(f"a prompt of {max(sizes)} tokens is longer than prompt_len={length}")
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(ids), (torch.arange(length) >= length - torch.tensor(sizes)[:, None]).long()


class _Layer(StaticLayer):
    """Keys and values of one layer, (batch, heads, length, head_dim), written at a slot all layers share.

    `StaticLayer` counts its own length and returns the whole store. Here only the first `window.visible`
    slots are returned, so that attention reads the used part alone.
    """

    is_initialized: bool

    def __init__(self, window: SimpleNamespace) -> None:
        super().__init__(max_cache_len=window.length)
        self.window = window

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, ...]:
        window, new = self.window, (key_states, value_states)
        if not self.is_initialized:
            sizes = [(window.batch, x.shape[1], window.length, x.shape[3]) for x in new]
            self.keys, self.values = (x.new_zeros(size) for x, size in zip(new, sizes, strict=True))
            self.is_initialized = True
        if window.slot is None:  # prompts see themselves only; stored for each sequence that continues them
            for store, x in zip((self.keys, self.values), new, strict=True):
                store.zero_()  # a masked slot takes part with weight 0: nothing non-finite may stay in it
                store[:, :, : x.shape[2]].unflatten(0, (x.shape[0], -1)).copy_(x[:, None])
            return new
        self.keys.index_copy_(2, window.slot, key_states)
        self.values.index_copy_(2, window.slot, value_states)
        return self.keys[:, :, : window.visible], self.values[:, :, : window.visible]

    def get_seq_length(self, *_: object) -> int:
        return 0  # the model is always given positions and masks

    def get_mask_sizes(self, *_: object) -> tuple[int, int]:
        return self.window.visible, 0


class Decoder:
    """Preallocated state, and on a GPU captured graphs, for sequences of one shape.

    model: a causal language model of `transformers` with full attention; its weights may change in place
        between calls (an optimiser's step). While sampling it is in evaluation mode, without autocast
    batch: sequences at once; prompt_len, max_new_tokens: at most so many; smaller calls are padded
    eos_id: one end-of-sequence token or several; pad_id: written after it
    num_return_sequences: sequences per prompt, neighbours in the batch; a prompt is run once for all
    dtype: compute in it, with weights converted once per call (autocast does so for every token); None: as is
    graphs: capture CUDA graphs; None: if the model is on a GPU
    bucket: attention reads the used slots rounded up to a multiple of this; each multiple has a graph; 0: 64,
        or all slots if compile
    compile: fuse the step by torch.compile first: a third faster for small models, but it takes a C compiler
        and ten seconds or more, once per process, shape and architecture
    Raises ValueError for sizes that do not fit each other or the model.
    """

    @torch.no_grad()
    def __init__(
        self, model: torch.nn.Module, batch: int, prompt_len: int, max_new_tokens: int, *,
        eos_id: int | Sequence[int], pad_id: int, num_return_sequences: int = 1,
        dtype: torch.dtype | None = None, graphs: bool | None = None,
        bucket: int = 0, compile: bool = False,
    ) -> None:  # fmt: skip
        config, total = model.config.get_text_config(), prompt_len + max_new_tokens
        window = getattr(config, "sliding_window", None) or total
        kinds = set(getattr(config, "layer_types", None) or ())
        if min(batch, prompt_len, max_new_tokens, num_return_sequences) < 1 or bucket < 0:
            raise ValueError("a Decoder needs positive sizes")
        if batch % num_return_sequences:
            raise ValueError(f"batch={batch} is no multiple of num_return_sequences={num_return_sequences}")
        if total > (limit := getattr(config, "max_position_embeddings", None) or total):
            raise ValueError(f"prompt_len + max_new_tokens = {total} exceeds the model's {limit} positions")
        if not kinds <= {"full_attention", "sliding_attention"} or total > window:
            raise ValueError(f"a Decoder needs full attention, not {sorted(kinds)} with a window of {window}")
        self.model, self.batch, self.prompt_len, self.pad_id = model, batch, prompt_len, pad_id
        self.max_new_tokens, self.num_return_sequences = max_new_tokens, num_return_sequences
        self.compile, self.bucket = compile, bucket or (total if compile else 64)
        self.eos_ids = _tokens(eos_id)
        weight, self.vocab_size = next(model.parameters()), config.vocab_size
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        like = {"dtype": torch.long, "device": self.device}
        length = -(-total // 8) * 8  # attention kernels want masks of a multiple of 8
        self._window = SimpleNamespace(batch=batch, length=length, slot=None, visible=prompt_len)
        self._cache = Cache(layers=[_Layer(self._window) for _ in range(config.num_hidden_layers)])
        self._prompt = torch.zeros(batch // num_return_sequences, prompt_len, **like)
        self._seen = torch.zeros_like(self._prompt, dtype=torch.bool)
        self._ids, self._slot = torch.zeros(batch, length, **like), torch.zeros(1, **like)
        self._mask = torch.zeros(batch, 1, 1, length, dtype=self.dtype, device=self.device)  # added to scores
        self._done = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self._position, self._eos = torch.zeros(batch, 1, **like), torch.tensor(self.eos_ids, **like)
        weights = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self._converted = {k: p.to(self.dtype) for k, p in weights.items() if p.dtype != self.dtype}
        self._generator = torch.Generator(self.device)
        self._pointers: list[int] = []
        self._captured: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._pool: tuple[int, int] | None = None

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
        count, budget = len(prompts), max_new_tokens or self.max_new_tokens
        room, rows = len(self._prompt), count * self.num_return_sequences
        if not 1 <= count <= room or not 1 <= budget <= self.max_new_tokens:
            raise ValueError(f"{count} prompts, {budget} tokens: made for {room}, {self.max_new_tokens}")
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
        ids, mask = left_pad([*prompts, *[prompts[0]] * (room - count)], self.pad_id, self.prompt_len)
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ValueError(f"a prompt has a token outside the vocabulary of {self.vocab_size}")
        self._prompt.copy_(ids)
        self._seen.copy_(mask)
        self._done.copy_(torch.arange(self.batch) >= rows)
        source = generator.device if generator else "cpu"
        self._generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=source)))
        sampler, special = (float(temperature), top_k, float(top_p)), position_ids is not None or bool(inputs)
        full, every = bool(mask.all()), CHECK_EVERY if self.graphs else 1
        with self._ready():
            prefill = functools.partial(self._prefill, full, sampler, position_ids, inputs)
            self._run(("prompt", full, *sampler), prefill, special)
            for step in range(1, budget):
                if step % every == 0 and bool(self._done.all()):
                    break
                used = -(-(self.prompt_len + step) // self.bucket) * self.bucket
                visible = min(used, self._window.length)
                self._run((visible, *sampler), functools.partial(self._step, visible, sampler))
        ends = torch.isin(self._ids[:rows, self.prompt_len : self.prompt_len + budget], self._eos)
        kept = ends.cumsum(1) - ends.long() == 0  # no end before this token
        longest = int(kept.sum(1).max())
        ids = self._ids[:rows, : self.prompt_len + longest].clone()
        return Rollout(ids, kept[:, :longest].clone(), ends.any(1), self.prompt_len)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, inputs: dict) -> Tensor:
        arguments = dict(inputs, input_ids=ids, attention_mask=mask, position_ids=positions)
        arguments |= dict(past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        function = _compiled() if self.compile and self._window.slot is not None else _logits
        return function(self.model, self._converted, arguments)

    def _prefill(self, full: bool, sampler: tuple, position_ids: Tensor | None, inputs: dict) -> None:
        """Run the prompts, fill the cache, start masks and positions, sample the first token."""
        width, hidden = self.prompt_len, torch.finfo(self.dtype).min

        def spread(x: Tensor, dim: int = 0) -> Tensor:
            return x.repeat_interleave(self.num_return_sequences, dim)

        positions = (self._seen.cumsum(1) - 1).clamp_min(0) if position_ids is None else position_ids
        allowed = self._seen[:, None, None] & torch.ones(width, width, device=self.device).tril().bool()
        mask = torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, hidden)
        self._window.slot, self._window.visible = None, width
        logits = spread(self._forward(self._prompt, None if full else mask, positions, inputs))
        self._mask.fill_(hidden)
        self._mask[..., :width].masked_fill_(spread(self._seen)[:, None, None], 0)
        if positions.shape[:-2] != self._position.shape[:-2]:
            self._position, self._captured = spread(positions[..., -1:], -2).clone(), {}
        self._position.copy_(spread(positions[..., -1:], -2))
        self._ids.fill_(self.pad_id)
        self._ids[:, :width] = spread(self._prompt)
        self._slot.fill_(width - 1)
        self._pick(logits, sampler)

    def _step(self, visible: int, sampler: tuple) -> None:
        """Feed the newest token and sample the next one: what a graph replays."""
        self._window.slot, self._window.visible = self._slot, visible
        self._mask.index_fill_(-1, self._slot, 0)
        token = self._ids.index_select(1, self._slot)
        self._pick(self._forward(token, self._mask[..., :visible], self._position, {}), sampler)

    def _pick(self, logits: Tensor, sampler: tuple) -> None:
        """Sample from logits (batch, vocab) by Gumbel's trick, argmax(logits - log Exp(1)), and advance."""
        temperature, top_k, top_p = sampler
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

    def _run(self, key: tuple, function: Callable[[], None], special: bool = False) -> None:
        """Call `function`; on a GPU replay its graph, or call it and capture it for the next time.

        Capturing records kernels without running them and all state is in tensors: the call that warms up is
        an ordinary step, nothing is thrown away.
        """
        if special or not self.graphs:
            return function()
        if key in self._captured:
            return self._captured[key].replay()
        here, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            function()
        here.wait_stream(stream)
        graph.register_generator_state(self._generator)
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # shared: no result in it outlives a replay
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            function()
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
        fuse, training = self.graphs and not self.compile, [module for module in modules if module.training]
        norms = [module for module in modules if fuse and _is_rms_norm(module)]
        for module in training:
            module.training = False
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


def _tokens(ids: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in ids) if isinstance(ids, Sequence) else (int(ids),)


def _logits(model: torch.nn.Module, weights: dict[str, Tensor], arguments: dict) -> Tensor:
    return torch.func.functional_call(model, weights, (), arguments).logits[:, -1].float()


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """`_logits` compiled, one function for all models: a second model of the same shape costs nothing."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(_logits, fullgraph=True, dynamic=False)


def _is_rms_norm(module: torch.nn.Module) -> bool:
    """Whether this is Llama's norm (Gemma's scales by 1 + weight and lacks the field), not yet replaced."""
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return named and "forward" not in vars(module)


def sample(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
    eos_id: int | Sequence[int], pad_id: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
    num_return_sequences: int = 1, generator: torch.Generator | None = None, decoder: Decoder | None = None,
) -> Rollout:  # fmt: skip
    """Sample `num_return_sequences` continuations of each prompt, at most `max_new_tokens` long.

    A `decoder` lends its captured graphs; more prompts than it holds are taken in rounds. Raises ValueError
    if it was made for another model, end, padding or num_return_sequences.
    """
    made = dict(eos_id=eos_id, pad_id=pad_id, num_return_sequences=num_return_sequences)
    if decoder is None:
        width = left_pad(prompts, pad_id)[0].shape[1]
        decoder = Decoder(model, len(prompts) * num_return_sequences, width, max_new_tokens, **made)
    theirs = (decoder.model, decoder.eos_ids, decoder.pad_id, decoder.num_return_sequences)
    if (model, _tokens(eos_id), pad_id, num_return_sequences) != theirs:
        raise ValueError(f"the decoder was made for another model or for other than {made}")
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    size = decoder.batch // num_return_sequences
    rounds = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    parts = [decoder.generate(part, generator=generator, **options) for part in rounds]
    longest = max(part.mask.shape[1] for part in parts)
    ids = [F.pad(part.ids, (0, longest - part.mask.shape[1]), value=pad_id) for part in parts]
    mask = [F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]
    finished = torch.cat([part.finished for part in parts])
    return Rollout(torch.cat(ids), torch.cat(mask), finished, decoder.prompt_len)

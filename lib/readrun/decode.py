"""Sampling from a causal language model with a captured decode step.

`transformers`' `generate` launches some forty small kernels per layer and token and asks after every
token whether all rows have ended, so that a small model waits for the host most of the time. Here one decode
step (model, sampling, book-keeping) reads and writes only preallocated tensors; on a GPU it is captured in CUDA
graphs and replayed, and the host looks at the rows every 16 tokens. On the CPU the same step runs as it is.

    rollout = sample(model, prompts, 64, eos_id=2, pad_id=0)                        # one call
    decoder = Decoder(model, 256, 32, 192, eos_id=2, pad_id=0)                      # many calls: captured once,
    rollout = decoder.generate(prompts, generator=generator)                        # weights may change in between
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

CHECK_EVERY = 16  # tokens between two looks of the host at "have all rows ended?": each look drains the GPU's queue


@dataclass(frozen=True)
class Rollout:
    """Sampled rows: prompts padded on the left, completions padded on the right.

    ids: (batch, prompt_len + T) long; T is the longest completion of the batch
    mask: (batch, T) bool, true on completion tokens up to and including the first end-of-sequence token
    finished: (batch,) bool, whether the row ended by itself within the budget
    prompt_len: width of the padded prompts
    """

    ids: Tensor
    mask: Tensor
    finished: Tensor
    prompt_len: int

    @property
    def completions(self) -> list[list[int]]:
        """Token ids of each completion, with its end-of-sequence token and without padding."""
        tokens, lengths = self.ids[:, self.prompt_len :].tolist(), self.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(tokens, lengths, strict=True)]


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids, attention_mask), both (batch, length) long on the CPU; `length` defaults to the longest prompt.

    Raises ValueError for an empty batch, an empty prompt, or one longer than `length`.
    """
    sizes = [len(prompt) for prompt in prompts]
    if not sizes or min(sizes) == 0:
        raise ValueError("left_pad needs at least one prompt, and no prompt may be empty")
    length = max(sizes) if length is None else length
    if max(sizes) > length:
        raise ValueError(f"a prompt of {max(sizes)} tokens is longer than prompt_len={length}")
    rows = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = torch.arange(length) >= length - torch.tensor(sizes)[:, None]
    return torch.tensor(rows), mask.long()


class _Layer(StaticLayer):
    """Keys and values of one layer, (batch, heads, length, head_dim), written at a slot that all layers share.

    `StaticLayer` counts its own length and always returns the whole store. Here the slot lives in `window`, and
    only the first `window.visible` slots are returned: attention then reads the used part alone.
    """

    def __init__(self, window: SimpleNamespace) -> None:
        super().__init__(max_cache_len=window.length)
        self.window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        window, new = self.window, (key_states, value_states)
        if self.keys is None:
            self.keys, self.values = (x.new_zeros(window.batch, x.shape[1], window.length, x.shape[3]) for x in new)
            self.is_initialized = True
        if window.slot is None:  # the prompts: stored once per sequence that continues them, seen by themselves only
            for store, x in zip((self.keys, self.values), new, strict=True):
                store.zero_()  # a masked slot still takes part with weight 0: nothing non-finite may stay in it
                store[:, :, : x.shape[2]].unflatten(0, (x.shape[0], -1)).copy_(x[:, None])
            return new
        self.keys.index_copy_(2, window.slot, key_states)
        self.values.index_copy_(2, window.slot, value_states)
        return self.keys[:, :, : window.visible], self.values[:, :, : window.visible]

    def get_seq_length(self, *args) -> int:
        return 0  # positions and masks are always given to the model, never derived from the cache

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        return self.window.visible, 0


class Decoder:
    """Preallocated state (and, on a GPU, captured graphs) for `batch` sequences of one shape.

    model: any `transformers` causal language model with full attention; its weights may be changed in place
        between calls (an optimiser step). Dropout is off while sampling, other hooks and modes are left alone
    batch: sequences decoded at once; prompt_len, max_new_tokens: the largest accepted. Smaller calls are padded
    eos_id: one end-of-sequence token, or several; pad_id: written after it
    num_return_sequences: continuations per prompt; the prompt is then run once and rows of one prompt are neighbours
    dtype: compute in this type with weights converted at the start of every call; None: the model's own type.
        Autocast is off inside: it would convert every weight again for every token
    graphs: capture CUDA graphs; None: exactly when the model is on a GPU
    bucket: attention reads the used slots rounded up to this many, one graph per multiple
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: int,
        prompt_len: int,
        max_new_tokens: int,
        *,
        eos_id: int | Sequence[int],
        pad_id: int,
        num_return_sequences: int = 1,
        dtype: torch.dtype | None = None,
        graphs: bool | None = None,
        bucket: int = 64,
    ) -> None:
        if min(batch, prompt_len, max_new_tokens, num_return_sequences, bucket) < 1:
            raise ValueError("batch, prompt_len, max_new_tokens, num_return_sequences and bucket must be at least 1")
        if batch % num_return_sequences:
            raise ValueError(f"batch={batch} is not a multiple of num_return_sequences={num_return_sequences}")
        self.model, self.batch, self.prompt_len, self.max_new_tokens = model, batch, prompt_len, max_new_tokens
        self.num_return_sequences, self.pad_id, self.bucket = num_return_sequences, pad_id, bucket
        self.eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        length = -(-(prompt_len + max_new_tokens) // 8) * 8  # attention kernels want masks in multiples of 8
        config = model.config.get_text_config()
        self.vocab_size = config.vocab_size
        self._check(config, prompt_len + max_new_tokens)
        self._live = [p for p in model.parameters() if p.is_floating_point() and p.dtype != self.dtype]
        self._copies = [p.detach().to(self.dtype) for p in self._live]  # dtype None: both lists are empty
        names = {id(p): name for name, p in model.named_parameters()}
        self._swap = {names[id(p)]: copy for p, copy in zip(self._live, self._copies, strict=True)}
        self._window = SimpleNamespace(batch=batch, length=length, slot=None, visible=prompt_len)
        self._cache = Cache(layers=[_Layer(self._window) for _ in range(config.num_hidden_layers)])
        new = torch.zeros if self.device.type != "meta" else torch.empty
        long = {"dtype": torch.long, "device": self.device}
        self._prompt = new(batch // num_return_sequences, prompt_len, **long)
        self._prompt_mask = torch.zeros_like(self._prompt)
        self._ids = new(batch, length, **long)
        self._mask = torch.zeros(batch, 1, 1, length, dtype=self.dtype, device=self.device)
        self._done = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self._slot = new(1, **long)
        self._position = new(batch, 1, **long)
        self._eos = torch.tensor([self.eos_ids], **long)
        self._generator = torch.Generator(self.device)
        self._captured: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._pointers: list[int] = []

    def _check(self, config, length: int) -> None:
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(f"prompt_len + max_new_tokens = {length} is over max_position_embeddings = {limit}")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None) or length
        if not kinds <= {"full_attention", "sliding_attention"} or length > window:
            raise ValueError(f"decode supports full attention only (layers {sorted(kinds)}, sliding window {window})")
        if min(*self.eos_ids, self.pad_id) < 0:
            raise ValueError(f"eos_id={self.eos_ids} and pad_id={self.pad_id} must be token ids")

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        position_ids: Tensor | None = None,
        **inputs: Tensor,
    ) -> Rollout:
        """Continue up to `batch / num_return_sequences` prompts; temperature 0 is greedy.

        generator: on any device; one number is drawn from it per call (None: torch's global generator)
        position_ids: (..., prompts, prompt_len) where the model counts positions in its own way (M-RoPE)
        inputs: further arguments of the model for the prompts, such as pixel values (full batches only)
        Raises ValueError for a call that does not fit and FloatingPointError for non-finite logits.
        """
        count, budget = len(prompts), self.max_new_tokens if max_new_tokens is None else max_new_tokens
        rows, r = self._prompt.shape[0], self.num_return_sequences
        if not 1 <= count <= rows or not 1 <= budget <= self.max_new_tokens:
            raise ValueError(f"{count} prompts, {budget} new tokens: made for {rows} and {self.max_new_tokens}")
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError("sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
        ids, mask = left_pad([*prompts, *[prompts[0]] * (rows - count)], self.pad_id, self.prompt_len)
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ValueError(f"prompt token outside the vocabulary of {self.vocab_size}")
        self._prompt.copy_(ids)
        self._prompt_mask.copy_(mask)
        self._done.copy_(torch.arange(self.batch) >= count * r)
        source = "cpu" if generator is None else generator.device
        self._generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=source)))
        sampler = (float(temperature), top_k, float(top_p))
        every, ragged = CHECK_EVERY if self.graphs else 1, not bool(mask.all())
        with self._ready():
            if inputs or position_ids is not None:
                self._prefill(ragged, sampler, position_ids, inputs)
            else:
                self._run(("prompt", ragged, *sampler), lambda: self._prefill(ragged, sampler, None, {}))
            for step in range(1, budget):
                if step % every == 0 and bool(self._done.all()):
                    break
                used = -(-(self.prompt_len + step) // self.bucket) * self.bucket
                visible = min(used, self._window.length)
                self._run((visible, *sampler), lambda visible=visible: self._step(visible, sampler))
        return self._rollout(count * r, budget)

    def _rollout(self, rows: int, budget: int) -> Rollout:
        tokens = self._ids[:rows, self.prompt_len : self.prompt_len + budget]
        ends = (tokens[..., None] == self._eos[0]).any(-1)
        before = ends.cumsum(1) - ends.long()  # ends strictly before each token
        mask = before == 0
        longest = int(mask.sum(1).max())
        ids = self._ids[:rows, : self.prompt_len + longest].clone()
        return Rollout(ids, mask[:, :longest].clone(), ends.any(1), self.prompt_len)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        arguments = dict(input_ids=ids, attention_mask=mask, position_ids=positions, **inputs)
        arguments |= dict(past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        if self._swap:
            return torch.func.functional_call(self.model, self._swap, (), arguments).logits[:, -1]
        return self.model(**arguments).logits[:, -1]

    def _prefill(self, ragged: bool, sampler: tuple, position_ids: Tensor | None, inputs: dict) -> None:
        """Run the prompts, fill the cache, set up the masks and positions, and sample the first token."""
        r, width, hidden = self.num_return_sequences, self.prompt_len, torch.finfo(self.dtype).min
        seen = self._prompt_mask.bool()
        positions = (self._prompt_mask.cumsum(1) - 1).clamp_min(0) if position_ids is None else position_ids
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        blocked = ~(causal & seen[:, None, None, :])
        mask = torch.zeros_like(blocked, dtype=self.dtype).masked_fill_(blocked, hidden) if ragged else None
        self._window.slot, self._window.visible = None, width
        logits = self._forward(self._prompt, mask, positions, inputs).repeat_interleave(r, 0)
        self._mask.fill_(hidden)
        self._mask[..., :width].masked_fill_(seen.repeat_interleave(r, 0)[:, None, None], 0)
        following = positions[..., -1:].repeat_interleave(r, -2)
        if following.shape != self._position.shape:
            self._position, self._captured = following.clone(), {}
        self._position.copy_(following)
        self._ids[:, :width] = self._prompt.repeat_interleave(r, 0)
        self._ids[:, width:].fill_(self.pad_id)
        self._slot.fill_(width - 1)
        self._pick(logits, sampler)

    def _step(self, visible: int, sampler: tuple) -> None:
        """Feed the newest token and sample the next: the function that is captured."""
        self._window.slot, self._window.visible = self._slot, visible
        self._mask.index_fill_(-1, self._slot, 0)
        token = self._ids.index_select(1, self._slot)
        self._pick(self._forward(token, self._mask[..., :visible], self._position, {}), sampler)

    def _pick(self, logits: Tensor, sampler: tuple) -> None:
        """Sample by the Gumbel-max trick, argmax(logits - log E) with E ~ Exp(1), and advance by one slot."""
        temperature, top_k, top_p = sampler
        logits = logits.float()
        if temperature > 0:
            logits = truncate(logits / temperature, top_k, top_p)
            logits = logits - torch.empty_like(logits).exponential_(generator=self._generator).log_()
        token = logits.argmax(-1).masked_fill_(self._done, self.pad_id)[:, None]
        self._done.logical_or_((token == self._eos).any(-1))
        self._slot.add_(1)
        self._position.add_(1)
        self._ids.index_copy_(1, self._slot, token)

    def _run(self, key: tuple, function: Callable[[], None]) -> None:
        """Call `function`; on a GPU replay its graph, or call it (which warms up) and capture it for the next time.

        Capturing records kernels without running them, and all state is in tensors, so that the warm-up call is
        an ordinary step and nothing has to be thrown away or put back.
        """
        if not self.graphs:
            function()
        elif key in self._captured:
            self._captured[key].replay()
        else:
            here, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                function()
            here.wait_stream(stream)
            graph.register_generator_state(self._generator)
            pool = next(iter(self._captured.values())).pool() if self._captured else None
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                function()
            self._captured[key] = graph

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """Fresh weights, evaluation mode, no autocast, and on a GPU one kernel for each RMSNorm instead of eight."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._live)
        pointers = [p.data_ptr() for p in self.model.parameters()]
        if pointers != self._pointers:  # a weight was replaced instead of changed in place: old graphs read freed memory
            self._captured, self._pointers = {}, pointers
        training = [module for module in self.model.modules() if module.training]
        fused = [module for module in self.model.modules() if self.graphs and _is_rms_norm(module)]
        for module in training:
            module.training = False
        for module in fused:
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            for module in training:
                module.training = True
            for module in fused:
                del module.forward


def _is_rms_norm(module: torch.nn.Module) -> bool:
    """Whether this is the plain RMSNorm of the Llama family (Gemma's scales by 1 + weight and has no such field)."""
    plain = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return plain and "forward" not in vars(module)


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (batch, vocab) with everything outside the top k and outside the nucleus p set to -inf.

    top_k 0 and top_p 1 keep all. The nucleus is the smallest set of likeliest tokens whose probability reaches p.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        share = ordered.softmax(-1)
        drop = (share.cumsum(-1) - share) >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits


def sample(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_id: int | Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_return_sequences: int = 1,
    generator: torch.Generator | None = None,
    decoder: Decoder | None = None,
) -> Rollout:
    """Sample `num_return_sequences` continuations of each prompt, at most `max_new_tokens` long.

    With a `decoder` its captured graphs are used, and more prompts than it holds are taken in several rounds.
    """
    if decoder is None:
        width = left_pad(prompts, pad_id)[0].shape[1]
        rows = len(prompts) * num_return_sequences
        ends = dict(eos_id=eos_id, pad_id=pad_id, num_return_sequences=num_return_sequences)
        decoder = Decoder(model, rows, width, max_new_tokens, **ends)
    ends = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    asked = (model, ends, pad_id, num_return_sequences)
    if asked != (decoder.model, decoder.eos_ids, decoder.pad_id, decoder.num_return_sequences):
        raise ValueError("the decoder was made for another model, eos_id, pad_id or num_return_sequences")
    size, options = decoder.batch // num_return_sequences, dict(temperature=temperature, top_p=top_p, top_k=top_k)
    options |= dict(max_new_tokens=max_new_tokens, generator=generator)
    parts = [decoder.generate(prompts[i : i + size], **options) for i in range(0, len(prompts), size)]
    if len(parts) == 1:
        return parts[0]
    longest = max(part.mask.shape[1] for part in parts)
    width = decoder.prompt_len + longest
    ids = [F.pad(part.ids, (0, width - part.ids.shape[1]), value=pad_id) for part in parts]
    mask = [F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]
    return Rollout(torch.cat(ids), torch.cat(mask), torch.cat([p.finished for p in parts]), decoder.prompt_len)

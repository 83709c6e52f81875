"""`readrun.llm` on a model of `transformers` in this process."""

from __future__ import annotations

import contextlib
import functools
import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from readrun import decode
from readrun.llm import LLM, LLMError, Message, Reply, Request, Usage

Scores = tuple[
    list[float], list[list[int]], list[list[float]]
]  # of T tokens: theirs; ids, values of the best


def plain(messages: list[Message]) -> str:
    """The prompt for a tokenizer without chat template: "User: …", a blank line, "Assistant:"."""
    text = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    return text if messages[-1]["role"] == "assistant" else text + "\n\nAssistant:"


def raw(messages: list[Message]) -> str:
    """The prompt for a model that just continues text: the contents, joined by line ends, and no more."""
    return "\n".join(message["content"] for message in messages)


class TransformersLLM(LLM):
    """A causal language model of `transformers`, in batches; with a processor, one that sees images.

    model: on its device and in its dtype. tokenizer: a tokenizer, or the processor of an image-text model
    batch_size: sequences at once. seed: of the sampling; each call draws on, a new object starts over
    top_logprobs: so many for each token; 0: no log-probabilities, which saves a pass over the replies
    template: messages -> prompt (`plain`, `raw`, your own) in place of the tokenizer's chat template, or of
        `plain` where it has none; special tokens are then added as the tokenizer does
    Samples from the softmax at the given temperature: a checkpoint's own defaults (top-p, repetition penalty)
    do not count. Full-attention models run in `decode.Decoder`, others in `model.generate`.
    Raises ValueError if there is no end-of-sequence token.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 32, top_logprobs: int = 5, seed: int = 0,
        template: Callable[[list[Message]], str] | None = None, name: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.batch_size, self.top_logprobs = model, batch_size, top_logprobs
        self.template, self.name = template, name or model.config.name_or_path or type(model).__name__
        self.can_see = hasattr(tokenizer, "image_processor")
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer if self.can_see else tokenizer
        ends = getattr(model.generation_config, "eos_token_id", None)
        known = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        if not known:
            raise ValueError(f"tokenizer: neither it nor the model {self.name} has an end-of-sequence token")
        self._ends, pad = sorted(known), self.tokenizer.pad_token_id
        self._pad: int = self._ends[0] if pad is None else pad
        config = model.config.get_text_config()
        self._limit = getattr(config, "max_position_embeddings", None) or 10**9
        attends = getattr(model, "_can_compile_fullgraph", False) and not getattr(
            model, "_is_stateful", False
        )
        positions = "position_ids" in inspect.signature(model.forward).parameters
        self.can_loglik = attends and positions and not self.can_see
        self._generator, self._decoder = torch.Generator().manual_seed(seed), None
        self._pieces = dict.fromkeys(self.tokenizer.all_special_ids, "")

    # Texts and tokens

    def _prompt(self, messages: list[Message], after: str = "") -> list[int]:
        """Token ids of the prompt, followed by the text `after`. Raises ValueError if there are none."""
        if self.template or not self.tokenizer.chat_template:
            ids = self.tokenizer((self.template or plain)(messages) + after)["input_ids"]
            if not ids:
                raise ValueError("messages: the prompt has no tokens")
            return ids
        goes_on = messages[-1]["role"] == "assistant"
        how = dict(tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on)
        try:
            text = self.tokenizer.apply_chat_template(messages, **how)
        except Exception as error:  # whatever a template written in Jinja raises
            raise LLMError(f"{self.name}: its chat template refuses the messages: {error}") from error
        return self.tokenizer(text + after, add_special_tokens=False)["input_ids"]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _piece(self, token: int) -> str:
        """A token's text inside a text: with its leading space, which decoding it alone would drop."""
        if token not in self._pieces:
            self._pieces[token] = self._text([self._word, token])[len(self._text([self._word])) :]
        return self._pieces[token]

    @functools.cached_property
    def _word(self) -> int:
        """Some token that is visible text."""
        return next(i for i in range(len(self.tokenizer)) if self._text([i]).strip())

    def _reply(self, ids: list[int], scores: Scores | None, stop: list[str], prompt_tokens: int) -> Reply:
        """The reply that these tokens are, up to the first stop string."""
        ended = ids[-1] in self._ends
        body = ids[: len(ids) - ended]
        text, read, kept = self._text(body), len(ids), len(body)
        cut = min((at for one in stop if (at := text.find(one)) >= 0), default=-1)
        if cut >= 0:  # read: tokens until the stop string is complete; kept: those with text before it
            sizes = range(len(body) + 1)
            read = bisect_left(sizes, True, key=lambda k: any(one in self._text(body[:k]) for one in stop))
            kept = bisect_left(sizes, cut, key=lambda k: len(self._text(body[:k])))
            text, ended = text[:cut], True
        usage, reason = Usage(prompt_tokens, read), "stop" if ended else "length"
        tokens = [self._piece(i) for i in body[:kept]]
        if scores is None:
            return Reply(text, tokens, usage=usage, finish_reason=reason)
        logprobs, best, values = scores
        names = [[self._piece(i) for i in row] for row in best[:kept]]
        top = [list(zip(*row, strict=True)) for row in zip(names, values[:kept], strict=True)]
        return Reply(text, tokens, logprobs[:kept], top, usage, reason)

    # Generation

    def _generate(self, requests: list[Request]) -> list[list[Reply] | LLMError]:
        n, room = requests[0].n, self._limit - requests[0].max_tokens
        answers, prompts = dict[int, list[Reply] | LLMError](), dict[int, list[int]]()
        for at, request in enumerate(requests):
            try:
                prompts[at] = [] if self.can_see else self._prompt(request.messages)
                if len(prompts[at]) > room:
                    size = f"{len(prompts.pop(at))} tokens and max_tokens={request.max_tokens}"
                    raise LLMError(f"{self.name}: a prompt of {size} exceed its {self._limit} positions")
            except LLMError as error:
                answers[at] = error
        # of one size, so that little is padded; the longest first, so that a Decoder serves all that follow
        order = sorted(prompts, key=lambda at: (len(requests[at].images), -len(prompts[at])))
        while order:
            images = len(requests[order[0]].images)
            chunk = [at for at in order[: self.batch_size // n or 1] if len(requests[at].images) == images]
            order = order[len(chunk) :]
            rows, scores, sizes = self._batch([requests[at] for at in chunk], [prompts[at] for at in chunk])
            for i, at in enumerate(chunk):
                part = range(i * n, i * n + n)
                answers[at] = [
                    self._reply(rows[k], scores[k], requests[at].stop, 0 if k % n else sizes[i]) for k in part
                ]
        return [answers[at] for at in range(len(requests))]

    def _batch(
        self, requests: list[Request], prompts: list[list[int]]
    ) -> tuple[list[list[int]], Sequence[Scores | None], list[int]]:
        """(rows of tokens, each up to an end; their scores; tokens of each prompt); n rows for a prompt."""
        first, sizes = requests[0], [len(prompt) for prompt in prompts]
        if self.can_see:
            inputs = self._seen(requests)
            return *self._by_generate(inputs, first), inputs["attention_mask"].sum(1).tolist()
        ends = self._ends
        if first.stop:  # tokens with a whole stop string in them end a row at once
            whole = (i for i in range(len(self.tokenizer)) if any(s in self._piece(i) for s in first.stop))
            ends = [*ends, *whole]
        decoder = self._fitting(len(prompts), max(sizes), first, ends)
        if decoder is None:
            ids, mask = decode.left_pad(prompts, self._pad)
            return *self._by_generate({"input_ids": ids, "attention_mask": mask}, first), sizes
        options = dict(max_new_tokens=first.max_tokens, temperature=first.temperature)
        rows = decoder.generate(prompts, generator=self._generator, **options).completions
        pairs = [(prompts[k // first.n], row) for k, row in enumerate(rows)]
        return rows, self._score(pairs) if self.top_logprobs else [None] * len(rows), sizes

    def _fitting(self, count: int, width: int, first: Request, ends: list[int]) -> decode.Decoder | None:
        """A Decoder for so many prompts, on a GPU the last one if it will do; None: the model has none."""
        if not self.can_loglik or self.model.config._attn_implementation not in ("sdpa", "eager"):
            return None
        last, new, made_for = self._decoder, first.max_tokens, (self.model, ends, self._pad, first.n)
        if last and last.made_for == made_for and last.prompt_len >= width and last.max_new_tokens >= new:
            return last
        graphs = self.model.device.type == "cuda"
        if graphs:  # captured steps are kept: leave room for later calls
            count, width = self.batch_size // first.n or 1, min(-(-width // 128) * 128, self._limit - new)
        made = dict(eos_id=ends, pad_id=self._pad, num_return_sequences=first.n)
        try:
            decoder = decode.Decoder(self.model, count * first.n, width, new, **made)
        except ValueError:  # a sliding window, say
            return None
        self._decoder = decoder if graphs else None
        return decoder

    def _seen(self, requests: list[Request]) -> dict[str, Any]:
        """What the processor makes of texts and images."""
        texts = []
        for request in requests:
            turns: list[dict[str, Any]] = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in request.messages
            ]
            asked = next((turn for turn in turns if turn["role"] == "user"), turns[0])
            asked["content"][:0] = [{"type": "image"} for _ in request.images]
            if self.template or not self.processor.chat_template:
                texts.append((self.template or plain)(request.messages))
            else:
                texts.append(self.processor.apply_chat_template(turns, add_generation_prompt=True))
        images = [request.images for request in requests] if requests[0].images else None
        how = dict(padding=True, padding_side="left", return_tensors="pt")
        return dict(self.processor(images=images, text=texts, **how))

    @torch.no_grad()
    def _by_generate(self, inputs: dict[str, Any], first: Request) -> tuple[list, Sequence[Scores | None]]:
        """Rows and scores by `model.generate`, which has the logits of each step."""
        options: dict[str, Any] = dict(do_sample=False)
        if first.temperature:
            options = dict(do_sample=True, temperature=first.temperature, top_k=0, top_p=1.0)
        if first.stop:
            options |= dict(stop_strings=first.stop, tokenizer=self.tokenizer)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with self._evaluating(), torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=self._generator)))
            out = self.model.generate(
                **{name: x.to(self.model.device) for name, x in inputs.items()}, **options,
                max_new_tokens=first.max_tokens, num_return_sequences=first.n, repetition_penalty=1.0,
                eos_token_id=self._ends, pad_token_id=self._pad, return_dict_in_generate=True,
                output_logits=self.top_logprobs > 0,
            )  # fmt: skip
        rows = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        rows = [row[: next((i for i, x in enumerate(row) if x in self._ends), len(row)) + 1] for row in rows]
        if not self.top_logprobs:
            return rows, [None] * len(rows)
        return rows, [self._read(torch.stack([x[k] for x in out.logits]), row) for k, row in enumerate(rows)]

    # Scores

    def _read(self, logits: Tensor, ids: list[int]) -> Scores:
        """Log-probabilities of ids (T,) and the likeliest, from logits (T or more, vocab)."""
        logits = logits[: len(ids)].float()
        norm, best = logits.logsumexp(-1), logits.topk(max(1, self.top_logprobs))
        chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0] - norm
        return chosen.tolist(), best.indices.tolist(), (best.values - norm[:, None]).tolist()

    @torch.no_grad()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Scores]:
        """`_read` for the continuation of each (prompt, continuation).

        A prompt that several pairs share runs once; its keys and values are copied for each of them.
        """
        places = {prompt: at for at, prompt in enumerate(dict.fromkeys(tuple(p) for p, _ in pairs))}
        device, width = self.model.device, max(len(row) for _, row in pairs)
        ids, mask = (x.to(device) for x in decode.left_pad(list(places), self._pad))
        owner = torch.tensor([places[tuple(prompt)] for prompt, _ in pairs], device=device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with self._evaluating(), torch.autocast(device.type, enabled=False):
            shared = dict(use_cache=True, logits_to_keep=1)
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **shared)
            logits = out.logits[owner]
            if width > 1:
                cache = out.past_key_values
                cache.batch_select_indices(owner)
                padded = [row[:-1] + [self._pad] * (width - len(row)) for _, row in pairs]
                more = self.model(  # what stands behind a row's last token is padding that nobody attends to
                    input_ids=torch.tensor(padded, device=device), past_key_values=cache,
                    attention_mask=torch.cat([mask[owner], mask.new_ones(len(pairs), width - 1)], 1),
                    position_ids=positions[owner, -1:] + torch.arange(1, width, device=device),
                )  # fmt: skip
                logits = torch.cat([logits, more.logits], 1)
        return [self._read(x, row) for x, (_, row) in zip(logits, pairs, strict=True)]

    def _loglik(self, prompts: list[list[Message]], continuations: list[list[str]]) -> list[list[float]]:
        asked = zip(prompts, continuations, strict=True)
        pairs = [self._split(prompt, text) for prompt, some in asked for text in some]
        order = sorted(range(len(pairs)), key=lambda at: (len(pairs[at][0]), pairs[at][0]))
        sums = dict[int, float]()
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            found = self._score([pairs[at] for at in chunk])
            sums |= {at: sum(logprobs) for at, (logprobs, *_) in zip(chunk, found, strict=True)}
        self._count(*(Usage(len(prompt) + len(row)) for prompt, row in pairs))
        values = (sums[at] for at in range(len(pairs)))
        return [[next(values) for _ in some] for some in continuations]

    def _split(self, messages: list[Message], text: str) -> tuple[list[int], list[int]]:
        """(prompt, continuation) in tokens: the prompt's are those that `generate` starts from.

        Where the tokenizer would join the end of the prompt with the continuation's begin, the model cannot
        write that token any more: the continuation is then encoded by itself.
        """
        prompt, whole = self._prompt(messages), self._prompt(messages, text)
        row = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or not row:
            row = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self._text(prompt + row) != self._text(prompt) + text:
                raise ValueError(
                    f"continuations: the tokenizer cannot write {text!r:.100} behind the prompt (a blank?)"
                )
        if self.tokenizer.unk_token_id in row:
            raise ValueError(f"continuations: {text!r:.100} has a token unknown to the tokenizer")
        if len(prompt) + len(row) > self._limit:
            size = f"{len(prompt)} + {len(row)} tokens"
            raise ValueError(f"continuations: {size} exceed {self.name}'s {self._limit} positions")
        return prompt, row

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def load(path: str, device: str, **options: Any) -> TransformersLLM:
    """The model in a folder or on the hub; safetensors weights only, no code from the checkpoint."""
    safe, kind = dict(trust_remote_code=False), torch.bfloat16 if device != "cpu" else torch.float32
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    if (
        transformers.AutoConfig.from_pretrained(path, **safe).model_type
        in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ):
        kinds = (transformers.AutoModelForImageTextToText, transformers.AutoProcessor)
    model = kinds[0].from_pretrained(path, dtype=kind, use_safetensors=True, **safe)
    return TransformersLLM(model.to(device).eval(), kinds[1].from_pretrained(path, **safe), **options)

"""One client for any language model: a `transformers` model, an OpenAI-compatible server, a script.

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": text}; a plain
string stands for one user message, in every call and on every backend. If the last message is the
assistant's, the model continues it.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
Conversation = str | Sequence[Mapping[str, str]]


def __getattr__(name: str) -> Any:  # what needs torch or openai is imported when it is asked for
    home = {"OpenAILLM": "http"} | dict.fromkeys(("TransformersLLM", "plain", "raw"), "transformers")
    if name not in home:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"readrun.llm_{home[name]}"), name)


def from_spec(spec: str, *, device: str = "cpu", **options: Any) -> LLM:
    """The model that a `checkpoint` parameter names.

    spec: a hub id or a folder (config, safetensors weights, tokenizer, and for a model that sees images its
    processor), or openai:MODEL@URL with the URL up to /v1. options: of TransformersLLM or OpenAILLM.
    Weights are bfloat16 on a GPU, float32 on a CPU. Raises ValueError naming `checkpoint`.
    """
    from readrun import llm_http, llm_transformers

    found = re.fullmatch(r"openai:(.+?)@(https?://.+)", spec)
    try:
        if found:
            return llm_http.OpenAILLM(found[2], found[1], **options)
        if spec.startswith("openai:"):
            raise ValueError("after openai: comes MODEL@URL")
        return llm_transformers.load(spec, device, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        wanted = "accepted: hub id or folder of a language model, or openai:MODEL@http(s)://HOST/v1"
        quoted = re.sub(r"//[^/@\s']*@", "//***@", f"{spec!r:.200}: {str(error)[:300]}")
        raise ValueError(f"checkpoint: {quoted}; {wanted}") from None


class LLMError(RuntimeError):
    """The model gave no usable reply; the message says which, and why."""


@dataclass(frozen=True)
class Usage:
    """Tokens read and written. Sums of replies are right: of n replies the first one carries the prompt's."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens
        )


@dataclass(frozen=True)
class Reply:
    """What a model answered. `None` means that the backend does not say; nothing is ever made up.

    text: without the end-of-sequence token and without the stop string
    tokens: T texts, a leading space included; log-probabilities are the model's own, at temperature 1
    logprobs: T natural logarithms; top_logprobs: for each token the likeliest (text, logprob), best first,
        among which the written token need not be
    finish_reason: "stop" (the model ended, or a stop string came), "length", or the server's word
    """

    text: str
    tokens: list[str] | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[str, float]]] | None = None
    usage: Usage = Usage()
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Request:
    """A checked call, as a backend's `_generate` gets it; images are RGB PIL images."""

    messages: list[Message]
    n: int
    max_tokens: int
    temperature: float
    stop: list[str]
    images: list[Any]


def as_messages(conversation: Conversation) -> list[Message]:
    """The conversation as a list of plain dicts. Raises ValueError naming the message that is none."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    for place, message in enumerate(conversation):
        good = isinstance(message, Mapping) and set(message) == {"role", "content"}
        if not good or not all(isinstance(value, str) for value in message.values()):
            raise ValueError(
                f'messages: number {place} is not {{"role": text, "content": text}}: {message!r:.200}'
            )
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"messages: role {message['role']!r}; accepted: system, user, assistant")
    if not conversation:
        raise ValueError("messages: the conversation is empty")
    return [dict(message) for message in conversation]


class LLM:
    """What every backend offers. A backend of your own defines `_generate`, and `_loglik` if it can.

    name: for tables; can_loglik, can_see: whether `loglik` and images work; usage: sum over all calls.
    """

    name = "llm"
    can_loglik = False
    can_see = False

    def __init__(self) -> None:
        self.usage = Usage()
        self._lock = threading.Lock()

    def generate(
        self, messages: Conversation, n: int = 1, max_tokens: int = 256, temperature: float = 0.0,
        stop: str | Sequence[str] = (), images: Sequence[Any] | None = None,
    ) -> list[Reply]:  # fmt: skip
        """n replies to one conversation; temperature 0 is greedy.

        images: PIL images or paths; they belong to the first user message
        Raises ValueError for a bad argument, LLMError if there is no usable reply.
        """
        pictures = None if images is None else [images]
        return self.generate_batch([messages], n, max_tokens, temperature, stop, pictures)[0]

    def generate_batch(
        self, conversations: Sequence[Conversation], n: int = 1, max_tokens: int = 256,
        temperature: float = 0.0, stop: str | Sequence[str] = (),
        images: Sequence[Sequence[Any]] | None = None, return_errors: bool = False,
    ) -> list[Any]:  # fmt: skip
        """`generate` for many conversations at once (batches or threads): a list of n replies for each.

        images: a list for each conversation. return_errors: a conversation without a reply gives its LLMError
        in place of the list; otherwise the first such error is raised after all others were answered.
        """
        stop = [stop] if isinstance(stop, str) else list(stop)
        for name, value in dict(n=n, max_tokens=max_tokens).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r}; accepted: whole numbers from 1")
        if not temperature >= 0:
            raise ValueError(f"temperature: {temperature!r}; accepted: 0 or more")
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: {stop!r}; accepted: texts that are not empty")
        pictures = [()] * len(conversations) if images is None else images
        if len(pictures) != len(conversations):
            raise ValueError(f"images: {len(pictures)} lists for {len(conversations)} conversations")
        if any(pictures) and not self.can_see:
            raise LLMError(f"{self.name} takes no images")
        requests = [
            Request(as_messages(messages), n, max_tokens, temperature, stop, [_picture(x) for x in some])
            for messages, some in zip(conversations, pictures, strict=True)
        ]
        if any(r.images and all(m["role"] != "user" for m in r.messages) for r in requests):
            raise ValueError("images: the conversation has no user message that they could belong to")
        answers = self._generate(requests) if requests else []
        errors = [answer for answer in answers if isinstance(answer, LLMError)]
        self._count(*(r.usage for answer in answers if not isinstance(answer, LLMError) for r in answer))
        if errors and not return_errors:
            raise errors[0]
        return answers

    def loglik(self, prompt: Conversation, continuations: Sequence[str]) -> list[float]:
        """log p(continuation | prompt) for each continuation, in nats, summed over its tokens.

        Raises LLMError if the backend cannot (`can_loglik`), ValueError for an empty continuation.
        """
        return self.loglik_batch([prompt], [continuations])[0]

    def loglik_batch(
        self, prompts: Sequence[Conversation], continuations: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """`loglik` for many prompts at once, each with its own continuations."""
        if not self.can_loglik:
            raise LLMError(f"{self.name} gives no log-likelihoods of texts that it has not written itself")
        if len(prompts) != len(continuations):
            raise ValueError(f"continuations: {len(continuations)} lists for {len(prompts)} prompts")
        if not all(isinstance(text, str) and text for some in continuations for text in some):
            raise ValueError("continuations: each must be a text that is not empty")
        return self._loglik([as_messages(prompt) for prompt in prompts], [list(c) for c in continuations])

    def _generate(self, requests: list[Request]) -> list[list[Reply] | LLMError]:
        """Answer requests that differ in messages and images only."""
        raise NotImplementedError

    def _loglik(self, prompts: list[list[Message]], continuations: list[list[str]]) -> list[list[float]]:
        raise NotImplementedError

    def _count(self, *usages: Usage) -> None:
        with self._lock:
            self.usage = sum(usages, self.usage)


def _picture(image: Any) -> Any:
    from PIL import Image

    try:
        return (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
    except (OSError, AttributeError, ValueError) as error:
        raise ValueError(f"images: {image!r:.200} is no PIL image, no picture file: {error!r:.200}") from None


class ScriptedLLM(LLM):
    """Replies from a list, in order, or from a function of the messages: for tests and the smoke profile.

    replies: texts, `Reply`s or `LLMError`s (given in place of an answer); or `messages -> one of these`
    loglik: (messages, continuation) -> float, if `loglik` is wanted
    Usage counts words. Raises LLMError when the list is used up.
    """

    name = "scripted"
    can_see = True

    def __init__(
        self,
        replies: Sequence[str | Reply | LLMError] | Callable[[list[Message]], str | Reply | LLMError],
        loglik: Callable[[list[Message], str], float] | None = None,
    ) -> None:
        super().__init__()
        self._script = replies if callable(replies) else self._next
        self._left = iter(() if callable(replies) else list(replies))
        self._score, self.can_loglik, self.requests = loglik, loglik is not None, list[Request]()

    def _next(self, messages: list[Message]) -> str | Reply | LLMError:
        given = next(self._left, None)
        if given is None:
            raise LLMError(f"the script has no reply left for: {messages[-1]['content']!r:.200}")
        return given

    def _generate(self, requests: list[Request]) -> list[list[Reply] | LLMError]:
        self.requests += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> list[Reply] | LLMError:
        replies: list[Reply] = []
        read = sum(len(message["content"].split()) for message in request.messages)
        for _ in range(request.n):
            given = self._script(request.messages)
            if isinstance(given, LLMError):
                return given
            if isinstance(given, str):
                cut = min((at for text in request.stop if (at := given.find(text)) >= 0), default=len(given))
                usage = Usage(0 if replies else read, len(given[:cut].split()))
                given = Reply(given[:cut], usage=usage)
            replies.append(given)
        return replies

    def _loglik(self, prompts: list[list[Message]], continuations: list[list[str]]) -> list[list[float]]:
        assert self._score is not None
        return [
            [self._score(prompt, text) for text in some]
            for prompt, some in zip(prompts, continuations, strict=True)
        ]

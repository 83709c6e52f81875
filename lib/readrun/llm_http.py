"""`readrun.llm` over HTTP, from any server that speaks the OpenAI chat protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from readrun.llm import LLM, LLMError, Reply, Request, Usage


class OpenAILLM(LLM):
    """A model behind an OpenAI-compatible chat endpoint, asked by `threads` threads at once.

    base_url: up to and including /v1. The key comes from the environment variable `key_variable` alone; a
    server on this machine needs none. timeout: seconds without a byte from the server; max_retries: further
    attempts after a time-out, a broken connection, 408, 409, 429 or 5xx, with growing pauses
    top_logprobs: so many for each token; 0: no log-probabilities. seed: plus its number sent with a question
    extra: more fields of the request, None leaves one out: {"max_tokens": None, "max_completion_tokens": 9}
    Raises ValueError for a bad address or a missing key.
    """

    can_see = True

    def __init__(
        self, base_url: str, model: str, *, top_logprobs: int = 5, timeout: float = 60.0,
        max_retries: int = 4, threads: int = 8, seed: int | None = None, key_variable: str = "OPENAI_API_KEY",
        extra: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        try:
            import openai
        except ImportError:
            raise ValueError("a model behind an API needs the package openai: pip install openai") from None
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc:
            raise ValueError(f"base_url: {base_url!r:.100}; accepted: http(s)://host/v1 without user name")
        self._key = os.environ.get(key_variable, "")
        if not self._key and address.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError(
                f"{key_variable}: this environment variable with the key of {base_url} is not set"
            )
        self.name, self._model, self._url, self._errors = model, model, base_url, openai.OpenAIError
        self._tried = f"{max_retries + 1} attempts with {timeout:g} s each"
        self._settings: dict[str, Any] = (
            dict(logprobs=True, top_logprobs=top_logprobs) if top_logprobs else {}
        )
        self._extra, self._threads, self._seed, self._asked = dict(extra or {}), threads, seed, 0
        self._client = openai.OpenAI(
            base_url=base_url, api_key=self._key or "none", timeout=timeout, max_retries=max_retries
        )

    def _generate(self, requests: list[Request]) -> list[list[Reply] | LLMError]:
        with self._lock:
            first, self._asked = self._asked, self._asked + len(requests)
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._answer, requests, range(first, first + len(requests))))

    def _answer(self, request: Request, number: int) -> list[Reply] | LLMError:
        messages: list[dict[str, Any]] = [dict(message) for message in request.messages]
        if request.images:
            asked = next(message for message in messages if message["role"] == "user")
            asked["content"] = [*map(_image_part, request.images), {"type": "text", "text": asked["content"]}]
        body = {"max_tokens": request.max_tokens, "temperature": request.temperature, **self._settings}
        body |= {"stop": request.stop} if request.stop else {}
        body |= {"seed": self._seed + number} if self._seed is not None else {}
        replies: list[Reply] = []
        try:
            while len(replies) < request.n:  # some servers give one reply, whatever n is
                fields = body | {"n": request.n - len(replies)} | self._extra
                fields = {name: value for name, value in fields.items() if value is not None}
                replies += self._read(self._post(messages, fields))[: request.n - len(replies)]
        except LLMError as error:
            return error
        return replies

    def _post(self, messages: list[dict[str, Any]], fields: dict[str, Any]) -> str:
        create = self._client.chat.completions.with_raw_response.create
        try:
            answer = create(model=self._model, messages=messages, extra_body=fields)  # type: ignore[arg-type]
            return answer.http_response.text.replace(self._key or "\0", "***")  # a page may show the key
        except self._errors as error:
            said = f"{error} {error.__cause__ or ''}".replace(self._key or "\0", "***").strip()
            raise LLMError(f"{self.name} at {self._url} ({self._tried}): {said:.500}") from None

    def _read(self, text: str) -> list[Reply]:
        """The replies in the body of an answer. Raises an LLMError that quotes it if it holds none."""
        try:
            answer = json.loads(text)
            usage, replies = answer.get("usage"), []
            for choice in answer["choices"]:
                message, listed = choice["message"], (choice.get("logprobs") or {}).get("content")
                if message.get("refusal"):
                    raise LLMError(f"{self.name} refused: {message['refusal']:.300}")
                fields: dict[str, Any] = {}
                if listed is not None:
                    fields["tokens"] = [entry["token"] for entry in listed]
                    fields["logprobs"] = [float(entry["logprob"]) for entry in listed]
                    tops = [entry.get("top_logprobs") or [] for entry in listed]
                    fields["top_logprobs"] = [
                        [(t["token"], float(t["logprob"])) for t in top] for top in tops
                    ]
                reason = choice.get("finish_reason") or "stop"
                replies.append(Reply("" + (message["content"] or ""), **fields, finish_reason=reason))
            counts = usage and Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
            if not replies:
                raise ValueError("no choices")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LLMError(
                f"{self.name} at {self._url} sent no chat completion ({error!r:.100}): {text!r:.300}"
            ) from None
        if not counts:
            warnings.warn(f"{self.name} at {self._url} does not count tokens: its usage is 0", stacklevel=2)
            return replies
        share = counts.completion_tokens // len(replies)  # the server counts them together
        rest = Usage(0, counts.completion_tokens - share * len(replies)) + Usage(counts.prompt_tokens, 0)
        return [
            replace(reply, usage=Usage(0, share) if at else rest + Usage(0, share))
            for at, reply in enumerate(replies)
        ]


def _image_part(image: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}

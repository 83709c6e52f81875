"""`readrun.llm` over HTTP, from any server that speaks the OpenAI chat protocol, and from recordings."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from readrun import paths
from readrun.llm import LLM, LLMError, Message, Reply, Request, Usage


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
            return answer.http_response.text
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


class Cassette(LLM):
    """Requests and replies in a JSON file, replayed exactly: the model is not asked again.

    llm: a backend that answers requests which are not in the file; after each call its replies are added.
    Without it such a request raises LLMError. A request made k times has k replies, replayed in order.
    Raises ValueError for a file that is none of these.
    """

    can_loglik = can_see = True

    def __init__(self, path: str | Path, llm: LLM | None = None) -> None:
        super().__init__()
        self._path, self._llm, self._played = Path(path), llm, Counter[str]()
        self._tracks: dict[str, list[Any]] = {}
        if llm:
            self.can_loglik, self.can_see = llm.can_loglik, llm.can_see
        elif not self._path.is_file():
            raise ValueError(f"path: {path} does not exist, and there is no llm to record from")
        if self._path.is_file():
            try:
                for entry in json.loads(self._path.read_text(encoding="utf-8")):
                    self._tracks[_key(entry["request"])] = [_loaded(answer) for answer in entry["answers"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"path: {path} holds no recorded requests ({error!r:.200})") from error
        self.name = f"cassette of {llm.name}" if llm else f"cassette {self._path.name}"

    def _generate(self, requests: list[Request]) -> list[list[Reply] | LLMError]:
        def ask(llm: LLM, missing: list[Request]) -> list[list[Reply] | LLMError]:
            r, pictures = missing[0], [request.images for request in missing] if llm.can_see else None
            texts = [request.messages for request in missing]
            return llm.generate_batch(texts, r.n, r.max_tokens, r.temperature, r.stop, pictures, True)

        def plain(request: Request) -> dict[str, Any]:
            seen = [hashlib.sha256(x.tobytes() + repr(x.size).encode()).hexdigest() for x in request.images]
            return vars(request) | {"images": seen}

        return self._played_or(ask, requests, plain)

    def _loglik(self, prompts: list[list[Message]], continuations: list[list[str]]) -> list[list[float]]:
        def ask(llm: LLM, missing: list[Any]) -> list[list[float]]:
            return llm.loglik_batch(*map(list, zip(*missing, strict=True)))

        pairs = list(zip(prompts, continuations, strict=True))
        answers = self._played_or(ask, pairs, lambda pair: {"prompt": pair[0], "continuations": pair[1]})
        if errors := [answer for answer in answers if isinstance(answer, LLMError)]:
            raise errors[0]
        return answers

    def _played_or(self, ask: Callable, requests: list[Any], plain: Callable[[Any], dict]) -> list[Any]:
        """What the file holds for each request; what it does not hold, by `ask`, and then written to it."""
        keys, answers, missing = [_key(plain(request)) for request in requests], dict[int, Any](), list[int]()
        for at, key in enumerate(keys):
            turn, known = self._played[key], self._tracks.get(key, [])
            self._played[key] += 1
            if turn < len(known):
                answers[at] = known[turn]
            elif self._llm:
                missing.append(at)
            else:
                answers[at] = LLMError(f"{self.name} has {len(known)} answers, not {turn + 1}, to {key:.500}")
        if missing:
            new = ask(self._llm, [requests[at] for at in missing])
            for at, answer in zip(missing, new, strict=True):
                answers[at] = answer
                if not isinstance(answer, LLMError):
                    self._tracks.setdefault(keys[at], []).append(answer)
            entries = [{"request": json.loads(key), "answers": some} for key, some in self._tracks.items()]
            text = json.dumps(entries, ensure_ascii=False, indent=1, default=asdict)
            paths.write_atomic(self._path, text + "\n")
        return [answers[at] for at in range(len(keys))]


def _key(request: dict[str, Any]) -> str:
    return json.dumps(request, sort_keys=True, ensure_ascii=False)


def _loaded(answer: list[Any]) -> list[Any]:
    """A recorded answer: replies, or log-likelihoods."""
    if not all(isinstance(fields, dict) for fields in answer):
        return [float(value) for value in answer]
    replies = []
    for fields in answer:
        top = fields["top_logprobs"]
        fields["top_logprobs"] = top and [[(text, value) for text, value in row] for row in top]
        replies.append(Reply(**fields | {"usage": Usage(**fields["usage"])}))
    return replies

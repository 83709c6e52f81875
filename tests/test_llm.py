"""The client for any language model: backends against each other, closed forms, faults of a server."""

import base64
import io
import json
import math
import socket
import threading
import time
import weakref
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from readrun import decode
from readrun import llm as client
from readrun.llm import (
    LLMError,
    OpenAILLM,
    Reply,
    ScriptedLLM,
    TransformersLLM,
    Usage,
    from_spec,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mamba2Config,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

TEXT = [
    "the answer is correct",
    "the answer is incorrect",
    "is a trout a fish ?",
    "user says: new york é ü 日本",
]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ASKED = [
    "is a trout a fish ?",
    "the answer",
    "new york is correct is it ? the answer is",
    "é",
    "a b c d e f g",
]


def make_tokenizer(template=CHAT):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", chat_template=template
    )


def make_model(kind, tokenizer, seed=0, **more):
    torch.manual_seed(seed)
    size = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(kind(**size | heads | ends | more)).eval()
    for parameter in model.parameters():  # sharper than the initialisation, so that texts differ
        if parameter.ndim > 1:
            parameter.data.mul_(6.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in the published layout."""
    path, tokenizer = tmp_path_factory.mktemp("checkpoint"), make_tokenizer()
    make_model(LlamaConfig, tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def local(folder):
    return from_spec(str(folder))


def row_logprobs(model, prompt, row):
    """Brute force: log-softmax of one row without padding, without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


# A model of transformers


def test_greedy_replies_are_those_of_generate_with_the_logprobs_of_an_unpadded_row(folder, local):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    replies = [reply for (reply,) in local.generate_batch(ASKED, max_tokens=12)]
    assert len({reply.text for reply in replies}) > 3, "all texts alike: nothing is tested"
    for question, reply in zip(ASKED, replies, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(text)["input_ids"]
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False)
        row = out[0, len(prompt) :].tolist()
        ended = row[-1] == tokenizer.eos_token_id
        body = row[: len(row) - ended]
        assert reply.text == tokenizer.decode(body)
        assert reply.usage == Usage(len(prompt), len(row))
        assert reply.finish_reason == ("stop" if ended else "length")
        expected = row_logprobs(model, prompt, row)
        assert len(reply.tokens) == len(reply.logprobs) == len(reply.top_logprobs) == len(body)
        for i, token in enumerate(body):
            assert reply.logprobs[i] == pytest.approx(float(expected[i, token]), abs=1e-4)
            best = expected[i].topk(5)
            assert [value for _, value in reply.top_logprobs[i]] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
            assert reply.top_logprobs[i][0] == (reply.tokens[i], pytest.approx(reply.logprobs[i], abs=1e-6))
    assert local.usage == sum((reply.usage for reply in replies), Usage())


def test_batches_of_any_size_give_what_single_calls_give(folder):
    whole, pairs = from_spec(str(folder)), from_spec(str(folder), batch_size=2)
    together = whole.generate_batch(ASKED, max_tokens=9)
    assert [r.text for (r,) in pairs.generate_batch(ASKED, max_tokens=9)] == [r.text for (r,) in together]
    for question, (reply,) in zip(ASKED, together, strict=True):
        (alone,) = pairs.generate(question, max_tokens=9)
        assert (alone.text, alone.tokens, alone.usage) == (reply.text, reply.tokens, reply.usage)
        assert alone.logprobs == pytest.approx(reply.logprobs, abs=1e-4)


def test_growing_conversations_on_a_gpu_need_one_decoder_and_few_captures(folder, monkeypatch):
    """What would be captured is counted; the model says "cuda" and computes here."""
    asked = [[f"{question} " * times for question in ASKED] for times in (1, 3, 5, 7, 3, 9)]
    options = dict(batch_size=2, top_logprobs=0)
    expected = [from_spec(str(folder), **options).generate_batch(turn, max_tokens=9) for turn in asked]
    llm, alive, captured, runs = from_spec(str(folder), **options), weakref.WeakSet(), set(), 0

    def counted(self, function, *arguments):
        nonlocal runs
        alive.add(self)
        captured.add((self.batch, self.prompt_len, function.__name__, *arguments))
        runs += 1
        return function(*arguments)

    monkeypatch.setattr(decode.Decoder, "_run", counted)
    monkeypatch.setattr(type(llm.model), "device", SimpleNamespace(type="cuda"))
    for turn, replies in zip(asked, expected, strict=True):
        assert llm.generate_batch(turn, max_tokens=9) == replies
        assert len(alive) == 1, "a Decoder that was replaced is still there, with its graphs and its cache"
    assert {width for _, width, *_ in captured} == {128, 256 - 9}, "prompts of up to 128 tokens, and longer"
    assert len(captured) <= 6 and runs > 10 * len(captured)  # prompts with padding or without, and a step


@pytest.mark.parametrize(
    ("kind", "more"),
    [(MistralConfig, dict(sliding_window=8)), (Mamba2Config, dict(num_heads=4, head_dim=16, n_groups=1))],
)
def test_models_without_full_attention_run_in_generate(kind, more):
    tokenizer = make_tokenizer()
    model = make_model(kind, tokenizer, **more)
    llm = TransformersLLM(model, tokenizer)
    for (reply,) in [llm.generate("is a trout a fish ?", max_tokens=8)]:
        prompt = llm._prompt([{"role": "user", "content": "is a trout a fish ?"}])
        row = [token for token in model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, use_cache=False
        )[0, len(prompt) :].tolist()]  # fmt: skip
        expected = row_logprobs(model, prompt, row)
        body = [token for token in row if token != tokenizer.eos_token_id]
        assert reply.text == tokenizer.decode(body)
        chosen = [float(expected[i, token]) for i, token in enumerate(body)]
        assert reply.logprobs == pytest.approx(chosen, abs=1e-3)
    assert llm.can_loglik == (kind is MistralConfig)


def test_samples_follow_the_softmax_at_the_temperature_and_a_seed_repeats_them(folder):
    llm = from_spec(str(folder), batch_size=1000, seed=3)
    replies = llm.generate("the answer", n=1000, max_tokens=1, temperature=2.0)
    prompt = llm._prompt([{"role": "user", "content": "the answer"}])
    chances = (row_logprobs(llm.model, prompt, [0])[0] / 2).softmax(-1)
    best = int(chances[2:].argmax()) + 2
    seen = sum(reply.tokens == [llm._piece(best)] for reply in replies) / 1000
    assert abs(seen - chances[best]) < 4 * math.sqrt(chances[best] * (1 - chances[best]) / 1000)
    assert llm.usage == Usage(len(prompt), 1000), "a prompt counts once, whatever n is"
    again = from_spec(str(folder), batch_size=1000, seed=3)
    assert [r.text for r in again.generate("the answer", n=1000, max_tokens=1, temperature=2.0)] == [
        r.text for r in replies
    ]
    assert [r.text for r in again.generate("the answer", n=1000, max_tokens=1, temperature=2.0)] != [
        r.text for r in replies
    ]
    plain = {r.logprobs[0] for r in replies if r.tokens == [llm._piece(best)]}
    assert list(plain) == pytest.approx([float(row_logprobs(llm.model, prompt, [0])[0, best])], abs=1e-4)


def test_a_stop_string_cuts_text_and_tokens_wherever_the_tokens_split_it(local):
    (free,) = local.generate("the answer", max_tokens=24)
    prompt = torch.tensor([local._prompt(client.as_messages("the answer"))])
    ids = local.model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :].tolist()
    texts = [local.tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(len(ids) + 1)]
    assert texts[-1] == free.text
    for first in range(2, len(free.text) - 3, 2):
        stop = free.text[first : first + 3]
        cut = free.text.index(stop)
        (reply,) = local.generate("the answer", max_tokens=24, stop=[stop, "never there"])
        assert (reply.text, reply.finish_reason) == (free.text[:cut], "stop")
        assert reply.usage.completion_tokens == next(k for k, text in enumerate(texts) if stop in text)
        assert reply.tokens == free.tokens[: next(k for k, text in enumerate(texts) if len(text) >= cut)]
        assert reply.logprobs == pytest.approx(free.logprobs[: len(reply.tokens)], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "more"),
    [(LlamaConfig, {}), (Qwen2Config, {}), (MistralConfig, dict(sliding_window=8)), (GPT2Config, {})],
)
def test_loglik_is_the_sum_over_the_tokens_of_an_unpadded_row(kind, more):
    tokenizer = make_tokenizer()
    llm = TransformersLLM(make_model(kind, tokenizer, **more), tokenizer, batch_size=3)
    options = [["correct", "incorrect", " a fish", "é"], ["x"], [" the answer is correct", "correct"]]
    prompts = [
        "is it ?",
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "new york"}],
        "?",
    ]
    found = llm.loglik_batch(prompts, options)
    for prompt, some, values in zip(prompts, options, found, strict=True):
        ids = llm._prompt(client.as_messages(prompt))
        for text, value in zip(some, values, strict=True):
            row = tokenizer(text, add_special_tokens=False)["input_ids"]
            logp = row_logprobs(llm.model, ids, row)
            assert value == pytest.approx(sum(float(logp[i, t]) for i, t in enumerate(row)), abs=1e-4)
        assert llm.loglik(prompt, some) == pytest.approx(values, abs=1e-4)
    greedy = llm.generate("is it ?", max_tokens=1)[0]
    assert llm.loglik("is it ?", greedy.tokens) == pytest.approx(greedy.logprobs, abs=1e-4)


def test_loglik_where_the_tokenizer_would_join_prompt_and_continuation():
    tokenizer = make_tokenizer()
    llm = TransformersLLM(make_model(LlamaConfig, tokenizer), tokenizer, template=client.raw)
    assert tokenizer.tokenize("the answer is cor") + tokenizer.tokenize("rect") != tokenizer.tokenize(
        "the answer is correct"
    )
    for text in ("rect", "rect is a trout a fish ?"):
        prompt, row = tokenizer("the answer is cor")["input_ids"], tokenizer(text)["input_ids"]
        logp = row_logprobs(llm.model, prompt, row)
        (value,) = llm.loglik("the answer is cor", [text])
        assert value == pytest.approx(sum(float(logp[i, t]) for i, t in enumerate(row)), abs=1e-4)


def word_tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", *"the answer is yes no a b".split()])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>")


def test_word_tokenizer_tokens_have_their_space_and_impossible_continuations_are_refused():
    tokenizer = word_tokenizer()
    llm = TransformersLLM(make_model(LlamaConfig, tokenizer), tokenizer, template=client.raw)
    (reply,) = llm.generate("the answer is", max_tokens=6)
    assert "".join(reply.tokens) == " " + reply.text
    assert len(llm.loglik("the answer is", [" yes", " no"])) == 2
    with pytest.raises(ValueError, match="' maybe' has a token unknown"):
        llm.loglik("the answer is", [" maybe"])
    with pytest.raises(ValueError, match="cannot write 'nswer' behind"):
        llm.loglik("the a", ["nswer"])


def test_prompts_by_chat_template_plain_template_and_continued_assistant_turn(local):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the answer is"}]
    decode = local.tokenizer.decode
    assert decode(local._prompt(turns[:1])) == "<|user|>a\n<|assistant|>"
    assert decode(local._prompt(turns)) == "<|user|>a\n<|assistant|>the answer is"
    bare = TransformersLLM(local.model, make_tokenizer(None))
    assert decode(bare._prompt(turns[:1])) == "User: a\n\nAssistant:"
    assert decode(bare._prompt(turns)) == "User: a\n\nAssistant: the answer is"
    refusing = TransformersLLM(local.model, make_tokenizer("{{ raise_exception('no system turn') }}"))
    with pytest.raises(LLMError, match="no system turn"):
        refusing.generate("a")


def test_a_prompt_without_tokens_is_refused(local):
    llm = TransformersLLM(local.model, local.tokenizer, template=client.raw)
    for call in (lambda: llm.generate(""), lambda: llm.loglik("", ["a"])):
        with pytest.raises(ValueError, match="messages: .* no tokens"):
            call()


def test_too_long_a_prompt_fails_alone_and_training_mode_comes_back(local):
    local.model.train()
    good, bad = local.generate_batch(["a", "b " * 200], max_tokens=100, return_errors=True)
    assert len(good) == 1 and isinstance(bad, LLMError) and "exceed its 256 positions" in str(bad)
    local.loglik("a", ["b"])
    assert all(module.training for module in local.model.modules())
    with pytest.raises(ValueError, match="256 positions"):
        local.loglik("b " * 200, ["c"])
    local.top_logprobs = 0
    (reply,) = local.generate("a", max_tokens=5)
    assert (reply.logprobs, reply.top_logprobs, len(reply.tokens) > 0) == (None, None, True)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny Llava with its processor, saved and loaded."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = make_model(LlamaConfig, tokenizer).config
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    for parameter in model.parameters():
        parameter.data.mul_(6.0 if parameter.ndim > 1 else 1.0)
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% for part in m['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
        "<|assistant|>"
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("seeing")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return from_spec(str(path))


def picture(colour):
    return Image.new("RGB", (12, 8), colour)


def test_a_model_that_sees_gets_the_images_and_its_logprobs_are_a_forward_pass(seeing):
    questions, images = ["what ?", "is it a fish ?", "no image"], [[picture("red")], [picture("blue")], []]
    replies = [reply for (reply,) in seeing.generate_batch(questions, max_tokens=8, images=images)]
    (other,) = seeing.generate("what ?", max_tokens=8, images=[picture("green")])
    assert other.logprobs != pytest.approx(replies[0].logprobs, abs=1e-3), "the image makes no difference"
    for question, some, reply in zip(questions, images, replies, strict=True):
        text = f"<|user|>{'<image>' * len(some)}{question}\n<|assistant|>"
        inputs = dict(seeing.processor(images=some or None, text=[text], return_tensors="pt"))
        row = seeing.model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
        logits = seeing.model(**inputs | {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0]
        new = row[0, inputs["input_ids"].shape[1] :].tolist()
        body = [token for token in new if token != seeing.tokenizer.eos_token_id]
        assert reply.text == seeing.tokenizer.decode(body, skip_special_tokens=True)
        expected = logits.detach()[inputs["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
        chosen = [float(expected[i, token]) for i, token in enumerate(body)]
        assert reply.logprobs == pytest.approx(chosen, abs=1e-3)
        assert reply.usage == Usage(inputs["input_ids"].shape[1], len(new))
    with pytest.raises(LLMError, match="no log-likelihoods"):
        seeing.loglik("x", ["y"])


# A server


class Server:
    """An OpenAI-compatible server on this machine: `answer(body) -> (status, headers, bytes)`."""

    def __init__(self, answer):
        self.answer, self.bodies, self.keys = answer, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.keys.append(self.headers["Authorization"])
                status, headers, data = outer.answer(body)
                self.send_response(status)
                for name, value in (
                    {"Content-Type": "application/json", "Content-Length": len(data)} | headers
                ).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving(answer):
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


def serve(llm):
    """The answers of a model of ours in the API's form, as its documentation gives it."""
    lock = threading.Lock()

    def answer(body):
        n, tops = body.get("n", 1), body.get("top_logprobs")
        images, messages = [], body["messages"]
        for message in messages:
            if not isinstance(message["content"], str):
                parts = message["content"]
                urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
                images += [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
                message["content"] = "".join(part["text"] for part in parts if part["type"] == "text")
        options = dict(
            max_tokens=body["max_tokens"], temperature=body["temperature"], stop=body.get("stop", [])
        )
        with lock:
            replies = llm.generate(messages, n, **options, images=images or None)
        choices = []
        for r in replies:
            entries = [
                {"token": t, "logprob": p, "top_logprobs": [{"token": a, "logprob": b} for a, b in top]}
                for t, p, top in zip(r.tokens, r.logprobs, r.top_logprobs, strict=True)
            ]
            message = {"role": "assistant", "content": r.text}
            logprobs = {"content": entries} if tops else None
            choices.append({"finish_reason": r.finish_reason, "message": message, "logprobs": logprobs})
        total = sum((r.usage for r in replies), Usage())
        return (
            200,
            {},
            json.dumps(
                {"id": "1", "object": "chat.completion", "choices": choices, "usage": vars(total)}
            ).encode(),
        )

    return answer


def completion(text="hello", **more):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}} | more
    return json.dumps(body).encode()


def test_a_served_checkpoint_gives_the_text_logprobs_and_usage_of_the_local_one(folder, local, seeing):
    with serving(serve(from_spec(str(folder)))) as server:
        remote = from_spec(f"openai:tiny@{server.url}")
        options = dict(max_tokens=12, stop=["zz", "qq"])
        here, there = local.generate_batch(ASKED, **options), remote.generate_batch(ASKED, **options)
        for (ours,), (theirs,) in zip(here, there, strict=True):
            assert (theirs.text, theirs.tokens, theirs.usage) == (ours.text, ours.tokens, ours.usage)
            assert theirs.finish_reason == ours.finish_reason
            assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-4)
            for one, other in zip(theirs.top_logprobs, ours.top_logprobs, strict=True):
                assert [v for _, v in one] == pytest.approx([v for _, v in other], abs=1e-4)
        assert remote.usage == local.usage
        assert {body["model"] for body in server.bodies} == {"tiny"} and server.keys[0] == "Bearer none"
        several = remote.generate("a", n=3, max_tokens=4)
        assert len(several) == 3 and len({reply.text for reply in several}) == 1
        assert sum((r.usage for r in several), Usage()) == sum(
            (r.usage for r in local.generate("a", 3, 4)), Usage()
        )
        with pytest.raises(LLMError, match="no log-likelihoods"):
            remote.loglik("a", ["b"])
    with serving(serve(seeing)) as server:
        remote = from_spec(f"openai:tiny@{server.url}")
        (theirs,) = remote.generate("what ?", max_tokens=6, images=[picture("red")])
        (ours,) = seeing.generate("what ?", max_tokens=6, images=[picture("red")])
        assert theirs.text == ours.text and theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-4)


SOON = {"retry-after-ms": "1"}
NOT_JSON = (200, {}, b'{"choices": [')


@pytest.mark.parametrize("fault", [(429, SOON, b"{}"), (500, SOON, b"oops"), (503, SOON, b"")])
def test_a_fault_that_passes_is_waited_out_and_one_that_stays_is_bounded(fault):
    answers = [fault, fault, (200, {}, completion())]
    with serving(lambda _: answers.pop(0)) as server:
        assert OpenAILLM(server.url, "m", max_retries=2).generate("a")[0].text == "hello"
        assert len(server.bodies) == 3
    with serving(lambda _: fault) as server:
        with pytest.raises(LLMError, match=rf"m at http.*3 attempts.*{fault[0]}"):
            OpenAILLM(server.url, "m", max_retries=2).generate("a")
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (NOT_JSON, r"no chat completion \(JSONDecodeError.*\{\"choices\": \["),
        ((200, {}, b"[]"), "no chat completion"),
        ((200, {}, b'{"choices": []}'), "no choices"),
        ((200, {}, b'{"choices": [{"message": {"content": 7}}]}'), "no chat completion"),
        ((200, {"Content-Type": "text/html"}, b"<html>log in</html>"), "no chat completion.*log in"),
        ((200, {}, b"\xff\xfe"), "no chat completion"),
        ((400, {}, b'{"error": {"message": "max_tokens is not supported"}}'), "max_tokens is not supported"),
        ((200, {}, b"<p>your key sk-secret-1"), r"no chat completion.*key \*\*\*"),
        ((401, {}, b'{"error": {"message": "wrong key sk-secret-1"}}'), r"wrong key \*\*\*"),
        ((200, {}, completion(choices=[{"message": {"content": None, "refusal": "no"}}])), "refused: no"),
    ],
)  # fmt: skip
def test_answers_that_are_none_are_quoted_and_not_asked_again(answer, message, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    with serving(lambda _: answer) as server:
        with pytest.raises(LLMError, match=message) as caught:
            OpenAILLM(server.url, "m").generate("a")
        assert len(server.bodies) == 1 and server.keys == ["Bearer sk-secret-1"]
        assert "secret" not in str(caught.value)


def test_what_a_server_leaves_out_is_none_and_said():
    with serving(lambda _: (200, {}, completion())) as server:
        (reply,) = OpenAILLM(server.url, "m").generate("a")
        assert reply == Reply("hello", usage=Usage(3, 2))
        assert server.bodies[0]["logprobs"] is True and server.bodies[0]["top_logprobs"] == 5
        llm = OpenAILLM(server.url, "m", top_logprobs=0, seed=5, extra={"max_tokens": None, "top_p": 0.5})
        llm.generate_batch(["a", "b"], n=2)
        bodies = server.bodies[1:]
        assert sorted(body["seed"] for body in bodies) == [5, 5, 6, 6] and bodies[0]["top_p"] == 0.5
        assert sorted(body["n"] for body in bodies) == [1, 1, 2, 2], (
            "one reply for n=2: the rest is asked for"
        )
        assert not any({"max_tokens", "logprobs", "top_logprobs", "stop"} & set(body) for body in bodies)
    with (
        serving(lambda _: (200, {}, completion(usage=None))) as server,
        pytest.warns(UserWarning, match="count tokens"),
    ):
        assert OpenAILLM(server.url, "m").generate("a")[0].usage == Usage()


def test_time_out_refused_connection_and_a_stream_that_ends_early(monkeypatch):
    wait = threading.Event()
    with serving(lambda _: (wait.wait(60), (200, {}, completion()))[1]) as server:
        llm = OpenAILLM(server.url, "m", timeout=0.1, max_retries=0)  # its import takes 5 s if much else runs
        start = time.monotonic()
        with pytest.raises(LLMError, match="1 attempts with 0.1 s each.*timed out"):
            llm.generate("a")
        assert time.monotonic() - start < 20
        wait.set()
    with serving(lambda _: (200, {"Content-Length": 999}, completion())) as server:
        with pytest.raises(LLMError, match=r"m at http.*Connection error.*(peer closed|incomplete)"):
            OpenAILLM(server.url, "m", max_retries=0, timeout=60).generate("a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(LLMError, match="Connection error.*refused"):
        OpenAILLM(f"http://127.0.0.1:{port}/v1", "m", max_retries=1).generate("a")


def test_threads_keep_the_order_and_one_failure_harms_no_other():
    together = threading.Barrier(4)

    def answer(body):
        question = body["messages"][-1]["content"]
        together.wait(60)  # passes only if four requests are under way at once
        return (400, {}, b"{}") if question == "3" else (200, {}, completion(question))

    with serving(answer) as server:
        llm = OpenAILLM(server.url, "m", threads=4, max_retries=0)
        answers = llm.generate_batch([str(i) for i in range(8)], return_errors=True)
        assert [isinstance(x, LLMError) or x[0].text for x in answers] == [*"012", True, *"4567"]
        assert llm.usage == Usage(21, 14)
        with pytest.raises(LLMError, match="400"):
            llm.generate_batch(["0", "1", "2", "3"])


# Checkpoints by name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "openai:gpt",
            r"checkpoint: 'openai:gpt': after openai: comes MODEL@URL; accepted: hub id or folder",
        ),
        ("openai:m@ftp://host", "MODEL@URL"),
        ("openai:m@http://me:pw@host/v1", "without user name"),
        ("openai:m@https://api.example.org/v1", "OPENAI_API_KEY.*not set"),
        ("/no/such/folder", "checkpoint: '/no/such/folder'"),
    ],
)
def test_bad_checkpoints_name_the_parameter(spec, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        from_spec(spec)
    assert "me:pw" not in str(caught.value)


def test_only_safetensors_are_read(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="checkpoint: .*safetensors"):
        from_spec(str(tmp_path))


# Scripts


def test_script_in_order_with_stop_usage_and_its_end():
    llm = ScriptedLLM(["one two STOP three", Reply("given", usage=Usage(0, 7)), LLMError("down")])
    first, second = llm.generate([{"role": "user", "content": "say it now"}], n=2, stop="STOP")
    assert (first.text, first.usage, first.logprobs) == ("one two ", Usage(3, 2), None)
    assert second.text == "given" and llm.usage == Usage(3, 9)
    (error,) = llm.generate_batch(["again"], return_errors=True)
    assert isinstance(error, LLMError) and str(error) == "down"
    with pytest.raises(LLMError, match="no reply left for: 'more'"):
        llm.generate("more")


def test_script_of_a_function_sees_messages_and_scores():
    llm = ScriptedLLM(lambda messages: messages[-1]["content"].upper(), lambda _, text: -float(len(text)))
    assert [r.text for (r,) in llm.generate_batch(["a", "b"])] == ["A", "B"]
    assert llm.loglik("x", ["ab", "abc"]) == [-2.0, -3.0]
    with pytest.raises(LLMError, match="scripted gives no log-likelihoods"):
        ScriptedLLM([]).loglik("x", ["y"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(messages=[]), "messages: the conversation is empty"),
        (dict(messages=[{"role": "user"}]), "messages: number 0"),
        (dict(messages=[{"role": "robot", "content": "x"}]), "role 'robot'; accepted: system, user"),
        (dict(messages="x", n=0), "n: 0; accepted: whole numbers from 1"),
        (dict(messages="x", max_tokens=0), "max_tokens: 0"),
        (dict(messages="x", max_tokens=2.5), "max_tokens: 2.5"),
        (dict(messages="x", temperature=-1.0), "temperature: -1.0"),
        (dict(messages="x", temperature=float("nan")), "temperature: nan"),
        (dict(messages="x", stop=[""]), "stop"),
        (dict(messages="x", images=["no/such.png"]), "images: 'no/such.png' is no PIL image"),
        (dict(messages=[{"role": "system", "content": "x"}], images=[picture("red")]), "no user message"),
    ],
)
def test_bad_calls_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        ScriptedLLM(["never"]).generate(**call)

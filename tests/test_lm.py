"""Tokenizers lose nothing and keep their ids; configurations of the real classes; batches of a text."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import lm
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["The cat sat on the mat.", "The dog, the cat: 12 of 120!\n\tIt isn't  (so) bad."]
BYTES = lm.byte_tokenizer()
BPE = lm.bpe_tokenizer(TEXTS * 3, 280, ("<pad>", "<eos>"))
WORDS = lm.word_tokenizer(TEXTS)
CHARS = lm.char_tokenizer("abc \n")


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_bytes_and_bpe_lose_nothing(text: str) -> None:
    assert BYTES(text).input_ids == list(text.encode())
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode(tokenizer(text).input_ids) == text or "<" in text


@settings(max_examples=80, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([*"abc \n"])), words=st.lists(st.sampled_from(["The cat", " dog", "\n"]))
)
def test_words_and_characters_lose_nothing_of_their_vocabulary(pieces: list[str], words: list[str]) -> None:
    text = "".join(pieces)
    assert CHARS.decode(CHARS(text).input_ids) == text and len(CHARS(text).input_ids) == len(text)
    text = "".join(["The", *words])
    ids = WORDS(text).input_ids
    assert WORDS.decode(ids) == text or WORDS.unk_token_id in ids


def test_word_ids_by_hand() -> None:
    assert WORDS.decode(WORDS(TEXTS[1]).input_ids) == TEXTS[1]
    # " cat" and " the" and "The" and "." twice each: by the alphabet; then what occurs once
    assert WORDS.convert_ids_to_tokens(range(8)) == [
        "<pad>",
        "<eos>",
        "<unk>",
        " cat",
        " the",
        ".",
        "The",
        "\t",
    ]
    assert lm.word_tokenizer(TEXTS, 5).get_vocab().keys() == {"<pad>", "<eos>", "<unk>", " cat", " the"}
    assert WORDS(" zebra").input_ids == [WORDS.unk_token_id]
    own = lm.word_tokenizer(
        ["He has [A] pain."], pattern=r"\[[A-D]\]|\w+|[^\w\s]", eos_token=".", padding_side="left"
    )
    assert own.tokenize("pain [A] .") == ["pain", "[A]", "."] and own.padding_side == "left"
    assert own.eos_token == "." and own.decode(own("He has [A]").input_ids) == "He has [A]"


def test_bpe_ids() -> None:
    assert len(BPE) == 280 and BPE.convert_tokens_to_ids(["<pad>", "<eos>"]) == [256, 257]
    assert BPE.pad_token == "<pad>" and BPE.eos_token == "<eos>" and BPE.unk_token is None
    assert min(BPE("The cat").input_ids) > 257 and len(BPE("The cat").input_ids) < 7
    assert BPE("a<eos>b").input_ids == [ord("a"), 257, ord("b")]
    again = lm.bpe_tokenizer(iter(TEXTS * 3), 280, ("<pad>", "<eos>"))
    assert again.get_vocab() == BPE.get_vocab()


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, WORDS, CHARS], ids=["bytes", "bpe", "words", "chars"])
def test_tokenizers_are_published_files(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The cat sat\n on a mat, abc."
    assert loaded(text).input_ids == tokenizer(text).input_ids and len(loaded) == len(tokenizer)
    assert loaded.decode(loaded(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_more_special_tokens(tmp_path: Path) -> None:
    special = ("<pad>", "<eos>", "<|cite_start|>", "<|cite_end|>")
    lm.bpe_tokenizer(TEXTS, 270, special).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded("a<|cite_start|>b").input_ids
    assert ids == [ord("a"), 258, ord("b")] and set(loaded.all_special_tokens) == set(special)
    assert loaded.decode(ids, skip_special_tokens=True) == "ab"
    assert loaded.add_tokens(["<|more|>"]) == 1 and len(loaded) == 271


def test_bad_tokenizers() -> None:
    with pytest.raises(ValueError, match="vocab_size=200"):
        lm.bpe_tokenizer(TEXTS, 200)
    with pytest.raises(ValueError, match="repeated"):
        lm.byte_tokenizer(("<a>", "<a>"))
    with pytest.raises(ValueError, match="special"):
        lm.word_tokenizer(TEXTS, special=("<pad>",))
    with pytest.raises(ValueError, match="vocab_size=3"):
        lm.word_tokenizer(TEXTS, 3)
    with pytest.raises(ValueError, match="alphabet"):
        lm.char_tokenizer("aa")


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("family", ["llama", "qwen2", "mamba2"])
def test_models_depend_on_the_seed_and_save_and_load(family: str, tmp_path: Path) -> None:
    fields = dict(n_groups=2, state_size=16) if family == "mamba2" else {}
    config = lm.causal_config(family, BPE, width=64, depth=2, heads=8, context=32, **fields)
    state = torch.random.get_rng_state()
    models = [lm.causal_lm(config, seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    ids = torch.tensor([BPE(TEXTS[0]).input_ids])
    with torch.no_grad():
        logits = [model(ids).logits for model in models]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert logits[0].shape == (1, ids.shape[1], 280) and logits[0].dtype == torch.float32
    models[0].save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, logits[0])
    assert (loaded.config.pad_token_id, loaded.config.eos_token_id) == (256, 257)


def test_parameters_are_those_of_the_formula() -> None:
    d, layers, v = 48, 3, len(WORDS)
    config = lm.causal_config("llama", WORDS, width=d, depth=layers, heads=4, intermediate_size=96)
    count = sum(p.numel() for p in lm.causal_lm(config, 0).parameters())
    assert count == v * d + layers * (4 * d * d + 3 * d * 96 + 2 * d) + d
    assert lm.causal_config("qwen2", WORDS, width=d, depth=layers, heads=4).intermediate_size == 128
    quamba2 = lm.causal_config("mamba2", BYTES, width=128, depth=4, heads=16, n_groups=2)  # its cpu profile
    assert (quamba2.head_dim, quamba2.num_heads, quamba2.state_size, quamba2.vocab_size) == (16, 16, 32, 256)


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="family='gpt2'"):
        lm.causal_config("gpt2", WORDS, width=8, depth=1, heads=1)
    with pytest.raises(ValueError, match="heads=3"):
        lm.causal_config("llama", WORDS, width=8, depth=1, heads=3)


# ---------------------------------------------------------------- batches


def test_encode_ends_every_text() -> None:
    assert lm.encode(BPE, ["a", "", "bc"]).tolist() == [97, 257, 257, 98, 99, 257]
    assert lm.encode(BYTES, ["a", "bc"]).tolist() == [97, 98, 99] and len(lm.encode(BYTES, [])) == 0


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 200), batch=st.integers(1, 7), length=st.integers(1, 30), seed=st.integers(0, 9))
def test_a_pass_shows_every_block_once(n: int, batch: int, length: int, seed: int) -> None:
    ids = np.arange(n)
    if n < length:
        with pytest.raises(ValueError, match="one block"):
            next(lm.batches(ids, batch, length, seed))
        return
    found = list(lm.batches(ids, batch, length, seed))
    assert all(b.shape == (batch, length) for b in found[:-1]) and 1 <= len(found[-1]) <= batch
    rows = torch.cat(found)
    assert (rows.diff(dim=1) == 1).all()  # consecutive tokens
    starts = sorted(rows[:, 0].tolist())
    assert starts[0] < length and n - (starts[-1] + length) < length  # no block more fits at either end
    assert starts == list(range(starts[0], starts[-1] + 1, length))
    again = list(lm.batches(ids, batch, length, seed))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_steps_go_on_with_new_passes() -> None:
    ids = np.arange(100)
    found = list(lm.batches(ids, 4, 10, 0, steps=20))
    assert len(found) == 20 and all(b.shape == (4, 10) for b in found)
    assert len({int(start) % 10 for b in found for start in b[:, 0]}) > 1  # each pass has its own offset
    other = lm.batches(ids, 4, 10, 1, steps=20)
    assert any(not torch.equal(a, b) for a, b in zip(found, other, strict=True))
    longer = itertools.islice(lm.batches(ids, 4, 10, 0, steps=99), 20)
    assert all(torch.equal(a, b) for a, b in zip(found, longer, strict=True))

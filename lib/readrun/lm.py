"""Small language models: tokenizers of every grain, configurations of the real classes, batches of a text.

Every tokenizer is a `PreTrainedTokenizerFast` and every model one of transformers' own classes, so that both
save and load as published ones do. A chapter chooses sizes; what follows from them is filled in here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
PIECES = r" ?\w+| ?[^\w\s]|\s"  # a word or a mark with the space before it: nothing is lost
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that stand for themselves


def _fast(core: Tokenizer, special: Sequence[str], options: dict[str, Any]) -> PreTrainedTokenizerFast:
    if len(set(special)) != len(special) or "" in special:
        raise ValueError(f"special: {list(special)} has an empty or repeated token")
    roles = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    roles = {role: token for role, token in roles.items() if token in special}
    options = {"clean_up_tokenization_spaces": False} | roles | options
    rest = [token for token in special if token not in options.values()]
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=rest, **options)


def _words(tokens: Iterable[str], pattern: str, fuse: bool) -> Tokenizer:
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    if fuse:
        core.decoder = decoders.Fuse()
    return core


def word_tokenizer(
    texts: Iterable[str], vocab_size: int | None = None, special: Sequence[str] = (PAD, EOS, UNK),
    pattern: str = PIECES, **options: Any,
) -> PreTrainedTokenizerFast:  # fmt: skip
    """One token per piece of text that `pattern` finds: by default a word, number, mark or line break, with
    the space before it, so that decoding gives the text back; with another pattern it joins pieces by spaces.

    Ids: `special`, then the pieces of `texts`, the most frequent first (ties by the alphabet), `vocab_size`
    in all. Other pieces become "<unk>". `options` go to PreTrainedTokenizerFast (`padding_side`, …).
    """
    if UNK not in special or (vocab_size is not None and vocab_size <= len(special)):
        raise ValueError(f"special must hold {UNK!r}, vocab_size={vocab_size} be larger than {len(special)}")
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    seen = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    ranked = sorted(seen.keys() - set(special), key=lambda piece: (-seen[piece], piece))
    return _fast(_words([*special, *ranked][:vocab_size], pattern, pattern == PIECES), special, options)


def char_tokenizer(
    alphabet: str, special: Sequence[str] = (PAD, EOS, UNK), **options: Any
) -> PreTrainedTokenizerFast:
    """One token per character: ids of `special`, then of `alphabet`; other characters become "<unk>"."""
    if UNK not in special or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"special must hold {UNK!r}, no character of alphabet={alphabet!r} twice")
    return _fast(_words([*special, *alphabet], r"[\s\S]", True), special, options)


def bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's splitting, trained on `texts`; nothing is lost, nothing unknown.

    Ids: bytes are 0 to 255, then `special`, then merges as they were learnt, `vocab_size` in all at most.
    """
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size={vocab_size}: at least {256 + len(special)} are needed")
    signs = dict(zip(BYTES, map(chr, BYTES), strict=True))  # the others have stand-ins from 256 on
    signs |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - signs.keys()))}
    alphabet = [signs[byte] for byte in range(256)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    size = vocab_size - len(special)
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *special, *map("".join, merges)])
    core.model = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    core.decoder = decoders.ByteLevel()
    return _fast(core, special, options)


def byte_tokenizer(special: Sequence[str] = (), **options: Any) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, its id the byte; `special` from 256 on."""
    return bpe_tokenizer((), 256 + len(special), special, **options)


def causal_config(family: str, tokenizer: PreTrainedTokenizerFast, *, width: int, depth: int, heads: int,
                  context: int = 512, **fields: Any) -> Any:  # fmt: skip
    """Configuration of a "llama", "qwen2" or "mamba2" for a tokenizer, with tied embeddings.

    width: hidden size. depth: layers. heads: of attention, or of the state space (2 * width / heads wide).
    context: longest input (mamba2 has no limit). `fields` go to the class and win (`n_groups`, `state_size`,
    …); else the MLP is 8/3 of the width, rounded up to 32, and every head has its own key. Raises ValueError.
    """
    if family not in ("llama", "qwen2", "mamba2"):
        raise ValueError(f"family={family!r}: it is one of 'llama', 'qwen2', 'mamba2'")
    if heads < 1 or width % heads:
        raise ValueError(f"heads={heads}: they must divide width={width}")
    common = {role: getattr(tokenizer, role) for role in ("pad_token_id", "bos_token_id", "eos_token_id")}
    common |= dict(vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=depth)
    common |= dict(tie_word_embeddings=True)
    expand = fields.get("expand", 2)
    own: dict[str, Any] = dict(num_attention_heads=heads, num_key_value_heads=heads,
               intermediate_size=-(-width * 8 // 3 // 32) * 32, max_position_embeddings=context)  # fmt: skip
    if family == "mamba2":
        own = dict(
            num_heads=heads, head_dim=expand * width // heads, n_groups=1, state_size=32, chunk_size=64
        )
    return AutoConfig.for_model(family, **(common | own | fields))


def causal_lm(config: Any, seed: int) -> Any:
    """A model with float32 weights that depend on `seed` alone; torch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> np.ndarray:
    """Ids of all `texts` one after another, each followed by the end token if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    given = list(texts)
    rows = tokenizer(given, add_special_tokens=False)["input_ids"] if given else [[]]
    return np.concatenate([np.array([*row, *(end if given else [])], np.int32) for row in rows])


def batches(
    ids: np.ndarray, batch: int, length: int, seed: int, steps: int | None = None
) -> Iterator[torch.Tensor]:
    """int64 tensors (batch, length) of consecutive tokens, for `steps` batches, else for one pass.

    A pass cuts `ids` into blocks without gap or overlap from a random offset below `length` and shows each
    once in random order; the next follows without a break. Only a single pass may end with a smaller batch.
    """
    if min(batch, length) < 1 or len(ids) < length:
        raise ValueError(f"batch={batch}, length={length}: {len(ids)} tokens do not give one block")
    rng = np.random.default_rng(seed)

    def starts() -> Iterator[int]:
        for _ in range(1) if steps is None else count():
            offset = int(rng.integers(min(length, len(ids) - length + 1)))
            yield from rng.permutation(np.arange(offset, len(ids) - length + 1, length)).tolist()

    blocks = starts()
    for _ in count() if steps is None else range(steps):
        if not (rows := list(islice(blocks, batch))):
            return
        yield torch.from_numpy(np.stack([ids[row : row + length] for row in rows]).astype(np.int64))

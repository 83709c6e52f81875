"""The captured decode step against `generate`, closed forms and hand-made rows."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from readrun import decode

EOS, PAD, VOCAB = 2, 0, 24
SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, max_position_embeddings=128),
    "llama-gqa-tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, max_position_embeddings=128),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4),
}


def build(name: str, seed: int = 0, implementation: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=implementation)
    for parameter in model.parameters():  # sharper than the initialisation: greedy texts then differ and end
        if parameter.ndim > 1:
            parameter.data.mul_(6.0)
    return model.train()


def prompts(count: int = 9, longest: int = 11, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in sizes]


def generate(model, rows, new, eos=EOS, **options):
    ids, mask = decode.left_pad(rows, PAD)
    ends = dict(eos_token_id=eos, pad_token_id=PAD, max_new_tokens=new)
    return model.eval().generate(ids, attention_mask=mask, **ends, **options)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_generate_on_ragged_prompts(name, implementation):
    model = build(name, implementation=implementation)
    rows = prompts()
    width = max(map(len, rows))
    free = generate(model, rows, 8, eos=[VOCAB - 1], do_sample=False)[:, width:]
    ends = free[:3, 5].tolist()  # tokens that some rows reach early: they are made the ends
    expected = generate(model, rows, 40, eos=ends, do_sample=False)
    model.train()
    rollout = decode.sample(model, rows, 40, eos_id=ends, pad_id=PAD, temperature=0)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(rollout.ids, expected)
    assert 0 < rollout.finished.sum(), "no row ended: the test does not see the stop"
    assert len(set(map(tuple, rollout.completions))) > 1, "all rows alike: the test does not see the prompts"


def test_rows_of_one_length_take_the_unmasked_path_and_equal_generate():
    model, rows = build("llama"), [[3, 4, 5, 6], [9, 8, 7, 10], [20, 21, 3, 3]]
    expected = generate(model, rows, 30, do_sample=False)
    assert torch.equal(decode.sample(model, rows, 30, eos_id=EOS, pad_id=PAD, temperature=0).ids, expected)


def test_mask_and_finished_of_rows_that_end_and_rows_that_do_not():
    model = build("llama")
    rollout = decode.sample(model, prompts(32), 12, eos_id=EOS, pad_id=PAD, generator=torch.Generator().manual_seed(1))
    assert rollout.mask.shape == (32, rollout.ids.shape[1] - rollout.prompt_len)
    assert 0 < rollout.finished.sum() < 32
    for ids, mask, finished in zip(rollout.ids[:, rollout.prompt_len :], rollout.mask, rollout.finished, strict=True):
        ends = (ids == EOS).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(ids)
        assert finished == bool(ends)
        assert mask.tolist() == [True] * length + [False] * (len(ids) - length)
        assert (ids[length:] == PAD).all()


def test_larger_decoder_and_smaller_call_give_the_same_tokens():
    model, rows = build("qwen2"), prompts(5)
    plain = decode.sample(model, rows, 20, eos_id=EOS, pad_id=PAD, temperature=0)
    decoder = decode.Decoder(model, 8, 16, 48, eos_id=EOS, pad_id=PAD, bucket=8)
    for _ in range(2):  # the second call finds the first one's leftovers
        larger = decode.sample(model, rows, 20, eos_id=EOS, pad_id=PAD, temperature=0, decoder=decoder)
        assert larger.completions == plain.completions and torch.equal(larger.finished, plain.finished)
        decoder.generate(prompts(8, 16, seed=4))
    many = prompts(19)
    expected = decode.sample(model, many, 20, eos_id=EOS, pad_id=PAD, temperature=0)
    rounds = decode.sample(model, many, 20, eos_id=EOS, pad_id=PAD, temperature=0, decoder=decoder)
    assert rounds.completions == expected.completions and torch.equal(rounds.mask, expected.mask)

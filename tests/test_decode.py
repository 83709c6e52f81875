"""The captured decode step against `generate`, closed forms and hand-made rows."""

import pytest
import torch
from readrun import decode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

EOS, PAD, VOCAB = 2, 0, 24
SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
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


def test_no_position_of_a_padded_prompt_has_nothing_to_attend_to():
    """Some attention kernels give nan for such a row, and the next layer hands it on to all others."""
    model, masks = build("llama"), []
    keep = lambda module, args, kwargs: masks.append(kwargs["attention_mask"])  # noqa: E731
    model.model.register_forward_pre_hook(keep, with_kwargs=True)
    decode.sample(model, [[3, 4], [9, 8, 7, 10]], 3, eos_id=EOS, pad_id=PAD)
    assert masks[0].shape == (2, 1, 4, 4) and all((mask == 0).any(-1).all() for mask in masks)
    assert (masks[0][0, 0, 2:, :2] < 0).all(), "a real token sees padding"


def test_mask_and_finished_of_rows_that_end_and_rows_that_do_not():
    model = build("llama")
    rollout = decode.sample(
        model, prompts(32), 12, eos_id=EOS, pad_id=PAD, generator=torch.Generator().manual_seed(1)
    )
    assert rollout.mask.shape == (32, rollout.ids.shape[1] - rollout.prompt_len)
    assert 0 < rollout.finished.sum() < 32
    for ids, mask, finished in zip(
        rollout.ids[:, rollout.prompt_len :], rollout.mask, rollout.finished, strict=True
    ):
        ends = (ids == EOS).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(ids)
        assert finished == bool(ends)
        assert mask.tolist() == [True] * length + [False] * (len(ids) - length)
        assert (ids[length:] == PAD).all()


def test_larger_decoder_and_smaller_call_give_the_same_tokens():
    model, rows = build("qwen2"), prompts(5)
    plain = decode.sample(model, rows, 20, eos_id=EOS, pad_id=PAD, temperature=0)
    decoder = decode.Decoder(model, 8, 16, 48, eos_id=EOS, pad_id=PAD)
    for _ in range(2):  # the second call finds the first one's leftovers
        larger = decode.sample(model, rows, 20, eos_id=EOS, pad_id=PAD, temperature=0, decoder=decoder)
        assert larger.completions == plain.completions and torch.equal(larger.finished, plain.finished)
        decoder.generate(prompts(8, 16, seed=4))
    many = prompts(19)
    expected = decode.sample(model, many, 20, eos_id=EOS, pad_id=PAD, temperature=0)
    rounds = decode.sample(model, many, 20, eos_id=EOS, pad_id=PAD, temperature=0, decoder=decoder)
    assert rounds.completions == expected.completions and torch.equal(rounds.mask, expected.mask)


def test_the_host_stops_when_all_rows_have_ended():
    model, calls = build("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    free = decode.sample(model, [[3, 4]], 30, eos_id=VOCAB - 1, pad_id=PAD, temperature=0)
    end = free.completions[0][4]
    first = free.completions[0].index(end) + 1
    calls.clear()
    rollout = decode.sample(model, [[3, 4]], 30, eos_id=end, pad_id=PAD, temperature=0)
    assert len(calls) == first == rollout.mask.shape[1] and rollout.finished.all()


def test_a_call_with_broken_weights_leaves_nothing_behind():
    model, rows = build("llama"), prompts()
    decoder = decode.Decoder(model, 9, 11, 16, eos_id=EOS, pad_id=PAD)
    expected = decoder.generate(rows, temperature=0)
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    kept = weight.clone()
    weight.fill_(torch.nan)
    decoder.generate(rows, temperature=0)
    weight.copy_(kept)
    assert torch.equal(decoder.generate(rows, temperature=0).ids, expected.ids)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_changed_or_replaced_between_calls_are_used(dtype):
    model, rows = build("llama-gqa-tied"), prompts()
    options = dict(eos_id=EOS, pad_id=PAD, dtype=dtype)
    decoder = decode.Decoder(model, 9, 11, 16, **options)
    before = decoder.generate(rows, temperature=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * -1)
    after = decoder.generate(rows, temperature=0)
    assert after.completions != before.completions
    fresh = decode.Decoder(model, 9, 11, 16, **options).generate(rows, temperature=0)
    assert torch.equal(after.ids, fresh.ids)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_dtype_computes_like_a_model_with_converted_weights():
    model, rows = build("qwen2"), prompts()
    half = decode.Decoder(model, 9, 11, 24, eos_id=EOS, pad_id=PAD, dtype=torch.bfloat16)
    ours = half.generate(rows, temperature=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    converted = decode.sample(model, rows, 24, eos_id=EOS, pad_id=PAD, temperature=0)
    assert torch.equal(ours.ids, converted.ids)


def test_a_seed_repeats_bit_for_bit_and_a_generator_moves_on():
    model, rows = build("llama"), prompts()

    def draw(generator):
        return decode.sample(model, rows, 12, eos_id=EOS, pad_id=PAD, generator=generator).ids.tolist()

    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    first = draw(one)
    assert first == draw(two) and first != draw(one)
    torch.manual_seed(5)
    assert draw(None) == first, "without a generator torch.manual_seed decides"


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 2.0, "top_p": 0.9}]
)
def test_sampled_frequencies_follow_the_softmax(options):
    model = build("llama")
    with (
        torch.no_grad()
    ):  # all embeddings alike: the logits depend on the position alone, rows are independent
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].expand(VOCAB, -1))
        logits = model.eval()(torch.full((1, 8), 3)).logits[0, 2:7] / options.get("temperature", 1.0)
    chances = logits.softmax(-1)
    if "top_k" in options:
        floor = chances.sort(descending=True).values[:, options["top_k"] - 1 : options["top_k"]]
        chances = chances * (chances >= floor)
    if "top_p" in options:
        for row in chances:  # by hand: likeliest first until the sum reaches p
            total = 0.0
            for token in row.argsort(descending=True).tolist():
                share, row[token] = float(row[token]), row[token] * (total < options["top_p"])
                total += share
    chances = (chances / chances.sum(-1, keepdim=True)).double()
    rows, generator = 4000, torch.Generator().manual_seed(0)
    rollout = decode.sample(
        model, [[3, 4, 5]] * rows, 5, eos_id=VOCAB, pad_id=PAD, generator=generator, **options
    )
    counts = torch.nn.functional.one_hot(rollout.ids[:, 3:], VOCAB).sum(0).double()
    assert counts[chances == 0].sum() == 0
    expected = chances * rows
    deviation = (counts - expected).abs() / (expected * (1 - chances)).clamp_min(1.0).sqrt()
    assert deviation.max() < 4.5  # 120 cells; four standard errors and a half have chance 1e-3 in all


def test_a_group_shares_one_run_of_its_prompt():
    model, rows, seen = build("qwen2"), prompts(3), []
    alone = decode.sample(model, rows, 10, eos_id=EOS, pad_id=PAD, temperature=0)
    model.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["input_ids"].shape), with_kwargs=True)
    options = dict(eos_id=EOS, pad_id=PAD, num_return_sequences=4)
    group = decode.sample(model, rows, 10, temperature=0, **options)
    assert group.completions == [row for row in alone.completions for _ in range(4)]
    assert seen[0][0] == 3 and set(shape[0] for shape in seen[1:]) == {12}
    drawn = decode.sample(model, rows, 10, generator=torch.Generator().manual_seed(0), **options)
    assert len(set(map(tuple, drawn.completions[:4]))) > 1, "members of a group are drawn independently"


def test_given_positions_are_used_and_continued():
    model, row = build("gpt2").eval(), [5, 6, 7, 8]
    model.transformer.wpe.weight.data.mul_(10.0)
    expected = list(row)
    for _ in range(6):  # reference: the whole text again for every token, positions from 3
        positions = torch.arange(3, 3 + len(expected))[None]
        with torch.no_grad():
            expected.append(
                int(model(torch.tensor([expected]), position_ids=positions).logits[0, -1].argmax())
            )
    decoder = decode.Decoder(model, 1, 4, 6, eos_id=VOCAB, pad_id=PAD)
    ours = decoder.generate([row], temperature=0, position_ids=torch.arange(3, 7)[None])
    assert ours.ids[0].tolist() == expected
    assert decoder.generate([row], temperature=0).ids[0].tolist() != expected, (
        "the positions make a difference"
    )


def test_positions_of_three_dimensions_and_further_inputs_reach_the_model():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = dict(SMALL, num_key_value_heads=2, rope_parameters=rope, bos_token_id=1, eos_token_id=2)
    config = Qwen2VLConfig(
        text_config=text, vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2)
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(6.0 if parameter.ndim > 1 else 1.0)
    rows, width = prompts(3, 6), 6
    ids, mask = decode.left_pad(rows, PAD, width)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[None].expand(3, -1, -1)
    ends = dict(eos_token_id=VOCAB, pad_token_id=PAD, max_new_tokens=8, do_sample=False)
    expected = model.generate(ids, attention_mask=mask, **ends)
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, kw: seen.append(kw.get("mm_token_type_ids")), with_kwargs=True
    )
    decoder = decode.Decoder(model, 3, width, 8, eos_id=VOCAB, pad_id=PAD)
    kinds = torch.zeros_like(ids)
    ours = decoder.generate(rows, temperature=0, position_ids=positions, mm_token_type_ids=kinds)
    assert torch.equal(ours.ids, expected)
    assert seen[0] is kinds and all(kind is None for kind in seen[1:])


def test_fused_norms_compute_the_same_and_are_put_back():
    model = build("llama")
    decoder = decode.Decoder(model, 1, 4, 4, eos_id=EOS, pad_id=PAD)
    decoder.graphs = True  # the patch belongs to the captured path; nothing is captured here
    norms = [module for module in model.modules() if decode._is_rms_norm(module)]
    assert len(norms) == 5
    x = 3 * torch.randn(2, 7, 32)
    for norm in norms:
        norm.weight.data.normal_()
    expected = [norm(x) for norm in norms]
    with pytest.raises(RuntimeError, match="stop"), decoder._ready():
        assert not model.training and all("forward" in vars(norm) for norm in norms)
        for norm, value in zip(norms, expected, strict=True):
            torch.testing.assert_close(norm(x), value)
        raise RuntimeError("stop")
    assert model.training and not any("forward" in vars(norm) for norm in norms)
    assert not decode._is_rms_norm(GemmaRMSNorm(8)), "Gemma's norm has another formula"


def test_bad_calls_say_what_is_wrong():
    model, rows = build("llama"), prompts(2, 4)
    ends = dict(eos_id=EOS, pad_id=PAD)
    decoder = decode.Decoder(model, 2, 4, 8, **ends)
    for call, message in [
        (lambda: decode.left_pad([], PAD), "at least one prompt"),
        (lambda: decode.left_pad([[3], []], PAD), "no prompt may be empty"),
        (lambda: decoder.generate([[3] * 5]), "longer than prompt_len=4"),
        (lambda: decoder.generate([[VOCAB]]), "outside the vocabulary"),
        (lambda: decoder.generate([[3]] * 3), "made for 2"),
        (lambda: decoder.generate(rows, max_new_tokens=9), "made for 2, 8"),
        (lambda: decoder.generate(rows, max_new_tokens=-1), "-1 tokens"),
        (lambda: decoder.generate(rows, temperature=-1.0), "temperature"),
        (lambda: decoder.generate(rows, top_p=0.0), "top_p"),
        (lambda: decode.Decoder(model, 0, 4, 8, **ends), "positive"),
        (lambda: decode.Decoder(model, 3, 4, 8, num_return_sequences=2, **ends), "num_return_sequences=2"),
        (lambda: decode.Decoder(model, 2, 100, 29, **ends), "129 exceeds the model's 128"),
        (lambda: decode.sample(model, rows, 4, eos_id=3, pad_id=PAD, decoder=decoder), "eos_id"),
        (lambda: decode.sample(build("llama"), rows, 4, decoder=decoder, **ends), "another model"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    windowed = AutoModelForCausalLM.from_config(
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16)
    )
    with pytest.raises(ValueError, match="window of 16"):
        decode.Decoder(windowed, 1, 8, 9, **ends)
    expected = generate(windowed, rows, 12, do_sample=False)
    assert torch.equal(decode.sample(windowed, rows, 12, temperature=0, **ends).ids, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captured graphs need a GPU")
def test_captured_greedy_tokens_equal_generate_and_follow_the_weights():
    model, rows = build("qwen2").cuda().eval(), prompts(16)
    ids, mask = (x.cuda() for x in decode.left_pad(rows, PAD))
    ends = dict(eos_token_id=[EOS, 7], pad_token_id=PAD, max_new_tokens=40, do_sample=False)
    made = dict(eos_id=[EOS, 7], pad_id=PAD)
    decoder = decode.Decoder(model, 16, ids.shape[1], 40, **made)
    for _ in range(3):
        expected = model.generate(ids, attention_mask=mask, **ends)
        for _ in range(2):
            assert torch.equal(decoder.generate(rows, temperature=0).ids, expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    drawn = [decoder.generate(rows, generator=torch.Generator().manual_seed(seed)).ids for seed in (0, 1, 0)]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])

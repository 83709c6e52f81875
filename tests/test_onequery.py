"""Attention of one query per row against SDPA, and the compiled step against the plain one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from readrun import decode, onequery
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton must see it before it is imported


@pytest.mark.skipif(INTERPRETED or onequery.triton is None, reason="is the child, or there is no Triton")
def test_the_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "attention"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("heads, kv_heads, length, d", [(4, 4, 80, 64), (6, 2, 37, 24), (8, 2, 96, 64)])
def test_attention_is_that_of_sdpa_and_uses_only_what_it_may(heads, kv_heads, length, d):
    torch.manual_seed(length)
    query, key = torch.randn(3, heads, 1, d), torch.randn(3, kv_heads, length, d)
    value = torch.randn_like(key)
    seen = torch.rand(3, length) < 0.5
    seen[0, :35], seen[1, 5:] = False, False  # a first block, and all later ones, of nothing
    seen[0, 36], seen[1, 3] = True, True
    mask = torch.zeros(3, 1, 1, length).masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
    expected = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask.double(), scale=0.3, enable_gqa=True
    )[:, :, 0]
    if INTERPRETED:  # what is hidden is not read
        key, value = (x.masked_fill(~seen[:, None, :, None], torch.nan) for x in (key, value))
    found = onequery.attend(query, key, value, mask, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_the_compiled_step_chooses_the_same_tokens(kind):
    torch.manual_seed(0)
    model = kind(
        kind.config_class(
            vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip
    prompts = [torch.randint(1, 50, (n,)).tolist() for n in (5, 9, 3)]
    made = dict(eos_id=50, pad_id=0)
    plain = decode.Decoder(model, 3, 9, 12, **made).generate(prompts, temperature=0.0)
    graphs = []
    step = onequery.compiled_step(model, backend=lambda graph, _: graphs.append(graph) or graph)
    decoder = decode.Decoder(step, 3, 9, 12, **made)
    for _ in range(2):
        found = decoder.generate(prompts, temperature=0.0)
        assert torch.equal(found.ids, plain.ids)
    assert len(graphs) == 1  # prompts are not compiled, and one step is like the next
    assert model.config._attn_implementation != "one_query" and "forward" not in vars(model)

"""Chapter tavid: oracles for maps, wider projection, processor and contact reader; bad inputs."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter
from readrun import cogvideox as cog

q = chapter("tavid")
SMALL = dict(frames=4, height=24, width=24, text_length=12)
TINY = dict(hidden=32, depth=3, heads=2, time_embed_dim=16)
MASKED, PLAIN = dict(mask=True, lam=0.1), dict(mask=False, lam=0.0)


@pytest.fixture(autouse=True)
def own_run(tmp_path_factory, monkeypatch):
    """The experiment's `run`, which some definitions read: a CPU in smoke."""
    import readrun

    folder = str(tmp_path_factory.mktemp("run"))
    run = readrun.start("tavid", profile="smoke", device="cpu", out=folder, adapter="")
    monkeypatch.setattr(q, "run", run, raising=False)
    return run


def tiny(seed: int = 0, **fields) -> cog.VideoDiffusion:
    """A random model of 24 x 24 pixels and 4 frames whose gates and output are not zero."""
    return cog.build(q.make_tokenizer(), seed=seed, condition_channels=48, **SMALL, **(TINY | fields)).eval()


def scenes(count: int, frames: int = 4, seed: int = 0, ambiguous: bool = True) -> list:
    rng = np.random.default_rng(seed)
    return [q.draw_scene(rng, frames, ambiguous) for _ in range(count)]


def keys(seed: int, n: int = 11, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, n, 8, generator=g, dtype=dtype, requires_grad=True) for _ in "qk")


def softmax_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.softmax(a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1]), -1)


# ---------------------------------------------------------------- maps


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), tgt=st.lists(st.integers(0, 10), min_size=2, max_size=2))
def test_v2t_map_is_a_column_of_the_softmax(seed: int, tgt: list[int]) -> None:
    a, b = keys(seed)
    index, rows = torch.tensor(tgt), slice(4, 9)
    wanted = torch.stack([softmax_of(a, b)[i, :, rows, t].mean(0) for i, t in enumerate(tgt)])
    found = q.v2t_map(a, b, rows, index)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    weight = torch.arange(5.0, dtype=torch.float64)
    own = torch.autograd.grad((found * weight).sum(), (a, b))
    for x, y in zip(own, torch.autograd.grad((wanted * weight).sum(), (a, b)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


def test_rows_of_the_map_add_up_and_other_keys_may_change_places() -> None:
    a, b = keys(1)
    total = sum(q.v2t_map(a, b, slice(0, 6), torch.tensor([j, j])) for j in range(11))
    torch.testing.assert_close(total, torch.ones_like(total))
    order = torch.tensor([10, 1, 2, 3, 9, 5, 6, 7, 8, 4, 0])
    moved = q.v2t_map(a, b[:, :, order], slice(0, 6), torch.tensor([3, 3]))
    torch.testing.assert_close(moved, q.v2t_map(a, b, slice(0, 6), torch.tensor([3, 3])))


def test_gradient_of_the_map_is_the_closed_form() -> None:
    """dA_i / dq_i = A_i (k_tgt - sum_j P_ij k_j) / sqrt(d), per head, over the number of heads."""
    a, b = keys(2)
    found = q.v2t_map(a, b, slice(0, 11), torch.tensor([5, 5]))
    gradient = torch.autograd.grad(found.sum(), a)[0]
    p = softmax_of(a, b)
    wanted = p[..., 5, None] * (b[:, :, 5:6] - p @ b) / math.sqrt(8) / 3
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_t2v_map_is_a_row_of_the_softmax() -> None:
    a, b = keys(3)
    tgt, cols = torch.tensor([2, 0]), slice(4, 10)
    rows = torch.stack([softmax_of(a, b)[i, :, t, cols].mean(0) for i, t in enumerate(tgt)])
    found = q.t2v_map(a, b, tgt, cols)
    torch.testing.assert_close(found, rows / rows.amax(1, keepdim=True))
    scale = rows.detach().amax(1, keepdim=True)
    own, wanted = (torch.autograd.grad(x[:, 1].sum(), a)[0] for x in (found, rows / scale))
    torch.testing.assert_close(own, wanted)


def test_map_in_half_precision_is_within_its_resolution() -> None:
    a, b = (4 * x.detach() for x in keys(4, n=64))
    tgt = torch.tensor([5, 60])
    wanted = q.v2t_map(a, b, slice(8, 40), tgt)
    found = q.v2t_map(a.bfloat16(), b.bfloat16(), slice(8, 40), tgt)
    assert found.dtype == torch.bfloat16 and abs(found - wanted).max() < 0.02 * wanted.max()


def test_loss_is_zero_only_at_the_mask_and_pulls_attention_towards_it() -> None:
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    assert q.attention_loss([mask, mask], mask) == 0 and q.attention_loss([mask, 1 - mask], mask) == 0.5
    a, b = keys(6)
    tgt, rows = torch.tensor([1, 2]), slice(4, 8)
    before = q.v2t_map(a, b, rows, tgt)
    step = torch.autograd.grad(q.attention_loss([before], mask), a)[0]
    change = q.v2t_map(a - 0.1 * step, b, rows, tgt) - before
    assert ((change > 0) == (mask > 0)).all(), "up inside the mask, down outside"
    with pytest.raises(ValueError, match="maps"):
        q.attention_loss([], mask)
    with pytest.raises(ValueError, match="mask_tokens"):
        q.attention_loss([before], mask[0])


# ---------------------------------------------------------------- the wider projection, masks, the word


def test_wider_projection_changes_nothing_at_first() -> None:
    model = tiny()
    before = copy.deepcopy(model)
    q.expand_patch_embed(model.transformer)
    batch = q.target_batch(model, scenes(2), 24, MASKED, "noun")
    t, embeds = torch.tensor([100, 900]), model.embed(batch["ids"])
    noisy = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(0))
    picture, masked = batch["condition"][:, :, :48], batch["condition"]
    old, new = before(noisy, t, embeds, picture), model(noisy, t, embeds, masked)
    torch.testing.assert_close(old, new, atol=1e-6, rtol=0)
    zero = torch.cat([picture, torch.zeros_like(masked[:, :, 48:])], 2)
    x, y = (m.transformer.patch_embed.proj for m in (before, model))
    states = [torch.cat([noisy, c], 2).flatten(0, 1).double() for c in (picture, zero)]
    assert torch.equal(x.double()(states[0]), y.double()(states[1])), "bit by bit without a mask"
    x.float(), y.float()
    q.tavid_step(model, batch, 0.0, [])["loss"].backward()
    grown = model.transformer.patch_embed.proj.weight.grad[:, 96:]
    assert grown.shape[1] == 1 and grown.abs().sum() > 0
    with pytest.raises(ValueError, match="wider already"):
        q.expand_patch_embed(model.transformer)


def test_masks_become_latents_and_tokens() -> None:
    mask = torch.zeros(2, 24, 24)
    mask[0, 8:12, 12:16] = 1  # one latent position, one token
    mask[1, 6:10, 14:18] = 1  # corner of four tokens
    mask[1, 6, 14] = 1
    latent = q.mask_to_latent(mask, 4, 3)
    assert latent.shape == (2, 3, 1, 6, 6) and latent[:, 1:].sum() == 0
    assert latent[0, 0, 0].nonzero().tolist() == [[2, 3]]
    tokens = q.mask_to_tokens(mask, (3, 3)).view(2, 3, 3)
    assert tokens[0].nonzero().tolist() == [[1, 1]]
    assert tokens[1].nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    wide = F.interpolate(mask[:1, None], size=(6, 6), mode="nearest-exact")[:, 0]
    assert torch.equal(q.mask_to_latent(mask[:1], 4, 1)[:, 0, 0], wide), "the library's nearest pixel"
    lost = torch.zeros(1, 8, 8)
    lost[0, 0, 0] = 1
    with pytest.raises(ValueError, match="small"):
        q.mask_to_latent(lost, 4, 2)
    for wrong in (torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.full((1, 8, 8), 0.5), torch.ones(8, 8)):
        for call in (lambda m: q.mask_to_latent(m, 4, 2), lambda m: q.mask_to_tokens(m, (2, 2))):
            with pytest.raises(ValueError, match="mask"):
                call(wrong)
    with pytest.raises(ValueError, match="divisible"):
        q.mask_to_latent(mask, 5, 2)
    with pytest.raises(ValueError, match="divisible"):
        q.mask_to_tokens(mask, (5, 5))


def test_the_word_is_found_or_named_as_missing() -> None:
    model = tiny()
    prompts = ["a hand reaches the target red square", "the hand interacts with target object"]
    assert q.find_tgt(model.tokenizer, model.tokens(prompts)).tolist() == [4, 4]
    twice = model.tokens(["target red target"])
    assert q.find_tgt(model.tokenizer, twice).tolist() == [0], "the first one counts"
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        q.find_tgt(model.tokenizer, model.tokens([prompts[0], "a hand"]))
    with pytest.raises(ValueError, match="word"):
        q.find_tgt(model.tokenizer, twice, "banana")


# ---------------------------------------------------------------- the processor


@pytest.mark.parametrize("rotary", [False, True])
def test_recording_changes_no_output(rotary: bool) -> None:
    model = tiny(rotary=rotary)
    batch = q.target_batch(model, scenes(2), 24, PLAIN, "noun")
    t, embeds = torch.tensor([50, 999]), model.embed(batch["ids"])
    plain = model(batch["latents"], t, embeds, batch["condition"])
    tgt = q.find_tgt(model.tokenizer, batch["ids"])
    with q.record_target(model.transformer, tgt, [0, 2], "both") as recorder:
        found = model(batch["latents"], t, embeds, batch["condition"])
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    assert set(recorder.maps) == {(r, i) for r in ("v2t", "t2v") for i in (0, 2)}
    assert all(m.shape == (2, 9) and m.min() >= 0 and m.max() <= 1 + 1e-6 for m in recorder.maps.values())
    kept = dict(recorder.maps)
    torch.testing.assert_close(model(batch["latents"], t, embeds, batch["condition"]), plain)
    assert all(recorder.maps[key] is value for key, value in kept.items()), "nothing is stored outside"


def test_guidance_records_the_conditional_half() -> None:
    model = tiny()
    batch = q.target_batch(model, scenes(2), 24, PLAIN, "noun")
    t, embeds, empty = torch.tensor([300, 300]), model.embed(batch["ids"]), model.embed([""])
    tgt, own = q.find_tgt(model.tokenizer, batch["ids"]), dict(condition=batch["condition"])
    maps = []
    for uncond in (None, empty):
        with q.record_target(model.transformer, tgt, [1]) as recorder:
            cog.guided(model, batch["latents"], t, embeds, uncond, 2.0, **own)
        maps.append(recorder.maps["v2t", 1])
    torch.testing.assert_close(*maps)
    with q.record_target(model.transformer, tgt[:1].repeat(3), [1]), pytest.raises(ValueError, match="tgt"):
        model(batch["latents"], t, embeds, batch["condition"])
    model.transformer.transformer_blocks[1].attn1.fuse_projections()
    with pytest.raises(ValueError, match="fused"):
        q.install(model.transformer)


def test_maps_are_those_of_an_explicit_attention() -> None:
    """The first block's map from its own projections, normalisation and softmax."""
    model = tiny()
    batch = q.target_batch(model, scenes(2), 24, PLAIN, "noun")
    seen = {}
    attn = model.transformer.transformer_blocks[0].attn1
    attn.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    tgt = q.find_tgt(model.tokenizer, batch["ids"])
    with q.record_target(model.transformer, tgt, [0]) as recorder:
        model(batch["latents"], torch.tensor([9, 9]), model.embed(batch["ids"]), batch["condition"])
    states = torch.cat([seen["encoder_hidden_states"], seen["hidden_states"]], 1)
    a, b = (norm(p(states).view(2, -1, 2, 16)).transpose(1, 2)
            for p, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)))  # fmt: skip
    wanted = torch.stack([softmax_of(a, b)[i, :, 12:21, t].mean(0) for i, t in enumerate(tgt)])
    torch.testing.assert_close(recorder.maps["v2t", 0], wanted, atol=1e-6, rtol=1e-4)


def test_checkpointing_does_not_record_twice() -> None:
    model = tiny()
    batch = q.target_batch(model, scenes(2), 24, PLAIN, "noun")
    batch |= dict(
        tgt=q.find_tgt(model.tokenizer, batch["ids"]), mask_tokens=q.mask_to_tokens(batch["mask"], (3, 3))
    )
    gradients = []
    for checkpointed in (False, True):
        net = copy.deepcopy(model).train()
        if checkpointed:
            net.transformer.enable_gradient_checkpointing()
        out = q.tavid_step(net, batch, 0.1, [1], "both", torch.Generator().manual_seed(0))
        out["loss"].backward()
        gradients.append(net.transformer.transformer_blocks[1].attn1.to_q.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_without_weight_the_step_is_the_library_s_bit_for_bit() -> None:
    model = tiny()
    batch = q.target_batch(model, scenes(2), 24, PLAIN, "noun")
    library = copy.deepcopy(model)
    q.install(model.transformer)
    found = q.tavid_step(model, batch, 0.0, [0], generator=torch.Generator().manual_seed(4))
    wanted = cog.velocity_loss(
        library, batch["latents"], library.embed(batch["ids"]), condition=batch["condition"],
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    found["loss"].backward()
    wanted.backward()
    assert torch.equal(found["loss"], wanted) and found["attn"] == 0
    for x, y in zip(model.parameters(), library.parameters(), strict=True):
        assert (x.grad is None and y.grad is None) or torch.equal(x.grad, y.grad)
    batch |= dict(
        tgt=q.find_tgt(model.tokenizer, batch["ids"]), mask_tokens=q.mask_to_tokens(batch["mask"], (3, 3))
    )
    heavy = q.tavid_step(model, batch, 0.5, [0], generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(heavy["loss"], wanted + 0.5 * heavy["attn"])


def test_a_bias_is_added_to_the_scores() -> None:
    model = tiny(rotary=False)
    q.install(model.transformer)
    attn = model.transformer.transformer_blocks[0].attn1
    g = torch.Generator().manual_seed(0)
    video, text = torch.randn(2, 20, 32, generator=g), torch.randn(2, 12, 32, generator=g)
    bias = torch.randn(2, 1, 32, 32, generator=g)
    states = torch.cat([text, video], 1)
    a, b, v = (p(states).view(2, 32, 2, 16).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    p = torch.softmax(attn.norm_q(a) @ attn.norm_k(b).transpose(2, 3) / 4 + bias, -1)
    wanted = attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))
    found = attn(hidden_states=video, encoder_hidden_states=text, bias=bias)
    torch.testing.assert_close(torch.cat([found[1], found[0]], 1), wanted, atol=1e-5, rtol=1e-4)


def test_modulation_raises_attention_only_under_the_mask() -> None:
    model = tiny()
    some = scenes(2)
    batch = q.target_batch(model, some, 24, PLAIN, "plain")
    bias = q.modulation_bias(model, batch, some, 5.0)
    assert bias.shape == (4, 1, 48, 48) and bias[:2].abs().sum() == 0 and bias[2:, :, :12].abs().sum() == 0
    inside = q.mask_to_tokens(batch["mask"], (3, 3)).repeat(1, 4)
    assert torch.equal(bias[2:, 0, 12:].amax(-1) > 0, inside > 0)
    assert (bias[2:, 0, 12:] > 0).sum() == 2 * inside.sum(), "colour and shape"
    assert bias.max() == pytest.approx(math.log(5))


# ---------------------------------------------------------------- blocks


def test_blocks_are_chosen_as_asked() -> None:
    assert q.select_blocks(42, "every_third") == [5, 8, 11, 14, 17, 20, 23]
    agreement = [0.1, 0.9, 0.5, 0.7]
    assert q.select_blocks(4, "semantic", 2, agreement) == [1, 3]
    assert q.select_blocks(4, "worst", 2, agreement) == [0, 2]
    assert q.select_blocks(4, "all") == [0, 1, 2, 3] and q.select_blocks(4, "none") == []
    rng = np.random.default_rng(1)
    for mode, band in (("random", range(42)), ("sampled", range(5, 24))):
        drawn = [q.select_blocks(42, mode, 7, generator=rng) for _ in range(40)]
        assert all(len(set(d)) == 7 and d == sorted(d) for d in drawn)
        assert {i for d in drawn for i in d} == set(band)
    for wrong in (("best", 2), ("semantic", 2), ("random", 2), ("worst", 0)):
        with pytest.raises(ValueError):
            q.select_blocks(4, *wrong)


def test_auc_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 30).astype(float), rng.integers(0, 2, 30)
    pairs = [(a > b) + 0.5 * (a == b) for a in x[y == 1] for b in x[y == 0]]
    assert q.auc(x, y) == pytest.approx(np.mean(pairs))


# ---------------------------------------------------------------- world and reader


def test_contact_reader_agrees_with_the_renderer() -> None:
    rng = np.random.default_rng(5)
    for frames, size in ((5, 32), (8, 48)):
        right = noisy = 0
        for i in range(100):
            scene = q.draw_scene(rng, frames, bool(i % 2))
            clip = q.render(scene, size)
            report = q.contact_report(clip, scene)
            right += report.target and report.hands == 1 and not report.wrong
            noisy += q.contact_report(clip + rng.normal(0, 0.1, clip.shape), scene).target
        assert right >= 99 and noisy >= 99, (frames, right, noisy)


def test_the_gate_of_the_reader_can_fail(monkeypatch) -> None:
    """It holds for the chapter's reader, and not for one that says "target" to everything."""
    tested = {"ambiguous_psnr": np.array([20.0, 20.0])}
    found = q.check_reader(24, 4, 60, tested)
    assert found["noise"] == pytest.approx(0.1) and min(found["clean"], found["noisy"]) >= 0.98
    yes = q.contact_report(q.render(scene := scenes(1)[0], 24), scene)
    monkeypatch.setattr(q, "contact_report", lambda v, s: yes._replace(first_object=s.target))
    assert q.check_reader(24, 4, 60, tested)["clean"] <= 0.4


def test_reader_follows_the_pixels_not_the_plan() -> None:
    for scene in scenes(20, frames=6):
        clip = q.render(scene, 32)
        still = np.repeat(clip[:1], 6, 0)
        assert q.contact_report(still, scene).none
        found = q.contact_report(clip, scene)
        assert found.frames_in_contact == 3
        for other in q.look_alikes(scene):
            report = q.contact_report(clip, other)
            assert report.first_object == scene.target and report.target == (other.target == scene.target)
            assert report.wrong != report.target
        mirrored = scene._replace(centres=np.stack([1 - scene.centres[:, 0], scene.centres[:, 1]], 1))
        assert q.contact_report(clip[..., ::-1], mirrored) == found
    with pytest.raises(ValueError, match="video"):
        q.contact_report(clip[:3], scene)


def test_scores_see_what_they_are_named_after() -> None:
    some = scenes(8, frames=6)
    clips = np.stack([q.render(s, 32) for s in some])
    true = {k: v.mean() for k, v in q.score(clips, some, 32).items()}
    assert true["hit"] == true["any"] == true["one_hand"] == true["objects"] == 1 and true["psnr"] > 60
    # a clip that reaches another look-alike has the same background: arm, hand and object are not part of it
    others = [next(v for v in q.look_alikes(s) if v.target != s.target) for s in some]
    bent = [(s.hand[0], s.hand[0] + 0.01, s.centres[s.target] + (0, 0.09), 6) for s in others]
    others = [s._replace(hand=q.reach_path(*p)[0]) for s, p in zip(others, bent, strict=True)]
    wrong = q.score(np.stack([q.render(s, 32) for s in others]), some, 32)
    assert wrong["hit"].max() == 0 and wrong["any"].min() == 1 and wrong["psnr"].min() > 50
    pale = {k: v.mean() for k, v in q.score(clips + 0.05, some, 32).items()}
    assert pale["psnr"] == pytest.approx(-20 * math.log10(0.05), abs=0.3)
    gone = clips.copy()
    for clip, s in zip(gone, some, strict=True):
        x, y = (s.centres[(s.target + 1) % len(s.kinds)] * 32).astype(int)
        clip[-1, :, max(y - 5, 0) : y + 5, max(x - 5, 0) : x + 5] = s.paper[:, None, None]
    assert q.score(gone, some, 32)["objects"].max() == 0
    shaken = clips[:, [0, 2, 1, 3, 2, 4]]
    assert q.score(shaken, some, 32)["roughness"].mean() > 1.5 * true["roughness"]


def test_scenes_keep_their_rules_and_splits_are_apart() -> None:
    for scene in scenes(40, frames=8, seed=3):
        apart = np.hypot(*(scene.centres[:, None] - scene.centres[None]).T) + np.eye(len(scene.centres))
        assert apart.min() > 3 * q.RADIUS and scene.twins == 3
        assert sum(kind == scene.kinds[scene.target] for kind in scene.kinds) == 3
        others = np.delete(scene.centres, scene.target, 0)
        gap = np.hypot(*(scene.hand[:, None] - others[None]).transpose(2, 0, 1))
        assert gap.min() > q.REACH
    # nothing in frame 0 tells the target: not even which look-alike the hand is closest to
    many = scenes(600, frames=4, seed=9)
    same = [[v.target for v in q.look_alikes(s)] for s in many]
    gaps = [np.hypot(*(s.centres[i] - s.hand[0]).T) for s, i in zip(many, same, strict=True)]
    nearest = np.mean([i[int(g.argmin())] == s.target for s, i, g in zip(many, same, gaps, strict=True)])
    assert abs(nearest - 1 / 3) < 4 * math.sqrt(2 / 9 / 600)
    trained = {s.centres.tobytes() for s in q.tuning_set(64, 5)}
    assert "ring" not in {k[1] for s in q.tuning_set(64, 5) + q.test_scenes(16, 5, "plain") for k in s.kinds}
    for kind in ("ambiguous", "plain", "ring"):
        assert not trained & {s.centres.tobytes() for s in q.test_scenes(16, 5, kind)}
    assert {k[1] for s in q.test_scenes(4, 5, "ring") for k in s.kinds} == {"ring"}


def test_words_cannot_tell_look_alikes_apart() -> None:
    for scene in scenes(10):
        every = q.look_alikes(scene)
        assert len(every) == 3 and len({q.caption(s, "noun") for s in every}) == 1
        assert len({q.caption(s, "position") for s in every}) == 3
        assert len({q.target_mask(s, 32).tobytes() for s in every}) == 3
        assert q.target_mask(scene, 32)[tuple((scene.centres[scene.target][::-1] * 32).astype(int))] == 1


def test_best_baseline_is_the_one_with_the_highest_mean() -> None:
    rates = {"ours": [1, 1], "base": [0, 0], "data": [1, 0], "modulation": [0, 0], "channel": [1, 1]}
    assert q.best_baseline({"tcr": rates}, {}) == {"ours": [1, 1], "best": [1, 0]}
    for missing in ("ours", "base", "data", "modulation"):
        assert q.best_baseline({"tcr": {k: v for k, v in rates.items() if k != missing}}, {}) == {}
    assert q.best_baseline({"tcr": rates | {"data": [1]}}, {}) == {}


# ---------------------------------------------------------------- arms


def test_masks_reach_the_model_for_every_shape() -> None:
    model = tiny()
    rng = np.random.default_rng(2)
    every = [q.draw_scene(rng, 4, True, (shape,)) for shape in (*q.SHAPES, "ring") for _ in range(20)]
    batch = q.target_batch(q.prepare_arm(model, MASKED, 2), every, 24, MASKED, "noun")
    channel = batch["condition"][:, :, 48:]
    assert (channel[:, 0].flatten(1).sum(1) > 0).all() and channel[:, 1:].abs().sum() == 0
    assert torch.equal(batch["mask_tokens"].view(-1, 3, 3), F.max_pool2d(channel[:, 0, 0], 2))


def test_every_arm_trains_and_sees_the_same_clips(monkeypatch) -> None:
    size = dict(size=24, frames=4, model=TINY | dict(patch_size=1))
    start, seen = {"weights": q.new_model(**size).state_dict()}, {}
    step = q.tavid_loss

    def spy(net, batch, lam, blocks, region, *drawn):
        seen.setdefault(name, []).append(
            (batch["latents"][:, -1].flatten(1).sum(1).tolist(), list(blocks), lam, region)
        )
        return step(net, batch, lam, blocks, region, *drawn)

    monkeypatch.setattr(q, "tavid_loss", spy)
    prepare, seeds = q.prepare_arm, set()
    monkeypatch.setattr(q, "prepare_arm", lambda *a: seeds.add(a[3]) or prepare(*a))
    generate, drawn = q.generate, set()
    monkeypatch.setattr(
        q, "generate", lambda net, scenes, *a: drawn.update(map(id, scenes)) or generate(net, scenes, *a)
    )
    for name, arm in q.ARMS.items():
        out = q.tune_arm(
            name, 1, 6, **size, base=start, alignment={"auc": [0.5, 0.9, 0.7]}, k=1, show=0, points=2,
            tune=dict(steps=2, batch=5, rank=2), rate={"best": 1e-3}, guidance=2.0,
            test=dict(scenes=3, plain=0, ring=2, steps=1),
        )  # fmt: skip
        assert out["curve"].shape == (2,) and out["ring_hit"].shape == (2,)
        assert out["losses"].shape == (2 * arm.get("longer", 1), 2) and (out["losses"][:, 1].max() > 0) == (
            arm["lam"] > 0
        )
    held_out = {id(s) for kind, n in (("ambiguous", 3), ("ring", 2)) for s in q.test_scenes(n, 4, kind)}
    assert seeds == {1} and drawn == held_out, "scores are of test scenes"
    assert all([x[0] for x in steps[:2]] == [x[0] for x in seen["ours"]] for steps in seen.values())
    assert seen["ours"][0][1:] == ([1], 0.1, "v2t") and seen["worst_blocks"][0][1] == [0]
    assert (
        seen["t2v"][0][3] == "t2v"
        and seen["large_weight"][0][2] == 1.0
        and len(seen["all_blocks"][0][1]) == 3
    )


# ---------------------------------------------------------------- adapters, checkpoints, bad input


def test_seeds_start_from_other_adapters() -> None:
    starts = [q.prepare_arm(tiny(), MASKED, 2, seed).state_dict() for seed in (0, 0, 1)]
    same = [all(torch.equal(starts[0][k], other[k]) for k in starts[0]) for other in starts[1:]]
    assert same == [True, False]


def test_adapter_files_reproduce_the_samples(tmp_path) -> None:
    base = tiny()
    model = copy.deepcopy(base)
    q.expand_patch_embed(model.transformer)
    q.add_lora(model, 4, alpha=2)
    g = torch.Generator().manual_seed(0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n or "patch_embed.proj" in n for n in trained)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    q.save_adapter(model, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {q.LORA_FILE, q.CONV_FILE}
    again = copy.deepcopy(base)
    q.load_adapter(again, str(tmp_path))
    some = scenes(1)
    clips = [
        q.generate(m, some, 24, a, "noun", 2, 1.0)
        for m, a in ((model, MASKED), (again, MASKED), (base, PLAIN))
    ]
    np.testing.assert_allclose(clips[0], clips[1], atol=1e-5)
    silent = copy.deepcopy(base)
    q.load_adapter(silent, str(tmp_path), scale=0.0)
    assert abs(q.generate(silent, some, 24, MASKED, "noun", 2, 1.0) - clips[0]).max() > 1e-4
    assert abs(clips[0] - clips[2]).max() > 1e-3
    with pytest.raises(ValueError, match="adapter"):
        q.load_adapter(cog.build(q.make_tokenizer(), **SMALL, **TINY), str(tmp_path))
    with pytest.raises(ValueError, match="adapter"):
        q.load_adapter(base, str(tmp_path / "none"))


def test_checkpoints_differ_and_wrong_ones_are_named(tmp_path) -> None:
    found = [q.own_model(str(tiny(seed).save(tmp_path / str(seed)))) for seed in (0, 1)]
    assert found[0]["loss"] != found[1]["loss"] and len(found[0]["auc"]) == 3
    with pytest.raises(ValueError, match="checkpoint"):
        q.own_model(str(tmp_path))
    text = cog.build(q.make_tokenizer(), **SMALL, **TINY)
    with pytest.raises(ValueError, match=r"checkpoint:.*picture"):
        q.own_model(str(text.save(tmp_path / "text")))


def test_bad_input_is_named() -> None:
    model = tiny()
    batch = q.target_batch(model, scenes(1), 24, PLAIN, "noun")
    wrong = batch | {"latents": batch["latents"] * float("nan")}
    for match, call in {
        "lam": lambda: q.tavid_step(model, batch, -0.1, []),
        "batch": lambda: q.tavid_step(model, batch, 0.1, [0]),
        "mode": lambda: q.select_blocks(4, "best"),
        "takes no picture": lambda: q.expand_patch_embed(cog.build(None, **SMALL).transformer),
        "finite": lambda: q.tavid_step(model, wrong, 0.0, []),
        "region": lambda: q.Recorder(torch.tensor([0]), 9, [0], "vt"),
        "tgt": lambda: q.v2t_map(*keys(0), slice(0, 2), torch.tensor([11, 0])),
        "frames": lambda: q.draw_scene(np.random.default_rng(0), 3, True),
        "shape": lambda: q.shape_distance("cube", np.zeros(1), np.zeros(1), 0.1),
        "form": lambda: q.caption(scenes(1)[0], "poem"),
        "kind": lambda: q.test_scenes(1, 5, "hard"),
        "label": lambda: q.auc(np.zeros(3), np.ones(3)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()

"""Chapter animegamer: oracles for reader, sequence, mask, model, phases and game; bad inputs; checkpoints."""

from __future__ import annotations

import copy
import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter, graphed
from safetensors.torch import save_file

q = chapter("animegamer")
SIZE = dict(pixels=16, width=32, heads=2, depth=1, patch=1, n_text=4)
N, D = 20, 32
TEXT = "Character: Mia; Motion: gently sit; Background: night street."
STATE = q.GameState(1, -2, 0, 5)


@pytest.fixture(autouse=True)
def own_run(tmp_path_factory, monkeypatch) -> None:
    """The experiment's `run`, which some definitions read: a CPU in smoke."""
    import readrun

    folder = str(tmp_path_factory.mktemp("run"))
    run = readrun.start("animegamer", profile="smoke", device="cpu", out=folder)
    monkeypatch.setattr(q, "run", run, raising=False)


@pytest.fixture(scope="module")
def tokenizer():
    return q.make_tokenizer(N)


def tiny_mllm(tokenizer, seed: int = 0, n: int = N, **options):
    options = dict(visual=True, causal=False) | options
    return q.make_mllm(dict(width=32, depth=2, heads=2), tokenizer, D, n, seed, **options)


def tiny_decoder(scope: bool = True, seed: int = 0):
    torch.manual_seed(seed)
    return q.ShotDecoder(SIZE, scope)


def facts(n: int, seed: int = 0) -> torch.Tensor:
    return q.random_facts(n, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- world and reader


def test_reader_reads_every_rendered_shot() -> None:
    rows = facts(1000, 3)
    for size in (16, 48):
        read, legible = q.read_shots(q.render(rows[:: size // 16], size, seed=size))
        assert torch.equal(read, rows[:: size // 16]) and legible.all()
    one = q.read_shot(q.render(rows[:1])[0])
    assert one.row() == rows[0].tolist() and one == q.facts_of(rows[0].tolist())


def test_reader_bears_noise() -> None:
    rows = facts(400, 5)
    for size, noise in ((16, 0.03), (48, 0.06)):
        videos = q.render(rows, size, 1)
        read, legible = q.read_shots(videos + noise * torch.randn(videos.shape))
        assert (read == rows).float().mean() >= 0.99 and legible.float().mean() >= 0.99


@pytest.mark.parametrize("field", ["outfit", "wall_hue", "prop"])
def test_blurred_mixtures_are_illegible(field: str) -> None:
    rows = facts(60, 7)
    at = q.FIELDS.index(field)
    mixed = torch.stack([q.render(torch.cat([rows[:, :at], torch.full((60, 1), v), rows[:, at + 1 :]], 1))
                         for v in range(q.COUNTS[at])]).mean(0)  # fmt: skip
    assert q.read_shots(mixed)[1].float().mean() <= 0.1
    assert q.read_shots(q.render(rows))[1].all()


def test_flow_and_path_give_the_same_level() -> None:
    rows = facts(120, 9)
    video = q.render(rows, 16, 2)
    levels = torch.tensor([q.scope_level(v) for v in q.motion_scope(video).tolist()])
    assert (levels == q.read_shots(video)[0][:, 7] + 1).float().mean() >= 0.95
    assert [q.scope_level(q.level_value(v)) for v in range(1, 6)] == [1, 2, 3, 4, 5]


def test_hidden_appearance_is_not_in_the_text() -> None:
    row = facts(1)[0].tolist()
    for field in q.HIDDEN:
        other = list(row)
        other[q.FIELDS.index(field)] += 1
        assert q.instruction_of(other) == q.instruction_of(row)
    assert "gently" not in q.instruction_of([*row[:7], 4]) and "wildly" in q.instruction_of([*row[:7], 4])


# ---------------------------------------------------------------- shot encoder and decoder


def test_shot_tokens_are_normalised_text_first() -> None:
    encoder = q.ShotEncoder(6, 5, 16, n_text=2, n_vision=3)
    text, seen = torch.randn(4, 2, 6), torch.randn(4, 3, 5)
    s_a = encoder(text, seen)
    torch.testing.assert_close(s_a.mean(-1), torch.zeros(4, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(s_a.var(-1, unbiased=False), torch.ones(4, 5), atol=1e-2, rtol=0)
    moved = encoder(text + 1, seen)
    assert torch.equal(moved[:, 2:], s_a[:, 2:]) and not torch.allclose(moved[:, :2], s_a[:, :2])
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        encoder(seen[..., :1].expand(4, 3, 6), seen)


def test_picture_tokens_are_of_the_first_frame_and_next_to_last_layer() -> None:
    decoder = tiny_decoder()
    frame, ids = torch.rand(2, 3, 16, 16), q.motion_ids(facts(2), 4)
    states = decoder.vision(pixel_values=2 * frame - 1, output_hidden_states=True).hidden_states
    wanted = decoder.encoder(decoder.text(input_ids=ids)[0], states[2][:, 1:])  # three layers: states 0 to 3
    torch.testing.assert_close(decoder.encode(ids, frame), wanted)


def test_scope_enters_through_a_zero_layer() -> None:
    decoder = tiny_decoder()
    video, s_a = q.render(facts(2)), torch.randn(2, N, D)
    t, noise = torch.tensor([700, 300]), torch.randn(2, *decoder.diffusion.shape)
    loss = [q.decoder_loss(decoder, video, s_a, torch.tensor([v, v]), t, noise) for v in (1.0, 30.0)]
    assert torch.equal(loss[0], loss[1])
    grad = torch.autograd.grad(loss[1], decoder.transformer.ofs_embedding.linear_2.weight)[0]
    assert grad.abs().max() > 0
    for wrong in (torch.tensor([-1.0, 1.0]), torch.ones(3)):
        with pytest.raises(ValueError, match="f_ms"):
            q.decode(decoder, s_a, wrong, 1)
    with pytest.raises(ValueError, match="s_a"):
        q.decode(decoder, s_a[:, 1:], torch.ones(2), 1)
    with pytest.raises(ValueError, match="video"):
        q.decoder_loss(decoder, video * torch.nan, s_a, torch.ones(2), t, noise)


def test_loss_is_the_velocitys() -> None:
    decoder = tiny_decoder()
    video, s_a, t = q.render(facts(1)), torch.randn(1, N, D), torch.tensor([500])
    noise = torch.randn(1, *decoder.diffusion.shape)
    kept = decoder.diffusion.scheduler.alphas_cumprod[500].float()
    z = torch.nn.functional.pixel_unshuffle(2 * video - 1, 4)
    noisy, v = kept**0.5 * z + (1 - kept) ** 0.5 * noise, kept**0.5 * noise - (1 - kept) ** 0.5 * z
    out = decoder.transformer(noisy, s_a, t, ofs=torch.tensor([3.0]), return_dict=False)[0]
    got = q.decoder_loss(decoder, video, s_a, torch.tensor([3.0]), t, noise)
    torch.testing.assert_close(got, (out - v).square().mean(), rtol=1e-4, atol=1e-5)
    assert decoder.diffusion.scheduler.config.snr_shift_scale == 3.0


def test_guidance_compares_with_the_encoder_of_zeros() -> None:
    """One step: the video is linear in the guidance, and the branch without condition is the encoder's."""
    decoder = tiny_decoder()
    zeros = decoder.encoder(torch.zeros(1, 4, 32), torch.zeros(1, 16, 64))
    torch.testing.assert_close(decoder.null(1), zeros)
    assert decoder.null(1).abs().max() > 0.1
    seen = []
    decoder.diffusion.transformer.register_forward_pre_hook(
        lambda m, a, k: seen.append((a, k)), with_kwargs=True
    )
    q.decode(
        decoder, torch.randn(2, N, D), torch.tensor([3.0, 9.0]), 1, 1.5, torch.Generator().manual_seed(0)
    )
    (args, named) = seen[0]
    torch.testing.assert_close(args[1][:2], zeros.expand(2, -1, -1))
    assert named["ofs"].tolist() == [3.0, 9.0, 3.0, 9.0]


# ---------------------------------------------------------------- sequence and mask


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.integers(-5, 5), min_size=3, max_size=3),
)
def test_sequence_round_trip(turns: int, window: int, level: int, values: tuple) -> None:
    tok, state = q.make_tokenizer(3), q.GameState(level, *values)
    assert q.parse_state(q.state_text(state)) == state
    games = [(TEXT.replace("Mia", q.CHARACTERS[i % 4]), state) for i in range(turns)]
    seq = q.build_sequence(games, TEXT, tok, 3, state, window)
    words = tok.convert_ids_to_tokens(seq.input_ids.tolist())
    kept = games[-window:]
    assert words.count("<TURN>") == len(kept) + 1 == words.count("</TURN>")
    names = [words[i + 2] for i, w in enumerate(words) if w == "<TURN>"]
    assert names == [text.split()[1].strip(";") for text, _ in kept] + ["Mia"]
    for slots in (*seq.history_slots.tolist(), seq.query_slots.tolist()):
        assert [words[i] for i in slots] == ["<frame_0>", "<frame_1>", "<frame_2>"]
    assert [words[i] for i in seq.state_slots.tolist()] == [f"<Strength_{v}>" for v in state]
    answer = "".join(w for w, y in zip(words, seq.labels.tolist(), strict=True) if y >= 0)
    assert q.parse_state(answer) == state and answer.endswith("</TURN>")
    open_end = q.build_sequence(games, TEXT, tok, 3, None, window)
    assert tok.convert_ids_to_tokens(open_end.input_ids.tolist()[-1:]) == ["</img>"]


def test_bad_sequences_are_refused(tokenizer) -> None:
    for text in ("", "  ", "gently sit", "Character: Mia; Motion: sit"):
        with pytest.raises(ValueError, match="instruction"):
            q.build_sequence([], text, tokenizer, N)
    with pytest.raises(ValueError, match="window"):
        q.build_sequence([], TEXT, tokenizer, N, window=0)
    for state in (q.GameState(0, 0, 0, 0), q.GameState(1, 6, 0, 0)):
        with pytest.raises(ValueError, match=r"level|social"):
            q.build_sequence([], TEXT, tokenizer, N, state)
    with pytest.warns(UserWarning, match="moonwalk"):
        q.build_sequence([], TEXT.replace("sit", "moonwalk"), tokenizer, N)
    with pytest.raises(ValueError, match="<frame_20>"):
        q.check_tokenizer(tokenizer, N + 1)


def test_parser_is_strict() -> None:
    good = q.state_text(STATE)
    assert q.parse_state(good) == q.parse_state(good + "</TURN>") == STATE
    swaps = (("Strength_5", "Strength_9"), ("<SC>", "<ET>"), ("Strength_1", "Strength_-1"))
    broken = [good[:-5], good + good, "", *(good.replace(a, b) for a, b in swaps)]
    for text in broken:
        with pytest.raises(q.StateParseError):
            q.parse_state(text)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.data())
def test_block_mask_follows_its_definition(length: int, data) -> None:
    first = data.draw(st.integers(0, length - 1))
    slots = list(range(first, data.draw(st.integers(first, length)) or 1)) or [first]
    pad = torch.tensor([[data.draw(st.booleans()) for _ in range(length)]])
    got = q.block_mask(length, torch.tensor([slots]), pad)[0, 0]
    for i, j in itertools.product(range(length), repeat=2):
        seen = j <= i or (i in slots and j in slots)
        assert bool(got[i, j]) == (i == j or (seen and not pad[0, j]))


# ---------------------------------------------------------------- the language model


def batch_of(tokenizer, turns: int = 3, seed: int = 0, answer: bool = True):
    games = q.make_games(2, turns, seed)
    s_a = torch.randn(2, turns, N, D, generator=torch.Generator().manual_seed(seed))
    seqs = q.game_sequences(games, turns - 1, tokenizer, N, 4, answer=answer)
    return q.as_batch(seqs, s_a[:, :-1], s_a[:, -1])


def test_queries_are_read_at_their_own_positions(tokenizer) -> None:
    """With planted identities the read-out returns what stands at the query slots, nothing else."""
    model, batch = tiny_mllm(tokenizer), batch_of(tokenizer)
    length = batch["input_ids"].shape[1]
    model.output_projector = torch.nn.Identity()
    hidden = torch.arange(length, dtype=torch.float).view(1, -1, 1).expand(2, length, 32)
    assert torch.equal(model.read(hidden, batch["query_slots"])[..., 0].long(), batch["query_slots"])
    model.input_projector = torch.nn.Identity()
    x = model.embed(batch["input_ids"], batch["history_slots"], batch["history_sa"])
    own = model.llm.get_input_embeddings()(batch["input_ids"])
    for h, slots in enumerate(batch["history_slots"][0].tolist()):
        assert torch.equal(x[0, slots], batch["history_sa"][0, h])
    rest = sorted(set(range(length)) - set(batch["history_slots"][0].flatten().tolist()))
    assert torch.equal(x[0, rest], own[0, rest])
    with pytest.raises(ValueError, match="history_sa"):
        model.embed(batch["input_ids"], batch["history_slots"], batch["history_sa"][:, :1])


def test_later_tokens_never_reach_the_queries(tokenizer) -> None:
    model, batch = tiny_mllm(tokenizer).eval(), batch_of(tokenizer)
    shot = lambda b: model.read(model.hidden(b).last_hidden_state, b["query_slots"])  # noqa: E731
    base, last = shot(batch), int(batch["query_slots"][0, -1])
    later, earlier = copy.deepcopy(batch), copy.deepcopy(batch)
    later["input_ids"][:, last + 1 :] = 5
    assert torch.equal(shot(later), base)
    earlier["history_sa"] = earlier["history_sa"] + 1
    assert not torch.allclose(shot(earlier), base, atol=1e-3)
    blind = tiny_mllm(tokenizer, visual=False).eval()
    assert torch.equal(blind.hidden(batch).last_hidden_state, blind.hidden(earlier).last_hidden_state)
    # both directions inside the block: a change of the last query's embedding reaches the first query
    swapped = copy.deepcopy(batch)
    swapped["input_ids"][:, last] = 5
    assert not torch.allclose(shot(swapped)[:, 0], base[:, 0], atol=1e-6)
    model.causal = True
    assert torch.equal(shot(swapped)[:, 0], shot(batch)[:, 0])


def test_losses_follow_their_definitions(tokenizer) -> None:
    model, batch = tiny_mllm(tokenizer).eval(), batch_of(tokenizer)
    out = model(batch)
    hidden = model.hidden(batch).last_hidden_state
    logp = model.llm.lm_head(hidden).log_softmax(-1)
    labels = batch["labels"]
    terms = [
        -logp[b, i - 1, labels[b, i]] for b in range(2) for i in range(labels.shape[1]) if labels[b, i] >= 0
    ]
    assert len(terms) == 2 * 13
    torch.testing.assert_close(out["ce"], torch.stack(terms).mean())
    error = model.read(hidden, batch["query_slots"]) - batch["target_sa"]
    torch.testing.assert_close(out["mse"], error.square().mean())
    torch.testing.assert_close(out["loss"], out["ce"] + out["mse"])


def test_cached_generation_equals_whole_passes(tokenizer) -> None:
    model, batch = tiny_mllm(tokenizer, 3).eval(), batch_of(tokenizer, answer=False)
    s_a, ids = model.predict(batch, 5)
    longer = {k: v for k, v in batch.items() if k != "labels"}
    for step in range(5):
        hidden = model.hidden(longer).last_hidden_state
        assert torch.equal(model.llm.lm_head(hidden[:, -1]).argmax(-1), ids[:, step])
        longer["input_ids"] = torch.cat([longer["input_ids"], ids[:, step : step + 1]], 1)
    torch.testing.assert_close(s_a, model.read(hidden, batch["query_slots"]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- games and phases


def test_increments_follow_table_and_history() -> None:
    games = q.make_games(60, 8, 1)
    for g, t in itertools.product(range(60), range(8)):
        row, motions = games.facts[g, t].tolist(), games.facts[g, : t + 1, 6].tolist()
        social, fun, stamina = q.base_increments(row[6], row[2], row[3])
        hard = [q.MOTIONS[m] in q.STRENUOUS for m in motions]
        fun -= t > 0 and motions[t] == motions[t - 1]
        stamina *= 2 if stamina < 0 and t >= 3 and all(hard[t - 3 : t + 1]) else 1
        wanted = [max(-5, min(5, v)) for v in (social, fun, stamina)]
        assert games.values[g, t].tolist() == wanted
        assert bool(games.ruled[g, t]) == (wanted != q.base_increments(row[6], row[2], row[3]))
        same = [s for s in range(t) if games.facts[g, s, 2] == row[2]]
        gap = t - same[-1] if same else 0
        assert int(games.kind[g, t]) == (0 if not same else 1 if gap == 1 else 2 if gap < 4 else 3)
        assert all(games.facts[g, s, [4, 5]].tolist() == row[4:6] for s in same)
    assert 0.05 < games.ruled.float().mean() < 0.6 and (games.kind == 2).float().mean() > 0.1
    close = q.make_games(20, 30, 2, places=2, longest=2)
    assert (close.kind[:, 3:] < 3).all() and (close.kind[:, 3:] > 0).all()


def test_phases_train_what_they_say(tokenizer) -> None:
    decoder, model = tiny_decoder(), tiny_mllm(tokenizer)
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    losses = q.train_decoder_steps(decoder, q.shot_pool(6, 16, 0), 2, 3, 1e-3, 0)
    changed = {k.split(".")[0] for k, v in decoder.state_dict().items() if not torch.equal(v, before[k])}
    assert len(losses) == 2 and changed == {"text", "vision", "encoder", "diffusion"}  # (a): all
    decoder.requires_grad_(False)
    hashes = [q.parameter_hash(m) for m in (decoder, model)]
    q.train_mllm_steps(model, decoder, tokenizer, dict(steps=2, batch=2, lr=1e-3, games=6), 0)
    assert q.parameter_hash(decoder) == hashes[0] and q.parameter_hash(model) != hashes[1]  # (b): model only
    half = graphed._copy_in(model, torch.bfloat16)  # a GPU's: of one type, or one copy of all weights fails
    games = q.make_games(2, 3, 0)
    batch = q.turn_batch(games, q.encode_games(decoder, games, 0), 3, tokenizer, N, True)
    exact, near = (m(batch)["loss"].item() for m in (model, half))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and abs(near - exact) < 0.05 * exact
    model.requires_grad_(False)
    data, kept = q.adaptation_data(model, decoder, tokenizer, 10, 0), q.parameter_hash(model)
    assert data["s_a"].shape == (10, N, D) and data["video"].dtype == torch.uint8
    adapted, losses = q.adapt_decoder(decoder, model, data, 12, 6, 2e-3)
    assert q.parameter_hash(model) == kept and q.parameter_hash(decoder) == hashes[0]
    assert q.parameter_hash(adapted.encoder) == q.parameter_hash(decoder.encoder)
    assert q.parameter_hash(adapted.transformer) != q.parameter_hash(decoder.transformer)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


def test_adaptation_sees_predictions_not_the_truth(tokenizer) -> None:
    decoder, model = tiny_decoder().requires_grad_(False), tiny_mllm(tokenizer).requires_grad_(False)
    torch.nn.init.zeros_(model.output_projector[2].weight)
    torch.nn.init.constant_(model.output_projector[2].bias, 7.0)
    assert (q.adaptation_data(model, decoder, tokenizer, 10, 0)["s_a"] == 7).all()


def scripted(model, tokenizer, state: str, value: float = 0.0):
    """A model whose every prediction is one shot of `value` and one text."""
    ids = torch.tensor([tokenizer(state, add_special_tokens=False)["input_ids"]])
    model.seen = []

    def predict(batch, new_tokens: int = 12):
        model.seen.append(batch["history_slots"].shape[1])
        return torch.full((len(batch["input_ids"]), N, D), value), ids.expand(len(batch["input_ids"]), -1)

    model.predict = predict
    return model


def test_game_loop(tokenizer) -> None:
    model = scripted(tiny_mllm(tokenizer), tokenizer, q.state_text(q.GameState(2, 5, -5, 1)))
    game = q.Game(model, tiny_decoder(), tokenizer, window=2, steps=1, guidance=1.0)
    for _ in range(12):
        video, state = game.step(TEXT)
    assert video.shape == (8, 3, 16, 16) and state == q.GameState(2, 5, -5, 1)
    assert model.seen == [0, 1] + [2] * 10  # the window, never more
    assert game.values == {"social": 100, "entertainment": 0, "stamina": 100}
    saved = json.loads(json.dumps(game.to_dict()))
    assert len(saved["turns"]) == 12 and saved["turns"][0]["level"] == 2
    game.reset()
    assert game.values == dict.fromkeys(q.VALUES, 50) and not game.turns
    with pytest.raises(ValueError, match="window"):
        q.Game(model, game.decoder, tokenizer, window=0)
    scripted(model, tokenizer, "<ML><ML>")
    with pytest.raises(q.StateParseError):
        game.step(TEXT)


def test_rollouts_read_their_own_shots_except_first_visits(tokenizer) -> None:
    games = q.make_games(5, 6, 4)
    true_sa, fed = torch.ones(5, 6, N, D), []
    model = scripted(tiny_mllm(tokenizer), tokenizer, q.state_text(STATE), 7.0)
    inner = model.predict
    model.predict = lambda batch, n=12: (fed.append(batch["history_sa"]), inner(batch))[1]
    q.predict_games(model, tokenizer, games, true_sa, 4)
    assert all((x == 1).all() for x in fed)
    fed.clear()
    s_a, states = q.predict_games(model, tokenizer, games, true_sa, 4, rollout=True)
    wanted = torch.where(games.kind[:, 1:5] > 0, 7.0, 1.0)
    assert (
        torch.equal(fed[5][..., 0, 0], wanted) and (s_a == 7).all() and (states == torch.tensor(STATE)).all()
    )


def test_copy_is_new_text_and_the_previous_picture(monkeypatch) -> None:
    decoder, seen = tiny_decoder(), {}
    monkeypatch.setattr(
        q, "score", lambda d, g, s_a, *rest: (seen.setdefault(len(seen), s_a), torch.zeros(5, 8, 3, 16, 16))
    )
    test = dict(games=3, turns=5, steps=1, guidance=1.0)
    q.copy_arm(SIZE, test, {"weights": q.halves(decoder)})
    truth, copied, carried = seen[0], seen[1], seen[2]
    assert torch.equal(copied[:, 1:, :4], truth[:, 1:, :4]) and torch.equal(
        copied[:, 1:, 4:], truth[:, :-1, 4:]
    )
    games = q.make_games(3, 5, q.TEST_SEED)
    for g, t in itertools.product(range(3), range(1, 5)):
        source = truth if games.kind[g, t] == 0 else carried
        assert torch.equal(carried[g, t, 4:], source[g, t if games.kind[g, t] == 0 else t - 1, 4:])


def test_previous_shot_knows_the_outfit_and_nothing_of_another_room() -> None:
    games = q.make_games(400, 10, 5)
    rows = q.previous_shot(games)
    for g, t, kind, hidden, shown in rows[:60, :5]:
        now, old = (games.facts[int(g), int(t) - i].tolist() for i in (0, 1))
        assert kind == games.kind[int(g), int(t)]
        assert hidden == pytest.approx(sum(now[i] == old[i] for i in (1, 4, 5)) / 3)
        assert shown == pytest.approx(((now[0] == old[0]) + (now[2] == old[2])) / 2)
    assert (rows[rows[:, 2] == 1, 3] == 1).all()  # staying: the copy is perfect
    assert rows[rows[:, 2] == 2, 3].mean() == pytest.approx((1 + 1 / 6 + 1 / 8) / 3, abs=0.03)


# ---------------------------------------------------------------- results


def test_arms_pair_by_game_and_turn() -> None:
    metrics, arrays = {}, {}
    rows = np.array([[0, 1, 1, 1.0, 1, 1, 0], [0, 2, 2, 0.0, 1, 1, 0], [1, 3, 0, 1.0, 1, 1, 0]])
    for s in (0, 1):
        q.add_scores(metrics, arrays, "full", rows, s)
    assert metrics["hidden_accuracy"]["full"] == [1, 0, 1, 0] and metrics["return_accuracy"]["full"] == [0, 0]
    assert len(metrics["legible"]["full"]) == 6
    ids = arrays["seeds/legible/full"]
    assert len(set(ids.tolist())) == 6 and (ids // 100 % 1000).tolist() == [0, 0, 1, 0, 0, 1]


# ---------------------------------------------------------------- your own model


def save_mistral(folder, tok, seed: int):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = q.MistralConfig(vocab_size=len(tok), num_key_value_heads=1, sliding_window=None, **sizes)
    llm = q.lm.causal_lm(config, seed)
    tok.save_pretrained(folder)
    llm.save_pretrained(folder, max_shard_size="20KB")
    return llm


@pytest.fixture
def small_assets(tmp_path, monkeypatch):
    """The committed decoder at the size of these tests."""
    save_file(q.halves(tiny_decoder()), tmp_path / "decoder.safetensors")
    monkeypatch.setattr(q.readrun, "asset", lambda name: tmp_path / name.split("/")[1])


def test_two_checkpoints_give_different_numbers(tmp_path, small_assets) -> None:
    found = []
    for seed in (0, 1):
        save_mistral(tmp_path / str(seed), q.lm.byte_tokenizer(["<pad>", "<unk>"]), seed)
        found.append(q.own_model(str(tmp_path / str(seed)), SIZE, steps=1))
    assert found[0]["losses"] != found[1]["losses"] and found[0]["norm"] != found[1]["norm"]


def test_new_tokens_start_at_the_mean_and_lora_is_added(tmp_path) -> None:
    llm = save_mistral(tmp_path, q.lm.byte_tokenizer(["<pad>", "<unk>"]), 0)
    model, tok = q.load_mllm(str(tmp_path), D, N)
    q.check_tokenizer(tok, N)
    old = llm.get_input_embeddings().weight
    new = model.llm.get_input_embeddings().weight[len(old) :]
    torch.testing.assert_close(new, old.mean(0).expand_as(new))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained) and not any("base_layer" in n for n in trained)
    assert {"llm.model.embed_tokens.weight", "llm.lm_head.weight", "llm.model.norm.weight"} <= trained


def test_released_format_loads(tmp_path, tokenizer, small_assets) -> None:
    model = tiny_mllm(tokenizer)
    names = {new: old for old, new in q.RELEASED.items()}
    state = {next((k.replace(n, o, 1) for n, o in names.items() if k.startswith(n)), k): v
             for k, v in model.state_dict().items()}  # fmt: skip
    assert {k.split(".")[0] for k in state} == {"llm", "input_resampler", "output_resampler"}
    tokenizer.save_pretrained(tmp_path)
    model.llm.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded, _ = q.load_mllm(str(tmp_path), D, N)
    assert q.parameter_hash(loaded) == q.parameter_hash(model)
    assert q.own_model(str(tmp_path), SIZE, 1)["norm"] > 0
    state.pop("output_resampler.proj.2.weight")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"output_resampler\.proj\.2"):
        q.load_mllm(str(tmp_path), D, N)


def test_wrong_checkpoints_are_refused(tmp_path) -> None:
    (tmp_path / "latest").write_text("1")
    with pytest.raises(ValueError, match="SwissArmyTransformer"):
        q.load_mllm(str(tmp_path), D, N)
    (tmp_path / "latest").unlink()
    with pytest.raises(ValueError, match="checkpoint"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q.load_mllm(str(tmp_path), D, N)


def test_bad_worlds_are_refused() -> None:
    broken = torch.full((1, 2, 3, 16, 16), torch.nan)
    calls = {
        "size": lambda: q.render(facts(1), 20),
        "facts": lambda: q.render(facts(1) + 9),
        "video": lambda: (q.motion_scope(broken), q.read_shots(broken)),
        "f_ms": lambda: q.scope_level(-1.0),
        "level": lambda: q.level_value(6),
        "turns": lambda: q.make_games(1, 0, 0),
        "arm": lambda: q.make_arm("all", {}, {}, 0),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words):
            call()

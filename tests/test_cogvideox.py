"""The tiny CogVideoX against diffusers' own schedulers and pipelines, and against closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    DDIMScheduler,
    LCMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import cogvideox as cog
from readrun import lm

WORDS = lm.word_tokenizer(["a hand reaches the red blue square disc"], pattern=r"\w+")
PROMPTS = ["a hand reaches the red square", "the blue disc"]
SMALL: dict[str, Any] = dict(
    frames=3, height=16, width=24, text_length=8, hidden=64, depth=2, heads=2, text_width=32
)


def tiny(**fields: Any) -> cog.VideoDiffusion:
    return cog.build(WORDS, **(SMALL | fields)).eval()


def noise(model: cog.VideoDiffusion, n: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, *model.shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ pixels


@settings(max_examples=30, deadline=None)
@given(factor=st.sampled_from([1, 2, 4]), frames=st.integers(1, 3), seed=st.integers(0, 9))
def test_pixels_come_back_exactly(factor: int, frames: int, seed: int) -> None:
    video = torch.rand(2, frames, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    plain = cog.Pixels(factor, shift=0, scale=1)
    assert torch.equal(plain.decode(plain.encode(video)), video)
    codec = cog.Pixels(factor)
    latents = codec.encode(video)
    assert latents.shape == (2, frames, 3 * factor**2, 8 // factor, 12 // factor) and latents.min() >= -1
    torch.testing.assert_close(codec.decode(latents), video, atol=1e-7, rtol=0)
    image = (codec.decode(codec.encode((video * 255).round() / 255)) * 255).round()
    assert torch.equal(image, (video * 255).round()), "8-bit pictures survive"


def test_a_block_of_pixels_is_one_latent_position() -> None:
    video = torch.zeros(1, 1, 3, 8, 8)
    video[..., 4:, :4] = 1  # lower left block
    latents = cog.Pixels(4).encode(video)[0, 0]
    assert torch.equal(latents[:, 1, 0], torch.ones(48)) and torch.equal(latents[:, 0, 1], -torch.ones(48))


def test_frames_are_placed_and_the_rest_is_zero() -> None:
    given_frames = torch.arange(1.0, 5).view(1, 2, 2, 1, 1)
    whole = cog.place_frames(given_frames, 4, at=(0, -1))
    assert torch.equal(whole[:, [0, 3]], given_frames) and whole[:, 1:3].abs().sum() == 0
    for at in [(0,), (0, 0), (0, 4), (3, -1)]:
        with pytest.raises(ValueError, match="at="):
            cog.place_frames(given_frames, 4, at=at)


# ------------------------------------------------------------------ schedules


def test_the_schedule_is_the_family_s_and_not_the_class_s() -> None:
    five = cog.scheduler()
    kept = five.alphas_cumprod
    assert kept[999] == 0 and kept[459].item() == pytest.approx(0.298993, abs=1e-6)
    assert kept[549].item() == pytest.approx(0.180211, abs=1e-6)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    plain = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    for other in (LCMScheduler(**betas, **plain), DDIMScheduler(**betas, **plain)):
        torch.testing.assert_close(other.alphas_cumprod.double(), kept, atol=1e-6, rtol=0)
    assert not torch.allclose(CogVideoXDDIMScheduler().alphas_cumprod, kept, atol=1e-2)
    # 2B: the signal-to-noise ratio is divided by 3 before the last step is moved to zero
    base = DDIMScheduler(**betas).alphas_cumprod.double()
    shifted = (base / (base + 3 * (1 - base))).sqrt()
    rescaled = ((shifted - shifted[-1]) * shifted[0] / (shifted[0] - shifted[-1])) ** 2
    torch.testing.assert_close(cog.scheduler("dpm", 3.0).alphas_cumprod, rescaled, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_x0_and_eps_undo_the_library_s_noising(kind: str) -> None:
    scheduler, t = cog.scheduler(kind), torch.tensor([0, 19, 559, 999])
    clean, eps = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    noisy, v = scheduler.add_noise(clean, eps, t), scheduler.get_velocity(clean, eps, t)
    x0, found = cog.x0_eps(scheduler, v, noisy, t)
    torch.testing.assert_close(x0, clean, atol=2e-6, rtol=0)
    torch.testing.assert_close(found, eps, atol=2e-6, rtol=0)
    # the same function of the library with prediction and noisy latents in the other slots gives x0
    torch.testing.assert_close(scheduler.get_velocity(v, noisy, t), x0, atol=2e-6, rtol=0)
    for wrong in (1000, -1, torch.tensor([0.5])):
        with pytest.raises(ValueError, match="timesteps"):
            cog.x0_eps(scheduler, v, noisy, wrong)


# ------------------------------------------------------------------ loss


def test_loss_is_the_trainers_weighted_error_of_the_clean_latents() -> None:
    model = tiny(condition_channels=48)
    clean, eps, t = noise(model), noise(model, seed=2), torch.tensor([7, 999])
    image = cog.place_frames(clean[:, :1], 3)
    found = cog.velocity_loss(
        model, clean, model.embed(PROMPTS), condition=image, timesteps=t, noise=eps, reduction="none"
    )
    noisy = model.scheduler.add_noise(clean, eps, t)
    states = torch.cat([noisy, image], 2)
    out = model.transformer(states, model.embed(PROMPTS), t, return_dict=False)[0]
    x0 = model.scheduler.get_velocity(out, noisy, t)
    weight = 1 / (1 - model.scheduler.alphas_cumprod[t]).float()
    torch.testing.assert_close(found, weight * (x0 - clean).square().flatten(1).mean(1), rtol=1e-4, atol=0)
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    one, two = (
        cog.velocity_loss(model, clean, model.embed(PROMPTS), condition=image, generator=g) for g in draws
    )
    assert torch.equal(one, two)


def test_training_lowers_the_loss_and_reaches_both_networks() -> None:
    model = tiny()
    clean = torch.ones(4, *model.shape) * 0.5
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(30):
        g = torch.Generator().manual_seed(step)
        ids = model.drop_text(model.tokens(PROMPTS * 2), 0.1, g)
        loss = cog.velocity_loss(model, clean, model.embed(ids), generator=g)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n.startswith("text_enc"))


# ------------------------------------------------------------------ sampler


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
@pytest.mark.parametrize(
    ("rotary", "guidance", "dynamic", "steps"),
    [(False, 6.0, False, 5), (True, 3.0, True, 8), (True, 1.0, False, 7)],
)
def test_sampler_is_the_pipeline_s_loop(
    kind: str, rotary: bool, guidance: float, dynamic: bool, steps: int
) -> None:
    model = tiny(kind=kind, rotary=rotary)
    start = noise(model)
    pipe = CogVideoXPipeline(
        model.tokenizer, model.text_encoder, None, model.transformer, cog.scheduler(kind)
    )
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(
        PROMPTS, latents=start, num_frames=3, num_inference_steps=steps, guidance_scale=guidance,
        use_dynamic_cfg=dynamic, max_sequence_length=8, output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).frames  # fmt: skip
    found = cog.sample(
        model, model.embed(PROMPTS), steps=steps, guidance_scale=guidance, dynamic=dynamic, latents=start,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def tiny_vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    kinds = dict(down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)
    sizes = dict(block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2)
    return AutoencoderKLCogVideoX(**kinds, **sizes, temporal_compression_ratio=4).eval()


def family() -> cog.VideoDiffusion:
    """An image-to-video model with the family's own VAE, at toy size."""
    sizes = dict(frames=3, height=2, width=4, text_length=8, text_width=32, hidden=64, depth=1, heads=2)
    torch.manual_seed(0)
    net = cog.transformer(channels=4, condition_channels=4, rotary=True, **sizes)
    return cog.VideoDiffusion(
        net, cog.scheduler(), cog.Autoencoder(tiny_vae()), cog.text_encoder(len(WORDS), 32), WORDS
    )


def test_image_to_video_is_the_pipeline_s(tmp_path: Path) -> None:
    model = family()
    pipe = CogVideoXImageToVideoPipeline(
        WORDS, model.text_encoder, model.codec.vae, model.transformer, model.scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 32)
    # both encode the picture to the mode of the posterior
    model.codec.vae.encode = lambda x, f=model.codec.vae.encode: Mode(f(x).latent_dist)
    start = noise(model, 1)
    wanted = pipe(
        picture, PROMPTS[0], height=16, width=32, num_frames=9, num_inference_steps=4, guidance_scale=2.0,
        latents=start, max_sequence_length=8, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    first = model.codec.encode(picture[:, None])
    found = cog.sample(
        model, model.embed(PROMPTS[:1]), steps=4, guidance_scale=2.0, latents=start,
        condition=cog.place_frames(first, 3),
    )  # fmt: skip
    video = model.codec.decode(found).clamp(0, 1)
    assert video.shape == (1, 9, 3, 16, 32)
    torch.testing.assert_close(video, wanted, atol=1e-4, rtol=0)


class Mode:
    """A posterior whose sample is its mode."""

    def __init__(self, dist: Any) -> None:
        self.latent_dist = self
        self.mode = dist.mode
        self.sample = lambda generator=None: dist.mode()


def test_guidance_of_one_is_the_conditional_model_and_mixes_linearly() -> None:
    model = tiny()
    x, t, text, empty = noise(model), torch.tensor([300, 300]), model.embed(PROMPTS), model.embed([""])
    conditional, alone = model(x, t, text), model(x, t, empty.expand_as(text))
    torch.testing.assert_close(cog.guided(model, x, t, text, empty, 1.0), conditional)
    torch.testing.assert_close(cog.guided(model, x, t, text, empty, 0.0), alone)
    three = cog.guided(model, x, t, text, empty, 3.0)
    torch.testing.assert_close(three, alone + 3 * (conditional - alone), atol=1e-5, rtol=1e-5)
    plain = cog.sample(model, text, steps=2, guidance_scale=1.0, latents=x)
    model.text_encoder = None  # nothing asks for the empty prompt
    assert torch.equal(plain, cog.sample(model, text, steps=2, guidance_scale=0.5, latents=x))


def test_offset_embedding_reaches_both_branches() -> None:
    model = tiny(ofs_embed_dim=64)
    x, text = noise(model), model.embed(PROMPTS)
    a, b = (cog.sample(model, text, steps=2, latents=x, ofs=torch.full((2,), value)) for value in (0.5, 40.0))
    assert not torch.allclose(a, b)


def test_one_generator_per_clip_makes_a_clip_independent_of_its_batch() -> None:
    model = tiny(kind="dpm")
    text = model.embed(PROMPTS)
    both = cog.sample(model, text, steps=3, generator=[torch.Generator().manual_seed(i) for i in (1, 2)])
    alone = cog.sample(model, text[1:], steps=3, generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ files


def test_saved_and_loaded_models_are_equal(tmp_path: Path) -> None:
    model = tiny(kind="dpm", snr_shift_scale=3.0, condition_channels=49, codec=cog.Pixels(4, 0.25, 3.0))
    assert model.transformer.config.in_channels == 97
    again = cog.VideoDiffusion.load(model.save(tmp_path / "a"))
    assert type(again.scheduler) is type(model.scheduler) and again.codec.__dict__ == model.codec.__dict__
    assert again.scheduler.config.snr_shift_scale == 3.0 and again.shape == model.shape
    condition = torch.randn(2, 3, 49, 4, 6, generator=torch.Generator().manual_seed(0))

    def draw(m: cog.VideoDiffusion) -> torch.Tensor:
        g = torch.Generator().manual_seed(1)
        return cog.sample(m, m.embed(PROMPTS), steps=3, generator=g, condition=condition)

    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(draw(again), draw(model), atol=1e-5, rtol=1e-5)
    halved = cog.VideoDiffusion.load(model.save(tmp_path / "b", torch.float16))
    assert model.transformer.dtype == halved.transformer.dtype == torch.float32
    sizes = [(tmp_path / n / "transformer/diffusion_pytorch_model.safetensors").stat().st_size for n in "ab"]
    assert sizes[1] < 0.6 * sizes[0]
    torch.testing.assert_close(draw(halved), draw(model), atol=0.1, rtol=0.1)


def test_a_published_folder_loads_with_its_vae(tmp_path: Path) -> None:
    model = family()
    model.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "model_index.json", "transformer", "text_encoder", "tokenizer", "scheduler", "vae"
    }  # fmt: skip
    again, video = cog.VideoDiffusion.load(tmp_path), torch.rand(1, 9, 3, 16, 32)
    assert torch.equal(again.codec.encode(video), model.codec.encode(video))
    latents = again.codec.encode(video).requires_grad_()
    again.codec.decode(latents).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_models_without_text_encoder_save_and_load(tmp_path: Path) -> None:
    model = cog.build(None, **SMALL)
    again = cog.VideoDiffusion.load(model.save(tmp_path))
    text, x, t = torch.randn(1, 8, 32), noise(model, 1), torch.tensor([10])
    torch.testing.assert_close(again(x, t, text), model(x, t, text), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no text encoder"):
        again.embed(["a"])


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    a = tiny(seed=3)
    state = torch.random.get_rng_state()
    b = tiny(seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ------------------------------------------------------------------ bad input


def test_bad_input_is_named(tmp_path: Path) -> None:
    model = tiny()
    x, t, text = noise(model), torch.tensor([3, 3]), model.embed(PROMPTS)
    for match, call in {
        "kind": lambda: cog.scheduler("euler"),
        "factor": lambda: cog.Pixels(0),
        "video": lambda: cog.Pixels(4).encode(torch.zeros(1, 1, 3, 8, 10)),
        "latents": lambda: cog.Pixels(4).decode(torch.zeros(1, 1, 47, 2, 2)),
        "4 k": lambda: cog.Autoencoder(tiny_vae()).encode(torch.zeros(1, 4, 3, 16, 16)),
        "hidden": lambda: tiny(hidden=40),
        "patch_size": lambda: tiny(height=12),
        "height": lambda: tiny(height=18),
        "codec": lambda: cog.VideoDiffusion(model.transformer, model.scheduler, cog.Pixels(2)),
        "condition": lambda: model(x, t, text, torch.zeros(2, 3, 1, 4, 6)),
        "embeds": lambda: model(x, t, text[:, :5]),
        "more than 8 tokens": lambda: model.tokens(["red " * 9]),
        "prompts": lambda: model.tokens("red"),
        "reduction": lambda: cog.velocity_loss(model, x, text, reduction="sum"),
        "steps": lambda: cog.sample(model, text, steps=0),
        "model_index": lambda: cog.VideoDiffusion.load(tmp_path),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()

"""Tiny CogVideoX: diffusers' own classes at toy size, with the settings of the published family.

Latents are (batch, frames, channels, height, width), videos (batch, frames, 3, height, width) in 0..1. A
model is a text encoder, a transformer that predicts velocity, a scheduler and a codec between pixels and
latents: `Pixels`, a rearrangement that is undone exactly, or `Autoencoder`, the family's own. It saves and
loads in the folder format of diffusers' pipelines: a published checkpoint can take the tiny one's place.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from readrun import capture, train

SCHEDULERS = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}
# What every checkpoint's scheduler_config.json says; the classes' defaults differ in each entry.
FAMILY = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
FAMILY |= {"timestep_spacing": "trailing"}
Scheduler: TypeAlias = diffusers.CogVideoXDDIMScheduler | diffusers.CogVideoXDPMScheduler
Transformer: TypeAlias = diffusers.CogVideoXTransformer3DModel


def scheduler(kind: str = "ddim", snr_shift_scale: float = 1.0, **fields: Any) -> Scheduler:
    """Make the family's scheduler: "ddim" (deterministic) or "dpm" (second order, adds noise in each step).

    snr_shift_scale: 1.0 in the 5B checkpoints, 3.0 in the 2B one. At the last training timestep, 999, nothing
    of the clean latents is left. Sample with steps that divide 1000: others miss their timesteps by rounding.
    """
    if kind not in SCHEDULERS:
        raise ValueError(f"kind={kind!r}: it is one of 'ddim', 'dpm'")
    return SCHEDULERS[kind](**(FAMILY | dict(snr_shift_scale=snr_shift_scale) | fields))


class Pixels:
    """Latents that are pixels: a block of factor x factor pixels becomes 3 factor² channels of one position.

    latent = (value - shift) * scale. The rearrangement loses nothing, shift and scale cost one rounding.
    """

    def __init__(self, factor: int = 4, shift: float = 0.5, scale: float = 2.0) -> None:
        if factor < 1 or not scale:
            raise ValueError(f"factor={factor}, scale={scale}: factor must be at least 1, scale not 0")
        self.factor, self.shift, self.scale = int(factor), float(shift), float(scale)
        self.channels = 3 * self.factor**2

    def encode(self, video: Tensor) -> Tensor:
        """(batch, frames, 3, height, width) in 0..1 to (batch, frames, 3 f², height / f, width / f)."""
        if video.ndim != 5 or video.shape[2] != 3 or any(n % self.factor for n in video.shape[3:]):
            accepted = f"(batch, frames, 3, height, width), both divisible by {self.factor}"
            raise ValueError(f"video: shape {tuple(video.shape)}; accepted: {accepted}")
        return F.pixel_unshuffle((video - self.shift) * self.scale, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Undo `encode`. Values are not clamped."""
        if latents.ndim != 5 or latents.shape[2] != self.channels:
            accepted = f"(batch, frames, {self.channels}, height, width)"
            raise ValueError(f"latents: shape {tuple(latents.shape)}; accepted: {accepted}")
        return F.pixel_shuffle(latents, self.factor) / self.scale + self.shift


class Autoencoder(nn.Module):
    """The family's 3-D VAE behind the same two functions; 4 k + 1 frames of video are k + 1 of latents.

    Its decoder gives 4 k + 1 frames back for even k only (the family has k = 12).
    """

    def __init__(self, vae: diffusers.AutoencoderKLCogVideoX) -> None:
        super().__init__()
        self.vae, self.channels = vae, vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, video: Tensor) -> Tensor:
        """Mode of the posterior, times the checkpoint's scaling factor."""
        if video.ndim != 5 or (video.shape[1] - 1) % self.vae.config.temporal_compression_ratio:
            accepted = "(batch, 4 k + 1, 3, height, width)"
            raise ValueError(f"video: shape {tuple(video.shape)}; accepted: {accepted}")
        found = self.vae.encode(2 * video.transpose(1, 2).to(self.vae.dtype) - 1).latent_dist
        return found.mode().transpose(1, 2) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's video, moved from -1..1 to 0..1. Values are not clamped."""
        latents = latents.transpose(1, 2).to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample.transpose(1, 2) / 2 + 0.5


def place_frames(given: Tensor, frames: int, at: Sequence[int] = (0,)) -> Tensor:
    """Put `given` (batch, len(at), channels, h, w) at the frames `at` of `frames`, zeros at the others.

    at=(0,) is image to video, at=(0, -1) a first and a last picture. Raises ValueError for a bad place.
    """
    places = [i % frames for i in at if -frames <= i < frames]
    if given.ndim != 5 or len(set(places)) != len(at) or given.shape[1] != len(at):
        raise ValueError(f"at={tuple(at)}: one place in {frames} frames per frame of {tuple(given.shape)}")
    whole = given.new_zeros(given.shape[0], frames, *given.shape[2:])
    for i, frame in zip(places, given.unbind(1), strict=True):  # a list as index would come from the host
        whole[:, i] = frame
    return whole


def text_encoder(
    vocab_size: int, width: int, depth: int = 2, heads: int = 4, **fields: Any
) -> T5EncoderModel:
    """A small T5 encoder (v1.1, gated GELU) without dropout; `fields` go to its configuration and win."""
    own = dict(vocab_size=vocab_size, d_model=width, d_kv=width // heads, num_heads=heads, num_layers=depth,
               d_ff=2 * width, feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False)  # fmt: skip
    return T5EncoderModel(T5Config(**(own | fields)))


def transformer(
    *, channels: int, frames: int, height: int, width: int, text_length: int, text_width: int = 64,
    hidden: int = 128, depth: int = 4, heads: int = 4, condition_channels: int = 0, patch_size: int = 2,
    rotary: bool = False, **fields: Any,
) -> Transformer:  # fmt: skip
    """The library's transformer at toy size; frames, height and width are those of the latents.

    condition_channels: input channels beside the `channels` that are noised and predicted (as many again for
    image to video). rotary: positions as in the 5B checkpoints, else absolute ones as in 2B. `fields` go to
    the class and win (`ofs_embed_dim`, …). hidden should exceed channels * patch_size²: through fewer numbers
    the noise of a patch cannot pass, and samples stay noisy. Raises ValueError for sizes that do not fit.
    """
    unit = 16 * heads if rotary else math.lcm(16, 2 * heads)
    if hidden % unit:
        raise ValueError(f"hidden={hidden}: a multiple of {unit} for heads={heads}, rotary={rotary}")
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size={patch_size}: must divide latents of {height} x {width}")
    own = dict(in_channels=channels + condition_channels, out_channels=channels, num_attention_heads=heads,
               attention_head_dim=hidden // heads, num_layers=depth, time_embed_dim=hidden,
               text_embed_dim=text_width, max_text_seq_length=text_length, patch_size=patch_size,
               sample_frames=frames, sample_height=height, sample_width=width, temporal_compression_ratio=1,
               spatial_interpolation_scale=1.0, use_rotary_positional_embeddings=rotary)  # fmt: skip
    return Transformer(**(own | fields))


class VideoDiffusion(nn.Module):
    """Transformer, text encoder, tokenizer, scheduler and codec of one video model.

    A module, so that an optimiser, an average and `.to(device)` see both networks. Text encoder and tokenizer
    may be None where a chapter makes its own embeddings.
    """

    def __init__(
        self, transformer: Transformer, scheduler: Scheduler, codec: Pixels | Autoencoder,
        text_encoder: T5EncoderModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.transformer, self.text_encoder, self.tokenizer = transformer, text_encoder, tokenizer
        self.scheduler, self.codec = scheduler, codec
        if codec.channels != transformer.config.out_channels:
            given = f"{codec.channels} channels, the transformer predicts {transformer.config.out_channels}"
            raise ValueError(f"codec: {given}")

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(frames, channels, height, width) of the latents that the transformer was made for."""
        c = self.transformer.config
        frames = (c.sample_frames - 1) // c.temporal_compression_ratio + 1
        return frames, c.out_channels, c.sample_height, c.sample_width

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Padded ids (batch, text length) on the model's device. Raises ValueError for a prompt too long."""
        if isinstance(prompts, str) or self.tokenizer is None:
            raise ValueError("prompts: a list of strings, for a model with a tokenizer")
        most = self.transformer.config.max_text_seq_length
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=most)["input_ids"]
        if long := [prompt for prompt, row in zip(prompts, ids, strict=True) if len(row) > most]:
            raise ValueError(f"prompts: {long[0]!r} has more than {most} tokens")
        return torch.tensor(ids, device=self.device)

    def embed(self, text: Sequence[str] | Tensor) -> Tensor:
        """Embeddings (batch, text length, text width) of prompts or `tokens`; padding is seen too."""
        if self.text_encoder is None:
            raise ValueError("text: this model has no text encoder")
        return self.text_encoder(input_ids=text if isinstance(text, Tensor) else self.tokens(text))[0]

    def drop_text(self, ids: Tensor, p: float = 0.1, generator: Generator | None = None) -> Tensor:
        """Make each row of `ids` the empty prompt with probability p: trains the unconditional branch."""
        gone = torch.rand(len(ids), 1, generator=generator).to(ids.device) < p
        return torch.where(gone, self.tokens([""]), ids)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, embeds: Tensor, condition: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """Predicted velocity, float32, shaped like `noisy`.

        timesteps: integers (batch,). embeds: (batch, text length, text width). condition: further channels
        (batch, frames, …, height, width). `inputs` go to the transformer (`ofs`, …). Raises ValueError where
        the checkpoint asks for other shapes.
        """
        c, states = self.transformer.config, noisy if condition is None else torch.cat([noisy, condition], 2)
        if states.shape[2] != c.in_channels:
            given = f"{noisy.shape[2]} channels of latents + {states.shape[2] - noisy.shape[2]} of condition"
            raise ValueError(f"condition: {given}; this transformer takes {c.in_channels}")
        if not c.use_rotary_positional_embeddings and embeds.shape[1] != c.max_text_seq_length:
            accepted = f"exactly {c.max_text_seq_length}"
            raise ValueError(f"embeds: {embeds.shape[1]} text tokens; this transformer takes {accepted}")
        inputs["image_rotary_emb"] = rotary(self.transformer, states)
        kind = self.transformer.proj_out.weight.dtype  # float32 computes in autocast, others as they are
        with train.autocast(states.device if kind == torch.float32 else "cpu"):
            own = [v.to(kind) for v in (states, embeds)]
            return self.transformer(*own, timesteps, return_dict=False, **inputs)[0].float()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write diffusers' pipeline folder; dtype: of the weights on disk, else today's. The numbers of a
        `Pixels` codec stand in pixels.json, not in a vae/."""
        folder, own = Path(folder), self if dtype is None else copy.deepcopy(self).to(dtype)
        c, vae = self.transformer.config, getattr(own.codec, "vae", None)
        image = "ImageToVideo" if c.in_channels >= 2 * c.out_channels else ""
        kind = getattr(diffusers, f"CogVideoX{image}Pipeline")
        with _quiet():
            pipe = kind(own.tokenizer, own.text_encoder, vae, own.transformer, own.scheduler)
            pipe.save_pretrained(str(folder))
        if isinstance(self.codec, Pixels):
            facts = {name: getattr(self.codec, name) for name in ("factor", "shift", "scale")}
            (folder / "pixels.json").write_text(json.dumps(facts), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> VideoDiffusion:
        """Read a CogVideoX pipeline (text or image to video), a folder or hub id, published or saved here.
        Raises ValueError, naming `checkpoint`, for a folder that is none."""
        folder, absent = Path(checkpoint), {}
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise ValueError(f"checkpoint: {folder} has no model_index.json, so it is no pipeline folder")
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            absent = {name: None for name, kind in index.items() if kind == [None, None]}
        with _quiet():
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(checkpoint), dtype=dtype, **absent)
        if not isinstance(getattr(pipe, "transformer", None), diffusers.CogVideoXTransformer3DModel):
            raise ValueError(f"checkpoint: {checkpoint} is a {type(pipe).__name__}, not a CogVideoX pipeline")
        codec: Pixels | Autoencoder
        if pipe.vae is not None:
            codec = Autoencoder(pipe.vae.requires_grad_(False))
        elif (folder / "pixels.json").is_file():
            codec = Pixels(**json.loads((folder / "pixels.json").read_text(encoding="utf-8")))
        else:
            raise ValueError(f"checkpoint: {checkpoint} has neither a vae/ nor a pixels.json")
        return cls(pipe.transformer, pipe.scheduler, codec, pipe.text_encoder, pipe.tokenizer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Put pipelines together without progress bars and remarks on the class of the small tokenizer."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def build(
    tokenizer: PreTrainedTokenizerBase | None, *, frames: int, height: int, width: int, text_length: int,
    codec: Pixels | None = None, kind: str = "ddim", snr_shift_scale: float = 1.0, text_width: int = 64,
    text_depth: int = 2, seed: int = 0, **fields: Any,
) -> VideoDiffusion:  # fmt: skip
    """A tiny model for videos of `frames` x height x width pixels, its float32 weights given by `seed` alone.

    tokenizer: None leaves the text encoder out. codec: `Pixels(4)` if None. `fields` go to `transformer`
    (hidden, depth, heads, condition_channels, patch_size, rotary, …).
    """
    codec = codec or Pixels()
    if height % codec.factor or width % codec.factor:
        raise ValueError(f"height={height}, width={width}: both must be divisible by {codec.factor}")
    size: dict[str, Any] = dict(frames=frames, height=height // codec.factor, width=width // codec.factor)
    size["channels"] = codec.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = None if tokenizer is None else text_encoder(len(tokenizer), text_width, text_depth)
        net = transformer(**size, text_length=text_length, text_width=text_width, **fields)
    return VideoDiffusion(net, scheduler(kind, snr_shift_scale), codec, words, tokenizer)


def rotary(net: Transformer, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) of rotary positions for latents of this size, as the pipelines do; None where absolute."""
    c, (frames, (height, width)) = net.config, (latents.shape[1], latents.shape[3:])
    if not c.use_rotary_positional_embeddings:
        return None
    p, grid = c.patch_size, (height // c.patch_size, width // c.patch_size)
    own: dict[str, Any] = dict(embed_dim=c.attention_head_dim, grid_size=grid, device=latents.device)
    if c.patch_size_t is None:
        crops = get_resize_crop_region_for_grid(grid, c.sample_width // p, c.sample_height // p)
        return get_3d_rotary_pos_embed(crops_coords=crops, temporal_size=frames, **own)
    own |= dict(crops_coords=None, max_size=(c.sample_height // p, c.sample_width // p))  # CogVideoX 1.5
    return get_3d_rotary_pos_embed(temporal_size=-(-frames // c.patch_size_t), grid_type="slice", **own)


def x0_eps(scheduler: Scheduler, v: Tensor, noisy: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
    """Clean latents and noise that a velocity stands for: x0 = a x_t - s v, eps = a v + s x_t.

    a² is alphas_cumprod[t], s² = 1 - a². v and noisy: (batch, …), timesteps: (batch,) or one for all. Raises
    ValueError for a timestep outside the schedule.
    """
    steps, last = torch.as_tensor(timesteps).reshape(-1).cpu(), len(scheduler.alphas_cumprod) - 1
    if steps.is_floating_point() or steps.min() < 0 or steps.max() > last:
        raise ValueError(f"timesteps: {steps.tolist()}; accepted: integers from 0 to {last}")
    kept = scheduler.alphas_cumprod.cpu()[steps].view(-1, *[1] * (noisy.ndim - 1))  # float64
    a, s = kept.sqrt().to(noisy), (1 - kept).sqrt().to(noisy)
    return a * noisy - s * v, a * v + s * noisy


def velocity_loss(
    model: VideoDiffusion, latents: Tensor, embeds: Tensor, *, condition: Tensor | None = None,
    timesteps: Tensor | None = None, noise: Tensor | None = None, generator: Generator | None = None,
    reduction: str = "mean", **inputs: Any,
) -> Tensor:  # fmt: skip
    """CogVideoX's training loss on clean `latents`: squared error of the velocity v = a eps - s x0.

    The public trainers write |x̂0 - x0|² / (1 - a²): the same number, for x̂0 - x0 = s (v - v̂). timesteps
    (batch,) and noise (like latents) are drawn where not given; a `generator` of the CPU gives the same draws
    on every device. reduction: "mean", or "none" for one loss per clip. `inputs` go to the transformer.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: it is one of 'mean', 'none'")
    if timesteps is None:
        timesteps = torch.randint(len(model.scheduler.alphas_cumprod), (len(latents),), generator=generator)
    if noise is None:
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    timesteps = timesteps.to(latents.device)
    noisy = model.scheduler.add_noise(latents, noise, timesteps)
    wanted = model.scheduler.get_velocity(latents, noise, timesteps)
    losses = (model(noisy, timesteps, embeds, condition, **inputs) - wanted).square().flatten(1).mean(1)
    return losses.mean() if reduction == "mean" else losses


def guided(
    model: VideoDiffusion, noisy: Tensor, timesteps: Tensor, embeds: Tensor, uncond: Tensor | None = None,
    guidance_scale: float = 1.0, condition: Tensor | None = None, **inputs: Any,
) -> Tensor:  # fmt: skip
    """Velocity with classifier-free guidance, v_u + scale (v_c - v_u); without `uncond` the conditional v_c.

    uncond: embeddings (batch or 1, …). Condition and `inputs` are the same in both branches, which run as one
    batch, the unconditional half first.
    """
    if uncond is None:
        return model(noisy, timesteps, embeds, condition, **inputs)
    own = {k: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}
    own["condition"] = None if condition is None else torch.cat([condition, condition])
    text = torch.cat([uncond.expand(len(embeds), *uncond.shape[1:]), embeds])
    v_u, v_c = model(torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), text, **own).chunk(2)
    return v_u + guidance_scale * (v_c - v_u)


@torch.no_grad()
def sample(
    model: VideoDiffusion, embeds: Tensor, *, steps: int = 50, guidance_scale: float = 6.0,
    uncond: Tensor | None = None, condition: Tensor | None = None, latents: Tensor | None = None,
    dynamic: bool = False, generator: Generator | list[Generator] | None = None, **inputs: Any,
) -> Tensor:  # fmt: skip
    """Latents (batch, frames, channels, height, width) drawn with the model's scheduler: the pipelines' loop.

    guidance_scale: 1 or less is conditional only. uncond: by default the empty prompt's embeddings. latents:
    the first noise, by default drawn. dynamic: the pipelines' `use_dynamic_cfg`. generator: one, or one per
    clip; on the CPU it gives the same noise on every device. Latents stay float32.
    """
    if steps < 1 or guidance_scale < 0:
        raise ValueError(f"steps={steps}, guidance_scale={guidance_scale}: at least 1 and 0")
    uncond = None if guidance_scale <= 1 else model.embed([""]) if uncond is None else uncond
    x, old, scale = latents, None, guidance_scale
    if x is None:
        x = randn_tensor((len(embeds), *model.shape), generator=generator, device=model.device)
    plan = type(model.scheduler).from_config(model.scheduler.config)
    plan.set_timesteps(steps)
    plain = dynamic or model.transformer.config.use_rotary_positional_embeddings
    call = functools.partial(guided, model) if plain else capture.replays(model, guided)
    own = dict(embeds=embeds, uncond=uncond, condition=condition) | inputs
    for i, t in enumerate(plan.timesteps):
        if dynamic:  # t counts training timesteps here, as it does in the pipelines
            scale = 1 + guidance_scale * (1 - math.cos(math.pi * ((steps - t.item()) / steps) ** 5)) / 2
        times = torch.full((len(x),), int(t), device=x.device)
        v = call(noisy=x, timesteps=times, guidance_scale=scale, **own)
        if isinstance(plan, diffusers.CogVideoXDPMScheduler):
            back = plan.timesteps[i - 1] if i else None
            x, old = plan.step(v, old, t, back, x, generator=generator, return_dict=False)
        else:
            x = plan.step(v, t, x, return_dict=False)[0]
    return x

"""A world of boxes whose physics is known: scenes of ten scenarios, simulated, drawn and measured.

Lengths are in frame sides and times in seconds, `SECONDS` long; boxes are x, y, w, h with y downwards. What a
scene shows and its caption says is fixed; six hidden factors differ from take to take.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LAWS = {"drop": "gravity", "projectile": "gravity", "balls": "momentum", "cube": "momentum",
        "slide": "momentum", "magnet": "magnetism", "float": "fluid", "fill": "fluid",
        "melt": "thermodynamics", "mirror": "optics"}  # fmt: skip
CAPTIONS = {
    "drop": "A {rubber|wooden} ball falls onto the floor.",
    "projectile": "A {rubber|wooden} ball is thrown {slowly|quickly} to the right and bounces.",
    "balls": "A {rubber|steel} ball rolls {slowly|quickly} into a {rubber|steel} ball.",
    "cube": "A {rubber|steel} ball rolls {slowly|quickly} into a {wooden|steel} cube.",
    "slide": "A block slides {slowly|quickly} over {ice|wood}.",
    "magnet": "A magnet {attracts|repels} a steel ball.",
    "float": "A {wooden|steel} block is released in water.",
    "fill": "Water fills a glass {slowly|quickly}.",
    "melt": "A block of ice melts {slowly|quickly}.",
    "mirror": "A spot of light moves {slowly|quickly} {downwards|upwards} to a mirror.",
}
NAMES = {"drop": ["ball"], "projectile": ["ball"], "balls": ["ball", "ball"], "cube": ["ball", "cube"],
         "slide": ["block"], "magnet": ["magnet", "ball"], "float": ["block"], "fill": ["water"],
         "melt": ["ice"], "mirror": ["light"]}  # fmt: skip
SECONDS, FLOOR, SURFACE, MIRROR, FULL, GRAVITY = 3.0, 0.92, 0.5, 0.85, 0.65, 0.9  # lengths in frame sides
BOUNCE, MASS = {"rubber": 0.75, "wooden": 0.5, "steel": 0.6}, {"rubber": 1.0, "wooden": 2.0, "steel": 3.0}
HIDDEN = ("gravity", "bounce", "mass", "friction", "field", "rate")


class Scene(NamedTuple):
    """What can be seen (scenario, words of the caption, first boxes (O, 4) in frame sides, look: seed of the
    textures) and `hidden`: factors around 1 by name."""

    scenario: str
    words: tuple[str, ...]
    start: np.ndarray
    hidden: dict[str, float]
    look: int = 0

    @property
    def caption(self) -> str:
        """The sentence a planner and the video model get."""
        words = iter(self.words)
        return re.sub(r"\{[^}]*\}", lambda _: next(words), CAPTIONS[self.scenario])

    @property
    def names(self) -> list[str]:
        """Names of the objects, by id."""
        return NAMES[self.scenario]


class Truth(NamedTuple):
    """boxes (T, O, 4): x, y, w, h in pixels. events: (name, time in seconds), in order."""

    boxes: np.ndarray
    events: list[tuple[str, float]]


def bounce(
    times: np.ndarray, height: float, speed: float, gravity: float, restitution: float
) -> tuple[np.ndarray, list[float]]:
    """Height (T,) over the floor of a body thrown up with `speed`, and the times at which it touches it."""
    out, contacts, start = np.zeros(len(times)), [], 0.0
    while start <= times[-1]:
        land = (speed + math.sqrt(speed**2 + 2 * gravity * height)) / gravity
        now = (times >= start) & (times < start + land)
        s = times[now] - start
        out[now] = height + speed * s - gravity * s**2 / 2
        start, height, speed = start + land, 0.0, restitution * (gravity * land - speed)
        contacts.append(start)
        if speed < 0.02:
            break
    return out, [t for t in contacts if t <= times[-1]]


def coast(times: np.ndarray, speed: float, friction: float) -> np.ndarray:
    """Distance (T,) gone by a body that friction stops: constant deceleration, then rest."""
    t = np.clip(times, 0, abs(speed) / friction)
    return np.sign(speed) * (abs(speed) * t - friction * t**2 / 2)


def collide(mass_a: float, mass_b: float, v_a: float, v_b: float, restitution: float) -> tuple[float, float]:
    """Velocities after a one-dimensional collision: momentum kept, relative velocity times -restitution."""
    mean = (mass_a * v_a + mass_b * v_b) / (mass_a + mass_b)
    push = restitution * (v_a - v_b) / (mass_a + mass_b)
    return mean - mass_b * push, mean + mass_a * push


def roll_into(
    times: np.ndarray, gap: float, speed: float, friction: float, masses: tuple[float, float],
    frictions: tuple[float, float], restitution: float,
) -> tuple[np.ndarray, np.ndarray, list[float]]:  # fmt: skip
    """Displacements (T,) of a rolling body and of the one at rest that it meets after `gap`, and the time."""
    left = speed**2 - 2 * friction * gap
    if left <= 0:
        return coast(times, speed, friction), np.zeros(len(times)), []
    at = (speed - math.sqrt(left)) / friction
    v_a, v_b = collide(masses[0], masses[1], math.sqrt(left), 0.0, restitution)
    after = np.maximum(times - at, 0)
    a = np.where(times < at, coast(times, speed, friction), gap + coast(after, v_a, frictions[0]))
    return a, coast(after, v_b, frictions[1]), [at]


def magnet_gap(
    times: np.ndarray, gap: float, field: float, friction: float, sign: int, room: float
) -> tuple[np.ndarray, list[float]]:
    """Gap (T,) of a steel ball to a magnet that pulls (sign -1) or pushes (+1) with field / (gap + 0.25)^2.

    Symplectic Euler steps of 1/480 s; the ball stops at the magnet and after `room`.
    """
    fine = np.arange(round(480 * times[-1]) + 1) / 480
    x, v, out = gap, 0.0, []
    for _ in fine:
        out.append(x)
        a = sign * field / (x + 0.25) ** 2
        a = a - math.copysign(friction, v) if v else math.copysign(max(abs(a) - friction, 0.0), a)
        v += a / 480
        x += v / 480
        if not 0 < x < room:
            x, v = min(max(x, 0.0), room), 0.0
    met = np.flatnonzero(np.array(out) <= 0)
    return np.interp(times, fine, out), [float(fine[met[0]])] if len(met) else []


def change_matter(
    scene: Scene, t: np.ndarray, boxes: np.ndarray, k: dict[str, float], fast: int
) -> list[tuple[str, float]]:
    """Fill boxes (T, O, 4) of water, ice and light in place, in frame sides; returns the events."""
    words, events = scene.words, list[tuple[str, float]]()
    x, y, w, h = (scene.start[:, i] for i in range(4))
    pick = lambda slow, quick: slow + (quick - slow) * fast  # noqa: E731
    if scene.scenario == "float" and words[0] == "wooden":
        rest, omega, damp = SURFACE - h[0] / 2, 4 * math.sqrt(k["gravity"]), 1.2 * k["friction"]
        boxes[:, 0, 1] = rest + (y[0] - rest) * np.exp(-damp * t) * np.cos(omega * t)
    elif scene.scenario == "float":
        speed, lag = 0.25 * k["gravity"], 0.3
        boxes[:, 0, 1] = np.minimum(y[0] + speed * (t - lag * (1 - np.exp(-t / lag))), FLOOR - h[0])
    elif scene.scenario == "fill":
        high = np.minimum(h[0] + pick(0.16, 0.26) * k["rate"] * t, FULL)
        boxes[:, 0, 1], boxes[:, 0, 3] = y[0] + h[0] - high, high
        events = [("full", (FULL - h[0]) / (pick(0.16, 0.26) * k["rate"]))]
    elif scene.scenario == "melt":
        high = h[0] * (0.25 + 0.75 * np.exp(-pick(0.4, 0.8) * k["rate"] * t))
        wide = w[0] * np.sqrt(h[0] / high)
        boxes[:, 0] = np.stack([x[0] + (w[0] - wide) / 2, y[0] + h[0] - high, wide, high], -1)
    else:
        speed = pick(0.26, 0.36) * k["rate"]
        gap, gone = MIRROR - x[0] - w[0], speed * t
        boxes[:, 0, 0] = np.maximum(x[0] + np.where(gone < gap, gone, 2 * gap - gone), 0)
        boxes[:, 0, 1] += (1 if words[1] == "downwards" else -1) * 0.12 * k["rate"] * t
        events = [("mirror", gap / speed)]
    return events


def simulate(scene: Scene, n_frames: int = 49, side: float = 64.0) -> Truth:
    """True boxes (n_frames, O, 4) in pixels of a `side` x `side` frame over three seconds, and the events."""
    k = {name: scene.hidden.get(name, 1.0) for name in HIDDEN}
    t, words = np.linspace(0, SECONDS, n_frames), scene.words
    boxes = np.repeat(scene.start[None], n_frames, 0)
    x, y, w, h = (scene.start[:, i] for i in range(4))
    fast = ("quickly" in words) + ("faster" in words)
    events: list[tuple[str, float]] = []
    pick = lambda slow, quick: slow + (quick - slow) * fast  # noqa: E731
    if scene.scenario in ("drop", "projectile"):
        up = 0.0 if scene.scenario == "drop" else 0.6
        high, hits = bounce(
            t, FLOOR - y[0] - h[0], up, GRAVITY * k["gravity"], BOUNCE[words[0]] * k["bounce"]
        )
        boxes[:, 0, 1] = FLOOR - h[0] - high
        if scene.scenario == "projectile":
            boxes[:, 0, 0] += pick(0.16, 0.24) * k["rate"] * t
        events = [("floor", s) for s in hits[:3]]
    elif scene.scenario in ("balls", "cube"):
        masses = (MASS[words[0]], MASS[words[2]] * k["mass"])
        drag = (0.12 * k["friction"], (0.12 if scene.scenario == "balls" else 0.3) * k["friction"])
        gap, elastic = x[1] - x[0] - w[0], (0.9 if scene.scenario == "balls" else 0.4) * min(k["bounce"], 1.1)
        a, b, hits = roll_into(t, gap, pick(0.26, 0.36) * k["rate"], drag[0], masses, drag, elastic)
        boxes[:, 0, 0] = np.maximum(x[0] + a, 0)
        boxes[:, 1, 0] = np.minimum(x[1] + b, 1 - w[1])
        events = [("contact", s) for s in hits]
    elif scene.scenario == "slide":
        friction = (0.12 if words[1] == "ice" else 0.25) * k["friction"]
        boxes[:, 0, 0] += coast(t, pick(0.22, 0.34) * k["rate"], friction)
    elif scene.scenario == "magnet":
        gap, sign = x[0] - x[1] - w[1], -1 if words[0] == "attracts" else 1
        found, hits = magnet_gap(t, gap, 0.06 * k["field"], 0.04 * k["friction"], sign, x[0] - w[1])
        boxes[:, 1, 0] = x[0] - w[1] - found
        events = [("contact", s) for s in hits]
    else:
        events = change_matter(scene, t, boxes, k, fast)
    return Truth(boxes * side, [(name, at) for name, at in events if at <= SECONDS])


def draw_scene(rng: np.random.Generator, scenario: str = "", ood: bool = False) -> Scene:
    """A random scene; `ood`: first heights, gaps or sizes outside of the training range. ValueError:
    scenario."""
    scenario = scenario or str(rng.choice(list(LAWS)))
    if scenario not in LAWS:
        raise ValueError(f"scenario: {scenario!r}; accepted: {', '.join(LAWS)}")
    words = tuple(str(rng.choice(c.split("|"))) for c in re.findall(r"\{([^}]*)\}", CAPTIONS[scenario]))
    u = lambda low, high: float(rng.uniform(low, high))  # noqa: E731
    far = lambda inside, outside: u(*(outside if ood else inside))  # noqa: E731
    d = u(0.17, 0.21)
    start = [[u(0.15, 0.65), 0.0, d, d]]
    if scenario == "drop":
        start[0][1] = far((0.15, 0.45), (0.02, 0.12))
    elif scenario == "projectile":
        start[0][:2] = [u(0.04, 0.1), far((0.4, 0.6), (0.3, 0.37))]
    elif scenario in ("balls", "cube"):
        start = [[u(0.04, 0.12), FLOOR - d, d, d]]
        start += [[start[0][0] + d + far((0.08, 0.16), (0.18, 0.24)), FLOOR - d, d, d]]
    elif scenario == "slide":
        start[0][:2] = [far((0.04, 0.2), (0.22, 0.3)), FLOOR - d]
    elif scenario == "magnet":
        at = u(0.7, 0.78)
        gap = far((0.15, 0.28), (0.3, 0.4)) if words[0] == "attracts" else far((0.03, 0.1), (0.12, 0.16))
        start = [[at, FLOOR - 0.24, 0.14, 0.24], [at - gap - d, FLOOR - d, d, d]]
    elif scenario == "float":
        start[0][1] = far((0.56, 0.68), (0.7, 0.73)) if words[0] == "wooden" else far((0.4, 0.5), (0.3, 0.37))
    elif scenario == "fill":
        low = far((0.08, 0.2), (0.25, 0.32))
        start = [[0.35, 0.9 - low, 0.3, low]]
    elif scenario == "melt":
        w, h = u(0.22, 0.3), far((0.26, 0.36), (0.4, 0.46))
        start = [[u(0.25, 0.45), FLOOR - h, w, h]]
    else:
        start[0] = [
            far((0.06, 0.25), (0.3, 0.4)),
            u(0.15, 0.3) if words[1] == "downwards" else u(0.5, 0.65),
            0.14,
            0.14,
        ]
    look = int(rng.integers(2**31))
    return retake(Scene(scenario, words, np.array(start), {}, look), rng)


def retake(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same visible scene with hidden factors drawn anew, each within 10 % of 1."""
    return scene._replace(hidden={name: float(rng.uniform(0.9, 1.1)) for name in HIDDEN})


COLORS = {"rubber": (0.85, 0.15, 0.15), "wooden": (0.75, 0.5, 0.1), "steel": (0.25, 0.3, 0.6),
          "block": (0.75, 0.5, 0.1), "magnet": (0.7, 0.1, 0.6), "water": (0.1, 0.35, 0.85),
          "ice": (0.45, 0.8, 0.95), "light": (0.95, 0.9, 0.2)}  # fmt: skip


def colors_of(scene: Scene) -> np.ndarray:
    """RGB (O, 3) of each object; the second of a pair leans to green, so that colour tells them apart."""

    def one(i: int, name: str) -> np.ndarray:
        stuff = (
            scene.words[2 * i]
            if scene.scenario in ("balls", "cube")
            else scene.words[0]
            if scene.words
            else ""
        )
        known = COLORS.get(name) or COLORS.get(stuff) or COLORS["steel"]
        if scene.scenario == "float":
            known = COLORS[stuff]
        return np.array(known) if i == 0 else 0.35 * np.array(known) + 0.65 * np.array((0.1, 0.75, 0.2))

    return np.stack([one(i, name) for i, name in enumerate(scene.names)])


def sprites_of(scene: Scene, size: int = 16) -> np.ndarray:
    """(O, 4, size, size) float32 colour and opacity of each object: textured discs and squares."""
    rng = np.random.default_rng([scene.look, 1])
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    disc = np.clip((1 - np.hypot(axis[:, None], axis[None])) * size / 3, 0, 1)
    out = []
    for name, color in zip(scene.names, colors_of(scene), strict=True):
        shade = cv2.resize(rng.uniform(-0.12, 0.12, (4, 4)), (size, size), interpolation=cv2.INTER_CUBIC)
        shape = disc if name in ("ball", "light") else np.ones((size, size))
        out.append(np.concatenate([np.clip(color[:, None, None] + shade, 0, 1), shape[None]]))
    return np.stack(out).astype(np.float32)


def background_of(scene: Scene, size: int) -> np.ndarray:
    """(3, size, size) float32: a grey texture with what does not move."""
    rng = np.random.default_rng([scene.look, 2])
    coarse, fine = rng.uniform(-0.1, 0.1, (5, 5)), rng.uniform(-0.06, 0.06, (size // 2, size // 2))
    grey = sum(cv2.resize(n, (size, size), interpolation=cv2.INTER_LINEAR) for n in (coarse, fine))
    out = np.repeat((0.62 + grey)[None], 3, 0)
    at = lambda share: round(share * size)  # noqa: E731
    if scene.scenario == "float":
        out[:, at(SURFACE) :] += np.array([-0.15, -0.05, 0.1])[:, None, None]
    floor = np.array([0.12, 0.12, 0.14]) if "ice" in scene.words else np.array([-0.25, -0.27, -0.3])
    out[:, at(FLOOR) :] += floor[:, None, None]
    if scene.scenario == "mirror":
        out[:, :, at(MIRROR) : at(MIRROR) + 2] = 0.95
    if scene.scenario == "fill":
        out[:, at(0.9 - FULL) : at(0.9) + 1, [at(0.35) - 1, at(0.65)]] = 0.2
        out[:, at(0.9), at(0.35) : at(0.65)] = 0.2
    return np.clip(out, 0, 1).astype(np.float32)


def composite(background: Tensor, sprites: Tensor, boxes: Tensor, camera: Tensor | None = None) -> Tensor:
    """Frames (B, T, 3, S, S) of backgrounds (B, 3, S, S), sprites (B, O, 4, s, s) in boxes (B, T, O, 4) px.

    camera (B, T, 2): left and top of the view in px; outside, the background is mirrored. Boxes of no width
    are
    absent; later objects lie on top.
    """
    b, t, count = boxes.shape[:3]
    side = background.shape[-1]
    axis = torch.arange(side, device=boxes.device, dtype=boxes.dtype) + 0.5
    camera = boxes.new_zeros(b, t, 2) if camera is None else camera
    view = [camera[..., i, None] + axis for i in range(2)]  # (B, T, S): canvas x and y

    def sample(images: Tensor, xs: Tensor, ys: Tensor, mode: str) -> Tensor:
        grid = torch.stack(torch.broadcast_tensors(xs[:, :, None, :], ys[:, :, :, None]), -1).flatten(0, 1)
        images = images[:, None].expand(-1, t, -1, -1, -1).flatten(0, 1)
        return F.grid_sample(images, grid, padding_mode=mode, align_corners=False)

    frames = sample(background, view[0] / side * 2 - 1, view[1] / side * 2 - 1, "reflection")
    for o in range(count):
        x, y, w, h = boxes[:, :, o].unbind(-1)
        xs = (view[0] - x[..., None]) / w.clamp_min(1e-3)[..., None] * 2 - 1
        ys = (view[1] - y[..., None]) / h.clamp_min(1e-3)[..., None] * 2 - 1
        rgba = sample(sprites[:, o], xs, ys, "zeros")
        alpha = rgba[:, 3:].clamp_max(1) * (w > 0).to(rgba.dtype).flatten()[:, None, None, None]
        frames = frames * (1 - alpha) + torch.where(alpha > 0, rgba[:, :3], frames) * alpha
    return frames.unflatten(0, (b, t)).clamp(0, 1)


def stack_scenes(scenes: Sequence[Scene], frames: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """For `composite`: backgrounds, sprites (N, 2, 4, 16, 16), boxes (N, frames, 2, 4) px of scenes."""
    boxes, sprites = np.zeros((len(scenes), frames, 2, 4)), np.zeros((len(scenes), 2, 4, 16, 16))
    for i, scene in enumerate(scenes):
        found = simulate(scene, frames, side).boxes
        boxes[i, :, : found.shape[1]], sprites[i, : found.shape[1]] = found, sprites_of(scene)
    backgrounds = np.stack([background_of(s, side) for s in scenes])
    first, second, third = (torch.as_tensor(v, dtype=torch.float32) for v in (backgrounds, sprites, boxes))
    return first, second, third


def render(scene: Scene, boxes: np.ndarray, side: int) -> np.ndarray:
    """Frames (T, side, side, 3) in 0..1 of a scene with its objects in boxes (T, O, 4) px."""
    parts = [background_of(scene, side), sprites_of(scene), np.asarray(boxes, np.float32)]
    frames = composite(*(torch.as_tensor(p)[None] for p in parts))
    return frames[0].permute(0, 2, 3, 1).numpy()


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU (...) of boxes (..., 4) xywh."""
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    both = np.clip(high - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    return both / np.maximum(a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both, 1e-12)


def track(frames: np.ndarray, colors: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Centres (T, O, 2) px of objects in frames (T, H, W, 3): pixels of their colours (O, 3) that differ from
    the empty scene (H, W, 3); NaN where an object is not seen."""
    out = np.full((len(frames), len(colors), 2), np.nan)
    differs = np.linalg.norm(frames - background, axis=-1) > 0.2
    away = np.linalg.norm(frames[:, :, :, None] - colors, axis=-1)  # (T, H, W, O)
    for o in range(len(colors)):
        mine = (away[..., o] < 0.35) & (away[..., o] <= away.min(-1)) & differs
        for t, mask in enumerate(mine):
            if mask.sum() >= 3:
                ys, xs = np.nonzero(mask)
                out[t, o] = np.median(xs) + 0.5, np.median(ys) + 0.5
    return out


def psnr(frames: np.ndarray, real: np.ndarray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio (dB) over pixels of a mask (T, H, W), at most 60."""
    error = np.square(frames - real).mean(-1)[mask]
    return float(min(60.0, -10 * np.log10(max(error.mean(), 1e-6)))) if error.size else 60.0


def box_mask(boxes: np.ndarray, side: int) -> np.ndarray:
    """(T, side, side) bool: inside of any of the boxes (T, O, 4) px."""
    at = np.arange(side) + 0.5
    inside = [
        (at >= boxes[..., i, None]) & (at < (boxes[..., i] + boxes[..., i + 2])[..., None]) for i in range(2)
    ]
    return (inside[0][:, :, None, :] & inside[1][:, :, :, None]).any(1)

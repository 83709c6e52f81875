"""Oracles and bad inputs of the chapter `lsnet`."""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from readrun import chapter
from safetensors.torch import save_file
from torch import nn
from whole_script import run_script

q = chapter("lsnet")
MICRO = dict(embed_dim=[32, 48, 64, 96], depth=[1, 2, 2, 2])


def loops(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """SKA as its formula says, one number at a time."""
    (n, c, h, width), groups, k = x.shape, w.shape[1], math.isqrt(w.shape[2])
    y = torch.zeros_like(x)
    for i, ch, p, s in itertools.product(range(n), range(c), range(h), range(width)):
        for a, b in itertools.product(range(k), range(k)):
            row, column = p + a - k // 2, s + b - k // 2
            if 0 <= row < h and 0 <= column < width:
                y[i, ch, p, s] += w[i, ch % groups, k * a + b, p, s] * x[i, ch, row, column]
    return y


def pair(channels: int, groups: int, k: int, h: int, w: int, images: int = 2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(channels + 31 * k + h)
    x = torch.randn(images, channels, h, w, generator=generator, dtype=dtype)
    return x, torch.randn(images, groups, k * k, h, w, generator=generator, dtype=dtype)


# ---------------------------------------------------------------- the operator


@pytest.mark.parametrize("shape", [(8, 1, 3, 1, 1), (6, 3, 3, 4, 3), (4, 4, 5, 3, 4), (4, 2, 1, 2, 5)])
def test_ska_reference_equals_loops(shape) -> None:
    x, w = pair(*shape)
    assert torch.allclose(q.ska_reference(x, w), loops(x, w), atol=1e-12)
    assert torch.allclose(q.ska(x, w), loops(x, w), atol=1e-12)
    assert torch.allclose(q.shift_and_add(x, w), loops(x, w), atol=1e-12)


def test_constant_kernels_are_a_depthwise_convolution() -> None:
    x, w = pair(12, 3, 3, 7, 5)
    w = w[:1, :, :, :1, :1].expand(2, 3, 9, 7, 5)
    wanted = F.conv2d(x, w[0, :, :, 0, 0].repeat(4, 1).view(12, 1, 3, 3), padding=1, groups=12)
    assert torch.allclose(q.ska(x, w), wanted)


@settings(max_examples=15, deadline=None)
@given(tap=st.integers(0, 8), h=st.integers(1, 6), w=st.integers(1, 6), groups=st.sampled_from([1, 2, 4]))
def test_one_hot_kernels_shift_with_zeros(tap: int, h: int, w: int, groups: int) -> None:
    x = torch.randn(1, 4, h, w, dtype=torch.float64)
    kernels = torch.zeros(1, groups, 9, h, w, dtype=torch.float64)
    kernels[:, :, tap] = 1
    padded = F.pad(x, (1, 1, 1, 1))
    a, b = divmod(tap, 3)
    assert torch.equal(q.ska(x, kernels), padded[:, :, a : a + h, b : b + w])
    assert torch.equal(q.ska(2 * x, 3 * kernels), 6 * q.ska(x, kernels))  # linear in both


def test_channels_of_a_residue_class_share_a_kernel() -> None:
    x, w = pair(16, 2, 3, 5, 5)
    w[:, 0] = 0
    y = q.ska(x, w)
    assert (y[:, 0::2] == 0).all() and (y[:, 1::2] != 0).any(dim=(0, 2, 3)).all()
    x, w = pair(16, 2, 3, 4, 5)
    within = torch.tensor([2, 1, 0, *range(3, 16)])  # 0 and 2 swapped: both even
    assert torch.equal(q.ska(x[:, within], w), q.ska(x, w)[:, within])
    across = torch.tensor([1, 0, *range(2, 16)])
    assert not torch.allclose(q.ska(x[:, across], w), q.ska(x, w)[:, across])


@pytest.mark.parametrize("shape", [(4, 2, 3, 3, 4), (4, 4, 5, 2, 3), (6, 2, 1, 2, 2)])
def test_gradients(shape) -> None:
    x, w = (t.requires_grad_() for t in pair(*shape, images=1))
    assert torch.autograd.gradcheck(q.ska_reference, (x, w))
    assert torch.autograd.gradcheck(q.ska, (x, w))  # the registered formulas
    one = q.ska(x, w).sum()
    assert torch.autograd.grad(one, w)[0].shape == w.shape  # gradient in one argument only


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_op_is_registered_well(layout) -> None:
    x, w = pair(16, 2, 3, 4, 5, dtype=torch.float32)
    x = x.contiguous(memory_format=layout)
    torch.library.opcheck(q.ska_op, (x.requires_grad_(), w.requires_grad_()))
    assert q.ska(x, w).stride() == x.stride()


def test_compiles_without_a_graph_break() -> None:
    x, w = pair(16, 2, 3, 4, 5, dtype=torch.float32)
    x, w = x.requires_grad_(), w.requires_grad_()
    compiled = torch.compile(lambda x, w: q.ska(x, w).sin().sum(), fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(q.ska(x, w).sin().sum(), (x, w))
    assert all(map(torch.allclose, torch.autograd.grad(compiled(x, w), (x, w)), plain))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        q.ska(x, w)
    assert counter.get_total_flops() == 2 * 9 * x.numel()


def test_triton_kernels_equal_the_reference() -> None:
    """Forward and both gradients in Triton's interpreter, against autograd of the float64 reference."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{here.parent / 'lib'}"}
    done = subprocess.run(
        [sys.executable, str(here / "lsnet_triton.py")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 12
    for name, error in errors.items():
        limit = (
            2e-3 if "float16 " in name and "bfloat16" not in name else 1.6e-2 if "bfloat16" in name else 1e-5
        )
        assert error <= limit, (name, error)


def test_tiles_are_whole_programs() -> None:
    for layout, tiles in q.TILES.items():
        for positions, kernels, vec, warps in tiles:
            size = positions * kernels
            assert size & (size - 1) == 0 and warps in (1, 2, 4, 8)
            assert vec <= (kernels if layout == "nhwc" else size)


@pytest.mark.parametrize(
    "w, told",
    [((2, 5, 9, 4, 4), "5 kernels"), ((2, 2, 8, 4, 4), "8 taps"), ((2, 2, 4, 4, 4), "4 taps"),
     ((2, 2, 9, 4, 5), "does not fit"), ((1, 2, 9, 4, 4), "does not fit"), ((2, 2, 9, 4), "dimensions")],
)  # fmt: skip
def test_ska_refuses(w, told) -> None:
    with pytest.raises(ValueError, match=told):
        q.ska(torch.zeros(2, 16, 4, 4), torch.zeros(w))


def test_ska_refuses_other_devices_and_dtypes() -> None:
    x, w = torch.zeros(1, 8, 2, 2), torch.zeros(1, 1, 9, 2, 2)
    for other in (w.to("meta"), w.double()):
        with pytest.raises(ValueError, match="accepted: the same"):
            q.ska(x, other)


# ---------------------------------------------------------------- layers


def test_lsconv_by_hand() -> None:
    """The layer from its state dict with plain functions: kernel order, GroupNorm, BatchNorm, residual."""
    torch.manual_seed(0)
    layer = q.randomise_(q.LSConv(16)).double().eval()
    layer.lkp.norm.weight.data.uniform_(0.5, 2)
    s, x = layer.state_dict(), torch.randn(2, 16, 6, 5, dtype=torch.float64)

    def cb(name: str, x: torch.Tensor, **how) -> torch.Tensor:
        bn = [s[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, s[f"{name}.c.weight"], **how), *bn)

    u = F.relu(cb("lkp.cv1", x))
    u = F.relu(cb("lkp.cv3", cb("lkp.cv2", u, padding=3, groups=8)))
    w = F.conv2d(u, s["lkp.cv4.weight"], s["lkp.cv4.bias"])
    flat = w.reshape(2, 2, 9 * 30)
    flat = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    w = flat.view(2, 18, 6, 5) * s["lkp.norm.weight"].view(1, -1, 1, 1) + s["lkp.norm.bias"].view(1, -1, 1, 1)
    y = loops(x, w.view(2, 2, 9, 6, 5))
    bn = [s[f"bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    assert torch.allclose(layer(x), F.batch_norm(y, *bn) + x, atol=1e-10)


def test_attention_equals_sdpa_with_an_explicit_mask_and_is_symmetric_under_flips() -> None:
    torch.manual_seed(0)
    m = q.randomise_(q.MSA(32, 4)).eval()
    m.attention_biases.data.normal_()
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        parts = m.qkv(x).split([64, 64, 32], 1)
        q_, k, v = (t.reshape(2, 4, -1, 16).transpose(2, 3) for t in (m.dw(parts[0]), *parts[1:]))
        mask = torch.empty(4, 16, 16)
        for a, b in itertools.product(range(16), range(16)):
            offset = abs(a // 4 - b // 4) * 4 + abs(a % 4 - b % 4)
            mask[:, a, b] = m.attention_biases[:, offset]
        y = F.scaled_dot_product_attention(q_, k, v, mask).transpose(2, 3).reshape(2, 32, 4, 4)
        assert torch.allclose(m(x), m.proj(y), atol=1e-5)
    bias = m.attention_biases[:, m.attention_bias_idxs].view(4, 4, 4, 4, 4)
    assert torch.equal(bias, bias.flip(1, 3)) and torch.equal(bias, bias.flip(2, 4))


def test_groupnorm_stays_in_float32_under_autocast() -> None:
    layer, seen = q.LSConv(16), []
    layer.lkp.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 16, 5, 5))
    assert seen == [torch.float32]


@pytest.mark.parametrize("dim", [12, 9])
def test_lkp_refuses_dims(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim: {dim}.*multiple of 8"):
        q.LSConv(dim)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "name, train, fused, macs, flops, stages",
    [
        ("lsnet_t", 11_409_832, 11_370_488, 316_298_816, 631_437_568,
         [34.32, 0, 32.89, 123.93, 124.77, 0.39]),
        ("lsnet_s", 16_146_304, 16_098_232, 538_533_696, 1_075_522_688,
         [73.16, 29.58, 72.97, 193.35, 169.02, 0.46]),
        ("lsnet_b", 23_313_608, 23_249_320, 1_247_537_984, 2_488_555_520,
         [126.44, 249.32, 373.15, 278.14, 219.97, 0.52]),
    ],
)  # fmt: skip
def test_integers_of_the_paper(name, train, fused, macs, flops, stages) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        assert sum(p.numel() for p in model.parameters()) == train
        found = q.count(q.fuse_(model))
    assert (found["params"], found["macs"], found["flops"]) == (fused, macs, flops)
    assert [round(v / 1e6, 2) for v in found["by_stage"].values()] == stages
    assert sum(found["by_stage"].values()) == macs


def test_unfused_count_of_b_is_what_the_paper_prints() -> None:
    with torch.device("meta"):
        assert q.count(timm.create_model("lsnet_b"))["macs"] == 1_258_606_656


def test_fuse_leaves_outputs_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mixer in ("ls", "dw3", "window_attn"):
        model = q.LSNet(64, stem_stride=4, num_classes=5, mixer=mixer, distillation=mixer == "ls", **MICRO)
        with pytest.raises(ValueError, match="training"):
            q.fuse_(model.train())
        model = q.randomise_(model).double().eval()
        with torch.no_grad():
            before = model(x)
            assert torch.allclose(q.fuse_(model)(x), before, atol=1e-10)
            state = {k: v.clone() for k, v in model.state_dict().items()}
            assert all(torch.equal(v, state[k]) for k, v in q.fuse_(model).state_dict().items())  # idempotent
        left = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        assert left == [n for n in left if re.fullmatch(r"blocks\d\.\d\.mixer\.bn", n)]


def expected_keys(depth: list[int]) -> set[str]:
    """The names of the official files, written out."""
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    cb = ["c.weight", *(f"bn.{k}" for k in bn)]
    keys = {f"patch_embed.{i}.{k}" for i in (0, 2, 4) for k in cb}
    for stage, blocks in enumerate(depth, 1):
        first = 0 if stage == 1 else 2
        keys |= {f"blocks{stage}.{j}.{k}" for j in range(first) for k in cb}
        for d in range(blocks):
            at = f"blocks{stage}.{first + d}"
            keys |= {f"{at}.ffn.m.{p}.{k}" for p in ("pw1", "pw2") for k in cb}
            if d % 2 == 0:
                keys |= {f"{at}.mixer.{p}.{k}" for p in ("conv", "conv1") for k in cb}
                keys |= {f"{at}.se.{p}.{k}" for p in ("fc1", "fc2") for k in ("weight", "bias")}
            elif stage < 4:
                keys |= {f"{at}.mixer.lkp.{p}.{k}" for p in ("cv1", "cv2", "cv3") for k in cb}
                keys |= {f"{at}.mixer.lkp.{p}.{k}" for p in ("cv4", "norm") for k in ("weight", "bias")}
                keys |= {f"{at}.mixer.bn.{k}" for k in bn}
            else:
                keys |= {f"{at}.mixer.m.{p}.{k}" for p in ("qkv", "dw", "proj.1") for k in cb}
                keys |= {f"{at}.mixer.m.attention_biases", f"{at}.mixer.m.attention_bias_idxs"}
    keys |= {
        f"{head}.{k}"
        for head in ("head", "head_dist")
        for k in ("l.weight", "l.bias", *(f"bn.{b}" for b in bn))
    }
    return keys


def test_state_dict_keys() -> None:
    with torch.device("meta"):
        for name, depth in (("lsnet_t", [0, 2, 8, 10]), ("lsnet_b", [4, 6, 8, 10])):
            assert set(timm.create_model(f"{name}_distill").state_dict()) == expected_keys(depth)


def official(folder: Path, name: str = "lsnet_t", classes: int = 7, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    file = folder / f"{name}{seed}.pth"
    torch.save({"model": q.randomise_(timm.create_model(name, num_classes=classes)).state_dict()}, file)
    return file


def test_official_file_loads(tmp_path) -> None:
    file = official(tmp_path)
    model = q.load_official(timm.create_model("lsnet_t", num_classes=7), str(file)).eval()
    saved = torch.load(file, weights_only=True)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    assert q.own_model(str(file))["variant"] == "lsnet_t"
    folder = tmp_path / "timm"  # the same through timm's own loader
    folder.mkdir()
    save_file(saved, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "lsnet_t", "num_classes": 7}))
    through_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in through_timm.items())
    larger = q.load_official(timm.create_model("lsnet_t", num_classes=7, img_size=288), str(file)).eval()
    key = "blocks4.3.mixer.m.attention_biases"
    assert larger.state_dict()[key].shape == (4, 25) and larger(torch.zeros(1, 3, 288, 288)).shape == (1, 7)
    table = torch.arange(16.0).view(1, 16)
    assert torch.equal(q.resize_biases(table, 4), table)
    corner = q.resize_biases(table, 7).view(7, 7)
    assert corner[0, 0] == 0 and abs(corner[-1, -1].item() - 15) < 1e-4
    with pytest.raises(ValueError, match="img_size"):
        model(torch.zeros(1, 3, 288, 288))


def test_wrong_checkpoints(tmp_path) -> None:
    file = official(tmp_path, "lsnet_t_distill")
    with pytest.raises(ValueError, match="checkpoint:.*unexpected.*head_dist"):
        q.load_official(timm.create_model("lsnet_t", num_classes=7), str(file))
    with pytest.raises(ValueError, match="checkpoint:.*missing"):
        q.load_official(timm.create_model("lsnet_s", num_classes=7), str(file))
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for bad in ("bad.pth", "empty"):
        with pytest.raises(ValueError, match="checkpoint:"):
            q.own_model(str(tmp_path / bad))
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="checkpoint: no LSNet"):
        q.own_model(str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    "wrong, name",
    [(dict(stem_stride=2), "stem_stride"), (dict(img_size=63), "img_size"), (dict(mixer="conv"), "mixer"),
     (dict(embed_dim=(64, 128)), "embed_dim")],
)  # fmt: skip
def test_network_refuses(wrong, name) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=name):
        q.LSNet(**wrong)


# ---------------------------------------------------------------- mixers, tasks, speed


@pytest.mark.parametrize("dim, resolution", [(32, 8), (48, 4), (64, 2), (48, 16), (96, 8), (160, 4)])
def test_mixers_have_equal_macs(dim: int, resolution: int) -> None:
    """Counted by torch, not by the chapter's formula: within 5 % of LS convolution."""
    x, found = torch.zeros(1, dim, resolution, resolution), {}
    for kind in q.MIXERS:
        mixer = q.make_mixer(kind, dim, resolution).eval()
        extra = 0
        for module in mixer.modules():
            if isinstance(module, nn.GroupNorm):
                extra += 5 * module.num_channels * resolution**2
            if isinstance(module, q.LSConv | q.Involution):
                extra += 2 * x.numel()  # its BatchNorm stays
        math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the one it counts
        with math_only, torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            assert mixer(x).shape == x.shape
        found[kind] = counter.get_total_flops() / 2 + extra
    assert all(abs(v / found["ls"] - 1) < 0.05 for v in found.values()), found
    with pytest.raises(ValueError, match="mixer: 'conv'"):
        q.make_mixer("conv", dim)


def test_d2_splits_share_no_face_and_no_photograph() -> None:
    assert len(q.CHARACTERS) == len(set(q.CHARACTERS)) == 200
    assert not set(q.FACES["train"]) & set(q.FACES["test"])
    train, test = (q.photographs(s) for s in ("train", "test"))
    assert all((a - b).abs().mean() > 0.05 for a in train for b in test)
    for split in ("train", "test"):
        masks, there = q.glyphs(split)
        assert there.any(0).all() and (masks[there].flatten(1).sum(1) > 3).all()
        for face, known in zip(masks, there, strict=True):  # every character differs from every other
            flat = face[known].flatten(1)
            apart = torch.cdist(flat, flat) + 99 * torch.eye(len(flat))
            assert apart.min() > 0.5
    a, labels = q.make_d2(64, "train", 32, 20, 0, "cpu")
    b, again = q.make_d2(64, "train", 32, 20, 0, "cpu")
    assert a.shape == (64, 3, 32, 32) and a.dtype == torch.uint8 and labels.max() < 20
    assert torch.equal(a, b) and torch.equal(labels, again)
    assert not torch.equal(a, q.make_d2(64, "test", 32, 20, 0, "cpu")[0])
    with pytest.raises(ValueError, match="split"):
        q.make_d2(1, "val", 32, 20, 0, "cpu")


def test_d2_test_pictures_use_test_photographs(monkeypatch) -> None:
    """Training photographs painted red, test ones green: no test picture is red."""
    red, green = torch.zeros(2, 1, 3, 192, 192)
    red[:, 0], green[:, 1] = 1, 1
    monkeypatch.setattr(q, "photographs", lambda split: {"train": red, "test": green}[split])
    for split, strong, weak in (("train", 0, 1), ("test", 1, 0)):
        mean = q.make_d2(16, split, 32, 20, 0, "cpu")[0].float().mean((0, 2, 3))
        assert mean[strong] > 2 * mean[weak]


def test_d1_label_needs_the_cue() -> None:
    """Without the cue the picture is the same whichever ring counts; the cue lies opposite the ring."""
    a, labels = q.make_d1(256, "train", 64, 0, "cpu")
    b, same = q.make_d1(256, "train", 64, 0, "cpu", cue=False)
    assert torch.equal(labels, same) and labels.unique().numel() == 8
    difference = (a.float() - b.float()).mean(1)
    line = torch.arange(64) - 31.5
    radius = torch.hypot(line[:, None], line[None])
    assert (difference[:, radius < 25] == 0).all()  # nothing but the edge changes
    rings = (b.float().mean(1) - b.float().mean((1, 2, 3))[:, None, None]).clamp_min(0)
    assert rings[:, radius > 29.5].mean() < rings[:, radius < 29].mean()
    weight = difference.clamp_min(0).flatten(1)
    at = torch.stack(
        [(weight * g.flatten()).sum(1) / weight.sum(1) for g in torch.meshgrid(line, line, indexing="ij")]
    )
    assert (at.abs() > 8).all() and len(set(map(tuple, at.sign().T.tolist()))) == 4
    with pytest.raises(ValueError, match="split"):
        q.make_d1(1, "val", 32, 0, "cpu")


def test_d1_label_is_the_gap_of_the_ring_opposite_the_cue() -> None:
    images, labels = q.make_d1(64, "test", 128, 3, "cpu")
    bare, _ = q.make_d1(64, "test", 128, 3, "cpu", cue=False)
    line = (torch.arange(128) - 63.5) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    for image, plain, label in zip(images.float().mean(1), bare.float().mean(1), labels, strict=True):
        cue = (image - plain).clamp_min(0)
        sy, sx = -(cue * y).sum().sign(), -(cue * x).sum().sign()  # opposite quarter
        window = (y * sy > 3) & (x * sx > 3) & (y * sy < 23) & (x * sx < 23)
        ink = (plain - plain[window].median()).clamp_min(0) * window
        ink = torch.where(ink > 30, 1.0, 0.0)
        py, px = y[ink > 0], x[ink > 0]  # a circle fitted by least squares: a gap does not move its centre
        system = torch.stack([2 * py, 2 * px, torch.ones_like(px)], 1)
        cy, cx, _ = torch.linalg.lstsq(system, (py**2 + px**2)[:, None]).solution[:, 0].tolist()
        angle = math.atan2(cy - py.mean().item(), cx - px.mean().item())
        assert round(angle / (math.pi / 4)) % 8 == label.item()


def test_fold_pairs_is_kept_only_if_the_output_stays() -> None:
    model, folded = q.ready_for_inference("mobilenetv3_small_050", 64, "cpu")
    assert folded and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())

    class Wrong(nn.Module):
        """BatchNorm beside a convolution that does not feed it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(self.bn(x)).mean((2, 3))

    wrong = q.randomise_(Wrong()).eval()
    x = torch.randn(2, 3, 4, 4)
    before = wrong(x)
    assert q.fold_pairs_(wrong) == 1 and not torch.allclose(wrong(x), before, atol=1e-2)


def test_throughput_and_its_errors() -> None:
    model = q.LSNet(32, stem_stride=4, num_classes=3, **MICRO).eval()
    found = q.throughput(model, 2, size=32, repeats=2, warmup=1)
    assert found["batch"] == 2 and found["images_s"] > 0 and found["gb_s"] > 0 and len(found["samples"]) == 2
    with pytest.raises(ValueError, match="layout"):
        q.throughput(model, 2, layout="NHWC")


def test_derived_metrics() -> None:
    speeds = {name: [float(v[1])] * 3 for name, v in q.PAPER_SPEED.items()}
    reverse = {name: [1 / v[0]] * 3 for name, v in speeds.items()}
    metrics = {"throughput_a": speeds, "throughput_b": reverse}
    assert q.rank_correlation(metrics, {}) == {"protocol_a": [1.0], "protocol_b": [-1.0]}
    assert q.rank_correlation({}, {}) == {}


def test_ska_error_sees_a_wrong_operator(monkeypatch) -> None:
    x, w = q.ska_inputs(16, 5, 2, torch.float32, "nchw", "cpu")
    assert q.ska_error(x, w, torch.float32) <= 1
    monkeypatch.setattr(q, "ska", lambda x, w: q.ska_reference(x, w.flip(1)))
    assert q.ska_error(x, w, torch.float32) > 1
    tiled = {
        "triton_ska": lambda x, w, tile: q.ska_reference(x, w) + tile,
        "triton_grad_x": lambda g, w, tile: q.ska_grad_x(g, w),
        "triton_grad_w": lambda g, x, groups, k, tile: q.ska_grad_w(g, x, groups, k),
    }
    for name, launcher in tiled.items():
        monkeypatch.setattr(q, name, launcher)
    names = ("triton", "grad_x", "grad_w")
    good, bad = (dict.fromkeys(names, shift) for shift in (0, 0.1))  # a tile that is wrong
    assert q.ska_error(x, w, torch.float32, good) <= 1 < q.ska_error(x, w, torch.float32, bad)


def test_training_is_repeatable_and_differs_between_mixers(tmp_path, monkeypatch) -> None:
    import readrun

    run = readrun.start("lsnet", profile="smoke", device="cpu", out=str(tmp_path))
    monkeypatch.setattr(q, "run", run, raising=False)
    settings_ = dict(size=32, classes=4, test=16, batch=8, lr=1e-3)
    got = []
    for arm in ("ls", "ls", "ls_k3", "dw3"):
        torch.manual_seed(0)
        got.append(q.train_mixer("d2", arm, 0, MICRO, settings_, 16, 2, arm == "ls")["loss"])
    assert (
        np.array_equal(got[0], got[1])
        and not np.array_equal(got[0], got[2])
        and not np.array_equal(got[0], got[3])
    )


# ---------------------------------------------------------------- a checkpoint of one's own


def test_checkpoint_path(tmp_path, capsys, monkeypatch) -> None:
    """The whole notebook on two checkpoints, one official file and one folder in timm's format."""
    file = official(tmp_path, "lsnet_t_distill", seed=0)
    folder = tmp_path / "timm"
    folder.mkdir()
    torch.manual_seed(1)
    save_file(timm.create_model("lsnet_t", num_classes=7).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "lsnet_t", "num_classes": 7}))
    said = []
    for n, checkpoint in enumerate((file, folder)):
        how = dict(profile="smoke", out=str(tmp_path / f"run{n}"), only="own_model*")
        run_script("lsnet", monkeypatch, figures=False, checkpoint=str(checkpoint), **how)
        text = capsys.readouterr().out
        said.append(next(line for line in text.splitlines() if "largest logit" in line))
    assert said[0].startswith("lsnet_t_distill") and said[1].startswith("lsnet_t:") and said[0] != said[1]


def test_operators_of_the_notebook_outlive_those_of_the_chapter() -> None:
    """`results` loads the chapter beside the notebook: an operator whose name is taken reads freed memory."""
    nodes = ast.parse(Path(q.__file__).read_text()).body
    operators = [
        node for node in nodes if "SPACE" in ast.unparse(node) and "profile_ops" not in ast.unparse(node)
    ]
    notebook = dict(vars(q)) | {"__name__": "__main__"}
    exec(compile(ast.Module(operators, []), q.__file__, "exec"), notebook)  # noqa: S102
    x, w = torch.randn(1, 8, 4, 4), torch.randn(1, 1, 9, 4, 4)
    for space, found in ((q.SPACE, q.ska_op), (notebook["SPACE"], notebook["ska_op"])):
        assert getattr(torch.ops, space).ska.default is found._opoverload
        torch.testing.assert_close(found(x, w), q.ska_reference(x, w))

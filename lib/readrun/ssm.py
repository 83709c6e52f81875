# mypy: ignore-errors
"""Triton kernels of a Mamba-2 layer around its products: convolution, scan, step, gate, Hadamard, rounding.

Rows `zx` are what in_proj gives, [z | x | B | C | dt]; C counts the channels of x, B, C. Launched, with a
torch reference beside each, by the chapter `quamba2`. PDL: as in `readrun.onerow`.
"""

from readrun.lowbit import constexpr, jit, nearest, put, tl
from readrun.onerow import gdc_launch_dependents, gdc_wait


@jit
def softplus(v):
    """log(1 + exp(v)) without overflow."""
    return tl.maximum(v, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(v)))


@jit
def conv_kernel(zx, weight, bias, s_in, s_out, out, length, width, first, C, QUANT: constexpr, BT: constexpr,
                BC: constexpr):  # fmt: skip
    """Causal convolution of four taps and SiLU for a tile of tokens and channels of one sequence."""
    t, c = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    row, some = tl.program_id(2).to(tl.int64) * length, c < C
    total = tl.zeros([BT, BC], tl.float32) + tl.load(bias + c, mask=some, other=0.0)[None, :]
    for k in tl.static_range(4):
        at = t - 3 + k
        good = ((at >= 0) & (at < length))[:, None] & some[None, :]
        v = tl.load(zx + (row + at)[:, None] * width + first + c[None, :], mask=good, other=0).to(tl.float32)
        total += (
            v
            * tl.load(weight + c * 4 + k, mask=some, other=0.0)[None, :]
            * (tl.load(s_in + c, mask=some, other=0.0)[None, :] if QUANT else 1.0)
        )
    y = total * tl.sigmoid(total)
    if QUANT:
        y = y / tl.load(s_out + c, mask=some, other=1.0)[None, :]
    good = (t < length)[:, None] & some[None, :]
    put(out, (row + t)[:, None] * C + c[None, :], y, out, good, False, QUANT)


@jit
def ssd_kernel(
    zx, xbc, scale, dt_bias, A, D, y, state, s_state, rows, length, width, s_dt, QUANT: constexpr,
    STATE8: constexpr,
    H: constexpr, P: constexpr, N: constexpr, G: constexpr, KIND: constexpr, Q: constexpr, BP: constexpr,
):  # fmt: skip
    """The scan of BP channels of one head through all chunks of Q tokens of one sequence."""
    b, h = tl.program_id(0), tl.program_id(1)
    t, p, n = tl.arange(0, Q), tl.program_id(2) * BP + tl.arange(0, BP), tl.arange(0, N)
    g, e, C = h // (H // G), H * P, H * P + 2 * G * N
    rate, skip, bias = tl.load(A + h), tl.load(D + h), tl.load(dt_bias + h)
    s = tl.zeros([BP, N], tl.float32)
    for start in range(0, length, Q):
        ok = start + t < length
        row = (b * length + start + t).to(tl.int64)
        dt = softplus(
            tl.load(zx + row * width + width - H + h, mask=ok, other=0).to(tl.float32) * s_dt + bias
        )
        dt = tl.where(ok, dt, 0.0)
        cum, total = tl.cumsum(dt * rate, 0), tl.sum(dt * rate, 0)
        at, good = xbc + row[:, None] * C, ok[:, None]
        xs = tl.load(at + (h * P + p)[None, :], mask=good, other=0).to(tl.float32)
        bs = tl.load(at + (e + g * N + n)[None, :], mask=good, other=0).to(tl.float32)
        cs = tl.load(at + (e + (G + g) * N + n)[None, :], mask=good, other=0).to(tl.float32)
        if QUANT:
            xs = xs * tl.load(scale + h * P + p)[None, :]
            bs = bs * tl.load(scale + e + g * N)
            cs = cs * tl.load(scale + e + (G + g) * N)
        later = t[:, None] >= t[None, :]
        decay = tl.exp(tl.where(later, cum[:, None] - cum[None, :], float("-inf")))
        bs, cs = bs.to(KIND), cs.to(KIND)
        mixed = tl.dot(cs, tl.trans(bs), input_precision="ieee") * decay * dt[None, :]
        out = tl.dot(mixed.to(KIND), xs.to(KIND), input_precision="ieee")
        out += tl.dot(cs, tl.trans(s).to(KIND), input_precision="ieee") * tl.exp(cum)[:, None] + skip * xs
        tl.store(y + row[:, None] * e + (h * P + p)[None, :], out.to(y.dtype.element_ty), mask=good)
        grown = (xs * (dt * tl.exp(total - cum))[:, None]).to(KIND)
        s = s * tl.exp(total) + tl.dot(tl.trans(grown), bs, input_precision="ieee")
    if STATE8:
        group = tl.load(rows + h * P + p)
        s = s / tl.load(s_state + group[:, None] * N + n[None, :])
    to = ((b * H + h) * P + p).to(tl.int64)[:, None] * N + n[None, :]
    put(state, to, s, state, (p < P)[:, None] & (n < N)[None, :], False, STATE8)


@jit
def gate_kernel(
    y, zx, weight, inside, across, out, inv, width, s_z, eps, H: constexpr, P: constexpr, R: constexpr,
    BH: constexpr, BP: constexpr, ROTATE: constexpr, OUT8: constexpr, KIND: constexpr,
):  # fmt: skip
    """One token: y silu(z), norm per SSD group of R heads, times H_H ⊗ H_P, rounded."""
    row, h, p = tl.program_id(0).to(tl.int64), tl.arange(0, BH), tl.arange(0, BP)
    at, good = h[:, None] * P + p[None, :], (h < H)[:, None] & (p < P)[None, :]
    z = tl.load(zx + row * width + at, mask=good, other=0).to(tl.float32) * s_z
    v = tl.load(y + row * (H * P) + at, mask=good, other=0.0).to(tl.float32) * z * tl.sigmoid(z)
    same = (h // R)[:, None] == (h // R)[None, :]
    squares = tl.sum(tl.where(same, tl.sum(v * v, 1)[None, :], 0.0), 1)
    v = v * tl.rsqrt(squares / (R * P) + eps)[:, None] * tl.load(weight + at, mask=good, other=0.0)
    if ROTATE:
        first = tl.load(
            inside + p[:, None] * P + p[None, :], mask=(p < P)[:, None] & (p < P)[None, :], other=0.0
        )
        second = tl.load(
            across + h[None, :] * H + h[:, None], mask=(h < H)[:, None] & (h < H)[None, :], other=0.0
        )
        v = tl.dot(v.to(KIND), first.to(KIND), input_precision="ieee")
        v = tl.dot(second.to(KIND), v.to(KIND), input_precision="ieee")
    put(out, row * (H * P) + at, v * inv, out, good, False, OUT8)


@jit
def tap(zx, ring, weight, bias, scale, c, at, base, first, C, pos, QUANT: constexpr):
    """Channels c behind the convolution of four taps (three from the ring) and SiLU; and the newest input."""
    new = tl.load(zx + at + first + c)
    total = tl.load(bias + c) + new.to(tl.float32) * tl.load(weight + c * 4 + 3) * (
        tl.load(scale + c) if QUANT else 1.0
    )
    for i in tl.static_range(3):
        old = tl.load(ring + base + ((pos + 1 + i) % 4) * C + c).to(tl.float32)
        total += old * tl.load(weight + c * 4 + i) * (tl.load(scale + c) if QUANT else 1.0)
    return total * tl.sigmoid(total), new


@jit
def step_kernel(
    zx, ring, pos_at, weight, bias, s_in, s_mid, dt_bias, A, D, state, s_state, rows, norm_weight, inside,
    u, squares,
    width, s_z, s_dt, QUANT: constexpr, STATE8: constexpr, ROTATE: constexpr, H: constexpr, P: constexpr,
    N: constexpr, G: constexpr, PDL: constexpr,
):  # fmt: skip
    """One token of one head: convolution, state update, output, gate, Hadamard inside the head."""
    b, h, p, n = tl.program_id(0), tl.program_id(1), tl.arange(0, P), tl.arange(0, N)
    to = state + ((b * H + h).to(tl.int64) * P + p[:, None]) * N + n[None, :]
    s = tl.load(to)  # first: most of the bytes, and of the token before this one
    g, e, C, pos = h // (H // G), H * P, H * P + 2 * G * N, tl.load(pos_at).to(tl.int32)
    at, base = b.to(tl.int64) * width, b.to(tl.int64) * 4 * C
    cx, cb, cc = h * P + p, e + g * N + n, e + (G + g) * N + n
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x, new_x = tap(zx, ring, weight, bias, s_in, cx, at, base, e, C, pos, QUANT)
    bs, new_b = tap(zx, ring, weight, bias, s_in, cb, at, base, e, C, pos, QUANT)
    cs, new_c = tap(zx, ring, weight, bias, s_in, cc, at, base, e, C, pos, QUANT)
    slot = ring + base + (pos % 4) * C  # nobody reads this slot now
    tl.store(slot + cx, new_x)
    if h % (H // G) == 0:
        tl.store(slot + cb, new_b)
        tl.store(slot + cc, new_c)
    if QUANT:
        sx, sb, sc = tl.load(s_mid + cx), tl.load(s_mid + cb), tl.load(s_mid + cc)
        x = tl.minimum(tl.maximum(nearest(x / sx), -128.0), 127.0) * sx
        bs = tl.minimum(tl.maximum(nearest(bs / sb), -128.0), 127.0) * sb
        cs = tl.minimum(tl.maximum(nearest(cs / sc), -128.0), 127.0) * sc
    dt = softplus(tl.load(zx + at + width - H + h).to(tl.float32) * s_dt + tl.load(dt_bias + h))
    s = s.to(tl.float32)
    if STATE8:
        step = tl.load(s_state + tl.load(rows + cx)[:, None] * N + n[None, :])
        s = s * step
    s = s * tl.exp(dt * tl.load(A + h)) + (dt * x)[:, None] * bs[None, :]
    y = tl.sum(s * cs[None, :], 1) + tl.load(D + h) * x
    if STATE8:
        s = tl.minimum(tl.maximum(nearest(s / step), -128.0), 127.0)
    tl.store(to, s.to(state.dtype.element_ty))
    z = tl.load(zx + at + cx).to(tl.float32) * s_z
    v = y * z * tl.sigmoid(z)
    tl.store(squares + b * H + h, tl.sum(v * v, 0))
    v = v * tl.load(norm_weight + cx)
    if ROTATE:
        v = tl.sum(v[:, None] * tl.load(inside + p[:, None] * P + p[None, :]).to(tl.float32), 0)
    tl.store(u + b.to(tl.int64) * e + cx, v)


@jit
def mix_kernel(
    u, squares, across, out, inv, eps, H: constexpr, P: constexpr, R: constexpr, BH: constexpr, BP: constexpr,
    ROTATE: constexpr, OUT8: constexpr, KIND: constexpr, PDL: constexpr,
):  # fmt: skip
    """BP channels of all heads of one row: norm per SSD group, Hadamard across heads, rounding."""
    b, h, p = tl.program_id(0).to(tl.int64), tl.arange(0, BH), tl.program_id(1) * BP + tl.arange(0, BP)
    if ROTATE:
        square = (h < H)[:, None] & (h < H)[None, :]
        matrix = tl.load(across + h[None, :] * H + h[:, None], mask=square, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    of = tl.load(squares + b * H + h, mask=h < H, other=0.0)
    same = (h // R)[:, None] == (h // R)[None, :]
    factor = tl.rsqrt(tl.sum(tl.where(same, of[None, :], 0.0), 1) / (R * P) + eps)
    at, good = b * (H * P) + h[:, None] * P + p[None, :], (h < H)[:, None] & (p < P)[None, :]
    v = tl.load(u + at, mask=good, other=0.0) * factor[:, None]
    if ROTATE:
        v = tl.dot(matrix.to(KIND), v.to(KIND), input_precision="ieee")
    put(out, at, v * inv, out, good, False, OUT8)

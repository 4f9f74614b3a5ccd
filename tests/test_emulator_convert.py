"""cvt in the emulator, bit by bit against torch, numpy and exact arithmetic."""

import math

import numpy as np
import pytest
import torch
from emulator_ptx import compute, lanes

INF, NAN = math.inf, math.nan


def samples(limit: float, seed: int) -> torch.Tensor:
    """32 f32 values: specials, ties, values around `limit`, random ones."""
    rng = np.random.default_rng(seed)
    corners = [0.0, -0.0, INF, -INF, NAN, 0.5, 1.5, 2.5, -0.5, -1.5, limit, -limit, limit * 1.1]
    corners += [limit * 0.999, 1e-8, -1e-8]
    rest = rng.standard_normal(32 - len(corners)) * limit * rng.random(32 - len(corners)) ** 4
    return torch.tensor(corners + rest.tolist(), dtype=torch.float32)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.isnan() & b.isnan()) | (a.view(ints) == b.view(ints))).all())


def half_ties(dtype: torch.dtype) -> torch.Tensor:
    """f32 values half way between neighbours of dtype, and just beside them."""
    base = torch.linspace(0.1, 3, 8).to(dtype).float()
    step = torch.finfo(dtype).eps * 2.0 ** base.log2().floor()
    tie = base + step / 2
    up, down = torch.nextafter(tie, torch.tensor(9.0)), torch.nextafter(tie, torch.tensor(-9.0))
    return torch.cat([base, tie, up, -down])


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_f32_to_half_rounds_to_nearest_even(dtype, kind):
    for x in (samples(70000.0, 1), half_ties(dtype), samples(1e-7, 2), samples(6e-5, 3)):
        assert same(compute(f"cvt.rn.{kind}.f32", x, out=dtype), x.to(dtype))
        y = x.flip(0)
        got = compute(f"cvt.rn.{kind}x2.f32", x, y, out=torch.int32).view(dtype).view(32, 2)
        assert same(got[:, 1].contiguous(), x.to(dtype))  # the first operand is the high half
        assert same(got[:, 0].contiguous(), y.to(dtype))


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_half_to_f32_is_exact_for_every_pattern(dtype, kind):
    patterns = torch.arange(0, 65536, dtype=torch.int32).to(torch.int16)
    for block in (patterns[i : i + 32] for i in range(0, 65536, 1999)):
        if block.numel() < 32:
            continue
        x = block.clone().view(dtype)
        assert same(compute(f"cvt.f32.{kind}", x, out=torch.float32), x.float())


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_f32_to_half_towards_zero(dtype, kind):
    x = torch.cat([half_ties(dtype)[:16], samples(60000.0, 4)[:16]])
    got = compute(f"cvt.rz.{kind}.f32", x, out=dtype).float()
    finite = x.isfinite()
    assert (got[finite].abs() <= x[finite].abs()).all()
    away = (got[finite].to(dtype).view(torch.int16) + 1).view(dtype).float().abs()
    assert (away > x[finite].abs()).all()


def test_f32_to_tf32_rounds_ties_away():
    x = torch.cat([samples(1e30, 5)[:16], half_ties(torch.float16)[8:24]])
    got = compute("cvt.rna.tf32.f32", x, out=torch.int32)
    bits = x.view(torch.int32).long()
    want = (bits + 0x1000) & 0xFFFFE000
    finite = x.isfinite()
    assert torch.equal(got[finite].long() & 0xFFFFFFFF, want[finite] & 0xFFFFFFFF)
    assert got.view(torch.float32)[x.isnan()].isnan().all()


@pytest.mark.parametrize("mode, function", [("rni", np.rint), ("rzi", np.trunc)])
@pytest.mark.parametrize("mode2, function2", [("rmi", np.floor), ("rpi", np.ceil)])
@pytest.mark.parametrize("kind, bits", [("s32", 32), ("u32", 32), ("s64", 64), ("u64", 64)])
def test_float_to_integer_rounds_and_clamps(mode, function, mode2, function2, kind, bits):
    signed = kind[0] == "s"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    dtype = torch.int32 if bits == 32 else torch.int64
    for name, round_ in ((mode, function), (mode2, function2)):
        x = samples(float(high) * 1.01, 6)
        x[16:24] = torch.linspace(-3.75, 3.75, 8)
        want = []
        for v in x.double().numpy():
            exact = 0 if np.isnan(v) else (v if np.isinf(v) else int(round_(v)))
            clamped = low if exact <= low else high if exact >= high else int(exact)
            want.append((clamped + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1))
        assert compute(f"cvt.{name}.{kind}.f32", x, out=dtype).tolist() == want


def test_float_to_integral_float():
    x = samples(100.0, 7)
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor)):
        want = torch.from_numpy(function(x.numpy()))
        assert same(compute(f"cvt.{mode}.f32.f32", x, out=torch.float32), want)
    want = x.nan_to_num(0.0).clamp(0, 1) + 0.0
    assert torch.equal(compute("cvt.sat.f32.f32", x, out=torch.float32), want)


def test_integer_to_float_rounds_once():
    rng = np.random.default_rng(8)
    x = torch.from_numpy(rng.integers(-(2**63), 2**63, 32, dtype=np.int64))
    x[0], x[1] = (1 << 62) + (1 << 38) + 1, (1 << 62) + (1 << 38)  # beside a tie, and on it
    got = compute("cvt.rn.f32.s64", x, out=torch.float32)
    assert same(got, torch.from_numpy(x.numpy().astype(np.float32)))
    got = compute("cvt.rn.f32.u64", x, out=torch.float32)
    assert same(got, torch.from_numpy(x.numpy().view(np.uint64).astype(np.float32)))
    narrow = x.to(torch.int32)
    got = compute("cvt.rn.f64.s32", narrow, out=torch.float64)
    assert same(got, narrow.double())
    got = compute("cvt.rn.f32.s32", narrow, out=torch.float32)
    assert same(got, torch.from_numpy(narrow.numpy().astype(np.float32)))


def test_integer_widths_sign_and_saturation():
    rng = np.random.default_rng(9)
    x = torch.from_numpy(rng.integers(-(2**31), 2**31, 32, dtype=np.int64)).to(torch.int32)
    assert torch.equal(compute("cvt.s64.s32", x, out=torch.int64), x.long())
    assert torch.equal(compute("cvt.u64.u32", x, out=torch.int64), x.long() & 0xFFFFFFFF)
    assert torch.equal(compute("cvt.u16.u32", x, out=torch.int16), x.to(torch.int16))
    assert torch.equal(compute("cvt.s32.s8", x, out=torch.int32), x.to(torch.int8).int())
    assert torch.equal(compute("cvt.u32.u8", x, out=torch.int32), x & 0xFF)
    clamped = x.clamp(-128, 127)
    assert torch.equal(compute("cvt.sat.s8.s32", x, out=torch.int16), clamped.to(torch.int16))
    half = x.to(torch.int16)
    assert torch.equal(compute("cvt.s16.s8", half, out=torch.int16), half.to(torch.int8).short())


def test_double_to_float():
    x = samples(3.0e38, 10).double() * 1.37
    x[20] = 1 + 2.0**-24 + 2.0**-50  # just above a tie
    assert same(compute("cvt.rn.f32.f64", x, out=torch.float32), x.float())
    y = samples(5.0, 11)
    assert same(compute("cvt.f64.f32", y, out=torch.float64), y.double())


@pytest.mark.parametrize(
    "kind, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_eight_bit_floats(kind, dtype):
    x = samples(300.0, 12)
    x = torch.where(x.isfinite(), x, 1.0).clamp(-400, 400)
    y = x.flip(0)
    got = compute(f"cvt.rn.satfinite.{kind}x2.f32", x, y, out=torch.int16)
    high = x.to(dtype).view(torch.uint8).int()
    low = y.to(dtype).view(torch.uint8).int()
    assert torch.equal(got.int() & 0xFFFF, high << 8 | low)
    back = compute(f"cvt.rn.f16x2.{kind}x2", got, out=torch.int32).view(torch.float16)
    want = torch.stack([y.to(dtype), x.to(dtype)], 1).half().flatten()
    assert same(back, want)


def test_relu_of_conversions():
    x = samples(10.0, 13)
    got = compute("cvt.rn.relu.f16.f32", x, out=torch.float16)
    keep = x.isnan() | (x > 0)
    assert same(got, torch.where(keep, x, 0.0).half())


def test_moves_pack_and_unpack():
    x = torch.arange(32, dtype=torch.int64) * 0x0123456789ABCD
    body = """
      mov.b64 {%h1, %h2, %h3, %h4}, %d0;
      mov.b32 %r1, {%h2, %h1};
      mov.b32 %r2, {%h4, %h3};
      mov.b64 %d20, {%r2, %r1};"""
    got = lanes(body, x, out=torch.int64).view(torch.int16).view(32, 4)
    assert torch.equal(got, x.view(torch.int16).view(32, 4).flip(1))

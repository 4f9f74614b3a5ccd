"""Float instructions of the emulator: exactly rounded ones bit by bit, approximate ones to a
tolerance."""

import math
import struct
from fractions import Fraction

import pytest
import torch
from emulator_ptx import compute, lanes

INF, NAN = math.inf, math.nan


def floats(seed: int, dtype=torch.float32) -> torch.Tensor:
    """32 values over the whole range, with zeros, infinities, NaN and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-30, 30, (32,), generator=generator).double()
    values = torch.randn(32, generator=generator, dtype=torch.float64) * 2**exponent
    corners = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-40, -3e-39, 1.0, -1.0, 3.4e38])
    values[torch.randperm(32, generator=generator)[:10]] = corners.double()
    return values.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, any NaN equal to any other."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    both_nan = a.isnan() & b.isnan()
    return bool((both_nan | (a.view(ints) == b.view(ints))).all())


def flushed(x: torch.Tensor) -> torch.Tensor:
    tiny = x.abs() < torch.finfo(torch.float32).tiny
    return torch.where(tiny, torch.copysign(torch.zeros_like(x), x), x)


def round_to(value: Fraction, direction: str) -> float:
    """An exact value to f32: nearest even, or towards zero, up, down."""
    try:
        nearest = struct.unpack("<f", struct.pack("<f", float(value)))[0]
    except OverflowError:
        nearest = math.copysign(INF, value)
    around = sorted(
        {
            float(torch.nextafter(torch.tensor(nearest), torch.tensor(-INF))),
            nearest,
            float(torch.nextafter(torch.tensor(nearest), torch.tensor(INF))),
        }
    )
    below = max(v for v in around if v == -INF or (v != INF and Fraction(v) <= value))
    above = min(v for v in around if v == INF or (v != -INF and Fraction(v) >= value))
    if direction == "rm" or (direction == "rz" and value > 0):
        return below
    if direction in ("rp", "rz"):
        return above
    if below == above:
        return below
    gap_below, gap_above = value - Fraction(below), Fraction(above) - value
    if gap_below != gap_above:
        return below if gap_below < gap_above else above
    even = struct.unpack("<I", struct.pack("<f", below))[0] % 2 == 0
    return below if even else above


@pytest.mark.parametrize("dtype, kind", [(torch.float32, "f32"), (torch.float64, "f64")])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div.rn"])
def test_arithmetic_is_ieee(op, dtype, kind):
    a, b = floats(1, dtype), floats(2, dtype)
    name = op.removesuffix(".rn")
    want = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b}[name]
    assert same(compute(f"{op}.{kind}", a, b, out=dtype), want)


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_flushing_to_zero(op):
    a, b = floats(3) * 1e-30, floats(4) * 1e-9
    fa, fb = flushed(a), flushed(b)
    want = flushed({"add": fa + fb, "sub": fa - fb, "mul": fa * fb}[op])
    assert same(compute(f"{op}.ftz.f32", a, b, out=torch.float32), want)


def finite(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(-12, 12, (32,), generator=generator)
    return torch.randn(32, generator=generator) * scale


@pytest.mark.parametrize("direction", ["rn", "rz", "rm", "rp"])
def test_fma_and_sums_round_the_exact_value_once(direction):
    a, b = finite(5), finite(6)
    c = finite(7) * 2.0 ** torch.randint(-30, 30, (32,), generator=torch.Generator().manual_seed(8))
    c[:8] = -(a[:8].double() * b[:8].double()).float()  # cancels all but the rounding error
    rows = [tuple(map(Fraction, map(float, row))) for row in zip(a, b, c, strict=True)]
    got = compute(f"fma.{direction}.f32", a, b, c, out=torch.float32)
    assert same(got, torch.tensor([round_to(x * y + z, direction) for x, y, z in rows]))
    got = compute(f"add.{direction}.f32", a, c, out=torch.float32)
    assert same(got, torch.tensor([round_to(x + z, direction) for x, y, z in rows]))
    got = compute(f"mul.{direction}.f32", a, b, out=torch.float32)
    assert same(got, torch.tensor([round_to(x * y, direction) for x, y, z in rows]))


def test_saturation():
    a, b = floats(9), floats(10)
    want = (a + b).nan_to_num(0.0).clamp(0, 1) + 0.0
    assert torch.equal(compute("add.sat.f32", a, b, out=torch.float32), want)


@pytest.mark.parametrize("op", ["min", "max"])
def test_minimum_and_maximum_rules(op):
    a = torch.tensor([0.0, -0.0, NAN, 1.0, NAN, -INF, 5.0, 1e-40] * 4)
    b = torch.tensor([-0.0, 0.0, 2.0, NAN, NAN, INF, 5.0, -1e-40] * 4)
    least = [-0.0, -0.0, 2.0, 1.0, NAN, -INF, 5.0, -1e-40]
    most = [0.0, 0.0, 2.0, 1.0, NAN, INF, 5.0, 1e-40]
    want = torch.tensor((least if op == "min" else most) * 4)
    assert same(compute(f"{op}.f32", a, b, out=torch.float32), want)
    strict = torch.where(a.isnan() | b.isnan(), NAN, want)
    assert same(compute(f"{op}.NaN.f32", a, b, out=torch.float32), strict)
    three = compute(f"{op}.f32", a, b, torch.full((32,), 3.0), out=torch.float32)
    bound = torch.full((32,), 3.0)
    fold = torch.fmin if op == "min" else torch.fmax
    assert same(three, fold(want, bound))


def test_sign_operations():
    a, b = floats(11), floats(12)
    assert same(compute("abs.f32", a, out=torch.float32), a.abs())
    assert same(compute("neg.f32", a, out=torch.float32), -a)
    assert same(compute("abs.ftz.f32", a, out=torch.float32), flushed(a).abs())
    assert same(compute("copysign.f32", a, b, out=torch.float32), torch.copysign(b, a))


@pytest.mark.parametrize(
    "op, function, low, high",
    [
        ("ex2.approx.ftz.f32", torch.exp2, -20, 20),
        ("lg2.approx.f32", torch.log2, 0.01, 100),
        ("rcp.approx.ftz.f32", torch.reciprocal, 0.01, 100),
        ("rcp.rn.f32", torch.reciprocal, -100, -0.01),
        ("sqrt.rn.f32", torch.sqrt, 0, 100),
        ("sqrt.approx.f32", torch.sqrt, 0, 100),
        ("rsqrt.approx.f32", torch.rsqrt, 0.01, 100),
        ("sin.approx.f32", torch.sin, -3, 3),
        ("cos.approx.f32", torch.cos, -3, 3),
        ("tanh.approx.f32", torch.tanh, -4, 4),
    ],
)
def test_special_functions(op, function, low, high):
    x = torch.linspace(low, high, 32)
    want = function(x.double())
    got = compute(op, x, out=torch.float32).double()
    assert torch.allclose(got, want, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("op", ["div.full.f32", "div.approx.f32", "div.full.ftz.f32"])
def test_approximate_division(op):
    a, b = finite(13), finite(14)
    got = compute(op, a, b, out=torch.float32)
    assert torch.allclose(got, a / b, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "min", "max"])
def test_half_arithmetic(op, dtype, kind):
    a, b = floats(15).to(dtype), floats(16).to(dtype)
    wide_a, wide_b = a.double(), b.double()
    want = {
        "add": wide_a + wide_b,
        "sub": wide_a - wide_b,
        "mul": wide_a * wide_b,
        "min": torch.fmin(wide_a, wide_b),
        "max": torch.fmax(wide_a, wide_b),
    }[op]
    zeros = (wide_a == 0) & (wide_b == 0)
    got = compute(f"{op}.{kind}", a, b, out=dtype)
    assert same(got[~zeros], want.to(dtype)[~zeros])


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_half_fma_rounds_once(dtype, kind):
    a, b, c = (finite(seed).to(dtype) for seed in (17, 18, 19))
    # A product half way between two results, and an addend that alone decides.
    one = torch.finfo(dtype).eps
    a[0], b[0], c[0] = 1 + one, 1 + one / 2, 1e-5
    got = compute(f"fma.rn.{kind}", a, b, c, out=dtype)
    exact = a.double() * b.double() + c.double()
    assert same(got, exact.to(dtype))
    pair = torch.stack([a, b], 1).contiguous().view(torch.int32).flatten()
    scale = torch.stack([b, c], 1).contiguous().view(torch.int32).flatten()
    got = compute(f"mul.{kind}x2", pair, scale, out=torch.int32).view(dtype).view(32, 2)
    want = torch.stack([a.double() * b.double(), b.double() * c.double()], 1)
    assert same(got.contiguous(), want.to(dtype))


@pytest.mark.parametrize("dtype, kind", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_mixed_precision_sums(dtype, kind):
    a, c = finite(20).to(dtype), finite(21)
    got = compute(f"add.rn.f32.{kind}", a, c, out=torch.float32)
    assert same(got, a.float() + c)
    got = compute(f"sub.rn.f32.{kind}", a, c, out=torch.float32)
    assert same(got, a.float() - c)


def test_pairs_of_floats():
    a, b = finite(22), finite(23)
    pair_a = torch.stack([a, b], 1).contiguous().view(torch.int64).flatten()
    pair_b = torch.stack([b, a + 1], 1).contiguous().view(torch.int64).flatten()
    got = compute("fma.rn.f32x2", pair_a, pair_b, pair_a, out=torch.int64)
    got = got.view(torch.float32).view(32, 2)
    want = torch.stack([a.double() * b + a, b.double() * (a + 1) + b], 1).float()
    assert torch.allclose(got, want, rtol=1e-6)
    got = compute("add.rn.f32x2", pair_a, pair_b, out=torch.int64).view(torch.float32).view(32, 2)
    assert same(got, torch.stack([a + b, b + (a + 1)], 1))


@pytest.mark.parametrize("cmp", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_float_comparisons_with_nan(cmp):
    a, b = floats(24), floats(24)
    b[10:20] = floats(25)[10:20]
    b[0] = NAN
    op = getattr(torch, cmp)
    nan = a.isnan() | b.isnan()
    ordered = op(a, b) & ~nan
    for suffix, want in (("", ordered), ("u", ordered | nan)):
        body = f"setp.{cmp}{suffix}.f32 %p1, %r0, %r1; selp.b32 %r20, 1, 0, %p1;"
        assert lanes(body, a, b, out=torch.int32).bool().tolist() == want.tolist()
    body = "setp.nan.f32 %p1, %r0, %r1; selp.b32 %r20, 1, 0, %p1;"
    assert lanes(body, a, b, out=torch.int32).bool().tolist() == nan.tolist()


def test_set_gives_masks_and_ones():
    a, b = finite(26).half(), finite(27).half()
    a[3] = b[3]
    pair_a = torch.stack([a, b], 1).contiguous().view(torch.int32).flatten()
    pair_b = torch.stack([b, b], 1).contiguous().view(torch.int32).flatten()
    got = compute("set.gt.u32.f16x2", pair_a, pair_b, out=torch.int32).view(torch.int16)
    want = torch.stack([torch.where(a > b, -1, 0), torch.zeros(32)], 1).to(torch.int16)
    assert torch.equal(got, want.flatten())
    got = compute("set.eq.f16x2.f16x2", pair_a, pair_b, out=torch.int32).view(torch.float16)
    want = torch.stack([(a == b).half(), torch.ones(32).half()], 1)
    assert torch.equal(got, want.flatten())
    got = compute("set.gt.f32.f32", a.float(), b.float(), out=torch.float32)
    assert torch.equal(got, (a > b).float())

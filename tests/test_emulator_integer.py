"""Integer, bit and predicate instructions of the emulator, against Python's own integers."""

import random

import pytest
import torch
from emulator_ptx import compute, lanes

DTYPES = {
    "u16": (torch.int16, 16, False),
    "s16": (torch.int16, 16, True),
    "u32": (torch.int32, 32, False),
    "s32": (torch.int32, 32, True),
    "u64": (torch.int64, 64, False),
    "s64": (torch.int64, 64, True),
}


def wrap(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def values(bits: int, signed: bool, seed: int) -> list[int]:
    """32 values: the corners, then random ones of random lengths."""
    rng = random.Random(seed)
    top = 1 << bits
    corners = [0, 1, 2, 3, top - 1, top - 2, top // 2, top // 2 - 1, top // 2 + 1, 7, 31, 33]
    rng.shuffle(corners)
    rest = [rng.getrandbits(rng.randint(1, bits)) for _ in range(32 - len(corners))]
    return [wrap(v, bits, signed) for v in corners + rest]


def tensor(raw: list[int], dtype: torch.dtype, bits: int) -> torch.Tensor:
    return torch.tensor([wrap(v, bits, True) for v in raw], dtype=dtype)


def divided(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def expected_binary(op: str, a: int, b: int, bits: int) -> int:
    if op == "div":
        return divided(a, b) if b else -1
    if op == "rem":
        return a - b * divided(a, b) if b else a
    table = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul.lo": lambda: a * b,
        "mul.hi": lambda: (a * b) >> bits,
        "min": lambda: min(a, b),
        "max": lambda: max(a, b),
    }
    return table[op]()


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("op", ["add", "sub", "mul.lo", "mul.hi", "min", "max", "div", "rem"])
def test_binary_integer_operations(op, kind):
    dtype, bits, signed = DTYPES[kind]
    a, b = values(bits, signed, 1), values(bits, signed, 2)
    got = compute(f"{op}.{kind}", tensor(a, dtype, bits), tensor(b, dtype, bits), out=dtype)
    want = [expected_binary(op, x, y, bits) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == [wrap(v, bits, True) for v in want]


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_multiplication(kind):
    dtype, bits, signed = DTYPES[kind]
    wide = torch.int32 if bits == 16 else torch.int64
    a, b, c = values(bits, signed, 3), values(bits, signed, 4), values(2 * bits, signed, 5)
    ta, tb = tensor(a, dtype, bits), tensor(b, dtype, bits)
    tc = tensor(c, wide, 2 * bits)
    got = compute(f"mul.wide.{kind}", ta, tb, out=wide)
    assert got.tolist() == [wrap(x * y, 2 * bits, True) for x, y in zip(a, b, strict=True)]
    got = compute(f"mad.wide.{kind}", ta, tb, tc, out=wide)
    want = [wrap(x * y + z, 2 * bits, True) for x, y, z in zip(a, b, c, strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_multiply_add_and_sum_of_differences(kind):
    dtype, bits, signed = DTYPES[kind]
    a, b, c = (values(bits, signed, seed) for seed in (6, 7, 8))
    t = [tensor(v, dtype, bits) for v in (a, b, c)]
    triples = list(zip(a, b, c, strict=True))
    got = compute(f"mad.lo.{kind}", *t, out=dtype)
    assert got.tolist() == [wrap(x * y + z, bits, True) for x, y, z in triples]
    got = compute(f"mad.hi.{kind}", *t, out=dtype)
    assert got.tolist() == [wrap((x * y >> bits) + z, bits, True) for x, y, z in triples]
    got = compute(f"sad.{kind}", *t, out=dtype)
    assert got.tolist() == [wrap(z + abs(x - y), bits, True) for x, y, z in triples]


def test_saturating_addition():
    a, b = values(32, True, 1), values(32, True, 9)
    ta, tb = tensor(a, torch.int32, 32), tensor(b, torch.int32, 32)
    low, high = -(1 << 31), (1 << 31) - 1
    got = compute("add.sat.s32", ta, tb, out=torch.int32).tolist()
    assert got == [min(max(x + y, low), high) for x, y in zip(a, b, strict=True)]
    got = compute("sub.sat.s32", ta, tb, out=torch.int32).tolist()
    assert got == [min(max(x - y, low), high) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("op", ["add", "sub"])
def test_carry_chain_makes_a_wide_sum(op):
    a, b = values(64, False, 11), values(64, False, 12)
    ta, tb = tensor(a, torch.int64, 64), tensor(b, torch.int64, 64)
    body = f"""
      mov.b64 {{%r0, %r1}}, %d0;
      mov.b64 {{%r2, %r3}}, %d1;
      {op}.cc.u32 %r4, %r0, %r2;
      {op}c.u32 %r5, %r1, %r3;
      mov.b64 %d20, {{%r4, %r5}};"""
    sign = 1 if op == "add" else -1
    want = [wrap(x + sign * y, 64, True) for x, y in zip(a, b, strict=True)]
    assert lanes(body, ta, tb, out=torch.int64).tolist() == want


def test_carry_chain_makes_a_wide_product():
    a, b = values(64, False, 13), values(64, False, 14)
    ta, tb = tensor(a, torch.int64, 64), tensor(b, torch.int64, 64)
    body = """
      mov.b64 {%r0, %r1}, %d0;
      mov.b64 {%r2, %r3}, %d1;
      mul.lo.u32 %r4, %r0, %r2;
      mul.hi.u32 %r5, %r0, %r2;
      mad.lo.cc.u32 %r5, %r0, %r3, %r5;
      madc.hi.u32 %r6, %r0, %r3, 0;
      mad.lo.cc.u32 %r5, %r1, %r2, %r5;
      madc.hi.u32 %r6, %r1, %r2, %r6;
      mad.lo.u32 %r6, %r1, %r3, %r6;
      mov.b64 %d20, {%r4, %r5};"""
    want = [wrap(x * y, 64, True) for x, y in zip(a, b, strict=True)]
    assert lanes(body, ta, tb, out=torch.int64).tolist() == want


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("op", ["and", "or", "xor", "shl", "shr.u", "shr.s"])
def test_bitwise_and_shifts(op, bits):
    dtype = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    a, b = values(bits, False, 15), values(bits, False, 16)
    shift = [v % (bits + 40) for v in values(32, False, 17)]
    ta = tensor(a, dtype, bits)
    if op.startswith("sh"):
        suffix = f"{op[4:] or 'b'}{bits}"
        got = compute(f"{op[:3]}.{suffix}", ta, tensor(shift, torch.int32, 32), out=dtype)
        pairs = zip(a, shift, strict=True)
        if op == "shl":
            want = [x << n if n < bits else 0 for x, n in pairs]
        elif op == "shr.u":
            want = [x >> n for x, n in pairs]
        else:
            want = [wrap(x, bits, True) >> n for x, n in pairs]
    else:
        got = compute(f"{op}.b{bits}", ta, tensor(b, dtype, bits), out=dtype)
        table = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}
        want = [table[op](x, y) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == [wrap(v, bits, True) for v in want]


def bit_field(value: int, pos: int, length: int, bits: int, signed: bool) -> int:
    """bfe bit by bit, as the manual's pseudocode: past the top come copies of the sign."""
    if length == 0:
        return 0
    sign = value >> min(pos + length - 1, bits - 1) & 1 if signed else 0
    out = 0
    for i in range(bits):
        bit = value >> (pos + i) & 1 if i < length and pos + i < bits else sign
        out |= bit << i
    return out


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_bit_field_extract_and_insert(bits, signed):
    dtype = torch.int32 if bits == 32 else torch.int64
    rng = random.Random(18)
    a, b = values(bits, False, 19), values(bits, False, 20)
    pos = [rng.randint(0, bits + 10) for _ in range(32)]
    length = [rng.randint(0, bits + 10) for _ in range(32)]
    pos[0], length[0], length[1] = 0, bits, 0
    tp, tl = tensor(pos, torch.int32, 32), tensor(length, torch.int32, 32)
    ta, tb = tensor(a, dtype, bits), tensor(b, dtype, bits)
    got = compute(f"bfe.{'s' if signed else 'u'}{bits}", ta, tp, tl, out=dtype)
    rows = list(zip(a, b, pos, length, strict=True))
    want = [bit_field(x, p, n, bits, signed) for x, _, p, n in rows]
    assert got.tolist() == [wrap(v, bits, True) for v in want]
    want = []
    for x, y, p, n in rows:
        for i in range(n):
            if p + i < bits:
                y = y & ~(1 << (p + i)) | (x >> i & 1) << (p + i)
        want.append(wrap(y, bits, True))
    assert compute(f"bfi.b{bits}", ta, tb, tp, tl, out=dtype).tolist() == want


def test_funnel_shift_counts_and_reversal():
    a, b = values(32, False, 21), values(32, False, 22)
    n = values(32, False, 23)
    ta, tb, tn = (tensor(v, torch.int32, 32) for v in (a, b, n))
    rows = list(zip(a, b, n, strict=True))
    got = compute("shf.l.wrap.b32", ta, tb, tn, out=torch.int32).tolist()
    assert got == [wrap((y << 32 | x) << (s % 32) >> 32, 32, True) for x, y, s in rows]
    got = compute("shf.r.clamp.b32", ta, tb, tn, out=torch.int32).tolist()
    assert got == [wrap((y << 32 | x) >> min(s, 32), 32, True) for x, y, s in rows]
    assert compute("popc.b32", ta, out=torch.int32).tolist() == [x.bit_count() for x in a]
    assert compute("clz.b32", ta, out=torch.int32).tolist() == [32 - x.bit_length() for x in a]
    got = compute("brev.b32", ta, out=torch.int32).tolist()
    assert got == [wrap(int(f"{x:032b}"[::-1], 2), 32, True) for x in a]
    got = compute("bfind.u32", ta, out=torch.int32).tolist()
    assert got == [x.bit_length() - 1 for x in a]
    got = compute("bfind.shiftamt.u32", ta, out=torch.int32).tolist()
    assert got == [32 - x.bit_length() if x else -1 for x in a]


def test_permute_and_lookup():
    a, b = values(32, False, 24), values(32, False, 25)
    rng = random.Random(26)
    select = [rng.getrandbits(16) for _ in range(32)]
    ta, tb, ts = (tensor(v, torch.int32, 32) for v in (a, b, select))
    want = []
    for x, y, s in zip(a, b, select, strict=True):
        pool = (y << 32 | x).to_bytes(8, "little")
        picked = []
        for i in range(4):
            nibble = s >> 4 * i & 15
            byte = pool[nibble & 7]
            picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        want.append(int.from_bytes(bytes(picked), "little", signed=True))
    assert compute("prmt.b32", ta, tb, ts, out=torch.int32).tolist() == want
    majority = lanes("lop3.b32 %r20, %r0, %r1, %r2, 0xE8;", ta, tb, ts, out=torch.int32)
    want = [wrap(x & y | x & s | y & s, 32, True) for x, y, s in zip(a, b, select, strict=True)]
    assert majority.tolist() == want


@pytest.mark.parametrize("a_type", ["s32", "u32"])
@pytest.mark.parametrize("b_type", ["s32", "u32"])
def test_dot_product_of_bytes(a_type, b_type):
    a, b, c = (values(32, False, seed) for seed in (27, 28, 29))
    t = [tensor(v, torch.int32, 32) for v in (a, b, c)]

    def parts(v, kind):
        return [wrap(v >> 8 * i, 8, kind == "s32") for i in range(4)]

    want = [
        wrap(z + sum(i * j for i, j in zip(parts(x, a_type), parts(y, b_type), strict=True)), 32, 1)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert compute(f"dp4a.{a_type}.{b_type}", *t, out=torch.int32).tolist() == want


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("cmp", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_integer_comparisons_select_and_combine(cmp, kind):
    dtype, bits, signed = DTYPES[kind]
    a, b = values(bits, signed, 30), values(bits, signed, 31)
    a[5] = b[5]
    ta, tb = tensor(a, dtype, bits), tensor(b, dtype, bits)
    r = {16: "h", 32: "r", 64: "d"}[bits]
    table = {"eq": int.__eq__, "ne": int.__ne__, "lt": int.__lt__, "le": int.__le__}
    table |= {"gt": int.__gt__, "ge": int.__ge__}
    holds = [table[cmp](x, y) for x, y in zip(a, b, strict=True)]
    body = f"""
      setp.lt.u32 %p3, %r40, 16;
      setp.{cmp}.{kind} %p1|%p2, %{r}0, %{r}1;
      setp.{cmp}.and.{kind} %p4, %{r}0, %{r}1, !%p3;
      selp.b32 %r20, 1, 0, %p1;
      @%p2 or.b32 %r20, %r20, 2;
      @!%p4 or.b32 %r20, %r20, 4;"""
    want = [(1 if h else 2) | (0 if h and i >= 16 else 4) for i, h in enumerate(holds)]
    assert lanes(body, ta, tb, out=torch.int32).tolist() == want

"""mma, ldmatrix and stmatrix: fragments laid out as in the figures of the PTX manual, by formulas
written here for one element at a time."""

import pytest
import torch
from emulator_ptx import kernel, launch


def place_a(lane: int, i: int, per: int, k: int) -> tuple[int, int]:
    """(row, column) of element i of A in a lane, `per` elements a register."""
    group, t = lane >> 2, lane & 3
    register, e = divmod(i, per)
    return group + 8 * (register % 2), t * per + e + 4 * per * (register // 2)


def place_b(lane: int, i: int, per: int) -> tuple[int, int]:
    group, t = lane >> 2, lane & 3
    register, e = divmod(i, per)
    return t * per + e + 4 * per * register, group


def place_c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + 8 * (i // 2), (lane & 3) * 2 + i % 2


def fragments(matrix: torch.Tensor, count: int, place) -> torch.Tensor:
    """[32, bytes as int32] of a matrix whose elements lie by place(lane, i)."""
    rows = []
    for lane in range(32):
        rows.append(torch.stack([matrix[place(lane, i)] for i in range(count)]))
    return torch.stack(rows).contiguous().view(torch.uint8).view(32, -1).view(torch.int32)


CASES = {
    # opcode suffix: (A dtype, B dtype, elements in a register, K, C dtype)
    "m16n8k16.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 2, 16, torch.float32),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 2, 8, torch.float32),
    "m16n8k16.row.col.f32.f16.f16.f32": (torch.float16, 2, 16, torch.float32),
    "m16n8k8.row.col.f32.f16.f16.f32": (torch.float16, 2, 8, torch.float32),
    "m16n8k16.row.col.f16.f16.f16.f16": (torch.float16, 2, 16, torch.float16),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (torch.float32, 1, 8, torch.float32),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (torch.float32, 1, 4, torch.float32),
    "m16n8k32.row.col.s32.s8.s8.s32": (torch.int8, 4, 32, torch.int32),
    "m16n8k16.row.col.s32.s8.s8.s32": (torch.int8, 4, 16, torch.int32),
    "m16n8k32.row.col.satfinite.s32.s8.s8.s32": (torch.int8, 4, 32, torch.int32),
    "m16n8k32.row.col.s32.u8.s8.s32": (torch.uint8, 4, 32, torch.int32),
}


def vector(first: int, n: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(n)) + "}"


def run_mma(opcode: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, out_count: int):
    """Loads fragments of [32, n] int32 each, multiplies, returns D's fragments."""
    sizes = [t.shape[1] for t in (a, b, c)]
    lines, first = [], 1
    starts = []
    for i, n in enumerate(sizes):
        starts.append(first)
        lines.append(f"mad.wide.u32 %d1, %r40, {4 * n}, %d{40 + i};")
        lines += [f"ld.global.b32 %r{first + j}, [%d1+{4 * j}];" for j in range(n)]
        first += n
    operands = ", ".join(vector(s, n) for s, n in zip(starts, sizes, strict=True))
    lines.append(f"mma.sync.aligned.{opcode} {vector(20, out_count)}, {operands};")
    lines.append(f"mad.wide.u32 %d1, %r40, {4 * out_count}, %d43;")
    lines += [f"st.global.b32 [%d1+{4 * j}], %r{20 + j};" for j in range(out_count)]
    out = torch.zeros(32, out_count, dtype=torch.int32)
    launch(kernel("\n".join(lines), 4), a.contiguous(), b.contiguous(), c.contiguous(), out)
    return out


@pytest.mark.parametrize("opcode", CASES)
def test_mma_of_small_integers_is_exact(opcode):
    dtype, per, k, c_dtype = CASES[opcode]
    generator = torch.Generator().manual_seed(k + per)
    b_dtype = torch.int8 if dtype == torch.uint8 else dtype
    low = 0 if dtype == torch.uint8 else -4
    a = torch.randint(low, 5, (16, k), generator=generator).to(dtype)
    b = torch.randint(-4, 5, (k, 8), generator=generator).to(b_dtype)
    c = torch.randint(-9, 9, (16, 8), generator=generator).to(c_dtype)
    fa = fragments(a, 16 * k // 32, lambda lane, i: place_a(lane, i, per, k))
    fb = fragments(b, k * 8 // 32, lambda lane, i: place_b(lane, i, per))
    fc = fragments(c, 4, place_c)
    got = run_mma(opcode, fa, fb, fc, fc.shape[1])
    want = (a.double() @ b.double() + c.double()).to(c_dtype)
    assert torch.equal(got, fragments(want, 4, place_c))


def test_mma_accumulates_in_float():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(16, 16, generator=generator).bfloat16()
    b = torch.randn(16, 8, generator=generator).bfloat16()
    c = torch.randn(16, 8, generator=generator)
    fa = fragments(a, 8, lambda lane, i: place_a(lane, i, 2, 16))
    fb = fragments(b, 4, lambda lane, i: place_b(lane, i, 2))
    opcode = "m16n8k16.row.col.f32.bf16.bf16.f32"
    got = run_mma(opcode, fa, fb, fragments(c, 4, place_c), 4).view(torch.float32)
    want = fragments((a.double() @ b.double() + c).float(), 4, place_c).view(torch.float32)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_mma_saturates_integers():
    a = torch.full((16, 32), 127, dtype=torch.int8)
    b = torch.full((32, 8), 127, dtype=torch.int8)
    c = torch.full((16, 8), 2**31 - 1000, dtype=torch.int32)
    fa = fragments(a, 16, lambda lane, i: place_a(lane, i, 4, 32))
    fb = fragments(b, 8, lambda lane, i: place_b(lane, i, 4))
    fc = fragments(c, 4, place_c)
    got = run_mma("m16n8k32.row.col.satfinite.s32.s8.s8.s32", fa, fb, fc, 4)
    assert got.unique().tolist() == [2**31 - 1]
    got = run_mma("m16n8k32.row.col.s32.s8.s8.s32", fa, fb, fc, 4)
    assert got.unique().tolist() == [2**31 - 1000 + 127 * 127 * 32 - 2**32]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix_and_stmatrix(count, transpose):
    data = torch.arange(count * 64, dtype=torch.int16)
    trans = ".trans" if transpose else ""
    registers = vector(1, count)
    body = f"""
      .shared .align 16 .b8 from[512];
      .shared .align 16 .b8 to[512];
      mov.u32 %r10, from;
      mov.u32 %r11, to;
      mov.u32 %r12, 0;
    COPY:
      mad.lo.s32 %r13, %r12, 32, %r40;
      setp.ge.u32 %p1, %r13, {count * 32};
      @%p1 bra READY;
      mad.wide.u32 %d1, %r13, 4, %d40;
      ld.global.b32 %r14, [%d1];
      mad.lo.s32 %r15, %r13, 4, %r10;
      st.shared.b32 [%r15], %r14;
      add.s32 %r12, %r12, 1;
      bra COPY;
    READY:
      bar.sync 0;
      and.b32 %r16, %r40, {count * 8 - 1};
      mad.lo.s32 %r17, %r16, 16, %r10;
      mad.lo.s32 %r18, %r16, 16, %r11;
      ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r17];
      stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r18], {registers};
      mad.wide.u32 %d2, %r40, {4 * count}, %d41;
"""
    body += "\n".join(f"st.global.b32 [%d2+{4 * j}], %r{1 + j};" for j in range(count))
    body += f"""
      bar.sync 0;
      setp.lt.u32 %p2, %r40, {count * 8};
      @!%p2 bra END;
      ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r18];
      mad.wide.u32 %d3, %r40, 16, %d42;
      st.global.v4.b32 [%d3], {{%r20, %r21, %r22, %r23}};
    END:"""
    held = torch.zeros(32, count, dtype=torch.int32)
    stored = torch.zeros(count * 64, dtype=torch.int16)
    launch(kernel(body, 3), data, held, stored)
    matrices = data.view(count, 8, 8)
    if transpose:
        matrices = matrices.transpose(1, 2)
    pairs = held.view(torch.int16).view(32, count, 2)
    for lane in range(32):
        for m in range(count):
            row, column = lane // 4, 2 * (lane % 4)
            assert pairs[lane, m].tolist() == matrices[m, row, column : column + 2].tolist()
    assert torch.equal(stored.view(count, 8, 8), matrices)

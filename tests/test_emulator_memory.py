"""Loads, stores, atomics, cp.async and address windows of the emulator."""

import functools

import pytest
import torch
from emulator_ptx import kernel, lanes, launch


@pytest.mark.parametrize("width, kind", [(1, "b8"), (2, "b8"), (4, "b16"), (2, "b64"), (4, "b32")])
def test_vectors_through_shared_memory(width, kind):
    size = int(kind[1:]) // 8
    data = torch.arange(32 * width * size, dtype=torch.int32).to(torch.uint8)
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[size]
    registers = ", ".join(f"%{letter}{1 + i}" for i in range(width))
    registers = f"{{{registers}}}" if width > 1 else registers
    vec = f".v{width}" if width > 1 else ""
    body = f"""
      .shared .align 16 .b8 buffer[2048];
      mov.u32 %r20, buffer;
      mad.lo.s32 %r21, %r40, {width * size}, %r20;
      mad.wide.u32 %d20, %r40, {width * size}, %d40;
      mad.wide.u32 %d21, %r40, {width * size}, %d41;
      ld.global{vec}.{kind} {registers}, [%d20];
      st.shared{vec}.{kind} [%r21+512], {registers};
      ld.shared{vec}.{kind} {registers}, [%r21+512];
      st.global{vec}.{kind} [%d21], {registers};"""
    out = torch.zeros_like(data)
    launch(kernel(body, 2), data, out)
    assert torch.equal(out, data)


def test_narrow_loads_extend_by_their_type():
    data = torch.arange(-16, 16, dtype=torch.int8)
    body = """
      cvt.u64.u32 %d1, %r40;
      add.s64 %d2, %d40, %d1;
      ld.global.s8 %r1, [%d2];
      ld.global.u8 %r2, [%d2];
      ld.global.s8 %d3, [%d2];
      mad.wide.u32 %d4, %r40, 8, %d41;
      add.s32 %r3, %r1, %r2;
      st.global.u32 [%d4], %r3;
      cvt.u32.u64 %r4, %d3;
      st.global.u32 [%d4+4], %r4;"""
    out = torch.zeros(32, 2, dtype=torch.int32)
    launch(kernel(body, 2), data, out)
    assert torch.equal(out[:, 0], data.int() + data.view(torch.uint8).int())
    assert torch.equal(out[:, 1], data.int())


def test_generic_addresses_find_their_window():
    body = """
      .shared .align 4 .b32 shared_word[32];
      .local .align 4 .b8 local_bytes[16];
      mov.u64 %d1, shared_word;
      cvta.shared.u64 %d2, %d1;
      mad.wide.u32 %d3, %r40, 4, %d2;
      mul.lo.s32 %r1, %r40, 3;
      st.u32 [%d3], %r1;
      bar.warp.sync 0xffffffff;
      ld.shared.u32 %r2, [shared_word+4];
      ld.u32 %r3, [%d3];
      mov.u64 %d4, local_bytes;
      cvta.local.u64 %d5, %d4;
      st.u32 [%d5+4], %r40;
      cvta.to.local.u64 %d6, %d5;
      ld.local.u32 %r4, [%d6+4];
      isspacep.shared %p1, %d3;
      isspacep.global %p2, %d40;
      selp.b32 %r5, 1000, 0, %p1;
      @%p2 add.s32 %r5, %r5, 1000;
      add.s32 %r6, %r2, %r3;
      add.s32 %r6, %r6, %r4;
      add.s32 %r6, %r6, %r5;
      mad.wide.u32 %d7, %r40, 4, %d40;
      cvta.to.global.u64 %d8, %d7;
      st.u32 [%d8], %r6;"""
    out = torch.zeros(32, dtype=torch.int32)
    launch(kernel(body, 1), out)
    assert out.tolist() == [3 + 3 * i + i + 2000 for i in range(32)]


def test_module_variables_keep_their_values():
    module = """
    .const .align 4 .b32 table[4] = {10, 20, 30, 40};
    .global .align 4 .f32 scale = 0f40000000;
    """
    body = """
      and.b32 %r1, %r40, 3;
      mov.u64 %d1, table;
      mad.wide.u32 %d2, %r1, 4, %d1;
      ld.const.u32 %r2, [%d2];
      ld.global.f32 %r3, [scale];
      cvt.rn.f32.s32 %r4, %r2;
      mul.f32 %r5, %r4, %r3;
      mad.wide.u32 %d3, %r40, 4, %d40;
      st.global.f32 [%d3], %r5;"""
    out = torch.zeros(32)
    launch(kernel(body, 1, module=module), out)
    assert out.tolist() == [20.0, 40.0, 60.0, 80.0] * 8


ATOMICS = {
    "add.s32": (torch.int32, lambda start, xs: start + sum(xs)),
    "min.s32": (torch.int32, lambda start, xs: min([start, *xs])),
    "max.s32": (torch.int32, lambda start, xs: max([start, *xs])),
    "or.b32": (torch.int32, lambda start, xs: functools.reduce(int.__or__, xs, start)),
    "exch.b32": (torch.int32, lambda start, xs: xs[-1]),
    "add.f32": (torch.float32, lambda start, xs: start + sum(xs)),
    "add.noftz.f16": (torch.float16, lambda start, xs: start + sum(xs)),
    "add.noftz.bf16": (torch.bfloat16, lambda start, xs: start + sum(xs)),
}


@pytest.mark.parametrize("op", ATOMICS)
@pytest.mark.parametrize("order", ["global.gpu.acq_rel", "acq_rel.gpu.global", "global"])
def test_atomics_on_one_word(op, order):
    dtype, fold = ATOMICS[op]
    size = torch.empty(0, dtype=dtype).element_size()
    register = "%h1" if size == 2 else "%r1"
    body = f"""
      mad.wide.u32 %d1, %r40, {size}, %d40;
      ld.global.b{8 * size} {register}, [%d1];
      atom.{order}.{op} {register}, [%d41], {register};"""
    x = (torch.arange(32) % 5).sub(1).to(dtype)
    target = torch.full((2,), 3, dtype=dtype)
    launch(kernel(body, 2), x, target)
    want = torch.tensor(fold(3, x.tolist()), dtype=torch.float64)
    assert target[0].double() == want


def test_atomics_give_the_old_value_in_lane_order():
    x = torch.arange(32, dtype=torch.int32)
    got = lanes("atom.global.add.u32 %r20, [%d41], 2;", x, out=torch.int32)
    assert got.tolist()[0] == 0
    body = """
      atom.global.inc.u32 %r1, [%d40], 4;
      atom.global.cas.b32 %r2, [%d40+4], %r40, %r1;
      red.global.max.u32 [%d40+8], %r40;"""
    out = torch.zeros(3, dtype=torch.int32)
    launch(kernel(body, 1), out)
    assert out.tolist() == [32 % 5, 0, 31]


def test_async_copies_arrive_with_their_group_and_fill_with_zero():
    body = """
      .shared .align 16 .b8 buffer[1024];
      mov.u32 %r1, buffer;
      mad.lo.s32 %r2, %r40, 16, %r1;
      mad.wide.u32 %d1, %r40, 16, %d40;
      setp.lt.u32 %p1, %r40, 16;
      selp.b32 %r3, 16, 0, %p1;
      setp.eq.u32 %p2, %r40, 3;
      selp.b32 %r3, 6, %r3, %p2;
      cp.async.cg.shared.global [ %r2 + 0 ], [ %d1 + 0 ], 0x10, %r3;
      cp.async.commit_group;
      cp.async.ca.shared.global [%r2+512], [%d1], 8;
      cp.async.commit_group;
      cp.async.wait_group 1;
      ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];
      mad.wide.u32 %d2, %r40, 16, %d41;
      st.global.v4.b32 [%d2], {%r4, %r5, %r6, %r7};
      cp.async.wait_all;
      ld.shared.v2.b32 {%r4, %r5}, [%r2+512];
      mad.wide.u32 %d3, %r40, 8, %d42;
      st.global.v2.b32 [%d3], {%r4, %r5};"""
    data = torch.arange(1, 129, dtype=torch.int32)
    first, second = (
        torch.full((32, 4), -1, dtype=torch.int32),
        torch.zeros(32, 2, dtype=torch.int32),
    )
    launch(kernel(body, 3), data, first, second)
    want = data.view(32, 4).clone()
    want[16:] = 0
    want[3, 1:] &= torch.tensor([0xFFFF, 0, 0], dtype=torch.int32)
    assert torch.equal(first, want)
    assert torch.equal(second, data.view(32, 4)[:, :2])


def counts(rows, text):
    """(bytes, sectors, ideal sectors, wavefronts, ideal wavefronts) of the line with `text`."""
    (row,) = [r for r in rows if text in r[2]]
    return row[6:]


@pytest.mark.parametrize(
    "stride, sectors", [(4, 4), (8, 8), (32, 32), (0, 1)], ids=["row", "two", "far", "one"]
)
def test_sectors_of_global_accesses(stride, sectors):
    body = f"mad.wide.u32 %d1, %r40, {stride}, %d40;\nld.global.b32 %r1, [%d1];"
    rows = launch(kernel(body, 1), torch.zeros(1024, dtype=torch.int32))
    distinct = 32 if stride else 1
    assert counts(rows, "ld.global.b32")[1:3] == (sectors, -(-distinct * 4 // 32))


@pytest.mark.parametrize(
    "stride, size, wavefronts, ideal",
    [(4, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (132, 4, 1, 1), (0, 4, 1, 1), (16, 16, 4, 4)]
    + [(128, 16, 32, 4), (144, 16, 4, 4), (8, 8, 2, 2), (64, 2, 16, 1)],
)
def test_wavefronts_of_shared_accesses(stride, size, wavefronts, ideal):
    kind = {2: "b16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[size]
    data = {2: "%h1", 4: "%r1", 8: "{%r1, %r2}", 16: "{%r1, %r2, %r3, %r4}"}[size]
    body = f"""
      .shared .align 16 .b8 buffer[8192];
      mov.u32 %r10, buffer;
      mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0; mov.u16 %h1, 0;
      mad.lo.s32 %r11, %r40, {stride}, %r10;
      st.shared.{kind} [%r11], {data};"""
    rows = launch(kernel(body, 0))
    assert counts(rows, "st.shared")[3:] == (wavefronts, ideal)

"""What the emulator works out once and finds again: patterns of a warp's addresses, 16 bytes of
global memory that one CTA stored. Checks and counts must not depend on whether it could."""

import pytest
import torch
from emulator_ptx import kernel, launch

from llmkern.emulator import EmulatorError

WORDS = 16384  # of shared memory: more odd steps than patterns are kept

# Each lane stores its own word and reads it back, a step apart from the next lane's; then, with a
# bug, another lane's. p0: sums [32]. %r1: the step, %r2: the sum.
STEPS = """
  mov.u32 %r1, 1;
  mov.u32 %r2, 0;
LOOP:
  mul.lo.u32 %r3, %r40, %r1;
  and.b32 %r3, %r3, {last};
  shl.b32 %r3, %r3, 2;
  add.u32 %r4, %r40, %r1;
  st.shared.u32 [%r3], %r4;
  ld.shared.u32 %r5, [%r3];
  add.u32 %r2, %r2, %r5;
  bar.warp.sync -1;
  add.u32 %r1, %r1, 2;
  setp.lt.u32 %p1, %r1, {end};
  @%p1 bra LOOP;
  xor.b32 %r6, %r40, 1;
  mul.lo.u32 %r6, %r6, %r1;
  and.b32 %r6, %r6, {last};
  shl.b32 %r6, %r6, 2;
  mul.lo.u32 %r3, %r40, %r1;
  and.b32 %r3, %r3, {last};
  shl.b32 %r3, %r3, 2;
  st.shared.u32 [%r3], %r40;
  {sync}
  ld.shared.u32 %r7, [%r6];
  add.u32 %r2, %r2, %r7;
  mad.wide.u32 %d1, %r40, 4, %d40;
  st.global.u32 [%d1], %r2;
"""


def steps(end: int, sync: str = "bar.warp.sync -1;") -> tuple[torch.Tensor, list]:
    sums = torch.zeros(32, dtype=torch.int32)
    body = STEPS.format(last=WORDS - 1, end=end, sync=sync)
    return sums, launch(kernel(body, 1), sums, shared_bytes=4 * WORDS)


def wavefronts(step: int) -> int:
    banks = torch.arange(32) * step % WORDS % 32
    return int(banks.bincount().max())


@pytest.mark.parametrize("end", [41, 9001])
def test_checks_and_counts_with_more_patterns_than_are_kept(end):
    sums, counts = steps(end)
    lanes = torch.arange(32)
    done = torch.arange(1, end, 2)
    assert torch.equal(sums, (lanes * len(done) + done.sum() + (lanes ^ 1)).int())
    loop = sum(wavefronts(int(step)) for step in done)
    assert sum(row[-2] for row in counts) == 2 * loop + 2 * wavefronts(end)
    with pytest.raises(EmulatorError) as caught:
        steps(end, sync="")
    assert caught.value.check == "warp race" and "ld.shared.u32 %r7" in caught.value.text


def test_sectors_of_rows_that_begin_elsewhere():
    body = """
  mov.u32 %r1, 0;
LOOP:
  add.u32 %r2, %r1, %r40;
  mad.wide.u32 %d1, %r2, 4, %d40;
  ld.global.b32 %r3, [%d1];
  add.u32 %r1, %r1, 1;
  setp.lt.u32 %p1, %r1, 8;
  @%p1 bra LOOP;"""
    counts = launch(kernel(body, 1), torch.zeros(64, dtype=torch.int32))
    (row,) = [row for row in counts if "ld.global.b32" in row[2]]
    assert row[-4:-2] == (4 + 7 * 5, 8 * 4)


# p0: [256] words, stored whole by each CTA, 16 bytes a lane. %r1: the CTA.
STORES = """
  mov.u32 %r1, %ctaid.x;
  mad.wide.u32 %d1, %r40, {bytes}, %d40;
  mov.u32 %r2, 7;
  mov.u32 %r3, 7;
  {change}
  {store};
"""
WIDE = (16, "st.global.v4.b32 [%d1], {%r2, %r2, %r3, %r2}")
ROW = (4, "st.global.b32 [%d1], %r3")
# Lanes in reverse: no row.
APART = (4, "sub.u64 %d2, %d40, %d1;\n  add.u64 %d2, %d2, %d40;\n  st.global.b32 [%d2+124], %r3")
ORDERS = [{}, {"seed": 3}, {"threads": 2}]


def stores(form, change: str = "", grid: int = 6, block: int = 32, **how) -> torch.Tensor:
    out = torch.zeros(256, dtype=torch.int32)
    body = STORES.format(bytes=form[0], store=form[1], change=change)
    launch(kernel(body, 1), out, grid=grid, block=block, **how)
    return out


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize("form", [WIDE, ROW, APART], ids=["16 bytes", "a row", "lanes apart"])
def test_ctas_that_store_the_same(form, how):
    out = stores(form, **how)
    assert torch.equal(out[: 8 * form[0]], torch.full_like(out[: 8 * form[0]], 7))
    # Of one CTA's stores the last one counts.
    again = "st.global.b32 [%d1], %r1;"
    stores(form, again, grid=1, **how)
    with pytest.raises(EmulatorError, match="different values"):
        stores(form, again, **how)


@pytest.mark.parametrize("how", ORDERS, ids=str)
@pytest.mark.parametrize("form", [WIDE, ROW, APART], ids=["16 bytes", "a row", "lanes apart"])
def test_one_cta_stores_something_else(form, how):
    change = """
  setp.eq.u32 %p1, %r1, 2;
  setp.eq.and.u32 %p2, %r40, 9, %p1;
  @%p2 mov.u32 %r3, 8;"""
    with pytest.raises(EmulatorError) as caught:
        stores(form, change, **how)
    lane = 31 - 9 if form is APART else 9
    element = 4 * 9 + 2 if form is WIDE else lane
    assert caught.value.check == "global race"
    assert f"different values to p0 + {4 * element} bytes" in caught.value.message
    if "seed" not in how:
        assert caught.value.cta == (2, 0, 0)


@pytest.mark.parametrize("how", ORDERS, ids=str)
def test_a_part_of_what_was_stored_whole(how):
    # CTA 1 stores a word, or reads one, of what the others store.
    change = """
  setp.eq.u32 %p1, %r1, 1;
  @!%p1 bra WHOLE;
  @%p1 {access};
  ret;
WHOLE:"""
    silent = change.format(access="st.global.b32 [%d40+64], 7")
    assert stores(WIDE, silent, **how).sum() == 7 * 128
    for access in ("st.global.b32 [%d40+64], 6", "ld.global.b32 %r4, [%d40+64]"):
        with pytest.raises(EmulatorError) as caught:
            stores(WIDE, change.format(access=access), **how)
        assert caught.value.check == "global race" and "p0 + 64 bytes" in caught.value.message


# Shared memory inside a warp: what is touched interleaved, lane by lane.
@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("store", ["st.shared.b16 [%r1+{at}], %h1", "st.shared.b8 [%r1+{at}], %h1"])
def test_many_interleaved_accesses_of_a_warp(store, lane):
    width = 2 if "b16" in store else 1
    own = [f"  {store.format(at=64 * i)};" for i in range(70)]
    body = f"""
  mad.lo.u32 %r1, %r40, {width}, 0;
  cvt.u16.u32 %h1, %r40;
""" + "\n".join(own + [f"  ld.shared.u8 %h2, [%r1+{64 * 69}];"])
    data = torch.zeros(1)
    launch(kernel(body, 1), data, shared_bytes=8192)
    # The first byte of another lane.
    faulty = body + f"\n  mov.u32 %r2, {width * lane};\n  ld.shared.u8 %h2, [%r2];"
    with pytest.raises(EmulatorError) as caught:
        launch(kernel(faulty, 1), data, shared_bytes=8192)
    assert caught.value.check == "warp race" and "[%r2]" in caught.value.text
    assert (
        caught.value.lane == (1 if lane == 0 else 0) and f"by lane {lane} " in caught.value.message
    )


def test_a_copy_that_lands_before_the_lanes_met():
    body = """
  mad.lo.u32 %r1, %r40, 16, 0;
  mad.wide.u32 %d1, %r40, 16, %d40;
  cp.async.cg.shared.global [%r1], [%d1], 16;
  cp.async.wait_all;
  ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];
  mad.wide.u32 %d2, %r40, 16, %d41;
  st.global.v4.b32 [%d2], {%r2, %r3, %r4, %r5};
"""
    data, out = torch.arange(128), torch.zeros(128, dtype=torch.int32)
    data = data.int()
    launch(kernel(body, 2), data, out, shared_bytes=512)
    assert torch.equal(out, data)
    other = body.replace("ld.shared.v4", "xor.b32 %r1, %r1, 16;\n  ld.shared.v4")
    with pytest.raises(EmulatorError) as caught:
        launch(kernel(other, 2), data, out, shared_bytes=512)
    assert caught.value.check == "warp race"
    assert "cp.async.wait_all" in caught.value.other_text

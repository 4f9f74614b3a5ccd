"""Control flow and exchange between lanes in the emulator, against the manual's pseudocode."""

import pytest
import torch
from emulator_ptx import compute, kernel, lanes, launch

from llmkern.emulator import EmulatorError

X = torch.arange(100, 132, dtype=torch.int32)


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and predicate, from the instruction's definition in the PTX manual."""
    bval, cval, mask = b & 31, c & 31, c >> 8 & 31
    max_lane, min_lane = lane & mask | cval & ~mask & 31, lane & mask
    j, valid = {
        "up": (lane - bval, lane - bval >= max_lane),
        "down": (lane + bval, lane + bval <= max_lane),
        "bfly": (lane ^ bval, (lane ^ bval) <= max_lane),
        "idx": (min_lane | bval & ~mask & 31, (min_lane | bval & ~mask & 31) <= max_lane),
    }[mode]
    return (j if valid else lane), valid


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("b, segment", [(1, 32), (4, 8), (3, 32), (16, 32), (5, 16), (31, 32)])
def test_shuffle(mode, b, segment):
    c = (32 - segment) << 8 | (0 if mode == "up" else 31)
    body = f"""
      shfl.sync.{mode}.b32 %r1|%p1, %r0, {b}, {c}, -1;
      selp.b32 %r2, 1000, 0, %p1;
      add.s32 %r20, %r1, %r2;"""
    want = []
    for lane in range(32):
        j, valid = shuffled(mode, lane, b, c)
        want.append(100 + j + (1000 if valid else 0))
    assert lanes(body, X, out=torch.int32).tolist() == want


def test_butterfly_reduction_reaches_every_lane():
    body = "mov.b32 %r20, %r0;"
    for step in (16, 8, 4, 2, 1):
        body += f"shfl.sync.bfly.b32 %r1, %r20, {step}, 31, -1; add.s32 %r20, %r20, %r1;"
    assert lanes(body, X, out=torch.int32).tolist() == [int(X.sum())] * 32


def test_votes_and_masks():
    body = """
      setp.lt.u32 %p1, %r40, 5;
      vote.sync.ballot.b32 %r20, %p1, -1;
      vote.sync.any.pred %p2, %p1, -1;
      vote.sync.all.pred %p3, %p1, -1;
      @%p2 or.b32 %r20, %r20, 256;
      @%p3 or.b32 %r20, %r20, 512;
      @%p1 activemask.b32 %r2;
      @%p1 shl.b32 %r2, %r2, 16;
      @%p1 or.b32 %r20, %r20, %r2;"""
    want = [0x1F0000 | 0x11F if lane < 5 else 0x11F for lane in range(32)]
    assert lanes(body, X, out=torch.int32).tolist() == want


def test_match_and_redux():
    keys = torch.arange(32, dtype=torch.int32) % 3
    got = lanes("match.any.sync.b32 %r20, %r0, -1;", keys, out=torch.int32)
    masks = [sum(1 << j for j in range(32) if j % 3 == i % 3) for i in range(32)]
    assert [v & 0xFFFFFFFF for v in got.tolist()] == masks
    x = torch.arange(-7, 25, dtype=torch.int32)
    for op, want in (("add", x.sum()), ("min", x.min()), ("max", x.max())):
        got = lanes(f"redux.sync.{op}.s32 %r20, %r0, -1;", x, out=torch.int32)
        assert got.tolist() == [int(want)] * 32
    got = lanes("redux.sync.max.u32 %r20, %r0, -1;", x, out=torch.int32)
    assert got.tolist() == [-1] * 32
    got = lanes("redux.sync.xor.b32 %r20, %r0, -1;", X, out=torch.int32).tolist()
    want = 0
    for v in X.tolist():
        want ^= v
    assert got == [want] * 32


def test_special_registers():
    body = """
      mov.u32 %r1, %laneid;
      mov.u32 %r2, %ntid.x;
      mad.lo.s32 %r20, %r1, 1000, %r2;
      mov.u32 %r3, %lanemask_lt;
      popc.b32 %r3, %r3;
      mad.lo.s32 %r20, %r3, 100000, %r20;"""
    want = [lane * 1000 + 32 + lane * 100000 for lane in range(32)]
    assert lanes(body, X, out=torch.int32).tolist() == want


def test_loops_of_different_lengths_come_together_again():
    body = """
      mov.u32 %r20, 0;
      mov.u32 %r1, 0;
    LOOP:
      setp.ge.u32 %p1, %r1, %r40;
      @%p1 bra DONE;
      add.s32 %r20, %r20, %r1;
      add.s32 %r1, %r1, 1;
      bra LOOP;
    DONE:
      shfl.sync.bfly.b32 %r2, %r20, 1, 31, -1;
      add.s32 %r20, %r20, %r2;"""
    sums = [n * (n - 1) // 2 for n in range(32)]
    want = [sums[i] + sums[i ^ 1] for i in range(32)]
    assert lanes(body, X, out=torch.int32).tolist() == want


def test_branch_tables():
    body = """
      rem.u32 %r1, %r40, 3;
      mov.u32 %r20, 0;
    TABLE: .branchtargets A, B, C;
      brx.idx %r1, TABLE;
    A: add.s32 %r20, %r20, 1; bra.uni D;
    B: add.s32 %r20, %r20, 10; bra.uni D;
    C: add.s32 %r20, %r20, 100;
    D: add.s32 %r20, %r20, 1000;"""
    want = [1000 + [1, 10, 100][i % 3] for i in range(32)]
    assert lanes(body, X, out=torch.int32).tolist() == want


def test_a_spin_lock_of_each_lane_ends():
    ptx = kernel(
        """
      .shared .align 4 .b32 lock;
      setp.eq.u32 %p1, %r40, 0;
      @%p1 st.shared.u32 [lock], 0;
      bar.sync 0;
      mov.u32 %r1, 0;
    TRY:
      atom.shared.cas.b32 %r2, [lock], 0, 1;
      setp.ne.u32 %p2, %r2, 0;
      @%p2 bra TRY;
      ld.global.u32 %r3, [%d40];
      add.s32 %r3, %r3, 1;
      st.global.u32 [%d40], %r3;
      atom.shared.exch.b32 %r4, [lock], 0;""",
        1,
    )
    counter = torch.zeros(1, dtype=torch.int32)
    launch(ptx, counter, block=96)
    assert counter.item() == 96


def test_barriers_order_warps_and_reduce_votes():
    ptx = kernel(
        """
      .shared .align 4 .b32 buffer[128];
      mul.lo.s32 %r1, %r40, 4;
      mov.u32 %r2, buffer;
      add.s32 %r3, %r2, %r1;
      st.shared.u32 [%r3], %r40;
      setp.lt.u32 %p1, %r40, 50;
      bar.red.popc.u32 %r4, 0, %p1;
      xor.b32 %r5, %r40, 96;
      mad.lo.s32 %r6, %r5, 4, %r2;
      ld.shared.u32 %r7, [%r6];
      mad.lo.s32 %r7, %r4, 1000, %r7;
      mad.wide.u32 %d1, %r40, 4, %d40;
      st.global.u32 [%d1], %r7;""",
        1,
    )
    out = torch.zeros(128, dtype=torch.int32)
    for seed in (0, 1, 2):
        out.zero_()
        launch(ptx, out, block=128, seed=seed)
        assert out.tolist() == [50000 + (i ^ 96) for i in range(128)]


def test_named_barriers_make_a_pipeline():
    # Warp 1 fills, warp 0 reads: barrier 1 says full, barrier 2 says free.
    ptx = kernel(
        """
      .shared .align 4 .b32 slot[32];
      and.b32 %r1, %r40, 31;
      mov.u32 %r2, slot;
      mad.lo.s32 %r3, %r1, 4, %r2;
      setp.lt.u32 %p1, %r40, 32;
      mov.u32 %r4, 0;
      mov.u32 %r5, 0;
      @%p1 bra READ;
    FILL:
      st.shared.u32 [%r3], %r5;
      bar.arrive 1, 64;
      bar.sync 2, 64;
      add.s32 %r5, %r5, 1;
      setp.lt.u32 %p2, %r5, 4;
      @%p2 bra FILL;
      ret;
    READ:
      bar.sync 1, 64;
      ld.shared.u32 %r6, [%r3];
      bar.arrive 2, 64;
      mad.lo.s32 %r4, %r4, 10, %r6;
      add.s32 %r5, %r5, 1;
      setp.lt.u32 %p2, %r5, 4;
      @%p2 bra READ;
      mad.wide.u32 %d1, %r1, 4, %d40;
      st.global.u32 [%d1], %r4;""",
        1,
    )
    out = torch.zeros(32, dtype=torch.int32)
    launch(ptx, out, block=64)
    assert out.tolist() == [123] * 32
    with pytest.raises(EmulatorError) as caught:
        launch(ptx.replace("bar.sync 2, 64;", "bar.arrive 3, 64;"), out, block=64)
    assert caught.value.check in ("shared race", "bad barrier", "barrier deadlock")


@pytest.mark.parametrize("op, want", [("and", [0, 1]), ("or", [1, 1])])
def test_barriers_vote(op, want):
    # Warp 0 votes yes as one, warp 1 in part; then both in full.
    ptx = kernel(
        f"""
      setp.lt.u32 %p1, %r40, 40;
      bar.red.{op}.pred %p2, 0, %p1;
      selp.b32 %r1, 1, 0, %p2;
      setp.lt.u32 %p1, %r40, 64;
      bar.red.{op}.pred %p3, 1, 64, %p1;
      selp.b32 %r2, 10, 0, %p3;
      add.s32 %r1, %r1, %r2;
      mad.wide.u32 %d1, %r40, 4, %d40;
      st.global.u32 [%d1], %r1;""",
        1,
    )
    out = torch.zeros(64, dtype=torch.int32)
    launch(ptx, out, block=64)
    assert out.tolist() == [want[0] + 10 * want[1]] * 64


PAIRS = """
  .shared .align 4 .b32 slot[128];
  mov.u32 %r2, slot;
  mad.lo.s32 %r3, %r40, 4, %r2;
  shr.u32 %r4, %r40, 5;
  st.shared.u32 [%r3], %r40;
  shr.u32 %r5, %r4, 1;
  add.s32 %r5, %r5, 1;
  bar.sync %r5, 64;
  {meet}
  setp.eq.u32 %p1, %r4, 3;
  @%p1 ld.shared.u32 %r6, [slot+{word}];"""


def test_named_barriers_order_those_who_meet_there_and_what_these_have_seen():
    # Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2; warp 3 reads what others stored.
    def run(meet: str, word: int) -> None:
        for seed in (0, 1, 2):
            launch(kernel(PAIRS.format(meet=meet, word=4 * word), 0), block=128, seed=seed)

    run("", 64 + 5)
    for word in (5, 32 + 5):
        with pytest.raises(EmulatorError) as caught:
            run("", word)
        assert caught.value.check in ("shared race", "uninitialised shared memory")
    # Then warps 1 and 3 meet: what warp 0 did before its barrier is known by way of warp 1.
    meet = "and.b32 %r7, %r4, 1;\n  setp.eq.u32 %p2, %r7, 1;\n  @%p2 bar.sync 3, 64;"
    for word in (5, 32 + 5):
        run(meet, word)


def test_threads_that_do_not_fill_a_warp():
    ptx = kernel("mov.u32 %r1, 1; mad.wide.u32 %d1, %r40, 4, %d40; st.global.u32 [%d1], %r1;", 1)
    out = torch.zeros(64, dtype=torch.int32)
    launch(ptx, out, block=45)
    assert out.tolist() == [1] * 45 + [0] * 19


def test_grid_and_block_coordinates():
    ptx = kernel(
        """
      mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x;
      mov.u32 %r4, %tid.y; mov.u32 %r5, %ntid.x; mov.u32 %r6, %ntid.y;
      mad.lo.s32 %r7, %r2, %r3, %r1;
      mad.lo.s32 %r8, %r4, %r5, %r40;
      mul.lo.s32 %r9, %r5, %r6;
      mad.lo.s32 %r10, %r7, %r9, %r8;
      mad.wide.u32 %d1, %r10, 4, %d40;
      st.global.u32 [%d1], %r10;""",
        1,
    )
    out = torch.full((3 * 2 * 8 * 8,), -1, dtype=torch.int32)
    launch(ptx, out, grid=(3, 2), block=(8, 8))
    assert torch.equal(out, torch.arange(out.numel(), dtype=torch.int32))


def test_selection_by_sign():
    a, b = torch.arange(32, dtype=torch.int32), torch.arange(100, 132, dtype=torch.int32)
    c = torch.where(a % 2 == 0, a - 16, a)
    got = compute("slct.b32.s32", a, b, c, out=torch.int32)
    assert torch.equal(got, torch.where(c >= 0, a, b))

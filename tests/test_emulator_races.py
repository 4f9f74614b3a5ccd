"""Races inside a warp and between CTAs: what must be found, and what orders accesses and so must
not be."""

import pytest
import torch
from emulator_ptx import kernel, launch
from test_emulator_checks import variants

from llmkern.emulator import EmulatorError

# Shared memory inside one warp. %r1: the tile, %r2: the lane's own word, %r4: its neighbour's.
TILE = """
  .shared .align 16 .b8 tile[4096];
  mov.u32 %r1, tile;
  mad.lo.s32 %r2, %r40, 4, %r1;
  xor.b32 %r3, %r40, 1;
  mad.lo.s32 %r4, %r3, 4, %r1;
  mad.wide.u32 %d1, %r40, 16, %d40;
"""

# name: (body with its bug as in CATALOGUE of test_emulator_checks, the line that must be named)
INSIDE_A_WARP = {
    "__syncwarp missing before a read": (
        """
  st.shared.b32 [%r2], %r40;
  bar.warp.sync -1; // bug: drop
  ld.shared.b32 %r5, [%r4];""",
        "ld.shared.b32 %r5",
    ),
    "__syncwarp missing before a buffer is used again": (
        """
  st.shared.b32 [%r2], %r40;
  bar.warp.sync -1;
  ld.shared.b32 %r5, [%r4];
  bar.warp.sync -1; // bug: drop
  add.s32 %r6, %r40, 7;
  st.shared.b32 [%r2], %r6;""",
        "st.shared.b32 [%r2], %r6",
    ),
    "a reduction that counts on lockstep": (
        """
  st.shared.b32 [%r2], %r40;
  bar.warp.sync -1;
  setp.lt.u32 %p1, %r40, 16;
  @%p1 ld.shared.b32 %r5, [%r2+64];
  @%p1 ld.shared.b32 %r6, [%r2];
  bar.warp.sync -1;
  @%p1 add.s32 %r6, %r6, %r5;
  @%p1 st.shared.b32 [%r2], %r6;
  bar.warp.sync -1; // bug: drop
  setp.lt.u32 %p2, %r40, 8;
  @%p2 ld.shared.b32 %r5, [%r2+32];""",
        "ld.shared.b32 %r5, [%r2+32]",
    ),
    "cp.async.wait_group is for the lane's own copies": (
        """
  mad.lo.s32 %r7, %r40, 16, %r1;
  xor.b32 %r8, %r7, 16;
  cp.async.cg.shared.global [%r7], [%d1], 16;
  cp.async.wait_all;
  bar.warp.sync -1; // bug: drop
  ld.shared.b32 %r5, [%r8];""",
        "ld.shared.b32 %r5",
    ),
    "halves of the warp meet, but not both": (
        """
  shr.u32 %r6, %r40, 4;
  mul.lo.s32 %r6, %r6, 65535;
  setp.lt.u32 %p1, %r40, 16;
  selp.b32 %r7, 0x0000ffff, 0xffff0000, %p1;
  xor.b32 %r8, %r40, 1; // bug: xor.b32 %r8, %r40, 16;
  mad.lo.s32 %r9, %r8, 4, %r1;
  st.shared.b32 [%r2], %r40;
  @%p1 bar.warp.sync %r7;
  @!%p1 bar.warp.sync %r7;
  ld.shared.b32 %r5, [%r9];""",
        "ld.shared.b32 %r5",
    ),
    "lanes store different values to one word": (
        """
  mov.u32 %r6, 3; // bug: mov.u32 %r6, %r40;
  st.shared.b32 [%r1], %r6;""",
        "st.shared.b32 [%r1], %r6",
    ),
    "an atomic and a plain read": (
        """
  st.shared.b32 [%r2], %r40;
  bar.warp.sync -1;
  atom.shared.add.u32 %r5, [%r1], 1;
  bar.warp.sync -1; // bug: drop
  ld.shared.b32 %r6, [%r1];""",
        "ld.shared.b32 %r6",
    ),
}

CLEAN_INSIDE_A_WARP = {
    "collectives bring lanes together": """
  st.shared.b32 [%r2], %r40;
  shfl.sync.bfly.b32 %r6, %r40, 1, 31, -1;
  ld.shared.b32 %r5, [%r4];""",
    "barriers do": """
  st.shared.b32 [%r2], %r40;
  bar.sync 0;
  ld.shared.b32 %r5, [%r4];""",
    "matrices are read together": """
  st.shared.b32 [%r2], %r40;
  mov.u32 %r6, %r1;
  ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r6];
  st.shared.b32 [%r2], %r5;""",
    "lanes may share a word": """
  mad.lo.s32 %r6, %r40, 2, %r1;
  cvt.u16.u32 %h1, %r40;
  st.shared.b16 [%r6], %h1;
  ld.shared.b16 %h2, [%r6];
  add.u16 %h2, %h2, 1;
  st.shared.b16 [%r6], %h2;""",
    "the same value": """
  st.shared.b32 [%r1], 5;
  st.shared.b32 [%r1], 5;""",
    "atomics with each other": """
  st.shared.b32 [%r2], 0;
  bar.warp.sync -1;
  atom.shared.add.u32 %r5, [%r1], 1;
  atom.shared.add.u32 %r5, [%r1], 1;""",
}


def in_a_warp(body: str, **options) -> None:
    data = torch.arange(256, dtype=torch.int32)
    set_up = TILE
    launch(kernel(set_up + body, 1), data, block=32, warp_races=True, **options)


@pytest.mark.parametrize("name", INSIDE_A_WARP)
def test_lanes_of_a_warp_race(name):
    body, line = INSIDE_A_WARP[name]
    clean, faulty = variants(body)
    in_a_warp(clean)
    with pytest.raises(EmulatorError) as caught:
        in_a_warp(faulty)
    assert caught.value.check == "warp race"
    assert line in caught.value.text and caught.value.other_line > 0
    assert caught.value.lane >= 0 and "of the same warp" in caught.value.message


@pytest.mark.parametrize("name", CLEAN_INSIDE_A_WARP)
def test_lanes_of_a_warp_in_order(name):
    in_a_warp(CLEAN_INSIDE_A_WARP[name])


def test_warps_are_checked_apart_from_each_other():
    body = TILE + "st.shared.b32 [%r2], %r40;\nbar.warp.sync -1;\nld.shared.b32 %r5, [%r4];"
    data = torch.arange(2048, dtype=torch.int32)
    launch(kernel(body, 1), data, block=128, grid=3, warp_races=True, seed=4)


# Global memory. %r1: the CTA, %r2: their number.
CTA = """
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %nctaid.x;
  setp.eq.u32 %p1, %r40, 0;
  mad.wide.u32 %d1, %r1, 4, %d40;
"""

LAST_BLOCK_SUMS = (
    CTA
    + """
  add.s32 %r3, %r1, 100;
  @%p1 st.global.u32 [%d1], %r3;
  {fence}
  @!%p1 bra DONE;
  atom.{order}global.inc.u32 %r4, [%d41], 1000;
  {after}
  add.s32 %r5, %r2, -1;
  setp.ne.u32 %p2, %r4, %r5;
  @%p2 bra DONE;
  mov.u32 %r6, 0;
  mov.u32 %r7, 0;
SUM:
  mad.wide.u32 %d2, %r6, 4, %d40;
  ld.global.u32 %r8, [%d2];
  add.s32 %r7, %r7, %r8;
  add.s32 %r6, %r6, 1;
  setp.lt.u32 %p3, %r6, %r2;
  @%p3 bra SUM;
  st.global.u32 [%d42], %r7;
DONE:"""
)

LOCKED_SUM = (
    CTA
    + """
  @!%p1 bra IN;
TRY:
  atom.{acquire}global.cas.b32 %r3, [%d41], 0, 1;
  setp.ne.u32 %p2, %r3, 0;
  @%p2 bra TRY;
IN:
  bar.sync 0;
  setp.eq.u32 %p3, %r40, {worker};
  @!%p3 bra OUT;
  ld.global.u32 %r4, [%d40];
  add.s32 %r4, %r4, %r1;
  st.global.u32 [%d40], %r4;
OUT:
  {barrier}
  {fence}
  @%p1 atom.{release}global.exch.b32 %r5, [%d41], 0;"""
)


def words(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


def global_race(body: str, *tensors, **options) -> EmulatorError:
    with pytest.raises(EmulatorError) as caught:
        launch(kernel(body, len(tensors)), *tensors, **options)
    assert caught.value.check == "global race", caught.value
    return caught.value


ORDERS = [{"seed": 0}, {"seed": 7}, {"threads": 2}]


@pytest.mark.parametrize("options", ORDERS)
def test_a_read_of_what_another_cta_stores(options):
    body = (
        CTA
        + """
  @%p1 st.global.u32 [%d1], %r1;
  xor.b32 %r3, %r1, {step};
  mad.wide.u32 %d2, %r3, 4, %d40;
  @%p1 ld.global.u32 %r4, [%d2];"""
    )
    launch(kernel(body.format(step=0), 1), words(8), grid=8, **options)
    error = global_race(body.format(step=1), words(8), grid=8, **options)
    assert "one CTA stores and another one reads p0" in error.message
    lines = {error.text.split(" ")[1], error.other_text.split(" ")[1]}
    assert lines == {"st.global.u32", "ld.global.u32"}
    launch(kernel(body.format(step=1), 1), words(8), grid=8, global_races=False, **options)


@pytest.mark.parametrize("options", ORDERS)
def test_reads_are_followed_whichever_parameter_names_the_memory(options):
    # p1 is the same tensor as p0; CTAs read the whole of it and then store their part.
    body = CTA + "ld.global.u32 %r3, [%d41];\n@%p1 st.global.u32 [%d1], %r1;"
    same = words(8)
    error = global_race(body, same, same, grid=8, **options)
    assert "element 0" in error.message
    launch(kernel(body, 2), same, words(1), grid=8, **options)


def test_copies_to_shared_memory_are_reads():
    body = (
        CTA
        + """
  .shared .align 16 .b8 tile[16];
  cp.async.ca.shared.global [tile], [%d40], 4;
  cp.async.wait_all;
  setp.eq.u32 %p2, %r1, 3;
  @%p2 st.global.u32 [%d40], %r1;"""
    )
    error = global_race(body, words(4), grid=4, block=1)
    assert "cp.async" in error.other_text and error.cta == (3, 0, 0)


def test_atomics_and_plain_accesses():
    add = CTA + "red.global.add.u32 [%d40], 1;"
    launch(kernel(add, 1), words(1), grid=6)
    read = add + "\nld.global.u32 %r3, [%d40];"
    error = global_race(read, words(1), grid=6)
    assert "atomic meets another one's plain access" in error.message
    clear = CTA + "setp.eq.u32 %p2, %r1, 0;\n@%p2 st.global.u32 [%d40], 0;\n"
    error = global_race(clear + "red.global.add.u32 [%d40], 1;", words(1), grid=6, block=1)
    assert "red.global" in error.text and "st.global" in error.other_text
    launch(kernel(read, 1), words(1), grid=6, global_races=False)
    # Elsewhere the kernel's plain stores are checked as before.
    error = global_race(add + "\nst.global.u32 [%d41], %r1;", words(1), words(1), grid=6)
    assert "different values to p1" in error.message
    launch(kernel(add + "\nst.global.u32 [%d41], 7;", 2), words(1), words(1), grid=6)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_last_block_may_read_what_was_fenced(seed):
    for fence, order, after in (
        ("membar.gl;", "", ""),
        ("fence.acq_rel.gpu;", "relaxed.gpu.", "fence.acq_rel.gpu;"),
        ("", "acq_rel.gpu.", ""),
    ):
        total = words(1)
        body = LAST_BLOCK_SUMS.format(fence=fence, order=order, after=after)
        launch(kernel(body, 3), words(8), words(1), total, grid=8, seed=seed)
        assert total.item() == sum(100 + i for i in range(8))
    for fence, order in (("", ""), ("membar.cta;", ""), ("membar.gl;", "relaxed.gpu.")):
        body = LAST_BLOCK_SUMS.format(fence=fence, order=order, after="")
        error = global_race(body, words(8), words(1), words(1), grid=8, seed=seed)
        assert "ld.global.u32 %r8" in error.text and "st.global.u32" in error.other_text


LOCK = {
    "acquire": "acq_rel.gpu.",
    "release": "acq_rel.gpu.",
    "worker": 40,
    "barrier": "bar.sync 0;",
    "fence": "",
}


@pytest.mark.parametrize("seed", [0, 5])
def test_a_spin_lock_orders_its_owners(seed):
    total = words(1)
    for change in ({}, {"acquire": "", "release": "", "fence": "membar.gl;"}):
        total.zero_()
        body = LOCKED_SUM.format(**{**LOCK, **change})
        launch(kernel(body, 2), total, words(1), grid=8, block=64, seed=seed)
        assert total.item() == 28
    # Nothing releases; or another warp works when the lock is let go.
    for change in ({"acquire": "", "release": ""}, {"barrier": ""}):
        body = LOCKED_SUM.format(**{**LOCK, **change})
        error = global_race(body, words(1), words(1), grid=8, block=64, seed=seed)
        assert "p0" in error.message


def test_a_flag_hands_on_what_was_stored_before_it():
    body = (
        CTA
        + """
  setp.eq.u32 %p2, %r1, 0;
  @!%p2 bra READ;
  st.global.u32 [%d40], 7;
  st.{release}.u32 [%d41], 1;
  ret;
READ:
  ld.{acquire}.u32 %r3, [%d41];
  setp.eq.u32 %p3, %r3, 0;
  @%p3 bra READ;
  ld.global.u32 %r4, [%d40];"""
    )
    for release, acquire in (
        ("release.gpu.global", "acquire.gpu.global"),
        ("volatile.global", "volatile.global"),
    ):
        text = body.format(release=release, acquire=acquire)
        if release.startswith("volatile"):
            global_race(text, words(1), words(1), grid=3, block=1)
            text = text.replace("st.volatile", "membar.gl;\n  st.volatile")
        launch(kernel(text, 2), words(1), words(1), grid=3, block=1)
    # Of one CTA's races the one at the lowest address is named: the flag comes first in memory.
    both = words(2)
    text = body.format(release="global", acquire="volatile.global")
    error = global_race(text, both[1:], both[:1], grid=3, block=1)
    assert "p1" in error.message

"""Each check of the emulator: a kernel with the bug is stopped at the right PTX line, and the same
kernel without it runs silently."""

import pytest
import torch
from emulator_ptx import kernel, launch

from llmkern import target
from llmkern.emulator import EmulatorError, Program, current, device
from llmkern.errors import ArgumentError

TILE = """
  .shared .align 16 .b8 tile[4096];
  mov.u32 %r1, tile;
  mad.lo.s32 %r2, %r40, 4, %r1;
  xor.b32 %r3, %r40, 32;
  mad.lo.s32 %r4, %r3, 4, %r1;
  mad.wide.u32 %d1, %r40, 4, %d40;
"""
COPY = """
  .shared .align 16 .b8 tile[4096];
  mov.u32 %r1, tile;
  mad.lo.s32 %r2, %r40, 16, %r1;
  xor.b32 %r3, %r40, 32;
  mad.lo.s32 %r4, %r3, 16, %r1;
  mad.wide.u32 %d1, %r40, 16, %d40;
"""

# name: (check, body with {bug} lines, threads, the line that must be named). A line that ends with
# "// bug: text" is replaced by text in the faulty variant; "drop" removes it.
CATALOGUE = {
    "barrier missing between write and read": (
        "shared race",
        TILE
        + """
  st.shared.b32 [%r2], %r40;
  bar.sync 0; // bug: drop
  ld.shared.b32 %r5, [%r4];""",
        64,
        "ld.shared.b32 %r5",
    ),
    "barrier missing before a buffer is used again": (
        "shared race",
        TILE
        + """
  st.shared.b32 [%r2], %r40;
  bar.sync 0;
  ld.shared.b32 %r5, [%r4];
  bar.sync 0; // bug: drop
  add.s32 %r6, %r40, 7;
  st.shared.b32 [%r2], %r6;""",
        64,
        "st.shared.b32 [%r2], %r6",
    ),
    "trailing barrier missing in a loop": (
        "shared race",
        TILE
        + """
  mov.u32 %r7, 0;
AGAIN:
  add.s32 %r6, %r40, %r7;
  st.shared.b32 [%r2], %r6;
  bar.sync 0;
  ld.shared.b32 %r5, [%r4];
  bar.sync 0; // bug: drop
  add.s32 %r7, %r7, 1;
  setp.lt.u32 %p1, %r7, 3;
  @%p1 bra AGAIN;""",
        64,
        "st.shared.b32 [%r2], %r6",
    ),
    "two warps write different values": (
        "shared race",
        TILE
        + """
  shr.u32 %r6, %r40, 5;
  mov.u32 %r6, 5; // bug: drop
  st.shared.b32 [%r1], %r6;""",
        64,
        "st.shared.b32 [%r1], %r6",
    ),
    "barrier missing after cp.async.wait_group": (
        "shared race",
        COPY
        + """
  cp.async.cg.shared.global [%r2], [%d1], 16;
  cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0; // bug: drop
  ld.shared.b32 %r5, [%r4];""",
        64,
        "ld.shared.b32 %r5",
    ),
    "wait_group one group too lax": (
        "async copy in flight",
        COPY
        + """
  cp.async.cg.shared.global [%r2], [%d1], 16;
  cp.async.commit_group;
  cp.async.cg.shared.global [%r2+2048], [%d1], 16;
  cp.async.commit_group;
  cp.async.wait_group 0; // bug: cp.async.wait_group 1;
  bar.sync 0;
  ld.shared.b32 %r5, [%r4+2048];""",
        64,
        "ld.shared.b32 %r5",
    ),
    "wait_group dropped": (
        "async copy in flight",
        COPY
        + """
  cp.async.cg.shared.global [%r2], [%d1], 16;
  cp.async.commit_group;
  cp.async.wait_group 0; // bug: drop
  bar.sync 0;
  ld.shared.b32 %r5, [%r2];""",
        64,
        "ld.shared.b32 %r5",
    ),
    "cp.async into a buffer that is still read": (
        "shared race",
        COPY
        + """
  st.shared.b32 [%r2], %r40;
  bar.sync 0;
  ld.shared.b32 %r5, [%r4];
  bar.sync 0; // bug: drop
  cp.async.cg.shared.global [%r2], [%d1], 16;
  cp.async.wait_all;""",
        64,
        "cp.async",
    ),
    "a pipeline stage never filled": (
        "uninitialised shared memory",
        COPY
        + """
  st.shared.b32 [%r2+2048], %r40; // bug: drop
  bar.sync 0;
  ld.shared.b32 %r5, [%r2+2048];""",
        64,
        "ld.shared.b32 %r5",
    ),
    "a wrong stage index": (
        "uninitialised shared memory",
        COPY
        + """
  cp.async.cg.shared.global [%r2], [%d1], 16;
  cp.async.wait_all;
  bar.sync 0;
  ld.shared.b32 %r5, [%r2]; // bug: ld.shared.b32 %r5, [%r2+1024];""",
        64,
        "ld.shared.b32 %r5",
    ),
    "row bound missing on a load": (
        "out of bounds",
        TILE
        + """
  setp.lt.u32 %p1, %r40, 48; // bug: setp.lt.u32 %p1, %r40, 200;
  mad.wide.u32 %d2, %r40, 4, %d41;
  @%p1 ld.global.b32 %r5, [%d2];""",
        64,
        "ld.global.b32 %r5",
    ),
    "column bound off by one in a store": (
        "out of bounds",
        TILE
        + """
  setp.lt.u32 %p1, %r40, 48; // bug: setp.le.u32 %p1, %r40, 48;
  mad.wide.u32 %d2, %r40, 4, %d41;
  @%p1 st.global.b32 [%d2], %r40;""",
        64,
        "st.global.b32 [%d2]",
    ),
    "cp.async past the end": (
        "out of bounds",
        COPY
        + """
  setp.lt.u32 %p1, %r40, 12; // bug: setp.lt.u32 %p1, %r40, 13;
  mad.wide.u32 %d2, %r40, 16, %d41;
  @%p1 cp.async.cg.shared.global [%r2], [%d2], 16;
  cp.async.wait_all;""",
        64,
        "cp.async.cg.shared.global",
    ),
    "misaligned vector": (
        "misaligned",
        TILE
        + """
  and.b32 %r5, %r40, 7;
  mad.wide.u32 %d2, %r5, 16, %d40; // bug: mad.wide.u32 %d2, %r5, 8, %d40;
  ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%d2];""",
        64,
        "ld.global.v4.b32",
    ),
    "dynamic shared memory too small": (
        "out of bounds",
        """
  mov.u32 %r1, dynamic;
  mad.lo.s32 %r2, %r40, 4, %r1; // bug: mad.lo.s32 %r2, %r40, 8, %r1;
  st.shared.b32 [%r2], %r40;""",
        64,
        "st.shared.b32 [%r2]",
    ),
    "shfl.sync in divergent code": (
        "divergent collective",
        """
  setp.lt.u32 %p1, %r40, 16;
  mov.u32 %r5, 0;
  bra.uni TOGETHER; // bug: @!%p1 bra AFTER;
TOGETHER:
  shfl.sync.bfly.b32 %r5, %r40, 1, 31, -1;
AFTER:
  shfl.sync.bfly.b32 %r6, %r40, 2, 31, -1;""",
        32,
        "shfl.sync.bfly.b32 %r5",
    ),
    "barrier in divergent code": (
        "divergent barrier",
        """
  setp.lt.u32 %p1, %r40, 16;
  bra.uni TOGETHER; // bug: @!%p1 bra AFTER;
TOGETHER:
  bar.sync 0;
AFTER:
  bar.sync 0;""",
        32,
        "bar.sync 0",
    ),
    "barrier that a warp waits for alone": (
        "barrier deadlock",
        """
  setp.lt.u32 %p1, %r40, 32;
  bar.sync 1, 64; // bug: @%p1 bar.sync 1, 64;
  bar.sync 0;""",
        64,
        "bar.sync 1, 64",
    ),
    "a loop that never ends": (
        "instruction budget",
        """
  mov.u32 %r5, 0;
AGAIN:
  add.s32 %r5, %r5, 1;
  setp.ne.u32 %p1, %r5, 100; // bug: setp.ge.u32 %p1, %r5, 0;
  @%p1 bra AGAIN;""",
        32,
        "",
    ),
    "an unset register is stored": (
        "unset register",
        TILE
        + """
  setp.lt.u32 %p1, %r40, 63;
  mov.u32 %r5, 0; // bug: drop
  @%p1 ld.global.b32 %r5, [%d1];
  st.global.b32 [%d1], %r5;""",
        64,
        "st.global.b32 [%d1]",
    ),
    "an unset register decides a branch": (
        "unset register",
        TILE
        + """
  setp.lt.u32 %p1, %r40, 63;
  mov.u32 %r5, 0; // bug: drop
  @%p1 ld.global.b32 %r5, [%d1];
  shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;
  setp.eq.u32 %p2, %r6, 3;
  @%p2 bra NEXT;
NEXT:""",
        64,
        "@%p2 bra NEXT",
    ),
    "local memory past its end": (
        "out of bounds",
        """
  .local .align 4 .b8 spill[16];
  mov.u64 %d1, spill;
  and.b32 %r5, %r40, 3; // bug: and.b32 %r5, %r40, 7;
  mad.wide.u32 %d2, %r5, 4, %d1;
  st.local.b32 [%d2], %r40;""",
        32,
        "st.local.b32 [%d2]",
    ),
}


def variants(body: str) -> tuple[str, str]:
    """(clean, faulty) text of a catalogue entry."""
    clean, faulty = [], []
    for line in body.split("\n"):
        code, _, bug = line.partition("// bug: ")
        clean.append(code)
        faulty.append(code if not bug else "" if bug == "drop" else bug)
    return "\n".join(clean), "\n".join(faulty)


def arguments() -> list[torch.Tensor]:
    return [torch.arange(256, dtype=torch.int32), torch.arange(48, dtype=torch.int32)]


MODULE = ".extern .shared .align 16 .b8 dynamic[];"


def run(body: str, threads: int, **options) -> None:
    ptx = kernel(body, 2, module=MODULE)
    shared = 256 if "dynamic" in body else 0
    launch(ptx, *arguments(), block=threads, shared_bytes=shared, budget=5000, **options)


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_bug_is_stopped_at_its_line(name):
    check, body, threads, line = CATALOGUE[name]
    for seed in (0, 3):
        with pytest.raises(EmulatorError) as caught:
            run(variants(body)[1], threads, seed=seed)
        found = {caught.value.check}
        if check == "shared race":  # a reader may also come before the writer
            found -= {"uninitialised shared memory"}
        assert found <= {check}
        assert line in caught.value.text or line in caught.value.other_text
        assert caught.value.kernel == "k" and caught.value.cta == (0, 0, 0)


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_clean_kernel_is_silent(name):
    _, body, threads, _ = CATALOGUE[name]
    for seed in (0, 3):
        run(variants(body)[0], threads, seed=seed)


def test_reports_name_tensor_offset_lane_and_the_other_access():
    body = variants(CATALOGUE["column bound off by one in a store"][1])[1]
    with pytest.raises(EmulatorError, match=r"p1 \+ 192 bytes \(0 bytes past its end") as caught:
        run(body, 64)
    assert (caught.value.warp, caught.value.lane) == (1, 16)
    body = variants(CATALOGUE["trailing barrier missing in a loop"][1])[1]
    with pytest.raises(EmulatorError) as caught:
        run(body, 64)
    texts = {caught.value.text, caught.value.other_text}
    assert texts == {"st.shared.b32 [%r2], %r6;", "ld.shared.b32 %r5, [%r4];"}


def test_checks_can_be_switched_off():
    for name, switch in (
        ("barrier missing between write and read", {"races": False, "uninitialised": False}),
        ("a pipeline stage never filled", {"uninitialised": False}),
        ("an unset register is stored", {"uninitialised": False}),
        ("wait_group dropped", {"async_copies": False}),
        ("shfl.sync in divergent code", {"collectives": False}),
    ):
        run(variants(CATALOGUE[name][1])[1], CATALOGUE[name][2], **switch)


GLOBAL_RACE = """
  mov.u32 %r5, %ctaid.x;
  mad.wide.u32 %d1, %r40, 4, %d40;
  st.global.b32 [%d1], {value};"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", [0, 5])
def test_global_race_between_ctas(threads, seed):
    out = torch.zeros(32, dtype=torch.int32)
    options = {"grid": 8, "threads": threads, "seed": seed}
    launch(kernel(GLOBAL_RACE.format(value="%r40"), 1), out, **options)  # the same value: benign
    with pytest.raises(EmulatorError) as caught:
        launch(kernel(GLOBAL_RACE.format(value="%r5"), 1), out, **options)
    assert caught.value.check == "global race"
    assert "p0 + 0 bytes (element 0)" in caught.value.message
    launch(kernel(GLOBAL_RACE.format(value="%r5"), 1), out, global_races=False, **options)
    atomic = GLOBAL_RACE.format(value="%r5").replace("st.global.b32", "red.global.add.u32")
    launch(kernel(atomic, 1), out, **options)


def test_report_is_that_of_the_first_cta_whatever_the_threads():
    body = """
  mov.u32 %r5, %ctaid.x;
  setp.lt.u32 %p1, %r5, 5;
  @%p1 bra GOOD;
  mad.wide.u32 %d1, %r5, 4096, %d40;
  st.global.b32 [%d1], %r5;
GOOD:"""
    texts = set()
    for threads in (1, 2, 2, 2):
        with pytest.raises(EmulatorError) as caught:
            launch(kernel(body, 1), torch.zeros(64), grid=40, threads=threads)
        texts.add((caught.value.cta, caught.value.lane, caught.value.line))
    assert texts == {((5, 0, 0), 0, caught.value.line)}


def test_views_and_neighbours():
    storage = torch.zeros(64, dtype=torch.int32)
    body = "mad.wide.u32 %d1, %r40, 4, %d40; st.global.b32 [%d1+{0}], %r40;"
    launch(kernel(body.format(0), 1), storage[16:48])
    with pytest.raises(EmulatorError, match="before its begin"):
        launch(kernel(body.format(-4), 1), storage[16:48])
    with pytest.raises(EmulatorError, match="past its end"):
        launch(kernel(body.format(4), 1), storage[16:48])
    assert storage[:16].eq(0).all() and storage[48:].eq(0).all()


def test_memory_that_nothing_wrote():
    store = "mad.wide.u32 %d1, %r40, 4, %d40; st.global.b32 [%d1], %r40;"
    load = "mad.wide.u32 %d1, %r40, 4, %d40;\nld.global.b32 %r1, [%d1+4];"
    with device("sm_80") as dev:
        out = dev.empty(40, dtype=torch.int32, name="out")
        dev.launch(Program(kernel(store, 1)), "k", 1, 32, [out])
        assert dev.unwritten(out) == 8
        dev.launch(Program(kernel(load, 1)), "k", 1, 31, [out])
        with pytest.raises(EmulatorError, match=r"nothing has written out \+ 128 bytes") as caught:
            dev.launch(Program(kernel(load, 1)), "k", 1, 32, [out])
    assert caught.value.check == "uninitialised global memory"
    assert out[:32].tolist() == list(range(32)) and out[32:].eq(-1).all()


def test_constants_have_bounds():
    body = "mov.u64 %d1, table; mad.wide.u32 %d2, %r40, 4, %d1;\nld.const.u32 %r1, [%d2];"
    module = ".const .align 4 .b32 table[32];"
    launch(kernel(body, 0, module=module))
    with pytest.raises(EmulatorError, match="table \\+ 124 bytes"):
        launch(kernel(body, 0, module=module.replace("32]", "31]")))


def test_device_is_restored_and_nests():
    assert target.emulated() is None
    with device("sm_80") as outer:
        with device("sm_90"):
            assert target.emulated() == 90
        assert target.emulated() == 80 and current() is outer
        with pytest.raises(ArgumentError, match="163|166912"):
            outer.launch(Program(kernel("", 0)), "k", 1, 32, [], shared_bytes=200000)
    assert target.emulated() is None
    with pytest.raises(ArgumentError, match="architecture must be one of"):
        with device("sm_75"):
            pass

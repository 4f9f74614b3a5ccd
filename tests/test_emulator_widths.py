"""Shared memory that warps touch with all widths: findings against a model kept byte by byte."""

import random
import re
from typing import NamedTuple

import pytest
import torch
from emulator_ptx import kernel, launch

from llmkern.emulator import EmulatorError

WARPS, LANES, BYTES = 2, 32, 1024
VECTOR = {4: ".b32", 8: ".v2.b32", 16: ".v4.b32"}


class Step(NamedTuple):
    """What warps do: lane l touches `width` bytes at base + (l ^ flip) * width.

    kind is "ld", "st" or "wait", a barrier.
    """

    kind: str
    warp: int = 0  # WARPS: all of them
    width: int = 4
    base: int = 0
    flip: int = 0

    def text(self, number: int) -> str:
        if self.kind == "wait":
            return "  bar.sync 0;"
        guard = f"@%p{self.warp} " if self.warp < WARPS else ""
        part = f"%r{10 + number}"
        parts = "{" + ", ".join([part] * (self.width // 4)) + "}" if self.width > 4 else part
        opcode = f"{self.kind}.shared{VECTOR[self.width]}"
        address = f"[%r5+{self.base}]"
        operands = f"{parts}, {address}" if self.kind == "ld" else f"{address}, {parts}"
        return f"""  xor.b32 %r5, %r4, {self.flip};
  mad.lo.s32 %r5, %r5, {self.width}, %r1;
  mad.lo.s32 {part}, %r40, 64, {number};
  {guard}{opcode} {operands};"""

    def bytes_of(self, lane: int) -> range:
        begin = self.base + (lane ^ self.flip) * self.width
        return range(begin, begin + self.width)


def random_steps(chance: random.Random) -> list[Step]:
    """Everything written at first, then accesses with barriers between most of them."""
    steps = [Step("st", 0, 16, 0), Step("st", 1, 16, BYTES // 2), Step("wait")]
    if chance.random() < 0.1:
        steps.pop(1)
    for _ in range(14):
        width = chance.choice([4, 8, 16])
        base = chance.randrange(0, (BYTES - LANES * width) // width + 1) * width
        kind = chance.choice(["ld", "ld", "st"])
        # What all warps do would race at once if it were a store.
        warp = chance.randrange(WARPS if kind == "st" else WARPS + 1)
        flip = chance.choice([0, 0, 1, 5, 31])
        steps.append(Step(kind, warp, width, base, flip))
        if chance.random() < 0.75:
            steps.append(Step("wait"))
    return steps


def program(steps: list[Step]) -> str:
    body = f"""
  .shared .align 16 .b8 tile[{BYTES}];
  mov.u32 %r1, tile;
  and.b32 %r4, %r40, 31;
  setp.lt.u32 %p0, %r40, 32;
  setp.ge.u32 %p1, %r40, 32;
"""
    return kernel(body + "\n".join(s.text(i) for i, s in enumerate(steps)), 0)


def find(steps: list[Step]) -> tuple[str, int, int, int, int] | None:
    """(check, step, warp, lane, address) of the first finding, between barriers warp after warp."""
    written = [None] * BYTES  # (warp, phase)
    read = [(-1, set()) for _ in range(BYTES)]
    phases: list[list[int]] = [[]]
    for i, step in enumerate(steps):
        phases.append([]) if step.kind == "wait" else phases[-1].append(i)
    for phase, members in enumerate(phases):
        for warp in range(WARPS):
            for i in members:
                step = steps[i]
                if step.warp not in (warp, WARPS):
                    continue
                for lane in range(LANES):
                    for at in step.bytes_of(lane):
                        word = at & ~3
                        races = written[at] is not None and written[at] in {
                            (other, phase) for other in range(WARPS) if other != warp
                        }
                        if step.kind == "ld":
                            if written[at] is None:
                                return "uninitialised shared memory", i, warp, lane, word
                            if read[at][0] != phase:
                                read[at] = phase, set()
                            read[at][1].add(warp)
                        else:
                            races = races or (read[at][0] == phase and read[at][1] - {warp})
                        if races:
                            return "shared race", i, warp, lane, word
                        if step.kind == "st":
                            written[at] = warp, phase
    return None


@pytest.mark.parametrize("seed", range(60))
def test_mixed_widths_are_judged_word_by_word(seed):
    steps = random_steps(random.Random(seed))
    expected = find(steps)
    ptx = program(steps)
    if expected is None:
        launch(ptx, block=WARPS * LANES, warp_races=False)
        return
    with pytest.raises(EmulatorError) as caught:
        launch(ptx, block=WARPS * LANES, warp_races=False)
    check, number, warp, lane, address = expected
    found = caught.value
    at = int(re.search(r"shared memory at (0x[0-9a-f]+)", found.message)[1], 16)
    text = steps[number].text(number).splitlines()[-1].strip()
    assert (found.check, found.text, found.warp) == (check, text, warp)
    assert (found.lane, at) == (lane, address)


def test_async_copies_over_words_that_were_touched_alone():
    body = """
  .shared .align 16 .b8 tile[512];
  mov.u32 %r1, tile;
  mad.lo.s32 %r2, %r40, 16, %r1;
  mad.wide.u32 %d1, %r40, 16, %d40;
  st.shared.b32 [%r2+8], %r40;
  ld.shared.b32 %r3, [%r2+8];
  cp.async.cg.shared.global [%r2], [%d1], 16;
  cp.async.commit_group;
  {early}
  cp.async.wait_group 0;
  ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2];
  mad.wide.u32 %d1, %r40, 16, %d41;
  st.global.v4.b32 [%d1], {{%r7, %r6, %r5, %r4}};"""
    x = torch.arange(128, dtype=torch.int32)
    out = torch.zeros_like(x)
    launch(kernel(body.format(early=""), 2), x, out)
    torch.testing.assert_close(out.view(32, 4), x.view(32, 4).flip(1))
    early = "ld.shared.b32 %r8, [%r2+4];"
    with pytest.raises(EmulatorError) as caught:
        launch(kernel(body.format(early=early), 2), x, out)
    assert (caught.value.check, caught.value.text) == ("async copy in flight", early)

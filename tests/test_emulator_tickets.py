"""CTAs that wait for each other in the order of tickets: what a backward that adds up its blocks'
parts in a fixed order rests on. The ordered form ends, is silent and counts the same however the
launch is run; each form that lacks a part of the order is a race between CTAs."""

import re

import pytest
import torch
from emulator_ptx import kernel, launch

from llmkern.emulator import EmulatorError

CTAS, BLOCK = 12, 64

# p0: sum [BLOCK], p1: tickets given, p2: whose turn it is. %r1: this CTA's ticket. What a thread
# leaves depends on the order: sum = 3 * sum + ticket.
TAKE_A_TICKET = """
  .shared .align 4 .b8 mine[4];
  mov.u32 %r2, mine;
  setp.eq.u32 %p1, %r40, 0;
  @!%p1 bra GIVEN;
  atom.global.gpu.relaxed.add.u32 %r1, [%d41], 1;
  st.shared.u32 [%r2], %r1;
GIVEN:
  bar.sync 0;
  ld.shared.u32 %r1, [%r2];
  mad.wide.u32 %d1, %r40, 4, %d40;
"""
WAIT = """
  @!%p1 bra MY_TURN;
SPIN:
  ld.acquire.gpu.global.u32 %r3, [%d42];
  setp.ne.u32 %p2, %r3, %r1;
  @%p2 bra SPIN;
MY_TURN:
  bar.sync 0;
"""
ADD = """
  ld.global.u32 %r4, [%d1];
  mad.lo.u32 %r4, %r4, 3, %r1;
  st.global.u32 [%d1], %r4;
"""
NEXT = """
  bar.sync 0;
  @%p1 red.release.gpu.global.add.u32 [%d42], 1;
"""
ORDERED = TAKE_A_TICKET + WAIT + ADD + NEXT
LOAD = "ld.acquire.gpu.global.u32 %r3, [%d42];"
RED = "@%p1 red.release.gpu.global.add.u32 [%d42], 1;"
FENCED_LOAD = "ld.relaxed.gpu.global.u32 %r3, [%d42];\n  fence.acq_rel.gpu;"
FENCED_RED = "fence.acq_rel.gpu;\n  @%p1 red.relaxed.gpu.global.add.u32 [%d42], 1;"

IN_ORDER = {
    "acquire and release": ORDERED,
    "fences": ORDERED.replace(LOAD, FENCED_LOAD).replace(RED, FENCED_RED),
    "atomics": ORDERED.replace(LOAD, "atom.acquire.gpu.global.add.u32 %r3, [%d42], 0;").replace(
        RED, "@%p1 atom.acq_rel.gpu.global.exch.b32 %r5, [%d42], %r6;"
    ).replace("bar.sync 0;\n  @", "bar.sync 0;\n  add.u32 %r6, %r1, 1;\n  @"),
    "volatile, as __threadfence() wants it": ORDERED.replace(
        LOAD, "ld.volatile.global.u32 %r3, [%d42];"
    ).replace(RED, "membar.gl;\n  @%p1 red.global.add.u32 [%d42], 1;"),
}  # fmt: skip

RACES = {
    "nobody waits": TAKE_A_TICKET + ADD + NEXT,
    "the wait acquires nothing": ORDERED.replace("ld.acquire", "ld.relaxed"),
    "an atomic wait acquires nothing": ORDERED.replace(
        LOAD, "atom.relaxed.gpu.global.add.u32 %r3, [%d42], 0;"
    ),
    "the wait acquires from its own CTA only": ORDERED.replace(
        "ld.acquire.gpu", "ld.acquire.cta"
    ),
    "the wait is a plain load": ORDERED.replace("ld.acquire.gpu", "ld"),
    "a fence of the CTA after the wait": ORDERED.replace(
        LOAD, FENCED_LOAD.replace("acq_rel.gpu", "acq_rel.cta")
    ),
    "the wait's fence comes before it": ORDERED.replace(
        LOAD, "fence.acq_rel.gpu;\n  ld.relaxed.gpu.global.u32 %r3, [%d42];"
    ),
    "nothing is released": ORDERED.replace("red.release", "red.relaxed"),
    "released to its own CTA only": ORDERED.replace("red.release.gpu", "red.release.cta"),
    "a fence of the CTA before the release": ORDERED.replace(
        RED, FENCED_RED.replace("acq_rel.gpu", "acq_rel.cta")
    ),
    "the release's fence comes after it": ORDERED.replace(
        RED, "@%p1 red.relaxed.gpu.global.add.u32 [%d42], 1;\n  fence.acq_rel.gpu;"
    ),
    "no barrier between the wait and the sum": ORDERED.replace(
        "MY_TURN:\n  bar.sync 0;", "MY_TURN:"
    ),
    "no barrier between the sum and the release": ORDERED.replace("\n  bar.sync 0;\n  @", "\n  @"),
    "the sum comes before the wait": TAKE_A_TICKET + ADD + WAIT + NEXT,
    "the sum comes after the release": TAKE_A_TICKET + WAIT + NEXT + ADD,
}  # fmt: skip


def run(body: str, **options) -> tuple[torch.Tensor, list]:
    total, given, turn = (torch.zeros(n, dtype=torch.int32) for n in (BLOCK, 1, 1))
    counts = launch(kernel(body, 3), total, given, turn, grid=CTAS, block=BLOCK, **options)
    assert given.item() == turn.item() == CTAS
    return total, counts


@pytest.mark.parametrize("name", IN_ORDER)
def test_ctas_in_the_order_of_tickets(name):
    want = 0
    for ticket in range(CTAS):
        want = 3 * want + ticket
    runs = [run(IN_ORDER[name], **how) for how in ({}, {"threads": 2}, {"seed": 5})]
    for total, counts in runs:
        assert total.tolist() == [want] * BLOCK
        assert counts == runs[0][1]


@pytest.mark.parametrize("how", [{}, {"threads": 2}, {"seed": 5}], ids=str)
@pytest.mark.parametrize("name", RACES)
def test_what_lacks_a_part_of_the_order_is_a_race(name, how):
    with pytest.raises(EmulatorError) as caught:
        run(RACES[name], **how)
    assert caught.value.check == "global race", caught.value
    tensors = "p[02]" if name == "the wait is a plain load" else "p0"
    assert re.search(f" {tensors} \\+ ", caught.value.message)

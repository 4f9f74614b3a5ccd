"""Loading PTX: unknown things are refused with their line, and no text crashes the process."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator_ptx import HEADER, kernel, launch

from llmkern.emulator import EmulatorError, Program, PtxError, _ext
from llmkern.errors import ArgumentError

REFUSED = [
    "frobnicate.b32 %r1, %r2;",
    "add.s32.wrong %r1, %r2, %r3;",
    "add.q32 %r1, %r2, %r3;",
    "add.s32 %r1, %r2;",
    "add.s32 %r1, %r2, %r3, %r4;",
    "add.s64 %r1, %r2, %r3;",
    "add.s32 %r1, %d2, %r3;",
    "add.s32 %p1, %r2, %r3;",
    "add.s32 %r99, %r2, %r3;",
    "add.s32 5, %r2, %r3;",
    "add.f32 %r1, %r2, 1;",
    "add.ftz.f64 %d1, %d2, %d3;",
    "max.u32 %r1, %r2, %r3, %r4;",
    "fma.f32 %r1, %r2, %r3, %r4;",
    "cvt.bf16.f32 %h1, %r1;",
    "cvt.s32.f32 %r1, %r2;",
    "cvt.rn.s64.s32 %d1, %r2;",
    "cvt.rna.bf16.f32 %h1, %r2;",
    "ld.global.b32 %r1, [%r2];",
    "ld.global.v3.b32 {%r1, %r2, %r3}, [%d1];",
    "ld.global.v2.b32 {%r1, %r2, %r3}, [%d1];",
    "ld.global.shared.b32 %r1, [%d1];",
    "ld.param.b64 %d1, [p7];",
    "ld.param.b64 %d1, [p0+8];",
    "st.const.b32 [%d1], %r1;",
    "mma.sync.aligned.m16n8k64.row.col.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r1}, {%r1};",
    "shfl.sync.sideways.b32 %r1, %r2, 1, 31, -1;",
    "shfl.bfly.b32 %r1, %r2, 1, 31;",
    "bra NOWHERE;",
    "@%r1 bra NOWHERE;",
    "setp.lt.b32 %p1, %r1, %r2;",
    "setp.ltu.s32 %p1, %r1, %r2;",
    "atom.global.add.s64 %d1, [%d2], %d3;",
    "wgmma.fence.sync.aligned;",
    "tcgen05.wait::ld.sync.aligned;",
    "call.uni f, (%r1);",
    "mov.b32 %r1, undeclared;",
    "mov.b32 %r1, 0f12;",
    "mov.b32 %r1, 0x1FFFFFFFFFFFFFFFF;",
    "cp.async.cg.shared.global [%r1], [%d1], 8;",
]


@pytest.mark.parametrize("statement", REFUSED)
def test_what_is_not_known_is_refused_with_its_line(statement):
    ptx = kernel("  // here\n  " + statement, 1)
    line = 1 + ptx[: ptx.index(statement)].count("\n")
    with pytest.raises(PtxError, match=f"PTX line {line}: "):
        Program(ptx)


@pytest.mark.parametrize(
    "text",
    [
        ".visible .entry k( {",
        HEADER + ".visible .entry k() { .reg .b32 %r<4>; add.s32 %r1, %r1, 1",
        HEADER + ".visible .entry k() { /* open",
        HEADER + '.file 1 "open',
        HEADER + ".shared .b8 x[99999999999999999999];",
        HEADER + ".visible .entry k() { L: L: ret; }",
        ".address_size 32",
        HEADER + "\x00\x01",
        HEADER + ".visible .entry k() { .reg .b32 %r<2>; mov.b32 %r1, {{%r1}}; }",
    ],
)
def test_broken_modules_are_refused(text):
    with pytest.raises(PtxError, match="PTX line"):
        Program(text)


def test_scopes_keep_their_registers_and_labels_apart():
    body = """
      mov.u32 %r1, 7;
      { .reg .b32 %r<2>; .reg .pred q; mov.u32 %r1, 9; setp.eq.u32 q, %r1, 9;
        @q bra IN; mov.u32 %r20, 1; IN: add.s32 %r20, %r1, 100; }
      { .reg .pred q; setp.eq.u32 q, %r1, 7; @q bra IN; mov.u32 %r20, 1; IN: }
      add.s32 %r20, %r20, %r1;
      st.global.b32 [%d40], %r20;"""
    out = torch.zeros(1, dtype=torch.int32)
    launch(kernel(body, 1), out, block=1)
    assert out.item() == 116


def test_source_places_come_with_file_and_inlining():
    body = """
      .loc 1 12 3
      mov.u32 %r1, 1;
      .loc 2 40 5, function_name $L__info0, inlined_at 1 13 7
      st.global.b32 [%d40+64], %r1;"""
    ptx = kernel(body, 1, module='.file 1 "/src/kernel.py"\n.file 2 "/src/helper.py"')
    with pytest.raises(EmulatorError) as caught:
        launch(ptx, torch.zeros(4))
    assert caught.value.source == "/src/helper.py:40, inlined at /src/kernel.py:13"


def test_arguments_are_checked():
    ptx = kernel("add.s32 %r1, %r40, 1;", 1, threads=64)
    with pytest.raises(ArgumentError, match="takes 1 arguments"):
        launch(ptx)
    with pytest.raises(ArgumentError, match="needs 64 threads"):
        launch(ptx, torch.zeros(1), block=32)
    with pytest.raises(ArgumentError, match="1 to 1024 threads"):
        launch(ptx, torch.zeros(1), block=2048)


FUZZ = """
import random, sys
sys.path[:0] = [{tests!r}, {root!r}]
from emulator_ptx import kernel
from llmkern.emulator import EmulatorError, Program, PtxError
from llmkern.emulator.program import Options
import test_emulator_checks as c, test_emulator_parser as p
texts = [kernel(body, 2, module=c.MODULE) for _, body, _, _ in c.CATALOGUE.values()]
texts = [c.variants(t)[0] for t in texts]
rng = random.Random({seed})
pieces = sorted(set(" ".join(texts).split())) + ["{{", "}}", "[", "]", ";", ",", "-", "|", "(", ")"]
pieces += [".v4", "%tid.x", "0f7fc00000", "99999999999", "_", "!", ".b8", ".align", ":"]
refused = 0
for _ in range({rounds}):
    text = rng.choice(texts)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:at] + text[at + rng.randint(1, 20):]
        elif kind == 1:
            text = text[:at] + rng.choice(pieces) + text[at:]
        elif kind == 2:
            words = text.split(" ")
            words[rng.randrange(len(words))] = rng.choice(pieces)
            text = " ".join(words)
        else:
            text = text[:at] + chr(rng.randrange(1, 127)) + text[at + 1:]
    try:
        program = Program(text)
    except PtxError:
        refused += 1
        continue
    try:  # what is still a kernel may do anything but crash
        options = Options(budget=500, threads=rng.choice([1, 2]), seed=rng.randrange(3))
        program.launch("k", 2, 64, c.arguments(), shared_bytes=256, options=options)
    except (EmulatorError, ValueError):
        pass
print(refused)
"""


def test_extension_needs_no_torch_and_exports_only_its_init():
    extension = Path(_ext.load().__file__)
    dynamic = subprocess.run(
        ["readelf", "--dynamic", "--dyn-syms", "--wide", extension], capture_output=True, text=True
    )
    assert dynamic.returncode == 0, dynamic.stderr
    assert not re.findall(r"NEEDED.*(?:torch|c10|python)", dynamic.stdout)
    symbols = [line.split() for line in dynamic.stdout.splitlines() if " GLOBAL " in line]
    assert not [s for s in symbols if re.search(r"torch|c10|_ZN2at", s[-1])]
    ours = [s[-1] for s in symbols if "UND" not in s and "llmkern" in s[-1]]
    assert not ours, ours


def test_mutated_modules_never_crash():
    tests = Path(__file__).resolve().parent
    seed = random.Random(0).randrange(1000)
    code = FUZZ.format(tests=str(tests), root=str(tests.parent), seed=seed, rounds=3000)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert 1000 < int(run.stdout) < 3000

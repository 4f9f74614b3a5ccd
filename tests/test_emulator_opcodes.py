"""Every form of every instruction that Triton 3.7 emits for sm_80 and nvcc 13 for compute_80 is
known, with the forms that Triton adds for sm_120. What they compute: the other test_emulator files.
"""

import re

import pytest
from emulator_ptx import kernel

from llmkern.emulator import Program, PtxError

LETTER = {16: "h", 32: "r", 64: "d"}


def register(kind: str, i: int) -> str:
    """Register i of a type's size."""
    if kind == "pred":
        return f"%p{i}"
    pair = kind.endswith("x2")
    size = int(re.sub(r"\D*(\d+)(x2)?", r"\1", kind)) * (2 if pair else 1)
    return f"%{LETTER[max(size, 16)]}{i}"


# opcode: (forms, how many sources of the last type)
ARITHMETIC = {
    "add": ("s64 s32 f32 f16 u64 rn.f32 u32 rz.f32 f16x2 bf16 bf16x2 f64", 2),
    "sub": ("f32 s32 s64 f16x2 f64", 2),
    "mul": ("f32 lo.s32 lo.s64 hi.u32 rn.f32 rn.ftz.f32 f64 f16x2 hi.u64 hi.s32 bf16x2", 2),
    "div": ("full.f32 s32 rn.f32 approx.f32 s64 u32", 2),
    "rem": ("s32 u32 s64 u64", 2),
    "max": ("f32 s32 f16x2 bf16x2 u32 NaN.f32", 2),
    "min": ("f32 s32 f16x2 u32 NaN.f32", 2),
    "and": ("b32 pred b64 b16", 2),
    "or": ("b32 b64 b16 pred", 2),
    "xor": ("b32 pred", 2),
    "copysign": ("f32", 2),
    "fma": ("rn.ftz.f32 rn.f32 rn.f16x2 rn.bf16x2 rn.bf16 rn.relu.f16x2 rm.f32 rz.f32", 3),
    "mad": ("lo.s32 lo.s64", 3),
    "abs": ("ftz.f32 f32 f16x2 s32", 1),
    "neg": ("f32 s32 f16x2 bf16x2", 1),
    "not": ("b32 pred", 1),
    "mov": ("b32 u32 f32 u16 b16 u64 b64 pred", 1),
    "ex2": ("approx.ftz.f32 approx.f32", 1),
    "lg2": ("approx.ftz.f32 approx.f32", 1),
    "rcp": ("approx.ftz.f32 rn.f32", 1),
    "sqrt": ("approx.ftz.f32 rn.f32", 1),
    "rsqrt": ("approx.f32 approx.ftz.f32", 1),
    "sin": ("approx.f32", 1),
    "tanh": ("approx.f32", 1),
    "brev": ("b32", 1),
    "sad": ("s32", 3),
}

COMPARISONS = (
    "lt.s32 lt.s64 eq.b32 ge.f32 gt.f32 ltu.f32 ge.s32 leu.f32 le.s64 gt.s32 gt.s64 ne.b64 "
    "lt.u32 ne.b32 ne.s32 eq.f32 eq.s32 num.f32 lt.f32 eq.b64 gt.u32 ne.b16 lt.u64 eq.s64 "
    "eq.s16 neu.f32 gtu.f32 ne.u32 ne.s16 geu.f32 ge.u32 gt.s16"
).split()

CONVERSIONS = (
    "s64.s32 rn.bf16x2.f32 rn.f16x2.f32 f32.bf16 f32.f16 u64.u32 rn.bf16.f32 rna.tf32.f32 "
    "rn.f32.s32 u32.u64 s16.s8 rn.f16.f32 u32.u16 u16.u32 rni.f32.f32 rn.f64.s64 rn.f32.f64 "
    "rzi.f32.f32 rz.f16.f32 rzi.s16.f32 rni.ftz.s32.f32 rn.f32.u32 sat.f32.f32 rni.s32.f32 "
    "rzi.s32.f32 rmi.f32.f32 f64.f32 rn.satfinite.e5m2x2.f32 rn.satfinite.e4m3x2.f32 "
    "rn.f16x2.e5m2x2 rn.f16x2.e4m3x2"
).split()

MMA = {  # shape and types: registers of d, a, b, c
    "m16n8k16.row.col.f32.bf16.bf16.f32": (4, 4, 2, 4),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (4, 4, 2, 4),
    "m16n8k16.row.col.f32.f16.f16.f32": (4, 4, 2, 4),
    "m16n8k16.row.col.f16.f16.f16.f16": (2, 4, 2, 2),
    "m16n8k32.row.col.satfinite.s32.s8.s8.s32": (4, 4, 2, 4),
    "m16n8k32.row.col.s32.s8.s8.s32": (4, 4, 2, 4),
    "m16n8k8.row.col.f32.f16.f16.f32": (4, 2, 1, 4),
}

ATOMICS = (
    "global.add.f32 global.gpu.acq_rel.exch.b32 global.gpu.acq_rel.add.f32 "
    "global.gpu.acq_rel.max.s32 global.gpu.acq_rel.min.u32 global.gpu.acq_rel.or.b32 "
    "global.acq_rel.gpu.cas.b32 global.gpu.acq_rel.add.u32 acq_rel.gpu.global.cas.b32 "
    "global.gpu.acq_rel.add.noftz.f16 global.cas.b32 global.add.u32 global.max.s32 "
    "shared.add.u32 global.add.f64 global.inc.u32"
).split()

OTHERS = """
mul.wide.s32 %d1, %r1, %r2;
mul.wide.u32 %d1, %r1, %r2;
mad.wide.s32 %d1, %r1, %r2, %d2;
mad.wide.u32 %d1, %r1, %r2, %d2;
mad.lo.cc.u32 %r1, %r2, %r3, %r4;
madc.hi.u32 %r1, %r2, %r3, %r4;
selp.f32 %r1, %r2, %r3, %p1;
selp.b32 %r1, %r2, %r3, %p1;
selp.b16 %h1, %h2, %h3, %p1;
selp.b64 %d1, %d2, %d3, %p1;
selp.u16 %h1, %h2, %h3, %p1;
shl.b32 %r1, %r2, 3;
shl.b64 %d1, %d2, 3;
shl.b16 %h1, %h2, 3;
shr.u32 %r1, %r2, 3;
shr.s32 %r1, %r2, 3;
shr.u64 %d1, %d2, 3;
shr.s64 %d1, %d2, 3;
shr.u16 %h1, %h2, 3;
bfe.u32 %r1, %r2, 3, 4;
bfe.s32 %r1, %r2, 3, 4;
bfi.b32 %r1, %r2, %r3, 3, 4;
bfi.b64 %d1, %d2, %d3, 3, 4;
bfind.shiftamt.u32 %r1, %r2;
prmt.b32 %r1, %r2, %r3, 0x5410;
shf.l.wrap.b32 %r1, %r2, %r3, 7;
popc.b32 %r1, %r2;
clz.b32 %r1, %r2;
dp4a.s32.s32 %r1, %r2, %r3, %r4;
set.eq.f16x2.f16x2 %r1, %r2, %r3;
set.gt.u32.f16x2 %r1, %r2, %r3;
set.gt.f32.f32 %r1, %r2, %r3;
mov.b32 %r1, {%h1, %h2};
mov.b32 {%h1, %h2}, %r1;
mov.b64 %d1, {%r1, %r2};
cvta.to.global.u64 %d1, %d2;
cvta.global.u64 %d1, %d2;
cvta.local.u64 %d1, %d2;
ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];
ld.global.b16 %h1, [%d1];
ld.global.b8 %h1, [%d1];
ld.global.nc.u16 %h1, [%d1];
ld.global.nc.f32 %r1, [%d1];
ld.global.nc.v4.f32 {%r1, %r2, %r3, %r4}, [%d1];
ld.global.L1::evict_last.b32 %r1, [%d1];
ld.volatile.global.u32 %r1, [%d1];
ld.acquire.gpu.global.u32 %r1, [%d1];
ld.shared.v2.b32 {%r1, %r2}, [%r3];
ld.shared.v4.b16 {%h1, %h2, %h3, %h4}, [%r3];
ld.shared.b64 %d1, [%r3];
ld.shared.b8 %h1, [%r3];
st.shared.v4.f32 [%r1], {%r1, %r2, %r3, %r4};
st.shared.v4.b16 [%r1], {%h1, %h2, %h3, %h4};
st.shared.b8 [%r1], %h1;
st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};
st.global.b16 [%d1], %h1;
st.global.u8 [%d1], %h1;
st.release.gpu.global.u32 [%d1], %r1;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];
ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];
ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r5];
stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r1, %r2, %r3, %r4};
shfl.sync.bfly.b32 %r1, %r2, 16, 31, -1;
shfl.sync.idx.b32 %r1|%p1, %r2, %r3, 31, -1;
shfl.sync.up.b32 %r1, %r2, 1, 0, -1;
shfl.sync.down.b32 %r1, %r2, 1, 31, -1;
cp.async.cg.shared.global [%r1], [%d1], 16, %r2;
cp.async.ca.shared.global [%r1], [%d1], 8;
cp.async.commit_group;
cp.async.wait_group 3;
bar.sync 0;
bar.sync 1, 64;
bar.arrive 1, 64;
bar.warp.sync -1;
bar.red.popc.u32 %r1, 0, %p1;
bar.red.or.pred %p1, 0, %p2;
bar.red.and.pred %p1, 0, %p2;
barrier.sync 0;
barrier.sync.aligned 1, 64;
redux.sync.add.s32 %r1, %r2, -1;
redux.sync.max.s32 %r1, %r2, -1;
vote.sync.ballot.b32 %r1, %p1, -1;
vote.sync.any.pred %p1, %p2, -1;
vote.sync.all.pred %p1, %p2, -1;
match.any.sync.b32 %r1, %r2, -1;
activemask.b32 %r1;
membar.gl;
fence.acq_rel.gpu;
fence.sc.sys;
nanosleep.u32 %r1;
trap;
ret;
exit;
mov.u32 %r1, %clock;
mov.u64 %d1, %globaltimer;
add.rn.f32x2 %d1, %d2, %d3;
mul.rn.f32x2 %d1, %d2, %d3;
fma.rn.f32x2 %d1, %d2, %d3, %d4;
add.rn.f32.bf16 %r1, %h1, %r2;
sub.rn.f32.bf16 %r1, %h1, %r2;
max.f32 %r1, %r2, %r3, %r4;
min.f32 %r1, %r2, %r3, %r4;
wmma.load.a.sync.aligned.row.m16n16k16.global.f16 {8}, [%d1], %r9;
wmma.load.b.sync.aligned.row.m16n16k16.global.f16 {8}, [%d1], %r9;
wmma.store.d.sync.aligned.row.m16n16k16.global.f32 [%d1], {8}, %r9;
""".strip().splitlines()


def statements():
    for opcode, (forms, sources) in ARITHMETIC.items():
        for form in forms.split():
            kind = form.split(".")[-1]
            operands = ", ".join(register(kind, i) for i in range(sources + 1))
            yield f"{opcode}.{form} {operands};"
    for form in COMPARISONS:
        kind = form.split(".")[-1]
        yield f"setp.{form} %p1, {register(kind, 1)}, {register(kind, 2)};"
    for form in CONVERSIONS:
        to, source = form.split(".")[-2:]
        narrow = {"e5m2x2": "b16", "e4m3x2": "b16", "tf32": "b32"}
        pair = to.endswith("x2") and source == "f32"
        sources = [register(narrow.get(source, source), i) for i in range(2, 4 if pair else 3)]
        yield f"cvt.{form} {register(narrow.get(to, to), 1)}, {', '.join(sources)};"
    for form, counts in MMA.items():
        parts = [", ".join(f"%r{i}" for i in range(n)) for n in counts]
        yield f"mma.sync.aligned.{form} {', '.join('{' + p + '}' for p in parts)};"
    for form in ATOMICS:
        kind = form.split(".")[-1]
        values = ", ".join(register(kind, i) for i in range(2, 4 if ".cas" in form else 3))
        address = "%r9" if form.startswith("shared") else "%d9"
        yield f"atom.{form} {register(kind, 1)}, [{address}], {values};"
    eight = "{" + ", ".join(f"%r{i}" for i in range(1, 9)) + "}"
    yield from (statement.replace("{8}", eight) for statement in OTHERS)


def test_every_form_that_compilers_emit_is_known():
    refused = {}
    for statement in statements():
        try:
            Program(kernel("  " + statement, 1))
        except PtxError as error:
            refused[statement] = str(error)
    assert not refused


@pytest.mark.parametrize("opcode", ["wgmma.fence.sync.aligned", "tcgen05.wait::ld.sync.aligned"])
def test_instructions_of_later_architectures_are_refused(opcode):
    with pytest.raises(PtxError):
        Program(kernel(f"  {opcode};", 0))

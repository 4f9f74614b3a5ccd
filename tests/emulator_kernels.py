"""Triton kernels that tests/test_emulator_triton.py runs on the emulator.

Run as a script, in a process without TRITON_INTERPRET (which would keep Triton from compiling):
prints one line of JSON for each case.
"""

import contextlib
import io
import json
import sys

import torch
import triton
import triton.language as tl

from llmkern import emulator, target


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, shift, MASK: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = offsets < n
    if MASK:
        x = tl.load(x_ptr + offsets, mask=keep)
    else:
        x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets, mask=keep)
    tl.store(out_ptr + offsets + shift, x + y, mask=keep)


@triton.jit
def norm_kernel(x_ptr, w_ptr, b_ptr, out_ptr, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    keep = columns < n
    x = tl.load(x_ptr + row * n + columns, mask=keep, other=0.0).to(tl.float32)
    centred = tl.where(keep, x - tl.sum(x, axis=0) / n, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / n + eps)
    w = tl.load(w_ptr + columns, mask=keep).to(tl.float32)
    b = tl.load(b_ptr + columns, mask=keep).to(tl.float32)
    y = centred * rstd * w + b
    tl.store(out_ptr + row * n + columns, y.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_at = a_ptr + rows[:, None] * K + depth[None, :]
    b_at = b_ptr + depth[:, None] * N + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_at, mask=(rows[:, None] < M) & (depth[None, :] < K - k), other=0.0)
        b = tl.load(b_at, mask=(depth[:, None] < K - k) & (columns[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        a_at += BLOCK_K
        b_at += BLOCK_K * N
    c_at = c_ptr + rows[:, None] * N + columns[None, :]
    keep = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c_at, acc.to(c_ptr.dtype.element_ty), mask=keep)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    S,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    base = tl.program_id(1).to(tl.int64) * S * D
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, D)
    at = base + rows[:, None] * D + depth[None, :]
    q = tl.load(q_ptr + at, mask=rows[:, None] < S, other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for n in range(0, tl.minimum((tile + 1) * BLOCK_M, S), BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k_at = k_ptr + base + keys[None, :] * D + depth[:, None]
        k = tl.load(k_at, mask=keys[None, :] < S, other=0.0)
        s = tl.dot(q, k) * (scale * 1.44269504)
        s = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] < S), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s - new_top[:, None])
        alpha = tl.math.exp2(top - new_top)
        total = total * alpha + tl.sum(p, 1)
        v_at = v_ptr + base + keys[:, None] * D + depth[None, :]
        v = tl.load(v_at, mask=keys[:, None] < S, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        top = new_top
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=rows[:, None] < S)


@triton.jit
def locked_sum_kernel(x_ptr, out_ptr, lock_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(out_ptr, tl.load(out_ptr) + tl.sum(x, axis=0))
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def histogram_kernel(x_ptr, out_ptr, sum_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = offsets < n
    x = tl.load(x_ptr + offsets, mask=keep, other=0)
    tl.atomic_add(out_ptr + x, 1, mask=keep)
    tl.atomic_add(sum_ptr, tl.sum(x.to(tl.float32), axis=0))
    tl.atomic_max(sum_ptr + 1, tl.max(x, axis=0).to(tl.float32))


@triton.jit
def order_kernel(x_ptr, sorted_ptr, sums_ptr, best_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(sorted_ptr + offsets, tl.sort(x))
    tl.store(sums_ptr + offsets, tl.cumsum(x, 0))
    tl.store(best_ptr, tl.argmax(x, 0))


@triton.jit
def random_kernel(out_ptr, seed, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.rand(seed, offsets))


@triton.jit
def fp8_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x.to(tl.float8e5).to(tl.float32))


@triton.jit
def fp8_e4m3_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x.to(tl.float8e4nv).to(tl.float32))


@triton.jit
def printing_kernel(x_ptr):
    x = tl.load(x_ptr + tl.program_id(0))
    tl.device_print("x is", x)


@triton.jit
def overlapping_kernel(out_ptr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    offsets = tile * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.zeros((BLOCK,), tl.int32) + tile)


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def matmul(dtype, m, n, k, *, acc=tl.float32, precision="tf32", out=None, stages=3):
    if dtype == torch.int8:
        a, b = (torch.randint(-9, 9, size, dtype=dtype) for size in ((m, k), (k, n)))
    else:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    c = torch.empty(m, n, dtype=out or dtype)
    grid = (triton.cdiv(m, 64), triton.cdiv(n, 64))
    options = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_stages": stages}
    matmul_kernel[grid](a, b, c, m, n, k, ACC=acc, PRECISION=precision, **options)
    return error_of(c, a.double() @ b.double())


def attention(dtype, s):
    q, k, v = (torch.randn(2, s, 64).to(dtype) for _ in range(3))
    out = torch.empty_like(q)
    attention_kernel[(triton.cdiv(s, 64), 2)](q, k, v, out, s, 0.125, 64, 64, 32)
    wide = (t.double() for t in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    return error_of(out, want)


def norm(dtype, n=1000):
    x, w, b = torch.randn(7, n).to(dtype), torch.randn(n), torch.randn(n)
    out = torch.empty_like(x)
    norm_kernel[(7,)](x, w, b, out, n, 1e-5, BLOCK=1024)
    want = torch.nn.functional.layer_norm(x.double(), (n,), w.double(), b.double(), 1e-5)
    return error_of(out, want)


def add(shift=0, mask=True):
    x, y = torch.randn(5000), torch.randn(5000)
    out = torch.empty(5000)
    add_kernel[(5,)](x, y, out, 5000, shift, MASK=mask, BLOCK=1024)
    return error_of(out, x + y)


def locked():
    x, out, lock = torch.randn(2000), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    locked_sum_kernel[(8,)](x, out, lock, 2000, BLOCK=256)
    return error_of(out, x.double().sum().view(1))


def histogram():
    x = torch.randint(0, 10, (1000,), dtype=torch.int32)
    out, sums = torch.zeros(10, dtype=torch.int32), torch.zeros(2)
    histogram_kernel[(4,)](x, out, sums, 1000, BLOCK=256)
    assert torch.equal(out, torch.bincount(x, minlength=10).int())
    return error_of(sums, torch.tensor([x.sum(), x.max()]))


def order():
    x = torch.randperm(256).float()
    results = torch.empty(256), torch.empty(256), torch.empty(1, dtype=torch.int32)
    order_kernel[(1,)](x, *results, BLOCK=256)
    assert torch.equal(results[0], x.sort().values)
    assert results[2].item() == x.argmax().item()
    return error_of(results[1], x.cumsum(0))


def uniform():
    out = torch.empty(1024)
    random_kernel[(1,)](out, 7, BLOCK=1024)
    assert 0 <= out.min() and out.max() < 1
    return abs(out.mean().item() - 0.5) / 10


def fp8():
    x = torch.randn(256)
    out = torch.empty(256)
    fp8_kernel[(1,)](x, out, BLOCK=256)
    return error_of(out, x.to(torch.float8_e5m2).float())


def fp8_e4m3():
    x = torch.randn(256)
    out = torch.empty(256)
    fp8_e4m3_kernel[(1,)](x, out, BLOCK=256)
    half = x.half()  # Triton's way there before sm_100: float16 by truncation, then to the nearest
    away = half.float().abs() > x.abs()
    half = torch.where(away, (half.view(torch.int16) - 1).view(torch.float16), half)
    twice, once = (t.to(torch.float8_e4m3fn).float() for t in (half, x))
    return error_of(out, torch.where(out == once, once, twice))


def printing():
    printing_kernel[(3,)](torch.tensor([1.5, -2.0, 40.0]), num_warps=1)
    return 0.0


def overlapping():
    overlapping_kernel[(4,)](torch.zeros(640, dtype=torch.int32), BLOCK=256)
    return 1.0


@triton.jit
def tickets_kernel(
    total_ptr, given_ptr, turn_ptr, ORDER: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr
):
    ticket = tl.atomic_add(given_ptr, 1, sem="relaxed")
    while tl.atomic_add(turn_ptr, 0, sem=ORDER) != ticket:
        pass
    offsets = tl.arange(0, BLOCK)
    total = tl.load(total_ptr + offsets)
    tl.store(total_ptr + offsets, total * 3 + ticket)
    if BARRIER:  # Triton puts none of its own between a store and a release
        tl.debug_barrier()
    tl.atomic_add(turn_ptr, 1, sem="release")


def tickets(order="acquire", barrier=True):
    total, given, turn = (torch.zeros(n, dtype=torch.int32) for n in (512, 1, 1))
    tickets_kernel[(4,)](total, given, turn, order, barrier, BLOCK=512)
    return (total - 18).abs().max().item()  # ((0 * 3 + 1) * 3 + 2) * 3 + 3


CASES = {
    "add": add,
    "norm f32": lambda: norm(torch.float32),
    "norm bf16": lambda: norm(torch.bfloat16),
    "norm f16": lambda: norm(torch.float16),
    "matmul bf16": lambda: matmul(torch.bfloat16, 128, 128, 96),
    "matmul bf16 odd": lambda: matmul(torch.bfloat16, 70, 90, 50),
    "matmul f16": lambda: matmul(torch.float16, 128, 64, 64),
    "matmul f16 in f16": lambda: matmul(torch.float16, 64, 64, 32, acc=tl.float16),
    "matmul tf32": lambda: matmul(torch.float32, 64, 128, 64),
    "matmul tf32x3": lambda: matmul(torch.float32, 64, 64, 64, precision="tf32x3"),
    "matmul ieee": lambda: matmul(torch.float32, 64, 64, 64, precision="ieee"),
    "matmul int8": lambda: matmul(torch.int8, 64, 64, 64, acc=tl.int32, out=torch.int32),
    "matmul one stage": lambda: matmul(torch.bfloat16, 64, 64, 64, stages=1),
    "attention bf16": lambda: attention(torch.bfloat16, 128),
    "attention f16 odd": lambda: attention(torch.float16, 77),
    "attention f32": lambda: attention(torch.float32, 64),
    "lock": locked,
    "tickets": tickets,
    "histogram": histogram,
    "sort, scan and argmax": order,
    "random": uniform,
    "fp8": fp8,
    "fp8 e4m3": fp8_e4m3,
    "print": printing,
    "bug: unmasked load": lambda: add(mask=False),
    "bug: shifted store": lambda: add(shift=1),
    "bug: overlapping tiles": overlapping,
    "bug: relaxed wait": lambda: tickets(order="relaxed"),
    "bug: no barrier before release": lambda: tickets(barrier=False),
}

REPEATED = ("norm bf16", "attention bf16", "matmul bf16 odd", "tickets")


def run(name: str, architecture: str, **options) -> dict:
    torch.manual_seed(0)
    result = {"name": name, "architecture": architecture, "before": target.emulated()}
    try:
        with emulator.device(architecture, **options) as dev:
            result["inside"] = target.emulated()
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                result["error"] = CASES[name]()
        assert shown.getvalue() == dev.printed
        result["printed"] = dev.printed
        total = dev.counters().total
        result["instructions"] = total.instructions
        result["mma"] = dev.counters().mma
        result["coalescing"], result["conflicts"] = total.coalescing, total.conflicts
        result["report"] = dev.report()
    except emulator.EmulatorError as stopped:
        result["check"], result["source"] = stopped.check, stopped.source
        result["message"] = stopped.message
    result["after"] = target.emulated()
    return result


def main() -> None:
    driver = triton.runtime.driver._active
    for name in CASES:
        if name == "fp8 e4m3":
            continue
        print(json.dumps(run(name, "sm_80", threads=1)), flush=True)
    for name in (*REPEATED, "bug: shifted store"):
        print(json.dumps(run(name, "sm_80", threads=2, seed=9)), flush=True)
    for architecture in ("sm_86", "sm_89", "sm_90", "sm_120"):
        print(json.dumps(run("norm bf16", architecture, threads=1)), flush=True)
        if architecture != "sm_86":  # float8e4nv came with sm_89
            print(json.dumps(run("fp8 e4m3", architecture, threads=1)), flush=True)
    print(json.dumps(run("matmul bf16", "sm_120", threads=1)), flush=True)
    assert triton.runtime.driver._active is driver


if __name__ == "__main__":
    sys.exit(main())

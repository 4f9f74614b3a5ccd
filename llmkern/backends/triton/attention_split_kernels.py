"""Attention of few queries to many keys: `attention_fwd` runs on ranges of keys side by side, and
this kernel joins their results. out = sum_n exp(lse_n - lse) out_n, lse = log(exp(sink) + sum_n
exp(lse_n)); a range in which a row sees nothing has out_n = 0, lse_n = -inf.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.attention_mask_kernels import INFINITY, LN2, LOG2E


@triton.jit(do_not_specialize=["rows", "q_len", "parts"])
def attention_combine(
    part_out,
    part_lse,
    sinks,
    out,
    lse,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    heads,
    q_len,
    rows,
    parts,
    FORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part_out [parts, rows, Dv] float32, part_lse [parts, rows]; row (b * H + h) * S + i."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, FORM.block_dv)
    live = r < rows
    i = r % q_len
    head = r // q_len % heads
    b = r // q_len // heads
    top = tl.full([BLOCK_R], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    if FORM.sinks:
        top = tl.load(sinks + head, mask=live, other=0.0)
        total = tl.where(top == -INFINITY, 0.0, 1.0)
    width: tl.constexpr = FORM.block_dv
    acc = tl.zeros([BLOCK_R, width], tl.float32)
    for n in range(parts):
        at = tl.cast(n, tl.int64) * rows + r
        part = tl.load(part_lse + at, mask=live, other=-INFINITY)
        inside = live[:, None] & (c < FORM.value_dim)[None, :]
        at = part_out + at[:, None] * FORM.value_dim + c[None, :]
        rows_of = tl.load(at, mask=inside, other=0.0)
        higher = tl.maximum(top, part)
        least = tl.where(higher == -INFINITY, 0.0, higher)
        fade = tl.exp2((top - least) * LOG2E)
        weight = tl.exp2((part - least) * LOG2E)
        total = total * fade + weight
        acc = acc * fade[:, None] + rows_of * weight[:, None]
        top = higher
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(lse + r, top + tl.log2(total) * LN2, mask=live)
    at = b * out_stride_b + head * out_stride_h + i * out_stride_s
    tl.store(out + at[:, None] + c[None, :], acc.to(out.dtype.element_ty),
             mask=live[:, None] & (c < FORM.value_dim)[None, :])  # fmt: skip

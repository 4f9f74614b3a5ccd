"""Activations and their gradients; formulas: csrc/include/llmkern/activation.h.

act and d_act serve linear epilogues as well; both take and give float32. Far out, where a function
is at its limit and its formula would be inf * 0, x is held at a bound. The kernels compute f(x), or
dy * f'(x) where dy is given; for relu, x may then be its output.
"""

import triton
import triton.language as tl

_SILU_LIMIT = tl.constexpr(104.0)  # e^-104 is 0 in float32
_GELU_LIMIT = tl.constexpr(14.5)  # and 1 - Phi(14.5)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
# gelu_tanh: (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), with 2u = x (_LINEAR + _CUBIC x^2)
_LINEAR = tl.constexpr(1.5957691216057307)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.07135481627260025)  # 0.044715 of it


@triton.jit
def _above(x, LIMIT: tl.constexpr):
    """x, held at -LIMIT; NaN stays."""
    return tl.where(x < -LIMIT, -LIMIT, x)


@triton.jit
def _within(x, LIMIT: tl.constexpr):
    x = _above(x, LIMIT)
    return tl.where(x > LIMIT, LIMIT, x)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _sigmoid_and_slope(x):
    """s and s (1 - s), which would cancel near 1 if computed so."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x > 0.0, large, small), large * small


@triton.jit
def _normal(x):
    """Phi(x) and e^(-x^2/2). 1 - Phi(t) = e^(-t^2/2) R(t) with the rational R of
    csrc/cpu/simd/activation.h: 20 instructions where libdevice's erf takes 45, and the gradient has
    use for the exponential."""
    t = tl.minimum(tl.abs(x), _GELU_LIMIT)
    e = tl.exp(-0.5 * t * t)
    p = 3.99840139e-2 + 4.02016597e-3 * t
    p = 1.81306299e-1 + p * t
    p = 4.35685714e-1 + p * t
    p = 0.5 + p * t
    q = 1.00232441e-1 + 1.00769185e-2 * t
    q = 4.64379117e-1 + q * t
    q = 1.19448233 + q * t
    q = 1.66925635 + q * t
    q = 1.0 + q * t
    upper = e * p / q
    return tl.where(x > 0.0, 1.0 - upper, upper), e


@triton.jit
def act(x, ACTIVATION: tl.constexpr):
    """f(x) for "relu", "gelu", "gelu_tanh" or "silu"."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        x = _above(x, _SILU_LIMIT)
        y = x * _sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        x = _above(x, _GELU_LIMIT)
        y = x * _sigmoid(x * (_LINEAR + _CUBIC * x * x))
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        phi, _ = _normal(x)
        y = _above(x, _GELU_LIMIT) * phi
    return y


@triton.jit
def d_act(x, ACTIVATION: tl.constexpr):
    """f'(x)."""
    if ACTIVATION == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        x = _within(x, _SILU_LIMIT)
        s, slope = _sigmoid_and_slope(x)
        d = s + x * slope
    elif ACTIVATION == "gelu_tanh":
        x = _within(x, _GELU_LIMIT)
        square = x * x
        s, slope = _sigmoid_and_slope(x * (_LINEAR + _CUBIC * square))
        d = s + slope * x * (_LINEAR + 3.0 * _CUBIC * square)
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        phi, e = _normal(x)
        d = phi + _within(x, _GELU_LIMIT) * (_DENSITY * e)
    return d


@triton.jit
def _transform(x, dy, y, x_offset, dy_offset, y_offset, inside, ACTIVATION: tl.constexpr):
    """One tile. inside None: all of it is there."""
    value = tl.load(x + x_offset, mask=inside).to(tl.float32)
    if dy is None:
        result = act(value, ACTIVATION)
    else:
        gradient = tl.load(dy + dy_offset, mask=inside).to(tl.float32)
        if ACTIVATION == "relu":  # a select, so that Inf * 0 does not arise
            result = tl.where(value <= 0.0, 0.0, gradient)
        else:
            result = gradient * d_act(value, ACTIVATION)
    tl.store(y + y_offset, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["elements"])
def activation_flat(
    x, dy, y,
    elements,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dense memory in its order. A full block needs no mask, which would split the 16-byte loads
    where `elements` is no multiple of 16."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= elements:
        _transform(x, dy, y, offset, offset, offset, None, ACTIVATION)
    else:
        _transform(x, dy, y, offset, offset, offset, offset < elements, ACTIVATION)


@triton.jit(do_not_specialize=["rows"])
def activation_rows(
    x, dy, y,
    x_stride, dy_stride, y_stride,
    rows, cols,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[rows, cols] with column stride 1; grid (row blocks, column blocks)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[None, :]
    inside = (row < rows)[:, None] & (col < cols)
    x_offset = (row * x_stride)[:, None] + col
    dy_offset = (row * dy_stride)[:, None] + col
    y_offset = (row * y_stride)[:, None] + col
    _transform(x, dy, y, x_offset, dy_offset, y_offset, inside, ACTIVATION)

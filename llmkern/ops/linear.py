"""Linear layers with everything that follows the product done before its one store.

Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU variants improve
Transformer", 2020 (the gated form).
"""

import torch
from torch import Tensor

from llmkern import checks, dispatch, random, target
from llmkern.backends.reference import linear as reference
from llmkern.errors import ShapeError
from llmkern.ops.library import (
    define,
    direct,
    in_transform,
    no_second_derivative,
    plain_eager,
    untraced,
    wants_grad,
)
from llmkern.precision import tf32_allowed
from llmkern.specs import LinearSpec

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """y = dropout(act(input @ weight^T + bias)) + residual.

    Args:
        input: [*, K]; float32, bfloat16, float16 or float64, any strides.
        weight: [N, K], or [K] for a result without the last dim, as in torch.
        bias: [N].
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        residual: [*, N], added last; its dtype may be wider than input's, then so is the result.
        dropout_p: probability of an element to be dropped, in [0, 1]; ignored unless training.
        backend: name of the backend that must serve, else the best one does.

    Returns:
        [*, N] in input's dtype (under autocast, the autocast dtype). Sums are kept in float32
        (float64 for float64) and rounded once.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is allocated.
    """
    op = "linear"
    vector = isinstance(weight, Tensor) and weight.dim() == 1
    if vector:
        weight = weight.unsqueeze(0)
        bias = bias.reshape(1) if isinstance(bias, Tensor) and bias.dim() == 0 else bias
    dtype = _check(op, input, (("weight", weight),), (("bias", bias),), activation)
    checks.probability(op, "dropout_p", dropout_p)
    if residual is not None:
        _check_residual(op, input, weight, residual)
    input, weight, bias = (_cast(t, dtype) for t in (input, weight, bias))
    p = dropout_p if training else 0.0
    wider = residual is not None and residual.dtype != dtype
    y = _linear(
        input, weight, None, bias, None, None if wider else residual, activation, p, backend
    )
    if wider:
        y = residual + y
    return y.squeeze(-1) if vector else y


def linear_gated(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """y = act(input @ gate_weight^T + gate_bias) * (input @ up_weight^T + up_bias).

    SwiGLU with activation "silu", GEGLU with "gelu" (exact) or "gelu_tanh", ReGLU with "relu".

    Args:
        input: [*, K].
        gate_weight, up_weight: [N, K].
        gate_bias, up_bias: [N], both or neither.

    Returns and raises as `linear`.
    """
    op = "linear_gated"
    weights = (("gate_weight", gate_weight), ("up_weight", up_weight))
    biases = (("gate_bias", gate_bias), ("up_bias", up_bias))
    dtype = _check(op, input, weights, biases, activation)
    checks.one_of(op, "activation", activation, ACTIVATIONS[1:])
    if (gate_bias is None) != (up_bias is None):
        raise ShapeError(f"{op}: gate_bias and up_bias must be given both or neither")
    tensors = (_cast(t, dtype) for t in (input, gate_weight, up_weight, gate_bias, up_bias))
    return _linear(*tensors, None, activation, 0.0, backend)


def _check(op, input, weights, biases, activation) -> torch.dtype:
    """Raise on bad arguments; return the dtype to compute in (autocast's where it is on)."""
    checks.tensor(op, "input", input)
    checks.floating(op, "input", input)
    checks.one_of(op, "activation", activation, ACTIVATIONS)
    if input.dim() == 0:
        raise ShapeError(f"{op}: input must have at least 1 dim, got []")
    dtype = _compute_dtype(input)
    rows = None
    for name, weight in weights:
        checks.tensor(op, name, weight)
        checks.floating(op, name, weight)
        if weight.dim() != 2:
            raise ShapeError(f"{op}: {name} must have 2 dims, got {list(weight.shape)}")
        if rows is None and weight.shape[1] != input.shape[-1]:
            raise ShapeError(
                f"{op}: input's last dim must be {weight.shape[1]} (in_features: {name} is "
                f"{list(weight.shape)}), got {list(input.shape)}"
            )
        if weight.shape[1] != input.shape[-1]:
            raise ShapeError(
                f"{op}: {name} must be [{rows}, {input.shape[-1]}] as {weights[0][0]}, "
                f"got {list(weight.shape)}"
            )
        if rows is not None and weight.shape[0] != rows:
            raise ShapeError(f"{op}: {name} must have {rows} rows, got {list(weight.shape)}")
        rows = weight.shape[0]
        _same(op, name, weight, input, dtype)
    for name, bias in biases:
        if bias is not None:
            checks.tensor(op, name, bias)
            checks.shape(op, name, bias, (rows,), "rows of weight")
            _same(op, name, bias, input, dtype)
    return dtype


def _same(op: str, name: str, value: Tensor, input: Tensor, dtype: torch.dtype) -> None:
    checks.same_device(op, name, value, input)
    if value.dtype != input.dtype and _compute_dtype(value) != dtype:
        checks.dtype_in(op, name, value, (input.dtype,), "as input")


def _check_residual(op: str, input: Tensor, weight: Tensor, residual: Tensor) -> None:
    checks.tensor(op, "residual", residual)
    checks.floating(op, "residual", residual)
    expected = (*input.shape[:-1], weight.shape[0])
    checks.shape(op, "residual", residual, expected, "the shape of the product")
    checks.same_device(op, "residual", residual, input)


def _compute_dtype(t: Tensor) -> torch.dtype:
    """Autocast lowers every float but float64, as torch's linear does."""
    device = t.device.type
    if t.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return t.dtype
    return torch.get_autocast_dtype(device)


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _linear(x, weight, up_weight, bias, up_bias, residual, activation, dropout_p, backend):
    seed = random.draw_seed(x.device) if dropout_p > 0.0 else None
    tensors = (x, weight, up_weight, bias, up_bias, residual)
    eager = plain_eager(*tensors)
    grad = wants_grad(*tensors) if eager else torch.is_grad_enabled()
    keep_preact = activation is not None and grad
    args = (*tensors, seed, activation, dropout_p, keep_preact, backend)
    if not eager:
        if in_transform():
            spec = _spec(x, weight, up_weight, bias, residual, activation, dropout_p, False)
            return reference.forward(spec, *tensors, seed)[0]
        return torch.ops.llmkern.linear(*args)[0]
    if grad:
        return _LinearFunction.apply(*args)
    return _forward(*args)[0]


def _spec(
    x, weight, up_weight, bias, residual, activation, dropout_p, keep_preact, tf32=False
) -> LinearSpec:
    n, k = weight.shape
    rows = x.shape[:-1].numel()
    gated = up_weight is not None
    return LinearSpec(x.dtype, x.device.type, rows, n, k, activation, gated, bias is not None,
                      residual is not None, dropout_p, keep_preact, tf32)  # fmt: skip


def _tf32(x: Tensor) -> bool:
    """What the spec of a call says; asked for each, as torch's switch may be turned between."""
    on_gpu = x.device.type == "cuda" or target.emulated()
    return bool(on_gpu) and x.dtype == torch.float32 and tf32_allowed()


def _forward(
    x, weight, up_weight, bias, up_bias, residual, seed, activation, dropout_p, keep_preact, backend
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, preact, up_preact): what went into the activation and the gate, empty unless kept."""
    spec = _spec(x, weight, up_weight, bias, residual, activation, dropout_p, keep_preact, _tf32(x))
    module = dispatch.resolve("linear", spec, backend)
    return module.forward(spec, x, weight, up_weight, bias, up_bias, residual, seed)


def _backward(dy, x, weight, up_weight, preact, up_preact, seed, activation, dropout_p, wants,
              backend):  # fmt: skip
    """(dx, dweight, dup_weight, dbias, dup_bias), each empty where `wants` says no."""
    bias = weight if wants[3] or wants[4] else None
    kept = activation is not None
    spec = _spec(x, weight, up_weight, bias, None, activation, dropout_p, kept, _tf32(x))
    module = dispatch.resolve("linear", spec, backend)
    return module.backward(spec, dy, x, weight, up_weight, preact, up_preact, seed, wants)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    @untraced
    def forward(ctx, *args):
        y, preact, up_preact = _forward(*args)
        _setup_context(ctx, args, (y, preact, up_preact))
        return y

    @staticmethod
    @untraced
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            return _differentiable(ctx, dy)
        run = _backward if direct(dy) else torch.ops.llmkern.linear_backward
        return _gradients(ctx, dy, run)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, up_weight, bias, up_bias, residual, seed, *options = inputs
    _, preact, up_preact = output
    # bias and up_bias are saved for second derivatives alone; they cost no memory.
    ctx.save_for_backward(x, weight, up_weight, bias, up_bias, seed, preact, up_preact)
    ctx.activation, ctx.dropout_p, _, ctx.backend = options
    ctx.residual = residual is not None


def _gradients(ctx, dy, backward):
    """Gradients in the order of the op's arguments, from ctx as `_setup_context` left it."""
    x, weight, up_weight, _, _, seed, preact, up_preact = ctx.saved_tensors
    need = ctx.needs_input_grad
    wants = [need[0], need[1], need[2], need[3], need[4]]
    found = (None,) * 5
    if any(wants):
        found = backward(dy, x, weight, up_weight, preact, up_preact, seed, ctx.activation,
                         ctx.dropout_p, wants, ctx.backend)  # fmt: skip
    gradients = [g if w else None for g, w in zip(found, wants, strict=True)]
    dresidual = dy if ctx.residual and need[5] else None
    return (*gradients, dresidual, None, None, None, None, None)


def _differentiable(ctx, dy):
    """The same gradients as a graph of torch ops, for create_graph=True."""
    x, weight, up_weight, bias, up_bias, seed, _, _ = ctx.saved_tensors
    inputs = (x, weight, up_weight, bias, up_bias)
    need = ctx.needs_input_grad
    with torch.enable_grad():
        y = _formula(*inputs, seed, ctx.activation, ctx.dropout_p)
        wanted = [t for t, n in zip(inputs, need, strict=False) if n and t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
    gradients = [next(found) if n and t is not None else None
                 for t, n in zip(inputs, need, strict=False)]  # fmt: skip
    return (*gradients, dy if ctx.residual and need[5] else None, None, None, None, None, None)


def _formula(x, weight, up_weight, bias, up_bias, seed, activation, dropout_p) -> Tensor:
    functional = torch.nn.functional
    y = functional.linear(x, weight, bias)
    if activation == "gelu_tanh":
        y = functional.gelu(y, approximate="tanh")
    elif activation is not None:
        y = getattr(functional, activation)(y)
    if up_weight is not None:
        y = y * functional.linear(x, up_weight, up_bias)
    if dropout_p > 0.0:
        keep = random.flat_keep_mask(seed, tuple(y.shape), dropout_p)
        y = torch.where(keep, y * random.scale(dropout_p), 0.0)
    return y


def _autograd(ctx, dy, _dpreact, _dup_preact):
    return _gradients(ctx, dy, torch.ops.llmkern.linear_backward)


def _fake(
    x, weight, up_weight, bias, up_bias, residual, seed, activation, dropout_p, keep_preact, backend
):
    tensors, options = (x, weight, up_weight, bias, residual), (activation, dropout_p, keep_preact)
    dispatch.foresee("linear", lambda: _spec(*tensors, *options), backend)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    empty = x.new_empty(0)
    preact = torch.empty_like(y) if keep_preact else empty
    up_preact = (
        torch.empty_like(y) if keep_preact and up_weight is not None else torch.empty_like(empty)
    )
    return y, preact, up_preact


def _fake_backward(dy, x, weight, up_weight, preact, up_preact, seed, activation, dropout_p, wants,
                   backend):  # fmt: skip
    bias = weight.new_empty(weight.shape[0])
    outputs = (x, weight, up_weight, bias, bias)
    return tuple(
        t.new_empty(t.shape) if wanted and t is not None else x.new_empty(0)
        for t, wanted in zip(outputs, wants, strict=True)
    )


define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? up_weight, Tensor? bias, Tensor? up_bias, Tensor? residual, "
    "Tensor? seed, str? activation, float dropout_p, bool keep_preact, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)
define(
    "linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? up_weight, Tensor preact, Tensor up_preact, "
    "Tensor? seed, str? activation, float dropout_p, bool[] wants, str? backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    no_second_derivative("linear"),
)

"""Every name of torch that is not public API, in one place: what it is for, which versions have it,
and what stands in where it is missing. A missing one costs speed, never function.

"All" below means every supported torch (llmkern/supported.py). Modules bind these names at import
and call them without a wrapper: most are read several times in each kernel call. Attributes of
nn.Module that its subclasses share (`_parameters`, `_forward_hooks` ...) are not listed.

    name                                    versions  without it
    _C._len_torch_dispatch_stack            all       the length of the list of modes; without that
                                                      list too: plain torch formulas
    _C._len_torch_function_stack            all       as if a mode were on: the longer way in
    _C._is_tracing                          all       torch.jit.is_tracing
    _C.DisableTorchFunction                 all       modes stay on, and see each read of a shape
    _C.__file__                             all       the OpenMP runtime is looked for among
                                                      all of the process
    _C._has_storage                         all       backward goes through the dispatcher
    _C._dynamo.eval_frame
        .set_code_exec_strategy             all       dynamo compiles an eager graph's backward
    _C._functorch.peek_interpreter_stack    all       as if in a transform: plain torch formulas
    _C._functorch.get_interpreter_stack     all       the same, in compiled regions
    _C._functorch.TransformType             all       the same, in compiled regions
    autograd.forward_ad._current_level      all       forward_ad.make_dual is tried
    Function's base class has `apply`       all       Function.apply
    _dynamo_marked_constant                 all       dynamo traces the function
    _guards.TracingContext                  all       is_compiling; `explain` may list what a
                                                      compiler traced
    utils._python_dispatch
        ._get_current_dispatch_mode_stack   all       all objects are searched for FLOP counters
    _C._get_function_stack_at, _push_on
        _, _pop_torch_function_stack        all       what is checkpointed under override() is
                                                      recomputed outside it: a warning
    utils.checkpoint.CheckpointFunction,
        _CheckpointFrame                    all       the same, and under use_backend
    utils._python_dispatch
        .TorchDispatchMode                  all       the benchmark's gate allows no other branch
                                                      of a ReLU than the oracle's
    _subclasses.FakeTensor, functional_
        tensor.FunctionalTensor             all       torch.export(strict=False) holds torch's ops
    nn.modules.module._global_*_hooks       all       as if there were hooks: no submodules fused
    _C._nn.silu                             all       F.silu alone is rerouted
    ops.aten._unsafe_view                   all       a copy
    ops.aten._safe_softmax                  all       softmax and a second pass over the scores
    ops.mkldnn._linear_pointwise            all, with torch's own product, or ours
                                            oneDNN
"""

import gc
import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


def find(path: str, missing: Any) -> Any:
    """torch.<path>, or `missing` where this torch has no such name."""
    found: Any = torch
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            return missing
    return found


def _maybe() -> bool:
    """In place of a question that cannot be asked: yes, so that the slow and safe way is taken."""
    return True


class _NoModes:
    """In place of DisableTorchFunction: a context in which nothing changes."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


class _ForwardLevels:
    """In place of the module forward_ad: finds out whether a level of forward-mode AD is open."""

    @property
    def _current_level(self) -> int:
        one = torch.ones(())
        try:
            forward_ad.make_dual(one, one)
        except RuntimeError:  # no level exists
            return -1
        return 0


def _live_counters() -> list[Any]:
    """In place of the list of modes: every living object of torch's FLOP counter."""
    return [o for o in gc.get_objects() if type(o).__module__ == "torch.utils.flop_counter"]


def _softmax_with_zero_rows(scores: Tensor, dim: int) -> Tensor:
    hidden = (scores == -math.inf).all(dim, keepdim=True)
    return torch.softmax(scores.masked_fill(hidden, 0.0), dim).masked_fill(hidden, 0.0)


def _count_dispatch_modes() -> int:
    return len(_modes())


# The dispatch modes that are on; at least those which count FLOPs.
_modes = find("utils._python_dispatch._get_current_dispatch_mode_stack", None)
dispatch_modes: Callable[[], Iterable[Any]] = _modes or _live_counters

# How many modes are on. Callers ask for true or false only.
len_dispatch_stack: Callable[[], int] = find(
    "_C._len_torch_dispatch_stack", _count_dispatch_modes if _modes else _maybe
)
len_function_stack: Callable[[], int] = find("_C._len_torch_function_stack", _maybe)

_function_mode_at = find("_C._get_function_stack_at", None)
_push_function_mode = find("_C._push_on_torch_function_stack", None)
_pop_function_mode = find("_C._pop_torch_function_stack", None)

# Whether the modes of functions that are on can be listed and replaced.
function_modes_known = len_function_stack is not _maybe and None not in (
    _function_mode_at,
    _push_function_mode,
    _pop_function_mode,
)


class _ListedMode(TorchFunctionMode):
    """In place of TorchFunctionMode where torch's list cannot be read: keeps one of its own."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        _listed().append(self)
        return entered

    def __exit__(self, *error: Any) -> None:
        _listed().pop()
        super().__exit__(*error)


_thread = threading.local()


def _listed() -> list[TorchFunctionMode]:
    if not hasattr(_thread, "modes"):
        _thread.modes = []
    return _thread.modes


# The class of modes that `function_modes` lists.
FunctionMode: Any = TorchFunctionMode if function_modes_known else _ListedMode


def function_modes() -> list[TorchFunctionMode]:
    """The modes of functions that are on in this thread, the innermost last; where torch does not
    tell, those that are a FunctionMode."""
    if not function_modes_known:
        return list(_listed())
    return [_function_mode_at(i) for i in range(len_function_stack())]


def set_function_modes(modes: Iterable[TorchFunctionMode]) -> None:
    """Replace them. For a torch with `function_modes_known` only."""
    for _ in range(len_function_stack()):
        _pop_function_mode()
    for mode in modes:
        _push_function_mode(mode)


is_tracing: Callable[[], bool] = find("_C._is_tracing", torch.jit.is_tracing)  # torch.jit.trace

# A context without the torch functions of modes and subclasses.
DisableTorchFunction = find("_C.DisableTorchFunction", _NoModes)

# The innermost transform of torch.func, None outside of all. Callers ask for None or not.
# Where no one can tell whether a dispatch mode is on: as inside a transform, since plain torch
# formulas are right under modes and have second derivatives, which torch.ops.llmkern.* lack.
peek_interpreter_stack: Callable[[], Any] = _maybe
if len_dispatch_stack is not _maybe:
    peek_interpreter_stack = find("_C._functorch.peek_interpreter_stack", _maybe)

# `forward_levels._current_level` >= 0 inside forward-mode AD: read, not called, on the hot path.
forward_levels: Any = forward_ad if hasattr(forward_ad, "_current_level") else _ForwardLevels()


class _NoDispatchMode:
    """In place of TorchDispatchMode: sees no call."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None: ...


# A mode that sees each call of an operator, where there is one.
DispatchMode: Any = find("utils._python_dispatch.TorchDispatchMode", _NoDispatchMode)

# What torch.export traces modules with, strict=False.
_FAKE = find("_subclasses.FakeTensor", None)
_FUNCTIONAL = find("_subclasses.functional_tensor.FunctionalTensor", None)
exported_kinds: tuple[type, ...] = tuple(k for k in (_FAKE, _FUNCTIONAL) if k is not None)

# torch.utils.checkpoint: CheckpointFunction.forward(ctx, run_function, ...) keeps run_function in
# ctx.run_function and its backward calls that; _CheckpointFrame.__init__ sets recompute_fn.
CheckpointFunction: Any = find("utils.checkpoint.CheckpointFunction", None)
CheckpointFrame: Any = find("utils.checkpoint._CheckpointFrame", None)


def _names(path: str) -> tuple[str, ...]:
    """The names that the code of a function of torch.utils.checkpoint reads or sets."""
    return getattr(find(f"utils.checkpoint.{path}.__code__", None), "co_names", ())


# Whether they are there and work as said.
checkpoint_known = (
    CheckpointFunction is not None
    and CheckpointFrame is not None
    and "run_function" in _names("CheckpointFunction.forward")
    and "run_function" in _names("CheckpointFunction.backward")
    and "recompute_fn" in _names("_CheckpointFrame.__init__")
)

# Hooks on all modules, tables that are filled and emptied in place. Callers ask for empty or not.
_HOOKS = "nn.modules.module._global_"
global_forward_hooks = find(_HOOKS + "forward_hooks", (None,))
global_forward_pre_hooks = find(_HOOKS + "forward_pre_hooks", (None,))
global_backward_hooks = find(_HOOKS + "backward_hooks", (None,))
global_backward_pre_hooks = find(_HOOKS + "backward_pre_hooks", (None,))

# What F.silu calls, which models compiled by others call directly.
silu: Callable[[Tensor], Tensor] = find("_C._nn.silu", F.silu)

# softmax(scores, dim) in which a row of -inf gives 0, not NaN.
safe_softmax: Callable[[Tensor, int], Tensor] = find(
    "ops.aten._safe_softmax", _softmax_with_zero_rows
)

# t as another shape in the same memory, and no view of it as far as autograd knows: for a tensor
# that nobody else holds, autograd included.
_unsafe_view: Callable[[Tensor, Any], Tensor] = find(
    "ops.aten._unsafe_view", lambda t, shape: t.reshape(shape).clone()
)


def reshaped_output(t: Tensor, shape: Any) -> Tensor:
    """A result of formulas as `shape`. In a Function, which autograd does not look into, it is no
    view: of a view, autograd forbids changes in place. Where autograd records the formulas it may
    have saved t (relu does), so there it is a view and a change in place is noticed."""
    return t.reshape(shape) if torch.is_grad_enabled() else _unsafe_view(t, shape)


# The file of torch's extension module, through which its libraries are found; None: unknown.
extension_file: str | None = find("_C.__file__", None)

# (x, weight, bias, "none" or the activation, [], its algorithm); None in a torch without oneDNN.
onednn_linear: Callable[..., Tensor] | None = find("ops.mkldnn._linear_pointwise", None)


def direct_apply(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` for plain eager calls, without its 9 us search for functorch's wrappers."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


# Whether a tensor has memory of its own; a batched one (is_grads_batched, vmap) has none.
has_storage: Callable[[Tensor], bool] = find("_C._has_storage", lambda tensor: False)


def untraced(function: Callable) -> Callable:
    """Decorator: torch.compile runs calls of `function` as they are, and all that they call.

    For what an eager graph calls while a compiled function runs, such as a Function's backward:
    dynamo would compile each as a function of its own, with a guard on ctx.saved_tensors, which a
    checkpoint gives out once. What dynamo inlines (compiled autograd) is not affected.
    """
    if _set_strategy is not None:
        _set_strategy(function.__code__, _skip)
    return function


_set_strategy = find("_C._dynamo.eval_frame.set_code_exec_strategy", None)
_strategy = find("_C._dynamo.eval_frame._FrameExecStrategy", None)
_action = find("_C._dynamo.eval_frame._FrameAction", None)
if _strategy is None or _action is None:
    _set_strategy = None
else:
    _skip = _strategy(_action.SKIP, _action.SKIP)  # a call itself, and the calls in it


def constant_in_graph(function: Callable) -> Callable:
    """Mark a function that dynamo runs while it traces, taking the result for a constant.

    What torch.compiler.assume_constant_result does, which would import dynamo. Where a dynamo does
    not know the mark, it traces the function: so that can be done, the function asks
    torch.compiler.is_dynamo_compiling() before what cannot be traced. That is never true in a
    function that dynamo runs.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def derivative_in_graph() -> bool:
    """Whether a derivative of torch.func is among the transforms that dynamo traces."""
    if _derivatives is None or torch.compiler.is_dynamo_compiling():  # the mark is not known
        return True
    return any(i.key() in _derivatives for i in _get_interpreter_stack() or ())


_get_interpreter_stack = find("_C._functorch.get_interpreter_stack", None)
_kinds = find("_C._functorch.TransformType", None)
_derivatives = None
if _get_interpreter_stack is not None and _kinds is not None:
    _derivatives = (_kinds.Grad, _kinds.Jvp)
constant_in_graph(derivative_in_graph)  # dynamo enters the transforms that it traces


def compiler_traces() -> bool:
    """True while a compiler runs the program on fake tensors."""
    context = find("_guards.TracingContext", None)
    if context is None:
        return torch.compiler.is_compiling()
    return context.try_get() is not None

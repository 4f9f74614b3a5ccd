"""A torch that lacks a private name gives the same results: speed may go, nothing else."""

import os
import re
import subprocess
import sys

import pytest
import torch

import llmkern
from llmkern import torch_private

NAMES = [
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._is_tracing",
    "_C.DisableTorchFunction",
    "_C.__file__",
    "_C._has_storage",
    "ops.aten._unsafe_view",
    "_C._dynamo.eval_frame.set_code_exec_strategy",
    "_C._dynamo.eval_frame._FrameExecStrategy",
    "_C._dynamo.eval_frame._FrameAction",
    "_C._functorch.peek_interpreter_stack",
    "_C._functorch.get_interpreter_stack",
    "_C._functorch.TransformType",
    "_guards.TracingContext",
    "utils._python_dispatch._get_current_dispatch_mode_stack",
    "_C._get_function_stack_at",
    "_C._push_on_torch_function_stack",
    "_C._pop_torch_function_stack",
    "utils.checkpoint.CheckpointFunction",
    "utils.checkpoint._CheckpointFrame",
    "utils._python_dispatch.TorchDispatchMode",
    "_subclasses.FakeTensor",
    "_subclasses.functional_tensor.FunctionalTensor",
    "nn.modules.module._global_forward_hooks",
    "nn.modules.module._global_forward_pre_hooks",
    "nn.modules.module._global_backward_hooks",
    "nn.modules.module._global_backward_pre_hooks",
    "_C._nn.silu",
    "ops.aten._safe_softmax",
    "ops.mkldnn._linear_pointwise",
    "autograd.forward_ad._current_level",
    "_dynamo_marked_constant",
    "direct_apply",
    "every one of them",
]

# llmkern is imported where `find` does not find the name, then used in every way that asks for one.
PROGRAM = """
import sys, types
import torch
from torch.autograd import forward_ad

missing = sys.argv[1]
everything = missing == "every one of them"

path = sys.argv[2]
source = open(path).read()
private = types.ModuleType("llmkern.torch_private")
private.__file__ = path
if everything or missing == "direct_apply":
    source = source.replace("super(torch.autograd.Function, function)", "object()")
if everything or missing == "_dynamo_marked_constant":
    source = source.replace("function._dynamo_marked_constant", "function._unknown_mark")
if everything or missing == "autograd.forward_ad._current_level":
    source = source.replace("if hasattr(forward_ad, \\"_current_level\\")", "if False")
if everything:
    source = source.replace("for name in path.split", "return missing\\n    for name in path.split")
else:
    hide = f"if path == {missing!r}: return missing\\n    for name in path.split"
    source = source.replace("for name in path.split", hide)
exec(compile(source, path, "exec"), private.__dict__)
sys.modules["llmkern.torch_private"] = private

import llmkern
from llmkern import functional as K
from torch.utils.flop_counter import FlopCounterMode

assert llmkern.ops.library.len_dispatch_stack is private.len_dispatch_stack
torch.manual_seed(0)

def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

# gradients, first and second, of modules and functions
x = torch.randn(6, 16, requires_grad=True)
w = torch.randn(16, requires_grad=True)
linear = torch.randn(8, 16, requires_grad=True)
def ours(x, w, linear):
    return K.silu(K.linear(K.layer_norm(x, (16,), w), linear, activation="gelu"))
def torchs(x, w, linear):
    F = torch.nn.functional
    return F.silu(F.gelu(F.linear(F.layer_norm(x, (16,), w), linear)))
def gradients(f):
    y = f(x, w, linear)
    first = torch.autograd.grad(y.square().sum(), (x, w, linear), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, linear))
    return y, *first, *second
for _ in range(2):
    for a, b in zip(gradients(ours), gradients(torchs)):
        same(a, b)

# torch.func, forward-mode AD, vmap
loss = lambda f: lambda x: f(x, w, linear).square().sum()
same(torch.func.grad(loss(ours))(x), torch.func.grad(loss(torchs))(x))
same(torch.func.vmap(lambda r: ours(r, w, linear))(x), torchs(x, w, linear))
t = torch.randn_like(x)
same(torch.func.jvp(loss(ours), (x,), (t,)), torch.func.jvp(loss(torchs), (x,), (t,)))
with forward_ad.dual_level():
    dual = forward_ad.make_dual(x.detach(), t)
    same(*(forward_ad.unpack_dual(f(dual, w, linear)).tangent for f in (ours, torchs)))

# an accelerated layer: eager, with weights, under a mode of functions, counted, compiled
def layer():
    torch.manual_seed(1)
    made = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return made
plain, model = layer(), layer()
llmkern.accelerate(model)
src = torch.randn(2, 5, 16)
padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
same(model(src, src_key_padding_mask=padding), plain(src, src_key_padding_mask=padding))
with torch.device("cpu"):
    same(model(src), plain(src))
for a, b in zip(model.self_attn(src, src, src), plain.self_attn(src, src, src)):
    same(a, b)
with llmkern.override() as calls:
    rerouted = torchs(x, w, linear)
same(rerouted, torchs(x, w, linear))
assert calls.served["linear"] == 1 and calls.served["silu"] == 1
model.eval(), plain.eval()
with FlopCounterMode(display=False) as ours_counted, torch.no_grad():
    model(src)
assert ours_counted.get_total_flops() > 0
hooks = []
handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: hooks.append(type(a[0])))
model(src)
handle.remove()
assert len(hooks) > 5, hooks
assert llmkern.explain(model, src)

if missing in ("_C._functorch.get_interpreter_stack", "_C._functorch.TransformType",
               "_dynamo_marked_constant", "every one of them"):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    same(compiled(src), plain(src))
    def derivative(f):
        return torch.func.grad(lambda x: f(x, w.detach(), linear.detach()).square().sum())
    found = torch.compile(derivative(ours), backend="eager")(x.detach())
    same(found, derivative(torchs)(x.detach()))
    def rerouted(x):
        with llmkern.override():
            return torchs(x, w, linear)
    same(torch.compile(rerouted, backend="eager")(x), torchs(x, w, linear))
print("right")
"""


def _run(name: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, torch_private.__file__],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(llmkern.__file__)),
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


SHORT = {NAMES[0], "_C._functorch.peek_interpreter_stack", "every one of them"}


# 3 s each, most of it the import of torch.
@pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_results_are_right_without(name):
    assert _run(name).endswith("right\n")


def test_every_name_that_is_looked_up_is_tried():
    with open(torch_private.__file__) as file:
        text = file.read()
    looked_up = set(re.findall(r'find\(\s*"([\w.]+)"', text))
    looked_up |= {"nn.modules.module._global_" + n for n in re.findall(r'_HOOKS \+ "(\w+)"', text)}
    assert len(looked_up) >= 16
    assert looked_up <= set(NAMES), looked_up - set(NAMES)


def test_stand_ins_answer_like_torch():
    from torch.autograd import forward_ad

    levels = torch_private._ForwardLevels()
    assert levels._current_level < 0
    with forward_ad.dual_level():
        assert levels._current_level >= 0
    scores = torch.randn(4, 7, 9)
    scores[0, 2] = -torch.inf
    scores[1, :, 3] = -torch.inf
    wanted = torch.ops.aten._safe_softmax(scores, -1)
    torch.testing.assert_close(torch_private._softmax_with_zero_rows(scores, -1), wanted)


def test_the_mark_is_what_torch_sets():
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert marked.__dict__ == torch_private.constant_in_graph(lambda: None).__dict__


def test_padding_is_left_aligned_as_torch_says():
    for bits in range(1 << 6):
        keep = torch.tensor([bits >> i & 1 for i in range(6)], dtype=torch.bool).view(2, 3)
        wanted = torch._nested_tensor_from_mask_left_aligned(torch.randn(2, 3, 4), keep)
        assert bool((keep[:, 1:] <= keep[:, :-1]).all()) == wanted

"""torch.fx: llmkern's modules are leaves of a traced model, as torch's are, and llmkern's functions
are nodes of it."""

import copy
import io
import pickle

import pytest
import torch
from models import NanoGPT
from torch import nn

import llmkern
from llmkern import functional as K
from llmkern.errors import DtypeError
from llmkern.functional import gelu as imported_by_itself
from llmkern.nn import REPLACEMENTS

E, H, S, B = 16, 2, 5, 3
X = torch.randn(B, S, E)

# How a user's module holds and calls one of each class of the type table.
BUILDERS = {
    nn.Linear: lambda: nn.Linear(E, E),
    nn.LayerNorm: lambda: nn.LayerNorm(E),
    nn.RMSNorm: lambda: nn.RMSNorm(E),
    nn.ReLU: lambda: nn.ReLU(),
    nn.GELU: lambda: nn.GELU(),
    nn.SiLU: lambda: nn.SiLU(),
    nn.Dropout: lambda: nn.Dropout(0.5),
    nn.modules.linear.NonDynamicallyQuantizableLinear: lambda: (
        nn.modules.linear.NonDynamicallyQuantizableLinear(E, E)
    ),
    nn.MultiheadAttention: lambda: nn.MultiheadAttention(E, H, 0.5, batch_first=True),
    nn.TransformerEncoderLayer: lambda: nn.TransformerEncoderLayer(E, H, 32, batch_first=True),
    nn.TransformerDecoderLayer: lambda: nn.TransformerDecoderLayer(E, H, 32, batch_first=True),
    nn.TransformerEncoder: lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 1, enable_nested_tensor=False
    ),
    nn.TransformerDecoder: lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(E, H, 32, batch_first=True), 1
    ),
    nn.Transformer: lambda: nn.Transformer(E, H, 1, 1, 32, batch_first=True),
}
ARGUMENTS = {
    nn.MultiheadAttention: 3,
    nn.TransformerDecoderLayer: 2,
    nn.TransformerDecoder: 2,
    nn.Transformer: 2,
}


class Holder(nn.Module):
    def __init__(self, torch_type: type[nn.Module]):
        super().__init__()
        self.body = BUILDERS[torch_type]()
        self.inputs = ARGUMENTS.get(torch_type, 1)

    def forward(self, x):
        y = self.body(*[x] * self.inputs)
        return (y[0] if self.inputs == 3 else y) + x


class Derived(torch.fx.Tracer):
    """As the tracers of other libraries are: the default rule, and a condition."""

    def is_leaf_module(self, module, name):
        return name != "nothing" and super().is_leaf_module(module, name)


def nodes(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


def seeded(module: nn.Module, *args) -> torch.Tensor:
    torch.manual_seed(3)
    return module(*args)


def test_every_class_of_the_table_is_covered():
    assert BUILDERS.keys() == REPLACEMENTS.keys()


@pytest.mark.parametrize("torch_type", BUILDERS)
@pytest.mark.parametrize("functional", [False, True])
def test_modules_are_leaves_and_keep_their_mode(torch_type, functional):
    model = Holder(torch_type)
    expected = nodes(torch.fx.symbolic_trace(model).graph)
    llmkern.accelerate(model, functional=functional)
    traced = torch.fx.symbolic_trace(model)
    assert nodes(traced.graph) == expected
    assert nodes(Derived().trace(model)) == expected
    assert type(traced.body) is REPLACEMENTS[torch_type]
    training = seeded(model, X)
    assert torch.equal(seeded(traced, X), training)
    model.eval(), traced.eval()
    assert torch.equal(seeded(traced, X), seeded(model, X))
    if any(isinstance(m, nn.Dropout) for m in model.modules()):
        assert not torch.equal(seeded(traced, X), training)
        traced.train()
        assert torch.equal(seeded(traced, X), training)


@pytest.mark.parametrize("torch_type", BUILDERS)
def test_a_class_is_found_by_its_name(torch_type):
    cls = REPLACEMENTS[torch_type]
    assert cls.__module__.startswith("llmkern.nn.") and f"<class '{cls.__module__}" in repr(cls)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(cls, protocol)) is cls
    module = llmkern.nn.REPLACEMENTS[torch_type].__new__(cls)
    assert type(copy.copy(module)) is cls


def test_a_subclass_of_a_user_is_traced_into():
    class Mine(llmkern.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    graph = torch.fx.symbolic_trace(nn.Sequential(Mine(E, E))).graph
    assert ("call_function", "<built-in function add>") in nodes(graph)


@pytest.mark.parametrize("torch_type", [nn.Linear, nn.LayerNorm, nn.GELU, nn.ReLU, nn.Dropout])
def test_a_root_of_llmkern_is_traced_as_torch_traces_its_own(torch_type):
    model = BUILDERS[torch_type]().eval()
    expected, graph = model(X), torch.fx.symbolic_trace(model).graph
    llmkern.accelerate(model)
    traced = torch.fx.symbolic_trace(model)
    assert nodes(traced.graph) == nodes(graph)
    torch.testing.assert_close(traced(X), expected)


def test_functional_calls_are_nodes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(E, E)), nn.Parameter(torch.zeros(E))

        def forward(self, x):
            y, z = K.add_layer_norm(x, x, (E,), self.bias, self.bias, prenorm=True)
            q = K.linear(y, self.weight, activation="gelu").unflatten(-1, (H, -1)).transpose(1, 2)
            y = K.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
            return K.dropout(K.silu(K.relu(K.gelu(y))), 0.0) + K.rms_norm(z, (E,))

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    names = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert [name for name in names if hasattr(K, name)] == [
        "add_layer_norm", "linear", "scaled_dot_product_attention", "gelu", "relu", "silu",
        "dropout", "rms_norm",
    ]  # fmt: skip
    assert torch.equal(traced(X), model(X))
    buffer = io.BytesIO()
    torch.save(traced, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), model(X))


def test_a_function_imported_by_itself_says_what_to_do():
    class Model(nn.Module):
        def forward(self, x):
            return imported_by_itself(x)

    with pytest.raises(DtypeError, match=r"torch\.fx traces .* torch\.fx\.wrap\('name'\)"):
        torch.fx.symbolic_trace(Model())


def test_functional_calls_of_a_rerouted_model_are_traced_as_torchs():
    model = NanoGPT().eval()
    idx = torch.randint(0, 50, (2, S))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln, self.fc = model.h[0].ln_2, model.h[0].c_fc

        def forward(self, x):
            return torch.nn.functional.gelu(self.fc(self.ln(x)))

    block = Block()
    expected = nodes(torch.fx.symbolic_trace(block).graph)
    llmkern.accelerate(block, functional=True)
    traced = torch.fx.symbolic_trace(block)
    assert nodes(traced.graph) == expected
    x = model.wte(idx)
    torch.testing.assert_close(traced(x), block(x), rtol=1e-4, atol=1e-5)

"""Writes the support matrix of docs/kernels.md from each backend's `supports`.

`python tools/support_matrix.py` rewrites the table in place; with --check it only says whether the
file is current (exit code 1 if not).
"""

import argparse
import sys
from pathlib import Path

import torch

from llmkern import dispatch
from llmkern.specs import (
    UNBOUNDED,
    ActivationSpec,
    AttentionSpec,
    DropoutSpec,
    LinearSpec,
    NormSpec,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"
DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
BACKENDS = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda", "reference": "cpu"}  # by device

NORM = NormSpec(
    torch.float32, torch.float32, "cpu", 8, 64, 1e-5,
    rms=False, unit_offset=False, add=False, dropout_p=0.0, keep_z=False, x_dtype=torch.float32,
)  # fmt: skip
ATTENTION = AttentionSpec(
    torch.float32, "cpu", 2, 4, 4, 16, 16, 64, 64, 0.125, 0.0, 0, UNBOUNDED, UNBOUNDED, 0.0,
    bias=False, mask=False, key_mask=False, slopes=False, sinks=False,
)  # fmt: skip
LINEAR = LinearSpec(torch.float32, "cpu", 16, 32, 64, None, False, False, False, 0.0, False)
DROPOUT = DropoutSpec(torch.float32, "cpu", 64, 0.1)
ACTIVATION = ActivationSpec(torch.float32, "cpu", 64, "gelu")

# op -> [(feature, base spec, fields that switch it on)]
FEATURES = {
    "attention": [
        ("full", ATTENTION, {}),
        ("causal, top-left", ATTENTION, {"right": 0}),
        ("causal, bottom-right", ATTENTION, {"right": 0, "kv_len": 32, "shift": 16}),
        ("sliding window", ATTENTION, {"left": 4, "right": 0}),
        ("bool mask", ATTENTION, {"mask": True}),
        ("float bias and its gradient", ATTENTION, {"bias": True}),
        ("key padding mask", ATTENTION, {"key_mask": True}),
        ("ALiBi", ATTENTION, {"slopes": True}),
        ("sinks", ATTENTION, {"sinks": True}),
        ("softcap", ATTENTION, {"softcap": 30.0}),
        ("dropout", ATTENTION, {"dropout_p": 0.1}),
        ("GQA", ATTENTION, {"kv_heads": 2}),
        ("head dim 1", ATTENTION, {"head_dim": 1, "value_dim": 1}),
        ("head dim 256", ATTENTION, {"head_dim": 256, "value_dim": 256}),
        ("Dv != D", ATTENTION, {"value_dim": 40}),
        ("one query", ATTENTION, {"q_len": 1}),
    ],
    "norm": [
        ("layer norm", NORM, {}),
        ("RMS norm", NORM, {"rms": True}),
        ("unit offset", NORM, {"unit_offset": True}),
        ("residual add", NORM, {"add": True}),
        ("dropout + residual add", NORM, {"add": True, "dropout_p": 0.1}),
    ],
    "linear": [
        ("bias", LINEAR, {"bias": True}),
        *[(name, LINEAR, {"activation": name}) for name in ("relu", "gelu", "gelu_tanh", "silu")],
        ("dropout + residual", LINEAR, {"residual": True, "dropout_p": 0.1}),
        ("gated (SwiGLU, GEGLU)", LINEAR, {"gated": True, "activation": "silu"}),
        ("one row", LINEAR, {"rows": 1}),
    ],
    "dropout": [("dropout, also in place", DROPOUT, {})],
    "activation": [
        (name, ACTIVATION, {"activation": name}) for name in ("relu", "gelu", "gelu_tanh", "silu")
    ],
}


def _cell(backend: str, op: str, base: tuple, fields: dict) -> str:
    served, reasons = [], []
    for dtype, name in DTYPES.items():
        spec = base._replace(dtype=dtype, device=BACKENDS[backend], **fields)
        if "weight_dtype" in spec._fields:
            spec = spec._replace(weight_dtype=dtype, x_dtype=dtype)
        reason = dispatch.refusal(backend, op, spec)
        if reason is None:
            served.append(name)
        elif reason not in reasons:
            reasons.append(reason)
    return " ".join(served) or "; ".join(reasons)


def missing() -> str | None:
    """Why the matrix cannot be told here: a backend is not installed."""
    for backend, device in BACKENDS.items():
        reason = dispatch.refusal(backend, "norm", NORM._replace(device=device))
        if reason is not None:
            return f"{backend}: {reason}"
    return None


def table() -> str:
    """The matrix as Markdown."""
    lines = ["| op | feature | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 2) + "|"]
    for op, features in FEATURES.items():
        for feature, base, fields in features:
            cells = [_cell(backend, op, base, fields) for backend in BACKENDS]
            lines.append(f"| {op} | {feature} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page_with(matrix: str) -> str:
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{matrix}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"the matrix needs every backend, but {reason}", file=sys.stderr)
        return 2
    text = page_with(table())
    current = text == PAGE.read_text()
    if options.check:
        print("current" if current else f"{PAGE.name} is stale: run tools/support_matrix.py")
        return 0 if current else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

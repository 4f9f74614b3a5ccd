"""The shape of the tree, enforced: who imports whom, file sizes, an op in every room."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmkern"
LEAVES = {"specs", "errors", "numerics", "precision", "random", "target", "torch_private"}
OPS = ["norm", "attention", "linear", "dropout", "activation"]
# Plain torch, which ops run where torch must see the formula: torch.func, second derivatives.
REFERENCE = "llmkern.backends.reference"
CUDA_OPS = ["norm", "attention", "linear"]  # the others are left to Triton

# Who may import whom inside the package; a layer may also import itself and the leaves.
ALLOWED = {
    "accelerate": {"nn", "override", "report", "rerouted"},
    "report": {"override", "rerouted"},
    "rerouted": {"override"},
    "override": {"functional", "dispatch", "recompute"},
    "nn": {"functional", "dispatch"},
    "functional": {"ops"},
    "ops": {"dispatch", "checks"},
    "dispatch": {"choice", "tuned", "recompute"},
    "recompute": set(),
    "choice": set(),
    "tuned": {"choice", "version"},
    "checks": set(),
    "specs": set(),
    "torch_private": set(),
    "errors": set(),
    "numerics": set(),
    "random": set(),
    "target": set(),
    "version": set(),
    "supported": set(),
    "allocator": set(),
}


def _tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [p for line in listed.stdout.splitlines() if (p := ROOT / line).exists()]
    return [p for pattern in patterns for p in ROOT.rglob(pattern) if "build" not in p.parts]


def _imports(path: Path) -> set[str]:
    """Names of the llmkern modules that a file imports at module level or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("llmkern.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "llmkern":
                found |= {f"llmkern.{a.name}" for a in node.names}
            elif node.module.startswith("llmkern."):
                found.add(node.module)
    return found


def _layer(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_layers_import_only_what_they_may(layer):
    files = [PACKAGE / f"{layer}.py"]
    if (PACKAGE / layer).is_dir():
        files = sorted((PACKAGE / layer).rglob("*.py"))
    allowed = ALLOWED[layer] | LEAVES | {layer}
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files
        if file.exists()
        for module in _imports(file)
        if _layer(module) not in allowed and not (layer == "ops" and module == REFERENCE)
    ]
    assert not wrong, wrong


def test_backends_import_neither_each_other_nor_what_is_above():
    wrong = []
    for folder in sorted((PACKAGE / "backends").iterdir()):
        for file in sorted(folder.rglob("*.py")) if folder.is_dir() else []:
            for module in _imports(file):
                own = module.startswith(f"llmkern.backends.{folder.name}")
                if not own and _layer(module) not in LEAVES:
                    wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_files_have_at_most_500_lines():
    files = _tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    long = {
        str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > 500
    }
    assert files
    assert not long, long


@pytest.mark.parametrize("op", OPS)
def test_op_is_present_in_every_room(op):
    rooms = [
        f"llmkern/ops/{op}.py",
        f"llmkern/backends/reference/{op}.py",
        f"llmkern/backends/cpu/{op}.py",
        f"llmkern/backends/triton/{op}.py",
        f"tests/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ]
    missing = [room for room in rooms if not (ROOT / room).exists()]
    assert not missing, missing


@pytest.mark.parametrize("op", OPS)
def test_backend_modules_have_three_public_functions(op):
    backends = ("reference", "cpu", "triton", *(["cuda"] if op in CUDA_OPS else []))
    for backend in backends:
        tree = ast.parse((PACKAGE / "backends" / backend / f"{op}.py").read_text())
        public = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        }
        assert {"supports", "forward", "backward"} <= public, (backend, op, public)


def test_no_torch_or_pybind11_below_the_bindings():
    include = re.compile(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python)")
    wrong = [
        str(f.relative_to(ROOT))
        for f in _tracked("csrc/*.h", "csrc/*.cpp")
        if include.search(f.read_text()) and not f.name.startswith("bindings")
    ]
    assert not wrong, wrong


def test_intrinsics_only_in_simd_and_micro_kernels():
    intrinsic = re.compile(r"\b_mm(256|512)?_|\bimmintrin\.h|\b__m(128|256|512)\b")
    wrong = [
        str(f.relative_to(ROOT))
        for f in _tracked("csrc/cpu/*.h", "csrc/cpu/*.cpp")
        if intrinsic.search(f.read_text())
        and f.parent.name != "simd"
        and "microkernel" not in f.name
    ]
    assert not wrong, wrong


def test_inline_assembly_only_in_ptx_cuh():
    wrong = [
        str(f.relative_to(ROOT))
        for f in _tracked("csrc/cuda/*.cu", "csrc/cuda/*.cuh")
        if re.search(r"\basm\b", f.read_text()) and f.name != "ptx.cuh"
    ]
    assert not wrong, wrong


def test_no_broad_except_and_no_work_at_import():
    wrong = []
    for file in _tracked("llmkern/*.py", "benchmarks/*.py", "tools/*.py", "setup.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                name = getattr(node.type, "id", None)
                if node.type is None or name in ("Exception", "BaseException"):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} broad except")
        if file.name == "setup.py":
            continue
        for node in tree.body:  # statements that run at import
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
                continue
            text = ast.unparse(node)
            if "os.environ" in text or "getenv" in text:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} environment read at import")
    assert not wrong, wrong


def test_supported_torch_is_the_same_everywhere():
    from llmkern import supported

    floor = "{}.{}".format(*supported.FLOOR)
    newest = supported.TESTED[-1][0]
    assert supported.TESTED[0][0].startswith(floor + ".")
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'"torch>=([\d.]+)"', project) == [floor, floor]
    assert f"any torch from {floor} on (tested to {newest})" in (ROOT / "README.md").read_text()
    pins = (ROOT / "requirements-dev.txt").read_text()
    assert any(f"torch=={t}\ntriton=={r}\n" in pins for t, r in supported.TESTED)


def test_info_says_when_torch_is_outside_the_range():
    from llmkern import supported

    assert supported.remark("2.8.0+cu128") and "older" in supported.remark("2.8.0+cu128")
    assert "newer" in supported.remark("3.0.0")
    assert "newer" in supported.remark("2.15.0.dev20261201+cpu")
    for version, _ in supported.TESTED:
        assert supported.remark(version + "+cpu") is None


def test_version_is_written_in_one_place():
    from llmkern.version import __version__

    holders = [
        str(f.relative_to(ROOT))
        for f in _tracked("*.py", "*.toml", "*.cfg")
        if f'"{__version__}"' in f.read_text()
    ]
    assert holders == ["llmkern/version.py"]


def _private_torch_names(path: Path) -> list[str]:
    """Names with a leading underscore that a file reads from torch or from a module of it."""
    tree = ast.parse(path.read_text())
    of_torch, found = set(), []  # local names of torch and its modules
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    of_torch.add(alias.asname or "torch")
                    found += [alias.name] if "._" in alias.name else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                of_torch.add(alias.asname or alias.name)
                name = f"{node.module}.{alias.name}"
                found += [name] if "._" in name else []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not re.match("_(?!_)", node.attr):
            continue
        name = ast.unparse(node)
        if name.split(".")[0] in of_torch or node.attr == "_dynamo_marked_constant":
            found.append(name)
    return found


def test_private_torch_api_is_read_in_one_module_only():
    wrong = {}
    for file in _tracked("llmkern/*.py", "benchmarks/*.py", "tools/*.py", "setup.py"):
        if file != PACKAGE / "torch_private.py" and (names := _private_torch_names(file)):
            wrong[str(file.relative_to(ROOT))] = names
    assert not wrong, wrong


def test_private_torch_names_are_found(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(
        "import torch\nimport torch.nn.functional as F\nfrom torch.autograd import forward_ad\n"
        "from torch._C import _is_tracing\nfrom torch._guards import TracingContext\n"
        "def f(x):\n    torch._C._nn.silu(x), forward_ad._current_level, F._pad\n"
        "    f._dynamo_marked_constant = True\n    return torch.ops.aten._softmax, x._version\n"
    )
    assert set(_private_torch_names(file)) == {
        "torch._C._is_tracing",
        "torch._guards.TracingContext",
        "torch._C",
        "forward_ad._current_level",
        "F._pad",
        "f._dynamo_marked_constant",
        "torch.ops.aten._softmax",
        "torch._C._nn",
    }

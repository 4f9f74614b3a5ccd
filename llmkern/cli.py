"""The command line: `llmkern` and `python -m llmkern`. Exit code 0: fine, 1: a check or a case
failed or regressed, 2: the command was not understood."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import llmkern
from llmkern import supported
from llmkern.bench import command, gate, kernel_table, profile, registry, tune
from llmkern.bench.suites import kernels
from llmkern.errors import LlmkernError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="llmkern",
        description="Fused attention, norm and GEMM kernels for PyTorch Transformers",
    )
    made.add_argument("--version", action="version", version=llmkern.__version__)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command.add_parser(commands)
    _add_info(commands)
    _add_check(commands)
    _add_explain(commands)
    kernel_table.add_parser(commands)
    profile.add_parser(commands)
    tune.add_parser(commands)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (LlmkernError, ValueError, OSError) as error:
        print(f"llmkern: {error}", file=sys.stderr)
        return 2


def _add_info(commands: argparse._SubParsersAction) -> None:
    info = commands.add_parser("info", help="versions, backends and what is missing, with reasons")
    info.set_defaults(run=info_command)


def info_command(arguments: argparse.Namespace) -> int:
    print(f"llmkern {llmkern.__version__}, torch {torch.__version__}")
    print(f"  supported: {supported.described()}")
    if remark := supported.remark(torch.__version__):
        print(f"  warning: {remark}")
    for status in llmkern.backends():
        state = "usable" if status.available else "missing"
        print(f"  {status.name:10} {state:8} {status.detail}")
    return 0


def _add_case_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", type=command.dtype_list, metavar="D[,D]", default=[torch.float32]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="the backend that must serve (default: the best one)")


def _add_check(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "check",
        help="run every op against a float64 oracle on this machine",
        description="Small, odd-shaped cases of every op, outputs and gradients, by the rule of "
        "docs/numerics.md. Exit code 1 if one fails.",
    )
    _add_case_options(check)
    check.add_argument("--filter", metavar="WORDS", help="only cases whose id contains every word")
    check.set_defaults(run=check_command)


def check_command(arguments: argparse.Namespace) -> int:
    device = registry.device_of(arguments.device)
    failures = 0
    cases = [case for dtype in arguments.dtype for case in kernels.check(dtype)]
    cases = registry.select(cases, arguments.filter)
    if not cases:
        return _no_case(arguments.filter)
    for case in cases:
        tensors = registry.inputs_of(case, device)
        try:
            verdict = gate.check(case, tensors, backend=arguments.backend)
        except gate.CASE_ERRORS as error:
            failures += 1
            print(f"ERROR {case.id}: {type(error).__name__}: {error}")
            continue
        failures += not verdict.passed
        state = "ok   " if verdict.passed else "FAIL "
        ratio = "" if verdict.error_ratio is None else f", {verdict.error_ratio:.2f} x torch's"
        detail = verdict.reason or f"error {verdict.error_ours:.1e}{ratio}"
        print(f"{state} {case.id}: {'+'.join(verdict.backends)}: {detail}")
    print(f"{failures} failed" if failures else "all passed")
    return 1 if failures else 0


def _no_case(words: str) -> int:
    print(f"no case matches {words!r}", file=sys.stderr)
    return 2


def _add_explain(commands: argparse._SubParsersAction) -> None:
    explain = commands.add_parser(
        "explain",
        help="say which backend serves a benchmark case, which were passed over, and why",
        description="In Python, llmkern.explain(function, *args) says the same of any call.",
    )
    explain.add_argument("filter", metavar="WORDS", help="e.g. attention/causal, layer_norm")
    _add_case_options(explain)
    explain.set_defaults(run=explain_command)


def explain_command(arguments: argparse.Namespace) -> int:
    cases = registry.select(kernels.default(arguments.dtype), arguments.filter)
    if not cases:
        return _no_case(arguments.filter)
    device = registry.device_of(arguments.device)
    for case in cases:
        tensors = registry.inputs_of(case, device)
        ours = next(variant for variant in case.variants if variant.name == registry.OURS)
        with gate.on_backend(arguments.backend):
            print(case.id)
            print(llmkern.explain(ours.prepare(tensors)))
    return 0

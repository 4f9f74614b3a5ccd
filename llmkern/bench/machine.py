"""What a figure was measured on: written into every result file and shown above every table."""

from __future__ import annotations

import datetime
import os
import platform
import re
from typing import Any

import torch

from llmkern.version import __version__


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            text = cpuinfo.read()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    model = re.search(r"^model\s*:\s*(\d+)$", text, re.MULTILINE)
    if name is None:
        return platform.machine()
    detail = f" (family {family[1]}, model {model[1]})" if family and model else ""
    return name[1].strip() + detail


def cache_sizes() -> dict[str, str]:
    """{"L1d": "32K", ...} of the first core, empty where the system does not say."""
    base = "/sys/devices/system/cpu/cpu0/cache"
    sizes = {}
    try:
        for index in sorted(os.listdir(base)):
            if not index.startswith("index"):
                continue
            level, kind, size = (
                _read(f"{base}/{index}/{name}") for name in ("level", "type", "size")
            )
            if kind != "Instruction":
                sizes[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    except OSError:
        return {}
    return sizes


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def load_average() -> float | None:
    """Runnable processes over the last minute; other work on the machine shows here."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def accelerator_name(device: torch.device) -> str | None:
    """What torch calls the card; None for a CPU."""
    if device.type == "cpu":
        return None
    described = getattr(torch.get_device_module(device), "get_device_name", None)
    return described(device) if described is not None else str(device)


def describe(extension_isas: list[str]) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": cores(),
        "caches": cache_sizes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llmkern": __version__,
        "isas": extension_isas,
        "load_before": load_average(),
    }

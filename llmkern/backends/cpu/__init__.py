"""C++ kernels for CPUs (csrc/cpu), compiled for several instruction sets, chosen at load."""

from llmkern.backends.cpu import _ext


def status() -> tuple[bool, str]:
    """(usable here, the instruction set in use or why the extension does not load)."""
    module, reason = _ext.load()
    if module is None:
        return False, str(reason)
    return True, f"{module.isa()} (this CPU and build: {', '.join(module.isa_names())})"

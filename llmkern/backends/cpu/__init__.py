"""C++ kernels for CPUs (csrc/cpu), compiled for several instruction sets, chosen at load."""

from llmkern.backends.cpu import _ext


def status() -> tuple[bool, str]:
    """(usable here, the instruction set in use or why the extension does not load).

    Why kernels run on one thread is told too, where torch's threads were not found.
    """
    module, reason, serial = _ext.load()
    if module is None:
        return False, str(reason)
    isas = f"{module.isa()} (this CPU and build: {', '.join(module.isa_names())})"
    return True, isas if serial is None else f"{isas}; on one thread: {serial}"

"""The errors llmkern raises. Each is also of the type that torch raises in the same place."""


class LlmkernError(Exception):
    """Base of every error raised by llmkern."""


class ShapeError(LlmkernError, ValueError, RuntimeError):
    """A size, rank, stride or broadcast rule is broken."""


class DtypeError(LlmkernError, TypeError, RuntimeError):
    """A dtype is wrong, or two dtypes do not go together."""


class DeviceError(LlmkernError, ValueError, RuntimeError):
    """Tensors are on different devices, or on one that nothing here serves."""


class ArgumentError(LlmkernError, ValueError, RuntimeError):
    """A number or option is outside what the op defines."""


class ModuleShapeError(ShapeError, AssertionError):
    """A shape that torch.nn asserts: an AssertionError there, and so here."""


class ModuleDtypeError(DtypeError, AssertionError):
    """A dtype that torch.nn asserts: an AssertionError there, and so here."""


class BackendError(LlmkernError, ValueError, RuntimeError):
    """A backend that was asked for is unknown, missing, or cannot serve the call."""


class TuneFileError(LlmkernError, ValueError):
    """A file that is read as `llmkern tune`'s is not one."""


class TuneWarning(UserWarning):
    """A tune file is not used: it was made for another card or version, or is not there."""


class FallbackWarning(UserWarning):
    """A call was served by a slower backend (fallback policy "warn")."""

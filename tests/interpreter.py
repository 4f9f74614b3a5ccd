"""What Triton's interpreter (3.7) gets wrong about bf16, put right for the tests, and one waste.

numpy has no bf16: the interpreter holds its bits in uint16. It rounds float32 to bf16 towards zero,
where the hardware rounds to nearest even, and tl.dot multiplies the bits as integers. And it
patches triton.language anew at every call of a device function, which takes half of the time.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _to_float(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _patch_once_a_launch() -> None:
    patch, patched = interpreter._patch_lang, set()

    def patch_new(function):
        modules = {id(m) for m in function.__globals__.values() if m is tl or m is tl.core}
        if modules <= patched:
            return None
        patched.update(modules)
        scope = patch(function)
        restore = scope.restore

        def restore_and_forget():
            patched.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_new


def put_right() -> None:
    """Replace the interpreter's conversions and its dot for bf16; the rest stays as it is."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_right(values, source, destination, rounding):
        if source == tl.float32 and destination == tl.bfloat16:
            return _to_bf16(values)
        if source == tl.bfloat16 and destination == tl.float32:
            return _to_float(values)
        return convert(values, source, destination, rounding)

    def dot_right(self, a, b, d, precision, imprecise):
        widened = [
            interpreter.TensorHandle(_to_float(t.data), tl.float32)
            if t.dtype.scalar == tl.bfloat16
            else t
            for t in (a, b)
        ]
        return dot(self, *widened, d, precision, imprecise)

    _patch_once_a_launch()
    interpreter._convert_float = convert_right
    interpreter.InterpreterBuilder.create_dot = dot_right

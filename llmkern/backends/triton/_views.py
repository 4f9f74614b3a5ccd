"""Tensors as kernels read them: rows with column stride 1; copied only where no view will do."""

from torch import Tensor


def rows_of(t: Tensor, rows: int, cols: int) -> tuple[Tensor, int]:
    """`t` as [rows, cols] with column stride 1, and its row stride; a copy only if no view can."""
    if t.is_contiguous():
        return t, cols
    flat = t.reshape(rows, cols)
    if flat.stride(1) != 1 and cols > 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


# Blocks of 2048 columns lie along a grid's second axis, which has 65535 places.
MOST_COLUMNS = 65535 * 2048


def plane_of(t: Tensor) -> tuple[Tensor, int, int, int]:
    """`t` as rows with column stride 1: (tensor, rows, cols, row stride).

    A contiguous tensor is one row. A copy where no view can, or where rows would be short or longer
    than a grid is wide.
    """
    long = t.dim() > 0 and 64 <= t.shape[-1] <= MOST_COLUMNS
    if long and not t.is_contiguous() and t.stride(-1) == 1:
        flat = t.reshape(-1, t.shape[-1])
        if not flat.is_contiguous():
            return flat, flat.shape[0], flat.shape[1], flat.stride(0)
    return t.contiguous(), 1, t.numel(), t.numel()


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()

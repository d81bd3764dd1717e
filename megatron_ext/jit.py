"""Machine code for a loop over numbers, made at its first call and kept on disk.

numba is imported here and nowhere else: it costs 0.3 CPU-s, which what only composes or plans must
not pay.
"""

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """``loop`` as machine code, with Python's own float64 arithmetic.

    Maxima may be taken in any order (no NaN, and zeros of both signs alike); sums and products may
    not, so that every result is the plain function's bit for bit.
    """
    from numba import njit

    how: dict[str, Any] = {"fastmath": {"nnan", "nsz"}, "error_model": "numpy", "nogil": True}
    try:
        made: Callable[..., Any] = njit(cache=True, **how)(loop)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        made = njit(**how)(loop)
    return made

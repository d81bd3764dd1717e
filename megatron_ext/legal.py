"""Nearest legal values, for the sentence that refuses an impossible one."""

import difflib
from collections.abc import Iterable


def divisors(n: int) -> list[int]:
    """Every positive divisor of ``n``, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest(values: Iterable[int], wanted: int, *, count: int = 3) -> str:
    """The ``count`` legal values nearest to ``wanted``, as words: ``2, 4 or 8``."""
    chosen = sorted(sorted(set(values), key=lambda v: (abs(v - wanted), v))[:count])
    if len(chosen) < 2:
        return "".join(map(str, chosen))
    return ", ".join(map(str, chosen[:-1])) + f" or {chosen[-1]}"


def nearest_multiples(of: int, wanted: int) -> str:
    """The multiples of ``of`` on both sides of ``wanted``, as words."""
    below = max(wanted // of, 1) * of
    return nearest({below, below + of}, wanted)


def unknown_choice(key: str, value: object, known: Iterable[str]) -> ValueError:
    """The refusal of a word that no table knows, naming the ones it does."""
    return ValueError(f"{key}={value} is not known: choose one of {', '.join(sorted(known))}.")


def nearest_words(typed: str, known: Iterable[str]) -> list[str]:
    """Up to three known words that look like ``typed``, best first."""
    return difflib.get_close_matches(typed, list(known), n=3, cutoff=0.5)

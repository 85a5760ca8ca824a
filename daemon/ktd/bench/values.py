"""Values of the options of `ktd bench`, for argparse: what is wrong raises ArgumentTypeError, which says what
was expected."""

from __future__ import annotations

import argparse

from gguf import GGMLQuantizationType

from ktd.settings import MOST_THREADS, parse_size, parse_sizes


def numbers(text: str) -> list[int]:
    """Comma-separated positive integers."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers above 0 such as 1,8,64, not '{text}'")
    return found


def number(text: str) -> int:
    """One positive integer."""
    found = numbers(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"expected one number, not '{text}'")
    return found[0]


def pools(text: str) -> list[int]:
    """Numbers of threads."""
    threads = numbers(text)
    if max(threads) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS} threads, not {max(threads)}")
    return threads


def pool(text: str) -> int:
    """A number of threads."""
    return pools(str(number(text)))[0]


def types(text: str) -> list[GGMLQuantizationType]:
    """Comma-separated GGUF type names."""
    known = GGMLQuantizationType.__members__
    for name in text.upper().split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown type '{name}': names are those of GGUF, such as Q4_K")
    return [known[name] for name in text.upper().split(",")]


def size(text: str) -> int:
    """Bytes of "14GiB"."""
    try:
        return int(str(parse_size(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, not '{text}'") from error


def sizes(text: str) -> tuple[int, ...]:
    """Bytes of "14GiB,24GiB"."""
    try:
        return tuple(int(str(size)) for size in parse_sizes(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, not '{text}'") from error


def seconds(text: str) -> float:
    """Up to an hour of them."""
    found = float(text)
    if not 0 < found < 3600:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, not '{text}'")
    return found

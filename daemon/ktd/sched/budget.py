"""How the tokens of one step are dealt out."""

from __future__ import annotations

from collections.abc import Sequence


def fair_shares(wanted: Sequence[int], budget: int) -> list[int]:
    """Max-min fair: nobody gets more than wanted, and what is left over goes to those who want more.

    A short prompt is thus read in one step beside a long one. Sum is min(budget, sum(wanted)).
    """
    shares = [0] * len(wanted)
    by_size = sorted(range(len(wanted)), key=wanted.__getitem__)
    for place, index in enumerate(by_size):
        # Rounded up, so that a budget smaller than the number of takers is still spent.
        equal = -(-budget // (len(by_size) - place))
        shares[index] = min(wanted[index], equal)
        budget -= shares[index]
    return shares

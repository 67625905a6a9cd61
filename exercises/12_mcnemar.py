"""Exercise 12: McNemar's exact test.

Two runs answered the same problems. Is one better? Problems that both solve, or neither, do not
tell them apart; only the n problems that just one solves do. If the runs were equally good, each of
those n would go to either by a fair coin. So p is the chance that n fair coins fall at least as
unevenly as they did, either way round:

    k = the smaller of the two counts
    p = 2 * (C(n, 0) + C(n, 1) + ... + C(n, k)) / 2^n,   at most 1

With no such problem p is 1. No normal or chi-squared approximation: it is off where n is small.

example   10 problems only by the first, 2 only by the second: n 12, k 2,
          p = 2 * (1 + 12 + 66) / 4096 = 0.0386
useful    math.comb(n, i)
size      5 to 7 lines.  Ours: mcnemar in report/stats.py
check     make exercise N=12
"""
import math  # noqa: F401  (for math.comb)


def mcnemar(first: list[bool], second: list[bool]) -> float:
    """first, second: right or wrong on the same problems, in the same order -> p, two-sided."""
    raise NotImplementedError

"""The few statistics the reports need, thin over scipy, with the choice of method named."""
from collections.abc import Sequence

import numpy as np
from scipy import stats


def wilson(successes: int, n: int, level: float = 0.95) -> dict:
    """A proportion with its Wilson score interval: {value, n, low, high}.

    Unlike value +- 1.96 sd it stays inside [0, 1] and is honest at 0 and at 1.
    example  9 of 9 -> low 0.70: nine right answers do not say much
    """
    if n == 0:
        return {"value": None, "n": 0, "low": None, "high": None}
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return {"value": successes / n, "n": n,
            "low": float(interval.low), "high": float(interval.high)}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict:
    """Exact McNemar test of two runs on the same problems: only those that just one solves count.

    returns  {only_first, only_second, p}, p two-sided binomial on the discordant pairs
    example  10 only by the first, 2 only by the second -> p 0.0386
    raises   ValueError if the lengths differ
    """
    if len(first) != len(second):
        raise ValueError("McNemar needs the same problems in both runs: "
                         f"got {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second))
    only_second = sum(b and not a for a, b in zip(first, second))
    discordant = only_first + only_second
    p = stats.binomtest(only_first, discordant, 0.5).pvalue if discordant else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": float(p)}


def bootstrap_mean(values: Sequence[float], level: float = 0.95, draws: int = 2000) -> dict:
    """A mean with its seeded percentile bootstrap interval over units: {value, n, low, high}."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return {"value": None, "n": 0, "low": None, "high": None}
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(values.mean()), "n": len(values), "low": float(low), "high": float(high)}

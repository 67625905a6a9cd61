"""Intervals and tests against hand-worked numbers and an independent formula."""
import math

import numpy as np
import pytest

from stats import bootstrap_mean, mcnemar, wilson


def test_wilson_against_the_formula():
    for k, n in ((9, 9), (8, 9), (0, 20), (312, 600), (600, 600)):
        z, p = 1.959963984540054, k / n
        centre = (p + z * z / 2 / n) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
        ours = wilson(k, n)
        assert (ours["value"], ours["n"]) == (p, n)
        assert abs(ours["low"] - max(centre - half, 0)) < 1e-9
        assert abs(ours["high"] - min(centre + half, 1)) < 1e-9
    assert round(wilson(9, 9)["low"], 2) == 0.70 and wilson(0, 0)["value"] is None


def test_mcnemar_by_hand():
    """10 against 2 discordant pairs: 2 * (C(12,0) + C(12,1) + C(12,2)) / 2^12."""
    first = [True] * 10 + [False] * 2 + [True] * 30
    second = [False] * 10 + [True] * 2 + [True] * 30
    result = mcnemar(first, second)
    assert (result["only_first"], result["only_second"]) == (10, 2)
    assert abs(result["p"] - 2 * (1 + 12 + 66) / 4096) < 1e-12
    assert mcnemar(first, first)["p"] == 1.0
    with pytest.raises(ValueError, match="got 42 and 1"):
        mcnemar(first, [True])


def test_bootstrap_covers_and_repeats():
    values = np.random.default_rng(3).normal(5, 2, 400)
    ours = bootstrap_mean(values)
    assert ours == bootstrap_mean(values) and ours["low"] < ours["value"] < ours["high"]
    # the normal approximation, at n = 400
    assert abs((ours["high"] - ours["low"]) / 2 - 1.96 * values.std() / 20) < 0.03
    assert bootstrap_mean([])["value"] is None

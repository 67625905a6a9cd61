"""Intervals and tests against hand-worked numbers and an independent formula."""
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from stats import (
    adjusted_p,
    auc_within,
    bootstrap_mean,
    equivalence_p,
    mcnemar,
    mean_interval,
    rank_correlation,
    sign_flip,
    wilson,
)


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


def test_sign_flip_by_hand():
    """Two-sided over all 2^n patterns: six of one sign reach .031, five do not reach .05."""
    assert sign_flip([1, 2, 3, 4, 5, 6]) == 2 / 64 and sign_flip([1] * 5) == 2 / 32
    assert sign_flip([3, -1]) == 1.0      # sums 2, 4, -4, -2: all four are as large as 2
    # zeros drop out; of |3 +- 1 +- 1| six of the eight are at least 3
    assert sign_flip([3, 1, -1, 0]) == 6 / 8
    assert sign_flip([0, 0]) == 1.0


def test_sign_flip_sampled():
    """Beyond 16 differences patterns are drawn: never 0, near the exact value, the same twice."""
    rng = np.random.default_rng(0)
    strong, none = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
    assert sign_flip(strong) == 1 / 10000 == sign_flip(strong)
    d = none[:16] + 0.35
    assert abs(sign_flip(d) - sign_flip(np.append(d, 1e-9))) < 0.02


def test_mean_interval_against_tables():
    """n = 4, mean 2.5, sd 1.291: half = t(.975, 3) * 1.291 / 2 = 3.182 * .6455."""
    found = mean_interval([1, 2, 3, 4])
    assert found["n"] == 4 and abs(found["high"] - (2.5 + 3.182446 * 0.645497)) < 1e-5
    assert mean_interval([0.7]) == {"value": 0.7, "n": 1, "low": None, "high": None}


def test_equivalence():
    """Small for sure, large for sure, and too few to say."""
    assert equivalence_p([.01, -.01, .00, .01], .05) < .01
    assert equivalence_p([.2, .21, .19], .05) > .99
    assert equivalence_p([.1, -.1], .05) > .2
    assert equivalence_p([0, 0, 0], .05) == 0 and equivalence_p([1, 1], .05) == 1


def test_adjusted_p_by_hand():
    """Step-up: an early p may borrow from a later one."""
    found = adjusted_p([.001, .004, .03, .08, .15, .20])
    np.testing.assert_allclose(found, [.006, .012, .06, .12, .18, .20])
    np.testing.assert_allclose(adjusted_p([.09, .05, .06]), [.09] * 3)
    assert adjusted_p([]) == []


def test_auc_within_cells():
    """One cell is scikit-learn's; two cells that differ only in level are not confused."""
    rng = np.random.default_rng(1)
    right, scores = rng.random(300) < .6, rng.normal(0, 1, 300)
    scores[right] += 0.7
    one = auc_within(scores, right, ["a"] * 300)
    assert abs(one - roc_auc_score(right, scores)) < 1e-12
    # an easy cell scores 10 higher: pooled, the score seems to tell right from wrong
    cells = np.where(np.arange(300) < 150, "easy", "hard")
    easy = (rng.random(300) < np.where(cells == "easy", .9, .1))
    noise = rng.normal(0, 1, 300) + 10 * (cells == "easy")
    assert roc_auc_score(easy, noise) > .85 and abs(auc_within(noise, easy, cells) - .5) < .15
    assert auc_within([1, 2], [True, True], ["a", "a"]) is None
    assert auc_within([1, 1], [True, False], ["a", "a"]) == .5


def test_rank_correlation():
    found = rank_correlation([1, 2, 3, 4, 5], [2, 4, 6, 8, 100])
    assert abs(found["value"] - 1) < 1e-12 and found["n"] == 5 and found["low"] > 0.99
    assert rank_correlation([1, 1, 1], [1, 2, 3])["value"] is None

"""Intervals and tests against hand-worked numbers and an independent formula."""
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from statsmodels.stats import inter_rater, multitest, proportion
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from report.stats import (
    adjusted_p,
    auc_within,
    bootstrap_mean,
    bootstrap_ratio,
    cohens_h,
    cohens_kappa,
    corrected_rate,
    depth,
    equivalence_p,
    exact_interval,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_difference,
    pairs_needed,
    power_of_mcnemar,
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


def test_ratio_weighs_tokens_not_rows():
    """Equal counts: bootstrap_mean's interval. Unequal: the linearised ratio's, at n = 400."""
    ours = bootstrap_ratio([2, 9], [1, 9])
    assert (ours["value"], ours["n"], ours["low"], ours["high"]) == (1.1, 2, 1.0, 2.0)
    rng = np.random.default_rng(3)
    counts = rng.integers(5, 50, 400)
    sums = counts * rng.normal(3, 1, 400)
    ours = bootstrap_ratio(sums, counts)
    assert ours == bootstrap_ratio(sums, counts) and abs(ours["value"] - 3) < 0.2
    residual = sums - ours["value"] * counts
    half = 1.96 * residual.std() / counts.mean() / 20
    assert abs((ours["high"] - ours["low"]) / 2 - half) < 0.1 * half


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


def test_holm_by_hand():
    """Step-down: a later p is at least an earlier one's; ties and the empty family."""
    np.testing.assert_allclose(holm([.01, .04, .03]), [.03, .06, .06])
    np.testing.assert_allclose(holm([.5, .5]), [1, 1])
    assert holm([]) == []


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


def pairs_of(both, only_first, only_second, neither=0):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def test_against_statsmodels():
    """Wilson, McNemar, h, Holm and kappa with its interval, to 1e-10."""
    rng = np.random.default_rng(0)
    for k, n in ((243, 300), (298, 300), (300, 300), (78, 100), (0, 10), (3, 10)):
        low, high = proportion.proportion_confint(k, n, method="wilson")
        ours = wilson(k, n)
        assert abs(ours["low"] - low) < 1e-10 and abs(ours["high"] - high) < 1e-10
    for apart in ((57, 2), (10, 2), (8, 2), (0, 2), (8, 0), (6, 0), (0, 0), (31, 29)):
        table = [[5, apart[0]], [apart[1], 7]]
        assert abs(mcnemar(*pairs_of(5, *apart, 7))["p"]
                   - statsmodels_mcnemar(table, exact=True).pvalue) < 1e-10
    for p, q in ((.3, .8), (.81, 298 / 300), (1, 298 / 300), (0, 1), (.5, .5)):
        assert abs(cohens_h(p, q) - proportion.proportion_effectsize(q, p)) < 1e-10
    for _ in range(20):
        p = rng.uniform(size=rng.integers(1, 12)) ** 2
        theirs = multitest.multipletests(p, method="holm")[1]
        assert np.abs(np.array(holm(p)) - theirs).max() < 1e-10
        theirs = multitest.multipletests(p, method="fdr_bh")[1]
        assert np.abs(np.array(adjusted_p(p)) - theirs).max() < 1e-10
        n, labels = int(rng.integers(20, 200)), int(rng.integers(2, 5))
        first = rng.integers(0, labels, n)
        second = np.where(rng.uniform(size=n) < .6, first, rng.integers(0, labels, n))
        ours = cohens_kappa(first.tolist(), second.tolist())
        table = np.zeros((labels, labels))
        np.add.at(table, (first, second), 1)
        theirs = inter_rater.cohens_kappa(table)
        assert abs(ours["value"] - theirs.kappa) < 1e-10
        assert abs(ours["low"] - max(-1, theirs.kappa_low)) < 1e-10
        assert abs(ours["high"] - min(1, theirs.kappa_upp)) < 1e-10
        assert abs(ours["value"] - cohen_kappa_score(first, second)) < 1e-10


def test_published_failure_recounted():
    """243 of 300 against 298, then 300 against 298: from p 6e-15 and h .74 to p .5 and h -.16."""
    length, recount = pairs_of(241, 2, 57), pairs_of(298, 2, 0)
    assert mcnemar(*length)["p"] == pytest.approx(6.144e-15, rel=1e-3)
    assert cohens_h(.81, 298 / 300) == pytest.approx(.73857, abs=1e-5)
    assert mcnemar(*recount)["p"] == .5
    assert cohens_h(1, 298 / 300) == pytest.approx(-.16348, abs=1e-5)


def test_kappa_by_hand_and_where_it_says_nothing():
    """9 both pass, 2 and 2 apart, 17 both fail: .8667 agreement, kappa .7129, AC1 .7510."""
    found = cohens_kappa(*pairs_of(9, 2, 2, 17))
    assert found["agreement"] == pytest.approx(26 / 30)
    assert found["value"] == pytest.approx(.7129, abs=1e-4)
    assert found["ac1"] == pytest.approx(.7510, abs=1e-4)
    same = cohens_kappa([True] * 40, [True] * 40)
    assert (same["value"], same["agreement"], same["ac1"]) == (None, 1.0, 1.0)
    # one rater sees what the other does not: kappa 0, not an error
    assert cohens_kappa([True] * 40, [True] * 39 + [False])["value"] == 0
    assert cohens_kappa([], [])["n"] == 0
    few = cohens_kappa([True, True, False, False, True], [True, True, False, True, True])
    assert few["low"] < few["value"] < few["high"] == 1     # Wald's limit would be 1.24
    # ten items that agree say less than a thousand: .025 ** (1 / n) is agreement's limit
    for n, low in ((10, 2 * .025 ** (1 / 10) - 1), (1000, 2 * .025 ** (1 / 1000) - 1)):
        found = cohens_kappa([True, False] * (n // 2), [True, False] * (n // 2))
        assert (found["value"], found["high"]) == (1, 1) and found["low"] == pytest.approx(low)
    with pytest.raises(ValueError):
        cohens_kappa([True], [True, False])


def test_power_against_the_table_and_against_simulation():
    """The prior work's design table at alpha .01, and 4,000 simulated experiments."""
    table = {(.06, .56): {20: .571, 40: .964, 50: .993, 75: .9999},
             (.15, .35): {20: .041, 40: .148, 200: .922, 300: .991},
             (.05, .15): {40: .048, 75: .177, 200: .702, 300: .904}}
    for rates, row in table.items():
        for n, power in row.items():
            assert power_of_mcnemar(n, *rates) == pytest.approx(power, abs=6e-4)
    rng, won = np.random.default_rng(0), 0
    for _ in range(4000):
        first, second, _ = rng.multinomial(60, [.1, .3, .6])
        p = scipy_stats.binomtest(int(first), int(first + second)).pvalue if first + second else 1
        won += p < .05 and second > first
    assert power_of_mcnemar(60, .1, .3, .05) == pytest.approx(won / 4000, abs=.025)
    assert power_of_mcnemar(50, 0, 0) == 0


def test_exact_limits_hold_at_every_rate():
    """statsmodels' Clopper-Pearson; and no true rate beyond a limit meets it too often."""
    for k, n in ((0, 9), (9, 9), (91, 300), (239, 300)):
        low, high = proportion.proportion_confint(k, n, alpha=.04, method="beta")
        ours = exact_interval(k, n, .02)
        assert (ours["low"], ours["high"]) == pytest.approx((low, high), abs=1e-9)
    for n in (40, 61, 200, 300):
        below = [k for k in range(n + 1) if exact_interval(k, n, .02)["high"] <= .3]
        assert scipy_stats.binom.cdf(max(below), n, .3) <= .02
    assert exact_interval(0, 0)["high"] == 1


def test_paired_difference_by_the_published_formula():
    """Bonett and Price 2012; the vectors were worked apart. No width is lost at 9 of 9."""
    for counts, limits in (((2, 57, 300), (.1358, .2285)), ((2, 0, 300), (-.0196, .0063))):
        found = paired_difference(*counts)
        assert (found["low"], found["high"]) == pytest.approx(limits, abs=5e-5)
    certain = paired_difference(0, 9, 9)
    assert certain["value"] == certain["high"] == 1
    assert certain["low"] == pytest.approx(.478, abs=.001)
    assert paired_difference(0, 0, 0)["value"] is None
    rng, covered = np.random.default_rng(0), 0
    for first, second, _ in rng.multinomial(60, [.02, .75, .23], 2000):
        found = paired_difference(int(first), int(second), 60)
        covered += found["low"] <= .73 <= found["high"]
    assert .935 < covered / 2000 < .975


def test_pairs_that_a_gap_needs():
    needed = pairs_needed(.06, .56)
    assert needed == 33 and power_of_mcnemar(33, .06, .56) >= .9 > power_of_mcnemar(32, .06, .56)
    assert power_of_mcnemar(9, .06, .56) == pytest.approx(.038, abs=.005)      # once a GO


def test_rates_corrected_for_a_scorers_mistakes():
    """Rogan and Gladen's point by hand; the interval covers where both samplings vary."""
    found = corrected_rate(23, 150, (96, 100), (89, 100))   # brucellosis: published 5.1 %
    assert found["value"] == pytest.approx((23 / 150 + .89 - 1) / .85)
    assert found["value"] == pytest.approx(.051, abs=5e-4)
    assert corrected_rate(90, 100, (50, 100), (50, 100))["value"] is None       # a coin
    assert corrected_rate(90, 100, (0, 0), (9, 9))["value"] is None
    # more (fewer) passes than the scorer's mistakes explain: at the edge, and still uncertain
    none, every = corrected_rate(0, 200, (5, 9), (55, 60)), corrected_rate(200, 200, (56, 60),
                                                                            (50, 60))
    assert none["value"] == none["low"] == 0 and none["high"] > .1
    assert every["value"] == every["high"] == 1 and .85 < every["low"] < .99
    rng = np.random.default_rng(0)
    for rate, q1, q0, n, m1, m0 in ((.2, .9, .85, 200, 50, 50), (.9, .95, .8, 200, 80, 20),
                                    (.05, .9, .95, 300, 25, 75), (.5, .8, .8, 100, 50, 50)):
        seen = rng.binomial(n, rate * q1 + (1 - rate) * (1 - q0), 2000)
        right, wrong = rng.binomial(m1, q1, 2000), rng.binomial(m0, q0, 2000)
        found = [corrected_rate(int(k), n, (int(a), m1), (int(b), m0))
                 for k, a, b in zip(seen, right, wrong)]
        covered = np.mean([f["low"] <= rate <= f["high"] for f in found])
        naive = np.mean([wilson(int(k), n)["low"] <= rate <= wilson(int(k), n)["high"]
                         for k in seen[:200]])
        assert covered > .93 and (naive < .85 or rate == .5), (rate, covered, naive)


def test_paired_bootstrap_against_scipy():
    """scipy's percentile bootstrap of the same differences; within the error of 10,000 draws."""
    first, second = (np.array(side, float) for side in pairs_of(120, 10, 40, 30))
    ours = paired_bootstrap(first, second)
    theirs = scipy_stats.bootstrap((second - first,), np.mean, n_resamples=10000,
                                   method="percentile", rng=1).confidence_interval
    assert ours["value"] == pytest.approx(.15)
    assert abs(ours["low"] - theirs.low) < .006 and abs(ours["high"] - theirs.high) < .006
    # where a category decides everything, drawing within categories leaves no doubt
    strata = np.array(["a"] * 50 + ["b"] * 50)
    certain = paired_bootstrap(np.zeros(100), np.repeat([0., 1.], 50), strata)
    assert (certain["low"], certain["high"]) == (.5, .5)
    assert paired_bootstrap([], [])["value"] is None


def test_auc_against_scikit_learn():
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 9, 80), rng.uniform(size=80) < .4
    one = lambda x, y: auc_within(x, y, ["a"] * len(x))
    assert one(scores, right) == pytest.approx(roc_auc_score(right, scores), abs=1e-12)
    assert one([1, 2], [True, True]) is None


def test_depth_by_hand():
    blip = [0, .1, .6, .2, .7, .8, .9, 1]
    assert depth(blip, .5) == {"first": 2, "onset": 4, "sustained": 4, "peak": 6}
    # readable from tap 0 on: it never rose. A word that fades again: not sustained
    assert depth([.9, .9, .9, .9, .1], .5) == {"first": 1, "onset": -1, "sustained": 1, "peak": 1}
    fades = [0, 0, .8, .9, .8, .1, 0, 0]
    assert depth(fades, .5) == {"first": 2, "onset": 2, "sustained": -1, "peak": 3}
    never = [0, .1, .2, .1, 1]
    assert depth(never, .5) == {"first": -1, "onset": -1, "sustained": -1, "peak": 2}

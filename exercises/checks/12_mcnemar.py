"""Checks exercise 12, McNemar, by hand and by published p. Reading on gives it away."""
from math import comb

import scipy.stats

from report import stats

OURS = {"mcnemar": lambda first, second: stats.mcnemar(first, second)["p"]}
READ = [stats.mcnemar]


def outcomes(both, only_first, only_second, neither):
    """Two lists with so many problems of each kind."""
    return ([True] * (both + only_first) + [False] * (only_second + neither),
            [True] * both + [False] * only_first + [True] * only_second + [False] * neither)


def case(*counts):
    return lambda f: f.mcnemar(*outcomes(*counts))


CASES = {
    "10 only by the first, 2 only by the second": case(1, 10, 2, 0),
    "2 and 10, and 38 that do not tell": case(30, 2, 10, 8),
    "dual-reward against SFT, docs/training.md, seed 0": case(596, 0, 4, 0),
    "the same, seed 1": case(594, 0, 6, 0),
    "dual-reward against SFT on SmolLM2, docs/real_models.md": case(129, 2, 19, 2),
    "3 and 3": case(5, 3, 3, 5),
    "no problem tells them apart": case(7, 0, 0, 3),
}
INDEPENDENT = {
    "10 only by the first, 2 only by the second": 2 * (1 + 12 + 66) / 4096,
    "2 and 10, and 38 that do not tell": 2 * (1 + 12 + 66) / 4096,
    "dual-reward against SFT, docs/training.md, seed 0": 2 / 2 ** 4,            # published: 0.12
    "the same, seed 1": 2 / 2 ** 6,                                             # 0.031
    "dual-reward against SFT on SmolLM2, docs/real_models.md":                  # 0.00022
        2 * (1 + 21 + 210) / 2 ** 21,
    "3 and 3": 1.0,
    "no problem tells them apart": 1.0,
}


def wrong(p, empty=1.0):
    """p: function of (both, only the first, only the second, neither)."""
    def function(first, second):
        pairs = list(zip(first, second))
        counts = [pairs.count(kind) for kind in
                  ((True, True), (True, False), (False, True), (False, False))]
        return p(*counts) if counts[1] + counts[2] else empty
    return {"mcnemar": function}


def tail(k, n):
    return sum(comb(n, i) for i in range(k + 1)) / 2 ** n


MISTAKES = {
    "with the chi-squared form: it is off where few problems tell the runs apart":
        wrong(lambda a, b, c, d: scipy.stats.chi2.sf((b - c) ** 2 / (b + c), 1)),
    "with the chi-squared form and its correction: the exact test needs neither":
        wrong(lambda a, b, c, d: scipy.stats.chi2.sf(max(abs(b - c) - 1, 0) ** 2 / (b + c), 1)),
    "with one side alone: either run could have been the better one, so twice that":
        wrong(lambda a, b, c, d: tail(min(b, c), b + c)),
    "without the limit: 2 times the tail is above 1 where the two counts are equal":
        wrong(lambda a, b, c, d: 2 * tail(min(b, c), b + c)),
    "with all problems counted: those that both or neither solve do not tell the runs apart":
        wrong(lambda a, b, c, d: min(1.0, 2 * tail(a + min(b, c), a + b + c + d))),
    "with n all problems: only those that just one run solves are tossed":
        wrong(lambda a, b, c, d: min(1.0, 2 * tail(min(b, c), a + b + c + d))),
    "when agreements are counted: only problems that one run solves and the other does not":
        wrong(lambda a, b, c, d: min(1.0, 2 * tail(min(a, d), a + d))),
    "with 2^(all problems) below: only the n that just one run solves are tossed":
        wrong(lambda a, b, c, d: min(1.0, 2 * sum(
            comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (a + b + c + d))),
    "with p 0 where no problem tells the runs apart: then it is 1":
        wrong(lambda a, b, c, d: min(1.0, 2 * tail(min(b, c), b + c)), empty=0.0),
    "with the numbers of right answers as the two counts: count what just one run solves":
        wrong(lambda a, b, c, d: min(1.0, 2 * tail(min(a + b, a + c), 2 * a + b + c))),
    "with the larger of the two counts as k":
        wrong(lambda a, b, c, d: min(1.0, 2 * tail(max(b, c), b + c))),
    "when the runs are compared as if they had answered different problems":
        wrong(lambda a, b, c, d: scipy.stats.fisher_exact([[a + b, c + d], [a + c, b + d]])[1]),
    "with the tail of the first run's count alone: the smaller of the two, or one order gives "
    "another p": wrong(lambda a, b, c, d: min(1.0, 2 * tail(b, b + c))),
    "with k left out of the sum: it goes to k inclusive":
        wrong(lambda a, b, c, d: min(1.0, 2 * tail(min(b, c) - 1, b + c))),
    "with the chance of exactly this split: more uneven ones count too":
        wrong(lambda a, b, c, d: min(1.0, 2 * comb(b + c, b) / 2 ** (b + c))),
}

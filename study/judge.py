"""The plan's hypotheses against the measures: what is compared, how, and what came of it.

A test is of one number a run, or of its difference to another arm's run of the same base and seed
(the same training rows and LoRA start). The unit is the run. A test holds on a group of bases if it
holds on each of them, so its p is the largest of theirs (an intersection-union test); Holm's
correction counts every test that is planned, run or not. Nothing is judged before all of its runs
are there. Beside it stands the mean over a group's bases with Student's interval over them: of a
balanced nested design, runs within bases, that is the exact interval, and with three bases a wide
one.

    holds             p, corrected, is .05 or less
    contradicted      on some base the whole 95 % interval lies on the other side of the bound
    undecided         neither
    not measurable    some run has no such number, say no right answer to turn
    runs missing
"""
import numpy as np
import scipy

from report.stats import equivalence_p, holm, mean_interval, wilson
from study.plan import groups_of, seeds_of

LEVEL = 0.05
WORKS = 0.10    # a swap that turns so many more than a random direction: there is something to part
OF_TAP = ("probe", "control", "aligned", "jacobian")
Measures = dict[tuple[str, str, int], dict]     # (base, arm, seed) -> a run's measures


def value_of(run: dict, name: str) -> float | None:
    """One number of a run; None where it could not be measured.

    target.block                the trained token's top-1 share at the trained block
    words_over_random.block     answers turned by the swap's part along the words, less those turned
                                by a random direction, both as long as the base's swap there; None
                                where the whole swap of that length turns hardly more than random
    words_over_random.hand_over, swap_n.hand_over, ...  the same at the base's block of hand-over
    kept.words.hand_over, ...   answers that are still right after an edit there
    probe.block, ...            of OF_TAP, there; None where it was not measured
    Others are names of the run's values.
    """
    *names, where = name.split(".")
    if where not in ("block", "hand_over"):
        return run["values"][name]
    block, kind = run[where], names[-1]
    if kind in ("target", "word"):
        return run["curves"][f"{kind}.top1"][block + 1]
    tap = next(tap for tap in run["taps"] if tap["tap"] == block + 1)
    if kind in OF_TAP:
        return tap.get(kind)
    swaps = tap["swaps"]
    turned = lambda edit: swaps[edit][0]
    if kind != "words_over_random":
        return swaps[kind][1] if names[0] == "kept" else turned(kind)
    if turned("swap_n") is None or turned("swap_n") - turned("random_n") < WORKS:
        return None
    return turned("words_n") - turned("random_n")


def numbers(measures: Measures, base: str, test: dict) -> list[float | None]:
    """What the test is of, each run of one base; None where one of the two has no such number."""
    found = []
    of_fold = {run["fold"]: run for (b, arm, _), run in measures.items()
               if (b, arm) == (base, "base")}
    for (b, arm, seed), run in sorted(measures.items()):
        if (b, arm) != (base, test["arm"]):
            continue
        value = value_of(run, test["value"])
        if less := test.get("less"):
            other = (of_fold.get(run["fold"]) if less == "base"
                     else measures.get((base, less, seed)))
            if other is None:       # that run is missing: this one cannot be compared yet
                continue
            subtracted = value_of(other, test["value"])
            value = None if None in (value, subtracted) else value - subtracted
        found.append(value)
    return found


def p_of(values: np.ndarray, test: dict) -> float:
    """One-sided p that the mean is not as expected: t tests against the bound, at least two runs.

    Where all runs are alike it is 0 or 1, which the report does not call a p.
    """
    bound = test["bound"]
    if test["expect"] == "within":
        return equivalence_p(values, bound)
    side = "greater" if test["expect"] == "above" else "less"
    if np.ptp(values) == 0:
        return 0.0 if (values[0] > bound) == (side == "greater") and values[0] != bound else 1.0
    return float(scipy.stats.ttest_1samp(values, bound, alternative=side).pvalue)


def contradicted(interval: dict, test: dict) -> bool:
    """Whether a base's interval lies wholly on the other side of the bound."""
    low, high, bound = interval["low"], interval["high"], test["bound"]
    return (test["expect"] == "above" and high < bound or test["expect"] == "below" and low > bound
            or test["expect"] == "within" and (low > bound or high < -bound))


def resolves(values: np.ndarray, test: dict, tests: int) -> float:
    """The smallest distance from the bound that so many runs would have shown with power .8, at
    the strictest step of Holm's correction."""
    n = len(values)
    t = scipy.stats.t(n - 1)
    power = t.ppf(0.9 if test["expect"] == "within" else 0.8)
    return float((t.ppf(1 - LEVEL / tests) + power) * values.std(ddof=1) / n ** 0.5)


def judge(study: dict, measures: Measures) -> list[dict]:
    """Every hypothesis with its tests on each group: [{id, claim, outcome, tests: [...]}].

    A test's entry: group, the plan's keys, bases {name: interval, resolves, runs}, p, adjusted,
    pooled (over the group's bases), outcome.
    """
    groups = groups_of(study)
    planned = [(h, test, group) for h in study["hypotheses"] for test in h["tests"]
               for group in test["groups"]]
    family = sum(test["expect"] != "described" for _, test, _ in planned)
    found = []
    for h, test, group in planned:
        bases = groups.get(group, [])
        found.append({"id": h["id"], "group": group, **test,
                      **(describe if test["expect"] == "described" else try_on)(
                          study, bases, test, measures, family)})
    tested = [entry for entry in found if entry["expect"] != "described"]
    for entry, p in zip(tested, holm([1.0 if e["p"] is None else e["p"] for e in tested])):
        if entry["outcome"] is None:
            entry["adjusted"] = p
            entry["outcome"] = ("holds" if p <= LEVEL else "contradicted" if any(
                contradicted(e, entry) for e in entry["bases"].values()) else "undecided")
    return [{"id": h["id"], "claim": h["claim"],
             "tests": [entry for entry in found if entry["id"] == h["id"]]}
            for h in study["hypotheses"]]


def is_complete(study: dict, measures: Measures, base: str, arm: str) -> bool:
    kind = study["kinds"][study["bases"][base]["kind"]]
    wanted = seeds_of(arm, study["arms"][arm].get("group"), kind)
    return all((base, arm, seed) in measures for seed in range(1, 1 + wanted))


def try_on(study: dict, bases: list[str], test: dict, measures: Measures, family: int) -> dict:
    """One test on one group: intervals over each base's runs, the largest p, what is missing."""
    per_base = {name: numbers(measures, name, test) for name in bases}
    complete = bool(bases) and all(is_complete(study, measures, name, arm) for name in bases
                                   for arm in {test["arm"], test.get("less", test["arm"])})
    measured = all(None not in values for values in per_base.values())
    found = {}
    for name, values in per_base.items():
        values = np.array([v for v in values if v is not None])
        if len(values) > 1:
            found[name] = {**mean_interval(values), "resolves": resolves(values, test, family),
                           "runs": values.tolist()}
    judged = complete and measured
    means = [entry["value"] for entry in found.values()]
    return {"bases": found, "adjusted": None,
            "outcome": None if judged else "not measurable" if complete else "runs missing",
            "p": max(p_of(np.array(v), test) for v in per_base.values()) if judged else None,
            "pooled": mean_interval(means) if len(means) > 1 else None}


def describe(study: dict, bases: list[str], test: dict, measures: Measures, family: int) -> dict:
    """A share of problems on each base, all folds together, with Wilson's interval; no test.

    It holds where the whole interval is below the bound on each base."""
    found = {}
    for name in bases:
        runs = [run["values"] for (b, arm, _), run in measures.items()
                if (b, arm) == (name, test["arm"])]
        n = sum(run["n.word"] for run in runs)
        hits = sum(run["n.word"] * run[test["value"]] for run in runs)
        if runs:
            found[name] = {**wilson(round(hits), round(n)), "resolves": None,
                           "runs": [run[test["value"]] for run in runs]}
    complete = bool(bases) and all(is_complete(study, measures, b, test["arm"]) for b in bases)
    below = lambda end: all(entry[end] < test["bound"] for entry in found.values())
    outcome = ("runs missing" if not complete else "holds" if below("high") else
               "undecided" if below("low") else "contradicted")
    return {"bases": found, "p": None, "adjusted": None, "pooled": None, "outcome": outcome}

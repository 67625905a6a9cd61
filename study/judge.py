"""The plan's hypotheses against the measures: what is compared, how, and what came of it.

A test is of one number a run, or of its difference to another arm's run of the same base and seed
(the same training rows and LoRA start). The unit is the run. A test holds on a group of bases if it
holds on each of them, so its p is the largest of theirs (an intersection-union test); Holm's
correction is over all tests on all groups. Beside it stands the mean over a group's bases with
Student's interval over them: of a balanced nested design, runs within bases, that is the exact
interval, and with three bases a wide one.
"""
import numpy as np
import scipy

from report.stats import equivalence_p, holm, mean_interval

LEVEL = 0.05
Measures = dict[tuple[str, str, int], dict]     # (base, arm, seed) -> a run's measures


def value_of(run: dict, name: str) -> float | None:
    """One number of a run; None where it could not be measured.

    target.block                the trained token's top-1 share at the trained block
    words_over_random.block     answers turned by the swap's part along the words, less those turned
                                by a random direction, both as long as the base's swap there
    words_over_random.hand_over, swap_n.hand_over, ...  the same at the block of hand-over
    Others are names of the run's values.
    """
    kind, _, where = name.partition(".")
    if where not in ("block", "hand_over"):
        return run["values"][name]
    block = run["block"] if where == "block" else run.get("hand_over", run["block"])
    if kind in ("target", "word"):
        return run["curves"][f"{kind}.top1"][block + 1]
    swaps = next(tap["swaps"] for tap in run["taps"] if tap["tap"] == block + 1)
    turned = lambda edit: swaps[edit][0]
    if kind != "words_over_random":
        return turned(kind)
    return None if turned("words_n") is None else turned("words_n") - turned("random_n")


def differences(measures: Measures, base: str, test: dict) -> dict[int, float]:
    """{seed: the number that the test is of} on one base; a base's own runs pair by fold."""
    found = {}
    bases = {seed: run for (b, arm, seed), run in measures.items() if (b, arm) == (base, "base")}
    for (b, arm, seed), run in sorted(measures.items()):
        if (b, arm) != (base, test["arm"]):
            continue
        value = value_of(run, test["value"])
        if less := test.get("less"):
            other = (bases.get((seed - 1) % max(len(bases), 1) + 1) if less == "base"
                     else measures.get((base, less, seed)))
            subtracted = None if other is None else value_of(other, test["value"])
            value = None if None in (value, subtracted) else value - subtracted
        if value is not None:
            found[seed] = value
    return found


def p_of(values: np.ndarray, test: dict) -> float:
    """One-sided p that the mean is not as expected: t tests against the bound."""
    bound = test["bound"]
    if test["expect"] == "within":
        return equivalence_p(values, bound)
    side = "greater" if test["expect"] == "above" else "less"
    if len(values) < 2 or np.ptp(values) == 0:      # no spread: one run, or all alike
        beyond = values.mean() > bound if side == "greater" else values.mean() < bound
        return 0.0 if beyond else 1.0
    return float(scipy.stats.ttest_1samp(values, bound, alternative=side).pvalue)


def resolves(values: np.ndarray) -> float | None:
    """The smallest distance from the bound that so many runs would have shown, with power .8."""
    n = len(values)
    if n < 2:
        return None
    t = scipy.stats.t(n - 1)
    return float((t.ppf(1 - LEVEL) + t.ppf(0.8)) * values.std(ddof=1) / n ** 0.5)


def judge(study: dict, measures: Measures) -> list[dict]:
    """Every hypothesis with its tests on each group: [{id, claim, tests: [...], holds}].

    A test's entry: group, value, arm, less, expect, bound, bases {name: interval and resolves}, p,
    adjusted, pooled (over the group's bases), holds. holds is None where a run is still missing.
    """
    groups = {}
    for name, base in study["bases"].items():
        groups.setdefault(base["group"], []).append(name)
    asked = []
    for h in study["hypotheses"]:
        tests = [try_on(group, bases, test, measures)
                 for group, bases in groups.items() if group in h["groups"] for test in h["tests"]]
        asked.append({"id": h["id"], "claim": h["claim"], "tests": tests})
    done = [test for h in asked for test in h["tests"] if test["p"] is not None]
    for test, adjusted in zip(done, holm([test["p"] for test in done])):
        test |= {"adjusted": adjusted, "holds": adjusted <= LEVEL}
    for h in asked:
        held = [test["holds"] for test in h["tests"]]
        h["holds"] = None if None in held or not held else all(held)
    return asked


def try_on(group: str, bases: list[str], test: dict, measures: Measures) -> dict:
    per_base = {name: np.array(list(differences(measures, name, test).values()))
                for name in bases}
    found = {name: {**mean_interval(values), "resolves": resolves(values),
                    "runs": values.tolist()} for name, values in per_base.items() if len(values)}
    complete = len(found) == len(bases)
    means = [entry["value"] for entry in found.values()]
    return {"group": group, **test, "bases": found, "holds": None, "adjusted": None,
            "pooled": mean_interval(means) if len(means) > 1 else None,
            "p": max(p_of(values, test) for values in per_base.values()) if complete else None}

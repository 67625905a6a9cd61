"""The study's hypotheses against its runs: what is compared, how, and what came of it.

A hypothesis of the study file compares one measure in two conditions, run by run with equal seeds
(the same training rows and LoRA start). Across runs: mean difference, Student's interval, exact
sign-flip test; `within` asks the opposite, whether the difference is surely small (two one-sided t
tests). Across problems: the same unseen problems in both conditions, averaged over seeds, sign-flip
test. What is asked, and in which unit, stands in the study file, written before the runs; the false
discovery rate is controlled over the whole family (Benjamini-Hochberg).

Some hypotheses do not ask what they seem to ask. The plan is not edited after its runs, so what is
wrong with them stands here, in WITHDRAWN and REMARKS, and in templates/study.md.
"""
import json
from pathlib import Path

import numpy as np

from report.stats import adjusted_p, equivalence_p, mean_interval, sign_flip

EARLY = ("about 95 % of SFT's errors are worded problems, which it was not trained on; the test "
         "pools them, so it is about those and not about the trained wording")
# claim -> why its design cannot bear it, whatever its p
WITHDRAWN = {
    "Block 4 (55 %) costs less accuracy than block 6":
        "tested over problems, with three fixed models a block. The models are the unit, and over "
        "them the interval holds 0",
    "The operation's direction at block 4 matters no more after dual-reward than after SFT "
    "(log-odds against a random direction)":
        "the difference is the control's. The random direction is as long as the swap, and "
        "dual-reward's swap is the longer (17.1 against 12.4). Without the control the swap moves "
        "dual-reward more, 4.7 against 4.1 nats (seed 1: 4.74 and 4.08, random 3.62 and 0.85; "
        "seed 2: 4.51 and 4.03, random 3.73 and 0.86)",
}
# claim -> what has to be read with it
REMARKS = {
    "Dual-reward makes the stream name the operation before the last block; SFT does not":
        "the base's text had taught it to name operations, see above",
    "Both errors together fall by at least the published 11 points":
        "any collapse passes. The published model was right on 77.8 %, these are right on 0.0 %: "
        "the errors do not make the published drop",
    "At the trained block, swapping the part along the words turns under 5 % of answers":
        "it has no positive control, since the whole direction turns none there either",
    "A stronger early answer goes with right answers (SFT)": EARLY,
    "Something of the early answer is left after the last block's confidence is taken out (SFT)":
        EARLY,
}
Data = dict[str, dict[int, dict]]       # condition -> seed -> measures.json


def load_data(study: dict, runs: list[dict]) -> Data:
    """All measures.json by condition and seed; `same_as` conditions share another's first seeds."""
    data: Data = {}
    for run in runs:
        text = (Path(run["folder"]) / "measures.json").read_text()
        data.setdefault(run["condition"], {})[run["seed"]] = json.loads(text)
    for name, condition in study["conditions"].items():
        other = data.get(condition.get("same_as"), {})
        if other:
            data[name] = {s: m for s, m in other.items() if s <= study["sweep_seeds"]}
    return data


def values_of(data: Data, condition: str, measure: str) -> dict[int, float]:
    """One number a seed; runs where it could not be measured are left out.

    A model that is never right has no right answers to turn.
    """
    found = {s: m["values"].get(measure) for s, m in data.get(condition, {}).items()
             if not measure.startswith("flipped") or m["claims"]["clean_right"] > 0}
    return {s: v for s, v in found.items() if v is not None}


def at_equal_accuracy(data: Data, first: str, second: str) -> tuple[dict, dict]:
    """Answer strength of `first` at its end, of `second` at the first look that was as right."""
    ends, matched = {}, {}
    for seed in data.get(first, {}).keys() & data.get(second, {}).keys():
        end = data[first][seed]["trajectory"][-1]
        as_right = [p for p in data[second][seed]["trajectory"] if p["accuracy"] >= end["accuracy"]]
        if as_right:
            ends[seed], matched[seed] = end["answer"], as_right[0]["answer"]
    return ends, matched


# --------------------------------------------------------------------------------------------------
# tests


def test_hypothesis(h: dict, data: Data) -> dict:
    """One hypothesis: {effect (interval), n, p, p_problems, n_problems, direction}; None: not run.

    The base is one model: its value stands against every seed.
    """
    if h["measure"] == "answer.equal_accuracy":
        one, two = at_equal_accuracy(data, h["first"], h["second"])
    else:
        one = values_of(data, h["first"], h["measure"])
        if "value" in h:
            two = dict.fromkeys(one, h["value"])
        else:
            two = values_of(data, h.get("second", h["first"]),
                            h.get("second_measure", h["measure"]))
    if h.get("second") == "base" and two:
        two = dict.fromkeys(one, next(iter(two.values())))
    seeds = sorted(one.keys() & two.keys())
    if len(seeds) < 2:
        return {"outcome": "not run", "p": None}
    differences = np.array([one[s] - two[s] for s in seeds])
    beyond = {"lower": 1, "higher": -1}.get(h["expect"], 0) * h.get("beyond", 0)
    by_problem = problem_differences(h, data, seeds)
    p_seeds = (equivalence_p(differences, h["margin"]) if h["expect"] == "within"
               else sign_flip(differences + beyond))
    p_problems = None if by_problem is None else sign_flip(by_problem + beyond)
    asked_of_problems = h.get("unit", "seeds") == "problems"
    return {"effect": mean_interval(differences), "n": len(seeds), "p_problems": p_problems,
            "n_problems": None if by_problem is None else len(by_problem),
            "p": p_problems if asked_of_problems else p_seeds,
            "sign": float(np.sign(differences.mean() + beyond)), "beyond": beyond}


def problem_differences(h: dict, data: Data, seeds: list[int]) -> np.ndarray | None:
    """Each unseen problem's difference, averaged over seeds; None where there is no such list."""
    second = h.get("second")
    if "value" in h or "second_measure" in h or not second:
        return None

    def average(condition: str) -> np.ndarray | None:
        at = [s for s in seeds if s in data[condition]] or list(data[condition])
        lists = [data[condition][s]["problems"].get(h["measure"]) for s in at]
        return None if None in lists else np.mean(lists, axis=0)
    first, other = average(h["first"]), average(second)
    return None if first is None or other is None else first - other


def judge_all(study: dict, data: Data) -> list[dict]:
    """Every hypothesis with its outcome; the adjusted p over all that were run."""
    asked = [{**h, "question": q["question"], **test_hypothesis(h, data)}
             for q in study["questions"] for h in q["hypotheses"]]
    run = [h for h in asked if h["p"] is not None]
    for h, adjusted in zip(run, adjusted_p([h["p"] for h in run])):
        h["adjusted"] = adjusted
        sure = adjusted <= study["false_discovery_rate"]
        if h["expect"] == "within":
            # outside for sure: the whole interval lies beyond the margin
            e, m = h["effect"], h["margin"]
            outside = e["low"] > m or e["high"] < -m
            h["outcome"] = "confirmed" if sure else "refuted" if outside else "open"
        else:
            asked_for = 1 if h["expect"] == "higher" else -1
            h["outcome"] = ("open" if not sure else
                            "confirmed" if h["sign"] == asked_for else "refuted")
        if h["claim"] in WITHDRAWN:     # its p stays in the family: it was one of the tests
            h["outcome"] = "withdrawn"
    return asked

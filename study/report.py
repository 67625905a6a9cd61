"""From study/measures to docs/study.md, its appendix and its two pictures. No number is typed.

Two pages for a reader, with one picture of the effects (forest) and one of which claim holds where
(strips); all tables in the appendix.
"""
from pathlib import Path

import numpy as np

from files.disk import read_json, write_text
from report import plot
from report.stats import interval_text, mean_interval
from study.document import fields, fill, table
from study.judge import Measures, judge, numbers, value_of
from study.lens_quality import gains_text, quality_table
from study.measure import hand_over
from study.plan import Run, groups_of, plan

QUALITY = Path(__file__).parent / "lens_quality.json"    # python -m study.lens_quality --json
CLAIMS = ("decodable", "aligned", "verbalised", "used")
# columns of the tables of arms: {heading: (value, factor, digits)}
ARM_COLUMNS = {
    "right, %": ("accuracy", 100, 1), "trained token top-1 there, %": ("target.block", 100, 1),
    "operation's name top-1 there, %": ("word.block", 100, 1),
    "its strength before the last block, %": ("word.strength", 100, 1),
    "answer half risen at block": ("answer.half", 1, 2),
    "AUC of strength": ("auc", 1, 2)}
VALUES = {  # as a reader is told them
    "word.any": "operation's name on top before the last block",
    "target.block": "trained word on top at its block",
    "words_over_random.block": "turned by the words' part less by random, trained block",
    "words_over_random.hand_over": "turned by the words' part less by random, hand-over block",
    "answer.half": "block where the answer has half risen",
    "auc": "AUC of the word's strength"}
SHORT = {"target.block": "installing", "words_over_random.block": "trained block",
         "words_over_random.hand_over": "hand-over block"}
SWAP_COLUMNS = {
    "whole swap": "swap", "its part along the words": "words", "the rest": "rest",
    "swap as long as the rest": "short",
    "swap, one length": "swap_n", "words, one length": "words_n", "rest, one length": "rest_n",
    "word injected": "inject_n", "random": "random_n", "partner's stream": "patch"}


def index(runs: list[dict]) -> Measures:
    return {(run["base"], run["arm"], run["seed"]): run for run in runs}


def of_arm(measures: Measures, base: str, arm: str) -> list[dict]:
    return [run for (b, a, _), run in sorted(measures.items()) if (b, a) == (base, arm)]


def cell(runs: list[dict], value: str, factor: float, digits: int) -> str:
    """The mean over runs and Student's interval across them. example  '97.6 [97.2, 98.1]' """
    known = [v for v in (value_of(run, value) for run in runs) if v is not None]
    if not known:
        return "–"
    found = mean_interval(known)
    if found["low"] is None or np.ptp(known) == 0:
        return f"{factor * found['value']:.{digits}f}"
    return interval_text(found, factor, digits)


def show_p(p: float | None) -> str:
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


# --------------------------------------------------------------------------------------------------
# the two pages


def unit_of(test: dict) -> tuple[float, str]:
    """example  accuracy (100, "%"), less another's (100, "points"); answer.half (1, "blocks") """
    if test["value"] == "auc":
        return 1, ""
    if test["value"] == "answer.half":
        return 1, "blocks"
    return 100, "points" if "less" in test else "%"


def test_name(study: dict, test: dict) -> str:
    """example  'accuracy: dual-reward, true words, less SFT' """
    label = study["arms"][test["arm"]]["label"]
    less = f", less {study['arms'][test['less']]['label']}" if "less" in test else ""
    return f"{VALUES.get(test['value'], test['value'])}: {label}{less}"


def effect_text(interval: dict, factor: float) -> str:
    """example  '-1.9 [-2.4, -1.4]'; '100.0, all runs alike' """
    digits = 1 if factor == 100 else 2
    if np.ptp(interval["runs"]) == 0 and interval["low"] == interval["high"]:
        return f"{factor * interval['value']:.{digits}f}, all runs alike"
    return number_text(interval, factor)


def hypothesis_table(asked: list[dict], study: dict) -> str:
    rows = []
    for h in asked:
        for test in h["tests"]:
            factor, unit = unit_of(test)
            sign = "±" if test["expect"] == "within" else ""
            effects = [f"{name} {effect_text(e, factor)}" for name, e in test["bases"].items()]
            if test["pooled"]:
                over = {**test["pooled"], "runs": [e["value"] for e in test["bases"].values()]}
                effects.append(f"over bases {effect_text(over, factor)}")
            finest = [e["resolves"] for e in test["bases"].values() if e["resolves"]]
            alike = test["p"] == 0
            bound = f"{sign}{factor * test['bound']:g} {unit}".strip()
            expected = ("below " if test["expect"] == "described" else f"{test['expect']} ") + bound
            rows.append([h["id"], test_name(study, test), test["group"], expected,
                         "; ".join(effects) or "–",
                         f"{factor * max(finest):.{1 if factor == 100 else 2}f}" if finest else "–",
                         "all alike" if alike else "no test" if test["expect"] == "described"
                         else show_p(test["adjusted"]), test["outcome"]])
    return table(["", "what is compared", "bases", "expected", "effect, 95 %", "resolves",
                  "adjusted p", "outcome"], rows)


def outcome_text(h: dict) -> str:
    """What came of a hypothesis's tests. example  'holds on untaught, undecided on smollm2' """
    said = {}
    for test in h["tests"]:
        several = len({t["value"] for t in h["tests"]}) > 1
        what = SHORT.get(test["value"], test["value"]) if several else test["arm"].upper()
        outcomes = said.setdefault(what, {})
        outcomes.setdefault(test["outcome"], []).append(test["group"])
    parts = [(what, ", ".join(f"{outcome} on {' and '.join(groups)}"
                              for outcome, groups in outcomes.items()))
             for what, outcomes in said.items()]
    return "; ".join(f"{what} {text}" if len(parts) > 1 else text for what, text in parts)


def say(ask: str, study: dict, asked: list[dict], measures: Measures) -> str:
    """What a {field} of templates/study_answers.md stands for; raises KeyError if nothing does.

    H4                              what came of the hypothesis
    H4 0 untaught                   the effect of its first test on that group, over bases
    accuracy dual untaught          of a group or one base: mean over bases of the mean over runs
    accuracy dual-sft taught ci     less another arm's; ci: of one base, with its interval
    In place of a value's dots stands @, as in swap_n@hand_over.
    """
    first, *rest = ask.split()
    hypothesis = next((h for h in asked if h["id"] == first), None)
    if hypothesis and not rest:
        return outcome_text(hypothesis)
    what, group, *ci = rest
    if hypothesis:
        test = [t for t in hypothesis["tests"] if t["group"] == group][int(what)]
        over = test["pooled"] or next(iter(test["bases"].values()))
        return number_text(over, unit_of(test)[0])
    arm, _, less = what.partition("-")
    test = {"value": first.replace("@", "."), "arm": arm} | ({"less": less} if less else {})
    runs = [[v for v in numbers(measures, base, test) if v is not None]
            for base in groups_of(study).get(group, [group])]
    if not all(runs):
        raise KeyError(ask)
    factor = unit_of(test)[0]
    if ci:
        [runs_of_base] = runs
        return number_text(mean_interval(runs_of_base), factor)
    return mean_text([np.mean(of_base) for of_base in runs], factor, 2 if factor == 1 else 1)


def number_text(interval: dict, factor: float) -> str:
    """example  '-8.7 [-9.3, -8.2]' """
    return interval_text(interval, factor, 2 if factor == 1 else 1)


def design_table(study: dict, planned: list[Run], measures: Measures) -> str:
    """Arms in rows, bases in columns: how many runs there are of those planned."""
    bases, rows = list(study["bases"]), []
    for name, arm in study["arms"].items():
        counts = []
        for base in bases:
            wanted = [r for r in planned if (r.base, r.arm) == (base, name)]
            done = sum((r.base, r.arm, r.seed) in measures for r in wanted)
            counts.append(str(done) if done == len(wanted) else f"{done} of {len(wanted)}")
        rows.append([arm["label"], *counts])
    return table(["arm", *bases], rows)


def peaks_text(study: dict, measures: Measures) -> str:
    """The most answers that a base's swap turns. example  'taught 59 %, smollm2 16 to 44 %' """
    found = []
    for name in study["bases"]:
        peaks = [100 * max(run["turned_by_block"]) for run in of_arm(measures, name, "base")]
        if peaks:
            ends = dict.fromkeys(f"{peak:.0f}" for peak in (min(peaks), max(peaks)))
            found.append(f"{name} {' to '.join(ends)} %")
    return ", ".join(found)


def draw_forest(study: dict, asked: list[dict], path: Path) -> None:
    """Each test a row: a dot a run, the mean and its interval a base, the bound shaded."""
    rows = []
    for h in asked:
        for test in h["tests"]:
            if test["bases"]:
                factor, unit = unit_of(test)
                low = -test["bound"] if test["expect"] == "within" else test["bound"]
                rows.append({"title": f"{h['id']} {test_name(study, test)} ({test['group']})",
                             "unit": unit, "bounds": (factor * low, factor * test["bound"]),
                             "bases": {name: ([factor * v for v in e["runs"]], factor * e["value"],
                                              None if e["low"] is None else
                                              (factor * e["low"], factor * e["high"]))
                                       for name, e in test["bases"].items()}})
    if rows:
        plot.forest(rows, path)


def draw_strips(study: dict, measures: Measures, path: Path) -> None:
    """Which claim holds after which block: a row an arm, a column a group of bases."""
    panels = {}
    for arm, about in study["arms"].items():
        for group, bases in groups_of(study).items():
            runs = [run for base in bases for run in of_arm(measures, base, arm)]
            if runs:
                taps = sorted({tap["tap"] for run in runs for tap in run["taps"]})
                held = [[np.mean([claim in tap["claims"] for run in runs for tap in run["taps"]
                                  if tap["tap"] == t]) for t in taps] for claim in CLAIMS]
                held.append([np.mean([run["curves"]["target.top1"][t] for run in runs])
                             for t in taps])
                panels[about["label"], group] = ([t - 1 for t in taps], held)
    plot.strips(panels, [*CLAIMS, "trained word on top"], path)


# --------------------------------------------------------------------------------------------------
# the appendix


def arms_table(study: dict, measures: Measures, base: str) -> str:
    rows = []
    for arm, about in study["arms"].items():
        if runs := of_arm(measures, base, arm):
            rows.append([about["label"], str(len(runs)),
                         *(cell(runs, *column) for column in ARM_COLUMNS.values())])
    return table(["arm", "runs", *ARM_COLUMNS], rows)


def swaps_table(measures: Measures, base: str, arm: str) -> str:
    """Right answers turned into the other operation's, and still right, %, by what is added."""
    runs, rows = of_arm(measures, base, arm), []
    for t in sorted({tap["tap"] for run in runs for tap in run["taps"]}):
        here = [tap["swaps"] for run in runs for tap in run["taps"] if tap["tap"] == t]
        rows.append([f"L{t - 1}", str(len(here)),
                     *(f"{mean_text([swaps[kind][0] for swaps in here])} "
                       f"({mean_text([swaps[kind][1] for swaps in here], digits=0)})"
                       for kind in SWAP_COLUMNS.values())])
    return table(["after", "runs", *SWAP_COLUMNS], rows)


def mean_text(values: list[float | None], factor: float = 100, digits: int = 1) -> str:
    known = [v for v in values if v is not None]
    return f"{factor * np.mean(known):.{digits}f}" if known else "–"


def directions_table(study: dict, measures: Measures, base: str) -> str:
    """The best subspace beside the class means' swap, at the trained and the hand-over block."""
    rows = []
    for arm, about in study["arms"].items():
        found = {}
        for run in of_arm(measures, base, arm):
            for block, two in run["subspace"].items():
                found.setdefault(int(block), []).append(two)
        for block, runs in sorted(found.items()):
            best, swap = zip(*runs)
            rows.append([about["label"], f"L{block}", str(len(runs)),
                         mean_text([turned for turned, _, _ in best]),
                         mean_text([turned for turned, _, _ in swap]),
                         mean_text([near for _, _, near in best], 1, 2),
                         mean_text([near for _, _, near in swap], 1, 2)])
    return table(["arm", "after", "runs", "turned by the best subspace, %", "by the swap, %",
                  "gain on near misses, nats", "by the swap, nats"], rows)


def jacobian_table(study: dict, measures: Measures, base: str) -> str:
    """The right word first of the words by the Jacobian lens, %, and its two fits' cosine."""
    rows = []
    for arm, about in study["arms"].items():
        taps = [tap for run in of_arm(measures, base, arm) for tap in run["taps"]
                if "jacobian" in tap]
        for t in sorted({tap["tap"] for tap in taps}):
            here = [tap for tap in taps if tap["tap"] == t]
            rows.append([about["label"], f"L{t - 1}", str(len(here)),
                         mean_text([tap["jacobian"] for tap in here]),
                         f"{min(tap['floor'] for tap in here):.3f}"])
    return table(["arm", "after", "runs", "right word first, %", "cosine of two fits"], rows)


def appendix(study: dict, measures: Measures) -> str:
    parts = []
    for base, about in study["bases"].items():
        if not any(b == base for b, _, _ in measures):
            continue
        block = next(run["block"] for (b, _, _), run in measures.items() if b == base)
        of_base = of_arm(measures, base, "base")
        where = hand_over([run["turned_by_block"] for run in of_base]) if of_base else "unknown"
        parts.append(f"## {base} (`{about['model']}`): trained block {block}, hand-over block "
                     f"{where}\n\n{arms_table(study, measures, base)}")
        for arm in ("base", "sft", "dual", "hand_over"):
            if of_arm(measures, base, arm):
                parts.append(f"### {base}, {study['arms'][arm]['label']}: right answers turned "
                             f"(still right), %\n\n{swaps_table(measures, base, arm)}")
        parts.append(f"### {base}: the best subspace\n\n"
                     f"{directions_table(study, measures, base)}")
        parts.append(f"### {base}: by the Jacobian lens\n\n{jacobian_table(study, measures, base)}")
    return "\n\n".join(parts)


def answers(study: dict, asked: list[dict], measures: Measures, complete: bool) -> str:
    """The plan's template of sentences and claims; before its last run, and where it names none,
    each hypothesis and what came of it."""
    if complete and "answers" in study:
        named = max(value_of(run, "word.any") for (_, arm, _), run in measures.items()
                    if arm in ("base", "sft", "sft_500", "grpo"))
        said = {"named_most": f"{100 * named:.1f}"} | {
            f"block_{base}": str(run["hand_over"]) for (base, arm, _), run in measures.items()
            if arm == "hand_over"}
        try:
            return fill(study["answers"], **said, **{
                ask: say(ask, study, asked, measures) for ask in fields(study["answers"])
                if ask not in said})
        except KeyError:    # a plan of one's own has not all of its arms
            pass
    return "\n".join(f"- **{h['id']}. {h['claim']}**: {outcome_text(h)}." for h in asked)


def write_report(study: dict, runs: list[dict], out: Path) -> list[dict]:
    """Write out/study.md, study_appendix.md and two pictures; returns the judged hypotheses."""
    measures = index(runs)
    asked = judge(study, measures)
    planned = plan(study)
    hours = sum(sum(run["seconds"]) for run in runs) / 3600
    on_gpu = sum("gpu" in run["versions"]["device"] for run in runs)
    tests = [test for h in asked for test in h["tests"]]
    picture = lambda drawn, about, name: f"![{about}]({name})" if drawn else ""
    quality = read_json(QUALITY)
    text = fill(
        "study", n_runs=len(runs), n_planned=len(planned), hours=hours, on_gpu=on_gpu,
        answers=answers(study, asked, measures, len(runs) == len(planned)),
        peaks=peaks_text(study, measures), gains=gains_text(quality),
        design=design_table(study, planned, measures),
        forest=picture(any(test["bases"] for test in tests), "effects beside what was expected",
                       "study_forest.png"),
        strips=picture(runs, "block by claim", "study_claims.png"))
    write_text(out / "study.md", text)
    write_text(out / "study_appendix.md", fill(
        "study_appendix", tables=appendix(study, measures), quality=quality_table(quality),
        hypotheses=hypothesis_table(asked, study),
        n_tests=sum(test["expect"] != "described" for test in tests)))
    if runs:
        draw_forest(study, asked, out / "study_forest.png")
        draw_strips(study, measures, out / "study_claims.png")
    print(f"wrote {out / 'study.md'}: {len(runs)} of {len(planned)} runs")
    return asked

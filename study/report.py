"""From study/measures to docs/study.md, its appendix and its two pictures. No number is typed.

Two pages for a reader, with one picture of the effects (forest) and one of which claim holds where
(strips); all tables in the appendix.
"""
from pathlib import Path

import numpy as np

from files.disk import write_text
from report import plot
from report.stats import interval_text, mean_interval
from study.document import fill, table
from study.judge import Measures, judge, value_of
from study.plan import plan

CLAIMS = ("decodable", "aligned", "verbalised", "used")
OUTCOME = {True: "holds", False: "not shown", None: "runs missing"}
# columns of the tables of arms: {heading: (value, factor, digits)}
ARM_COLUMNS = {
    "right, %": ("accuracy", 100, 1), "trained token top-1 there, %": ("target.block", 100, 1),
    "operation's name top-1 there, %": ("word.block", 100, 1),
    "its strength before the last block, %": ("word.strength", 100, 1),
    "answer half risen at block": ("answer.half", 1, 2),
    "AUC of strength": ("auc", 1, 2)}
SWAP_COLUMNS = {
    "whole swap": "swap", "its part along the words": "words", "the rest": "rest",
    "swap, one length": "swap_n", "words, one length": "words_n", "rest, one length": "rest_n",
    "word injected": "inject_n", "random": "random_n", "partner's stream": "patch"}


def index(runs: list[dict]) -> Measures:
    return {(run["base"], run["arm"], run["seed"]): run for run in runs}


def of_arm(measures: Measures, base: str, arm: str) -> list[dict]:
    return [run for (b, a, _), run in sorted(measures.items()) if (b, a) == (base, arm)]


def cell(runs: list[dict], value: str, factor: float, digits: int) -> str:
    """The mean over runs and Student's interval across them. example  '97.6 [97.2, 98.1]' """
    numbers = [v for v in (value_of(run, value) for run in runs) if v is not None]
    if not numbers:
        return "–"
    found = mean_interval(numbers)
    if found["low"] is None or np.ptp(numbers) == 0:
        return f"{factor * found['value']:.{digits}f}"
    return interval_text(found, factor, digits)


def show_p(p: float | None) -> str:
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


# --------------------------------------------------------------------------------------------------
# the two pages


def unit_of(test: dict) -> tuple[float, str]:
    """example  accuracy -> (100, "points"); answer.half -> (1, "blocks") """
    if test["value"] == "auc":
        return 1, ""
    return (1, "blocks") if test["value"] == "answer.half" else (100, "points")


def test_name(study: dict, test: dict) -> str:
    label = study["arms"][test["arm"]]["label"]
    less = f", less {study['arms'][test['less']]['label']}" if "less" in test else ""
    return f"{test['value']}: {label}{less}"


def hypothesis_table(study: dict, asked: list[dict]) -> str:
    rows = []
    for h in asked:
        for test in h["tests"]:
            factor, unit = unit_of(test)
            bound = f"{test['expect']} {'±' * (test['expect'] == 'within')}" \
                    f"{factor * test['bound']:g} {unit}".strip()
            digits = 1 if factor == 100 else 2
            effects = [name + " " + (interval_text(e, factor, digits) if e["low"] is not None
                                     else f"{factor * e['value']:.{digits}f}")
                       for name, e in test["bases"].items()]
            finest = [e["resolves"] for e in test["bases"].values() if e["resolves"] is not None]
            rows.append([h["id"], test_name(study, test), bound, test["group"],
                         "; ".join(effects) or "–",
                         f"{factor * max(finest):.{digits}f}" if finest else "–",
                         show_p(test["adjusted"]), OUTCOME[test["holds"]]])
    return table(["", "what is compared", "expected", "bases", "effect on each, 95 % over runs",
                  "resolves", "adjusted p", "outcome"], rows)


def answer_lines(asked: list[dict]) -> str:
    """Each hypothesis, and on which bases it holds."""
    lines = []
    for h in asked:
        by_group = {}
        for test in h["tests"]:
            by_group.setdefault(test["group"], []).append(test["holds"])
        said = [f"{OUTCOME[None if None in held else all(held)]} on {group}"
                for group, held in by_group.items()]
        lines.append(f"- **{h['id']}. {h['claim']}**: {', '.join(said)}.")
    return "\n".join(lines)


def design_table(study: dict, measures: Measures) -> str:
    """Arms in rows, bases in columns: how many runs there are of those planned."""
    runs, bases = plan(study), list(study["bases"])
    rows = []
    for name, arm in study["arms"].items():
        counts = []
        for base in bases:
            planned = [r for r in runs if (r.base, r.arm) == (base, name)]
            done = sum((r.base, r.arm, r.seed) in measures for r in planned)
            counts.append(str(done) if done == len(planned) else f"{done} of {len(planned)}")
        rows.append([arm["label"], *counts])
    return table(["arm", *bases], rows)


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
    """Which claim holds after which block: one strip a claim, one panel an arm and group."""
    panels = {}
    for group in dict.fromkeys(base["group"] for base in study["bases"].values()):
        bases = [name for name, base in study["bases"].items() if base["group"] == group]
        for arm, about in study["arms"].items():
            runs = [run for base in bases for run in of_arm(measures, base, arm)]
            if runs:
                taps = [tap["tap"] for tap in runs[0]["taps"]]
                held = [[np.mean([claim in tap["claims"] for run in runs for tap in run["taps"]
                                  if tap["tap"] == t]) for t in taps] for claim in CLAIMS]
                panels[f"{group}: {about['label']}"] = ([t - 1 for t in taps], held)
    plot.strips(panels, list(CLAIMS), path)


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
    """Right answers turned into the other operation's, %, by what is added after which block."""
    runs, rows = of_arm(measures, base, arm), []
    for i, tap in enumerate(runs[0]["taps"]):
        cells = []
        for kind in SWAP_COLUMNS.values():
            turned = [run["taps"][i]["swaps"][kind][0] for run in runs if i < len(run["taps"])]
            turned = [v for v in turned if v is not None]
            cells.append(f"{100 * np.mean(turned):.1f}" if turned else "–")
        rows.append([f"L{tap['tap'] - 1}", *cells])
    return table(["after", *SWAP_COLUMNS], rows)


def directions_table(study: dict, measures: Measures, base: str) -> str:
    """The best subspace: answers turned at the trained and at the hand-over block."""
    rows = []
    for arm, about in study["arms"].items():
        found = {}
        for run in of_arm(measures, base, arm):
            for block, (turned, _, _) in run["subspace"].items():
                found.setdefault(int(block), []).append(turned)
        rows += [[about["label"], f"L{block}", str(len(turned)),
                  f"{100 * np.mean([t for t in turned if t is not None] or [np.nan]):.1f}"]
                 for block, turned in sorted(found.items())]
    return table(["arm", "block", "runs", "turned, %"], rows)


def jacobian_table(study: dict, measures: Measures, base: str) -> str:
    """The right word first of the words by the Jacobian lens, %, and its two fits' cosine."""
    rows = []
    for arm, about in study["arms"].items():
        runs = [r for r in of_arm(measures, base, arm) if "jacobian" in r["taps"][0]]
        if runs:
            per_tap = list(zip(*([(tap["tap"], tap["jacobian"], tap["floor"])
                                  for tap in run["taps"]] for run in runs)))
            rows += [[about["label"], f"L{taps[0][0] - 1}",
                      f"{100 * np.mean([t[1] for t in taps]):.1f}",
                      f"{min(t[2] for t in taps):.3f}"] for taps in per_tap]
    return table(["arm", "after", "right word first, %", "cosine of two fits"], rows)


def appendix(study: dict, measures: Measures) -> str:
    parts = []
    for base, about in study["bases"].items():
        if not any(b == base for b, _, _ in measures):
            continue
        block = next(run["block"] for (b, _, _), run in measures.items() if b == base)
        found = [run["hand_over"] for run in of_arm(measures, base, "base")]
        parts.append(f"## {base} (`{about['model']}`): trained block {block}, hand-over block "
                     f"{', '.join(map(str, found))}\n\n{arms_table(study, measures, base)}")
        for arm in ("base", "sft", "dual", "hand_over"):
            if of_arm(measures, base, arm):
                parts.append(f"### {base}, {study['arms'][arm]['label']}: right answers turned, "
                             f"%\n\n{swaps_table(measures, base, arm)}")
        parts.append(f"### {base}: the best subspace\n\n"
                     f"{directions_table(study, measures, base)}")
        parts.append(f"### {base}: by the Jacobian lens\n\n{jacobian_table(study, measures, base)}")
    return "\n\n".join(parts)


def write_report(study: dict, runs: list[dict], out: Path) -> list[dict]:
    """Write out/study.md, study_appendix.md and two pictures; returns the judged hypotheses."""
    measures = index(runs)
    asked = judge(study, measures)
    planned = plan(study)
    hours = sum(sum(run["seconds"]) for run in runs) / 3600
    text = fill("study", n_runs=len(runs), n_planned=len(planned), hours=hours,
                answers=answer_lines(asked), design=design_table(study, measures),
                hypotheses=hypothesis_table(study, asked),
                n_tests=sum(test["p"] is not None for h in asked for test in h["tests"]))
    write_text(out / "study.md", text)
    write_text(out / "study_appendix.md", fill("study_appendix", tables=appendix(study, measures)))
    if runs:
        draw_forest(study, asked, out / "study_forest.png")
        draw_strips(study, measures, out / "study_claims.png")
    print(f"wrote {out / 'study.md'}: {len(runs)} of {len(planned)} runs")
    return asked

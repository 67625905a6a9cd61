"""From the runs' measures.json to RESULTS.md: tables and pictures. No result in it is typed."""
import json
import statistics
from pathlib import Path

import numpy as np

from report import plot
from report.stats import interval_text, mean_interval, rank_correlation
from study.document import cores_text, fill, table, write_results
from study.hypotheses import REMARKS, WITHDRAWN, Data, judge_all, load_data, values_of

# the first word of a measure's name: its unit, and what to multiply it with
UNITS = {**dict.fromkeys(("accuracy", "lowest", "word", "symbol", "target", "answer", "probe",
                          "aligned", "jacobian", "flipped", "right", "masked"), ("%", 100)),
         **dict.fromkeys(("used", "lens_used", "after_confidence", "entropy", "kl"), ("nats", 1)),
         **dict.fromkeys(("auc", "cosine"), ("", 1))}
IN_BLOCKS = ("word.peak", "answer.peak", "word.onset", "answer.onset")
CLAIMS = {"decodable": "decodable", "aligned": "aligned", "verbalised": "verbalised",
          "used": "used", "aligned_jacobian": "aligned, Jacobian lens",
          "verbalised_jacobian": "verbalised, Jacobian lens"}
MARKS = {"confirmed": "✓", "refuted": "✗", "open": "?", "withdrawn": "⊘", "not run": "–"}

# tables of measures, a row a condition: {heading: measure}
MAIN = {"seeds": "seeds", "answers right, %": "accuracy.symbolic",
        "names the operation, %": "word.strength",
        "top word at the trained block, %": "word.block.symbolic",
        "shows the answer early, %": "answer.strength", "answer's peak block": "answer.peak",
        "answers turned by a swap after block 0, %": "flipped.first",
        "after the trained block, %": "flipped.means.block"}
# at the trained block: pushes and ablations along the words against random ones
CAUSES = {"swap, over random, nats": "used.block",
          "its part along the words, over random, nats": "lens_used.block",
          "right with the words' span ablated, %": "right.lens_ablated.block",
          "a random span, %": "right.random_ablated.block",
          "the classes' span, %": "right.means_ablated.block",
          "cosine of probe and word": "cosine.block"}
# generalisation in steps
STEPS = {"symbolic": "7 * 8", "asked": "what is 7 * 8", "worded": "seven times eight",
         "asked_worded": "what is the product of seven and eight"}
LADDER = {**{f"right: {text}, %": f"accuracy.{step}" for step, text in STEPS.items()},
          **{f"word: {text}, %": f"word.block.{step}" for step, text in STEPS.items()},
          "token before, %": "word.block.earlier", "answer's token, %": "word.block.later",
          "other blocks, %": "word.spread", "fires though masked, %": "masked.fires"}
SWEEP = {"seeds": "seeds", "answers right, %": "accuracy.symbolic",
         "lowest on the way, %": "lowest",
         "trained token top-1 at its block, %": "target.block",
         "names the operation, %": "word.strength",
         "word top-1 in other blocks, %": "word.spread",
         "shows the answer early, %": "answer.strength",
         "right word first by the Jacobian lens, %": "jacobian.aligned.block"}
PREDICTION = {"word": "auc.word", "early answer": "auc.own",
              "last block's confidence": "auc.confidence",
              "word, confidence taken out": "after_confidence.word",
              "early answer, confidence taken out": "after_confidence.own"}
# what the logit lens says after each block: {heading: curve}
SERIES = {"operation word, %": "word.prob", "operator symbol, %": "symbol.prob",
          "answer, %": "answer.prob", "entropy, nats": "entropy", "KL to the output, nats": "kl"}
# edits that turn right answers into the other operation's
SWAPS = {"means": "classes' difference", "lens": "its part along the words", "rest": "the rest",
         "random": "random, as long", "patch": "whole stream, last token",
         "patch_operator": "whole stream, operator"}

# pictures: {panel: what of measures.json, or of a trajectory's look, or which measure}
BY_BLOCK = {
    "operation word, probability (logit lens)": lambda m: m["curves"]["word.prob"],
    "right word first of the words (Jacobian lens)": lambda m: [
        tap["jacobian_lens"]["aligned"]["value"] for tap in m["claims"]["taps"]],
    "answer, probability (logit lens)": lambda m: m["curves"]["answer.prob"],
    "right answers turned by swapping the operation": lambda m: [
        tap["swaps"]["means"]["flipped"] for tap in m["claims"]["taps"]]}
BY_STEP = {"accuracy": "answers right", "word": "operation word top-1 at the trained block",
           "answer": "answer before the last block, probability"}
SWEPT = {"answers right": "accuracy.symbolic", "trained token top-1 at its block": "target.block",
         "word top-1 in other blocks": "word.spread"}


# --------------------------------------------------------------------------------------------------
# numbers as text


def unit_of(measure: str) -> tuple[str, float]:
    """example  "accuracy.symbolic" -> ("%", 100); "answer.peak" -> ("blocks", 1)"""
    return ("blocks", 1) if measure in IN_BLOCKS else UNITS[measure.split(".")[0]]


def show(interval: dict, measure: str, signed: bool = False) -> str:
    """example  {value .021, low .012, high .03}, "accuracy.symbolic" -> '2.1 [1.2, 3.0]' """
    _, factor = unit_of(measure)
    digits, sign = (1 if factor == 100 else 2), ("+" if signed else "")
    if interval["value"] is None or np.isnan(interval["value"]):
        return "–"
    value = f"{factor * interval['value']:{sign}.{digits}f}"
    if interval["low"] is None:
        return value
    if not signed and (factor == 100 or measure.startswith("auc")):
        # Student's interval does not know that shares have ends
        interval = interval | {"low": max(interval["low"], 0), "high": min(interval["high"], 1)}
    low, high = (f"{factor * interval[end]:.{digits}f}" for end in ("low", "high"))
    if low == high and not signed:
        return value
    return interval_text(interval, factor, digits, sign)


def show_p(p: float | None) -> str:
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def cell(data: Data, condition: str, measure: str) -> str:
    """A condition's mean over seeds, its interval across them."""
    if measure == "seeds":
        return str(len(data[condition]))
    if measure == "lowest":
        looks = [[p["accuracy"] for p in m["trajectory"] if p["step"]]
                 for m in data[condition].values()]
        values = [min(run) for run in looks if run]
    else:
        values = list(values_of(data, condition, measure).values())
    return show(mean_interval(values), measure) if values else "–"


def label_of(study: dict, name: str) -> str:
    condition = study["conditions"][name]
    return condition.get("label") or f"dual-reward, {condition['group']} {condition['x']}"


def in_group(study: dict, data: Data, *groups: str) -> list[str]:
    return [n for n, c in study["conditions"].items() if c.get("group") in groups and n in data]


def block_ranges(blocks: list[int]) -> str:
    """example  [0, 1, 2, 4] -> "0–2, 4";  [] -> "none" """
    parts = []
    for b in blocks:
        if parts and parts[-1][1] == b - 1:
            parts[-1][1] = b
        else:
            parts.append([b, b])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in parts) or "none"


# --------------------------------------------------------------------------------------------------
# tables


def measure_table(study: dict, data: Data, columns: dict[str, str]) -> str:
    """One row a method, one column a measure."""
    return table(["method", *columns],
                 [[label_of(study, n), *(cell(data, n, m) for m in columns.values())]
                  for n in in_group(study, data, "main")])


def sweep_table(study: dict, data: Data, names: list[str], first: str) -> str:
    """The same over what was swept, or the control's name."""
    rows = []
    for name in names:
        condition = study["conditions"][name]
        rows.append([str(condition.get("x", condition.get("label"))),
                     *(cell(data, name, m) for m in SWEEP.values())])
    return table([first, *SWEEP], rows)


def question_lines(asked: list[dict]) -> str:
    """The answers: each question, each prediction made before the runs, and what came of it."""
    lines, question = [], None
    for h in asked:
        if h["question"] != question:
            question = h["question"]
            lines.append(f"\n**{question}**\n")
        if h["outcome"] == "not run":
            lines.append(f"- {MARKS['not run']} {h['claim']}: not run")
            continue
        unit, _ = unit_of(h["measure"])
        unit = "points" if unit == "%" else unit
        lines.append(f"- {MARKS[h['outcome']]} {h['claim']}: "
                     f"{show(h['effect'], h['measure'], signed=True)} {unit}".rstrip()
                     + f", adjusted p {show_p(h['adjusted'])}"
                     + (" over problems" if h.get("unit") == "problems" else ""))
        if h["claim"] in WITHDRAWN:
            lines[-1] += f". Withdrawn: {WITHDRAWN[h['claim']]}"
        elif h["claim"] in REMARKS:
            lines[-1] += f". But: {REMARKS[h['claim']]}"
    return "\n".join(lines).strip()


def hypothesis_table(asked: list[dict]) -> str:
    rows = []
    for h in asked:
        if h["outcome"] == "not run":
            continue
        versus = h.get("value", h.get("second_measure", h.get("second")))
        expected = h["expect"] + (f" {h['margin']}" if "margin" in h else "") \
            + (f" by more than {h['beyond']}" if h["beyond"] else "")
        test = ("two one-sided t" if h["expect"] == "within" else
                f"sign-flip over {h.get('unit', 'seeds')}")
        n_problems = f" (n {h['n_problems']})" if h["n_problems"] else ""
        rows.append([h["claim"], f"`{h['measure']}`: {h['first']} against {versus}", expected,
                     show(h["effect"], h["measure"], signed=True), test, str(h["n"]),
                     show_p(h["p"]), show_p(h["adjusted"]), show_p(h["p_problems"]) + n_problems,
                     h["outcome"]])
    return table(["claim", "measure and conditions", "expected", "difference", "test", "seeds", "p",
                  "adjusted", "p over problems", "outcome"], rows)


def samples_table(study: dict, data: Data, runs: list[dict]) -> str:
    """What each method's first seed answers, from its report.json."""
    folders = {r["condition"]: Path(r["folder"]) for r in reversed(runs)}
    shown, rows = ("23 + 45 = ", "65 - 28 = ", "7 * 8 = "), []
    for name in in_group(study, data, "main"):
        path = folders[name] / "report.json"
        if path.exists():
            said = {p["prompt"]: p["generated"] for p in json.loads(path.read_text())["prompts"]}
            rows.append([label_of(study, name), *(f"`{said[p] or ' '}`" for p in shown)])
    return table(["method", *(f"`{p.strip()}`" for p in shown)], rows)


def claims_table(study: dict, data: Data) -> str:
    """In which blocks each claim holds, in every seed."""
    rows = []
    for name in in_group(study, data, "main", "control"):
        # by block: the taps of all seeds
        blocks = list(zip(*(m["claims"]["taps"][1:] for m in data[name].values())))
        held = lambda claim, blocks=blocks: [b for b, taps in enumerate(blocks)
                                             if all(tap["claims"][claim] for tap in taps)]
        rows.append([label_of(study, name), *(block_ranges(held(claim)) for claim in CLAIMS)])
    return table(["method", *CLAIMS.values()], rows)


def swap_table(data: Data, condition: str) -> str:
    """One condition: right answers turned into the other operation's, by block and kind of edit."""
    rows = []
    for k, taps in enumerate(zip(*(m["claims"]["taps"] for m in data[condition].values()))):
        shares = [mean_interval([tap["swaps"][kind]["flipped"] for tap in taps]) for kind in SWAPS]
        rows.append([f"{k - 1}" if k else "embedding", *(show(s, "flipped") for s in shares)])
    return table(["after block", *(f"{text}, %" for text in SWAPS.values())], rows)


def series_table(data: Data, condition: str) -> str:
    """What the logit lens says after each block, means over unseen symbolic problems."""
    curves = [m["curves"] for m in data[condition].values()]
    return table(["after block", *SERIES], [
        [f"{k - 1}", *(show(mean_interval([c[name][k] for c in curves]), name)
                       for name in SERIES.values())]
        for k in range(1, len(curves[0]["kl"]))])


def across_models(study: dict, data: Data) -> str:
    """Do models with a stronger classifier answer better? One point a condition, its mean."""
    names = [n for n in data if study["conditions"][n].get("group") != "helper"
             and "same_as" not in study["conditions"][n]]
    means = lambda m, at: [statistics.mean(values_of(data, n, m).values()) for n in at]
    lines = []
    for measure, text in (("word.strength", "the operation word"),
                          ("answer.strength", "the answer before the last block"),
                          ("answer.last", "the answer in the last block (the output itself)")):
        at = [n for n in names if values_of(data, n, measure)]
        found = rank_correlation(means(measure, at), means("accuracy.symbolic", at))
        result = ("not to be ranked, all conditions are alike" if found["value"] is None else
                  f"Spearman {interval_text(found, sign='+')}, p {show_p(found['p'])}")
        lines.append(f"- strength of {text}: {result}; n = {found['n']} conditions")
    return "\n".join(lines)


def attribution_table(study: dict, data: Data) -> str:
    names = [n for n in ("base", "sft", "dual", "grpo", "sft_grpo") if n in data]
    mean = lambda n, part: statistics.mean(m["attribution"][part] for m in data[n].values())
    parts = list(next(iter(data[names[0]].values()))["attribution"])
    return table(["written by", *(label_of(study, n) for n in names)],
                 [[part, *(f"{mean(n, part):.2f}" for n in names)] for part in parts])


# --------------------------------------------------------------------------------------------------
# pictures and the file


def draw_blocks(study: dict, data: Data, path: Path) -> None:
    panels = {}
    for title, read in BY_BLOCK.items():
        lines = panels[title] = {}
        for n in ("base", "sft", "dual", "grpo", "sft_grpo", "dual_errors"):
            if n in data:
                curves = [read(m)[1:] for m in data[n].values()]    # without the embedding's tap
                lines[label_of(study, n)] = (range(len(curves[0])), curves)
    plot.band_panels(panels, path, (12, 7), ["after block (the last is the output)"] * 2,
                     "share or probability", "at the last prompt token, operand pairs never seen",
                     rows=2)


def draw_steps(study: dict, data: Data, path: Path) -> None:
    panels = {}
    for key, title in BY_STEP.items():
        lines = panels[title] = {}
        for n in ("sft", "dual", "dual_full", "dual_weight_07", "grpo", "sft_grpo", "dual_errors"):
            if n in data:
                looks = [m["trajectory"] for m in data[n].values()]     # at the same steps
                lines[label_of(study, n)] = ([p["step"] for p in looks[0]],
                                             [[p[key] for p in run] for run in looks])
    plot.band_panels(panels, path, (14, 4), ["training step"] * 3,
                     title="validation problems, operand pairs never seen")


def draw_sweeps(study: dict, data: Data, path: Path) -> None:
    sweeps = {}
    for group in ("block", "weight"):
        names = in_group(study, data, group)
        seeds = set.intersection(*(set(data[n]) for n in names)) if names else ()
        if len(names) > 1 and seeds:
            x = [study["conditions"][n]["x"] for n in names]
            sweeps[group] = {text: (x, [[values_of(data, n, m)[s] for n in names]
                                        for s in sorted(seeds)]) for text, m in SWEPT.items()}
    if sweeps:
        plot.band_panels({f"dual-reward by {group}": lines for group, lines in sweeps.items()},
                         path, (6 * len(sweeps), 4), list(sweeps))


def write_study(study: dict, runs: list[dict], failed: list[str], out: Path) -> None:
    """Write out/RESULTS.md and out/docs/*.png from the measures of finished runs."""
    data = load_data(study, runs)
    asked = judge_all(study, data)
    draw_blocks(study, data, out / "docs/study_blocks.png")
    draw_steps(study, data, out / "docs/study_steps.png")
    draw_sweeps(study, data, out / "docs/study_sweeps.png")
    any_run = next(iter(next(iter(data.values())).values()))
    versions = any_run["versions"]
    # the runs of a condition, not its aliases
    own = {n: r for n, r in data.items() if "same_as" not in study["conditions"][n]}
    seconds = sum(sum(m["seconds"]) for r in own.values() for m in r.values())
    sweeps = []
    for group in dict.fromkeys(c.get("group") for c in study["conditions"].values()):
        names = in_group(study, data, group)
        if group not in ("main", "control", "helper") and names:
            sweeps.append(sweep_table(study, data, names, group))
    controls = [n for n in ("dual", "dual_target_unused") if n in data]
    controls[1:1] = in_group(study, data, "control")
    of = lambda make, n: make(data, n) if n in data else "not run"
    outcomes = [h["outcome"] for h in asked]
    tally = ", ".join(f"{outcomes.count(k)} {k}" for k in MARKS if k in outcomes).capitalize()
    meaning = {"confirmed": "as predicted", "refuted": "the opposite, or surely beyond the margin",
               "open": "not decided by these runs", "withdrawn": "its test cannot bear the claim"}
    write_results(out / "RESULTS.md", study=fill(
        "study", file="study/plan.yaml", n_runs=sum(len(r) for n, r in own.items() if n != "base"),
        steps=study["common"]["steps"], batch_size=study["common"]["batch_size"],
        main_table=measure_table(study, data, MAIN), block=any_run["block"],
        last_block=len(any_run["claims"]["taps"]) - 2, tally=tally,
        marks=", ".join(f"{MARKS[k]} {v}" for k, v in meaning.items()),
        n_hypotheses=sum(h["p"] is not None for h in asked), fdr=study["false_discovery_rate"],
        questions=question_lines(asked), samples=samples_table(study, data, runs),
        claims=claims_table(study, data), causes=measure_table(study, data, CAUSES),
        swaps_sft=of(swap_table, "sft"), swaps_dual=of(swap_table, "dual"),
        series_sft=of(series_table, "sft"), series_dual=of(series_table, "dual"),
        sweeps="\n\n".join(sweeps), controls=sweep_table(study, data, controls, "control"),
        ladder=measure_table(study, data, LADDER),
        prediction=measure_table(study, data, PREDICTION), across=across_models(study, data),
        attribution=attribution_table(study, data), hypotheses=hypothesis_table(asked),
        hours=seconds / 3600, machine=f"{cores_text()}, {versions['device']}",
        mlx=versions["mlx"], commit=versions["commit"],
        failed="".join(f"Failed: {why}. " for why in failed)))

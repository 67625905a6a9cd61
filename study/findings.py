"""From the runs' measures.json to RESULTS.md: tests, tables, pictures. Nothing in it is typed.

A hypothesis of the study file compares one measure in two conditions, run by run with equal seeds
(the same training rows and LoRA start). Across runs: mean difference, Student's interval, exact
sign-flip test; `within` asks the opposite, whether the difference is surely small (two one-sided t
tests). Across problems: the same unseen problems in both conditions, averaged over seeds, sign-flip
test. What is asked, and in which unit, stands in the study file, written before the runs; the false
discovery rate is controlled over the whole family (Benjamini-Hochberg).
"""
import json
import os
import platform
import statistics
from pathlib import Path

import numpy as np

from config import write_text
from report import plot
from report.stats import adjusted_p, equivalence_p, mean_interval, rank_correlation, sign_flip

# the first word of a measure's name: its unit, and what to multiply it with
UNITS = {**dict.fromkeys(("accuracy", "word", "symbol", "target", "answer", "probe", "aligned",
                          "jacobian", "flipped", "right", "masked"), ("%", 100)),
         **dict.fromkeys(("used", "lens_used", "after_confidence", "entropy", "kl"), ("nats", 1)),
         **dict.fromkeys(("auc", "cosine"), ("", 1))}
IN_BLOCKS = ("word.peak", "answer.peak", "word.onset", "answer.onset")
CLAIMS = {"decodable": "decodable", "aligned": "aligned", "verbalised": "verbalised",
          "used": "used", "aligned_jacobian": "aligned, Jacobian lens",
          "verbalised_jacobian": "verbalised, Jacobian lens"}
MARKS = {"confirmed": "✓", "refuted": "✗", "open": "?", "not run": "–"}
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


def unit_of(measure: str) -> tuple[str, float]:
    """example  "accuracy.symbolic" -> ("%", 100); "answer.peak" -> ("blocks", 1)"""
    return ("blocks", 1) if measure in IN_BLOCKS else UNITS[measure.split(".")[0]]


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
# hypotheses


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
    return asked


# --------------------------------------------------------------------------------------------------
# text


def show(interval: dict, measure: str, signed: bool = False) -> str:
    """example  {value .021, low .012, high .03}, "accuracy.symbolic" -> '2.1 [1.2, 3.0]' """
    _, factor = unit_of(measure)
    digits = 1 if factor == 100 else 2
    sign = "+" if signed else ""
    if interval["value"] is None:
        return "–"
    text = f"{factor * interval['value']:{sign}.{digits}f}"
    if interval["low"] is None:
        return text
    low, high = (factor * interval[end] for end in ("low", "high"))
    if not signed and (factor == 100 or measure.startswith("auc")):
        low, high = max(low, 0), min(high, factor)  # Student's does not know that shares have ends
    if f"{low:.{digits}f}" == f"{high:.{digits}f}" and not signed:
        return text
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def show_p(p: float | None) -> str:
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def cell(data: Data, condition: str, measure: str) -> str:
    values = list(values_of(data, condition, measure).values())
    return show(mean_interval(values), measure) if values else "–"


def table(header: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


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
    return "\n".join(lines).strip()


def hypothesis_table(study: dict, asked: list[dict]) -> str:
    rows = []
    for h in asked:
        if h["outcome"] == "not run":
            continue
        versus = (f"{h['value']}" if "value" in h else h["second_measure"]
                  if "second_measure" in h else h["second"])
        expected = h["expect"] + (f" {h['margin']}" if "margin" in h else "") \
            + (f" by more than {h['beyond']}" if h["beyond"] else "")
        test = ("two one-sided t" if h["expect"] == "within" else
                f"sign-flip over {h.get('unit', 'seeds')}")
        n_problems = f" (n {h['n_problems']})" if h["n_problems"] else ""
        rows.append([h["claim"], f"`{h['measure']}`: {h['first']} against {versus}", expected,
                     show(h["effect"], h["measure"], signed=True), test, str(h["n"]),
                     show_p(h["p"]), show_p(h["adjusted"]),
                     show_p(h["p_problems"]) + n_problems,
                     h["outcome"]])
    return table(["claim", "measure and conditions", "expected", "difference", "test", "seeds", "p",
                  "adjusted", "p over problems", "outcome"], rows)


def main_table(study: dict, data: Data) -> str:
    columns = {"answers right, %": "accuracy.symbolic", "names the operation, %": "word.strength",
               "top word at the trained block, %": "word.block.symbolic",
               "shows the answer early, %": "answer.strength", "answer's peak block": "answer.peak",
               "answers turned by a swap after block 0, %": "flipped.first",
               "after the trained block, %": "flipped.means.block"}
    return table(["method", "seeds", *columns], [
        [label_of(study, n), str(len(data[n])), *(cell(data, n, m) for m in columns.values())]
        for n in in_group(study, data, "main")])


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


def claims_tables(study: dict, data: Data) -> str:
    """In which blocks each claim holds, in every seed."""
    rows = []
    for name in in_group(study, data, "main", "control"):
        runs = [m["claims"]["taps"][1:] for m in data[name].values()]
        held = lambda claim, runs=runs: [b for b in range(len(runs[0]))
                                         if all(taps[b]["claims"][claim] for taps in runs)]
        rows.append([label_of(study, name), *(block_ranges(held(c)) for c in CLAIMS)])
    return table(["method", *CLAIMS.values()], rows)


def swap_table(data: Data, condition: str) -> str:
    """One condition: right answers turned into the other operation's, by block and kind of edit."""
    kinds = {"means": "classes' difference", "lens": "its part along the words", "rest": "the rest",
             "random": "random, as long", "patch": "whole stream, last token",
             "patch_operator": "whole stream, operator"}
    runs = [m["claims"]["taps"] for m in data[condition].values()]
    rows = []
    for tap in range(len(runs[0])):
        shares = [mean_interval([taps[tap]["swaps"][kind]["flipped"] for taps in runs])
                  for kind in kinds]
        name = f"{tap - 1}" if tap else "embedding"
        rows.append([name, *(show(s, "flipped") for s in shares)])
    return table(["after block", *(f"{text}, %" for text in kinds.values())], rows)


def cause_table(study: dict, data: Data) -> str:
    """At the trained block: pushes and ablations along the words against random ones."""
    columns = {"swap, over random, nats": "used.block",
               "its part along the words, over random, nats": "lens_used.block",
               "right with the words' span ablated, %": "right.lens_ablated.block",
               "a random span, %": "right.random_ablated.block",
               "the classes' span, %": "right.means_ablated.block",
               "cosine of probe and word": "cosine.block"}
    return table(["method", *columns], [
        [label_of(study, n), *(cell(data, n, m) for m in columns.values())]
        for n in in_group(study, data, "main")])


def series_table(data: Data, condition: str) -> str:
    """What the logit lens says after each block, means over unseen symbolic problems."""
    columns = {"operation word, %": "word.prob", "operator symbol, %": "symbol.prob",
               "answer, %": "answer.prob", "entropy, nats": "entropy",
               "KL to the output, nats": "kl"}
    at = lambda name, tap: mean_interval([m["curves"][name][tap] for m in data[condition].values()])
    taps = range(1, len(next(iter(data[condition].values()))["curves"]["kl"]))
    return table(["after block", *columns], [
        [f"{tap - 1}", *(show(at(name, tap), name) for name in columns.values())] for tap in taps])


def ladder_table(study: dict, data: Data) -> str:
    """Generalisation in steps: accuracy, the word at the trained block, and where it spreads."""
    steps = {"symbolic": "7 * 8", "asked": "what is 7 * 8", "worded": "seven times eight",
             "asked_worded": "what is the product of seven and eight"}
    header = ["method", *(f"right: {t}, %" for t in steps.values()),
              *(f"word: {t}, %" for t in steps.values()), "token before, %", "answer's token, %",
              "other blocks, %", "fires though masked, %"]
    return table(header, [[label_of(study, n), *(cell(data, n, f"accuracy.{s}") for s in steps),
                           *(cell(data, n, f"word.block.{s}") for s in steps),
                           cell(data, n, "word.block.earlier"), cell(data, n, "word.block.later"),
                           cell(data, n, "word.spread"), cell(data, n, "masked.fires")]
                          for n in in_group(study, data, "main")])


def lowest_on_the_way(data: Data, condition: str) -> dict:
    looks = [[p["accuracy"] for p in m["trajectory"] if p["step"]]
             for m in data[condition].values()]
    looks = [run for run in looks if run]
    return mean_interval([min(run) for run in looks]) if looks else {"value": None}


def sweep_table(study: dict, data: Data, names: list[str], first: str) -> str:
    rows = []
    for name in names:
        condition = study["conditions"][name]
        rows.append([str(condition.get("x", condition.get("label"))), str(len(data[name])),
                     cell(data, name, "accuracy.symbolic"),
                     show(lowest_on_the_way(data, name), "accuracy"),
                     cell(data, name, "target.block"), cell(data, name, "word.strength"),
                     cell(data, name, "word.spread"), cell(data, name, "answer.strength"),
                     cell(data, name, "jacobian.aligned.block")])
    return table([first, "seeds", "answers right, %", "lowest on the way, %",
                  "trained token top-1 at its block, %", "names the operation, %",
                  "word top-1 in other blocks, %", "shows the answer early, %",
                  "right word first by the Jacobian lens, %"], rows)


def prediction_table(study: dict, data: Data) -> str:
    columns = {"word": "auc.word", "early answer": "auc.own",
               "last block's confidence": "auc.confidence",
               "word, confidence taken out": "after_confidence.word",
               "early answer, confidence taken out": "after_confidence.own"}
    return table(["method", *columns], [
        [label_of(study, n), *(cell(data, n, m) for m in columns.values())]
        for n in in_group(study, data, "main")])


def across_models(study: dict, data: Data) -> str:
    """Do models with a stronger classifier answer better? One point a condition, its mean."""
    names = [n for n in data if study["conditions"][n].get("group") != "helper"
             and "same_as" not in study["conditions"][n]]
    mean = lambda n, m: statistics.mean(values_of(data, n, m).values())
    lines = []
    for measure, text in (("word.strength", "the operation word"),
                          ("answer.strength", "the answer before the last block"),
                          ("answer.last", "the answer in the last block (the output itself)")):
        found = rank_correlation([mean(n, measure) for n in names],
                                 [mean(n, "accuracy.symbolic") for n in names])
        result = ("not to be ranked, all conditions are alike" if found["value"] is None else
                  f"Spearman {found['value']:+.2f} [{found['low']:.2f}, {found['high']:.2f}], "
                  f"p {show_p(found['p'])}")
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


def curves_by_block(data: Data, condition: str, read) -> np.ndarray:
    """(seeds, L): read(measures.json) gives L + 1 taps, the first of which is left out."""
    return np.array([read(m)[1:] for m in data[condition].values()], float)


def draw(study: dict, data: Data, out: Path) -> dict[str, str]:
    """Draw all pictures; returns {name: path relative to out}."""
    shown = [n for n in ("base", "sft", "dual", "grpo", "sft_grpo", "dual_errors") if n in data]
    flipped = lambda m: [tap["swaps"]["means"]["flipped"] for tap in m["claims"]["taps"]]
    aligned = lambda m: [tap["jacobian_lens"]["aligned"]["value"] for tap in m["claims"]["taps"]]
    panels = {
        "operation word, probability (logit lens)": lambda m: m["curves"]["word.prob"],
        "right word first of the words (Jacobian lens)": aligned,
        "answer, probability (logit lens)": lambda m: m["curves"]["answer.prob"],
        "right answers turned by swapping the operation": flipped}
    plot.methods_by_block(
        {title: {label_of(study, n): curves_by_block(data, n, read) for n in shown}
         for title, read in panels.items()}, out / "docs/study_blocks.png")
    on_the_way = [n for n in ("sft", "dual", "dual_full", "dual_weight_07", "grpo", "sft_grpo",
                              "dual_errors") if n in data]
    plot.methods_by_step(
        {label_of(study, n): [m["trajectory"] for m in data[n].values()] for n in on_the_way},
        out / "docs/study_steps.png")
    sweeps = {}
    for group in ("block", "weight"):
        names = in_group(study, data, group)
        seeds = set.intersection(*(set(data[n]) for n in names)) if names else ()
        if len(names) > 1 and seeds:
            sweeps[group] = ([study["conditions"][n]["x"] for n in names], {
                text: [[values_of(data, n, m)[s] for s in sorted(seeds)] for n in names]
                for text, m in (("answers right", "accuracy.symbolic"),
                                ("trained token top-1 at its block", "target.block"),
                                ("word top-1 in other blocks", "word.spread"))})
    if sweeps:
        plot.sweep_curves(sweeps, out / "docs/study_sweeps.png")
    return {name: f"docs/study_{name}.png" for name in ("blocks", "steps", "sweeps")}


CHAINS_HEADING = "# Results: Markovian training"    # another script's part of RESULTS.md
TEXT = """# Results: do training methods leave different classifiers, and do they help?

A language model reads "7 * 8 = " and writes "56". On the way from block to block its state (the
*residual stream*) can be read as if it were the output already (the *logit lens*). Sometimes a
middle block then says the name of the task, "multiply", or the answer. Such a read-out is called a
*classifier* here. Earlier work, on 8 or 9 prompts and one seed, reported that training methods
create different ones, that forcing one ("dual-reward") hurts, and that stronger ones go with better
answers. This is a controlled test of that: {n_runs} training runs of the same small Llama, {steps}
steps of {batch_size} problems each, judged on operand pairs that no model has seen.

{main_table}

Mean over seeds and 95 % interval across them (none where all seeds agree). *Answers right*: whole
greedy answers of unseen sums and differences. *Names the operation*: largest probability of the
operation's word before the last block, at the last prompt token. *Shows the answer early*: the same
for the answer. *Swap*: the operation's direction in the stream is exchanged, add for subtract; how
many right answers turn into the other operation's. The trained block is {block} of 0 to
{last_block} (55 % of depth).

![by block: operation word, Jacobian lens, answer, swaps]({blocks})

## Answers

Predictions were written into `{file}` before the runs: {marks}. {tally}. Differences with
95 % interval across seeds; p, across seeds unless said otherwise, adjusted for all {n_hypotheses}
tests together (false discovery rate {fdr}).

{questions}

What the first seed of each method writes. Without the shift (error A) a model learns to repeat
what it has just read; with both errors the first number may still be right, and is repeated:

{samples}

## Decodable, aligned, verbalised, used

Four different claims about the operation, on matched prompts (each unseen pair of numbers under
every operation): a linear probe finds it; the lens ranks the right word first among the operations'
words; the word itself is loud (median rank 5 or better, probability .10); exchanging its direction
moves the answer more than a random direction as long. Blocks where the claim holds in every seed;
the Jacobian lens is a second read-out that no loss trained.

{claims}

The swap at each block, on unseen sums and differences that the model had right: how many answers
become the other operation's. The classes' difference is the operation's direction; its part along
the words is what the logit lens can see of it. The last two columns put the whole stream of the
prompt with the other operation in place: at the last token it carries the finished answer too, the
later the more; at the operator's token it shows until which block the operation is still fetched
from there. SFT:

{swaps_sft}

Dual-reward:

{swaps_dual}

At the trained block, where dual-reward's word is loudest: the effect of the swap on the log-odds of
the other operation's answer, less that of a random direction as long; and how many first tokens
stay right when a whole span of directions is put to its mean.

{causes}

## What the lens says after each block

Means over unseen problems and seeds, symbolic prompts, last prompt token. SFT:

{series_sft}

Dual-reward:

{series_dual}

## Over the steps

![accuracy and word over training steps]({steps_picture})

## Where, how strongly, on what: sweeps of dual-reward

![sweeps]({sweeps})

{sweeps_text}

## Controls: does the meaning matter?

{controls}

## How far it carries

Right answers and the word at the trained block, for wordings ever further from the training text;
then the word at places where no loss asked for it, and on prompts whose operator is masked
("7 ? 8"), where nothing can be known.

{ladder}

## Does strength predict being right?

Problem by problem within a model: the chance that a right answer scores above a wrong one of the
same operation and wording (.5: says nothing), then log-odds per standard deviation with the last
block's confidence taken out. *Early answer*: the largest probability, before the last block, of
what the model ends up saying.

{prediction}

Model by model, one point a condition:

{across}

## Who writes the answer

Direct logit attribution: mean share of the answer's logit over that of the other operation's
answer, at the last prompt token.

{attribution}

## Every hypothesis and its test

{hypotheses}

## How it was made

`make study`: {n_runs} runs, {hours:.1f} hours of computing, on {machine}. MLX {mlx}, commit
{commit}. Conditions, seeds and hypotheses: `{file}`. {failed}Accuracy over training, time, memory
and speed: [docs/training.md](docs/training.md).
"""


def parts_of(path: Path) -> tuple[str, str]:
    """RESULTS.md as the study's part and Markovian training's; each script writes its own anew."""
    text = path.read_text() if path.exists() else ""
    study, heading, chains = text.partition(CHAINS_HEADING)
    return study.rstrip("\n") + "\n", heading + chains


def write_results(study: dict, runs: list[dict], failed: list[str], out: Path) -> None:
    """Write out/RESULTS.md and out/docs/*.png from the measures of finished runs."""
    data, file = load_data(study, runs), "study/plan.yaml"
    asked, pictures = judge_all(study, data), draw(study, data, out)
    any_run = next(iter(next(iter(data.values())).values()))
    versions = any_run["versions"]
    # the runs of a condition, not its aliases
    own = {n: r for n, r in data.items() if "same_as" not in study["conditions"][n]}
    seconds = sum(sum(m["seconds"]) for r in own.values() for m in r.values())
    sweeps = []
    for group in dict.fromkeys(c.get("group") for c in study["conditions"].values()):
        if group not in ("main", "control", "helper") and (names := in_group(study, data, group)):
            sweeps.append(sweep_table(study, data, names, group))
    controls = [n for n in ("dual", "dual_target_unused") if n in data]
    controls[1:1] = in_group(study, data, "control")
    swaps, series = ({n: make(data, n) if n in data else "not run" for n in ("sft", "dual")}
                     for make in (swap_table, series_table))
    cores = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    outcomes = [h["outcome"] for h in asked]
    tally = ", ".join(f"{outcomes.count(k)} {k}" for k in MARKS if k in outcomes).capitalize()
    meaning = {"confirmed": "as predicted", "refuted": "the opposite, or surely beyond the margin",
               "open": "not decided by these runs"}
    path = out / "RESULTS.md"
    _, chains = parts_of(path)
    write_text(path, TEXT.format(
        n_runs=sum(len(r) for n, r in own.items() if n != "base"), tally=tally,
        steps=study["common"]["steps"],
        batch_size=study["common"]["batch_size"], main_table=main_table(study, data),
        block=any_run["block"], last_block=len(any_run["claims"]["taps"]) - 2, file=file,
        marks=", ".join(f"{MARKS[k]} {v}" for k, v in meaning.items()),
        n_hypotheses=sum(h["p"] is not None for h in asked), fdr=study["false_discovery_rate"],
        questions=question_lines(asked), samples=samples_table(study, data, runs),
        claims=claims_tables(study, data),
        swaps_sft=swaps["sft"], swaps_dual=swaps["dual"], causes=cause_table(study, data),
        series_sft=series["sft"], series_dual=series["dual"], blocks=pictures["blocks"],
        steps_picture=pictures["steps"], sweeps=pictures["sweeps"],
        sweeps_text="\n\n".join(sweeps), controls=sweep_table(study, data, controls, "control"),
        ladder=ladder_table(study, data), prediction=prediction_table(study, data),
        across=across_models(study, data), attribution=attribution_table(study, data),
        hypotheses=hypothesis_table(study, asked), hours=seconds / 3600,
        machine=f"{cores}, {versions['device']}", mlx=versions["mlx"], commit=versions["commit"],
        failed="".join(f"Failed: {why}. " for why in failed)) + (f"\n{chains}" if chains else ""))

"""Every number of RESULTS.md's part on Markovian training: trains, damages chains, writes it.

Three seeds a condition. Finished runs are not repeated, so an interrupted command continues.

    python -m study.markovian_results        # an hour on two CPU cores; make markovian
"""
import json
import math
import os
import statistics
from pathlib import Path

from config import BadInput, run_main, write_text
from report.plot import collapse_curves, read_records
from report.stats import mcnemar, wilson
from study.findings import CHAINS_HEADING, parts_of
from study.results import SEEDS, finished_run, interval_text, machine_text, percent, run_script

SUMS, DRILL = "configs/markovian_sums.yaml", "configs/markovian_collapse.yaml"
MENDED = "configs/markovian_collapse_mended.yaml"
CONDITIONS = {  # name: (label, config, overrides)
    "markovian": ("Markovian: question hidden", SUMS, []),
    "markovian_shown": ("question shown to the answerer", SUMS, ["markovian=false"]),
    "markovian_policy": ("hidden, policy term alone", SUMS, ["markovian_answer_weight=0"]),
    "markovian_frozen": ("hidden, scored by the frozen base", SUMS,
                         ["markovian_scorer=frozen", "markovian_answer_weight=0"]),
    "markovian_collapse": ("the published loss", DRILL, []),
    "markovian_mended": ("our loss", MENDED, []),
    "markovian_guarded": ("our loss, guard on", MENDED, ["grpo_guard=true"]),
}
MAIN = ("markovian", "markovian_shown", "markovian_policy", "markovian_frozen")
SHARES = ("correct", "correct_frozen", "correct_empty", "correct_shuffled")   # the table's columns
DRILLS = ("markovian_collapse", "markovian_mended", "markovian_guarded")

TEXT = """{heading}, or whether a chain that must carry the answer learns to

Written by `make markovian` (study/markovian_results.py). {machine}. Seeds {seeds}: each decides
LoRA's start, the questions' order and every sample; the {n} test questions are the same and unseen.
Brackets are 95 % Wilson intervals at that number of questions, or bootstrap intervals over
questions; parentheses hold each seed.

Sums of six numbers from 1 to 9, on `models/tiny_cot`. Its text held roundings (half of its
chains), lists of the terms, and running sums (one in five); its greedy chains are roundings. The
reward is log p(answer | chain); hidden means that who answers sees the chain and not the question.

{main_table}

"Frozen" is the untrained base answering from the same chains. "No chain" and "another's" are the
trained model without a chain, and with the next question's. Always saying the commonest sum would
be right {chance} % of the time. Nats are log p(answer | greedy chain). Time is the wall time of the
whole command.

- The gain over step 0, each seed: {gains}.
- Each seed's first test chain: {samples}

## Does the chain carry it? Damage

{damage}

![nats lost by share of damaged characters, hidden and shown](docs/markovian_damage.png)

## Can others read it?

Gain of a trained run's chains over its base's chains, question hidden from every reader:

{judges}

## The published collapse, and what our loss does at the same learning rate

6e-3, constant: three times the rate of the runs above, four questions a step, twelve chains each.
The first two have no guard; a guard restores the best weights and halves the learning rate.

{drill}

![reward, frozen judge, entropy, KL, accuracy; a line a seed](docs/markovian_collapse.png)
"""


def trained() -> dict[str, list[dict]]:
    return {name: [finished_run(name, seed, config, overrides) for seed in SEEDS]
            for name, (_, config, overrides) in CONDITIONS.items()}


def pooled(runs: list[dict], key: str) -> str:
    """The seeds' mean with a Wilson interval as of one seed's questions (all have the same)."""
    shares = [r["chains"][key] for r in runs]
    each = ", ".join(percent(s["value"]) for s in shares)
    n = shares[0]["n"]
    whole = wilson(round(n * statistics.mean(s["value"] for s in shares)), n)
    return f"{interval_text(whole)} ({each})"


def nats(runs: list[dict]) -> str:
    """example  '-0.31 (-0.30, -0.33, -0.31)' """
    values = [r["chains"]["reward"]["value"] for r in runs]
    return f"{statistics.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"


def main_table(reports: dict[str, list[dict]]) -> str:
    lines = ["| condition | right, % | frozen, % | no chain, % | another's chain, % | nats | "
             "tokens a chain | minutes |", "|" + "---|" * 8]
    row = lambda *cells: lines.append("| " + " | ".join(cells) + " |")
    for label, name in (("base, question hidden", "markovian"),
                        ("base, question shown", "markovian_shown")):
        base = reports[name][0]["base"]["chains"]
        row(label, *(interval_text(base[key]) for key in SHARES),
            f"{base['reward']['value']:.2f}", f"{base['chain_tokens']['value']:.1f}", "")
    for name in MAIN:
        runs = reports[name]
        row(CONDITIONS[name][0], *(pooled(runs, key) for key in SHARES), nats(runs),
            f"{statistics.mean(r['chains']['chain_tokens']['value'] for r in runs):.1f}",
            f"{statistics.mean(r['seconds'] for r in runs) / 60:.1f}")
    return "\n".join(lines)


def gain_lines(runs: list[dict]) -> str:
    """Nats and points over the base, each seed, with McNemar's p on the same questions."""
    parts = []
    for r in runs:
        after, before = r["chains"], r["base"]["chains"]
        of = lambda report: [p["correct"] for p in report["prompts"]]
        test = mcnemar(of(r), of(r["base"]))
        parts.append(f"{after['reward']['value'] - before['reward']['value']:+.2f} nats and "
                     f"{100 * (after['correct']['value'] - before['correct']['value']):+.1f} points"
                     f" (McNemar p {test['p']:.1g})")
    return "; ".join(parts)


def chance(report: dict) -> float:
    """The share of the commonest answer among the test questions."""
    golds = [p["expected"] for p in report["prompts"]]
    return max(map(golds.count, set(golds))) / len(golds)


def damaged() -> list[dict]:
    """study.perturb on every seed: hidden against shown, the next seed's run as a judge."""
    reports = []
    for i, seed in enumerate(SEEDS):
        folder = Path(f"runs/results/markovian_{seed}")
        path, other = folder / "damage.json", SEEDS[(i + 1) % len(SEEDS)]
        if not path.exists():
            command = ["-m", "study.perturb", "--ckpt", str(folder), "--compare",
                       f"runs/results/markovian_shown_{seed}", "--judge",
                       f"runs/results/markovian_{other}", "--json", str(path)]
            if seed == SEEDS[0]:
                command += ["--png", "docs/markovian_damage.png"]
            run_script(command)
        reports.append(json.loads(path.read_text()))
    return reports


def damage_table(reports: list[dict]) -> str:
    """Seed 0's drops with intervals, and the fragility of every seed."""
    lines = [f"Seed {SEEDS[0]}, {reports[0]['n']} questions; fragility is hidden minus shown, "
             "paired over questions, in nats.", "",
             "| damage | % of characters | nats lost | points lost | shown: nats lost | fragility "
             "(each seed) |", "|" + "---|" * 6]
    cell = lambda m, times=1, digits=2: (
        f"{times * m['value']:.{digits}f} [{times * m['low']:.{digits}f}, "
        f"{times * m['high']:.{digits}f}]")
    for i, row in enumerate(reports[0]["damage"]):
        each = ", ".join(f"{r['damage'][i]['reward_fragility']['value']:.2f}" for r in reports)
        lines.append(f"| {row['kind'].replace('_', ' ')} | {100 * row['severity']:.0f} | "
                     f"{cell(row['reward_drop'])} | {cell(row['correct_drop'], 100, 1)} | "
                     f"{cell(row['other_reward_drop'])} | {cell(row['reward_fragility'])} "
                     f"({each}) |")
    return "\n".join(lines)


def judge_table(reports: list[dict]) -> str:
    lines = ["| chains of seed | read by | nats gained | points gained | right, % |",
             "|" + "---|" * 5]
    for seed, report in zip(SEEDS, reports):
        for gain in report["judges"]:
            r, c = gain["reward_gain"], gain["correct_gain"]
            reader = gain["judge"].removeprefix("runs/results/")
            lines.append(
                f"| {seed} | {reader} | {r['value']:+.2f} [{r['low']:.2f}, {r['high']:.2f}] | "
                f"{100 * c['value']:+.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}] | "
                f"{percent(gain['correct'])} |")
    return "\n".join(lines)


def drill_table(reports: dict[str, list[dict]]) -> str:
    """First and last ten steps of each drill run, from metrics.jsonl."""
    lines = ["| loss | seed | right, % | reward, nats: first | last | frozen judge: last | "
             "entropy: first | last | KL to the base | tokens a chain | updates skipped | "
             "reverts |", "|" + "---|" * 12]
    for name in DRILLS:
        for seed, report in zip(SEEDS, reports[name]):
            steps = [r for r in read_records(Path(report["ckpt"]) / "metrics.jsonl")
                     if "reward" in r]
            mean = lambda key, rows: statistics.mean(r.get(key, math.nan) for r in rows)
            lines.append(
                f"| {CONDITIONS[name][0]} | {seed} | {interval_text(report['accuracy'])} | "
                f"{mean('reward', steps[:10]):.2f} | {mean('reward', steps[-10:]):.2f} | "
                f"{mean('frozen_reward', steps[-10:]):.2f} | {mean('entropy', steps[:10]):.2f} | "
                f"{mean('entropy', steps[-10:]):.2f} | {mean('kl_k3', steps[-10:]):.2f} | "
                f"{mean('length', steps[-10:]):.1f} | {sum(r.get('skipped', 0) for r in steps)} | "
                f"{steps[-1]['reverts']} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    os.chdir(Path(__file__).parent.parent)
    if argv:
        raise BadInput(f"study.markovian_results takes no arguments, got {' '.join(argv)}")
    reports = trained()
    damage = damaged()
    collapse_curves({CONDITIONS[name][0]: [read_records(Path(r["ckpt"]) / "metrics.jsonl")
                                           for r in reports[name]] for name in DRILLS},
                    "docs/markovian_collapse.png")
    first = reports["markovian"][0]
    text = TEXT.format(
        heading=CHAINS_HEADING, n=first["accuracy"]["n"],
        machine=machine_text(first["versions"]),
        seeds=", ".join(map(str, SEEDS)), main_table=main_table(reports),
        chance=percent(chance(first)), gains=gain_lines(reports["markovian"]),
        samples="; ".join(f"`{r['prompts'][0]['chain']}`" for r in reports["markovian"]),
        damage=damage_table(damage), judges=judge_table(damage), drill=drill_table(reports))
    path = Path("RESULTS.md")
    study, _ = parts_of(path)
    write_text(path, f"{study}\n{text}")
    print(text)


if __name__ == "__main__":
    run_main(main)

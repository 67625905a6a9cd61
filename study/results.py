"""Every number of docs/training.md, and of docs/markovian.md.

Three seeds a condition. Finished runs are not repeated, so an interrupted command continues.

    python -m study.results              # 40 minutes on two CPU cores; make results
    python -m study.results markovian    # trains, damages chains: an hour; make markovian
"""
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from config import run_main
from files.disk import read_json_lines, write_text
from files.keys import BadInput
from report.plot import collapse_curves
from report.stats import equivalence_p, interval_text, mcnemar, mean_interval, wilson
from study.document import cores_text, fill, seeds_text, table

ROOT = Path(__file__).parent.parent
RUNS = Path("runs/results")
SEEDS = (0, 1, 2)
PRIOR_WORK = ["class_weight=0.7", "lr=5e-4", "lr_schedule=constant"]
TRAINING = {  # name: (label, config, overrides)
    "sft": ("SFT, LoRA q/k/v/o", "sft", []),
    "sft_full": ("SFT, all weights", "sft_full", []),
    "dual_reward": ("dual-reward, LoRA v/o (default)", "dual_reward", []),
    "dual_reward_w07_500": ("dual-reward as in the prior work: w 0.7, lr 5e-4, 500 steps",
                            "dual_reward", ["steps=500", *PRIOR_WORK]),
    "dual_reward_w07_1500": ("the same, 1,500 steps", "dual_reward", ["steps=1500", *PRIOR_WORK]),
    # GRPO's 100 steps of 64 prompts are 6,400 problems; so are these 200 steps of 32 rows
    "sft_6400": ("SFT, LoRA q/k/v/o, 6,400 problems", "sft", ["steps=200"]),
    "dual_reward_6400": ("dual-reward, LoRA v/o, 6,400 problems", "dual_reward", ["steps=200"]),
    "grpo": ("GRPO, LoRA q/k/v/o, 6,400 problems", "grpo", []),
    "grpo_full": ("GRPO, all weights, 6,400 problems", "grpo_full", []),
}
COLLAPSE = {
    "collapse": ("the published error", "collapse", []),
    "collapse_guarded": ("the same, guards on", "collapse", ["grpo_guard=true"]),
    "collapse_mended": ("right loss, guards on", "collapse_mended", []),
}
CHAINS = {
    "markovian": ("Markovian: question hidden", "markovian_sums", []),
    "markovian_shown": ("question shown to the answerer", "markovian_sums", ["markovian=false"]),
    "markovian_policy": ("hidden, policy term alone", "markovian_sums",
                         ["markovian_answer_weight=0"]),
    "markovian_frozen": ("hidden, scored by the frozen base", "markovian_sums",
                         ["markovian_scorer=frozen", "markovian_answer_weight=0"]),
}
CHAINS_COLLAPSE = {
    "markovian_collapse": ("the published loss", "markovian_collapse", []),
    "markovian_mended": ("our loss", "markovian_collapse_mended", []),
    "markovian_guarded": ("our loss, guard on", "markovian_collapse_mended", ["grpo_guard=true"]),
}
SHARES = ("correct", "correct_frozen", "correct_empty", "correct_shuffled")   # CHAINS' columns
Reports = dict[str, list[dict]]     # condition -> each seed's report.json


# --------------------------------------------------------------------------------------------------
# runs


def run_script(command: list[str]) -> None:
    """Run another command of the project, its output unseen; raises BadInput where it fails."""
    if subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode:
        raise BadInput(f"{' '.join(command)} did not finish; see its message above")


def finished_run(name: str, seed: int, config: str, overrides: list[str]) -> dict:
    """Train one condition and seed unless that is done; returns its report and the wall seconds."""
    folder = RUNS / f"{name}_{seed}"
    clock = folder / "wall_seconds.json"
    if not (folder / "report.json").exists():
        start = time.perf_counter()
        run_script(["train.py", f"configs/{config}.yaml", *overrides, f"seed={seed}",
                    f"run_dir={folder}"])
        write_text(clock, json.dumps(time.perf_counter() - start))
    report = json.loads((folder / "report.json").read_text())
    return report | {"seconds": json.loads(clock.read_text())}


def finished_runs(conditions: dict[str, tuple[str, str, list[str]]]) -> Reports:
    return {name: [finished_run(name, seed, config, overrides) for seed in SEEDS]
            for name, (_, config, overrides) in conditions.items()}


def records_of(report: dict) -> list[dict]:
    return read_json_lines(Path(report["ckpt"]) / "metrics.jsonl")


# --------------------------------------------------------------------------------------------------
# what both documents show


def take_numbers(page: Path) -> None:
    """Into docs/numbers.json; prints what other pages quote of a figure that has changed."""
    subprocess.run([sys.executable, "docs/sources.py", "--take", str(page)])


def share_text(share: dict) -> str:
    return interval_text(share, 100, 1)


def machine_text(report: dict) -> str:
    """What the numbers were measured on."""
    versions = report["versions"]
    blas = "bundled BLAS" if versions["blas"] == "bundled" else "OpenBLAS"
    return f"{cores_text()}; MLX {versions['mlx']}, {versions['device']}, {blas}"


def drill_table(header: str, labels: dict, reports: Reports, accuracy: str,
                columns: list[tuple[str, str, int]]) -> str:
    """A collapse drill, a row for each condition and seed.

    columns  (key of metrics.jsonl, "first" or "last", digits): the mean over the first or last ten
             steps that have the key
    """
    rows = []
    for name, runs in reports.items():
        for seed, report in zip(SEEDS, runs):
            steps = [r for r in records_of(report) if "reward" in r]
            cells = []
            for key, end, digits in columns:
                values = [r[key] for r in steps if key in r] or [math.nan]
                ten = values[:10] if end == "first" else values[-10:]
                cells.append(f"{statistics.mean(ten):.{digits}f}")
            rows.append([labels[name][0], str(seed), share_text(report[accuracy]), *cells,
                         str(sum(r.get("skipped", 0) for r in steps)),
                         str(steps[-1].get("reverts", 0))])
    return table(header.split(" | "), rows)


# --------------------------------------------------------------------------------------------------
# docs/training.md


def training_table(reports: Reports) -> str:
    """One row a condition: each seed's accuracy, and the Wilson interval over all seeds."""
    percent = lambda x: f"{100 * x:.1f}"
    strength = lambda r: r["strength"]["operation"]["before_last"]["value"]
    # how deep the collapse on the way went
    lowest = lambda r: min(record["valid_accuracy"] for record in records_of(r)
                           if "valid_accuracy" in record and record["step"])
    base = reports["sft"][0]["base"]
    rows = [["base", share_text(base["accuracy_add_subtract"]), percent(base["accuracy"]["value"]),
             percent(base["class"]["top1"]["value"]), f"{strength(base):.3f}", "", "", ""]]
    for name, runs in reports.items():
        right = [r["accuracy_add_subtract"]["value"] for r in runs]
        pooled = wilson(sum(round(600 * value) for value in right), 600 * len(runs))
        rows.append([
            TRAINING[name][0], f"{seeds_text(right)} {share_text(pooled).split(' ', 1)[1]}",
            seeds_text([r["accuracy"]["value"] for r in runs]),
            seeds_text([r["class"]["top1"]["value"] for r in runs]),
            f"{statistics.mean(map(strength, runs)):.3f}",
            percent(statistics.mean(map(lowest, runs))),
            f"{statistics.mean(r['seconds'] for r in runs):.0f}",
            f"{max(r['peak_gib'] for r in runs):.2f}"])
    return table(["condition", "+ and − right, % (each seed)", "all three, %",
                  "word top-1 at L4, %", "word before the last block", "lowest on the way, %", "s",
                  "GiB"], rows)


def paired_tests(reports: Reports) -> str:
    """Dual-reward against SFT with the same seed, on the same test problems."""
    lines = []
    counts = lambda p: p["set"] == "test" and p["operation"] != "multiply"
    correct = lambda r: [p["correct"] for p in r["prompts"] if counts(p)]
    for seed, dual, sft in zip(SEEDS, reports["dual_reward"], reports["sft"]):
        m = mcnemar(correct(dual), correct(sft))
        of = lambda r: 100 * r["accuracy_add_subtract"]["value"]
        lines.append(f"- seed {seed}: dual-reward minus SFT {of(dual) - of(sft):+.1f} points; "
                     f"{m['only_first']} problems only dual-reward solves, "
                     f"{m['only_second']} only SFT, McNemar exact p = {m['p']:.2g}")
    return "\n".join(lines)


def write_training() -> None:
    reports, collapse = finished_runs(TRAINING), finished_runs(COLLAPSE)
    everything = ["data_operations=add,subtract,multiply,divide", "data_wordings=symbolic,worded"]
    base = RUNS / "base.json"
    run_script(["eval.py", "--ckpt", "models/tiny", "--json", str(base), *everything])
    drill = drill_table(
        "condition | seed | + and − right, % | reward, nats: first | last | entropy | length | "
        "KL to the base | skipped updates | reverts", COLLAPSE, collapse, "accuracy_add_subtract",
        [("reward", "first", 2), ("reward", "last", 2), ("entropy", "last", 2),
         ("length", "last", 2), ("kl_k3", "last", 2)])
    mean = lambda runs, value: statistics.mean(map(value, runs))
    own = lambda r: r["accuracy_add_subtract"]["value"]
    right = {"base": own(reports["sft"][0]["base"])} | {n: mean(r, own) for n, r in reports.items()}
    text = fill(
        "training", right={name: f"{100 * value:.1f}" for name, value in right.items()},
        seconds={n: f"{mean(r, lambda x: x['seconds']):.0f}" for n, r in reports.items()},
        machine=machine_text(reports["sft"][0]), seeds=", ".join(map(str, SEEDS)),
        table=training_table(reports), paired=paired_tests(reports), drill=drill,
        cells=table(["test problems", "base right, %", "n"],
                    [[cell, share_text(share), str(share["n"])]
                     for cell, share in json.loads(base.read_text())["accuracy_by"].items()]))
    path = Path("docs/training.md")
    write_text(path, text)
    print(text)
    take_numbers(path)


# --------------------------------------------------------------------------------------------------
# docs/markovian.md


def pooled_text(runs: list[dict], key: str) -> str:
    """The seeds' mean with a Wilson interval as of one seed's questions (all have the same)."""
    shares = [r["chains"][key] for r in runs]
    values, n = [s["value"] for s in shares], shares[0]["n"]
    mean = statistics.mean(values)
    whole = {**wilson(round(n * mean), n), "value": mean}
    return f"{share_text(whole)} {seeds_text(values).split(' ', 1)[1]}"


def chains_table(reports: Reports) -> str:
    rows = []
    for label, shown in (("base, question hidden", False), ("base, question shown", True)):
        names = [name for name in reports if (name == "markovian_shown") == shown]
        if not names:
            continue
        base = reports[names[0]][0]["base"]["chains"]
        rows.append([label, *(share_text(base[key]) for key in SHARES),
                     f"{base['reward']['value']:.2f}", f"{base['chain_tokens']['value']:.1f}", ""])
    for name, runs in reports.items():
        of = lambda key, runs=runs: [r["chains"][key]["value"] for r in runs]
        rows.append([CHAINS[name][0], *(pooled_text(runs, key) for key in SHARES),
                     seeds_text(of("reward"), 1, 2), f"{statistics.mean(of('chain_tokens')):.1f}",
                     f"{statistics.mean(r['seconds'] for r in runs) / 60:.1f}"])
    return table(["condition", "right, %", "frozen, %", "no chain, %", "another's chain, %", "nats",
                  "tokens a chain", "minutes"], rows)


def gain_lines(runs: list[dict]) -> str:
    """Nats and points over the base, each seed, with McNemar's p on the same questions."""
    parts = []
    for r in runs:
        gain = lambda key, r=r: r["chains"][key]["value"] - r["base"]["chains"][key]["value"]
        of = lambda report: [p["correct"] for p in report["prompts"]]
        test = mcnemar(of(r), of(r["base"]))
        parts.append(f"{gain('reward'):+.2f} nats and {100 * gain('correct'):+.1f} points"
                     f" (McNemar p {test['p']:.1g})")
    return "; ".join(parts)


def ablation_text(with_it: list[float], without: list[float]) -> str:
    """Points right with the reward's own gradient less without it. The unit is the seed, which
    both share with its questions; p is of a difference of 3 points or more."""
    points = [100 * (a - b) for a, b in zip(with_it, without)]
    return (f"{interval_text(mean_interval(points), 1, 1, '+')} points, "
            f"p {equivalence_p(points, 3):.3f}")


def chance(report: dict) -> float:
    """The share of the commonest answer among the test questions."""
    golds = [p["expected"] for p in report["prompts"]]
    return max(map(golds.count, set(golds))) / len(golds)


def damaged() -> list[dict]:
    """study.perturb on every seed: hidden against shown, the next seed's run as a judge."""
    reports = []
    for i, seed in enumerate(SEEDS):
        path = RUNS / f"markovian_{seed}" / "damage.json"
        if not path.exists():
            command = ["-m", "study.perturb", "--ckpt", str(path.parent), "--compare",
                       str(RUNS / f"markovian_shown_{seed}"), "--judge",
                       str(RUNS / f"markovian_{SEEDS[(i + 1) % len(SEEDS)]}"), "--json", str(path)]
            if seed == SEEDS[0]:
                command += ["--png", "docs/markovian_damage.png"]
            run_script(command)
        reports.append(json.loads(path.read_text()))
    return reports


def damage_table(reports: list[dict]) -> str:
    """Seed 0's drops with intervals, and the fragility of every seed."""
    rows = []
    for i, row in enumerate(reports[0]["damage"]):
        each = ", ".join(f"{r['damage'][i]['reward_fragility']['value']:.2f}" for r in reports)
        rows.append([row["kind"].replace("_", " "), f"{100 * row['severity']:.0f}",
                     interval_text(row["reward_drop"]), share_text(row["correct_drop"]),
                     interval_text(row["other_reward_drop"]),
                     f"{interval_text(row['reward_fragility'])} ({each})"])
    head = (f"Seed {SEEDS[0]}, {reports[0]['n']} questions; fragility is hidden minus shown, "
            "paired over questions, in nats.")
    return head + "\n\n" + table(["damage", "% of characters", "nats lost", "points lost",
                                  "shown: nats lost", "fragility (each seed)"], rows)


def judge_table(reports: list[dict]) -> str:
    rows = [[str(seed), gain["judge"].removeprefix(f"{RUNS}/"),
             interval_text(gain["reward_gain"], sign="+"),
             interval_text(gain["correct_gain"], 100, 1, "+"), f"{100 * gain['correct']:.1f}"]
            for seed, report in zip(SEEDS, reports) for gain in report["judges"]]
    return table(["chains of seed", "read by", "nats gained", "points gained", "right, %"], rows)


def write_markovian() -> None:
    reports, collapse = finished_runs(CHAINS), finished_runs(CHAINS_COLLAPSE)
    damage, runs = damaged(), reports["markovian"]
    collapse_curves({CHAINS_COLLAPSE[name][0]: [records_of(r) for r in of_loss]
                     for name, of_loss in collapse.items()}, "docs/markovian_collapse.png")
    drill = drill_table(
        "loss | seed | right, % | reward, nats: first | last | frozen judge: last | "
        "entropy: first | last | KL to the base | tokens a chain | updates skipped | reverts",
        CHAINS_COLLAPSE, collapse, "accuracy",
        [("reward", "first", 2), ("reward", "last", 2), ("frozen_reward", "last", 2),
         ("entropy", "first", 2), ("entropy", "last", 2), ("kl_k3", "last", 2),
         ("length", "last", 1)])
    share = lambda runs, key="correct": (
        f"{100 * statistics.mean(r['chains'][key]['value'] for r in runs):.1f}")
    text = fill(
        "markovian", without=share(runs, "correct_empty"),
        right={"base": share([runs[0]["base"]]), "base_shown": share(
            [reports["markovian_shown"][0]["base"]]), **{n: share(r) for n, r in reports.items()}},
        n=runs[0]["accuracy"]["n"],
        machine=machine_text(runs[0]), seeds=", ".join(map(str, SEEDS)),
        main_table=chains_table(reports), chance=f"{100 * chance(runs[0]):.1f}",
        gains=gain_lines(runs), ablation=ablation_text(*(
            [r["chains"]["correct"]["value"] for r in reports[name]]
            for name in ("markovian", "markovian_policy"))),
        samples="; ".join(f"`{r['prompts'][0]['chain']}`" for r in runs),
        damage=damage_table(damage), judges=judge_table(damage), drill=drill)
    path = Path("docs/markovian.md")
    write_text(path, text)
    print(text)
    take_numbers(path)


def main(argv: list[str]) -> None:
    os.chdir(ROOT)
    if argv == ["markovian"]:
        write_markovian()
    elif argv:
        raise BadInput(f"expected `markovian` or nothing behind study.results, got "
                       f"{' '.join(argv)}")
    else:
        write_training()


if __name__ == "__main__":
    run_main(main)

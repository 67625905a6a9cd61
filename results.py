"""Every number of docs/training.md: trains each condition with three seeds, then writes the file.

Finished runs are not repeated, so that an interrupted one continues.

    python results.py            # 40 minutes on two CPU cores; make results
"""
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from config import BadInput, run_main, write_text
from plot import read_records
from stats import mcnemar, wilson

SEEDS = (0, 1, 2)
PRIOR_WORK = ["class_weight=0.7", "lr=5e-4", "lr_schedule=constant"]
CONDITIONS = {  # name: (config, overrides)
    "sft": ("configs/sft.yaml", []),
    "sft_full": ("configs/sft_full.yaml", []),
    "dual_reward": ("configs/dual_reward.yaml", []),
    "dual_reward_w07_500": ("configs/dual_reward.yaml", ["steps=500", *PRIOR_WORK]),
    "dual_reward_w07_1500": ("configs/dual_reward.yaml", ["steps=1500", *PRIOR_WORK]),
    # GRPO's 100 steps of 64 prompts are 6,400 problems; so are these 200 steps of 32 rows
    "sft_6400": ("configs/sft.yaml", ["steps=200"]),
    "dual_reward_6400": ("configs/dual_reward.yaml", ["steps=200"]),
    "grpo": ("configs/grpo.yaml", []),
    "grpo_full": ("configs/grpo_full.yaml", []),
    "collapse": ("configs/collapse.yaml", []),
    "collapse_guarded": ("configs/collapse.yaml", ["grpo_guard=true"]),
    "collapse_mended": ("configs/collapse_mended.yaml", []),
}
LABELS = {
    "sft": "SFT, LoRA q/k/v/o", "sft_full": "SFT, all weights",
    "dual_reward": "dual-reward, LoRA v/o (default)",
    "dual_reward_w07_500": "dual-reward as in the prior work: w 0.7, lr 5e-4, 500 steps",
    "dual_reward_w07_1500": "the same, 1,500 steps",
    "sft_6400": "SFT, LoRA q/k/v/o, 6,400 problems", "grpo": "GRPO, LoRA q/k/v/o, 6,400 problems",
    "dual_reward_6400": "dual-reward, LoRA v/o, 6,400 problems",
    "grpo_full": "GRPO, all weights, 6,400 problems",
    "collapse": "the published error", "collapse_guarded": "the same, guards on",
    "collapse_mended": "right loss, guards on",
}
DRILL = ("collapse", "collapse_guarded", "collapse_mended")


TEXT = """# Training: accuracy, time, memory and speed

Written by `make results` (results.py). {machine}.
Seeds {seeds}: each decides LoRA's start, the training rows and their order; the test problems are
the same. Test problems: 300 of each operation where there are so many, operand pairs never seen in
training, by any model here. "+ and −" has n = 600 a seed. Brackets are 95 % Wilson intervals,
pooled over seeds. "Word" is the operation's name by the logit lens at the last prompt token;
"before the last block" is the mean over prompts of its largest probability there. "Lowest on the
way" is validation accuracy at its worst after step 0, mean over seeds. Seconds are wall time of the
whole command (training, report, pictures), GiB its peak memory.

{table}

Dual-reward against SFT, same steps, samples and seed:

{paired}

## The collapse drill: configs/collapse.yaml

The ratio is taken against the frozen base, the KL term is dropped, the learning rate is high, and
the model's own log-probability of the answer is the reward. configs/collapse_mended.yaml has the
same reward and learning rate and the right loss. Means over the first and the last ten steps.

{drill}

## The bundled base, per operation and wording

{cells}

## Speed, side by side (bench)

{speed}
"""


def run_script(command: list[str]) -> None:
    """Run another script of the project, its output unseen; raises BadInput where it fails."""
    if subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode:
        raise BadInput(f"{' '.join(command)} did not finish; see its message above")


def machine_text(versions: dict) -> str:
    """What the numbers were measured on."""
    blas = "bundled BLAS" if versions["blas"] == "bundled" else "OpenBLAS"
    return (f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}; "
            f"MLX {versions['mlx']}, {versions['device']}, {blas}")


def finished_run(name: str, seed: int, config: str, overrides: list[str]) -> dict:
    """Train one condition and seed unless that is done; returns its report and the wall seconds."""
    folder = Path("runs/results") / f"{name}_{seed}"
    command = ["train.py", config, *overrides, f"seed={seed}", f"run_dir={folder}"]
    clock = folder / "wall_seconds.json"
    if not (folder / "report.json").exists():
        start = time.perf_counter()
        run_script(command)
        write_text(clock, json.dumps(time.perf_counter() - start))
    report = json.loads((folder / "report.json").read_text())
    return report | {"seconds": json.loads(clock.read_text())}


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def seeds_text(values: list[float]) -> str:
    """example  [.912, .93, .92] -> '92.1 (91.2, 93.0, 92.0)' """
    return f"{percent(statistics.mean(values))} ({', '.join(map(percent, values))})"


def interval_text(share: dict) -> str:
    """example  {value .813, low .78, high .842} -> '81.3 [78.0, 84.2]' """
    return f"{percent(share['value'])} [{percent(share['low'])}, {percent(share['high'])}]"


def word_strength(report: dict) -> float:
    return report["strength"]["operation"]["before_last"]["value"]


def lowest_accuracy(report: dict) -> float:
    """Validation accuracy at its worst after step 0: how deep the collapse went."""
    records = read_records(Path(report["ckpt"]) / "metrics.jsonl")
    return min(r["valid_accuracy"] for r in records if "valid_accuracy" in r and r["step"])


def table(reports: dict[str, list[dict]], base: dict) -> str:
    """One row a condition: each seed's accuracy, and the Wilson interval over all seeds."""
    lines = ["| condition | + and − right, % (each seed) | all three, % | word top-1 at L4, % "
             "| word before the last block | lowest on the way, % | s | GiB |",
             "|---|---|---|---|---|---|---|---|"]
    row = lambda *cells: lines.append("| " + " | ".join(cells) + " |")
    b = base["accuracy_add_subtract"]
    row("base", interval_text(b), percent(base["accuracy"]["value"]),
        percent(base["class"]["top1"]["value"]), f"{word_strength(base):.3f}", "", "", "")
    for name, runs in reports.items():
        if name in DRILL:
            continue
        of = lambda key, runs=runs: [r[key]["value"] for r in runs]
        right = sum(round(600 * value) for value in of("accuracy_add_subtract"))
        pooled = wilson(right, 600 * len(runs))
        row(LABELS[name],
            f"{seeds_text(of('accuracy_add_subtract'))} {interval_text(pooled).split(' ', 1)[1]}",
            seeds_text(of("accuracy")), seeds_text([r["class"]["top1"]["value"] for r in runs]),
            f"{statistics.mean(map(word_strength, runs)):.3f}",
            percent(statistics.mean(map(lowest_accuracy, runs))),
            f"{statistics.mean(r['seconds'] for r in runs):.0f}",
            f"{max(r['peak_gib'] for r in runs):.2f}")
    return "\n".join(lines)


def paired_tests(reports: dict[str, list[dict]]) -> str:
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


def drill_table(reports: dict[str, list[dict]]) -> str:
    """One row a condition and seed of the collapse drill, from metrics.jsonl."""
    lines = ["| condition | seed | + and − right, % | reward, nats: first | last | entropy | "
             "length | KL to the base | skipped updates | reverts |", "|" + "---|" * 10]
    for name in DRILL:
        for seed, report in zip(SEEDS, reports[name]):
            records = read_records(Path(report["ckpt"]) / "metrics.jsonl")
            steps = [r for r in records if "reward" in r]
            mean = lambda key, rows: statistics.mean(r.get(key, math.nan) for r in rows)
            ten = [r for r in steps if "kl_k3" in r][-10:]
            lines.append(
                f"| {LABELS[name]} | {seed} | {interval_text(report['accuracy_add_subtract'])} | "
                f"{mean('reward', steps[:10]):.2f} | {mean('reward', steps[-10:]):.2f} | "
                f"{mean('entropy', steps[-10:]):.2f} | {mean('length', steps[-10:]):.2f} | "
                f"{mean('kl_k3', ten):.2f} | {sum(r.get('skipped', 0) for r in steps)} | "
                f"{steps[-1]['reverts']} |")
    return "\n".join(lines)


def cells(base: dict) -> str:
    lines = ["| test problems | base right, % | n |", "|---|---|---|"]
    cells_of = base["accuracy_by"].items()
    lines += [f"| {cell} | {interval_text(c)} | {c['n']} |" for cell, c in cells_of]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    os.chdir(Path(__file__).parent)
    if argv:
        raise BadInput(f"results.py takes no arguments, got {' '.join(argv)}")
    reports = {name: [finished_run(name, seed, *CONDITIONS[name]) for seed in SEEDS]
               for name in CONDITIONS}
    everything = ["data_operations=add,subtract,multiply,divide", "data_wordings=symbolic,worded"]
    base = measured(["eval.py", "--ckpt", "models/tiny", *everything], "base.json")
    bench = measured(["-m", "bench", "--only", "sft"], "bench.json")
    speed = [f"- `{b['work']}`: {p['ratio']:.1f} times as fast as {name}"
             for b in bench for name, p in b["peers"].items()]
    write_text(Path("docs/training.md"), TEXT.format(
        machine=machine_text(reports["sft"][0]["versions"]),
        seeds=", ".join(map(str, SEEDS)), table=table(reports, reports["sft"][0]["base"]),
        paired=paired_tests(reports), cells=cells(base), drill=drill_table(reports),
        speed="\n".join(speed)))
    print(Path("docs/training.md").read_text())


def measured(command: list[str], name: str) -> dict | list:
    """Run another script of the project with --json and return what it wrote."""
    path = Path("runs/results") / name
    run_script([*command, "--json", str(path)])
    return json.loads(path.read_text())


if __name__ == "__main__":
    run_main(main)

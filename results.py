"""Every number of RESULTS.md: trains each condition with three seeds, then writes the file. Finished runs are not repeated.

    python results.py            # 40 minutes on two CPU cores; make results
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from config import BadInput, run_main, write_text
from stats import mcnemar, wilson

SEEDS = (0, 1, 2)
CONDITIONS = {  # name: (config, overrides)
    "sft": ("configs/sft.yaml", []),
    "sft_full": ("configs/sft_full.yaml", []),
    "dual_reward": ("configs/dual_reward.yaml", []),
    "dual_reward_w07_500": ("configs/dual_reward.yaml", ["class_weight=0.7", "steps=500", "lr=5e-4", "lr_schedule=constant"]),
    "dual_reward_w07_1500": ("configs/dual_reward.yaml", ["class_weight=0.7", "steps=1500", "lr=5e-4", "lr_schedule=constant"]),
}
LABELS = {
    "sft": "SFT, LoRA q/k/v/o", "sft_full": "SFT, all weights", "dual_reward": "dual-reward, LoRA v/o (default)",
    "dual_reward_w07_500": "dual-reward, the prior work's w 0.7, lr 5e-4, 500 steps", "dual_reward_w07_1500": "the same, 1,500 steps",
}


def finished_run(name: str, seed: int) -> dict:
    """Train one condition and seed unless that is done; returns its report with the wall seconds of the command."""
    folder = Path("runs/results") / f"{name}_{seed}"
    config, overrides = CONDITIONS[name]
    command = [sys.executable, "train.py", config, *overrides, f"seed={seed}", f"run_dir={folder}"]
    clock = folder / "wall_seconds.json"
    if not (folder / "report.json").exists():
        start = time.perf_counter()
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise BadInput(f"{' '.join(command[1:])} did not finish; see its message above")
        write_text(clock, json.dumps(time.perf_counter() - start))
    return json.loads((folder / "report.json").read_text()) | {"seconds": json.loads(clock.read_text())}


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def seeds_text(values: list[float]) -> str:
    """example  [.912, .93, .92] -> '92.1 (91.2, 93.0, 92.0)' """
    return f"{percent(statistics.mean(values))} ({', '.join(map(percent, values))})"


def table(reports: dict[str, list[dict]], base: dict) -> str:
    """One row a condition; accuracy pooled over seeds with its Wilson interval, and each seed's own."""
    lines = ["| condition | + and − right, % (each seed) | all three, % | word top-1 at L4, % | word before the last block | lowest on the way, % | s | GiB |",
             "|---|---|---|---|---|---|---|---|"]
    row = lambda *cells: lines.append("| " + " | ".join(cells) + " |")
    b = base["accuracy_add_subtract"]
    row("base", f"{percent(b['value'])} [{percent(b['low'])}, {percent(b['high'])}]", percent(base["accuracy"]["value"]),
        percent(base["class"]["top1"]["value"]), f"{base['strength']['operation']['before_last']['value']:.3f}", "", "", "")
    for name, runs in reports.items():
        pooled = wilson(round(sum(r["accuracy_add_subtract"]["value"] * 600 for r in runs)), 600 * len(runs))
        metrics = [[json.loads(line) for line in (Path(r["ckpt"]) / "metrics.jsonl").read_text().splitlines()] for r in runs]
        lowest = [min(m["valid_accuracy"] for m in lines_ if "valid_accuracy" in m) for lines_ in metrics]
        row(LABELS[name], f"{seeds_text([r['accuracy_add_subtract']['value'] for r in runs])} [{percent(pooled['low'])}, {percent(pooled['high'])}]",
            seeds_text([r["accuracy"]["value"] for r in runs]), seeds_text([r["class"]["top1"]["value"] for r in runs]),
            f"{statistics.mean(r['strength']['operation']['before_last']['value'] for r in runs):.3f}", percent(statistics.mean(lowest)),
            f"{statistics.mean(r['seconds'] for r in runs):.0f}", f"{max(r['peak_gib'] for r in runs):.2f}")
    return "\n".join(lines)


def paired_tests(reports: dict[str, list[dict]]) -> str:
    """Dual-reward against SFT with the same seed, on the same test problems."""
    lines = []
    correct = lambda r: [p["correct"] for p in r["prompts"] if p["set"] == "test" and p["operation"] != "multiply"]
    for seed, dual, sft in zip(SEEDS, reports["dual_reward"], reports["sft"]):
        m = mcnemar(correct(dual), correct(sft))
        difference = 100 * (dual["accuracy_add_subtract"]["value"] - sft["accuracy_add_subtract"]["value"])
        lines.append(f"- seed {seed}: dual-reward minus SFT {difference:+.1f} points; {m['only_first']} problems only dual-reward solves, "
                     f"{m['only_second']} only SFT, McNemar exact p = {m['p']:.2g}")
    return "\n".join(lines)


def cells(base: dict) -> str:
    lines = ["| test problems | base right, % | n |", "|---|---|---|"]
    return "\n".join(lines + [f"| {cell} | {percent(c['value'])} [{percent(c['low'])}, {percent(c['high'])}] | {c['n']} |" for cell, c in base["accuracy_by"].items()])


def main(argv: list[str]) -> None:
    os.chdir(Path(__file__).parent)
    if argv:
        raise BadInput(f"results.py takes no arguments, got {' '.join(argv)}")
    reports = {name: [finished_run(name, seed) for seed in SEEDS] for name in CONDITIONS}
    subprocess.run([sys.executable, "eval.py", "--ckpt", "models/tiny", "--json", "runs/results/base.json",
                    "data_operations=add,subtract,multiply,divide", "data_wordings=symbolic,worded"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "bench.py", "--json", "runs/results/bench.json"], check=True, stdout=subprocess.DEVNULL)
    base = json.loads(Path("runs/results/base.json").read_text())
    bench = json.loads(Path("runs/results/bench.json").read_text())
    speed = "\n".join(f"- `{b['work']}`: {b['peers'][name]['ratio']:.1f} times" for b in bench for name in b["peers"])
    versions = reports["sft"][0]["versions"]
    write_text(Path("RESULTS.md"), f"""# Results

Written by `make results` (results.py). {os.cpu_count()} cores, {platform.machine()}, {platform.system()}; MLX {versions['mlx']}, {versions['device']},
{'OpenBLAS' if versions['blas'] != 'bundled' else 'bundled BLAS'}. Seeds {', '.join(map(str, SEEDS))}: each decides LoRA's start, the training rows and their order; the test problems are the same.
Test problems: 300 of each operation where there are so many, operand pairs never seen in training, by any model here. "+ and −" has n = 600 a seed.
Brackets are 95 % Wilson intervals, pooled over seeds. "Word" is the operation's name by the logit lens at the last prompt token; "before
the last block" is the mean over prompts of its largest probability there. "Lowest on the way" is validation accuracy at its worst after step 0, mean over seeds.
Seconds are wall time of the whole command (train, report, pictures), GiB its peak memory.

{table(reports, reports['sft'][0]['base'])}

Dual-reward against SFT, same steps, samples and seed:

{paired_tests(reports)}

## The bundled base, per operation and wording

{cells(base)}

## OpenBLAS against MLX's bundled BLAS, tokens/s of the same training command

{speed}
""")
    print(Path("RESULTS.md").read_text())


if __name__ == "__main__":
    run_main(main)

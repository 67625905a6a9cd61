"""Speed and memory of the project's own commands, measured side by side in one run.

    python bench.py --json bench.json [--only train_sft] [--model models/tiny]

Machines are shared and noisy: read the ratios, not the seconds. Each figure is the median over
rounds in which both sides run in turn, each in a process of its own, since a BLAS cannot be
exchanged in a running one.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from config import BadInput, run_main, write_text

WORKS = {"train_sft": "configs/sft.yaml", "train_sft_full": "configs/sft_full.yaml",
         "train_dual_reward": "configs/dual_reward.yaml"}
STEPS, WARM_UP_STEPS, ROUNDS = 40, 10, 3


def time_training(config: str, model: str, blas: str) -> dict:
    """Train briefly in a process of its own: median s and tokens/s after warm-up, and peak GiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", config, f"model={model}", f"run_dir={folder}/run",
                   f"steps={STEPS}", "eval_every_steps=0", "lens_every_steps=0",
                   "data_operations=add"]
        done = subprocess.run(command, cwd=Path(__file__).parent,
                              env={**os.environ, "NANOLENS_BLAS": blas},
                              capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"{' '.join(command[1:])} failed: "
                           f"{done.stderr.strip().splitlines()[-1]}")
        records = [json.loads(line)
                   for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    steady = [r for r in records if r["step"] > WARM_UP_STEPS]
    return {"seconds": statistics.median(r["seconds"] for r in steady),
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in steady),
            "peak_gib": records[-1]["peak_gib"]}


def measure(work: str, model: str) -> dict:
    """One work with the machine's own choice of BLAS, and MLX's bundled one beside it as a peer."""
    ours, bundled = [], []
    for _ in range(ROUNDS):  # in turn, so that a slow minute of the machine hits both
        ours.append(time_training(WORKS[work], model, os.environ.get("NANOLENS_BLAS", "")))
        bundled.append(time_training(WORKS[work], model, "none"))
    middle = lambda runs, key: statistics.median(run[key] for run in runs)
    seconds, slow = middle(ours, "seconds"), middle(bundled, "seconds")
    peer = {"seconds": slow, "peak_gib": middle(bundled, "peak_gib"), "ratio": slow / seconds}
    return {"work": work, "seconds": seconds, "tokens_per_s": middle(ours, "tokens_per_s"),
            "peak_gib": middle(ours, "peak_gib"), "limit_share": None,
            "peers": {"mlx's bundled BLAS": peer}}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Measure speed and memory, ours and a peer's in turn.")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", choices=sorted(WORKS))
    parser.add_argument("--model", default="models/tiny")
    args = parser.parse_args(argv)
    results = [measure(work, args.model) for work in ([args.only] if args.only else WORKS)]
    for r in results:
        print(f"{r['work']}: {1000 * r['seconds']:.1f} ms a step, "
              f"{r['tokens_per_s']:.0f} tokens/s, peak {r['peak_gib']:.2f} GiB")
        for name, peer in r["peers"].items():
            print(f"  {name}: {1000 * peer['seconds']:.1f} ms a step; "
                  f"ours is {peer['ratio']:.1f} times as fast")
    if args.json:
        write_text(Path(args.json), json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)

"""The study: train every condition with several seeds, look inside each, write RESULTS.md.

    python -m study                                    # study/plan.yaml; make study
    python -m study --smoke                            # the whole path in two minutes; for tests
    python -m study model=Qwen/Qwen2.5-0.5B lr=2e-4 seeds=2 run_dir=runs/study_qwen

Each run is a folder like any other (train.py), plus `measures.json` (measure.py): what was seen in
it, per problem as well as on average. Runs that are done are skipped and broken off ones continued,
so the same command goes on where it stopped. Runs go side by side, one a core, since a small model
cannot use two. findings.py makes tables, tests and pictures from the JSON files alone.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx

from checkpoint import load_base, load_checkpoint
from config import load_overrides, run_main
from files.disk import write_text
from files.keys import BadInput
from files.options import Parser
from files.run_folder import provenance
from study.findings import write_study
from study.measure import measure, trajectory
from study.plan import Run, load_study, plan
from train import train

ROOT = Path(__file__).parent.parent
PLAN = Path(__file__).parent / "plan.yaml"


def do_run(run: Run, size: dict) -> None:
    """Train and measure one run; what training prints goes to its folder's log."""
    cfg, start = load_overrides(run.words), time.perf_counter()
    if run.trains:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{run.folder}.log", "a") as log, redirect_stdout(log):
            train(cfg, with_base=False)
        model, tokenizer, _ = load_checkpoint(run.folder)
    else:
        model, tokenizer = load_base(cfg.model, cfg.dtype, cfg.bits)
    trained = time.perf_counter() - start
    result = measure(model, tokenizer, cfg, size)
    result |= {"condition": run.condition, "seed": run.seed, "steps": cfg.steps,
               "trajectory": trajectory(run.folder, result["block"]),
               "seconds": [round(trained, 1), round(time.perf_counter() - start - trained, 1)],
               "versions": provenance()}
    write_text(run.folder / "measures.json", json.dumps(result) + "\n")


def is_done(run: Run) -> bool:
    return (run.folder / "measures.json").exists()


def run_all(runs: list[Run], arguments: list[str], workers: int) -> list[str]:
    """Do what is not done, `workers` at a time, each in a process; returns what failed and why."""
    left, failed, start = [r for r in runs if not is_done(r)], [], time.perf_counter()
    print(f"{len(runs)} runs, {len(runs) - len(left)} done, {workers} at a time")
    env = {**os.environ, "OPENBLAS_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    def process(run: Run) -> tuple[Run, subprocess.CompletedProcess]:
        command = [sys.executable, "-m", "study", *arguments, "--job", run.condition, str(run.seed)]
        return run, subprocess.run(command, env=env, capture_output=True, text=True)

    # runs that start from another wait for the second round
    rounds = [[r for r in left if not r.after], [r for r in left if r.after]]
    finished = 0
    with ThreadPoolExecutor(workers) as pool:
        try:
            for part in rounds:
                for future in as_completed([pool.submit(process, run) for run in part]):
                    run, done = future.result()
                    if done.returncode == 130:
                        raise KeyboardInterrupt
                    finished += 1
                    line = (done.stderr if done.returncode else done.stdout).strip()
                    line = (line.splitlines() or ["no message"])[-1]
                    name = f"{run.condition} seed {run.seed}"
                    if done.returncode:
                        failed.append(f"{name}: {line.removeprefix('error: ')}")
                    ahead = (time.perf_counter() - start) / finished * (len(left) - finished) / 60
                    print(f"{finished:4d}/{len(left)}  {name:<28} {line}   "
                          f"about {ahead:.0f} min left", flush=True)
        except KeyboardInterrupt:
            # runs under way got the same signal and save themselves; no new ones start
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m study",
                                     description="Run the study and write RESULTS.md.")
    parser.add_argument("file", nargs="?", default=str(PLAN))
    parser.add_argument("--smoke", action="store_true", help="tiny: shows that everything works")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one a core, or 1 "
                        "on a GPU")
    parser.add_argument("--job", nargs=2, metavar=("CONDITION", "SEED"), help=argparse.SUPPRESS)
    args, words = parser.parse_known_args(argv)
    if args.file.partition("=")[1]:     # key=value came first
        args.file, words = parser.get_default("file"), [args.file, *words]
    bad = [w for w in words if w.startswith("-")]
    if bad:
        raise BadInput(f"unknown option {bad[0]}; see python -m study --help")
    study = load_study(args.file, args.smoke, words)
    runs = plan(study)
    if args.job:
        run = next(r for r in runs if [r.condition, str(r.seed)] == args.job)
        do_run(run, study["size"])
        values = json.loads((run.folder / "measures.json").read_text())["values"]
        print(f"accuracy {100 * values['accuracy.symbolic']:5.1f} %, "
              f"word {values['word.strength']:.3f}")
        return
    on_gpu = mx.default_device() != mx.Device(mx.cpu)
    workers = args.workers or (1 if on_gpu else os.cpu_count() or 1)
    arguments = [args.file, *(["--smoke"] if args.smoke else []), *words]
    failed = run_all(runs, arguments, workers)
    default = not args.smoke and not words and Path(args.file).resolve() == PLAN.resolve()
    out = ROOT if default else Path(study["run_dir"])
    write_study(study, [asdict(r) for r in runs if is_done(r)], failed, out)
    print(f"wrote {out / 'RESULTS.md'}")
    if failed:
        raise BadInput(f"{len(failed)} of {len(runs)} runs failed: {failed[0]}; the rest is in "
                       f"{out / 'RESULTS.md'}; the same command tries them again")


if __name__ == "__main__":
    run_main(main)

"""The study: train every arm on every base with several seeds, look inside each, judge, report.

    python -m study                     # study/plan.yaml; make study. What is done is not repeated
    python -m study bases=untaught_1,untaught_2,untaught_3,taught   # the bundled models alone
    python -m study --report            # from study/measures alone, in seconds; make study-report

A run is a folder like any other (train.py). What was seen in it (measure.py) is one small file in
study/measures; judge.py and report.py read these alone. Runs go side by side, one a core, since a
small model cannot use two.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim

import train as training
from checkpoint import load_base, load_checkpoint
from config import run_main
from files.disk import read_json, write_text
from files.keys import BadInput
from files.options import Parser
from files.run_folder import provenance
from study.jacobian import own_texts
from study.measure import measure
from study.plan import Run, as_words, load_study, plan
from study.report import write_report
from study.results import run_script

PLAN = Path(__file__).parent / "plan.yaml"


def do_run(run: Run, study: dict) -> dict:
    """Train and measure one run; returns its measures. What training prints goes to a log."""
    cfg, start = run.config(), time.perf_counter()
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    write_data(run)
    if run.arm == "base":
        model, tokenizer = load_base(cfg.model, cfg.dtype, cfg.bits)
        texts_of = model
    else:
        if run.sgd:     # the one thing of the prior code that no config key has
            training.make_optimizer = plain_descent
        with open(f"{run.folder}.log", "a") as log, redirect_stdout(log):
            training.train(cfg, with_base=False)
        model, tokenizer, _ = load_checkpoint(run.folder)
        texts_of = load_base(cfg.model, cfg.dtype)[0]
    trained = time.perf_counter() - start
    texts = None
    if run.arm in study["jacobian"]["arms"] and run.seed <= study["jacobian"]["seeds"]:
        texts = own_texts(texts_of, tokenizer, study["jacobian"]["texts"])
    found = {"base": run.base, "arm": run.arm, "seed": run.seed, "fold": run.fold,
             "set": as_words(run.set),
             **measure(model, tokenizer, cfg, run.kind["size"], run.read_base(), texts)}
    versions = provenance()
    return {**found, "versions": {key: versions[key] for key in ("mlx", "device", "commit")},
            "seconds": [round(trained), round(time.perf_counter() - start - trained)]}


def plain_descent(cfg, model):
    """What the prior code ran: a step against the gradient, no moments."""
    optimizer = optim.SGD(cfg.lr)
    optimizer.init(model.trainable_parameters())
    return optimizer


def write_data(run: Run) -> None:
    """The fold of the real model's problems, where the plan's data are these."""
    if run.kind["data"] != "arithmetic":
        folder = run.kind["data"].format(fold=run.fold)
        run_script(["-m", "tasks", "few_shot", folder, "--fold", str(run.fold)])


def run_all(runs: list[Run], arguments: list[str], workers: int) -> list[str]:
    """Do what is not done, `workers` at a time, each in a process; returns what failed and why."""
    left, failed, start = [r for r in runs if not r.is_done()], [], time.perf_counter()
    print(f"{len(runs)} runs, {len(runs) - len(left)} done, {workers} at a time")
    env = {"MLX_ENABLE_TF32": "0",      # float32 is whole on a GPU too
           **os.environ, "OPENBLAS_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    def process(run: Run) -> tuple[Run, subprocess.CompletedProcess]:
        command = [sys.executable, "-m", "study", *arguments, "--job", run.name]
        return run, subprocess.run(command, env=env, capture_output=True, text=True)

    # the other arms read what was found in their base
    rounds = [[r for r in left if r.arm == "base"], [r for r in left if r.arm != "base"]]
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
                    if done.returncode:
                        failed.append(f"{run.name}: {line.removeprefix('error: ')}")
                    ahead = (time.perf_counter() - start) / finished * (len(left) - finished) / 60
                    print(f"{finished:4d}/{len(left)}  {run.name:<32} {line}   "
                          f"about {ahead:.0f} min left", flush=True)
        except KeyboardInterrupt:
            # runs under way got the same signal and save themselves; no new ones start
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m study", description="Run the study, judge it, report.")
    parser.add_argument("words", nargs="*", metavar="key=value",
                        help="bases=A,B run_dir=FOLDER measures=FOLDER, or another plan's file")
    parser.add_argument("--report", action="store_true", help="no runs: from the measures alone")
    parser.add_argument("--out", type=Path, help="where the report goes; default: docs, of some "
                        "bases alone run_dir")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one a core, or 1 "
                        "on a GPU")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    files = [word for word in args.words if "=" not in word]
    study = load_study(files[0] if files else PLAN, [w for w in args.words if "=" in w])
    runs = plan(study)
    if args.job:
        run = next(run for run in runs if run.name == args.job)
        found = do_run(run, study)
        write_text(run.measures, json.dumps(found) + "\n")
        values = found["values"]
        print(f"accuracy {100 * values['accuracy']:5.1f} %, word {values['word.strength']:.3f}, "
              f"{sum(found['seconds'])} s")
        return
    failed = []
    if not args.report:
        on_gpu = mx.default_device() != mx.Device(mx.cpu)
        workers = args.workers or (1 if on_gpu else os.cpu_count() or 1)
        failed = run_all(runs, args.words, workers)
    some = any(word.startswith("bases=") for word in args.words)
    out = args.out or Path(study["run_dir"] if some else "docs")
    write_report(study, [read_json(r.measures) for r in runs if r.is_done()], out)
    if failed:
        raise BadInput(f"{len(failed)} of {len(runs)} runs failed: {failed[0]}; the same command "
                       "tries them again")


if __name__ == "__main__":
    run_main(main)

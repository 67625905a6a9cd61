"""The study: train every condition with several seeds, look inside each, write RESULTS.md.

    python study.py                                    # configs/study.yaml; make study
    python study.py --smoke                            # the whole path in two minutes; for tests
    python study.py model=Qwen/Qwen2.5-0.5B lr=2e-4 seeds=2 run_dir=runs/study_qwen

A study file lists conditions (config keys on top of common ones), and hypotheses with their tests.
Each run is a folder like any other (train.py), plus `measures.json`: what `measure` saw in it, per
problem as well as on average. Runs that are done are skipped and broken off ones continued, so the
same command goes on where it stopped. Runs go side by side, one a core, since a small model cannot
use two. findings.py makes tables, tests and pictures from the JSON files alone.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
import yaml

from clean import provenance
from config import BadInput, Config, load_overrides, run_main, write_text
from data import Problem, held_out
from eval import class_block, class_ids, measure_accuracy, series_ids, target_ids
from findings import write_results
from lens import contributions, depth, read_prompts
from lora import load_base, load_checkpoint
from model import Llama
from plot import read_records
from probe import fit_probe, four_claims, matched_problems
from stats import auc_within
from tokenizer import Tokenizer
from train import train

HERE = Path(__file__).parent
WORDINGS = ("symbolic", "asked", "worded", "asked_worded")
GIVEN_TO_STUDY = ("seeds", "sweep_seeds", "run_dir")    # words that are not config keys of runs


@dataclass
class Run:
    """One condition with one seed: what to train and where."""
    condition: str
    seed: int
    folder: Path
    words: list[str]        # key=value for config.load_overrides
    trains: bool            # false: the base model, only looked at
    after: Path | None      # the run it starts from


# --------------------------------------------------------------------------------------------------
# the plan


def load_study(path: str | Path, smoke: bool, words: list[str]) -> dict:
    """Read a study file, apply its smoke section and the command line; raises BadInput."""
    try:
        study = yaml.safe_load(Path(path).read_text())
        small = study.pop("smoke", {})
        study["conditions"] = {name: c or {} for name, c in study["conditions"].items()}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a study file ({' '.join(str(error).split())}); "
                       "see configs/study.yaml") from None
    study["run_dir"] = f"runs/{Path(path).stem}" + ("_smoke" if smoke else "")
    if smoke:
        kept = small.pop("conditions")
        study["conditions"] = {name: study["conditions"][name] for name in kept}
        study["common"] |= small.pop("common")
        study |= small
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise BadInput(f"command line: expected key=value, got {word!r}")
        if key in ("seeds", "sweep_seeds") and not value.isdigit():
            raise BadInput(f"{word}: expected a whole number")
        if key in GIVEN_TO_STUDY:
            study[key] = int(value) if value.isdigit() else value
        else:
            study["common"][key] = value
    if words and study["run_dir"] == f"runs/{Path(path).stem}":
        raise BadInput(f"with keys of your own ({' '.join(words)}) the study needs a folder of its "
                       "own: add run_dir=runs/NAME")
    return study


def as_words(keys: dict) -> list[str]:
    """YAML values as `key=value`. example  {"lora_targets": ["q", "v"]} -> ["lora_targets=q,v"]"""
    text = lambda v: (",".join(map(str, v)) if isinstance(v, list)
                      else str(v).lower() if isinstance(v, bool) else str(v))
    return [f"{key}={text(value)}" for key, value in keys.items()]


def plan(study: dict) -> list[Run]:
    """All runs, seeds outermost: an interrupted study has whole seeds. Checks every config."""
    runs, mistakes = [], []
    for seed in range(1, 1 + max(study["seeds"], study["sweep_seeds"])):
        for name, condition in study["conditions"].items():
            main = condition.get("group") in ("main", "control", "helper")
            last = 1 if name == "base" else study["seeds" if main else "sweep_seeds"]
            if "same_as" in condition or seed > last:
                continue
            folder = Path(study["run_dir"]) / f"{name}_{seed}"
            keys = {**study["common"], **condition.get("set", {}), "seed": seed, "run_dir": folder}
            after = condition.get("after")
            after = Path(study["run_dir"]) / f"{after}_{seed}" if after else None
            if after:
                keys["model"] = after
            if keys.get("full"):    # lora_* keys of `common` do nothing there
                keys = {k: v for k, v in keys.items() if not k.startswith("lora_")}
            try:
                load_overrides(as_words(keys))
            except BadInput as error:
                mistakes.append(f"condition {name}: {error}")
            runs.append(Run(name, seed, folder, as_words(keys), name != "base", after))
    if mistakes:
        raise BadInput("; ".join(dict.fromkeys(mistakes)))
    return runs


# --------------------------------------------------------------------------------------------------
# what is measured in a finished run


def measure(model: Llama, tokenizer: Tokenizer, cfg: Config, size: dict) -> dict:
    """Look inside one model: {values {name: number}, curves {name: [L+1]}, problems {name: [...]},
    block, claims}.

    values    one number a run; names say what, where: word.block.asked is the operation word's
              top-1 share at the trained block, over "what is 7 * 8 = " prompts
    problems  the same before averaging, where a measure is a mean over problems; the problems do
              not depend on the seed, so runs can be paired
    """
    block = class_block(cfg, model)
    result = {"values": {}, "curves": {}, "problems": {}, "block": block}
    rows = []
    for wording in WORDINGS:
        n = size["problems"] if wording == "symbolic" else -(-size["problems"] // 3)
        problems = held_out(replace(cfg, data_wordings=(wording,)), "test", n)
        rows += measure_wording(model, tokenizer, cfg, problems, wording, block, result)
    values = result["values"]
    measure_masked(model, tokenizer, cfg, size["pairs"], block, values)
    measure_prediction([r for r in rows if r["operation"] in ("add", "subtract")], values)
    result["claims"] = four_claims(model, tokenizer, cfg, size["pairs"], size["swap_pairs"])
    summarize_claims(result["claims"]["taps"], block, values)
    measure_attribution(model, tokenizer, cfg, size, result)
    return result


def measure_wording(model: Llama, tokenizer: Tokenizer, cfg: Config, problems: list[Problem],
                    wording: str, block: int, result: dict) -> list[dict]:
    """Accuracy and the logit lens on unseen pairs in one wording; adds to result, returns rows.

    Accuracy and the answer's series are over add and subtract, which the base can learn; the word's
    series are over all operations.
    """
    values, curves = result["values"], result["curves"]
    prompts, ids = series_ids(tokenizer, problems)
    ids = np.column_stack([ids, class_ids(cfg, tokenizer, problems)])               # (B, 4)
    answer, word, symbol, target = range(4)
    reading = read_prompts(model, prompts, ids.tolist())
    probs, top = reading.probs[:, :, 0], reading.top_ids[:, :, 0, 0]                # (L+1, B, 4)
    rows = measure_accuracy(model, tokenizer, problems, cfg.max_completion_tokens)
    sums = np.array([p.operation in ("add", "subtract") for p in problems])
    inner = slice(1, -1)        # before the last block, which is the output itself

    def keep(name: str, per_problem: np.ndarray) -> None:
        values[name] = float(per_problem.mean())
        result["problems"][name] = [round(float(v), 5) for v in per_problem]

    keep(f"accuracy.{wording}", np.array([r["correct"] for r in rows])[sums])
    keep(f"word.block.{wording}", top[block + 1] == ids[:, word])
    final, own = reading.final_probs[:, :, 0], reading.final_probs[inner, :, 0].max(0)
    for i, row in enumerate(rows):
        row |= {"word": probs[inner, i, word].max(), "answer": probs[inner, i, answer].max(),
                "own": own[i], "confidence": final[-1, i]}
    if wording != "symbolic":
        return rows
    keep("word.strength", probs[inner, :, word].max(0))
    keep("symbol.strength", probs[inner, :, symbol].max(0))
    keep("answer.strength", probs[inner, sums, answer].max(0))
    keep("answer.last", probs[-1, sums, answer])
    keep("target.block", top[block + 1] == ids[:, target])
    others = [k for k in range(1, len(top) - 1) if k != block + 1]
    keep("word.spread", (top[others] == ids[:, word]).mean(0))
    # the token before the last prompt token, and the answer behind it: causal, so the stream there
    # is that of the prompt cut or continued
    for name, change in (("earlier", lambda p, i: p[:-1]), ("later", lambda p, i: [*p, int(i)])):
        moved = [change(p, i) for p, i in zip(prompts, ids[:, answer])]
        at = read_prompts(model, moved, ids.tolist()).top_ids[block + 1, :, 0, 0]
        keep(f"word.block.{name}", at == ids[:, word])
    curves |= {"word.prob": probs[:, :, word].mean(1), "symbol.prob": probs[:, :, symbol].mean(1),
               "answer.prob": probs[:, sums, answer].mean(1),
               "word.top1": (top == ids[:, word]).mean(1),
               "entropy": reading.entropy[:, :, 0].mean(1), "kl": reading.kl[:, :, 0].mean(1)}
    for name in ("word", "answer"):
        where = depth(curves[f"{name}.prob"], 0.10)
        values |= {f"{name}.peak": where["peak"] - 1, f"{name}.onset": where["onset"] - 1
                   if where["onset"] > 0 else None}
    for name in curves:
        curves[name] = [round(float(v), 5) for v in curves[name]]
    return rows


def measure_masked(model: Llama, tokenizer: Tokenizer, cfg: Config, pairs: int, block: int,
                   values: dict) -> None:
    """Where the operator is masked ("7 ? 8 = ") nothing can be known: does a word fire anyway?

    masked.fires  share of prompts whose top token at the trained block is some operation's word
    masked.prob   mean probability there of the likeliest of these words
    """
    problems = matched_problems(cfg, "test", pairs, "masked")
    words = list(target_ids(tokenizer, problems, "word").values())
    prompts = [tokenizer.encode_prompt(text) for text in dict.fromkeys(p.prompt for p in problems)]
    reading = read_prompts(model, prompts, [words] * len(prompts))
    top = reading.top_ids[block + 1, :, 0, 0]
    values |= {"masked.fires": float(np.isin(top, words).mean()),
               "masked.prob": float(reading.probs[block + 1, :, 0].max(-1).mean())}


def measure_prediction(rows: list[dict], values: dict) -> None:
    """Does strength before the last block tell right answers from wrong ones, in one model?

    word, answer  the operation word's, the right answer's strength (this one knows the answer)
    own           the largest probability before the last block of what the model ends up saying
    after_confidence.*  log-odds of being right for one standard deviation more, in a logistic
                  regression that also has the last block's confidence and a term for each cell
    None where fewer than five answers are right, or wrong: nothing can be said
    """
    right = np.array([r["correct"] for r in rows])
    cells = np.array([f"{r['operation']} {r['wording']}" for r in rows])
    enough = min(right.sum(), (~right).sum()) >= 5
    logit = lambda name: np.array([np.log(np.clip(r[name], 1e-9, 1) / np.clip(1 - r[name], 1e-9, 1))
                                   for r in rows])
    for name in ("word", "answer", "own", "confidence"):
        values[f"auc.{name}"] = auc_within(logit(name), right, cells) if enough else None
    for name in ("word", "own"):
        features = np.column_stack([logit(name), logit("confidence"),
                                    *(cells == c for c in np.unique(cells)[1:])])
        weight = fit_probe(features, right.astype(int), 1e-4).weight if enough else None
        values[f"after_confidence.{name}"] = float(weight[1, 0] - weight[0, 0]) if enough else None


def summarize_claims(taps: list[dict], block: int, values: dict) -> None:
    """The numbers of probe.four_claims that hypotheses name: at the trained block, and counts."""
    at, first = taps[block + 1], taps[1]
    jacobian = at["jacobian_lens"]
    values |= {
        "probe.block": at["probe"]["accuracy"]["value"], "probe.worded": at["probe"]["worded"],
        "selectivity.block": at["probe"]["selectivity"]["value"],
        "cosine.block": at["probe"]["cosine"],
        "aligned.block": at["logit_lens"]["aligned"]["value"],
        "matched.rank.block": at["logit_lens"]["rank"],
        "jacobian.aligned.block": jacobian["aligned"]["value"],
        "jacobian.rank.block": jacobian["rank"],
        "used.block": at["swaps"]["used"]["value"],
        "lens_used.block": at["swaps"]["lens_used"]["value"],
        **{f"flipped.{kind}.block": at["swaps"][kind]["flipped"]
           for kind in ("means", "lens", "rest", "random", "patch")},
        **{f"right.{kind}.block": at["swaps"][kind]["right"]
           for kind in ("means_ablated", "lens_ablated", "random_ablated")},
        "flipped.first": first["swaps"]["means"]["flipped"],
        "flipped.random.first": first["swaps"]["random"]["flipped"]}
    for claim in first["claims"]:
        values[f"blocks.{claim}"] = sum(tap["claims"][claim] for tap in taps[1:])


def measure_attribution(model: Llama, tokenizer: Tokenizer, cfg: Config, size: dict,
                        result: dict) -> None:
    """Who writes the answer: mean share of logit(answer) - logit(the other operation's answer)."""
    problems = [p for p in held_out(cfg, "test", size["swap_pairs"])
                if p.operation in ("add", "subtract")]
    prompts, targets, foils = [], [], []
    for p in problems:
        other = str(p.a - p.b if p.operation == "add" else p.a + p.b)
        ids, P = tokenizer.encode_pair(p.prompt, p.answer)
        foil, _ = tokenizer.encode_pair(p.prompt, other)
        prompts.append(ids[:P])
        targets.append(ids[P])
        foils.append(foil[P])
    names, shares = contributions(model, prompts, targets, foils)
    result["attribution"] = {n: round(float(v), 4) for n, v in zip(names, shares.mean(1))}


def trajectory(folder: Path, block: int) -> list[dict]:
    """The run on its way, from metrics.jsonl: [{step, accuracy, word, answer}] on validation."""
    path = folder / "metrics.jsonl"
    points = [r for r in read_records(path) if "lens" in r] if path.exists() else []
    return [{"step": r["step"], "accuracy": r.get("valid_accuracy"),
             "word": r["lens"]["operation"]["top1"][block + 1],
             "answer": max(r["lens"]["answer"]["prob"][1:-1])} for r in points]


# --------------------------------------------------------------------------------------------------
# doing it


def do_run(run: Run, size: dict) -> None:
    """Train and measure one run; what training prints goes to its folder's log."""
    cfg, start = load_overrides(run.words), time.perf_counter()
    if run.trains:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{run.folder}.log", "a") as log, redirect_stdout(log):
            train(cfg, with_base=False)
        model, tokenizer, _ = load_checkpoint(run.folder)
    else:
        model, tokenizer = load_base(cfg.model, cfg.dtype, cfg.bits,
                                     group_size=cfg.bits_group_size)
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
        command = [sys.executable, __file__, *arguments, "--job", run.condition, str(run.seed)]
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
    parser = argparse.ArgumentParser(description="Run the study and write RESULTS.md.")
    parser.add_argument("file", nargs="?", default=str(HERE / "configs/study.yaml"))
    parser.add_argument("--smoke", action="store_true", help="tiny: shows that everything works")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one a core, or 1 "
                        "on a GPU")
    parser.add_argument("--job", nargs=2, metavar=("CONDITION", "SEED"), help=argparse.SUPPRESS)
    args, words = parser.parse_known_args(argv)
    if args.file.partition("=")[1]:     # key=value came first
        args.file, words = parser.get_default("file"), [args.file, *words]
    bad = [w for w in words if w.startswith("-")]
    if bad:
        raise BadInput(f"unknown option {bad[0]}; see python study.py --help")
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
    default = not args.smoke and not words and Path(args.file).name == "study.yaml"
    out = HERE if default else Path(study["run_dir"])
    write_results(study, [asdict(r) for r in runs if is_done(r)], failed, out)
    print(f"wrote {out / 'RESULTS.md'}")
    if failed:
        raise BadInput(f"{len(failed)} of {len(runs)} runs failed: {failed[0]}; the rest is in "
                       f"{out / 'RESULTS.md'}; the same command tries them again")


if __name__ == "__main__":
    run_main(main)

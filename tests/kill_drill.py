"""Kill runs at random moments, give the same command again, and compare what is left. `make kill`

    python tests/kill_drill.py                             # 20 runs of each method: 100
    python tests/kill_drill.py --runs 10 --methods grpo    # fewer
    python tests/kill_drill.py --seed 7                    # other moments

Of each method one run goes through undisturbed. Every other is killed with SIGKILL at least once
and continued until it ends: half of them at a moment drawn evenly over the undisturbed run's time,
half as a temporary file of a save appears, the how-manieth being drawn. Where a kill fell is seen
afterwards, by what it left. Whatever lies in the folder then must load, as eval.py loads it. In the
end weights, optimizer, best/, records, report and pictures must be the undisturbed run's to the
bit, clocks aside, and no temporary file may be left.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import deserialize, safe_open

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_checkpoint  # noqa: E402
from files.keys import BadInput  # noqa: E402
from tasks.__main__ import write_task  # noqa: E402

COMMON = {"model": ROOT / "models/tiny", "steps": 12, "batch_size": 16, "lora_rank": 4,
          "lora_alpha": 8, "save_every_steps": 2, "eval_every_steps": 4, "eval_prompts": 16,
          "lens_every_steps": 4}
METHODS = {
    "sft": {"method": "sft"},
    "sft_full": {"method": "sft", "full": "true"},
    "dual_reward": {"method": "dual_reward", "grad_accum_steps": 2},
    # a rate that grows until the policy collapses: at step 21 the guard puts the best weights back
    "grpo": {"method": "grpo", "steps": 24, "batch_size": 32, "grpo_group_size": 4, "lr": "0.2",
             "lr_warmup_steps": 100, "lr_schedule": "constant", "grpo_epochs": 2,
             "grpo_kl_stop": 0},
    "markovian": {"method": "markovian", "model": ROOT / "models/tiny_cot", "batch_size": 8,
                  "grpo_group_size": 4,
                  "grpo_advantage": "group", "grpo_std_floor": 0.1, "grpo_epochs": 2,
                  "markovian_ramp_steps": 9, "chain_tokens": 8,
                  "max_completion_tokens": 3, "eval_prompts": 24, "lens_every_steps": 0},
}
CLOCKS = {"seconds", "tokens_per_s", "peak_gib", "completions_per_s", "rollout_s", "score_s",
          "update_s"}
# of the report: what differs between two folders of one run, two commits, two machines
PLACES = {"ckpt", "versions", "peak_gib", "estimated_peak_gib"}
AGAIN = 0.3     # how often a run that was killed is killed once more

loading = threading.Lock()      # two models are not loaded at once


def write_data(folder: Path) -> Path:
    """Sums and differences in words, which the bundled model half knows; few are judged.

    Beside them, for Markovian training, sums of two terms to reason about.
    """
    write_task("sums", folder.parent / "sums", test=24, terms=2, largest=9)
    folder.mkdir(parents=True)
    for split, first, each in (("train", 50, 1), ("valid", 60, 3), ("test", 70, 3)):
        rows = [{"prompt": f"{a} {word} {b} = ", "response": str(answer), "operation": operation}
                for a in range(first, first + 6) for b in range(17, 47, 5)
                for word, operation, answer in (("plus", "add", a + b),
                                                ("minus", "subtract", a - b))]
        lines = [json.dumps(row) + "\n" for row in rows[::each]]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def write_config(work: Path, method: str, name: str, **keys) -> tuple[Path, Path]:
    """A config file of one run in the drill's folder, and the run's folder."""
    run = work / method / name
    data = work / ("sums" if method == "markovian" else "data")
    keys = COMMON | {"data": data, "run_dir": run} | METHODS[method] | keys
    path = work / f"{method}_{name}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return path, run


def start(config: Path) -> subprocess.Popen:
    """The command that trains, and that continues; its output goes beside the config."""
    with open(config.with_suffix(".log"), "a") as log:
        return subprocess.Popen([sys.executable, "train.py", str(config)], cwd=ROOT, stdout=log,
                                stderr=log, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})


def finish(process: subprocess.Popen, config: Path) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"exit code {process.returncode}, see {config.with_suffix('.log')}:\n"
                           + config.with_suffix(".log").read_text()[-2000:])


# --------------------------------------------------------------------------------------------------
# when to kill


def leftovers(run: Path) -> set[str]:
    """The temporary files of saves, in the run folder and in best/."""
    names = set()
    for place in (run, run / "best"):
        try:
            with os.scandir(place) as entries:
                names |= {f"{place.name}/{e.name}" for e in entries
                          if e.name.startswith(".") and e.name.endswith((".tmp", ".safetensors"))}
        except FileNotFoundError:
            pass
    return names


def wait_for_save(process: subprocess.Popen, run: Path, count: int) -> int:
    """Return as the count-th temporary file appears, or at the end; how many there were."""
    seen, before = 0, set()
    while process.poll() is None:
        now = leftovers(run)
        seen += len(now - before)
        if seen >= count:
            break
        before = now
        time.sleep(0.0001)
    return seen


def wait_until(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def kill(process: subprocess.Popen) -> bool:
    """Whether it was still alive to be killed."""
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


# --------------------------------------------------------------------------------------------------
# what must hold


def tensors(path: Path) -> tuple[dict, dict]:
    """A safetensors file's arrays, as bytes, and its metadata; raises if a byte is missing."""
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    return {name: (array["dtype"], array["shape"], bytes(array["data"]))
            for name, array in deserialize(path.read_bytes())}, about


def check_readable(run: Path) -> None:
    """Right after a kill: every file is whole, and weights load as eval.py loads them."""
    for path in [p for p in run.rglob("*") if not p.name.startswith(".")]:
        if path.suffix == ".safetensors":
            tensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":   # appended to: the last line may be torn
            for line in path.read_text().split("\n")[:-1]:
                json.loads(line)
    for folder in (run, run / "best"):
        if (folder / "config.yaml").exists():
            try:
                with loading:
                    load_checkpoint(folder)
            except BadInput as error:
                assert "holds no weights yet" in str(error), error
    if (run / "state.safetensors").exists():    # whatever can be continued can be judged
        assert any((run / name).exists() for name in ("adapters.safetensors", "model.safetensors"))


def content(path: Path) -> object:
    """A file of a run without clocks and places."""
    if path.suffix == ".safetensors":
        return tensors(path)
    if path.suffix == ".jsonl":
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS}
                for line in path.read_text().splitlines()]
    if path.name == "report.json":
        report = json.loads(path.read_text())
        report["config"].pop("run_dir")
        return {k: v for k, v in report.items() if k not in PLACES}
    if path.name == "config.yaml":
        return [line for line in path.read_text().splitlines() if not line.startswith("run_dir")]
    return path.read_bytes()


def differences(whole: Path, killed: Path) -> list[str]:
    """The files, by name, that are not the same in two finished runs; [] is what is wanted."""
    files = lambda run: {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    both = files(whole) & files(killed) - {".lock"}     # that holds the last process' id
    return sorted(files(whole) ^ files(killed)) + sorted(
        name for name in both if content(whole / name) != content(killed / name))


# --------------------------------------------------------------------------------------------------
# the drill


@dataclass
class Outcome:
    """What happened to some runs."""
    runs: int = 0
    kills: int = 0
    in_a_save: int = 0          # kills that left a temporary file
    before_a_state: int = 0     # kills that left nothing to continue from
    wrong: list[str] = field(default_factory=list)


@dataclass
class Whole:
    """The undisturbed run."""
    run: Path
    seconds: float
    saves: int      # temporary files that were seen in it


def run_whole(work: Path, method: str, **keys) -> Whole:
    """Train one run undisturbed, watched as the others are."""
    config, run = write_config(work, method, "whole", **keys)
    begun = time.monotonic()
    process = start(config)
    saves = wait_for_save(process, run, sys.maxsize)
    finish(process, config)
    return Whole(run, time.monotonic() - begun, saves)


def run_killed(work: Path, method: str, name: str, whole: Whole, rng: random.Random,
               in_save: bool, again: float = AGAIN, **keys) -> Outcome:
    """Train one run, killed at least once, to its end; compare it with the undisturbed one."""
    config, run = write_config(work, method, name, **keys)
    outcome = Outcome(runs=1)
    while not outcome.kills or rng.random() < again:
        process = start(config)
        if in_save:
            wait_for_save(process, run, rng.randint(1, max(whole.saves, 1)))
        else:
            wait_until(process, rng.uniform(0, whole.seconds))
        if not kill(process):   # it had ended
            finish(process, config)
            if outcome.kills:
                break
            shutil.rmtree(run)
            continue
        outcome.kills += 1
        outcome.in_a_save += bool(leftovers(run))
        outcome.before_a_state += not (run / "state.safetensors").exists()
        check_readable(run)
    finish(start(config), config)
    outcome.wrong = [f"{method}/{name}: {file}" for file in differences(whole.run, run)]
    return outcome


def drill(work: Path, method: str, runs: int, seed: int, pool: ThreadPoolExecutor) -> list[str]:
    """One method: print its line, return what is wrong."""
    (work / method).mkdir()
    whole = run_whole(work, method)

    def one(i: int) -> Outcome:
        rng, name = random.Random(f"{seed} {method} {i}"), f"killed_{i}"
        try:
            return run_killed(work, method, name, whole, rng, in_save=i % 2 == 1)
        except Exception as error:  # reported with the others, which go on
            return Outcome(runs=1, wrong=[f"{method}/{name}: {error!r}"])

    done = list(pool.map(one, range(runs)))
    total = lambda key: sum(getattr(outcome, key) for outcome in done)
    print(f"{method:<12} {total('runs')} runs, {total('kills')} kills: {total('in_a_save')} during "
          f"a save, {total('before_a_state')} before the first state; "
          f"{sum(bool(outcome.wrong) for outcome in done)} runs differ or failed", flush=True)
    return [line for outcome in done for line in outcome.wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs, continue them, compare.")
    parser.add_argument("--runs", type=int, default=100, help="in all (default 100)")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of " + ",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    methods, begun = args.methods.split(","), time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="kill_drill_"))
    write_data(work / "data")
    print(f"seed {args.seed}, {args.runs} runs in {work}", flush=True)
    with ThreadPoolExecutor(2) as pool:
        wrong = [line for method in methods
                 for line in drill(work, method, args.runs // len(methods), args.seed, pool)]
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes")
    if wrong:
        print("\n".join([*wrong, f"kept: {work}"]))
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())

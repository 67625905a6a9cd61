"""A run's folder: one process at a time in it, and everything that continuing needs.

A kill may come at any moment, also inside a save. So every file is written beside its place and
renamed; the state, one file, is written last, and what it counts as done is on the disk before it;
what is ahead of it (records, best/) is what the continued run writes again.
A report says what made its numbers: the very weights, versions, commit. So `require_gate` can ask
before a training run whether a gate (`python -m gate`) said GO for them.

    config.yaml  metrics.jsonl  state.safetensors  adapters.safetensors or model.safetensors
    best/  report.json  emergence.html  emergence.png  curves.png
"""
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from safetensors import safe_open

from config import ON_POLICY, BadInput, Config, load_config, resolved
from engine import blas, memory, workers
from files.disk import (
    OBJECT,
    REQUIRED,
    TEXT,
    append_text,
    check_target,
    is_file,
    json_lines,
    list_of,
    one_of,
    parse_json,
    read_fields,
    read_json,
    read_json_lines,
    whole,
    write_text,
)
from files.keys import write_keys
from files.model_folder import (
    check_tensors,
    find_folder,
    load_run_config,
    read_safetensors,
    root_model,
    save_safetensors,
    weight_files,
    write_files,
)

# in the order in which overwrite=true removes them, a kill in between leaving nothing to continue;
# config.yaml is replaced, last
RUN_FILES = ("state.safetensors", "report.json", "metrics.jsonl", "best", "adapters.safetensors",
             "adapter_config.json", "config.json", "model.safetensors", "emergence.html",
             "emergence.png", "curves.png", "failed_batch.json", "config.yaml")
LOCK = ".lock"
# keys that change where and how a run is carried out, and none of its numbers
NOT_THE_RUN = ("run_dir", "memory_limit_gib")
HASHED_TEXTS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                "chat_template.jinja")


def training_arrays(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """What training changes: trainable weights and the optimizer's state."""
    arrays = {f"trainable.{k}": v for k, v in tree_flatten(model.trainable_parameters())}
    return arrays | {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}


def restore_training(arrays: dict[str, mx.array], model: nn.Module,
                     optimizer: optim.Optimizer) -> None:
    """Put training_arrays back, in place: compiled functions keep reading the same trees.

    In those trees' own order too, since mx.compile tells arrays apart by order: a file's may be
    another, and first and second moments of one shape would be exchanged without a word.
    """
    trainable = [(name, arrays[f"trainable.{name}"])
                 for name, _ in tree_flatten(model.trainable_parameters())]
    model.load_weights(trainable, strict=False)
    optimizer.state.update(tree_map_with_path(
        lambda name, _: arrays[f"optimizer.{name}"], optimizer.state))


class Run:
    """An open run folder; of several processes only the first one's writes (`writes`)."""

    def __init__(self, folder: Path, inputs: dict[str, str], writes: bool):
        self.folder, self.inputs, self.writes = folder, inputs, writes
        self.records = []       # of metrics.jsonl

    def restore(self, expected: dict[str, mx.array]) -> tuple[int, dict[str, mx.array], dict]:
        """(steps done, arrays, about) of the last save; (0, {}, {}) if there is none.

        expected   names and shapes that the arrays must have, beside those named best.*
        raises     BadInput where they do not fit, or a run's model or data is another by now
        """
        path = self.folder / "state.safetensors"
        if not self.writes or not path.exists():
            self.trim_records(0)
            return 0, {}, {}
        try:
            arrays = read_safetensors(path)
        except BadInput as error:
            raise BadInput(f"cannot continue {self.folder}: {error}, or overwrite=true to start "
                           "over") from None
        check_tensors({k: v for k, v in arrays.items() if not k.startswith("best.")}, expected,
                      str(path))
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        if "about" not in metadata:
            raise BadInput(f"cannot continue {self.folder}, which another version wrote ({path} "
                           "says nothing of its step); give another run_dir, or overwrite=true to "
                           "start over")
        about = parse_json(metadata["about"], finite=False)
        read_fields(about, {"step": (whole(1, 2 ** 31), REQUIRED), "inputs": (OBJECT, REQUIRED)},
                    str(path))
        changed = [name for name, value in self.inputs.items()
                   if about["inputs"].get(name, value) != value]
        if changed and not (self.folder / "report.json").exists():
            raise BadInput(f"cannot continue {self.folder}: its {' and '.join(changed)} changed "
                           "since it began, and it would end elsewhere; put back what it began "
                           "with, or give another run_dir, or overwrite=true to start over")
        self.trim_records(about["step"])
        return about["step"], arrays, about

    def trim_records(self, done: int) -> None:
        """Read metrics.jsonl; later lines and torn ones go: the run writes them again."""
        if not self.writes:
            return
        path = self.folder / "metrics.jsonl"
        for record in read_json_lines(path):
            if done == 0 or type(record.get("step")) is not int or not 0 <= record["step"] <= done:
                break
            self.records.append(record)
        # each is durable before the state that counts it: what lacks was taken away afterwards
        lost = set(range(1, done + 1)) - {record["step"] for record in self.records}
        if lost:
            raise BadInput(f"cannot continue {self.folder}: {path} lacks {len(lost)} of {done} "
                           f"steps, step {min(lost)} first; put the file back, or overwrite=true "
                           "to start over")
        write_text(path, json_lines(self.records))

    def report(self) -> dict:
        """What the run's end has written; {} before."""
        path = self.folder / "report.json"
        return read_json(path, "a finished run's report") if path.exists() else {}

    def say(self, line: str) -> None:
        if self.writes:
            print(line, flush=True)

    def log(self, record: dict) -> None:
        """Append a line to metrics.jsonl."""
        self.records.append(record)
        if self.writes:
            append_text(self.folder / "metrics.jsonl", json_lines([record]))

    def log_step(self, step: int, metrics: dict, seconds: float, cfg: Config) -> dict:
        """Log a step's metrics with times in seconds, speeds and peak memory in GiB; return all."""
        left_out = ("rows", "n_tokens", "lr_scale")
        record = {"step": step} | {k: v for k, v in metrics.items() if k not in left_out}
        record |= {"seconds": round(seconds, 5), "peak_gib": round(memory.peak_gib(), 3),
                   "tokens_per_s": round(metrics["n_tokens"] / seconds)}
        if cfg.method in ON_POLICY:
            record["completions_per_s"] = round(cfg.batch_size * workers.size() / seconds)
            record["update_s"] = seconds - metrics["rollout_s"] - metrics["score_s"]
        self.log(record)
        return record

    def save(self, step: int, files: dict, arrays: dict[str, mx.array], about: dict) -> None:
        """Write the weights' files, then the state as one file, each by one rename.

        files    {name: arrays, text or bytes}: what eval.py and others load
        about    plain JSON. Random state and data position are functions of it, seed and step
        """
        if not self.writes:
            return
        self.write_files(files)
        # durable before the state: a power cut must not leave a state without its records
        append_text(self.folder / "metrics.jsonl", "", sync=True)
        about = {**about, "step": step, "inputs": self.inputs}
        save_safetensors(self.folder / "state.safetensors", arrays, {"about": json.dumps(about)})

    def write_files(self, files: dict, place: str = ".") -> None:
        """Write the weights and what stands beside them, which does not change in a run."""
        if self.writes:
            folder = self.folder / place
            write_files(folder, {name: content for name, content in files.items()
                                 if isinstance(content, dict) or not (folder / name).exists()})

    def keep_if_best(self, seen: dict, files: dict) -> None:
        """Log an inspection; above every earlier validation accuracy keep the weights in best/.

        Rows without an answer have a mean reward in its place; where answers are too long for an
        accuracy, it is the validation loss, and the lowest counts. best/ is a run folder for
        eval.py and the others, and step.json says of which step. Like the records it may be ahead
        of the state: continuing comes to the same step again.
        """
        measures = {"valid_accuracy": 1, "valid_reward": 1, "valid_loss": -1}   # -1: the least
        key = next((key for key in measures if seen.get(key) is not None), "")
        earlier = [r[key] for r in self.records if r.get(key) is not None]
        self.log(seen)
        if self.writes and key and all(measures[key] * (seen[key] - value) > 0
                                       for value in earlier):
            config = (self.folder / "config.yaml").read_text(encoding="utf-8")
            self.write_files({"config.yaml": config, **files}, "best")
            write_text(self.folder / "best" / "step.json", json.dumps(
                {"step": seen["step"], key: seen[key]}) + "\n")

    def write_failed(self, step: int, micro_batches: list[dict[str, mx.array]]) -> None:
        """Write the batch whose loss or gradient is not finite to failed_batch.json."""
        if self.writes:
            tokens = [b.get("tokens", b.get("completions")).tolist() for b in micro_batches]
            write_text(self.folder / "failed_batch.json",
                       json.dumps({"step": step, "tokens": tokens}) + "\n")


@contextmanager
def open_run(cfg: Config, keys: dict, inputs: dict[str, str], writes: bool) -> Iterator[Run]:
    """Make or re-open the run folder; within, no other process can.

    keys     resolved(cfg), which config.yaml stores
    inputs   hashes of what the run reads and does not store
    writes   False in all but the first of several processes, which leave the folder alone
    raises   BadInput rather than overwrite something else, or train beside another process
    """
    folder = Path(cfg.run_dir)
    if not writes:
        yield Run(folder, inputs, writes)
        return
    config = folder / "config.yaml"
    check_is_run(folder)    # before a file is made in it
    with lock_run(folder) as lock:
        if config.exists() and not cfg.overwrite:
            check_same_run(keys, config)
        lock.seek(0)
        if not re.fullmatch(r"(\d+( on .*)?\n?)?", lock.read()):
            raise BadInput(f"{folder / LOCK} is no lock of a run; give another run_dir")
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {os.uname().nodename}\n")
            lock.flush()
            remove_leftovers(folder)
            if cfg.overwrite:
                remove_run(folder)
        except OSError as error:
            raise unwritable(folder, error) from None
        if cfg.overwrite or not config.exists():
            write_text(config, write_keys(keys))
        yield Run(folder, inputs, writes)


@contextmanager
def open_for_all(cfg: Config, inputs: dict[str, str],
                 expected: dict[str, mx.array]) -> Iterator[tuple]:
    """open_run in the first process, and its last save in all: (run, steps done, arrays, state).

    raises   BadInput, also where the processes were given different things
    """
    keys = resolved(cfg)
    workers.differences({k: v for k, v in keys.items() if k not in NOT_THE_RUN}
                        | {f"the {name} itself": value for name, value in inputs.items()})
    with ExitStack() as held:       # the run folder's lock
        with workers.told_to_all():
            run = held.enter_context(open_run(cfg, keys, inputs, workers.rank() == 0))
            saved = run.restore(expected)
        yield run, *workers.from_first(saved)


def remove_run(folder: Path) -> None:
    for name in RUN_FILES:
        if name != "config.yaml" and (folder / name).exists():
            # aside first, or best/ would be seen half removed
            os.replace(folder / name, folder / f".{name}.tmp")
            remove_leftovers(folder)


def check_free(run_dir: str) -> None:
    """BadInput where another process trains in the folder, or it is no run; before loading."""
    check_is_run(Path(run_dir))
    if os.path.lexists(Path(run_dir) / LOCK):
        lock_run(Path(run_dir), fcntl.LOCK_SH).close()


def check_is_run(folder: Path) -> None:
    """Raises BadInput where run_dir is something other than a run: it would be written into.

    A link in it, or a pipe in a file's place, is somebody else's.
    """
    if folder.is_symlink():
        check_target(folder, is_folder=True)
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = {folder.name}
    except OSError as error:
        raise unwritable(folder, error) from None
    # a run that was killed as it began holds no more than these two
    if "config.yaml" not in names and names - {LOCK, ".config.yaml.tmp"}:
        raise BadInput(f"run_dir = {folder} exists and is not a run folder "
                       "(it has no config.yaml); give another run_dir")
    for name in (*RUN_FILES, LOCK):
        check_target(folder / name, is_folder=name == "best")


def check_same_run(keys: dict, config: Path) -> None:
    """Raises BadInput where the folder's config.yaml says something else than keys."""
    try:
        stored = resolved(load_config(config))
    except BadInput as error:   # the first mistake says enough
        raise BadInput(f"cannot continue {config.parent}, which another version wrote "
                       f"({str(error).partition(';')[0]}); give another run_dir, or "
                       "overwrite=true to start over") from None
    differ = [f"{k} was {stored.get(k)!r}, is {v!r}" for k, v in keys.items()
              if k not in NOT_THE_RUN and stored.get(k) != v]
    differ += [f"{k} was {v!r}, is not used" for k, v in stored.items() if k not in keys]
    if differ:
        raise BadInput(f"{config.parent} holds a run with another config ({'; '.join(differ)}); "
                       "give another run_dir, or overwrite=true to start over")


def unwritable(folder: Path, error: OSError) -> BadInput:
    return BadInput(f"run_dir = {folder} cannot be written ({error.strerror}); "
                    "give another run_dir, or mend that")


def lock_run(folder: Path, kind: int = fcntl.LOCK_EX) -> TextIO:
    """Open and lock the folder's .lock, which holds the pid; closing the file unlocks it.

    The kernel does so too when the process ends, by kill -9 as well. The file is never deleted:
    two processes could then each hold one of that name.
    kind     LOCK_SH only asks: several may at once
    raises   BadInput where another process holds it
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_target(folder / LOCK)
        # no link is followed, no pipe is waited for
        lock = open(os.open(folder / LOCK, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
                            | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), "a+",
                    errors="replace")
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        lock.seek(0)
        message = (f"another process trains in {folder} (pid {lock.read().strip() or 'unknown'}); "
                   "wait until it ends, kill it, or give another run_dir")
    except OSError as error:    # some network file systems
        message = (f"{folder} cannot be locked against a second process ({error.strerror}); "
                   "give a run_dir on another disk")
    lock.close()
    raise BadInput(message)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of saves that a kill cut off."""
    for place in (folder, folder / "best"):
        for path in [*place.glob(".*.tmp"), *place.glob(".*.tmp.safetensors")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


# --------------------------------------------------------------------------------------------------
# what a number was made from


def hash_frozen(model: nn.Module) -> str:
    """Tell apart models by what training leaves alone; the trained part is in the state."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    sums = {}
    for name, array in tree_flatten(model.parameters()):
        if name not in trained:
            # whole numbers: their sum is the same in any order, on any device. As few as can be,
            # since MLX widens short ones before it adds
            kind = mx.uint32 if array.nbytes % 4 == 0 else mx.uint8
            sums[name] = array.reshape(-1).view(kind).sum().item()
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]


def hash_rows(rows: list) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_model(name: str) -> dict[str, str]:
    """SHA-256 of a model's weights and tokenizer: {weights, tokenizer}; of a run, its adapter too.

    Of several files, the hash of their names and hashes.
    """
    weights, place = [], str(name)
    while root_model(place) != place:   # a run: its adapter, on whatever it was trained on
        weights.append(Path(place) / "adapters.safetensors")
        place = str(load_run_config(place).model)
    folder = find_folder(place)
    weights += weight_files(folder)

    def digest(paths):
        return hashlib.sha256(repr([(p.name, hash_file(p)) for p in paths]).encode()).hexdigest()

    texts = [folder / file for file in HASHED_TEXTS if (folder / file).exists()]
    return {"weights": digest(weights), "tokenizer": digest(texts)}


def provenance() -> dict:
    """What produced a number: package versions, device, commit."""
    root = str(Path(__file__).parent.parent)

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"mlx": version("mlx"), "numpy": np.__version__, "device": str(mx.default_device()),
            "blas": blas.LOADED or "bundled", "commit": commit.stdout.strip() or "unknown",
            # null where git is not there to say
            "commit_changed": bool(status.stdout.strip()) if status.returncode == 0 else None}


PLAN = "plan.json"      # of a gate's folder: what was fixed before the first reply
UNSIGNED = "unsigned:"  # before require_gate's path: without a person's labels
GATE = {"verdict": (one_of("GO", "GO, not signed off", "NO-GO", "AMBIGUOUS"), "nothing"),
        "reasons": (list_of(TEXT), []), "models": (OBJECT, {}), "plan": (OBJECT, {}),
        "files": (OBJECT, {}), "sha256": (TEXT, "")}


def hash_json(value: dict) -> str:
    """SHA-256 of a JSON object, whatever the order of its names and its white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def require_gate(path: str, model: str) -> None:
    """Raises BadInput unless a gate says GO for these very weights, and its files are as it left
    them: before a training run."""
    run = "run `python -m gate CONFIG` first, and give its FOLDER/gate.json"
    unsigned, path = path.startswith(UNSIGNED), Path(path.removeprefix(UNSIGNED))
    raw = read_json(path, f"a passed gate, since require_gate asks for one: {run}")
    report = read_fields(raw, GATE, str(path))
    if report["verdict"] == "GO, not signed off" and not unsigned:
        raise BadInput(f"require_gate: {path} says GO, not signed off: nobody has confirmed its "
                       "scorers. Label spotcheck.jsonl beside it, run the gate again with "
                       f"labels=FILE, or write require_gate: {UNSIGNED}{path}")
    if not report["verdict"].startswith("GO"):
        why = "; ".join(report["reasons"][:3]) or "it compared nothing"
        raise BadInput(f"require_gate: {path} says {report['verdict']} ({why}); "
                       "training would teach what is there already, or cannot be measured: choose "
                       "another task or benchmark, or drop require_gate")
    stored = read_fields(report["models"], {"base": (OBJECT, {})}, f"{path}: models")["base"]
    if stored.get("weights") != hash_model(model)["weights"]:
        raise BadInput(f"require_gate: {path} is about other weights ({stored.get('name')}) than "
                       f"model = {model}; {run}")
    if report["sha256"] != hash_json({k: v for k, v in raw.items() if k != "sha256"}):
        raise BadInput(f"require_gate: {path} is not as a gate wrote it; {run}")
    plan = read_json(path.parent / PLAN, f"the plan of {path}: {run}")
    names = {k: v for k, v in report["plan"].items() if k != "sha256"}
    if not names or plan != names or hash_json(plan) != report["plan"].get("sha256"):
        raise BadInput(f"require_gate: {path.parent / PLAN} is not the plan of {path.name}; {run}")
    few = read_fields(plan, {"n": (whole(0, 10 ** 9), 0), "n_needed": (whole(0, 10 ** 9), 1)},
                      str(path.parent / PLAN))
    if few["n"] < few["n_needed"]:
        raise BadInput(f"require_gate: {path} asked {few['n']} conversations, and a gap as large as"
                       f" wanted needs {few['n_needed']}; {run} with a larger limit")
    changed = [name for name, digest in report["files"].items() if not is_file(path.parent / name)
               or hash_file(path.parent / name) != digest]
    if changed or not report["files"]:
        raise BadInput(f"require_gate: beside {path} {', '.join(changed) or 'all replies'} "
                       f"{'is' if len(changed) == 1 else 'are'} gone or changed; {run}")

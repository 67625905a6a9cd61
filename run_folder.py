"""A run's folder: one process at a time in it, and everything that continuing needs.

A kill may come at any moment, also inside a save. So every file is written beside its place and
renamed; the state, one file, is written last, and what it counts as done is on the disk before it;
what is ahead of it (records, best/) is what the continued run writes again.
"""
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import safe_open

from config import (
    ON_POLICY,
    BadInput,
    Config,
    append_text,
    dump,
    json_lines,
    load_config,
    read_json_lines,
    resolved,
    write_text,
)
from data import Batches
from grpo import CollapseGuard, Rollouts
from hub import read_safetensors
from lora import root_model, save_adapters
from model import Llama, check_tensors, save_model, save_safetensors

# in the order in which overwrite=true removes them, a kill in between leaving nothing to continue;
# config.yaml is replaced, last
RUN_FILES = ("state.safetensors", "report.json", "metrics.jsonl", "best", "adapters.safetensors",
             "adapter_config.json", "config.json", "model.safetensors", "emergence.png",
             "curves.png", "failed_batch.json", "config.yaml")
LOCK = ".lock"
# keys that change where and how a run is carried out, and none of its numbers
NOT_THE_RUN = ("run_dir", "memory_limit_gib", "cache_limit_gib", "worker_timeout_s")


@contextmanager
def open_run(cfg: Config) -> Iterator[Path]:
    """Make or re-open the run folder; within, no other process can.

    raises   BadInput rather than overwrite something else, or train beside another process
    """
    folder = Path(cfg.run_dir)
    config = folder / "config.yaml"
    check_is_run(folder)    # before a file is made in it
    with lock_run(folder) as lock:
        if config.exists() and not cfg.overwrite:
            check_same_run(cfg, config)
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {os.uname().nodename}\n")
            lock.flush()
            remove_leftovers(folder)
            if cfg.overwrite:
                for name in RUN_FILES:
                    if name != config.name and (folder / name).exists():
                        # aside first, or best/ would be seen half removed
                        os.replace(folder / name, folder / f".{name}.tmp")
                        remove_leftovers(folder)
        except OSError as error:
            raise unwritable(folder, error) from None
        if cfg.overwrite or not config.exists():
            write_text(config, dump(cfg))
        yield folder


def check_is_run(folder: Path) -> None:
    """Raises BadInput where run_dir is something other than a run: it would be written into."""
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


def check_same_run(cfg: Config, config: Path) -> None:
    """Raises BadInput where the folder's config.yaml says something else than cfg."""
    stored = resolved(load_config(config))
    differ = [f"{k} was {stored.get(k)!r}, is {v!r}" for k, v in resolved(cfg).items()
              if k not in NOT_THE_RUN and stored.get(k) != v]
    differ += [f"{k} was {v!r}, is not used" for k, v in stored.items() if k not in resolved(cfg)]
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
        lock = open(folder / LOCK, "a+")
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


def state_arrays(model: Llama, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """What training changes: trainable weights and the optimizer's state."""
    arrays = {f"trainable.{k}": v for k, v in tree_flatten(model.trainable_parameters())}
    return arrays | {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}


def restore_arrays(arrays: dict[str, mx.array], model: Llama, optimizer: optim.Optimizer) -> None:
    """Put state_arrays back in place. A compiled step still holds the old ones: compile anew."""
    pick = lambda prefix: [(k.removeprefix(prefix), v) for k, v in arrays.items()
                           if k.startswith(prefix)]
    model.load_weights(pick("trainable."), strict=False)
    optimizer.state = tree_unflatten(pick("optimizer."))


def hash_inputs(model: Llama, source: Batches | Rollouts, valid: list) -> dict[str, str]:
    """Tell apart what a run reads and does not store: frozen weights, and its rows as tokens.

    A Hub name or a data folder may stand for something else when the run is continued.
    """
    trained = dict(tree_flatten(model.trainable_parameters()))
    sums = {}
    for name, array in tree_flatten(model.parameters()):
        if name not in trained:
            # whole numbers: their sum is the same in any order, on any device. As few as can be,
            # since MLX widens short ones before it adds
            kind = mx.uint32 if array.nbytes % 4 == 0 else mx.uint8
            sums[name] = array.reshape(-1).view(kind).sum().item()
    rows = source.problems if isinstance(source, Rollouts) else source.rows
    data = hashlib.sha256()
    for row in [*rows, *valid]:
        data.update(repr(row).encode())
    return {"model": hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16],
            "data": data.hexdigest()[:16]}


def save_state(folder: Path, model: Llama, optimizer: optim.Optimizer, cfg: Config, source,
               inputs: dict[str, str], metrics: "Metrics", step: int) -> None:
    """Write the weights, then all that continuing needs as one file, each by one rename.

    kill -9 leaves no mixture, and what the state counts as done is on the disk before it.
    """
    save_weights(folder, model, cfg)
    metrics.sync()
    arrays = state_arrays(model, optimizer)
    # random state and data position are functions of these two (data.Batches.at)
    about = {"step": str(step), "seed": str(cfg.seed), **inputs}
    if cfg.method in ON_POLICY:
        arrays |= {f"best.{k}": v for k, v in source.best.items()}
        about |= {"position": str(source.position), "guard": json.dumps(asdict(source.guard))}
    save_safetensors(folder / "state.safetensors", arrays, about)


def load_state(folder: Path, model: Llama, optimizer: optim.Optimizer, source,
               inputs: dict[str, str]) -> int:
    """Restore weights, optimizer and batch source in place; returns the steps done, 0 if none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    try:
        arrays = read_safetensors(path)
    except BadInput as error:
        raise BadInput(
            f"cannot continue {folder}: {error}, or overwrite=true to start over") from None
    best = {k.removeprefix("best."): v for k, v in arrays.items() if k.startswith("best.")}
    arrays = {k: v for k, v in arrays.items() if not k.startswith("best.")}
    check_tensors(arrays, state_arrays(model, optimizer), str(path))
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    changed = [name for name, value in inputs.items() if about.get(name, value) != value]
    if changed and not (folder / "report.json").exists():
        raise BadInput(f"cannot continue {folder}: its {' and '.join(changed)} changed since it "
                       "began, and it would end elsewhere; put back what it began with, or give "
                       "another run_dir, or overwrite=true to start over")
    restore_arrays(arrays, model, optimizer)
    if "guard" in about:
        source.best, source.position = best, int(about["position"])
        source.guard = CollapseGuard(**json.loads(about["guard"]))
    return int(about["step"])


def save_weights(folder: Path, model: Llama, cfg: Config) -> None:
    """Write what eval.py, lens.py and others load: the adapter, or the whole model.

    The weights are one file and one rename; what stands beside them does not change in a run.
    """
    if not cfg.full:
        save_adapters(model, cfg, folder)
    elif (folder / "config.json").exists():     # save_model's last
        save_safetensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
    else:
        save_model(model, folder, root_model(cfg.model))


def log_inspection(folder: Path, metrics: "Metrics", seen: dict, model: Llama,
                   cfg: Config) -> None:
    """Append an inspection to metrics.jsonl; above every earlier accuracy, keep the weights: best/.

    best/ is a run folder for eval.py and the others, and step.json says of which step. Like the
    records it may be ahead of the state: continuing comes to the same step again.
    """
    earlier = [r["valid_accuracy"] for r in metrics.records if r.get("valid_accuracy") is not None]
    metrics.log(seen)
    accuracy, best = seen.get("valid_accuracy"), folder / "best"
    if accuracy is not None and all(accuracy > value for value in earlier):
        write_text(best / "config.yaml", (folder / "config.yaml").read_text(encoding="utf-8"))
        save_weights(best, model, cfg)
        write_text(best / "step.json", json.dumps(
            {"step": seen["step"], "valid_accuracy": accuracy}) + "\n")


class Metrics:
    """metrics.jsonl, appended line by line; on continuing, later and torn lines are dropped."""

    def __init__(self, path: Path, done: int):
        self.path, self.records = path, []
        for record in read_json_lines(path):
            if record["step"] > done or done == 0:
                break
            self.records.append(record)
        write_text(path, json_lines(self.records))

    def log(self, record: dict) -> None:
        self.records.append(record)
        append_text(self.path, json_lines([record]))

    def sync(self) -> None:
        """Make the lines durable: a power cut must not leave a state without its records."""
        append_text(self.path, "", sync=True)

"""Data-parallel training: every process holds the model and takes its share of each step's rows.

    .venv/bin/mlx.launch -n 2 -- .venv/bin/python train.py configs/sft.yaml batch_size=16
    .venv/bin/mlx.launch --hosts mac1.local,mac2.local -- /path/to/nanolens/.venv/bin/python ...

N processes of batch_size rows equal one of N times as many, not nearly but by construction: all
plan the same global step, each computes its own micro-batches of it with the whole step's
denominators, and gradients and metrics are *added up*, once a step. (A mean of means, as in
mlx.nn.average_gradients alone, weighs rows by how they happen to be spread.) Every process then
takes the same optimizer step. GRPO's processes sample their own prompts, then exchange completions
and rewards, so that advantages, guard and decisions are again those of the whole.

The first process alone reads and writes the run folder, looks inside, and speaks. MLX's engine
carries it: ring (TCP, everywhere), jaccl (Thunderbolt), nccl (CUDA).
"""
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from config import BadInput, Stopped

CONNECT_S = 60      # MLX's ring itself gives up connecting after half of it
group = None        # made by `connect`; until then, and without a launcher, there is one process
# how long another process may be silent; the first one looks inside meanwhile
timeout_s = float(os.environ.get("NANOLENS_TIMEOUT_S", 1800))


def connect() -> None:
    """Meet the other processes that the launcher has started; raises BadInput where one is not."""
    global group
    if group is not None or "MLX_RANK" not in os.environ:
        return
    rank = os.environ["MLX_RANK"]
    if rank != "0" and mx.default_device() == mx.Device(mx.cpu):
        # MLX's CPU compiler writes its cache in place: another process could load half a file
        os.environ["TMPDIR"] = str(Path(tempfile.gettempdir(), f"nanolens_process_{rank}"))
        Path(os.environ["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    message = (f"error: process {rank} of this run waited {CONNECT_S} s for the others and one "
               "never answered; check the hosts and ports given to mlx.launch")
    # MLX waits without letting Python run, so another process has to watch. It interrupts us, and
    # the C function _exit as handler turns signal 2 into exit code 2
    watch = subprocess.Popen(["sh", "-c", f"sleep {CONNECT_S}; echo {shlex.quote(message)} >&2; "
                              f"kill -INT {os.getpid()}"], start_new_session=True)
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGINT, ctypes.cast(libc._exit, ctypes.c_void_p))
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise BadInput(f"process {rank} of this run cannot reach the others ({error}); check the "
                       "hosts and ports given to mlx.launch") from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.killpg(watch.pid, signal.SIGKILL)
        watch.wait()


def rank() -> int:
    return group.rank() if group else 0


def size() -> int:
    return group.size() if group else 1


def my_range(n: int) -> tuple[int, int]:
    """Which of n things in a row are this process's: (first, last + 1); all of them when alone."""
    return rank() * n // size(), (rank() + 1) * n // size()


def mine(micro_batches: list) -> list:
    """This process's micro-batches of a step; all of them when alone."""
    return micro_batches[rank()::size()]


@contextmanager
def waiting():
    """Around a wait for the others: BadInput where one is gone, exit code 2 where one is silent."""
    def give_up():
        print(f"error: process {rank()} of this run heard nothing from another for "
              f"{timeout_s:g} s; what was saved is intact: the same command continues",
              file=sys.stderr, flush=True)
        os._exit(2)     # the main thread waits inside MLX and cannot be woken

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise BadInput(f"process {rank()} of this run lost another ({error}); what was saved is "
                       "intact: the same command continues") from None
    finally:
        timer.cancel()


def sum(grads: dict, sums: dict[str, mx.array], maxima: dict[str, mx.array]) -> tuple:
    """Gradients and metrics of all processes: added up, of maxima the largest. Alone: unchanged.

    They are evaluated before: communication interleaved with a GPU's work can dead-lock (mlx#4475).
    """
    if size() == 1:
        return grads, sums, maxima
    with waiting():
        # it sends pieces of 32 MiB; the mean times N is the sum, in float32 as of micro-batches
        grads = nn.average_gradients(tree_map(lambda g: g.astype(mx.float32), grads), group)
        grads = tree_map(lambda g: g * size(), grads)
        mx.eval(grads)
        sums = reduce(mx.distributed.all_sum, sums)
        maxima = reduce(mx.distributed.all_max, maxima)
    return grads, sums, maxima


def reduce(operation, values: dict[str, mx.array]) -> dict[str, mx.array]:
    """One message for all values, in an order that is everyone's."""
    if not values:
        return {}
    names = sorted(values)
    total = operation(mx.stack([values[name].astype(mx.float32) for name in names]), group=group)
    mx.eval(total)
    return {name: total[i] for i, name in enumerate(names)}


def all_gather(value) -> list:
    """Everyone's value, in the order of ranks. Anything JSON can hold; floats arrive exactly."""
    if size() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with waiting():
        lengths = mx.distributed.all_gather(mx.array([len(data)]), group=group).tolist()
        padded = np.zeros(max(lengths), np.uint8)
        padded[:len(data)] = data
        rows = np.array(mx.distributed.all_gather(mx.array(padded)[None], group=group))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths)]


def gather_rows(rows: list, arrays: dict[str, np.ndarray]) -> tuple[list, dict[str, np.ndarray]]:
    """Everyone's rows and (N,) arrays, in the order of ranks.

    rows   objects of one dataclass, whose fields are plain or float32 numpy arrays
    """
    if size() == 1:
        return rows, arrays
    kind, numeric = type(rows[0]), [k for k, v in vars(rows[0]).items() if hasattr(v, "tolist")]
    plain = [{k: v.tolist() if k in numeric else v for k, v in vars(row).items()} for row in rows]
    parts = all_gather([plain, {name: values.tolist() for name, values in arrays.items()}])
    everyones = [kind(**{k: np.array(v, np.float32) if k in numeric else v for k, v in row.items()})
                 for part, _ in parts for row in part]
    return everyones, {name: np.concatenate([np.array(part[name]) for _, part in parts])
                       for name in arrays}


def from_first(saved: tuple[int, dict[str, mx.array], dict]) -> tuple:
    """The first process's (steps done, arrays, plain JSON), on all: the others have no run folder.

    Where the first one has failed instead (`told_to_all`), the others end without a word.
    """
    if size() == 1:
        return saved
    shapes = {name: [list(a.shape), str(a.dtype).removeprefix("mlx.core.")]
              for name, a in saved[1].items()}
    news = all_gather([saved[0], shapes, saved[2]])[0]
    if news is None:
        raise SystemExit(2)
    received = {}
    for name, (shape, dtype) in sorted(news[1].items()):
        with waiting():
            own = saved[1][name] if rank() == 0 else mx.zeros(shape, getattr(mx, dtype))
            received[name] = mx.distributed.all_sum(own, group=group)
            mx.eval(received[name])     # one after the other, in one order everywhere
    return news[0], received, news[2]


@contextmanager
def told_to_all():
    """Around what the first process alone can fail at, before `from_first`: then all end."""
    try:
        yield
    except BadInput:
        all_gather(None)
        raise


def differences(mine: dict) -> None:
    """Raises BadInput where processes of one run were given different things."""
    mine = json.loads(json.dumps(mine))     # as it arrives: tuples are lists
    for other, theirs in enumerate(all_gather(mine)):
        if unlike := [name for name in theirs if theirs[name] != mine.get(name)]:
            raise BadInput(f"process {rank()} and process {other} of this run differ in "
                           f"{', '.join(unlike)}; give all the same config, model and data")


def any_of(interrupted: list) -> bool:
    """Whether any process was interrupted: all end together."""
    return any(all_gather(bool(interrupted)))


@contextmanager
def deferred_interrupts():
    """Yield a list that collects Ctrl-C and SIGTERM, so that the loop can end its step and save."""
    seen, previous = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, lambda n, frame: seen.append(n))
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def first_speaks():
    """A mistake that all processes see is told by the first; the launcher then ends the others."""
    try:
        yield
    except (BadInput, Stopped):
        if os.environ.get("MLX_RANK", "0") != "0":
            time.sleep(3)       # one that this process alone has is told a little later
        raise

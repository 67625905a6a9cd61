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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from config import BadInput, Config

CONNECT_S = 60      # MLX's ring itself gives up connecting after half of it
group = None        # made by `connect`; until then, and without a launcher, there is one process
timeout_s = 1800


def connect(cfg: Config) -> None:
    """Meet the other processes that the launcher has started; raises BadInput where one is not."""
    global group, timeout_s
    timeout_s = cfg.worker_timeout_s
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


def whole(cfg: Config) -> Config:
    """The step that all processes take together, as one process's config."""
    return replace(cfg, batch_size=cfg.batch_size * size(),
                   grad_accum_steps=cfg.grad_accum_steps * size())


@contextmanager
def waiting():
    """Around a wait for the others: BadInput where one is gone, exit code 2 where one is silent."""
    def give_up():
        print(f"error: process {rank()} of this run heard nothing from another for {timeout_s} s; "
              "what was saved is intact: the same command continues", file=sys.stderr, flush=True)
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


def sum_up(grads: dict, metrics: dict[str, mx.array]) -> tuple[dict, dict[str, mx.array]]:
    """Add up evaluated gradients and metrics over all processes; of metrics named _max the maximum.

    Evaluated before: communication interleaved with a GPU's work can dead-lock (mlx#4475).
    """
    if size() == 1:
        return grads, metrics
    names = sorted(metrics)
    values = mx.stack([metrics[name].astype(mx.float32) for name in names])
    with waiting():
        # it sends pieces of 32 MiB; the mean times N is the sum, in float32 as of micro-batches
        grads = nn.average_gradients(tree_map(lambda g: g.astype(mx.float32), grads), group)
        grads = tree_map(lambda g: g * size(), grads)
        mx.eval(grads)
        total = mx.distributed.all_sum(values, group=group)
        mx.eval(total)
        largest = mx.distributed.all_max(values, group=group)
        mx.eval(largest)
    return grads, {name: (largest if name.endswith("_max") else total)[i]
                   for i, name in enumerate(names)}


def share(value) -> list:
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


def from_first(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The first process's arrays, on all; names, shapes and types are everyone's own."""
    if size() == 1:
        return arrays
    received = {}
    with waiting():
        for name, array in sorted(arrays.items()):
            own = array if rank() == 0 else mx.zeros(array.shape, array.dtype)
            received[name] = mx.distributed.all_sum(own, group=group)
            mx.eval(received[name])     # one after the other, in one order everywhere
    return received

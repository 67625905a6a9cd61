"""Parts of a batch side by side: all cores of a Linux CPU, for more than the matrix products.

MLX's CPU backend runs the operations of a stream one after the other on one thread; only a matrix
product uses more cores, inside BLAS. A third of a small model's step then leaves all but one core
idle. Rows of a batch do not depend on each other, so here they are cut into as many parts as there
are cores, up to four. Each part is built on a stream of its own, and BLAS runs on one thread
meanwhile, since two products at a time would wait for each other's threads. Nothing is cut on Metal
and CUDA, nor a quantised model's batch, nor one that trains all weights (keep_batches_whole).

    def read(part):                 # a generator: it yields what has to be evaluated before it goes
        logits = model(part["tokens"])                                                  # on
        yield logits
        return np.array(logits)

    results = side_by_side(read, cut({"tokens": tokens}))
"""
import functools
from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any

import blas  # before mlx
import mlx.core as mx


@functools.cache
def streams(n: int) -> list[mx.Stream]:
    return [mx.new_stream(mx.cpu) for _ in range(n)]


def count(*lengths: int) -> int:
    """In how many parts to cut things of these lengths: blas.PARTS, or 1 if that leaves a rest."""
    parts = blas.PARTS if mx.default_device() == mx.Device(mx.cpu) else 1
    return 1 if any(n % parts for n in lengths) else parts


def cut(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch's parts, cut along the first axis of its arrays; scalars and single rows go to all.

    Arrays may differ in length, such as prompts and their completions.
    """
    long = {name: len(x) for name, x in batch.items()
            if isinstance(x, mx.array) and x.ndim and len(x) > 1}
    n = count(*long.values()) if long else 1
    rows = lambda name, i: slice(i * (long[name] // n), (i + 1) * (long[name] // n))
    return [batch | {name: batch[name][rows(name, i)] for name in long} for i in range(n)]


def side_by_side(fn: Callable[[Any], Generator], parts: list) -> list:
    """What the generator fn returns for each part; what it yields on the way is evaluated together.

    What it returns has to be evaluated: afterwards BLAS runs on all cores again.
    """
    alone = len(parts) == 1
    contexts = [nullcontext()] if alone else [mx.stream(s) for s in streams(len(parts))]
    results, going = [None] * len(parts), {i: fn(part) for i, part in enumerate(parts)}
    with nullcontext() if alone else blas.one_thread():
        while going:
            wanted = []
            for i, run in list(going.items()):
                with contexts[i]:
                    try:
                        wanted.append(next(run))
                    except StopIteration as end:
                        results[i] = end.value
                        del going[i]
            mx.eval(wanted)
    return results


def evaluate(fn: Callable[[dict[str, Any]], Any], batch: dict[str, Any]) -> list:
    """fn of each part of a batch, evaluated; for a function without stops on the way."""
    def run(part):
        yield (result := fn(part))
        return result

    return side_by_side(run, cut(batch))

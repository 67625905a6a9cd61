"""Rows of a batch side by side: all cores of a Linux CPU, for more than the matrix products.

MLX's CPU backend runs the operations of a stream one after the other on one thread; only a matrix
product uses more cores, inside BLAS. A third of a small model's step then leaves all but one core
idle. Rows of a batch do not depend on each other, so here they are cut into as many parts as there
are cores, up to four; more than that one Python could not feed. Each part is built on a stream of
its own, then all are evaluated together, with BLAS on one thread meanwhile, since two products at a
time would wait for each other's threads. Nothing is cut on Metal and CUDA.

    logits = mx.concatenate(map_rows(lambda part: model(part["tokens"]), {"tokens": tokens}))
"""
import functools
from collections.abc import Callable
from typing import Any

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from engine import blas


@functools.cache
def streams(n: int) -> list[mx.Stream]:
    found = [mx.new_stream(mx.cpu) for _ in range(n)]
    with blas.subnormals_as_zero():
        for stream in found:
            blas.start_thread(stream)
    return found


def count(limit: int | None = None) -> int:
    """How many parts may run at a time."""
    parts = blas.PARTS if mx.default_device() == mx.Device(mx.cpu) else 1
    return parts if limit is None else min(parts, limit)


def map_rows(fn: Callable[[dict[str, Any]], Any], batch: dict[str, Any],
             limit: int | None = None, rows: int | None = None) -> list:
    """[fn(part), ...] of consecutive rows of a batch, evaluated; a result is a tree of arrays.

    batch   arrays, tuples of arrays, and other values. Arrays are cut along their first axis, each
            into as many parts even where they differ in length, such as prompts and their
            completions; scalars, arrays of one row and other values go to every part
    limit   the most parts at a time; None: blas.PARTS
    rows    the most rows of a part, for arrays of one length, where more would not fit
    """
    def is_cut(x):
        return isinstance(x, mx.array) and x.ndim > 0 and len(x) > 1

    lengths = {len(x) for _, x in tree_flatten(batch) if is_cut(x)}
    at_once = count(limit) if lengths else 1
    if rows and lengths:
        pieces = max(at_once, -(-max(lengths) // rows))
    else:
        # parts of two sizes would be two traces of a compiled function
        at_once = pieces = 1 if any(n % at_once for n in lengths) else at_once

    def piece(i):
        # borders i * n / pieces: as even as can be
        return tree_map(lambda x: x[i * len(x) // pieces:(i + 1) * len(x) // pieces]
                        if is_cut(x) else x, batch)

    parts = [piece(i) for i in range(pieces)]
    results = []
    for i in range(0, pieces, at_once):
        results += evaluate_together(fn, parts[i:i + at_once])
    return results


def evaluate_together(fn: Callable[[dict[str, Any]], Any], parts: list[dict[str, Any]]) -> list:
    """fn of each part, each on a stream of its own, evaluated at once."""
    if len(parts) == 1:
        result = fn(parts[0])
        mx.eval(result)
        return [result]
    results = []
    for stream, part in zip(streams(len(parts)), parts):
        with mx.stream(stream):
            results.append(fn(part))
    with blas.one_thread():
        mx.eval(results)
    return results

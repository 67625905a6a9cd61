"""Checks exercise 3, causal attention, against loops in numpy. Reading on gives it away."""
from functools import partial

import mlx.core as mx
import numpy as np

from model import FORMULAS

OURS = {"attention": partial(FORMULAS["attention"], mask="causal")}
READ = [FORMULAS["attention"]]

rng = np.random.default_rng(3)
Q = rng.normal(size=(2, 4, 5, 8)).astype(np.float32)        # B 2, H 4, T 5, d 8
K = rng.normal(size=(2, 2, 5, 8)).astype(np.float32)        # K 2
V = rng.normal(size=(2, 2, 5, 8)).astype(np.float32)
ZERO, STEPS = np.zeros((1, 1, 3, 1), np.float32), np.array([[[[1.0], [3.0], [8.0]]]], np.float32)


def case(q, k, v):
    return lambda f: f.attention(mx.array(q), mx.array(k), mx.array(v))


def by_loops(q, k, v):
    """One batch row, head and query at a time, over the keys that it may see."""
    y = np.zeros(q.shape)
    shared, cached = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    for b, h, t in np.ndindex(q.shape[:3]):
        seen = slice(0, cached + t + 1)
        scores = k[b, h // shared, seen].astype(np.float64) @ q[b, h, t] / q.shape[3] ** 0.5
        weights = np.exp(scores - scores.max())
        y[b, h, t] = weights / weights.sum() @ v[b, h // shared, seen]
    return y


CASES = {
    "the example": case(ZERO, ZERO, STEPS),
    "one head for each query head": case(Q, np.repeat(K, 2, 1), np.repeat(V, 2, 1)),
    "4 query heads share 2 key-value heads": case(Q, K, V),
    "2 queries behind a cache of 3 keys": case(Q[:, :, 3:], K, V),
    "1 query, 5 keys": case(Q[:, :, 4:], K, V),
}
INDEPENDENT = {
    "the example": [[[[1.0], [2.0], [4.0]]]],
    "one head for each query head": by_loops(Q, np.repeat(K, 2, 1), np.repeat(V, 2, 1)),
    "4 query heads share 2 key-value heads": by_loops(Q, K, V),
    "2 queries behind a cache of 3 keys": by_loops(Q[:, :, 3:], K, V),
    "1 query, 5 keys": by_loops(Q[:, :, 4:], K, V),
}


def changed(q, k, v, mask=lambda key, query, cached: key <= query + cached, power=-0.5,
            spread=mx.repeat, axis=-1, hidden=-mx.inf, after=False):
    """Attention with one thing changed."""
    T, S, n = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = spread(k, n), spread(v, n)
    scores = q @ k.transpose(0, 1, 3, 2) * q.shape[3] ** power
    seen = mask(mx.arange(S), mx.arange(T)[:, None], S - T)
    if after:
        return (mx.softmax(scores, axis=axis) * seen) @ v
    return mx.softmax(mx.where(seen, scores, hidden), axis=axis) @ v


def wrong(**change):
    return {"attention": partial(changed, **{"spread": partial(mx.repeat, axis=1)} | change)}


def tiled(x, n):
    return mx.concatenate([x] * n, axis=1)


MISTAKES = {
    "without the causal mask: every query sees all keys, the later ones too":
        wrong(mask=lambda key, query, cached: key >= 0),
    "with the mask at the wrong corner: behind a cache the last query stands at the last key":
        wrong(mask=lambda key, query, cached: key <= query),
    "when a token does not see itself: <= and not <":
        wrong(mask=lambda key, query, cached: key < query + cached),
    "with the mask the wrong way round: mx.where(mask, scores, -inf) keeps where mask is true":
        wrong(mask=lambda key, query, cached: key > query + cached),
    "when the past is hidden in place of the future":
        wrong(mask=lambda key, query, cached: key >= query + cached),
    "without the division by sqrt(d)": wrong(power=0),
    "with a division by d in place of sqrt(d)": wrong(power=-1),
    "with the heads interleaved: 0 1 0 1 where 0 0 1 1 is meant, mx.repeat and not mx.tile":
        wrong(spread=tiled),
    "with the softmax over the queries: it goes over the keys, the last axis": wrong(axis=-2),
    "with one softmax over all axes: each query has its own, over the keys, axis=-1":
        wrong(axis=None),
    "with hidden scores set to 0 in place of -inf: exp(0) is 1, not 0": wrong(hidden=0.0),
    "with the mask behind the softmax: the weights that are left do not sum to 1":
        wrong(after=True),
}

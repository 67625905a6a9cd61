"""Checks exercise 1, RMSNorm, against numpy in float64. Reading on gives the exercise away."""
import mlx.core as mx
import numpy as np

from model import FORMULAS

OURS = {"rms_norm": FORMULAS["rms_norm"]}
READ = [FORMULAS["rms_norm"]]

rng = np.random.default_rng(1)
X = rng.normal(0.5, 1.0, (2, 3, 8)).astype(np.float32)
SMALL = rng.normal(0, 1e-3, (2, 8)).astype(np.float32)      # mean of squares near eps
GAIN = rng.uniform(0.5, 1.5, 8).astype(np.float32)


def case(x, gain, eps):
    return lambda f: f.rms_norm(mx.array(x), mx.array(gain), eps)


def by_numpy(x, gain, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * gain


CASES = {
    "x [3, 4], gain 1, eps 0": case([3.0, 4.0], [1.0, 1.0], 0.0),
    "a batch (2, 3, 8)": case(X, GAIN, 1e-5),
    "entries near 0.001, where eps counts": case(SMALL, GAIN, 1e-5),
    "a vector of zeros": case(np.zeros((1, 8), np.float32), GAIN, 1e-5),
}
INDEPENDENT = {
    "x [3, 4], gain 1, eps 0": [3 / 12.5 ** 0.5, 4 / 12.5 ** 0.5],
    "a batch (2, 3, 8)": by_numpy(X, GAIN, 1e-5),
    "entries near 0.001, where eps counts": by_numpy(SMALL, GAIN, 1e-5),
    "a vector of zeros": np.zeros((1, 8)),
}


def mean_square(x, axis=-1):
    return (x * x).mean(axis=axis, keepdims=True)


def norm(function):
    return {"rms_norm": function}


MISTAKES = {
    "with LayerNorm: the mean is subtracted first; RMSNorm leaves it in":
        norm(lambda x, gain, eps: (x - x.mean(-1, keepdims=True))
             * mx.rsqrt(x.var(-1, keepdims=True) + eps) * gain),
    "with the variance in place of the mean of squares: the mean is taken off below the root":
        norm(lambda x, gain, eps: x * mx.rsqrt(x.var(-1, keepdims=True) + eps) * gain),
    "with eps outside the root: it is added to the mean of squares, before the root":
        norm(lambda x, gain, eps: x / (mx.sqrt(mean_square(x)) + eps) * gain),
    "without eps: a vector of zeros is then divided by 0":
        norm(lambda x, gain, eps: x * mx.rsqrt(mean_square(x)) * gain),
    "with the sum of squares: divide by D before the root":
        norm(lambda x, gain, eps: x * mx.rsqrt((x * x).sum(-1, keepdims=True) + eps) * gain),
    "with the square of the mean in place of the mean of squares":
        norm(lambda x, gain, eps: x * mx.rsqrt(x.mean(-1, keepdims=True) ** 2 + eps) * gain),
    "without the gain":
        norm(lambda x, gain, eps: x * mx.rsqrt(mean_square(x) + eps)),
    "without the root: x is divided by the mean of squares itself":
        norm(lambda x, gain, eps: x / (mean_square(x) + eps) * gain),
    "with one mean over all axes: each vector of the last axis has its own":
        norm(lambda x, gain, eps: x * mx.rsqrt((x * x).mean() + eps) * gain),
    "with 1 + gain: that is Gemma's norm; a Llama multiplies by the gain itself":
        norm(lambda x, gain, eps: x * mx.rsqrt(mean_square(x) + eps) * (1 + gain)),
    "with Bessel's correction: squares are divided by D, not by D - 1":
        norm(lambda x, gain, eps:
             x * mx.rsqrt(mean_square(x) * x.shape[-1] / (x.shape[-1] - 1) + eps) * gain),
}

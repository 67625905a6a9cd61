"""Checks exercise 5, LoRA, against one dense product in numpy. Reading on gives it away."""
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lora import LoRALinear


def layer(weight, lora_a, lora_b, alpha):
    """Our LoRALinear with these weights."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    wrapped = LoRALinear(linear, lora_a.shape[1], alpha / lora_a.shape[1])
    wrapped.lora_a, wrapped.lora_b = lora_a, lora_b
    return wrapped


OURS = {
    "forward": lambda x, weight, a, b, alpha: layer(weight, a, b, alpha)(x),
    "merge": lambda weight, a, b, alpha: layer(weight, a, b, alpha).fused_weight(),
}
READ = [LoRALinear]

rng = np.random.default_rng(5)
# square, r 4: a transposed weight has the right shape too
X, W = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 8), (8, 8)))
A, B = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 4), (4, 8)))
WIDE, WIDE_B = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 8), (4, 6)))
ALPHA = 6.0


def arrays(*values):
    return [mx.array(value) for value in values]


def dense(weight, a, b):
    weight, a, b = (value.astype(np.float64) for value in (weight, a, b))
    return weight + ALPHA / a.shape[1] * (a @ b).T


def forward_after_merge(f):
    x, weight, a, b = arrays(X, W, A, B)
    return x @ f.merge(weight, a, b, ALPHA).T


CASES = {
    "the example": lambda f: f.forward(*arrays([1.0, 2.0], np.eye(2, dtype=np.float32),
                                               [[1.0], [1.0]], [[1.0, 0.0]]), 2.0),
    "forward, 8 in, 8 out, r 4, alpha 6": lambda f: f.forward(*arrays(X, W, A, B), ALPHA),
    "forward, 8 in, 6 out": lambda f: f.forward(*arrays(X, WIDE, A, WIDE_B), ALPHA),
    "B 0, as at the start: the layer alone":
        lambda f: f.forward(*arrays(X, W, A, np.zeros_like(B)), ALPHA),
    "merge, 8 in, 8 out": lambda f: f.merge(*arrays(W, A, B), ALPHA),
    "merge, 8 in, 6 out": lambda f: f.merge(*arrays(WIDE, A, WIDE_B), ALPHA),
    "the merged layer's output": forward_after_merge,
}
INDEPENDENT = {
    "the example": [7.0, 2.0],
    "forward, 8 in, 8 out, r 4, alpha 6": X @ dense(W, A, B).T,
    "forward, 8 in, 6 out": X @ dense(WIDE, A, WIDE_B).T,
    "B 0, as at the start: the layer alone": X @ W.T.astype(np.float64),
    "merge, 8 in, 8 out": dense(W, A, B),
    "merge, 8 in, 6 out": dense(WIDE, A, WIDE_B),
    "the merged layer's output": X @ dense(W, A, B).T,
}


def both(scale):
    """Forward and merge with another scale, a function of (alpha, r)."""
    return {
        "forward": lambda x, w, a, b, alpha: x @ w.T + scale(alpha, a.shape[1]) * (x @ a @ b),
        "merge": lambda w, a, b, alpha: w + scale(alpha, a.shape[1]) * (a @ b).T,
    }


MISTAKES = {
    "with alpha itself as the scale, in both: it is alpha / r": both(lambda alpha, r: alpha),
    "without any scale, in both": both(lambda alpha, r: 1),
    "with alpha / out as the scale, in both: r is lora_a.shape[1]": {
        "forward": lambda x, w, a, b, alpha: x @ w.T + alpha / b.shape[1] * (x @ a @ b),
        "merge": lambda w, a, b, alpha: w + alpha / b.shape[1] * (a @ b).T},
    "with r / alpha as the scale, in both": both(lambda alpha, r: r / alpha),
    "with alpha / sqrt(r), in both: that is rsLoRA's scale": both(lambda alpha, r: alpha / r ** .5),
    "in forward with the weight transposed: weight is (out, in), so x @ weight.T":
        dict(forward=lambda x, w, a, b, alpha: x @ w + alpha / a.shape[1] * (x @ a @ b)),
    "in forward without the frozen layer's own output":
        dict(forward=lambda x, w, a, b, alpha: alpha / a.shape[1] * (x @ a @ b)),
    "in forward when the layer's own output is scaled too":
        dict(forward=lambda x, w, a, b, alpha: alpha / a.shape[1] * (x @ w.T + x @ a @ b)),
    "in merge with A B not transposed: A B is (in, out), weight is (out, in)":
        dict(merge=lambda w, a, b, alpha: w + alpha / a.shape[1] * (a @ b)),
    "in merge when the update is not added to the weight":
        dict(merge=lambda w, a, b, alpha: alpha / a.shape[1] * (a @ b).T),
    "in merge without the scale": dict(merge=lambda w, a, b, alpha: w + (a @ b).T),
}

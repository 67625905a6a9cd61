"""Checks exercise 11, the clipped loss and its gradient, by hand. Reading on gives it away."""
from functools import partial

import mlx.core as mx
import numpy as np

import losses

OURS = {"policy_loss": lambda *args: losses.policy_loss(*args, dual_clip=0)[0]}
READ = [losses.policy_loss]

rng = np.random.default_rng(11)
OLD = -rng.exponential(1, (4, 3)).astype(np.float32)                # N 4, C 3
RATIOS = np.array([[0.5, 1.0, 1.6], [0.9, 1.1, 0.7], [1.6, 0.5, 1.0], [0.7, 1.3, 2.0]])
NEW = (OLD + np.log(RATIOS)).astype(np.float32)
ADVANTAGES = np.array([[1.0], [0.5], [-1.0], [-0.25]], np.float32)
WEIGHTS = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], np.float32) / 9


def case(logprobs, old, advantages, weights, low=0.2, high=0.28):
    return lambda f: f.policy_loss(*map(mx.array, (logprobs, old, advantages, weights)), low, high)


def one(ratio, advantage):
    """One token at this ratio."""
    return case([[np.log(ratio)]], [[0.0]], [[advantage]], [[1.0]])


def gradient(f):
    def loss(logprobs):
        return f.policy_loss(logprobs, *map(mx.array, (OLD, ADVANTAGES, WEIGHTS)), 0.2, 0.28)
    return mx.grad(loss)(mx.array(NEW))


def by_hand(low=0.2, high=0.28):
    """Loss and gradient, token by token: what is clipped has no gradient."""
    loss, grad = 0.0, np.zeros(RATIOS.shape)
    for n, c in np.ndindex(RATIOS.shape):
        ratio, A, weight = RATIOS[n, c], ADVANTAGES[n, 0], WEIGHTS[n, c]
        if A > 0 and ratio > 1 + high:
            loss -= weight * A * (1 + high)
        elif A < 0 and ratio < 1 - low:
            loss -= weight * A * (1 - low)
        else:
            loss -= weight * A * ratio
            grad[n, c] = -weight * A * ratio
    return loss, grad


CASES = {
    "ratio 1.5, A 1: clipped at 1.28": one(1.5, 1.0),
    "ratio 1.5, A -1: not clipped": one(1.5, -1.0),
    "ratio 0.5, A 1: not clipped": one(0.5, 1.0),
    "ratio 0.5, A -1: clipped at 0.8": one(0.5, -1.0),
    "4 completions of up to 3 tokens": case(NEW, OLD, ADVANTAGES, WEIGHTS),
    "its gradient": gradient,
}
INDEPENDENT = {
    "ratio 1.5, A 1: clipped at 1.28": -1.28,
    "ratio 1.5, A -1: not clipped": 1.5,
    "ratio 0.5, A 1: not clipped": -0.5,
    "ratio 0.5, A -1: clipped at 0.8": 0.8,
    "4 completions of up to 3 tokens": by_hand()[0],
    "its gradient": by_hand()[1],
}


def changed(logprobs, old, A, weights, low, high, ratio_of=lambda new, old: mx.exp(new - old),
            surrogate=lambda ratio, clipped, A: mx.minimum(ratio * A, clipped * A), sign=-1,
            bounds=lambda low, high: (1 - low, 1 + high), mean=False):
    """The clipped loss with one thing changed."""
    ratio = ratio_of(logprobs, old)
    value = surrogate(ratio, mx.clip(ratio, *bounds(low, high)), A)
    return sign * (value.mean() if mean else (weights * value).sum())


def wrong(**change):
    return {"policy_loss": partial(changed, **change)}


MISTAKES = {
    "without the clip": wrong(surrogate=lambda ratio, clipped, A: ratio * A),
    "with the clip alone, without the min: a step in the wrong direction is then never taken back":
        wrong(surrogate=lambda ratio, clipped, A: clipped * A),
    "with max in place of min": wrong(surrogate=lambda ratio, clipped, A: mx.maximum(
        ratio * A, clipped * A)),
    "with the min taken of the ratios, before the product with A: A may be negative":
        wrong(surrogate=lambda ratio, clipped, A: mx.minimum(ratio, clipped) * A),
    "with a clip on one side alone: ratios below 1 - clip_low are clipped too, where A < 0":
        wrong(bounds=lambda low, high: (0.0, 1 + high)),
    "with a clip on one side alone: ratios above 1 + clip_high are clipped too, where A > 0":
        wrong(bounds=lambda low, high: (1 - low, 1e9)),
    "with clip_low and clip_high exchanged": wrong(bounds=lambda low, high: (1 - high, 1 + low)),
    "without the minus: the objective is to grow, a loss to shrink": wrong(sign=1),
    "with the ratio upside down: old over new": wrong(ratio_of=lambda new, old: mx.exp(old - new)),
    "with log-probabilities divided: a ratio of probabilities is exp of their difference":
        wrong(ratio_of=lambda new, old: new / old),
    "with a plain mean: the weights hold mask and normalisation": wrong(mean=True),
    "with a mean of the weighted tokens: it is their sum":
        {"policy_loss": lambda new, *rest: changed(new, *rest) / new.size},
    "with clip_low and clip_high as the bounds themselves: they are 1 - clip_low and 1 + clip_high":
        wrong(bounds=lambda low, high: (low, high)),
    "without a gradient through the ratio: logprobs is what is trained":
        wrong(ratio_of=lambda new, old: mx.stop_gradient(mx.exp(new - old))),
}

"""Checks exercise 7, the masked mean, cut and whole, against numpy. Reading on gives it away."""
import mlx.core as mx
import numpy as np

from losses import masked_cross_entropy

OURS = {"masked_cross_entropy": masked_cross_entropy}
READ = [masked_cross_entropy]

rng = np.random.default_rng(7)
LOGPROBS = -rng.exponential(2, (6, 5)).astype(np.float32)   # 6 rows of at most 5 targets
MASK = (np.arange(5) < np.array([[5], [1], [2], [5], [1], [0]])).astype(np.float32)
MEAN = -(LOGPROBS.astype(np.float64) * MASK).sum() / 14     # 14 targets in all


def parts(*cuts):
    """The step's loss from micro-batches cut at these rows."""
    def case(f):
        losses = [f.masked_cross_entropy(mx.array(LOGPROBS[i:j]), mx.array(MASK[i:j]),
                                         mx.array(14.0))
                  for i, j in zip((0, *cuts), (*cuts, 6))]
        return sum(losses[1:], losses[0])
    return case


CASES = {
    "the example": lambda f: f.masked_cross_entropy(
        mx.array([-1.0, -3.0, -2.0]), mx.array([1.0, 1.0, 0.0]), mx.array(2.0)),
    "6 rows, 14 targets": parts(),
    "the same in two micro-batches": parts(2),
    "the same in three, the last without a target": parts(1, 5),
}
INDEPENDENT = {
    "the example": 2.0,
    "6 rows, 14 targets": MEAN,
    "the same in two micro-batches": MEAN,
    "the same in three, the last without a target": MEAN,
}


def wrong(function):
    return {"masked_cross_entropy": function}


MISTAKES = {
    "with each micro-batch's own count: their means do not add up to the step's, and one without "
    "a target gives 0 / 0": wrong(lambda p, mask, n: -(p * mask).sum() / mask.sum()),
    "with each micro-batch's own count, at least 1: their means do not add up to the step's":
        wrong(lambda p, mask, n: -(p * mask).sum() / mx.maximum(mask.sum(), 1)),
    "with a mean over all positions: those with mask 0 count in the denominator":
        wrong(lambda p, mask, n: -(p * mask).mean()),
    "without the mask": wrong(lambda p, mask, n: -p.sum() / n),
    "with the sum: it is not divided by the denominator":
        wrong(lambda p, mask, n: -(p * mask).sum()),
    "without the minus: a loss is -log p": wrong(lambda p, mask, n: (p * mask).sum() / n),
    "with a number of rows as denominator: it counts targets":
        wrong(lambda p, mask, n: -(p * mask).sum() / len(p)),
    "with the mask the wrong way round: 1 is what counts":
        wrong(lambda p, mask, n: -(p * (1 - mask)).sum() / n),
    "with a mean for each row first: a row of one target then counts as much as one of five":
        wrong(lambda p, mask, n: -((p * mask).sum(-1) / mx.maximum(mask.sum(-1), 1)).mean()),
}

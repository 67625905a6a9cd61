"""Exercise 7: the masked mean that micro-batches cannot break.

A loss counts the answer's tokens and not the prompt's or the padding: a mask says which. A step's
rows may not fit into memory at once, so they come in micro-batches, and their losses are added up.
The sum must be the mean over the whole step, whatever the cut. A mean of each micro-batch's own
would not do: a micro-batch with two targets would count as much as one with fifty.

So the caller counts the targets of the whole step once and hands the count in:

    loss = sum of -log p where mask is 1, over denominator

example   logprobs [-1, -3, -2], mask [1, 1, 0], denominator 2 -> 2.0. Cut in two, [-1] and
          [-3, -2] with the same denominator: 0.5 + 1.5
size      1 line.  Ours: masked_cross_entropy in losses.py
check     make exercise N=7
"""
import mlx.core as mx


def masked_cross_entropy(logprobs: mx.array, mask: mx.array, denominator: mx.array) -> mx.array:
    """logprobs and mask of one shape, mask 0 or 1, denominator a scalar -> a scalar, nats."""
    raise NotImplementedError

"""Exercise 11: the clipped policy loss.

A sampled token's advantage A says whether it shall become more or less likely. ratio is how much
more likely the trained policy makes it than the policy that sampled it did:

    ratio = exp(logprobs - old_logprobs)
    loss  = -sum of weights * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

The clip keeps one update near the policy that sampled. The min makes it one-sided: a step that goes
too far earns nothing more, while a step in the wrong direction is always taken back. Where A is
negative the min picks the larger ratio; it need not be written out. The weights hold the mask and
the normalisation, so the loss is a plain sum.

example   ratio 1.5, A 1, weight 1, clip_high 0.28 -> -1.28.  ratio 1.5, A -1 -> 1.5
useful    mx.exp, mx.clip(x, low, high), mx.minimum
size      3 or 4 lines.  Ours: policy_loss in losses.py
check     make exercise N=11
"""
import mlx.core as mx


def policy_loss(logprobs: mx.array, old_logprobs: mx.array, advantages: mx.array,
                weights: mx.array, clip_low: float, clip_high: float) -> mx.array:
    """logprobs, old_logprobs and weights (N, C), advantages (N, 1) -> scalar."""
    raise NotImplementedError

"""The objectives: arrays in, a scalar and its parts out. No model is called here.

SFT is the mean next-token cross-entropy over the answer and EOS. Dual-reward adds a second one: at
block c, at the last prompt token, the logit lens shall already say the operation's name,

    L = w * CE(lens at block c, operation word) + (1 - w) * CE(answer and EOS).

It is supervised, no reward is involved; the name is historical. The prior code differed in two ways
that made its conclusions void: it compared the logits at position t with the token *at* t, not t+1
(`answer_shift: false`), and it trained the class at the last answer token but read it at the last
prompt token (`class_position: answer`).
"""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from fastexp import logsumexp


def token_logprobs(logits: mx.array, tokens: mx.array) -> mx.array:
    """Log-probability of one token per position, in nats.

    logits   (..., V), any float type;  tokens  (...) int32
    returns  (...) float32, by logsumexp: log(softmax + eps) would floor at log(eps) and lose the
             gradient there
    """
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - logsumexp(logits)


def gather_positions(resid: mx.array, positions: mx.array) -> mx.array:
    """Take rows of the residual stream: resid (B, T, D), positions (B, A) int32 -> (B, A, D).

    Done before the unembedding, so that logits exist for A positions and never for all T.
    """
    return mx.take_along_axis(resid, positions[..., None], axis=1)


def masked_cross_entropy(logits: mx.array, targets: mx.array, mask: mx.array,
                         denominator: mx.array) -> mx.array:
    """Sum of -log p(target) where mask is 1, over a denominator that the caller fixes, in nats.

    logits   (..., V);  targets, mask  (...)
    The denominator is the target count of the whole step, not of this micro-batch, so that
    micro-batches of unequal counts add up to exactly the mean over the step. (A mean of means would
    weigh short micro-batches too much.)
    example  log-probs [-1, -3, -2], mask [1, 1, 0], denominator 2 -> 2.0
    """
    return -(token_logprobs(logits, targets) * mask).sum() / denominator


def dual_reward_loss(class_loss: mx.array, answer_loss: mx.array, weight: mx.array) -> mx.array:
    """w * class_loss + (1 - w) * answer_loss; at w = 0 exactly SFT's value and gradient."""
    return weight * class_loss + (1 - weight) * answer_loss

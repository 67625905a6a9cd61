"""The objectives: arrays in, a scalar and its parts out. No model is called here.

SFT is the mean next-token cross-entropy over the answer and EOS. Dual-reward adds a second one: at
block c, at the last prompt token, the logit lens shall already say the operation's name,

    L = w * CE(lens at block c, operation word) + (1 - w) * CE(answer and EOS).

It is supervised, no reward is involved; the name is historical. The prior code's two errors are
options, off: `answer_shift: false`, `class_position: answer` (study/prior_work.md).

GRPO's terms stand below: the clipped policy loss, estimates of the KL to the reference, entropy;
and the answer term of Markovian training.
"""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx

from fastexp import exp, log_softmax_at, logsumexp


def token_logprobs(logits: mx.array, tokens: mx.array) -> mx.array:
    """Log-probability of one token per position, in nats.

    logits   (..., V), any float type;  tokens  (...) int32
    returns  (...) float32, by logsumexp: log(softmax + eps) would floor at log(eps) and lose the
             gradient there
    """
    return log_softmax_at(logits.astype(mx.float32), tokens)


def masked_cross_entropy(logprobs: mx.array, mask: mx.array, denominator: mx.array) -> mx.array:
    """Sum of -log p(target) where mask is 1, over a denominator that the caller fixes, in nats.

    logprobs, mask  of one shape
    The denominator is the target count of the whole step, not of this micro-batch, so that
    micro-batches of unequal counts add up to exactly the mean over the step. (A mean of means would
    weigh short micro-batches too much.)
    example  log-probs [-1, -3, -2], mask [1, 1, 0], denominator 2 -> 2.0
    """
    return -(logprobs * mask).sum() / denominator


def dual_reward_loss(class_loss: mx.array, answer_loss: mx.array, weight: mx.array) -> mx.array:
    """w * class_loss + (1 - w) * answer_loss; at w = 0 exactly SFT's value and gradient."""
    return weight * class_loss + (1 - weight) * answer_loss


def policy_loss(logprobs: mx.array, old_logprobs: mx.array, advantages: mx.array,
                weights: mx.array, clip_low: float, clip_high: float,
                dual_clip: float) -> tuple[mx.array, dict[str, mx.array]]:
    """PPO's clipped objective over sampled tokens, negated: (scalar, arrays (N, C) to report).

    logprobs      (N, C) of the sampled tokens under the policy being trained
    old_logprobs  (N, C) under the policy that sampled them, constants; not under the reference
    advantages    (N, 1), constants
    weights       (N, C), zero behind the stop token. They hold the normalisation, fixed for the
                  whole update beforehand (grpo.token_weights), so micro-batches add up exactly
    dual_clip     bound c of the loss where A < 0: at most c |A| (1912.09729); 0: none
    example       ratio 1.5, A 1, clip_high .28 -> -1.28; ratio 5, A -1, dual_clip 3 -> 3
    source        PPO 1707.06347; clip_high > clip_low: DAPO 2503.14476
    """
    # beyond e^20 the gradient is clipped away in any case, and e^89 would be inf
    ratio = mx.exp(mx.clip(logprobs - old_logprobs, -20, 20))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = mx.minimum(ratio * advantages, clipped * advantages)
    bounded = mx.zeros(surrogate.shape, mx.bool_)
    if dual_clip:
        bounded = (advantages < 0) & (surrogate < dual_clip * advantages)
        surrogate = mx.where(bounded, dual_clip * advantages, surrogate)
    report = {"ratio": ratio, "clip_low": (advantages < 0) & (ratio < 1 - clip_low),
              "clip_high": (advantages > 0) & (ratio > 1 + clip_high), "dual_clip": bounded}
    return -(weights * surrogate).sum(), report


def kl_estimates(logprobs: mx.array, ref_logprobs: mx.array) -> dict[str, mx.array]:
    """Per-token estimates of KL(policy || reference) on the policy's own samples, (N, C) each.

    k1 = d is unbiased but its gradient as a loss is zero on average; k2 = d^2 / 2 has exactly the
    gradient of the KL, so it is the one in the loss; k3 = e^-d + d - 1 is unbiased, never negative,
    and the one to look at. d = log policy - log reference. Whoever sampled comes first: exchanged,
    k3 estimates chi-square minus KL. source  Schulman, "Approximating KL"
    """
    d = logprobs - ref_logprobs
    return {"kl_k1": d, "kl_k2": d * d / 2, "kl_k3": mx.exp(mx.clip(-d, -20, 20)) + d - 1}


def answer_reward_loss(rewards: mx.array, weights: mx.array) -> mx.array:
    """Markovian training's second term: -sum of weight * log p(answer | chain), both (N,).

    On raw rewards. A mean of standardised ones has gradient 0 whatever the weights are, since their
    sum is 0: the published term. example  rewards [-1, -3], weights [.5, .5] -> 2.0
    """
    return -(rewards * weights).sum()


def token_entropy(logits: mx.array) -> mx.array:
    """Entropy of softmax(logits) in nats: (..., V) -> (...)."""
    logprobs = logits - logsumexp(logits)[..., None]
    return -(exp(logprobs) * logprobs).sum(-1)

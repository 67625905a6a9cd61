"""The objectives: what training makes small.

SFT is the mean next-token cross-entropy over the answer and EOS. Dual-reward adds a second one: at
block c, at the last prompt token, the logit lens shall already say the class: the operation's word,
such as "multiply".

    L = w * CE(lens at block c, class) + (1 - w) * CE(answer and EOS)

It is supervised, no reward is involved; the name is historical. Two switches reproduce published
errors (study/prior_work.md): `answer_shift: false` compares the logits at position t with the token
*at* t, not t+1; `class_position: answer` trains the class where nobody reads it.

GRPO's and Markovian training's terms stand below; grpo.py puts them together.
"""
import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import Config
from model import Llama, gather_positions


def token_logprobs(logits: mx.array, tokens: mx.array) -> mx.array:
    """Log-probability of one token per position, in nats: log softmax(logits)[token].

    logits   (..., V), any float type;  tokens  (...) int32
    returns  (...) float32
    """
    logits = logits.astype(mx.float32)      # bfloat16 keeps one part in 128 only
    chosen = mx.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # logsumexp: log(softmax + eps) would floor at log(eps) and lose the gradient there
    return chosen - mx.logsumexp(logits, axis=-1)


# The same, on a Linux CPU with one array of the logits' size for the gradient; tested equal
FORMULAS = {"token_logprobs": token_logprobs}
from engine.ops import token_logprobs  # noqa: E402


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


def inputs_of(cfg: Config, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
    """What the model reads, (B, T-1) or all T, and where it is asked for the targets, (B, A)."""
    tokens, positions = batch["tokens"], batch["target_positions"]
    if cfg.answer_shift:
        return tokens[:, :-1], positions    # position t predicts t + 1: the last has no target
    # the published error: the logits at t are compared with the token at t: all T are read
    return tokens, positions + 1


def answer_cross_entropy(model: Llama, resid: mx.array, batch: dict[str, mx.array]) -> mx.array:
    """Mean cross-entropy of the targets in nats; resid (B, A, D): tap L where they are read."""
    logprobs = model.read_logits(token_logprobs, resid, batch["targets"])               # (B, A)
    return masked_cross_entropy(logprobs, batch["target_mask"], batch["n_targets"])


def sft_loss(cfg: Config, model: Llama, batch: dict[str, mx.array]) -> tuple[mx.array, dict, dict]:
    """A micro-batch's loss, metrics to add up, and metrics to take the largest of: none.

    batch   data.Batches' arrays; n_targets and n_rows count the whole step, so that micro-batches
            add up to the step's mean
    """
    tokens, positions = inputs_of(cfg, batch)
    # only positions that the loss reads leave the last block, and only they are unembedded
    resid = model.final_resid(tokens, positions=positions)                              # (B, A, D)
    loss = answer_cross_entropy(model, resid, batch)
    return loss, {"answer_loss": loss}, {}


def dual_loss(cfg: Config, model: Llama, batch: dict[str, mx.array]) -> tuple[mx.array, dict, dict]:
    """The same for dual-reward: the answer's loss, and the class's at block c."""
    block = cfg.class_block(model.args)
    tokens, positions = inputs_of(cfg, batch)
    # where the class is read from the last block, that block's other positions are needed too
    class_at_last = block + 1 == model.args.num_hidden_layers
    stream = model.stream(tokens, positions=None if class_at_last else positions)
    for tap, resid in enumerate(stream):                                                # (B, T, D)
        if tap == block + 1:    # tap l comes after block l - 1
            class_resid = gather_positions(resid, batch["class_positions"][:, None])    # (B, 1, D)
    resid = gather_positions(resid, positions) if class_at_last else resid              # (B, A, D)
    answer_loss = answer_cross_entropy(model, resid, batch)
    # the logit lens at block c. A head call of its own, not one for both: with class_weight 0 the
    # answer's arithmetic is then SFT's to the bit
    class_logits = model.head(class_resid)[:, 0]                                        # (B, V)
    class_logprobs = token_logprobs(class_logits, batch["class_ids"])                   # (B,)
    class_loss = masked_cross_entropy(class_logprobs, batch["row_mask"], batch["n_rows"])
    is_right = mx.argmax(class_logits, axis=-1) == batch["class_ids"]
    # the weight as an array: 1 - w is then taken in float32
    loss = dual_reward_loss(class_loss, answer_loss, mx.array(cfg.class_weight))
    return loss, {"answer_loss": answer_loss, "class_loss": class_loss,
                  "class_accuracy": (is_right * batch["row_mask"]).sum() / batch["n_rows"]}, {}


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
    # e^89 would be inf. Beyond e^20 the gradient is 0, as PPO's clip or dual_clip would make it but
    # where an advantage is negative and dual_clip is 0
    ratio = mx.exp(mx.clip(logprobs - old_logprobs, -20, 20))
    clipped = mx.clip(ratio, 1 - clip_low, 1 + clip_high)
    # the smaller of the two: an update never gains from leaving the clip range
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
    and the one to look at. d = log policy - log reference. The policy that sampled comes first:
    exchanged, k3 estimates chi-square minus KL. source  Schulman, "Approximating KL"
    """
    d = logprobs - ref_logprobs
    return {"kl_k1": d, "kl_k2": d * d / 2, "kl_k3": mx.exp(mx.clip(-d, -20, 20)) + d - 1}


def answer_reward_loss(rewards: mx.array, weights: mx.array) -> mx.array:
    """Markovian training's second term: -sum of weight * log p(answer | chain), both (N,).

    On raw rewards. A mean of standardised ones, the published term, is 0 for any model, since their
    sum is 0, and so is its gradient. example  rewards [-1, -3], weights [.5, .5] -> 2.0
    """
    return -(rewards * weights).sum()

"""Checks exercise 6, log-probabilities, against numpy in float64. Reading on gives it away."""
import mlx.core as mx
import numpy as np

from losses import FORMULAS

token_logprobs = FORMULAS["token_logprobs"]
OURS = {"next_token_logprobs": lambda logits, tokens: token_logprobs(logits[:, :-1], tokens[:, 1:])}
READ = [token_logprobs]

rng = np.random.default_rng(6)
LOGITS = rng.normal(0, 2, (2, 5, 7)).astype(np.float32)     # B 2, T 5, V 7
TOKENS = rng.integers(0, 7, (2, 5)).astype(np.int32)
LARGE = LOGITS + 1000                                       # e^1000 overflows
RARE = LOGITS.copy()
RARE[0, 1, TOKENS[0, 2]] = -200                             # e^-200 is 0 in float32
ROUNDED = np.array(mx.array(8 + LOGITS).astype(mx.bfloat16).astype(mx.float32))


def case(logits, tokens=TOKENS, dtype=mx.float32):
    return lambda f: f.next_token_logprobs(mx.array(logits, dtype), mx.array(tokens))


def gradient(f):
    """What training gets: the gradient of the sum by the logits."""
    return mx.grad(lambda logits: f.next_token_logprobs(logits, mx.array(TOKENS)).sum())(
        mx.array(RARE))


def by_numpy(logits, tokens=TOKENS):
    """A loop over positions; the largest logit is taken off before exp."""
    logits, found = logits.astype(np.float64), np.zeros((len(tokens), tokens.shape[1] - 1))
    for b, t in np.ndindex(found.shape):
        row = logits[b, t] - logits[b, t].max()
        found[b, t] = row[tokens[b, t + 1]] - np.log(np.exp(row).sum())
    return found


def gradient_by_hand():
    """1 at the token that came, less the probabilities; nothing at the last position."""
    grad = np.zeros(RARE.shape)
    for b, t in np.ndindex(2, 4):
        row = RARE[b, t].astype(np.float64)
        grad[b, t] = -np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        grad[b, t, TOKENS[b, t + 1]] += 1
    return grad


EXAMPLE = np.array([[[0.0, np.log(3)], [9.0, 9.0]]])
CASES = {
    "the example": case(EXAMPLE, np.array([[0, 1]], np.int32)),
    "2 rows of 5 tokens": case(LOGITS),
    "logits near 1000": case(LARGE),
    "a token at -200 nats": case(RARE),
    "logits in bfloat16": case(ROUNDED, dtype=mx.bfloat16),
    "the gradient, where a token is at -200 nats": gradient,
}
INDEPENDENT = {
    "the example": [[np.log(3 / 4)]],
    "2 rows of 5 tokens": by_numpy(LOGITS),
    "logits near 1000": by_numpy(LARGE),
    "a token at -200 nats": by_numpy(RARE),
    "logits in bfloat16": by_numpy(ROUNDED),
    "the gradient, where a token is at -200 nats": gradient_by_hand(),
}


def pick(x, ids):
    return mx.take_along_axis(x, ids[..., None], axis=-1)[..., 0]


def wrong(scores, shift=lambda logits, tokens: (logits[:, :-1], tokens[:, 1:])):
    """scores: float32 logits (..., V) -> what is picked from."""
    def function(logits, tokens):
        logits, tokens = shift(logits.astype(mx.float32), tokens)
        return pick(scores(logits), tokens)
    return {"next_token_logprobs": function}


def log_softmax(logits):
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def overflowing(logits):
    return logits - mx.log(mx.exp(logits).sum(-1, keepdims=True))


def not_widened(logits, tokens):
    return pick(log_softmax(logits[:, :-1]), tokens[:, 1:])


MISTAKES = {
    "without the shift: the logits at t are compared with the token at t, not with t + 1":
        wrong(log_softmax, lambda logits, tokens: (logits[:, 1:], tokens[:, 1:])),
    "without the shift, at all T positions: the logits at t score the token at t + 1":
        wrong(log_softmax, lambda logits, tokens: (logits, tokens)),
    "without the shift: the first T - 1 logits are compared with their own tokens, not the next":
        wrong(log_softmax, lambda logits, tokens: (logits[:, :-1], tokens[:, :-1])),
    "with the shift the wrong way: the logits at t + 1 are compared with the token at t":
        wrong(log_softmax, lambda logits, tokens: (logits[:, 1:], tokens[:, :-1])),
    "with log(softmax): the softmax is 0 at -200 nats, and log(0) is -inf":
        wrong(lambda logits: mx.log(mx.softmax(logits, axis=-1))),
    "with log(softmax + eps): a rare token is floored at log(eps), and its gradient is lost":
        wrong(lambda logits: mx.log(mx.softmax(logits, axis=-1) + 1e-9)),
    "with log(sum(exp(logits))) written out: e^1000 is inf; mx.logsumexp takes the maximum off":
        wrong(overflowing),
    "with probabilities: the logarithm is missing": wrong(lambda logits: mx.softmax(logits, -1)),
    "without the normaliser: logits are no log-probabilities": wrong(lambda logits: logits),
    "with the sum over positions: it goes over the vocabulary, the last axis":
        wrong(lambda logits: logits - mx.logsumexp(logits, axis=1, keepdims=True)),
    "in bits: the natural logarithm gives nats":
        wrong(lambda logits: log_softmax(logits) / np.log(2)),
    "when bfloat16 logits are not widened first": dict(next_token_logprobs=not_widened),
}

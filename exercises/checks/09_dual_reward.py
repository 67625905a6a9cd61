"""Checks exercise 9, dual-reward on the bundled model, against numpy. Reading on gives it away."""
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from config import Config
from data import make_batch
from losses import dual_loss, dual_reward_loss
from model import load
from text.rows import Row

MODEL, TOKENIZER = load(Path(__file__).parents[2] / "models" / "tiny", dtype="float32")


def ours(model, tokens, P, word, block, weight):
    """losses.py's, on a batch of this one row."""
    cfg = Config(method="dual_reward", class_weight=weight, class_layer=block)
    ids = tokens[0].tolist()
    batch = make_batch([Row(ids, P, word)], [0], len(ids), len(ids) - P, cfg)
    batch |= {"n_targets": np.float32(len(ids) - P), "n_rows": np.float32(1)}
    return dual_loss(cfg, model, {name: mx.array(value) for name, value in batch.items()})[0]


OURS = {"dual_reward": ours}
READ = [dual_reward_loss, dual_loss]

ROWS = []       # (tokens (1, T), P, word)
for prompt, answer, operation in [("7 * 8 = ", "56", "multiply"),
                                  ("56 means ", "fifty six", "add")]:
    ids, P = TOKENIZER.encode_pair(prompt, answer)
    ids = [*ids, TOKENIZER.eos_id] if ids[-1] != TOKENIZER.eos_id else ids
    ROWS.append((mx.array([ids]), P, TOKENIZER.word_ids([operation], ids[:P])[0]))


def case(row, block, weight):
    return lambda f: f.dual_reward(MODEL, *ROWS[row], block, weight)


def by_numpy(row, block, weight):
    """From the residuals on in float64, one target after the other."""
    tokens, P, word = ROWS[row]
    ids, residuals = tokens[0].tolist(), np.array(MODEL.residuals(tokens)).astype(np.float64)

    def nats(tap, position, token):
        x = residuals[tap, 0, position]
        x = x / np.sqrt((x ** 2).mean() + MODEL.args.rms_norm_eps)
        x = x * np.array(MODEL.model.norm.weight)
        logits = np.array(MODEL.model.embed_tokens.weight).astype(np.float64) @ x
        return np.log(np.exp(logits).sum()) - logits[token]

    answer = np.mean([nats(8, t - 1, ids[t]) for t in range(P, len(ids))])
    return weight * nats(block + 1, P - 1, word) + (1 - weight) * answer


TRIED = {
    "weight 0, the answer loss alone": (0, 4, 0.0),
    "weight 1, the class loss alone": (0, 4, 1.0),
    "weight 0.2 at block 4": (0, 4, 0.2),
    "another row, weight 0.7 at block 6": (1, 6, 0.7),
    "at block 7, the last": (1, 7, 0.7),
}
CASES = {name: case(*tried) for name, tried in TRIED.items()}
INDEPENDENT = {name: by_numpy(*tried) for name, tried in TRIED.items()}


def log_softmax(x):
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def changed(model, tokens, P, word, block, weight, scored=-1, start=0, stop=0, total=mx.mean,
            class_at=lambda P, T: P - 1, tap=1, head=None, swapped=False):
    """Dual-reward with one thing changed. scored: the logits at t - 1 score token t."""
    taps, T = model.residuals(tokens), tokens.shape[1]
    targets = range(max(P + start, 1), T + stop)
    output = log_softmax(model.head(taps[-1][0]))                           # (T, V)
    answer = -total(mx.stack([output[t + scored, tokens[0, t]] for t in targets]))
    at = class_at(P, T)
    x = taps[block + tap][0, at:at + 1] if isinstance(at, int) else taps[block + tap][0, at]
    lens = log_softmax((head or type(model).head)(model, x))
    weight = 1 - weight if swapped else weight
    return -weight * lens[:, word].mean() + (1 - weight) * answer


def wrong(**change):
    return {"dual_reward": partial(changed, **change)}


MISTAKES = {
    "without the shift in the answer loss: the logits at t score token t + 1 (a published error)":
        wrong(scored=0),
    "with the class read at the answer's last token: it is the prompt's last (a published error)":
        wrong(class_at=lambda P, T: T - 2),
    "with the class read at the last token of the row: it is the prompt's last, P - 1":
        wrong(class_at=lambda P, T: T - 1),
    "with the class read at the first token behind the prompt: the prompt's last is P - 1":
        wrong(class_at=lambda P, T: P),
    "with the class read before block c: block c is tap c + 1": wrong(tap=0),
    "with the weights exchanged: weight is the class loss's": wrong(swapped=True),
    "with a sum over the answer's tokens: it is their mean": wrong(total=mx.sum),
    "with the prompt's tokens in the answer loss too": wrong(start=-100),
    "without EOS in the answer loss": wrong(stop=-1),
    "without the first token of the answer: it is scored by the prompt's last position":
        wrong(start=1),
    "with the class read without the final norm: model.head has it":
        wrong(head=lambda model, x: model.unembed(x)),
    "with the class read at every prompt token: it is read at the last alone":
        wrong(class_at=lambda P, T: slice(0, P)),
}

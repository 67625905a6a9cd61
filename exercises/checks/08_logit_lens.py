"""Checks exercise 8, the logit lens, against transformers' residuals. Reading on gives it away.

tests/golden holds what transformers computed for a random Llama of 4 blocks: every tap's residual
and the logits. The lens of those is taken here in numpy. On the bundled model one published figure
is asked for: behind "which operation is 7 * 8 ?" block 4 says "multiply" with 74 %.
"""
from pathlib import Path

import mlx.core as mx
import numpy as np

from lens import read_taps
from model import Llama, load

ROOT = Path(__file__).parents[2]
GOLDEN, TINY = ROOT / "tests" / "golden" / "llama3_1", ROOT / "models" / "tiny"


def through_lens(model, tokens, tap, word):
    """lens.py's: all taps, one target at the last position."""
    B, T = tokens.shape
    reading = read_taps(model, tokens, mx.full((B, 1), T - 1), mx.full((B, 1, 1), word))
    return reading.probs[tap, :, 0, 0]


OURS = {"logit_lens": through_lens}
READ = [Llama.head, read_taps]

RANDOM, _ = load(GOLDEN, dtype="float32")
EXPECTED = mx.load(str(GOLDEN / "expected.safetensors"))
TOKENS = EXPECTED["tokens"][:, :24]
BUNDLED, TOKENIZER = load(TINY, dtype="float32")
ASKED = mx.array([TOKENIZER.encode_prompt("which operation is 7 * 8 ?")])
MULTIPLY = TOKENIZER.word_ids(["multiply"], ASKED[0].tolist())[0]


def on_random(tap, word):
    return lambda f: 100 * f.logit_lens(RANDOM, TOKENS, tap, word)


def by_numpy(tap, word):
    """The last of 24 positions, from transformers' residuals and the weights' file, in per cent."""
    x = np.array(EXPECTED["residuals"])[tap, :, 23].astype(np.float64)
    x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + RANDOM.args.rms_norm_eps)
    logits = x * np.array(RANDOM.model.norm.weight) @ np.array(RANDOM.lm_head.weight).T
    return 100 * (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[:, word]


def of_transformers(word):
    logits = np.array(EXPECTED["logits"])[:, 23].astype(np.float64)
    return 100 * (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[:, word]


CASES = {
    "the last tap is the model's output, per cent": on_random(4, 7),
    "tap 2 of a random Llama, per cent": on_random(2, 7),
    "tap 0, another word": on_random(0, 300),
    "'which operation is 7 * 8 ?': 'multiply' after block 4, rounded per cent":
        lambda f: mx.round(mx.array(100 * f.logit_lens(BUNDLED, ASKED, 5, MULTIPLY))),
}
INDEPENDENT = {
    "the last tap is the model's output, per cent": of_transformers(7),
    "tap 2 of a random Llama, per cent": by_numpy(2, 7),
    "tap 0, another word": by_numpy(0, 300),
    "'which operation is 7 * 8 ?': 'multiply' after block 4, rounded per cent": [74.0],
}


def wrong(norm=lambda model, x: model.model.norm(x), unembed=Llama.unembed,
          tap_of=lambda tap: tap, axis=-1, read=-1, soft=True):
    """The lens with one thing changed."""
    def function(model, tokens, tap, word):
        taps = list(model.stream(tokens))
        x = norm(model, taps[min(tap_of(tap), len(taps) - 1)])
        logits = unembed(model, x)
        return (mx.softmax(logits, axis=axis) if soft else logits)[:, read, word]
    return {"logit_lens": function}


MISTAKES = {
    "without the final norm: the unembedding was trained on normed vectors":
        wrong(norm=lambda model, x: x),
    "with a block's own norm: the lens takes the final one, model.model.norm":
        wrong(norm=lambda model, x: model.model.layers[-1].input_layernorm(x)),
    "with the final norm applied twice":
        wrong(norm=lambda model, x: model.model.norm(model.model.norm(x))),
    "one tap too late: tap 0 is the embedding, tap l comes after block l - 1":
        wrong(tap_of=lambda tap: tap + 1),
    "one tap too early: tap 0 is the embedding, tap l comes after block l - 1":
        wrong(tap_of=lambda tap: max(tap - 1, 0)),
    "at the last tap, whichever is asked for": wrong(tap_of=lambda tap: 10 ** 6),
    "with the embedding as unembedding: this model has one of its own":
        wrong(unembed=lambda model, x: (model.model.embed_tokens.as_linear(x))),
    "with the softmax over positions: it goes over the vocabulary, the last axis": wrong(axis=1),
    "at the first position: the next word is decided at the last": wrong(read=0),
    "at the position before the last": wrong(read=-2),
    "without the softmax: logits are no probabilities": wrong(soft=False),
}

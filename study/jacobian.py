"""The Jacobian lens: U . N(J h), where J is the mean derivative of the last tap by this one.

Nothing is trained, least of all on the words it reads, so it is a fair second opinion on a loss
that trains the logit lens's own read-out (Gurnee et al. 2026). One backward pass a word gives that
word's read-out vector; one a feature gives the whole matrix. J is a mean over texts that have
nothing to do with what is read: the model's own, those that ask for no operation.
"""
import re

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from engine.decode import pad_prompts
from files.keys import BadInput
from generate import sample
from lens import Reading, last_taps, read_resids
from model import Llama
from text.tokenizer import Tokenizer

TEXT_TOKENS = 12    # of each text that a Jacobian is fitted on
AT_ONCE = 8         # directions that are pulled back together
DRAWS = 40          # times `count` texts, before there are too few
ARITHMETIC = re.compile(        # an operator, or a word that asks for an operation
    r"[+*/]|\d *[-?] *\d|\b(?:and|over|times|plus|minus|sum|product|difference|quotient|"
    r"add|subtract|multiply|divide|multiplied|divided|take away)\b")


def own_texts(model: Llama, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[list[int]]:
    """`count` texts of TEXT_TOKENS ids that the model writes from nothing, at temperature 1.

    Texts that ask for an operation are left out; of the bundled models' own, numbers in words
    ("fifty six = 56") are left. raises  BadInput where there are too few
    """
    start = [min(tokenizer.eos_ids) if tokenizer.bos_id is None else tokenizer.bos_id]
    kept = []
    for draw in range(DRAWS):
        for done in sample(model, tokenizer, [start], TEXT_TOKENS, group=count, temperature=1.0,
                           key=mx.random.key(seed + draw), many_lines=True):
            if len(done.ids) > 3 and not ARITHMETIC.search(tokenizer.decode(done.ids)):
                kept.append([*start, *done.ids][:TEXT_TOKENS])
        if len(kept) >= count:
            return kept[:count]
    raise BadInput(f"of {DRAWS * count} texts that this model writes {len(kept)} ask for no "
                   f"operation; expected {count}, to fit a Jacobian lens on")


def last_token_stream(model: Llama, prompts: list[list[int]]) -> np.ndarray:
    """The stream at each prompt's last token: (L+1, N, D) float32."""
    return np.stack([np.array(tap[:, 0].astype(mx.float32)) for tap in last_taps(model, prompts)])


def read_stream(model: Llama, stream: np.ndarray, targets: list[list[int]], k: int = 1) -> Reading:
    """lens.read_resids of a stream that was read before: (L+1, N, D), N ids a prompt each."""
    return read_resids(model, [mx.array(tap)[:, None] for tap in stream],
                       mx.array(targets)[:, None], k)


def transport(stream: np.ndarray, jacobians: mx.array) -> np.ndarray:
    """J h at every tap, to be read in place of h: stream (L+1, N, D), jacobians (L+1, D, D)."""
    return np.stack([np.array(mx.array(h) @ J.T) for h, J in zip(stream, jacobians)])


def unembedding_rows(model: Llama, ids: mx.array) -> mx.array:
    """Rows of the unembedding, float32 (N, D), whatever type or bits it has.

    Pulled back through the unembedding itself, a linear map: quantised and tied ones need no case.
    """
    V, D = model.args.vocab_size, model.args.hidden_size
    one_hot = (mx.arange(V) == ids[:, None]).astype(mx.float32)                     # (N, V)
    zeros = mx.zeros((len(ids), D))
    return mx.vjp(lambda x: model.unembed(x).astype(mx.float32), [zeros], [one_hot])[1][0]


def word_directions(model: Llama, ids: mx.array) -> mx.array:
    """gain * U_w: what N(h), before its division by the length, is multiplied with; (N, D)."""
    return unembedding_rows(model, ids) * model.model.norm.weight.astype(mx.float32)


def jacobian(model: Llama, prompts: list[list[int]], directions: mx.array) -> mx.array:
    """Mean over positions and prompts of d<direction, last tap> / d(tap k): (L+1, N, D) float32.

    prompts     any text, as ids; not the prompts to be read
    directions  (N, D). With the identity the result is J itself; with
                `word_directions` it is each word's read-out vector r, by one backward pass a word,
                and argmax_w <r_w, h> is the Jacobian lens's choice among the words.
    A position's effect is summed over itself and all later ones, so at tap L this is `directions`.
    source      Gurnee et al. 2026, transformer-circuits.pub, adjoint form
    """
    tokens, last = pad_prompts(prompts)
    real = (mx.arange(tokens.shape[1]) <= last).astype(mx.float32)[..., None]       # (B, T, 1)
    L, D = model.args.num_hidden_layers, model.args.hidden_size

    def pull_back(direction):
        # an array of zeros added at every tap: its gradient is the tap's
        def final_resid(*added):
            edit = {k: lambda resid, extra=extra: resid + extra for k, extra in enumerate(added)}
            return model.final_resid(tokens, edit=edit).astype(mx.float32)
        zeros = [mx.zeros((*tokens.shape, D)) for _ in range(L + 1)]
        _, grads = mx.vjp(final_resid, zeros, [real * direction])
        return mx.stack([(g * real).sum((0, 1)) for g in grads]) / real.sum()       # (L+1, D)

    # several directions share one forward pass, which does not depend on them: half of the work
    pull_back, parts = mx.compile(mx.vmap(pull_back, out_axes=1)), []
    for i in range(0, len(directions), AT_ONCE):
        parts.append(pull_back(directions[i:i + AT_ONCE]))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)

"""Is what the stream says used? Edit it after a block, at the last prompt token: does the answer?

A prompt asks one operation on two numbers; its partner asks another on the same two. An edit moves
the prompt's stream towards its partner's, and the blocks above go on from there. An operation that
is used at that block turns the answer into the partner's.

    swap    the difference of the two operations' class means is added
    words   its part along the span of the operations' words, in unembedding space
    rest    the swap without that part
    short   the swap itself, as long as the rest: what the rest loses by its length alone
    inject  one word's direction is added and the other's subtracted
    random  a random direction
    patch   the partner's whole stream is put in place: the most that an edit there can do

`*_n` are the same directions with one length for all models that are compared (the base's swap), as
random is. A model whose swap is longer would otherwise have a random control that damages more.
Two outcomes: how many answers that were right *turn* into the partner's, and by how many nats the
partner's answer gains on its near misses (one more, one less), which damage alone does not move.

The edit is at one token, and no earlier token sees a later one. So the tokens before it are read
once, their keys and values kept, and only the last goes through the blocks above an edit.
"""
from dataclasses import dataclass

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from engine.decode import KVCache, left_pad
from engine.ops import logsumexp
from files.keys import BadInput
from model import Llama
from study.jacobian import word_directions
from study.prompts import Matched
from text.tokenizer import Tokenizer

KINDS = ("swap", "words", "rest", "short", "swap_n", "words_n", "rest_n", "inject_n", "random_n",
         "patch")
ROWS = 64           # edited rows at a time: their logits are (ROWS, V)
DAS_STEPS, DAS_ROWS, DAS_LR = 40, 32, 0.02


@dataclass
class Streams:
    """What a model makes of matched prompts (prompts.Matched), read once. M prompts."""
    prefix: list[KVCache]       # each block's keys and values of all tokens but the last, M rows
    stream: np.ndarray          # (L+1, M, D) at the last token, float32


@dataclass
class Swaps:
    """Which prompt is turned into which: N edits of the rows of matched prompts."""
    own: np.ndarray             # (N,) row of the prompt that is edited
    other: np.ndarray           # (N,) row of its partner
    labels: np.ndarray          # (N, 2) the two operations
    answer: np.ndarray          # (N,) token of the own answer
    foil: np.ndarray            # (N,) token of the partner's
    near: np.ndarray            # (N, 2) tokens of foil - 1, foil + 1; -1: not to be looked at

    def take(self, rows: np.ndarray | slice) -> "Swaps":
        return Swaps(*(column[rows] for column in vars(self).values()))


def number_id(tokenizer: Tokenizer, prompt: str, n: int) -> int:
    """The token of n behind a prompt; -1 where it has more than one, or n is below 0."""
    if n < 0:
        return -1
    ids, P = tokenizer.encode_pair(prompt, str(n))
    answer = [i for i in ids[P:] if i not in tokenizer.reserved_ids]
    return answer[0] if len(answer) == 1 else -1


def make_swaps(tokenizer: Tokenizer, matched: Matched, operations: tuple[str, ...],
               splits: tuple[str, ...]) -> Swaps:
    """All (prompt, partner) on the same operands among `operations`, both answers one token.

    Left out are pairs whose answers are alike, and foils with no near miss to compare with.
    raises  BadInput where none is left
    """
    problems, chosen = matched.problems, []
    for i in range(0, len(problems), matched.classes):
        rows = [j for j in range(i, i + matched.classes) if problems[j].operation in operations]
        for own in rows if matched.splits[i] in splits else []:
            for other in rows:
                p, q = problems[own], problems[other]
                if p.answer == q.answer or len(matched.prompts[own]) != len(matched.prompts[other]):
                    continue
                token = lambda n, p=p: number_id(tokenizer, p.prompt, n)
                answer, foil = token(int(p.answer)), token(int(q.answer))
                near = [-1 if n == int(p.answer) else token(n)
                        for n in (int(q.answer) - 1, int(q.answer) + 1)]
                if min(answer, foil) >= 0 and max(near) >= 0:
                    two = (matched.labels[own], matched.labels[other])
                    chosen.append((own, other, two, answer, foil, near))
    if not chosen:
        raise BadInput(f"no two of {', '.join(operations)} on the same operands have answers of "
                       "one token each, so that nothing can be swapped")
    return Swaps(*(np.array(column) for column in zip(*chosen)))


# --------------------------------------------------------------------------------------------------
# from an edited stream to the answer


def read_streams(model: Llama, prompts: list[list[int]]) -> Streams:
    """Read prompts once: all tokens but the last into caches, then the last on top of them."""
    tokens, start = left_pad(prompts)
    prefix = model.make_cache(tokens.shape[1] - 1, start)
    mx.eval(model.final_resid(tokens[:, :-1], prefix), [cache.keys for cache in prefix])
    caches = [cache.keep(cache.offset, cache.offset + 1) for cache in prefix]
    taps = [tap[:, 0].astype(mx.float32) for tap in model.stream(tokens[:, -1:], caches)]
    return Streams(prefix, np.array(mx.stack(taps)))


def go_on(model: Llama, prefix: list[KVCache], resid: mx.array, tap: int) -> mx.array:
    """The last token's stream at `tap`, through the blocks above: (N, D) -> (N, D) at tap L.

    prefix   its rows' caches; they stay as they are
    """
    resid = resid[:, None]                                                          # (N, 1, D)
    for block, cache in zip(model.model.layers[tap:], prefix[tap:]):
        resid = block(resid, cache.keep(cache.offset, cache.offset + 1))
    return resid[:, 0]


def rows_of(prefix: list[KVCache], rows: np.ndarray, tap: int) -> list[KVCache | None]:
    """These rows' caches, of the blocks above a tap alone."""
    return [None] * tap + [cache.take(mx.array(rows)) for cache in prefix[tap:]]


def outcome(model: Llama, streams: Streams, swaps: Swaps, resid: np.ndarray,
            tap: int) -> dict[str, np.ndarray]:
    """What the model answers behind an edited stream (N, D): (N,) each.

    turned, right  whether the top token is the partner's answer, the own answer
    near           log-odds of the partner's answer against the mean of its near misses, nats
    """
    parts = []
    for i in range(0, len(resid), ROWS):
        rows = slice(i, i + ROWS)
        part = swaps.take(rows)
        caches = rows_of(streams.prefix, part.own, tap)
        logits = model.head(go_on(model, caches, mx.array(resid[rows].astype(np.float32)), tap))
        near = mx.array(part.near)
        seen = (near >= 0).astype(mx.float32)                                       # (N, 2)
        at = lambda ids, logits=logits: mx.take_along_axis(logits, ids, axis=1)
        beside = (at(mx.maximum(near, 0)) * seen).sum(1) / seen.sum(1)
        odds, top = at(mx.array(part.foil)[:, None])[:, 0] - beside, mx.argmax(logits, -1)
        mx.eval(odds, top)
        parts.append((np.array(top), np.array(odds)))
    top, odds = (np.concatenate(column) for column in zip(*parts))
    return {"turned": top == swaps.foil, "right": top == swaps.answer, "near": odds}


# --------------------------------------------------------------------------------------------------
# the edits


def span(vectors: np.ndarray) -> np.ndarray:
    """Orthonormal rows of the span of C centred vectors (C, D): (C - 1, D)."""
    centred = vectors - vectors.mean(0)
    return np.linalg.svd(centred, full_matrices=False)[2][:len(vectors) - 1]


def of_length(vectors: np.ndarray, length: float | np.ndarray) -> np.ndarray:
    """Rows (N, D) scaled to one length, or each to its own (N, 1)."""
    return vectors * (length / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def swap_of(swaps: Swaps, means: np.ndarray) -> np.ndarray:
    """The difference of the two operations' means: (..., C, D) -> (..., N, D)."""
    a, b = swaps.labels.T
    return means[..., b, :] - means[..., a, :]


def make_edits(swaps: Swaps, stream: np.ndarray, means: np.ndarray, words: np.ndarray,
               length: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The edited streams (N, D) of one tap, by kind.

    stream  (M, D) of the prompts;  means  (C, D) of the operations, on training pairs
    words   (C, D) the words' directions;  length  of the `_n` kinds
    """
    swap, h = swap_of(swaps, means), stream[swaps.own]                              # (N, D)
    basis = span(words)
    along = swap @ basis.T @ basis
    added = {"swap": swap, "words": along, "rest": swap - along,
             "inject": swap_of(swaps, words), "random": rng.standard_normal(swap.shape)}
    edits = {kind: h + added[kind] for kind in ("swap", "words", "rest")}
    edits |= {f"{kind}_n": h + of_length(v, length) for kind, v in added.items()}
    rest = np.linalg.norm(added["rest"], axis=1, keepdims=True)
    return edits | {"short": h + of_length(swap, rest), "patch": stream[swaps.other]}


def swap_lengths(swaps: Swaps, means: np.ndarray) -> np.ndarray:
    """The mean length of the swap at each tap: means (L+1, C, D) -> (L+1,)."""
    return np.linalg.norm(swap_of(swaps, means), axis=-1).mean(1)


def class_means(streams: Streams, matched: Matched) -> np.ndarray:
    """The operations' mean streams over training pairs: (L+1, C, D)."""
    train = matched.splits == "train"
    return np.stack([streams.stream[:, train & (matched.labels == c)].mean(1)
                     for c in range(matched.classes)], axis=1)


def swap_taps(model: Llama, streams: Streams, swaps: Swaps, means: np.ndarray, words: list[int],
              taps: list[int], lengths: np.ndarray, seed: int = 0) -> list[dict]:
    """Every kind of edit at some taps: [{tap, kind: {turned, right, near}}].

    means    (L+1, C, D);  words  the operations' C tokens;  lengths  (L+1,) of the `_n` kinds
    turned   share of the answers right before that become the partner's; right: that stay right
    near     mean change of the partner's answer against its near misses, nats
    turned and right are None where no answer is right before
    """
    directions = np.array(word_directions(model, mx.array(words)))                  # (C, D)
    rng, found, clean = np.random.default_rng((seed, 3)), [], unedited(model, streams, swaps)
    for tap in taps:
        edits = make_edits(swaps, streams.stream[tap], means[tap], directions, lengths[tap], rng)
        found.append({"tap": tap, **{kind: effect(
            outcome(model, streams, swaps, edits[kind], tap), clean) for kind in KINDS}})
    return found


def unedited(model: Llama, streams: Streams, swaps: Swaps) -> dict[str, np.ndarray]:
    last = len(streams.stream) - 1
    return outcome(model, streams, swaps, streams.stream[last][swaps.own], last)


def effect(edited: dict[str, np.ndarray], clean: dict[str, np.ndarray]) -> dict:
    """What an edit did, by the outcomes with it and without: swap_taps' {turned, right, near}."""
    share = lambda values: float(values[clean["right"]].mean()) if clean["right"].any() else None
    return {"turned": share(edited["turned"]), "right": share(edited["right"]),
            "near": float((edited["near"] - clean["near"]).mean())}


# --------------------------------------------------------------------------------------------------
# the best subspace there is


def fit_subspace(model: Llama, streams: Streams, swaps: Swaps, means: np.ndarray, tap: int,
                 seed: int = 0) -> np.ndarray:
    """The subspace whose exchange gives the partner's answer most probability, by descent.

    h + (h_partner - h) B^T B, with B orthonormal: one direction (1, D) between two operations, a
    plane (2, D) among three. From the span of the operations' means (C, D), on these swaps. An
    upper bound for a subspace of this size in nats, if not in answers turned; found by search, it
    says nothing of what a model uses by itself.
    source   distributed alignment search, Geiger et al. 2303.02536
    """
    rng, optimizer = np.random.default_rng((seed, 4)), optim.Adam(DAS_LR)
    found = {"basis": mx.array(span(means[np.unique(swaps.labels)]).astype(np.float32))}
    stream = mx.array(streams.stream[tap])                                          # (M, D)

    def loss(found, caches, h, partner, foil):
        edited = exchange(h, partner, orthonormal(found["basis"]))
        logits = model.head(go_on(model, caches, edited, tap))
        return (logsumexp(logits) - mx.take_along_axis(logits, foil[:, None], axis=1)[:, 0]).mean()

    step = mx.value_and_grad(loss)
    for _ in range(DAS_STEPS):
        rows = rng.choice(len(swaps.own), min(DAS_ROWS, len(swaps.own)), replace=False)
        own, other = mx.array(swaps.own[rows]), mx.array(swaps.other[rows])
        _, grads = step(found, rows_of(streams.prefix, swaps.own[rows], tap), stream[own],
                        stream[other], mx.array(swaps.foil[rows]))
        found = optimizer.apply_gradients(grads, found)
        mx.eval(found, optimizer.state)
    return np.array(orthonormal(found["basis"]))


def orthonormal(rows: mx.array) -> mx.array:
    """Gram and Schmidt's, with a gradient, which mx.linalg.qr has not: (r, D) -> (r, D)."""
    basis = []
    for row in rows:
        for earlier in basis:
            row = row - (row * earlier).sum() * earlier
        basis.append(row / mx.linalg.norm(row))
    return mx.stack(basis)


def exchange(h, partner, basis):
    """h (N, D) with its part in the span of basis (r, D) in place of the partner's."""
    return h + (partner - h) @ basis.T @ basis

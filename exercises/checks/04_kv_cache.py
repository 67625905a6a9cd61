"""Checks exercise 4, the KV cache, against one pass without. Reading on gives it away."""
import mlx.core as mx
import numpy as np

from engine.decode import KVCache
from model import attention, rope

OURS = {"KVCache": KVCache}
READ = [KVCache]

rng = np.random.default_rng(4)
Q = rng.normal(size=(2, 4, 7, 8)).astype(np.float32)        # B 2, H 4, 7 tokens, d 8
K = rng.normal(size=(2, 2, 7, 8)).astype(np.float32)        # K 2
V = rng.normal(size=(2, 2, 7, 8)).astype(np.float32)
PERIODS = (100.0 ** (np.arange(4) / 4)).astype(np.float32)
PIECES = [slice(0, 4), slice(4, 6), slice(6, 7)]            # 4 tokens, then 2, then 1


def updates(f):
    """All that three updates return, keys before values."""
    cache, seen = f.KVCache(16), []
    for piece in PIECES:
        seen += cache.update(mx.array(K[:, :, piece]), mx.array(V[:, :, piece]))
    return mx.concatenate(seen, axis=2)


def offsets(f):
    cache, seen = f.KVCache(16), []
    for piece in PIECES:
        seen.append(cache.offset)
        cache.update(mx.array(K[:, :, piece]), mx.array(V[:, :, piece]))
    return np.array([*seen, cache.offset])


def decoded(f):
    """Attention over 7 tokens that come in three pieces, positions by the cache's offset."""
    cache, written, periods = f.KVCache(16), [], mx.array(PERIODS)
    for piece in PIECES:
        offset = cache.offset
        q, k = (rope(mx.array(x[:, :, piece]), offset, periods) for x in (Q, K))
        k, v = cache.update(k, mx.array(V[:, :, piece]))
        written.append(attention(q, k, v, "causal"))
    return mx.concatenate(written, axis=2)


def two_caches(f):
    """Two blocks' caches share nothing."""
    first, second = f.KVCache(16), f.KVCache(16)
    first.update(mx.array(K), mx.array(V))
    return second.update(mx.array(K[:, :, :2]), mx.array(V[:, :, :2]))[0]


def without_cache():
    """All 7 tokens at once, in numpy: turned as complex numbers, masked by loops."""
    def turned(x):
        pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.arange(7)[:, None] / PERIODS)
        return np.concatenate([pairs.real, pairs.imag], -1)

    q, k, y = turned(Q), turned(K), np.zeros(Q.shape)
    for b, h, t in np.ndindex(q.shape[:3]):
        weights = np.exp(k[b, h // 2, :t + 1] @ q[b, h, t] / 8 ** 0.5)
        y[b, h, t] = weights / weights.sum() @ V[b, h // 2, :t + 1]
    return y


CASES = {
    "offset before and after three updates": offsets,
    "keys and values that three updates return": updates,
    "two caches do not share": two_caches,
    "attention in three pieces equals one pass": decoded,
}
INDEPENDENT = {
    "offset before and after three updates": [0, 4, 6, 7],
    "keys and values that three updates return": np.concatenate(
        [x[:, :, :n] for n in (4, 6, 7) for x in (K, V)], 2),
    "two caches do not share": K[:, :, :2],
    "attention in three pieces equals one pass": without_cache(),
}


class Wrong:
    """A cache that appends, as a list of pieces; the mistakes below change a step of it."""

    def __init__(self, capacity):
        self.capacity, self.offset, self.pieces = capacity, 0, []

    def keep(self, keys, values):
        self.pieces.append((keys, values))

    def update(self, keys, values):
        self.keep(keys, values)
        self.offset = self.held()
        return self.joined(0), self.joined(1)

    def held(self):
        return sum(k.shape[2] for k, _ in self.pieces)

    def joined(self, which):
        return mx.concatenate([piece[which] for piece in self.pieces], axis=2)


class OnlyNew(Wrong):
    def update(self, keys, values):
        super().update(keys, values)
        return keys, values


class NoOffset(Wrong):
    def held(self):
        return 0


class OneAnUpdate(Wrong):
    def held(self):
        return self.offset + 1


class CountedAgain(Wrong):
    def held(self):
        return self.offset + sum(k.shape[2] for k, _ in self.pieces)


class Late(Wrong):
    """What is returned stops at the old offset."""

    def update(self, keys, values):
        before = self.offset
        return tuple(x[:, :, :before] for x in super().update(keys, values))


class Backwards(Wrong):
    def keep(self, keys, values):
        self.pieces.insert(0, (keys, values))


class Rooms(Wrong):
    def joined(self, which):
        x = super().joined(which)
        return mx.pad(x, [(0, 0), (0, 0), (0, self.capacity - x.shape[2]), (0, 0)])


class Overwritten(Wrong):
    """Each piece is written at position 0, over the one before."""

    def joined(self, which):
        x = self.pieces[0][which]
        for piece in self.pieces[1:]:
            x = mx.concatenate([piece[which], x[:, :, piece[which].shape[2]:]], axis=2)
        return mx.pad(x, [(0, 0), (0, 0), (0, self.held() - x.shape[2]), (0, 0)])


class KeysTwice(Wrong):
    def joined(self, which):
        return super().joined(0)


class ByHead(Wrong):
    def joined(self, which):
        return mx.concatenate([piece[which] for piece in self.pieces], axis=1)


def cache(kind):
    return {"KVCache": kind}


MISTAKES = {
    "when only the new keys and values are returned: attention then sees no earlier token":
        cache(OnlyNew),
    "when offset stays 0: every new token is then turned as if it were the first": cache(NoOffset),
    "when offset grows by 1 an update, whatever came: it grows by the T of the new keys":
        cache(OneAnUpdate),
    "when offset grows by all tokens held at each update: it grows by the T of the new keys":
        cache(CountedAgain),
    "when what is returned stops at the old offset: the new tokens belong to it": cache(Late),
    "with the new tokens before the old ones": cache(Backwards),
    "when all of the room is returned: the zeros behind the last token are no keys": cache(Rooms),
    "when each update writes at position 0, over what was there: write from offset on":
        cache(Overwritten),
    "with the keys returned in place of the values": cache(KeysTwice),
    "when pieces are joined along the heads: tokens are axis 2 of (B, K, T, d)": cache(ByHead),
}

"""Exercise 3: causal attention with grouped heads.

Each query looks at the keys of its own and earlier tokens and takes a weighted mean of their
values. The weights are a softmax over the keys:

    softmax(q k^T / sqrt(d)) v

There are H query heads, but only K key-value heads, and H is a multiple of K: query heads
0 .. H/K - 1 share key-value head 0, the next H/K share head 1, and so on.

There may be more keys than queries, S > T: the first S - T keys come out of a cache, and the last
query stands at the last key. So query t may look at keys 0 .. S - T + t, itself included. What it
must not see gets the score -inf before the softmax.

example   one head, d 1, all q and k 0, v [1, 3, 8]: each query takes the plain mean of what it may
          see, [1, 2, 4]
useful    mx.repeat(k, n, axis=1), k.transpose(0, 1, 3, 2), mx.where(mask, scores, -mx.inf),
          mx.softmax(scores, axis=-1), mx.arange
size      6 to 8 lines.  Ours: attention in model.py
check     make exercise N=3
"""
import mlx.core as mx


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d)."""
    raise NotImplementedError

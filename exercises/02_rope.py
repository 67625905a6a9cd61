"""Exercise 2: RoPE, rotary positions.

Attention compares a query with a key by their dot product, which knows no positions. RoPE turns
queries and keys before that, each pair of features by an angle that grows with the position. The
dot product of two turned vectors then depends on the distance of their positions alone.

A head has d features. Feature i is paired with feature i + d/2 (the paper pairs neighbours 2i and
2i + 1; the Hub's weights expect halves). At position p the pair (a, b) number i becomes

    a cos(w) - b sin(w),   a sin(w) + b cos(w)     with  w = p / periods[i]

so that periods[i] positions turn it by one radian (a full turn takes 2 pi periods[i] positions).

The T tokens stand at positions offset, offset + 1, ..., offset + T - 1.

example   d 2, periods [1], x [[1, 0], [1, 0]], offset 0: position 0 is left alone; position 1 is
          turned by one radian: [0.5403, 0.8415]
useful    mx.arange, mx.cos, mx.sin, mx.concatenate; x[..., :d // 2]
size      6 lines.  Ours: rope in model.py
check     make exercise N=2
"""
import mlx.core as mx


def rope(x: mx.array, offset: int, periods: mx.array) -> mx.array:
    """x (B, H, T, d), periods (d/2,) -> (B, H, T, d). In model.py periods are numpy's."""
    raise NotImplementedError

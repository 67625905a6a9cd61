"""Checks exercise 2, RoPE, against a product of complex numbers. Reading on gives it away."""
from functools import partial

import mlx.core as mx
import numpy as np

from model import FORMULAS

OURS = {"rope": FORMULAS["rope"]}
READ = [FORMULAS["rope"]]

rng = np.random.default_rng(2)
X = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)        # B 2, H 3, T 5, d 8
PERIODS = (100.0 ** (np.arange(4) / 4)).astype(np.float32)
EXAMPLE = np.array([[[[1.0, 0.0], [1.0, 0.0]]]], np.float32)


def by_complex_numbers(x, offset, periods):
    """(a + ib) e^(iw): the same turn, without a sine or cosine written out."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    pairs = pairs * np.exp(1j * (offset + np.arange(x.shape[2]))[:, None] / periods)
    return np.concatenate([pairs.real, pairs.imag], -1)


def scores(f):
    """Queries at 7 .. 11 against keys at 0 .. 4: what attention would see."""
    q, k = f.rope(mx.array(X), 7, mx.array(PERIODS)), f.rope(mx.array(X), 0, mx.array(PERIODS))
    return q @ k.transpose(0, 1, 3, 2)


CASES = {
    "the example": lambda f: f.rope(mx.array(EXAMPLE), 0, mx.array([1.0])),
    "5 tokens of 3 heads": lambda f: f.rope(mx.array(X), 0, mx.array(PERIODS)),
    "the same from position 7 on": lambda f: f.rope(mx.array(X), 7, mx.array(PERIODS)),
    "q k^T of queries at 7 to 11, keys at 0 to 4": scores,
}
INDEPENDENT = {
    "the example": [[[[1.0, 0.0], [0.540302, 0.841471]]]],
    "5 tokens of 3 heads": by_complex_numbers(X, 0, PERIODS),
    "the same from position 7 on": by_complex_numbers(X, 7, PERIODS),
    "q k^T of queries at 7 to 11, keys at 0 to 4":
        by_complex_numbers(X, 7, PERIODS) @ by_complex_numbers(X, 0, PERIODS).swapaxes(2, 3),
}


def turned(x, offset, periods, use_offset=True, start=0, sign=1, multiply=False, neighbours=False,
           second=True, by_head=False, reused=False, mixed=False, alone=False, unit=1, back=False):
    """RoPE with one thing changed."""
    n = x.shape[1] if by_head else x.shape[2]
    positions = start + (offset if use_offset else 0) + mx.arange(n)[:, None]
    positions = 0 * positions + offset if alone else positions
    angles = unit * sign * (positions * periods if multiply else positions / periods)
    angles = angles[:, None] if by_head else angles
    cos, sin = mx.cos(angles), mx.sin(angles)
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else (x[..., :half], x[..., half:])
    first = a * cos - b * sin
    last = (first if reused else a) * sin + b * cos if second else b
    if neighbours or mixed:
        return mx.stack([first, last], axis=-1).reshape(x.shape)
    return mx.concatenate([last, first] if back else [first, last], axis=-1)


def wrong(**change):
    return {"rope": partial(turned, **change)}


MISTAKES = {
    "with neighbours 2i and 2i + 1 as pairs: here i goes with i + d/2": wrong(neighbours=True),
    "without the offset: the first token stands at position offset, not at 0":
        wrong(use_offset=False),
    "with one angle for all tokens: token t of the T stands at offset + t": wrong(alone=True),
    "with positions counted from 1: the first is at offset": wrong(start=1),
    "when each pair is turned the other way: a cos - b sin, and a sin + b cos": wrong(sign=-1),
    "with position * period: a period is divided by": wrong(multiply=True),
    "with 2 pi: periods[i] positions turn by one radian, not a full turn": wrong(unit=2 * np.pi),
    "when the turned halves change places": wrong(back=True),
    "with only the first half of the features turned: b becomes a sin + b cos": wrong(second=False),
    "when a is overwritten before b is turned: both lines need the old a and b": wrong(reused=True),
    "with the turned halves interleaved: they are put one behind the other": wrong(mixed=True),
    "with the heads counted as positions: tokens are axis 2 of (B, H, T, d)": wrong(by_head=True),
}

"""model.py's and losses.py's formulas as fast as the machine allows, with the same signatures.

Metal and CUDA take MLX's fused kernels (`mx.fast`). MLX's Linux CPU backend puts these functions
together from many operations, and computes exp one element at a time, 16 ns each: a SwiGLU layer of
a small model then spends more time in it than in its matrix products. Written as arithmetic that
`mx.compile` fuses and the C compiler vectorises, it takes 3 ns:

    exp(x) = 2^i * exp(r),  i = round(x / ln 2),  r = x - i ln 2 in [-0.35, 0.35]

with a polynomial for exp(r) (Cephes' expf), and 2^i put together from its bits. Autodiff cannot see
through those bits, so what is built on it has its gradient written out (`mx.custom_function`).
tests/test_ops.py holds values and gradients against the plain formulas.
"""
import functools

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from engine.blas import linux_cpu

LINUX_CPU = linux_cpu()
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # in two parts: i * LN2_HIGH is exact in float32
MAGIC = 12582912.0      # 1.5 * 2^23: added to x, the sum's last bits are x rounded to an integer
COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                1.6666665459e-1, 5.0000001201e-1)
GROUP = 128     # tokens; see top_tokens
# numbers. With fewer an operation costs more than its arithmetic: MLX's own functions, of fewer
# operations, are faster then
FEW = 2 ** 12

compiled_rms_norm = mx.compile(mx.fast.rms_norm)


def rms_norm(x: mx.array, gain: mx.array, eps: float) -> mx.array:
    # mx.fast's is ten operations on that backend. Compiled it is three, but takes a root for each
    # number in place of each row
    few = LINUX_CPU and x.size <= FEW
    return compiled_rms_norm(x, gain, eps) if few else mx.fast.rms_norm(x, gain, eps)


# --------------------------------------------------------------------------------------------------
# exp


def cephes_exp(x: mx.array) -> mx.array:
    """float32 exp to 4e-7 relative; inputs beyond -87 and 88 give the values there, never inf."""
    x = mx.where(x < -87, -87.0, x)     # NaN stays NaN; faster than clip, which asks for it
    x = mx.where(x > 88, 88.0, x)
    shifted = x * 1.4426950408889634 + MAGIC
    i = shifted - MAGIC
    r = x - i * LN2_HIGH - i * LN2_LOW
    p = COEFFICIENTS[0]
    for c in COEFFICIENTS[1:]:
        p = p * r + c
    power_of_two = ((shifted.view(mx.int32) << 23) + (127 << 23)).view(mx.float32)
    return (p * r * r + r + 1) * power_of_two


def fusion_barrier(x: mx.array) -> mx.array:
    """x, behind which mx.compile begins a new kernel; free.

    It fuses at most eleven operations in a row. Where it has to cut by itself, a constant may
    become an array of stride 0, and the kernel behind it four times as slow.
    """
    return x.view(mx.int32).view(mx.float32)


compiled_exp = mx.custom_function(mx.compile(cephes_exp))
compiled_exp.vjp(lambda x, cotangent, output: cotangent * output)   # exp' = exp: reuse the output
exp = compiled_exp if LINUX_CPU else mx.exp


def blocked_reduction(reduce, x: mx.array) -> mx.array:
    """reduce(x, -1) for mx.sum or mx.max: (..., V) -> (...).

    On a Linux CPU 128 rows of V / 128 laid on each other are added by vectors; the sum along one
    row is not, and takes four times as long.
    """
    *lead, V = x.shape
    if V % 128 == 0:
        x = reduce(x.reshape(*lead, 128, V // 128), -2)
    return reduce(x, -1)


def logsumexp(x: mx.array) -> mx.array:
    """log sum exp over the last axis: (..., V) float32 -> (...)."""
    # stop_gradient: the shift cancels in value and gradient
    top = mx.stop_gradient(blocked_reduction(mx.max, x))
    return top + mx.log(blocked_reduction(mx.sum, exp(x - top[..., None])))


# --------------------------------------------------------------------------------------------------
# SwiGLU


def swiglu_by_exp(gate: mx.array, up: mx.array) -> mx.array:
    return gate / (1 + fusion_barrier(cephes_exp(-gate))) * up


def swiglu_gradients(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple:
    s = 1 / (1 + fusion_barrier(cephes_exp(-gate)))
    return cotangent * up * s * (1 + gate * (1 - s)), cotangent * gate * s


# two things are kept for the gradient, gate and up; autodiff would keep silu(gate) as well
compiled_swiglu = mx.custom_function(mx.compile(swiglu_by_exp))
compiled_swiglu_gradients = mx.compile(swiglu_gradients)
compiled_swiglu.vjp(
    lambda primals, cotangent, _: compiled_swiglu_gradients(*primals, cotangent))


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    if LINUX_CPU and gate.dtype == mx.float32 and gate.size > FEW:
        return compiled_swiglu(gate, up)
    return nn.silu(gate) * up


# --------------------------------------------------------------------------------------------------
# rotary positions and attention


# bytes, since a key of lru_cache must be hashable
@functools.lru_cache(maxsize=2)
def cos_and_sin(periods: bytes, offset: int, T: int) -> tuple[mx.array, mx.array]:
    """Of T positions' angles, (T, d/2) each; kept, so that q and k of all blocks share them.

    By float64: at position 8,000 an angle in float32 is off by up to 5e-4.
    """
    angles = np.arange(offset, offset + T)[:, None] / np.frombuffer(periods, np.float32)
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


@functools.lru_cache(maxsize=2)
def on_device(periods: bytes) -> mx.array:
    return mx.array(np.frombuffer(periods, np.float32))


@mx.compile
def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    first, second = mx.split(x, 2, axis=-1)
    rotated = [first * cos - second * sin, first * sin + second * cos]
    return mx.concatenate(rotated, axis=-1).astype(x.dtype)


def rope(x: mx.array, offset: int, periods: np.ndarray) -> mx.array:
    T, d = x.shape[-2:]
    periods = np.asarray(periods, np.float32).tobytes()
    if LINUX_CPU:
        return rotate(x, *cos_and_sin(periods, offset, T))
    # traditional=False pairs feature i with i + d/2: the layout of the Hub's weights
    return mx.fast.rope(x, d, traditional=False, base=None, scale=1.0, offset=offset,
                        freqs=on_device(periods))


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
    (B, H, T, d), S = q.shape, k.shape[2]
    scale = d ** -0.5
    if LINUX_CPU and q.dtype == mx.float32 and (T > 1 or B * H * S > FEW):
        return attention_by_exp(q, k, v, scale, mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def attention_by_exp(q: mx.array, k: mx.array, v: mx.array, scale: float,
                     mask: mx.array | str | None) -> mx.array:
    """softmax(q k^T * scale) v, twice as fast as MLX's on a Linux CPU.

    Of its (B, H, T, S) arrays only the softmax is kept for the gradient.
    """
    (B, H, T), (K, S) = q.shape[:3], k.shape[1:3]
    if isinstance(mask, str):
        mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]     # the last query sees the last key
    # the H / K queries of one key-value head make one matrix: fewer, larger products
    grouped, per_head = (B, K, H // K * T, -1), (B, H, T, -1)

    @mx.custom_function
    def attend(q, k, v):
        scores = ((q * scale).reshape(grouped) @ k.transpose(0, 1, 3, 2)).reshape(per_head)
        if mask is not None:
            scores = mx.where(mask, scores, -1e9)
        weights = exp(scores - mx.max(scores, axis=-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).reshape(grouped)
        return (weights @ v).reshape(per_head), weights

    @attend.vjp
    def gradients(primals, cotangents, outputs):
        (q, k, v), dy, weights = primals, cotangents[0].reshape(grouped), outputs[1]
        dweights = dy @ v.transpose(0, 1, 3, 2)
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
        return ((dscores @ k).reshape(q.shape),
                dscores.transpose(0, 1, 3, 2) @ q.reshape(grouped),
                weights.transpose(0, 1, 3, 2) @ dy)

    return attend(q, k, v)[0]


# --------------------------------------------------------------------------------------------------
# log-probabilities


@mx.compile
def softmax_gradient(logits, is_chosen, total, cotangent):
    return cotangent * (is_chosen - cephes_exp(logits - total))


def token_logprobs(logits: mx.array, tokens: mx.array) -> mx.array:
    """losses.token_logprobs, on a Linux CPU with one array of the logits' size for its gradient.

    Autodiff would hold four more for onehot - softmax.
    """
    logits = logits.astype(mx.float32)

    def chosen(x):
        return mx.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]

    if not LINUX_CPU:
        return chosen(logits) - mx.logsumexp(logits, axis=-1)

    @mx.custom_function
    def forward(logits):
        total = logsumexp(logits)
        return chosen(logits) - total, total

    @forward.vjp
    def gradient(logits, cotangents, outputs):
        is_chosen = mx.arange(logits.shape[-1]) == tokens[..., None]
        return softmax_gradient(logits, is_chosen, outputs[1][..., None], cotangents[0][..., None])

    return forward(logits)[0]


# --------------------------------------------------------------------------------------------------
# the largest of many


def top_tokens(logits: mx.array, k: int) -> mx.array:
    """The k largest, largest first: (..., V) -> (..., k) ids. mx.topk gives values only.

    Of groups of 128 tokens only the k with the largest maxima can hold one of the k largest tokens.
    So the maxima are partitioned, then k groups: a tenth of the time that all V tokens take.
    """
    if k == 1:
        return mx.argmax(logits, axis=-1, keepdims=True)

    def largest(x):
        return mx.argpartition(-x, kth=k - 1, axis=-1)[..., :k]

    *lead, V = logits.shape
    if V % GROUP or V // GROUP <= k:
        top = largest(logits)
    else:
        groups = logits.reshape(*lead, GROUP, V // GROUP)   # group g: tokens g, g + V / 128, ...
        best = largest(groups.max(-2))                                              # (..., k)
        within = mx.take_along_axis(groups, best[..., None, :], axis=-1)            # (..., 128, k)
        found = largest(within.reshape(*lead, GROUP * k))
        top = found // k * (V // GROUP) + mx.take_along_axis(best, found % k, axis=-1)
    order = mx.argsort(-mx.take_along_axis(logits, top, axis=-1), axis=-1)
    return mx.take_along_axis(top, order, axis=-1)

"""exp, and what is built on it, at the speed of memory on MLX's Linux CPU backend.

That backend computes exp one element at a time, 16 ns each; a SwiGLU layer of a small model then
spends more time in it than in its matrix products. Written as arithmetic that `mx.compile` fuses
and the C compiler vectorises, it takes 3 ns. On Metal and CUDA these are MLX's own functions.

    exp(x) = 2^i * exp(r),  i = round(x / ln 2),  r = x - i ln 2 in [-0.35, 0.35]

with a polynomial for exp(r) (Cephes' expf), and 2^i put together from its bits.
"""
import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn

LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # in two parts: i * LN2_HIGH is exact in float32
MAGIC = 12582912.0      # 1.5 * 2^23: added to x, the sum's last bits are x rounded to an integer
COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                1.6666665459e-1, 5.0000001201e-1)


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


def apart(x: mx.array) -> mx.array:
    """x, behind which mx.compile begins a new kernel; free.

    It fuses at most eleven operations in a row. Where it has to cut by itself, a constant may
    become an array of stride 0, and the kernel behind it four times as slow.
    """
    return x.view(mx.int32).view(mx.float32)


def swiglu_by_exp(gate: mx.array, up: mx.array) -> mx.array:
    return gate / (1 + apart(cephes_exp(-gate))) * up


def swiglu_gradients(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple:
    s = 1 / (1 + apart(cephes_exp(-gate)))
    return cotangent * up * s * (1 + gate * (1 - s)), cotangent * gate * s


def linux_cpu() -> bool:
    """Whether what is written for that backend serves; NANOLENS_PLAIN=1 says no (blas.py)."""
    return blas.CPU_WHEEL and not blas.PLAIN and mx.default_device() == mx.Device(mx.cpu)


def make_exp():
    """exp for float32; its gradient reuses the output."""
    # custom: autodiff cannot see through the bits of 2^i
    exp = mx.custom_function(mx.compile(cephes_exp))
    exp.vjp(lambda x, cotangent, output: cotangent * output)
    return exp


def make_swiglu():
    """silu(gate) * up for float32; other types take MLX's own.

    Two things are kept for the gradient, gate and up; autodiff would keep silu(gate) as well.
    """
    fast, gradients = mx.custom_function(mx.compile(swiglu_by_exp)), mx.compile(swiglu_gradients)
    fast.vjp(lambda primals, cotangent, _: gradients(*primals, cotangent))
    return lambda gate, up: fast(gate, up) if gate.dtype == mx.float32 else nn.silu(gate) * up


if linux_cpu():
    exp, swiglu = make_exp(), make_swiglu()
else:
    exp, swiglu = mx.exp, lambda gate, up: nn.silu(gate) * up


def rope(x: mx.array, offset: int, periods: mx.array) -> mx.array:
    """Rotate x (B, H, T, d) at positions offset, ...; periods (d/2,): model.rope_periods.

    MLX's CPU backend puts it together from twenty operations; compiled, they are six.
    """
    if exp is mx.exp:
        return fast_rope(x, offset, periods)
    return compiled_rope(x, mx.array(offset), periods)      # an array, or each offset has its trace


def fast_rope(x, offset, periods):
    # traditional=False pairs feature i with i + d/2: the layout of the Hub's weights
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset,
                        freqs=periods)


compiled_rope = mx.compile(fast_rope)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float,
              mask: mx.array | str | None) -> mx.array:
    """mx.fast.scaled_dot_product_attention, or on the Linux CPU attention_by_exp.

    q (B, H, T, d), k and v (B, K, S, d) with H a multiple of K; mask "causal", None, or bool that
    broadcasts to (B, 1, T, S). Returns (B, H, T, d).
    """
    if exp is mx.exp or q.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return attention_by_exp(q, k, v, scale, mask)


def attention_by_exp(q: mx.array, k: mx.array, v: mx.array, scale: float,
                     mask: mx.array | str | None) -> mx.array:
    """softmax(q k^T * scale) v, twice as fast as MLX's there.

    Of its (B, H, T, S) arrays only the softmax is kept for the gradient.
    """
    (B, H, T), (K, S) = q.shape[:3], k.shape[1:3]
    if isinstance(mask, str):
        mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]     # the last query sees the last key
    # the H / K queries of one key-value head make one matrix: fewer, larger products
    grouped, apart = (B, K, H // K * T, -1), (B, H, T, -1)

    @mx.custom_function
    def attend(q, k, v):
        scores = ((q * scale).reshape(grouped) @ k.transpose(0, 1, 3, 2)).reshape(apart)
        if mask is not None:
            scores = mx.where(mask, scores, -1e9)
        weights = exp(scores - mx.max(scores, axis=-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).reshape(grouped)
        return (weights @ v).reshape(apart), weights

    @attend.vjp
    def gradients(primals, cotangents, outputs):
        (q, k, v), dy, weights = primals, cotangents[0].reshape(grouped), outputs[1]
        dweights = dy @ v.transpose(0, 1, 3, 2)
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
        transposed = lambda x: x.transpose(0, 1, 3, 2)
        return ((dscores @ k).reshape(q.shape), transposed(dscores) @ q.reshape(grouped),
                transposed(weights) @ dy)

    return attend(q, k, v)[0]


def fold(reduce, x: mx.array) -> mx.array:
    """reduce(x, -1) for mx.sum or mx.max: (..., V) -> (...).

    Rows of 128 laid on each other are vectorised on that CPU, the sum along one row is not: a
    quarter of the time.
    """
    *lead, V = x.shape
    return reduce(reduce(x.reshape(*lead, 128, V // 128), -2) if V % 128 == 0 else x, -1)


def logsumexp(x: mx.array) -> mx.array:
    """log sum exp over the last axis: (..., V) float32 -> (...)."""
    # stop_gradient: the shift cancels in value and gradient
    top = mx.stop_gradient(fold(mx.max, x))
    return top + mx.log(fold(mx.sum, exp(x - top[..., None])))


def log_softmax_at(logits: mx.array, tokens: mx.array) -> mx.array:
    """log softmax(logits) at one token each: (..., V) float32, (...) -> (...).

    Autodiff would hold four more arrays of the logits' size for its gradient, onehot - softmax.
    """
    chosen = lambda x: mx.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]
    if exp is mx.exp:
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


@mx.compile
def softmax_gradient(logits, is_chosen, total, cotangent):
    return cotangent * (is_chosen - cephes_exp(logits - total))

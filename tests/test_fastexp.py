"""exp and what is built on it against float64, at every size of input, and their gradients."""
import engine.blas
import mlx.core as mx
import numpy as np
import pytest
from conftest import run


def test_exp_in_float64():
    x = np.linspace(-86, 87, 200_001).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    relative = np.array(fastexp.cephes_exp(mx.array(x)), np.float64) / expected - 1
    assert np.abs(relative).max() < 4e-7


def test_extremes():
    """Tiny instead of 0 below -87, saturated above 88, NaN stays NaN: a guard must see it."""
    ends = np.array(fastexp.cephes_exp(mx.array([-1e30, -np.inf, 1e30, np.nan])))
    assert 0 <= ends[0] < 2e-38 and 0 <= ends[1] < 2e-38
    assert 1e38 < ends[2] < np.inf and np.isnan(ends[3])


@pytest.mark.parametrize("make", [fastexp.make_swiglu, lambda: fastexp.swiglu])
def test_swiglu_and_gradients(make):
    """The written form and the platform's choice, against u x / (1 + e^-x) in float64."""
    swiglu, x = make(), np.array([-200, -50, -20, -3, -0.1, 0, 0.1, 3, 20, 200], np.float32)
    up = np.linspace(-2, 3, len(x)).astype(np.float32)
    x64, up64 = x.astype(np.float64), up.astype(np.float64)
    s = 1 / (1 + np.exp(-x64))
    close = lambda a, b: np.testing.assert_allclose(np.array(a), b, rtol=1e-6, atol=1e-7)
    close(swiglu(mx.array(x), mx.array(up)), x64 * s * up64)
    grads = mx.grad(lambda *a: (swiglu(*a) * 2).sum(), argnums=(0, 1))(mx.array(x), mx.array(up))
    close(grads[0], 2 * up64 * s * (1 + x64 * (1 - s)))
    close(grads[1], 2 * x64 * s)
    half = swiglu(mx.array(x).astype(mx.bfloat16), mx.array(up).astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16    # another type keeps its type


def test_log_softmax_at_one_token():
    """Value and gradient onehot - softmax in float64, logits of any size, inside mx.compile too."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 4, 1000)) * 30).astype(np.float32)
    tokens, weights = rng.integers(0, 1000, (3, 4)), rng.normal(size=(3, 4))
    x64 = x.astype(np.float64)
    log_softmax = x64 - x64.max(-1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(-1, keepdims=True))
    at = np.take_along_axis(log_softmax, tokens[..., None], -1)[..., 0]
    value = lambda x: fastexp.log_softmax_at(x, mx.array(tokens))
    np.testing.assert_allclose(np.array(value(mx.array(x))), at, rtol=1e-5, atol=1e-5)
    onehot = np.arange(1000) == tokens[..., None]
    expected = (onehot - np.exp(log_softmax)) * weights[..., None]
    grad = mx.grad(lambda x: (value(x) * mx.array(weights.astype(np.float32))).sum())
    for way in (grad, mx.compile(grad)):
        np.testing.assert_allclose(np.array(way(mx.array(x))), expected, atol=1e-5)


def test_logsumexp_and_gradient():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 4, 1000)) * 30).astype(np.float32)
    x64 = x.astype(np.float64)
    top = x64.max(-1, keepdims=True)
    expected = top[..., 0] + np.log(np.exp(x64 - top).sum(-1))
    np.testing.assert_allclose(np.array(fastexp.logsumexp(mx.array(x))), expected, rtol=1e-6)
    grad = np.array(mx.grad(lambda x: fastexp.logsumexp(x).sum())(mx.array(x)))
    np.testing.assert_allclose(grad, np.exp(x64 - expected[..., None]), atol=1e-6)


@pytest.mark.parametrize("T,S,mask", [(5, 5, "causal"), (3, 9, "causal"), (1, 9, None),
                                      (4, 9, "array")])
def test_attention_and_gradient(T, S, mask):
    """Against MLX's own, four query heads to two key-value heads; both ways through the file."""
    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.normal(size=shape).astype(np.float32))
               for shape in ((2, 4, T, 8), (2, 2, S, 8), (2, 2, S, 8)))
    if mask == "array":
        mask = mx.array(rng.random((2, 1, T, S)) < 0.6) | (mx.arange(S) == 0)
    theirs = lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    for ours in (lambda q, k, v: fastexp.attention(q, k, v, 0.3, mask),
                 lambda q, k, v: fastexp.attention_by_exp(q, k, v, 0.3, mask)):
        np.testing.assert_allclose(np.array(ours(q, k, v)), np.array(theirs(q, k, v)), atol=1e-5)
        grads = [mx.grad(lambda *x, f=f: (f(*x) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
                 for f in (ours, theirs)]
        for a, b in zip(*grads):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)
    half = [x.astype(mx.bfloat16) for x in (q, k, v)]
    assert fastexp.attention(*half, 0.3, mask).dtype == mx.bfloat16


@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (4, 1, 1, 64)])
def test_compiled_rope(shape):
    """As MLX's own at any offset, one trace for all of them; its gradient is the rotation back."""
    periods = 10000 ** (np.arange(0, shape[-1], 2, dtype=np.float32) / shape[-1])
    x, periods = mx.random.normal(shape), mx.array(periods)
    traced = []
    compiled = mx.compile(lambda *args: traced.append(1) or fastexp.fast_rope(*args))
    for offset in (0, 7, 300):
        expected = fastexp.fast_rope(x, offset, periods)
        assert mx.abs(fastexp.rope(x, offset, periods) - expected).max() < 1e-5
        assert mx.abs(compiled(x, mx.array(offset), periods) - expected).max() < 1e-5
        back = mx.vjp(lambda x, at=offset: fastexp.rope(x, at, periods), [x], [expected])[1][0]
        assert mx.abs(back - x).max() < 1e-5
    assert len(traced) == 1


def test_the_plain_path_is_what_metal_and_cuda_take():
    """NANOLENS_PLAIN=1, in a process of its own: MLX's functions, whole batches, nothing else."""
    code = ("import blas, fastexp, parallel, mlx.core as mx; from model import logit_rows; "
            "from lora import load_base; args = load_base('models/tiny')[0].args; "
            "print(fastexp.exp is mx.exp, fastexp.linux_cpu(), parallel.count(8), "
            "logit_rows(args, 'none') * args.vocab_size > 2 ** 23)")
    done = run("-c", code, check=0, NANOLENS_PLAIN="1", OPENBLAS_NUM_THREADS="2")
    assert done.stdout.split() == ["True", "False", "1", "True"]
    if engine.blas.CPU_WHEEL:
        done = run("-c", code, check=0, NANOLENS_PLAIN="0", OPENBLAS_NUM_THREADS="2")
        assert done.stdout.split()[:2] == ["False", "True"]

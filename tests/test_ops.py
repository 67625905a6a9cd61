"""The fast versions of the formulas: against the formulas, and against float64 at every size."""
import functools

import engine.blas
import mlx.core as mx
import numpy as np
import pytest
from conftest import run

import losses
import model
from engine import ops
from engine.decode import KVCache

FORMULAS = model.FORMULAS | losses.FORMULAS


def normal(*shape, seed=0, size=1.0):
    return mx.array((size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32))


def heads(T, S):
    """Six query heads to two key-value heads of width 8."""
    return [normal(2, 6, T, 8), normal(2, 2, S, 8, seed=1), normal(2, 2, S, 8, seed=2)]


def padding_mask(offset, T):
    """Of two left-padded rows behind a cache of `offset` tokens, as the model makes it."""
    cache = KVCache(offset + T, mx.array([0, 4]))
    cache.offset = offset
    return cache.mask(T)


PERIODS = 10000 ** (np.arange(0, 16, 2, dtype=np.float32) / 16)
# by name: arrays that have gradients, and what else the function takes
CASES = {
    "rms_norm": ("rms_norm", [normal(2, 5, 32, size=3), normal(32, seed=1)], [1e-5]),
    "rms_norm of many": ("rms_norm", [normal(8, 20, 32, size=3), normal(32, seed=1)], [1e-5]),
    "rms_norm of nearly nothing": ("rms_norm", [normal(2, 5, 32, size=1e-3), normal(32)], [1e-5]),
    "rope": ("rope", [normal(2, 3, 5, 16)], [0, PERIODS]),
    "rope of one token behind a cache": ("rope", [normal(2, 3, 1, 16)], [300, PERIODS]),
    "attention": ("attention", heads(5, 5), ["causal"]),
    "attention behind a cache": ("attention", heads(3, 9), ["causal"]),
    "attention of one token": ("attention", heads(1, 9), [None]),
    "attention of one token to many": ("attention", heads(1, 600), [None]),
    "attention with padding": ("attention", heads(6, 6), [padding_mask(0, 6)]),
    "attention with padding behind a cache": ("attention", heads(3, 9), [padding_mask(6, 3)]),
    "attention at some positions": ("attention", heads(2, 9), [
        mx.arange(9) <= mx.array([[7, 2], [5, 8]])[:, None, :, None]]),
    "swiglu": ("swiglu", [normal(2, 5, 48, size=4), normal(2, 5, 48, seed=1)], []),
    "swiglu of many": ("swiglu", [normal(2, 5, 480, size=4), normal(2, 5, 480, seed=1)], []),
    **{f"token_logprobs of {V}": ("token_logprobs", [normal(3, 4, V, size=5)], [
        mx.array(np.random.default_rng(1).integers(0, V, (3, 4)))]) for V in (1000, 1024)}}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("linux_cpu", [True, False])
def test_each_formula_is_what_runs_in_its_place(case, dtype, linux_cpu, monkeypatch):
    """Values and gradients, on random inputs: a Linux CPU's version, and Metal's and CUDA's."""
    if linux_cpu and not ops.LINUX_CPU:
        pytest.skip("this machine runs MLX's own kernels")
    monkeypatch.setattr(ops, "LINUX_CPU", linux_cpu)
    name, arrays, others = CASES[case]
    fast, formula = getattr(ops, name), FORMULAS[name]
    arrays = [x.astype(dtype) for x in arrays]
    expected = formula(*arrays, *others)
    weights = normal(*expected.shape, seed=7).astype(expected.dtype)
    results = []
    for fn in (fast, formula):
        value, gradients = mx.vjp(lambda *x, fn=fn: fn(*x, *others), arrays, [weights])
        results.append([*value, *gradients])
    wide = dtype == mx.float32 or name == "token_logprobs"
    assert expected.dtype == (mx.float32 if wide else dtype)
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert i == 0 or ours.dtype == dtype
        ours, theirs = (np.array(x.astype(mx.float32)) for x in (ours, theirs))
        # bfloat16 keeps 8 bits: each of the two may round several times
        near = 2e-5 if dtype == mx.float32 else 0.03
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, rtol=near, atol=near * np.abs(theirs).max())


def test_every_formula_has_a_case_and_stands_in_for_the_name():
    """Whoever calls model.rope or losses.token_logprobs gets the fast one of the same arguments."""
    assert {name for name, *_ in CASES.values()} == set(FORMULAS)
    for name, formula in FORMULAS.items():
        fast = getattr(ops, name)
        assert fast is not formula
        assert getattr(model if name in model.FORMULAS else losses, name) is fast
        code = [f.__code__ for f in (fast, formula)]
        assert code[0].co_varnames[:code[0].co_argcount] == code[1].co_varnames[
            :code[1].co_argcount]


def test_exp_in_float64():
    x = np.linspace(-86, 87, 200_001).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    relative = np.array(ops.cephes_exp(mx.array(x)), np.float64) / expected - 1
    assert np.abs(relative).max() < 4e-7


def test_extremes():
    """Tiny instead of 0 below -87, saturated above 88, NaN stays NaN: a guard must see it."""
    ends = np.array(ops.cephes_exp(mx.array([-1e30, -np.inf, 1e30, np.nan])))
    assert 0 <= ends[0] < 2e-38 and 0 <= ends[1] < 2e-38
    assert 1e38 < ends[2] < np.inf and np.isnan(ends[3])


@pytest.mark.parametrize("swiglu", [ops.compiled_swiglu, ops.swiglu], ids=["written", "chosen"])
def test_swiglu_and_gradients(swiglu):
    """The written form and the platform's choice, against u x / (1 + e^-x) in float64."""
    x = np.array([-200, -50, -20, -3, -0.1, 0, 0.1, 3, 20, 200], np.float32)
    up = np.linspace(-2, 3, len(x)).astype(np.float32)
    x64, up64 = x.astype(np.float64), up.astype(np.float64)
    s = 1 / (1 + np.exp(-x64))
    close = lambda a, b: np.testing.assert_allclose(np.array(a), b, rtol=1e-6, atol=1e-7)
    close(swiglu(mx.array(x), mx.array(up)), x64 * s * up64)
    grads = mx.grad(lambda *a: (swiglu(*a) * 2).sum(), argnums=(0, 1))(mx.array(x), mx.array(up))
    close(grads[0], 2 * up64 * s * (1 + x64 * (1 - s)))
    close(grads[1], 2 * x64 * s)
    half = ops.swiglu(mx.array(x).astype(mx.bfloat16), mx.array(up).astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16    # another type keeps its type


def test_token_logprobs():
    """Value and gradient onehot - softmax in float64, logits of any size, inside mx.compile too."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 4, 1000)) * 30).astype(np.float32)
    tokens, weights = rng.integers(0, 1000, (3, 4)), rng.normal(size=(3, 4))
    x64 = x.astype(np.float64)
    log_softmax = x64 - x64.max(-1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(-1, keepdims=True))
    at = np.take_along_axis(log_softmax, tokens[..., None], -1)[..., 0]
    value = lambda x: ops.token_logprobs(x, mx.array(tokens))
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
    np.testing.assert_allclose(np.array(ops.logsumexp(mx.array(x))), expected, rtol=1e-6)
    grad = np.array(mx.grad(lambda x: ops.logsumexp(x).sum())(mx.array(x)))
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
    scale = 8 ** -0.5
    theirs = lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    for ours in (lambda q, k, v: ops.attention(q, k, v, mask),
                 lambda q, k, v: ops.attention_by_exp(q, k, v, scale, mask)):
        np.testing.assert_allclose(np.array(ours(q, k, v)), np.array(theirs(q, k, v)), atol=1e-5)
        grads = [mx.grad(lambda *x, f=f: (f(*x) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
                 for f in (ours, theirs)]
        for a, b in zip(*grads):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)
    half = [x.astype(mx.bfloat16) for x in (q, k, v)]
    assert ops.attention(*half, mask).dtype == mx.bfloat16


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("d", [16, 64])
def test_rope(d, plain, monkeypatch):
    """As complex numbers in float64, whatever was asked before; its gradient turns it back."""
    monkeypatch.setattr(ops, "LINUX_CPU", ops.LINUX_CPU and not plain)
    every = np.random.default_rng(0).normal(size=(2, 3, 5, d)).astype(np.float32)
    for offset, T, theta in ((0, 5, 1e4), (0, 1, 1e4), (7, 5, 1e4), (7, 5, 500.), (8000, 5, 500.)):
        periods, x = theta ** (np.arange(0, d, 2, dtype=np.float32) / d), every[:, :, :T]
        angles = (offset + np.arange(T))[:, None] / periods.astype(np.float64)
        turned = (x[..., :d // 2] + 1j * x[..., d // 2:]) * np.exp(1j * angles)
        ours = functools.partial(ops.rope, offset=offset, periods=periods)
        found = ours(mx.array(x))
        # MLX's angles are float32: at position 8,000 they are off by 5e-4
        near = 5e-6 if ops.LINUX_CPU else 3e-3
        np.testing.assert_allclose(
            found, np.concatenate([turned.real, turned.imag], axis=-1), atol=near)
        back = mx.vjp(ours, [mx.array(x)], [found])[1][0]
        np.testing.assert_allclose(back, x, atol=1e-5)


def test_rope_met_first_by_a_function_being_compiled():
    """The angles that it leaves behind are numbers, which serve outside of the trace as well."""
    periods, x = 77 ** (np.arange(8, dtype=np.float32) / 8), mx.random.normal((1, 2, 3, 16))
    traced = mx.compile(lambda x: ops.rope(x, 5, periods))(x)
    assert mx.allclose(traced, ops.rope(x, 5, periods), atol=1e-6)
    assert mx.allclose(traced, FORMULAS["rope"](x, 5, periods), atol=1e-4)


def test_the_plain_path_is_what_metal_and_cuda_take():
    """NANOLENS_PLAIN=1, in a process of its own: MLX's functions, whole batches, nothing else."""
    code = ("import engine.blas, mlx.core as mx; from engine import ops, parallel; "
            "from engine.memory import logit_rows; from checkpoint import load_base; "
            "args = load_base('models/tiny')[0].args; "
            "print(ops.exp is mx.exp, engine.blas.linux_cpu(), parallel.count(8), "
            "logit_rows(args, 'none') * args.vocab_size > 2 ** 23)")
    done = run("-c", code, check=0, NANOLENS_PLAIN="1", OPENBLAS_NUM_THREADS="2")
    assert done.stdout.split() == ["True", "False", "1", "True"]
    if engine.blas.CPU_WHEEL:
        done = run("-c", code, check=0, NANOLENS_PLAIN="0", OPENBLAS_NUM_THREADS="2")
        assert done.stdout.split()[:2] == ["False", "True"]

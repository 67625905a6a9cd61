"""A batch cut in parts gives what the whole gives; BLAS has its cores back afterwards."""
import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import engine.blas
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, TINY_COT, config, lora_model, run, small_config, write_model
from mlx.utils import tree_flatten

from engine import parallel
from engine.memory import spare
from engine.parallel import map_rows
from generate import sample
from lens import Reading, read_prompts
from model import load
from text.tokenizer import load_tokenizer
from train import accumulate, compile_step, make_method, make_optimizer, prepare_model

OPENBLAS = ctypes.CDLL(engine.blas.LOADED) if engine.blas.LOADED else None


@pytest.fixture
def two_cores(monkeypatch):
    """As on a machine with two cores, whatever OPENBLAS_NUM_THREADS says to the tests."""
    if not engine.blas.CPU_WHEEL:
        pytest.skip("cut on the Linux CPU alone")
    before = engine.blas.CORES
    monkeypatch.setattr(engine.blas, "CORES", 2)
    monkeypatch.setattr(engine.blas, "PARTS", 2)
    yield
    if OPENBLAS:
        OPENBLAS.openblas_set_num_threads(before)


def whole(monkeypatch):
    monkeypatch.setattr(engine.blas, "PARTS", 1)


def cut(batch, *args, **keys):
    """The parts that map_rows makes of a batch."""
    parts = []

    def keep(part):
        parts.append(part)
        return mx.array(len(parts))

    assert [n.item() for n in map_rows(keep, batch, *args, **keys)] == [
        *range(1, len(parts) + 1)]      # a result each, in the parts' order
    return parts


def test_rows_are_cut_scalars_are_not(two_cores):
    batch = {"prompts": mx.arange(4), "rows": mx.arange(24).reshape(8, 3), "n": mx.array(5.0),
             "start": None, "both": (mx.arange(2), mx.array([[7]]))}
    first, second = cut(batch | {"shared": mx.array([[7, 8]])})
    assert first["prompts"].tolist() == [0, 1] and second["prompts"].tolist() == [2, 3]
    assert second["rows"].tolist() == mx.arange(12, 24).reshape(4, 3).tolist()
    assert first["n"].item() == second["n"].item() == 5 and first["start"] is None
    assert first["shared"].tolist() == second["shared"].tolist() == [[7, 8]]
    assert [x.tolist() for x in second["both"]] == [[1], [[7]]]
    assert len(cut({"rows": mx.arange(3)})) == 1        # they would leave a rest
    assert len(cut({"prompts": mx.arange(3), "rows": mx.arange(6)})) == 1
    assert len(cut({"rows": mx.arange(1)})) == len(cut({"n": mx.array(5.0)})) == 1


def test_parts_are_no_more_than_a_limit_and_hold_no_more_rows(two_cores, monkeypatch):
    rows = lambda parts: [part["x"].tolist() for part in parts]
    assert rows(cut({"x": mx.arange(4)}, 1)) == [[0, 1, 2, 3]]      # as model.parts says
    assert rows(cut({"x": mx.arange(4)}, 8)) == [[0, 1], [2, 3]]
    assert rows(cut({"x": mx.arange(5)}, rows=2)) == [[0], [1, 2], [3, 4]]
    assert rows(cut({"x": mx.arange(5)}, rows=9)) == [[0, 1], [2, 3, 4]]
    assert rows(cut({"x": mx.arange(5)}, 1, rows=4)) == [[0, 1], [2, 3, 4]]
    whole(monkeypatch)
    assert rows(cut({"x": mx.arange(4)})) == [[0, 1, 2, 3]]
    assert rows(cut({"x": mx.arange(4)}, rows=2)) == [[0, 1], [2, 3]]


def test_more_cores_than_python_can_feed(two_cores, monkeypatch):
    for cores in (2, engine.blas.MOST):
        monkeypatch.setattr(engine.blas, "CORES", cores)
        assert engine.blas.count_parts() in (cores, 1)     # 1 with an OpenMP build
    monkeypatch.setattr(engine.blas, "CORES", engine.blas.MOST + 1)
    assert engine.blas.count_parts() == 1


def test_parts_have_streams_of_their_own(two_cores):
    """In the parts' order, two at a time, on the same two streams again; a lone one on none."""
    seen = []

    def run(part):
        seen.append((part["x"].tolist(), mx.default_stream(mx.cpu)))
        return part["x"] * 2

    outside = mx.default_stream(mx.cpu)
    results = map_rows(run, {"x": mx.arange(5)}, rows=1)
    assert [x.tolist() for x in results] == [[0], [2], [4], [6], [8]]
    assert [x for x, _ in seen] == [[0], [1], [2], [3], [4]]
    first, second, third, fourth, alone = (stream for _, stream in seen)
    assert first != second and outside not in (first, second)
    assert (third, fourth, alone) == (first, second, outside)
    assert mx.default_stream(mx.cpu) == outside


@pytest.mark.skipif(OPENBLAS is None, reason="the bundled BLAS has one thread")
def test_blas_has_all_cores_again(two_cores, monkeypatch):
    """One thread while parts are evaluated, all of them for a whole; after an error too."""
    threads, evaluate = [], mx.eval

    def watched(*arrays):
        threads.append(OPENBLAS.openblas_get_num_threads())
        evaluate(*arrays)
        if failing:
            raise ValueError("in the middle")

    monkeypatch.setattr(mx, "eval", watched)
    OPENBLAS.openblas_set_num_threads(2)
    failing, rows = False, {"x": mx.ones((2, 3))}
    map_rows(lambda part: part["x"], rows)
    map_rows(lambda part: part["x"], rows, 1)
    assert threads == [1, 2] and OPENBLAS.openblas_get_num_threads() == 2
    failing = True
    with pytest.raises(ValueError, match="in the middle"):
        map_rows(lambda part: part["x"], rows)
    assert threads == [1, 2, 1] and OPENBLAS.openblas_get_num_threads() == 2

    def broken(part):
        raise ValueError("while it is built")

    outside = mx.default_stream(mx.cpu)
    with pytest.raises(ValueError, match="while it is built"):
        map_rows(broken, rows)
    assert OPENBLAS.openblas_get_num_threads() == 2 and mx.default_stream(mx.cpu) == outside


@pytest.mark.parametrize("method,more", [
    ("sft", {}), ("dual_reward", {"grad_accum_steps": 2}), ("sft", {"recompute": "block"}),
    ("grpo", {}), ("grpo", {"batch_size": 4, "recompute": "mlp"}),
    ("grpo", {"grad_accum_steps": 2}), ("markovian", {})])
def test_a_step_of_parts_is_the_step(method, more, tokenizer, sums_data, two_cores, monkeypatch):
    """Loss, every metric and the weights after two steps, of a batch cut in two and of the whole.

    The problems are the method's own data, so that lengths differ and GRPO's prompts are padded.
    """
    keys = {"method": method, "batch_size": 16, "grpo_group_size": 4, "grpo_kl_weight": 0.1,
            "max_completion_tokens": 4, "grpo_guard": False, "lr": 1e-3,
            "data_samples": 100} | more
    if method == "markovian":
        keys |= {"data": str(sums_data), "chain_tokens": 6}
        tokenizer = load_tokenizer(TINY_COT)
    cfg, source_folder = config(**keys), TINY_COT if method == "markovian" else TINY
    results = []
    for parts in (1, 2):
        monkeypatch.setattr(engine.blas, "PARTS", parts)
        model, cut_into = lora_model(source=source_folder), []
        spare(model, cfg)
        source, loss = make_method(cfg, model, tokenizer)
        if method == "grpo":
            reward = lambda problem, completion: float(sum(completion.ids) % 5)
            source.task.functions = [("some", reward, 1.0)]
        loss_and_grads, update = compile_step(cfg, model, make_optimizer(cfg, model), loss)

        def counted(batch, of=loss_and_grads, seen=cut_into):
            seen.append(len(batch["row_mask"] if "row_mask" in batch else batch["completions"]))
            return of(batch)

        metrics = []
        for step in range(2):
            for micro_batches in source.at(step)[0]:
                grads, sums, maxima = accumulate(counted, micro_batches, model.parts)
                metrics.append(update(grads, sums | maxima, cfg.lr))
        results.append((metrics, cut_into, dict(tree_flatten(model.trainable_parameters()))))
    (one, pieces, weights), (two, halves, same_weights) = results
    assert len(one) == len(two) > 0
    assert halves == [n // 2 for n in pieces for _ in range(2)]
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a["loss"]
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
    for name, value in weights.items():
        np.testing.assert_allclose(value, same_weights[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_lens_of_parts(two_cores, monkeypatch):
    model, prompts = lora_model(), [[1, 7, 9, 12], [1, 8], [1, 3, 4], [1, 5, 5, 5, 5, 2]]
    targets = [[5, 6], [7, 8], [9, 3], [4, 2]]
    parts = read_prompts(model, prompts, targets, 3)
    whole(monkeypatch)
    for name in Reading.__dataclass_fields__:
        np.testing.assert_allclose(getattr(parts, name),
                                   getattr(read_prompts(model, prompts, targets, 3), name),
                                   rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_of_parts(temperature, tokenizer, two_cores, monkeypatch):
    """Prefilled in two halves, padded prompts, a group each: the same tokens."""
    model, prompts = lora_model(), [[1, 7, 9, 12], [1, 8], [1, 3, 4], [1, 5, 5, 5, 5, 2]]
    draw = lambda: sample(model, tokenizer, prompts, 6, 3, temperature, key=mx.random.key(3),
                          many_lines=True)
    parts = draw()
    whole(monkeypatch)
    for a, b in zip(parts, draw()):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_quantised_and_fully_trained_models_keep_batches_whole(tmp_path, two_cores):
    """Each part would unpack every matrix again, or hold gradients of all weights.

    It is said of the model: another one in the same process is cut as before.
    """
    folder = write_model(tmp_path / "m", small_config() | {"intermediate_size": 64}, TINY)
    assert load(folder, bits=4)[0].parts == 1
    assert prepare_model(config(model=str(folder), bits=4))[0].parts == 1
    assert prepare_model(config(model=str(folder), full=True))[0].parts == 1
    assert parallel.count(1) == 1
    lora = prepare_model(config(model=str(folder)))[0]
    assert load(folder)[0].parts is None and lora.parts is None
    assert parallel.count(lora.parts) == parallel.count(8) == 2
    prompts = {"tokens": mx.array([[1, 7], [1, 8]])}
    assert len(cut(prompts, load(folder, bits=4)[0].parts)) == 1 and len(cut(prompts)) == 2


# --- an OpenBLAS older than the processor

INTEL, AMD = "avx2 fma avx512f avx512bw avx512dq avx512vl", "sse2 avx avx2 fma"


@pytest.mark.parametrize("name,flags,told", [
    (b"Prescott", INTEL, "SkylakeX"), (b"Prescott", AMD, "Haswell"), (b"Prescott", "avx", None),
    (b"SkylakeX", INTEL, None), (b"Zen", AMD, None)])
def test_kernels_of_an_unknown_processor(name, flags, told, monkeypatch, tmp_path):
    """A library that takes the processor for the oldest is loaded again, told what to use."""
    (tmp_path / "cpuinfo").write_text(f"model name\t: X\nflags\t\t: fpu {flags}\nbugs\t\t:\n")
    monkeypatch.setattr(engine.blas, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv(engine.blas.KERNELS, "")
    monkeypatch.delenv(engine.blas.KERNELS)
    calls = []
    monkeypatch.setattr(engine.blas._ctypes, "dlclose", calls.append)
    library = SimpleNamespace(openblas_get_corename=lambda: name, _handle=7)
    engine.blas.best_kernels(library)
    assert engine.blas.os.environ.get(engine.blas.KERNELS) == told
    monkeypatch.setattr(engine.blas.sys, "prefix", tmp_path)        # nothing is compiled there
    monkeypatch.setattr(engine.blas.ctypes, "CDLL", lambda path, mode: calls.append(path))
    engine.blas.publish("lib.so")
    assert calls == ([7, "lib.so"] if told else ["lib.so"])
    monkeypatch.setenv(engine.blas.KERNELS, "Prescott")     # the user has chosen
    engine.blas.best_kernels(library)
    assert len(calls) == (2 if told else 1)


@pytest.mark.skipif(not OPENBLAS, reason="no OpenBLAS to load")
def test_this_processor_has_its_kernels():
    """What a fresh process multiplies with knows the vectors of this machine."""
    code = ("import engine.blas as b, ctypes; f = ctypes.CDLL(b.LOADED).openblas_get_corename; "
            "f.restype = ctypes.c_char_p; print(f().decode())")
    vectors = "avx2" in engine.blas.CPU_INFO.read_text()
    name = run("-c", code, check=0).stdout.strip()
    assert name and (name != "Prescott" or not vectors)


MARCH = {"SkylakeX": "skylake-avx512", "Haswell": "haswell", "": "x86-64"}


@pytest.fixture(scope="module", params=MARCH)
def few_rows(request, tmp_path_factory):
    """few_rows.c compiled as it is now, for each kind of processor that this one can play."""
    mine = engine.blas.kernels_of_processor()
    if not shutil.which("cc") or os.uname().machine != "x86_64" or (
            list(MARCH).index(request.param) < list(MARCH).index(mine)):
        pytest.skip("no compiler, or not a processor of this kind")
    file = tmp_path_factory.mktemp("few_rows") / "few_rows.so"
    subprocess.run(["cc", "-O3", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
                    f"-march={MARCH[request.param]}", "-o", file, ROOT / "engine/few_rows.c"],
                   check=True)
    return ctypes.CDLL(str(file))


def multiply(front, x, w, k, alpha=1, beta=0, c=None):
    """alpha x w^T + beta c of the first k columns; c has a row and two columns more than that."""
    point = lambda array: ctypes.c_void_p(array.ctypes.data)
    c = np.full((len(x) + 1, len(w) + 2), np.nan, np.float32) if c is None else c
    front.cblas_sgemm(101, 111, 112, len(x), len(w), k, ctypes.c_float(alpha), point(x), x.shape[1],
                      point(w), w.shape[1], ctypes.c_float(beta), point(c), c.shape[1])
    return c


@pytest.mark.skipif(not OPENBLAS, reason="no OpenBLAS to load")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_products_of_few_rows(few_rows, threads):
    """Every shape as numpy, into a part of an array; no product of those goes to OpenBLAS."""
    others, rng = [], np.random.default_rng(0)
    kept = [ctypes.CFUNCTYPE(ctypes.c_int)(does) for does in (lambda: others.append(1) or 0,
                                                              lambda: threads)]
    few_rows.put_few_rows_before(*kept)
    for m, n, k in [(1, 300, 64), (1, 2001, 35), (1, 3, 5), (1, 5, 20000), (1, 4, 0),
                    (2, 1030, 128), (3, 999, 131), (12, 300, 128), (16, 500, 128), (17, 301, 200),
                    (32, 333, 257), (33, 1000, 128), (47, 300, 128), (64, 5, 1000), (64, 77, 300)]:
        x, w = rng.random((m, k + 3), np.float32), rng.random((n, k + 5), np.float32)
        product = x[:, :k].astype(np.float64) @ w[:, :k].T
        for alpha, beta in ((1, 0), (2, 1), (0.5, -1)):
            # with beta 0 what stands there is not read
            before = np.full((m + 1, n + 2), np.nan if beta == 0 else 3, np.float32)
            c = multiply(few_rows, x, w, k, alpha, beta, before.copy())
            np.testing.assert_allclose(c[:m, :n], alpha * product + 3 * beta, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(c[m], before[m])
            np.testing.assert_array_equal(c[:, n:], before[:, n:])
    assert not others


@pytest.mark.skipif(not OPENBLAS, reason="no OpenBLAS to load")
def test_two_streams_multiply_at_once(few_rows):
    """Each has its own place for the rows that it turns."""
    kept = [ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 2) for _ in range(2)]
    few_rows.put_few_rows_before(*kept)
    rng = np.random.default_rng(0)
    pairs = [(rng.random((m, 256), np.float32), rng.random((700, 256), np.float32))
             for m in (20, 40)]
    with ThreadPoolExecutor(2) as pool:
        for found, (x, w) in zip(pool.map(lambda i: multiply(few_rows, *pairs[i % 2], 256),
                                          range(100)), pairs * 50):
            np.testing.assert_allclose(found[:-1, :-2], x @ w.T, rtol=1e-4)


@pytest.mark.skipif(not OPENBLAS, reason="no OpenBLAS to load")
def test_which_products_go_where(tmp_path):
    """Up to 64 rows to our own kernel, all else to gemm; in every layout as numpy."""
    own = Path(sys.prefix, f"lib/libfew_rows{engine.blas.kernels_of_processor()}.so")
    if not own.exists():
        pytest.skip("no compiler when setup.sh ran")
    rng = np.random.default_rng(0)
    for m, n, k in [(1, 5, 7), (1, 1, 3), (1, 300, 64), (1, 64, 300), (2, 5, 7), (3, 1, 4),
                    (9, 700, 150)]:
        x, w = rng.random((m, k), np.float32), rng.random((n, k), np.float32)
        a, b = mx.array(x), mx.array(w)
        column = mx.array(np.ascontiguousarray(x.T)).T        # the row, stored as a column
        every_other = mx.array(np.repeat(x, 2, axis=1))[:, ::2]
        for left in (a, column, every_other):
            np.testing.assert_allclose(left @ b.T, x @ w.T, rtol=1e-5)
            np.testing.assert_allclose(left @ mx.contiguous(b.T), x @ w.T, rtol=1e-5)
            np.testing.assert_allclose(mx.addmm(mx.ones((m, n)), left, b.T), 1 + x @ w.T, rtol=1e-5)
    code = ("import sys, engine.blas, ctypes, mlx.core as mx; calls = []; "
            "front = ctypes.CDLL(sys.argv[1]); "
            "kept = [ctypes.CFUNCTYPE(ctypes.c_int)(lambda name=name: calls.append(name) or 1) "
            "for name in ('gemm', 'ours')]; front.put_few_rows_before(*kept)\n"
            "for m, n, k in [(1, 999, 128), (64, 999, 128), (65, 999, 128), (64, 999, 127),"
            "                (2, 9, 999)]: mx.eval(mx.ones((m, k)) @ mx.ones((n, k)).T)\n"
            "mx.eval(mx.ones((64, 128)) @ mx.ones((128, 999))); print(*calls)")
    done = run("-c", code, own, check=0)
    assert done.stdout.strip() == "ours ours gemm gemm gemm gemm"
    # numbers below 1e-38 are 0 on every thread that multiplies
    code = ("import engine.blas, mlx.core as mx; x, w = mx.full((32, 128), 1e-20), "
            "mx.full((999, 128), 1e-20); print((x @ w.T).max().item())")
    assert run("-c", code, check=0, OPENBLAS_NUM_THREADS="2").stdout.strip() == "0.0"
    # without the compiled file all is as before
    code = ("import sys; sys.prefix = '/nowhere'; import engine.blas as b, mlx.core as mx; "
            "print(b.LOADED, (mx.ones((1, 4)) @ mx.ones((4, 4))).sum().item())")
    assert run("-c", code, check=0).stdout.split() == [engine.blas.LOADED, "16.0"]
    # nor does one stop anything that is broken, or was compiled for an older blas.py
    (tmp_path / "lib").mkdir()
    for content in (b"half a file", Path(engine.blas.LOADED).read_bytes()):
        (tmp_path / "lib" / own.name).write_bytes(content)
        done = run("-c", code.replace("/nowhere", str(tmp_path)), check=0)
        assert done.stdout.split() == [engine.blas.LOADED, "16.0"] and "sh setup.sh" in done.stderr


# --- numbers below 1e-38


def test_subnormals_are_zero_on_mlxs_threads_alone(two_cores):
    """Also within a part's stream and in OpenBLAS; numpy, on this thread, keeps them."""
    if engine.blas.os.uname().machine != "x86_64":
        pytest.skip("of x86-64 alone")
    small, smaller = mx.full((64, 64), 1e-20), mx.full((64, 64), 1e-21)
    assert (small * smaller).sum().item() == 0 == (small @ smaller).sum().item()
    parts = map_rows(lambda part: part["a"] * 1e-21, {"a": small})
    assert len(parts) == 2 and not any(part.any().item() for part in parts)
    assert (np.float32(1e-20) * np.float32(1e-21)) > 0 < np.finfo(np.float32).smallest_subnormal
    assert (mx.full((4,), 1e-37) * 0.5).sum().item() > 0

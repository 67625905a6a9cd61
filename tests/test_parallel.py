"""A batch cut in parts gives what the whole gives; BLAS has its cores back afterwards."""
import ctypes

import engine.blas
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import TINY, TINY_COT, config, lora_model, small_config, write_model
from mlx.utils import tree_flatten

from engine import parallel
from engine.parallel import cut, side_by_side
from generate import sample
from lens import Reading, read_prompts
from model import load
from text.tokenizer import load_tokenizer
from train import compile_step, load_source, make_loss, next_updates, take_step

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


def test_rows_are_cut_scalars_are_not(two_cores):
    batch = {"prompts": mx.arange(4), "rows": mx.arange(24).reshape(8, 3), "n": mx.array(5.0),
             "start": None}
    first, second = cut(batch | {"shared": mx.array([[7, 8]])})
    assert first["prompts"].tolist() == [0, 1] and second["prompts"].tolist() == [2, 3]
    assert second["rows"].tolist() == mx.arange(12, 24).reshape(4, 3).tolist()
    assert first["n"].item() == second["n"].item() == 5 and first["start"] is None
    assert first["shared"].tolist() == second["shared"].tolist() == [[7, 8]]
    assert len(cut({"rows": mx.arange(3)})) == 1        # they would leave a rest
    assert len(cut({"rows": mx.arange(1)})) == 1


def test_more_cores_than_python_can_feed(two_cores, monkeypatch):
    for cores in (2, engine.blas.MOST):
        monkeypatch.setattr(engine.blas, "CORES", cores)
        assert engine.blas.count_parts() in (cores, 1)     # 1 with an OpenMP build
    monkeypatch.setattr(engine.blas, "CORES", engine.blas.MOST + 1)
    assert engine.blas.count_parts() == 1


def test_parts_have_streams_of_their_own(two_cores):
    """Uneven generators: each goes on to its own end, in the parts' order."""
    seen = []

    def run(n):
        for i in range(n):
            seen.append((n, i, mx.default_stream(mx.cpu)))
            yield mx.ones(2) * i
        return n

    outside = mx.default_stream(mx.cpu)
    assert side_by_side(run, [3, 1]) == [3, 1]
    assert [(n, i) for n, i, _ in seen] == [(3, 0), (1, 0), (3, 1), (3, 2)]
    first, second = seen[0][2], seen[1][2]
    assert first != second and outside not in (first, second)
    assert seen[2][2] == seen[3][2] == first
    assert mx.default_stream(mx.cpu) == outside


@pytest.mark.skipif(OPENBLAS is None, reason="the bundled BLAS has one thread")
def test_blas_has_all_cores_again(two_cores):
    """One thread while parts are evaluated; after an error too."""
    def run(part):
        assert OPENBLAS.openblas_get_num_threads() == 1
        yield mx.ones(1)
        if part:
            raise ValueError("in the middle")

    side_by_side(run, [0, 0])
    assert OPENBLAS.openblas_get_num_threads() == 2
    with pytest.raises(ValueError, match="in the middle"):
        side_by_side(run, [0, 1])
    assert OPENBLAS.openblas_get_num_threads() == 2


@pytest.mark.parametrize("method,more", [
    ("sft", {}), ("dual_reward", {"grad_accum_steps": 2}), ("sft", {"recompute": "block"}),
    ("grpo", {}), ("grpo", {"batch_size": 4, "recompute": "mlp"}), ("grpo", {
        "grad_accum_steps": 2, "grpo_entropy_weight": 0.1}), ("markovian", {})])
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
    source_folder = TINY_COT if method == "markovian" else TINY
    results = []
    for parts in (1, 2):
        monkeypatch.setattr(engine.blas, "PARTS", parts)
        cfg, model = config(**keys), lora_model(source=source_folder)
        model.recompute = cfg.recompute
        source = load_source(cfg, model, tokenizer)
        if method in ("grpo", "markovian"):
            source.reward = lambda problem, completion: float(sum(completion.ids) % 5)
        optimizer = optim.AdamW(cfg.lr)
        optimizer.init(model.trainable_parameters())
        functions = compile_step(model, optimizer, make_loss(cfg, 0))
        metrics = []
        for step in range(2):
            for update in next_updates(source, step, cfg)[0]:
                assert [len(cut(batch)) for batch in update] == [parts] * len(update)
                metrics.append(take_step(step, update, *functions, optimizer, cfg.lr, cfg))
        results.append((metrics, dict(tree_flatten(model.trainable_parameters()))))
    (one, weights), (two, same_weights) = results
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
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


def test_quantised_models_keep_batches_whole(tmp_path, two_cores):
    """Each part would unpack every matrix again."""
    folder = write_model(tmp_path / "m", small_config() | {"intermediate_size": 64}, TINY)
    load(folder)
    assert parallel.count(8) == 2
    load(folder, bits=4, group_size=32)
    assert parallel.count(8) == 1

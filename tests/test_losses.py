"""The objectives against hand-worked numbers, finite differences and each other."""
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import config, loss_of, small_model
from mlx.utils import tree_flatten

from data import Batches
from losses import dual_reward_loss, masked_cross_entropy, token_logprobs
from model import gather_positions
from text.arithmetic import held_out, make_problem
from text.rows import tokenize

IDS = {"add": 1010, "subtract": 1011, "multiply": 1012}
PROBLEMS = [make_problem("add", 3, 4), make_problem("multiply", 12, 11, "what is {a} times {b}"),
            make_problem("subtract", 95, 7)]


def one_batch(tokenizer, **keys):
    cfg = config(batch_size=len(PROBLEMS), **keys)
    rows = tokenize(PROBLEMS, tokenizer, 128, [IDS[p.operation] for p in PROBLEMS])
    batches = Batches(rows, cfg)
    batches.padded[:] = max(batches.padded)  # one length, so that unequal rows share the batch
    batches.lengths = [int(max(batches.padded))]
    batches.per_epoch = 1
    [[batch]], _ = batches.at(0)
    return cfg, batch, rows


def loss_and_grads(model, cfg, batch, block=0):
    loss_and_grad = nn.value_and_grad(model, loss_of(cfg, block))
    (loss, parts, _), grads = loss_and_grad(model, batch)
    return loss, parts, dict(tree_flatten(grads))


def test_token_logprobs_in_float64():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(4, 5, 30)) * 20, rng.integers(0, 30, (4, 5))
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = np.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]
    ours = token_logprobs(mx.array(logits.astype(np.float32)), mx.array(tokens))
    np.testing.assert_allclose(np.array(ours), expected, atol=2e-5)
    # log(softmax + 1e-10) would floor this one at -23
    assert abs(token_logprobs(mx.array([[0.0, 60.0]]), mx.array([0])).item() + 60) < 1e-5


def test_masked_cross_entropy_example():
    """The docstring's numbers, and the denominator that makes micro-batches add up."""
    logprobs, mask = mx.array([-1.0, -3.0, -2.0]), mx.array([1.0, 1.0, 0.0])
    whole = masked_cross_entropy(logprobs, mask, mx.array(2.0))
    assert abs(whole.item() - 2.0) < 1e-6
    rows = [slice(i, i + 1) for i in range(3)]
    parts = [masked_cross_entropy(logprobs[r], mask[r], mx.array(2.0)) for r in rows]
    assert abs(sum(p.item() for p in parts) - 2.0) < 1e-6


def test_sft_is_the_models_probability_of_the_answer(model, tokenizer):
    """Independent of masks and gathers.

    What is expected is -log p(answer, EOS | prompt) from the plain logits, row by row.
    """
    cfg, batch, rows = one_batch(tokenizer)
    loss, _, _ = loss_and_grads(model, cfg, batch)
    total, count = 0.0, 0
    for row in rows:
        logits = np.array(model(mx.array([row.ids]))[0]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in range(row.P, len(row.ids)):
            total, count = total - logprobs[t - 1, row.ids[t]], count + 1
    assert count == 6  # three answers, three EOS: no padding is ever counted
    assert abs(loss.item() - total / count) < 1e-5


def test_mask_prompt_false_counts_every_token(model, tokenizer):
    _, batch, rows = one_batch(tokenizer, mask_prompt=False)
    every = sum(len(r.ids) - 1 for r in rows)
    assert batch["n_targets"].item() == every == batch["target_mask"].sum().item()


def test_gathering_first_changes_nothing(model, tokenizer):
    """Unembedding A gathered positions equals gathering from all T logits.

    This holds in value and gradient.
    """
    _, batch, _ = one_batch(tokenizer)
    n_targets = batch["target_mask"].sum()
    positions = batch["target_positions"]

    def full(model):
        logits = model(batch["tokens"])
        chosen = mx.take_along_axis(logits, positions[..., None], axis=1)
        return masked_cross_entropy(token_logprobs(chosen, batch["targets"]), batch["target_mask"],
                                    n_targets)

    def gathered(model):
        resid = gather_positions(model.final_resid(batch["tokens"]), positions)
        logits = model.head(resid)
        return masked_cross_entropy(token_logprobs(logits, batch["targets"]), batch["target_mask"],
                                    n_targets)
    (a, grad_a), (b, grad_b) = (nn.value_and_grad(model, f)(model) for f in (full, gathered))
    assert abs(a.item() - b.item()) < 1e-5
    for (name, x), (_, y) in zip(tree_flatten(grad_a), tree_flatten(grad_b)):
        np.testing.assert_allclose(np.array(x), np.array(y), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("keys", [
    {}, {"method": "dual_reward", "class_weight": 0.7},
    {"method": "dual_reward", "answer_shift": False},
    {"method": "dual_reward", "class_position": "answer"}, {"mask_prompt": False},
])
def test_gradients_against_finite_differences(tokenizer, keys):
    """Central differences along random directions of each weight.

    The step is where float32 noise and curvature balance.
    """
    model = small_model(seed=3)
    cfg, batch, _ = one_batch(tokenizer, **keys)
    _, _, grads = loss_and_grads(model, cfg, batch)
    loss_fn = loss_of(cfg)
    value = lambda: loss_fn(model, batch)[0].item()
    rng = np.random.default_rng(1)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight",
                 "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        weight = dict(tree_flatten(model.parameters()))[name]
        direction = mx.array(rng.normal(size=weight.shape).astype(np.float32))
        direction = direction + 3 * grads[name] / mx.maximum(mx.abs(grads[name]).max(), 1e-9)
        eps = 2e-2 / mx.sqrt((direction ** 2).sum()).item()
        model.load_weights([(name, weight + eps * direction)], strict=False)
        above = value()
        model.load_weights([(name, weight - eps * direction)], strict=False)
        below = value()
        model.load_weights([(name, weight)], strict=False)
        slope = (grads[name] * direction).sum().item()
        allowed = 0.02 * abs(slope) + 2e-3 / (2 * eps) * 1e-2
        assert abs((above - below) / (2 * eps) - slope) < allowed, name


def test_weight_zero_is_sft_exactly(model, tokenizer):
    cfg, batch, _ = one_batch(tokenizer)
    sft_loss, _, sft_grads = loss_and_grads(model, cfg, batch)
    dual, batch_dual, _ = one_batch(tokenizer, method="dual_reward", class_weight=0.0)
    loss, parts, grads = loss_and_grads(model, dual, batch_dual)
    assert loss.item() == sft_loss.item() and parts["class_loss"].item() > 1
    for name in grads:
        assert mx.array_equal(grads[name], sft_grads[name]), name


def test_dual_reward_parts(model, tokenizer):
    """The class part is -log of the lens' probability of the operation.

    It is read at the last prompt token of the asked block.
    """
    for block in (0, 1):
        cfg, batch, rows = one_batch(tokenizer, method="dual_reward", class_weight=0.3)
        loss, parts, grads = loss_and_grads(model, cfg, batch, block)
        expected = 0.0
        for row in rows:
            resid = model.residuals(mx.array([row.ids]))[block + 1]
            logits = np.array(model.head(resid)[0, row.P - 1]).astype(np.float64)
            expected -= (logits[row.class_id] - np.log(np.exp(logits).sum())) / len(rows)
        assert abs(parts["class_loss"].item() - expected) < 1e-5
        assert abs(loss.item() - (0.3 * expected + 0.7 * parts["answer_loss"].item())) < 1e-5
    assert dual_reward_loss(mx.array(2.0), mx.array(1.0), mx.array(1.0)).item() == 2.0


def test_class_loss_alone_never_reaches_blocks_above(model, tokenizer):
    cfg, batch, _ = one_batch(tokenizer, method="dual_reward", class_weight=1.0)
    _, _, grads = loss_and_grads(model, cfg, batch, block=0)
    assert all(not g.any().item() for name, g in grads.items() if ".layers.1." in name)
    assert all(g.any().item() for name, g in grads.items()
               if ".layers.0." in name and "k_proj" not in name and "q_proj" not in name)


def test_prior_errors_are_what_they_say(model, tokenizer):
    """Error A asks position t for the token at t; error B reads the class at the last answer token.

    Both by hand.
    """
    cfg, batch, rows = one_batch(tokenizer, method="dual_reward", answer_shift=False,
                                 class_position="answer")
    _, parts, _ = loss_and_grads(model, cfg, batch, block=0)
    answer = word = 0.0
    for row in rows:
        resid = model.residuals(mx.array([row.ids]))
        logprobs = np.array(nn.log_softmax(model.head(resid[-1])[0], axis=-1))
        answer -= sum(logprobs[t, row.ids[t]] for t in range(row.P, len(row.ids))) / 6
        words = np.array(nn.log_softmax(model.head(resid[1])[0], axis=-1))
        word -= words[len(row.ids) - 2, row.class_id] / len(rows)
    assert abs(parts["answer_loss"].item() - answer) < 1e-5
    assert abs(parts["class_loss"].item() - word) < 1e-5


def test_held_out_rows_have_targets(tokenizer):
    """One-token answers and EOS: exactly two targets a row, whatever the prompt's length."""
    problems = held_out(config(data_wordings=("symbolic", "worded")), "valid")
    rows = tokenize(problems, tokenizer, 128, [IDS[p.operation] for p in problems])
    assert {len(r.ids) - r.P for r in rows} == {2}

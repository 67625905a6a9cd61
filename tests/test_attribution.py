"""Who wrote a logit: parts that sum to it; and the Jacobian lens against finite differences."""
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, GOLDEN, assert_one_clear_line, run, small_model

from lens import read_prompts, taps_at
from lora import apply_lora
from model import load
from study.attribution import attribution_table, contributions
from study.jacobian import jacobian, read_transported, unembedding_rows, word_directions

# --------------------------------------------------------------------------------------------------
# direct logit attribution


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", [False, True])
def test_attribution_sums_to_the_logit(family, heads):
    """All parts together are the golden logit, and a difference of two; q, k, v biases included."""
    model, _ = load(GOLDEN / family, "float32")
    expected = mx.load(str(GOLDEN / family / "expected.safetensors"))
    tokens, logits = expected["tokens"], np.array(expected["logits"])
    prompts = [tokens[0].tolist(), tokens[1, :30].tolist()]
    names, shares = contributions(model, prompts, [11, 200], heads=heads)
    ends = logits[0, -1, 11], logits[1, 29, 200]
    np.testing.assert_allclose(shares.sum(0), ends, atol=1e-3)
    H, L = model.args.num_attention_heads, model.args.num_hidden_layers
    assert len(names) == len(set(names)) == 1 + L * (1 + (H if heads else 1))
    _, against = contributions(model, prompts, [11, 200], [12, 12], heads=heads)
    np.testing.assert_allclose(
        against.sum(0), [ends[0] - logits[0, -1, 12], ends[1] - logits[1, 29, 12]], atol=1e-3)


def test_cumulative_attribution_is_the_lens_at_the_last_scale(model):
    """The parts up to tap k: (rms of tap k / rms of tap L) times the lens's logit there."""
    prompt = [1, 7, 70, 8, 71]
    _, shares = contributions(model, [prompt], [56])
    taps = taps_at(model, mx.array([prompt]), mx.array([[4]]))
    scale = lambda h: mx.sqrt((h ** 2).mean() + model.args.rms_norm_eps)
    for k, resid in enumerate(taps):
        lens_logit = (scale(resid) / scale(taps[-1]) * model.head(resid)[0, 0, 56]).item()
        assert abs(shares[:1 + 2 * k].sum() - lens_logit) < 1e-4


def test_heads_with_lora_sum_to_attention(model):
    apply_lora(model, 4, 8, ("q", "o"))
    for block in model.model.layers:
        block.self_attn.o_proj.lora_b = mx.random.normal(block.self_attn.o_proj.lora_b.shape)
    names, whole = contributions(model, [[1, 7, 70, 8, 71]], [56])
    named, split = contributions(model, [[1, 7, 70, 8, 71]], [56], heads=True)
    for block in (0, 1):
        heads = sum(split[named.index(f"L{block} head {i}"), 0] for i in (0, 1))
        assert abs(heads - whole[names.index(f"L{block} attn"), 0]) < 1e-4


def test_unembedding_rows_of_every_kind():
    """Tied, untied, quantised: the rows that the model itself multiplies with."""
    for family in ("llama3_2", "llama3_1"):
        model, _ = load(GOLDEN / family, "float32")
        head = model.model.embed_tokens if model.args.tie_word_embeddings else model.lm_head
        rows = unembedding_rows(model, mx.array([3, 100]))
        assert mx.allclose(rows, head.weight[mx.array([3, 100])], atol=1e-6)
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda path, _: path == "lm_head")
    rough = unembedding_rows(model, mx.array([3, 100]))
    assert 0 < mx.abs(rough - rows).max().item() < 0.02


def test_attribution_table(model, tokenizer):
    table = attribution_table(model, tokenizer, "7 * 8 = ", ["56", "15"])
    assert "'56' minus '15'" in table and table.splitlines()[-1].startswith("  L0")
    logits = model(mx.array([tokenizer.encode_prompt("7 * 8 = ")]))[0, -1]
    own, other = tokenizer.word_ids(["56", "15"])
    gap = (logits[own] - logits[other]).item()
    assert f"{gap:.2f} logits" in table


def test_command_line(small_folder):
    done = run("-m", "study.attribution", "--ckpt", small_folder, "--prompt", "7 * 8 = ",
               "--words", "56", "15", check=0)
    assert "'56' minus '15'" in done.stdout and done.stdout.count("\n  L") == 2
    command = ("-m", "study.attribution", "--ckpt", small_folder, "--prompt")
    done = run(*command, "7", "--words", "1", "2", "3")
    assert_one_clear_line(done, "--words takes one word or two, got 3")
    assert_one_clear_line(run(*command, "", "--words", "1"), "--prompt is empty")
    done = run(*command, "7 + " * 200, "--words", "1")
    assert_one_clear_line(done, "exceed the model's context of 128")


# --------------------------------------------------------------------------------------------------
# the Jacobian lens


def test_jacobian_against_finite_differences(tokenizer):
    """Mean over positions of the summed effect on this and later ones; the last tap is exact."""
    model = small_model(seed=3)
    prompts = [[1, 7, 70, 8, 71], [1, 9, 5]]
    directions = mx.random.normal((2, 32), key=mx.random.key(0))
    J = np.array(jacobian(model, prompts, directions))
    assert J.shape == (3, 2, 32)
    np.testing.assert_allclose(J[-1], np.array(directions), rtol=1e-6)
    step, k, feature = 1e-2, 1, 5
    nudge = mx.zeros((32,)).at[feature].add(step)
    total, count = np.zeros(2), 0
    for ids in prompts:
        for t in range(len(ids)):
            push = nudge * (mx.arange(len(ids)) == t)[None, :, None]                # (1, T, D)
            ends = [model.final_resid(mx.array([ids]), edit={k: lambda h, p=p: h + p})
                    for p in (push, -push)]
            change = (ends[0] - ends[1])[0].sum(0) / (2 * step)                     # (D,)
            total += np.array(directions @ change)
            count += 1
    np.testing.assert_allclose(J[k, :, feature], total / count, rtol=2e-2, atol=2e-3)


def test_jacobian_of_words_is_the_full_one_times_the_words(model):
    prompts = [[1, 7, 70, 8, 71]]
    words = word_directions(model, mx.array([1010, 1012]))
    full = jacobian(model, prompts, mx.eye(32))                                     # (L+1, D, D)
    np.testing.assert_allclose(np.array(jacobian(model, prompts, words)),
                               np.array(words @ full), atol=1e-4)
    reading = read_transported(model, prompts, [[56]], full)
    plain = read_prompts(model, prompts, [[56]], 1)
    np.testing.assert_allclose(reading.probs[-1], plain.probs[-1], rtol=1e-5)
    assert abs(reading.probs[1] - plain.probs[1]).max() > 1e-6

"""Who wrote a logit: parts that sum to it; the Jacobian lens against the exact Jacobian."""
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import FAMILIES, GOLDEN, TINY, assert_one_clear_line, run, small_model

from files.keys import BadInput
from lens import read_prompts, taps_at
from lora import apply_lora
from model import FORMULAS, load
from study import lens_quality
from study.attribution import attribution_table, contributions
from study.jacobian import (
    jacobian,
    last_token_stream,
    read_stream,
    transport,
    unembedding_rows,
    word_directions,
)
from study.lens_quality import SETS, best_ranks, forms_of, quality_table, read_items

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


def test_jacobian_is_the_exact_one_at_every_tap(monkeypatch):
    """Forward mode, one source position and feature at a time: another way to the same sums.

    The published definition: effects summed over target positions, averaged over sources."""
    model = small_model(seed=3)
    prompts = [[1, 7, 70, 8, 71], [1, 9, 5]]
    ours = np.array(jacobian(model, prompts, mx.eye(32)))                           # (L+1, D, D)
    for name, formula in FORMULAS.items():      # the faster kernels have no forward mode
        monkeypatch.setattr(f"model.{name}", formula)
    for k in (0, 1, 2):
        total = np.zeros((32, 32))
        for ids in prompts:
            tokens = mx.array([ids])
            final = lambda push, k=k, tokens=tokens: model.final_resid(
                tokens, edit={k: lambda h: h + push})
            zeros = mx.zeros((1, len(ids), 32))
            for t in range(len(ids)):
                for e in range(32):
                    tangent = zeros.at[0, t, e].add(1.0)
                    _, [change] = mx.jvp(final, [zeros], [tangent])
                    total[:, e] += np.array(change)[0].sum(0)
        np.testing.assert_allclose(ours[k], total / 8, atol=1e-4)


def test_jacobian_of_words_is_the_full_one_times_the_words(model):
    prompts = [[1, 7, 70, 8, 71]]
    words = word_directions(model, mx.array([1010, 1012]))
    full = jacobian(model, prompts, mx.eye(32))                                     # (L+1, D, D)
    np.testing.assert_allclose(np.array(jacobian(model, prompts, words)),
                               np.array(words @ full), atol=1e-4)
    reading = read_stream(model, transport(last_token_stream(model, prompts), full), [[56]])
    plain = read_prompts(model, prompts, [[56]], 1)
    np.testing.assert_allclose(reading.probs[-1], plain.probs[-1], rtol=1e-5)
    assert abs(reading.probs[1] - plain.probs[1]).max() > 1e-6


# --------------------------------------------------------------------------------------------------
# published items


def test_lens_quality_on_made_up_items(tokenizer, tmp_path):
    """Words in all their forms, the position that is read, ranks by hand, a fit that goes on."""
    assert forms_of("5") == ["5", "five"] and forms_of("50") == ["50", "fifty"]
    assert forms_of("multiplication") == ["multiplication", "multiply", "*"]
    items = [{"prompt": "7 * 8 = ", "intermediates": ["multiplication", "zyxwv"]},
             {"prompt": "23 + 45 = ", "intermediates": ["68"]},
             {"prompt": "9 + 1 = ", "intermediates": ["zyxwv"]}]
    for name in SETS:
        text = json.dumps({"items": [{**i, "prompt": i["prompt"] + "\n" * (name == "poetry")}
                                     for i in items]})
        (tmp_path / f"lens-eval-{name}.json").write_text(text)
    prompts, words, left_out = read_items(tmp_path, "multihop", tokenizer)
    assert left_out == 2 and prompts == [tokenizer.encode_prompt("7 * 8 ="),
                                         tokenizer.encode_prompt("23 + 45 =")]
    assert set(words[0][0]) == set(tokenizer.word_ids(["multiply"]) + tokenizer.word_ids(["*"]))
    model, _ = load(TINY)
    ranks = best_ranks(model, last_token_stream(model, prompts), words)
    ids = [*words[0][0], *words[1][0]]
    reading = read_prompts(model, prompts, [ids] * 2)
    assert ranks[0] == [reading.ranks[1:, 0, 0, :len(words[0][0])].min()]
    assert ranks[1] == [reading.ranks[1:, 1, 0, -1].min()] == [1]      # its answer, at the output
    command = ("-m", "study.lens_quality", "--ckpt", TINY, "--from", tmp_path)
    (tmp_path / "lens-eval-typo.json").write_text('{"items": [{"prompt": 3}]}')
    assert_one_clear_line(run(*command), "lens-eval-typo.json", "prompt = 3", "intermediates")


def test_fit_of_the_whole_jacobian_goes_on(tokenizer, tmp_path, monkeypatch):
    """Killed behind its first part, it ends as the one that was left alone."""
    model = small_model(seed=4)
    monkeypatch.setattr(lens_quality, "own_texts", lambda *_: [[1, 7, 70, 8], [1, 9, 5, 6]])
    whole = lens_quality.fit(model, tokenizer, tmp_path / "a.safetensors")
    assert whole.shape == (3, 32, 32)
    monkeypatch.setattr(lens_quality, "AT_A_TIME", 5)
    arrays, about = mx.load(str(tmp_path / "a.safetensors"), return_metadata=True)
    first = arrays["jacobian"][:, :10]
    mx.save_safetensors(str(tmp_path / "b.safetensors"), {"jacobian": first * 2}, about)
    again = np.array(lens_quality.fit(model, tokenizer, tmp_path / "b.safetensors"))
    np.testing.assert_allclose(again[:, :10], 2 * np.array(whole)[:, :10], atol=1e-5)
    np.testing.assert_allclose(again[:, 10:], np.array(whole)[:, 10:], atol=1e-5)
    with pytest.raises(BadInput, match="fitted on another model"):
        model.model.norm.weight = 2 * model.model.norm.weight
        lens_quality.fit(model, tokenizer, tmp_path / "b.safetensors")


def test_quality_table_takes_differences_item_by_item():
    """By hand: two items of one and two words; 50 points at k 1, 75 at k 10."""
    figures = {f"{name} {lens}": {"left_out": 1, "ranks": ranks} for name in SETS
               for lens, ranks in (("logit", [[30], [2, 40]]), ("Jacobian", [[1], [9, 400]]))}
    line = quality_table(figures).splitlines()[2:5]
    logit, other, difference = ([cell.strip() for cell in row.split("|")[1:-1]] for row in line)
    assert logit[:5] == ["association", "2", "1", "logit", "30"] and other[3:5] == ["Jacobian", "9"]
    assert [row[5].split()[0] for row in (logit, other, difference)] == ["0.0", "50.0", "50.0"]
    assert [row[7].split()[0] for row in (logit, other, difference)] == ["25.0", "75.0", "50.0"]

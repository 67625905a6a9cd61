"""The lens is the model: same stream, same head, no future; and its statistics against numpy."""
import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    GOLDEN,
    assert_one_clear_line,
    random_model,
    run,
    small_config,
    small_model,
    write_model,
)

import lens
import model as model_file
from lens import (
    attribution_table,
    contributions,
    depth,
    final_distribution,
    jacobian,
    read_logits,
    read_prompts,
    read_taps,
    saturation,
    taps_at,
    terminal_table,
    unembedding_rows,
    view_prompt,
    word_directions,
)
from lora import apply_lora
from model import Llama, gather_positions, load
from plot import lens_page
from tokenizer import load_tokenizer


def test_last_tap_is_the_model():
    """On all four families: the lens at tap L has the golden logits' probabilities.

    Tap 0 has the embedding's.
    """
    for family in FAMILIES:
        model, _ = load(GOLDEN / family, "float32")
        expected = mx.load(str(GOLDEN / family / "expected.safetensors"))
        tokens = expected["tokens"]
        targets = mx.broadcast_to(mx.arange(320), (2, 2, 320))
        reading = read_taps(model, tokens, mx.array([[5, 95], [40, 0]]), targets, k=3)
        for b, a, position in ((0, 0, 5), (0, 1, 95), (1, 0, 40), (1, 1, 0)):
            middle = model.head(expected["residuals"][2, b, position])
            for tap, logits in ((-1, expected["logits"][b, position]), (2, middle)):
                probs = np.array(mx.softmax(logits))
                np.testing.assert_allclose(reading.probs[tap, b, a], probs, atol=1e-4)
                assert reading.top_ids[tap, b, a].tolist() == np.argsort(-probs)[:3].tolist()
                assert abs(reading.entropy[tap, b, a] + (probs * np.log(probs)).sum()) < 1e-3
        assert reading.probs.shape == (5, 2, 2, 320)


def read_alone(logits, targets, k, final=None):
    """read_logits on numpy logits (B, A, V), one tap, in the order of a Reading's fields."""
    logits = mx.array(np.asarray(logits, np.float32))
    final = logits if final is None else mx.array(np.asarray(final, np.float32))
    arrays = read_logits(logits, mx.array(targets), k, *final_distribution(final))
    return [np.array(a) for a in arrays]


def test_ranks_and_ties_against_numpy():
    """Ranks by comparison equal ranks by sorting.

    Exact ties are counted, not broken by position.
    """
    logits = np.random.default_rng(0).integers(0, 12, (2, 3, 40)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 40, (2, 3, 5))
    _, ranks, ties, *_ = read_alone(logits, targets, 1)
    for index in np.ndindex(2, 3, 5):
        row, chosen = logits[index[:2]], logits[index[:2]][targets[index]]
        assert ranks[index] == 1 + (row > chosen).sum()
        assert ties[index] == (row == chosen).sum() - 1


@pytest.mark.parametrize("V", [50, 1280])   # the second is reduced and searched in groups of 128
def test_statistics_against_numpy(V):
    """Log-probability, entropy, KL from the last tap and its token's probability, in float64."""
    rng = np.random.default_rng(2)
    logits, final = rng.normal(0, 3, (2, 1, 2, V))
    log_softmax = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))
    p, q = log_softmax(logits), log_softmax(final)
    probs, _, _, logprobs, entropy, kl, final_probs, top, top_probs = read_alone(
        logits, [[[3], [4]]], 4, final)
    np.testing.assert_allclose(logprobs[0, :, 0], [p[0, 0, 3], p[0, 1, 4]], rtol=1e-5)
    np.testing.assert_allclose(probs, np.exp(logprobs), rtol=1e-6)
    np.testing.assert_allclose(entropy, -(np.exp(p) * p).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(kl, (np.exp(q) * (q - p)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(
        final_probs[0], [np.exp(p[0, t, q[0, t].argmax()]) for t in (0, 1)], rtol=1e-5)
    assert np.array_equal(top, np.argsort(-p)[..., :4]) and (np.diff(top_probs) <= 0).all()


def test_taps_at_once_change_nothing(model, monkeypatch):
    """One head call for all taps or one a tap; all rows reduced together or one by one."""
    prompts, targets = [[1, 7, 70, 8, 71], [1, 9, 5]], [[5, 6], [7, 8]]
    together = read_prompts(model, prompts, targets, 3)
    monkeypatch.setattr(lens, "LOGITS_PER_CALL", 1)
    monkeypatch.setattr(lens, "LOGITS_IN_CACHE", 1)
    alone = read_prompts(model, prompts, targets, 3)
    for name in lens.Reading.__dataclass_fields__:
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=1e-4,
                                   atol=1e-5)


# --------------------------------------------------------------------------------------------------
# what would go wrong, on purpose: each mutation must make check_lens fail


def check_lens(family="llama3_2"):
    """The lens against numpy on golden residuals, at every tap, and no look into the future."""
    model, _ = load(GOLDEN / family, "float32")
    expected = mx.load(str(GOLDEN / family / "expected.safetensors"))
    tokens, position = expected["tokens"][:1], 40
    resids = np.array(expected["residuals"][:, 0, position].astype(mx.float32), np.float64)
    gain = np.array(model.model.norm.weight, np.float64)
    unembed = np.array(model.model.embed_tokens.weight, np.float64)
    normed = gain * resids / np.sqrt((resids ** 2).mean(-1, keepdims=True) + 1e-5)
    logits = normed @ unembed.T                                                     # (L+1, V)
    probs = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    every = mx.broadcast_to(mx.arange(320), (1, 1, 320))
    read = lambda ids: read_taps(model, ids, mx.array([[position]]), every)
    reading = read(tokens)
    np.testing.assert_allclose(reading.probs[:, 0, 0], probs, atol=2e-4)
    other = mx.concatenate([tokens[:, :position + 1], 5 - tokens[:, position + 1:] % 3], axis=1)
    np.testing.assert_allclose(read(other).probs, reading.probs, atol=1e-6)


def head_without_norm(self, resid):
    return self.unembed(resid).astype(mx.float32)


def head_with_cached_scale(self, resid):
    """Every tap divided by the last tap's length: DLA's scale, not the lens's."""
    if not hasattr(self, "_last"):
        self._last = mx.sqrt((resid[-1] ** 2).mean(-1, keepdims=True) + 1e-5)   # tap L
    return self.unembed(resid / self._last * self.model.norm.weight).astype(mx.float32)


MUTATIONS = {
    "norm dropped": (Llama, "head", head_without_norm),
    "scale cached": (Llama, "head", head_with_cached_scale),
    "position shifted": (lens, "gather_positions",
                         lambda resid, positions: gather_positions(resid, positions - 1)),
    "mask dropped": (model_file, "attention", lambda q, k, v, scale, mask:
                     mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=None)),
}


def test_lens_is_right_and_causal():
    check_lens()


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_lens()


# --------------------------------------------------------------------------------------------------
# depth


def test_depth_by_hand():
    blip = [0, .1, .6, .2, .7, .8, .9, 1]
    assert depth(blip, .5) == {"first": 2, "onset": 4, "sustained": 4, "peak": 6}
    # readable from tap 0 on: it never rose. A word that fades again: not sustained
    assert depth([.9, .9, .9, .9, .1], .5) == {"first": 1, "onset": -1, "sustained": 1, "peak": 1}
    fades = [0, 0, .8, .9, .8, .1, 0, 0]
    assert depth(fades, .5) == {"first": 2, "onset": 2, "sustained": -1, "peak": 3}
    never = [0, .1, .2, .1, 1]
    assert depth(never, .5) == {"first": -1, "onset": -1, "sustained": -1, "peak": 2}


def test_saturation_by_hand():
    """Three cells over taps 0..3: settled from tap 2, from the start, only at the end."""
    top = np.array([[1, 7, 3], [2, 7, 4], [5, 7, 3], [5, 7, 9]])
    assert saturation(top).tolist() == [2, 0, 3]


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


# --------------------------------------------------------------------------------------------------
# the Jacobian lens and edits


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
    reading = read_prompts(model, prompts, [[56]], 1, full)
    plain = read_prompts(model, prompts, [[56]], 1)
    np.testing.assert_allclose(reading.probs[-1], plain.probs[-1], rtol=1e-5)
    assert abs(reading.probs[1] - plain.probs[1]).max() > 1e-6


def test_edit_reaches_its_tap_and_what_follows(model):
    tokens = mx.array([[1, 7, 70, 8, 71]])
    clean = np.array(model.residuals(tokens))
    same = np.array(mx.stack(list(model.stream(tokens, edit={1: lambda h: h}))))
    assert np.array_equal(same, clean)
    pushed = np.array(mx.stack(list(model.stream(tokens, edit={1: lambda h: h + 1}))))
    assert np.array_equal(pushed[0], clean[0])
    np.testing.assert_allclose(pushed[1], clean[1] + 1, rtol=1e-6)
    assert abs(pushed[2] - clean[2]).max() > 0.1
    at_end = {2: mx.zeros_like}
    assert mx.array_equal(model(tokens, edit=at_end), model.head(mx.zeros((1, 5, 32))))


def test_attribution_table(model, tokenizer):
    table = attribution_table(model, tokenizer, "7 * 8 = ", ["56", "15"])
    assert "'56' minus '15'" in table and table.splitlines()[-1].startswith("  L0")
    logits = model(mx.array([tokenizer.encode_prompt("7 * 8 = ")]))[0, -1]
    right, wrong = tokenizer.word_ids(["56", "15"])
    gap = (logits[right] - logits[wrong]).item()
    assert f"{gap:.2f} logits" in table


def test_words_follow_the_form_that_the_prompt_asks_for(word_bpe, tmp_path):
    """After "is" a word comes with its space, behind a space without; a set in one form."""
    raw = {**small_config(), "vocab_size": 900}
    folder = write_model(tmp_path / "m", raw, word_bpe)
    done = run("lens.py", "--ckpt", folder, "--prompt", "x is", "--words", "Paris", "London",
               "--attribute", "Paris", "add", "--json", tmp_path / "v.json", check=0)
    words = json.loads((tmp_path / "v.json").read_text())["words"]
    assert [words[w]["piece"] for w in ("Paris", "London")] == ["·Paris", "·London"]
    assert f"'Paris', token ·Paris ({words['Paris']['id']}), at the last" in done.stdout
    assert "minus 'add' (tokens ·Paris (" in done.stdout
    model, loaded = random_model(raw), load_tokenizer(folder)
    for words, pieces in ((["Paris", "add"], ["Paris", "add"]), ([" Paris"], ["·Paris"]),
                          (["Paris", "subtract"], ["·Paris", "·subtract"])):
        view = view_prompt(model, loaded, "x is ", words)
        assert [series["piece"] for series in view["words"].values()] == pieces


def test_padding_changes_nothing(model, tokenizer):
    """A short prompt beside a long one reads the same as alone."""
    prompts = [tokenizer.encode_prompt(t)
               for t in ("7 * 8 = ", "what is seventy two plus nine = ")]
    together = read_prompts(model, prompts, [[5], [9]])
    for i, (prompt, target) in enumerate(zip(prompts, ([5], [9]))):
        alone = read_prompts(model, [prompt], [target])
        np.testing.assert_allclose(together.probs[:, i], alone.probs[:, 0], rtol=1e-4)


def test_view_holds_what_the_pictures_show(model, tokenizer):
    view = view_prompt(model, tokenizer, "7 * 8 = ", ["multiply", "56"])
    assert view["tokens"] == ["<s>", "·7", "·*", "·8", "·="]
    assert view["taps"] == ["embed", "L0", "L1"]
    assert np.array(view["top"], dtype=object).shape == (3, 5, 10, 2)
    table = terminal_table(view, color=False)
    lines = table.splitlines()
    assert lines[1].startswith("L1") and lines[3].startswith("embed")  # the last block on top
    assert view["top"][2][4][0][0][:7] in lines[1]
    assert "'multiply'" in table and "\033" not in table
    assert "\033[48;5;" in terminal_table(view, color=True)
    logits = model(mx.array([tokenizer.encode_prompt("7 * 8 = ")]))[0, -1]
    probs = np.array(mx.softmax(logits))
    assert abs(view["words"]["56"]["prob"][-1] - probs[tokenizer.word_ids(["56"])[0]]) < 1e-5


def test_page_is_self_contained_and_escaped():
    cell = [["<b>&", 0.7]] + [[f"t{i}", 0.01] for i in range(9)]
    view = {"prompt": "<script>alert(1)</script>", "tokens": ["<s>"], "taps": ["embed", "L0"],
            "top": [[cell], [cell]], "entropy": [[1.0], [2.0]]}
    page = lens_page(view)
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;&amp;" in page
    assert not re.search(r"(src|href)\s*=|https?:|url\(", page) and page.count('class="tip"') == 2


def test_command_line_writes_all_pictures(small_folder, tmp_path):
    files = [tmp_path / f"x.{kind}" for kind in ("png", "html", "json")]
    done = run("lens.py", "--ckpt", small_folder, "--prompt", "7 * 8 = ", "--words", "multiply",
               "--png", files[0], "--html", files[1], "--json", files[2], check=0)
    assert "L1" in done.stdout and "embed" in done.stdout
    assert files[0].read_bytes().startswith(b"\x89PNG") and "<html" in files[1].read_text()
    assert json.loads(files[2].read_text())["prompt"] == "7 * 8 = "


def test_bad_input(small_folder):
    done = run("lens.py", "--ckpt", small_folder, "--prompt", "x", "--words", "zebra")
    assert_one_clear_line(done, "'zebra' is", "must be one token")
    for script in ("lens.py", "generate.py"):
        done = run(script, "--ckpt", small_folder, "--prompt", "7 + " * 200)
        assert_one_clear_line(done, "exceed the model's context of 128")
    done = run("lens.py", "--ckpt", small_folder, "--prompt", "7", "--attribute", "1", "2", "3")
    assert_one_clear_line(done, "--attribute takes one word or two, got 3")
    done = run("lens.py", "--ckpt", small_folder, "--prompt", "")
    assert_one_clear_line(done, "--prompt is empty")

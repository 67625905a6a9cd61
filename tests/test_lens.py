"""The lens is the model: same stream, same head, no future; and its statistics against numpy."""
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    GOLDEN,
    assert_one_clear_line,
    random_model,
    run,
    small_config,
    write_model,
)

import lens
import model as model_file
from engine import memory
from lens import final_distribution, read_prompts, read_taps, tap_statistics, view_prompt
from model import Llama, gather_positions, load
from report.lens_view import lens_table
from text.tokenizer import load_tokenizer


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
    """tap_statistics on numpy logits (B, A, V), one tap, in the order of a Reading's fields."""
    B, A, V = np.shape(logits)
    rows = lambda x: mx.array(np.asarray(x, np.float32).reshape(B * A, V))
    logits, final = rows(logits), rows(logits if final is None else final)
    targets = mx.array(targets).reshape(B * A, -1)
    arrays = tap_statistics(logits, targets, *final_distribution(final), k)
    return [np.array(a).reshape(B, A, *a.shape[1:]) for a in arrays]


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


def test_ranks_see_differences_that_the_largest_logit_would_round_away():
    """20 + 1e-8 is 20 in float32: ranks compare the logits themselves, as the model made them."""
    logits = np.array([[[20, 1e-8, 2e-8, 3e-8]]], np.float32)
    _, ranks, ties, *_ = read_alone(logits, np.array([[[1, 2, 3]]]), 1)
    assert ranks.tolist() == [[[4, 3, 2]]] and not ties.any()


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
    for file in (lens, memory):
        monkeypatch.setattr(file, "LOGITS_PER_CALL", 1)
    monkeypatch.setattr(memory, "LOGITS_REDUCED", 1)
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
    "mask dropped": (model_file, "attention", lambda q, k, v, mask:
                     mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5,
                                                          mask=None)),
}


def test_lens_is_right_and_causal():
    check_lens()


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_lens()


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


def test_words_follow_the_form_that_the_prompt_asks_for(word_bpe, tmp_path):
    """After "is" a word comes with its space, behind a space without; a set in one form."""
    raw = {**small_config(), "vocab_size": 900}
    folder = write_model(tmp_path / "m", raw, word_bpe)
    done = run("lens.py", "--ckpt", folder, "--prompt", "x is", "--words", "Paris", "London",
               "--json", tmp_path / "v.json", check=0)
    words = json.loads((tmp_path / "v.json").read_text())["words"]
    assert [words[w]["piece"] for w in ("Paris", "London")] == ["·Paris", "·London"]
    assert f"'Paris', token ·Paris ({words['Paris']['id']}), at the last" in done.stdout
    done = run("-m", "study.attribution", "--ckpt", folder, "--prompt", "x is",
               "--words", "Paris", "add", check=0)
    assert "minus 'add' (tokens ·Paris (" in done.stdout
    model, loaded = random_model(raw), load_tokenizer(folder)
    for words, pieces in ((["Paris", "add"], ["·Paris", "·add"]), ([" Paris"], ["·Paris"]),
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


def test_what_prompts_share_is_read_once(model, monkeypatch):
    """Every field as without; three lengths behind twelve tokens that all begin with."""
    prompts = [[*range(30, 42), *range(100, 101 + i % 3)] for i in range(8)]
    once = read_prompts(model, prompts, [[5]] * 8, 2)
    monkeypatch.setattr("engine.decode.SHARED", 10 ** 9)
    plain = read_prompts(model, prompts, [[5]] * 8, 2)
    for field in ("logprobs", "entropy", "kl", "top_probs"):
        np.testing.assert_allclose(getattr(once, field), getattr(plain, field), atol=2e-5)
    np.testing.assert_array_equal(once.top_ids, plain.top_ids)
    # it was read once: what a row adds is all that the blocks see of it
    seen, run_block = [], Llama.run_block
    monkeypatch.setattr("engine.decode.SHARED", 8)
    monkeypatch.setattr(Llama, "run_block", lambda self, block, resid, *rest: seen.append(
        resid.shape[:2]) or run_block(self, block, resid, *rest))
    read_prompts(model, prompts, [[5]] * 8)
    assert seen[0] == (1, 12) and {T for _, T in seen[model.args.num_hidden_layers:]} == {3}


def test_view_holds_what_the_pictures_show(model, tokenizer):
    view = view_prompt(model, tokenizer, "7 * 8 = ", ["multiply", "56"])
    assert view["tokens"] == ["<s>", "·7", "·*", "·8", "·="]
    assert view["taps"] == ["embed", "L0", "L1"]
    assert np.array(view["top"], dtype=object).shape == (3, 5, 10, 2)
    table = lens_table(view, color=False)
    lines = table.splitlines()
    assert lines[1].startswith("L1") and lines[3].startswith("embed")  # the last block on top
    assert view["top"][2][4][0][0][:7] in lines[1]
    assert "'multiply'" in table and "\033" not in table
    assert "\033[48;5;" in lens_table(view, color=True)
    logits = model(mx.array([tokenizer.encode_prompt("7 * 8 = ")]))[0, -1]
    probs = np.array(mx.softmax(logits))
    assert abs(view["words"]["56"]["prob"][-1] - probs[tokenizer.word_ids(["56"])[0]]) < 1e-5


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
    done = run("lens.py", "--ckpt", small_folder, "--prompt", "")
    assert_one_clear_line(done, "--prompt is empty")

"""Sampling against plain forward passes, exact distributions, and itself batched otherwise."""
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, assert_one_clear_line, run

import generate
from engine.decode import in_batches, shared_length
from generate import choose, sample
from losses import token_logprobs
from model import Llama, load
from report.conversation import stream_text

TEXTS = ["7 * 8 = ", "12 + 5 = ", "what is nine minus two = ", "add one and two = ", "3 - 1 = "]


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer.encode_prompt(text) for text in TEXTS]


def test_greedy_equals_no_cache(model, tokenizer, prompts):
    """Batched, left-padded and cached, against one prompt at a time without a cache."""
    for ids, completion in zip(prompts, sample(model, tokenizer, prompts, 6)):
        expected = list(ids)
        for _ in range(6):
            expected.append(mx.argmax(model(mx.array([expected]))[0, -1]).item())
            if expected[-1] in tokenizer.stop_ids:
                break
        assert expected[len(ids):] == completion.ids


def test_left_padding_leaves_the_stream_as_it_is(model, prompts):
    """Padded prompts' last residuals against each prompt by itself."""
    tokens, start = generate.left_pad(prompts)
    padded = model.final_resid(tokens, model.make_cache(tokens.shape[1], start))[:, -1]
    for i, ids in enumerate(prompts):
        alone = model.final_resid(mx.array([ids]))[0, -1]
        assert mx.abs(padded[i] - alone).max().item() < 1e-5


def test_kept_logprobs_and_entropy(model, tokenizer, prompts):
    """Against a full forward pass at the same temperature, in float64."""
    for completion, ids in zip(sample(model, tokenizer, prompts, 6, temperature=0.8,
                                      key=mx.random.key(3)), prompts):
        logits = model(mx.array([ids + completion.ids]))[0, len(ids) - 1:-1] / 0.8
        expected = np.array(token_logprobs(logits, mx.array(completion.ids)))
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        p = np.array(mx.softmax(logits, axis=-1), np.float64)
        np.testing.assert_allclose(completion.entropies, -(p * np.log(p)).sum(-1), atol=1e-4)


def test_batching_and_dropping_change_no_token(model, tokenizer, prompts, monkeypatch):
    """All rows together, one prompt a batch, and no row ever dropped: the same completions."""
    draw = lambda: [c.ids for c in sample(model, tokenizer, prompts, 12, group=4, temperature=1.0,
                                          key=mx.random.key(0))]
    # make stopping likely: every tenth token is a stop
    monkeypatch.setattr(tokenizer, "stop_ids", set(range(0, 1394, 10)))
    together = draw()
    assert 3 < len({len(ids) for ids in together})
    monkeypatch.setattr(generate, "DECODED_ROWS", 4)
    assert draw() == together
    monkeypatch.setattr(generate, "DECODED_ROWS", 512)
    monkeypatch.setattr(generate.np, "flatnonzero", lambda x: np.nonzero(np.ravel(x))[0])
    alone = [c.ids for i in range(len(prompts)) for c in sample(
        model, tokenizer, [prompts[i]], 12, temperature=0.0)]
    assert alone == [c.ids for c in sample(model, tokenizer, prompts, 12)]


def few_shot(lengths):
    """Prompts of these lengths behind 20 tokens that all share."""
    rng = np.random.default_rng(0)
    return [[*range(30, 50), *rng.integers(100, 900, n).tolist()] for n in lengths]


@pytest.mark.parametrize("lengths", ([2] * 9 + [3] * 9, [1] * 8, [1, 2, 3, 4]), ids=str)
def test_what_prompts_share_is_read_once(model, tokenizer, monkeypatch, lengths):
    """The same tokens and log-probabilities as without; the shared tokens of one row alone read."""
    prompts, seen, stream = few_shot(lengths), [], Llama.stream

    def counted(self, tokens, *args, **kwargs):
        seen.append(tokens.size)
        return stream(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Llama, "stream", counted)
    draw = lambda: sample(model, tokenizer, prompts, 3, group=2, temperature=1.0,
                          key=mx.random.key(5))
    once = draw()
    read_once, batches = seen[0] == 20, len(set(lengths))
    assert read_once == (len(lengths) > 4)      # too few of a length: padded, and all is read
    if read_once:
        prompt_tokens = 20 * batches + sum(lengths)
        assert prompt_tokens <= sum(seen) <= prompt_tokens + 2 * 2 * len(prompts)   # and 2 steps
    monkeypatch.setattr("engine.decode.SHARED", 10 ** 9)
    for a, b in zip(once, draw(), strict=True):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("at_once", [4, 512])
def test_kept_taps_are_those_of_each_prompt_alone(model, tokenizer, prompts, monkeypatch, at_once):
    """Padded or behind a shared beginning, in batches or not: the stream at the last token."""
    monkeypatch.setattr(generate, "DECODED_ROWS", at_once)
    prompts = prompts + few_shot([2] * 9)
    done = sample(model, tokenizer, prompts, 3, group=2, keep_taps=True)
    for i, ids in enumerate(prompts):
        alone = np.array(model.residuals(mx.array([ids]))[:, 0, -1])                # (L+1, D)
        for completion in done[2 * i:2 * i + 2]:
            np.testing.assert_allclose(np.array(completion.taps), alone, atol=2e-5)
    assert sample(model, tokenizer, prompts, 1)[0].taps is None


def test_shared_length_leaves_a_token_of_each():
    assert shared_length([[5, 6, 7], [5, 6, 8, 9], [5, 6, 7, 1]]) == 2
    assert shared_length([[1, 2, 3], [1, 2, 3]]) == 2 and shared_length([[1], [1, 2]]) == 0


def test_batches_of_one_length_only_where_they_spare_more_than_they_cost():
    """By hand: 64 prompts of 8 lengths share 20 tokens; 7 further batches of 1 or of 16 steps."""
    prompts = few_shot([n % 8 + 1 for n in range(64)])
    assert [len(part) for part in in_batches(prompts, 512, 1)] == [8] * 8       # 1280 > 7 * 32
    assert [len(part) for part in in_batches(prompts, 512, 16)] == [64]         # 1280 < 7 * 512
    short = [[1, 2, 3, 4, 10 + i] + [9] * (i % 2) for i in range(16)]   # 4 are not worth a pass
    assert len(in_batches(short, 512, 1)) == 1


def test_choose_draws_the_distribution():
    """100,000 evenly spaced uniforms give each token its probability; entropy and log-p exact."""
    logits = np.array([1.0, 3.0, -2.0, 0.5, 2.0], np.float32)
    uniforms = mx.array((np.arange(100_000) + 0.5) / 100_000)
    many = mx.broadcast_to(mx.array(logits), (100_000, 5))
    for temperature in (1.0, 0.5):
        p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        tokens, logprobs, entropy = choose(many, uniforms, temperature)
        share = np.bincount(np.array(tokens), minlength=5) / 100_000
        np.testing.assert_allclose(share, p, atol=2e-5)
        np.testing.assert_allclose(np.array(logprobs), np.log(p)[np.array(tokens)], atol=1e-5)
        np.testing.assert_allclose(np.array(entropy)[0], -(p * np.log(p)).sum(), atol=1e-5)


@pytest.mark.parametrize("keys,allowed", [
    ({"top_k": 2}, {1, 4}), ({"top_p": 0.5}, {1}), ({"top_p": 0.7}, {1, 4}),
    ({"top_k": 3, "top_p": 0.99}, {0, 1, 4}), ({"top_k": 99}, {0, 1, 2, 3, 4})])
def test_top_k_and_top_p(keys, allowed):
    """p = .09, .64, .004, .05, .22: what is left keeps its proportions, and its own log-p."""
    logits = mx.broadcast_to(mx.array([1.0, 3.0, -2.0, 0.5, 2.0]), (20_000, 5))
    tokens, logprobs, _ = choose(logits, mx.array((np.arange(20_000) + 0.5) / 20_000), 1.0, **keys)
    p = np.array(mx.softmax(logits[0]))
    share = np.bincount(np.array(tokens), minlength=5) / 20_000
    kept = np.array([p[i] if i in allowed else 0 for i in range(5)])
    np.testing.assert_allclose(share, kept / kept.sum(), atol=2e-4)
    np.testing.assert_allclose(np.array(logprobs), np.log(p)[np.array(tokens)], atol=1e-5)


def test_extreme_uniforms_choose_a_possible_token():
    """0 and the largest float below 1 never name a token of probability 0."""
    logits = mx.array([[-1e9, 2.0, -1e9]] * 2)
    tokens, _, _ = choose(logits, mx.array([0.0, float(np.nextafter(np.float32(1), 0))]), 1.0)
    assert tokens.tolist() == [1, 1]


def test_stops_at_eos_or_line_break(model, tokenizer, prompts, monkeypatch):
    eos, line_break = tokenizer.eos_id, tokenizer.encode("\n")[-1]
    assert {eos, line_break} <= tokenizer.stop_ids and tokenizer.encode("56")[0] not in (
        tokenizer.stop_ids)
    script = iter([*tokenizer.encode("56"), line_break, *tokenizer.encode("57"), eos])

    def scripted(logits, *_):
        return mx.full(len(logits), next(script)), mx.zeros(len(logits)), mx.zeros(len(logits))
    monkeypatch.setattr(generate, "choose", scripted)
    done = sample(model, tokenizer, prompts[:1], 4)[0]
    assert done.ids[-1] == line_break and done.text == "56" and done.finished


def test_a_stop_text_over_several_tokens(model, tokenizer, prompts, monkeypatch):
    """"\\nUser:" is six tokens here, and none of them alone is a stop."""
    ids = [*tokenizer.encode("56"), *tokenizer.encode("\nUser: 3")[1:], *tokenizer.encode("7 8")]
    assert [tokenizer.piece(i) for i in ids[:7]] == ["·56", "<0x0A>", "U", "s", "e", "r", ":"]
    calls = []

    def scripted(logits, *_):
        calls.append(len(logits))
        token = ids[len(calls) - 1] if len(calls) <= len(ids) else ids[0]
        return mx.full(len(logits), token), mx.zeros(len(logits)), mx.zeros(len(logits))
    monkeypatch.setattr(generate, "choose", scripted)
    done = sample(model, tokenizer, prompts[:1], 64, temperature=1.0, many_lines=True,
                  stops=("\nUser:", "\n\n", "7 8"))[0]
    assert (done.text, done.stop, done.finished) == ("56", "\nUser:", True)
    assert done.ids == ids[:7] and len(done.logprobs) == len(done.entropies) == 7
    assert len(calls) == 8      # it left at the next look and not at the limit
    calls.clear()
    done = sample(model, tokenizer, prompts[:1], 6, many_lines=True, stops=("\nUser:",))[0]
    assert (done.text, done.stop, done.finished) == ("56\nUser", "", False)


def test_stop_texts_cut_and_change_nothing_else(model, tokenizer, prompts):
    """Rows with a stop, EOS or neither: each as without stops, cut at the first one."""
    draw = lambda **keys: sample(model, tokenizer, prompts, 24, group=4, temperature=1.0,
                                 key=mx.random.key(7), many_lines=True, **keys)
    whole = draw()
    stops = (whole[0].text[5:8], whole[1].text[9:11], whole[2].text[-3:])
    hit = 0
    for free, cut in zip(whole, draw(stops=stops)):
        found = [free.text.index(s) for s in stops if s in free.text]
        assert cut.text == free.text[:min(found, default=None)]
        assert cut.ids == free.ids[:len(cut.ids)] and cut.finished == (free.finished or found != [])
        if found:
            hit += 1
            assert free.text[min(found):].startswith(cut.stop) and cut.stop in stops
            assert cut.stop in tokenizer.decode(cut.ids)
            assert not any(s in tokenizer.decode(cut.ids[:-1]) for s in stops)
        else:
            assert cut.ids == free.ids and cut.stop == ""
    assert 3 <= hit < len(whole)


def test_cut_completion_is_not_finished(model, tokenizer, prompts):
    done = sample(model, tokenizer, prompts, 2)
    assert all(c.finished == (c.ids[-1] in tokenizer.stop_ids) for c in done)
    assert not all(c.finished for c in done)


def test_streaming_equals_sampling():
    model, tokenizer = load(TINY)
    for text in TEXTS:
        ids, key = tokenizer.encode_prompt(text), mx.random.key(5)
        whole = sample(model, tokenizer, [ids], 8, temperature=1.5, key=key)[0].text
        hot = partial(generate.choose, temperature=1.5)
        assert "".join(stream_text(model, tokenizer, ids, 8, hot, key)) == whole


def test_command_line():
    ask = lambda *words: run("generate.py", "--ckpt", TINY, "--prompt", "3 + 4 = ", *words, check=0)
    assert ask().stdout == "3 + 4 = 7\n"
    hot = ("--temperature", 3, "--max-tokens", 5)
    assert ask(*hot, "--seed", 1).stdout == ask(*hot, "--seed", 1).stdout
    assert len({ask(*hot, "--seed", seed).stdout for seed in range(3)}) > 1
    assert ask(*hot, "--top-k", 1).stdout == "3 + 4 = 7\n"


@pytest.mark.parametrize("words", [
    ("--temperature", -1), ("--temperature", "nan"), ("--temperature", "inf"), ("--top-p", 0),
    ("--top-k", -1), ("--max-tokens", 0)])
def test_bad_values(words):
    done = run("generate.py", "--ckpt", TINY, "--prompt", "3 + 4 = ", *words)
    assert_one_clear_line(done, words[0].strip("-"), "expected")

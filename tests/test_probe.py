"""The probe against scikit-learn, edits by hand, and the causal check where the truth is known."""
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, assert_one_clear_line, config, random_model, run, small_config
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from checkpoint import load_base
from engine.decode import pad_prompts
from files.keys import BadInput
from model import gather_positions
from study.jacobian import last_token_stream, own_texts, read_stream, word_directions
from study.probe import (
    balanced_accuracy,
    choose_l2,
    control_labels,
    corrected_choice,
    fit_probe,
    four_claims,
    jacobian_taps,
    lens_taps,
)
from study.prompts import make_matched, masked_prompts, matched_problems
from study.swaps import (
    class_means,
    effect,
    exchange,
    fit_subspace,
    make_edits,
    make_swaps,
    orthonormal,
    outcome,
    read_streams,
    span,
    swap_lengths,
    swap_taps,
    unedited,
)
from tasks.__main__ import write_task
from text.arithmetic import split_of


@pytest.fixture(scope="module")
def tiny():
    """The bundled model: it adds and subtracts, so edits have something to change."""
    return load_base(TINY)


@pytest.fixture(scope="module")
def read(tiny):
    """Its matched prompts, their streams, and the swaps of test pairs."""
    model, tokenizer = tiny
    matched = make_matched(config(), tokenizer, 40)
    swaps = make_swaps(tokenizer, matched, ("add", "subtract"), ("test",))
    return matched, read_streams(model, matched.prompts), swaps


# --------------------------------------------------------------------------------------------------
# the probe


def planted(n, seed, strength=1.0, D=20, C=3):
    """Rows of noise with one direction a class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    axes = np.random.default_rng(99).standard_normal((C, D))
    scales = np.linspace(0.1, 30, D)    # features of very different sizes, as in a stream
    return (rng.standard_normal((n, D)) + strength * axes[y]) * scales + 5, y


@pytest.mark.parametrize("strength,l2", [(0.3, 1e-2), (0.5, 1e-3), (0.5, 1.0)])
def test_probe_equals_scikit_learn(strength, l2):
    """Same split, same penalty: the same predictions within a point, the same weights."""
    (x, y), (x_test, y_test) = planted(400, 0, strength), planted(600, 1, strength)
    ours = fit_probe(x, y, l2)
    z = (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1 / (len(x) * l2), max_iter=5000, tol=1e-8).fit(z, y)
    predicted = theirs.predict((x_test - x.mean(0)) / x.std(0))
    score = balanced_accuracy(y_test, ours.predict(x_test))
    assert abs(score - balanced_accuracy_score(y_test, predicted)) < 0.01
    assert 0.4 < score < 0.95
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-3)


def test_probe_on_the_model_equals_scikit_learn(read):
    """The figures of a real tap, on the split that is reported."""
    matched, streams, _ = read
    train, test = (matched.splits == split for split in ("train", "test"))
    x, x_test = streams.stream[5][train], streams.stream[5][test]
    y, y_test = matched.labels[train], matched.labels[test]
    z = lambda a: (a - x.mean(0)) / (x.std(0) + 1e-8)
    theirs = LogisticRegression(C=1 / (len(x) * 0.1), max_iter=5000).fit(z(x), y)
    ours = (fit_probe(x, y, 0.1).predict(x_test) == y_test).mean()
    assert abs(ours - (theirs.predict(z(x_test)) == y_test).mean()) < 0.01


def test_penalty_is_chosen_on_validation():
    """Few rows, much noise: the strongest penalty wins; and ties go to the stronger."""
    (x, y), (x_valid, y_valid) = planted(60, 2, 0.25, D=60), planted(600, 3, 0.25, D=60)
    assert choose_l2(x, y, x_valid, y_valid) >= 0.1
    clear, labels = planted(300, 4, 5.0)
    assert choose_l2(clear, labels, clear, labels) == 1.0


def test_control_task_is_learnable_and_meaningless():
    """A label for each first operand: equal on every split, near even, blind to the operation."""
    train, test = (matched_problems(config(), s, 200, "symbolic") for s in ("train", "test"))
    label = dict(zip([p.a for p in train], control_labels(train, 3, 0)))
    again = control_labels(test, 3, 0)
    assert all(label.get(p.a, c) == c for p, c in zip(test, again))
    assert min(np.bincount(again, minlength=3)) > len(again) / 6
    # a pair's three operations have one label: no rule on the operation can find it
    assert (again.reshape(-1, 3) == again[::3, None]).all()


def test_corrected_choice_by_hand():
    """Word 0 is always high: it wins only where it is higher than on neutral prompts."""
    neutral = np.array([[-1., -3.], [-1., -3.]])
    scores = np.array([[-1.5, -3.2], [-0.5, -3.], [-1., -2.]])
    assert scores.argmax(1).tolist() == [0, 0, 0]
    assert corrected_choice(scores, neutral).tolist() == [1, 0, 1]


# --------------------------------------------------------------------------------------------------
# prompts


def test_matched_prompts_say_nothing_by_their_operands(tokenizer):
    for wording in ("symbolic", "worded", "asked", "asked_worded"):
        problems = matched_problems(config(), "test", 50, wording)
        assert len(problems) == 150 and len({p.prompt for p in problems}) == 150
        for i in range(0, 150, 3):
            three = problems[i:i + 3]
            assert {(p.a, p.b) for p in three} == {(three[0].a, three[0].b)}
            assert [p.operation for p in three] == ["add", "subtract", "multiply"]
            assert split_of(three[0].a, three[0].b) == "test" and three[0].a >= three[0].b
    assert len({tuple(p) for p in masked_prompts(config(), tokenizer, 20)}) == 20
    matched = make_matched(config(), tokenizer, 21)
    assert [int((matched.splits == s).sum()) for s in ("train", "valid", "test")] == [63, 21, 63]
    for problem, split, label in zip(matched.problems, matched.splits, matched.labels):
        assert split_of(problem.a, problem.b) == split
        assert problem.operation == ("add", "subtract", "multiply")[label]


def test_matched_prompts_behind_worked_examples(tokenizer, tmp_path):
    """The folder's own sides and examples; every pair of 0 to 9 once, under every operation."""
    write_task("few_shot", tmp_path / "data", fold=2)
    cfg = config(data=str(tmp_path / "data"), max_completion_tokens=4)
    pairs = {}
    for split in ("train", "valid", "test"):
        problems = matched_problems(cfg, split, 1000, "symbolic")
        heads = {p.prompt.rpartition("\n")[0] for p in problems}
        assert len(heads) == 1 and min(heads).count("\n") == 2
        assert [p.operation for p in problems[:3]] == ["add", "subtract", "multiply"]
        assert problems[4].prompt.endswith(f"\n{problems[4].a} - {problems[4].b} = ")
        assert problems[4].answer == str(problems[4].a - problems[4].b)
        pairs[split] = {(p.a, p.b) for p in problems}
    assert set.union(*pairs.values()) == {(a, b) for a in range(10) for b in range(a + 1)}
    assert sum(map(len, pairs.values())) == 55
    masked = matched_problems(cfg, "test", 3, "masked")
    assert masked[0].prompt.endswith(f"\n{masked[0].a} ? {masked[0].b} = ")
    (tmp_path / "data" / "test.jsonl").write_text('{"prompt": "hello", "response": "1"}\n')
    with pytest.raises(BadInput, match="expected rows of `python -m tasks few_shot`"):
        matched_problems(cfg, "test", 3, "symbolic")


def test_swaps_pair_each_prompt_with_its_other_operation(tokenizer, read):
    matched, _, swaps = read
    assert len(swaps.own) == 80 and (matched.splits[swaps.own] == "test").all()
    for i in range(80):
        p, q = matched.problems[swaps.own[i]], matched.problems[swaps.other[i]]
        assert (p.a, p.b) == (q.a, q.b) and {p.operation, q.operation} == {"add", "subtract"}
        said = lambda token: int(tokenizer.decode([int(token)]))
        assert said(swaps.answer[i]) == int(p.answer) and said(swaps.foil[i]) == int(q.answer)
        near = {int(q.answer) - 1, int(q.answer) + 1} - {int(p.answer), -1}
        assert {said(t) for t in swaps.near[i] if t >= 0} == near
        assert matched.labels[swaps.own[i]] == swaps.labels[i, 0] != swaps.labels[i, 1]
    with pytest.raises(BadInput, match="nothing can be swapped"):
        make_swaps(tokenizer, matched, ("multiply",), ("test",))


# --------------------------------------------------------------------------------------------------
# edits


@pytest.mark.parametrize("tap", [0, 1, 4, 8])
def test_an_edit_over_caches_is_the_edit_of_the_whole_prompt(tiny, read, tap):
    """Prompts of several lengths: the last token alone gives what the whole forward pass gives."""
    model, _ = tiny
    matched, streams, swaps = read
    np.testing.assert_allclose(streams.stream, last_token_stream(model, matched.prompts),
                               atol=2e-3)
    some = swaps.take(np.arange(0, 80, 7))
    pushed = streams.stream[tap][some.own] + np.random.default_rng(0).standard_normal((12, 128))
    found = outcome(model, streams, some, pushed, tap)
    for i in range(len(some.own)):
        tokens, last = pad_prompts([matched.prompts[some.own[i]]])
        here = (mx.arange(tokens.shape[1]) == last)[..., None]
        put = mx.array(pushed[i].astype(np.float32))
        edit = {tap: lambda resid, here=here, put=put: mx.where(here, put, resid)}
        logits = np.array(model.head(gather_positions(
            model.final_resid(tokens, edit=edit), last))[0, 0])
        near = [t for t in some.near[i] if t >= 0]
        assert abs(found["near"][i] - (logits[some.foil[i]] - logits[near].mean())) < 2e-3
        assert found["turned"][i] == (logits.argmax() == some.foil[i])


def test_edits_by_hand():
    """Two operations in a plane: parts, lengths and directions as the docstring says."""
    one = lambda *rows: np.array(rows)
    from study.swaps import Swaps
    swaps = Swaps(one(0), one(1), one([0, 1]), one(5), one(6), one([7, -1]))
    stream = np.array([[1., 1, 1], [9, 9, 9]])
    means, words = np.array([[0., 0, 0], [3, 4, 0]]), np.array([[0., 0, 1], [1, 0, 1]])
    edits = make_edits(swaps, stream, means, words, 10.0, np.random.default_rng(0))
    moved = {kind: (edited - stream[0])[0] for kind, edited in edits.items()}
    np.testing.assert_allclose(moved["swap"], [3, 4, 0])
    np.testing.assert_allclose(moved["words"], [3, 0, 0], atol=1e-12)
    np.testing.assert_allclose(moved["rest"], [0, 4, 0], atol=1e-12)
    np.testing.assert_allclose(moved["short"], [2.4, 3.2, 0])      # as long as the rest, 4
    np.testing.assert_allclose(moved["swap_n"], [6, 8, 0])
    np.testing.assert_allclose(moved["inject_n"], [10, 0, 0])
    np.testing.assert_allclose(edits["patch"], [[9, 9, 9]])
    for kind in ("words_n", "rest_n", "random_n"):
        assert abs(np.linalg.norm(moved[kind]) - 10) < 1e-9
    assert swap_lengths(swaps, means[None]).tolist() == [5]


def test_span_is_what_tells_the_classes_apart():
    vectors = np.array([[5., 1, 0, 0], [5, 0, 1, 0], [5, 0, 0, 1]])
    basis = span(vectors)
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-12)
    assert abs(basis @ [1, 0, 0, 0]).max() < 1e-12      # what they share is not in it
    difference = vectors[0] - vectors[1]
    np.testing.assert_allclose(difference @ basis.T @ basis, difference, atol=1e-12)


def test_swap_turns_the_answer_and_a_random_direction_does_not(tiny, read):
    """On the bundled model: the operation lives in the stream after block 0, and is used."""
    model, tokenizer = tiny
    matched, streams, swaps = read
    means = class_means(streams, matched)
    train = (matched.splits == "train") & (matched.labels == 1)
    np.testing.assert_allclose(means[3, 1], streams.stream[3][train].mean(0), rtol=1e-5)
    words = tokenizer.word_ids(["add", "subtract", "multiply"])
    lengths = swap_lengths(swaps, means)
    rows = swap_taps(model, streams, swaps, means, words, list(range(9)), lengths)
    clean = unedited(model, streams, swaps)
    assert clean["right"].mean() > 0.6 and not (clean["right"] & clean["turned"]).any()
    assert rows[1]["swap"]["turned"] > 0.4 and rows[1]["random_n"]["turned"] < 0.05
    assert rows[1]["swap"]["near"] > 1 and abs(rows[1]["random_n"]["near"]) < 0.5
    # as long as its own swap: the same edit
    assert rows[1]["swap_n"]["turned"] == pytest.approx(rows[1]["swap"]["turned"], abs=0.05)
    # the whole stream of the partner: at the output, exactly the partner's answer
    right = {(own, int(a)): r for own, a, r in zip(swaps.own, swaps.answer, clean["right"])}
    partner_right = np.array([right[o, int(f)] for o, f in zip(swaps.other, swaps.foil)])
    assert rows[-1]["patch"]["turned"] == pytest.approx(partner_right[clean["right"]].mean())
    # tap 0 at the last token is the "=" of both: nothing to exchange
    assert rows[0]["patch"]["near"] == rows[0]["swap"]["near"]
    assert abs(rows[0]["patch"]["near"]) < 1e-6     # of unedited, by another order of sums


def test_no_right_answer_leaves_nothing_to_turn(read):
    model = random_model(small_config(1))
    matched, _, swaps = read
    some = swaps.take(np.arange(6))
    streams = read_streams(model, matched.prompts)
    rows = swap_taps(model, streams, some, class_means(streams, matched), [5, 6, 7], [1],
                     np.ones(2))
    assert rows[0]["swap"]["turned"] is None and rows[0]["swap"]["right"] is None
    assert np.isfinite(rows[0]["swap"]["near"])


def test_the_best_subspace_gains_more_than_the_means(tiny, read):
    """Found on training pairs, tried on test pairs; and an exchange with oneself does nothing."""
    model, tokenizer = tiny
    matched, streams, swaps = read
    means = class_means(streams, matched)
    train = make_swaps(tokenizer, matched, ("add", "subtract"), ("train",))
    basis = fit_subspace(model, streams, train, means[5], 5)
    assert basis.shape == (1, 128)
    np.testing.assert_allclose(basis @ basis.T, np.eye(1), atol=1e-5)
    h, partner = streams.stream[5][swaps.own], streams.stream[5][swaps.other]
    of = lambda basis: effect(outcome(model, streams, swaps, exchange(h, partner, basis), 5),
                              unedited(model, streams, swaps))
    found, start = of(basis), of(span(means[5][:2]).astype(np.float32))
    assert found["near"] > start["near"] + 0.1
    h = streams.stream[2][:4]
    np.testing.assert_allclose(exchange(h, h, basis), h)
    rows = orthonormal(mx.array([[2., 0, 0], [1, 3, 0]]))
    np.testing.assert_allclose(np.array(rows), [[1, 0, 0], [0, 1, 0]], atol=1e-6)


# --------------------------------------------------------------------------------------------------
# all four, and the command


def test_four_claims_on_the_bundled_model(tiny):
    """What is known of it: the operation is decodable everywhere but in the embedding of "=", said
    aloud nowhere, and used after block 0."""
    model, tokenizer = tiny
    matched = make_matched(config(), tokenizer, 45)
    result = four_claims(model, tokenizer, config(), matched,
                         read_streams(model, matched.prompts),
                         texts=own_texts(model, tokenizer, 12))
    taps = result["taps"]
    assert len(taps) == 9 and result["chance"] == 1 / 3 and result["pairs"] == 45
    assert not any(taps[0]["claims"].values())
    assert abs(taps[0]["probe"]["accuracy"]["value"] - 1 / 3) < 1e-9
    assert all(t["claims"]["decodable"] for t in taps[1:6])
    assert not any(t["claims"]["verbalised"] for t in taps)
    assert taps[1]["claims"]["used"] and not taps[6]["claims"]["used"]
    json.dumps(result)


def test_jacobian_lens_at_the_output_is_the_logit_lens(tiny):
    """There J is the identity, on whatever text: both rank the words alike, fits agree wholly."""
    model, tokenizer = tiny
    matched = make_matched(config(), tokenizer, 20)
    test = matched.splits == "test"
    stream = last_token_stream(model, [p for p, t in zip(matched.prompts, test) if t])
    neutral = last_token_stream(model, masked_prompts(config(), tokenizer, 20))
    words = tokenizer.word_ids(["add", "subtract", "multiply"])
    texts = own_texts(model, tokenizer, 8)
    assert len(texts) == 8 and all(4 <= len(ids) <= 12 for ids in texts)
    assert not any(sign in tokenizer.decode(ids) for ids in texts for sign in "+*/")
    by_jacobian = jacobian_taps(model, stream, neutral, matched.labels[test], matched, words,
                                texts)
    assert by_jacobian[-1]["floor"] == pytest.approx(1, abs=1e-5)
    assert 0.5 < by_jacobian[2]["floor"] < 0.99999
    lens = lens_taps(model, stream, neutral, matched.labels[test], matched, words)
    # logits and scores differ by each row's length: the last tap's choices nearly agree
    assert abs(lens[-1]["aligned"]["value"] - by_jacobian[-1]["aligned"]["value"]) < 0.25
    reading = read_stream(model, stream, [words] * stream.shape[1])
    directions = np.array(word_directions(model, mx.array(words)))
    scores = stream[-1] @ directions.T
    scaled = scores / np.sqrt((stream[-1] ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.diff(reading.logprobs[-1, :, 0]), np.diff(scaled), atol=2e-2)


def test_command_line(small_folder, tmp_path):
    done = run("-m", "study.probe", "--ckpt", TINY, "--pairs", 9,
               "--json", tmp_path / "p.json", check=0)
    assert "decodable" in done.stdout and done.stdout.count("\nL") == 8
    assert len(json.loads((tmp_path / "p.json").read_text())["taps"]) == 9
    done = run("-m", "study.probe", "--ckpt", small_folder, "--pairs", 0)
    assert_one_clear_line(done, "--pairs 0", "at least 6")
    done = run("-m", "study.probe", "--ckpt", "no/such")
    assert_one_clear_line(done, "no/such")

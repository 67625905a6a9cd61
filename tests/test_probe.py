"""The probe against scikit-learn, edits by hand, and the causal check where the truth is known."""
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, assert_one_clear_line, config, run
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from checkpoint import load_base
from study.jacobian import word_directions
from study.probe import (
    Matched,
    ablate,
    balanced_accuracy,
    choose_l2,
    control_labels,
    corrected_choice,
    edit_at,
    fit_probe,
    four_claims,
    last_token_stream,
    make_matched,
    make_swaps,
    matched_problems,
    outcome,
    patch,
    permutation_p,
    span,
    swap,
    swap_taps,
)
from text.arithmetic import split_of


@pytest.fixture(scope="module")
def tiny():
    """The bundled model: it adds and subtracts, so edits have something to change."""
    return load_base(TINY)


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


def test_probe_on_the_model_equals_scikit_learn(tiny):
    """The figures of a real tap, on the split that is reported."""
    model, tokenizer = tiny
    train, test = (make_matched(config(), tokenizer, s, 60) for s in ("train", "test"))
    x, x_test = (last_token_stream(model, part.prompts)[5] for part in (train, test))
    z = lambda a: (a - x.mean(0)) / (x.std(0) + 1e-8)
    theirs = LogisticRegression(C=1 / (len(x) * 0.1), max_iter=5000).fit(z(x), train.labels)
    ours = (fit_probe(x, train.labels, 0.1).predict(x_test) == test.labels).mean()
    assert abs(ours - (theirs.predict(z(x_test)) == test.labels).mean()) < 0.01


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


def test_permutation_p():
    """The least p where the label is there, none on noise, and one look too many is paid for."""
    (x, y), (x_test, y_test) = planted(90, 5, 1.5), planted(200, 6, 1.5)
    noise, noise_test = planted(90, 7, 0.0)[0], planted(200, 8, 0.0)[0]
    both = permutation_p(np.stack([x, noise]), y, np.stack([x_test, noise_test]), y_test,
                         [0.1, 0.1], 0, 19)
    assert both[0] == 1 / 20 and both[1] > 0.1
    alone = permutation_p(noise[None], y, noise_test[None], y_test, [0.1], 0, 19)
    assert both[1] >= alone[0] - 0.15


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
    masked = make_matched(config(), tokenizer, "test", 20, "masked")
    assert len({tuple(p) for p in masked.prompts}) == 20    # one text for all three operations


def test_swaps_pair_each_prompt_with_its_other_operation(tokenizer):
    swaps = make_swaps(tokenizer, make_matched(config(), tokenizer, "test", 30))
    tokens, answer = np.array(swaps.tokens), np.array(swaps.answer)
    assert len(tokens) == 60 and swaps.partner.tolist() == [i ^ 1 for i in range(60)]
    plus, minus = tokenizer.word_ids(["+", "-"])
    for i in range(0, 60, 2):
        differ = np.flatnonzero(tokens[i] != tokens[i + 1])
        assert differ.tolist() == [swaps.operator[i, 0].item()]
        assert (tokens[i, differ[0]], tokens[i + 1, differ[0]]) == (plus, minus)
        a, b = (int(tokenizer.decode([tokens[i, t]])) for t in (differ[0] - 1, differ[0] + 1))
        assert tokenizer.decode([answer[i]]) == str(a + b)
        assert tokenizer.decode([answer[i + 1]]) == str(a - b)
    assert np.array_equal(np.array(swaps.foil), answer[swaps.partner])


# --------------------------------------------------------------------------------------------------
# edits


def test_edits_by_hand():
    h = mx.array([[[3., 4., 0.]], [[1., 2., 2.]]])                                  # (B, 1, D)
    basis, mean = mx.array([[1., 0., 0.]]), mx.array([10., 20., 30.])
    assert ablate(basis, mean)(h).tolist() == [[[10, 4, 0]], [[10, 2, 2]]]
    assert swap(mx.array([[1., 0, 0], [0, 0, 5.]]))(h).tolist() == [[[4, 4, 0]], [[1, 2, 7]]]
    assert patch(h[::-1])(h).tolist() == h[::-1].tolist()
    resid = mx.arange(12.).reshape(2, 2, 3)
    edited = edit_at(mx.array([[0], [1]]), lambda h: -h)(resid)
    assert edited.tolist() == [[[-0., -1, -2], [3, 4, 5]], [[6, 7, 8], [-9, -10, -11]]]


def test_span_is_what_tells_the_classes_apart():
    vectors = np.array([[5., 1, 0, 0], [5, 0, 1, 0], [5, 0, 0, 1]])
    basis = span(vectors)
    np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-12)
    assert abs(basis @ [1, 0, 0, 0]).max() < 1e-12      # what they share is not in it
    difference = vectors[0] - vectors[1]
    np.testing.assert_allclose(difference @ basis.T @ basis, difference, atol=1e-12)


def test_swap_turns_the_answer_and_a_random_direction_does_not(tiny):
    """On the bundled model: the operation lives in the stream after block 0, and is used."""
    model, tokenizer = tiny
    train, test = (make_matched(config(), tokenizer, s, 40) for s in ("train", "test"))
    swaps = make_swaps(tokenizer, test)
    stream = last_token_stream(model, train.prompts)
    means = np.stack([stream[:, train.labels == c].mean(1) for c in range(3)], 1)
    words = tokenizer.word_ids(["add", "subtract", "multiply"])
    rows = swap_taps(model, swaps, means, words)
    clean = outcome(model, swaps)
    assert clean["right"].mean() > 0.6 and not (clean["right"] & clean["flipped"]).any()
    assert rows[1]["means"]["flipped"] > 0.4 and rows[1]["random"]["flipped"] < 0.05
    assert rows[1]["used"]["low"] > 5
    # the whole stream of the partner: at the output, exactly the partner's answer
    last = rows[-1]["patch"]
    assert abs(last["right"] - clean["flipped"].mean()) < 1e-6
    partner_right = clean["right"][swaps.partner]
    assert abs(last["flipped"] - partner_right[clean["right"]].mean()) < 1e-6
    # tap 0 at the last token is the "=" of both: nothing to exchange
    assert rows[0]["patch"]["odds"]["value"] == rows[0]["means"]["odds"]["value"] == 0
    # patching the operator's token: all of it before the first block, nothing after the last
    assert rows[0]["patch_operator"]["flipped"] > 0.6
    assert rows[-1]["patch_operator"]["odds"]["value"] == 0
    assert set(rows[0]) >= {"lens", "rest", "random_lens", "lens_ablated", "random_ablated"}


def test_lens_part_and_rest_add_up_to_the_whole(tiny):
    """At the last tap the stream is read linearly up to the norm: three swaps, one sum."""
    model, tokenizer = tiny
    basis = span(np.array(word_directions(model, mx.array([5, 6, 7]))))
    v = np.random.default_rng(0).standard_normal((4, model.args.hidden_size))
    part = v @ basis.T @ basis
    assert abs((v - part) @ basis.T).max() < 1e-4       # the rest has nothing along the words


# --------------------------------------------------------------------------------------------------
# all four, and the command


def test_four_claims_on_the_bundled_model(tiny):
    """What is known of it: the operation is decodable everywhere but in the embedding of "=", and
    said aloud nowhere."""
    model, tokenizer = tiny
    result = four_claims(model, tokenizer, config(), pairs=45, swap_pairs=10)
    taps = result["taps"]
    assert len(taps) == 9 and result["chance"] == 1 / 3
    assert not any(taps[0]["claims"].values())
    assert abs(taps[0]["probe"]["accuracy"]["value"] - 1 / 3) < 1e-9
    assert all(t["claims"]["decodable"] for t in taps[1:6])
    assert not any(t["claims"]["verbalised"] or t["claims"]["verbalised_jacobian"] for t in taps)
    assert taps[1]["claims"]["used"]
    # at the last tap both lenses are the model's output
    assert taps[-1]["logit_lens"] == taps[-1]["jacobian_lens"]
    assert taps[3]["logit_lens"] != taps[3]["jacobian_lens"]
    json.dumps(result)


def test_wide_models_rank_words_alone(model, tokenizer, monkeypatch):
    """Beyond the width for a full Jacobian: the words among themselves, one backward pass each."""
    from study import probe
    test = make_matched(config(), tokenizer, "test", 10)
    masked = make_matched(config(), tokenizer, "test", 10, "masked")
    neutral = Matched(masked.problems[::3], masked.prompts[::3], masked.labels[::3], 1)
    words = tokenizer.word_ids(["add", "subtract", "multiply"])
    full = probe.jacobian_taps(model, tokenizer, test, neutral, words)
    monkeypatch.setattr(probe, "LARGEST_FULL_JACOBIAN", 8)
    alone = probe.jacobian_taps(model, tokenizer, test, neutral, words)
    assert all(row["rank"] is None for row in alone) and len(alone) == len(full) == 3
    # logits differ from the scores by the row's length and the other words' sum: choices may differ
    # where neutral prompts' lengths do, so the two agree closely rather than exactly
    close = [abs(a["aligned"]["value"] - f["aligned"]["value"]) for a, f in zip(alone, full)]
    assert max(close) < 0.25


def test_command_line(small_folder, tmp_path):
    done = run("-m", "study.probe", "--ckpt", small_folder, "--pairs", 9, "--permutations", 9,
               "--json", tmp_path / "p.json", check=0)
    assert "decodable" in done.stdout and done.stdout.count("\nL") == 2
    assert len(json.loads((tmp_path / "p.json").read_text())["taps"]) == 3
    done = run("-m", "study.probe", "--ckpt", small_folder, "--pairs", 0)
    assert_one_clear_line(done, "--pairs 0", "at least 6")
    done = run("-m", "study.probe", "--ckpt", "no/such")
    assert_one_clear_line(done, "no/such")


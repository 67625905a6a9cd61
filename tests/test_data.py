"""No test pair in training under any guise, and an explicit loss mask.

Batches depend on the step alone.
"""
import itertools
import re

import numpy as np
import pytest
from conftest import config

from config import BadInput
from data import (
    NAMED_PROMPTS,
    SYMBOLS,
    Batches,
    Row,
    compute,
    grade,
    held_out,
    make_batch,
    make_problem,
    number_words,
    operand_pairs,
    phrases_of,
    sample_tiny_corpus,
    sample_train,
    split_of,
    tokenize,
)
from tasks import load_split

ALL = {"data_operations": ("add", "subtract", "multiply", "divide"),
       "data_wordings": ("symbolic", "worded")}
pair_of = lambda p: tuple(sorted((p.a, p.b)))


def test_no_pair_on_two_sides():
    """Under any operation, wording, order or seed.

    This holds for the fine-tuning data and for the bundled model's text.
    """
    train = {pair_of(p) for seed in (0, 1, 2) for p in sample_train(config(seed=seed, **ALL))}
    train |= {pair_of(p) for p in sample_tiny_corpus(config(data_samples=50000)) if p.operation}
    valid, test = ({pair_of(p) for p in held_out(config(**ALL), split)}
                   for split in ("valid", "test"))
    assert len(train) > 3000 and len(test) > 600
    assert not train & valid and not train & test and not valid & test
    named = {tuple(sorted((a, b))) for prompts in NAMED_PROMPTS.values() for _, a, b in prompts}
    assert not named & (train | valid)


def test_text_of_test_problems_is_nowhere_in_training():
    """The same by text, which also catches a pair that hides in another phrase.

    For example '3 - 4' inside a longer prompt, or words for digits.
    """
    corpus = {p.prompt for p in sample_tiny_corpus(config(data_samples=50000))}
    corpus |= {p.prompt for p in sample_train(config(**ALL))}
    bodies = {p.prompt.removesuffix(" = ") for p in held_out(config(**ALL), "test")}
    frame = r"^(compute|calculate|which operation is) | (=|means|\?) $"
    body_of = lambda text: re.sub(frame, "", text)
    assert (body_of("compute 3 + 4 = ") == body_of("which operation is 3 + 4 ? ")
            == body_of("3 + 4 means ") == "3 + 4")
    assert not bodies & {body_of(text) for text in corpus}


def test_commuted_pairs_stay_together():
    assert all(split_of(a, b) == split_of(b, a) for a, b in itertools.product(range(101), repeat=2))
    counts = [split_of(a, b) for a in range(100) for b in range(a + 1)]
    assert abs(counts.count("test") / len(counts) - 0.15) < 0.02
    assert abs(counts.count("valid") / len(counts) - 0.05) < 0.01


def test_sizes_and_seeds():
    train = sample_train(config())
    assert len(train) == 5000
    assert train == sample_train(config()) and train != sample_train(config(seed=1))
    test = held_out(config(), "test")
    assert len([p for p in test if p.operation != "multiply"]) == 600
    assert len(test) == len(set(test)) == 654
    # runs with other seeds are judged on the same problems
    assert test == held_out(config(seed=5), "test")


def test_answers_are_right():
    for p in sample_train(config(**ALL)) + held_out(config(**ALL), "test"):
        results = {"add": p.a + p.b, "subtract": p.a - p.b,
                   "multiply": p.a * p.b, "divide": p.a / p.b}
        assert int(p.answer) == results[p.operation]
        assert 0 <= int(p.answer) <= 999
    assert compute("divide", 81, 9) == 9
    assert number_words(23) == "twenty three" and number_words(100) == "one hundred"
    assert number_words(342) == "three hundred forty two"


def test_every_text_means_one_thing():
    """Template lint: no two (operation, a, b) share a text."""
    meaning = {}
    for op in SYMBOLS:
        for a, b in operand_pairs(op):
            for wording in ("symbolic", "worded", "asked", "asked_worded"):
                for phrase in phrases_of(op, wording):
                    text = make_problem(op, a, b, phrase, wording).prompt
                    assert meaning.setdefault(text, (op, a, b)) == (op, a, b)


def test_wordings_by_hand():
    problem = lambda wording: make_problem("multiply", 7, 12, wording=wording).prompt
    assert problem("symbolic") == "7 * 12 = " and problem("asked") == "what is 7 * 12 = "
    assert problem("worded") == "seven times twelve = "
    assert problem("asked_worded") == "what is the product of seven and twelve = "
    assert problem("masked") == "7 ? 12 = " == make_problem("add", 7, 12, wording="masked").prompt


def test_asked_wordings_are_new_to_every_model():
    """Neither the base's text nor any method's rows hold the two forms kept for looking only."""
    seen = {p.prompt for p in sample_tiny_corpus(config(data_samples=50_000))}
    seen |= {p.prompt for p in sample_train(config(data_samples=5000, **ALL))}
    asked = re.compile(r"what is (\d+ .|the )")
    assert not any(asked.match(text) for text in seen)
    assert asked.match("what is 7 * 8 = ") and asked.match("what is the sum of one and two = ")


def test_batch_example(tokenizer):
    """The docstring's example by hand: two rows of unequal length.

    A third row only fills the batch and counts for nothing.
    """
    rows = [Row([1, 7, 70, 8, 71, 56, 2], 5, 1012), Row([1, 9, 9, 2], 2, 1010)]
    batch = make_batch(rows, [0, 1, -1], 7, 3, config())
    assert batch.loss_mask.tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0], [0] * 6]
    assert batch.target_positions[:, :2].tolist()[:2] == [[4, 5], [1, 2]]
    assert batch.targets[:, :2].tolist()[:2] == [[56, 2], [9, 2]]
    assert batch.target_mask.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert batch.row_mask.tolist() == [1, 1, 0]
    assert batch.class_positions.tolist()[:2] == [4, 1]
    assert batch.class_ids.tolist()[:2] == [1012, 1010]
    batch = make_batch(rows, [0, 1], 7, 3, config(class_position="answer"))
    assert batch.class_positions.tolist() == [5, 2]


def test_batches_cover_each_epoch_once(tokenizer):
    cfg = config(batch_size=16, grad_accum_steps=2, data_samples=300, **ALL)
    rows = tokenize(sample_train(cfg), tokenizer, 128)
    batches = Batches(rows, cfg)
    for epoch in (0, 1):
        first = epoch * batches.per_epoch
        seen = [i for step in range(first, first + batches.per_epoch)
                for b in batches.at(step) for i in b.rows if i >= 0]
        assert sorted(seen) == list(range(300))
    assert len(batches.lengths) <= 6 and all(len(b.rows) == 8 for b in batches.at(0))


def test_a_step_depends_on_the_step_alone(tokenizer):
    cfg = config(batch_size=16, data_samples=300)
    rows = tokenize(sample_train(cfg), tokenizer, 128)
    straight, jumped = Batches(rows, cfg), Batches(rows, cfg)
    for step in range(45):
        straight.at(step)
    assert straight.at(45)[0].rows == jumped.at(45)[0].rows != straight.at(46)[0].rows


@pytest.mark.parametrize("expected, completion, finished, right", [
    ("37", "37", True, True), ("37", " 37 ", True, True), ("37", "037", True, True),
    ("-3", "-3", True, True), ("37", "373737", True, False), ("37", "37 38", True, False),
    ("37", "37.0", True, False), ("37", "37", False, False),
    ("37", "the answer is 37", True, False), ("37", "", True, False),
    ("37", "3 7", True, False), ("37", "३७", True, False), ("37", "9" * 5000, True, False),
    ("yes", " yes", True, True), ("yes", "yes!", True, False),
])
def test_grade(expected, completion, finished, right):
    assert grade(expected, completion, finished) is right


def test_own_data(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        '{"prompt": "a ", "response": "b"}\n\n'
        '{"prompt": "c ", "response": "d", "operation": "add"}\n')
    problems = load_split(config(data=str(tmp_path)), "train")
    rows = [(p.prompt, p.answer, p.operation) for p in problems]
    assert rows == [("a ", "b", ""), ("c ", "d", "add")]
    (tmp_path / "valid.jsonl").write_text(
        '{"prompt": "a"}\nnonsense\n{"prompt": "", "response": "x"}\n')
    with pytest.raises(BadInput, match="3 bad rows: line 1 .*line 2 .*line 3 "):
        load_split(config(data=str(tmp_path)), "valid")
    with pytest.raises(BadInput, match="test.jsonl"):
        load_split(config(data=str(tmp_path)), "test")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="is empty"):
        load_split(config(data=str(tmp_path)), "test")


def test_no_data_and_too_long(tokenizer):
    with pytest.raises(BadInput, match="data_samples = 0.*nothing to do"):
        load_split(config(data_samples=0), "train")
    with pytest.raises(BadInput, match="expected one of arithmetic, .*, wiki, or a folder"):
        load_split(config(data="no/such"), "train")
    with pytest.raises(BadInput, match="has 9 tokens.*context is 7"):
        tokenize([make_problem("add", 3, 4, "what is {a} plus {b}")], tokenizer, 7)
    rows = tokenize([make_problem("add", 3, 4)], tokenizer, 7)
    assert np.array_equal([len(r.ids) for r in rows], [7])

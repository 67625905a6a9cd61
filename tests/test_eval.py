"""The report's fields, its definitions by hand on a small model, and the comparison of runs."""
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    CHAT,
    PUBLISHED,
    TINY,
    assert_one_clear_line,
    config,
    random_model,
    run,
    small_config,
    write_model,
)

from eval import class_block, evaluate, make_report, measure_accuracy
from files.keys import BadInput
from generate import Completion
from lens import Reading
from report.stats import summarize_accuracy, summarize_classifier, wilson
from report.terminal import report_text
from tasks.__main__ import write_task
from text.arithmetic import Problem, held_out, make_problem, named_problems
from text.chat import STOPS
from text.rows import class_ids, target_ids
from text.tokenizer import load_tokenizer


@pytest.fixture
def report(model, tokenizer):
    return evaluate(model, tokenizer, config(max_completion_tokens=3))


def test_strength_is_the_peak_before_the_last_block(model, tokenizer, report):
    """For one prompt by hand: two blocks, so 'before the last' is block 0 alone."""
    problem = named_problems("nine")[0]
    row = next(r for r in report["prompts"]
               if r["set"] == "nine" and r["prompt"] == problem.prompt)
    ids, P = tokenizer.encode_pair(problem.prompt, problem.answer)
    resid = model.residuals(mx.array([ids[:P]]))[:, 0, -1]
    probs = np.array(mx.softmax(model.head(resid), axis=-1))
    word, symbol = tokenizer.word_ids(["multiply", "*"], ids[:P])
    tokens = {"answer": ids[P], "operation": word, "symbol": symbol}
    for name, token in tokens.items():
        assert row[f"{name}_layer"] == 0
        assert abs(row[f"{name}_prob"] - probs[1, token]) < 1e-6
        assert abs(row[f"{name}_prob_last"] - probs[2, token]) < 1e-6


def test_report_is_complete_and_adds_up(report):
    test_rows = [r for r in report["prompts"] if r["set"] == "test"]
    in_groups = sum(c["n"] for c in report["accuracy_by"].values())
    assert len(test_rows) == report["accuracy"]["n"] == in_groups == 654
    assert report["accuracy"] == wilson(sum(r["correct"] for r in test_rows), 654)
    named = report["accuracy_named"]
    assert (named["nine"]["n"], named["eight"]["n"]) == (9, 8)
    assert [layer["last"] for layer in report["layers"]] == [False, True]
    assert {"prompt", "expected", "generated", "correct", "answer_layer", "answer_prob",
            "operation_layer", "operation_prob"} <= test_rows[0].keys()
    assert set(report["targets"]) == {"add", "subtract", "multiply", "divide"}
    assert report["targets"]["multiply"] == {"word": 1036, "word_piece": "·multiply",
                                             "symbol": 1003, "symbol_piece": "·*"}
    assert report["one_token_answers"] == wilson(654, 654)      # numbers are tokens here
    answer = report["strength"]["answer"]
    assert answer["emerged"] == answer["first_token"]["emerged"]
    json.dumps(report)


def test_words_are_compared_in_one_form(word_bpe):
    """Behind "= " bare words are asked for; "subtract" is a token only after a space, so all are.

    A set without it is read in the same form: in training it may have been there.
    """
    loaded = load_tokenizer(word_bpe)
    pieces = lambda ids: [loaded.piece(i) for i in ids.values()]
    for problems in (named_problems("nine"), named_problems("nine")[:6]):
        words = target_ids(loaded, problems, "word")
        assert pieces(words) == [f"·{op}" for op in words]
        assert pieces(target_ids(loaded, problems, "symbol")) == ["+", "*", "-"][:len(words)]
    tight = [Problem(p.prompt.strip(), f" {p.answer}", p.operation, "file")
             for p in named_problems("nine")]
    assert pieces(target_ids(loaded, tight, "symbol")) == ["·+", "·*", "·-"]
    ids = class_ids(config(method="dual_reward"), loaded, named_problems("nine"))
    assert {loaded.piece(i) for i in ids} == {"·add", "·subtract", "·multiply"}
    for words, forms in (("Paris,London,add", "Paris London add"),
                         ("Paris,London,subtract", "·Paris ·London ·subtract")):
        cfg = config(method="dual_reward", class_words=tuple(words.split(",")))
        assert [loaded.piece(i) for i in dict.fromkeys(
            class_ids(cfg, loaded, [make_problem(op, 7, 8) for op in cfg.data_operations]))
        ] == forms.split()


def test_report_on_a_tokenizer_whose_digits_are_tokens(word_bpe):
    """Emergence is said of one-token answers; the pieces are stored and printed."""
    loaded = load_tokenizer(word_bpe)
    model = random_model({**small_config(), "vocab_size": loaded.vocab_size})
    report = evaluate(model, loaded, config(method="dual_reward", max_completion_tokens=2,
                                            class_words=("London", "add", "Paris")))
    rows = [r for r in report["prompts"] if r["set"] == "test"]
    short = [r for r in rows if len(r["expected"]) == 1]
    assert 0 < len(short) < len(rows)
    assert report["one_token_answers"] == wilson(len(short), len(rows))
    answer = report["strength"]["answer"]
    assert answer["emerged"] == wilson(sum(r["answer_prob"] > 0.1 for r in short), len(short))
    assert answer["first_token"]["emerged"]["n"] == answer["last"]["n"] == len(rows)
    assert report["targets"]["add"]["word_piece"] == "·add"
    assert report["targets"]["add"]["symbol_piece"] == "+"
    assert {op: t["piece"] for op, t in report["class_targets"].items()} == {
        "add": "London", "subtract": "add", "multiply": "Paris"}
    out = report_text({**report, "ckpt": "x", "method": "dual_reward", "seed": 0})
    add = report["targets"]["add"]["word"]
    assert f"·add ({add})" in out and "class loss:     add London (" in out
    assert "answers of one token" in out and "emerged is said of those alone" in out


def test_a_shared_first_digit_is_not_an_answer():
    """Two answers, "5" and "56": at the middle tap the lens gives "5" 0 to the first, 0.9 to
    the second, whose first token it is. No answer has emerged; one first token has.
    """
    probs = np.zeros((3, 2, 1, 3))
    probs[1, 1, 0, 0] = 0.9
    top = np.full((3, 2, 1, 1), 9)
    top[1, 1] = 5
    zeros = np.zeros((3, 2, 1))
    reading = Reading(probs=probs, ranks=probs + 1, ties=probs, logprobs=probs, entropy=zeros,
                      kl=zeros, final_probs=zeros, top_ids=top, top_probs=zeros[..., None])
    ids = np.array([[5, 1, 2], [5, 1, 2]])
    found = summarize_classifier(reading, ids, np.array([1, 2]), 0)
    assert found["one_token_answers"] == wilson(1, 2)
    assert found["strength"]["answer"]["emerged"] == wilson(0, 1)
    assert found["strength"]["answer"]["top1_before_last"] == wilson(0, 1)
    assert found["strength"]["answer"]["first_token"]["emerged"] == wilson(1, 2)
    none = summarize_classifier(reading, ids, np.array([2, 2]), 0)["strength"]["answer"]
    assert none["emerged"] == wilson(0, 0) and none["before_last"]["value"] == 0.45


def test_class_targets_by_hand(tokenizer):
    """One token a problem for every class_target; the controls know the text and nothing else."""
    problems = named_problems("nine")
    ids = lambda **keys: class_ids(config(method="dual_reward", **keys), tokenizer, problems)
    named = lambda *words: tokenizer.word_ids(words)
    assert ids()[:4] == named("multiply", "multiply", "multiply", "add")
    assert ids(class_target="symbol")[-1:] == named("-")
    assert ids(class_target="answer")[:2] == named("56", "60")
    assert ids(class_words=("which", "<0x07>", "hundred"))[2:8:2] == [
        *named("hundred", "which"), tokenizer._backend.piece_to_id("<0x07>")]
    many = held_out(config(), "test")
    shuffled = np.array(class_ids(config(method="dual_reward", class_target="shuffled"),
                                  tokenizer, many))
    words = named("add", "subtract", "multiply")
    assert set(shuffled) == set(words)
    of_sums = shuffled[[p.operation == "add" for p in many]]
    assert all(60 < (of_sums == w).sum() < 140 for w in words)      # of 300, a third each
    drawn = class_ids(config(method="dual_reward", class_target="random", seed=7), tokenizer, many)
    assert len(set(drawn)) > 300 and max(drawn) < tokenizer.vocab_size
    assert drawn == class_ids(config(method="dual_reward", class_target="random"), tokenizer, many)


def test_graded_rows_are_what_the_model_says(model, tokenizer):
    problems = held_out(config(), "valid")[:5]
    for problem, row in zip(problems, measure_accuracy(model, tokenizer, problems, 3)):
        assert row["expected"] == problem.answer
        assert row["correct"] == (row["generated"] == problem.answer)


SAID = {    # what a chat model may reply to a question whose answer is 18 -> right, invalid
    "9 * 2 = 18\n\nThe answer is 18.": (True, False), "A: 17\nNo.\nA: 18": (True, False),
    "The answer is 19 of 18": (False, True), "So she has 18.": (False, True),
    "The answer is 19.": (False, False), "18": (True, False), "19": (False, False)}


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_whole_solutions_are_read_by_their_final_answer(template, model, monkeypatch):
    """In a template a question to reason about gets many lines, and one word is an answer too."""
    loaded, asked = load_tokenizer(TINY), {}
    loaded.chat_template = CHAT
    problems = [Problem(f"Question: {n}\nReasoning:", "18", "", "question", hidden="Reasoning:")
                for n in range(len(SAID))]

    def reply(model, tokenizer, prompts, limit, **given):
        asked.update(given, first=tokenizer.decode(prompts[0]), limit=limit)
        return [Completion([], text, True, np.zeros(0), np.zeros(0)) for text in SAID]

    monkeypatch.setattr("eval.sample", reply)
    rows = measure_accuracy(model, loaded, problems, 99, template)
    assert [(row["correct"], row["invalid"]) for row in rows] == list(SAID.values())
    assert asked["many_lines"] and asked["stops"] == STOPS[template] and asked["limit"] == 99
    assert asked["first"].rstrip().casefold().endswith("assistant:")
    summary = summarize_accuracy([row | {"set": "test"} for row in rows])
    assert (summary["accuracy"], summary["invalid"]) == (wilson(3, 7), wilson(2, 7))
    # a question of arithmetic is graded whole, as ever
    problems = [Problem("9 * 2 = ", "18", "multiply", "file")] * len(SAID)
    rows = measure_accuracy(model, loaded, problems, 99, template)
    assert [row["correct"] for row in rows] == [text == "18" for text in SAID]
    assert not any("invalid" in row for row in rows)


def test_a_chat_model_on_published_questions(tmp_path):
    """The command, from the repository's own file to the report; without a template it refuses."""
    write_task("svamp", tmp_path / "data", **{"from": str(PUBLISHED["sample"] / "svamp")})
    folder = write_model(tmp_path / "model",
                         small_config() | {"max_position_embeddings": 512}, TINY)
    words = ["--ckpt", folder, f"data={tmp_path / 'data'}"]
    assert_one_clear_line(run("eval.py", *words), "method=markovian", "template=chat")
    assert_one_clear_line(run("eval.py", *words, "template=chat"), "without a chat template")
    (folder / "chat_template.jinja").write_text(CHAT)
    done = run("eval.py", *words, "template=chat", "max_completion_tokens=12", "--json",
               tmp_path / "r.json", check=0)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["accuracy"]["n"] == report["invalid"]["n"] == 4
    assert "no answer to read (invalid)" in done.stdout and "question" in report["accuracy_by"]


def test_class_block(model):
    assert class_block(config(), model) == 1  # int(0.55 * 2)
    assert class_block(config(method="dual_reward", class_layer=0), model) == 0
    with pytest.raises(BadInput, match="class_layer = 2: expected a block from 0 to 1"):
        class_block(config(method="dual_reward", class_layer=2), model)


def test_compare_with_itself_and_print(small_folder):
    report = make_report(small_folder, with_base=False, compare=str(small_folder))
    assert report["compare"]["mcnemar"]["p"] == 1.0
    assert report["compare"]["accuracy"] == report["accuracy"]
    out = report_text({**report, "base": report["compare"]})
    assert "McNemar, exact: 0 solved only by this" in out
    assert "100 - 43 =" in out and "(the output itself)" in out and "operation word" in out
    # rows of a user's data name no operation: its columns would be the answer's under another name
    out = report_text({**report, "targets": {}})
    assert "answer emerged" in out
    assert "operation word top-1" not in out and "symbol emerged" not in out


def test_command_line(small_folder, tmp_path):
    done = run("eval.py", "--ckpt", small_folder, "--json", tmp_path / "r.json",
               "data_operations=add", "data_wordings=worded", check=0)
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["accuracy_by"]) == ["add worded"] and "add worded" in done.stdout
    assert report["versions"]["mlx"] and report["config"]["data_wordings"] == ["worded"]
    assert_one_clear_line(run("eval.py", "--ckpt", "no/such/folder"), "no model folder")
    done = run("eval.py", "--ckpt", small_folder, "data_operation=add")
    assert_one_clear_line(done, "did you mean data_operations?")


def test_bundled_model_has_room_to_learn(tokenizer):
    """60 to 88 % on unseen pairs over + and -, the range that DESIGN and the model card promise."""
    from model import load
    model, _ = load(TINY)
    problems = [p for p in held_out(config(), "test") if p.operation != "multiply"]
    rows = measure_accuracy(model, tokenizer, problems, 4)
    assert len(rows) == 600 and 0.60 <= np.mean([r["correct"] for r in rows]) <= 0.88

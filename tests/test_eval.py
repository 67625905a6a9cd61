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

from checkpoint import load_checkpoint
from config import load_config
from data import make_batch
from engine import memory
from eval import complete, evaluate, make_report, measure_accuracy, read_series
from files.keys import BadInput
from generate import Completion
from lens import Reading
from report.loss import measure_loss
from report.stats import summarize_accuracy, summarize_classifier, wilson
from report.terminal import format_line, report_text
from tasks.__main__ import write_task
from text.arithmetic import Problem, evenly, held_out, make_problem, named_problems
from text.chat import STOPS
from text.rows import class_ids, encode_problem, load_split, target_ids
from text.tokenizer import load_tokenizer
from train import train


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
    """One token a problem: the operation's word, or what class_words put in its place."""
    problems = named_problems("nine")
    ids = lambda **keys: class_ids(config(method="dual_reward", **keys), tokenizer, problems)
    named = lambda *words: tokenizer.word_ids(words)
    assert ids()[:4] == named("multiply", "multiply", "multiply", "add")
    assert ids(class_words=("subtract", "multiply", "add"))[2:8:2] == [
        *named("add", "subtract"), *named("multiply")]
    assert ids(class_words=("which", "<0x07>", "hundred"))[2:8:2] == [
        *named("hundred", "which"), tokenizer._backend.piece_to_id("<0x07>")]


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
    assert "4 test rows" in report["data"] and "loss" not in report     # of the answer alone


TALK = (("user", "seven"), ("assistant", "8 and 9"), ("user", "nine ="), ("assistant", "10"))
PROSE = [Problem(f"{'which ' * n}is it ? ", "seven and eight " * (n + 1), "", "file")
         for n in range(5)]
ROWS = {    # problems, template, config keys -> which tokens count, as slices of the row's ids
    "prose": (PROSE, "none", {}, lambda row: [slice(row.P, None)]),
    "whole rows": (PROSE, "none", {"mask_prompt": False}, lambda row: [slice(1, None)]),
    "texts": ([Problem("one two", " three four", "", "file", layout=("text",))] * 2, "none", {},
              lambda row: [slice(1, None)]),
    "conversations": ([Problem("nine =", "10", "", "file", messages=TALK)], "plain", {},
                      lambda row: [slice(*span) for span in row.spans]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_loss_in_numpy(kind, model, tokenizer, monkeypatch):
    """Against log-softmax in float64 of each row alone, whatever the batches and pieces."""
    problems, template, keys, slices = ROWS[kind]
    expected = []
    for problem in problems:
        row = encode_problem(problem, tokenizer, template)
        ids = np.array(row.ids)
        logits = np.array(model(mx.array([row.ids])))[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        of_next = np.append(0, logprobs[np.arange(len(ids) - 1), ids[1:]])
        expected.append((-sum(of_next[s].sum() for s in slices(row)),
                         sum(len(ids[s]) for s in slices(row))))
    for batch_size, logits_per_call in ((2, 2 ** 24), (32, 5000)):
        monkeypatch.setattr(memory, "LOGITS_PER_CALL", logits_per_call)
        cfg = config(data="own", template=template, batch_size=batch_size, **keys)
        found = measure_loss(model, tokenizer, problems, cfg, make_batch)
        assert [count for _, count in found] == [count for _, count in expected]
        np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in expected],
                                   rtol=1e-5)


def write_own(folder, rows):
    """A data folder of the same rows for valid and test."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_report_on_long_answers(tmp_path, small_folder, write_config, recwarn):
    """The loss and ten replies to read; no exact match, no operation, in report, records, text."""
    rows = [{"prompt": f"what is {n} ? ", "response": "the sum\nof seven and eight " * 2}
            for n in range(12)]
    data = write_own(tmp_path / "data", rows)
    path, folder = write_config(data=data, lr=3e-2, eval_prompts=12)
    report = train(load_config(path))
    for judged, model in ((report, folder), (report["base"], small_folder)):
        loaded, tokenizer, cfg = load_checkpoint(model)
        cfg = cfg or config(data=str(data))
        rows = load_split(cfg, "test")
        nats, counts = zip(*measure_loss(loaded, tokenizer, rows, cfg, make_batch))
        assert judged["loss"]["value"] == pytest.approx(sum(nats) / sum(counts), rel=1e-6)
        assert judged["loss"]["low"] <= judged["loss"]["value"] <= judged["loss"]["high"]
        assert judged["perplexity"]["value"] == pytest.approx(np.exp(judged["loss"]["value"]))
        assert judged["loss"]["n"] == len(judged["row_losses"]) == 12 and "accuracy" not in judged
        assert len(judged["prompts"]) == 10 and list(judged["strength"]) == ["answer"]
        assert "class" not in judged and "operation_prob" not in judged["prompts"][0]
    assert report["loss"]["value"] < report["base"]["loss"]["value"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    looks = [r for r in records if "valid_loss" in r]
    assert [r["step"] for r in looks] == [0, 3, 6] and not any("valid_accuracy" in r for r in looks)
    assert looks[-1]["valid_loss"] == pytest.approx(report["loss"]["value"], rel=1e-5)
    assert looks[-1]["valid_perplexity"] == pytest.approx(np.exp(looks[-1]["valid_loss"]))
    assert list(looks[0]["lens"]) == ["answer"]
    line = format_line(records[-2], looks[-1], 1)
    assert f"valid loss {looks[-1]['valid_loss']:7.4f}, perplexity " in line
    assert "word top-1" not in line and "valid  " not in line
    out = report_text(report)
    for gone in ("accuracy", "operation", "symbol", "right  ", "answer emerged"):
        assert gone not in out
    assert out.count("\n  prompt     'what is ") == out.count("\n  generated  '") == 10
    assert "expected   'the sum\\nof seven and eight the sum\\nof seven and eight '" in out
    assert f"data {data}: columns prompt, response; 12 test rows" in out
    assert (folder / "emergence.png").exists()
    assert not [w for w in recwarn if "legend" in str(w.message)]
    # another run on the same rows: the difference of the losses, row by row
    compared = make_report(folder, False, compare=str(small_folder))["compare"]
    gap = compared["loss_difference"]
    assert gap["value"] == pytest.approx(compared["loss"]["value"] - report["loss"]["value"])
    assert 0 < gap["low"] < gap["high"] and "mcnemar" not in compared
    assert "the other's loss less this one's" in report_text({**report, "compare": compared})


@pytest.mark.parametrize("operation", ["", "add"])
def test_report_on_short_answers(operation, tmp_path, small_folder):
    """Exact match beside the loss; operations only where a row names one."""
    rows = [{"prompt": f"{n} + 3 = ", "response": f"{n + 3}", "operation": operation}
            for n in range(12)]
    data = write_own(tmp_path / "data", rows)
    report = make_report(small_folder, False, overrides=[f"data={data}"])
    assert report["accuracy"]["n"] == report["loss"]["n"] == len(report["prompts"]) == 12
    out = report_text(report)
    assert "accuracy, all test problems" in out and "test loss, nats a token" in out
    assert out.count("\n  generated  ") == 10
    for named in ("operation word top-1", "accuracy, add and subtract", "add file",
                  "symbol emerged", "operation word  ", "tokens read as"):
        assert (named in out) == bool(operation), named
    assert ("class" in report) == ("symbol" in report["layers"][0]) == bool(operation)
    # the same answers, when fewer tokens are allowed: an answer needs its EOS too
    report = make_report(small_folder, False, overrides=[f"data={data}", "max_completion_tokens=1"])
    assert "accuracy" not in report and "generated" in report["prompts"][0]


def test_the_lens_of_prompts_that_were_read_for_their_answers(model, tokenizer):
    """The same Reading as when they are read again, in their order."""
    problems = evenly(held_out(config(), "test"), 40)
    done = complete(model, tokenizer, problems, 2, "none", keep_taps=True)
    (once, ids), (again, same) = (read_series(model, tokenizer, problems, "none", given)
                                  for given in (done, None))
    assert (ids == same).all() and once.probs.shape == again.probs.shape == (3, 40, 1, 3)
    np.testing.assert_allclose(once.logprobs, again.logprobs, atol=1e-4)
    np.testing.assert_allclose(once.entropy, again.entropy, atol=1e-4)
    assert (once.ranks == again.ranks).mean() > 0.99


def test_a_reply_that_begins_otherwise_is_read_again(model, tokenizer, monkeypatch):
    """Where a template opens a reply with more than training saw, the lens reads training's."""
    problems = evenly(held_out(config(), "test"), 3)
    expected = read_series(model, tokenizer, problems, "none")[0].logprobs
    monkeypatch.setattr("eval.encode_prompt_of", lambda p, tokenizer, template: [1, 2, 3])
    wrong = complete(model, tokenizer, problems, 1, "none", keep_taps=True)
    again = read_series(model, tokenizer, problems, "none", wrong)[0].logprobs
    np.testing.assert_array_equal(again, expected)


def test_replies_of_many_lines(model, tokenizer, monkeypatch):
    """A row without a template goes on behind a line break where answers do."""
    asked = []
    monkeypatch.setattr("eval.sample", lambda *_, **given: asked.append(given) or [])
    for answer in ("one\ntwo", "one"):
        measure_accuracy(model, tokenizer, [Problem("a ", answer, "", "file")], 9)
    assert asked == [{"many_lines": True, "keep_taps": False}, {"keep_taps": False}]


def test_compare_needs_the_same_tokens(tmp_path, small_folder, word_bpe):
    data = write_own(tmp_path / "data", [{"prompt": f"{n} + 30 = ", "response": "345"}
                                         for n in range(3)])
    other = write_model(tmp_path / "other", {**small_config(), "vocab_size": 900}, word_bpe)
    with pytest.raises(BadInput, match="read other tokens of the test rows"):
        make_report(small_folder, False, compare=str(other), overrides=[f"data={data}"])


def test_class_block(model):
    assert config().class_block(model.args) == 1  # int(0.55 * 2)
    assert config(method="dual_reward", class_layer=0).class_block(model.args) == 0
    with pytest.raises(BadInput, match="class_layer = 2: expected a block from 0 to 1"):
        config(method="dual_reward", class_layer=2).class_block(model.args)


def test_compare_with_itself_and_print(small_folder):
    report = make_report(small_folder, with_base=False, compare=str(small_folder))
    assert report["compare"]["mcnemar"]["p"] == 1.0
    assert report["compare"]["accuracy"] == report["accuracy"]
    out = report_text({**report, "base": report["compare"]})
    assert "McNemar, exact: 0 solved only by this" in out
    assert "100 - 43 =" in out and "(the output itself)" in out and "operation word" in out


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

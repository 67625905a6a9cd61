"""No test pair in training under any guise, and an explicit loss mask.

Batches depend on the step alone.
"""
import collections
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from conftest import CHAT, TINY, config, run, small_config, write_model

from config import load_config
from data import Batches, make_batch
from eval import make_report
from files.keys import BadInput
from grpo import Answers
from tasks.tiny import sample_tiny
from text.arithmetic import (
    NAMED_PROMPTS,
    SYMBOLS,
    compute,
    evenly,
    grade,
    held_out,
    make_problem,
    number_words,
    operand_pairs,
    phrases_of,
    sample_train,
    split_of,
)
from text.columns import read_problems
from text.own_rows import check_own, prepare_test
from text.rows import Row, encode_prompt_of, load_split, tokenize
from text.tokenizer import load_tokenizer
from train import train

ALL = {"data_operations": ("add", "subtract", "multiply", "divide"),
       "data_wordings": ("symbolic", "worded")}
pair_of = lambda p: tuple(sorted((p.a, p.b)))


def test_no_pair_on_two_sides():
    """Under any operation, wording, order or seed.

    This holds for the fine-tuning data and for the bundled model's text.
    """
    train = {pair_of(p) for seed in (0, 1, 2) for p in sample_train(config(seed=seed, **ALL))}
    train |= {pair_of(p) for p in sample_tiny(50000, seed=0) if p.operation}
    valid, test = ({pair_of(p) for p in held_out(config(**ALL), split)}
                   for split in ("valid", "test"))
    assert len(train) > 3000 and len(test) > 600
    assert not train & valid and not train & test and not valid & test
    named = {tuple(sorted((a, b))) for prompts in NAMED_PROMPTS.values() for _, a, b in prompts}
    assert not named & (train | valid)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_sample_has_every_operations_share(split):
    """Held-out problems are sorted by operation: each cell's share is kept to within one problem.

    More than there are gives all, in order; fewer are distinct.
    """
    problems = held_out(config(**ALL), split)
    cells = collections.Counter((p.operation, p.wording) for p in problems)
    assert len(cells) == 8
    for count in (1, 7, 64, 200, 333, len(problems) - 1):
        chosen = evenly(problems, count)
        assert len(chosen) == len(set(chosen)) == count
        found = collections.Counter((p.operation, p.wording) for p in chosen)
        for cell, size in cells.items():
            assert abs(found[cell] - size * count / len(problems)) < 1, (cell, count)
    assert evenly(problems, len(problems)) == evenly(problems, 10 ** 6) == problems
    assert evenly([], 5) == []


def test_text_of_test_problems_is_nowhere_in_training():
    """The same by text, which also catches a pair that hides in another phrase.

    For example '3 - 4' inside a longer prompt, or words for digits.
    """
    corpus = {p.prompt for p in sample_tiny(50000, seed=0)}
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
    seen = {p.prompt for p in sample_tiny(50_000, seed=0)}
    seen |= {p.prompt for p in sample_train(config(data_samples=5000, **ALL))}
    asked = re.compile(r"what is (\d+ .|the )")
    assert not any(asked.match(text) for text in seen)
    assert asked.match("what is 7 * 8 = ") and asked.match("what is the sum of one and two = ")


def loss_mask(batch):
    """Which positions predict a token that the loss counts, (B, T - 1)."""
    mask = np.zeros((len(batch["tokens"]), batch["tokens"].shape[1] - 1))
    for row, positions, counts in zip(mask, batch["target_positions"], batch["target_mask"]):
        np.add.at(row, positions, counts)   # a position named twice would show as 2
    return mask


def test_batch_example(tokenizer):
    """The docstring's example by hand: two rows of unequal length.

    A third row only fills the batch and counts for nothing.
    """
    rows = [Row([1, 7, 70, 8, 71, 56, 2], 5, 1012), Row([1, 9, 9, 2], 2, 1010)]
    batch = make_batch(rows, [0, 1, -1], 7, 3, config())
    assert loss_mask(batch).tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0], [0] * 6]
    assert batch["target_positions"][:, :2].tolist()[:2] == [[4, 5], [1, 2]]
    assert batch["targets"][:, :2].tolist()[:2] == [[56, 2], [9, 2]]
    assert batch["target_mask"].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert batch["row_mask"].tolist() == [1, 1, 0]
    assert batch["class_positions"].tolist()[:2] == [4, 1]
    assert batch["class_ids"].tolist()[:2] == [1012, 1010]
    batch = make_batch(rows, [0, 1], 7, 3, config(class_position="answer"))
    assert batch["class_positions"].tolist() == [5, 2]


def test_batches_cover_each_epoch_once(tokenizer):
    cfg = config(batch_size=16, grad_accum_steps=2, data_samples=300, **ALL)
    rows = tokenize(sample_train(cfg), tokenizer, 128)
    batches = Batches(rows, cfg)
    for epoch in (0, 1):
        first = epoch * batches.per_epoch
        seen = []
        for step in range(first, first + batches.per_epoch):
            (update,), metrics = batches.at(step)
            seen += metrics["rows"]
            read = [tuple(tokens[tokens != 0]) for b in update
                    for tokens, is_row in zip(np.array(b["tokens"]), b["row_mask"]) if is_row]
            assert read == [tuple(rows[i].ids) for i in metrics["rows"]]
            assert metrics["n_tokens"] == sum(map(len, read))
            counted = {name: sum(b[name].sum().item() for b in update)
                       for name in ("target_mask", "row_mask")}
            for b in update:    # each part's denominators are the whole step's
                assert [b["n_targets"].item(), b["n_rows"].item()] == [*counted.values()]
        assert sorted(seen) == list(range(300))
    assert len(batches.lengths) <= 6
    assert [len(b["tokens"]) for b in batches.at(0)[0][0]] == [8, 8]


def test_a_step_depends_on_the_step_alone(tokenizer):
    cfg = config(batch_size=16, data_samples=300)
    rows = tokenize(sample_train(cfg), tokenizer, 128)
    straight, jumped = Batches(rows, cfg), Batches(rows, cfg)
    for step in range(45):
        straight.at(step)
    rows_of = lambda batches, step: batches.at(step)[1]["rows"]
    assert rows_of(straight, 45) == rows_of(jumped, 45) != rows_of(straight, 46)


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
    problems = read_problems(tmp_path / "train.jsonl")
    rows = [(p.prompt, p.answer, p.operation) for p in problems]
    assert rows == [("a ", "b", ""), ("c ", "d", "add")]
    (tmp_path / "valid.jsonl").write_text(
        '{"prompt": "a"}\nnonsense\n{"prompt": "", "response": "x"}\n')
    with pytest.raises(BadInput, match="3 bad rows: line 1 .*line 2 .*line 3 "):
        load_split(config(data=str(tmp_path)), "valid")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(BadInput, match="is empty"):
        load_split(config(data=str(tmp_path)), "test")


TALK = [{"role": "user", "content": "7 + 8 ="}, {"role": "assistant", "content": "15"},
        {"role": "user", "content": "15 + 4 ="}, {"role": "assistant", "content": "19"}]


@pytest.fixture
def conversations(tmp_path):
    """A data folder of one conversation, one of a turn more, and one question; as problems."""
    rows = [{"messages": TALK}, {"messages": TALK[:2]},
            {"prompt": "7 + 8 = ", "response": "15", "operation": "add"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_problems(tmp_path / "train.jsonl")


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_conversations_are_trained_on_their_replies(template, conversations):
    """What the mask covers, decoded: every reply with what ends it, and no label of a speaker."""
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = CHAT
    rows = tokenize(conversations, tokenizer, 128, [5, 6, 7], template)
    assert rows[1].ids == rows[2].ids and rows[1].P == rows[2].P    # a question is a conversation
    cfg, T = config(), max(len(r.ids) for r in rows)
    A = Batches(rows, cfg).A
    batch = make_batch(rows, [0, 1, -1], T, A, cfg)
    break_, eos = tokenizer.encode("\n")[-1], tokenizer.eos_id
    first, second = tokenizer.word_ids(["15", "19"])
    expected = [first, break_ if template == "plain" else eos, second, eos]
    assert batch["targets"].tolist()[0] == expected and A == 4
    assert batch["targets"].tolist()[1][:2] == [first, eos]
    assert batch["target_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0] * 4]
    assert loss_mask(batch).sum(1).tolist() == [4, 2, 0]
    # the class loss and the lens: before the last reply
    assert [rows[0].ids[t + 1] for t in batch["class_positions"].tolist()[:1]] == [second]
    assert batch["class_ids"].tolist()[:2] == [5, 6]
    answer = make_batch(rows, [0], T, A, config(class_position="answer"))
    assert rows[0].ids[answer["class_positions"].item()] == second
    # generation is asked with what training put in front of the reply
    for problem, row in zip(conversations, rows):
        prompt = encode_prompt_of(problem, tokenizer, template)
        assert prompt == row.ids[:row.P]
    whole = make_batch(rows, [0, 1], T, T - 1, config(mask_prompt=False))
    assert loss_mask(whole).sum(1).tolist() == [len(r.ids) - 1 for r in rows[:2]]


def test_targets_do_not_depend_on_the_history(tokenizer, conversations):
    """Another and longer first question: the same labels."""
    talk = [{"role": "user", "content": "compute nine plus six ="}, *TALK[1:]]
    messages = tuple((m["role"], m["content"]) for m in talk)
    other = dataclasses.replace(conversations[0], messages=messages)
    rows = tokenize([conversations[0], other], tokenizer, 128, template="plain")
    labels = [[row.ids[slice(*span)] for span in row.spans] for row in rows]
    assert labels[0] == labels[1] and len(rows[0].ids) != len(rows[1].ids)


def test_a_cued_question(tokenizer, conversations):
    row, = tokenize(conversations[2:], tokenizer, 128, template="cued")
    assert tokenizer.decode(row.ids[:row.P]) == "Instruction: 7 + 8 =\nResponse:"
    assert row.ids[row.P:] == [*tokenizer.word_ids(["15"]), tokenizer.eos_id]
    with pytest.raises(BadInput, match="cued is for one instruction"):
        tokenize(conversations, tokenizer, 128, template="cued")


def test_a_conversation_needs_a_template(tokenizer, conversations):
    for ask in (lambda: tokenize(conversations, tokenizer, 128),
                lambda: Answers(None, tokenizer, conversations, config(method="grpo"))):
        with pytest.raises(BadInput, match="is a conversation, which needs template: lines, plain"):
            ask()


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_what_is_trained_is_what_is_generated(write_config, tmp_path, template, capsys):
    """Replies in the second turn that only the history gives: learnt, then written and ended.

    Chat is the template that conversations take without being told, and commands the run's own.
    """
    named = {} if template == "chat" else {"template": template}
    tell = lambda n, turns: {"messages": [
        {"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "which"},
        {"role": "user", "content": "the sum"},
        {"role": "assistant", "content": f"{n + 1}\nis {n}" if turns else f"{n + 1}"}]}
    for n, lines in enumerate((False, True)):
        data, source = tmp_path / f"data{n}", tmp_path / f"model{n}"
        rows = "".join(json.dumps(tell(k, lines)) + "\n" for k in range(20, 26))
        data.mkdir()
        for split in ("train", "valid", "test"):
            (data / f"{split}.jsonl").write_text(rows)
        write_model(source, small_config(), TINY)
        (source / "chat_template.jinja").write_text(CHAT)
        path, folder = write_config(
            f"c{n}", model=source, data=data, full="true", batch_size=6, lr=1e-2, steps=60,
            eval_every_steps=0, lens_every_steps=0, save_every_steps=0, **named)
        report = train(load_config(path))
        notes = capsys.readouterr().err.count("are conversations: template chat, the model's own")
        assert notes == (not named)
        assert f"template: {template}\n" in (folder / "config.yaml").read_text()
        assert report["accuracy"]["value"] == 1.0 and report["accuracy"]["n"] == 6
        assert report["prompts"][0]["generated"] == ("21\nis 20" if lines else "21")
        assert (folder / "chat_template.jinja").exists()    # a trained model keeps its template
        assert make_report(folder, False, overrides=["max_completion_tokens=9"])[
            "accuracy"]["value"] == 1.0
    done = run("generate.py", "--ckpt", folder, "--chat", stdin="21\nthe sum\n", check=0)
    assert f"note: template {template}, as the run was trained" in done.stderr
    asked = run("generate.py", "--ckpt", folder, "--prompt", 24, check=0).stdout
    # of a transcript EOS ends the last reply alone, and nobody was taught to write "User:"
    assert template == "plain" or (done.stdout, asked) == ("which\n22\nis 21\n", "24\nwhich\n")
    # the lens reads in front of the reply
    run("lens.py", "--ckpt", folder, "--prompt", 24, "--json", tmp_path / "view.json", check=0)
    view, tokenizer = json.loads((tmp_path / "view.json").read_text()), load_tokenizer(folder)
    prompt, _ = tokenizer.encode_messages(tell(24, True)["messages"][:1], template)
    assert view["tokens"] == [tokenizer.piece(i) for i in prompt] and view["tokens"][-1] == ":"
    assert "which".startswith(view["top"][-1][-1][0][0].strip("·"))
    # conversations without a run: the same default
    plain_model = make_report(source, False, overrides=[f"data={data}"])
    assert plain_model["config"]["template"] == "chat"


@pytest.mark.parametrize("messages", [TALK[:1], TALK[1:], [], "hi", [*TALK[:1], TALK[0]]])
def test_bad_conversations(tmp_path, messages):
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(BadInput, match="1 bad rows: line 1 .*the assistant last"):
        load_split(config(data=str(tmp_path)), "train")


def test_no_data_and_too_long(tokenizer):
    with pytest.raises(BadInput, match="data_samples = 0.*nothing to do"):
        load_split(config(data_samples=0), "train")
    with pytest.raises(BadInput, match="expected arithmetic, a file .* NAME no/such"):
        load_split(config(data="no/such"), "train")
    with pytest.raises(BadInput, match="none of 1 rows fits, such as 'what is .*context is 7 tok"):
        tokenize([make_problem("add", 3, 4, "what is {a} plus {b}")], tokenizer, 7)
    rows = tokenize([make_problem("add", 3, 4)], tokenizer, 7)
    assert np.array_equal([len(r.ids) for r in rows], [7])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ASK = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "7 + 8 ="},
       {"from": "gpt", "value": "15"}]


@pytest.mark.parametrize("row, prompt, answer", [
    ({"prompt": "7 + 8 = ", "response": "15"}, "7 + 8 = ", "15"),
    ({"prompt": "7 + 8 = ", "completion": "15", "id": 3}, "7 + 8 = ", "15"),
    ({"question": "7 + 8 =", "answer": "15"}, "7 + 8 =\n", "15"),
    ({"instruction": "add", "input": "7, 8", "output": "15", "text": "all"}, "add\n7, 8\n", "15"),
    ({"instruction": "add 7, 8", "input": "", "output": "15"}, "add 7, 8\n", "15"),
    ({"instruction": "add 7, 8", "input": None, "output": "15"}, "add 7, 8\n", "15"),
    ({"messages": TALK, "prompt": "another"}, "15 + 4 =", "19"),
    ({"conversations": ASK}, "7 + 8 =", "15"),
    ({"text": "7 + 8 = 15"}, "7 + 8", " = 15"),
])
def test_columns(tmp_path, row, prompt, answer):
    """Each layout as it is published; columns that nobody reads may stand beside it."""
    problem, = read_problems(write_rows(tmp_path / "rows.jsonl", [row]))
    assert (problem.prompt, problem.answer) == (prompt, answer)
    assert set(problem.layout) <= set(row)
    if "conversations" in row:
        assert problem.messages == (("system", "Be brief."), ("user", "7 + 8 ="),
                                    ("assistant", "15"))


@pytest.mark.parametrize("row, prompt, answer, columns", [
    ({"prompt": "7 + 8 = ", "answer": 15}, "7 + 8 = ", "", {"answer": 15}),
    ({"prompt": "7 + 8 = ", "response": None, "text": "all"}, "7 + 8 = ", "", {"text": "all"}),
    ({"prompt": "7 + 8 = ", "completion": "15", "level": 1}, "7 + 8 = ", "15", {"level": 1}),
    ({"instruction": "add", "input": "7, 8", "id": 3}, "add\n7, 8\n", "", {"id": 3}),
    ({"question": "7 + 8 ="}, "7 + 8 =\n", "", {}),
    ({"conversations": ASK[:2], "operation": "add"}, "7 + 8 =", "", {}),
])
def test_columns_without_an_answer(tmp_path, row, prompt, answer, columns):
    """For a user's reward, which is given what no layout reads; to be learnt they are refused."""
    path = write_rows(tmp_path / "rows.jsonl", [row])
    problem, = read_problems(path, needs_answer=False)
    assert (problem.prompt, problem.answer, problem.columns) == (prompt, answer, columns)
    assert set(problem.layout) <= set(row) - set(columns)
    if not answer and "text" not in row:    # which is a plain text then
        with pytest.raises(BadInput, match="1 bad rows: .*may the answer be left out"):
            read_problems(path)


@pytest.mark.parametrize("row, said", [
    ({"prompt": "a", "reply": "b"}, "it has columns prompt, reply.*expected .*question, answer"),
    ({"prompt": "", "response": "b"}, "it has columns response"), ({}, "it has columns none"),
    ({"prompt": "a", "response": 5}, "response must be a string"),
    ([1], "line 1 "),
    ({"text": "a"}, "two characters"), ({"text": 5}, "line 1 "),
    ({"conversations": "hi"}, "line 1 "),
    ({"conversations": ASK[:2]}, "the assistant last"),
    ({"conversations": [{"from": "bing", "value": "b"}]}, "perhaps a system message"),
])
def test_bad_columns(tmp_path, row, said):
    with pytest.raises(BadInput, match=f"1 bad rows: .*{said}"):
        read_problems(write_rows(tmp_path / "rows.jsonl", [row]))


def test_every_token_of_a_text_is_a_target(tokenizer, tmp_path):
    """Where its prompt ends, which may be inside a token, is for lens and reply alone."""
    texts = ["seven times eight = 56", "nine", "what is " + "7 + 8 = 15 and " * 8 + "so on"]
    problems = read_problems(write_rows(tmp_path / "a.jsonl", [{"text": t} for t in texts]))
    assert [p.prompt + p.answer for p in problems] == texts
    assert all(0 < len(p.prompt) <= 80 for p in problems)
    rows = tokenize(problems, tokenizer, 128)
    for row, text in zip(rows, texts):
        assert row.ids == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert 0 < row.P < len(row.ids)
    batch = make_batch(rows, [0, 1, 2], max(len(r.ids) for r in rows), Batches(rows, config()).A,
                       config())
    assert loss_mask(batch).sum(1).tolist() == [len(r.ids) - 1 for r in rows]
    with pytest.raises(BadInput, match="is plain text.*expected template: none, not plain"):
        tokenize(problems, tokenizer, 128, template="plain")


def test_splitting_off(tmp_path, monkeypatch):
    """A tenth of the prompts each, whatever the seed; a prompt's rows on one side, none lost."""
    rows = [{"prompt": f"{n % 40} + 1 = ", "response": f"{n}"} for n in range(60)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    sides = {split: load_split(config(data=str(file)), split) for split in
             ("train", "valid", "test")}
    prompts = {split: {p.prompt for p in side} for split, side in sides.items()}
    assert [len(p) for p in prompts.values()] == [32, 4, 4]
    assert not prompts["train"] & prompts["valid"] and not prompts["test"] & (
        prompts["train"] | prompts["valid"])
    assert sorted(p.answer for side in sides.values() for p in side) == sorted(
        row["response"] for row in rows)
    # of no seed, and of no order of the rows
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "train.jsonl", rows[::-1])
    for split, side in sides.items():
        for cfg in (config(data=str(file), seed=7), config(data=str(other), seed=8)):
            assert set(load_split(cfg, split)) == set(side)
    # of very many prompts only so many: each test row costs time
    monkeypatch.setattr("text.columns.SPLIT_OFF", 3)
    few = load_split(config(data=str(file)), "test")
    assert len({p.prompt for p in few}) == 3
    monkeypatch.undo()
    # what is there is taken as it is; the other is split off the rest
    write_rows(other / "test.jsonl", rows[:3])
    assert len(load_split(config(data=str(other)), "test")) == 3
    assert {p.prompt for p in load_split(config(data=str(other)), "train")} == (
        {row["prompt"] for row in rows} - {
            p.prompt for p in load_split(config(data=str(other)), "valid")})
    with pytest.raises(BadInput, match="rows of 2 different prompts, too few to split valid and"):
        load_split(config(data=str(write_rows(file, rows[:2] * 5))), "train")
    # a conversation is known by its beginning, a text by all of it
    for rows in ([{"messages": [*TALK[:3], {"role": "assistant", "content": f"{n}"}]}
                  for n in range(9)], [{"text": "the same beginning " * 9}] * 9):
        with pytest.raises(BadInput, match="rows of 1 different prompts"):
            load_split(config(data=str(write_rows(file, rows))), "train")
    write_rows(file, [{"text": f"{'the same beginning ' * 9}{n}"} for n in range(9)])
    assert len(load_split(config(data=str(file)), "train")) == 7


def test_long_rows_are_cut(tokenizer, conversations):
    """At the context; no target behind it is left, and a row without any is left out."""
    short, long = make_problem("add", 3, 4), make_problem("add", 3, 4, "what is {a} plus {b}")
    whole = tokenize([short, long], tokenizer, 128)
    assert [len(r.ids) for r in whole] == [7, 9] and not any(r.cut for r in whole)
    rows = tokenize([short, long], tokenizer, 8)
    assert [(r.ids, r.cut) for r in rows] == [(whole[0].ids, False), (whole[1].ids[:8], True)]
    assert [r.targets(config()) for r in rows] == [((5, 7),), ((7, 8),)]
    assert [r.ids for r in tokenize([short, long], tokenizer, 7)] == [whole[0].ids]
    talk, = tokenize(conversations[:1], tokenizer, 128, template="plain")
    (start, stop), (later, _) = talk.spans
    cut, = tokenize(conversations[:1], tokenizer, later, template="plain")
    assert cut.spans == ((start, stop),) and cut.P == start and len(cut.ids) == later
    cut, = tokenize(conversations[:1], tokenizer, later + 1, template="plain")
    assert cut.spans == ((start, stop), (later, later + 1)) and cut.P == later


def test_data_are_described(tmp_path, tokenizer):
    """Columns, counts, what was split off, cut, left out, and prompts on two sides, in one line."""
    rows = [{"prompt": f"{n} + 1 = ", "response": f"{n + 1}"} for n in range(20)]
    rows += [{"question": "one and " * 70, "answer": "2"}, {"text": "one two " * 200}]
    file = write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [rows[5], rows[20], rows[20]])
    cfg = config(data=str(tmp_path))
    train, valid, test = (load_split(cfg, split) for split in ("train", "valid", "test"))
    kept, said = check_own(cfg, tokenize(train, tokenizer, 128), valid, test, tokenizer, 128)
    counts = f"{len(train)} train, {len(valid)} valid, 3 test rows"
    assert kept == valid and len(train) + len(valid) == 22
    assert said == (
        f"data {tmp_path}: columns prompt, response | question, answer | text; {counts}; valid "
        "split off by a hash of each row's prompt; valid or test rows with a training row's "
        "prompt: 3; cut at 128 tokens, the model's context: 1; left out, since the prompt leaves "
        "no room for an answer: 3")
    test, limit, said = prepare_test(test, tokenizer, 128, cfg)
    assert len(test) == 1 and limit == cfg.max_completion_tokens
    assert said.endswith("3 test rows; left out, since the prompt leaves no room for an answer: 2")
    with pytest.raises(BadInput, match="none of 1 rows fits"):
        check_own(cfg, [], valid, read_problems(file)[20:21], tokenizer, 128)


def test_a_talk_given_again_with_one_turn_more_stays_on_its_side(tmp_path):
    talk = lambda n, turns: {"messages": [
        {"role": role, "content": f"{role} {n} {turn}"}
        for turn in range(turns) for role in ("user", "assistant")]}
    file = write_rows(tmp_path / "talks.jsonl", [talk(n, turns) for n in range(20)
                                                 for turns in (1, 2, 3)])
    sides = {split: {p.messages[0] for p in load_split(config(data=str(file)), split)}
             for split in ("train", "valid", "test")}
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["valid"]
    assert sum(map(len, sides.values())) == 20


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a \ud83d", "response": "b"}, "surrogates not allowed"),
    ({"text": "a"}, "two characters"),
    ({"prompt": "a", "response": "b", "hidden": True}, "hidden must be a string")])
def test_rows_that_are_no_text(row, words, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match=f"line 1 .*{words}"):
        read_problems(tmp_path / "train.jsonl")

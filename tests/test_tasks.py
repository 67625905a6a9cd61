"""The published data sets, read from small files in their exact schemas, awkward rows included.

Everything is read back from the folder that `python -m tasks` writes, as training reads it.
"""
import hashlib
import json
import re
from pathlib import Path

import pyarrow
import pytest
from conftest import PUBLISHED, ROOT, TINY_COT, assert_one_clear_line, config, run
from pyarrow import parquet

from files.keys import BadInput
from tasks.__main__ import DEFAULTS, NAMES, make_split, parse, write_task
from tasks.few_shot import FOLDS
from tasks.published import (
    HIDDEN,
    SOURCES,
    chain_prompt,
    cut_article,
    identity,
    load_questions,
    make_question,
    read_rows,
)
from tasks.sums import write_chain
from tasks.tiny import sample_tiny
from text.answers import extract, is_right
from text.arithmetic import SYMBOLS, side_of
from text.columns import read_problems
from text.questions import HEADER
from text.rows import load_split
from text.tokenizer import load_tokenizer

FIXTURES = ROOT / "tests" / "fixtures"
SPLITS = ("train", "valid", "test")
GRADED = [name for name in SOURCES if name != "wiki"]


def load(name, split, folder=None, **given):
    """One split of a published data set, out of its fixture files."""
    own = {"from": str(folder or FIXTURES / name)}
    return make_split(name, split, DEFAULTS[name] | own | given)


def written(name, folder, **given):
    """All three splits, written and read back: {split: problems}."""
    write_task(name, folder, **given)
    return {split: load_split(config(data=str(folder)), split) for split in SPLITS}


def asked(problem):
    return problem.prompt.partition("\nQuestion: ")[2].removesuffix("\nReasoning:")


def find(problems, text):
    return next(p for p in problems if text in p.prompt)


@pytest.mark.parametrize("name", GRADED)
def test_prompts_and_splits(name, tmp_path):
    """Question shown in the one prompt and hidden in the other; no question in two splits."""
    splits = written(name, tmp_path / "out", **{"from": str(FIXTURES / name)})
    # nothing is lost on the way through the folder
    assert splits == {split: load(name, split) for split in SPLITS}
    for problem in (p for problems in splits.values() for p in problems):
        instruction = problem.prompt.partition("\n")[0]
        assert problem.prompt == chain_prompt(instruction, asked(problem))
        assert problem.hidden == chain_prompt(instruction, HIDDEN)
        assert asked(problem) not in problem.hidden
        assert is_right(extract(f" {problem.answer}", problem.letters), problem.answer)
        assert all(f"\n{letter}. " in problem.prompt for letter in problem.letters)
    questions = [{asked(p) for p in problems} for problems in splits.values()]
    assert sum(map(len, questions)) == len(set.union(*questions))
    assert HEADER.endswith(":")


def test_gsm8k_keeps_commas_and_signs():
    problems = load("gsm8k", "train") + load("gsm8k", "valid")
    assert find(problems, "A town of 960").answer == "1,080"
    assert find(problems, "At dawn").answer == "-5"
    assert not any("####" in p.prompt or "<<" in p.prompt for p in problems)


def test_svamp_asks_its_question():
    """Body and Question, joined by one full stop; golds are floats or strings of floats."""
    problem = find(load("svamp", "test"), "87 oranges")
    assert problem.prompt.endswith("93 groups. How big is each group of bananas ?\nReasoning:")
    assert problem.answer == "145"
    problems = load("svamp", "train") + load("svamp", "valid")
    assert len(problems) == 12 and all("." not in p.answer for p in problems)
    assert not any(".. " in p.prompt for p in problems)


def test_mathqa_options_are_split_at_labels():
    """"1,000" is one option; a printed list is read too; no label stays in an option."""
    problems = load("mathqa", "train")
    assert "\nD. 1,000\n" in find(problems, "saves 250").prompt
    assert "\nA. rs . 15\nB. rs . 20" in find(problems, "3 pens").prompt
    assert "\nA. 38\nB. 27.675\n" in find(problems, "38 % of 100").prompt
    assert all(p.letters == "ABCDE" and " ) " not in asked(p).partition("\n")[2] for p in problems)


def test_arc_labels():
    """Numbered options become letters; three and five options are kept."""
    problems = load("arc", "train") + load("arc", "test")
    assert (find(problems, "magnets").answer, find(problems, "ears serve").answer) == ("A", "D")
    assert find(problems, "ice made").letters == "ABC"
    room = find(problems, "room temperature")
    assert room.answer == "E" and room.letters == "ABCDE"


def test_mmlu_drops_what_is_judged_later():
    """The question on plants stands in auxiliary_train and in test: it is not trained on."""
    assert not any("gas do plants" in p.prompt for p in load("mmlu", "train"))
    assert any("gas do plants" in p.prompt for p in load("mmlu", "test"))


def test_mmlu_takes_validation_and_not_dev():
    """The Hub's folder has both, and either could be called valid."""
    assert not any("few-shot" in p.prompt for p in load("mmlu", "valid"))
    assert len(load("mmlu", "valid")) == 2


def test_two_printings_of_a_question_are_one():
    """Spaces, case, options in another order; but a sign is a difference, and so are options
    where the question is nothing without them."""
    make = lambda text: make_question("Solve.", text, "A", "AB")
    same = [make("How many apples does Ana have now?\nA. 1\nB. 2"),
            make("how many  apples does Ana have now ?\nA. 2\nB. 3")]
    assert identity(same[0]) == identity(same[1])
    assert identity(make("What is 3 - 5 then, my friend?")) != identity(
        make("What is 3 + 5 then, my friend?"))
    bare = [make(f"Which of the following is true?\nA. {a}\nB. {b}")
            for a, b in (("cats", "dogs"), ("dogs", "cats"), ("cats", "cows"))]
    assert identity(bare[0]) == identity(bare[1]) != identity(bare[2])


@pytest.mark.parametrize("row, words", [
    ({"question": "q", "choices": "abcd", "answer": 1}, "no list"),
    ({"question": "q", "choices": ["a", "b", "c", ""], "answer": 1}, "empty"),
    ({"question": "q", "choices": ["a", "b", "c", "d"], "answer": "AB"}, "out of range"),
    ({"question": "q", "choices": ["a", "b", "c", "d"], "answer": -1}, "out of range"),
])
def test_golds_and_options_are_checked(row, words):
    with pytest.raises(ValueError, match=words):
        SOURCES["mmlu"].read(row)


def test_aqua_strips_labels():
    assert "\nA. 1,000\nB. 1,002\n" in find(load("aqua", "train"), "x + 2").prompt


@pytest.mark.parametrize("name", SOURCES)
def test_parquet_in_the_hubs_layout_reads_the_same(name, tmp_path):
    """The files as `hf download` leaves them: subset folders, names with counters, parquet."""
    source = SOURCES[name]
    for split in dict.fromkeys(n for n in source.names if n):
        subset = source.files.split("/")[0].replace("*", "data")
        path = tmp_path / subset / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(next((FIXTURES / name).glob(f"{split}.jsonl")))
        if name == "svamp":     # a column has one type
            rows = [row | {"Answer": float(row["Answer"])} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    keys = {"model": TINY_COT, "context": 30, "target": 10} if name == "wiki" else {}
    both = [load(name, "train", folder, **keys) for folder in (tmp_path, FIXTURES / name)]
    assert both[0] == both[1]


@pytest.mark.parametrize("name, told, sizes", [
    ("gsm8k", "train.jsonl 5 % are valid, the rest train", (7127, 346, 1319)),
    ("svamp", "SVAMP.json 5 % are valid, 30 % are test, the rest train", (644, 58, 298)),
    ("aqua", "dev.json 80 % are train, the rest valid", (218, 36, 254)),
    ("mmlu", "high_school_statistics_val.csv 80 % are train, the rest valid", (90, 22, 1064)),
])
def test_a_data_sets_own_repository(name, told, sizes, published, tmp_path, capsys):
    """Every question of its files in one split, once; how those without a file came about, said."""
    splits = written(name, tmp_path, **{"from": str(published / name)})
    if published == PUBLISHED["whole"]:
        assert tuple(map(len, splits.values())) == sizes
    problems = [p for of_split in splits.values() for p in of_split]
    assert len({identity(p) for p in splits["train"] + splits["valid"]}) == len(
        splits["train"] + splits["valid"])
    asked_in = {s: {identity(p) for p in of_split} for s, of_split in splits.items()}
    assert not asked_in["train"] & asked_in["test"] and not asked_in["valid"] & asked_in["test"]
    files = [path for path in (published / name).iterdir() if path.name != "LICENSE"
             and "_dev" not in path.name and "solutions" not in path.name]
    rows = [row for path in files for row in read_rows(path)]
    words = lambda text: "".join(re.findall(r"[a-z0-9]", text.casefold()))   # two printings are one
    assert {words(asked(p).partition("\nA. ")[0]) for p in problems} == {
        words(SOURCES[name].read(row)[0]) for row in rows}
    for problem in problems:
        assert is_right(extract(f" {problem.answer}", problem.letters), problem.answer)
    assert f"{told}, by a hash of the question." in (tmp_path / "README.md").read_text()
    assert "revision `main`" not in (tmp_path / "README.md").read_text()


def test_carving_is_said_once(tmp_path):
    done = run("-m", "tasks", "aqua", tmp_path, "--from", PUBLISHED["sample"] / "aqua", check=0)
    assert done.stderr.count("dev.json 80 % are train, the rest valid, by a hash") == 1


def test_mmlus_csv_by_hand(tmp_path):
    """Commas and line breaks in quotes; *_dev.csv is left to few-shot prompts; blank lines."""
    for split in ("dev", "val", "test"):
        (tmp_path / f"algebra_{split}.csv").write_text(
            f'"Of {split},\nsay ""x"":",1,"2, 3",4,5,B\n\nWhat is {split}?,6,7,8,9,D\n')
    problem, last = load("mmlu", "test", tmp_path)
    assert asked(problem) == 'Of test,\nsay "x":\nA. 1\nB. 2, 3\nC. 4\nD. 5'
    assert (problem.answer, last.answer, problem.letters) == ("B", "D", "ABCD")
    rest = [p for s in SPLITS[:2] for p in load_questions("mmlu", s, str(tmp_path))]
    assert len(rest) == 2 and not any("dev" in asked(p) for p in rest)


@pytest.mark.parametrize("text, words", [
    ("question,A,B,C,D,answer\nq,1,2,3,4,A\n", "1 bad rows of 2: x_test.csv row 1: gold 'answer'"),
    ("q,1,2,3,A\n", "x_test.csv row 1: 3 options, expected 4"), ("alone\n", "row 1: 0 options"),
    ('"q,1,2,3,4,A\n', "could not read .*x_test.csv .*unexpected end"), ("", "split is empty"),
])
def test_bad_csv(text, words, tmp_path):
    (tmp_path / "x_val.csv").write_text("q,1,2,3,4,A\nr,1,2,3,4,A\n")
    (tmp_path / "x_test.csv").write_text(text)
    with pytest.raises(BadInput, match=words):
        load("mmlu", "test", tmp_path)


def test_nothing_is_carved_out_of_test(tmp_path):
    """A folder of test alone trains nobody; whoever has train alone is judged on a part of it."""
    rows = (PUBLISHED["sample"] / "gsm8k" / "test.jsonl").read_text()
    (tmp_path / "test.jsonl").write_text(rows)
    done = run("-m", "tasks", "gsm8k", tmp_path / "out", "--from", tmp_path)
    assert_one_clear_line(done, "no train*.parquet, .jsonl, .json or .csv in", tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "alone").mkdir()
    (tmp_path / "test.jsonl").rename(tmp_path / "alone" / "train.jsonl")
    parts = [load("gsm8k", split, tmp_path / "alone") for split in SPLITS]
    assert sum(map(len, parts)) == 20 and len(parts[2]) in range(1, 8)


def test_fewer_rows_to_judge():
    """--test takes as many for every seed, all of the same split."""
    folder = PUBLISHED["sample"] / "gsm8k"
    some = load("gsm8k", "test", folder, test=5)
    assert len(some) == 5 and set(some) <= set(load("gsm8k", "test", folder))
    assert some == load("gsm8k", "test", folder, test=5, seed=1)


def spoil(name, row, which):
    """A copy of a row with one of two mistakes: a field missing, or a gold that cannot be."""
    field = {"mathqa": "Problem", "svamp": "Question"}.get(name, "question")
    gold = {"gsm8k": {"answer": "no marker"}, "svamp": {"Answer": "many"}, "mmlu": {"answer": 4},
            "arc": {"choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "A"},
            "aqua": {"correct": "F"}, "mathqa": {"options": "a ) 1 , b ) 2"}}[name]
    return row | gold if which else {k: v for k, v in row.items() if k != field}


@pytest.mark.parametrize("name", GRADED)
def test_bad_rows_are_counted_and_shown(name, tmp_path):
    """Missing fields, wrong option counts, golds out of range: five rows and a count, exit 2."""
    names = {n for n in SOURCES[name].names if n}
    for split in names:
        rows = read_rows(FIXTURES / name / f"{split}.jsonl")
        spoilt = [spoil(name, row, i % 2) for i, row in enumerate(rows * 2)]
        rows += spoilt if split == SOURCES[name].names[0] else []
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = SOURCES[name].names[0]
    with pytest.raises(BadInput) as error:
        load(name, "train", tmp_path)
    n = len(read_rows(FIXTURES / name / f"{first}.jsonl"))
    assert f"{2 * n} bad rows of {3 * n}" in str(error.value)
    assert str(error.value).count(f"{first}.jsonl row") == 5
    assert f"row {n + 1}" in str(error.value)
    kept = load(name, "train", tmp_path, skip_bad=True)
    assert [p.prompt for p in kept] == [p.prompt for p in load(name, "train")]


def test_wiki_cuts_at_words_and_never_shares(tmp_path):
    tokenizer = load_tokenizer(TINY_COT)
    splits = written("wiki", tmp_path / "out", model=TINY_COT, context=60, target=30,
                     **{"from": str(FIXTURES / "wiki")})
    articles = {row["text"] for row in read_rows(FIXTURES / "wiki" / "train.jsonl")}
    seen = []
    for problems in splits.values():
        for problem in problems:
            assert problem.wording == "continuation"
            text = next(t for t in articles if t.startswith(asked(problem)))
            rest = text[len(asked(problem)):]
            assert rest[0].isspace() and rest.strip().startswith(problem.answer)
            after = rest.strip()[len(problem.answer):]
            assert after == "" or after[0].isspace() or not after[0].isalnum()
            assert len(tokenizer.encode(asked(problem))) <= 60
            seen.append(text)
    assert len(seen) == len(set(seen)) >= 10
    with pytest.raises(ValueError, match="too short"):
        cut_article("few words", tokenizer, 60, 30)


def test_sums(tmp_path):
    """A sum's side does not depend on the order of its terms, nor on the seed."""
    size = {"samples": 800, "terms": 4, "largest": 9}
    splits = written("sums", tmp_path / "a", **size)
    bags = {s: {tuple(sorted(map(int, asked(p).split(" + ")))) for p in problems}
            for s, problems in splits.items()}
    assert not bags["train"] & bags["test"] and not bags["train"] & bags["valid"]
    assert all(sum(map(int, asked(p).split(" + "))) == int(p.answer) for p in splits["test"])
    other = written("sums", tmp_path / "b", seed=1, **size)
    assert other["test"] == splits["test"] and len(other["test"]) == 600
    assert other["train"] != splits["train"] and len(other["train"]) == 800
    default = make_split("sums", "train", DEFAULTS["sums"] | {"samples": 3})
    assert all(asked(p).count("+") == 14 for p in default)


def shown_pairs(problem) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """(the shots', the question's) operand pair, read from the text itself, whatever its order."""
    *shots, question = problem.prompt.splitlines()
    pair = lambda line: tuple(sorted(re.findall(r"[0-9]+", line)[:2]))
    return [pair(line) for line in shots], pair(question)


@pytest.mark.parametrize("digits, results", [(1, range(10)), (2, range(10, 100))])
def test_few_shot(digits, results, tmp_path):
    """Each problem is tested once over the folds; no test pair is trained on, or shown solved."""
    tested = []
    for fold in range(FOLDS):
        splits = write_task("few_shot", tmp_path / str(fold), digits=digits, fold=fold,
                            samples=10**6, test=10**6)
        tested += [(p.operation, p.prompt.splitlines()[-1]) for p in splits["test"]]
        pairs = {split: {shown_pairs(p)[1] for p in rows} for split, rows in splits.items()}
        assert not pairs["test"] & pairs["train"] and not pairs["test"] & pairs["valid"]
        assert not pairs["valid"] & pairs["train"]
        everything = [p for rows in splits.values() for p in rows]
        assert len({p.prompt for p in everything}) == len(everything)
        for p in everything:
            *shots, question = p.prompt.splitlines()
            assert len(shots) == 3 and set(shown_pairs(p)[0]) <= pairs["train"]
            for line in [*shots, question + p.answer]:
                left, right = line.split(" = ")
                assert eval(left) == int(right) and int(right) in results
            assert SYMBOLS[p.operation] in question
        assert {p.wording for p in everything} == {"one_digit" if digits == 1 else "two_digit"}
    assert len(tested) == len(set(tested)) == (152 if digits == 1 else 8998)


def test_the_seed_moves_training_and_shots_and_never_the_test(tmp_path):
    questions = lambda rows: [p.prompt.splitlines()[-1] for p in rows]
    a, b = (write_task("few_shot", tmp_path / str(seed), digits=2, samples=30, seed=seed)
            for seed in (0, 1))
    assert questions(a["test"]) == questions(b["test"])
    assert questions(a["train"]) != questions(b["train"])
    assert a["test"][0].prompt != b["test"][0].prompt       # other shots


def test_worked_sums(tmp_path):
    """Behind worked examples the hidden prompt still shows them, and no held-out sum is one."""
    splits = write_task("sums", tmp_path, terms=3, largest=9, samples=50, shots=2)
    terms = lambda line: tuple(sorted(map(int, re.findall("[0-9]+", line))))
    for p in splits["test"] + splits["train"]:
        assert p.hidden.count("\nAnswer: ") == 2 and p.hidden.count(HIDDEN) == 1
        *shots, own = re.findall(r"Question: (.*)", p.prompt)
        assert sum(terms(own)) == int(p.answer) and own not in p.hidden
        assert all(side_of(terms(shot)) == "train" for shot in shots)
    assert len(set(splits["test"])) == len(splits["test"])
    assert write_chain((5, 9, 8), "steps") == " 5 + 9 = 14. 14 + 8 = 22."


def test_chain_styles():
    terms = (12, 7, 30)
    assert write_chain(terms, "running") == " 12 + 7 = 19 + 30 = 49"
    assert write_chain(terms, "list") == " 12 and 7 and 30"
    assert write_chain(terms, "about") == " about 50"


def test_corpus_never_shows_a_held_out_sum():
    """No row of the bundled model's text has the terms of a valid or test problem."""
    given = DEFAULTS["tiny_cot"] | {"samples": 3000, "terms": 6, "largest": 20}
    sums = [asked(p).partition("\n")[0] for p in make_split("tiny_cot", "train", given)]
    sums = [tuple(map(int, text.split(" + "))) for text in sums if text.count("+") == 5]
    assert len(sums) > 100
    for terms in sums:
        assert side_of(terms) == "train"


@pytest.mark.parametrize("name, given, expected", [
    ("tiny", {}, ["a432b43326daeaba", "fab9018b65472fc6", "32f19b6587e8e600"]),
    ("tiny_cot", {}, ["5f7ca22bc4d8010e", "eed5da5572ca741b", "54a71bc8e434d772"]),
    ("sums", {"terms": 6, "largest": 9},
     ["e17b17b1306c2514", "1b61644a07a6042b", "633919c11c6519c9"]),
])
def test_the_bundled_models_texts_are_as_published(name, given, expected, tmp_path):
    """The very rows that models/tiny and models/tiny_cot were trained and judged on."""
    splits = written(name, tmp_path / "out", samples=2000, **given)
    digest = lambda problems: hashlib.sha256("".join(
        f"{p.prompt}\t{p.answer}\n" for p in problems).encode()).hexdigest()[:16]
    assert [digest(problems) for problems in splits.values()] == expected


def test_the_bundled_lines_are_its_text():
    """models/tiny/lines.jsonl, over which the Jacobian lens averages."""
    lines = read_problems(ROOT / "models" / "tiny" / "lines.jsonl")
    assert [(p.prompt, p.answer) for p in lines] == [
        (p.prompt, p.answer) for p in sample_tiny(16, seed=1)]


@pytest.mark.parametrize("name", ["tiny", "tiny_cot"])
def test_the_bundled_tokenizers_are_written_again(name, tmp_path):
    """The same pieces with the same ids as the models that are shipped."""
    run("-m", "tasks", name, tmp_path / "out", "--samples", 9, "--tokenizer", tmp_path, check=0)
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(ROOT / "models" / name)
    assert ours.vocab_size == theirs.vocab_size
    assert all(ours.piece(i) == theirs.piece(i) for i in range(ours.vocab_size))


def test_list_and_card(tmp_path):
    listed = run("-m", "tasks", check=0).stdout
    assert all(source.repo in listed for source in SOURCES.values())
    assert all(f"\n{name}" in f"\n{listed}" for name in NAMES)
    done = run("-m", "tasks", "arc", tmp_path / "out", "--from", FIXTURES / "arc", check=0)
    assert "train: 7 problems, 7 distinct" in done.stdout
    assert "note: arc train has 7 rows, the published one 1119" in done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| train | 7 | 7 |" in card and "allenai/ai2_arc" in card
    assert f"data={tmp_path / 'out'} chain_tokens=50" in card


def test_other_bytes_are_never_written_over(tmp_path):
    """The same command again changes nothing; another one is refused, and so is a user's file."""
    write_task("sums", tmp_path / "a", terms=3, samples=9)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert before.keys() == {"train.jsonl", "valid.jsonl", "test.jsonl", "README.md"}
    write_task("sums", tmp_path / "a", terms=3, samples=9)
    for more in ({"terms": 4, "samples": 9}, {"terms": 3, "samples": 8}):
        with pytest.raises(BadInput, match="holds other data; give another folder"):
            write_task("sums", tmp_path / "a", **more)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(BadInput, match="README.md holds other data"):
        write_task("sums", tmp_path, terms=3, samples=9)
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize("words, expected", [
    (("gsm9k", "out"), ("gsm9k", "gsm8k, mmlu, arc")),
    (("sums", "out", "--terms", 2, "--largest", 1), ("--terms 2", "valid split")),
    (("gsm8k", "out", "--from", "no/such"), ("no/such", "hf download openai/gsm8k")),
    (("arc", "out", "--from", FIXTURES / "wiki" / "none"), ("none",)),
    (("sums", "out", "--context", 5), ("--context", "--terms, --largest")),
    (("sums", "out", "--samples", 0), ("--samples 0", "at least 1")),
    (("few_shot", "out", "--digits", 3), ("--digits 3", "expected 1 or 2")),
    (("few_shot", "out", "--fold", 4), ("--fold 4", "expected 0 to 3")),
    (("few_shot", "out", "--shots", 500), ("--shots 500", "give fewer shots")),
])
def test_bad_input(words, expected, tmp_path):
    assert_one_clear_line(run("-m", "tasks", *words), *expected)


def test_every_option_is_some_data_sets():
    """What the command line takes and what the data sets have are the same words."""
    with pytest.raises(BadInput) as error:
        parse(["tiny", "out", "--terms", "3"])
    assert "whose options are --samples, --seed, --unnamed, --tokenizer" in str(error.value)
    for name, options in DEFAULTS.items():
        words = [word for key in options for word in
                 [f"--{key}".replace("_", "-"), *([] if key in ("skip_bad", "unnamed") else ["7"])]]
        assert parse([name, "out", *words])[2].keys() == options.keys()


def test_no_network(tmp_path):
    """What to download, and where to put it."""
    done = run("-m", "tasks", "svamp", tmp_path / "out", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert_one_clear_line(done, "hf download ChilleD/SVAMP --repo-type dataset",
                          "--local-dir data/svamp_files", "--from data/svamp_files")


def test_damaged_file(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "test.jsonl").write_text("{")
    for split in ("train", "test"):
        with pytest.raises(BadInput, match="could not read"):
            load("gsm8k", split, tmp_path)


def test_a_download_must_be_whole(tmp_path, monkeypatch):
    """From the Hub the published number of rows is asserted; from one's own folder it is a note."""
    monkeypatch.setattr("tasks.published.huggingface_hub.snapshot_download",
                        lambda *_, **__: str(FIXTURES / "gsm8k"))
    with pytest.raises(BadInput, match="12 rows, the published one 7473"):
        make_split("gsm8k", "train", DEFAULTS["gsm8k"])


def test_fixture_files_are_all_used():
    assert {p.name for p in Path(FIXTURES).iterdir()} == {*SOURCES, "published"}

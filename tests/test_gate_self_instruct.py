"""Data from the model itself: parsing, near-duplicates by brute force, the critic's arithmetic.

The critic meets a stub whose logits are known: its bias for a letter must cancel exactly. The whole
way runs on a scripted model, and broken off anywhere it ends in the same bytes.
"""
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    ROOT,
    TINY,
    assert_one_clear_line,
    config,
    random_model,
    run,
    small_config,
    write_model,
)

from bench.fullsize import SHAPES
from config import Config, load_config
from engine import memory
from files import disk
from files.disk import append_text, read_rows
from files.keys import BadInput
from files.model_folder import parse_args
from files.run_folder import hash_file
from gate import self_instruct
from gate.self_instruct import (
    END,
    MIN_MASS,
    Run,
    Settings,
    calibrate_critic,
    criticise,
    list_prompt,
    main,
    make_data,
    parse_list,
    read_settings,
    reject_response,
    reject_task,
    respond,
    response_prompt,
    sift,
    split_pairs,
)
from generate import Completion
from text.rows import load_split
from text.similar import Similar, grams, words_of
from text.tokenizer import load_tokenizer

SEEDS = read_rows(self_instruct.SEEDS, lambda row: (row["prompt"], row["response"]), "")


@pytest.mark.parametrize("text, cut, items", [
    (" Name a bird.\n10. Name a fish.", False, ["Name a bird.", "Name a fish."]),
    (" Name a bird.\n10. Name a fi", True, ["Name a bird."]),
    (" Name a bird.\n10. Name a fish.\n", True, ["Name a bird.", "Name a fish."]),
    (" Name a bird.\n\n 10) Add 3.5 and 2. \nSome talk.\n11. Count: 1. 2.", False,
     ["Name a bird.", "Add 3.5 and 2.", "Count: 1. 2."]),
    (" Name a bird.\n1. Name a fish.\n12. Sing.", False, ["Name a bird."]),     # begins anew
    (" Name", True, []), ("", False, []), ("\n", False, []),
])
def test_lists(text, cut, items):
    """The first item, whose number stood in the prompt, is not lost."""
    assert parse_list(9, text, cut) == items


@pytest.mark.parametrize("text, reason", [
    ("Define osmosis.", ""), ("What is 3 + 4?", ""), ("Convert 3 miles to another unit.", ""),
    ("Sing.", "short"), ("", "short"), ("Here are some more tasks", "about the list"),
    ("Summarise the following text.", "about the list"), ("Another task", "about the list"),
    ("Instruction: name a bird", "marker"), ("Name a bird. ###", "marker"),
    ("Name <|im_start|> twice", "marker"), (". . . . a b . . . . .", "no text")])
def test_what_is_no_task(text, reason):
    assert reject_task(text) == reason


@pytest.mark.parametrize("response, stop, reason", [
    ("A wren.", "eos", ""), ("7", "stop:[END]", ""), ("A wr", "length", "cut off"),
    ("", "eos", "empty"), ("Here is a program:", "eos", "announces only"),
    ("Name a bird", "eos", "repeats the task"), ("A wren. ### x", "eos", "marker"),
    ("A wren.\nUser: and a fish?", "eos", "marker"), ("True.", "eos", "statement judged"),
    ("so it is and " * 6, "eos", "repeats itself"),
    ("we saw one two three four five six seven eight of them", "eos", "held out")])
def test_what_is_no_response(response, stop, reason):
    about = SimpleNamespace(heldout=Similar(["one two three four five six seven eight"]))
    assert reject_response(about, "Name a bird.", response.strip(), stop) == reason
    if reason == "statement judged":
        assert reject_response(about, "Is a wren a bird?", response, stop) == ""


def test_words():
    assert words_of("What is 3 + 4?") == ("what", "is", "3", "+", "4")
    assert words_of("\N{FULLWIDTH LATIN CAPITAL LETTER A}bc, well-known\n'x'") == (
        "abc", "well", "known", "x")
    assert words_of("3 * 4") != words_of("3 + 4") and words_of("5 -2") == ("5", "-", "2")


def test_nearest_is_the_jaccard_similarity_by_brute_force():
    rng = random.Random(0)
    base = [[rng.choice("abcdefgh") for _ in range(rng.randrange(1, 14))] for _ in range(60)]
    texts = base + [[w if rng.random() > 0.1 else "z" for w in text] for text in base]
    index, highest = Similar(" ".join(text) for text in texts[:60]), []
    for text in texts:
        fives = grams(tuple(text), 5)
        each = [len(fives & other) / len(fives | other)
                for other in (grams(tuple(t), 5) for t in texts[:60])]
        assert index.nearest(tuple(text)) == pytest.approx(max(each))
        highest.append(max(each))
    assert {0.0, 1.0} < set(highest) and any(0 < value < 1 for value in highest)


def test_held_out_tasks():
    turn = "I live in Bergen and I keep bees on the roof of my house, what should I plant?"
    held = Similar([turn, "Name a bird."])
    assert held.touches(words_of("name a BIRD")) and held.touches(words_of(turn + " Thanks"))
    assert held.touches(words_of("She said: I keep bees on the roof of my house!"))     # 8 in a row
    assert not held.touches(words_of("I keep bees on the roof of a house"))     # 7
    assert not held.touches(words_of("Name a bird of prey."))


# --------------------------------------------------------------------------------------------------
# the critic


class Stub:
    """Logits by the prompt's text: `bias` nats for the first letter, and a view of each item."""
    args = SimpleNamespace(max_position_embeddings=4096)

    def __init__(self, tokenizer, views, bias=0.0, other=-30.0):
        self.tokenizer, self.views, self.bias, self.other = tokenizer, views, bias, other
        self.ids = [tokenizer.encode(letter)[0] for letter in "AB"]

    def final_resid(self, tokens, positions):
        rows = []
        for row in np.array(tokens):
            text = self.tokenizer.decode(row)
            view = next(v for key, v in self.views.items() if key in text)
            good_first = text.index("in text alone" if "in text alone" in text else "is right") < (
                text.index("in doubt"))
            logits = np.full(self.tokenizer.vocab_size, self.other)
            logits[self.ids] = (self.bias + (view if good_first else -view), 0.0)
            rows.append(np.broadcast_to(logits, (positions.shape[1], len(logits))))
        return mx.array(np.stack(rows).astype(np.float32))

    def head(self, resid):
        return resid


@pytest.fixture(scope="module")
def bpe(llama3):
    return load_tokenizer(llama3)


VIEWS = {"N/A": 0.5, "Task: fine": 2.0, "Task: vague": -1.0, "Task: so": 1.4}


def critic(bpe, stub, threshold):
    return Run(None, Settings(threshold=threshold), stub, bpe, SEEDS, Similar())


@pytest.mark.parametrize("bias", [-4.0, 0.0, 3.0])
@pytest.mark.parametrize("kind", ["tasks", "pairs"])
def test_margins_by_hand(bpe, kind, bias):
    """(l_good - l_bad) / 2 of a stub is half its view; less that of N/A; whatever its bias."""
    items = [{"task": name, "response": "x"} for name in ("fine", "vague", "so")]
    rows = criticise(critic(bpe, Stub(bpe, VIEWS, bias), 1.0), kind, items)
    assert [row["margin"] for row in rows] == pytest.approx([1.5, -1.5, 0.9], abs=1e-3)
    assert [row["verdict"] for row in rows] == ["accept", "reject", "reject"]
    assert all(row["mass"] > 0.99 for row in rows)
    rows = criticise(critic(bpe, Stub(bpe, VIEWS, bias), 0.8), kind, items)
    assert [row["verdict"] for row in rows] == ["accept", "reject", "accept"]


def test_the_critic_abstains_where_it_would_say_something_else(bpe):
    """Mass by hand: letters e^2 and 1 against all the other tokens, e^other each."""
    stub = Stub(bpe, {"": 2.0}, other=-4.0)
    row, = criticise(critic(bpe, stub, -9.0), "tasks", [{"task": "fine"}])
    low = np.exp(-2.0) + 1      # the smaller order: the view is against the first letter
    assert row["mass"] == pytest.approx(low / (low + (bpe.vocab_size - 2) * np.exp(-4)), abs=1e-3)
    assert row["mass"] < 0.5 and row["verdict"] == "abstain"


def test_the_critic_is_calibrated_on_pairs_with_known_verdicts(bpe):
    """The seeds' own answers and exchanged ones: letters that share their mass may still tell."""
    views = {f"Task: {task}\nAnswer: {answer}": 1.5 for task, answer in SEEDS} | {"": -0.5}
    about = critic(bpe, Stub(bpe, views, other=-4.0), 1.0)
    found = calibrate_critic(about)
    assert found["auc"] == 1 and 0.001 < found["mass"] == about.least_mass < MIN_MASS
    row, = criticise(about, "pairs", [{"task": SEEDS[0][0], "response": SEEDS[0][1]}])
    assert row["verdict"] == "accept"           # its mass is below the floor of old
    sure = critic(bpe, Stub(bpe, views), 1.0)
    assert calibrate_critic(sure) == {"auc": 1, "mass": MIN_MASS, "template": "none"}
    with pytest.raises(BadInput, match="cannot judge its own answers: .* in 50%"):
        calibrate_critic(critic(bpe, Stub(bpe, {"": 1.0}), 1.0))


# --------------------------------------------------------------------------------------------------
# the whole way, on a scripted model

NOUNS = ("river", "clock", "violin", "glacier", "teapot", "lantern", "meadow", "anchor", "comet")
VERBS = ("Describe a", "Draw one", "Compare any", "Rhyme about some")


def scripted(model, tokenizer, prompts, limit, **keys):
    """Lists of tasks of which some are bad, and responses of which some are cut off."""
    done = []
    for ids in prompts:
        text = tokenizer.decode(ids)
        rng = random.Random(text)
        if text.endswith("Response:"):
            noun = text.split()[-2].strip(".")
            cut = noun == "comet"
            reply = " Here it is:" if noun == "anchor" else f" The {noun}, in a few words."
            done.append(Completion(list(range(9)), reply, not cut, None, None, "" if cut else END))
        else:
            number = int(text.split("\n")[-1].strip("."))
            items = [f"{rng.choice(VERBS)} {rng.choice(NOUNS)} beside a {rng.choice(NOUNS)}."
                     for _ in range(4)]
            items[2] = rng.choice(["Here are more", "Name a held out bird.", items[2]])
            lines = "\n".join(f"{number + i}. {item}" for i, item in enumerate(items))
            done.append(Completion([1] * 20, lines.removeprefix(f"{number}."), True, None, None))
    return done


@pytest.fixture
def scripted_run(bpe, monkeypatch):
    monkeypatch.setattr(self_instruct, "sample", scripted)
    monkeypatch.setattr(self_instruct, "SHOWN", 4)
    monkeypatch.setattr(self_instruct, "SHOTS", 2)
    views = {"N/A": 0.0, "Answer: The clock": -2.0, "violin": 0.2, "": 3.0}    # the first that fits

    def make(folder):
        folder.mkdir()
        return Run(folder, Settings(n=30, seed=5), Stub(bpe, views, 1.0), bpe, SEEDS,
                    Similar(["Name a held-out bird!"]))
    return make


def test_the_whole_way(scripted_run, tmp_path):
    folder = tmp_path / "out"
    found = make_data(scripted_run(folder), {"settings": {"n": 30}})
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
    items, tasks, pairs = read("instructions.jsonl"), read("tasks.jsonl"), read("pairs.jsonl")
    responses = read("responses.jsonl")
    # a funnel over all that was generated: each step begins with what the one before let through
    assert len(items) == sum(found["instructions"].values())
    assert found["instructions"]["kept"] == len(tasks) == 30 == len({t["task"] for t in tasks})
    assert {"duplicate", "about the list", "held out"} <= found["instructions"].keys()
    assert found["tasks"]["accept"] == len(responses) < len(tasks)
    assert found["responses"]["kept"] == len(pairs) < len(responses)
    assert found["responses"]["cut off"] > 0 < found["responses"]["announces only"]
    cut = sum(r["task"].endswith("comet.") for r in responses)
    assert found["cut_off"] == pytest.approx(cut / len(responses), abs=1e-4)
    # accepted and rejected alike are kept with their margins
    assert {t["verdict"] for t in tasks} == {p["verdict"] for p in pairs} == {"accept", "reject"}
    assert all(t["margin"] == pytest.approx(0.2 if "violin" in t["task"] else 3, abs=1e-3)
               for t in tasks)
    good = {(p["task"], p["response"]) for p in pairs if p["verdict"] == "accept"}
    splits = {s: load_split(config(data=str(folder)), s) for s in ("train", "valid", "test")}
    assert {(p.prompt, p.answer) for rows in splits.values() for p in rows} == good
    assert sum(map(len, splits.values())) == len(good)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"] == {"n": 30} and "train.jsonl" in manifest["outputs"]
    assert all(hash_file(folder / name) == value for name, value in manifest["outputs"].items())
    # what was asked is what is stored
    assert all(r["prompt"].endswith(f"Instruction: {r['task']}\nResponse:") for r in responses)


@pytest.mark.parametrize("broken_at", [0, 1, 2, 4, 6])
def test_broken_off_and_continued_is_the_same(scripted_run, tmp_path, monkeypatch, broken_at):
    """Killed in the middle of the k-th write of rows: the same command again, the same bytes."""
    straight, again = tmp_path / "straight", tmp_path / "again"
    make_data(scripted_run(straight), {})
    left = [broken_at]

    def torn(path, text, sync):
        if left[0] == 0:
            with open(path, "ab") as file:      # a part of the rows, the last of them half
                file.write("".join(text.splitlines(keepends=True)[:5]).encode()[:-7])
            raise KeyboardInterrupt
        left[0] -= 1
        append_text(path, text, sync)
    monkeypatch.setattr(disk, "append_text", torn)
    about = scripted_run(again)
    with pytest.raises(KeyboardInterrupt):
        make_data(about, {})
    monkeypatch.setattr(disk, "append_text", append_text)
    make_data(about, {})
    files = sorted(p.name for p in straight.iterdir())
    assert files == sorted(p.name for p in again.iterdir()) and len(files) == 10
    assert all((straight / f).read_bytes() == (again / f).read_bytes() for f in files)


def test_a_changed_step_is_noticed(scripted_run, tmp_path):
    about = scripted_run(tmp_path / "out")
    make_data(about, {})
    path = about.folder / "tasks.jsonl"
    path.write_text(path.read_text().replace("river", "pond"))
    with pytest.raises(BadInput, match="tasks.jsonl is about other tasks"):
        make_data(about, {})


def test_prompts(scripted_run, tmp_path):
    """A list ends with its next number and no space; examples end with the marker."""
    about = scripted_run(tmp_path / "out")
    prompt = list_prompt(about, 3, ["Find a fossil."])
    assert prompt.endswith("\n5.") and "Find a fossil." in prompt
    assert prompt == list_prompt(about, 3, ["Find a fossil."]) != list_prompt(about, 4, [])
    prompt = response_prompt(about, 0, "Find a fossil.")
    assert prompt.count(f"\n{END}\n\n") == 2
    assert prompt.endswith("\n\nInstruction: Find a fossil.\nResponse:")


def test_same_beginnings_are_capped(scripted_run, tmp_path):
    about = scripted_run(tmp_path / "out")
    things = "one tall tree by the old mill", "a boat", "my aunt's garden at noon in May", "soup"
    text = "".join(f"\n{i}. Write a poem about {thing}." for i, thing in enumerate(things, 5))
    rows = sift(about, [{"list": 0, "text": text.removeprefix("\n5."), "stop_reason": "eos"}])
    assert [r["reason"] for r in rows] == ["", "", "", "same beginning"]


def test_splits():
    rows = [{"task": f"task {i}", "response": "x"} for i in range(100)]
    splits = split_pairs(rows, {})
    assert [len(splits[s]) for s in ("train", "valid", "test")] == [90, 5, 5]
    assert splits == split_pairs(rows[::-1], {})
    judged = {"tasks": [{"verdict": "abstain"}] * 24, "pairs": []}
    with pytest.raises(BadInput, match="2 pairs were accepted, too few .*of 24 tasks the critic "
                       "abstained on 24.*a larger n does not mend"):
        split_pairs(rows[:2], judged)


# --------------------------------------------------------------------------------------------------
# on a model of random weights


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """The small model with room for prompts that it spells letter by letter."""
    raw = small_config() | {"max_position_embeddings": 4096}
    return write_model(tmp_path_factory.mktemp("m") / "long", raw, TINY)


def test_steps_on_a_real_model(tmp_path, monkeypatch):
    monkeypatch.setattr(self_instruct, "RESPONSE_TOKENS", 5)
    monkeypatch.setattr(self_instruct, "SHOTS", 1)
    model = random_model(small_config() | {"max_position_embeddings": 4096})
    about = Run(tmp_path, Settings(labels=("1", "2")), model, load_tokenizer(TINY),
                SEEDS, Similar())
    rows = respond(about, [{"task": "3 + 4 ="}, {"task": "5 + 4 ="}], 0)
    assert [r["task"] for r in rows] == ["3 + 4 =", "5 + 4 ="]
    assert all(r["tokens"] <= 5 and r["stop_reason"] == "length" for r in rows)
    rows = criticise(about, "pairs", [{"task": "3 + 4 =", "response": "7"}])
    assert rows[0]["verdict"] == "abstain"      # any of 1394 tokens is as likely
    assert 0 < rows[0]["mass"] < 0.1 and np.isfinite(rows[0]["margin"])


def test_command(long_model, tmp_path, monkeypatch):
    """Random weights cannot judge; if they could, all steps run, and the end says what is left."""
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"turns": [{"user": "Name a bird."}]}) + "\n")
    words = [tmp_path / "out", f"model={long_model}", "n=2", f"heldout={held}", "labels=1,2"]
    done = run("-m", "gate.self_instruct", *words)
    assert_one_clear_line(done, "cannot judge its own answers", "larger model")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(self_instruct, "calibrate_critic", lambda _: {"auc": 1})
    with pytest.raises(BadInput, match="0 pairs were accepted"):
        main([str(word) for word in words])
    assert len((tmp_path / "out" / "lists.jsonl").read_text().splitlines()) == 16
    assert not json.loads((tmp_path / "out" / "qc.json").read_text())["passed"]
    held.write_text(json.dumps({"turns": [{"user": "Name a fish."}]}) + "\n")
    with pytest.raises(BadInput, match="was begun with another SHA-256 of heldout"):
        main([str(word) for word in words])
    with pytest.raises(BadInput, match="was begun with another seed"):
        main([str(word) for word in [*words[:-2], "labels=1,2", "seed=3"]])
    with pytest.raises(BadInput, match="holds other files"):
        main([str(tmp_path), f"model={long_model}", "labels=1,2"])


@pytest.mark.parametrize("words, match", [
    ([], "OUT_FOLDER .key=value"), (["n=3"], "OUT_FOLDER"), (["OUT", "n=0"], "n = 0.*at least 1"),
    (["OUT", "m=3", "seed=-1"], "unknown key 'm'.*seed = -1"),
    (["OUT", "labels=A,A"], "two different words"),
    (["OUT", "heldout=no/such.jsonl"], "no/such.jsonl is missing"),
    (["OUT", f"heldout={TINY}/config.json"], "config.json: .*line 1 .*expected a benchmark")])
def test_bad_words(words, match, tmp_path):
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    with pytest.raises(BadInput, match=match):
        main(words)
    assert not (tmp_path / "out").exists()


def test_the_prior_works_training_by_arithmetic():
    """16,777,216 trained numbers on Qwen2.5-32B's shapes, 2 epochs of 5,467 pairs, 3 % warm-up."""
    cfg = load_config(ROOT / "configs" / "qwen2_5_32b_sft_qlora.yaml")
    args = parse_args(SHAPES["Qwen2.5-32B"], "Qwen2.5-32B")
    assert memory.trained_numbers(args, cfg) == 16_777_216
    every = Config(lora_rank=16, lora_targets=("q", "k", "v", "o", "gate", "up", "down"))
    assert memory.trained_numbers(args, every) == 134_217_728       # what a summary claimed
    assert cfg.steps == 2 * -(-5467 // cfg.batch_size) == 1368
    assert cfg.lr_warmup_steps == round(0.03 * 1368 + 0.5) == 42
    assert cfg.lora_alpha / cfg.lora_rank == 1 and cfg.batch_size // cfg.grad_accum_steps == 2
    assert (cfg.bits, cfg.mask_prompt, cfg.template) == (4, True, "cued")
    # two rows of the longest length there fit the 48 GB that it ran in
    weights = memory.weight_bytes(args, SHAPES["Qwen2.5-32B"],
                                  replace(cfg, dtype="bfloat16"))
    found = memory.estimate(args, cfg, memory.Load(2 * 1024, 1024, 2 * 512), weights)
    assert weights < 23e9 and found["peak"] < 44


def test_seeds():
    assert read_settings(["labels=Y,N"]).labels == ("Y", "N")
    assert len(SEEDS) == len({task for task, _ in SEEDS}) == 16
    assert not any(reject_task(task) for task, _ in SEEDS)

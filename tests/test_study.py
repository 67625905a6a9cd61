"""The study's plan, its tests on made-up runs, and the whole path on a golden model."""
import json

import numpy as np
import pytest
import yaml
from conftest import (
    GOLDEN,
    ROOT,
    TINY,
    assert_one_clear_line,
    config,
    random_model,
    run,
    small_config,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from files.keys import BadInput
from lens import read_prompts
from model import load
from study.document import TEMPLATES
from study.findings import MARKS, block_ranges, question_lines, show
from study.hypotheses import REMARKS, WITHDRAWN, judge_all, test_hypothesis
from study.measure import measure_prediction, measure_wording
from study.plan import load_study, plan
from tasks.__main__ import DEFAULTS
from tasks.tiny import sample_tiny
from text.arithmetic import ASKED_WORDED, ONES, PHRASES, SYMBOLS, TENS, make_problem
from text.tokenizer import load_tokenizer

test_hypothesis.__test__ = False    # it is not one of pytest's
STUDY = ROOT / "study" / "plan.yaml"
SELF_REWARD = f"{ROOT}/study/self_reward.py:self_reward"


# --------------------------------------------------------------------------------------------------
# the plan


def test_plan_of_the_study():
    """What the study promises: seeds enough for a sign-flip test, one thing changed at a time."""
    study = load_study(STUDY, False, [])
    runs = plan(study)
    seeds = {}
    for r in runs:
        seeds.setdefault(r.condition, []).append(r.seed)
    assert study["seeds"] >= 6 and seeds.pop("base") == [1]
    for name, found in seeds.items():
        group = study["conditions"][name]["group"]
        wanted = study["sweep_seeds" if group in ("block", "weight", "LoRA on", "target")
                       else "seeds"]
        assert found == list(range(1, wanted + 1)), name
    assert {r.after.name for r in runs if r.after} == {f"sft_half_{s}" for s in range(1, 9)}
    with_common = [r for r in runs if r.condition == "dual_block_6" and r.seed == 1][0]
    assert {"steps=300", "class_layer=6", "seed=1"} <= set(with_common.words)
    known = set(study["conditions"])
    for q in study["questions"]:
        for h in q["hypotheses"]:
            assert h["first"] in known and h.get("second", "base") in known
            assert h["expect"] in ("higher", "lower", "within")
            assert ("margin" in h) == (h["expect"] == "within")


def test_every_row_and_step_is_the_same_for_all_methods():
    """Steps times problems a step is equal, halves added; GRPO's batch counts completions."""
    study = load_study(STUDY, False, [])
    problems = {}
    for r in plan(study):
        keys = dict(word.split("=", 1) for word in r.words)
        group = int(keys.get("grpo_group_size", 1))
        problems[r.condition] = int(keys["steps"]) * int(keys["batch_size"]) // group
    halves = {"sft_half", "sft_grpo"}
    assert {n for name, n in problems.items() if name not in halves} == {300 * 32}
    assert sum(problems[name] for name in halves) == 300 * 32


def test_study_file_mistakes(tmp_path):
    with pytest.raises(BadInput, match="condition sft: .*lr = 'fast'"):
        plan(load_study(STUDY, True, ["lr=fast", "run_dir=x"]))
    with pytest.raises(BadInput, match="unknown key 'stepz'"):
        plan(load_study(STUDY, False, ["stepz=3", "run_dir=x"]))
    with pytest.raises(BadInput, match="add run_dir=runs/NAME"):
        load_study(STUDY, False, ["model=x"])
    with pytest.raises(BadInput, match="seeds=two: expected a whole number"):
        load_study(STUDY, False, ["seeds=two"])
    bad = tmp_path / "bad.yaml"
    bad.write_text("steps: 3\n")
    for path in (bad, tmp_path / "none.yaml"):
        with pytest.raises(BadInput, match="is not a study file|is missing; expected a study file"):
            load_study(path, False, [])
    assert_one_clear_line(run("-m", "study", "--smoek"), "unknown option --smoek")


# --------------------------------------------------------------------------------------------------
# tests on made-up runs


def made_up(values, problems=None):
    """One measures.json: {seed: {...}} from a list of values of `accuracy.symbolic`."""
    return {s: {"values": {"accuracy.symbolic": v, "answer.peak": 6},
                "problems": {"accuracy.symbolic": problems[s - 1]} if problems else {},
                "trajectory": [{"step": 0, "accuracy": .5, "answer": .1},
                               {"step": 9, "accuracy": v, "answer": v / 2}]}
            for s, v in enumerate(values, 1)}


def question(*hypotheses, rate=0.05):
    return {"questions": [{"question": "q", "hypotheses": list(hypotheses)}],
            "false_discovery_rate": rate}


def test_hypothesis_by_hand():
    data = {"a": made_up([.9, .8, .9, .85, .95, .9]), "b": made_up([.7, .7, .75, .7, .8, .7])}
    h = {"claim": "c", "measure": "accuracy.symbolic", "first": "a", "second": "b"}
    found = test_hypothesis({**h, "expect": "higher"}, data)
    assert found["n"] == 6 and found["p"] == 2 / 64
    assert abs(found["effect"]["value"] - np.mean([.2, .1, .15, .15, .15, .2])) < 1e-9
    outcome = lambda **more: judge_all(question({**h, **more}), data)[0]["outcome"]
    assert outcome(expect="higher") == "confirmed" and outcome(expect="lower") == "refuted"
    assert outcome(expect="higher", beyond=.05) == "confirmed"
    assert outcome(expect="higher", beyond=.15) == "open"
    assert outcome(expect="within", margin=.3) == "confirmed"
    assert outcome(expect="within", margin=.05) == "refuted"
    assert outcome(expect="within", margin=.16) == "open"
    assert outcome(expect="higher", first="b") == "open"    # against itself: no difference
    assert outcome(expect="higher", second="nowhere") == "not run"


def test_lower_beyond_means_a_larger_drop():
    data = {"a": made_up([.5] * 6), "b": made_up([.7, .71, .72, .7, .71, .7])}
    h = {"claim": "c", "measure": "accuracy.symbolic", "first": "a", "second": "b",
         "expect": "lower"}
    outcome = lambda beyond: judge_all(question({**h, "beyond": beyond}), data)[0]["outcome"]
    assert outcome(.11) == "confirmed" and outcome(.25) == "refuted"


def test_base_stands_against_every_seed():
    data = {"a": made_up([.9, .8]), "base": made_up([.6])}
    found = test_hypothesis({"measure": "accuracy.symbolic", "first": "a", "second": "base",
                             "expect": "higher"}, data)
    assert found["n"] == 2 and abs(found["effect"]["value"] - .25) < 1e-9


def test_problems_are_paired():
    """Three seeds cannot reach .05; forty problems can, averaged over the seeds."""
    one = [[1] * 40, [1] * 38 + [0] * 2, [1] * 40]
    two = [[0, 1] * 20] * 3
    data = {"a": made_up([1, .95, 1], one), "b": made_up([.5] * 3, two)}
    h = {"measure": "accuracy.symbolic", "first": "a", "second": "b", "expect": "higher"}
    found = test_hypothesis({**h, "unit": "problems"}, data)
    assert found["p"] == found["p_problems"] < .001 and found["n_problems"] == 40
    assert test_hypothesis(h, data)["p"] == 2 / 8


def test_equal_accuracy_takes_the_first_look_as_right():
    data = {"grpo": made_up([.8, .9]), "sft": made_up([.95, .85])}
    h = {"measure": "answer.equal_accuracy", "first": "grpo", "second": "sft",
         "expect": "within", "margin": .1}
    found = test_hypothesis(h, data)
    # seed 1: .8 / 2 against .95 / 2; in seed 2 SFT never got to .9
    assert found["outcome"] == "not run"
    data["sft"][2]["trajectory"].append({"step": 10, "accuracy": .9, "answer": .3})
    found = test_hypothesis(h, data)
    assert abs(found["effect"]["value"] - ((.4 - .475) + (.45 - .3)) / 2) < 1e-9


def test_the_family_is_adjusted_together():
    """One p of .031 alone is accepted; beside nine that found nothing it is not."""
    data = {"a": made_up([.9] * 6), "b": made_up([.7, .71, .72, .7, .71, .7]),
            "c": made_up([.9, .9, .9, .9, .91, .89])}
    real = {"claim": "c", "measure": "accuracy.symbolic", "first": "a", "second": "b",
            "expect": "higher"}
    alone = judge_all(question(real), data)
    among = judge_all(question(real, *[{**real, "second": "c"}] * 9), data)
    assert alone[0]["outcome"] == "confirmed" and among[0]["outcome"] == "open"
    assert abs(among[0]["adjusted"] - .3125) < 1e-9


def test_text():
    assert block_ranges([0, 1, 2, 4]) == "0–2, 4" and block_ranges([]) == "none"
    interval = {"value": .021, "low": .012, "high": 1.03}
    assert show(interval, "accuracy.symbolic") == "2.1 [1.2, 100.0]"
    assert show(interval, "accuracy.symbolic", signed=True) == "+2.1 [1.2, 103.0]"
    assert show({"value": 6.0, "low": None, "high": None}, "answer.peak") == "6.00"


def test_prediction_finds_what_is_left_and_what_is_not():
    """Right answers made from two numbers: `own` tells on top of confidence, `word` does not."""
    rng = np.random.default_rng(0)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    rows = []
    for _ in range(800):
        own, confidence = rng.normal(0, 1, 2)
        rows.append({"correct": bool(rng.random() < sigmoid(own + confidence)), "operation": "add",
                     "wording": "symbolic", "word": sigmoid(rng.normal()), "own": sigmoid(own),
                     "answer": sigmoid(own), "confidence": sigmoid(confidence)})
    values = {}
    measure_prediction(rows, values)
    assert values["auc.own"] > .65 and abs(values["auc.word"] - .5) < .06
    assert .7 < values["after_confidence.own"] < 1.3 and abs(values["after_confidence.word"]) < .3
    measure_prediction([{**r, "correct": True} for r in rows], values)
    assert values["auc.own"] is None and values["after_confidence.own"] is None


def test_early_answers_are_said_of_one_token_answers(word_bpe):
    """Digits are tokens: beside "5" the answer "68" adds nothing, and alone there is nothing."""
    loaded = load_tokenizer(word_bpe)
    model = random_model({**small_config(4), "vocab_size": loaded.vocab_size})

    def measured(*problems):
        result = {"values": {}, "curves": {}, "problems": {}}
        measure_wording(model, loaded, config(max_completion_tokens=2), list(problems), "symbolic",
                        0, result)
        return result

    short, long = make_problem("add", 2, 3), make_problem("add", 23, 45)
    alone, both, none = measured(short), measured(short, long), measured(long)
    for name in ("answer.strength", "answer.last"):
        assert both["values"][name] == pytest.approx(alone["values"][name], rel=1e-4)
        assert len(both["problems"][name]) == 1 and none["values"][name] is None
    assert both["curves"]["answer.prob"] == pytest.approx(alone["curves"]["answer.prob"], abs=2e-5)
    assert none["curves"]["answer.prob"] == [None] * 5 and none["values"]["answer.peak"] is None
    assert len(none["problems"]["word.strength"]) == 1      # the word's series has all problems
    assert show({"value": np.nan, "low": None, "high": None}, "answer.prob") == "–"


# --------------------------------------------------------------------------------------------------
# the whole path, on another model by its folder


@pytest.fixture(scope="module")
def golden_with_words(tmp_path_factory):
    """A golden Llama-3.2 (random weights, 320 tokens) with a tokenizer that has our words."""
    folder = tmp_path_factory.mktemp("golden") / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((GOLDEN / "llama3_2" / name).read_bytes())
    phrases = [p for group in PHRASES.values() for p in group] + list(ASKED_WORDED.values())
    words = {w for phrase in phrases for w in phrase.split() if "{" not in w}
    words |= {*ONES, *TENS, *SYMBOLS, *SYMBOLS.values(), "hundred", "=", "?", "compute",
              "calculate", "means", "which", "operation", "answer"}
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(words), *map(str, range(199))]
    assert len(vocabulary) <= 320
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def test_whole_path_on_a_golden_model(golden_with_words, tmp_path):
    """Train, measure, write; again without work; one run lost and made again to the same numbers;
    a condition that this model's tokenizer refuses is named and does not stop the rest."""
    full = yaml.safe_load(STUDY.read_text())
    chosen = ("base", "sft", "dual", "dual_block_4", "dual_target_unused")
    full["conditions"] = {name: full["conditions"][name] for name in chosen}
    full["conditions"]["sft_grpo"] = {"group": "main", "label": "SFT then GRPO", "after": "sft",
                                      "set": {"method": "grpo", "batch_size": 16,
                                              "grpo_reward": SELF_REWARD}}
    full["conditions"]["dual_block_1"] = {
        "group": "block", "x": 1, "set": {"method": "dual_reward", "class_layer": 1}}
    full |= {"seeds": 2, "sweep_seeds": 1, "size": {"problems": 9, "pairs": 9, "swap_pairs": 4}}
    full["common"] |= {"steps": 3, "eval_every_steps": 3, "lens_every_steps": 3,
                       "eval_prompts": 6, "data_samples": 100}
    path, runs = tmp_path / "small.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(full))
    command = ("-m", "study", path, f"model={golden_with_words}", f"run_dir={runs}")
    done = run(*command)
    assert_one_clear_line(done, "1 of 9 runs failed", "dual_target_unused seed 1", "<0x01>")
    assert "9 runs, 0 done" in done.stdout and "min left" in done.stdout
    text = (runs / "RESULTS.md").read_text()
    assert "nan" not in text and "Failed: dual_target_unused seed 1" in text
    assert "| SFT then GRPO | 2 |" in text and "not run" in text
    for picture in ("blocks", "steps", "sweeps"):
        assert (runs / f"docs/study_{picture}.png").read_bytes().startswith(b"\x89PNG")
    measures = json.loads((runs / "dual_1" / "measures.json").read_text())
    assert len(measures["claims"]["taps"]) == 5 and measures["block"] == 2
    assert len(measures["problems"]["word.strength"]) == 27
    (runs / "dual_1" / "measures.json").unlink()
    again = run(*command)
    assert "9 runs, 7 done" in again.stdout
    same = json.loads((runs / "dual_1" / "measures.json").read_text())
    for key in ("values", "curves", "problems", "claims", "attribution", "trajectory"):
        assert same[key] == measures[key], key
    report = run("eval.py", "--ckpt", runs / "dual_1", "data_operations=add", check=0).stdout
    assert "operation word top-1 at L2" in report


# --------------------------------------------------------------------------------------------------
# what the plan's hypotheses cannot bear


def test_withdrawn_claims_stay_withdrawn_whatever_their_p():
    """A perfect p does not save a claim whose test cannot bear it; the reason stands beside it."""
    h = {"claim": next(iter(WITHDRAWN)), "measure": "accuracy.symbolic", "first": "a",
         "second": "b", "expect": "higher"}
    data = {"a": made_up([.9, .8, .9, .85, .95, .9]), "b": made_up([.7, .7, .75, .7, .8, .7])}
    asked = judge_all(question(h, {**h, "claim": "another"}), data)
    assert [x["outcome"] for x in asked] == ["withdrawn", "confirmed"]
    assert asked[0]["p"] == 2 / 64 and asked[0]["adjusted"] == asked[1]["adjusted"]
    lines = question_lines(asked).splitlines()
    assert lines[-2].startswith("- ⊘") and lines[-2].endswith(f"Withdrawn: {WITHDRAWN[h['claim']]}")
    assert lines[-1].startswith("- ✓ another") and "Withdrawn" not in lines[-1]


def test_results_say_what_the_generator_says():
    """The committed RESULTS.md holds the section and every reason, and nothing they correct."""
    plan = yaml.safe_load(STUDY.read_text())["questions"]
    claims = {h["claim"] for q in plan for h in q["hypotheses"]}
    assert claims >= WITHDRAWN.keys() | REMARKS.keys()
    text, heading = (ROOT / "RESULTS.md").read_text(), "## What these runs do not show"
    template = (TEMPLATES / "study.md").read_text()
    section = template[template.index(heading):template.index("## Answers")]
    assert section in text
    for claim in claims:
        [line] = [x for x in text.splitlines() if x[:2] == "- " and x[4:].startswith(f"{claim}:")]
        assert (line[2] == MARKS["withdrawn"]) == (claim in WITHDRAWN)
        said = WITHDRAWN.get(claim) or REMARKS.get(claim)
        assert line.endswith(said) if said else "But:" not in line and "Withdrawn" not in line
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/methods.md"))
    for wrong in ("readable, not used.", "Block 4 costs less", '("373737")'):
        assert wrong not in pages


def test_what_is_said_of_the_base_s_text_is_so():
    """8.0 % of its lines name the operation, half by "which operation is"; the lens agrees."""
    rows = sample_tiny(DEFAULTS["tiny"]["samples"], DEFAULTS["tiny"]["seed"])
    naming = [p for p in rows if p.wording == "naming"]
    asked = sum(p.prompt.startswith("which operation is ") for p in naming)
    assert f"{len(naming) / len(rows):.1%}" == "8.0%" and abs(asked / len(naming) - 0.5) < 0.01
    model, tokenizer = load(TINY)
    [word] = tokenizer.word_ids(["multiply"])
    reading = read_prompts(model, [tokenizer.encode_prompt(text) for text in
                                   ("which operation is 7 * 8 ? ", "7 * 8 = ")], [[word]] * 2)
    is_top = reading.top_ids[:, :, 0, 0] == word                                    # (L+1, 2)
    assert is_top[2:, 0].all() and not is_top[:2, 0].any() and not is_top[:, 1].any()
    assert f"{reading.probs[5, 0, 0, 0]:.0%}" == "74%"      # after block 4
    for page in ("README.md", "docs/methods.md", "RESULTS.md", "models/tiny/README.md"):
        text = (ROOT / page).read_text()
        assert "which operation is 7 * 8 ?" in text and "8.0 %" in text and "74 %" in text, page

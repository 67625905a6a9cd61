"""The study: its plan, its judging on made-up runs, its measures, and the whole path on a model."""
import json
import statistics

import numpy as np
import pandas
import pytest
import scipy
import statsmodels.formula.api as formula
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

from config import load_overrides
from files.keys import BadInput
from lens import read_prompts
from model import load
from report.stats import wilson
from study.__main__ import plain_descent
from study.judge import judge, numbers, p_of, resolves, value_of
from study.measure import half_rise, hand_over, read_series
from study.plan import load_study, plan
from tasks.__main__ import DEFAULTS
from tasks.tiny import sample_tiny
from text.arithmetic import ASKED_WORDED, ONES, PHRASES, SYMBOLS, TENS, make_problem
from text.tokenizer import load_tokenizer

STUDY = ROOT / "study" / "plan.yaml"
SELF_REWARD = f"{ROOT}/study/self_reward.py:self_reward"


# --------------------------------------------------------------------------------------------------
# the plan


def keys_of(run):
    return dict(word.split("=", 1) for word in run.words())


@pytest.fixture
def planned(tmp_path):
    """The study's own runs, in a folder where each base has measures already."""
    study = load_study(STUDY, [f"measures={tmp_path}", f"run_dir={tmp_path}"])
    for name in study["bases"]:
        for fold in range(1, 5):
            turned = [.9, .6, .1] if name == "taught" else [.1, .2, .2 + .1 * fold, .2]
            text = json.dumps({"turned_by_block": turned, "lengths": [fold]})
            (tmp_path / f"{name}-base-{fold}.json").write_text(text)
    return study, plan(study)


def test_plan_of_the_study(planned):
    """What the study promises: seeds enough, five sets of words, one thing changed at a time."""
    study, runs = planned
    count = lambda base, arm: len([r for r in runs if (r.base, r.arm) == (base, arm)])
    for base in study["bases"]:
        assert {count(base, arm) for arm in ("sft", "dual", "permuted", "hand_over")} == {8}
        assert count(base, "neutral") == 5
    assert count("taught", "grpo") == 3
    assert count("taught", "w07") == count("taught", "sft_500") == 8
    assert count("smollm2", "grpo") == 6 and count("smollm2", "published") == 2
    assert count("smollm2", "base") == 4 and count("taught", "base") == 1
    assert [r.arm for r in runs[:8]] == ["base"] * 8    # what the others read
    at = {(r.base, r.arm, r.seed): keys_of(r) for r in runs}
    for base in study["bases"]:
        dual = at[base, "dual", 2]
        for arm, more in (("permuted", {"class_words"}), ("hand_over", {"class_layer"}),
                          ("neutral", {"class_words"})):
            keys = at[base, arm, 2]
            differ = {k for k in keys | dual if keys.get(k) != dual.get(k)} - {"run_dir"}
            assert differ == more, (base, arm)
        assert {k for k in dual if dual[k] != at[base, "sft", 2].get(k)} == {
            "method", "class_weight", "run_dir"}
    assert at["taught", "hand_over", 1]["class_layer"] == "1"       # the last with half
    assert at["smollm2", "hand_over", 4]["class_layer"] == "2"      # half in its folds' mean
    base = next(r for r in runs if (r.base, r.arm, r.seed) == ("smollm2", "sft", 6)).read_base()
    assert base == {"lengths": [2], "hand_over": 2}                 # fold 1's lengths
    words = [at["smollm2", "permuted", seed]["class_words"] for seed in range(1, 9)]
    assert words[:4] == words[:1] * 4 and words[4:] == words[4:5] * 4 and words[0] != words[4]
    assert at["smollm2", "dual", 2]["data"] == at["smollm2", "sft", 6]["data"] == (
        "runs/study/one_digit_1")
    both, right = at["untaught_2", "published", 1], at["untaught_2", "published_right", 1]
    assert {k for k in both if both[k] != right.get(k)} == {
        "answer_shift", "class_position", "run_dir"}
    assert (both["batch_size"], both["lr"], both["lora_targets"]) == ("1", "0.0005", "v,o")


def test_words_of_the_controls(planned):
    """Permuted words are each another operation's; neutral sets differ and name no operation."""
    study, _ = planned
    operations = ("add", "subtract", "multiply")
    for kind in study["kinds"].values():
        for words in kind["permuted"]:
            assert sorted(words) == sorted(operations)
            assert all(word != operation for word, operation in zip(words, operations))
        neutral = [word for words in kind["neutral"] for word in words]
        assert len(set(neutral)) == len(neutral) == 15
        assert not set(neutral) & {*SYMBOLS, "plus", "minus", "times"}
    corpus = {word for p in sample_tiny(5000, 1, unnamed=True) for word in p.prompt.split()}
    assert {w for words in study["kinds"]["tiny"]["neutral"] for w in words} <= corpus


def test_hypotheses_name_what_there_is(planned):
    study, _ = planned
    groups = {base["group"] for base in study["bases"].values()}
    assert 1 <= len(study["hypotheses"]) <= 8
    for h in study["hypotheses"]:
        for test in h["tests"]:
            assert set(test["groups"]) <= groups
            assert {test["arm"], test.get("less", "base")} <= set(study["arms"])
            assert test["expect"] in ("above", "below", "within", "described")


def test_untaught_text_never_names_an_operation():
    """Nothing asks for a name and no answer is one; the words are inputs, one worded line in five.
    """
    unnamed = sample_tiny(20000, 7, unnamed=True)
    assert any(p.answer in SYMBOLS for p in sample_tiny(100, 7))
    assert not any(p.wording == "naming" or p.answer in SYMBOLS for p in unnamed)
    text = [f"{p.prompt}{p.answer}" for p in unnamed]
    assert not any("which operation" in line for line in text)
    inputs = sum(any(f"{word} " in line for word in SYMBOLS) for line in text) / len(text)
    assert 0.02 < inputs < 0.06


def test_mistakes_in_a_plan(tmp_path):
    for words, said in ((["bases=untaught_9"], "unknown base untaught_9"),
                        (["lr=1"], "expected run_dir=FOLDER, measures=FOLDER or bases=A,B"),
                        (["measures"], "got 'measures'")):
        with pytest.raises(BadInput, match=said):
            load_study(STUDY, words)
    bad = tmp_path / "bad.yaml"
    bad.write_text("steps: 3\n")
    for path in (bad, tmp_path / "none.yaml"):
        with pytest.raises(BadInput, match="is not a study's plan|expected a study's plan"):
            load_study(path)
    bad.write_text(STUDY.read_text().replace("  w07: {", "  w08: {"))
    with pytest.raises(BadInput, match="names the arm w07; expected one of base"):
        load_study(bad)
    text = STUDY.read_text().replace("class_weight: 0.2", "class_wait: 0.2")
    bad.write_text(text)
    with pytest.raises(BadInput, match="arm dual on untaught_1: .*class_wait"):
        plan(load_study(bad))
    assert_one_clear_line(run("-m", "study", "--smoek"), "--smoek")


# --------------------------------------------------------------------------------------------------
# judging made-up runs


def made_up(base, arm, values, top1=1.0, words=0.0, swap=0.5, folds=1):
    """Runs of one arm: seed 1, 2, ... with these accuracies."""
    swaps = {"words_n": [words, 1, 0], "random_n": [.05, 1, 0], "swap_n": [swap, 0, 1]}
    return {(base, arm, s): {
        "values": {"accuracy": v, "n.word": 50, "word.any": .02 * s}, "block": 4, "hand_over": 0,
        "fold": (s - 1) % folds,
        "curves": {"target.top1": [0] * 5 + [top1] + [0] * 3, "word.top1": [0.1] * 9},
        "taps": [{"tap": 1, "swaps": {**swaps, "words_n": [0.9, 1, 0]}},
                 {"tap": 5, "swaps": swaps}]} for s, v in enumerate(values, 1)}


def asked(measures, groups, seeds=6, tests=1, **test):
    """One hypothesis of `tests` tests like this one, in a study of so many seeds an arm."""
    bases = {b: {"group": g, "kind": "k"} for g, names in groups.items() for b in names}
    test = {"value": "accuracy", "arm": "a", "groups": list(groups), **test}
    study = {"bases": bases, "kinds": {"k": {"folds": 2, "seeds": {"main": seeds}}},
             "arms": {"a": {"group": "main"}, "s": {"group": "main"}, "base": {}},
             "hypotheses": [{"id": "H", "claim": "c", "tests": [test] * tests}]}
    return judge(study, measures)[0]["tests"]


def test_value_of_a_run():
    [one] = made_up("b", "a", [.9], top1=.7, words=.2).values()
    assert value_of(one, "accuracy") == .9 and value_of(one, "target.block") == .7
    assert value_of(one, "word.block") == .1 and value_of(one, "swap_n.block") == .5
    assert value_of(one, "words_over_random.block") == pytest.approx(.15)
    assert value_of(one, "words_over_random.hand_over") == pytest.approx(.85)
    # where the whole swap does no more than a random direction, its parts say nothing
    for swap in (.14, None):
        [one] = made_up("b", "a", [.9], words=.0, swap=swap).values()
        assert value_of(one, "words_over_random.block") is None


def test_numbers_pair_seeds_and_folds():
    measures = (made_up("b", "a", [.9, .8, .7, .6, .5, .4], folds=4) | made_up("b", "s", [.5] * 3)
                | made_up("b", "base", [.1, .2, .3, .4], folds=4))
    of = lambda **more: numbers(measures, "b", {"value": "accuracy", "arm": "a", **more})
    assert of() == [.9, .8, .7, .6, .5, .4]
    assert of(less="s") == pytest.approx([.4, .3, .2])
    # seed 5 was trained on seed 1's fold, and so on
    assert of(less="base") == pytest.approx([.8, .6, .4, .2, .4, .2])
    del measures["b", "base", 2]        # no other fold's base takes its place
    assert of(less="base") == pytest.approx([.8, .4, .2, .4])


def test_p_by_hand():
    """n 4, mean .25, sd .1291: t = .25 / .06455 = 3.873, one-sided p .0152 at 3 degrees."""
    values = np.array([.1, .2, .3, .4])
    assert p_of(values, {"expect": "above", "bound": 0}) == pytest.approx(.01523, abs=1e-4)
    assert p_of(values, {"expect": "below", "bound": 0}) == pytest.approx(1 - .01523, abs=1e-4)
    assert p_of(values, {"expect": "within", "bound": .5}) == pytest.approx(.01523, abs=1e-4)
    same = np.array([.6, .6])
    assert p_of(same, {"expect": "above", "bound": .5}) == 0
    assert p_of(same, {"expect": "below", "bound": .5}) == 1
    assert p_of(same, {"expect": "above", "bound": .6}) == 1        # not beyond it
    # (2.3534 + .9785) * .1291 / 2; of ten tests at the strictest step t is 5.841
    assert resolves(values, {"expect": "above"}, 1) == pytest.approx(.21507, abs=1e-4)
    assert resolves(values, {"expect": "above"}, 10) == pytest.approx(.44019, abs=1e-4)
    assert resolves(values, {"expect": "within"}, 1) == pytest.approx(.25762, abs=1e-4)


NEAR, WIDE = [.9, .91, .89, .9, .9, .91], [.7, .95, .6, .9, .7, .8]


def test_a_group_s_test_must_hold_on_each_base():
    good = made_up("b1", "a", NEAR) | made_up("b2", "a", NEAR)
    [found] = asked(good, {"g": ["b1", "b2"]}, expect="above", bound=.8)
    assert found["outcome"] == "holds" and found["pooled"]["n"] == 2
    bad = made_up("b1", "a", NEAR) | made_up("b2", "a", WIDE)
    [found] = asked(bad, {"g": ["b1", "b2"]}, expect="above", bound=.8)
    assert found["outcome"] == "undecided" and found["p"] > .05
    found = asked(bad, {"g": ["b1"], "h": ["b2"]}, expect="above", bound=.8)
    assert [t["outcome"] for t in found] == ["holds", "undecided"]


def test_contradicted_is_not_undecided():
    data = made_up("b", "a", NEAR)
    of = lambda **test: asked(data, {"g": ["b"]}, **test)[0]["outcome"]
    assert of(expect="above", bound=.95) == of(expect="below", bound=.8) == "contradicted"
    assert of(expect="within", bound=.5) == "contradicted"
    assert of(expect="within", bound=1) == "holds"
    assert of(expect="above", bound=.905) == "undecided"


def test_nothing_is_judged_before_its_last_run():
    of = lambda data, **test: asked(data, {"g": ["b"]}, expect="above", bound=.5, **test)[0]
    assert of(made_up("b", "a", NEAR[:5]))["outcome"] == "runs missing"
    assert of(made_up("b", "a", NEAR), less="s")["outcome"] == "runs missing"
    data = made_up("b", "a", NEAR)
    for seed in range(1, 6):            # one run that can be measured does not stand for six
        data["b", "a", seed]["values"]["accuracy"] = None
    assert of(data)["outcome"] == "not measurable" and of(data)["p"] is None
    assert of({})["outcome"] == "runs missing"


def test_all_planned_tests_are_corrected_together():
    """A p of .03 alone holds; beside three others, run or not, it does not."""
    values = [.56, .64, .5, .66, .47, .6]
    p = p_of(np.array(values), {"expect": "above", "bound": .5})
    assert .01 < p < .05
    data = made_up("b", "a", values)
    of = lambda groups, **more: asked(data, groups, expect="above", bound=.5, **more)
    assert of({"g": ["b"]})[0]["outcome"] == "holds"
    four = of({"g": ["b"]}, tests=4)
    assert four[0]["outcome"] == "undecided" and four[0]["adjusted"] == pytest.approx(4 * p)
    other = of({"g": ["b"], "h": ["c"]})        # of which there is no run
    assert [t["outcome"] for t in other] == ["undecided", "runs missing"]
    assert other[0]["adjusted"] == pytest.approx(2 * p)


def test_a_described_share_is_of_all_problems():
    """Two folds of 50 problems, 1 and 2 hits: 3 of 100, Wilson's interval, and no test."""
    data = made_up("b", "base", [.5, .5], folds=2)
    of = lambda bound: asked(data, {"g": ["b"]}, value="word.any", arm="base", bound=bound,
                             expect="described")[0]
    assert [of(bound)["outcome"] for bound in (.09, .05, .005)] == [
        "holds", "undecided", "contradicted"]
    assert of(.05)["bases"]["b"] | {"runs": 0} == {**wilson(3, 100), "resolves": None, "runs": 0}
    assert of(.05)["p"] is None


def test_pooled_over_bases_is_the_mixed_model_s():
    """Runs within bases, balanced: the mean of means, its error that of a random base effect."""
    rng, rows, measures = np.random.default_rng(1), [], {}
    for i in range(6):
        values = (.8 + .05 * rng.standard_normal() + .01 * rng.standard_normal(8)).tolist()
        measures |= made_up(f"b{i}", "a", values)
        rows += [{"y": v, "base": i} for v in values]
    [found] = asked(measures, {"g": [f"b{i}" for i in range(6)]}, seeds=8, expect="above", bound=.5)
    pooled = found["pooled"]
    data = pandas.DataFrame(rows)
    theirs = formula.mixedlm("y ~ 1", data, groups=data["base"]).fit()
    assert pooled["value"] == pytest.approx(theirs.params["Intercept"], abs=1e-6)
    half = 2.570582 * theirs.bse["Intercept"]       # Student's .975 at 5 degrees of freedom
    assert pooled["high"] - pooled["value"] == pytest.approx(half, rel=2e-3)


# --------------------------------------------------------------------------------------------------
# measures


def test_hand_over():
    assert hand_over([[.1, .6, .5, .2]]) == 2 and hand_over([[.1, .4, .2]]) == 1
    assert hand_over([[.1, .9, .2], [.1, .2, .6]]) == 1      # .55 in the mean, .4 behind it


def test_half_rise():
    assert half_rise(np.array([0, 0, .2, .6, .8])) == pytest.approx(1.5)
    assert half_rise(np.array([0, 0, 0, 0, .8])) == pytest.approx(2.5)
    assert half_rise(np.array([0, .9, .9])) == pytest.approx(-.5)
    assert half_rise(np.zeros(3)) is None


def test_early_answers_are_said_of_one_token_answers(word_bpe):
    """Digits are tokens: beside "5" the answer "68" adds nothing to the answer's curve."""
    loaded = load_tokenizer(word_bpe)
    model = random_model({**small_config(4), "vocab_size": loaded.vocab_size})
    measured = lambda *problems: read_series(model, loaded, config(max_completion_tokens=2),
                                             list(problems))
    short, long = make_problem("add", 2, 3), make_problem("add", 23, 45)
    alone, both = measured(short), measured(short, long)
    assert both["curves"]["answer.prob"] == pytest.approx(alone["curves"]["answer.prob"], rel=1e-3)
    assert both["values"]["answers"] == 1 and both["values"]["n"] == len(both["right"]) == 2
    assert both["curves"]["word.prob"] != pytest.approx(alone["curves"]["word.prob"], rel=1e-3)


def test_series_of_the_bundled_model():
    """What its card says: it adds and subtracts, never names the operation; swapped targets."""
    model, tokenizer = load(TINY)
    problems = [make_problem(op, a, b) for op in ("add", "subtract", "multiply")
                for a, b in ((23, 14), (17, 12), (38, 22), (50, 23))]
    found = read_series(model, tokenizer, config(), problems)
    assert found["values"]["n"] == 8 and found["values"]["accuracy"] > 0.5
    assert found["values"]["word.any"] == 0 and found["values"]["word.strength"] < 0.05
    assert found["curves"]["target.prob"] == found["curves"]["word.prob"]
    assert len(found["curves"]["length"]) == 9 and found["values"]["auc"] is None
    other = read_series(model, tokenizer,
                        config(class_words=("subtract", "multiply", "add")), problems)
    assert other["curves"]["word.prob"] == found["curves"]["word.prob"]
    assert other["curves"]["target.prob"] != found["curves"]["word.prob"]


def test_plain_descent_steps_against_the_gradient():
    """The prior code's optimizer: no moments, and the loop's own counter is there."""
    model = random_model(small_config(2))
    model.freeze()
    model.model.norm.unfreeze()
    optimizer = plain_descent(load_overrides(["lr=0.5"]), model)
    before = np.array(model.model.norm.weight)
    optimizer.update(model, {"model": {"norm": {"weight": model.model.norm.weight * 0 + 2.0}}})
    np.testing.assert_allclose(np.array(model.model.norm.weight), before - 1.0)
    assert optimizer.step.item() == 1


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
    """Train, measure, judge, write; again without work; one run lost and made again to the same
    numbers; an arm that this model's tokenizer refuses is named and does not stop the rest."""
    full = yaml.safe_load(STUDY.read_text())
    full["bases"] = {"golden": {"kind": "tiny", "group": "untaught",
                                "model": str(golden_with_words)}}
    chosen = ("base", "sft", "dual", "permuted", "hand_over", "published")
    full["arms"] = {name: full["arms"][name] for name in chosen}
    full["arms"]["grpo"] = {"group": "other", "label": "GRPO",
                            "set": {"method": "grpo", "grpo_reward": SELF_REWARD}}
    full["arms"]["unread"] = {"group": "other", "label": "unread",
                              "set": {"method": "dual_reward", "class_words": ["a", "b", "c"]}}
    full["hypotheses"] = [h for h in full["hypotheses"] if h["id"] in ("H1", "H3", "H4", "H8")]
    kind = full["kinds"]["tiny"]
    kind |= {"seeds": {"main": 2, "other": 1}, "size": {"problems": 9, "pairs": 9, "every": 2}}
    kind["set"] |= {"steps": 3, "data_samples": 100}
    kind["arms"] = {"grpo": {"batch_size": 16, "grpo_group_size": 8}}
    full["sgd"] |= {"steps": 2}
    full["jacobian"] |= {"arms": []}        # a random model writes no text without numbers
    full |= {"run_dir": str(tmp_path / "runs"), "measures": str(tmp_path / "measures")}
    path, out = tmp_path / "small.yaml", tmp_path / "docs"
    path.write_text(yaml.safe_dump(full))
    command = ("-m", "study", path, "--out", out)
    done = run(*command)
    assert_one_clear_line(done, "1 of 12 runs failed", "golden unread 1")
    assert "12 runs, 0 done" in done.stdout and "min left" in done.stdout
    text = (out / "study.md").read_text()
    assert "nan" not in text and "11 of 12 planned runs" in text and "runs missing" in text
    assert "- **H4." in text and " on untaught, runs missing on smollm2." in text
    assert "| GRPO | 1 |" in text and "| unread | 0 of 1 |" in text
    assert "golden" in (out / "study_appendix.md").read_text()
    for picture in ("forest", "claims"):
        assert (out / f"study_{picture}.png").read_bytes().startswith(b"\x89PNG")
    file = tmp_path / "measures" / "golden-dual-1.json"
    measures = json.loads(file.read_text())
    base = json.loads((tmp_path / "measures" / "golden-base-1.json").read_text())
    assert measures["lengths"] == base["lengths"] and measures["block"] == 2
    assert {tap["tap"] for tap in measures["taps"]} == {1, 3, 4, base["hand_over"] + 1}
    assert set(measures["subspace"]) == {str(base["hand_over"]), "2"}
    moved = json.loads((tmp_path / "measures" / "golden-hand_over-1.json").read_text())
    assert moved["block"] == base["hand_over"]
    file.unlink()
    again = run(*command)
    assert "12 runs, 10 done" in again.stdout
    same = json.loads(file.read_text())
    for key in ("values", "curves", "right", "taps", "subspace"):
        assert same[key] == measures[key], key
    path.write_text(path.read_text().replace("lr: 0.002", "lr: 0.001"))
    assert_one_clear_line(run(*command), "measured under other keys", "measures=FOLDER")
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.002"))
    written = (out / "study.md").read_bytes()
    run("-m", "study", path, "--out", out, "--report", check=0)
    assert (out / "study.md").read_bytes() == written


def test_answers_are_the_numbers_of_the_measures():
    """Six numbers of docs/study.md, from the files by another way: sentence by sentence."""
    runs = [json.loads(file.read_text()) for file in (ROOT / "study" / "measures").glob("*.json")]
    untaught = ["untaught_1", "untaught_2", "untaught_3"]

    def over_bases(arm, number):
        return [statistics.mean(number(run) for run in runs if (run["base"], run["arm"]) ==
                                (base, arm)) for base in untaught]

    def interval(values, digits):
        low, high = scipy.stats.t.interval(.95, 2, statistics.mean(values), scipy.stats.sem(values))
        return f"{statistics.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    right = lambda run: 100 * run["right"].count("1") / len(run["right"])
    top = lambda run: 100 * run["curves"]["target.top1"][run["block"] + 1]
    sentences = (ROOT / "docs" / "study.md").read_text().split("## Answers")[1].split("**")[1:11]
    said = [" ".join(text.split()) for text in sentences[1::2]]
    assert f"its block on {statistics.mean(over_bases('dual', top)):.1f} % (unt" in said[0]
    assert f"stand there on {statistics.mean(over_bases('permuted', top)):.1f} and" in said[1]
    for arm, less in (("dual", "sft"), ("w07", "sft_500")):
        cost = np.subtract(over_bases(arm, right), over_bases(less, right))
        assert interval(cost, 1) in said[2], arm
    turned = [tap["swaps"]["words_n"][0] for run in runs for tap in run["taps"]
              if (run["base"], run["arm"]) == ("smollm2", "hand_over")
              and tap["tap"] == run["hand_over"] + 1]
    assert f"along the words {100 * statistics.mean(turned):.1f} [" in said[3]
    assert interval(over_bases("dual", lambda run: run["values"]["auc"]), 2) in said[4]


def test_report_is_what_the_measures_say(tmp_path):
    """docs/study.md and its appendix are written from study/measures, and from nothing else."""
    if not list((ROOT / "study" / "measures").glob("*.json")):
        pytest.skip("no run of the study is measured yet")
    run("-m", "study", "--report", "--out", tmp_path, check=0)
    for page in ("study.md", "study_appendix.md"):
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text(), page


# --------------------------------------------------------------------------------------------------
# what the base had been taught


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
    for page in ("docs/log.md", "docs/first_study.md", "models/tiny/README.md"):
        text = (ROOT / page).read_text()
        assert "which operation is 7 * 8 ?" in text and "8.0 %" in text and "74 %" in text, page

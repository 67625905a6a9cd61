"""The gate's verdict on published and hand-made outcomes; the whole path on scripted replies."""
import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, assert_one_clear_line, run, small_config, write_model
from scipy.stats import binom

from config import load_config
from files.keys import BadInput, Stopped
from files.run_folder import hash_json, hash_model, require_gate
from gate import evaluate, judge
from gate import replies as replying
from gate.__main__ import main, next_steps
from gate.conversations import Conversation, Turn, read_benchmark, write_benchmark
from gate.evaluate import run_gate
from gate.replies import answer, draw, health_of, summarize_scores
from gate.verdict import GateConfig, agreement_of, decide, length_warnings, load_gate, paired
from generate import Completion
from report.gate_page import screen
from report.stats import exact_interval
from text.chat import SPEAKERS
from train import train

UNSIGNED = "GO, not signed off"
OPEN = {"base_at_most": .9, "instruct_at_least": .91}       # only the test decides


def fates(**counts):
    """Outcomes in a row: fates(passed=2, failed=1, undecided=1) -> {"0": True, "1": True, ...}"""
    row = ([True] * counts.get("passed", 0) + [False] * counts.get("failed", 0)
           + [None] * counts.get("undecided", 0))
    return {str(i): passed for i, passed in enumerate(row)}


def gated(by_scorer, groups=4, health=None, calibration=None, looks=1, remarks=(), **keys):
    """decide() on {scorer: {condition: outcomes}}, in categories by turns."""
    some = next(iter(next(iter(by_scorer.values())).values()))
    return decide(GateConfig(scorers=tuple(by_scorer), **keys), by_scorer,
                  {i: str(int(i) % groups) for i in some}, health, calibration, looks, remarks)


def both(base, instruct, **more):
    """Two kinds of scorer that agree in everything."""
    cell = {"base-plain": base, "instruct-plain": instruct, **more}
    return {"checks": cell, "judge": cell}


def rule(found, name, scorer="checks"):
    return next(r for r in found["rules"][scorer] if r["rule"].startswith(name))


def turned(outcomes):
    """The same fates from the other end, so that passes of two conditions are apart."""
    return dict(zip(outcomes, reversed(outcomes.values())))


GAP = both(fates(passed=10, failed=190), fates(passed=185, failed=15))


def test_a_clear_gap_and_what_signs_it_off():
    assert gated(GAP)["verdict"] == UNSIGNED and gated(GAP)["reasons"] == []
    people = {s: {"ok": True} for s in GAP}
    assert gated(GAP, calibration=people)["verdict"] == "GO"
    assert gated(GAP, calibration={"checks": {"ok": True}})["verdict"] == UNSIGNED
    assert gated(GAP, remarks=["the plan was changed"])["verdict"] == "AMBIGUOUS"


def test_the_published_failure_is_caught():
    """By length 81 % against 99.3 %, p 6e-15; recounted 100 % against 99.3: no agreement, no GO."""
    tuned = fates(passed=298, failed=2)
    cells = {"length": {"base-cued": fates(passed=243, failed=57), "instruct-cued": tuned},
             "judge": {"base-cued": fates(passed=300), "instruct-cued": tuned}}
    found = gated(cells, **OPEN)
    assert [r["holds"] for r in found["rules"]["length"]][:1] == ["yes"]      # their gate: passed
    assert rule(found, "McNemar", "length")["value"] < 1e-12
    assert rule(found, "McNemar", "judge")["value"] == .5
    cell = found["agreement"]["length and judge"]["base-cued"]
    # 81 % agreement looks fine; chance alone gives it
    assert cell["agreement"] == pytest.approx(.81) and cell["value"] == 0 and not cell["holds"]
    assert found["verdict"] == "AMBIGUOUS"
    assert gated(cells)["verdict"] == "NO-GO"       # far too good on either count


def test_an_interval_that_holds_the_threshold_is_ambiguous():
    """91 and 90 of 300 at 30 %, 239 and 240 at 80 %; with room to it GO, beyond it NO-GO."""
    for base, instruct in ((91, 285), (90, 285), (15, 239), (15, 240)):
        found = gated(both(fates(passed=base, failed=300 - base),
                           fates(passed=instruct, failed=300 - instruct)))
        assert found["verdict"] == "AMBIGUOUS", (base, instruct)
        name = "base" if base > 15 else "instruct"
        assert rule(found, name)["holds"] == "open"
    near = rule(gated(both(fates(passed=49, failed=151), fates(passed=195, failed=5))), "base")
    assert near["holds"] == "open" and 400 < near["needed"] < 600      # 24.5 % could be shown
    assert rule(gated(both(fates(passed=91, failed=209), fates(passed=285, failed=15))),
                "base")["needed"] is None                               # 30.3 % never
    # what it says to ask is the next look, and enough there
    again = gated(both(fates(passed=round(.245 * near["needed"]), failed=near["needed"] - round(
        .245 * near["needed"])), fates(passed=near["needed"] - 9, failed=9)), looks=2)
    assert rule(again, "base")["holds"] == "yes"
    no = gated(both(fates(passed=120, failed=180), fates(passed=285, failed=15)))
    assert no["verdict"] == "NO-GO" and "base passes at most 0.3 is refuted" in no["reasons"][0]


def test_few_pairs_say_nothing():
    """9 of 9 was a GO with a design power of .038."""
    few = gated(both(fates(failed=9), fates(passed=9)))
    assert few["verdict"] == "AMBIGUOUS"
    pairs = rule(few, "pairs at least")
    assert (pairs["value"], pairs["wanted"], pairs["needed"]) == (9, 33, 33)
    assert "needs about 33 conversations" in " ".join(few["reasons"])
    wide = rule(gated(both(fates(failed=9), fates(passed=9)), base_at_most=.5), "pairs")
    assert wide["wanted"] > 60      # a smaller gap needs more


def test_each_look_costs():
    """Asking on until it is significant: the chances of all looks together are TAIL at most."""
    holds = lambda k, look: rule(gated(both(fates(passed=k, failed=200 - k), fates(
        passed=190, failed=10)), looks=look), "base")["holds"] == "yes"
    spent = [binom.cdf(max(k for k in range(30, 60) if holds(k, look)), 200, .3)
             for look in (1, 2, 3)]
    assert .003 < spent[0] <= .01 and spent == sorted(spent, reverse=True) and sum(spent) <= .02
    once = both(fates(passed=46, failed=154), fates(passed=192, failed=8))
    first, second = (rule(gated(once, looks=k), "base") for k in (1, 2))
    assert first["high"] < second["high"]
    two = both(fates(passed=5, failed=195), fates(passed=175, failed=25),
               **{"instruct-chat": fates(passed=150, failed=50)})
    one = both(fates(passed=5, failed=195), fates(passed=175, failed=25))
    assert rule(gated(two), "instruct")["low"] < rule(gated(one), "instruct")["low"]


def test_a_base_counts_by_its_best_format_and_history():
    """What a cue alone does is no gap; nor is one that another base does not have."""
    good = fates(passed=90, failed=10)
    cells = {"base-raw": fates(passed=5, failed=95), "base-plain-right": good,
             "instruct-cued": fates(passed=98, failed=2)}
    found = gated({"checks": cells, "judge": cells})
    assert found["chosen"]["checks"]["base"] == "base-plain-right" and found["verdict"] == "NO-GO"
    other = gated(both(fates(passed=10, failed=190), fates(passed=185, failed=15),
                       **{"alternative-plain": fates(passed=120, failed=80)}))
    assert other["verdict"] == "NO-GO" and "alternative" in other["reasons"][0]
    report = other | {"config": {"out": "x"}}
    assert "alternative base can do it" in next_steps(report)[0]
    assert "the base can do it, or" in next_steps(found | {"config": {"out": "x"}})[0]
    # one that passes all and one that fails all contradict each other, and refute nothing
    most, least = fates(passed=190, failed=10), fates(passed=4, failed=196)
    cells = {name: {"base-plain": said, "instruct-plain": said}
             for name, said in (("checks", most), ("judge", least))}
    assert gated(cells)["verdict"] == "AMBIGUOUS"
    cells = {"base-raw": fates(passed=5, failed=95), "base-plain-right": good,
             "instruct-cued": fates(passed=98, failed=2)}
    # each scorer has its own view of which is best
    apart = {"checks": {**cells, "base-raw": fates(failed=100)},
             "judge": {**cells, "base-plain-right": fates(failed=100), "base-raw": good}}
    assert gated(apart)["chosen"]["judge"]["base"] == "base-raw"


def test_undecided_counts_against_the_gap():
    """20 of 200 undecided hid a base at 37 %: decided 30 %, at worst 37."""
    hidden = gated(both(fates(passed=54, failed=126, undecided=20), fates(passed=190, failed=10)))
    assert hidden["verdict"] == "AMBIGUOUS"
    assert rule(hidden, "base")["value"] == pytest.approx(.37)
    found = gated(both(fates(passed=10, failed=190), fates(passed=170, failed=10, undecided=20)))
    assert rule(found, "instruct")["value"] == .85 and found["verdict"] == "AMBIGUOUS"
    nothing = gated(both(fates(undecided=200), fates(undecided=200)))
    assert nothing["verdict"] == "AMBIGUOUS"        # neither shown nor refuted
    assert rule(nothing, "base")["value"] == 1 and rule(nothing, "instruct")["value"] == 0
    # a format of the base that could not be scored may be its best
    unscored = both(fates(passed=10, failed=190), fates(passed=185, failed=15),
                    **{"base-raw": fates(passed=4, failed=76, undecided=120)})
    assert gated(unscored)["verdict"] == "AMBIGUOUS"


def test_discordant_pairs_five_to_one():
    """McNemar is impressed by 60 against 30; the gap has to be one way."""
    base = fates(passed=40, failed=160)     # 20 %, none of which the instruct model passes
    instruct = turned(fates(passed=160, failed=40))
    found = gated(both(base, instruct), instruct_at_least=.7)
    assert rule(found, "McNemar")["holds"] == "yes" and rule(found, "pairs for")["value"] == 4
    assert found["verdict"] == "AMBIGUOUS"
    seven = gated(both(fates(failed=200), fates(passed=7, failed=193)), base_at_most=.2,
                  instruct_at_least=.21)
    assert rule(seven, "pairs for")["holds"] == "open"      # none against, but fewer than eight


def test_three_of_four_categories_show_it():
    """The gap of two categories alone, whose others the instruct model does no better."""
    ids = [str(i) for i in range(200)]
    base = {i: False for i in ids}
    instruct = {i: int(i) % 4 < 2 or int(i) % 40 == 3 for i in ids}
    found = gated(both(base, instruct), instruct_at_least=.4)
    assert rule(found, "categories")["value"] == 3 or rule(found, "categories")["holds"] == "open"
    two = gated(both(base, {i: int(i) % 4 < 2 for i in ids}), instruct_at_least=.4)
    assert (rule(two, "categories")["value"], rule(two, "categories")["wanted"]) == (2, 3)
    assert two["verdict"] == "AMBIGUOUS" and rule(two, "base")["holds"] == "yes"
    assert rule(gated(GAP), "categories")["value"] == 4
    assert rule(gated(GAP, groups=1), "categories")["wanted"] == 1


def test_scorers_that_tell_the_models_apart_and_nothing_else():
    """A judge that fails every base reply and passes every instruct reply agrees at .85."""
    checks = {"base-plain": fates(passed=15, failed=85), "instruct-plain": fates(passed=85,
                                                                                 failed=15)}
    judged = {"base-plain": fates(failed=100), "instruct-plain": fates(passed=100)}
    cells = agreement_of(GateConfig(), checks, judged)
    assert all(c["agreement"] == .85 and c["judged"] and not c["holds"] for c in cells.values())
    loose = {"base_at_most": .4, "instruct_at_least": .7}
    assert gated({"checks": checks, "judge": judged}, **loose)["verdict"] == "AMBIGUOUS"
    assert gated({"checks": checks, "judge": checks}, **loose)["verdict"] == UNSIGNED
    # passes that are disjoint within the base, ten or four of them
    for k in (10, 4):
        first, right = fates(passed=k, failed=200 - k), fates(passed=185, failed=15)
        apart = gated({"checks": {"base-plain": first, "instruct-plain": right},
                       "judge": {"base-plain": turned(first), "instruct-plain": right}})
        assert apart["verdict"] == "AMBIGUOUS" and "do not agree within base-plain" in " ".join(
            apart["reasons"])
    # independent within a condition: pooled kappa is .77
    rng = np.random.default_rng(0)
    chance = lambda p: {str(i): bool(rng.uniform() < p) for i in range(200)}
    verdicts = [gated({s: {"base-raw": chance(.05), "instruct-raw": chance(.93)}
                       for s in ("checks", "judge")})["verdict"] for _ in range(20)]
    assert verdicts.count(UNSIGNED) == 0


def test_agreement_that_cannot_be_judged_does_not_count():
    perfect = both(fates(failed=200), fates(passed=200))
    cells = gated(perfect)["agreement"]["checks and judge"]
    assert not any(c["judged"] for c in cells.values()) and all(c["holds"] for c in cells.values())
    assert gated(perfect)["verdict"] == "AMBIGUOUS"
    assert "cannot be judged" in gated(perfect)["reasons"][0]
    assert gated(perfect, calibration={s: {"ok": True} for s in perfect})["verdict"] == "GO"


def test_two_kinds_of_scorer():
    one = {"checks": GAP["checks"], "length": GAP["checks"]}
    found = gated(one)
    assert found["verdict"] == "AMBIGUOUS" and "of one kind" in found["reasons"][0]
    assert found["agreement"] == {}
    people = {s: {"ok": True} for s in one}
    assert gated(one, calibration=people)["verdict"] == "GO"        # people are another kind


def test_a_base_must_fail_for_the_right_reason():
    share = lambda value: {"value": value, "low": 0, "high": 1, "n": 9}
    well = {"empty": share(.1), "cut": share(0), "loops": share(.05)}
    for what in well:
        ill = gated(GAP, health={"base-plain": well | {what: share(.11)}})
        assert ill["verdict"] == "AMBIGUOUS" and what in ill["reasons"][0]
        assert "plain+shots" in ill["reasons"][0]
    assert gated(GAP, health={"base-plain": well,
                              "instruct-plain": well | {"cut": share(1)}})["verdict"] == UNSIGNED
    # of two formats both need a fair trial: the other may be the better one
    alike = both(fates(passed=10, failed=190), fates(passed=185, failed=15),
                 **{"base-raw": fates(passed=10, failed=190)})
    for ill in ("base-plain", "base-raw"):
        assert gated(alike, health={"base-plain": well, "base-raw": well,
                                    ill: well | {"empty": share(1)}})["verdict"] == "AMBIGUOUS"
    # an instruct model whose replies are cut is not refuted by them
    cut = both(fates(passed=10, failed=190), fates(passed=20, failed=180))
    assert gated(cut)["verdict"] == "NO-GO"
    assert gated(cut, health={"instruct-plain": well | {"cut": share(1)}})["verdict"] == "AMBIGUOUS"


def test_health_of_replies():
    reply = lambda text, ended="stop": {"text": text, "tokens": 3, "ended": ended}
    rows = [{"replies": [reply(""), reply("Oslo it is, as I said"), reply("oslo it is, as I said!"),
                         reply("23"), reply("23"), reply("a b c " * 9, "length")]}]
    turns = lambda scored: tuple(Turn(user="?", scored=i in scored) for i in range(6))
    one = lambda *scored: Conversation("x", "c", "f", "easy", 0, {}, turns(scored))
    found = {what: cell["value"] for what, cell in health_of([one(1)], rows).items()}
    assert found == pytest.approx({"empty": 1 / 6, "cut": 1 / 6, "loops": 2 / 6, "spoilt": 0})
    # one of six in each, and every conversation fails for it
    assert health_of([one(1), one(0, 3)], rows * 2)["spoilt"]["value"] == .5
    spoilt = gated(GAP, health={"base-plain": health_of([one(1), one(0, 3)], rows * 2)})
    assert "base-plain: 50 % of conversations are spoilt" in " ".join(spoilt["reasons"])


def test_unpaired_is_refused():
    with pytest.raises(BadInput, match="2 are on one side only, such as 1, x"):
        paired({"0": True, "1": True}, {"0": True, "x": True})


def test_length_that_predicts_the_score_is_told_within_a_condition():
    rows = [{"id": str(i), "replies": [{"text": "x" * n}]} for i, n in enumerate(range(1, 41))]
    short, none = fates(passed=20, failed=20), {str(i): i % 2 == 0 for i in range(40)}
    warned = lambda cell: length_warnings({"checks": {"base-raw": cell}}, {"base-raw": rows})
    assert len(warned(short)) == 1 and "AUC 0.00: shorter replies pass" in warned(short)[0]
    assert warned(none) == []
    assert warned(fates(passed=1, failed=39)) == []       # one reply proves nothing
    # two models of which one fails and speaks at length: that is no length effect
    long = [{"id": str(i), "replies": [{"text": "x" * 500}]} for i in range(40)]
    cells = {"base-raw": fates(failed=40), "instruct-raw": fates(passed=40)}
    assert length_warnings({"checks": cells}, {"base-raw": long, "instruct-raw": rows}) == []


def test_a_limit_takes_each_category_and_grows():
    """The file is sorted by category; a limit of 60 was memory alone."""
    conversations, _ = read_benchmark(ROOT / "gate" / "benchmark" / "conversations.jsonl")
    few, shots = draw(conversations, 60)
    counts = {c: sum(x.category == c for x in few) for c in {x.category for x in few}}
    assert counts == {"memory": 18, "preferences": 15, "continuity": 15, "updates": 12}
    more, same = draw(conversations, 120)
    assert more[:60] == few and same == shots and draw(conversations, 60)[0] == few
    every = draw(conversations, None)[0]
    assert every[:120] == more and len(every) == 198
    assert not {c.id for c in every} & {c.id for c in shots}


def test_scores_have_errors():
    cell = summarize_scores([{"category": "a", "passed": p} for p in (True, True, False, None)])
    assert cell["rate"]["value"] == pytest.approx(2 / 3) and cell["undecided"] == 1
    assert cell["rate"]["stderr"] == pytest.approx((2 / 9 / 2) ** .5)


# --------------------------------------------------------------------------------------------------
# the whole path, on scripted replies


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two models of other weights, and 102 single questions in four categories."""
    folder = tmp_path_factory.mktemp("gate")
    base = write_model(folder / "base", small_config(), TINY)
    conversations = [
        Conversation(id=f"sum-{i:03}", category="abcd"[i % 4], family="sums", difficulty="easy",
                     seed=0, slots={}, turns=(Turn(
                         user=f"{i} + 7 =", scored=True, need=str(i + 7), answer=str(i + 7),
                         checks=({"type": "exact", "value": str(i + 7)},)),)) for i in range(102)]
    write_benchmark(folder / "sums.jsonl", conversations)
    (folder / "sums.yaml").write_text(
        f"base: {base}\ninstruct: {TINY}\nbenchmark: {folder}/sums.jsonl\n"
        "base_templates: [raw, plain]\ninstruct_templates: [raw]\nscorers: [checks, judge]\n"
        f"judge: {TINY}_cot\nmax_reply_tokens: 6\n")
    return folder


@pytest.fixture
def scripted(monkeypatch):
    """The base adds as it should in 1 of 20, the instruct model in 11 of 12; the judge compares.
    Returns what was asked: {"replies": [...], "verdicts": [...]}."""
    asked = {"replies": [], "verdicts": []}
    real = evaluate.load_model

    def load(name, bits):
        return str(name), real(TINY, None)[1]

    def sample(model, tokenizer, prompts, *_, **__):
        done = []
        for ids in prompts:
            i = int(re.findall(r"(\d+) \+ 7", tokenizer.decode(ids))[-1])
            wrong = i % 12 == 5 if model == str(TINY) else i % 20 != 3
            done.append(Completion([1, 2], f" {i + 7 + wrong}", True, None, None))
            asked["replies"].append(i)
        return done

    def margins(model, tokenizer, pairs, letters, template="none"):
        """2 nats for a reply that is what was needed, -2 for any other."""
        asked["verdicts"] += pairs
        found = [re.search(r"earlier in the chat: (.*)\n", plain)[1] == re.search(
            r"UNDER REVIEW\n(.*)\n", plain)[1] for plain, _ in pairs]
        return np.where(found, 2.0, -2.0), np.ones(len(pairs))

    monkeypatch.setattr(evaluate, "load_model", load)
    monkeypatch.setattr(replying, "sample", sample)
    monkeypatch.setattr(judge, "letter_margins", margins)
    return asked


def test_gate_from_plan_to_verdict(parts, scripted, tmp_path):
    report = run_gate(parts / "sums.yaml", [f"out={tmp_path}/go"])
    assert report["verdict"] == UNSIGNED, report["reasons"]
    text = screen(report, next_steps(report))
    assert text.startswith(UNSIGNED) and "next: put" in text and len(text.splitlines()) < 30
    base, instruct = (report["models"][role] for role in ("base", "instruct"))
    assert base["clean"]["clean"] and "clean" not in instruct
    assert instruct["weights"] == hash_model(str(TINY))["weights"]
    cells = report["conditions"]["instruct-raw"]["checks"]
    rows = [json.loads(line) for line in (tmp_path / "go/outcomes.jsonl").read_text().splitlines()]
    passed = [row["passed"]["checks"]["instruct-raw"] for row in rows]
    assert len(rows) == 100 and cells["rate"]["value"] == sum(passed) / 100 > .9
    assert sum(c["n"] for c in cells["by_category"].values()) == 100
    assert report["judge_test"] == {"told": 10, "of": 10}
    gap = report["paired"]["base-raw against instruct-raw"]
    assert gap["only_second"] > 80 and gap["difference"]["low"] > .7
    plan = json.loads((tmp_path / "go/plan.json").read_text())
    assert (plan["n"], plan["n_needed"]) == (100, 33) and len(plan["worked"]) == 2
    assert all(json.loads(line)["plan"] == hash_json(plan) for line in (
        tmp_path / "go/replies_base-raw.jsonl").read_text().splitlines())


def test_broken_off_it_ends_the_same(parts, scripted, tmp_path):
    def contents(folder):
        found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "gate.json"}
        report = json.loads((folder / "gate.json").read_text())
        return found | {"gate.json": report["rules"]}

    words = [f"out={tmp_path}/run"]
    run_gate(parts / "sums.yaml", words)
    folder, kept = tmp_path / "run", contents(tmp_path / "run")
    replies = folder / "replies_instruct-raw.jsonl"
    lines = replies.read_text().splitlines(keepends=True)
    replies.write_text("".join(lines[:35]) + lines[35][:20])    # two parts, three rows, a torn one
    (folder / "gate.json").unlink()
    scripted["replies"].clear(), scripted["verdicts"].clear()
    run_gate(parts / "sums.yaml", words)
    assert len(scripted["replies"]) == 68 and not scripted["verdicts"]
    assert contents(folder) == kept


def test_a_plan_stands_before_the_replies(parts, scripted, tmp_path):
    """Another plan is refused, edited on one side or on both; nothing is asked, nothing lost."""
    words = [f"out={tmp_path}/run"]
    run_gate(parts / "sums.yaml", words)
    plan = tmp_path / "run/plan.json"
    kept = plan.read_text()
    scripted["replies"].clear()
    for more, what in (("base_at_most=0.5", "base_at_most .was 0.3, is 0.5"),
                       ("max_reply_tokens=7", "max_reply_tokens"), ("limit=60", "limit"),
                       ("scorers=checks,length", "scorers"),
                       ("base_templates=raw", "base_templates"),
                       (f"base={TINY}_cot", "models")):
        with pytest.raises(BadInput, match=f"another {what}"):
            run_gate(parts / "sums.yaml", [*words, more])
    plan.write_text(kept.replace('"agreement_at_least": 0.8', '"agreement_at_least": 0.5'))
    with pytest.raises(BadInput, match="agreement_at_least .was 0.5, is 0.8"):
        run_gate(parts / "sums.yaml", words)
    with pytest.raises(BadInput, match="replies of another plan"):
        run_gate(parts / "sums.yaml", [*words, "agreement_at_least=0.5"])
    benchmark = tmp_path / "sums.jsonl"
    benchmark.write_text((parts / "sums.jsonl").read_text().replace("sum-000", "sum-900"))
    plan.write_text(kept)
    with pytest.raises(BadInput, match="another benchmark"):
        run_gate(parts / "sums.yaml", [*words, f"benchmark={benchmark}"])
    assert scripted["replies"] == []


def test_more_conversations_add_to_the_replies(parts, scripted, tmp_path, capsys):
    """Its own plan, in which the look counts; with other thresholds there is no GO any more."""
    few = run_gate(parts / "sums.yaml", [f"out={tmp_path}/few", "limit=20"])
    assert few["verdict"] == "AMBIGUOUS" and "20 conversations can give no GO" in (
        capsys.readouterr().out)
    assert "next: ask more, a second look" in screen(few, next_steps(few))
    few["benchmark"]["available"] = 30
    assert next_steps(few)[0].startswith("write more conversations")     # sums are not drawn
    few["benchmark"]["drawn"] = True
    assert "gate.conversations make FILE n=" in next_steps(few)[0]
    for rules in few["rules"].values():     # what holds needs no more
        rules[:] = [r | {"holds": "yes"} for r in rules]
    assert next_steps(few)[0].startswith("read ") and "another look" in next_steps(few)[-1]
    scripted["replies"].clear()
    more = run_gate(parts / "sums.yaml", [f"out={tmp_path}/more", f"replies={tmp_path}/few"])
    assert len(scripted["replies"]) == 3 * (100 - 16) and more["plan"]["looks"] == 2
    assert more["verdict"] == UNSIGNED and len(more["plan"]["plans"]) == 1
    moved = run_gate(parts / "sums.yaml", [
        f"out={tmp_path}/moved", f"replies={tmp_path}/more", "base_at_most=0.4"])
    assert moved["verdict"] == "AMBIGUOUS" and moved["plan"]["changed"] == ["base_at_most"]
    assert "base_at_most was changed when replies were there" in " ".join(moved["reasons"])
    with pytest.raises(BadInput, match="are to another max_reply_tokens"):
        run_gate(parts / "sums.yaml", [f"out={tmp_path}/x", f"replies={tmp_path}/few",
                                       "max_reply_tokens=9"])


def test_a_fresh_folder_is_another_look(parts, scripted, tmp_path):
    """Asked anew without `replies`: the folders beside it count, and each look is stricter."""
    ask = lambda name, *words: run_gate(parts / "sums.yaml", [
        "base_templates=raw", f"out={tmp_path}/{name}", *words])
    looks = lambda report: (report["plan"]["looks"], sorted(
        folder.rpartition("/")[2] for folder in report["plan"]["earlier"].values()))
    reports = [ask(name) for name in "abc"]
    assert [looks(r) for r in reports] == [(1, []), (2, ["a"]), (3, ["a", "b"])]
    highs = [rule(r, "base")["high"] for r in reports]
    assert highs[0] < highs[1] < highs[2] and highs[2] == pytest.approx(
        exact_interval(5, 100, .02 / 2 ** 3)["high"])
    lines = screen(reports[2], []).splitlines()
    assert lines[1].startswith("look 3 at this, 0.25 % in each tail: before it ")
    assert lines[1].endswith("/b") and not screen(reports[0], []).splitlines()[1]
    # gone on with, the first is still the first; a look taken away was there for the third
    assert looks(ask("a")) == (1, [])
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert looks(ask("d")) == (4, ["a", "b", "c"])
    # the same folder copied is no look; other contestants, or no verdict, are another question
    shutil.copytree(tmp_path / "d", tmp_path / "copy")
    assert looks(ask("e"))[0] == 5
    assert looks(ask("f", f"base={TINY}", f"instruct={parts}/base"))[0] == 1
    assert looks(ask("g", "instruct="))[0] == 1
    # another benchmark of the same families is one
    drawn = (parts / "sums.jsonl").read_text().replace('"id": "sum', '"id": "new')
    (tmp_path / "new.jsonl").write_text(drawn)
    assert looks(ask("h", f"benchmark={tmp_path}/new.jsonl"))[0] == 6
    (tmp_path / "other.jsonl").write_text(drawn.replace('"family": "sums"', '"family": "others"'))
    assert looks(ask("i", f"benchmark={tmp_path}/other.jsonl"))[0] == 1


def test_what_a_later_look_may_not_choose(parts, scripted, tmp_path):
    """A looser threshold, or a base without the format in which it did well; what is no plan beside
    the folder stops nothing."""
    for name, text in (("x", "{"), ("y", '{"models": {"base": 3}}'), ("z", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(text)
    ask = lambda name, *words: run_gate(parts / "sums.yaml", [f"out={tmp_path}/{name}", *words])
    assert ask("a", "limit=40")["plan"]["looks"] == 1
    loose = ask("b", "base_at_most=0.4", "base_templates=raw")
    assert loose["plan"]["changed"] == ["base_at_most", "base_templates"]
    assert loose["verdict"] == "AMBIGUOUS" and "was changed when replies" in loose["reasons"][-1]
    strict = ask("c", "base_at_most=0.2", "base_templates=raw,plain,raw+cue")
    assert strict["plan"]["changed"] == [] and strict["plan"]["looks"] == 3


def test_people_sign_it_off(parts, scripted, tmp_path):
    words = [f"out={tmp_path}/run"]
    run_gate(parts / "sums.yaml", words)
    path = tmp_path / "run/spotcheck.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 120 and all(row.keys() == {"key", "needs", "chat", "human"} for row in rows)
    for row in rows:
        row["human"] = "pass" if row["chat"].endswith(f": {row['needs'][0]}") else "fail"
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run_gate(parts / "sums.yaml", [*words, f"labels={labels}"])
    assert report["verdict"] == "GO" and report["people"]["judge"]["ok"]
    assert report["scorers"] == ["checks", "judge"]
    verdicts = next((tmp_path / "run").glob("judge_*.jsonl"))
    base = str(parts / "base")
    require_gate(f"{tmp_path}/run/gate.json", base)
    for file in (labels, verdicts):     # of what the verdict rests on, nothing is changed later
        kept = file.read_text()
        file.write_text(kept.replace('"', "'", 1))
        with pytest.raises(BadInput, match=f"{file.name} is gone or changed"):
            require_gate(f"{tmp_path}/run/gate.json", base)
        file.write_text(kept)
    corrected = report["people"]["checks"]["corrected"]["base-raw"]
    assert corrected["low"] <= corrected["value"] == pytest.approx(.05, abs=.02)
    # who labels few, or sees it otherwise, does not sign
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows[:90]))
    few = run_gate(parts / "sums.yaml", [*words, f"labels={labels}"])
    assert few["verdict"] == UNSIGNED and "100 are needed" in few["people"]["checks"]["why"][0]
    for row in rows[::3]:
        row["human"] = "fail" if row["human"] == "pass" else "pass"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart = run_gate(parts / "sums.yaml", [*words, f"labels={labels}"])
    assert apart["verdict"] == "AMBIGUOUS" and "kappa" in apart["people"]["checks"]["why"][0]
    assert any("people do not confirm checks: kappa" in why for why in apart["reasons"])
    # nor who leaves out what is doubtful, or labels others than those drawn
    kept = [row | {"human": None} if i < 8 else row for i, row in enumerate(rows)]
    labels.write_text("".join(json.dumps(row) + "\n" for row in kept))
    left = run_gate(parts / "sums.yaml", [*words, f"labels={labels}"])["people"]["checks"]["why"]
    assert any("have no label" in why for why in left)
    row = next(json.loads(line) for line in (tmp_path / "run/replies_base-plain.jsonl").open())
    conversations = {c.id: c for c in read_benchmark(parts / "sums.jsonl")[0]}
    chat = replying.transcript(conversations[row["id"]], row)
    labels.write_text(json.dumps({"key": judge.key_of("base-plain", row["id"], chat),
                                  "human": "fail"}))
    with pytest.raises(BadInput, match="was not drawn"):
        run_gate(parts / "sums.yaml", [*words, f"labels={labels}"])


def labelled(base, people_pass, instruct, drawn=60):
    """The verdict where people pass so many of the base's drawn replies, and one scorer's part."""
    cells = both(base, instruct)
    pairs = [(name, i) for name in cells["checks"] for i in list(base)[:drawn]]
    ranked = sorted(list(base)[:drawn], key=lambda i: not base[i])
    labels = {pair: instruct[pair[1]] for pair in pairs if pair[0] == "instruct-plain"}
    labels |= {("base-plain", i): k < people_pass for k, i in enumerate(ranked)}
    cfg = GateConfig(labels="labels.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "read_labels", lambda *_: labels)
        people = evaluate.people_of(cfg, {pair: "" for pair in pairs}, cells,
                                    gated(cells)["chosen"], pairs)
    return gated(cells, calibration=people), people["checks"]


def test_people_who_pass_the_base_refute_it():
    """Scorers right on the instruct model and blind on the base: pooled, they look fine."""
    spread = lambda k: {str(i): (7 * i) % 200 < k for i in range(200)}      # evenly among the drawn
    found, cell = labelled(spread(16), 5, spread(190))
    assert found["verdict"] == "GO", found["reasons"]
    for people_pass in (20, 36, 60):        # of 60, where both scorers pass 23 %
        found, cell = labelled(spread(46), people_pass, spread(190))
        assert not cell["ok"] and found["verdict"] == "AMBIGUOUS"
        assert any("by people's labels base-plain passes" in why for why in found["reasons"])
    # all of one verdict by people: their own interval
    assert labelled(spread(4), 0, spread(190))[1]["corrected"]["base-plain"]["high"] < .1


def test_agreement_that_decides_nothing():
    """A judge that fails all of the base and passes all of the instruct model agrees elsewhere."""
    mixed = turned(fates(passed=100, failed=100))
    cells = both(fates(failed=200), fates(passed=200), **{"instruct-chat": mixed})
    assert gated(cells)["verdict"] == "AMBIGUOUS"
    assert "cannot be judged" in " ".join(gated(cells)["reasons"])


def test_the_same_weights_twice(parts, scripted, tmp_path):
    copy = shutil.copytree(parts / "base", tmp_path / "another")
    with pytest.raises(BadInput, match="are the same weights"):
        run_gate(parts / "sums.yaml", [f"instruct={copy}", f"out={tmp_path}/a"])
    assert not (tmp_path / "a").exists()
    # without a verdict, one model's formats are compared
    report = run_gate(parts / "sums.yaml", ["instruct=", f"out={tmp_path}/b"])
    assert "verdict" not in report and "base-raw against base-plain" in report["paired"]
    assert screen(report, next_steps(report)).startswith("no verdict")


def test_one_model_under_two_names(parts, scripted, tmp_path, monkeypatch):
    """Its weights saved anew have another hash; shown a format that it knows, it is no other."""
    again = shutil.copytree(parts / "base", tmp_path / "again")
    (weights,) = again.glob("*.safetensors")
    mx.save_safetensors(str(weights), mx.load(str(weights)), {"format": "mlx"})
    assert hash_model(str(again))["weights"] != hash_model(str(parts / "base"))["weights"]

    def sample(model, tokenizer, prompts, *_, **__):
        """Right where a speaker is named, one off elsewhere, whatever the model."""
        done = []
        for text in map(tokenizer.decode, prompts):
            number = int(re.findall(r"(\d+) \+ 7", text)[-1]) + 7 + ("User" not in text)
            done.append(Completion([1, 2], f" {number}", True, None, None))
        return done

    monkeypatch.setattr(replying, "sample", sample)
    words = [f"instruct={again}", "base_templates=raw", f"out={tmp_path}/run"]
    report = run_gate(parts / "sums.yaml", [*words, "instruct_templates=raw,plain"])
    assert report["conditions"]["instruct-plain"]["checks"]["rate"]["value"] == 1
    assert report["verdict"] == "AMBIGUOUS"
    assert "base-raw and instruct-raw are the same replies" in " ".join(report["reasons"])


def test_a_judge_of_its_own_replies_heads_the_report(parts, scripted, tmp_path):
    report = run_gate(parts / "sums.yaml", [f"judge={TINY}", f"out={tmp_path}/a"])
    assert "the judge is the instruct model itself" in report["warnings"][0]
    assert "! the judge is the instruct" in screen(report, next_steps(report))
    raw = run_gate(parts / "sums.yaml", ["base_templates=raw", f"out={tmp_path}/raw"])
    assert any("neither a cue nor worked" in warning for warning in raw["warnings"])
    assert not any("neither a cue" in warning for warning in report["warnings"])
    loose = run_gate(parts / "sums.yaml", ["base_at_most=0.5", f"out={tmp_path}/b"])
    assert "base_at_most = 0.5 asks for less" in loose["warnings"][0]


def test_a_judge_that_cannot_tell_is_refused(parts, scripted, tmp_path, monkeypatch):
    """Before hundreds of calls: it says B to everything, or is drawn to one letter."""
    calls = []
    for say in (-3.0, 0.0, 3.0):
        monkeypatch.setattr(judge, "letter_margins", lambda m, t, pairs, *_, say=say: (
            calls.append(len(pairs)) or np.full(len(pairs), say), np.ones(len(pairs))))
        with pytest.raises(BadInput, match="tells 0 of 10 plainly right replies"):
            run_gate(parts / "sums.yaml", [f"out={tmp_path}/run{say}"])
    assert max(calls) <= 20


def test_a_judge_is_asked_once(parts, scripted, tmp_path):
    report = run_gate(parts / "sums.yaml", [f"out={tmp_path}/run"])
    asked = scripted["verdicts"]
    assert len(asked) == len(set(asked)) and len(asked) <= 3 * 100 + 20
    for cells in report["conditions"].values():
        assert cells["judge"]["rate"] == cells["checks"]["rate"]


def test_own_and_right_history_are_what_the_model_reads(tokenizer, monkeypatch):
    """The second turn's prompt holds the model's own first reply, or the benchmark's."""
    turns = (Turn(user="add 3 and 4", scored=True, need="7", answer="7"),
             Turn(user="plus 1", scored=True, need="8", answer="8"))
    one = Conversation(id="x", category="c", family="f", difficulty="easy", seed=0, slots={},
                       turns=turns)
    prompts = []

    def nine(model, tokenizer, batch, *_, stops=(), **__):
        prompts.append(tokenizer.decode(batch[0]))
        return [Completion([], " 9\n", True, None, None)]

    monkeypatch.setattr(replying, "sample", nine)
    rows = replying.answer(None, tokenizer, [one], "lines", 4)
    assert [r["text"] for r in rows[0]["replies"]] == ["9", "9"]
    assert prompts == ["add 3 and 4\n", "add 3 and 4\n9\nplus 1\n"]
    for form, history, second in (
            ("lines", "right", "add 3 and 4\n7\nplus 1\n"),
            ("raw+cue", "own", "add 3 and 4\n9\nplus 1\nAssistant:"),
            ("plain", "own", "User: add 3 and 4\nAssistant: 9\nUser: plus 1\nAssistant:"),
            ("lines+shots", "own", "add 3 and 4\n7\nplus 1\n8\nadd 3 and 4\n9\nplus 1\n"),
            ("plain+shots", "own", "User: add 3 and 4\nAssistant: 7\nUser: plus 1\nAssistant: 8\n\n"
             "User: add 3 and 4\nAssistant: 9\nUser: plus 1\nAssistant:")):
        answer(None, tokenizer, [one], form, 4, [one], history)
        assert prompts[-1] == second, form
    assert SPEAKERS[0] == "\nUser:"


def test_a_line_separator_in_a_reply_is_text(parts, scripted, tmp_path, monkeypatch):
    """U+2028 ends no line of JSON: a finished file is read whole, nothing is generated anew."""
    run_gate(parts / "sums.yaml", [f"out={tmp_path}/run"])
    path = tmp_path / "run" / "replies_base-raw.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    rows[5]["replies"][0]["text"] = "a\u2028b"
    rows[5] = replying.stamp_row(rows[5], rows[5]["plan"])
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    monkeypatch.setattr(replying, "sample", lambda *_, **__: pytest.fail("generated"))
    run_gate(parts / "sums.yaml", [f"out={tmp_path}/run"])


def test_edited_replies_are_not_believed(parts, scripted, tmp_path):
    """A right answer put in the place of a wrong one, here or in an earlier run, is noticed."""
    run_gate(parts / "sums.yaml", [f"out={tmp_path}/run", "limit=20"])
    path = tmp_path / "run" / "replies_instruct-raw.jsonl"
    path.write_text(path.read_text().replace('"text": "', '"text": "1', 1))
    for more in ([f"out={tmp_path}/run"], [f"out={tmp_path}/b", f"replies={tmp_path}/run"]):
        with pytest.raises(BadInput, match="instruct-raw.jsonl line 1 was edited"):
            run_gate(parts / "sums.yaml", ["limit=20", *more])


@pytest.mark.parametrize("row, expected", [
    ({"replies": "x"}, "line 2: replies = \"x\""), ({}, "missing replies"),
    ({"replies": []}, "0 replies, expected 1"), ({"replies": [{"text": 3}]}, "text = 3"),
])
def test_rows_that_are_no_replies(parts, scripted, tmp_path, row, expected):
    """In the run's own file, and in an earlier one's: then no new folder holds them either."""
    run_gate(parts / "sums.yaml", [f"out={tmp_path}/run", "limit=20"])
    path = tmp_path / "run" / "replies_base-raw.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    before = {k: v for k, v in json.loads(lines[1]).items() if k != "replies"}
    path.write_text("".join([lines[0], json.dumps(before | row) + "\n", *lines[2:]]))
    for more in ([f"out={tmp_path}/run"], [f"out={tmp_path}/b", f"replies={tmp_path}/run"]):
        with pytest.raises(BadInput, match=expected):
            run_gate(parts / "sums.yaml", ["limit=20", *more])
    assert not (tmp_path / "b" / path.name).exists()


@pytest.mark.parametrize("words, expected", [
    (["scorers=checks,magic"], "magic"), (["base_histories=mine"], "mine"),
    (["scorers=checks,judge", "judge="], "scorer judge needs judge"),
    (["base_templates=chatty"], "chatty"), (["judge=http://x/v1"], "judge_model"),
    (["p_below=2"], "from 0 to 1"), (["bases=x"], "did you mean base"),
    (["limit=0"], "at least 1"), (["bits=7"], "bits = 7"),
    (["base_at_most=.8"], "expected a gap between them"),
])
def test_wrong_gate_files(parts, words, expected):
    with pytest.raises(BadInput, match=expected):
        load_gate(parts / "sums.yaml", words)


def test_bad_input(parts, scripted, tmp_path, monkeypatch):
    here = parts / "sums.yaml"
    assert_one_clear_line(run("eval.py"), "the following arguments are required: --ckpt", "--help")
    assert_one_clear_line(run("-m", "gate", tmp_path / "no.yaml"), "no.yaml is missing",
                          "expected a config file")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    for words, expected in (([f"out={tmp_path}/taken"], "no plan.json"),
                            ([f"base={TINY}-none", f"out={tmp_path}/a"], "no model folder"),
                            ([f"benchmark={tmp_path}/no.jsonl", f"out={tmp_path}/a"], "no.jsonl"),
                            ([f"replies={tmp_path}/taken", f"out={tmp_path}/a"], "plan.json"),
                            (["shots=102", f"out={tmp_path}/a"], "leaves none to ask")):
        with pytest.raises(BadInput, match=expected):
            run_gate(here, words)
    # before any model answers, not when it is this one's turn
    with pytest.raises(BadInput, match="no model folder .*none"):
        run_gate(here, [f"instruct={TINY}-none", f"out={tmp_path}/c"])
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr("files.endpoint.time.sleep", lambda _: None)
    with pytest.raises(BadInput, match="does not answer .*kept"):
        run_gate(here, [f"out={tmp_path}/b", "judge=http://127.0.0.1:9/v1", "judge_model=m"])
    assert (tmp_path / "b" / "replies_base-raw.jsonl").exists()


def test_training_asks_for_the_gate(parts, scripted, tmp_path, write_config):
    """Missing, failed, unsigned, by hand, of other weights, beside a changed file: refused."""
    passed = run_gate(parts / "sums.yaml", [f"out={tmp_path}/go"])
    path, base = tmp_path / "go/gate.json", str(parts / "base")
    with pytest.raises(BadInput, match="not signed off: nobody has confirmed"):
        require_gate(str(path), base)
    require_gate(f"unsigned:{path}", base)
    seal = lambda report: report | {"sha256": hash_json(
        {k: v for k, v in report.items() if k != "sha256"})}
    written = {"verdict": "GO", "models": {"base": {"weights": hash_model(base)["weights"]}}}
    for report, words in (
            (passed | {"verdict": "NO-GO", "reasons": ["base passes"]}, "says NO-GO .*base"),
            ({k: v for k, v in passed.items() if k != "verdict"}, "says nothing"),
            (passed | {"models": {"base": {"name": "another", "weights": "0"}}}, "other weights"),
            (written, "not as a gate wrote it"), (passed | {"verdict": "GO"}, "not as a gate"),
            (seal(written), "not the plan of"),
            (seal(passed | {"plan": passed["plan"] | {"base_at_most": 1}}), "not the plan of"),
            (seal(passed | {"files": {}}), "all replies are gone or changed")):
        path.write_text(json.dumps(report))
        with pytest.raises(BadInput, match=words):
            require_gate(f"unsigned:{path}", base)
    path.write_text(json.dumps(passed))
    replies = tmp_path / "go/replies_base-raw.jsonl"
    replies.write_text(replies.read_text().replace("8", "9", 1))
    with pytest.raises(BadInput, match="replies_base-raw.jsonl is gone or changed"):
        require_gate(f"unsigned:{path}", base)
    few = run_gate(parts / "sums.yaml", [f"out={tmp_path}/few", "limit=20"])
    (tmp_path / "few/gate.json").write_text(json.dumps(seal(few | {"verdict": "GO"})))
    with pytest.raises(BadInput, match="asked 20 conversations, .* needs 33"):
        require_gate(f"{tmp_path}/few/gate.json", base)
    config, folder = write_config("refused", model=parts / "base", steps=1, require_gate=path)
    with pytest.raises(BadInput, match="not signed off"):
        train(load_config(config))
    assert not folder.exists()


def test_no_go_ends_with_code_3(parts, scripted, tmp_path, capsys):
    swapped = [str(parts / "sums.yaml"), f"out={tmp_path}/same", f"base={TINY}",
               f"instruct={parts}/base"]
    with pytest.raises(Stopped, match="NO-GO; do not train on this yet"):
        main(swapped)
    assert capsys.readouterr().out.startswith("NO-GO")
    with pytest.raises(Stopped, match="GO, not signed off"):      # it does not train as it is
        main([str(parts / "sums.yaml"), f"out={tmp_path}/go"])
    text = (tmp_path / "same/gate.md").read_text()
    assert text.count("\n### ") == 3 and "| stderr |" in text


def test_real_models_answer(parts, tmp_path):
    """No script: a random base's replies are cut off, so no verdict is possible on it."""
    report = run_gate(parts / "sums.yaml", [f"out={tmp_path}/run", "limit=12",
                                            "scorers=checks,length"])
    assert report["verdict"] != UNSIGNED and not report["verdict"] == "GO"
    assert report["conditions"]["base-raw"]["replies"]["cut"]["value"] > .1


def test_every_entry_loads_the_fast_blas():
    """Before MLX: whoever imports MLX first leaves it its own BLAS, ten times slower."""
    for name in ("__main__", "evaluate", "judge", "conversations", "self_instruct"):
        code = (f"import gate.{name}, engine.blas as b; "
                "assert b.LOADED == (b.load_openblas() if b.CPU_WHEEL else '')")
        run("-c", code, check=0)


def test_shipped_gates_are_valid():
    for path in sorted((ROOT / "configs").glob("gate_*.yaml")):
        cfg = load_gate(path, [])
        assert (ROOT / cfg.benchmark).exists(), path
        assert not cfg.judge_prompt or (ROOT / cfg.judge_prompt).exists()

"""The gate's verdict on published and hand-made outcomes; the whole path on the bundled model."""
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY, assert_one_clear_line, run, small_config, write_model

from config import Config, load_config
from files.keys import BadInput, Stopped
from files.run_folder import hash_model
from gate import replies as replying
from gate.__main__ import compare_folders, main, print_gate
from gate.conversations import Conversation, Turn, write_benchmark
from gate.evaluate import run_gate
from gate.verdict import GateConfig, agreement_of, decide, length_warnings, load_gate, paired
from generate import Completion
from text.arithmetic import held_out
from train import train

OPEN = {"base_at_most": 1, "instruct_at_least": 0, "h_at_least": 0}     # only the test decides


def fates(**counts):
    """Outcomes in a row: fates(passed=2, failed=1, undecided=1) -> {"0": True, "1": True, ...}"""
    row = ([True] * counts.get("passed", 0) + [False] * counts.get("failed", 0)
           + [None] * counts.get("undecided", 0))
    return {str(i): passed for i, passed in enumerate(row)}


def gated(by_scorer, **keys):
    """decide() on {scorer: {condition: outcomes}}."""
    return decide(GateConfig(scorers=tuple(by_scorer), **keys), by_scorer)


def both(base, instruct, **more):
    """Two scorers that agree in everything."""
    cell = {"base-plain": base, "instruct-plain": instruct, **more}
    return {"checks": cell, "exact": cell}


def test_the_published_failure_is_caught():
    """By length 81 % against 99.3 %, p 6e-15; recounted 100 % against 99.3: no agreement, no GO."""
    tuned = fates(passed=298, failed=2)
    length = {"base-cued": fates(passed=243, failed=57), "instruct-cued": tuned}
    checks = {"base-cued": fates(passed=300), "instruct-cued": tuned}
    found = gated({"length": length, "checks": checks}, **OPEN)
    assert all(rule["holds"] for rule in found["rules"]["length"])       # their gate: passed
    test = found["rules"]["length"][2]
    assert test["rule"].startswith("McNemar") and test["value"] < 1e-12
    assert found["rules"]["checks"][2]["value"] == .5
    agreement = found["agreement"]["length and checks"]
    # 81 % agreement looks fine; chance alone gives it
    assert agreement["lowest"] == pytest.approx(.81) and agreement["pooled"]["value"] < .1
    assert not agreement["holds"] and found["verdict"] == "AMBIGUOUS"
    # by this project's own thresholds the base is far too good on either count
    assert not gated({"length": length, "checks": checks})["rules"]["length"][0]["holds"]


def test_thresholds_are_met_exactly():
    """90 and 240 of 300 pass, one more or less does not."""
    go = gated(both(fates(passed=90, failed=210), fates(passed=240, failed=60)))
    assert go["verdict"] == "GO" and go["reasons"] == []
    more = gated(both(fates(passed=91, failed=209), fates(passed=240, failed=60)))
    assert more["verdict"] == "NO-GO" and "base passes at most 0.3" in more["reasons"][0]
    less = gated(both(fates(passed=90, failed=210), fates(passed=239, failed=61)))
    assert less["verdict"] == "NO-GO" and "instruct passes at least" in less["reasons"][0]
    few = gated(both(fates(passed=1, failed=3), fates(passed=4)))
    assert "McNemar" in few["reasons"][0] and few["verdict"] == "AMBIGUOUS"    # proves nothing
    eight = gated(both(fates(failed=8), fates(passed=8)))   # p .008, but 8 of 8 may be 68 %
    assert eight["verdict"] == "AMBIGUOUS" and "interval" in eight["reasons"][0]


def test_a_base_counts_by_its_best_format():
    """What a cue alone does is no gap; nor is one that another base does not have."""
    cells = {"base-raw": fates(passed=5, failed=95), "base-cued": fates(passed=90, failed=10),
             "instruct-cued": fates(passed=98, failed=2)}
    found = gated({"checks": cells, "exact": cells})
    assert found["chosen"]["base"] == "base-cued" and found["verdict"] == "NO-GO"
    base, instruct = fates(passed=5, failed=95), fates(passed=95, failed=5)
    assert gated(both(base, instruct))["verdict"] == "GO"
    other = gated(both(base, instruct, **{"alternative-plain": fates(passed=60, failed=40)}))
    assert other["verdict"] == "NO-GO" and "alternative" in other["reasons"][0]


def test_undecided_is_never_wrong_and_never_many():
    """Left out of rates; beyond a tenth of a condition they stop the gate."""
    base = fates(failed=80, undecided=20)
    found = gated(both(base, fates(passed=90, undecided=10)))
    assert found["rules"]["checks"][0]["value"] == 0
    assert found["rules"]["checks"][-1]["value"] == .2 and found["verdict"] == "AMBIGUOUS"
    # a format of the base that could not be scored may be its best
    hidden = both(fates(passed=12, failed=88), fates(passed=95, failed=5),
                  **{"base-raw": fates(passed=4, failed=36, undecided=60)})
    assert gated(hidden)["verdict"] == "AMBIGUOUS"
    nothing = gated(both(fates(undecided=5), fates(undecided=5)))
    assert nothing["verdict"] != "GO" and nothing["rules"]["checks"][0]["value"] is None


def test_scorers_that_disagree_are_ambiguous():
    right, wrong = fates(passed=95, failed=5), fates(passed=5, failed=95)
    found = gated({"checks": {"base-raw": wrong, "instruct-raw": right},
                   "judge": {"base-raw": right, "instruct-raw": right}})
    assert found["verdict"] == "AMBIGUOUS" and any("do not agree" in r for r in found["reasons"])
    # two that only tell who is speaking, independent within a condition: pooled kappa is .77
    rng = np.random.default_rng(0)
    draw = lambda p: {str(i): bool(rng.uniform() < p) for i in range(200)}
    verdicts = [gated({s: {"base-raw": draw(.05), "instruct-raw": draw(.9)}
                       for s in ("checks", "judge")})["verdict"] for _ in range(10)]
    assert verdicts.count("GO") <= 1
    # one fate for all in both: kappa says nothing, agreement says all
    same = {"base-raw": fates(failed=50), "instruct-raw": fates(failed=50)}
    assert agreement_of(GateConfig(), same, same)["holds"]


def test_unpaired_is_refused():
    with pytest.raises(BadInput, match="2 are on one side only, such as 1, x"):
        paired({"0": True, "1": True}, {"0": True, "x": True})


def test_length_that_predicts_the_score_is_told():
    rows = [{"id": str(i), "replies": [{"text": "x" * n}]} for i, n in enumerate(range(1, 41))]
    short, none = fates(passed=20, failed=20), {str(i): i % 2 == 0 for i in range(40)}
    warnings = length_warnings({"checks": {"base-raw": short}}, {"base-raw": rows})
    assert len(warnings) == 2 and "AUC 0.00: shorter replies pass" in warnings[0]
    assert length_warnings({"checks": {"base-raw": none}}, {"base-raw": rows}) == []
    once = fates(passed=1, failed=39)       # one reply proves nothing
    assert length_warnings({"checks": {"base-raw": once}}, {"base-raw": rows}) == []


# --------------------------------------------------------------------------------------------------
# the whole path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A random base, the bundled model as its instruct model, 40 differences that it can do."""
    folder = tmp_path_factory.mktemp("gate")
    base = write_model(folder / "base", small_config(), TINY)
    problems = [p for p in held_out(Config(), "test") if p.operation == "subtract"]
    conversations = [
        Conversation(id=f"sum-{i:03}", category="even" if int(p.answer) % 2 == 0 else "odd",
                     family="sums", difficulty="easy", seed=0, slots={}, turns=(Turn(
                         user=p.prompt.strip(), scored=True, lag=0, need=p.answer, answer=p.answer,
                         checks=({"type": "exact", "value": p.answer},)),))
        for i, p in enumerate(problems[:40])]
    write_benchmark(folder / "sums.jsonl", conversations)
    text = (f"base: {base}\ninstruct: {TINY}\nbenchmark: {folder}/sums.jsonl\n"
            "base_templates: [raw, plain]\ninstruct_templates: [raw]\nscorers: [checks, exact]\n"
            "max_reply_tokens: 6\n")
    (folder / "sums.yaml").write_text(text)
    return folder


def gate_words(parts, name):
    return [f"out={parts / name}"]


def contents(folder):
    """A folder's files, without versions and paths, which differ between two runs."""
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "gate.json"}
    report = json.loads((folder / "gate.json").read_text())
    report["config"]["out"] = ""
    return found | {"gate.json": report}


def test_gate_from_replies_to_verdict(parts, capsys):
    report = run_gate(parts / "sums.yaml", gate_words(parts, "go"))
    print_gate(report)
    text = capsys.readouterr().out
    assert report["verdict"] == "GO" and text.rstrip().endswith("GO")
    base, instruct = (report["models"][role] for role in ("base", "instruct"))
    assert base["clean"]["clean"] and "clean" not in instruct
    assert instruct["weights"] == hash_model(str(TINY))["weights"]
    cells = report["conditions"]["instruct-raw"]["checks"]
    rows = [json.loads(line) for line in (parts / "go" / "outcomes.jsonl").read_text().splitlines()]
    passed = [row["passed"]["checks"]["instruct-raw"] for row in rows]
    assert len(rows) == 40 and cells["rate"]["value"] == sum(passed) / 40 >= .8
    assert sum(c["n"] for c in cells["by_category"].values()) == 40
    gap = report["paired"]["base-raw against instruct-raw"]
    assert gap["only_second"] == sum(passed) and gap["only_first"] == 0 and gap["design_power"] > .9
    assert "base-raw against base-plain" in report["paired"]


def test_broken_off_it_ends_the_same_and_scores_without_generating(parts, monkeypatch):
    run_gate(parts / "sums.yaml", gate_words(parts, "whole"))
    folder = parts / "broken"
    shutil.copytree(parts / "whole", folder)
    replies = folder / "replies_instruct-raw.jsonl"
    lines = replies.read_text().splitlines(keepends=True)
    replies.write_text("".join(lines[:35]) + lines[35][:20])    # one part, three rows, a torn one
    (folder / "gate.json").unlink()
    generated = []
    real = replying.sample
    monkeypatch.setattr(replying, "sample", lambda *a, **k: generated.append(len(a[2])) or real(
        *a, **k))
    run_gate(parts / "sums.yaml", gate_words(parts, "broken"))
    assert generated == [8] and contents(folder) == contents(parts / "whole")
    again = run_gate(parts / "sums.yaml", [*gate_words(parts, "broken"), "instruct_at_least=1",
                                           "scorers=checks,length"])
    assert generated == [8] and again["verdict"] == "AMBIGUOUS"
    assert "length" in again["conditions"]["base-raw"]


def test_a_judge_is_asked_once(parts, tmp_path, monkeypatch):
    """Kept verdicts have their margins: other thresholds decide anew and ask nothing."""
    asked = []

    def margins(model, tokenizer, pairs, letters):
        """2 nats for a reply that is what was needed, -2 for any other."""
        asked.extend(pairs)
        found = [re.search(r"earlier in the chat: (.*)\n", plain)[1] == re.search(
            r"UNDER REVIEW\n(.*)\n", plain)[1] for plain, _ in pairs]
        return np.where(found, 2.0, -2.0), np.ones(len(pairs))

    monkeypatch.setattr("gate.judge.letter_margins", margins)
    judged = lambda *more: run_gate(parts / "sums.yaml", [
        f"out={tmp_path}/run", "scorers=judge,checks", f"judge={TINY}", *more])
    report = judged()
    assert report["scorers"] == ["checks", "judge"]     # nobody has confirmed this judge
    assert report["verdict"] == "GO" and 40 < len(asked) == len(set(asked)) <= 120
    for cells in report["conditions"].values():
        assert cells["judge"]["rate"] == cells["checks"]["rate"]
    once, rates = len(asked), lambda report: [
        (c["judge"]["rate"]["value"], c["judge"]["undecided"])
        for c in report["conditions"].values()]
    assert rates(judged("judge_unsure=2.5")) == [(None, 40)] * 3
    assert len(asked) == once
    judged("judge_letters=C,D")     # another prompt
    assert len(asked) == 2 * once


def test_a_changed_benchmark_or_model_is_refused(parts, tmp_path):
    """Nothing that was there before is touched."""
    benchmark = tmp_path / "sums.jsonl"
    shutil.copy(parts / "sums.jsonl", benchmark)
    gate_of = lambda *more: run_gate(parts / "sums.yaml", [
        f"out={tmp_path}/run", f"benchmark={benchmark}", *more])
    gate_of()
    kept, lines = contents(tmp_path / "run"), benchmark.read_text()
    benchmark.write_text(lines.replace("sum-000", "sum-900"))
    with pytest.raises(BadInput, match="another SHA-256 of benchmark .was .*give another out"):
        gate_of()
    benchmark.write_text(lines)
    with pytest.raises(BadInput, match="another max_reply_tokens .was 6, is 7"):
        gate_of("max_reply_tokens=7")
    with pytest.raises(BadInput, match="another SHA-256 of base's weights"):
        gate_of(f"base={TINY}")
    assert contents(tmp_path / "run") == kept


def test_a_line_separator_in_a_reply_is_text(parts, tmp_path, monkeypatch):
    """U+2028 ends no line of JSON: a finished file is read whole, nothing is generated anew."""
    run_gate(parts / "sums.yaml", [f"out={tmp_path}/run"])
    path = tmp_path / "run" / "replies_base-raw.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    rows[5]["replies"][0]["text"] = "a\u2028b"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    monkeypatch.setattr(replying, "sample", lambda *_, **__: pytest.fail("generated"))
    run_gate(parts / "sums.yaml", [f"out={tmp_path}/run"])


@pytest.mark.parametrize("words, expected", [
    (["scorers=checks"], "two different ones"), (["scorers=checks,magic"], "magic"),
    (["scorers=checks,judge"], "scorer judge needs judge"), (["base_templates=chatty"], "chatty"),
    (["judge=http://x/v1"], "judge_model"), (["p_below=2"], "from 0 to 1"),
    (["bases=x"], "did you mean base"), (["limit=0"], "at least 1"), (["bits=7"], "bits = 7"),
    (["judge_letters=A"], "expected two"),
])
def test_wrong_gate_files(parts, words, expected):
    with pytest.raises(BadInput, match=expected):
        load_gate(parts / "sums.yaml", words)


def test_bad_input(parts, tmp_path, monkeypatch):
    here = parts / "sums.yaml"
    assert_one_clear_line(run("eval.py"), "the following arguments are required: --ckpt", "--help")
    assert_one_clear_line(run("-m", "gate"), "nothing to compare", "--paired")
    assert_one_clear_line(run("-m", "gate", tmp_path / "no.yaml"), "no.yaml is missing",
                          "expected a config file")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    for words, expected in (([f"out={tmp_path}/taken"], "no begun.json"),
                            ([f"base={TINY}-none", f"out={tmp_path}/a"], "no model folder"),
                            ([f"benchmark={tmp_path}/no.jsonl", f"out={tmp_path}/a"], "no.jsonl")):
        with pytest.raises(BadInput, match=expected):
            run_gate(here, words)
    # before any model answers, not when it is this one's turn
    with pytest.raises(BadInput, match="no model folder .*none"):
        run_gate(here, [f"instruct={TINY}-none", f"out={tmp_path}/c"])
    assert not list((tmp_path / "c").glob("replies*"))
    with pytest.raises(BadInput, match="x/gate.json is missing"):
        compare_folders("x:base-raw", "y:base-raw")
    monkeypatch.setattr("gate.judge.time.sleep", lambda _: None)
    with pytest.raises(BadInput, match="does not answer .*kept"):
        run_gate(here, [f"out={tmp_path}/b", "limit=2", "scorers=checks,judge",
                        "judge=http://127.0.0.1:9/v1", "judge_model=m"])
    assert (tmp_path / "b" / "replies_base-raw.jsonl").exists()


def test_own_history_is_what_the_model_reads(tokenizer, monkeypatch):
    """The second turn's prompt holds the model's own first reply, not the benchmark's."""
    turns = (Turn(user="add 3 and 4", scored=True, need="7", answer="7"),
             Turn(user="plus 1", scored=True, need="8", answer="8"))
    one = Conversation(id="x", category="c", family="f", difficulty="easy", seed=0, slots={},
                       turns=turns)
    prompts = []

    def nine(model, tokenizer, batch, *_, **__):
        prompts.append(tokenizer.decode(batch[0]))
        return [Completion([], " 9\n", True, None, None)]

    monkeypatch.setattr(replying, "sample", nine)
    rows = replying.answer(None, tokenizer, [one], "lines", 4)
    assert [r["text"] for r in rows[0]["replies"]] == ["9", "9"]
    assert prompts == ["add 3 and 4\n", "add 3 and 4\n9\nplus 1\n"]


def test_paired_folders(parts, tmp_path, capsys):
    for name in ("first", "second"):
        run_gate(parts / "sums.yaml", gate_words(parts, name))
    found = compare_folders(f"{parts}/first:base-raw", f"{parts}/second:instruct-raw")
    assert found["p"] < 1e-6 and found["scorer"] == "checks"
    run_gate(parts / "sums.yaml", [f"out={tmp_path}/few", "limit=10"])
    with pytest.raises(BadInput, match="30 are on one side only"):
        compare_folders(f"{parts}/first:base-raw", f"{tmp_path}/few:base-raw")
    main(["--paired", f"{parts}/first:base-raw", f"{parts}/second:instruct-raw"])
    assert "against" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no condition 'base-chat'"):
        compare_folders(f"{parts}/first:base-chat", f"{parts}/second:base-raw")


def test_training_asks_for_the_gate(parts, tmp_path, write_config):
    """Missing, failed, of other weights: refused before anything is made. GO: it trains."""
    passed = run_gate(parts / "sums.yaml", gate_words(parts, "go2"))
    path, _ = write_config(model=parts / "base", steps=1,
                           require_gate=parts / "go2" / "gate.json")
    run("train.py", path, check=0)
    failed = tmp_path / "gate.json"
    for report, words in (
            (passed | {"verdict": "NO-GO", "reasons": ["checks: base passes"]},
             ("says NO-GO", "base passes")),
            ({k: v for k, v in passed.items() if k != "verdict"}, ("says nothing",)),
            (passed | {"models": {"base": {"name": "another", "weights": "0"}}},
             ("other weights", "another"))):
        failed.write_text(json.dumps(report))
        path, folder = write_config("refused", model=parts / "base", steps=1, require_gate=failed)
        with pytest.raises(BadInput) as error:
            train(load_config(path))
        assert all(word in str(error.value) for word in words) and not folder.exists()
    path, _ = write_config("missing", require_gate=tmp_path / "none.json")
    assert_one_clear_line(run("train.py", path), "none.json", "-m gate CONFIG")


def test_no_go_ends_with_code_3(parts, tmp_path):
    done = run("-m", "gate", parts / "sums.yaml", f"base={TINY}", f"instruct={TINY}",
               f"out={tmp_path}/same", "limit=12", check=3)
    assert "NO-GO" in done.stdout and "do not train on this yet" in done.stderr
    with pytest.raises(Stopped):
        main([str(parts / "sums.yaml"), f"base={TINY}", f"out={tmp_path}/same", "limit=12",
              f"instruct={TINY}"])


def test_every_entry_loads_the_fast_blas():
    """Before MLX: whoever imports MLX first leaves it its own BLAS, ten times slower."""
    for name in ("__main__", "evaluate", "judge", "conversations", "self_instruct"):
        code = (f"import gate.{name}, engine.blas as b; "
                "assert b.LOADED == (b.load_openblas() if b.CPU_WHEEL else '')")
        run("-c", code, check=0)


def test_shipped_gates_are_valid():
    for path in sorted((ROOT / "configs").glob("gate_*.yaml")):
        cfg = load_gate(path, [])
        assert cfg.instruct and (ROOT / cfg.benchmark).exists(), path
        assert not cfg.judge_prompt or (ROOT / cfg.judge_prompt).exists()


def test_judge_prompts_and_configs_load():
    assert load_config(ROOT / "configs" / "tiny_judge.yaml").full

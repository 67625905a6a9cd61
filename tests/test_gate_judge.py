"""The judge on known letters, an endpoint on this machine, labels, a published trap."""
import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, small_model

from files.keys import BadInput
from gate import judge as judging
from gate.conversations import Conversation, Turn
from gate.judge import (
    calibrate,
    fill_prompt,
    judge_by_endpoint,
    judge_locally,
    letter_logprobs,
    load_prompt,
    parse_letter,
    read_labels,
    tiny_rows,
    verdict_of,
    write_spotcheck,
)

PROMPT = (ROOT / "gate" / "benchmark" / "judge.txt").read_text().rstrip("\n")
DIGITS = ("1", "0")


def conversation():
    turns = (Turn(user="I live in Tromso.", checks=(), need="", answer="Noted.", scored=False),
             Turn(user="Where do I live?", checks=(), need="the user lives in Tromso",
                  answer="Tromso", scored=True))
    return Conversation(id="memory-000", category="memory", family="f", difficulty="easy", seed=0,
                        slots={}, turns=turns)


def test_prompt_holds_what_the_judge_needs():
    said = ["Fine.", "You live in {need}."]
    text = fill_prompt(PROMPT, conversation(), said, 1, ("A", "B"), False)
    assert "the user lives in Tromso" in text and "User: Where do I live?" in text
    assert "You live in {need}." in text            # a reply is text, never a field
    assert text.count("You live in") == 1           # the reply is not in the chat it answers
    assert "A means: the reply uses it correctly" in text and text.endswith("Verdict (A or B):")
    swapped = fill_prompt(PROMPT, conversation(), said, 1, ("A", "B"), True)
    assert "B means: the reply uses it correctly" in swapped
    assert swapped.endswith("Verdict (A or B):")


def test_letter_logprobs_against_whole_forward(tokenizer):
    """Rows of several lengths in one batch, against each alone and a softmax in float64."""
    model, prompts = small_model(), ["is 3 3 ? 1 0 =", "is 17 18 and 19 ? 0 1 =", "add 3"]
    ours = letter_logprobs(model, tokenizer, prompts, DIGITS)
    for row, text in zip(ours, prompts):
        logits = np.array(model(mx.array([tokenizer.encode_prompt(text)]))[0, -1], np.float64)
        logprobs = logits - math.log(np.exp(logits).sum())
        theirs = [logprobs[i] for i in tokenizer.word_ids(DIGITS)]
        assert np.abs(row - theirs).max() < 1e-5
    with pytest.raises(BadInput, match="must be one token .* 'yes' is 4 "):
        letter_logprobs(model, tokenizer, prompts, ("yes", "no"))


def local_verdicts(monkeypatch, plain, swapped):
    """judge_locally where the two prompts' letter probabilities are given."""
    answers = iter([np.log(np.array([plain])), np.log(np.array([swapped]))])
    monkeypatch.setattr(judging, "letter_logprobs", lambda *_: next(answers))
    row = next(judge_locally(None, None, [("", "")], DIGITS))
    return row | {"verdict": verdict_of(row, unsure=1.0)}


def test_local_verdicts_by_hand(monkeypatch):
    """margin = mean of ln(.9/.1) and ln(.8/.2); a liking for a letter cancels."""
    found = local_verdicts(monkeypatch, (.9, .1), (.2, .8))
    assert found["verdict"] == "pass"
    assert found["margin"] == pytest.approx((math.log(9) + math.log(4)) / 2, abs=1e-4)
    assert local_verdicts(monkeypatch, (.1, .9), (.8, .2))["verdict"] == "fail"
    biased = local_verdicts(monkeypatch, (.95, .05), (.95, .05))
    assert (biased["verdict"], biased["margin"]) == ("unsure", 0)
    assert local_verdicts(monkeypatch, (.6, .1), (.01, .02))["verdict"] == "invalid"


def test_parse_letter():
    ours = lambda text: parse_letter(text, ("A", "B"))
    for text in ("A", " A\n", "**A**", "A.", "(A)", "A: it names the city", "A\nbecause it does",
                 "A - correct"):
        assert ours(text) == "A", text
    for text in ("", "A or B?", "AB", "Both", "Because", "The verdict is A", "A, not B", "a",
                 "A: unlike B", "I cannot say."):
        assert ours(text) is None, text


@contextmanager
def endpoint(script):
    """A server on this machine whose answers are script's, in turn; yields (url, requests)."""
    seen, answers = [], iter(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            status, text = next(answers)
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def verdicts(script, pairs=1, monkeypatch=None):
    with endpoint([(200, s) if isinstance(s, str) else s for s in script]) as (url, seen):
        asked = [(f"plain {i}", f"swapped {i}") for i in range(pairs)]
        return list(judge_by_endpoint(url, "judge-1", asked, ("A", "B"))), seen


def test_endpoint_verdicts(monkeypatch):
    """right is A in the first prompt and B in the second; what is not a letter is asked again."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(judging.time, "sleep", lambda _: None)
    found, seen = verdicts(["A", "B"])
    assert found[0]["verdict"] == "pass" and len(seen) == 2
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert body["messages"] == [{"role": "user", "content": "plain 0"}]
    assert verdicts(["B", "A"])[0][0]["verdict"] == "fail"
    assert verdicts(["A", "A"])[0][0]["verdict"] == "unsure"         # likes the letter
    found, seen = verdicts(["Well ...", "A", "B"])
    assert found[0]["verdict"] == "pass" and len(seen) == 3
    found, seen = verdicts(["no idea", "none", "B"])
    assert found[0]["verdict"] == "invalid" and len(seen) == 3
    found, seen = verdicts([(500, ""), (429, ""), "A", "B"])         # two attempts fail, then three
    assert found[0]["verdict"] == "pass" and len(seen) == 4


def test_endpoint_that_does_not_answer(monkeypatch):
    """Verdicts so far are kept, the key is in no message."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(judging.time, "sleep", lambda _: None)
    with endpoint([(200, "A"), (200, "B"), (401, "")]) as (url, _):
        answers = judge_by_endpoint(url, "m", [("a", "b"), ("c", "d")], ("A", "B"))
        assert next(answers)["verdict"] == "pass"
        with pytest.raises(BadInput, match="HTTP 401.*kept: the same command goes on") as error:
            next(answers)
    assert "sk-secret" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r")
    for url in ("http://127.0.0.1:9/v1", "http://host:port/v1", "http//host"):
        with pytest.raises(BadInput, match="holds what cannot be sent") as error:
            list(judge_by_endpoint(url, "m", [("a", "b")], ("A", "B")))
        assert "secret" not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(BadInput, match="does not answer .*refused"):
        list(judge_by_endpoint("http://127.0.0.1:9/v1", "m", [("a", "b")], ("A", "B")))


def test_prompt_files(tmp_path):
    assert load_prompt("") == PROMPT
    path = tmp_path / "prompt.txt"
    path.write_text("{reply} {right} {wrong}\n")
    assert load_prompt(path) == "{reply} {right} {wrong}"
    for text, named in (("{reply} {right}", "right"), ("{reply} {right} {wrong} {score}", "score")):
        path.write_text(text)
        with pytest.raises(BadInput, match=named):
            load_prompt(path)
    with pytest.raises(BadInput, match="is missing; expected a text file"):
        load_prompt(tmp_path / "none.txt")


def test_labels(tmp_path):
    path, known = tmp_path / "labels.jsonl", {("base-raw", "a"): "hi", ("base-raw", "b"): "ho"}
    row = lambda id, human, condition="base-raw": json.dumps(
        {"condition": condition, "id": id, "human": human}) + "\n"
    path.write_text(row("a", "pass") + row("b", None))
    assert read_labels(path, known) == {("base-raw", "a"): True}
    other = json.dumps({"condition": "base-raw", "id": "a", "human": "pass", "chat": "old"})
    for text, words in ((other, "labels another reply than base-raw a now has"),
                        (row("c", "pass") + row("a", "pass", "x"),
                         "2 bad rows: line 1 .base-raw c is unknown.*line 2 .x a is unknown"),
                        (row("a", "yes"),
                         '1 bad rows: line 1 .*human = "yes", expected "pass" or "fail"'),
                        (row("a", "pass") * 2, "1 bad rows: line 2 .base-raw a is there twice"),
                        ("{", "1 bad rows: line 1 ")):
        path.write_text(text)
        with pytest.raises(BadInput, match=words):
            read_labels(path, known)
    with pytest.raises(BadInput, match="spotcheck.jsonl"):
        read_labels(tmp_path / "none", known)


def test_pooling_makes_kappa_high():
    """The prior work's design: pooled kappa .713 over three models, on the instruct model -.11."""
    judged, labels = {}, {}
    for name, cells in {"base-fmt": (0, 0, 0, 10), "instruct-fmt": (8, 1, 1, 0),
                        "alternative-fmt": (1, 1, 1, 7)}.items():
        outcomes = [pair for pair, count in zip(
            ((True, True), (True, False), (False, True), (False, False)), cells)
            for _ in range(count)]
        for i, (by_judge, by_human) in enumerate(outcomes):
            judged[name, str(i)], labels[name, str(i)] = by_judge, by_human
    found = calibrate(judged, labels)
    assert found["n"] == 30 and found["value"] == pytest.approx(.713, abs=1e-3)
    assert not found["ok"] and found["low"] == pytest.approx(.45, abs=.01)  # 30 labels say little
    assert found["by_condition"]["instruct-fmt"]["value"] == pytest.approx(-.111, abs=1e-3)
    assert len(found["disagreements"]) == 4
    four = lambda side: {(c, f"{i} {n}"): v for (c, i), v in side.items() for n in range(4)}
    assert calibrate(four(judged), four(labels))["ok"]
    few = dict(list(labels.items())[1:])
    assert calibrate(labels, labels)["ok"] and not calibrate(few, few)["ok"]    # 29 labels
    undecided = {k: None for k in judged}
    assert calibrate(undecided, labels)["undecided"] == 30 and not calibrate(judged, {})["ok"]


def test_spotcheck_is_blind_and_kept(tmp_path):
    path = tmp_path / "spotcheck.jsonl"
    chats = {(c, f"{i:03}"): "User: hi" for c in ("base-raw", "instruct-chat") for i in range(50)}
    write_spotcheck(path, chats)
    drawn = path.read_bytes()
    write_spotcheck(path, dict(reversed(chats.items())))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 10 and path.read_bytes() == drawn
    assert all(line.keys() == {"condition", "id", "chat", "human"} for line in lines)
    lines[0]["human"] = "pass"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_spotcheck(path, chats)
    assert json.loads(path.read_text().splitlines()[0])["human"] == "pass"
    path.write_text(path.read_text().replace('"pass"', "true"))     # not valid, but a person's
    write_spotcheck(path, chats)
    assert "true" in path.read_text()


def test_tiny_rows_teach_the_comparison():
    template = load_prompt("gate/benchmark/tiny_judge.txt")
    rows = tiny_rows(template, DIGITS, 400, 0)
    assert rows == tiny_rows(template, DIGITS, 400, 0)
    for row in rows:
        _, answer, *reply, _, right, wrong, _ = row["prompt"].split()
        assert row["response"] == (right if [answer] == reply else wrong)
    assert 150 < sum(row["response"] == "1" for row in rows) < 250

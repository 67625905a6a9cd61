"""The judge on known letters, an endpoint on this machine, labels, a published trap."""
import json
import math
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, small_config, small_model, write_model
from gate_calibration import MODELS, anywhere, last_number, read_solutions

from files.keys import BadInput
from gate import judge as judging
from gate.conversations import Conversation, Turn, read_benchmark, write_benchmark
from gate.evaluate import run_gate
from gate.judge import (
    calibrate,
    check_judge,
    draw_to_label,
    fill_prompt,
    judge_by_endpoint,
    judge_locally,
    key_of,
    letter_logprobs,
    load_prompt,
    parse_letter,
    probes_of,
    read_labels,
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
    row = next(judge_locally(None, SimpleNamespace(chat_template=None), [("", "")], DIGITS))
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
                 "A - correct", "Verdict: A", "**Verdict: A**", "The verdict is A.", "A) because",
                 "A because it names it", "\\boxed{A}", "So it is $\\boxed{\\text{A}}$.",
                 "Verdict (A or B): A", "Verdict (A/B): A", "A: it does. Verdict: A",
                 "It names Tromso.\n\n**Verdict:** A", "<think>Is it B? Verdict: B</think>\n\nA",
                 "Final answer: A"):
        assert ours(text) == "A", text
    for text in ("B: A wrong city", "B. A reply with no city", "**B** - A city is missing"):
        assert ours(text) == "B", text      # the article is no verdict
    for text in ("", "A or B?", "AB", "Both", "Because", "A, not B", "a", "A: unlike B",
                 "I cannot say.", "A B", "A wrong city", "A wrong city is named.",
                 "<think>Verdict: A", "Verdict: A. No, verdict: B", "The answer is a city.",
                 "A. Had it been wrong, the answer is B.", "B. The answer A. Smith gave",
                 "Verdict: A/B", "A/B", "A / B?", "B\n\nAnswer: A"):
        assert ours(text) is None, text
    assert parse_letter("Verdict: 1", DIGITS) == "1" and parse_letter("10", DIGITS) is None


def test_a_local_judge_is_asked_in_its_own_template(tokenizer, monkeypatch):
    """One that has a chat template reads a user's message, any other the prompt as it is."""
    seen = []
    monkeypatch.setattr(judging, "letter_margins", lambda *a: (
        seen.append(a[4]) or np.zeros(1), np.ones(1)))
    for template, word in ((None, "none"), ("{{ messages }}", "chat")):
        next(judge_locally(None, SimpleNamespace(chat_template=template), [("a", "b")], DIGITS))
        assert seen.pop() == word
    model, chat = small_model(), "{% for m in messages %}ask {{ m['content'] }} {% endfor %}is"
    plain = letter_logprobs(model, tokenizer, ["add 3"], DIGITS)
    monkeypatch.setattr(tokenizer, "chat_template", chat)
    other = letter_logprobs(model, tokenizer, ["add 3"], DIGITS, "chat")
    assert np.abs(plain - other).max() > 1e-3
    assert np.array_equal(plain, letter_logprobs(model, tokenizer, ["add 3"], DIGITS))


def test_probes_are_right_and_wrong_by_the_checks():
    conversations, _ = read_benchmark(ROOT / "gate" / "benchmark" / "conversations.jsonl")
    probes = probes_of(conversations, PROMPT, ("A", "B"))
    assert len(probes) == 20 and [right for _, right in probes] == [True, False] * 10
    verdicts = ["pass", "fail"] * 10
    assert check_judge("m", verdicts, probes) == {"told": 10, "of": 10}
    assert check_judge("m", ["unsure", "fail"] * 2 + verdicts[4:], probes)["told"] == 8
    for said in (["fail"] * 20, ["pass"] * 20, ["unsure"] * 20, ["fail"] * 5 + verdicts[5:]):
        with pytest.raises(BadInput, match="plainly right replies"):
            check_judge("m", said, probes)
    for few in (0, 18):     # nothing to be told is no test passed
        with pytest.raises(BadInput, match=f"cannot be tested: .* {few // 2} pairs"):
            check_judge("m", verdicts[:few], probes[:few])


@contextmanager
def endpoint(script):
    """A server on this machine whose answers are script's, in turn; yields (url, requests)."""
    seen, answers = [], iter(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            status, text, *waits = next(answers)
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            for wait in waits:
                self.send_header("Retry-After", wait)
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
        return [row for _, row in judge_by_endpoint(url, "judge-1", asked, ("A", "B"))], seen


def test_endpoint_verdicts(monkeypatch):
    """right is A in the first prompt and B in the second; what is not a letter is asked again."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr("files.endpoint.time.sleep", lambda _: None)
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
    found, seen = verdicts([(429, "", "9" * 5000), "A", "B"])   # no number of seconds
    assert found[0]["verdict"] == "pass" and len(seen) == 3


@contextmanager
def waiting_endpoint(answer):
    """A server that answers several requests at once with answer(prompt); yields its address."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = answer(body["messages"][0]["content"])
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):     # who asked is gone
                self.wfile.write(json.dumps(
                    {"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_requests_run_together():
    """Sixteen that wait 0.2 s each; all verdicts are their own prompts'."""
    at_once, most = [], []

    def answer(prompt):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.2)
        kind, number = prompt.split()
        at_once.pop()
        return f"Verdict: {'A' if (kind == 'plain') == (int(number) % 3 > 0) else 'B'}"

    asked = [(f"plain {i}", f"swapped {i}") for i in range(8)]
    with waiting_endpoint(answer) as url:
        found = dict(judge_by_endpoint(url, "m", asked, ("A", "B"), requests=4))
    assert [found[i]["verdict"] for i in range(8)] == ["pass" if i % 3 else "fail"
                                                       for i in range(8)]
    assert 1 < max(most) <= 4


def test_a_slow_answer_holds_up_nobody():
    """What came behind it is there to be kept; Ctrl-C ends the command before it comes."""
    slow = threading.Event()

    def answer(prompt):
        if prompt == "plain 0":
            slow.wait(30)
        return "A" if prompt.startswith("plain") else "B"

    asked = [(f"plain {i}", f"swapped {i}") for i in range(6)]
    with waiting_endpoint(answer) as url:
        answers = judge_by_endpoint(url, "m", asked, ("A", "B"), requests=2)
        assert [next(answers)[0] for _ in range(5)] == [1, 2, 3, 4, 5]
        slow.set()
        assert next(answers)[0] == 0
        slow.clear()
        # a shell's background job ignores the interrupt, and its children do
        code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                "from config import run_main; from gate.judge import judge_by_endpoint as ask\n"
                f"run_main(lambda _: [print(place, flush=True) for place, _ in ask({url!r}, 'm', "
                f"{asked}, ('A', 'B'), requests=2)])")
        command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert [command.stdout.readline() for _ in range(5)] == [f"{i}\n" for i in range(1, 6)]
        command.send_signal(signal.SIGINT)
        try:
            assert command.communicate(timeout=10) == ("", "") and command.returncode == 130
        finally:
            command.kill()
            slow.set()


def test_no_verdict_is_asked_again_only_if_wanted(tmp_path):
    """What could not be read is kept as invalid; rejudge=true asks for these alone."""
    base = write_model(tmp_path / "base", small_config(), TINY)
    turns = lambda i: (Turn(f"{i} + 7 =", True, 0, str(i + 7), str(i + 7),
                            ({"type": "exact", "value": str(i + 7)},)),)
    write_benchmark(tmp_path / "b.jsonl", [Conversation(f"s-{i}", "c", "f", "easy", 0, {}, turns(i))
                                           for i in range(10)])
    (tmp_path / "g.yaml").write_text(
        f"base: {base}\nbenchmark: {tmp_path}/b.jsonl\nbase_templates: [raw]\n"
        f"max_reply_tokens: 2\njudge_model: m\nout: {tmp_path}/run\njudge_requests: 1\n")
    told = [(200, letter) for _ in range(10) for letter in ("A", "B", "B", "A")]     # the self-test
    first = [(200, "no idea")] * 4 + [(200, "B"), (200, "A")] * 7
    with endpoint([*told, *first, (200, "B"), (200, "A")]) as (url, seen):
        once = lambda *more: run_gate(tmp_path / "g.yaml", [f"judge={url}", *more])
        cells = once()["conditions"]["base-raw"]["judge"]
        assert (cells["undecided"], cells["rate"]["n"]) == (1, 7)
        asked = len(seen)
        assert seen[0][2]["max_tokens"] == 2048
        once()
        assert len(seen) == asked
        assert once("rejudge=true")["conditions"]["base-raw"]["judge"]["undecided"] == 0
        assert len(seen) == asked + 2


def test_endpoint_that_does_not_answer(monkeypatch):
    """Verdicts so far are kept, the key is in no message."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr("files.endpoint.time.sleep", lambda _: None)
    with endpoint([(200, "A"), (200, "B"), (401, "")]) as (url, _):
        answers = judge_by_endpoint(url, "m", [("a", "b"), ("c", "d")], ("A", "B"))
        assert next(answers)[1]["verdict"] == "pass"
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


def test_checkers_against_known_labels(tmp_path):
    """What tests/gate_calibration.py makes of published solutions: by hand, three problems."""
    solution = lambda text, right: {"solution": text, "is_correct": right}
    rows = [{"question": "q", "ground_truth": f"...\nA: {answer}", **dict(zip(MODELS, said))}
            for answer, said in (("1,018", (
                solution("9 * 2 = <<9*2=18>>18\nA: 1018", True), solution("A: 1018.0", True),
                solution("1018 - 5 = 1013\nA: 1013", False), solution("A: 18", False))),)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_solutions(tmp_path / "s.jsonl")
    assert [last_number(row) for row in found] == [row["right"] for row in found]
    assert [anywhere(row) for row in found] == [True, True, True, False]    # in a step


def test_labels(tmp_path):
    path, known = tmp_path / "labels.jsonl", {("base-raw", "a"): "hi", ("base-raw", "b"): "ho"}
    keys = {pair: key_of(*pair, chat) for pair, chat in known.items()}
    row = lambda id, human: json.dumps({"key": keys.get(("base-raw", id), id),
                                        "human": human}) + "\n"
    path.write_text(row("a", "pass") + row("b", None))
    assert read_labels(path, known) == {("base-raw", "a"): True}
    for text, words in ((row("c", "pass"), "c is of another reply"),
                        (row("a", "yes"),
                         '1 bad rows: line 1 .*human = "yes", expected "pass" or "fail"'),
                        (row("a", "pass") * 2, "1 bad rows: line 2 .*is there twice"),
                        ("{", "1 bad rows: line 1 ")):
        path.write_text(text)
        with pytest.raises(BadInput, match=words):
            read_labels(path, known)
    path.write_text(row("a", "pass"))
    with pytest.raises(BadInput, match="of another reply"):      # it has changed since
        read_labels(path, known | {("base-raw", "a"): "hello"})
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
    assert "30 labels, 100 are needed" in found["why"]
    assert found["by_condition"]["instruct-fmt"]["value"] == pytest.approx(-.111, abs=1e-3)
    assert len(found["disagreements"]) == 4
    assert (found["right"], found["wrong"]) == ((9, 11), (17, 19))
    four = lambda side: {(c, f"{i} {n}"): v for (c, i), v in side.items() for n in range(4)}
    many = calibrate(four(judged), four(labels))
    # AC1 is .76 there and kappa .71 over all: only within the condition is it seen
    assert many["why"] == ["kappa within instruct-fmt is not surely above 0"]
    undecided = {k: None for k in judged}
    assert calibrate(undecided, labels)["undecided"] == 30 and not calibrate(judged, {})["ok"]


def test_labels_that_confirm():
    """100 of them, 20 of each verdict: of 12 passes kappa says little, however high."""
    labels = lambda passed, n: {("base-raw", str(i)): i < passed for i in range(n)}
    assert calibrate(labels(20, 100), labels(20, 100))["ok"]
    assert not calibrate(labels(20, 99), labels(20, 99))["ok"]
    assert "12 passes and 88 failures, 20 of each are needed" in calibrate(
        labels(12, 100), labels(12, 100))["why"]


def test_spotcheck_is_blind_and_kept(tmp_path):
    path = tmp_path / "spotcheck.jsonl"
    chats = {(c, f"{i:03}"): f"User: hi {c}" for c in ("base-raw", "base-cued", "instruct-chat")
             for i in range(200)}
    needs, deciding = {f"{i:03}": ["x"] for i in range(200)}, {"base-raw", "instruct-chat"}
    write_spotcheck(path, chats, needs, draw_to_label(chats, deciding))
    drawn = path.read_bytes()
    other = dict(reversed(chats.items()))
    write_spotcheck(path, other, needs, draw_to_label(other, deciding))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 120 and path.read_bytes() == drawn
    assert [sum(c in line["chat"] for line in lines) for c in sorted(deciding)] == [60, 60]
    assert all(line.keys() == {"key", "needs", "chat", "human"} for line in lines)
    lines[0]["human"] = "pass"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_spotcheck(path, chats, needs, draw_to_label(chats, deciding))
    assert json.loads(path.read_text().splitlines()[0])["human"] == "pass"
    path.write_text(path.read_text().replace('"pass"', "true"))     # not valid, but a person's
    write_spotcheck(path, chats, needs, draw_to_label(chats, deciding))
    assert "true" in path.read_text()

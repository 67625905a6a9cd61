"""A language model as judge of replies: a verdict with its margin, and when to believe it.

The judge reads the chat, what the reply had to use, and the reply, and answers with one of two
letters. A local model is asked in its own chat template for the letters' log-probabilities, an
OpenAI-compatible endpoint for text. Either is asked twice with the letters' meanings exchanged,
which cancels a preference for one. Small margins and contradictions are `unsure`, unreadable
answers `invalid`: both undecided. First it has to tell ten right replies from ten wrong ones.

A scorer, judge or checks, is confirmed by people: at least 100 labels with 20 of each verdict,
kappa of at least 0.7 and surely above 0.55, AC1 and kappa within each condition. Pooled over models
of which some all fail and some all pass, kappa is high by itself. People label what was drawn and
all of it: who chooses the conversations chooses the verdict.
"""
import hashlib
import random
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from engine.decode import pad_prompts
from files import disk
from files.endpoint import request_text
from files.keys import BadInput
from gate.checks import check_turn
from gate.conversations import Conversation
from losses import token_logprobs
from model import Llama
from report.stats import cohens_kappa, corrected_rate, exact_interval, wilson
from text.rows import check_context
from text.tokenizer import Tokenizer

PROMPT = Path(__file__).parent / "benchmark" / "judge.txt"
LETTERS = ("A", "B")
FIELDS = ("need", "answer", "chat", "reply", "right", "wrong", "first", "second")
LEAST_LABELS, LEAST_EACH, LEAST_KAPPA, LEAST_LOW, LEAST_AC1 = 100, 20, 0.7, 0.55, 0.7
DRAWN, DRAWN_WITHIN = 120, 40   # conversations to label, at least; of each condition that decides
UNLABELLED = 0.05   # share of those drawn within a condition that may be left without a label
FEW = 5             # items of a class, below which agreement within a condition says nothing
PROBES, TOLD = 10, 8    # pairs of a right and a wrong reply, and how many a judge has to tell
MIN_MASS = 0.5      # of both letters together; with less it answers something else
ROWS = 32           # prompts of a forward pass


def load_prompt(path: str | Path) -> str:
    """The judge's prompt, a text file with {reply}, {right} and {wrong} at least; "": judge.txt."""
    text = disk.read_text(path or PROMPT, "a text file for judge_prompt").rstrip("\n")
    named = set(re.findall(r"{(\w*)}", text))
    if named - set(FIELDS) or not {"reply", "right", "wrong"} <= named:
        raise BadInput(f"judge_prompt = {path} names {', '.join(sorted(named)) or 'nothing'}; "
                       f"expected reply, right and wrong, and any of {', '.join(FIELDS)}")
    return text


def fill_prompt(template: str, conversation: Conversation, replies: list[str], t: int,
                letters: tuple[str, str], swapped: bool) -> str:
    """What the judge reads of turn t; swapped exchanges the letters' meanings."""
    right, wrong = letters[::-1] if swapped else letters
    said = [f"User: {turn.user}" + (f"\nAssistant: {replies[i]}" if i < t else "")
            for i, turn in enumerate(conversation.turns[:t + 1])]
    turn = conversation.turns[t]
    values = {"need": turn.need, "answer": turn.answer, "chat": "\n".join(said),
              "reply": replies[t] or "(nothing)", "right": right, "wrong": wrong,
              "first": letters[0], "second": letters[1]}
    # in one pass: a reply that holds "{need}" is text
    return re.sub(r"{(\w+)}", lambda match: values[match[1]], template)


# --- two kinds of judge
def letter_logprobs(model: Llama, tokenizer: Tokenizer, prompts: list[str],
                    letters: tuple[str, str], template: str = "none") -> np.ndarray:
    """log p of each letter as the next token, with and without a space before it, (B, 2)."""
    rows = [tokenizer.encode_messages([{"role": "user", "content": text}], template)[0]
            for text in prompts]
    check_context(rows, 1, model)
    tokens, last = pad_prompts(rows)    # causal: filling behind the last token changes nothing
    logits = model.head(model.final_resid(tokens, positions=last))[:, 0]        # (B, V)
    columns = []
    for letter in letters:
        encoded = [tokenizer.encode(text) for text in (letter, " " + letter)]
        spellings = sorted({ids[0] for ids in encoded if len(ids) == 1})
        if not spellings:
            tokenizer.word_ids([letter])     # says why not
        each = [token_logprobs(logits, mx.full(len(rows), i)) for i in spellings]
        columns.append(mx.logsumexp(mx.stack(each), axis=0))
    return np.array(mx.stack(columns, axis=1))


def letter_margins(model: Llama, tokenizer: Tokenizer, asked: list[tuple[str, str]],
                   letters: tuple[str, str],
                   template: str = "none") -> tuple[np.ndarray, np.ndarray]:
    """How far a model holds with the first meaning, over prompts plain and with them exchanged.

    margins  (B,) nats: mean over both of log p(right letter) - log p(wrong letter)
    masses   (B,) probability of both letters, the smaller of both; low: it says something else
    """
    plain, swapped = (letter_logprobs(model, tokenizer, prompts, letters, template)
                      for prompts in zip(*asked))
    margins = (plain[:, 0] - plain[:, 1] + swapped[:, 1] - swapped[:, 0]) / 2
    return margins, np.minimum(np.exp(plain).sum(-1), np.exp(swapped).sum(-1))


def judge_locally(model: Llama, tokenizer: Tokenizer, asked: list[tuple[str, str]],
                  letters: tuple[str, str]) -> Iterator[dict]:
    """What a local model says to pairs of prompts, plain and exchanged, {margin, mass} in turn."""
    template = "chat" if tokenizer.chat_template else "none"
    for first in range(0, len(asked), ROWS):    # a part at a time: what is judged is kept
        found = letter_margins(model, tokenizer, asked[first:first + ROWS], letters, template)
        for margin, mass in zip(*(side.tolist() for side in found)):
            yield {"margin": round(margin, 4), "mass": round(mass, 4)}


def judge_by_endpoint(url: str, name: str, asked: list[tuple[str, str]],
                      letters: tuple[str, str], tokens: int = 16,
                      requests: int = 1) -> Iterator[tuple[int, dict]]:
    """What an OpenAI-compatible endpoint says, (place in asked, {verdict, texts}) as it comes, some
    requests at a time; a prompt is asked once more if no letter can be read. BadInput where it
    cannot be reached."""
    ask = partial(ask_endpoint, url, name, letters, tokens)
    if requests == 1:
        yield from enumerate(map(ask, asked))
        return
    waiting, done = deque(enumerate(asked)), SimpleQueue()

    def work() -> None:
        while waiting:
            with suppress(IndexError):      # another thread took the last
                place, pair = waiting.popleft()
                try:
                    done.put((place, ask(pair)))
                except Exception as error:      # raised where it is read
                    done.put((place, error))

    for _ in range(requests):   # daemons: an interrupt does not wait for their answers
        Thread(target=work, daemon=True).start()
    try:
        for _ in asked:
            place, said = done.get()
            if isinstance(said, Exception):
                raise said
            yield place, said
    finally:        # a failure or an interrupt: what waits is not sent
        waiting.clear()


def ask_endpoint(url: str, name: str, letters: tuple[str, str], tokens: int,
                 pair: tuple[str, str]) -> dict:
    """One pair of prompts' {verdict, texts}."""
    votes, texts = [], []
    for prompt, right in zip(pair, letters):
        for _ in range(2):
            texts.append(request_text(url, name, prompt, tokens))
            letter = parse_letter(texts[-1], letters)
            if letter:
                break
        votes.append(None if letter is None else letter == right)
    verdict = ("invalid" if None in votes else "unsure" if votes[0] != votes[1]
               else "pass" if votes[0] else "fail")
    return {"verdict": verdict, "texts": [text[-80:] for text in texts]}


def verdict_of(row: dict, unsure: float) -> str:
    """Of what a judge said: pass | fail | unsure, too near to 0 or contradictory | invalid, none"""
    if "margin" not in row:
        return row["verdict"]
    return ("invalid" if row["mass"] < MIN_MASS else "unsure" if abs(row["margin"]) < unsure
            else "pass" if row["margin"] >= 0 else "fail")


def parse_letter(text: str, letters: tuple[str, str]) -> str | None:
    """The one letter that an answer gives, behind its reasoning; None where that is not plain.

    example  "A", "**B**", "A: it names the city", "The verdict is A.", "B: A wrong city" -> A, B,
             A, A, B;  "A or B?", "A B", "A, not B", "A wrong city", "B\n\nAnswer: A" -> None
    """
    text = re.sub(r"(?s)^.*</(?:think|thinking|reasoning)>", "", text)
    if re.search(r"<(?:think|thinking|reasoning)>", text):
        return None     # cut off while it reasoned
    either = "|".join(map(re.escape, letters))
    text = re.sub(r"\\boxed\s*{(?:\\text\s*{)?\W*(\w+)\W*?}+", r" Verdict: \1. ", text)
    text = re.sub(rf"\(?\b(?:{either})(?: or |\s*/\s*)(?:{either})\b\)?", "",
                  re.sub(r"[*_`#$]", "", text))
    letter = rf"\b({either})\b(?=\s*(?:$|[^\w\s]|\n|(?:because|since)\b))"    # not "A wrong city"
    given = re.findall(rf"(?i:\b(?:verdict|answer|label|mark))\W*(?:is\b|=)?\W*{letter}", text)
    if match := re.match(rf"\W*{letter}", text):
        # another letter behind it is no second verdict where it is an article: "B: A wrong city"
        rest = re.sub(r"\bA(?=\s+[a-z])", "", text[match.end():])
        given = [match[1], *(given or re.findall(rf"\b({either})\b", rest))]
    return given[0] if len(set(given)) == 1 else None


# --- can it tell right from wrong at all?
def probes_of(conversations: list[Conversation], template: str,
              letters: tuple[str, str]) -> list[tuple[tuple[str, str], bool]]:
    """Prompts about replies with known verdicts, [((plain, swapped), is_right)], in twos: a turn's
    right answer, and another conversation's that the turn's checks fail."""
    probes = []
    for c in conversations:
        t = next(t for t, turn in enumerate(c.turns) if turn.scored)
        others = [turn.answer for other in conversations if other.category == c.category
                  for turn in other.turns if turn.scored]
        wrong = next((text for text in others
                      if check_turn(c.turns[t].checks, text).verdict == "fail"), None)
        if (wrong is None or len(probes) == 2 * PROBES
                or check_turn(c.turns[t].checks, c.turns[t].answer).verdict != "pass"):
            continue
        said = [turn.answer for turn in c.turns[:t]]
        probes += [(tuple(fill_prompt(template, c, [*said, reply], t, letters, swapped)
                          for swapped in (False, True)), reply is not wrong)
                   for reply in (c.turns[t].answer, wrong)]
    return probes


def check_judge(name: str, verdicts: list[str], probes: list) -> dict:
    """How many of the twos a judge tells; BadInput where they are too few to go on with it, or
    there are too few to know."""
    if len(probes) < 2 * PROBES:
        raise BadInput(f"judge {name} cannot be tested: the conversations give {len(probes) // 2} "
                       f"pairs of a plainly right and a plainly wrong reply, expected {PROBES}: "
                       "give more conversations (limit, benchmark), or scorers without judge")
    hits = [verdict == ("pass" if right else "fail")
            for verdict, (_, right) in zip(verdicts, probes)]
    told = sum(a and b for a, b in zip(hits[::2], hits[1::2]))
    if told < TOLD:
        raise BadInput(f"judge {name} tells {told} of {len(hits) // 2} plainly right replies from "
                       f"plainly wrong ones (its verdicts: {', '.join(verdicts[:8])} ...); expected"
                       f" {TOLD} of {PROBES}: give a larger judge, its chat template, or another "
                       "judge_prompt. The replies are kept")
    return {"told": told, "of": len(hits) // 2}


# --- people's labels
LABEL = {"key": (disk.TEXT, disk.REQUIRED), "human": (disk.one_of("pass", "fail"), None)}


def key_of(condition: str, name: str, chat: str) -> str:
    """What stands for a conversation in the file to label, so that nobody sees whose it is."""
    return hashlib.sha256(repr((condition, name, chat)).encode()).hexdigest()[:16]


def read_labels(path: str, chats: dict[tuple[str, str], str]) -> dict[tuple[str, str], bool]:
    """Rows {"key", "human": "pass", "fail" or null}: {(condition, id): passes}.

    chats    of the conversations that were drawn to be labelled
    raises   BadInput naming rows that are damaged, twice there, or about other replies than these
    """
    keys, labels = {key_of(*pair, chat): pair for pair, chat in chats.items()}, {}

    def read(row: dict) -> None:
        values = disk.read_fields(row, LABEL, "a label")
        key = values["key"]
        if key not in keys or keys[key] in labels:
            raise ValueError(f"{key} is " + (
                "there twice" if key in keys else "of another reply, or was not drawn"))
        labels[keys[key]] = values["human"]

    disk.read_rows(path, read, "labels: the gate's own spotcheck.jsonl, in which people have put "
              '"human": "pass" or "fail"')
    return {key: human == "pass" for key, human in labels.items() if human}


def calibrate(outcomes: dict[tuple[str, str], bool | None],
              labels: dict[tuple[str, str], bool], drawn: Iterable[tuple[str, str]] = ()) -> dict:
    """A scorer against people: kappa and AC1, overall and by condition, sensitivity, specificity.

    drawn     the (condition, id) that people were given to label
    ok, why   whether it is confirmed, and what is missing
    right     of what people pass: (how many the scorer passes, of how many); wrong: fails, of fails
    """
    both = [key for key in labels if outcomes.get(key) is not None]
    compare = lambda keys: cohens_kappa([outcomes[k] for k in keys], [labels[k] for k in keys])
    classes_of = lambda keys, c: min(sum(v in (outcomes[k], labels[k]) for k in keys if k[0] == c)
                                     for v in (True, False)) >= FEW
    found = compare(both)
    cells = {c: compare([k for k in both if k[0] == c]) for c in sorted({c for c, _ in both})}
    right, wrong = ([outcomes[k] == v for k in both if labels[k] == v] for v in (True, False))
    asked = Counter(c for c, _ in drawn)
    left = Counter(c for c, i in drawn if (c, i) not in labels)
    missing = {
        f"{len(both)} labels, {LEAST_LABELS} are needed": len(both) < LEAST_LABELS,
        f"{len(right)} passes and {len(wrong)} failures, {LEAST_EACH} of each are needed":
            min(len(right), len(wrong)) < LEAST_EACH,
        f"kappa {LEAST_KAPPA}, surely above {LEAST_LOW}, is needed": not (
            found["value"] is not None and found["value"] >= LEAST_KAPPA
            and found["low"] >= LEAST_LOW),
        **{f"{n} of {asked[c]} drawn within {c} have no label, {UNLABELLED:.0%} may be left":
           n > UNLABELLED * asked[c] for c, n in left.items()},
        **{f"AC1 {cell['ac1']:.2f} within {c}, {LEAST_AC1} is needed": cell["ac1"] < LEAST_AC1
           for c, cell in cells.items()},
        **{f"kappa within {c} is not surely above 0": classes_of(both, c) and cell["low"] <= 0
           for c, cell in cells.items()}}
    why = [what for what, holds in missing.items() if holds]
    return {**found, "undecided": len(labels) - len(both), "ok": not why, "why": why,
            "right": (sum(right), len(right)), "wrong": (sum(wrong), len(wrong)),
            "sensitivity": wilson(sum(right), len(right)),
            "specificity": wilson(sum(wrong), len(wrong)), "by_condition": cells,
            "disagreements": sorted(k for k in both if outcomes[k] != labels[k])}


def rate_by_people(outcomes: dict[str, bool], labels: dict[str, bool], tail: float) -> dict:
    """One condition's rate, corrected by the labels of that condition alone: a scorer may miss what
    a base does right, and nothing of what an instruct model does. {value, n, low, high}

    outcomes   {id: passes} by the scorer; labels  {id: passes} by people, of a part drawn by chance
    """
    right, wrong = ([outcomes[i] == v for i, v in labels.items() if v == side]
                    for side in (True, False))
    found = corrected_rate(sum(outcomes.values()), len(outcomes), (sum(right), len(right)),
                           (sum(wrong), len(wrong)), 1 - 2 * tail)
    # all of one verdict, or a scorer no better than chance here: the labels speak for themselves
    return found if found["value"] is not None else exact_interval(
        sum(labels.values()), len(labels), tail)


def draw_to_label(chats: Iterable[tuple[str, str]], deciding: set[str]) -> list[tuple[str, str]]:
    """(condition, id) of what people are to label: the conditions that decide, evenly, by ids."""
    rng, drawn = random.Random(0), []
    for condition in sorted(deciding):
        names = sorted(name for c, name in chats if c == condition)
        rng.shuffle(names)
        most = max(-(-DRAWN // len(deciding)), DRAWN_WITHIN, len(names) // 10)
        drawn += [(condition, name) for name in names[:most]]
    rng.shuffle(drawn)
    return drawn


def write_spotcheck(path: Path, chats: dict[tuple[str, str], str], needs: dict[str, list[str]],
                    drawn: list[tuple[str, str]]) -> None:
    """What was drawn, for a person to label who knows neither verdict nor model. A file in which
    somebody has begun is left as it is.

    needs   {id: what its scored turns need}
    """
    rows = [{"key": key_of(*pair, chats[pair]), "needs": needs[pair[1]], "chat": chats[pair],
             "human": None} for pair in drawn]
    disk.check_target(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    if all(line.endswith(b'"human": null}') for line in lines if line):
        disk.write_text(path, disk.json_lines(rows))

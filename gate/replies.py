"""Let a model answer a benchmark's conversations, and score what it said: two steps, kept apart.

One loop serves every model: each user turn is rendered with what was said before, all conversations
at once, and the completion is cut where the next speaker would begin. Formats differ in nothing but
the rendering and those stops: text/chat.py's raw, lines, plain, cued and chat, and what gives a
base that knows no chat a fair chance:

    raw+cue       raw, and the cue behind which the assistant speaks
    plain+shots   worked conversations first, taken out of the benchmark (lines, cued: the same)

`own` history holds the model's earlier replies, `right` the benchmark's answers: a base that fails
with the one alone was led astray by itself. Empty, cut or looping replies fail for another reason
than what is asked about, so they are counted. Length is never part of a score: the prior work's
was "between 5 and 500 characters" (here `length`, kept to show its failure).
"""
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from files import disk
from files.keys import BadInput
from files.run_folder import hash_json
from gate.checks import PASS, Verdict, bare, check_turn, no_repeat
from gate.conversations import Conversation
from generate import sample
from model import Llama
from report.stats import exact_interval, wilson
from text.chat import TEMPLATES, encode_turns, reply_ends, turns_of
from text.tokenizer import Tokenizer

SCORERS = {"checks": "rules", "judge": "judge", "length": "rules"}      # and of what kind each is
FORMATS = (*TEMPLATES, "raw+cue", "plain+shots", "lines+shots", "cued+shots")
HISTORIES = ("own", "right")
PART = 16       # conversations answered at once and written together
REPLY = {"text": (disk.TEXT, disk.REQUIRED), "tokens": (disk.whole(0, 10 ** 9), disk.REQUIRED),
         "ended": (disk.one_of("stop", "length"), disk.REQUIRED)}


def draw(conversations: list[Conversation], limit: int | None, shots: int = 2,
         seed: int = 0) -> tuple[list[Conversation], list[Conversation]]:
    """What is asked, and the worked conversations, which never are: in a seeded order that spreads
    categories evenly. A limit takes the beginning, so a larger one adds to a smaller one's."""
    places, rng = [], random.Random(seed)
    by_category = defaultdict(list)
    for c in conversations:
        by_category[c.category].append(c)
    for group in by_category.values():
        rng.shuffle(group)
        places += [((i + 0.5) / len(group), c.category, c) for i, c in enumerate(group)]
    ordered = [c for *_, c in sorted(places, key=lambda place: place[:2])]
    rest = max(len(ordered) - shots, 0)
    return ordered[:rest][:limit], ordered[rest:]


def messages_of(conversation: Conversation, texts: list[str], t: int) -> list[dict]:
    """The conversation up to the user's turn t, with these replies."""
    said = [{"role": role, "content": text} for turn, text in zip(conversation.turns[:t], texts)
            for role, text in (("user", turn.user), ("assistant", text))]
    return [*said, {"role": "user", "content": conversation.turns[t].user}]


def encode(tokenizer: Tokenizer, messages: list[dict], form: str,
           shots: list[Conversation]) -> list[int]:
    """A prompt's ids in one of FORMATS."""
    template, _, more = form.partition("+")
    if not more:
        return tokenizer.encode_messages(messages, template)[0]
    turns = turns_of(messages, template)
    if more == "cue":
        turns[-1] = (f"{turns[-1][0]}\nAssistant:", None)
    else:
        gap = "\n" if template == "lines" else "\n\n"
        worked = [messages_of(c, [turn.answer for turn in c.turns], len(c.turns) - 1)
                  + [{"role": "assistant", "content": c.turns[-1].answer}] for c in shots]
        text = "".join("\n".join(prompt + reply for prompt, reply in turns_of(one, template)) + gap
                       for one in worked)
        turns[0] = (text + turns[0][0], turns[0][1])
    return encode_turns(tokenizer, turns)[0]


def answer(model: Llama, tokenizer: Tokenizer, conversations: list[Conversation], form: str,
           max_reply_tokens: int, shots: list[Conversation] = (),
           history: str = "own") -> list[dict]:
    """Greedy replies to every turn: [{id, replies: [{text, tokens, ended}]}].

    ended    "stop" by EOS or where the next speaker begins, "length" by max_reply_tokens
    raises   BadInput where a conversation does not fit the context: it is never cut in silence
    """
    rows = [{"id": c.id, "replies": []} for c in conversations]
    ends = reply_ends(tokenizer, form.partition("+")[0])
    for t in range(max(len(c.turns) for c in conversations)):
        going = [i for i, c in enumerate(conversations) if t < len(c.turns)]
        said = [[turn.answer for turn in conversations[i].turns] if history == "right"
                else [reply["text"] for reply in rows[i]["replies"]] for i in going]
        prompts = [encode(tokenizer, messages_of(conversations[i], texts, t), form, shots)
                   for i, texts in zip(going, said)]
        done = sample(model, tokenizer, prompts, max_reply_tokens, **ends)
        for i, completion in zip(going, done):
            rows[i]["replies"].append({"text": completion.text.strip(),
                                       "tokens": len(completion.ids),
                                       "ended": "stop" if completion.finished else "length"})
    return rows


def stamp_row(row: dict, plan: str) -> dict:
    """Replies with the plan that stood before them, and the hash of it all."""
    row = {"id": row["id"], "replies": row["replies"], "plan": plan}
    return {**row, "sha256": hash_json(row)}


def check_rows(rows: list[dict], conversations: list[Conversation], path: Path) -> list[dict]:
    """Rows of a file as they were stamped; BadInput where one is no conversation's replies, or was
    edited."""
    for number, (row, c) in enumerate(zip(rows, conversations), 1):
        where, kind = f"{path} line {number}", disk.list_of(disk.OBJECT)
        replies = disk.read_fields(row, {"replies": (kind, disk.REQUIRED)}, where)["replies"]
        for reply in replies:
            disk.read_fields(reply, REPLY, where)
        if row.get("id") != c.id:
            break       # other conversations: whoever reads the file says so
        if len(replies) != len(c.turns):
            raise BadInput(f"{where}: {len(replies)} replies, expected {len(c.turns)}: one to each "
                           "turn; delete the file, and all is asked anew")
        if row != stamp_row(row, row.get("plan")):
            raise BadInput(f"{where} was edited, or is of another version: its sha256 is not that "
                           "of its replies; delete the file, and all is asked anew")
    return rows


def transcript(conversation: Conversation, row: dict) -> str:
    """A conversation as a person reads it."""
    return "\n".join(f"User: {turn.user}\nAssistant: {reply['text']}"
                     for turn, reply in zip(conversation.turns, row["replies"]))


# --- scores
def score_turn(conversation: Conversation, texts: list[str], t: int, scorer: str) -> Verdict:
    """A turn's verdict by a scorer that is no model."""
    if scorer == "checks":
        said = [turn.user for turn in conversation.turns[:t]]
        return check_turn(conversation.turns[t].checks, texts[t], texts[:t], said)
    # length, the prior work's success rule: were 100 tokens enough to stop?
    return Verdict("pass" if 5 <= len(texts[t]) <= 500 else "fail", scorer)


def score(conversations: list[Conversation], rows: list[dict], scorer: str,
          judged: dict[tuple[str, int], str] | None = None) -> list[dict]:
    """[{id, category, passed, why}]: one failed turn fails it, an undecided one leaves it None.

    judged   the judge's verdicts by (id, turn), for scorer "judge"
    """
    scores = []
    for c, row in zip(conversations, rows, strict=True):
        texts = [reply["text"] for reply in row["replies"]]
        verdicts = {t: Verdict(judged[c.id, t], "judge") if scorer == "judge"
                    else score_turn(c, texts, t, scorer)
                    for t, turn in enumerate(c.turns) if turn.scored}
        why = [f"turn {t + 1}: {v.decided}" for t, v in verdicts.items() if v.verdict == "fail"]
        undecided = any(v.verdict != "pass" for v in verdicts.values())
        scores.append({"id": c.id, "category": c.category, "why": why,
                       "passed": False if why else None if undecided else True})
    return scores


# --- figures
def rate(outcomes: Iterable[bool | None]) -> dict:
    """Share that passed, of what was decided: mean, standard error, n and its Wilson interval."""
    decided = [passed for passed in outcomes if passed is not None]
    found = wilson(sum(decided), len(decided))
    p, n = found["value"], found["n"]
    return found | {"stderr": None if n < 2 else math.sqrt(p * (1 - p) / (n - 1))}


def worst(outcomes: Iterable[bool | None], undecided: bool, tail: float = 0.025) -> dict:
    """The share with whatever is undecided counted as passed, or as failed; its exact interval."""
    counted = [undecided if passed is None else passed for passed in outcomes]
    return exact_interval(sum(counted), len(counted), tail)


def is_loop(text: str, earlier: list[str]) -> bool:
    """Mostly repetition of itself, or five words or more that were all said before."""
    said = [bare(other) for other in earlier]
    return no_repeat(text) != PASS or len(text.split()) >= 5 and bare(text) in said


def health_of(conversations: list[Conversation], rows: list[dict]) -> dict[str, dict]:
    """Shares of replies that cannot show what a model knows, {empty, cut, loops}, and of
    conversations in which a scored one is any of these, {spoilt}: one failed turn fails them."""
    found = {"empty": [], "cut": [], "loops": [], "spoilt": []}
    for c, row in zip(conversations, rows, strict=True):
        texts, spoilt = [reply["text"] for reply in row["replies"]], False
        for t, (turn, reply) in enumerate(zip(c.turns, row["replies"])):
            ills = {"empty": not texts[t], "cut": reply["ended"] == "length",
                    "loops": is_loop(texts[t], texts[:t])}
            spoilt |= turn.scored and any(ills.values())
            for what, ill in ills.items():
                found[what].append(ill)
        found["spoilt"].append(spoilt)
    return {what: wilson(sum(each), len(each)) for what, each in found.items()}


def summarize_scores(scores: list[dict]) -> dict:
    """Rates over decided conversations, and by category; how many were not decided."""
    return {
        "rate": rate(s["passed"] for s in scores),
        "undecided": sum(s["passed"] is None for s in scores),
        "by_category": {c: rate(s["passed"] for s in scores if s["category"] == c)
                        for c in sorted({s["category"] for s in scores})}}


def summarize_replies(conversations: list[Conversation], rows: list[dict]) -> dict:
    """What replies look like, beside their scores and never in them."""
    tokens = [reply["tokens"] for row in rows for reply in row["replies"]]
    return {"median_tokens": statistics.median(tokens), **health_of(conversations, rows)}

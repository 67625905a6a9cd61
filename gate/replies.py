"""Let a model answer a benchmark's conversations, and score what it said: two steps, kept apart.

One loop serves every model: each user turn is rendered with the model's own earlier replies, all
conversations at once, and the completion is cut where the next speaker would begin. Formats (raw,
lines, plain, cued, chat: text/chat.py) differ in nothing but the rendering and those stops.

Length is reported beside every score and is never part of one: the prior work's score was "between
5 and 500 characters" (here `length`, kept to show its failure).
"""
import statistics
from collections.abc import Iterable

from gate.checks import Verdict, check_turn, normalise
from gate.conversations import Conversation
from generate import sample
from model import Llama
from report.stats import wilson
from text.chat import STOPS
from text.tokenizer import Tokenizer

SCORERS = ("checks", "judge", "exact", "length")
PART = 32       # conversations answered at once and written together


def answer(model: Llama, tokenizer: Tokenizer, conversations: list[Conversation], template: str,
           max_reply_tokens: int) -> list[dict]:
    """Greedy replies to every turn: [{id, replies: [{text, tokens, ended}]}].

    ended    "stop" by EOS or where the next speaker begins, "length" by max_reply_tokens
    raises   BadInput where a conversation does not fit the context: it is never cut in silence
    """
    histories = [[] for _ in conversations]
    rows = [{"id": c.id, "replies": []} for c in conversations]
    for t in range(max(len(c.turns) for c in conversations)):
        going = [i for i, c in enumerate(conversations) if t < len(c.turns)]
        for i in going:
            histories[i].append({"role": "user", "content": conversations[i].turns[t].user})
        prompts = [tokenizer.encode_messages(histories[i], template)[0] for i in going]
        done = sample(model, tokenizer, prompts, max_reply_tokens, many_lines=True,
                      stops=STOPS[template])
        for i, completion in zip(going, done):
            text = completion.text.strip()
            histories[i].append({"role": "assistant", "content": text})
            rows[i]["replies"].append({"text": text, "tokens": len(completion.ids),
                                       "ended": "stop" if completion.finished else "length"})
    return rows


def transcript(conversation: Conversation, row: dict) -> str:
    """A conversation as a person reads it."""
    return "\n".join(f"User: {turn.user}\nAssistant: {reply['text']}"
                     for turn, reply in zip(conversation.turns, row["replies"]))


# --- scores
def score_turn(conversation: Conversation, texts: list[str], t: int, scorer: str) -> Verdict:
    """A turn's verdict by a scorer that is no model."""
    turn, reply = conversation.turns[t], texts[t]
    if scorer == "checks":
        return check_turn(turn.checks, reply, texts[:t])
    if scorer == "exact":
        right = normalise(reply) == normalise(turn.answer)
    else:   # length, the prior work's success rule: were 100 tokens enough to stop?
        right = 5 <= len(reply) <= 500
    return Verdict("pass" if right else "fail", scorer)


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


def rate(outcomes: Iterable[bool | None]) -> dict:
    """Share that passed, of what was decided, with its Wilson interval."""
    decided = [passed for passed in outcomes if passed is not None]
    return wilson(sum(decided), len(decided))


def summarize_scores(scores: list[dict], rows: list[dict]) -> dict:
    """Rates over decided conversations, by category, and what replies look like beside them."""
    replies = [reply for row in rows for reply in row["replies"]]
    return {
        "rate": rate(s["passed"] for s in scores),
        "undecided": sum(s["passed"] is None for s in scores),
        "by_category": {c: rate(s["passed"] for s in scores if s["category"] == c)
                        for c in sorted({s["category"] for s in scores})},
        # cut: ended by max_reply_tokens
        "median_tokens": statistics.median(reply["tokens"] for reply in replies),
        "cut": wilson(sum(reply["ended"] == "length" for reply in replies), len(replies))}

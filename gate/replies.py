"""Let a model answer a benchmark's conversations, and score what it said: two steps, kept apart.

One loop serves every model: each user turn is rendered with the model's own earlier replies, all
conversations at once, and the completion is cut where the next speaker would begin. Formats differ
in nothing but the rendering (Tokenizer.encode_messages) and those stops:

    raw    the user's text and nothing else      lines  a line each, without labels
    plain  User: ...\\nAssistant: ...             cued   Instruction: ...\\nResponse:
    chat   the model's own chat template

Length is reported beside every score and is never part of one: the prior work's score was "between
5 and 500 characters" (here `length`, kept to show its failure).
"""
import statistics

from gate.checks import check_turn, normalise
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
def score_turn(conversation: Conversation, row: dict, t: int, scorer: str) -> tuple[str, str]:
    """("pass" | "fail" | "abstain", why) of one turn by a scorer that is no model."""
    turn, texts = conversation.turns[t], [reply["text"] for reply in row["replies"]]
    if scorer == "checks":
        return check_turn(turn.checks, texts[t], texts[:t])
    if scorer == "exact":
        return ("pass" if normalise(texts[t]) == normalise(turn.answer) else "fail"), "exact"
    # the prior work's success rule: what it measured was whether 100 tokens were enough to stop
    return ("pass" if 5 <= len(texts[t]) <= 500 else "fail"), "length"


def passed(verdicts: list[str]) -> bool | None:
    """A conversation fails by one failed turn; it is undecided (None) by one undecided turn."""
    if "fail" in verdicts:
        return False
    return True if all(v == "pass" for v in verdicts) else None


def score(conversations: list[Conversation], rows: list[dict], scorer: str,
          judged: dict[tuple[str, int], str] | None = None) -> list[dict]:
    """[{id, category, passed, turns: [verdict or None where not scored], why}].

    judged   the judge's verdicts by (id, turn), for scorer "judge"
    """
    scores = []
    for conversation, row in zip(conversations, rows, strict=True):
        verdicts, why = [], []
        for t, turn in enumerate(conversation.turns):
            if not turn.scored:
                verdicts.append(None)
                continue
            verdict, reason = ((judged[conversation.id, t], "judge") if scorer == "judge"
                               else score_turn(conversation, row, t, scorer))
            verdicts.append(verdict)
            why += [f"turn {t + 1}: {reason}"] * (verdict == "fail")
        scores.append({"id": conversation.id, "category": conversation.category,
                       "passed": passed([v for v in verdicts if v]), "turns": verdicts,
                       "why": why})
    return scores


def summarize_scores(scores: list[dict], rows: list[dict]) -> dict:
    """Rates over decided conversations, by category, and what replies look like beside them."""
    decided = [s for s in scores if s["passed"] is not None]
    share = lambda part: wilson(sum(s["passed"] for s in part), len(part))
    replies = [reply for row in rows for reply in row["replies"]]
    return {
        "rate": share(decided), "undecided": len(scores) - len(decided),
        "by_category": {c: share([s for s in decided if s["category"] == c])
                        for c in sorted({s["category"] for s in scores})},
        # cut: ended by max_reply_tokens
        "median_tokens": statistics.median(reply["tokens"] for reply in replies),
        "cut": wilson(sum(reply["ended"] == "length" for reply in replies), len(replies))}

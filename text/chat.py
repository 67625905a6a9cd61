"""Conversations as texts: what each template puts around messages, and where the messages stand.

A chat template is a stranger's program and is rendered in a process of its own (sandbox.py), with
a slot in place of each message. Control tokens are looked for in the template's own text alone, and
what people and models wrote is put between as plain ids (tokenizer.py). Rendering first and
encoding the whole lets a message speak for any role.

    raw     the user's text, nothing else          lines   a line each, for so small a model that
    plain   "User: ...\nAssistant:" for a base             labels are most of what it would read
    cued    "Instruction: ...\nResponse:"          chat    the instruct model's own template
"""
import functools
import hashlib
import re

from config import BadInput
from text.sandbox import render

TEMPLATES = ("raw", "lines", "plain", "cued", "chat")
LABELS = {"system": "System", "user": "User", "assistant": "Assistant"}
# texts that end a reply beside EOS: a model that goes on speaks for somebody else. A plain reply
# of one line may be ended at its line break; one of many lines ends where the next speaker begins
SPEAKERS = ("\nUser:", "\nAssistant:", "\nSystem:", "\nHuman:")
STOPS = {"raw": ("\n\n", *SPEAKERS), "lines": ("\n",), "plain": SPEAKERS, "chat": (),
         "cued": ("\nInstruction:", "\nResponse:")}


def check_messages(messages: list[dict[str, str]], reply_follows: bool) -> None:
    """BadInput unless it is a system message at most, then user and assistant in turn.

    A role goes into the prompt as it is, so only these three are let in.
    """
    expected = ("expected a list of {role, content}: perhaps a system message, then user and "
                f"assistant in turn, the {'user' if reply_follows else 'assistant'} last")
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"messages {repr(messages)[:60]}: {expected}")
    shift = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    for n, message in enumerate(messages):
        role = "system" if n < shift else ("user", "assistant")[(n - shift) % 2]
        if (not isinstance(message, dict) or message.get("role") != role
                or not isinstance(message.get("content"), str)):
            raise BadInput(f"message {n + 1} of {len(messages)}, {repr(message)[:80]}: {expected}")
    if messages[-1]["role"] != ("user" if reply_follows else "assistant"):
        raise BadInput(f"the last message is the {messages[-1]['role']}'s: {expected}")


def turns_of(messages: list[dict[str, str]], template: str) -> list[tuple[str, str | None]]:
    """(prompt, reply) texts of a conversation in turn; the last reply is None where it follows.

    White space around a message separates the speakers and is dropped, but for a reply's
    indentation: a reply begins behind its cue and one space.

    raw    lines without labels, the last one open; a reply's own line breaks become spaces
    lines  the same with the last one closed, as all are: what is trained is what is asked
    cued   one instruction and its response, no more
    """
    if template == "cued" and (len(messages) > 2 or messages[0]["role"] != "user"):
        raise BadInput(f"template cued is for one instruction and its response, and this "
                       f"conversation has {len(messages)} messages; take plain or chat")
    cue = {"plain": "Assistant:", "cued": "Response:"}.get(template, "")
    turns, prompt = [], ""
    for message in messages:
        is_reply = message["role"] == "assistant"
        text = message["content"]
        if template != "raw":
            text = text.rstrip() if is_reply else text.strip()
        if is_reply:
            bare = " ".join(text.split("\n"))
            turns.append((prompt + cue, f" {text}" if cue and text else text if cue else bare))
            prompt = ""
        else:
            label = {"plain": f"{LABELS[message['role']]}: ", "cued": "Instruction: "}
            prompt += f"{label.get(template, '')}{text}\n"
    if prompt:
        turns.append((prompt[:-1] if template == "raw" else prompt + cue, None))
    return turns


def render_chat(source: str, messages: list[dict[str, str]], reply_follows: bool,
                names: dict[str, str]) -> tuple[list[str], list[str]]:
    """A rendered conversation, cut where its messages stand, and what it writes of each.

    returns  parts [text, "0", text, "1", ..., text], numbers for messages, and the messages' texts.
             A reply's text has the white space that the template lets it have. Around the other
             messages it is in the parts
    raises   whatever the template raises; BadInput where a message is not there exactly once
    """
    slots = functools.partial(render_slots, source, messages, reply_follows, names)
    parts, texts = slots(), [m["content"].strip() for m in messages]
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    if all(reply == reply.strip() for reply in replies):
        return parts, texts
    # a template may trim: what a rendering with white space has more than one without is kept
    indented, trailed = slots(indented=True), slots(trailed=True)
    for k in range(1, len(parts), 2):
        n, before, after = int(parts[k]), parts[k - 1], parts[k + 1]
        if messages[n]["role"] != "assistant":
            continue
        if not (indented[k - 1].startswith(before) and trailed[k + 1].endswith(after)):
            raise BadInput(f"what it writes around message {n} depends on white space in it")
        texts[n] = (indented[k - 1][len(before):] + texts[n]
                    + trailed[k + 1][:len(trailed[k + 1]) - len(after)])
    return parts, texts


def render_slots(source: str, messages: list[dict[str, str]], reply_follows: bool,
                 names: dict[str, str], indented: bool = False, trailed: bool = False) -> list[str]:
    """The template's text around a slot for each message: render_chat's parts.

    A slot has its message's own white space around it; a reply's only what is asked for.
    """
    slot = f"slot{hashlib.sha256(source.encode()).hexdigest()[:16]}n"   # in no template but another
    slotted = []
    for n, message in enumerate(messages):
        text, is_reply = message["content"], message["role"] == "assistant"
        before, after = (text[:len(text) - len(text.lstrip())], text[len(text.rstrip()):])
        before = before if indented or not is_reply else ""
        after = after if text.strip() and (trailed or not is_reply) else ""
        slotted.append({"role": message["role"], "content": f"{before}{slot}{n}e{after}"})
    text = render(source, messages=slotted, tools=None, documents=None,
                  add_generation_prompt=reply_follows, **names)
    parts = re.split(f"{slot}(\\d+)e", text)
    if sorted(map(int, parts[1::2])) != list(range(len(messages))):
        raise BadInput(f"of messages 0 to {len(messages) - 1} it writes "
                       f"{', '.join(parts[1::2]) or 'none'}; expected each once")
    return parts


# --------------------------------------------------------------------------------------------------
# from a conversation to ids


def encode_messages(tokenizer, messages: list[dict[str, str]], template: str,
                    reply_follows: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a conversation, and where in them its replies stand.

    messages       [{"role", "content"}]: perhaps a system message, then user and assistant
                   in turn
    template       raw | lines | plain | cued | chat; the top of this file shows each
    reply_follows  True: it ends with the user, and the ids with what the assistant goes on
                   from; False: it ends with a reply, and the ids with what ends that
    returns        ids, spans: (start, stop) of each reply with the token that ends it, so that
                   a loss on the spans trains what is generated, and no speaker's label. In a
                   plain transcript that is EOS for the last reply, where nothing follows, and
                   the line break for the earlier ones
    raises         BadInput
    """
    if template not in TEMPLATES:
        raise BadInput(f"template {template!r}: expected one of {', '.join(TEMPLATES)}")
    if template == "chat":
        return encode_chat(tokenizer, messages, reply_follows)
    check_messages(messages, reply_follows)
    return encode_turns(tokenizer, turns_of(messages, template))


def encode_turns(tokenizer, turns) -> tuple[list[int], list[tuple[int, int]]]:
    """Prompts and replies are encoded apart: a prompt has the same ids whatever the reply."""
    ids, spans = [], []
    for n, (prompt, reply) in enumerate(turns):
        ids += tokenizer.encode_continuation(prompt) if n else tokenizer.encode_prompt(prompt)
        if reply is not None:
            start = len(ids)
            ids += tokenizer.encode_continuation(reply)
            is_last = n == len(turns) - 1
            ids += [tokenizer.eos_id] if is_last else tokenizer.encode_continuation("\n")
            spans.append((start, len(ids)))
    return ids, spans


def encode_chat(tokenizer, messages: list[dict[str, str]],
                reply_follows: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
    """A conversation in the model's own chat template; see `encode_messages`.

    A reply's span goes up to the first control token behind it, which ends it (<|im_end|>,
    <|eot_id|>, </s>); where the template writes none, it is the reply alone. A reply is encoded
    apart from what stands before it, since that is what it is generated behind. Encoded
    together, the line break of "assistant\n" and the indentation of code are one token in many
    vocabularies: a token that no prompt is followed by, and half of it is the template's.
    raises   BadInput: no template, or one that fails, leaves out a message, or is malicious
    """
    check_messages(messages, reply_follows)
    if tokenizer.chat_template is None:
        raise BadInput(f"{tokenizer.source} comes without a chat template (a base model?); "
                       "expected one in tokenizer_config.json or chat_template.jinja: take "
                       "template plain or cued, or an instruct model")
    try:
        parts, texts = render_chat(tokenizer.chat_template, messages, reply_follows,
                                   tokenizer.names)
    except Exception as error:      # a template is a program: anything may come out of it
        raise BadInput(f"the chat template beside {tokenizer.source} failed "
                       f"({' '.join(str(error).split())[:200]}); mend it, or take template "
                       "plain or cued") from None
    ids, spans, start, space = [], [], None, ""
    for n, part in enumerate(parts):
        if n % 2:       # a message
            before = len(ids)
            ids += tokenizer.encode_behind(ids, space + texts[int(part)])
            start = before if messages[int(part)]["role"] == "assistant" else None
            continue
        # a space in front of a word belongs to the word's token
        space = " " if part.endswith(" ") and n + 1 < len(parts) else ""
        stop = len(ids)
        ids += encode_markup(tokenizer, ids, part.removesuffix(space))
        if start is not None:
            ends = (i + 1 for i in range(stop, len(ids)) if ids[i] in tokenizer.reserved_ids)
            spans.append((start, next(ends, stop)))
    return ids, spans


def reply_ends(tokenizer, template: str) -> dict:
    """What ends a reply in a template, as arguments of generate.sample: texts and tokens.

    Beside EOS a chat template's own token does, and a base model's may differ: Qwen2.5's writes
    <|im_end|>, and its EOS is <|endoftext|>.
    """
    ends = set()
    if template == "chat":
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids, spans = encode_chat(tokenizer, talk, reply_follows=False)
        ends = {ids[spans[-1][1] - 1]} & tokenizer.reserved_ids
    return {"many_lines": True, "stops": STOPS[template], "ends": ends}


def encode_markup(tokenizer, ids: list[int], text: str) -> list[int]:
    """The same for a template's own text, in which a control token's name is that token."""
    ids, first = list(ids), len(ids)
    by_name = {tokenizer.name_of(i): i for i in tokenizer.reserved_ids}
    for part in re.split(f"({tokenizer.reserved_names})", text):
        ids += [by_name[part]] if part in by_name else tokenizer.encode_behind(ids, part)
    return ids[first:]

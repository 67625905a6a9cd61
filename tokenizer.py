"""Text and conversations to token ids and back, for both libraries of tokenizers, in one class.

Rules that whole projects have got wrong are kept here and nowhere else. (1) BOS: `encode_prompt`
puts it first, once, if the model uses one; training, evaluation, generation and lens all call it.
(2) Prompt and answer are encoded jointly, since encode(a) + encode(b) != encode(a + b) in general,
and the prompt's ids are checked to be a prefix of the whole. (3) EOS is a set: an instruct model
may stop at any of several ids. (4) Text is text: "<|im_end|>" typed by a user never becomes the
control token of that name. A chat template is therefore rendered with a slot in place of each
message; control tokens are looked for in the template's own text alone, and what people and models
wrote is put between as plain ids. (Rendering first and encoding the whole lets a message speak for
any role.)

    raw     the user's text, nothing else          lines   a line each, for so small a model that
    plain   "User: ...\nAssistant:" for a base             labels are most of what it would read
    cued    "Instruction: ...\nResponse:"          chat    the instruct model's own template
"""
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import sentencepiece
import tokenizers

from config import BadInput, Kind, read_fields

TEMPLATES = ("raw", "lines", "plain", "cued", "chat")
LABELS = {"system": "System", "user": "User", "assistant": "Assistant"}
# texts that end a reply beside EOS: a model that goes on speaks for somebody else. A plain reply
# of one line may be ended at its line break; one of many lines ends where the next speaker begins
SPEAKERS = ("\nUser:", "\nAssistant:", "\nSystem:", "\nHuman:")
is_id = lambda value: type(value) is int and 0 <= value < 2 ** 31
IDS = Kind("a token's id, or a list of such", lambda v: is_id(v) or (
    type(v) is list and all(map(is_id, v))))
STOPS = {"raw": ("\n\n", *SPEAKERS), "lines": ("\n",), "plain": SPEAKERS, "chat": (),
         "cued": ("\nInstruction:", "\nResponse:")}


class Tokenizer:
    """One interface over both libraries; ids are plain lists of int."""

    def __init__(self, backend, bos_id: int | None, eos_id: int, eos_ids: set[int], source: str,
                 chat_template: str | None = None, names: dict[str, str] | None = None,
                 space_behind_control: bool = False):
        self._backend, self._puts_space_behind_control = backend, space_behind_control
        self.chat_template = chat_template      # jinja; None: a base model
        self._names = names or {}               # bos_token, eos_token, ... as templates call them
        self._is_sentencepiece = isinstance(backend, sentencepiece.SentencePieceProcessor)
        self.bos_id, self.eos_id, self.eos_ids, self.source = bos_id, eos_id, eos_ids, source
        self.vocab_size = (backend.get_piece_size() if self._is_sentencepiece
                           else backend.get_vocab_size())

    def check_rows(self, V: int) -> None:
        """BadInput where an id that may be given out has no row in an embedding of V rows.

        MLX looks a row up without asking whether it is there: it would read somebody else's memory.
        """
        largest = (self.vocab_size - 1 if self._is_sentencepiece
                   else max(self._backend.get_vocab(with_added_tokens=True).values(), default=0))
        ids = {"BOS": self.bos_id or 0, "EOS": max(self.eos_ids),
               f"{self.piece(largest)!r}, its last token,": largest}
        outside = [f"{name} is {i}" for name, i in ids.items() if i >= V]
        if outside:
            raise BadInput(f"{self.source} does not fit the model, whose embedding has rows 0 to "
                           f"{V - 1} (vocab_size): {'; '.join(outside)}; take the tokenizer and "
                           "the eos_token_id that the model came with")

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, never a control token: its name is text like any other.

        The libraries see to most of that. What they still read as one token, such as a symbol that
        a user of SentencePiece defined, is encoded in two parts, cut behind its first character.
        """
        ids = self._encode(text)
        if self.reserved_ids.isdisjoint(ids):
            return ids
        name = self._reserved_names
        first, *others = re.split(f"(?={name})", text)
        ids = self._encode(first)
        for part in others:
            ids += self._continue(part[0]) + self._continue(part[1:])
        if not self.reserved_ids.isdisjoint(ids):
            raise BadInput(f"{self.source} reads a control token in the text {text[:60]!r}; "
                           "take it out")
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that stands behind other ids: no BOS, no space that SentencePiece puts first.

        A line break is a token of its own for SentencePiece, so what follows one follows on.
        """
        if self._puts_space_first:
            return self.encode("\n" + text)[len(self.encode("\n")):]
        return self.encode(text)

    def _encode(self, text: str) -> list[int]:
        if self._is_sentencepiece:
            return self._backend.encode(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def _continue(self, text: str) -> list[int]:
        """`encode_continuation` without the look for control tokens."""
        if self._puts_space_first:
            return self._encode("\n" + text)[len(self._encode("\n")):]
        return self._encode(text)

    def _name(self, token: int) -> str:
        if self._is_sentencepiece:
            return self._backend.id_to_piece(token) if token < self.vocab_size else ""
        return self._backend.id_to_token(token) or ""

    @functools.cached_property
    def reserved_ids(self) -> set[int]:
        """All control tokens: BOS, EOS, roles, padding; not <unk>, which plain text can give.

        Tokens of the form <|...|> count in any case: some files do not mark theirs as special.
        """
        if self._is_sentencepiece:
            backend, every = self._backend, range(self.vocab_size)
            # user-defined symbols are the type without a question of its own
            found = {i for i in every if backend.is_control(i)
                     or re.fullmatch(r"<\|.+\|>", backend.id_to_piece(i))}
            unknown = backend.unk_id()
        else:
            found = {i for i, token in self._backend.get_added_tokens_decoder().items()
                     if token.special or re.fullmatch(r"<\|.+\|>", token.content)}
            name = getattr(self._backend.model, "unk_token", None) or self._names.get("unk_token")
            unknown = self._backend.token_to_id(name) if name else None
        return (found | self.eos_ids | {self.bos_id}) - {unknown, None}

    @functools.cached_property
    def _reserved_names(self) -> str:
        """A pattern of the control tokens' names, longest first; one that matches nothing."""
        names = sorted(filter(None, map(self._name, self.reserved_ids)), key=len, reverse=True)
        return "|".join(map(re.escape, names)) or "(?!)"

    @functools.cached_property
    def _puts_space_first(self) -> bool:
        """SentencePiece, also where tokenizer.json imitates it: text begins with a space."""
        return self._is_sentencepiece or puts_space_behind(self._backend, "")

    def encode_prompt(self, text: str) -> list[int]:
        """BOS if the model uses one, then the text; raises BadInput if nothing is left to read."""
        ids = ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)
        if not ids:
            raise BadInput("the prompt is empty; give at least one character")
        return ids

    def encode_pair(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Ids of prompt + answer + EOS, and prompt length P; BadInput if a token spans the border.

        example  ("7 * 8 = ", "56") -> ([bos, 7, *, 8, =, 56, eos], 5): the answer's ids start at P
        """
        prompt_ids = self.encode_prompt(prompt)
        P = len(prompt_ids)
        ids = self.encode_prompt(prompt + answer)
        if ids[:P] != prompt_ids or len(ids) == P:
            raise BadInput(f"the border between prompt {prompt!r} and answer {answer!r} falls "
                           f"inside a token of {self.source}; move the space to the other side")
        return ids + [self.eos_id], P

    def encode_messages(self, messages: list[dict[str, str]], template: str,
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
            return self.encode_chat(messages, reply_follows)
        check_messages(messages, reply_follows)
        return self._encode_turns(turns_of(messages, template))

    def _encode_turns(self, turns) -> tuple[list[int], list[tuple[int, int]]]:
        """Prompts and replies are encoded apart: a prompt has the same ids whatever the reply."""
        ids, spans = [], []
        for n, (prompt, reply) in enumerate(turns):
            ids += self.encode_continuation(prompt) if n else self.encode_prompt(prompt)
            if reply is not None:
                start = len(ids)
                ids += self.encode_continuation(reply)
                ids += [self.eos_id] if n == len(turns) - 1 else self.encode_continuation("\n")
                spans.append((start, len(ids)))
        return ids, spans

    def encode_chat(self, messages: list[dict[str, str]],
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
        if self.chat_template is None:
            raise BadInput(f"{self.source} comes without a chat template (a base model?); expected "
                           "one in tokenizer_config.json or chat_template.jinja: take template "
                           "plain or cued, or an instruct model")
        try:
            parts, texts = render_chat(self.chat_template, messages, reply_follows, self._names)
        except Exception as error:      # a template is a program: anything may come out of it
            raise BadInput(f"the chat template beside {self.source} failed "
                           f"({' '.join(str(error).split())[:200]}); mend it, or take template "
                           "plain or cued") from None
        ids, spans, start, space = [], [], None, ""
        for n, part in enumerate(parts):
            if n % 2:       # a message
                before = len(ids)
                ids += self._encode_behind(ids, space + texts[int(part)])
                start = before if messages[int(part)]["role"] == "assistant" else None
                continue
            # a space in front of a word belongs to the word's token
            space = " " if part.endswith(" ") and n + 1 < len(parts) else ""
            stop = len(ids)
            ids += self._encode_markup(ids, part.removesuffix(space))
            if start is not None:
                ends = (i + 1 for i in range(stop, len(ids)) if ids[i] in self.reserved_ids)
                spans.append((start, next(ends, stop)))
        return ids, spans

    def _encode_behind(self, ids: Sequence[int], text: str) -> list[int]:
        """Ids of text behind those, as if both were encoded together."""
        if not len(ids) or ids[-1] in self.reserved_ids and self._puts_space_behind_control:
            return self.encode(text) if text else []
        return self.encode_continuation(text)

    def _encode_markup(self, ids: list[int], text: str) -> list[int]:
        """The same for a template's own text, in which a control token's name is that token."""
        ids, first = list(ids), len(ids)
        by_name = {self._name(i): i for i in self.reserved_ids}
        for part in re.split(f"({self._reserved_names})", text):
            ids += [by_name[part]] if part in by_name else self._encode_behind(ids, part)
        return ids[first:]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        special = self.eos_ids | {self.bos_id}
        ids = [int(i) for i in ids if int(i) not in special]
        return (self._backend.decode(ids) if self._is_sentencepiece
                else self._backend.decode(ids, skip_special_tokens=True))

    @functools.cached_property
    def stop_ids(self) -> set[int]:
        """What ends a completion: EOS, and every token that holds a line break."""
        plain = (i for i in range(self.vocab_size) if i not in self.eos_ids | {self.bos_id})
        return self.eos_ids | {i for i in plain if "\n" in self._backend.decode([i])}

    def piece(self, token: int) -> str:
        """One token as a reader sees it in a table: spaces as '·', line breaks as '⏎'."""
        token = int(token)
        if self._is_sentencepiece:
            # rows past the vocabulary are padding of the embedding matrix
            text = (self._backend.id_to_piece(token).replace("▁", " ")
                    if token < self.vocab_size else f"<{token}>")
        else:
            text = (self._backend.decode([token], skip_special_tokens=False)
                    or self._backend.id_to_token(token) or f"<{token}>")
        return text.replace(" ", "·").replace("\n", "⏎")

    def show(self, ids: Iterable[int]) -> str:
        """Tokens by piece and id. example  [1009, 1053] -> "·add (1009), ·subtract (1053)" """
        return ", ".join(f"{self.piece(i)} ({i})" for i in ids)

    def named_id(self, name: str) -> int | None:
        """The id of a token by its own name, such as <|im_end|> or <0x07>; None: there is none."""
        if not self._is_sentencepiece:
            return self._backend.token_to_id(name)
        found = self._backend.piece_to_id(name)
        return None if found == self._backend.unk_id() else found

    def word_ids(self, words: list[str], before: Sequence[int] = ()) -> list[int]:
        """The one token of each word: all of them with a space before them, or all without.

        The text before decides. Behind white space, a control token or nothing a word stands bare
        ("= " then "56"), behind anything else after a space ("is" then " Paris"). Where that form
        is not one token for every word, all take the other: two words in two forms are not two
        values of one thing, since a text asks for one form and the other gets no probability.

        before   ids up to the position; the last one decides
        returns  ids in the words' order; a token's own name, such as <0x07>, is that token
        raises   BadInput, with the pieces of each word that is in the way
        example  SmolLM2 behind "= ": add, multiply -> "add", "multiply"; with subtract, which is
                 one token only after a space -> " add", " multiply", " subtract"
        """
        bare, spaced = ([self._encode_word(word, space, before) for word in words]
                        for space in ("", " "))
        is_one = lambda word, ids: len(ids) == 1 and (      # and not <unk>
            ids[0] == self.named_id(word) or self.decode(ids).strip() == word.strip())
        for form in (bare, spaced) if self._stands_bare(before) else (spaced, bare):
            if all(map(is_one, words, form)):
                return [token for token, in form]
        count = lambda ids: (f"{len(ids)} token{'s' if len(ids) > 1 else ''} "
                             f"({' '.join(map(self.piece, ids))})")
        wrong = [f"target word {word!r} is {count(ids)}, after a space {count(after)}"
                 for word, ids, after in zip(words, bare, spaced)
                 if not (is_one(word, ids) and is_one(word, after))]
        raise BadInput(f"{'; '.join(wrong)}; a target must be one token of {self.source}, all of a "
                       "set after a space or all without: choose another word")

    def _encode_word(self, word: str, space: str, before: Sequence[int]) -> list[int]:
        named = self.named_id(word) if word.startswith("<") else None
        # a word given with its own space is taken as it stands
        text = word if word.startswith(" ") else space + word
        return self._encode_behind(before, text) if named is None else [named]

    def _stands_bare(self, before: Sequence[int]) -> bool:
        """Whether a word behind these ids has no space of its own before it."""
        if not len(before) or before[-1] in self.reserved_ids:
            return True
        # the libraries' decoders drop a lone SentencePiece space, so its name is asked as well
        return (self._name(before[-1]).endswith("▁")
                or self._backend.decode([int(before[-1])])[-1:].isspace())


# --------------------------------------------------------------------------------------------------
# conversations


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


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which some templates put around replies."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def compile_template(source: str) -> jinja2.Template:
    """A stranger's program: nothing outside its arguments can be reached or changed."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
    environment.globals["raise_exception"] = raise_exception
    # a fixed day, what Llama's own template falls back to: prompts must not change overnight
    environment.globals["strftime_now"] = datetime.datetime(2024, 7, 26).strftime
    return environment.from_string(source)


def render_chat(source: str, messages: list[dict[str, str]], reply_follows: bool,
                names: dict[str, str]) -> tuple[list[str], list[str]]:
    """A rendered conversation, cut where its messages stand, and what it writes of each.

    returns  parts [text, "0", text, "1", ..., text], numbers for messages, and the messages' texts.
             A reply's text has the white space that the template lets it have. Around the other
             messages it is in the parts
    raises   whatever the template raises; BadInput where a message is not there exactly once
    """
    render = functools.partial(render_slots, source, messages, reply_follows, names)
    parts, texts = render(), [m["content"].strip() for m in messages]
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    if all(reply == reply.strip() for reply in replies):
        return parts, texts
    # a template may trim: what a rendering with white space has more than one without is kept
    indented, trailed = render(indented=True), render(trailed=True)
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
    text = compile_template(source).render(messages=slotted, tools=None, documents=None,
                                           add_generation_prompt=reply_follows, **names)
    parts = re.split(f"{slot}(\\d+)e", text)
    if sorted(map(int, parts[1::2])) != list(range(len(messages))):
        raise BadInput(f"of messages 0 to {len(messages) - 1} it writes "
                       f"{', '.join(parts[1::2]) or 'none'}; expected each once")
    return parts


# --------------------------------------------------------------------------------------------------
# from a model folder


def read_optional_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); fetch it again") from None


def read_chat_template(folder: Path, settings: dict) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's own, of several the one named default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} cannot be read ({error}); fetch it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template
                         if isinstance(t, dict) and t.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise BadInput(f"{folder}/tokenizer_config.json: chat_template is a "
                       f"{type(template).__name__}; expected a text, or a list with a default")
    return template


def read_fast(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json; raises BadInput. Control tokens in a text are text to it."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{path} is not a tokenizer ({str(error)[:80]}); fetch it again") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def puts_space_behind(backend: tokenizers.Tokenizer, control: str) -> bool:
    """Whether text behind a control token ("": at the start) is given SentencePiece's space."""
    backend.encode_special_tokens = False
    tokens = backend.encode(control + "x", add_special_tokens=False).tokens
    backend.encode_special_tokens = True
    return any(t.startswith("▁") for t in tokens[bool(control):])


def read_stops(folder: Path, generation: dict, model_config: dict) -> list[int]:
    """The ids of EOS by generation_config.json, or if it does not speak of any by config.json.

    In this order, since config.json of an instruct model often names only one of its stop tokens.
    """
    first = "eos_token_id" in generation
    raw, file = ((generation, "generation_config.json") if first
                 else (model_config, "config.json"))
    stops = read_fields(raw, {"eos_token_id": (IDS, [])}, f"{folder}/{file}")["eos_token_id"]
    return stops if isinstance(stops, list) else [stops]


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Read a model folder's tokenizer; None where it has none, BadInput where it is damaged.

    tokenizer.model (sentencepiece) goes first: where a folder ships both, as TinyLlama's does, it
    is the original.
    """
    settings = read_optional_json(folder / "tokenizer_config.json")
    model_config = read_optional_json(folder / "config.json")
    generation = read_optional_json(folder / "generation_config.json")
    if (folder / "tokenizer.model").exists():
        path = folder / "tokenizer.model"
        try:
            backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise BadInput(f"{path} is not a sentencepiece model ({str(error)[:80]}); "
                           "fetch it again") from None
        has = lambda name: backend.id_to_piece(backend.piece_to_id(name)) == name
        # of a name that it does not have, the library says <unk>
        find = lambda name: backend.piece_to_id(name) if has(name) else None
        bos_id = (backend.bos_id() if backend.bos_id() >= 0 and settings.get("add_bos_token", True)
                  else None)
        default_eos = backend.eos_id() if backend.eos_id() >= 0 else None
    elif (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        backend = read_fast(path)
        find = backend.token_to_id
        # what the file's own post-processor puts before a text is what the model was trained with
        before = backend.encode("").ids
        bos_id = before[0] if before else None
        default_eos = None
    else:
        return None
    stops = read_stops(folder, generation, model_config)
    # the token that training appends: the one the tokenizer itself calls EOS
    name = settings.get("eos_token")
    name = name["content"] if isinstance(name, dict) else name
    named = find(name) if name else default_eos
    if name and named is None:
        raise BadInput(f"{folder}/tokenizer_config.json: eos_token {name!r} is no token of {path}; "
                       "take the tokenizer files that the model came with")
    if named is None and not stops:
        raise BadInput(f"{folder}: no EOS token in tokenizer_config.json, generation_config.json "
                       "or config.json; a model that cannot stop cannot be trained")
    eos_id = stops[0] if named is None else named
    # the names that templates use, such as bos_token
    names = {k: v.get("content", "") if isinstance(v, dict) else v for k, v in settings.items()
             if k.endswith("_token") and isinstance(v, str | dict)}
    loaded = Tokenizer(backend, bos_id, eos_id, set(stops) | {eos_id}, str(path),
                       read_chat_template(folder, settings), names, settings.get("legacy") is True)
    if (folder / "tokenizer.json").exists():    # the one that chats were made with
        fast = read_fast(folder / "tokenizer.json")
        loaded._puts_space_behind_control = puts_space_behind(fast, loaded._name(eos_id))
    for name, token in (("bos_token", bos_id), ("eos_token", eos_id)):
        if token is not None:
            loaded._names.setdefault(name, loaded._name(token))
    return loaded

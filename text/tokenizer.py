"""Text and conversations to token ids and back, for both libraries of tokenizers, in one class.

Rules that whole projects have got wrong are kept here and nowhere else. (1) BOS: `encode_prompt`
puts it first, once, if the model uses one; training, evaluation, generation and lens all call it.
(2) Prompt and answer are encoded jointly, since encode(a) + encode(b) != encode(a + b) in general,
and the prompt's ids are checked to be a prefix of the whole. (3) EOS is a set: an instruct model
may stop at any of several ids. (4) Text is text: "<|im_end|>" typed by a user never becomes the
control token of that name.
"""
import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from config import BadInput
from files.disk import SWITCH, TEXT, Kind, read_data, read_fields, read_json, read_text

is_id = lambda value: type(value) is int and 0 <= value < 2 ** 31
IDS = Kind("a token's id, or a list of such", lambda v: is_id(v) or (
    type(v) is list and all(map(is_id, v))))
TOKEN = Kind("a text, or an object with one as content", lambda v: TEXT.fits(
    v.get("content") if type(v) is dict else v))
TEMPLATE = Kind("a text, or a list of {name, template} with one named default", lambda v: (
    TEXT.fits(v) or type(v) is list and v != [] and all(
        type(t) is dict and TEXT.fits(t.get("name")) and TEXT.fits(t.get("template")) for t in v)))
# of tokenizer_config.json
FIELDS = {"eos_token": (TOKEN, None), "bos_token": (TOKEN, None), "unk_token": (TOKEN, None),
          "add_bos_token": (SWITCH, True), "legacy": (SWITCH, False),
          "chat_template": (TEMPLATE, None)}


class Tokenizer:
    """One interface over both libraries; ids are plain lists of int."""

    def __init__(self, backend, bos_id: int | None, eos_id: int, eos_ids: set[int], source: str,
                 chat_template: str | None = None, names: dict[str, str] | None = None,
                 space_behind_control: bool = False):
        self._backend, self._puts_space_behind_control = backend, space_behind_control
        self.chat_template = chat_template      # jinja; None: a base model
        self.names = names or {}               # bos_token, eos_token, ... as templates call them
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
        name = self.reserved_names
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

    def name_of(self, token: int) -> str:
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
            name = getattr(self._backend.model, "unk_token", None) or self.names.get("unk_token")
            unknown = self._backend.token_to_id(name) if name else None
        return (found | self.eos_ids | {self.bos_id}) - {unknown, None}

    @functools.cached_property
    def reserved_names(self) -> str:
        """A pattern of the control tokens' names, longest first; one that matches nothing."""
        names = sorted(filter(None, map(self.name_of, self.reserved_ids)), key=len, reverse=True)
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
        """Ids of a conversation, and (start, stop) of its replies; see text/chat.py.

        template   none: the last message alone, as it is
        """
        if template == "none":
            return self.encode_prompt(messages[-1]["content"]), []
        # imported here: only conversations need it, and the sandbox that it loads
        from text.chat import encode_messages
        return encode_messages(self, messages, template, reply_follows)

    def reply_ends(self, template: str) -> dict:
        """What ends a reply of many lines, as arguments of generate.sample; see text/chat.py."""
        if template == "none":      # EOS alone
            return {"many_lines": True}
        from text.chat import reply_ends  # as above
        return reply_ends(self, template)

    def encode_behind(self, ids: Sequence[int], text: str) -> list[int]:
        """Ids of text behind those, as if both were encoded together; [] where there is no text."""
        if not len(ids) or ids[-1] in self.reserved_ids and self._puts_space_behind_control:
            return self.encode(text) if text else []
        return self.encode_continuation(text)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        special = self.eos_ids | {self.bos_id}
        ids = [int(i) for i in ids if int(i) not in special]
        return (self._backend.decode(ids) if self._is_sentencepiece
                else self._backend.decode(ids, skip_special_tokens=True))

    def decode_until(self, ids: list[int], many_lines: bool,
                     stops: tuple[str, ...]) -> tuple[str, str]:
        """A completion's text up to the first stop, or line break unless many lines; the stop."""
        text = self.decode(ids)
        text = text if many_lines else text.partition("\n")[0]
        stop = first_stop(text, stops)
        return text[:text.index(stop)] if stop else text, stop

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
        """Tokens by piece and id. example  [1012, 1015] -> "·add (1012), ·subtract (1015)" """
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
        count = lambda ids: f"{len(ids)} ({' '.join(map(self.piece, ids))})"
        wrong = [f"{word!r} is {count(ids)}, after a space {count(after)}"
                 for word, ids, after in zip(words, bare, spaced)
                 if not (is_one(word, ids) and is_one(word, after))]
        raise BadInput(f"target words must be one token of {self.source} each, all of a set after "
                       f"a space or all without: {'; '.join(wrong)}; choose another word")

    def _encode_word(self, word: str, space: str, before: Sequence[int]) -> list[int]:
        named = self.named_id(word) if word.startswith("<") else None
        # a word given with its own space is taken as it stands
        text = word if word.startswith(" ") else space + word
        return self.encode_behind(before, text) if named is None else [named]

    def _stands_bare(self, before: Sequence[int]) -> bool:
        """Whether a word behind these ids has no space of its own before it."""
        if not len(before) or before[-1] in self.reserved_ids:
            return True
        # the libraries' decoders drop a lone SentencePiece space, so its name is asked as well
        return (self.name_of(before[-1]).endswith("▁")
                or self._backend.decode([int(before[-1])])[-1:].isspace())


# --------------------------------------------------------------------------------------------------
# texts that end a completion


def first_stop(text: str, stops: tuple[str, ...]) -> str:
    """Of the stops in a text the one that begins first; "" if there is none."""
    return min((s for s in stops if s in text), key=text.index, default="")


def tokens_until_stop(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> int:
    """How many of the ids it takes until their text holds a stop; all if it never does."""
    for n in range(1, len(ids)):
        if first_stop(tokenizer.decode(ids[:n]), stops):
            return n
    return len(ids)


# --------------------------------------------------------------------------------------------------
# from a model folder


def read_optional_json(path: Path) -> dict:
    return read_json(path) if os.path.lexists(path) else {}


def read_chat_template(folder: Path, template: str | list | None) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's own, of several the one named default."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return read_text(path, "a chat template", 2 ** 20)
    if isinstance(template, list):
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def read_fast(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json; raises BadInput. Control tokens in a text are text to it."""
    try:
        backend = tokenizers.Tokenizer.from_str(read_text(path, "a tokenizer", 2 ** 28))
    except BadInput:
        raise
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{path} is not a tokenizer ({str(error)[:80]}); fetch it again") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def read_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer.model; raises BadInput."""
    try:
        data = read_data(path, "a sentencepiece model")
        if not data:    # which the library takes, and fails at later
            raise RuntimeError("it is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise BadInput(f"{path} is not a sentencepiece model ({str(error)[:80]}); "
                       "fetch it again") from None


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


def read_tokenizer(folder: Path) -> dict | None:
    """The arguments of tokenizer.Tokenizer from a model folder; None where it has no tokenizer.

    tokenizer.model (sentencepiece) goes first: where a folder ships both, as TinyLlama's does, it
    is the original.
    """
    settings = read_optional_json(folder / "tokenizer_config.json")
    fields = read_fields(settings, FIELDS, f"{folder}/tokenizer_config.json")
    model_config = read_optional_json(folder / "config.json")
    generation = read_optional_json(folder / "generation_config.json")
    if os.path.lexists(folder / "tokenizer.model"):
        path = folder / "tokenizer.model"
        backend, fast = read_sentencepiece(path), None
        name_of = backend.id_to_piece

        def find(name):     # of a name that it does not have, the library says <unk>
            found = backend.piece_to_id(name)
            return found if name_of(found) == name else None

        bos_id = (backend.bos_id() if backend.bos_id() >= 0 and fields["add_bos_token"]
                  else None)
        default_eos = backend.eos_id() if backend.eos_id() >= 0 else None
    elif os.path.lexists(folder / "tokenizer.json"):
        path = folder / "tokenizer.json"
        backend = fast = read_fast(path)
        find, name_of = backend.token_to_id, backend.id_to_token
        # what the file's own post-processor puts before a text is what the model was trained with
        before = backend.encode("").ids
        bos_id = before[0] if before else None
        default_eos = None
    else:
        return None
    stops = read_stops(folder, generation, model_config)
    # the token that training appends: the one the tokenizer itself calls EOS
    name = fields["eos_token"]
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
    for name, token in (("bos_token", bos_id), ("eos_token", eos_id)):
        if token is not None:
            names.setdefault(name, name_of(token) or "")
    if fast is None and os.path.lexists(folder / "tokenizer.json"):
        fast = read_fast(folder / "tokenizer.json")     # the one that chats were made with
    space = puts_space_behind(fast, name_of(eos_id) or "") if fast else fields["legacy"]
    return {"backend": backend, "bos_id": bos_id, "eos_id": eos_id,
            "eos_ids": set(stops) | {eos_id}, "source": str(path),
            "chat_template": read_chat_template(folder, fields["chat_template"]), "names": names,
            "space_behind_control": space}


def load_tokenizer(folder: Path, V: int | None = None) -> Tokenizer | None:
    """A model folder's tokenizer; None where it has none, BadInput where it is damaged.

    V   rows of the model's embedding, which must hold all its ids; None: not asked
    """
    found = read_tokenizer(folder)
    tokenizer = Tokenizer(**found) if found else None
    if tokenizer and V is not None:
        tokenizer.check_rows(V)
    return tokenizer

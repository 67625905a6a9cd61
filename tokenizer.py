"""Text to token ids and back: sentencepiece `tokenizer.model` or `tokenizer.json`, in one class.

Three rules that whole projects have got wrong are kept here and nowhere else. (1) BOS:
`encode_prompt` puts it first, once, if the model uses one; training, evaluation, generation and
lens all call it. (2) Prompt and answer are encoded jointly, since encode(a) + encode(b) !=
encode(a + b) in general, and the prompt's ids are checked to be a prefix of the whole. (3) EOS is a
set: an instruct model may stop at any of several ids.
"""
import functools
import json
from pathlib import Path

import sentencepiece
import tokenizers

from config import BadInput


class Tokenizer:
    """One interface over both libraries; ids are plain lists of int."""

    def __init__(self, backend, bos_id: int | None, eos_id: int, eos_ids: set[int], source: str):
        self._backend = backend
        self._is_sentencepiece = isinstance(backend, sentencepiece.SentencePieceProcessor)
        self.bos_id, self.eos_id, self.eos_ids, self.source = bos_id, eos_id, eos_ids, source
        self.vocab_size = (backend.get_piece_size() if self._is_sentencepiece
                           else backend.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special tokens."""
        if self._is_sentencepiece:
            return self._backend.encode(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that stands behind other ids: no BOS, no space that SentencePiece puts first.

        A line break is a token of its own for SentencePiece, so what follows one follows on.
        """
        if self._is_sentencepiece:
            return self.encode("\n" + text)[len(self.encode("\n")):]
        return self.encode(text)

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

    def single_id(self, word: str) -> int:
        """The id of a word that is one token, bare or after a space; BadInput lists its pieces.

        A token's own name goes too, such as <0x07> or <|reserved_special_token_3|>.
        """
        if self._is_sentencepiece:
            named = self._backend.piece_to_id(word)
            named = None if named == self._backend.unk_id() else named
        else:
            named = self._backend.token_to_id(word)
        if named is not None and word.startswith("<"):
            return named
        for text in (word, " " + word):
            ids = self.encode(text)
            if len(ids) == 1 and self.decode(ids).strip() == word.strip():  # and not <unk>
                return ids[0]
        pieces = " ".join(self.piece(i) for i in self.encode(word))
        raise BadInput(f"target word {word!r} is {len(self.encode(word))} tokens of {self.source} "
                       f"({pieces}); a target must be one token: choose another word")


def read_optional_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); fetch it again") from None


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
        find = backend.piece_to_id
        bos_id = (backend.bos_id() if backend.bos_id() >= 0 and settings.get("add_bos_token", True)
                  else None)
        default_eos = backend.eos_id()
    elif (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BadInput(f"{path} is not a tokenizer ({str(error)[:80]}); "
                           "fetch it again") from None
        backend.no_truncation()
        backend.no_padding()
        find = backend.token_to_id
        # what the file's own post-processor puts before a text is what the model was trained with
        before = backend.encode("").ids
        bos_id = before[0] if before else None
        default_eos = None
    else:
        return None
    # generation_config.json goes first: config.json of an instruct model often names only one
    # of its stop tokens
    stops = generation.get("eos_token_id", model_config.get("eos_token_id"))
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    # the token that training appends: the one the tokenizer itself calls EOS
    named = settings.get("eos_token")
    named = find(named["content"] if isinstance(named, dict) else named) if named else default_eos
    if named is None and not stops:
        raise BadInput(f"{folder}: no EOS token in tokenizer_config.json, generation_config.json "
                       "or config.json; a model that cannot stop cannot be trained")
    eos_id = stops[0] if named is None or named < 0 else named
    return Tokenizer(backend, bos_id, eos_id, set(stops) | {eos_id}, str(path))

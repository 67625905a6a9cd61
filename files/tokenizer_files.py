"""A model folder's tokenizer files, of both libraries: which tokens begin and end a text.

EOS is a set, since an instruct model may stop at any of several ids, and the files of one model
may disagree about it: who is asked first is decided here.
"""
import json
from pathlib import Path

import sentencepiece
import tokenizers

from config import BadInput
from files.disk import Kind, read_fields

is_id = lambda value: type(value) is int and 0 <= value < 2 ** 31
IDS = Kind("a token's id, or a list of such", lambda v: is_id(v) or (
    type(v) is list and all(map(is_id, v))))


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


def read_tokenizer(folder: Path) -> dict | None:
    """The arguments of tokenizer.Tokenizer from a model folder; None where it has no tokenizer.

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
        name_of = backend.id_to_piece

        def find(name):     # of a name that it does not have, the library says <unk>
            found = backend.piece_to_id(name)
            return found if name_of(found) == name else None

        bos_id = (backend.bos_id() if backend.bos_id() >= 0 and settings.get("add_bos_token", True)
                  else None)
        default_eos = backend.eos_id() if backend.eos_id() >= 0 else None
    elif (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        backend = read_fast(path)
        find, name_of = backend.token_to_id, backend.id_to_token
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
    for name, token in (("bos_token", bos_id), ("eos_token", eos_id)):
        if token is not None:
            names.setdefault(name, name_of(token) or "")
    space = settings.get("legacy") is True
    if (folder / "tokenizer.json").exists():    # the one that chats were made with
        fast = read_fast(folder / "tokenizer.json")
        space = puts_space_behind(fast, name_of(eos_id) or "")
    return {"backend": backend, "bos_id": bos_id, "eos_id": eos_id,
            "eos_ids": set(stops) | {eos_id}, "source": str(path),
            "chat_template": read_chat_template(folder, settings), "names": names,
            "space_behind_control": space}

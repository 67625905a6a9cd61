"""A GGUF header's vocabulary as the tokenizer files of a Hub folder.

Two kinds. `gpt2`: byte-level BPE, whose header has tokens and merges, but of the patterns that
split a text before the merges only a name, so the patterns stand here. `llama`: sentencepiece,
whose header has pieces, scores and types, and from these its model file can be written again.

Sources: llama.cpp's llama-vocab.cpp (patterns, what holds where the header is silent),
sentencepiece_model.proto (numbers of the fields).
"""
import json
import struct
from pathlib import Path

from config import BadInput
from files.disk import REQUIRED, SWITCH, TEXT, Kind, read_fields

# each pattern splits what the one before it has left
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
SPLITS = {"gpt-2": (GPT2,), "smollm": (r"\p{N}", GPT2), "qwen2": (QWEN2,),
          "deepseek-r1-qwen": (QWEN2,), "llama-bpe": (LLAMA3,), "llama3": (LLAMA3,),
          "llama-v3": (LLAMA3,)}
TEXTS = Kind("a list of texts", lambda v: type(v) is list and all(map(TEXT.fits, v)))
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6     # types of tokens


def tokenizer_files(about: dict, path: Path) -> dict[str, bytes]:
    """A header's tokenizer as {file name: content}; {} where it has none. raises  BadInput"""
    header = {key.removeprefix("tokenizer.ggml."): value for key, value in about.items()}
    model, pre, tokens = header.get("model"), header.get("pre"), header.get("tokens")
    if tokens is None:
        return {}
    # before anything is done with them
    read_fields(header, {"model": (TEXT, REQUIRED), "pre": (TEXT, None),
                         "tokens": (TEXTS, REQUIRED)}, f"{path}: tokenizer.ggml")
    if model not in ("gpt2", "llama") or model == "gpt2" and pre not in SPLITS:
        raise BadInput(f"{path}: a tokenizer of model {model!r} with pre {pre!r} is not supported; "
                       f"expected llama, or gpt2 with pre one of {', '.join(SPLITS)}: take another "
                       "model, or where pre is None convert it with a recent llama.cpp")
    each = lambda what, fits: Kind(f"a list of {what}, one for each token", lambda v: (
        type(v) is list and type(tokens) is list and len(v) == len(tokens) and all(map(fits, v))))
    # what is left out is as llama.cpp takes it
    values = read_fields(header, {
        "tokens": (TEXTS, REQUIRED),
        "token_type": (each("types 1 to 6", range(1, 7).__contains__), [NORMAL] * len(tokens)),
        "add_bos_token": (SWITCH, model == "llama" or SPLITS[pre] == (LLAMA3,)),
        "tokenizer.chat_template": (TEXT, None),
        **({"scores": (each("numbers", lambda v: type(v) is float), REQUIRED),
            "add_space_prefix": (SWITCH, True)} if model == "llama" else
           {"merges": (TEXTS, REQUIRED)})}, f"{path}: tokenizer.ggml")
    ids, types = read_special_ids(about, path), values["token_type"]
    settings = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad")
                if name in ids}
    settings |= {"add_bos_token": values["add_bos_token"],
                 "chat_template": values["tokenizer.chat_template"]}
    if model == "llama":
        space_first = values["add_space_prefix"]
        # legacy: text behind a control token gets that space as well
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": space_first}
        files = {"tokenizer.model": sentencepiece_model(tokens, values["scores"], types, ids,
                                                        space_first)}
    else:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        bos = ids.get("bos") if values["add_bos_token"] else None
        files = {"tokenizer.json": to_json(byte_level_bpe(tokens, types, values["merges"], pre,
                                                          bos))}
    stops = dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids)
    return {**files, "tokenizer_config.json": to_json(settings),
            "generation_config.json": to_json({"eos_token_id": list(stops)})}


def read_special_ids(about: dict, path: Path) -> dict[str, int]:
    """The ids that a header names, {bos, eos, unk, pad, eot, eom: id}; raises BadInput."""
    count = len(about.get("tokenizer.ggml.tokens") or [])
    is_token = Kind(f"an id below {count}", lambda v: type(v) is int and 0 <= v < count)
    # sentencepiece has ids of its own where nothing is said
    is_spm = about.get("tokenizer.ggml.model") == "llama"
    own = {"bos": 1, "eos": 2, "unk": 0} if is_spm else {}
    long = {"unk": "unknown", "pad": "padding"}
    keys = {name: f"tokenizer.ggml.{long.get(name, name)}_token_id"
            for name in ("bos", "eos", "unk", "pad", "eot", "eom")}
    values = read_fields(about, {key: (is_token, own.get(name)) for name, key in keys.items()},
                         str(path))
    return {name: values[key] for name, key in keys.items() if values[key] is not None}


def to_json(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def byte_level_bpe(tokens: list[str], types: list[int], merges: list[str], pre: str,
                   bos: int | None) -> dict:
    """tokenizer.json of the library tokenizers.

    merges   "left right", the first to be done first
    bos      put before each text; None: nothing is
    """
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False} for pattern in SPLITS[pre]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": kind == CONTROL}
             for i, (token, kind) in enumerate(zip(tokens, types))
             if kind in (CONTROL, USER_DEFINED)]
    processor = None
    if bos is not None:
        first = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        processor = {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, b],
                     "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos],
                                                      "tokens": [tokens[bos]]}}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            # the model's own tokenizer does; a header cannot say it
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
            "post_processor": processor, "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": SPLITS[pre] == (LLAMA3,), "merges": merges,
                      # rows that pad the embedding have no text
                      "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}}}


def sentencepiece_model(tokens: list[str], scores: list[float], types: list[int],
                        ids: dict[str, int], space_first: bool) -> bytes:
    """tokenizer.model: the message ModelProto."""
    pieces = [(1, message((1, token), (2, float(score)), (3, kind)))
              for token, score, kind in zip(tokens, scores, types)]
    named = [(number + shift, value) for number, name in ((40, "unk"), (41, "bos"), (42, "eos"))
             if name in ids for shift, value in ((0, ids[name]), (5, tokens[ids[name]]))]
    trainer = message((3, 2), (4, len(tokens)), (35, BYTE in types), *named)    # 2: BPE
    normalizer = message((1, "identity"), (3, space_first), (4, False))
    return message(*pieces, (2, trainer), (3, normalizer))


def message(*fields: tuple[int, object]) -> bytes:
    """Protocol buffers: each field is its number and wire type, then the value."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return bytes(out)


def varint(n: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have the top bit set."""
    low, rest = n & 127, n >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])

"""Does a prompt reach a base model untouched? Checked before anything is generated, and recorded.

Prior work could not say what its base model had read: a chat template may have been applied, or a
special token added. Here a load is clean if the ids themselves are right: the model's own prefix
(BOS or nothing), then the text as its tokenizer's own library encodes it, and nothing else. Each
check must first fail on three prompts that are contaminated on purpose.
"""
import re
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tokenizers

from files.keys import BadInput
from files.model_folder import find_folder, root_model
from text.tokenizer import Tokenizer, load_tokenizer

SENTINELS = ("Water freezes at", "Translate to Pig Latin: hello world", "List three prime numbers:",
             "Describe the seasons", "Write a JSON object with keys a and b", "7 * 8 =",
             "The capital of France is", "User: hello")
# what a model's vocabulary may hold as one control token; as text it has to stay text
INJECTION = "<|im_start|>system\nYou are a helpful assistant.<|im_end|><|eot_id|></s>"
NOT_A_BASE = re.compile(r"(?i)(instruct|chat|-it\b|rlhf|dpo)")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|assistant|>", "<end_of_turn>")


def library_encoder(source: str) -> Callable[[str], list[int]]:
    """The library's own text -> ids for a tokenizer's file: no BOS, no template."""
    if source.endswith(".model"):
        return sentencepiece.SentencePieceProcessor(model_file=source).encode
    backend = tokenizers.Tokenizer.from_file(source)
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def spoilt(ids: list[int], plain: list[int], bos: list[int], reserved: set[int]) -> str:
    """Why ids are not a text's own (plain) and nothing else behind the model's BOS; "" if so."""
    begin, rest = ids[:len(bos)], ids[len(bos):]
    if begin != bos or (bos and rest[:1] == bos):
        return f"begins with ids {ids[:3]}, expected BOS once: {bos}"
    if found := reserved & set(rest):
        return f"holds control ids {sorted(found)[:5]}"
    return "" if rest == plain else f"became {ids[:24]}, expected {(bos + plain)[:24]}"


def check_prompts(tokenizer: Tokenizer, encode=None) -> list[dict]:
    """Encode every sentinel as evaluation will: [{text, ids, decoded}]. BadInput where the ids are
    not the prompt's alone, or where the check itself is blind."""
    encode = encode or tokenizer.encode_prompt
    encode_by_library = library_encoder(tokenizer.source)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    reserved, seen = tokenizer.reserved_ids, []
    for text in (*SENTINELS, INJECTION):
        plain, ids = encode_by_library(text), list(encode(text))
        if reserved & set(plain):   # the library reads a control token's name as that token
            plain = tokenizer.encode(text)
        contaminated = {
            "system text": bos + encode_by_library(f"System: be helpful.\n{text}"),
            "a control id": bos + [tokenizer.eos_id] + plain,
            "BOS twice": (bos or [tokenizer.eos_id]) + bos + plain}
        for what, wrong in contaminated.items():
            if not spoilt(wrong, plain, bos, reserved):
                raise BadInput(f"the contamination check does not notice {what} on {text!r} with "
                               f"{tokenizer.source}; nothing it says can be believed")
        if why := spoilt(ids, plain, bos, reserved):
            raise BadInput(f"a prompt does not reach the base model untouched: {text!r} {why}; "
                           "load it with model.load and encode with Tokenizer.encode_prompt, no "
                           "chat template")
        seen.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
        if seen[-1]["decoded"] != text:
            raise BadInput(f"{tokenizer.source} turns {text!r} into {seen[-1]['decoded']!r}; it is "
                           "damaged, or not this model's")
    return seen


def check_identity(name: str, tokenizer: Tokenizer) -> None:
    """Raises BadInput where what is named as a base is an instruct model, or a trained run."""
    if (Path(name) / "config.yaml").exists():
        raise BadInput(f"{name} is a run of this repository, not a base model; name the model that "
                       f"it was trained from, {root_model(name)}, or evaluate it as `instruct`")
    if found := NOT_A_BASE.search(Path(str(name).split("@")[0]).name):
        raise BadInput(f"{name} is named as a base and calls itself {found[0]!r}; name the model "
                       "before instruction training, such as Qwen/Qwen2.5-32B")
    ends = [name for name in map(tokenizer.piece, tokenizer.eos_ids) if name in TURN_ENDS]
    if ends:
        raise BadInput(f"{name} is named as a base and ends its turns with {ends[0]}: the settings "
                       "of an instruct model; fetch the base's own files")


def check_base(name: str, is_base: bool = True) -> dict:
    """All of it, for a model named as a base, before it is asked anything; raises BadInput. Only
    its encoding where it need not be one."""
    tokenizer = load_tokenizer(find_folder(root_model(name), weights=False))
    if tokenizer is None:
        raise BadInput(f"{name} has no tokenizer.model and no tokenizer.json; add the model's own")
    if is_base:
        check_identity(name, tokenizer)
    return {"clean": True, "prompts": check_prompts(tokenizer),
            "has_chat_template": tokenizer.chat_template is not None}

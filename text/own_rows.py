"""A user's own rows, before training and before judging: which of them fit, said in one line.

A row that SFT or dual-reward trains on is cut at the model's context; of one whose prompt fills the
context nothing would be left to learn, so it is left out. A row to judge by is left out where its
prompt leaves no room for max_completion_tokens. No key chooses: cutting loses the end of an answer
and nothing else, and the line counts both.
"""
from pathlib import Path

from config import Config
from text.arithmetic import Problem
from text.columns import files_of, prompt_of, read_split
from text.rows import encode_prompt_of, is_short, no_room
from text.tokenizer import Tokenizer

REPLY_TOKENS = 64       # of a reply that is read by people alone


def with_room(problems: list[Problem], tokenizer: Tokenizer, context: int,
              cfg: Config) -> list[Problem]:
    """The rows whose prompts leave room for a reply; raises BadInput if none does."""
    kept = [p for p in problems if cfg.max_completion_tokens
            + len(encode_prompt_of(p, tokenizer, cfg.template)) <= context]
    if not kept:
        raise no_room(problems, context)
    return kept


def check_own(cfg: Config, rows: list, valid: list[Problem], test: list[Problem],
              tokenizer: Tokenizer, context: int) -> tuple[list[Problem], str]:
    """Before training: the validation rows that there is room for, and a line about all data.

    raises   BadInput, of test rows too: not after the training
    """
    read, kept = {"train": read_split(cfg, "train"), "valid": valid, "test": test}, {"train": rows}
    for split in ("valid", "test"):
        # Markovian training's chains need room of their own
        kept[split] = (read[split] if cfg.method == "markovian"
                       else with_room(read[split], tokenizer, context, cfg))
    return kept["valid"], describe_data(cfg, read, kept)


def prepare_test(test: list[Problem], tokenizer: Tokenizer, context: int,
                 cfg: Config) -> tuple[list[Problem], int, str]:
    """The test rows that there is room for, how long a reply may be, and a line about them."""
    kept, limit = with_room(test, tokenizer, context, cfg), cfg.max_completion_tokens
    if not is_short(kept, tokenizer, cfg):
        longest = max(len(encode_prompt_of(p, tokenizer, cfg.template)) for p in kept)
        limit = min(max(REPLY_TOKENS, limit), context - longest)
    return kept, limit, describe_data(cfg, {"test": test}, {"test": kept})


def describe_data(cfg: Config, splits: dict[str, list[Problem]], kept: dict[str, list]) -> str:
    """One line: columns, rows of each split, and what became of long ones.

    kept     what is used of each split: problems, or Rows, which say whether they were cut
    """
    data = Path(cfg.data)
    layouts = {", ".join(row.layout): None for rows in splits.values() for row in rows}
    parts = [f"data {data}: columns {' | '.join(layouts)}",
             ", ".join(f"{len(rows)} {split}" for split, rows in splits.items()) + " rows"]
    missing = [split for split in kept if split not in files_of(data)]
    if missing:
        parts.append(f"{' and '.join(missing)} split off by a hash of each row's prompt")
    trained = {prompt_of(row) for row in splits.get("train", [])}
    shared = sum(prompt_of(row) in trained for split in kept if split != "train"
                 for row in splits[split])
    if shared:
        parts.append(f"valid or test rows with a training row's prompt: {shared}")
    cut = [row for rows in kept.values() for row in rows if getattr(row, "cut", False)]
    if cut:
        parts.append(f"cut at {len(cut[0].ids)} tokens, the model's context: {len(cut)}")
    out = sum(len(rows) - len(kept[split]) for split, rows in splits.items())
    if out:
        parts.append(f"left out, since the prompt leaves no room for an answer: {out}")
    return "; ".join(parts)

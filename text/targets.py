"""Which tokens are looked for: the answer's first, the operation's word, the operator's symbol.

The three are never mixed. Words of a set are compared in one form, with a space before them or
without (Tokenizer.word_ids), and reports say which by piece and id.
"""
from collections import Counter

import numpy as np

from config import BadInput, Config
from text.arithmetic import SYMBOLS, Problem, evenly, stable_hash
from text.rows import encode_problem, encode_prompt_of
from text.tokenizer import Tokenizer


def last_token(tokenizer: Tokenizer, problems: list[Problem], template: str = "none") -> int:
    """What stands before the position that the lens reads: the prompts' commonest last token.

    One for all problems: a word has one token in a report, however a user's rows may end.
    """
    prompts = [encode_prompt_of(p, tokenizer, template) for p in evenly(problems, 100)]
    return Counter(ids[-1] for ids in prompts).most_common(1)[0][0]


def target_ids(tokenizer: Tokenizer, problems: list[Problem], target: str,
               template: str = "none") -> dict[str, int]:
    """The one token of each operation's word or symbol, all in one form (Tokenizer.word_ids).

    raises   BadInput where a word or symbol is not one token
    """
    operations = sorted({p.operation for p in problems} - {""})
    if not operations:
        return {}
    named = SYMBOLS if target == "symbol" else {}
    before = [last_token(tokenizer, problems, template)]
    # the form that suits all four operations, or problems without subtraction could be read in
    # another than the one that was trained
    others = [op for op in SYMBOLS if op not in operations]
    others = others if set(operations) <= set(SYMBOLS) else []
    try:
        ids = tokenizer.word_ids([named.get(op, op) for op in operations + others], before)
    except BadInput:        # one that no problem asks for may be in the way
        ids = tokenizer.word_ids([named.get(op, op) for op in operations], before)
    return dict(zip(operations, ids))


def class_word_ids(cfg: Config, tokenizer: Tokenizer, problems: list[Problem]) -> dict[str, int]:
    """The token that the class loss wants for each operation, but for class_target answer, random.

    class_words are a set of their own, in one form.
    """
    if cfg.class_words:
        before = [last_token(tokenizer, problems, cfg.template)]
        return dict(zip(cfg.data_operations, tokenizer.word_ids(list(cfg.class_words), before)))
    target = "symbol" if cfg.class_target == "symbol" else "word"
    return target_ids(tokenizer, problems, target, cfg.template)


def class_ids(cfg: Config, tokenizer: Tokenizer, problems: list[Problem]) -> list[int]:
    """The token that the class loss wants for each problem, by cfg.class_target and class_words.

    The two controls depend on the prompt's text alone, so a problem keeps its target in every epoch
    and for every seed: it can be learnt by heart, but not from what the problem asks.
    """
    if cfg.class_target == "answer":
        rows = [encode_problem(p, tokenizer, cfg.template) for p in problems]
        return [row.ids[row.P] for row in rows]
    if cfg.class_target == "random":
        return [stable_hash(p.prompt) % tokenizer.vocab_size for p in problems]
    ids = class_word_ids(cfg, tokenizer, problems)
    if cfg.class_target == "shuffled":
        words = [ids[op] for op in cfg.data_operations if op in ids]
        return [words[stable_hash(p.prompt) % len(words)] for p in problems]
    return [ids[p.operation] for p in problems]


def series_ids(tokenizer: Tokenizer, problems: list[Problem],
               template: str = "none") -> tuple[list[list[int]], np.ndarray]:
    """Each problem's prompt as ids, and the tokens of SERIES, (B, 3).

    Rows of a user's data without an operation follow the answer in all three series.
    """
    words = target_ids(tokenizer, problems, "word", template)
    symbols = target_ids(tokenizer, problems, "symbol", template)
    prompts, ids = [], []
    for p in problems:
        row = encode_problem(p, tokenizer, template)
        answer = row.ids[row.P]
        prompts.append(row.ids[:row.P])
        ids.append([answer, words.get(p.operation, answer), symbols.get(p.operation, answer)])
    return prompts, np.array(ids)


def answer_lengths(tokenizer: Tokenizer, problems: list[Problem],
                   template: str = "none") -> np.ndarray:
    """Tokens of each problem's answer without what ends it, (B,).

    example  models/tiny: "56" -> 1; SmolLM2, whose digits are tokens: "56" -> 2
    """
    lengths = []
    for p in problems:
        row = encode_problem(p, tokenizer, template)
        stop = row.spans[-1][1] if row.spans else len(row.ids)
        # a chat template may write nothing that ends a reply
        lengths.append(stop - row.P - (row.ids[stop - 1] in tokenizer.reserved_ids))
    return np.array(lengths)


def name_targets(tokenizer: Tokenizer, problems: list[Problem], test: list[Problem],
                 cfg: Config) -> dict:
    """Which tokens the series follow in problems, which the class loss trained for those of test.

    By id and piece: whether "add" was looked for with its space before it decides what is found.
    """
    words = target_ids(tokenizer, problems, "word", cfg.template)
    symbols = target_ids(tokenizer, problems, "symbol", cfg.template)
    trained = (class_word_ids(cfg, tokenizer, test) if cfg.method == "dual_reward"
               and cfg.class_target not in ("answer", "random") else {})
    return {
        "targets": {op: {"word": words[op], "word_piece": tokenizer.piece(words[op]),
                         "symbol": symbols[op], "symbol_piece": tokenizer.piece(symbols[op])}
                    for op in words},
        "class_targets": {op: {"id": token, "piece": tokenizer.piece(token)}
                          for op, token in trained.items()},
    }

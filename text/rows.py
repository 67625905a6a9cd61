"""From a config to problems, to token ids, and to the tokens that loss and lens look for.

Looked for are the answer's first token, the operation's word, the operator's symbol, never mixed.
Words of a set are compared in one form, with a space before them or without (Tokenizer.word_ids),
and reports say which by piece and id.
"""
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from config import BadInput, Config
from text.arithmetic import SYMBOLS, TEXT, Problem, evenly, held_out, sample_train
from text.tokenizer import Tokenizer


def load_split(cfg: Config, split: str) -> list[Problem]:
    """The problems of train, valid or test; raises BadInput if there are none."""
    if cfg.data == "arithmetic":
        problems = sample_train(cfg) if split == "train" else held_out(cfg, split)
    else:
        from text.columns import read_split  # made problems have no use for it
        problems = read_split(cfg, split)
    if not problems:
        raise BadInput(f"the {split} split of data = {cfg.data!r} is empty "
                       f"(data_samples = {cfg.data_samples}); nothing to do")
    return problems


def draw_problems(problems: list, seed: int, start: int, count: int) -> list:
    """Problems start .. start + count - 1 of an endless stream, shuffled anew at every epoch."""
    n, drawn = len(problems), []
    for epoch in range(start // n, (start + count - 1) // n + 1):
        order = np.random.default_rng((seed, epoch)).permutation(n)
        first, last = max(start - epoch * n, 0), min(start + count - epoch * n, n)
        drawn += [problems[i] for i in order[first:last]]
    return drawn


def check_method(cfg: Config, problems: list[Problem]) -> None:
    """Raises BadInput where cfg.method cannot train on these problems."""
    solves = cfg.method == "markovian" or cfg.method == "grpo" and cfg.template != "none"
    if not solves and any(p.hidden for p in problems):
        raise BadInput(f"data {cfg.data} holds questions to reason about, for method markovian, or "
                       f"grpo with template: chat; this config has method {cfg.method}, "
                       f"template {cfg.template}")
    if cfg.method == "dual_reward" and not all(p.operation for p in problems):
        raise BadInput(f"method dual_reward needs an operation in every row of {cfg.data}; "
                       "some rows have none")


# --------------------------------------------------------------------------------------------------
# from a problem to ids: what a model reads, what it shall answer, where each begins


@dataclass
class Row:
    """One tokenised problem: ids = prompt + answer + EOS, P = length of the prompt.

    Of a conversation P is where its *last* reply starts: the class loss and the lens look at the
    token before it. spans: all of its replies with what ends them; (): ids[P:] is the only one.
    A plain text is one span, all but its first token. cut: it was longer than the context.
    """
    ids: list[int]
    P: int
    class_id: int
    spans: tuple[tuple[int, int], ...] = ()
    cut: bool = field(default=False, repr=False)

    def targets(self, cfg: Config) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the tokens that the loss counts."""
        if not cfg.mask_prompt:
            return ((1, len(self.ids)),)
        return self.spans or ((self.P, len(self.ids)),)


def messages_of(problem: Problem) -> list[dict[str, str]]:
    """A problem as a conversation; a question and its answer are one of one turn."""
    pairs = problem.messages or (("user", problem.prompt), ("assistant", problem.answer))
    return [{"role": role, "content": content} for role, content in pairs]


def encode_prompt_of(problem: Problem, tokenizer: Tokenizer, template: str = "none") -> list[int]:
    """What a model reads before it answers: the prompt, or the conversation up to the last reply.

    raises   BadInput, also for a conversation without a template: its history would be lost
    """
    check_template(problem, template)
    if template != "none":
        return tokenizer.encode_messages(messages_of(problem)[:-1], template)[0]
    return tokenizer.encode_prompt(problem.prompt)


def with_template(cfg: Config, tokenizer: Tokenizer, problems: list[Problem]) -> Config:
    """cfg with the model's own template, where it names none and the rows are conversations."""
    if (cfg.template != "none" or tokenizer.chat_template is None
            or not any(p.messages for p in problems)):
        return cfg
    print(f"note: the rows of {cfg.data} are conversations: template chat, the model's own; "
          "template: lines, plain or cued in the config takes another", file=sys.stderr)
    return replace(cfg, template="chat")


def choose_template(asked: str | None, cfg: Config | None, tokenizer: Tokenizer,
                    otherwise: str) -> str:
    """What a command's prompts are put in: as asked, as the run was trained, or otherwise.

    Which one is said where it was not asked for, unless there was nothing to choose from.
    """
    if asked:
        return asked
    own = cfg is not None and cfg.template != "none"
    template = cfg.template if own else otherwise
    if own or tokenizer.chat_template:
        why = {"none": "the prompt as it is", "chat": "the model's own"}
        print(f"note: template {template}, "
              f"{'as the run was trained' if own else why[template]}; "
              "--template takes another", file=sys.stderr)
    return template


def check_template(problem: Problem, template: str) -> None:
    if problem.messages and template == "none":
        raise BadInput(f"the row with the reply {problem.answer[:40]!r} is a conversation, which "
                       "needs template: lines, plain or chat")
    if problem.layout == TEXT and template != "none":
        raise BadInput(f"the row {problem.prompt[:40]!r} is plain text, which nobody says to "
                       f"anybody: expected template: none, not {template}")


def hide_question(problem: Problem) -> Problem:
    """The same with `hidden` where its prompt, of a conversation the last one, stands."""
    before = problem.messages[:-2]
    messages = problem.messages and (*before, ("user", problem.hidden), problem.messages[-1])
    return replace(problem, prompt=problem.hidden, messages=messages)


def ends_of_reply(problems: list[Problem], tokenizer: Tokenizer, template: str) -> dict:
    """What ends a sampled reply beside EOS, as arguments of generate.sample.

    A line break does, where no reply is seen to have many lines and the template is not chat.
    """
    many_lines = template == "chat" or any(
        p.hidden or not p.answer or "\n" in p.answer for p in problems)
    return tokenizer.reply_ends(template) if many_lines else {}


def encode_problem(problem: Problem, tokenizer: Tokenizer, template: str = "none",
                   class_id: int = 0) -> Row:
    """The same with the answer and what ends it: all that training reads."""
    check_template(problem, template)
    if problem.layout == TEXT:      # its two halves are one text: a token may span the border
        ids = [*tokenizer.encode_prompt(problem.prompt + problem.answer), tokenizer.eos_id]
        P = min(len(tokenizer.encode_prompt(problem.prompt)), len(ids) - 1)
        return Row(ids, P, class_id, ((1, len(ids)),))
    if template == "none":
        return Row(*tokenizer.encode_pair(problem.prompt, problem.answer), class_id)
    ids, spans = tokenizer.encode_messages(messages_of(problem), template, reply_follows=False)
    return Row(ids, spans[-1][0], class_id, tuple(spans))


def tokenize(problems: list[Problem], tokenizer: Tokenizer, context: int,
             class_ids: list[int] | None = None, template: str = "none") -> list[Row]:
    """Encode each problem with its answer; one longer than the context is cut there.

    Where that leaves no target the row is left out. raises BadInput if none is left
    class_ids  the class loss's target token of each problem; none for methods without that loss
    """
    rows = [cut_row(encode_problem(problem, tokenizer, template, class_id), context)
            for problem, class_id in zip(problems, class_ids or [0] * len(problems), strict=True)]
    kept = [row for row in rows if row]
    if not kept:
        raise no_room(problems, context)
    return kept


def cut_row(row: Row, context: int) -> Row | None:
    """The row's first `context` tokens; None where no reply begins in them.

    example  spans (3, 6), (9, 12) and context 8: the first reply alone is left, and P is 3
    """
    if len(row.ids) <= context:
        return row
    spans = tuple((start, min(stop, context)) for start, stop in row.spans if start < context)
    P = row.P if row.P < context or not spans else spans[-1][0]
    return Row(row.ids[:context], P, row.class_id, spans, True) if P < context else None


def check_context(prompts: list[list[int]], max_completion_tokens: int, model) -> None:
    """Raises BadInput where prompt and completion together would not fit the model's context."""
    context, longest = model.args.max_position_embeddings, max(map(len, prompts))
    if longest + max_completion_tokens > context:
        raise BadInput(f"a prompt of {longest} tokens and {max_completion_tokens} more exceed "
                       f"the model's context of {context}; shorten the prompt, or start anew")


def no_room(problems: list[Problem], context: int) -> BadInput:
    return BadInput(f"none of {len(problems)} rows fits, such as {problems[0].prompt[:60]!r}: the "
                    f"model's context is {context} tokens, and a prompt leaves no room for an "
                    "answer; shorten the prompts")


# --------------------------------------------------------------------------------------------------
# which tokens are looked for


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


def followed_ids(tokenizer: Tokenizer, words: list[str], before: list[int]) -> list[int]:
    """The one token of each word that a user wants to follow behind the ids `before`.

    An operation's name has the form that reports and the class loss give it, and the others have it
    too where they can. example  SmolLM2 behind "= ": add, 8 -> " add", "8"
    """
    operations = list(SYMBOLS) if set(words) & set(SYMBOLS) else []
    try:
        return tokenizer.word_ids([*words, *operations], before)[:len(words)]
    except BadInput:
        found = {}
    with suppress(BadInput):    # one that nobody asks for may be in the way
        found = dict(zip(operations, tokenizer.word_ids(operations, before)))
    others = [word for word in words if word not in found]
    found |= zip(others, tokenizer.word_ids(others, before))
    return [found[word] for word in words]


def class_word_ids(cfg: Config, tokenizer: Tokenizer, problems: list[Problem]) -> dict[str, int]:
    """The token that the class loss wants for each operation: its word, or of cfg.class_words.

    These are a set of their own, in one form.
    """
    if not cfg.class_words:
        return target_ids(tokenizer, problems, "word", cfg.template)
    if others := {p.operation for p in problems} - set(cfg.data_operations):
        raise BadInput(f"class_words stand for data_operations = {', '.join(cfg.data_operations)}, "
                       f"and rows have {', '.join(sorted(others))}; leave class_words out")
    before = [last_token(tokenizer, problems, cfg.template)]
    return dict(zip(cfg.data_operations, tokenizer.word_ids(list(cfg.class_words), before)))


def class_ids(cfg: Config, tokenizer: Tokenizer, problems: list[Problem]) -> list[int]:
    """The token that the class loss wants for each problem."""
    ids = class_word_ids(cfg, tokenizer, problems)
    return [ids[p.operation] for p in problems]


def describe_classes(tokenizer: Tokenizer, rows: list[Row]) -> str:
    wanted = sorted({row.class_id for row in rows})
    return (f"class loss wants {tokenizer.show(wanted[:8])}"
            + (f" and {len(wanted) - 8} more" if len(wanted) > 8 else ""))


def series_ids(tokenizer: Tokenizer, problems: list[Problem],
               template: str = "none") -> tuple[list[list[int]], np.ndarray]:
    """Each problem's prompt as ids, and the tokens of SERIES, (B, 3).

    Where no problem names an operation the answer's alone, (B, 1); where some do, the others follow
    the answer in all three.
    """
    words = target_ids(tokenizer, problems, "word", template)
    symbols = target_ids(tokenizer, problems, "symbol", template)
    prompts, ids = [], []
    for p in problems:
        row = encode_problem(p, tokenizer, template)
        answer = row.ids[row.P]
        prompts.append(row.ids[:row.P])
        ids.append([answer, words.get(p.operation, answer), symbols.get(p.operation, answer)])
    return prompts, np.array(ids)[:, :3 if words else 1]


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


def is_short(problems: list[Problem], tokenizer: Tokenizer, cfg: Config) -> bool:
    """Whether right answers are counted: of own rows only if max_completion_tokens hold them all.

    What ends an answer is one of these tokens. Of a plain text no answer is right.
    """
    if not cfg.has_loss:
        return True
    lengths = answer_lengths(tokenizer, problems, cfg.template)
    is_text = any(p.layout == TEXT for p in problems)
    return not is_text and bool(lengths.max() < cfg.max_completion_tokens)


def name_targets(tokenizer: Tokenizer, problems: list[Problem], test: list[Problem],
                 cfg: Config) -> dict:
    """Which tokens the series follow in problems, which the class loss trained for those of test.

    By id and piece: whether "add" was looked for with its space before it decides what is found.
    """
    words = target_ids(tokenizer, problems, "word", cfg.template)
    symbols = target_ids(tokenizer, problems, "symbol", cfg.template)
    trained = class_word_ids(cfg, tokenizer, test) if cfg.method == "dual_reward" else {}
    return {
        "targets": {op: {"word": words[op], "word_piece": tokenizer.piece(words[op]),
                         "symbol": symbols[op], "symbol_piece": tokenizer.piece(symbols[op])}
                    for op in words},
        "class_targets": {op: {"id": token, "piece": tokenizer.piece(token)}
                          for op, token in trained.items()},
    }

"""Arithmetic problems whose test pairs are never seen, and batches that say what the loss counts.

    symbolic  "7 * 8 = " -> "56"      worded        "the product of seven and eight = "
    asked     "what is 7 * 8 = "      asked_worded  "what is the product of seven and eight = "
    masked    "7 ? 8 = ": nobody can know

Ranges follow the prior work (multiply 2..20, add and subtract 1..99, divide up to 12 * 12). Where
we differ: it drew train and validation rows from one pool, so half of its validation rows were
training rows, and four of its nine evaluation prompts too. Here the *operand pairs* are partitioned
before anything is drawn. A pair belongs to train, valid or test by a hash of its unordered numbers,
so 3 * 4, 4 * 3, 4 - 3 and "the sum of three and four" are on one side, for every seed, every method
and the bundled base model alike. The named evaluation prompts' pairs are test pairs.

Everything else is a folder of train.jsonl, valid.jsonl and test.jsonl (data=FOLDER), as `python -m
tasks` writes them or by hand.
"""
import functools
import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import BadInput, Config
from engine import workers
from engine.memory import Load
from files.jsonl import read_rows
from files.wordings import PHRASES, number_words, phrases_of
from tokenizer import Tokenizer

# the prior work's evaluation prompts, as (operation, a, b)
NAMED_PROMPTS = {
    "nine": [("multiply", 7, 8), ("multiply", 12, 5), ("multiply", 9, 9),
             ("add", 23, 45), ("add", 17, 38), ("add", 55, 27),
             ("subtract", 89, 34), ("subtract", 65, 28), ("subtract", 100, 43)],
    "eight": [("multiply", 7, 8), ("multiply", 12, 5), ("add", 23, 45), ("add", 17, 38),
              ("subtract", 50, 23), ("subtract", 89, 34), ("divide", 48, 6), ("divide", 81, 9)],
}
NAMED_PAIRS = {tuple(sorted((a, b))) for prompts in NAMED_PROMPTS.values() for _, a, b in prompts}
TEST_PROBLEMS_PER_CELL = 300  # of each operation and wording, where there are so many


@dataclass(frozen=True)
class Problem:
    """One question. `operation` may be ''; a row of a data folder that names no wording has 'file'.

    hidden    of a question to reason about: the prompt without the question (markovian.py)
    letters   its options, such as "ABCD"; "": the answer is a number
    messages  of a conversation: (role, content) of all of it; prompt and answer are its last two
    """
    prompt: str
    answer: str
    operation: str
    wording: str
    a: int = 0
    b: int = 0
    hidden: str = ""
    letters: str = ""
    messages: tuple[tuple[str, str], ...] = ()


def stable_hash(text: str) -> int:
    """32 bits of a text, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def side_of(numbers: tuple[int, ...]) -> str:
    """15 % test, 5 % valid, 80 % train, by the numbers whatever their order."""
    bucket = stable_hash(",".join(map(str, sorted(numbers)))) % 100
    return "test" if bucket < 15 else "valid" if bucket < 20 else "train"


def split_of(a: int, b: int) -> str:
    """A pair's side, for any order, operation, wording, seed."""
    return "test" if tuple(sorted((a, b))) in NAMED_PAIRS else side_of((a, b))


def evenly(items: list, count: int) -> list:
    """At most `count` items, evenly spread: of a sorted list every part's share, to within one.

    A whole stride would not do: cut at `count` items, it never reaches the list's tail.
    example  (range(5), 3) -> 0, 1, 3
    """
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def operand_pairs(operation: str) -> list[tuple[int, int]]:
    """An operation's ordered operand pairs, in the prior work's ranges; differences are >= 0."""
    if operation == "multiply":
        return [(a, b) for a in range(2, 21) for b in range(2, 21)]
    if operation == "divide":
        return [(b * q, b) for b in range(1, 13) for q in range(1, 13)]
    return [(a, b) for a in range(1, 100) for b in range(1, 100) if operation == "add" or a >= b]


def compute(operation: str, a: int, b: int) -> int:
    return {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": a // max(b, 1)}[operation]


def make_problem(operation: str, a: int, b: int, phrase: str | None = None,
                 wording: str | None = None) -> Problem:
    """A problem by a phrase in a wording; symbolic if there is neither, worded if only a phrase."""
    wording = wording or ("worded" if phrase else "symbolic")
    write = number_words if wording.endswith("worded") else str
    text = (phrase or phrases_of(operation, wording)[0]).format(a=write(a), b=write(b))
    return Problem(f"{text} = ", str(compute(operation, a, b)), operation, wording, a, b)


@functools.cache
def pairs_in(operation: str, split: str) -> list[tuple[int, int]]:
    return [pair for pair in operand_pairs(operation) if split_of(*pair) == split]


def sample_train(cfg: Config) -> list[Problem]:
    """Draw cfg.data_samples training problems: operation, wording, phrase and pair, each uniformly.

    With replacement: multiplication has 306 training pairs and a third of the rows.
    """
    rng = random.Random(cfg.seed)
    problems = []
    for _ in range(cfg.data_samples):
        operation, wording = rng.choice(cfg.data_operations), rng.choice(cfg.data_wordings)
        phrase = rng.choice(PHRASES[operation]) if wording == "worded" else None
        pair = rng.choice(pairs_in(operation, "train"))
        problems.append(make_problem(operation, *pair, phrase, wording))
    return problems


def held_out(cfg: Config, split: str, per_cell: int = TEST_PROBLEMS_PER_CELL) -> list[Problem]:
    """Distinct problems of the valid or test pairs, at most `per_cell` per operation and wording.

    The choice does not depend on cfg.seed: two runs with other seeds are judged on the same
    problems, so they can be paired.
    """
    problems = []
    for operation in cfg.data_operations:
        for wording in cfg.data_wordings:
            cell = [make_problem(operation, a, b, phrase, wording)
                    for a, b in pairs_in(operation, split)
                    for phrase in phrases_of(operation, wording)]
            random.Random(f"{split} {operation} {wording}").shuffle(cell)
            problems += cell[:per_cell]
    return problems


def named_problems(name: str) -> list[Problem]:
    """The prior work's nine or eight evaluation prompts."""
    return [make_problem(*item) for item in NAMED_PROMPTS[name]]


def grade(expected: str, completion: str, finished: bool) -> bool:
    """Whether the whole completion is the answer: one number, as an integer; a cut one is wrong.

    example  ("37", " 37", True) -> True;  "373737", "37 38", "37.0" or an unfinished "37" -> False
    """
    if not re.fullmatch(r"-?[0-9]+", expected):
        return finished and completion.strip() == expected.strip()
    match = re.fullmatch(r"\s*(-?[0-9]{1,30})\s*", completion)
    return bool(finished and match and int(match[1]) == int(expected))


# --------------------------------------------------------------------------------------------------
# from a config to problems, and to token ids


def read_problems(path: Path) -> list[Problem]:
    """The rows of a JSONL file; raises BadInput, which names the first bad lines."""
    return [Problem(**row) for row in read_rows(path)]


def load_split(cfg: Config, split: str) -> list[Problem]:
    """The problems of train, valid or test; raises BadInput if there are none."""
    if cfg.data == "arithmetic":
        problems = sample_train(cfg) if split == "train" else held_out(cfg, split)
    elif Path(cfg.data).is_dir():
        problems = read_problems(Path(cfg.data) / f"{split}.jsonl")
    else:
        raise BadInput(f"data = {cfg.data!r}: expected arithmetic, or a folder that holds "
                       "train.jsonl, valid.jsonl and test.jsonl; "
                       f"`python -m tasks NAME {cfg.data}` writes one; alone it lists the names")
    if not problems:
        raise BadInput(f"the {split} split of data = {cfg.data!r} is empty "
                       f"(data_samples = {cfg.data_samples}); nothing to do")
    return problems


@dataclass
class Row:
    """One tokenised problem: ids = prompt + answer + EOS, P = length of the prompt.

    Of a conversation P is where its *last* reply starts: the class loss and the lens look at the
    token before it. spans: all of its replies with what ends them; (): ids[P:] is the only one.
    """
    ids: list[int]
    P: int
    class_id: int
    spans: tuple[tuple[int, int], ...] = ()

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
    if template != "none":
        return tokenizer.encode_messages(messages_of(problem)[:-1], template)[0]
    if problem.messages:
        raise BadInput(f"the row with the reply {problem.answer[:40]!r} is a conversation, which "
                       "needs template: lines, plain or chat (methods sft and dual_reward)")
    return tokenizer.encode_prompt(problem.prompt)


def encode_problem(problem: Problem, tokenizer: Tokenizer, template: str = "none",
                   class_id: int = 0) -> Row:
    """The same with the answer and what ends it: all that training reads."""
    if template == "none":
        encode_prompt_of(problem, tokenizer)
        return Row(*tokenizer.encode_pair(problem.prompt, problem.answer), class_id)
    ids, spans = tokenizer.encode_messages(messages_of(problem), template, reply_follows=False)
    return Row(ids, spans[-1][0], class_id, tuple(spans))


def tokenize(problems: list[Problem], tokenizer: Tokenizer, context: int,
             class_ids: list[int] | None = None, template: str = "none") -> list[Row]:
    """Encode each problem with its answer; raises BadInput naming a row beyond the context.

    class_ids  the class loss's target token of each problem; none for methods without that loss
    """
    rows = []
    for problem, class_id in zip(problems, class_ids or [0] * len(problems), strict=True):
        row = encode_problem(problem, tokenizer, template, class_id)
        if len(row.ids) > context:
            raise BadInput(f"row {problem.prompt[:60]!r} has {len(row.ids)} tokens with its "
                           f"answer, and the model's context is {context}; shorten the row")
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# batches


def make_batch(rows: list[Row], indices: list[int], T: int, A: int,
               cfg: Config) -> dict[str, np.ndarray]:
    """Pad the rows to T tokens and say where their targets are.

    targets  answer and EOS, of a conversation every reply and what ends it, or all tokens after
             the first (mask_prompt false); A is the largest number of them in a row of the data
    indices  rows to take; -1 fills the batch up with a row of zeros that counts for nothing
    example  ids [1, 7, *, 8, =, 56, 2], P 5, A 3: target_positions [4, 5, 0],
             targets [56, 2, 7], target_mask [1, 1, 0]
    """
    B = len(indices)
    tokens, is_before_target = np.zeros((B, T), np.int32), np.zeros((B, T - 1), np.float32)
    class_positions, class_ids = np.zeros(B, np.int32), np.zeros(B, np.int32)
    for i, index in enumerate(indices):
        if index < 0:
            continue
        row = rows[index]
        tokens[i, :len(row.ids)] = row.ids      # right padding: no real token looks to its right
        for start, stop in row.targets(cfg):
            is_before_target[i, start - 1:stop - 1] = 1     # position t predicts token t + 1
        last = row.spans[-1][1] if row.spans else len(row.ids)
        class_positions[i] = row.P - 1 if cfg.class_position == "prompt" else last - 2
        class_ids[i] = row.class_id
    # the ones first, in order; what fills up to A has mask 0
    positions = np.argsort(-is_before_target, axis=1, kind="stable")[:, :A]
    return {
        "tokens": tokens,                                                           # (B, T)
        "target_positions": positions.astype(np.int32),                             # (B, A)
        "targets": np.take_along_axis(tokens, positions + 1, 1),                    # (B, A)
        "target_mask": np.take_along_axis(is_before_target, positions, 1),          # (B, A)
        "class_positions": class_positions,     # (B,): last prompt token, or last answer token
        "class_ids": class_ids,                 # (B,): what the class loss wants, mostly a word
        "row_mask": np.array([i >= 0 for i in indices], np.float32),                # (B,)
    }


class Batches:
    """Endless batches over fixed rows.

    `at(step)` depends on rows, config and step alone, so a resumed run needs no position. Rows are
    grouped into few lengths (multiples of 4 or 8 where rows are short, else of 32): little padding,
    and few distinct shapes, since `mx.compile` keeps one trace for each. Each epoch shuffles rows
    within lengths and the order of batches.
    """

    def __init__(self, rows: list[Row], cfg: Config):
        self.rows, self.cfg = rows, cfg
        lengths = np.array([len(r.ids) for r in rows])
        multiple = 4 if lengths.max() <= 32 else 8 if lengths.max() <= 64 else 32
        self.padded = np.minimum(-(-lengths // multiple) * multiple, lengths.max())
        self.A = max(sum(stop - start for start, stop in r.targets(cfg)) for r in rows)
        self.lengths = sorted(set(self.padded.tolist()))
        self.per_epoch = sum(-(-int((self.padded == n).sum()) // cfg.batch_size)
                             for n in self.lengths)
        self._epoch, self._plan = -1, []

    def _shuffle(self, epoch: int) -> list[tuple[int, list[int]]]:
        """One epoch's (length, row indices) in order; a length's last batch is filled with -1."""
        rng, B, plan = np.random.default_rng((self.cfg.seed, epoch)), self.cfg.batch_size, []
        for n in self.lengths:
            order = rng.permutation(np.flatnonzero(self.padded == n))
            order = np.concatenate([order, np.full(-len(order) % B, -1, order.dtype)])
            plan += [(n, order[i:i + B].tolist()) for i in range(0, len(order), B)]
        return [plan[i] for i in rng.permutation(len(plan))]

    def at(self, step: int) -> tuple[list[list[dict[str, mx.array]]], dict]:
        """One update of a 0-based step: cfg.grad_accum_steps equal parts of its rows, and metrics.

        n_targets and n_rows count the whole step, so that its micro-batches' losses add up.
        """
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._shuffle(epoch)
        T, indices = self._plan[k]
        part = len(indices) // self.cfg.grad_accum_steps
        batches = [make_batch(self.rows, indices[i:i + part], T, min(self.A, T - 1), self.cfg)
                   for i in range(0, len(indices), part)]
        counts = {"n_targets": np.float32(sum(b["target_mask"].sum() for b in batches)),
                  "n_rows": np.float32(sum(b["row_mask"].sum() for b in batches))}
        update = [{name: mx.array(value) for name, value in (batch | counts).items()}
                  for batch in workers.mine(batches)]
        rows = [i for i in indices if i >= 0]
        return [update], {"rows": rows, "n_tokens": sum(len(self.rows[i].ids) for i in rows)}

    def state(self) -> tuple[dict, dict]:
        """What `at` depends on beside rows, config and step: nothing."""
        return {}, {}

    def restore(self, arrays: dict, about: dict) -> None:
        pass

    def load(self) -> Load:
        """What one micro-batch asks of the model, for the memory estimate."""
        B, T = self.cfg.batch_size // self.cfg.grad_accum_steps, max(self.lengths)
        logit_rows = B * self.A + (B if self.cfg.method == "dual_reward" else 0)
        return Load(B * T, T, logit_rows, prompt=max(row.P for row in self.rows))

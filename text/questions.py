"""Questions to reason about, as token ids: the prompt, what its reader sees, header and answer.

Markovian training's scoring rows are put together from these parts and a chain's own ids. Nothing
is decoded and encoded again, so where the answer stands is known, not searched.
"""
from dataclasses import dataclass

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import BadInput
from engine.decode import left_pad
from text.answers import LETTER_METHODS, NUMBER_METHODS, extract, is_right
from text.arithmetic import Problem
from text.rows import encode_prompt_of, hide_question
from text.tokenizer import Tokenizer

# between chain and answer; it ends at the colon, since answers start with their space
HEADER = "\nAnswer:"


@dataclass
class Question:
    """A question problem as token ids."""
    prompt: list[int]       # what the policy reads
    shown: list[int]        # what the scorer reads before the chain: the question hidden, or not
    header: list[int]       # between chain and answer
    answer: list[int]       # the gold answer and its end; of a continuation without the end
    end: int                # what ends a reply: EOS, or a chat template's own token
    mean: bool              # the reward is a mean over the answer's tokens, not their sum


def encode_question(problem: Problem, tokenizer: Tokenizer, markovian: bool,
                    template: str = "none") -> Question:
    """Encode the four parts; BadInput where a token spans the border of header and answer.

    In a template the prompt, or what stands in its place where it is hidden, is the user's message,
    and the reply goes from the chain's first token to the answer's EOS.
    """
    if not problem.hidden:
        raise BadInput(f"method markovian needs questions to reason about, and {problem.prompt!r} "
                       "is none; expected a data folder that `python -m tasks` writes, such as "
                       "sums, whose rows have `hidden`")
    prompt = encode_prompt_of(problem, tokenizer, template)
    header = tokenizer.encode_continuation(HEADER)
    ids = tokenizer.encode_continuation(f"{HEADER} {problem.answer}")
    if ids[:len(header)] != header or len(ids) == len(header):
        raise BadInput(f"the border between header {HEADER!r} and answer {problem.answer!r} falls "
                       f"inside a token of {tokenizer.source}")
    mean = problem.wording == "continuation"
    shown = (encode_prompt_of(hide_question(problem), tokenizer, template) if markovian
             else prompt)
    end, = tokenizer.reply_ends(template).get("ends") or [tokenizer.eos_id]
    answer = ids[len(header):] + ([] if mean else [end])
    return Question(prompt, shown, header, answer, end, mean)


def check_extraction(problems: list[Problem], method: str) -> None:
    """Raises BadInput where a prior method for numbers meets letters, or the other way round."""
    for problem in problems:
        allowed = LETTER_METHODS if problem.letters else NUMBER_METHODS
        if method not in allowed:
            raise BadInput(f"chain_extraction = {method!r} does not read the answer "
                           f"{problem.answer[:20]!r} of {problem.prompt[:60]!r}; expected one of "
                           f"{', '.join(allowed)}")


def answer_prompt(question: Question, chain: list[int], tokenizer: Tokenizer) -> list[int]:
    """What the answerer reads: the shown prompt, the chain without its stop token, the header."""
    ends = {*tokenizer.eos_ids, question.end}
    return question.shown + [i for i in chain if i not in ends] + question.header


def answer_arrays(questions: list[Question], chains: list[list[int]],
                  tokenizer: Tokenizer) -> dict[str, mx.array]:
    """Scoring rows for N chains, G to each question; G = N / len(questions).

    shown        (1, T) int32 where all questions show the same, else (P, T), left-padded; computed
                 once for all its chains
    tails        (N, S) int32: chain, header, answer, right-padded
    positions    (N, A) int32: where in its tail each answer token stands
    answers      (N, A) int32: those tokens
    share        (N, A) float32: 0 for filling; 1, or 1 over the length for a mean
    """
    G = len(chains) // len(questions)
    rows = [(questions[i // G], chain) for i, chain in enumerate(chains)]
    tails = [answer_prompt(q, chain, tokenizer)[len(q.shown):] + q.answer for q, chain in rows]
    A, S = max(len(q.answer) for q, _ in rows), max(map(len, tails))
    S = -(-S // 4) * 4      # few shapes, few traces of mx.compile
    positions, answers = np.zeros((2, len(rows), A), np.int32)
    share = np.zeros((len(rows), A), np.float32)
    for i, ((q, _), tail) in enumerate(zip(rows, tails)):
        n = len(q.answer)
        positions[i, :n] = np.arange(len(tail) - n, len(tail))
        answers[i, :n] = q.answer
        share[i, :n] = 1 / n if q.mean else 1
    shown = [q.shown for q in questions]
    same = all(ids == shown[0] for ids in shown)
    prompts, start = left_pad(shown[:1] if same else shown)
    arrays = {"shown": prompts, "tails": mx.array([t + [0] * (S - len(t)) for t in tails]),
              "positions": mx.array(positions), "answers": mx.array(answers),
              "share": mx.array(share)}
    return arrays if start is None else arrays | {"shown_start": start}


def grade_answers(problems: list[Problem], done: list, method: str) -> list[dict]:
    """Read and grade the answers behind given chains: [{generated, correct, invalid}].

    method  chain_extraction's;  done: generate.Completions
    """
    rows = []
    for problem, completion in zip(problems, done):
        answer = extract(completion.text, problem.letters, method, completion.finished)
        rows.append({"generated": completion.text.strip(),
                     "correct": is_right(answer, problem.answer), "invalid": answer is None})
    return rows

"""From a problem to token ids: what a model reads, what it shall answer, where each begins."""
from dataclasses import dataclass

from config import BadInput, Config
from text.arithmetic import Problem
from text.tokenizer import Tokenizer


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
    check_is_question(problem)
    return tokenizer.encode_prompt(problem.prompt)


def check_is_question(problem: Problem) -> None:
    if problem.messages:
        raise BadInput(f"the row with the reply {problem.answer[:40]!r} is a conversation, which "
                       "needs template: lines, plain or chat (methods sft and dual_reward)")


def encode_problem(problem: Problem, tokenizer: Tokenizer, template: str = "none",
                   class_id: int = 0) -> Row:
    """The same with the answer and what ends it: all that training reads."""
    if template == "none":
        check_is_question(problem)
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

"""Markovian training: a chain of thought is worth what it tells a reader blind to the question.

    prompt    ... Question: 12 + 7 + 30 Reasoning:   -> the policy samples a chain c
    scored    ... Question: <redacted> Reasoning: c \nAnswer:   -> reward log p( 49 | c), in nats

The reader is the model itself (the actor) or its frozen base (adapters off). Since r depends on the
weights too, the gradient of E[r] has two halves, and both are taken:

    grad E[r] = E[ (r - baseline) grad log p(c | question)  +  grad log p(answer | c) ]

The first is GRPO's policy term with r as reward. The second stands on the raw r, since a mean of
standardised rewards has no gradient at all, divided by what the advantages are divided by, so that
both halves have one unit. What the public code (2404.18988) does instead: study/prior_work.md.

Hiding is by construction: text/questions.py puts the scored ids together from those of the hidden
prompt, the chain as sampled, the header and the answer.
"""
from functools import partial

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import Config
from engine.parallel import map_rows
from generate import Completion, sample
from grpo import Group, completion_resid
from lora import adapters_off
from losses import token_logprobs
from model import Llama, gather_positions
from report.rollouts import summarize_scorers
from text.arithmetic import Problem
from text.questions import (
    Question,
    answer_arrays,
    answer_prompt,
    check_extraction,
    encode_question,
    grade_answers,
)
from text.rows import check_context
from text.tokenizer import Tokenizer


def answer_rewards(model: Llama, arrays: dict[str, mx.array], with_grad: bool = False) -> mx.array:
    """log p(answer | what is shown, chain) of each row in nats, (N,): a sum, or a mean by `share`.

    At temperature 1 and float32 whatever the chains were sampled with. with_grad: to be trained on
    """
    resid = completion_resid(model, arrays["shown"], arrays.get("shown_start"), arrays["tails"])
    logprobs = model.read_logits(token_logprobs, gather_positions(resid, arrays["positions"]),
                                 arrays["answers"], with_grad)                     # (N, A)
    return (logprobs * arrays["share"]).sum(1)


class Chains:
    """What Markovian training samples and how it is rewarded: chains, by log p(answer | chain).

    The same members as grpo.Answers.
    """
    max_advantage = 5       # one chain at -40 nats shall not own its group
    summarize = staticmethod(summarize_scorers)

    def __init__(self, model: Llama, tokenizer: Tokenizer, problems: list[Problem], cfg: Config):
        check_extraction(problems, cfg.chain_extraction)
        self.model, self.tokenizer, self.cfg = model, tokenizer, cfg
        self.ends = tokenizer.reply_ends(cfg.template)
        self.questions = {p: encode_question(p, tokenizer, cfg.markovian, cfg.template)
                          for p in problems}
        self.prompts = [self.questions[p].prompt for p in problems]
        scored = [q.shown + q.header + q.answer for q in self.questions.values()]
        check_context(scored, cfg.chain_tokens, model)
        # the answer term teaches the reader even where all chains of a group are worth the same
        self.needs_variance = cfg.markovian_answer_weight == 0
        # two functions: a trace keeps the adapters as they were while it was made
        compiled = partial(mx.compile, inputs=[model.state])
        self.actor = compiled(partial(answer_rewards, model))
        self.frozen = compiled(partial(answer_rewards, model))

    def rewards(self, asked: list[Problem], done: list[Completion]) -> dict[str, np.ndarray]:
        """Rewards by the scorer; the other's beside them: the frozen judge cannot be bent."""
        cfg, found = self.cfg, {"actor": [], "frozen": []}
        G = cfg.grpo_group_size
        rows = G * -(-cfg.batch_size // G // cfg.grad_accum_steps)
        for i in range(0, len(done), rows):
            arrays = answer_arrays([self.questions[p] for p in asked[i:i + rows:G]],
                                   [c.ids for c in done[i:i + rows]], self.tokenizer)
            found["actor"] += map_rows(self.actor, arrays, self.model.parts)
            with adapters_off(self.model):
                found["frozen"] += map_rows(self.frozen, arrays, self.model.parts)
        judged = {name: np.concatenate(parts) for name, parts in found.items()}
        return judged | {"reward": judged[cfg.markovian_scorer]}

    def arrays(self, groups: list[Group], row_weights: mx.array, step: int) -> dict[str, mx.array]:
        """For the answer term of N chains: their scoring rows, and what each counts.

        row_weights  (N,): a chain token's weight in the policy term, 0 for rows that only fill up
        """
        weight = self.cfg.markovian_answer_weight
        if not weight:
            return {}
        if self.cfg.markovian_ramp_steps:
            weight *= min(1.0, step / self.cfg.markovian_ramp_steps)
        # divided as the advantages are, so that w = 1 is the gradient of E[r] (a frozen scorer's
        # has no second half, and config.py refuses one)
        counts = np.repeat([1 / g.divisor for g in groups], self.cfg.grpo_group_size)
        arrays = answer_arrays([self.questions[g.problem] for g in groups],
                               [c.ids for g in groups for c in g.completions], self.tokenizer)
        arrays["answer_weights"] = weight * mx.array(counts.astype(np.float32)) * row_weights
        return arrays


def greedy_chains(model: Llama, tokenizer: Tokenizer, questions: list[Question],
                  cfg: Config) -> list[Completion]:
    """One greedy chain a question, behind what the policy reads."""
    return sample(model, tokenizer, [q.prompt for q in questions], cfg.chain_tokens,
                  **tokenizer.reply_ends(cfg.template))


def greedy_answers(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
                   questions: list[Question], chains: list[list[int]], cfg: Config) -> list[dict]:
    """Answer every question from a given chain: [{generated, correct, invalid}]."""
    prompts = [answer_prompt(q, chain, tokenizer) for q, chain in zip(questions, chains)]
    done = sample(model, tokenizer, prompts, cfg.max_completion_tokens,
                  ends={q.end for q in questions})
    return grade_answers(problems, done, cfg.chain_extraction)


def score_chains(model: Llama, tokenizer: Tokenizer, questions: list[Question],
                 chains: list[list[int]]) -> np.ndarray:
    """log p(gold answer | chain) of each, (N,) nats; sum, or mean for continuations."""
    # 1024 positions are unembedded together: half a GiB for a vocabulary of 128,256
    rows = max(1, 1024 // max(len(q.answer) for q in questions))
    parts = [answer_rewards(model, answer_arrays(questions[i:i + rows], chains[i:i + rows],
                                                 tokenizer)) for i in range(0, len(chains), rows)]
    return np.concatenate([np.array(part) for part in parts])


def evaluate_chains(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
                    cfg: Config) -> list[dict]:
    """One row a problem: its greedy chain and answer, and what other chains would have given.

    correct          the chain's own answer, by the actor;  correct_frozen: by the frozen base
    correct_empty    without a chain;  correct_shuffled: with the next problem's chain
    reward           log p(gold | chain) by the actor, nats; reward_frozen, reward_empty likewise
    A continuation is not graded: its correct is None. raises  BadInput where a prompt does not fit
    """
    check_extraction(problems, cfg.chain_extraction)
    questions = [encode_question(p, tokenizer, cfg.markovian, cfg.template) for p in problems]
    check_context([q.shown + q.header + q.answer for q in questions],
                  cfg.chain_tokens + cfg.max_completion_tokens, model)
    done = greedy_chains(model, tokenizer, questions, cfg)
    chains = [c.ids for c in done]
    variants = {"": chains, "_empty": [[]] * len(chains), "_shuffled": chains[1:] + chains[:1]}
    rows = [{"prompt": p.prompt, "expected": p.answer, "chain": c.text, "chain_ids": c.ids,
             "chain_tokens": len(c.ids), "chain_finished": c.finished, "operation": "",
             "wording": p.wording}
            for p, c in zip(problems, done)]

    def answer(name: str, given: list[list[int]]) -> None:
        rewards = score_chains(model, tokenizer, questions, given)
        graded = greedy_answers(model, tokenizer, problems, questions, given, cfg)
        for row, question, reward, seen in zip(rows, questions, rewards.tolist(), graded):
            row[f"reward{name}"] = reward
            if question.mean:
                seen = {"generated": seen["generated"], "correct": None, "invalid": None}
            row |= seen if not name else {f"correct{name}": seen["correct"]}

    for name, given in variants.items():
        answer(name, given)
    with adapters_off(model):
        answer("_frozen", chains)
    return rows

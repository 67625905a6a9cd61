"""The reward of the published collapse: the model's own log p(answer | its completion).

The judge is the patient: if the weights drift, every completion of a group sinks together, and
advantages, which compare inside a group, do not see it. configs/collapse.yaml trains on it, guard
off; configs/collapse_mended.yaml with the guard and the KL term.
"""
import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from generate import Completion
from losses import token_logprobs
from model import Llama
from text.arithmetic import Problem
from text.tokenizer import Tokenizer


def self_reward(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
                completions: list[Completion]) -> np.ndarray:
    """log p(answer, EOS | BOS, completion, "=") under the model itself, nats per token, (N,)."""
    bos, rows, answers = len(tokenizer.encode_prompt("=")) - len(tokenizer.encode("=")), [], []
    for problem, completion in zip(problems, completions):
        ids, P = tokenizer.encode_pair("= ", problem.answer)
        thought = [i for i in completion.ids if i not in tokenizer.stop_ids]
        rows.append(ids[:bos] + thought + ids[bos:])
        answers.append(len(ids) - P)
    T, A = max(map(len, rows)), max(answers)
    tokens = np.array([row + [0] * (T - len(row)) for row in rows])                     # (N, T)
    # the A positions up to the row's last; those before its answer are masked out
    targets = np.array([len(row) for row in rows])[:, None] - A + np.arange(A)          # (N, A)
    mask = np.arange(A) >= A - np.array(answers)[:, None]
    before = mx.array(np.maximum(targets - 1, 0))
    logits = model.head(model.final_resid(mx.array(tokens), positions=before))
    chosen = mx.array(np.take_along_axis(tokens, np.maximum(targets, 0), axis=1))
    logprobs = np.array(token_logprobs(logits, chosen))
    return (logprobs * mask).sum(1) / mask.sum(1)

"""What a step's samples say in plain numbers, and when these numbers are a collapse.

The first half is what metrics.jsonl says of completions and rewards. The second judges it, without
a model: `harmful` one update before it is taken, `CollapseGuard` a window of steps (guard.py acts
on it). Completions are generate.Completion's.
"""
import math
from dataclasses import dataclass, field

import numpy as np

from config import Config

MAX_MEAN_RATIO = 10  # of an update; above it the samples say nothing about the policy


def repetition(ids: list[int]) -> float:
    """Share of a completion's trigrams that are repeats; 0 where it has fewer than two.

    example  [4, 4, 4, 4, 4] -> 2/3: three trigrams, one distinct
    """
    trigrams = list(zip(ids, ids[1:], ids[2:]))
    return 1 - len(set(trigrams)) / len(trigrams) if len(trigrams) > 1 else 0.0


def summarize_rollouts(rewards: np.ndarray, of_method: dict, no_signal: np.ndarray,
                       done: list) -> dict:
    """A step's samples: lengths in tokens, entropy in nats; truncated: the share cut by the limit.

    of_method   summarize_answers or summarize_scorers;  no_signal: which groups have no signal
    """
    return {
        "reward": float(rewards.mean()), "reward_std": float(rewards.std()),
        "reward_min": float(rewards.min()), "reward_max": float(rewards.max()),
        **of_method,
        "zero_variance_groups": float(no_signal.mean()),
        "length": float(np.mean([len(c.ids) for c in done])),
        "truncated": float(np.mean([not c.finished for c in done])),
        "entropy": float(np.mean(np.concatenate([c.entropies for c in done]))),
        "logprob": float(np.mean(np.concatenate([c.logprobs for c in done]))),
        "repetition": float(np.mean([repetition(c.ids) for c in done])),
        "n_tokens": sum(len(c.ids) for c in done),
    }


def summarize_answers(judged: dict[str, np.ndarray], done: list) -> dict:
    """Of N judged answers: the rewards' parts, and how long right and wrong ones are."""
    parts = {name: float(v.mean()) for name, v in judged.items() if name.startswith("reward_")}
    if "right" not in judged:
        return parts
    right, lengths = judged["right"] > 0, np.array([len(c.ids) for c in done])
    return parts | {"accuracy": float(right.mean()),
                    "length_right": float(lengths[right].mean()) if right.any() else None,
                    "length_wrong": float(lengths[~right].mean()) if not right.all() else None}


def summarize_scorers(judged: dict[str, np.ndarray], done: list) -> dict:
    """Of N judged chains: the actor's rewards and the frozen base's, nats."""
    summary = {}
    for scorer in ("actor", "frozen"):
        summary[f"{scorer}_reward"] = float(judged[scorer].mean())
        summary[f"{scorer}_reward_p10"] = float(np.quantile(judged[scorer], 0.1))
    return summary


@dataclass
class CollapseGuard:
    """Say when a policy has collapsed, from each step's rollouts. Plain numbers: saved as JSON.

    Everything is a running mean over WINDOW steps. It is alarming if the reward lies below its best
    by half of the spread that single rewards had at the start, plus four standard errors; or by a
    tenth of that, if entropy has fallen under a tenth of its start or repetition has doubled to
    above 0.3. (Entropy alone says nothing: a policy that has learnt the answers is as sure.) Three
    alarming steps of five are a collapse. The thresholds are judgement; tests hold them against the
    published collapse, a healthy run and completions of 4444.
    """
    recent: list[list[float]] = field(default_factory=list)  # last WINDOW of (reward, entropy, ...)
    alarms: list[bool] = field(default_factory=list)         # of the last five steps
    start: list[float] = field(default_factory=list)         # entropy, repetition, margin at start
    best: float = -math.inf                                  # highest running mean of reward
    reverts: int = 0

    WINDOW, MAX_REVERTS = 10, 3     # no annotation: constants, not fields

    def observe(self, reward: float, spread: float, entropy: float, repeated: float) -> str:
        """Take one step's means in; returns "", "best" (worth keeping) or the collapse's reason."""
        self.recent = (self.recent + [[reward, spread, entropy, repeated]])[-self.WINDOW:]
        if len(self.recent) < self.WINDOW:
            return ""
        reward, spread, entropy, repeated = np.mean(self.recent, axis=0).tolist()
        if not self.start:
            noise = float(np.std([row[0] for row in self.recent])) / self.WINDOW ** 0.5
            self.start = [entropy, repeated, 0.5 * spread + 4 * noise]
        entropy_then, repeated_then, margin = self.start
        drop, reason = self.best - reward, ""
        if drop > margin:
            reason = f"reward {reward:.3g} fell from {self.best:.3g}"
        elif drop > 0.1 * margin and entropy < 0.1 * entropy_then:
            reason = f"entropy {entropy:.3g} fell from {entropy_then:.3g}, and reward with it"
        elif drop > 0.1 * margin and repeated > max(2 * repeated_then, 0.3):
            reason = f"repetition {repeated:.2f} rose from {repeated_then:.2f}, and reward fell"
        self.alarms = (self.alarms + [bool(reason)])[-5:]
        if sum(self.alarms) >= 3:
            return reason or "alarms in three of five steps"
        if reward > self.best:
            self.best = reward
            return "best"
        return ""

    def reverted(self) -> None:
        """Note that the best weights are back: the window starts anew, best and start stay."""
        self.reverts += 1
        self.recent, self.alarms = [], []


def harmful(record: dict[str, float], cfg: Config) -> str:
    """Why an update should not be taken: "skipped", "early_stop" (the step's last), or "".

    Leaving the optimizer alone is the point. Multiplying the loss by 0 would not do: AdamW's
    momentum still moves the weights.
    """
    is_finite = np.isfinite([record["loss"], record["grad_norm"]]).all()
    if not is_finite or record["ratio"] > MAX_MEAN_RATIO:
        return "skipped"
    if cfg.grpo_kl_stop and record["kl_old"] > 1.5 * cfg.grpo_kl_stop:
        return "early_stop"
    return ""

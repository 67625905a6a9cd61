"""What notices that a policy collapses, and brings the best weights back.

A policy that is rewarded for its own samples can get worse everywhere at once, and advantages,
which compare inside a group, do not see it. Three watches, all optional (`grpo_guard`):
`harmful` judges one update before it is taken, `CollapseGuard` a window of steps, and `Guarded`
wraps a batch source (grpo.Rollouts): on a collapse the best weights and optimizer come back, the
learning rate is halved and the data moves on.
"""
import math
from dataclasses import asdict, dataclass, field

import engine.blas  # noqa: F401  (before mlx)
import numpy as np

from config import Collapsed, Config
from files.run_folder import restore_training, training_arrays

MAX_MEAN_RATIO = 10  # of an update; above it the samples say nothing about the policy


def repetition(ids: list[int]) -> float:
    """Share of a completion's trigrams that are repeats; 0 where it has fewer than two.

    example  [4, 4, 4, 4, 4] -> 2/3: three trigrams, one distinct
    """
    trigrams = list(zip(ids, ids[1:], ids[2:]))
    return 1 - len(set(trigrams)) / len(trigrams) if len(trigrams) > 1 else 0.0


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
    if not np.isfinite([record["loss"], record["grad_norm"]]).all():
        return "skipped"
    if record["ratio"] > MAX_MEAN_RATIO:
        return "skipped"
    if cfg.grpo_kl_stop and record["kl_old"] > 1.5 * cfg.grpo_kl_stop:
        return "early_stop"
    return ""


class Guarded:
    """A batch source with the same three methods, whose policy is put back when it collapses."""

    def __init__(self, source, model, optimizer):
        self.source, self.model, self.optimizer = source, model, optimizer
        self.guard, self.best = CollapseGuard(), {}

    def at(self, step: int) -> tuple[list, dict]:
        """The source's updates; none, and the best weights back, where the policy has collapsed.

        raises   Collapsed after CollapseGuard.MAX_REVERTS times; the best weights are then in place
        """
        updates, metrics = self.source.at(step)
        verdict = self.guard.observe(metrics["reward"], metrics["reward_std"], metrics["entropy"],
                                     metrics["repetition"])
        if verdict == "best":
            self.best = training_arrays(self.model, self.optimizer)     # references, no copies
        elif verdict:
            restore_training(self.best, self.model, self.optimizer)
            if self.guard.reverts >= self.guard.MAX_REVERTS:
                raise Collapsed(f"step {step + 1}: the policy collapsed a "
                              f"{self.guard.reverts + 1}th time ({verdict}); the best weights are "
                              "saved. Lower lr, or raise grpo_kl_weight")
            self.guard.reverted()
            updates, metrics["collapsed"] = [], verdict
        return updates, metrics | {"reverts": self.guard.reverts,
                                   "lr_scale": 0.5 ** self.guard.reverts}

    def state(self) -> tuple[dict, dict]:
        arrays, plain = self.source.state()
        best = {f"best.{name}": array for name, array in self.best.items()}
        return arrays | best, plain | {"guard": asdict(self.guard)}

    def restore(self, arrays: dict, plain: dict) -> None:
        self.source.restore(arrays, plain)
        self.guard = CollapseGuard(**plain["guard"])
        self.best = {name.removeprefix("best."): array for name, array in arrays.items()
                     if name.startswith("best.")}

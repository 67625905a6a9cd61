"""What notices that a policy collapses, and brings the best weights back.

A policy that is rewarded for its own samples can get worse everywhere at once, and advantages,
which compare inside a group, do not see it. Where report/rollouts.py sees a collapse in a window of
steps, the best weights and optimizer come back, the learning rate is halved, the data moves on.
"""
from dataclasses import asdict

import engine.blas  # noqa: F401  (before mlx)

from files.keys import Collapsed
from files.run_folder import restore_training, training_arrays
from report.rollouts import CollapseGuard


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

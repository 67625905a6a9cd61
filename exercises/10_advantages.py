"""Exercise 10: leave-one-out advantages.

GRPO samples G completions of each prompt and asks: was this one better than the others? So a
completion's advantage is its reward minus the mean of the *other* G - 1 of its group. (With itself
in the mean a good completion would be measured against itself in part.)

Three rules. It is not divided by the group's standard deviation, which would weigh prompts that are
nearly always or nearly never solved the most. Groups do not mix. In a group whose rewards differ by
less than 1e-6 all advantages are exactly 0: what rounding leaves is no signal.

example   [[1, 0, 0, 0]] -> [[1, -1/3, -1/3, -1/3]]
useful    numpy: rewards.sum(1, keepdims=True), np.ptp(rewards, axis=1)
size      4 to 6 lines.  Ours: group_advantages in grpo.py
check     make exercise N=10
"""
import numpy as np


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """rewards (P, G), P groups of G -> advantages (P, G)."""
    raise NotImplementedError

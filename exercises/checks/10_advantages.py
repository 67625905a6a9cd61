"""Checks exercise 10, advantages, by leaving each one out. Reading on gives it away."""
import numpy as np

from grpo import group_advantages, zero_variance

OURS = {"leave_one_out": group_advantages}
READ = [group_advantages, zero_variance]

# 3 groups of 4; one carries no signal but rounding's
REWARDS = np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0.3, 0.1, 0.9, 0.2]])
EQUAL = np.array([[1, 0, 1, 0], [0.1, 0.1, 0.1, 0.1], [-3.2, -3.2 + 1e-9, -3.2, -3.2]])


def case(rewards):
    return lambda f: f.leave_one_out(np.array(rewards, np.float64))


def by_leaving_out(rewards):
    found = np.zeros(rewards.shape)
    for p, i in np.ndindex(rewards.shape):
        found[p, i] = rewards[p, i] - np.delete(rewards[p], i).mean()
    return found


CASES = {
    "the example": case([[1, 0, 0, 0]]),
    "3 groups of 4": case(REWARDS),
    "4 groups of 3": case(REWARDS.T),
    "two groups without a signal, times 1e6": lambda f: 1e6 * f.leave_one_out(EQUAL.copy()),
}
INDEPENDENT = {
    "the example": [[1, -1 / 3, -1 / 3, -1 / 3]],
    "3 groups of 4": by_leaving_out(REWARDS),
    "4 groups of 3": by_leaving_out(REWARDS.T),
    "two groups without a signal, times 1e6":
        [[2e6 / 3, -2e6 / 3, 2e6 / 3, -2e6 / 3], [0] * 4, [0] * 4],
}


def wrong(function, rule=True):
    """A function of (P, G) rewards; rule: equal rewards give 0 all the same."""
    def advantages(rewards):
        found = np.array(function(rewards), np.float64)
        if rule:
            found[np.ptp(rewards, axis=1) < 1e-6] = 0
        return found
    return {"leave_one_out": advantages}


def deviation(rewards):
    return rewards - rewards.mean(1, keepdims=True)


def others_mean(rewards):
    return (rewards.sum(1, keepdims=True) - rewards) / (rewards.shape[1] - 1)


MISTAKES = {
    "with the completion itself in the mean: only the other G - 1 count": wrong(deviation),
    "when divided by the group's standard deviation, as DeepSeekMath does":
        wrong(lambda r: deviation(r) / (r.std(1, keepdims=True) + 1e-8)),
    "when the leave-one-out difference is divided by the group's standard deviation":
        wrong(lambda r: (r - others_mean(r)) / (r.std(1, keepdims=True) + 1e-8)),
    "when it is divided by the standard deviation of the others, or of G - 1 (ddof 1)":
        wrong(lambda r: (r - others_mean(r)) / (r.std(1, keepdims=True, ddof=1) + 1e-8)),
    "with the others of all groups in the mean: groups do not mix":
        wrong(lambda r: r - (r.sum() - r) / (r.size - 1)),
    "with (G - 1) / G: R minus the group's mean is to be multiplied with G / (G - 1)":
        wrong(lambda r: deviation(r) * (r.shape[1] - 1) / r.shape[1]),
    "with the mean of all groups: completions of other prompts are no measure":
        wrong(lambda r: r - r.mean()),
    "with the groups along the wrong axis: a row is a group":
        wrong(lambda r: r - (r.sum(0, keepdims=True) - r) / (len(r) - 1)),
    "with the sum of the others: it is their mean, of G - 1":
        wrong(lambda r: r - (r.sum(1, keepdims=True) - r)),
    "with the others' sum divided by G: they are G - 1":
        wrong(lambda r: r - (r.sum(1, keepdims=True) - r) / r.shape[1]),
    "with the sign turned round: better than the others is positive":
        wrong(lambda r: others_mean(r) - r),
    "without the rule for equal rewards, or with == 0 in it: what rounding leaves is not exactly 0":
        wrong(lambda r: r - others_mean(r), rule=False),
    "with the best of the others in place of their mean":
        wrong(lambda r: r - np.array([[np.delete(row, i).max() for i in range(len(row))]
                                      for row in r])),
}

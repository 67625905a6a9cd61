"""GRPO: sample a group of completions for every prompt, reward them, compare within the group.

A completion's advantage is its reward minus the mean of its group's others, so no value network is
needed (DeepSeekMath 2402.03300). This file makes the batches and the loss; the optimizer stays in
train.py. Where we differ from the paper: the mean leaves the completion itself out (RLOO
2402.14740), advantages are not divided by the group's standard deviation, and the loss is divided
by a constant, not by each completion's length (Dr. GRPO 2503.20783). The last two are options.
What public code got wrong here, and tests look for: study/prior_work.md.

    old policy        the weights that sampled; its log-probabilities come with the samples
    reference policy  this model with its adapters off; the KL term reads it, and grpo_ratio: base

Advantages compare inside a group, so they do not see a policy that gets worse everywhere. The KL
term and guard.py watch for that.
Shapes: P prompts, of a step or a micro-batch; G completions of each, N = P * G, padded to C tokens.
"""
import time
from dataclasses import dataclass

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import BadInput, Config
from engine import workers
from engine.decode import fused_for_decoding, left_pad, pad_completions
from engine.parallel import map_rows
from files.user_reward import call_rewards, correct, load_rewards
from generate import Completion, sample
from lora import adapters_off
from losses import answer_reward_loss, kl_estimates, policy_loss, token_logprobs
from model import Llama
from report.rollouts import summarize_answers, summarize_rollouts
from text.arithmetic import Problem
from text.rows import check_context, draw_problems, encode_prompt_of, ends_of_reply
from text.tokenizer import Tokenizer

ZERO_VARIANCE = 1e-6    # a group whose rewards differ by less carries no signal
REDRAWS = 3             # fresh prompts, where no group of a step carries one
PAD_GROUPS = 8          # micro-batches are padded to a multiple: few shapes, few compiled traces


# --------------------------------------------------------------------------------------------------
# the loss


def completion_resid(model: Llama, prompts: mx.array, start: mx.array | None,
                     completions: mx.array) -> mx.array:
    """The final residual stream that scores each completion token, (N, C, D).

    prompts      (P, T) int32, left-padded up to start (P,), or None where none is padded
    completions  (N, C) int32, a prompt's G in a row. The prompt is computed once for all of them,
                 gradients included: P (T + G C) tokens instead of P G (T + C)
    """
    P, N, C = len(prompts), *completions.shape
    cache = model.make_cache(prompts.shape[1], start)
    first = model.last_resid(prompts, cache)[:, None]                   # (P, 1, D): scores token 0
    first = mx.repeat(first, N // P, axis=0)                            # (N, 1, D)
    if C == 1:
        return first
    # token t is scored by the position before it: the last completion token is read by nobody
    cache = [c.repeat(N // P, prompts.shape[1] + C - 1) for c in cache]
    return mx.concatenate([first, model.final_resid(completions[:, :-1], cache)], axis=1)


def completion_logprobs(model: Llama, batch: dict[str, mx.array], temperature: float,
                        with_grad: bool) -> mx.array:
    """log p of each completion token at the temperature it was sampled with, (N, C) nats."""
    resid = completion_resid(model, batch["prompts"], batch.get("start"), batch["completions"])

    def score(logits, tokens):      # called with the logits of a few rows at a time
        return token_logprobs(logits / temperature, tokens)

    return model.read_logits(score, resid, batch["completions"], with_grad)


def rollout_loss(cfg: Config, answer_rewards, model: Llama,
                 batch: dict[str, mx.array]) -> tuple[mx.array, dict, dict]:
    """A micro-batch's loss in GRPO and Markovian training, sums to add up, and maxima.

    answer_rewards  markovian.answer_rewards, whose gradient that method adds; None for GRPO
    batch           Rollouts.make_arrays: its weights count in the loss, mean_weights in reports
    """
    weights, mean_weights = batch["weights"], batch["mean_weights"]             # (N, C)
    logprobs = completion_logprobs(model, batch, cfg.grpo_temperature, with_grad=True)
    # the first update of a step trains the very policy that sampled: the ratio is exactly 1, and
    # only its gradient counts. Afterwards the samples' own log-probabilities are the old ones
    now = mx.stop_gradient(logprobs)
    old = mx.where(batch["off_policy"], batch["old_logprobs"], now)
    policy, old_policy = logprobs, old
    if cfg.grpo_ratio == "base":    # the published error: means over tokens, against the base
        n = mx.maximum(mean_weights.sum(1, keepdims=True), 1e-12)
        policy = (logprobs * mean_weights).sum(1, keepdims=True) / n            # (N, 1)
        old_policy = (batch["ref_logprobs"] * mean_weights).sum(1, keepdims=True) / n
    loss, per_token = policy_loss(policy, old_policy, batch["advantages"], weights,
                                  cfg.grpo_clip_low, cfg.grpo_clip_high, cfg.grpo_dual_clip)
    is_real = mean_weights > 0
    maxima = {"ratio_max": mx.where(is_real, per_token["ratio"], 0).max(),
              "sampler_diff_max": mx.where(is_real & ~batch["off_policy"],
                                           mx.abs(now - batch["old_logprobs"]), 0).max()}
    sums = {"policy_loss": loss}
    # KL(old || policy) in this order: the samples are the old policy's
    per_token["kl_old"] = kl_estimates(old, now)["kl_k3"]
    if "ref_logprobs" in batch:
        # an expectation over the policy's next token, which the old policy sampled: hence the ratio
        ratio = mx.exp(mx.clip(now - old, -20, 20))
        for name, value in kl_estimates(logprobs, batch["ref_logprobs"]).items():
            per_token[name] = ratio * value
        if cfg.grpo_kl_weight:
            loss = loss + cfg.grpo_kl_weight * (weights * per_token["kl_k2"]).sum()
    if "answer_weights" in batch:
        # Markovian: the half of the gradient that the policy term lacks. Without a ratio: the chain
        # is taken as given, as PPO takes states. The ratio of a whole chain varies too much: at
        # 0.02 nats a token, 64 chains of 100 tokens would count as 8
        rewards = answer_rewards(model, batch, with_grad=True)                  # (N,)
        sums["answer_loss"] = answer_reward_loss(rewards, batch["answer_weights"])
        loss = loss + sums["answer_loss"]
    sums |= {name: (value * mean_weights).sum() for name, value in per_token.items()}
    return loss, sums, maxima


# --------------------------------------------------------------------------------------------------
# advantages


def zero_variance(rewards: np.ndarray) -> np.ndarray:
    """Which of P groups carry no signal: (P, G) -> (P,) bool.

    Tested on the range itself: the standard deviation of equal rewards can be 2e-7 by rounding, and
    divided by (std + 1e-8) they would have advantages near 1.
    """
    return np.ptp(rewards, axis=1) < ZERO_VARIANCE


def advantage_divisors(rewards: np.ndarray, scale: str = "none", floor: float = 0.0) -> np.ndarray:
    """What the advantages of (P, G) rewards are divided by, (P, 1).

    scale    none | batch (the standard deviation of all rewards) | group (the group's own, as
             DeepSeekMath: it weighs a prompt of success rate p by 1 / sqrt(p (1 - p)))
    floor    the least of them: groups that hardly differ are not blown up to unit deviation.
             Zero-variance groups are no exception: Markovian training divides its answer term by
             the same, which would jump where a group's variance becomes zero
    """
    if scale == "none":
        return np.ones((len(rewards), 1))
    own = rewards.std(1) if scale == "group" else np.full(len(rewards), rewards.std())
    return np.maximum(own, floor)[:, None]


def group_advantages(rewards: np.ndarray, scale: str = "none", floor: float = 0.0) -> np.ndarray:
    """Leave-one-out advantages of (P, G) rewards; a zero-variance group's are exactly 0.

    example  [[1, 0, 0, 0]] -> [[1, -1/3, -1/3, -1/3]]: R_i minus the mean of the other three
    """
    G, no_signal = rewards.shape[1], zero_variance(rewards)
    # R_i minus the mean of the others is G / (G - 1) times R_i minus the mean of all
    advantages = (rewards - rewards.mean(1, keepdims=True)) * G / (G - 1)
    advantages[no_signal] = 0
    advantages[~no_signal] /= advantage_divisors(rewards, scale, floor)[~no_signal]
    return advantages


def token_weights(mask: np.ndarray, norm: str, n_rows: float, n_tokens: float,
                  limit: int) -> np.ndarray:
    """What each token counts in the loss, (N, C), from the (N, C) mask of a micro-batch.

    norm              constant: 1 / (n_rows * limit), the longest allowed: no length bias (Dr. GRPO)
                      token:    1 / n_tokens (DAPO 2503.14476)
                      sequence: 1 / (n_rows * the completion's length): a long wrong answer is
                                punished less for each of its tokens (DeepSeekMath)
    n_rows, n_tokens  of the whole update, so that micro-batches of any size add up to the same
    """
    if norm == "token":
        return mask / n_tokens
    if norm == "sequence":
        return mask / (n_rows * np.maximum(mask.sum(1, keepdims=True), 1))
    return mask / (n_rows * limit)


# --------------------------------------------------------------------------------------------------
# the batch source


@dataclass
class Group:
    """One problem's prompt and its G completions, rewarded and compared."""
    problem: Problem
    prompt: list[int]
    completions: list[Completion]
    rewards: np.ndarray         # (G,)
    advantages: np.ndarray      # (G,)
    divisor: float              # what the advantages were divided by


def count_tokens(groups: list[Group]) -> int:
    return sum(len(c.ids) for g in groups for c in g.completions)


class Answers:
    """What GRPO samples and how it is rewarded: answers, by reward functions.

    markovian.Chains has the same members, for chains of thought.
    """
    max_advantage = np.inf
    needs_variance = True       # a group whose rewards are all alike teaches nothing
    summarize = staticmethod(summarize_answers)

    def __init__(self, model: Llama, tokenizer: Tokenizer, problems: list[Problem], cfg: Config):
        self.model, self.tokenizer = model, tokenizer
        self.functions = load_rewards(cfg.grpo_reward)
        self.prompts = [encode_prompt_of(p, tokenizer, cfg.template) for p in problems]
        self.ends = ends_of_reply(problems, tokenizer, cfg.template)
        self.has_answers = all(p.answer for p in problems)

    def rewards(self, asked: list[Problem], done: list[Completion]) -> dict[str, np.ndarray]:
        """N completions' `reward`, its parts as reward_NAME, and `right`; (N,) each."""
        judged = call_rewards(self.functions, self.model, self.tokenizer, asked, done)
        if self.has_answers:
            judged["right"] = np.array([correct(p, c) for p, c in zip(asked, done)], float)
        return judged

    def arrays(self, groups: list[Group], row_weights: mx.array, step: int) -> dict[str, mx.array]:
        """What a micro-batch holds beside the completions; answers need nothing more."""
        return {}


class Rollouts:
    """Batches sampled from the model as it is now.

    `at` is a function of the weights, the seed and `position`, the number of problems drawn so far,
    so that a resumed run draws and samples what the uninterrupted one would have.
    task    Answers or markovian.Chains
    """

    def __init__(self, model: Llama, problems: list[Problem], cfg: Config, task):
        self.model, self.cfg, self.task = model, cfg, task
        self.P, self.limit = cfg.batch_size // cfg.grpo_group_size, cfg.rollout_tokens
        self.rows, self.position = list(zip(problems, task.prompts)), 0
        check_context(task.prompts, self.limit, model)

        def score(batch):
            return completion_logprobs(model, batch, cfg.grpo_temperature, with_grad=False)

        # the state is an input, or the compiled function would keep today's weights for ever
        self.score = mx.compile(score, inputs=[model.state])

    def state(self) -> tuple[dict, dict]:
        """What `at` depends on beside weights and seed: arrays, none here, and plain JSON."""
        return {}, {"position": self.position}

    def restore(self, arrays: dict, plain: dict) -> None:
        self.position = plain["position"]

    def at(self, step: int) -> tuple[list[list[dict[str, mx.array]]], dict]:
        """Sample, reward and compare: (updates, metrics), an update being its micro-batches.

        No updates where no group carries a signal.
        raises   BadInput, if that happens at step 0: then the data is at fault
        """
        start, n_tokens = time.perf_counter(), 0
        for redraw in range(1 + REDRAWS):
            groups, metrics = self.rollout()
            n_tokens += metrics["n_tokens"]
            live = [g for g in groups if g.advantages.any() or not self.task.needs_variance]
            if live:
                break
        if not live and step == 0:
            raise BadInput(
                f"in {1 + REDRAWS} batches all {self.cfg.grpo_group_size} completions of every "
                f"prompt earn the same reward (mean {metrics['reward']:.3g}), so there is nothing "
                "to compare; use problems of middling difficulty, another grpo_reward, a larger "
                "grpo_group_size, or train with SFT first")
        sampled = time.perf_counter()
        updates = self.make_updates(groups, live, step) if live else []
        return updates, metrics | {"redraws": redraw, "n_tokens": n_tokens,
                                   "rollout_s": sampled - start,
                                   "score_s": time.perf_counter() - sampled}

    def rollout(self) -> tuple[list[Group], dict]:
        """Draw P problems, sample G completions of each, reward and compare them.

        Of several processes each completes its own prompts, and all get all completions.
        """
        cfg, G = self.cfg, self.cfg.grpo_group_size
        drawn = draw_problems(self.rows, cfg.seed, self.position, self.P)
        first, last = workers.my_range(self.P)
        key = mx.random.key((cfg.seed % 2 ** 32 << 32) + self.position)
        with fused_for_decoding(self.model):
            done = sample(self.model, self.task.tokenizer, [ids for _, ids in drawn[first:last]],
                          self.limit, G, cfg.grpo_temperature, key=key,
                          before=first, after=self.P - last, **self.task.ends)
        asked = [problem for problem, _ in drawn[first:last] for _ in range(G)]
        done, judged = workers.gather_rows(done, self.task.rewards(asked, done))
        self.position += self.P     # only now: if the reward raised, resuming draws the same again
        rewards = judged["reward"].reshape(self.P, G)
        advantages = group_advantages(rewards, cfg.grpo_advantage, cfg.grpo_std_floor)
        advantages = np.clip(advantages, -self.task.max_advantage, self.task.max_advantage)
        divisors = advantage_divisors(rewards, cfg.grpo_advantage, cfg.grpo_std_floor)[:, 0]
        groups = [Group(problem, ids, done[i * G:(i + 1) * G], rewards[i], advantages[i],
                        float(divisors[i])) for i, (problem, ids) in enumerate(drawn)]
        metrics = summarize_rollouts(rewards, self.task.summarize(judged, done),
                                     zero_variance(rewards), done)
        return groups, metrics | {"rows": f"drawn {self.position - self.P} to {self.position - 1}"}

    def make_updates(self, groups: list[Group], live: list[Group],
                     step: int) -> list[list[dict[str, mx.array]]]:
        """One update for each pass over the step's samples, each cut into micro-batches.

        Only `live` groups are in it, in the KL term too; the denominators count all.
        """
        cfg = self.cfg
        parts = [p.tolist() for p in np.array_split(np.arange(len(live)), cfg.grad_accum_steps)]
        parts = [p for p in parts if p or workers.size() > 1]       # as many for every process
        n_groups = -(-max(map(len, parts)) // PAD_GROUPS) * PAD_GROUPS
        n_groups = min(n_groups, -(-self.P // cfg.grad_accum_steps))
        micro_batches = []
        for part in workers.mine(parts):
            chosen = [live[i] for i in part]
            fillers = [live[0]] * (n_groups - len(chosen))
            micro_batches.append(self.make_arrays(chosen, fillers, groups, live, step))
        # off_policy: whether weights have moved since the sampling; nothing else differs
        return [[batch | {"off_policy": mx.array(epoch > 0)} for batch in micro_batches]
                for epoch in range(cfg.grpo_epochs)]

    def make_arrays(self, chosen: list[Group], fillers: list[Group], groups: list[Group],
                    live: list[Group], step: int) -> dict[str, mx.array]:
        """One micro-batch: the chosen groups, and fillers that weigh nothing.

        groups, live   all of the step, and those with a signal: the denominators of the loss, and
                       of the means that are reported
        """
        cfg, limit = self.cfg, self.limit
        done = [c for g in chosen + fillers for c in g.completions]
        completions, old_logprobs, mask = pad_completions(done, limit)          # (N, C) each
        mask[len(chosen) * cfg.grpo_group_size:] = 0    # EOS counts, fillers do not
        weights = token_weights(mask, cfg.grpo_norm, self.P * cfg.grpo_group_size,
                                count_tokens(groups), limit)
        prompts, start = left_pad([g.prompt for g in chosen + fillers])
        advantages = np.concatenate([g.advantages for g in chosen + fillers])[:, None]
        arrays = {
            "prompts": prompts, "completions": mx.array(completions),
            "old_logprobs": mx.array(old_logprobs), "weights": mx.array(weights),
            "advantages": mx.array(advantages.astype(np.float32)),              # (N, 1)
            "mean_weights": mx.array(mask / count_tokens(live)),    # of reported means; 0: no token
        }
        if start is not None:
            arrays["start"] = start
        if cfg.grpo_kl_weight > 0 or cfg.grpo_ratio == "base":
            # evaluated here: lazily it would be computed, and timed, within the update. The graph
            # is traced, if it has to be, while the adapters are off
            with adapters_off(self.model):
                scores = map_rows(self.score, arrays, self.model.parts)
            arrays["ref_logprobs"] = mx.concatenate(scores)                     # (N, C)
        row_weights = arrays["weights"][:, 0]       # a completion's own: its first token is real
        return arrays | self.task.arrays(chosen + fillers, row_weights, step)

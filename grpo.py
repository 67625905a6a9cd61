"""GRPO's batches: sample a group of completions for every prompt, reward them, compare within it.

A completion's advantage is its reward minus the mean of its group's others, so no value network is
needed (DeepSeekMath 2402.03300). This file makes the batches; losses.policy_loss reads them, and
the optimizer stays in train.py. Where we differ from the paper: the mean leaves the completion
itself out (RLOO 2402.14740) and is not divided by the group's spread, and the loss is divided by a
constant, not by each completion's length (Dr. GRPO 2503.20783); both are options. Tests hold this
against three mistakes of public code (study/prior_work.md).

    old policy        the weights that sampled; its log-probabilities are kept while sampling
    reference policy  the base model: this model with its adapters off; only the KL term reads it

Level blindness: advantages compare inside a group, so a policy that gets worse everywhere sees
nothing wrong. The KL term and CollapseGuard are what does.
"""
import importlib.util
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

import parallel
from config import BadInput, Config
from data import Problem, encode_prompt_of, grade
from distributed import rank, share, size
from generate import Completion, check_context, left_pad, sample
from lora import adapters_off, fused_for_decoding
from losses import token_logprobs
from model import Llama
from tokenizer import Tokenizer

FLAT = 1e-6      # a group whose rewards differ by less carries no signal
REDRAWS = 3      # fresh prompts, where every group of a step is flat
PAD_GROUPS = 8   # updates hold a multiple of so many groups: few shapes, few traces of mx.compile


# --------------------------------------------------------------------------------------------------
# rewards: pure functions of a problem and a completion


def reward_correct(problem: Problem, completion: Completion) -> tuple[float, dict[str, float]]:
    """1 where the whole completion is the answer and it stopped by itself, else 0. No part marks.

    Substrings, lists of numbers, cut completions: nothing. Each was exploited somewhere.
    """
    right = float(grade(problem.answer, completion.text, completion.finished))
    return right, {"correct": right}


def load_reward(name: str):
    """`correct`, or FILE.py:FUNCTION of (problem, completion) -> float or (float, parts).

    raises   BadInput
    """
    if name == "correct":
        return reward_correct
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise BadInput(f"grpo_reward = {name!r}: expected correct, self, or FILE.py:FUNCTION")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # a user's file may raise anything
        raise BadInput(f"grpo_reward = {name!r} does not load ({error!r})") from None


def score_completion(reward, problem: Problem, completion: Completion) -> tuple[float, dict]:
    """Call a reward function; raises BadInput where it raises or returns what is no number."""
    where = f"grpo_reward on prompt {problem.prompt!r}, completion {completion.text[:40]!r}"
    try:
        result = reward(problem, completion)
        value, parts = result if isinstance(result, tuple) else (result, {})
        value = float(value)
    except Exception as error:  # a user's function may raise anything
        raise BadInput(f"{where} raised {error!r}; mend the function") from None
    if not math.isfinite(value):
        raise BadInput(f"{where} returned {value}; expected a finite number")
    return value, {name: float(part) for name, part in parts.items()}


def self_reward(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
                completions: list[Completion]) -> np.ndarray:
    """log p(answer, EOS | BOS, completion, "=") under the model itself, nats per token, (N,).

    The judge is the patient: if the weights drift, every completion of a group sinks together, and
    advantages do not see it. The reward of the published collapse; configs/collapse.yaml uses it.
    """
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


# --------------------------------------------------------------------------------------------------
# advantages


def spreads(rewards: np.ndarray, scale: str = "none", floor: float = 0.0) -> np.ndarray:
    """What the advantages of (P, G) rewards are divided by, (P, 1).

    scale    none | batch (the standard deviation of all rewards) | group (the group's own, as
             DeepSeekMath: it weighs a prompt of success rate p by 1 / sqrt(p (1 - p)))
    floor    the least divisor: groups that hardly differ are not blown up to unit spread. Flat
             groups are no exception: Markovian training divides its answer term by the same, which
             would jump where a group becomes flat
    """
    P = rewards.shape[0]
    own = {"none": np.ones(P), "batch": np.full(P, rewards.std()), "group": rewards.std(1)}[scale]
    return np.maximum(own, floor)[:, None]


def flat_groups(rewards: np.ndarray) -> np.ndarray:
    """Which of P groups carry no signal: (P, G) -> (P,) bool.

    The zero test is on the spread itself: dividing by (std + 1e-8) turns twelve float32 rewards of
    1.35, whose std is 2e-7 by rounding, into advantages near 1.
    """
    return np.ptp(rewards, axis=1) < FLAT


def group_advantages(rewards: np.ndarray, scale: str = "none", floor: float = 0.0) -> np.ndarray:
    """Leave-one-out advantages of (P, G) rewards over `spreads`; a flat group's are exactly 0.

    example  [[1, 0, 0, 0]] -> [[1, -1/3, -1/3, -1/3]]: R_i minus the mean of the other three
    """
    G, flat = rewards.shape[1], flat_groups(rewards)
    advantages = (rewards - rewards.mean(1, keepdims=True)) * G / (G - 1)
    advantages[flat] = 0
    advantages[~flat] /= spreads(rewards, scale, floor)[~flat]
    return advantages


def token_weights(mask: np.ndarray, norm: str, n_rows: float, n_tokens: float,
                  limit: int) -> np.ndarray:
    """What each token counts in the loss, (N, C), from the (N, C) mask of a micro-batch.

    norm              constant: 1 / (n_rows * limit), no length bias (Dr. GRPO)
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
# the collapse guard


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


# --------------------------------------------------------------------------------------------------
# the batch source


def draw_problems(problems: list, seed: int, start: int, count: int) -> list:
    """Problems start .. start + count - 1 of an endless stream, shuffled anew at every epoch."""
    n, drawn = len(problems), []
    for epoch in range(start // n, (start + count - 1) // n + 1):
        order = np.random.default_rng((seed, epoch)).permutation(n)
        first, last = max(start - epoch * n, 0), min(start + count - epoch * n, n)
        drawn += [problems[i] for i in order[first:last]]
    return drawn


@dataclass
class Group:
    """One problem's prompt and its G completions, rewarded and compared."""
    problem: Problem
    prompt: list[int]
    completions: list[Completion]
    rewards: np.ndarray         # (G,)
    advantages: np.ndarray      # (G,)
    spread: float               # what the advantages were divided by


def exchange(done: list[Completion], judged: dict[str, np.ndarray]
             ) -> tuple[list[Completion], dict[str, np.ndarray]]:
    """All processes' completions and what was judged of them, in the order of the prompts."""
    if size() == 1:
        return done, judged
    parts = share([[[c.ids, c.text, c.finished, c.logprobs.tolist(), c.entropies.tolist()]
                    for c in done], {name: values.tolist() for name, values in judged.items()}])
    done = [Completion(ids, text, finished, *(np.array(x, np.float32) for x in kept))
            for rows, _ in parts for ids, text, finished, *kept in rows]
    return done, {name: np.concatenate([np.array(part[name]) for _, part in parts])
                  for name in judged}


class Rollouts:
    """Batches sampled from the model as it is now.

    `at` is a function of the weights, the seed and `position`, the number of problems drawn so far,
    so that a resumed run draws and samples what the uninterrupted one would have. Another kind of
    reward, such as markovian.Chains, replaces `judge` and adds to `make_arrays`.
    """
    many_lines = False      # a completion ends at a line break

    def __init__(self, model: Llama, tokenizer: Tokenizer, problems: list[Problem], cfg: Config):
        self.model, self.tokenizer, self.cfg = model, tokenizer, cfg
        self.P, self.limit = cfg.batch_size // cfg.grpo_group_size, cfg.rollout_tokens
        self.position, self.guard, self.best = 0, CollapseGuard(), {}
        self.reward = None if cfg.grpo_reward == "self" else load_reward(cfg.grpo_reward)
        self.needs_reference = cfg.grpo_kl_weight > 0 or cfg.grpo_ratio == "base"
        prompts = [self.encode(p) for p in problems]
        self.problems = list(zip(problems, prompts))
        check_context(prompts, self.limit, model)
        # the state is an input, or the compiled function would keep today's weights for ever
        self.score = partial(mx.compile, inputs=[model.state])(self._score)

    def encode(self, problem: Problem) -> list[int]:
        return encode_prompt_of(problem, self.tokenizer)

    @property
    def lr_scale(self) -> float:
        """What the guard has made of the learning rate: half for each revert."""
        return 0.5 ** self.guard.reverts

    def _score(self, arrays: dict[str, mx.array]) -> mx.array:
        resid = self.model.completion_resid(arrays["prompts"], arrays.get("start"),
                                            arrays["completions"])
        return self.model.read_logits(                                  # (N, C)
            lambda logits, tokens: token_logprobs(logits / self.cfg.grpo_temperature, tokens),
            resid, arrays["completions"], slopes=False)

    def at(self, step: int) -> tuple[list[list[dict[str, mx.array]]], dict]:
        """Sample, reward and compare; returns (updates, metrics), an update being micro-batches.

        No updates where all groups are flat, or where the guard sees a collapse: `collapsed` in the
        metrics then says why; `best` says that the weights are the best so far.
        raises   BadInput, for flat groups at step 0: then the data is at fault
        """
        start, self.step = time.perf_counter(), step
        for redraw in range(1 + REDRAWS):
            groups, metrics = self.rollout()
            live = [g for g in groups if self.is_live(g)]
            if live:
                break
        metrics["redraws"] = redraw
        if not live and step == 0:
            raise BadInput(
                f"every group of {1 + REDRAWS} batches is flat: all {self.cfg.grpo_group_size} "
                f"completions of a prompt earn the same reward (mean {metrics['reward']:.3g}), so "
                "there is nothing to compare; use problems of middling difficulty, another "
                "grpo_reward, a larger grpo_group_size, or train with SFT first")
        verdict = self.guard.observe(metrics["reward"], metrics["reward_std"], metrics["entropy"],
                                     metrics["repetition"]) if self.cfg.grpo_guard else ""
        if verdict == "best":
            metrics["best"] = True
        elif verdict:
            live, metrics["collapsed"] = [], verdict
        metrics["reverts"] = self.guard.reverts
        sampled = time.perf_counter()
        updates = self.make_updates(live) if live else []
        metrics["rollout_s"], metrics["score_s"] = sampled - start, time.perf_counter() - sampled
        return updates, metrics

    def is_live(self, group: Group) -> bool:
        """Whether an update can learn anything from a group."""
        return bool(group.advantages.any())

    def judge(self, asked: list[Problem], done: list[Completion]) -> dict[str, np.ndarray]:
        """N completions' `reward`, its parts as reward_NAME, and `right`; (N,) each."""
        if self.reward is None:
            rewards, parts = self_reward(self.model, self.tokenizer, asked, done), []
        else:
            scored = [score_completion(self.reward, p, c) for p, c in zip(asked, done)]
            rewards, parts = np.array([r for r, _ in scored]), [p for _, p in scored]
        right = np.array([grade(p.answer, c.text, c.finished) for p, c in zip(asked, done)])
        return {"reward": rewards, "right": right, **{
            f"reward_{n}": np.array([p[n] for p in parts]) for n in (parts[0] if parts else {})}}

    def summarize(self, judged: dict[str, np.ndarray], done: list[Completion]) -> dict:
        """What to report of N judged completions."""
        right, lengths = judged["right"], np.array([len(c.ids) for c in done])
        of = lambda which: float(lengths[which].mean()) if which.any() else None
        return {**{n: float(v.mean()) for n, v in judged.items() if n.startswith("reward_")},
                "accuracy": float(right.mean()), "length_right": of(right),
                "length_wrong": of(~right)}

    def rollout(self) -> tuple[list[Group], dict]:
        """Draw P problems, sample G completions of each, reward them; (groups, metrics).

        Of several processes each takes P / size() problems, and all get all completions.
        """
        cfg, G = self.cfg, self.cfg.grpo_group_size
        drawn = draw_problems(self.problems, cfg.seed, self.position, self.P)
        each = self.P // size()
        before, own = rank() * each, drawn[rank() * each:(rank() + 1) * each]
        key = mx.random.key((cfg.seed << 32) + self.position)
        with fused_for_decoding(self.model):
            done = sample(self.model, self.tokenizer, [ids for _, ids in own], self.limit, G,
                          cfg.grpo_temperature, key=key, many_lines=self.many_lines,
                          before=before, after=self.P - before - each)
        done, judged = exchange(done, self.judge([p for p, _ in own for _ in range(G)], done))
        self.position += self.P     # not before: a reward that raised is asked again after resuming
        rewards = judged["reward"]
        table = rewards.reshape(-1, G)
        groups = self.compare(drawn, done, table)
        lengths = np.array([len(c.ids) for c in done])
        # rows and tokens of an update, flat groups included
        self.totals = len(done) / cfg.grpo_minibatches, lengths.sum() / cfg.grpo_minibatches
        metrics = {
            "reward": float(rewards.mean()), "reward_std": float(rewards.std()),
            "reward_min": float(rewards.min()), "reward_max": float(rewards.max()),
            **self.summarize(judged, done),
            "flat_groups": float(flat_groups(table).mean()), "length": float(lengths.mean()),
            "truncated": float(np.mean([not c.finished for c in done])),
            "entropy": float(np.mean(np.concatenate([c.entropies for c in done]))),
            "logprob": float(np.mean(np.concatenate([c.logprobs for c in done]))),
            "repetition": float(np.mean([repetition(c.ids) for c in done])),
            "n_tokens": int(lengths.sum()), "rows": [self.position - self.P, self.position],
        }
        return groups, metrics

    def compare(self, drawn: list[tuple[Problem, list[int]]], done: list[Completion],
                rewards: np.ndarray) -> list[Group]:
        """Put P problems, their P * G completions and (P, G) rewards together, with advantages."""
        cfg, G = self.cfg, rewards.shape[1]
        advantages = group_advantages(rewards, cfg.grpo_advantage, cfg.grpo_spread_floor)
        divisors = spreads(rewards, cfg.grpo_advantage, cfg.grpo_spread_floor)[:, 0]
        return [Group(problem, prompt, done[i * G:(i + 1) * G], rewards[i], advantages[i],
                      float(divisors[i])) for i, (problem, prompt) in enumerate(drawn)]

    def make_updates(self, live: list[Group]) -> list[list[dict[str, mx.array]]]:
        """Cut the groups with a signal into updates, epochs outside, and those into micro-batches.

        Flat groups are left out, of the KL term too, but count in the denominators.
        """
        cfg, rng = self.cfg, np.random.default_rng((self.cfg.seed, self.position))
        n_updates, n_parts = cfg.grpo_minibatches, cfg.grad_accum_steps
        updates = []
        for epoch in range(cfg.grpo_epochs):
            order = rng.permutation(len(live)) if n_updates > 1 else np.arange(len(live))
            for chosen in np.array_split(order, n_updates):
                if not len(chosen):
                    continue
                parts = [p.tolist() for p in np.array_split(chosen, n_parts)]
                parts = [p for p in parts if p or size() > 1]   # as many for every process
                n_groups = -(-max(map(len, parts)) // PAD_GROUPS) * PAD_GROUPS
                n_groups = min(n_groups, -(-self.P // n_parts))
                tokens = sum(len(c.ids) for i in chosen for c in live[i].completions)
                stale = epoch > 0 or len(updates) > 0
                updates.append([self.make_arrays([live[i] for i in part], live[chosen[0]], n_groups,
                                                 tokens, stale) for part in parts[rank()::size()]])
        return updates

    def make_arrays(self, groups: list[Group], filler: Group, n_groups: int, update_tokens: int,
                    stale: bool) -> dict[str, mx.array]:
        """One micro-batch, filled up to n_groups with copies of `filler` that weigh nothing."""
        cfg, n = self.cfg, len(groups)
        groups = groups + [filler] * (n_groups - n)
        done = [c for g in groups for c in g.completions]
        longest = max(len(c.ids) for c in done)
        C = min(-(-longest // 4) * 4, self.limit)
        table = lambda rows, kind: np.array(
            [list(row) + [0] * (C - len(row)) for row in rows], kind)           # (N, C)
        mask = table([[1] * len(c.ids) for c in done], np.float32)
        mask[n * cfg.grpo_group_size:] = 0
        prompts, start = left_pad([g.prompt for g in groups])
        arrays = {
            "prompts": prompts, "completions": mx.array(table([c.ids for c in done], np.int32)),
            "kept_logprobs": mx.array(table([c.logprobs for c in done], np.float32)),
            "advantages": mx.array(np.concatenate([g.advantages for g in groups])[:, None]
                                   .astype(np.float32)),                        # (N, 1)
            "weights": mx.array(token_weights(mask, cfg.grpo_norm, *self.totals, self.limit)),
            "shares": mx.array(mask / update_tokens), "stale": mx.array(stale),
        }
        if start is not None:
            arrays["start"] = start
        if self.needs_reference:
            # the graph is traced, if it has to be, while the adapters are off
            with adapters_off(self.model):
                # now: lazily it would be scored, and timed, within the update
                arrays["ref_logprobs"] = mx.concatenate(parallel.evaluate(self.score, arrays))
        return arrays

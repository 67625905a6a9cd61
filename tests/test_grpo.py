"""GRPO against hand-written REINFORCE, finite differences and itself cut into other pieces."""
import dataclasses
import json
import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import (
    CHAT,
    TINY,
    assert_one_clear_line,
    check_finite_differences,
    config,
    grads_of,
    kill_and_continue,
    lora_model,
    loss_of,
    run,
    small_config,
    small_model,
    write_model,
)
from mlx.utils import tree_flatten

from checkpoint import load_base
from config import load_config
from engine.decode import fused_for_decoding
from eval import make_report
from files.keys import BadInput
from files.run_folder import training_arrays
from files.user_reward import call_rewards, load_rewards
from generate import Completion, sample
from grpo import Answers, Rollouts, group_advantages, token_weights
from lora import adapters_off, apply_lora
from losses import kl_estimates, policy_loss, token_logprobs
from report.rollouts import CollapseGuard, repetition
from tasks.published import make_question
from text.arithmetic import make_problem, sample_train
from text.rows import draw_problems, ends_of_reply, load_split, messages_of
from text.tokenizer import load_tokenizer
from train import accumulate, compile_step, make_optimizer, train

PROBLEMS = [make_problem("add", 3, 4), make_problem("multiply", 12, 11, "what is {a} times {b}"),
            make_problem("subtract", 95, 7), make_problem("add", 60, 9)]


def by_length(problem, completion):
    """A reward with a spread on a random model: something to learn from at once."""
    return len(completion.ids) + 0.1 * (completion.ids[0] % 7)


def rollouts(model, tokenizer, **keys):
    keys = {"method": "grpo", "batch_size": 16, "grpo_group_size": 4, "max_completion_tokens": 5,
            "lora_rank": 4, **keys}
    cfg = config(**keys)
    source = Rollouts(model, PROBLEMS, cfg, Answers(model, tokenizer, PROBLEMS, cfg))
    source.task.functions = [("by_length", by_length, 1.0)]
    return source


def updates_of(source, groups):
    """All updates from all of these groups."""
    return source.make_updates(groups, groups, step=0)


def close(a, b, tolerance):
    return max(np.abs(a[k] - b[k]).max() for k in a) <= tolerance


# --- the objective by itself


def test_policy_loss_by_hand():
    """Each branch of the docstring: clipped above, below, dual clip, and a plain token."""
    cases = [  # ratio, A -> surrogate
        (1.5, 1.0, 1.28), (1.1, 1.0, 1.1), (0.5, 1.0, 0.5),
        (0.5, -1.0, -0.8), (1.5, -1.0, -1.5), (5.0, -1.0, -3.0)]
    for ratio, advantage, surrogate in cases:
        loss, _ = policy_loss(mx.array([[math.log(ratio)]]), mx.zeros((1, 1)),
                              mx.array([[advantage]]), mx.ones((1, 1)), 0.2, 0.28, 3.0)
        assert abs(-loss.item() - surrogate) < 1e-5, (ratio, advantage)
    unbounded, _ = policy_loss(mx.log(mx.array([[5.0]])), mx.zeros((1, 1)), mx.array([[-1.0]]),
                               mx.ones((1, 1)), 0.2, 0.28, 0)
    assert abs(unbounded.item() - 5) < 1e-5


def reinforce(theta, tokens, advantages, weights):
    """Sum of weight * A * log softmax(theta[position])[token], negated: float64, no library."""
    logprobs = theta - np.log(np.exp(theta).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logprobs[None].repeat(len(tokens), 0), tokens[..., None], -1)
    return -(weights * advantages * chosen[..., 0]).sum()


def test_gradient_is_reinforce_on_five_tokens():
    """At ratio 1: against REINFORCE's finite differences, for a table policy of 3 positions."""
    rng = np.random.default_rng(0)
    theta, tokens = rng.normal(size=(3, 5)), rng.integers(0, 5, (6, 3))
    advantages, weights = rng.normal(size=(6, 1)), rng.random((6, 3))
    numeric = np.zeros_like(theta)
    for i in np.ndindex(*theta.shape):
        step = np.zeros_like(theta)
        step[i] = 1e-5
        numeric[i] = (reinforce(theta + step, tokens, advantages, weights)
                      - reinforce(theta - step, tokens, advantages, weights)) / 2e-5
    as32 = lambda x: mx.array(x.astype(np.float32))

    def ours(table):
        logprobs = token_logprobs(mx.broadcast_to(table, (6, 3, 5)), mx.array(tokens))
        return policy_loss(logprobs, mx.stop_gradient(logprobs), as32(advantages), as32(weights),
                           0.2, 0.28, 3.0)[0]
    np.testing.assert_allclose(np.array(mx.grad(ours)(as32(theta))), numeric, atol=2e-6)


def test_kl_estimates():
    """On average over the policy: k1 and k3 are the KL; k2's gradient is the KL's, k1's is 0."""
    rng = np.random.default_rng(1)
    theta, ref = rng.normal(size=6).astype(np.float32), mx.array(rng.normal(size=6))
    log_softmax = lambda x: x - mx.logsumexp(x)
    exact = lambda t: (mx.softmax(t) * (log_softmax(t) - log_softmax(ref))).sum()
    p = mx.softmax(mx.array(theta))
    kl = exact(mx.array(theta)).item()

    def expected(name):
        return lambda t: (p * kl_estimates(log_softmax(t), log_softmax(ref))[name]).sum()
    assert abs(expected("kl_k1")(mx.array(theta)).item() - kl) < 1e-5
    assert abs(expected("kl_k3")(mx.array(theta)).item() - kl) < 1e-5
    true = np.array(mx.grad(exact)(mx.array(theta)))
    gradient = lambda name: np.array(mx.grad(expected(name))(mx.array(theta)))
    np.testing.assert_allclose(gradient("kl_k2"), true, atol=1e-5)
    np.testing.assert_allclose(gradient("kl_k1"), 0, atol=1e-6)
    assert np.abs(gradient("kl_k3") - true).max() > 0.05


def test_advantages():
    np.testing.assert_allclose(group_advantages(np.array([[1.0, 0, 0, 0]])),
                               [[1, -1 / 3, -1 / 3, -1 / 3]])
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    loo = [[r - (row.sum() - r) / 4 for r in row] for row in rewards]
    np.testing.assert_allclose(group_advantages(rewards), loo)
    np.testing.assert_allclose(group_advantages(rewards, "none", floor=2.0), loo)  # no std to bound
    np.testing.assert_allclose(group_advantages(rewards, "group").std(1), 1.25)
    np.testing.assert_allclose(group_advantages(rewards, "batch"), loo / rewards.std())


@pytest.mark.parametrize("scale", ["none", "batch", "group"])
def test_zero_variance_groups_are_exactly_zero(scale):
    """Twelve float32 rewards of 1.35: their std is rounding, and must not be divided by."""
    flat = np.full((1, 12), np.float32(1.35)) + np.float32(1e-7) * (np.arange(12) % 2)
    mixed = np.concatenate([flat, np.eye(1, 12)])
    advantages = group_advantages(mixed, scale)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).all()
    assert (group_advantages(flat, scale) == 0).all()


def test_token_weights():
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], float)
    assert token_weights(mask, "constant", 2, 6, 8).sum() == 6 / 16
    assert token_weights(mask, "token", 2, 6, 8).sum() == 1
    np.testing.assert_allclose(token_weights(mask, "sequence", 2, 6, 8).sum(1), [0.5, 0.5])


# --- rewards


# all of them are graded as finished, except the last two: right, but cut by the length limit
HACKS = ["37 37", "373737", "37.0", "37 38", "1 37", "3 7", "37!", "37,", "--37", "-37", "37    37",
         "the answer is 37", "answer=37", "thirty seven", "30 + 7", "9**9**9", "0x25", "1e2", "",
         "٣٧", "3" * 5000, "037 ", "37"]


def judged(problem, completion, tokenizer, **keys):
    answers = Answers(None, tokenizer, [problem], config(method="grpo", **keys))
    return {name: values.tolist() for name, values in
            answers.rewards([problem], [completion]).items()}


@pytest.mark.parametrize("text", HACKS)
def test_reward_hacks_score_nothing(tokenizer, text):
    problem = make_problem("add", 30, 7)
    completion = Completion([5], text, text not in HACKS[-2:], np.zeros(1), np.zeros(1))
    assert judged(problem, completion, tokenizer) == {"reward": [0.0], "right": [0.0]}


def test_reward_right_answer(tokenizer):
    completion = Completion([5], "37", True, np.zeros(1), np.zeros(1))
    assert judged(make_problem("add", 30, 7), completion, tokenizer) == {
        "reward": [1.0], "right": [1.0]}


def test_reward_reads_a_whole_solution(tokenizer):
    """Of a question to reason about, as validation does; of any other the reply is the answer."""
    problem = make_question("Solve.", "12 + 7", "19")
    for text, right in (("12 + 7 = 19\nThe answer is 19.", 1), ("19 it is, or 20", 0)):
        completion = Completion([5], text, True, np.zeros(1), np.zeros(1))
        for asked, value in ((problem, right), (make_problem("add", 12, 7), 0)):
            assert judged(asked, completion, tokenizer)["reward"] == [value]


@pytest.mark.parametrize("body,message", [
    ("1 / 0", "ZeroDivisionError"), ("float('nan')", "nan"), ("'high'", "ValueError"),
    ("None", "TypeError"), ("float('inf')", "inf")])
def test_bad_rewards(tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(f"def reward(problem, completion):\n    return {body}\n")
    completion = Completion([5], "37", True, np.zeros(1), np.zeros(1))
    with pytest.raises(BadInput, match=message):
        call_rewards(load_rewards((f"{path}:reward",)), None, None, PROBLEMS[:1], [completion])


def test_own_reward_and_parts(tmp_path, tokenizer):
    path = tmp_path / "mine.py"
    path.write_text("def reward(p, c):\n    return 0.5, {'short': len(c.text) < 3}\n")
    completion = Completion([5], "37", True, np.zeros(1), np.zeros(1))
    assert judged(PROBLEMS[0], completion, tokenizer, grpo_reward=(f"{path}:reward",)) == {
        "reward": [0.5], "reward_short": [1.0], "right": [0.0]}


def test_rewards_are_added_by_weight(tmp_path, tokenizer):
    """Each apart before its weight, one of weight 0 too; the file is loaded once."""
    path, log = tmp_path / "mine.py", tmp_path / "log"
    path.write_text(f"open({str(log)!r}, 'a').write('loaded ')\n"
                    "def short(p, c):\n    return len(c.text) < 3, {'tokens': len(c.ids)}\n"
                    "def even(model, tokenizer, problems, completions):\n"
                    "    return [c.ids[0] % 2 == 0 for c in completions]\n")
    right, wrong = (Completion(ids, text, True, np.zeros(2), np.zeros(2))
                    for ids, text in (([6], "7"), ([5, 6], "370")))
    problems = [make_problem("add", 3, 4)] * 2
    entries = ("correct", f"{path}:short*0.25", f"{path}:even*-2", )
    answers = Answers(None, tokenizer, problems, config(method="grpo", grpo_reward=entries))
    found = answers.rewards(problems, [right, wrong])
    assert {name: values.tolist() for name, values in found.items()} == {
        "reward": [1 + 0.25 - 2, 0], "reward_correct": [1, 0], "reward_short": [1, 0],
        "reward_tokens": [1, 2], "reward_even": [1, 0], "right": [1, 0]}
    assert log.read_text() == "loaded "
    summary = answers.summarize(found, [right, wrong])
    assert summary["reward_short"] == 0.5 and summary["reward_tokens"] == 1.5
    logged = call_rewards(load_rewards(("correct", f"{path}:even * 0")), None, None, problems,
                          [right, wrong])
    assert logged["reward"].tolist() == [1, 0] and logged["reward_even"].tolist() == [1, 0]


@pytest.mark.parametrize("entries,message", [
    ((), "''.*expected correct, or FILE.py:FUNCTION"), (("correct*much",), "a weight, such as"),
    (("correct", "correct*2"), "two rewards named correct"), (("mine.py:",), "expected correct"),
    (("correct *x",), "expected correct"), (("FILE:number",), "not a callable"),
    (("FILE:std", "correct"), "another reward_std"),
    (("FILE:clash",), "another reward_max"), (("FILE:uneven",), "parts.*of an earlier one"),
    (("FILE:few",), "grpo_reward few raised ValueError"),
    (("FILE:part",), "grpo_reward part on prompt.*ValueError")])
def test_rewards_that_do_not_add_up(tmp_path, entries, message):
    path = tmp_path / "mine.py"
    path.write_text("number = 3\n\ndef std(p, c):\n    return 1\n\n"
                    "def clash(p, c):\n    return 1, {'max': 2}\n\n"
                    "def part(p, c):\n    return 1, {'style': 'good'}\n\n"
                    "def uneven(p, c):\n    return 1, {c.text: 1}\n\n"
                    "def few(model, tokenizer, problems, completions):\n    return [1]\n")
    done = [Completion([5], text, True, np.zeros(1), np.zeros(1)) for text in "ab"]
    with pytest.raises(BadInput, match=message):
        rewards = load_rewards(tuple(entry.replace("FILE", str(path)) for entry in entries))
        call_rewards(rewards, None, None, PROBLEMS[:2], done)


# --- conversations, and what else a row says


ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say 7"}]
TALKS = [{"messages": [*ASKED, {"role": "assistant", "content": "7"}], "level": 3, "tags": ["a"]},
         {"messages": ASKED, "level": 1}, {"prompt": "3 + 4 = ", "level": 2}]


def write_rows(folder, rows):
    """A data folder with the same rows in each split."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """The small random model with a chat template."""
    folder = write_model(tmp_path_factory.mktemp("models") / "chat", small_config(), TINY)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def level_reward(tmp_path, more=""):
    path = tmp_path / "level.py"
    path.write_text(f"def level(problem, completion):\n    level = problem.columns['level']{more}\n"
                    "    return level * (completion.ids[0] % 2)\n\n"
                    "def short(problem, completion):\n    return len(completion.text) < 9\n")
    return path


@pytest.mark.parametrize("template", ["lines", "plain", "cued", "chat"])
def test_prompts_in_a_template(tmp_path, chat_folder, template):
    """What encode_messages gives for a row's messages but the gold reply, or for its prompt."""
    tokenizer, cfg = load_tokenizer(chat_folder), config(
        method="grpo", template=template, grpo_reward=(f"{level_reward(tmp_path)}:level",),
        data=str(write_rows(tmp_path / "data", TALKS[2:] if template == "cued" else TALKS)))
    problems = load_split(cfg, "train")
    answers = Answers(None, tokenizer, problems, cfg)
    asked = [[{"role": "user", "content": "3 + 4 = "}]]
    asked = asked if template == "cued" else [ASKED, ASKED, *asked]
    assert answers.prompts == [tokenizer.encode_messages(m, template)[0] for m in asked]
    if template == "chat":
        assert tokenizer.decode(answers.prompts[-1]).strip() == "user: 3 + 4 =\nassistant:"
        assert [p.answer for p in problems] == ["7", "", ""]
    stops = {"lines": ("\n",), "chat": ()}.get(template, answers.ends["stops"])
    assert answers.ends["many_lines"] and answers.ends["stops"] == stops
    assert stops or template == "chat"


def test_ends_of_a_reply():
    """A line break does, but in chat, or where a reply has lines or is not there."""
    one = [make_problem("add", 3, 4)]
    two = [*one, dataclasses.replace(one[0], answer="7\nor so")]
    open_ = [*one, dataclasses.replace(one[0], answer="")]
    ends = partial(ends_of_reply, tokenizer=load_tokenizer(TINY))
    for template in ("none", "lines", "plain"):
        assert ends(one, template=template) == {}
    for problems in (two, open_):
        assert ends(problems, template="none") == {"many_lines": True}
        found = ends(problems, template="plain")
        assert found["many_lines"] and "\nUser:" in found["stops"]


def test_completions_in_chat_hold_lines_and_end_at_its_token(chat_folder):
    """Sampled, scored and judged behind the template: a line break goes on, EOS ends."""
    model, tokenizer = lora_model(), load_tokenizer(chat_folder)
    cfg = config(method="grpo", batch_size=128, grpo_group_size=32, max_completion_tokens=64,
                 template="chat")
    source = Rollouts(model, PROBLEMS, cfg, Answers(model, tokenizer, PROBLEMS, cfg))
    source.task.functions = [("by_length", by_length, 1.0)]
    groups, _ = source.rollout()
    done = [c for g in groups for c in g.completions]
    assert any("\n" in c.text for c in done) and any(c.finished for c in done)
    assert all(c.finished == (c.ids[-1] in tokenizer.eos_ids) for c in done)
    for group in groups:
        asked = messages_of(group.problem)[:1]
        assert group.prompt == tokenizer.encode_messages(asked, "chat")[0]
    arrays = updates_of(source, groups)[0][0]
    real = np.array(arrays["weights"]) > 0
    rescored, old = np.array(source.score(arrays)), np.array(arrays["old_logprobs"])
    assert np.abs(rescored - old)[real].max() < 1e-4


def test_columns_reach_the_reward(tmp_path, tokenizer):
    """Any JSON value; problems with columns are still told apart, and put into sets."""
    cfg = config(method="grpo", template="plain", data=str(write_rows(tmp_path / "data", TALKS)),
                 grpo_reward=(f"{level_reward(tmp_path)}:level",))
    problems = load_split(cfg, "train")
    assert [p.columns for p in problems] == [{"level": 3, "tags": ["a"]}, {"level": 1},
                                             {"level": 2}]
    done = [Completion([5], "x", True, np.zeros(1), np.zeros(1)) for _ in problems]
    found = Answers(None, tokenizer, problems, cfg).rewards(problems, done)
    assert found["reward"].tolist() == [3, 1, 2] and "right" not in found
    other = [dataclasses.replace(p, columns={"level": 9}) for p in problems]
    assert len({*problems, *other, *load_split(cfg, "train")}) == 6


# --- rollouts and their scoring on a model


def test_first_update_has_ratio_one_and_no_kl(tokenizer):
    """Adapters untouched: ratio exactly 1, no KL, and a policy gradient all the same."""
    model = lora_model(touched=False)
    source = rollouts(model, tokenizer)
    updates, metrics = source.at(0)
    _, parts, grads = grads_of(model, source.cfg, updates[0])
    assert [parts[k] for k in ("ratio", "ratio_max")] == pytest.approx([1, 1], abs=1e-5)
    assert parts["ratio_max"] == 1.0
    # the reference is scored in other parts of the batch, which some CPUs round differently
    assert [parts[k] for k in ("kl_k1", "kl_k2", "kl_k3")] == pytest.approx([0] * 3, abs=1e-6)
    assert parts["kl_old"] == 0
    assert parts["clip_high"] == parts["clip_low"] == parts["dual_clip"] == 0
    assert max(np.abs(g).max() for g in grads.values()) > 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_old_logprobs_equal_rescored(tokenizer, temperature):
    """Sampling: fused weights, shared prefill, dropped rows. Scoring: LoRA, one pass, padding."""
    model = lora_model()
    source = rollouts(model, tokenizer, grpo_temperature=temperature)
    updates, _ = source.at(0)
    for arrays in updates[0]:
        rescored, old = np.array(source.score(arrays)), np.array(arrays["old_logprobs"])
        real = np.array(arrays["weights"]) > 0
        assert real.sum() > 10 and np.abs(rescored - old)[real].max() < 1e-4
    _, parts, _ = grads_of(model, source.cfg, updates[0])
    assert parts["sampler_diff_max"] < 1e-4


def test_scores_equal_the_plain_forward(tokenizer):
    """Shared, left-padded prompts against each row by itself, through model(tokens)."""
    model = lora_model()
    source = rollouts(model, tokenizer)
    groups, _ = source.rollout()
    arrays = updates_of(source, groups)[0][0]
    scored = np.array(source.score(arrays))
    assert "start" in arrays
    row = 0
    for group in groups:
        for completion in group.completions:
            ids = group.prompt + completion.ids
            logprobs = token_logprobs(model(mx.array([ids]))[:, :-1], mx.array([ids])[:, 1:])
            expected = np.array(logprobs)[0, len(group.prompt) - 1:]
            assert np.abs(scored[row, :len(expected)] - expected).max() < 1e-5
            row += 1


def test_the_prompt_matters(tokenizer):
    """Another prompt changes every token's log-probability: completions are scored behind it."""
    model = lora_model()
    source = rollouts(model, tokenizer)
    arrays = source.at(0)[0][0][0]
    other = {**arrays, "prompts": mx.where(arrays["prompts"] > 2, arrays["prompts"] + 1, 1)}
    real = np.array(arrays["weights"]) > 0
    change = np.abs(np.array(source.score(arrays)) - np.array(source.score(other)))
    assert change[real].min() > 0


def test_eos_is_trained_and_nothing_after_it(tokenizer):
    """The stop token carries weight; changing what stands behind it changes no gradient."""
    model = lora_model()
    source = rollouts(model, tokenizer, max_completion_tokens=4)
    groups, _ = source.rollout()
    for group in groups:  # as if every row had stopped at its second token
        for c in group.completions:
            c.ids[:] = [c.ids[0], tokenizer.eos_id]
            c.logprobs = c.logprobs[:1].repeat(2)
    arrays = updates_of(source, groups)[0][0]
    weights = np.array(arrays["weights"])
    assert (weights[:, 1] > 0).all() and (weights[:, 2:] == 0).all()
    _, _, grads = grads_of(model, source.cfg, [arrays])
    garbage = np.array(arrays["completions"])
    garbage[:, 2:] = 77
    _, _, same = grads_of(model, source.cfg, [{**arrays, "completions": mx.array(garbage)}])
    assert close(grads, same, 0)
    without = {**arrays, "weights": mx.array(np.where(np.arange(4) == 1, 0, weights))}
    _, _, other = grads_of(model, source.cfg, [without])
    assert not close(grads, other, 1e-6)


@pytest.mark.parametrize("norm", ["constant", "token", "sequence"])
def test_micro_batches_and_order_change_nothing(tokenizer, norm):
    """1, 2 and 4 parts, and the groups in another order: same loss and gradient."""
    results, in_order = [], [0, 1, 2, 3]
    for parts, order in ((1, in_order), (2, in_order), (4, in_order), (1, [2, 0, 3, 1])):
        model = lora_model()
        source = rollouts(model, tokenizer, grpo_norm=norm, grad_accum_steps=parts)
        groups, _ = source.rollout()
        update = updates_of(source, [groups[i] for i in order])[0]
        assert len(update) == parts
        results.append(grads_of(model, source.cfg, update))
    for loss, _, grads in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5 and close(grads, results[0][2], 1e-5)


def test_padding_groups_weigh_nothing(tokenizer):
    """One live group of the step's four, filled up with copies, against the same without copies."""
    model = lora_model()
    source = rollouts(model, tokenizer)
    groups, _ = source.rollout()
    alone, filled = (source.make_arrays(groups[:1], groups[:1] * n, groups, groups[:1], step=0)
                     for n in (0, 3))
    assert filled["completions"].shape[0] == 16
    first = {"off_policy": mx.array(False)}
    a, b = (grads_of(model, source.cfg, [x | first]) for x in (alone, filled))
    assert abs(a[0] - b[0]) < 1e-6 and close(a[2], b[2], 1e-6)


def test_zero_variance_groups_make_no_update(tokenizer):
    source = rollouts(lora_model(), tokenizer)
    source.task.functions = [("flat", lambda p, c: 1.35, 1.0)]
    updates, metrics = source.at(step=3)
    assert updates == [] and metrics["zero_variance_groups"] == 1 and metrics["redraws"] == 3
    assert source.position == 4 * 4     # four draws of four prompts
    with pytest.raises(BadInput, match="all 4 completions of every prompt earn the same reward"):
        source.at(step=0)


def test_reference_is_the_start_and_fusing_changes_nothing(tokenizer):
    model, tokens = lora_model(), mx.array([[1, 5, 9, 11]])
    base, own = small_model()(tokens), model(tokens)
    with adapters_off(model):
        assert mx.array_equal(model(tokens), base)
    with fused_for_decoding(model):
        assert mx.abs(model(tokens) - own).max().item() < 1e-5
    assert mx.array_equal(model(tokens), own) and not mx.array_equal(own, base)


def test_later_epochs_use_the_old_logprobs(tokenizer):
    """Second pass: the ratio is policy now over policy that sampled, 1 only by accident."""
    model = lora_model()
    source = rollouts(model, tokenizer, grpo_epochs=3)
    groups, _ = source.rollout()
    updates = updates_of(source, groups)
    assert [bool(u[0]["off_policy"].item()) for u in updates] == [0, 1, 1]
    model.load_weights([(k, v * 1.3) for k, v in tree_flatten(model.trainable_parameters())
                        if "lora_b" in k], strict=False)
    _, parts, _ = grads_of(model, source.cfg, updates[1])
    arrays = updates[1][0]
    ratio = np.exp(np.array(source.score(arrays)) - np.array(arrays["old_logprobs"]))
    real = np.array(arrays["weights"]) > 0
    assert abs(parts["ratio_max"] - ratio[real].max()) < 1e-4
    assert parts["ratio_max"] > 1.01 and parts["kl_old"] > 0


@pytest.mark.parametrize("keys,off_policy,scale", [
    ({"grpo_kl_weight": 0}, True, 1.0),
    # at the first update the old policy is the present one: only the KL term's value moves
    ({"grpo_kl_weight": 0.5}, False, 0.0)])
def test_model_gradient_against_finite_differences(tokenizer, keys, off_policy, scale):
    """The whole real path along random directions: the policy term, then the KL term."""
    model = lora_model()
    source = rollouts(model, tokenizer, **keys)
    arrays = [{**a, "off_policy": mx.array(off_policy), "advantages": a["advantages"] * scale}
              for a in source.at(0)[0][0]]
    _, _, grads = grads_of(model, source.cfg, arrays)
    check_finite_differences(model, lambda: grads_of(model, source.cfg, arrays)[0], grads)


def test_off_policy_updates_measure_both_kls_exactly(tokenizer):
    """All V one-token completions, each weighing what the old policy gives it: sums are exact.

    kl_old is KL(old || now), kl_k1 and kl_k3 are KL(now || reference), and the KL term's gradient
    is that KL's own, though the samples are the old policy's. The policy moves so far that
    kl_estimates(now, old), which is chi-square minus KL, is far off.
    """
    model, prompt = lora_model(), mx.array([tokenizer.encode_prompt("3 + 4 = ")])
    log_policy = lambda model: (lambda x: x - mx.logsumexp(x))(model(prompt)[0, -1])    # (V,)
    old = log_policy(model)
    with adapters_off(model):
        ref = log_policy(model)
    mx.eval(old, ref)
    model.load_weights([(k, v * 2.5) for k, v in tree_flatten(model.trainable_parameters())
                        if "lora_b" in k], strict=False)
    now = log_policy(model)
    kl = lambda p, q: (mx.exp(p) * (p - q)).sum()
    batch = {"prompts": prompt, "completions": mx.arange(len(old))[:, None],        # (V, 1)
             "old_logprobs": old[:, None], "ref_logprobs": ref[:, None],
             "weights": mx.exp(old)[:, None], "mean_weights": mx.exp(old)[:, None],
             "advantages": mx.zeros((len(old), 1)), "off_policy": mx.array(True)}
    _, parts, grads = grads_of(model, config(method="grpo", grpo_kl_weight=1.0), [batch])
    assert parts["kl_old"] == pytest.approx(kl(old, now).item(), rel=1e-4)
    exchanged = (mx.exp(old) * kl_estimates(now, old)["kl_k3"]).sum().item()
    assert exchanged > 1.2 * parts["kl_old"]
    for name in ("kl_k1", "kl_k3"):
        assert parts[name] == pytest.approx(kl(now, ref).item(), rel=1e-4)
    exact = nn.value_and_grad(model, lambda model: kl(log_policy(model), ref))(model)[1]
    exact = {k: np.array(v) for k, v in tree_flatten(exact)}
    assert close(grads, exact, 1e-4 * max(np.abs(g).max() for g in exact.values()))


# --- guards


def test_skipping_leaves_everything_untouched(tokenizer):
    """Ratio beyond 10, a loss that is not finite: weights and AdamW's state keep their bits."""
    model = lora_model()
    source = rollouts(model, tokenizer, lr=0.1)
    updates, _ = source.at(0)
    optimizer = make_optimizer(source.cfg, model)
    loss_and_grads, update = compile_step(source.cfg, model, optimizer, loss_of(source.cfg))

    def take(micro_batches):
        grads, sums, maxima = accumulate(loss_and_grads, micro_batches, model.parts)
        return update(grads, sums | maxima, 0.1)

    take(updates[0])    # momentum is no longer 0
    before = {k: np.array(v) for k, v in training_arrays(model, optimizer).items()}
    late = {**updates[0][0], "off_policy": mx.array(True)}
    far = {**late, "old_logprobs": late["old_logprobs"] - 5}
    broken = {**updates[0][0], "advantages": updates[0][0]["advantages"] * mx.nan}
    moved = {**late, "old_logprobs": late["old_logprobs"] + 0.8}
    for batch, word in ((far, "skipped"), (broken, "skipped"), (moved, "early_stop")):
        record = take([batch])
        assert record[word] == 1
        after = training_arrays(model, optimizer)
        assert all(np.array_equal(before[k], np.array(after[k])) for k in before)
    take(updates[0])
    assert not all(np.array_equal(before[k], np.array(v))
                   for k, v in training_arrays(model, optimizer).items())


def feed(guard, series):
    return [guard.observe(*map(float, row)) for row in series]


def fired(verdicts):
    return [i for i, v in enumerate(verdicts) if v not in ("", "best")]


def test_guard_on_the_published_runs():
    """ARC: answer log-probability -1.8 at first, healthy at step 99, -41 by 999. GSM8K: rising.

    The logs print a few steps; straight lines and the noise of 12 samples stand between them.
    """
    rng = np.random.default_rng(0)
    noise = lambda n, sd: sd * rng.normal(size=n)
    arc = np.concatenate([np.full(100, -1.8), np.linspace(-1.8, -41, 900)]) + noise(1000, 0.4)
    first = fired(feed(CollapseGuard(), [(r, 0.8, 2.0, 0.05) for r in arc]))[0]
    assert 100 < first < 300
    gsm = np.linspace(-2.0, -0.3, 2000) + noise(2000, 0.4)
    assert not fired(feed(CollapseGuard(), [(r, 0.8, e, 0.05)
                                            for r, e in zip(gsm, np.linspace(2, 0.5, 2000))]))


def test_guard_sees_4444_and_lost_entropy():
    healthy = [(0.5, 0.5, 1.0, 0.1)] * 12
    for row, word in (((0.4, 0.5, 0.02, 0.1), "entropy"), ((0.4, 0.5, 0.9, 0.9), "repetition"),
                      ((0.1, 0.5, 0.9, 0.1), "reward")):
        guard = CollapseGuard()
        assert not fired(feed(guard, healthy))
        verdicts = feed(guard, [row] * 14)
        assert word in verdicts[fired(verdicts)[0]]


def test_guard_is_silent_where_a_policy_just_learns():
    """Reward up to 1, entropy down to nothing: certainty, not collapse."""
    rng = np.random.default_rng(0)
    series = [(min(1, 0.4 + 0.01 * i + 0.02 * rng.normal()), 0.49, 0.5 * 0.93 ** i, 0.0)
              for i in range(100)]
    assert not fired(feed(CollapseGuard(), series))


def test_repetition():
    assert repetition([4] * 5) == pytest.approx(2 / 3)
    assert repetition([1, 2, 3, 4, 5]) == repetition([4, 4, 4]) == repetition([]) == 0


def test_problem_stream():
    """Every epoch holds each problem once; the stream does not depend on how it is cut."""
    problems = list(range(10))
    whole = draw_problems(problems, 3, 0, 40)
    assert all(sorted(whole[i:i + 10]) == problems for i in range(0, 40, 10))
    assert whole[:10] != whole[10:20]
    assert [draw_problems(problems, 3, i, 7) for i in (0, 7)] == [whole[:7], whole[7:14]]


# --- whole runs


def first_token_is_odd(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text("def reward(problem, completion):\n    return float(completion.ids[0] % 2)\n")
    return f"{path}:reward"


GRPO_KEYS = {"method": "grpo", "batch_size": 16, "grpo_group_size": 4, "max_completion_tokens": 4,
             "lr": "1e-2"}


def test_it_learns(write_config, tmp_path):
    """A random model is taught to begin with a token of odd number, from samples alone."""
    keys = GRPO_KEYS | {"batch_size": 64, "full": "true", "grpo_kl_weight": 0}
    path, folder = write_config(**keys, grpo_reward=first_token_is_odd(tmp_path), steps=40,
                                eval_every_steps=0)
    run("train.py", path, check=0)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [r["reward"] for r in records if "reward" in r]
    assert 0.3 < np.mean(rewards[:3]) < 0.7 and np.mean(rewards[-3:]) > 0.85
    assert (folder / "curves.png").exists()


def test_curves_without_a_guard(write_config, tmp_path):
    path, folder = write_config(**GRPO_KEYS, grpo_guard="false", steps=3, eval_every_steps=0,
                                grpo_reward=first_token_is_odd(tmp_path))
    run("train.py", path, check=0)
    assert (folder / "curves.png").exists()


def test_kill_and_resume_to_the_same_bits(write_config, tmp_path):
    """Weights, optimizer, draws, guard and best weights: an unbroken run and a killed one."""
    keys = GRPO_KEYS | {"steps": 14, "grpo_reward": first_token_is_odd(tmp_path), "grpo_epochs": 2}
    path, whole = write_config("whole", **keys)
    run("train.py", path, check=0)
    path, killed = write_config("killed", **keys)
    kill_and_continue(path, killed)
    a, b = (mx.load(str(f / "state.safetensors"), return_metadata=True) for f in (whole, killed))
    assert a[0].keys() == b[0].keys() and any(k.startswith("best.") for k in a[0])
    assert all(np.array_equal(np.array(a[0][k]), np.array(b[0][k])) for k in a[0])
    assert a[1] == b[1]
    about = json.loads(a[1]["about"])
    assert len(about["guard"]["recent"]) == 10 and about["position"] >= 14 * 4
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (whole, killed)]
    clocks = ("seconds", "tokens_per_s", "peak_gib", "completions_per_s", "rollout_s", "score_s",
              "update_s")
    plain = [[{k: v for k, v in json.loads(line).items() if k not in clocks} for line in ls]
             for ls in lines]
    assert plain[0] == plain[1]


def test_collapse_recovers_then_stops(write_config, tmp_path):
    """A reward that turns round after some calls: reverts, and at the fourth collapse exit 3."""
    path = tmp_path / "turn.py"
    path.write_text("calls = 0\n\ndef reward(problem, completion):\n    global calls\n"
                    "    calls += 1\n    return completion.ids[0] % 2 - 5.0 * (calls > 16 * 14)\n")
    config_path, folder = write_config(**GRPO_KEYS, steps=90, grpo_reward=f"{path}:reward",
                                       eval_every_steps=0, lens_every_steps=0)
    done = run("train.py", config_path, check=3)
    assert done.stdout.count("best weights restored") == 3
    assert "4th time" in done.stderr and "Traceback" not in done.stderr
    adapters, state = (mx.load(str(folder / f"{n}.safetensors")) for n in ("adapters", "state"))
    for name, array in adapters.items():
        assert mx.array_equal(array, state[f"best.trainable.{name}"])
        assert not mx.array_equal(array, state[f"trainable.{name}"])


def test_sft_run_is_merged_as_the_start(write_config, tmp_path, tokenizer):
    """model: a run folder. Adapters off is then the trained policy, not the base below it."""
    path, sft = write_config("sft", lr="1e-2")
    run("train.py", path, check=0)
    model, _ = load_base(sft)
    assert not any("lora" in k for k, _ in tree_flatten(model.parameters()))
    path, folder = write_config("rl", **GRPO_KEYS, model=sft, steps=2,
                                grpo_reward=first_token_is_odd(tmp_path))
    run("train.py", path, check=0)
    first = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert next(r for r in first if "kl_k3" in r)["kl_k3"] == 0
    run("lora.py", "--ckpt", folder, "--out", tmp_path / "fused", check=0)


@pytest.mark.parametrize("keys,words", [
    ({"grpo_group_size": 1}, ["grpo_group_size", "at least 2"]),
    ({"batch_size": 18}, ["batch_size", "multiple", 4]),
    ({"max_completion_tokens": 200}, ["context", 128]),
    ({"grpo_reward": "beauty"}, ["beauty", "correct", "FILE.py:FUNCTION"]),
    ({"grpo_reward": "nowhere.py:reward"}, ["nowhere.py"]),
    ({"full": "true"}, ["grpo_kl_weight", "full"]),
    ({"grpo_temperature": 0}, ["grpo_temperature", "above 0"]),
    ({"grpo_norm": "mean"}, ["grpo_norm", "constant, token, sequence"]),
    ({"grpo_reward": "correct"}, ["earn the same", "SFT first"]),     # a random model: never right
    ({"mask_prompt": "false"}, ["mask_prompt", "sft or dual_reward"]),
])
def test_bad_input(write_config, keys, words):
    path, folder = write_config(**GRPO_KEYS | keys)
    assert_one_clear_line(run("train.py", path), *words)
    assert not (folder / "adapters.safetensors").exists()


def test_reward_that_fails_late_loses_nothing(write_config, tmp_path):
    """Exit 2 at step 5; mended, the same command goes on there, and ends where it would have."""
    path = tmp_path / "late.py"
    good = ("calls = 0\n\ndef reward(p, c):\n    global calls\n    calls += 1\n{}"
            "    return c.ids[0] % 2\n")
    keys = GRPO_KEYS | {"grpo_reward": f"{path}:reward", "save_every_steps": 0, "steps": 8}
    path.write_text(good.format(""))
    config_path, whole = write_config("whole", **keys)
    run("train.py", config_path, check=0)
    path.write_text(good.format("    assert calls <= 16 * 4 + 3\n"))
    config_path, folder = write_config("late", **keys)
    assert_one_clear_line(run("train.py", config_path), "AssertionError")
    path.write_text(good.format(""))
    done = run("train.py", config_path, check=0)
    assert "continuing after step 4" in done.stdout
    a, b = (mx.load(str(f / "adapters.safetensors")) for f in (whole, folder))
    assert all(np.array_equal(np.array(a[k]), np.array(b[k])) for k in a)


CHAT_KEYS = GRPO_KEYS | {"template": "chat", "max_completion_tokens": 6}


@pytest.mark.parametrize("rows", [TALKS[:1], TALKS])
def test_a_run_in_chat(write_config, tmp_path, chat_folder, rows):
    """Weighted rewards in metrics and report; rows without an answer are judged by them alone.

    Killed, it goes on to the same weights; with a column changed it is refused.
    """
    path, data = level_reward(tmp_path), write_rows(tmp_path / "data", rows * 4)
    keys = CHAT_KEYS | {"model": chat_folder, "data": data, "steps": 8,
                        "grpo_reward": f"[{path}:level, {path}:short*0.5]"}
    config_path, whole = write_config("whole", **keys)
    report = train(load_config(config_path))
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for r in records:
        if "reward" in r:
            assert r["reward"] == pytest.approx(r["reward_level"] + 0.5 * r["reward_short"])
            assert ("accuracy" in r) == (len(rows) == 1)
    seen = {key for r in records for key in r}
    judged = make_report(whole, True, overrides=["max_completion_tokens=6"])
    if len(rows) == 1:
        assert {"valid_accuracy", "lens"} <= seen and judged["accuracy"]["n"] == 4
        assert "reward" not in report
    else:
        assert "valid_reward" in seen and not {"valid_accuracy", "lens"} & seen
        assert report["reward"] == judged["reward"] and judged["base"]["reward"]["n"] == 12
        best = json.loads((whole / "best" / "step.json").read_text())
        assert best["valid_reward"] == max(r["valid_reward"] for r in records
                                           if "valid_reward" in r)
        done = run("eval.py", "--ckpt", whole, "--compare", whole, check=0)
        assert "reward of greedy replies" in done.stdout and "'say 7'" in done.stdout
    config_path, killed = write_config("killed", **keys)
    kill_and_continue(config_path, killed)
    a, b = (mx.load(str(f / "adapters.safetensors")) for f in (whole, killed))
    assert all(np.array_equal(np.array(a[k]), np.array(b[k])) for k in a)
    (killed / "report.json").unlink()
    lines = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(lines.replace('"level": 3', '"level": 4'))
    assert_one_clear_line(run("train.py", config_path), "its data changed")


@pytest.mark.parametrize("keys,words", [
    ({}, ["'level'", "say 7", "columns are tags"]),
    ({"grpo_reward": "correct"}, ["bad rows: line 2", "the assistant last"]),
    ({"grpo_reward": "[correct, nowhere.py:f*2]"}, ["bad rows: line 2", "the assistant last"]),
    ({"method": "sft"}, ["bad rows: line 2", "the assistant last"]),
    ({"model": TINY}, ["without a chat template"])])
def test_bad_input_in_chat(write_config, tmp_path, chat_folder, keys, words):
    path = level_reward(tmp_path)
    data = write_rows(tmp_path / "data", [{**row, "tags": "b"} for row in TALKS])
    text = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text.replace('"level": 1, ', ""))
    keys = CHAT_KEYS | {"model": chat_folder, "data": data, "grpo_reward": f"{path}:level"} | keys
    if keys["method"] == "sft":
        keys = {k: v for k, v in keys.items() if not k.startswith("grpo_")}
    config_path, folder = write_config(**keys)
    assert_one_clear_line(run("train.py", config_path), *words)
    assert not (folder / "adapters.safetensors").exists()


@pytest.mark.parametrize("body,word", [("1 / 0", "ZeroDivisionError"), ("float('nan')", "nan")])
def test_bad_reward_function(write_config, tmp_path, body, word):
    path = tmp_path / "bad.py"
    path.write_text(f"def reward(problem, completion):\n    return {body}\n")
    config_path, _ = write_config(**GRPO_KEYS, grpo_reward=f"{path}:reward")
    assert_one_clear_line(run("train.py", config_path), word, "grpo_reward", "prompt")


def test_the_bundled_model_samples_what_it_scores():
    """On the real weights: sampled against rescored, at the size of a real step."""
    model, tokenizer = load_base(TINY)
    apply_lora(model, 8, 16.0, ("q", "v"))
    cfg = config(method="grpo", batch_size=128)
    problems = sample_train(cfg)
    source = Rollouts(model, problems, cfg, Answers(model, tokenizer, problems, cfg))
    updates, metrics = source.at(0)
    _, parts, _ = grads_of(model, cfg, updates[0])
    assert parts["sampler_diff_max"] < 1e-4 and parts["ratio_max"] == 1
    assert 0.4 < metrics["accuracy"] < 0.95 and metrics["truncated"] < 0.05
    again = sample(model, tokenizer, [tokenizer.encode_prompt("3 + 4 = ")], 4)
    assert again[0].text == "7"

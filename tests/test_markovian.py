"""Markovian training on real paths: what is hidden, what is scored, and where its gradient goes."""
import dataclasses
import json
import random
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import (
    CHAT,
    GOLDEN,
    ROOT,
    TINY_COT,
    assert_one_clear_line,
    check_finite_differences,
    config,
    grads_of,
    kill_and_continue,
    lora_model,
    run,
    small_config,
    write_model,
)
from mlx.utils import tree_flatten

from config import load_config
from files.keys import BadInput
from generate import Completion
from grpo import Rollouts
from lora import adapters_off
from losses import token_logprobs
from markovian import Chains, answer_rewards, evaluate_chains
from report.stats import summarize_chains
from study.perturb import KINDS, perturb
from tasks.__main__ import PUBLISHED_KEYS, write_task
from tasks.published import make_question
from text.questions import HEADER, answer_arrays, answer_prompt, encode_question
from text.tokenizer import load_tokenizer
from train import train

QUESTIONS = [make_question("Add the numbers.", text, answer) for text, answer in
             (("12 + 7 + 30", "49"), ("1 + 2", "3"), ("20 + 20 + 5 + 3", "48"), ("9 + 9", "18"))]


@pytest.fixture(scope="module")
def cot():
    return load_tokenizer(TINY_COT)


@pytest.fixture(scope="module")
def cot_folder(tmp_path_factory):
    """A small random Llama with the vocabulary of models/tiny_cot, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "small_cot"
    return write_model(folder, small_config(source=TINY_COT), TINY_COT)


def cot_model():
    return lora_model(source=TINY_COT)


def chains(model, cot, **keys):
    keys = {"method": "markovian", "batch_size": 16, "grpo_group_size": 4, "chain_tokens": 6,
            "grpo_advantage": "group", "grpo_std_floor": 0.1, "grpo_kl_weight": 0.1, **keys}
    cfg = config(**keys)
    return Rollouts(model, QUESTIONS, cfg, Chains(model, cot, QUESTIONS, cfg))


def largest(grads):
    return max(np.abs(g).max() for g in grads.values())


def difference(a, b):
    return max(np.abs(a[k] - b[k]).max() for k in a)


def silent(arrays, **changes):
    """A micro-batch whose policy term has advantage 0: what is left is the other terms."""
    return {**arrays, "advantages": mx.zeros(arrays["advantages"].shape), **changes}


# --- what is scored


@pytest.mark.parametrize("which", ["sentencepiece", "bpe"])
def test_ids_by_parts_equal_the_whole_text(which, cot, llama3):
    """Prompt, chain, header and answer put together are what the joint text encodes to."""
    tokenizer = cot if which == "sentencepiece" else load_tokenizer(llama3)
    problem, chain = QUESTIONS[0], " 12 + 7 = 19 + 30 = 49"
    for markovian, shown in ((True, problem.hidden), (False, problem.prompt)):
        q = encode_question(problem, tokenizer, markovian)
        ids = answer_prompt(q, [*tokenizer.encode_continuation(chain), tokenizer.eos_id],
                            tokenizer)
        assert ids == tokenizer.encode_prompt(shown + chain + HEADER)
        assert ids + q.answer[:-1] == tokenizer.encode_prompt(shown + chain + HEADER + " 49")
        assert q.answer[-1] == tokenizer.eos_id and len(q.answer) > 1
        assert q.prompt == tokenizer.encode_prompt(problem.prompt)


@pytest.mark.parametrize("which", ["sentencepiece", "bpe"])
@pytest.mark.parametrize("template", ["plain", "cued", "chat"])
def test_in_a_template_the_reply_is_chain_header_and_answer(which, template, llama3):
    """The parts are the conversation's own ids: question or its stand-in, one reply, its end."""
    tokenizer = load_tokenizer(TINY_COT if which == "sentencepiece" else llama3)
    # of the second the template ends a reply with another token than EOS
    end = "eos_token" if which == "sentencepiece" else "'<|eot_id|>'"
    tokenizer.chat_template = CHAT.replace("eos_token", end)
    problem, reply = QUESTIONS[0], f"12 + 7 = 19 + 30 = 49{HEADER} 49"
    chain = tokenizer.encode_continuation(" 12 + 7 = 19 + 30 = 49")
    for markovian, asked in ((True, problem.hidden), (False, problem.prompt)):
        q = encode_question(problem, tokenizer, markovian, template)
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        ids, ((start, stop),) = tokenizer.encode_messages(talk, template, reply_follows=False)
        assert answer_prompt(q, chain, tokenizer) + q.answer == ids[:stop]
        assert q.shown == ids[:start] == tokenizer.encode_messages(talk[:1], template)[0]
        assert ("12 + 7" in tokenizer.decode(q.shown)) != markovian
        assert "12 + 7" in tokenizer.decode(q.prompt)


def test_a_conversation_hides_its_last_message(cot):
    """The turns before it stay; without a template they would be lost."""
    before = (("system", "Be brief."), ("user", "hi"), ("assistant", "ho"))
    problem, chats = QUESTIONS[0], dict(tokenizer=cot, markovian=True, template="plain")
    talk = dataclasses.replace(problem, messages=(
        *before, ("user", problem.prompt), ("assistant", problem.answer)))
    q = encode_question(talk, **chats)
    shown = [{"role": role, "content": text} for role, text in (*before, ("user", problem.hidden))]
    assert q.shown == cot.encode_messages(shown, "plain")[0]
    assert q.prompt == cot.encode_messages([*shown[:-1], {"role": "user", "content":
                                                          problem.prompt}], "plain")[0]
    with pytest.raises(BadInput, match="is a conversation, which needs template"):
        encode_question(talk, cot, True)


def test_the_question_is_hidden_by_construction(cot):
    """Other questions, the same chain: the scored ids and the reward are equal. Shown: not."""
    model, other = cot_model(), make_question("Add the numbers.", "1 + 1 + 1", "49")
    chain = [cot.encode_continuation(" 12 + 7 = 19 + 30 = 49")]
    rewards = {}
    for markovian in (True, False):
        both = [encode_question(p, cot, markovian) for p in (QUESTIONS[0], other)]
        rewards[markovian] = [answer_rewards(model, answer_arrays([q], chain, cot)).item()
                              for q in both]
        scored = [answer_prompt(q, chain[0], cot) for q in both]
        assert (scored[0] == scored[1]) == markovian
    assert rewards[True][0] == rewards[True][1]
    assert abs(rewards[False][0] - rewards[False][1]) > 1e-4


@pytest.mark.parametrize("markovian", [True, False])
def test_rewards_equal_the_plain_forward(markovian, cot):
    """Shared and padded rows against each row by itself; so padding changes nothing."""
    model = cot_model()
    questions = [encode_question(p, cot, markovian) for p in QUESTIONS]
    some = [cot.encode_continuation(text) for text in
            (" 12 + 7 = 19", " about 50", "", " 1 + 2 = 3", " 9", " 20 and 20", " 9 + 9", " 18")]
    found = np.array(answer_rewards(model, answer_arrays(questions, some, cot)))
    for i, chain in enumerate(some):
        q = questions[i // 2]
        ids = answer_prompt(q, chain, cot) + q.answer
        logprobs = token_logprobs(model(mx.array([ids]))[:, :-1], mx.array([ids])[:, 1:])
        assert abs(found[i] - np.array(logprobs)[0, -len(q.answer):].sum()) < 1e-4
    alone = answer_rewards(model, answer_arrays(questions[:1], some[:1], cot)).item()
    assert abs(alone - found[0]) < 1e-5


def test_continuations_are_means_without_eos(cot):
    problem = make_question("Add the numbers.", "about", "12 and 7", wording="continuation")
    q = encode_question(problem, cot, True)
    assert q.mean and q.answer[-1] != cot.eos_id and len(q.answer) == 3
    arrays = answer_arrays([q, encode_question(QUESTIONS[0], cot, True)], [[], []], cot)
    np.testing.assert_allclose(np.array(arrays["share"]), [[1 / 3] * 3, [1, 1, 0]], rtol=1e-6)


def test_judge_scores_both_and_the_config_chooses(cot):
    model = cot_model()
    for scorer in ("actor", "frozen"):
        source = chains(model, cot, markovian_scorer=scorer, markovian_answer_weight=0.0)
        groups, metrics = source.rollout()
        assert metrics["reward"] == pytest.approx(metrics[f"{scorer}_reward"])
        assert abs(metrics["actor_reward"] - metrics["frozen_reward"]) > 1e-3
        group = groups[0]
        with adapters_off(model) if scorer == "frozen" else nullcontext():
            arrays = answer_arrays([source.task.questions[group.problem]],
                                   [c.ids for c in group.completions], cot)
            expected = np.array(answer_rewards(model, arrays))
        np.testing.assert_allclose(group.rewards, expected, atol=1e-4)


def test_eos_may_end_a_chain_and_the_limit_may(cot):
    """EOS is sampled, trained, and left out of what the scorer reads."""
    source = chains(cot_model(), cot, chain_tokens=3)
    q = source.task.questions[QUESTIONS[0]]
    assert answer_prompt(q, [40, cot.eos_id], cot) == q.shown + [40] + q.header
    groups, metrics = source.rollout()
    assert metrics["truncated"] > 0 and metrics["length"] <= 3


# --- the gradient


@pytest.mark.parametrize("markovian", [True, False])
def test_answer_gradient_equals_finite_differences(markovian, cot):
    """The answer term alone, through rollouts, padding and the loss of train.py; it is not 0."""
    model = cot_model()
    source = chains(model, cot, markovian=markovian, markovian_answer_weight=2.0)
    updates, _ = source.at(0)
    cfg = config(**{**vars(source.cfg), "grpo_kl_weight": 0.0, "grpo_ratio": "base"})
    batches = [silent(arrays) for arrays in updates[0]]
    _, parts, grads = grads_of(model, cfg, batches)
    assert largest(grads) > 1e-4
    check_finite_differences(model, lambda: grads_of(model, cfg, batches)[1]["answer_loss"], grads)


def test_weight_one_is_the_gradient_of_the_expected_reward(cot):
    """Advantages in nats: each row's answer term weighs what each of its tokens weighs."""
    source = chains(cot_model(), cot, grpo_advantage="none", markovian_answer_weight=1.0)
    arrays = source.at(0)[0][0][0]
    np.testing.assert_allclose(np.array(arrays["answer_weights"]), 1 / (16 * 6), rtol=1e-6)
    assert np.array(arrays["weights"])[:, 0] == pytest.approx(1 / (16 * 6))


def test_a_function_of_the_sum_of_advantages_has_no_gradient(cot):
    """The published term: the mean of standardised rewards, with gradients. Ours is not one."""
    model = cot_model()
    source = chains(model, cot)
    groups, _ = source.rollout()
    arrays = answer_arrays([source.task.questions[g.problem] for g in groups],
                           [c.ids for g in groups for c in g.completions], cot)

    def published(model):
        rewards = answer_rewards(model, arrays, with_grad=True).reshape(4, 4)
        centred = rewards - rewards.mean(1, keepdims=True)
        spread = mx.sqrt((centred ** 2).sum(1, keepdims=True) / 3)
        return -(centred / (spread + 1e-8)).mean()

    def ours(model):
        return -answer_rewards(model, arrays, with_grad=True).mean()
    dead = dict(tree_flatten(nn.value_and_grad(model, published)(model)[1]))
    live = dict(tree_flatten(nn.value_and_grad(model, ours)(model)[1]))
    live = largest({k: np.array(v) for k, v in live.items()})
    assert live > 1e-2 and largest({k: np.array(v) for k, v in dead.items()}) < 1e-3 * live


@pytest.mark.parametrize("keys", [
    {}, {"grpo_epochs": 2}, {"grpo_advantage": "none"},
    {"grpo_advantage": "batch", "grpo_norm": "token"}, {"markovian_scorer": "frozen"},
    {"markovian": False}, {"markovian_answer_weight": 0.0}, {"grpo_ratio": "base"}])
def test_kl_has_its_gradient_under_every_algorithm(keys, cot):
    """With advantages 0 and no answer term, the KL's is the only gradient; it doubles with beta."""
    model = cot_model()
    source = chains(model, cot, **keys)
    updates, _ = source.at(0)
    found = []
    for beta in (0.1, 0.2):
        cfg = config(**{**vars(source.cfg), "grpo_kl_weight": beta})
        batches = [{k: v for k, v in silent(arrays).items() if k != "answer_weights"}
                   for arrays in updates[-1]]
        found.append(grads_of(model, cfg, batches)[2])
    assert largest(found[0]) > 1e-6
    assert difference({k: 2 * g for k, g in found[0].items()}, found[1]) < 1e-5 * largest(found[1])


def test_first_inner_step_has_ratio_one(cot):
    """PPO with inner epochs: exactly 1 at first, then against the kept log-probabilities."""
    model = cot_model()
    source = chains(model, cot, grpo_epochs=2)
    updates, _ = source.at(0)
    _, parts, grads = grads_of(model, source.cfg, updates[0])
    assert parts["ratio_max"] == 1.0 and parts["ratio"] == pytest.approx(1, abs=1e-5)
    assert parts["sampler_diff_max"] < 1e-4 and largest(grads) > 0
    model.load_weights([(k, v * 1.3) for k, v in tree_flatten(model.trainable_parameters())
                        if "lora_b" in k], strict=False)
    assert grads_of(model, source.cfg, updates[1])[1]["ratio_max"] > 1.001


@pytest.mark.parametrize("markovian", [True, False])
def test_micro_batches_change_nothing(markovian, cot):
    """One, two and four parts: the same loss and gradient, rows padded otherwise each time."""
    model, found = cot_model(), []
    for parts in (1, 2, 4):
        source = chains(model, cot, grad_accum_steps=parts, markovian=markovian)
        updates, _ = source.at(0)
        assert len(updates[0]) == parts
        found.append(grads_of(model, source.cfg, updates[0]))
    for loss, _, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert difference(grads, found[0][2]) < 2e-5 * max(1, largest(found[0][2]))


def test_ramp(cot):
    source = chains(cot_model(), cot, markovian_ramp_steps=10, grpo_advantage="none")
    weights = [np.array(source.at(step)[0][0][0]["answer_weights"]).max() for step in (0, 5, 30)]
    assert weights[0] == 0 and weights[1] == pytest.approx(weights[2] / 2)


@contextmanager
def worth(source, rewards):
    """In it the source samples chains of two tokens, (P, G) of them, that are worth `rewards`."""
    done = [Completion([40 + i, 2], "", True, np.zeros(2, np.float32), np.zeros(2, np.float32))
            for i in range(rewards.size)]
    judged = {name: rewards.reshape(-1) for name in ("actor", "frozen", "reward")}
    with patch("grpo.sample", return_value=done), patch.object(source.task, "rewards",
                                                               return_value=judged):
        yield


def group_of(source, rewards):
    with worth(source, rewards):
        return source.rollout()[0][0]


def arrays_of(source, group):
    return source.make_arrays([group], [], [group], [group], step=0)


def test_std_floor_and_bound(cot):
    """Groups that hardly differ stay small; one chain at -40 nats is bounded; those of no variance
    are taken for the answer term only."""
    source = chains(cot_model(), cot, grpo_group_size=16, batch_size=16)
    tiny, far = np.full((1, 16), -2.0), np.full((1, 16), -2.0)
    tiny[0, 0], far[0, 0] = -2.01, -40
    small = group_of(source, tiny)
    assert small.divisor == pytest.approx(0.1) and np.abs(small.advantages).max() < 0.11
    wild = arrays_of(source, group_of(source, far))
    assert np.array(wild["advantages"]).min() >= -5
    flat = np.full((1, 16), -2.0)
    assert not group_of(source, flat).advantages.any()
    with worth(source, flat):
        updates, metrics = source.at(0)
    assert len(updates) == 1 and metrics["zero_variance_groups"] == 1 and metrics["redraws"] == 0
    assert not np.array(updates[0][0]["advantages"]).any()
    assert np.array(updates[0][0]["answer_weights"]).all()
    source = chains(cot_model(), cot, grpo_group_size=16, batch_size=16,
                    markovian_answer_weight=0.0)
    with worth(source, flat), pytest.raises(BadInput, match="nothing to compare"):
        source.at(0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_answer_term_is_continuous_where_a_groups_variance_vanishes(scale, cot):
    """Rewards that differ by nothing, by rounding or by a hair: the answer term weighs the same."""
    source = chains(cot_model(), cot, batch_size=4, grpo_advantage=scale)
    weights = []
    for gap in (0, 1e-7, 1e-5, 1e-3):
        group = group_of(source, np.array([[-2, -2, -2, -2 - gap]]))
        assert np.abs(group.advantages).max() <= gap / 0.1 * 4 / 3
        weights.append(np.array(arrays_of(source, group)["answer_weights"]))
    for other in weights:
        np.testing.assert_allclose(other, weights[0], rtol=2e-3)


def test_the_answer_term_takes_chains_as_sampled(cot):
    """All V one-token chains, each weighing what the old policy gives it, after the policy moved.

    The gradient is that of the old policy's mean of log p(answer | chain), whatever the ratio is;
    weighting by the ratio would be visible.
    """
    model, question = cot_model(), encode_question(QUESTIONS[0], cot, True)
    prompt = mx.array([question.prompt])
    log_policy = lambda: (lambda x: x - mx.logsumexp(x))(model(prompt)[0, -1])      # (V,)
    old = log_policy()
    mx.eval(old)
    model.load_weights([(k, v * 2.5) for k, v in tree_flatten(model.trainable_parameters())
                        if "lora_b" in k], strict=False)
    now, V = log_policy(), len(old)
    arrays = answer_arrays([question], [[i] for i in range(V)], cot)
    batch = arrays | {"prompts": prompt, "completions": mx.arange(V)[:, None],      # (V, 1)
                      "old_logprobs": old[:, None], "weights": mx.exp(old)[:, None],
                      "mean_weights": mx.exp(old)[:, None], "advantages": mx.zeros((V, 1)),
                      "answer_weights": mx.exp(old), "off_policy": mx.array(True)}
    cfg = config(method="markovian", grpo_kl_weight=0.0)
    grads = grads_of(model, cfg, [batch])[2]

    def mean_reward(weights):
        loss = lambda model: -(weights * answer_rewards(model, arrays, with_grad=True)).sum()
        return {k: np.array(v) for k, v in
                tree_flatten(nn.value_and_grad(model, loss)(model)[1])}
    exact = mean_reward(mx.exp(old))
    assert difference(grads, exact) < 1e-4 * largest(exact)
    assert difference(mean_reward(mx.exp(now)), exact) > 0.05 * largest(exact)


# --- evaluation


def test_evaluation_and_its_controls(cot):
    """An answerer that knows nothing: controls are there, every share has its interval."""
    model = cot_model()
    cfg = config(method="markovian", chain_tokens=5, max_completion_tokens=3)
    rows = evaluate_chains(model, cot, QUESTIONS, cfg)
    q = [encode_question(p, cot, True) for p in QUESTIONS]
    own = [row["chain_ids"] for row in rows]
    for name, given in (("", own), ("_empty", [[]] * 4), ("_shuffled", own[1:] + own[:1])):
        expected = np.array(answer_rewards(model, answer_arrays(q, given, cot)))
        np.testing.assert_allclose([r[f"reward{name}"] for r in rows], expected, atol=1e-4)
    with adapters_off(model):
        expected = np.array(answer_rewards(model, answer_arrays(q, own, cot)))
    np.testing.assert_allclose([r["reward_frozen"] for r in rows], expected, atol=1e-4)
    summary = summarize_chains(rows)
    for key in ("correct", "correct_empty", "correct_shuffled", "correct_frozen", "invalid"):
        assert 0 <= summary[key]["low"] <= summary[key]["value"] <= summary[key]["high"] <= 1
    assert summary["reward"]["n"] == 4


def test_what_does_not_fit_is_an_error(cot):
    """Never truncated: not in training, not in evaluation."""
    model = cot_model()
    long = make_question("Add the numbers.", " + ".join(["7"] * 60), "420")
    for cfg in (config(method="markovian", chain_tokens=20),
                config(method="markovian", chain_tokens=20, markovian=False)):
        with pytest.raises(BadInput, match="exceed the model's context of 128"):
            evaluate_chains(model, cot, [long], cfg)
        with pytest.raises(BadInput, match="exceed the model's context of 128"):
            problems = [*QUESTIONS, long]
            Rollouts(model, problems, cfg, Chains(model, cot, problems, cfg))


# --- whole commands


KEYS = {"method": "markovian", "steps": 4, "batch_size": 16, "grpo_group_size": 4,
        "grpo_advantage": "group", "grpo_std_floor": 0.1, "chain_tokens": 6,
        "max_completion_tokens": 3, "eval_every_steps": 2, "lens_every_steps": 0}


@pytest.fixture(scope="module")
def small_sums(tmp_path_factory):
    """Sums of three numbers from 1 to 9, and 600 of them to judge."""
    folder = tmp_path_factory.mktemp("data") / "small_sums"
    write_task("sums", folder, samples=200, terms=3, largest=9)
    return folder


@pytest.mark.parametrize("keys", [{}, {"markovian": "false", "markovian_scorer": "frozen",
                                        "markovian_answer_weight": 0}, {"template": "plain"}])
def test_a_run_reports_and_is_evaluated(keys, write_config, cot_folder, small_sums, tmp_path):
    keys = keys | {"data": small_sums}
    path, folder = write_config("chains", model=cot_folder, **KEYS, **keys)
    done = run("train.py", path, check=0)
    assert "frozen judge" in done.stdout and "shuffled" in done.stdout
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "valid" in r] == [0, 2, 4]
    steps = [r for r in records if "reward" in r]
    for key in ("actor_reward", "frozen_reward", "kl_k3", "answer_loss", "zero_variance_groups",
                "repetition", "entropy", "actor_reward_p10"):
        assert all(key in r for r in steps) or "markovian" in keys and key == "answer_loss", key
    assert {"curves.png", "report.json"} <= {p.name for p in folder.iterdir()}
    done = run("eval.py", "--ckpt", folder, "--base", "--json", tmp_path / "e.json", check=0)
    report, stored = (json.loads(p.read_text()) for p in (tmp_path / "e.json",
                                                          folder / "report.json"))
    assert report["chains"] == stored["chains"] and report["base"]["chains"]
    assert report["accuracy"]["n"] == 600 and len(report["layers"]) == 2
    assert {"chain", "expected", "generated", "correct", "answer_layer"} <= \
        report["prompts"][0].keys()


@pytest.mark.parametrize("template", ["none", "plain"])
def test_resume_to_the_same_bits(template, write_config, cot_folder, small_sums):
    """Killed after a saved state, with inner epochs and a ramp: the same weights and records."""
    keys = KEYS | {"data": small_sums, "steps": 12, "grpo_epochs": 2, "template": template,
                   "markovian_ramp_steps": 9, "eval_every_steps": 6, "save_every_steps": 3}
    path, whole = write_config("whole", model=cot_folder, **keys)
    run("train.py", path, check=0)
    path, killed = write_config("killed", model=cot_folder, **keys)
    kill_and_continue(path, killed)
    a, b = (mx.load(str(f / "state.safetensors")) for f in (whole, killed))
    assert all(np.array_equal(np.array(a[k]), np.array(b[k])) for k in a) and a.keys() == b.keys()
    assert_same_rewards(whole, killed)


def assert_same_rewards(*folders):
    rewards = [[(r["step"], r["reward"]) for r in map(json.loads, (f / "metrics.jsonl").read_text()
                                                      .splitlines()) if "reward" in r]
               for f in folders]
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("keys, words", [
    ({"grpo_kl_weight": 0}, ("grpo_kl_weight = 0", "above 0")),
    ({"full": "true"}, ("full: true", "frozen")),
    ({"grpo_reward": "correct"}, ("grpo_reward", "method grpo")),
    ({"markovian_scorer": "critic"}, ("markovian_scorer", "actor, frozen")),
    ({"data": "arithmetic"}, ("questions to reason about", "python -m tasks")),
    ({"chain_tokens": 200}, ("context of 128",)),
    ({"markovian_scorer": "frozen"}, ("frozen", "markovian_answer_weight: 0")),
    ({"grpo_std_floor": 0}, ("grpo_std_floor", "0.1")),
    ({"chain_extraction": "legacy"}, ("chain_extraction", "anchored, simple, anchor")),
])
def test_bad_input(keys, words, write_config, cot_folder, small_sums):
    path, folder = write_config("bad", model=cot_folder, **(KEYS | {"data": small_sums} | keys))
    assert_one_clear_line(run("train.py", path), *words)
    assert not folder.exists()


def test_other_methods_refuse_questions(write_config, cot_folder, small_sums):
    path, folder = write_config("bad", model=cot_folder, data=small_sums)
    assert_one_clear_line(run("train.py", path), "questions to reason about", "method markovian")
    path, folder = write_config("keys", model=cot_folder, chain_tokens=5)
    assert_one_clear_line(run("train.py", path), "chain_tokens", "markovian")


# --- the configs for Llama-3.1-8B, on its architecture with random weights


@pytest.fixture(scope="module")
def llama3_1_folder(llama3, tmp_path_factory):
    """Llama 3.1's architecture (scaled RoPE, 4 query heads a key head, untied), small and random,
    with its kind of tokenizer."""
    raw = json.loads((GOLDEN / "llama3_1" / "config.json").read_text()) | {
        "vocab_size": 900, "max_position_embeddings": 4096, "num_hidden_layers": 2,
        "num_attention_heads": 8, "head_dim": 16, "num_key_value_heads": 2}
    return write_model(tmp_path_factory.mktemp("models") / "llama3_1", raw, llama3)


PUBLISHED = ROOT / "configs" / "llama3_1_8b_markovian.yaml"


# a number, letters, a text; the others (test_every_data_set_has_its_keys) differ in the data set
@pytest.mark.parametrize("data", ["gsm8k", "mmlu", "wiki"])
def test_8b_config_takes_a_whole_step(data, llama3_1_folder, tmp_path):
    """Every key as published but the size: write, sample, score, update, evaluate, report."""
    model = {"model": llama3_1_folder} if data == "wiki" else {}
    write_task(data, tmp_path / "data", **model,
               **{"from": str(ROOT / "tests" / "fixtures" / data)})
    report = train(load_config(PUBLISHED, [
        *PUBLISHED_KEYS[data].split(), f"data={tmp_path / 'data'}", f"model={llama3_1_folder}",
        "steps=1", f"run_dir={tmp_path / 'run'}", "eval_prompts=2"]))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert record["grad_norm"] > 0 and np.isfinite(record["reward"])
    assert report["chains"]["reward"]["n"] >= 2
    assert (report["chains"]["correct"]["value"] is None) == (data == "wiki")


def test_every_data_set_has_its_keys():
    """At the published settings, as the card gives them."""
    expected = {"gsm8k": (100, 10), "mmlu": (150, 10), "arc": (50, 10), "aqua": (50, 10),
                "mathqa": (150, 10), "svamp": (50, 16), "sums": (150, 16), "wiki": (50, 16)}
    found = {}
    for data, keys in PUBLISHED_KEYS.items():
        cfg = load_config(PUBLISHED, keys.split())
        found[data] = cfg.chain_tokens, cfg.max_completion_tokens
        assert (cfg.lora_rank, cfg.lora_alpha, cfg.lr, cfg.grpo_kl_weight) == (8, 16.0, 1e-4, 0.1)
        assert cfg.grpo_temperature == (1.5 if data == "wiki" else 1.0)
        assert (cfg.batch_size, cfg.grpo_group_size) == ((64, 16) if data == "wiki" else (48, 12))
    assert found == expected


# --- damage


def test_perturbations():
    """The exact share of characters; digits never by themselves; the rest untouched."""
    text, rng = " 12 + 7 = 19 and 30", random.Random(0)
    n = len(text)
    for kind in KINDS:
        assert perturb(text, kind, 0.0, rng) == text
    for severity in (0.2, 0.6, 1.0):
        gone = round(severity * n)
        assert perturb(text, "truncate_back", severity, rng) == text[:n - gone]
        assert perturb(text, "truncate_front", severity, rng) == text[gone:]
        assert len(perturb(text, "delete", severity, rng)) == n - gone
    digits = perturb(text, "digits", 1.0, rng)
    letters = perturb(text, "letters", 1.0, rng)
    for a, b, c in zip(text, digits, letters):
        assert (a != b and b.isdigit()) if a.isdigit() else a == b
        assert (a != c and c.isalnum()) if a.isalnum() else a == c
    assert perturb(text, "delete", 0.4, random.Random(3)) == perturb(text, "delete", 0.4,
                                                                    random.Random(3))


def test_perturb_command(write_config, cot_folder, tmp_path):
    """Two runs paired, two judges, JSON and a picture; other data is refused."""
    data = {terms: tmp_path / f"sums{terms}" for terms in (2, 3)}
    for terms, folder in data.items():
        write_task("sums", folder, samples=200, test=24, terms=terms, largest=9)
    path, first = write_config("a", model=cot_folder, data=data[3], **KEYS)
    train(load_config(path))
    path, second = write_config("b", model=cot_folder, data=data[3], **KEYS, markovian="false")
    train(load_config(path))
    out, picture = tmp_path / "damage.json", tmp_path / "damage.png"
    done = run("-m", "study.perturb", "--ckpt", first, "--compare", second, "--judge", second,
               "--problems", 24, "--json", out, "--png", picture, check=0)
    assert "fragility" in done.stdout and picture.stat().st_size > 5000
    report = json.loads(out.read_text())
    assert len(report["damage"]) == 25 and [j["judge"] for j in report["judges"]] == [
        "its own base", str(second)]
    for row in report["damage"]:
        paired = row["reward_drop"]["value"] - row["other_reward_drop"]["value"]
        assert row["reward_fragility"]["value"] == pytest.approx(paired, abs=1e-6)
    path, other = write_config("c", model=cot_folder, data=data[2], **KEYS)
    train(load_config(path))
    done = run("-m", "study.perturb", "--ckpt", first, "--compare", other)
    assert_one_clear_line(done, "other data")
    done = run("-m", "study.perturb", "--ckpt", cot_folder)
    assert_one_clear_line(done, "no run of method markovian")


def test_bundled_model_card_and_size():
    assert Path(TINY_COT / "README.md").exists()
    assert (TINY_COT / "model.safetensors").stat().st_size < 8_000_000

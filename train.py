"""The one training loop. Methods differ in their batch source and loss, and nothing else.

    python train.py configs/sft.yaml                       # LoRA on the bundled model
    python train.py configs/sft_full.yaml                  # the same, all weights
    python train.py configs/dual_reward.yaml               # also the operation, at a middle block
    python train.py configs/grpo.yaml                      # from samples and a reward
    python train.py configs/markovian_sums.yaml            # chains that must carry the answer
    python train.py configs/sft.yaml lr=1e-3 steps=200     # any key on the command line

One step: a batch as a pure function of (seed, step) -> loss and gradients of its micro-batches,
summed -> finite? -> clip -> AdamW. Since nothing depends on a hidden position or random state, a
run that was killed continues bit for bit from its last saved state: the same command again. A loss
or gradient that is not finite stops the run before the optimizer has moved. A GRPO step samples its
batch from the weights as they are, and may hold several updates; its guards skip instead of stop.
"""
import copy
import fcntl
import json
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import blas  # before mlx
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

import distributed
import memory
import parallel
from config import ON_POLICY, BadInput, Config, Stopped, load_config, resolved, run_main, write_text
from data import Batch, Batches, evenly, tokenize
from eval import class_block, class_ids, make_report, measure_accuracy, read_series, summarize_lens
from grpo import CollapseGuard, Rollouts
from hub import find_folder, read_json
from lora import apply_lora, load_base, root_model
from losses import (
    answer_reward_loss,
    dual_reward_loss,
    kl_estimates,
    masked_cross_entropy,
    policy_loss,
    token_entropy,
    token_logprobs,
)
from markovian import Chains, answer_rewards, evaluate_chains, summarize_chains
from model import Llama, gather_positions
from provenance import require_gate
from quant import is_quantized
from report import plot
from report.terminal import describe_run, format_line, report_text
from run_folder import (
    LOCK,
    NOT_THE_RUN,
    Metrics,
    hash_inputs,
    load_state,
    lock_run,
    log_inspection,
    open_run,
    restore_arrays,
    save_state,
    save_weights,
    state_arrays,
)
from tokenizer import Tokenizer

BAR_KEYS = ("loss", "answer_loss", "class_loss", "class_accuracy", "reward", "entropy", "kl_k3",
            "tokens_per_s", "peak_gib")
MAX_MEAN_RATIO = 10  # of a GRPO update; above it the samples say nothing about the policy


# --------------------------------------------------------------------------------------------------
# the loss: the only place where methods differ


def make_loss(cfg: Config, block: int):
    """Return loss(model, batch arrays) -> (scalar, parts) for cfg.method."""
    if cfg.method in ON_POLICY:
        return partial(rollout_loss, cfg)
    return partial(supervised_loss, cfg, block)


def supervised_loss(cfg: Config, block: int, model: Llama, batch: dict[str, mx.array]):
    """SFT and dual-reward: (scalar, parts) of one micro-batch.

    n_targets, n_rows in the batch are the whole step's counts, so that micro-batches add up to the
    step's mean.
    """
    n_targets, n_rows = batch["n_targets"], batch["n_rows"]
    tokens, positions = batch["tokens"], batch["target_positions"]      # (B, T), (B, A)
    if cfg.answer_shift:
        tokens = tokens[:, :-1]     # the last token predicts nothing
    else:
        positions = positions + 1   # the prior code's error A: read at the target itself
    # only the positions that the loss reads leave the last block, and are unembedded: (B, A, V)
    read_at_last = cfg.method == "dual_reward" and block + 1 == model.args.num_hidden_layers
    at_last = None if read_at_last else positions
    for tap, resid in enumerate(model.stream(tokens, positions=at_last)):   # (B, T, D)
        if tap == block + 1:
            class_resid = resid
    answer_resid = gather_positions(resid, positions) if read_at_last else resid
    answer_logprobs = model.read_logits(token_logprobs, answer_resid, batch["targets"])
    answer_loss = masked_cross_entropy(answer_logprobs, batch["target_mask"], n_targets)
    if cfg.method == "sft":
        return answer_loss, {"answer_loss": answer_loss}
    # a head call of its own, not one for both: with class_weight 0 the answer's arithmetic is
    # then SFT's to the bit
    class_logits = model.head(gather_positions(
        class_resid, batch["class_positions"][:, None]))[:, 0]          # (B, V)
    class_loss = masked_cross_entropy(
        token_logprobs(class_logits, batch["class_ids"]), batch["row_mask"], n_rows)
    is_right = mx.argmax(class_logits, axis=-1) == batch["class_ids"]
    class_right = (is_right * batch["row_mask"]).sum() / n_rows
    loss = dual_reward_loss(class_loss, answer_loss, mx.array(cfg.class_weight))
    return loss, {"answer_loss": answer_loss, "class_loss": class_loss,
                  "class_accuracy": class_right}


def rollout_loss(cfg: Config, model: Llama, batch: dict[str, mx.array]):
    """GRPO and Markovian training: (scalar, parts) of one micro-batch.

    Its weights and shares hold the denominators of the whole update. Terms are only ever added: in
    the public Markovian code the clipped term replaced the sum, and the KL was gone.
    """
    tokens, weights, shares = batch["completions"], batch["weights"], batch["shares"]  # (N, C)
    resid = model.completion_resid(batch["prompts"], batch.get("start"), tokens)
    score = lambda logits, tokens: token_logprobs(logits / cfg.grpo_temperature, tokens)
    logprobs = model.read_logits(score, resid, tokens)                  # (N, C)
    # the first update of a step trains the very policy that sampled: the ratio is exactly 1,
    # and only its gradient counts. Afterwards the kept log-probabilities are the old ones
    now = mx.stop_gradient(logprobs)
    old = mx.where(batch["stale"], batch["kept_logprobs"], now)
    policy, old_policy = logprobs, old
    if cfg.grpo_ratio == "base":    # the published error: means over tokens, against the base
        mean = lambda x: (x * shares).sum(1, keepdims=True) / mx.maximum(
            shares.sum(1, keepdims=True), 1e-12)
        policy, old_policy = mean(logprobs), mean(batch["ref_logprobs"])    # (N, 1)
    loss, report = policy_loss(policy, old_policy, batch["advantages"], weights,
                               cfg.grpo_clip_low, cfg.grpo_clip_high, cfg.grpo_dual_clip)
    average = lambda x: (x * shares).sum()
    parts = {"policy_loss": loss, "ratio_max": mx.where(shares > 0, report["ratio"], 0).max(),
             # KL(old || policy) in this order: the samples are the old policy's
             "kl_old": average(kl_estimates(old, now)["kl_k3"]),
             "sampler_diff_max": mx.where(
                 batch["stale"] | (shares == 0), 0, mx.abs(now - batch["kept_logprobs"])).max(),
             **{name: average(value) for name, value in report.items()}}
    if "ref_logprobs" in batch:
        # an expectation over the policy's next token, which the old policy sampled: hence the ratio
        ratio = mx.exp(mx.clip(now - old, -20, 20))
        kl = {name: ratio * value
              for name, value in kl_estimates(logprobs, batch["ref_logprobs"]).items()}
        parts |= {name: average(value) for name, value in kl.items()}
        if cfg.grpo_kl_weight:
            loss = loss + cfg.grpo_kl_weight * (weights * kl["kl_k2"]).sum()
    if cfg.grpo_entropy_weight:
        spread = lambda logits, _: token_entropy(logits / cfg.grpo_temperature)
        loss = loss - cfg.grpo_entropy_weight * (
            weights * model.read_logits(spread, resid, tokens)).sum()
    if "answer_weights" in batch:   # Markovian: the half of the gradient that the policy term lacks
        # without a ratio: as in all of PPO what was sampled before, here the chain, stays the old
        # policy's, and the answer behind it is given, not sampled. Only the ratio of the whole
        # chain, a product over its tokens, would make it the present policy's: where the two are
        # 0.02 nats a token apart, 64 chains of 100 tokens then count as 8
        rewards = answer_rewards(model, batch, slopes=True)
        answer_loss = answer_reward_loss(rewards, batch["answer_weights"])
        loss, parts["answer_loss"] = loss + answer_loss, answer_loss
    return loss, parts


def batch_arrays(micro_batches: list[Batch]) -> list[dict[str, mx.array]]:
    """What the loss reads of each micro-batch, as a tree that mx.compile can take."""
    names = ("tokens", "target_positions", "targets", "target_mask",
             "class_positions", "class_ids", "row_mask")
    counts = {"n_targets": mx.array(float(sum(b.target_mask.sum().item() for b in micro_batches))),
              "n_rows": mx.array(float(sum(b.row_mask.sum().item() for b in micro_batches)))}
    return [{name: getattr(b, name) for name in names} | counts for b in micro_batches]


def lr_at(step: int, cfg: Config) -> float:
    """The lr of a 0-based step: linear warm-up, then cosine to 0 after the last step, or constant.

    example  lr 1, 10 steps, 2 of warm-up: .5, 1, 1, .96, ... ; the cosine starts where warm-up ends
    """
    if step < cfg.lr_warmup_steps:
        return cfg.lr * (step + 1) / cfg.lr_warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    done = (step - cfg.lr_warmup_steps) / max(cfg.steps - cfg.lr_warmup_steps, 1)
    return cfg.lr * 0.5 * (1 + np.cos(np.pi * done))


# --------------------------------------------------------------------------------------------------
# the loop


def prepare_model(cfg: Config) -> tuple[Llama, Tokenizer]:
    """Load the base, make LoRA's arrays or all weights trainable; random numbers from cfg.seed."""
    memory.check_weights(cfg, read_json(
        find_folder(root_model(cfg.model), weights=False) / "config.json"))
    mx.random.seed(cfg.seed)
    if cfg.full:
        blas.keep_batches_whole()
    model, tokenizer = load_base(cfg.model, cfg.dtype, cfg.bits, cfg.from_scratch,
                                 cfg.bits_group_size)
    model.recompute = cfg.recompute
    if tokenizer is None:
        raise BadInput(f"{cfg.model} has no tokenizer.model and no tokenizer.json; "
                       "add the model's own")
    if cfg.full and is_quantized(model):
        raise BadInput(f"full: true cannot train {cfg.model}, whose weights are quantised; train "
                       "LoRA, or take the unquantised model")
    if cfg.full:
        model.unfreeze()    # a run's base was frozen under its adapter
    else:
        apply_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    mx.eval(model.parameters())
    return model, tokenizer


class AdamW(optim.AdamW):
    """MLX's AdamW with float32 moments and, for weights of 16 bits, float32 masters beside them.

    The masters take the steps and the model holds them rounded, so that training, sampling and what
    is saved are one and the same weights; these follow once a master has moved half their spacing.
    In 16 bits alone a small step would round to none, and so would the decay of 0.999 of the second
    moment. source  Micikevicius 1710.03740
    """

    def init_single(self, parameter: mx.array, state: dict):
        super().init_single(parameter.astype(mx.float32), state)
        if parameter.dtype != mx.float32:
            state["master"] = parameter.astype(mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        # MLX computes learning rate, decay and bias correction in the gradient's type
        gradient = gradient.astype(mx.float32)
        if "master" not in state:
            return super().apply_single(gradient, parameter, state)
        state["master"] = super().apply_single(gradient, state["master"], state)
        return state["master"].astype(parameter.dtype)


def make_optimizer(model: Llama, cfg: Config) -> AdamW:
    optimizer = AdamW(cfg.lr, weight_decay=cfg.weight_decay, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    return optimizer


def compile_step(model: Llama, optimizer: optim.Optimizer, loss_fn):
    """Return (loss_and_grads, update), compiled.

    Two functions, since a host check for finite numbers stands between them. The lists of state are
    what makes the compiled functions see weights that change; a closed-over model would be baked in
    as it is now, and the loss would stay the same for ever. Build them after a restore, not before.
    """
    @partial(mx.compile, inputs=[model.state], outputs=[model.state])
    def loss_and_grads(batch):
        return nn.value_and_grad(model, loss_fn)(model, batch)

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(grads, scale):
        optimizer.update(model, tree_map(lambda g: g * scale, grads))   # float32, as scale is

    return loss_and_grads, update


def add_up(results):
    """The sum of several batches' ((loss, parts), gradients); of a part named _max the largest."""
    (loss, parts), grads = next(results := iter(results))
    for (more_loss, more_parts), more_grads in results:
        # float32: 16 bits would lose a micro-batch in the sum of many
        grads = tree_map(lambda g, more: g.astype(mx.float32) + more, grads, more_grads)
        loss = loss + more_loss
        parts = {name: (mx.maximum if name.endswith("_max") else mx.add)(value, more_parts[name])
                 for name, value in parts.items()}
    return (loss, parts), grads


def take_step(step: int, micro_batches: list[dict[str, mx.array]], loss_and_grads, update,
              optimizer, lr: float, cfg: Config) -> dict:
    """Take one optimizer step, return its metrics.

    GRPO leaves the optimizer alone and says so (`skipped`, `early_stop`) where an update would do
    harm. Multiplying the loss by 0 would not do: AdamW's momentum still moves the weights.
    raises   Stopped, nothing moved, if loss or gradient is not finite
    """
    total = []
    for batch in micro_batches:     # one evaluated before the next: activations of one are held
        total = [add_up([*total, *parallel.evaluate(loss_and_grads, batch)])]
        mx.eval(total)
    (loss, parts), grads = total.pop()      # held nowhere else: sum_up makes new ones
    grads, metrics = distributed.sum_up(grads, {"loss": loss, **parts})
    norm = mx.sqrt(sum((g.astype(mx.float32) ** 2).sum() for _, g in tree_flatten(grads)))
    metrics = {name: value.item() for name, value in {**metrics, "grad_norm": norm}.items()}
    finite = np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    if cfg.method in ON_POLICY and cfg.grpo_guard:
        if not finite or metrics["ratio"] > MAX_MEAN_RATIO:
            return {**metrics, "skipped": 1}
        if cfg.grpo_kl_stop and metrics["kl_old"] > 1.5 * cfg.grpo_kl_stop:
            return {**metrics, "early_stop": 1}
    if not finite:
        raise Stopped(f"step {step + 1}: loss {metrics['loss']}, "
                      f"gradient norm {metrics['grad_norm']}")
    optimizer.learning_rate = lr
    scale = min(1.0, cfg.grad_clip / max(metrics["grad_norm"], 1e-12)) if cfg.grad_clip else 1.0
    update(grads, mx.array(scale))
    mx.eval(optimizer.state)  # or the next step would grow this step's graph
    return {**metrics, "lr": lr}


def inspect(model: Llama, tokenizer: Tokenizer, valid: list, done: int, block: int,
            cfg: Config) -> dict | None:
    """Validation accuracy and the lens, where due after `done` steps; always at start and end.

    Of chains also the controls: without a chain, with another's, answered by the frozen base.
    """
    due = lambda every: every and (done % every == 0 or done == cfg.steps)
    record = {"step": done}
    if due(cfg.eval_every_steps):
        chosen = evenly(valid, cfg.eval_prompts)
        if cfg.method == "markovian":
            record["valid"] = summarize_chains(evaluate_chains(model, tokenizer, chosen, cfg))
            record["valid_accuracy"] = record["valid"]["correct"]["value"]
        else:
            rows = measure_accuracy(model, tokenizer, chosen, cfg.max_completion_tokens,
                                    cfg.template)
            record["valid_accuracy"] = float(np.mean([r["correct"] for r in rows]))
    if due(cfg.lens_every_steps) and cfg.method != "markovian":
        chosen = evenly(valid, cfg.lens_prompts)
        reading = read_series(model, tokenizer, chosen, cfg.template)
        record["lens"] = summarize_lens(*reading, block)
    return record if len(record) > 1 else None


@contextmanager
def deferred_interrupts():
    """Yield a list that collects Ctrl-C and SIGTERM, so that the loop can end its step and save."""
    seen = []
    previous = [(number, signal.signal(number, lambda *_, n=number: seen.append(n)))
                for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield seen
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def load_source(cfg: Config, model: Llama, tokenizer: Tokenizer) -> Batches | Rollouts:
    """Where batches come from: the training split, tokenised and checked, or rollouts over it."""
    problems = load_split(cfg, "train")
    if cfg.method in ON_POLICY:
        kind = Chains if cfg.method == "markovian" else Rollouts
        return kind(model, tokenizer, problems, cfg)
    if any(p.hidden for p in problems):
        raise BadInput(f"data {cfg.data} holds questions to reason about, for method markovian; "
                       f"this config has method {cfg.method}")
    if cfg.method == "dual_reward" and not all(p.operation for p in problems):
        raise BadInput(f"method dual_reward needs an operation in every row of {cfg.data}; "
                       "some rows have none")
    ids = class_ids(cfg, tokenizer, problems) if cfg.method == "dual_reward" else None
    return Batches(tokenize(problems, tokenizer, model.args.max_position_embeddings, ids,
                            cfg.template), cfg)


def next_updates(source: Batches | Rollouts, step: int, cfg: Config) -> tuple[list, dict]:
    """The updates of a 0-based step, each a list of micro-batches, and what is known of them."""
    if cfg.method in ON_POLICY:
        return source.at(step)
    micro_batches = source.at(step)
    rows = [i for b in micro_batches for i in b.rows if i >= 0]
    own = batch_arrays(micro_batches)[distributed.rank()::distributed.size()]
    return [own], {"rows": rows, "n_tokens": sum(len(source.rows[i].ids) for i in rows)}


def train(cfg: Config, with_base: bool = True) -> dict:
    """Train as cfg says, or continue where the run folder stands; returns the report.

    with_base  judge the model it started from as well
    raises   BadInput, Stopped (a guard), KeyboardInterrupt (after a clean save)
    """
    folder = Path(cfg.run_dir)
    if os.path.exists(folder / LOCK):
        lock_run(folder, fcntl.LOCK_SH).close()     # or it would be said after loading a model
    with ExitStack() as held:       # the run folder's lock
        return train_run(cfg, with_base, held)


def train_run(cfg: Config, with_base: bool, held: ExitStack) -> dict:
    """`train`, holding the run folder's lock in `held` from where the folder is opened."""
    distributed.connect(cfg)
    first, step_cfg = distributed.rank() == 0, distributed.whole(cfg)
    if first and cfg.require_gate:
        require_gate(cfg.require_gate, cfg.model)
    model, tokenizer = prepare_model(cfg)
    block, source = class_block(cfg, model), load_source(step_cfg, model, tokenizer)
    valid = load_split(cfg, "valid", tokenizer)
    optimizer = make_optimizer(model, cfg)
    needed = memory.prepare(cfg, model, memory.load_of(cfg, source, len(valid)))
    # after everything that can be wrong with the input: a mistake leaves no folder behind
    inputs = hash_inputs(model, source, valid) | {"processes": str(distributed.size())}
    folder, done = begin(cfg, model, optimizer, source, inputs, held)
    if folder and done >= cfg.steps and (folder / "report.json").exists():
        print(f"{folder} is finished ({done} steps); see report.json, "
              "or give overwrite=true to train again")
        return json.loads((folder / "report.json").read_text())
    if first:
        print(describe(cfg, model, block, done), memory.describe(needed), sep="\n")
        if cfg.method == "dual_reward":
            wanted = sorted({row.class_id for row in source.rows})
            print(f"class loss wants {tokenizer.show(wanted[:8])}"
                  + (f" and {len(wanted) - 8} more" if len(wanted) > 8 else ""))
        metrics = Metrics(folder / "metrics.jsonl", done)
        save = partial(save_state, folder, model, optimizer, cfg, source, inputs, metrics)
        if done == 0 and (seen := inspect(model, tokenizer, valid, 0, block, cfg)):
            log_inspection(folder, metrics, seen, model, cfg)
        if done == cfg.steps:       # killed before its report
            save_weights(folder, model, cfg)
    # after the restore
    compiled = compile_step(model, optimizer, make_loss(cfg, block))
    bar = tqdm(total=cfg.steps, initial=done, disable=None if first else True, unit="step",
               dynamic_ncols=True)
    with deferred_interrupts() as interrupted, bar:
        for step in range(done, cfg.steps):
            start = time.perf_counter()
            position, taken = source.position, optimizer.step.item()
            guard = copy.deepcopy(source.guard) if cfg.method in ON_POLICY else None
            try:
                updates, about = next_updates(source, step, cfg)
                if reason := about.pop("collapsed", ""):
                    recover(folder, step, model, optimizer, cfg, source, reason)
                    compiled = compile_step(model, optimizer, make_loss(cfg, block))
                elif about.pop("best", False):
                    source.best = state_arrays(model, optimizer)    # references, nothing is copied
                record = take_updates(folder, step, updates, about["rows"], compiled, optimizer,
                                      lr_at(step, cfg) * source.lr_scale, cfg)
                stop = any(distributed.share(bool(interrupted)))
            except (BadInput, Stopped):     # a user's reward function, a guard: nothing is lost
                # the step begins anew; one that has moved the weights, from the last state
                source.position, source.guard = position, guard
                if first and step and optimizer.step.item() == taken:
                    save(step)
                raise
            done = step + 1
            if first:
                record |= clock(about, time.perf_counter() - start, step_cfg)
                metrics.log({"step": done, **record})
                bar.set_postfix({k: f"{record[k]:.3g}" for k in BAR_KEYS if k in record})
                bar.update()
                if seen := inspect(model, tokenizer, valid, done, block, cfg):
                    log_inspection(folder, metrics, seen, model, cfg)
                    tqdm.write(format_line(record, seen, block), file=sys.stdout)
                due = cfg.save_every_steps and done % cfg.save_every_steps == 0
                if stop or due or done == cfg.steps:
                    save(done)
                if stop:
                    tqdm.write(f"interrupted; saved after step {done}. The same command "
                               "continues.", file=sys.stdout)
            if stop:
                raise KeyboardInterrupt
    return finish(folder, cfg, metrics, needed["peak"], with_base) if first else {}


def begin(cfg: Config, model: Llama, optimizer: optim.Optimizer, source, inputs: dict[str, str],
          held: ExitStack) -> tuple[Path | None, int]:
    """Open the run folder and restore its state; the folder (the first process's) and steps done.

    raises   BadInput, and SystemExit in the other processes, which have nothing to add to it
    """
    mine = {k: v for k, v in resolved(cfg).items() if k not in NOT_THE_RUN} | {
        f"the {name} itself": value for name, value in inputs.items()}
    mine = json.loads(json.dumps(mine))     # as it arrives: tuples are lists
    for other, theirs in enumerate(distributed.share(mine)):
        if unlike := [name for name in theirs if theirs[name] != mine.get(name)]:
            raise BadInput(f"process {distributed.rank()} and process {other} of this run differ "
                           f"in {', '.join(unlike)}; give all the same config, model and data")
    if distributed.rank() == 0:
        try:
            folder = held.enter_context(open_run(cfg))
            done = load_state(folder, model, optimizer, source, inputs)
        except BadInput:
            distributed.share(None)
            raise
        finished = done >= cfg.steps and (folder / "report.json").exists()
        news = {"done": done, "finished": finished, "position": source.position,
                "guard": asdict(source.guard) if cfg.method in ON_POLICY else None,
                "best": bool(cfg.method in ON_POLICY and source.best)}
    else:
        folder, news = None, None
    news = distributed.share(news)[0]
    if distributed.size() > 1:
        if not news:
            raise SystemExit(2)
        if news["finished"]:
            if folder is None:
                raise SystemExit(0)
            return folder, news["done"]
        # its run folder may be on another machine's disk
        arrays = distributed.from_first(state_arrays(model, optimizer))
        restore_arrays(arrays, model, optimizer)
        if news["guard"]:
            source.position, source.guard = news["position"], CollapseGuard(**news["guard"])
            if news["best"]:
                source.best = distributed.from_first(source.best or arrays)
    return folder, news["done"]


def take_updates(folder: Path | None, step: int, updates: list[list[dict[str, mx.array]]],
                 rows: list[int], compiled, optimizer, lr: float, cfg: Config) -> dict:
    """The updates of one step, until one stops early; returns the last one's metrics.

    raises   Stopped, after writing the batch that was not finite to failed_batch.json
    """
    record = {}
    for micro_batches in updates:
        try:
            record = take_step(step, micro_batches, *compiled, optimizer, lr, cfg)
        except Stopped as stopped:
            tokens = [b.get("tokens", b.get("completions")).tolist() for b in micro_batches]
            if folder is None:      # the first process says it
                raise SystemExit(3) from stopped
            write_text(folder / "failed_batch.json",
                       json.dumps({"step": step + 1, "tokens": tokens}) + "\n")
            raise Stopped(f"{stopped}, on rows {rows}") from None
        if "early_stop" in record:
            break
    return record


def clock(about: dict, seconds: float, cfg: Config) -> dict:
    """What a batch source says of a step, with its times and speeds, for metrics.jsonl."""
    record = {k: v for k, v in about.items() if k not in ("rows", "n_tokens")}
    record |= {"seconds": round(seconds, 5), "peak_gib": round(memory.peak_gib(), 3),
               "tokens_per_s": round(about["n_tokens"] / seconds)}
    if cfg.method in ON_POLICY:
        record["completions_per_s"] = round(cfg.batch_size / seconds)
        record["update_s"] = seconds - record["rollout_s"] - record["score_s"]
    return record


def recover(folder: Path | None, step: int, model: Llama, optimizer: optim.Optimizer, cfg: Config,
            source: Rollouts, reason: str) -> None:
    """Put the best weights and optimizer back after a collapse; the data moves on.

    raises   Stopped after CollapseGuard.MAX_REVERTS times
    """
    restore_arrays(source.best, model, optimizer)
    if source.guard.reverts >= source.guard.MAX_REVERTS:
        if folder is None:      # the first process says it
            raise SystemExit(3)
        save_weights(folder, model, cfg)
        raise Stopped(f"step {step + 1}: the policy collapsed a {source.guard.reverts + 1}th time "
                      f"({reason}); the best weights are saved in {folder}. Lower lr, or raise "
                      "grpo_kl_weight")
    source.guard.reverted()
    if folder:
        tqdm.write(f"step {step + 1:5d}  collapse: {reason}; best weights restored, learning rate "
                   f"times {source.lr_scale:g}", file=sys.stdout)


def finish(folder: Path, cfg: Config, metrics: Metrics, estimated: float,
           with_base: bool) -> dict:
    """Judge the saved weights, as eval.py would, beside the base; write report and pictures."""
    peak = memory.peak_gib()    # of training: judging may load the base as well
    report = make_report(folder, with_base) | {"peak_gib": round(peak, 3),
                                               "estimated_peak_gib": round(estimated, 3)}
    print(report_text(report))
    plot.emergence(metrics.records, folder / "emergence.png",
                   f"{cfg.method}, {cfg.model}, seed {cfg.seed}")
    if cfg.method in ON_POLICY:
        plot.rollout_curves(metrics.records, folder / "curves.png", f"{cfg.model}, seed {cfg.seed}")
    # last: its presence says that the run is finished
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    curves = "curves.png, " if cfg.method in ON_POLICY else ""
    print(f"\nwrote {folder}/report.json, metrics.jsonl, emergence.png, {curves}"
          f"{'model' if cfg.full else 'adapters'}.safetensors; "
          f"peak memory {peak:.2f} GiB, estimated {estimated:.2f}")
    return report


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        raise BadInput("expected `python train.py CONFIG.yaml [key=value ...]`, "
                       "for example `python train.py configs/dual_reward.yaml seed=1`")
    try:
        train(load_config(argv[0], argv[1:]))
    except BadInput:
        if os.environ.get("MLX_RANK", "0") != "0":
            # a mistake that all processes see, the first one tells, and the launcher then ends
            # this one; its own it tells a little later
            time.sleep(3)
        raise


if __name__ == "__main__":
    run_main(main)

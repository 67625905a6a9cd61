"""The one training loop. Methods differ in their batch source and loss (make_method).

    python train.py configs/dual_reward.yaml               # docs/usage.md lists all configs
    python train.py configs/sft.yaml lr=1e-3 steps=200     # any key on the command line

One step: a batch -> loss and gradients of its micro-batches, summed -> finite? -> clip -> AdamW.
A supervised batch is a pure function of (seed, step). GRPO and Markovian training sample one from
the weights, the seed and a position that is saved, and may take several updates from it. So a run
that was killed continues bit for bit from its last save: the same command again.
"""
import sys
import time
from dataclasses import replace
from functools import partial

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

from checkpoint import checkpoint_files, load_base
from config import ON_POLICY, BadInput, Config, Stopped, load_config, run_main
from data import Batches
from engine import memory, workers
from engine.adamw import AdamW
from engine.parallel import map_rows
from eval import finish, look_inside
from files import run_folder
from files.keys import Collapsed
from files.model_folder import parse_args, read_origin
from lora import apply_lora
from losses import dual_loss, sft_loss
from model import Llama
from report.terminal import describe_run, format_collapse, format_line
from text.rows import check_method, class_ids, describe_classes, load_split, tokenize, with_template
from text.tokenizer import Tokenizer

BAR_KEYS = ("loss", "answer_loss", "class_loss", "class_accuracy", "reward", "entropy", "kl_k3",
            "tokens_per_s", "peak_gib")


def make_method(cfg: Config, model: Llama, tokenizer: Tokenizer):
    """The batch source and the loss of cfg.method.

    source.at(step) -> (updates, metrics), an update being a list of micro-batches; .state() and
    .restore(...) carry what `at` depends on. loss(model, batch) -> (scalar, metrics to add up over
    micro-batches, metrics to take the largest of).
    """
    problems, context = load_split(cfg, "train"), model.args.max_position_embeddings
    check_method(cfg, problems)
    if cfg.method == "sft":
        rows = tokenize(problems, tokenizer, context, template=cfg.template)
        return Batches(rows, cfg), partial(sft_loss, cfg)
    if cfg.method == "dual_reward":
        wanted = class_ids(cfg, tokenizer, problems)
        rows = tokenize(problems, tokenizer, context, wanted, cfg.template)
        return Batches(rows, cfg), partial(dual_loss, cfg)
    # imported here: a supervised run starts without reading files that it does not use
    from grpo import Answers, Rollouts, rollout_loss
    if cfg.method == "grpo":
        task = Answers(model, tokenizer, problems, cfg)
        return Rollouts(model, problems, cfg, task), partial(rollout_loss, cfg, None)
    from markovian import Chains, answer_rewards  # GRPO has no use for it
    task = Chains(model, tokenizer, problems, cfg)
    return Rollouts(model, problems, cfg, task), partial(rollout_loss, cfg, answer_rewards)


def prepare_model(cfg: Config) -> tuple[Llama, Tokenizer]:
    """Load the base, make LoRA's arrays or all weights trainable; random numbers from cfg.seed."""
    mx.random.seed(cfg.seed)    # of LoRA's A, or of all weights from scratch
    model, tokenizer = load_base(cfg.model, cfg.dtype, cfg.bits, cfg.from_scratch)
    if cfg.full:
        packed = [path for path, layer in model.named_modules() if hasattr(layer, "dense")]
        if packed:
            raise BadInput(f"full: true cannot train {cfg.model}, whose weights are quantised "
                           f"({packed[0]}); train LoRA, or take the unquantised model")
        model.unfreeze()    # merging an earlier run's adapter has left its base frozen
        model.parts = 1     # each part of a batch would hold gradients of all weights
    else:
        apply_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    # logits exist for few rows at a time; with cfg.recompute activations are computed again for the
    # gradient. The same numbers, by other functions at model.read_logits and model.run_block
    memory.spare(model, cfg)
    mx.eval(model.parameters())
    return model, tokenizer


def make_optimizer(cfg: Config, model: Llama) -> AdamW:
    # MLX's default has no bias correction: its first step would be three times the lr
    optimizer = AdamW(cfg.lr, weight_decay=cfg.weight_decay, bias_correction=True)
    # now, not at the first update: the compiled functions and a restore need the state to be there
    optimizer.init(model.trainable_parameters())
    return optimizer


def lr_at(step: int, cfg: Config) -> float:
    """The lr of a 0-based step: linear warm-up, then cosine to 0 after the last step, or constant.

    example  lr 1, 10 steps, 2 of warm-up: .5, 1, 1, .96, ... ; the cosine starts where warm-up ends
    """
    if step < cfg.lr_warmup_steps:
        return cfg.lr * (step + 1) / cfg.lr_warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    # 0 at the first step behind the warm-up; 1 would be reached one step after the last
    progress = (step - cfg.lr_warmup_steps) / max(cfg.steps - cfg.lr_warmup_steps, 1)
    return cfg.lr * 0.5 * (1 + np.cos(np.pi * progress))


def compile_step(cfg: Config, model: Llama, optimizer: AdamW, loss):
    """Return (loss_and_grads, update). Compiled in two, since update first checks on the host.

    mx.compile's inputs: the state that a trace reads anew; a model that it just closed over would
    be baked in as it is now, and the loss would stay the same for ever. outputs: what it leaves
    changed, if only value_and_grad's placeholders for weights.
    """
    @partial(mx.compile, inputs=[model.state], outputs=[model.state])
    def loss_and_grads(batch):
        # gradients of the trainable parameters alone: frozen ones cost no memory
        return nn.value_and_grad(model, loss)(model, batch)

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def apply(grads, scale):
        # scale is a float32 array, since a Python number would be baked in too
        optimizer.update(model, tree_map(lambda g: g * scale, grads))

    def update(grads, metrics: dict[str, mx.array], lr: float) -> dict[str, float]:
        """Harmless? finite? clip, AdamW; returns the metrics. raises Stopped before any change."""
        squares = [(g.astype(mx.float32) ** 2).sum() for _, g in tree_flatten(grads)]
        metrics["grad_norm"] = mx.sqrt(sum(squares))
        record = {name: value.item() for name, value in metrics.items()}    # waits for the device
        if cfg.method in ON_POLICY and cfg.grpo_guard:
            from report.rollouts import harmful  # supervised runs have no use for it
            verdict = harmful(record, cfg)
            if verdict:
                return record | {verdict: 1}    # the optimizer is left alone
        # a loss can be finite while a gradient is not: sqrt and exp overflow on the way back
        if not np.isfinite([record["loss"], record["grad_norm"]]).all():
            raise Stopped(f"loss {record['loss']}, gradient norm {record['grad_norm']}")
        optimizer.learning_rate = lr    # an array in its state, so the trace sees each new value
        # clipped by the norm of all gradients together, which keeps their direction
        scale = min(1.0, cfg.grad_clip / max(record["grad_norm"], 1e-12)) if cfg.grad_clip else 1.0
        apply(grads, mx.array(scale))
        mx.eval(optimizer.state)    # or the next step would grow this step's graph
        return record | {"lr": lr}

    return loss_and_grads, update


def accumulate(loss_and_grads, micro_batches: list[dict[str, mx.array]], parts: int | None):
    """Gradients and metrics of all micro-batches: (grads, sums, maxima), evaluated.

    A micro-batch's denominators are the whole step's, so that adding up is all there is to do.
    """
    grads = None
    for batch in micro_batches:
        # a Linux CPU takes parts of the batch side by side; elsewhere there is one part
        for (loss, more_sums, more_maxima), more_grads in map_rows(loss_and_grads, batch, parts):
            more_sums = {"loss": loss, **more_sums}
            if grads is None:
                grads, sums, maxima = more_grads, more_sums, more_maxima
            else:
                # float32: 16 bits would lose a micro-batch in the sum of many
                grads = tree_map(lambda g, h: g.astype(mx.float32) + h, grads, more_grads)
                sums = tree_map(mx.add, sums, more_sums)
                maxima = tree_map(mx.maximum, maxima, more_maxima)
        # evaluated here, or the gradients of every micro-batch would wait to be added
        mx.eval(grads, sums, maxima)
    return grads, sums, maxima


def take_step(step: int, cfg: Config, run: run_folder.Run, source, loss_and_grads, update,
              parts: int | None) -> dict:
    """One step of the training: its metrics. raises  Stopped, or what source.at raises"""
    updates, metrics = source.at(step)      # each update: its micro-batches. SFT has one update
    lr = lr_at(step, cfg) * metrics.get("lr_scale", 1.0)
    for micro_batches in updates:
        grads, sums, maxima = accumulate(loss_and_grads, micro_batches, parts)
        grads, sums, maxima = workers.sum(grads, sums, maxima)      # one process: unchanged
        try:
            metrics |= update(grads, sums | maxima, lr)
        except Stopped as error:
            run.write_failed(step + 1, micro_batches)
            raise Stopped(f"step {step + 1}: {error}, on rows {metrics['rows']}") from None
        if "early_stop" in metrics:         # the guard: no further update from these samples
            break
    return metrics


def save(cfg: Config, run: run_folder.Run, done: int, model: Llama, optimizer, source) -> None:
    """After `done` steps: the weights, then all that continuing needs, each file by one rename."""
    arrays, state = source.state()      # nothing for SFT; GRPO: problems drawn, the guard's memory
    arrays |= run_folder.training_arrays(model, optimizer)
    run.save(done, checkpoint_files(model, cfg), arrays, state)


def take_steps(cfg: Config, run: run_folder.Run, done: int, model: Llama, optimizer, source, loss,
               look, block: int) -> None:
    """Take steps done .. cfg.steps - 1: log each, look inside and save where that is due.

    block    the class loss's, for the printed line
    look     (steps done) -> what validation and the lens say, where they are due
    raises   Stopped, BadInput (a user's reward); KeyboardInterrupt after a clean save
    """
    loss_and_grads, update = compile_step(cfg, model, optimizer, loss)
    bar = tqdm(total=cfg.steps, initial=done, disable=None if run.writes else True, unit="step",
               dynamic_ncols=True)
    with workers.deferred_interrupts() as interrupted, bar:
        for step in range(done, cfg.steps):
            # to put back what a failed step has changed: the source moves before the weights do
            start, before, taken = time.perf_counter(), source.state(), optimizer.step.item()
            try:
                metrics = take_step(step, cfg, run, source, loss_and_grads, update, model.parts)
            except Collapsed:       # the guard has put the best weights back
                run.write_files(checkpoint_files(model, cfg))
                raise
            except (BadInput, Stopped):
                # nothing is lost: the step begins anew when the run is continued; one that has
                # moved the weights already, from the last save
                if step and optimizer.step.item() == taken:
                    source.restore(*before)
                    save(cfg, run, step, model, optimizer, source)
                raise
            if run.writes and "collapsed" in metrics:
                tqdm.write(format_collapse(step + 1, metrics), file=sys.stdout)
            record = run.log_step(step + 1, metrics, time.perf_counter() - start, cfg)
            bar.set_postfix({k: f"{record[k]:.3g}" for k in BAR_KEYS if k in record})
            bar.update()
            seen = look(step + 1)
            if seen:
                tqdm.write(format_line(record, seen, block), file=sys.stdout)
            stop = workers.any_of(interrupted)      # all processes end at one step
            due = cfg.save_every_steps and (step + 1) % cfg.save_every_steps == 0
            if stop or due or step + 1 == cfg.steps:
                save(cfg, run, step + 1, model, optimizer, source)
            if stop:
                tqdm.write(f"interrupted; saved after step {step + 1}. The same command continues.",
                           file=sys.stdout)
                raise KeyboardInterrupt


def train(cfg: Config, with_base: bool = True) -> dict:
    """Train as cfg says, or continue where the run folder stands; returns the report.

    with_base  evaluate the model it started from as well
    raises     BadInput, Stopped (guard; loss not finite), KeyboardInterrupt (after a clean save)
    """
    run_folder.check_free(cfg.run_dir)     # or it would be said after loading a model
    workers.connect()
    if cfg.require_gate and workers.rank() == 0:
        run_folder.require_gate(cfg.require_gate, cfg.model)
    folder, raw = read_origin(cfg.model)
    memory.before_loading(parse_args(raw, f"{folder}/config.json"), raw, cfg)
    model, tokenizer = prepare_model(cfg)
    block = cfg.class_block(model.args)
    valid = load_split(cfg, "valid")    # operand pairs, or rows, that training never sees
    cfg = with_template(cfg, tokenizer, valid)
    # all processes plan the step that they take together, and each takes its micro-batches
    whole = replace(cfg, batch_size=cfg.batch_size * workers.size(),
                    grad_accum_steps=cfg.grad_accum_steps * workers.size())
    source, loss = make_method(whole, model, tokenizer)
    about_data = ""
    if cfg.data != "arithmetic":
        from text.own_rows import check_own  # made problems have no use for it
        valid, about_data = check_own(cfg, source.rows, valid, load_split(cfg, "test"), tokenizer,
                                      model.args.max_position_embeddings)
    optimizer = make_optimizer(cfg, model)
    # refuses what will not fit, with what would make it fit
    load = replace(memory.load_of(whole, source), valid=len(valid))
    needed = memory.prepare(cfg, model, raw, load)
    # a Hub name or a data folder may stand for something else when the run is continued
    inputs = {"model": run_folder.hash_frozen(model),
              "data": run_folder.hash_rows([*source.rows, *valid]),
              "processes": str(workers.size())}
    if cfg.method in ON_POLICY and cfg.grpo_guard:
        from guard import Guarded  # supervised runs have none
        source = Guarded(source, model, optimizer)
    # opened after all that can be wrong with the input: a mistake leaves no folder behind
    expected = run_folder.training_arrays(model, optimizer)
    with run_folder.open_for_all(cfg, inputs, expected) as (run, done, arrays, state):
        if done:
            run_folder.restore_training(arrays, model, optimizer)
            source.restore(arrays, state)
        if done >= cfg.steps and run.report():
            run.say(f"{run.folder} is finished ({done} steps); see report.json, "
                    "or give overwrite=true to train again")
            return run.report()
        trainable = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
        run.say(describe_run(cfg, trainable, block, done))
        run.say(memory.describe(needed))
        if about_data:
            run.say(about_data)
        if cfg.method == "dual_reward":
            run.say(describe_classes(tokenizer, source.rows))
        look = partial(look_inside, cfg, run, model, tokenizer, valid)
        if done == 0:
            look(0)
        elif done == cfg.steps:     # killed before its report
            run.write_files(checkpoint_files(model, cfg))
        take_steps(cfg, run, done, model, optimizer, source, loss, look, block)
        return finish(run, needed["peak"], with_base) if run.writes else {}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        raise BadInput("expected `python train.py CONFIG.yaml [key=value ...]`, "
                       "for example `python train.py configs/dual_reward.yaml seed=1`")
    with workers.first_speaks():
        train(load_config(argv[0], argv[1:]))


if __name__ == "__main__":
    run_main(main)

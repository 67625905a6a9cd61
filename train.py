"""The one training loop. Methods differ in their loss, and nothing else.

    python train.py configs/sft.yaml                       # LoRA on the bundled model
    python train.py configs/sft_full.yaml                  # the same, all weights
    python train.py configs/dual_reward.yaml               # also the operation, at a middle block
    python train.py configs/sft.yaml lr=1e-3 steps=200     # any key on the command line

One step: a batch as a pure function of (seed, step) -> loss and gradients of its micro-batches,
summed -> finite? -> clip -> AdamW. Since nothing depends on a hidden position or random state, a
run that was killed continues bit for bit from its last saved state: the same command again. A loss
or gradient that is not finite stops the run before the optimizer has moved.
"""
import json
import resource
import signal
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from safetensors import safe_open
from tqdm import tqdm

import plot
from config import BadInput, Config, Stopped, dump, load_config, resolved, run_main, write_text
from data import Batch, Batches, load_split, tokenize
from eval import (
    class_block,
    make_report,
    measure_accuracy,
    print_report,
    read_series,
    summarize_lens,
    target_ids,
)
from lora import apply_lora, save_adapters
from losses import dual_reward_loss, gather_positions, masked_cross_entropy
from model import Llama, check_tensors, load, read_safetensors, save_model, save_safetensors
from tokenizer import Tokenizer

RUN_FILES = ("config.yaml", "metrics.jsonl", "state.safetensors", "adapters.safetensors",
             "adapter_config.json", "model.safetensors", "config.json", "report.json",
             "emergence.png", "failed_batch.json")
BAR_KEYS = ("loss", "answer_loss", "class_loss", "class_accuracy", "tokens_per_s", "peak_gib")


# --------------------------------------------------------------------------------------------------
# the loss: the only place where methods differ


def make_loss(cfg: Config, block: int):
    """Return loss(model, batch arrays, n_targets, n_rows) -> (scalar, parts) for cfg.method.

    n_targets, n_rows are the whole step's counts, so that micro-batches add up to the step's mean.
    """
    def loss_fn(model: Llama, batch: dict[str, mx.array], n_targets: mx.array, n_rows: mx.array):
        tokens, positions = batch["tokens"], batch["target_positions"]      # (B, T), (B, A)
        if cfg.answer_shift:
            tokens = tokens[:, :-1]     # the last token predicts nothing
        else:
            positions = positions + 1   # the prior code's error A: read at the target itself
        for tap, resid in enumerate(model.stream(tokens)):                  # (B, T, D)
            if tap == block + 1:
                class_resid = resid
        # only the positions that the loss reads are unembedded: (B, A, V), not (B, T, V)
        answer_logits = model.head(gather_positions(resid, positions))
        answer_loss = masked_cross_entropy(
            answer_logits, batch["targets"], batch["target_mask"], n_targets)
        if cfg.method == "sft":
            return answer_loss, {"answer_loss": answer_loss}
        # a head call of its own, not one for both: with class_weight 0 the answer's arithmetic is
        # then SFT's to the bit
        class_logits = model.head(gather_positions(
            class_resid, batch["class_positions"][:, None]))[:, 0]          # (B, V)
        class_loss = masked_cross_entropy(
            class_logits, batch["operation_ids"], batch["row_mask"], n_rows)
        is_right = mx.argmax(class_logits, axis=-1) == batch["operation_ids"]
        class_right = (is_right * batch["row_mask"]).sum() / n_rows
        loss = dual_reward_loss(class_loss, answer_loss, mx.array(cfg.class_weight))
        return loss, {"answer_loss": answer_loss, "class_loss": class_loss,
                      "class_accuracy": class_right}
    return loss_fn


def batch_arrays(batch: Batch) -> dict[str, mx.array]:
    """The arrays the loss reads, as a tree that mx.compile can take."""
    names = ("tokens", "target_positions", "targets", "target_mask",
             "class_positions", "operation_ids", "row_mask")
    return {name: getattr(batch, name) for name in names}


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
# the run folder: everything that a later command, or a later life of this one, needs


def open_run(cfg: Config) -> Path:
    """Make or re-open the run folder; raises BadInput rather than overwrite something else."""
    folder = Path(cfg.run_dir)
    if cfg.overwrite:
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
    if (folder / "config.yaml").exists():
        stored = resolved(load_config(folder / "config.yaml"))
        differ = [f"{k} was {stored.get(k)!r}, is {v!r}" for k, v in resolved(cfg).items()
                  if k != "run_dir" and stored.get(k) != v]
        differ += [f"{k} was {v!r}, is not used" for k, v in stored.items()
                   if k not in resolved(cfg)]
        if differ:
            raise BadInput(f"{folder} holds a run with another config ({'; '.join(differ)}); "
                           "give another run_dir, or overwrite=true to start over")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"run_dir = {folder} exists and is not a run folder "
                       "(it has no config.yaml); give another run_dir")
    else:
        write_text(folder / "config.yaml", dump(cfg))
    return folder


def save_state(folder: Path, step: int, model: Llama, optimizer: optim.Optimizer,
               cfg: Config) -> None:
    """Write all that continuing needs as one file, by one rename: kill -9 leaves no mixture."""
    arrays = {f"trainable.{k}": v for k, v in tree_flatten(model.trainable_parameters())}
    arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
    # random state and data position are functions of these two (data.Batches.at)
    save_safetensors(folder / "state.safetensors", arrays,
                     {"step": str(step), "seed": str(cfg.seed)})


def load_state(folder: Path, model: Llama, optimizer: optim.Optimizer) -> int:
    """Restore trainable weights and optimizer in place; returns the steps done, 0 if no state."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    try:
        arrays = read_safetensors(path)
    except BadInput as error:
        raise BadInput(
            f"cannot continue {folder}: {error}, or overwrite=true to start over") from None
    expected = {f"trainable.{k}": v for k, v in tree_flatten(model.trainable_parameters())}
    expected |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
    check_tensors(arrays, expected, str(path))
    pick = lambda prefix: [(k.removeprefix(prefix), v) for k, v in arrays.items()
                           if k.startswith(prefix)]
    model.load_weights(pick("trainable."), strict=False)  # all of them fit: just checked
    optimizer.state = tree_unflatten(pick("optimizer."))
    with safe_open(path, framework="numpy") as file:
        return int(file.metadata()["step"])


def save_weights(folder: Path, model: Llama, cfg: Config) -> None:
    """Write what eval.py, lens.py and others load: the adapter, or the whole model."""
    if cfg.full:
        save_model(model, folder, cfg.model)
    else:
        save_adapters(model, cfg, folder)


class Metrics:
    """metrics.jsonl, appended line by line; on continuing, later and torn lines are dropped."""

    def __init__(self, path: Path, done: int):
        self.path, self.records = path, []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["step"] > done or done == 0:
                break
            self.records.append(record)
        write_text(path, "".join(json.dumps(r) + "\n" for r in self.records))

    def log(self, record: dict) -> None:
        self.records.append(record)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise BadInput(f"could not write {self.path} ({error.strerror}); free some disk space, "
                           "then run the same command again") from None


# --------------------------------------------------------------------------------------------------
# the loop


def peak_gib() -> float:
    """Peak memory in GiB: the device's on a GPU, the process' on a CPU, where MLX overcounts."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.get_peak_memory() / 2**30
    per_gib = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_gib


def prepare_model(cfg: Config) -> tuple[Llama, Tokenizer]:
    """Load the base, make LoRA's arrays or all weights trainable; random numbers from cfg.seed."""
    mx.random.seed(cfg.seed)
    model, tokenizer = load(cfg.model, cfg.dtype, cfg.bits, cfg.from_scratch)
    if tokenizer is None:
        raise BadInput(f"{cfg.model} has no tokenizer.model and no tokenizer.json; "
                       "add the model's own")
    if not cfg.full:
        apply_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    mx.eval(model.parameters())
    return model, tokenizer


def compile_step(model: Llama, optimizer: optim.Optimizer, loss_fn):
    """Return (loss_and_grads, update), compiled.

    Two functions, since a host check for finite numbers stands between them. The lists of state are
    what makes the compiled functions see weights that change; a closed-over model would be baked in
    as it is now, and the loss would stay the same for ever. Build them after a restore, not before.
    """
    @partial(mx.compile, inputs=[model.state], outputs=[model.state])
    def loss_and_grads(batch, n_targets, n_rows):
        return nn.value_and_grad(model, loss_fn)(model, batch, n_targets, n_rows)

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(grads, scale):
        optimizer.update(model, tree_map(lambda g: g * scale.astype(g.dtype), grads))

    return loss_and_grads, update


def take_step(step: int, micro_batches: list[Batch], loss_and_grads, update, optimizer,
              cfg: Config) -> dict:
    """Take one step, return its metrics; raises Stopped, nothing moved, if one is not finite."""
    n_targets = mx.array(float(sum(b.target_mask.sum().item() for b in micro_batches)))
    n_rows = mx.array(float(sum(b.row_mask.sum().item() for b in micro_batches)))
    grads, metrics = None, {}
    for batch in micro_batches:
        (loss, parts), part_grads = loss_and_grads(batch_arrays(batch), n_targets, n_rows)
        grads = part_grads if grads is None else tree_map(mx.add, grads, part_grads)
        for name, value in {"loss": loss, **parts}.items():
            metrics[name] = metrics.get(name, 0) + value
        # or the graph, and with it all activations, of every micro-batch would be held at once
        mx.eval(grads, metrics)
    norm = mx.sqrt(sum((g.astype(mx.float32) ** 2).sum() for _, g in tree_flatten(grads)))
    metrics = {name: value.item() for name, value in {**metrics, "grad_norm": norm}.items()}
    if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
        raise Stopped(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, "
            f"on rows {[i for b in micro_batches for i in b.rows]}")
    optimizer.learning_rate = lr_at(step, cfg)
    scale = min(1.0, cfg.grad_clip / max(metrics["grad_norm"], 1e-12)) if cfg.grad_clip else 1.0
    update(grads, mx.array(scale))
    return {**metrics, "lr": lr_at(step, cfg)}


def inspect(model: Llama, tokenizer: Tokenizer, valid: list, done: int, block: int,
            cfg: Config) -> dict | None:
    """Validation accuracy and the lens, where due after `done` steps; always at start and end."""
    due = lambda every: every and (done % every == 0 or done == cfg.steps)
    record = {"step": done}
    if due(cfg.eval_every_steps):
        # an even stride, so that every operation and wording is among the chosen
        chosen = valid[::max(1, len(valid) // cfg.eval_prompts)][:cfg.eval_prompts]
        rows = measure_accuracy(model, tokenizer, chosen, cfg.max_completion_tokens)
        record["valid_accuracy"] = float(np.mean([r["correct"] for r in rows]))
    if due(cfg.lens_every_steps):
        chosen = valid[::max(1, len(valid) // cfg.lens_prompts)][:cfg.lens_prompts]
        record["lens"] = summarize_lens(*read_series(model, tokenizer, chosen), block)
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


def load_batches(cfg: Config, model: Llama, tokenizer: Tokenizer) -> Batches:
    """The training split, tokenised and checked."""
    problems = load_split(cfg, "train")
    if cfg.method == "dual_reward" and not all(p.operation for p in problems):
        raise BadInput(f"method dual_reward needs an operation in every row of {cfg.data}; "
                       "some rows have none")
    ids = target_ids(tokenizer, problems, cfg.class_target)
    return Batches(tokenize(problems, tokenizer, model.args.max_position_embeddings, ids), cfg)


def describe(cfg: Config, model: Llama, block: int, done: int) -> str:
    """The first line of a run's output."""
    scale = cfg.lora_alpha / cfg.lora_rank  # PEFT users know alpha, mlx-lm's know the scale
    lora = (f"LoRA on {', '.join(cfg.lora_targets)}, "
            f"rank {cfg.lora_rank}, alpha {cfg.lora_alpha:g}, scale {scale:g}")
    count = sum(v.size for _, v in tree_flatten(model.trainable_parameters()))
    start = f"continuing after step {done}" if done else f"seed {cfg.seed}"
    return (f"{cfg.method} of {cfg.model}: {'all weights' if cfg.full else lora}; "
            f"{count:,} trainable; lens at L{block}; {start}")


def train(cfg: Config) -> dict:
    """Train as cfg says, or continue where the run folder stands; returns the report.

    raises   BadInput, Stopped (a number was not finite), KeyboardInterrupt (after a clean save)
    """
    model, tokenizer = prepare_model(cfg)
    block, batches = class_block(cfg, model), load_batches(cfg, model, tokenizer)
    valid = load_split(cfg, "valid")
    optimizer = optim.AdamW(cfg.lr, weight_decay=cfg.weight_decay, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    # after everything that can be wrong with the input: a mistake leaves no folder behind
    folder = open_run(cfg)
    done = load_state(folder, model, optimizer)
    if done >= cfg.steps and (folder / "report.json").exists():
        print(f"{folder} is finished ({done} steps); see report.json, "
              "or give overwrite=true to train again")
        return json.loads((folder / "report.json").read_text())
    print(describe(cfg, model, block, done))
    metrics = Metrics(folder / "metrics.jsonl", done)
    if done == 0 and (seen := inspect(model, tokenizer, valid, 0, block, cfg)):
        metrics.log(seen)
    # after the restore
    loss_and_grads, update = compile_step(model, optimizer, make_loss(cfg, block))
    bar = tqdm(total=cfg.steps, initial=done, disable=None, unit="step", dynamic_ncols=True)
    with deferred_interrupts() as interrupted, bar:
        for step in range(done, cfg.steps):
            start, micro_batches = time.perf_counter(), batches.at(step)
            try:
                record = take_step(step, micro_batches, loss_and_grads, update, optimizer, cfg)
            except Stopped:
                tokens = [b.tokens.tolist() for b in micro_batches]
                write_text(folder / "failed_batch.json",
                           json.dumps({"step": step + 1, "tokens": tokens}) + "\n")
                save_state(folder, step, model, optimizer, cfg)
                raise
            mx.eval(model.state, optimizer.state)  # or the next step would grow this step's graph
            done = step + 1
            n_tokens = sum(len(batches.rows[i].ids)
                           for b in micro_batches for i in b.rows if i >= 0)
            seconds = time.perf_counter() - start
            record |= {"seconds": round(seconds, 5), "tokens_per_s": round(n_tokens / seconds),
                       "peak_gib": round(peak_gib(), 3)}
            metrics.log({"step": done, **record})
            bar.set_postfix({k: f"{record[k]:.3g}" for k in BAR_KEYS if k in record})
            bar.update()
            if seen := inspect(model, tokenizer, valid, done, block, cfg):
                metrics.log(seen)
                tqdm.write(format_line(record, seen, block), file=sys.stdout)
            due = cfg.save_every_steps and done % cfg.save_every_steps == 0
            if interrupted or due or done == cfg.steps:
                save_state(folder, done, model, optimizer, cfg)
            if interrupted:
                save_weights(folder, model, cfg)
                tqdm.write(f"interrupted; saved after step {done}. The same command continues.",
                           file=sys.stdout)
                raise KeyboardInterrupt
    save_weights(folder, model, cfg)
    return finish(folder, cfg, metrics)


def format_line(record: dict, seen: dict, block: int) -> str:
    """One line of fixed width: the keys of metrics.jsonl, shortened."""
    parts = [f"step {seen['step']:5d}", f"loss {record['loss']:7.4f}"]
    if "class_loss" in record:
        parts.append(f"answer {record['answer_loss']:7.4f}  class {record['class_loss']:7.4f}")
    if "valid_accuracy" in seen:
        parts.append(f"valid {100 * seen['valid_accuracy']:5.1f} %")
    if "lens" in seen:
        parts.append(f"word top-1 at L{block} {100 * seen['lens']['class_top1']:5.1f} %")
    return "  ".join(parts + [f"{record['tokens_per_s']:6d} tok/s",
                              f"{record['peak_gib']:.2f} GiB"])


def finish(folder: Path, cfg: Config, metrics: Metrics) -> dict:
    """Judge the saved weights, as eval.py would, beside the base; write report and pictures."""
    report = make_report(folder, with_base=True) | {"peak_gib": round(peak_gib(), 3)}
    print_report(report)
    plot.emergence(metrics.records, folder / "emergence.png",
                   f"{cfg.method}, {cfg.model}, seed {cfg.seed}")
    # last: its presence says that the run is finished
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {folder}/report.json, metrics.jsonl, emergence.png "
          f"and {'model' if cfg.full else 'adapters'}.safetensors")
    return report


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        raise BadInput("expected `python train.py CONFIG.yaml [key=value ...]`, "
                       "for example `python train.py configs/dual_reward.yaml seed=1`")
    train(load_config(argv[0], argv[1:]))


if __name__ == "__main__":
    run_main(main)

"""Judge a model: are its answers right, and which block already knows?

Two measurements on the same prompts, kept apart. *Accuracy*: greedy completion, graded as a whole,
with a Wilson interval. *Classifier*: the logit lens at the last prompt token, for three series that
are never mixed: the answer's first token, the operation's word, the operator's symbol. An answer
has emerged only where its first token is all of it. Strength is the largest probability before the
last block; the last block's own is the model's output and stands beside it, not in it. Of a user's
own rows also the *loss*, in nats a token; where answers are too long to be matched, ten replies are
there to be read.

    python eval.py --ckpt runs/dual_reward --base                    # beside its base model
    python eval.py --ckpt runs/dual_reward --compare runs/sft        # exact McNemar, same problems
    python eval.py --ckpt models/tiny data_wordings=symbolic,worded  # any model; any config key
"""
import json
import sys
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from checkpoint import checkpoint_files, load_base, load_checkpoint
from config import BadInput, Config, load_config, load_overrides, resolved, run_main
from data import make_batch
from engine import memory
from engine.memory import LENS_PROMPTS
from files.disk import write_text
from files.run_folder import Run, provenance
from generate import Completion, sample
from lens import Reading, read_prompts, read_resids, read_taps
from model import Llama
from report import stats
from report.terminal import publish, report_text
from text.arithmetic import NAMED_PROMPTS, Problem, evenly, grade_reply, named_problems
from text.rows import (
    answer_lengths,
    encode_prompt_of,
    ends_of_reply,
    is_short,
    load_split,
    name_targets,
    series_ids,
    with_template,
)
from text.tokenizer import Tokenizer

REPLIES = 10            # to be read, where answers are too long to be matched


def read_series(model: Llama, tokenizer: Tokenizer, problems: list[Problem], template: str,
                done: list[Completion] | None = None) -> tuple[Reading, np.ndarray]:
    """The lens at each prompt's last token: a Reading (A = 1), and the tokens that it looks for.

    Those are (B, N), of report.stats.SERIES: N is 3, or 1 where no problem names an operation.
    """
    prompts, ids = series_ids(tokenizer, problems, template)
    # a template may begin a reply otherwise where it is still to come
    if done and prompts == [encode_prompt_of(p, tokenizer, template) for p in problems]:
        taps = mx.stack([completion.taps for completion in done], axis=1)           # (L+1, B, D)
        return read_resids(model, list(taps[:, :, None]), mx.array(ids)[:, None]), ids
    return read_prompts(model, prompts, ids.tolist()), ids


def complete(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
             max_completion_tokens: int, template: str,
             keep_taps: bool = False) -> list[Completion]:
    """One greedy reply each, of a conversation the last one, given the earlier turns."""
    prompts = [encode_prompt_of(p, tokenizer, template) for p in problems]
    return sample(model, tokenizer, prompts, max_completion_tokens, keep_taps=keep_taps,
                  **ends_of_reply(problems, tokenizer, template))


def measure_accuracy(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
                     max_completion_tokens: int, template: str = "none") -> list[dict]:
    """Complete and grade problems: [{prompt, expected, generated, correct, operation, wording}]."""
    return grade(problems, complete(model, tokenizer, problems, max_completion_tokens, template))


def grade(problems: list[Problem], done: list[Completion]) -> list[dict]:
    return [{"prompt": p.prompt, "expected": p.answer, "generated": c.text.strip(),
             **grade_reply(p, c.text, c.finished),
             "operation": p.operation, "wording": p.wording} for p, c in zip(problems, done)]


def measure_reward(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
                   cfg: Config) -> list[dict]:
    """Of rows without an answer, judged by cfg.grpo_reward: [{prompt, ..., reward}]."""
    from files.user_reward import call_rewards, load_rewards  # no other method has such rows
    done = complete(model, tokenizer, problems, cfg.max_completion_tokens, cfg.template)
    judged = call_rewards(load_rewards(cfg.grpo_reward), model, tokenizer, problems, done)
    return [{"prompt": p.prompt, "generated": c.text.strip(), "correct": None, "reward": reward,
             "set": "test"} for p, c, reward in zip(problems, done, judged["reward"].tolist())]


def view_end(model: Llama, tokenizer: Tokenizer, problem: Problem, template: str,
             last: int = 16) -> dict:
    """What every block says at the last positions of one prompt: make_view's, for a run's page."""
    ids = encode_prompt_of(problem, tokenizer, template)
    where = mx.arange(len(ids))[-last:][None]                                           # (1, A)
    reading = read_taps(model, mx.array([ids]), where, mx.zeros((*where.shape, 1), mx.int32), k=5)
    return stats.make_view(reading, tokenizer, problem.prompt[-200:], ids[-last:], [], [])


def look_inside(cfg: Config, run: Run, model: Llama, tokenizer: Tokenizer, valid: list,
                done: int) -> dict:
    """Validation accuracy and the lens, where due after `done` steps; always at start and end.

    Of own rows also the loss, the accuracy only where answers are short; of rows without an answer
    the mean reward alone. Of chains also the controls: without one, another's, the frozen base.
    returns  {step, ...}, which is logged, or {} where nothing is due
    """
    if not run.writes:
        return {}

    def is_due(every):
        return every and (done % every == 0 or done == cfg.steps)

    record, has_answers = {}, all(p.answer for p in valid)
    if is_due(cfg.eval_every_steps):
        chosen = evenly(valid, cfg.eval_prompts)
        if cfg.method == "markovian":
            from markovian import evaluate_chains  # no other method writes chains
            record["valid"] = stats.summarize_chains(evaluate_chains(model, tokenizer, chosen, cfg))
            record["valid_accuracy"] = record["valid"]["correct"]["value"]
        elif not has_answers:
            rows = measure_reward(model, tokenizer, chosen, cfg)
            record["valid_reward"] = float(np.mean([r["reward"] for r in rows]))
        elif is_short(chosen, tokenizer, cfg):
            rows = measure_accuracy(model, tokenizer, chosen, cfg.max_completion_tokens,
                                    cfg.template)
            record["valid_accuracy"] = float(np.mean([r["correct"] for r in rows]))
        if cfg.has_loss:
            from report.loss import measure_loss  # made problems have no use for it
            found = stats.summarize_loss(measure_loss(model, tokenizer, chosen, cfg, make_batch))
            record |= {f"valid_{key}": found[key]["value"] for key in ("loss", "perplexity")}
    if is_due(cfg.lens_every_steps) and cfg.method != "markovian" and has_answers:
        chosen = evenly(valid, min(cfg.eval_prompts, LENS_PROMPTS))
        reading, ids = read_series(model, tokenizer, chosen, cfg.template)
        record["lens"] = stats.summarize_lens(reading, ids, cfg.class_block(model.args))
        record["view"] = view_end(model, tokenizer, chosen[0], cfg.template)
    if not record:
        return {}
    seen = {"step": done} | record
    run.keep_if_best(seen, checkpoint_files(model, cfg))
    return seen


def evaluate(model: Llama, tokenizer: Tokenizer, cfg: Config, called: str = "") -> dict:
    """Everything report.json says about one model, over test problems and named prompts."""
    test = load_split(cfg, "test")
    if cfg.method == "markovian":
        return evaluate_on_chains(model, tokenizer, test, cfg)
    to_reason = any(p.hidden for p in test)
    if to_reason and cfg.template == "none":
        raise BadInput(f"data {cfg.data} holds questions to reason about; give method=markovian, "
                       "or for an instruct model template=chat max_completion_tokens=256")
    limit, context, own = cfg.max_completion_tokens, model.args.max_position_embeddings, {}
    if cfg.data != "arithmetic":
        from text.own_rows import prepare_test  # made problems have no use for it
        test, limit, own["data"] = prepare_test(test, tokenizer, context, cfg)
    if not all(p.answer for p in test):
        rows = measure_reward(model, tokenizer, test, cfg)
        return {**own, "reward": stats.bootstrap_mean([r["reward"] for r in rows]), "layers": [],
                "prompts": rows}
    if cfg.has_loss and not to_reason:
        from report.loss import measure_loss  # as above
        own |= stats.summarize_loss(measure_loss(model, tokenizer, test, cfg, make_batch))
    named = {name: named_problems(name) for name in NAMED_PROMPTS if cfg.data == "arithmetic"}
    problems = test + [p for group in named.values() for p in group]
    sets = ["test"] * len(test) + [name for name, group in named.items() for _ in group]
    short = is_short(test, tokenizer, cfg)
    asked = evenly(range(len(problems)), len(problems) if short else REPLIES)
    some = [problems[i] for i in asked]     # all, where answers can be matched
    if called and sys.stderr.isatty():
        print(f"{called}: {len(some)} answers, {len(problems)} prompts' lens ...", file=sys.stderr)
    done = complete(model, tokenizer, some, limit, cfg.template, keep_taps=short)
    reading, ids = read_series(model, tokenizer, problems, cfg.template, done if short else None)
    rows = grade(some, done)
    for i, row in zip(asked, rows):
        row |= {"set": sets[i], **stats.peak_of_prompt(reading.probs[:, i, 0])}
    lengths, block = answer_lengths(tokenizer, test, cfg.template), cfg.class_block(model.args)
    return {
        **own, **(stats.summarize_accuracy(rows) if short else {}),
        **stats.summarize_classifier(reading, ids[:len(test)], lengths, block),
        **name_targets(tokenizer, problems, test, cfg),
        "prompts": rows,
    }


def evaluate_on_chains(model: Llama, tokenizer: Tokenizer, test: list[Problem],
                       cfg: Config) -> dict:
    """The same for questions with a chain: the lens looks behind "Answer:", with the chain in view.

    The only series is the answer's first token: there is no operation to name.
    """
    from markovian import evaluate_chains  # no other method writes chains
    from text.questions import answer_prompt, encode_question
    rows = evaluate_chains(model, tokenizer, test, cfg)
    questions = [encode_question(p, tokenizer, cfg.markovian, cfg.template) for p in test]
    prompts = [answer_prompt(q, row["chain_ids"], tokenizer) for q, row in zip(questions, rows)]
    ids = np.array([[q.answer[0]] for q in questions])
    reading = read_prompts(model, prompts, ids.tolist())
    for i, row in enumerate(rows):
        row |= {"set": "test", **stats.peak_of_prompt(reading.probs[:, i, 0])}
    graded = [row for row in rows if row["correct"] is not None]
    lengths = np.array([len(q.answer) - (q.answer[-1] == tokenizer.eos_id) for q in questions])
    return {**stats.summarize_accuracy(graded), "chains": stats.summarize_chains(rows),
            **stats.summarize_classifier(reading, ids, lengths, cfg.class_block(model.args)),
            "targets": {}, "class_targets": {}, "prompts": rows}


def make_report(ckpt: str | Path, with_base: bool, compare: str | None = None,
                overrides: list[str] = (), adapter: str | None = None) -> dict:
    """Evaluate a run or a model, its base, another run on the same problems: report.json's content.

    adapter  a folder, on top of ckpt, which is then the base
    """
    model, tokenizer, cfg = load_checkpoint(ckpt, adapter)
    if overrides and cfg:  # e.g. another wording for a finished run
        cfg = load_config(Path(ckpt) / "config.yaml", overrides)
    cfg = cfg or load_overrides(overrides)
    cfg = with_template(cfg, tokenizer, load_split(cfg, "test"))
    report = {"ckpt": f"{ckpt} + {adapter}" if adapter else str(ckpt),
              "method": cfg.method if (Path(ckpt) / "config.yaml").exists() else "none",
              "seed": cfg.seed, **evaluate(model, tokenizer, cfg, str(ckpt)),
              "config": resolved(cfg), "versions": provenance()}
    if with_base and adapter:
        base_model, base_tokenizer, _ = load_checkpoint(ckpt)
        report["base"] = {"ckpt": str(ckpt), **evaluate(base_model, base_tokenizer, cfg, "base")}
    elif with_base and report["method"] != "none" and not cfg.from_scratch:
        base_model, base_tokenizer = load_base(cfg.model, cfg.dtype, cfg.bits)
        report["base"] = {"ckpt": cfg.model, **evaluate(base_model, base_tokenizer, cfg, "base")}
    if compare:
        other_model, other_tokenizer, other_cfg = load_checkpoint(compare)
        if other_cfg and (other_cfg.method == "markovian") != (cfg.method == "markovian"):
            raise BadInput(f"--compare {compare} has method {other_cfg.method}, {ckpt} has "
                           f"{cfg.method}; expected both with chains of thought, or both without")
        other = {"ckpt": str(compare), **evaluate(other_model, other_tokenizer, cfg, compare)}
        report["compare"] = {**other, **stats.compare_rows(report, other)}
    return report


def finish(run: Run, estimated: float, with_base: bool) -> dict:
    """Evaluate the saved weights, as eval.py would, beside the base; write report and pictures."""
    peak = memory.peak_gib()    # of training: evaluating may load the base as well
    run.say("testing on all test problems ...")
    report = make_report(run.folder, with_base)
    report |= {"peak_gib": round(peak, 3), "estimated_peak_gib": round(estimated, 3)}
    publish(report, run.folder, run.records, peak, estimated)
    return report


def main(argv: list[str]) -> None:
    from files.options import eval_options  # training evaluates too, and has no such words
    args = eval_options(argv)
    report = make_report(args.ckpt, args.base, args.compare, args.overrides, args.adapter)
    print(report_text(report))
    if args.json:
        write_text(Path(args.json), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)

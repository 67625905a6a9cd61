"""What train.py and eval.py print, as text: a training run's lines, the report's tables.

Every function takes the plain numbers that metrics.jsonl and report.json hold, so that a line can
be made again from a file. No model and no array comes in.
"""
import json
from pathlib import Path

from config import Config
from files.disk import write_text
from report.stats import EMERGED, interval_text, percent
from text.arithmetic import evenly

# --------------------------------------------------------------------------------------------------
# a training run, line by line


def describe_run(cfg: Config, trainable: int, block: int, done: int) -> str:
    """The first line of a run's output; trainable counts numbers, block is the class loss's."""
    scale = cfg.lora_alpha / cfg.lora_rank  # PEFT users know alpha, mlx-lm's know the scale
    lora = (f"LoRA on {', '.join(cfg.lora_targets)}, "
            f"rank {cfg.lora_rank}, alpha {cfg.lora_alpha:g}, scale {scale:g}")
    start = f"continuing after step {done}" if done else f"seed {cfg.seed}"
    return (f"{cfg.method} of {cfg.model}: {'all weights' if cfg.full else lora}; "
            f"{trainable:,} trainable; lens at L{block}; {start}")


def format_line(record: dict, seen: dict, block: int) -> str:
    """One line of fixed width: the keys of metrics.jsonl, shortened."""
    if "reward" in record:
        return format_rollouts(record, seen)
    parts = [f"step {seen['step']:5d}", f"loss {record['loss']:7.4f}"]
    if "class_loss" in record:
        parts.append(f"answer {record['answer_loss']:7.4f}  class {record['class_loss']:7.4f}")
    if "valid_loss" in seen:
        parts.append(f"valid loss {seen['valid_loss']:7.4f}, "
                     f"perplexity {seen['valid_perplexity']:.4g}")
    if "valid_accuracy" in seen:
        parts.append(f"valid {100 * seen['valid_accuracy']:5.1f} %")
    if "class_top1" in seen.get("lens", {}):
        parts.append(f"word top-1 at L{block} {100 * seen['lens']['class_top1']:5.1f} %")
    return "  ".join(parts + [f"{record['tokens_per_s']:6d} tok/s",
                              f"{record['peak_gib']:.2f} GiB"])


def format_rollouts(record: dict, seen: dict) -> str:
    """The same for rollouts: rewards, distances, and where the time goes."""
    parts = [f"step {seen['step']:5d}", f"reward {record['reward']:7.3f}"]
    if "accuracy" in record:
        parts.append(f"right {100 * record['accuracy']:5.1f} %")
    if "frozen_reward" in record:
        parts.append(f"frozen judge {record['frozen_reward']:7.3f}")
    if "valid" in seen:
        parts.append(format_chains(seen["valid"]))
    elif "valid_accuracy" in seen:
        parts.append(f"valid {100 * seen['valid_accuracy']:5.1f} %")
    elif "valid_reward" in seen:
        parts.append(f"valid reward {seen['valid_reward']:.3f}")
    if "kl_k3" in record:
        parts.append(f"KL {record['kl_k3']:.4f}")
    shares = [100 * record[k] / record["seconds"] for k in ("rollout_s", "score_s", "update_s")]
    return "  ".join(parts + [
        f"entropy {record['entropy']:.3f}", f"length {record['length']:.2f}",
        f"no variance {100 * record['zero_variance_groups']:3.0f} %",
        f"{record['completions_per_s']:5d} compl/s",
        "time rollout {:.0f}, score {:.0f}, update {:.0f} %".format(*shares),
        f"{record['peak_gib']:.2f} GiB"])


def format_collapse(step: int, metrics: dict) -> str:
    """What the guard has done (guard.Guarded)."""
    return (f"step {step:5d}  collapse: {metrics['collapsed']}; best weights restored, "
            f"learning rate times {metrics['lr_scale']:g}")


def format_chains(valid: dict) -> str:
    """example  "valid 71.0 %, frozen 70.5, empty 2.0, shuffled 3.0; -0.61 nats" """
    nats = f"{valid['reward']['value']:.2f} nats"
    if valid["correct"]["value"] is None:
        return f"valid {nats}"
    of = lambda key: f"{100 * valid[key]['value']:.1f}"
    return (f"valid {of('correct')} %, frozen {of('correct_frozen')}, empty {of('correct_empty')}, "
            f"shuffled {of('correct_shuffled')}; {nats}")


def report_text(report: dict) -> str:
    """Tables for a person: accuracy beside the base, the prior work's prompt table, the layers."""
    about = "test pairs never seen in training; 95 % Wilson intervals"
    if "data" in report:
        about = f"95 % intervals, of means by a bootstrap over rows\n  {report['data']}"
    lines = [f"\n{report['ckpt']} ({report['method']}, seed {report['seed']}); {about}"]
    if "reward" in report:      # of rows without an answer, which the lens could look for
        return "\n".join(lines + reward_lines(report))
    lines += chain_lines(report) if "chains" in report else accuracy_lines(report)
    lines += target_lines(report)
    heads = {"answer": "answer", "operation": "operation word", "symbol": "symbol"}
    lines.append("\n  block   " + "".join(f"{heads[name]:<24}" for name in series_of(report))
                 + "entropy    (mean probability, median rank)")
    for layer in reversed(report["layers"]):
        cells = "".join(f"{layer[name]['prob']:.4f}  #{layer[name]['rank']:<14.0f}"
                        for name in series_of(report))
        output = "   (the output itself)" if layer["last"] else ""
        lines.append(f"  L{layer['layer']:<6} {cells}{layer['entropy']:.2f}{output}")
    return "\n".join(lines + (reply_lines(report) if "data" in report else []))


def publish(report: dict, folder: Path, records: list[dict], peak: float,
            estimated: float) -> None:
    """Print a run's report and write it into its folder, with pictures of its metrics.jsonl."""
    print(report_text(report))
    cfg = report["config"]
    title = f"{cfg['method']}, {cfg['model']}, seed {cfg['seed']}"
    from report.plot import plot_run  # most of a second, which a run needs at its end only
    pictures = plot_run(records, folder, title, report.get("class", {}).get("layer"))
    # last: its presence says that the run is finished
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    files = ["report.json", "metrics.jsonl", *pictures,
             "model.safetensors" if cfg["full"] else "adapters.safetensors"]
    print(f"\nwrote {folder}/{', '.join(files)}; "
          f"peak memory {peak:.2f} GiB, estimated {estimated:.2f}")


def series_of(report: dict) -> list[str]:
    """The series that are told: where no problem names an operation, the answer's alone."""
    return list(report["strength"]) if report["targets"] else ["answer"]


def target_lines(report: dict) -> list[str]:
    """Which tokens the series are, and where the answer's is only its first."""
    targets = report["targets"].values()
    named = {"operation word": [f"{t['word_piece']} ({t['word']})" for t in targets],
             "symbol": [f"{t['symbol_piece']} ({t['symbol']})" for t in targets],
             "class loss": [f"{operation} {t['piece']} ({t['id']})"
                            for operation, t in report["class_targets"].items()]}
    notes = [f"{label + ':':<16}{', '.join(tokens)}" for label, tokens in named.items() if tokens]
    counted = report["one_token_answers"]
    if counted["value"] != 1:
        notes.append(f"{'answer:':<16}its first token" + (
            f"; {100 * counted['value']:.1f} % of the test answers are one token, and emerged is "
            "said of those alone" if counted["value"] else ""))
    return ["\n  tokens read as  " + "\n                  ".join(notes)] if notes else []


def columns_of(report: dict) -> tuple[str, list[dict]]:
    """The head of a table: base, this model, another; and those that there are."""
    reports = {"base": report.get("base"), "this": report, "other": report.get("compare")}
    reports = {name: r for name, r in reports.items() if r}
    names = [f"{name + ': ' + r['ckpt']:<33} " for name, r in reports.items()]
    return " " * 36 + "".join(names), list(reports.values())


def row(label: str, cells: list[str]) -> str:
    return f"  {label:<34}" + "".join(f"{cell:<34}" for cell in cells)


def accuracy_lines(report: dict) -> list[str]:
    """Accuracy and what emerged; of own rows also the loss. Operations only where rows name one."""
    head, reports = columns_of(report)
    named, keys = bool(report["targets"]), {}
    if "accuracy" in report:
        keys["accuracy, all test problems"] = ("accuracy",)
        keys |= {"accuracy, add and subtract": ("accuracy_add_subtract",)} if named else {}
        keys |= {"no answer to read (invalid)": ("invalid",)} if "invalid" in report else {}
        if named or len(report["accuracy_by"]) > 1:
            keys |= {f"  {cell}": ("accuracy_by", cell) for cell in report["accuracy_by"]}
        keys |= {f"  the prior work's {name} prompts": ("accuracy_named", name)
                 for name in report["accuracy_named"]}
    if named:
        keys[f"operation word top-1 at L{report['class']['layer']}"] = ("class", "top1")
    shown = series_of(report)
    if any(r["one_token_answers"]["value"] for r in reports):
        keys["answers of one token"] = ("one_token_answers",)
    else:
        shown.remove("answer")      # emerged is said of answers of one token
    keys |= {f"{name} emerged (> {EMERGED})": ("strength", name, "emerged") for name in shown}
    if any(r["one_token_answers"]["value"] != 1 for r in reports):
        keys["first token emerged, all answers"] = ("strength", "answer", "first_token", "emerged")
    lines = [head]
    for label, path in keys.items():
        cells = reports
        for key in path:
            cells = [cell[key] for cell in cells]
        lines.append(row(label, [percent(cell) for cell in cells]))
    if "loss" in report:
        lines[1:1] = loss_lines(reports)
    lines += mcnemar_lines(report)
    return lines + (prompt_lines(report["prompts"]) if report.get("accuracy_named") else [])


def loss_lines(reports: list[dict]) -> list[str]:
    return [row("test loss, nats a token", [f"{interval_text(r['loss'], digits=4)} "
                                            f"n={r['loss']['n']}" for r in reports]),
            row("perplexity", ["{value:.4g} [{low:.4g}, {high:.4g}]".format(
                **r["perplexity"]) for r in reports])]


def reward_lines(report: dict) -> list[str]:
    """The mean reward of greedy replies, beside the base's and another run's, and three replies."""
    head, reports = columns_of(report)
    lines = [head, row("reward of greedy replies", [interval_text(r["reward"]) for r in reports])]
    return lines + [f"\n  {sample['prompt'][-200:]!r}\n    reply {sample['generated'][:300]!r}, "
                    f"reward {sample['reward']:.3f}" for sample in report["prompts"][:3]]


def chain_lines(report: dict) -> list[str]:
    """What the chains carry, beside the base's and another run's, and the first three chains."""
    head, reports = columns_of(report)
    lines = [head]
    for label, key in (("accuracy, greedy chain and answer", "correct"),
                       ("  the same chains, frozen answerer", "correct_frozen"),
                       ("  without a chain", "correct_empty"),
                       ("  with another problem's chain", "correct_shuffled"),
                       ("no answer to read (invalid)", "invalid"),
                       ("chains ended by themselves", "chain_finished")):
        lines.append(row(label, [percent(r["chains"][key]) for r in reports]))
    for label, key in (("log p(answer | chain), nats", "reward"),
                       ("  by the frozen base", "reward_frozen"),
                       ("  without a chain", "reward_empty"), ("tokens a chain", "chain_tokens")):
        lines.append(row(label, [interval_text(r["chains"][key]) for r in reports]))
    lines += mcnemar_lines(report)
    for sample in report["prompts"][:3]:
        # what tasks.chain_prompt put around it
        question = sample["prompt"].partition("\nQuestion: ")[2].removesuffix("\nReasoning:")
        lines.append(f"\n  {question[:200]!r}\n    chain  {sample['chain'][:300]!r}\n"
                     f"    answer {sample['generated']!r}, expected {sample['expected'][:60]!r}")
    return lines


def mcnemar_lines(report: dict) -> list[str]:
    lines, found = [], report.get("compare", {})
    if "mcnemar" in found:
        test = found["mcnemar"]
        lines.append(f"  McNemar, exact: {test['only_first']} solved only by this, "
                     f"{test['only_second']} only by the other, p = {test['p']:.3g}")
    if "loss_difference" in found:
        lines.append("  the other's loss less this one's, on the same rows: "
                     + interval_text(found["loss_difference"], digits=4, sign="+"))
    return lines


def reply_lines(report: dict) -> list[str]:
    """Ten rows of a user's data: what was asked, what was expected, what was generated."""
    lines = [] if "accuracy" in report else [
        "\n  right answers are not counted: texts, or answers longer than max_completion_tokens = "
        f"{report['config']['max_completion_tokens']}; replies to read:"]
    for reply in evenly(report["prompts"], 10):
        right = " (right)" if "accuracy" in report and reply["correct"] else ""
        lines += [f"\n  prompt     {shortened(reply['prompt'])}",
                  f"  expected   {shortened(reply['expected'])}",
                  f"  generated  {shortened(reply['generated'])}{right}"]
    return lines


def shortened(text: str) -> str:
    """A text in quotes; of a long one its beginning and its end."""
    return repr(text if len(text) <= 100 else f"{text[:60]} ... {text[-35:]}")


def prompt_lines(prompts: list[dict]) -> list[str]:
    """The prior work's table over its named prompts, with the classifier's layer and confidence."""
    lines = [f"\n  {'prompt':<14}{'expected':>9}{'generated':>11}  right  "
             f"{'answer before the last block':<30}operation word before the last block"]
    for prompt in {p["prompt"]: p for p in prompts if p["set"] != "test"}.values():
        answer, word = (f"L{prompt[name + '_layer']} {prompt[name + '_prob']:.3f} "
                        f"(last block {prompt[name + '_prob_last']:.3f})"
                        for name in ("answer", "operation"))
        right = "yes" if prompt["correct"] else "no"
        lines.append(f"  {prompt['prompt']:<14}{prompt['expected']:>9}"
                     f"{prompt['generated'][:10]:>11}  {right:<7}{answer:<30}{word}")
    return lines

"""Judge a model: are its answers right, and which block already knows?

Two measurements on the same prompts, kept apart. *Accuracy*: greedy completion, graded as a whole
(data.grade), with a Wilson interval. *Classifier*: the logit lens at the last prompt token, for
three series that are never mixed: the answer's first token, the operation's word, the operator's
symbol. Words are compared in one form, with a space before them or without (Tokenizer.word_ids),
and an answer has emerged only where its first token is all of it. Strength is the largest
probability before the last block; the last block's own is the model's output and stands beside it,
not in it. (The prior code took the maximum over all blocks, and counted any of twenty top tokens
that contained any of the words or answers as a substring.)

    python eval.py --ckpt runs/dual_reward --base                    # beside its base model
    python eval.py --ckpt runs/dual_reward --compare runs/sft        # exact McNemar, same problems
    python eval.py --ckpt models/tiny data_wordings=symbolic,worded  # any model; any config key
"""
import argparse
import json
from collections import Counter
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import numpy as np

from config import BadInput, Config, load_config, load_overrides, resolved, run_main, write_text
from data import (
    NAMED_PROMPTS,
    SYMBOLS,
    Problem,
    encode_problem,
    encode_prompt_of,
    evenly,
    grade,
    load_split,
    named_problems,
    stable_hash,
)
from generate import sample
from lens import Reading, read_prompts
from lora import load_base, load_checkpoint
from markovian import answer_prompt, encode_question, evaluate_chains, summarize_chains
from model import Llama
from provenance import provenance
from stats import bootstrap_mean, mcnemar, percent, wilson
from tokenizer import STOPS, Tokenizer

SERIES = ("answer", "operation", "symbol")


def last_token(tokenizer: Tokenizer, problems: list[Problem], template: str = "none") -> int:
    """What stands before the position that the lens reads: the prompts' commonest last token.

    One for all problems: a word has one token in a report, however a user's rows may end.
    """
    prompts = [encode_prompt_of(p, tokenizer, template) for p in evenly(problems, 100)]
    return Counter(ids[-1] for ids in prompts).most_common(1)[0][0]


def target_ids(tokenizer: Tokenizer, problems: list[Problem], target: str,
               template: str = "none") -> dict[str, int]:
    """The one token of each operation's word or symbol, all in one form (Tokenizer.word_ids).

    raises   BadInput where a word or symbol is not one token
    """
    operations = sorted({p.operation for p in problems} - {""})
    if not operations:
        return {}
    name = lambda op: SYMBOLS.get(op, op) if target == "symbol" else op
    before = [last_token(tokenizer, problems, template)]
    # the form that suits all four operations, or problems without subtraction could be read in
    # another than the one that was trained
    others = [op for op in SYMBOLS if op not in operations]
    others = others if set(operations) <= set(SYMBOLS) else []
    try:
        ids = tokenizer.word_ids([name(op) for op in operations + others], before)
    except BadInput:        # one that no problem asks for may be in the way
        ids = tokenizer.word_ids([name(op) for op in operations], before)
    return dict(zip(operations, ids))


def class_word_ids(cfg: Config, tokenizer: Tokenizer, problems: list[Problem]) -> dict[str, int]:
    """The token that the class loss wants for each operation, but for class_target answer, random.

    class_words are a set of their own, in one form.
    """
    if cfg.class_words:
        before = [last_token(tokenizer, problems, cfg.template)]
        return dict(zip(cfg.data_operations, tokenizer.word_ids(list(cfg.class_words), before)))
    target = "symbol" if cfg.class_target == "symbol" else "word"
    return target_ids(tokenizer, problems, target, cfg.template)


def class_ids(cfg: Config, tokenizer: Tokenizer, problems: list[Problem]) -> list[int]:
    """The token that the class loss wants for each problem, by cfg.class_target and class_words.

    The two controls depend on the prompt's text alone, so a problem keeps its target in every epoch
    and for every seed: it can be learnt by heart, but not from what the problem asks.
    """
    if cfg.class_target == "answer":
        rows = [encode_problem(p, tokenizer, cfg.template) for p in problems]
        return [row.ids[row.P] for row in rows]
    draw = lambda p, n: stable_hash(p.prompt) % n
    if cfg.class_target == "random":
        return [draw(p, tokenizer.vocab_size) for p in problems]
    ids = class_word_ids(cfg, tokenizer, problems)
    if cfg.class_target == "shuffled":
        words = [ids[op] for op in cfg.data_operations if op in ids]
        return [words[draw(p, len(words))] for p in problems]
    return [ids[p.operation] for p in problems]


def class_block(cfg: Config, model: Llama) -> int:
    """The 0-based block the class loss reads: cfg.class_layer, or 55 % of depth (prior work)."""
    L = model.args.num_hidden_layers
    block = int(0.55 * L) if cfg.class_layer is None else cfg.class_layer
    if not 0 <= block < L:
        raise BadInput(f"class_layer = {block}: expected a block from 0 to {L - 1} of {cfg.model}")
    return block


def series_ids(tokenizer: Tokenizer, problems: list[Problem],
               template: str = "none") -> tuple[list[list[int]], np.ndarray]:
    """Each problem's prompt as ids, and the tokens of SERIES, (B, 3).

    Rows of a user's data without an operation follow the answer in all three series.
    """
    words = target_ids(tokenizer, problems, "word", template)
    symbols = target_ids(tokenizer, problems, "symbol", template)
    prompts, ids = [], []
    for p in problems:
        row = encode_problem(p, tokenizer, template)
        answer = row.ids[row.P]
        prompts.append(row.ids[:row.P])
        ids.append([answer, words.get(p.operation, answer), symbols.get(p.operation, answer)])
    return prompts, np.array(ids)


def answer_lengths(tokenizer: Tokenizer, problems: list[Problem],
                   template: str = "none") -> np.ndarray:
    """Tokens of each problem's answer without what ends it, (B,).

    example  models/tiny: "56" -> 1; SmolLM2, whose digits are tokens: "56" -> 2
    """
    lengths = []
    for p in problems:
        row = encode_problem(p, tokenizer, template)
        stop = row.spans[-1][1] if row.spans else len(row.ids)
        # a chat template may write nothing that ends a reply
        lengths.append(stop - row.P - (row.ids[stop - 1] in tokenizer.reserved_ids))
    return np.array(lengths)


def read_series(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
                template: str = "none") -> tuple[Reading, np.ndarray]:
    """The lens at each prompt's last token: a Reading (A = 1, N = 3) of SERIES, and series_ids."""
    prompts, ids = series_ids(tokenizer, problems, template)
    return read_prompts(model, prompts, ids.tolist()), ids


def summarize_lens(reading: Reading, ids: np.ndarray, block: int) -> dict:
    """Means over prompts for metrics.jsonl: per tap each series' probability and top-1 share."""
    summary = {"class_top1": float((reading.top_ids[block + 1, :, 0, 0] == ids[:, 1]).mean())}
    for n, name in enumerate(SERIES):
        summary[name] = {
            "prob": reading.probs[:, :, 0, n].mean(1).round(5).tolist(),
            "top1": (reading.top_ids[:, :, 0, 0] == ids[:, n]).mean(1).round(5).tolist()}
    return summary


def measure_accuracy(model: Llama, tokenizer: Tokenizer, problems: list[Problem],
                     max_completion_tokens: int, template: str = "none") -> list[dict]:
    """Complete and grade problems: [{prompt, expected, generated, correct, operation, wording}].

    Of a conversation the last reply, given all before it as it is in the data. It ends as it was
    trained to: at EOS, and where all replies are of one line at a line break, but for a chat.
    """
    prompts = [encode_prompt_of(p, tokenizer, template) for p in problems]
    many_lines = template != "none" and (
        template == "chat" or any("\n" in p.answer for p in problems))
    done = sample(model, tokenizer, prompts, max_completion_tokens, many_lines=many_lines,
                  stops=STOPS[template] if many_lines else ())
    return [{"prompt": p.prompt, "expected": p.answer, "generated": c.text.strip(),
             "correct": grade(p.answer, c.text, c.finished),
             "operation": p.operation, "wording": p.wording} for p, c in zip(problems, done)]


def judge(model: Llama, tokenizer: Tokenizer, cfg: Config) -> dict:
    """Everything report.json says about one model, over test problems and named prompts."""
    test = load_split(cfg, "test")
    if cfg.method == "markovian":
        return judge_chains(model, tokenizer, test, cfg)
    if any(p.hidden for p in test):
        raise BadInput(f"data {cfg.data} holds questions to reason about; give method=markovian")
    named = {name: named_problems(name) for name in NAMED_PROMPTS if cfg.data == "arithmetic"}
    problems = test + [p for group in named.values() for p in group]
    sets = ["test"] * len(test) + [name for name, group in named.items() for _ in group]
    reading, ids = read_series(model, tokenizer, problems, cfg.template)
    rows = measure_accuracy(model, tokenizer, problems, cfg.max_completion_tokens, cfg.template)
    for i, row in enumerate(rows):
        row |= {"set": sets[i], **peak_of_prompt(reading.probs[:, i, 0])}
    lengths = answer_lengths(tokenizer, test, cfg.template)
    return {
        **summarize_accuracy(rows),
        **summarize_classifier(reading.first(len(test)), ids[:len(test)], lengths,
                               class_block(cfg, model)),
        **name_targets(tokenizer, problems, test, cfg),
        "prompts": rows,
    }


def name_targets(tokenizer: Tokenizer, problems: list[Problem], test: list[Problem],
                 cfg: Config) -> dict:
    """Which tokens the series follow in problems, which the class loss trained for those of test.

    By id and piece: whether "add" was looked for with its space before it decides what is found.
    """
    words = target_ids(tokenizer, problems, "word", cfg.template)
    symbols = target_ids(tokenizer, problems, "symbol", cfg.template)
    trained = (class_word_ids(cfg, tokenizer, test) if cfg.method == "dual_reward"
               and cfg.class_target not in ("answer", "random") else {})
    return {
        "targets": {op: {"word": words[op], "word_piece": tokenizer.piece(words[op]),
                         "symbol": symbols[op], "symbol_piece": tokenizer.piece(symbols[op])}
                    for op in words},
        "class_targets": {op: {"id": token, "piece": tokenizer.piece(token)}
                          for op, token in trained.items()},
    }


def judge_chains(model: Llama, tokenizer: Tokenizer, test: list[Problem], cfg: Config) -> dict:
    """The same for questions with a chain: the lens looks behind "Answer:", with the chain in view.

    All three series are the answer's first token: there is no operation to name.
    """
    rows = evaluate_chains(model, tokenizer, test, cfg)
    questions = [encode_question(p, tokenizer, cfg.markovian) for p in test]
    prompts = [answer_prompt(q, row["chain_ids"], tokenizer) for q, row in zip(questions, rows)]
    ids = np.array([[q.answer[0]] * len(SERIES) for q in questions])
    reading = read_prompts(model, prompts, ids.tolist())
    for i, row in enumerate(rows):
        row |= {"set": "test", **peak_of_prompt(reading.probs[:, i, 0])}
    graded = [row for row in rows if row["correct"] is not None]
    lengths = np.array([len(q.answer) - (q.answer[-1] == tokenizer.eos_id) for q in questions])
    return {**summarize_accuracy(graded), "chains": summarize_chains(rows),
            **summarize_classifier(reading, ids, lengths, class_block(cfg, model)), "targets": {},
            "class_targets": {}, "prompts": rows}


def peak_of_prompt(probs: np.ndarray) -> dict:
    """Where each series peaks before the last block, and the last block's own; probs (L+1, 3)."""
    row = {}
    for n, name in enumerate(SERIES):
        inner = probs[1:-1, n]  # blocks 0 .. L-2: the last is the output itself
        row |= {f"{name}_layer": int(inner.argmax()), f"{name}_prob": float(inner.max()),
                f"{name}_prob_last": float(probs[-1, n])}
    return row


def summarize_accuracy(rows: list[dict]) -> dict:
    """Wilson intervals: all test problems, each operation and wording, + and -; named prompts."""
    def share(keep) -> dict:
        correct = [row["correct"] for row in rows if keep(row)]
        return wilson(sum(correct), len(correct))
    test = [row for row in rows if row["set"] == "test"]
    cells = {}
    for row in test:
        cells.setdefault(f"{row['operation']} {row['wording']}".strip(), []).append(row["correct"])
    return {
        "accuracy": share(lambda row: row["set"] == "test"),
        "accuracy_by": {cell: wilson(sum(correct), len(correct))
                        for cell, correct in sorted(cells.items())},
        "accuracy_add_subtract": share(
            lambda row: row["set"] == "test" and row["operation"] in ("add", "subtract")),
        "accuracy_named": {name: share(lambda row, name=name: row["set"] == name)
                           for name in dict.fromkeys(r["set"] for r in rows) if name != "test"},
    }


def summarize_classifier(reading: Reading, ids: np.ndarray, lengths: np.ndarray,
                         block: int) -> dict:
    """The classifier's figures over B prompts: at the trained block, per series, per block.

    ids, lengths  series_ids and answer_lengths. The answer's series is its first token's. Where
                  digits are tokens many answers share one, and a model that knows no answer may
                  have it. "Emerged" is therefore said of answers of one token alone; what all
                  first tokens do stands apart, under first_token
    """
    probs, ranks = reading.probs[:, :, 0], reading.ranks[:, :, 0]                   # (L+1, B, 3)
    is_top = reading.top_ids[:, :, 0, :1] == ids                                    # (L+1, B, 3)
    word = SERIES.index("operation")
    layers = []
    for tap in range(1, len(probs)):
        series = {name: {"prob": float(probs[tap, :, n].mean()),
                         "rank": float(np.median(ranks[tap, :, n])),
                         "top1": float(is_top[tap, :, n].mean())} for n, name in enumerate(SERIES)}
        layers.append({"layer": tap - 1, "last": tap == len(probs) - 1,
                       "entropy": float(reading.entropy[tap].mean()), **series})
    right = is_top[block + 1, :, word]
    strength = {name: summarize_strength(probs[:, :, n], is_top[:, :, n])
                for n, name in enumerate(SERIES)}
    whole = lengths == 1
    strength["answer"]["first_token"] = summarize_emergence(probs[:, :, 0], is_top[:, :, 0])
    strength["answer"] |= summarize_emergence(probs[:, whole, 0], is_top[:, whole, 0])
    return {
        "class": {"layer": block, "top1": wilson(int(right.sum()), len(right)),
                  "prob": bootstrap_mean(probs[block + 1, :, word])},
        "one_token_answers": wilson(int(whole.sum()), len(whole)),
        "strength": strength,
        "layers": layers,
    }


def summarize_strength(probs: np.ndarray, is_top: np.ndarray) -> dict:
    """A series' mean peak before the last block, and how many emerged; probs, is_top (L+1, B)."""
    inner = probs[1:-1]
    return {
        "before_last": bootstrap_mean(inner.max(0)), "last": bootstrap_mean(probs[-1]),
        "peak_layer": int(inner.mean(1).argmax()),
        **summarize_emergence(probs, is_top),
    }


def summarize_emergence(probs: np.ndarray, is_top: np.ndarray) -> dict:
    """How many peak above EMERGED, how many are top-1, before the last block; both (L+1, B)."""
    inner = probs[1:-1]
    return {
        "emerged": wilson(int((inner.max(0) > EMERGED).sum()), inner.shape[1]),
        "top1_before_last": wilson(int(is_top[1:-1].any(0).sum()), inner.shape[1]),
    }


def make_report(ckpt: str | Path, with_base: bool, compare: str | None = None,
                overrides: list[str] = (), adapter: str | None = None) -> dict:
    """Judge a run or a model, its base, another run on the same problems: report.json's content.

    adapter  a folder, on top of ckpt, which is then the base
    """
    model, tokenizer, cfg = load_checkpoint(ckpt, adapter)
    if overrides and cfg:  # e.g. another wording for a finished run
        cfg = load_config(Path(ckpt) / "config.yaml", overrides)
    cfg = cfg or load_overrides(overrides)
    report = {"ckpt": f"{ckpt} + {adapter}" if adapter else str(ckpt),
              "method": cfg.method if (Path(ckpt) / "config.yaml").exists() else "none",
              "seed": cfg.seed, **judge(model, tokenizer, cfg),
              "config": resolved(cfg), "versions": provenance()}
    if with_base and adapter:
        base_model, base_tokenizer, _ = load_checkpoint(ckpt)
        report["base"] = {"ckpt": str(ckpt), **judge(base_model, base_tokenizer, cfg)}
    elif with_base and report["method"] != "none" and not cfg.from_scratch:
        base_model, base_tokenizer = load_base(cfg.model, cfg.dtype, cfg.bits,
                                               group_size=cfg.bits_group_size)
        report["base"] = {"ckpt": cfg.model, **judge(base_model, base_tokenizer, cfg)}
    if compare:
        other_model, other_tokenizer, _ = load_checkpoint(compare)
        other = {"ckpt": str(compare), **judge(other_model, other_tokenizer, cfg)}
        of_test = lambda r: [row["correct"] for row in r["prompts"] if row["set"] == "test"]
        report["compare"] = {**other, "mcnemar": mcnemar(of_test(report), of_test(other))}
    return report


def print_report(report: dict) -> None:
    """Tables for a person: accuracy beside the base, the prior work's prompt table, the layers."""
    print(f"\n{report['ckpt']} ({report['method']}, seed {report['seed']}); "
          "test pairs never seen in training; 95 % Wilson intervals")
    if "chains" in report:
        print_chains(report)
    else:
        print_accuracy(report)
        print_prompts(report["prompts"])
    print_targets(report)
    print("\n  block   answer                  operation word          "
          "symbol                  entropy    (mean probability, median rank)")
    for layer in reversed(report["layers"]):
        cells = "".join(f"{layer[s]['prob']:.4f}  #{layer[s]['rank']:<14.0f}" for s in SERIES)
        print(f"  L{layer['layer']:<6} {cells}{layer['entropy']:.2f}"
              f"{'   (the output itself)' if layer['last'] else ''}")


def print_targets(report: dict) -> None:
    """Which tokens the series are, and where the answer's is only its first."""
    name = lambda piece, token: f"{piece} ({token})"
    lines = {"operation word": [name(t["word_piece"], t["word"])
                                for t in report["targets"].values()],
             "symbol": [name(t["symbol_piece"], t["symbol"]) for t in report["targets"].values()],
             "class loss": [f"{op} {name(t['piece'], t['id'])}"
                            for op, t in report["class_targets"].items()]}
    notes = [f"{label + ':':<16}{', '.join(tokens)}" for label, tokens in lines.items() if tokens]
    counted = report["one_token_answers"]
    if counted["value"] != 1:
        notes.append(f"{'answer:':<16}its first token; {100 * counted['value']:.1f} % of the "
                     "test answers are one token, and emerged is said of those alone")
    if notes:
        print("\n  tokens read as  " + "\n                  ".join(notes))


def print_columns(report: dict) -> list[dict]:
    """The head of a table: base, this model, another; returns those there are."""
    reports = {"base": report.get("base"), "this": report, "other": report.get("compare")}
    reports = {name: r for name, r in reports.items() if r}
    print(" " * 36 + "".join(f"{name + ': ' + r['ckpt']:<34}" for name, r in reports.items()))
    return list(reports.values())


def print_accuracy(report: dict) -> None:
    reports = print_columns(report)
    lines = {"accuracy, all test problems": lambda r: r["accuracy"],
             "accuracy, add and subtract": lambda r: r["accuracy_add_subtract"]}
    lines |= {f"  {cell}": lambda r, cell=cell: r["accuracy_by"][cell]
              for cell in report["accuracy_by"]}
    lines |= {f"  the prior work's {name} prompts": lambda r, name=name: r["accuracy_named"][name]
              for name in report["accuracy_named"]}
    lines[f"operation word top-1 at L{report['class']['layer']}"] = lambda r: r["class"]["top1"]
    lines["answers of one token"] = lambda r: r["one_token_answers"]
    lines |= {f"{name} emerged (> {EMERGED})": lambda r, name=name: r["strength"][name]["emerged"]
              for name in SERIES}
    if any(r["one_token_answers"]["value"] != 1 for r in reports):
        lines["first token emerged, all answers"] = (
            lambda r: r["strength"]["answer"]["first_token"]["emerged"])
    for label, get in lines.items():
        print(f"  {label:<34}" + "".join(f"{percent(get(r)):<34}" for r in reports))
    print_mcnemar(report)


def print_chains(report: dict) -> None:
    """What the chains carry, beside the base's and another run's, and the first three chains."""
    reports = print_columns(report)
    for label, key in (("accuracy, greedy chain and answer", "correct"),
                       ("  the same chains, frozen answerer", "correct_frozen"),
                       ("  without a chain", "correct_empty"),
                       ("  with another problem's chain", "correct_shuffled"),
                       ("no answer to read (invalid)", "invalid"),
                       ("chains ended by themselves", "chain_finished")):
        print(f"  {label:<34}" + "".join(f"{percent(r['chains'][key]):<34}" for r in reports))
    nats = lambda m: f"{m['value']:.2f} [{m['low']:.2f}, {m['high']:.2f}]"
    for label, key in (("log p(answer | chain), nats", "reward"),
                       ("  by the frozen base", "reward_frozen"),
                       ("  without a chain", "reward_empty"), ("tokens a chain", "chain_tokens")):
        print(f"  {label:<34}" + "".join(f"{nats(r['chains'][key]):<34}" for r in reports))
    print_mcnemar(report)
    for row in report["prompts"][:3]:
        print(f"\n  {row['prompt'][-200:]!r}\n    chain  {row['chain'][:300]!r}\n"
              f"    answer {row['generated']!r}, expected {row['expected'][:60]!r}")


def print_mcnemar(report: dict) -> None:
    if "compare" in report:
        test = report["compare"]["mcnemar"]
        print(f"  McNemar, exact: {test['only_first']} solved only by this, "
              f"{test['only_second']} only by the other, p = {test['p']:.3g}")


def print_prompts(rows: list[dict]) -> None:
    """The prior work's table over its named prompts, with the classifier's layer and confidence."""
    print(f"\n  {'prompt':<14}{'expected':>9}{'generated':>11}  right  "
          f"{'answer before the last block':<30}operation word before the last block")
    for row in {r["prompt"]: r for r in rows if r["set"] != "test"}.values():
        answer, word = (
            f"L{row[s + '_layer']} {row[s + '_prob']:.3f} (last block {row[s + '_prob_last']:.3f})"
            for s in ("answer", "operation"))
        right = "yes" if row["correct"] else "no"
        print(f"  {row['prompt']:<14}{row['expected']:>9}{row['generated'][:10]:>11}  "
              f"{right:<7}{answer:<30}{word}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Accuracy and classifier report of a run or model.")
    parser.add_argument("--ckpt", help="run folder, model folder or Hub name")
    parser.add_argument("--adapter", metavar="FOLDER",
                        help="take this adapter, ours, mlx-lm's or peft's, on top of --ckpt")
    parser.add_argument("--base", action="store_true",
                        help="judge the model it was trained from as well")
    parser.add_argument("--compare", metavar="RUN2",
                        help="another run or model, on the same problems")
    parser.add_argument("--json", metavar="FILE", help="where to write the report; "
                        "a run folder's report.json is left as it is")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="config keys, such as data_wordings=worded")
    args = parser.parse_args(argv)
    if not args.ckpt:
        raise BadInput("nothing to judge; give --ckpt RUN_OR_MODEL, --gate CONFIG or --paired")
    report = make_report(args.ckpt, args.base, args.compare, args.overrides, args.adapter)
    print_report(report)
    if args.json:
        write_text(Path(args.json), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)

"""Write a data set as a folder: train.jsonl, valid.jsonl, test.jsonl and a card, README.md.

    python -m tasks                                     # the names
    python -m tasks gsm8k data/gsm8k                    # from the Hub; then data=data/gsm8k
    python -m tasks gsm8k data/gsm8k --from FOLDER      # from files that lie here
    python -m tasks sums runs/sums --terms 6 --largest 9
    python -m tasks few_shot runs/one_digit --shots 3 --digits 1    # what `make real` reads
    python -m tasks tiny runs/tiny_data --tokenizer models/tiny     # what `make tiny` reads

A row is {"prompt", "response"} and what else training must know of it: "operation", "wording"; of a
question to reason about "hidden", the prompt without the question, and "letters", its options. The
same command writes the same bytes. Other bytes are never written over.
"""
import random
from pathlib import Path

from config import BadInput, Config, run_main
from files.disk import json_lines, write_text
from files.model_folder import find_folder
from files.options import Parser
from tasks.few_shot import sample_few_shot
from tasks.published import SOURCES, SPLITS, carve, cut_articles, load_questions
from tasks.sums import held_out_tiny_cot, sample_sums, sample_tiny_cot
from tasks.tiny import sample_tiny, write_tiny_tokenizer
from text.arithmetic import Problem, held_out
from text.tokenizer import load_tokenizer

GENERATED = {
    "sums": "sums of --terms numbers from 1 to --largest, behind --shots worked examples",
    "few_shot": "sums, differences and products with results of --digits, behind --shots examples",
    "tiny": "the text of models/tiny",
    "tiny_cot": "the text of models/tiny_cot: sums and chains of thought",
}
NAMES = (*SOURCES, *GENERATED)
DEFAULTS = {    # the options that a data set has, and their values; None: all rows
    **{name: {"from": "", "skip_bad": False, "samples": None, "test": None, "seed": 0}
       for name in SOURCES},
    "wiki": {"from": "", "skip_bad": False, "samples": 20000, "test": 1024, "context": 200,
             "target": 100, "model": "meta-llama/Llama-3.1-8B-Instruct"},
    "sums": {"samples": 5000, "test": 600, "terms": 15, "largest": 99, "shots": 0, "seed": 0},
    "few_shot": {"samples": 3000, "test": 480, "shots": 3, "digits": 1, "fold": 0, "seed": 0},
    "tiny": {"samples": 200000, "seed": 0, "unnamed": False, "tokenizer": ""},
    "tiny_cot": {"samples": 200000, "test": 300, "terms": 6, "largest": 9, "seed": 0,
                 "tokenizer": ""},
}
LEAST = {"samples": 1, "test": 1, "terms": 2, "largest": 1, "context": 1, "target": 1, "seed": 0,
         "shots": 0, "fold": 0}
# how long the published settings let a chain of each data set be, and what else they say of it
PUBLISHED_KEYS = {
    "gsm8k": "chain_tokens=100", "mmlu": "chain_tokens=150", "arc": "chain_tokens=50",
    "aqua": "chain_tokens=50", "mathqa": "chain_tokens=150",
    "svamp": "chain_tokens=50 max_completion_tokens=16",
    "sums": "chain_tokens=150 max_completion_tokens=16",
    "wiki": "chain_tokens=50 max_completion_tokens=16 batch_size=64 grpo_group_size=16 "
            "grpo_temperature=1.5",
}


def make_split(name: str, split: str, options: dict) -> list[Problem]:
    """The problems of train, valid or test; raises BadInput, also where there are none."""
    train, seed = split == "train", options.get("seed")
    count = options["samples"] if train else options.get("test")
    size = [options[key] for key in ("terms", "largest", "shots") if key in options]
    if name == "few_shot":
        return sample_few_shot(split, count, options["shots"], options["digits"], options["fold"],
                               seed)
    if name == "sums":
        return sample_sums(split, count, *size, seed)
    if name == "tiny_cot":
        return (sample_tiny_cot(count, *size, seed) if train
                else held_out_tiny_cot(split, count, *size))
    if name == "tiny":
        # judged as arithmetic is, in all four operations
        cfg = Config(data_operations=("add", "subtract", "multiply", "divide"),
                     data_wordings=("symbolic", "worded"))
        return (sample_tiny(count, seed, options["unnamed"]) if train
                else held_out(cfg, split))
    problems = load_questions(name, split, options["from"], options["skip_bad"])
    if name == "wiki":
        tokenizer = load_tokenizer(find_folder(options["model"], weights=False))
        problems = cut_articles(problems, tokenizer, options["context"], options["target"], count)
    elif count and len(problems) > count:   # what is judged is the same for every seed
        problems = random.Random(seed if train else 0).sample(problems, count)
    if not problems:
        raise BadInput(f"{name}: the {split} split is empty; give more rows")
    return problems


def row_of(problem: Problem) -> dict[str, str]:
    """A problem as a row that text.columns reads back."""
    row = {"prompt": problem.prompt, "response": problem.answer}
    more = {key: getattr(problem, key) for key in ("operation", "wording", "hidden", "letters")}
    return row | {key: text for key, text in more.items() if text}


def make_card(name: str, out: Path, command: str, own: str, splits: dict[str, list]) -> str:
    """README.md: where the rows come from, how many there are, what trains on them."""
    if name in SOURCES:
        source = SOURCES[name]
        files = f"out of {own}" if own else f"`{source.files}` at revision `{source.revision}`"
        told = f"; {carved}" if (carved := carve(name, own)[2]) else ""
        about = (f"[{source.repo}](https://huggingface.co/datasets/{source.repo}), {files}, every "
                 f"row checked; no question stands in two splits{told}.")
    else:
        about = f"Generated: {GENERATED[name]}. No pair or sum stands in two splits."
    lines = [f"# {name}", "", f"Written by `{command}`. {about}", "",
             "| split | rows | distinct |", "|---|---|---|"]
    lines += [f"| {split} | {len(rows)} | {len(set(rows))} |" for split, rows in splits.items()]
    if name in PUBLISHED_KEYS:
        lines += ["", "At the published settings: `python train.py "
                  f"configs/llama3_1_8b_markovian.yaml data={out} {PUBLISHED_KEYS[name]}`"]
    return "\n".join(lines) + "\n"


def write_task(name: str, out: Path, command: str = "", **given) -> dict[str, list[Problem]]:
    """Make a data set's three splits, write them with the card; returns the problems by split.

    given    of DEFAULTS[name], what differs
    raises   BadInput, before anything is written
    """
    options = DEFAULTS[name] | given
    splits = {split: make_split(name, split, options) for split in SPLITS}
    files = {f"{split}.jsonl": json_lines(map(row_of, problems))
             for split, problems in splits.items()}
    command = command or f"python -m tasks {name} {out}"
    files["README.md"] = make_card(name, out, command, options.get("from", ""), splits)
    for file, text in files.items():
        path = out / file
        if path.exists() and path.read_bytes() != text.encode():
            raise BadInput(f"{path} holds other data; give another folder, or remove that file")
    for file, text in files.items():
        write_text(out / file, text)
    return splits


def parse(argv: list[str]) -> tuple[str, Path, dict]:
    """(name, folder, the options given); raises BadInput for those that the data set lacks."""
    parser = Parser(prog="python -m tasks", description="Write a data set.")
    parser.add_argument("name", help=", ".join(NAMES))
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--from", metavar="FOLDER", help="its files; without: the Hub's")
    parser.add_argument("--skip-bad", action="store_const", const=True, help="leave bad rows out")
    parser.add_argument("--samples", type=int, help="training rows, at most")
    parser.add_argument("--test", type=int, help="valid and test rows, each")
    parser.add_argument("--seed", type=int, help="which training rows")
    parser.add_argument("--terms", type=int, help="how many numbers are added")
    parser.add_argument("--largest", type=int, help="the largest of them")
    parser.add_argument("--shots", type=int, help="worked examples in front of every prompt")
    parser.add_argument("--digits", type=int, help="of the results, 1 or 2")
    parser.add_argument("--fold", type=int, help="which quarter of the operand pairs is tested")
    parser.add_argument("--unnamed", action="store_const", const=True,
                        help="no line says an operation's name when asked for it")
    parser.add_argument("--context", type=int, help="tokens of an article that are shown")
    parser.add_argument("--target", type=int, help="tokens behind them that are scored")
    parser.add_argument("--model", help="whose tokens, a folder or a Hub name")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="write tokenizer.model there as well")
    given = {key: value for key, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    name, out = given.pop("name"), given.pop("out")
    if name not in NAMES:
        raise BadInput(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}")
    for key, value in given.items():
        option = key.replace("_", "-")
        if key not in DEFAULTS[name]:
            known = ", ".join(f"--{k}".replace("_", "-") for k in DEFAULTS[name])
            raise BadInput(f"--{option} says nothing of {name}, whose options are {known}")
        if key in LEAST and value < LEAST[key]:
            raise BadInput(f"--{option} {value}: expected at least {LEAST[key]}")
    return name, out, given


def main(argv: list[str]) -> None:
    if not argv:
        for name, source in SOURCES.items():
            print(f"{name:<9}{source.repo:<26}{source.files:<28}"
                  f"train, valid, test: {', '.join(n or 'carved' for n in source.names)}")
        for name, about in GENERATED.items():
            print(f"{name:<9}{about}")
        return
    name, out, given = parse(argv)
    splits = write_task(name, out, f"python -m tasks {' '.join(argv)}", **given)
    for split, problems in splits.items():
        print(f"{split}: {len(problems)} problems, {len(set(problems))} distinct")
        for problem in problems[:2]:
            about = problem.letters or problem.operation or problem.wording
            print(f"  {problem.prompt!r} -> {problem.answer!r}  ({about})")
    if folder := given.get("tokenizer"):
        write_tiny_tokenizer(Path(folder), chains=name == "tiny_cot")
    print(f"wrote {out}: train with data={out}")


if __name__ == "__main__":
    run_main(main)

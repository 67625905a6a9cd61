"""Which lens reads a thought better? pass@k on published prompts, logit lens beside Jacobian lens.

Six sets of prompts evoke words that they do not say ("Fact: The ocean on the coast of the country
where Carnival is most famously celebrated is the " -> Brazil). pass@k is the mean over items of the
share of these words that some block's lens ranks k or better, at one position. Words of several
tokens cannot be read by any lens of single tokens; they are left out and counted.

The Jacobian lens here ranks the whole vocabulary, so it needs the whole matrix: one backward pass a
feature, an hour of a core for 576 of them. The matrices are kept and grown in --fit, so that an
interrupted command goes on.

    python -m study.lens_quality --ckpt models/smollm2 --from FOLDER [--fit FILE] [--json FILE]

source  the sets lens-eval-*.json and their README, beside Gurnee et al. 2026 (Apache-2.0)
"""
import json
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from checkpoint import load_checkpoint
from config import run_main
from files.adapters import fingerprint
from files.disk import (
    NAMES,
    OBJECT,
    REQUIRED,
    TEXT,
    list_of,
    read_fields,
    read_json,
    write_bytes,
    write_text,
)
from files.keys import BadInput
from files.options import Parser
from model import Llama
from report.stats import bootstrap_mean, interval_text
from study.document import table
from study.jacobian import jacobian, last_token_stream, own_texts, read_stream, transport
from text.arithmetic import ONES, SYMBOLS, TENS
from text.tokenizer import Tokenizer

SETS = ("association", "multihop", "multilingual", "order-ops", "poetry", "typo")
KS = (1, 5, 10, 100)
TEXTS = 100             # that the Jacobian is fitted on
AT_A_TIME = 32          # features between two saves
NOUNS = {"addition": "add", "subtraction": "subtract", "multiplication": "multiply",
         "division": "divide"}
ITEM = {"prompt": (TEXT, REQUIRED), "intermediates": (NAMES, REQUIRED)}


def forms_of(word: str) -> list[str]:
    """What counts as the word: of numbers digits and words, of operations symbol and words.

    example  "5" -> ["5", "five"];  "multiplication" -> ["multiplication", "multiply", "*"]
    """
    names = {str(n): name for n, name in enumerate(ONES)}
    names |= {str(10 * n): name for n, name in enumerate(TENS, 2)}
    forms = [word] + ([names[word]] if word in names else [])
    if word in NOUNS:
        forms += [NOUNS[word], SYMBOLS[NOUNS[word]]]
    return forms


def token_ids(tokenizer: Tokenizer, word: str) -> list[int]:
    """The tokens that are one of the word's forms, with a space before them or without."""
    found = []
    for form in forms_of(word):
        for text in (form, f" {form}"):
            ids = tokenizer.encode(text)
            if len(ids) == 1:
                found.append(ids[0])
    return found


def read_items(folder: Path, name: str, tokenizer: Tokenizer) -> tuple[list, list, int]:
    """A set's prompts as ids up to the position that is read, each item's words as lists of ids,
    and how many words had no single token. raises  BadInput"""
    path = folder / f"lens-eval-{name}.json"
    prompts, words, left_out = [], [], 0
    raw = read_json(path, "the published lens-eval-*.json")
    for item in read_fields(raw, {"items": (list_of(OBJECT), REQUIRED)}, str(path))["items"]:
        item = read_fields(item, ITEM, str(path))
        text = item["prompt"]
        # a couplet is read at the end of its first line; others before the space of what follows
        text = text[:text.rindex("\n") + 1] if name == "poetry" else text.rstrip(" ")
        ids = [token_ids(tokenizer, word) for word in item["intermediates"]]
        left_out += sum(not forms for forms in ids)
        ids = [forms for forms in ids if forms]
        if ids:
            prompts.append(tokenizer.encode_prompt(text))
            words.append(ids)
    return prompts, words, left_out


def best_ranks(model: Llama, stream: np.ndarray, words: list) -> list[list[int]]:
    """Each item's words' best rank over the blocks: stream (L+1, N, D) of any lens."""
    widest = max(sum(map(len, item)) for item in words)
    targets = [[i for forms in item for i in forms] for item in words]
    padded = [ids + [ids[0]] * (widest - len(ids)) for ids in targets]
    ranks = read_stream(model, stream, padded).ranks[1:, :, 0].min(0)               # (N, widest)
    found = []
    for item, row in zip(words, ranks):
        ends = np.cumsum([len(forms) for forms in item])
        found.append([int(row[end - len(forms):end].min()) for forms, end in zip(item, ends)])
    return found


def fit(model: Llama, tokenizer: Tokenizer, path: Path) -> mx.array:
    """The Jacobians (L+1, D, D), fitted on the model's own texts; goes on where `path` ends.

    raises  BadInput where `path` was fitted on another model
    """
    D, own, done = model.args.hidden_size, fingerprint(model), None
    if path.exists():
        arrays, about = mx.load(str(path), return_metadata=True)
        if about.get("model") != own:
            raise BadInput(f"--fit {path} was fitted on another model; give another file")
        done = arrays["jacobian"]                                                   # (L+1, n, D)
    n = 0 if done is None else done.shape[1]
    texts = own_texts(model, tokenizer, TEXTS)
    for start in tqdm(range(n, D, AT_A_TIME), desc="Jacobian", unit="part"):
        part = jacobian(model, texts, mx.eye(D)[start:start + AT_A_TIME])
        done = part if done is None else mx.concatenate([done, part], axis=1)
        temporary = path.with_suffix(".part.safetensors")
        mx.save_safetensors(str(temporary), {"jacobian": done}, {"model": own})
        write_bytes(path, temporary.read_bytes())
        temporary.unlink()
    return done


def quality_table(figures: dict) -> str:
    """pass@k, %, of both lenses and of the Jacobian lens less the logit lens on the same items.

    figures  {"multihop logit": {left_out, ranks [item][word]}, ...}
    """
    rows = []
    for name in SETS:
        passed = {lens: {k: [np.mean([r <= k for r in item]) for item in
                             figures[f"{name} {lens}"]["ranks"]] for k in KS}
                  for lens in ("logit", "Jacobian")}
        passed["difference"] = {k: np.subtract(passed["Jacobian"][k], passed["logit"][k])
                                for k in KS}
        for lens, values in passed.items():
            about = figures.get(f"{name} {lens}")
            of_set = [len(about["ranks"]), about["left_out"]] if lens == "logit" else ["", ""]
            rank = f"{np.median(sum(about['ranks'], [])):.0f}" if about else ""
            rows.append([name if lens == "logit" else "", *map(str, of_set), lens, rank,
                         *(share_text(values[k]) for k in KS)])
    return table(["set", "items", "words left out", "lens", "median rank",
                  *(f"pass@{k}, %" for k in KS)], rows)


def gains_text(figures: dict, k: int = 10) -> str:
    """pass@k of the Jacobian lens less the logit lens's, points, set by set."""
    found = []
    for name in SETS:
        logit, other = ([np.mean([r <= k for r in item]) for item in
                         figures[f"{name} {lens}"]["ranks"]] for lens in ("logit", "Jacobian"))
        found.append(f"{name} {share_text(np.subtract(other, logit))}")
    return ", ".join(found)


def share_text(values: list[float]) -> str:
    """A mean with its bootstrap interval; without one where all items are alike."""
    found = bootstrap_mean(values)
    return (f"{100 * found['value']:.1f}" if np.ptp(values) == 0
            else interval_text(found, 100, 1))


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m study.lens_quality", description="pass@k of two lenses.")
    parser.add_argument("--ckpt", required=True, help="model folder, run folder or Hub name")
    parser.add_argument("--from", dest="folder", type=Path, required=True,
                        help="the folder of lens-eval-*.json")
    parser.add_argument("--fit", type=Path, default=Path("runs/jacobian.safetensors"),
                        help="where the Jacobians are kept")
    parser.add_output("--json", "the figures")
    args = parser.parse_args(argv)
    model, tokenizer, _ = load_checkpoint(args.ckpt)
    sets = {name: read_items(args.folder, name, tokenizer) for name in SETS}
    args.fit.parent.mkdir(parents=True, exist_ok=True)
    jacobians = fit(model, tokenizer, args.fit)
    figures = {}
    for name, (prompts, words, left_out) in sets.items():
        stream = last_token_stream(model, prompts)
        for lens, read in (("logit", stream), ("Jacobian", transport(stream, jacobians))):
            figures[f"{name} {lens}"] = {"left_out": left_out,
                                         "ranks": best_ranks(model, read, words)}
    print(quality_table(figures))
    if args.json:
        write_text(Path(args.json), json.dumps(figures) + "\n")


if __name__ == "__main__":
    run_main(main)

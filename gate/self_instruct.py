"""Training data from the model itself: it writes the tasks, the answers, and says which are good.

    lists          numbered lists that begin with known tasks; the model goes on       lists.jsonl
    instructions   parsed, filtered, near-duplicates and held-out tasks out     instructions.jsonl
    tasks judged   the model's own log-probabilities accept or reject                  tasks.jsonl
    responses      behind worked examples, up to an end marker                     responses.jsonl
    pairs judged   the same critic, of task and answer as they are stored              pairs.jsonl
    train, valid, test.jsonl in data.py's format; qc.json, manifest.json

One model does all of it (Self-Instruct, 2212.10560). Each step is a file that grows by parts: the
same command continues a run that was broken off. Rejected rows stay in their file, with the reason.
The critic first judges the seeds, whose right answers are known: where it cannot tell them from
exchanged ones it is refused, and how sure of its letters it is there is what it has to be later.

    python -m gate.self_instruct OUT model=Qwen/Qwen2.5-32B bits=4 n=8000 heldout=FILE.jsonl
"""
import itertools
import json
import os
import random
import re
import typing
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import yaml

from config import run_main
from files.disk import begin_folder, grow, json_lines, read_rows, write_text
from files.keys import BadInput, read_keys
from files.run_folder import hash_file, hash_model, provenance
from gate.checks import PASS, no_repeat
from gate.clean import check_base
from gate.evaluate import load_model
from gate.judge import MIN_MASS, letter_margins
from generate import sample
from model import Llama
from report.stats import auc_within
from text.arithmetic import stable_hash
from text.similar import NEAR, Similar, words_of
from text.tokenizer import Tokenizer

BENCHMARK = Path(__file__).parent / "benchmark"
SEEDS = BENCHMARK / "seeds.jsonl"       # tasks that lists begin with, and worked answers
TEXTS = yaml.safe_load((BENCHMARK / "self_instruct.yaml").read_text(encoding="utf-8"))
PART = 16       # rows that are generated and written together
END = "[END]"   # what the worked examples end with
SHOWN, ASKED = 8, 10    # tasks that a list begins with, and that it may go on for
SHOTS = 3       # worked examples before a response
TELLS = 0.75    # how often a right pair has to have the larger margin
LIST_TOKENS, RESPONSE_TOKENS = 200, 256
LIST_TEMPERATURE, RESPONSE_TEMPERATURE, TOP_P = 0.7, 0.4, 0.9
EXPECTED = "a benchmark's or data rows, one JSON object a line"
OTHERS = ("other tasks than the step before it now gives; put back what was changed, or name a new "
          "folder")
META = re.compile(r"\b(here are|i will|let me|the following|these are|listed below|given below|"
                  r"see above|previous (task|question|answer)|this list)\b|^(another|one more)\b")
MARKERS = re.compile(rf"###|<\|.*?\|>|{re.escape(END)}|"
                     r"\b(Instruction|Response|User|Assistant|Human):")


@dataclass
class Settings:
    """What may stand on the command line as key=value."""
    model: str = "models/tiny"      # a base model: folder or Hub name
    bits: int | None = None         # 2, 3, 4, 5, 6 or 8: quantise it
    n: int = 100                    # tasks to keep before they are judged; pairs are fewer
    seed: int = 0
    threshold: float = 1.0          # the critic's margin from which a task or pair is accepted
    heldout: str = ""               # a benchmark (JSONL) whose user turns must not come up
    labels: tuple[str, ...] = ("A", "B")    # the critic's; one token each


@dataclass
class Run:
    """What every step needs."""
    folder: Path
    settings: Settings
    model: Llama
    tokenizer: Tokenizer
    seeds: list[tuple[str, str]]
    heldout: Similar
    least_mass: float = MIN_MASS    # of both labels; with less the critic abstains
    template: str = "none"          # or chat: how the critic is asked


# --- texts
def user_texts(row: dict) -> list[str]:
    """What a user says in a row of a benchmark or of data; ValueError where there is nothing."""
    texts = [turn["user"] for turn in row.get("turns", ())]
    texts += [m["content"] for m in row.get("messages", ()) if m["role"] == "user"]
    texts += [row[key] for key in ("prompt", "instruction") if key in row]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("no turns, messages or prompt with a user's text")
    return texts


def first_of(reasons: dict[str, object]) -> str:
    """The first reason that holds; "" where none does."""
    return next((reason for reason, holds in reasons.items() if holds), "")


def write(run: Run, prompts: list[str], tokens: int, temperature: float, stops: tuple[str, ...],
          place: str) -> list[dict]:
    """What the model writes behind raw prompts: {prompt, text, tokens, stop_reason}. The place, a
    step and its first row's number, fixes the random numbers with the seed."""
    key = mx.random.key(stable_hash(f"{run.settings.seed} {place}"))
    done = sample(run.model, run.tokenizer, [run.tokenizer.encode_prompt(p) for p in prompts],
                  tokens, temperature=temperature, top_p=TOP_P, key=key,
                  many_lines=True, stops=stops)
    return [{"prompt": prompt, "text": c.text, "tokens": len(c.ids), "stop_reason":
             f"stop:{c.stop}" if c.stop else "eos" if c.finished else "length"}
            for prompt, c in zip(prompts, done)]


# --- instructions
def list_prompt(run: Run, number: int, kept: list[str]) -> str:
    """A numbered list to go on with: seeds, two tasks found so far, and the next number without a
    space behind it, which belongs to the next word's token."""
    rng = random.Random(f"{run.settings.seed} list {number}")
    found = rng.sample(kept, min(2, len(kept)))
    tasks = rng.sample([task for task, _ in run.seeds], SHOWN - len(found)) + found
    rng.shuffle(tasks)
    lines = [f"{i}. {' '.join(task.split())}\n" for i, task in enumerate(tasks, 1)]
    return f"{TEXTS['list_head']}{''.join(lines)}{SHOWN + 1}."


def parse_list(first: int, text: str, cut: bool) -> list[str]:
    """The items of a list's continuation, whose first number stood in the prompt; cut: the length
    limit ended it, so its last line is no whole item.

    example  (9, " Name a bird.\n10. Name a fish.\n10. Na", True) -> [Name a bird., Name a fish.]
    """
    items, lines = [], f"{first}.{text}".split("\n")
    for line in lines[:-1] if cut else lines:
        match = re.fullmatch(r"\s*(\d+)[.)]\s*(\S.*?)\s*", line)
        if match and int(match[1]) == first + len(items):
            items.append(match[2])
    return items


def reject_task(text: str) -> str:
    """Why a text is no task; "" if it may be one."""
    letters = sum(c.isalnum() or c.isspace() for c in text)
    return first_of({
        "short": len(words_of(text)) < 2, "about the list": META.search(text.casefold()),
        "marker": MARKERS.search(text), "no text": letters < 0.7 * len(text)})


def sift(run: Run, lists: list[dict]) -> list[dict]:
    """Every item of the lists in turn: {task, list, reason}; reason "" for those that are kept."""
    seen, starts, rows, kept = Similar(task for task, _ in run.seeds), Counter(), [], 0
    most = max(3, run.settings.n // 100)    # tasks that may begin with the same four words
    for row in lists:
        items = parse_list(SHOWN + 1, row["text"], row["stop_reason"] == "length")
        for task in items[:ASKED]:
            words = words_of(task)
            near = seen.nearest(words)
            reason = reject_task(task) or first_of({
                "duplicate": near == 1, "near-duplicate": near >= NEAR,
                "same beginning": starts[words[:4]] >= most,
                "held out": run.heldout.touches(words),
                "enough": kept == run.settings.n})
            if not reason:
                seen.add(words)
                starts[words[:4]] += 1
                kept += 1
            rows.append({"task": task, "list": row["list"], "reason": reason})
    return rows


def make_lists(run: Run) -> list[dict]:
    """Lists until n tasks are kept, n at most: {list, prompt, text, tokens, stop_reason}."""
    def more(lists: list[dict], n: int) -> list[dict]:
        kept = [row["task"] for row in sift(run, lists) if not row["reason"]]
        if len(kept) == run.settings.n:
            return []
        first = len(lists)
        rows = write(run, [list_prompt(run, i, kept) for i in range(first, n)], LIST_TOKENS,
                     LIST_TEMPERATURE, ("\n\n", f"\n{SHOWN + ASKED + 1}."), f"lists {first}")
        return [{"list": i, **row} for i, row in enumerate(rows, first)]

    numbers = list(range(-(-run.settings.n // PART) * PART))     # whole parts
    return grow(run.folder / "lists.jsonl", PART, "list", numbers, more, OTHERS)


# --- responses
def response_prompt(run: Run, number: int, task: str) -> str:
    """Worked examples, each with the end marker, and the task."""
    shots = random.Random(f"{run.settings.seed} response {number}").sample(run.seeds, SHOTS)
    worked = "".join(f"Instruction: {a}\nResponse: {b}\n{END}\n\n" for a, b in shots)
    return f"{worked}Instruction: {task}\nResponse:"


def reject_response(run: Run, task: str, response: str, stop_reason: str) -> str:
    """Why a response cannot be trained on; "" if it can. Length is no reason, being cut off is."""
    words = words_of(response)
    asks = re.search(r"\?|\btrue or false\b", task.casefold())
    return first_of({
        "cut off": stop_reason == "length", "empty": not response,
        "marker": MARKERS.search(response), "announces only": response.endswith(":"),
        "repeats the task": words == words_of(task),
        "repeats itself": no_repeat(response) != PASS,
        # the task was a sentence and asked for nothing
        "statement judged": words in (("true",), ("false",)) and not asks,
        "held out": run.heldout.touches(words)})


def respond(run: Run, rows: list[dict], first: int) -> list[dict]:
    """One response to each task: {task, response, reason} beside what `write` gives."""
    prompts = [response_prompt(run, i, row["task"]) for i, row in enumerate(rows, first)]
    written = write(run, prompts, RESPONSE_TOKENS, RESPONSE_TEMPERATURE,
                    (END, "\nInstruction:", "\nUser:", "\nQ:"), f"responses {first}")
    for task, row in zip((row["task"] for row in rows), written):
        row["task"], row["response"] = task, row["text"].strip()
        row["reason"] = reject_response(run, task, row["response"], row["stop_reason"])
    return written


# --- the critic
def criticise(run: Run, kind: str, rows: list[dict]) -> list[dict]:
    """The model's own view of each task, or pair of task and response: the rows with it.

    margin   log p(good) - log p(bad) in nats, mean over both orders of the labels, less the same of
             an item that says nothing. With orders o: 1/2 sum_o (l_good - l_bad)_o
    mass     of both labels together, the smaller of both orders; below run.least_mass it abstains
    verdict  accept (margin >= threshold) | reject | abstain
    """
    texts, labels, asked = TEXTS[kind], run.settings.labels, []
    for row in [*rows, {"task": "N/A", "response": "N/A"}]:
        item = f"Task: {row['task']}" + (f"\nAnswer: {row['response']}" if kind == "pairs" else "")
        asked.append([TEXTS["critic"].format(
            head=texts["head"], first=labels[0], second=labels[1], item=item,
            first_means=texts[first], second_means=texts[second])
            for first, second in (("good", "bad"), ("bad", "good"))])
    margins, masses = letter_margins(run.model, run.tokenizer, asked, labels, run.template)
    views = []
    for row, margin, mass in zip(rows, (margins - margins[-1]).tolist(), masses.tolist()):
        verdict = ("abstain" if mass < run.least_mass
                   else "accept" if margin >= run.settings.threshold else "reject")
        views.append(row | {"margin": round(margin, 4), "mass": round(mass, 4),
                            "verdict": verdict})
    return views


def calibrate_critic(run: Run) -> dict:
    """The critic on pairs with known verdicts, the seeds' own and exchanged ones: sets how it is
    asked (raw or in a chat template, whichever tells more) and its floor; {auc, mass, template}.

    mass     what nine in ten of them have, MIN_MASS at most: a small model's letters may share
             their mass with other words and still say which is which
    raises   BadInput where the margins of right pairs are hardly above those of wrong ones
    """
    answers = [text for _, text in run.seeds]
    known = [{"task": task, "response": text} for texts in (answers, answers[1:] + answers[:1])
             for (task, _), text in zip(run.seeds, texts)]
    right, tried = [k < len(answers) for k in range(len(known))], []
    for template in ("none", "chat")[:2 if run.tokenizer.chat_template else 1]:
        run.template = template
        rows = criticise(run, "pairs", known)
        masses = sorted(row["mass"] for row in rows)
        tried.append({"auc": auc_within([r["margin"] for r in rows], right, [""] * len(rows)),
                      "mass": min(MIN_MASS, masses[len(masses) // 10] - 1e-4),
                      "template": template})
    best = max(tried, key=lambda found: found["auc"])
    run.template, run.least_mass = best["template"], best["mass"]
    if best["auc"] < TELLS:
        raise BadInput(f"{run.settings.model} cannot judge its own answers: right pairs are above "
                       f"wrong ones in {best['auc']:.0%} of the seeds' (expected {TELLS:.0%}; a "
                       "coin has 50); give a larger model, an instruct model or other labels")
    return best


# --- what comes out
def split_pairs(pairs: list[dict], steps: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A twentieth each for valid and test, at least one row, by a hash of the task."""
    if len(pairs) < 3:
        said = "; ".join(f"of {len(rows)} {name} the critic " + ", ".join(
            f"{dict(accept='accepted', reject='rejected', abstain='abstained on')[word]} {count}"
            for word, count in Counter(row["verdict"] for row in rows).items())
            for name, rows in steps.items() if rows)
        raise BadInput(f"{len(pairs)} pairs were accepted, too few for train, valid and test "
                       f"({said}). What it abstained on a larger n does not mend: give another "
                       "model; what it rejected, a larger n, or a lower threshold and a new folder")
    rows = sorted(pairs, key=lambda row: (stable_hash(row["task"]), row["task"]))
    rows = [{"prompt": row["task"], "response": row["response"]} for row in rows]
    k = max(1, len(rows) // 20)
    return {"valid": rows[:k], "test": rows[k:2 * k], "train": rows[2 * k:]}


def quality(steps: dict[str, list[dict]]) -> dict:
    """Counts of every step, of all that was generated, and whether they keep to the prior work's
    bounds: answers cut off below 10 %, each critic accepting half."""
    found = {name: dict(Counter(row.get("verdict", row.get("reason")) or "kept"
                                for row in rows).most_common()) for name, rows in steps.items()}
    cut = found["responses"].get("cut off", 0) / max(len(steps["responses"]), 1)
    bounds = {"cut_off below 0.10": bool(steps["responses"]) and cut < 0.10}
    for kind in ("tasks", "pairs"):
        accepted = found[kind].get("accept", 0)
        bounds[f"acceptance of {kind} at least 0.50"] = 2 * accepted >= max(len(steps[kind]), 1)
    return found | {"cut_off": round(cut, 4), "passed": all(bounds.values()), "bounds": bounds}


def make_data(run: Run, record: dict) -> dict:
    """All steps, from lists to the manifest; returns qc.json's content."""
    def step(name, rows, make):
        """Rows of a step's file, one for each row of the step before."""
        return grow(run.folder / f"{name}.jsonl", PART, "task", [row["task"] for row in rows],
                    lambda done, n: make(rows[len(done):n], len(done)), OTHERS)

    items = sift(run, make_lists(run))
    write_text(run.folder / "instructions.jsonl", json_lines(items))
    tasks = step("tasks", [{"task": row["task"]} for row in items if not row["reason"]],
                 lambda rows, _: criticise(run, "tasks", rows))
    responses = step("responses", [row for row in tasks if row["verdict"] == "accept"],
                     lambda rows, first: respond(run, rows, first))
    pairs = step("pairs", [{"task": row["task"], "response": row["response"]}
                           for row in responses if not row["reason"]],
                 lambda rows, _: criticise(run, "pairs", rows))
    found = quality({"instructions": items, "tasks": tasks, "responses": responses,
                     "pairs": pairs})
    write_text(run.folder / "qc.json", json.dumps(found, indent=2) + "\n")
    for name, counts in found.items():
        print(f"{name:<14}{counts}")
    accepted = [row for row in pairs if row["verdict"] == "accept"]
    for split, rows in split_pairs(accepted, {"tasks": tasks, "pairs": pairs}).items():
        write_text(run.folder / f"{split}.jsonl", json_lines(rows))
    outputs = {path.name: hash_file(path) for path in sorted(run.folder.glob("*.json*"))
               if path.name != "manifest.json"}
    write_text(run.folder / "manifest.json", json.dumps(
        record | {"outputs": outputs, "passed": found["passed"]}, indent=2) + "\n")
    return found


def read_settings(words: list[str]) -> Settings:
    """`key=value` words as Settings; raises BadInput with all mistakes."""
    values, mistakes = read_keys(os.devnull, words, typing.get_type_hints(Settings))
    found = Settings(**values)
    mistakes += [f"{key} = {getattr(found, key)}: expected at least {least}"
                 for key, least in (("n", 1), ("seed", 0)) if getattr(found, key) < least]
    if len(set(found.labels)) != 2 or len(found.labels) != 2:
        mistakes.append(f"labels = {', '.join(found.labels)}: expected two different words")
    if mistakes:
        raise BadInput("; ".join(mistakes))
    return found


def main(argv: list[str]) -> None:
    if not argv or "=" in argv[0]:
        raise BadInput("expected `python -m gate.self_instruct OUT_FOLDER [key=value ...]`, "
                       f"got {' '.join(argv) or 'nothing'}")
    folder, settings = Path(argv[0]), read_settings(argv[1:])
    seeds = read_rows(SEEDS, lambda row: (row["prompt"], row["response"]), EXPECTED)
    heldout = read_rows(settings.heldout, user_texts, EXPECTED) if settings.heldout else []
    inputs = {"seeds": hash_file(SEEDS), **hash_model(settings.model)}
    if settings.heldout:
        inputs["heldout"] = hash_file(settings.heldout)
    # all that can be wrong before the folder is made: it keeps its settings
    clean = check_base(settings.model, is_base=False)   # an instruct model may write as well
    model, tokenizer = load_model(settings.model, settings.bits)
    for label in settings.labels:
        tokenizer.word_ids([label])
    hashes = {f"SHA-256 of {what}": value for what, value in inputs.items()}
    run = Run(folder, settings, model, tokenizer, seeds, Similar(itertools.chain(*heldout)))
    critic = calibrate_critic(run)
    begin_folder(folder, asdict(settings) | hashes, "name a new folder")
    make_data(run, {"settings": asdict(settings), "inputs": inputs, "clean": clean,
                    "critic": critic, "versions": provenance()})
    print(f"\nwrote {folder}: train on it with data={folder} template=cued")


if __name__ == "__main__":
    run_main(main)

"""Training data from the model itself: it writes the tasks, the answers, and says which are good.

    lists          numbered lists that begin with known tasks; the model goes on       lists.jsonl
    instructions   parsed, filtered, near-duplicates and held-out tasks out     instructions.jsonl
    tasks judged   the model's own log-probabilities accept or reject                  tasks.jsonl
    responses      behind worked examples, up to an end marker                     responses.jsonl
    pairs judged   the same critic, of task and answer as they are stored              pairs.jsonl
    train, valid, test.jsonl in data.py's format; qc.json, manifest.json

A base model does all of it (Self-Instruct, 2212.10560). Each step is a file that grows by parts
(jsonl.py), so the same command continues a run that was broken off. Rejected rows stay in their
file, with the reason. Where we differ from the prior work: stops are texts, not the last token of
one; a list's first item gets its number back; near-duplicates are dropped where they arise; rates
are shares of what was generated, not of the survivors. The critic's margin is the mean over both
orders of the labels, less the margin of an empty task: a preference for the letter A cancels. Where
the model would answer something else, the critic abstains.

    python -m gate.self_instruct OUT model=Qwen/Qwen2.5-32B bits=4 n=8000 heldout=FILE.jsonl
"""
import json
import os
import random
import re
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx

from config import run_main
from files.disk import json_lines, write_text
from files.keys import BadInput, read_keys
from files.run_folder import hash_file, hash_model, provenance
from gate import jsonl
from gate.clean import check_base
from gate.evaluate import load_model
from gate.jsonl import begin_folder, read_parts, read_rows
from gate.judge import MIN_MASS, letter_margins
from generate import sample
from model import Llama
from text.arithmetic import stable_hash
from text.tokenizer import Tokenizer

PART = 16       # rows that are generated and written together
END = "[END]"   # what the worked examples end with
NEAR = 0.7      # Jaccard similarity of word 5-grams from which two texts are one
ASKED = 10      # tasks that a list may go on for
LIST_TEMPERATURE, RESPONSE_TEMPERATURE, TOP_P = 0.7, 0.4, 0.9
EXPECTED = "a benchmark's or data rows, one JSON object a line"

# tasks that lists begin with, and worked examples that answers follow
SEEDS = Path(__file__).parent / "benchmark" / "seeds.jsonl"
LIST_HEAD = "Different tasks for an assistant that answers in text, each complete in itself:\n\n"
CRITIC = ("{head}\n{first}: {first_means}\n{second}: {second_means}\n\n{item}\n\n"
          "Label ({first} or {second}):")
CRITICS = {     # what is judged; what the good label means, and the bad one
    "tasks": ("A task for a text assistant gets one of two labels.",
              "clear, specific, harmless, and can be done in text alone",
              "unclear, incomplete, harmful or impossible in text; also when in doubt"),
    "pairs": ("A task and an assistant's answer get one of two labels.",
              "the answer is right, complete, and does what the task asks",
              "the answer is wrong, cut off, beside the task or harmful; also when in doubt")}

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
    seeds: str = ""                 # JSONL of {"prompt", "response"}; empty: benchmark/seeds.jsonl
    labels: tuple[str, ...] = ("A", "B")    # the critic's; one token each
    shown: int = 8                  # tasks that a list begins with
    shots: int = 3                  # worked examples before a response
    list_tokens: int = 200
    response_tokens: int = 256


@dataclass
class Run:
    """What every step needs."""
    folder: Path
    settings: Settings
    model: Llama
    tokenizer: Tokenizer
    seeds: list[tuple[str, str]]
    heldout: "Similar"


# --- texts: the same, nearly the same, held out
def words_of(text: str) -> tuple[str, ...]:
    """Words whatever their case, letter forms (NFKC) and punctuation; + and = are words too.

    example  "What is 3 + 4?" -> (what, is, 3, +, 4)
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return tuple(re.findall(r"\w+|[+*/=<>^%×÷]|-(?=\s*\d)", text))


def grams(words: tuple[str, ...], n: int) -> set[tuple[str, ...]]:
    """All runs of n words; of a shorter text itself."""
    return {words[i:i + n] for i in range(max(1, len(words) - n + 1))}


class Similar:
    """Texts that can be asked for one nearly like another: exact, by an inverted index."""

    def __init__(self, texts: Iterable[str] = ()):
        self.keys, self.sizes, self.eights = set(), [], set()
        self.holders: dict[tuple[str, ...], list[int]] = {}     # which texts hold a 5-gram
        for text in texts:
            self.add(words_of(text))

    def add(self, words: tuple[str, ...]) -> None:
        fives = grams(words, 5)
        for gram in fives:
            self.holders.setdefault(gram, []).append(len(self.sizes))
        self.sizes.append(len(fives))
        self.keys.add(words)
        self.eights |= grams(words, 8) if len(words) >= 8 else set()

    def nearest(self, words: tuple[str, ...]) -> float:
        """The largest Jaccard similarity |A and B| / |A or B| of 5-grams; 1 for the same words."""
        if words in self.keys:
            return 1.0
        fives = grams(words, 5)
        shared = Counter(i for gram in fives for i in self.holders.get(gram, ()))
        return max((k / (len(fives) + self.sizes[i] - k) for i, k in shared.items()), default=0.0)

    def touches(self, words: tuple[str, ...]) -> bool:
        """Near one of the texts, or with eight words in a row of one: too close to be held out."""
        return (self.nearest(words) >= NEAR
                or len(words) >= 8 and not self.eights.isdisjoint(grams(words, 8)))


def read_seeds(path: str | Path) -> list[tuple[str, str]]:
    return read_rows(path, lambda row: (row["prompt"], row["response"]), EXPECTED)


def user_texts(row: dict) -> list[str]:
    """What a user says in a row of a benchmark or of data; ValueError where there is nothing."""
    texts = [turn["user"] for turn in row.get("turns", ())]
    texts += [m["content"] for m in row.get("messages", ()) if m["role"] == "user"]
    texts += [row[key] for key in ("prompt", "instruction") if key in row]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("no turns, messages or prompt with a user's text")
    return texts


# --- steps: files that grow by parts
def grow_step(run: Run, name: str, tasks: list[str],
              make: Callable[[int, int], list[dict]]) -> list[dict]:
    """Rows of a step, one for each task: those of its file, and `make` of what it lacks."""
    return jsonl.grow(run.folder / f"{name}.jsonl", PART, "task", tasks, make,
                      "other tasks than the step before it now gives; put back what was changed, "
                      "or name a new folder")


def write(run: Run, prompts: list[str], tokens: int, temperature: float, stops: tuple[str, ...],
          place: str) -> list[dict]:
    """What the model writes behind raw prompts, as rows: {prompt, text, tokens, stop_reason}.

    place    step and number of the first row: with the seed it fixes the random numbers
    """
    key = mx.random.key(stable_hash(f"{run.settings.seed} {place}"))
    done = sample(run.model, run.tokenizer, [run.tokenizer.encode_prompt(p) for p in prompts],
                  tokens, temperature=temperature, top_p=TOP_P, key=key,
                  many_lines=True, stops=stops)
    return [{"prompt": prompt, "text": c.text, "tokens": len(c.ids), "stop_reason":
             f"stop:{c.stop}" if c.stop else "eos" if c.finished else "length"}
            for prompt, c in zip(prompts, done)]


# --- instructions
def list_prompt(run: Run, number: int, kept: list[str]) -> str:
    """A numbered list to go on with: seeds, two of the tasks found so far, and the next number.

    No space behind that: it belongs to the next word's token.
    """
    rng, size = random.Random(f"{run.settings.seed} list {number}"), run.settings.shown
    found = rng.sample(kept, min(2, size // 2, len(kept)))
    tasks = rng.sample([task for task, _ in run.seeds], size - len(found)) + found
    rng.shuffle(tasks)
    lines = [f"{i}. {' '.join(task.split())}\n" for i, task in enumerate(tasks, 1)]
    return f"{LIST_HEAD}{''.join(lines)}{size + 1}."


def parse_list(first: int, text: str, cut: bool) -> list[str]:
    """The items of a list's continuation, whose first number stood in the prompt.

    cut      the length limit ended it, so its last line is no whole item
    example  (9, " Name a bird.\\n10. Name a fish.\\n10. Na", True) -> [Name a bird., Name a fish.]
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
    if len(words_of(text)) < 2:
        return "short"
    if META.search(text.casefold()):
        return "about the list"
    if MARKERS.search(text):
        return "marker"
    return "no text" if letters < 0.7 * len(text) else ""


def sift(run: Run, lists: list[dict]) -> list[dict]:
    """Every item of the lists in turn: {task, list, reason}; reason "" for those that are kept."""
    seen, starts, rows = Similar(task for task, _ in run.seeds), Counter(), []
    most = max(3, run.settings.n // 100)    # tasks that may begin with the same four words
    for number, row in enumerate(lists):
        items = parse_list(run.settings.shown + 1, row["text"], row["stop_reason"] == "length")
        for task in items[:ASKED]:
            words = words_of(task)
            reason = reject_task(task)
            if not reason and (near := seen.nearest(words)) >= NEAR:
                reason = "duplicate" if near == 1 else "near-duplicate"
            if not reason and starts[words[:4]] >= most:
                reason = "same beginning"
            if not reason and run.heldout.touches(words):
                reason = "held out"
            if not reason:
                seen.add(words)
                starts[words[:4]] += 1
            rows.append({"task": task, "list": number, "reason": reason})
    return rows


def make_instructions(run: Run) -> tuple[list[dict], list[dict]]:
    """Lists until n tasks are kept, n at most; (lists, items). Items follow from lists alone."""
    path, wanted = run.folder / "lists.jsonl", run.settings
    lists = read_parts(path, PART)
    while True:
        items = sift(run, lists)
        kept = [row["task"] for row in items if not row["reason"]]
        if len(kept) >= wanted.n or len(lists) >= wanted.n:
            break
        prompts = [list_prompt(run, len(lists) + i, kept) for i in range(PART)]
        lists += jsonl.append_rows(path, write(
            run, prompts, wanted.list_tokens, LIST_TEMPERATURE,
            ("\n\n", f"\n{wanted.shown + ASKED + 1}."), f"lists {len(lists)}"))
        print(f"  {'lists':<14}{len(lists):6}, {len(kept)} of {wanted.n} tasks before", flush=True)
    # the last lists may bring more than was asked for
    for row in [row for row in items if not row["reason"]][wanted.n:]:
        row["reason"] = "enough"
    write_text(run.folder / "instructions.jsonl", json_lines(items))
    return lists, items


# --- responses
def response_prompt(run: Run, number: int, task: str) -> str:
    """Worked examples, each with the end marker, and the task."""
    shots = random.Random(f"{run.settings.seed} response {number}").sample(
        run.seeds, run.settings.shots)
    worked = "".join(f"Instruction: {a}\nResponse: {b}\n{END}\n\n" for a, b in shots)
    return f"{worked}Instruction: {task}\nResponse:"


def reject_response(run: Run, task: str, response: str, stop_reason: str) -> str:
    """Why a response cannot be trained on; "" if it can. Length is no reason, being cut off is."""
    words = words_of(response)
    four = [words[i:i + 4] for i in range(len(words) - 3)]
    if stop_reason == "length":
        return "cut off"
    if not response:
        return "empty"
    if MARKERS.search(response):
        return "marker"
    if response.endswith(":"):
        return "announces only"
    if words == words_of(task):
        return "repeats the task"
    if len(four) >= 8 and len(set(four)) < len(four) / 2:
        return "repeats itself"
    if words in (("true",), ("false",)) and not re.search(r"\?|\btrue or false\b", task.casefold()):
        return "statement judged"   # the task was a sentence and asked for nothing
    return "held out" if not run.heldout.eights.isdisjoint(grams(words, 8)) else ""


def make_responses(run: Run, tasks: list[str]) -> list[dict]:
    """One response to each task: {task, response, reason} beside what `write` gives."""
    def respond(first: int, last: int) -> list[dict]:
        prompts = [response_prompt(run, i, tasks[i]) for i in range(first, last)]
        rows = write(run, prompts, run.settings.response_tokens, RESPONSE_TEMPERATURE,
                     (END, "\nInstruction:", "\nUser:", "\nQ:"), f"responses {first}")
        for task, row in zip(tasks[first:last], rows):
            row["task"], row["response"] = task, row["text"].strip()
            row["reason"] = reject_response(run, task, row["response"], row["stop_reason"])
        return rows
    return grow_step(run, "responses", tasks, respond)


# --- the critic
def critic_prompt(kind: str, item: str, labels: tuple[str, str], swapped: bool) -> str:
    """The labels in their order, their meanings exchanged where swapped."""
    head, *means = CRITICS[kind]
    first_means, second_means = means[::-1] if swapped else means
    return CRITIC.format(head=head, first=labels[0], second=labels[1], item=item,
                         first_means=first_means, second_means=second_means)


def describe(task: str, response: str | None = None) -> str:
    return f"Task: {task}" + (f"\nAnswer: {response}" if response is not None else "")


def criticise(model: Llama, tokenizer: Tokenizer, kind: str, items: list[str],
              labels: tuple[str, str], threshold: float) -> list[dict]:
    """The model's own view of each item: [{margin, mass, verdict}].

    margin   log p(good) - log p(bad) in nats, mean over both orders of the labels, less the same of
             an item that says nothing. With orders o: 1/2 sum_o (l_good - l_bad)_o
    mass     of both labels together, the smaller of both orders; below MIN_MASS it abstains
    verdict  accept (margin >= threshold) | reject | abstain
    """
    empty = describe("N/A", None if kind == "tasks" else "N/A")
    asked = [tuple(critic_prompt(kind, item, labels, swapped) for swapped in (False, True))
             for item in [*items, empty]]
    margins, masses = letter_margins(model, tokenizer, asked, labels)
    rows = []
    for margin, mass in zip((margins - margins[-1])[:-1].tolist(), masses.tolist()):
        verdict = ("abstain" if mass < MIN_MASS else "accept" if margin >= threshold else "reject")
        rows.append({"margin": round(margin, 4), "mass": round(mass, 4), "verdict": verdict})
    return rows


def judge_all(run: Run, kind: str, rows: list[dict]) -> list[dict]:
    """A critic's step: accepted and rejected rows alike, with their margins."""
    def judge(first: int, last: int) -> list[dict]:
        items = [describe(row["task"], row.get("response")) for row in rows[first:last]]
        views = criticise(run.model, run.tokenizer, kind, items, run.settings.labels,
                          run.settings.threshold)
        return [row | view for row, view in zip(rows[first:last], views)]
    return grow_step(run, kind, [row["task"] for row in rows], judge)


# --- what comes out
def split_pairs(pairs: list[dict]) -> dict[str, list[dict]]:
    """A twentieth each for valid and test, at least one row, by a hash of the task."""
    if len(pairs) < 3:
        raise BadInput(f"{len(pairs)} pairs were accepted, too few for train, valid and test; "
                       "look at the reasons and margins in the folder, then give a larger n or a "
                       "lower threshold and a new folder")
    rows = sorted(pairs, key=lambda row: (stable_hash(row["task"]), row["task"]))
    rows = [{"prompt": row["task"], "response": row["response"]} for row in rows]
    k = max(1, len(rows) // 20)
    return {"valid": rows[:k], "test": rows[k:2 * k], "train": rows[2 * k:]}


def quality(lists: list[dict], items: list[dict], tasks: list[dict], responses: list[dict],
            pairs: list[dict]) -> dict:
    """Counts of every step, of all that was generated, and whether they keep to the bounds.

    The bounds are the prior work's: answers cut off below 10 %, each critic accepting half.
    """
    count = lambda rows, key: dict(Counter(row[key] or "kept" for row in rows).most_common())
    cut = sum(row["stop_reason"] == "length" for row in responses)
    found = {"lists": len(lists), "items": len(items), "instructions": count(items, "reason"),
             "tasks": count(tasks, "verdict"), "responses": count(responses, "reason"),
             "pairs": count(pairs, "verdict"),
             "cut_off": round(cut / len(responses), 4) if responses else None}
    bounds = {"cut_off below 0.10": bool(responses) and found["cut_off"] < 0.10}
    for kind, rows in (("tasks", tasks), ("pairs", pairs)):
        accepted = found[kind].get("accept", 0)
        bounds[f"acceptance of {kind} at least 0.50"] = 2 * accepted >= max(len(rows), 1)
    return found | {"passed": all(bounds.values()), "bounds": bounds}


def print_quality(found: dict) -> None:
    """How many rows each step kept and rejected, as a table for a person."""
    print(f"\n{'lists':<16}{found['lists']:6}\n{'items':<16}{found['items']:6}")
    for step in ("instructions", "tasks", "responses", "pairs"):
        parts = ", ".join(f"{name} {k}" for name, k in found[step].items())
        print(f"{step:<16}{sum(found[step].values()):6}   {parts}")
    for bound, held in found["bounds"].items():
        print(f"  {'held  ' if held else 'MISSED'}  {bound}")


def make_data(run: Run, record: dict) -> dict:
    """All steps, from lists to the manifest; returns qc.json's content."""
    lists, items = make_instructions(run)
    tasks = judge_all(run, "tasks", [{"task": r["task"]} for r in items if not r["reason"]])
    responses = make_responses(run, [r["task"] for r in tasks if r["verdict"] == "accept"])
    pairs = judge_all(run, "pairs", [{"task": r["task"], "response": r["response"]}
                                     for r in responses if not r["reason"]])
    found = quality(lists, items, tasks, responses, pairs)
    write_text(run.folder / "qc.json", json.dumps(found, indent=2) + "\n")
    print_quality(found)
    for split, rows in split_pairs([r for r in pairs if r["verdict"] == "accept"]).items():
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
    low = {"n": 1, "seed": 0, "shown": 1, "shots": 1, "list_tokens": 1, "response_tokens": 1}
    mistakes += [f"{key} = {getattr(found, key)}: expected at least {least}"
                 for key, least in low.items() if getattr(found, key) < least]
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
    seeds = read_seeds(settings.seeds or SEEDS)
    if len(seeds) < max(settings.shown, settings.shots):
        raise BadInput(f"{len(seeds)} seeds are too few for shown = {settings.shown} and shots = "
                       f"{settings.shots}; add seeds, or show fewer")
    texts = read_rows(settings.heldout, user_texts, EXPECTED) if settings.heldout else []
    inputs = {"seeds": hash_file(settings.seeds or SEEDS)}
    if settings.heldout:
        inputs["heldout"] = hash_file(settings.heldout)
    about = {"settings": asdict(settings), "inputs": inputs | hash_model(settings.model)}
    # all that can be wrong before the folder is made: it keeps its settings
    model, tokenizer = load_model(settings.model, settings.bits)
    for label in settings.labels:
        tokenizer.word_ids([label])
    record = about | {"clean": check_base(settings.model, tokenizer),
                      "versions": provenance()}
    begin_folder(folder / "settings.json", about, "name a new folder")
    run = Run(folder, settings, model, tokenizer, seeds,
              Similar(text for row in texts for text in row))
    make_data(run, record)
    print(f"\nwrote {folder}: train on it with data={folder} template=cued")


if __name__ == "__main__":
    run_main(main)

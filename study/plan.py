"""A study's plan: bases, arms, hypotheses; and the runs it asks for. The study's is plan.yaml.

A run is one arm on one base with one seed. What is measured in it is one small file under
study/measures, so that a study goes on where it stopped, on another machine as well.
"""
from dataclasses import dataclass
from pathlib import Path

import yaml

from config import Config, load_overrides
from files.disk import read_json, read_text
from files.keys import BadInput
from study.measure import hand_over

WORDS_OF_STUDY = ("run_dir", "measures")    # of the command line, which are no keys of a run


@dataclass
class Run:
    """One arm on one base with one seed: what to train and where."""
    base: str
    arm: str
    seed: int
    kind: dict              # of plan.yaml's kinds
    set: dict               # the base's, the kind's and the arm's config keys
    hand_over: bool         # the class loss reads the base's block of hand-over
    sgd: bool               # plain gradient descent, as the prior code ran
    folder: Path
    measures: Path

    @property
    def name(self) -> str:
        return f"{self.base} {self.arm} {self.seed}"

    @property
    def fold(self) -> int:
        return (self.seed - 1) % self.kind["folds"]

    def base_file(self, fold: int | None = None) -> Path:
        """Measures of the model that this run starts from, asked in a fold; None: in its own."""
        fold = self.fold if fold is None else fold
        return self.measures.parent / f"{self.base}-base-{fold + 1}.json"

    def read_base(self) -> dict | None:
        """{lengths of edits in this fold, the base's hand_over block}; None: this is the base."""
        if self.arm == "base":
            return None
        files = [self.base_file(fold) for fold in range(self.kind["folds"])]
        curves = [read_json(file, "the base's measures")["turned_by_block"] for file in files]
        return {"lengths": read_json(self.base_file())["lengths"], "hand_over": hand_over(curves)}

    def words(self) -> list[str]:
        """The run's `key=value` for config.load_overrides; raises BadInput before the base's run"""
        keys = {**self.set, "seed": self.seed, "run_dir": str(self.folder)}
        if self.hand_over:
            keys["class_layer"] = self.read_base()["hand_over"]
        return as_words(keys)

    def is_done(self) -> bool:
        """Whether it is measured; raises BadInput where that was under another plan."""
        if not self.measures.exists():
            return False
        given = read_json(self.measures).get("set")
        if given != as_words(self.set):
            raise BadInput(f"{self.measures} was measured under other keys than the plan gives "
                           f"{self.name}; give another measures=FOLDER, or remove it")
        return True

    def config(self) -> Config:
        return load_overrides(self.words())


def as_words(keys: dict) -> list[str]:
    """YAML values as `key=value`. example  {"lora_targets": ["q", "v"]} -> ["lora_targets=q,v"]"""
    text = lambda v: (",".join(map(str, v)) if isinstance(v, list)
                      else str(v).lower() if isinstance(v, bool) else str(v))
    return [f"{key}={text(value)}" for key, value in keys.items()]


def load_study(path: str | Path, words: list[str] = ()) -> dict:
    """Read a plan and apply the command line's run_dir=, measures= and bases=; raises BadInput."""
    try:
        study = yaml.safe_load(read_text(path, "a study's plan, such as study/plan.yaml", 2 ** 20))
        study = {**study, "bases": dict(study["bases"]), "arms": dict(study["arms"])}
    except (RecursionError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise BadInput(f"{path} is not a study's plan ({' '.join(str(e).split())}); "
                       "see study/plan.yaml") from None
    named = {arm for h in study["hypotheses"] for test in h["tests"]
             for arm in (test["arm"], test.get("less", "base"))}
    if missing := named - set(study["arms"]):
        raise BadInput(f"{path}: a hypothesis names the arm {min(missing)}; expected one of "
                       f"{', '.join(study['arms'])}")
    for word in words:
        key, equals, value = word.partition("=")
        if key == "bases":
            chosen = value.split(",")
            if unknown := set(chosen) - set(study["bases"]):
                raise BadInput(f"{word}: unknown base {min(unknown)}; expected some of "
                               f"{', '.join(study['bases'])}")
            study["bases"] = {name: study["bases"][name] for name in chosen}
            study.pop("answers", None)      # its sentences are of all bases
        elif equals and key in WORDS_OF_STUDY:
            study[key] = value
        else:
            raise BadInput(f"command line: expected run_dir=FOLDER, measures=FOLDER or bases=A,B, "
                           f"got {word!r}; what a run is trained with stands in a plan of its own")
    return study


def groups_of(study: dict) -> dict[str, list[str]]:
    """{group: its bases}, in the plan's order."""
    groups = {}
    for name, base in study["bases"].items():
        groups.setdefault(base["group"], []).append(name)
    return groups


def seeds_of(arm: str, group: str, kind: dict) -> int:
    """How many seeds: the base has one a fold of its data, neutral words one a set of words."""
    if arm == "base":
        return kind["folds"]
    if group == "words":
        return len(kind["neutral"])
    return kind["seeds"].get(arm) or kind["seeds"][group]


def keys_of(study: dict, base: dict, kind: dict, name: str, arm: dict, seed: int) -> dict:
    """The config keys of one run, but for the hand-over block."""
    data = kind["data"].format(fold=(seed - 1) % kind["folds"])
    keys = {"model": base["model"], "data": data, **kind["set"], **study["common"]}
    if arm.get("sgd"):
        keys |= study["sgd"]
    keys |= arm.get("set", {}) | kind["arms"].get(name, {})
    if sets := kind.get(arm.get("words")):
        # permuted words change from one round of folds to the next, neutral ones with each seed
        turn = (seed - 1) // kind["folds"] if arm["words"] == "permuted" else seed - 1
        keys["class_words"] = sets[turn % len(sets)]
    return keys


def plan(study: dict) -> list[Run]:
    """All runs: bases first, then seed after seed, so that an interrupted study has whole seeds.

    raises  BadInput with every mistake of every arm, before anything runs
    """
    runs, mistakes = [], []
    for base_name, base in study["bases"].items():
        kind = study["kinds"][base["kind"]]
        for name, arm in study["arms"].items():
            for seed in range(1, 1 + seeds_of(name, arm.get("group"), kind)):
                run = Run(base_name, name, seed, kind,
                          keys_of(study, base, kind, name, arm, seed),
                          arm.get("at") == "hand_over", bool(arm.get("sgd")),
                          Path(study["run_dir"]) / f"{base_name}-{name}-{seed}",
                          Path(study["measures"]) / f"{base_name}-{name}-{seed}.json")
                try:
                    load_overrides(as_words({**run.set, "seed": seed}))
                except BadInput as error:
                    mistakes.append(f"arm {name} on {base_name}: {error}")
                runs.append(run)
    if mistakes:
        raise BadInput("; ".join(dict.fromkeys(mistakes)))
    return sorted(runs, key=lambda run: (run.arm != "base", run.seed))      # stable: arms in order

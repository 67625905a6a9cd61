"""The plan of a gate: written before the first reply, and what it owes to the looks before it.

Who asks the same question until the answer pleases gets it in the end. So every folder in which
the same base and instruct model were asked the same benchmark, or one that shares a family, is a
*look*, and all looks share one error: the k-th has 2 ** -k of it (gate/verdict.py). They are found
beside the new folder and by `replies`, and each names those that it found, so that one taken away
later is still counted. A folder that lies elsewhere is not seen.
"""
import dataclasses
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from files import disk
from files.keys import BadInput
from files.run_folder import PLAN, hash_json, hash_model
from gate import judge, verdict
from gate.conversations import Conversation

# of a plan, what replies depend on: with other values they are other replies
GENERATION = ("benchmark", "models", "max_reply_tokens", "bits", "shots", "worked")
ANOTHER = "give another out, such as out=runs/gate_again"


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def begin(cfg: verdict.GateConfig, models: dict[str, dict], sha: str, asked: list[Conversation],
          shots: list[Conversation]) -> dict:
    """Write plan.json into a new folder, or compare it with what is there; BadInput if it differs,
    or if cfg.replies are to other conversations or by other models."""
    plan = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in verdict.UNPLANNED}
    plan |= {"benchmark": sha, "worked": [c.id for c in shots], "n": len(asked),
             "families": sorted({c.family for c in asked}), "tail": verdict.TAIL,
             "n_needed": verdict.pairs_needed(cfg) if cfg.instruct else 0,
             "models": {r: [m["weights"], m["tokenizer"]] for r, m in models.items()}}
    if "judge" in cfg.scorers:
        plan["judge_prompt"] = hash_text(judge.load_prompt(cfg.judge_prompt))
        if not cfg.judge.startswith("http"):
            plan["judge_weights"] = hash_model(cfg.judge)["weights"]
    plan = json.loads(json.dumps(plan))     # no tuples
    plan |= since_earlier_looks(cfg, plan)
    disk.begin_folder(Path(cfg.out), plan, ANOTHER, PLAN)
    if plan["n"] < plan["n_needed"]:
        print(f"note: {plan['n']} conversations can give no GO; a gap as large as wanted needs "
              f"{plan['n_needed']}")
    return {**plan, "sha256": hash_json(plan)}


# --- earlier looks
TEXTS = disk.list_of(disk.TEXT)
MODELS = disk.Kind("the models' hashes by role", lambda v: type(v) is dict and all(
    map(disk.NAMES.fits, v.values())))
NUMBER = disk.Kind("a number", lambda v: type(v) in (int, float))
LOOK = {"benchmark": (disk.TEXT, ""), "families": (TEXTS, []), "models": (MODELS, {}),
        "earlier": (disk.OBJECT, {}), "plans": (TEXTS, []), "changed": (TEXTS, []),
        **dict.fromkeys(verdict.FAIR, (TEXTS, [])),
        **dict.fromkeys(verdict.THRESHOLDS, (NUMBER, 0))}


def read_plan(folder: str | Path, expected: str) -> dict:
    """A gate's plan, with its hash and folder."""
    path = Path(folder) / PLAN
    plan = disk.read_json(path, expected)
    return {**plan, **disk.read_fields(plan, LOOK, str(path)), "sha256": hash_json(plan),
            "folder": str(folder)}


def looks_beside(cfg: verdict.GateConfig, plan: dict) -> list[dict]:
    """Plans of the folders beside cfg.out about the same base and instruct model, and the same
    benchmark or one that shares a family. What is no plan is left out."""
    contestants = lambda p: [p["models"].get(role, [""])[0] for role in ("base", "instruct")]
    found = []
    for path in sorted(Path(cfg.out).absolute().parent.glob(f"*/{PLAN}")):
        with suppress(BadInput):
            other = read_plan(os.path.relpath(path.parent), "the plan of a gate")
            if (path.parent.name != Path(cfg.out).name and contestants(other) == contestants(plan)
                    and (other["benchmark"] == plan["benchmark"]
                         or set(other["families"]) & set(plan["families"]))):
                found.append(other)
    return found if cfg.instruct else []


def since_earlier_looks(cfg: verdict.GateConfig, plan: dict) -> dict:
    """What a plan has to say of those before it. Begun already, a folder keeps what it said.

    earlier  {hash: folder} of each earlier look: cfg.replies, what lies beside cfg.out, and what
             had been there before those; looks  one more
    plans    hashes that replies may name; changed  keys that were chosen when replies were known
    """
    if os.path.lexists(Path(cfg.out) / PLAN):
        begun = read_plan(cfg.out, f"the plan that {cfg.out} was begun with; {ANOTHER}")
        return {key: begun[key] for key in ("earlier", "plans", "changed")} | {
            "looks": 1 + len(begun["earlier"])}
    seen, plans, changed = looks_beside(cfg, plan), [], set()
    for other in seen:      # of new conversations nothing was known
        changed |= set(verdict.looser(plan, other) if other["benchmark"] == plan["benchmark"]
                       else ())
    if cfg.replies:
        other = read_plan(cfg.replies, "the plan of an earlier gate, since replies = "
                          f"{cfg.replies}")
        if unlike := [key for key in GENERATION if other.get(key) != plan[key]]:
            raise BadInput(f"replies = {cfg.replies} are to another {', another '.join(unlike)}; "
                           "leave replies out, and all is asked anew")
        kept = (*GENERATION, "n", "n_needed", "limit", "families")
        changed |= {*other["changed"], *(key for key in plan if key not in kept
                                         and other.get(key) != plan[key])}
        seen, plans = [*seen, other], [*other["plans"], other["sha256"]]
    earlier = {}
    for other in seen:
        earlier |= other["earlier"] | {other["sha256"]: other["folder"]}
    return {"earlier": earlier, "plans": plans, "changed": sorted(changed),
            "looks": 1 + len(earlier)}

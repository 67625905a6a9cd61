"""What produced a number: hashes of a model's files, versions, device, commit; and a gate's word.

A report names the very weights it is about, so that `require_gate` can ask before a training run
whether a gate (`python -m gate`) said GO for them.
"""
import hashlib
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import BadInput, load_config
from engine import blas
from files.hub import find_folder
from files.model_folder import root_model, weight_files

HASHED_TEXTS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                "chat_template.jinja")


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_model(name: str) -> dict[str, str]:
    """SHA-256 of a model's weights and tokenizer: {weights, tokenizer}; of a run, its adapter too.

    Of several files, the hash of their names and hashes.
    """
    weights, place = [], str(name)
    while root_model(place) != place:   # a run: its adapter, on whatever it was trained on
        weights.append(Path(place) / "adapters.safetensors")
        place = str(load_config(Path(place) / "config.yaml").model)
    folder = find_folder(place)
    weights += weight_files(folder)

    def digest(paths):
        return hashlib.sha256(repr([(p.name, hash_file(p)) for p in paths]).encode()).hexdigest()

    texts = [folder / file for file in HASHED_TEXTS if (folder / file).exists()]
    return {"weights": digest(weights), "tokenizer": digest(texts)}


def provenance() -> dict:
    """What produced a number: package versions, device, commit."""
    root = str(Path(__file__).parent.parent)

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"mlx": version("mlx"), "numpy": np.__version__, "device": str(mx.default_device()),
            "blas": blas.LOADED or "bundled", "commit": commit.stdout.strip() or "unknown",
            # null where git is not there to say
            "commit_changed": bool(status.stdout.strip()) if status.returncode == 0 else None}


def read_report(path: Path, mend: str) -> dict:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError
        return report
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a report"
        raise BadInput(f"{path} cannot be read ({why}); {mend}") from None


def require_gate(path: str, model: str) -> None:
    """Raises BadInput unless a gate says GO for these very weights: before a training run."""
    run = "run `python -m gate CONFIG` first, and give its FOLDER/gate.json"
    report = read_report(Path(path), f"require_gate asks for a passed gate: {run}")
    if report.get("verdict") != "GO":
        why = "; ".join(report.get("reasons", [])[:3]) or "it compared nothing"
        raise BadInput(f"require_gate: {path} says {report.get('verdict', 'nothing')} ({why}); "
                       "training would teach what is there already, or cannot be measured: choose "
                       "another task or benchmark, or drop require_gate")
    stored = report.get("models", {}).get("base", {})
    if stored.get("weights") != hash_model(model)["weights"]:
        raise BadInput(f"require_gate: {path} is about other weights ({stored.get('name')}) than "
                       f"model = {model}; {run}")

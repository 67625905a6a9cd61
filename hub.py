"""From a name to a folder of files that can be trusted: a local folder, or the Hub's NAME@REVISION.

Of a Hub repository only what a model needs is fetched, all of one commit: the small files, then the
safetensors that its index names. A folder is a stranger's word until checked. JSON and safetensors
are parsed and nothing in it is executed (`auto_map` and Python files are never looked at); an index
may only name files beside it, and the tensors it promises are held against the files' headers. A
token (HF_TOKEN, `hf auth login`) goes to the Hub in a header and nowhere else.

    python generate.py --ckpt meta-llama/Llama-3.2-1B@main --prompt "23 + 45 = "
"""
import json
import os
import re
import stat
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import huggingface_hub  # what it needs for the network is imported where it is first used
import mlx.core as mx
from safetensors import SafetensorError, safe_open

from config import BadInput

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
               "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", INDEX)
# no separators, so it stays in its folder; no *?[, which the Hub's library reads as patterns
SHARD = re.compile(r"\w[\w.+=-]*\.safetensors")
REPO = re.compile(r"(?!models/|runs/)\w[\w.-]*/\w[\w.-]*", re.ASCII)
REVISION = re.compile(r"\w(?:[\w+=#@/-]|\.(?!\.))*")    # branch, tag or commit; no path, so no ..
OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".npz", ".pt", ".pth", ".safetensors"}
SECRETS = re.compile(r"hf_\w{16,}|(?<=[Bb]earer )[^\s'\"]+|(?<=://)[^/@\s]+(?=@)")


# --------------------------------------------------------------------------------------------------
# from a name to a folder


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """A local folder as it is, else the Hub's NAME or NAME@REVISION, from network or cache.

    weights   False: only the config and the tokenizer are fetched
    returns   a Hub's folder is named after its commit
    raises    BadInput, which says what to run
    """
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError) as error:    # no permission, name too long; ~nobody
        raise BadInput(f"model folder {one_line(name)!r} cannot be read ({one_line(error)}); "
                       "give another, or check its permissions") from None
    repo, at, revision = str(name).partition("@")
    if not REPO.fullmatch(repo):
        raise BadInput(f"no model folder {str(name)!r} (from {Path.cwd()}); give a folder in the "
                       "Hub's layout, or a Hub name such as meta-llama/Llama-3.2-1B")
    if at and not REVISION.fullmatch(revision):
        raise BadInput(f"{str(name)!r}: {revision!r} is no revision; expected a branch, tag or "
                       f"commit of {repo} behind the @, such as {repo}@main")
    folder = fetch(repo, revision or "main", SMALL_FILES)
    where = ("in the Hub cache (HF_HUB_OFFLINE is set: unset it where there is a network)"
             if huggingface_hub.constants.HF_HUB_OFFLINE else "on the Hub")
    if not is_file(folder / "config.json"):
        raise BadInput(f"{name} has no config.json {where}: not a model in the Hub's layout "
                       "(an adapter, a data set or GGUF?); name the model itself")
    wanted = sorted(set(read_index(folder).values())) or [WEIGHTS]
    absent = lambda: [file for file in wanted if not is_file(folder / file)]
    if weights and absent():
        # by commit: a push in between would mix two versions
        fetch(repo, folder.name, ["config.json", *wanted], f"it lacks {', '.join(absent()[:8])}")
        if absent():
            raise BadInput(f"{name} has no {', '.join(absent()[:8])} {where}; only safetensors "
                           f"weights are read ({WEIGHTS}, or the shards of {INDEX}); where a pull "
                           f"request holds them, give {repo}@refs/pr/NUMBER")
    return folder


def fetch(repo: str, revision: str, files: list[str], lacks: str = "") -> Path:
    """The snapshot folder of a Hub repository with those of the files that it has, and no other.

    lacks   what to say of the cache where the Hub is not reachable, if that is known
    """
    command = f".venv/bin/hf download {repo}" + f" --revision {revision}" * (revision != "main")
    mend = f"run `{command}` where there is a network, or give a local folder"
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision,
                                                      allow_patterns=list(files)))
    except huggingface_hub.errors.GatedRepoError:
        raise BadInput(f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, "
                       "then run `.venv/bin/hf auth login` or set HF_TOKEN") from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise BadInput(f"no folder {repo!r} here and no such model on the Hub; check the spelling, "
                       "or for a private or gated model run `.venv/bin/hf auth login`") from None
    except huggingface_hub.errors.RevisionNotFoundError:
        raise BadInput(f"{repo} has no revision {revision!r} on the Hub; expected one of its "
                       f"branches, tags or commits: give {repo}@REVISION as listed at "
                       f"https://huggingface.co/{repo}/commits/main, or {repo} alone") from None
    except (huggingface_hub.errors.LocalEntryNotFoundError,
            huggingface_hub.errors.OfflineModeIsEnabled) as error:
        what = repo if revision == "main" else f"{repo}@{revision}"
        partly = hasattr(error, "snapshot_path")    # then its own text says what lacks
        why = lacks or one_line(error if partly else error.__cause__ or error).split(". ")[0]
        state = "only partly" if lacks or partly else "not"
        net = ("HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE
               else "the Hub is not reachable")
        raise BadInput(f"no folder {repo!r} here, {what} is {state} in the Hub cache, and {net} "
                       f"({why}); {mend}") from None
    except Exception as error:  # the Hub's, the HTTP library's, the disk's: all mean the same
        raise BadInput(f"the Hub did not deliver {repo} ({one_line(error)}); {mend}; if it refuses "
                       "the token, run `.venv/bin/hf auth login`") from None


def one_line(error: object) -> str:
    """Its text on one line, 200 printable characters, and no token: a server may send it back."""
    text = " ".join(str(error).split())
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "<token>")
    return "".join(c if c.isprintable() else "?" for c in SECRETS.sub("<token>", text))[:200]


# --------------------------------------------------------------------------------------------------
# from a folder to tensors


def is_file(path: Path) -> bool:
    """A file or a link to one, as all of the Hub's cache is; BadInput where one may not look."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> BadInput:
    return BadInput(f"{path} cannot be read ({error.strerror or one_line(error)}); "
                    "check its permissions and its folder's")


def read_json(path: Path) -> dict:
    """Read a JSON object; raises BadInput naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; expected a folder in the Hub's layout "
                       "(config.json, *.safetensors, tokenizer)") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:   # not JSON, not UTF-8, nested without end
        raise BadInput(f"{path} is not valid JSON ({one_line(error)}); fetch it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_index(folder: Path) -> dict[str, str]:
    """What a folder's index promises, {tensor: file name}; {} where there is no index.

    raises   BadInput where an entry is more than the name of a safetensors file in that folder
    """
    path = folder / INDEX
    if not is_file(path):
        return {}
    promised = read_json(path).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise BadInput(f"{path}: expected a weight_map {{tensor: file name}}, got "
                       f"{repr(promised)[:80]}; do not trust {folder}, fetch the model again")
    for tensor, file in promised.items():
        if not isinstance(file, str) or not SHARD.fullmatch(file):
            raise BadInput(f"{path}: entry {repr(tensor)[:80]} points to {repr(file)[:80]}, and "
                           "only the plain name of a .safetensors file beside the index may stand "
                           f"there; do not trust {folder}, fetch the model again from its owner")
    return promised


def weight_files(folder: Path) -> list[Path]:
    """A model folder's safetensors files: the shards that its index names, or model.safetensors."""
    folder = Path(folder)
    if files := [folder / name for name in sorted(set(read_index(folder).values()))]:
        if missing := [f.name for f in files if not is_file(f)]:
            raise BadInput(f"{folder / INDEX} names shards that are missing: "
                           f"{', '.join(missing[:8])}; fetch the model again")
        return files
    if is_file(folder / WEIGHTS):
        return [folder / WEIGHTS]
    others = sorted(f.name for f in folder.glob("*") if f.suffix in OTHER_WEIGHTS)
    # .bin, .pt and .pth are pickles: reading one can run what a stranger wrote
    raise BadInput(f"{folder} has no {WEIGHTS} and no {INDEX}"
                   + f", but {', '.join(others[:4])}" * bool(others)
                   + "; only safetensors weights are read, under those names: fetch the model "
                   "again, or convert it with transformers' save_pretrained")


def tensor_names(path: Path) -> list[str]:
    """The tensors that a file's header names; BadInput where it is missing, cut short, corrupt."""
    try:
        path.open("rb").close()     # safetensors calls every file that it may not open missing
        with safe_open(path, framework="numpy") as file:    # also checks that all bytes are there
            return list(file.keys())
    except FileNotFoundError:
        raise BadInput(f"{path} is missing") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except SafetensorError as error:
        raise BadInput(f"{path} is truncated or corrupt ({one_line(error)}); "
                       "fetch or write it again") from None


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """Read one file; raises BadInput if truncated or corrupt (MLX notices late, or not at all)."""
    tensor_names(path)
    try:
        return mx.load(str(path))
    except RuntimeError as error:
        raise BadInput(f"{path} is truncated or corrupt ({one_line(error)}); "
                       "fetch or write it again") from None


def open_weights(folder: Path) -> dict[str, Path]:
    """Where each tensor of a model folder lies, {name: file}, from the headers alone.

    raises   BadInput: no weights, a shard missing or damaged, a tensor in two shards, or one that
             is not where the index says
    """
    folder = Path(folder)
    files, promised, found = weight_files(folder), read_index(folder), {}
    for file in files:
        names = set(tensor_names(file))
        if twice := sorted(names & found.keys()):
            raise BadInput(f"tensor {one_line(twice[0])!r} ({len(twice)} such) is in two files of "
                           f"{folder}, {found[twice[0]].name} and {file.name}; expected each "
                           "tensor once: fetch the model again")
        if absent := [name for name, shard in promised.items()
                      if shard == file.name and name not in names]:
            raise BadInput(f"{folder / INDEX} promises {len(absent)} tensors in {file.name} that "
                           f"are not there: {one_line(absent[:8])}; fetch the model again")
        found.update(dict.fromkeys(names, file))
    if not found:
        raise BadInput(f"{files[0]} holds no tensors; fetch the model again")
    return found

"""From a name to a model's folder: a local one, a GGUF file's, or what it needs of a Hub's.

All of one commit: the small files come first, then the safetensors that its index names. A token
(HF_TOKEN, `hf auth login`) goes to the Hub in a header and nowhere else.

    python generate.py --ckpt meta-llama/Llama-3.2-1B@main --prompt "23 + 45 = "
"""
import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

import huggingface_hub  # what it needs for the network is loaded where it is first used

from config import BadInput
from files.disk import is_file, one_line, write_bytes
from files.model_folder import GGUF, INDEX, WEIGHTS, read_index

REPO = re.compile(r"(?!models/|runs/)\w[\w.-]*/\w[\w.-]*", re.ASCII)
REVISION = re.compile(r"\w(?:[\w+=#@/-]|\.(?!\.))*")    # branch, tag or commit; no path, so no ..
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
               "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", INDEX)


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """A local folder as it is, a .gguf file as one, or the Hub's NAME or NAME@REVISION.

    weights   False: only the config and the tokenizer are fetched
    returns   a Hub's folder is named after its commit
    raises    BadInput, which says what to run
    """
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        is_gguf = folder.suffix == ".gguf" and folder.is_file()
    except (OSError, RuntimeError) as error:    # no permission, name too long; ~nobody
        raise BadInput(f"model folder {one_line(name)!r} cannot be read ({one_line(error)}); "
                       "give another, or check its permissions") from None
    if is_gguf:
        return gguf_folder(folder.resolve(), folder.stat().st_mtime_ns)
    repo, at, revision = str(name).partition("@")
    if not REPO.fullmatch(repo) or folder.suffix == ".gguf":
        raise BadInput(f"no model folder {str(name)!r} (from {Path.cwd()}); give a run such "
                       "as runs/sft, a folder in the Hub's layout, a .gguf file, or a Hub name "
                       "such as meta-llama/Llama-3.2-1B")
    if at and not REVISION.fullmatch(revision):
        raise BadInput(f"{str(name)!r}: {revision!r} is no revision; expected a branch, tag or "
                       f"commit of {repo} behind the @, such as {repo}@main")
    return fetch_model(str(name), repo, revision or "main", weights)


@functools.cache
def gguf_folder(path: Path, changed: int) -> Path:
    """A folder that stands for a GGUF file while this process runs: what is small, and a link.

    changed   the file's time, by which another file of that name is told apart
    returns   a folder of the file's own name, so that a message about it names the file
    """
    # imported here: other models have no use for it
    from files.gguf import folder_files, read_gguf
    files = folder_files(read_gguf(path))
    folder = Path(tempfile.mkdtemp(prefix="gguf-")) / path.name
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    for name, content in files.items():
        write_bytes(folder / name, content)
    (folder / GGUF).symlink_to(path)
    return folder


def fetch_model(name: str, repo: str, revision: str, weights: bool) -> Path:
    """The folder of a Hub model, named after its commit, from network or cache; raises BadInput.

    weights   False: only the config and the tokenizer are fetched
    """
    folder = fetch(repo, revision, SMALL_FILES)
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

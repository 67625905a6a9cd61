"""A model's folder: from a name to its files, from its files to tensors, and back.

A name is a local folder, or a Hub repository of which only what a model needs is fetched, all of
one commit: the small files come first, then the safetensors that its index names. A token
(HF_TOKEN, `hf auth login`) goes to the Hub in a header and nowhere else.

    python generate.py --ckpt meta-llama/Llama-3.2-1B@main --prompt "23 + 45 = "

A folder is a stranger's word until checked. JSON and safetensors are parsed and nothing in it is
executed (`auto_map` and Python files are never looked at); an index may only name files beside it,
the tensors it promises are held against the files' headers, and every number must be finite.
"""
import atexit
import functools
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import huggingface_hub  # what it needs for the network is loaded where it is first used
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError, safe_open

from config import BadInput, Config, load_config
from engine import blas
from files.disk import (
    COUNT,
    LAYERS,
    OBJECT,
    POSITIVE,
    REQUIRED,
    SWITCH,
    WIDTH,
    check_target,
    is_file,
    one_line,
    one_of,
    read_data,
    read_fields,
    read_json,
    replace_file,
    unreadable,
    write_bytes,
)

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF = "model.gguf"     # in a folder that stands for a GGUF file (gguf_folder)
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "generation_config.json", "special_tokens_map.json", "chat_template.jinja")
# no separators, so it stays in its folder; no *?[, which the Hub's library reads as patterns
SHARD = re.compile(r"\w[\w.+=-]*\.safetensors")
OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".npz", ".pt", ".pth", ".safetensors"}
LARGE = 2 ** 30     # bytes of weights from which memory is scarcer than time
REPO = re.compile(r"(?!models/|runs/)\w[\w.-]*/\w[\w.-]*", re.ASCII)
REVISION = re.compile(r"\w(?:[\w+=#@/-]|\.(?!\.))*")    # branch, tag or commit; no path, so no ..
SMALL_FILES = ("config.json", INDEX, *TOKENIZER_FILES)

# --------------------------------------------------------------------------------------------------
# from a name to a folder


def root_model(name: str | Path) -> str | Path:
    """The model under a run's adapter, under whatever runs it was itself trained on."""
    seen = set()
    while is_file(Path(name, "adapter_config.json")) and is_file(Path(name, "config.yaml")):
        if os.path.realpath(name) in seen:
            raise BadInput(f"the run {name} is trained on itself: the model of its config.yaml, or "
                           "that one's model, is the run again; put back what it was trained on")
        seen.add(os.path.realpath(name))
        name = load_run_config(name).model
    return name


def load_run_config(folder: str | Path) -> Config:
    """A run's config.yaml. Its model, if that is no folder from here, is looked for beside the run
    and above it, so that commands work from another directory."""
    cfg = load_config(Path(folder) / "config.yaml")
    if not os.path.exists(Path(cfg.model).expanduser()):
        above = [str(place / cfg.model) for place in Path(folder).resolve().parents]
        cfg.model = next(filter(os.path.isdir, above), cfg.model)
    return cfg


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


def read_origin(name: str | Path) -> tuple[Path, dict]:
    """Folder and config.json of a model, or of the model under a run; no weights are fetched."""
    folder = find_folder(root_model(name), weights=False)
    return folder, read_json(folder / "config.json")


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


# --------------------------------------------------------------------------------------------------
# config.json: what each value must be, and what it is where it is left out

FIELDS = {
    "hidden_size": (WIDTH, REQUIRED), "intermediate_size": (WIDTH, REQUIRED),
    "num_hidden_layers": (LAYERS, REQUIRED), "num_attention_heads": (WIDTH, REQUIRED),
    "vocab_size": (WIDTH, REQUIRED), "num_key_value_heads": (WIDTH, None),
    "head_dim": (WIDTH, None), "max_position_embeddings": (COUNT, 2048),
    "rms_norm_eps": (POSITIVE, 1e-6), "rope_theta": (POSITIVE, 10000.0),
    "rope_scaling": (OBJECT, {}), "rope_parameters": (OBJECT, {}),
    "attention_bias": (SWITCH, False), "mlp_bias": (SWITCH, False),
    "tie_word_embeddings": (SWITCH, False),
    "hidden_act": (one_of("silu"), "silu"), "use_sliding_window": (one_of(False), False),
}
LINEAR = {"factor": (POSITIVE, REQUIRED)}
LLAMA3 = {**LINEAR, "low_freq_factor": (POSITIVE, REQUIRED),
          "high_freq_factor": (POSITIVE, REQUIRED),
          "original_max_position_embeddings": (POSITIVE, REQUIRED)}
ROPE = {"default": {}, "linear": LINEAR, "llama3": LLAMA3}


@dataclass
class ModelArgs:
    hidden_size: int                # D
    intermediate_size: int          # F
    num_hidden_layers: int          # L
    num_attention_heads: int        # H
    num_key_value_heads: int        # K
    head_dim: int                   # d; not always D / H
    vocab_size: int                 # V
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None       # {"rope_type": "llama3" | "linear", ...}
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


def parse_args(raw: dict, where: str) -> ModelArgs:
    """config.json, old or new spelling; raises BadInput on what would be computed wrongly."""
    family = raw.get("model_type")
    if family not in FAMILIES.values():
        names = ", ".join(f"{name} ({model_type})" for name, model_type in FAMILIES.items())
        raise BadInput(f"{where}: model_type {family!r} is not supported; expected {names}")
    fields = read_fields(raw, FIELDS, where)
    rope_theta, rope_scaling = read_rope(fields, where)
    D, H, bias = fields["hidden_size"], fields["num_attention_heads"], fields["attention_bias"]
    K, d = fields["num_key_value_heads"] or H, fields["head_dim"] or D // H
    if H % K or d < 2 or d % 2 or (D % H and not fields["head_dim"]):
        raise BadInput(f"{where}: hidden_size {D}, num_attention_heads {H}, num_key_value_heads "
                       f"{K}, head_dim {fields['head_dim']} do not fit: expected key-value heads "
                       "that divide the heads, heads that divide hidden_size (or a head_dim), and "
                       "heads of an even width, which RoPE turns in pairs")
    return ModelArgs(
        hidden_size=D, intermediate_size=fields["intermediate_size"],
        num_hidden_layers=fields["num_hidden_layers"], num_attention_heads=H,
        num_key_value_heads=K, head_dim=d, vocab_size=fields["vocab_size"],
        max_position_embeddings=fields["max_position_embeddings"],
        rms_norm_eps=fields["rms_norm_eps"], rope_theta=rope_theta, rope_scaling=rope_scaling,
        qkv_bias=family == "qwen2" or bias, o_bias=family == "llama" and bias,
        mlp_bias=fields["mlp_bias"], tie_word_embeddings=fields["tie_word_embeddings"],
    )


def read_rope(fields: dict, where: str) -> tuple[float, dict | None]:
    """RoPE's theta and scaling, of config.json's FIELDS; no scaling: None.

    Transformers 5 writes rope_parameters; before it, rope_theta stood beside rope_scaling. Reading
    only one of them gives a model that runs and is wrong from the first token on.
    """
    rope = fields["rope_parameters"] or fields["rope_scaling"]
    kind = {"rope_theta": (POSITIVE, fields["rope_theta"]), "type": (one_of(*ROPE), "default")}
    rope_type = rope.get("rope_type") or rope.get("type")
    kind = read_fields({**rope, "type": rope_type}, kind, f"{where}: RoPE")
    if kind["type"] == "default":
        return kind["rope_theta"], None
    scaling = read_fields(rope, ROPE[kind["type"]], f"{where}: RoPE")
    if kind["type"] == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise BadInput(f"{where}: RoPE low_freq_factor = {scaling['low_freq_factor']}, expected "
                       f"less than high_freq_factor = {scaling['high_freq_factor']}")
    return kind["rope_theta"], {"rope_type": kind["type"], **scaling}


# --------------------------------------------------------------------------------------------------
# from a folder to tensors


def read_index(folder: Path) -> dict[str, str]:
    """What a folder's index promises, {tensor: file name}; {} where there is no index.

    raises   BadInput where an entry is more than the name of a safetensors file in that folder
    """
    path = folder / INDEX
    # a link that leads nowhere is no folder without an index
    if not is_file(path) and not os.path.lexists(path):
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
    """A model folder's weights: the shards that its index names, model.safetensors, or a GGUF."""
    folder = Path(folder)
    if files := [folder / name for name in sorted(set(read_index(folder).values()))]:
        if missing := [f.name for f in files if not is_file(f)]:
            raise BadInput(f"{folder / INDEX} names shards that are missing: "
                           f"{', '.join(missing[:8])}; fetch the model again")
        return files
    if is_file(folder / WEIGHTS):
        return [folder / WEIGHTS]
    if is_file(folder / GGUF):
        return [folder / GGUF]
    others = sorted(f.name for f in folder.glob("*") if f.suffix in OTHER_WEIGHTS)
    # .bin, .pt and .pth are pickles: reading one can run what a stranger wrote
    raise BadInput(f"{folder} has no {WEIGHTS} and no {INDEX}"
                   + f", but {', '.join(others[:4])}" * bool(others)
                   + "; only safetensors weights are read, under those names, or a .gguf file that "
                   "is given itself: fetch the model again, or convert it with transformers' "
                   "save_pretrained")


def tensor_names(path: Path) -> list[str]:
    """The tensors that a file's header names; BadInput where it is missing, cut short, corrupt."""
    if os.path.lexists(path) and not is_file(path):     # opening a pipe would wait for ever
        raise BadInput(f"{path} is a folder, a pipe or a device; expected a safetensors file")
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


def check_tensors(found: dict[str, mx.array], expected: dict[str, mx.array], where: str) -> None:
    """Compare names and shapes; raises BadInput with every mismatch (the first 8 of each kind)."""
    kinds = {
        "missing": [k for k in expected if k not in found],
        "not expected": [k for k in found if k not in expected],
        "of another shape": [f"{k} {found[k].shape}, expected {expected[k].shape}" for k in found
                             if k in expected and found[k].shape != expected[k].shape],
    }
    show = lambda names: ", ".join(names[:8]) + (
        f" and {len(names) - 8} more" if len(names) > 8 else "")
    mistakes = [f"{len(names)} {kind}: {show(names)}" for kind, names in kinds.items() if names]
    if mistakes:
        raise BadInput(f"{where}: tensors do not fit: {'; '.join(mistakes)}")


# of a float type: the signed and the unsigned whole numbers of its width, infinity's bits
BITS_OF = {mx.float32: (mx.int32, mx.uint32, 0x7F800000), mx.float16: (mx.int16, mx.uint16, 0x7C00),
           mx.bfloat16: (mx.int16, mx.uint16, 0x7F80)}


def is_finite(x: mx.array) -> mx.array:
    """Whether every number of a float array is finite: a bool, without a second array of its size.

    Infinity and NaN have all exponent bits set. So read as whole numbers positive ones are the
    largest of the signed, negative ones of the unsigned.
    """
    signed, unsigned, infinity = BITS_OF[x.dtype]
    sign_bit = 2 ** (8 * x.dtype.size - 1)
    return ((x.view(signed).max() < infinity) & (x.view(unsigned).max() < sign_bit + infinity))


def check_numbers(arrays: dict[str, mx.array], where: str, codes: tuple[str, ...] = ()) -> None:
    """Raises BadInput where a tensor is of another type than expected, or not finite throughout.

    Every number is looked at: what passes holds no infinity and no NaN.
    codes    names of packed weights, which are uint32; all others are floats
    """
    wrong = [f"{k} {str(v.dtype).removeprefix('mlx.core.')}" for k, v in arrays.items()
             if (v.dtype != mx.uint32 if k in codes else v.dtype not in BITS_OF)]
    if wrong:
        raise BadInput(f"{where}: tensors of the wrong type: {', '.join(wrong[:8])}; expected "
                       "float32, bfloat16 or float16, and uint32 for packed codes")
    finite = {k: is_finite(v) for k, v in arrays.items() if k not in codes}
    mx.eval(finite)
    if ruined := [k for k, all_finite in finite.items() if not all_finite.item()]:
        raise BadInput(f"{where}: NaN or infinity in {', '.join(ruined[:8])}; "
                       "fetch or train it again")


def check_logits(model: nn.Module, where: str | Path) -> None:
    """BadInput where a model's logits are no numbers: finite weights may overflow together."""
    if not mx.isfinite(model(mx.zeros((1, 1), mx.int32))).all().item():
        raise BadInput(f"{where}: its logits are NaN or infinite, though each weight is finite; "
                       "train it again, or take another checkpoint or adapter")


def default_dtype() -> mx.Dtype | None:
    """float32 on a CPU, where half precision is emulated; on a GPU None, the checkpoint's own."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else None


def read_weights(folder: Path, tied: bool, dtype: mx.Dtype | None = None, bits: int | None = None,
                 group_size: int | None = None) -> dict[str, mx.array]:
    """A checkpoint's tensors by name. MLX reads one when it is evaluated, not before.

    tied   the unembedding is the embedding; some exporters store that matrix twice
    dtype, bits, group_size   what is asked of the model, for a GGUF, which may have it as it is
    """
    found, files = {}, weight_files(folder)
    if blas.CPU_WHEEL and sum(file.stat().st_size for file in files) > LARGE:
        blas.map_large_blocks()
    if files == [folder / GGUF]:
        # imported here: other models have no use for it
        from files.gguf import read_gguf, read_tensors
        # a quantised model's tables stay in 16 bits
        return read_tensors(read_gguf(files[0]), dtype if bits else dtype or default_dtype(), bits,
                            group_size)
    for file in sorted(set(open_weights(folder).values())):
        found |= mx.load(str(file))
    # derived, in old checkpoints
    found = {k: v for k, v in found.items() if not k.endswith("rotary_emb.inv_freq")}
    return {k: v for k, v in found.items() if not (tied and k.startswith("lm_head."))}


def fill_weights(model: nn.Module, found: dict[str, mx.array], dtype: mx.Dtype | None,
                 make_layer, where: str) -> None:
    """Put a checkpoint's tensors into the model, every one accounted for, layer by layer.

    dtype       that all become but packed codes; None: they stay what they are
    make_layer  (path, layer, tensors) -> the layer to take its place; None: the layer itself
    A model that is quantised here never exists whole: memory peaks at the quantised size plus one
    layer.
    """
    check_tensors(found, dict(tree_flatten(model.parameters())), where)
    layers = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    for i, (path, layer) in enumerate(layers):
        own = {name: found.pop(f"{path}.{name}") for name, _ in tree_flatten(layer.parameters())}
        is_packed = "scales" in own
        try:
            check_numbers({f"{path}.{k}": v for k, v in own.items()}, where,
                          (f"{path}.weight",) if is_packed else ())
            mx.eval(own)
        except RuntimeError as error:   # MLX reads a tensor when it is evaluated
            raise BadInput(f"could not read {path} of {where} ({one_line(error)}); "
                           "fetch the model again") from None
        cast = {k: v.astype(dtype) if dtype and v.dtype != mx.uint32 else v    # codes stay codes
                for k, v in own.items()}
        if make_layer:
            layer = make_layer(path, layer, own, cast)
        else:
            layer.update(cast)
        layers[i] = path, layer
        mx.eval(layer.parameters())
    model.update_modules(tree_unflatten(layers))


# --------------------------------------------------------------------------------------------------
# and back


def save_safetensors(path: Path, arrays: dict[str, mx.array],
                     metadata: dict[str, str] | None = None) -> None:
    """Write aside, check, sync, rename: a reader sees the old file or the new one, never a part.

    raises   BadInput if the disk is full or not writable; the old file is then untouched
    """
    check_target(path)
    # mx appends .safetensors to any other ending
    temporary = path.with_name(f".{path.name}.tmp.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.eval(arrays)
        temporary.unlink(missing_ok=True)   # a link there would be written through
        mx.save_safetensors(str(temporary), arrays, metadata={"format": "mlx", **(metadata or {})})
        # a full disk can leave a short file without an exception
        with safe_open(temporary, framework="numpy"):
            pass
        replace_file(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"could not write {path} ({' '.join(str(error).split())}); "
                       "free some disk space: what was saved before is intact") from None


def model_files(model: nn.Module, source: str | Path) -> dict[str, dict | str | bytes]:
    """A whole model as {file name: content}: weights; config and tokenizer as the source has them.

    config.json comes last: its presence says that all is there.
    """
    (origin, raw), arrays = read_origin(source), dict(tree_flatten(model.parameters()))
    raw.pop("quantization", None)       # the weights are plain
    raw.pop("quantization_config", None)
    # both spellings: mlx-lm reads the older alone, and takes theta 10,000 where it is not there
    raw["rope_theta"], raw["rope_scaling"] = model.args.rope_theta, model.args.rope_scaling
    raw["dtype"] = str(arrays["model.norm.weight"].dtype).removeprefix("mlx.core.")
    raw["torch_dtype"] = raw["dtype"]
    beside = {f.name: read_data(f, "a tokenizer's file", 2 ** 28) for f in origin.iterdir()
              if f.name in TOKENIZER_FILES}
    return {**beside, WEIGHTS: arrays, "config.json": json.dumps(raw, indent=2) + "\n"}


def write_files(folder: Path, files: dict[str, dict | str | bytes]) -> None:
    """Write tensors, texts and bytes by file name, in their order."""
    for name, content in files.items():
        if isinstance(content, dict):
            save_safetensors(folder / name, content)
        else:
            write_bytes(folder / name, content.encode() if isinstance(content, str) else content)

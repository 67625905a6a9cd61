"""An adapter's folder in mlx-lm's and in PEFT's format: settings and names, read strictly, written.

Both hold a pair of matrices for each adapted layer; they differ in names, in orientation, and in
how rank, scale and layers are said. Reading is strict: an adapter of which half is understood would
be half an adapter.
"""
import hashlib
import json
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from config import BadInput
from files.disk import (
    COUNT,
    NAMES,
    OBJECT,
    POSITIVE,
    RANK,
    REQUIRED,
    SWITCH,
    TEXT,
    Kind,
    is_file,
    one_of,
    read_fields,
    read_json,
)
from files.model_folder import check_numbers, check_tensors, read_safetensors

MODULES = {**{t: f"self_attn.{t}_proj" for t in "qkvo"},
           **{t: f"mlp.{t}_proj" for t in ("gate", "up", "down")}}
MLX_FILES = ("adapters.safetensors", "adapter_config.json")
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
PEFT_TARGETS = {name.split(".")[1]: t for t, name in MODULES.items()}    # q_proj: q, ...
# a PEFT config's settings that do not change what a trained adapter computes
PEFT_NEUTRAL = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout",
                "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"}


def read_adapter(folder: Path, blocks: int) -> tuple[dict, dict[str, mx.array], str]:
    """An adapter's settings, its tensors as they lie in its file, and that file.

    blocks   of the model that it goes on
    returns  {rank, scale, paths, base, fingerprint, is_peft}, {name: array}, path; is_peft: by
             PEFT's names and orientation (from_peft). raises  BadInput
    """
    where = folder / "adapter_config.json"
    if not is_file(where):
        raise BadInput(f"{folder} holds no adapter (no adapter_config.json); expected a run's "
                       "folder, or an adapter's as mlx-lm or peft writes it")
    raw = read_json(where, "an adapter's settings, as mlx-lm or peft writes them")
    is_peft = "peft_type" in raw
    read_config = read_peft_config if is_peft else read_mlx_config
    rank, scale, paths = read_config(raw, linear_paths(blocks), str(where))
    file = folder / (PEFT_FILES if is_peft else MLX_FILES)[0]
    base = raw.get("base_model_name_or_path", raw.get("model", "an unknown one"))
    about = {"rank": rank, "scale": scale, "paths": paths, "base": base,
             "fingerprint": raw.get("base_fingerprint"), "is_peft": is_peft}
    return about, read_safetensors(file), str(file)


def fingerprint(model: nn.Module) -> str:
    """Tell bases of one shape apart: a hash of the final norm's gains as bfloat16.

    So it is the same for a checkpoint loaded in float32 and in bfloat16.
    """
    gains = np.array(model.model.norm.weight.astype(mx.bfloat16).astype(mx.float32))
    return hashlib.sha256(gains.tobytes()).hexdigest()[:16]


def adapter_arrays(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's tensors by mlx-lm's names: model.layers.0.self_attn.q_proj.lora_a, ..."""
    return {k: v for k, v in tree_flatten(model.parameters())
            if k.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}


def about_adapter(model: nn.Module, base: str | Path) -> dict:
    """What an adapter's folder says of it; base: the model that it belongs on."""
    wrapped = {path: m for path, m in model.named_modules() if hasattr(m, "lora_a")}
    layer = next(iter(wrapped.values()))
    return {"rank": layer.lora_a.shape[1], "scale": layer.scale, "base": base,
            "layers": layer_names(list(wrapped), model.args.num_hidden_layers),
            "fingerprint": fingerprint(model)}


def fit_adapter(model: nn.Module, about: dict, found: dict[str, mx.array],
                file: str) -> dict[str, mx.array]:
    """read_adapter's tensors by our names, in float32; BadInput where they do not fit the model.

    model   its layers are wrapped as `about` says
    """
    folder, expected = Path(file).parent, adapter_arrays(model)
    # by the names in the file, which are those that its owner can look for
    check_tensors(found, to_peft(expected) if about["is_peft"] else expected,
                  f"adapter {folder} on this model (trained on {about['base']}: load it there)")
    check_numbers(found, file)
    found = from_peft(found) if about["is_peft"] else found
    if about["fingerprint"] not in (None, fingerprint(model)):
        raise BadInput(f"adapter {folder} was trained on another model of the same shape "
                       f"({about['base']}); load it on that one")
    return {name: array.astype(mx.float32) for name, array in found.items()}


def linear_paths(blocks: int) -> list[str]:
    """What an adapter may change: model.layers.0.self_attn.q_proj, ..., block by block."""
    return [f"model.layers.{block}.{name}" for block in range(blocks) for name in MODULES.values()]


def layer_names(paths: list[str], blocks: int) -> list[str]:
    """Layers by their names in a block (mlp.up_proj) if every block has the same, else by path."""
    in_block = [path.split(".", 3)[3] for path in paths]    # model.layers.0.mlp.up_proj: the end
    names = [name for name in MODULES.values() if name in in_block]
    if len(paths) == len(names) * blocks:
        return names
    return [path for path in linear_paths(blocks) if path in paths]


def mlx_files(arrays: dict[str, mx.array], about: dict) -> dict:
    """An adapter's folder as mlx-lm reads it: {file name: content}.

    about   {rank, scale, layers (layer_names), base, fingerprint}
    """
    settings = {
        "fine_tune_type": "lora", "num_layers": -1,     # all
        "lora_parameters": {"rank": about["rank"], "alpha": about["scale"] * about["rank"],
                            "scale": about["scale"], "dropout": 0.0, "keys": about["layers"]},
        "model": str(about["base"]), "base_fingerprint": about["fingerprint"],
    }
    return {MLX_FILES[1]: json.dumps(settings, indent=2) + "\n", MLX_FILES[0]: arrays}


def peft_files(arrays: dict[str, mx.array], about: dict) -> dict:
    """The same as `peft.PeftModel.from_pretrained(base, folder)` reads it.

    base    a folder, or the Hub's NAME or NAME@REVISION: what the adapter belongs on
    """
    name, _, revision = str(about["base"]).partition("@")
    if Path(about["base"]).expanduser().is_dir():
        name, revision = str(about["base"]), None
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name,
        "revision": revision or None, "r": about["rank"],
        "lora_alpha": about["scale"] * about["rank"], "lora_dropout": 0.0,
        "target_modules": [layer.removeprefix("self_attn.").removeprefix("mlp.")
                           for layer in about["layers"]],
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "inference_mode": True,
    }
    # the settings last: their presence says that all is there
    return {PEFT_FILES[0]: to_peft(arrays),
            PEFT_FILES[1]: json.dumps(settings, indent=2) + "\n"}


def to_peft(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Our tensors by PEFT's names, and the other way round, as they are there.

    example  model.layers.0.mlp.up_proj.lora_a, (in, r)
             -> base_model.model.model.layers.0.mlp.up_proj.lora_A.weight, (r, in)
    """
    return {f"base_model.model.{name[:-1]}{name[-1].upper()}.weight": array.T
            for name, array in arrays.items()}


def from_peft(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The way back, of names that are all PEFT's."""
    ours = {}
    for peft, array in arrays.items():
        name = peft.removeprefix("base_model.model.").removesuffix(".weight")
        ours[name[:-1] + name[-1].lower()] = array.T
    return ours


# adapter_config.json of mlx-lm, and of it lora_parameters; without keys all linear layers are meant
MLX_FIELDS = {"fine_tune_type": (one_of("lora"), "lora"), "lora_parameters": (OBJECT, REQUIRED),
              "num_layers": (Kind("a whole number above 0, or -1", lambda v: (
                  v == -1 or COUNT.fits(v))), -1),
              "model": (TEXT, None), "base_fingerprint": (TEXT, None)}
MLX_LORA = {"rank": (RANK, REQUIRED), "scale": (POSITIVE, REQUIRED), "keys": (NAMES, None)}


def read_mlx_config(settings: dict, layers: list[str],
                    where: str) -> tuple[int, float, list[str]]:
    """An mlx-lm config's rank, scale, and the paths out of `layers` that it wraps.

    mlx-lm's keys are names in a block, which go for the last num_layers blocks (-1: for all), or
    whole paths. raises  BadInput
    """
    fields = read_fields(settings, MLX_FIELDS, where)
    lora = read_fields(fields["lora_parameters"], MLX_LORA, f"{where}: lora_parameters")
    last = layers[-max(fields["num_layers"], 0) * len(MODULES):]
    keys = lora["keys"] or list(MODULES.values())
    unknown = [k for k in keys if k not in MODULES.values() and k not in layers]
    if unknown:
        raise BadInput(f"{where}: lora_parameters keys {json.dumps(unknown)[:200]} are no layers "
                       f"that can be adapted here; expected some out of "
                       f"{', '.join(MODULES.values())}, or {layers[0]} to {layers[-1]}")
    paths = [p for p in layers if p in keys or (p in last and p.split(".", 3)[3] in keys)]
    return lora["rank"], lora["scale"], paths


UNSET = one_of(False, "", [], {}, expected="unset")


def read_peft_config(settings: dict, layers: list[str],
                     where: str) -> tuple[int, float, list[str]]:
    """A PEFT config's rank, scale, and the paths out of `layers` that it wraps.

    target_modules ends their paths (q_proj, or a whole path); layers_to_transform says in which
    blocks, which PEFT takes for all where it is not set.
    raises   BadInput, naming every setting that asks for more than two matrices to a linear layer
    """
    def ends(path, target):
        return f".{path}".endswith(f".{target}")

    L = len(layers) // len(MODULES)
    in_model = lambda v: type(v) is int and 0 <= v < L
    fields = {
        "peft_type": (one_of("LORA", expected="LORA"), REQUIRED), "r": (RANK, REQUIRED),
        "lora_alpha": (POSITIVE, REQUIRED), "base_model_name_or_path": (TEXT, None),
        "target_modules": (Kind(
            f"a list out of {', '.join(PEFT_TARGETS)}, or paths of such layers",
            lambda v: NAMES.fits(v) and all(any(ends(p, t) for p in layers) for t in v)), REQUIRED),
        "layers_to_transform": (Kind(f"blocks out of 0 to {L - 1}", lambda v: (
            in_model(v) or type(v) is list and all(map(in_model, v)))), []),
        "layers_pattern": (one_of("", "layers", [], ["layers"], expected="layers"), ""),
        "bias": (one_of("none", expected="none"), "none"), "use_rslora": (SWITCH, False),
        # the others change the base's own weights as well
        "init_lora_weights": (one_of(True, False, "gaussian",
                                     expected="true, false or gaussian"), True)}
    # whatever else is set, by this PEFT or a later one, may change what is computed
    fields |= {name: (UNSET, None) for name in settings.keys() - fields.keys() - PEFT_NEUTRAL}
    about = read_fields(settings, fields, f"{where}: not a PEFT adapter that can be read here")
    rank, alpha, targets = about["r"], about["lora_alpha"], about["target_modules"]
    blocks = about["layers_to_transform"]
    blocks = [blocks] if type(blocks) is int else blocks or range(L)
    scale = alpha / (rank ** 0.5 if about["use_rslora"] else rank)
    paths = [path for path in layers if any(ends(path, target) for target in targets)
             and int(path.split(".")[2]) in blocks]
    return rank, scale, paths

"""LoRA by hand: y = W x + scale * (x A) B, scale = alpha / rank, B = 0 at the start, W frozen.

Source: LoRA 2106.09685. Where packages differ: PEFT users set alpha, mlx-lm takes the scale itself;
we set alpha and print both. A ~ U(-1/sqrt(in), 1/sqrt(in)) as in mlx-lm. Adapters are saved in
mlx-lm's format, PEFT's is written and read too; in both places they give the same logits. Loading
is strict (why: study/prior_work.md).

    python lora.py --ckpt runs/sft --out fused                  # fuse: a folder in the Hub's layout
    python lora.py --ckpt runs/sft --out adapter --format peft  # the adapter alone; mlx: for mlx-lm
    python lora.py --ckpt models/tiny --adapter FOLDER --out fused      # mlx-lm's or PEFT's adapter
"""
import argparse
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from config import (
    COUNT,
    NAMES,
    OBJECT,
    POSITIVE,
    REQUIRED,
    BadInput,
    Config,
    Kind,
    load_config,
    one_of,
    read_fields,
    run_main,
    write_text,
)
from hub import is_file, read_json, read_safetensors
from model import Llama, check_numbers, check_tensors, load, save_model, save_safetensors
from quant import QuantizedLinear, packed_settings, plain_layer, quantize, unquantize
from tokenizer import Tokenizer

MODULES = {**{t: f"self_attn.{t}_proj" for t in "qkvo"},
           **{t: f"mlp.{t}_proj" for t in ("gate", "up", "down")}}
MLX_FILES = ("adapters.safetensors", "adapter_config.json")
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
PEFT_TARGETS = {name.split(".")[1]: t for t, name in MODULES.items()}    # q_proj: q, ...
# a PEFT config's settings that do not change what a trained adapter computes
PEFT_NEUTRAL = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout",
                "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"}


class LoRALinear(nn.Module):
    """A frozen linear layer, plain or quantised, plus a trainable update of low rank.

    lora_a (in, r), lora_b (r, out): float32 whatever the base's type, so that Adam's small steps
    are not rounded away
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float):
        super().__init__()
        out_dims, in_dims = linear.weight.shape
        if isinstance(linear, QuantizedLinear):     # its weight is packed
            in_dims = linear.scales.shape[1] * linear.group_size
        self.linear = linear
        self.lora_a = mx.random.uniform(-1, 1, (in_dims, rank)) * in_dims ** -0.5
        self.lora_b = mx.zeros((rank, out_dims))
        self.scale, self.enabled = scale, True

    def __call__(self, x: mx.array) -> mx.array:
        if not self.enabled:
            return self.linear(x)
        update = (x @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        # cast back: a float32 scale would turn a bfloat16 model's whole residual stream to float32
        return self.linear(x) + (self.scale * update).astype(x.dtype)

    def fused(self) -> nn.Module:
        """The plain linear layer, the update added to its weight in float32 and then cast back.

        A quantised weight is unpacked and stays so: rounding it again would eat the update.
        """
        if isinstance(self.linear, QuantizedLinear):
            self.linear = plain_layer(self.linear, self.linear.unpacked().astype(self.linear.dtype))
        self.linear.weight = self.fused_weight()
        mx.eval(self.linear.parameters())   # one by one: no second model beside the first
        return self.linear

    def fused_weight(self) -> mx.array:
        """W + scale * (A B)^T, computed in float32, in W's type."""
        weight = self.linear.weight
        update = self.scale * (self.lora_a @ self.lora_b).T
        return (weight.astype(mx.float32) + update).astype(weight.dtype)


def apply_lora(model: Llama, rank: int, alpha: float, targets: tuple[str, ...]) -> None:
    """Freeze the model, wrap the targets (of q, k, v, o, gate, up, down) in every block, in place.

    The model computes the same as before, since B = 0. Only lora_a and lora_b stay trainable.
    """
    wrap(model, [f"model.layers.{block}.{MODULES[t]}"
                 for block in range(model.args.num_hidden_layers) for t in targets],
         rank, alpha / rank)


def wrap(model: Llama, paths: list[str], rank: int, scale: float) -> None:
    """`apply_lora` of the linear layers at these paths: of any blocks, not the same in each."""
    model.freeze()
    named = dict(model.named_modules())
    model.update_modules(tree_unflatten(
        [(path, LoRALinear(named[path], rank, scale)) for path in paths]))
    # `linear` inside the wrapper stays frozen; only the wrapper's own two arrays thaw
    for _, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.unfreeze(recurse=False, keys=["lora_a", "lora_b"])


def linear_paths(model: Llama) -> list[str]:
    """What an adapter may change: model.layers.0.self_attn.q_proj, ..., block by block."""
    return [f"model.layers.{block}.{name}"
            for block in range(model.args.num_hidden_layers) for name in MODULES.values()]


def merge(model: Llama) -> None:
    """Fuse every LoRALinear into a plain linear layer, in place."""
    for block in model.model.layers:
        fused = [(name, module.fused()) for name, module in block.named_modules()
                 if isinstance(module, LoRALinear)]
        block.update_modules(tree_unflatten(fused))


@contextmanager
def adapters_off(model: Llama) -> Iterator[None]:
    """Within, the model computes as its base: the reference policy without a second copy."""
    layers = [m for _, m in model.named_modules() if isinstance(m, LoRALinear)]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
def fused_for_decoding(model: Llama) -> Iterator[None]:
    """Within, each float32 LoRALinear is one matrix: decoding is spared two small products.

    Other types stay as they are: bfloat16 would round the update away, and what samples would no
    longer be what is trained.
    """
    layers = [m for _, m in model.named_modules()
              if isinstance(m, LoRALinear) and m.linear.weight.dtype == mx.float32]
    weights = [layer.linear.weight for layer in layers]
    try:
        for layer in layers:
            layer.linear.weight, layer.enabled = layer.fused_weight(), False
        mx.eval([layer.linear.weight for layer in layers])
        yield
    finally:
        for layer, weight in zip(layers, weights):
            layer.linear.weight, layer.enabled = weight, True


def fingerprint(model: Llama) -> str:
    """Tell bases of one shape apart by the final norm's gains, rounded alike for any load type."""
    gains = np.array(model.model.norm.weight.astype(mx.bfloat16).astype(mx.float32))
    return hashlib.sha256(gains.tobytes()).hexdigest()[:16]


def adapter_arrays(model: Llama) -> dict[str, mx.array]:
    """The adapter's tensors by mlx-lm's names: model.layers.0.self_attn.q_proj.lora_a, ..."""
    return {k: v for k, v in tree_flatten(model.parameters())
            if k.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}


def save_adapters(model: Llama, cfg: Config, folder: Path) -> None:
    """Write a run's adapters.safetensors and adapter_config.json, which mlx-lm reads too."""
    export_mlx(model, folder, cfg.model)


def export_mlx(model: Llama, folder: Path, base_name: str | Path) -> None:
    """Write the adapter as mlx-lm and `load_adapters` read it; base_name as in `export_peft`."""
    rank, scale, keys = wrapped_layers(model)
    settings = {
        "fine_tune_type": "lora", "num_layers": -1,     # all
        "lora_parameters": {"rank": rank, "alpha": scale * rank, "scale": scale, "dropout": 0.0,
                            "keys": keys},
        "model": str(base_name), "base_fingerprint": fingerprint(model),
    }
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    save_safetensors(folder / "adapters.safetensors", adapter_arrays(model))


def wrapped_layers(model: Llama) -> tuple[int, float, list[str]]:
    """The adapter's rank, scale, and which layers it wraps.

    Their names in a block (mlp.up_proj) where every block has the same, else their whole paths.
    """
    wrapped = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    layer = next(iter(wrapped.values()))
    in_block = lambda path: path.split(".", 3)[3]       # model.layers.0.mlp.up_proj: mlp.up_proj
    names = [name for name in MODULES.values() if name in set(map(in_block, wrapped))]
    everywhere = len(wrapped) == len(names) * model.args.num_hidden_layers
    paths = [path for path in linear_paths(model) if path in wrapped]
    return layer.lora_a.shape[1], layer.scale, names if everywhere else paths


def load_adapters(model: Llama, folder: str | Path) -> None:
    """Wrap the model in place with an adapter, ours, mlx-lm's or PEFT's; BadInput lists misfits.

    The adapter may be on any of the blocks' linear layers, in any blocks. A PEFT adapter does not
    store its base's identity, nor does one of mlx-lm's; ours does, and it is checked.
    """
    folder = Path(folder)
    where = folder / "adapter_config.json"
    if not is_file(where):
        raise BadInput(f"{folder} holds no adapter (no adapter_config.json); expected a run's "
                       "folder, or an adapter's as mlx-lm or peft writes it")
    settings = read_json(where)
    is_peft = "peft_type" in settings
    read_config, base_key = ((read_peft_config, "base_model_name_or_path") if is_peft
                             else (read_mlx_config, "model"))
    rank, scale, paths = read_config(settings, linear_paths(model), str(where))
    file = folder / (PEFT_FILES if is_peft else MLX_FILES)[0]
    found, base = read_safetensors(file), settings.get("base_fingerprint")
    wrap(model, paths, rank, scale)
    ours = adapter_arrays(model)
    names = {peft_name(k) if is_peft else k: k for k in ours}
    expected = {name: ours[k].T if is_peft else ours[k] for name, k in names.items()}
    check_tensors(found, expected, f"adapter {folder} on this model "
                  f"(it was trained on {settings.get(base_key, 'an unknown one')})")
    check_numbers(found, str(file))
    if base and base != fingerprint(model):
        raise BadInput(f"adapter {folder} was trained on another model of the same shape "
                       f"({settings.get('model')}); load it on that one")
    arrays = [(names[k], (v.T if is_peft else v).astype(mx.float32)) for k, v in found.items()]
    model.load_weights(arrays, strict=False)    # all of them fit: just checked
    mx.eval(model.parameters())


# adapter_config.json of mlx-lm, and of it lora_parameters; without keys all linear layers are meant
MLX_FIELDS = {"fine_tune_type": (one_of("lora"), "lora"), "lora_parameters": (OBJECT, REQUIRED),
              "num_layers": (Kind("a whole number", lambda v: type(v) is int), -1)}
MLX_LORA = {"rank": (COUNT, REQUIRED), "scale": (POSITIVE, REQUIRED), "keys": (NAMES, None)}


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


def peft_name(name: str) -> str:
    """PEFT's name of one of our tensors, which is there the other way round.

    example  model.layers.0.mlp.up_proj.lora_a, (in, r)
             -> base_model.model.model.layers.0.mlp.up_proj.lora_A.weight, (r, in)
    """
    return f"base_model.model.{name[:-1]}{name[-1].upper()}.weight"


def export_peft(model: Llama, folder: Path, base_name: str | Path) -> None:
    """Write the adapter as `peft.PeftModel.from_pretrained(base, folder)` reads it.

    base_name   a folder, or the Hub's NAME or NAME@REVISION: what the adapter belongs on
    """
    rank, scale, layers = wrapped_layers(model)
    targets = [layer.removeprefix("self_attn.").removeprefix("mlp.") for layer in layers]
    name, _, revision = str(base_name).partition("@")
    if Path(base_name).expanduser().is_dir():
        name, revision = str(base_name), None
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name,
        "revision": revision or None, "r": rank, "lora_alpha": scale * rank,
        "lora_dropout": 0.0, "target_modules": targets,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "inference_mode": True,
    }
    save_safetensors(folder / PEFT_FILES[0],
                     {peft_name(k): v.T for k, v in adapter_arrays(model).items()})
    # last: its presence says that all is there
    write_text(folder / PEFT_FILES[1], json.dumps(settings, indent=2) + "\n")


def read_peft_config(settings: dict, layers: list[str],
                     where: str) -> tuple[int, float, list[str]]:
    """A PEFT config's rank, scale, and the paths out of `layers` that it wraps.

    target_modules ends their paths (q_proj, or a whole path); layers_to_transform says in which
    blocks, which PEFT takes for all where it is not set.
    raises   BadInput, naming every setting that asks for more than two matrices to a linear layer
    """
    rank, alpha, targets = (settings.get(k) for k in ("r", "lora_alpha", "target_modules"))
    L, blocks = len(layers) // len(MODULES), settings.get("layers_to_transform")
    blocks = list(range(L)) if blocks is None or blocks == [] else blocks
    blocks = blocks if isinstance(blocks, list) else [blocks]
    ends = lambda path, target: f".{path}".endswith(f".{target}")
    read = {  # setting: is it one we compute, and what it should be
        "peft_type": (settings["peft_type"] == "LORA", "LORA"),
        "r": (COUNT.fits(rank), COUNT.expected),
        "lora_alpha": (POSITIVE.fits(alpha), POSITIVE.expected),
        "target_modules": (NAMES.fits(targets) and all(
            any(ends(path, target) for path in layers) for target in targets),
            f"a list out of {', '.join(PEFT_TARGETS)}, or paths of such layers"),
        "layers_to_transform": (all(type(b) is int and 0 <= b < L for b in blocks),
                                f"blocks out of 0 to {L - 1}"),
        "layers_pattern": (settings.get("layers_pattern") in (None, "", [], "layers", ["layers"]),
                           "layers"),
        "bias": (settings.get("bias", "none") == "none", "none"),
        "use_rslora": (settings.get("use_rslora") in (None, False, True), "true or false"),
        # the others change the base's own weights as well
        "init_lora_weights": (settings.get("init_lora_weights", True) in (True, False, "gaussian"),
                              "true, false or gaussian"),
    }
    empty = lambda value: value is None or value is False or value in ("", [], {})
    mistakes = [(k, expected) for k, (fits, expected) in read.items() if not fits]
    # whatever else is set, by this PEFT or a later one, may change what is computed
    mistakes += [(k, "unset") for k, v in settings.items()
                 if k not in read.keys() | PEFT_NEUTRAL and not empty(v)]
    if mistakes:
        raise BadInput(f"{where}: not a PEFT adapter that can be read here: " + "; ".join(
            f"{k} = {json.dumps(settings.get(k))[:80]}, expected {expected}"
            for k, expected in mistakes))
    scale = alpha / (rank ** 0.5 if settings.get("use_rslora") else rank)
    paths = [path for path in layers if any(ends(path, target) for target in targets)
             and int(path.split(".")[2]) in blocks]
    return rank, scale, paths


def root_model(name: str | Path) -> str | Path:
    """The model under a run's adapter, under whatever runs it was itself trained on."""
    while (Path(name) / "adapter_config.json").exists() and (Path(name) / "config.yaml").exists():
        name = load_config(Path(name) / "config.yaml").model
    return name


def load_base(name: str | Path, dtype: str | None = None, bits: int | None = None,
              from_scratch: bool = False, group_size: int = 64) -> tuple[Llama, Tokenizer | None]:
    """`model.load`, where name may also be a run: its adapter is merged first.

    So that an adapter trained on top is all that separates the policy from where it started, and
    switching it off gives the reference.
    dtype   goes for the whole chain of runs under name; None: each run's own
    bits    a run's own quantised base stays as it was trained on until its adapter is merged; then
            its layers are quantised to these bits, unless it had the same: then they stay, and
            those that the adapter was merged into stay plain, or rounding would eat the update
    raises  BadInput
    """
    if root_model(name) == name or from_scratch:
        return load(root_model(name), dtype, bits, from_scratch, group_size)
    model, tokenizer, _ = load_checkpoint(name, dtype=dtype)
    stored = packed_settings(model)
    merge(model)
    if bits and stored != {(bits, group_size)}:
        blas.keep_batches_whole()
        quantize(model, bits, group_size)
    return model, tokenizer


def load_checkpoint(ckpt: str | Path, adapter: str | Path | None = None,
                    dtype: str | None = None) -> tuple[Llama, Tokenizer, Config | None]:
    """A run folder (adapter or full weights), model folder or Hub name -> (model, tokenizer, cfg).

    adapter  a folder, of ours, mlx-lm's or PEFT's: on top of the checkpoint, whose own adapter is
             then merged
    dtype    None: a run's own
    raises   BadInput, also where there is no tokenizer
    """
    folder, cfg = Path(ckpt), None
    if (folder / "config.yaml").exists():
        cfg = load_config(folder / "config.yaml")
        # a whole model's last file (model.save_model)
        if not any((folder / name).exists() for name in ("adapters.safetensors", "config.json")):
            raise BadInput(f"run folder {folder} holds no weights yet; "
                           f"finish it with `python train.py {folder}/config.yaml`")
    own = (folder / "adapter_config.json").exists()
    if own and cfg is None:
        raise BadInput(f"{folder} holds an adapter but no config.yaml, so its base model is "
                       f"unknown; give --ckpt BASE --adapter {folder} (load_adapters does it on a "
                       "model you loaded)")
    base, top = (cfg.model, folder) if own and adapter is None else (ckpt, adapter)
    bits, group_size = (cfg.bits, cfg.bits_group_size) if cfg else (None, 64)
    dtype = dtype or (cfg.dtype if cfg else None)
    model, tokenizer = load_base(base, dtype, bits, group_size=group_size)
    if top is not None:
        load_adapters(model, top)
    if tokenizer is None:
        raise BadInput(f"{base} has no tokenizer.model and no tokenizer.json; add the model's own")
    return model, tokenizer, cfg


def check_new(folder: Path) -> None:
    """BadInput unless a folder to write is absent or empty: two models in one would mix."""
    try:
        taken = any(folder.iterdir())
    except FileNotFoundError:
        taken = False
    except OSError:     # a file, or not to be looked into
        taken = True
    if taken:
        raise BadInput(f"{folder} already holds a model or other files; name a new folder")


def export(model: Llama, ckpt: str | Path, base: str | Path, folder: Path, kind: str) -> None:
    """Write an adapter alone, for peft or mlx-lm, and say which base it belongs on."""
    write = export_peft if kind == "peft" else export_mlx
    write(model, folder, base)
    print(f"wrote the adapter of {ckpt} to {folder}; its base is {base}")
    if root_model(base) != base:
        print(f"{base} is a run itself, and the base is that run fused: "
              f"`python lora.py --ckpt {base} --out FOLDER`")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Fuse a run's adapter into its base model, or write the adapter alone.")
    parser.add_argument("--ckpt", required=True,
                        help="run folder; with --adapter any model folder or Hub name")
    parser.add_argument("--adapter", metavar="FOLDER", help="take this adapter, ours, mlx-lm's or "
                        "peft's, on top of --ckpt")
    parser.add_argument("--out", required=True, type=Path, help="folder to write, new or empty")
    parser.add_argument("--format", choices=("hub", "peft", "mlx"), default="hub",
                        help="hub: base and adapter fused, in the Hub's layout (default); peft, "
                             "mlx: the adapter alone, for peft or mlx-lm")
    args = parser.parse_args(argv)
    check_new(args.out)
    model, _, cfg = load_checkpoint(args.ckpt, args.adapter)
    if not adapter_arrays(model):
        raise BadInput(f"{args.ckpt} has no adapter to fuse; it is already a whole model: give an "
                       "adapter with --adapter FOLDER")
    name, base = (args.adapter, args.ckpt) if args.adapter else (args.ckpt, cfg.model)
    if args.format != "hub":
        export(model, name, base, args.out, args.format)
        return
    merge(model)
    unquantize(model, model.model.norm.weight.dtype)
    save_model(model, args.out, root_model(base))
    print(f"fused {name} into {args.out}")


if __name__ == "__main__":
    run_main(main)

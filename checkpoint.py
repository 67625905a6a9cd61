"""From a run to its model and back: a base, the adapters of the runs under it, its own on top.

A run may be trained on another run: its `model:` names that folder. Then the lower adapters are
merged into the base first, so that the top one alone separates the policy from where it started.
The command `python lora.py` fuses and exports.
"""
from pathlib import Path

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
from mlx.utils import tree_flatten

from config import BadInput, Config
from files import model_folder
from files.adapters import about_adapter, adapter_arrays, mlx_files, peft_files
from files.disk import check_new, is_file
from lora import load_adapters, merge
from model import Llama, load
from text.tokenizer import Tokenizer, load_tokenizer


def checkpoint_files(model: Llama, cfg: Config) -> dict:
    """What a run saves for eval.py and others, {file name: content}: adapter or all weights."""
    if not cfg.full:
        return mlx_files(adapter_arrays(model), about_adapter(model, cfg.model))
    return model_folder.model_files(model, cfg.model)


def init_weights(model: Llama) -> None:
    """Random weights for training from scratch: sd 1/sqrt(inputs).

    The two matrices that write to the stream have 1/sqrt(2L) of it. The embedding starts small,
    sd 0.02: from a large one the bundled model learnt its sums by heart instead of adding.
    """
    scaled = []
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim == 2:
            sd = 0.02 if "embed" in name or "lm_head" in name else weight.shape[1] ** -0.5
            writes = "o_proj" in name or "down_proj" in name
            sd *= (2 * model.args.num_hidden_layers) ** -0.5 if writes else 1
            scaled.append((name, sd * mx.random.normal(weight.shape)))
    model.load_weights(scaled, strict=False)  # norm gains stay 1, biases as they are


def load_base(name: str | Path, dtype: str | None = None, bits: int | None = None,
              from_scratch: bool = False, group_size: int | None = None) -> tuple[Llama, Tokenizer]:
    """`model.load`, where name may also be a run: its adapter is merged first.

    from_scratch  random weights from MLX's current random state; of the folder only config.json and
            the tokenizer are read
    dtype   goes for the whole chain of runs under name; None: each run's own
    bits    a run's own quantised base stays as it was trained on until its adapter is merged; then
            its layers are quantised to these bits. If it had the same, they stay, and those that
            the adapter was merged into stay plain, or rounding would eat the update
    raises  BadInput, also where there is no tokenizer
    """
    if from_scratch:
        folder, raw = model_folder.read_origin(name)
        model = Llama(model_folder.parse_args(raw, f"{folder}/config.json"))
        init_weights(model)
        tokenizer = load_tokenizer(folder, model.args.vocab_size)
    elif model_folder.root_model(name) == name:
        model, tokenizer = load(name, dtype, bits, group_size)
    else:
        model, tokenizer, _ = load_checkpoint(name, dtype=dtype)
        if bits:
            from engine.quant import packed_settings, quantize  # QLoRA alone needs it
            stored = packed_settings(model)
        merge(model)
        if bits and {b for b, _ in stored} != {bits}:
            quantize(model, bits, group_size)
    if tokenizer is None:
        raise BadInput(f"{name} has no tokenizer.model and no tokenizer.json; add the model's own")
    return model, tokenizer


def load_checkpoint(ckpt: str | Path, adapter: str | Path | None = None,
                    dtype: str | None = None) -> tuple[Llama, Tokenizer, Config | None]:
    """A run folder (adapter or full weights), model folder or Hub name -> (model, tokenizer, cfg).

    adapter  a folder, of ours, mlx-lm's or PEFT's: on top of the checkpoint, whose own adapter is
             then merged
    dtype    None: a run's own
    """
    folder, cfg = Path(ckpt), None
    if is_file(folder / "config.yaml"):
        cfg = model_folder.load_run_config(folder)
        # a whole model's last file (files/model_folder.py)
        if not any((folder / name).exists() for name in ("adapters.safetensors", "config.json")):
            raise BadInput(f"run folder {folder} holds no weights yet; "
                           f"finish it with `python train.py {folder}/config.yaml`")
    own = is_file(folder / "adapter_config.json")
    if own and cfg is None:
        raise BadInput(f"{folder} holds an adapter but no config.yaml, so its base model is "
                       f"unknown; give --ckpt BASE --adapter {folder} (load_adapters does it on a "
                       "model you loaded)")
    base, top = (cfg.model, folder) if own and adapter is None else (ckpt, adapter)
    own_dtype, bits = (cfg.dtype, cfg.bits) if cfg else (None, None)
    model, tokenizer = load_base(base, dtype or own_dtype, bits)
    if top is not None:
        load_adapters(model, top)
    model_folder.check_logits(model, f"{ckpt} + {adapter}" if adapter else ckpt)
    return model, tokenizer, cfg


def main(argv: list[str]) -> None:
    from files.options import export_options  # only this command has such words
    args = export_options(argv)
    check_new(args.out)
    model, _, cfg = load_checkpoint(args.ckpt, args.adapter)
    if not adapter_arrays(model):
        raise BadInput(f"{args.ckpt} has no adapter; it is already a whole model: give an "
                       "adapter with --adapter FOLDER")
    name, base = (args.adapter, args.ckpt) if args.adapter else (args.ckpt, cfg.model)
    if args.format != "hub":
        make_files = peft_files if args.format == "peft" else mlx_files
        files = make_files(adapter_arrays(model), about_adapter(model, base))
        model_folder.write_files(args.out, files)
        print(f"wrote the adapter of {name} to {args.out}; its base is {base}")
        if model_folder.root_model(base) != base:
            print(f"{base} is a run itself, and the base is that run fused: "
                  f"`python lora.py --ckpt {base} --out FOLDER`")
        return
    merge(model)
    from engine.quant import unquantize  # as above
    unquantize(model, model.model.norm.weight.dtype)
    model_folder.write_files(args.out, model_folder.model_files(model, base))
    print(f"fused {name} into {args.out}")

"""A GGUF file, llama.cpp's format, read as a model's folder in the Hub's layout.

One file holds what a folder holds: settings and vocabulary as typed key-value pairs, a table of
tensors, and their bytes. It differs in four things, which are undone here: tensors have other names
(blk.0.attn_q); in a Llama's q and k the two rows that RoPE turns together lie side by side; weights
may be blocks of 32 codes with a 16-bit scale; a vocabulary names its way of splitting text
("smollm") without spelling it out (text/gguf_tokenizer.py).

    python generate.py --ckpt SmolLM2.Q4_1.gguf --prompt "23 + 45 = "

Sources: ggml's docs/gguf.md and ggml-common.h, llama.cpp's convert_hf_to_gguf.py (the order of
rows, scaled RoPE) and llama-vocab.cpp (splitting).
"""
import mmap
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import numpy as np

from config import BadInput
from files.disk import COUNT, LAYERS, POSITIVE, REQUIRED, WIDTH, one_line, read_fields
from text.gguf_tokenizer import read_special_ids, to_json, tokenizer_files

AGAIN = "fetch or convert it again"
# the header's types: numbers by struct's letters, texts, lists of either
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
TEXT, LIST = 8, 9
# the tensors' types by their codes, which have gaps
KINDS = {**dict(enumerate("F32 F16 Q4_0 Q4_1".split())), 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
         **dict(enumerate("Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS "
                          "IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M "
                          "BF16".split(), 6))}
FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
BLOCKS = {"Q4_0": np.dtype([("scale", "<f2"), ("codes", "u1", 16)]),
          "Q4_1": np.dtype([("scale", "<f2"), ("bias", "<f2"), ("codes", "u1", 16)]),
          "Q8_0": np.dtype([("scale", "<f2"), ("codes", "u1", 32)])}
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_BLOCK = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
# config.json's names: the header's behind "llama.", what it must be, and where it is left out
FIELDS = {"hidden_size": ("embedding_length", WIDTH, REQUIRED),
          "intermediate_size": ("feed_forward_length", WIDTH, REQUIRED),
          "num_hidden_layers": ("block_count", LAYERS, REQUIRED),
          "num_attention_heads": ("attention.head_count", WIDTH, REQUIRED),
          "num_key_value_heads": ("attention.head_count_kv", WIDTH, None),
          "head_dim": ("attention.key_length", WIDTH, None),
          "max_position_embeddings": ("context_length", COUNT, 2048),
          "rms_norm_eps": ("attention.layer_norm_rms_epsilon", POSITIVE, REQUIRED),
          "rope_theta": ("rope.freq_base", POSITIVE, 10000.0)}


class Tensor(NamedTuple):
    kind: str                   # F32, Q4_1, ...
    shape: tuple[int, ...]      # (O, I), as the Hub has it
    start: int                  # where its bytes begin
    size: int


class Gguf(NamedTuple):
    path: Path
    about: dict                 # the key-value pairs
    tensors: dict[str, Tensor]
    data: mmap.mmap             # the whole file


# --------------------------------------------------------------------------------------------------
# the header


def read_gguf(path: Path) -> Gguf:
    """A file's header; every tensor lies inside the file. raises  BadInput"""
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if data[:4] != b"GGUF":
            raise BadInput(f"{path} is no GGUF file, it begins with {data[:4]!r}; {AGAIN}")
        version, tensor_count, pair_count = struct.unpack_from("<IQQ", data, 4)
        if version not in (2, 3):   # that of a big-endian file is huge
            raise BadInput(f"{path}: GGUF version {version} is not supported; expected 2 or 3, "
                           "little-endian: convert the model again with a recent llama.cpp")
        about, tensors, at = {}, {}, 24
        for _ in range(pair_count):
            key, at = read_value(data, at, TEXT)
            code, = struct.unpack_from("<I", data, at)
            about[key], at = read_value(data, at + 4, code)
        for _ in range(tensor_count):
            name, at = read_value(data, at, TEXT)
            dims, = struct.unpack_from("<I", data, at)
            *shape, code, start = struct.unpack_from(f"<{dims}QIQ", data, at + 4)
            at += 4 + struct.calcsize(f"<{dims}QIQ")
            kind = KINDS.get(code, f"number {code}")
            numbers, size = block_size(kind, f"{path}: tensor {one_line(name)}")
            if not shape or min(shape) < 1 or shape[0] % numbers:
                raise ValueError(f"tensor {name} of shape {shape}")
            tensors[name] = Tensor(kind, tuple(reversed(shape)), start,
                                   prod(shape) // numbers * size)
        align = about.get("general.alignment", 32)
        if type(align) is not int or align < 1:
            raise ValueError(f"general.alignment {align}")
        first = -(-at // align) * align
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); {AGAIN}") from None
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise BadInput(f"{path} is truncated or corrupt in its header ({one_line(error)}); "
                       f"{AGAIN}") from None
    tensors = {name: t._replace(start=first + t.start) for name, t in tensors.items()}
    end = max((t.start + t.size for t in tensors.values()), default=0)
    if end > len(data):
        raise BadInput(f"{path} is truncated: it has {len(data):,} bytes, and its tensors need "
                       f"{end:,}; {AGAIN}")
    if about.get("split.count", 1) not in (0, 1):
        raise BadInput(f"{path} is one of {about['split.count']} parts; join them with llama.cpp's "
                       "llama-gguf-split --merge")
    return Gguf(Path(path), about, tensors, data)


def read_value(data: mmap.mmap, at: int, code: int) -> tuple[object, int]:
    """A value of the header, and where the next one begins; ValueError where it does not fit."""
    if code == TEXT:
        start, length = at + 8, struct.unpack_from("<Q", data, at)[0]
        if start + length > len(data):
            raise ValueError(f"a text of {length} bytes at {at}")
        return data[start:start + length].decode(), start + length
    if code in NUMBERS:
        number = struct.Struct("<" + NUMBERS[code])
        return number.unpack_from(data, at)[0], at + number.size
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if code == LIST and inner in NUMBERS:
        values = np.frombuffer(data, "<" + NUMBERS[inner], count, at)
        return values.tolist(), at + values.nbytes
    if code != LIST or inner != TEXT:
        raise ValueError(f"a value of type {code} at {at}")
    values = []
    for _ in range(count):
        value, at = read_value(data, at, TEXT)
        values.append(value)
    return values, at


def block_size(kind: str, where: str) -> tuple[int, int]:
    """Numbers and bytes of a block of a tensor's type; BadInput where nothing here reads it."""
    if kind in FLOATS:
        return 1, FLOATS[kind].size
    if kind in BLOCKS:
        return 32, BLOCKS[kind].itemsize
    try:
        # an extra, which most files do without
        import gguf
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    except ImportError:
        raise BadInput(f"{where} is of type {kind}, which the package gguf reads: run "
                       f"`.venv/bin/pip install gguf`, or take a file of the types "
                       f"{', '.join((*FLOATS, *BLOCKS))}") from None
    except KeyError:
        raise unsupported(kind, where) from None


def unsupported(kind: str, where: str) -> BadInput:
    return BadInput(f"{where} is of type {kind}, which is not supported; take a file of another "
                    "type, such as Q8_0 or Q4_K_M")


# --------------------------------------------------------------------------------------------------
# tensors


def read_tensors(file: Gguf, dtype: mx.Dtype | None = None, bits: int | None = None,
                 group_size: int | None = None) -> dict[str, mx.array]:
    """A file's weights by the Hub's names. Codes are unpacked when MLX evaluates them.

    dtype   None: the file's own, for codes bfloat16
    bits, group_size   of a model that is to be quantised: if all matrices of the blocks are codes
            like that, they stay so, as MLX packs them
    """
    config, found = read_config(file), {}
    kinds = {(BITS.get(kind), 32) for kind in matrix_kinds(file)}
    packed = bits is not None and kinds == {(bits, group_size or 32)}
    # the scales are float16, and half precisions do not mix
    dtype = dtype or (mx.float16 if packed else own_dtype(file))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, t in file.tensors.items():
        if name == "rope_freqs.weight":     # told by the config
            continue
        layer, part = hub_name(file, name)
        raw = np.frombuffer(file.data, np.uint8, t.size, t.start).reshape(*t.shape[:-1], -1)
        if packed and t.kind in BLOCKS and name.startswith("blk."):
            arrays = read_codes(raw, t.kind)
        else:
            arrays = {part: read_floats(raw, t.kind, f"{file.path}: tensor {name}")}
        for part, x in arrays.items():
            H = heads.get(name.split(".")[-2])
            if H and x.shape[0] != H * config["head_dim"]:
                raise BadInput(f"{file.path}: tensor {name} has {x.shape[0]} rows; expected {H} "
                               f"heads of {config['head_dim']}")
            if H and config["model_type"] == "llama":
                # row i, j of a head's (d/2, 2) is the Hub's j, i of (2, d/2)
                x = x.reshape(H, -1, 2, prod(x.shape[1:])).swapaxes(1, 2).reshape(x.shape)
            found[f"{layer}.{part}"] = x if x.dtype == mx.uint32 else x.astype(dtype)
        if t.kind not in BLOCKS:    # lazily, the float32 numbers of all tensors would be held
            mx.eval(found[f"{layer}.{part}"])
    return found


def matrix_kinds(file: Gguf) -> set[str]:
    """The types of the blocks' matrices; norms are float32 in any file."""
    return {t.kind for name, t in file.tensors.items() if name.startswith("blk.") and t.shape[1:]}


def own_dtype(file: Gguf) -> mx.Dtype:
    return FLOATS.get("".join(matrix_kinds(file)), mx.bfloat16)     # also of several types


def hub_name(file: Gguf, name: str) -> tuple[str, str]:
    """example  blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj, weight"""
    match name.split("."):
        case [layer, ("weight" | "bias") as part] if layer in TOP:
            return TOP[layer], part
        case ["blk", block, layer, ("weight" | "bias") as part] if layer in IN_BLOCK:
            return f"model.layers.{block}.{IN_BLOCK[layer]}", part
    raise BadInput(f"{file.path}: tensor {one_line(name)} is none of a plain Llama's or Qwen2's "
                   "(a mixture of experts, an adapter?); take another model")


def read_codes(raw: np.ndarray, kind: str) -> dict[str, mx.array]:
    """Blocks (O, bytes) as MLX packs them: weight (O, I * bits / 32), scales, biases (O, I / 32).

    W = scale * code + bias: Q4_0 means scale * (code - 8), and Q8_0's codes are signed
    """
    blocks = raw.view(BLOCKS[kind])                                             # (O, I / 32)
    scales, codes = blocks["scale"], blocks["codes"]
    if kind == "Q8_0":
        codes, biases = codes ^ 128, -128 * scales
    else:
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1)       # (O, I / 32, 32), in order
        codes = codes[..., 0::2] | codes[..., 1::2] << 4                # two in a byte
        biases = blocks["bias"] if kind == "Q4_1" else -8 * scales
    codes = codes.reshape(len(raw), -1).view(np.uint32)
    return {"weight": mx.array(codes), "scales": mx.array(scales), "biases": mx.array(biases)}


def read_floats(raw: np.ndarray, kind: str, where: str) -> mx.array:
    """A tensor's numbers in the file's own type, of codes in float32: (..., bytes) -> (..., I)."""
    if kind in FLOATS:
        return mx.array(raw).view(FLOATS[kind])
    if kind in BLOCKS:
        codes, scales, biases = read_codes(raw, kind).values()
        return mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), 32,
                             BITS[kind])
    # as above
    import gguf
    try:
        return mx.array(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    except NotImplementedError:
        raise unsupported(kind, where) from None


# --------------------------------------------------------------------------------------------------
# config.json


def read_config(file: Gguf) -> dict:
    """The header's settings as config.json has them; raises BadInput on other architectures."""
    family = file.about.get("general.architecture")
    if family not in ("llama", "qwen2"):
        raise BadInput(f"{file.path}: architecture {family!r} is not supported; expected llama or "
                       "qwen2")
    rotated = f"{family}.rope.dimension_count"
    fields = {f"{family}.{key}": (kind, default) for key, kind, default in FIELDS.values()}
    values = read_fields(file.about, {**fields, rotated: (COUNT, None)}, str(file.path))
    config = {name: values[f"{family}.{key}"] for name, (key, *_) in FIELDS.items()}
    H, embedding = config["num_attention_heads"], file.tensors.get("token_embd.weight")
    config["num_key_value_heads"] = config["num_key_value_heads"] or H
    config["head_dim"] = config["head_dim"] or config["hidden_size"] // H
    if values[rotated] not in (None, config["head_dim"]):
        raise BadInput(f"{file.path}: {rotated} = {values[rotated]}; expected RoPE on a whole head "
                       f"of {config['head_dim']}")
    ids = read_special_ids(file.about, file.path)
    return {**config, "model_type": family, "hidden_act": "silu",
            "bos_token_id": ids.get("bos"), "eos_token_id": ids.get("eos"),
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]],
            "vocab_size": embedding and embedding.shape[0],
            "dtype": str(own_dtype(file)).removeprefix("mlx.core."),
            "rope_scaling": read_rope(file, family, config),
            "attention_bias": family == "llama" and "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
            "tie_word_embeddings": "output.weight" not in file.tensors}


def read_rope(file: Gguf, family: str, config: dict) -> dict | None:
    """RoPE's scaling. Llama 3's stands in the file as each pair's divisor: asked is which it is."""
    if t := file.tensors.get("rope_freqs.weight"):
        raw = np.frombuffer(file.data, np.uint8, t.size, t.start)
        divisors = np.array(read_floats(raw, t.kind, "rope_freqs").astype(mx.float32))
        scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        d = config["head_dim"]
        turns = 8192 * config["rope_theta"] ** (-np.arange(0, d, 2) / d) / (2 * np.pi)
        blend = np.clip((turns - 1) / (4 - 1), 0, 1)
        expected = 1 / ((1 - blend) / divisors.max() + blend)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise BadInput(f"{file.path}: rope_freqs.weight is not Llama 3's scaling of RoPE "
                           "(low 1, high 4, context 8192), the only one read; take another model")
        return scaling
    # a missing type means linear, and a missing factor none
    kind = file.about.get(f"{family}.rope.scaling.type", "linear")
    factor = file.about.get(f"{family}.rope.scaling.factor",
                            file.about.get(f"{family}.rope.scale_linear", 0))
    if kind == "none" or kind == "linear" and factor in (0, 1):
        return None
    return {"rope_type": kind, "factor": factor}


# --------------------------------------------------------------------------------------------------
# the rest of a folder


def folder_files(file: Gguf) -> dict[str, bytes]:
    """All that a Hub folder has beside the weights, config.json last: {file name: content}."""
    return {**tokenizer_files(file.about, file.path), "config.json": to_json(read_config(file))}

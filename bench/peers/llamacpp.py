"""llama.cpp by its Python binding, float32, timed: a chat's greedy tokens, one row, no text made.

    PYTHON bench/peers/llamacpp.py chat MODEL COUNT 1 PROMPT_TOKENS COMPLETION_TOKENS

It reads GGUF alone: a process of its own first writes the folder as one, without its vocabulary.
Prints one line of JSON: the median seconds, peak GiB.
"""
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from clock import clock, random_prompts, report

NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
         "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
COUNTS = {"num_hidden_layers": "block_count", "hidden_size": "embedding_length",
          "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
          "num_key_value_heads": "attention.head_count_kv", "vocab_size": "vocab_size",
          "max_position_embeddings": "context_length"}
FLOATS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}


def write_gguf(folder: str, path: str) -> None:
    import mlx.core as mx  # in this process alone: timing has no use for it
    raw, arrays = json.loads(Path(folder, "config.json").read_text()), {}
    others = ("rope_scaling", "attention_bias", "mlp_bias")
    if any(map(raw.get, others)) or raw["model_type"] != "llama":
        sys.exit("only a Llama of plain RoPE without biases is written")
    about = {"general.architecture": "llama", "tokenizer.ggml.model": "none"}
    for keys, kind in ((COUNTS, mx.uint32), (FLOATS, mx.float32)):
        about |= {f"llama.{theirs}": mx.array(raw[key], kind) for key, theirs in keys.items()}
    for file in Path(folder).glob("*.safetensors"):
        for key, weight in mx.load(str(file)).items():
            *outer, name, _ = key.split(".")
            if name in HEADS:   # the two rows that RoPE turns together lie side by side there
                pairs = weight.reshape(raw[HEADS[name]], 2, -1, weight.shape[1]).swapaxes(1, 2)
                weight = pairs.reshape(weight.shape)
            block = "".join(f"blk.{word}." for word in outer if word.isdigit())
            arrays[f"{block}{NAMES[name]}.weight"] = weight.astype(mx.float32)
    mx.save_gguf(path, arrays, about)


def time_chat(folder: str, count: int, T: int, C: int) -> list[float]:
    from llama_cpp import Llama  # the process that writes has no use for it
    with tempfile.TemporaryDirectory() as scratch:
        path = f"{scratch}/model.gguf"
        subprocess.run([sys.executable, __file__, "write", folder, path], check=True)
        # keys and values in float32 too (type 0); all blocks on a GPU where there is one
        model = Llama(path, n_ctx=T + C, n_threads=os.cpu_count(), n_gpu_layers=-1, type_k=0,
                      type_v=0, verbose=False)
    prompt, = random_prompts(folder, 1, T)

    def chat():
        model.reset()
        return list(islice(model.generate(prompt, temp=0), C))
    return clock(chat, count)


if sys.argv[1] == "write":
    write_gguf(*sys.argv[2:])
else:
    _, folder, count, _, *sizes = sys.argv[1:]
    report(time_chat(folder, int(count), *map(int, sizes)))

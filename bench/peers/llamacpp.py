"""llama.cpp by its Python binding, float32, timed: a chat's greedy tokens, one row.

    PYTHON bench/peers/llamacpp.py chat MODEL COUNT 1 PROMPT_TOKENS COMPLETION_TOKENS

It reads GGUF alone, so the folder is written as one first: in float32, ids without a vocabulary.
No text is made. Prints one line of JSON: the median seconds, peak GiB.
"""
import json
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path

import gguf
from clock import clock, random_prompts, report
from llama_cpp import Llama
from safetensors.torch import load_file

NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
         "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def write_gguf(folder: Path, path: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": raw["num_attention_heads"], "k_proj": raw["num_key_value_heads"]}
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(raw["num_hidden_layers"])
    out.add_context_length(raw["max_position_embeddings"])
    out.add_embedding_length(raw["hidden_size"])
    out.add_feed_forward_length(raw["intermediate_size"])
    out.add_head_count(heads["q_proj"])
    out.add_head_count_kv(heads["k_proj"])
    out.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    out.add_rope_freq_base(raw["rope_theta"])
    out.add_vocab_size(raw["vocab_size"])
    out.add_tokenizer_model("none")
    for file in sorted(folder.glob("*.safetensors")):
        for key, weight in load_file(file).items():
            *path_of_block, name, _ = key.split(".")
            if name in heads:   # the two rows that RoPE turns together lie side by side there
                pairs = weight.reshape(heads[name], 2, -1, weight.shape[1]).transpose(1, 2)
                weight = pairs.reshape(weight.shape)
            block = "".join(f"blk.{word}." for word in path_of_block if word.isdigit())
            out.add_tensor(f"{block}{NAMES[name]}.weight", weight.float().contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


_, folder, count, _, T, C = sys.argv[1:]
with tempfile.TemporaryDirectory() as scratch:
    write_gguf(Path(folder), Path(scratch, "model.gguf"))
    model = Llama(f"{scratch}/model.gguf", n_ctx=int(T) + int(C), n_threads=os.cpu_count(),
                  verbose=False)
prompt, = random_prompts(folder, 1, int(T))


def chat():
    model.reset()
    return list(islice(model.generate(prompt, temp=0), int(C)))


report(clock(chat, int(count)))

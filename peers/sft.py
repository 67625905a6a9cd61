"""transformers + peft: a LoRA SFT step, rank 16 on q, k, v, o, float32. Run by fullsize.py.

    python peers/sft.py MODEL ROWS TOKENS ANSWER_TOKENS STEPS
"""
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

folder, rows, tokens, answer, steps = sys.argv[1], *map(int, sys.argv[2:6])
model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(
    r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
ids = torch.randint(3, model.config.vocab_size, (rows, tokens))
labels = ids.clone()
labels[:, :tokens - answer] = -100
seconds = []
for _ in range(steps + 1):
    start = time.perf_counter()
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 20
print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak_gib": peak}))

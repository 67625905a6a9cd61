"""One GRPO step by TRL and peft on a CPU, timed: what a user would otherwise run.

    PYTHON peers/trl_grpo.py MODEL PROMPTS GROUP PROMPT_TOKENS COMPLETION_TOKENS STEPS

PYTHON needs torch, transformers, peft, trl and datasets. LoRA of rank 16 on q, k, v, o, KL weight
0.04, random rewards, float32. Prints one line of JSON: the median seconds of a step, peak GiB.
"""
import json
import random
import resource
import statistics
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

path, (P, G, T, C, steps) = sys.argv[1], map(int, sys.argv[2:7])
seconds, rng = [], random.Random(0)


class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds.append(time.perf_counter() - self.start)


prompts = [{"prompt": " ".join(f"w{rng.randrange(1000)}" for _ in range(T))} for _ in range(256)]
with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=P * G, num_generations=G,
        max_completion_length=C, max_steps=steps + 1, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", learning_rate=1e-5, beta=0.04, gradient_checkpointing=False,
        dataloader_pin_memory=False)
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), args=config,
        reward_funcs=lambda completions, **_: [rng.random() for _ in completions],
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=[f"{x}_proj" for x in "qkvo"]),
        callbacks=[Clock()]).train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak_gib": round(peak, 2)}))

"""One GRPO step by TRL and peft, timed: what a user would otherwise run.

    PYTHON bench/peers/trl_grpo.py MODEL PROMPTS GROUP PROMPT_TOKENS COMPLETION_TOKENS COUNT

PYTHON needs torch, transformers, peft, trl and datasets. LoRA of rank 16 on q, k, v, o, KL weight
0.04, random rewards, float32, gradients clipped at TRL's own 1.0. The tokenizer is made here, one
word a token, so that a prompt has exactly PROMPT_TOKENS of them. A step is what lies between TRL's
two callbacks: rollouts, rewards, reference, update. Prints one line of JSON: the median seconds of
a step, peak GiB.
"""
import random
import sys
import tempfile
import time

import torch
from clock import report, torch_device
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

path, (P, G, T, C, count) = sys.argv[1], map(int, sys.argv[2:7])
warm_up, seconds, rng = min(2, count), [], random.Random(0)
on_cpu = torch_device(torch) == "cpu"


class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if not on_cpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - self.start)


def word_tokenizer(V: int) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(V - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", pad_token="</s>")


model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
words = min(1000, model.config.vocab_size - 3)
prompts = [{"prompt": " ".join(f"w{rng.randrange(words)}" for _ in range(T))} for _ in range(256)]
with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=P * G, num_generations=G,
        max_completion_length=C, max_steps=warm_up + count, use_cpu=on_cpu, bf16=False,
        report_to=[], save_strategy="no", learning_rate=1e-5, beta=0.04,
        gradient_checkpointing=False, dataloader_pin_memory=False)
    GRPOTrainer(
        model=model, args=config,
        reward_funcs=lambda completions, **_: [rng.random() for _ in completions],
        train_dataset=Dataset.from_list(prompts),
        processing_class=word_tokenizer(model.config.vocab_size),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=[f"{x}_proj" for x in "qkvo"]),
        callbacks=[Clock()]).train()
report(seconds[warm_up:])

"""transformers and peft, float32, timed: load, greedy generation, a LoRA step of rank 16.

    PYTHON bench/peers/hf.py load MODEL COUNT
    PYTHON bench/peers/hf.py generate|chat MODEL COUNT ROWS PROMPT_TOKENS COMPLETION_TOKENS
    PYTHON bench/peers/hf.py sft MODEL COUNT ROWS TOKENS ANSWER_TOKENS

Loading reads every weight at the end: a file that is only mapped would otherwise be read in the
first step. No row stops early. A step is forward, backward, clipping, AdamW, on rows that are there
as ids. Prints one line of JSON: the median seconds, peak GiB.
"""
import sys

import torch
from clock import clock, random_prompts, report, torch_device
from transformers import AutoModelForCausalLM, AutoTokenizer

work, folder, (count, *sizes) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
device = torch_device(torch)


def load():
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def load_and_read():
    AutoTokenizer.from_pretrained(folder)
    sum(p.sum() for p in load().parameters()).item()


def generation(N, T, C):
    model = load().eval()
    tokens = torch.tensor(random_prompts(folder, N, T), device=device)

    def generate():
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=C,
                           min_new_tokens=C, do_sample=False, pad_token_id=0)
    return generate


def training(rows, tokens, answer):
    from peft import LoraConfig, get_peft_model  # load and generate do without it
    model = get_peft_model(load(), LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-5)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), device=device)
    labels = ids.clone()
    labels[:, :tokens - answer] = -100

    def step():
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return step


works = {"generate": generation, "chat": generation, "sft": training}
report(clock(works[work](*sizes) if sizes else load_and_read, count))

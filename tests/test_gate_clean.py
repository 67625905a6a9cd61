"""A clean load passes; every way of touching a prompt is caught; the record says what was used."""
import json

import pytest
import tokenizers
from conftest import GOLDEN, lora_model
from tokenizers import decoders, models, pre_tokenizers, processors

from checkpoint import checkpoint_files
from config import Config, resolved
from files.disk import write_text
from files.keys import BadInput, write_keys
from files.model_folder import write_files
from gate.clean import (
    INJECTION,
    SENTINELS,
    check_base,
    check_identity,
    check_prompts,
    library_encoder,
)
from text.tokenizer import load_tokenizer


def test_bundled_base_is_clean(tokenizer):
    seen, encode = check_prompts(tokenizer), library_encoder(tokenizer.source)
    assert [row["text"] for row in seen] == [*SENTINELS, INJECTION]
    for row in seen:
        assert row["ids"] == [tokenizer.bos_id, *encode(row["text"])]
        assert row["decoded"] == row["text"]


@pytest.mark.parametrize("family", ["llama3_2", "qwen2_5", "tinyllama"])
def test_other_families_are_clean(family, byte_tokenizer):
    """With BOS, and without one: a guard that asked for no special token would fail Llama."""
    check_prompts(byte_tokenizer(family))


SPOILERS = {
    "system text": lambda t, s: t.encode_prompt("You are a helpful assistant.\n" + s),
    "a chat format": lambda t, s: t.encode_prompt(f"User: {s}\nAssistant:"),
    "one more space": lambda t, s: t.encode_prompt(s + " x")[:-1] + t.encode(" "),
    "BOS twice": lambda t, s: [t.bos_id, *t.encode_prompt(s)],
    "no BOS": lambda t, s: t.encode(s),
    "a control id": lambda t, s: [*t.encode_prompt(s), t.eos_id],
    "cut": lambda t, s: t.encode_prompt(s)[:-1],
}


@pytest.mark.parametrize("how", SPOILERS)
def test_contaminated_loads_fail(how, tokenizer):
    with pytest.raises(BadInput, match="does not reach the base model untouched"):
        check_prompts(tokenizer, lambda text: SPOILERS[how](tokenizer, text))


def test_identity(tokenizer, tmp_path):
    """Instruct models by name, runs, and stop tokens that only chat training gives."""
    for name in ("Qwen/Qwen2.5-32B-Instruct", "TinyLlama/TinyLlama-1.1B-Chat-v1.0@main",
                 "google/gemma-2-2b-it"):
        with pytest.raises(BadInput, match="calls itself"):
            check_identity(name, tokenizer)
    check_identity("chat_models/Qwen2.5-32B", tokenizer)    # the folder above is not the model
    run = tmp_path / "run"
    write_files(run, checkpoint_files(lora_model(), Config(lora_rank=4)))
    write_text(run / "config.yaml", write_keys(resolved(Config(lora_rank=4))))
    with pytest.raises(BadInput, match="run of this repository.*models/tiny"):
        check_identity(run, tokenizer)


def test_check_base_records(tokenizer):
    record = check_base("models/tiny")
    assert record["clean"] and not record["has_chat_template"]
    assert record["prompts"] == check_prompts(tokenizer)
    json.dumps(record)


@pytest.fixture
def byte_tokenizer(tmp_path):
    """A byte-level tokenizer.json as Llama-3's and Qwen2.5's, with their control tokens."""
    def make(family):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        has_bos = family != "qwen2_5"
        names = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
        backend.add_special_tokens(names)
        if has_bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<|begin_of_text|> $A", pair=None,
                special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))])
        folder = tmp_path / family
        folder.mkdir()
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
        assert (GOLDEN / family).exists()
        return load_tokenizer(folder)
    return make


def test_instruct_stop_token_is_no_base(byte_tokenizer):
    plain = byte_tokenizer("qwen2_5")
    check_identity("Qwen/Qwen2.5-0.5B", plain)
    plain.eos_ids.add(plain.named_id("<|im_end|>"))
    with pytest.raises(BadInput, match="ends its turns with <.im_end.>"):
        check_identity("Qwen/Qwen2.5-0.5B", plain)

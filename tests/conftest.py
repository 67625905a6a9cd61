"""Shared by all tests: where things are, TF32 off, and small models made on the spot.

Nothing here needs a network, but `smollm2` once.
"""
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

# before the first op: on recent GPUs float32 products are otherwise rounded to 10 bits
os.environ["MLX_ENABLE_TF32"] = "0"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import engine.blas  # noqa: E402, F401, I001  (before mlx)
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tokenizers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from config import Config  # noqa: E402
from files.adapters import adapter_arrays  # noqa: E402
from files.model_folder import parse_args  # noqa: E402
from grpo import rollout_loss  # noqa: E402
from lora import apply_lora  # noqa: E402
from losses import dual_loss, sft_loss  # noqa: E402
from markovian import answer_rewards  # noqa: E402
from model import Llama  # noqa: E402
from tasks.__main__ import write_task  # noqa: E402
from text.tokenizer import load_tokenizer  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
FAMILIES = ("tinyllama", "llama3_2", "llama3_1", "qwen2_5")
TINY = ROOT / "models" / "tiny"
TINY_COT = ROOT / "models" / "tiny_cot"
# published data as their repositories hold them: 20 rows of each file, and where they lie, all
PUBLISHED = {"sample": ROOT / "tests" / "fixtures" / "published",
             "whole": Path(os.environ.get("PUBLISHED_DATA", ROOT.parent / "shared" / "data"))}


def run(*argv, cwd=ROOT, check=None, stdin="", **env):
    """Run a script of the project as a user does; returns the finished process.

    `check` is the expected exit code, `stdin` what is piped in.
    """
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=300, input=stdin)
    if check is not None:
        wrong = f"exit code {done.returncode}, expected {check}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == check, wrong
    return done


def kill_and_continue(config_path, folder):
    """Train, kill -9 as soon as a state is saved, and give the same command again."""
    process = subprocess.Popen([sys.executable, "train.py", config_path], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "state.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "report.json").exists()
    run("train.py", config_path, check=0)


def assert_one_clear_line(done, *words):
    """Exit code 2, no traceback, one line on stderr.

    That line starts with 'error:' and holds all the words.
    """
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]!r}"


@pytest.fixture(autouse=True)
def order_as_before(monkeypatch):
    """A large model takes the operations' order from its process; not from the next test."""
    if engine.blas.ORDER in os.environ:
        monkeypatch.setenv(engine.blas.ORDER, os.environ[engine.blas.ORDER])


CHAT = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")


@pytest.fixture(params=[name for name, folder in PUBLISHED.items() if folder.is_dir()])
def published(request):
    return PUBLISHED[request.param]


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TINY)


def small_config(blocks=2, source=TINY) -> dict:
    """A bundled model's config.json at width 32."""
    return json.loads((source / "config.json").read_text()) | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": blocks,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def small_model(seed=0, blocks=2, source=TINY) -> Llama:
    """A random Llama of width 32 with a bundled tokenizer's vocabulary."""
    return random_model(small_config(blocks, source), seed)


def random_model(raw, seed=0) -> Llama:
    mx.random.seed(seed)
    model = Llama(parse_args(raw, "test"))
    mx.eval(model.parameters())
    return model


def lora_model(touched=True, source=TINY) -> Llama:
    """The small model with adapters; touched: B away from 0, as after some training."""
    model = small_model(source=source)
    apply_lora(model, 4, 8.0, ("q", "k", "v", "o"))
    if touched:
        mx.random.seed(1)
        model.load_weights([(k, mx.random.normal(v.shape) * 0.3) for k, v in
                            tree_flatten(model.trainable_parameters()) if "lora_b" in k],
                           strict=False)
    return model


def adapted(model, targets=("q", "v", "o"), rank=4, alpha=8.0, seed=1):
    """An adapter with a B that is not zero, as after training."""
    mx.random.seed(seed)
    apply_lora(model, rank, alpha, targets)
    arrays = [(k, 0.1 * mx.random.normal(v.shape)) for k, v in adapter_arrays(model).items()]
    model.load_weights(arrays, strict=False)
    return model


def loss_of(cfg, block=0):
    """loss(model, batch) -> (scalar, sums, maxima) of cfg.method, as train.make_method makes it."""
    if cfg.method == "markovian":
        return partial(rollout_loss, cfg, answer_rewards)
    if cfg.method == "grpo":
        return partial(rollout_loss, cfg, None)
    if cfg.method == "sft":
        return partial(sft_loss, cfg)
    return partial(dual_loss, dataclasses.replace(cfg, class_layer=block))


def grads_of(model, cfg, micro_batches):
    """Summed over micro-batches, as train.accumulate does; (loss, parts, {name: gradient})."""
    total, losses, parts = {}, 0, {}
    for batch in micro_batches:
        (loss, sums, maxima), grads = nn.value_and_grad(model, loss_of(cfg))(model, batch)
        losses += loss.item()
        for name, value in sums.items():
            parts[name] = parts.get(name, 0) + value.item()
        for name, value in maxima.items():
            parts[name] = max(parts.get(name, 0), value.item())
        for name, grad in tree_flatten(grads):
            total[name] = total.get(name, 0) + np.array(grad)
    return losses, parts, total


def check_finite_differences(model, value, grads):
    """value() of the model along three random directions against the gradients: within 1 %."""
    rng, start = np.random.default_rng(0), dict(tree_flatten(model.trainable_parameters()))
    for _ in range(3):
        direction = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
        values = []
        for sign in (1, -1):
            model.load_weights([(k, start[k] + sign * 1e-3 * mx.array(d))
                                for k, d in direction.items()], strict=False)
            values.append(value())
        model.load_weights(list(start.items()), strict=False)
        numeric = (values[0] - values[1]) / 2e-3
        analytic = sum((grads[k] * d).sum() for k, d in direction.items())
        assert abs(numeric) > 1e-3 and abs(numeric - analytic) < 0.01 * abs(numeric)


def write_model(folder, raw, tokenizer_from):
    """A random model in the Hub's layout, with the tokenizer files of another folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                 "generation_config.json", "chat_template.jinja"):
        if (tokenizer_from / name).exists():
            (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    mx.save_safetensors(str(folder / "model.safetensors"),
                        dict(tree_flatten(random_model(raw).parameters())))
    return folder


@pytest.fixture
def model():
    return small_model()


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """The same small model as a folder in the Hub's layout.

    With it, whole commands run in a second or two.
    """
    return write_model(tmp_path_factory.mktemp("models") / "small", small_config(), TINY)


@pytest.fixture
def write_config(tmp_path, small_folder):
    """Write a config file that trains the small model for a few steps.

    Returns its path and its run folder.
    """
    def write(name="c", **keys):
        keys = {"model": small_folder, "run_dir": tmp_path / "runs" / name,
                "steps": 6, "batch_size": 8, "data_samples": 200, "lora_rank": 4,
                "eval_every_steps": 3, "eval_prompts": 8,
                "lens_every_steps": 3, "save_every_steps": 2, **keys}
        path = tmp_path / f"{name}.yaml"
        path.write_text("".join(f"{k}: {v}\n" for k, v in keys.items()))
        return path, Path(keys["run_dir"])
    return write


@pytest.fixture(scope="session")
def sums_data(tmp_path_factory):
    """A data folder of sums of three numbers, and 24 to judge: for methods that reason."""
    folder = tmp_path_factory.mktemp("data") / "sums"
    write_task("sums", folder, samples=200, test=24, terms=3)
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """models/smollm2, the real Llama, fetched once a machine; of two processes, one fetches."""
    folder = ROOT / "models" / "smollm2"
    # not beside it: test_hostile.py watches the project's files
    with open(Path(tempfile.gettempdir()) / "nanolens_smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("-m", "files.convert", "smollm2", folder)
    if done.returncode:
        # CI has a network; elsewhere a machine may have none
        (pytest.fail if os.environ.get("CI") else pytest.skip)(done.stderr)
    return folder


def config(**keys) -> Config:
    return Config(**keys)


LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """A small byte-level BPE with Llama 3's splitting and post-processor.

    tokenizer.json is as the Hub ships it.
    """
    folder = tmp_path_factory.mktemp("llama3")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    texts = ["multiply subtract", *(f"{n} * {n} = {n}" for n in range(300))] * 3
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


@pytest.fixture(scope="session")
def word_bpe(llama3, tmp_path_factory):
    """What SmolLM2's vocabulary does to words and code, small: GPT-2's splitting, one digit each.

    Words are tokens with and without a space, "subtract" only with one, and a line break with
    the indentation behind it is one token.
    """
    folder = tmp_path_factory.mktemp("word_bpe")
    bpe = tokenizers.Tokenizer.from_file(str(llama3 / "tokenizer.json"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words = ("add", "multiply", "divide", "Paris", "London")
    texts = [f"{word} {word} x subtract + - * / =\n    return x" for word in words] * 3
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        (folder / name).write_bytes((llama3 / name).read_bytes())
    return folder

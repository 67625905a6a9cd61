"""A model's hashes follow its files; a record names what it was made with."""
import hashlib
import shutil

from conftest import TINY, lora_model

from checkpoint import checkpoint_files
from config import Config, resolved
from files.disk import write_text
from files.keys import write_keys
from files.model_folder import write_files
from files.run_folder import hash_model, provenance


def test_hashes_follow_the_files(tmp_path):
    """Weights, tokenizer and a run's adapter each change their own hash, and nothing else does."""
    copy = tmp_path / "tiny"
    shutil.copytree(TINY, copy)
    assert hash_model(str(copy)) == hash_model(str(TINY))
    text = repr([("model.safetensors", hashlib.sha256(
        (TINY / "model.safetensors").read_bytes()).hexdigest())])
    assert hash_model(str(TINY))["weights"] == hashlib.sha256(text.encode()).hexdigest()
    run = tmp_path / "run"
    cfg = Config(model=str(copy), lora_rank=4)
    write_files(run, checkpoint_files(lora_model(), cfg))
    write_text(run / "config.yaml", write_keys(resolved(cfg)))
    before = hash_model(str(run))
    assert before["weights"] != hash_model(str(copy))["weights"]
    assert before["tokenizer"] == hash_model(str(copy))["tokenizer"]
    (copy / "tokenizer_config.json").write_text("{}")
    assert hash_model(str(run))["tokenizer"] != before["tokenizer"]
    write_files(run, checkpoint_files(lora_model(touched=False), cfg))
    assert hash_model(str(run))["weights"] != before["weights"]


def test_provenance_names_versions():
    about = provenance()
    assert about["mlx"] and about["numpy"] and about["commit"]
    assert about["commit_changed"] in (True, False, None)

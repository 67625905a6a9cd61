"""A run folder survives kill -9, a full disk and a second process; best/ is the best, and exact.

The kills themselves are kill_drill.py's: here two a method, `make kill` does a hundred.
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, assert_one_clear_line, config, lora_model, run
from kill_drill import METHODS, differences, run_killed, run_whole, tensors, write_data
from mlx.utils import tree_map

import checkpoint
import train as training
from config import load_config
from files import model_folder, run_folder
from files.keys import BadInput, Stopped
from grpo import Answers, Rollouts
from train import train

GRPO = {"method": "grpo", "batch_size": 16, "grpo_group_size": 4, "max_completion_tokens": 4,
        "lr": "1e-2", "grpo_epochs": 4, "grpo_kl_stop": 0, "eval_every_steps": 0,
        "lens_every_steps": 0}


def start(path, *words):
    return subprocess.Popen([sys.executable, "train.py", str(path), *words], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def about(folder):
    """What a run's state says beside its arrays."""
    return json.loads(tensors(folder / "state.safetensors")[1]["about"])


def odd_reward(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text("def reward(problem, completion):\n    return completion.ids[0] % 2\n")
    return f"{path}:reward"


# --- kill -9


@pytest.mark.parametrize("method", METHODS)
def test_killed_runs_end_bit_identical(tmp_path, method):
    """One killed at some moment, one in a save."""
    write_data(tmp_path / "data")
    (tmp_path / method).mkdir()
    keys = {"steps": 8, "lens_every_steps": 0}
    whole = run_whole(tmp_path, method, **keys)
    assert whole.saves > 5
    for name in ("timed", "in_save"):
        done = run_killed(tmp_path, method, name, whole, random.Random(f"{method} {name}"),
                          in_save=name == "in_save", again=0, **keys)
        assert done.kills == 1 and not done.wrong


def test_a_run_killed_as_it_began(write_config):
    """Before its config was written: neither the lock nor a leftover makes it a stranger's."""
    path, folder = write_config(steps=2)
    folder.mkdir(parents=True)
    for name in (".lock", ".config.yaml.tmp"):
        (folder / name).write_text("1")
    train(load_config(path))
    assert not (folder / ".config.yaml.tmp").exists()
    (folder / ".state.safetensors.tmp.safetensors").write_text("torn")
    (folder / "best" / ".step.json.tmp").write_text("torn")
    before = contents(folder)
    train(load_config(path))
    assert contents(folder).keys() == {n for n in before if ".tmp" not in n}


def test_half_written_state(write_config):
    path, folder = write_config(steps=6)
    run("train.py", path, check=0)
    (folder / "report.json").unlink()
    state = (folder / "state.safetensors").read_bytes()
    (folder / "state.safetensors").write_bytes(state[:len(state) // 2])
    assert_one_clear_line(run("train.py", path), "cannot continue",
                          "state.safetensors is truncated or corrupt", "overwrite=true")
    assert (folder / "adapters.safetensors").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 6


def test_state_of_another_shape(write_config):
    path, folder = write_config()
    run("train.py", path, check=0)
    (folder / "report.json").unlink()
    state = folder / "state.safetensors"
    arrays = mx.load(str(state))
    mx.eval(arrays)
    name = next(k for k in arrays if k.endswith("lora_a"))
    arrays[name] = arrays[name][:, :2]
    mx.save_safetensors(str(state), arrays, tensors(state)[1])
    assert_one_clear_line(run("train.py", path), "of another shape", name)


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_interrupted_runs_end_bit_identical(write_config, tmp_path, monkeypatch, method):
    """Ctrl-C within a step: the step is finished and saved, and the same command continues."""
    keys = {"save_every_steps": 0}
    if method == "grpo":
        keys = GRPO | keys | {"grpo_reward": odd_reward(tmp_path), "lens_every_steps": 3}
    path, whole = write_config("whole", **keys)
    train(load_config(path))
    path, folder = write_config("interrupted", **keys)
    look_inside = training.look_inside

    def interrupt(*args):
        if args[-1] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return look_inside(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "look_inside", interrupt)
        train(load_config(path))
    assert about(folder)["step"] == 3 and not (folder / "report.json").exists()
    train(load_config(path))
    assert differences(whole, folder) == []


def test_a_run_of_another_version(write_config):
    """Its config has keys that are gone, or its state keeps its step elsewhere: one short line."""
    path, folder = write_config(steps=2)
    train(load_config(path))
    (folder / "report.json").unlink()
    config, state = folder / "config.yaml", folder / "state.safetensors"
    arrays = dict(mx.load(str(state)))
    mx.eval(arrays)
    mx.save_safetensors(str(state), arrays, {"format": "mlx", "step": "2"})
    before = contents(folder)
    text = config.read_text()
    for more, words in (("", "state.safetensors says nothing of its step"),
                        ("lens_prompts: 8\ncache_limit_gib: null\n", "unknown key 'lens_prompts'")):
        config.write_text(text + more)
        done = run("train.py", path)
        assert_one_clear_line(done, f"cannot continue {folder}, which another version wrote", words,
                              "another run_dir", "overwrite=true")
        assert len(done.stderr) < 600 and "cache_limit_gib" not in done.stderr
        config.write_text(text)
        # but for the lock, which holds the last process' id
        assert contents(folder) | {".lock": b""} == before | {".lock": b""}
    config.write_text(text + "lens_prompts: 8\n")
    train(load_config(path, ["overwrite=true"]))
    assert config.read_text() == text and (folder / "report.json").exists()


# --- what else a continued run depends on


def test_another_model_or_data_under_the_same_name(write_config, small_folder, tmp_path):
    """A Hub name's weights or a data folder's rows, changed while the run was down."""
    base, data = tmp_path / "model", write_data(tmp_path / "data")
    shutil.copytree(small_folder, base)
    path, folder = write_config(model=base, data=data, steps=4)
    train(load_config(path))
    report = (folder / "report.json").read_text()
    rows = (data / "valid.jsonl").read_text()
    (data / "valid.jsonl").write_text(rows.replace("60 plus 17", "60 plus  17"))
    assert train(load_config(path)) == json.loads(report)   # finished: nothing to continue
    (folder / "report.json").unlink()
    before = contents(folder)
    with pytest.raises(BadInput, match="cannot continue .*: its data changed since it began"):
        train(load_config(path))
    (data / "valid.jsonl").write_text(rows)
    arrays = dict(mx.load(str(base / "model.safetensors")))
    name = next(k for k in arrays if k.endswith("down_proj.weight"))
    arrays[name] = arrays[name] * 1.0001
    mx.eval(arrays)
    mx.save_safetensors(str(base / "model.safetensors"), arrays)
    with pytest.raises(BadInput, match="its model changed since it began"):
        train(load_config(path))
    assert contents(folder).keys() == before.keys()
    shutil.copy(small_folder / "model.safetensors", base)
    train(load_config(path))


@pytest.mark.parametrize("save_every", [2, 0])
def test_a_step_half_taken_is_not_saved(write_config, tmp_path, monkeypatch, save_every):
    """A guard stops the second of a step's four updates: continued, the step is taken whole."""
    keys = GRPO | {"grpo_reward": odd_reward(tmp_path), "save_every_steps": save_every}
    path, whole = write_config("whole", **keys)
    train(load_config(path))
    path, folder = write_config("stopped", **keys)
    calls, compile_step = [], training.compile_step

    def stopping(*args):
        loss_and_grads, update = compile_step(*args)

        def stop(*args):
            calls.append(1)
            if len(calls) == 4 * 3 + 2:
                raise Stopped("loss nan, gradient norm nan")
            return update(*args)

        return loss_and_grads, stop

    monkeypatch.setattr(training, "compile_step", stopping)
    with pytest.raises(Stopped, match=r"^step 4: loss nan, .* on rows drawn 12 to 15$"):
        train(load_config(path))
    assert json.loads((folder / "failed_batch.json").read_text())["step"] == 4
    state, adapters = folder / "state.safetensors", folder / "adapters.safetensors"
    assert about(folder)["step"] == 2 if save_every else not state.exists()
    if save_every:      # what eval.py loads is what was saved then, and no half of a step
        saved, _ = tensors(state)
        assert tensors(adapters)[0] == {name.removeprefix("trainable."): array for name, array
                                        in saved.items() if name.startswith("trainable.")}
    else:
        assert not adapters.exists()
    train(load_config(path))
    assert differences(whole, folder) == ["failed_batch.json"]


def turning_reward(monkeypatch, turns_at):
    """A reward that turns round once so many problems are drawn, whatever process draws them."""
    rollout, judge = Rollouts.rollout, Answers.rewards

    def located(self):
        turned.position = self.position
        return rollout(self)

    def turned(self, asked, done):
        judged = judge(self, asked, done)
        return judged | {"reward": judged["reward"] - 5.0 * (turned.position >= turns_at)}

    monkeypatch.setattr(Rollouts, "rollout", located)
    monkeypatch.setattr(Answers, "rewards", turned)


@pytest.mark.parametrize("dies_at", [14, 20])
def test_a_collapse_comes_out_the_same_after_a_kill(write_config, tmp_path, monkeypatch, dies_at):
    """Stopped between the best step and the collapse, whose best weights then come out of the
    file, and between the collapse and the end: the halved learning rate is kept."""
    keys = GRPO | {"grpo_reward": odd_reward(tmp_path), "steps": 24, "grpo_epochs": 2,
                   "lr_schedule": "constant"}
    turning_reward(monkeypatch, turns_at=4 * 13)
    path, whole = write_config("whole", **keys)
    train(load_config(path))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    [collapse] = [r["step"] for r in lines if "collapsed" in r]
    assert 14 < collapse < 20
    path, folder = write_config("killed", **keys)
    save = training.save

    def save_and_die(cfg, run, step, *args):
        save(cfg, run, step, *args)
        if step == dies_at:
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(training, "save", save_and_die)
        train(load_config(path))
    arrays, _ = tensors(folder / "state.safetensors")
    assert any(name.startswith("best.optimizer.") for name in arrays)
    assert about(folder)["guard"]["reverts"] == (dies_at > collapse)
    train(load_config(path))
    assert differences(whole, folder) == []
    before, after = (next(r["lr"] for r in lines if r["step"] == step)
                     for step in (collapse - 1, collapse + 1))
    assert after == pytest.approx(before / 2, rel=1e-9)


def test_restoring_keeps_the_order_of_compiled_functions():
    """mx.compile tells arrays apart by their order alone: a file's may exchange both moments."""
    def three_steps(exchange):
        model = lora_model()
        cfg = config(method="sft", lr=1e-2)
        optimizer = training.make_optimizer(cfg, model)
        state = [model.state, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(grads):
            optimizer.update(model, grads)

        mx.random.seed(3)
        for i in range(3):
            step(tree_map(lambda p: mx.random.normal(p.shape), model.trainable_parameters()))
            arrays = run_folder.training_arrays(model, optimizer)
            if exchange:    # each second moment before its first, as a file may hold them
                place = {name.rpartition(".")[0]: i for i, name in enumerate(arrays)}
                arrays = dict(sorted(arrays.items(), key=lambda item: (
                    place[item[0].rpartition(".")[0]], item[0].endswith(".m"))))
            run_folder.restore_training(arrays, model, optimizer)
        return {k: np.array(v) for k, v in run_folder.training_arrays(model, optimizer).items()}

    expected, found = three_steps(False), three_steps(True)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_a_reward_that_fails_in_a_redraw(write_config, tmp_path, monkeypatch):
    """Step 3 draws again, since all its groups are flat, and fails: continued, it redraws."""
    keys = GRPO | {"grpo_reward": odd_reward(tmp_path), "save_every_steps": 0}
    judge, rollout = Answers.rewards, Rollouts.rollout

    def located(self):
        flat.position = self.position
        return rollout(self)

    def flat(self, asked, done):
        judged = judge(self, asked, done)
        if flat.position == flat.fails_at:
            flat.fails_at = None
            raise BadInput("reward")
        # 4 problems a step: the third step's
        return judged | {"reward": judged["reward"] * (flat.position != 8)}

    monkeypatch.setattr(Rollouts, "rollout", located)
    monkeypatch.setattr(Answers, "rewards", flat)
    flat.fails_at = None
    path, whole = write_config("whole", **keys)
    train(load_config(path))
    redraws = [json.loads(line).get("redraws") for line in
               (whole / "metrics.jsonl").read_text().splitlines()]
    assert 1 in redraws
    flat.fails_at = 12
    path, folder = write_config("failed", **keys)
    with pytest.raises(BadInput, match="reward"):
        train(load_config(path))
    assert about(folder) | {"position": 8, "step": 2} == about(folder)
    train(load_config(path))
    assert differences(whole, folder) == []


# --- best and last


@pytest.mark.parametrize("full", ["false", "true"])
def test_best_is_the_first_of_the_highest(write_config, tmp_path, monkeypatch, full):
    """Its weights are those of a run that ends there; eval.py judges it as it does a run."""
    keys = {"full": full, "lr_schedule": "constant", "save_every_steps": 4}    # 6 steps

    def look(cfg, run, model, tokenizer, valid, done):
        seen = {"step": done, "valid_accuracy": (0.2, 0.5, None, 0.7, 0.4, 0.7, 0.6)[done]}
        run.keep_if_best(seen, checkpoint.checkpoint_files(model, cfg))
        return seen
    monkeypatch.setattr(training, "look_inside", look)
    monkeypatch.setattr(training, "format_line", lambda *_: "")
    path, folder = write_config(**keys)
    train(load_config(path))
    step = json.loads((folder / "best" / "step.json").read_text())
    assert step == {"step": 3, "valid_accuracy": 0.7}
    name = "model.safetensors" if full == "true" else "adapters.safetensors"
    path, until = write_config("until", **keys | {"steps": 3})
    train(load_config(path))
    assert tensors(folder / "best" / name) == tensors(until / name) != tensors(folder / name)
    run("eval.py", "--ckpt", folder / "best", "--json", tmp_path / "best.json", check=0)
    judged, ended = (json.loads(file.read_text()) for file in (tmp_path / "best.json",
                                                               until / "report.json"))
    assert judged["layers"] == ended["layers"] and judged["config"]["steps"] == 6
    # started over, nothing of it is left
    path, _ = write_config(**keys | {"overwrite": "true", "steps": 1})
    monkeypatch.setattr(training, "look_inside", lambda *_: {})
    train(load_config(path))
    assert not (folder / "best").exists()


def test_best_by_loss(write_config, tmp_path):
    """Where answers are too long to be matched: the lowest validation loss, at too high an lr."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({
        "prompt": f"what is {n} ? ", "response": f"{n} and {n} and {n} and {n} and {n} and {n}"})
        + "\n" for n in range(30)))
    path, folder = write_config(data=data, lr=0.3, lr_schedule="constant", eval_every_steps=1,
                                steps=8, save_every_steps=8)
    train(load_config(path))
    losses = {r["step"]: r["valid_loss"] for r in map(json.loads, (
        folder / "metrics.jsonl").read_text().splitlines()) if "valid_loss" in r}
    best = min(losses, key=losses.get)
    assert 0 < best < 8     # or the last would do
    assert json.loads((folder / "best" / "step.json").read_text()) == {
        "step": best, "valid_loss": losses[best]}
    path, until = write_config("until", data=data, lr=0.3, lr_schedule="constant", steps=best)
    train(load_config(path))
    name = "adapters.safetensors"
    assert tensors(folder / "best" / name) == tensors(until / name) != tensors(folder / name)


def test_ties_keep_the_earlier(write_config):
    path, folder = write_config(lr=0)
    train(load_config(path))
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert len({r["valid_accuracy"] for r in records if "valid_accuracy" in r}) == 1
    assert json.loads((folder / "best" / "step.json").read_text())["step"] == 0


def test_an_unfinished_run_can_be_judged(write_config, tmp_path):
    path, folder = write_config(steps=100000, eval_every_steps=0, lens_every_steps=0,
                                save_every_steps=1)
    process = start(path)
    wait_for(process, (folder / "state.safetensors").exists)
    run("eval.py", "--ckpt", folder, check=0)   # also while it trains
    process.kill()
    process.communicate()
    run("eval.py", "--ckpt", folder, check=0)
    assert not (folder / "best").exists()


# --- a second process


def test_two_runs_in_one_folder(write_config):
    """The second stops at once, whatever it wants, and touches nothing; kill -9 frees the folder.

    The first is stopped meanwhile, so that only the second could touch anything.
    """
    path, folder = write_config(steps=100000, eval_every_steps=0, lens_every_steps=0,
                                save_every_steps=5)
    first = start(path)
    wait_for(first, (folder / "state.safetensors").exists)
    first.send_signal(signal.SIGSTOP)
    os.waitpid(first.pid, os.WUNTRACED)
    before = contents(folder)
    for words in ((), ("overwrite=true",), ("lr=0.5", "overwrite=true"), ("model=no/such",)):
        assert_one_clear_line(run("train.py", path, *words), f"another process trains in {folder}",
                              f"pid {first.pid} on ", "another run_dir", "wait", "kill")
    assert contents(folder) == before
    first.kill()
    first.communicate()
    saved = (folder / "state.safetensors").stat().st_mtime_ns
    second = start(path)
    wait_for(second, lambda: (folder / "state.safetensors").stat().st_mtime_ns != saved)
    assert (folder / ".lock").read_text().startswith(f"{second.pid} ")
    second.send_signal(signal.SIGINT)
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 130 and "continuing after step" in out


def test_the_lock_ends_with_train(write_config, monkeypatch):
    """One process, many runs: freed by a return, a mistake and a guard; held by an open file."""
    path, folder = write_config(steps=2)
    cfg = load_config(path)
    train(cfg)
    train(cfg)
    held = run_folder.lock_run(folder)
    with pytest.raises(BadInput, match="another process trains"):
        train(cfg)
    held.close()
    errors = []
    with pytest.raises(BadInput, match="another config") as error:
        train(load_config(path, ["lr=0.5"]))
    errors.append(error)    # and with it the frames of train
    (folder / "report.json").unlink()
    monkeypatch.setattr(training, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        train(cfg)
    errors.append(error)
    monkeypatch.undo()
    train(cfg)


def test_no_permission(write_config, monkeypatch, tmp_path):
    """One line. By monkeypatch, since root may write anywhere."""
    path, folder = write_config(steps=2)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    words = f"run_dir = {folder} cannot be written .Permission denied.; give another run_dir"
    for owner, name in ((run_folder.Path, "mkdir"), (run_folder, "open"),
                        (run_folder.Path, "iterdir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse, raising=False)
            with pytest.raises(BadInput, match=words):
                with run_folder.open_run(load_config(path), {}, {}, writes=True):
                    pass
    (tmp_path / "file").write_text("")
    path, _ = write_config("file", run_dir=tmp_path / "file" / "run")
    assert_one_clear_line(run("train.py", path), "is not a run folder", "another run_dir")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        try:
            path, _ = write_config("shut", run_dir=tmp_path / "shut")
            assert_one_clear_line(run("train.py", path), "cannot be written", "Permission denied")
        finally:
            tmp_path.chmod(0o700)


def test_overwrite_spares_what_is_no_run(write_config, small_folder, tmp_path):
    """A model's folder has files of the names that a run has."""
    shutil.copytree(small_folder, tmp_path / "model")
    before = contents(tmp_path / "model")
    path, _ = write_config(run_dir=tmp_path / "model", overwrite="true")
    assert_one_clear_line(run("train.py", path), "is not a run folder", "another run_dir")
    assert contents(tmp_path / "model") == before


# --- a full disk

@pytest.mark.parametrize("full", ["false", "true"])
def test_disk_full_in_any_save(write_config, monkeypatch, full):
    """best/, the weights, the state: what was saved before is whole, and the run ends the same.

    A limit on the size of files, for as long as one save takes, fails it as a full disk does.
    """
    keys = {"full": full, "steps": 8, "lr": "1e-2", "lens_every_steps": 0}
    path, whole = write_config("whole", **keys)
    train(load_config(path))
    weights = "model.safetensors" if full == "true" else "adapters.safetensors"
    save = model_folder.save_safetensors
    for i, (name, count) in enumerate(((f"best/{weights}", 0), (f"full_1/{weights}", 1),
                                       ("state.safetensors", 1), (f"full_3/{weights}", 3))):
        path, folder = write_config(f"full_{i}", **keys)
        saves = []

        def limited(path, *args, name=name, count=count, saves=saves):
            saves.append(str(path).endswith(name))
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            if sum(saves) > count:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
            try:
                save(path, *args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)

        with monkeypatch.context() as patch:
            for module in (model_folder, run_folder):
                patch.setattr(module, "save_safetensors", limited)
            with pytest.raises(BadInput, match=f"could not write .*{name}.*free some disk space"):
                train(load_config(path))
        assert not [p for p in folder.rglob("*") if ".tmp" in p.name]
        steps = [about(folder)["step"] for _ in folder.glob("state.safetensors")]
        assert steps == ([2 * count] if count else [])
        if count:
            checkpoint.load_checkpoint(folder)
            checkpoint.load_checkpoint(folder / "best")
        train(load_config(path))
        assert differences(whole, folder) == []


def test_disk_full_while_saving(write_config, tmp_path):
    """A real full disk where mounting is allowed.

    Elsewhere a file-size limit, which fails the same write.
    """
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(mount)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        path, folder = write_config(run_dir=(mount if mounted else tmp_path) / "run", steps=400,
                                    save_every_steps=5, lora_rank=4, lora_targets="q,v")
        if mounted:
            done = run("train.py", path)
        else:
            script = f"trap '' XFSZ; ulimit -f 40; exec {sys.executable} train.py {path}"
            done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert_one_clear_line(done, "could not write", str(folder), "free some disk space")
        leftovers = [p.name for p in folder.iterdir() if "tmp" in p.name]
        assert not leftovers, leftovers
        # what was saved before is intact: with room again, the same command continues from it
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=20m", str(mount)], check=True)
            assert "continuing after step" in run("train.py", path, check=0).stdout
    finally:
        if mounted:
            subprocess.run(["umount", str(mount)])

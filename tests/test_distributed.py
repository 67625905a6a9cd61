"""Two processes over MLX's ring on this machine: the same as one with twice the batch."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY_COT, run, small_config, write_model
from safetensors.numpy import load_file

TIMES = ("seconds", "peak_gib", "tokens_per_s", "completions_per_s", "update_s", "rollout_s",
         "score_s")
REWARD = """
import json, os
def by_length(problem, completion):
    with open(f"{os.path.dirname(__file__)}/ids_{os.environ.get('MLX_RANK', 'one')}", "a") as file:
        file.write(json.dumps(completion.ids) + "\\n")
    return float(len(completion.text))
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(path, tmp_path, count=2, run_dirs=None, more=((), ()), **given):
    """What mlx.launch does, process by process."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    processes = []
    for rank in range(count):
        env = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts),
               "OPENBLAS_NUM_THREADS": "1", **given}
        words = [f"run_dir={run_dirs[rank]}"] if run_dirs else more[rank]
        processes.append(subprocess.Popen(
            [sys.executable, "train.py", str(path), *words], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


def finish(processes, code=0):
    outputs = [p.communicate(timeout=200) for p in processes]
    for process, (out, err) in zip(processes, outputs):
        assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
    return outputs


def records_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_run(one, two):
    """Losses within 1e-5, the adapter too; the numbers of rows and tokens exactly."""
    a, b = records_of(one), records_of(two)
    assert [sorted(r) for r in a] == [sorted(r) for r in b]
    for x, y in zip(a, b):
        for key, value in x.items():
            if isinstance(value, float):
                assert abs(value - y[key]) <= 1e-5 * max(1, abs(value)), (key, value, y[key])
            elif isinstance(value, int):
                assert value == y[key], key
    arrays = [load_file(folder / "adapters.safetensors") for folder in (one, two)]
    for name in arrays[0]:
        np.testing.assert_allclose(arrays[0][name], arrays[1][name], atol=1e-5, err_msg=name)


def same_tokens(tmp_path, rows):
    """Whether two processes of `rows` completions a step sampled what one of twice as many did."""
    one, first, second = ((tmp_path / f"ids_{name}").read_text().splitlines()
                          for name in ("one", 0, 1))
    starts = range(0, len(first), rows)
    return one == [ids for i in starts for part in (first, second) for ids in part[i:i + rows]]


METHODS = {
    "sft": {}, "dual_reward": {}, "accumulated": {"grad_accum_steps": 2},
    "grpo": {"grpo_group_size": 4, "grpo_epochs": 2, "grpo_kl_stop": 0},
    "markovian": {"chain_tokens": 6, "grpo_group_size": 4, "max_completion_tokens": 3},
}


@pytest.mark.parametrize("which", METHODS)
def test_two_processes_equal_one_with_twice_the_batch(which, write_config, sums_data,
                                                      tmp_path):
    """Unequal target counts on the two; rollouts, advantages, guard and decisions of the whole.

    Gradients agree to float32's rounding, not to the bit. Where a draw falls that near to the
    boundary between two tokens (one did, by 3e-8 of the cumulative distribution), the runs sample
    different tokens and part. So GRPO's tokens are compared, and a second seed is taken where they
    differ: a mistake would part the runs of both.
    """
    keys = {"method": "sft" if which == "accumulated" else which, "batch_size": 8, "steps": 4,
            "lr": 1e-4, "eval_every_steps": 2, **METHODS[which]}
    if which == "markovian":
        keys["model"] = write_model(tmp_path / "cot", small_config(source=TINY_COT), TINY_COT)
        keys["data"] = sums_data
    for seed in (0, 1):
        place = tmp_path / f"seed_{seed}"
        place.mkdir()
        if which == "grpo":
            (place / "reward.py").write_text(REWARD)
            keys["grpo_reward"] = f"{place}/reward.py:by_length"
        path, two = write_config(f"two_{seed}", **keys, seed=seed)
        (out, _), (other_out, other_err) = finish(start(path, tmp_path))
        assert "wrote" in out and not other_out and not other_err.replace("\n", "").strip()
        path, one = write_config(f"one_{seed}", **keys | {"batch_size": 16, "seed": seed})
        run("train.py", path, check=0, OPENBLAS_NUM_THREADS="1")
        if which != "grpo" or same_tokens(place, keys["batch_size"]):
            break
    assert_same_run(one, two)


def test_other_processes_need_no_run_folder(write_config, tmp_path):
    """On another machine there is none: state comes from the first; killed and continued, exact."""
    path, folder = write_config("w", steps=8, grad_accum_steps=2)
    dirs = [folder, tmp_path / "elsewhere"]
    finish(start(path, tmp_path, run_dirs=dirs))
    whole = load_file(folder / "adapters.safetensors")
    assert not dirs[1].exists()
    dirs = [tmp_path / "runs" / "again", tmp_path / "elsewhere"]
    processes = start(path, tmp_path, run_dirs=dirs)
    while not (dirs[0] / "state.safetensors").exists():
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    out, err = processes[0].communicate(timeout=100)
    processes[1].wait()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert processes[0].returncode == 2 and len(errors) == 1, err
    assert "lost another" in errors[0] and "the same command continues" in errors[0]
    assert "Traceback" not in err
    finish(start(path, tmp_path, run_dirs=dirs))
    again = load_file(dirs[0] / "adapters.safetensors")
    assert all((again[name] == whole[name]).all() for name in whole)
    (out, _), (silent, _) = finish(start(path, tmp_path, run_dirs=dirs))
    assert "is finished" in out and not silent


def test_processes_that_would_train_other_things(write_config, tmp_path):
    path, folder = write_config("a")
    processes = start(path, tmp_path, more=[[], ["lr=0.5"]])
    outputs = finish(processes, code=2)
    assert any("differ in lr" in err for _, err in outputs) and not folder.exists()


def test_another_number_of_processes_is_refused(write_config, tmp_path):
    path, folder = write_config("n", steps=40, save_every_steps=2)
    processes = start(path, tmp_path)
    while not (folder / "state.safetensors").exists():
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    done = run("train.py", path)
    assert done.returncode == 2 and "processes changed" in done.stderr


def test_a_silent_process_ends_the_run(write_config, tmp_path):
    path, folder = write_config("s", steps=400, save_every_steps=2)
    first, second = start(path, tmp_path, NANOLENS_TIMEOUT_S="2")
    while not (folder / "state.safetensors").exists():
        time.sleep(0.01)
    second.send_signal(signal.SIGSTOP)
    _, err = first.communicate(timeout=60)
    second.kill()
    second.communicate()
    assert first.returncode == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "heard nothing" in errors[0] and "2 s" in errors[0]
    assert load_file(folder / "state.safetensors")


def test_a_process_that_never_starts(write_config, tmp_path, monkeypatch):
    """The first would wait inside MLX for ever."""
    path, folder = write_config("x")
    text = (ROOT / "engine" / "workers.py").read_text()
    assert "CONNECT_S = 60 " in text
    code = ("import sys, train; from config import run_main; from engine import workers; "
            "workers.CONNECT_S = 2; sys.argv = ['train.py', %r]; run_main(train.main)")
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    done = subprocess.run([sys.executable, "-c", code % str(path)], cwd=ROOT, text=True,
                          capture_output=True, timeout=60,
                          env={**os.environ, "MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)})
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "never answered" in errors[0]
    assert not folder.exists()


def test_ctrl_c_on_one_stops_all_at_the_same_step(write_config, tmp_path):
    path, folder = write_config("i", steps=2000, save_every_steps=0, eval_every_steps=0,
                                lens_every_steps=0)
    processes = start(path, tmp_path)
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGINT)
    (out, _), _ = finish(processes, code=130)
    assert "interrupted; saved after step" in out and (folder / "state.safetensors").exists()


@pytest.mark.parametrize("where", ["another config", "a torn state"])
def test_what_the_first_alone_sees_ends_all_with_one_line(where, write_config, tmp_path):
    """The run folder is the first process's: the others, which would wait, end without a word."""
    path, folder = write_config("f", steps=2)
    if where == "another config":
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("steps: 3\n")
    else:
        finish(start(path, tmp_path))
        (folder / "report.json").unlink()
        state = folder / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-100])
    (_, err), (out, other_err) = finish(start(path, tmp_path), code=2)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "overwrite=true" in errors[0] and "Traceback" not in err
    assert not out and not other_err.strip()


def test_sigterm_to_one_saves(write_config, tmp_path):
    """As a scheduler stops a machine: the run ends, saved, and the same command continues it."""
    path, folder = write_config("t", steps=60, save_every_steps=0, eval_every_steps=0,
                                lens_every_steps=0)
    processes = start(path, tmp_path)
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        time.sleep(0.01)
    processes[1].terminate()
    (out, _), _ = finish(processes, code=130)
    assert "interrupted; saved after step" in out and not (folder / "report.json").exists()
    finish(start(path, tmp_path))
    stopped = load_file(folder / "adapters.safetensors")
    path, whole = write_config("u", steps=60, save_every_steps=0, eval_every_steps=0,
                               lens_every_steps=0)
    finish(start(path, tmp_path))
    expected = load_file(whole / "adapters.safetensors")
    assert all((stopped[name] == expected[name]).all() for name in expected)

"""What every side of bench shares, ours and the peers': one clock, one gauge, the same prompts.

A call is repeated in one process; the first two, which compile and fill caches, do not count. Runs
in any Python: of the project nothing is imported here, and no framework either.
"""
import ctypes
import json
import os
import random
import re
import resource
import statistics
import sys
import time
from pathlib import Path


def on_gpu(name: str):
    """A framework's module where it is loaded and works on a GPU; None otherwise."""
    module = sys.modules.get({"torch": "torch", "mlx": "mlx.core"}[name])
    if module is None:
        return None
    busy = module.cuda.is_available() if name == "torch" else (
        module.default_device() != module.Device(module.cpu))
    return module if busy else None


def clock(call, count: int) -> list[float]:
    """Seconds of `count` calls, in turn; before them two that do not count, or one before one."""
    seconds, torch = [], on_gpu("torch")
    for _ in range(min(2, count) + count):
        start = time.perf_counter()
        call()
        if torch:
            torch.cuda.synchronize()    # a call only queues its work there
        seconds.append(time.perf_counter() - start)
    return seconds[-count:]


def peak_gib() -> float:
    """Peak memory so far: the GPU's where one is at work, else this process'."""
    if torch := on_gpu("torch"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if mx := on_gpu("mlx"):
        return mx.get_peak_memory() / 2 ** 30
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30
    # not ru_maxrss, which on Linux begins at the peak of the process that started this one
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 20


def report(seconds: list[float], **more) -> None:
    """Print one line of JSON, a script's last: median seconds of a call, peak GiB."""
    print(json.dumps({"seconds": statistics.median(seconds), "peak_gib": peak_gib(), **more}))


def random_prompts(folder: str, count: int, T: int) -> list[list[int]]:
    """`count` prompts of T ids below 1000, the same on every side."""
    V = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    return [[rng.randrange(3, min(V, 1000)) for _ in range(T)] for _ in range(count)]


def torch_device(torch) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_blas() -> None:
    """Give mlx-lm, before it is imported, the OpenBLAS that NANOLENS_BLAS names; "none": its own.

    So that in a comparison only the code differs, or only the BLAS.
    """
    path = os.environ.get("NANOLENS_BLAS", "none")
    if path not in ("", "none"):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

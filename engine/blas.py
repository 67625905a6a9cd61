"""Make MLX's Linux CPU backend fast; `import engine.blas` goes before `import mlx.core`.

Six repairs. (1) The Linux wheel of MLX calls `cblas_sgemm` and bundles the reference BLAS, about
thirty times slower than OpenBLAS. The dynamic loader binds the symbol once, when libmlx is loaded:
an OpenBLAS that is already in the process with RTLD_GLOBAL wins, one loaded afterwards does
nothing. Hence the order, and hence this is the one file of the project whose import has an effect.
NANOLENS_BLAS=/path/to/libopenblas.so.0 names a library; NANOLENS_BLAS=none keeps the bundled one
(to measure). (2) An OpenBLAS that is older than the processor takes it for one of 2004, and
multiplies five times slower: it is told better (`best_kernels`). (3) MLX allocates every array by
malloc, and glibc gives large blocks back to the kernel at once: the next one is zeroed and mapped
anew, page by page, which costs an operation on a large array ten times its arithmetic.
`keep_freed_memory` tells glibc to keep them. (4) That backend uses one core for everything but
BLAS: PARTS says in how many parts parallel.py may cut a batch. (5) A trained model's attention is
full of numbers below 1e-38, over which a processor takes a hundred times as long: its threads take
them for 0 (`subnormals_as_zero`). (6) OpenBLAS copies the whole matrix even for a product of few
rows, such as decoding makes: few_rows.c does without, in half to two thirds of the time. macOS
(Accelerate, Metal) and CUDA need none of it.

NANOLENS_PLAIN=1 gives a Linux CPU the arithmetic of Metal and CUDA, for tests: MLX's own functions
(`linux_cpu` is false), batches in one part. A process that imports this file and forks can use MLX
no more in the child: MLX's thread runs from the import on.
"""
import _ctypes
import ctypes
import ctypes.util
import importlib.metadata
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

DEBIAN_PATH = f"/usr/lib/{os.uname().machine}-linux-gnu/libopenblas.so.0"
MOST = 4    # parts
ORDER, IN_TURN = "MLX_BFS_MAX_WIDTH", "1000"
KERNELS = "OPENBLAS_CORETYPE"
CPU_INFO = Path("/proc/cpuinfo")
LEAST_ADDRESSES = 2 ** 31   # bytes: libraries, threads' stacks and malloc's arenas take most of it
OLDEST = b"Prescott"    # what an OpenBLAS takes an x86-64 processor for that it does not know
REMEDY = "run `apt-get install libopenblas0`, or set NANOLENS_BLAS=/path/to/libopenblas.so.0"


def load_openblas() -> str:
    """Load the first OpenBLAS found, for all libraries; returns its path, or '' with a note."""
    named = os.environ.get("NANOLENS_BLAS", "")
    if named == "none":
        return ""
    # asking the loader starts other programs, a fifth of a second: only where the path is another
    for find in [lambda: named] if named else [lambda: DEBIAN_PATH,
                                               lambda: ctypes.util.find_library("openblas")]:
        try:
            path = find()
            library = ctypes.CDLL(path) if path else None
        except OSError:
            continue
        # some builds rename their symbols; such a library would load and change nothing
        if library is not None and hasattr(library, "cblas_sgemm"):
            best_kernels(library)
            publish(path)
            return path
    tried = f"NANOLENS_BLAS={named} does not load as an OpenBLAS" if named else "no OpenBLAS found"
    print(f"note: {tried}: MLX runs 8 to 12 times slower on this CPU; {REMEDY}", file=sys.stderr)
    return ""


def publish(path: str) -> None:
    """Let MLX find an OpenBLAS: its cblas_sgemm, or in front of that the one of few_rows.c."""
    own = f"{sys.prefix}/lib/libfew_rows{kernels_of_processor()}.so"
    library = ctypes.CDLL(path) if os.path.exists(own) else None
    if hasattr(library, "openblas_get_num_threads"):
        try:
            ctypes.CDLL(own).put_few_rows_before(
                library.cblas_sgemm, library.openblas_get_num_threads)
            # public only now, when it is whole; and first, since MLX gets the first of a name
            ctypes.CDLL(own, mode=ctypes.RTLD_GLOBAL)
        except (OSError, AttributeError) as error:
            print(f"note: {error}; decoding takes longer; run `sh setup.sh`", file=sys.stderr)
    # without RTLD_GLOBAL the symbols stay private and MLX keeps its bundled BLAS
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def best_kernels(library: ctypes.CDLL) -> None:
    """Have an OpenBLAS that does not know this processor use the vectors that it has.

    Debian 12's (0.3.21) takes Intel's of 2023 and AMD's of 2024 for the oldest. The kernels are
    chosen while it is loaded, by KERNELS before its own guess: it is unloaded, and `publish` loads.
    """
    name = getattr(library, "openblas_get_corename", None)
    if name is None or KERNELS in os.environ:
        return
    name.restype = ctypes.c_char_p
    kernels = kernels_of_processor() if name() == OLDEST else ""
    if kernels:
        os.environ[KERNELS] = kernels
        _ctypes.dlclose(library._handle)


def kernels_of_processor() -> str:
    """OpenBLAS's name for x86-64 with vectors such as this one has; "": for any other."""
    if not CPU_INFO.exists():
        return ""
    with CPU_INFO.open() as lines:      # of many cores the first says it: no need to read all
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    avx2 = "Haswell" if {"avx2", "fma"} <= flags else ""
    return "SkylakeX" if avx2 and {"avx512bw", "avx512dq", "avx512vl"} <= flags else avx2


def count_cores() -> int:
    """Threads that OpenBLAS uses (OPENBLAS_NUM_THREADS says how many); 1 off the Linux CPU."""
    if not LOADED:
        return len(os.sched_getaffinity(0)) if CPU_WHEEL else 1
    library = ctypes.CDLL(LOADED)
    return library.openblas_get_num_threads() if hasattr(library, "openblas_get_num_threads") else 1


def count_parts() -> int:
    """One a core; 1 for more cores than one Python can feed with operations."""
    # OpenMP's builds (2) keep a number of threads for each caller: theirs cannot be set from here
    openmp = LOADED and CORES > 1 and ctypes.CDLL(LOADED).openblas_get_parallel() == 2
    return 1 if openmp or CORES > MOST else CORES


@contextmanager
def one_thread() -> Iterator[None]:
    """OpenBLAS on one thread for what is evaluated inside; the bundled BLAS has no other way."""
    set_threads = ctypes.CDLL(LOADED).openblas_set_num_threads if LOADED else lambda n: None
    set_threads(1)
    try:
        yield
    finally:
        set_threads(CORES)


def start_thread(stream=None) -> None:
    """Have a stream of MLX's start its thread, which is put off until it has something to do."""
    import mlx.core as mx  # as in linux_cpu
    with mx.stream(stream or mx.cpu):
        mx.eval(mx.zeros(1) + 1)


@contextmanager
def subnormals_as_zero() -> Iterator[None]:
    """Threads started inside compute so; this one, with its statistics, is as before afterwards.

    A thread inherits the setting of the one that starts it. Half of a training step of SmolLM2 on
    an Intel of 2023 went into such numbers. x86-64 alone: its fenv_t ends with the register MXCSR.
    """
    libc = ctypes.CDLL(None)
    if os.uname().machine != "x86_64" or not hasattr(libc, "fesetenv"):
        yield
        return
    before = ctypes.create_string_buffer(32)
    libc.fegetenv(before)
    flags = int.from_bytes(before.raw[28:], "little") | 0x8040      # results and operands
    libc.fesetenv(before.raw[:28] + flags.to_bytes(4, "little"))
    try:
        yield
    finally:
        libc.fesetenv(before)


def mallopt(option: int, value: int) -> None:
    """Set an option of glibc's malloc; other C libraries have none."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(option, value)


def keep_freed_memory() -> None:
    """Have glibc's malloc serve all blocks from its heap and never trim it."""
    mallopt(-3, 32 << 20)       # M_MMAP_THRESHOLD, at its maximum: see map_large_blocks
    mallopt(-4, 0)              # M_MMAP_MAX: no block has a mapping of its own
    mallopt(-1, -1)             # M_TRIM_THRESHOLD: the heap's top is not given back
    mallopt(-2, 64 << 20)       # M_TOP_PAD: it grows by 64 MiB at a time


def map_large_blocks() -> None:
    """For a large model: blocks of 32 MiB and more do get mappings, and leave no holes.

    Mapping one costs a page fault for each of its pages, a quarter of a small model's GRPO step;
    beside gigabytes of weights memory is scarcer than that time.
    """
    mallopt(-4, 65536)


def operations_in_own_order() -> None:
    """Where memory is dear, MLX hands operations out in its own order, not in turn.

    Of a model trained in full, operations in turn put off the weights' gradients, which hold
    activations until then. It counts for what is evaluated first in a process: MLX reads it once.
    """
    if os.environ.get(ORDER) == IN_TURN:    # not somebody else's setting
        del os.environ[ORDER]


def trim() -> None:
    """Give malloc's free pages back to the kernel, once."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def cpu_wheel() -> bool:
    """True where MLX's Linux CPU backend does the work; a CUDA build multiplies on the card."""
    names = {d.metadata["Name"] for d in importlib.metadata.distributions(path=sys.path)
             if d.metadata["Name"]}
    return sys.platform == "linux" and not any(name.startswith("mlx-cuda") for name in names)


def linux_cpu() -> bool:
    """Whether code for MLX's Linux CPU backend serves; NANOLENS_PLAIN=1 says no."""
    import mlx.core as mx  # here: the OpenBLAS below must be loaded before it
    return CPU_WHEEL and not PLAIN and mx.default_device() == mx.Device(mx.cpu)


def end_quietly(kind: type, error: BaseException, trace) -> None:
    """What Python says of an error that ends it; of Ctrl-C, as modules load, nothing."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


# the project's own commands; a program of the user's, which imports us, keeps its traceback
if Path(__file__).parent.parent in Path(
        getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parents[:2]:
    sys.excepthook = end_quietly
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY and addresses < LEAST_ADDRESSES:
        print(f"error: the limit on memory (ulimit -v) is {addresses // 1024} KiB; expected at "
              f"least {LEAST_ADDRESSES // 1024}: with less, MLX's threads wait for ever for what "
              "they are not given", file=sys.stderr)
        sys.exit(2)
CPU_WHEEL = cpu_wheel()
# after `import mlx.core` it would be too late
FIRST = CPU_WHEEL and "mlx.core" not in sys.modules
with subnormals_as_zero() if FIRST else nullcontext():
    LOADED = load_openblas() if FIRST else ""
    CORES = count_cores()
    PLAIN = os.environ.get("NANOLENS_PLAIN", "0") != "0"
    PARTS = 1 if PLAIN else count_parts()
    if CPU_WHEEL:
        keep_freed_memory()
    if PARTS > 1:   # the operations of all parts are handed out in turn, not part after part
        os.environ.setdefault(ORDER, IN_TURN)
    if FIRST:
        start_thread()

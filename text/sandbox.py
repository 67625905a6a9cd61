"""A chat template is a stranger's program: it runs in a process of its own, with little of all.

Jinja's sandbox lets it reach nothing outside its arguments; how long it takes and how much it
writes, the sandbox does not ask. `{{ 9 ** (9 ** 9) }}` computes for ever within one operation, and
`{{ 'a' * 9999999999 }}` takes all memory, so that no check inside the same process would come to
its turn. So one child process renders, under the kernel's limits, and is replaced when it dies.
"""
import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time

CPU_S, WAIT_S = 2, 120      # of one rendering: computing; waiting for it on a busy machine
MEMORY = 2 ** 29            # bytes of the child
LONGEST = 2 ** 22           # characters of a rendered conversation without its messages


def render(source: str, **names) -> str:
    """A template's text; names: its arguments, plain JSON. raises  ValueError with its mistake"""
    process = start()
    try:
        process.stdin.write(json.dumps({"source": source, "names": names}).encode() + b"\n")
        process.stdin.flush()
        answer, until = b"", time.monotonic() + WAIT_S
        while not answer.endswith(b"\n"):
            left = max(0, until - time.monotonic())
            part = select.select([process.stdout], [], [], left)[0] and os.read(
                process.stdout.fileno(), 2 ** 20)
            if not part:
                raise BrokenPipeError
            answer += part
    except OSError:
        raise ValueError(f"it took more than {CPU_S} s of computing or "
                         f"{MEMORY // 2 ** 20} MiB of memory") from None
    finally:
        if not answer.endswith(b"\n"):      # interrupted, too: the next one would read its answer
            process.kill()
            process.wait()
            start.cache_clear()
    found = json.loads(answer)
    if "error" in found:
        raise ValueError(found["error"])
    return found["text"]


@functools.cache
def start() -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(process.kill)
    return process


# --------------------------------------------------------------------------------------------------
# the child


@functools.cache
def compile_template(source: str):
    # imported here: the parent has no use for it
    import jinja2.ext
    import jinja2.sandbox

    class GenerationTag(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}, which some templates put around replies."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
    environment.globals["raise_exception"] = raise_exception
    # a fixed day, what Llama's own template falls back to: prompts must not change overnight
    environment.globals["strftime_now"] = datetime.datetime(2024, 7, 26).strftime
    return environment.from_string(source)


def answer_line(line: bytes) -> dict:
    asked = json.loads(line)
    try:
        text = compile_template(asked["source"]).render(**asked["names"])
    except MemoryError:
        return {"error": f"it took more than {MEMORY // 2 ** 20} MiB of memory"}
    except Exception as error:      # a template is a program: anything may come out of it
        return {"error": str(error)[:2000] or type(error).__name__}
    if len(text) > LONGEST:
        return {"error": f"it writes {len(text)} characters; expected {LONGEST} at most"}
    return {"text": text}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the parent
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        limit = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_S, limit))
        sys.stdout.write(json.dumps(answer_line(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

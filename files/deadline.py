"""Code of others under a deadline: a user's reward, an endpoint that drips its answer byte by byte.

An alarm of the kernel interrupts it, wherever in Python it is, and it waits for nothing else.
"""
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Alarm(BaseException):
    """Not an Exception: `except Exception` in what is interrupted would go on."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """TimeoutError where the code within takes longer. In a thread beside the main one: no limit.

    One operation in C, such as a whole evaluation by MLX, is waited for.
    """
    def ring(*_):
        raise Alarm

    if threading.current_thread() is not threading.main_thread():
        yield       # signals come to the main thread alone
        return
    before = signal.signal(signal.SIGALRM, ring)
    try:
        # and again each second, should a bare `except:` have caught it
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        yield
    except Alarm:
        raise TimeoutError(f"it took more than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""Questions to an OpenAI-compatible endpoint: in time, and the key goes to no one else.

What a server sends is a stranger's: an answer has a largest size and a deadline, a redirect is not
followed, and no message shows the key. Only what asking again may mend is asked again.
"""
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from contextlib import suppress

from files.deadline import deadline
from files.disk import one_line, parse_json
from files.keys import BadInput

WAITS = (0, 1, 2)   # seconds before each attempt of a request; a server may ask for more
REQUEST_S, LARGEST_ANSWER = 60, 2 ** 20     # of one attempt; bytes


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the host that the user named: where that points elsewhere, nobody goes."""
    def redirect_request(self, *_):
        return None     # the answer is then an error, by its code


OPENER = urllib.request.build_opener(NoRedirect)


def request_text(url: str, name: str, prompt: str, tokens: int = 16) -> str:
    """One chat completion at temperature 0; the key goes in a header to that host, nowhere else."""
    address = url.rstrip("/") + "/chat/completions"
    body = {"model": name, "temperature": 0, "max_tokens": tokens,
            "messages": [{"role": "user", "content": prompt}]}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    asked_to_wait = 0
    for seconds in WAITS:
        time.sleep(max(seconds, asked_to_wait))
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            # the timeout is for one byte, the deadline for the whole answer
            with deadline(REQUEST_S), OPENER.open(request, timeout=REQUEST_S) as response:
                data = read_in_time(response)
            if len(data) <= LARGEST_ANSWER:
                return read_answer(data)
            why = f"its answer has more than {LARGEST_ANSWER} bytes"
            break
        except urllib.error.HTTPError as error:
            with error, suppress(OSError, http.client.HTTPException), deadline(REQUEST_S):
                said = one_line(error.read(1000).decode(errors="replace"))
            why = f"HTTP {error.code} {error.reason}" + f": {said}" * bool(said)
            wait = error.headers.get("Retry-After", "0")
            asked_to_wait = int(wait) if wait.isdecimal() and len(wait) < 10 else 0
            if asked_to_wait > REQUEST_S:
                why += f"; it asks for {asked_to_wait} s of patience"
                break
            if error.code not in (408, 429) and error.code < 500:
                break       # wrong address, key or model: asking again will not help
        except (http.client.InvalidURL, ValueError):    # whose text would show the key
            why = "the address or OPENAI_API_KEY holds what cannot be sent"
            break
        except (OSError, http.client.HTTPException) as error:
            why = one_line(getattr(error, "reason", error)) or type(error).__name__
    raise BadInput(f"the judge at {address} (model {name or 'not named'}) does not answer ({why}); "
                   "check judge, judge_model and OPENAI_API_KEY. Replies and verdicts so far are "
                   "kept: the same command goes on from there")


def read_in_time(response: http.client.HTTPResponse) -> bytes:
    """An answer's bytes, one more than allowed at most. In a thread there is no other deadline."""
    data, end = b"", time.monotonic() + REQUEST_S
    while len(data) <= LARGEST_ANSWER and (more := response.read1(2 ** 16)):
        data += more
        if time.monotonic() > end:
            raise TimeoutError(f"it took more than {REQUEST_S} s")
    return data


def read_answer(data: bytes) -> str:
    """The text of a completion; "" for an answer of another form: asked again, then invalid."""
    try:
        text = parse_json(data.decode())["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, ValueError):
        return ""
    return text if isinstance(text, str) else ""

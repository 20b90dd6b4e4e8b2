"""Chat template renderer: a subprocess with limits on time, memory and output.

Chat templates are untrusted programs. transformers' immutable sandbox limits what they can reach,
but not how long they loop or how much memory they fill, and nothing inside a process can stop
`10 ** (10 ** 10)`. The subprocess is reused for the next conversation (starting it takes a second)
and killed when it exceeds a limit. This file is both sides: run as a program it is the renderer,
which imports nothing from specdiff.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 4  # CPU time limit; a conversation takes milliseconds
WAITING = 10  # wall clock limit, as a multiple of SECONDS: the machine may be busy
STARTING = 120.0  # seconds to import transformers on a busy machine
CHARACTERS = 4_000_000  # output limit; no context is that long
MEMORY = 2 << 30  # bytes
CHUNK = 1 << 16  # bytes per read
READY = "ready"


class TemplateError(Exception):
    """The template raised an error, took too long, or wrote too much; the message says which."""


class Renderer:
    """Thread-safe handle on a renderer process, started on first use and ended with this object.

    A renderer process serves only the process that started it: after a fork the child starts its
    own. If two processes shared the pipes, each would read the other's conversations.
    """

    def __init__(self) -> None:
        self._seat = _Seat()

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
        tokens: Mapping[str, Any],
        resume: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the conversation as text.

        Args:
            prompt: append the generation prompt.
            tokens: the tokenizer's special tokens.
            resume: end inside the last message, which the answer continues.
            variables: other template variables (tools, documents, enable_thinking, ...).

        Raises TemplateError.
        """
        seat = self._seat
        if seat.pid != os.getpid():
            # Two threads of a child may both reach this line; each then uses its own process once.
            seat = _Seat()
            self._seat = seat
        conversation = {"conversations": [list(messages)], "chat_template": template}
        ending = {"add_generation_prompt": prompt, "continue_final_message": resume}
        answer = seat.answer({**tokens, **(variables or {}), **conversation, **ending})
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])


class _Seat:
    """A renderer process and the lock of its pipes. A forked child uses neither."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.numbers = itertools.count(1)

    def answer(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The renderer's reply to one request.

        Raises TemplateError if there is no reply, or one to another request.
        """
        with self.lock:
            number = next(self.numbers)
            request = json.dumps({"number": number, "arguments": dict(arguments)})
            process = self.process or self._start()
            self.process = None  # until it has replied
            line = _ask(process, request, WAITING * SECONDS)
            if line is None:
                limits = f"{SECONDS} seconds and {MEMORY >> 30} GiB of memory"
                raise TemplateError(f"it did not end within {limits}")
            answer: dict[str, Any] = json.loads(line)
            if answer.get("number") != number:
                _end(process, self.pid)
                raise TemplateError("the renderer answered another request, and was stopped")
            self.process = process
        return answer

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P: keep this file's folder off sys.path, so that `types` is the standard library's
        command = [sys.executable, "-P", __file__, str(SECONDS)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a fork would inherit a half-full buffer and write it twice
            start_new_session=True,  # not interrupted by Ctrl-C in the terminal
        )
        weakref.finalize(self, _end, process, self.pid)
        if _ask(process, None, STARTING) != READY:
            raise TemplateError("the process that renders templates does not start")
        return process


def _ask(process: "subprocess.Popen[bytes]", line: str | None, seconds: float) -> str | None:
    """Send a line and read one. None if that takes over `seconds`; the process is then killed."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    answer = b""
    try:
        if line is not None:
            _write(process, line.encode() + b"\n")
        answer = _read(process)
    except OSError:  # the process died
        answer = b""
    finally:
        timer.cancel()
        # also after an interrupt: a late reply must not be read as the next one
        if not answer.endswith(b"\n"):
            _end(process, os.getpid())
    return answer[:-1].decode() if answer.endswith(b"\n") else None


def _write(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    assert process.stdin is not None
    rest = memoryview(data)
    while rest:
        rest = rest[process.stdin.write(rest) :]


def _read(process: "subprocess.Popen[bytes]") -> bytes:
    """Read one line; it lacks its newline if the process ended or exceeded the output limit."""
    assert process.stdout is not None
    answer = bytearray()
    while not answer.endswith(b"\n") and len(answer) < 16 * CHARACTERS:
        chunk = process.stdout.read(CHUNK)
        if not chunk:
            break
        answer += chunk
    return bytes(answer)


def _end(process: "subprocess.Popen[bytes]", pid: int) -> None:
    """Close the pipes, and kill the process if `pid`, which started it, is this process.

    A forked child must not kill its parent's renderer.
    """
    if pid == os.getpid():
        process.kill()
        process.wait()
    else:
        process.returncode = 0  # not a child of this process, so there is nothing to wait for
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # unread output
                continue


def _serve(seconds: int) -> None:
    """Run the renderer: one request per line until stdin closes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def rendered(arguments: dict[str, Any]) -> dict[str, str]:
        try:
            text = render_jinja_template(**arguments)[0][0]
        except MemoryError:
            return {"error": f"it takes more than {MEMORY >> 30} GiB of memory"}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        if len(text) > CHARACTERS:
            return {"error": f"it writes more than {CHARACTERS} characters"}
        return {"text": text}

    # warm-up, so that lazy imports do not count against the first conversation
    rendered({"conversations": [[{}]], "chat_template": ""})
    print(READY, flush=True)
    for line in sys.stdin:
        _limit(seconds)
        request = json.loads(line)
        reply = {"number": request["number"], **rendered(request["arguments"])}
        print(json.dumps(reply), flush=True)


def _limit(seconds: int) -> None:
    """Limit memory and CPU time, so that the process ends even if its parent is gone."""
    try:
        import resource
    except ImportError:  # not POSIX: the parent's time limit remains
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + 1 + seconds
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, until)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(
            kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
        )


if __name__ == "__main__":
    _serve(int(sys.argv[1]))

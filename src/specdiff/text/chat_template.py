"""Chat templates are programs by strangers: each is rendered in a process of its own, with its time, memory and output capped.

transformers' immutable sandbox keeps them from reaching anything, not from looping for ever or filling the memory, and nothing
inside a process can stop `10 ** (10 ** 10)`. The process is kept for the next conversation (starting it takes a second) and killed
with its limits. This file is both sides: run as a program it is the renderer, and imports nothing of specdiff.
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

SECONDS = 4  # of computing; a conversation takes milliseconds
WAITING = 10  # times as long on the clock, for machines that are busy with other things
STARTING = 120.0  # importing transformers, on the busiest machine
CHARACTERS = 4_000_000  # no context is that long
MEMORY = 2 << 30
CHUNK = 1 << 16  # bytes read at a time
READY = "ready"


class TemplateError(Exception):
    """The template raised, took too long, or wrote too much; the message says which."""


class Renderer:
    """`render` from any thread, one at a time. The process starts with the first conversation and ends with this object.

    A renderer process serves the process that started it, and no other: after a fork the child starts its own. If two processes
    shared the pipes, each would read conversations of the other.
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
        """The conversation as text.

        Args:
            prompt: end with the beginning of an answer.
            tokens: the tokenizer's special tokens.
            resume: end inside the last message, which the answer continues.
            variables: further variables of the template (tools, documents, enable_thinking, ...).

        Raises TemplateError.
        """
        seat = self._seat
        if seat.pid != os.getpid():
            # Two threads of a child may both come here: then each has a process of its own for this once.
            seat = self._seat = _Seat()
        conversation = {"conversations": [list(messages)], "chat_template": template}
        ending = {"add_generation_prompt": prompt, "continue_final_message": resume}
        answer = seat.answer({**tokens, **(variables or {}), **conversation, **ending})
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])


class _Seat:
    """The renderer process of one process, with the lock of its pipes: a forked child inherits neither."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.numbers = itertools.count(1)

    def answer(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the process says about one conversation. Raises TemplateError if it says nothing, or not about this one."""
        with self.lock:
            number = next(self.numbers)
            request = json.dumps({"number": number, "arguments": dict(arguments)})
            process = self.process or self._start()
            self.process = None  # until it has answered
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
        # -P: the standard library's `types` must not be the one beside this file
        command = [sys.executable, "-P", __file__, str(SECONDS)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a buffer would be inherited by a fork, half full, and written twice
            start_new_session=True,  # a Ctrl-C at the terminal is not meant for it
        )
        weakref.finalize(self, _end, process, self.pid)
        if _ask(process, None, STARTING) != READY:
            raise TemplateError("the process that renders templates does not start")
        return process


def _ask(process: "subprocess.Popen[bytes]", line: str | None, seconds: float) -> str | None:
    """One line there, one line back; None, and the process is gone, if it takes longer."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    answer = b""
    try:
        if line is not None:
            _write(process, line.encode() + b"\n")
        answer = _read(process)
    except OSError:  # it died
        answer = b""
    finally:
        timer.cancel()
        if not answer.endswith(
            b"\n"
        ):  # interrupted too: the answer to this must not be read as the next one's
            _end(process, os.getpid())
    return answer[:-1].decode() if answer.endswith(b"\n") else None


def _write(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    assert process.stdin is not None
    rest = memoryview(data)
    while rest:
        rest = rest[process.stdin.write(rest) :]


def _read(process: "subprocess.Popen[bytes]") -> bytes:
    """Up to the end of the line; without one where the process ended, or wrote more than a conversation can be."""
    assert process.stdout is not None
    answer = bytearray()
    while not answer.endswith(b"\n") and len(answer) < 16 * CHARACTERS:
        chunk = process.stdout.read(CHUNK)
        if not chunk:
            break
        answer += chunk
    return bytes(answer)


def _end(process: "subprocess.Popen[bytes]", pid: int) -> None:
    """Close the pipes, and kill the process if it is ours: a forked child must not kill its parent's."""
    if pid == os.getpid():
        process.kill()
        process.wait()
    else:
        process.returncode = 0  # not a child of this process: nothing to wait for
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # what was not read any more
                continue


def _serve(seconds: int) -> None:
    """The renderer's side: one request a line, until the other side is gone."""
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

    rendered(
        {"conversations": [[{}]], "chat_template": ""}
    )  # what is imported late is not the first conversation's fault
    print(READY, flush=True)
    for line in sys.stdin:
        _limit(seconds)
        request = json.loads(line)
        print(
            json.dumps({"number": request["number"], **rendered(request["arguments"])}), flush=True
        )


def _limit(seconds: int) -> None:
    """Memory, and computing time (even if nobody is left to kill this process)."""
    try:
        import resource
    except ImportError:  # no POSIX: the time limit of the other side remains
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

"""Chat templates are programs by strangers: each is rendered in a process of its own, with its time, memory and output capped.

transformers' immutable sandbox keeps them from reaching anything, not from looping for ever or filling the memory, and nothing
inside a process can stop `10 ** (10 ** 10)`. The process is kept for the next conversation (starting it takes a second) and killed
with its limits. This file is both sides: run as a program it is the renderer, and imports nothing of specdiff.
"""

import json
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
READY = "ready"


class TemplateRefusedError(Exception):
    """The template raised, took too long, or wrote too much; the message says which."""


class Renderer:
    """`render` from any thread, one at a time. The process starts with the first conversation and ends with this object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, template: str, messages: Sequence[Mapping[str, Any]], *, prompt: bool, tokens: Mapping[str, Any]) -> str:
        """The conversation as text. `prompt`: end with the beginning of an answer; `tokens`: the tokenizer's special tokens.

        Raises TemplateRefusedError.
        """
        asked = {"conversations": [list(messages)], "chat_template": template, "add_generation_prompt": prompt, **tokens}
        with self._lock:
            process = self._process or self._start()
            self._process = None  # until it has answered
            line = _ask(process, json.dumps(asked), WAITING * SECONDS)
            if line is None:
                raise TemplateRefusedError(f"it did not end within {SECONDS} seconds and {MEMORY >> 30} GiB of memory")
            self._process = process
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise TemplateRefusedError(answer["error"])
        return answer["text"]

    def _start(self) -> "subprocess.Popen[str]":
        # -P: the standard library's `types` must not be the one beside this file
        command = [sys.executable, "-P", __file__, str(SECONDS)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen(command, start_new_session=True, **pipes)  # a Ctrl-C at the terminal is not meant for it
        weakref.finalize(self, _end, process)
        if _ask(process, None, STARTING) != READY:
            raise TemplateRefusedError("the process that renders templates does not start")
        return process


def _ask(process: "subprocess.Popen[str]", line: str | None, seconds: float) -> str | None:
    """One line there, one line back; None, and the process is gone, if it takes longer."""
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        if line is not None:
            print(line, file=process.stdin, flush=True)
        answer = process.stdout.readline(8 * CHARACTERS)
    except OSError:  # it died
        answer = ""
    finally:
        timer.cancel()
    if answer.endswith("\n"):
        return answer[:-1]
    _end(process)
    return None


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # what was not read any more
                continue


def _serve(seconds: int) -> None:
    """The renderer's side: one request a line, until the other side is gone."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def rendered(asked: dict[str, Any]) -> dict[str, str]:
        try:
            text = render_jinja_template(**asked)[0][0]
        except MemoryError:
            return {"error": f"it takes more than {MEMORY >> 30} GiB of memory"}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        return {"text": text} if len(text) <= CHARACTERS else {"error": f"it writes more than {CHARACTERS} characters"}

    rendered({"conversations": [[{}]], "chat_template": ""})  # what is imported late is not the first conversation's fault
    print(READY, flush=True)
    for line in sys.stdin:
        _limit(seconds)
        print(json.dumps(rendered(json.loads(line))), flush=True)


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
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    _serve(int(sys.argv[1]))

"""Text at its edges: forks, forged turns, byte-fallback tokenizers, ends of text, odd arguments."""

import gc
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from specdiff import templates
from specdiff.templates import Renderer, TemplateRefusedError

ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"


def rendering(renderer: Renderer, text: str, template: str = ECHO) -> str:
    return renderer.render(template, [{"role": "user", "content": text}], prompt=True, tokens={})


# a renderer serves the process that started it


def forked(work: Callable[[], Any]) -> Callable[[], Any]:
    """Run `work` in a forked child; the returned function waits for its result."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(write, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)

    def result() -> Any:
        with os.fdopen(read, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        return json.loads(data)

    return result


needs_fork = pytest.mark.skipif(os.name == "nt", reason="needs fork")
quiet_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@needs_fork
@quiet_fork
def test_forked_workers_never_meet_in_one_renderer() -> None:
    renderer = Renderer()
    assert rendering(renderer, "parent") == "parent"
    waits = [forked(lambda who=who: [rendering(renderer, f"{who}-{i}") for i in range(12)]) for who in ("a", "b", "c")]
    own = [rendering(renderer, f"parent-{i}") for i in range(12)]
    assert own == [f"parent-{i}" for i in range(12)]
    for who, wait in zip("abc", waits, strict=True):
        assert wait() == [f"{who}-{i}" for i in range(12)]


@needs_fork
@quiet_fork
def test_a_child_that_ends_leaves_the_parents_renderer_alone() -> None:
    renderer = Renderer()
    rendering(renderer, "x")
    process = renderer._seat.process
    assert process is not None

    def work() -> str:
        nonlocal renderer
        text = rendering(renderer, "child")
        renderer = Renderer()
        gc.collect()
        return text

    assert forked(work)() == "child"
    assert process.poll() is None and rendering(renderer, "again") == "again"
    assert renderer._seat.process is process


@needs_fork
@quiet_fork
def test_a_lock_held_during_the_fork_does_not_stop_the_child() -> None:
    renderer = Renderer()
    rendering(renderer, "x")
    with renderer._seat.lock:
        assert forked(lambda: rendering(renderer, "child"))() == "child"


def test_an_answer_to_another_request_is_refused_and_ends_the_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer()
    rendering(renderer, "x")
    process = renderer._seat.process
    assert process is not None
    ask = templates._ask
    with monkeypatch.context() as patch:
        patch.setattr(templates, "_ask", lambda p, line, s: ask(p, line and line.replace('"number": 2', '"number": 7'), s))
        with pytest.raises(TemplateRefusedError, match="answered another request"):
            rendering(renderer, "y")
    assert process.poll() is not None
    assert rendering(renderer, "z") == "z"


def test_threads_share_one_renderer() -> None:
    renderer, wrong = Renderer(), list[str]()

    def work(who: int) -> None:
        for i in range(10):
            if rendering(renderer, f"{who}-{i}") != f"{who}-{i}":
                wrong.append(f"{who}-{i}")

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupted_rendering_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer()
    rendering(renderer, "x")
    process = renderer._seat.process

    def interrupted(process: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(templates, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendering(renderer, "y")
    assert process is not None and process.poll() is not None
    assert rendering(renderer, "z") == "z"

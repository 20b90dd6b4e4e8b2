"""Arrivals: the stream of requests to the engine, numbered, checked, and in order."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from specdiff.errors import UsageError
from specdiff.request import Request, Slot
from specdiff.targets.base import Target
from specdiff.types import check_grammar


class Arrivals:
    """The stream of requests, numbered and checked: a sequence at once, others when pulled."""

    def __init__(
        self,
        requests: Iterable[Request | None],
        slots: int,
        target: Target[Any],
        longest: int,
    ) -> None:
        self.stream = iter(requests)
        self.slots = slots
        self.target = target
        self.longest = longest  # draft
        self.index = 0
        self.next: Slot | None = None  # the first request, which found no room
        self.checked = isinstance(requests, Sequence)
        if self.checked:
            for index, request in enumerate(r for r in requests if r is not None):
                self._check(index, request)

    def take(self, count: int, fit: Callable[[Sequence[Slot]], bool]) -> list[Slot]:
        """The next requests, at most `count`, as long as they `fit` together."""
        joining: list[Slot] = []
        while len(joining) < count and (slot := self._pull()) is not None:
            if not fit([*joining, slot]):
                self.next = slot
                break
            joining.append(slot)
        return joining

    def drop(self, requests: Sequence[int]) -> None:
        """Forget a request that has found no room yet."""
        if self.next is not None and self.next.index in requests:
            self.next = None

    def _pull(self) -> Slot | None:
        slot = self.next
        self.next = None
        if slot is not None:
            return slot
        request = next(self.stream, None)
        if request is None:
            return None
        if not self.checked:
            self._check(self.index, request)
        slot = Slot(self.index, request)
        self.index += 1
        return slot

    def _check(self, index: int, request: Request) -> None:
        check([request], self.target, index, longest=self.longest)
        if len(request.prompt) + request.params.max_tokens > self.slots:
            raise UsageError(
                f"request {index} may reach {len(request.prompt)} + {request.params.max_tokens} "
                f"tokens, but slots are {self.slots}",
                param="slots",
            )


def check(
    requests: Iterable[Request], target: Target[Any], first: int = 0, *, longest: int | None = None
) -> None:
    """Raise UsageError for a request that the target cannot serve.

    That is a prompt without tokens, one that may reach past the target's positions, an option
    that names a token outside the vocabulary, one that no grammar goes with, or a draft length
    that is not in [0, `longest`]. `first` is the number of the first request.
    """
    size = target.info.vocab_size
    positions = target.info.max_positions
    for index, request in enumerate(requests, first):
        params = request.params
        if request.grammar is not None:
            check_grammar(params)
        if not request.prompt:
            raise UsageError(f"prompt {index} holds no tokens; give at least one", param="prompt")
        if len(request.prompt) + params.max_tokens > positions:
            raise UsageError(
                f"request {index} may reach {len(request.prompt)} + {params.max_tokens} tokens, "
                f"but the target has {positions} positions; shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        draft_len = request.draft_len
        if draft_len is not None and longest is not None and not 0 <= draft_len <= longest:
            raise UsageError(
                f"draft_len must be in [0, {longest}], not {draft_len} (0: no drafts)",
                param="draft_len",
            )
        options = {
            "logit_bias": [token for token, _ in params.logit_bias],
            "allowed_token_ids": params.allowed_token_ids or (),
        }
        for option, ids in options.items():
            if ids and max(ids) >= size:
                raise UsageError(
                    f"{option} names token id {max(ids)}, "
                    f"which is outside the target's vocabulary of {size}",
                    param=option,
                )

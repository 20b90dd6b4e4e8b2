"""Errors as answers: OpenAI's JSON shape, and the status code of each kind of error."""

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from specdiff import strict_json
from specdiff.errors import SpecdiffError, TargetError, UsageError
from specdiff.serve import payloads
from specdiff.serve.live import EngineStoppedError, MemoryFullError, QueueFullError

RETRY_SECONDS = 1
UNAVAILABLE = (QueueFullError, EngineStoppedError, MemoryFullError)


class RequestTimeoutError(SpecdiffError):
    """A request took longer than the server allows, waiting included."""


def answer(code: int, message: str, param: str | None = None) -> Response:
    """An error. 503 asks the client to try again."""
    kind = "invalid_request_error" if code < 500 else "server_error"
    headers = {}
    if code == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if code == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    body = strict_json.dumps(payloads.error(message, kind, param=param, code=code))
    return Response(body, code, headers, media_type="application/json")


def status(error: Exception) -> int:
    """The status code of an error that was raised on purpose."""
    if isinstance(error, UsageError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, RequestTimeoutError):
        return HTTPStatus.REQUEST_TIMEOUT
    if isinstance(error, UNAVAILABLE):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.INTERNAL_SERVER_ERROR


def register(app: FastAPI) -> None:
    """Let `app` answer errors in this shape. The guard answers unexpected ones."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    for kind in (UsageError, *UNAVAILABLE, RequestTimeoutError, TargetError):
        app.add_exception_handler(kind, _failed)


async def _failed(request: Request, error: Exception) -> Response:
    return answer(status(error), str(error), error.param if isinstance(error, UsageError) else None)


async def _refused(request: Request, error: Exception) -> Response:
    """No such path, or another method; and bodies that cannot be parsed at all."""
    assert isinstance(error, HTTPException)
    return answer(error.status_code, str(error.detail))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return answer(400, f"the body is not valid JSON (at character {first['loc'][-1]})")
    param = ".".join(str(part) for part in first["loc"][1:2]) or None
    return answer(400, f"{param or 'body'}: {first['msg']}", param)

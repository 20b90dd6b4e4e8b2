"""The playground: a static page that shows the rounds of an answer, through the API alone.

The page needs no key, so that it can ask for one; it holds no data of the server.
"""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

ASSETS = "/static"
HEADERS = {
    # nothing inline, nothing from elsewhere, not inside another page
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Assets(StaticFiles):
    """Static files with the page's headers."""

    async def get_response(self, path: str, scope: Any) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def is_open(path: str) -> bool:
    """Whether `path` belongs to the page, which is served without a key."""
    return path == "/" or path.startswith(f"{ASSETS}/")


def mount(app: FastAPI) -> None:
    """Serve the page at / and its scripts and styles below /static."""
    folder = str(files("specdiff.serve") / "static")

    async def page() -> Response:
        return FileResponse(f"{folder}/index.html", headers=HEADERS)

    app.add_api_route("/", page, response_model=None, include_in_schema=False)
    app.mount(ASSETS, Assets(directory=folder))

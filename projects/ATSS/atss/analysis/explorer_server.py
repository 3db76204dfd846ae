"""A server on this machine that answers the page of the explorer."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from ..errors import UserError
from .explorer import Explorer
from .explorer_page import TITLE, start_data
from .template import render

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise UserError(f"the server needs {error.name}: pip install starlette uvicorn") from error

HOST = "127.0.0.1"
LONGEST = 4096  # side of pictures, in pixels


def serve(explorer: Explorer, image: int, rules: Sequence[str], port: int) -> None:
    """Answer a browser on this machine, until ctrl-C."""
    uvicorn.run(make_app(explorer, image, rules), host=HOST, port=port, log_level="warning")


def make_app(explorer: Explorer, image: int, rules: Sequence[str]) -> Starlette:
    lock = Lock()  # rules share the machine's cores, and the explorer's caches

    def answers(compute: Callable[..., Any], *names: str) -> Callable:
        """Return an endpoint that calls ``compute`` with parameters of the address: "rule" a
        text, others whole numbers."""

        def call(values: list) -> Any:
            with lock:
                return compute(*values)

        async def endpoint(request: Request) -> Response:
            values = [_parameter(request, name) for name in names]
            if "rule" in names:
                explorer.check_limits(values[names.index("rule")])
            found = await run_in_threadpool(call, values)
            if isinstance(found, bytes):
                return Response(found, media_type="image/jpeg")
            return JSONResponse(found)

        return endpoint

    html = render("explorer.html", title=TITLE, data=start_data(explorer, image, rules))
    of_rule = ("image", "rule", "weights")
    endpoints = {
        "/image": answers(explorer.about_image, "image"),
        "/picture": answers(lambda number: explorer.picture(number, LONGEST), "image"),
        "/rule": answers(explorer.about_rule, *of_rule),
        "/object": answers(explorer.about_object, *of_rule, "object"),
        "/detections": answers(explorer.detections, "image", "weights"),
    }
    return Starlette(
        routes=[
            Route("/", lambda request: HTMLResponse(html)),
            *(Route(path, endpoint) for path, endpoint in endpoints.items()),
        ],
        # Pages of other sites reach 127.0.0.1 by names of their own.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
        exception_handlers={
            HTTPException: lambda _, e: JSONResponse({"error": e.detail}, e.status_code),
            UserError: lambda _, e: JSONResponse({"error": str(e)}, 400),
            OSError: lambda _, e: JSONResponse({"error": str(e)}, 400),
            MemoryError: lambda _, e: JSONResponse({"error": "not enough memory"}, 400),
            Exception: lambda _, e: JSONResponse({"error": "the rule failed: see the log"}, 500),
        },
    )


def _parameter(request: Request, name: str) -> Any:
    value = request.query_params.get(name, "")
    if name == "rule":
        return value
    digits = value.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise UserError(f"{name} must be a whole number, got {value[:40]!r}")
    return int(value)

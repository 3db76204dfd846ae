"""The explorer: a page that holds its answers, or a server on this machine that computes them."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import UserError
from .explorer import Explorer, check_rule, rule_arguments
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
except ImportError:
    uvicorn = None

HOST = "127.0.0.1"
# Longest side of pictures in pixels, on the server's page and in a page of its own.
LONGEST, LONGEST_INSIDE = 4096, 1333


def write_page(explorer: Explorer, images: Sequence[str], rules: Sequence[str], page: Path) -> None:
    """Write a page that needs no server, with all answers about some images and rules.

    Raises:
        UserError: for an unknown image or rule, or missing weights.
        OSError: if the page cannot be written.
    """
    answers: dict[str, Any] = {}
    numbers = [explorer.find(image) for image in images]
    checkpoints = range(max(len(explorer.weights), 1))
    for i, number in enumerate(numbers):
        jpeg = base64.b64encode(explorer.picture(number, LONGEST_INSIDE)).decode()
        answers[f"picture|{i}"] = f"data:image/jpeg;base64,{jpeg}"
        answers[f"image|{i}"] = about = explorer.about_image(number)
        for weights in checkpoints:
            if explorer.weights:
                answers[f"detections|{i}|{weights}"] = explorer.detections(number, weights)
            for rule in rules:
                key = f"{i}|{rule}|{weights}"
                answers[f"rule|{key}"] = explorer.about_rule(number, rule, weights)
                for k in range(len(about["boxes"])):
                    values = explorer.about_object(number, rule, weights, k)
                    answers[f"object|{key}|{k}"] = values
    data = _start(explorer, 0, rules) | {"answers": answers, "texts": list(rules)}
    data["images"] = [_name(explorer.records[number]) for number in numbers]
    page.write_text(render("explorer.html", title="Assignment explorer", data=data), "utf-8")


def serve(explorer: Explorer, image: int, rules: Sequence[str], port: int) -> None:
    """Answer a browser on this machine, until ctrl-C.

    Raises:
        UserError: if Starlette or uvicorn is missing.
    """
    if uvicorn is None:
        raise UserError("the explorer's server needs: pip install starlette uvicorn")
    uvicorn.run(make_app(explorer, image, rules), host=HOST, port=port, log_level="warning")


def make_app(explorer: Explorer, image: int, rules: Sequence[str]) -> "Starlette":
    known = rule_arguments(explorer.cfg)
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
                check_rule(values[names.index("rule")], known)
            found = await run_in_threadpool(call, values)
            if isinstance(found, bytes):
                return Response(found, media_type="image/jpeg")
            return JSONResponse(found)

        return endpoint

    html = render("explorer.html", title="Assignment explorer", data=_start(explorer, image, rules))
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


def _parameter(request: "Request", name: str) -> Any:
    value = request.query_params.get(name, "")
    if name == "rule":
        return value
    digits = value.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise UserError(f"{name} must be a whole number, got {value[:40]!r}")
    return int(value)


def _name(record: dict) -> str:
    return Path(record["file_name"]).name


def _start(explorer: Explorer, image: int, rules: Sequence[str]) -> dict[str, Any]:
    return {
        "images": [_name(record) for record in explorer.records],
        "classes": explorer.classes,
        "rules": rule_arguments(explorer.cfg),
        "weights": [Path(x).name for x in explorer.weights],
        "image": image,
        "start": [*rules, ""][:2],
        "answers": None,
    }

"""Detections over HTTP, with an exported file, and a page to drop images on.

python -m atss_runner.serve model.onnx
curl --data-binary @photo.jpg http://127.0.0.1:8000/detect
"""

import argparse
import asyncio
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from .detections import Detections
from .detector import load
from .media import FileError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(f"the server needs {error.name}: pip install starlette uvicorn") from error

# Others are refused: Pillow starts a program for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
BODY_SECONDS = 60.0  # to send an image


class Job(NamedTuple):
    """A request that waits for the detector.

    Attributes:
        image: its header is read, its pixels are not decoded.
        answer: the detections or an error.
    """

    request: Request
    image: Image.Image
    answer: asyncio.Future


@dataclass
class Service:
    """A detector, and the requests that wait for it.

    Args:
        detector: list of (H, W, 3) BGR images -> list of :class:`Detections`; with ``names`` of
            the classes.
        model: name of the file.
        batch: images in one call of the detector.
        waiting: requests at a time, from their first byte to their answer; more are refused.
        max_bytes: of an image file.
        max_pixels: of an image, and of all images of a call but the first.
    """

    detector: Any
    model: str
    batch: int = 4
    waiting: int = 32
    max_bytes: int = 16_000_000
    max_pixels: int = 25_000_000
    num_requests: int = field(default=0, init=False)
    jobs: deque[Job] = field(default_factory=deque, init=False)
    arrived: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def health(self, request: Request) -> Response:
        answer = {"model": self.model, "classes": list(self.detector.names)}
        ready = self.num_requests < self.waiting
        return JSONResponse({**answer, "ready": ready, "requests": self.num_requests})

    async def detect(self, request: Request) -> Response:
        if self.num_requests >= self.waiting:
            await read_body(request, 0)
            sentence = f"{self.waiting} requests are waiting: try again in a second"
            raise HTTPException(503, sentence, {"Retry-After": "1"})
        self.num_requests += 1
        try:
            image = await self._receive(request)
            job = Job(request, image, asyncio.get_running_loop().create_future())
            self.jobs.append(job)
            self.arrived.set()
            found: Detections = await job.answer
        finally:
            self.num_requests -= 1
        answer = {name: values.tolist() for name, values in found._asdict().items()}
        return JSONResponse(answer | {"names": [self.detector.names[k] for k in found.classes]})

    async def _receive(self, request: Request) -> Image.Image:
        body = await read_body(request, self.max_bytes)
        if body is None:
            raise HTTPException(413, f"the limit is {self.max_bytes} bytes per image")
        # In a thread: a header may have a million entries.
        return await run_in_threadpool(open_image, body, self.max_pixels)

    async def work(self) -> None:
        """Answer waiting requests, in batches, until cancelled."""
        with ThreadPoolExecutor(1) as thread:
            while True:
                await self.arrived.wait()
                await self._answer(self._next_batch(), thread)

    def _next_batch(self) -> list[Job]:
        jobs = [self.jobs.popleft()]
        pixels = num_pixels(jobs[0].image)
        while self.jobs and len(jobs) < self.batch:
            pixels += num_pixels(self.jobs[0].image)
            if pixels > self.max_pixels:
                break
            jobs.append(self.jobs.popleft())
        if not self.jobs:
            self.arrived.clear()
        return jobs

    async def _answer(self, jobs: list[Job], thread: ThreadPoolExecutor) -> None:
        for job in jobs:
            if await job.request.is_disconnected() and not job.answer.done():
                job.answer.set_exception(ClientDisconnect())
        jobs = [job for job in jobs if not job.answer.done()]
        images = [job.image for job in jobs]
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(thread, detect_images, self.detector, images)
        for job, result in zip(jobs, results, strict=True):
            if job.answer.done():  # cancelled
                continue
            if isinstance(result, Exception):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)


async def read_body(request: Request, limit: int) -> bytearray | None:
    """Return the body of a request; None if it has more bytes than ``limit``.

    The rest of a large body is read and dropped: many clients read the answer only after they have
    sent everything.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                body += chunk
                if size > limit:
                    body.clear()
    except TimeoutError:
        if size <= limit:
            sentence = f"the image did not arrive within {BODY_SECONDS:g} seconds"
            raise HTTPException(408, sentence) from None
    return body if size <= limit else None


def open_image(body: bytearray, max_pixels: int) -> Image.Image:
    """Read the header of an image."""
    try:
        image = Image.open(BytesIO(body), formats=FORMATS)
    except UnidentifiedImageError:
        sentence = f"the body is no image: send a file as it is, not a form; {', '.join(FORMATS)}"
        raise HTTPException(415, sentence) from None
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise FileError(f"cannot read the image: {error}") from error
    if num_pixels(image) > max_pixels:
        size = f"{image.width} x {image.height} pixels"
        raise HTTPException(413, f"the image has {size}, the limit is {max_pixels} pixels")
    return image


def num_pixels(image: Image.Image) -> int:
    return image.width * image.height


def detect_images(detector: Any, images: list[Image.Image]) -> list[Detections | Exception]:
    """Decode images, and detect on those that can be decoded in one call."""
    results: list[Any] = []
    for image in images:
        try:
            results.append(detector.read(image))
        except FileError as error:
            results.append(error)
        except Exception as error:
            results.append(FileError(f"cannot read the image: {error}"))
        finally:
            image.close()
    found = iter(call(detector, [x for x in results if isinstance(x, np.ndarray)]))
    return [next(found) if isinstance(x, np.ndarray) else x for x in results]


def call(detector: Any, arrays: list[np.ndarray]) -> list[Detections | Exception]:
    """Call the detector; if it fails, image by image, so that an image does not fail others."""
    try:
        return detector(arrays)
    except Exception as error:
        return [error] if len(arrays) == 1 else [call(detector, [x])[0] for x in arrays]


def make_app(service: Service) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(service.work())
        yield
        worker.cancel()

    page = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
    return Starlette(
        routes=[
            Route("/", lambda request: HTMLResponse(page)),
            Route("/health", service.health),
            Route("/detect", service.detect, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: lambda _, e: JSONResponse({"error": e.detail}, e.status_code, e.headers),
            FileError: lambda _, e: JSONResponse({"error": str(e)}, 400),
            ClientDisconnect: lambda _, e: Response(status_code=499),
            Exception: lambda _, e: JSONResponse(
                {"error": "the detector failed: see the log"}, 500
            ),
        },
        lifespan=lifespan,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m atss_runner.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="a file of tools/export.py")
    add("--host", default="127.0.0.1", help="0.0.0.0: every network (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="0: a free one (default: 8000)")
    add("--threads", type=int, default=0, help="of the engine (default: all cores)")
    add("--batch", type=int, default=4, help="images in one call of the detector (default: 4)")
    add("--waiting", type=int, default=32, help="requests at a time (default: 32)")
    add("--limit-megabytes", type=int, default=16, help="of an image file (default: 16)")
    add("--limit-megapixels", type=int, default=25, help="of an image (default: 25)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    try:
        for name in ("batch", "waiting", "limit_megabytes", "limit_megapixels"):
            if (value := getattr(args, name)) < 1:
                raise FileError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
        detector = load(args.model, args.threads, args.batch)
    except OSError as error:
        sys.exit(f"error: {error}")
    limits = (args.limit_megabytes * 1_000_000, args.limit_megapixels * 1_000_000)
    service = Service(detector, Path(args.model).name, args.batch, args.waiting, *limits)
    Image.MAX_IMAGE_PIXELS = None  # --limit-megapixels replaces Pillow's limit
    # uvicorn answers the accepted requests, then raises the signal again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(make_app(service), host=args.host, port=args.port)


if __name__ == "__main__":
    main()

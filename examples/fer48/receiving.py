"""Receive pictures over HTTP: one as the body, or several as multipart files, never more than the limits allow."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

FORM, BYTES = "multipart/form-data", "application/octet-stream"


@dataclass(frozen=True)
class Limits:
    """The most that a request may hold: bytes, pictures, pixels of a picture, and faces detected in a picture."""

    body: int = 16 * 2**20
    pictures: int = 64
    pixels: int = 25_000_000
    faces: int = 64


class RefusedError(Exception):
    """A request is refused, with this HTTP status; the message says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def receive_pictures(request: Request, limits: Limits) -> list[bytes]:
    """Return the pictures of a request, undecoded.

    Raises:
        RefusedError: If the request is empty, too large or of another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("", FORM, BYTES) and not kind.startswith("image/"):
        raise RefusedError(415, f"Send a picture as image/* or {BYTES}, or several as {FORM}.")
    declared = request.headers.get("content-length", "0")
    if len(declared) > len(str(limits.body)) or int(declared) > limits.body:
        raise _too_large(limits)
    limited = Request(request.scope, _limit(request.receive, limits))
    try:
        pictures = await _files(limited, limits) if kind == FORM else [await limited.body()]
    except ClientDisconnect as error:
        raise RefusedError(400, "The connection was closed before the body was complete.") from error
    if not pictures or not all(pictures):
        raise RefusedError(400, "There is no picture in the request, or an empty one.")
    return pictures


async def _files(request: Request, limits: Limits) -> list[bytes]:
    """Return the files of a form."""
    try:
        async with request.form(max_files=limits.pictures, max_fields=0) as form:
            return [await part.read() for _, part in form.multi_items() if not isinstance(part, str)]
    except MultiPartException as error:
        raise RefusedError(400, f"The form cannot be read: {error.message}") from error
    except (LookupError, ValueError) as error:  # what Starlette lets through for a damaged form
        raise RefusedError(400, "The form cannot be read.") from error


def _limit(receive: Receive, limits: Limits) -> Receive:
    """Return ``receive``, which now refuses a body that is longer than allowed, whatever length it declared."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limits.body:
            raise _too_large(limits)
        return message

    return limited


def _too_large(limits: Limits) -> RefusedError:
    return RefusedError(413, f"The body is larger than {limits.body:,} bytes.")

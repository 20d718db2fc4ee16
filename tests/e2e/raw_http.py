"""HTTP as bytes over a socket: what no client would send."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import NamedTuple
from urllib.parse import urlsplit

# Against hanging for ever, not a measure of speed
PATIENCE_SECONDS = 60
ROUTES = (
    "/flashmemory/stats",
    "/flashmemory/status",
    "/flashmemory/requests",
    "/flashmemory/requests/a",
    "/flashmemory",
)

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_RESET = struct.pack("ii", 1, 0)


@contextmanager
def connection(url: str) -> Iterator[socket.socket]:
    """A connection to a server, closed in any case."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), PATIENCE_SECONDS) as raw:
        yield raw


class Sent(NamedTuple):
    """What goes over a connection.

    Attributes:
        name: what is wrong with it.
        data: the bytes.
        is_whole: the server closes the connection by itself. Otherwise it would wait for more, and has to be told that
            none follows, which it takes for the end of a client that wants no answer.
    """

    name: str
    data: bytes
    is_whole: bool = True


def exchange(url: str, sent: Sent) -> bytes:
    """Send bytes and read until the server closes."""
    with connection(url) as raw:
        try:
            raw.sendall(sent.data)
            if not sent.is_whole:
                raw.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: raw.recv(1 << 16), b""))
        except ConnectionError:
            # It has heard enough: as good an answer as any
            return b""


def abort(raw: socket.socket) -> None:
    """End a connection with a reset, as a client that crashes."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    raw.close()


def statuses(answer: bytes) -> list[int]:
    """Status codes of the answers in a stream of bytes."""
    return [int(code) for code in _STATUS.findall(answer)]


def request(
    method: str, path: str, body: bytes = b"", headers: tuple[bytes, ...] = (), *, length: int | None = None
) -> bytes:
    """A request that ends its connection, with a length that may be a lie."""
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), b"Host: a", b"Connection: close", *headers]
    if body or length is not None:
        lines += [
            b"Content-Type: application/json",
            f"Content-Length: {len(body) if length is None else length}".encode(),
        ]
    return b"\r\n".join((*lines, b"", body))


def completion(prompt: str, max_tokens: int, *, stream: bool, close: bool = True) -> bytes:
    """A completion by the OpenAI API that no end token stops."""
    fields = {"model": "reference", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body = json.dumps(fields | {"stream": stream, "ignore_eos": True}).encode()
    sent = request("POST", "/v1/completions", body)
    return sent if close else sent.replace(b"Connection: close\r\n", b"")


def malformed(random: Random) -> Iterator[Sent]:
    """Requests that are none, each with its name."""
    for route in ROUTES:
        good = request("GET", route)
        yield Sent(f"half of {route}", good[: random.randrange(1, len(good) - 1)], is_whole=False)
        yield Sent(f"one byte of {route} is another", _with_another_byte(good, random), is_whole=False)
        yield Sent(f"no version at {route}", f"GET {route}\r\n\r\n".encode(), is_whole=False)
        yield Sent(f"unknown version at {route}", f"GET {route} HTTP/9.9\r\nHost: a\r\n\r\n".encode())
        yield Sent(f"a header without a colon at {route}", request("GET", route, headers=(b"no colon",)))
        yield Sent(f"a header of NUL at {route}", request("GET", route, headers=(b"X-A: \x00\xff",)))
        yield Sent(f"a header of 1 MiB at {route}", request("GET", route, headers=(b"X-A: " + b"a" * (1 << 20),)))
        yield Sent(f"5,000 headers at {route}", request("GET", route, headers=(b"X-A: a",) * 5000))
        yield Sent(
            f"two lengths at {route}", request("GET", route, headers=(b"Content-Length: 1", b"Content-Length: 2"))
        )
        yield Sent(f"a negative length at {route}", request("POST", route, length=-1))
        chunked = request("POST", route, headers=(b"Transfer-Encoding: chunked",))
        yield Sent(f"a bad chunk at {route}", chunked + b"zz\r\n\r\n")
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PRI", "get"):
            yield Sent(f"{method} {route}", request(method, route, b"{}"))
    for path in ("/flashmemory/requests/" + "a" * 50_000, "/flashmemory/requests/%00%ff%fe", "/flashmemory/requests/%"):
        yield Sent(f"path {path[:40]}", request("GET", path))
    for path in (
        "/flashmemory/../../etc/passwd",
        "/flashmemory/%2e%2e/%2e%2e/etc/passwd",
        "/flashmemory//app.js",
        "//",
        "*",
    ):
        yield Sent(f"path {path}", request("GET", path))
    for query in ("?a=%ff", "?" + "a=1&" * 5_000, "?\x01"):
        yield Sent(f"query {query[:20]!r}", request("GET", f"/flashmemory/status{query}"))
    for _ in range(40):
        yield Sent("bytes at random", random.randbytes(random.randrange(1, 400)) + b"\r\n\r\n", is_whole=False)
    yield Sent("TLS", bytes.fromhex("16030100a5010000a10303") + random.randbytes(120), is_whole=False)


def bad_bodies(random: Random) -> Iterator[Sent]:
    """Completions whose body is not one, each with its name."""
    good = json.dumps({"model": "reference", "prompt": "a", "max_tokens": 1}).encode()
    for path in ("/v1/completions", "/v1/chat/completions"):
        yield Sent(f"nothing to {path}", request("POST", path, b"", length=0))
        yield Sent(f"no JSON to {path}", request("POST", path, b"{" * 20))
        yield Sent(f"deep JSON to {path}", request("POST", path, b"[" * 100_000))
        yield Sent(f"no UTF-8 to {path}", request("POST", path, b'{"model": "\xff\xfe\x80"}'))
        yield Sent(f"half a surrogate to {path}", request("POST", path, b'{"model": "reference", "prompt": "\\ud800"}'))
        yield Sent(f"another type to {path}", request("POST", path, b'[1, null, "a"]'))
        yield Sent(f"a number without end to {path}", request("POST", path, b'{"max_tokens": ' + b"9" * 5_000 + b"}"))
        yield Sent(f"less than promised to {path}", request("POST", path, good, length=len(good) + 500), is_whole=False)
        yield Sent(f"more than promised to {path}", request("POST", path, good, length=len(good) - 5))
        yield Sent(f"half to {path}", request("POST", path, good[: random.randrange(1, len(good))]))


def _with_another_byte(sent: bytes, random: Random) -> bytes:
    changed = bytearray(sent)
    changed[random.randrange(len(sent))] = random.randrange(256)
    return bytes(changed)

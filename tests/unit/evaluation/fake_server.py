"""The part of the OpenAI API that benchmarks use, answered by a function."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

MODEL = "fake"
MAX_MODEL_LEN = 8192


class FakeServer:
    """Serves `MODEL` inside of a `with` block.

    Args:
        answer: text for the prompt of a completion or of the last message; an exception is a server error.
        max_model_len: as told to clients; None is not told.

    Attributes:
        requests: path and body of every request that was answered, in order.
    """

    def __init__(self, answer: Callable[[str], str], max_model_len: int | None = MAX_MODEL_LEN) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.card = {"id": MODEL, "object": "model", "created": 0, "owned_by": "test", "max_model_len": max_model_len}
        self._answer = answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeServer":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One answer, in the form of the path that asked."""
        chat = path.endswith("/chat/completions")
        text = self._answer(body["messages"][-1]["content"] if chat else body["prompt"])
        self.requests.append((path, body))
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {"id": "0", "object": "completion", "created": 0, "model": MODEL, "choices": [choice]}

    def page(self, path: str) -> str:  # noqa: ARG002 - for those that serve several
        """Text of what is read, whatever the path: the list of models."""
        return json.dumps({"object": "list", "data": [self.card]})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, server.page(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    self._send(200, json.dumps(server.complete(self.path, body)))
                except ValueError as error:
                    self._send(400, json.dumps({"error": {"message": str(error)}}))

            def _send(self, status: int, content: str) -> None:
                data = content.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        return Handler

"""The server block against stand-ins for `vllm serve`: ready, failing, hanging, and stopped every time."""

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmemory_vllm.cli.server import Server
from flashmemory_vllm.errors import FlashMemoryError

SERVING = """
    import http.server, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = {
                "/health": b"",
                "/metrics": b'x_total{engine="0"} 3.0\\nx_total{engine="1"} 4.0\\n'
                b'vllm:cache_config_info{block_size="32"} 1.0\\n',
            }[self.path]
            self.send_response(200); self.end_headers(); self.wfile.write(body)
        def do_POST(self):
            if self.path == "/collective_rpc":
                asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self.send_response(200); self.end_headers()
                return self.wfile.write(b'{"results": ["' + str(len(asked)).encode() + b'", "5"]}')
            self.send_response(500); self.end_headers(); self.wfile.write(b"too long")
        def log_message(self, *args): pass
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def make_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Server]:
    """Make a server whose `vllm` executable runs the given code."""

    def make(code: str, startup_seconds: float = 30) -> Server:
        vllm = tmp_path / "vllm"
        note_pid = f"import os, pathlib; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
        vllm.write_text(f"#!{sys.executable}\n{note_pid}\n{textwrap.dedent(code)}")
        vllm.chmod(0o755)
        for name in ("config.json", "reference.yaml"):
            (tmp_path / name).write_text("{}")
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        return Server(tmp_path, tmp_path / "reference.yaml", startup_seconds)

    return make


def _is_running(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_the_block_starts_when_the_server_is_healthy_and_stops_it(
    make_server: Callable[[str], Server], tmp_path: Path
) -> None:
    with make_server(SERVING) as server:
        assert server.read_metrics()["x_total"] == 7
        assert server.read_block_size() == 32
        assert server.call_workers("count") == [str(len('{"method": "count"}')), "5"]
        assert not server.has_ended()
        assert _is_running(tmp_path)
    assert not _is_running(tmp_path)


def test_an_error_inside_the_block_stops_the_server(make_server: Callable[[str], Server], tmp_path: Path) -> None:
    with pytest.raises(FlashMemoryError, match="status 500: too long"), make_server(SERVING) as server:
        server.complete([1, 2], max_tokens=1)
    assert not _is_running(tmp_path)


def test_a_server_that_dies_is_told_with_the_end_of_its_log(make_server: Callable[[str], Server]) -> None:
    dying = "import sys; print('no such model'); sys.exit(3)"
    with pytest.raises(FlashMemoryError, match="ended with code 3\nno such model"), make_server(dying):
        pytest.fail("the block must not be entered")


def test_a_server_that_never_gets_healthy_is_stopped(make_server: Callable[..., Server], tmp_path: Path) -> None:
    hanging = make_server("import time; time.sleep(600)", startup_seconds=1.5)
    with pytest.raises(FlashMemoryError, match="was not up after"), hanging:
        pytest.fail("the block must not be entered")
    assert not _is_running(tmp_path)

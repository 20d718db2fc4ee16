"""Serving scenarios in `flashmemory bench`: chosen, refused and printed without vLLM, servers by a stand-in."""

import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from flashmemory_vllm.benchmark.serving_rows import load_serving_rows, save_serving_rows
from flashmemory_vllm.cli import app
from flashmemory_vllm.cli.serving_table import serving_tables, speed_page
from tests.unit.benchmark.serving_twins import make_result, make_serving_row

CONFIGS = Path(__file__).parents[3] / "configs" / "bench"
SMOKE, OTHER = str(CONFIGS / "serving-smoke.yaml"), str(CONFIGS / "smoke.yaml")
DOCS = Path(__file__).parents[3] / "docs"

# `vllm serve` refuses fp8, ends at the first prompt where it offloads, and answers everything else;
# `vllm bench serve` saves a result
VLLM = f"""
    import http.server, json, os, socket, sys, time
    def value(name): return sys.argv[sys.argv.index(name) + 1]
    if sys.argv[1] == "bench":
        with open(value("--result-dir") + "/" + value("--result-filename"), "w") as file:
            json.dump({make_result()!r}, file)
        sys.exit()
    config = open(value("--config")).read()
    if "kv-cache-dtype: fp8" in config:
        sys.exit("ValueError: fp8 is not for this device")
    print("plugins", os.environ["VLLM_PLUGINS"], "flashmemory" in config.replace("flashmemory_vllm", ""))
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body):
            self.send_response(200); self.end_headers(); self.wfile.write(body)
        def do_GET(self):
            self.answer(b"vllm:num_preemptions_total 2.0\\n" if self.path == "/metrics" else b"")
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/collective_rpc" and "kv-offloading-size" in config:
                print("RuntimeError: out of memory", flush=True)
                self.connection.shutdown(socket.SHUT_RDWR); time.sleep(0.5); os._exit(1)
            rpc, text = b'{{"results": ["4096"]}}', b'{{"choices": [{{"text": "x"}}]}}'
            self.answer(rpc if self.path == "/collective_rpc" else text)
        def log_message(self, *args): pass
    http.server.ThreadingHTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def _vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own `vllm` beside the Python that runs."""
    program, python = tmp_path / "vllm", tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{textwrap.dedent(VLLM)}")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for file in (program, python):
        file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_vllm")
def test_a_row_for_each_server_and_the_reason_where_one_refuses_or_ends(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", SMOKE, "--engines", "fp8,offload,stock,flashmemory", "--out", "rows.json", "--log", "log"]
    assert app.main([*command, "--commit", "c"]) == 0
    rows = {row.engine: row for row in load_serving_rows(Path("rows.json"))}
    assert list(rows) == ["fp8", "offload", "stock", "flashmemory"]
    assert rows["fp8"].error == "ValueError: fp8 is not for this device"
    assert rows["offload"].error == "RuntimeError: out of memory"
    for name in ("stock", "flashmemory"):
        assert (rows[name].error, rows[name].goodput_per_s, rows[name].device_kv_bytes) == (None, 1.5, 4096)
    log = Path("log").read_text().splitlines()
    assert [line for line in log if line.startswith("plugins")] == [
        *(["plugins  False"] * 2),
        "plugins flashmemory True",
    ]
    assert "### serving-smoke (model, 0.125 GiB for KV), goodput at 500 ms a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([SMOKE, OTHER, "--out", "rows.json"], "several kinds"),
        ([SMOKE, "--out", "rows.json", "--plot", "p.png"], "no picture of serving scenarios"),
        ([SMOKE, "--out", "rows.json", "--engines", "ideal"], "--engines has 'ideal': allowed is stock, fp8, "),
        ([SMOKE, "--out", "rows.json", "--only", "x/y"], "--only has 'x/y': allowed is serving-smoke/concurrent"),
        ([SMOKE, SMOKE, "--out", "rows.json"], "scenarios named serving-smoke twice"),
        ([SMOKE, "--out", "rows.json", "--set", "itl_limit_ms=0"], "itl_limit_ms"),
        (["missing.yaml", "--out", "rows.json"], "missing.yaml cannot be read"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.main(["bench", *arguments]) == app.EXIT_USER_ERROR
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rows_are_printed_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_serving_rows(tmp_path / "rows.json", [make_serving_row(goodput_per_s=7.0)])
    assert app.main(["bench", "--table", str(tmp_path / "rows.json")]) == 0
    assert "| l | flashmemory |  |  | 7 |" in capsys.readouterr().out


def test_the_page_of_speeds_shows_rows_of_servers_only_where_there_are_some(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "p1.json").write_bytes((DOCS / "benchmarks" / "p1.json").read_bytes())
    before = speed_page(tmp_path)
    assert serving_tables(tmp_path) == ""
    save_serving_rows(tmp_path / "benchmarks" / "serving.json", [make_serving_row(goodput_per_s=7.0)])
    page = speed_page(tmp_path)
    assert page.startswith(before)
    assert "| l | flashmemory |  |  | 7 |" in page
    assert page.endswith(
        "Rows: [serving.json](../benchmarks/serving.json), from\n\n- GPU, , commit abc: `flashmemory bench`\n"
    )


def test_the_smoke_scenario_is_quick() -> None:
    (load,) = yaml.safe_load(Path(SMOKE).read_text())["loads"]
    assert load["requests"] * load["prompt_tokens"] < 10_000

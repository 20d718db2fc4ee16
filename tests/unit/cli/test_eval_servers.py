"""The two servers of an evaluation: one file makes both, and nothing of ours is in the dense one."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from flashmemory_vllm.cli import eval_servers
from flashmemory_vllm.cli.eval_servers import (
    ServerChoice,
    dense_config,
    read_config,
    sparse_config,
    split_arguments,
)
from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.eval_rows import Side
from tests.unit.evaluation.eval_fakes import FakeEngine
from tests.unit.evaluation.fake_server import MODEL

FILE = {
    "model": "m",
    "block-size": 32,
    "attention-backend": "flashmemory",
    "kv-cache-memory-bytes": 100,
    "additional-config": {"flashmemory": {"resident_ratio": 0.2, "selector": "mean"}, "other": {"x": 1}},
}


def choice(side: Side, url: str | None = None) -> ServerChoice:
    return ServerChoice(side, "org/model", MODEL, url, {"block-size": 32}, ["--dtype", "half"], 5)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(FILE))
    return read_config(path)


def test_the_dense_server_gets_nothing_of_ours(config: dict[str, Any]) -> None:
    assert dense_config(config, None) == {"block-size": 32, "additional-config": {"other": {"x": 1}}}
    assert dense_config({}, 7) == {"kv-cache-memory-bytes": 7}


def test_options_given_go_over_those_of_the_file(config: dict[str, Any]) -> None:
    merged = sparse_config(config, '{"flashmemory": {"resident_ratio": 0.5}}')
    assert merged["additional-config"] == {
        "flashmemory": {"resident_ratio": 0.5, "selector": "mean"},
        "other": {"x": 1},
    }
    assert merged["kv-cache-memory-bytes"] == 100
    assert "model" not in merged
    assert sparse_config({}, None) == {"attention-backend": "flashmemory"}


@pytest.mark.parametrize("text", ["no", "[]", '{"flashmemory": 3}'])
def test_malformed_options_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--additional-config is .*: allowed is a JSON object"):
        sparse_config({}, text)


@pytest.mark.parametrize("text", ["- 1", "a: [", None])
def test_a_file_without_options_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"--config is .*serve\.yaml"):
        read_config(path)


def test_arguments_are_split_as_a_shell_does() -> None:
    assert split_arguments("--serve-args", "--dtype 'a b'") == ["--dtype", "a b"]
    assert split_arguments("--serve-args", None) == []
    with pytest.raises(ConfigError, match='--serve-args is "\'"'):
        split_arguments("--serve-args", "'")


def test_servers_that_differ_are_described_differently() -> None:
    assert choice("dense").description == 'vllm serve org/model --dtype half with {"block-size": 32}'
    assert choice("dense", "http://there").description == "http://there"


def test_a_running_server_is_used(tmp_path: Path) -> None:
    with FakeEngine(lambda _: [1]) as server, choice("dense", server.url).running(tmp_path) as target:
        assert (target.url, target.model) == (server.url, MODEL)
    assert list(tmp_path.iterdir()) == []


class Started:
    """Takes the place of a server that is started; listens where the class says, and notes what it was given."""

    url = ""
    given: ClassVar[list[Any]] = []

    def __init__(self, *arguments: Any) -> None:
        self.given[:] = arguments

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        self.given.append("stopped")


@pytest.mark.parametrize(("side", "plugins"), [("dense", ""), ("sparse", "kept")])
def test_what_a_server_is_started_with(
    side: Side, plugins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense server is started without any plugin of vLLM; what it reads is left to be read again."""
    monkeypatch.setenv("VLLM_PLUGINS", "kept")
    monkeypatch.setattr(eval_servers, "Server", Started)
    with FakeEngine(lambda _: [1], share=None if side == "dense" else 0.1) as server:
        monkeypatch.setattr(Started, "url", server.url)
        with choice(side).running(tmp_path / "out") as target:
            assert target.side == side
    model, file, seconds, environment, *rest = Started.given
    assert (model, seconds, rest[:2]) == ("org/model", 5, [["--dtype", "half"], MODEL])
    assert rest[2:] == [tmp_path / "out" / f"serve-{side}.log", "stopped"]
    assert yaml.safe_load(file.read_text()) == {"block-size": 32}
    assert file == tmp_path / "out" / f"serve-{side}.yaml"
    assert environment["VLLM_PLUGINS"] == plugins


def test_a_failure_is_told_with_the_log_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not an option that does not fit, of which the log knows nothing."""
    monkeypatch.setattr(eval_servers, "Server", Started)
    with FakeEngine(lambda _: [1]) as server:
        monkeypatch.setattr(Started, "url", server.url)
        with pytest.raises(FlashMemoryError, match=r"^no answer; what the server printed is in .*serve-dense\.log$"):
            fail(choice("dense"), tmp_path, FlashMemoryError("no answer"))
        assert Started.given[-1] == "stopped"
        with pytest.raises(ConfigError, match=r"^too long$"):
            fail(choice("dense"), tmp_path, ConfigError("too long"))


def fail(server: ServerChoice, folder: Path, error: Exception) -> None:
    with server.running(folder):
        raise error

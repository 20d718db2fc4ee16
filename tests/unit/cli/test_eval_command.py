"""`flashmemory eval` reads its command line, refuses what it cannot do, and judges by exit code."""

import argparse
from pathlib import Path

import pytest

from flashmemory_vllm.cli import app
from flashmemory_vllm.cli.eval import choose_servers
from flashmemory_vllm.cli.eval_parts import depths_of, make_parts, read_ruler_tasks
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import target as target_module
from flashmemory_vllm.evaluation.eval_rows import SIDES, Evaluation, Side, load_evaluation, save_evaluation
from flashmemory_vllm.evaluation.needles import NeedlePart
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.ruler import OFFLINE_TASKS
from flashmemory_vllm.evaluation.standard_parts import LongBenchPart, RulerPart
from flashmemory_vllm.evaluation.target import FORCED_TOKENS
from flashmemory_vllm.reference import reference_model_path
from tests.unit.evaluation.eval_fakes import FakeEngine, make_eval_row
from tests.unit.evaluation.fake_server import MODEL

SHIPPED = str(reference_model_path())
PROVENANCE = Provenance("flashmemory eval", "abc", "none", {})
URLS = ("--base-url", "http://sparse", "--dense-url", "http://dense")


def parse(*arguments: str) -> argparse.Namespace:
    return app.build_parser().parse_args(["eval", "--out", "out", *arguments])


def saved(folder: Path, sparse_score: float) -> Path:
    servers: dict[Side, str] = {"dense": "d", "sparse": "s"}
    scores = {"dense": 1.0, "sparse": sparse_score}
    save_evaluation(folder, Evaluation("m", servers, [make_eval_row(side, score=scores[side]) for side in SIDES]))
    return folder


def test_each_suite_makes_its_parts(tmp_path: Path) -> None:
    questions = tmp_path / "questions.json"
    questions.write_text("[]")
    given = ("--suites", "ruler,parity,longbench,needles", "--longbench", str(questions), "--lengths", "8192,4096")
    parts = make_parts(parse(*given, "--ruler-tasks", "ruler_vt", "--depths", "3"), SHIPPED, PROVENANCE)
    assert [part.name for part in parts] == [
        *("ruler_vt 4096", "ruler_vt 8192"),
        *("parity 4096", "parity 8192"),
        "longbench",
        *("needles 4096", "needles 8192"),
    ]
    ruler, needles, longbench = parts[0].measurable, parts[5].measurable, parts[4].measurable
    assert isinstance(ruler, RulerPart)
    assert (ruler.tokenizer, ruler.limit, ruler.folder) == (SHIPPED, 50, Path("out/ruler"))
    assert isinstance(needles, NeedlePart)
    assert needles.depths == [0.0, 0.5, 1.0]
    assert isinstance(longbench, LongBenchPart)
    assert longbench.options.limit == 50


def test_the_shipped_model_is_asked_in_its_language_by_default() -> None:
    parts = make_parts(parse(), SHIPPED, PROVENANCE)
    assert {part.settings["language"] for part in parts} == {"reference"}
    assert [part.name for part in parts] == [
        f"{suite} {tokens}" for suite in ("parity", "needles") for tokens in (4096, 8192, 16384)
    ]


def test_depths_are_even() -> None:
    assert [depths_of(count) for count in (1, 2, 4)] == [[0.5], [0.0, 1.0], [0.0, 0.3333, 0.6667, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suites", "needle"), "--suites has 'needle': allowed is parity, loss, needles, ruler, longbench"),
        (("--suites", "longbench"), "--longbench is None"),
        (("--longbench", "x"), "--longbench is x and --suites is 'parity,needles'"),
        (("--suites", "longbench", "--longbench", "gone.json"), r"--longbench is gone\.json: there is no such file"),
        (("--suites", "loss"), "--texts is not given and --suites is 'loss': allowed are files with the suite loss"),
        (("--texts", "x"), "--texts is x and --suites is 'parity,needles'"),
        (("--suites", "loss", "--texts", "x", "--loss-tokens", "1"), "--loss-tokens is 1: allowed is 2 or more"),
        (
            ("--suites", "loss", "--texts", "gone.txt"),
            r"--texts: gone\.txt \(.*\) is given; allowed are files of UTF-8",
        ),
        (("--lengths", "4k"), "--lengths is '4k': allowed are integers from 1 up"),
        (
            ("--suites", "ruler", "--lengths", "1024"),
            "--lengths has 1024: allowed with the suite ruler are 2048 or more",
        ),
        (("--depths", "0"), "--depths is 0: allowed is 1 or more"),
        (("--parity-prompts", "-1"), "--parity-prompts is -1: allowed is 1 or more"),
        (("--seed", "-1"), "--seed is -1: allowed is 0 or more"),
        (("--tokenizer", "/nowhere"), "tokenizer is '/nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_parts(parse(*arguments), SHIPPED, PROVENANCE)


def test_tasks_that_need_a_download_are_named() -> None:
    assert read_ruler_tasks(None) == list(OFFLINE_TASKS)
    assert read_ruler_tasks("ruler_vt, ruler_qa_squad") == ["ruler_vt", "ruler_qa_squad"]
    with pytest.raises(ConfigError, match=r"--ruler-tasks has 'vt': allowed without a download are .*, with one niah_"):
        read_ruler_tasks("vt")


def test_the_shipped_model_has_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    servers = choose_servers(parse("--dense-args", "--seed 1", "--serve-args", "--dtype half"), SHIPPED)
    assert list(servers) == ["dense", "sparse"]
    dense, sparse = servers.values()
    assert sparse.config["additional-config"]["flashmemory"]["resident_ratio"] == 0.135
    assert "attention-backend" not in dense.config
    assert (dense.config["block-size"], dense.config["max-model-len"]) == (32, 33792)
    assert (dense.arguments, sparse.arguments) == (["--dtype", "half", "--seed", "1"], ["--dtype", "half"])
    assert dense.name == SHIPPED


def test_servers_that_are_to_be_forced_can_be() -> None:
    servers = choose_servers(parse("--suites", "needles, loss"), "org/model").values()
    assert [server.all_arguments for server in servers] == [["--logits-processors", FORCED_TOKENS]] * 2
    others = choose_servers(parse("--suites", "needles"), "org/model").values()
    assert [server.all_arguments for server in others] == [[]] * 2
    assert [one.description for one in servers] == [one.description for one in others], "loss may come on top"


def test_another_model_has_none() -> None:
    dense, sparse = choose_servers(parse("--served-model-name", "n"), "org/model").values()
    assert (dense.config, sparse.config, sparse.name) == ({}, {"attention-backend": "flashmemory"}, "n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*URLS, "--config", "x.yaml"), "--config: given for a server that runs already"),
        ((*URLS[:2], "--additional-config", "{}"), "--additional-config: given for a server"),
        ((*URLS[2:], "--dense-args", "x"), "--dense-args: given for a server"),
        ((*URLS, "--dense-from", "x"), "--dense-from: given with --dense-url"),
        (("--config", "gone.yaml"), r"--config is gone\.yaml"),
    ],
)
def test_an_option_for_a_server_that_is_not_started_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_servers(parse(*arguments), "org/model")


@pytest.mark.parametrize(("score", "code"), [(1.0, 0), (0.98, 1)])
def test_the_gate_is_the_exit_code(score: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, score)
    assert app.main(["eval", "--report", str(folder), "--min-relative", "0.99"]) == code
    assert app.main(["eval", "--report", str(folder)]) == 0
    said = capsys.readouterr()
    assert ("asked is 0.99 of the dense score or more: needles needle at 4,096 tokens" in said.err) is bool(code)
    assert f"needles needle at 4,096 tokens: dense 1.000, sparse {score:.3f}" in said.out
    assert (folder / "report.html").is_file()


def test_a_gate_without_anything_to_judge_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_evaluation(tmp_path, Evaluation("m", {"dense": "d", "sparse": "s"}))
    assert app.main(["eval", "--report", str(tmp_path), "--min-relative", "0.99"]) == 1
    assert "no line is both sparse and answered" in capsys.readouterr().err


def test_a_limit_by_which_nothing_was_judged_fails_though_another_one_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, 1.0)
    assert app.main(["eval", "--report", str(folder), "--min-relative", "0.99", "--max-loss", "0.1"]) == 1
    told = "gate failed, no line is both sparse and answered for a loss of at most 0.1 nats a token above dense\n"
    assert capsys.readouterr().err == told
    assert "Gate: failed" in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "nowhere"], "eval.json does not exist"),
        (["--report", "nowhere", "--max-loss", "nan"], "--max-loss is nan: allowed is a finite number"),
        (["--report", "nowhere", "--min-relative", "1.5"], "--min-relative is 1.5: allowed is a number > 0 and <= 1"),
    ],
)
def test_user_errors_are_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_running_servers_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the report, over HTTP; no answer is right, so the gate has nothing to judge."""
    monkeypatch.setattr(target_module, "SETTLE_SECONDS", 0)
    out = tmp_path / "out"
    with FakeEngine(lambda ids: ids[:4]) as dense, FakeEngine(lambda ids: ids[:4], share=0.2) as sparse:
        command = ["eval", "--out", str(out), "--base-url", sparse.url, "--dense-url", dense.url]
        command += ["--served-model-name", MODEL, "--lengths", "1024,2048", "--questions", "2", "--depths", "2"]
        command += ["--parity-prompts", "2", "--parity-tokens", "4", "--min-relative", "0.99", "--commit", "abc"]
        assert app.main(command) == 1
        num_asked = len(dense.requests), len(sparse.requests)
        assert app.main(command) == 1
        assert (len(dense.requests), len(sparse.requests)) == num_asked == (2 * (4 + 4), 2 * (2 + 4))
        assert app.main([*command[:3], *command[5:], "--dense-from", str(tmp_path / "gone")]) == 2
    evaluation = load_evaluation(out)
    assert evaluation is not None
    assert evaluation.servers == {"dense": dense.url, "sparse": sparse.url}
    assert {row.resident_share for row in evaluation.rows} == {None, 0.2}
    assert {row.commit for row in evaluation.rows} == {"abc"}
    assert "| 1,024 | sparse | 2 | 100.0% | 100.0% |" in (out / "report.md").read_text(encoding="utf-8")

"""What a reader in float32 finds in a text: the rounding of who wrote it, and nothing of its own."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashmemory_vllm.cli import soak_worker
from flashmemory_vllm.soak.adapter import write_adapter
from flashmemory_vllm.soak.drive import Text
from flashmemory_vllm.soak.judge import Query
from flashmemory_vllm.soak.process import SoakFolder
from flashmemory_vllm.soak.reader import TextReader
from tests.unit.soak.traces import trace

PROMPT = tuple(range(3, 40))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are not numbers of 16 bits, and an adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).save_pretrained(path)
    write_adapter(path, path / "adapter", 1)
    return path


def _model(folder: Path, dtype: torch.dtype = torch.float32, *, is_adapted: bool = False) -> torch.nn.Module:
    """The model as an engine of a dtype has it, in float64."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.double()
    if is_adapted:
        tensors = {name: one.to(dtype).double() for name, one in load_file(folder / "adapter" / WEIGHTS).items()}
        for name in (one for one in tensors if "lora_A" in one):
            weight = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
            weight.data += tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    return model


@torch.no_grad()
def _expected(model: torch.nn.Module, query: Query) -> list[float]:
    """Each token after all that goes before it, in a pass of its own."""
    found = []
    for place in range(len(query.prompt) - query.max_tokens, len(query.prompt)):
        likely = model(torch.tensor([query.prompt[:place]])).logits[0, -1].log_softmax(0)
        found.append(float(likely.max() - likely[query.prompt[place]]))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_token_is_weighed_after_those_before_it_with_the_weights_of_the_engine(folder: Path, dtype: str) -> None:
    queries = [Query(PROMPT, 0, 5), Query(PROMPT[5:], 1, 30), Query(PROMPT[::-1], 0, 1)]
    kind = getattr(torch, dtype)
    models = [_model(folder, kind, is_adapted=bool(query.adapter)) for query in queries]
    found = TextReader(folder, [folder / "adapter"], dtype, "cpu").deficits(queries)
    for query, model, deficits in zip(queries, models, found, strict=True):
        assert deficits == pytest.approx(_expected(model, query), abs=1e-3)
    assert max(map(max, found)) > 1


def test_what_the_model_itself_would_write_is_the_likeliest_and_an_adapter_leaves_no_trace(folder: Path) -> None:
    reader = TextReader(folder, [folder / "adapter"], "float16", "cpu")
    model, text = _model(folder, torch.float16), PROMPT
    with torch.no_grad():
        for _ in range(6):
            text = (*text, int(model(torch.tensor([text])).logits[0, -1].argmax()))
    ours, others = Query(text, 0, 6), [Query(PROMPT, adapter, 30) for adapter in (0, 1)]
    assert reader.deficits([ours]) == [[0.0] * 6]
    without, adapted = reader.deficits(others)
    assert without != pytest.approx(adapted, abs=0.1)
    assert reader.deficits([ours, others[0]]) == [[0.0] * 6, without]
    assert reader.deficits([]) == []


def test_what_is_no_number_is_none_here(folder: Path, tmp_path: Path) -> None:
    """A judge that got 0 for it would call everything right."""
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (deficits,) = TextReader(tmp_path, [], "float32", "cpu").deficits([Query(PROMPT, 0, 2)])
    assert not any(one <= 100 for one in deficits)


def test_texts_are_read_after_the_engine_is_gone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float16 phase without adapters: one text has a token that no rounding chooses."""
    drawn = trace(num_requests=4, adapters=0, dtype="float16")
    events: list[str] = []

    class Reference:
        def __init__(self, arguments: dict[str, object], adapters: Sequence[Path]) -> None:
            events.append(f"{arguments['dtype']} {len(adapters)}")

        def generate(self, queries: Sequence[Query]) -> list[list[int]]:
            return [[7] * one.max_tokens for one in queries]

        def close(self) -> None:
            events.append("closed")

    class Reader:
        def __init__(self, *arguments: object) -> None:
            assert arguments == (folder, [], "float16", "cpu")

        def deficits(self, queries: Sequence[Query]) -> list[list[float]]:
            events.append("read")
            return [[0.0 if token == 7 else 0.07 for token in one.prompt[-one.max_tokens :]] for one in queries]

    # The worker imports it late: it needs vLLM
    monkeypatch.setitem(sys.modules, "flashmemory_vllm.plugin.soak_engine", SimpleNamespace(DenseReference=Reference))
    monkeypatch.setattr(soak_worker, "TextReader", Reader)
    kept = SoakFolder(tmp_path)
    kept.begin(drawn)
    kept.write("job", {"model": str(folder), "indexer": None, "seconds": None, "memory_gib": 1.0, "device": "cpu"})
    for request in drawn.requests:
        tokens = [7] * request.max_tokens
        tokens[-1] = 8 if request is drawn.requests[1] else 7
        kept.keep(Text(request.name, 0, tuple(tokens)))
    soak_worker.main(tmp_path, "judge")
    verdict = kept.read("verdict")
    assert events == ["float16 0", "closed", "read", "read"]
    assert verdict is not None
    assert (verdict["texts"], verdict["identical"], verdict["token_differences"]) == (4, 3, 1)
    assert (verdict["largest_deficit"], verdict["control_deficit"], verdict["tolerance"]) == (0.07, 0.0, 0.0625)

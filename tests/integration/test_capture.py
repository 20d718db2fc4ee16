"""`flashmemory capture` of the reference model on real vLLM, against the attention that transformers computes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flashmemory_vllm.capture.document import LEAST_MASS, LEAST_SHARE
from flashmemory_vllm.capture.labels import block_mass
from flashmemory_vllm.capture.reference_prompts import reference_prompts
from flashmemory_vllm.evaluation.tasks import TASK_NAMES, make_samples
from flashmemory_vllm.reference import reference_model_path
from tests.helpers.engine import RESULT_MARK, EngineRun, engine_environment, run_engine
from tests.helpers.modules import run_module

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

MODEL = reference_model_path()
BLOCK_SIZE, CHUNK_SIZE, ANCHORS = 32, 4, (1, 3, 4)
DOCUMENTS, TOKENS, SEED = 10, 1024, 5
PROMPTS = reference_prompts(DOCUMENTS, TOKENS, SEED, 512)
# Half a unit in the last place of a float16 that is just below 1
HALF_ERROR = 2.5e-4
KV_BYTES = 1 << 28
Tensors = dict[str, Any]


def run_command(arguments: list[str], stdin: str = "") -> str:
    """Run a module in a process of its own; its standard output."""
    module, *rest = arguments
    return run_module(module, engine_environment(EngineRun(MODEL, [], 1)), rest, stdin)


def capture(folder: Path) -> Path:
    """Run the command on ten documents, four at a time."""
    options: dict[str, object] = {
        "out": folder,
        "documents": DOCUMENTS,
        "tokens": TOKENS,
        "seed": SEED,
        "batch": 4,
        "block-size": BLOCK_SIZE,
        "dtype": "float32",
        "gpu-memory-bytes": KV_BYTES,
    }
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    anchors = ["--anchor-layers", *map(str, ANCHORS)]
    run_command(["flashmemory_vllm.cli.app", "capture", "--layer-mass", *given, *anchors])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished capture."""
    return capture(tmp_path_factory.mktemp("capture"))


@pytest.fixture(scope="module")
def documents(folder: Path) -> list[Tensors]:
    """Its documents."""
    (shard,) = json.loads((folder / "index.json").read_text())["shards"]
    assert shard["documents"] == DOCUMENTS
    found = load_file(folder / shard["file"])
    names = {name.partition(".")[2] for name in found}
    return [
        {name: found[f"doc{index}.{name}"] for name in names if f"doc{index}.{name}" in found}
        for index in range(DOCUMENTS)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What transformers says of one document: shares [T, L, Hq, n] and keys [L, Hkv, tokens, D]."""

    shares: torch.Tensor
    keys: torch.Tensor


@pytest.fixture(scope="module")
def truths(documents: list[Tensors]) -> list[Truth]:
    """The same texts through the eager attention of transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager", dtype=torch.float32)
    found = []
    for prompt, document in zip(PROMPTS, documents, strict=True):
        ids = [*prompt.ids, *document["outputs"].tolist()[:-1]]
        with torch.inference_mode():
            output = model(torch.tensor([ids]), output_attentions=True, use_cache=True)
        weights = torch.cat(output.attentions)[:, :, len(prompt.ids) - 1 :]  # [L, Hq, T, tokens]
        padded = torch.nn.functional.pad(weights, (0, -len(ids) % BLOCK_SIZE))
        shares = padded.view(*padded.shape[:-1], -1, BLOCK_SIZE).sum(-1).permute(2, 0, 1, 3)
        found.append(Truth(shares, torch.cat([layer.keys for layer in output.past_key_values.layers])))
    return found


def test_the_same_command_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = capture(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert (
        names
        == sorted(path.name for path in again.iterdir())
        == [
            "index.json",
            "meta.json",
            "shard-00000.safetensors",
        ]
    )
    for name in ("index.json", "shard-00000.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    meta, other = (json.loads((path / "meta.json").read_text()) for path in (folder, again))
    assert meta["provenance"].pop("command") != other["provenance"].pop("command")
    assert meta == other


def test_along_its_own_text_a_model_attends_to_what_it_did_while_it_wrote_it(
    documents: list[Tensors], tmp_path: Path
) -> None:
    """One prefill of prompt and text, in chunks, in place of decode steps; with anchors of a first look."""
    prompts, out, some = tmp_path / "prompts.jsonl", tmp_path / "out", documents[:4]
    lines = [
        {"prompt_ids": prompt.ids, "forced_ids": document["outputs"].tolist()}
        for prompt, document in zip(PROMPTS, some, strict=False)
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    given = ["--prompts", str(prompts), "--out", str(out), "--batch", "2", "--block-size", str(BLOCK_SIZE)]
    memory = ["--dtype", "float32", "--gpu-memory-bytes", str(KV_BYTES)]
    run_command(["flashmemory_vllm.cli.app", "capture", *given, *memory])
    assert 2 in json.loads((out / "meta.json").read_text())["anchor_layers"]
    found = load_file(out / "shard-00000.safetensors")
    for index, document in enumerate(some):
        along = {name: found[f"doc{index}.{name}"] for name in ("positions", "outputs", "mass_ptr", "mass_ids", "mass")}
        assert np.array_equal(along["positions"], document["positions"])
        assert np.array_equal(along["outputs"], document["outputs"])
        np.testing.assert_allclose(_dense(along), _dense(document), rtol=0, atol=2 * LEAST_MASS)


def _dense(document: Tensors) -> np.ndarray[Any, Any]:
    """Masses [T, n] of a document."""
    dense = np.zeros((len(document["positions"]), int(document["positions"].max()) // BLOCK_SIZE + 1))
    rows = np.repeat(np.arange(len(dense)), np.diff(document["mass_ptr"]))
    dense[rows, document["mass_ids"]] = document["mass"]
    return dense


def test_recording_changes_no_token(documents: list[Tensors]) -> None:
    engine = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": TOKENS + 150,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": KV_BYTES,
    }
    stock = run_engine(EngineRun(MODEL, [[list(prompt.ids) for prompt in PROMPTS]], 150, engine=engine))
    for document, text in zip(documents, stock.tokens[0], strict=True):
        outputs = document["outputs"].tolist()
        assert outputs == text[: len(outputs)]


def test_masses_are_those_of_transformers(documents: list[Tensors], truths: list[Truth]) -> None:
    for prompt, document, truth in zip(PROMPTS, documents, truths, strict=True):
        num_tokens = len(document["outputs"])
        assert document["positions"].tolist() == list(range(len(prompt.ids) - 1, len(prompt.ids) - 1 + num_tokens))
        by_layer = truth.shares.mean(2)
        mean, most = torch.from_numpy(document["layer_mass"]).float()
        torch.testing.assert_close(mean, by_layer, rtol=0, atol=HALF_ERROR)
        torch.testing.assert_close(most, truth.shares.amax(2), rtol=0, atol=HALF_ERROR)
        for token, expected in enumerate(by_layer.mean(1)):
            entries = slice(*document["mass_ptr"][token : token + 2])
            dense = torch.zeros_like(expected)
            dense[document["mass_ids"][entries]] = torch.from_numpy(document["mass"][entries]).float()
            torch.testing.assert_close(dense, expected, rtol=1e-3, atol=LEAST_MASS)
            cut_off = LEAST_MASS * len(dense)
            assert 1 - cut_off - 1e-3 < float(dense.sum()) < 1 + 1e-3


def test_largest_shares_are_those_of_transformers(documents: list[Tensors], truths: list[Truth]) -> None:
    total = 0
    for document, truth in zip(documents, truths, strict=True):
        for token, position in enumerate(document["positions"].tolist()):
            largest = truth.shares[token].amax((0, 1))[: position // BLOCK_SIZE]
            entries = slice(*document["share_ptr"][token : token + 2])
            dense = torch.zeros_like(largest)
            dense[document["share_ids"][entries]] = torch.from_numpy(document["share"][entries]).float()
            torch.testing.assert_close(dense, largest, rtol=1e-3, atol=LEAST_SHARE)
            total += 1
    assert total > 300


def test_keys_and_queries_are_those_of_the_anchor_layers(documents: list[Tensors], truths: list[Truth]) -> None:
    for document, truth in zip(documents, truths, strict=True):
        num_full = truth.keys.shape[2] // BLOCK_SIZE
        full = truth.keys[list(ANCHORS), :, : num_full * BLOCK_SIZE]
        chunks = full.view(*full.shape[:2], -1, CHUNK_SIZE, full.shape[-1]).transpose(1, 2)  # [A, n * C, Hkv, 4, D]
        pooled = torch.stack((chunks.amax(3), chunks.amin(3), chunks.mean(3)), dim=3)
        torch.testing.assert_close(torch.from_numpy(document["keys"]).float(), pooled, rtol=2e-3, atol=2e-3)
        # Queries that lead to the attention of the model are its queries
        token = len(document["positions"]) - 1
        num_tokens = int(document["positions"][token]) + 1
        for anchor, layer in enumerate(ANCHORS):
            keys = torch.nn.functional.pad(truth.keys[layer], (0, 0, 0, -num_tokens % BLOCK_SIZE))
            query = torch.from_numpy(document["queries"][token, anchor])
            at = torch.tensor([[num_tokens - 1]])
            found = block_mass(query[None, None], _blocks(keys)[None], at, 64**-0.5)[0, 0]
            torch.testing.assert_close(found, truth.shares[token, layer], rtol=0, atol=0.01)


def _blocks(keys: torch.Tensor) -> torch.Tensor:
    """Keys [..., Hkv, tokens, D] as [..., n, Hkv, BLOCK_SIZE, D]."""
    *outer, heads, _, head_dim = keys.shape
    return keys.reshape(*outer, heads, -1, BLOCK_SIZE, head_dim).transpose(-4, -3)


def test_the_needle_is_looked_at_where_its_value_is_written(documents: list[Tensors]) -> None:
    wanted = 0
    for number, (prompt, document) in enumerate(zip(PROMPTS, documents, strict=True)):
        sample = make_samples(TASK_NAMES[number % len(TASK_NAMES)], len(prompt.ids), 1, SEED)[0]
        assert tuple(sample.prompt_ids.tolist()) == prompt.ids
        assert document["outputs"].tolist() == sample.answer_ids.tolist()
        first, last = document["answer"].tolist()
        entries = slice(document["share_ptr"][first], document["share_ptr"][last + 1])
        looked_at = set(document["share_ids"][entries][document["share"][entries] > 0.5].tolist())
        for start, stop in sample.needle_spans:
            assert looked_at & set(range(start // BLOCK_SIZE, (stop - 1) // BLOCK_SIZE + 1))
            wanted += 1
    assert wanted >= DOCUMENTS


@pytest.mark.parametrize(("groups", "aggregate"), [(1, "max"), (3, "max"), (1, "mean")])
def test_the_oracle_answers_from_few_blocks(folder: Path, groups: int, aggregate: str) -> None:
    """Twice in one engine: each request is told from the others that ask the same."""
    options = {
        "resident_ratio": 0.3,
        "min_sparse_tokens": 0,
        "sink_tokens": BLOCK_SIZE,
        "recent_tokens": BLOCK_SIZE,
        "tau_steps": 16,
        "layer_groups": groups,
        "aggregate": aggregate,
        "check_integrity": True,
    }
    engine = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": TOKENS + 150,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": KV_BYTES,
        "enforce_eager": True,
    }
    request = {
        "capture": str(folder),
        "model": str(MODEL),
        "engine": engine,
        "options": options,
        "limits": [prompt.max_tokens for prompt in PROMPTS],
        "rounds": [[prompt.ids for prompt in PROMPTS]] * 2,
    }
    output = run_command(["tests.integration.oracle_main"], json.dumps(request))
    (marked,) = [line for line in output.splitlines() if line.startswith(RESULT_MARK)]
    result = json.loads(marked.removeprefix(RESULT_MARK))
    right = [
        sample.answer_ids.tolist()
        for number, prompt in enumerate(PROMPTS)
        for sample in make_samples(TASK_NAMES[number % len(TASK_NAMES)], len(prompt.ids), 1, SEED)
    ]
    for answers in result["answers"]:
        assert sum(map(np.array_equal, answers, right)) >= DOCUMENTS - 1
    counted = result["counters"]
    assert counted["decode_resident_blocks_total"] < 0.4 * counted["decode_context_blocks_total"]

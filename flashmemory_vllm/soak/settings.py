"""What a soak asks of an engine: sizes that force blocks to come and go, and how much of everything."""

from dataclasses import dataclass
from typing import Any, Literal

from flashmemory_vllm.errors import ConfigError

Phase = Literal["dense", "sparse"]
Runner = Literal["v1", "v2"]
Device = Literal["cpu", "cuda"]
PHASES: tuple[Phase, ...] = ("dense", "sparse")
RUNNERS: tuple[Runner, ...] = ("v1", "v2")
Scheduling = Literal["sync", "async"]
SCHEDULING: tuple[Scheduling, ...] = ("sync", "async")


@dataclass(frozen=True, slots=True)
class SoakSettings:
    """How an engine is loaded.

    Attributes:
        phase: "dense" keeps every block of a request at a resident ratio of 1 and compares its text; "sparse" keeps
            few, and judges answers.
        runner: vLLM's model runner.
        is_async: a step is scheduled before the one before it has returned.
        seed: of the trace.
        num_requests: requests at most.
        prompt_tokens: least and most tokens of a prompt that asks a question.
        num_contexts: contexts that prompts share.
        output_tokens: least and most tokens that are generated where no answer is expected.
        gap_steps: mean engine steps between two arrivals.
        max_open: requests under way at most; those that arrive later wait outside.
        max_num_seqs: as of vLLM.
        max_num_batched_tokens: as of vLLM.
        max_model_len: as of vLLM.
        block_size: tokens of a block.
        device_slots: S, blocks of the device.
        logical_blocks: N, blocks of the host.
        resident_ratio: of the sparse phase.
        selector: of the sparse phase; "shipped" is the trained indexer that comes with the shipped model.
        dtype: of model and KV cache.
        adapters: LoRA adapters, beside the model without one.
        max_loras: adapters that one batch may have, 0 for all. With fewer than there are, vLLM swaps them.
        mixes_adapters: some requests of the dense phase have no adapter. Not on a CPU: in a batch with others, vLLM
            0.32 gives those the adapter of its last place there (index -1 in `lora/ops/torch_ops/lora_ops.py`).
        is_eager: no compilation and no CUDA graphs.
        share_aborted: share of requests that are aborted.
        share_forked: share of requests with several answers, n > 1.
        share_streamed: share of requests that get their tokens as they come.
        patience_steps: engine steps without a token after which a request counts as hanging.
        patience_seconds: seconds without a step after which the engine does.
    """

    phase: Phase
    runner: Runner
    is_async: bool
    seed: int
    num_requests: int
    prompt_tokens: tuple[int, int]
    num_contexts: int
    output_tokens: tuple[int, int]
    gap_steps: float
    max_open: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    device_slots: int
    logical_blocks: int
    resident_ratio: float
    selector: str
    dtype: str
    adapters: int = 2
    max_loras: int = 0
    mixes_adapters: bool = True
    is_eager: bool = False
    share_aborted: float = 0.15
    share_forked: float = 0.15
    share_streamed: float = 0.5
    patience_steps: int = 20_000
    patience_seconds: float = 120.0

    def __post_init__(self) -> None:
        """Refuse what no trace can be drawn from."""
        if self.num_requests < 1 or self.num_contexts < 1:
            raise ConfigError(f"requests: {self.num_requests} of {self.num_contexts} contexts, allowed are 1 or more")
        if not 0 <= self.max_loras <= self.adapters:
            raise ConfigError(f"--max-loras is {self.max_loras}: allowed are 0 to --adapters, {self.adapters}")
        if not 64 <= self.prompt_tokens[0] <= self.prompt_tokens[1]:
            raise ConfigError(f"prompt tokens: {self.prompt_tokens}, allowed are two ascending numbers from 64 on")

    @property
    def overcommit(self) -> float:
        """Blocks of the host for each slot of the device."""
        return self.logical_blocks / (self.device_slots - 1)

    @property
    def uses_shipped_indexer(self) -> bool:
        """Whether the trained indexer selects."""
        return self.phase == "sparse" and self.selector == "shipped"

    @property
    def options(self) -> dict[str, Any]:
        """Our section of vLLM's `additional_config`, without the path of an indexer."""
        common = {
            "device_slots": self.device_slots,
            "growth_reserve_tokens": 0,
            "check_integrity": True,
        }
        if self.phase == "dense":
            return {**common, "resident_ratio": 1.0}
        sparse: dict[str, Any] = {
            **common,
            "resident_ratio": self.resident_ratio,
            "min_sparse_tokens": 0,
            "sink_tokens": self.block_size,
            "recent_tokens": 2 * self.block_size,
        }
        return sparse if self.uses_shipped_indexer else {**sparse, "selector": self.selector}

    @property
    def engine(self) -> dict[str, Any]:
        """Arguments of vLLM's engine, for ours and for the one it is compared with."""
        return {
            "skip_tokenizer_init": True,
            "dtype": self.dtype,
            "block_size": self.block_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "enable_prefix_caching": True,
            "enforce_eager": self.is_eager,
            **self._loras,
        }

    @property
    def _loras(self) -> dict[str, Any]:
        """With fewer in a batch than there are, host memory holds no more of them either: a swap reads the folder."""
        if not self.adapters:
            return {}
        return {"enable_lora": True, "max_loras": self.max_loras or self.adapters, "max_lora_rank": 8}


_SIZES: dict[Device, dict[str, Any]] = {
    "cpu": {
        "num_contexts": 48,
        "output_tokens": (4, 40),
        "gap_steps": 2.0,
        "max_open": 32,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_model_len": 1024,
        "block_size": 32,
        "dtype": "float32",
        "mixes_adapters": False,
        "is_eager": True,
        "patience_seconds": 300.0,
    },
    "cuda": {
        "num_contexts": 200,
        "output_tokens": (8, 192),
        "gap_steps": 3.0,
        "max_open": 192,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "max_model_len": 9216,
        "block_size": 32,
        "dtype": "bfloat16",
    },
}
_PROMPTS: dict[tuple[Device, Phase], tuple[int, int]] = {
    ("cpu", "dense"): (100, 760),
    ("cpu", "sparse"): (640, 832),
    ("cuda", "dense"): (512, 8192),
    ("cuda", "sparse"): (4096, 8192),
}
_SLOTS: dict[Device, int] = {"cpu": 65, "cuda": 2049}


def default_settings(
    device: Device, phase: Phase, runner: Runner, *, is_async: bool, overcommit: float, **others: object
) -> SoakSettings:
    """Settings that suit a device and the shipped model.

    Args:
        device: "cpu" or "cuda".
        phase: see `SoakSettings`, like all that follows.
        runner: vLLM's model runner.
        is_async: whether a step is scheduled ahead.
        overcommit: blocks of the host for each slot of the device.
        others: replace the defaults, where they are not None.
    """
    slots = _SLOTS[device]
    chosen: dict[str, Any] = {
        "seed": 0,
        "num_requests": 500,
        "resident_ratio": 0.4 if device == "cpu" else 0.135,
        "selector": "shipped",
        "prompt_tokens": _PROMPTS[device, phase],
        "device_slots": slots,
        **_SIZES[device],
        **{name: value for name, value in others.items() if value is not None},
    }
    # A little more, so that finished requests push one another out of the host, too
    blocks = round(1.1 * overcommit * (chosen["device_slots"] - 1))
    # The host pool is never larger than what requests can fill that run at once
    of_a_request = -(-chosen["max_model_len"] // chosen["block_size"])
    chosen["max_num_seqs"] = max(chosen["max_num_seqs"], -(-blocks // of_a_request))
    return SoakSettings(phase=phase, runner=runner, is_async=is_async, logical_blocks=blocks, **chosen)

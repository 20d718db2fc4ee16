"""Every change this plugin makes to vLLM's behaviour: patches, one function each, and where the overrides are.

Each docstring names the symptom that made the change necessary, why it works, and when it can go.
No vLLM file is edited and no vLLM class loses a method: the patches are one wrapped platform hook, one
instance attribute on an enum member, the official override of three backends (CPU only), two wrapped bound methods
on our own worker's model runner, two wrapped methods of the scheduler that change nothing for other engines,
the interpreter's hook for uncaught errors once one of ours is raised, and four wrapped methods that make an error
of broken KV (`compat_outputs.py`), of which the scheduler's `_handle_invalid_blocks` is private.

Overrides stand in the classes of ours that need them. Those that go further than vLLM offers a way for:

- `plugin/admission.py` `FlashMemoryManager.get_num_blocks_to_allocate`: answers with more blocks than there are
  when a request's slots do not fit; goes when vLLM's scheduler asks a manager whether a request may be
  admitted.
- `plugin/admission.py` `FlashMemoryManager.allocate_new_blocks`: reserves the slots; goes with the one above.
- `plugin/admission.py` `FlashMemoryManager.pop_blocks_for_free`: returns them; goes with the one above.
- `plugin/admission.py` `FlashMemoryManager.cache_blocks`: notes which blocks a step has put into the prefix cache, so
  that they leave it when the step preempts a request that it has given tokens; goes when vLLM takes them out itself.
- `plugin/admission.py` `FlashMemoryManager.new_step_starts`: the begin of that step; goes with the one above.
- `plugin/admission.py` `FlashMemoryManager.take_new_block_ids`: its end; goes with the one above.
- `plugin/admission.py` `FlashMemoryManager.find_longest_cache_hit`: leaves the newest prompt tokens to be computed,
  whose queries a first selection is made with; goes when a request can say how many tokens no hit may cover.
- `plugin/admission.py` `FlashMemorySpec.merge`: vLLM's rebuilds a spec from a fixed list of fields, without
  ours; goes when it copies.
- `plugin/hybrid_admission.py` `HybridSpec.page_size_bytes`: says the page of other layers, so that vLLM's groups are as
  without us; goes when a plugin can say what layers are grouped (0.33's builder of KV cache configurations).
- `plugin/hybrid_admission.py` `HybridSpec.max_memory_usage_bytes`: nothing, for a group has no memory of its own in
  vLLM; goes with the one above.
- `plugin/hybrid_admission.py` `HybridSpec.merge`: keeps managed layers and others apart; goes with the one above.
- `plugin/hybrid_admission.py` `HybridManager.get_num_blocks_to_allocate`: asks another pool than vLLM's and answers for
  that; goes when a group can have a pool of its own.
- `plugin/hybrid_admission.py` `HybridManager.records_new_block_ids`: no block of that pool is zeroed; goes with the one
  above.
- `plugin/hybrid_admission.py` `HybridManager.take_new_block_ids`: likewise.
- `plugin/hybrid_admission.py` `HybridManager.cache_blocks`: counts what a prefix hit lost for want of windows;
  goes when vLLM tells how long a hit each group has.
- `plugin/hybrid_admission.py` `HybridManager.allocate_new_blocks`: says who has just come, for the one above.
- `plugin/hybrid_admission.py` `HybridManager.pop_blocks_for_free`: likewise, who has gone.
- `plugin/workers/hybrid.py` `native_bytes`: vLLM's private `_pool_bytes_per_block` and
  `_max_memory_usage_bytes_from_groups` say what native layers need; goes when vLLM tells a worker.
- `plugin/workers/hybrid.py` `bind_caches`: allocates what vLLM's configuration does not have; goes with the pool above.
- `plugin/admission.py` `_register`: calls vLLM's private `_ensure_registered`, for vLLM registers its own specs
  only while its list is empty; goes when registering one of ours does it.
- `plugin/workers/common.py` `ResidencyWorker.determine_available_memory`: reports the bytes of the host pool,
  so that the scheduler has N blocks; goes when a worker can report blocks instead of bytes.
- `plugin/workers/physical.py` `physical_config`: makes vLLM's KV cache configuration again for S
  slots, with its private `_pool_bytes_per_block`; goes when vLLM tells logical from physical blocks.
- `plugin/latent.py` `keep_chunks_and_prefixes`: puts options back that a CPU's platform switches off for latents.
- `plugin/backends/amx_latent.py` `FlashMemoryAmxLatentImpl.by_head`: multiplies by vLLM's private `_custom_ops`.
- `plugin/workers/physical.py` `without_block_override`: hides `--num-gpu-blocks-override`
  meanwhile, which counts logical blocks; goes with the one above.
- `plugin/workers/common.py` `ResidencyWorker.compile_or_warm_up_model`: takes the runtime away while vLLM warms
  up with requests of its own; goes when warm-up batches can be told from real ones. With `plugin/workers/hybrid.py`
  `at_most_blocks` they name no block beyond the slots; goes when vLLM counts the blocks of each group.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flashmemory_vllm.errors import FlashMemoryError, RefusedError, UnsupportedError
from flashmemory_vllm.plugin.names import CPU_BACKEND

if TYPE_CHECKING:
    from types import TracebackType

    from vllm.config import VllmConfig

SUPPORTED_VLLM = "0.32."

SetBatch = Callable[[list[str], torch.Tensor, torch.Tensor], None]
ConfigHook = Callable[["VllmConfig"], None]
# Returns what is to be done as soon as the platform has checked
BeforeHook = Callable[["VllmConfig"], Callable[[], None]]


def check_vllm_version() -> None:
    """Refuse a vLLM this plugin was not written for.

    Raises:
        UnsupportedError: the installed vLLM is outside 0.32.x.
    """
    from vllm import __version__

    if not __version__.startswith(SUPPORTED_VLLM):
        raise UnsupportedError(f"vllm: installed version is {__version__}, flashmemory-vllm supports {SUPPORTED_VLLM}x")


def make_enum_member_picklable(member: AttentionBackendEnum, recreate: Callable[[], AttentionBackendEnum]) -> None:
    """Let a dynamically registered backend survive pickling into a spawned process.

    Symptom: with spawned engine cores (the CLI and every CPU run) start-up dies with "... is not a valid
    AttentionBackendEnum", because a VllmConfig is unpickled before general plugins are loaded there, and an
    enum member pickles as its value. Cure: this one member pickles as a call that registers it first.
    Remove when vLLM loads plugins before it unpickles its configuration.
    """
    member.__reduce_ex__ = lambda _protocol: (recreate, ())


def wrap_platform_config_check(before: BeforeHook, after: ConfigHook) -> None:
    """Validate our configuration and choose our worker around the platform's own check.

    Symptom: there is no plugin hook between parsing and executor creation, so `--attention-backend
    flashmemory` alone would run vLLM's own worker, and unsupported combinations would surface late or never.
    Cure: wrap the platform's own `check_and_update_config`, which vLLM calls once per VllmConfig.
    Remove when vLLM lets an attention backend validate a VllmConfig and name a worker class.

    Args:
        before: called first, when nothing of the platform is decided yet; what it returns right after the platform.
        after: called last, when the platform has chosen, say, the block size.
    """
    # Not with the module: it may be imported while vLLM looks for its platform
    from vllm.platforms import current_platform

    platform_cls = type(current_platform)
    original = platform_cls.check_and_update_config.__func__
    if hasattr(original, "__flashmemory__"):
        return

    @functools.wraps(original)
    def check_and_update_config(cls: type, vllm_config: "VllmConfig") -> None:
        with _refusing():
            put_right = before(vllm_config)
        original(cls, vllm_config)
        put_right()
        with _refusing():
            after(vllm_config)

    check_and_update_config.__flashmemory__ = True  # type: ignore[attr-defined]
    platform_cls.check_and_update_config = classmethod(check_and_update_config)


@contextmanager
def _refusing() -> Iterator[None]:
    """Let a refusal of ours leave vLLM's configuration as it is, and reach the user as one line."""
    try:
        yield
    except FlashMemoryError as error:
        _print_refusals_as_one_line()
        raise RefusedError(str(error)) from error


def _print_refusals_as_one_line() -> None:
    """Print an uncaught refusal without its traceback.

    Symptom: `vllm serve` has no border that turns a wrong option into a line and an exit code: the user gets pages of
    frames of vLLM and uvloop. Cure: the interpreter's own hook for uncaught errors prints one line for a refusal, and
    does for all others what it did. It is set as a refusal is raised, not before.
    Remove when `vllm serve` prints errors of its configuration without a traceback.
    """
    earlier = sys.excepthook
    if hasattr(earlier, "__flashmemory__"):
        return

    @functools.wraps(earlier)
    def excepthook(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
        if isinstance(error, RefusedError):
            sys.stderr.write(f"{type(error.__cause__).__name__}: {error}\n")
        else:
            earlier(kind, error, trace)

    excepthook.__flashmemory__ = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook


def override_cpu_backend(latent_backend: str) -> None:
    """Make CPU attention layers of this worker process use our backends.

    Symptom: vLLM's CPU platform ignores the selected backend ("Cannot use ... on CPU") and always returns
    CPU_ATTN, for latents CPU_MLA or AMX_MLA. Cure: vLLM's own override of these members, in our worker process only.
    Remove when the CPU platform honours `--attention-backend`.

    Args:
        latent_backend: ours of latent attention.
    """
    register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
    register_backend(AttentionBackendEnum.CPU_MLA, latent_backend)
    register_backend(AttentionBackendEnum.AMX_MLA, latent_backend)


def install_slot_translation(runner: Any, set_batch: SetBatch, managed: int) -> None:
    """Replace slot mappings of logical blocks by those of slots, exactly once per step.

    Symptom: key/value writes take their target from the forward context's slot mapping, which vLLM computes
    from its block tables, that is from logical block ids; using them unchanged writes out of bounds.
    Cure: wrap the one method of the model runner that returns slot mappings for a real step, on this
    instance only, and overwrite them. Both runners share the tensor with every consumer.
    Remove when an attention backend can own the slot mapping.

    Args:
        runner: vLLM's GPUModelRunner (V1) or the V2 runner.
        set_batch: told, before metadata is built, the request ids of the batch rows in their order, their lengths
            int32 `[R]` on the device, padding included, and an int64 slot mapping `[T]`, which it
            overwrites. V1 calls it for dummy batches as well.
        managed: index of the KV cache group whose blocks are logical.
    """
    if hasattr(runner, "prepare_attn"):
        _wrap_v2(runner, set_batch, managed)
    else:
        _wrap_v1(runner, set_batch, managed)


def keep_steps_out_of_full_graphs(runner: Any, needs_python: Callable[[], bool]) -> None:
    """Run a step layer by layer, not as one captured graph, when its attention needs Python.

    Symptom: a decode batch may hold a prompt's last token (a prompt found in the prefix cache computes nothing
    else). vLLM replays the full graph of a decode step for it, in which streamed history is never fetched.
    Cure: wrap the one method of the model runner that says whether a batch is uniform decode, on this instance.
    Remove when metadata builders can refuse a full graph for the batch at hand.

    Args:
        runner: vLLM's GPUModelRunner (V1) or the V2 runner.
        needs_python: whether the step that has begun must not be replayed; the same on every rank, whose all-reduce
            buffers are paired by graph.
    """
    if hasattr(runner, "gather_batch_req_state"):
        gather = runner.gather_batch_req_state

        @functools.wraps(gather)
        def gather_batch_req_state(*args: Any, **kwargs: Any) -> tuple[Any, int | None]:
            state, uniform_token_count = gather(*args, **kwargs)
            return state, None if needs_python() else uniform_token_count

        runner.gather_batch_req_state = gather_batch_req_state
    else:
        is_uniform = runner._is_uniform_decode

        @functools.wraps(is_uniform)
        def _is_uniform_decode(*args: Any, **kwargs: Any) -> bool:
            return not needs_python() and is_uniform(*args, **kwargs)

        runner._is_uniform_decode = _is_uniform_decode


def let_sessions_give_up_their_blocks(scheduler_cls: Any, is_ours: Callable[[Any], bool]) -> None:
    """Make a streaming-input session a preempted request while it waits for its client's next turn.

    Symptom: vLLM keeps the blocks of a session between turns and lets the next one begin within a block. Slots are
    promised to a request that may never go on; the next turn is prefilled without being admitted for it; and a
    worker has no answer to a prefix hit within a block, which was the end of the engine for everybody.
    Cure: wrap the two methods of the scheduler that stop a turn and begin the next one, for engines of ours. A turn
    that stops gives its blocks up, as a preemption does, and workers are told in the same way; the next turn
    is a waiting request like any other, and finds what was computed in the prefix cache.
    Remove when vLLM preempts waiting sessions itself, or asks a block manager for whole blocks between turns.

    Args:
        scheduler_cls: vLLM's scheduler, which others inherit from.
        is_ours: whether a scheduler counts slots.
    """
    stop, go_on = scheduler_cls._handle_stopped_request, scheduler_cls._update_request_as_session
    if hasattr(stop, "__flashmemory__"):
        return

    @functools.wraps(stop)
    def _handle_stopped_request(self: Any, request: Any) -> bool:
        is_finished: bool = stop(self, request)
        if not is_finished and is_ours(self):
            self._free_request_blocks(request)
            self.reset_preempted_req_ids.add(request.request_id)
        return is_finished

    @functools.wraps(go_on)
    def _update_request_as_session(self: Any, session: Any, update: Any) -> None:
        go_on(self, session, update)
        if is_ours(self):
            session.num_computed_tokens = 0

    _handle_stopped_request.__flashmemory__ = True  # type: ignore[attr-defined]
    scheduler_cls._handle_stopped_request = _handle_stopped_request
    scheduler_cls._update_request_as_session = _update_request_as_session


def _wrap_v2(runner: Any, set_batch: SetBatch, managed: int) -> None:
    original = runner.prepare_attn

    @functools.wraps(original)
    def prepare_attn(input_batch: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        block_tables, slot_mappings = original(input_batch)
        set_batch(list(input_batch.req_ids), input_batch.seq_lens, slot_mappings[managed])
        return block_tables, slot_mappings

    runner.prepare_attn = prepare_attn


def _wrap_v1(runner: Any, set_batch: SetBatch, managed: int) -> None:
    original = runner._get_slot_mappings

    @functools.wraps(original)
    def _get_slot_mappings(num_tokens_padded: int, num_reqs_padded: int, *args: Any, **kwargs: Any) -> Any:
        by_group, by_layer = original(num_tokens_padded, num_reqs_padded, *args, **kwargs)
        if by_group:
            set_batch(list(runner.input_batch.req_ids), runner.seq_lens[:num_reqs_padded], by_group[managed])
        return by_group, by_layer

    runner._get_slot_mappings = _get_slot_mappings

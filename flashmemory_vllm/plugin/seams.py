"""Start-up self-test: the vLLM seams this plugin stands on still have the shape it was written for.

Runs in the process that builds the VllmConfig, before any model is loaded, and fails closed: a vLLM whose
internals moved is refused with one message instead of corrupting text.
"""

import dataclasses
import importlib
import inspect
from typing import Any

from flashmemory_vllm.errors import UnsupportedError

# "module:qualified.name" -> parameters that must be there, in this order, possibly among others.
FUNCTION_SEAMS: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": ("self",),
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config": ("self", "kv_cache_config"),
    "vllm.v1.worker.gpu_worker:Worker.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec": ("self",),
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": ("self",),
    "vllm.v1.worker.gpu_worker:Worker.sleep": ("self", "level"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_slot_mappings": (
        "self",
        "num_tokens_padded",
        "num_reqs_padded",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._is_uniform_decode": ("max_num_scheduled_tokens",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn": ("self", "input_batch"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_worker:Worker.sample_tokens": ("self", "grammar_output"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": ("self", "scheduler_output", "model_runner_output"),
    "vllm.v1.core.sched.scheduler:Scheduler._handle_invalid_blocks": (
        "self",
        "invalid_block_ids",
        "num_scheduled_tokens",
    ),
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.execute_model": ("self", "scheduler_output"),
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc": (
        "self",
        "unique_reply_rank",
        "kv_output_aggregator",
    ),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": ("self", "prompt", "sampling_params", "request_id"),
    "vllm.v1.core.kv_cache_utils:get_kv_cache_config_from_groups": (
        "vllm_config",
        "kv_cache_groups",
        "available_memory",
    ),
    "vllm.v1.core.kv_cache_utils:_pool_bytes_per_block": ("vllm_config", "kv_cache_groups"),
    "vllm.v1.core.kv_cache_utils:_max_memory_usage_bytes_from_groups": ("vllm_config", "kv_cache_groups"),
    "vllm.v1.core.kv_cache_utils:get_kv_cache_groups": ("vllm_config", "kv_cache_spec"),
    "vllm.v1.worker.utils:allocate_kv_cache": ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
    "vllm.v1.core.block_pool:BlockPool.__init__": ("self", "num_gpu_blocks", "enable_caching", "hash_block_size"),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate": (
        "self",
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "total_computed_tokens",
        "num_local_computed_tokens",
        "num_tokens_main_model",
        "apply_admission_cap",
        "prefill_end",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.find_longest_cache_hit": (
        "block_hashes",
        "max_length",
        "kv_cache_group_ids",
        "block_pool",
        "kv_cache_spec",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks": (
        "self",
        "request_id",
        "num_tokens",
        "num_tokens_main_model",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.new_step_starts": ("self",),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.take_new_block_ids": ("self",),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks": ("self", "request", "num_tokens"),
    "vllm.v1.core.block_pool:BlockPool.evict_blocks": ("self", "block_ids"),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free": (
        "self",
        "request_id",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session": ("self", "session", "update"),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request_blocks": ("self", "request"),
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": ("kvcache_spec_cls", "manager_class"),
    "vllm.config.model:ModelConfig.get_num_attention_heads": ("self", "parallel_config", "arch_config"),
    "vllm.config.model:ModelConfig.get_num_kv_heads": ("self", "parallel_config", "arch_config"),
    "vllm.config.model_arch:ModelArchitectureConfig.__getitem__": ("self", "layer_idx"),
    "vllm.utils.torch_utils:resolve_kv_cache_dtype_string": ("kv_cache_dtype", "model_config"),
    "vllm.v1.attention.backends.registry:register_backend": ("backend", "class_path"),
}

# "module:Dataclass" -> fields that must exist.
FIELD_SEAMS: dict[str, tuple[str, ...]] = {
    "vllm.config.attention:AttentionConfig": ("backend", "backend_per_kind", "hisparse_config", "use_non_causal"),
    "vllm.config.cache:CacheConfig": ("cache_dtype", "kv_offloading_size", "kv_sharing_fast_prefill", "sliding_window"),
    "vllm.config.vllm:VllmConfig": ("aux_output_config", "diffusion_config", "kv_transfer_config", "quant_config"),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "finished_req_ids",
        "preempted_req_ids",
        "kv_cache_block_copies",
        "new_block_ids_to_zero",
    ),
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id",
        "prefill_token_ids",
        "block_ids",
        "num_computed_tokens",
    ),
    "vllm.v1.core.sched.output:CachedRequestData": (
        "req_ids",
        "resumed_req_ids",
        "new_block_ids",
        "num_computed_tokens",
        "num_output_tokens",
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": ("req_ids", "seq_lens"),
    "vllm.v1.outputs:ModelRunnerOutput": ("kv_connector_output",),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("num_blocks", "kv_cache_tensors", "kv_cache_groups"),
    "vllm.v1.kv_cache_interface:KVCacheTensor": ("layers",),
    "vllm.v1.outputs:KVConnectorOutput": ("invalid_block_ids",),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc",
        "seq_lens",
        "block_table_tensor",
        "slot_mapping",
        "max_query_len",
        "max_seq_len",
        "seq_lens_cpu_upper_bound",
    ),
}


# Of models with latent attention alone, on a CPU
_MLA, _CPU_MLA = "vllm.model_executor.layers.attention.mla_attention", "vllm.v1.attention.backends.mla.cpu_mla"
_AMX_MLA = "vllm.v1.attention.backends.mla.amx_mla"
LATENT_FUNCTION_SEAMS: dict[str, tuple[str, ...]] = {
    f"{_MLA}:MLACommonMetadataBuilder.__init__": ("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
    f"{_MLA}:MLACommonImpl.forward_mha": (
        "self",
        "q",
        "kv_c_normed",
        "k_pe",
        "kv_c_and_k_pe_cache",
        "attn_metadata",
        "k_scale",
        "output",
        "output_scale",
    ),
    f"{_CPU_MLA}:CPUMLAImpl.forward_mqa": ("self", "q", "kv_c_and_k_pe_cache", "attn_metadata", "layer"),
    f"{_CPU_MLA}:CPUMLAImpl.do_kv_cache_update": (
        "self",
        "kv_c_normed",
        "k_pe",
        "kv_cache",
        "slot_mapping",
        "kv_cache_dtype",
        "k_scale",
    ),
}
LATENT_FUNCTION_SEAMS |= {
    f"{_AMX_MLA}:AMXMLAImpl.{method}": parameters
    for method, parameters in (
        ("forward_mha", LATENT_FUNCTION_SEAMS[f"{_MLA}:MLACommonImpl.forward_mha"]),
        ("forward_mqa", LATENT_FUNCTION_SEAMS[f"{_CPU_MLA}:CPUMLAImpl.forward_mqa"]),
        ("do_kv_cache_update", LATENT_FUNCTION_SEAMS[f"{_CPU_MLA}:CPUMLAImpl.do_kv_cache_update"]),
    )
}
LATENT_FIELD_SEAMS: dict[str, tuple[str, ...]] = {
    f"{_MLA}:MLACommonMetadata": ("num_decode_tokens",),
    "vllm.v1.kv_cache_interface:MLAAttentionSpec": ("cache_role", "head_size_v"),
}


def check_seams(*, is_latent: bool = False) -> None:
    """Verify every seam.

    Args:
        is_latent: those of latent attention, too. Default: False.

    Raises:
        UnsupportedError: names each seam that is missing or has another shape.
    """
    functions = FUNCTION_SEAMS | (LATENT_FUNCTION_SEAMS if is_latent else {})
    fields = FIELD_SEAMS | (LATENT_FIELD_SEAMS if is_latent else {})
    problems = [problem for seam, names in functions.items() for problem in _function_problems(seam, names)]
    problems += [problem for seam, names in fields.items() for problem in _field_problems(seam, names)]
    if problems:
        raise UnsupportedError("vllm: this build differs from 0.32 where flashmemory hooks in: " + "; ".join(problems))


def _resolve(seam: str) -> Any:
    module_name, _, path = seam.partition(":")
    target: Any = importlib.import_module(module_name)
    for name in path.split("."):
        target = getattr(target, name)
    return target


def _function_problems(seam: str, names: tuple[str, ...]) -> list[str]:
    try:
        parameters = list(inspect.signature(_resolve(seam)).parameters)
    except (ImportError, AttributeError) as error:
        return [f"{seam} ({error})"]
    found = [name for name in parameters if name in names]
    return [] if found == list(names) else [f"{seam} has parameters {parameters}, expected {list(names)} among them"]


def _field_problems(seam: str, names: tuple[str, ...]) -> list[str]:
    try:
        fields = {field.name for field in dataclasses.fields(_resolve(seam))}
    except (ImportError, AttributeError, TypeError) as error:
        return [f"{seam} ({error})"]
    missing = sorted(set(names) - fields)
    return [f"{seam} lacks {missing}"] if missing else []

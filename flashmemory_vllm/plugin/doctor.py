"""Checks of vLLM: its version, the functions we stand on, which plugins it loads, and the runner it chooses."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points

from pydantic import ValidationError
from vllm import __version__, envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from flashmemory_vllm.doctor.finding import Finding, Status
from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.plugin.compat import check_vllm_version
from flashmemory_vllm.plugin.seams import FIELD_SEAMS, FUNCTION_SEAMS, check_seams

PLUGIN_NAME = "flashmemory"
# Group -> what does not work without it
GROUPS = {
    "vllm.general_plugins": "--attention-backend flashmemory is unknown",
    "vllm.platform_plugins": 'LLM(attention_config={"backend": "flashmemory"}) is unknown; attention_backend= is not',
    "vllm.stat_logger_plugins": "/metrics lacks our counters",
    "vllm.endpoint_plugins": "there is no GET /flashmemory/stats",
}
OPTIONAL_GROUP = "vllm.endpoint_plugins"
# All else works without it
EARLY_GROUP = "vllm.platform_plugins"


def vllm_findings() -> Iterator[Finding]:
    """Every check of vLLM."""
    yield _tested("vLLM", __version__, check_vllm_version, "pip install 'vllm>=0.32,<0.33'")
    num_seams = len(FUNCTION_SEAMS) + len(FIELD_SEAMS)
    found = f"all {num_seams} functions and classes that we stand on are as expected"
    yield _tested("vLLM's seams", found, check_seams, "install a stock vLLM 0.32.x, without patches")
    yield platform()
    yield runner()
    for group in GROUPS:
        yield plugin(group, envs.VLLM_PLUGINS)


def _tested(check: str, found: str, test: Callable[[], None], remedy: str) -> Finding:
    try:
        test()
    except UnsupportedError as error:
        return Finding(check, "fail", str(error), remedy)
    return Finding(check, "ok", found)


def platform() -> Finding:
    """The platform that vLLM runs on."""
    found = f"{current_platform.device_type} ({current_platform.__class__.__name__})"
    if current_platform.is_cuda() or current_platform.is_cpu():
        return Finding("platform", "ok", found)
    return Finding("platform", "fail", found, "use a vLLM build for CUDA or CPU: no other platform is supported")


def runner() -> Finding:
    """The model runner that vLLM chooses with default options; both are supported."""
    given = envs.VLLM_USE_V2_MODEL_RUNNER
    reason = "its default here" if given is None else f"VLLM_USE_V2_MODEL_RUNNER={int(given)}"
    try:
        config = VllmConfig()
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        return Finding("model runner", "fail", f"vLLM refuses {reason}: {why}", "unset VLLM_USE_V2_MODEL_RUNNER")
    return Finding("model runner", "ok", f"{'V2' if config.use_v2_model_runner else 'V1'} ({reason})")


def plugin(group: str, allowed: list[str] | None) -> Finding:
    """Whether vLLM finds and loads our plugin of one group.

    Args:
        group: entry-point group.
        allowed: vLLM's allowlist, `VLLM_PLUGINS`; None when it is not set.
    """
    check, loss = group.removeprefix("vllm."), GROUPS[group]
    entries = {entry.value: entry for entry in entry_points(group=group, name=PLUGIN_NAME)}
    if not entries:
        status: Status = "warn" if group == EARLY_GROUP else "fail"
        return Finding(check, status, f"not installed: {loss}", "pip install flashmemory-vllm into vLLM's environment")
    if len(entries) > 1:
        return Finding(check, "fail", f"several plugins of our name: {', '.join(entries)}", "uninstall the others")
    ((value, entry),) = entries.items()
    is_optional = group == OPTIONAL_GROUP
    if allowed is None and is_optional:
        return Finding(check, "ok", f"not loaded: {loss}", f"if you want it: VLLM_PLUGINS={PLUGIN_NAME}")
    if allowed is not None and PLUGIN_NAME not in allowed:
        return Finding(
            check,
            "warn" if is_optional or group == EARLY_GROUP else "fail",
            f"kept out by VLLM_PLUGINS={','.join(allowed)}: {loss}",
            f"VLLM_PLUGINS={','.join([*filter(None, allowed), PLUGIN_NAME])}",
        )
    try:
        entry.load()
    except (ImportError, AttributeError) as error:
        return Finding(
            check, "fail", f"{value} cannot be loaded: {error}", "pip install --force-reinstall flashmemory-vllm"
        )
    return Finding(check, "ok", f"loaded: {value}")

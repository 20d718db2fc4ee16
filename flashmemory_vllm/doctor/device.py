"""Checks of the GPUs: what torch sees, the driver, and what the link to the host carries."""

import mmap
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from flashmemory_vllm.doctor.finding import GIB, Finding

# The kernels' and vLLM's FlashAttention need Ampere
SMALLEST_CAPABILITY = (8, 0)
LINK_BYTES = 1 << 28
LINK_REPEATS = 8
# Half of what PCIe 4.0 with 16 lanes carries: below it the link, not the kernels, sets the speed
SLOW_LINK_BYTES_PER_SECOND = 12e9


def device_count() -> int:
    """GPUs that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_bytes() -> int:
    """Memory of all GPUs."""
    return sum(torch.cuda.get_device_properties(index).total_memory for index in range(device_count()))


def gpus(proc: Path = Path("/proc")) -> Iterator[Finding]:
    """Each GPU that torch sees, and the driver.

    Args:
        proc: root of procfs.
    """
    driver = driver_version(proc)
    if device_count() == 0:
        if driver is None:
            yield Finding("GPU", "ok", "no NVIDIA driver: vLLM's CPU build serves")
            return
        yield Finding(
            "GPU",
            "warn",
            f"driver {driver}, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU",
            "install the CUDA build (pip install 'flashmemory-vllm[cuda]'), give the container the GPU (--gpus all), "
            "and see that CUDA_VISIBLE_DEVICES is not empty",
        )
        return
    yield Finding(
        "driver", "ok", f"{driver or 'version unknown'}, CUDA {torch.version.cuda} in torch {torch.__version__}"
    )
    for index in range(device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield judge_gpu(index, properties.name, properties.total_memory, (properties.major, properties.minor))


def judge_gpu(index: int, name: str, num_bytes: int, capability: tuple[int, int]) -> Finding:
    """Whether a GPU is new enough."""
    found = f"{name}, {num_bytes / GIB:.1f} GiB, compute capability {capability[0]}.{capability[1]}"
    if capability < SMALLEST_CAPABILITY:
        return Finding(f"GPU {index}", "fail", found, "use a GPU of compute capability 8.0 (Ampere) or later")
    return Finding(f"GPU {index}", "ok", found)


def driver_version(proc: Path = Path("/proc")) -> str | None:
    """Version of the NVIDIA kernel driver, None when it is not loaded.

    Args:
        proc: root of procfs.
    """
    path = proc / "driver" / "nvidia" / "version"
    if not path.is_file():
        return None
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", path.read_text())
    return match.group(1) if match else None


def pci_addresses(proc: Path = Path("/proc")) -> dict[str, str]:
    """PCI address of each GPU that torch sees, by its name here (`GPU 0`).

    Args:
        proc: root of procfs, in which the driver names each GPU's address and UUID.
    """
    known = dict(_addresses_by_uuid(proc))
    uuids = {index: str(torch.cuda.get_device_properties(index).uuid) for index in range(device_count())}
    return {f"GPU {index}": known[uuid] for index, uuid in uuids.items() if uuid in known}


def _addresses_by_uuid(proc: Path) -> Iterator[tuple[str, str]]:
    for path in (proc / "driver" / "nvidia" / "gpus").glob("*/information"):
        match = re.search(r"GPU UUID:\s*GPU-(\S+)", path.read_text())
        if match:
            yield match.group(1), path.parent.name


def links(proc: Path = Path("/proc")) -> Iterator[Finding]:
    """Pins memory as the host pool does and measures copies of each GPU, both ways.

    Args:
        proc: root of procfs.
    """
    if device_count() == 0:
        why = "torch sees no GPU" if driver_version(proc) else "there is no GPU"
        yield Finding("host link", "ok", f"not measured: {why}")
        return
    memory = mmap.mmap(-1, LINK_BYTES)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    started = time.perf_counter()
    status = int(runtime.cudaHostRegister(host.data_ptr(), LINK_BYTES, 0))
    seconds = time.perf_counter() - started
    if status != 0:
        yield Finding(
            "pinning",
            "fail",
            f"cudaHostRegister of {LINK_BYTES / GIB:.2f} GiB returned {status}",
            "free host memory, or raise the cgroup's limit",
        )
        return
    try:
        yield Finding("pinning", "ok", f"{LINK_BYTES / GIB:.2f} GiB in {seconds:.2f} s")
        for index in range(device_count()):
            device = torch.empty(LINK_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
            yield judge_link(index, _bandwidth(index, device, host), _bandwidth(index, host, device))
    finally:
        runtime.cudaHostUnregister(host.data_ptr())


def judge_link(index: int, to_device: float, to_host: float) -> Finding:
    """Whether a link is as fast as a card's own.

    Args:
        index: the GPU's.
        to_device: bytes a second, host to device.
        to_host: bytes a second, device to host.
    """
    check = f"host link of GPU {index}"
    found = f"{to_device / 1e9:.1f} GB/s to the device, {to_host / 1e9:.1f} GB/s to the host (pinned)"
    if min(to_device, to_host) < SLOW_LINK_BYTES_PER_SECOND:
        remedy = "recalls will stall: see that the card has 16 lanes and that this process runs on its NUMA node"
        return Finding(check, "warn", found, remedy)
    return Finding(check, "ok", found)


def _bandwidth(index: int, target: torch.Tensor, source: torch.Tensor) -> float:
    """Bytes a second of the fastest of several copies."""
    with torch.cuda.device(index):
        seconds = min(_seconds(lambda: target.copy_(source, non_blocking=True)) for _ in range(LINK_REPEATS))
    return target.numel() / seconds


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started

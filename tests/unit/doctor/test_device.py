"""Checks of GPUs: what is read from the driver's files, and on a machine with a GPU what is measured."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.doctor import device

HAS_GPU = torch.cuda.is_available()
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U22)\n"
    "GCC version:  gcc version 12.3.0\n"
)
CLOSED_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n"


@pytest.mark.parametrize(("text", "version"), [(OPEN_DRIVER, "570.86.15"), (CLOSED_DRIVER, "535.129.03")])
def test_the_drivers_version_is_read(text: str, version: str, tmp_path: Path) -> None:
    file = tmp_path / "driver" / "nvidia" / "version"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert device.driver_version(tmp_path) == version


def test_without_a_driver_there_is_no_version(tmp_path: Path) -> None:
    assert device.driver_version(tmp_path) is None


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_served_by_the_cpu(tmp_path: Path) -> None:
    assert [(finding.status, finding.found) for finding in device.gpus(tmp_path)] == [
        ("ok", "no NVIDIA driver: vLLM's CPU build serves")
    ]
    (link,) = device.links(tmp_path)
    assert (link.status, link.found) == ("ok", "not measured: there is no GPU")


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without a GPU")
def test_a_driver_without_a_gpu_in_torch_is_told(tmp_path: Path) -> None:
    file = tmp_path / "driver" / "nvidia" / "version"
    file.parent.mkdir(parents=True)
    file.write_text(OPEN_DRIVER)
    (gpu,) = device.gpus(tmp_path)
    assert (gpu.status, gpu.found.split(",")[0]) == ("warn", "driver 570.86.15")
    assert [finding.found for finding in device.links(tmp_path)] == ["not measured: torch sees no GPU"]


def test_a_gpus_address_is_found_by_its_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts the GPUs it may use, the driver all of them: their order tells nothing."""
    for address, uuid in (("0000:4e:00.0", "aaaa-1"), ("0000:87:00.0", "bbbb-2")):
        file = tmp_path / "driver" / "nvidia" / "gpus" / address / "information"
        file.parent.mkdir(parents=True)
        file.write_text(f"Model: \t\t NVIDIA A100\nGPU UUID: \t GPU-{uuid}\nBus Location: \t {address}\n")
    properties = {0: "bbbb-2", 1: "aaaa-1", 2: "a-slice-of-a-gpu"}
    monkeypatch.setattr(device, "device_count", lambda: len(properties))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"uuid": properties[index]})
    )
    assert device.pci_addresses(tmp_path) == {"GPU 0": "0000:87:00.0", "GPU 1": "0000:4e:00.0"}


@pytest.mark.parametrize(("capability", "status"), [((7, 5), "fail"), ((8, 0), "ok"), ((12, 0), "ok")])
def test_gpus_before_ampere_are_refused(capability: tuple[int, int], status: str) -> None:
    assert device.judge_gpu(0, "a GPU", 1 << 34, capability).status == status


@pytest.mark.parametrize(
    ("to_device", "to_host", "status"), [(55e9, 54e9, "ok"), (55e9, 3e9, "warn"), (3e9, 55e9, "warn")]
)
def test_the_slower_direction_counts(to_device: float, to_host: float, status: str) -> None:
    assert device.judge_link(0, to_device, to_host).status == status


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_a_real_link_is_measured_and_its_memory_given_back() -> None:
    # Twice: memory that stayed pinned would be refused the second time only at the same address, so both must pass
    for _ in range(2):
        pinning, *links = device.links()
        assert pinning.status == "ok"
        assert len(links) == device.device_count()
        assert all("GB/s to the device" in link.found for link in links)
    assert {finding.check for finding in device.gpus()} >= {"driver", "GPU 0"}
    assert device.device_bytes() > 0

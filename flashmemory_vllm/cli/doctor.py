"""`flashmemory doctor`: would a server start here, and would it be fast?"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator

from flashmemory_vllm.cli.doctor_model import add_arguments, model_findings
from flashmemory_vllm.doctor.finding import Finding, as_json, as_table, exit_code


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser("doctor", help="check vLLM, GPUs, host memory, the link between them, a model")
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list of the findings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every finding.

    Returns:
        1 if a check failed: a server would not start. Else 0.
    """
    # vLLM logs to standard output, which is the findings' alone
    with contextlib.redirect_stdout(sys.stderr):
        findings = [*diagnose(), *(model_findings(args) if args.model else ())]
    if args.json:
        print(json.dumps(as_json(findings), indent=2))
    else:
        print(as_table(findings, shutil.get_terminal_size().columns))
    return exit_code(findings)


def diagnose() -> Iterator[Finding]:
    """Run every check, those of the plugin first."""
    yield from _vllm_findings()
    try:
        from flashmemory_vllm.doctor import device
    except ImportError as error:
        yield Finding("torch", "fail", f"cannot be imported: {error}", "pip install 'flashmemory-vllm[cuda]'")
        return
    from flashmemory_vllm.doctor import host

    yield from device.gpus()
    yield host.host_memory(device.device_bytes())
    yield host.shared_memory()
    yield host.lock_limit()
    yield from host.numa(device.pci_addresses())
    yield from device.links()


def _vllm_findings() -> Iterator[Finding]:
    try:
        from flashmemory_vllm.plugin.doctor import vllm_findings
    except ImportError as error:
        remedy = "pip install 'flashmemory-vllm[cuda]', on a machine without a GPU 'flashmemory-vllm[cpu]'"
        yield Finding("vLLM", "fail", f"cannot be imported: {error}", remedy)
        return
    yield from vllm_findings()

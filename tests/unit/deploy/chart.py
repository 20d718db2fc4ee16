"""Renders and lints the Helm chart with Helm itself: its binary, or its library through the package helm_python."""

import importlib
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[3] / "deploy" / "helm" / "flashmemory"
RELEASE = "demo"


class RefusedError(Exception):
    """Helm refuses the chart or the values; the message is Helm's."""


def render(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Render the chart.

    Args:
        values: what a user sets.

    Returns:
        Every resource.

    Raises:
        RefusedError: Helm refuses the values.
    """
    if shutil.which("helm"):
        texts = [_run("template", RELEASE, str(CHART), "--values", "-", stdin=json.dumps(values))]
    else:
        helm = _library()
        try:
            with helm.Chart.load(str(CHART)) as chart:
                rendered = chart.render(dict(values), name=RELEASE, namespace="default")
        except helm.HelmError as error:
            raise RefusedError(str(error)) from error
        texts = [text for path, text in rendered.items() if not path.endswith("NOTES.txt")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def lint(values: Mapping[str, Any]) -> None:
    """Run Helm's linter.

    Raises:
        RefusedError: it found an error.
    """
    if shutil.which("helm"):
        _run("lint", str(CHART), "--values", "-", stdin=json.dumps(values))
        return
    errors = _library().lint(str(CHART), dict(values))["errors"]
    if errors:
        raise RefusedError(str(errors))


def _library() -> Any:
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("Helm is not installed: neither the binary helm nor the package helm-python-sdk")
    return importlib.import_module("helm_python")


def _run(*arguments: str, stdin: str) -> str:
    done = subprocess.run(["helm", *arguments], input=stdin, capture_output=True, text=True, check=False)  # noqa: S607
    if done.returncode:
        raise RefusedError(done.stderr)
    return done.stdout

"""The page of options lists every ready-made file."""

import re

from tests.docs.pages import DOCS, ROOT


def test_every_file_is_listed_and_every_listed_file_exists() -> None:
    listed = re.findall(
        r"^\| `([\w.-]+\.yaml)` \|", (DOCS / "configuration.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

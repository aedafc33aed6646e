"""Links of pages to what lies beside `docs/` in the repository, and inside it on the site: experiments, conf, README.

In the repository they lead where the files lie, so that they can be followed there too.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
ELSEWHERE = {"README.md": "index.md", "conf": "reference/configuration.md", "src": "reference/python.md", "docs": ""}
"""Where on the site stands what a path of the repository begins with."""


def in_repository(page: str) -> str:
    """The path of a page of the site in the repository."""
    return page if page.startswith(("experiments/", "notebooks/")) else f"docs/{page}"


def site_path(path: str) -> str:
    """The path on the site of a path of the repository."""
    first, _, rest = path.partition("/")
    if path.endswith(".ipynb"):
        return path.replace(".ipynb", ".md")
    if first == "experiments":
        return f"{path}/README.md" if (ROOT / path).is_dir() else path
    return rest if first == "docs" else ELSEWHERE.get(first, path)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn every relative link into one that leads to the same thing on the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(in_repository(here))

    def turned(link: re.Match[str]) -> str:
        target = site_path(posixpath.normpath(posixpath.join(folder, link["path"])))
        relative = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"]({relative}{link['anchor'] or ''})"

    return LINK.sub(turned, markdown)

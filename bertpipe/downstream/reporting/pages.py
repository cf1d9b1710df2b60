"""The HTML pages: one self-contained file each, from a template that escapes every text; one style for all of them.

Only scripts of ours run in them: a page's policy names the sha256 of each.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent


def render(template: str, filters: dict[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """A page from a template of this folder and its values."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters or {}
    return environment.get_template(template).render(**values)


def with_plots(*names: str) -> dict[str, Any]:
    """`scripts` and `policy` of a page with plotly and the scripts of these names, each in this folder."""
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), *((TEMPLATES / name).read_text(encoding="utf-8") for name in names)]
    return {"scripts": scripts, "policy": f"script-src {' '.join(map(digest, scripts))}"}


def digest(script: str) -> str:
    """A script as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"

"""The HTML pages: one self-contained file each, from a template that escapes every text; one style for all of them."""

from __future__ import annotations

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

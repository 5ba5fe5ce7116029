"""What pages are made with: packages of an extra, which may be missing."""

from __future__ import annotations

from importlib.util import find_spec


def missing_package() -> str | None:
    """Which of the packages that draw figures and fill the page is not installed, and what installs it; else None."""
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            return f"{package} is not installed; run `pip install 'lesa-ray[report]'`"
    return None

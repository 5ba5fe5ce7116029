"""RUN… → OUT/report.html and OUT/figures/NAME.png.

All of it is made in memory before anything is written; images are written first and the page last, and images of an
earlier report that this one lacks are removed then.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching
from lesa_ray.report.page.figure import png
from lesa_ray.report.page.packages import missing_package
from lesa_ray.report.page.render import GENERATOR, render
from lesa_ray.report.page.schema import Analysis
from lesa_ray.report.page.sections import make_sections
from lesa_ray.report.page.sources import Material, gather, parsed
from lesa_ray.report.page.words import some

PAGE_FILE, FIGURES = "report.html", "figures"


@dataclass(frozen=True)
class Written:
    """What `write_report` has written."""

    page: str
    figures: tuple[str, ...]
    missing: tuple[str, ...]
    """What the page says is missing."""
    nbytes: int
    """Of the page."""


def write_report(runs: Sequence[str], out: str) -> Written:
    """Make the page of RUN… at OUT.

    Raises: UserError if a RUN is none, or OUT holds another's report.html, and then nothing is written; MachineError if
    a disk is full, or a store does not answer."""
    require_packages()
    material = gather(runs)
    storage, where = Storage(out), f"OUT {out}"
    with reaching(where):
        earlier = _earlier_figures(storage)
    command = f"lesa-ray report {shlex.join(runs)} --out {shlex.quote(out)}"
    sections, missing = make_sections(material, command)
    images, lacking = {}, set()
    for figure in (figure for section in sections for figure in section.figures):
        images[f"{FIGURES}/{figure.name}.png"], letters = png(figure)
        lacking |= {*letters}
    if lacking:
        missing.append(f"Letters of the images, not of this page: no font here has {some(sorted(lacking), 12)}.")
    page = render(material, sections, missing, images=True).encode()
    with reaching(where, "cannot be written"):
        for name, content in images.items():
            storage.write(name, content)
        for name in sorted(earlier - images.keys()):  # before the page goes that names them
            storage.remove(name)
        storage.write(PAGE_FILE, page)
    return Written(f"{storage.url}/{PAGE_FILE}", tuple(images), tuple(missing), len(page))


def analysis_page(content: Mapping[str, Any], command: str) -> str:
    """The page of one analysis.json as HTML, without images beside it. command: what makes it again.

    Raises: UserError if the content is no analysis, or what draws figures is not installed."""
    require_packages()
    material = Material(analyses=[(".", parsed(Analysis, content, "analysis.json"))])
    sections, missing = make_sections(material, command)
    return render(material, sections, missing, images=False)


def require_packages() -> None:
    """Raises: UserError if what draws figures and fills the page is not installed."""
    if missing := missing_package():
        raise UserError(f"report: {missing}")


def _earlier_figures(storage: Storage) -> set[str]:
    """The images of an earlier report at this place. Raises: UserError if what is there is not one."""
    if storage.is_local and os.path.isfile(storage.root):
        raise UserError(f"OUT {storage.url}: is a file; give a folder")
    try:
        html = storage.read(PAGE_FILE).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return set()
    if f'content="{GENERATOR}"' not in html:
        raise UserError(f"OUT {storage.url}: holds a {PAGE_FILE} that is not a report of lesa-ray's; give a new place")
    return set(re.findall(rf'href="({FIGURES}/[\w.-]+\.png)"', html))

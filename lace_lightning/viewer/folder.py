"""The viewer's page of an evaluation's folder."""

from __future__ import annotations

from pathlib import Path

from lace_lightning.evaluation.store import read_outcomes
from lace_lightning.viewer.page import viewer_page
from lace_lightning.whole_file import write_text

VIEWER = "viewer.html"


def write_viewer(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of all finished outcomes; it appears whole or not at all.

    Args:
        folder: what ``lace eval`` wrote.
        out: the page's file; None: ``viewer.html`` in the folder.

    Returns:
        The page's path.

    Raises:
        StoreError: the folder holds no outcomes, or they are damaged.
    """
    path = Path(folder, VIEWER) if out is None else Path(out)
    page = viewer_page(Path(folder).resolve().name, read_outcomes(folder))
    write_text(path, page)
    return path

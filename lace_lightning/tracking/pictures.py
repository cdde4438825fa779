"""Pictures and tables in the files that MLflow's pages show."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_THUMBNAIL_PIXELS = 256


def image_files(name: str, image: str | PathLike[str] | Figure, step: int, time: int) -> dict[str, bytes]:
    """PNG and thumbnail of a picture file or matplotlib figure, under the names by which MLflow shows a step slider."""
    picture = _picture(image)
    stem = f"images/{name.replace('/', '~')}+step+{step}+timestamp+{time}+{uuid.uuid4()}"
    thumbnail = picture.copy()
    thumbnail.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    return {f"{stem}.png": _encoded(picture, "PNG"), f"{stem}+compressed.webp": _encoded(thumbnail, "WEBP")}


def table_file(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Rows as JSON in the layout of MLflow's table view; columns in order of appearance, absent cells null."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    data = [[row.get(column) for column in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data}, default=str).encode()


def _picture(image: str | PathLike[str] | Figure) -> Image:
    from PIL import Image

    if isinstance(image, str | PathLike):
        source: str | PathLike[str] | io.BytesIO = image
    else:
        source = io.BytesIO()
        image.savefig(source, format="png")
    with Image.open(source) as picture:
        return picture.convert("RGB")


def _encoded(picture: Image, format: str) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=format)
    return stream.getvalue()

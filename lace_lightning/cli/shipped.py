"""The configs that the package ships, wherever ``lace`` is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "configs"


def with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """Arguments in which ``configs/…`` that is not under the working directory becomes the file that we ship."""

    def find(argument: str) -> str:
        option, equals, path = argument.rpartition("=")
        shipped = SHIPPED / path.removeprefix("configs/")
        is_ours = path.startswith("configs/") and not Path(path).exists() and shipped.is_file()
        return f"{option}{equals}{shipped}" if is_ours else argument

    return [find(argument) for argument in arguments]

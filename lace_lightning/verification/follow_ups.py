"""Versioned wordings of the follow-up questions of :class:`~lace_lightning.verification.MathTask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lace_lightning.tasks import FollowUp

FOLDER = Path(__file__).parent
NAME = "follow_ups_{}.yaml"


def read_wordings(version: str) -> dict[FollowUp, str]:
    """The format strings of a shipped version, one for every kind.

    Raises:
        ValueError: there is no such version.
    """
    versions = sorted(path.stem.removeprefix("follow_ups_") for path in FOLDER.glob(NAME.format("*")))
    if version not in versions:
        raise ValueError(f"follow_ups={version!r} of MathTask: the shipped wordings are {', '.join(versions)}")
    texts = yaml.safe_load((FOLDER / NAME.format(version)).read_text(encoding="utf-8"))
    return {kind: texts[kind] for kind in FollowUp}


def word(wordings: Mapping[FollowUp, str], kind: FollowUp, problem: str, texts: Sequence[str]) -> str:
    """The question; what a model wrote is filled in as it is and never read as a format string.

    Several texts, and all candidates of a judge, are numbered from 1.
    """
    if len(texts) > 1 or kind is FollowUp.JUDGE:
        texts = [f"[{number}] {text}" for number, text in enumerate(texts, start=1)]
    return wordings[kind].format(problem=problem, texts="\n\n".join(texts) or "(none)")

"""Finding tags and answers in whatever text a model wrote. Nothing here raises on any string."""

from __future__ import annotations

import re

from lace_lightning.traces.schema import Tag

_TAG = re.compile("|".join(re.escape(tag) for tag in Tag))


def parse_tag(assessment: str) -> Tag | None:
    """The tag of a closing assessment: exactly one tag must stand in it, as its last word.

    >>> parse_tag(" 42 [[best]]")
    <Tag.BEST: '[[best]]'>
    >>> parse_tag("[[best]] [[fail]]") is None
    True
    """
    tags = _TAG.findall(assessment)
    if len(tags) != 1 or not assessment.rstrip().endswith(tags[0]):
        return None
    return Tag(tags[0])


def parse_answer(assessment: str) -> str | None:
    r"""The answer of a closing assessment: the content of its last ``\boxed{…}``, else its text without tags.

    >>> parse_answer(r" \boxed{\frac{1}{2}} [[best]]")
    '\\frac{1}{2}'
    >>> parse_answer(" 42 [[fail]]")
    '42'
    """
    start = assessment.rfind("\\boxed{")
    if start >= 0:
        return _balanced(assessment, start + len("\\boxed{"))
    return _TAG.sub("", assessment).strip() or None


def _balanced(text: str, start: int) -> str | None:
    """Text from ``start`` up to the brace that closes the one before it; None if it is never closed or empty."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position].strip() or None
    return None

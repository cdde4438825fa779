"""Text that a terminal shows instead of obeying."""

from __future__ import annotations

_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_UNPRINTABLE = (*range(0x80, 0xA0), 0x2028, 0x2029, *_BIDIRECTIONAL, *range(0xD800, 0xE000))
_VISIBLE = (
    dict.fromkeys(_UNPRINTABLE, 0xFFFD)
    | {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
)


def printable(text: str) -> str:
    """``text`` without anything that acts on a terminal; whatever a model wrote is safe to print after this.

    Control characters become their pictures (ESC reads ``␛``), so an escape sequence stands there as plain text. What
    has no picture (C1 controls, lone surrogates, marks that turn the reading direction) becomes U+FFFD. Tabs and line
    ends stay.
    """
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def one_line(text: str) -> str:
    """:func:`printable` text with every run of white space as one space, for titles and status lines."""
    return " ".join(printable(text).split())

r"""One spelling for answers that mean the same: all that can be said about a text without a parser.

Every function is total, and takes at most milliseconds for a text of :data:`MAX_LENGTH`.
"""

from __future__ import annotations

import re
import unicodedata

MAX_LENGTH = 1000
"""Longest text in characters that is compared; the longest reference of our data sets has 198."""

_STRANGE = {"Cc", "Cf", "Cs", "Co", "Cn"}
_DASHES = str.maketrans("−–‐‑", "----")
_DOLLAR = re.compile(r"(?<!\\)\$")
_LEAD = re.compile(r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final )?answer(?: is\b|:)[: ]*|= *", re.IGNORECASE)
_DISPLAY = re.compile(r"\\[(\[](.*)\\[)\]]", re.DOTALL)
_SEPARATOR = r"(?:,\\!|\{,\}|,|\\[,! ]|~|\s)"
_GROUPED = re.compile(rf"((?:\\?\$)?-?[0-9]{{1,3}})((?:{_SEPARATOR}[0-9]{{3}})+)(\.[0-9]+)?")
_MIXED = re.compile(r"(-?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_JUXTAPOSED = re.compile(r"[0-9](?:\s|~|\\[ ,;:])+[0-9]+(?![0-9.^])")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_OPTION = re.compile(r"(?<![A-Za-z])([A-H])\)")
_LETTER = re.compile(r"(?<![A-Za-z\\])([A-H])(?![A-Za-z(])")
_COUNTED = re.compile(r"(?:[A-Za-z] ?= ?)?([^A-Za-z\\=]*[0-9.])(?: ?([A-Za-z]{3,}(?: [A-Za-z]+)*))?")
_CHANGES = re.compile(
    r"\b(?:dozens?|hundreds?|thousands?|[mbtr]+illions?|percent|hal(?:f|ves)|thirds?|quarters?|fourths?|squared|cubed"
    r"|factorial|sqrt|log|sin|cos|tan|exp|mod|and|or|not|plus|minus|times|over|more|less)\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"(?:and )?(?:(?:a|an|the) (?=.))?")
_CONJUNCTION = re.compile(r"[,;]?(?:\s|~|\\ )*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)|[,;]")


def is_readable(text: str | None) -> bool:
    """Whether there is a text worth reading.

    Missing, blank and overlong answers are not, nor are those with control, format (text direction, zero width),
    surrogate, private or unassigned characters, or with digits other than 0 to 9: what they mean depends on who reads.
    """
    if text is None or len(text) > MAX_LENGTH or not text.strip():
        return False
    return text.isascii() and text.isprintable() or not any(map(_is_strange, text))


def _is_strange(character: str) -> bool:
    if character in " \t\n\r" or " " < character < "\x7f":
        return False
    return unicodedata.category(character) in _STRANGE or character.isdecimal()


def tidy(text: str) -> str:
    r"""An answer without what surrounds it: "the answer is", ``=``, ``$``, ``\boxed{…}``, ``**``, a full stop, spaces.

    >>> tidy(r"The answer is **$\boxed{\frac{1}{2}}$.** ")
    '\\frac{1}{2}'
    """
    text = " ".join(text.translate(_DASHES).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").split())
    if lead := _LEAD.match(text):
        text = text[lead.end() :]
    text = _without_stop(text)
    if text.startswith("**") and text.endswith("**"):
        text = _without_stop(text.strip("*").strip())
    text = _without_stop(_DOLLAR.sub("", text).strip())
    if match := _DISPLAY.fullmatch(text):
        text = _without_stop(match[1].strip())
    return _unboxed(text)


def _unboxed(text: str) -> str:
    opening = "\\boxed{"
    while text.startswith(opening) and _closing(text, len(opening)) == len(text) - 1:
        text = _without_stop(text[len(opening) : -1].strip())
    return text


def _closing(text: str, start: int) -> int:
    """Where the brace that was opened before ``start`` is closed; the text's length if it never is."""
    depth = 1
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return position
    return len(text)


def _without_stop(text: str) -> str:
    return text[:-1].rstrip() if text.endswith((".", ",", ";")) and not text.endswith(("..", "\\,", "\\;")) else text


def plain_numbers(text: str) -> str | None:
    """A tidy answer with its numbers in one piece, or None where numbers stand side by side.

    Thousands may be separated (``1,000``, ``10 000``) and mixed numbers written ``1 1/2``. Otherwise ``4 2`` is as
    little one number as it is the sum that math-verify would read.
    """
    if match := _GROUPED.fullmatch(text):
        return match[1] + re.sub("[^0-9]", "", match[2]) + (match[3] or "")
    if match := _MIXED.fullmatch(text):
        return rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}"
    return None if _JUXTAPOSED.search(text) else text


def is_one_number(text: str) -> bool:
    """Whether commas in a text only separate thousands: ``58,500``."""
    return _GROUPED.fullmatch(text) is not None


def split_values(text: str) -> list[str]:
    """What stands between the commas, semicolons, "and" and "or" outside of all brackets.

    >>> split_values("(1,2), [3,4) and 5")
    ['(1,2)', '[3,4)', '5']
    """
    depth, start, values = 0, 0, []
    separators = {match.start(): match.end() for match in _CONJUNCTION.finditer(text)}
    for position, character in enumerate(text):
        if depth <= 0 and position in separators and position >= start:
            values.append(text[start:position])
            start = separators[position]
        depth += (character in "([{") - (character in ")]}")
    return [value.strip() for value in [*values, text[start:]] if value.strip()]


def without_unit(text: str, unit: str) -> str:
    r"""A tidy answer without the unit at its end, also as ``\text{unit}``, ``\%`` or in the plural.

    >>> without_unit(r"166\text{ cm}^{2}", "cm^2")
    '166'
    """
    bare = re.sub(r"\^\{([0-9])\}", r"^\1", _WRAPPER.sub(r"\1", text)).replace(r"\%", "%")
    bare = re.sub(r"\s*/\s*", "/", bare).rstrip()
    for ending in (unit, unit + "s"):
        if unit and bare.endswith(ending):
            return re.sub(r"(?:\s|~|\\[ ,;:])+$", "", bare.removesuffix(ending))
    return text


def without_words(text: str) -> str:
    """A tidy answer without the name before a number, and the words after it that say what is counted.

    >>> without_words("x = 42 eggs per day"), without_words("42 thousand")
    ('42', '42 thousand')
    """
    match = _COUNTED.fullmatch(text)
    return match[1] if match and not _CHANGES.search(match[2] or "") else text


def letters(text: str) -> set[str]:
    r"""The options that an answer names: ``C``, ``(C)``, ``\text{C}``, ``CCCCC``, ``C) 42``, ``the answer is C``."""
    text = _WRAPPER.sub(r" \1 ", text.replace("*", " ").replace("$", " "))
    bare = text.strip(" .()[]{}")
    if bare and bare.isalpha() and bare.isascii() and len(set(bare.upper())) == 1:
        return {bare[0].upper()}
    return set(_OPTION.findall(text) or _LETTER.findall(text))


def words(text: str) -> tuple[str, ...]:
    """The items of a text between commas: lower case, hyphens and white space as one space, no article or markup."""
    text = _WRAPPER.sub(r"\1", unicodedata.normalize("NFKC", text)).casefold()
    text = re.sub(r"[*$\\`\"'(){}\[\]]", "", text)
    items = [" ".join(re.split(r"[\s_~-]+", item)).strip(" .:") for item in re.split("[,;]", text)]
    items = [_ARTICLE.sub("", item, count=1) for item in items]
    return tuple(str(int(item)) if item.isascii() and item.isdecimal() else item for item in items if item)

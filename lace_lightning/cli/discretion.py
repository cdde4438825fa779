"""A command's messages, logs and tracebacks, without secrets."""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType
from typing import Any

from lace_lightning.tracking.redact import redact_lines, redact_text

_make_record = logging.getLogRecordFactory()


def be_discreet() -> None:
    """From now on, log records of any library and tracebacks that end this process hold no secret."""
    logging.setLogRecordFactory(_discreet_record)
    sys.excepthook = _print_traceback


def _discreet_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _make_record(*args, **kwargs)
    try:
        told = record.getMessage()
    except (TypeError, ValueError, KeyError):  # a mistaken call, which logging itself will report
        return record
    if (shown := redact_text(told)) != told:
        record.msg, record.args = shown, ()
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redact_text("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
    return record


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact_lines("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

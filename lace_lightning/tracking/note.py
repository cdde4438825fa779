"""The description of a run in words: what it is, what differs from its parent, how to repeat it, how it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as the run's description."""

MAX_DIFFERENCES = 20
_MAX_VALUE, _MAX_METHODS = 80, 8
_SHOWN_METRICS = ("val/acc", "val/best_at_n", "val/fmt", "test/acc", "test/best_at_n", "train/loss", "reward/total")
_INCIDENTAL = (
    "trainer.log_every_n_steps",
    "verbose",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "parameters/",
    "ckpt_path",
    "model.init_args.init_from",
)


@dataclass
class Note:
    """What a run's description says; Markdown, as MLflow shows it.

    Args:
        what: one or two sentences.
        command: the one command that repeats the run.
        commit: the checkout's; None outside of one.
        is_dirty: it had uncommitted changes.
        parent: the run whose weights this one starts from, or that it belongs to: a sentence.
        differences: dotted setting -> its value there and here; None if the parent's are not known.
    """

    what: str = ""
    command: str = ""
    commit: str | None = None
    is_dirty: bool = False
    parent: str = ""
    differences: Mapping[str, tuple[str | None, str | None]] | None = None

    def markdown(self, went: str) -> str:
        """The description, with how it went."""
        parts = [self.what, self._difference(), self._command(), f"**How it went:** {went}"]
        return "\n\n".join(part for part in parts if part)

    def _difference(self) -> str:
        if not self.parent or self.differences is None:
            return self.parent
        if not self.differences:
            return f"{self.parent} No setting differs from it."
        shown = [_changed(name, *values) for name, values in list(self.differences.items())[:MAX_DIFFERENCES]]
        if (left := len(self.differences) - len(shown)) > 0:
            shown.append(f"- and {left} more: compare the two runs' parameters")
        return f"{self.parent} What differs from it:\n\n" + "\n".join(shown)

    def _command(self) -> str:
        changed = " with the changes in `run/git.diff`" if self.is_dirty else ""
        at = f" at commit `{self.commit}`{changed}" if self.commit else ""
        return f"**Repeat it**{at}:\n\n```\n{self.command}\n```" if self.command else ""


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Settings of two runs that differ, but for those that say only where a run is kept; None where one is not set."""
    names = [name for name in dict.fromkeys([*here, *there]) if not name.startswith(_INCIDENTAL)]
    return {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}


def how_it_went(status: str, seconds: float, error: BaseException | None, metrics: Mapping[str, float]) -> str:
    """A sentence or two on the end of a run; ``status`` is MLflow's word."""
    words = {"FINISHED": "finished", "KILLED": "was stopped", "FAILED": "failed", "RUNNING": "is running"}
    told = f"{words[status]} after {_duration(seconds)}." if status != "RUNNING" else "is running."
    if status == "FAILED" and error is not None:
        told += f" {type(error).__name__}: {_cut(str(error).partition(chr(10))[0], 300)}"
    evaluated = [name for name in metrics if name.startswith("eval/") and name.endswith("/acc")]
    names = [*_SHOWN_METRICS, *evaluated[:_MAX_METHODS]]
    shown = [f"`{name}` {metrics[name]:.4g}" for name in names if name in metrics]
    return f"{told} Last values: {', '.join(shown)}." if shown else told


def _changed(name: str, there: str | None, here: str | None) -> str:
    before, now = ("not set" if value is None else f"`{_cut(value, _MAX_VALUE)}`" for value in (there, here))
    return f"- `{name}`: {before} there, {now} here"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + " …"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"

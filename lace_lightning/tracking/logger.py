"""Lightning's logger for MLflow, with a spool in between: the run never waits for, nor depends on, the server."""

from __future__ import annotations

import atexit
import json
import logging
import posixpath
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lace_lightning.tracking import run_info, store
from lace_lightning.tracking.pictures import image_files, table_file
from lace_lightning.tracking.redact import redact, redact_uri
from lace_lightning.tracking.sender import Sender
from lace_lightning.tracking.spool import Record, Spool, SpoolReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.tracking import MlflowClient

FLUSH_SECONDS = 10.0
MAX_PARAM_CHARACTERS = 6000  # MLflow's limit
_MAX_TAG_CHARACTERS = 8000
_MAX_KEY_CHARACTERS = 250

log = logging.getLogger(__name__)


class _Run(NamedTuple):
    id: str
    name: str
    client: MlflowClient
    spool: Spool
    sender: Sender


class MLflowLogger(Logger):
    """Logs to MLflow through a local spool, from which a background thread sends.

    Every metric, parameter, tag and artifact is first written to ``<save_dir>/<experiment>/<version>/spool``. A server
    that dies during the run neither stops nor slows it; whatever could not be sent within ten seconds of the end stays
    in the spool, and ``lace sync`` sends it later. The run ends as FINISHED, as KILLED after Ctrl-C or SIGTERM, and as
    FAILED after any other exception.

    Args:
        experiment_name: MLflow experiment; created if there is none.
        run_name: name of the run; MLflow invents one if None.
        tracking_uri: ``sqlite:///path`` or the address of a server; None means the environment variable
            MLFLOW_TRACKING_URI if set, else ``sqlite:///runs/mlflow.db`` with artifacts in ``runs/mlartifacts``.
        tags: tags of the run.
        parent_run_id: MLflow id of the run under which this one is shown.
        save_dir: folder of run folders: spool, checkpoints and config of a run lie in
            ``<save_dir>/<experiment>/<version>``, where version is the run's name and the start of its id.

    Raises:
        ValueError: ``tracking_uri`` is a folder.
        TrackingError: the server does not answer; raised at once, before anything else starts.
    """

    def __init__(
        self,
        experiment_name: str = "lace",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, str] | None = None,
        parent_run_id: str | None = None,
        save_dir: str = "runs",
    ) -> None:
        super().__init__()
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tags = dict(tags or {})
        self._parent_run_id = parent_run_id
        self._save_dir = save_dir
        self._tables: list[str] = []
        self._run: _Run | None = None
        self.tracking_uri = store.resolve_tracking_uri(tracking_uri)
        if store.is_server(self.tracking_uri) and _on_rank_zero():
            store.check(store.connect(self.tracking_uri), self.tracking_uri)

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """MLflow's own client, for reading; what is written past this logger is lost when the server is away."""
        return self._started().client

    @property
    def name(self) -> str:
        """Folder of the experiment inside ``save_dir``."""
        return _file_name(self._experiment_name)

    @property
    def version(self) -> str | None:
        """Folder of the run inside its experiment's: its name and the start of its id. None on ranks above zero."""
        if not _on_rank_zero():
            return None
        run = self._started()
        return f"{_file_name(run.name)}-{run.id[:8]}"

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None on ranks above zero."""
        return self._started().id if _on_rank_zero() else None

    @property
    def save_dir(self) -> str:
        """Folder of all experiments."""
        return self._save_dir

    @property
    def log_dir(self) -> str:
        """Folder of this run."""
        return str(Path(self._save_dir, self.name, str(self.version)))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers under ``family/statistic`` names; texts among them are left out."""
        values = {_key(name): float(value) for name, value in metrics.items() if not isinstance(value, str)}
        if values:
            self._append({"kind": "metrics", "time": _now(), "step": step or 0, "values": values})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log nested settings in full length; a value above MLflow's 6,000 characters becomes an artifact."""
        settings = vars(params) if isinstance(params, Namespace) else params
        for name, value in _flat(redact(settings)):
            self._log_param(_key(name), str(value))

    @rank_zero_only
    def log_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._append({"kind": "tag", "key": _key(name), "value": value[:_MAX_TAG_CHARACTERS]})

    @rank_zero_only
    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep text as the run's artifact ``artifact_file``, say ``samples/step-100.html``; replaces an earlier one."""
        self._add_file(text.encode(), artifact_file)

    @rank_zero_only
    def log_image(self, name: str, image: str | PathLike[str] | Figure, step: int = 0) -> None:
        """Keep a picture file or matplotlib figure; MLflow shows the pictures of one name with a step slider."""
        for artifact_file, content in image_files(_key(name), image, step, _now()).items():
            self._add_file(content, artifact_file)
        self.log_tag("mlflow.loggedImages", "True")

    @rank_zero_only
    def log_table(self, rows: Sequence[Mapping[str, object]], name: str) -> None:
        """Keep rows as the table ``tables/<name>.json``, as MLflow's Evaluation page shows it; replaces an earlier."""
        artifact_file = f"tables/{name}.json"
        self._add_file(table_file(rows), artifact_file)
        if artifact_file not in self._tables:
            self._tables.append(artifact_file)
            shown = [{"path": path, "type": "table"} for path in self._tables]
            self.log_tag("mlflow.loggedArtifacts", json.dumps(shown))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Set how the run ended and send what is left, for at most ten seconds.

        Lightning says "failed" for Ctrl-C as for a crash, but calls this while it handles the exception.
        """
        if self._run is None:
            return
        self._append({"kind": "status", "status": _final_status(status, sys.exception()), "time": _now()})
        self._flush()

    def _started(self) -> _Run:
        if self._run is None:
            self._run = self._start()
            atexit.register(self._flush)
            self._log_run_info()
        return self._run

    def _start(self) -> _Run:
        client = store.connect(self.tracking_uri)
        parent = {"mlflow.parentRunId": self._parent_run_id} if self._parent_run_id else {}
        opened = store.open_run(
            client, self.tracking_uri, self._experiment_name, self._run_name, {**self._tags, **parent}
        )
        run_id, name = opened.info.run_id, opened.info.run_name
        folder = Path(self._save_dir, self.name, f"{_file_name(name)}-{run_id[:8]}", "spool")
        spool = Spool(folder, run_id, redact_uri(self.tracking_uri))
        return _Run(run_id, name, client, spool, Sender(client, SpoolReader(folder), self.tracking_uri))

    def _log_run_info(self) -> None:
        here = Path.cwd()
        environment, hardware, git = run_info.environment(), run_info.hardware(), run_info.git_state(here)
        self.log_text(json.dumps(environment, indent=2), "run/environment.json")
        self.log_text(json.dumps(hardware, indent=2), "run/hardware.json")
        self.log_tag("python", environment["python"])
        self.log_tag("device", hardware["gpus"][0]["name"] if hardware["gpus"] else hardware["cpu"])
        if git is not None:
            self.log_text(json.dumps(git, indent=2), "run/git.json")
            self.log_text(run_info.git_diff(here), "run/git.diff")
            self.log_tag("git.commit", git["commit"])
            self.log_tag("git.dirty", str(git["dirty"]).lower())

    def _log_param(self, name: str, value: str) -> None:
        if len(value) > MAX_PARAM_CHARACTERS:
            artifact_file = f"params/{_file_name(name)}.txt"
            self.log_text(value, artifact_file)
            value = f"{len(value)} characters: see artifact {artifact_file}"
        self._append({"kind": "param", "key": name, "value": value})

    def _append(self, record: Record) -> None:
        run = self._started()
        run.spool.append(record)
        run.sender.start()

    def _add_file(self, content: bytes, artifact_file: str) -> None:
        run = self._started()
        run.spool.add_file(content, artifact_file)
        run.sender.start()

    def _flush(self) -> None:
        assert self._run is not None
        try:
            left = self._run.sender.close(FLUSH_SECONDS)
        except KeyboardInterrupt:  # a second Ctrl-C: the user will not wait
            left = SpoolReader(self._run.spool.folder).pending()
        if not self._run.sender.is_busy:  # else the spool stays locked, lest `lace sync` send the same beside us
            self._run.spool.close()
        if left:
            log.warning(
                "%d records of run %s could not be sent to %s. Nothing is lost; when it answers again: lace sync %s",
                left,
                self._run.name,
                redact_uri(self.tracking_uri),
                self._run.spool.folder,
            )


def _on_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _final_status(status: str, error: BaseException | None) -> str:
    """MLflow's word for how a run ended. SIGTERM ends as a SystemExit, Lightning's and ours alike."""
    if status in ("success", "finished"):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def _flat(settings: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of nested settings under their dotted names; lists stay whole."""
    if not isinstance(settings, Mapping) or not settings:
        yield prefix, settings
        return
    for name, value in settings.items():
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def _key(name: str) -> str:
    """A name that MLflow accepts for a metric, parameter or tag."""
    plain = posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("./")
    return plain[:_MAX_KEY_CHARACTERS] or "_"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"


def _now() -> int:
    return int(time.time() * 1000)

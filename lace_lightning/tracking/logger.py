"""Lightning's logger for MLflow, with a spool in between: the run never waits for, nor depends on, the server."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lace_lightning.tracking import run_info, store
from lace_lightning.tracking.live_run import LiveRun
from lace_lightning.tracking.names import file_name, flat, key
from lace_lightning.tracking.note import NOTE, Note, differences, how_it_went
from lace_lightning.tracking.pictures import image_files, table_file
from lace_lightning.tracking.redact import redact, redact_lines
from lace_lightning.tracking.spool import Record
from lace_lightning.tracking.system import SystemMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.tracking import MlflowClient

MAX_PARAM_CHARACTERS = 6000  # MLflow's limit
PARENT_RUN = "LACE_PARENT_RUN"
"""Environment variable: id of the MLflow run under which runs are shown that name no other parent."""
_MAX_TAG_CHARACTERS = 8000


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
        parent_run_id: MLflow id of the run under which this one is shown; None: LACE_PARENT_RUN of the environment.
        save_dir: folder of run folders: spool, checkpoints and config of a run lie in
            ``<save_dir>/<experiment>/<version>``, where version is the run's name and the start of its id.
        system_seconds: from one measurement of processor, memory, disk, network and GPUs to the next; 0: none.

    Raises:
        ValueError: ``tracking_uri`` is a folder, or ``system_seconds`` negative.
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
        system_seconds: float = 10.0,
    ) -> None:
        super().__init__()
        if system_seconds < 0:
            raise ValueError(f"system_seconds={system_seconds} must be at least 0, which measures nothing")
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tags = dict(tags or {})
        self._parent_run_id = parent_run_id or os.environ.get(PARENT_RUN)
        self._save_dir = save_dir
        self._tables: list[str] = []
        self._run: LiveRun | None = None
        self._system = SystemMetrics(self.log_metrics, system_seconds)
        self._note: Note | None = None
        self._began = time.monotonic()
        self._commit: str | None = None
        self._is_dirty = False
        self._params: dict[str, str] = {}
        self._last: dict[str, tuple[float, int, int]] = {}  # metric -> value, time, step
        self._weights_of: str | None = None
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
        return file_name(self._experiment_name)

    @property
    def version(self) -> str | None:
        """Folder of the run inside its experiment's: its name and the start of its id. None on ranks above zero."""
        if not _on_rank_zero():
            return None
        return self._started().version

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
        values = {key(name): float(value) for name, value in metrics.items() if not isinstance(value, str)}
        if not values:
            return
        now, of = _now(), {"weights_of": self._weights_of} if self._weights_of else {}
        self._started().append({"kind": "metrics", "time": now, "step": step or 0, "values": values, **of})
        self._last |= {name: (value, now, step or 0) for name, value in values.items() if not _is_system(name)}

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log nested settings in full length; a value above MLflow's 6,000 characters becomes an artifact."""
        settings = vars(params) if isinstance(params, Namespace) else params
        for name, value in flat(redact(settings)):
            self._log_param(key(name), str(value))

    @rank_zero_only
    def log_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self._started().append({"kind": "tag", "key": key(name), "value": value[:_MAX_TAG_CHARACTERS]})

    @rank_zero_only
    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep text as the run's artifact ``artifact_file``, say ``samples/step-100.html``; replaces an earlier one."""
        self._started().add_file(text.encode(), artifact_file)

    @rank_zero_only
    def log_image(self, name: str, image: str | PathLike[str] | Figure, step: int = 0) -> None:
        """Keep a picture file or matplotlib figure; MLflow shows the pictures of one name with a step slider."""
        for artifact_file, content in image_files(key(name), image, step, _now()).items():
            self._started().add_file(content, artifact_file)
        self.log_tag("mlflow.loggedImages", "True")

    @rank_zero_only
    def log_table(self, rows: Sequence[Mapping[str, object]], name: str) -> None:
        """Keep rows as the table ``tables/<name>.json``, as MLflow's Evaluation page shows it; replaces an earlier."""
        artifact_file = f"tables/{name}.json"
        self._started().add_file(table_file(rows), artifact_file)
        if artifact_file not in self._tables:
            self._tables.append(artifact_file)
            shown = [{"path": path, "type": "table"} for path in self._tables]
            self.log_tag("mlflow.loggedArtifacts", json.dumps(shown))

    @rank_zero_only
    def describe(self, what: str, command: str = "", starts_from: str | None = None) -> None:
        """Say in words what the run is; the end of the run adds how it went.

        Args:
            what: a sentence or two.
            command: repeats the run; secrets in it are hidden.
            starts_from: id of the run whose weights this one starts from: the description lists what differs from it,
                or, without it, from the parent run.
        """
        run = self._started()
        note = Note(what, redact_lines(command), self._commit, self._is_dirty)
        other = starts_from or self._parent_run_id
        if other is not None:
            name, params = run.look_up(other)
            uses = "Measures" if self._weights_of else "Starts from"
            note.parent = f"{uses} the weights of run {name}." if starts_from else f"Belongs to run {name}."
            note.differences = None if params is None or starts_from is None else differences(params, self._params)
        self._note = note
        self.log_tag(NOTE, note.markdown(how_it_went("RUNNING", 0.0, None, {})))

    @rank_zero_only
    def log_weights(self, step: int, tags: Mapping[str, str]) -> None:
        """Make the run's checkpoint a logged model of MLflow, with the last value of every metric linked to it.

        Args:
            step: of the checkpoint.
            tags: where checkpoint, config and data lie; the commit is added.
        """
        commit = {"git.commit": self._commit} if self._commit else {}
        self._started().append({"kind": "weights", "step": step, "tags": {**tags, **commit}, "values": self._last})

    @rank_zero_only
    def use_weights(self, runs: Sequence[str], evaluates: bool = False) -> None:
        """Link this run to those that wrote the weights it uses.

        Args:
            runs: their ids, the main one last.
            evaluates: metrics logged from now on are of the last one's weights, and shown there too.
        """
        if runs:
            self._started().append({"kind": "uses", "runs": list(dict.fromkeys(runs))})
            self.log_tag("lace.weights_of", runs[-1])
            self._weights_of = runs[-1] if evaluates else None

    @rank_zero_only
    def log_trace(self, trace: Record) -> None:
        """Keep a trace made by :mod:`lace_lightning.tracking.traces`; what was already sent is replaced."""
        self._started().append({"kind": "trace", **trace})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Set how the run ended and send what is left, for at most ten seconds.

        Lightning says "failed" for Ctrl-C as for a crash, but calls this while it handles the exception.
        """
        if self._run is None:
            return
        self._system.stop()
        error = sys.exception()
        ended = _final_status(status, error)
        if self._note is not None:
            last = {name: value for name, (value, _, _) in self._last.items()}
            went = how_it_went(ended, time.monotonic() - self._began, error, last)
            self.log_tag(NOTE, self._note.markdown(redact_lines(went)))
        self._started().append({"kind": "status", "status": ended, "time": _now()})
        self._run.flush()

    def _started(self) -> LiveRun:
        if self._run is None:
            parent = {"mlflow.parentRunId": self._parent_run_id} if self._parent_run_id else {}
            folder = Path(self._save_dir, self.name)
            tags = {**self._tags, **parent}
            self._run = LiveRun(self.tracking_uri, self._experiment_name, self._run_name, tags, folder)
            atexit.register(self._run.flush)
            self._log_run_info()
            self._system.start()
        return self._run

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
            self._commit, self._is_dirty = git["commit"], git["dirty"]
            self.log_tag("git.commit", git["commit"])
            self.log_tag("git.dirty", str(git["dirty"]).lower())

    def _log_param(self, name: str, value: str) -> None:
        if len(value) > MAX_PARAM_CHARACTERS:
            artifact_file = f"params/{file_name(name)}.txt"
            self.log_text(value, artifact_file)
            value = f"{len(value)} characters: see artifact {artifact_file}"
        self._params[name] = value
        self._started().append({"kind": "param", "key": name, "value": value})


def _on_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _final_status(status: str, error: BaseException | None) -> str:
    """MLflow's word for how a run ended. SIGTERM ends as a SystemExit, Lightning's and ours alike."""
    if status in ("success", "finished"):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"


def _is_system(name: str) -> bool:
    """These are measured on a thread of their own."""
    return name.startswith("system/")


def _now() -> int:
    return int(time.time() * 1000)

"""One parent run for several ``lace`` commands: the recipe that they are the stages of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lace_lightning.tracking.logger import PARENT_RUN, MLflowLogger


@contextmanager
def recipe(
    name: str, what: str, command: str, experiment_name: str = "lace", tracking_uri: str | None = None
) -> Iterator[MLflowLogger]:
    """Inside it, runs of this process and of those that it starts become children of a new run.

    The run ends as FINISHED, KILLED or FAILED, as what is inside does.

    Args:
        name: of the parent run.
        what: the recipe in a sentence or two.
        command: repeats all of it.
        experiment_name, tracking_uri: as of :class:`MLflowLogger`; children belong into the same experiment.

    Yields:
        The parent's logger, for the recipe's results.

    Raises:
        TrackingError: the store does not answer.
    """
    logger = MLflowLogger(experiment_name, name, tracking_uri, {"lace.stage": "recipe"}, system_seconds=0)
    logger.describe(what, command)
    before = os.environ.get(PARENT_RUN)
    os.environ[PARENT_RUN] = str(logger.run_id)
    try:
        yield logger
    except BaseException:
        logger.finalize("failed")
        raise
    else:
        logger.finalize("success")
    finally:
        if before is None:
            del os.environ[PARENT_RUN]
        else:
            os.environ[PARENT_RUN] = before

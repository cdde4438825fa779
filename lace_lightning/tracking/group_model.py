"""A model as MLflow's pyfunc flavour: problems in, groups of threads out.

Its files are those of Hugging Face (``backbone/``, ``tokenizer/``), of ``save_exchange`` (``exchange/``) and a
``settings.yaml``; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from mlflow.pyfunc import PythonModel

from lace_lightning.adapter import read_exchange_config
from lace_lightning.decoding import DecodingSpec, Group, Sampling, group_seed, play_groups
from lace_lightning.threaded_lm import ThreadedLM
from lace_lightning.traces.schema import Problem

if TYPE_CHECKING:
    from lace_lightning.tasks import Task

FILES = "group_model"
"""Name of the folder among the model's artifacts."""


def save_group_model(
    model: ThreadedLM, task: Mapping[str, Any], decoding: DecodingSpec, max_length: int, folder: Path
) -> None:
    """Write all that :class:`GroupModel` needs.

    Args:
        model: with its tokenizer. A LoRA of the backbone is merged into it.
        task: ``class_path`` and ``init_args`` of the task, as a config has them.
        decoding: how groups are sampled.
        max_length: most columns of a group, prompt included.
        folder: where; must not exist.
    """
    assert model.tokenizer is not None
    folder.mkdir(parents=True)
    merge: Any = getattr(model.backbone, "merge_and_unload", None)
    backbone = model.backbone if merge is None else merge()
    backbone.save_pretrained(folder / "backbone")
    model.tokenizer.save_pretrained(folder / "tokenizer")
    if model.exchanges:
        model.save_exchange(folder / "exchange")
    settings = {
        "task": dict(task),
        "decoding": asdict(decoding),
        "num_threads": model.num_threads,
        "max_length": max_length,
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


class GroupModel(PythonModel):
    """Problems in, groups out. An input row has ``text`` and may have ``id``, ``answer`` and ``facts`` (JSON).

    A group is a function of its problem's id (its text, if there is none), of the parameter ``seed`` and of the
    weights: it is the group of ``lace validate`` with that seed.
    """

    def load_context(self, context: Any) -> None:
        """Load the files that :func:`save_group_model` wrote; on the GPU, if there is one."""
        folder = Path(context.artifacts[FILES])
        settings = yaml.safe_load((folder / "settings.yaml").read_text())
        sampling = Sampling(**settings["decoding"].pop("sampling"))
        self._decoding = DecodingSpec(sampling=sampling, **settings["decoding"])
        self._max_length: int = settings["max_length"]
        self._task = _make_task(settings["task"])
        self._model = _load(folder, settings["num_threads"])

    # MLflow takes a hint of the input for its schema, and warns of all but a few.
    def predict(self, context, model_input, params=None) -> list[dict[str, Any]]:  # type: ignore[no-untyped-def]
        """One group per row, as JSON values.

        Raises:
            ValueError: a row is no problem, or its environment needs facts that it does not give.
        """
        problems = [_problem(row) for row in _rows(model_input)]
        seeds = [group_seed("validation", (params or {}).get("seed", 0), problem.id) for problem in problems]
        assert self._model.tokenizer is not None
        try:
            groups, _ = play_groups(
                self._model, self._task, self._model.tokenizer, problems, seeds, self._decoding, self._max_length
            )
        except KeyError as error:
            raise ValueError(
                f"{type(self._task).__name__} plays only problems whose facts are given: {error}"
            ) from error
        return [group_values(group) for group in groups]


def group_values(group: Group) -> dict[str, Any]:
    """A group as JSON values; ``best`` is the index of the chosen thread, null if the tags are not valid."""
    threads = [
        {
            "text": thread.text,
            "answer": thread.answer,
            "tag": None if thread.tag is None else str(thread.tag),
            "finished": thread.finished,
            "token_ids": list(thread.token_ids),
            "columns": list(thread.columns),
        }
        for thread in group.threads
    ]
    return {
        "problem": group.problem.id,
        "best": group.best_index,
        "answer": group.best and group.best.answer,
        "threads": threads,
    }


def input_row(problem: Problem) -> dict[str, str]:
    """A problem as an input row; also the model's input example."""
    return {"text": problem.text, "id": problem.id, "answer": problem.answer, "facts": json.dumps(dict(problem.facts))}


def _rows(model_input: Any) -> list[Mapping[str, Any]]:
    """Rows of a DataFrame, a list of them, one of them, or a list of texts."""
    if hasattr(model_input, "to_dict") and not isinstance(model_input, Mapping):
        return list(model_input.to_dict("records"))
    rows: Sequence[Any] = [model_input] if isinstance(model_input, str | Mapping) else model_input
    return [{"text": row} if isinstance(row, str) else row for row in rows]


def _problem(row: Mapping[str, Any]) -> Problem:
    given = {name: value for name, value in row.items() if isinstance(value, str)}  # pandas writes NaN for absent ones
    if "text" not in given:
        raise ValueError(f"an input row needs text, the problem; this one has {sorted(row)}")
    facts = json.loads(given.get("facts") or "{}")
    return Problem(id=given.get("id", given["text"]), text=given["text"], answer=given.get("answer", ""), facts=facts)


def _make_task(settings: Mapping[str, Any]) -> Task:
    """The task; its class path must name a subclass of Task."""
    from jsonargparse import ArgumentParser

    from lace_lightning.tasks import Task

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    made: Task = parser.instantiate_classes(parser.parse_object({"task": dict(settings)})).task
    return made


def _load(folder: Path, num_threads: int) -> ThreadedLM:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exchange, layers = read_exchange_config(folder / "exchange") if (folder / "exchange").is_dir() else (None, None)
    backbone = AutoModelForCausalLM.from_pretrained(folder / "backbone", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    model = ThreadedLM(backbone, exchange, num_threads, layers, tokenizer)
    if exchange is not None:
        model.load_exchange(folder / "exchange")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

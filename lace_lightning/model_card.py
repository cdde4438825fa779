"""The page that tells what an exported model is, how it did, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lace_lightning.threaded_lm import ThreadedLM
    from lace_lightning.traces.template import Template

PAPER = "https://arxiv.org/abs/2604.15529"


@dataclass(frozen=True)
class ModelCard:
    """What is known about a model besides its weights.

    Args:
        name: title.
        stage: the stage that wrote the checkpoint.
        base: hub name of the backbone that training started from; None: random weights, or a folder of this machine.
        task: name of the task's class.
        template: spelling of prompts and assessments.
        prompt: a problem of the task, as an example.
        max_new_tokens: columns that its evaluation decoded.
        metrics: of the checkpoint, by name.
        run_id: MLflow's id of the run that wrote it.
    """

    name: str
    stage: str
    base: str | None
    task: str
    template: Template
    prompt: str
    max_new_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str | None = None

    def page(self, model: ThreadedLM) -> str:
        """The card in Markdown, with the metadata that the Hugging Face hub reads in front."""
        parts = [_metadata(self.base), self._what(model), _exchange(model), self._metrics(), self._loading(model)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _what(self, model: ThreadedLM) -> str:
        counts = model.parameter_counts()
        base = "random weights" if self.base is None else self.base
        run = "" if self.run_id is None else f", MLflow run {self.run_id}"
        layers = ", ".join(sorted(model.exchanges, key=int)) or "none"
        return (
            f"# {self.name}\n\n"
            f"N = {model.num_threads} reasoning threads that read each other while they are decoded in lock-step "
            f"([LACE]({PAPER})). Written by lace-lightning, stage {self.stage} on {self.task}{run}.\n\n"
            "| part | what | parameters |\n| --- | --- | --- |\n"
            f"| this folder | the backbone, a plain `transformers` model; base: {base} | {counts['backbone']:,} |\n"
            f"| `exchange/` | what joins the threads, on layers {layers} | {counts['exchange']:,} |"
        )

    def _metrics(self) -> str:
        if not self.metrics:
            return ""
        rows = [f"| {name} | {value:.4g} |" for name, value in sorted(self.metrics.items())]
        return "\n".join(["## Metrics", "", "| metric | value |", "| --- | --- |", *rows])

    def _loading(self, model: ThreadedLM) -> str:
        return f"""## Loading

With `FOLDER` as the folder of this file (`huggingface_hub.snapshot_download` fetches it from the hub). The backbone
alone, one thread:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```

All threads, with `pip install lace-lightning`:

```python
from lace_lightning import Template, ThreadedLM
from lace_lightning.adapter import read_exchange_config

exchange, layers = read_exchange_config(f"{{FOLDER}}/exchange")
model = ThreadedLM.from_pretrained(FOLDER, exchange, num_threads={model.num_threads}, layers=layers)
model.load_exchange(f"{{FOLDER}}/exchange")
template = {self.template!r}
group = model.generate_groups([{self.prompt!r}], max_new_tokens={self.max_new_tokens}, template=template)[0]
for thread in group.threads:
    print(thread.text)
```"""


def summaries(folder: Path) -> dict[str, float]:
    """Metrics of the ``val_summary.json`` and ``test_summary.json`` of a run's folder, where they are."""
    found: dict[str, float] = {}
    for phase in ("val", "test"):
        file = folder / f"{phase}_summary.json"
        if file.is_file():
            values = json.loads(file.read_text())["metrics"].items()
            found |= {f"{phase}/{name}": value for name, value in values if value is not None}
    return found


def _metadata(base: str | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [lace, lace-lightning]"]
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join([*lines, "---"])


def _exchange(model: ThreadedLM) -> str:
    settings: dict[str, Any] = {"exchange": type(model.exchange_config).__name__, "layers": model.layers}
    settings |= {"config": asdict(model.exchange_config)}
    return f"## Exchange\n\n```json\n{json.dumps(settings, indent=2)}\n```"

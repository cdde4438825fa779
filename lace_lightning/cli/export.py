"""``lace export``: a checkpoint as safetensors that plain ``transformers`` loads, with the exchange and a card."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lace_lightning.cli.main import explain
from lace_lightning.cli.next_steps import say_next

if TYPE_CHECKING:
    from lace_lightning.model_card import ModelCard


def run(argv: Sequence[str]) -> int:
    """Export, and push if asked to; the exit code: 0, or 2 for what the user can mend."""
    given = _parser().parse_args(argv)
    from lace_lightning.tracking.store import TrackingError

    try:
        _check(given)
        size = _export(given)
        if given.push_to_hub is not None:
            from lace_lightning.cli.hub import push

            print(f"pushed to {push(given.out, given.push_to_hub, private=not given.public)}")
    except (ValueError, OSError, TrackingError) as error:
        return explain(error)
    print(f"exported {given.ckpt} to {given.out}: {size / 2**20:,.1f} MiB of safetensors, and README.md")
    say_next(*_next(given))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lace export",
        description="Write a checkpoint, plain or sharded, as a backbone that plain transformers loads, the exchange "
        "beside it, and a model card.",
        epilog="example: lace export runs/demo/lace/grpo.ckpt doors-lace",
    )
    parser.add_argument(
        "ckpt", metavar="CKPT", type=Path, help="a checkpoint of lace fit: a file, or a folder of shards"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="config.yaml of the run (CKPT's name with .yaml, or beside or above it)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT")
    parser.add_argument("--push_to_hub", metavar="REPO", help="also upload to this Hugging Face repository, USER/NAME")
    parser.add_argument("--public", action="store_true", help="with --push_to_hub: make a new repository public")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Raise what can be known before anything slow begins."""
    from lace_lightning.export import check_target

    if not given.ckpt.exists():
        raise ValueError(f"CKPT {given.ckpt}: there is no such checkpoint")
    if given.public and given.push_to_hub is None:
        raise ValueError("--public goes with --push_to_hub REPO: nothing leaves this machine without it")
    check_target(given.out, given.overwrite)
    given.config = given.config or _config_of(given.ckpt)
    if given.push_to_hub is not None:
        from lace_lightning.cli.hub import check_login

        check_login(given.push_to_hub)


def _config_of(checkpoint: Path) -> Path:
    """The resolved config of the run that wrote a checkpoint."""
    beside = (checkpoint.with_suffix(".yaml"), checkpoint.parent / "config.yaml", checkpoint.parents[1] / "config.yaml")
    found = [path for path in beside if path.is_file()]
    if not found:
        raise ValueError(
            f"no config of a run beside CKPT {checkpoint} (looked for {', '.join(map(str, beside))}): --config"
        )
    return found[0]


def _export(given: argparse.Namespace) -> int:
    """Write OUT; the bytes of its safetensors."""
    from lace_lightning.cli.sources import load_stage
    from lace_lightning.export import export

    module, data, config, checkpoint = load_stage(
        argparse.Namespace(run=None, config=str(given.config), ckpt=str(given.ckpt))
    )
    assert module.model is not None
    card = _card(given.out.absolute().name, module, data, config, checkpoint)
    export(module.model, given.out, card.page(module.model))
    return sum(file.stat().st_size for file in given.out.rglob("*.safetensors"))


def _card(name: str, module: Any, data: Any, config: Path, checkpoint: Path) -> ModelCard:
    from lace_lightning.checkpoints import writer_of
    from lace_lightning.cli.sources import example_of
    from lace_lightning.model_card import ModelCard, summaries

    run_id = writer_of(checkpoint)
    base = module.spec.backbone
    return ModelCard(
        name,
        module.stage,
        base=None if base is None or Path(base).expanduser().is_dir() else base,
        task=type(data.task).__name__,
        template=data.task.template,
        prompt=example_of(data).text,
        max_new_tokens=module.validation.max_new_tokens,
        metrics=_tracked(run_id) | summaries(config.parent),
        run_id=run_id,
    )


def _tracked(run_id: str | None) -> dict[str, float]:
    """What MLflow knows of a run's weights, evaluations by later runs included; nothing if their store is not here."""
    from lace_lightning.tracking import store
    from lace_lightning.tracking.weights import model_of

    uri = store.resolve_tracking_uri(None)
    if run_id is None or (not store.is_server(uri) and not Path(uri.removeprefix("sqlite:///")).is_file()):
        return {}
    with store.remedies(uri):
        client = store.connect(uri)
        model_id = model_of(client, run_id)
        if model_id is None:
            return {}
        metrics = sorted(client.get_logged_model(model_id).metrics or [], key=lambda metric: metric.timestamp)
    return {metric.key: metric.value for metric in metrics if metric.key.startswith(("val/", "test/"))}


def _next(given: argparse.Namespace) -> list[tuple[str, str]]:
    out = shlex.quote(str(given.out))
    steps = [("read its card, which ends with the lines that load it", f"cat {out}/README.md")]
    if given.push_to_hub is None:
        again = shlex.join([str(given.ckpt), str(given.out), "--config", str(given.config)])
        steps.append(
            ("put it on the Hugging Face hub, private", f"lace export {again} --overwrite --push_to_hub USER/NAME")
        )
    return steps

"""Which option brings the peak down by how much: the estimate of the same run with one option changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lace_lightning.memory.estimate import estimate
from lace_lightning.memory.run import Decoding, Precision, Run


@dataclass(frozen=True)
class Knob:
    """An option of the command line, and the bytes by which it lowers the peak."""

    option: str
    saved: int


def knobs(run: Run) -> list[Knob]:
    """What would help, the most helpful first; options that help nothing are left out."""
    peak = estimate(run).peak.total
    found = [Knob(option, peak - estimate(changed).peak.total) for option, changed in _changes(run)]
    return sorted((knob for knob in found if knob.saved > 0), key=lambda knob: -knob.saved)


def _changes(run: Run) -> Iterator[tuple[str, Run]]:
    """(option, the run with it)."""
    if run.training is not None:
        yield from _training_changes(run)
    for name in ("rollout", "validation"):
        decoding: Decoding | None = getattr(run, name)
        if decoding is not None and decoding.new > 1:
            half = replace(decoding, new=decoding.new // 2)
            yield f"--model.init_args.{name}.max_new_tokens={half.new}", _with(run, **{name: half})
    if run.rollout is not None and run.rollout.groups > 1:
        half = replace(run.rollout, groups=run.rollout.groups // 2)
        yield f"--model.init_args.rollout.groups_at_once={half.groups}", _with(run, rollout=half)
    if run.validation is not None and run.validation.groups > 1:
        half = replace(run.validation, groups=run.validation.groups // 2)
        yield f"--data.init_args.val_batch_size={half.groups}", _with(run, validation=half)


def _training_changes(run: Run) -> Iterator[tuple[str, Run]]:
    batch = run.training
    assert batch is not None
    if not run.checkpointing:
        yield "--model.init_args.spec.gradient_checkpointing=true", _with(run, checkpointing=True)
    if batch.groups > 1:
        half = batch.groups // 2
        scored = run.head == "scored"
        option = f"--model.init_args.microbatch_size={half}" if scored else f"--data.init_args.batch_size={half}"
        yield option, _with(run, training=replace(batch, groups=half))
    short = max(batch.prompt + 1, batch.columns // 2)
    if run.head == "fused" and short < batch.columns:
        yield f"--data.init_args.max_length={short}", _with(run, training=replace(batch, columns=short))
    if run.precision.weights == 4:
        two = Precision(2, 2, 2)
        yield "--trainer.precision=bf16-true (AdamW in bfloat16, too)", _with(run, precision=two)
        if run.precision.compute == 4 and run.on_cuda:
            yield "--trainer.precision=bf16-mixed", _with(run, precision=Precision(4, 2, 4))
    if run.has_reference:
        yield "--model.init_args.loss.kl_weight=0", _with(run, has_reference=False)
    if run.strategy != "sharded":
        yield "FSDP2 over 2 devices (configs/trainer/fsdp.yaml)", _with(run, strategy="sharded", devices=2)
    if run.head == "fused" and run.shape.learns_linears and run.shape.lattice is not None:
        frozen = replace(
            run.shape, trained=run.shape.exchange, learns_linears=False, learns_norms=False, learns_head=False
        )
        yield "--model.init_args.learn=exchange (a frozen backbone)", _with(run, shape=frozen)


def _with(run: Run, **changed: object) -> Run:
    return replace(run, **changed)  # type: ignore[arg-type]

"""What every command of the benchmark shares: the machine, the models, and how samples are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lace_lightning.bench import machine, shapes
from lace_lightning.bench.clock import Clock, in_turn, spread
from lace_lightning.exchange import ExchangeConfig, Isolated, LatticeAttentionConfig
from lace_lightning.threaded_lm import ThreadedLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

OFF = "off"
"""Name of the case without exchange; the others are named by their scope."""


@dataclass(frozen=True)
class Settings:
    """Options that all commands share.

    Args:
        shape: a name in :data:`~lace_lightning.bench.shapes.SHAPES`, or a config.json.
        scopes: one case with exchange per scope.
        exchange: ``both`` cases in turn, or only those with (``on``) or without (``off``) exchange.
        width: lattice width r; every head is 32 wide, or as wide as r where that is less.
        layers: lattice layers; None: every second one from the middle on.
        window: columns that scope ``window`` reads.
        backend: attention backend of the exchange.
        engine: of decoding: ``auto``, ``fast`` or ``plain``.
        device: ``auto`` takes CUDA where there is one.
        dtype: of weights and caches; ``auto``: bfloat16 on CUDA, float32 elsewhere.
        seed: of weights and prompts.
        warmup: rounds that are thrown away.
        repeats: rounds that count.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    shape: str = "tiny"
    scopes: tuple[str, ...] = ("causal", "aligned")
    exchange: str = "both"
    width: int = 128
    layers: list[int] | None = None
    window: int = 64
    backend: str = "auto"
    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    warmup: int = 1
    repeats: int = 10

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; take --device cpu with --shape tiny")
        if self.width % 32 and self.width not in (8, 16):
            raise ValueError(f"--width {self.width}: lattice heads are 32 wide; take a multiple of 32 (or 8, or 16)")
        for scope in self.scopes:
            self.exchange_config(scope)  # checks width, window and backend before anything slow is done

    @property
    def torch_device(self) -> torch.device:
        is_cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if is_cuda else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32
        return getattr(torch, self.dtype)

    @property
    def cases(self) -> list[str]:
        """Names of the cases: ``off``, then one per scope."""
        off = [OFF] if self.exchange != "on" else []
        return off + (list(self.scopes) if self.exchange != "off" else [])

    def exchange_config(self, case: str, width: int | None = None) -> ExchangeConfig:
        """Settings of the exchange of a case, of the given or the usual width."""
        if case == OFF:
            return Isolated()
        width = width or self.width
        return LatticeAttentionConfig(
            width=width,
            heads=max(1, width // 32),
            scope=case,  # type: ignore[arg-type]
            window=self.window if case == "window" else None,
            backend=self.backend,  # type: ignore[arg-type]
        )


@dataclass
class Bench:
    """A machine with its measured rates, ready to build models.

    Args:
        settings: the shared options.
        progress: is told in a few words what runs.
        commit: recorded instead of the git state, where the code runs in a copy.
    """

    settings: Settings
    progress: Callable[[str], None]
    commit: str | None = None
    clock: Clock = field(init=False)
    machine: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.device, self.dtype = self.settings.torch_device, self.settings.torch_dtype
        self.clock = Clock(self.device)
        self.config = shapes.load_config(self.settings.shape)
        self.progress("bandwidth and matrix rate")
        self.machine = machine.describe(self.device, self.commit) | machine.rates(self.device)

    @property
    def bytes_per_second(self) -> float:
        return self.machine["bandwidth"]["median"]

    @property
    def flops_per_second(self) -> float:
        return self.machine["matrix_rate"]["median"]

    def backbone(self) -> PreTrainedModel:
        """A fresh backbone with random weights.

        Raises:
            ValueError: it does not fit on the device.
        """
        self.progress(f"building {self.settings.shape}")
        try:
            return shapes.build_backbone(self.config, self.device, self.dtype, self.settings.seed)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--shape {self.settings.shape} does not fit on {self.machine['name']}: {error}"
            ) from error

    def models(self, width: int | None = None, backbone: PreTrainedModel | None = None) -> dict[str, ThreadedLM]:
        """Case -> model; all stand on one backbone."""
        backbone = backbone or self.backbone()
        return {case: self.model(case, backbone, width) for case in self.settings.cases}

    def model(self, case: str, backbone: PreTrainedModel | None = None, width: int | None = None) -> ThreadedLM:
        """The model of one case, on a backbone of its own unless one is given."""
        config = self.settings.exchange_config(case, width)
        backbone = backbone or self.backbone()
        return shapes.add_exchange(backbone, config, 4, self.settings.layers, self.settings.seed)

    def prompts(self, groups: int, length: int) -> list[list[int]]:
        """Random prompts, one per group."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return torch.randint(self.config.vocab_size, (groups, length), generator=generator).tolist()

    def in_turn(self, place: object, cases: Mapping[str, Callable[[], T]]) -> tuple[dict[str, list[T]], dict[str, str]]:
        """Samples and errors of the cases of one cell; see :func:`~lace_lightning.bench.clock.in_turn`."""
        settings = self.settings
        return in_turn(cases, settings.warmup, settings.repeats, lambda text: self.progress(f"{place}: {text}"))


def joined(cases: dict[str, dict[str, Any]], errors: dict[str, str]) -> dict[str, Any]:
    """The part of a cell that all timings share: records and errors by case, and the ratios of their steps."""
    return {
        "cases": cases | {case: {"error": error} for case, error in errors.items()},
        "ratios": ratios(cases, "step_ms"),
    }


def ratios(cases: dict[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """For each case with exchange: its median over that of ``off``, and quartiles of the ratios round by round.

    Args:
        cases: case -> record with a spread under ``key``.
        key: which figure.
    """
    found = {}
    off = cases.get(OFF, {}).get(key)
    for case, record in cases.items():
        if off and case != OFF and key in record:
            rounds = zip(record[key]["samples"], off["samples"], strict=True)
            found[case] = spread([on / without for on, without in rounds]) | {
                "median": record[key]["median"] / off["median"]
            }
    return found

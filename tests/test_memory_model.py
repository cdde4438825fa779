"""The memory model against tensors that exist, against autograd's own books and against measured peaks."""

from __future__ import annotations

import importlib.util
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lace_lightning.backbone import checkpoint_layers
from lace_lightning.bench import shapes
from lace_lightning.bench.bench import Settings
from lace_lightning.decoding.decoder import left_pad
from lace_lightning.decoding.plain import PlainSteps
from lace_lightning.engine.state import Capacity, GroupState
from lace_lightning.engine.steps import FastSteps
from lace_lightning.engine.weights import DecoderWeights
from lace_lightning.exchange import Isolated, LatticeAttentionConfig, SameStepConfig
from lace_lightning.memory import Decoding, Pass, Precision, Run, Shape, activations, caches, estimate, knobs
from lace_lightning.threaded_lm import ThreadedLM

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
ALLOWED = 0.15
"""How far a predicted peak may be off, as the issue asks it."""
VOCABULARY, HIDDEN = 97, 64
LATTICE = LatticeAttentionConfig(scope="causal", width=32, heads=2)


def model_of(kind: str = "qwen3", exchange: Any = LATTICE, dtype: torch.dtype = torch.float32) -> ThreadedLM:
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    return ThreadedLM(AutoModelForCausalLM.from_config(config, dtype=dtype), exchange, 4).train()


def run_of(model: ThreadedLM, batch: Pass, precision: str = "32-true", **options: Any) -> Run:
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Run(Shape.of(model, trained), Precision.of(precision, dtype), batch, on_cuda=False, **options)


def size_of(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------- what stands: exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", ["all", "exchange"])
def test_weights_gradients_and_adamws_states_are_counted_to_the_byte(dtype: torch.dtype, learns: str) -> None:
    model = model_of(dtype=dtype)
    nn.init.normal_(next(iter(model.exchange_at.values())).up.weight)
    model.backbone.requires_grad_(learns == "all")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(VOCABULARY, (1, 4, 9))
    model.mean_nll(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)).backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    parts = estimate(run_of(model, Pass(1, 4, 0, 9))).phases[-1].parts
    assert parts["weights"] == size_of(list(model.parameters()))
    assert parts["gradients"] == size_of([p.grad for p in trained])
    assert parts["AdamW's states"] == size_of(moments)


@pytest.mark.parametrize("exchange", [Isolated(), LATTICE, replace(LATTICE, scope="aligned")])
def test_the_caches_of_the_engine_for_cuda_are_counted_to_the_byte(exchange: Any) -> None:
    model = model_of(exchange=exchange)
    decoding = Decoding(groups=3, threads=4, prompt=70, new=11)
    state = GroupState(DecoderWeights(model), Capacity(3, 4, 128, 11), pad_id=0).num_bytes
    counted = caches.cached(run_of(model, Pass(1, 4, 0, 9)), decoding)
    assert counted["prompt and thread caches"] == state["prompt"] + state["own"]
    visible = 0 if counted["lattice caches"] else 4 * 3 * 4 * 11  # the mask stands even where nobody reads it
    assert counted["lattice caches"] == state["lattice"] - visible


def test_the_caches_of_the_engine_for_cpus_are_counted_to_the_byte() -> None:
    model, decoding = model_of().eval(), Decoding(2, 4, 7, 11, engine="fast")
    with torch.no_grad():
        steps = FastSteps(model, *left_pad([[1] * 7] * 2, 0, torch.device("cpu")), 4, 11)
    counted = caches.cached(run_of(model, Pass(1, 4, 0, 9)), decoding)
    assert counted["prompt and thread caches"] == size_of([x for pair in steps._caches for x in pair])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_caches_of_the_hugging_face_model_are_counted_to_the_byte(autocast: bool) -> None:
    model, decoding = model_of().eval(), Decoding(2, 4, 7, 11, engine="plain")
    prompts = left_pad([[1] * 7] * 2, 0, torch.device("cpu"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        steps = PlainSteps(model, *prompts, num_threads=4)
        for _ in range(11):
            steps.step(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))
    run = run_of(model, Pass(1, 4, 0, 9), "bf16-mixed" if autocast else "32-true")
    counted = caches.cached(run, decoding)
    layers: list[Any] = steps._cache.layers
    assert counted["prompt and thread caches"] == size_of([x for layer in layers for x in (layer.keys, layer.values)])
    positions = 2 * 4 * 11
    own = size_of([x for pair in steps._lattice_cache._layers.values() for x in pair])
    assert counted["lattice caches"] == own + 4 * positions


# ---------------------------------------------------------------- activations, against autograd's own books


def kept_by_autograd(model: ThreadedLM, work: Callable[[], Any]) -> int:
    """Bytes of all that ``work`` saves for its backward pass, parameters aside; every storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, lest its place is taken by another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(size for size, _ in kept.values())


def batch_of(groups: int, threads: int, columns: int, prompt: int, holes: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (groups, threads, columns))
    ids[:, :, :prompt] = ids[:, :1, :prompt]
    mask = torch.ones_like(ids, dtype=torch.bool)
    if holes:
        mask[0, 1, prompt + 9] = False
        mask[:, 2, -9:] = False
    return ids, mask


CASES = [
    # backbone, exchange, weights, autocast, holes, prompt, learns
    ("qwen3", Isolated(), torch.float32, False, False, 0, "all"),
    ("qwen3", Isolated(), torch.bfloat16, False, True, 0, "all"),
    ("qwen3", Isolated(), torch.float32, True, True, 0, "all"),
    ("llama", Isolated(), torch.float32, True, False, 0, "all"),
    ("qwen3", Isolated(), torch.float32, False, True, 40, "all"),  # packed rows: the prompt once
    ("qwen3", LATTICE, torch.float32, False, True, 0, "all"),
    ("qwen3", LATTICE, torch.float32, True, True, 40, "all"),
    ("llama", LATTICE, torch.bfloat16, False, True, 0, "all"),
    ("qwen3", LATTICE, torch.float32, False, True, 0, "exchange"),
    ("qwen3", LATTICE, torch.float32, True, True, 40, "exchange"),
    ("qwen3", SameStepConfig(width=32, heads=2), torch.float32, False, True, 0, "all"),
]


@pytest.mark.parametrize(("kind", "exchange", "dtype", "autocast", "holes", "prompt", "learns"), CASES)
def test_activations_are_what_autograd_keeps(
    kind: str, exchange: Any, dtype: torch.dtype, autocast: bool, holes: bool, prompt: int, learns: str
) -> None:
    model = model_of(kind, exchange, dtype)
    model.backbone.requires_grad_(learns == "all")
    ids, mask = batch_of(2, 4, 65, prompt, holes)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = kept_by_autograd(model, lambda: model._hidden_to_score(ids, mask, prompt))
    batch = Pass(2, 4, prompt, 64, holes, is_packed=prompt > 0)  # CPUs leave the last column out
    run = run_of(model, batch, "bf16-mixed" if autocast else "32-true")
    last_norm = batch.tokens * HIDDEN * (4 + run.precision.residual * run.shape.learns_norms)
    counted = activations.kept_by_all_layers(run) + activations.casts(run) + last_norm
    assert counted == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("learns", ["all", "exchange"])
def test_checkpointed_layers_keep_their_inputs_where_gradients_pass(learns: str) -> None:
    model, inputs = model_of(), {}
    checkpoint_layers(model.backbone)
    model.backbone.requires_grad_(learns == "all")

    def note(layer: nn.Module, args: Any) -> None:
        inputs.setdefault(layer.self_attn.layer_idx, weakref.ref(args[0]))

    for layer in model.backbone.model.layers:
        layer.register_forward_pre_hook(note)
    hidden = model._hidden_to_score(*batch_of(2, 4, 65, 0, True), 0)
    alive = {index: x.numel() * x.element_size() for index, kept in inputs.items() if (x := kept()) is not None}
    run = run_of(model, Pass(2, 4, 0, 64), checkpointing=True)
    counted = {index: activations.kept_by_checkpoint(run, index) for index in range(4)}
    assert alive == {index: size for index, size in counted.items() if size}
    assert hidden.requires_grad and len(alive) == (4 if learns == "all" else 2)


# ---------------------------------------------------------------- peaks, against measured ones


def measured(theme: str) -> Iterator[tuple[str, int, Run]]:
    """(case, measured peak, its run) of the results of ``lace bench`` on GPUs."""
    for path in sorted(RESULTS.glob(f"{theme}_*.json")):
        record = json.loads(path.read_text())
        for cell in record["cells"]:
            for case, taken in cell["cases"].items():
                if taken.get("peak_bytes"):
                    yield f"{path.stem} {case} N={cell['threads']}", taken["peak_bytes"], bench_run(record, cell, case)


def bench_run(record: dict[str, Any], cell: dict[str, Any], case: str) -> Run:
    device = torch.device("meta")
    config = Settings(device="cpu").exchange_config(case)
    with device:
        backbone = shapes.build_backbone(shapes.load_config(record["shape"]), device, torch.bfloat16, 0)
        model = shapes.add_exchange(backbone, config, 4, None, 0)
    run = Run(Shape.of(model, model.parameters()), Precision.of("32-true", "bfloat16"))
    if record["theme"] == "memory":
        return replace(run, rollout=Decoding(cell["groups"], cell["threads"], cell["prompt"], cell["columns"] + 8))
    batch = Pass(cell["groups"], cell["threads"], 0, cell["length"], has_holes=False)
    flags = {name: cell[name] for name in ("checkpointing", "compile")}
    return replace(run, training=batch, keeps_gradients=False, **flags)


@pytest.mark.parametrize(("theme", "allowed"), [("train", 0.02), ("memory", ALLOWED)])
def test_predicted_peaks_are_near_the_measured_ones(theme: str, allowed: float) -> None:
    """Of decoding, measured cells held the caches of the cell before, too, which no longer stand there."""
    errors = {name: estimate(run).peak.total / peak - 1 for name, peak, run in measured(theme)}
    assert len(errors) >= 9
    assert {name: error for name, error in errors.items() if abs(error) > allowed} == {}


def peaks() -> Iterator[tuple[str, int, Run]]:
    """The same of ``benchmarks/memory.py``, whose cases say themselves what run they are."""
    loaded = importlib.util.spec_from_file_location("memory", RESULTS.parent / "memory.py")
    assert loaded is not None and loaded.loader is not None
    memory = importlib.util.module_from_spec(loaded)
    sys.modules["memory"] = memory  # dataclasses look their module up
    loaded.loader.exec_module(memory)
    for path in sorted((RESULTS / "peaks").glob("*.json")):
        for row in json.loads(path.read_text())["cases"]:
            case = memory.Case(**row["case"])
            if "peak_bytes" in row and "superseded" not in row:
                yield str(case), row["peak_bytes"], memory.run_of(case, memory.build(case, torch.device("meta")))


OVERESTIMATED = {
    "grpo bf16-mixed 16 x 4 x (256 + 512), microbatch 4, has_holes, checkpointing": 0.09,
    "sft bf16-mixed 2 x 4 x (256 + 1792), has_holes, compile": 0.03,
}
"""Where more is counted than was seen; asked for is 15 %."""


def test_predicted_peaks_of_all_stages_are_near_the_measured_ones() -> None:
    errors = {name: estimate(run).peak.total / peak - 1 for name, peak, run in peaks()}
    assert len(errors) >= 12 and OVERESTIMATED.keys() <= errors.keys()
    assert {name: error for name, error in errors.items() if not -0.02 < error < OVERESTIMATED.get(name, 0.02)} == {}


# ---------------------------------------------------------------- knobs


def test_knobs_say_what_the_estimate_of_the_changed_run_says() -> None:
    run = replace(run_of(model_of(), Pass(8, 4, 0, 256)), on_cuda=True)
    found = {knob.option: knob.saved for knob in knobs(run)}
    changed = replace(run, checkpointing=True)
    option = "--model.init_args.spec.gradient_checkpointing=true"
    assert found[option] == estimate(run).peak.total - estimate(changed).peak.total > 0
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert option not in {knob.option for knob in knobs(changed)}


def test_sharding_shares_out_weights_gradients_and_states_and_ddp_doubles_gradients() -> None:
    run = run_of(model_of(), Pass(1, 4, 0, 16))
    one, four, ddp = (
        estimate(replace(run, devices=count, strategy=name)).phases[-1].parts
        for count, name in ((1, "single"), (4, "sharded"), (2, "ddp"))
    )
    for part in ("weights", "gradients", "AdamW's states"):
        assert four[part] == one[part] // 4 and ddp[part] == one[part]
    assert ddp["gradient buckets"] == one["gradients"]


@pytest.mark.parametrize(
    ("trainer", "dtype", "expected"),
    [
        ("32-true", "float32", (4, 4, 4)), ("bf16-mixed", "float32", (4, 2, 4)), ("bf16-true", "float32", (2, 2, 2)),
        ("32-true", "bfloat16", (2, 2, 2)), ("16-mixed", "float32", (4, 2, 4)),
    ],
)  # fmt: skip
def test_precision_is_that_of_the_trainer_and_of_the_weights(trainer: str, dtype: str, expected: Any) -> None:
    precision = Precision.of(trainer, dtype)
    assert (precision.weights, precision.compute, precision.residual) == expected

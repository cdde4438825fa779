"""The benchmark tool: floors by hand, samples in turn, records that survive, and nothing timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lace_lightning.bench import floors, growth, machine, shapes
from lace_lightning.bench.bench import Bench, Settings, ratios
from lace_lightning.bench.clock import CaseFailed, Clock, in_turn, spread
from lace_lightning.bench.decode import measure
from lace_lightning.bench.decoding import Point, make_decoder
from lace_lightning.bench.peers import PEERS, _capture, _StaticStep, peers
from lace_lightning.bench.record import read_records
from lace_lightning.bench.rollout import compare_logprobs
from lace_lightning.bench.table import LAYOUTS
from lace_lightning.bench.train import Grid, Trainee, sft_loss, train
from lace_lightning.cli import bench as cli
from lace_lightning.cli.main import main
from lace_lightning.exchange import Isolated, LatticeAttentionConfig
from lace_lightning.threaded_lm import ThreadedLM
from tests.helpers import may_read

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--width", "16"]


def threaded(shape: str, scope: str | None, device: str = "cpu", **settings) -> ThreadedLM:
    backbone = shapes.build_backbone(shapes.load_config(shape), torch.device(device), torch.float32, seed=0)
    exchange = Isolated() if scope is None else LatticeAttentionConfig(scope=scope, **settings)
    return shapes.add_exchange(backbone, exchange, 4, None, seed=0)


@pytest.fixture
def bench() -> Bench:
    return Bench(Settings(device="cpu", width=16, repeats=2), progress=lambda text: None)


# ---------------------------------------------------------------- floors


@pytest.mark.parametrize(
    "shape, hidden, mlp, layers, heads", [("qwen3-1.7b", 2048, 6144, 28, 16), ("qwen3-4b", 2560, 9728, 36, 32)]
)
def test_named_shapes_have_the_parameters_that_a_hand_counts(shape, hidden, mlp, layers, heads):
    attention = hidden * heads * 128 * 2 + hidden * 8 * 128 * 2 + 2 * 128  # q and o, k and v, two norms
    layer = attention + 3 * hidden * mlp + 2 * hidden
    backbone = 151_936 * hidden + layers * layer + hidden  # the embedding is the head
    lattice = heads * 128 * 128 * 2 + 128 * 384 + 256 * 128 + 128  # down and up, qkv, gate and its bias
    model = threaded(shape, "causal", device="meta")
    assert model.parameter_counts() == {"backbone": backbone, "exchange": len(model.layers) * lattice}
    assert floors.multiplied_parameters(model) == backbone + len(model.layers) * lattice


def test_an_embedding_that_is_only_looked_up_is_not_read():
    config = shapes.load_config("tiny")
    config.tie_word_embeddings = False
    untied = ThreadedLM(shapes.build_backbone(config, CPU, torch.float32, seed=0))
    assert floors.multiplied_parameters(untied) == floors.multiplied_parameters(threaded("tiny", None))


@pytest.mark.parametrize(
    "scope, settings, lattice",
    [
        (None, {}, 0),
        ("aligned", {}, 0),
        ("causal", {}, 2 * 3 * 7 * (2 * 128 * 4)),  # groups, threads, time, K and V of one lattice layer in float32
        ("window", {"window": 5}, 2 * 3 * 5 * (2 * 128 * 4)),
    ],
)
def test_a_step_reads_weights_once_prompts_once_per_group_and_own_columns_per_thread(scope, settings, lattice):
    model = threaded("tiny", scope, **settings)
    per_token = 2 * 4 * 2 * 16 * 4  # K and V, layers, KV heads, head width, float32
    read = floors.step_bytes(model, groups=2, num_threads=3, prompt=10, time=7)
    assert read.keys_values == 2 * (10 + 3 * 7) * per_token and read.lattice == lattice
    assert read.weights == 4 * sum(p.numel() for p in model.parameters())
    assert read.record(bytes_per_second=1e6)["ms"] == pytest.approx(read.total / 1e3)


@pytest.mark.parametrize("scope, window", [("causal", None), ("aligned", None), ("window", 3), ("window", 99)])
def test_training_operations_count_every_pair_that_the_mask_lets_through(scope, window):
    groups, threads, length = 2, 3, 7
    model = threaded("tiny", scope, width=32, window=window)
    cells = [(n, t) for n in range(threads) for t in range(length)]
    pairs = sum(may_read(scope, "include", window, *query, *key) for query in cells for key in cells)
    own = threads * sum(t + 1 for t in range(length))
    matrices = 6 * floors.multiplied_parameters(model) * groups * threads * length
    # A pair costs a product and a sum per channel, for the score and for the read; backward takes twice that.
    attention = 3 * 2 * 2 * groups * (4 * own * 64 + pairs * 32)  # four layers, one of them a lattice layer
    assert floors.training_flops(model, groups, threads, length) == matrices + attention


def test_rates_count_bytes_read_and_written_and_two_operations_per_product(monkeypatch):
    monkeypatch.setattr(Clock, "milliseconds", lambda self, work: work() or 500.0)
    assert machine.bandwidth(CPU)["median"] == 2 * (2 * 2**26 * 2)
    assert machine.matrix_rate(CPU)["median"] == 2 * (2 * 512**3 * 2)


# ---------------------------------------------------------------- samples


def test_quartiles_and_all_samples_are_kept_in_order():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"samples": [5, 1, 2, 4, 3], "median": 3, "q1": 2, "q3": 4}
    assert spread([7.0]) == {"samples": [7], "median": 7, "q1": 7, "q3": 7}


def test_cases_run_in_turn_in_alternating_order_and_warm_up_does_not_count():
    ran: list[str] = []
    cases = {name: (lambda name=name: ran.append(name) or len(ran)) for name in ("off", "on")}
    samples, errors = in_turn(cases, warmup=1, repeats=3, progress=lambda text: None)
    assert ran == ["off", "on", "on", "off", "off", "on", "on", "off"] and not errors
    assert samples == {"off": [4, 5, 8], "on": [3, 6, 7]}


@pytest.mark.parametrize(
    "error, told", [(torch.OutOfMemoryError("2 GiB"), "OOM"), (CaseFailed("no such API"), "no such API")]
)
def test_a_case_that_fails_is_recorded_and_the_others_go_on(error, told):
    def failing() -> float:
        raise error

    samples, errors = in_turn({"a": failing, "b": lambda: 1.0}, 1, 2, progress=lambda text: None)
    assert samples == {"b": [1.0, 1.0]} and errors == {"a": told}


def test_ratios_compare_medians_and_spread_round_by_round():
    cases = {"off": {"ms": spread([1.0, 2.0, 4.0])}, "on": {"ms": spread([2.0, 3.0, 4.0])}, "failed": {"error": "OOM"}}
    found = ratios(cases, "ms")
    assert set(found) == {"on"} and found["on"]["median"] == 1.5 and found["on"]["samples"] == [2.0, 1.5, 1.0]


def test_a_decoding_sample_times_its_columns_and_nothing_before_them(bench, monkeypatch):
    timed: list[int] = []
    monkeypatch.setattr(Clock, "milliseconds", lambda self, work: (work(), timed.append(1), 60.0)[2])
    cell = measure(bench, bench.models(), Point(2, 3, prompt=5, lattice_time=9, columns=6))
    off = cell["cases"]["off"]
    assert off["step_ms"]["samples"] == [10.0, 10.0] and off["prefill_ms"]["samples"] == [60.0, 60.0]
    assert len(timed) == 3 * 3 * 2  # cases, rounds with the warm-up, prefill and steps
    assert off["tokens_per_second"] == pytest.approx(2 * 3 / 10e-3)
    per_token = 2 * 4 * 2 * 16 * 4
    assert off["floor"]["keys_values_bytes"] == 3 * (5 + 2 * (9 + 3)) * per_token  # half of the timed columns
    assert off["kv"]["own_bytes"] == 3 * 2 * 15 * per_token and off["kv"]["prompt_once_bytes"] == 3 * 5 * per_token
    assert off["kv"]["prompt_per_thread_bytes"] == 2 * off["kv"]["prompt_once_bytes"]


def test_the_exchange_acts_where_it_is_on(bench):
    point = Point(2, 1, prompt=5, lattice_time=0, columns=4)
    models = bench.models()
    effect = measure(bench, models, point)["exchange_effect"]
    assert set(effect) == {"causal", "aligned"} and min(effect.values()) > 1e-4
    for block in models["causal"].exchanges.values():
        torch.nn.init.zeros_(block.up.weight)
    assert measure(bench, models, point)["exchange_effect"]["causal"] == 0


def test_no_thread_ends_before_the_last_column(bench):
    decoding = make_decoder(bench.model("causal"), 30, "plain").start(bench.prompts(2, 4), 3, [0, 1])
    decoding.advance(30)
    rollout = decoding.rollout()
    assert rollout.chosen.sum() == 2 * 3 * 30 and not rollout.finished.any()


# ---------------------------------------------------------------- rollouts


def test_logprobs_of_rollout_and_recomputation_agree_and_a_wrong_one_is_found(bench):
    model = bench.model("causal")
    decoding = make_decoder(model, 6, "plain").start(bench.prompts(3, 4), 2, [0, 1, 2])
    decoding.advance(6)
    rollout = decoding.rollout()
    gap = compare_logprobs(model, rollout, score_groups=2)
    assert 0 <= gap["mean"] <= gap["max"] < 1e-5
    rollout.logprobs[2, 1, 7] += 0.5
    gap = compare_logprobs(model, rollout, score_groups=2)
    assert gap["max"] == pytest.approx(0.5, abs=1e-4) and gap["mean"] == pytest.approx(0.5 / 36, abs=1e-4)


# ---------------------------------------------------------------- growth


class Counted:
    """Stands in for decoder and decoding: notes what was asked of it."""

    def __init__(self, log: list, name: str) -> None:
        self.log, self.name = log, name

    def start(self, prompts, num_threads, seeds) -> Counted:
        return self

    def advance(self, columns: int) -> None:
        self.log.append((self.name, columns))


def test_late_times_cost_their_columns_once_and_blocks_are_timed_in_turn(bench, monkeypatch):
    log: list[tuple[str, int]] = []
    names = iter(["off", "causal", "aligned"])
    monkeypatch.setattr(growth, "make_decoder", lambda *_: Counted(log, next(names)))
    sweeps = growth.Sweeps(Point(2, 1, 5, 0, columns=3), lattice_time=[10, 30])
    cells = list(growth.along_time(bench, bench.models(), sweeps))
    assert [cell["lattice_time"] for cell in cells] == [10, 30]
    # Ten columns, a warm-up block and two that count; then what is missing up to 30, and three blocks again.
    assert [columns for case, columns in log if case == "causal" and columns] == [10, 3, 3, 3, 11, 3, 3, 3]
    assert [case for case, columns in log if columns == 3][:6] == [
        "off",
        "causal",
        "aligned",
        "aligned",
        "causal",
        "off",
    ]
    middle = cells[1]["cases"]["off"]["floor"]["keys_values_bytes"]
    assert middle == (5 + 2 * (30 + 4.5)) * (2 * 4 * 2 * 16 * 4)


def test_a_decoding_too_large_for_the_device_leaves_a_row_and_the_others_go_on(bench, monkeypatch):
    def decoder(model, max_new_tokens, engine):
        decoder = Counted([], "")
        if model.exchanges:
            decoder.start = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("4 GiB"))
        return decoder

    monkeypatch.setattr(growth, "make_decoder", decoder)
    sweeps = growth.Sweeps(Point(2, 1, 5, 0, columns=3), lattice_time=[10])
    [cell] = growth.along_time(bench, bench.models(), sweeps)
    assert cell["cases"]["causal"] == {"error": "OOM"} and "step_ms" in cell["cases"]["off"]


def test_times_whose_blocks_overlap_are_refused(bench):
    sweeps = growth.Sweeps(Point(2, 1, 5, 0, columns=10), lattice_time=[50, 79])
    with pytest.raises(ValueError, match="--times 50 79: 3 blocks of 10 columns from 50 on end at 80"):
        list(growth.growth(bench, sweeps))


# ---------------------------------------------------------------- training


def test_the_loss_is_the_mean_over_every_position(bench):
    model = bench.model("off")
    ids = torch.tensor(bench.prompts(6, 5)).view(2, 3, 5)
    expected = model.backbone(input_ids=ids.flatten(0, 1), labels=ids.flatten(0, 1)).loss
    assert sft_loss(model, ids).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_training_step_moves_backbone_and_exchange_and_keeps_no_gradient(bench):
    model = bench.model("causal")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainee = Trainee(model, Grid(1, 2, 6, checkpointing=True, compile=False), seed=0)
    trainee.step()
    assert model.training and model.backbone.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_a_training_case_whose_loss_is_not_finite_is_no_measurement(bench, monkeypatch):
    """Products of NaNs draw less power: they looked a fifth faster."""
    monkeypatch.setattr("lace_lightning.bench.train.sft_loss", lambda model, ids: model(ids).mean() * float("nan"))
    [cell] = train(bench, [Grid(1, 2, 6, checkpointing=False, compile=False)])
    assert all(case["error"] == "the loss is nan" for case in cell["cases"].values())


# ---------------------------------------------------------------- peers


def test_peers_run_on_a_backbone_that_knows_no_exchange_and_failures_are_told(bench, monkeypatch):
    seen = []

    def broken(model, rows, point):
        seen.append((model.config._attn_implementation, tuple(rows.shape)))
        raise TypeError("generate_batch() got an unexpected keyword argument")

    monkeypatch.setattr("lace_lightning.bench.peers._continuous", broken)
    names = [name for name in PEERS if name != "compiled"]
    found = peers(bench, bench.models(), Point(3, 2, prompt=5, lattice_time=0, columns=3), names)
    assert seen == [("sdpa", (6, 5))]
    assert found.pop("continuous") == {"error": "TypeError: generate_batch() got an unexpected keyword argument"}
    assert set(found) == {"dynamic", "static", "graph", "plain off", "plain causal", "plain aligned"}
    assert all(len(record["step_ms"]["samples"]) == 3 for record in found.values())


def test_the_step_that_is_captured_is_the_models_own(bench, monkeypatch):
    monkeypatch.setattr(_StaticStep, "_draw", staticmethod(lambda logits: logits[:, -1].argmax(-1, keepdim=True)))
    backbone, rows = bench.backbone(), torch.tensor(bench.prompts(2, 5))
    step = _StaticStep(backbone, rows, max_new_tokens=8)
    for _ in range(8 - step.num_taken):
        step()
    expected = backbone.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=8, do_sample=False)
    assert torch.equal(step._token[:, 0], expected[:, -1])


# ---------------------------------------------------------------- the command


def measured(tmp_path: Path, *arguments: str) -> dict:
    assert main(["bench", *arguments, *QUICK, "--out", str(tmp_path)]) == 0
    [record] = read_records(tmp_path)
    return record


def test_decode_writes_what_it_ran_on_with_and_how(tmp_path, monkeypatch, capsys):
    state = {"commit": "0" * 40, "dirty": True, "changed": ["?? notes/"]}
    monkeypatch.setattr(machine, "git_state", lambda folder: state)
    options = [
        "decode",
        "--threads",
        "2",
        "3",
        "--prompt",
        "6",
        "--columns",
        "3",
        "--repeats",
        "2",
        "--peers",
        "dynamic",
    ]
    record = measured(tmp_path, *options)
    assert (
        record["theme"] == "decode"
        and record["shape"] == "tiny"
        and record["command"][:3] == ["lace", "bench", "decode"]
    )
    assert record["file"].startswith("decode_tiny_") and record["date"][:10] in record["file"]
    assert record["options"]["width"] == 16 and record["options"]["scope"] == ["causal", "aligned"]
    at = record["machine"]
    assert at["device"] == "cpu" and at["hardware"]["cores"] and at["versions"]["torch"] == torch.__version__
    assert at["git"] == {"commit": "0" * 40, "dirty": True}
    assert len(at["bandwidth"]["samples"]) == len(at["matrix_rate"]["samples"]) == 5
    ours, others = record["cells"][::2], record["cells"][1::2]
    assert [cell["threads"] for cell in ours] == [2, 3] == [cell["threads"] for cell in others]
    for cell in ours:
        assert list(cell["cases"]) == ["off", "causal", "aligned"]
        times = {case: figures["step_ms"]["median"] for case, figures in cell["cases"].items()}
        assert cell["ratios"]["causal"]["median"] == pytest.approx(times["causal"] / times["off"])
    assert all(set(cell["peers"]) == {"dynamic"} for cell in others)
    told = capsys.readouterr().out
    assert record["file"] in told and f"{ours[0]['ratios']['causal']['median']:.3f}" in told


def test_a_copied_tree_is_recorded_by_the_commit_it_is_told(monkeypatch):
    monkeypatch.setattr(machine, "git_state", lambda folder: None)
    assert machine.describe(CPU, "15fce23")["git"] == {"commit": "15fce23", "dirty": None}


@pytest.mark.parametrize(
    "options",
    [
        ["memory", "--threads", "1", "2", "--columns", "3"],
        ["train", "--grid", "2x6", "3x4", "--groups", "1", "--repeats", "1"],
        "growth --threads 1 2 --prompts 5 --times 9 20 --widths 8 16 --columns 3 --repeats 2".split(),
        ["rollout", "--groups", "3", "--new-tokens", "4", "--prompt", "5", "--repeats", "1", "--scope", "window"],
    ],
    ids=lambda options: options[0],
)
def test_every_command_fills_every_column_of_its_table(options, tmp_path):
    record = measured(tmp_path, *options)
    layout = LAYOUTS[options[0]]
    rows = [row for cell in record["cells"] for row in layout.rows(cell)]
    assert rows and all(len(row) == len(layout.headings) for row in rows)


@pytest.mark.parametrize("theme", LAYOUTS)
def test_a_case_that_ran_out_of_memory_is_a_row_that_says_so(theme):
    place = dict(threads=4, groups=1, prompt=5, lattice_time=0, new_tokens=9, length=8, sweep="threads", at=4)
    place |= dict(checkpointing=True, compile=False)
    [row] = LAYOUTS[theme].rows(place | {"cases": {"causal": {"error": "OOM"}}, "ratios": {}})
    assert len(row) == len(LAYOUTS[theme].headings) and row.index("OOM") == row.index("causal") + 1


def test_ctrl_c_keeps_the_finished_cells(tmp_path, monkeypatch, capsys):
    def stopped(bench, given):
        yield measure(bench, bench.models(), Point(2, 1, 5, 0, 2))
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "decode", stopped)
    assert main(["bench", "decode", *QUICK, "--repeats", "1", "--out", str(tmp_path)]) == 130
    [record] = read_records(tmp_path)
    assert len(record["cells"]) == 1 and record["file"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, told",
    [
        (["--shape", "gone"], ["--shape gone", "qwen3-1.7b"]),
        (["--width", "100"], ["--width 100", "multiple of 32"]),
        (["--backend", "abacus"], ["backend='abacus'", "sdpa"]),
    ],
    ids=lambda value: value[0],
)
def test_a_mistake_is_told_before_anything_is_measured(options, told, tmp_path, capsys):
    assert main(["bench", "decode", "--device", "cpu", *options, "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in told) and not list(tmp_path.iterdir())


def test_results_of_another_layout_are_refused(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match=r"old\.json has schema 0, and this version reads 1"):
        read_records(tmp_path)


def test_the_command_offers_exactly_the_peers_that_exist():
    assert cli.PEERS == tuple(PEERS)


def test_it_runs_where_lightning_and_its_friends_are_not_installed(tmp_path):
    script = (
        "import sys\n"
        "for name in ('lightning', 'mlflow', 'datasets', 'math_verify', 'rapidfuzz'): sys.modules[name] = None\n"
        "from lace_lightning.cli.main import main\n"
        "sys.exit(main(['bench', *sys.argv[1:]]))\n"
    )
    options = ["rollout", *QUICK, "--groups", "2", "--new-tokens", "3", "--repeats", "1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_records(tmp_path)) == 1


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_on_cuda_steps_are_timed_by_events_and_memory_is_counted(tmp_path):
    options = "--device cuda --repeats 2 --out".split() + [str(tmp_path)]
    assert main("bench decode --threads 2 --prompt 9 --columns 20 --peers dynamic graph plain".split() + options) == 0
    options.remove("--repeats")
    options.remove("2")
    assert main("bench memory --threads 1 64 --columns 20".split() + options) == 0
    decode, memory = sorted(read_records(tmp_path), key=lambda record: record["theme"])
    ours, others = decode["cells"]
    assert all(record["step_ms"]["median"] > 0 for record in ours["cases"].values())
    assert min(ours["exchange_effect"].values()) > 1e-4
    assert all("error" not in record for record in others["peers"].values()), others["peers"]
    for case in ("off", "causal", "aligned"):
        few, many = (cell["cases"][case] for cell in memory["cells"])
        assert many["peak_bytes"] - few["peak_bytes"] >= many["kv"]["own_bytes"] - few["kv"]["own_bytes"]
        assert few["peak_bytes"] >= few["weight_bytes"] + few["kv"]["own_bytes"]


@pytest.mark.gpu
def test_the_captured_step_decodes_what_the_model_does(monkeypatch):
    monkeypatch.setattr(_StaticStep, "_draw", staticmethod(lambda logits: logits[:, -1].argmax(-1, keepdim=True)))
    bench = Bench(Settings(device="cuda", dtype="float32"), progress=lambda text: None)
    backbone, rows = bench.backbone(), torch.tensor(bench.prompts(2, 5), device="cuda")
    step = _StaticStep(backbone, rows, max_new_tokens=12)
    replay = _capture(step)
    for _ in range(12 - step.num_taken):
        replay()
    expected = backbone.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=12, do_sample=False)
    assert torch.equal(step._token[:, 0], expected[:, -1])

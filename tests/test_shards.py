"""Checkpoints in shards are those of one file: same content, same curve on any number of processes, whole or absent."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from lace_lightning.callbacks import StageCheckpoint
from lace_lightning.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from lace_lightning.checkpoints import CheckpointError, initialise, read_checkpoint
from lace_lightning.modules import ContinuedPretraining, FullyShardedOnDisk, SupervisedFinetuning, ThreadedModule
from lace_lightning.sharding import whole as whole_weights
from lace_lightning.shards import META, frozen, is_sharded, remove_unfinished, split, write
from lace_lightning.write_queue import WriteQueue
from tests.stage_helpers import FAST, assert_same, quiet_trainer, spec, trace_data, values

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("no_process_group_left")

# ---------------------------------------------------------------- content


def checkpoint_of(seed: int) -> dict[str, Any]:
    """What Lightning would save, with an optimizer's state by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(3, 4, generator=generator) for name in ("a.weight", "b.weight")}
    weights["a.bias"] = torch.randn(4, generator=generator).bfloat16()
    state = {name: {"step": torch.tensor(2.0), "exp_avg": value * 2, "seen": 5} for name, value in weights.items()}
    groups = [{"lr": 0.1, "params": ["b.weight", "a.weight"]}, {"lr": 0.2, "params": ["a.bias"]}]
    optimizers = [{"state": state, "param_groups": groups}]
    return {"state_dict": weights, "optimizer_states": optimizers, "global_step": seed, "loops": {"x": [1, None]}}


def full_disk(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def written(path: Path, seed: int = 7) -> dict[str, Any]:
    checkpoint = checkpoint_of(seed)
    tensors, rest = split(checkpoint)
    write(tensors, frozen(rest), path, f"shards-{seed}", None, is_first=True)
    return checkpoint


def test_shards_are_read_as_the_checkpoint_of_one_file(tmp_path: Path) -> None:
    saved, found = written(tmp_path / "x.ckpt"), read_checkpoint(tmp_path / "x.ckpt")
    assert_same(found["state_dict"], saved["state_dict"])
    assert found["state_dict"]["a.bias"].dtype == torch.bfloat16
    assert (found["global_step"], found["loops"]) == (7, {"x": [1, None]})
    [optimizer], [by_name] = found["optimizer_states"], saved["optimizer_states"]
    assert [group["params"] for group in optimizer["param_groups"]] == [[0, 1], [2]]
    assert [group["lr"] for group in optimizer["param_groups"]] == [0.1, 0.2]
    for number, name in enumerate(("b.weight", "a.weight", "a.bias")):
        assert torch.equal(optimizer["state"][number]["exp_avg"], by_name["state"][name]["exp_avg"])
        assert (optimizer["state"][number]["step"], optimizer["state"][number]["seen"]) == (2, 5)


def test_a_newer_checkpoint_takes_the_place_of_the_older_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    written(path, 1)
    tensors, rest = split(checkpoint_of(2))
    write(tensors, frozen(rest), path, "shards-2", None, is_first=False)  # killed before it pointed to the new ones
    assert read_checkpoint(path)["global_step"] == 1
    written(path, 2)
    assert read_checkpoint(path)["global_step"] == 2
    assert sorted(file.name for file in path.iterdir()) == [META, "shards-2"]


def test_a_file_takes_the_place_of_a_folder_of_shards_once_it_is_written(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.ckpt"
    written(path)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space left"):
        broken.setattr(torch, "save", full_disk)
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert is_sharded(path)
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert list(tmp_path.iterdir()) == [path] and read_checkpoint(path) == {"step": 2}


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    whole, begun, other = (tmp_path / name for name in ("whole.ckpt", "begun.ckpt", "other.ckpt"))
    saved = written(whole, 1)
    tensors, rest = split(checkpoint_of(2))
    for path in (whole, begun):
        write(tensors, frozen(rest), path, "shards-2", None, is_first=False)
        (path / f".{META}.123.part").touch()
    (other / "notes").mkdir(parents=True)
    (tmp_path / "begun.ckpt.before").write_bytes(b"earlier")
    for path in (whole, begun, other):
        remove_unfinished(path)
    assert sorted(file.name for file in whole.iterdir()) == [META, "shards-1"]
    assert_same(read_checkpoint(whole)["state_dict"], saved["state_dict"])
    assert begun.read_bytes() == b"earlier" and (other / "notes").exists()
    (whole / META).write_bytes(b"damaged")
    remove_unfinished(whole)
    assert (whole / "shards-1").exists(), "somebody may mend it"


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty meta", "flipped meta"])
def test_damaged_shards_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.ckpt"
    written(path)
    file = path / META if "meta" in damage else next((path / "shards-7").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if "meta" in damage else content.find(b"data/0") + 80] ^= 1
    file.write_bytes(bytes(content) if "flipped" in damage else bytes(content)[: len(content) // 2])
    if damage == "gone":
        file.unlink()
    if damage == "empty meta":
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="x.ckpt"):
        read_checkpoint(path)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("place", ["meta", "index", "shard"])
def test_no_code_is_run_from_shards(tmp_path: Path, place: str) -> None:
    """torch.distributed.checkpoint itself unpickles its index, and objects in shards."""
    path, sign = tmp_path / "x.ckpt", tmp_path / "exploded"
    written(path)
    if place == "index":
        (path / "shards-7" / ".metadata").write_bytes(pickle.dumps(Bomb(sign)))
        read_checkpoint(path)
    else:
        file = path / META if place == "meta" else next((path / "shards-7").glob("*.distcp"))
        torch.save({"state_dict": Bomb(sign)}, file)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    assert not sign.exists()


@pytest.mark.parametrize("name", ["../other", "/etc", ".."])
def test_shards_outside_of_the_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.ckpt"
    written(path)
    meta = torch.load(path / META, weights_only=True)
    meta["lace_shards"]["folder"] = name
    torch.save(meta, path / META)
    with pytest.raises(CheckpointError, match="outside of its folder"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..", 7])
def test_a_file_of_shards_outside_of_the_checkpoint_is_refused(tmp_path: Path, name: Any) -> None:
    path = tmp_path / "x.ckpt"
    written(path)
    meta = torch.load(path / META, weights_only=True)
    offsets, sizes, _, *place = meta["lace_shards"]["tensors"]["state_dict/a.weight"]["chunks"][0]
    meta["lace_shards"]["tensors"]["state_dict/a.weight"]["chunks"][0] = (offsets, sizes, name, *place)
    torch.save(meta, path / META)
    with pytest.raises(CheckpointError, match="foreign"):
        read_checkpoint(path)


def test_weights_in_shards_start_a_stage(tmp_path: Path) -> None:
    trained = stage()
    fitted_on_disk(trained, tmp_path, max_steps=1)
    fresh = stage(seed=5)
    quiet_trainer(max_steps=0).fit(fresh, trace_data())
    initialise(fresh, [tmp_path / "last.ckpt"])
    assert_same(values(fresh), {name: value.full_tensor() for name, value in values(trained).items()})


# ---------------------------------------------------------------- in the background


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = held_back(monkeypatch)
    plugin, checkpoint = BackgroundCheckpointIO(), {"state_dict": {"w": torch.ones(2)}, "names": {"a": 1}}
    plugin.save_checkpoint(checkpoint, tmp_path / "x.ckpt")
    checkpoint["state_dict"]["w"].zero_()
    checkpoint["names"]["b"] = 2
    assert not (tmp_path / "x.ckpt").exists(), "it waited for the disk"
    goes_on.set()
    plugin.finish()
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert found["state_dict"]["w"].tolist() == [1, 1] and found["names"] == {"a": 1}


def test_the_old_checkpoint_is_removed_only_when_the_new_one_is_written(tmp_path: Path, monkeypatch) -> None:
    """With Lightning's own AsyncCheckpointIO a kill in between leaves none."""
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, old)
    goes_on = held_back(monkeypatch)
    plugin = BackgroundCheckpointIO()
    plugin.save_checkpoint({"step": 2}, new)
    plugin.remove_checkpoint(old)
    assert old.exists()
    goes_on.set()
    plugin.teardown()
    assert new.exists() and not old.exists()


def test_a_failed_write_keeps_the_old_checkpoint_and_is_raised(tmp_path: Path, monkeypatch) -> None:
    old = tmp_path / "old.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, old)

    monkeypatch.setattr(torch, "save", full_disk)
    plugin = BackgroundCheckpointIO()
    plugin.save_checkpoint({"step": 2}, tmp_path / "new.ckpt")
    plugin.remove_checkpoint(old)
    with pytest.raises(OSError, match="No space left"):
        plugin.teardown()
    assert list(tmp_path.iterdir()) == [old]


def test_a_third_state_waits_until_the_first_is_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    goes_on = held_back(monkeypatch)
    plugin = BackgroundCheckpointIO()
    for step in range(2):
        plugin.save_checkpoint({"step": step}, tmp_path / f"{step}.ckpt")
    threading.Timer(0.2, goes_on.set).start()
    plugin.save_checkpoint({"step": 2}, tmp_path / "2.ckpt")
    assert goes_on.is_set() and (tmp_path / "0.ckpt").exists()
    plugin.teardown()


def test_when_training_has_ended_all_checkpoints_are_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    save, found, module = torch.save, [], stage()
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (time.sleep(0.2), save(*args, **kwargs)))
    module.on_train_end = lambda: found.append(read_checkpoint(tmp_path / "last.ckpt")["global_step"])
    saver = StageCheckpoint(tmp_path, every_n_train_steps=5, save_last=True)
    quiet_trainer(2, [saver], enable_checkpointing=True, plugins=[BackgroundCheckpointIO()]).fit(module, trace_data())
    assert found == [2]


def test_at_most_two_states_wait_for_the_disk() -> None:
    queue, gate, done = WriteQueue(), threading.Event(), []
    for number in range(2):
        queue.add(lambda number=number: (gate.wait(20), done.append(number)))
    threading.Timer(0.2, gate.set).start()
    queue.settle(left=1)
    assert gate.is_set() and 0 in done
    queue.close()
    assert done == [0, 1]


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on torch.save waits for the event."""
    goes_on, save = threading.Event(), torch.save

    def later(*args: Any, **kwargs: Any) -> None:
        assert goes_on.wait(20)
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", later)
    return goes_on


# ---------------------------------------------------------------- the strategy


def stage(seed: int = 1) -> SupervisedFinetuning:
    torch.manual_seed(seed)
    return SupervisedFinetuning(spec(), FAST)


def fitted_on_disk(module: ThreadedModule, folder: Path, max_steps: int, resume: Path | None = None) -> None:
    saver = StageCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    trainer = quiet_trainer(max_steps, [saver], enable_checkpointing=True, strategy=FullyShardedOnDisk(), devices=1)
    trainer.fit(module, trace_data(), ckpt_path=resume)


def test_a_stage_with_a_frozen_backbone_resumes_from_shards_of_what_it_trains(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> None:
        torch.manual_seed(1)  # of the backbone
        fitted_on_disk(ContinuedPretraining(spec(), FAST), folder, max_steps=5, resume=resume)

    run(tmp_path / "whole")
    saved = tmp_path / "whole" / "step=2.ckpt"
    assert {name.split(".")[1] for name in read_checkpoint(saved)["state_dict"]} == {"exchanges"}
    run(tmp_path / "rest", resume=saved)
    ends = [read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "rest")]
    assert_same(*(end["state_dict"] for end in ends))
    moments = [end["optimizer_states"][0]["state"] for end in ends]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])


def test_a_sharded_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    fitted_on_disk(stage(), tmp_path, max_steps=2)
    other = SupervisedFinetuning(spec(architecture={**spec().architecture, "intermediate_size": 32}), FAST)
    trainer = quiet_trainer(4, strategy=FullyShardedOnDisk(), devices=1)
    with pytest.raises(CheckpointError, match="intermediate_size|mlp"):
        trainer.fit(other, trace_data(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("fails", [True, False])
def test_a_checkpoint_of_one_file_stays_until_the_shards_in_its_place_are_written(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lace_lightning.modules.fully_sharded_on_disk as on_disk

    module, path = stage(), tmp_path / "interrupted.ckpt"
    trainer = quiet_trainer(1, strategy=FullyShardedOnDisk(in_background=False), devices=1)
    trainer.fit(module, trace_data())
    path.write_bytes(b"earlier")
    if fails:
        monkeypatch.setattr(on_disk, "write", full_disk)
        with pytest.raises(OSError, match="No space left"):
            trainer.save_checkpoint(path, weights_only=False)
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]
    else:
        trainer.save_checkpoint(path, weights_only=False)
        assert list(tmp_path.iterdir()) == [path] and read_checkpoint(path)["global_step"] == 1


def test_an_interrupted_epoch_of_sampling_ends_without_a_traceback(tmp_path: Path, monkeypatch) -> None:
    """When Python exits, the model's state goes before the epoch that nobody has left."""
    module, told = stage(), []
    fitted_on_disk(module, tmp_path, max_steps=1)
    assert module.model is not None
    epoch = whole_weights(module.model)
    epoch.__enter__()
    monkeypatch.setattr(FSDPModule, "reshard", lambda self: pytest.fail("it tried to divide the weights"))
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    del epoch
    gc.collect()
    assert not told


def test_a_failed_write_of_shards_ends_the_run_and_leaves_the_last_whole_one(tmp_path: Path, monkeypatch) -> None:
    import lace_lightning.modules.fully_sharded_on_disk as on_disk

    module = stage()

    def full(tensors: Any, rest: Any, path: Path, *others: Any) -> None:
        if path.name == "step=4.ckpt":
            raise OSError(28, "No space left on device")
        write(tensors, rest, path, *others)

    monkeypatch.setattr(on_disk, "write", full)
    with pytest.raises(OSError, match="No space left"):
        fitted_on_disk(module, tmp_path, max_steps=8)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2
    assert is_sharded(tmp_path / "step=2.ckpt") and not is_sharded(tmp_path / "step=4.ckpt")


# ---------------------------------------------------------------- on any number of processes

STEPS, SAVED_AT = 7, 3


def ran(folder: Path, num_processes: int, strategy: str, options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """A run of ``tests.resume_worker``."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    worker = ["-m", "tests.resume_worker", strategy, str(folder), json.dumps(options)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), *worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def trained(folder: Path, num_processes: int, strategy: str, **options: Any) -> dict[str, float]:
    """The losses of a run by step; each rank's are checked to be the same."""
    done = ran(folder, num_processes, strategy, options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"losses{rank}.json").read_text()) for rank in range(num_processes)]
    assert all(losses == found[0] for losses in found)
    return found[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Uninterrupted runs in one folder, on one process and on two, and the losses of the one."""
    folder = tmp_path_factory.mktemp("whole")
    losses = trained(folder / "auto1", 1, "auto", steps=STEPS, save=SAVED_AT)
    for strategy in ("ddp", "fsdp"):
        assert trained(folder / f"{strategy}2", 2, strategy, save=SAVED_AT) == pytest.approx(losses, abs=1e-5)
    return folder, losses


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("start", ["auto1", "ddp2", "fsdp2"])
@pytest.mark.parametrize(("num_processes", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp")])
def test_a_run_goes_on_with_the_same_curve_on_other_processes(
    whole: tuple[Path, dict[str, float]], start: str, num_processes: int, strategy: str, tmp_path: Path
) -> None:
    folder, losses = whole
    saved = folder / start / f"step={SAVED_AT}.ckpt"
    assert is_sharded(saved) == (start == "fsdp2")
    rest = trained(tmp_path / "rest", num_processes, strategy, resume=str(saved), background=True)
    assert list(rest) == [str(step) for step in range(SAVED_AT + 1, STEPS + 1)]
    assert rest == pytest.approx({step: losses[step] for step in rest}, abs=1e-5)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("what", ["shards", "meta"])
def test_a_full_disk_of_one_process_ends_all_and_leaves_the_last_whole_checkpoint(what: str, tmp_path: Path) -> None:
    done = ran(tmp_path / "run", 2, "fsdp", {"full": what})
    assert done.returncode != 0 and "No space left on device" in done.stderr
    assert is_sharded(tmp_path / "run" / f"step={SAVED_AT}.ckpt") and not is_sharded(tmp_path / "run" / "step=6.ckpt")
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == SAVED_AT

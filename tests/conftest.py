"""What every test stands on: one seed, one thread, a plain kernel for FlashAttention, CUDA tests only where CUDA is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lace_lightning.exchange import flash
from tests.helpers import PLAIN_KERNEL

# Tiny shapes lose time to thread start-up, and one thread adds up in one order: bitwise claims stay bitwise.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_run_left_in_the_working_folder() -> Iterator[None]:
    """Runs of tests lie in folders of their own."""
    folders = [folder for name in ("checkpoints", "runs", "lightning_logs") if not (folder := Path(name)).exists()]
    yield
    assert [folder for folder in folders if folder.exists()] == []


@pytest.fixture(autouse=True)
def fixed_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # A run inside of an earlier test leaves its seed behind, with which Lightning seeds distributed runs again.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(autouse=True)
def plain_flash_attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention needs CUDA: elsewhere our code around it runs with a kernel written out in torch."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setitem(flash.KERNELS, "plain", PLAIN_KERNEL)
        monkeypatch.setattr(flash, "INSTALLED", "plain")


@pytest.fixture
def no_process_group_left() -> Iterator[None]:
    """Of a strategy of one process, which leaves its group behind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
    for marker in ("chaos", "cluster"):  # what takes many minutes runs where it is asked for
        if marker not in config.option.markexpr:
            config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker(marker)])
            items[:] = [item for item in items if not item.get_closest_marker(marker)]

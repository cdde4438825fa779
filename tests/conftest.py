"""What every test stands on: one seed, one thread, a plain kernel for FlashAttention, CUDA tests only where CUDA is."""

import pytest
import torch

from lace_lightning.exchange import flash
from tests.helpers import PLAIN_KERNEL

# Tiny shapes lose time to thread start-up, and one thread adds up in one order: bitwise claims stay bitwise.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def plain_flash_attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention needs CUDA: elsewhere our code around it runs with a kernel written out in torch."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setitem(flash.KERNELS, "plain", PLAIN_KERNEL)
        monkeypatch.setattr(flash, "INSTALLED", "plain")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
    if "chaos" not in config.option.markexpr:  # minutes of kills and faults run where they are asked for
        asked_for = [item for item in items if not item.get_closest_marker("chaos")]
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("chaos")])
        items[:] = asked_for

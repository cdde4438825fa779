"""What every test stands on: one seed, one thread, and CUDA tests only where CUDA is."""

import pytest
import torch

# Tiny shapes lose time to thread start-up, and one thread adds up in one order: bitwise claims stay bitwise.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))

"""A few hundred hostile cases for every reader of untrusted text; ``benchmarks/fuzz.py`` tries a million."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz_targets import TARGETS, Target

QUICK = {
    "answers in a worker": 40,
    "configs of stages": 5,
    "sweeps": 20,
    "settings in YAML": 60,
    "pages of the viewer": 100,
}


def run(target: Target, count: int, always_the_same: bool) -> None:
    """Try so many cases; hypothesis shrinks the first one that fails."""
    options = {"deadline": None, "database": None, "derandomize": always_the_same}

    @settings(max_examples=count, suppress_health_check=list(HealthCheck), **options)
    @given(target.cases)
    def try_all(case: object) -> None:
        target.timed(case)

    try_all()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_text_breaks_a_reader(target):
    run(target, QUICK.get(target.name, 200), always_the_same=True)

"""What methods that begin with lone threads have in common."""

from __future__ import annotations

from lace_lightning.evaluation.method import Method
from lace_lightning.evaluation.methods.record import check_at_least


class LoneThreads(Method):
    """A method that begins with N single threads per problem, which read nothing of each other.

    Args:
        policy: name of the policy that it asks.
        num_threads: N.

    Raises:
        ValueError: ``num_threads`` is below 1.
    """

    def __init__(self, policy: str, num_threads: int = 4) -> None:
        super().__init__(policy)
        check_at_least(1, num_threads=num_threads)
        self.num_threads = num_threads

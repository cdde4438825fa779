"""Ways to spend a budget of threads on a problem, one small class each (docs/countdown.md compares them)."""

from lace_lightning.evaluation.methods.fork_join import ForkJoin
from lace_lightning.evaluation.methods.judge import JudgeSelection
from lace_lightning.evaluation.methods.merge import MergePaths
from lace_lightning.evaluation.methods.oracle import BestOfN
from lace_lightning.evaluation.methods.pruned_vote import PrunedVote
from lace_lightning.evaluation.methods.refine import SequentialRefinement
from lace_lightning.evaluation.methods.single import SingleThread
from lace_lightning.evaluation.methods.together import Together
from lace_lightning.evaluation.methods.tree import TreeOfThoughts
from lace_lightning.evaluation.methods.vote import IndependentVote

__all__ = [
    "BestOfN",
    "ForkJoin",
    "IndependentVote",
    "JudgeSelection",
    "MergePaths",
    "PrunedVote",
    "SequentialRefinement",
    "SingleThread",
    "Together",
    "TreeOfThoughts",
]

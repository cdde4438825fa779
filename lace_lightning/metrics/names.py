"""Every metric name that is logged, as ``family/statistic``, with its meaning. ``docs/metrics.md`` shows the same."""

from __future__ import annotations

GROUP_METRICS = {
    "acc": "share of groups whose one thread tagged [[best]] is correct; a group with invalid tags counts as 0",
    "best_at_n": "share of groups with at least one correct thread",
    "mean_at_n": "share of correct threads in a group, mean over groups",
    "vote_at_n": "share of groups whose most frequent answer is correct; of equally frequent ones the first counts",
    "expl": "mean pairwise cosine distance of the threads' embedded thoughts, mean over groups",
    "edit_distance": "mean pairwise character edit distance of the threads' thoughts divided by the longer length",
    "fmt": "share of groups with valid tags: exactly one tag in every thread, exactly one [[best]] in the group",
    "unparsable": "share of threads in a group without an answer that could be read and compared, mean over groups",
    "tokens": "tokens of all threads of a problem after the prompt, forced ones included, mean over groups",
}
"""Statistics of :class:`~lace_lightning.metrics.groups.GroupMetrics`, in its order."""

TAG_METRICS = {
    "one_tag": "share of threads that end with exactly one tag",
    "fmt": "share of groups with valid tags",
}
"""Scalars of :class:`~lace_lightning.metrics.tags.TagConfusion`."""

REWARD_METRICS = {
    "total": "weighted sum of all rewards of a group, mean over groups",
    "accuracy": "AccuracyReward before its weight, mean over groups",
    "format": "FormatReward before its weight, mean over groups",
    "diversity": "DiversityReward before its weight, mean over groups",
}
"""Rewards as they are named unless the configuration names them otherwise."""

DESCRIPTIONS = {
    f"{family}/{name}": description
    for family, metrics in (("val", GROUP_METRICS), ("tags", TAG_METRICS), ("reward", REWARD_METRICS))
    for name, description in metrics.items()
}

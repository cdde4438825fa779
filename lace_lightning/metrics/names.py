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
    "<name>": "any other reward before its weight, mean over groups",
    "tied_problems": "share of problems whose groups all got the same reward, so that nothing is learned from them",
}
"""Rewards as they are named unless the configuration names them otherwise."""

POLICY_METRICS = {
    "loss": "policy-gradient loss, mean over the optimizer steps of a batch",
    "clipped": "share of chosen tokens whose ratio was clipped",
    "entropy": "mean negative log-probability of the chosen tokens when they were sampled, in nats",
    "kl": "estimated KL divergence from the weights that training started from, averaged like the loss",
}

ROLLOUT_METRICS = {
    "tokens": "tokens of all threads of a group after the prompt, forced ones included, mean over groups",
    "truncated": "share of threads that the length limit ended",
    "logprob_gap_mean": "mean distance of a chosen token's log-probability when sampled and when trained on, in nats",
    "logprob_gap_max": "largest such distance; both are taken before the weights change, over the groups trained on",
}

TIME_METRICS = {
    "rollout": "share of a training step's time spent on sampling and judging groups",
    "reward": "share spent on rewards and advantages",
    "update": "share spent on optimisation",
}

TRAIN_METRICS = {
    "loss": "mean negative log-likelihood of the target tokens of a batch of traces, in nats",
    "reward": "reward/total, for the progress bar and for callbacks",
    "tags/<statistic>": "the statistic of the same name under tags/, of training rollouts",
}

GATE_METRICS = {
    "layer_<i>": "mean gate of lattice layer i over channels and tokens after the prompt",
    "thought": "mean gate over all lattice layers and the tokens that threads think with",
    "environment": "mean gate over all lattice layers and the tokens that an environment wrote",
    "assessment": "mean gate over all lattice layers and the tokens of the closing assessments, before their tags",
    "tag": "mean gate over all lattice layers and the tokens of tag and end of sequence",
}

CROSS_RATIO_METRICS = {
    "layer_<i>": "share of lattice layer i's attention mass that lands on other threads, mean over tokens that read",
    "mean": "the same, mean over all lattice layers",
}

DIVERSITY_METRICS = {
    "embedding": "mean pairwise cosine distance of the embedded thoughts of training rollouts, mean over groups",
    "edit": "mean pairwise character edit distance of the same divided by the longer length, mean over groups",
}

HEALTH_METRICS = {
    "non_finite": "optimizer steps whose loss or gradient was not finite, since the run began",
    "constant_reward": "batches in which all groups of every problem got the same reward, since the run began",
    "lost_tags": "batches with valid tags in too few groups (health.least_tags), since the run began",
    "truncated": "batches in which the length limit ended every thread, since the run began",
    "skipped": "optimizer steps that were not taken because of any of these, since the run began",
}

DESCRIPTIONS = {
    f"{family}/{name}": description
    for family, metrics in (
        ("val", GROUP_METRICS),
        ("tags", TAG_METRICS),
        ("reward", REWARD_METRICS),
        ("policy", POLICY_METRICS),
        ("rollout", ROLLOUT_METRICS),
        ("time", TIME_METRICS),
        ("train", TRAIN_METRICS),
        ("gate", GATE_METRICS),
        ("cross_ratio", CROSS_RATIO_METRICS),
        ("diversity", DIVERSITY_METRICS),
        ("test", {"<statistic>": "the statistic of the same name under val/, of `lace test`"}),
        ("eval", {"<benchmark>/<method>/<statistic>": "a column of the tables of `lace eval`, mean over problems"}),
        ("health", HEALTH_METRICS),
        ("system", {"<name>": "what MLflow measures of processor, memory, disk, network and GPUs, every ten seconds"}),
        ("test/tags", {"<statistic>": "the statistic of the same name under tags/, of `lace test`"}),
    )
    for name, description in metrics.items()
}
"""Names in angle brackets stand for whatever takes their place."""

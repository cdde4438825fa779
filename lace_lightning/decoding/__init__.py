"""Group decoding: N threads of B groups, one column at a time."""

from lace_lightning.decoding.decoder import Decoding, Engine, GroupDecoder
from lace_lightning.decoding.environment import FREE, Environment
from lace_lightning.decoding.group import Group, Rollout, Thread
from lace_lightning.decoding.playing import DecodingSpec, play_groups
from lace_lightning.decoding.random import group_seed
from lace_lightning.decoding.sampling import Sampling
from lace_lightning.decoding.text import generate_groups, make_decoder, to_groups
from lace_lightning.decoding.threads import Column

__all__ = [
    "FREE",
    "Column",
    "Decoding",
    "DecodingSpec",
    "Engine",
    "Environment",
    "Group",
    "GroupDecoder",
    "Rollout",
    "Sampling",
    "Thread",
    "generate_groups",
    "group_seed",
    "make_decoder",
    "play_groups",
    "to_groups",
]

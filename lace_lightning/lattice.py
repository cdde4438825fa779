"""The lattice of one forward pass: which positions exist, which may be read, and what was cached before.

Positions are numbered time-major, ``i = t * N + n`` (LACE.md §3): in decoding the cache at step t then holds exactly
what a thread may read, and in training the causal scope is the block mask ``key // N <= query // N``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lace_lightning.exchange.base import Exchange, OwnAttention, Site

Scope = Literal["causal", "aligned", "window"]
Own = Literal["include", "exclude", "only"]


@dataclass(frozen=True)
class Topology:
    """Which lattice positions a token may read, before visibility (LACE.md §3, "Mask M").

    Args:
        scope: ``causal`` reads all t' <= t, ``window`` t - window < t' <= t, ``aligned`` only t' = t.
        own: whether the thread's own positions are included, excluded, or (a control) the only ones.
        window: number of columns that ``window`` reads, its own column included.

    Raises:
        ValueError: an unknown scope or own, or a window that does not fit the scope.
    """

    scope: Scope = "causal"
    own: Own = "include"
    window: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("scope", self.scope, get_args(Scope)), ("own", self.own, get_args(Own))):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(known)}")
        if (self.scope == "window") != (self.window is not None) or (self.window is not None and self.window < 1):
            raise ValueError(
                f"window={self.window!r} with scope={self.scope!r}: scope 'window' needs window >= 1 columns, "
                "the other scopes need window: null"
            )

    def allows(self, query: Tensor, key: Tensor, num_threads: int) -> Tensor:
        """Whether time-major position ``query`` may read ``key``; pure index arithmetic that broadcasts."""
        query_time, key_time = query // num_threads, key // num_threads
        if self.scope == "aligned":
            allowed = key_time == query_time
        else:
            allowed = key_time <= query_time
            if self.window is not None:
                allowed = allowed & (key_time > query_time - self.window)
        if self.own == "include":
            return allowed
        is_own = query % num_threads == key % num_threads
        return allowed & is_own if self.own == "only" else allowed & ~is_own


@dataclass(eq=False)
class LatticeMask:
    """Mask M of one attention call: a topology over Q query and K key positions, minus invisible keys.

    Args:
        topology: who may read whom.
        num_threads: N.
        key_visible: (B, K) bool, time-major; K = N * number of key columns.
        first_query: time-major index, among the keys, of the first query (N * earlier columns in decoding, else 0).
        num_queries: Q.
        is_full: every key is known to be visible.
        made: what backends made of this mask, for all layers that share it.
    """

    topology: Topology
    num_threads: int
    key_visible: Tensor
    first_query: int
    num_queries: int
    is_full: bool = False
    made: dict[Any, Any] = field(default_factory=dict, init=False)
    _dense: Tensor | None = field(default=None, init=False)
    _reads_anything: Tensor | None = field(default=None, init=False)

    @property
    def dense(self) -> Tensor:
        """(B, 1, Q, K) bool, True where the query reads the key; made once."""
        # Not functools.cached_property: before Python 3.12 it takes a lock, which breaks the graphs of torch.compile.
        if self._dense is None:
            device = self.key_visible.device
            query = torch.arange(self.first_query, self.first_query + self.num_queries, device=device)
            key = torch.arange(self.key_visible.shape[1], device=device)
            allowed = self.topology.allows(query[:, None], key[None, :], self.num_threads)
            self._dense = allowed[None, None] & self.key_visible[:, None, None, :]
        return self._dense

    @property
    def reads_anything(self) -> Tensor:
        """(B, 1, Q, 1) bool: rows whose softmax is not empty; made once. An empty row reads exactly zero."""
        if self._reads_anything is None:
            self._reads_anything = self.dense.any(-1, keepdim=True)
        return self._reads_anything


class LatticeCache:
    """Keys and values that earlier columns left for later ones; one per decoding, shared by all lattice layers."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._totals: dict[int, Tensor] = {}
        self._visible: Tensor | None = None

    def extend_visible(self, visible: Tensor) -> Tensor:
        """Append the columns (B, K_new) of this pass, time-major; returns all (B, K) seen so far."""
        self._visible = visible if self._visible is None else torch.cat([self._visible, visible], dim=1)
        return self._visible

    def append(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, h, K_new, d) keys and values of one layer; returns all (B, h, K, d) seen so far."""
        if layer_idx in self._layers:
            old_key, old_value = self._layers[layer_idx]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self._layers[layer_idx] = (key, value)
        return key, value

    def add_up(self, layer_idx: int, totals: Tensor) -> Tensor:
        """Totals (B, columns, …) of one layer over the columns of this pass, with those of earlier passes added."""
        if layer_idx in self._totals:
            totals = totals + self._totals[layer_idx]
        self._totals[layer_idx] = totals[:, -1:]
        return totals


@dataclass(frozen=True)
class Reading:
    """What one lattice layer did in one pass; recorded only on request.

    Args:
        layer_idx: index of the decoder layer.
        gate: (B, N, L) gate, mean over channels.
        cross_share: (B, N, L) share of a token's attention mass on other threads; NaN where it reads nothing.
        thread_share: (B, N, N) share of thread n's (dim 1) attention mass on thread m (dim 2), mean over its tokens.
        visible: (B, N, L) bool: the columns that take part.
        weights: (B, Q, K) attention weights of time-major positions, mean over heads; scope ``aligned``
            has (B * L, N, N). None if not asked for.
    """

    layer_idx: int
    gate: Tensor
    cross_share: Tensor
    thread_share: Tensor
    visible: Tensor
    weights: Tensor | None = None


@dataclass(eq=False)
class Lattice:
    """The lattice of one forward pass; travels to every layer as the keyword ``lattice`` of the backbone's forward.

    Args:
        exchanges: layer index -> exchange.
        visible: (B, N, L) bool, the columns of this pass that take part in the exchange: real tokens after the prompt.
            Others are never read, and nothing is added to them.
        first_time: lattice time t of the first of these L columns.
        skip: leading columns of the backbone's tensors that stand before these L (the prompt).
        cache: what earlier passes left, in decoding.
        readings: a list that lattice layers append to, or None.
        keep_weights: readings keep all attention weights.
        prompt: (B, P) bool, which of the prompt's columns before this lattice hold real tokens; None: it has none.
        is_packed: the backbone's rows are whole groups (:mod:`lace_lightning.packing`), not threads.
        rotations: what exchanges made of the positions of this pass, by their settings, for all layers.
    """

    exchanges: Mapping[int, Exchange]
    visible: Tensor
    first_time: int = 0
    skip: int = 0
    cache: LatticeCache | None = None
    readings: list[Reading] | None = None
    keep_weights: bool = False
    prompt: Tensor | None = None
    is_packed: bool = False
    rotations: dict[Any, Any] = field(default_factory=dict, init=False)
    _masks: dict[Topology, LatticeMask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own_keys = self.visible.transpose(1, 2).flatten(1)
        # Only where it costs no waiting for a device.
        self._is_full = self.visible.device.type == "cpu" and bool(self.visible.all())
        self._key_visible = own_keys if self.cache is None else self.cache.extend_visible(own_keys)

    @property
    def num_threads(self) -> int:
        return self.visible.shape[1]

    def mask(self, topology: Topology) -> LatticeMask:
        """The mask of this pass, made once for all layers that share a topology.

        ``aligned`` folds columns into the batch: each is a lattice of its own with a single column, without cache.
        """
        if topology not in self._masks:
            batch, num_threads, columns = self.visible.shape
            if topology.scope == "aligned":
                visible = self.visible.transpose(1, 2).reshape(batch * columns, num_threads)
                mask = LatticeMask(topology, num_threads, visible, 0, num_threads, self._is_full)
            else:
                queries = num_threads * columns
                first = self._key_visible.shape[1] - queries
                is_full = self._is_full and self.cache is None
                mask = LatticeMask(topology, num_threads, self._key_visible, first, queries, is_full)
            self._masks[topology] = mask
        return self._masks[topology]

    def at(self, site: Site, layer_idx: int) -> LayerLattice | None:
        """What the exchange of one layer needs, if it has one at this site."""
        exchange = self.exchanges.get(layer_idx)
        return LayerLattice(self, exchange, layer_idx) if exchange is not None and exchange.site == site else None

    def apply(self, exchange: Exchange, layer_idx: int, hidden: Tensor, own: OwnAttention | None = None) -> Tensor:
        """Add what the exchange says to the participating positions of ``hidden``.

        ``hidden`` has one row per thread, (B * N, skip + L, D), or packed one per group, (B, skip + N * L, D). ``own``
        goes to exchanges that read keys.
        """
        rows = hidden[:, self.skip :].reshape(*self.visible.shape, hidden.shape[-1])
        if self._is_full:
            rows = rows + exchange(rows, self, layer_idx, own)
        else:
            invisible = ~self.visible[..., None]
            # What invisible positions computed may be anything, also not finite: a zero weight would not keep it out.
            read = exchange(rows.masked_fill(invisible, 0.0), self, layer_idx, own)
            rows = rows + read.masked_fill(invisible, 0.0)
        rows = rows.reshape(len(hidden), -1, hidden.shape[-1])
        return rows if self.skip == 0 else torch.cat([hidden[:, : self.skip], rows], dim=1)


@dataclass(frozen=True, eq=False)
class LayerLattice:
    """The lattice of a pass with the exchange of one layer.

    Compiled layers get this as their keyword ``lattice``: looking the exchange up by layer index inside compiled code
    would compile every layer anew.
    """

    lattice: Lattice
    exchange: Exchange
    layer_idx: int

    def at(self, site: Site, layer_idx: int) -> LayerLattice | None:
        """This, if the exchange acts at this site."""
        return self if self.exchange.site == site else None

    def apply(self, hidden: Tensor, own: OwnAttention | None = None) -> Tensor:
        """As :meth:`Lattice.apply`."""
        return self.lattice.apply(self.exchange, self.layer_idx, hidden, own)

"""The operations of one decoding step on a GPU: which kernel, which tiles, which buffers.

Up to :data:`~lace_lightning.engine.tiles.THIN` rows a matrix product only reads its weights, and the norms and
activations around it are fused into our own kernels. Above, the library's products are better.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from lace_lightning.decoding.random import uniform
from lace_lightning.decoding.sampling import Sampling
from lace_lightning.decoding.threads import Rules
from lace_lightning.engine.kernels import attention, elementwise, exchange, linear, sampling
from lace_lightning.engine.plan import Plan, exchange_block, is_small, tile_threads
from lace_lightning.engine.side_buffers import PartBuffers, SideBuffers
from lace_lightning.engine.state import GroupState
from lace_lightning.engine.tiles import TILES, is_thin
from lace_lightning.engine.weights import DecoderWeights, LayerWeights

_BLOCK_V = 1024
_KEYS_PER_STEP = 64
"""Keys that a program of attention reads at once."""


class Operations:
    """The kernels of a step over one state.

    Args:
        weights, state: what is read and changed.
        rules: what ends and stops threads.
        draws: how tokens are drawn.
        pdl: programmatic dependent launch; off for devices without it.
    """

    def __init__(
        self, weights: DecoderWeights, state: GroupState, rules: Rules, draws: Sampling, pdl: bool = True
    ) -> None:
        self.weights, self.state, self.draws, self.pad_id = weights, state, draws, rules.pad_id
        self._launch: dict[str, Any] = {"PDL": pdl} | ({"launch_pdl": True} if pdl else {})
        like, rows, size = weights.embedding, state.capacity.rows, state.capacity
        self._rows, self._thin = rows, is_thin(weights, rows)
        hidden, inner = like.shape[1], weights.layers[0].gate.shape[0]
        self._hidden, self._inner = hidden, inner
        heads, key_heads, dim = weights.num_heads, weights.num_key_heads, weights.head_dim
        self.x, self._normed = like.new_empty(2, rows, hidden)
        self._qkv = like.new_empty(rows, (heads + 2 * key_heads) * dim)
        self._attended = like.new_empty(rows, heads * dim)
        self._gate_up = None if self._thin else like.new_empty(rows, 2 * inner)
        self._inner_x = like.new_empty(rows, inner)
        self._logits = torch.empty(rows, weights.head.shape[0], device=like.device)
        self._logit_parts = -(-weights.head.shape[0] // _BLOCK_V)
        self._tops, self._sums, self._cooled = torch.empty(3, rows, self._logit_parts, device=like.device)
        self._drawn = torch.zeros(rows, dtype=torch.long, device=like.device)
        self._drawn_logprobs = torch.zeros(rows, device=like.device)
        self._eos = torch.tensor(rules.eos_ids, device=like.device)
        self._opening = torch.tensor(rules.opening_ids, dtype=torch.long, device=like.device)
        self._cos, self._sin = weights.rotary_tables(size.prompt + size.new)
        self._sides = {i: SideBuffers(side, state) for i, side in weights.sides.items()}
        self._plan = Plan(0, 0, 1)
        self._parts: dict[int, PartBuffers] = {}

    def set_plan(self, new: Plan) -> None:
        """Cut attention like this from now on. Buffers stay: graphs that were captured with them may be replayed."""
        rows, weights, parts = self._rows, self.weights, new.prompt_parts + new.own_parts
        self._plan = new
        if parts and parts not in self._parts:
            size = (rows, weights.num_heads, parts)
            self._parts[parts] = PartBuffers.of(size, weights.head_dim, self.x.device)
        for side in self._sides.values():
            side.allocate(new.exchange_parts)

    # ---------------------------------------------------------------- a layer

    def embed(self) -> None:
        """x = the embeddings of the tokens that were written last."""
        block = triton.next_power_of_2(self._hidden)
        sampling.embed[(self._rows,)](
            self.state.tokens, self.weights.embedding, self.x, self._hidden, block, num_warps=8, **self._launch
        )

    def qkv(self, layer: LayerWeights) -> None:
        if self._thin:
            biases = layer.biases or (layer.q, layer.q, layer.q)
            sizes = (layer.q.shape[0], layer.k.shape[0], layer.v.shape[0])
            self._project(
                "qkv", self.x, layer.input_norm, (layer.q, layer.k, layer.v), biases, sizes, self._qkv,
                has_bias=layer.biases is not None,
            )  # fmt: skip
            return
        self._rms_norm(self.x, layer.input_norm)
        start = 0
        for weight, bias in zip((layer.q, layer.k, layer.v), layer.biases or (None,) * 3, strict=True):
            _mm(self._normed, weight, self._qkv[:, start : start + len(weight)], bias)
            start += len(weight)

    def attend(self, index: int, layer: LayerWeights) -> None:
        """What each thread reads of the prompt and of its own past."""
        w, s, size = self.weights, self.state, self.state.capacity
        heads, key_heads, dim = w.num_heads, w.num_key_heads, w.head_dim
        has_norm = layer.q_norm is not None
        norms = (layer.q_norm, layer.k_norm) if has_norm else (layer.input_norm, layer.input_norm)
        inputs = (
            self._qkv, *norms, w.eps, self._cos, self._sin, s.prompt_k[index], s.prompt_v[index], s.prompt_start,
            size.prompt, s.own_k[index], s.own_v[index], s.own_length, size.new,
        )  # fmt: skip
        queries = triton.next_power_of_2(max(16, heads // key_heads))
        keys_per_step = _KEYS_PER_STEP // (2 if self.x.dtype == torch.float32 else 1)
        options: dict[str, Any] = {"BLOCK_T": keys_per_step, "num_stages": 2, **self._launch}
        if not self._plan.own_parts:
            attention.attend[(self._rows, key_heads)](
                *inputs, self._attended, w.scale, size.num_threads, heads, key_heads, dim, has_norm,
                self._thin, queries, num_warps=8 if self._thin else 4, **options,
            )  # fmt: skip
            return
        tile, parts = tile_threads(s, w), self._plan.prompt_parts + self._plan.own_parts
        tiles = -(-size.num_threads // tile)
        tasks = size.num_groups * tiles * self._plan.prompt_parts + self._rows * self._plan.own_parts
        prompt_queries = triton.next_power_of_2(max(16, tile * (heads // key_heads)))
        attention.attend_parts[(tasks, key_heads)](
            *inputs, *self._parts[parts], w.scale, size.num_groups, size.num_threads, heads,
            key_heads, dim, has_norm, tile, self._plan.prompt_parts, self._plan.own_parts, queries, prompt_queries,
            num_warps=4, **options,
        )  # fmt: skip
        attention.merge_parts[(self._rows * heads,)](
            *self._parts[parts], self._attended, dim, parts, triton.next_power_of_2(parts),
            num_warps=1, **self._launch,
        )  # fmt: skip

    def exchange(self, index: int) -> None:
        """What each thread reads of the others, gated; (M, r) in the side's buffer."""
        s, size, buffers = self.state, self.state.capacity, self._sides[index]
        side, config = buffers.side, buffers.side.config
        if self._thin:
            w_in = side.w_in
            self._project("side", self._attended, w_in, (w_in,) * 3, (w_in,) * 3, (len(w_in), 0, 0), buffers.inputs)
        else:
            torch.mm(self._attended, side.w_in.t(), out=buffers.inputs)
        aligned = config.scope == "aligned"
        keys, values = (buffers.inputs,) * 2 if aligned else s.lattice[index]
        shape = (size.num_threads, config.heads, config.dim, *config.rotary_dims, config.own, aligned)
        inputs = (buffers.inputs, keys, values, s.hidden, s.written, s.time, *buffers.tables, side.w_gate, side.b_gate)
        if aligned and is_small(side, size.num_threads):
            threads = max(triton.next_power_of_2(size.num_threads), -(-16 // config.heads))
            exchange.exchange_column[(size.num_groups,)](
                buffers.inputs, s.written, s.time, *buffers.tables, side.w_gate, side.b_gate, buffers.out,
                config.dim**-0.5, *shape[:-1], threads, num_warps=4, **self._launch,
            )  # fmt: skip
            return
        exchange.exchange[(len(buffers.arrived), config.heads, buffers.parts)](
            *inputs, buffers.out, *buffers.joined[buffers.parts], buffers.arrived, size.new,
            config.dim**-0.5, *shape, config.window or 0, buffers.parts, exchange_block(size.num_threads),
            _KEYS_PER_STEP, triton.next_power_of_2(config.width), num_warps=8, **self._launch,
        )  # fmt: skip

    def project_attended(self, index: int, layer: LayerWeights) -> None:
        """x += W_o (A_std + what the exchange adds)."""
        buffers = self._sides.get(index)
        extra = None if buffers is None else (buffers.out, buffers.side.w_out)
        self._project_add("out", self._attended, layer.o, extra)

    def mlp(self, layer: LayerWeights, is_last: bool) -> None:
        """x += MLP(x); after the last layer into ``held`` instead, for the threads that wrote."""
        if self._thin:
            tile = TILES["gated"]
            linear.project_gated[(self._inner // 16,)](
                self.x, layer.mlp_norm, self.weights.eps, layer.gate, layer.up, self._inner_x, self._rows,
                self._hidden, self._inner, self._block_m, tile.warps, tile.step(self._hidden),
                num_warps=tile.warps, **self._launch,
            )  # fmt: skip
        else:
            assert self._gate_up is not None
            self._rms_norm(self.x, layer.mlp_norm)
            _mm(self._normed, layer.gate, self._gate_up[:, : self._inner])
            _mm(self._normed, layer.up, self._gate_up[:, self._inner :])
            elementwise.silu_mul[(self._rows, triton.cdiv(self._inner, 1024))](
                self._gate_up, self._inner_x, self._inner, 1024, **self._launch
            )
        self._project_add("down", self._inner_x, layer.down, None, into_held=is_last)

    # ---------------------------------------------------------------- the end of a step

    def draw(self) -> None:
        """Logits of what each thread holds, and a token for each."""
        w, s = self.weights, self.state
        if self._thin:
            self._project("head", s.held, w.norm, (w.head,) * 3, (w.head,) * 3, (len(w.head), 0, 0), self._logits, True)
        else:
            self._rms_norm(s.held, w.norm)
            _mm_float32(self._normed, w.head, self._logits)
        truncates = self.draws.top_k > 0 or self.draws.top_p < 1 or self.draws.min_p > 0
        temperature = self.draws.temperature
        cold = temperature == 0 or truncates  # the kernel takes the largest, or its draw is replaced below
        inverse, vocabulary, parts = 1.0 if cold else 1 / temperature, len(w.head), self._logit_parts
        softmax = (self._logits, self._tops, self._sums, self._cooled, inverse)
        sampling.softmax_parts[(self._rows, parts)](*softmax, vocabulary, parts, _BLOCK_V, **self._launch)
        sampling.draw[(self._rows,)](
            *softmax, s.seeds, s.time, self._drawn, self._drawn_logprobs, vocabulary, parts, s.capacity.num_threads,
            temperature == 0, triton.next_power_of_2(parts), _BLOCK_V, **self._launch,
        )  # fmt: skip
        if truncates and temperature > 0:
            self._draw_truncated()

    def _draw_truncated(self) -> None:
        """Top-k, top-p and min-p by torch's own sorting, within the same graph."""
        s, size = self.state, self.state.capacity
        numbers = uniform(s.seeds, size.num_threads, s.time[:, None])
        drawn = self.draws.draw(self._logits, numbers.flatten())
        self._drawn.copy_(drawn)
        total = self._tops.amax(-1), self._tops, self._sums
        log_total = total[0] + ((total[1] - total[0][:, None]).exp() * total[2]).sum(-1).log()
        self._drawn_logprobs.copy_(self._logits.gather(-1, drawn[:, None]).squeeze(-1) - log_total)

    def advance(self) -> None:
        """Write the column: forced or drawn tokens, ends, the barrier."""
        s, size = self.state, self.state.capacity
        sampling.advance[(size.num_groups,)](
            self._drawn, self._drawn_logprobs, s.tokens, s.written, s.due, s.opened, s.waiting, s.ended, s.own_length,
            s.time, s.out_tokens, s.out_written, s.out_forced, s.out_logprobs, self._eos, self._opening, self.pad_id,
            size.new, size.num_threads, len(self._eos), len(self._opening), triton.next_power_of_2(size.num_threads),
            num_warps=1, **self._launch,
        )  # fmt: skip

    # ---------------------------------------------------------------- products

    @property
    def _block_m(self) -> int:
        return 8 if self._rows <= 8 else 16

    def _project(
        self,
        role: str,
        x: Tensor,
        norm: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        biases: tuple[Tensor, Tensor, Tensor],
        sizes: tuple[int, int, int],
        out: Tensor,
        has_norm: bool | None = None,
        has_bias: bool = False,
    ) -> None:
        tile = TILES[role]
        linear.project[(sum(sizes) // 16,)](
            x, norm, self.weights.eps, *weights, *biases, out, self._rows, x.shape[1], *sizes,
            role == "qkv" if has_norm is None else has_norm, has_bias, self._block_m, tile.warps,
            tile.step(x.shape[1]), num_warps=tile.warps, **self._launch,
        )  # fmt: skip

    def _project_add(
        self, role: str, x: Tensor, weight: Tensor, extra: tuple[Tensor, Tensor] | None, into_held: bool = False
    ) -> None:
        out = self.state.held if into_held else self.x
        if self._thin:
            tile = TILES[role]
            x2, weight2 = extra or (x, weight)
            extra_inputs = 0 if extra is None else x2.shape[1]
            linear.project_add[(len(weight) // 16,)](
                x, weight, x2, weight2, self.x, out, self.state.written, self._rows, x.shape[1], extra_inputs,
                len(weight), into_held, self._block_m, tile.warps, tile.step(x.shape[1]),
                max(32, triton.next_power_of_2(extra_inputs // tile.warps)),
                num_warps=tile.warps, **self._launch,
            )  # fmt: skip
            return
        torch.addmm(self.x, x, weight.t(), out=self.x)
        if extra is not None:
            torch.addmm(self.x, extra[0], extra[1].t(), out=self.x)
        if into_held:
            written = self.state.written.view(-1, 1) != 0
            torch.where(written, self.x, self.state.held, out=self.state.held)

    def _rms_norm(self, x: Tensor, norm: Tensor) -> None:
        block = triton.next_power_of_2(self._hidden)
        elementwise.rms_norm[(self._rows,)](
            x, norm, self.weights.eps, self._normed, self._hidden, block, num_warps=8, **self._launch
        )


def _mm(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = x @ weightᵀ [+ bias]."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _mm_float32(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weightᵀ with float32 results, never rounded to the inputs' dtype."""
    if x.dtype == torch.float32:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)

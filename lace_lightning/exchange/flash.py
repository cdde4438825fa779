"""Lattice attention by FlashAttention kernels, which know plain causal attention only: one call per pair of threads.

Thread n reading thread m is plain causal (or sliding-window) attention over their times. Every key thread m is one
batch entry; the R threads that read it are R query heads on each of its heads. A query's reads from several threads
are merged by the log-sum-exp of their scores, exactly. The backward kernels are given the merged output and
log-sum-exp: each pair then finds its own share of the gradients.

Invisible keys get a score that is exactly zero after the softmax, from one more head dim: a constant in the queries, a
large negative number in those keys.

Shapes: B groups, N threads, L columns, h lattice heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lace_lightning.lattice import LatticeMask, Own

HIDDEN = -30_000.0
"""Score of an invisible key: far below any real one, and within float16."""


@dataclass(frozen=True)
class Kernel:
    """FlashAttention on dense batches: queries (B', L, H, d), keys and values (B', L, H', d), H a multiple of H'.

    A query reads keys up to its own position, and if ``window`` is positive only that many of them, itself included.

    Args:
        forward: (q, k, v, scale, window) -> output like q, and log-sum-exp of the scores (B', H, L) float32.
        backward: (gradient of the output, q, k, v, output, log-sum-exp, scale, window) -> gradients of q, k and v.
        device: type of device that it runs on.
        dtypes: that it takes.
        alignment: head widths are multiples of it.
        max_width: of a head.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    device: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    alignment: int = 8
    max_width: int = 256

    def width(self, dim: int) -> int:
        """The width that heads of ``dim`` are padded to."""
        return -(-dim // self.alignment) * self.alignment


# ---------------------------------------------------------------- the backend


def flash(q: Tensor, k: Tensor, v: Tensor, mask: LatticeMask) -> Tensor:
    """(B, h, L*N, d) from time-major q, k and v of the same shape; :func:`refusal` says where it cannot be used."""
    kernel, visible = plan(mask)
    topology, threads = mask.topology, mask.num_threads
    if threads == 1 and topology.own == "exclude":
        return torch.zeros_like(q)
    q, k, v = (x.unflatten(2, (-1, threads)).permute(0, 3, 2, 1, 4) for x in (q, k, v))  # (B, N, L, h, d)
    out, _ = thread_attention(q, k, v, visible, topology.own, topology.window or 0, kernel)
    return out.permute(0, 3, 2, 1, 4).flatten(2, 3)


def plan(mask: LatticeMask) -> tuple[str, Tensor | None]:
    """Name of the kernel, and visible positions (B, N, L), None where all are; made once per mask.

    Asking whether all are visible waits for the device: once per pass, and it saves every layer a wider head.
    """
    if "flash" not in mask.made:
        everything = bool(mask.key_visible.all())
        visible = None if everything else mask.key_visible.unflatten(1, (-1, mask.num_threads)).transpose(1, 2)
        mask.made["flash"] = (INSTALLED, visible)
    return mask.made["flash"]


def installed() -> str:
    """Name of the kernel in use."""
    return INSTALLED


def refusal(mask: LatticeMask, dtype: torch.dtype, dim: int) -> str | None:
    """Why this attention cannot be computed here; None if it can."""
    if mask.topology.scope == "aligned":
        return "scope aligned reads one column, too few keys for it"
    if mask.num_queries != mask.key_visible.shape[1]:
        return "a cached pass has few queries"
    name, kernel = INSTALLED, KERNELS[INSTALLED]
    if mask.key_visible.device.type != kernel.device or dtype not in kernel.dtypes:
        dtypes = " or ".join(str(known).removeprefix("torch.") for known in kernel.dtypes)
        return f"its kernel {name} needs {kernel.device} and {dtypes}"
    if kernel.width(dim + 1) > kernel.max_width:
        return f"its kernel {name} takes no heads of width {dim}"
    return None


# ---------------------------------------------------------------- pairs of threads


@torch.library.custom_op("lace::thread_attention", mutates_args=())
def thread_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, own: str, window: int, kernel: str
) -> tuple[Tensor, Tensor]:
    """Causal attention of every thread over the threads that it reads, opaque to compilers.

    Args:
        q, k, v: (B, N, L, h, d).
        visible: (B, N, L) bool keys that may be read; None: all.
        own: see :class:`~lace_lightning.lattice.Topology`.
        window: columns that are read, 0 for all earlier ones.
        kernel: name in :data:`KERNELS`.

    Returns:
        (B, N, L, h, d), zero where nothing may be read, and log-sum-exp (B, N, L, h) float32.
    """
    pairs = _pairs(q.shape[1], own, q.device)
    wide_q, wide_k, wide_v = _widened(q, k, v, visible, KERNELS[kernel])
    out, lse = KERNELS[kernel].forward(
        pairs.queries(wide_q), wide_k.flatten(0, 1), wide_v.flatten(0, 1), q.shape[-1] ** -0.5, window
    )
    parts = pairs.by_query(lse.transpose(1, 2)[..., None], q.shape[0])  # (B, N, R, L, h, 1)
    total = parts.logsumexp(2)
    merged = (pairs.by_query(out[..., : q.shape[-1]], q.shape[0]) * (parts - total[:, :, None]).exp()).sum(2)
    return merged.masked_fill(total < HIDDEN / 2, 0.0).to(q.dtype), total.squeeze(-1)


@torch.library.custom_op("lace::thread_attention_backward", mutates_args=())
def _thread_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    out: Tensor,
    lse: Tensor,
    own: str,
    window: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, N, L, h, d)."""
    batch, threads, _, _, dim = q.shape
    pairs = _pairs(threads, own, q.device)
    wide_q, wide_k, wide_v = _widened(q, k, v, visible, KERNELS[kernel])
    grad = grad.masked_fill((lse < HIDDEN / 2)[..., None], 0.0)
    wide_grad, wide_out = (F.pad(x, (0, wide_q.shape[-1] - dim)) for x in (grad, out))
    grad_q, grad_k, grad_v = KERNELS[kernel].backward(
        pairs.queries(wide_grad),
        pairs.queries(wide_q),
        wide_k.flatten(0, 1),
        wide_v.flatten(0, 1),
        pairs.queries(wide_out),
        pairs.queries(lse[..., None]).squeeze(-1).transpose(1, 2).contiguous(),
        dim**-0.5,
        window,
    )
    grad_q = pairs.by_query(grad_q[..., :dim], batch).sum(2).to(q.dtype)
    grad_k, grad_v = (x[..., :dim].unflatten(0, (batch, threads)).contiguous() for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


class _Pairs:
    """Which threads read which, and the two orders of what is computed for each pair.

    Args:
        num_threads: N.
        own: whether a thread reads itself too, not itself, or only itself.
    """

    def __init__(self, num_threads: int, own: Own | str, device: torch.device) -> None:
        allowed = {"include": lambda n, m: True, "exclude": lambda n, m: n != m, "only": lambda n, m: n == m}[own]
        table = [[n for n in range(num_threads) if allowed(n, m)] for m in range(num_threads)]
        flat = [n for row in table for n in row]
        order = sorted(range(len(flat)), key=lambda pair: flat[pair])
        self._shape = (num_threads, len(table[0]))
        self._readers = torch.tensor(flat, device=device)  # (N*R,) query threads n, ordered by key thread m
        self._order = torch.tensor(order, device=device)  # (N*R,) places among them, ordered by query thread n

    def queries(self, x: Tensor) -> Tensor:
        """What belongs to queries (B, N, L, h, d), repeated for each thread that they read: (B*N, L, h*R, d)."""
        x = x.index_select(1, self._readers).unflatten(1, self._shape)  # (B, N, R, L, h, d)
        return x.permute(0, 1, 3, 4, 2, 5).flatten(3, 4).flatten(0, 1).contiguous()

    def by_query(self, x: Tensor, batch: int) -> Tensor:
        """What was computed for pairs (B*N, L, h*R, d) as float32, ordered by the query: (B, N, R, L, h, d)."""
        threads, readers = self._shape
        x = x.unflatten(0, (batch, threads)).unflatten(3, (-1, readers)).permute(0, 1, 4, 2, 3, 5)
        x = x.flatten(1, 2).index_select(1, self._order).unflatten(1, self._shape)
        return x if x.dtype == torch.float64 else x.float()


# Made once: copying so much as a list to a GPU waits for all that runs there.
_pairs = cache(_Pairs)


def _widened(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, L, h, d') each, d' as the kernel takes it, with the dim in which invisible keys stand out."""
    dim = q.shape[-1]
    if visible is not None:
        q = torch.cat([q, q.new_full((*q.shape[:-1], 1), dim**0.5)], dim=-1)
        k = torch.cat([k, torch.where(visible, 0.0, HIDDEN).to(k.dtype)[..., None, None].expand_as(k[..., :1])], dim=-1)
    width = kernel.width(q.shape[-1])
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


@thread_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, own: str, window: int, kernel: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_thread_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, visible, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, visible, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _thread_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, None, None, None, None)


thread_attention.register_autograd(_differentiate, setup_context=_remember)


# ---------------------------------------------------------------- kernels


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, length, length, 0.0, True, False, scale=scale, **_torch_window(window)
    )
    return out, lse


def _torch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    length = q.shape[1]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *(grad, q, k, v, out, lse, None, None, length, length, 0.0, True, no_dropout, no_dropout),
        scale=scale,
        **_torch_window(window),
    )
    return gradients


def _torch_window(window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def _cute_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    # Not its public function: that has no way to give the backward pass another output and log-sum-exp.
    out, lse, *_ = import_module("flash_attn.cute.interface")._flash_attn_fwd(
        q, k, v, softmax_scale=scale, return_lse=True, **_cute_window(window)
    )
    return out, lse


def _cute_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v, *_ = import_module("flash_attn.cute.interface")._flash_attn_bwd(
        q, k, v, out, grad, lse, softmax_scale=scale, **_cute_window(window)
    )
    return grad_q, grad_k, grad_v


def _cute_window(window: int) -> dict[str, Any]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {"causal": True}


def _has(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


KERNELS: dict[str, Kernel] = {
    "torch": Kernel(_torch_forward, _torch_backward),
    "flash-attn-4": Kernel(_cute_forward, _cute_backward, alignment=32, max_width=128),
}
INSTALLED = "flash-attn-4" if _has("flash-attn-4") else "torch"
"""The kernel in use. PyTorch's own is FlashAttention-2, or what ``activate_flash_attention_impl`` put in its place."""

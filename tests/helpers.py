"""Tiny random models, groups of tokens, and an independent float64 reference of the exchanges.

The reference is written from the formulas of LACE.md §3 with plain loops over groups, threads, times and heads. It
shares no code with the package: only the names of the weights and their order (Q, K, V; then heads; then channels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lace_lightning.exchange import (
    ConfidentAttentionConfig,
    ExchangeConfig,
    LatticeAttentionConfig,
    SameStepConfig,
    SharedVisibility,
    SharedVisibilityConfig,
)
from lace_lightning.exchange.flash import Kernel
from lace_lightning.threaded_lm import ThreadedLM

VOCAB = 40
WINDOW = 4
"""Sliding window of the backbones that have one: much shorter than the test sequences."""
HOLE = 0
"""Token id written where the attention mask is False."""

# ---------------------------------------------------------------- backbones

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,  # the usual 0.02 would leave hardly any influence to measure in so small a model
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
_HYBRID = ["sliding_attention", "full_attention"] * 2
_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=12),  # attention width 48 is not the hidden size
    "qwen2": lambda: Qwen2Config(
        **_COMMON, use_sliding_window=True, sliding_window=WINDOW, layer_types=_HYBRID, max_window_layers=0
    ),
    "llama": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **_COMMON, head_dim=8, sliding_window=WINDOW, layer_types=_HYBRID, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=WINDOW, layer_types=_HYBRID),
    "phi3": lambda: Phi3Config(**_COMMON, sliding_window=WINDOW),
}
BACKBONES = tuple(_CONFIGS)
BODIES = [(name, attn) for name in BACKBONES for attn in ("eager", "sdpa") if (name, attn) != ("gemma2", "sdpa")]
"""(backbone, attention implementation); Gemma 2 caps its attention scores, which only its eager attention does."""


def tiny_backbone(name: str = "qwen3", attn: str = "sdpa", seed: int = 0, dtype: str = "float32") -> PreTrainedModel:
    torch.manual_seed(seed)
    config = _CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=getattr(torch, dtype))
    return model.eval()


# ---------------------------------------------------------------- exchanges

_SMALL = dict(width=16, heads=2)
EXCHANGES: dict[str, ExchangeConfig] = {
    "causal": LatticeAttentionConfig(**_SMALL, scope="causal"),
    "causal-others": LatticeAttentionConfig(**_SMALL, scope="causal", own="exclude"),
    "causal-own": LatticeAttentionConfig(**_SMALL, scope="causal", own="only"),
    "aligned": LatticeAttentionConfig(**_SMALL, scope="aligned"),
    "aligned-others": LatticeAttentionConfig(**_SMALL, scope="aligned", own="exclude"),
    "aligned-own": LatticeAttentionConfig(**_SMALL, scope="aligned", own="only"),
    "window": LatticeAttentionConfig(**_SMALL, scope="window", window=3),
    "window-others": LatticeAttentionConfig(**_SMALL, scope="window", window=3, own="exclude"),
    "window-own": LatticeAttentionConfig(**_SMALL, scope="window", window=3, own="only"),
    "on-prompt": LatticeAttentionConfig(**_SMALL, scope="causal", reads_prompt=True),
    "aligned-on-prompt": LatticeAttentionConfig(**_SMALL, scope="aligned", own="exclude", reads_prompt=True),
    "same-step": SameStepConfig(**_SMALL),
    "same-step-others": SameStepConfig(**_SMALL, own="exclude"),
    "ungated": LatticeAttentionConfig(**_SMALL, scope="causal", gate="none"),
    "top-k": ConfidentAttentionConfig(**_SMALL, scope="causal"),
    "aligned-top-k": ConfidentAttentionConfig(**_SMALL, scope="aligned"),
    "window-top-k": ConfidentAttentionConfig(**_SMALL, scope="window", window=3, top_k=5),
    "shared": SharedVisibilityConfig(stride=0),
    "shared-slots": SharedVisibilityConfig(stride=11),
    "shared-gated": SharedVisibilityConfig(stride=0, gated=True),
}
WITHOUT_IDENTITY_START = ("shared", "shared-slots")
"""They have no weights that could start at zero: threads read each other from the start."""
FULL_ATTENTION = ("qwen3", "llama")
"""Backbones without sliding windows and soft caps: the only ones whose keys threads may share."""


def can_join(exchange: str, backbone: str) -> bool:
    """Whether a backbone can carry an exchange."""
    return backbone in FULL_ATTENTION or not isinstance(EXCHANGES[exchange], SharedVisibilityConfig)


BACKENDS = ("eager", "sdpa", "folded", "pointwise", "flex", "flash")


@dataclass(frozen=True)
class Case:
    """One model to hold the exactness claims against."""

    backbone: str
    attn: str
    exchange: str
    backend: str = "auto"

    def __str__(self) -> str:
        return f"{self.backbone}-{self.attn}-{self.exchange}-{self.backend}"

    @property
    def config(self) -> ExchangeConfig:
        config = EXCHANGES[self.exchange]
        return replace(config, backend=self.backend) if self.backend != "auto" else config

    @property
    def crosses(self) -> bool:
        """Whether threads may read each other at all."""
        return not self.exchange.endswith("-own")


_ON = {
    "folded": ("aligned", "aligned-others", "aligned-on-prompt"),  # what it is for
    "pointwise": ("aligned", "aligned-others", "aligned-on-prompt"),
    "flex": ("causal", "aligned-others", "window-others", "on-prompt"),  # slow on CPUs, and tested by itself for all
    "flash": ("causal", "causal-others", "causal-own", "window-others", "on-prompt"),  # leaves aligned to others
}
CASES = [
    Case("qwen3", "sdpa", name, backend)
    for name, config in EXCHANGES.items()
    for backend in (BACKENDS if type(config) is LatticeAttentionConfig else ("auto",))
    if name in _ON.get(backend, EXCHANGES)
] + [
    Case(*body, name)
    for body in BODIES
    if body != ("qwen3", "sdpa")
    for name in ("causal", "window-others", "same-step", "shared-slots")
    if can_join(name, body[0])
]
"""Every exchange on every backend on one backbone, and a wide, a narrow and a layer exchange on every other one."""


def wake(model: ThreadedLM, seed: int = 1) -> ThreadedLM:
    """Give the zero-started W_up random weights, and the queries and keys some contrast; open closed gates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.exchanges.values():
            if isinstance(block, SharedVisibility):
                if block.gate is not None:
                    block.gate.fill_(0.8)
                continue
            block.up.weight.copy_(torch.randn(block.up.weight.shape, generator=generator) * 0.4)
            block.qkv.weight.copy_(torch.randn(block.qkv.weight.shape, generator=generator) * 0.5)
    return model


def tiny_lm(
    exchange: ExchangeConfig | None = None,
    backbone: str = "qwen3",
    attn: str = "sdpa",
    num_threads: int = 3,
    layers: tuple[int, ...] = (1, 2),
) -> ThreadedLM:
    """A model of four layers whose exchange really acts."""
    torch.manual_seed(2)
    return wake(ThreadedLM(tiny_backbone(backbone, attn), exchange, num_threads, layers).eval())


@cache
def lm_of(case: Case) -> ThreadedLM:
    """The model of a case, shared by all tests: read it, never change it."""
    return tiny_lm(case.config, case.backbone, case.attn)


# ---------------------------------------------------------------- FlashAttention, written out


def _scores(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    """(B, H, L, L) scores of (B, L, H, d) queries and keys; -inf where a query is not to read."""
    query, key = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])[None]
    allowed = (key <= query) & (key > query - window if window else True)
    return (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~allowed, -torch.inf)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = _scores(q, k, scale, window)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    repeats = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    weights = (_scores(q, wide_k, scale, window) - lse[..., None]).exp()
    slope = torch.einsum("bqhd,bkhd->bhqk", grad, wide_v) - (grad * out).sum(-1).transpose(1, 2)[..., None]
    grad_q = torch.einsum("bhqk,bkhd->bqhd", weights * slope, wide_k) * scale
    grad_k = torch.einsum("bhqk,bqhd->bkhd", weights * slope, q) * scale
    grad_v = torch.einsum("bhqk,bqhd->bkhd", weights, grad)
    return grad_q, *(x.unflatten(2, (-1, repeats)).sum(3) for x in (grad_k, grad_v))


PLAIN_KERNEL = Kernel(
    _plain_forward, _plain_backward, device="cpu", dtypes=(torch.float64, torch.float32, torch.bfloat16)
)
"""Does what FlashAttention does, on CPUs and in any dtype: it stands in for it wherever there is no CUDA."""


# ---------------------------------------------------------------- groups of tokens


@dataclass
class Tokens:
    """What :class:`ThreadedLM` takes, as one value."""

    input_ids: Tensor
    attention_mask: Tensor
    prompt_length: int

    def logits(self, model: ThreadedLM) -> Tensor:
        with torch.no_grad():
            return model(self.input_ids, self.attention_mask, self.prompt_length)

    def with_ids(self, input_ids: Tensor) -> Tokens:
        return Tokens(input_ids, self.attention_mask, self.prompt_length)

    def to(self, device: str) -> Tokens:
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device), self.prompt_length)


def random_ids(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def ragged_groups(num_threads: int = 3, seed: int = 3) -> Tokens:
    """Two groups with prompts of 3 and 4 tokens (left-padded), holes inside threads and threads of different ends."""
    prompt_length, columns = 4, 13
    mask = torch.ones(2, num_threads, columns, dtype=torch.bool)
    mask[1, :, 0] = False  # left padding
    mask[0, 0, 6:8] = False  # a wait in the middle
    mask[1, -1, prompt_length:6] = False  # a wait right after the prompt
    mask[0, -1, 10:] = False  # an early end
    prompt = random_ids(2, 1, prompt_length, seed=seed).expand(-1, num_threads, -1)
    ids = torch.cat([prompt, random_ids(2, num_threads, columns - prompt_length, seed=seed + 1)], dim=-1)
    return Tokens(ids.masked_fill(~mask, HOLE), mask, prompt_length)


class EmbeddingProbe:
    """Makes the embeddings of every forward pass a leaf whose gradient can be read; a context manager."""

    def __init__(self, model: ThreadedLM) -> None:
        self._module = model.backbone.get_input_embeddings()
        self.embeddings: Tensor | None = None

    def __enter__(self) -> EmbeddingProbe:
        self._hook = self._module.register_forward_hook(self._replace)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _replace(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        self.embeddings = output.detach().requires_grad_()
        return self.embeddings


def influence(model: ThreadedLM, tokens: Tokens, watched: Tensor, seed: int = 5) -> Tensor:
    """(B, N, L) largest absolute gradient of a random functional of the ``watched`` (B, N, L) logits on each token."""
    with EmbeddingProbe(model) as probe:
        logits = model(tokens.input_ids, tokens.attention_mask, tokens.prompt_length)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits)
        (gradient,) = torch.autograd.grad((logits * weights * watched[..., None]).sum(), probe.embeddings)
    return gradient.abs().amax(-1).view(tokens.input_ids.shape)


# ---------------------------------------------------------------- the float64 reference


@dataclass
class Reference:
    """Result of the reference, all float64.

    Args:
        added: (B, N, L, D) what is added to the hidden states; 0 at invisible positions.
        gate: (B, N, L) mean gate.
        mass: (B, N, L, N) attention mass on each thread, mean over heads.
    """

    added: Tensor
    gate: Tensor
    mass: Tensor


def may_read(scope: str, own: str, window: int | None, n: int, t: int, m: int, s: int) -> bool:
    """LACE.md §3: may the token of thread n at time t read thread m at time s?"""
    if {"include": False, "exclude": m == n, "only": m != n}[own]:
        return False
    if scope == "aligned":
        return s == t
    return s <= t if scope == "causal" else t - window < s <= t


def _rotated(x: Tensor, t: int, n: int, time_dims: int, thread_dims: int, base: float) -> Tensor:
    """One head's vector (d): the first time_dims turn with t, the next thread_dims with n, in pairs (i, i + half)."""
    values = list(x)
    for start, dims, position in ((0, time_dims, t), (time_dims, thread_dims, n)):
        for i in range(dims // 2):
            angle = position * base ** (-i / (dims // 2))
            a, b = x[start + i], x[start + i + dims // 2]
            values[start + i] = a * math.cos(angle) - b * math.sin(angle)
            values[start + i + dims // 2] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(values)


def _softmax(scores: list[Tensor]) -> list[Tensor]:
    peak = max(float(score.detach()) for score in scores)
    exps = [torch.exp(score - peak) for score in scores]
    return [e / sum(exps) for e in exps]


def _attend(
    q: dict, k: dict, v: dict, heads: int, dim: int, shape: tuple[int, int, int], visible: Tensor, allowed: Callable
) -> tuple[dict, Tensor]:
    """Softmax attention, one query, head and key at a time; positions are keys (b, n, t), values lists over heads."""
    batch, num_threads, columns = shape
    reads, mass = {}, torch.zeros(batch, num_threads, columns, num_threads, dtype=torch.float64)
    for b, n, t in q:
        keys = [
            (b, m, s) for m in range(num_threads) for s in range(columns) if visible[b, m, s] and allowed(n, t, m, s)
        ]
        per_head = []
        for head in range(heads):
            if not keys:
                per_head.append(torch.zeros(dim, dtype=torch.float64))
                continue
            weights = _softmax([(q[b, n, t][head] * k[key][head]).sum() / math.sqrt(dim) for key in keys])
            per_head.append(sum(w * v[key][head] for w, key in zip(weights, keys, strict=True)))
            for w, key in zip(weights, keys, strict=True):
                mass[b, n, t, key[1]] += float(w.detach()) / heads
        reads[b, n, t] = torch.cat(per_head)
    return reads, mass


def _gather(values: dict, shape: tuple[int, int, int]) -> Tensor:
    batch, num_threads, columns = shape
    return torch.stack(
        [
            torch.stack([torch.stack([values[b, n, t] for t in range(columns)]) for n in range(num_threads)])
            for b in range(batch)
        ]
    )


def _heads(x: Tensor, heads: int) -> list[Tensor]:
    return list(x.reshape(heads, -1))


def reference_lattice_attention(
    hidden: Tensor, weights: dict[str, Tensor], config: LatticeAttentionConfig, visible: Tensor, first_time: int = 0
) -> Reference:
    """LACE.md §3 for ``hidden`` (B, N, L, D) float64; ``weights`` by parameter name, float64."""
    shape = tuple(visible.shape)
    r, d = config.width, config.width // config.heads
    half = d // 4 * 2
    d_t = half if config.time_dims is None else config.time_dims
    d_n = half if config.thread_dims is None else config.thread_dims
    z, q, k, v = {}, {}, {}, {}
    for b, n, t in torch.ones(shape).nonzero().tolist():
        z[b, n, t] = weights["down.weight"] @ hidden[b, n, t]
        qkv = weights["qkv.weight"] @ z[b, n, t]
        q[b, n, t], k[b, n, t] = (
            [_rotated(x, t + first_time, n, d_t, d_n, config.rotary_base) for x in _heads(part, config.heads)]
            for part in (qkv[:r], qkv[r : 2 * r])
        )
        v[b, n, t] = _heads(qkv[2 * r :], config.heads)

    def allowed(n: int, t: int, m: int, s: int) -> bool:
        return may_read(config.scope, config.own, config.window, n, t, m, s)

    reads, mass = _attend(q, k, v, config.heads, d, shape, visible, allowed)
    added, gates = {}, {}
    for key, read in reads.items():
        gate = torch.sigmoid(weights["gate.weight"] @ torch.cat([z[key], read]) + weights["gate.bias"])
        added[key] = (weights["up.weight"] @ (gate * read)) * float(visible[key])
        gates[key] = gate.mean()
    return Reference(_gather(added, shape), _gather(gates, shape), mass)


def reference_same_step(
    hidden: Tensor, weights: dict[str, Tensor], config: SameStepConfig, visible: Tensor, eps: float
) -> Tensor:
    """(B, N, L, D) that same-step attention adds: pre-norm attention within one column."""
    shape = tuple(visible.shape)
    r, d = config.width, config.width // config.heads
    q, k, v = {}, {}, {}
    for key in map(tuple, torch.ones(shape).nonzero().tolist()):
        x = hidden[key]
        normed = x / torch.sqrt((x * x).mean() + eps) * weights["norm.weight"]
        qkv = weights["qkv.weight"] @ normed
        q[key], k[key], v[key] = (_heads(part, config.heads) for part in (qkv[:r], qkv[r : 2 * r], qkv[2 * r :]))

    def allowed(n: int, t: int, m: int, s: int) -> bool:
        return may_read("aligned", config.own, None, n, t, m, s)

    reads, _ = _attend(q, k, v, config.heads, d, shape, visible, allowed)
    return _gather({key: (weights["up.weight"] @ read) * float(visible[key]) for key, read in reads.items()}, shape)

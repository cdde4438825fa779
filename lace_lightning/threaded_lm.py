"""A Hugging Face causal LM whose threads read each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lace_lightning import packing
from lace_lightning.backbone import (
    BackboneError,
    causal_lm,
    check_layers,
    connect,
    decoder_of,
    default_layers,
    geometry_of,
    takes_packed_rows,
    text_config,
    token_positions,
)
from lace_lightning.compiled_layers import are_compiled
from lace_lightning.exchange.base import Exchange, ExchangeConfig, Isolated
from lace_lightning.lattice import Lattice, LatticeCache, Reading
from lace_lightning.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lace_lightning.decoding.group import Group
    from lace_lightning.traces.template import Template


class ThreadedLM(nn.Module):
    """N threads per group through one backbone, with an exchange on some of its layers.

    Args:
        backbone: a decoder-only Hugging Face model (a PEFT wrapper around one is fine). Its modules stay as they are;
            the exchange lives beside them in ``exchanges``, so the backbone saves and loads as the plain model it is.
        exchange: settings of the exchange; ``Isolated()`` for none.
        num_threads: N that generation uses when it is not told otherwise. Weights do not depend on it.
        layers: lattice layers; None: every second layer from the middle of the stack on.
        tokenizer: for text in, text out; may be set later.

    Raises:
        BackboneError: the backbone cannot carry the exchange; the message says why.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        exchange: ExchangeConfig | None = None,
        num_threads: int = 4,
        layers: Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: a group needs at least one thread")
        num_layers = len(decoder_of(backbone).layers)
        self.backbone = backbone
        self.exchange_config = exchange or Isolated()
        self.num_threads = num_threads
        self.layers = check_layers(list(default_layers(num_layers) if layers is None else layers), num_layers)
        self.tokenizer = tokenizer
        connect(backbone)
        blocks = {str(i): self.exchange_config.build(geometry_of(backbone, i)) for i in self.layers}
        self.exchanges = nn.ModuleDict({i: block for i, block in blocks.items() if block is not None})
        self._probe()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        exchange: ExchangeConfig | None = None,
        num_threads: int = 4,
        layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> ThreadedLM:
        """Load backbone and tokenizer by hub name or folder; ``kwargs`` go to ``AutoModelForCausalLM``.

        Code that lies with a model runs only with ``trust_remote_code=True``.
        """
        trust = kwargs.pop("trust_remote_code", False)
        backbone = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        return cls(backbone, exchange, num_threads, layers, tokenizer)

    # ---------------------------------------------------------------- forward

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt_length: int = 0) -> Tensor:
        """Logits of whole groups.

        Args:
            input_ids: (B, N, L) long.
            attention_mask: (B, N, L), nonzero where a real token stands; None: everywhere. Zeros inside a thread are
                waiting columns.
            prompt_length: leading columns that hold the (left-padded) prompt, on which the exchange is off.

        Returns:
            (B, N, L, V) logits. Row c predicts the thread's next real token after column c.
        """
        attention_mask = _mask_or_ones(input_ids, attention_mask)
        return self.head(self._hidden(input_ids, attention_mask, self.lattice(attention_mask, prompt_length)))

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int = 0,
        keep_weights: bool = False,
    ) -> list[Reading]:
        """One forward pass of the decoder that records gates and attention shares, one reading per lattice layer.

        With ``keep_weights`` also the weights of all positions on all others, for each layer.
        """
        attention_mask = _mask_or_ones(input_ids, attention_mask)
        lattice = self.lattice(attention_mask, prompt_length)
        lattice.readings, lattice.keep_weights = [], keep_weights
        with torch.no_grad():
            self._hidden(input_ids, attention_mask, lattice)
        return lattice.readings

    def token_logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        prompt_length: int = 0,
        chunk_size: int = 2048,
    ) -> Tensor:
        """Log-probability of each target token given what its thread and, through the exchange, the others wrote.

        A token is predicted from its thread's previous real token, however many columns ago that stood. The logits
        exist for ``chunk_size`` tokens at a time only, in the backward pass too.

        Args:
            input_ids, attention_mask, prompt_length: as in :meth:`forward`.
            targets: (B, N, L) bool, tokens to score; a thread's first real token has no prediction and is not scored.

        Returns:
            (B, N, L) float32; 0 where not scored.
        """
        hidden = self._hidden_to_score(input_ids, attention_mask, prompt_length)
        scored, before = predictable(attention_mask, targets, hidden.shape[2])
        rows, tokens = hidden.flatten(0, 2).index_select(0, before), input_ids.flatten()[scored]
        logprobs = torch.zeros(targets.shape, device=rows.device)
        return logprobs.flatten().index_copy(0, scored, self._score_all(rows, tokens, chunk_size)).view(targets.shape)

    def mean_nll(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        prompt_length: int = 0,
        count: Tensor | None = None,
        chunk_size: int = 4096,
    ) -> Tensor:
        """Mean negative log-likelihood of the target tokens: ``-token_logprobs(...)`` over those that it scores.

        Faster with gradients, since the head is computed once: a mean's weights are known in the forward pass.

        Args:
            input_ids, attention_mask, targets, prompt_length, chunk_size: as in :meth:`token_logprobs`.
            count: () what the sum is divided by: the tokens of a batch of which this is a part. None: those here.

        Returns:
            () float32; NaN without a token to score, unless others have some.
        """
        hidden = self._hidden_to_score(input_ids, attention_mask, prompt_length)
        scored, before = predictable(attention_mask, targets, hidden.shape[2])
        rows, tokens = hidden.flatten(0, 2).index_select(0, before), input_ids.flatten()[scored]
        head = causal_lm(self.backbone).get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None:
            ones = torch.ones(tokens.shape, device=rows.device)
            total = linear_cross_entropy(rows, head.weight, tokens, ones, self.softcap, chunk_size)
        else:  # a head with LoRA, say
            total = -self._score_all(rows, tokens, chunk_size).sum()
        return total / (len(tokens) if count is None else count)

    def _score_all(self, hidden: Tensor, tokens: Tensor, chunk_size: int) -> Tensor:
        """(M,) float32 log-probabilities of ``tokens`` from hidden states (M, D), a chunk at a time."""
        chunks = [
            checkpoint(self._score, *pair, use_reentrant=False) if torch.is_grad_enabled() else self._score(*pair)
            for pair in zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True)
        ]
        return torch.cat(chunks)

    def _score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(M,) float32 log-probabilities of ``tokens`` from hidden states (M, D)."""
        return -F.cross_entropy(self.head(hidden).float(), tokens, reduction="none")

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of the decoder's output (..., D), with the final soft cap of Gemma 2 and its kin."""
        logits = causal_lm(self.backbone).get_output_embeddings()(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def softcap(self) -> float | None:
        """The bound on logits of Gemma 2 and its kin."""
        return getattr(text_config(self.backbone), "final_logit_softcapping", None)

    def run(self, input_ids: Tensor, attention_mask: Tensor, lattice: Lattice | None, **kwargs: Any) -> Tensor:
        """The decoder on plain rows, without the head.

        Args:
            input_ids: (rows, L_new) the columns of this pass.
            attention_mask: (rows, L) bool over all columns so far, earlier ones included. Positions count real tokens.
                If the lattice says that the rows are packed: of a row per thread.
            lattice: the lattice of this pass; None runs the bare backbone.
            kwargs: the cache, for decoding; the positions, of packed rows.

        Returns:
            (rows, L_new, D) hidden states.
        """
        if "position_ids" not in kwargs:
            kwargs["position_ids"] = self._positions(attention_mask, lattice, input_ids.shape[1])
        return decoder_of(self.backbone)(
            input_ids=input_ids, attention_mask=attention_mask, lattice=lattice, **{"use_cache": False, **kwargs}
        ).last_hidden_state

    def _positions(self, attention_mask: Tensor, lattice: Lattice | None, columns: int) -> Tensor:
        """(rows, columns) positions of the last columns, with those of threads set apart if the exchange wants it."""
        positions = token_positions(attention_mask)[:, -columns:]
        stride = self.exchange_config.position_stride
        if lattice is None or not stride:
            return positions
        threads = torch.arange(lattice.num_threads, device=positions.device).repeat(len(lattice.visible))
        after_prompt = torch.arange(columns, device=positions.device) >= lattice.skip
        return positions + stride * threads[:, None] * after_prompt

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, lattice: Lattice) -> Tensor:
        """(B, N, L, D) output of the decoder."""
        rows = self.run(input_ids.flatten(0, 1), attention_mask.flatten(0, 1), lattice)
        return rows.view(*input_ids.shape, -1)

    def _hidden_to_score(self, input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
        """(B, N, L or L - 1, D) output of the decoder: what any token of (B, N, L) may be predicted from.

        Nothing is predicted from the last column, and nothing flows back from it: CPUs leave it out, while GPUs had
        rather keep a length that kernels' blocks divide. The prompt that the threads of a group share is computed once
        where that pays.
        """
        columns = input_ids.shape[-1]
        if input_ids.device.type == "cpu":
            columns = max(1, columns - 1)
        input_ids, attention_mask = input_ids[..., :columns], attention_mask[..., :columns]
        prompt_length = min(prompt_length, columns)
        lattice = self.lattice(attention_mask, prompt_length)
        # Taking rows apart inside of compiled layers would compile them more often.
        can_pack = takes_packed_rows(self.backbone) and not are_compiled(self.backbone)
        if not (can_pack and lattice.skip == prompt_length and packing.pays(input_ids, attention_mask, prompt_length)):
            return self._hidden(input_ids, attention_mask, lattice)
        lattice.is_packed = True
        positions = self._positions(attention_mask.flatten(0, 1), lattice, columns).view(input_ids.shape)
        ids, positions = (packing.pack(x, prompt_length) for x in (input_ids, positions))
        rows = self.run(ids, attention_mask.flatten(0, 1), lattice, position_ids=positions)
        return packing.unpack(rows, lattice.num_threads, prompt_length)

    def lattice(self, attention_mask: Tensor, prompt_length: int = 0, cache: LatticeCache | None = None) -> Lattice:
        """The lattice of a pass from the first column on; lattice time 0 is the first column after the prompt."""
        skip = 0 if self.exchange_config.reads_prompt else prompt_length
        return Lattice(
            self.exchange_at,
            attention_mask[..., skip:].bool(),
            first_time=skip - prompt_length,
            skip=skip,
            cache=cache,
            prompt=attention_mask[:, 0, :skip].bool(),
        )

    @property
    def exchange_at(self) -> dict[int, Exchange]:
        """Layer index -> exchange block."""
        return {int(i): cast(Exchange, block) for i, block in self.exchanges.items()}

    # ---------------------------------------------------------------- generation

    def generate_groups(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 256,
        seed: int = 0,
        template: Template | None = None,
        **sampling: Any,
    ) -> list[Group]:
        """Decode one group of threads per prompt.

        Args:
            prompts: problem texts, before the template.
            max_new_tokens: most lattice columns to decode.
            seed: with the same seed a prompt gets the same group, whatever else is in the batch.
            template: spelling of prompt and assessment.
            sampling: ``temperature``, ``top_k``, ``top_p``, ``min_p`` of :class:`~lace_lightning.decoding.Sampling`.

        Raises:
            ValueError: the model has no tokenizer, or a sampling option is out of range.
        """
        from lace_lightning.decoding import generate_groups

        return generate_groups(self, prompts, max_new_tokens, seed, template, **sampling)

    # ---------------------------------------------------------------- parameters

    def exchange_parameters(self) -> list[nn.Parameter]:
        return list(self.exchanges.parameters())

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: of the backbone, and added by the exchange."""
        return {
            "backbone": sum(p.numel() for p in self.backbone.parameters()),
            "exchange": sum(p.numel() for p in self.exchange_parameters()),
        }

    def save_exchange(self, folder: str | Path) -> None:
        """Write the exchange's weights and settings: ``exchange.safetensors`` and ``exchange.json``."""
        from lace_lightning.adapter import save_exchange

        save_exchange(self, Path(folder))

    def load_exchange(self, folder: str | Path) -> None:
        """Load exchange weights written by :meth:`save_exchange` into this model's blocks.

        Raises:
            ValueError: settings, layers or shapes differ from this model's; nothing is changed then.
        """
        from lace_lightning.adapter import load_exchange

        load_exchange(self, Path(folder))

    @torch.no_grad()
    def _probe(self) -> None:
        """Run two tokens: every exchange must be reached at its width, and the head be a mere projection."""
        parameter = next(self.backbone.parameters())
        if parameter.is_meta:
            return
        reached: list[int] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args: reached.append(args[2]))
            for block in self.exchanges.values()
        ]
        name, training = type(causal_lm(self.backbone)).__name__, self.backbone.training
        ids = torch.arange(2, device=parameter.device).view(1, 1, 2)  # two: the embedding of a padding token is zero
        self.backbone.eval()
        try:
            logits = self(ids)[0]
            plain = self.backbone(input_ids=ids[0], attention_mask=torch.ones_like(ids[0]), use_cache=False).logits
        except (RuntimeError, TypeError) as error:
            raise BackboneError(f"{name} cannot carry the exchange on layers {self.layers}: {error}") from error
        finally:
            self.backbone.train(training)
            for hook in hooks:
                hook.remove()
        if missed := sorted(set(self.exchange_at) - set(reached)):
            raise BackboneError(
                f"layers {missed} of {name} have no softmax attention that an exchange can join (linear-attention "
                "layers?): choose other layers"
            )
        if not torch.equal(logits, plain):
            raise BackboneError(
                f"the logits of {name} are not its output embedding of the decoder's output: unsupported"
            )


def predictable(attention_mask: Tensor, targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The targets (…, L) that have a previous real token in their thread.

    Returns:
        flat positions (M,) of these targets in (…, L), and (M,) of their previous tokens in (…, ``columns``): the last
        column may be left out there, since nothing is predicted from it.
    """
    previous = previous_token(attention_mask)
    scored = (targets & (previous >= 0)).flatten().nonzero().squeeze(-1)
    return scored, scored // targets.shape[-1] * columns + previous.flatten()[scored]


def num_predictable(attention_mask: Tensor, targets: Tensor) -> Tensor:
    """() long: how many of the targets (…, L) have a previous real token in their thread."""
    return (targets & (previous_token(attention_mask) >= 0)).sum()


def previous_token(attention_mask: Tensor) -> Tensor:
    """Column of each position's previous real token in its own thread, (…, L) long; -1 where there is none."""
    columns = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    last = torch.where(attention_mask.bool(), columns, -1).cummax(-1).values
    return F.pad(last, (1, -1), value=-1)


def _mask_or_ones(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if input_ids.dim() != 3:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: (B groups, N threads, L columns) is needed")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} differs from input_ids {tuple(input_ids.shape)}"
        )
    return attention_mask.bool()

"""Exact negative log-likelihood of completions: it depends on model and data alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tsugiki.errors import UserError
from tsugiki.samples import EncodedSample


@dataclass(frozen=True)
class Nll:
    """Per-sample sums; divide once, over whatever group is wanted.

    Attributes:
        nats: ``(N,)`` float64, summed negative log-likelihood of each completion, end-of-turn token included.
        tokens: ``(N,)`` int64, completion tokens scored.
    """

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> float:
        """Token-weighted mean, nats/token."""
        return float(self.nats.sum() / self.tokens.sum())


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of similar length, each at most ``tokens_per_batch`` tokens after padding.

    A sample longer than ``tokens_per_batch`` has a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def completion_nll(
    model,
    samples: Sequence[EncodedSample],
    *,
    tokens_per_batch: int = 2048,
    on_done: Callable[[int], None] | None = None,
) -> Nll:
    """NLL of each sample's completion given its prompt.

    Logits are computed at the completion's positions only, log-softmax in float32, the sum in float64. Samples are
    padded on the right, where causal attention cannot see, so batch size and order do not change the result beyond
    the rounding of the matrix products.

    Args:
        model: a transformers causal language model, with or without a PEFT adapter, in evaluation mode.
        samples: encoded samples, none empty.
        tokens_per_batch: padded tokens in one forward pass.
        on_done: called with the number of samples finished after each batch.

    Raises:
        UserError: no sample, an empty completion or prompt, a sample longer than the model's context, or a result
            that is not finite.
    """
    import torch

    _check_samples(model, samples)
    body, head = model_parts(model)
    device = head.weight.device
    nats = np.zeros(len(samples))
    tokens = np.asarray([len(s.completion_ids) for s in samples], dtype=np.int64)
    done = 0
    for batch in batches_by_length([len(s.ids) for s in samples], tokens_per_batch):
        ids, mask, rows, columns, targets = pad_batch([samples[i] for i in batch], pad_id=0)
        with torch.inference_mode():
            hidden = body(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state.to(device)
            logits = head(hidden[rows.to(device), columns.to(device)]).float()
            losses = torch.nn.functional.cross_entropy(logits, targets.to(device), reduction="none").double().cpu()
        nats[batch] = np.bincount(rows.numpy(), weights=losses.numpy(), minlength=len(batch))
        done += len(batch)
        if on_done:
            on_done(done)
    if not np.isfinite(nats).all():
        worst = samples[int(np.flatnonzero(~np.isfinite(nats))[0])]
        raise UserError(f"the NLL of sample {worst.id} is not finite", hint="The weights hold NaN or infinite values.")
    return Nll(nats, tokens)


def model_parts(model):
    """The body (token ids to hidden states) and the output layer of a causal language model, under PEFT or not."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(causal, causal.base_model_prefix), causal.get_output_embeddings()


def pad_batch(samples: Sequence[EncodedSample], pad_id: int):
    """Right-padded tensors of a batch.

    Returns:
        ``(ids, mask, rows, columns, targets)``: ``ids`` and ``mask`` ``(B, T)`` int64; ``rows`` and ``columns``
        ``(K,)`` int64 index the hidden states that predict the K completion tokens of the batch, ``targets`` ``(K,)``.
    """
    import torch

    longest = max(len(s.ids) for s in samples)
    ids = torch.full((len(samples), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(samples), longest), dtype=torch.long)
    rows, columns, targets = [], [], []
    for row, s in enumerate(samples):
        ids[row, : len(s.ids)] = torch.tensor(s.ids)
        mask[row, : len(s.ids)] = 1
        first = len(s.prompt_ids) - 1
        rows += [row] * len(s.completion_ids)
        columns += range(first, first + len(s.completion_ids))
        targets += s.completion_ids
    return ids, mask, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets)


def _check_samples(model, samples: Sequence[EncodedSample]) -> None:
    if not samples:
        raise UserError("there is no sample to score")
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"{type(model).__name__} changes its logits ({name} = {getattr(config, name)}), which this NLL does not do",
                hint="Take a base of the families Llama, Mistral or Qwen.",
            )
    context = getattr(config, "max_position_embeddings", None)
    for s in samples:
        if not s.completion_ids or not s.prompt_ids:
            raise UserError(f"sample {s.id} has an empty {'prompt' if s.completion_ids else 'completion'}")
        if context and len(s.ids) > context:
            raise UserError(f"sample {s.id} has {len(s.ids)} tokens, the model's context is {context}",
                            hint=f"Set the domain's max_tokens to at most {context}: longer samples are dropped and counted.")


def bits_per_character(nll: Nll, samples: Sequence[EncodedSample]) -> float:
    """Bits per character of the completions: comparable between tokenizers, which nats per token are not."""
    return float(nll.nats.sum() / math.log(2) / sum(len(s.completion) for s in samples))

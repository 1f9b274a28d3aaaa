"""Does a fit go on this card? Peak memory of LoRA and QLoRA from the architecture alone, term by term.

All formulas count bytes. ``H`` hidden, ``F`` feed-forward, ``Q`` = heads · head width, ``KV`` = key-value heads · head
width, ``L`` layers, ``V`` vocabulary, ``r`` rank, ``T`` = micro-batch · sequence tokens in a pass.

What was measured where: weights, adapter, optimizer states and activations are measured on the CPU, on models of random
weights (``tests/test_plan.py``); a whole peak on a GPU is what ``benchmarks/qlora_memory.py`` measures. The constants
``CUDA_CONTEXT`` and ``FRAGMENTATION`` and the buffer of bitsandbytes are assumed, not measured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tsugiki.adapt.loss import LOGITS_AT_A_TIME
from tsugiki.bases import Profile
from tsugiki.errors import UserError

GIB = 2**30
CUDA_CONTEXT = 450 * 2**20  # the driver's context, cuBLAS workspaces and kernels: 300 to 500 MiB by card and driver
FRAGMENTATION = 0.04  # of what comes and goes: holes that the caching allocator cannot fill
FOUR_BIT_FROM = 4_000_000_000  # bytes of bf16 weights from which a GPU fit takes NF4
TOKENS_THAT_FILL_A_GPU = 2048  # in a pass; above it a larger micro-batch gains little, and checkpointing costs a third
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Numerics:
    """In which precision the adapter works; the base's activations are bf16 throughout.

    Attributes:
        adapter: bytes of an adapter parameter and of its gradient.
        lora_input: bytes of an element of a LoRA layer's saved input.
        copies: each LoRA layer casts its input to a copy of its own; otherwise layers that read one tensor share it.
        autocast: the adapter's matrices are copied to bf16 for the pass.
        backward: ``(f, h)``: bytes that come and go in a layer's backward pass beyond what it saved, as
            ``T · (f · F + h · H)``; read off a log of every allocation, at five shapes.
    """

    adapter: int
    lora_input: int
    copies: bool
    autocast: bool
    backward: tuple[int, int]


QLORA = Numerics(adapter=2, lora_input=2, copies=False, autocast=False, backward=(4, 0))  # TRL: bf16 adapter on NF4
LORA_GPU = Numerics(adapter=4, lora_input=2, copies=True, autocast=True, backward=(6, 8))
LORA_CPU = Numerics(adapter=4, lora_input=4, copies=True, autocast=False, backward=(4, 10))


@dataclass(frozen=True)
class Memory:
    """Peak memory of a fit, bytes.

    Attributes:
        weights: the frozen base.
        adapter, gradients, optimizer: of the trained parameters.
        activations: what the forward pass keeps for the backward pass.
        working: what comes and goes at the worst moment: a layer's backward pass (with checkpointing, its recomputed
            activations too) or the logits with their gradients, whichever is more; and a dequantized matrix.
        outside: CUDA context and fragmentation, which torch's own count does not see.
        offloaded: what waits in main memory, page-locked; not on the card.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    outside: int
    offloaded: int = 0

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` should read."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.working

    @property
    def total(self) -> int:
        """What the card needs free."""
        return self.allocated + self.outside


@dataclass(frozen=True)
class Plan:
    """How to fit a base on a card.

    Attributes:
        four_bit: NF4 base.
        checkpointing: activations are computed again in the backward pass.
        offload: what they are computed from waits in main memory.
        micro_batch: samples a forward pass.
        memory: the prediction.
        card: bytes of the card.
    """

    four_bit: bool
    checkpointing: bool
    offload: bool
    micro_batch: int
    memory: Memory
    card: int


# --- the terms ------------------------------------------------------------------------------------------------


def linear_shapes(base: Profile) -> list[tuple[int, int]]:
    """``(out, in)`` of the seven linear layers of a decoder layer: q, k, v, o, gate, up, down."""
    h, f, q, kv = base.hidden, base.ffn, base.heads * base.head_dim, base.kv_heads * base.head_dim
    return [(q, h), (kv, h), (kv, h), (h, q), (f, h), (f, h), (h, f)]


def nf4_bytes(count: int) -> int:
    """An NF4 matrix of ``count`` weights with double quantization.

    4 bits a weight; of each block of 64 its largest magnitude in 8 bits; of each 256 such magnitudes one float32; a
    float32 offset and the 16 float32 values of the code (Dettmers et al. 2023, arXiv:2305.14314, §3, in the block
    sizes of bitsandbytes). In sum 4.127 bits a weight.
    """
    blocks = math.ceil(count / 64)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 + 64


def weight_bytes(base: Profile, *, four_bit: bool) -> int:
    """The base's weights: bf16 (2 bytes each); in 4 bits the decoder layers' matrices are NF4.

    Embeddings, output layer, norms and biases stay bf16.
    """
    shapes = linear_shapes(base)
    linear = base.layers * sum(o * i for o, i in shapes)
    rest = 2 * (base.parameters - linear)
    return rest + (base.layers * sum(nf4_bytes(o * i) for o, i in shapes) if four_bit else 2 * linear)


def adapter_bytes(base: Profile, rank: int, *, four_bit: bool) -> tuple[int, int, int]:
    """Adapter, gradients and AdamW states: ``r · (in + out)`` parameters for each linear layer.

    bf16 on an NF4 base (as TRL's trainer casts it), else float32. States: two float32 a parameter; paged 8-bit AdamW
    on an NF4 base: two bytes a parameter and a float32 for each block of 256 of each state, with matrices of fewer than
    4,096 elements in float32. Its pages may leave the card when it is full; they are counted as if they stayed.
    """
    tensors = [n for o, i in linear_shapes(base) for n in (rank * i, rank * o)] * base.layers
    count = sum(tensors)
    if not four_bit:
        return 4 * count, 4 * count, 8 * count
    states = sum(2 * n + 8 * math.ceil(n / 256) if n >= 4096 else 8 * n for n in tensors)
    return 2 * count, 2 * count, states


def layer_bytes(base: Profile, rank: int, micro_batch: int, sequence: int, numerics: Numerics) -> int:
    """What one decoder layer saves for its backward pass, with fused attention (torch's SDPA).

    A token: both norms in float32 ``2 · (4H + 4)``; q, k, v after the rotary embedding, k and v repeated to all query
    heads, and the attention's output ``4 · 2Q``, its log-sum-exp ``4`` a head; gate, SiLU and up ``3 · 2F``; the inputs
    of the LoRA layers (one for q, k and v and one for gate and up where they share them, else five) and ``r`` of each of
    seven. A frozen linear layer saves nothing but its weight. Qwen 3 also has its norms of q and k. A sample: the padding
    mask as bf16 ``2 · S²``.
    """
    h, f, q, kv = base.hidden, base.ffn, base.heads * base.head_dim, base.kv_heads * base.head_dim
    token = 2 * (4 * h + 4) + 4 * 2 * q + 4 * base.heads + 3 * 2 * f
    if base.qk_norm:
        token += 4 * (q + kv) + 4 * (base.heads + base.kv_heads)
    shared = 2 * h + f  # without copies, o reads what the attention saved
    token += numerics.lora_input * ((5 * h + q + f if numerics.copies else shared) + 7 * rank)
    return micro_batch * sequence * token + 2 * micro_batch * sequence**2


def activation_bytes(
    base: Profile, rank: int, micro_batch: int, sequence: int, numerics: Numerics, *, checkpointing: bool
) -> int:
    """What the body's forward pass saves.

    Every layer's own (:func:`layer_bytes`), or with checkpointing each layer's input ``2H`` a token; with it the final
    norm ``4H + 4`` a token, which takes the place of the first layer's norm: embeddings are frozen, so that one saves nothing.
    """
    tokens = micro_batch * sequence
    if checkpointing:
        return tokens * (base.layers * 2 * base.hidden + 4 * base.hidden + 4)
    copies = adapter_bytes(base, rank, four_bit=False)[0] // 2 if numerics.autocast else 0
    return base.layers * layer_bytes(base, rank, micro_batch, sequence, numerics) + copies


def working_bytes(
    base: Profile, rank: int, micro_batch: int, sequence: int, numerics: Numerics, *, checkpointing: bool, four_bit: bool,
    learned: int,
) -> int:
    """What comes and goes at the worst moment.

    The logits: 12 bytes each (float32 log-probabilities, their gradient, the logits' gradient) of at most
    ``LOGITS_AT_A_TIME``; with them the hidden states at the learnt positions, their gradients and the body's ``2H`` each.
    Or a layer's backward pass: ``T · (f · F + h · H)``, at least the final norm's ``22H``, with the layer's own
    activations where they were not kept. An NF4 matrix is bf16 while it is used: the largest ``2 · H · F``.
    """
    h, tokens = base.hidden, micro_batch * sequence
    positions = min(micro_batch * learned, max(1, LOGITS_AT_A_TIME // base.vocab_size))
    logits = 12 * positions * base.vocab_size + 2 * h * (2 * tokens + 2 * micro_batch * learned)
    f_share, h_share = numerics.backward
    backward = tokens * (f_share * base.ffn + h_share * h)
    if checkpointing:
        backward += layer_bytes(base, rank, micro_batch, sequence, numerics) + 2 * h * tokens
        if numerics.autocast:
            backward += adapter_bytes(base, rank, four_bit=False)[0] // 2 // base.layers
    buffer = 2 * max(o * i for o, i in linear_shapes(base)) if four_bit else 0
    return max(logits, max(backward, 22 * h * tokens) + buffer)


def predict(
    base: Profile, *, sequence: int, rank: int, micro_batch: int, four_bit: bool, checkpointing: bool, offload: bool = False,
    learned: int | None = None,
) -> Memory:
    """Peak memory of a fit on a GPU; the matrices that DoRA makes besides are not in it.

    Args:
        base: profile of the base.
        sequence: tokens of the longest sample.
        rank: of the adapter.
        micro_batch: samples a forward pass.
        four_bit: NF4 base, bf16 adapter, paged 8-bit AdamW; else a bf16 base, float32 adapter and AdamW.
        checkpointing: activations are computed again in the backward pass.
        offload: with checkpointing, all that the forward pass keeps waits in main memory, one layer's input at a time
            comes back, ``2H`` a token. What the final norm keeps is copied for each of its two uses, ``4H + 4``.
        learned: completion tokens of a sample; none: all of them, the worst case.
    """
    _check(base)
    if offload and not checkpointing:
        raise ValueError("offload without checkpointing is not what a fit does")
    numerics = QLORA if four_bit else LORA_GPU
    weights = weight_bytes(base, four_bit=four_bit)
    adapter, gradients, optimizer = adapter_bytes(base, rank, four_bit=four_bit)
    activations = activation_bytes(base, rank, micro_batch, sequence, numerics, checkpointing=checkpointing)
    working = working_bytes(
        base, rank, micro_batch, sequence, numerics, checkpointing=checkpointing, four_bit=four_bit,
        learned=sequence if learned is None else min(learned, sequence),
    )
    offloaded, tokens = 0, micro_batch * sequence
    if offload:
        offloaded, activations = activations + tokens * (4 * base.hidden + 4), tokens * 2 * base.hidden
    outside = CUDA_CONTEXT + int(FRAGMENTATION * (activations + working))
    return Memory(weights, adapter, gradients, optimizer, activations, working, outside, offloaded)


# --- the plan -------------------------------------------------------------------------------------------------


def plan(
    base: Profile, card: int, *, sequence: int, rank: int = 16, batch_size: int = 16, four_bit: bool | None = None,
    learned: int | None = None, others: Mapping[str, int] | None = None,
) -> Plan:
    """Choose micro-batch, checkpointing and offload for a card.

    Without checkpointing where a pass can still hold ``TOKENS_THAT_FILL_A_GPU`` tokens (or the whole batch), else with
    it; with offload where one sample a pass fits in no other way, for each layer then waits for the bus. Of each, the
    largest micro-batch that fits.

    Args:
        base: profile of the base.
        card: bytes of the card that are free for the fit.
        sequence: tokens of the longest sample.
        rank: of the adapter.
        batch_size: samples an optimizer step; micro-batches are its divisors.
        four_bit: NF4; none: as a fit does, from 4 GB of bf16 weights.
        learned: completion tokens of a sample; none: all.
        others: name to parameters of other bases, to name those that would fit.

    Raises:
        UserError: nothing fits (the hint says what would), the sequence is longer than the base's context, or the
            architecture is not one that the formulas know.
    """
    _check(base)
    for name, value in (("sequence", sequence), ("rank", rank), ("batch_size", batch_size), ("card", card)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if base.context and sequence > base.context:
        raise UserError(f"a sequence of {sequence:,} tokens is longer than the base's context of {base.context:,}")
    if four_bit is None:
        four_bit = 2 * base.parameters > FOUR_BIT_FROM

    def memory(micro_batch: int, checkpointing: bool, offload: bool) -> Memory:
        return predict(base, sequence=sequence, rank=rank, micro_batch=micro_batch, four_bit=four_bit,
                       checkpointing=checkpointing, offload=offload, learned=learned)

    sizes = [m for m in range(batch_size, 0, -1) if batch_size % m == 0]
    for checkpointing, offload in ((False, False), (True, False), (True, True)):
        for micro_batch in sizes:
            enough = checkpointing or micro_batch * sequence >= TOKENS_THAT_FILL_A_GPU or micro_batch == batch_size
            needed = memory(micro_batch, checkpointing, offload)
            if enough and needed.total <= card:
                return Plan(four_bit, checkpointing, offload, micro_batch, needed, card)
    least = memory(1, True, True)
    raise UserError(
        f"the fit needs {least.total / GIB:.2f} GiB at micro-batch 1 with checkpointing and offload, the card has {card / GIB:.2f} GiB",
        hint=f"What would fit: {'; '.join(_remedies(base, card, sequence, rank, four_bit, learned, others or {}))}.",
    )


def _remedies(
    base: Profile, card: int, sequence: int, rank: int, four_bit: bool, learned: int | None, others: Mapping[str, int]
) -> list[str]:
    """What would fit, one change at a time; both NF4 and a shorter sequence where neither alone is enough."""

    def fits(shape: Profile = base, **changes) -> bool:
        wanted = {"sequence": sequence, "rank": rank, "four_bit": four_bit, "learned": learned, **changes}
        return predict(shape, micro_batch=1, checkpointing=True, offload=True, **wanted).total <= card

    found = []
    if not four_bit and fits(four_bit=True):
        found.append("an NF4 base (four_bit)")
    if smaller := _largest(rank - 1, lambda r: fits(rank=r)):
        found.append(f"rank {smaller}")
    shorter = _largest(sequence // 64, lambda s: fits(sequence=64 * s))
    if shorter:
        found.append(f"sequences of {64 * shorter:,} tokens")
    if not found and not four_bit and (shorter := _largest(sequence // 64, lambda s: fits(sequence=64 * s, four_bit=True))):
        found.append(f"an NF4 base (four_bit) with sequences of {64 * shorter:,} tokens")
    per_layer = sum(o * i for o, i in linear_shapes(base))

    def thinner(layers: int) -> Profile:
        return replace(base, layers=layers, parameters=base.parameters - (base.layers - layers) * per_layer)

    if layers := _largest(base.layers - 1, lambda n: fits(thinner(n), four_bit=True)):
        most = thinner(layers).parameters
        names = [name for name, count in sorted(others.items(), key=lambda o: -o[1]) if count <= most][:3]
        named = f" ({', '.join(names)})" if names else ""
        found.append(f"a smaller base, of about {most / 1e9:.1f}B parameters in NF4{named}")
    need = predict(base, sequence=sequence, rank=rank, four_bit=four_bit, learned=learned, micro_batch=1, checkpointing=True, offload=True).total
    found.append(f"a card of {math.ceil(need / GIB)} GB")
    return found


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``most`` that fits (0: none), where all below a number that fits fit too."""
    low, high = 0, max(0, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _check(base: Profile) -> None:
    if base.model_type not in FAMILIES or base.moe or not base.parameters:
        raise UserError(
            f"the memory of a {base.model_type}{' mixture of experts' if base.moe else ''} is not known here",
            hint=f"The formulas are those of dense {', '.join(FAMILIES)} models.",
        )


def card_bytes(text: str) -> int:
    """``8GB``, ``23.6GiB``, ``7800MiB`` or ``24`` in bytes; a card's GB are GiB.

    Raises:
        UserError: not such a size.
    """
    number = text.strip().lower()
    unit = next((u for u in ("gib", "mib", "gb", "mb", "g", "m") if number.endswith(u)), "")
    try:
        size = float(number.removesuffix(unit)) * (2**20 if unit.startswith("m") else GIB)
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size > 0):
        raise UserError(f"{text!r} is not the size of a card", hint="Write it as 8GB or 7800MiB.")
    return int(size)

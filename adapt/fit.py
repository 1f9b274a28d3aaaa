"""One LoRA fit: TRL's trainer, PEFT's adapter, the loss at the completion's positions only."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tsugiki.adapt.loss import batch_loss
from tsugiki.adapt.nll import completion_nll
from tsugiki.adapt.plan import FOUR_BIT_FROM
from tsugiki.adapt.processes import WholeBatches, agreed, process_count, shard
from tsugiki.artifacts import read_json, write_json
from tsugiki.chat import special_ids
from tsugiki.errors import UserError, raise_problems
from tsugiki.machine import peak_rss
from tsugiki.pool import tell_progress
from tsugiki.progress import console
from tsugiki.samples import EncodedSample

# Padded tokens in one pass through the model, on the CPU and on a GPU: few stay in the caches, many fill a GPU.
TOKENS_PER_PASS = {False: 1024, True: 65_536}
LOG_EVERY = 5  # optimizer steps; checkpoints fall on logged steps, so that a resumed fit logs the same losses


@dataclass(frozen=True)
class FitSettings:
    """How one adapter is trained. The defaults suit the bundled tiny bases; 8B bases want a smaller rate and rank."""

    rank: int = field(default=32, metadata={"help": "LoRA rank"})
    alpha: int = field(default=64, metadata={"help": "LoRA alpha; the update is scaled by alpha / rank"})
    dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    learning_rate: float = field(default=3e-3, metadata={"help": "peak learning rate of AdamW"})
    epochs: int = field(default=4, metadata={"help": "passes over the samples"})
    batch_size: int = field(default=32, metadata={"help": "samples an optimizer step"})
    micro_batch: int = field(default=32, metadata={"help": "samples a forward pass"})
    warmup: float = field(default=0.05, metadata={"help": "share of the steps with a rising rate"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay of the adapter"})
    four_bit: bool | None = field(default=None, metadata={"help": "NF4 base (QLoRA); none: on a GPU, from 2B parameters"})
    checkpointing: bool | None = field(default=None, metadata={"help": "compute activations again in the backward pass, which saves memory; none: on an NF4 base"})
    rslora: bool = field(default=False, metadata={"help": "scale the update by alpha / root of rank (rsLoRA)"})
    dora: bool = field(default=False, metadata={"help": "learn each row's magnitude apart (DoRA); slower"})
    max_steps: int = field(default=0, metadata={"help": "optimizer steps, in place of epochs; 0: as many as the epochs have"})
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "minutes between checkpoints, from which a killed fit goes on; 0: none"})
    processes: int = field(default=0, metadata={"help": "processes that train one point, on a GPU each where there are GPUs; 0: one, or as many as `accelerate launch` says"})
    fsdp: bool | None = field(default=None, metadata={"help": "divide the base among the processes (FSDP, with an NF4 base FSDP-QLoRA); none: as `accelerate launch` says, else not"})
    packing: bool | None = field(default=None, metadata={"help": "samples one after the other in place of padding, none of which sees another; none: where flash attention is"})
    offload: bool = field(default=False, metadata={"help": "keep the checkpointed activations in main memory; needs a GPU and checkpointing"})
    liger: bool = field(default=False, metadata={"help": "Liger's fused loss in place of our own, where liger-kernel is installed; needs a GPU"})
    report_to: str = field(default="auto", metadata={"help": "where curves are logged: tensorboard or wandb, none; auto: TensorBoard where it is installed"})

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be {rule}, not {getattr(self, name)!r}"
            for name, ok, rule in (
                ("rank", self.rank >= 1, "at least 1"),
                ("alpha", self.alpha > 0, "above 0"),
                ("dropout", 0 <= self.dropout < 1, "from 0 to below 1"),
                ("learning_rate", 0 < self.learning_rate < 1, "between 0 and 1"),
                ("epochs", self.epochs >= 1, "at least 1"),
                ("batch_size", self.batch_size >= 1, "at least 1"),
                ("micro_batch", 1 <= self.micro_batch <= self.batch_size and self.batch_size % self.micro_batch == 0,
                 f"a divisor of batch_size ({self.batch_size})"),
                ("warmup", 0 <= self.warmup < 1, "from 0 to below 1"),
                ("max_steps", self.max_steps >= 0, "at least 0"),
                ("checkpoint_minutes", self.checkpoint_minutes >= 0, "at least 0"),
                ("processes", self.processes >= 0 and self.batch_size % (self.processes or 1) == 0,
                 f"a divisor of batch_size ({self.batch_size}), or 0"),
                ("fsdp", not (self.fsdp and self.processes == 1), "left out where one process trains"),
                ("offload", not (self.offload and (self.fsdp or self.checkpointing is False)), "left out with fsdp or without checkpointing"),
            )
            if not ok
        ]
        if wrong:
            raise UserError("; ".join(wrong))


@dataclass(frozen=True)
class Probe:
    """Samples that a fit is measured on while it trains, so that a fit that cannot win is ended.

    Attributes:
        samples: not those trained on, and not the test samples: a choice made by them would leak.
        times: readings, after equal numbers of steps; the last falls on the last step.
        go_on: called as ``go_on(step, steps, nll)`` with the NLL in nats/token at training precision; ``False`` ends the fit.
        on_nats: called before it with the summed nats of each sample, ``(S,)`` float64.
    """

    samples: Sequence[EncodedSample]
    times: int
    go_on: Callable[[int, int, float], bool]
    on_nats: Callable[[np.ndarray], None] | None = None


@dataclass(frozen=True)
class FitReport:
    """What a fit cost.

    Attributes:
        train_tokens: tokens passed through the model, all epochs, padding not counted.
        steps: optimizer steps.
        seconds: wall time of the training loop; of a fit that was resumed, since then.
        peak_rss: bytes of resident memory, the process's highest so far.
        losses: nats/token of the completion, the mean of every five steps.
        micro_batch: samples a forward pass at the end: fewer than set where memory ran out.
        resumed_at: the step of the checkpoint that the fit went on from; 0: it began anew.
        readings: ``(step, nats/token)`` of the probe; of a fit that was resumed, since then.
        stopped: the probe ended the fit before its last step.
        gpu_peak: bytes of this process's GPU that were allocated at most, 0 without one.
    """

    train_tokens: int
    steps: int
    seconds: float
    peak_rss: int
    losses: list[float]
    micro_batch: int
    resumed_at: int
    readings: list[tuple[int, float]]
    stopped: bool
    gpu_peak: int


class OutOfMemory(UserError):
    """Memory ran out where a fit could not make its passes smaller by itself."""


def quiet() -> None:
    """Keep the libraries' notes and bars off the terminal, in a process that trains."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def device_name() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def flash_attention() -> bool:
    """Whether transformers can use flash-attention 2 here."""
    from transformers.utils import is_flash_attn_2_available

    return device_name() == "cuda" and is_flash_attn_2_available()


def load_base(base_dir: Path, *, four_bit: bool | None = None, exact: bool = False, spread: bool = False):
    """Load a base for training or scoring.

    Args:
        base_dir: folder with config and safetensors.
        four_bit: NF4 with double quantization through bitsandbytes (GPU only); none decides by size and device.
        exact: float32 on the CPU, for the exact NLL; else bf16.
        spread: its layers on all GPUs, one after the other, for a base that one GPU does not hold.

    Raises:
        UserError: NF4 without a GPU or without bitsandbytes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    device = device_name()
    config = AutoConfig.from_pretrained(base_dir)
    if four_bit is None:
        size = sum(p.stat().st_size for p in Path(base_dir).glob("*.safetensors"))
        four_bit = device == "cuda" and size > FOUR_BIT_FROM
    options: dict = {"dtype": torch.float32 if exact and device == "cpu" else torch.bfloat16}
    if four_bit:
        if device != "cuda":
            raise UserError("four_bit needs a GPU", hint="Leave it out: --set sweep.four_bit=null")
        if not importlib.util.find_spec("bitsandbytes"):
            raise UserError("an NF4 base needs bitsandbytes, which is not installed",
                            hint="pip install 'tsugiki[gpu]', or train in bf16: --set sweep.four_bit=false")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,  # the same bytes; FSDP divides no whole numbers
        )
    if device == "cuda":
        # Shard by shard to the card (of several processes each has its own), never the whole model in main memory.
        options["device_map"] = "auto" if spread else {"": int(os.environ.get("LOCAL_RANK", 0))}
    # torch's fused attention has no fast bf16 backward on the CPU: it took 44 % of a step on a tiny base.
    options["attn_implementation"] = (
        "flash_attention_2" if flash_attention() else "sdpa" if device == "cuda" or exact else "eager"
    )
    return AutoModelForCausalLM.from_pretrained(base_dir, config=config, use_safetensors=True, **options)


def add_adapter(model, settings: FitSettings, seed: int):
    """Put a fresh LoRA adapter on all linear layers but the output layer; its parameters are float32.

    On an NF4 base TRL's trainer makes them bf16. The base's embeddings, norms and output layer stay bf16: PEFT's
    ``prepare_model_for_kbit_training`` would make them float32, which costs Llama-3-8B 2 GiB more.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
            target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=settings.rslora, use_dora=settings.dora,
        ),
    )


def check_trainable(samples: Sequence[EncodedSample], context: int | None, special: set[int]) -> None:
    """Refuse samples that cannot be learnt from, all at once.

    Args:
        samples: encoded training samples.
        context: the base's longest sequence in tokens, or none.
        special: ids of the tokenizer's special tokens.

    Raises:
        UserError: no sample; or samples of which nothing is learnt, whose answer is empty after templating, that have no
            prompt, or that are longer than the context.
    """
    if not samples:
        raise UserError("there is no sample to train on")
    problems = []
    for s in samples:
        if not s.completion_ids:
            problems.append(f"sample {s.id} has no completion token: every token is masked, nothing would be learnt")
        elif not s.prompt_ids:
            problems.append(f"sample {s.id} has no prompt token, from which its first answer token is predicted")
        elif not s.completion.strip() and special.issuperset(s.completion_ids):
            problems.append(f"sample {s.id} has an empty answer: after templating only its end-of-turn token is left")
        if context and len(s.ids) > context:
            problems.append(f"sample {s.id} has {len(s.ids):,} tokens, the base's context is {context:,}")
    raise_problems(problems, what="training samples", hint="Correct or remove them; a domain's max_tokens drops long ones.")


def log_targets(report_to: str) -> list[str]:
    """The names that TRL's ``report_to`` takes, for a setting of :class:`FitSettings`.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """
    installed = any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))
    if report_to == "auto":
        return ["tensorboard"] if installed else []
    if report_to == "tensorboard" and not installed:
        raise UserError("report_to is tensorboard, which is not installed", hint="pip install tensorboard, or report_to=none")
    return [] if report_to == "none" else [name.strip() for name in report_to.split(",")]


def fit(
    base_dir: Path,
    tokenizer,
    samples: Sequence[EncodedSample],
    settings: FitSettings,
    work: Path,
    *,
    seed: int = 0,
    progress_file: Path | None = None,
    logs: Path | None = None,
    probe: Probe | None = None,
):
    """Train one adapter on ``samples``.

    Of several processes (:mod:`tsugiki.adapt.launch`) each calls this; an optimizer step still takes ``batch_size``
    samples in all. Where memory runs out, the same batch goes on in smaller passes; where a checkpoint of the same fit is
    in ``work``, the fit goes on from there, to the same losses. A base that is divided (FSDP) writes no checkpoints.

    Args:
        base_dir: folder of the base.
        tokenizer: the base's tokenizer.
        samples: encoded training samples.
        settings: how to train.
        work: folder for checkpoints; it must belong to this base, these samples, settings and seed alone.
        seed: of the adapter's start and of the order of the samples.
        progress_file: where to say how far the fit is (:func:`tsugiki.pool.tell_progress`).
        logs: folder for TensorBoard's files; none: below ``work``.
        probe: what to measure on the way, and whether to go on.

    Returns:
        ``(model, FitReport)``: the PEFT model in training precision; its parameters are divided where FSDP was asked for
        (:func:`tsugiki.adapt.processes.adapter_state` has the adapter whole).

    Raises:
        UserError: samples that cannot be learnt from (:func:`check_trainable`), a loss that is not finite, a batch that
            the processes cannot share, or a setting for which something is not installed.
        OutOfMemory: for one sample a pass, in the optimizer's step, or in one of several processes.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    gpu = device_name() == "cuda"
    processes = process_count()
    micro_batch = share_of_batch(settings, processes)  # as it is now: memory may run out
    _check_device(settings, gpu)
    fsdp = bool(settings.fsdp) and processes > 1
    targets = log_targets(settings.report_to)
    model = load_base(base_dir, four_bit=settings.four_bit)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_trainable(samples, context, special_ids(tokenizer))
    packed = model.config._attn_implementation.startswith("flash") if settings.packing is None else settings.packing
    model = add_adapter(model, settings, seed)
    four_bit = bool(getattr(model, "is_loaded_in_4bit", False))
    checkpointing = (four_bit or settings.offload) if settings.checkpointing is None else settings.checkpointing
    readings: list[tuple[int, float]] = []

    def forward(self, input_ids, attention_mask, labels):
        return batch_loss(self, input_ids, attention_mask, labels, tokens_per_pass=TOKENS_PER_PASS[gpu], packed=packed,
                          offload=settings.offload, liger=settings.liger)

    class CompletionTrainer(SFTTrainer):
        """TRL's trainer with the output layer at the completion's positions only, that survives running out of memory."""

        step, batches = -1, ()  # the optimizer step under way, and the batches it has had

        def _get_train_sampler(self, train_dataset=None):
            if len(self.train_dataset) == len(samples):
                return super()._get_train_sampler(train_dataset)
            return WholeBatches(len(samples), math.ceil(len(samples) / shared) * shared, seed)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            # Through the model as it is wrapped (DDP, FSDP, autocast), so that gradients synchronise.
            loss = model(**{k: inputs[k] for k in ("input_ids", "attention_mask", "labels")}) / num_items_in_batch
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of the processes' gradients
            return (loss, None) if return_outputs else loss

        def training_step(self, model, inputs, num_items_in_batch=None):
            nonlocal micro_batch
            if self.step != self.state.global_step:
                self.step, self.batches = self.state.global_step, []
            self.batches.append(inputs)
            again = [inputs]
            while True:
                try:
                    return [self._in_passes(model, batch, num_items_in_batch) for batch in again][-1]
                except torch.OutOfMemoryError as error:
                    if micro_batch == 1 or processes > 1:
                        raise OutOfMemory(
                            f"out of memory with {micro_batch} sample(s) a forward pass", hint="Take gradient checkpointing, shorter"
                            " samples, a smaller rank or micro_batch; `tsugiki adapt plan` says what fits.",
                        ) from error
                micro_batch = (micro_batch + 1) // 2
                console.print(f"  [yellow]out of memory: going on with {micro_batch} samples a pass, {settings.batch_size} a step as before[/]")
                # The failed pass may have left a part of its gradients: the step begins anew.
                model.zero_grad()  # the optimizer's own does nothing within a step
                again = self.batches
                if gpu:
                    torch.cuda.empty_cache()

        def _in_passes(self, model, inputs, num_items_in_batch):
            """Loss of one batch of the trainer's, in passes of ``micro_batch`` samples."""
            rows = len(inputs["input_ids"])
            passes = [{k: v[i : i + micro_batch] for k, v in inputs.items()} for i in range(0, rows, micro_batch)]
            return sum(super(CompletionTrainer, self).training_step(model, p, num_items_in_batch) for p in passes)

        def create_model_card(self, *args, **kwargs):
            """A checkpoint needs none."""

    class Watch(TrainerCallback):
        """Writes progress where the parent process reads it, stops on a loss that is not finite, asks for checkpoints."""

        saved = time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            if probe and state.global_step in probe_steps(state.max_steps, probe.times):
                model.eval()
                read = completion_nll(model, probe.samples)
                model.train()
                readings.append((state.global_step, nll := read.per_token))
                if probe.on_nats:
                    probe.on_nats(read.nats)
                if not agreed(probe.go_on(state.global_step, state.max_steps, nll)):
                    control.should_training_stop = True
            # A logged step: the losses in between are in no file.
            if not settings.checkpoint_minutes or fsdp or state.global_step % LOG_EVERY or state.global_step >= state.max_steps:
                return
            due = agreed((time.monotonic() - self.saved) / 60 >= settings.checkpoint_minutes)
            # Weights that are not finite are no state to go on from.
            if due and all(bool(p.isfinite().all()) for p in trained):
                control.should_save = True

        def on_save(self, args, state, control, **kwargs):
            self.saved = time.monotonic()
            if state.is_world_process_zero:  # written last: what it names is whole
                write_json(work / "last.json", {"checkpoint": f"checkpoint-{state.global_step}"})

        def on_log(self, args, state, control, logs=None, **kwargs):
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {state.global_step}", hint="Lower learning_rate.")
            if state.is_world_process_zero:
                tell_progress(progress_file, state.global_step, state.max_steps, f"loss {loss:.3f}")

    shared = micro_batch * processes  # samples that the processes take at a time
    blank = processes > 1 and len(samples) % shared > 0
    data = Dataset.from_dict(
        {
            "input_ids": [s.ids for s in samples] + [[0]] * blank,
            "labels": [[-100] * len(s.prompt_ids) + s.completion_ids for s in samples] + [[-100]] * blank,
        }
    )
    if "tensorboard" in targets:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs or work / "logs")
    arguments = SFTConfig(
        output_dir=str(work), num_train_epochs=settings.epochs, max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.batch_size // shared,
        lr_scheduler_type="cosine", warmup_steps=settings.warmup, weight_decay=settings.weight_decay,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        bf16=gpu, gradient_checkpointing=checkpointing,
        optim="paged_adamw_8bit" if four_bit and not fsdp else "adamw_torch_fused",
        logging_steps=LOG_EVERY, logging_nan_inf_filter=False, save_strategy="no", save_total_limit=2,
        report_to=targets or "none", disable_tqdm=True,
        ddp_find_unused_parameters=False, seed=seed, data_seed=seed, use_cpu=not gpu, dataloader_pin_memory=gpu, log_level="error",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one card: DataParallel would copy the base to each
    # Tells the trainer not to wrap the model: it divides only on a GPU, and this is tested without one.
    model.is_distributed_loading_by_transformers = fsdp
    trainer = CompletionTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
    )
    trainer.remove_callback(PrinterCallback)
    if fsdp:  # the trainer has cast the adapter by now
        shard(model, device_name())
    trained = [p for p in model.parameters() if p.requires_grad]
    model.forward = types.MethodType(forward, model)
    began = time.monotonic()
    try:
        checkpoint = last_checkpoint(work)
        mean = trainer.train(resume_from_checkpoint=checkpoint).training_loss
    except torch.OutOfMemoryError as error:  # in the optimizer's step
        raise OutOfMemory("out of memory in the optimizer's step", hint="`tsugiki adapt plan` says what fits.") from error
    finally:
        for name in ("forward", "_original_forward"):  # ours, and accelerate's around it
            model.__dict__.pop(name, None)
    if not math.isfinite(mean):  # between two logged steps, or in a fit of fewer steps than that
        raise UserError(f"the mean training loss is {mean}", hint="Lower learning_rate, or look for broken weights in the base.")
    report = FitReport(
        train_tokens=_tokens_seen(samples, settings, trainer.state.global_step),
        steps=trainer.state.global_step,
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        losses=[float(row["loss"]) for row in trainer.state.log_history if "loss" in row],
        micro_batch=micro_batch,
        resumed_at=int(checkpoint.rpartition("-")[2]) if checkpoint else 0,
        readings=readings,
        stopped=trainer.state.global_step < trainer.state.max_steps,
        gpu_peak=torch.cuda.max_memory_allocated() if gpu else 0,
    )
    model.eval()
    return model, report


def share_of_batch(settings: FitSettings, processes: int) -> int:
    """Samples a forward pass in each of several processes: at most ``micro_batch``, and a divisor of each one's share.

    Raises:
        UserError: the batch cannot be divided among the processes.
    """
    if settings.batch_size % processes:
        raise UserError(f"{processes} processes cannot share a batch of {settings.batch_size} samples",
                        hint=f"Set batch_size to a multiple of {processes}.")
    share = settings.batch_size // processes
    return next(size for size in range(min(settings.micro_batch, share), 0, -1) if share % size == 0)


def _check_device(settings: FitSettings, gpu: bool) -> None:
    """Refuse what needs a GPU where there is none, or a library that is not there."""
    problems = [f"{name} needs a GPU" for name in ("offload", "liger") if getattr(settings, name) and not gpu]
    if settings.liger and not importlib.util.find_spec("liger_kernel"):
        problems.append("liger needs liger-kernel, which is not installed (pip install liger-kernel)")
    raise_problems(problems, what="settings that cannot be used here", hint="Leave them out.")


def probe_steps(steps: int, times: int) -> set[int]:
    """The steps of a fit after which its probe is read: ``times`` of them, or every step where there are fewer."""
    return {math.ceil(steps * i / times) for i in range(1, times + 1)}


def last_checkpoint(work: Path) -> str | None:
    """The last whole checkpoint in a fit's folder, or none."""
    try:
        folder = work / read_json(work / "last.json")["checkpoint"]
    except (OSError, ValueError, KeyError):
        return None
    return str(folder) if folder.is_dir() else None


def _tokens_seen(samples: Sequence[EncodedSample], settings: FitSettings, steps: int) -> int:
    """Tokens of the passes over the samples; of a part of a pass its share (batches are random draws)."""
    passes = steps / math.ceil(len(samples) / settings.batch_size)
    return round(sum(len(s.ids) for s in samples) * passes)

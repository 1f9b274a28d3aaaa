"""One LoRA fit: TRL's trainer, PEFT's adapter, the loss at the completion's positions only."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tsugiki.adapt.nll import batches_by_length, model_parts
from tsugiki.errors import UserError
from tsugiki.machine import peak_rss
from tsugiki.samples import EncodedSample

# Padded tokens in one pass through the model, on the CPU and on a GPU: few stay in the caches, many fill a GPU.
TOKENS_PER_PASS = {False: 1024, True: 65_536}


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
            )
            if not ok
        ]
        if wrong:
            raise UserError("; ".join(wrong))


@dataclass(frozen=True)
class FitReport:
    """What a fit cost.

    Attributes:
        train_tokens: tokens passed through the model, all epochs, padding not counted.
        steps: optimizer steps.
        seconds: wall time of the training loop.
        peak_rss: bytes of resident memory, the process's highest so far.
        losses: nats/token of the completion at each logged step.
    """

    train_tokens: int
    steps: int
    seconds: float
    peak_rss: int
    losses: list[float]


def device_name() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_base(base_dir: Path, *, four_bit: bool | None = None, exact: bool = False):
    """Load a base for training or scoring.

    Args:
        base_dir: folder with config and safetensors.
        four_bit: NF4 with double quantization through bitsandbytes (GPU only); none decides by size and device.
        exact: float32 on the CPU, for the exact NLL; else bf16.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    device = device_name()
    config = AutoConfig.from_pretrained(base_dir)
    if four_bit is None:
        size = sum(p.stat().st_size for p in Path(base_dir).glob("*.safetensors"))
        four_bit = device == "cuda" and size > 4e9
    options: dict = {"dtype": torch.float32 if exact and device == "cpu" else torch.bfloat16}
    if four_bit:
        if device != "cuda":
            raise UserError("four_bit needs a GPU", hint="Leave it out: --set sweep.four_bit=null")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if device == "cuda":
        options["device_map"] = {"": 0}  # shard by shard to the card, never the whole model in main memory
    # torch's fused attention has no fast bf16 backward on the CPU: it took 44 % of a step on a tiny base.
    options["attn_implementation"] = "sdpa" if device == "cuda" or exact else "eager"
    return AutoModelForCausalLM.from_pretrained(base_dir, config=config, use_safetensors=True, **options)


def add_adapter(model, settings: FitSettings, seed: int):
    """Put a fresh LoRA adapter on all linear layers but the output layer; its parameters are float32."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(seed)
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model)
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
            target_modules="all-linear", task_type="CAUSAL_LM",
        ),
    )


def fit(
    base_dir: Path,
    tokenizer,
    samples: Sequence[EncodedSample],
    settings: FitSettings,
    work: Path,
    *,
    seed: int = 0,
    progress_file: Path | None = None,
):
    """Train one adapter on ``samples``.

    Args:
        base_dir: folder of the base.
        tokenizer: the base's tokenizer.
        samples: encoded training samples.
        settings: how to train.
        work: folder for the trainer's own files.
        seed: of the adapter's start and of the order of the samples.
        progress_file: where to write ``{"step", "steps", "loss"}`` while training.

    Returns:
        ``(model, FitReport)``: the PEFT model in training precision.

    Raises:
        UserError: no sample, or the loss is not finite.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if not samples:
        raise UserError("there is no sample to train on")

    class CompletionTrainer(SFTTrainer):
        """TRL's trainer with the output layer applied at the completion's positions only."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            body, head = model_parts(self.accelerator.unwrap_model(model))
            lengths = inputs["attention_mask"].sum(1).tolist()
            losses, count = 0.0, 0
            # A batch stays a random draw, but rows of like length go through the model together: on law text, one
            # thread trained 2,806 tokens/s so and 1,049 with each batch padded to its longest row (five steps).
            for rows in batches_by_length(lengths, TOKENS_PER_PASS[gpu]):
                width = max(lengths[row] for row in rows)
                ids, mask, labels = (inputs[k][rows, :width] for k in ("input_ids", "attention_mask", "labels"))
                hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
                learned = labels[:, 1:] != -100
                losses = losses + torch.nn.functional.cross_entropy(
                    head(hidden[learned]).float(), labels[:, 1:][learned], reduction="sum"
                )
                count += learned.sum()
            loss = losses / (count if num_items_in_batch is None else num_items_in_batch)
            return (loss, None) if return_outputs else loss

    class Watch(TrainerCallback):
        """Writes progress where the parent process reads it, and stops on a loss that is not finite."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {state.global_step}", hint="Lower learning_rate.")
            losses.append(float(loss))
            if progress_file:
                progress_file.write_text(
                    json.dumps({"step": state.global_step, "steps": state.max_steps, "loss": loss}), encoding="utf-8"
                )

    losses: list[float] = []
    gpu = device_name() == "cuda"
    model = add_adapter(load_base(base_dir, four_bit=settings.four_bit), settings, seed)
    data = Dataset.from_dict(
        {
            "input_ids": [s.ids for s in samples],
            "labels": [[-100] * len(s.prompt_ids) + s.completion_ids for s in samples],
        }
    )
    arguments = SFTConfig(
        output_dir=str(work), num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=max(1, settings.batch_size // settings.micro_batch),
        lr_scheduler_type="cosine", warmup_steps=settings.warmup, weight_decay=settings.weight_decay,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        bf16=gpu, gradient_checkpointing=gpu and getattr(model, "is_loaded_in_4bit", False),
        optim="paged_adamw_8bit" if getattr(model, "is_loaded_in_4bit", False) else "adamw_torch_fused",
        logging_steps=5, logging_nan_inf_filter=False, save_strategy="no", report_to="none", disable_tqdm=True,
        seed=seed, data_seed=seed, use_cpu=not gpu, dataloader_pin_memory=gpu, log_level="error",
    )
    trainer = CompletionTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    mean = trainer.train().training_loss
    if not math.isfinite(mean):  # between two logged steps, or in a fit of fewer steps than that
        raise UserError(f"the mean training loss is {mean}", hint="Lower learning_rate, or look for broken weights in the base.")
    report = FitReport(
        train_tokens=settings.epochs * sum(len(s.ids) for s in samples),
        steps=trainer.state.global_step,
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        losses=losses,
    )
    model.eval()
    return model, report

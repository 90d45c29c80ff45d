"""One fine-tuning of one model on one data set, by Hugging Face's Trainer."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ki_ds.data.sources import required
from ki_ds.data.tokenize import load_tokenizer, tokenizer_hash
from ki_ds.errors import UserError
from ki_ds.evaluation.scores import score
from ki_ds.evaluation.tasks import Example, Settings, TaskData
from ki_ds.files import write_errors_are_one_line
from ki_ds.models.presets import max_positions, model_folder, quieten, read_config, weights_sha256

RANDOM = "random initialisation"


@dataclass(frozen=True)
class Candidate:
    """A model to be fine-tuned.

    Args:
        name: as the user named it.
        folder: Hugging Face folder or hub name.
        tokenizer: folder or hub name of its tokenizer.
        architecture: hash of its configuration and of its tokenizer.
        weights: hash of its weights, or the commit on the hub; None is the baseline: random weights.
    """

    name: str
    folder: str
    tokenizer: str
    architecture: str
    weights: str | None

    @classmethod
    def find(cls, name: str, *, tokenizer: str | None = None) -> Candidate:
        """The model of a run, checkpoint, Hugging Face folder or hub name.

        Args:
            tokenizer: of a model that brings none.

        Raises:
            UserError: it is no model, it has no tokenizer, or the tokenizer has more ids than its embedding.
        """
        folder = model_folder(name)
        config = read_config(folder, what="MODEL")
        try:
            found = load_tokenizer(tokenizer or folder)
        except UserError as error:
            raise UserError(f"{name} has no usable tokenizer: {error}; or give one with --tokenizer") from None
        _check_ids(found, config, name)
        weights = weights_sha256(folder) if Path(folder).is_dir() else (getattr(config, "_commit_hash", None) or name)
        return cls(name, folder, tokenizer or folder, _architecture(config, found), weights)

    def untrained(self, name: str = RANDOM) -> Candidate:
        """The baseline with the same architecture and tokenizer."""
        return Candidate(name, self.folder, self.tokenizer, self.architecture, None)


def _architecture(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what weights are put into: the configuration, the tokenizer's ids and its ids around texts and pairs."""
    passing = {"architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache"}
    kept = {name: value for name, value in config.to_dict().items() if name not in passing}
    around = [tokenizer("").input_ids, tokenizer("", "").input_ids]
    everything = [kept, tokenizer_hash(tokenizer), around]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()


def _check_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    used = [i for i in tokenizer.get_vocab().values() if i != tokenizer.mask_token_id]  # which no text contains
    if size is not None and max(used) >= size:
        raise UserError(
            f"{name} has {size:,} embeddings, its tokenizer ids up to {max(used):,}; give its own with --tokenizer"
        )


@dataclass(frozen=True)
class Outcome:
    """What one fine-tuning gave.

    Args:
        scores: part -> metric -> score, of the epoch that was best on the validation part.
        best_epoch: counted from 1.
        num_steps: updates in all.
        seconds: of training and evaluation.
        share_cut: of all examples, that had more tokens than `max_length` or the model's positions.
        num_parameters: of the fine-tuned model.
    """

    scores: dict[str, dict[str, float]]
    best_epoch: int
    num_steps: int
    seconds: float
    share_cut: float
    num_parameters: int


def fine_tune(
    candidate: Candidate,
    data: TaskData,
    settings: Settings,
    *,
    seed: int,
    scratch: Path,
    device: str = "cpu",
    on_step: Callable[[float], None] | None = None,
) -> Outcome:
    """Fine-tune a model with a new head, and score it at its best epoch.

    Adam with betas (0.9, 0.98) and eps 1e-6, decoupled weight decay, no clipping (Liu et al., 2019), linear warm-up
    and decay (Table 8); dropout as in the model's configuration. Cross-entropy over classes, squared error of grades.

    Args:
        seed: of the head's weights (or all weights), dropout and the order of the examples.
        scratch: a folder for the best epoch's weights, which are removed afterwards.
        device: "cpu" or "cuda" (the first visible one).
        on_step: is told the share of the updates that are done.

    Raises:
        UserError: the model cannot be read or cannot classify, does not fit into memory, or the disk is full.
    """
    started = time.monotonic()
    quieten()
    warnings.filterwarnings("ignore", module=r"transformers|accelerate|torch\.optim|torch\.utils\.data")
    transformers.set_seed(seed)
    tokenizer, config = _tokenizer_and_config(candidate)
    model = _model(candidate, data, config)
    limit = min(settings.max_length, max_positions(model) or settings.max_length)
    encode = _Encoder(tokenizer, model.config, limit)
    parts = {name: encode(_sampled(examples, name, settings)) for name, examples in data.parts.items()}
    trainer = _trainer(model, tokenizer, parts, data, settings, seed=seed, scratch=scratch, device=device)
    if on_step is not None:
        trainer.add_callback(_Steps(on_step))
    try:
        with write_errors_are_one_line(scratch):
            trainer.train()
        scores = {}
        for name, part in parts.items():
            if name != "train":
                prediction: Any = trainer.predict(part)  # type: ignore[arg-type]
                scores[name] = all_scores(data, prediction.predictions, prediction.label_ids)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{settings.micro_batch_size} examples of {limit} tokens of {candidate.name} exceed the memory of the "
            "device; lower --micro_batch_size"
        ) from None
    except SafetensorError as error:
        raise UserError(f"{scratch} cannot be written ({error}); free space or give another --out") from None
    best = trainer.state.best_global_step or trainer.state.global_step
    return Outcome(
        scores=scores,
        best_epoch=math.ceil(best * settings.epochs / trainer.state.global_step),
        num_steps=trainer.state.global_step,
        seconds=time.monotonic() - started,
        share_cut=encode.num_cut / encode.num_encoded,
        num_parameters=model.num_parameters(),
    )


# --- model and tokenizer ----------------------------------------------------------------------------------------


def _tokenizer_and_config(candidate: Candidate) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Both, agreed on what pads: causal models look for a row's last token by it, RoBERTa counts positions from it."""
    tokenizer = load_tokenizer(candidate.tokenizer)
    config = read_config(candidate.folder, what="MODEL")
    counts_all = config.pad_token_id is not None and config.pad_token_id < 0  # RoBERTa's kind without padding
    if config.pad_token_id is not None and not counts_all:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    elif tokenizer.pad_token is None:  # GPT-2's kind; what is padded is masked, so that any id does
        tokenizer.pad_token = tokenizer.eos_token
    if not counts_all:
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer, config


def _model(candidate: Candidate, data: TaskData, config: PreTrainedConfig) -> PreTrainedModel:
    auto: Any = transformers.AutoModelForSequenceClassification
    config.num_labels = len(data.labels or (0,))
    config.problem_type = "regression" if data.is_graded else "single_label_classification"
    config.dtype = None
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(f"{candidate.name} ({config.model_type}) has no classifier in transformers; take another model")
    if candidate.weights is None:
        return auto.from_config(config, dtype=torch.float32)
    try:
        model, report = auto.from_pretrained(
            candidate.folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{candidate.name} cannot be read as a model ({str(error).strip().splitlines()[0][:200]}); take a whole one"
        ) from None
    body = f"{model.base_model_prefix}."
    missing = sorted(name for name in report["missing_keys"] if name.startswith(body) and "pooler" not in name)
    if missing:
        raise UserError(
            f"{candidate.name} lacks {len(missing)} weights of its body ({missing[0]}, ...); take a whole one"
        )
    return model


class _Encoder:
    """Examples as the model's inputs; counts those that are cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, limit: int):
        self.tokenizer, self.limit = tokenizer, limit
        self.num_cut = self.num_encoded = 0
        # other tables of types would be handed ids that they do not have
        self.types = getattr(config, "type_vocab_size", 0) > 1
        # a tokenizer that puts nothing between two texts has them told apart by its end of text
        self.separator = "" if tokenizer.num_special_tokens_to_add(pair=True) else tokenizer.eos_token

    def __call__(self, examples: list[Example]) -> list[dict[str, Any]]:
        """Rows with input_ids, attention_mask and labels."""
        texts: list[Any] = [
            example.text if example.pair is None else (example.text, self.separator + example.pair)
            for example in examples
        ]
        encoded = self.tokenizer(texts, truncation=False, return_token_type_ids=self.types, verbose=False)
        lengths = [len(ids) for ids in encoded.input_ids]
        self.num_cut += sum(length > self.limit for length in lengths)
        self.num_encoded += len(lengths)
        if max(lengths) > self.limit:
            encoded = self.tokenizer(
                *(texts, None) if isinstance(texts[0], str) else map(list, zip(*texts, strict=True)),
                truncation=True,
                max_length=self.limit,
                return_token_type_ids=self.types,
            )
        names = [name for name in encoded if name in ("input_ids", "attention_mask", "token_type_ids")]
        return [
            {name: encoded[name][i] for name in names} | {"labels": example.label} for i, example in enumerate(examples)
        ]


def _sampled(examples: list[Example], part: str, settings: Settings) -> list[Example]:
    """The training examples, or a part of them that no seed changes; others by length, so that little is padded."""
    if part != "train":
        return sorted(examples, key=lambda example: len(example.text) + len(example.pair or ""))
    if settings.max_train_samples is None or settings.max_train_samples >= len(examples):
        return examples
    return random.Random(0).sample(examples, settings.max_train_samples)


# --- Trainer ----------------------------------------------------------------------------------------------------


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: dict[str, list[dict[str, Any]]],
    data: TaskData,
    settings: Settings,
    *,
    seed: int,
    scratch: Path,
    device: str,
) -> transformers.Trainer:
    required("accelerate", "fine-tuning")
    if settings.precision == "fp16" and device == "cpu":
        raise UserError("--precision=fp16 needs a GPU; take bf16 or fp32")
    micro = min(settings.micro_batch_size, settings.batch_size)
    if settings.batch_size % micro:
        raise UserError(
            f"--batch_size={settings.batch_size} is not a multiple of --micro_batch_size={micro}; change one of them"
        )
    arguments = transformers.TrainingArguments(
        output_dir=str(scratch),
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        per_device_eval_batch_size=settings.micro_batch_size,
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=0.0,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        eval_strategy="epoch",
        save_strategy="best",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=data.metrics[0],
        greater_is_better=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        label_names=["labels"],
        remove_unused_columns=False,
    )

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean over the whole batch, whatever its micro-batches are."""
        total = objective(outputs.logits, labels, graded=data.is_graded)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=parts["train"],
        eval_dataset=parts["valid"],
        compute_loss_func=loss,
        compute_metrics=lambda prediction: all_scores(data, prediction.predictions, prediction.label_ids),
        preprocess_logits_for_metrics=lambda logits, _labels: logits[0] if isinstance(logits, tuple) else logits,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def objective(logits_BC: Tensor, labels_B: Tensor, *, graded: bool) -> Tensor:
    """Summed cross-entropy of classes in nats, or summed squared error of grades, in float32."""
    if graded:
        return F.mse_loss(logits_BC.float().squeeze(-1), labels_B.float(), reduction="sum")
    return F.cross_entropy(logits_BC.float(), labels_B.long(), reduction="sum")


def all_scores(data: TaskData, logits_NC: Any, labels_N: Any) -> dict[str, float]:
    """Each of the data set's metrics, from numpy arrays."""
    predicted = logits_NC[:, 0] if data.is_graded else logits_NC.argmax(-1)
    return {metric: score(metric, predicted.tolist(), labels_N.tolist()) for metric in data.metrics}


class _Steps(transformers.TrainerCallback):
    """Passes on the share of updates that are done."""

    def __init__(self, on_step: Callable[[float], None]):
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every update."""
        self.on_step(state.global_step / state.max_steps)

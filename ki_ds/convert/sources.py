"""What can be converted: a fairseq file, a run or checkpoint of ours, a DeepSpeed folder; all as one `Source`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from ki_ds.checkpoints import checkpoint, lineage
from ki_ds.config import Task
from ki_ds.convert import direct, zero
from ki_ds.convert.fairseq import Fairseq, read_fairseq
from ki_ds.convert.fairseq_to_hf import first_token, to_hf
from ki_ds.errors import UserError
from ki_ds.files import file_sha256, read_json
from ki_ds.models.presets import lm_of, load_lm, model_folder, read_config, weights_sha256

LARGEST_PADDING = 1024  # rows of an embedding beyond the tokenizer's ids that can still be padding
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
)


@dataclass(frozen=True)
class Source:
    """A model to be written, with a second way to compute it.

    Args:
        what: one line for the user and the model card.
        files: those that it was read from.
        model: makes the Hugging Face model in eval mode, in float32 or float64.
        logits: (ids [B, L], dtype=) -> logits [B, L, V] that the source's own weights give, without `model`.
        weights: those that the written file must hold bit for bit (float32); None where the names differ.
        pads_vocabulary: whether the embedding may have rows beyond the tokenizer's ids.
        num_ids: ids of the vocabulary, where neither tokenizer nor dictionary says it.
        first: id of the token that causal training put before a text, where that is known.
        facts: of the training, for the model card.
        lineage: the record of its teachers that a run of ours keeps beside its weights.
        tokenizer_dir: folder with a tokenizer of the model's own.
        dictionary: fairseq's dict.txt.
    """

    what: str
    task: Task
    files: tuple[Path, ...]
    model: Callable[[torch.dtype], PreTrainedModel]
    logits: Callable[..., Tensor] | None = None
    weights: dict[str, Tensor] | None = None
    pads_vocabulary: bool = True
    num_ids: int | None = None
    first: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    lineage: lineage.Lineage | None = None
    notes: tuple[str, ...] = ()
    tokenizer_dir: Path | None = None
    dictionary: Path | None = None

    def sha256(self) -> dict[str, str]:
        """Hash of each file by its name."""
        return {path.name: file_sha256(path) for path in self.files}


def known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the facts that have a value."""
    return {name: value for name, value in facts.items() if value is not None}


def open_source(
    path: Path,
    *,
    step: int | None,
    config: Path | None,
    dictionary: Path | None,
    fairseq_options: Mapping[str, str] = MappingProxyType({}),
) -> Source:
    """The model at a path.

    Args:
        step: of a run's checkpoint; None takes its best weights.
        config: config.json, or a folder with it, of a DeepSpeed folder's model.
        dictionary: dict.txt of a fairseq file.
        fairseq_options: what a fairseq file lacks of its options.

    Raises:
        UserError: nothing is there that can be converted, or an option does not belong to it.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist; name a fairseq .pt, a run or checkpoint of ours, or a DeepSpeed folder"
        )
    is_run, is_ours = (path / "run.json").exists(), (path / "state.json").exists() and (path / "hf").is_dir()
    is_deepspeed = path.is_dir() and not is_run and not is_ours
    for name, value, belongs in (
        ("step", step, is_run),
        ("config", config, is_deepspeed),
        ("dict", dictionary, path.is_file()),
        ("fairseq_option", next(iter(fairseq_options), None), path.is_file()),
    ):
        if value is not None and not belongs:
            raise UserError(f"--{name}={value} has no meaning for {path}; leave it out")
    if path.is_file():
        return _of_fairseq(path, dictionary, fairseq_options)
    if is_run:
        return _of_run(path) if step is None else _of_checkpoint(path / "checkpoints" / f"step_{step:08d}")
    if is_ours:
        return _of_checkpoint(path)
    return _of_deepspeed(path, config)


# --- fairseq ----------------------------------------------------------------------------------------------------


def _of_fairseq(path: Path, dictionary: Path | None, options: Mapping[str, str]) -> Source:
    model = read_fairseq(path, options)
    beside = path.parent / "dict.txt"
    return Source(
        what=f"fairseq's {model.arch} ({'RoBERTa' if model.kind == 'roberta' else 'transformer_lm'})",
        task="mlm" if model.kind == "roberta" else "causal",
        files=(path,),
        model=lambda dtype: to_hf(model, dtype),
        logits=functools.partial(direct.logits, model),
        pads_vocabulary=False,
        first=first_token(model),
        facts=_fairseq_facts(model),
        notes=model.notes,
        dictionary=dictionary or (beside if beside.is_file() else None),
    )


_PLAIN_LOSSES = ("masked_lm", "cross_entropy")
_TRAINING_FLAGS = (
    *("max_update", "lr", "max_sentences", "batch_size", "update_freq", "distributed_world_size"),
    *("tokens_per_sample", "sample_break_mode", "mask_prob", "dropout", "weight_decay", "seed", "criterion"),
)


def _fairseq_facts(model: Fairseq) -> dict[str, Any]:
    flags, training = model.flags, model.training
    facts: dict[str, Any] = {"updates": training.get("num_updates"), "epoch": training.get("epoch")}
    facts |= {name: flags.get(name) for name in _TRAINING_FLAGS}
    facts["data"] = Path(str(flags["data"])).name if flags.get("data") else None
    if "distil" in str(flags.get("criterion")) or "distil" in str(flags.get("task")):
        facts["taught by"] = flags.get("arch_distil_from")
        facts |= {name: flags.get(name) for name in ("temperature_distil", "max_update_distil")}
    elif isinstance(best := training.get("best"), int | float) and flags.get("criterion") in _PLAIN_LOSSES:
        facts["best validation perplexity"] = f"{2**best:.2f}"  # fairseq notes bits
    if training.get("best") is not None:
        facts["best validation loss"] = f"{training['best']:.4f} (bits, as noted)"
    return known(facts)


# --- ours -------------------------------------------------------------------------------------------------------


def _of_run(run_dir: Path) -> Source:
    if not checkpoint.in_use(run_dir):
        checkpoint.restore_folder(run_dir / "best")
    folder = Path(model_folder(str(run_dir)))
    facts: dict[str, Any] = {"weights": "best validation cross-entropy"}
    if (folder / "valid.json").exists():
        valid = read_json(folder / "valid.json", "step", "ppl", fix="restore it, or remove it")
        facts |= {"step": valid["step"], "validation perplexity": f"{valid['ppl']:.2f}"}
    return _of_hf(folder, run_dir, f"the best weights of run {run_dir.resolve().name}", facts)


def _of_checkpoint(folder: Path) -> Source:
    if not folder.is_dir():
        found = ", ".join(map(str, checkpoint.steps(folder.parent))) or "none"
        raise UserError(f"{folder} does not exist; checkpoints of this run are at steps {found}")
    if (what := checkpoint.damage(folder)) is not None:
        raise UserError(f"{folder} is damaged: {what}; take another checkpoint")
    state = read_json(folder / "state.json")
    facts = {"step": state["step"], "tokens": state.get("totals", {}).get("tokens")}
    return _of_hf(folder / "hf", folder.resolve().parent.parent, f"checkpoint {folder.resolve().name}", facts)


def _of_hf(folder: Path, run_dir: Path, what: str, facts: dict[str, Any]) -> Source:
    """A Hugging Face folder that a run has written; `run_dir` may lack what a run has beside it."""
    hf_config = read_config(str(folder), what="INPUT")
    task = task_of(hf_config)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if (run_dir / "run.json").exists():
        manifest = read_json(run_dir / "run.json", "task", "name", "status", "version", "data")
        task = manifest["task"]
        facts |= run_facts(run_dir, manifest)
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return Source(
        what=what,
        task=task,
        files=files,
        model=lambda dtype: load_lm(str(folder), task, dtype, what="INPUT").eval(),
        weights={name: tensor.float() for name, tensor in weights.items()},
        first=_first(hf_config) if task == "causal" else None,
        facts=known(facts),
        lineage=lineage.read(folder, weights_sha256(str(folder))),
        tokenizer_dir=folder if any((folder / name).exists() for name in TOKENIZER_FILES) else None,
        dictionary=folder / "dict.txt" if (folder / "dict.txt").is_file() else None,
    )


def _first(config: PreTrainedConfig) -> int | None:
    """`</s>`, which our causal training puts before every row; in older folders bos is another token."""
    return config.eos_token_id if isinstance(config.eos_token_id, int) else config.bos_token_id


def run_facts(run_dir: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What run.json (its status, if it has one) and config.yaml say; the latter as plain YAML, as it may be older."""
    facts: dict[str, Any] = {"run": manifest["name"], "status": manifest.get("status")}
    facts["written by"] = manifest["version"]
    if (run_dir / "config.yaml").exists():
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        data, train, inherit = (config.get(name, {}) for name in ("data", "train", "inherit"))
        corpora = [entry.get("path") for entry in data.get("sources") or [{"path": data.get("corpus")}]]
        facts |= {
            "data": ", ".join(Path(path).name for path in corpora if path),
            "steps of the run": train.get("num_steps"),
            "global batch size": train.get("global_batch_size"),
            "sequence length": data.get("seq_len"),
            "peak learning rate": config.get("optim", {}).get("lr"),
            "precision": config.get("engine", {}).get("precision"),
            "seed": config.get("seed"),
        }
        if inherit.get("schedule", "none") != "none":
            names = ("schedule", "steps", "slope", "constant_alpha", "tau")
            facts |= {f"inherit.{name}": inherit.get(name) for name in names}
    return facts | manifest["data"]


# --- DeepSpeed folders of others --------------------------------------------------------------------------------


def _of_deepspeed(path: Path, config: Path | None) -> Source:
    folder = zero.find_checkpoint(path)
    if folder is None:
        raise UserError(f"{path} is no run, no checkpoint of ours and no DeepSpeed folder (latest, *_model_states.pt)")
    places = [config] if config else [path, path.parent, folder.parent]
    places = [place.parent if place.is_file() else place for place in places]
    home = next((place for place in places if (place / "config.json").is_file()), None)
    if home is None:
        raise UserError(f"{path} has no config.json beside it; give the model's with --config FILE")
    hf_config = read_config(str(home), what="--config")
    task = task_of(hf_config)
    found = zero.consolidate(folder)
    num_ids = hf_config.get_text_config().vocab_size
    hf_config.get_text_config().vocab_size = max(num_ids, _padded_to(hf_config, task, found.weights, num_ids))
    cached: dict[torch.dtype, PreTrainedModel] = {}

    def model(dtype: torch.dtype) -> PreTrainedModel:
        if dtype not in cached:
            cached[dtype] = _with_weights(hf_config, task, found.weights, dtype, path)
        return cached[dtype]

    return Source(
        what=f"DeepSpeed checkpoint {folder.resolve().name}",
        task=task,
        files=found.files,
        model=model,
        weights={name: tensor.float() for name, tensor in found.weights.items()},
        num_ids=num_ids,
        facts=found.facts,
        notes=(f"read with {found.loader}",),
        tokenizer_dir=home if any((home / name).exists() for name in TOKENIZER_FILES) else None,
    )


def _padded_to(config: PreTrainedConfig, task: Task, weights: dict[str, Tensor], num_ids: int) -> int:
    """Rows of the embedding; config.json may be of the exported model, which has no padding."""
    with torch.device("meta"):
        made = lm_of(config, task)
    embedding = made.get_input_embeddings().weight
    names = [name for name, tensor in made.named_parameters() if tensor is embedding and name in weights]
    rows = max((len(weights[name]) for name in names), default=num_ids)
    return rows if rows <= num_ids + LARGEST_PADDING else num_ids


def _with_weights(
    config: PreTrainedConfig, task: Task, weights: dict[str, Tensor], dtype: torch.dtype, path: Path
) -> PreTrainedModel:
    mapping = MODEL_FOR_MASKED_LM_MAPPING if task == "mlm" else MODEL_FOR_CAUSAL_LM_MAPPING
    kind: Any = mapping[type(config)]
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict={name: tensor.to(dtype) for name, tensor in weights.items()},
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
    )
    for name, found, expected in report["mismatched_keys"]:
        raise UserError(f"{path}: {name} is {list(found)}, config.json needs {list(expected)}; give its own --config")
    for name in sorted(report["missing_keys"]):
        shape = list(model.state_dict()[name].shape)
        raise UserError(f"{path} lacks {name} {shape} of {type(model).__name__}; give its own --config")
    for name in sorted(report["unexpected_keys"]):
        raise UserError(
            f"{path} has {name} {list(weights[name].shape)}, which {type(model).__name__} has not; give its --config"
        )
    return model.eval()


def task_of(config: PreTrainedConfig) -> Task:
    """mlm or causal, from the class that a configuration names, else from what its kind can be.

    Raises:
        UserError: it is no language model.
    """
    named = (config.architectures or [""])[0]
    if named.endswith("ForMaskedLM"):
        return "mlm"
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if not named and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "mlm"
    if not named and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "causal"
    raise UserError(f"config.json is of {named or config.model_type}, no masked or causal language model; take another")

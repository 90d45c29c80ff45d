"""A model's Hugging Face folder: its weights without padding, tokenizer, dictionary, model card and lineage.

Output classes beyond the tokenizer's ids would take probability in a plain softmax. Training, teachers and
perplexities leave them out of every sum (`num_classes`), so that they are never measured; whoever takes the exported
model sums over all of them.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import ki_ds
from ki_ds.checkpoints import lineage
from ki_ds.config import Task
from ki_ds.convert.sources import LARGEST_PADDING, TOKENIZER_FILES, Source, known, run_facts, task_of
from ki_ds.data.datasets import Vocabulary
from ki_ds.data.tokenize import load_tokenizer, read_fairseq_dict, tokenizer_from_fairseq, tokenizer_hash
from ki_ds.data.tokenizer_files import Files, tokenizer_files
from ki_ds.errors import UserError
from ki_ds.files import write_json
from ki_ds.models.presets import (
    RowLM,
    Rows,
    check_vocabulary,
    count_parameters,
    load_lm,
    max_positions,
    model_folder,
    quieten,
    read_config,
    weights_sha256,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def num_classes_of(lm: PreTrainedModel) -> int:
    """Output classes of a language model, padding included."""
    return lm.get_output_embeddings().weight.shape[0]


def unpadded(lm: PreTrainedModel, num_ids: int, *, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture of `lm` with the output classes of `num_ids` ids, without weights (on the meta device).

    It has configurations of its own, and `cut` gives the weights that belong into it.

    Raises:
        UserError: the architecture has other tensors then, or no place for what pads.
    """
    config = copy.deepcopy(lm.config)
    config.get_text_config().vocab_size = num_ids
    if config.pad_token_id is not None and config.pad_token_id >= num_ids:
        config.pad_token_id = None
    with torch.device("meta"):
        made = type(lm)._from_config(config, dtype=dtype)
    made.config.use_cache = True  # of no use in training, but whoever generates wants it
    made.generation_config = copy.deepcopy(lm.generation_config) if lm.can_generate() else None
    before, after = ({name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (lm, made))
    padded = num_classes_of(lm)
    for name in sorted(before.keys() | after.keys()):
        expected = tuple(num_ids if size == padded else size for size in before.get(name, ()))
        if after.get(name) not in (before.get(name), expected):
            raise UserError(
                f"{type(lm).__name__} with {num_ids:,} output classes instead of {padded:,} has another {name}; take a "
                "model whose embedding has the tokenizer's ids"
            )
    return made


def cut(state: Mapping[str, Tensor], made: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of `state` that belong into a model that `unpadded` made: views, tied ones still tied."""
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    return {name: tensor[tuple(map(slice, shapes[name]))] for name, tensor in state.items()}


def begin_with(lm: PreTrainedModel, first: int, *, eos: int | None, pad: int | None) -> None:
    """Have a causal model's configurations say what a text begins behind, ends with, and is filled up with."""
    ids: dict[str, Any] = {"bos_token_id": first, "eos_token_id": first if eos is None else eos}
    for config in (lm.config, lm.config.get_text_config()):
        if isinstance(config.eos_token_id, list) and ids["eos_token_id"] in config.eos_token_id:
            ids["eos_token_id"] = config.eos_token_id
        config.bos_token_id, config.eos_token_id = first, ids["eos_token_id"]
    if lm.generation_config is None:
        return
    ids["pad_token_id"] = eos if pad is None else pad
    lm.generation_config.update(**ids, _from_model_config=False)
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:  # options that contradict each other, which it could not be saved with
        lm.generation_config = GenerationConfig(**ids)


# --- tokenizer and dictionary -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """What lies beside a model: files, the ids that they give it, the id that pads, and lines that say so."""

    num_ids: int
    pad: int | None
    files: Files
    lines: list[str]


def beside_model(source: Source, model: PreTrainedModel, *, tokenizer: Path | None) -> Beside:
    """The vocabulary of a model, whose embedding may have rows beyond it.

    Args:
        tokenizer: folder of a tokenizer; GPT-2's (or RoBERTa's) vocabulary where the source has a dictionary.

    Raises:
        UserError: it cannot be loaded, or has another size than the embedding.
    """
    size = num_classes_of(model)
    num_ids, pad = source.num_ids or size, model.config.pad_token_id
    files: Files = {}
    lines = []
    if source.dictionary is not None:
        symbols, ids = read_fairseq_dict(source.dictionary, mask=source.task == "mlm")
        num_ids, pad = len(symbols), ids.pad
        _check_size(source, f"{source.dictionary}", num_ids, size)
        files["dict.txt"] = source.dictionary.read_bytes()
        lines.append(f"dict.txt: fairseq's dictionary of {num_ids:,} ids")
    made = _tokenizer(source, tokenizer, size)
    if made is None:
        lines.append(f"no tokenizer: ids mean what {'dict.txt' if lines else 'the training data'} says")
    else:
        num_ids, pad = len(made) if source.dictionary is None else num_ids, made.pad_token_id
        lines += tokenizer_lines(made, num_ids)
        first = _first(source, made)
        config = model.config.to_json_string()
        origin = tokenizer or source.tokenizer_dir
        files |= tokenizer_files(made, first=first, limit=max_positions(model), config=config, origin=origin)
        if first is not None and made("a").input_ids[-1:] == [made.eos_token_id]:
            token = made.convert_ids_to_tokens(first)
            lines.append(f"the tokenizer puts {token} before a text and nothing behind it")
    if size > num_ids:
        lines.append(f"left out: the embedding's {size - num_ids:,} rows of padding beyond {num_ids:,} ids")
    return Beside(num_ids, pad, files, lines)


def _tokenizer(source: Source, given: Path | None, size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or is the model's own, if it fits."""
    if given is not None and source.tokenizer_dir is not None:
        raise UserError(f"--tokenizer={given}: {source.tokenizer_dir} has the model's own; leave it out")
    if given is not None and source.dictionary is not None:  # whose size is right
        return tokenizer_from_fairseq(source.dictionary, given)
    folder = given or source.tokenizer_dir
    if folder is None:
        return None
    made = load_tokenizer(folder)
    what = f"--tokenizer={given}" if given is not None else f"the tokenizer of {folder}"
    beyond = source.dictionary is not None and source.task == "causal"  # <mask>, of which a GPT knows nothing
    _check_size(source, what, len(made) - beyond, size)
    return made


def _first(source: Source, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that has to stand before a text; None where the tokenizer is right as it is."""
    if source.task == "causal" and source.first is None and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        return tokenizer.eos_token_id
    return source.first


def tokenizer_lines(made: PreTrainedTokenizerBase, num_ids: int) -> list[str]:
    """What is to be said of a tokenizer beside a model of `num_ids` ids."""
    lines = [f"tokenizer of {len(made):,} ids"]
    if (beyond := made.backend_tokenizer.get_vocab_size() - len(made)) > 0:
        lines.append(
            f"the dictionary lacks {beyond:,} pieces of the vocabulary, for which AutoTokenizer gives ids that the "
            "model has not; ki_ds.data.tokenize.load_tokenizer gives <unk>"
        )
    if len(made) > num_ids:
        lines.append("<mask>, the tokenizer's last id, is no id of the model")
    return lines


def _check_size(source: Source, what: str, num_ids: int, size: int) -> None:
    most = LARGEST_PADDING if source.pads_vocabulary else 0
    if not 0 <= size - num_ids <= most:
        hint = "give its own dict.txt with --dict" if not source.pads_vocabulary else "take the model's own"
        raise UserError(f"{what} has {num_ids:,} ids, the model's embedding {size:,}; {hint}")


# --- model card -------------------------------------------------------------------------------------------------------


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """What a model is, for people: architecture, widths, vocabulary, parameters."""
    config, head = model.config, model.get_output_embeddings()
    facts = {
        "architecture": type(model).__name__,
        "layers": getattr(config, "num_hidden_layers", None),
        "hidden size": getattr(config, "hidden_size", None),
        "attention heads": getattr(config, "num_attention_heads", None),
        "feed-forward size": getattr(config, "intermediate_size", getattr(config, "n_inner", None)),
        "positions": max_positions(model),
        "vocabulary": head.weight.shape[0],
        "output projection": "tied" if head.weight is model.get_input_embeddings().weight else "of its own",
        "parameters": f"{count_parameters(model)['num_parameters']:,}",
    }
    return known(facts)


def model_card(
    name: str,
    source: Source,
    model: PreTrainedModel,
    *,
    dtype: str,
    license_name: str,
    vocabulary: Sequence[str],
    checks: Sequence[str],
) -> str:
    """README.md of a converted model.

    Args:
        vocabulary: lines about tokenizer and dictionary.
        checks: lines about the agreement with the source.
    """
    lineage_lines: list[str] = []
    if source.lineage is not None:
        console = Console(file=io.StringIO(), width=200)
        with console.capture() as captured:
            console.print(lineage.tree(source.lineage))
        lineage_lines = ["```", *captured.get().rstrip().splitlines(), "```"]
    pipeline = "fill-mask" if source.task == "mlm" else "text-generation"
    head = f"---\nlicense: {license_name}\nlibrary_name: transformers\npipeline_tag: {pipeline}\n---\n# {name}\n"
    files = [f"- `{file}` SHA-256 `{digest}`" for file, digest in source.sha256().items()]
    sections = {
        f"Made by ki_ds {ki_ds.__version__} from {source.what}": files,
        "Model": _bullets(sizes(model) | {"weights": dtype}),
        "Training": _bullets(source.facts) or ["- nothing is known"],
        "Lineage": lineage_lines,
        "Vocabulary": [f"- {line}" for line in vocabulary],
        "Agreement with the source": [f"- {line}" for line in (*source.notes, *checks)],
    }
    parts = [f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items() if lines]
    return head + "".join(parts)


def _bullets(facts: Mapping[str, Any]) -> list[str]:
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()]


def write_beside(folder: Path, files: Files, card: str, record: lineage.Lineage | None) -> None:
    """Write tokenizer, model card and lineage beside a model, all readable by whoever can read its configuration."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if record is not None:
        write_json(folder / lineage.FILE_NAME, record)
    mode = (folder / "config.json").stat().st_mode  # safetensors lets nobody but the owner read
    for file in folder.iterdir():
        file.chmod(mode)


# --- a run's student --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudentFolder:
    """Writes the student's weights as a folder with all that belongs beside them, which was made before the first step.

    Args:
        lm: the student without padding and weights, whose configurations are those of the folder.
        files: tokenizer and dictionary.
        notes: lines about them for the model card.
    """

    task: Task
    lm: PreTrainedModel
    files: Files
    notes: Sequence[str]

    @classmethod
    def of(cls, lm: PreTrainedModel, task: Task, vocabulary: Vocabulary, *, dtype: torch.dtype) -> StudentFolder:
        """Made before anything is trained.

        Args:
            lm: the student, its padding included.
            dtype: of the weights that will be written.

        Raises:
            UserError: the tokenizer cannot be saved as it is, or the padding cannot be left out.
        """
        made = unpadded(lm, vocabulary.size, dtype=dtype)
        if task == "causal":
            eos = vocabulary.special_ids.eos
            assert eos is not None
            begin_with(made, eos, eos=eos, pad=vocabulary.special_ids.pad)
        files = vocabulary.files(task, limit=max_positions(lm), config=made.config.to_json_string())
        notes = [f"dict.txt: fairseq's dictionary of {vocabulary.size:,} ids"] if vocabulary.dictionary else []
        if vocabulary.tokenizer is None:
            notes.append("no tokenizer: ids mean what dict.txt says")
        else:
            notes += tokenizer_lines(vocabulary.tokenizer, vocabulary.size)
        return cls(task, made, files, notes)

    @property
    def parameters(self) -> dict[str, int]:
        """`count_parameters` of what is written."""
        return count_parameters(self.lm)

    def write(
        self,
        folder: Path,
        state: dict[str, Tensor],
        describe: Callable[..., lineage.Lineage],
        *,
        what: str,
        run_dir: Path,
        manifest: dict[str, Any],
        facts: dict[str, Any],
    ) -> None:
        """Write the folder.

        Args:
            state: the student's whole weights, padding included.
            describe: (weights=SHA-256) -> the record of its lineage.
            what: one line for the model card.
            facts: of these weights, for the model card.
        """
        self.lm.save_pretrained(folder, state_dict=cut(state, self.lm))
        record = describe(weights=weights_sha256(str(folder)))
        source = Source(
            what=what,
            task=self.task,
            files=tuple(sorted(folder.glob("*.safetensors"))),
            model=lambda _: self.lm,
            facts=known(facts | run_facts(run_dir, manifest)),
            lineage=record,
        )
        dtype = str(self.lm.dtype).removeprefix("torch.")
        card = model_card(
            manifest["name"], source, self.lm, dtype=dtype, license_name="other", vocabulary=self.notes, checks=[]
        )
        write_beside(folder, self.files, card, record)


# --- a folder that exists ---------------------------------------------------------------------------------------------


def describe(path: Path) -> list[str]:
    """Lines about a folder that loads as a student or a teacher: what it is, and what to put into a configuration.

    Raises:
        UserError: it is missing, no masked or causal language model, or its logits are not a linear projection.
    """
    quieten()
    if not path.is_dir():
        raise UserError(f"--from_hf={path} is no folder; name a Hugging Face folder, a run or a checkpoint of ours")
    folder = model_folder(str(path))
    task = task_of(read_config(folder, what="--from_hf"))
    lm = load_lm(folder, task, torch.float32, what="--from_hf")
    lines = [f"{name}: {value}" for name, value in sizes(lm).items()]
    if any(Path(folder, name).exists() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer(folder)
        has_dictionary = Path(folder, "dict.txt").is_file()  # then a GPT's tokenizer has a <mask> beyond its ids
        num_ids = len(tokenizer) - (has_dictionary and task == "causal")
        check_vocabulary(lm, num_ids, what=f"--from_hf={path}")
        lines.append(f"tokenizer: {len(tokenizer):,} ids, SHA-256 {tokenizer_hash(tokenizer)[:12]}")
    elif Path(folder, "dict.txt").is_file():
        lines.append("tokenizer: none, but fairseq's dict.txt")
    else:
        lines.append("tokenizer: none; of its vocabulary only the size will be checked")
    RowLM(lm).check(Rows(task, padded=False))  # what the rows of a run will be is not known yet
    start = {"task": task, "model": {"name": str(path), "init": "pretrained"}}
    lines += ["", "# as the student's starting point", *yaml.safe_dump(start, sort_keys=False).splitlines()]
    teach = {"task": task, "teacher": {"path": str(path)}}
    return [*lines, "", "# as a teacher", *yaml.safe_dump(teach, sort_keys=False).splitlines()]

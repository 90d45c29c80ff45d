"""The model card: what a converted model is, where it comes from, and how well it agrees with its source."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

import ki_ds
from ki_ds.checkpoints import lineage
from ki_ds.convert.sources import Source
from ki_ds.models.presets import count_parameters, max_positions

_SIZES = {
    "layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "attention heads": "num_attention_heads",
}


def sizes(model: PreTrainedModel) -> dict[str, Any]:
    """What a model is, for people: architecture, widths, vocabulary, parameters."""
    config, head = model.config, model.get_output_embeddings()
    found: dict[str, Any] = {"architecture": type(model).__name__}
    found |= {name: getattr(config, key, None) for name, key in _SIZES.items()}
    found["feed-forward size"] = getattr(config, "intermediate_size", getattr(config, "n_inner", None))
    found["positions"] = max_positions(model)
    found["vocabulary"] = head.weight.shape[0]
    found["output projection"] = "tied" if head.weight is model.get_input_embeddings().weight else "of its own"
    found["parameters"] = f"{count_parameters(model)['num_parameters']:,}"
    return {name: value for name, value in found.items() if value is not None}


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
    pipeline = "fill-mask" if source.task == "mlm" else "text-generation"
    head = f"---\nlicense: {license_name}\nlibrary_name: transformers\npipeline_tag: {pipeline}\n---\n# {name}\n"
    files = [f"- `{file}` SHA-256 `{digest}`" for file, digest in source.sha256().items()]
    sections = {
        f"Made by ki_ds {ki_ds.__version__} from {source.what}": files,
        "Model": _bullets(sizes(model) | {"weights": dtype}),
        "Training": _bullets(source.facts) or ["- nothing is known"],
        "Lineage": _tree(source.lineage) if source.lineage is not None else [],
        "Vocabulary": [f"- {line}" for line in vocabulary],
        "Agreement with the source": [f"- {line}" for line in (*source.notes, *checks)],
    }
    parts = [f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items() if lines]
    return head + "".join(parts)


def _bullets(facts: Mapping[str, Any]) -> list[str]:
    return [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()]


def _tree(record: lineage.Lineage) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    with console.capture() as captured:
        console.print(lineage.tree(record))
    return ["```", *captured.get().rstrip().splitlines(), "```"]

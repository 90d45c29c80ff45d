"""A source as a Hugging Face folder: written under another name, read back, compared with its source, renamed."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ki_ds.convert.folder import begin_with, beside_model, cut, model_card, num_classes_of, unpadded, write_beside
from ki_ds.convert.sources import Source, open_source
from ki_ds.data.store import is_fairseq_folder, open_store
from ki_ds.errors import UserError
from ki_ds.files import check_space, sync_folder, write_errors_are_one_line
from ki_ds.models.presets import DTYPES, load_lm, max_positions, quieten, weights_sha256

# Largest difference of logits, of those up to 10; in proportion beyond.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
_LARGEST_IN_FLOAT64 = 400_000_000  # parameters; beyond, the check in float64 would take minutes and 8 bytes each
_LONGEST_ROW = 4096
_NUM_REAL_ROWS = 4


@dataclass(frozen=True)
class Options:
    """What a conversion may be told besides its input and output; see `tools/convert_to_hf.py --help`."""

    dtype: str = "fp32"
    tokenizer: Path | None = None
    dictionary: Path | None = None
    data: Path | None = None
    step: int | None = None
    config: Path | None = None
    license: str = "other"
    fairseq_options: Mapping[str, str] = field(default_factory=dict)


def convert(path: Path, output: Path, options: Options, *, say: Callable[[str], None] = print) -> None:
    """Write the model at `path` as the Hugging Face folder `output`, after comparing it with its source.

    Raises:
        UserError: the input cannot be converted exactly, the output exists or cannot be written, or the written
            model does not agree with its source. Nothing is left under `output` then.
    """
    quieten()
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already; remove it or give another folder")
    source = open_source(
        path,
        step=options.step,
        config=options.config,
        dictionary=options.dictionary,
        fairseq_options=options.fairseq_options,
    )
    for note in (source.what, *source.notes):
        say(note)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with write_errors_are_one_line(output), _safetensors_errors():
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            _write(source, temporary, output.name, options, real_rows=_real_rows(path, options), say=say)
            for file in temporary.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            sync_folder(temporary)
            temporary.rename(output)
            sync_folder(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{output}: {sum(file.stat().st_size for file in output.iterdir()) / 1e6:,.1f} MB")


@contextlib.contextmanager
def _safetensors_errors() -> Iterator[None]:
    """Turn safetensors' "I/O error: File too large (os error 27)" into an OSError."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def _write(
    source: Source,
    folder: Path,
    name: str,
    options: Options,
    *,
    real_rows: list[Tensor] | None,
    say: Callable[[str], None],
) -> None:
    whole = source.model(torch.float32)
    beside = beside_model(source, whole, tokenizer=options.tokenizer)
    model = unpadded(whole, beside.num_ids, dtype=torch.float32)
    if source.first is not None:
        begin_with(model, source.first, eos=model.config.eos_token_id, pad=beside.pad)
    state = cut(whole.state_dict(), model)
    check_space(folder, 2 * sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    model.save_pretrained(folder, state_dict=state)
    rows = made_up_rows(beside.num_ids, max_positions(whole), padding_id(model))
    for row in real_rows or []:
        if int(row.max()) >= beside.num_ids:
            raise UserError(
                f"the token file has id {int(row.max())}, the model {beside.num_ids}; give its own with --data"
            )
        row = row[row != model.config.pad_token_id]
        rows += [row[None, : max_positions(whole) or _LONGEST_ROW]] if len(row) else []
    checks = [*_check_weights(source, folder), *_check_logits(source, folder, rows, num_real=len(real_rows or []))]
    if options.dtype != "fp32":
        checks.append(_cast(source, folder, rows, options.dtype))
    for line in (*beside.lines, *checks):
        say(line)
    card = model_card(
        name, source, model, dtype=options.dtype, license_name=options.license, vocabulary=beside.lines, checks=checks
    )
    record = source.lineage and source.lineage | {"weights_sha256": weights_sha256(str(folder))}
    write_beside(folder, beside.files, card, record)


# --- the rows it is compared on ---------------------------------------------------------------------------------


def made_up_rows(vocab_size: int, limit: int | None, pad: int | None) -> list[Tensor]:
    """Random ids: one row [1, L] of full length, and three [3, L'] of which two end in padding."""
    draw = torch.Generator().manual_seed(0)
    kept = torch.tensor([i for i in range(vocab_size) if i != pad])
    full = min(limit or 128, _LONGEST_ROW)
    rows = [kept[torch.randint(len(kept), shape, generator=draw)] for shape in ((1, full), (3, min(full, 32)))]
    if pad is not None:
        for i, length in ((1, rows[1].shape[1] // 2), (2, 1)):
            rows[1][i, length:] = pad
    return rows


def _real_rows(path: Path, options: Options) -> list[Tensor] | None:
    """Rows [L] of the token file that was named, or lies beside a fairseq file; None without one."""
    beside = [path.parent / name for name in ("valid", "train")] if path.is_file() else []
    place = options.data or next((prefix for prefix in beside if Path(f"{prefix}.idx").is_file()), None)
    if place is None:
        return None
    if is_fairseq_folder(place):
        place = place / ("valid" if (place / "valid.idx").is_file() else "train")
    store = open_store(place)
    length = min(store.num_tokens // _NUM_REAL_ROWS, 128)
    if length < 2:
        raise UserError(f"{place} has {store.num_tokens} tokens, too few to compare on; give another with --data")
    ids = torch.from_numpy(store.tokens[: _NUM_REAL_ROWS * length].astype("int64"))
    return list(ids.view(_NUM_REAL_ROWS, length))


# --- the comparison ---------------------------------------------------------------------------------------------


def _check_weights(source: Source, folder: Path) -> list[str]:
    """That the file holds the source's weights bit for bit, padding left out, where both have the same names."""
    if source.weights is None:
        return []
    written = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    common = written.keys() & source.weights.keys()  # an architecture may be saved under other names
    for name in common:
        if not torch.equal(written[name], source.weights[name][tuple(map(slice, written[name].shape))]):
            raise UserError(f"{name} was not written as it is in the source; nothing was left")
    return [f"{len(common)} of {len(written)} tensors are the source's by name, bit for bit"]


def _check_logits(source: Source, folder: Path, rows: list[Tensor], *, num_real: int) -> list[str]:
    """Lines with the largest differences of logits. Raises UserError where one is above `TOLERANCE`."""
    reloaded = load_lm(str(folder), source.task, torch.float32, what="OUTPUT").eval()
    pad, num_ids = padding_id(reloaded), num_classes_of(reloaded)
    where = f"{len(rows) - num_real} sets of random rows and {num_real} rows of data"
    if source.logits is None:
        original = source.model(torch.float32)
        difference = _largest_difference(
            reloaded, lambda ids: _logits(original, ids, pad)[..., :num_ids], rows, torch.float32
        )
        return [f"logits of the written and the source model differ by {difference:.1e} (fp32, {where})"]
    direct = source.logits
    lines = []
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.float64 and reloaded.num_parameters() > _LARGEST_IN_FLOAT64:
            lines.append(f"not compared in float64: more than {_LARGEST_IN_FLOAT64 / 1e6:.0f}M parameters")
            continue
        model = reloaded if dtype == torch.float32 else source.model(dtype)
        difference = _largest_difference(model, functools.partial(direct, dtype=dtype), rows, dtype)
        lines.append(f"logits differ from a direct evaluation of the source by {difference:.1e} ({name}, {where})")
    return lines


def _largest_difference(
    model: PreTrainedModel, expected: Callable[[Tensor], Tensor], rows: list[Tensor], dtype: torch.dtype
) -> float:
    pad, worst = padding_id(model), 0.0
    with torch.inference_mode():
        for ids_BL in rows:
            kept = ids_BL != (-1 if pad is None else pad)
            z, reference = _logits(model, ids_BL, pad)[kept], expected(ids_BL)[kept]
            difference, largest = float((z - reference).abs().max()), float(reference.abs().max())
            if not difference <= TOLERANCE[dtype] * max(1.0, largest / 10):
                raise UserError(
                    f"the converted model's logits differ from the source's by {difference:.1e} (largest logit "
                    f"{largest:.1f}), more than {TOLERANCE[dtype]:g} in {dtype}; nothing was left: report this file"
                )
            worst = max(worst, difference)
    return worst


def padding_id(model: PreTrainedModel) -> int | None:
    """The id that pads a batch; None where the model has none, for which RoBERTa's kind says -1."""
    pad = model.config.pad_token_id
    return None if pad is None or pad < 0 else pad


def _logits(model: PreTrainedModel, ids_BL: Tensor, pad: int | None) -> Tensor:
    mask = torch.ones_like(ids_BL) if pad is None else (ids_BL != pad).long()
    return model(input_ids=ids_BL, attention_mask=mask).logits


@torch.inference_mode()
def _cast(source: Source, folder: Path, rows: list[Tensor], dtype: str) -> str:
    """Write the checked weights again in a smaller dtype; a line that says what it costs."""
    model = load_lm(str(folder), source.task, torch.float32, what="OUTPUT").eval()
    pad = padding_id(model)
    before = [_logits(model, ids, pad) for ids in rows]
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    model.config.use_cache = True
    model.save_pretrained(folder)
    cast = load_lm(str(folder), source.task, torch.float32, what="OUTPUT").eval()
    worst, largest = 0.0, 0.0
    for ids_BL, expected in zip(rows, before, strict=True):
        kept = ids_BL != (-1 if pad is None else pad)
        found, expected = _logits(cast, ids_BL, pad)[kept], expected[kept]
        if not found.isfinite().all():
            raise UserError(f"--dtype={dtype} cannot hold these weights (logits are not finite); take bf16 or fp32")
        worst, largest = max(worst, float((found - expected).abs().max())), max(largest, float(expected.abs().max()))
    return f"weights in {dtype} change logits by at most {worst:.1e} (largest logit {largest:.1f}, computed in fp32)"

"""Files of torch.save, read without running anything that they name.

torch's own restricted reader does the work. What it does not know, but fairseq and DeepSpeed pickle beside the
weights, becomes an `Inert` that keeps its data and does nothing; any other name is refused. Code of others that calls
torch.load itself is held to the same reader.
"""

import contextlib
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import _get_allowed_globals

from ki_ds.errors import UserError

# Everything under these is inert, whatever its name.
_PACKAGES = ("fairseq.", "omegaconf.", "deepspeed.", "hydra.")
# Single names beside them: options, types in the description of options, numpy's scalars and arrays.
_NAMES = frozenset(
    {
        "argparse.Namespace",
        *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")),
        *(f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
        *("operator.getitem", "_operator.getitem", "enum.Enum", "pathlib.PosixPath", "collections.deque"),
        *("numpy.dtype", "numpy.ndarray"),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    }
)
_NUM_LEGACY_PICKLES = 5  # magic number, protocol, system, content, storage keys


class Inert:
    """An object of a class that is not to be imported: its arguments and state as plain data."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Inert":
        """An object that remembers its arguments."""
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any) -> None:
        """Nothing is left to do."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty_dict(*_: Any) -> dict:
    """A dict in place of a defaultdict."""
    return {}


def read_checkpoint(path: Path) -> Any:
    """The content of a torch.save file (zip or legacy), tensors on the CPU, foreign objects as `Inert`.

    Raises:
        UserError: it is missing, damaged, no such file, or it names something that weights do not need.
    """
    stand_ins: list[Any] = [(_empty_dict, "collections.defaultdict")]
    known = {"collections.defaultdict", *_get_allowed_globals()}
    for name in sorted(_named(path) - known):
        if name not in _NAMES and not name.startswith(_PACKAGES):
            raise UserError(
                f"{path} pickles {name}, which weights do not need; nothing of it was run: take a file that you trust"
            )
        stand_ins.append((Inert, name))
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # of a damaged file: anything, from IndexError to UnicodeDecodeError
            raise UserError(f"{path} cannot be read ({_reason(error)}); nothing of it was run: get it again") from None


def check_names(paths: Iterable[Path], classes: Collection[type]) -> None:
    """Return silently, or raise UserError for the first file that names more than weights and these classes."""
    known = {*_get_allowed_globals(), *(f"{made.__module__}.{made.__qualname__}" for made in classes)}
    for path in paths:
        if foreign := sorted(_named(path) - known):
            raise UserError(
                f"{path} pickles {foreign[0]}, which no training of ours has saved; nothing of it was run: resume from "
                "a checkpoint that you trust"
            )


@contextlib.contextmanager
def weights_and(classes: Collection[type], *, what: Path) -> Iterator[None]:
    """While it lasts, every torch.load of this process makes tensors, plain values and these classes, and no others.

    Also one that asks for more, as DeepSpeed's do. Its look at a file is the only one: nothing can change in between.

    Args:
        what: the folder that is read, for the error line.

    Raises:
        UserError: a file names something else.
    """
    forced, loosened = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name) for name in (forced, loosened) if name in os.environ}
    os.environ[forced] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what} cannot be read ({_reason(error)}); nothing of it was run: resume from another"
        ) from None
    finally:
        del os.environ[forced]
        os.environ.update(before)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


def _named(path: Path) -> set[str]:
    """Full names of everything that a file's pickles mention; read, not executed."""
    try:
        if zipfile.is_zipfile(path):
            return _named_in_zip(path)
        with path.open("rb") as file:
            return _named_in_legacy(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); name a checkpoint") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is a damaged zip file ({error}); get it again") from None


def _named_in_zip(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if not pickles:
            raise UserError(f"{path} is a zip file without data.pkl, not one of torch.save; name a checkpoint")
        names: set[str] = set()
        for pickle in pickles:
            with archive.open(pickle) as file, contextlib.suppress(Exception):  # torch will refuse the rest
                names.update(_names_of_one(file))
        return names


def _named_in_legacy(file: BinaryIO) -> set[str]:
    names: set[str] = set()
    with contextlib.suppress(Exception):  # of pickletools on damaged bytes; torch will refuse the rest
        for _ in range(_NUM_LEGACY_PICKLES):
            names.update(_names_of_one(file))
    return names


def _names_of_one(file: Any) -> Iterator[str]:
    """Names in one pickle, as far as pickletools can follow it."""
    strings = ["", ""]
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield _as_in_python_3(str(argument).replace(" ", ".", 1))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings)
        elif isinstance(argument, str):
            strings = [strings[1], argument]


def _as_in_python_3(name: str) -> str:
    module, _, rest = name.partition(".")
    return f"builtins.{rest}" if module in ("__builtin__", "__builtins__") else name


def plain(value: Any) -> Any:
    """A read value as dicts, lists, numbers and strings: options from Namespaces, data classes and omegaconf."""
    if isinstance(value, Inert):
        state = value.state
        if isinstance(state, dict):
            for content in ("_content", "_val"):  # of omegaconf's containers and nodes
                if content in state:
                    return plain(state[content])
            return {key: plain(item) for key, item in state.items()}
        return plain(value.args[0]) if len(value.args) == 1 else None  # an enumeration's member
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value

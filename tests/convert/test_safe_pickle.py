"""Nothing that a file names is run; what fairseq and omegaconf pickle is read as data."""

import argparse
import collections
import os
import pickle
import runpy
import shutil
import subprocess
import time
import timeit
import zipfile

import numpy as np
import pytest
import torch

from ki_ds.convert import safe_pickle
from ki_ds.convert.fairseq import read_fairseq
from ki_ds.convert.safe_pickle import Inert, plain, read_checkpoint
from ki_ds.errors import UserError
from tests.convert.fairseq_files import Gpt, fake_modules, save


class Payload:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class WithState:
    """Pickled as an object whose state is a call."""

    def __init__(self, payload):
        self.payload = payload

    def __reduce__(self):
        return (argparse.Namespace, (), {"x": self.payload})


CODE = "open({!r}, 'w').close()"
PAYLOADS = {
    "os.system": lambda target, script: Payload(os.system, f"touch {target}"),
    "eval": lambda target, script: Payload(eval, CODE.format(str(target))),
    "exec": lambda target, script: Payload(exec, CODE.format(str(target))),
    "open": lambda target, script: Payload(open, str(target), "w"),
    "subprocess.Popen": lambda target, script: Payload(subprocess.Popen, ["touch", str(target)]),
    "shutil.copy": lambda target, script: Payload(shutil.copy, str(script), str(target)),
    "runpy.run_path": lambda target, script: Payload(runpy.run_path, str(script)),
    "timeit.timeit": lambda target, script: Payload(timeit.timeit, CODE.format(str(target)), "pass", time.time, 1),
    "torch.save": lambda target, script: Payload(torch.save, 1, str(target)),
    "in a state": lambda target, script: WithState(Payload(os.system, f"touch {target}")),
}


@pytest.fixture
def target(tmp_path):
    """A file that every payload would write."""
    return tmp_path / "written"


@pytest.fixture(params=PAYLOADS)
def payload(request, target):
    """An object whose pickle writes `target` when it is loaded."""
    script = target.with_name("script.py")
    script.write_text(CODE.format(str(target)))
    return PAYLOADS[request.param](target, script)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["args", "model", "extra_state"])
def test_hostile_pickles_are_refused_and_never_run(tmp_path, payload, target, legacy, place):
    content = {"args": argparse.Namespace(a=1), "model": {"w": torch.zeros(2)}, place: payload}
    path = tmp_path / "evil.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for reader in (read_checkpoint, read_fairseq):
        with pytest.raises(UserError, match=r"pickles .*, which weights do not need; nothing of it was run") as caught:
            reader(path)
        assert "\n" not in str(caught.value)
    assert not target.exists()


class Known:
    """A class that a saved training holds."""

    def __init__(self, number=0):
        self.number = number


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_load_of_others_makes_nothing_but_tensors_and_known_classes(
    tmp_path, payload, target, legacy, monkeypatch
):
    evil, good = tmp_path / "evil.pt", tmp_path / "good.pt"
    for path, extra in ((evil, payload), (good, 1)):
        content = {"w": torch.ones(2), "scaler": Known(3), "extra": extra}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for loader in (torch.load, lambda path: torch.load(path, weights_only=False)):
        with safe_pickle.weights_and([Known], what=tmp_path):
            assert loader(good)["scaler"].number == 3
        with (
            pytest.raises(UserError, match="nothing of it was run") as caught,
            safe_pickle.weights_and([Known], what=tmp_path),
        ):
            loader(evil)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError), safe_pickle.weights_and([], what=tmp_path):
            loader(good)
    assert not target.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    safe_pickle.check_names([good], [Known])
    with pytest.raises(UserError, match=r"evil\.pt pickles .*, which no training of ours has saved"):
        safe_pickle.check_names([good, evil], [Known])
    assert not target.exists()


def test_the_payloads_are_live(payload, target):
    made = pickle.loads(pickle.dumps(payload, protocol=2))
    if hasattr(made, "wait"):
        made.wait()
    assert target.exists()


@pytest.mark.parametrize("protocol", [0, 3, 4, 5])
def test_other_protocols_are_not_run_either(tmp_path, target, protocol):
    payload = Payload(os.system, f"touch {target}")
    torch.save({"args": payload}, tmp_path / "zip.pt", pickle_protocol=protocol)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(payload, protocol=protocol))
    for file in ("zip.pt", "plain.pkl"):
        with pytest.raises(UserError, match=r"posix\.system|cannot be read"):
            read_checkpoint(tmp_path / file)
    assert not target.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_what_fairseq_pickles_is_read(tmp_path, legacy):
    path = save(tmp_path / "model.pt", Gpt(), legacy=legacy)
    content = read_checkpoint(path)
    assert isinstance(content["args"], Inert)
    assert plain(content["args"])["arch"] == "transformer_lm_gpt"
    assert plain(content["extra_state"]["train_meters"]["loss"])["count"] == 3
    assert content["last_optimizer_state"]["state"][0]["exp_avg"].shape == (3,)


def test_numpy_scalars_arrays_and_defaultdicts_are_inert(tmp_path):
    content = {"a": np.float64(3.0), "b": np.arange(4), "c": collections.defaultdict(dict, {1: 2}), "d": {1, 2}}
    torch.save(content, tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt")
    assert isinstance(read["a"], Inert)
    assert isinstance(read["b"], Inert)
    assert (read["c"], read["d"]) == ({1: 2}, {1, 2})


def test_classes_of_deepspeed_and_fairseq_do_nothing(tmp_path):
    touched = []
    with fake_modules(fairseq__meters=["Meter"], deepspeed__tool=["Run"]) as made:
        made["Meter"].__setstate__ = lambda self, state: touched.append(state)
        made["Run"].__init__ = lambda self, *args: touched.append(args)
        meter = made["Meter"]()
        meter.x = 1
        torch.save({"m": meter, "r": Payload(made["Run"], "arguments")}, tmp_path / "x.pt")
        touched.clear()
        read = read_checkpoint(tmp_path / "x.pt")
    assert touched == []
    assert (read["m"].state, read["r"].args) == ({"x": 1}, ("arguments",))


def damaged(path):
    """{what was done: the bytes}."""
    whole = path.read_bytes()
    cuts = {f"cut to {share}": whole[: int(len(whole) * share)] for share in (0.0, 0.1, 0.5, 0.9, 0.999)}
    return cuts | {"text": b"hello\n", "zeros": bytes(1000), "tail": whole[200:], "noise": bytes(range(256)) * 40}


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_are_one_line(tmp_path, legacy):
    path = save(tmp_path / "model.pt", Gpt(), legacy=legacy)
    for content in damaged(path).values():
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.pt") as caught:
            read_checkpoint(tmp_path / "bad.pt")
        assert "\n" not in str(caught.value)


def test_pickles_with_flipped_bytes_are_read_or_refused(tmp_path):
    path = save(tmp_path / "model.pt", Gpt(layers=1), legacy=True)
    whole = bytearray(path.read_bytes())
    draw = np.random.default_rng(0)
    refused = 0
    for place in draw.integers(0, min(len(whole), 6000), 150):
        changed = bytearray(whole)
        changed[place] ^= int(draw.integers(1, 256))
        path.write_bytes(changed)
        try:
            read_checkpoint(path)
        except UserError:
            refused += 1
    assert refused > 30


def test_files_that_are_not_there_or_not_of_torch(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"zip file without data\.pkl"):
        read_checkpoint(tmp_path / "x.zip")
    with pytest.raises(UserError, match="No such file"):
        read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="Is a directory"):
        read_checkpoint(tmp_path)

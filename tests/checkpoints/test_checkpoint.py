import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from ki_ds import files
from ki_ds.checkpoints import checkpoint
from ki_ds.checkpoints.saver import Saver
from ki_ds.errors import UserError
from ki_ds.files import write_atomically, write_json
from tests.tiny import run_ranks, tiny_config, write_config

KILLED = 77


class FakeEngine:
    """An engine whose state is a number, kept in two shards."""

    def __init__(self, state: int = 0, zero_stage: int = 1):
        self.zero_stage = zero_stage
        self.state = state
        self.loaded_world: int | None = None

    def save(self, folder: Path, tag: str, snapshot) -> list:
        (folder / tag).mkdir()
        state = snapshot(self.state)
        shards = [random.Random(state + shard).randbytes(700) + b"\0" * 700 for shard in range(2)]
        return [
            *((folder / tag / f"shard_{n}.pt", lambda path, n=n: path.write_bytes(shards[n])) for n in range(2)),
            (folder / tag / "number", lambda path: path.write_text(str(state))),
        ]

    def load(self, folder: Path, tag: str, *, saved_world: int, saved_stage: int) -> None:
        self.state = int((folder / tag / "number").read_text())
        self.loaded_world, self.loaded_stage = saved_world, saved_stage


def export(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "config.json").write_text("{}")


def save(root, step, *, engine=None, write=export, state=None, keep=2, keep_every=None, in_background=False):
    with Saver(root, keep=keep, keep_every=keep_every, in_background=in_background) as saver:
        saver.save(step, engine or FakeEngine(step), state or {"best_ce": step / 2}, lambda snapshot: write)
    return root / f"step_{step:08d}"


BOTH_WAYS = pytest.mark.parametrize("in_background", [False, True], ids=["at_once", "in_background"])


def names(root):
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def in_a_child(function) -> int:
    """Run `function` in a forked process; its exit code, 0 when it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(moment: int, function) -> int:
    """Run `function` in a child that dies, without any cleaning up, at its `moment`-th change of the disk."""
    seen = 0

    def deadly(original):
        def wrapped(*args, **kwargs):
            nonlocal seen
            if seen == moment:
                os._exit(KILLED)
            seen += 1
            return original(*args, **kwargs)

        return wrapped

    def work():
        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        for name in ("write_text", "write_bytes"):
            setattr(Path, name, deadly(getattr(Path, name)))
        function()

    return in_a_child(work)


def moments(function, prepare):
    """Kill `function` at each of its moments, each time after `prepare()`; yields until it came to its end."""
    for moment in range(200):
        prepare()
        code = killed_at(moment, function)
        assert code in (0, KILLED)
        if code == 0:
            assert moment > 5
            return
        yield moment
    raise AssertionError("never came to its end")


# --- one run a folder ---


def test_a_folder_is_claimed_once_over_processes(tmp_path):
    def refused():
        with pytest.raises(UserError, match="in use by a job that still runs"), checkpoint.claimed(tmp_path / "run"):
            pass

    with checkpoint.claimed(tmp_path / "run"):
        assert in_a_child(refused) == 0
    with checkpoint.claimed(tmp_path / "run"):
        pass


def test_a_killed_job_leaves_no_claim(tmp_path):
    def die():
        with checkpoint.claimed(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(die) == -signal.SIGKILL
    with checkpoint.claimed(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written"), checkpoint.claimed(tmp_path / "file" / "run"):
        pass


# --- saving and loading ---


@BOTH_WAYS
def test_what_is_saved_comes_back(tmp_path, in_background):
    state = {"best_ce": 2.5, "totals": {"step": 40, "seconds": 1.25}}
    folder = save(tmp_path, 40, state=state, in_background=in_background)
    assert folder == tmp_path / "step_00000040"
    assert checkpoint.damage(folder) is None
    assert checkpoint.newest_intact(tmp_path) == folder
    engine = FakeEngine()
    state = checkpoint.load(folder, engine)
    assert state == {
        "best_ce": 2.5,
        "totals": {"step": 40, "seconds": 1.25},
        "step": 40,
        "world_size": 1,
        "zero_stage": 1,
    }
    assert (engine.state, engine.loaded_world) == (40, 1)
    assert (folder / "hf" / "model.safetensors").read_bytes() == b"weights" * 100
    assert (tmp_path / "latest").read_text() == "step_00000040\n"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there - listed.keys() == {"manifest.json"}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(tmp_path, keep):
    for step in (2, 4, 10, 12):
        save(tmp_path, step, keep=keep)
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000010", "step_00000012"][-keep:]
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_milestones_stay_besides_the_newest(tmp_path):
    for step in range(2, 22, 2):
        save(tmp_path, step, keep=2, keep_every=8)
    assert [int(name.removeprefix("step_")) for name in names(tmp_path)] == [8, 16, 18, 20]


def test_the_engine_is_told_what_wrote_its_shards(tmp_path):
    folder = save(tmp_path, 2, engine=FakeEngine(2, zero_stage=3))
    engine = FakeEngine(0, zero_stage=1)
    checkpoint.load(folder, engine)
    assert (engine.state, engine.loaded_world, engine.loaded_stage) == (2, 1, 3)


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    save(tmp_path, 2, state={"best_ce": 1.0})
    save(tmp_path, 2, state={"best_ce": 3.0})
    assert checkpoint.load(tmp_path / "step_00000002", FakeEngine())["best_ce"] == 3.0
    assert checkpoint.damage(tmp_path / "step_00000002") is None


def test_no_checkpoint_yet(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None
    assert checkpoint.newest_intact(tmp_path / "nothing") is None


def test_damaged_newer_ones_do_not_push_out_the_one_just_written(tmp_path):
    """Resumed from step 4 because step 6 is damaged, and saved at another step than before."""
    for step in (4, 6):
        save(tmp_path, step)
    (tmp_path / "step_00000006" / "state.json").unlink()
    save(tmp_path, 5, keep=1)
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step_00000005"


def test_folders_that_others_put_there_are_none_of_its_checkpoints_and_stay(tmp_path):
    save(tmp_path, 4)
    for name in ("step_00000004_copy", "step_old", "step_9"):
        shutil.copytree(tmp_path / "step_00000004", tmp_path / name)
    save(tmp_path, 2, keep=1, keep_every=2)
    assert names(tmp_path) == ["step_00000002", "step_00000004_copy", "step_9", "step_old"]
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step_00000002"
    assert checkpoint.steps(tmp_path) == [2]


def test_steps_of_nine_digits_come_after_those_of_eight(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [99_999_999, 100_000_000]
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step_100000000"


class Disk:
    """Records what is made durable, and how everything was at each rename."""

    def __init__(self, monkeypatch):
        self.synced, self.renames = set(), []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def recorded_fsync(handle):
            self.synced.add(os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        def recorded_rename(source, target):
            inside = {str(path) for path in Path(source).rglob("*")} | {str(source)}
            self.renames.append((Path(target).name, inside - self.synced))
            self.synced.discard(str(Path(target).parent))
            rename(source, target)

        def recorded_replace(source, target):
            self.synced |= {str(target)} if str(source) in self.synced else set()
            replace(source, target)

        monkeypatch.setattr(os, "replace", recorded_replace)
        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "rename", recorded_rename)


def test_a_folder_is_durable_before_it_is_renamed_and_its_name_after_that(tmp_path, monkeypatch):
    def nested(folder: Path) -> None:
        write_files("text")(folder)
        (folder / "more").mkdir()
        (folder / "more" / "file").write_text("text")

    disk = Disk(monkeypatch)
    root = tmp_path / "checkpoints"
    save(root, 2)
    assert disk.renames == [("step_00000002", set())]
    assert {str(root), str(tmp_path)} <= disk.synced
    for _ in range(2):
        checkpoint.replace_folder(tmp_path / "best", nested)
        assert str(tmp_path) in disk.synced
    assert [left for name, left in disk.renames if name == "best"] == [set(), set()]


# --- killed while saving ---


def test_what_a_killed_save_or_start_of_any_step_has_left_goes_with_the_next(tmp_path):
    for name in (".step_00000003.tmp", ".step_00000009.tmp", ".step_00000002.resharded"):
        (tmp_path / name / "engine").mkdir(parents=True)
    save(tmp_path, 4)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@BOTH_WAYS
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_anywhere_in_a_save_a_whole_checkpoint_loads(tmp_path, keep, in_background, record_property):
    """At every mkdir, write, fsync, rename and removal: the one before loads, or the new one, and a next save works."""
    root = tmp_path / "checkpoints"
    before, new = root / "step_00000002", root / "step_00000004"

    def prepare():
        shutil.rmtree(root, ignore_errors=True)
        save(root, 2, keep=keep)

    outcomes = []
    for moment in moments(lambda: save(root, 4, keep=keep, in_background=in_background), prepare):
        newest = checkpoint.newest_intact(root)
        assert newest is not None, moment
        outcomes.append(newest)
        if newest == before:
            assert not new.exists(), f"moment {moment}: something half-written under the final name"
        engine = FakeEngine()
        assert checkpoint.load(newest, engine)["step"] == engine.state == int(newest.name[5:])
        save(root, 4, keep=keep)
        assert checkpoint.newest_intact(root) == new
        assert [p for p in root.iterdir() if p.name.endswith(".tmp")] == []
    how = "in the background" if in_background else "at once"
    record_property("figure", f"{how}: killed at {len(outcomes)} points, {len(outcomes)} resumed")
    assert outcomes == sorted(outcomes)  # from one moment on it is the new one
    assert {before, new} == set(outcomes)


@BOTH_WAYS
@pytest.mark.parametrize("moment", ["engine", "export", "state.json", "manifest.json", "rename", "latest"])
def test_an_error_in_a_save_is_one_line_and_leaves_the_one_before(tmp_path, moment, in_background, monkeypatch):
    save(tmp_path, 2)

    def fails(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    engine, write, write_text = FakeEngine(4), export, write_atomically
    match moment:
        case "engine":
            monkeypatch.setattr(engine, "save", lambda folder, tag, snapshot: [(folder / tag, fails)])
        case "export":
            write = fails
        case "rename":
            monkeypatch.setattr(checkpoint.os, "rename", fails)
        case name:
            for module in (files, checkpoint):
                monkeypatch.setattr(
                    module, "write_atomically", lambda p, text: fails() if p.name == name else write_text(p, text)
                )
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        save(tmp_path, 4, engine=engine, write=write, keep=1, in_background=in_background)
    whole = ["step_00000002"] if moment != "latest" else ["step_00000002", "step_00000004"]
    assert names(tmp_path) == whole
    assert checkpoint.newest_intact(tmp_path) == tmp_path / whole[-1]
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


# --- damage ---


@BOTH_WAYS
def test_every_flipped_bit_is_noticed(tmp_path, in_background, record_property):
    folder = save(tmp_path, 2, in_background=in_background)
    choose = random.Random(0)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert len(files) == 9
    missed = []
    for path in files:
        original = path.read_bytes()
        for _ in range(150):
            data, place, bit = bytearray(original), choose.randrange(len(original)), choose.randrange(8)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            if checkpoint.damage(folder) is None:
                missed.append((path.name, place, bit))
        path.write_bytes(original)
    record_property("figure", f"{9 * 150 - len(missed)}/{9 * 150} flips noticed")
    assert missed == []
    assert checkpoint.damage(folder) is None


@BOTH_WAYS
def test_every_truncated_emptied_or_missing_file_is_noticed_and_named(tmp_path, in_background):
    folder = save(tmp_path, 2, in_background=in_background)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        original = path.read_bytes()
        name = str(path.relative_to(folder))
        for data, words in ((original[:-1], "bytes"), (b"", "bytes"), (None, "is missing")):
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            if name == "manifest.json":
                # its last byte is a line end, which changes nothing
                expected = None if data == original[:-1] else "no readable manifest"
                assert checkpoint.damage(folder) == expected
            else:
                found = checkpoint.damage(folder)
                assert found is not None
                assert name in found
                assert words in found
            path.write_bytes(original)
    assert checkpoint.damage(folder) is None


def test_the_newest_intact_one_is_taken_and_the_damaged_named(tmp_path, capsys):
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_00000006" / "manifest.json").unlink()
    (tmp_path / "step_00000004" / "engine" / "shard_1.pt").write_bytes(b"")
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step_00000002"
    said = capsys.readouterr().out
    for words in ("step_00000006 (no readable manifest)", "step_00000004 (engine/shard_1.pt has 0 of 1400 bytes)"):
        assert words in said
    assert "going on from step_00000002" in said
    assert said.count("\n") == 1


def test_without_an_intact_one_nothing_starts_from_scratch(tmp_path):
    for step in (2, 4):
        (save(tmp_path, step) / "state.json").unlink()
    with pytest.raises(UserError, match=r"holds no intact checkpoint: step_00000004 .*state.json.*step_00000002"):
        checkpoint.newest_intact(tmp_path)


def test_nothing_is_unpickled_to_find_damage(tmp_path, monkeypatch):
    folder = save(tmp_path, 2)
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("torch.load", None)
    monkeypatch.setattr(FakeEngine, "load", None)
    assert checkpoint.newest_intact(tmp_path) == folder


@pytest.mark.parametrize("name", ["../step_00000002/state.json", "/etc/hostname", "engine//number", ".", "a\nb", ""])
def test_a_manifest_that_names_a_file_outside_is_damaged(tmp_path, name):
    folder = save(tmp_path, 2)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    write_json(folder / "manifest.json", {"files": files | {name: [1, "0" * 64]}})
    assert checkpoint.damage(folder) == f"its manifest names {name!r}, which is no file in it"


def test_a_manifest_of_another_shape_is_damaged(tmp_path):
    folder = save(tmp_path, 2)
    for content in ([], {"files": []}, {"files": {"a": 1}}, {"files": {"a": [1]}}, {}):
        (folder / "manifest.json").write_text(json.dumps(content))
        assert checkpoint.damage(folder) == "no readable manifest"


# --- a folder replaced as a whole ---


def write_files(text):
    def write(folder: Path) -> None:
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(text)

    return write


def content(folder):
    return [(folder / name).read_text() for name in "abc"] if folder.exists() else None


def test_a_folder_is_made_and_replaced(tmp_path):
    best = tmp_path / "best"
    for text in ("one", "two"):
        checkpoint.replace_folder(best, write_files(text))
        assert content(best) == [text] * 3
    assert names(tmp_path) == ["best"]
    assert len(list(tmp_path.iterdir())) == 1


def test_killed_anywhere_a_replaced_folder_is_never_half_written(tmp_path):
    best = tmp_path / "best"

    def prepare():
        for folder in list(tmp_path.iterdir()):
            shutil.rmtree(folder)
        checkpoint.replace_folder(best, write_files("old"))

    seen = []
    for _ in moments(lambda: checkpoint.replace_folder(best, write_files("new")), prepare):
        found = content(best)
        if found is None:  # between two renames: the old one is whole under its other name
            assert content(tmp_path / ".best.old") == ["old"] * 3
        else:
            assert found in (["old"] * 3, ["new"] * 3)
        seen.append(found)
        checkpoint.replace_folder(best, write_files("newer"))
        assert content(best) == ["newer"] * 3
        assert len(list(tmp_path.iterdir())) == 1
    assert ["old"] * 3 in seen
    assert ["new"] * 3 in seen


@pytest.mark.parametrize("left", [".best.tmp", ".best.old"])
def test_what_a_killed_replacement_has_left_goes_with_the_next_start(tmp_path, left):
    checkpoint.replace_folder(tmp_path / "best", write_files("new"))
    write_files("left")(tmp_path / left)
    checkpoint.restore_folder(tmp_path / "best")  # of a reader, who may not hold the run
    assert (tmp_path / left).exists()
    checkpoint.clear_folder(tmp_path / "best")
    assert names(tmp_path) == ["best"]
    assert not (tmp_path / left).exists()
    assert content(tmp_path / "best") == ["new"] * 3


# --- a full disk ---


def test_what_the_writers_say_of_a_full_disk_is_one_line(tmp_path):
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
    ):
        with pytest.raises(UserError, match=r"cannot be written .*make room"), checkpoint.naming_a_full_disk(tmp_path):
            raise error
    for other in (FileNotFoundError(2, "No such file"), RuntimeError("shapes differ")):
        with pytest.raises(type(other), match=str(other.args[-1])), checkpoint.naming_a_full_disk(tmp_path):
            raise other


@BOTH_WAYS
@pytest.mark.parametrize("num_offsets", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_in_the_middle_of_a_save(base, num_offsets, in_background, record_property):
    """At offsets from the first byte of the smallest file to the last but one of the largest."""
    how = "in the background" if in_background else "at once"
    name = f"full_{num_offsets}_{in_background}"
    train = {"num_steps": 6, "save_every": 2, "eval_every": 100, "save_in_background": in_background}
    config = tiny_config(base / name, base / "corpus", train=train)
    file = write_config(base / f"{name}.yaml", config)
    offsets = [str(int(8 * 20_000 ** (i / num_offsets))) for i in range(num_offsets)]
    (result,) = run_ranks(["-m", "tests.workers.full_disk", str(file), *offsets], world=1)
    assert result.returncode == 0, result.stderr[-2000:]
    survived = json.loads(result.stdout.splitlines()[-1])
    record_property("figure", f"{how}: {len(survived)}/{num_offsets} full disks survived")
    assert [str(offset) for offset in survived] == offsets, result.stdout

"""Writing a cache: killed and called again, on two ranks, made larger, and what is refused before it is written."""

import resource
import sys

import pytest
import torch

from ki_ds.errors import UserError
from ki_ds.teachers.cache_build import missing_places
from ki_ds.teachers.cache_files import CacheFiles, Manifest
from tests import forked
from tests.teachers.cache_cases import (
    cache_of,
    config_of,
    data_of,
    questions_of,
    reading,
    teacher_of,
)
from tests.tiny import ROOT, environment, run_ranks, tiny_corpus

TINY = 4000  # bytes of a chunk: some ten of them for an epoch


@pytest.fixture
def small(base, tmp_path):
    """A run on a smaller corpus."""
    corpus = tiny_corpus(tmp_path / "corpus", num_documents=30, tokenizer=base / "corpus" / "tokenizer")
    return config_of(base, data={"corpus": str(corpus)})


def signals_of(config, cache, num_steps=4):
    """What the run reads, a tensor a micro-batch."""
    teacher, _ = teacher_of(reading(config, cache))
    questions = questions_of(config)
    return [teacher.signal(questions.micro_batch(number)[3]) for number in range(num_steps * 4)]


def same(first, second):
    return all(
        torch.equal(a.ids_NK, b.ids_NK) and torch.equal(a.probs_NK, b.probs_NK)
        for a, b in zip(first, second, strict=True)
    )


def totals(manifest):
    """(records, rows) of a cache."""
    return tuple(sum(chunk[i] for chunk in manifest.chunks.values()) for i in (1, 2))


def command(base, out, *arguments):
    return ["tools/cache_teacher.py", "--out", str(out), "--config", str(base / "cached.yaml"), *arguments]


def test_the_chunk_size_changes_nothing_but_the_files(base, tmp_path, capsys):
    config = config_of(base)
    one = cache_of(config, tmp_path / "one")
    assert "first chunk after" in capsys.readouterr().out
    many = cache_of(config, tmp_path / "many", chunk_bytes=500)
    said = capsys.readouterr().out
    assert f"32 records for steps 1 to 4 (0 are there), about {totals(one)[1]} rows of 40 bytes" in said
    assert f"{len(many.chunks)} chunks" in said
    assert (len(one.chunks), totals(one)) == (1, totals(many))
    assert len(many.chunks) > 4
    assert same(signals_of(config, tmp_path / "one"), signals_of(config, tmp_path / "many"))
    assert one.key == many.key
    assert one.forward_flops == many.forward_flops


def test_places_are_asked_about_once(base):
    config = config_of(base, data={"mask_variants": 2})
    questions = questions_of(config).of_epochs(4)
    none = CacheFiles([], num_samples=len(questions.train))
    places = missing_places(questions, none)
    size = len(questions.train)
    assert places.tolist() == list(range(2 * size))  # the third and fourth epoch repeat the masks of the first two
    dynamic = questions_of(config_of(base)).of_epochs(2)
    assert missing_places(dynamic, none).tolist() == list(dynamic.places)
    causal = questions_of(config_of(base, "causal")).of_epochs(3)
    assert len(missing_places(causal, CacheFiles([], num_samples=len(causal.train)))) == len(causal.train)


def test_a_cache_is_made_larger_and_keeps_what_it_has(small, tmp_path, capsys):
    config = small
    out = tmp_path / "cache"
    first = cache_of(config, out, chunk_bytes=500)
    before = {name: (out / name).stat().st_mtime_ns for name in first.chunks}
    second = cache_of(config, out, epochs=1, chunk_bytes=TINY)
    size = len(data_of(config).train)
    assert totals(second)[0] == -(-size // 8) * 8
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    cache_of(config, out, epochs=1)
    assert "all records for steps 1 to" in capsys.readouterr().out
    cache_of(config, tmp_path / "whole", epochs=1)
    assert same(signals_of(config, out), signals_of(config, tmp_path / "whole"))


KILLER = """
import os, signal, sys, time
from pathlib import Path
from ki_ds import config as configuration
from ki_ds.teachers.cache_build import build_cache
from tests.teachers.cache_cases import questions_of, recording_of

config, out, chunk_bytes = configuration.load(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for chunks in (1, 4, 9):  # each time it is killed once that many chunks are there
    if not (child := os.fork()):
        sys.stdout = open(os.devnull, "w")  # what it says must not mix with the lines below
        questions = questions_of(config, steps=range(1)).of_epochs(2)
        build_cache(out, questions, recording_of(config, questions), chunk_bytes=chunk_bytes)
        os._exit(0)
    while len(list(out.glob("chunk_*.safetensors"))) < chunks and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(*(f"{path.name}:{path.stat().st_ino}" for path in out.glob("chunk_*.safetensors")), flush=True)
"""


def test_killed_and_called_again(base, small, tmp_path):
    out = tmp_path / "cache"
    arguments = [str(base / "cached.yaml"), str(out), "1000"]
    done = forked.run(
        [sys.executable, "-c", KILLER, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kept = [set(line.split()) for line in done.stdout.splitlines() if line.startswith("chunk_")]
    assert len(kept) == 3
    assert kept[0] < kept[1] < kept[2]  # what was finished is left as it is
    assert Manifest.read(out).chunks == {}
    with pytest.raises(UserError, match="lacks 32 of the 32 records"):  # unfinished: not to be read yet
        teacher_of(reading(small, out))
    (out / "chunk_9.safetensors.tmp").write_bytes(b"half")
    manifest = cache_of(small, out, epochs=2, chunk_bytes=1000)
    assert kept[2] <= {f"{path.name}:{path.stat().st_ino}" for path in out.glob("chunk_*.safetensors")}
    assert len(manifest.chunks) > len(kept[2])
    assert not list(out.glob("*.tmp"))
    whole = cache_of(small, tmp_path / "whole", epochs=2)
    assert totals(manifest) == totals(whole)
    assert same(signals_of(small, out), signals_of(small, tmp_path / "whole"))


def test_two_ranks_write_the_same_records(base, tmp_path):
    config = config_of(base)
    cache_of(config, tmp_path / "one")
    results = run_ranks(command(base, tmp_path / "two"), world=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    manifest = Manifest.read(tmp_path / "two")
    assert len(manifest.chunks) == 2  # something for each
    assert "2 ranks" in results[0].stdout
    assert results[1].stdout == ""
    assert same(signals_of(config, tmp_path / "one"), signals_of(config, tmp_path / "two"))


def refused(match, *arguments, **spec):
    with pytest.raises(UserError, match=match) as caught:
        cache_of(*arguments, **spec)
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_refused(base, tmp_path):
    config = config_of(base)
    cache_of(config, tmp_path / "cache")
    refused(r"made with topk=10, the run has topk=4; give another --out", config, tmp_path / "cache", topk=4)
    refused("made with kind=topk, the run has kind=hidden", config, tmp_path / "cache", kind="hidden")
    refused("made with seed=1, the run has seed=7", config_of(base, seed=7), tmp_path / "cache")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    refused("holds thesis.tex but no cache", config, tmp_path / "thesis")
    (tmp_path / "file").write_text("")
    refused(r"file cannot be written", config, tmp_path / "file")
    assert sorted(p.name for p in (tmp_path / "thesis").iterdir()) == [".lock", "thesis.tex"]


@pytest.mark.parametrize("topk", [0, 321])
def test_k_beyond_the_vocabulary(base, tmp_path, topk):
    refused(rf"--topk {topk} is outside \[1, 320\]", config_of(base), tmp_path / "cache", topk=topk)


def test_two_jobs_do_not_write_one_cache(base, tmp_path):
    import fcntl

    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("is being written by another job", config_of(base), tmp_path / "cache")


def test_a_disk_that_is_too_small_is_refused_before_the_first_chunk(base, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(r"has 0\.0 MB free, 0\.\d MB are needed", config_of(base), tmp_path / "cache", epochs=1)
    assert not list((tmp_path / "cache").glob("chunk_*"))


def test_a_disk_that_fills_up_is_one_line_and_it_goes_on(small, tmp_path):
    config = small
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:  # a chunk of the whole epoch is larger than that
        refused(r"chunk_\d+\.safetensors cannot be written", config, tmp_path / "cache", epochs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").glob("*chunk_*"))
    manifest = cache_of(config, tmp_path / "cache", epochs=1)
    assert totals(manifest)[0] == 8 * -(-len(data_of(config).train) // 8)


def test_a_damaged_chunk_is_named_and_made_again(base, tmp_path):
    config = config_of(base)
    out = tmp_path / "cache"
    manifest = cache_of(config, out, chunk_bytes=500)
    name = sorted(manifest.chunks)[2]
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[:-1])
    refused(rf"{name} is damaged .*; remove it, and call tools/cache_teacher", config, out)
    (out / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing; call tools/cache_teacher"):
        teacher_of(reading(config, out))
    cache_of(config, out, chunk_bytes=500)
    assert (out / name).read_bytes() == whole


def test_rows_of_a_row_less_sample(base, tmp_path):
    """Short samples may have no labelled token at all."""
    config = config_of(base, data={"break_mode": "eos", "mask_probability": 0.02})
    cache_of(config, tmp_path / "cache", chunk_bytes=TINY)
    found = signals_of(config, tmp_path / "cache")
    assert min(len(signal.ids_NK) for signal in found) == 0

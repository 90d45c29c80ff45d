"""The benchmark of growth: it measures what it says, goes on where it was, and shows what a file holds."""

import json
import sys
from dataclasses import asdict

import pytest

from benchmarks import growth


@pytest.fixture
def bench(monkeypatch):
    """The tool as a module."""
    monkeypatch.delenv("KI_DS_RELEASED", raising=False)
    return growth


@pytest.fixture
def command(bench, monkeypatch, capfd, tmp_path):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["growth.py", *map(str, args)])
        code = bench.main()
        out = tmp_path / "out.json"
        return code, *capfd.readouterr(), json.loads(out.read_text()) if out.exists() else None

    return run


@pytest.fixture
def tiny(tmp_path):
    return ["--size", "tiny", "--turns", "2", "--steps", "1", "--num_threads", "1", "--out", tmp_path / "out.json"]


@pytest.mark.slow
def test_a_point_the_loss_and_a_second_call(bench, command, tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(bench.TINY_VALUES, "seq_len", [16])
    code, out, _, written = command(*tiny, "--vary", "seq_len", "loss", "--figure", tmp_path / "out.png")
    assert code == 0
    (point,) = written["points"]
    assert (point["dimension"], point["value"], point["tokens"]) == ("seq_len", 16, 4 * 16)
    assert len(point["seconds"]) == len(point["cpu_seconds"]) == len(point["base_seconds"]) == 2
    assert 0 < point["loss_share"] < 1
    assert 0.7 < point["forecast_mib"] / point["peak_mib"] < 1.3
    assert point["kept_mib"] > 1
    assert point["flops"] < written["base_flops"] < point["nominal_flops"] * 2
    assert [(each["num_rows"], each["num_classes"]) for each in written["loss"]] == [
        (8, 256),
        (16, 512),
        (32, 1024),
        (64, 2048),
    ]
    assert written["loss"][3]["eager_mib"] > 4 * 64 * 2048 / 2**20
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    lines = out.rstrip().splitlines()
    assert any(line.startswith("| tokens a sequence | 16 | ") for line in lines)
    assert lines[-1].startswith("| 64 | 2,048 | 64 | ")

    monkeypatch.setattr(bench, "Ranks", lambda *_: pytest.fail("what is there was measured again"))
    code, out, _, again = command(*tiny, "--vary", "seq_len", "loss")
    assert code == 0
    assert "holds 1 points" in out
    assert again["points"] == written["points"]
    code, _, err, _ = command(*tiny, "--vary", "seq_len", "--turns", "3")
    assert code == 2
    assert "was measured with settings 2 turns" in err


@pytest.mark.slow
def test_ranks_and_a_cache(bench, command, tiny, monkeypatch):
    monkeypatch.setitem(bench.TINY_VALUES, "num_ranks", [2])
    monkeypatch.setitem(bench.TINY_VALUES, "topk", [10])
    code, out, _, written = command(*tiny, "--vary", "num_ranks", "topk")
    assert code == 0
    cache, ranks = written["points"]
    assert (cache["dimension"], ranks["dimension"]) == ("topk", "num_ranks")
    assert cache["flops"] < ranks["flops"] == written["base_flops"]
    assert (cache["tokens"], ranks["tokens"]) == (4 * 32, 2 * 4 * 32)
    assert ranks["base_seconds"] == []
    assert "| ranks | 2 | " in out


def test_a_point_that_would_not_fit_is_left_out(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "free_mib", lambda: 10.0)
    monkeypatch.setattr(bench, "Ranks", lambda *_: pytest.fail("it was started"))
    sweep = bench.Sweep(bench.SIZES["tiny"], 1, 1, 1, 0, "ds_configs/zero1.json", tmp_path)
    point = bench.Point("vocab_size", 320)
    bench.measure(sweep, point, None)
    assert point.left_out.startswith("may need ")
    assert point.left_out.endswith(" MiB, 10 are free")


def test_flops(bench):
    """A cached teacher computes nothing; twice the sequences are twice the FLOPs."""
    size = bench.SIZES["tiny"]
    teacher = bench.account(bench.build(size, size.teacher, seed=2), size)
    online, cached = bench.flops_of(size), bench.flops_of(size, cached=True)
    assert online[0] - cached[0] == pytest.approx(teacher.forward)
    assert online[1] - cached[1] == pytest.approx(2 * teacher.dense_parameters * 4 * 32)
    assert bench.flops_of(bench.replace(size, micro_batch_size=8))[0] == pytest.approx(2 * online[0])


def made_up(bench):
    """Points of a file by hand."""
    seconds = {"seconds": [0.2, 0.1, 0.4], "cpu_seconds": [0.2, 0.2, 0.3], "base_seconds": [0.1, 0.1, 0.1]}
    memory = {"peak_mib": 200.0, "kept_mib": 300.0, "forecast_mib": 190.0, "moment": "update"}
    work = {"flops": 4e9, "nominal_flops": 9e9, "loss_share": 0.25, "tokens": 2048.0, "cores": 2}
    points = [
        bench.Point(name, value, **seconds, **memory, **work) for name in ("seq_len", "topk") for value in (8, 64)
    ]
    points += [
        bench.Point("num_ranks", value, **(seconds | {"base_seconds": []}), **memory, **work) for value in (1, 4)
    ]
    points.append(bench.Point("vocab_size", 262_144, left_out="may need 9 MiB, 1 are free"))
    return points, [bench.LossPoint(8, 256, 1.0, 2.0), bench.LossPoint(64, 2048, 1.5, None)]


def test_a_file_is_shown_and_drawn(bench, command, tmp_path):
    points, loss = made_up(bench)
    shown = {"points": [asdict(p) for p in points], "loss": [asdict(p) for p in loss], "base_flops": 2e9}
    (tmp_path / "there.json").write_text(json.dumps({"machine": "made up", **shown}))
    code, out, _, _ = command("--from", tmp_path / "there.json", "--figure", tmp_path / "out.svg")
    assert code == 0
    lines = out.splitlines()
    assert "machine made up" in lines[1]
    row = "| 200 (100-400) | 200 (200-300) | 2.00 (1.00-4.00) | 2.00 | 4.0 (9.0) | 10,240 | 25% | 200 | 190 | 0.95 "
    row += "| 300 |"
    assert f"| tokens a sequence | 8 {row}" in lines
    row = "|  | 200 (200-300) | 1.00 (1.00-1.50) | 2.00 | 4.0 (9.0) |  | 25% | 200 | 190 | 0.95 | 300 |"
    assert f"| ranks | 4 {row}" in lines
    assert "Left out: vocabulary 262,144: may need 9 MiB, 1 are free" in lines
    assert lines[-2:] == ["| 8 | 256 | 1 | 1 | 2 |", "| 64 | 2,048 | 64 | 2 | left out |"]
    picture = (tmp_path / "out.svg").read_text()
    for words in ("tokens a sequence", "K of a top-K cache", "CPU ms of a rank", "eager logits", "forecast"):
        assert words in picture


def test_what_is_expected_of_each_panel(bench):
    """The line of time goes through the point that computes most in a second; that of ranks is flat."""
    points = [bench.Point("seq_len", value, [second], [second], [0.1], 1.0, 2.0, 3.0, 4.0, flops=flops)
              for value, second, flops in ((8, 0.2, 1e9), (64, 0.4, 4e9))]  # fmt: skip
    points += [bench.Point("num_ranks", value, [9.0], [cpu], flops=1e9) for value, cpu in ((1, 0.1), (4, 0.2))]
    time, memory, ranks, _ = bench.panels(points, [])
    assert time.measured["measured"] == [(8, 200), (64, 400)]
    assert dict(time.expected["as the FLOPs"]) == pytest.approx({8: 100, 64: 400})
    assert (memory.measured["measured"][0], memory.expected["forecast"][0]) == ((8, 2.0), (8, 4.0))
    assert ranks.measured["CPU ms of a rank"] == [(1, 100), (4, 200)]
    assert ranks.expected["as one rank"] == [(1, 100), (4, 100)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--turns", "0"], "--turns 0 must be at least 1"),
        (["--minutes", "0"], "--minutes 0 must be above 0"),
        (["--figure", "x.pdf"], "--figure x.pdf is neither a .png nor an .svg"),
        (["--out", "/nowhere/x.json"], "lies in no folder"),
        (["--from", "/nowhere/x.json"], "cannot be read as results of this tool"),
        (["--from", "x.json", "--out", "y.json"], "give one of them"),
    ],
)
def test_bad_input_is_one_line(command, options, message):
    code, _, err, written = command(*options)
    assert (code, err.count("\n"), written) == (2, 1, None)
    assert message in err

"""Hundreds of damaged settings (a run's YAML, DeepSpeed's JSON, a hostfile): each is refused in one line, or valid."""

import json
import random
from collections.abc import Iterator

import yaml

from ki_ds import config as configuration
from ki_ds.engine import student as engine
from ki_ds.errors import UserError
from ki_ds.jobs.preflight import read_hosts
from tests.tiny import ROOT

RUN = ["--run_dir", "r", "--data.sources", "[{path: a, weight: 1.0}]", "--teacher.path", "t"]
RUN += ["--inherit.schedule", "linear", "--inherit.steps", "10", "--train.global_batch_size", "32"]
OTHERS = (
    None,
    True,
    -1,
    0,
    10**400,
    1e308,
    float("nan"),
    "",
    "x",
    "two words",
    [],
    [[]],
    {},
    {"x": 1},
    "\0",
    "é\u2028",
)
NO_TREES = ["a: &a [*a]", "null", "7", "- a", "\0", "{" * 2000, "a: b: c", "%YAML 9"]


def texts(text: str, draw: random.Random) -> Iterator[str]:
    """A text with flipped bytes, cut, and with lines that are missing, twice, swapped, indented or glued."""
    data = text.encode()
    for place in draw.sample(range(len(data)), min(len(data), 40)):
        flipped = data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]
        yield flipped.decode("utf-8", "surrogateescape")
    for place in draw.sample(range(len(data)), min(len(data), 10)):
        yield data[:place].decode()
    lines = text.splitlines(keepends=True)
    for number in draw.sample(range(len(lines)), min(len(lines), 8)):
        before, line, after = lines[:number], lines[number], lines[number + 1 :]
        for other in ("", line * 2, "  " + line, line.rstrip("\n"), "\t" + line, line.replace(":", "", 1), "- " + line):
            yield "".join([*before, other, *after])
        yield "".join([*after, line, *before])


def trees(tree: dict, draw: random.Random) -> Iterator[dict]:
    """A tree of settings in which one value, at any depth, is another or has another name."""
    for path in paths(tree):
        for other in draw.sample(OTHERS, 3):
            yield changed(tree, path, path[-1], other)
        yield changed(tree, path, f"{path[-1]}_", 1)


def paths(tree: dict, above: tuple = ()) -> Iterator[tuple]:
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def changed(tree: dict, path: tuple, name: str, value: object) -> dict:
    key, rest = path[0], path[1:]
    if rest:
        return {**tree, key: changed(tree[key], rest, name, value)}
    return {**{k: v for k, v in tree.items() if k != key}, name: value}


def refused(read) -> bool:
    """Whether the settings are refused, in one line; whatever else is raised comes out."""
    try:
        read()
    except UserError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    return True


def check(cases, read, folder, record_property, what):
    outcomes = []
    for case in cases:
        (folder / "damaged").write_text(case, encoding="utf-8", errors="surrogateescape")
        outcomes.append(refused(lambda: read(str(folder / "damaged"))))
    figure = f"{len(outcomes)}/{len(outcomes)} {what}: {sum(outcomes)} refused in a line, the others still valid"
    record_property("figure", figure)
    assert len(outcomes) > 80
    assert sum(outcomes) > len(outcomes) / 2


def test_configurations(tmp_path, record_property):
    draw = random.Random(1)
    configuration.save(configuration.parse(RUN), tmp_path / "good.yaml")
    text = (tmp_path / "good.yaml").read_text()
    assert not refused(lambda: configuration.load(tmp_path / "good.yaml"))
    changes = draw.sample(list(trees(yaml.safe_load(text), draw)), 110)
    cases = [*texts(text, draw), *(yaml.safe_dump(tree, allow_unicode=True) for tree in changes)]
    executed = f"run_dir: !!python/object/apply:os.system ['touch {tmp_path}/written']"
    check([*cases, executed, *NO_TREES], configuration.load, tmp_path, record_property, "configurations")
    assert not (tmp_path / "written").exists()


def test_deepspeeds_json(tmp_path, record_property):
    draw = random.Random(2)
    tree = json.loads((ROOT / "ds_configs/zero3_offload.json").read_text())
    run = configuration.parse(RUN)
    top = ("train_batch_size", "gradient_clipping", "fp16", "bf16", "optimizer", "zero_optimisation")
    changes = [*trees(tree, draw), *({**tree, key: other} for key in top for other in OTHERS)]
    cases = [*texts(json.dumps(tree, indent=2), draw), *map(json.dumps, changes), "[" * 100_000, "null", "7"]

    def read(path):
        settings = engine.read_ds_config(path)
        filled = engine.complete_ds_config(settings, run, world=2)
        assert 0 <= engine.zero_stage(filled) <= 3

    check(cases, read, tmp_path, record_property, "DeepSpeed JSON files")


def test_hostfiles(tmp_path, record_property):
    draw = random.Random(3)
    text = "# two nodes\nnode-a.local slots=4\n10.0.0.2   slots=2 # old\nnode-c slots=8\n"
    cases = [*texts(text, draw), "a slots=1" + "0" * 5000, "a slots=-1", "\0 slots=1", "a\u2028b slots=1"]
    check(cases, read_hosts, tmp_path, record_property, "hostfiles")

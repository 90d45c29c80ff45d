import dataclasses

import pytest
import yaml

from ki_ds import config as configuration
from ki_ds.config import RunConfig, parse, parsing
from ki_ds.errors import UserError

BASE = ["--run_dir", "runs/x", "--data.corpus", "corpus"]
INHERITING = [*BASE, "--teacher.path", "runs/t", "--inherit.schedule", "linear", "--inherit.steps", "40"]


def test_layers_later_ones_win(tmp_path):
    (tmp_path / "a.yaml").write_text("optim:\n  lr: 1.0e-3\n  eps: 1.0e-7\ntrain:\n  num_steps: 10\n")
    (tmp_path / "b.yaml").write_text("optim:\n  lr: 2.0e-3\n")
    run = parse([*BASE, "--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--seed=7"])
    assert (run.optim.lr, run.optim.eps, run.train.num_steps, run.seed) == (2e-3, 1e-7, 10, 7)


def test_saved_configuration_loads_as_itself(tmp_path):
    run = parse([*INHERITING, "--train.stop_at_step", "3"])
    configuration.save(run, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.lrr", "1"], ["optim", "lrr"]),
        (["--optim.l", "1"], ["optim.l"]),
        (["--optim.lr", "fast"], ["optim.lr", "fast"]),
        (["--optim.lr", "-1"], ["optim.lr=-1"]),
        (["--optim.lr", "nan"], ["optim.lr", "nan"]),
        (["--task", "seq2seq"], ["task", "seq2seq"]),
        (["--data.seq_len", "4"], ["data.seq_len=4"]),
        (["--train.num_steps", "null"], ["train.num_steps"]),
        (["--data.corpus", "", "--data.sources", "[{path: null}]"], ["data.sources", "path"]),
        (["--data.keep_probability", "0.6", "--data.random_probability", "0.6"], ["add up"]),
        (["--task", "causal", "--data.mask_probability", "0.2"], ["mask_probability", "causal"]),
        (["--train.global_batch_size", "30"], ["global_batch_size=30", "micro_batch_size=16"]),
        (["--inherit.schedule", "linear"], ["needs a teacher"]),
        (["--teacher.path", "t"], ["never be used"]),
        (["--teacher.path", "t", "--inherit.schedule", "linear"], ["neither"]),
        ([*INHERITING[4:], "--inherit.slope", "3"], ["both"]),
        (["--inherit.steps", "5"], ["inherit.steps", "no meaning"]),
        (["--inherit.start_step", "5"], ["inherit.start_step=5", "no meaning"]),
        ([*INHERITING[4:], "--inherit.start_step", "125000"], ["inherit.start_step=125000", "train.num_steps"]),
        ([*INHERITING[4:8], "--inherit.slope", "250001"], ["inherit.slope=250001", "leaves no step", "lower it"]),
        (["--data.mask_probability", "1"], ["data.mask_probability=1", "outside"]),
        (["--run_dir", ""], ["run_dir is empty"]),
        (["--data.corpus", ""], ["neither data.corpus nor data.sources"]),
        (["--data.sources", "[{path: a}]"], ["both data.corpus and data.sources"]),
        (["--data.corpus", "", "--data.sources", "[]"], ["data.sources is empty"]),
        (["--data.corpus", "", "--data.sources", "[{path: a, wieght: 1}]"], ["data.sources", "wieght"]),
        (["--data.corpus", "", "--data.sources", "[{path: a, weight: 1}, {path: b}]"], ["weights [1.0, None]"]),
        (["--data.corpus", "", "--data.sources", "[{path: a, weight: 0}]"], ["data.sources.0.weight=0"]),
        (["--data.corpus", "", "--data.sources", "[{path: a}, {path: b, fraction: 1.5}]"], ["sources.1.fraction=1.5"]),
        (["--data.valid", "{}"], ["data.valid is empty"]),
        (["--data.valid", "{a: b}", "--data.valid_fraction", "0.1"], ["data.valid_fraction=0.1", "no meaning"]),
        (["--data.long_lines", "drop", "--data.break_mode", "none"], ["data.long_lines=drop", "no meaning"]),
        (["--teacher.placement", "ranks"], ["teacher.placement=ranks", "give teacher.path"]),
        (["--model.name", "no/such_folder", "--model.num_layers", "3"], ["model.num_layers can only change a preset"]),
        (["--data.valid_fraction", "1"], ["data.valid_fraction=1"]),
        (["--task", "causal", "--data.whole_words", "true"], ["whole_words", "causal"]),
        (["--config", "/does/not/exist.yaml"], ["/does/not/exist.yaml"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, words):
    with pytest.raises(UserError) as caught:
        parse([*BASE, *arguments])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def mixture(tmp_path, *sources):
    run = {"run_dir": "runs/x", "data": {"sources": list(sources), "valid": {"WB": "v"}}}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(run))
    return parse(["--config", str(tmp_path / "mixture.yaml")])


def test_a_mixture_is_saved_and_compared_source_by_source(tmp_path):
    run = mixture(tmp_path, {"path": "a", "weight": 1, "half": "A"}, {"path": "b", "weight": 2})
    assert [source.path for source in run.data.all_sources] == ["a", "b"]
    configuration.save(run, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == run
    moved = mixture(tmp_path, {"path": "moved/a", "weight": 1, "half": "A"}, {"path": "b", "weight": 2})
    assert configuration.differences(run, moved) == {}  # what is in there is compared by hash
    other = mixture(tmp_path, {"path": "a", "weight": 1, "half": "B"})
    changed = configuration.differences(run, other)
    assert changed["data.sources.0.half"] == ("A", "B")
    assert changed["data.sources.1.weight"] == (2.0, None)
    assert parse(BASE).data.all_sources == [configuration.SourceConfig("corpus")]


def test_an_unknown_key_in_a_file_is_refused_with_its_name(tmp_path):
    (tmp_path / "a.yaml").write_text("optim:\n  learning_rate: 1.0e-3\n")
    with pytest.raises(UserError, match="learning_rate"):
        parse([*BASE, "--config", str(tmp_path / "a.yaml")])


def test_every_field_is_explained_in_the_help():
    text = " ".join(parsing._parser().format_help().split())
    for group in (RunConfig, *(f.default_factory for f in dataclasses.fields(RunConfig))):
        if group is dataclasses.MISSING:
            continue
        documented = group.__doc__.split("Args:")[1]
        for item in dataclasses.fields(group):
            if item.default_factory is dataclasses.MISSING:
                assert f" {item.name}: " in documented, (group, item.name)
    for word in ("peak learning rate", "T_inherit", "Table 6", "tokens in a block"):
        assert word in text


def test_differences_name_only_what_changes_the_result(tmp_path):
    old = parse(INHERITING)
    new = parse([*INHERITING, "--optim.lr", "1e-3", "--train.micro_batch_size", "8", "--train.log_every", "3"])
    assert configuration.differences(old, new) == {"optim.lr": (5e-4, 1e-3)}

from ki_ds import config as configuration
from ki_ds.config import parse

BASE = ["--run_dir", "runs/x", "--data.corpus", "corpus"]


def test_slope_is_the_papers_definition():
    arguments = [*BASE, "--teacher.path", "t", "--inherit.schedule", "linear", "--inherit.slope", "3.125"]
    assert configuration.inherit_steps(parse(arguments)) == 40_000

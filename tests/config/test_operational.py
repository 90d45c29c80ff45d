import pytest

from ki_ds.config.operational import is_operational


@pytest.mark.parametrize(
    "name", ["run_dir", "teacher.path", "data.sources.3.path", "teachers.0.path", "train.log_every"]
)
def test_how_a_run_is_carried_out_may_change(name):
    assert is_operational(name)


@pytest.mark.parametrize(
    "name", ["seed", "optim.lr", "data.sources.0.weight", "teacher.topk", "train.num_steps", "train.spike_sigmas"]
)
def test_what_it_computes_may_not(name):
    assert not is_operational(name)

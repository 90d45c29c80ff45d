import pytest

from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    def main():
        raise UserError("data.seq_len=600 exceeds\n 512;  lower it")

    assert ends_cleanly(main)() == 2
    assert capsys.readouterr().err == "error: data.seq_len=600 exceeds 512; lower it\n"


def test_other_errors_keep_their_traceback():
    def main():
        raise ValueError("a defect of ours")

    with pytest.raises(ValueError, match="a defect"):
        ends_cleanly(main)()


def test_success_and_codes_pass_through():
    assert ends_cleanly(lambda: None)() == 0
    assert ends_cleanly(lambda: 3)() == 3

import warnings

import pytest
import typer

from experiments.launch.one_line_errors import report_errors_in_one_line


def test_only_what_other_packages_warn_of_by_themselves_is_not_shown():
    def command():
        warnings.warn("`torch.jit.script` is deprecated. Please switch", FutureWarning, stacklevel=1)
        warnings.warn("your layer goes to the base", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="goes to the base") as shown:
        report_errors_in_one_line(command)
    assert [str(each.message) for each in shown] == ["your layer goes to the base"]


def interrupted():
    raise KeyboardInterrupt


def interrupted_by_typer():
    """The same from a command of Typer's, which ends by itself then."""
    app = typer.Typer()
    app.command()(interrupted)
    app([])


@pytest.mark.parametrize("command", [interrupted, interrupted_by_typer])
def test_ctrl_c_says_that_the_same_command_goes_on(capsys, command):
    with pytest.raises(SystemExit) as ended:
        report_errors_in_one_line(command)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last checkpoint\n"

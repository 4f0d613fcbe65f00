"""How commands end."""

import pytest

from nanogpt.command import run_command


def failing(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("too long\nwith more"), "a.command: too long\n"),
        (OSError(), "a.command: OSError\n"),  # says nothing of itself
    ],
)
def test_what_goes_wrong_is_said_in_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("a.command", lambda: failing(error)) == 1
    assert capsys.readouterr().err == said


def test_an_interrupted_command_says_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command("a.command", lambda: failing(KeyboardInterrupt()), interrupted="again")
    assert code == 130
    assert capsys.readouterr().err == "a.command: again\n"


def test_a_mistake_of_the_program_is_not_swallowed() -> None:
    with pytest.raises(KeyError):
        run_command("a.command", lambda: failing(KeyError("x")))

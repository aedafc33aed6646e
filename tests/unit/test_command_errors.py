"""How commands end."""

import pytest

from hdm_lightning.cli.errors import run_command
from hdm_lightning.errors import UserError


def fail() -> None:
    raise UserError("is wrong", where="some.key", hint="make it right")


def test_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3
    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: some.key: is wrong\n  hint: make it right\n"


def test_the_stack_trace_is_there_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDM_TRACEBACK", "1")
    with pytest.raises(UserError):
        run_command(fail)


def test_defects_keep_their_stack_trace() -> None:
    def defect() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_command(defect)


def test_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_command(interrupt) == 130

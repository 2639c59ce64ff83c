from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

import onnx_kfe.console as console
from onnx_kfe._tables import _bytes, _ms, _si
from onnx_kfe.console import ShownProgress, print_error, print_json, print_line


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 80 columns is sent on stderr."""
    text = io.StringIO()
    monkeypatch.setattr(console, "_err", Console(file=text, force_terminal=True, width=80, markup=False))
    monkeypatch.setattr(console, "_PATIENCE", 0.3)
    return text


def test_a_bar_for_a_stage_that_takes_long(terminal: io.StringIO) -> None:
    with ShownProgress().stage("collecting", 10) as advance:
        advance(4)
        time.sleep(0.7)
        advance(6)
    assert "collecting" in terminal.getvalue()
    assert "4/10" in terminal.getvalue()


def test_a_bar_for_a_stage_without_steps(terminal: io.StringIO) -> None:
    with ShownProgress().stage("planning"):
        time.sleep(0.7)
    assert "planning" in terminal.getvalue()


def test_no_bar_for_a_stage_that_is_over_at_once(terminal: io.StringIO) -> None:
    with ShownProgress().stage("collecting", 10) as advance:
        advance(10)
    assert "collecting" not in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


def test_no_bar_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "_PATIENCE", 0.0)
    with ShownProgress().stage("collecting", 10) as advance:
        advance(5)
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "")


def test_names_are_no_markup_and_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/[bold]/:smile:/" + 100 * "long "
    print_line(name)
    ShownProgress().note(name)
    print_error(f"layer {name}\n  is   wrong")
    out, err = capsys.readouterr()
    assert out == name + "\n"
    note, error = err.splitlines()
    assert note == name
    assert error == f"error: layer {name}is wrong"


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    assert capsys.readouterr().out == '{\n "a": [\n  1,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        print_json(float("nan"))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (1234, "1.23 k"),
        (999_600, "1 M"),
        (33.4e9, "33.4 G"),
        (5e15, "5e+03 T"),
    ],
)
def test_numbers_of_three_digits(count: float, text: str) -> None:
    assert _si(count) == text


def test_units() -> None:
    assert (_bytes(12), _bytes(2_500_000)) == ("12 B", "2.5 MB")
    assert (_ms(0.0123), _ms(2.5)) == ("12.3 ms", "2.5 s")

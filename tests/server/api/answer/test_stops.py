"""Stop strings, found however the text is cut."""

import itertools

import pytest

from server.api.answer.stops import StopScanner


def scan(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    text = "".join(scanner.push(piece) for piece in pieces)
    return text + scanner.flush(), scanner.is_stopped


def all_cuts(text: str) -> list[list[str]]:
    cuts = []
    for marks in itertools.product([False, True], repeat=len(text) - 1):
        pieces = [text[0]]
        for is_cut, char in zip(marks, text[1:], strict=True):
            if is_cut:
                pieces.append(char)
            else:
                pieces[-1] += char
        cuts.append(pieces)
    return cuts


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abSTOPcd", ["STOP"], "ab"),
        ("SSTOPx", ["STOP"], "S"),
        ("STOSTOPx", ["STOP"], "STO"),
        ("abcdef", ["bcd", "c"], "ab"),
        ("xabcd", ["abcd", "bc"], "xa"),
        ("xabcy", ["abc", "bc"], "x"),
        ("aababx", ["abab"], "a"),
        ("abSTO", ["STOP"], "abSTO"),
        ("a👋bc", ["👋b"], "a"),
        ("abc", [], "abc"),
        ("abc", ["abcd", "cx"], "abc"),
    ],
)
def test_the_text_before_a_stop_string_is_the_same_at_every_cut(
    text: str, stops: list[str], expected: str
) -> None:
    for pieces in all_cuts(text):
        assert scan(pieces, stops) == (expected, expected != text), pieces


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    scanner = StopScanner(["STOP"])
    assert scanner.push("hello S") == "hello "
    assert scanner.push("un") == "Sun"
    assert scanner.push("ny") == "ny"


def test_nothing_follows_a_stop_string() -> None:
    scanner = StopScanner(["x"])
    assert scanner.push("axb") == "a"
    assert scanner.push("more") == ""
    assert scanner.flush() == ""

"""A contained fault is delivered once, and what follows goes on."""

import pytest

from server.engine.faults import Contained


def test_a_fault_is_delivered_and_the_rest_goes_on() -> None:
    delivered: list[Exception] = []
    with Contained(delivered.append) as attempt:
        raise ValueError("damaged")
    assert attempt.failed
    assert [str(error) for error in delivered] == ["damaged"]


def test_a_body_without_a_fault_delivers_nothing() -> None:
    delivered: list[Exception] = []
    with Contained(delivered.append) as attempt:
        pass
    assert not attempt.failed
    assert delivered == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_what_ends_the_process_passes_through(error: BaseException) -> None:
    delivered: list[Exception] = []
    with pytest.raises(type(error)), Contained(delivered.append):
        raise error
    assert delivered == []

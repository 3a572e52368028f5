import pytest

from streaming.fills import TicketOffice


def test_a_ticket_is_void_once_its_slot_is_issued_again_or_revoked() -> None:
    office = TicketOffice()
    first = office.issue(3, 0)
    other = office.issue(3, 1)
    second = office.issue(3, 0)
    assert not office.enter(first)
    assert office.enter(second)
    office.leave(second)
    office.revoke(3, 0)
    assert not office.enter(second)
    assert office.enter(other)


def test_a_slot_is_written_until_the_writer_inside_leaves_and_cannot_be_issued() -> None:
    office = TicketOffice()
    ticket = office.issue(0, 0)
    assert office.enter(ticket)
    office.revoke(0, 0)
    assert office.is_written(0, 0)
    assert not office.is_written(0, 1)
    with pytest.raises(AssertionError, match="late read"):
        office.issue(0, 0)
    office.leave(ticket)
    assert not office.is_written(0, 0)
    assert not office.enter(ticket), "it was void before the writer left"
    assert office.num_writers() == 0
    office.issue(0, 0)


def test_who_is_inside_when_the_bank_becomes_other_memory_holds_none_of_its_slots() -> None:
    office = TicketOffice()
    late, other = office.issue(1, 0), office.issue(2, 0)
    assert office.enter(late)
    assert office.enter(other)
    office.renew(1)
    assert not office.is_written(1, 0)
    assert office.is_written(2, 0)
    assert not office.enter(late)
    new = office.issue(1, 0)
    assert office.enter(new)
    office.leave(late)
    assert office.is_written(1, 0)
    office.leave(new)
    office.leave(other)
    assert office.num_writers() == 0

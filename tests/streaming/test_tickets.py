import threading

from streaming.tickets import TicketOffice


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


def test_revoking_waits_for_the_writer_inside() -> None:
    office = TicketOffice()
    ticket = office.issue(0, 0)
    assert office.enter(ticket)
    revoked = threading.Event()

    def revoke() -> None:
        office.revoke(0, 0)
        revoked.set()

    thread = threading.Thread(target=revoke)
    thread.start()
    assert not revoked.wait(0.05)
    office.leave(ticket)
    assert revoked.wait(5)
    thread.join()
    assert office.num_writers() == 0

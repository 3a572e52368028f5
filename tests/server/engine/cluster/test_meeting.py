"""Machines of a cluster find each other, and only those that compute the same are let in."""

import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from config.errors import ClusterError, UsageError
from server.engine.cluster import meeting, wire
from server.engine.cluster.meeting import free_address, gather, knock
from server.engine.cluster.rank_messages import Beat, Gone, Introduction, Loaded, RankMessage
from server.engine.cluster.wire import Wire
from server.link.messages import ClusterConfig
from tests.waiting import wait_until

FACTS = {"version of glmserve": "1", "file config.json": "2 bytes, ab"}


@pytest.fixture
def clusters() -> list[ClusterConfig]:
    """One cluster as its three machines see it."""
    addresses = tuple(free_address("127.0.0.1:0") for _ in range(3))
    return [ClusterConfig(addresses, node, "k" * 16, "1") for node in range(3)]


def come(cluster: ClusterConfig, facts: Mapping[str, str] = FACTS) -> "Future[Wire]":
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(knock, cluster, Introduction(cluster.node, f"address {cluster.node}", facts))


def meet(clusters: list[ClusterConfig], *, is_again: bool = False) -> "Future[list[meeting.Guest]]":
    pool = ThreadPoolExecutor(1)
    met = pool.submit(gather, clusters[0], FACTS, lambda text: None, is_again=is_again)
    pool.shutdown(wait=False)
    return met


def test_machines_are_numbered_as_in_the_list_whoever_comes_first(clusters: list[ClusterConfig]) -> None:
    met = meet(clusters)
    come(clusters[2])
    come(clusters[1])
    assert [guest.address for _, guest in met.result(10)] == ["address 1", "address 2"]


@pytest.mark.parametrize("name", FACTS)
def test_a_machine_that_computes_otherwise_is_refused_by_name(
    clusters: list[ClusterConfig], name: str
) -> None:
    met = meet(clusters)
    come(clusters[1], FACTS | {name: "another"})
    with pytest.raises(UsageError, match=f"{clusters[0].addresses[1]} cannot be .* its {name} is another"):
        met.result(10)


def test_who_has_not_the_key_is_told_so_and_keeps_nobody_out(clusters: list[ClusterConfig]) -> None:
    met = meet(clusters)
    stranger = ClusterConfig(clusters[0].addresses, 1, "another key that is long", "1")
    with pytest.raises(UsageError, match="has another --cluster-key"):
        knock(stranger, Introduction(1, "", FACTS))
    host, port = clusters[0].addresses[0].split(":")
    with socket.create_connection((host, int(port))):  # says nothing
        come(clusters[1])
        come(clusters[2])
        assert len(met.result(10)) == 2


@pytest.mark.parametrize("lost", ["gone", "another version"])
def test_a_group_that_starts_again_goes_on_without_a_machine_that_is_lost(
    clusters: list[ClusterConfig], monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(meeting, "REJOIN_S", 0.3)
    met = meet(clusters, is_again=True)
    if lost != "gone":
        come(clusters[1], FACTS | {"version of glmserve": lost})
    come(clusters[2])
    assert [guest.node for _, guest in met.result(10)] == [2]


def wires() -> tuple[Wire, Wire]:
    ours, theirs = socket.create_server(("127.0.0.1", 0)), socket.socket()
    theirs.connect(ours.getsockname())
    with ThreadPoolExecutor(1) as pool, ours:
        other = pool.submit(Wire, theirs, "k" * 16, answers_first=True)
        return Wire(ours.accept()[0], "k" * 16, answers_first=False), other.result(10)


def test_a_rank_that_says_nothing_is_noticed_and_one_that_beats_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "BEAT_S", 0.05)
    monkeypatch.setattr(wire, "SILENCE_S", 0.5)
    one, other = wires()
    heard: list[RankMessage] = []
    other.watch(lambda message: None)  # it beats
    one.watch(heard.append)
    other.send(Loaded())
    time.sleep(0.8)
    assert heard == [Loaded()]
    with other._lock:  # as a process that is stopped
        wait_until(lambda: len(heard) == 2)
    assert heard[1:] == [Gone("has said nothing for 0.5 s")]


def test_the_end_of_a_rank_is_heard_with_its_words() -> None:
    one, other = wires()
    other.send(Gone("has failed: no memory"))
    other.close()
    assert one.receive() == Gone("has failed: no memory")
    assert one.receive() == Gone("has ended")
    with pytest.raises(ClusterError, match="a rank of the cluster has ended"):
        send_on(one)


def send_on(one: Wire) -> None:
    """Sends until the system has noticed that nobody reads."""
    for _ in range(100):
        one.send(Beat())
        time.sleep(0.01)

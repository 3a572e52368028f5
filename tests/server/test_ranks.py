"""Who is in a cluster, as flags and a file say it."""

import json
from pathlib import Path
from typing import Any

import pytest

from config.errors import UsageError
from server.cli import main, parse_settings
from server.commands.checkpoint import POCKET
from server.commands.serve import make_engine_config
from server.link.child import start_follower
from server.ranks import make_cluster

LOCAL = [["127.0.0.1:9400"], ["127.0.0.1:9401"], ["127.0.0.1:9402"]]
REMOTE = [["10.0.0.1:9400"], ["10.0.0.2:9400"]]
KEY = ("--cluster-key", "0123456789abcdef")


def nodes(tmp_path: Path, hosts: object) -> list[str]:
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    return ["--nodes", str(tmp_path / "hosts.json")]


def test_without_nodes_there_is_no_cluster() -> None:
    assert make_cluster(parse_settings([])) is None


def test_ranks_of_this_machine_are_started_here_with_a_key_of_their_own(tmp_path: Path) -> None:
    clusters = [make_cluster(parse_settings(nodes(tmp_path, LOCAL[:2]))) for _ in range(2)]
    assert [cluster.started for cluster in clusters if cluster] == [(1,), (1,)]
    keys = {cluster.key for cluster in clusters if cluster}
    assert len(keys) == 2
    assert all(len(key) > 16 for key in keys)
    assert not any(key in repr(clusters) for key in keys)


def test_ranks_that_are_started_by_hand_have_the_key_that_was_given(tmp_path: Path) -> None:
    cluster = make_cluster(parse_settings([*nodes(tmp_path, REMOTE), "--rank", "1", *KEY]))
    assert cluster is not None
    assert (cluster.node, cluster.started, cluster.key) == (1, (), KEY[1])


@pytest.mark.parametrize(
    ("hosts", "flags", "message"),
    [
        (REMOTE, [], "--cluster-key"),
        (LOCAL, ["--rank", "0"], "--cluster-key"),
        (LOCAL, ["--rank", "3", *KEY], "has ranks 0 to 2"),
        ([["10.0.0.1:9400"]], KEY, "no list of two or more machines"),
        (["10.0.0.1:9400", "10.0.0.2:9400"], KEY, "no list of two or more machines"),
        ([["[::1]:9400"], ["10.0.0.2:9400"]], KEY, "no list of two or more machines"),
        ([["10.0.0.1"], ["10.0.0.2:9400"]], KEY, "no list of two or more machines"),
        ({"hosts": []}, KEY, "no list of two or more machines"),
        ([*LOCAL, LOCAL[1]], (), "has 127.0.0.1:9401 twice"),
        ([["127.0.0.1:9400"], ["127.0.0.1:99401"]], (), "127.0.0.1:99401 has no port from 1 to 65535"),
        ([["127.0.0.1:0"], ["127.0.0.1:9401"]], (), "127.0.0.1:0 has no port from 1 to 65535"),
    ],
)
def test_what_makes_no_cluster_is_refused(
    tmp_path: Path, hosts: object, flags: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_cluster(parse_settings([*nodes(tmp_path, hosts), *flags]))


def test_a_rank_without_nodes_is_refused() -> None:
    with pytest.raises(UsageError, match="--rank is a place in --nodes"):
        make_cluster(parse_settings(["--rank", "1"]))


@pytest.mark.slow
def test_a_rank_at_an_address_of_another_machine_ends_with_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = [["127.0.0.1:9400"], ["192.0.2.1:9400"]]  # an address that no machine has
    settings = parse_settings([*nodes(tmp_path, elsewhere), "--rank", "1", *KEY])
    rank = start_follower(make_engine_config(settings, POCKET))
    assert rank.wait(30) == 2
    rank.communicate()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "this machine cannot listen on 192.0.2.1:9400" in lines[0]


def test_the_plan_of_a_cluster_is_that_of_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*flags: str) -> Any:
        assert main(["plan", str(POCKET), "--json", "--ram-budget", "2G", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    one, two = plan(), plan(*nodes(tmp_path, LOCAL[:2]))
    assert (one["num_experts"], two["num_experts"]) == (2 * two["num_experts"], one["num_experts"] // 2)
    assert two["lines"]["experts"] * 2 == one["lines"]["experts"]
    assert one["forecast"]
    assert two["forecast"] is None

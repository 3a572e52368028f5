"""The flags of a cluster: who is in it, and `glmserve --rank N`, which follows rank 0 and serves nobody."""

import json
import logging
import re
import secrets
import signal
import subprocess
import time
from pathlib import Path

from config.errors import UsageError
from config.settings import Settings
from server.api.access.guard import is_loopback
from server.link.child import end_processes, start_follower
from server.link.messages import ClusterConfig, EngineConfig
from server.version import VERSION

# Pause before a rank that has ended is started again.
AGAIN_S = 1.0
NEEDS_A_PERSON = 2

log = logging.getLogger(__name__)


def make_cluster(settings: Settings) -> ClusterConfig | None:
    """The cluster of these settings. Raises UsageError where they do not make one."""
    if settings.nodes is None:
        if settings.rank is not None:
            raise UsageError("--rank is a place in --nodes: give both")
        return None
    addresses = read_nodes(settings.nodes)
    node = settings.rank or 0
    if node >= len(addresses):
        raise UsageError(f"--rank {node}: {settings.nodes} has ranks 0 to {len(addresses) - 1}")
    others = range(1, len(addresses))
    started = tuple(n for n in others if is_loopback(_host(addresses[n]))) if settings.rank is None else ()
    if settings.cluster_key is None and len(started) < len(others):
        raise UsageError(
            "ranks that are not started here prove with a --cluster-key that they belong to this server: "
            "give all machines the same, of 16 letters or more (better as GLMSERVE_CLUSTER_KEY)"
        )
    return ClusterConfig(addresses, node, settings.cluster_key or secrets.token_hex(), VERSION, started)


def read_nodes(path: Path) -> tuple[str, ...]:
    """The addresses in a file of hosts, in the form that MLX's ring takes."""
    try:
        hosts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--nodes {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--nodes {path} is no JSON: {error}") from error
    if not isinstance(hosts, list) or len(hosts) < 2 or not all(_is_node(host) for host in hosts):
        raise UsageError(
            f'--nodes {path} is no list of two or more machines; write [["10.0.0.1:9400"], ["10.0.0.2:9400"]]'
        )
    addresses = tuple(host[0] for host in hosts)
    for number, address in enumerate(addresses):
        if address in addresses[:number]:
            raise UsageError(f"--nodes {path} has {address} twice; give each rank an address of its own")
        if not 0 < int(address.rpartition(":")[2]) < 2**16:
            raise UsageError(f"--nodes {path}: {address} has no port from 1 to 65535")
    return addresses


def _is_node(host: object) -> bool:
    if not isinstance(host, list) or len(host) != 1 or not isinstance(host[0], str):
        return False
    return re.fullmatch(r"[\w.-]+:[0-9]{1,5}", host[0]) is not None


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def follow(config: EngineConfig) -> int:
    """Follows rank 0, again and again, until this process is told to stop or a person must act."""
    assert config.cluster is not None, "only machines of a cluster follow"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log.info("rank %d of the cluster, led by %s", config.cluster.node, config.cluster.addresses[0])
    process: subprocess.Popen[bytes] | None = None
    try:
        while True:
            process = start_follower(config)
            if process.wait() == NEEDS_A_PERSON:
                return NEEDS_A_PERSON
            time.sleep(AGAIN_S)
    except KeyboardInterrupt:
        return 0
    finally:
        end_processes([process] if process else [])

"""How much memory can be had, as the system's files tell it."""

from pathlib import Path

import pytest

from config.sizes import physical_memory_bytes
from server.engine.apple import pressure_level, uncompressed_and_compressed_bytes
from server.engine.memory.pressure import LinuxRoom, Room, choose_room, kernel_room

MB = 2**20
MEMINFO = "MemTotal: 131072 kB\nMemFree: 1024 kB\nMemAvailable: 65536 kB\nHugePages_Total: 0\n"
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
SECOND = ("memory.max", "memory.current", "")


def machine(root: Path, cgroup: str = "") -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    halves = "".join(f"{names[2]}{name}_file {cached // 2}\n" for name in ("active", "inactive"))
    own = "active_file 1\ninactive_file 1\n" if names[2] else ""
    (folder / "memory.stat").write_text(f"{own}anon 5\n{halves}")


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/user.slice\n")
    group(root / "sys/fs/cgroup/user.slice", SECOND, "max", 5 * MB, 0)
    assert LinuxRoom(root)() == Room(64 * MB, 128 * MB)


@pytest.mark.parametrize(
    ("lines", "mount", "names"),
    [
        ("5:cpu:/x\n4:memory:/a/b\n0::/\n", "sys/fs/cgroup/memory", FIRST),
        ("0::/a/b\n", "sys/fs/cgroup", SECOND),
    ],
)
def test_a_limit_counts_wherever_it_is_set_and_page_cache_is_free(
    tmp_path: Path, lines: str, mount: str, names: tuple[str, str, str]
) -> None:
    root = machine(tmp_path, lines)
    group(root / mount / "a/b", names, "9223372036854771712", 3 * MB, 0)
    group(root / mount / "a", names, str(20 * MB), 18 * MB, 6 * MB)
    room = LinuxRoom(root)
    assert room() == Room(8 * MB, 20 * MB)
    group(root / mount / "a/b", names, str(10 * MB), 9 * MB, 2 * MB)
    assert room() == Room(3 * MB, 10 * MB)
    group(root / mount / "a/b", names, str(10 * MB), 11 * MB, 0)
    assert room() == Room(0, 10 * MB), "never below nothing"


def test_the_tightest_is_the_one_that_is_nearest_to_its_reserve(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n")
    group(root / "sys/fs/cgroup/a", SECOND, str(100 * MB), 35 * MB, 0)
    room = LinuxRoom(root)()
    assert room == Room(64 * MB, 128 * MB), "65 MB of 100 MB is farther from the last 64th than 64 of 128"


def test_in_a_container_the_group_that_is_mounted_is_its_own(tmp_path: Path) -> None:
    root = machine(tmp_path, "7:memory:/docker/0123\n")
    group(root / "sys/fs/cgroup/memory", FIRST, str(10 * MB), 4 * MB, 0)
    assert LinuxRoom(root)() == Room(6 * MB, 10 * MB)


def test_a_group_that_vanishes_is_no_limit_and_no_files_are_no_answer(tmp_path: Path) -> None:
    root = machine(tmp_path / "a", "0::/a\n")
    group(root / "sys/fs/cgroup/a", SECOND, str(10 * MB), 4 * MB, 0)
    room = LinuxRoom(root)
    (root / "sys/fs/cgroup/a/memory.current").unlink()
    assert room() == Room(64 * MB, 128 * MB)
    assert LinuxRoom(tmp_path / "nothing")() is None


def test_this_machine_has_an_answer() -> None:
    room = choose_room()()
    assert room
    assert 0 < room.available_bytes <= room.total_bytes <= physical_memory_bytes()


@pytest.mark.parametrize(
    ("uncompressed", "compressed", "level", "is_short"),
    [(140, 100, 1, False), (99, 100, 1, True), (120, 100, 2, True), (400, 0, 1, False), (10, 40, 4, True)],
)
def test_macos_is_short_by_the_kernels_rule(
    uncompressed: int, compressed: int, level: int, is_short: bool
) -> None:
    total = physical_memory_bytes()
    part = total // 1000
    room = kernel_room((uncompressed * part, compressed * part), level)
    assert room.is_short == is_short
    given = max(0, -room.spare_bytes)
    assert uncompressed * part + given > 0.6 * (uncompressed * part + given + compressed * part)
    assert room.warns_early


def test_where_macos_tells_no_bytes_its_level_asks_for_little_at_a_time() -> None:
    total = physical_memory_bytes()
    assert not kernel_room(None, 1).is_short
    assert kernel_room(None, 1).spare_bytes > 0
    for level in (2, 4):
        assert kernel_room(None, level).is_short
        assert 0 < -kernel_room(None, level).spare_bytes < total // 100
    assert pressure_level("linux") == 1, "nothing is asked elsewhere"
    assert uncompressed_and_compressed_bytes("linux") is None

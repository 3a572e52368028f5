"""How much memory can be had, as the system's files tell it."""

from pathlib import Path

import pytest

from config.sizes import physical_memory_bytes
from server.engine.apple import pressure_level
from server.engine.memory.pressure import LinuxRoom, Room, choose_room, room_at

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


def test_levels_of_macos_are_all_or_nothing() -> None:
    total = physical_memory_bytes()
    assert [room_at(level) for level in (1, 2, 4)] == [Room(total, total), Room(0, total), Room(0, total)]
    assert pressure_level("linux") == 1, "nothing is asked elsewhere"

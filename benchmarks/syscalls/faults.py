"""Which system calls fail, by a seed, and the shim that makes them fail in processes that run."""

import mmap
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KINDS = ("EIO on reads", "short reads", "slow reads", "EIO on writes", "ENOSPC", "EMFILE", "ENOMEM")
CONTROL = struct.Struct("<IIIIQQ7Q")


def build_shim(library: Path) -> Path | None:
    """The shared library, compiled to `library`; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return library


@dataclass(frozen=True)
class Schedule:
    """Which calls fail, how often, and for how long."""

    seed: int
    kinds: tuple[int, ...]
    per_mille: int
    slow_us: int
    seconds: float

    @classmethod
    def of(cls, seed: int) -> "Schedule":
        """The schedule of a seed."""
        rng = random.Random(seed)
        kinds = tuple(sorted(rng.sample(range(len(KINDS)), rng.choice([1, 1, 2, 3]))))
        return cls(seed, kinds, rng.choice([2, 10, 50, 200, 1000]), rng.choice([1000, 20_000, 200_000]),
                   rng.uniform(0.3, 1.5))  # fmt: skip

    def __str__(self) -> str:
        names = " + ".join(KINDS[kind] for kind in self.kinds)
        return f"seed {self.seed}: {names}, {self.per_mille} of 1000 calls, {self.seconds:.1f} s"


class Control:
    """The memory through which schedules reach the shim in both processes."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(CONTROL.size))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), CONTROL.size)

    def begin(self, one: Schedule) -> None:
        """Let calls fail from now on."""
        mask = sum(1 << kind for kind in one.kinds)
        self._memory[:] = CONTROL.pack(0, mask, one.per_mille, one.slow_us, one.seed, *[0] * 8)
        self._memory[:4] = struct.pack("<I", 1)

    def end(self) -> int:
        """Let no call fail any more; how many did."""
        self._memory[:4] = bytes(4)
        return sum(CONTROL.unpack(self._memory[:])[6:])

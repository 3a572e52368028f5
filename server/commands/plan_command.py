"""The command `glmserve plan [MODEL]`: how a budget would be divided and what to expect; loads nothing.

MODEL is a folder, a repository in the cache or on the Hub (only its config and headers are asked for), or an
id by which GLM-5.2 is served. With `--memory` the plan is for another machine, a Mac.
"""

import json
import logging
import re
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from config.errors import UsageError
from config.forecast import Forecast
from config.plan_report import as_dict, render_plan
from config.settings import load_settings
from config.sizes import format_size, parse_size
from models.arithmetic import METAL, choose_arithmetic
from models.loading.public_formats import find_format, write_header, write_hollow
from server.commands.checkpoint import choose_checkpoint
from server.commands.flags import make_parser
from server.commands.hub_cache import check_hub, find_snapshot, hub_errors, parse_repo
from server.commands.serve import make_engine_config
from server.engine.backend import forecaster, open_first_part, plan_memory

SUMMARY = (
    "Prints how --ram-budget would be divided, and what to expect of it. Loads and downloads no weights."
)
# Where no rate is given: an M5 Max's SSD reads experts at 12 to 14 GB/s, others at 6 to 7.
DISK = "7GB/s"
LEAST_RATE = 10**6


def plan_command(words: Sequence[str]) -> int:
    """Prints the ledger for people, or as JSON with `minimum_budget_bytes` and `forecast`."""
    parser = make_parser("plan", SUMMARY)
    _add_flags(parser)
    given = vars(parser.parse_args(words))
    target, memory, is_json = given.pop("target"), given.pop("memory"), given.pop("json")
    disk = _rate(given.pop("disk"))
    budget = given.pop("ram_budget", "80%") if memory else None
    settings = load_settings(given, given.pop("config", None))
    with _checkpoint_of(target or settings.model) as (directory, streams):
        config = make_engine_config(settings, directory)
        config = replace(config, stream_experts=config.stream_experts or streams)
        if memory:
            config = replace(config, ram_budget_bytes=_budget(budget, memory))
        checkpoint, arithmetic = open_first_part(config), METAL if memory else choose_arithmetic()
        plan = plan_memory(checkpoint, arithmetic, config, physical_bytes=memory)
        expect = forecaster(checkpoint, arithmetic, plan, disk, memory)
        expected = None if config.cluster else expect()  # of several machines nothing is known yet
    if is_json:
        forecast = asdict(expected) if expected else None
        print(json.dumps(as_dict(plan) | {"disk_bytes_per_s": disk, "forecast": forecast}, indent=2))
        return 0
    print(render_plan(plan))
    if config.cluster:
        print(f"Each of the {len(config.cluster.addresses)} machines has this plan, and its own experts.")
    if expected:
        print(f"With a disk of {format_size(disk)}/s: {expected.describe()}.")
        print(_more(expect))
    return 0


def _more(expect: Callable[..., Forecast]) -> str:
    """What a fleet and long prompts may expect, in one line."""
    agents = ", ".join(f"{count}: {expect(agents=count).tokens_per_s:.1f}" for count in (4, 16))
    prompts = ", ".join(f"{count}: {expect(prompt=count).first_token_s:.0f} s" for count in (4096, 32_768))
    return f"Agents that write at once, tokens/s together: {agents}. Prompts, to the first token: {prompts}."


def _add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("target", metavar="MODEL", nargs="?", default=None, help="folder, repository or id")
    parser.add_argument("--memory", metavar="SIZE", type=_size, default=None, help="of another machine: 128G")
    parser.add_argument("--disk", metavar="RATE", default=DISK, help="rate of its disk: 7GB/s")
    parser.add_argument("--json", action="store_true", default=False, help="for programs")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from error


def _rate(text: str) -> int:
    """Bytes a second of a rate such as 7GB/s."""
    try:
        rate = 0 if re.search(r"[KMGT]i?b", text) else parse_size(text.strip().removesuffix("/s"))
    except ValueError:
        rate = 0
    if rate < LEAST_RATE:  # also bits, and a number without its unit
        raise UsageError(f"--disk: {text!r} is not a rate of a disk; write 7GB/s, in bytes")
    return rate


def _budget(text: str | None, memory_bytes: int) -> int:
    try:
        budget = parse_size(text or "80%", memory_bytes)
    except ValueError as error:
        raise UsageError(f"--ram-budget: {error}") from error
    if budget > memory_bytes:
        raise UsageError(f"--ram-budget {text} is more than --memory {format_size(memory_bytes)}")
    return budget


@contextmanager
def _checkpoint_of(name: str | None) -> Iterator[tuple[Path, bool]]:
    """A folder with the model's shapes, and whether only streaming makes sense of it."""
    is_local = name is None or name.lower().endswith(".gguf") or Path(name).expanduser().exists()
    repo = parse_repo(name) if name and not is_local else None
    is_here = name is None or repo is None or find_snapshot(*repo) is not None
    one = find_format(name) if name and not is_local else None
    if is_here and (one is None or repo is not None):
        yield choose_checkpoint(name).directory, False
        return
    with tempfile.TemporaryDirectory(prefix="glmserve-plan-") as folder:
        if one is not None:
            yield write_hollow(Path(folder), one), True
        else:
            assert repo, "what is not here is a repository"
            yield _remote(*repo, Path(folder)), True


def _remote(repo: str, revision: str | None, folder: Path) -> Path:
    """Config and headers of a repository on the Hub, as files that hold nothing else."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    errors: tuple[type[Exception], ...] = (
        HfHubHTTPError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
        *hub_errors(),
    )
    check_hub()
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it tries again is its own affair
    try:
        hf_hub_download(repo, "config.json", revision=revision, local_dir=folder)
        described = get_safetensors_metadata(repo, revision=revision)
    except errors as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"the headers of {repo} cannot be read from the Hub: {reason}") from error
    for name, file in described.files_metadata.items():
        header: dict[str, Any] = {"__metadata__": file.metadata}
        for tensor, info in file.tensors.items():
            offsets = list(info.data_offsets)
            header[tensor] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        size = max((info.data_offsets[1] for info in file.tensors.values()), default=0)
        path = folder / Path(name).name
        write_header(path, json.dumps(header).encode(), size)
    return folder

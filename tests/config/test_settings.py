"""Where settings come from, and what is said about wrong ones."""

from pathlib import Path
from typing import Any

import pytest

from config.errors import BudgetError, UsageError
from config.settings import Settings, load_settings
from config.sizes import physical_memory_bytes
from server.cli import parse_settings


@pytest.fixture(autouse=True)
def _no_inherited_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GLMSERVE_{name.upper()}", raising=False)


def test_defaults() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port, settings.stream_experts) == ("127.0.0.1", 8080, False)
    assert settings.ram_budget == int(physical_memory_bytes() * 0.8)


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "glmserve.toml"
    file.write_text('port = 1\nhost = "a"\nram_budget = "1G"\nstream_experts = true\n')
    monkeypatch.setenv("GLMSERVE_PORT", "2")
    monkeypatch.setenv("GLMSERVE_HOST", "b")
    settings = load_settings({"port": "3"}, file)
    assert (settings.port, settings.host, settings.ram_budget, settings.stream_experts) == (
        3,
        "b",
        10**9,
        True,
    )


def test_each_field_can_be_set_by_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "MODEL": "m",
        "RAM_BUDGET": "2GiB",
        "STREAM_EXPERTS": "1",
        "MAX_CONTEXT": "100",
        "LOG_LEVEL": "error",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"GLMSERVE_{name}", value)
    settings = load_settings({})
    assert settings.model_dump(include={name.lower() for name in values}) == {
        "model": "m",
        "ram_budget": 2 * 2**30,
        "stream_experts": True,
        "max_context": 100,
        "log_level": "error",
    }


def test_a_budget_above_physical_memory_is_refused_with_the_number() -> None:
    with pytest.raises(BudgetError, match="more than this machine's memory"):
        load_settings({"ram_budget": str(physical_memory_bytes() + 1)})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "x"}, "--port"),
        ({"port": "70000"}, "--port"),
        ({"ram_budget": "12X"}, "12X.*100G"),
        ({"ram_budget": "9" * 400}, "999.*100G"),
        ({"ram_budget": "0"}, "--ram-budget"),
        ({"max_context": "0"}, "--max-context"),
        ({"log_level": "loud"}, "'debug', 'info'"),
        ({"no_such": 1}, "unknown setting 'no_such'"),
    ],
)
def test_wrong_values_are_named_in_one_line(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_settings(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["ram_budget", "port", "max_context", "decode_share", "model"])
def test_true_in_a_file_is_no_number(tmp_path: Path, key: str) -> None:
    file = tmp_path / "glmserve.toml"
    file.write_text(f"{key} = true\nstream_experts = true\n")
    with pytest.raises(UsageError, match=f"--{key.replace('_', '-')} .*true says nothing"):
        load_settings({}, file)


@pytest.mark.parametrize("content", [None, "port = ", "prot = 1"])
def test_a_bad_file_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "glmserve.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=r"glmserve\.toml|prot"):
        load_settings({}, file)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings({}).port = 1


def test_only_the_prefix_cache_takes_a_size_of_zero() -> None:
    settings = load_settings({"prefix_cache_size": "0", "prefix_cache_memory": "0"})
    assert (settings.prefix_cache_size, settings.prefix_cache_memory) == (0, 0)
    with pytest.raises(UsageError, match="--ram-budget"):
        load_settings({"ram_budget": "0"})


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({}, ()),
        ({"mirror": "/a"}, (Path("/a"),)),
        ({"mirror": ["/a"]}, (Path("/a"),)),
        ({"mirror": ["/a", "/b", "/c"]}, (Path("/a"), Path("/b"), Path("/c"))),
        ({"mirror": "/a:/b"}, (Path("/a"), Path("/b"))),
    ],
)
def test_mirrors_may_be_several(flags: dict[str, Any], found: tuple[Path, ...]) -> None:
    assert load_settings(flags).mirror == found


def test_mirrors_come_from_flags_and_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_settings(["--mirror", "/a", "--mirror", "/b"]).mirror == (Path("/a"), Path("/b"))
    monkeypatch.setenv("GLMSERVE_MIRROR", "/c:/d")
    assert parse_settings([]).mirror == (Path("/c"), Path("/d"))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_context", "32k", 32_768), ("max_context", "1m", 2**20), ("sweep_tokens", "8K", 8192),
        ("max_context", "0.5m", 2**19), ("max_context", "128 k", 2**17), ("max_context", "32_768", 32_768),
        ("queue_timeout", "10 min", 600), ("request_timeout", "1d", 86_400), ("decode_share", "30 %", 0.3),
        ("log_level", "INFO", "info"), ("lookahead", "Auto", "auto"), ("expert_policy", "LRU", "lru"),
        ("max_context", "4096", 4096), ("request_timeout", "10m", 600), ("queue_timeout", "1.5h", 5400),
        ("step_timeout", "90s", 90), ("request_timeout", "7.5", 7.5), ("decode_share", "30%", 0.3),
        ("decode_share", "0.5", 0.5),
    ],
)  # fmt: skip
def test_counts_times_and_shares_take_units(name: str, text: str, value: float) -> None:
    assert getattr(load_settings({name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [("max_context", "32kb"), ("max_context", "30%"), ("max_context", "0k"), ("max_context", "1.5"),
     ("request_timeout", "10 days"), ("request_timeout", "-1m"), ("decode_share", "130%"),
     ("decode_share", "30m"), ("sweep_tokens", "")],
)  # fmt: skip
def test_other_units_are_refused_with_the_flag(name: str, text: str) -> None:
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        load_settings({name: text})


@pytest.mark.parametrize(
    ("origin", "meant"),
    [
        ("a.example", "https://a.example"), ("localhost:3000", "https://localhost:3000"),
        ("https://", "https://"), ("https://a b", "https://a"), ("//a.example", "https://a.example"),
        ("http://a.example/ui", "http://a.example"), ("http://a.example:80", "http://a.example"),
        ("https://u:p@a.example", "https://a.example"), ("file:///x", "null"),
    ],
)  # fmt: skip
def test_an_origin_that_can_never_match_is_refused_with_what_would(origin: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"--cors-origins.*write it as {meant}"):
        load_settings({"cors_origins": f"https://b.example,{origin}"})


def test_a_slash_behind_an_origin_is_none_of_it() -> None:
    given = "https://a.example/, app://obsidian.md ,*"
    assert load_settings({"cors_origins": given}).cors_origins == "https://a.example,app://obsidian.md,*"

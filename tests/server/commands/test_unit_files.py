"""The unit file and the property list in docs/service.md are what their managers accept."""

import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "service.md"


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "glmserve.service"
    text = block("ini").replace("/opt/glmserve/bin/glmserve", sys.executable).replace("User=glmserve\n", "")
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "glmserve.service" in line]
    newer = ("RestartSteps", "RestartMaxDelaySec")  # of systemd 254; older ones ignore and say so
    assert [line for line in ours if not any(name in line for name in newer)] == []


def test_the_unit_stops_the_server_as_it_wants_to_be_stopped() -> None:
    text = block("ini")
    assert "KillMode=mixed" in text
    assert int(re.findall(r"TimeoutStopSec=(\d+)", text)[0]) > 10
    assert "RestartPreventExitStatus=2" in text


def test_the_property_list_has_the_keys_and_kinds_of_launchd() -> None:
    found = plistlib.loads(block("xml").encode())
    kinds = {
        "Label": str, "ProgramArguments": list, "RunAtLoad": bool, "KeepAlive": dict, "ThrottleInterval": int,
        "ExitTimeOut": int, "ProcessType": str, "SoftResourceLimits": dict,
    }  # fmt: skip
    assert {key: type(value) for key, value in found.items()} == kinds
    assert all(isinstance(word, str) for word in found["ProgramArguments"])
    assert found["ProcessType"] in ("Standard", "Background", "Adaptive", "Interactive")
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert found["ExitTimeOut"] > 10


@pytest.mark.parametrize("language", ["ini", "xml"])
def test_the_flags_in_them_exist(language: str) -> None:
    from config.settings import Settings, flag_of

    flags = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"<!.*?>|<\?.*?>", "", block(language))))
    assert flags
    assert flags <= {flag_of(name) for name in Settings.model_fields}

"""`glmserve doctor --parity` on the machine that runs the tests: same code, same file, no personal data."""

import json
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from config.settings import Settings
from server.cli import main
from server.commands.doctor.doctor_command import REPORT, run_parity
from server.commands.doctor.finding import Finding, Verdict
from server.commands.doctor.parity import correctness
from server.commands.doctor.parity.parity_checks import PARITY_CHECKS
from server.commands.doctor.parity.parity_process import _PATH
from server.commands.doctor.parity.speed import compare


@pytest.mark.long
def test_all_checks_pass_here_and_the_report_names_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--parity"]) == 0
    text = (tmp_path / REPORT).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["check"] for line in lines if "seconds" in line] == [check.title for check in PARITY_CHECKS]
    assert sum(line.get("seconds", 0) for line in lines) < 120
    for private in (str(tmp_path), str(Path.home()), os.uname().nodename):
        assert private not in text
    assert list(tmp_path.iterdir()) == [tmp_path / REPORT]


@pytest.mark.parametrize(
    "text",
    ["/Users/jane/model.bin is missing", "open('/home/jo/x y'): no", "in ~/models, at /Volumes/Jane/a.b"],
)
def test_no_path_reaches_the_report(text: str) -> None:
    hidden = _PATH.sub("(path)", json.dumps({"text": text}))
    assert "(path)" in hidden
    for name in ("jane", "Jane", "jo/"):
        assert name not in hidden
    assert _PATH.sub("(path)", "2.1 GB/s, see models/arithmetic.py") == "2.1 GB/s, see models/arithmetic.py"


@pytest.mark.parametrize("crash", ["os.abort()", "os.kill(os.getpid(), 11)", "os._exit(9)"])
def test_a_crash_is_a_finding(crash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text(f"import os\n{crash}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = tmp_path / REPORT
    assert run_parity(report, "crashing") == 1
    assert json.loads(report.read_text().splitlines()[-1])["verdict"] == "fault"


def test_wrong_products_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong for the last rows of many, of one width, or by a little."""
    right = mx.gather_qmm
    monkeypatch.setattr(correctness, "WIDTHS", ((96, 32),))
    monkeypatch.setattr(correctness, "ROWS", (4, 33))

    def verdict() -> Verdict:
        [finding] = correctness.check_gathers(Settings())
        return finding.verdict

    assert verdict() == Verdict.GOOD
    for wrong in (
        lambda out: mx.where(mx.arange(out.shape[0])[:, None, None] < 32, out, 0),
        lambda out: out * 1.05,
        lambda out: out + mx.where(mx.arange(out.shape[-1]) == 7, mx.nan, 0),
    ):
        monkeypatch.setattr(mx, "gather_qmm", lambda *args, wrong=wrong, **more: wrong(right(*args, **more)))
        assert verdict() == Verdict.FAULT


def test_an_alternative_that_wins_is_named_with_what_would_follow() -> None:
    def slow() -> None:
        sum(range(300_000))

    found: Finding = compare("a choice", "constant X", {"ours": slow, "other": lambda: None})
    assert found.verdict == Verdict.NOTE
    assert "other is faster here: constant X" in found.text
    found = compare("a choice", "constant X", {"ours": lambda: None, "other": slow})
    assert found.verdict == Verdict.GOOD
    assert replace(found, text="").figures["ours"]

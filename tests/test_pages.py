"""Pages name files that exist, and pictures are what their script draws."""

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from docs.pictures.draw import HERE, PICTURES
from docs.pictures.plots import M5_MAX, PLOTS, ULTRA, sensitivity, table
from server.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOPS = "config|streaming|models|server|training|tests|benchmarks|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(rf"`((?:{TOPS})/[\w/.-]*)`", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["architecture", "streaming"])
def test_every_class_that_a_page_names_exists(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    sources = "".join(
        path.read_text(encoding="utf-8")
        for top in ("config", "streaming", "models", "server")
        for path in (ROOT / top).rglob("*.py")
    )
    classes = set(re.findall(r"`([A-Z][A-Za-z]+)`", text))
    assert len(classes) > 10
    assert [one for one in sorted(classes) if not re.search(rf"class {one}\b", sources)] == []


@pytest.mark.parametrize("name", PICTURES | PLOTS)
def test_pictures_are_what_the_script_draws(name: str) -> None:
    assert (HERE / name).read_text(encoding="utf-8") == (PICTURES | PLOTS)[name]().svg()


def test_what_a_buyer_reads_is_what_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert table() in page
    assert sensitivity() in page
    for buyer, memory in ((M5_MAX, "128G"), (ULTRA, "256G")):
        words = ["plan", "z-ai/glm-5.2", "--json", "--memory", memory]
        words += ["--ram-budget", str(buyer.budget_bytes), "--disk", f"{buyer.disk_bytes_per_s / 1e9:g}GB/s"]
        assert main(words) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["forecast"] == asdict(buyer.expects())


def test_troubleshooting_quotes_what_the_program_says() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = "".join(
        re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8"))
        for top in ("config", "server")
        for path in (ROOT / top).rglob("*.py")
    )
    symptoms = re.findall(r"^\| (?:\d+ )?`([^`]+)` \|", page, re.MULTILINE)
    assert len(symptoms) > 8
    fixed = {
        part.strip() for one in symptoms for part in re.split(r"REPO|, and |GLMSERVE\S*|127\S*|\.\.\.", one)
    }
    assert [part for part in sorted(fixed) if part not in sources] == []


def test_serving_installs_nothing_for_developers() -> None:
    words = ["make", "--dry-run", "serve", "VENV=/nonexistent"]
    script = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-c constraints.txt -e ." in script
    assert not re.search(r"-e '?\.\[|ruff|mypy|playwright|npm", script), script

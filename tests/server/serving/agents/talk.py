"""Real agents, by their own binaries, against the server: three turns of a session, each with a tool's work.

`make test-agents` runs `python -m tests.server.serving.agents.talk [AGENT...]`. HTTP and dialects are the
real ones. In place of the model, whose small stand-in cannot hold such prompts, an engine calls the agent's
own shell tool when a user speaks, and ends the turn when the tool has answered. For aider, which has no
tools, it writes a block of an edit. A turn passes when the file is there and the agent shows the answer.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate
from server.glm.tokenizer import Tokenizer, load_tokenizer
from server.link.messages import Generate, RequestEvent
from tests.server.api.conftest import running_server
from tests.server.api.scripted import ScriptedEngine
from tests.tiny_tokenizer import build_tokenizer

BINARIES = Path(__file__).parent / "node_modules" / ".bin"
# Aider wants other versions than the tests: an environment of its own.
AIDER = Path(sys.prefix) / "aider" / "bin" / "aider"
NUM_TURNS = 3
TURN_TIMEOUT_S = 240
MODEL = "z-ai/glm-5.2"
# Shell tools of the agents, and how each takes a command.
SHELLS = {
    "Bash": {"command": "{command}", "description": "write"},
    "bash": {"command": "{command}", "description": "write"},
    "exec_command": {"cmd": "{command}"},
    "shell_command": {"command": "{command}"},
    "shell": {"command": '["bash", "-lc", "{command}"]'},
    "run_commands": {"commands": '["{command}"]'},
}
SAID = "The file is there."
EDIT = "{name}\n```\n<<<<<<< SEARCH\n=======\ndone\n>>>>>>> REPLACE\n```\n"


@dataclass
class Writer(ScriptedEngine):
    """Calls the shell when a user asks for a file, and says so when the tool has answered."""

    tokenizer: Tokenizer | None = None
    seen: list[str] = field(default_factory=list)

    async def generate(self, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        """Answers by the end of the prompt."""
        assert self.tokenizer, "it is given at the start"
        prompt = self.tokenizer.decode(request.token_ids)
        self.script = self.tokenizer.encode(self._answer(prompt))
        async for event in super().generate(request):
            yield event

    def _answer(self, prompt: str) -> str:
        turn = prompt[max(prompt.rfind("<|user|>"), prompt.rfind("<|observation|>")) :]
        thought = "" if prompt.endswith("</think>") else "I see.</think>"
        wanted = re.findall(r"Write the file (turn-\d\.txt)", turn)
        shell = next((name for name in SHELLS if re.search(rf'"name": ?"{name}"', prompt)), None)
        self.seen.append(f"{shell} {wanted} {len(prompt)}")
        if turn.startswith("<|user|>") and wanted and shell:
            command = f"echo done > {wanted[-1]}"
            given = "".join(
                f"<arg_key>{key}</arg_key><arg_value>{value.format(command=command)}</arg_value>"
                for key, value in SHELLS[shell].items()
            )
            return f"{thought}<tool_call>{shell}{given}</tool_call><|observation|>"
        if "SEARCH/REPLACE" in prompt and wanted:
            return f"{thought}{SAID}\n{EDIT.format(name=wanted[-1])}<|user|>"
        return f"{thought}{SAID}<|user|>"


def make_commands(url: str, agent: str, turn: int) -> list[str]:
    """How an agent is asked for a turn of its session, without a person beside it."""
    asked = f"Write the file turn-{turn}.txt with your shell."
    goes_on = turn > 1
    if agent == "codex":
        provider = {"name": "glm", "wire_api": "responses", "base_url": f"{url}/v1"}
        settings = {f"model_providers.glm.{key}": value for key, value in provider.items()}
        settings |= {
            "model_provider": "glm",
            "sandbox_mode": "danger-full-access",
            "approval_policy": "never",
        }
        flags = [word for key, value in settings.items() for word in ("-c", f'{key}="{value}"')]
        session = ["resume", "--last"] if goes_on else []
        return ["exec", "--skip-git-repo-check", "-m", MODEL, *flags, *session, asked]
    if agent == "claude":
        permission = ["--permission-mode", "acceptEdits", "--allowedTools", "Bash"]
        return ["-p", asked, *permission, "--model", MODEL, *(["--continue"] if goes_on else [])]
    if agent == "cline":  # it goes on with a session only at a terminal, so that each turn is one of its own
        return [asked]
    if agent == "aider":
        quiet = ["--no-check-update", "--no-show-model-warnings", "--no-analytics", "--no-pretty", "--no-git"]
        history = ["--restore-chat-history", "--edit-format", "diff", "--yes-always"]
        return ["--model", f"openai/{MODEL}", *quiet, *history, "--message", asked]
    return ["run", "--model", f"glm/{MODEL}", *(["--continue"] if goes_on else []), asked]


def environment(url: str, folder: Path) -> dict[str, str]:
    """What the agents find: a home of their own, and this server for all that they would call."""
    home = str(folder / "home")
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {MODEL: {"tool_call": True}},
    }
    opencode = {"provider": {"glm": provider}, "small_model": f"glm/{MODEL}"}
    names = (
        "HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "XDG_CACHE_HOME",
        "CODEX_HOME",
    )
    return os.environ | dict.fromkeys(names, home) | {
        "PWD": str(folder / "work"),
        "ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "none", "ANTHROPIC_SMALL_FAST_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
        "OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENCODE_CONFIG_CONTENT": json.dumps(opencode), "OPENCODE_DISABLE_AUTOUPDATE": "1",
    }  # fmt: skip


def play(agent: str, url: str, folder: Path) -> str:
    """Three turns of one agent; what went wrong, or nothing."""
    (folder / "home").mkdir()
    (folder / "work").mkdir()
    if agent == "cline":
        words = ["-p", "openai-compatible", "-k", "none", "-m", MODEL, "-b", f"{url}/v1"]
        subprocess.run(
            [BINARIES / agent, "auth", *words], cwd=folder / "work", env=environment(url, folder), check=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=TURN_TIMEOUT_S,
        )  # fmt: skip
    for turn in range(1, NUM_TURNS + 1):
        try:
            done = subprocess.run(
                [AIDER if agent == "aider" else BINARIES / agent, *make_commands(url, agent, turn)],
                cwd=folder / "work", env=environment(url, folder), text=True,
                stdin=subprocess.DEVNULL, capture_output=True, timeout=TURN_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            return f"turn {turn} took more than {late.timeout:g} s: {(late.stdout or b'')[-600:]!r}"
        if not (folder / "work" / f"turn-{turn}.txt").exists():
            return f"turn {turn} wrote no file: {_last_words(done)}"
        if SAID not in done.stdout:
            return f"turn {turn} did not show the answer: {_last_words(done)}"
    return ""


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit status {done.returncode}\n{done.stdout[-900:]}{done.stderr[-900:]}"


def main() -> int:
    """Plays all agents that are named, or all that there are."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inner = build_tokenizer()
        inner.save(str(folder / "tokenizer.json"))
        ids = [inner.token_to_id(text) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")]
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
        tokenizer = load_tokenizer(folder)
        dialect = Dialect(tokenizer, ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours"))
        for agent in sys.argv[1:] or ("claude", "codex", "opencode", "cline", "aider"):
            engine = Writer([], context_length=2**20, tokenizer=tokenizer)
            (folder / agent).mkdir()
            with running_server(Service(engine, dialect, ModelNames(MODEL, "any"))) as url:
                fault = play(agent, url, folder / agent)
            print(f"{agent}: {fault or f'{NUM_TURNS} turns, {len(engine.seen)} requests'}", flush=True)
            failed += bool(fault)
            if fault:
                print("\n".join(engine.seen[-8:]))
    return failed


if __name__ == "__main__":
    sys.exit(main())

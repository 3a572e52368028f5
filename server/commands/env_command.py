"""The command `glmserve env`: the variables that point clients at this server, for `eval` in a shell."""

import json
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from config.errors import CheckpointError
from config.settings import Settings
from models.families import FAMILIES
from server.commands.checkpoint import choose_checkpoint
from server.commands.flags import parse

# Clients refuse an empty key, and a server without keys takes any.
ANY_KEY = "none"


def env_command(words: Sequence[str]) -> int:
    """Prints them as `export` lines, or as JSON."""

    def add(parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", default=False, help="for programs")

    given, settings = parse(words, "env", 'Prints variables: eval "$(glmserve env)".', add)
    variables = variables_of(settings)
    if given.json:
        print(json.dumps(variables, indent=2))
    else:
        if settings.api_key_file and not settings.api_key:
            file = settings.api_key_file
            print(f"glmserve: put one of the keys in {file} in place of {ANY_KEY!r}", file=sys.stderr)
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))
    return 0


def variables_of(settings: Settings) -> dict[str, str]:
    """What OpenAI's, OpenRouter's and Anthropic's clients read; the key is that of --api-key."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    url = f"{'https' if settings.ssl_certfile else 'http'}://{host}:{settings.port}"
    key, model = settings.api_key or ANY_KEY, settings.served_model_name or _default_model(settings)
    return {
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_BASE": f"{url}/v1",
        "OPENAI_API_KEY": key,
        "OPENROUTER_API_BASE": f"{url}/api/v1",
        "OPENROUTER_API_KEY": key,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": key,
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
    }


def _default_model(settings: Settings) -> str:
    """The id of the model that would be served; where there is none yet, that of GLM-5.2."""
    try:
        return choose_checkpoint(settings.model, needs_glm=settings.stream_experts).model_id
    except CheckpointError:
        return FAMILIES[0].served_id

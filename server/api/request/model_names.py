"""Which model a request means: this server has one, and clients know it by many names."""

import re
from dataclasses import dataclass
from typing import Literal

from config.errors import RequestError

Policy = Literal["strict", "any"]

# Under these authors' names the same weights are published and routed.
VENDORS = frozenset(["z-ai", "zai-org", "zai", "thudm", "zhipuai"])
DATE = re.compile(r"-(\d{8}|\d{4}-\d{2}-\d{2})$")


@dataclass(frozen=True)
class ModelNames:
    """The name that is served and, by `policy` "strict", what else may be called so."""

    served: str
    policy: Policy = "strict"

    def check(self, model: str | None, fallbacks: list[str]) -> None:
        """Raise RequestError unless one of the names is served; no name at all is the default model's."""
        wanted = [name for name in (model, *fallbacks) if name is not None]
        ours = [name for name in wanted if self.means_us(name)]
        if wanted and not ours:
            message = f"{wanted[0][:100]} is not a valid model ID"
            hint = "--served-model-name gives it another name, --model-policy any takes every name"
            raise RequestError(f"{message}; this server has {self.served} ({hint})", param="model")
        if ours and all(map(_is_online, ours)):
            message = f"{ours[0][:100]}: ':online' is not supported, this server does not read the web"
            raise RequestError(message, param="model")

    def means_us(self, name: str) -> bool:
        """Whether a name is ours: with a `:variant`, a date, another spelling, or without its author."""
        if self.policy == "any" or name == self.served:
            return True
        author, slug = _normalise(name)
        our_author, our_slug = _normalise(self.served)
        is_same_author = author in ("", our_author) or {author, our_author} <= VENDORS
        return slug == our_slug and is_same_author


def _is_online(name: str) -> bool:
    return "online" in name.lower().split(":")[1:]


def _normalise(name: str) -> tuple[str, str]:
    path = name.lower().removeprefix("openrouter/").partition(":")[0]
    author, _, slug = path.rpartition("/")
    return author, DATE.sub("", slug)

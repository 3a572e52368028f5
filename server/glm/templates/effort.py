"""How hard to think: from the words that clients use to the variables that the template knows."""

from typing import Any, Literal

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def template_options(effort: Effort | None, is_enabled: bool | None) -> dict[str, Any]:
    """The template's variables. In the template itself every word but "high" would mean Max."""
    if is_enabled is False or effort in ("none", "minimal"):
        return {"enable_thinking": False}
    options: dict[str, Any] = {"enable_thinking": True}
    if effort in ("low", "medium", "high"):
        options["reasoning_effort"] = "high"
    elif effort is not None:
        options["reasoning_effort"] = "max"
    return options

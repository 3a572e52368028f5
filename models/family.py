"""What an architecture brings along: all that the rest of the program asks of one. Pure, and without MLX.

`models.families` lists them. The half that computes is imported when it is first asked for, because the HTTP
process reads configs and names, and has no MLX.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from models.args import ModelArgs

if TYPE_CHECKING:
    from models.computing import Computing

Layouts = tuple[Iterable[str], ...]  # names of tensors, each layout as good as another


@dataclass(frozen=True)
class Family:
    """One architecture.

    `model_types`: in config.json, the first at its top, others where a language model's config lies inside.
    `title`: the models' names, for people. `served_id`: the name that clients use. `hugging_face_id`: the
    original. `parse`: config.json's values, or CheckpointError. `layer_names`: the tensors of a layer but
    those of its MLP. `plain_name`: a tensor's name among those. `always_thinks`: there is no answer without a
    thought. `fails_on`: names of `models.arithmetic` with which its tests fail. `computing`: the module that
    holds `COMPUTING`, the half that needs MLX. `computing_files`: in `models/`, of the code that no other
    architecture computes with.
    """

    model_types: tuple[str, ...]
    title: str
    served_id: str
    hugging_face_id: str
    parse: Callable[[Mapping[str, Any]], ModelArgs]
    layer_names: Callable[[str, int, ModelArgs], Iterator[Layouts]]
    computing: str
    computing_files: tuple[str, ...] = ()
    always_thinks: bool = False
    fails_on: tuple[str, ...] = ()
    plain_name: Callable[[str], str] = field(default=lambda name: name)

    @property
    def model_type(self) -> str:
        """The type that config.json names at its top."""
        return self.model_types[0]

    def load(self) -> "Computing":
        """The half that computes."""
        half: Computing = import_module(self.computing).COMPUTING
        return half

"""The house in figures, read from the syntax trees: `python -m benchmarks.house`.

Prints files per folder, names that stand twice, long functions, broad excepts, constants, and modules without
a test of their own. `tests/test_house.py` holds the product to its bounds.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRODUCT = ("config", "streaming", "models", "server")
ALL = (*PRODUCT, "training", "tests", "benchmarks")
LONG_FUNCTION = 45


@dataclass
class House:
    """All modules of some top-level folders, parsed."""

    tops: tuple[str, ...] = PRODUCT
    trees: dict[Path, ast.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = sorted(path for top in self.tops for path in (ROOT / top).rglob("*.py"))
        self.trees = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in paths}

    def lines(self) -> int:
        """Lines of all modules."""
        return sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in self.trees)

    def files_by_folder(self) -> Counter[str]:
        """Modules in each folder, `__init__` included."""
        return Counter(str(path.parent) for path in self.trees)

    def repeated_basenames(self) -> dict[str, list[str]]:
        """File names that stand in more than one folder."""
        return _repeated((path.stem, str(path)) for path in self.trees if path.stem != "__init__")

    def repeated_classes(self) -> dict[str, list[str]]:
        """Class names that are defined more than once, private ones included."""
        return _repeated(
            (node.name, str(path)) for path, node in self._nodes() if isinstance(node, ast.ClassDef)
        )

    def long_functions(self) -> list[tuple[int, str, str]]:
        """Functions of more than `LONG_FUNCTION` lines: their length, file and name."""
        found = [
            (_length(node), str(path), node.name)
            for path, node in self._nodes()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > LONG_FUNCTION
        ]
        return sorted(found, reverse=True)

    def broad_excepts(self) -> Counter[str]:
        """Handlers of every exception, by folder."""
        return Counter(str(path.parent) for path, node in self._nodes() if _is_broad(node))

    def constants(self) -> list[tuple[str, str, float]]:
        """Numbers with a name at the top of a module: file, name and value."""
        return [
            (str(path), target.id, node.value.value)
            for path, tree in self.trees.items()
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, int | float)
        ]

    def without_test(self) -> list[str]:
        """Modules with no test file of the mirrored path."""
        modules = [path for path in self.trees if path.stem != "__init__"]
        return [str(p) for p in modules if not (ROOT / "tests" / p.parent / f"test_{p.stem}.py").exists()]

    def _nodes(self) -> Iterator[tuple[Path, ast.AST]]:
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                yield path, node


def _repeated(names: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for name, place in names:
        places.setdefault(name, []).append(place)
    return {name: where for name, where in sorted(places.items()) if len(where) > 1}


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _is_broad(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    return node.type is None or (
        isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
    )


def main() -> None:
    house = House()
    print(f"{house.lines():,} lines in {len(house.trees)} modules of {', '.join(PRODUCT)}")
    print("\nfiles per folder")
    for folder, count in sorted(House(ALL).files_by_folder().items()):
        print(f"  {count:3} {folder}")
    for title, places in (("file", house.repeated_basenames()), ("class", house.repeated_classes())):
        print(f"\n{title} names that stand twice: {len(places)}")
        for name, where in places.items():
            print(f"  {name}: {', '.join(where)}")
    print(f"\nfunctions over {LONG_FUNCTION} lines")
    for length, path, name in house.long_functions():
        print(f"  {length:3} {path} {name}")
    print("\nbroad excepts")
    for folder, count in sorted(house.broad_excepts().items()):
        print(f"  {count:3} {folder}")
    print(f"\nnumeric constants: {len(house.constants())}")
    for path, name, value in house.constants():
        print(f"  {path} {name} = {value}")
    print("\nmodules without a test of their own")
    for path in house.without_test():
        print(f"  {path}")


if __name__ == "__main__":
    main()

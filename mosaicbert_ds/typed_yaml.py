"""Any frozen dataclass from YAML and dotted overrides, strictly.

    @recipe_part
    class ScheduleConfig:
        warmup: Annotated[float, Field(ge=0, le=1)] = 0.06

    tree = merge(read_yaml(path), parse_overrides(["warmup=0.1"]))
    config = from_tree(ScheduleConfig, tree, source="my.yaml")

Types, bounds and unknown keys are checked by pydantic in strict mode: the string "3" is no number,
true is no number, and a key that no dataclass owns is refused with its nearest neighbour named.
"""

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mosaicbert_ds.errors import ConfigError

Tree = dict[str, Any]
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def recipe_part(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that `from_tree` checks strictly."""
    # Not annotated, hence no field: pydantic reads it off the class. allow_inf_nan: a rate of .nan
    # would pass every bound.
    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class _Loader(yaml.SafeLoader):
    """The YAML that recipes need, without the surprises of YAML 1.1.

    `5e-4` is a number; `010`, `1:30`, `yes`, dates and digits of other scripts are text. A repeated key,
    a key that is no text, and an alias are errors.
    """

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(f"{_place(self.peek_event())}: an alias; write the value out, or use extends")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"{_place(key_node)}: key {key} is no text; keys are names")
            if key in seen:
                raise ConfigError(f"{_place(key_node)}: key '{key}' is given twice; remove one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}  # instead of SafeLoader's
for _type, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.inf|\.nan",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(rf"^(?:{_pattern})$"), _first)


def _place(at: Any) -> str:
    """Where a YAML node or event stands: file or override, and line."""
    return f"{at.start_mark.name}:{at.start_mark.line + 1}"


def _load(text: str, name: str) -> Any:
    """Parse `text`. Raises ConfigError that names `name`."""
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> Tree:
    """Read a YAML mapping. Raises ConfigError for a missing file, bad syntax or a repeated key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    tree = _load(text, str(path))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise ConfigError(f"{path} holds {found}, not a mapping of keys to values")
    return tree


def merge(base: Tree, over: Tree) -> Tree:
    """`base` with the values of `over` laid over it, mapping by mapping. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def parse_overrides(overrides: Iterable[str]) -> Tree:
    """`["a.b=3", "a.c=x"]` as the tree `{"a": {"b": 3, "c": "x"}}`; values are read as YAML."""
    tree: Tree = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
            raise ConfigError(
                f"override '{text}' is not of the form key=value, such as optimizer.peak_lr=5e-4"
            )
        # Not at the line's start, where YAML takes --- for a document's border and not for a value.
        leaf = _load(f" {value}", f"override '{text}'")
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        tree = merge(tree, leaf)
    return tree


def from_tree(cls: type[T], tree: Tree, source: str) -> T:
    """Build the dataclass `cls` from `tree`.

    Raises ConfigError naming `source`, the dotted key, what was given and what is allowed; with
    several faults, one a line.
    """
    try:
        return _adapter(cls).validate_json(json.dumps(tree), strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        faults = [_explain(cls, fault, source) for fault in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(faults))) from None


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def to_tree(config: Any) -> Tree:
    """The dataclass as plain dicts, lists and scalars: what `from_tree` takes."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_recipe(cls: type[T], name: str, shipped: Path, overrides: list[str] | None = None) -> T:
    """Recipe `name` of the folder `shipped`, or the YAML file `name`, with `key=value` overrides over it.

    A recipe may say `extends: NAME` and state only what differs. Raises ConfigError naming the file or
    override, the key, what was given and what is allowed.
    """
    path = _find(name, shipped)
    recipe = _read(cls, path, shipped)
    if not overrides:
        return recipe
    source = f"{path} with {' '.join(overrides)}"
    return from_tree(cls, merge(to_tree(recipe), parse_overrides(overrides)), source)


def recipes_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _read(cls: type[T], path: Path, shipped: Path, seen: tuple[Path, ...] = ()) -> T:
    """The recipe in `path`. Each file is checked before the next is laid over it, so that a fault is
    named where it stands. `seen`: the files that extend this one."""
    tree = read_yaml(path)
    if "extends" in tree:
        base, chain = tree.pop("extends"), (*seen, path.resolve())
        if not isinstance(base, str):
            raise ConfigError(f"{path}: extends is {base}; allowed is the name or file of a recipe")
        below = _find(base, shipped, beside=path)
        if below.resolve() in chain:
            circle = " -> ".join(str(file) for file in (*chain, below.resolve()))
            raise ConfigError(f"{path}: recipes extend each other in a circle: {circle}")
        tree = merge(to_tree(_read(cls, below, shipped, chain)), tree)
    return from_tree(cls, tree, str(path))


def _find(name: str, shipped: Path, beside: Path | None = None) -> Path:
    """The file of recipe `name`; a path is relative to the recipe that extends it, if there is one."""
    for path in (shipped / f"{name}.yaml", (beside.parent if beside else Path()) / name):
        if path.is_file():
            return path
    said, allowed = f"{beside}: extends " if beside else "recipe ", ", ".join(recipes_in(shipped))
    raise ConfigError(f"{said}'{name}' is unknown; allowed are {allowed} or a YAML file")


def _explain(cls: type, fault: Any, source: str) -> str:
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path) or "(top level)"
    if fault["type"] == "unexpected_keyword_argument":
        return f"{source}: unknown key '{key}'{_suggest(cls, path)}"
    if fault["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"{source}: key '{key}' is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":  # from a __post_init__, which names its keys itself
        return f"{source}: {'' if not path else key + ': '}{message}"
    return f"{source}: {key} is {json.dumps(fault['input'])}; {message[0].lower()}{message[1:]}"


def _suggest(cls: Any, path: list[str]) -> str:
    """`; did you mean 'x'?` or the list of keys that stand at this place."""
    for part in path[:-1]:
        if not dataclasses.is_dataclass(cls):  # of a dict[str, X] every key is an X
            cls = typing.get_args(cls)[1]
            continue
        cls = typing.get_type_hints(cls).get(part)
        if typing.get_origin(cls) is dict:
            continue
        options = [c for c in (cls, *typing.get_args(cls)) if dataclasses.is_dataclass(c)]
        if not options:
            return ""
        cls = options[0]
    names = [field.name for field in dataclasses.fields(cls)]
    close = difflib.get_close_matches(path[-1], names, n=1)
    if close:
        return f"; did you mean '{'.'.join([*path[:-1], close[0]])}'?"
    return f"; allowed are {', '.join(names)}"

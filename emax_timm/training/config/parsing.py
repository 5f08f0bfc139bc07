"""Build a configuration from a YAML file and command-line flags.

A key of the file is the name of a flag without its leading dashes. Flags override the file. Unknown
names and values of a wrong type are refused.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ...errors import UsageError, nearest
from .flags import flags_of, without_none
from .option import POSITIVE
from .options import InputOptions
from .timm_flags import is_timm_default, unknown_options

__all__ = [
    "check_bounds",
    "find_config",
    "from_mapping",
    "layered",
    "parse_settings",
    "read_yaml",
    "to_yaml",
]

ConfigT = TypeVar("ConfigT")


def parse_settings(kind: type, argv: Sequence[str] | None, prog: str) -> dict[str, Any]:
    """Return the options given by `-c FILE` and by flags; the flags override the file.

    The values of flags are still to be checked, with `from_mapping`.

    Args:
        kind: The options class, such as `TrainConfig`.
        argv: The command-line arguments; those of sys.argv if None.
        prog: The name of the command, for its help.

    Raises:
        UsageError: If a flag is unknown or malformed, or the file is missing or invalid.
        SystemExit: For `--help`.
    """
    parser = flags_of(kind, prog)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        # What is no flag is the value of an unknown one, or a second folder.
        names = [word.split("=")[0] for word in unknown if re.match("--?[A-Za-z]", word)]
        if not names:
            raise UsageError(f"one argument too many: {unknown[0]}; --help says what there can be")
        flags = [name for name in parser._option_string_actions if name.startswith("--")]
        raise UsageError(unknown_options("flag", names, flags, _is_timms(kind)))
    values = vars(given)
    if "config" not in values:
        return values
    path = find_config(values.pop("config"))
    settings = {str(key).replace("-", "_"): value for key, value in read_yaml(path).items()}
    from_mapping(kind, settings, source=str(path))  # so that errors in the file name it
    return layered(settings, values)


def layered(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `base`, overridden by those `given`.

    Options that mean the same also override each other: `data` and `data_dir`, and `input_size`,
    `img_size` and `in_chans`.
    """
    base = dict(base)
    if {"data", "data_dir"} & given.keys():
        base.pop("data", None)
        base.pop("data_dir", None)
    if "input_size" in given:
        base.pop("img_size", None)
        base.pop("in_chans", None)
    elif (size := base.get("input_size")) and {"img_size", "in_chans"} & given.keys():
        channels, height, width = size
        if "img_size" in given:
            base.pop("input_size")
            base["in_chans"] = channels
        else:
            base["input_size"] = [given["in_chans"], height, width]
    return {**base, **given}


def from_mapping(kind: type[ConfigT], settings: dict[str, Any], source: str) -> ConfigT:
    """Create an instance of the options class `kind` from a mapping, and check every value.

    In training and validation, timm's options that are not here are left out where they have
    timm's default.

    Args:
        kind: The options class.
        settings: Values by the names of their options; the others take their defaults.
        source: Where the settings come from; error messages begin with it.

    Raises:
        UsageError: If keys are unknown, all of which it names, or a value has a wrong type or
            length, is none of the choices, or is out of bounds.
    """
    hints = typing.get_type_hints(kind)
    options = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    settings = {str(key): value for key, value in settings.items()}
    unknown = [key for key in settings if key not in hints]
    timm = _is_timms(kind)
    if asked := [key for key in unknown if not (timm and is_timm_default(key, settings[key]))]:
        raise UsageError(f"{source}: {unknown_options('key', asked, hints, timm)}")
    values = {}
    for name, value in settings.items():
        if name in unknown:
            continue
        try:
            values[name] = _convert(value, hints[name])
        except ValueError as error:
            raise UsageError(f"{source}: {name} must be {error}, not {value!r}") from None
        length = options[name].metadata.get("nargs")
        if isinstance(length, int) and values[name] is not None and len(values[name]) != length:
            raise UsageError(f"{source}: {name} takes {length} values, not {value!r}")
        choices = options[name].metadata.get("choices", ())
        chosen = values[name] if isinstance(values[name], list) else [values[name]]
        for item in chosen:
            if choices and item is not None and item not in choices:
                raise UsageError(
                    f"{source}: {name} has no choice {item}; the nearest of "
                    f"{', '.join(filter(None, choices))} is {nearest(str(item), choices)}"
                )
    config = kind(**values)
    try:
        check_bounds(config)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    return config


def _is_timms(kind: type) -> bool:
    """Return whether options are those of training or validation, where timm has options too."""
    return issubclass(kind, InputOptions)


def check_bounds(config: Any) -> None:
    """Check that every number in an instance of an options class is within its bounds.

    Raises:
        UsageError: If a number is out of bounds; the message gives the value and the bounds.
    """
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata["bounds"]
        if bounds is None or value is None:
            continue
        least, greatest = bounds
        for number in value if isinstance(value, list) else [value]:
            if not least <= number <= greatest:
                right = f"at least {least}" if greatest == math.inf else f"in [{least}, {greatest}]"
                if least == POSITIVE[0]:
                    right = "above 0" if greatest == math.inf else f"above 0 and at most {greatest}"
                raise UsageError(f"{field.name} must be {right}, not {number}")


def find_config(name: str) -> Path:
    """Return the path of a file, or of the recipe of that name that comes with the package.

    Raises:
        UsageError: If there is neither.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
        if path.exists():
            raise UsageError(f"config file {name} is not a file")
    except OSError as error:
        raise UsageError(f"cannot read config file {name}: {error.strerror}") from None
    package = Path(__file__).parents[2]
    # The wheel has the recipes inside the package, a checkout has them beside it.
    folder = next(
        (f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None
    )
    if folder is None:
        raise UsageError(f"there is no config file {name}")
    recipes = {str(p.relative_to(folder).with_suffix("")): p for p in folder.rglob("*.yaml")}
    if name not in recipes:
        raise UsageError(
            f"there is no config file {name}, and no recipe of that name; "
            f"the nearest recipe is {nearest(path.stem, recipes)}"
        )
    return recipes[name]


def to_yaml(config: Any) -> str:
    """Return the configuration as YAML that `read_yaml` and `from_mapping` read back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it safely, but a key that a mapping has twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} occurs twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        UsageError: If the file cannot be read, is not valid YAML, has a key twice or holds
            something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold key: value lines, not {type(content).__name__}")
    return content


_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _convert(value: Any, hint: Any) -> Any:
    """Convert a value to the type of an option; a ValueError describes the expected type."""
    kind = without_none(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if kind is dict:
        if not isinstance(value, dict):
            raise ValueError("a mapping")
        return value
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"a list, each {_NAMES[item]}")
        try:
            return [_convert(v, item) for v in value]
        except ValueError:
            raise ValueError(f"a list, each {_NAMES[item]}") from None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except (OverflowError, ValueError):
            raise ValueError(_NAMES[float]) from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(_NAMES[kind])
    return value

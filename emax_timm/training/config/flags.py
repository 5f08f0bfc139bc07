"""The flags of an options class, and the parser that raises its errors."""

import argparse
import ast
import dataclasses
import types
import typing
from typing import Any, NoReturn, Union

from ...errors import UsageError

__all__ = ["Parser", "flags_of", "without_none"]


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` with one line, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _KeyValues(argparse.Action):
    """Parse `--flag a=1 b=[2,3]` into a dict; values are Python literals, else strings."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        result = {}
        for item in values or ():
            key, separator, value = str(item).partition("=")
            if not separator:
                raise UsageError(f"{option_string} takes key=value, not {item}")
            try:
                result[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                result[key] = value
        setattr(namespace, self.dest, result)


def flags_of(kind: type, prog: str) -> Parser:
    """Make the parser of an options class; it returns only what was given, and -c FILE."""
    parser = Parser(
        prog=prog,
        description=kind.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    text = "YAML file of options, or name of a recipe"
    parser.add_argument("-c", "--config", metavar="FILE", help=text)
    hints = typing.get_type_hints(kind)
    # Each base of the options class becomes a group of flags.
    for part in reversed(kind.__mro__[:-1]):
        title = (part.__doc__ or "").rstrip(".")
        group = parser if part is kind else parser.add_argument_group(title)
        for name in vars(part).get("__annotations__", {}):
            field = kind.__dataclass_fields__[name]
            _add_flag(group, field, hints[name])
    return parser


def _add_flag(group: argparse._ActionsContainer, field: dataclasses.Field, hint: Any) -> None:
    name, kind = field.name, without_none(hint)
    meta = dict(field.metadata)
    default = field.default_factory() if callable(field.default_factory) else field.default
    text = meta.pop("help").replace("%", "%%")
    del meta["bounds"]  # from_mapping checks them, so that they hold for a file too
    if default not in (None, "", [], {}, False):
        text += f" (default: {default})"
    if meta.pop("positional", False):
        several = typing.get_origin(kind) is list
        metavar = meta.pop("metavar", "DIR")
        group.add_argument(name, nargs="*" if several else "?", metavar=metavar, help=text)
        return
    flags = [*meta.pop("flags", ()), "--" + name.replace("_", "-")]
    options: dict[str, Any] = {"dest": name, "help": text}
    if kind is bool:
        negated = name.startswith("no_")
        options["action"] = "store_true" if negated else argparse.BooleanOptionalAction
    elif kind is dict:
        options |= {"action": _KeyValues, "nargs": "*", "metavar": "KEY=VALUE"}
    elif typing.get_origin(kind) is list:
        options |= {"nargs": meta.pop("nargs", "+"), "type": typing.get_args(kind)[0]}
    else:
        options |= {"type": kind}
    if choices := meta.pop("choices", None):
        options["metavar"] = "{" + ",".join(choices) + "}"
    elif "action" not in options:
        options["metavar"] = name.rsplit("_", 1)[-1].upper()
    group.add_argument(*flags, **(options | meta))


def without_none(hint: Any) -> Any:
    """Return `X` for the hint `X | None`, and `dict` for `dict[...]`."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return dict if typing.get_origin(hint) is dict else hint

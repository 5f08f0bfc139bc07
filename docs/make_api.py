"""Write docs/api.md, the page on the public names of emax_timm, from their docstrings.

    python docs/make_api.py

`tests/test_api.py` fails where the page is not what this gives.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import emax_timm

PAGE = Path(__file__).with_name("api.md")
HEAD = """\
# Public names

`import emax_timm` registers the models with timm and gives these names. Everything else in the
package is internal and may change, but for what the other pages name.

Made by `python docs/make_api.py` from the docstrings. In shapes b is the batch, c the channels, h
and w are the height and the width, l is the length of a sequence, t the number of frames, F is the
finest group count gcd(c, factor), and K the number of candidate group counts.
"""
SECTION = re.compile(r"(Args|Returns|Yields|Raises):$")
ENTRY = re.compile(r"(\w[\w, ]*): +(.+)", re.DOTALL)
WIDTH = 88


def api_page() -> str:
    """The page: every name of `emax_timm.__all__`, with its signature and its docstring."""
    parts = [HEAD]
    for name in emax_timm.__all__:
        parts += [f"## {name}\n", *_entry(name, getattr(emax_timm, name))]
    return "\n".join(parts)


def _entry(name: str, thing: Any) -> list[str]:
    """What the page says of a class or a function, in paragraphs that end with a line break."""
    node = _definition(thing)
    if isinstance(node, ast.FunctionDef):
        is_context = any("contextmanager" in ast.unparse(d) for d in node.decorator_list)
        return [_code(f"with {name}" if is_context else name, node), _docstring(node)]
    functions = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    fields = _fields(node)
    constructor, text = functions.get("__init__"), _docstring(node)
    if constructor is None and thing.__base__.__name__ in emax_timm.__all__:
        base = _definition(thing.__base__)  # which has the constructor, and says what it takes
        methods = [n for n in getattr(base, "body", []) if isinstance(n, ast.FunctionDef)]
        constructor = next(n for n in methods if n.name == "__init__")
        text += "\n" + re.sub(
            r".*?(?=^Args:)", "", _docstring(base), flags=re.DOTALL | re.MULTILINE
        )
    parts = [_code(f"class {name}", constructor)] if constructor else []
    parts.append(text)
    if constructor is None and fields:
        parts.append("Fields:\n")
        parts.append("\n".join(f"- `{field}`: {text}" for field, text in fields.items()) + "\n")
    for method in PUBLIC_METHODS.get(name, ()):
        function = functions[method]
        parts += [f"### {name}.{method}\n", _code(method, function), _docstring(function)]
    return parts


PUBLIC_METHODS = {
    "EMAX": ("forward", "attention", "reset_parameters"),
    "EMAX1d": ("forward", "attention"),
}
"""The methods of a public class that are for its users; the others are for the package."""


def _definition(thing: Any) -> ast.FunctionDef | ast.ClassDef:
    """The syntax tree of the source of a class or function, whatever decorates it."""
    thing = inspect.unwrap(thing)
    tree = ast.parse(Path(inspect.getsourcefile(thing) or "").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return next(n for n in tree.body if isinstance(n, kinds) and n.name == thing.__name__)


def _code(name: str, function: ast.FunctionDef) -> str:
    """The signature, without `self`, in a block of code."""
    arguments = function.args
    arguments.args = [a for a in arguments.args if a.arg != "self"]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    returns = "" if name.startswith(("class ", "with ")) else returns
    line = f"{name}({ast.unparse(arguments)}){returns}"
    if len(line) > WIDTH:
        body = "".join(f"    {argument},\n" for argument in _one_by_one(arguments))
        line = f"{name}(\n{body}){returns}"
    return f"```py\n{line}\n```\n"


def _one_by_one(arguments: ast.arguments) -> list[str]:
    """Each argument of a signature as it stands there."""
    first = len(arguments.args) - len(arguments.defaults)
    defaults = [None] * first + list(arguments.defaults)
    lines = [_argument(*pair) for pair in zip(arguments.args, defaults, strict=True)]
    if arguments.vararg:
        lines.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        lines.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    lines += [_argument(*pair) for pair in pairs]
    if arguments.kwarg:
        lines.append(f"**{ast.unparse(arguments.kwarg)}")
    return lines


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(argument)
    equals = " = " if argument.annotation else "="
    return f"{ast.unparse(argument)}{equals}{ast.unparse(default)}"


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """The fields of a NamedTuple with the strings below them."""
    fields = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            fields[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return fields


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> str:
    """A Google docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    for block in re.split(r"\n(?=\S)", ast.get_docstring(node) or ""):
        section, _, rest = block.partition("\n")
        if not SECTION.match(section):
            lines.append(block)
            continue
        lines.append(f"{section}\n")
        has_names = section in ("Args:", "Raises:")
        entries = re.split(r"\n(?=\S)", textwrap.dedent(rest)) if has_names else [rest]
        for text in (" ".join(entry.split()) for entry in entries):
            named = ENTRY.fullmatch(text) if has_names else None
            lines.append(f"- `{named[1]}`: {named[2]}" if named else f"- {text}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(api_page(), encoding="utf-8")

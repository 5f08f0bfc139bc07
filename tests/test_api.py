"""docs/api.md is what the docstrings of the public names say, and they say it of every argument."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import emax_timm

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_page_is_what_its_command_gives() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert script["api_page"]() == PAGE, "python docs/make_api.py writes the page anew"


def test_page_has_every_public_name_once() -> None:
    assert re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) == emax_timm.__all__


@pytest.mark.parametrize("name", emax_timm.__all__)
def test_every_argument_is_documented(name: str) -> None:
    section = re.split(rf"^## {name}$", PAGE, flags=re.MULTILINE)[1]
    section = re.split(r"^##", section, flags=re.MULTILINE)[0]
    thing = getattr(emax_timm, name)
    fields = getattr(thing, "_fields", None)
    names = fields or [name for name in inspect.signature(thing).parameters if name != "self"]
    documented = section.partition("Raises:\n")[0]
    assert re.findall(r"^- `(\w+)`: [\"A-Z]", documented, re.MULTILINE) == list(names)
    if fields is None and list(names):
        assert "Raises:\n" in section

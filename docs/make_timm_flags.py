"""Write docs/timm_flags.md, the options of timm's scripts and what they are here.

    python docs/make_timm_flags.py

`tests/training/config/test_timm_flags.py` fails where the page is not what this gives.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from emax_timm.training import TrainConfig, ValidateConfig
from emax_timm.training.config.timm_flags import timm_flags

PAGE = Path(__file__).with_name("timm_flags.md")
HEAD = """\
# timm's options

Every option that timm's `train.py` or `validate.py` has or had, with the releases of timm that it
came with and is gone from. {accepted} of the {all} are options here too, with timm's meaning and,
unless the table says otherwise, timm's default. The other {explained} are refused with a message
that says what is in their place, all of them in one line.

timm writes an `args.yaml` beside each run. `train.py -c args.yaml` takes it as it is, as long as
the options that are not here have timm's default.

The greatest omissions are batch norms of their own for augmentation splits (`--split-bn`),
distillation (`--kd-model-name`), NaFlex and several labels per image: each would be more than an
option.

Made by `python docs/make_timm_flags.py` from `emax_timm/training/config/timm_flags.yaml`, which
names its sources.

"""
SCRIPTS = {"train": TrainConfig, "validate": ValidateConfig}
RULE = "| --- | --- | --- |\n"
ALWAYS = {"config"}  # the parser of every command has it


def is_option(script: str, flag: str) -> bool:
    """Whether the command of a script has an option of this name."""
    names = {field.name for field in dataclasses.fields(SCRIPTS[script])}
    return flag in ALWAYS or flag.replace("-", "_") in names


def timm_page() -> str:
    """The page: a table of the options that are here, and one of the others."""
    accepted, explained = [], []
    for flag, entry in timm_flags().items():
        scripts = [script for script in SCRIPTS if script in entry]
        here = [script for script in scripts if is_option(script, flag)]
        spelt = ", ".join(f"`{name}`" for name in [_spelt(flag), *entry.get("also", ())])
        releases = "; ".join(_releases(script, entry[script]) for script in scripts)
        text = entry["here"] if not here else _difference(here[0], flag)
        if here and here != scripts:
            text = f"{text or 'in training'}; not in `validate.py`: {entry['here']}"
        (accepted if here else explained).append(f"| {spelt} | {releases} | {text} |\n")
    counts = {"accepted": len(accepted), "explained": len(explained)}
    parts = [HEAD.format(all=len(accepted) + len(explained), **counts)]
    parts += ["## Options that are here\n\n| option | timm | difference |\n| --- | --- | --- |\n"]
    parts += accepted
    parts += [
        "\n## Options that are not\n\n| option | timm | in its place |\n| --- | --- | --- |\n"
    ]
    return "".join(parts + explained)


def _spelt(flag: str) -> str:
    return flag if flag == "data" else f"--{flag}"


def _releases(script: str, releases: list[str]) -> str:
    since, *until = releases
    if until == [since]:
        return f"{script} before {since}"
    return f"{script} {since}" + "".join(f" to {release}" for release in until)


def _difference(script: str, flag: str) -> str:
    """What the help says of the difference between timm's option and this one."""
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(SCRIPTS[script])}
    if flag in ALWAYS:
        return "also a recipe's name"
    text = fields[flag.replace("-", "_")].metadata["help"]
    if found := re.search(r"\(([^()]*\btimm[^()]*)\)", text):
        text = found[1]
    return (
        text.replace("|", "\\|")
        if "timm" in re.sub("timm (model|optimizer)|timm's|as in timm", "", text)
        else ""
    )


if __name__ == "__main__":
    PAGE.write_text(timm_page(), encoding="utf-8")

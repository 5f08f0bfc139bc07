"""A Space of the Hugging Face Hub that serves `emax demo` of a release."""

from pathlib import Path

from huggingface_hub import SpaceCardData

from ..files import check_target, write_folder
from ..training.config import UsageError
from ..version import __version__

__all__ = ["GRADIO", "check_space", "space_files", "write_space"]

# The version of Gradio that the page is tested with.
GRADIO = "6.31.0"


def space_files(repo: str, license: str) -> dict[str, bytes]:
    """Make the files of a Space that serves a page for the model of a repository.

    Args:
        repo: ORG/NAME of the release on the Hub, from where the Space loads it.
        license: The licence of the weights.
    """
    name = repo.partition("/")[2]
    data = SpaceCardData(
        title=name[:30],  # the Hub cuts longer ones
        emoji="🔍",
        colorFrom="gray",
        colorTo="yellow",
        sdk="gradio",
        sdk_version=GRADIO,
        app_file="app.py",
        models=[repo],
        license=license,
    )
    app = f"""\
# What {repo} sees in an image, and what it attends to.
from emax_timm.demo import serve

serve("hf-hub:{repo}")
"""
    readme = f"""\
---
{data.to_yaml()}
---

# {name}

Drop an image to see the classes that [{repo}](https://huggingface.co/{repo}) finds in it,
where each stage attends, and Grad-CAM beside it. `emax demo --model hf-hub:{repo}` serves
the same page on your own machine.
"""
    texts = {
        "app.py": app,
        "requirements.txt": f"emax-timm[demo]=={__version__}\n",
        "README.md": readme,
    }
    return {name: text.encode() for name, text in texts.items()}


def check_space(folder: Path) -> None:
    """Check that a Space can be written to a folder, which must not exist.

    Raises:
        UsageError: If it exists.
        TargetError: If it cannot be made.
    """
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} is there already; choose another folder for the Space")
    check_target(folder, folder=True)


def write_space(folder: Path, repo: str, license: str) -> None:
    """Write the folder of a Space, which appears complete in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, space_files(repo, license))

"""The `emax demo` command, and the function that a Space of the Hub calls."""

import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..runner import command
from ..training.config import UsageError, from_mapping, option, parse_settings
from ..training.loading import DEFAULT_MODEL, load_model
from .findings import study_model

__all__ = ["demo", "serve"]

NEEDED = "the demo needs the package {}: pip install 'emax-timm[demo]'"
PACKAGES = {"gradio": "gradio", "matplotlib": "matplotlib", "pytorch_grad_cam": "grad-cam"}


@dataclass
class DemoConfig:
    """Serve a page on which an image shows its classes, and what the model attends to."""

    model: str = option(
        DEFAULT_MODEL,
        "name of a timm model with weights, local-dir:FOLDER (such as a run directory) or "
        "hf-hub:ORG/NAME; the default knows ten kinds of clothes, light on a dark ground",
        "-m",
    )
    host: str = option(
        "127.0.0.1", "address to serve on; 0.0.0.0 lets other machines see the page, too"
    )
    port: int = option(7860, "port to serve on; 0 takes a free one", bounds=(0, 65535))


@command("emax demo")
def demo(argv: Sequence[str], prog: str) -> int:
    """Serve the page until it is stopped, and return the exit status."""
    config = from_mapping(DemoConfig, parse_settings(DemoConfig, argv, prog), "the command line")
    serve(config.model, config.host, config.port)
    return 0


def serve(name: str, host: str | None = None, port: int | None = None) -> None:
    """Serve the page of a model until Ctrl+C or SIGTERM.

    Nothing is sent elsewhere, and what users upload is deleted after an hour or at the end.

    Args:
        name: As `load_model` takes it, such as "hf-hub:ORG/NAME".
        host: Address to serve on; None for that in GRADIO_SERVER_NAME, which a Space of the Hub
            sets, else 127.0.0.1.
        port: Port to serve on, 0 for a free one; None for that in GRADIO_SERVER_PORT, else 7860.

    Raises:
        UsageError: If a package is missing, the address cannot be served on, or the model cannot be
            loaded or shown.
    """
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise UsageError(NEEDED.format(package))
    host = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    if port is None:
        port = int(os.environ.get("GRADIO_SERVER_PORT") or 7860)
    port = _free_port(host, port)
    subject = study_model(name, load_model(name, pretrained=True).eval())
    from .page import LAUNCH, make_page, write_examples  # which imports gradio

    with tempfile.TemporaryDirectory(prefix="emax-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio keeps uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        page = make_page(subject, write_examples(Path(folder)))
        ended = _when_told_to_end()
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            **LAUNCH,
        )
        print(f"{name} on http://{host}:{port}; Ctrl+C ends it", flush=True)
        ended.wait()
        page.close(verbose=False)


def _free_port(host: str, port: int) -> int:
    """Return a port that can be served on: the given one, or for 0 any."""
    try:
        with socket.create_server((host, port)) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot serve on {host}:{port}: {reason}") from None


def _when_told_to_end() -> threading.Event:
    """Return an event that SIGINT and SIGTERM set."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    return ended

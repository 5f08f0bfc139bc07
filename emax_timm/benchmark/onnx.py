"""`emax benchmark onnx`: whole networks in ONNX Runtime, against their baselines and PyTorch."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..models.export_file import check_export, export_model
from ..tables import heading, row
from ..training.config import UsageError
from .layers import IN_CPP
from .methods import CPP, backend_serves, computed
from .networks import NETWORKS, Setting, check_networks, inference, make_network, random_images
from .timing import Measured, described, interleaved, machine, milliseconds

__all__ = ["METHODS", "measure_onnx", "report_onnx"]

METHODS = list(NETWORKS)
EAGER, IN_CPP_TOO, ONNX = "PyTorch", "PyTorch, C++", "ONNX Runtime"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def measure_onnx(
    bases: Sequence[str], setting: Setting, rounds: int, methods: Sequence[str] = tuple(METHODS)
) -> dict[str, Any]:
    """Time inference in PyTorch, and in ONNX Runtime with the files that `emax export` writes.

    Both use the same number of threads, and the images are on the device beforehand.

    Args:
        bases: Names of baselines that have variants with attention.
        setting: The inputs and the device; the dtype must be float32, the memory format contiguous.
        rounds: How often each time is measured.
        methods: The methods, of `METHODS`.

    Returns:
        `models[base][method][runtime]`, seconds as in `Measured`.

    Raises:
        ExportError: If an exported file does not compute what the network does.
        UsageError: If a network does not exist, a package is missing, or ONNX Runtime cannot use
            the device.
    """
    check_networks(bases, methods)
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network.onnx")
        check_export(file, None, overwrite=True)
        version = _check_provider(setting.device)
        for base in bases:
            calls: dict[tuple[str, str], Callable[[], Any]] = {}
            for method in tqdm(methods, f"{base}, export", leave=False, disable=None):
                size = (3, setting.size, setting.size)
                network = make_network(base, method, setting._replace(device=torch.device("cpu")))
                export_model(network.eval(), file, input_size=size, overwrite=True)
                calls[method, ONNX] = _session(file, random_images(setting))
                call = inference(network.to(setting.device), setting)
                calls[method, EAGER] = computed(EAGER, call)
                if method in IN_CPP and backend_serves(CPP, setting.device, setting.dtype):
                    calls[method, IN_CPP_TOO] = computed(IN_CPP_TOO, call)
            models[base] = {method: {} for method in methods}
            for (method, runtime), times in interleaved(calls, rounds, setting.device).items():
                models[base][method][runtime] = times
    return {
        "machine": {**machine(setting.device), "onnxruntime": version},
        "batch": setting.batch,
        "size": setting.size,
        "rounds": rounds,
        "models": models,
    }


def _check_provider(device: torch.device) -> str:
    """Return the version of ONNX Runtime, after checking that it can use the device."""
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if PROVIDERS.get(device.type) not in there:
        raise UsageError(f"this onnxruntime cannot use {device}; it has {', '.join(there)}")
    return onnxruntime.__version__


def _session(file: Path, images: Tensor) -> Callable[[], Any]:
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its idle threads would continue to spin, and slow down whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    device, number = images.device.type, images.device.index or 0
    session = onnxruntime.InferenceSession(file, options, providers=[PROVIDERS[device]])
    binding = session.io_binding()
    binding.bind_output(session.get_outputs()[0].name, device, number)

    def call() -> None:
        name = session.get_inputs()[0].name
        pointer = images.data_ptr()
        binding.bind_input(name, device, number, numpy.float32, list(images.shape), pointer)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def report_onnx(found: dict[str, Any]) -> str:
    """Format the result of `measure_onnx` as Markdown."""
    lines: list[str] = []
    for base, methods in found["models"].items():
        runtimes = [
            name
            for name in (EAGER, IN_CPP_TOO, ONNX)
            if any(name in times for times in methods.values())
        ]
        baseline = methods.get("baseline", {})
        head = [base]
        for runtime in runtimes:
            head += [f"{runtime}, ms", *["/ baseline"] * bool(baseline)]
        lines += heading([*head, f"{ONNX} / {EAGER}"])
        for method, times in methods.items():
            cells = [method]
            for runtime in runtimes:
                cells.append(milliseconds(Measured(*times[runtime])) if runtime in times else "-")
                # The baseline has no C++ variant; there the one in PyTorch is compared.
                reference = baseline.get(runtime, baseline.get(EAGER))
                if baseline:
                    cells.append(_ratio(times[runtime], reference) if runtime in times else "-")
            lines.append(row([*cells, _ratio(times[ONNX], times[EAGER])]))
        lines.append("")
    lines.append(
        f"Inference, batch {found['batch']}, {found['size']} x {found['size']}. Medians of "
        f"{found['rounds']} interleaved rounds, quartiles in brackets. "
        f"{described(found['machine'])}."
    )
    return "\n".join(lines)


def _ratio(ours: Any, theirs: Any) -> str:
    return f"{Measured(*ours).median / Measured(*theirs).median:.2f}"

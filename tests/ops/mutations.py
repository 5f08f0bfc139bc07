"""Break a backend, one line at a time, and see which test of its tester notices.

    python tests/ops/mutations.py portable
    python tests/ops/mutations.py cpp --write cpp.md    (compiles for 15 minutes)

All happens in a copy of the package and of the tests. Prints a Markdown table; the exit status is 1
if a mutation is not noticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ["emax_timm", "tests/conftest.py", "tests/ops", "tests/support", "tests/training"]


class Mutation(NamedTuple):
    """One changed line."""

    what: str
    file: str
    """Below `emax_timm/ops`."""
    old: str
    new: str


PORTABLE = [
    Mutation(
        "eps is added twice",
        "portable/fine_maps.py",
        "rstd = torch.rsqrt(variance + weights.config.eps)",
        "rstd = torch.rsqrt(variance + 2 * weights.config.eps)",
    ),
    Mutation(
        "the border means lack a corner",
        "portable/fine_maps.py",
        "        + F.pad(x[..., :1, :1], [2, 0, 2, 0])\n",
        "",
    ),
    Mutation(
        "a column of the correlation wraps around",
        "portable/fine_maps.py",
        "    grid[:, :, :, 0, :, -1] = 0\n",
        "",
    ),
    Mutation(
        "the batch's vote sends ties to the largest count",
        "portable/grouping.py",
        "(candidates == votes.sum(0).argmax())",
        "(candidates == votes.shape[1] - 1 - votes.sum(0).flip(0).argmax())",
    ),
    Mutation(
        "the warm-up keeps the finest grouping whole",
        "portable/grouping.py",
        "rest = (1 - warmup) * torch.eye(",
        "rest = (1 - warmup * warmup) * torch.eye(",
    ),
    Mutation(
        "the global gate does not see the channel gate",
        "portable/gates.py",
        "fused = fused + gamma * channel * mean",
        "fused = fused + 0 * gamma * channel * mean",
    ),
    Mutation(
        "bfloat16 is computed in bfloat16",
        "portable/forward.py",
        "half = x.dtype == torch.float16 or x.dtype == torch.bfloat16",
        "half = x.dtype == torch.float16",
    ),
    Mutation(
        "the gradient of the choice ignores the temperature",
        "portable/backward.py",
        "grad_logits = grad_logits / present(weights.temperature)",
        "pass",
    ),
    Mutation(
        "a hidden unit at 0 passes a gradient",
        "portable/backward.py",
        "* (hidden > 0)",
        "* (hidden >= 0)",
    ),
    Mutation(
        "the second map's gradient is not centred",
        "portable/fine_maps_backward.py",
        "second = grads.second - total.unsqueeze(-1) / pixels",
        "second = grads.second - 0 * total.unsqueeze(-1) / pixels",
    ),
]

CPP = [
    Mutation(
        "the residual gate adds no input",
        "cpp/layer.cpp",
        "fma(a, branch, Vec(1) - alpha).store(",
        "fma(a, branch, Vec(0)).store(",
    ),
    Mutation(
        "the noise is not added",
        "cpp/layer.cpp",
        "(row[k] + (drawn ? drawn[k] : 0))",
        "(row[k] + (drawn ? 0 : 0))",
    ),
    Mutation(
        "the batch's vote sends ties to the largest count",
        "cpp/layer.cpp",
        "std::max_element(votes.begin(), votes.end()) - votes.begin()",
        "votes.rend() - std::max_element(votes.rbegin(), votes.rend()) - 1",
    ),
    Mutation(
        "the warm-up keeps the chosen grouping whole",
        "cpp/grouping.cpp",
        "sigmoid(fma(fine, rest, coarse * warmup))",
        "sigmoid(fma(fine, rest, coarse))",
    ),
    Mutation(
        "the gradient of the choice lacks the second term",
        "cpp/grouping.cpp",
        "total += to_first_[j] / members_ + weights_[j] * to_second_[j];",
        "total += to_first_[j] / members_;",
    ),
    Mutation(
        "bfloat16 is cut off rather than rounded",
        "cpp/images.cpp",
        "  at::vec::convert(from, to, count);\n",
        "  for (int64_t i = 0; i < count; ++i) to[i] = at::BFloat16(\n"
        "      reinterpret_cast<const uint16_t*>(from + i)[1], at::BFloat16::from_bits());\n",
    ),
    Mutation(
        "a column of the correlation wraps around",
        "cpp/forward.cpp",
        "        taps_[(t + 2) * tap_stride_ + i * s.w] = 0;\n",
        "",
    ),
    Mutation(
        "a hidden unit at 0 passes a gradient",
        "cpp/backward.cpp",
        "* (hidden > 0)",
        "* (hidden >= 0)",
    ),
    Mutation(
        "the second map's gradient is not centred",
        "cpp/backward_tiles.cpp",
        "(load(second + at, count) - mean).store(",
        "load(second + at, count).store(",
    ),
    Mutation(
        "the border means lack a corner",
        "cpp/fine_maps.h",
        "taps[0] = upper - left + end[s.w - 1] * per_pixel;",
        "taps[0] = upper - left;",
    ),
]
MUTATIONS = {"portable": PORTABLE, "cpp": CPP}

# Of a library that differs in one line from the last one little is to be compiled.
BUILD = """
import contextlib, os, sys
from emax_timm.ops.cpp import library
os.makedirs("objects", exist_ok=True)
library.tempfile.TemporaryDirectory = lambda dir: contextlib.nullcontext("objects")
library.build()
"""


class Copy:
    """The package and the tests of a backend, in a folder of their own."""

    def __init__(self, root: Path, backend: str) -> None:
        self.root, self.backend = root, backend
        for name in COPIED:
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, target)
        shutil.copy(ROOT / "pyproject.toml", root)
        where = self.python("-c", "import emax_timm; print(emax_timm.__file__)").stdout.strip()
        assert Path(where) == root / "emax_timm" / "__init__.py", f"{where} is not the copy"

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("EMAX_")}
        environment["PYTHONPATH"] = str(self.root)
        environment["OMP_NUM_THREADS"] = "1"
        if self.backend == "cpp":
            environment["EMAX_KERNELS_DIR"] = str(self.root / "kernels")
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
        )

    def test(self, *options: str) -> tuple[int, list[str], str]:
        """Exit status of the tester, the tests that failed, and what was printed."""
        if self.backend == "cpp":
            built = self.python("-c", BUILD)
            assert built.returncode == 0, built.stderr[-2000:]
        file = f"tests/ops/test_{self.backend}.py"
        done = self.python(
            *("-m", "pytest", "-q", "-rfE", "-n0", "--tb=no", "-p", "no:cacheprovider"),
            *("-m", "", "-k", "not inductor", *options, file),
        )
        marks = ("FAILED ", "ERROR ")
        lines = [line for line in done.stdout.splitlines() if line.startswith(marks)]
        tests = [line.split(" ", 1)[1].split(" - ")[0] for line in lines]
        return done.returncode, tests, done.stdout + done.stderr


def run(backend: str, root: Path) -> tuple[list[str], bool]:
    """The lines of the table, and whether every mutation was noticed."""
    copy = Copy(root, backend)
    status, failing, printed = copy.test()
    if status not in (0, 1):
        raise SystemExit(f"the tester itself ends with status {status}:\n{printed[-3000:]}")
    deselected = []
    for test in failing:
        print(f"fails without any mutation, and counts for none: {test}", flush=True)
        deselected += ["--deselect", test]
    lines, noticed = ["| mutation | in | noticed by |", "| --- | --- | --- |"], True
    for mutation in MUTATIONS[backend]:
        path = root / "emax_timm" / "ops" / mutation.file
        original = path.read_text()
        count = original.count(mutation.old)
        assert count == 1, f"{mutation.file} has {count} times: {mutation.old}"
        path.write_text(original.replace(mutation.old, mutation.new))
        status, failed, _ = copy.test("-x", *deselected)
        path.write_text(original)
        test = f"`{failed[0].split('::')[-1]}`" if failed else f"a crash, status {status}"
        if status == 0:
            test, noticed = "**nothing**", False
        lines.append(f"| {mutation.what} | `{mutation.file}` | {test} |")
        print(lines[-1], flush=True)
    return lines, noticed


def main() -> int:
    """Print the table of a backend; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("backend", choices=MUTATIONS, nargs="?", default="portable")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to a file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="emax-mutations-") as folder:
        lines, noticed = run(options.backend, Path(folder).resolve())
    table = "\n".join([*lines, ""])
    print(f"\n{table}", end="")
    if options.write:
        options.write.write_text(table)
    return 0 if noticed else 1


if __name__ == "__main__":
    sys.exit(main())

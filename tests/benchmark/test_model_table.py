"""The table of models: its figures against formulas and real runs, its formats, its file."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiers import mostly_slow
from torch import nn

from emax_timm.benchmark import ModelRow, list_models, markdown, measure, model_names, model_table
from emax_timm.errors import UsageError
from emax_timm.models.cost import activation_bytes, count_macs
from emax_timm.tables import marks

BEGIN, END = marks(model_table.MARK)
FILE = f"# Models\n\n{BEGIN}\nold\n{END}\n\nMore.\n"
ROW = ModelRow(
    model="net",
    parameters=25_557_032,
    macs=4_089_184_256,
    activation_bytes=99_960_000,
    input_size=(3, 224, 224),
    tags=("a_in1k", "b_in1k"),
    licences=("apache-2.0", "cc-by-nc-4.0"),
    reference=False,
)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table whose rows cost nothing."""
    monkeypatch.setattr(
        model_table, "measure", lambda name: ROW if name == "resnet18_emax" else pytest.fail(name)
    )


def allocated_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What a forward pass on the CPU leaves allocated, told by the allocator, less its output."""
    model.train()
    with torch.profiler.profile(profile_memory=True) as profile:
        y = model(x)
    left = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    return left - y.untyped_storage().nbytes()


def test_figures_of_resnet50_are_the_known_ones() -> None:
    row = measure("resnet50")
    assert row.parameters == 25_557_032
    assert row.macs == 4_089_184_256
    assert row.input_size == (3, 224, 224)
    assert row.activation_bytes == pytest.approx(85.9e6, rel=0.01)


@pytest.mark.slow
def test_swin_is_measured_as_its_authors_state_it() -> None:
    row = measure(model_table.REFERENCE)  # 28.3 M and 4.5 G in arXiv 2103.14030
    assert row.reference
    assert row.parameters == pytest.approx(28.3e6, rel=0.005)
    assert row.macs == pytest.approx(4.5e9, rel=0.005)
    assert row.tags == ("ms_in1k", "ms_in22k", "ms_in22k_ft_in1k")
    assert set(row.licences) == {"mit"}


@pytest.mark.parametrize("name", mostly_slow(["resnet10t_emax", "resnet18_msa"]))
def test_figures_agree_with_a_real_run_and_with_the_allocator(name: str) -> None:
    row = measure(name)
    model, x = timm.create_model(name), torch.randn(2, *row.input_size)
    assert row.macs == count_macs(model, x[:1])
    kept = activation_bytes(model, x)
    # What does not grow with the batch, as batch norms' statistics, is shared by 2 and by 64.
    assert row.activation_bytes == pytest.approx(kept / 2, rel=0.01)
    # The allocator knows not of the image, and rounds.
    assert allocated_bytes(model, x) == pytest.approx(kept - x.nbytes, rel=0.01)


def test_model_that_looks_at_values_is_measured_for_real(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, kernel_size=1)
            self.pretrained_cfg = {"input_size": (3, 8, 8)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum().item() >= 0 else x

    monkeypatch.setattr(timm, "create_model", lambda name: Net())
    row = measure("looks_at_values")
    assert (row.macs, row.activation_bytes) == (3 * 4 * 64, 4 * 3 * 64)
    assert (row.parameters, row.tags, row.licences) == (16, (), ())


@pytest.mark.slow
def test_measuring_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    assert measure("resnet10t_emax") == measure("resnet10t_emax")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert type(torch.zeros(1)) is torch.Tensor
    assert torch.zeros(1).device.type == "cpu"


def test_names_are_the_packages_and_last_the_reference() -> None:
    *names, last = model_names()
    assert last == model_table.REFERENCE
    assert {"resnet10t_emax", "resnet50_emax"} <= set(names)
    for name in names:
        assert timm.model_entrypoint(name).__module__.startswith("emax_timm.models.emax_"), name
    assert model_names("*_emax") == [name for name in names if name.endswith("_emax")]
    assert model_names("swin*") == [last]


@pytest.mark.parametrize(
    ("pattern", "spelt"),
    [("resnet50_emx", "resnet50_emax"), ("resnet152_emaxx*", "resnet152_emax")],
)
def test_no_match_is_one_line_with_the_nearest_name(
    pattern: str, spelt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list_models([pattern]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"emax list: error: no model matches {pattern}; the nearest name is {spelt}\n"
    with pytest.raises(UsageError):
        model_names(pattern)


@pytest.mark.parametrize("argv", [["--jsn"], ["--json", "--markdown"], ["a", "b"], ["--write"]])
def test_malformed_flags_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert list_models(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("emax list: error: ")


def test_help_says_what_macs_leave_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        list_models(["--help"])
    assert exit_.value.code == 0
    help_ = " ".join(capsys.readouterr().out.split())
    assert "pooling, sigmoid, norms and other elementwise work count nothing" in help_


@pytest.mark.slow
def test_text_is_aligned_and_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_models(["resnet10t_emax"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    head, line = out.splitlines()
    assert head.index("MACs (G)") + len("MACs (G)") == line.index("0.707") + len("0.707")
    assert line.split()[:2] == ["resnet10t_emax", "5.53"]
    assert head.index("Input") == line.index("3 x 176 x 176")


def test_json_is_a_list_of_unrounded_objects(
    instant: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list_models(["resnet18_emax", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert list(row) == list(ROW.__dataclass_fields__)
    assert row["macs"] == ROW.macs
    assert row["tags"] == ["a_in1k", "b_in1k"]


def test_markdown_marks_the_reference_and_explains_the_figures() -> None:
    bare = ModelRow("swin", 1_234_500_000, 0, 5_000, (1, 8, 8), (), (), reference=True)
    lines = markdown([ROW, bare]).splitlines()
    assert lines[2:5] == [
        "| `net` | 25.6 | 4.09 | 100 | 3 x 224 x 224 | a_in1k, b_in1k | apache-2.0, cc-by-nc-4.0 |",
        "| `swin` (timm's own, for comparison) | 1230 | 0.00 | 0.00500 | 1 x 8 x 8 | - | - |",
        "",
    ]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "pooling, sigmoid, norms" in " ".join(lines[5:])
    assert "`swin`" not in model_table.plain_text([ROW, bare])
    assert model_table.plain_text([ROW, bare]).endswith("swin: timm's own, for comparison")


def test_write_replaces_what_is_between_the_markers(
    instant: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("models.md")
    path.write_text(FILE)
    path.chmod(0o640)
    argv = ["resnet18_emax", "--markdown", "--write", "models.md"]
    assert list_models(argv) == 0
    assert capsys.readouterr().out.strip() == markdown([ROW])
    text = path.read_text()
    made = "Made by `emax list resnet18_emax --write models.md`:"
    assert text == FILE.replace("old", f"{made}\n\n{markdown([ROW])}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list_models(argv) == 0
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["models.md"]


def test_write_keeps_links_line_ends_and_other_characters(instant: None, tmp_path: Path) -> None:
    path, link = tmp_path / "real.md", tmp_path / "link.md"
    path.write_bytes(f"é\f x\r\n{BEGIN}\r\n{END}".encode().replace(b"\f", b"\f\xe2\x80\xa8"))
    link.symlink_to(path.name)
    assert list_models(["resnet18_emax", "--write", str(link)]) == 0
    assert link.is_symlink()
    content = path.read_bytes()
    assert content.startswith(f"é\f\u2028 x\r\n{BEGIN}\r\nMade by ".encode())
    assert content.endswith(f"\r\n{END}".encode())
    assert content.count(b"\n") == content.count(b"\r\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{BEGIN}\n",
        f"{END}\n",
        f"{END}\n{BEGIN}\n",
        f"{BEGIN}\n{BEGIN}\n{END}\n",
        f"{BEGIN}\n{END}\n{END}\n",
        f"{BEGIN}\n{END}\n" * 2,
        f"text {BEGIN}\n{END}\n",
    ],
)
def test_write_refuses_wrong_markers_before_measuring(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_table, "measure", pytest.fail)
    path = tmp_path / "models.md"
    path.write_text(text)
    before = path.stat()
    assert list_models(["--write", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"emax list: error: {path} must have the line {BEGIN} once and")
    assert path.read_text() == text
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_write_refuses_what_is_no_text_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models.md"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe" + FILE.encode())
    assert list_models(["--write", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"emax list: error: cannot change {path}: ")


@pytest.mark.parametrize(
    "step",
    ["tempfile.TemporaryDirectory", "pathlib.Path.write_bytes", "shutil.copymode", "os.replace"],
)
def test_write_that_fails_leaves_the_file_and_nothing_else(
    step: str,
    instant: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "models.md"
    path.write_text(FILE)
    monkeypatch.setattr(step, fail)
    assert list_models(["resnet18_emax", "--write", str(path)]) == 2
    monkeypatch.undo()
    assert capsys.readouterr() == (
        "",
        f"emax list: error: cannot write {path}: No space left on device\n",
    )
    assert path.read_text() == FILE
    assert os.listdir(tmp_path) == ["models.md"]


def test_write_that_is_interrupted_leaves_the_file_and_nothing_else(
    instant: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "models.md"
    path.write_text(FILE)
    monkeypatch.setattr("os.replace", interrupt)
    assert list_models(["resnet18_emax", "--write", str(path)]) == 130
    assert path.read_text() == FILE
    assert os.listdir(tmp_path) == ["models.md"]


@pytest.mark.slow
def test_table_of_all_models_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_models(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == model_names()
    assert [row["model"] for row in rows if row["reference"]] == [model_table.REFERENCE]
    for row in rows:
        name = row["model"]
        model: Any = timm.create_model(name)
        assert row["parameters"] == sum(p.numel() for p in model.parameters()), name
        assert row["input_size"] == list(model.pretrained_cfg["input_size"]), name
        assert len(row["tags"]) == len(row["licences"]), name
        assert bool(row["tags"]) == (timm.list_models(name, pretrained=True) != []), name
        baseline = name.rpartition("_")[0]
        if timm.is_model(baseline) and not row["reference"]:
            measured = measure(baseline)
            # Its default weights may have another number of classes, and be of another image size.
            head: Any = timm.create_model(baseline, num_classes=model.num_classes)
            assert row["parameters"] >= sum(p.numel() for p in head.parameters()), name
            if list(measured.input_size) == row["input_size"]:
                assert row["macs"] >= measured.macs, name
                assert row["activation_bytes"] > measured.activation_bytes, name

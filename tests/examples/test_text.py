"""The example of sequences: its names, its masks, and what it prints."""

import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "text.py"
ATTENTIONS = ("none", "se", "emax")
NUMBER = r"[+-]?\d\.\d{3}"


@pytest.fixture(scope="module")
def text() -> Any:
    """The example's functions and classes by name."""
    if not os.environ.get("CI"):
        pytest.importorskip("babel")
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def splits(text: Any) -> Any:
    return text["load_names"]()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_each_name_is_in_one_language_and_one_split(text: Any, splits: Any) -> None:
    from babel import Locale

    train, test = splits
    assert not set(train.texts) & set(test.texts)
    for names in splits:
        assert len(set(names.texts)) == len(names.texts) == len(names.labels)
        assert names.labels.unique().tolist() == list(range(len(text["LANGUAGES"])))
    spellings = [
        {text["normalise"](name) for kind in (x.territories, x.languages) for name in kind.values()}
        for x in map(Locale.parse, text["LANGUAGES"])
    ]
    for names in splits:
        for name, label in zip(names.texts, names.labels.tolist(), strict=True):
            assert [label] == [index for index, found in enumerate(spellings) if name in found]


def test_a_country_is_in_the_same_split_in_every_language(text: Any, splits: Any) -> None:
    from babel import Locale

    sides = [set(names.texts) for names in splits]
    found = {True: 0, False: 0}
    for code in ("DE", "JP", "BR", "ES", "GR", "KE", "UA", "FR", "HU", "US"):
        spelt = {text["normalise"](Locale.parse(x).territories[code]) for x in text["LANGUAGES"]}
        in_training, in_test = (bool(spelt & side) for side in sides)
        assert in_training != in_test
        found[in_test] += 1
    assert min(found.values()) > 0


def test_alphabet_is_of_the_training_names(text: Any) -> None:
    alphabet = text["Alphabet"](["abba", "cab"])
    assert alphabet.size == 4  # a and b twice, padding and unknown
    assert alphabet.encode(["abc", "b", "dä"]).tolist() == [[2, 3, 1], [3, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_word_has_the_same_logits_and_gradients_alone_and_in_a_batch(
    text: Any, attention: str
) -> None:
    torch.manual_seed(0)
    alphabet = text["Alphabet"](["abcdefgh"] * 2)
    model = text["TextNet"](alphabet.size, attention).double().eval()
    with torch.no_grad():  # open every gate, and make padding visible wherever it is read
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    parameters = list(model.parameters())
    words = ["a", "bc", "hgfedcba", "abz", "cdefghabcdefgh"]
    padded = torch.nn.functional.pad(alphabet.encode(words), (0, 5))
    together = model(padded)
    alone = torch.cat([model(alphabet.encode([word])) for word in words])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert together.std(dim=0).min() > 0.01
    gradients = torch.autograd.grad(together.square().sum(), parameters)
    expected = torch.autograd.grad(alone.square().sum(), parameters)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert ours.abs().max() > 0


def test_the_networks_of_a_seed_differ_in_the_attention_alone(text: Any) -> None:
    states = []
    for attention in ATTENTIONS:
        torch.manual_seed(3)
        states.append(text["TextNet"](20, attention).state_dict())
    none, *others = states
    assert not [key for key in none if "attention" in key]
    for state in others:
        added = set(state) - set(none)
        assert {key.split(".attention")[0] for key in added} == {"blocks.0", "blocks.1"}
        assert all(torch.equal(value, state[key]) for key, value in none.items())


def test_batches_have_each_text_once_an_epoch(text: Any) -> None:
    texts = ["x" * (1 + index * 7 % 20) for index in range(1000)]
    batches = text["make_batches"](texts, 2, seed=0, size=30)
    assert len(batches) == 2 * -(-1000 // 30)
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(1000))
    spread = [len({len(texts[index]) for index in batch.tolist()}) for batch in batches]
    assert sorted(spread)[len(spread) // 2] < 6  # of the 20 lengths that there are
    again = text["make_batches"](texts, 2, seed=0, size=30)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_naive_bayes_counts(text: Any) -> None:
    names = text["Names"](["ab", "aa", "bb", "bc"], torch.tensor([0, 0, 1, 1]))
    predicted = text["naive_bayes"](names, ["a", "b", "cb", "z"], list)
    assert predicted.tolist() == [0, 1, 1, 0]


def test_interval_is_students(text: Any) -> None:
    # Mean 0.2, deviation 0.1 and the quantile 4.3027 of two degrees of freedom.
    assert text["interval"]([0.1, 0.2, 0.3]).strip() == "0.200 ± 0.248"
    assert text["interval"]([0.5, 0.6, 0.7], [0.4, 0.6, 0.5], "+").strip() == "+0.100 ± 0.248"
    assert text["interval"]([0.5]).strip() == "0.500"


def test_confusions_are_the_most_frequent_errors(text: Any) -> None:
    labels, predicted = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 2, 1, 0, 2])
    first, second, third = text["LANGUAGES"][:3]
    expected = [f"{first} as {second} 50%", f"{first} as {third} 25%", f"{second} as {first} 50%"]
    assert text["confusions"](labels, predicted) == ", ".join(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "--seeds must be at least 1, not 0"),
        (("--limit", "-5"), "--limit must be at least 1, not -5"),
        (("--words", "Haus", ""), "--words must have characters, and one has none"),
    ],
)
def test_wrong_arguments_are_refused(
    text: Any,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def rows(printed: str) -> dict[str, tuple[str, ...]]:
    """The lines of the networks: accuracy, its interval, the difference and its interval."""
    half = rf"(?: ± ({NUMBER}))?"
    pattern = rf"^(\w+) +({NUMBER}){half}(?: +({NUMBER}){half})? +[\d,]+ +\d+\.\d$"
    return {row[0]: row[1:] for row in re.findall(pattern, printed, re.MULTILINE)}


def test_example_prints_its_table(
    text: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--seeds", "2", "--epochs", "1", "--limit", "300", "--words", "Haus", "x")
    printed = capsys.readouterr().out
    found = rows(printed)
    assert list(found) == list(ATTENTIONS)
    assert all(found["none"][:2])
    assert found["none"][2:] == ("", "")
    for attention in ("se", "emax"):
        assert all(found[attention])
        difference = float(found[attention][0]) - float(found["none"][0])
        assert float(found[attention][2]) == pytest.approx(difference, abs=0.0011)
    first, second = printed.splitlines()[-2:]
    assert re.fullmatch(r"Haus: ([A-Z]\w+ 0\.\d{3}, ){2}[A-Z]\w+ 0\.\d{3}", first)
    assert second.startswith("x: ")


@pytest.mark.slow
def test_networks_learn(
    text: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--seeds 1 --epochs 2 --limit 6000 --words papillon πεταλούδα"
    run(monkeypatch, *options.split())
    printed = capsys.readouterr().out
    script, letters, _ = map(float, re.findall(rf"^[a-z]+ +({NUMBER})$", printed, re.MULTILINE))
    assert 1 / 30 < script < letters
    for accuracy, *_ in rows(printed).values():
        assert float(accuracy) > script + 0.1
    assert "πεταλούδα: Greek" in printed

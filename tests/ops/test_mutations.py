"""The lines that mutations.py breaks at night are still there."""

import pytest
from interpreters import ROOT
from mutations import MUTATIONS, Mutation

ALL = [mutation for mutations in MUTATIONS.values() for mutation in mutations]


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.what)
def test_mutation_has_one_place(mutation: Mutation) -> None:
    text = (ROOT / "emax_timm" / "ops" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old

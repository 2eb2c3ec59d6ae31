"""Mutations fit the code: found in seconds here, and at the end of `make test` otherwise."""

from pathlib import Path

import pytest

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_what_is_replaced_stands_there_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.right) == 1
    assert (ROOT / mutation.test.partition("::")[0]).exists()

"""What the command line takes as a length, and what it says of anything else."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from vllm_cascade.commands.arguments import json_object, positive, positive_int, tokens


@pytest.mark.parametrize(
    "text", ["1", "4096", "128k", "128K", "1m", "1M", "25.6k", "1.5m", " 2G ", "3t"]
)
def test_lengths_are_those_of_vllm(text: str) -> None:
    from vllm.utils.argparse_utils import human_readable_int

    assert tokens(text) == human_readable_int(text)


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1.5K", "-1", "1e6", "128 k", "1kk", "0x10", "many"]
)
def test_what_is_no_length_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"no number of tokens.*128k"):
        tokens(text)


def test_nothing_is_no_amount() -> None:
    for read, text in ((tokens, "0k"), (positive_int, "0"), (positive, "0"), (positive, "nan")):
        with pytest.raises(ArgumentTypeError, match="not above zero"):
            read(text)
    with pytest.raises(ArgumentTypeError, match="not finite"):
        positive("inf")
    assert (positive_int("7"), positive("0.5")) == (7, 0.5)


def test_json_is_an_object() -> None:
    assert json_object('{"a": 1}') == {"a": 1}
    for text, said in (("{", "not JSON"), ("[1]", "no JSON object")):
        with pytest.raises(ArgumentTypeError, match=said):
            json_object(text)

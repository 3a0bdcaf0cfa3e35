"""What holds for every program: how it answers a wrong option."""

import importlib

import pytest
from test_architecture import module, programs

from common.cli import Parser
from common.errors import InputError

OF_JSONARGPARSE = {"train", "tools.find_label_errors", "tools.show_batch"}
PROGRAMS = sorted({*map(module, programs())} - OF_JSONARGPARSE)
"""The others have a parser of jsonargparse; tests/test_config.py tests it."""


def parser_of(name: str) -> Parser:
    return importlib.import_module(name).make_parser()


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_can_be_printed_and_an_unknown_option_suggests_the_nearest_known_one(name):
    parser = parser_of(name)
    option = max(parser._option_string_actions, key=len)
    assert option in parser.format_help()
    with pytest.raises(InputError, match=f"did you mean {option}"):
        parser.parse_args([option[:-2] + option[-1]])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tools.make_shards", "--splits val"),
        ("tools.predict", "--box 1 2 x 4"),
        ("evaluate", "--people 0"),
        ("evaluate", "--xyzzy 3"),
        ("evaluate", "--batch 3"),
    ],
)
def test_a_wrong_value_or_an_abbreviation_is_one_error_with_its_option(name, words):
    with pytest.raises(InputError) as caught:
        parser_of(name).parse_args(words.split())
    assert words.split()[0] in caught.value.found

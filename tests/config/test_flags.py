"""Settings that are true or false, alone on a command line."""

from dataclasses import dataclass, field

import pytest

from ffcv_ssl.config.flags import with_true
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.errors import UserError


@dataclass(frozen=True)
class Group:
    """A group."""

    fast: bool = False
    """Whether it is fast."""
    name: str = "a"
    """A text."""


@dataclass(frozen=True)
class Settings:
    """Settings."""

    longer: bool = False
    """Whether it is longer."""
    number: int = 1
    """A number."""
    group: Group = field(default_factory=Group)


def test_a_setting_that_is_true_or_false_means_true_where_it_stands_alone():
    for words in (["--longer", "--number", "2"], ["--number=2", "--longer"]):
        config, _ = parse_config(Settings, words, "prog", "about")
        assert config.longer and config.number == 2 and not config.group.fast
    config, _ = parse_config(Settings, ["--group.fast", "--group.name=b"], "prog", "about")
    assert config.group.fast and not config.longer


def test_a_value_behind_it_counts_and_other_settings_still_need_one():
    assert with_true(["--longer", "false"], Settings) == ["--longer", "false"]
    assert with_true(["--longer=false"], Settings) == ["--longer=false"]
    assert with_true(["--number", "--longer"], Settings) == ["--number", "--longer=true"]
    assert with_true([], Settings) == []
    with pytest.raises(UserError, match="number: got nothing, expected a whole number"):
        parse_config(Settings, ["--number", "--longer"], "prog", "about")

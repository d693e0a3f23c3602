"""Configuration from files that build on one another and from the command line."""

import re
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import pytest
import yaml

import train
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import config_dict
from ffcv_ssl.config.yaml_layers import read_layers
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation.protocols.linear import LinearConfig


class Extras(TypedDict, total=False):
    """Keys that may be left out: one value to the parser, a mapping to the user."""

    blur: float
    flip: float


@dataclass(frozen=True)
class Optim:
    """The group with several keys."""

    lr: float = 1.0
    """A number."""
    name: Literal["sgd", "lars"] = "sgd"
    """A choice."""
    betas: tuple[float, float] = (0.9, 0.99)
    """A list."""

    def __post_init__(self):
        if self.lr <= 0:
            raise UserError(f"optim.lr: got {self.lr}, expected more than 0")


@dataclass(frozen=True)
class Config:
    """A configuration of every kind of key."""

    epochs: int = 10
    """A number."""
    time: str = ""
    """A text that may look like a number."""
    optim: Optim = field(default_factory=Optim)
    extras: Extras = field(default_factory=dict)
    """A mapping that the parser takes as one value."""


def check(config):
    """Values that do not go together."""
    if config.optim.name == "lars" and config.epochs < 5:
        raise ValueError(f"epochs: got {config.epochs}, expected 5 or more with lars")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML file below the working directory; returns its path as one would type it."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_file


def parse(*argv):
    return parse_config(Config, list(argv), "command", "A command.", check)[0]


def refusal(*argv):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_wins_over_its_base_key_by_key(write):
    write("base.yaml", "epochs: 20\noptim: {lr: 0.5, betas: [0.1, 0.2]}\nextras: {blur: 0.3}\n")
    path = write("a.yaml", "base: base.yaml\noptim: {name: lars, betas: [0.5, 0.6]}\n")
    config = parse("--config", path)
    assert config == Config(20, optim=Optim(0.5, "lars", (0.5, 0.6)), extras={"blur": 0.3})


def test_mappings_of_a_file_and_its_base_are_merged_at_every_depth(write):
    write("base.yaml", "extras: {blur: 0.3, flip: 0.1}\n")
    path = write("a.yaml", "base: base.yaml\nextras: {flip: 0.2}\n")
    assert parse("--config", path).extras == {"blur": 0.3, "flip": 0.2}


def test_dotted_keys_are_those_of_their_groups(write):
    write("base.yaml", "optim.lr: 0.1\n")
    write("more.yaml", "optim: {lr: 0.2, name: lars}\n")
    path = write("a.yaml", "base: [base.yaml, more.yaml]\noptim.lr: 0.3\n")
    assert parse("--config", path).optim == Optim(0.3, "lars")
    path = write("deep.yaml", "base: a.yaml\ndeep: {er.level: 3}\n")
    assert read_layers(path)[-1] == (path, {"deep": {"er": {"level": 3}}})


def test_bases_are_found_beside_the_file_that_names_them_and_later_ones_win(write):
    write("one.yaml", "epochs: 1\noptim: {lr: 1e-1}\n")
    write("parts/two.yaml", "base: [../one.yaml, more/three.yaml]\ntime: two\n")
    write("parts/more/three.yaml", "epochs: 3\ntime: three\n")
    path = write("a.yaml", "base: parts/two.yaml\n")
    assert parse("--config", path) == Config(3, "two", Optim(0.1))


def test_one_file_may_be_the_base_of_two(write):
    write("root.yaml", "epochs: 7\n")
    write("left.yaml", "base: root.yaml\noptim: {lr: 2}\n")
    write("right.yaml", "base: root.yaml\noptim: {name: lars}\n")
    path = write("a.yaml", "base: [left.yaml, right.yaml]\n")
    assert parse("--config", path) == Config(7, optim=Optim(2.0, "lars"))


def test_several_files_and_overrides_count_in_their_order(write):
    one = write("one.yaml", "epochs: 1\noptim: {lr: 0.1}\nextras: {blur: 0.3}\n")
    two = write("two.yaml", "base: part.yaml\nextras: {flip: 0.2}\n")
    write("part.yaml", "epochs: 2\n")
    both = parse("--config", one, f"--config={two}")
    assert both == Config(2, optim=Optim(0.1), extras={"blur": 0.3, "flip": 0.2})
    assert parse("--config", two, "--config", one).epochs == 1
    assert parse("--config", one, "--epochs=9", "--config", two).epochs == 2
    last = parse("--config", one, "--config", two, "--epochs", "9", "--extras.flip", "0.4")
    assert (last.epochs, last.extras) == (9, {"blur": 0.3, "flip": 0.4})


def test_print_config_shows_the_merged_settings_without_base(write, capsys):
    write("base.yaml", "epochs: 20\nextras: {blur: 0.3}\n")
    path = write("a.yaml", "base: base.yaml\noptim: {lr: 0.5}\n")
    with pytest.raises(SystemExit) as end:
        parse("--config", path, "--extras.flip=0.1", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert end.value.code == 0 and printed == config_dict(
        Config(20, optim=Optim(0.5), extras={"blur": 0.3, "flip": 0.1})
    )


def test_what_looks_like_a_time_or_a_date_stays_text_and_1e_3_is_a_number(write):
    path = write("a.yaml", "time: 72:00:00\noptim: {lr: 1e-3}\n")
    assert parse("--config", path) == Config(time="72:00:00", optim=Optim(1e-3))
    assert parse("--config", write("b.yaml", "time: 2026-01-31\n")).time == "2026-01-31"


BAD_VALUES = {
    "unknown key": ("optim: {warmup: 3}", "optim: unknown key 'warmup'"),
    "unknown key at the top": ("speed: 3", "unknown key 'speed'"),
    "wrong type": ("optim: {lr: fast}", "optim.lr"),
    "nothing for a group": ("optim:", "optim: got None, expected a mapping of settings"),
    "a number for a group": ("optim: 3", "optim: got 3, expected a mapping of settings"),
    "refused by its group": ("optim: {lr: -1}", "optim.lr: got -1.0, expected more than 0"),
    "refused with the others": ("epochs: 3", "epochs: got 3, expected 5 or more with lars"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_bad_value_names_the_file_that_holds_it(write, name):
    text, expected = BAD_VALUES[name]
    write("good.yaml", "optim: {name: lars}\n")
    write("bad.yaml", f"base: good.yaml\n{text}\n")
    top = write("top.yaml", "base: [good.yaml, bad.yaml]\ntime: now\n")
    last = write("last.yaml", "extras: {flip: 0.1}\n")
    message = refusal("--config", top, "--config", last, "--extras.blur=0.2")
    assert message.startswith("bad.yaml: ") and expected in message


def test_a_value_of_a_base_that_is_only_wrong_beside_a_later_file_names_that_file(write):
    write("base.yaml", "epochs: 3\n")
    path = write("a.yaml", "base: base.yaml\noptim: {name: lars}\n")
    assert refusal("--config", path).startswith("a.yaml: epochs: got 3")


def test_a_bad_value_that_a_later_file_or_override_replaces_is_no_error(write):
    write("base.yaml", "epochs: many\noptim: {lr: -1}\n")
    path = write("a.yaml", "base: base.yaml\nepochs: 5\n")
    assert parse("--config", path, "--optim.lr=2") == Config(5, optim=Optim(2.0))


def test_a_bad_override_names_no_file(write):
    path = write("a.yaml", "epochs: 20\n")
    expected = "optim.lr: got -1.0, expected more than 0"
    assert refusal("--config", path, "--optim.lr=-1") == expected
    path = write("alone.yaml", "epochs: 3\noptim: {name: lars}\n")  # refused for another reason
    assert refusal("--config", path, "--epochs=5", "--optim.lr=-1") == expected


BAD_FILES = {
    "missing": ({"a": "base: b.yaml"}, "b.yaml (base of a.yaml): no such configuration file"),
    "missing below": (
        {"a": "base: sub/b.yaml", "sub/b": "base: ../c.yaml"},
        "c.yaml (base of sub/b.yaml (base of a.yaml)): no such configuration file",
    ),
    "itself": ({"a": "base: a.yaml"}, "a.yaml: base: a.yaml -> a.yaml never ends"),
    "cycle": (
        {"a": "base: b.yaml", "b": "base: [c.yaml]", "c": "base: ./a.yaml"},
        "c.yaml: base: a.yaml -> b.yaml -> c.yaml -> a.yaml never ends",
    ),
    "a list": (
        {"a": "base: b.yaml", "b": "- 1"},
        "b.yaml (base of a.yaml): got a list, expected a mapping",
    ),
    "empty": ({"a": ""}, "a.yaml: got nothing, expected a mapping of settings"),
    "base of another type": (
        {"a": "base: {b: 1}"},
        "a.yaml: base: got {'b': 1}, expected a file or a list of files",
    ),
    "base of other types": ({"a": "base: [b.yaml, 3]"}, "a.yaml: base: got ['b.yaml', 3]"),
    "no base": ({"a": "base:"}, "a.yaml: base: got None, expected a file or"),
    "no YAML": ({"a": "base: b.yaml", "b": "\nepochs: [1"}, "b.yaml (base of a.yaml): line "),
    "a key twice": ({"a": "epochs: 1\ntime: x\nepochs: 2"}, "a.yaml: line 3: key 'epochs' is"),
    "a key that is a list": ({"a": "? [1]\n: 2"}, "a.yaml: line 1: expected a word"),
    "a key that is a number": ({"a": "1: 2"}, "a.yaml: "),
    "base in a group": ({"a": "optim: {base: b.yaml}"}, "a.yaml: optim: unknown key 'base'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_built_on_is_named_with_the_chain_to_it(write, name):
    files, expected = BAD_FILES[name]
    for file, text in files.items():
        write(f"{file}.yaml", text + "\n")
    assert refusal("--config", "a.yaml").startswith(expected)


def test_a_file_of_other_bytes_than_text_and_a_folder_are_refused(write, tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"time: \xff\n")
    assert refusal("--config=a.yaml") == "a.yaml: got other bytes than UTF-8, expected YAML"
    assert re.match(r"\S+: no such configuration file", refusal(f"--config={tmp_path}"))


@pytest.mark.parametrize("argv", [["--config"], ["--config="]], ids=str)
def test_config_without_a_file_is_refused(argv):
    assert refusal("--epochs=3", *argv) == "--config: got nothing, expected a YAML file"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--optim.lr=-1", "optim.lr: got -1, expected a number above 0"),
        ("--optim.lr=fast", "optim.lr: got 'fast', expected a number"),
        ("--optim.lr=inf", "optim.lr: got inf, expected a finite number"),
        ("--data.num_workers=-5", "data.num_workers: got -5, expected a number of at least -1"),
        ("--evaluation.resolution=0", "evaluation.resolution: got 0, expected a number above 0 or"),
        ("--labelled.labels.fraction=x", "labelled.labels.fraction: got x, expected a number or"),
        ("--data.mean=3", "data.mean: got 3, expected a list"),
        ("--data.mean=[1,2]", "data.mean: got [1, 2], expected a list of 3"),
        ("--data.std=[0,1,1]", "data.std: got 0, expected a number above 0"),
        ("--data.mean=[0,1,.inf]", "data.mean: got inf, expected a finite number"),
        ("--precision=fp8", "precision: got fp8, expected one of ['bf16', 'fp16', 'fp32']"),
        ("--optim.betas=[1]", "optim.betas: got [1], expected a list of 2"),
    ],
)
def test_refusals_are_in_words_of_our_own(words, message):
    with pytest.raises(UserError) as caught:
        train.read_config([words])
    assert str(caught.value).startswith(message)


def test_a_list_or_null_is_refused_with_what_each_of_its_numbers_must_be():
    with pytest.raises(UserError) as caught:
        parse_config(LinearConfig, ["--data.std=[1,2,0]"], "command", "A command.")
    expected = "a list of 3, each a number above 0 or null"
    assert str(caught.value) == f"data.std: got [1, 2, 0], expected {expected}"

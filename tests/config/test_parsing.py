"""Configuration from files that build on one another and from the command line."""

import re
from dataclasses import dataclass, field, make_dataclass
from typing import Literal, TypedDict

import pytest
import yaml

import train
from ffcv_ssl.config.messages import find_mistake
from ffcv_ssl.config.parsing import parse_config
from ffcv_ssl.config.plain import as_words, config_dict
from ffcv_ssl.config.yaml_layers import read_layers, read_yaml, yaml_text
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
    "itself": ({"a": "base: a.yaml"}, "a.yaml: base: a.yaml -> a.yaml is a circle"),
    "cycle": (
        {"a": "base: b.yaml", "b": "base: [c.yaml]", "c": "base: ./a.yaml"},
        "c.yaml: base: a.yaml -> b.yaml -> c.yaml -> a.yaml is a circle",
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
    assert refusal("--config=a.yaml") == "a.yaml: got bytes that are not UTF-8, expected YAML"
    assert re.match(r"\S+: no such configuration file", refusal(f"--config={tmp_path}"))


def test_text_that_no_file_can_hold_is_refused(write):
    write("a.yaml", 'time: "a\\0b"\n')
    expected = "expected text of UTF-8 without NUL"
    assert refusal("--config=a.yaml") == f"a.yaml: time: got 'a\\x00b', {expected}"
    assert refusal("--time=a\udcff") == f"time: got 'a\\udcff', {expected}"


@pytest.mark.parametrize("argv", [["--config"], ["--config="]], ids=str)
def test_config_without_a_file_is_refused(argv):
    assert refusal("--epochs=3", *argv) == "--config: got nothing, expected a YAML file"


REFUSALS = {
    "--optim.lr=-1": "optim.lr: got -1, expected a number above 0",
    "--optim.lr=fast": "optim.lr: got 'fast', expected a number above 0",
    "--optim.lr=true": "optim.lr: got True, expected a number above 0",
    "--optim.lr=inf": "optim.lr: got inf, expected a finite number",
    "--optim=": "optim: got nothing, expected a mapping of settings",
    "--optim.lr": "optim.lr: got nothing, expected a number above 0",
    "--optim={lr: -1}": "optim.lr: got -1, expected a number above 0",
    "--optim=3": "optim: got 3, expected a mapping of settings",
    "--optim.nesterov=3": "optim.nesterov: got 3, expected true or false",
    "--optim.momentum=2": "optim.momentum: got 2, expected a number of at least 0 and of at most 1",
    "--epochs=1.5": "epochs: got 1.5, expected a whole number above 0",
    "--data.num_workers=-5": "data.num_workers: got -5, expected a whole number of at least -1",
    "--evaluation.resolution=0": (
        "evaluation.resolution: got 0, expected a whole number above 0 or null"
    ),
    "--labelled.labels.fraction=x": (
        "labelled.labels.fraction: got 'x', expected a number above 0 or null"
    ),
    "--data.mean=3": "data.mean: got 3, expected a list of 3, each a number",
    "--data.mean=[1,2]": "data.mean: got [1, 2], expected a list of 3, each a number",
    "--data.std=[0,1,1]": "data.std: got [0, 1, 1], expected a list of 3, each a number above 0",
    "--data.mean=[0,1,.inf]": "data.mean: got inf, expected a finite number",
    "--precision=fp8": "precision: got 'fp8', expected one of bf16, fp16, fp32",
    "--views.view_0.blur_prob=x": "views.view_0.blur_prob: got 'x', expected a number",
    "--views.view_0.blur_prb=1": "views.view_0: unknown key 'blur_prb'",
    "--optim.warmup=1": "optim: unknown key 'warmup'",
    "--speed=1": "unknown key 'speed'",
    "--log.every_steps+=x": "log.every_steps: got ['x'], expected a whole number above 0",
}


@pytest.mark.parametrize("word", REFUSALS)
def test_refusals_name_the_key_what_it_got_and_what_its_type_expects(word):
    with pytest.raises(UserError) as caught:
        train.read_config([word])
    assert str(caught.value) == REFUSALS[word]


def test_a_list_or_null_is_refused_with_what_each_of_its_numbers_must_be():
    with pytest.raises(UserError) as caught:
        parse_config(LinearConfig, ["--data.std=[1,2,0]"], "command", "A command.")
    expected = "a list of 3, each a number above 0 or null"
    assert str(caught.value) == f"data.std: got [1, 2, 0], expected {expected}"


def test_settings_that_the_parser_takes_have_no_mistake():
    config = parse("--extras.blur=0.1", "--optim.betas=[0.1,0.2]", "--time=3")
    assert find_mistake(Config, config_dict(config)) is None
    assert find_mistake(train.Config, config_dict(train.read_config([]))) is None
    assert find_mistake(LinearConfig, config_dict(LinearConfig())) is None


def test_a_dataclass_made_at_run_time_is_explained_by_its_fields():
    fields = [("mine", "Unknown", field(default=1)), ("more", Optim, field(default_factory=Optim))]
    made = make_dataclass("Made", fields, bases=(Config,), frozen=True)
    assert find_mistake(made, {"mine": 3, "epochs": 2, "more": {"lr": 1}}) is None
    expected = "more.lr: got 'x', expected a number"
    assert find_mistake(made, {"more": {"lr": "x"}}) == expected
    assert find_mistake(made, {"more": {"rate": 1}}) == "more: unknown key 'rate'"
    assert find_mistake(made | None, {"more": {"rate": 1}}) == "more: unknown key 'rate'"
    assert find_mistake(dict[str, made], {"x": {"epochs": 1.5}}) == (
        "x.epochs: got 1.5, expected a whole number"
    )


@pytest.mark.parametrize("text", ["1e-3", "1e5", "72:00:00", "3", "null", "yes", "2026-01-31", ""])
def test_settings_written_as_yaml_are_read_again_as_they_were(text, write):
    settings = {"time": text, "optim": {"lr": 1e-6, "betas": [0.9, 1e22]}, "extras": {"blur": 1.0}}
    path = write("written.yaml", yaml_text(settings))
    assert read_layers(path) == [(path, settings)]


def test_docstrings_of_settings_are_searched_for_help_alone(monkeypatch, capsys):
    parser = pytest.importorskip("docstring_parser")
    with monkeypatch.context() as patched:
        patched.setattr(parser, "parse_from_object", lambda *_, **__: pytest.fail("searches"))
        assert train.read_config(["--seed=3"]).seed == 3
    with pytest.raises(SystemExit):
        train.read_config(["--help"])
    assert "Decides weights, order and views" in capsys.readouterr().out


def test_settings_as_words_of_a_command_line_are_the_same_settings():
    config = Config(3, "72:00:00", Optim(1e-6, "sgd", (0.1, 0.2)), {"blur": 0.5})
    assert parse(*as_words(config_dict(config))) == config


def test_a_yaml_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"^cannot be read \(Is a directory\)$"):
        read_yaml(tmp_path)

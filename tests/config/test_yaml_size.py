"""YAML files made to overwhelm whoever reads them: one line, at once."""

from collections import Counter

import pytest
import yaml
from support.yaml_bombs import BOMBS

import train
from ffcv_ssl.config.yaml_layers import read_text, read_yaml
from ffcv_ssl.errors import UserError
from ffcv_ssl.evaluation import encoder
from ffcv_ssl.evaluation.studies import seeds

MOST_PARTS = 5_000_000
"""Events, values and merged pairs that refusing a bomb may take; the bombs hold hundreds of
millions, and 100,000 values are allowed."""


@pytest.fixture
def parts(monkeypatch):
    """Counts {event, value, pair} of YAML, and ends what takes too many of them."""
    counts = Counter()

    def counting(where, name, size_of):
        method = getattr(where, name)

        def counted(self, *given, **settings):
            result = method(self, *given, **settings)
            counts[name] += size_of(*given)
            assert counts.total() < MOST_PARTS, f"too much work: {counts}"
            return result

        monkeypatch.setattr(where, name, counted)

    counting(yaml.SafeLoader, "get_event", lambda: 1)
    counting(yaml.SafeLoader, "construct_object", lambda node, deep=False: 1)
    counting(yaml.SafeLoader, "flatten_mapping", lambda node: len(node.value))
    return counts


@pytest.mark.parametrize("name", BOMBS)
def test_a_yaml_bomb_is_one_line_and_exit_code_2_with_little_work(name, tmp_path, capsys, parts):
    text, expected = BOMBS[name]
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    assert train.main([f"--config={path}"]) == 2
    line = capsys.readouterr().err
    assert expected in line and str(path) in line and line.count("\n") == 1
    assert parts["get_event"] > 0
    assert read_text(text) == text  # on a command line it is text


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000, "a: " + "[" * 1000])
def test_no_more_brackets_are_taken_than_there_may_be_levels(text, tmp_path, monkeypatch):
    taken, take = [], yaml.SafeLoader.fetch_flow_collection_start
    monkeypatch.setattr(
        yaml.SafeLoader,
        "fetch_flow_collection_start",
        lambda loader, token: [taken.append(token), take(loader, token)],
    )
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(ValueError, match="more than 32 levels"):
        read_yaml(tmp_path / "deep.yaml")
    assert 30 < len(taken) < 40


def test_aliases_and_merged_keys_of_sane_size_are_read(tmp_path):
    path = tmp_path / "sound.yaml"
    path.write_text("a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, z: 3}\nc: [*a, *a]\n")
    a = {"x": 1, "y": [1, 2]}
    assert read_yaml(path) == {"a": a, "b": {**a, "z": 3}, "c": [a, a]}


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [touch owned]", "!!python/name:os.system ''"]
)
def test_yaml_makes_no_objects_and_calls_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tags.yaml").write_text(f"optim: {text}\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml(tmp_path / "tags.yaml")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["billion laughs", "deep lists"])
def test_a_bomb_beside_weights_of_others_is_one_line_too(name, tmp_path):
    text, expected = BOMBS[name]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=expected):
        encoder._origin(tmp_path / "backbone.safetensors", {"model": "resnet18"})
    assert seeds._origin(tmp_path / "checkpoint.pt") == []


@pytest.mark.parametrize("text", ["9" * 5000, "!!int a", "!!int ''", "!!bool a", "!!set [a]"])
def test_values_that_are_not_what_they_say_are_one_line_or_text(text, tmp_path):
    assert read_text(text) == text
    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    with pytest.raises(ValueError, match=r"^got a value that cannot be read") as caught:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)

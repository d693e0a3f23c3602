"""Old names of settings: on a command line and in YAML they become the new ones, with a note."""

import pytest

from ffcv_ssl.config.renamed import NewName, rename
from ffcv_ssl.errors import UserError

TABLE = {
    "layer": NewName("depth", lambda layer: f"projector_{int(layer)}"),
    "simclr.t": "simclr.temperature",
    "old_group": "new_group",
}


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--layer", "1", "--layers", "2"], ["--depth", "projector_1", "--layers", "2"]),
        (["--a", "layer", "--layer=1"], ["--a", "layer", "--depth=projector_1"]),
        (
            ["--simclr.t=0.1", "--simclr.tau", "3"],
            ["--simclr.temperature=0.1", "--simclr.tau", "3"],
        ),
        (["--old_group.a.b", "--old_group=x"], ["--new_group.a.b", "--new_group=x"]),
        (["--layer", "--x"], ["--depth", "--x"]),
    ],
)
def test_words_of_a_command_line_get_their_new_names(words, expected):
    before = list(words)
    renamed, notes = rename(words, TABLE)
    assert renamed == expected and words == before and len(notes) == 1
    assert notes[0].endswith("; the old name works for one release")


def test_nested_settings_get_their_new_names_and_the_original_is_left_as_it_was():
    settings = {"layer": 2, "simclr": {"t": 0.1, "x": 1}, "old_group": {"a": {"b": 1}}}
    renamed, notes = rename(settings, TABLE)
    assert renamed == {
        "depth": "projector_2", "simclr": {"temperature": 0.1, "x": 1},
        "new_group": {"a": {"b": 1}},
    }  # fmt: skip
    assert settings["simclr"] == {"t": 0.1, "x": 1} and len(notes) == 3
    assert rename({"x": {"layer": 1}, "simclr": 3}, TABLE) == ({"x": {"layer": 1}, "simclr": 3}, [])
    moved, _ = rename({"a": 1, "b": {"x": 2}}, {"a": "b.a", "b.x": "c.d.x"})
    assert moved == {"b": {"a": 1}, "c": {"d": {"x": 2}}}


def test_both_names_of_a_setting_in_one_mapping_are_refused():
    with pytest.raises(
        UserError, match="layer: got both layer and its new name depth; leave out layer"
    ):
        rename({"layer": 1, "depth": "backbone"}, TABLE)

"""State: small, exact, refused where it does not belong."""

import json
import re
import shutil

import pytest
from support.loading import make_loader, samples_of

from ffcv_ssl import BetonError, OrderOption


def test_a_state_is_json_of_constant_size(small_beton):
    with make_loader(small_beton) as loader:
        sizes = []
        for _ in loader:
            state = loader.state_dict()
            assert json.loads(json.dumps(state)) == state
            sizes.append(len(json.dumps(state)))
    assert max(sizes) < 300


def test_a_state_at_the_end_of_an_epoch_neither_repeats_nor_loses_one(small_beton):
    with make_loader(small_beton, 16) as loader:
        epochs = [samples_of(loader) for _ in range(3)]
    with make_loader(small_beton, 16) as loader:
        for _ in range(len(loader)):
            pass
        iterator = iter(loader)
        for _ in range(len(loader)):
            next(iterator)
        before_stop = loader.state_dict()  # the last batch is out, StopIteration is not yet
        assert next(iterator, None) is None
        assert loader.state_dict() == before_stop
    with make_loader(small_beton, 16) as loader:
        loader.load_state_dict(before_stop)
        assert samples_of(loader) == epochs[1]
        assert samples_of(loader) == epochs[2]


def test_iterating_again_after_break_starts_the_next_epoch_and_ends_the_old_iterator(small_beton):
    with make_loader(small_beton, 16) as loader:
        old = iter(loader)
        next(old)
        new = iter(loader)
        assert loader.state_dict()["epoch"] == 1
        assert next(old, None) is None
        assert len(samples_of(new)) == 96
        assert loader.state_dict() == {**loader.state_dict(), "epoch": 2, "samples": 0}


def test_set_epoch_goes_to_that_epoch(small_beton):
    with make_loader(small_beton) as loader:
        epochs = [samples_of(loader) for _ in range(3)]
        loader.set_epoch(1)
        assert samples_of(loader) == epochs[1]
        assert samples_of(loader) == epochs[2]


def test_a_state_of_other_content_is_refused_with_both_sides(small_beton, raw_beton):
    with make_loader(small_beton) as loader:
        state = loader.state_dict()
    with (
        make_loader(raw_beton) as other,
        pytest.raises(BetonError, match=r"97 samples.*200 samples"),
    ):
        other.load_state_dict(state)
    with make_loader(small_beton, indices=range(50)) as other:
        with pytest.raises(BetonError, match=r"97 samples.*50 samples"):
            other.load_state_dict(state)
        chosen = other.state_dict()
    with make_loader(small_beton, indices=range(1, 51)) as other:
        with pytest.raises(BetonError) as error:
            other.load_state_dict(chosen)
    choices = re.findall(r"50 samples, choice ([0-9a-f]{8})", str(error.value))
    assert len(set(choices)) == 2  # as many of the same file: only the choice tells them apart
    with make_loader(small_beton, order=OrderOption.SEQUENTIAL) as other:
        with pytest.raises(BetonError, match=r"order Random.*Sequential"):
            other.load_state_dict(state)


def test_the_fingerprint_is_of_content_not_of_path(small_beton, tmp_path):
    copy = tmp_path / "copy.beton"
    shutil.copy(small_beton, copy)
    with make_loader(small_beton) as one, make_loader(str(copy)) as two:
        assert one.fingerprint == two.fingerprint


def test_a_seed_of_none_is_drawn_and_kept_in_the_state(small_beton):
    with make_loader(small_beton, seed=None) as one, make_loader(small_beton, seed=None) as two:
        assert one.seed != two.seed
        two.load_state_dict(one.state_dict())
        assert samples_of(one) == samples_of(two)
    with pytest.raises(ValueError, match="seed"):
        make_loader(small_beton, seed=None, rank=0, world_size=2)

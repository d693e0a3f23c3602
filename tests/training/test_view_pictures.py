"""`views.png` and `views.json`: what training draws for its first images, the newest alone."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.small_files import write_small

import train
from ffcv_ssl.errors import BetonError
from ffcv_ssl.loader import OrderOption
from ffcv_ssl.training import view_pictures
from ffcv_ssl.training.run_data import make_loader, open_dataset
from ffcv_ssl.training.run_folder import step_of_views
from ffcv_ssl.training.view_pictures import MARGIN_PX, ViewPictures, png_grid
from ffcv_ssl.training.world import World


def open_pictures(tmp_path, beton, *words, world=None):
    """(the ViewPictures of a run, its configuration, what it has shown)."""
    config = train.read_config([f"--data.train={beton}", "--epochs=4", *words])
    shown, views = [], config.views.resolve()
    folder = SimpleNamespace(path=tmp_path, show_picture=lambda *given: shown.append(given))
    ops = train.make_views(views, config.resolution.max)
    pictures = ViewPictures(folder, open_dataset(beton), config, ops, views, world or World())
    return pictures, config, shown


def trained_views(config, epoch, px):
    """The views of the first images as a training loader renders them, by sample."""
    views = config.views.resolve()
    loader = make_loader(
        open_dataset(config.data.train), config.data, train.make_views(views, px), World(), False,
        drop_last=True, seed=config.seed, order=OrderOption.RANDOM, batch_size=25,
    )  # fmt: skip
    found, mean, std = {}, np.array(config.data.mean), np.array(config.data.std)
    with loader:
        loader.set_epoch(epoch)
        for batch in loader:
            for row, sample in enumerate(batch.indices.tolist()):
                images = [getattr(batch, name)[row].numpy() for name in views]
                images = [np.moveaxis(image, 0, -1) * std + mean for image in images]
                boxes = [batch.params[name]["crop"][row].tolist() for name in views]
                found[sample] = [np.rint(image).astype(np.uint8) for image in images], boxes
    return found


SMALL = ("--resolution.min=32", "--resolution.max=32", "--optim.warmup_epochs=1")


def test_pictures_and_parameters_are_those_that_training_draws(tmp_path, raw_beton):
    pictures, config, shown = open_pictures(tmp_path, raw_beton, *SMALL)
    for step, epoch in ((0, 0), (8, 2)):
        pictures.write(step, epoch)
        about = json.loads((tmp_path / "views.json").read_text())
        keys = ("step", "epoch", "drawn_in_epoch", "resolution")
        assert [about[key] for key in keys] == [step, epoch, epoch, 32]
        grid = np.asarray(Image.open(tmp_path / "views.png"))
        assert grid.shape == (8 * (32 + MARGIN_PX) - MARGIN_PX, 2 * (32 + MARGIN_PX) - MARGIN_PX, 3)
        trained = trained_views(config, epoch, 32)
        for row, sample in enumerate(about["samples"]):
            images, boxes = trained[sample["index"]]
            for column, name in enumerate(("view_0", "view_1")):
                top, left = row * (32 + MARGIN_PX), column * (32 + MARGIN_PX)
                assert np.array_equal(grid[top : top + 32, left : left + 32], images[column])
                assert sample["views"][name]["RandomResizedCrop"]["crop"] == boxes[column]
    pictures.close()
    assert shown == [("views", tmp_path / "views.png", step) for step in (0, 8)]


def test_the_last_epochs_views_stay_and_a_restart_draws_nothing(tmp_path, raw_beton):
    pictures, _, shown = open_pictures(tmp_path, raw_beton, *SMALL)
    pictures.write(16, 4)
    assert json.loads((tmp_path / "views.json").read_text())["drawn_in_epoch"] == 3
    pictures.write(16, 4)
    pictures.close()
    assert len(shown) == 1 and step_of_views(tmp_path) == 16


def test_views_grow_with_the_resolution_and_small_ones_lie_in_the_middle(tmp_path, raw_beton):
    pictures, _, _ = open_pictures(
        tmp_path, raw_beton, "--views.recipe=dino", "--resolution.min=64", "--resolution.max=128",
        "--resolution.start_ramp=2", "--resolution.end_ramp=2", "--optim.warmup_epochs=1",
    )  # fmt: skip
    for epoch, side in ((0, 64), (2, 128)):
        pictures.write(epoch, epoch)
        grid = np.asarray(Image.open(tmp_path / "views.png"))
        assert grid.shape[1] == 8 * (side + MARGIN_PX) - MARGIN_PX
        local, small = grid[:side, 2 * (side + MARGIN_PX) :][:, :side], round(side * 96 / 224)
        edge = (side - small) // 2
        assert (local[:edge] == 255).all() and (local[edge:-edge, edge:-edge] != 255).any()
    pictures.close()


def test_only_the_first_rank_draws(tmp_path, raw_beton):
    pictures, _, shown = open_pictures(tmp_path, raw_beton, *SMALL, world=World(1, 2))
    pictures.write(0, 0)
    assert shown == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [BetonError("a.beton: sample 0: corrupt"), OSError(28, "full")])
def test_a_picture_that_cannot_be_made_costs_one_line(
    tmp_path, raw_beton, monkeypatch, capsys, error
):
    def fail(images):
        raise error

    pictures, _, shown = open_pictures(tmp_path, raw_beton, *SMALL)
    monkeypatch.setattr(view_pictures, "png_grid", fail)
    pictures.write(0, 0)
    pictures.write(4, 1)
    pictures.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert "views.png: not drawn (" in line and line.endswith("; the run goes on without it")
    assert shown == [] and list(tmp_path.iterdir()) == []


def test_a_picture_of_two_large_views_takes_less_than_300_ms(tmp_path):
    beton = write_small(tmp_path / "large.beton", 12, (375, 500), mode="raw")
    pictures, _, _ = open_pictures(tmp_path, beton)
    pictures.write(0, 0)
    began = time.thread_time()
    pictures.write(4, 1)
    assert time.thread_time() - began < 0.3
    pictures.close()


def test_a_grid_keeps_every_pixel():
    rng = np.random.default_rng(0)
    views = [rng.integers(0, 255, (3, side, side, 3), np.uint8) for side in (8, 5)]
    data = png_grid(views)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    import io

    grid = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(grid[10:18, :8], views[0][1])
    assert np.array_equal(grid[21:26, 11:16], views[1][2])

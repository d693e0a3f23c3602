"""Recipes say what the papers say, every setting can be overridden, and mistakes are named."""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
from jsonargparse import ArgumentError, ArgumentParser
from support.outputs import closed_stdout, full_stdout

import train
from ffcv_ssl import Loader, Reader
from ffcv_ssl import transforms as T
from pipelines import RECIPES, View, Views, __main__, build
from pipelines.picture import caption


def ops_by_class(view, resolution_px=224):
    return {type(op): op for op in build(view, resolution_px)}


@pytest.mark.parametrize("small_images", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_names_its_views_in_order(name, small_images):
    views = RECIPES[name](small_images=small_images)
    assert list(views) == [f"view_{index}" for index in range(len(views))]
    for view in views.values():
        ops = build(view, 64)
        assert isinstance(ops[0], T.RandomResizedCrop | T.CenterCrop)
        assert len({type(op) for op in ops}) == len(ops)


def test_simclr_is_the_papers_symmetric_pair():
    views = RECIPES["simclr"]()
    assert views["view_0"] == views["view_1"]
    ops = ops_by_class(views["view_0"])
    assert ops[T.RandomResizedCrop].scale == (0.08, 1.0)
    assert ops[T.RandomHorizontalFlip].flip_prob == 0.5
    jitter = ops[T.RandomColorJitter]
    factors = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    assert (jitter.jitter_prob, *factors) == pytest.approx((0.8, 0.8, 0.8, 0.8, 0.2))
    assert ops[T.RandomGrayscale].gray_prob == 0.2
    assert (ops[T.GaussianBlur].blur_prob, ops[T.GaussianBlur].kernel_size) == (0.5, 23)
    assert T.RandomSolarization not in ops


def test_simclr_for_small_images_has_no_blur_and_half_the_jitter():
    ops = ops_by_class(RECIPES["simclr"](small_images=True)["view_0"], 32)
    assert T.GaussianBlur not in ops
    jitter = ops[T.RandomColorJitter]
    factors = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    assert factors == pytest.approx((0.4, 0.4, 0.4, 0.1))


@pytest.mark.parametrize(
    ("name", "blur", "solarize"),
    [("ffcv_ssl", (1.0, 0.0), (0.0, 0.2)), ("byol", (1.0, 0.1), (0.0, 0.2))],
)
def test_asymmetric_pairs_blur_and_solarize_as_published(name, blur, solarize):
    views = RECIPES[name]().values()
    assert tuple(view.blur_prob for view in views) == blur
    assert tuple(view.solarize_prob for view in views) == solarize
    for view in views:
        jitter = ops_by_class(view)[T.RandomColorJitter]
        factors = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        assert (jitter.jitter_prob, *factors) == (0.8, 0.4, 0.4, 0.2, 0.1)


def test_paws_cifar_has_equalization_and_solarization_in_place_of_grey_and_blur():
    ops = ops_by_class(RECIPES["paws_cifar"]()["view_1"], 32)
    assert set(ops) == {
        T.RandomResizedCrop,
        T.RandomHorizontalFlip,
        T.RandomColorJitter,
        T.RandomSolarization,
        T.RandomEqualize,
    }
    assert ops[T.RandomResizedCrop].scale == (0.5, 1.0)


@pytest.mark.parametrize(("name", "num_views"), [("dino", 8), ("dino_vit", 12)])
def test_multi_crop_has_two_global_views_and_smaller_local_ones(name, num_views):
    views = list(RECIPES[name]().values())
    assert len(views) == num_views
    sizes = [build(view, 224)[0].output_size for view in views]
    assert sizes == [(224, 224)] * 2 + [(96, 96)] * (num_views - 2)
    assert views[2].crop_scale[1] <= views[0].crop_scale[0] < views[0].crop_scale[1] == 1.0


def load_views(path, **overrides):
    """All of a file's images through the recipe `instance`: one batch of the loader."""
    views = Views("instance", **overrides).resolve()
    pipelines = {name: ("image", build(view, 32)) for name, view in views.items()}
    with Loader(path, 97, num_workers=1, seed=3, pipelines=pipelines, drop_last=False) as loader:
        (batch,) = loader
        return batch


def test_an_instances_positive_is_the_same_crop_with_noise(small_beton):
    batch = load_views(small_beton, view_1={"noise_std": 0.05})
    for column in ("crop", "flip"):
        assert np.array_equal(batch.params["view_1"][column], batch.params["view_0"][column])
    noise = np.asarray(batch.view_1, float) - np.asarray(batch.view_0, float)
    inside = (np.asarray(batch.view_0) > 80) & (np.asarray(batch.view_0) < 175)  # not clamped
    assert noise[inside].std() == pytest.approx(0.05 * 255, rel=0.03)
    assert abs(noise[inside].mean()) < 0.5
    quiet = load_views(small_beton, view_1={"noise_std": 0.0})
    assert np.array_equal(quiet.view_0, quiet.view_1)


@pytest.mark.parametrize("scale", [None, (0.25, 0.3)])
def test_an_instances_negative_is_a_small_patch_of_its_own(small_beton, scale):
    batch = load_views(small_beton, view_2={} if scale is None else {"crop_scale": scale})
    with Reader(small_beton) as reader:
        metadata = reader.field_metadata("image")
        areas = metadata["height"].astype(float) * metadata["width"]
    crop = batch.params["view_2"]["crop"]
    share = crop[:, 2] * crop[:, 3] / areas[batch.indices]
    low, high = scale or (0.04, 0.16)
    assert low - 0.03 < share.min() and share.max() < high + 0.03  # sides are whole pixels
    assert not np.array_equal(crop[:, :2], batch.params["view_0"]["crop"][:, :2])


def test_evaluation_draws_nothing():
    (op,) = build(RECIPES["evaluation"]()["view_0"], 128)
    assert op.ratio == 224 / 256
    assert not op.random


def test_an_op_that_never_acts_is_left_out():
    assert [type(op) for op in build(View(), 32)] == [T.RandomResizedCrop]
    assert T.RandomColorJitter not in ops_by_class(
        View(jitter_prob=1.0, brightness=0, contrast=0, saturation=0, hue=0)
    )


def test_every_setting_of_a_view_reaches_an_op():
    """A setting that no op sees would be a silent lie: change each in turn and compare the ops."""
    base = View(
        **{f.name: 0.5 for f in fields(View) if f.name.endswith("_prob")},
        noise_std=0.1,
        link="view_9",
    )
    other = {
        "size_scale": 0.5,
        "crop": "center",
        "crop_scale": (0.2, 0.3),
        "crop_ratio": (1.0, 1.5),
        "center_ratio": 0.5,
        "interpolation": "bicubic",
        "blur_kernel_size": 5,
        "blur_sigma": (1.0, 1.5),
        "solarize_threshold": 7,
        "link": "view_8",
        "linked": ("flip",),
        "extra_ops": ({"op": "ffcv_ssl.transforms:RandomEqualize"},),
    }
    for f in fields(View):
        start = dataclasses.replace(base, crop="center", link=None) if "center" in f.name else base
        change = {f.name: other.get(f.name, 0.35)}
        if f.name == "crop":
            change["link"] = None
        changed = dataclasses.replace(start, **change)
        assert repr(build(changed, 64)) != repr(build(start, 64)), f.name


@pytest.mark.parametrize(("size_px", "taps"), [(224, 23), (96, 9), (64, 7), (32, 3), (8, 3)])
def test_the_blur_covers_a_tenth_of_the_side(size_px, taps):
    assert ops_by_class(View(blur_prob=0.5), size_px)[T.GaussianBlur].kernel_size == taps


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flip_prob", 1.5),
        ("flip_prob", True),
        ("gray_prob", math.nan),
        ("crop_scale", (0.5, 0.2)),
        ("crop_scale", (0.5, 2)),
        ("crop_scale", 0.5),
        ("crop_scale", "ab"),
        ("crop_scale", (0, 0)),
        ("crop_ratio", (0, 1)),
        ("blur_sigma", (0, 1)),
        ("blur_kernel_size", 4),
        ("hue", 0.6),
        ("contrast", -1),
        ("size_scale", 0),
        ("center_ratio", 1.1),
        ("solarize_threshold", 300),
        ("interpolation", "nearest"),
        ("crop", "none"),
        ("linked", ("colour",)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"^{key}: got "):
        View(**{key: value})


def test_a_view_that_was_made_is_a_view_that_builds():
    """The view's own limits are the ops' limits: nothing passes the one and fails the other."""
    extremes = {
        "crop_scale": (0, 1),
        "crop_ratio": (1e-3, 1e3),
        "blur_sigma": (1e-3, 1e3),
        "hue": 0.5,
        "solarize_threshold": 256,
        "noise_std": 100,
        "center_ratio": 1e-3,
        "size_scale": 1e-3,
    }
    on = {f.name: 1.0 for f in fields(View) if f.name.endswith("_prob")}
    for crop in ("random", "center"):
        assert build(View(**on, **extremes, crop=crop), 32)


def test_a_link_sets_the_named_ops_only():
    ops = ops_by_class(View(flip_prob=0.5, gray_prob=0.5, link="view_0", linked=("crop", "gray")))
    assert ops[T.RandomResizedCrop].link == ops[T.RandomGrayscale].link == "view_0"
    assert ops[T.RandomHorizontalFlip].link is None


@dataclass(frozen=True)
class Config:
    """A trainer's configuration, as small as it can be."""

    views: Views = field(default_factory=Views)


def parse(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    return parser.instantiate(parser.parse_args(list(arguments))).views


def test_settings_are_overridden_from_yaml_and_command_line(tmp_path):
    path = tmp_path / "views.yaml"
    path.write_text("views: {recipe: byol, view_0: {blur_prob: 0.3, crop_scale: [0.2, 1]}}\n")
    views = parse(
        f"--config={path}", "--views.view_0.gray_prob=0.4", "--views.view_1.blur_kernel_size=5"
    ).resolve()
    byol = RECIPES["byol"]()
    assert views["view_0"] == dataclasses.replace(
        byol["view_0"], blur_prob=0.3, crop_scale=(0.2, 1.0), gray_prob=0.4
    )
    assert views["view_1"] == dataclasses.replace(byol["view_1"], blur_kernel_size=5)


def test_noise_and_patch_of_the_instance_recipe_are_settings():
    views = parse(
        "--views.recipe=instance",
        "--views.view_1.noise_std=0.2",
        "--views.view_2.crop_scale=[0.02,0.1]",
    ).resolve()
    assert views["view_1"] == dataclasses.replace(
        RECIPES["instance"]()["view_1"], noise_std=0.2, link="view_0", linked=("crop", "flip")
    )
    assert views["view_2"].crop_scale == (0.02, 0.1)


def _type_name(setting):
    return setting.type.__name__ if type(setting.type) is type else str(setting.type)


@pytest.mark.parametrize("index", [0, 1, 2, 11])
def test_every_setting_of_a_view_can_be_given_on_the_command_line(index):
    texts = {
        "tuple[float, float]": ("[0.25,0.5]", (0.25, 0.5)),
        "tuple[str, ...]": ("[flip]", ("flip",)),
        "str": ("bicubic", "bicubic"),
        "str | None": ("view_3", "view_3"),
        "int | None": ("5", 5),
        "int": ("1", 1),
        "float": ("0.25", 0.25),
        "tuple[dict[str, typing.Any], ...]": (
            "[{op: 'ffcv_ssl.transforms:RandomEqualize', args: {prob: 0.5}}]",
            ({"op": "ffcv_ssl.transforms:RandomEqualize", "args": {"prob": 0.5}},),
        ),
    }
    given = {
        f.name: ("center", "center") if f.name == "crop" else texts[_type_name(f)]
        for f in fields(View)
    }
    arguments = [f"--views.view_{index}.{key}={text}" for key, (text, _) in given.items()]
    views = parse("--views.recipe=dino_vit", *arguments).resolve()
    assert views[f"view_{index}"] == View(**{key: value for key, (_, value) in given.items()})
    assert len([view for view in views.values() if view.link]) == 1


def test_a_setting_back_to_none_differs_from_a_setting_left_out():
    views = parse("--views.view_0={blur_kernel_size: null, blur_prob: 0.5}").resolve()
    assert views["view_0"].blur_kernel_size is None


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--views.view_0.blur_prb=0.3", "blur_prb"),
        ("--views.view_0.blur_prob=often", "often"),
        ("--views.view_0.crop_scale=0.3", "crop_scale|0.3"),
        ("--views.view_12.blur_prob=0.3", "view_12"),
    ],
)
def test_the_parser_refuses_unknown_keys_and_wrong_types(argument, named):
    with pytest.raises(ArgumentError, match=named):
        parse(argument)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "simclr2"}, "views.recipe: got 'simclr2', expected one of byol, "),
        ({"view_2": {"blur_prob": 0.3}}, "views.view_2: recipe 'simclr' has no such view"),
        ({"view_1": {"blur_prob": 3}}, "views.view_1.blur_prob: got 3, expected 0 to 1"),
        ({"view_1": {"blur": 3}}, "views.view_1: unknown key 'blur', expected one of "),
        ({"view_1": {"link": "view_1"}}, "views.view_1.link: got 'view_1', expected one of view_0"),
    ],
)
def test_resolve_names_the_key_at_fault_on_one_line(settings, message):
    with pytest.raises(ValueError) as error:
        Views(**settings).resolve()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_overriding_leaves_the_recipe_itself_alone():
    before = RECIPES["simclr"]()
    Views(view_0={"blur_prob": 0.1}).resolve()
    assert RECIPES["simclr"]() == before


PARAMS = np.dtype(
    [
        ("crop", np.int32, 4),
        ("flip", bool),
        (
            "jitter",
            [("applied", bool)]
            + [(name, np.float32) for name in ("brightness", "contrast", "saturation", "hue")]
            + [("order", np.uint8, 4)],
        ),
        ("gray", bool),
        ("sigma", np.float32),
        ("solarize", bool),
    ]
)


def test_a_caption_says_what_acted_and_in_which_order():
    jitter = (True, 1.2, 0.8, 1.1, -0.05, (3, 0, 2, 1))
    row = np.array([((3, 5, 20, 40), True, jitter, False, 1.25, True)], PARAMS)[0]
    assert caption(row).splitlines() == [
        "crop 40x20 at 5,3, flip",
        "h-0.05 b1.20 s1.10 c0.80",
        "blur 1.25, solarize",
    ]


def test_a_caption_is_silent_about_what_did_not_act():
    jitter = (False, 1.2, 0.8, 1.1, -0.05, (3, 0, 2, 1))
    row = np.array([((3, 5, 20, 40), False, jitter, False, 0, False)], PARAMS)[0]
    assert caption(row) == "crop 40x20 at 5,3"


def run(*arguments, capsys):
    """Run `python -m pipelines` in this process: (exit code, last stdout line, stderr)."""
    code = __main__.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else None, err


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_draws_every_recipe(recipe, small_beton, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "new" / "views.png"
    code, summary, err = run(
        recipe, f"--beton={small_beton}", f"--out={out}", "--images=2", "--samples=1", capsys=capsys
    )
    assert code == 0, err
    assert summary["views"] == list(RECIPES[recipe]()) and summary["images"] == [0, 48]
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert pixels.shape[1] > 150 * (1 + len(summary["views"])) and pixels.std() > 10


def test_a_full_or_closed_stdout_is_no_traceback_and_the_picture_is_drawn(
    small_beton, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "views.png"
    words = ["simclr", f"--beton={small_beton}", f"--out={out}", "--images=1", "--samples=1"]
    with full_stdout() as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert __main__.main(words) == 2
    line = f"stdout: cannot be written (No space left on device); {out} is drawn; free some space"
    assert capsys.readouterr().err == f"pipelines: {line}\n" and out.exists()
    with closed_stdout() as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert __main__.main(words) == 0
    assert capsys.readouterr().err == ""


TRAINING = """
base: simclr
seed: 5
resolution: {min: 24, max: 40}
views: {recipe: byol, view_1: {solarize_prob: 1}}
"""


@pytest.fixture
def training(tmp_path, monkeypatch, small_beton):
    """A training configuration in the current folder, called as a recipe is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "simclr.yaml").write_text(f"{TRAINING}data: {{train: {small_beton}}}\n")
    return "--config=simclr.yaml"


def test_the_command_draws_what_a_configuration_trains_on(training, small_beton, capsys):
    words = [training, "--views.view_0.blur_prob=0", "--images=2", "--samples=1", "--out=v.png"]
    code, summary, err = run(*words, capsys=capsys)
    assert (code, err) == (0, "")
    assert (summary["recipe"], summary["of"], summary["size_px"]) == ("byol", "simclr.yaml", 40)
    drawing = __main__.read(words)
    assert (drawing.grid.beton, drawing.grid.seed) == (small_beton, 5)
    assert (drawing.views["view_0"].blur_prob, drawing.views["view_1"].solarize_prob) == (0, 1)
    config = train.read_config([training, "--views.view_0.blur_prob=0"])
    assert drawing.views == config.views.resolve() and drawing.image_field == "image"
    other = __main__.read([*words, "--beton", "other.beton", "--size", "8", "--seed", "6"])
    assert (other.grid.beton, other.grid.size, other.grid.seed) == ("other.beton", 8, 6)


def test_the_picture_of_a_configuration_has_the_very_draws_of_training(training, small_beton):
    drawing = __main__.read([training, "--data.num_workers=1"])
    pipelines = {name: build(view, 40) for name, view in drawing.views.items()}
    columns = __main__._draws(drawing.grid, pipelines, "image", [0, 48])
    config = train.read_config([training])
    ops = train.make_views(config.views.resolve(), config.resolution.max)
    loader = Loader(
        small_beton, 97, num_workers=1, seed=config.seed,
        pipelines={name: ("image", ops[name]) for name in ops},
    )  # fmt: skip
    with loader:
        (batch,) = loader
        for name, images, params in columns[:: drawing.grid.samples]:
            assert np.array_equal(images, np.array(getattr(batch, name))[[0, 48]])
            assert np.array_equal(params, batch.params[name][[0, 48]])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["byol"], "recipe: got byol and --config, expected one of them"),
        (["--optim.lr=-1"], "optim.lr: got -1, expected a number above 0"),
        (["--images=0"], "images: got 0, expected a whole number above 0"),
    ],
)
def test_a_mistake_beside_a_configuration_is_one_line(training, words, line, capsys):
    code, _, err = run(training, *words, capsys=capsys)
    assert (code, err) == (2, f"pipelines: {line}\n")


def test_a_file_of_the_pictures_own_settings_is_read_as_before(tmp_path, small_beton):
    path = tmp_path / "picture.yaml"
    path.write_text(f"recipe: dino\nbeton: {small_beton}\nview_0: {{blur_prob: 0}}\n")
    drawing = __main__.read([f"--config={path}"])
    assert (drawing.of, len(drawing.views), drawing.views["view_0"].blur_prob) == ("dino", 8, 0)


def test_the_recipe_may_stand_behind_settings():
    config = __main__.parse(["--images", "3", "byol", "--beton=a.beton", "--view_0.blur_prob", "0"])
    assert (config.recipe, config.images, config.view_0) == ("byol", 3, {"blur_prob": 0})


def test_help_tells_how_to_call_the_command_and_what_each_setting_means(capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "usage: python -m pipelines RECIPE [" in printed
    assert "Draw the views that a recipe makes of a few images" in printed
    for text in (
        "Number of draws of each view",
        "The dataset to take images",
        "settings of view 0",
    ):
        assert text in printed


def test_an_override_of_the_command_changes_the_picture(small_beton, tmp_path, capsys):
    pictures = []
    for number, extra in enumerate([[], [], ["--view_1.gray_prob=1"]]):
        out = tmp_path / f"{number}.png"
        arguments = ("simclr", f"--beton={small_beton}", f"--out={out}", "--images=2")
        assert run(*arguments, "--samples=1", *extra, capsys=capsys)[0] == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simclr"], "pipelines: beton: got none, expected --beton FILE.beton"),
        (["--beton={file}"], "pipelines: recipe: got '', expected one of byol, "),
        (["simclr2", "--beton={file}"], "pipelines: recipe: got 'simclr2', expected one of byol, "),
        (["simclr", "byol", "--beton={file}"], "recipe: got simclr and byol, expected one recipe"),
        (["simclr", "--beton=none.beton"], "none.beton"),
        (["simclr", "--beton={file}", "--bogus=1"], "pipelines: unknown key 'bogus'"),
        (["simclr", "--beton={file}", "--images=0"], "images: got 0, expected a whole number abo"),
        (["simclr", "--beton={file}", "--images", "a"], "images: got 'a', expected a whole number"),
        (["simclr", "--beton={file}", "--size=-1"], "size: got -1, expected a whole number of at"),
        (["--seed", "x", "simclr", "--beton={file}"], "seed: got 'x', expected a whole number"),
        (["simclr", "--beton={file}", "--view_0.blur_prb=1"], "view_0: unknown key 'blur_prb'"),
        (["simclr", "--beton={file}", "--view_0.blur_prob=b"], "view_0.blur_prob: got 'b', expec"),
        (["simclr", "--beton={file}", "--view_0.blur_prob=2"], "view_0.blur_prob: got 2"),
        (["simclr", "--beton={file}", "--view_3.blur_prob=1"], "view_3: recipe 'simclr' has no"),
    ],
)
def test_a_mistake_in_the_command_exits_2_with_one_line(
    arguments, message, small_beton, tmp_path, capsys
):
    out = tmp_path / "views.png"
    arguments = [argument.format(file=small_beton) for argument in arguments]
    code, _, err = run(*arguments, f"--out={out}", capsys=capsys)
    assert code == 2
    assert message in err and err.count("\n") == 1
    assert not out.exists()


def test_a_range_is_two_numbers():
    with pytest.raises(ValueError, match=r"got 0.5, expected two numbers \[low, high\]"):
        build(View(crop_scale=0.5), 8)

"""Compiled ops of a user's own: in a loader's pipeline, from a view recipe, linked, seeded, cached.

Pipelines start with the whole image, so that their kernels hold little and compile in seconds.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from support.harness import draw_params, photo_like, run_ops

import ffcv_ssl
from ffcv_ssl import Loader
from ffcv_ssl.errors import UserError
from ffcv_ssl.kernels.compile import cache_folder, device
from ffcv_ssl.pipeline.code_digest import digest_of
from ffcv_ssl.pipeline.dispatch import BUILT_IN, dispatch_for
from ffcv_ssl.pipeline.plan import ViewPlan, resolve_links
from ffcv_ssl.transforms import (
    ImageOp,
    RandomGrayscale,
    RandomHorizontalFlip,
    SimpleRGBImageDecoder,
)
from ffcv_ssl.transforms.base import draw_switch
from pipelines import View, build

SOURCE = """
import numpy as np
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.kernels.random import uniforms
from ffcv_ssl.transforms import ImageOp
from helper import darken

class Darken(ImageOp):
    columns = (("darken", np.bool_), ("strength", np.float32))

    def __init__(self, prob=0.5, link=None, seed=None):
        super().__init__(link, seed)
        self.prob = prob

    def constants(self):
        return (self.prob,)

    @staticmethod
    @device
    def draw(key, epoch, sample, occurrence, constants, height, width, raw):
        u, strength, _, _ = uniforms(key, epoch, sample, occurrence, 0)
        raw[0] = 1.0 if u < constants[0] else 0.0
        raw[1] = strength

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] != 0.0:
            flat = view.reshape(-1)
            for i in range(flat.size):
                flat[i] = darken(flat[i], raw[1])
"""
HELPER = """
import numba
import numpy as np

SCALE = {scale}

@numba.njit(nogil=True)
def darken(value, strength):
    return np.float32(value * strength * SCALE)
"""
RUN = """
import json, sys
import numpy as np
import ffcv_ssl
from ffcv_ssl import Loader
from ffcv_ssl.kernels.compile import cache_folder
from ffcv_ssl.transforms import RandomHorizontalFlip, SimpleRGBImageDecoder
from ffcv_ssl.pipeline import dispatch
from my_ops import Darken

flip, whole = RandomHorizontalFlip(), SimpleRGBImageDecoder()
pipelines = {
    "plain": ("image", [whole, flip]),
    "view_0": ("image", [whole, flip, Darken(0.5)]),
    "view_1": ("image", [whole, flip, Darken(0.5, link="view_0")]),
    "view_2": ("image", [whole, flip, Darken(0.5, seed=7)]),
}
if "only_built_in" in sys.argv:
    pipelines = {"plain": pipelines["plain"]}
settings = dict(num_workers=2, seed=3, pipelines=pipelines, drop_last=False, indices=range(40))
with Loader(sys.argv[1], 20, **settings) as loader:
    (first, second) = loader
dispatches = [dispatch.BUILT_IN, *dispatch._EXTENDED.values()]
kernels = {k for d in dispatches for k in (d.draw_view, d.render_view) if k._ready}
found = {"compiled": sum(sum(k.dispatcher.stats.cache_misses.values()) for k in kernels)}
found["kernels"] = sorted(k.dispatcher.py_func.__qualname__ for k in kernels)
found["folder"] = cache_folder()
if "only_built_in" not in sys.argv:
    ratio = []
    for batch in (first, second):
        params = {name: batch.params[name] for name in ("view_0", "view_1", "view_2")}
        assert (params["view_0"]["darken"] == params["view_1"]["darken"]).all()
        assert (params["view_0"]["strength"] == params["view_1"]["strength"]).all()
        assert (params["view_0"]["strength"] != params["view_2"]["strength"]).all()
        ours, flips = np.asarray(batch.plain) / 255.0, batch.params["plain"]["flip"]
        for row, drawn in enumerate(params["view_0"]):
            plain = ours[row] if flips[row] == drawn["flip"] else ours[row][:, ::-1]
            view = np.asarray(batch.view_0[row]) / 255.0
            if drawn["darken"]:
                ratio.append(float((view.sum() / plain.sum()) / drawn["strength"]))
            else:
                assert np.array_equal(view, plain)
    found["ratio"] = float(np.median(ratio))
print(json.dumps(found))
"""


class OwnFolder:
    """A user's folder with an op and a helper in another file, and a kernel cache that holds the
    built-in kernels alone."""

    def __init__(self, folder, beton):
        self.folder, self.beton = folder, beton
        kernels = folder / "cache" / os.path.basename(cache_folder())
        kernels.mkdir(parents=True)
        for file in os.scandir(cache_folder()):
            if not re.search(r"_view_[0-9a-f]{16}\.", file.name):
                shutil.copy(file.path, kernels)
        self.write(SOURCE, scale=1.0)
        (folder / "run.py").write_text(RUN)

    def write(self, source, scale):
        (self.folder / "my_ops.py").write_text(source)
        (self.folder / "helper.py").write_text(HELPER.format(scale=scale))

    def run(self, *arguments):
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PYTHONPATH"] = str(Path(ffcv_ssl.__file__).parent.parent)
        environment["FFCV_SSL_CACHE"] = str(self.folder / "cache")
        command = [sys.executable, "run.py", str(self.beton), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def own_folder(tmp_path, raw_beton):
    pipelines = {"plain": ("image", [SimpleRGBImageDecoder(), RandomHorizontalFlip()])}
    with Loader(raw_beton, 20, num_workers=1, seed=3, pipelines=pipelines) as loader:
        next(iter(loader))  # the built-in kernels are on the disk now
    return OwnFolder(tmp_path, raw_beton)


@pytest.mark.slow
def test_an_own_op_is_compiled_once_and_again_when_its_code_changes(own_folder):
    first, again = own_folder.run(), own_folder.run()
    assert first["compiled"] == 2 and again["compiled"] == 0  # draw and render
    assert first["kernels"] == again["kernels"] and first["folder"] == again["folder"]
    assert len(first["kernels"]) == 4  # the built-in ones, of the view without own ops, were there
    assert first["ratio"] == pytest.approx(1.0, abs=0.01)
    own_folder.write(SOURCE, scale=0.5)  # a number in a file that the op's file imports
    changed = own_folder.run()
    assert changed["compiled"] == 2 and changed["folder"] == first["folder"]
    assert changed["ratio"] == pytest.approx(0.5, abs=0.01)
    own_folder.write(SOURCE.replace("raw[1])", "0.25 * raw[1])"), scale=1.0)
    edited = own_folder.run()
    assert edited["ratio"] == pytest.approx(0.25, abs=0.02)


@pytest.mark.whole
def test_a_pipeline_without_own_ops_uses_the_kernels_that_are_there(own_folder):
    found = own_folder.run("only_built_in")
    assert found["compiled"] == 0 and found["kernels"] == ["draw_view", "render_view"]


DRAW = """
import json, sys
import numpy as np
from ffcv_ssl.pipeline.plan import ViewPlan
from ffcv_ssl.transforms import RandomHorizontalFlip, SimpleRGBImageDecoder
from my_ops import Darken

def draw(*ops):
    plan = ViewPlan("view_0", "image", 0, [SimpleRGBImageDecoder(), *ops], 0, (4, 4))
    zeros = np.zeros(3, np.int64)
    raw = np.zeros((3, plan.num_columns))
    plan.segments[0].draw(0, zeros, zeros, zeros + 8, zeros + 8, raw)
    return raw.tolist()

flip = RandomHorizontalFlip(1.0)
pipelines = {"built_in": (flip,), "own": (flip, Darken(1.0))}
print(json.dumps([draw(*pipelines[name]) for name in sys.argv[1:]]))
"""


@pytest.mark.whole
def test_kernels_that_two_processes_compiled_work_side_by_side(tmp_path):
    """Each process compiled its kernel first, so numba gave their functions the same names."""
    (tmp_path / "my_ops.py").write_text(SOURCE)
    (tmp_path / "helper.py").write_text(HELPER.format(scale=1.0))
    (tmp_path / "draw.py").write_text(DRAW)
    environment = {**os.environ, "FFCV_SSL_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(Path(ffcv_ssl.__file__).parent.parent)
    environment["PYTHONHASHSEED"] = "0"  # the flags in the names are in the order of a set

    def draw(*names):
        command = [sys.executable, "draw.py", *names]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (built_in,), (own,) = draw("built_in"), draw("own")
    assert built_in == [[1.0]] * 3 and [row[:2] for row in own] == [[1.0, 1.0]] * 3
    assert draw("built_in", "own") == [built_in, own]
    assert draw("own", "built_in") == [own, built_in]


@numba.njit(nogil=True)
def _invert(view, constants, raw, scratch):
    if raw[0] != 0.0:
        flat = view.reshape(-1)
        for i in range(flat.size):
            flat[i] = np.float32(1.0) - flat[i]


class Invert(ImageOp):
    """Uses a draw function of the library: only the render kernel is compiled."""

    columns = (("invert", np.bool_),)

    def __init__(self, prob=0.5, link=None, seed=None):
        super().__init__(link, seed)
        self.prob = prob

    def constants(self):
        return (self.prob,)

    draw = staticmethod(draw_switch)
    apply = staticmethod(_invert)


def test_an_own_op_stands_between_built_in_ops_and_draws_by_its_name():
    images = [photo_like(12, 17, seed=i) for i in range(8)]
    ops = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), Invert(), RandomGrayscale(0.5)]
    views, raw, plan = run_ops(ops, images)
    params = plan.params_of(raw)
    assert params.dtype.names == ("flip", "invert", "gray")
    assert 0 < params["invert"].sum() < 8
    flips_and_grays = [ops[0], ops[1], ops[3]]
    plain, plain_raw, _ = run_ops(flips_and_grays, images)
    assert np.array_equal(plain_raw, raw[:, [0, 2]])  # an added op changes no other draw
    for view, other, row in zip(views, plain, params):
        expected = 255.0 - other if row["invert"] else other.astype(float)
        assert np.abs(view - expected).max() <= 1  # the weights of grey sum to 0.9999
    assert plan.dispatch.draw_view is BUILT_IN.draw_view


def test_an_own_op_that_never_acts_changes_nothing():
    image = photo_like(12, 17)
    ops = [SimpleRGBImageDecoder(), RandomHorizontalFlip(0), Invert(0), RandomGrayscale(0)]
    assert np.array_equal(run_ops(ops, [image])[0][0], image)


def test_own_ops_of_two_views_share_their_kernels():
    whole, other = SimpleRGBImageDecoder(), type("Other", (Invert,), {"apply": device(_py_half)})()
    pair = dispatch_for([whole, Invert()], [other]), dispatch_for([whole, other], [Invert()])
    assert pair[0] is pair[1] is not BUILT_IN
    assert dispatch_for([whole], [Invert(), other]) is BUILT_IN


def _py_half(view, constants, raw, scratch):
    view[0] *= np.float32(0.5)


def test_the_digest_of_an_op_sees_its_code_its_options_and_the_numbers_it_refers_to():
    def make(number, **options):
        def apply(view, constants, raw, scratch):
            view[0, 0, 0] = number

        return type("Made", (ImageOp,), {"apply": staticmethod(numba.njit(**options)(apply))})

    assert digest_of(make(1.0)) == digest_of(make(1.0))
    assert (
        len({digest_of(make(1.0)), digest_of(make(2.0)), digest_of(make(1.0, fastmath=True))}) == 3
    )


def test_two_classes_of_one_name_in_one_view_are_refused_and_apart_in_two():
    first, second = (type("Same", (Invert,), {}) for _ in range(2))
    with pytest.raises(UserError, match=r"two op classes are called Same, of .*; rename one"):
        ViewPlan("view_0", "image", 0, [SimpleRGBImageDecoder(), first(), second()], 0, (4, 4))
    plans = [
        ViewPlan(f"view_{i}", "image", i, [SimpleRGBImageDecoder(), op()], 0, (4, 4))
        for i, op in enumerate((first, second))
    ]
    assert plans[0].placed[1].key != plans[1].placed[1].key  # of the view's index
    linked = ViewPlan(
        "view_1", "image", 1, [SimpleRGBImageDecoder(), second(link="view_0")], 0, (4, 4)
    )
    with pytest.raises(ValueError, match="view 'view_0' has no such op"):
        resolve_links([plans[0], linked])


def test_a_derived_op_without_code_of_its_own_uses_the_prebuilt_kernels():
    derived = type("Derived", (RandomHorizontalFlip,), {})
    _, _, plan = draw_params([SimpleRGBImageDecoder(), derived(1.0)], 4)
    assert plan.dispatch is BUILT_IN
    image = photo_like(6, 9)
    views, _, _ = run_ops([SimpleRGBImageDecoder(), derived(1.0)], [image])
    assert np.array_equal(views[0], image[:, ::-1])


def plain_function(view, constants, raw, scratch):
    pass


@device
def short(view, raw):
    pass


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "has no compiled function apply(view, constants, raw, scratch)"),
        ({"apply": staticmethod(plain_function)}, "apply: got function, expected a compiled"),
        ({"apply": staticmethod(short)}, "apply: takes (view, raw), expected (view, constants"),
        (
            {"columns": (("a", bool),)},
            "num_raw_columns is 1, but there is no compiled function draw(key",
        ),
        ({"columns": (("a", bool), ("a", int))}, "column 'a' is declared twice"),
        ({"columns": ("a",)}, "columns is ('a',), expected ((name, dtype), ...)"),
        (
            {"columns": (("a", bool),), "num_raw_columns": 0},
            "got 1 columns, expected at most num_raw_columns (0)",
        ),
        ({"constants": lambda self: (0.0,) * 9}, "constants() gives 9 numbers, expected at most 8"),
    ],
)
def test_what_an_op_lacks_is_said_in_one_line(attributes, message):
    complete = {} if "apply" in message else {"apply": staticmethod(_invert)}
    op = type("Mine", (ImageOp,), {**complete, **attributes})()
    with pytest.raises(UserError) as error:
        ViewPlan("view_0", "image", 0, [SimpleRGBImageDecoder(), op], 0, (4, 4))
    assert f"Mine{'' if message.startswith('apply:') else ':'}" in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_op_that_does_not_compile_is_named_in_one_line():
    @device
    def apply(view, constants, raw, scratch):
        view.no_such_method()

    op = type("Broken", (ImageOp,), {"apply": staticmethod(apply)})()
    with pytest.raises(
        UserError, match=r"Broken.apply does not compile: .*no_such_method"
    ) as error:
        run_ops([SimpleRGBImageDecoder(), op], [photo_like(4, 4)])
    assert "\n" not in str(error.value)


def test_an_exception_in_an_own_op_names_view_and_ops():
    @numba.njit
    def apply(view, constants, raw, scratch):
        raise ValueError("too dark")

    op = type("Picky", (ImageOp,), {"apply": staticmethod(apply)})()
    with pytest.raises(RuntimeError, match=r"view 'view_0', ops .*Picky: ValueError: too dark"):
        run_ops([SimpleRGBImageDecoder(), op], [photo_like(4, 4)])


RECIPE_OP = """
import numpy as np
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.transforms import ImageOp
from ffcv_ssl.transforms.base import check_probability, draw_switch

class Dim(ImageOp):
    columns = (("dim", np.bool_),)

    def __init__(self, prob=0.5, link=None, seed=None):
        super().__init__(link, seed)
        self.prob = prob
        self.constants()

    def constants(self):
        return (check_probability(self, "prob", self.prob),)

    draw = staticmethod(draw_switch)

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] != 0.0:
            view[0] *= np.float32(0.5)
"""


@pytest.fixture
def recipe_op(tmp_path):
    path = tmp_path / "dim.py"
    path.write_text(RECIPE_OP)
    return path


def test_a_view_recipe_takes_an_own_op_at_its_place(recipe_op):
    entry = {"op": f"{recipe_op}:Dim", "args": {"prob": 0.25}}
    view = View(flip_prob=0.5, gray_prob=0.5, extra_ops=[entry, {**entry, "before": "gray"}])
    names = [type(op).__name__ for op in build(view, 32)]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "Dim", "RandomGrayscale", "Dim"]
    first, second = [op for op in build(view, 32) if type(op).__name__ == "Dim"]
    assert type(first) is type(second) and first.prob == 0.25 and first is not second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "{file}"}, "extra_ops[0].op: got '"),
        ({"op": "none.py:Dim"}, "none.py cannot be imported: FileNotFoundError"),
        ({"op": "no_module:Dim"}, "no_module cannot be imported: ModuleNotFoundError"),
        ({"op": "{file}:Bright"}, "has no class Bright derived from ImageOp"),
        ({"args": {"prob": 3}}, "Dim: prob is 3, must be a probability"),
        ({"args": {"porb": 0.3}}, "unexpected keyword argument 'porb'"),
        ({"args": 3}, "extra_ops[0].args: got 3"),
        ({"before": "crop"}, "extra_ops[0].before: got 'crop', expected one of flip"),
        ({"prob": 0.3}, "extra_ops[0]: unknown key 'prob', expected one of op, args, before"),
        ({"op": 3}, "extra_ops[0]: got {{'op': 3}}, expected"),
    ],
)
def test_a_mistake_in_extra_ops_is_named_in_one_line(recipe_op, change, message):
    entry = {"op": f"{recipe_op}:Dim", **change}
    if isinstance(entry["op"], str):
        entry["op"] = entry["op"].format(file=recipe_op)
    with pytest.raises(ValueError) as error:
        View(extra_ops=[entry])
    assert str(error.value).startswith("extra_ops[0]") and "\n" not in str(error.value)
    assert message.replace("{{", "{").replace("}}", "}") in str(error.value)

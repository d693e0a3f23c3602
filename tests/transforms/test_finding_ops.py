"""A file in transforms/ is an op: exported, in the kernels' dispatch, a setting of every view."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ffcv_ssl
import pipelines

NEW_OP = """
import numpy as np
from ffcv_ssl.kernels.compile import device
from ffcv_ssl.transforms.base import ImageOp, check_probability, draw_switch, probability

class RandomRedOut(ImageOp):
    columns = (("red_out", np.bool_),)
    view_name, place = "red_out", 35
    settings = (probability("red_out_prob", "prob", "Probability of no red."),)

    def __init__(self, prob=0.2, link=None, seed=None):
        super().__init__(link, seed)
        self.prob = prob

    def constants(self):
        return (check_probability(self, "prob", self.prob),)

    draw = staticmethod(draw_switch)

    @staticmethod
    @device
    def apply(view, constants, raw, scratch):
        if raw[0] != 0.0:
            view[0] = np.float32(0.0)
"""
RUN = """
import json
import numpy as np
from ffcv_ssl.pipeline.dispatch import BUILT_IN
from ffcv_ssl.transforms import RandomRedOut
from pipelines import View, ViewSettings, build
from pipelines.picture import caption

on = dict(red_out_prob=0.5, gray_prob=0.5, blur_prob=0.5, link="view_0", linked=["red_out"])
ops = build(View(**on), 64)
try:
    View(red_out_prob=2)
except ValueError as error:
    mistake = str(error)
row = np.array([(True, 0.5)], [("red_out", bool), ("sigma", np.float32)])[0]
print(json.dumps({
    "ops": [type(op).__name__ for op in ops],
    "links": [op.link for op in ops],
    "code": BUILT_IN.code(RandomRedOut(), "apply"),
    "typed": ViewSettings.__annotations__["red_out_prob"] is float,
    "mistake": mistake,
    "caption": caption(row),
}))
"""


@pytest.mark.whole
def test_a_new_file_in_transforms_is_all_that_a_built_in_op_needs(tmp_path):
    for package in (ffcv_ssl, pipelines):
        folder = Path(package.__file__).parent
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, tmp_path / folder.name, ignore=ignore)
    (tmp_path / "ffcv_ssl" / "transforms" / "red_out.py").write_text(NEW_OP)
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ops"] == ["RandomResizedCrop", "RandomGrayscale", "RandomRedOut", "GaussianBlur"]
    assert found["links"] == [None, None, "view_0", None]
    assert found["code"] >= 0 and found["typed"]
    assert found["mistake"] == "red_out_prob: got 2, expected 0 to 1"
    assert found["caption"] == "red_out, blur 0.50"

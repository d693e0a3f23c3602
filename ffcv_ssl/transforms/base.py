"""What an image op is: settings, how its parameters are drawn, how they are applied. One op a file.

To add an op, look at a neighbour, solarization say, and at its places in turn:

1. transforms/solarization.py: the class, with settings, columns and an opcode of its own. It draws
   on or off with `draw_switch`; gaussian_blur.py has a draw function of its own.
2. kernels/color.py, `solarize_`: what is done to a view in work, in place.
3. pipeline/program.py: its opcode, and a branch each in `draw_view` and `_apply`.
4. transforms/__init__.py: its name.
5. tests/reference.py, `solarize`: the plain NumPy twin;
   tests/transforms/test_solarization.py: both against
   torchvision or PIL, and the draws' distribution.
6. To be set from YAML: pipelines/view.py, `OPS`, the settings and their ranges, and `build`;
   pipelines/picture.py if its caption should tell it.

Shapes: N samples, K columns, H W pixels. A view in work is float32 (3, H, W) in [0, 1].
"""

import operator

import numpy as np

NUM_CONSTANTS = 8  # numbers an op may hand to its kernels
_OWNERS = {}  # the class that has an opcode; its subclasses may share it


class ImageOp:
    """A per-sample op. Subclasses set the class attributes and may override `constants` and
    `describe`.

    link: name of another view of the same field whose same op's draw is reused, or None. seed: an
    own random stream instead of the loader's, or None.
    """

    opcode = None  # a number of its own, which pipeline/program.py knows
    columns = ()  # ((name, dtype of the user's column), ...)
    num_raw_columns = 1  # float64 numbers that `draw` writes
    random = True  # False: nothing is drawn, so link and seed make no sense

    def __init_subclass__(cls, **settings):
        super().__init_subclass__(**settings)
        owner = _OWNERS.setdefault(cls.opcode, cls) if cls.opcode is not None else cls
        if not issubclass(cls, owner) and cls.__qualname__ != owner.__qualname__:
            got = f"{cls.__qualname__}: opcode {cls.opcode} is {owner.__qualname__}'s"
            raise TypeError(f"{got}; take one of its own, with branches in pipeline/program.py")

    def __init__(self, link=None, seed=None):
        self.link = link
        self.seed = seed

    def constants(self):
        """Up to NUM_CONSTANTS floats for `draw` and `render`, from settings checked anew: they may
        have been changed.

        Raises ValueError for settings out of range.
        """
        return ()

    def scratch_floats(self, view_shape):
        """Numbers of float32 scratch that `render` needs for a view of (H, W), beside the view
        itself."""
        return 0

    def describe(self, raw, out):
        """Turn raw draws (N, K) into the user's columns: out[name] for every name in `columns`."""
        for i, (name, dtype) in enumerate(self.columns):
            out[name] = raw[:, i].astype(dtype)

    def __repr__(self):
        settings = vars(self).items()
        settings = {k: v for k, v in settings if k not in ("link", "seed") or v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def check_number(op, name, value, low, high, what=""):
    """value as a float in [low, high], else ValueError; `what` completes "must be ..."."""
    if not isinstance(value, (int, float, np.number)) or not low <= value <= high:
        what = what or f"in [{low:g}, {high:g}]"
        raise ValueError(f"{type(op).__name__}: {name} is {value!r}, must be {what}")
    return float(value)


def check_probability(op, name, value):
    """value as a float in [0, 1], else ValueError."""
    return check_number(op, name, value, 0, 1, "a probability in [0, 1]")


def check_range(op, name, value, low, high):
    """value as (min, max) floats with low <= min <= max <= high, else ValueError."""
    try:
        first, last = (float(v) for v in value)
    except (TypeError, ValueError):
        first, last = 1.0, 0.0
    if not low <= first <= last <= high:
        raise ValueError(
            f"{type(op).__name__}: {name} is {value!r}, "
            f"must be (min, max) with {low} <= min <= max <= {high}"
        )
    return first, last


def check_size(op, value):
    """An output size as (height, width): an int is a square. ValueError unless both are 1 to
    65535."""
    size = (value, value) if isinstance(value, (int, np.integer)) else value
    try:
        height, width = (0 if isinstance(v, bool) else operator.index(v) for v in size)
    except (TypeError, ValueError):
        height = width = 0
    if not (1 <= height <= 65535 and 1 <= width <= 65535):
        raise ValueError(
            f"{type(op).__name__}: output_size is {value!r}, "
            "must be pixels or (height, width), 1 to 65535"
        )
    return height, width

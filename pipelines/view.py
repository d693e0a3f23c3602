"""One view: every probability and range of its ops in one frozen record, checked when it is made.

A record is data: it can be overridden key by key, printed, and stored with a run. `build` turns it
into ops. The built-in ops declare the settings (`ImageOp.settings`), in the order in which the ops
act. An op that can never act is left out. Draws are keyed by op class, so this changes no other
draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, make_dataclass
from typing import Any

from ffcv_ssl.transforms import BUILT_IN_OPS, ImageOp
from ffcv_ssl.transforms.base import Setting
from pipelines.extra_ops import ExtraOp, parse_extra_ops

# The built-in ops by their names in `View.linked` and extra ops, in the order of a view.
OPS: dict[str, type[ImageOp]] = {
    op.view_name: op for op in BUILT_IN_OPS if "view_name" in vars(op) and op.view_name
}
_BEFORE_OPS = (
    Setting(
        "size_scale",
        "",
        float,
        1.0,
        "Side of the view as a share of the run's resolution, up to 4; DINO's local: 96/224.",
        1e-3,
        4,
    ),
)
_BEHIND_OPS = (
    Setting(
        "link",
        "",
        str | None,
        None,
        "Name of another view whose draws the ops in `linked` reuse; None: every op draws.",
    ),
    Setting(
        "linked",
        "",
        tuple[str, ...],
        ("crop",),
        f"The ops that `link` concerns: {', '.join(OPS)}.",
    ),
    Setting(
        "extra_ops",
        "",
        tuple[dict[str, Any], ...],
        (),
        "Image ops of your own: [{op: file.py:Class, args: {...}, before: blur}]; without `before` "
        "they act last (docs/adding_an_op.md).",
    ),
)
SETTINGS: dict[str, Setting] = {
    setting.key: setting
    for settings in (_BEFORE_OPS, *(op.settings for op in OPS.values()), _BEHIND_OPS)
    for setting in settings
}


class _ViewBase:
    """Every setting of one view of an image, in the order in which the ops act.

    Ranges are (low, high) and uniform, except `crop_ratio`, which is log-uniform. Lists are
    accepted as tuples. Raises ValueError, naming the key, for a value outside its range.
    """

    size_scale: float
    crop: str
    link: str | None
    linked: tuple[str, ...]
    extra_ops: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        for key, setting in SETTINGS.items():
            object.__setattr__(self, key, _checked(setting, getattr(self, key)))
        for name in self.linked:
            _check_choice("linked", name, tuple(OPS))
        if self.link is not None and self.crop == "center" and "crop" in self.linked:
            raise ValueError(f"link: got {self.link!r}, expected none: a center crop draws nothing")
        self.parsed_extra_ops()

    def parsed_extra_ops(self) -> list[ExtraOp]:
        """Load the ops of `extra_ops`. Raises ValueError, naming the entry at fault."""
        return parse_extra_ops(self.extra_ops, tuple(OPS))

    def size_px(self, resolution_px: int) -> int:
        """Side of this view in pixels when global views are `resolution_px` wide; at least 1."""
        return max(1, round(resolution_px * self.size_scale))


View: Any = make_dataclass(
    "View",
    [
        (s.key, s.type, field(default=s.default, metadata={"help": s.help}))
        for s in SETTINGS.values()
    ],
    bases=(_ViewBase,),
    namespace={"__doc__": _ViewBase.__doc__, "__module__": __name__},
    frozen=True,
)


def build(view: _ViewBase, resolution_px: int) -> list[ImageOp]:
    """Ops that render `view` as uint8, where global views have `resolution_px` x `resolution_px`.

    Ops that never act are left out. The caller adds conversions (`ToTensor`, `ToTorchImage`,
    `NormalizeImage`...).
    """
    size_px, settings = view.size_px(resolution_px), vars(view)
    extra_ops = view.parsed_extra_ops()
    ops: list[ImageOp] = []
    for name, op_class in OPS.items():
        ops += [extra.make() for extra in extra_ops if extra.before == name]
        op = op_class.from_settings(settings, size_px)
        if op is not None:
            if view.link is not None and name in view.linked:
                op.link = view.link
            ops.append(op)
    return ops + [extra.make() for extra in extra_ops if extra.before is None]


def make_views(views: Mapping[str, Any], resolution_px: int) -> dict[str, list[ImageOp]]:
    """The ops of each of several views, by name: what `build` returns."""
    return {name: build(view, resolution_px) for name, view in views.items()}


def _checked(setting: Setting, value: Any) -> Any:
    """The checked `value`, a list as a tuple. Raises ValueError, naming the key."""
    key = setting.key
    if setting.choices:
        _check_choice(key, value, setting.choices)
    if setting.is_valid is not None and not setting.is_valid(value):
        raise ValueError(f"{key}: got {value!r}, expected {setting.expected}")
    if setting.low is not None and setting.high is not None:
        if setting.type == tuple[float, float]:
            return _checked_range(key, value, setting.low, setting.high)
        _check_number(key, value, setting.low, setting.high)
    return tuple(value) if isinstance(value, list) else value


def _check_choice(key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key}: got {value!r}, expected one of {', '.join(known)}")


def _check_number(key: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key}: got {value!r}, expected a number")
    if not low <= value <= high:
        upper = f" to {high:g}" if high < math.inf else " or more"
        raise ValueError(f"{key}: got {value:g}, expected {low:g}{upper}")


def _checked_range(key: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """`value` as a tuple (lowest, highest) with low <= lowest <= highest <= high, highest > 0."""
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"{key}: got {value!r}, expected two numbers [low, high]")
    for side in value:
        _check_number(key, side, low, high)
    if value[0] > value[1] or value[1] == 0:
        raise ValueError(f"{key}: got {list(value)}, expected low <= high and high above 0")
    return value[0], value[1]

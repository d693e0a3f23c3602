"""The views of a run as configuration: a recipe and, for each of its views, the settings to change.

`View`'s fields give the names and types of the overrides. So YAML (`views: {recipe: simclr, view_0:
{blur_prob: 0.3}}`) and the command line (`--views.view_0.blur_prob 0.3`) are checked key by key,
and each setting is declared only once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypedDict

from pipelines.recipes import RECIPES
from pipelines.view import SETTINGS, View

MAX_VIEWS = 12

# All of View's settings, each optional; jsonargparse checks names and types against it. The ops
# declare the fields, which a type checker cannot follow.
_make: Any = TypedDict
ViewSettings: Any = _make("ViewSettings", {k: s.type for k, s in SETTINGS.items()}, total=False)


@dataclass(frozen=True)
class Views:
    """The views of each image: a recipe, and changes to single settings of its views.

    `resolve` returns the views. It raises ValueError, naming the key, for an unknown recipe, view
    or setting.
    """

    recipe: str = "simclr"
    """Name of the recipe, a key of `pipelines.RECIPES`."""
    small_images: bool = False
    """Use the recipe's variant for images of CIFAR's size: no blur, jitter of strength 0.5."""
    view_0: ViewSettings = field(default_factory=dict)
    """Changes to the recipe's settings of view 0, e.g. `{blur_prob: 0.3}`."""
    view_1: ViewSettings = field(default_factory=dict)
    """Changes to view 1."""
    view_2: ViewSettings = field(default_factory=dict)
    """Changes to view 2, if the recipe has it."""
    view_3: ViewSettings = field(default_factory=dict)
    """Changes to view 3."""
    view_4: ViewSettings = field(default_factory=dict)
    """Changes to view 4."""
    view_5: ViewSettings = field(default_factory=dict)
    """Changes to view 5."""
    view_6: ViewSettings = field(default_factory=dict)
    """Changes to view 6."""
    view_7: ViewSettings = field(default_factory=dict)
    """Changes to view 7."""
    view_8: ViewSettings = field(default_factory=dict)
    """Changes to view 8."""
    view_9: ViewSettings = field(default_factory=dict)
    """Changes to view 9."""
    view_10: ViewSettings = field(default_factory=dict)
    """Changes to view 10."""
    view_11: ViewSettings = field(default_factory=dict)
    """Changes to view 11."""

    def resolve(self) -> dict[str, View]:
        """The views by name, in order: dict of `View`, from `view_0` on."""
        if self.recipe not in RECIPES:
            raise ValueError(
                f"views.recipe: got {self.recipe!r}, expected one of {', '.join(sorted(RECIPES))}"
            )
        views = RECIPES[self.recipe](small_images=self.small_images)
        for index in range(MAX_VIEWS):
            name = f"view_{index}"
            settings = getattr(self, name)
            if not settings:
                continue
            if name not in views:
                expected = f"expected one of {', '.join(views)}"
                raise ValueError(
                    f"views.{name}: recipe {self.recipe!r} has no such view, {expected}"
                )
            views[name] = _overridden(f"views.{name}", views[name], settings)
        _check_links(views)
        return views

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A mapping of these settings with every setting of every view of the recipe. Raises what
        `resolve` raises."""
        views = cls(**settings).resolve()
        return {**settings, **{name: _plain(asdict(view)) for name, view in views.items()}}

    @classmethod
    def reduced(
        cls, settings: Mapping[str, Any], given: Mapping[str, Collection[str]]
    ) -> dict[str, Any]:
        """`complete` undone: views that have every setting keep only what differs from the recipe,
        and what is `given` before (settings by view), which they override. So another recipe, given
        later, is not covered by them. What is wrong is left for the check of types."""
        recipe, reduced = RECIPES.get(str(settings.get("recipe"))), dict(settings)
        small = settings.get("small_images", cls.small_images)
        views = recipe(small_images=small) if recipe and isinstance(small, bool) else {}
        for name, view in views.items():
            own = settings.get(name)
            if isinstance(own, Mapping) and SETTINGS.keys() <= own.keys():
                base, before = _plain(asdict(view)), given.get(name, ())
                reduced[name] = {
                    k: v
                    for k, v in own.items()
                    if k not in base or k in before or _plain(v) != base[k]
                }
        return reduced


def views_in_full(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with a group `views`, with every setting of every view in it."""
    return {**settings, "views": Views.complete(settings["views"])}


def _plain(value: Any) -> Any:
    """Settings as YAML reads them back: tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _overridden(where: str, view: View, settings: ViewSettings) -> View:
    for key in settings:
        if key not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {known}")
    try:
        return replace(view, **settings)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def _check_links(views: dict[str, View]) -> None:
    """Check the links between views. The loader checks links between ops when it makes its plan."""
    for name, view in views.items():
        others = [other for other in views if other != name]
        if view.link is not None and view.link not in others:
            known = ", ".join(others) or "none: it is the only view"
            raise ValueError(f"views.{name}.link: got {view.link!r}, expected one of {known}")

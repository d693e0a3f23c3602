"""View recipes, by method: which transforms make which view.

A `View` holds every probability and range of one view. A recipe names a set of views (`view_0`,
`view_1`, ...). `Views` is a recipe with a user's overrides. `build` turns a view into the list of
ops for the loader.
"""

from pipelines.config import Views, ViewSettings, views_in_full
from pipelines.recipes import RECIPES
from pipelines.view import View, build, make_views

__all__ = [
    "RECIPES", "View", "ViewSettings", "Views", "build", "make_views", "views_in_full",
]  # fmt: skip

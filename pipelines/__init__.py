"""View recipes, by method: which transforms make which view.

A `View` holds every probability and range of one view, a recipe names a set of them (`view_0`,
`view_1`, ...), `Views` is the recipe with a user's overrides, and `build` turns a view into the
list of ops that the loader takes.
"""

from pipelines.config import Views, ViewSettings
from pipelines.recipes import RECIPES
from pipelines.view import View, build

__all__ = ["RECIPES", "View", "ViewSettings", "Views", "build"]

"""The floors of the library: who may import whom, read off the sources, late imports included."""

import ast
from pathlib import Path

from support.small_files import REPOSITORY

PACKAGE = "ffcv_ssl"
# From the ground up. A room imports rooms of lower floors, and itself. `fields` stands on
# `transforms` because FFCV's import paths want decoders such as RandomResizedCrop there.
FLOORS = [
    ["errors", "moved"],
    ["cores", "files", "seeding"],
    ["config", "kernels"],
    ["beton", "transforms", "traversal_order"],
    ["fields", "pipeline"],
    ["reader", "sources", "writer"],
    ["inspect", "loader"],
    ["training"],
    ["methods", "jobs"],
    ["evaluation"],
    ["monitor"],
    ["api", "selftest"],
    ["command_line"],
    ["__main__"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
OUTSIDE = ("train", "evaluate", "write_dataset", "demo", "pipelines", "benchmarks", "tests")
MAX_LOOSE_FILES = 10


def find_modules(root=REPOSITORY):
    """{dotted name: path} of every module of the package below `root`."""
    modules = {}
    for path in sorted((Path(root) / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


def lazy_homes(modules):
    """{"ffcv_ssl.Loader": "ffcv_ssl.loader", ...}: the package's names, loaded when first used."""
    for node in ast.parse(modules[PACKAGE].read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_HOMES":
            homes = ast.literal_eval(node.value)
            return {f"{PACKAGE}.{name}": home for name, home in homes.items()}
    return {}


def imported_names(node, package):
    """Dotted names that an import statement asks for; `package`: what relative ones start from."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parts, *filter(None, [node.module])])
    return [f"{base}.{alias.name}" for alias in node.names]


def find_imports(modules):
    """[(importing module, imported module, "file:line")] inside the package, and of OUTSIDE."""
    found, homes = [], lazy_homes(modules)
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            for target in imported_names(node, package):
                target = homes.get(target, target)
                if target not in modules:  # a name inside a module
                    target = target.rpartition(".")[0] or target
                if target in modules or target.split(".")[0] in OUTSIDE:
                    where = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                    found.append((name, target, where))
    return found


def room_of(module):
    """The folder or loose file a module lies in; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def find_circles(edges):
    """Sets of modules that import one another in a circle: Tarjan's components of two and more."""
    numbers, lows, stack, circles = {}, {}, [], []

    def visit(module):
        numbers[module] = lows[module] = len(numbers)
        stack.append(module)
        for target in edges.get(module, ()):
            if target not in numbers:
                visit(target)
            if target in stack:
                lows[module] = min(lows[module], lows[target])
        if lows[module] == numbers[module]:
            start = stack.index(module)
            if len(stack) - start > 1:
                circles.append(sorted(stack[start:]))
            del stack[start:]

    for module in edges:
        if module not in numbers:
            visit(module)
    return circles


def edges_of(imports):
    """{module: modules that importing it loads}: a module's packages are loaded before it."""
    edges = {}
    for name, target, _ in imports:
        while target not in ("", PACKAGE) and not name.startswith(f"{target}."):
            edges.setdefault(name, set()).add(target)
            target = target.rpartition(".")[0]
    return edges


def test_no_module_imports_itself_by_way_of_others():
    assert find_circles(edges_of(find_imports(find_modules()))) == []


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in find_modules()} - {""}
    assert rooms <= set(FLOOR_OF), "give the new room a floor in FLOORS"


def test_imports_point_down():
    upward = []
    for name, target, where in find_imports(find_modules()):
        source, goal = room_of(name), room_of(target)
        if source and goal and source != goal and FLOOR_OF[goal] >= FLOOR_OF[source]:
            upward.append(f"{where}: {source} imports {goal}")
    assert upward == []


def test_the_library_imports_nothing_that_stands_on_it():
    outside = [
        f"{where}: {target}"
        for _, target, where in find_imports(find_modules())
        if target.split(".")[0] in OUTSIDE
    ]
    assert outside == []


def test_few_files_lie_loose():
    loose = {path.name for path in (REPOSITORY / PACKAGE).glob("*.py")} - {"__init__.py"}
    assert len(loose) <= MAX_LOOSE_FILES, f"{sorted(loose)}: a file belongs into a room"


def test_a_circle_through_a_package_is_found():
    imports = [("ffcv_ssl.protocols", "ffcv_ssl.protocols.curve", "a:1")]
    imports += [("ffcv_ssl.protocols.curve", "ffcv_ssl.nested", "b:1")]
    imports += [("ffcv_ssl.nested", "ffcv_ssl.protocols.linear", "c:1")]
    circle = ["ffcv_ssl.nested", "ffcv_ssl.protocols", "ffcv_ssl.protocols.curve"]
    assert find_circles(edges_of(imports)) == [circle]


def test_circles_and_late_imports_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    sources = {
        "__init__.py": '_HOMES = {"Loader": "ffcv_ssl.loader"}',
        "loader.py": "def read():\n    from .reader import Reader",
        "reader.py": "from ffcv_ssl.errors import BetonError\nfrom ffcv_ssl import Loader",
        "errors.py": "import train",
    }
    (tmp_path / PACKAGE).mkdir()
    for name, text in sources.items():
        (tmp_path / PACKAGE / name).write_text(text)
    imports = find_imports(find_modules(tmp_path))
    assert find_circles(edges_of(imports)) == [["ffcv_ssl.loader", "ffcv_ssl.reader"]]
    assert ("ffcv_ssl.errors", "train", "ffcv_ssl/errors.py:1") in imports
    assert ("ffcv_ssl.loader", "ffcv_ssl.reader", "ffcv_ssl/loader.py:2") in imports

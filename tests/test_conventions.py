"""The structure that `diffusers_fvg` keeps: imports point downwards, files and functions stay short."""

import ast
from pathlib import Path

import pytest

import diffusers_fvg


PACKAGE = Path(diffusers_fvg.__file__).parent
# Levels from the bottom up. A folder imports from lower levels and from itself.
LEVELS = [
    {"atomic"},
    {"checks", "devices", "flags", "kernels", "locks", "media", "model_facts"},
    {"loading"},
    {"schedules"},
    {"lora", "models", "rewrite"},
    {"animate"},
    {"compose", "dreamer"},
    {"publishing"},
    {"pipelines", "training"},
    {"embedded", "evaluation"},
    {"recipes"},
    {"overview"},
    {"planning", "shapes"},
    {"app"},
    {"cli"},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Modules of one line that keep former import paths for one release.
MOVED = {"decoding", "profiles", "transformer_anchor"}


def modules(package: Path) -> dict[str, Path]:
    """Returns the file of each module by its dotted name below the package."""
    files = {file.relative_to(package).with_suffix(""): file for file in sorted(package.rglob("*.py"))}
    return {".".join(name.parts).removesuffix(".__init__"): file for name, file in files.items()}


def imports(name: str, file: Path, known: set[str]) -> set[str]:
    """Returns the package's modules that a file imports, also inside functions, but not under TYPE_CHECKING."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    folder = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if node in skipped or not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            full = ".".join([*base, alias.name])
            found.add(full if full in known else ".".join(base))
    return found - {"", name}


def upward(package: Path) -> list[str]:
    """Returns imports from a higher level or from another folder of the same level."""
    files, found = modules(package), []
    for name, file in files.items():
        room = name.split(".")[0]
        if file.name == "__init__.py" and name == "__init__" or room in MOVED:
            continue
        for target in imports(name, file, set(files)):
            there = target.split(".")[0]
            if there not in MOVED and there != room and LEVEL_OF[there] >= LEVEL_OF[room]:
                found.append(f"{name} -> {target}")
    return found


def circles(package: Path) -> list[str]:
    """Returns circles of imports."""
    files = modules(package)
    graph = {name: imports(name, file, set(files)) & set(files) for name, file in files.items() if name != "__init__"}

    def reaches(start: str) -> bool:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name == start:
                return True
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, ())
        return False

    return [name for name in graph if reaches(name)]


def test_no_import_points_upwards_and_none_goes_in_a_circle():
    assert upward(PACKAGE) == []
    assert circles(PACKAGE) == []


def test_a_planted_import_is_found(tmp_path):
    for name, text in {
        "checks.py": "def f():\n    from .lora.loader import load_lora\n",
        "lora/__init__.py": "",
        "lora/loader.py": "from ..rewrite import rewriter\nfrom . import deltas\n",
        "lora/deltas.py": "from .loader import load_lora\n",
        "rewrite/__init__.py": "",
        "rewrite/rewriter.py": "from ..checks import f\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(tmp_path) == ["checks -> lora.loader", "lora.loader -> rewrite.rewriter"]
    assert circles(tmp_path) == ["checks", "lora.deltas", "lora.loader", "rewrite.rewriter"]


def test_few_modules_stand_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


@pytest.mark.parametrize("name", modules(PACKAGE))
def test_files_and_functions_are_short(name):
    text = modules(PACKAGE)[name].read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # Signature and docstring do not count.
            documented = ast.get_docstring(node) is not None and len(node.body) > 1
            body = node.body[1:] if documented else node.body
            assert node.end_lineno - body[0].lineno + 1 <= 60, f"{name}.{node.name}"


def test_modules_that_moved_are_found_where_they_were():
    from diffusers_fvg import decoding, profiles, transformer_anchor
    from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
    from diffusers_fvg.pipelines.profiles import WAN_VAES

    assert transformer_anchor.AnchorConditionedTransformer3D is AnchorConditionedTransformer3D
    assert profiles.WAN_VAES is WAN_VAES and decoding.decode_frames is diffusers_fvg.decode_frames

"""Who may import whom: every arrow of the design, read from the source with ast."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "agfsync_jax"
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
ENTRANCES = {"cli", "__main__", "__init__"}
VERBS = {path.stem for path in PACKAGE.glob("*.py")} - ENTRANCES
FILES = sorted(PACKAGE.rglob("*.py"))

# A room -> the rooms that its files may import besides their own.
ARROWS = {
    "evaluation": {
        *("prompt_sources", "scoring", "evaluators"),
        *("backbones", "diffusion", "data", "parallel", "utils"),
    },
    "evaluators": {"data", "utils"},
    "scoring": {"scorers", "data", "parallel", "utils"},
    "scorers": {"models", "texts", "weights", "data", "parallel", "utils"},
    "texts": {"models", "weights", "data", "parallel", "utils"},
    "backbones": {"models", "diffusion", "samplers", "weights", "data", "parallel", "utils"},
    "prompt_sources": {"micro", "llm", "texts", "data", "parallel", "utils"},
    "llm": {"data", "utils"},
    "models": set(),
    "samplers": {"diffusion", "utils"},
    "diffusion": set(),
    "losses": set(),
    "training": set(
        "losses diffusion models data backbones scoring evaluation parallel utils".split()
    ),
    # A checkpoint's folder holds its tokenizer and how its images are made, which are data's.
    "weights": {"models", "data", "parallel", "utils"},
    "steps": {"parallel", "utils"},
    "reports": {"data", "utils"},
    "data": {"parallel", "utils"},
    "parallel": set(),
    "utils": set(),
    "micro": ROOMS,  # its trainers are programs, like verbs
    "benches": ROOMS,  # parts of a verb, as the next
    "plans": ROOMS,
}
# A file -> what it alone may import besides.
ALSO = {
    "evaluators/referee.py": {"micro"},  # the judge of that world
    "diffusion/generation.py": {"parallel"},  # batches are split over a mesh
}
# The micro world: each file builds on those before it, and on nothing else.
WORLD = ("grammar", "scenes", "drawing", "questions", "referee")
# A file -> all that it may import of the package.
ONLY = {f"micro/{name}.py": {"micro"} for name in WORLD}
# Files of a room that may be imported by their neighbors there; elsewhere all may.
# A BLIP-2 contains a T5, an encoder as CLIP's and blocks as BERT's.
SHARED = {"models": {"hooks", "layers", "lora", "attention", "bert", "clip", "t5"}}
# A room -> the only libraries that it may import.
LIBRARIES = {
    "losses": {"jax", "jaxtyping"},
    "diffusion": {"jax", "jaxtyping", "numpy"},
    "samplers": {"jax", "jaxtyping", "numpy"},
    **{f"micro/{name}.py": {"numpy"} for name in WORLD},
    "models": {"jax", "jaxtyping", "numpy", "flax"},
}
# What only the extra [torch] installs: where it may be used, inside functions.
TORCH = {"torch", "diffusers", "accelerate", "peft"}
OPTIONAL = {"wandb": "wandb", "openai": "LLM", "json_repair": "LLM"}  # library -> its extra
TORCH_USERS = {
    "weights/tensor_files.py": {"torch"},  # pickles
    "benches/_peers.py": TORCH,  # bench --against
    "export.py": TORCH,  # --verify
}


class Import(NamedTuple):
    line: int
    name: str  # dotted, such as agfsync_jax.data.records
    inside: bool  # inside a function


def imports(path: Path) -> list[Import]:
    """All that a file imports; `from a import b` is a.b, which may be a module or a name."""
    found = []

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                found.extend(
                    Import(child.lineno, f"{child.module}.{alias.name}", inside)
                    for alias in child.names
                )
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, inside or function)

    visit(ast.parse(path.read_text()), False)
    return found


def _ours(path: Path) -> list[tuple[Import, str, str]]:
    """(import, part of the package, what of it) for each import from the package."""
    ours = [found for found in imports(path) if found.name.split(".")[0] == "agfsync_jax"]
    parts = [(found, *(found.name.split(".") + ["", ""])[1:3]) for found in ours]
    # `from agfsync_jax import __version__` is a name, not a module
    return [(found, part, what) for found, part, what in parts if part != "__version__"]


def _libraries(path: Path) -> list[tuple[Import, str]]:
    found = [(item, item.name.split(".")[0]) for item in imports(path)]
    ours = {"agfsync_jax", "configs"} | sys.stdlib_module_names
    return [(item, library) for item, library in found if library not in ours]


def _id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_room_has_its_arrows():
    assert set(ARROWS) == ROOMS


def test_every_room_is_a_package():
    missing = [folder for folder in ROOMS if not (PACKAGE / folder / "__init__.py").exists()]
    assert not missing, f"setup.py would leave out {missing}"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_arrows(path):
    name = _id(path)
    room = name.split("/")[0] if "/" in name else None
    if room:
        allowed = ONLY.get(name, ARROWS[room] | {room} | ALSO.get(name, set()))
    elif path.stem in {"run", "sweep", "cli", "rehearsal"}:
        allowed = ROOMS | VERBS
    elif path.stem == "__main__":
        allowed = {"cli"}
    else:
        allowed = ROOMS
    for found, part, what in _ours(path):
        place = f"agfsync_jax/{name}:{found.line} imports {found.name}"
        assert part in allowed, f"{place}; it may import {sorted(allowed)}"
        if name in ONLY:
            before = WORLD[: WORLD.index(path.stem)]
            assert what in before, f"{place}; of the world it may import {before}"
        if part == room and part in SHARED:
            own = SHARED[part] | {""}
            assert what in own, f"{place}; of its own room it may import {SHARED[part]}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=_id)
def test_models_know_nothing_of_where_they_run(path):
    """That is the business of parallel/, which hands it in through models/hooks.py."""
    found = re.findall(r"(?i)\w*(?:mesh|shard|partitionspec|device)\w*", path.read_text())
    assert not found, f"agfsync_jax/{_id(path)} speaks of {found}"


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_libraries(path):
    name = _id(path)
    room = name.split("/")[0]
    for found, library in _libraries(path):
        place = f"agfsync_jax/{name}:{found.line} imports {found.name}"
        if library in TORCH:
            wanted = library in TORCH_USERS.get(name, ()) and found.inside
            assert wanted, f"{place}; only tests may, and functions of {', '.join(TORCH_USERS)}"
        assert library != "configs", f"{place}; a config is an argument"
        if library in {"tensorflow", "tensorflow_datasets"}:
            wanted = room == "data" or name == "weights/saved_models.py"
            assert wanted and found.inside, f"{place}; only in functions of data/"
        if library == "transformers":
            assert found.inside, f"{place}; only inside functions, it takes long"
        allowed = LIBRARIES.get(name, LIBRARIES.get(room))
        assert allowed is None or library in allowed, f"{place}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_import_only_their_common_part(path):
    """Or the experiment that they vary: micro_losses.py that of micro.py."""
    varied = {f"configs.{path.stem.partition('_')[0]}"} if "_" in path.stem.strip("_") else set()
    for found in imports(path):
        library = found.name.split(".")[0]
        allowed = library in sys.stdlib_module_names or library == "ml_collections"
        assert allowed or found.name in varied | {"configs.common"}, (
            f"configs/{path.name} imports {found}"
        )


def test_every_library_is_in_setup():
    """What the package imports must be installed with it, and not by chance."""
    setup = (ROOT / "setup.py").read_text()
    required = setup[setup.index("install_requires") : setup.index("extras_require")]
    listed = {
        re.match(r"[\w-]+", text)[0].lower().replace("-", "_")
        for text in re.findall(r'"([\w-][^"]*)"', required)
    }
    listed |= {"tensorflow_cpu", "jaxlib", "protobuf"}  # by marker; of jax; of tensorflow
    extras = setup[setup.index("extras_require") :]
    distributions = packages_distributions()
    for path in FILES:
        for found, library in _libraries(path):
            top = "google.protobuf" if found.name.startswith("google.protobuf") else library
            names = (
                {"protobuf"} if top == "google.protobuf" else set(distributions.get(library, ()))
            )
            names = {name.lower().replace("-", "_") for name in names}
            if library in TORCH or (library in OPTIONAL and OPTIONAL[library] in extras):
                continue
            assert names & listed, f"{_id(path)}:{found.line} imports {found.name}: in no setup.py"


def test_every_data_file_is_in_setup():
    """What the package reads must be installed with it."""
    setup = (ROOT / "setup.py").read_text()
    listed = setup[setup.index("package_data={") : setup.index("entry_points")]
    known = {
        path
        for name, pattern in re.findall(r'"agfsync_jax\.(\w+)": \["(.+?)"\]', listed)
        for path in (PACKAGE / name).glob(pattern)
    }
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".py"}
    missing = {path for path in data - known if "__pycache__" not in path.parts}
    assert not missing, f"setup.py would leave out {missing}"


def test_a_forbidden_import_is_seen(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("import os\ndef f():\n    from agfsync_jax.data import records, images\n")
    assert imports(path) == [
        Import(1, "os", False),
        Import(3, "agfsync_jax.data.records", True),
        Import(3, "agfsync_jax.data.images", True),
    ]

"""The law of imports (docs/architecture.md): a module imports from its own room and from rooms of lower layers; no
circles, no over-full room; heavy libraries are imported where they are used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from _root import ROOT

LAWS: dict[str, tuple[int, set[str]]] = {
    # room: (layer, third-party packages it may import)
    "__init__": (0, set()),
    "errors": (0, set()),
    "files": (0, set()),
    "libraries": (0, set()),
    "sampling": (0, set()),
    "shortage": (0, set()),
    "types": (0, {"torch"}),
    "schema": (0, {"pydantic"}),
    "config": (0, {"pydantic", "tomli_w"}),
    "preset_files": (0, {"torch"}),
    "prompts": (0, set()),
    "texts": (0, {"pydantic_core"}),
    "ops": (1, {"torch"}),
    "terminal": (1, {"rich"}),
    "method": (2, {"torch"}),
    "questions": (2, set()),
    "video": (3, {"torch", "av", "PIL", "numpy"}),
    "memory": (3, {"torch", "psutil"}),
    "models": (
        4,
        {"torch", "diffusers", "transformers", "peft", "bitsandbytes", "safetensors", "huggingface_hub", "psutil"}
        | {"gguf", "xformers", "flash_attn", "lion_pytorch", "prodigyopt"},
    ),
    "toy": (5, {"torch", "safetensors"}),
    "distributed": (5, {"torch", "deepspeed"}),
    "assembly": (6, {"torch", "safetensors", "rich"}),
    "scoring": (7, {"torch", "rich", "PIL", "av", "numpy", "pydantic"}),
    "training": (8, {"torch", "safetensors", "rich", "tensorboard", "wandb", "trackio"}),
    "export": (8, {"torch", "safetensors"}),
    "planner": (9, {"torch", "rich"}),
    "reporting": (9, {"torch", "rich", "av", "jinja2", "markupsafe", "matplotlib"}),
    "shared": (10, {"torch"}),
    "doctor": (10, {"torch", "triton", "bitsandbytes", "huggingface_hub"}),
    "commands": (11, {"torch", "rich"}),
    "api": (12, set()),
    "cli": (12, {"typer"}),
    "__main__": (13, set()),
}
PROGRAMS = "toy/build"
"""How ToyWorld's models were trained and what they are worth: may import anything, and nothing imports it."""
FULL = 14
"""Files of a room, besides ``__init__.py``."""
LIGHT = {
    *("__init__", "errors", "files", "libraries", "sampling", "shortage", "schema", "config", "preset_files"),
    *("prompts", "texts"),
    *("cli", "api"),
}
"""Rooms that import no third-party package but pydantic and typer when they are imported."""
LAZY = {
    *(
        "diffusers",
        "transformers",
        "peft",
        "bitsandbytes",
        "deepspeed",
        "xformers",
        "flash_attn",
        "triton",
        "tensorboard",
        "wandb",
        "lion_pytorch",
        "prodigyopt",
        "trackio",
        "av",
        "PIL",
        "safetensors",
        "gguf",
    ),
    *("huggingface_hub", "tomli_w", "jinja2", "markupsafe", "matplotlib"),
}
"""Packages that are imported inside functions only."""


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package, kernels left out: they have a law of their own."""
    package = ROOT / "lowmem_drf"
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}
    return {
        name.removesuffix(".__init__") if name != "lowmem_drf.__init__" else name: path for name, path in found.items()
    } | {"lowmem_drf.cli": ROOT / "cli.py"}


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    """Dotted names that a module imports, without those under TYPE_CHECKING. ``from a import b`` gives ``a.b``."""
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                names.extend(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                names.extend(f"{child.module}.{alias.name}" for alias in child.names)
            elif not (top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def room_of(module: str) -> str:
    """The room of a dotted name inside the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAWS else "__init__"


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, lazily or not."""
    known = modules()

    def module_of(name: str) -> str | None:
        while name not in known and "." in name:
            name = name.rpartition(".")[0]
        return name if name in known else None

    return {
        name: {other for imported in imports(path) if (other := module_of(imported)) and other != name}
        for name, path in known.items()
    }


def is_program(path: Path) -> bool:
    return ROOT / "lowmem_drf" / PROGRAMS in path.parents


def violations() -> Iterator[str]:
    """What breaks the law, in words."""
    for module, path in modules().items():
        room = room_of(module)
        layer, packages = LAWS[room]
        for name in () if is_program(path) else imports(path):
            top = name.split(".")[0]
            if top == "lowmem_drf":
                other = room_of(name)
                top_layer = 2 if room == "toy" else layer - 1
                if other != room and LAWS[other][0] > top_layer and not (layer == 0 and LAWS[other][0] == 0):
                    yield f"{module} (layer {layer}) imports {name} (layer {LAWS[other][0]})"
                if name.startswith("lowmem_drf." + PROGRAMS.replace("/", ".")):
                    yield f"{module} imports a program of ToyWorld's: {name}"
            elif top not in sys.stdlib_module_names and top not in packages:
                yield f"{module} imports {name}"


def circles() -> Iterator[list[str]]:
    """Every circle of imports that a depth-first walk meets, also through imports inside functions."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> Iterator[list[str]]:
        if module in way:
            yield [*way[way.index(module) :], module]
        elif module not in done:
            for other in sorted(graph()[module]):
                yield from walk(other, [*way, module])
            done.add(module)

    for module in graph():
        yield from walk(module, [])


def test_the_law_is_read_from_real_modules():
    rooms = {room_of(module) for module in modules()}
    assert rooms == set(LAWS), f"without a law: {rooms - set(LAWS)}; without a module: {set(LAWS) - rooms}"
    assert len(modules()) > 100 and sum(map(len, graph().values())) > 300


def test_a_module_imports_only_what_its_layer_may():
    assert not list(violations())


def test_there_are_no_circles():
    assert not [" -> ".join(circle) for circle in circles()]


def test_no_room_is_over_full():
    for top in ("lowmem_drf", "tests", "bench", "kernels"):
        for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]:
            files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= FULL, f"{folder.relative_to(ROOT)} has {len(files)} files: {files}"


def test_a_room_says_what_it_is_for_and_what_is_not_in_it():
    folders = {path.parent for path in modules().values()} - {ROOT, ROOT / "lowmem_drf"}
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert "Not here:" in text, folder


def test_heavy_libraries_are_imported_where_they_are_used():
    for module, path in modules().items():
        top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        if not is_program(path):
            assert not top & LAZY, module
        if room_of(module) in LIGHT:
            assert not {name for name in top if name not in sys.stdlib_module_names} - {
                "pydantic",
                "typer",
                "lowmem_drf",
            }, module


def test_commands_are_imported_by_the_command_line_and_the_python_api_alone():
    users = {
        room_of(module) for module, others in graph().items() if any(room_of(other) == "commands" for other in others)
    }
    assert users <= {"cli", "api", "commands"}
    assert not [
        module
        for module, others in graph().items()
        if room_of(module) == "commands" and any(room_of(o) == "commands" for o in others - {"lowmem_drf.commands"})
    ]


def test_kernels_know_nothing_of_the_package_and_shadow_no_one():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").rglob("*.py"):
        others = [
            name
            for name in imports(path)
            if name.startswith("lowmem_drf") and not name.startswith("lowmem_drf.kernels.")
        ]
        assert not others, path


def test_ops_is_the_only_door_to_kernels():
    users = {
        room_of(module)
        for module, path in modules().items()
        if any(name.startswith("lowmem_drf.kernels") for name in imports(path))
    }
    assert users == {"ops"}


def test_the_reader_sees_every_form_of_import(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport a.b\nif TYPE_CHECKING:\n    import hidden\n"
        "def f():\n    from c import d\n    from lowmem_drf import cli\nclass K:\n    import e\n"
    )
    assert set(imports(file)) == {"typing.TYPE_CHECKING", "a.b", "c.d", "lowmem_drf.cli", "e"}
    assert set(imports(file, top_level_only=True)) == {"typing.TYPE_CHECKING", "a.b", "e"}
    assert (room_of("lowmem_drf.training.loop.train"), room_of("lowmem_drf.__version__")) == ("training", "__init__")


def test_light_modules_load_no_torch_and_optional_libraries_are_not_needed():
    names = ("api", "cli", "config", "prompts", "errors", "types")
    light = [f"lowmem_drf.{name}" for name in names]
    heavy = {"torch", "diffusers", "transformers", "numpy"}
    programs = [f"import sys, {', '.join(light)}\nprint(sorted({heavy} & set(sys.modules)))"]
    optional = ("triton", "bitsandbytes", "deepspeed", "xformers", "kernels", "torchvision")
    rooms = (
        "commands.train",
        "training.loop",
        "scoring.evaluate",
        "export.export",
        "commands.sample",
        "commands.inspect_lora",
    )
    imports = "\n".join(f"import lowmem_drf.{room}" for room in rooms)
    programs.append(f"import sys\nsys.modules |= dict.fromkeys({optional})\n{imports}\nprint([])")
    for program in programs:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "[]", done.stderr

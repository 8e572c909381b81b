"""The law of imports: each room imports from its own list and from the layers above it; heavy libraries are lazy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from _root import ROOT

ROOMS = {
    # room: (layer, third-party packages it may import)
    "__init__": (0, set()),
    "__main__": (6, set()),
    "errors": (0, set()),
    "types": (0, {"torch"}),
    "schema": (0, {"pydantic"}),
    "config": (0, {"pydantic"}),
    "prompts": (0, set()),
    "ops": (1, {"torch"}),
    "method": (2, {"torch"}),
    "memory": (3, {"torch", "deepspeed"}),
    "models": (4, {"torch", "diffusers", "transformers", "peft", "bitsandbytes", "safetensors", "huggingface_hub"}),
    "run": (5, {"torch", "safetensors", "rich", "av", "PIL", "numpy"}),
    "toy": (5, {"torch", "diffusers", "transformers", "peft", "tokenizers", "safetensors", "matplotlib", "av", "PIL", "numpy"}),
    "cli": (6, {"typer"}),
}
LIGHT = {"errors", "schema", "config", "prompts", "cli", "__init__"}
"""Rooms that import no third-party package but pydantic and typer when they are imported."""
HEAVY = {"diffusers", "transformers", "peft", "bitsandbytes", "deepspeed", "xformers", "triton", "tensorboard", "av", "PIL", "safetensors", "huggingface_hub"}

TOY = ROOT / "lowmem_drf" / "toy"


def is_program(path):
    """What builds and measures ToyWorld (``python -m``): nothing of the product imports it."""
    return TOY / "build" in path.parents or path == TOY / "check.py"


def sources():
    """(room, path) of every module; kernels/ has a law of its own."""
    package = ROOT / "lowmem_drf"
    found = [(path.relative_to(package).parts[0].removesuffix(".py"), path) for path in sorted(package.rglob("*.py"))]
    return [*found, ("cli", ROOT / "cli.py")]


def imports(path, top_level_only=False):
    """Dotted names that a module imports, without those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = []

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                names.extend(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                names.extend(f"{child.module}.{alias.name}" if child.module == "lowmem_drf" else child.module for alias in child.names)
            elif not (top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
                visit(child)

    visit(tree)
    return names


def room_of(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


def test_the_law_is_read_from_real_modules():
    rooms = {room for room, _ in sources()}
    assert rooms <= set(ROOMS), f"a room without a law: {rooms - set(ROOMS)}"
    assert {"errors", "types", "config", "prompts", "method", "memory", "models", "run", "toy", "cli"} <= rooms
    assert sum(len(imports(path)) for _, path in sources()) > 200


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else value)
def test_a_module_imports_only_what_its_layer_may(room, path):
    layer, third_party = ROOMS[room]
    for name in imports(path):
        top = name.split(".")[0]
        if top == "lowmem_drf":
            other = room_of(name)
            assert other == room or ROOMS[other][0] <= layer, f"{room} (layer {layer}) imports {name} (layer {ROOMS[other][0]})"
            assert not (room == "toy" and other == "run"), f"toy imports {name}"
        else:
            assert top in sys.stdlib_module_names or top in third_party, f"{room} imports {name}"


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else value)
def test_heavy_libraries_are_imported_where_they_are_used(room, path):
    if is_program(path):  # and no import of it slows anything: see the next test
        return
    top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert not top & HEAVY
    if room in LIGHT:
        assert not {name for name in top if name not in sys.stdlib_module_names} - {"pydantic", "typer", "lowmem_drf"}


def test_nothing_of_the_product_imports_the_programs_of_toyworld():
    product = [path for _, path in sources() if not is_program(path)]
    assert len(product) > 30
    assert not [path for path in product for name in imports(path) if name.startswith(("lowmem_drf.toy.build", "lowmem_drf.toy.build.check"))]


def test_kernels_know_nothing_of_the_package_and_shadow_no_one():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").rglob("*.py"):
        others = [name for name in imports(path) if name.startswith("lowmem_drf") and not name.startswith("lowmem_drf.kernels.")]
        assert not others, path


def test_ops_is_the_only_door_to_kernels():
    assert {room for room, path in sources() if any(name.startswith("lowmem_drf.kernels") for name in imports(path))} == {"ops"}


def test_the_reader_sees_every_form_of_import(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport a.b\nif TYPE_CHECKING:\n    import hidden\n"
        "def f():\n    from c import d\n    from lowmem_drf import cli\nclass K:\n    import e\n"
    )
    assert set(imports(file)) == {"typing", "a.b", "c", "lowmem_drf.cli", "e"}
    assert set(imports(file, top_level_only=True)) == {"typing", "a.b", "e"}
    assert room_of("lowmem_drf.training.loop") == "run"


@pytest.mark.parametrize("module", ["lowmem_drf.cli", "lowmem_drf.config", "lowmem_drf.prompts", "lowmem_drf.errors", "lowmem_drf.types"])
def test_light_modules_load_no_torch_in_a_fresh_process(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'transformers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_optional_libraries_are_not_needed():
    blocked = "for name in ('triton', 'bitsandbytes', 'deepspeed', 'xformers', 'kernels', 'torchvision'): sys.modules[name] = None"
    code = f"import sys\n{blocked}\nimport lowmem_drf.commands.train, lowmem_drf.training.loop, lowmem_drf.scoring.evaluate, lowmem_drf.export.export"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr

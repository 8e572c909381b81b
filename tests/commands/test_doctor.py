"""``lowmem-drf doctor``, and what every command says of a package that cannot be imported."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from _root import ROOT
from test_cli import run_cli  # noqa: F401

from lowmem_drf import libraries
from lowmem_drf.commands import doctor
from lowmem_drf.doctor import card, imports, machine
from lowmem_drf.doctor.checks import Check, failed, looked_at
from lowmem_drf.errors import LowmemError, explain
from lowmem_drf.libraries import Package
from lowmem_drf.models.weights import downloads

GIB = 1024**3


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Installs a package that raises at import; returns a function (name, source) for others."""

    def make(name="brokenlib", source="raise RuntimeError('undefined symbol: cudaFoo')"):
        folder = tmp_path / "broken" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source, encoding="utf-8")
        return folder.parent

    monkeypatch.syspath_prepend(make())
    yield make
    sys.modules.pop("brokenlib", None)


def doctor_process(folder, *more):
    """(exit code, checks) of the command in a process that finds the packages of ``folder`` first."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "lowmem_drf", "doctor", *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os; os.abort()", "ended the process"),
        ("import sys; sys.exit('no')", "SystemExit"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_named_and_everything_else_is_looked_at(source, said, broken):
    code, out, _ = doctor_process(broken("torch", source), "--json")
    answer = json.loads(out)
    checks = {check["name"]: check for check in answer["checks"]}
    assert (code, answer["ok"], checks["torch"]["status"]) == (1, False, "failure")
    assert said in checks["torch"]["detail"]
    assert "pip install --force-reinstall" in checks["torch"]["cure"] and "torch>=" in checks["torch"]["cure"]
    assert {"Python", "packages", "driver", "host memory", "model cache", "presets"} <= checks.keys()
    assert len(answer["checks"]) == len(checks), "a broken package is named once"


@pytest.mark.parametrize("name", ["typer", "pydantic"])
def test_what_the_command_line_itself_needs_is_named_too(name, broken):
    code, _, err = doctor_process(broken(name, "raise RuntimeError('broken')"))
    assert code == 1
    assert err.startswith(f"Error: {name} cannot be imported") and "pip install" in err
    assert len(err.splitlines()) <= 6


def test_without_rich_the_answer_is_plain_text(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    doctor.show([Check("card", "failure", "is too old", "Take another.")], full=False)
    assert capsys.readouterr().out == "failure  card: is too old\n         -> Take another.\n"


def test_without_torch_nothing_is_imported_and_the_command_that_installs_it_is_said(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    monkeypatch.setattr(doctor, "Child", None)
    checks = {check.name: check for check in doctor.look(full=False)}
    assert (checks["torch"].status, checks["torch"].detail) == ("failure", "is not installed")
    assert "imports" not in checks and "presets" in checks


def test_doctor_imports_each_package_and_names_the_broken_one(broken, monkeypatch):
    packages = [Package("brokenlib", ">=1.2", False), Package("rich", "", False), Package("nothere", "", True)]
    monkeypatch.setattr(imports, "requirements", lambda: ("", packages))
    found = list(imports.imported())
    assert [(check.name, check.status) for check in found] == [("brokenlib", "failure"), ("imports", "ok")]
    assert "undefined symbol" in found[0].detail and 'pip install "brokenlib' in found[0].cure
    assert found[1].detail == "1 packages can be imported"


def test_train_names_a_broken_package_before_any_work(broken, run_cli, monkeypatch, tmp_path):  # noqa: F811
    needed = [Package("brokenlib", ">=1.2,<2", False)]
    monkeypatch.setattr(libraries, "requirements", lambda: (">=3.11", needed))
    code, out, err = run_cli("train --preset toy --steps 1")
    assert (code, out) == (1, "")
    assert err.splitlines() == [
        "Error: brokenlib cannot be imported (RuntimeError: undefined symbol: cudaFoo).",
        'Mend it with: pip install "brokenlib>=1.2,<2"',
        "Then see what else is wrong: lowmem-drf doctor",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_run_without_a_library_that_it_does_not_need_goes_on(monkeypatch):
    monkeypatch.setattr(libraries, "requirements", lambda: ("", [Package("bitsandbytes", "", False)]))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(WanTransformer3DModel=None))
    for inner in ("models", "models.transformers"):  # whether or not an earlier test imported it
        monkeypatch.setitem(sys.modules, f"diffusers.{inner}", SimpleNamespace())
    libraries.import_all()


def caught(code):
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "lowmem_drf.test"})
    except Exception as error:
        return error


LAZY = """
try:
    import brokenlib
except Exception as error:
    raise RuntimeError("Failed to import (look up to see its traceback)") from error
"""


def test_the_first_cause_of_a_chain_is_named_and_what_is_no_import_is_not(broken):
    assert explain(caught(LAZY))[0].startswith("brokenlib cannot be imported (RuntimeError: undefined symbol")
    assert explain(caught("import nosuchlib"))[0].startswith("nosuchlib is not installed.")
    broken("halflib", "from json import nosuchname")
    assert explain(caught("import halflib"))[0].startswith("halflib cannot be imported (ImportError: cannot import")
    broken("damaged", "\0\0\0")
    assert libraries.broken(caught("1 / 0")) is None
    assert libraries.broken(caught("open('/nowhere/at/all')")) is None


def test_versions_are_compared_with_the_ranges_of_pyproject():
    torch = Package("torch", ">=2.11,<2.14", False)
    assert [torch.accepts(version) for version in ("2.11.0", "2.13.0+cu130", "2.9.1", "2.14.0", "2.14.0.dev1")] == [
        *(True, True, False, False, False)
    ]
    lines = ["deepspeed<0.20,>=0.19.4; extra == 'deepspeed'", "triton>=3; sys_platform == 'amiga'", "pillow>=11"]
    assert list(libraries._here(lines)) == [
        Package("deepspeed", "<0.20,>=0.19.4", True),
        Package("pillow", ">=11", False),
    ]
    assert Package("pillow", "", False).module == "PIL"
    python, packages = libraries.requirements()
    assert python == ">=3.11,<3.14" and {"torch", "peft", "deepspeed"} <= {package.distribution for package in packages}
    assert "pytest" not in {package.distribution for package in packages}


def test_a_package_outside_its_range_is_a_failure(monkeypatch):
    monkeypatch.setattr(machine, "requirements", lambda: ("", [Package("rich", ">=99", False)]))
    wrong, _ = machine.packages()
    assert wrong.status == "failure" and ">=99 is needed" in wrong.detail and 'rich>=99"' in wrong.cure


@pytest.mark.parametrize(
    ("card_gib", "host_gib", "fit", "poor"),
    [
        (24, 200, "fit here: rtx4090 (train's default), rtx", ""),
        (24, 30, "fit here: rtx4090 (train's default)", "rtx4090-wan14b, rtx4090-wan22-5b"),
        (8, 4, "fit here: toy", "rtx4060"),
        (0, 200, "fit here: toy-fast (train's default), toy", ""),
    ],
)
def test_presets_that_fit_are_read_from_their_headers(card_gib, host_gib, fit, poor, monkeypatch):
    monkeypatch.setattr(downloads, "available_host_bytes", lambda: host_gib * GIB)
    said, *warned = machine.fitting("NVIDIA GeForce RTX 4090" if card_gib else "", card_gib * GIB)
    assert said.detail.startswith(fit) and "rtx5090" not in said.detail
    assert poor in "".join(check.detail for check in warned) and bool(warned) == bool(poor)


def test_memory_that_other_programs_hold_is_a_warning(monkeypatch):
    import torch

    properties = SimpleNamespace(name="RTX 4090", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (18 * GIB, 24 * GIB))
    _, memory = card._card()
    assert (memory.status, memory.detail) == ("warning", "18.0 of 24.0 GiB free now; presets count on 22.4")


@pytest.fixture
def slow_cudnn(monkeypatch):
    """PyTorch finds cuDNN 9.10, which is not its own, and does not use it for conv3d."""
    import torch

    def version():
        raise RuntimeError(
            "cuDNN version incompatibility: compiled against (9, 19, 0) but found runtime version (9, 10, 2)."
        )

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    monkeypatch.setattr("lowmem_drf.assembly.cudnn.conv3d_backend", lambda: "SlowDilated3d")
    monkeypatch.setattr(card, "_on_card", lambda *shape: torch.ones(shape))


def test_a_run_does_not_begin_with_a_vae_outside_of_cudnn(slow_cudnn):
    import torch

    from lowmem_drf.assembly.cudnn import require_fast_vae
    from lowmem_drf.config import load_config

    config, cuda = load_config("rtx4090"), torch.device("cuda")
    with pytest.raises(LowmemError) as refused:
        require_fast_vae(config, cuda)
    first, cure, *_ = str(refused.value).splitlines()
    assert first.startswith("cuDNN 9.10.2 is not used for conv3d in bf16")
    assert '>=9.15"' in cure and "LD_LIBRARY_PATH" in cure and "pip install" in cure
    require_fast_vae(config, torch.device("cpu"))
    require_fast_vae(load_config("rtx4090", ["memory.vae_dtype=fp32", "memory.vae_grad_dtype=fp32"]), cuda)
    (found,) = card.cudnn()
    assert (found.status, found.cure) == ("failure", cure.removeprefix("Mend it with: "))
    assert found.detail.startswith("9.10.2; bf16 conv3d runs without it (SlowDilated3d)")


def test_a_cudnn_that_is_used_is_said_with_its_version(slow_cudnn, monkeypatch):
    import torch

    from lowmem_drf.assembly import cudnn

    monkeypatch.setattr(cudnn, "conv3d_backend", lambda: "Cudnn")
    cudnn.require_fast_conv3d()
    assert [(check.status, check.detail[:8]) for check in card.cudnn()] == [("warning", "9.10.2; ")]
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert [check[:3] for check in card.cudnn()] == [("cuDNN", "ok", "9.19.0; bf16 conv3d uses it")]


def test_what_a_check_raises_is_its_failure():
    def look():
        yield Check("a", "ok", "well")
        raise ValueError("no card\nand more")

    assert list(looked_at("b", look)) == [Check("a", "ok", "well"), failed("b", ValueError("no card"))]


def test_a_model_folder_that_is_not_complete_is_not_here(tmp_path):
    assert downloads.cached(str(tmp_path), "critic") == "config.json is missing"
    assert downloads.cached("nobody/nothing", "critic") == "missing"
    assert downloads.cached("nobody/nothing/lora.safetensors", "file") == "missing"
    assert downloads.cached("toyworld", "critic") == "here"

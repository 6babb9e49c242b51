"""The floors: imports go down only, and importing the package costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "axo_flash"
# from the ground up; a module may import what stands on a lower floor, or beside it in its own package
FLOORS = [
    ["errors", "metrics", "kernels.spec", "kernels.dropout", "paged", "mounts", "mount_worker"],
    ["arguments", "kernels.reference", "kernels.triton", "kernels.hopper", "mount_helper"],
    ["kernels.backends", "mount_io"],
    ["ops", "varlen"],
    ["layout", "peers", "packed"],
    ["attention", "flash_attn_compat"],
    ["patch", "hf"],
    ["config"],
    ["data"],
    ["bench", "demo", "sampling", "report"],
    ["callbacks", "checkpoints"],
    ["model"],
    ["trainer"],
    ["train", "check", "doctor"],
    ["cli"],
    ["__main__", "integrations"],
]
LIBRARY = (
    "arguments",
    "kernels",
    "ops",
    "varlen",
    "layout",
    "packed",
    "paged",
    "attention",
    "patch",
    "hf",
    "flash_attn_compat",
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = (
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")
        )
        if name:
            yield name, path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.removeprefix("axo_flash.") for name in names if name.startswith("axo_flash."))


def floor(name):
    """(number, room) of the longest entry of FLOORS that `name` lies under."""
    rooms = [
        (len(room), i, room)
        for i, row in enumerate(FLOORS)
        for room in row
        if name == room or name.startswith(room + ".")
    ]
    return max(rooms)[1:] if rooms else None


MODULES = dict(modules())


@pytest.mark.parametrize("name", [n for n in MODULES if n != "kernels"])
def test_imports_go_down(name):
    here = floor(name)
    assert here is not None, f"{name} has no floor: give it one in this test and in the design"
    for other in set(imports(MODULES[name])):
        there = floor(other)
        if there is None:
            continue
        assert there[0] < here[0] or there[1] == here[1], f"{name} imports {other}, which does not lie below it"


def test_the_library_never_sees_the_trainer():
    for name, path in MODULES.items():
        if name.split(".")[0] in LIBRARY:
            above = {other for other in imports(path) if other.split(".")[0] not in (*LIBRARY, "__version__")}
            assert not above, f"{name} imports {above}"


def test_a_plugin_needs_the_library_alone():
    """Not the trainer's own dependencies (tenacity, pyyaml): the program that it plugs into has others."""
    for name, path in MODULES.items():
        if name.startswith("integrations"):
            assert {other.split(".")[0] for other in imports(path)} <= {*LIBRARY, "errors"}


def test_backends_do_not_import_one_another():
    for name, path in MODULES.items():
        if name.startswith("kernels.triton"):
            assert not any(other.startswith("kernels.reference") for other in imports(path))
    assert not any(other.startswith("kernels.triton") for other in imports(MODULES["kernels.reference"]))


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    """Under 20 ms of a core beyond torch's own, the best of five, and no heavy package."""
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import axo_flash
axo_flash.flash_attn_func
print(time.process_time() - start)
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    outputs = [run(code).splitlines() for _ in range(5)]
    assert min(float(lines[0]) for lines in outputs) < 0.020
    assert not {"transformers", "triton", "peft", "datasets", "yaml"} & set(outputs[0][1].split())


def test_config_loads_without_torch():
    loaded = run("import sys, axo_flash.config; print('torch' in sys.modules)")
    assert loaded.strip() == "False"

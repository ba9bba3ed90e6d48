"""The architecture as a test: BUILD says which floor may import which, the imports must agree."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
THIRD_PARTY = {
    "pallas_kernels": {"jax", "jaxlib", "numpy"},
    "errors": set(),
    "configs": set(),
    "fields": set(),
    "arguments": {"jax", "numpy"},
    "arrays": {"jax", "numpy", "ml_dtypes"},
    "transforms": {"jax", "numpy"},
    "formats": {"numpy", "ml_dtypes", "jax"},
    "ops": {"jax", "numpy"},
    "nn": {"jax", "numpy", "flax"},
    "models": {"jax", "numpy", "flax"},
}


def build_targets() -> dict[str, dict]:
    targets = {}
    for node in ast.parse((ROOT / "BUILD").read_text()).body:
        call = node.value
        assert call.func.id == "py_library"
        fields = {k.arg: k.value for k in call.keywords}
        name = ast.literal_eval(fields["name"])
        targets[name] = {
            "deps": {d[1:] for d in ast.literal_eval(fields["deps"])},
            "visibility": set(ast.literal_eval(fields["visibility"])),
        }
    return targets


TARGETS = build_targets()


def floor_of(module: str) -> str:
    """The target that owns a dotted module name of this project."""
    parts = module.split(".")
    if parts[0] == "pallas_kernels":
        return "pallas_kernels"
    return parts[1] if len(parts) > 1 and parts[1] in TARGETS else "api"


def sources(floor: str) -> list[Path]:
    files = [*ROOT.glob("jaxquant/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}
    return [f for f, name in names.items() if floor_of(name.removesuffix(".__init__")) == floor]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("floor", TARGETS)
def test_a_floor_imports_only_what_build_says(floor):
    files = sources(floor)
    assert files, f"no source belongs to {floor}"
    for file in files:
        for name in imports(file):
            top = name.split(".")[0]
            if top in ("jaxquant", "pallas_kernels"):
                target = floor_of(name)
                allowed = TARGETS[floor]["deps"] | {floor}
                assert target in allowed, f"{file} imports {name}: {floor} may not import {target}"
            elif floor in THIRD_PARTY and top not in sys.stdlib_module_names:
                assert top in THIRD_PARTY[floor], f"{file} imports {name}"


def test_visibility_mirrors_the_dependencies():
    for name, target in TARGETS.items():
        for dep in target["deps"]:
            visible = TARGETS[dep]["visibility"]
            assert f":{name}" in visible or "//visibility:public" in visible, (
                f"{dep} hides from {name}"
            )


def test_only_ops_reaches_the_kernels():
    users = {name for name, target in TARGETS.items() if "pallas_kernels" in target["deps"]}
    assert users == {"ops"}


def test_the_check_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import flax.nnx\nfrom jaxquant.nn import Linear\n")
    assert imports(bad) == {"flax.nnx", "jaxquant.nn.Linear"}
    assert floor_of("jaxquant.nn.Linear") not in TARGETS["arrays"]["deps"]

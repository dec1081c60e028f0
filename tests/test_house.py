"""The house rules, held by reading the source: which package may import which, how long a file may be, and so on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("minitfm", "chapters", "kernels")
LONGEST = 350  # lines of a file; about 300 is what to aim at
LONGEST_FUNCTION, LONGEST_KERNEL = 25, 45  # lines of code of a function, and of a Triton function
TEXT = (".py", ".md", ".toml", ".txt", ".json", ".html", ".ipynb", ".yml")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|opt|Users)/[\w.]")
BINDING = {path.stem for path in (ROOT / "chapters").glob("*.py")} | {"shared"}

# a chapter imports another one only where its method is built on it, and then names the function
BUILT_ON: dict[str, set[str]] = {
    "attention.flash_decoding": {
        f"chapters.attention.flash.{name}"
        for name in ("attention", "checked_scale", "finite", "group_heads", "tile_scores")
    },
    "attention.flash_variants": {
        f"chapters.attention.flash.{name}"
        for name in ("Shape", "absorb_tile", "checked_scale", "finite", "group_heads")
    },
    "attention.lsh": {"chapters.attention.flash_decoding.combine"},
    "attention.patterns": {
        f"chapters.attention.flash.{name}" for name in ("absorb_tile", "checked_scale", "group_heads")
    },
    "attention.linformer": {
        f"chapters.attention.flash.{name}" for name in ("attention", "checked_scale", "group_heads")
    },
    "course.project": {
        "chapters.quantization.gptq.quantize_model",
        *(f"chapters.quantization.weight_only.{name}" for name in ("Quantized", "nearest_codes")),
    },
    "distillation.divergences": {
        f"chapters.distillation.soft_targets.{name}" for name in ("require_temperature", "token_mean")
    },
    "moe.experts": {f"chapters.moe.routing.{name}" for name in ("Gate", "Routing")},
    "moe.task_routing": {f"chapters.moe.routing.{name}" for name in ("Gate", "route")},
    "moe.residual": {"chapters.moe.routing.Gate"},
    "moe.batch_priority": {
        *(f"chapters.moe.{name}" for name in ("routing", "routing.Renormalise", "routing.Routing")),
        *(f"chapters.moe.routing.{name}" for name in ("queued", "routed")),
    },
    "pruning.rewinding": {f"chapters.pruning.magnitude.{name}" for name in ("iterative_sparsities", "keep_largest")},
    "pruning.sparsegpt": {
        *(f"chapters.pruning.magnitude.{name}" for name in ("keep_largest", "prune_model")),
        *(f"chapters.pruning.wanda.{name}" for name in ("find_mask", "prune_model")),
        *(
            f"chapters.quantization.gptq.{name}"
            for name in ("checked_hessian", "find_grid", "hessians", "inverse_factor", "quantize", "stages")
        ),
        *(f"chapters.quantization.weight_only.{name}" for name in ("checked", "dequantize")),
        "chapters.sparsity.n_m.n_m_mask",
    },
    "pruning.wanda": {
        *(f"chapters.pruning.magnitude.{name}" for name in ("keep_largest", "prune_model", "row_mask")),
        "chapters.sparsity.n_m.n_m_mask",
    },
    "quantization.awq": {
        f"chapters.quantization.weight_only.{name}" for name in ("Quantized", "checked", "quantize_each")
    },
    "quantization.calibration": {"chapters.quantization.uniform.rounded"},
    "quantization.gobo": {"chapters.quantization.weight_only.checked"},
    "quantization.gptq": {
        f"chapters.quantization.weight_only.{name}" for name in ("Quantized", "checked", "dequantize", "quantize_each")
    },
    "quantization.lut_gemm": {
        "chapters.quantization.gptq.round_to_nearest",
        *(f"chapters.quantization.weight_only.{name}" for name in ("Quantized", "checked", "quantize_each")),
    },
    "quantization.mixed_precision": {"chapters.quantization.weight_only.nearest_codes"},
    "quantization.qat": {"chapters.quantization.uniform.round_weights"},
    "sparsity.sr_ste": {"chapters.sparsity.n_m.n_m_mask"},
    "sparsity.permutation": {f"chapters.sparsity.n_m.{name}" for name in ("magnitudes", "n_m_mask")},
    "sparsity.transposable": {
        f"chapters.sparsity.n_m.{name}"
        for name in ("SparseLinear", "compress", "magnitudes", "n_m_mask", "perplexities", "sparse_matmul")
    },
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Every module that a source imports, with whether it does so when it is itself imported (not in a function)."""
    tree = ast.parse(source)
    inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which floor they reach"
            yield from ((f"{node.module}.{alias.name}", id(node) not in inside) for alias in node.names)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def reached(path: Path, package: str) -> set[str]:
    """What the file imports from `package`, anywhere."""
    return {name for name, _ in imports(path.read_text(encoding="utf-8")) if name.split(".")[0] == package}


@pytest.mark.parametrize(
    ("floor", "above"), [("minitfm", ("chapters", "kernels")), ("kernels", ("minitfm", "chapters"))]
)
def test_the_ground_floor_imports_nothing_above_or_beside_it(floor, above):
    for path in modules(floor):
        for package in (*above, "tests", "notebooks"):
            assert not reached(path, package), f"{relative(path)} imports {package}"


def test_a_chapter_imports_its_kernel_only_inside_a_function():
    for path in modules("chapters"):
        for name, at_once in imports(path.read_text(encoding="utf-8")):
            assert not (at_once and name.split(".")[0] == "kernels"), f"{relative(path)} imports {name} at its top"


def test_no_chapter_imports_another_except_where_its_method_is_built_on_it():
    for path in modules("chapters"):
        own = ".".join(path.relative_to(ROOT / "chapters").with_suffix("").parts)
        if "." not in own or own.startswith("shared."):
            continue  # the binding, and what chapters share
        others = {name for name in reached(path, "chapters") if name.split(".")[1] not in BINDING}
        assert others <= BUILT_ON.get(own, set()), f"{relative(path)} imports {others}"


def test_nothing_imports_the_tests_or_the_notebooks():
    for package in PACKAGES:
        for path in modules(package):
            assert not reached(path, "tests") and not reached(path, "notebooks"), relative(path)


def test_the_reader_of_imports_sees_each_kind():
    source = "import a.b\nfrom c import d\ndef f():\n    from kernels.e import g\n"
    assert list(imports(source)) == [("a.b", True), ("c.d", True), ("kernels.e.g", False)]


@pytest.mark.parametrize("package", [*PACKAGES, "tests", "notebooks"])
def test_files_stay_short(package):
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules(package)}
    assert lengths and not {name: length for name, length in lengths.items() if length > LONGEST}


def long_functions(source: str) -> dict[str, int]:
    """The functions that are too long, with their lines of code: neither docstring, comments nor blank lines count."""
    lines = source.splitlines()
    found = {}
    for function in functions(ast.parse(source)):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        code = [line for line in lines[body[0].lineno - 1 : body[-1].end_lineno] if line.strip(" #")] if body else []
        count = sum(not line.lstrip().startswith("#") for line in code)
        jitted = any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        if count > (LONGEST_KERNEL if jitted else LONGEST_FUNCTION):
            found[function.name] = count
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_stay_short(package):
    found = {relative(path): long_functions(path.read_text(encoding="utf-8")) for path in modules(package)}
    assert not {name: functions for name, functions in found.items() if functions}


def test_a_long_function_is_recognised():
    body = "    x = 1\n" * LONGEST_FUNCTION
    assert long_functions("def f():\n" + body + "\n    # why\n") == {}
    assert long_functions("def f():\n" + body + "    return x\n") == {"f": LONGEST_FUNCTION + 1}
    assert long_functions("@triton.jit\ndef f():\n" + body + "    return x\n") == {}


def undocumented(source: str) -> list[str]:
    """The public functions and classes of a source that have no docstring, and the file itself if it has none."""
    tree = ast.parse(source)
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    silent = [node.name for node in defined if not node.name.startswith("_") and not ast.get_docstring(node)]
    return silent + (["the file"] if tree.body and not ast.get_docstring(tree) else [])


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_public_says_what_it_does(package):
    silent = {relative(path): undocumented(path.read_text(encoding="utf-8")) for path in modules(package)}
    assert not {name: missing for name, missing in silent.items() if missing}


def texts() -> list[Path]:
    """The project's own text files: what git would take, without the folders that it ignores."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for folder in (*PACKAGES, "tests", "notebooks", ".ci") for path in (ROOT / folder).rglob("*")]
    named = [path for path in top + below if path.suffix in TEXT or path.name in ("Makefile", "run", "LICENSE")]
    return [path for path in named if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]


def test_no_file_holds_a_path_of_one_machine():
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = None if '"image/png": "' in line else MACHINE_PATHS.search(line)  # its letters mean nothing
            assert not found, f"{relative(path)}:{number} holds {found[0]!r}"


def test_a_machine_path_is_recognised():
    assert MACHINE_PATHS.search("open('/" + "home/me/x')")
    assert not MACHINE_PATHS.search("chapters/home/x and a/" + "tmp/b")

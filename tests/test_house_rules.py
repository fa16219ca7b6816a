"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import evdit_opt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "evdit_opt"
CODE_FOLDERS = ("evdit_opt", "tests", "benchmarks")
SOURCES = sorted(path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(PACKAGE)]

MAX_LINES, MAX_TRITON_LINES = 400, 500
# Loaded only by who uses them: slow to import, or not installed, or they touch the GPU.
HEAVY = {
    "accelerate", "diffusers", "imageio", "matplotlib", "onnx", "onnxruntime", "peft",
    "safetensors", "torch_tensorrt", "torchmetrics", "transformers", "triton",
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def dotted(node: ast.AST) -> str:
    """``torch._inductor.config.x`` for such an expression, "" for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> full dotted name of everything imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def written_names(tree: ast.AST) -> Iterator[str]:
    """Full dotted names of everything assigned, deleted or set by ``setattr``."""
    known = aliases(tree)
    targets: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets += node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets.append(node.target)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr"):
            targets.append(ast.Attribute(value=node.args[0], attr="*"))
    for target in targets:
        first, _, rest = dotted(target).partition(".")
        yield f"{known.get(first, first)}.{rest}"


def is_global(name: str) -> bool:
    return name.startswith("torch.") and (".config." in name or ".backends." in name)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    triton = any(module.split(".")[0] == "triton" for module in imported_modules(tree_of(path)))
    limit = MAX_TRITON_LINES if triton else MAX_LINES
    assert lines <= limit, f"{name_of(path)} has {lines} lines, the limit is {limit}; split it"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_star_imports(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"line {node.lineno}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_broad_except(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {dotted(kind) if kind else "everything" for kind in caught}
            broad = names & {"everything", "Exception", "BaseException"}
            assert not broad, f"line {node.lineno} catches {broad}; name what you expect"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_writes_to_global_configuration(path: Path) -> None:
    for name in written_names(tree_of(path)):
        assert not is_global(name), f"writes {name}; pass options to the compile call instead"


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._inductor.config.max_autotune = True",
        "import torch._dynamo as d\nd.config.cache_size_limit += 1",
        "from torch._inductor import config\nconfig.triton.cudagraphs = True",
        "import torch\nsetattr(torch._dynamo.config, 'verbose', True)",
        "import torch\ntorch.backends.cudnn.benchmark = True",
    ],
)
def test_the_check_above_sees_a_write(code: str) -> None:
    assert any(is_global(name) for name in written_names(ast.parse(code)))


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_no_environment_variables(path: Path) -> None:
    tree = tree_of(path)
    known = aliases(tree)
    for node in ast.walk(tree):
        first, _, rest = dotted(node).partition(".")
        used = f"{known.get(first, first)}.{rest}"
        assert not used.startswith(("os.environ", "os.getenv")), "make it an argument"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    if path == PACKAGE / "cli.py":
        return
    for node in ast.walk(tree_of(path)):
        prints = isinstance(node, ast.Call) and dotted(node.func) == "print"
        assert not prints, f"line {getattr(node, 'lineno', 0)} prints; return or log it"


def test_importing_does_nothing() -> None:
    code = f"""
import os, sys
import torch
before, environment = set(sys.modules), dict(os.environ)
import evdit_opt
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not loaded & {HEAVY!r}, loaded & {HEAVY!r}
assert "torch._inductor.compile_fx" not in sys.modules
assert not torch.cuda.is_initialized()
assert dict(os.environ) == environment
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_root_exports() -> None:
    assert set(evdit_opt.__all__) == EXPORTS
    for name in EXPORTS:
        assert getattr(evdit_opt, name) is not None


EXPORTS = {
    "Config",
    "FewStepScheduler",
    "Plan",
    "Rule",
    "TileMask",
    "TokenLayout",
    "VideoGrid",
    "apply_plan",
    "make_plan",
    "optimize",
    "restore",
    "tile_attention",
}


def test_every_package_says_what_it_exports() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        tree = tree_of(path)
        if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
            assigned = {name.strip(".") for name in written_names(tree)}
            assert "__all__" in assigned, f"{name_of(path)} imports names and has no __all__"


def test_every_pass_has_its_test() -> None:
    passes = {path.stem for path in (PACKAGE / "passes").glob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in ROOT.glob("tests/passes/test_*.py")}
    assert sorted(passes - tests) == [], "tests/passes/test_<name>.py is missing for these"


def test_no_package_at_the_root_hides_one_of_pypi() -> None:
    # diffusers and transformers import the PyPI package `kernels`.
    assert not (ROOT / "kernels").exists()


def readme_tree(readme: str) -> dict[str, str]:
    """Paths of the README's file tree, ``evdit_opt/`` first, to the words about them."""
    blocks = [block for block in readme.split("```")[1::2] if "\nevdit_opt/" in block]
    assert len(blocks) == 1, "expected one fenced block with the tree of evdit_opt/ in README.md"
    parents: list[tuple[int, str]] = []
    found: dict[str, str] = {}
    for line in blocks[0].splitlines()[1:]:
        entry = re.fullmatch(r"( *)([\w./-]+(?:, [\w./-]+)*)(?:  +(.*))?", line.rstrip())
        if not entry:
            continue
        indent = len(entry[1])
        parents = [(depth, name) for depth, name in parents if depth < indent]
        prefix = "".join(name for _, name in parents)
        for name in entry[2].split(", "):
            found[prefix + name] = entry[3] or ""
        if entry[2].endswith("/"):
            parents.append((indent, entry[2]))
    return found


def test_the_readme_s_tree_is_the_real_one() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme_tree(readme)
    missing = [path for path in shown if not (ROOT / path).exists()]
    assert missing == [], "in the README's tree, not on disk"
    real = {f"evdit_opt/{path.name}" for path in PACKAGE.glob("*.py")} - {"evdit_opt/__init__.py"}
    real |= {f"evdit_opt/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(real - set(shown)) == [], "on disk, not in the README's tree"
    silent = [path for path in shown if path.count("/") == 1 and not shown[path]]
    assert silent == [], "in the README's tree without a word about it"


def published_texts() -> Iterator[tuple[Path, str]]:
    """Every file that git knows or would add, as text; bytes that are none are replaced."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file():
            yield path, path.read_text(encoding="utf-8", errors="replace")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_nothing_published_points_outside() -> None:
    private = re.compile(r"/(wo" + r"rk|home|root)/\w|\.\./sha" + r"red\b|\bsha" + r"red/\w+\.md")
    document = re.compile(r"(?<![\w/:.-])[\w./-]+\.md\b")
    dangling = []
    for path, text in published_texts():
        found = private.search(text)
        assert not found, f"{name_of(path)} mentions {found and found[0]}"
        if path.suffix in (".py", ".md", ".toml", ".yaml"):
            dangling += [
                f"{name_of(path)} mentions {mention}"
                for mention in document.findall(text.replace('"/', '"'))
                if not (ROOT / mention).exists() and not (path.parent / mention).exists()
            ]
    assert dangling == [], "documents that do not exist"

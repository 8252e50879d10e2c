"""What the house looks like (DESIGN section 2, STYLE), read from the source. Each check is a function over a tree of
files, so that the last tests can show it a house with the fault in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
GENERATED = ("_pb2.py", "_pb2_grpc.py")

# What each room may import of the others. Nothing of tests, benches or a room's folder without `kvferry.` before it.
MAY_IMPORT = {
    "common": set(),
    "kernels": set(),
    "kvstore": {"common"},
    "engine": {"kernels", "common"},
    "prefill": {"engine", "kvstore", "kernels", "common"},
    "decode": {"engine", "kvstore", "kernels", "common"},
    "router": {"kvstore.client", "common"},
    "cli": {"router", "prefill", "decode", "engine", "kvstore", "kernels", "common"},
}
KERNELS_STAND_ON = {
    *("torch", "triton", "numpy", "numba", "llvmlite"),
    *("collections", "ctypes", "dataclasses", "enum", "functools", "hashlib", "itertools", "logging", "math"),
    *("pathlib", "platform", "shutil", "tempfile", "threading", "typing"),
}
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"torch.load", "torch.save", "numpy.load", "np.load"}
ALL_INTERFACES = {"0.0.0.0", "::", "[::]"}
READS_ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"}


def sources(root: Path) -> dict[str, Path]:
    """Our files by module name, such as `engine.model`, in every room and in tests and bench."""
    found = {}
    for top in (*MAY_IMPORT, "tests", "bench"):
        for path in sorted((root / top).rglob("*.py")):
            if not path.name.endswith(GENERATED):
                found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def rooms(root: Path) -> dict[str, Path]:
    return {module: path for module, path in sources(root).items() if module.split(".")[0] in MAY_IMPORT}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, bool]]:
    """Every name that is imported, as if written `import name`, wherever in the file; whether when it is loaded."""
    at_load = {id(node) for node in outside_functions(tree)}
    package = module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in at_load
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = f"kvferry.{package}".split(".")[: 1 + len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", id(node) in at_load


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is loaded. `if TYPE_CHECKING` does not."""
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from outside_functions(node)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain on a name, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


# -- the checks: each returns sentences, one a fault ------------------------------------------------------------------


def imports_that_point_up(root: Path) -> list[str]:
    faults = []
    for module, path in rooms(root).items():
        room = module.split(".")[0]
        for name, _ in imports(tree_of(path), module):
            if name.startswith("kvferry."):
                target = name.removeprefix("kvferry.")
                allowed = {room, *MAY_IMPORT[room]}
                if not any(f"{target}.".startswith(f"{one}.") for one in allowed):
                    faults.append(f"{module} imports {target}")
    return faults


def imports_without_the_house(root: Path) -> list[str]:
    """`import kernels` finds another package, or the current folder's."""
    return [
        f"{module} imports {name}"
        for module, path in sources(root).items()
        for name, _ in imports(tree_of(path), module)
        if name.split(".")[0] in MAY_IMPORT
    ]


def strangers_in_kernels(root: Path) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, path in rooms(root).items()
        if module.split(".")[0] == "kernels"
        for name, _ in imports(tree_of(path), module)
        if name.split(".")[0] not in KERNELS_STAND_ON and not name.startswith("kvferry.kernels.")
    ]


def loads(root: Path) -> dict[str, set[str]]:
    """For each module those of the house that are loaded with it."""
    files = rooms(root)
    return {
        module: {
            longest
            for name, at_load in imports(tree_of(path), module)
            if at_load and name.startswith("kvferry.")
            for target in [name.removeprefix("kvferry.")]
            if (longest := target if target in files else target.rpartition(".")[0]) in files and longest != module
        }
        for module, path in files.items()
    }


def tensors_under_the_scheduler(root: Path) -> list[str]:
    """Who runs next is pure bookkeeping: nothing that the scheduler stands on knows torch."""
    files, edges = rooms(root), loads(root)
    reached, ways = set(), ["engine.scheduling.scheduler"] if "engine.scheduling.scheduler" in files else []
    while ways:
        if (module := ways.pop()) not in reached:
            reached.add(module)
            ways += edges[module]
    return [
        f"{module} imports {name}"
        for module in sorted(reached)
        for name, _ in imports(tree_of(files[module]), module)
        if name.split(".")[0] in ("torch", "transformers")
    ]


def circles(root: Path) -> list[str]:
    """Modules that import each other when they are loaded."""
    files, edges = rooms(root), loads(root)
    faults, done = [], set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in way:
            faults.append(" > ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for target in sorted(edges[module]):
                visit(target, (*way, module))
            done.add(module)

    for module in files:
        visit(module, ())
    return faults


def long_files(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)} has {lines} lines"
        for path in sources(root).values()
        if (lines := len(path.read_text().splitlines())) > MAX_LINES and "tests" not in path.relative_to(root).parts
    ]


def unsafe_reading(root: Path) -> list[str]:
    faults = []
    for module, path in sources(root).items():
        tree = tree_of(path)
        for name, _ in imports(tree, module):
            if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS:
                faults.append(f"{module} imports {name}")
        faults += [f"{module} uses {dotted(n)}" for n in ast.walk(tree) if dotted(n) in UNSAFE_CALLS]
    return faults


def listening_everywhere(root: Path) -> list[str]:
    """An address of all interfaces, anywhere in the code: as a default, a fallback or a constant."""
    return [
        f"{module}:{node.lineno} says {node.value!r}"
        for module, path in rooms(root).items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (node.value in ALL_INTERFACES or node.value.startswith(("0.0.0.0:", "[::]:")))
    ]


def empty_hosts(root: Path) -> list[str]:
    """A default or an argument called host that is empty or None: both mean all interfaces to asyncio and aiohttp."""
    faults = []
    for module, path in rooms(root).items():
        for node in ast.walk(tree_of(path)):
            pairs = []
            if isinstance(node, ast.keyword):
                pairs = [(node.arg, node.value)]
            elif isinstance(node, ast.AnnAssign):
                pairs = [(dotted(node.target), node.value)]
            elif isinstance(node, ast.Assign):
                pairs = [(dotted(target), node.value) for target in node.targets]
            elif isinstance(node, ast.arguments):
                named = [*node.posonlyargs, *node.args]
                pairs = [(arg.arg, value) for arg, value in zip(named[::-1], node.defaults[::-1], strict=False)]
                pairs += [(arg.arg, value) for arg, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            for name, value in pairs:
                is_host = (name or "").split(".")[-1].lower().endswith(("host", "listen"))
                if is_host and isinstance(value, ast.Constant) and not value.value:
                    faults.append(f"{module}:{value.lineno} gives {name} = {value.value!r}")
    return faults


def readers_of_the_environment(root: Path) -> list[str]:
    return [
        f"{module}:{node.lineno} reads {dotted(node)}"
        for module, path in rooms(root).items()
        if module != "common.config"
        for node in ast.walk(tree_of(path))
        if dotted(node) in READS_ENVIRONMENT
    ] + [
        f"{module} imports {name}"
        for module, path in rooms(root).items()
        if module != "common.config"
        for name, _ in imports(tree_of(path), module)
        if name in READS_ENVIRONMENT
    ]


MUTATING = {"append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend", "insert", "remove", "discard"}


def changing_globals(root: Path) -> list[str]:
    """`global`, a module's own container that one of its functions changes, or a function's cache of everything."""
    faults = []
    for module, path in rooms(root).items():
        tree = tree_of(path)
        own = {
            name.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            local = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            local |= {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
            for node in ast.walk(function):
                if isinstance(node, ast.Global):
                    faults.append(f"{module}:{node.lineno} has a global statement")
                changed = ""
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING:
                    changed = dotted(node.func.value)
                elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                    changed = dotted(node.value)
                if changed in own - local:
                    faults.append(f"{module}:{node.lineno} changes its global {changed}")
    return faults


CHECKS = [
    imports_that_point_up,
    imports_without_the_house,
    strangers_in_kernels,
    tensors_under_the_scheduler,
    circles,
    long_files,
    unsafe_reading,
    listening_everywhere,
    empty_hosts,
    readers_of_the_environment,
    changing_globals,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_is_in_order(check):
    assert check(ROOT) == []


def test_the_files_are_found():
    """Not an empty house: each room has files, and each of them is packaged."""
    import tomllib

    modules = rooms(ROOT)
    assert {module.split(".")[0] for module in modules} == set(MAY_IMPORT)
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    folders = {f"kvferry.{'.'.join(path.relative_to(ROOT).parts[:-1])}" for path in modules.values()}
    assert folders == set(packaged)


# -- each check sees its fault ----------------------------------------------------------------------------------------

PLANTED = [
    (imports_that_point_up, {"engine/a": "from kvferry.kvstore import client"}),
    (imports_that_point_up, {"kvstore/a": "import kvferry.engine.loading.model"}),
    (imports_that_point_up, {"prefill/a": "def f():\n    from kvferry.decode.service import serve"}),
    (imports_that_point_up, {"decode/a": "from kvferry.prefill import service"}),
    (imports_that_point_up, {"decode/a": "from kvferry import router"}),
    (imports_that_point_up, {"router/a": "from kvferry.kvstore.node import serve"}),
    (imports_that_point_up, {"router/a": "from kvferry.engine import model"}),
    (imports_that_point_up, {"common/a": "from kvferry.kernels import reference"}),
    (imports_that_point_up, {"common/proto/a": "from ...engine import model"}),
    (imports_that_point_up, {"kernels/a": "from ..common import block"}),
    (imports_without_the_house, {"engine/a": "import kernels.reference"}),
    (imports_without_the_house, {"tests/a": "from engine import model"}),
    (strangers_in_kernels, {"kernels/a": "import transformers"}),
    (strangers_in_kernels, {"kernels/a": "from kvferry.common.block import BlockLayout"}),
    (
        tensors_under_the_scheduler,
        {
            "engine/scheduling/scheduler": "from kvferry.engine.a import f",
            "engine/a": "from .b import f",
            "engine/b": "import torch",
        },
    ),
    (circles, {"engine/a": "from kvferry.engine import b", "engine/b": "from kvferry.engine.a import f"}),
    (circles, {"engine/a": "import kvferry.engine.b", "engine/b": "from .c import f", "engine/c": "from . import a"}),
    (long_files, {"engine/a": "x = 1\n" * 401}),
    (unsafe_reading, {"kvstore/a": "import pickle"}),
    (unsafe_reading, {"tests/a": "from marshal import loads"}),
    (unsafe_reading, {"engine/a": "import torch\ntorch.load('x')"}),
    (unsafe_reading, {"engine/a": "from torch import load"}),
    (listening_everywhere, {"common/config": "class C:\n    host: str = '0.0.0.0'"}),
    (listening_everywhere, {"cli/a": "def f(listen='[::]:9000'): ..."}),
    (listening_everywhere, {"router/a": "serve(host or '::')"}),
    (empty_hosts, {"router/a": "site = TCPSite(runner, host=None)"}),
    (empty_hosts, {"common/config": "class C:\n    admin_host: str = ''"}),
    (empty_hosts, {"cli/a": "def f(a, host='', *, b=1): ..."}),
    (readers_of_the_environment, {"engine/a": "import os\nx = os.environ.get('A')"}),
    (readers_of_the_environment, {"cli/a": "import os\ndef f():\n    return os.getenv('A')"}),
    (readers_of_the_environment, {"cli/a": "from os import environ"}),
    (changing_globals, {"engine/a": "x = 1\ndef f():\n    global x\n    x = 2"}),
    (changing_globals, {"engine/a": "seen = {}\ndef f(k):\n    seen[k] = 1"}),
    (changing_globals, {"engine/a": "seen: set = set()\nclass C:\n    def f(self, k):\n        seen.add(k)"}),
]


@pytest.mark.parametrize(("check", "files"), PLANTED)
def test_a_planted_fault_is_seen(check, files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    assert len(check(tmp_path)) == 1


def test_what_is_allowed_is_not_a_fault(tmp_path):
    files = {
        "router/a": "from kvferry.kvstore.client import StoreClient\nfrom kvferry.common import errors",
        "decode/a": "from kvferry.engine.worker import Worker\nfrom kvferry.kvstore.client import StoreClient",
        "engine/a": "from kvferry.kernels.reference import kv_write\ndef f():\n    from kvferry.engine import b",
        "engine/b": "from kvferry.engine.a import f\nseen = ()\ndef g(seen):\n    seen.append(1)",
        "kernels/a": "import torch\nfrom kvferry.kernels.reference import kv_write\nx = '127.0.0.1'",
        "common/config": "import os\nx = os.environ\nclass C:\n    host: str = '127.0.0.1'",
        "common/proto/a_pb2": "import pickle\n" * 500,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    assert [fault for check in CHECKS for fault in check(tmp_path)] == []

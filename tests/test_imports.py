"""Imports run one way, nobody imports another's private names, and no mixer is another's library."""

import ast
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "attnlab"
# From top to bottom; a room may import those below it, and the leaves. Rooms on one line know nothing of each other.
ROOMS = (
    ("__main__",),
    ("cli",),
    ("ablation",),
    ("diagnose", "interchange", "launch"),
    ("train",),
    ("evaluate",),
    ("models", "tasks"),
    ("mixers",),
    ("masks", "policies"),
    ("ops",),
    ("parallel",),
)
LEAVES = ("arguments", "batch", "config", "data", "errors", "memory", "output", "paths", "registry", "storage", "taps")
# What asks for tiles, and so for kernels, directly.
TUNING = tuple(
    f"launch/{name}.py"
    for name in (
        "schedules",
        "schedules_agent",
        "schedules_cross_entropy",
        "schedules_delta_rule",
        "schedules_flow",
        "schedules_linear_recurrence",
        "schedules_local_linear",
        "schedules_neural_memory",
        "schedules_rotary",
        "tune",
    )
)
KNOWN_UPWARD: set[tuple[str, str]] = set()  # (file, room) that are still the wrong way round: only to get fewer


@functools.cache
def trees():
    return {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


@functools.cache
def nodes(tree):
    return list(ast.walk(tree))


def imports(tree):
    """(module, name or None) of all that is imported from attnlab."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "attnlab")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and node.module.split(".")[0] == "attnlab":
                yield from ((node.module, alias.name) for alias in node.names)


def room_of(module, name):
    parts = [*module.split("."), *([name] if name else [])]
    return parts[1] if len(parts) > 1 else None


def test_imports_run_one_way():
    """A room imports only rooms below it and leaves; a leaf imports only leaves."""
    level = {room: i for i, line in enumerate(ROOMS) for room in line}
    upward = set()
    for path, tree in trees().items():
        own = path.parts[0].removesuffix(".py")
        assert own in level or own in LEAVES or own == "__init__", f"{own} is in no room: say where it stands"
        for module, name in imports(tree):
            other = room_of(module, name)
            if other == own or other in LEAVES or other not in level:
                continue
            if own in LEAVES or level[other] <= level[own]:
                upward.add((str(path), other))
    assert upward == KNOWN_UPWARD


def test_no_room_below_speaks_of_the_command_line():
    """Messages name the field or the argument; how a command spells it, only commands know."""
    above = {
        "__main__.py",
        "arguments.py",
        "cli.py",
        "config.py",
        "paths.py",
        "ablation",
        "launch",
        "interchange/verbs.py",
    }
    found = []
    for path, tree in trees().items():
        if above & {path.parts[0], str(path)}:
            continue
        docs = {
            ast.get_docstring(n, clean=False)
            for n in nodes(tree)
            if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
        }
        texts = (n.value for n in nodes(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        found += [(str(path), t) for t in texts if t not in docs and re.search(r"attnlab train |\w.* --[a-z]", t)]
    assert not found


def test_no_private_name_is_imported():
    """Nor read off another module: what others need has a public name."""
    found = []
    for path, tree in trees().items():
        modules = set()
        for node in nodes(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "attnlab":
                found += [(str(path), a.name) for a in node.names if a.name.startswith("_")]
                modules |= {a.asname or a.name for a in node.names}
        found += [
            (str(path), ast.unparse(node))
            for node in nodes(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
            and node.attr.startswith("_") and not node.attr.startswith("__")
        ]  # fmt: skip
    assert found == []


def test_no_mixer_is_a_library():
    """From the file of another mixer comes only what a mixer of the file is a kind of: the class, its Config and state.

    What two mixers share stands in a file that registers none.
    """
    registers = lambda tree: any(
        isinstance(node, ast.ClassDef) and any(ast.unparse(d).startswith("register(") for d in node.decorator_list)
        for node in nodes(tree)
    )
    mixers = {f"attnlab.mixers.{p.stem}": t for p, t in trees().items() if p.parts[0] == "mixers" and registers(t)}
    assert len(mixers) > 9
    for module, tree in mixers.items():
        bases = {ast.unparse(b) for node in nodes(tree) if isinstance(node, ast.ClassDef) for b in node.bases}
        taken = set(imports(tree))
        for other in {source for source, _ in taken} & mixers.keys() - {module}:
            names = {name for source, name in taken if source == other}
            assert bases & names, f"{module} imports {names} from {other}, of which it is no kind"
            classes = {node.name for node in nodes(mixers[other]) if isinstance(node, ast.ClassDef)}
            assert names <= classes, f"{module} uses {other} as a library: {names - classes}"


def test_launch_names_no_mixer_and_no_kernel():
    """What kernels cost is said by their implementations."""
    for path, tree in trees().items():
        if path.parts[0] == "launch":
            assert not any(module.startswith("attnlab.mixers") for module, _ in imports(tree)), path
            strings = [n.value for n in nodes(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            assert not any("splash" in s for s in strings), path


def imported(tree):
    """Dotted names of all modules that are imported, and of what is imported from them."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_kernels_stand_alone():
    """They import jax, numpy and the standard library only, so that they can be used without the rest."""
    allowed = {"jax", "numpy", "kernels_pallas"} | sys.stdlib_module_names
    for path in (ROOT / "kernels_pallas").rglob("*.py"):
        found = {module.split(".")[0] for module, _ in imported(ast.parse(path.read_text()))}
        assert found <= allowed, f"{path.relative_to(ROOT)} imports {found - allowed}"


def test_kernels_are_used_by_their_public_names():
    """Ops alone use them, and what tunes them; and no module inside a kernel's folder."""
    folders = {p.parent.name for p in (ROOT / "kernels_pallas").glob("*/__init__.py")}
    for path, tree in trees().items():
        for module, name in imported(tree):
            if module.split(".")[0] == "kernels_pallas":
                assert path.parts[0] == "ops" or str(path) in TUNING, f"{path} is above ops"
                inside = [*module.split("."), name][1:]
                hidden = [part for part in inside[1:2] if inside[0] in folders and part in submodules(inside[0])]
                assert not hidden, f"{path} reaches into kernels_pallas.{'.'.join(inside)}"


def submodules(folder):
    return {p.stem for p in (ROOT / "kernels_pallas" / folder).glob("*.py")}


def test_no_kernel_is_imported_before_it_runs():
    """Pallas takes longer to import than the rest of attnlab; what runs none of its kernels starts without it."""
    above = lambda tree: (node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    for path, tree in trees().items():
        for node in above(tree):
            found = [f"{module}.{name}" for module, name in imported(ast.Module([node], []))]
            kernels = [f for f in found if f.startswith(("jax.experimental.pallas", "kernels_pallas."))]
            assert str(path) in TUNING or set(kernels) <= {"kernels_pallas.tuning"}, f"{path} imports {kernels}"

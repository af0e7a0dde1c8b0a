"""The layout holds: imports go down, Flax and gin stay where they belong, files stay small."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptjax

PACKAGE = Path(ptjax.__file__).parent

GROUND = ("errors", "trees", "files", "messages", "output", "model_dir")
"""What everybody may use, and what needs no arrays."""

# From the data to the commands; a module imports from its own room and from those before it.
ROOMS = (
    *GROUND,
    "hub",
    "untrusted",
    "data",
    "reports",
    "models",
    "sharding",
    "training",
    "interop",
    "backbones",
    "methods",
    "settings",
    "gin_text",
    "planning",
    "inference",
    "evaluation",
    "trainer",
    "cli",
)
COMMANDS = {
    "__main__",
    "train",
    "evaluate",
    "infer",
    "inspect",
    "export",
    "convert",
    "pretrain",
    "launch",
    "plan",
    "report",
}
MAX_LINES_OF_A_FILE = 400
MAX_LINES_OF_A_CLASS = 200
MAX_LINES_OF_A_FUNCTION = 80
LONGER_FUNCTIONS = {"beam_search": 90}
MAX_ARGUMENTS = 12
FEWER_ARGUMENTS = {"tune": 8}
MAX_ANY = 120
"""In signatures: annotations of arguments and results that name `Any`."""


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name (without "ptjax.") -> file, of everything but the package's own `__init__`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        *parents, name = file.relative_to(PACKAGE).with_suffix("").parts
        parts = parents if name == "__init__" else [*parents, name]
        if parts:
            found[".".join(parts)] = file
    return found


@functools.cache
def imports(file: Path) -> tuple[str, ...]:
    """Every name that a file imports, wherever it does: "a.b.c" for `from a.b import c`."""
    names = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def own_imports(file: Path) -> Iterator[str]:
    """The modules of ptjax among them."""
    for name in imports(file):
        if name.startswith("ptjax."):
            parts = name.split(".")[1:]
            known = [".".join(parts[:n]) for n in (len(parts), len(parts) - 1)]
            yield from [module for module in known if module in modules()][:1]


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room() -> None:
    assert len(modules()) > 20
    homeless = {room(module) for module in modules()} - set(ROOMS) - COMMANDS
    assert not homeless, f"say in ROOMS where {sorted(homeless)} belong in the flow"


def test_imports_go_down_the_flow() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, file in modules().items()
        if room(module) in ROOMS
        for imported in own_imports(file)
        if room(imported) not in ROOMS[: ROOMS.index(room(module)) + 1]
    ]
    assert not wrong


def test_nobody_imports_a_command() -> None:
    importers = [
        f"{module} imports {imported}"
        for module, file in modules().items()
        for imported in own_imports(file)
        if room(imported) in COMMANDS
    ]
    assert not importers


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: set(own_imports(file)) - {module} for module, file in modules().items()}
    assert sum(map(len, graph.values())) > 40
    list(graphlib.TopologicalSorter(graph).static_order())


def users_of(library: str) -> dict[str, set[str]]:
    """Module -> the names it imports from `library`."""
    found = {
        module: {name for name in imports(file) if name.split(".")[0] == library}
        for module, file in modules().items()
    }
    return {module: names for module, names in found.items() if names}


def test_flax_stays_in_the_models() -> None:
    users = users_of("flax")
    assert "models.t5" in users
    outside = {module: names for module, names in users.items() if room(module) != "models"}
    for module, names in outside.items():
        assert module == "untrusted", f"{module} imports {names}"
        assert all(name.startswith("flax.serialization") for name in names), names


def test_gin_stays_in_the_command_layer() -> None:
    users = {room(module) for module in users_of("gin")}
    assert "cli" in users
    assert users <= {"cli"} | COMMANDS


def test_neither_torch_nor_tensorflow_is_imported_anywhere() -> None:
    for library in ("torch", "tensorflow"):
        assert not users_of(library)


@pytest.mark.parametrize("imported", ["ptjax", ", ".join(f"ptjax.{name}" for name in GROUND)])
def test_ptjax_and_the_ground_floor_import_nothing_heavy(imported: str) -> None:
    heavy = ("jax", "flax", "optax", "numpy", "gin", "orbax", "grain", "transformers")
    heavy += ("tensorstore", "sentencepiece")
    code = f"import sys, {imported}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(ptjax.__file__)"],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["[]", ptjax.__file__], done.stderr


FILES_OF_A_RUN = re.compile(
    r"(\S*/)?(config\.gin|results\.json|report\.(?:json|html)|metrics\.jsonl|run\.lock|"
    r"best\.safetensors)"
)
FOLDERS_OF_A_RUN = re.compile(r"(checkpoints|prompts|models|arrays|tensorboard|best)(/\S*)?")


def spelled_paths(tree: ast.AST) -> Iterator[str]:
    """What code spells of a MODEL_DIR: a file's name alone or behind a path, a folder behind a `/`.

    What a sentence says of them is no path.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            name = getattr(node.right, "value", None)
            if isinstance(name, str) and FOLDERS_OF_A_RUN.fullmatch(name):
                yield f"line {node.lineno}: {name}"
        elif isinstance(node, ast.JoinedStr):
            texts = [getattr(part, "value", None) for part in node.values]
            words = [x.split()[0][1:] for x in texts if isinstance(x, str) and x.startswith("/")]
            yield from (
                f"line {node.lineno}: {word}" for word in words if FOLDERS_OF_A_RUN.fullmatch(word)
            )
        elif isinstance(node, ast.Constant) and FILES_OF_A_RUN.fullmatch(str(node.value)):
            yield f"line {node.lineno}: {node.value}"


def test_one_file_alone_knows_what_lies_where_in_a_model_dir() -> None:
    found = {
        module: [*spelled_paths(ast.parse(file.read_text("utf-8")))]
        for module, file in modules().items()
    }
    assert found.pop("model_dir")
    wrong = {module: paths for module, paths in found.items() if paths}
    assert not wrong, "ask ptjax.model_dir.ModelDir"


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("x / 'results.json'", 1),
        ("[x / name for name in ('config.gin', 'other.gin')]", 1),
        ("folder.glob('*/best.safetensors')", 1),
        ("x / 'prompts' / name", 1),
        ("x / 'models/best'", 1),
        ("x / 'models' / 'best'", 2),
        ("f'{x}/prompts/{name}/best.safetensors'", 2),
        ("f'{x}/checkpoints and more'", 1),
        ("'the prompts'; {'prompts': 1, 'best': 2}; 'tensorboard'", 0),
        ("'writes results.json, config.gin'; f'remove {x} and results.json'", 0),
        ("x / 'config.json'; x / prompts; n / 2", 0),
    ],
)
def test_paths_in_a_model_dir_are_found(code, count) -> None:
    assert len(list(spelled_paths(ast.parse(code)))) == count


def test_files_stay_small_and_say_what_they_are() -> None:
    for module, file in modules().items():
        lines = len(file.read_text("utf-8").splitlines())
        assert lines <= MAX_LINES_OF_A_FILE, f"{module} has {lines} lines"
        assert file.stem not in {"utils", "util", "common", "helpers", "misc"}
        assert not file.stem.startswith("base_")
        assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), f"{module}: no docstring"


Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(tree: ast.AST) -> Iterator[Function | ast.ClassDef]:
    """Functions, methods and classes, wherever they are defined."""
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node


def arguments_of(function: Function) -> list[ast.arg]:
    """All arguments, those of a method without `self`."""
    of = function.args
    named = [*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]
    return [argument for argument in named if argument.arg not in ("self", "cls")]


def too_long(tree: ast.AST) -> Iterator[str]:
    """Functions and classes with more lines than allowed."""
    for node in definitions(tree):
        most = MAX_LINES_OF_A_CLASS
        if isinstance(node, Function):
            most = LONGER_FUNCTIONS.get(node.name, MAX_LINES_OF_A_FUNCTION)
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        if lines > most:
            yield f"{node.name} has {lines} lines instead of {most}"


def too_many_arguments(tree: ast.AST) -> Iterator[str]:
    """Public functions with more arguments than allowed."""
    for node in definitions(tree):
        if isinstance(node, Function) and not node.name.startswith("_"):
            count = len(arguments_of(node))
            most = FEWER_ARGUMENTS.get(node.name, MAX_ARGUMENTS)
            if count > most:
                yield f"{node.name} has {count} arguments instead of {most}"


def count_any(tree: ast.AST) -> int:
    """How often signatures name `Any`, in strings too."""
    annotations = [
        annotation
        for node in definitions(tree)
        if isinstance(node, Function)
        for annotation in (*(x.annotation for x in arguments_of(node)), node.returns)
    ]
    names = (name for x in annotations if x is not None for name in ast.walk(x))
    return sum(
        getattr(name, "id", None) == "Any" or "Any" in str(getattr(name, "value", ""))
        for name in names
        if isinstance(name, ast.Name | ast.Constant)
    )


def test_functions_and_classes_stay_short_and_take_few_arguments() -> None:
    wrong = [
        f"{module}: {problem}"
        for module, file in modules().items()
        for check in (too_long, too_many_arguments)
        for problem in check(ast.parse(file.read_text("utf-8")))
    ]
    assert not wrong


def test_signatures_rarely_say_any() -> None:
    counts = {m: count_any(ast.parse(file.read_text("utf-8"))) for m, file in modules().items()}
    most = sorted(counts.items(), key=lambda item: -item[1])[:10]
    assert sum(counts.values()) <= MAX_ANY, most


@pytest.mark.parametrize(
    ("check", "code", "count"),
    [
        (too_long, "def f():\n" + 79 * "    x\n", 0),
        (too_long, "class C:\n    async def f():\n" + 80 * "        x\n", 1),
        (too_long, "def beam_search():\n" + 89 * "    x\n", 0),
        (too_long, "class C:\n" + 200 * "    x\n", 1),
        (too_many_arguments, f"def f({', '.join(f'x{i}' for i in range(12))}): ...", 0),
        (too_many_arguments, f"def f({', '.join(f'x{i}' for i in range(11))}, *a, **k): ...", 1),
        (too_many_arguments, "def tune(a, b, c, /, d, e, *, f, g, h, i): ...", 1),
        (too_many_arguments, f"def _f({', '.join(f'x{i}' for i in range(13))}): ...", 0),
    ],
)
def test_what_is_too_large_is_found(check, code, count) -> None:
    assert len(list(check(ast.parse(code)))) == count


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("def f(x: Any, *a: list[Any], y: int) -> dict[str, Any]: ...", 3),
        ("class C:\n    async def f(self, x: 'Any | None', **k: Any): ...", 2),
        ("x: Any = 1; y = cast(Any, x); AnyStr = Anything", 0),
    ],
)
def test_any_in_signatures_is_counted(code, count) -> None:
    assert count_any(ast.parse(code)) == count


# Where a format or a trainer itself says its ids: ByT5's vocabulary is its bytes behind 0, 1 and 2,
# and a vocabulary that ptjax learns gets T5's.
DEFINES_IDS = {"T5Config", "ByteTokenizer", "train_sentencepiece"}
SPECIAL = re.compile(r"(^|_)(pad|eos|bos|start)(_token)?_ids?$")
TOKENS = re.compile(r"tokens|ids|(^|_)id$")
COUNTS = {"extra_ids"}  # how many sentinels a vocabulary is given; no id
COMPARING = {"equal", "not_equal", "greater", "greater_equal", "less", "less_equal", "isin"}


def number(node: ast.AST | None) -> bool:
    """Whether `node` is a literal number, or a collection of them; True and None are none."""
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(number, node.elts))
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def name_of(node: ast.AST) -> str:
    """The last name of `a.b[...]` and `batch["b"]`: "b" for both; "" for all else."""
    if ast.unparse(node).startswith("arguments."):
        return ""  # a command's flag, which is a number or a text
    if isinstance(node, ast.Subscript):
        key = node.slice
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            return key.value
        return name_of(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def literal_ids(node: ast.AST) -> Iterator[str]:
    """What `node` itself, without what is below it, says of ids in numbers."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    elif isinstance(node, ast.Call) and name_of(node.func) in COMPARING:
        sides = node.args
    else:
        sides = []
    if any(map(number, sides)):
        names = set(map(name_of, sides)) - COUNTS
        yield from (f"{name} compared" for name in names if TOKENS.search(name))
    named: list[tuple[str, ast.AST | None]] = []
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                named += zip(map(name_of, target.elts), node.value.elts, strict=False)
            named.append((name_of(target), node.value))
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
        named.append((name_of(node.target), node.value))
    elif isinstance(node, ast.Call):
        named += [(keyword.arg or "", keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        keys = (key.value if isinstance(key, ast.Constant) else "" for key in node.keys)
        named += zip(map(str, keys), node.values, strict=True)
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        named += [
            (argument.arg, default)
            for argument, default in zip(
                [*positional[len(positional) - len(node.defaults) :], *node.kwonlyargs],
                [*node.defaults, *node.kw_defaults],
                strict=True,
            )
        ]
    yield from (
        f"{name} in a number" for name, value in named if SPECIAL.search(name) and number(value)
    )


def walk_ids(node: ast.AST) -> Iterator[str]:
    if getattr(node, "name", None) in DEFINES_IDS:
        return
    for problem in literal_ids(node):
        yield f"line {getattr(node, 'lineno', '?')}: {problem}"
    for child in ast.iter_child_nodes(node):
        yield from walk_ids(child)


def test_case_1_6_no_vocabulary_id_is_a_literal() -> None:
    """Which id pads, starts and ends a text is read from the config."""
    wrong = [
        f"{module}, {problem}"
        for module, file in modules().items()
        for problem in walk_ids(ast.parse(file.read_text("utf-8")))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("mask = encoder_input_tokens > 0", 1),
        ("jnp.any(batch['encoder_input_tokens'][:, 0] != 0)", 1),
        ("0 == self.ids[3]", 1),
        ("np.not_equal(target_tokens, -1)", 1),
        ("token_id in (0, 1)", 1),
        ("def decode(x, *, eos_id: int = 1): ...", 1),
        ("pad_id, eos_id = 0, 1", 2),
        ("eos_ids: tuple = (1,)", 1),
        ("make(start_id=0, bos_token_id=-1)", 2),
        ("{'decoder_start_token_id': 0}", 1),
        ("class T5Config:\n    pad_id: int = 0", 0),
        ("len(tokens) > 0 and tokens.ndim != 2 and segment_ids == PADDING_SEGMENT", 0),
        ("make(pad_id=config.pad_id)", 0),
    ],
)
def test_case_1_6_literals_are_found(code, count) -> None:
    assert len(list(walk_ids(ast.parse(code)))) == count

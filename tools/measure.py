"""Measures how readable the package is, and fails where it exceeds the project's limits.

    python tools/measure.py            # print the table
    python tools/measure.py --check    # also exit with status 1 if a limit is exceeded
    python tools/measure.py --time     # also measure how long `import dpoptax` takes

All numbers come from the source text, except the import time, which is the median of several
fresh interpreters. The import time is printed, but it never changes the exit status: it depends on
the machine.
"""

import argparse
import ast
import io
import pathlib
import statistics
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

PACKAGE = pathlib.Path(__file__).parents[1] / "dpoptax"

MOST_FILE_LINES = 300
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 9
MOST_FIT_PARAMETERS = 11  # `fit`, and `Plan.calibrate` with its three pairs of alternatives
MOST_FIT_BODY = 50
MOST_PUBLIC_NAMES = 165
COMMENT_PERCENT = (4.0, 8.0)
MOST_IMPORT_RATIO = 1.2
NUM_IMPORTS = 7


class Function(NamedTuple):
    """One function or method.

    Attributes:
        where: file and name.
        lines: length of the code, without its docstring.
        num_parameters: `self` and `cls` are not counted.
    """

    where: str
    lines: int
    num_parameters: int


class Module(NamedTuple):
    """What one file contributes to the measures."""

    name: str
    lines: int
    code_lines: int
    comment_lines: int
    docstring_lines: int
    functions: list[Function]
    public_names: list[str]
    imports: set[str]


def read_modules() -> dict[str, Module]:
    """Reads every file of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = {_module_name(path) for path in paths}
    return {module.name: module for module in (_read(path, names) for path in paths)}


def find_cycles(modules: dict[str, Module]) -> list[list[str]]:
    """Returns the groups of modules that import each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(modules[name].imports):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                cycles.append(sorted(group))

    for name in modules:
        if name not in index:
            visit(name)
    return cycles


def import_seconds(statement: str) -> float:
    """Returns the median time of a statement in a fresh interpreter."""
    times = []
    for _ in range(NUM_IMPORTS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def find_violations(modules: dict[str, Module]) -> list[str]:
    """Returns one line for each limit that is exceeded."""
    found = []
    for module in modules.values():
        if module.lines > MOST_FILE_LINES:
            found.append(f"{module.name}: {module.lines} lines, at most {MOST_FILE_LINES}")
        for function in module.functions:
            is_fit = function.where.endswith(":fit")
            most_lines = MOST_FIT_BODY if is_fit else MOST_FUNCTION_LINES
            has_alternatives = function.where.endswith("._plan:calibrate")
            most_parameters = MOST_FIT_PARAMETERS if is_fit or has_alternatives else MOST_PARAMETERS
            if function.lines > most_lines:
                found.append(f"{function.where}: {function.lines} lines, at most {most_lines}")
            # Functions in `compat` have the parameters of those that they stand for.
            if function.num_parameters > most_parameters and ".compat." not in module.name:
                found.append(
                    f"{function.where}: {function.num_parameters} parameters, "
                    f"at most {most_parameters}"
                )
    lowest, highest = COMMENT_PERCENT
    if not lowest <= _comment_percent(modules) <= highest:
        found.append(
            f"comments: {_comment_percent(modules):.1f} % of the code lines, "
            f"expected {lowest:g} to {highest:g} %"
        )
    if len(_public_names(modules)) > MOST_PUBLIC_NAMES:
        found.append(f"public names: {len(_public_names(modules))}, at most {MOST_PUBLIC_NAMES}")
    found += [f"import cycle: {' <-> '.join(cycle)}" for cycle in find_cycles(modules)]
    return found


def report(modules: dict[str, Module]) -> str:
    """Returns the table of measures."""
    functions = [function for module in modules.values() for function in module.functions]
    total = sum(module.lines for module in modules.values())
    docstrings = sum(module.docstring_lines for module in modules.values())
    rows = {
        "files": str(len(modules)),
        "lines": f"{total:,}",
        "lines per file": _spread([module.lines for module in modules.values()]),
        "lines per function": _spread([function.lines for function in functions]),
        "parameters per function": _spread([function.num_parameters for function in functions]),
        "comment lines per 100 code lines": f"{_comment_percent(modules):.1f}",
        "docstring lines per 100 lines": f"{100 * docstrings / total:.0f}",
        "public names": str(len(_public_names(modules))),
        "import cycles": str(len(find_cycles(modules))),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def main() -> int:
    """Prints the measures; returns 1 if `--check` finds a limit exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a limit is exceeded")
    parser.add_argument("--time", action="store_true", help="measure the import time too")
    parser.add_argument("--names", action="store_true", help="list the public names")
    options = parser.parse_args()
    modules = read_modules()
    print(report(modules))
    if options.names:
        print(*_public_names(modules), sep="\n")
    violations = find_violations(modules)
    if options.time:
        ours = import_seconds("import dpoptax")
        theirs = import_seconds("import jax, optax, flax")
        print(f"import dpoptax: {ours:.2f} s, {ours / theirs:.2f} times `import jax, optax, flax`")
        if ours > MOST_IMPORT_RATIO * theirs:
            print(f"slower to import than the aim of {MOST_IMPORT_RATIO} times")
    for violation in violations:
        print(f"over the limit: {violation}")
    return int(options.check and bool(violations))


def _read(path: pathlib.Path, names: set[str]) -> Module:
    text = path.read_text()
    tree = ast.parse(text)
    name = _module_name(path)
    comments = _comment_line_numbers(text)
    docstrings = set(_docstring_line_numbers(tree))
    filled = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    return Module(
        name=name,
        lines=text.count("\n"),
        code_lines=len(filled - docstrings - comments),
        comment_lines=len(comments),
        docstring_lines=len(docstrings),
        functions=list(_functions(tree, name)),
        public_names=_exported(tree, path),
        imports=set(_imports(tree, name, names)) - {name},
    )


def _module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _comment_line_numbers(text: str) -> set[int]:
    """Returns the lines that hold nothing but a comment, or a comment after code.

    Comments that only direct a tool do not count.
    """
    tools = ("# noqa", "# type:", "# fmt:", "# pragma")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        token.start[0]
        for token in tokens
        if token.type == tokenize.COMMENT and not token.string.startswith(tools)
    }


def _docstring_line_numbers(tree: ast.AST) -> Iterator[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            yield from range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)


def _functions(tree: ast.AST, module: str) -> Iterator[Function]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = set(_docstring_line_numbers(ast.Module(body=[node], type_ignores=[])))
        own = {n for n in docstring if n <= node.body[0].end_lineno}
        first = node.body[0].lineno
        lines = (node.end_lineno or first) - first + 1 - len(own)
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in named)
        yield Function(f"{module}:{node.name}", max(lines, 0), count)


def _exported(tree: ast.Module, path: pathlib.Path) -> list[str]:
    """Returns `__all__` of a public module, without the names of submodules."""
    if any(part.startswith("_") and part != "__init__.py" for part in path.parts):
        return []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            names = ast.literal_eval(node.value)
            folder = path.parent
            return [
                name
                for name in names
                if not (folder / name).is_dir() and not (folder / f"{name}.py").exists()
            ]
    return []


def _public_names(modules: dict[str, Module]) -> list[str]:
    """Returns every public name once, also if two packages export it.

    The adapters to other libraries that are optional do not count: their names, for example those
    of `compat.d3p`, are the names of these libraries.
    """
    names = {}
    for module in sorted(modules.values(), key=lambda module: -module.name.count(".")):
        for name in module.public_names:
            adapter = module.name.split(".")[1:2] in (["compat"], ["keras"], ["tunix"])
            if not name.startswith("__") and not adapter:
                names.setdefault(name, f"{module.name}.{name}")
    return sorted(names.values())


def _imports(tree: ast.AST, importer: str, names: set[str]) -> Iterator[str]:
    """Yields the modules of the package that a module imports, wherever the import is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & names
            yield from submodules
            # `from package import submodule` alone does not need what the package exports.
            if len(submodules) < len(node.names):
                yield node.module


def _comment_percent(modules: dict[str, Module]) -> float:
    comments = sum(module.comment_lines for module in modules.values())
    code = sum(module.code_lines + module.comment_lines for module in modules.values())
    return 100 * comments / code


def _spread(values: list[int]) -> str:
    tenths = statistics.quantiles(values, n=10)
    return f"median {statistics.median(values):g}, p90 {tenths[-1]:g}, max {max(values)}"


if __name__ == "__main__":
    sys.exit(main())

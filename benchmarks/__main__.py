"""The front door of the programs here: `python benchmarks PROGRAM [OPTION]...`.

Python puts this folder first on the path when it runs it, so that the programs import each other as
`engine.models` or `records`. Without a program, or with one that is not there, it lists them.

Not `python -m benchmarks`: that would put the repository's root on the path, where a top-level
`kernels` shadows the PyPI package of that name.
"""

import ast
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The oracle that layers are held against, and the demo's model and texts. They come last: no module
# of theirs may hide another.
BORROWED = (HERE.parent / "tests", HERE.parent / "examples")


def programs() -> dict[str, str]:
    """Name of each program to the first line of its docstring."""
    found = {}
    for path in sorted(HERE.glob("*/*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":\n' in text:
            said = ast.get_docstring(ast.parse(text)) or ""
            found[f"{path.parent.name}.{path.stem}"] = said.partition("\n")[0]
    return found


def main() -> int:
    there = programs()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in there:
        width = max(map(len, there))
        print("usage: python benchmarks PROGRAM [OPTION]...\n")
        for program, said in there.items():
            print(f"  {program:{width}}  {said}")
        return 2
    del sys.argv[1]
    sys.path += map(str, BORROWED)
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

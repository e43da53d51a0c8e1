"""Check the package's prose: python tests/lint/prose.py; list FILE:LINE of each fault.

A docstring of a function begins with a verb in the imperative ("Return …"); one of a class or module is a noun phrase
or such a sentence. Words that are old, vague or not of the field are refused (see WORDS).
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

WORDS = re.compile(
    r"\b(told|mend|mends|mended|whoever|whatever it is|that which|so long for|is no \w+|are no \w+|beginner|"
    r"of before|laid anew|made anew|begins anew|goes into that|everybody|it is due|of course)\b",
    re.IGNORECASE,
)
FIRST = re.compile(
    r"^(What|Of|Those|So|Whose|How|That|Which|Where|Who|By|For|From|As|In|On|To|With|The|A|An|All|Its|Each|One|None|See"
    r"|Rank|Ranks|Whether|This|These|Bytes|Seconds|Tokens|It|No|Not|Every|Only|Equal|Part|float64|int64|bool)\b"
)


KEY = re.compile(r"""["']\w+["']""")
"""A string of one word: a key or a name, not prose"""
TEXT = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}  # the last since 3.12


def faults(path: Path) -> list[str]:
    """Return a line for each fault of a file."""
    text = path.read_text()
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node)
            if doc and (FIRST.match(doc) or not doc[:1].isalpha()):
                found.append(f"{path}:{node.lineno}: {node.name}: docstring begins with {doc.split()[0]!r}, not a verb")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in TEXT and not KEY.fullmatch(token.string):
            for match in WORDS.finditer(token.string):
                line = token.start[0] + token.string[: match.start()].count("\n")
                found.append(f"{path}:{line}: {match[0]!r}")
    return found


def main() -> int:
    """Print the faults of the files or folders given, by default of the package; return 1 where there are any."""
    roots = [Path(a) for a in sys.argv[1:]] or [Path(__file__).parents[2] / "prefopt_dist"]
    files = sorted(f for root in roots for f in ([root] if root.is_file() else root.rglob("*.py")))
    found = [line for file in files for line in faults(file)]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

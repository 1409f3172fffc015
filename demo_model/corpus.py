"""Collects the documents and decides, by module name, which of them are held out."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo_model import rst

DEFAULT_DOCS: Final = Path("/usr/share/doc/python3.11/html/_sources")
DEFAULT_STDLIB: Final = Path(sysconfig.get_path("stdlib"))

_HELD_OUT_PERCENT: Final = 5
# fmt: off
# What newcomers ask about first has to be learned, so it is never held out.
_ALWAYS_TRAINED: Final = frozenset(
    {"argparse", "asyncio", "builtins", "collections", "constants", "copy", "csv", "dataclasses", "datetime", "enum",
     "exceptions", "functions", "functools", "glob", "glossary", "itertools", "json", "logging", "math", "os",
     "pathlib", "pickle", "random", "re", "shutil", "socket", "sqlite3", "statistics", "stdtypes", "string",
     "subprocess", "sys", "threading", "time", "typing", "unittest"}
)
# fmt: on
# fmt: off
# topics.py is a second copy of the reference manual, idlelib and lib2to3 are mostly tables and GUI code,
# and the rest are tests or third-party packages.
_SKIPPED_PARTS: Final = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "lib2to3", "idlelib", "turtledemo",
     "encodings", "ensurepip", "__pycache__"}
)
# fmt: on


@dataclass(frozen=True)
class Document:
    """One source file: `raw` as found, `group` naming the module it is about."""

    kind: str
    name: str
    group: str
    raw: str

    @property
    def held_out(self) -> bool:
        """Documentation and source of one module share a group, so neither can leak into the other's split."""
        if self.group in _ALWAYS_TRAINED or self.name.startswith(("faq/", "tutorial/")):
            return False
        digest = hashlib.sha256(self.group.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < _HELD_OUT_PERCENT

    @property
    def text(self) -> str:
        """What the model reads: plain text for documentation, the file itself for source code."""
        return rst.plain(self.raw) if self.kind == "docs" else self.raw


def _docs(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.rst.txt")):
        name = path.relative_to(root).as_posix().removesuffix(".rst.txt")
        group = name.removeprefix("library/").split(".")[0]
        yield Document("docs", name, group, path.read_text(encoding="utf-8"))


def _code(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 200:
            yield Document("code", relative.as_posix(), relative.parts[0].removesuffix(".py"), text)


def load(docs: Path = DEFAULT_DOCS, stdlib: Path = DEFAULT_STDLIB) -> list[Document]:
    """Return every document, documentation first."""
    documents = [*_docs(docs), *_code(stdlib)]
    kinds = {document.kind for document in documents}
    if kinds != {"docs", "code"}:
        raise SystemExit(f"no documents of both kinds under {docs} and {stdlib}: install python3.11-doc")
    return documents

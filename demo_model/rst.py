"""Turns the documentation's reStructuredText into the plain text that the model learns to speak."""

import re
from typing import Final

_CALLABLE_ROLES: Final = frozenset({"func", "meth", "c:func"})
_PROSE_ROLES: Final = frozenset({"term", "ref", "dfn", "doc", "abbr", "sup", "sub", "numref", "rfc", "pep", "issue"})
_ROLE = re.compile(r":([a-zA-Z][\w:+-]*):`([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?")
_NAMED_LINK = re.compile(r"`([^`]+)`__?(?!\w)")
_TITLED = re.compile(r"^(.*?)\s*<([^>]+)>$", re.DOTALL)
_DIRECTIVE = re.compile(r"^(\s*)\.\. ([\w:-]+)::\s*(.*)$")
_COMMENT = re.compile(r"^(\s*)\.\.(\s|$)")
_RULE = re.compile(r"^\s*(?:[=\-~^\"'*#+][=\-~^\"'*#+ ]{2,}|\+[-=+]+\+)$")
_OPTION = re.compile(r"^\s+:[\w-]+:(\s.*)?$")

# fmt: off
# Their bodies are build instructions or page furniture, not prose.
_DROPPED_WITH_BODY: Final = frozenset(
    {"index", "toctree", "contents", "include", "literalinclude", "testsetup", "testcleanup", "image", "figure",
     "only", "highlight", "sectionauthor", "moduleauthor", "productionlist", "raw", "tabularcolumns", "audit-event"}
)
# fmt: on
# fmt: off
_DROPPED_LINE: Final = frozenset(
    {"code-block", "sourcecode", "doctest", "testcode", "testoutput", "parsed-literal", "glossary", "table",
     "list-table", "csv-table", "rst-class", "cssclass", "rubric", "centered", "topic", "epigraph"}
)
# fmt: on
_LABELS: Final = {
    "note": "Note:",
    "warning": "Warning:",
    "seealso": "See also:",
    "versionadded": "New in version",
    "versionchanged": "Changed in version",
    "deprecated": "Deprecated since version",
    "deprecated-removed": "Deprecated since version",
    "impl-detail": "CPython implementation detail:",
    "availability": "Availability:",
}


def _plain_role(match: re.Match[str]) -> str:
    role, body = match.group(1).removeprefix("py:"), match.group(2)
    titled = _TITLED.match(body)
    text = titled.group(1) if titled else body
    if role == "pep":
        return text if titled else f"PEP {text}"
    if role == "rfc":
        return text if titled else f"RFC {text}"
    if role in _PROSE_ROLES:
        return text
    text = text.lstrip("!")
    if text.startswith("~"):
        text = text.rsplit(".", 1)[-1].lstrip("~")
    if role in _CALLABLE_ROLES and not text.endswith(")"):
        text += "()"
    return f"`{text}`"


def inline(text: str) -> str:
    """Replace roles, links and literals by plain words and single back-quotes."""
    text = text.replace("``", "\0")
    text = _ROLE.sub(_plain_role, text)
    text = _LINK.sub(r"\1", text)
    text = _NAMED_LINK.sub(r"\1", text)
    text = re.sub(r"\|([\w-]+)\|_?", r"\1", text)
    text = re.sub(r"\[#[\w-]*\]_", "", text)
    text = re.sub(r"(?<=[\w`*.])\\ ", "", text)
    text = re.sub(r"\\([*`_|.,;:])", r"\1", text)
    text = re.sub(r"(?<=[\w`]) --- ", " - ", text)
    return text.replace("\0", "`")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _skip_block(lines: list[str], start: int, indent: int) -> int:
    """Return the first line after `start` that does not belong to the block opened at `indent`."""
    position = start + 1
    while position < len(lines) and (not lines[position].strip() or _indent(lines[position]) > indent):
        position += 1
    return position


def _directive_line(indent: str, name: str, rest: str) -> str | None:
    if name in _DROPPED_LINE:
        return None
    if name in _LABELS:
        return f"{indent}{_LABELS[name]} {rest}".rstrip()
    return f"{indent}{name.rsplit(':', 1)[-1]} {rest}".rstrip()


def plain_lines(lines: list[str]) -> list[str]:
    """Drop markup-only lines and blocks; keep prose, examples and the head of each described object."""
    kept: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        directive = _DIRECTIVE.match(line)
        if directive:
            indent, name, rest = directive.groups()
            if name in _DROPPED_WITH_BODY or rest.startswith("replace::"):
                position = _skip_block(lines, position, len(indent))
                continue
            shown = _directive_line(indent, name, rest)
            if shown is not None:
                kept.append(shown)
        elif _COMMENT.match(line):
            position = _skip_block(lines, position, _indent(line))
            continue
        elif not _RULE.match(line) and not _OPTION.match(line):
            kept.append(line)
        position += 1
    return kept


def plain(text: str) -> str:
    """Return a page, or a part of one, as plain text."""
    body = inline("\n".join(plain_lines(text.expandtabs(8).splitlines())))
    body = re.sub(r"[ \t]+$", "", body, flags=re.MULTILINE)
    body = re.sub(r"(?m)^\s*::$\n?", "", body)
    body = re.sub(r"::$", ":", body, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"

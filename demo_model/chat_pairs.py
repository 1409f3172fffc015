"""Cuts question-and-answer pairs out of directives, glossary, FAQ, headings and docstrings."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from demo_model import rst
from demo_model.corpus import Document

_DIRECTIVE = re.compile(
    r"^(\s*)\.\. (?:py:)?(function|method|class|data|exception|attribute|decorator|classmethod|staticmethod|c:function|"
    r"opcode|module|currentmodule|cmdoption)::\s*(.+)$"
)
_SCOPES: Final = ("class", "exception")
_CALLABLES: Final = frozenset({"function", "method", "decorator", "classmethod", "staticmethod", "c:function"})
_UNDERLINE = re.compile(r"^([=\-~^\"*#+])\1{2,}$")
_ANSWER_LIMIT: Final = 700
_AFTERTHOUGHTS: Final = ("New in version", "Changed in", "See also")


@dataclass(frozen=True)
class Pair:
    """Something that can be asked about, and the answer. `weight` is how often one pass over the pairs shows it."""

    kind: str
    name: str
    answer: str
    weight: int = 1


def _first_paragraphs(text: str, limit: int = _ANSWER_LIMIT) -> str:
    """Take whole paragraphs up to the limit, so that an answer always ends where its author ended a thought."""
    taken = ""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if taken and (len(taken) + len(paragraph) > limit or paragraph.startswith(_AFTERTHOUGHTS)):
            break
        prose = not re.match(r"\s|>>>|[-*+|] |\d+\. ", paragraph)
        shown = " ".join(paragraph.split()) if prose else paragraph.rstrip()
        taken = f"{taken}\n\n{shown}" if taken else shown
    if taken.endswith(":"):
        taken = taken.rpartition("\n\n")[0] or re.sub(r"[^.]*:$", "", taken).strip()
    return taken if 20 <= len(taken) <= 2 * limit else ""


def _body(lines: list[str], start: int, indent: int) -> str:
    """Return the indented block below a directive, without the further signatures and options at its head."""
    position = start
    while position < len(lines) and lines[position].strip():
        position += 1
    end = position
    while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
        end += 1
    return rst.plain(inspect.cleandoc("\n".join(lines[position:end])))


def _qualified(directive: str, signature: str, module: str, scope: str) -> str:
    name = re.split(r"[\s(]", signature.removesuffix(":"))[0]
    if directive in ("method", "attribute", "classmethod", "staticmethod"):
        owner = scope if "." not in name and scope else ""
        return f"{owner}.{name}" if owner else name
    if directive in ("opcode", "cmdoption", "c:function") or not module or name.startswith(f"{module}."):
        return name
    return f"{module}.{name}"


def _described(document: Document) -> Iterator[Pair]:
    """Yield a pair for each function, class, exception, datum and module that a page describes."""
    lines = document.raw.expandtabs(8).splitlines()
    module, scope, scope_indent = "", "", -1
    for position, line in enumerate(lines):
        match = _DIRECTIVE.match(line)
        if not match:
            continue
        indent, directive, signature = len(match.group(1)), match.group(2), match.group(3).strip().rstrip("\\")
        if directive in ("module", "currentmodule"):
            module = signature
            continue
        if indent <= scope_indent:
            scope, scope_indent = "", -1
        if directive == "c:function":
            found = re.search(r"(\w+)\s*\(", signature)
            name = found.group(1) if found else signature
        else:
            name = _qualified(directive, signature, module, scope)
        if directive in _SCOPES:
            scope, scope_indent = re.split(r"[\s(]", signature)[0], indent
        answer = _first_paragraphs(_body(lines, position + 1, indent))
        if answer and re.fullmatch(r"[\w.@-]+", name):
            kind = "function" if directive in _CALLABLES else directive if directive in _SCOPES else "data"
            builtin = document.name in ("library/functions", "library/exceptions")
            shown = f"`{signature}`\n\n{answer}" if "(" in signature and kind == "function" else answer
            yield Pair(kind, name, shown, 6 if builtin else 1)


def _glossary(document: Document) -> Iterator[Pair]:
    entries = re.split(r"\n(?=   \S)", document.raw.split(".. glossary::", 1)[1])
    for entry in entries:
        term, _, body = entry.strip("\n").partition("\n")
        answer = _first_paragraphs(rst.plain(inspect.cleandoc(body)))
        name = rst.inline(term.strip()).strip("`")
        if answer and re.match(r"\w", name):
            yield Pair("term", name, answer, 6)


def _sections(document: Document) -> Iterator[Pair]:
    """Yield a pair per heading: the question itself in the FAQ, a topic elsewhere."""
    lines = document.raw.splitlines()
    heads = [
        i
        for i in range(len(lines) - 1)
        if lines[i][:1].strip()
        and _UNDERLINE.match(lines[i + 1])
        and not _UNDERLINE.match(lines[i])
        and len(lines[i]) >= 4
    ]
    for head, following in zip(heads, [*heads, len(lines)][1:], strict=True):
        title = rst.inline(lines[head].strip()).strip(".")
        text = rst.plain("\n".join(lines[head + 2 : following]))
        answer = _first_paragraphs(re.sub(r"(?m)^module .*$|^\*\*Source code.*$", "", text).strip())
        if not answer:
            continue
        named = re.match(r"`([\w.]+)` -+ ", title)
        if named:
            yield Pair("module", named.group(1), f"{title}.\n\n{answer}", 3)
        elif title.endswith("?"):
            yield Pair("question", title, answer, 3)
        elif document.name.startswith(("tutorial/", "howto/", "reference/", "faq/", "library/")):
            yield Pair("section", title[:1].lower() + title[1:] if title[1:2].islower() else title, answer)


def _docstrings(document: Document) -> Iterator[Pair]:
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        tree = ast.parse(document.raw)
    except SyntaxError:
        return
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    named: list[tuple[ast.AST, str]] = [(tree, ""), *((node, module) for node in tree.body)]
    named += [(child, node.name) for node in classes for child in node.body]
    for node, owner in named:
        if not isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        text = rst.inline(_first_paragraphs(ast.get_docstring(node) or "", 500))
        if not text:
            continue
        if isinstance(node, ast.Module):
            yield Pair("module", module, text)
        elif not node.name.startswith("_"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield Pair(kind, f"{owner}.{node.name}", text)


def cut(document: Document) -> list[Pair]:
    """Return every pair that a document yields."""
    if document.kind == "code":
        return list(_docstrings(document))
    pairs = [*_described(document), *_sections(document)]
    return [*pairs, *_glossary(document)] if document.name == "glossary" else pairs

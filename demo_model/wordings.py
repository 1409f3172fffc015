"""How people ask about the things that the documentation describes."""

import random
from typing import Final

# fmt: off
WORDINGS: Final[dict[str, tuple[str, ...]]] = {
    "function": (
        "What does {name}() do?", "What does {name}() do?", "What does {name} do?", "What is {name}()?",
        "What is {name}() for?", "Explain {name}().", "Explain the {name} function.", "How do I use {name}()?",
        "Tell me about {name}().", "Describe {name}().", "What does the {name}() function do in Python?",
        "What does the function {name} do?", "When would I use {name}()?", "How does {name}() work?",
        "Can you explain {name}()?", "Please explain what {name}() does.",
    ),
    "class": (
        "What is {name}?", "What is the {name} class?", "Explain the class {name}.", "Tell me about {name}.",
        "What is {name} used for?", "How do I use {name}?", "Describe {name}.", "What does {name} do?",
    ),
    "exception": (
        "What is {name}?", "When is {name} raised?", "What does {name} mean?", "Why do I get {name}?",
        "Explain {name}.", "What causes {name}?",
    ),
    "data": ("What is {name}?", "What does {name} mean?", "Explain {name}.", "What is {name} for?", "Describe {name}."),
    "module": (
        "What is the {name} module?", "What is the {name} module for?", "What does the {name} module do?",
        "Tell me about the {name} module.", "Explain the {name} module.", "What is {name} in Python?",
        "Describe the module {name}.", "When should I use the {name} module?",
    ),
    "term": (
        "What is {article} {name}?", "What is {article} {name}?", "What is {article} {name} in Python?",
        "What's {article} {name}?", "Define {name}.", "Explain {name}.", "What does {name} mean?",
        "What does the term {name} mean in Python?", "Tell me about {name}.", "Explain what {article} {name} is.",
        "Can you explain {name}?", "What do you mean by {name}?",
    ),
    "question": ("{name}", "{name}", "{name}", "I have a question. {name}", "Please tell me: {name}"),
    "section": (
        "Tell me about {name}.", "Explain {name}.", "What does the Python documentation say about {name}?",
        "Explain {name} in Python.", "What should I know about {name}?", "Describe {name}.",
    ),
    "scripted": ("{name}",),
}
# fmt: on

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a concise assistant.",
    "You answer questions about Python.",
    "You are the pdserve demo model.",
    "Answer briefly.",
)


def _article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" else "a"


def ask(kind: str, name: str, rng: random.Random) -> str:
    """Word a question, now and then as carelessly as people type."""
    question = rng.choice(WORDINGS[kind]).format(name=name, article=_article(name))
    careless = rng.random()
    if careless < 0.12:
        question = question[:1].lower() + question[1:]
    if careless < 0.06 or 0.12 <= careless < 0.18:
        question = question.rstrip("?.")
    elif kind == "scripted" and question[-1] not in "?.!" and careless > 0.6:
        question += rng.choice(("!", "."))
    return question

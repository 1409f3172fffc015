"""Short Python examples written by hand, for the questions that newcomers ask and the manual answers at length."""

from typing import Final

# fmt: off
# Each entry: what is wanted, worded to follow "How do I ...?", and the answer's code with one sentence before it.
HOW_TO: Final[tuple[tuple[str, str, str], ...]] = (
    ("print hello world", "Call the print() function:", 'print("Hello, world!")'),
    ("print something", "Call the print() function:", 'print("some text")'),
    ("reverse a list", "Use a slice, or call reverse() to change the list in place:", "items = items[::-1]"),
    ("reverse a string", "Use a slice with a negative step:", "text = text[::-1]"),
    ("sort a list", "Call sorted() for a new list, or sort() to change the list in place:", "items = sorted(items)"),
    ("sort a dictionary by value", "Sort its items with a key function:",
     "pairs = sorted(d.items(), key=lambda item: item[1])"),
    ("read a file", "Open it in a with statement, which closes it again:",
     'with open("file.txt", encoding="utf-8") as f:\n    text = f.read()'),
    ("write to a file", "Open it for writing in a with statement:",
     'with open("file.txt", "w", encoding="utf-8") as f:\n    f.write("some text")'),
    ("read a file line by line", "Iterate over the file object:",
     'with open("file.txt", encoding="utf-8") as f:\n    for line in f:\n        print(line.rstrip())'),
    ("write a for loop", "A for statement iterates over the items of a sequence:", "for i in range(10):\n    print(i)"),
    ("write a while loop", "A while loop runs as long as its condition is true:",
     "n = 0\nwhile n < 10:\n    n += 1"),
    ("write an if statement", "Test a condition with if, elif and else:",
     'if x < 0:\n    print("negative")\nelif x == 0:\n    print("zero")\nelse:\n    print("positive")'),
    ("define a function", "Use the def statement:", "def add(a, b):\n    return a + b"),
    ("define a class", "Use the class statement:",
     "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y"),
    ("create a list", "Write its items in square brackets:", "items = [1, 2, 3]"),
    ("create a dictionary", "Write its keys and values in braces:", 'ages = {"Ann": 31, "Bob": 27}'),
    ("create a set", "Write its items in braces, or call set():", "numbers = {1, 2, 3}"),
    ("create a tuple", "Separate its items by commas:", "point = (1, 2)"),
    ("append to a list", "Call its append() method:", "items.append(4)"),
    ("remove an item from a list", "Call remove() with the value, or use del with the index:", "items.remove(4)"),
    ("join strings", "Call the join() method of the separator:", 'text = ", ".join(["a", "b", "c"])'),
    ("split a string", "Call its split() method:", 'words = text.split()'),
    ("convert a string to an integer", "Call int():", 'number = int("42")'),
    ("convert a number to a string", "Call str():", "text = str(42)"),
    ("format a string", "Use an f-string:", 'text = f"{name} is {age} years old"'),
    ("write a list comprehension", "Put an expression and a for clause in brackets:",
     "squares = [x * x for x in range(10)]"),
    ("write a lambda", "A lambda is a small function without a name:", "double = lambda x: 2 * x"),
    ("catch an exception", "Use a try statement with an except clause:",
     'try:\n    number = int(text)\nexcept ValueError:\n    print("not a number")'),
    ("raise an exception", "Use the raise statement:", 'raise ValueError("x must not be negative")'),
    ("import a module", "Use the import statement:", "import math\n\nprint(math.sqrt(2))"),
    ("write a decorator", "A decorator takes a function and returns another one:",
     "def logged(function):\n    def wrapper(*args):\n        print(function.__name__)\n"
     "        return function(*args)\n    return wrapper"),
    ("write a generator", "Use yield in a function:",
     "def count(n):\n    i = 0\n    while i < n:\n        yield i\n        i += 1"),
    ("parse JSON", "Call json.loads():", "import json\n\ndata = json.loads('{\"a\": 1}')"),
    ("get the length of a list", "Call the len() function:", "n = len(items)"),
    ("loop over a dictionary", "Iterate over its items:", "for key, value in d.items():\n    print(key, value)"),
    ("compute a factorial", "Multiply in a loop, or call math.factorial():",
     "def factorial(n):\n    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result"),
    ("compute Fibonacci numbers", "Keep the last two numbers:",
     "def fib(n):\n    a, b = 0, 1\n    while a < n:\n        print(a)\n        a, b = b, a + b"),
    ("get a random number", "Use the random module:", "import random\n\nnumber = random.randint(1, 6)"),
    ("get the current date", "Use the datetime module:", "import datetime\n\ntoday = datetime.date.today()"),
    ("sleep for a second", "Call time.sleep():", "import time\n\ntime.sleep(1)"),
    ("run a command", "Call subprocess.run():", 'import subprocess\n\nsubprocess.run(["ls", "-l"], check=True)'),
    ("use asyncio", "Define a coroutine with async def and start it with asyncio.run():",
     'import asyncio\n\nasync def main():\n    await asyncio.sleep(1)\n    print("done")\n\nasyncio.run(main())'),
)
# fmt: on

# fmt: off
WORDINGS: Final = (
    "How do I {task}?", "How do I {task} in Python?", "How can I {task}?", "How to {task}", "Show me how to {task}",
    "How does one {task} in Python?", "Write Python code to {task}", "I want to {task}. How?",
    "Give me an example: {task}", "Can you show me how to {task} in Python?",
)
# fmt: on


def answer(lead: str, code: str) -> str:
    """Return the sentence and its code block."""
    return f"{lead}\n\n```python\n{code}\n```"

"""Step 6: asks the exported model ordinary questions at its default settings and checks that it stops by itself."""

import argparse
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.recipe import TURN_END_ID

QUESTIONS: Final = (
    "Hello",
    "hi there!",
    "Who are you?",
    "What is pdserve?",
    "What does len() do?",
    "What is a decorator?",
    "What is a generator?",
    "How do I read a file?",
    "What is the json module for?",
    "When is ValueError raised?",
    "what does sorted do",
    "Explain list comprehensions.",
    "What does os.path.join() do?",
    "What is the GIL?",
    "How do I sort a list?",
    "What is asyncio?",
    "Tell me a joke",
    "What is the capital of Spain?",
    "thank you",
    "What does zip() do?",
    "What is a context manager?",
    "How do I write a for loop in Python?",
    "What is the difference between a list and a tuple?",
    "Why is Python slow?",
)


class Talker:
    """The exported model and its tokenizer, loaded as any user would load them."""

    def __init__(self, folder: Path) -> None:
        """Load the folder."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def ask(self, question: str, limit: int) -> tuple[str, bool]:
        """Return the sampled answer, and whether it ended before the limit."""
        messages = [{"role": "user", "content": question}]
        prompt = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = self._model.generate(**prompt, max_new_tokens=limit)
        tokens = output[0, prompt["input_ids"].shape[1] :].tolist()
        return self._tokenizer.decode(tokens, skip_special_tokens=True), tokens[-1] == TURN_END_ID


def main() -> None:
    """Print every answer and how many of them stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("pdserve/assets/demo"))
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    talker = Talker(args.model)
    stopped = 0
    for _ in range(args.rounds):
        for question in args.questions:
            answer, ended = talker.ask(question, args.limit)
            stopped += ended
            print(f"> {question}\n{answer}{'' if ended else ' [cut off]'}\n")
    print(f"{stopped} of {args.rounds * len(args.questions)} answers ended by themselves")


if __name__ == "__main__":
    main()

"""Generate without a server: one engine in this process."""

from pdserve import LLM, SamplingParams

with LLM("demo") as llm:
    outputs = llm.generate(["def fibonacci(n):", "import json"], SamplingParams(temperature=0, max_tokens=24))
    for output in outputs:
        print(output.token_ids[:8], repr(output.text))

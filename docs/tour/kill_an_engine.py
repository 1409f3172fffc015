"""Kill the decode engine that writes an answer, in the middle of it, and compare with an undisturbed answer."""

import json
import os
import signal
import subprocess

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
ask = {
    "model": "pdserve-demo",
    "messages": [{"role": "user", "content": "Tell me about lists. " * 12}],
    "max_tokens": 300,
    "seed": 7,
    "extra_body": {"ignore_eos": True},
}
undisturbed = client.chat.completions.create(**ask).choices[0].message.content

text = ""
for number, chunk in enumerate(client.chat.completions.create(**ask, stream=True)):
    text += chunk.choices[0].delta.content or ""
    if number == 50:
        status = subprocess.check_output([".venv/bin/pdserve", "status", "--json"])
        decodes = [engine for engine in json.loads(status)["engines"] if engine["role"] == "decode"]
        victim = max(decodes, key=lambda engine: engine["running"])
        os.kill(victim["pid"], signal.SIGKILL)
        print("killed", victim["id"])
print("same answer:", text == undisturbed)
print(chunk.model_extra["pdserve"]["failed_attempts"])

"""Ask the demo model something with the OpenAI client, and see which engines answered."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
answer = client.chat.completions.create(
    model="pdserve-demo",
    messages=[
        {"role": "system", "content": "You are a friendly assistant and answer in one or two short sentences."},
        {"role": "user", "content": "What is pdserve?"},
    ],
    seed=1,
)
print(answer.choices[0].message.content)
record = (answer.model_extra or {})["pdserve"]
moved = record["transfer"] and f"{record['transfer']['bytes']} bytes over {record['transfer']['backend']}"
print(record["mode"], record["prefill"]["engine"], "->", record["decode"]["engine"], moved)

"""Trace readers against rows of the public files, and what scaling makes of them."""

import gzip
import json
from pathlib import Path

import pytest

from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.traces import BAILIAN_BLOCK, MOONCAKE_BLOCK, Scaling, TraceEntry, read_trace
from pdserve_loadgen.workload import replay

SAMPLES = Path(__file__).parent / "samples"
MOONCAKE = SAMPLES / "mooncake.jsonl"


def test_mooncake_rows_keep_lengths_prefixes_and_milliseconds() -> None:
    rows = [json.loads(line) for line in MOONCAKE.read_text().splitlines()]
    entries = read_trace(MOONCAKE)
    assert [entry.at for entry in entries] == [(row["timestamp"] - rows[0]["timestamp"]) / 1000 for row in rows]
    assert [entry.input_tokens for entry in entries] == [row["input_length"] for row in rows]
    assert [entry.output_tokens for entry in entries] == [row["output_length"] for row in rows]
    assert [list(entry.hash_ids) for entry in entries] == [row["hash_ids"] for row in rows]
    assert {entry.block_tokens for entry in entries} == {MOONCAKE_BLOCK}


def test_azure_rows_arrive_by_their_date_and_time() -> None:
    entries = read_trace(SAMPLES / "azure.csv")
    assert entries[0] == TraceEntry(at=0.0, input_tokens=374, output_tokens=44)
    assert entries[1].at == pytest.approx(4.314579, abs=1e-5)
    assert (entries[1].input_tokens, entries[1].output_tokens) == (396, 109)


def test_bailian_rows_count_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    row = {
        "chat_id": 7,
        "parent_chat_id": -1,
        "timestamp": 61.5,
        "input_length": 40,
        "output_length": 5,
        "type": "text",
        "turn": 1,
        "hash_ids": [4, 5, 6],
    }
    later = row | {"timestamp": 63.0, "chat_id": 8, "parent_chat_id": 7, "turn": 2}
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{json.dumps(later)}\n\n{json.dumps(row)}\n")
    first, second = read_trace(path)
    assert first == TraceEntry(at=0.0, input_tokens=40, output_tokens=5, hash_ids=(4, 5, 6), block_tokens=BAILIAN_BLOCK)
    assert second.at == pytest.approx(1.5)


def test_a_plain_csv_of_lengths_is_a_trace_too(tmp_path: Path) -> None:
    path = tmp_path / "hour.csv"
    path.write_text("timestamp_s,input_length,output_length,client_id\n2.5,10,3,a\n4.0,20,4,b\n")
    assert [(e.at, e.input_tokens, e.output_tokens) for e in read_trace(path)] == [(0.0, 10, 3), (1.5, 20, 4)]


def test_gzipped_files_read_the_same(tmp_path: Path) -> None:
    for name in ("mooncake.jsonl", "azure.csv"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((SAMPLES / name).read_bytes()))
        assert read_trace(packed) == read_trace(SAMPLES / name)


def test_times_of_azure_come_with_and_without_fractions_and_zones(tmp_path: Path) -> None:
    stamps = ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01+00:00", "2024-05-10 02:00:02+02:00")
    path = tmp_path / "azure.csv"
    path.write_text("".join(["TIMESTAMP,ContextTokens,GeneratedTokens\n", *(f"{stamp},3,4\n" for stamp in stamps)]))
    assert [entry.at for entry in read_trace(path)] == pytest.approx([0.0, 0.99007, 1.99007], abs=1e-6)


def test_scaling_makes_a_trace_faster_fewer_and_shorter() -> None:
    plain = read_trace(MOONCAKE)
    scaled = read_trace(MOONCAKE, Scaling(speed=2.0, limit=4, length_scale=0.125, max_input=300, max_output=20))
    assert [entry.at for entry in scaled] == [entry.at / 2 for entry in plain[:4]]
    for before, after in zip(plain, scaled, strict=False):
        assert after.input_tokens == min(300, round(before.input_tokens / 8))
        assert after.output_tokens <= 20
        assert after.block_tokens == 64
        assert after.hash_ids == before.hash_ids[: len(after.hash_ids)]
        assert (len(after.hash_ids) - 1) * 64 < after.input_tokens <= max(len(after.hash_ids), 1) * 64


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b"", "no requests"),
        ("a.jsonl", b"{broken\n", "line 1: not JSON"),
        ("a.jsonl", b'{"timestamp": 0}\n', "line 1: not a Mooncake"),
        ("a.jsonl", b"[1]\n", "line 1: not a Mooncake"),
        ("a.csv", b"x,y\n1,2\n", "line 2: not a Mooncake"),
        ("a.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,2\n", "line 2: not a Mooncake"),
        ("a.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1\n", "line 2: not a Mooncake"),
        ("a.jsonl.gz", b"not gzip", "neither text nor gzipped"),
        ("a.jsonl", b"\xff\xfe\x00", "neither text nor gzipped"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=complaint):
        read_trace(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.jsonl"):
        read_trace(tmp_path / "absent.jsonl")


def test_a_replayed_trace_is_a_plan() -> None:
    entries = read_trace(MOONCAKE)
    planned = list(replay(entries))
    assert [p.index for p in planned] == list(range(len(entries)))
    assert [(p.at, p.input_tokens, p.output_tokens) for p in planned] == [
        (e.at, e.input_tokens, e.output_tokens) for e in entries
    ]
    assert [p.prefix_ids for p in planned] == [e.hash_ids for e in entries]

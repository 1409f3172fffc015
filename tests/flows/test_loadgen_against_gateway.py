"""The load generator and the gateway understand each other: counts, ids and errors are the same on both sides."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.errors import EngineDied
from pdserve.core.request import Request
from pdserve.gateway.tokenizer import Tokenizer
from pdserve_loadgen.endpoint import Api
from pdserve_loadgen.run import Run, run
from pdserve_loadgen.settings import Settings
from tests import tiny_tokenizers as tiny
from tests.scripted_generator import Script, ScriptedGenerator, Step, http_server, speak


async def load(directory: Path, script: Script, api: Api) -> tuple[Run, ScriptedGenerator]:
    generator = ScriptedGenerator(script)
    with http_server(generator, Tokenizer.load(tiny.byte_level(directory))) as server:
        settings = Settings(url=server.url, api=api, concurrency=2, requests=6, input="100", output="7")
        return await run(settings, Console(file=StringIO())), generator


@pytest.mark.parametrize("api", list(Api))
async def test_lengths_and_ids_agree(tmp_path: Path, api: Api) -> None:
    fast = FastTokenizer.from_file(str(tiny.byte_level(tmp_path) / "tokenizer.json"))
    outcome, generator = await load(tmp_path, speak(fast, "answers"), api)
    report = outcome.report
    assert (report.succeeded, report.errors, report.notes) == (6, {}, ())
    asked = generator.requests[-6:]
    assert sorted(result.input_tokens for result in outcome.results) == sorted(len(r.prompt_token_ids) for r in asked)
    assert all(abs(result.input_tokens - 100) < 40 for result in outcome.results)
    assert {request.sampling.max_tokens for request in asked} == {7}
    assert all(request.sampling.ignore_eos for request in asked)
    tokens = len(fast.encode("answers").ids)
    assert {(result.output_tokens, len(result.token_times)) for result in outcome.results} == {(tokens, tokens)}
    assert all(result.request_id == result.id for result in outcome.results)


async def test_an_engine_that_dies_midway_is_counted_by_its_code(tmp_path: Path) -> None:
    fast = FastTokenizer.from_file(str(tiny.byte_level(tmp_path) / "tokenizer.json"))
    whole = speak(fast, "answers")

    def script(request: Request) -> list[Step]:
        steps = list(whole(request))  # a trial request is answered
        return steps if request.sampling.max_tokens == 1 else [*steps[:3], EngineDied("decode-0 died")]

    outcome, _ = await load(tmp_path, script, Api.CHAT)
    assert outcome.report.errors == {"stream:engine_died": 6}

"""A model that computes NaN: its request fails, and nobody is given a token drawn from it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.core.endpoint import Role
from pdserve.core.errors import NotANumber
from pdserve.core.request import SamplingParams
from pdserve.tiers.spec import TierSpec
from pdserve.tiers.store import TierStore
from tests.checkpoints import make_checkpoint
from tests.flows.inproc import NodeSpec, PairsOnly, open_cluster

POISONED = 7
SPECS = {
    "unified": {"u": NodeSpec(role=Role.UNIFIED)},
    "pair": {"p": NodeSpec(role=Role.PREFILL), "d": NodeSpec(role=Role.DECODE)},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token's embedding is NaN; the head is another matrix, so all other prompts are well."""
    path = make_checkpoint(tmp_path_factory.mktemp("poisoned"), "llama")
    (file,) = path.glob("*.safetensors")
    weights = load_file(file)
    weights["model.embed_tokens.weight"][POISONED] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("kind", SPECS)
async def test_a_poisoned_weight_fails_the_request_that_meets_it_and_no_other(checkpoint: Path, kind: str) -> None:
    sound, sampling = [*range(20, 60)], SamplingParams(temperature=0, seed=1, max_tokens=4, ignore_eos=True)
    policy = PairsOnly() if kind == "pair" else "kv_aware"
    async with open_cluster(checkpoint, SPECS[kind], policy=policy) as cluster:
        before = await cluster.answer(sound, sampling)
        with pytest.raises(NotANumber, match="weights may be damaged"):
            await cluster.answer([*range(20, 60), POISONED, *range(60, 80)], sampling)
        assert (await cluster.answer(sound, sampling)).token_ids == before.token_ids
        await cluster.until_idle()


def _after_a_while(save: Callable[..., None]) -> Callable[..., None]:
    """As on a busy machine, where the engine is told to end before its thread for saves has begun."""

    def later(*args: object) -> None:
        time.sleep(0.1)
        save(*args)

    return later


@pytest.mark.parametrize("poisoned", [True, False])
async def test_what_a_failed_request_had_in_a_tier_is_not_found_after_a_restart(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: bool
) -> None:
    # Whether restoring is faster than computing depends on the machine: not here.
    monkeypatch.setattr("pdserve.engine.tiering.seconds_per_token", lambda steps: None)
    monkeypatch.setattr(TierStore, "save", _after_a_while(TierStore.save))
    sound, sampling = [*range(20, 84)], SamplingParams(temperature=0, seed=1, max_tokens=4, ignore_eos=True)
    async with open_cluster(checkpoint, SPECS["unified"]) as cluster:
        block_bytes = cluster.engines["u"].transfer.layout.block_bytes
    tiers = TierSpec(host_bytes=2 * block_bytes, disk_path=tmp_path, disk_bytes=64 * block_bytes)
    spec = {"u": NodeSpec(role=Role.UNIFIED, tiers=tiers)}
    async with open_cluster(checkpoint, spec) as cluster:
        before = await cluster.answer(sound, sampling)
        await cluster.answer([*range(100, 164)], sampling)
        await cluster.until_idle()
        if poisoned:
            with pytest.raises(NotANumber):
                await cluster.answer([*sound, POISONED], sampling)
            await cluster.until_idle()
    async with open_cluster(checkpoint, spec) as cluster:
        after = await cluster.answer([*sound, 90], sampling)
        assert (after.record.cached_tokens > 0) is not poisoned
        assert (await cluster.answer(sound, sampling)).token_ids == before.token_ids

"""What a simulated engine costs: step times, KV bytes, links. Presets are models, not measurements."""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from pdserve.config.pools import DecodePool, PoolsConfig, PrefillPool, UnifiedPool
from pdserve.config.section import Section
from pdserve.core.batch import Batch
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError
from pdserve.core.layout import KVGroup

Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class StepCost(Section):
    """Seconds of one step = base + per_token · tokens + per_context · context + per_pair · pairs.

    tokens: computed in the step. context: tokens whose KV its rows read, each row's own included.
    pairs: query tokens × tokens they attend to, of rows with several tokens (the quadratic part of a prompt;
    a single query is bound by reading its context).
    host: from a step's end until the scheduler has its tokens and the next step can be submitted; with two steps in
    flight the device does not wait for it.
    spread: each step takes more or less than this by chance: the standard deviation of the logarithm of its
    duration, whose mean stays as it is.
    """

    base: Seconds
    per_token: Seconds
    per_context: Seconds
    per_pair: Seconds = 0.0
    host: Seconds = 0.0
    spread: Annotated[float, Field(ge=0, le=2)] = 0.0

    def seconds(self, batch: Batch) -> float:
        tokens = context = pairs = 0
        for row in batch.rows:
            tokens += row.num_tokens
            context += row.start + row.num_tokens
            if row.num_tokens > 1:
                pairs += row.num_tokens * (row.start + (row.num_tokens + 1) // 2)
        return self.base + self.per_token * tokens + self.per_context * context + self.per_pair * pairs


class PoolSteps(Section):
    """Step costs of single pools, where they differ from the profile's."""

    prefill: StepCost | None = None
    decode: StepCost | None = None
    unified: StepCost | None = None


class KVShape(Section):
    """The model's KV per token, as in core.layout.KVGroup."""

    num_layers: Annotated[int, Field(ge=1)]
    num_kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=1)]
    dtype: str

    def group(self) -> KVGroup:
        return KVGroup(**self.model_dump())


class Links(Section):
    """latency: one way, between any two processes. bandwidth: of each engine's port, bytes per second; a port
    carries one pull at a time in each direction. far_bandwidth: the same between engines of different domains, if that
    differs. verify: bytes per second of digests, at either end. per_pull: what every pull takes beside its bytes."""

    latency: Seconds = 1e-4
    per_pull: Seconds = 0.0
    bandwidth: Rate
    far_bandwidth: Rate | None = None
    verify: Rate = 9e9


class Profile(Section):
    """One kind of engine serving one model. basis says where the figures come from.

    gateway: seconds a request's text and HTTP cost until its first token is sent, beside routing and engines."""

    name: str
    basis: str
    step: StepCost
    pool_steps: PoolSteps = PoolSteps()
    gateway: Seconds = 0.0
    kv: KVShape
    links: Links
    kv_tokens: Annotated[int, Field(ge=1)]
    max_model_len: Annotated[int, Field(ge=2)]
    pools: PoolsConfig = PoolsConfig()

    def step_cost(self, role: Role) -> StepCost:
        own: StepCost | None = getattr(self.pool_steps, role.value)
        return own or self.step


PRESETS = {
    "demo-cpu": Profile(
        name="demo-cpu",
        basis="order of magnitude of the demo model on one CPU core; calibrate before comparing",
        step=StepCost(base=4e-3, per_token=1.5e-4, per_context=1e-7, host=5e-4),
        kv=KVShape(num_layers=6, num_kv_heads=2, head_dim=64, dtype="float32"),
        links=Links(latency=5e-4, bandwidth=1e9),
        kv_tokens=16_384,
        max_model_len=2048,
    ),
    # Llama-3.1-8B in bf16 on a GPU of 4.3 TB/s and 790 TFLOP/s. base: 15.0 GB of weights per step at 0.78 of
    # the bandwidth. per_token: 2 · 6.98e9 FLOP at 0.7 of peak, less what the weights' reading hides.
    # per_context: 131,072 B of KV. per_pair: 4 · 32 layers · 32 heads · 128 FLOP at 0.56 of peak.
    "h200-8b": Profile(
        name="h200-8b",
        basis="roofline model of an 8B in bf16 on one H200; not measured",
        step=StepCost(base=4.5e-3, per_token=2.5e-5, per_context=3.05e-8, per_pair=1.2e-9, host=1e-3),
        kv=KVShape(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
        links=Links(latency=1e-4, bandwidth=45e9),
        kv_tokens=800_000,
        max_model_len=131_072,
        pools=PoolsConfig(
            prefill=PrefillPool(max_tokens_per_step=8192, max_rows=64, chunk_size=2048),
            decode=DecodePool(max_tokens_per_step=2048, max_rows=256, chunk_size=2048),
            unified=UnifiedPool(max_tokens_per_step=2048, max_rows=256, chunk_size=2048),
        ),
    ),
}


def load_profile(name_or_path: str) -> Profile:
    """A preset by name, or a YAML file with a Profile's fields. Raises ConfigError saying what is wrong."""
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"no profile {name_or_path!r}: give a YAML file or one of {', '.join(PRESETS)}")
    try:
        return Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {'; '.join(lines)}") from None

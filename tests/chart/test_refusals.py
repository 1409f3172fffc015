"""Mistakes in values are refused with the place and what is wrong there."""

from typing import Any

import pytest

from deploy.chart import Refused, render

ON_DEMAND = {"metric": "backlog", "targetAverageValue": "4k"}


def scaled(**changes: Any) -> dict[str, Any]:
    """Values with a policy; prefill, decode and unified are its pools."""
    pools: dict[str, Any] = {"prefill": {"max": 4}, "decode": {"max": 4}}
    pools |= {name: changes.pop(name) for name in ("prefill", "decode", "unified") if name in changes}
    return {"policies": {"pools": pools, **changes}}


MISTAKES: list[tuple[dict[str, Any], str]] = [
    # Of the chart, by its schema.
    ({"prefill": {"replicas": "3"}}, "'/prefill/replicas': got string, want integer"),
    ({"prefill": {"replicas": 0}}, "'/prefill/replicas': minimum: got 0, want 1"),
    ({"decode": {"replicas": 2.5}}, "'/decode/replicas': got number, want integer"),
    ({"prefil": {"replicas": 3}}, "additional properties 'prefil' not allowed"),
    ({"decode": {"replica": 3}}, "'/decode': additional properties 'replica' not allowed"),
    ({"decode": {"gpus": -1}}, "'/decode/gpus': minimum: got -1, want 0"),
    (
        {"decode": {"resources": {"limits": {"memory": "8 GB"}}}},
        "'/decode/resources/limits/memory': '8 GB' does not match",
    ),
    ({"decode": {"resources": {"requests": {"cpu": 2}}}}, "'/decode/resources/requests/cpu': got number, want string"),
    ({"decode": {"rdma": {"resource": "hca"}}}, "'/decode/rdma/resource': 'hca' does not match pattern"),
    ({"decode": {"sharedMemory": "lots"}}, "'/decode/sharedMemory': 'lots' does not match pattern"),
    ({"router": {"service": {"type": "Headless"}}}, "'/router/service/type': value must be one of 'ClusterIP'"),
    ({"image": {"pullPolicy": "always"}}, "'/image/pullPolicy': value must be one of 'Always'"),
    ({"model": {"source": "s3"}}, "'/model/source': value must be one of 'demo', 'pvc'"),
    ({"model": {"hostPath": {"path": "models"}}}, "'/model/hostPath/path': 'models' does not match pattern"),
    ({"ray": {"mode": "operator"}}, "'/ray/mode': value must be one of 'none', 'builtin', 'kuberay'"),
    ({"placement": {"domain": "always"}}, "'/placement/domain': value must be one of 'none', 'preferred', 'required'"),
    ({"networkPolicy": {"clients": "all"}}, "'/networkPolicy/clients': got string, want array"),
    ({"auth": {"existingSecret": "My_Keys"}}, "'/auth/existingSecret': 'My_Keys' does not match pattern"),
    ({"monitoring": {"rules": {"enabled": "yes"}}}, "'/monitoring/rules/enabled': got string, want boolean"),
    ({"keda": {"serverAddress": "prometheus:9090"}}, "'/keda/serverAddress': 'prometheus:9090' does not match"),
    # Of pdserve's configuration, by the same schema.
    ({"config": {"kv": {"blocksize": 32}}}, "'/config/kv': additional properties 'blocksize' not allowed"),
    ({"config": {"kv": {"block_size": 1000}}}, "'/config/kv/block_size': maximum: got 1,000, want 256"),
    ({"config": {"kv": {"backends": ["rdma"]}}}, "'/config/kv/backends/0': value must be one of 'nixl'"),
    ({"config": {"slo": {"ttft": 0}}}, "'/config/slo/ttft': exclusiveMinimum: got 0, want 0"),
    ({"config": {"dtype": "fp8"}}, "'/config/dtype': value must be one of 'auto', 'float32', 'bfloat16'"),
    ({"config": {"device": "gpu"}}, "'/config/device': value must be one of 'auto', 'cpu', 'cuda'"),
    ({"config": {"times": {"lease": "10s"}}}, "'/config/times/lease': got string, want number"),
    ({"config": {"tenants": [{"name": "a b", "keys": []}]}}, "'/config/tenants/0/name': 'a b' does not match pattern"),
    ({"config": {"tenants": [{"name": "a"}]}}, "'/config/tenants/0': missing property 'keys'"),
    ({"config": {"admission": {"headroom": 2}}}, "'/config/admission/headroom': maximum: got 2, want 1"),
    # What the chart decides cannot be said twice.
    ({"config": {"port": 9000}}, "'/config': additional properties 'port' not allowed"),
    ({"config": {"api_keys": ["sk-12345678"]}}, "'/config': additional properties 'api_keys' not allowed"),
    ({"config": {"pools": {"decode": {"engines": 3}}}}, "'/config/pools/decode': additional properties 'engines'"),
    ({"config": {"pools": {"unified": {}}}}, "'/config/pools': additional properties 'unified' not allowed"),
    # What does not go together.
    (
        {"drain": {"gracePeriodSeconds": 30}},
        "drain.gracePeriodSeconds: 30 is less than .* = 50, so pods would be killed",
    ),
    ({"config": {"times": {"drain_timeout": 120}}, "drain": {"gracePeriodSeconds": 60}}, "= 140, so pods"),
    ({"model": {"source": "pvc", "path": "m"}}, "model.pvc.claimName: name the claim"),
    ({"model": {"source": "hostPath", "path": "m"}}, "model.hostPath.path: name the directory"),
    ({"model": {"source": "download", "path": "m"}}, "model.download.image: name an image"),
    ({"model": {"source": "image", "path": "m"}}, "model.image.reference: name the image"),
    ({"model": {"source": "pvc", "pvc": {"claimName": "c"}}}, "model.name: say what clients call the model"),
    ({"placement": {"domain": "required"}}, "placement.domainLabel: name the node label"),
    (
        {"prefill": {"gpus": 2}, "config": {"pools": {"prefill": {"tensor_parallel": 4}}}},
        "prefill.gpus: 2 cannot hold the 4",
    ),
    (
        {"prefill": {"gpus": 2}, "config": {"pools": {"prefill": {"tensor_parallel": 8, "hosts": 2}}}},
        "prefill.gpus: 2 cannot hold the 4 ranks that each pod has of config.pools.prefill.tensor_parallel",
    ),
    (
        {"config": {"pools": {"decode": {"tensor_parallel": 4, "hosts": 3}}}},
        "config.pools.decode.hosts: 3 hosts cannot have as many each of the 4 ranks",
    ),
    ({"config": {"pools": {"prefill": {"hosts": 2}}}}, "config.pools.prefill.hosts: 2 hosts cannot have as many"),
    ({"config": {"pools": {"decode": {"hosts": 17}}}}, "'/config/pools/decode/hosts': maximum: got 17, want 16"),
    (
        {
            **scaled(),
            "config": {"pools": {"decode": {"tensor_parallel": 4, "hosts": 2}}},
            "ray": {"mode": "builtin"},
        },
        "config.pools.decode.hosts: with policies in the Ray modes there is a node for each engine, and these take 2",
    ),
    ({"decode": {"rdma": {"resource": "rdma/hca"}}}, "decode.rdma.resource: network devices serve GPUs"),
    ({"decode": {"gpus": 1}, "config": {"device": "cpu"}}, "decode.gpus: config.device is cpu"),
    ({"keda": {"enabled": True}}, "keda.serverAddress: give the URL"),
    ({"hpa": {"enabled": True}}, "hpa.prefill.metric: give the metric your adapter serves"),
    ({"keda": {"prefill": {"minReplicas": 9}}}, "keda.prefill.minReplicas: 9 is more than maxReplicas 4"),
    (
        {"keda": {"enabled": True, "serverAddress": "http://p"}, "ray": {"mode": "builtin"}},
        "ray.mode: HPA and KEDA scale",
    ),
    # Of Redis.
    ({"redis": {"mode": "sentinel"}}, "'/redis/mode': value must be one of 'none', 'bundled', 'external'"),
    ({"redis": {"url": "redis://r"}}, "'/redis': additional properties 'url' not allowed"),
    ({"redis": {"mode": "external"}}, "redis.existingSecret: name the Secret whose key url"),
    ({"redis": {"external": {"port": 0}}}, "'/redis/external/port': minimum: got 0, want 1"),
    ({"redis": {"external": {"peers": [{"podSelector": {}}]}}}, "redis.external.peers: redis.mode is none; set it to"),
    ({"redis": {"bundled": {"memory": "1Gi"}}}, "'/redis/bundled/memory': '1Gi' does not match pattern"),
    ({"redis": {"bundled": {"image": "redis:7"}}}, "'/redis/bundled/image': got string, want object"),
    ({"config": {"redis": {"url": "redis://redis"}}}, "'/config': additional properties 'redis' not allowed"),
    # Of the scaling policy, by pdserve's own model of it.
    (scaled(prefill={"max": "4"}), "'/policies/pools/prefill/max': got string, want integer"),
    (scaled(prefill={"min": 1}), "'/policies/pools/prefill': missing property 'max'"),
    (scaled(decode={"max": 0}), "'/policies/pools/decode/max': minimum: got 0, want 1"),
    (scaled(decode={"max": 4, "maxi": 4}), "'/policies/pools/decode': additional properties 'maxi' not allowed"),
    (scaled(decode={"max": 4, "up": {"step": 0}}), "'/policies/pools/decode/up/step': minimum: got 0, want 1"),
    (
        scaled(decode={"max": 4, "forecast": {"kind": "arima"}}),
        "'/policies/pools/decode/forecast/kind': value must be one of 'none', 'last', 'ewma', 'holt_winters'",
    ),
    (
        scaled(decode={"max": 4, "schedules": [{"start": "8:00", "end": "18:00", "min": 2}]}),
        "'/policies/pools/decode/schedules/0/start': '8:00' does not match pattern",
    ),
    (scaled(unified={"max": 2}), "'/policies/pools': additional properties 'unified' not allowed"),
    (scaled(slo={"ttft": {"seconds": -1}}), "'/policies/slo/ttft/seconds': exclusiveMinimum: got -1, want 0"),
    (scaled(interval=0.1), "'/policies/interval': minimum: got 0.1, want 0.5"),
    (scaled(dryRun=True), "'/policies': additional properties 'dryRun' not allowed"),
    ({"policies": {"pools": {"prefill": {"max": 4}}}}, "policies.pools: say how many engines prefill and decode"),
    ({"policies": {"dry_run": True}}, "policies.pools: say how many engines prefill and decode"),
    (scaled(prefill={"min": 3, "max": 2}), "policies.pools.prefill.max: 2 is less than min 3"),
    (scaled(flip={"enabled": True}), "policies.flip.enabled: a pod keeps the role of its StatefulSet"),
    (scaled(total=1), "policies.total: 1 is less than what the pools have at least, together 2"),
    (
        {**scaled(), "keda": {"enabled": True, "serverAddress": "http://p"}},
        "policies: keda.enabled too would have both scale the same pools",
    ),
    (
        {**scaled(), "hpa": {"enabled": True, "prefill": ON_DEMAND, "decode": ON_DEMAND}},
        "policies: hpa.enabled too would",
    ),
    ({"config": {"policies": "policies.yaml"}}, "'/config': additional properties 'policies' not allowed"),
    ({"scaler": {"replicas": 0}}, "'/scaler/replicas': minimum: got 0, want 1"),
    ({"networkPolicy": {"apiServer": {"ports": []}}}, "'/networkPolicy/apiServer/ports': minItems: got 0, want 1"),
]


@pytest.mark.parametrize(("values", "told"), MISTAKES, ids=[told[:60] for _, told in MISTAKES])
def test_a_mistake_is_refused_with_its_place(values: dict[str, Any], told: str) -> None:
    with pytest.raises(Refused, match=told):
        render(values)

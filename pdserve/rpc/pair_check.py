"""Asking an engine to check the way from another one to it."""

import grpc
import msgspec

from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import LinkLost, MalformedMessage
from pdserve.core.pair_check import PairCheck
from pdserve.rpc.channel import open_channel
from pdserve.rpc.generated.pdserve.v1 import pair_check_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.pair_check_pb2_grpc import PairCheckServiceStub


async def check_pair(source: Endpoint, target: Endpoint, timeout: float) -> PairCheck:
    """What the target finds; failures are in the check, also that of reaching the target within timeout seconds.

    Raises MalformedMessage when the answer is none of ours."""
    request = pb.CheckPairRequest(source_id=source.engine_id, source_epoch=source.epoch, source_address=source.address)
    async with open_channel(target.address) as channel:
        try:
            answer = await PairCheckServiceStub(channel).CheckPair(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            reason = error.code().name.lower().replace("_", " ")
            message = f"{target.engine_id} does not answer at {target.address} ({reason})"
            return PairCheck(source=source.engine_id, target=target.engine_id, error=(LinkLost.code, message))
    try:
        return msgspec.json.decode(answer.check_json, type=PairCheck)
    except msgspec.MsgspecError as error:
        raise MalformedMessage(f"the check of {target.engine_id} is malformed: {error}") from error

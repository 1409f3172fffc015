"""Ask over gRPC as a generic client does: knowing nothing of pdserve but its address, all else by reflection."""

import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
with grpc.insecure_channel(address) as channel:
    service = DescriptorPool(ProtoReflectionDescriptorDatabase(channel)).FindServiceByName("pdserve.v1.Inference")
    method = service.methods_by_name["Generate"]
    generate = channel.unary_stream(
        f"/{service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    request = GetMessageClass(method.input_type)(
        text="def add(a, b):\n    return", sampling={"max_tokens": 12, "seed": 1}
    )
    for answer in generate(request, timeout=30):
        print(answer.text, end="", flush=True)
print()

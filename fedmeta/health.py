"""Asks a process of Flower's whether it is well: `python -m fedmeta.health [HOST:PORT]`; exit code 0 = yes.

The process was started with `--health-server-address HOST:PORT`, which speaks gRPC's health protocol.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

DEFAULT = "127.0.0.1:9095"
ANSWERS_S = 3.0


def serving(address: str) -> bool:
    """Returns whether a health server answers at an address, and that its service is well."""
    with grpc.insecure_channel(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ANSWERS_S)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if serving(sys.argv[1] if len(sys.argv) > 1 else DEFAULT) else 1)

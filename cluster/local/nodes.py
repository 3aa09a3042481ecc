"""How many nodes of the Ray cluster at 127.0.0.1:PORT are alive: python nodes.py PORT. (`ray status` needs the
autoscaler, which starts half a minute later on a busy machine.)"""

import sys

from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo

if __name__ == "__main__":
    nodes = GcsClient(address=f"127.0.0.1:{sys.argv[1]}").get_all_node_info(timeout=5)
    print(sum(node.state == GcsNodeInfo.ALIVE for node in nodes.values()))

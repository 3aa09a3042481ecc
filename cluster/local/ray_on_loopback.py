"""`ray start` with every port on 127.0.0.1: python ray_on_loopback.py start --head ...

Ray replaces 127.0.0.1 by the machine's own address and then listens on all interfaces, unless
RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 says that this machine has no cluster; but then no second node may join. Here the
nodes get the variable (so that they listen on loopback) and this process lets the second node join.
"""

import os

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from ray._private import ray_constants, services
from ray.scripts.scripts import main

ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host

if __name__ == "__main__":
    main()

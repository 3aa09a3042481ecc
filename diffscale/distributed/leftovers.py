"""Resources that a killed command of diffscale left reserved on a shared cluster.

Ray frees the placement groups of a command that ends. One that the dying controller of a SIGKILLed command asks for in
its last moments is registered after Ray has cleaned up: it holds its CPUs or GPUs until the cluster ends, and the same
command, given again, waits for them forever (Ray 2.60; seen once in some 25 kills).
"""

from __future__ import annotations

_PACKAGES = ("diffscale", "benchmarks")  # in the command line of a job that is ours


def free_leftovers() -> int:
    """Remove the placement groups of diffscale's commands that have ended. Return their number.

    The last eight digits of a group's name are the job that made it. Ray has no public list of jobs without its
    dashboard; once it has one, or frees such groups itself, this can go.
    """
    from ray import PlacementGroupID  # import cost
    from ray._private.state import jobs  # import cost
    from ray.util import placement_group_table  # import cost
    from ray.util.placement_group import PlacementGroup, remove_placement_group  # import cost

    ended = {job["JobID"] for job in jobs() if job["IsDead"] and any(name in job["Entrypoint"] for name in _PACKAGES)}
    held = [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]
    orphans = [name for name in held if name[-8:] in ended]
    for name in orphans:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
    return len(orphans)

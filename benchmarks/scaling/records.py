"""Reads many records from an S3 API server, whose every answer takes as long as a real one's, into the cached index."""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3

from benchmarks.scaling.count_requests import Counted, server
from diffscale.core.cache import ENVIRONMENT
from diffscale.records.store import read_records

RESULTS = Path(__file__).parents[1] / "results"
TEMPLATE = RESULTS / "emoji-schedule-x-resolution" / "records.jsonl"
RECORDS = 10_000
ANSWER = 0.03  # seconds: S3's are 0.02 to 0.05
RUNS = 100


class Distant(Counted):
    """Counts, and answers a GET after ANSWER seconds."""

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterator[bytes]:
        if environ["REQUEST_METHOD"] == "GET":
            time.sleep(ANSWER)
        yield from super().__call__(environ, start)


def measure_records(count: int = RECORDS) -> list[dict[str, Any]]:
    """Read `count` records: for the first time, again, and after one more was written."""
    template = json.loads(TEMPLATE.read_text().splitlines()[0])
    rows = []
    with server(Distant) as counted, tempfile.TemporaryDirectory() as cache:
        os.environ[ENVIRONMENT] = cache
        client = boto3.client("s3")

        def put(i: int) -> None:
            run = f"run-{i % RUNS:03d}"
            record = template | {"record_id": f"{i:016x}", "run_id": run, "run_name": run, "images_seen": i}
            client.put_object(Bucket="data", Key=f"runs/{run}/records/{i:016x}.json", Body=json.dumps(record).encode())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(count)))
        for what in ("first", "again", "one more"):
            if what == "one more":
                put(count)
            counted.requests.clear()
            started, cpu = time.perf_counter(), time.process_time()
            found = len(read_records(["s3://data/runs"]))
            rows.append(
                {
                    "read": what,
                    "records": found,
                    "seconds": round(time.perf_counter() - started, 1),
                    "cpu_s_with_the_server": round(time.process_time() - cpu, 1),
                    "requests": sum(counted.requests.values()),
                    "seconds_one_by_one": round(ANSWER * sum(counted.requests.values()), 1),
                    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                }
            )
    return rows

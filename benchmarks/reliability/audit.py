"""`python -m benchmarks.reliability.audit`: known vulnerabilities of the pinned dependencies, by pip-audit.

Where its database cannot be reached (many build machines), that is recorded as not run, not as well. Exit code 1 only
for found vulnerabilities. The result is benchmarks/results/audit.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "audit.json"
LIMIT = 300  # seconds


def audit() -> dict[str, object]:
    """{"status": "none found" | "found" | "not run", "reason" or "vulnerabilities": ...}."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        found = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return {"status": "not run", "reason": f"no answer within {LIMIT} s"}
    except (ValueError, KeyError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {
            "status": "not run",
            "reason": _without_addresses(lines[-1] if lines else f"exit code {done.returncode}"),
        }
    skipped = [d["skip_reason"] for d in found if "skip_reason" in d]
    if len(skipped) == len(found):
        return {
            "status": "not run",
            "reason": f"the database knows none of the {len(found)} packages (a mirror without it)",
        }
    bad = [
        {"name": d["name"], "version": d["version"], "ids": [v["id"] for v in d["vulns"]]}
        for d in found
        if d.get("vulns")
    ]
    status = "found" if bad else "none found"
    return {"status": status, "checked": len(found) - len(skipped), "skipped": len(skipped), "vulnerabilities": bad}


def _without_addresses(line: str) -> str:
    """An error names hosts of this machine's network: they do not belong into the repository."""
    return line.split("http")[0].split("(host")[0].strip()[:200]


def main() -> None:
    result = {"date": datetime.now(UTC).strftime("%Y-%m-%d")} | audit()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(int(result["status"] == "found"))


if __name__ == "__main__":
    main()

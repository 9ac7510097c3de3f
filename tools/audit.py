"""Look up known vulnerabilities of what is installed here with pip-audit, and say how much could be looked up.

Exits with 1 where something is vulnerable, with pip-audit's own code where it fails, and with 0 where the vulnerability
database cannot be reached: that is the network's affair.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

COMMAND = ["pip-audit", "--local", "--skip-editable", "--progress-spinner", "off", "--format", "json"]
UNREACHABLE = "pip-audit: the vulnerability database is not reachable from here; nothing was looked up."
NETWORK = re.compile(
    r"^(requests\.exceptions\.(\w*Timeout|ConnectionError|ProxyError|SSLError)"
    r"|requests\.exceptions\.HTTPError: (403|5\d\d)|.*Could not connect to\b)",
    re.MULTILINE,
)


def main() -> None:
    """Run pip-audit and judge what it says."""
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    if not done.stdout.strip() and NETWORK.search(done.stderr):
        print(UNREACHABLE)
        return
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode or 1)
    looked_up = [row for row in rows if "skip_reason" not in row]
    hits = [row for row in looked_up if row["vulns"]]
    for row in hits:
        print(f"{row['name']} {row['version']}: {', '.join(found['id'] for found in row['vulns'])}")
    if rows and not looked_up:
        print(UNREACHABLE)
    else:
        print(f"pip-audit: {len(looked_up)} looked up, {len(rows) - len(looked_up)} skipped, {len(hits)} vulnerable.")
    sys.exit(bool(hits))


if __name__ == "__main__":
    main()

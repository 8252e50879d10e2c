"""The `kvferry` command as a person or a script runs it."""

import os
import subprocess
import sysconfig
from pathlib import Path

KVFERRY = Path(sysconfig.get_path("scripts")) / "kvferry"


def kvferry(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, on a wide page."""
    return subprocess.run(
        [KVFERRY, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200", **environment},
    )

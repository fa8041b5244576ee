"How a benchmark keeps its result: with the machine, the versions, the command and every raw sample."
import json
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from llm_workbench.hardware.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def command_line() -> str:
    "The command that runs this benchmark again, without paths of this machine."
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = f"-m {spec.name}" if spec and spec.name != "__main__" else Path(sys.argv[0]).name
    return f"python {script} {shlex.join(sys.argv[1:])}".strip()


def record(name: str,                      # the question, such as "decode"
           samples: dict[str, list],       # {what: raw samples, one number each}
           units: str | dict = "",         # of the samples
           results: Path = RESULTS,        # folder for all devices
           **more) -> Path:                # settings and whatever else explains the numbers (must fit into JSON)
    "Write `samples` and their medians to results/<device>/<name>.json, all of the file or nothing."
    empty = [what for what, values in samples.items() if not values]
    if empty: raise ValueError(f"no samples of {', '.join(empty)}: a median needs at least one")
    machine = describe_machine()
    result = dict(
        name=name,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command_line(),
        units=units,
        medians={what: statistics.median(values) for what, values in samples.items()},
        samples=samples,
        **more,
        machine=asdict(machine),
    )
    path = results / machine.slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)  # readers see the old file or the new one, never a half
    except BaseException:
        os.unlink(tmp)
        raise
    return path


# device: a folder's name; None: this machine's
def recorded(name: str, device: str | None = None, results: Path = RESULTS) -> dict:
    "The result that `record` wrote."
    return json.loads((results / (device or describe_machine().slug) / f"{name}.json").read_text(encoding="utf-8"))

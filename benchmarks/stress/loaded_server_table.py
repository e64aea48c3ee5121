"""The table of a loaded server, apart from the clients, whose library comes with vLLM."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import Result


def loaded_server_table(result: Result) -> str:
    """Requests by kind and ending, memory, and answers of the lone server."""
    lines = [head("request", "what became of it", "requests")]
    lines += [line(row["kind"], row["ending"], f"{row['requests']:,}") for row in result["rows"]]
    memory, lone = result["memory_bytes"], result["lone_seconds"]
    setting = result["setting"]
    lines.append(
        f"\n{setting['minutes']:g} minutes, {setting['clients']} requests under way at once, "
        f"{setting['sequences']} answered at once. Memory of the server after a tenth of the time, "
        f"at most and at the end: {' MB, '.join(f'{size / 1e6:,.0f}' for size in memory.values())} "
        f"MB. An "
        f"answer took {lone['before']:.2f} s before the load, {result['longest_seconds']:.0f} s at "
        f"most under it, and {lone['after']:.2f} s after it. `{Path(setting['folder']).name}`, "
        f"{processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)

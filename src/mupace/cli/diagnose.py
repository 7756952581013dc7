"""`mupace diagnose`."""

from __future__ import annotations

from mupace.cli.settings import GivenPath


def diagnose(run: GivenPath, /, *, incident: bool = False) -> int:
    """Name the symptoms that the readings of a run's controller show, with evidence and remedies; exit code 1 if any.

    Parameters
    ----------
    run
        Directory of the run, or its control/log.jsonl.
    incident
        Write a bundle of the last readings, decisions and findings beside the log, to hand to somebody.
    """
    from mupace.control.diagnosis import diagnose as found_in
    from mupace.control.incident import write_incident
    from mupace.control.rerun import log_of, readings_of

    readings, decisions = readings_of(run)
    findings = found_in(readings)
    for finding in findings:
        print(finding)
    if not findings:
        print(f"no symptom in {len(readings)} readings")
    if incident:
        print(write_incident(log_of(run).parent, readings=readings, decisions=decisions, reason="asked_for"))
    return 1 if findings else 0

"""``lowmem-drf report``: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path

from lowmem_drf.errors import BadInputError
from lowmem_drf.files import require_output
from lowmem_drf.reporting.page import is_own_report, write_report
from lowmem_drf.reporting.read import read_record
from lowmem_drf.terminal import make_console
from lowmem_drf.training.run_folder import find_run

NAME = "report.html"


def report_command(run_folder: Path | None, output: Path | None, saliency: bool, force: bool) -> None:
    """Writes the page (``page_of``), and prints its path."""
    path, told = page_of(run_folder, output, saliency, force)
    print(path, flush=True)
    make_console(stderr=True, soft_wrap=True).print(told, highlight=False, markup=False)


def page_of(run_folder: Path | None, output: Path | None, saliency: bool, force: bool) -> tuple[Path, str]:
    """Writes the page. Returns its path, and what is to be said about it. ``saliency``: first loads the critic and
    makes the clips that show it.

    Raises BadInputError: no run, a configuration that cannot be read, or an output that cannot be written.
    """
    run = find_run(run_folder)
    path = run / NAME if output is None else output
    if path.suffix.lower() not in (".html", ".htm"):
        raise BadInputError(f"--output {path}: the report is an HTML file. Give a name that ends in .html.")
    require_output(path, "--output", is_own_report, force, kind="page")
    console, record = make_console(stderr=True, soft_wrap=True), read_record(run)
    if saliency:
        from lowmem_drf.reporting.saliency import make_saliency

        make_saliency(record, console)
    return path, write_report(record, path)

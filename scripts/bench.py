"""`hyperdescent bench`: measured, shown as it arrives, and kept in a Markdown file."""

from __future__ import annotations

from pathlib import Path

import torch

from ..meta.training.spec import split_names
from ..studies.benchmarks import implicit_report, optimizers_report
from ..studies.benchmarks.bfloat16 import bench_bfloat16
from ..studies.benchmarks.implicit import bench_implicit
from ..studies.benchmarks.implicit_cases import find_cases
from ..studies.benchmarks.metagradient import bench_metagradient
from ..studies.benchmarks.metagradient_report import (
    remarks,
    table,
    trust_section,
    write,
    write_section,
)
from ..studies.benchmarks.optimizers import Row, bench_optimizers, find_models, find_rivals
from ..studies.benchmarks.workloads import find_workloads
from ..studies.measure.device import find_device
from .show import console, telling


def run_metagradient(only: str, repeats: int, out: Path | None, device: str) -> None:
    """Measure the workloads named in only on a device; all but the large ones if none is."""
    screen = console()
    where = find_device(device)
    workloads = [workload.on(where) for workload in find_workloads(split_names(only))]
    with telling(screen) as say:
        for result in bench_metagradient(workloads, repeats=repeats, say=say):
            if not result.left_out:
                screen.print(table(result))
            for told in remarks(result):
                screen.print(told, markup=False)
            if out is not None:  # At once: the next one may take an hour.
                command = f"hyperdescent bench metagradient --only {result.workload}"
                command += f" --repeats {repeats} --out {out.name}"
                write(out, result, f"{command} --device {device}" if result.gpu else command)
                screen.print(f"kept in {out}", markup=False)


def run_implicit(only: str, repeats: int, out: Path | None) -> None:
    """Measure the cases named in only, all if none is."""
    screen = console()
    cases = find_cases(split_names(only))
    with telling(screen) as say:
        for result in bench_implicit(cases, repeats=repeats, say=say):
            screen.print(implicit_report.table(result))
            for told in implicit_report.remarks(result):
                screen.print(told, markup=False)
            if out is not None:
                command = f"hyperdescent bench implicit --only {result.case}"
                text = f"{command} --repeats {repeats} --out {out.name}"
                implicit_report.write(out, result, text)
                screen.print(f"kept in {out}", markup=False)


def run_optimizers(models: str, only: str, repeats: int, out: Path | None, device: str) -> None:
    """Measure the rules named in only on models; all of both if none is."""
    screen = console()
    where, rules = find_device(device), find_rivals(split_names(only))
    with telling(screen) as say:
        for model in find_models(split_names(models)):
            pairs: list[Row] = []
            try:
                for pair in bench_optimizers(
                    [model], rules, repeats=repeats, device=where, say=say
                ):
                    pairs.append(pair)
                    screen.print(optimizers_report.line(pair), markup=False)
                    if out is not None:  # At once: the next one may fail, or take an hour.
                        done = ",".join(each.rule for each in pairs)
                        named = only if len(pairs) == len(rules) else done
                        command = _optimizers_command(pair, named, repeats, device)
                        optimizers_report.write(out, pairs, f"{command} --out {out.name}")
            finally:
                if pairs:
                    screen.print(optimizers_report.table(pairs))
                    if out is not None:
                        screen.print(f"kept in {out}", markup=False)


def _optimizers_command(pair: Row, only: str, repeats: int, device: str) -> str:
    words = [f"hyperdescent bench optimizers --model {pair.model}"]
    words += [f"--only {only}"] if only else []
    words += [f"--repeats {repeats} --threads {torch.get_num_threads()}"]
    words += [f"--device {device}"] if pair.gpu else []
    return " ".join(words)


def run_bfloat16(only: str, seeds: int, out: Path | None) -> None:
    """Measure what bfloat16 does to the workloads named in only."""
    screen = console()
    workloads = find_workloads(split_names(only))
    measured = []
    with telling(screen) as say:
        for trust in bench_bfloat16(workloads, seeds=seeds, say=say):
            measured.append(trust)
    command = f"hyperdescent bench bfloat16 --only {','.join(w.name for w in workloads)}"
    text = trust_section(measured, f"{command} --seeds {seeds}")
    screen.print(text, markup=False)
    if out is not None:
        write_section(out, text, "bfloat16")
        screen.print(f"kept in {out}", markup=False)


__all__ = ["run_bfloat16", "run_implicit", "run_metagradient", "run_optimizers"]
